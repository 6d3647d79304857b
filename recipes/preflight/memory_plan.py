"""What is on a GPU in each phase of a step, and what is offloaded to its node's host.

The phases are "generating", "judging", "training" and "syncing". Only colocated judges have a phase of their own.
Disaggregated judges judge while the engines generate. Sizes are in GiB where a name says so, otherwise in bytes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ext import platform
from recipes.config import Config, generates, samples_per_step, samples_per_update
from recipes.errors import ConfigError
from recipes.preflight.architecture import published_config
from recipes.preflight.report import NotChecked, Report, Settings
from rewards import settings as rewards
from rewards.settings import Server
from rollout import vllm_platform

GIB = 2**30
BF16 = 2
FP32 = 4
UTILIZATION = "--gpu-memory-utilization"
VLLM_UTILIZATION = 0.92  # vLLM's default


@dataclass(frozen=True)
class Judges:
    """Memory of the reward servers that share GPUs with the trainer.

    Attributes:
        awake: bytes on the fullest GPU while they judge.
        asleep: bytes on that GPU while they sleep.
        weights: bytes on a node's host while they sleep.
        fractions: server → share of a GPU's memory.
    """

    awake: int
    asleep: int
    weights: int
    fractions: dict[str, float]


def on_device(config: Config) -> dict[str, list[str]]:
    """Phase → the fields of ``recipes.preflight.memory.Memory`` that are on the device."""
    colocated = config.rewards.placement == rewards.COLOCATED
    # The gradients are freed whenever something other than the trainer works.
    states = ["weights", "buffers"] if config.optimizer.offload else ["weights", "buffers", "optimizer"]
    idle = [*states, "critic_idle"]
    engine = ["vllm", "kv_cache"]
    idle_engine = [] if config.rollout.sleep else engine
    asleep = ["judges_asleep", "reserve"]
    trained = ["weights", "buffers", "gradients", "optimizer", "critic"]
    trained += ["activations", "logits", "micro_batches", "workspace"]
    # Engines on nodes of their own take no memory of the trainer's GPUs, so the trainer has only one phase.
    if not generates(config) or config.cluster.engine_nodes:
        return {"training": [*trained, "reserve"]}
    phases = {"generating": [*idle, *engine, *asleep]}
    if colocated:
        phases["judging"] = [*idle, *idle_engine, "judges", "reserve"]
    phases["training"] = [*trained, *idle_engine, *asleep]
    # A sleeping engine wakes its weights for the sync, and its KV cache after the sync.
    phases["syncing"] = [*idle, *(idle_engine or ["vllm"]), *asleep]
    return phases


def on_host(config: Config, ranks: Sequence[dict[str, Any]], judges: Judges) -> dict[str, dict[str, float]]:
    """Phase → name → GiB that are offloaded to a node's host.

    The sizes are upper bounds: every rank of the node counts as the largest one. The trainer keeps the host memory
    that it has allocated. This is memory for the reference and for the policy's weights while the reference replaces
    them, for states that are offloaded in some phases, for the copies from which a checkpoint is written, and for the
    images of a step.
    """
    gpus = config.cluster.ranks // config.cluster.nodes
    weights = max(rank["weights"] for rank in ranks)
    optimizer = max(rank["optimizer"] for rank in ranks)
    critic = max(rank["critic_asleep"] for rank in ranks)
    has_reference = reference_interval(config) is not None
    # While an offloaded critic is trained, the policy's optimiser states are on the host.
    offloads = config.optimizer.offload or critic > 0
    kept = {
        "reference": 2 * weights if has_reference else 0.0,
        "optimizer": optimizer if offloads else 0.0,
        "critic": critic,
        "checkpoint": weights + optimizer + critic,
        "images": max(rank["images_on_host"] for rank in ranks),
    }
    host: dict[str, dict[str, float]] = {}
    for phase in on_device(config):
        asleep = 0.0 if phase == "judging" else judges.weights / GIB
        sizes = {name: size * gpus for name, size in kept.items()} | {"judges": asleep}
        host[phase] = {name: round(size, 3) for name, size in sizes.items() if size}
    return host


def judges(config: Config, settings: Settings) -> Judges:
    """The memory of colocated judges. All zeros if the judges are disaggregated.

    Raises ConfigError for a server that needs more GPUs than a node has, or whose weights need more memory than its
    share of its GPUs.
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
    """The share of a GPU's memory that the server's vLLM uses. Raises ConfigError if it is not given as a number."""
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
    """Bytes of the weights of a server's replica.

    The size comes from the files of the model's folder, or from a published architecture in BF16. If neither is known,
    it is the replica's whole share of its GPUs, which is ``most`` bytes on each.
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


@dataclass(frozen=True)
class TrainerSizes:
    """Bytes that the trainer needs on one rank's GPU. The fields are named as in ``memory.Memory``."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    micro_batches: int
    workspace: int
    buffers: int
    images_on_host: int
    # critic.offload → ``critic``, ``critic_idle`` and ``critic_asleep`` of ``memory.Memory``.
    critic: dict[bool, tuple[int, int, int]]


