"""Checks of whether a run fits: model, batch and engines under a layout, and the memory of a GPU and of a host.

Nothing here reads a weight or a row of data. The same checks therefore serve for other settings than those of the run
(``alternatives``).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_ext import platform
from recipes.config import Config, engines_of_a_node, generates, nodes_with_engines
from recipes.errors import ConfigError
from recipes.preflight import memory_plan
from recipes.preflight.report import Report, Settings

# The checks of :func:`fit`.
SHAPES = (
    "context_length",
    "attention_heads",
    "precision",
    "batch",
    "rollout",
    "colocated_judges",
    "layout",
    "ranks",
    "weights",
    "memory",
    "host_memory",
)
# Transformer Engine's FP8 needs both sides of a matrix to be multiples of this.
FP8_MULTIPLE = 16
# ``rollout.quantization`` → number that the input size of each matrix of an engine's worker must be a multiple of.
PER_CHANNEL = "fp8_per_channel"
FP8_MULTIPLES = {"fp8_per_tensor": 16, PER_CHANNEL: 16, "fp8_per_block": 128}
# Which of a replica's distinct ranks are built. ALL: all of them. STAGES: one of each pipeline stage, whose
# tensor-parallel ranks have equal sizes. CORNERS: one of the first and one of the last stage.
ALL, STAGES, CORNERS = "all", "stages", "corners"
# Limit of padded attention heads divided by heads. A layout above it wastes so much that it must be a mistake.
MAX_PADDING = 1.5


@dataclass(frozen=True)
class Ranks:
    """What the trainer holds on some of the distinct ranks of a replica, whatever else is on their GPUs.

    Attributes:
        parameters: of the complete model.
        counts: ``pp``, ``tp`` and ``count`` of parameters of each rank.
        sizes: for each rank, the bytes that the trainer needs on its GPU.
        layers: pipeline stage → decoder layers of each of its chunks.
        hf_tensors: comparison with the checkpoint's tensors.
        critic_tensors: the same for a critic, None without one.
    """

    parameters: int
    counts: list[dict[str, int]]
    sizes: list[memory_plan.TrainerSizes]
    layers: dict[int, list[int]]
    hf_tensors: dict[str, Any]
    critic_tensors: dict[str, Any] | None


# The ranks that were built in this process, by :func:`key`. A search tries the same layout with several settings.
BUILT: dict[str, Ranks] = {}


def fit(
    config: Config,
    hf_config: Any,
    settings: Settings,
    report: Report,
    say: Callable[[str], None] = lambda text: None,
    part: str = ALL,
) -> None:
    """Make the checks ``SHAPES`` and append their results to the report.

    Args:
        config: of the run.
        hf_config: transformers' configuration of its model.
        settings: the group ``preflight``.
        report: receives the results of the checks and the sizes that they compute.
        say: called with the name of what is done next.
        part: the ranks that are built: ``ALL``, ``STAGES`` or ``CORNERS``. With a part, no rank is built if an earlier
            check fails, and the tensors are not compared with the checkpoint's. A layout that fails with a part of the
            ranks fails with all of them.
    """
    from megatron_ext.models import family

    text = family(hf_config.architectures[0]).text_config(hf_config)
    judges: list[memory_plan.Judges] = []
    report.check("context_length", lambda: context_length(config, text))
    report.check("attention_heads", lambda: attention_heads(config, text))
    report.check("precision", lambda: precision(config, settings))
    report.check("batch", lambda: batch(config, report))
    report.check("rollout", lambda: rollout(config, hf_config, text))
    report.check("colocated_judges", lambda: colocated_judges(config, settings, judges))
    report.check("layout", lambda: layout(config, hf_config, report))
    if part != ALL and not report.ok:
        return
    report.check("ranks", lambda: ranks(config, hf_config, settings, judges, report, say, part), ["layout"])
    if part == ALL:
        report.check("weights", lambda: every_tensor(report), ["ranks"])
    report.check("memory", lambda: memory_plan.device_memory(config, settings, report), ["ranks"])
    report.check("host_memory", lambda: memory_plan.host_memory(settings, report), ["ranks"])


def context_length(config: Config, text: Any) -> str:
    """Compare the longest sequence with the number of positions that the model knows. Raises ConfigError above it."""
    longest = memory_plan.longest(config)
    if longest > text.max_position_embeddings:
        raise ConfigError(
            f"data.max_prompt_tokens + rollout.max_response_tokens = {longest}: the model knows "
            f"{text.max_position_embeddings} positions; lower one of them"
        )
    return f"{longest} of the model's {text.max_position_embeddings} positions"


def attention_heads(config: Config, text: Any) -> str:
    """Report how many attention heads the tensor-parallel size adds as padding, and whether its groups span nodes.

    Raises ConfigError if there are more than ``MAX_PADDING`` times as many heads with padding as without.
    """
    from megatron_ext.weight_map import sharding_of

    tensor = config.parallel.tensor
    sharding = sharding_of(text, tensor, 0)
    if sharding.padded_heads > MAX_PADDING * sharding.heads:
        fitting = [n for n in range(1, tensor) if sharding.groups % n == 0 and tensor % n == 0]
        raise ConfigError(
            f"parallel.tensor={tensor} does not divide {sharding.groups} KV heads: attention would be zero-padded from "
            f"{sharding.heads} to {sharding.padded_heads} query heads; use parallel.tensor={fitting[-1]}, and more "
            "parallel.pipeline or parallel.context for what is left"
        )
    heads = f"{sharding.heads} query and {sharding.groups} KV heads over parallel.tensor={tensor}"
    if sharding.padded_heads > sharding.heads:
        heads = (
            f"zero-padded from {sharding.heads} to {sharding.padded_heads} query heads: parallel.tensor={tensor} does "
            f"not divide {sharding.groups} KV heads"
        )
    return heads + across_nodes(config)


def across_nodes(config: Config) -> str:
    """A remark for a tensor-parallel group with ranks on several nodes, "" if there is no such group."""
    tensor = config.parallel.tensor
    ranks_per_node = config.cluster.ranks // config.cluster.nodes
    if tensor <= ranks_per_node:
        return ""
    nodes = math.ceil(tensor / ranks_per_node)
    return (
        f"; a group spans {nodes} nodes of {ranks_per_node} ranks, and every layer's all-reduces leave the node: "
        f"parallel.tensor={ranks_per_node} with more parallel.pipeline is faster"
    )


def precision(config: Config, settings: Settings) -> str:
    """Check that the device can multiply in the precision of the trainer and of the engines' KV cache."""
    if config.precision.name == "fp8" and not settings.fp8:
        raise ConfigError(f"precision.name='fp8': {settings.device} has no FP8; use precision=bf16")
    if config.rollout.kv_cache_dtype == "fp8" and not settings.fp8:
        raise ConfigError(
            f"rollout.kv_cache_dtype='fp8': {settings.device} has no FP8; use rollout.kv_cache_dtype=auto"
        )
    has_gpus = platform.capabilities(config.cluster.platform).has_gpus
    return f"{config.precision.name} on {settings.device if has_gpus else 'a CPU'}"


