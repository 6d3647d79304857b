"""The checks of the preflight, in the order in which a run would meet the problems that they look for.

A check returns one line that says what it found. If it fails, it raises ConfigError with what to change. If it can't be
made here, it raises NotChecked with how to make it.
"""

import functools
import itertools
import json
import os
import re
import shutil
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from megatron_ext import platform
from recipes.config import Config, generates, parse, samples_per_step
from recipes.config.stages import learned_principles
from recipes.data.rows import PAIR_FIELDS, PROMPT_FIELDS, load_rows, media_files
from recipes.data.source_spec import parse_sources, source_names
from recipes.data.sources import RowsById
from recipes.errors import ConfigError
from recipes.launch.claim import check_folder
from recipes.launch.requirements import check_parts, check_supervised
from recipes.preflight import alternatives, memory_plan
from recipes.preflight.architecture import config_file, model_config, published_config, published_file
from recipes.preflight.cost import gpu_hours
from recipes.preflight.fit import SHAPES, fit
from recipes.preflight.report import ELSEWHERE, FAILS, HERE, HOLDS, NotChecked, Report, Settings, size
from rewards import mixing, registry
from rewards.client import Client
from rewards.settings import Server

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
# The folder of models in the files of conf/. A name below it is never a name of the hub.
MODELS_FOLDER = "models"
SHIPPED_DATA = Path(__file__).resolve().parents[1] / "data"
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
# Bytes of a trained parameter in a checkpoint: its BF16 weight, FP32 master weight and two moments.
CHECKPOINT_BYTES = 14
# Bytes of the text of a token in the saved samples (our estimate).
SAMPLE_BYTES = 5
# The checks that come before those of the model's architecture.
FILES = ("run_folder", "data_and_rewards", "environment", "judges", "model", "tokenizer")
ELSEWHERE_TEXT = "on another machine (preflight.files=elsewhere); there, run the preflight without it"
# A remark on a judge that starts for nothing.
NOT_ASKED = (
    ". NO ROW ASKS IT: no label of data.prompts has a verifier of this server. Its GPUs would be idle. A file of "
    "conf/rewards with defaults: [base] and the other servers leaves it out"
)
WEIGHTS = "*.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"


def examine(raw: DictConfig, settings: Settings, say: Callable[[str], None], base_model: str | None = None) -> Report:
    """Run all checks. If something does not fit, search for settings with which it does.

    Args:
        raw: the composed configuration of the run, without the group ``preflight``.
        settings: the group ``preflight``.
        say: called with the name of what is done next.
        base_model: folder of the model that the chain of stages before this one starts from, None without such a
            stage. It stands in for the model of the previous stage if that does not exist yet.
    """
    report = Report(
        recipe=str(raw.recipe.name),
        stage=str(raw.stage.name),
        model=Path(str(raw.model.path)).name,
        device=settings.device,
        device_memory_gib=settings.device_memory_gib,
    )
    parsed: list[Config] = []

    def configuration() -> str:
        check_settings(settings)
        parsed.append(parse(raw))
        return "every field is known and possible"

    say("configuration")
    # This must come before the imports of the checks. It switches off torch's inductor, whose import takes seconds.
    platform.activate("cpu")
    report.check("configuration", configuration)
    if parsed:
        examine_parsed(raw, parsed[0], settings, report, say, base_model)
    else:
        report.skip((*FILES, "architecture", *SHAPES, "images", "prompts", "disk_space", "nodes"), "configuration")
        alternatives.propose_layouts(raw, settings, report, say)
    return report


