"""What is on a GPU in each phase of a step, and what is offloaded to its node's host.

The phases: engines generate; colocated judges judge (disaggregated ones judge while engines generate); the trainer
trains; the weights are synced. Sizes are in GiB where a name says so, otherwise in bytes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ext import platform
from recipes.config import Config, samples_per_step
from recipes.errors import ConfigError
from recipes.preflight.architecture import published_config
from recipes.preflight.report import Report, Settings
from rewards import settings as rewards
from rewards.settings import Server

GIB = 2**30
BF16 = 2
UTILIZATION = "--gpu-memory-utilization"
VLLM_UTILIZATION = 0.92  # vLLM's default


@dataclass(frozen=True)
class Judges:
    """Bytes of the reward servers that share GPUs with the trainer.

    Attributes:
        awake: on the fullest GPU while they judge.
        asleep: on that GPU while they sleep.
        weights: on a node's host while they sleep.
        fractions: server → share of a GPU's memory.
    """

    awake: int
    asleep: int
    weights: int
    fractions: dict[str, float]


def on_device(config: Config) -> dict[str, list[str]]:
    """Phase → the fields of ``recipes.preflight.memory.Memory`` that are on the device."""
    colocated = config.rewards.placement == rewards.COLOCATED
    states = ["weights"] if config.optimizer.offload else ["weights", "gradients", "optimizer"]
    idle = [*states, "critic_idle"]
    engine = ["vllm", "kv_cache"]
    idle_engine = [] if config.rollout.sleep else engine
    asleep = ["judges_asleep", "reserve"]
    trained = ["weights", "gradients", "optimizer", "critic", "activations", "logits", "workspace"]
    phases = {"generating": [*idle, *engine, *asleep]}
    if colocated:
        phases["judging"] = [*idle, *idle_engine, "judges", "reserve"]
    phases["training"] = [*trained, *idle_engine, *asleep]
    # A sleeping engine wakes its weights for the sync, and its cache after it.
    phases["syncing"] = [*idle, *(idle_engine or ["vllm"]), *asleep]
    return phases


def on_host(config: Config, ranks: Sequence[dict[str, Any]], judges: Judges) -> dict[str, dict[str, float]]:
    """Phase → name → GiB that are offloaded to a node's host.

    An upper bound: all ranks of the node count as the largest.
    A reference policy is there in all phases, and the policy's weights while the reference replaces them.
    """
    from recipes.algorithms.registry import requirements

    gpus = config.cluster.ranks // config.cluster.nodes
    weights, optimizer, critic = (max(r[name] for r in ranks) for name in ("weights", "optimizer", "critic_asleep"))
    # While the critic is trained the policy's optimiser is on the host, and the other way round.
    critic_or_optimizer = max(critic, optimizer) if critic else 0.0
    has_reference = requirements(config.algorithm).reference
    host: dict[str, dict[str, float]] = {}
    for phase in on_device(config):
        training = phase == "training"
        sizes = {
            "reference": weights * gpus * (2 if training else 1) if has_reference else 0.0,
            "optimizer": optimizer * gpus if config.optimizer.offload and not training else 0.0,
            "critic": (critic_or_optimizer if training else critic) * gpus,
            "judges": 0.0 if phase == "judging" else judges.weights / GIB,
        }
        host[phase] = {name: round(size, 3) for name, size in sizes.items() if size}
    return host


def judges(config: Config, settings: Settings) -> Judges:
    """The memory of colocated judges; zeros if judges are disaggregated.

    Raises ConfigError for a server that needs more GPUs than a node has, or more memory than its share for its weights.
    """
    if config.rewards.placement != rewards.COLOCATED:
        return Judges(0, 0, 0, {})
    gpus = config.cluster.ranks // config.cluster.nodes - config.rewards.supervisor.first_device
    room = settings.device_memory_gib * GIB
    fractions = {}
    weights = 0
    for server in rewards.used(config.rewards):
        if platform.capabilities(config.cluster.platform).has_gpus and server.replicas * server.tensor > gpus:
            raise ConfigError(
                f"rewards.servers.{server.name}: replicas={server.replicas} x tensor={server.tensor} GPUs, a node has "
                f"{gpus} from rewards.supervisor.first_device on (rewards.placement=colocated: all are on each node); "
                "use fewer"
            )
        fraction = utilization(server)
        fractions[server.name] = fraction
        replica_weights = judge_weights(server, int(fraction * room))
        if replica_weights > fraction * room * server.tensor:
            per_gpu = replica_weights / server.tensor / GIB
            raise ConfigError(
                f"rewards.servers.{server.name}: {per_gpu:.1f} GiB of weights on each of its GPUs, "
                f"{UTILIZATION} {fraction:g} lets it have {fraction * room / GIB:.1f}: give it more, or a larger tensor"
            )
        weights += server.replicas * replica_weights
    asleep = int(len(fractions) * settings.asleep_gib * GIB)
    return Judges(int(sum(fractions.values()) * room), asleep, weights, fractions)


def utilization(server: Server) -> float:
    """The share of a GPU's memory that the server's vLLM uses. Raises ConfigError if its argument is no number."""
    arguments = [word for argument in server.arguments for word in argument.split("=", 1)]
    if UTILIZATION not in arguments:
        return VLLM_UTILIZATION
    try:
        return float(arguments[arguments.index(UTILIZATION) + 1])
    except (IndexError, ValueError) as error:
        raise ConfigError(
            f"rewards.servers.{server.name}.arguments={list(server.arguments)}: {UTILIZATION} wants a number"
        ) from error


def judge_weights(server: Server, most: int) -> int:
    """Bytes of a replica's weights.

    From the files of its folder, or from a published architecture in BF16. If neither is known, all of its share of
    its GPUs, which is ``most`` on each.
    """
    from recipes.preflight import simulated_ranks

    files = list(Path(server.model).glob("*.safetensors"))
    if files:
        return sum(file.stat().st_size for file in files)
    hf_config = published_config(server.model)
    if hf_config is None:
        return most * server.tensor
    shapes = simulated_ranks.checkpoint_tensors(hf_config).values()
    return BF16 * sum(math.prod(shape) for shape in shapes)


def rank_memory(config: Config, built: Any, critic: Any, settings: Settings, parameters: int, judges: Judges) -> Any:
    """``memory.Memory`` of the rank with the model ``built``, for the largest possible micro-batch.

    It is full of sequences of the full length, or of images only. ``critic`` is the rank's critic or None,
    ``parameters`` the number of the complete policy.
    """
    from megatron_ext.models import family
    from megatron_ext.weight_map import round_up
    from recipes.preflight import memory as sizes

    c = config.parallel
    fused_kernels = platform.capabilities(config.cluster.platform).fused_kernels
    longest = config.data.max_prompt_tokens + config.rollout.max_response_tokens
    tokens = round_up(c.micro_batch_tokens // c.context, built.token_multiple)
    shape = sizes.Shape(tokens, tokens, c.micro_batch_tokens // longest, longest, patches=4 * c.micro_batch_tokens)
    per_rank = samples_per_step(config) // c.data_parallel(config.cluster.ranks)
    text = family(built.hf_config.architectures[0]).text_config(built.hf_config)
    colocated = settings.engines == "colocated"
    critic_bytes, critic_idle, critic_asleep = sizes.critic_bytes(built, critic, config.critic.offload)
    return sizes.Memory(
        weights=sizes.weights(built),
        gradients=sizes.gradients(built),
        optimizer=sizes.fullest_optimizer(built),
        activations=sizes.activations(built, shape, per_rank, fused_kernels),
        logits=sizes.logits(built, shape),
        workspace=sizes.workspace(built, shape),
        kv_cache=int(config.rollout.kv_cache_gib * 2**30) if colocated else 0,
        vllm=engine_bytes(config, text, parameters) if colocated else 0,
        reserve=int(settings.reserve_gib * 2**30),
        critic=critic_bytes,
        critic_idle=critic_idle,
        critic_asleep=critic_asleep,
        judges=judges.awake,
        judges_asleep=judges.asleep,
    )


def engine_bytes(config: Config, text: Any, parameters: int) -> int:
    """Weights and buffers of one engine's device, without the KV cache."""
    from recipes.preflight import memory as sizes

    c = config.rollout
    size = 4 if config.precision.name == "fp32" else 2
    fp8 = c.quantization is not None
    return sizes.engine(text, parameters, c.tensor, c.max_num_batched_tokens, c.max_num_seqs, size, fp8)