def batch(config: Config, report: Report) -> str:
    """Count the micro-batches of an update whose sequences all have the full length. No other update has more.

    Raises ConfigError if a data-parallel rank has fewer micro-batches than there are pipeline stages.
    """
    from megatron_ext.packing import plan
    from megatron_ext.weight_map import round_up

    cut = config.parallel
    ranks = cut.data_parallel(config.cluster.ranks)
    sequences = memory_plan.sequences_per_update(config)
    longest = round_up(memory_plan.longest(config), cut.token_multiple)
    planned = plan([longest] * sequences, ranks, config.parallel.micro_batch_tokens, cut.micro_batch_multiple)
    counts = {len(micro_batches) for micro_batches in planned}
    (count,) = counts
    idle = (cut.pipeline - 1) / (cut.virtual_pipeline * count + cut.pipeline - 1)
    report.batch = {
        "sequences_per_update": sequences,
        "data_parallel_ranks": ranks,
        "sequences_per_rank": sequences // ranks,
        "micro_batches_per_rank": count,
        "micro_batch_tokens": config.parallel.micro_batch_tokens,
        "pipeline_idle_fraction": round(idle, 4),
    }
    if cut.pipeline > 1 and count < cut.pipeline:
        raise ConfigError(
            f"{count} micro-batches on each data-parallel rank for parallel.pipeline={cut.pipeline} stages, which "
            "would wait for each other: use fewer stages, more prompts a step or fewer parallel.micro_batch_tokens"
        )
    return (
        f"{sequences} sequences an update; {ranks} data-parallel ranks with {sequences // ranks}, in at most {count} "
        "micro-batches"
    )