def examine_parsed(
    raw: DictConfig,
    config: Config,
    settings: Settings,
    report: Report,
    say: Callable[[str], None],
    base_model: str | None,
) -> None:
    """Run the checks of a configuration that has been parsed. The arguments are those of :func:`examine`."""
    expected_model = config.model.path
    if base_model is not None and not (Path(expected_model) / "config.json").is_file():
        config.model.path = base_model
        raw = raw.copy()
        raw.model.path = base_model
        report.model = Path(base_model).name
    report.check("run_folder", lambda: run_folder(config, settings))
    report.check("data_and_rewards", lambda: data_and_rewards(config))
    report.check("environment", lambda: environment(config))
    check_judges(config, settings, report)
    report.check("model", lambda: model(config, settings, expected_model))
    report.check("tokenizer", lambda: tokenizer(config))
    say("Megatron-Core, transformers")
    from recipes.preflight import simulated_ranks

    simulated_ranks.activate()
    configs: list[Any] = []
    if report.check("architecture", lambda: architecture(config, configs)):
        (hf_config,) = configs
        fit(config, hf_config, settings, report, say)
        report.check("images", lambda: images(config, hf_config))
    else:
        report.skip((*SHAPES, "images"), "architecture")
    say("prompts")
    report.check("prompts", lambda: every_prompt(config), ["tokenizer", "architecture"])
    report.check("disk_space", lambda: disk_space(config, settings, report), ["ranks"])
    if report.check("nodes", lambda: nodes(config)) and configs:
        alternatives.propose(raw, config, configs[0], settings, report, say)
        # Without room for the engines there is no step.
        if "rollout" not in report.in_state(FAILS):
            report.cost = gpu_hours(config, settings)


def check_settings(settings: Settings) -> None:
    """Raises ConfigError for an impossible value of the group ``preflight``."""
    if settings.files not in (HERE, ELSEWHERE):
        raise ConfigError(f"preflight.files={settings.files!r}: use one of {HERE}, {ELSEWHERE}")
    if settings.nodes is not None and settings.nodes < 1:
        raise ConfigError(f"preflight.nodes={settings.nodes}: use 1 or more, or null")


def run_folder(config: Config, settings: Settings) -> str:
    """Check that a launch may use the run's folder: it deletes nothing, and a resumed run stays the same experiment."""
    if settings.files == ELSEWHERE:
        raise NotChecked(ELSEWHERE_TEXT)
    changes = check_folder(config)
    if not config.resume:
        return f"{config.run_dir} holds no results"
    changed = "; ".join(map(str, changes)) or "nothing changes"
    return f"{config.run_dir} is resumed: {changed}"


def data_and_rewards(config: Config) -> str:
    """Check the files of the data and their schema. If the stage generates, also check the reward mix and verifiers."""
    check_supervised(config)
    if not generates(config):
        return "rows fit the schema; no verifier is asked"
    check_parts(config)
    verifiers = ", ".join(mixing.verifier_names(config.rewards.mix))
    return f"{source_names(config.data.prompts)}: rows fit the schema; verifiers {verifiers} are found"


def environment(config: Config) -> str:
    """Check that the environment whose replies go into responses can be reached."""
    from rollout.environment import Unavailable, open_environment

    name = config.rollout.environment.name
    if name is None or not generates(config):
        return "none replies inside responses"
    try:
        open_environment(name, config.rollout.environment.settings).check()
    except Unavailable as error:
        why = f"{name} does not answer from this machine ({error}); start it, and run the preflight where it is"
        raise NotChecked(why) from error
    return f"{name} answers"


def check_judges(config: Config, settings: Settings, report: Report) -> None:
    """Make one check for each reward server that a verifier asks."""
    names = {*mixing.verifier_names(config.rewards.mix), *config.data.scores} if generates(config) else set()
    servers = registry.servers_of(names, config.rewards)
    if not servers:
        report.check("judges", lambda: "no verifier asks a server")
    # Rows that do not fit the schema cannot be read. The check of the data has said so.
    if servers and "data_and_rewards" in report.in_state(HOLDS):
        asked = registry.servers_of(asked_verifiers(config), config.rewards)
    else:
        asked = servers
    for server in servers.values():
        remark = "" if server.name in asked else NOT_ASKED
        report.check(f"judge {server.name}", partial(judge, config, settings, server, remark))


def asked_verifiers(config: Config) -> set[str]:
    """The verifiers of the labels that the prompts have, and those of ``data.scores``."""
    labels = {row["label"] for row in load_rows(config.data.prompts)}
    mix = {label: weights for label, weights in config.rewards.mix.items() if label in labels}
    return {*mixing.verifier_names(mix), *config.data.scores}