def engine_gib(config: Config, hf_config: Any, parameters: int) -> dict[str, float]:
    """``vllm`` and ``kv_cache`` of one engine's device in GiB, without the trainer."""
    from megatron_ext.models import family

    text = family(hf_config.architectures[0]).text_config(hf_config)
    vllm = engine_bytes(config, text, parameters) / 2**30
    return {"vllm": round(vllm, 3), "kv_cache": config.rollout.kv_cache_gib}


def device_memory(config: Config, settings: Settings, report: Report) -> str:
    """Compare the largest rank of each phase with the device. Raises ConfigError naming the phase and remedies."""
    room = settings.device_memory_gib
    assert report.engine_gib is not None
    disaggregated = sum(report.engine_gib.values()) + settings.reserve_gib
    fullest = max(report.memory_gib, key=lambda rank: rank["total"])
    report.fits = fullest["total"] <= room and (settings.engines == "colocated" or disaggregated <= room)
    # Training first: if it does not fit, engines are not the cause.
    for phase in sorted(report.phases, key=lambda name: name != "training"):
        rank = max(report.memory_gib, key=lambda rank: rank[phase])
        if rank[phase] > room:
            remedies = REMEDIES[phase](config, settings, rank)
            raise ConfigError(
                f"{NEEDS[phase]} {rank[phase]:.1f} GiB on {place(rank)}, {settings.device} has {room}: use "
                + ", or ".join(remedies)
            )
    if not report.fits:
        raise ConfigError(
            f"an engine's device needs {disaggregated:.1f} GiB, {settings.device} has {room}: "
            "lower rollout.kv_cache_gib or raise rollout.tensor"
        )
    return f"at most {fullest['total']:.1f} of {room} GiB, on {place(fullest)}"