def rollout(config: Config, hf_config: Any, text: Any) -> str:
    """Check the engines' tensor-parallel size, KV cache and quantisation against the model and the longest sequence."""
    if not generates(config):
        return "no engine is started"
    from recipes.preflight import memory as sizes

    c = config.rollout
    if text.num_attention_heads % c.tensor:
        raise ConfigError(
            f"rollout.tensor={c.tensor} does not divide the model's {text.num_attention_heads} attention heads: vLLM "
            "needs that; use a divisor"
        )
    fp8_matrices(config, hf_config, text)
    engines_of_a_node(config, nodes_with_engines(config))
    longest = memory_plan.longest(config)
    token_bytes = sizes.kv_bytes_per_token(text, c.tensor, memory_plan.kv_cache_element_bytes(config))
    tokens = int(c.kv_cache_gib * 2**30 / token_bytes)
    if tokens < longest:
        need = longest * token_bytes / 2**30
        raise ConfigError(
            f"rollout.kv_cache_gib={c.kv_cache_gib} holds {tokens} tokens, one sequence has {longest}: use at least "
            f"{need:.2f}, or a larger rollout.tensor"
        )
    return (
        f"{c.engines} engines of {c.tensor}; the KV cache of each holds {tokens} tokens: {tokens // longest} sequences "
        f"of full length, rollout.max_num_seqs={c.max_num_seqs}"
    )


def fp8_matrices(config: Config, hf_config: Any, text: Any) -> None:
    """Raises ConfigError if the input size of a matrix of an engine's worker is no multiple of what vLLM 0.32 needs.

    With one scale per block, vLLM reports this only in a worker's first pass (``per_token_group_quant_fp8``). With one
    scale per tensor or channel, vLLM's kernel for H100 pads such a matrix and fails while it loads the model
    ("Overwriting existing tensor attribute: weight_loader", vLLM's issue #47005).
    """
    c = config.rollout
    multiple = FP8_MULTIPLES.get(c.quantization or "")
    if multiple is None or not platform.capabilities(config.cluster.platform).has_gpus:
        return
    uneven = uneven_inputs(hf_config, text, c.tensor, multiple)
    if not uneven:
        return
    remedies = []
    per_channel = FP8_MULTIPLES[PER_CHANNEL]
    if multiple > per_channel and not uneven_inputs(hf_config, text, c.tensor, per_channel):
        remedies.append(f"rollout.quantization={PER_CHANNEL}")
    smaller = [n for n in range(1, c.tensor) if c.tensor % n == 0]
    if fitting := [n for n in smaller if not uneven_inputs(hf_config, text, n, multiple)]:
        remedies.append(f"rollout.tensor={fitting[-1]}")
    shown = ", ".join(f"{name} {size:g}" for name, size in uneven.items())
    raise ConfigError(
        f"rollout.quantization={c.quantization!r}, rollout.tensor={c.tensor}: a worker's matrices have inputs that are "
        f"no multiples of {multiple} ({shown}): use {', or '.join(remedies or ['rollout.quantization=null'])}"
    )


def uneven_inputs(hf_config: Any, text: Any, tensor: int, multiple: int) -> dict[str, float]:
    """Name → input size of those of an engine worker's matrices whose input size is no multiple of ``multiple``."""
    from megatron_ext.models import family

    heads = text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    sizes = {
        "hidden size": text.hidden_size,
        "attention": heads * head_dim / tensor,
        "feed-forward": text.intermediate_size / tensor,
    }
    tower = getattr(hf_config, "vision_config", None)
    if tower is not None and family(hf_config.architectures[0]).tower_is_quantised(hf_config):
        sizes["tower's hidden size"] = tower.hidden_size
        sizes["tower's feed-forward"] = tower.intermediate_size / tensor
        heads = getattr(tower, "num_heads", None) or tower.num_attention_heads
        # vLLM does not shard the attention if the tensor-parallel size does not divide its heads.
        if heads % tensor == 0:
            sizes["tower's attention"] = tower.hidden_size / tensor
    return {name: size for name, size in sizes.items() if size % multiple}