def judge(config: Config, settings: Settings, server: Server, remark: str = "") -> str:
    """Check that a reward server serves its model, or that the model exists for a server that the run will start.

    ``remark`` is added to the line about a server that the run will start.
    """
    with Client({server.name: server}, config.rewards.client) as client:
        client.check(must_run=False)
        try:
            client.check()
            return f"{' '.join(server.addresses)} serves {server.model}"
        except ValueError:
            pass
    if server.endpoints:
        addresses = " ".join(server.addresses)
        raise NotChecked(
            f"{addresses} does not answer from this machine; on a node of the job: curl {server.addresses[0]}/v1/models"
        )
    folder = Path(server.model)
    if has_weights(folder):
        return f"{folder} has weights of {weights_gib(folder):.1f} GiB; its server starts with the run{remark}"
    stage = writer(config, folder)
    if stage is not None:
        raise NotChecked(f"{server.model} is what stage {stage} will write{remark}")
    if settings.files == ELSEWHERE:
        raise NotChecked(f"{server.model}: {ELSEWHERE_TEXT}{remark}")
    if is_hub_name(server.model):
        raise NotChecked(
            f"{server.model} is no folder here; if it is a name of the hub, its server downloads it at its start, or: "
            f"hf download {server.model}"
        )
    field = f"rewards.servers.{server.name}"
    raise ConfigError(
        f"{field}.model={server.model!r}: no weights ({WEIGHTS}) there; download the judge into this folder, or "
        f"set {field}.model=FOLDER, or {field}.endpoints=[http://HOST:PORT] of a server that runs"
    )


def writer(config: Config, folder: Path) -> str | None:
    """The stage of the same ladder that exports its model into this folder, or None for any other folder."""
    normal = Path(os.path.normpath(folder))
    beside = normal.name == "hf" and normal.parent.parent == Path(os.path.normpath(config.run_dir)).parent
    return normal.parent.name if beside else None


def is_hub_name(name: str) -> bool:
    """Whether the name is a hub's ``organisation/model`` rather than a folder."""
    return HUB_NAME.fullmatch(name) is not None and not name.startswith((f"{MODELS_FOLDER}/", "."))


def has_weights(folder: Path) -> bool:
    """Whether the folder has a config.json and files of weights."""
    return (folder / "config.json").is_file() and any(folder.glob(WEIGHTS))


def weights_gib(folder: Path) -> float:
    """Size of the files of weights in GiB. Raises ConfigError if files that the index lists are missing."""
    index = folder / WEIGHTS_INDEX
    if index.is_file():
        listed = set(json.loads(index.read_text())["weight_map"].values())
        lacking = sorted(name for name in listed if not (folder / name).is_file())
        if lacking:
            raise ConfigError(
                f"{folder}: {len(lacking)} of the {len(listed)} files of {WEIGHTS_INDEX} are missing, the first is "
                f"{lacking[0]}; complete the download"
            )
    return sum(file.stat().st_size for file in folder.glob(WEIGHTS)) / memory_plan.GIB


def model(config: Config, settings: Settings, expected: str) -> str:
    """Check that the weights that training starts from exist. ``expected``: the folder that the run will read."""
    if config.model.path != expected:
        raise NotChecked(
            f"{expected} is what stage {config.stage.after} will write; until then {config.model.path} stands in for "
            "it in the other checks"
        )
    folder = Path(expected)
    if has_weights(folder):
        return f"{folder} has weights of {weights_gib(folder):.1f} GiB"
    package = config.model.gguf_package
    if package is not None and not (folder / "config.json").is_file():
        if find_spec(package) is None:
            raise ConfigError(f"model.gguf_package={package!r} is not installed: make env")
        return f"{folder} is made from the package {package} by the first launch"
    if config.model.random_weights_of is not None and not (folder / "config.json").is_file():
        return f"{folder} is made with random weights from {config.model.random_weights_of} by the first launch"
    if settings.files == ELSEWHERE:
        raise NotChecked(f"{folder}: {ELSEWHERE_TEXT}")
    if config.stage.after is not None:
        raise ConfigError(
            f"model.path={expected!r}: stage {config.stage.after} has not written its model there; run that stage "
            "first, or give the folder of another model"
        )
    raise ConfigError(
        f"model.path={expected!r}: no config.json with weights ({WEIGHTS}) there; download the model into this folder, "
        "or give another. If another machine has it: preflight.files=elsewhere"
    )


