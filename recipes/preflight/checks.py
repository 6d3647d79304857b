"""The checks of the preflight, in the order in which a run would meet what they look for.

A check returns one line that says what it found, and raises ConfigError with what to change.
"""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from megatron_ext import platform
from recipes.config import Config, engines_of_a_node, generates, parse, samples_per_step
from recipes.data.rows import PROMPT_FIELDS
from recipes.data.source_spec import source_names
from recipes.errors import ConfigError
from recipes.launch.requirements import check_parts, check_supervised
from recipes.preflight import memory_plan
from recipes.preflight.architecture import config_file, model_config, published_config, published_file
from recipes.preflight.report import Report, Settings
from rewards import mixing, registry
from rewards.client import Client
from rewards.settings import PLACEMENTS

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
# Transformer Engine needs both sides of a matrix to be multiples of it.
FP8_MULTIPLE = 16
# Padded attention heads divided by heads: a layout above it wastes so much that it must be a mistake.
MAX_PADDING = 1.5
# Of a trained parameter: its BF16 weight, FP32 master and two moments.
CHECKPOINT_BYTES = 14


def examine(raw: DictConfig, settings: Settings, say: Callable[[str], None]) -> Report:
    """Run all checks.

    Args:
        raw: the composed configuration of the run, without the group ``preflight``.
        settings: the group ``preflight``.
        say: called with the name of what is done next.
    """
    report = Report(str(raw.recipe.name), Path(str(raw.model.path)).name, settings.device, settings.device_memory_gib)
    parsed: list[Config] = []

    def configuration() -> str:
        if settings.engines not in PLACEMENTS:
            raise ConfigError(f"preflight.engines={settings.engines!r}: use one of {', '.join(PLACEMENTS)}")
        parsed.append(parse(raw))
        return f"{report.recipe}: every field is known and possible"

    say("configuration")
    if not report.check("configuration", configuration):
        return report
    config = parsed[0]
    report.check("data_and_rewards", lambda: data_and_rewards(config))
    report.check("reward_servers", lambda: reward_servers(config))
    report.check("tokenizer", lambda: tokenizer(config))
    say("Megatron-Core, transformers")
    # Before the next import: it switches off torch's inductor, whose import takes seconds.
    platform.activate("cpu")
    from recipes.preflight import simulated_ranks

    simulated_ranks.activate()
    configs: list[Any] = []
    if report.check("architecture", lambda: architecture(config, configs)):
        hf_config, text = configs
        report.check("context_length", lambda: context_length(config, text))
        report.check("attention_heads", lambda: attention_heads(config, text))
        report.check("precision", lambda: precision(config, settings))
        report.check("batch", lambda: batch(config, report))
        report.check("rollout", lambda: rollout(config, text))
        report.check("images", lambda: images(config, hf_config))
        say("prompts")
        report.check("prompts", lambda: every_prompt(config))
        judges: list[memory_plan.Judges] = []
        report.check("judges", lambda: colocated_judges(config, settings, judges))
        if report.check("layout", lambda: layout(config, hf_config, report)) and report.check(
            "ranks", lambda: build(config, hf_config, settings, judges, report, say)
        ):
            report.check("weights", lambda: every_tensor(report))
            report.check("memory", lambda: memory_plan.device_memory(config, settings, report))
            report.check("host_memory", lambda: memory_plan.host_memory(config, settings, report))
    report.check("disk_space", lambda: disk_space(config, report))
    return report


def data_and_rewards(config: Config) -> str:
    """The files of the data, their schema, the mix of rewards, and the verifiers."""
    check_supervised(config)
    check_parts(config)
    verifiers = ", ".join(mixing.verifier_names(config.rewards.mix))
    return f"{source_names(config.data.prompts)}: rows fit the schema; verifiers {verifiers} are found"


def reward_servers(config: Config) -> str:
    """Whether the reward servers that are up serve the models that the verifiers need; others start with the run."""
    names = {*mixing.verifier_names(config.rewards.mix), *config.data.scores}
    servers = registry.servers_of(names, config.rewards)
    with Client(servers, config.rewards.client) as client:
        client.check(must_run=False)
    addresses = ", ".join(f"{name} at {' '.join(server.addresses)}" for name, server in servers.items())
    return f"{addresses}: those that are up serve their model" if addresses else "no verifier has a server"


def has_model(config: Config) -> bool:
    """Whether this machine has the model's folder. If not, it is not the cluster, and its disk is not the run's."""
    return (Path(config.model.path) / "config.json").is_file()