def colocated_judges(config: Config, settings: Settings, judges: list[memory_plan.Judges]) -> str:
    """Append the memory of the reward servers on the trainer's GPUs to ``judges``."""
    judges.append(memory_plan.judges(config, settings))
    shown = ", ".join(f"{name} {fraction:g}" for name, fraction in judges[0].fractions.items())
    return f"on the trainer's GPUs, of each: {shown}" if shown else "none is on the trainer's GPUs"


def layout(config: Config, hf_config: Any, report: Report) -> str:
    """Check that the parallel sizes divide layers, heads, MLPs and vision tower, as ``model.build`` does."""
    from megatron_ext import model
    from megatron_ext.models import family
    from recipes.preflight import simulated_ranks

    cut = config.parallel
    report.layout = asdict(cut) | {"data": cut.data_parallel(config.cluster.ranks)}
    model.check(hf_config, cut)
    # Joining the simulated world checks the sizes against each other and against the number of ranks.
    with simulated_ranks.rank(0, config.cluster.ranks, cut):
        family(hf_config.architectures[0]).param_mappings(hf_config, cut.tensor, 0)
    sizes = f"tensor {cut.tensor} x pipeline {cut.pipeline} x context {cut.context} x data {report.layout['data']}"
    return f"{config.cluster.ranks} ranks: {sizes}"


def ranks(
    config: Config,
    hf_config: Any,
    settings: Settings,
    judges: Sequence[memory_plan.Judges],
    report: Report,
    say: Callable[[str], None],
    part: str,
) -> str:
    """Build the distinct ranks of a replica, and add their parameters, memory and tensors to the report.

    ``judges`` is empty if the check of the judges failed. Their memory is then not counted.
    """
    judges_memory = judges[0] if judges else memory_plan.Judges(0, 0, 0, {})
    name = key(config, part)
    if name not in BUILT:
        BUILT[name] = build(config, hf_config, say, part)
    built = BUILT[name]
    report.phases = memory_plan.on_device(config)
    report.parameters_total = built.parameters
    report.parameters_per_rank = built.counts
    report.hf_tensors = built.hf_tensors
    report.critic_tensors = built.critic_tensors
    engine = memory_plan.engine_bytes(config, hf_config, built.parameters)
    for place, sizes in zip(built.counts, built.sizes, strict=True):
        memory = memory_plan.rank_memory(config, sizes, engine, settings, judges_memory)
        report.memory_gib.append({"pp": place["pp"], "tp": place["tp"], **memory.gib(report.phases)})
    report.engine_gib = memory_plan.engine_gib(config, settings, engine)
    report.host_gib = memory_plan.on_host(config, report.memory_gib, judges_memory)
    shown = " | ".join(" + ".join(map(str, chunks)) for chunks in built.layers.values())
    return f"{len(built.counts)} distinct ones; layers on the pipeline's stages {shown}"


def key(config: Config, part: str) -> str:
    """A key of everything that the result of :func:`build` depends on."""
    needed = memory_plan.needed(config)
    return repr(
        (
            config.model,
            config.critic.path,
            needed.values,
            config.parallel,
            config.precision,
            config.cluster.ranks,
            config.cluster.platform,
            memory_plan.longest(config),
            memory_plan.micro_batches(config),
            memory_plan.columns(config),
            memory_plan.kept_log_probs(config),
            memory_plan.image_tokens(config),
            memory_plan.processed_image_tokens(config),
            part,
        )
    )