def nodes(config: Config) -> str:
    """Count the nodes of the job, by use."""
    judges = alternatives.judge_nodes(config)
    trainer = f"{config.cluster.nodes} for trainer and engines"
    if config.cluster.engine_nodes:
        trainer = f"{config.cluster.nodes} for the trainer, {config.cluster.engine_nodes} for engines"
    return f"{trainer}, {judges} for the judges alone"


def has_tokenizer(config: Config) -> bool:
    """Whether the model's folder has a config.json and a file of a tokenizer."""
    folder = Path(config.model.path)
    return (folder / "config.json").is_file() and any((folder / name).is_file() for name in TOKENIZER_FILES)


def tokenizer(config: Config) -> str:
    """Check the size of the tokenizer, its end-of-turn token and its chat template."""
    folder = Path(config.model.path)
    if not has_tokenizer(config):
        if has_weights(folder):
            raise ConfigError(f"model.path={config.model.path!r}: no {' or '.join(TOKENIZER_FILES)}; copy them there")
        if config.model.gguf_package is not None or config.model.random_weights_of is not None:
            raise NotChecked(f"{folder} is made by the first launch; run the preflight after it")
        raise NotChecked(f"{folder} has no tokenizer on this machine; run the preflight where it has one")
    from transformers import AutoTokenizer

    from rollout import chat_layout

    # Without this, transformers asks at the terminal whether to run the folder's code.
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
    """Append transformers' configuration of the model to ``configs``.

    Raises ConfigError if the folder has the name of a published model but the architecture of another.
    """
    from recipes.preflight import simulated_ranks

    source = config_file(config.model.path)
    hf_config = model_config(config.model.path)
    published = published_config(config.model.path)
    if source != published_file(config.model.path) and published is not None:
        expected = simulated_ranks.checkpoint_tensors(published)
        if simulated_ranks.checkpoint_tensors(hf_config) != expected:
            raise ConfigError(
                f"model.path={config.model.path!r}: config.json gives other tensors than "
                f"{published_file(config.model.path).name} in conf/model/architectures: it is another model, give its "
                "folder another name"
            )
    configs.append(hf_config)
    return f"{hf_config.architectures[0]}, from {source.parent.name}/{source.name}"


def images(config: Config, hf_config: Any) -> str:
    """Check that the largest image that the processor makes leaves room in the prompt."""
    if not hasattr(hf_config, "vision_config"):
        return "a text model"
    file = Path(config.model.path) / "preprocessor_config.json"
    if not file.is_file():
        raise NotChecked(f"{file} is not on this machine; run the preflight where it is")
    processor = json.loads(file.read_text())
    # InternVL3 has tiles, and one more tile of the complete image.
    if hasattr(hf_config, "image_seq_length"):
        limit = f"max_patches={processor['max_patches']}"
        remedy = "lower max_patches in that file"
        tokens = (processor["max_patches"] + 1) * hf_config.image_seq_length
    else:
        vision = hf_config.vision_config
        pixels = min(processor["max_pixels"], config.data.images.max_pixels)
        limit = f"max_pixels={processor['max_pixels']}, data.images.max_pixels={config.data.images.max_pixels}"
        token_pixels = (vision.patch_size * vision.spatial_merge_size) ** 2
        tokens = pixels // token_pixels
        remedy = f"use data.images.max_pixels={config.data.max_prompt_tokens // 2 * token_pixels}"
    if tokens >= config.data.max_prompt_tokens:
        raise ConfigError(
            f"an image can have {tokens} tokens ({limit}; {file}), data.max_prompt_tokens="
            f"{config.data.max_prompt_tokens}: {remedy}, or raise data.max_prompt_tokens"
        )
    return f"the largest image has {tokens} of {config.data.max_prompt_tokens} prompt tokens"


