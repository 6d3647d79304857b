"""What stands on a GPU in each phase of a step, and what is asleep on its node's host: the preflight's memory part.

The phases: engines generate; judges that share the GPUs judge (others do it meanwhile); the trainer trains; the weights
are synced. All sizes are in GiB where a name says so, else in bytes.
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
    """Of the servers that share GPUs with the trainer, bytes: on the fullest GPU ``awake`` and ``asleep``, and
    ``weights`` on a node's host while they are. ``fractions``: of a GPU, by server."""

    awake: int
    asleep: int
    weights: int
    fractions: dict[str, float]


def on_device(config: Config) -> dict[str, list[str]]:
    """Phase → the parts of ``recipes.preflight.memory.Memory`` that are on the device."""
    colocated = config.rewards.placement == rewards.COLOCATED
    states = ["weights"] if config.optimizer.offload else ["weights", "gradients", "optimizer"]
    idle, engine = [*states, "critic_idle"], ["vllm", "kv_cache"]
    resting = [] if config.rollout.sleep else engine
    asleep = ["judges_asleep", "reserve"]
    trained = ["weights", "gradients", "optimizer", "critic", "activations", "logits", "workspace"]
    return {
        "generating": [*idle, *engine, *asleep],
        **({"judging": [*idle, *resting, "judges", "reserve"]} if colocated else {}),
        "training": [*trained, *resting, *asleep],
        "syncing": [*idle, *(resting or ["vllm"]), *asleep],  # the cache wakes behind it
    }


def on_host(config: Config, ranks: Sequence[dict[str, Any]], judges: Judges) -> dict[str, dict[str, float]]:
    """Phase → what is asleep on a node's host, in GiB: at most, as if all of a node's ranks were the fullest.

    The reference policy is there in all phases, and the policy's own weights while the reference takes their place.
    """
    gpus = config.cluster.ranks // config.cluster.nodes
    weights, optimizer, critic = (max(r[name] for r in ranks) for name in ("weights", "optimizer", "critic_asleep"))
    turns = max(critic, optimizer) if critic else 0.0  # while one of them works the other is there
    found = {}
    for phase in on_device(config):
        training = phase == "training"
        found[phase] = {
            "reference": weights * gpus * (2 if training else 1),
            "optimizer": optimizer * gpus if config.optimizer.offload and not training else 0.0,
            "critic": (turns if training else critic) * gpus,
            "judges": 0.0 if phase == "judging" else judges.weights / GIB,
        }
    return {phase: {name: round(size, 3) for name, size in parts.items() if size} for phase, parts in found.items()}


def judges(config: Config, settings: Settings) -> Judges:
    """Raises ConfigError for a server that needs more GPUs than a node has, or more memory for its weights than it may
    take of them."""
    if config.rewards.placement != rewards.COLOCATED:
        return Judges(0, 0, 0, {})
    gpus = config.cluster.ranks // config.cluster.nodes - config.rewards.supervisor.first_device
    room = settings.device_memory_gib * GIB
    fractions, weights = {}, 0
    for server in rewards.used(config.rewards):
        if platform.capabilities(config.cluster.platform).has_gpus and server.replicas * server.tensor > gpus:
            raise ConfigError(
                f"rewards.servers.{server.name}: replicas={server.replicas} x tensor={server.tensor} GPUs, a node has "
                f"{gpus} from rewards.supervisor.first_device on (rewards.placement=colocated: all are on each node); "
                "use fewer"
            )
        fraction = fractions[server.name] = utilization(server)
        own = judge_weights(server, int(fraction * room))
        if own > fraction * room * server.tensor:
            raise ConfigError(
                f"rewards.servers.{server.name}: {own / server.tensor / GIB:.1f} GiB of weights on each of its GPUs, "
                f"{UTILIZATION} {fraction:g} lets it have {fraction * room / GIB:.1f}: give it more, or a larger tensor"
            )
        weights += server.replicas * own
    asleep = int(len(fractions) * settings.asleep_gib * GIB)
    return Judges(int(sum(fractions.values()) * room), asleep, weights, fractions)


def utilization(server: Server) -> float:
    """The share of a GPU that the server's vLLM takes. Raises ConfigError."""
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
    """Bytes of a replica's weights: of its folder's files; of a known architecture in BF16; else all that it may take
    of its GPUs, ``most`` of each."""
    from recipes.preflight import simulated_ranks

    if files := list(Path(server.model).glob("*.safetensors")):
        return sum(file.stat().st_size for file in files)
    known = published_config(server.model)
    if known is None:
        return most * server.tensor
    shapes = simulated_ranks.checkpoint_tensors(known).values()
    return BF16 * sum(math.prod(shape) for shape in shapes)