def tokenizer(config: Config) -> str:
    """The size of the tokenizer, its end-of-turn token and its chat template, if its files are on this machine."""
    folder = Path(config.model.path)
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        if has_model(config):
            raise ConfigError(f"model.path={config.model.path!r}: no {' or '.join(TOKENIZER_FILES)}; copy them there")
        return f"not looked at: {folder} is not on this machine"
    from transformers import AutoTokenizer

    from rollout import chat_layout

    # Otherwise transformers asks at the terminal whether to run the folder's code.
    chat_layout.register()
    loaded = AutoTokenizer.from_pretrained(folder)
    if loaded.eos_token_id is None:
        raise ConfigError(f"model.path={config.model.path!r}: the tokenizer has no eos_token, which ends a response")
    if not loaded.chat_template:
        raise ConfigError(f"model.path={config.model.path!r}: the tokenizer has no chat template; add one")
    raw = json.loads((folder / "config.json").read_text())
    rows = (raw.get("text_config") or raw.get("llm_config") or raw)["vocab_size"]
    if len(loaded) > rows:
        raise ConfigError(
            f"model.path={config.model.path!r}: the tokenizer has {len(loaded)} tokens, the model's vocabulary {rows}: "
            "take both from the same model"
        )
    return f"{len(loaded)} tokens in a vocabulary of {rows}"


def architecture(config: Config, configs: list[Any]) -> str:
    """Appends transformers' configuration of the model, and that of its language model, to ``configs``."""
    from megatron_ext.models import family
    from recipes.preflight import simulated_ranks

    source = config_file(config.model.path)
    hf_config = model_config(config.model.path)
    published = published_config(config.model.path)
    if has_model(config) and published is not None:
        expected = simulated_ranks.checkpoint_tensors(published)
        if simulated_ranks.checkpoint_tensors(hf_config) != expected:
            raise ConfigError(
                f"model.path={config.model.path!r}: config.json gives other tensors than "
                f"{published_file(config.model.path).name} in conf/model/architectures: it is another model, give its "
                "folder another name"
            )
    text = family(hf_config.architectures[0]).text_config(hf_config)
    configs += [hf_config, text]
    return f"{hf_config.architectures[0]}, from {source.name}"


def context_length(config: Config, text: Any) -> str:
    """The longest sequence against the positions that the model knows."""
    longest = config.data.max_prompt_tokens + config.rollout.max_response_tokens
    if longest > text.max_position_embeddings:
        raise ConfigError(
            f"data.max_prompt_tokens + rollout.max_response_tokens = {longest}: the model knows "
            f"{text.max_position_embeddings} positions; lower one of them"
        )
    return f"{longest} of the model's {text.max_position_embeddings} positions"


def attention_heads(config: Config, text: Any) -> str:
    """How many attention heads the tensor-parallel size adds as padding."""
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
    if sharding.padded_heads > sharding.heads:
        return (
            f"zero-padded from {sharding.heads} to {sharding.padded_heads} query heads: parallel.tensor={tensor} does "
            f"not divide {sharding.groups} KV heads"
        )
    return f"{sharding.heads} query and {sharding.groups} KV heads over parallel.tensor={tensor}"


def precision(config: Config, settings: Settings) -> str:
    """Whether the device multiplies in the precision."""
    if config.precision.name == "fp8" and not settings.fp8:
        raise ConfigError(f"precision.name='fp8': {settings.device} has no FP8; use precision=bf16")
    return f"{config.precision.name} on {settings.device}"


def batch(config: Config, report: Report) -> str:
    """The micro-batches of a step whose sequences all have the full length, which is their largest number.

    Raises ConfigError if there are fewer than pipeline stages.
    """
    from megatron_ext.packing import plan
    from megatron_ext.weight_map import round_up

    cut = config.parallel
    ranks = cut.data_parallel(config.cluster.ranks)
    samples = samples_per_step(config)
    longest = round_up(config.data.max_prompt_tokens + config.rollout.max_response_tokens, cut.token_multiple)
    planned = plan([longest] * samples, ranks, config.parallel.micro_batch_tokens, cut.micro_batch_multiple)
    counts = {len(micro_batches) for micro_batches in planned}
    (count,) = counts
    idle = (cut.pipeline - 1) / (cut.virtual_pipeline * count + cut.pipeline - 1)
    report.batch = {
        "prompts": config.algorithm.prompts_per_step,
        "samples": samples,
        "data_parallel_ranks": ranks,
        "samples_per_rank": samples // ranks,
        "micro_batches_per_rank": count,
        "micro_batch_tokens": config.parallel.micro_batch_tokens,
        "pipeline_idle_fraction": round(idle, 4),
    }
    if cut.pipeline > 1 and count < cut.pipeline:
        raise ConfigError(
            f"{count} micro-batches on each data-parallel rank for parallel.pipeline={cut.pipeline} stages, which "
            "would wait for each other: use fewer stages, more prompts a step or fewer parallel.micro_batch_tokens"
        )
    return f"{samples} samples; {ranks} data-parallel ranks with {samples // ranks}, in at most {count} micro-batches"