def every_prompt(config: Config) -> str:
    """Process each prompt as the run does. This checks its length and its images, which are read and resized once."""
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
    if "reward_model" in config.stage.trains:
        settings = config.stage.reward_model
        for source in (settings.pairs, settings.held_out):
            counts.append(f"{check_pairs(processor, source, config)} of {source_names(source)}")
    if "value_model" in config.stage.trains:
        count = check_rollouts(processor, config)
        counts.append(f"{count} of {source_names(config.stage.value_model.rollouts)}")
    return f"prompts are made: {', '.join(counts)}{stand_in(config)}"


def check_pairs(processor: Any, source: Any, config: Config) -> int:
    """Tokenize both answers of each preference pair. Returns the number of pairs."""
    from recipes.data.preference_pairs import chosen_and_rejected

    rows = load_rows(source, PAIR_FIELDS)
    for row in rows:
        processed = processor(row) if media_files(row) else None
        chosen_and_rejected(processor.tokenizer, row, processed, config.parallel.micro_batch_tokens)
    return len(rows)


def check_rollouts(processor: Any, config: Config) -> int:
    """Tokenize each response that a value model learns from. Returns the number of responses."""
    from recipes.data.value_examples import load_rollouts, prefix_batch

    settings = config.stage.value_model
    principles = learned_principles(settings.principles)
    prompts = load_rows(config.data.prompts)
    rollouts = load_rollouts(settings.rollouts, prompts, principles, settings.held_out_share, config.seed)
    by_id = RowsById(prompts)
    # The responses to a prompt are near each other.
    processed = functools.lru_cache(maxsize=64)(lambda prompt_id: processor(by_id[prompt_id]))
    for row in itertools.chain(rollouts.trained, rollouts.held_out):
        prefix_batch(
            processor.tokenizer,
            [row],
            [processed(row["prompt_id"])],
            principles=list(principles),
            thinking_marks=config.rollout.thinking_marks,
            random_prefixes=settings.random_prefixes,
            seed=config.seed,
            max_tokens=config.parallel.micro_batch_tokens,
        )
    return len(rollouts.trained) + len(rollouts.held_out)


def stand_in(config: Config) -> str:
    """A remark for a GPU job that trains on the demos' data, otherwise ""."""
    fields = {"rl": config.data.prompts, "sft": config.data.sft}
    sources = [spec.name for stage in config.stage.trains if stage in fields for spec in parse_sources(fields[stage])]
    shipped = [name for name in sources if Path(name).resolve().is_relative_to(SHIPPED_DATA)]
    if not shipped or not platform.capabilities(config.cluster.platform).has_gpus:
        return ""
    return f". A STAND-IN: {', '.join(shipped)} are the demos' data, for trying out a job; name your own with data=…"


def disk_space(config: Config, settings: Settings, report: Report) -> str:
    """Check that the disk has room for the run's checkpoints, exported models and samples.

    The checkpoints are those that are kept and one that is being written. Sizes are upper bounds: frozen parameters
    count as trained ones, and a critic counts as large as the policy.
    """
    assert report.parameters_total is not None
    trained = 2 if memory_plan.needed(config).values else 1
    checkpoint = report.parameters_total * CHECKPOINT_BYTES * trained
    checkpoints = checkpoint * (config.checkpoint.keep + 1)
    exports = report.parameters_total * memory_plan.BF16 * len(config.stage.trains)
    samples = 0
    if "rl" in config.stage.trains:
        samples = config.algorithm.steps * samples_per_step(config) * memory_plan.longest(config) * SAMPLE_BYTES
    need = checkpoints + exports + samples
    report.disk_bytes = need
    text = (
        f"at most {size(need)} in run_dir={config.run_dir!r}: {size(checkpoint)} a checkpoint x (checkpoint.keep="
        f"{config.checkpoint.keep} + 1 being written), {size(exports)} of exported models, {size(samples)} of samples"
    )
    folder = Path(config.run_dir).absolute()
    while not folder.exists():
        folder = folder.parent
    if settings.files == ELSEWHERE:
        raise NotChecked(f"{text}; {ELSEWHERE_TEXT}: df -h {config.run_dir}")
    free = shutil.disk_usage(folder).free
    if free < need:
        raise ConfigError(f"{text}; {size(free)} are free: use another run_dir or lower checkpoint.keep")
    return f"{text}; {size(free)} are free"
