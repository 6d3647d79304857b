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
FP8_MULTIPLE = 16  # Transformer Engine's, of both sides of a matrix
MOST_PADDING = 1.5  # padded attention heads to true ones: beyond it a layout wastes too much to be meant
CHECKPOINT_BYTES = 14  # of a trained parameter: its BF16 weight, FP32 master and moments


def examine(raw: DictConfig, settings: Settings, say: Callable[[str], None]) -> Report:
    """All checks, in the order in which a run would meet them. ``say`` is told what is being done."""
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
    platform.activate("cpu")  # seconds less than behind the next line: it keeps torch's inductor out
    from recipes.preflight import simulated_ranks

    simulated_ranks.activate()
    found: list[Any] = []
    if report.check("architecture", lambda: architecture(config, found)):
        hf_config, text = found
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
    """Files, schema, mix, and verifiers."""
    check_supervised(config)
    check_parts(config)
    verifiers = ", ".join(mixing.verifier_names(config.rewards.mix))
    return f"{source_names(config.data.prompts)}: rows fit the schema; verifiers {verifiers} are found"


def reward_servers(config: Config) -> str:
    """Those that are up serve the models that the verifiers need; the others start with the run."""
    names = {*mixing.verifier_names(config.rewards.mix), *config.data.scores}
    servers = registry.servers_of(names, config.rewards)
    with Client(servers, config.rewards.client) as client:
        client.check(must_run=False)
    addresses = ", ".join(f"{name} at {' '.join(server.addresses)}" for name, server in servers.items())
    return f"{addresses}: those that are up serve their model" if addresses else "no verifier has a server"


def has_model(config: Config) -> bool:
    """Whether this machine has the model's folder; if not, it is not the cluster, and its disk is not the run's."""
    return (Path(config.model.path) / "config.json").is_file()


def tokenizer(config: Config) -> str:
    """Its size, its end-of-turn token and its chat template, where its files are."""
    folder = Path(config.model.path)
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        if has_model(config):
            raise ConfigError(f"model.path={config.model.path!r}: no {' or '.join(TOKENIZER_FILES)}; copy them there")
        return f"not looked at: {folder} is not on this machine"
    from transformers import AutoTokenizer

    from rollout import chat_layout

    chat_layout.register()  # or transformers asks at the terminal whether to run the folder's code
    found = AutoTokenizer.from_pretrained(folder)
    if found.eos_token_id is None:
        raise ConfigError(f"model.path={config.model.path!r}: the tokenizer has no eos_token, which ends a response")
    if not found.chat_template:
        raise ConfigError(f"model.path={config.model.path!r}: the tokenizer has no chat template; add one")
    raw = json.loads((folder / "config.json").read_text())
    rows = (raw.get("text_config") or raw.get("llm_config") or raw)["vocab_size"]
    if len(found) > rows:
        raise ConfigError(
            f"model.path={config.model.path!r}: the tokenizer has {len(found)} tokens, the model's vocabulary {rows}: "
            "take both from the same model"
        )
    return f"{len(found)} tokens in a vocabulary of {rows}"


def architecture(config: Config, found: list[Any]) -> str:
    """Appends transformers' configuration of the model, and of its language model, to ``found``."""
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
    found += [hf_config, text]
    return f"{hf_config.architectures[0]}, from {source.name}"


def context_length(config: Config, text: Any) -> str:
    longest = config.data.max_prompt_tokens + config.rollout.max_response_tokens
    if longest > text.max_position_embeddings:
        raise ConfigError(
            f"data.max_prompt_tokens + rollout.max_response_tokens = {longest}: the model knows "
            f"{text.max_position_embeddings} positions; lower one of them"
        )
    return f"{longest} of the model's {text.max_position_embeddings} positions"


def attention_heads(config: Config, text: Any) -> str:
    from megatron_ext.weight_map import sharding_of

    tensor = config.parallel.tensor
    sharding = sharding_of(text, tensor, 0)
    if sharding.padded_heads > MOST_PADDING * sharding.heads:
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
    if config.precision.name == "fp8" and not settings.fp8:
        raise ConfigError(f"precision.name='fp8': {settings.device} has no FP8; use precision=bf16")
    return f"{config.precision.name} on {settings.device}"