def rollout(config: Config, text: Any) -> str:
    """Whether the engines' tensor-parallel size and KV cache fit the model and the longest sequence."""
    if not generates(config):
        return "no engine is started"
    from recipes.preflight import memory as sizes

    c = config.rollout
    if text.num_attention_heads % c.tensor:
        raise ConfigError(
            f"rollout.tensor={c.tensor} does not divide the model's {text.num_attention_heads} attention heads: vLLM "
            "needs that; use a divisor"
        )
    engines_of_a_node(config, config.cluster.nodes)
    longest = config.data.max_prompt_tokens + c.max_response_tokens
    size = 4 if config.precision.name == "fp32" else 2
    tokens = int(c.kv_cache_gib * 2**30 / sizes.kv_bytes_per_token(text, c.tensor, size))
    if tokens < longest:
        need = longest * sizes.kv_bytes_per_token(text, c.tensor, size) / 2**30
        raise ConfigError(
            f"rollout.kv_cache_gib={c.kv_cache_gib} holds {tokens} tokens, one sequence has {longest}: use at least "
            f"{need:.2f}, or a larger rollout.tensor"
        )
    return (
        f"{c.engines} engines of {c.tensor}; the KV cache of each holds {tokens} tokens: {tokens // longest} sequences "
        f"of full length, rollout.max_num_seqs={c.max_num_seqs}"
    )


def images(config: Config, hf_config: Any) -> str:
    """Whether the largest image that the processor makes leaves room in the prompt."""
    if not hasattr(hf_config, "vision_config"):
        return "a text model"
    file = Path(config.model.path) / "preprocessor_config.json"
    if not file.is_file():
        return f"not looked at: {file} is not on this machine"
    processor = json.loads(file.read_text())
    # InternVL3: tiles, and one more of the complete image.
    if hasattr(hf_config, "image_seq_length"):
        limit = f"max_patches={processor['max_patches']}"
        tokens = (processor["max_patches"] + 1) * hf_config.image_seq_length
    else:
        vision = hf_config.vision_config
        pixels = min(processor["max_pixels"], config.data.images.max_pixels)
        limit = f"max_pixels={processor['max_pixels']}, data.images.max_pixels={config.data.images.max_pixels}"
        tokens = pixels // (vision.patch_size * vision.spatial_merge_size) ** 2
    if tokens >= config.data.max_prompt_tokens:
        raise ConfigError(
            f"an image can have {tokens} tokens ({limit}; {file}), data.max_prompt_tokens="
            f"{config.data.max_prompt_tokens}: lower the first or raise the second"
        )
    return f"the largest image has {tokens} of {config.data.max_prompt_tokens} prompt tokens"


def every_prompt(config: Config) -> str:
    """Processes each prompt as the run does: its length and its images, each of which is read and resized once."""
    if not has_model(config):
        return f"not looked at: {config.model.path} is not on this machine"
    from recipes.data.processor import PromptProcessor, check_rows
    from recipes.data.sft_examples import check_examples

    processor = PromptProcessor(config.model.path, config.data.max_prompt_tokens, config.data.images)
    counts = [
        f"{len(check_rows(processor, source, PROMPT_FIELDS))} of {source_names(source)}"
        for source in (config.data.prompts, config.data.evaluation)
    ]
    if "sft" in config.stage.trains:
        mark = config.rollout.thinking_marks[0]
        longest = config.parallel.micro_batch_tokens
        judge = config.stage.sft.judge
        for source in filter(None, (config.data.sft, config.stage.sft.held_out)):
            counts.append(f"{check_examples(processor, source, judge, mark, longest)} of {source_names(source)}")
    return f"prompts are made: {', '.join(counts)}"


def layout(config: Config, hf_config: Any, report: Report) -> str:
    """Whether the parallel sizes divide layers, heads, feed-forward layers and vision tower, as for ``model.build``."""
    from megatron_ext import model
    from megatron_ext.models import family
    from recipes.preflight import simulated_ranks

    cut = config.parallel
    report.layout = asdict(cut) | {"data": cut.data_parallel(config.cluster.ranks)}
    model.check(hf_config, cut)
    # Joining the simulated world checks the sizes against each other and against its number of ranks.
    with simulated_ranks.rank(0, config.cluster.ranks, cut):
        family(hf_config.architectures[0]).param_mappings(hf_config, cut.tensor, 0)
    sizes = f"tensor {cut.tensor} x pipeline {cut.pipeline} x context {cut.context} x data {report.layout['data']}"
    return f"{config.cluster.ranks} ranks: {sizes}"