def needed(config: Config) -> Any:
    """What the algorithm needs beside the policy (``recipes.algorithms.needs.Needs``); nothing without RL."""
    from recipes.algorithms.needs import Needs
    from recipes.algorithms.registry import requirements

    return requirements(config.algorithm) if "rl" in config.stage.trains else Needs()


def reference_interval(config: Config) -> int | None:
    """Interval, in steps, between passes under the reference. None without a reference or without RL."""
    from recipes.algorithms import registry

    return registry.reference_interval(config.algorithm) if "rl" in config.stage.trains else None


def longest(config: Config) -> int:
    """Tokens of the longest sequence."""
    return config.data.max_prompt_tokens + config.rollout.max_response_tokens


def kv_cache_element_bytes(config: Config) -> int:
    """Bytes of an element of a key or a value in the engines' KV cache."""
    return 1 if config.rollout.kv_cache_dtype == "fp8" else config.precision.dtype.itemsize


def sequences_per_update(config: Config) -> int:
    """Sequences of the largest optimiser step of the stage, over all ranks."""
    sizes = {
        "rl": samples_per_update(config),
        "sft": config.stage.sft.rows_per_step,
        "reward_model": 2 * config.stage.reward_model.pairs_per_step,
        "value_model": config.stage.value_model.rollouts_per_step,
    }
    return max(sizes[name] for name in config.stage.trains)


def image_tokens(config: Config) -> int:
    """Tokens of the prompts that a step trains on, over all ranks, as if all of them belonged to images."""
    prompts = {
        "rl": config.algorithm.prompts_per_step,
        "sft": config.stage.sft.rows_per_step,
        "reward_model": config.stage.reward_model.pairs_per_step,
        "value_model": config.stage.value_model.rollouts_per_step,
    }
    return max(prompts[name] for name in config.stage.trains) * config.data.max_prompt_tokens


def processed_image_tokens(config: Config) -> int:
    """Tokens of all prompts whose pixels are kept at the same time, counted as in :func:`image_tokens`.

    In RL these include the prompts of further rounds of dynamic sampling, the prompts in flight and, if the next step
    is generated ahead, the prompts of that step.
    """
    if "rl" not in config.stage.trains:
        return image_tokens(config)
    rounds = config.algorithm.max_generation_batches + config.rollout.staleness
    prompts = rounds * math.ceil(config.algorithm.prompts_per_step * config.rollout.oversample)
    return max(image_tokens(config), prompts * config.data.max_prompt_tokens)


def micro_batches(config: Config) -> int:
    """Upper bound of an update's micro-batches on one rank, capped at those that the pipeline can have in flight."""
    parallel = config.parallel
    per_rank = sequences_per_update(config) // parallel.data_parallel(config.cluster.ranks)
    return min(per_rank, (2 + parallel.virtual_pipeline) * parallel.pipeline)


def columns(config: Config) -> int:
    """Number of FP32 columns that a micro-batch has for its response tokens.

    There are always four: log-probs, loss mask, advantages and weights. Where the algorithm needs them, there are also
    the log-probs of the reference and of the old policy, and a critic's values and returns.
    """
    needs = needed(config)
    return 4 + needs.reference + (config.algorithm.updates_per_rollout > 1) + 2 * needs.values


def kept_log_probs(config: Config) -> int:
    """Bytes of the log-probs under the reference and the old policy on a rank of the last pipeline stage.

    The rank keeps them for all micro-batches of a rollout until they are trained on.
    """
    if "rl" not in config.stage.trains:
        return 0
    kept = needed(config).reference + (config.algorithm.updates_per_rollout > 1)
    per_rank = samples_per_step(config) // config.parallel.data_parallel(config.cluster.ranks)
    return FP32 * kept * per_rank * longest(config) // config.parallel.context