def place(rank: dict[str, Any]) -> str:
    """A rank's place, for messages."""
    return f"stage {rank['pp']}, tensor rank {rank['tp']}"


# Phase → the subject of its error message.
NEEDS = {
    "generating": "the engine beside the trainer needs",
    "judging": "the judges beside the trainer need",
    "training": "training needs",
    "syncing": "a weight sync needs",
}


def for_training(config: Config, settings: Settings, rank: dict[str, Any]) -> list[str]:
    """Settings that make training fit, the first remedy first."""
    from recipes.algorithms.registry import requirements

    offload = requirements(config.algorithm).values and not config.critic.offload
    awake = not config.rollout.sleep and rank["vllm"] > 0 and platform.capabilities(config.cluster.platform).can_sleep
    return [
        *(["rollout.sleep=true"] if awake else []),
        *(["critic.offload=true"] if offload else []),
        *(["parallel.recompute=full"] if config.parallel.recompute != "full" else []),
        "fewer parallel.micro_batch_tokens",
        "more parallel.context, parallel.tensor or parallel.pipeline",
    ]


def for_generating(config: Config, settings: Settings, rank: dict[str, Any]) -> list[str]:
    """Settings that make the engine fit beside the trainer."""
    least = config.rollout.kv_cache_gib - (rank["generating"] - settings.device_memory_gib)
    return [
        *(["critic.offload=true"] if rank["critic_idle"] else []),
        *([] if config.optimizer.offload or config.rollout.staleness else ["optimizer.offload=true"]),
        f"rollout.kv_cache_gib={int(least)}" if least >= 1 else "a larger rollout.tensor",
        "more parallel.pipeline",
        "preflight.engines=disaggregated",
    ]


def for_judging(config: Config, settings: Settings, rank: dict[str, Any]) -> list[str]:
    """Settings that make the judges fit beside the trainer."""
    shown = ", ".join(f"{server.name} {utilization(server):g}" for server in rewards.used(config.rewards))
    return [
        *(["critic.offload=true"] if rank["critic_idle"] else []),
        *([] if config.optimizer.offload else ["optimizer.offload=true"]),
        f"less {UTILIZATION} in rewards.servers.*.arguments (of a GPU: {shown})",
        "rewards.placement=disaggregated",
    ]


REMEDIES = {"generating": for_generating, "judging": for_judging, "training": for_training, "syncing": for_generating}


def host_memory(config: Config, settings: Settings, report: Report) -> str:
    """Compare what is offloaded to a node's host in each phase with its memory. Raises ConfigError naming remedies."""
    room = settings.host_memory_gib
    sums = {phase: sum(sizes.values()) for phase, sizes in report.host_gib.items()}
    fullest = max(sums, key=lambda phase: sums[phase])
    shown = " + ".join(f"{name} {size:.1f}" for name, size in report.host_gib[fullest].items()) or "nothing"
    summary = f"{sums[fullest]:.1f} of {room:g} GiB of a node's host while {fullest}: {shown}"
    if sums[fullest] > room:
        offloads = [f"{n}.offload=false" for n in ("optimizer", "critic") if report.host_gib[fullest].get(n)]
        judged = ["rewards.placement=disaggregated"] if report.host_gib[fullest].get("judges") else []
        remedies = [*offloads, *judged, "more cluster.nodes", "a preflight.host_memory_gib that your nodes have"]
        raise ConfigError(f"{summary}: use {', or '.join(remedies)}")
    return f"at most {summary}"