def colocated_judges(config: Config, settings: Settings, judges: list[memory_plan.Judges]) -> str:
    """Appends the memory of the reward servers on the trainer's GPUs to ``judges``."""
    judges.append(memory_plan.judges(config, settings))
    shown = ", ".join(f"{name} {fraction:g}" for name, fraction in judges[0].fractions.items())
    return f"on the trainer's GPUs, of each: {shown}" if shown else "none is on the trainer's GPUs"


def build(
    config: Config,
    hf_config: Any,
    settings: Settings,
    judges: list[memory_plan.Judges],
    report: Report,
    say: Callable[[str], None],
) -> str:
    """Builds the model of each distinct rank and adds up parameters, memory, and the Hugging Face tensors it holds.

    ``judges`` is empty if their check failed; they are then not counted.
    """
    from megatron_ext import hf_checkpoint, scalar_head
    from recipes.algorithms.registry import requirements
    from recipes.preflight import simulated_ranks

    cut = config.parallel
    wanted = (config.precision, config.model.frozen)
    say("transformers' model")
    expected = simulated_ranks.checkpoint_tensors(hf_config)
    if has_model(config) and any(Path(config.model.path).glob("*.safetensors")):
        headers = hf_checkpoint.headers(config.model.path).values()
        published = hf_checkpoint.published_name(config.model.path)
        expected = {
            published(n): tuple(e["shape"]) for header in headers for n, e in header.items() if n != "__metadata__"
        }
    total = sum(map(math.prod, expected.values()))
    critic_config = None
    if requirements(config.algorithm).values:
        path = config.critic.path
        critic_config = scalar_head.scalar_config(hf_checkpoint.config(path) if path else hf_config)
    judges_memory = judges[0] if judges else memory_plan.Judges(0, 0, 0, {})
    report.phases = memory_plan.on_device(config)
    coverage = simulated_ranks.Coverage()
    critic_coverage = simulated_ranks.Coverage()
    layers: dict[int, list[int]] = {}
    ranks = simulated_ranks.distinct_ranks(config.cluster.ranks, cut)
    for n, number in enumerate(ranks):
        say(f"rank {n + 1} of {len(ranks)}")
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
            place = {"pp": here.pipeline_rank, "tp": here.tensor_rank}
            parameters = [p for chunk in built.chunks for p in chunk.module.parameters()]
            report.parameters_per_rank.append({**place, "count": sum(p.numel() for p in parameters)})
            memory = memory_plan.rank_memory(config, built, critic, settings, total, judges_memory)
            report.memory_gib.append({**place, **memory.gib(report.phases)})
            decoders = [getattr(chunk.module, "language", chunk.module).decoder for chunk in built.chunks]
            layers[here.pipeline_rank] = [len(decoder.layers) for decoder in decoders]
    report.parameters_total = total
    report.hf_tensors = coverage.compare(expected, hf_config.tie_word_embeddings)
    if critic_config:
        report.critic_tensors = critic_coverage.compare(simulated_ranks.checkpoint_tensors(critic_config), tied=False)
    report.engine_gib = memory_plan.engine_gib(config, hf_config, total)
    report.host_gib = memory_plan.on_host(config, report.memory_gib, judges_memory)
    shown = " | ".join(" + ".join(map(str, chunks)) for chunks in layers.values())
    return f"{len(ranks)} distinct ones; layers on the pipeline's stages {shown}"


def every_tensor(report: Report) -> str:
    """Whether one replica holds every element of every Hugging Face tensor exactly once."""
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


def disk_space(config: Config, report: Report) -> str:
    """Whether the disk has room for the checkpoints that are kept, one that is being written, and exported models."""
    if report.parameters_total is None:
        raise ConfigError("the number of parameters is not known: see the checks before")
    from recipes.algorithms.registry import requirements

    # A critic counts as large as the policy.
    trained = 2 if requirements(config.algorithm).values else 1
    kept = CHECKPOINT_BYTES * trained * (config.checkpoint.keep + 1)
    need = report.parameters_total * (kept + 2 * len(config.stage.trains))
    text = (
        f"{need / 1e12:.2f} TB in run_dir={config.run_dir!r} for {config.checkpoint.keep} + 1 checkpoints and exports"
    )
    if not has_model(config):
        return f"{text}; not looked at: {config.model.path} is not on this machine"
    folder = Path(config.run_dir).absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < need:
        raise ConfigError(f"{text}: {free / 1e12:.2f} TB are free; use another run_dir or lower checkpoint.keep")
    return f"{text}; {free / 1e12:.2f} TB are free"