def trainer_sizes(config: Config, built: Any, critic: Any) -> TrainerSizes:
    """The sizes of the rank with the model ``built`` and the critic ``critic`` (None without one).

    They are those of the largest possible micro-batch, which is full of sequences of the full length, or only of
    images.
    """
    from megatron_ext.weight_map import round_up
    from recipes.preflight import memory as sizes

    fused_kernels = platform.capabilities(config.cluster.platform).fused_kernels
    length = longest(config)
    pack_tokens = config.parallel.micro_batch_tokens
    tokens = round_up(pack_tokens // config.parallel.context, built.token_multiple)
    shape = sizes.Shape(
        tokens=tokens, predicting=tokens, sequences=pack_tokens // length, longest=length, patches=4 * pack_tokens
    )
    return TrainerSizes(
        weights=sizes.weights(built),
        gradients=sizes.gradients(built),
        optimizer=sizes.fullest_optimizer(built),
        activations=sizes.activations(built, shape, micro_batches(config), fused_kernels),
        logits=sizes.logits(built, shape),
        micro_batches=sizes.micro_batches(built, shape, columns(config))
        + (kept_log_probs(config) if built.parallel.is_last_stage else 0),
        workspace=sizes.workspace(built, shape),
        buffers=sizes.buffers(built),
        images_on_host=sizes.images_on_host(
            built, image_tokens(config), processed_image_tokens(config), config.cluster.ranks
        ),
        critic={offload: sizes.critic_bytes(built, critic, offload) for offload in (False, True)},
    )


def reserve(config: Config, settings: Settings) -> tuple[int, int]:
    """Bytes that a trainer's rank and an engine's worker keep on a GPU beside the memory that is counted separately.

    These are CUDA contexts, NCCL's buffers, libraries' workspaces, CUDA graphs, fragmentation, and the rank's two slots
    of a weight sync between nodes.
    """
    parallel = config.parallel
    ranks = config.cluster.ranks
    sharing_gradients = parallel.context * parallel.data_parallel(ranks)
    # The groups for tensor, pipeline and context parallelism and for gradients, and the group of all ranks.
    group_sizes = (parallel.tensor, parallel.pipeline, parallel.context, sharing_gradients, ranks)
    groups = sum(size > 1 for size in group_sizes)
    slots = 0
    if generates(config):
        # The weight sync has a second group of all ranks.
        groups += 1
        slots = slot_bytes(config) if config.cluster.nodes + config.cluster.engine_nodes > 1 else 0
    process = settings.context_gib + settings.workspace_gib
    trainer = process + settings.fragmentation_gib + groups * settings.communicator_gib
    vllm = vllm_platform.of(config.cluster.platform)
    graphs = vllm.graph_sizes(config.rollout.max_num_seqs) if config.rollout.cuda_graphs else []
    engine = process + len(graphs) * settings.graph_gib + (config.rollout.tensor > 1) * settings.communicator_gib
    return int(trainer * GIB) + slots, int(engine * GIB)


def slot_bytes(config: Config) -> int:
    """Bytes of a rank's two slots of a weight sync between nodes."""
    return 2 * config.rollout.sync_bucket_mib << 20


def receiver(config: Config, settings: Settings) -> int:
    """Bytes of the process that receives weights on each GPU of ``cluster.engine_nodes``. 0 without such nodes."""
    if not config.cluster.engine_nodes:
        return 0
    return int((settings.context_gib + settings.communicator_gib) * GIB) + slot_bytes(config)


def rank_memory(config: Config, trainer: TrainerSizes, engine: int, settings: Settings, judges: Judges) -> Any:
    """The ``memory.Memory`` of a rank. ``engine``: bytes on an engine's device without the KV cache."""
    from recipes.preflight import memory as sizes

    colocated = not config.cluster.engine_nodes and generates(config)
    critic, critic_idle, critic_asleep = trainer.critic[config.critic.offload]
    trainer_reserve, engine_reserve = reserve(config, settings)
    return sizes.Memory(
        weights=trainer.weights,
        gradients=trainer.gradients,
        optimizer=trainer.optimizer,
        activations=trainer.activations,
        logits=trainer.logits,
        micro_batches=trainer.micro_batches,
        workspace=trainer.workspace,
        buffers=trainer.buffers,
        kv_cache=int(config.rollout.kv_cache_gib * GIB) if colocated else 0,
        vllm=engine if colocated else 0,
        reserve=trainer_reserve + (engine_reserve if colocated else 0),
        critic=critic,
        critic_idle=critic_idle,
        critic_asleep=critic_asleep,
        judges=judges.awake,
        judges_asleep=judges.asleep,
        images_on_host=trainer.images_on_host,
    )


def engine_bytes(config: Config, hf_config: Any, parameters: int) -> int:
    """Bytes of the weights and buffers on one engine's device, without the KV cache."""
    from megatron_ext.models import family
    from recipes.preflight import memory as sizes

    rollout = config.rollout
    return sizes.engine(
        text=family(hf_config.architectures[0]).text_config(hf_config),
        parameters=parameters,
        tensor=rollout.tensor,
        batched_tokens=rollout.max_num_batched_tokens,
        sequences=rollout.max_num_seqs,
        step_tokens=rollout.speculative.step_tokens,
        size=config.precision.dtype.itemsize,
        fp8=rollout.quantization is not None,
    )


def engine_gib(config: Config, settings: Settings, engine: int) -> dict[str, float]:
    """GiB on an engine's device by use, without what a trainer keeps there. ``engine``: bytes without the KV cache."""
    _, engine_reserve = reserve(config, settings)
    return {
        "vllm": round(engine / GIB, 3),
        "kv_cache": config.rollout.kv_cache_gib,
        "reserve": round((engine_reserve + receiver(config, settings)) / GIB, 3),
    }


def device_memory(config: Config, settings: Settings, report: Report) -> str:
    """Compare the memory of the largest rank in each phase with the device's.

    Raises ConfigError naming all phases that do not fit, and NotChecked on a platform without GPUs.
    """
    room = settings.device_memory_gib
    fullest = max(report.memory_gib, key=lambda rank: rank["total"])
    if not platform.capabilities(config.cluster.platform).has_gpus:
        raise NotChecked(
            f"{fullest['total'] - fullest['reserve']:.1f} GiB for each of {config.cluster.ranks} ranks and its share "
            f"of an engine, beside their programs; on a CPU they share the machine's memory: free -g"
        )
    too_large = []
    for phase in report.phases:
        rank = max(report.memory_gib, key=lambda rank: rank[phase])
        if rank[phase] > room:
            too_large.append(f"{phase} {rank[phase]:.1f} ({place(rank)})")
    if too_large:
        raise ConfigError(f"{settings.device} has {room} GiB, too few for {', '.join(too_large)}")
    assert report.engine_gib is not None
    apart = sum(report.engine_gib.values())
    if config.cluster.engine_nodes and apart > room:
        raise ConfigError(
            f"an engine's device needs {apart:.1f} GiB, {settings.device} has {room}: "
            "lower rollout.kv_cache_gib or raise rollout.tensor"
        )
    phase = max(report.phases, key=lambda phase: fullest[phase])
    free = room - fullest["total"]
    return f"at most {fullest['total']:.1f} of {room} GiB, {phase}, on {place(fullest)}; {free:.1f} stay free"


def place(rank: dict[str, Any]) -> str:
    """A rank's place, for messages."""
    return f"stage {rank['pp']}, tensor rank {rank['tp']}"


def host_memory(settings: Settings, report: Report) -> str:
    """Compare what is offloaded to a node's host in each phase with the memory of the host.

    Raises ConfigError naming all phases that do not fit.
    """
    room = settings.host_memory_gib
    sums = {}
    shown = {}
    for phase, sizes in report.host_gib.items():
        sums[phase] = sum(sizes.values())
        terms = " + ".join(f"{name} {size:.1f}" for name, size in sizes.items())
        shown[phase] = f"{phase} {sums[phase]:.1f} ({terms})"
    too_large = [shown[phase] for phase in shown if sums[phase] > room]
    if too_large:
        raise ConfigError(
            f"a node's host has {room:g} GiB (preflight.host_memory_gib), too few for {', '.join(too_large)}"
        )
    fullest = max(sums, key=lambda phase: sums[phase])
    if not sums[fullest]:
        return "nothing sleeps on a node's host"
    return f"GiB on a node's host with {room:g}: at most {shown[fullest]}"