def batch(config: Config, report: Report) -> str:
    """Of a step whose sequences all have full length: the most micro-batches that there can be."""
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
    """The largest image that the processor makes must leave room in the prompt."""
    if not hasattr(hf_config, "vision_config"):
        return "a text model"
    file = Path(config.model.path) / "preprocessor_config.json"
    if not file.is_file():
        return f"not looked at: {file} is not on this machine"
    processor = json.loads(file.read_text())
    if hasattr(hf_config, "image_seq_length"):  # InternVL3: tiles, and one of the whole image
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
    """Each prompt as the run will make it: its length, its images. Every image is read and resized once."""
    if not has_model(config):
        return f"not looked at: {config.model.path} is not on this machine"
    from recipes.data.processor import ImageLimits, PromptProcessor, check_rows
    from recipes.data.sft_examples import check_examples

    processor = PromptProcessor(
        config.model.path, config.data.max_prompt_tokens, ImageLimits(**vars(config.data.images))
    )
    counts = [
        f"{len(check_rows(processor, source, PROMPT_FIELDS))} of {source_names(source)}"
        for source in (config.data.prompts, config.data.evaluation)
    ]
    if "sft" in config.stage.trains:
        mark, longest = config.rollout.thinking_marks[0], config.parallel.micro_batch_tokens
        judge = config.stage.sft.judge
        for source in filter(None, (config.data.sft, config.stage.sft.held_out)):
            counts.append(f"{check_examples(processor, source, judge, mark, longest)} of {source_names(source)}")
    return f"prompts are made: {', '.join(counts)}"


def layout(config: Config, hf_config: Any, report: Report) -> str:
    """Divisibility of layers, heads, feed-forward widths and vision tower, as ``model.build`` checks it."""
    from megatron_ext import model
    from megatron_ext.models import family
    from recipes.preflight import simulated_ranks

    cut = config.parallel
    report.layout = asdict(cut) | {"data": cut.data_parallel(config.cluster.ranks)}
    model.check(hf_config, cut)
    with simulated_ranks.rank(0, config.cluster.ranks, cut):  # sizes against each other and the world
        family(hf_config.architectures[0]).param_mappings(hf_config, cut.tensor, 0)
    sizes = f"tensor {cut.tensor} x pipeline {cut.pipeline} x context {cut.context} x data {report.layout['data']}"
    return f"{config.cluster.ranks} ranks: {sizes}"


def colocated_judges(config: Config, settings: Settings, found: list[memory_plan.Judges]) -> str:
    """Appends what the servers on the trainer's GPUs need to ``found``."""
    found.append(memory_plan.judges(config, settings))
    shown = ", ".join(f"{name} {fraction:g}" for name, fraction in found[0].fractions.items())
    return f"on the trainer's GPUs, of each: {shown}" if shown else "none is on the trainer's GPUs"


def build(
    config: Config,
    hf_config: Any,
    settings: Settings,
    judges: list[memory_plan.Judges],
    report: Report,
    say: Callable[[str], None],
) -> str:
    """Each distinct rank's model: parameters, memory, and which Hugging Face tensors it holds. ``judges`` is empty
    where their check failed: then they are left out."""
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
    beside = judges[0] if judges else memory_plan.Judges(0, 0, 0, {})
    report.phases = memory_plan.on_device(config)
    coverage, of_critic = simulated_ranks.Coverage(), simulated_ranks.Coverage()
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
                of_critic.add(critic)
            place = {"pp": here.pipeline_rank, "tp": here.tensor_rank}
            parameters = [p for chunk in built.chunks for p in chunk.module.parameters()]
            report.parameters_per_rank.append({**place, "count": sum(p.numel() for p in parameters)})
            memory = memory_plan.rank_memory(config, built, critic, settings, total, beside)
            report.memory_gib.append({**place, **memory.gib(report.phases)})
            decoders = [getattr(chunk.module, "language", chunk.module).decoder for chunk in built.chunks]
            layers[here.pipeline_rank] = [len(decoder.layers) for decoder in decoders]
    report.parameters_total = total
    report.hf_tensors = coverage.compare(expected, hf_config.tie_word_embeddings)
    if critic_config:
        report.critic_tensors = of_critic.compare(simulated_ranks.checkpoint_tensors(critic_config), tied=False)
    report.engine_gib = memory_plan.engine_gib(config, hf_config, total)
    report.host_gib = memory_plan.on_host(config, report.memory_gib, beside)
    shown = " | ".join(" + ".join(map(str, chunks)) for chunks in layers.values())
    return f"{len(ranks)} distinct ones; layers on the pipeline's stages {shown}"


def every_tensor(report: Report) -> str:
    """Every element of every Hugging Face tensor lies exactly once in one replica."""
    assert report.hf_tensors is not None
    for whose, found in (("", report.hf_tensors), ("the critic's ", report.critic_tensors or {})):
        for field_name in ("missing", "unexpected", "duplicated"):
            if names := found.get(field_name):
                raise ConfigError(
                    f"{whose}{len(names)} tensors {field_name}, the first is {names[0]!r}: the family's table in "
                    "megatron_ext/models/ does not fit this model"
                )
    return f"{report.hf_tensors['covered']} tensors, {report.parameters_total:,} parameters, each exactly once"


def fp8_alignment(config: Config, built: Any) -> None:
    """Both sides of each of the decoder's matrices, as they are on this rank."""
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
    """For the checkpoints that are kept, one that is being written, and the exported models."""
    if report.parameters_total is None:
        raise ConfigError("the number of parameters is not known: see the checks before")
    from recipes.algorithms.registry import requirements

    trained = 2 if requirements(config.algorithm).values else 1  # a critic is taken to be of the policy's size
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