def rank_memory(config: Config, built: Any, critic: Any, settings: Settings, parameters: int, judges: Judges) -> Any:
    """Of a micro-batch filled to the brim: as many sequences of full length as it takes, or of images alone."""
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
    here = settings.engines == "colocated"
    critic_bytes, critic_idle, critic_asleep = sizes.critic(built, critic, config.critic.offload)
    return sizes.Memory(
        weights=sizes.weights(built),
        gradients=sizes.gradients(built),
        optimizer=sizes.fullest_optimizer(built),
        activations=sizes.activations(built, shape, per_rank, fused_kernels),
        logits=sizes.logits(built, shape),
        workspace=sizes.workspace(built, shape),
        kv_cache=int(config.rollout.kv_cache_gib * 2**30) if here else 0,
        vllm=engine_bytes(config, text, parameters) if here else 0,
        reserve=int(settings.reserve_gib * 2**30),
        critic=critic_bytes,
        critic_idle=critic_idle,
        critic_asleep=critic_asleep,
        judges=judges.awake,
        judges_asleep=judges.asleep,
    )


def engine_bytes(config: Config, text: Any, parameters: int) -> int:
    from recipes.preflight import memory as sizes

    c, size = config.rollout, 4 if config.precision.name == "fp32" else 2
    fp8 = c.quantization is not None
    return sizes.engine(text, parameters, c.tensor, c.max_num_batched_tokens, c.max_num_seqs, size, fp8)


def engine_gib(config: Config, hf_config: Any, parameters: int) -> dict[str, float]:
    """Of one engine's device, the trainer left out."""
    from megatron_ext.models import family

    text = family(hf_config.architectures[0]).text_config(hf_config)
    vllm = engine_bytes(config, text, parameters) / 2**30
    return {"vllm": round(vllm, 3), "kv_cache": config.rollout.kv_cache_gib}


def device_memory(config: Config, settings: Settings, report: Report) -> str:
    """The fullest rank in each phase against the device. Raises ConfigError naming phase, settings and remedies."""
    room = settings.device_memory_gib
    assert report.engine_gib is not None
    disaggregated = sum(report.engine_gib.values()) + settings.reserve_gib
    fullest = max(report.memory_gib, key=lambda rank: rank["total"])
    report.fits = fullest["total"] <= room and (settings.engines == "colocated" or disaggregated <= room)
    for phase in sorted(report.phases, key=lambda name: name != "training"):  # first what no engine can be blamed for
        rank = max(report.memory_gib, key=lambda rank: rank[phase])
        if rank[phase] > room:
            what, remedies = WHAT[phase], REMEDIES[phase](config, settings, rank)
            raise ConfigError(
                f"{what} {rank[phase]:.1f} GiB on {place(rank)}, {settings.device} has {room}: use "
                + ", or ".join(remedies)
            )
    if not report.fits:
        raise ConfigError(
            f"an engine's device needs {disaggregated:.1f} GiB, {settings.device} has {room}: "
            "lower rollout.kv_cache_gib or raise rollout.tensor"
        )
    return f"at most {fullest['total']:.1f} of {room} GiB, on {place(fullest)}"


def place(rank: dict[str, Any]) -> str:
    return f"stage {rank['pp']}, tensor rank {rank['tp']}"


WHAT = {
    "generating": "the engine beside the trainer needs",
    "judging": "the judges beside the trainer need",
    "training": "training needs",
    "syncing": "a weight sync needs",
}


def for_training(config: Config, settings: Settings, rank: dict[str, Any]) -> list[str]:
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
    least = config.rollout.kv_cache_gib - (rank["generating"] - settings.device_memory_gib)
    return [
        *(["critic.offload=true"] if rank["critic_idle"] else []),
        *([] if config.optimizer.offload or config.rollout.staleness else ["optimizer.offload=true"]),
        f"rollout.kv_cache_gib={int(least)}" if least >= 1 else "a larger rollout.tensor",
        "more parallel.pipeline",
        "preflight.engines=disaggregated",
    ]


def for_judging(config: Config, settings: Settings, rank: dict[str, Any]) -> list[str]:
    shown = ", ".join(f"{server.name} {utilization(server):g}" for server in rewards.used(config.rewards))
    return [
        *(["critic.offload=true"] if rank["critic_idle"] else []),
        *([] if config.optimizer.offload else ["optimizer.offload=true"]),
        f"less {UTILIZATION} in rewards.servers.*.arguments (of a GPU: {shown})",
        "rewards.placement=disaggregated",
    ]


REMEDIES = {"generating": for_generating, "judging": for_judging, "training": for_training, "syncing": for_generating}


def host_memory(config: Config, settings: Settings, report: Report) -> str:
    """What sleeps on a node's host in each phase against its memory. Raises ConfigError naming what to leave awake."""
    room, sums = settings.host_memory_gib, {phase: sum(parts.values()) for phase, parts in report.host_gib.items()}
    fullest = max(sums, key=lambda phase: sums[phase])
    shown = " + ".join(f"{name} {size:.1f}" for name, size in report.host_gib[fullest].items())
    found = f"{sums[fullest]:.1f} of {room:g} GiB of a node's host while {fullest}: {shown}"
    if sums[fullest] > room:
        offloads = [f"{n}.offload=false" for n in ("optimizer", "critic") if report.host_gib[fullest].get(n)]
        judged = ["rewards.placement=disaggregated"] if report.host_gib[fullest].get("judges") else []
        remedies = [*offloads, *judged, "more cluster.nodes", "a preflight.host_memory_gib that your nodes have"]
        raise ConfigError(f"{found}: use {', or '.join(remedies)}")
    return f"at most {found}"