def build(config: Config, hf_config: Any, say: Callable[[str], None], part: str) -> Ranks:
    """Build the model of each distinct rank, or of a ``part`` of them, one after the other."""
    from megatron_ext import hf_checkpoint, scalar_head
    from recipes.preflight import simulated_ranks

    cut = config.parallel
    wanted = (config.precision, config.model.frozen)
    say("transformers' model")
    expected = checkpoint_tensors(config, hf_config)
    critic_config = None
    if memory_plan.needed(config).values:
        path = config.critic.path
        critic_config = scalar_head.scalar_config(hf_checkpoint.config(path) if path else hf_config)
    coverage = simulated_ranks.Coverage()
    critic_coverage = simulated_ranks.Coverage()
    counts = []
    rank_sizes = []
    layers: dict[int, list[int]] = {}
    numbers = simulated_ranks.distinct_ranks(config.cluster.ranks, cut)
    if part != ALL:
        numbers = numbers[:: cut.tensor]
    if part == CORNERS:
        numbers = sorted({numbers[0], numbers[-1]})
    for n, number in enumerate(numbers):
        say(f"rank {n + 1} of {len(numbers)}")
        with simulated_ranks.rank(number, config.cluster.ranks, cut) as here:
            try:
                built = simulated_ranks.build(hf_config, here, *wanted)
                critic = simulated_ranks.build(critic_config, here, *wanted) if critic_config else None
            except AssertionError as error:
                raise ConfigError(f"parallel: Megatron-Core refuses this layout: {error}") from error
            fp8_alignment(config, built)
            coverage.add(built)
            if critic:
                critic_coverage.add(critic)
            parameters = [p for chunk in built.chunks for p in chunk.module.parameters()]
            count = sum(p.numel() for p in parameters)
            counts.append({"pp": here.pipeline_rank, "tp": here.tensor_rank, "count": count})
            rank_sizes.append(memory_plan.trainer_sizes(config, built, critic))
            decoders = [getattr(chunk.module, "language", chunk.module).decoder for chunk in built.chunks]
            layers[here.pipeline_rank] = [len(decoder.layers) for decoder in decoders]
    critic_tensors = None
    if critic_config:
        critic_tensors = critic_coverage.compare(simulated_ranks.checkpoint_tensors(critic_config), tied=False)
    return Ranks(
        parameters=sum(map(math.prod, expected.values())),
        counts=counts,
        sizes=rank_sizes,
        layers=layers,
        hf_tensors=coverage.compare(expected, hf_config.tie_word_embeddings),
        critic_tensors=critic_tensors,
    )


def checkpoint_tensors(config: Config, hf_config: Any) -> dict[str, tuple[int, ...]]:
    """Name → shape of the model's tensors, from its files if it has any, otherwise from transformers' model."""
    from megatron_ext import hf_checkpoint
    from recipes.preflight import simulated_ranks

    if not any(Path(config.model.path).glob("*.safetensors")):
        return simulated_ranks.checkpoint_tensors(hf_config)
    headers = hf_checkpoint.headers(config.model.path).values()
    published = hf_checkpoint.published_name(config.model.path)
    return {published(n): tuple(e["shape"]) for header in headers for n, e in header.items() if n != "__metadata__"}


def every_tensor(report: Report) -> str:
    """Check that one replica holds every element of every Hugging Face tensor exactly once."""
    assert report.hf_tensors is not None
    for owner, comparison in (("", report.hf_tensors), ("the critic's ", report.critic_tensors or {})):
        for problem in ("missing", "unexpected", "duplicated"):
            names = comparison.get(problem)
            if names:
                raise ConfigError(
                    f"{owner}{len(names)} tensors {problem}, the first is {names[0]!r}: the family's table in "
                    "megatron_ext/models/ does not fit this model"
                )
    return f"{report.hf_tensors['covered']} tensors, {report.parameters_total:,} parameters, each exactly once"


def fp8_alignment(config: Config, built: Any) -> None:
    """Raises ConfigError if a side of one of the decoder's local matrices is no multiple of ``FP8_MULTIPLE``."""
    if config.precision.name != "fp8":
        return
    for shard in built.shards:
        sides = list(shard.tensor.shape)
        if "decoder.layers." in shard.name and len(sides) == 2 and any(side % FP8_MULTIPLE for side in sides):
            raise ConfigError(
                f"parallel.tensor={config.parallel.tensor}: {shard.name} is {sides} on a rank, FP8 wants multiples of "
                f"{FP8_MULTIPLE}; use a smaller one, or precision=bf16"
            )
