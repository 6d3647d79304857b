"""The configuration: what stands in conf/ is what the code reads, and what can't work stops with a useful line."""

import copy
import inspect
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import MISSING, Field, asdict, fields, is_dataclass
from functools import cache, reduce
from operator import getitem
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import hydra
import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig
from safetensors.torch import load_file
from transformers import AutoProcessor

from megatron_ext import settings
from megatron_ext.settings import mappings, with_new_keys
from recipes import command_line
from recipes.algorithms.registry import REGISTRY
from recipes.config import Config, parse, reference
from recipes.errors import ConfigError
from recipes.launch import prepare_model, requirements
from recipes.launch.prepare_run import prepare_run
from rewards.settings import OTHER_MAPPINGS, RewardsConfig
from rollout.vllm_platform import FP8_CACHE_INSTRUCTIONS
from tests import warm

ROOT = Path(__file__).resolve().parents[2]
CONF = ROOT / "conf"
GROUPS = "recipe stage model algorithm rewards parallel precision rollout data cluster logger".split()
# What a program beside the run reads (node_check, preflight, simulate, scale_simulation) has a schema of its own there.
ASIDE = ("bounds", "deliberation", "guidance", "node_check", "preflight", "scale", "simulate")
FILES = sorted((path.parent.name, path.stem) for path in CONF.glob("*/*.yaml") if path.parent.name not in ASIDE)
BASES = [(group, "base") for group in ("stage", "data", "model", "cluster")]  # which are no choices
OPTIONS = [choice for choice in FILES if choice not in BASES]
NEEDS = {"fp8": ["cluster.platform=cuda"], "safework": ["parallel.micro_batch_tokens=16384"]}
NEEDS["safework"].append("rollout.max_num_batched_tokens=8224")
NEEDS["value_model"] = ["stage.value_model.rollouts=README.md"]  # any file
NEEDS |= {option: ["cluster.ranks=128"] for group, option in OPTIONS if group == "parallel" and "pp4" in option}


@pytest.fixture(autouse=True)
def in_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo's data paths are relative to it."""
    monkeypatch.chdir(ROOT)


@cache
def composed(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", overrides=list(overrides))


def overridden(raw: DictConfig, overrides: list[str]) -> DictConfig:
    """What ``compose`` makes of further overrides of values, by its own functions and without reading conf/ anew."""
    changed = copy.deepcopy(raw)
    ConfigLoaderImpl._apply_overrides_to_config(OverridesParser.create().parse_overrides(overrides), changed)
    return changed


def configured(*overrides: str) -> Config:
    """The demo's, with these overrides; the files that they choose are read once."""
    files = [override for override in overrides if override.partition("=")[0] in GROUPS]
    return parse(overridden(composed("recipe=demo", *files), [o for o in overrides if o not in files]))


def paths(type_: Any, prefix: str = "") -> Iterator[tuple[str, Field[Any]]]:
    """Every field below a dataclass: dotted path and field."""
    hints = get_type_hints(type_)
    for field in fields(type_):
        hint = hints[field.name]
        if get_origin(hint) is not list:
            hint = next((arg for arg in get_args(hint) if is_dataclass(arg)), hint)
        if is_dataclass(hint):
            yield from paths(hint, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", field


def yaml_keys(value: Any, prefix: str = "") -> Iterator[str]:
    """Dotted paths of all mappings' keys in a YAML value."""
    if isinstance(value, dict):
        for key, below in value.items():
            yield f"{prefix}{key}"
            yield from yaml_keys(below, f"{prefix}{key}.")


FIELDS = dict(paths(Config))


def test_the_demo_is_what_its_files_say() -> None:
    config = configured()
    assert config.recipe.name == "demo"
    assert config.run_dir == "runs/demo"
    assert config.stage.trains == ["sft", "rl"]
    assert config.parallel.tensor > 1
    assert config.parallel.sequence
    assert config.parallel.distributed_optimizer
    assert (config.algorithm.advantage, config.algorithm.policy_loss) == ("grpo", "ppo_clip")
    assert config.resume is False


def test_overrides_work_as_people_know_them() -> None:
    config = configured("algorithm.learning_rate=2e-6", "parallel.tensor=1", "parallel.sequence=false", "stage=rl")
    assert config.algorithm.learning_rate == 2e-6
    assert (config.parallel.tensor, config.parallel.sequence) == (1, False)
    assert config.stage.trains == ["rl"]


def test_native_precision_asks_the_processor_only_where_it_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_ext.platform.features.processor_precision", lambda cpuinfo: "fp32")
    assert configured().precision.name == "fp32"
    assert configured("cluster=slurm_h100", "cluster.ranks=1", "parallel=tp1").precision.name == "bf16"


def test_groups_are_the_ones_that_people_are_told_of() -> None:
    assert sorted({group for group, _ in OPTIONS}) == sorted(GROUPS)


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_composes_and_every_value_has_a_typed_field(group: str, option: str) -> None:
    chosen = [f"recipe={option}"]
    if group != "recipe":
        chosen = ["recipe=demo", f"{group}={option}", *NEEDS.get(option, ["cluster.ranks=8"])]
    config = configured(*chosen)
    text = (CONF / group / f"{option}.yaml").read_text()
    content = yaml.safe_load(text)
    content.pop("defaults", None)
    missing = object()

    def value_of(key: str) -> Any:
        value: Any = config
        for part in key.split("."):
            value = value.get(part, missing) if isinstance(value, dict) else getattr(value, part, missing)
        return value

    keys = list(yaml_keys(content if text.startswith("# @package _global_") else {group: content}))
    assert keys
    assert [key for key in keys if value_of(key) is missing] == []


def test_each_stage_of_a_safework_recipe_draws_its_own_prompts() -> None:
    drawn = {}
    for stage in ("rl", "rl_general", "rl_safety", "rl_efficient", "rl_search"):
        config = parse(composed("recipe=safework_72b", f"stage={stage}"))
        requirements.check_parts(config)  # there are enough rows of each for a step
        drawn[stage] = {kind for kind, share in config.data.mix.items() if share}
        assert (config.rollout.environment.name is None) == (stage != "rl_search")
    search, safety = {"listed", "read", "missing"}, {"harmful", "jailbreak", "borderline", "benign"}
    others = safety | {"value", "task"}
    assert drawn == {
        "rl": others,
        "rl_general": {"value", "task"},
        "rl_safety": others,
        "rl_efficient": others,
        "rl_search": others | search,
    }


def test_no_field_has_a_default_in_code() -> None:
    assert all(field.default is MISSING for field in FIELDS.values())
    assert all(field.default_factory is MISSING for field in FIELDS.values())


def test_every_field_stands_in_its_group_or_in_the_main_file() -> None:
    main = yaml.safe_load((CONF / "config.yaml").read_text())
    shared = set(yaml_keys({k: v for k, v in main.items() if k not in ("defaults", "hydra")}))
    of_groups = {
        f"{group}.{key}"
        for group, option in FILES
        if group != "recipe"
        for key in yaml_keys(yaml.safe_load((CONF / group / f"{option}.yaml").read_text()))
    }
    assert not {key.partition(".")[0] for key in shared} & set(GROUPS), "a group's default belongs into the group"
    assert set(FIELDS) - shared - of_groups == {"recipe.name"}, "which each recipe sets"


def test_a_default_stands_once() -> None:
    """Options that are derived from another one repeat none of its values."""
    for group, option in FILES:
        content = yaml.safe_load((CONF / group / f"{option}.yaml").read_text())
        parents = [name for name in content.pop("defaults", []) if isinstance(name, str) and name != "_self_"]
        content = content.get(group, content)
        for parent in (name.partition("@")[0] for name in parents):
            inherited = yaml.safe_load((CONF / group / f"{parent}.yaml").read_text())
            repeated = {key for key, value in content.items() if inherited.get(key) == value}
            assert not repeated, f"{group}/{option}.yaml repeats {repeated} of {parent}.yaml"


def test_every_field_is_read_somewhere() -> None:
    files = [path for room in ("recipes", "megatron_ext", "rollout", "rewards") for path in (ROOT / room).rglob("*.py")]
    # A field that only a check reads is no setting. The comparison of a resumed run's settings is no check.
    skipped = {path for path in files if path.name == "settings.py" or path.parent.name == "config"}
    skipped.remove(ROOT / "recipes" / "config" / "resume.py")
    code = "".join(path.read_text() for path in files if path not in skipped)
    # A part's name is read by ``parts.part``, which also sets the fields that are its keywords.
    bound = {
        *REGISTRY,
        *(name for parts in REGISTRY.values() for part in parts for name in inspect.signature(part).parameters),
    }
    names = {path: path.rpartition(".")[2] for path in FIELDS}
    unread = [path for path, name in names.items() if name not in bound and not re.search(rf"\.{name}\b", code)]
    assert unread == []


IMPOSSIBLE = [
    (["cluster.platform=tpu"], "cluster.platform", "tpu", "use one of cpu, cuda"),
    (["critic.decay=exponential"], "critic.decay", "exponential", "use one of constant"),
    (["critic.learning_rate=0"], "critic.learning_rate", "0", "in (0, 1]"),
    (["critic.path=nowhere"], "critic.path", "nowhere", "null for the policy's"),
    (["algorithm.value_clip=0"], "algorithm.value_clip", "0", "above 0"),
    (["precision.name=fp4"], "precision.name", "fp4", "use one of bf16, fp32, fp8"),
    (["precision=fp8"], "precision.name", "fp8", "precision=bf16 on a CPU"),
    (
        ["parallel.shared_prompts=true", "parallel.context=2", "cluster.ranks=4"],
        "parallel.shared_prompts",
        "parallel.context=2",
        "use parallel.context=1",
    ),
    (
        ["precision=fp32", "parallel.context=2", "cluster.ranks=4", "cluster.platform=cuda"],
        "precision.name",
        "fp32",
        "parallel.context=1 or precision=bf16",
    ),
    (
        ["precision=fp8", "cluster.platform=cuda", "precision.recipe=x"],
        "precision.recipe",
        "x",
        "use one of delayed",
    ),
    (
        ["precision=fp8", "cluster.platform=cuda", "precision.format=e5m2"],
        "precision.format",
        "e5m2",
        "use one of hybrid, e4m3",
    ),
    (
        ["precision=fp8", "cluster.platform=cuda", "precision.bf16_layers=1", "precision.recipe=delayed"],
        "precision.bf16_layers",
        "1",
        "precision.recipe=current",
    ),
    (["parallel.recompute=some"], "parallel.recompute", "some", "use one of none, selective, full"),
    (
        ["parallel.recompute=selective", "parallel.recompute_modules=[mlp,norm]"],
        "parallel.recompute_modules",
        "'norm'",
        "use one of core_attn, layernorm, mlp",
    ),
    (
        ["parallel.recompute=selective", "parallel.recompute_modules=[layernorm]"],
        "parallel.recompute_modules",
        "['layernorm']",
        "use mlp",
    ),
    (
        ["parallel.recompute=selective", "cluster.platform=cuda"],
        "parallel.recompute_modules",
        "['core_attn']",
        "use [mlp], or parallel.recompute=full",
    ),
    (["parallel.recompute_layers=[1]"], "parallel.recompute_layers", "[1]", "parallel.recompute=full; set it null"),
    (
        ["parallel.gradient_accumulation_fusion=true"],
        "parallel.gradient_accumulation_fusion",
        "true",
        "set it false on a CPU",
    ),
    (
        ["parallel.tp_comm_overlap=true", "cluster.platform=cuda"],
        "parallel.tp_comm_overlap",
        "true",
        "parallel.constant_length=false",
    ),
    (
        ["parallel.tp_comm_overlap=true", "parallel.constant_length=true"],
        "parallel.tp_comm_overlap",
        "true",
        "set it false on a CPU",
    ),
    (
        [
            "parallel.tp_comm_overlap=true",
            "parallel.constant_length=true",
            "cluster.platform=cuda",
            "cluster.nodes=2",
            "rollout.engines=2",
        ],
        "parallel.tp_comm_overlap",
        "1 ranks of a node",
        "use a divisor",
    ),
    (
        ["precision=fp8", "parallel.tp_comm_overlap=true", "parallel.constant_length=true", "cluster.platform=cuda"],
        "parallel.tp_comm_overlap",
        "precision.recipe='blockwise'",
        "precision.recipe=current",
    ),
    (
        ["precision=fp32", "parallel.tp_comm_overlap=true", "parallel.constant_length=true", "cluster.platform=cuda"],
        "parallel.tp_comm_overlap",
        "precision.name='fp32'",
        "precision=bf16",
    ),
    (["parallel.context=0"], "parallel.context", "0", "above 0"),
    (["parallel.virtual_pipeline=2"], "parallel.virtual_pipeline", "2", "set parallel.virtual_pipeline=1"),
    (["algorithm.decay=step"], "algorithm.decay", "step", "use one of constant, linear, cosine"),
    (["stage.sft.decay=step"], "stage.sft.decay", "step", "use one of constant, linear, cosine"),
    (["stage.trains=[sft,dpo]"], "stage.trains", "dpo", "use one of sft, reward_model, value_model, rl"),
    (["stage.trains=[]"], "stage.trains", "[]", "at least one of sft, reward_model, value_model, rl"),
    (["stage=reward_model", "stage.reward_model.pairs=gone"], "stage.reward_model.pairs", "gone", "no such file"),
    (["stage=value_model", "stage.value_model.rollouts=null"], "stage.value_model.rollouts", "None", "give a file of"),
    (["stage=value_model", "stage.value_model.rollouts=gone"], "stage.value_model.rollouts", "gone", "no such file"),
    (
        [
            "stage=value_model",
            *(f"stage.value_model.principles.{name}=[]" for name in ("safety", "value", "knowledge")),
        ],
        "stage.value_model.principles",
        "'safety': []",
        "at least one principle a verifier",
    ),
    (["stage.trains=[sft,value_model]"], "stage.trains", "'value_model'", "give it a stage of its own"),
    (["algorithm.steps=0"], "algorithm.steps", "0", "above 0"),
    (["algorithm.prompts_per_step=0"], "algorithm.prompts_per_step", "0", "above 0"),
    (["algorithm.learning_rate=-1e-6"], "algorithm.learning_rate", "-1e-06", "in (0, 1]"),
    (["algorithm.clip_low=2"], "algorithm.clip_low", "2.0", "in (0, 1]"),
    (["algorithm.clip_high=0"], "algorithm.clip_high", "0.0", "above 0"),
    (["algorithm.dual_clip=1"], "algorithm.dual_clip", "1.0", "above 1"),
    (["algorithm.discount=1.5"], "algorithm.discount", "1.5", "in [0, 1]"),
    (["algorithm.overlong_fraction=-1"], "algorithm.overlong_fraction", "-1.0", "in [0, 1]"),
    (["algorithm.kl_in=rewards"], "algorithm.kl_in", "rewards", "use one of loss, reward"),
    (["algorithm.kl_estimator=k1"], "algorithm.kl_estimator", "k1", "use k2 or k3"),
    (["algorithm.drift_cap=-1"], "algorithm.drift_cap", "-1.0", "0 or more"),
    (["algorithm.updates_per_rollout=5"], "algorithm.updates_per_rollout", "5", "divide"),
    (["algorithm.sequence_ratio_bounds=[2,3]"], "algorithm.sequence_ratio_bounds", "[2.0, 3.0]", "around 1"),
    (["algorithm.token_ratio_veto=2"], "algorithm.token_ratio_veto", "2.0", "in (0, 1)"),
    (["algorithm.samples_per_prompt=1"], "algorithm.samples_per_prompt", "1", "2 or more"),
    (["algorithm.kl_coefficient=-1"], "algorithm.kl_coefficient", "-1.0", "0 or more"),
    (["algorithm.warmup_fraction=1"], "algorithm.warmup_fraction", "1.0", "in [0, 1)"),
    (["algorithm.min_lr_ratio=1.5"], "algorithm.min_lr_ratio", "1.5", "in [0, 1]"),
    (["stage.sft.steps=null"], "stage.sft.steps", "None", "give one of them"),
    (["stage.sft.epochs=2"], "stage.sft.steps", "2.0", "give one of them"),
    (["stage.sft.epochs=0", "stage.sft.steps=null"], "stage.sft.epochs", "0.0", "above 0"),
    (["stage.sft.held_out=gone.jsonl"], "stage.sft.held_out", "gone.jsonl", "no such file in"),
    (["stage.sft.aggregation=sum"], "stage.sft.aggregation", "sum", "use one of token_mean"),
    (["stage.sft.steps=0"], "stage.sft.steps", "0", "above 0"),
    (["stage.sft.rows_per_step=0"], "stage.sft.rows_per_step", "0", "above 0"),
    (["stage.sft.learning_rate=0"], "stage.sft.learning_rate", "0.0", "in (0, 1]"),
    (["stage.sft.warmup_fraction=-0.1"], "stage.sft.warmup_fraction", "-0.1", "in [0, 1)"),
    (["stage.sft.min_lr_ratio=2"], "stage.sft.min_lr_ratio", "2.0", "in [0, 1]"),
    (["parallel.tensor=0"], "parallel.tensor", "0", "above 0"),
    (["parallel.pipeline=-1"], "parallel.pipeline", "-1", "above 0"),
    (["parallel.tensor=3"], "cluster.ranks", "2", "a multiple of 3 ranks"),
    (["parallel.tensor=1"], "parallel.sequence", "true", "parallel.sequence=false"),
    (["parallel.micro_batch_tokens=50"], "parallel.micro_batch_tokens", "50", "use at least that"),
    (["rollout.engines=0", "rollout.threads=1"], "rollout.engines", "0", "above 0"),
    (["rollout.tensor=0"], "rollout.tensor", "0", "above 0"),
    (["rollout.max_response_tokens=0"], "rollout.max_response_tokens", "0", "above 0"),
    (["rollout.temperature=0"], "rollout.temperature", "0.0", "0.01"),
    (["rollout.top_p=1.1"], "rollout.top_p", "1.1", "in (0, 1]"),
    (["rollout.staleness=2"], "rollout.staleness", "2", "use 0 or 1"),
    (["rollout.in_flight_updates=true"], "rollout.in_flight_updates", "true", "rollout.staleness=1"),
    (["rollout.staleness=1"], "rollout.staleness", "1", "algorithm.importance_sampling=token_truncated"),
    (["rollout.oversample=0.5"], "rollout.oversample", "0.5", "use 1"),
    (["rollout.max_num_batched_tokens=100"], "rollout.max_num_batched_tokens", "100", "use at least 128"),
    (
        ["rollout.max_num_seqs=8", "rollout.max_num_batched_tokens=50"],
        "rollout.max_num_batched_tokens",
        "50",
        "at least 80",
    ),
    (["rollout.partial_rollout_tokens=8"], "rollout.partial_rollout_tokens", "8", "more than 1"),
    (["rollout.thinking_budget=0"], "rollout.thinking_budget", "0", "null"),
    (["rollout.stall_timeout=0"], "rollout.stall_timeout", "0.0", "above 0"),
    (["rollout.quantization=int4"], "rollout.quantization", "'int4'", "fp8_per_channel"),
    (["rollout.quantization=fp8_per_block"], "rollout.quantization", "'fp8_per_block'", "cluster.platform=cuda"),
    (
        ["rollout.quantization=fp8_per_channel", "precision=bf16"],
        "rollout.quantization",
        "'fp8_per_channel'",
        "algorithm.importance_sampling=token_truncated",
    ),
    (["rollout.kv_cache_dtype=int8"], "rollout.kv_cache_dtype", "'int8'", "use one of auto, fp8"),
    (["rollout.speculative.method=draft"], "rollout.speculative.method", "'draft'", "use one of ngram"),
    (["rollout.speculative.draft_tokens=0"], "rollout.speculative.draft_tokens", "0", "above 0"),
    (
        ["rollout.speculative.method=ngram", "rollout.speculative.lookup_min=5"],
        "rollout.speculative.lookup_min",
        "5",
        "rollout.speculative.lookup_max=4",
    ),
    (
        ["rollout.speculative.method=ngram", "rollout.async_scheduling=true", "cluster.platform=cuda"],
        "rollout.speculative.method",
        "'ngram'",
        "rollout.async_scheduling=false",
    ),
    (
        ["rollout.speculative.method=ngram", "rollout.model_runner_v2=true", "cluster.platform=cuda"],
        "rollout.speculative.method",
        "'ngram'",
        "rollout.model_runner_v2=false",
    ),
    (
        ["rollout.speculative.method=ngram", "rollout.thinking_budget=9"],
        "rollout.speculative.method",
        "'ngram'",
        "rollout.thinking_budget=null",
    ),
    (
        ["rollout=search", "rollout.speculative.method=ngram"],
        "rollout.speculative.method",
        "'ngram'",
        "rollout.environment.name=null",
    ),
    (
        ["rollout.speculative.method=ngram", "rollout.max_num_seqs=32", "rollout.max_num_batched_tokens=159"],
        "rollout.max_num_batched_tokens",
        "159",
        "at least 160",
    ),
    (["rollout.environment.max_turns=0"], "rollout.environment.max_turns", "0", "above 0"),
    (["rollout=search", "rollout.oversample=2"], "rollout.environment.name", "search", "rollout.oversample=1"),
    (["rollout=search", "rollout.thinking_budget=9"], "rollout.environment.name", "search", "thinking_budget=null"),
    (["rewards.gate=wit"], "rewards.gate", "wit", "some mix must"),
    (["rewards=search", "rewards.normalise=group"], "rewards.gate", "search_format", "must be none"),
    (["rewards=search", "rewards.constraint.update=x"], "rewards.constraint.update", "x", "use one of dual_ascent"),
    (["rewards=search", "rewards.constraint.initial=0"], "rewards.constraint.initial", "0.0", "use more"),
    (["rewards=search", "rewards.constraint.proportional=1"], "rewards.constraint.proportional", "1.0", "use 0"),
    (["rollout.sleep=true"], "rollout.sleep", "true", "needs a GPU"),
    (["cluster.engine_nodes=-1"], "cluster.engine_nodes", "-1", "use 0 or more"),
    (
        ["cluster.engine_nodes=1", "cluster.platform=cuda", "rollout.sleep=true"],
        "rollout.sleep",
        "true",
        "use rollout.sleep=false",
    ),
    (["cluster.engine_nodes=1", "optimizer.offload=true"], "optimizer.offload", "true", "use optimizer.offload=false"),
    (
        ["cluster.engine_nodes=1", "rewards.placement=colocated"],
        "rewards.placement",
        "colocated",
        "use rewards.placement=disaggregated",
    ),
    (["cluster.engine_nodes=1", "cluster.nodes=3", "cluster.ranks=4"], "cluster.ranks", "4", "use a multiple"),
    (
        ["optimizer.offload=true", "rollout.staleness=1", "algorithm.importance_sampling=token_truncated"],
        "optimizer.offload",
        "true",
        "rollout.staleness=0",
    ),
    (
        ["rewards.placement=colocated", "rollout.staleness=1", "algorithm.importance_sampling=token_truncated"],
        "rewards.placement",
        "colocated",
        "rollout.staleness=0",
    ),
    (
        ["rewards.placement=colocated", "cluster.platform=cuda"],
        "rewards.placement",
        "colocated",
        "rollout.sleep=true",
    ),
    (["data.max_prompt_tokens=0"], "data.max_prompt_tokens", "0", "above 0"),
    (["data.evaluation_samples=-1"], "data.evaluation_samples", "-1", "use 0 or more"),
    (["data.mix.harmful=-1"], "data.mix", "'harmful': -1", "1 and more"),
    (["data.curriculum=[{from_step:1,mix:{task:1}}]"], "data.curriculum[0].from_step", "=1", "begins with step 0"),
    (
        ["data.curriculum=[{from_step:0,mix:{task:1}},{from_step:0,mix:{task:2}}]"],
        "data.curriculum[1].from_step",
        "=0",
        "must be above 0",
    ),
    (["data.curriculum=[{from_step:0,mix:{task:-1}}]"], "data.curriculum[0].mix", "'task': -1", "1 and more"),
    (["data.curriculum=[{from_step:0,mix:{}}]"], "data.curriculum[0].mix", "{}", "1 and more"),
    (["data.prompts=[{source:gone.jsonl,weight:1}]"], "data.prompts", "gone.jsonl", "no such file in"),
    (["data.prompts=[{source:gone.jsonl}]"], "data.prompts", "gone.jsonl", "`source` and `weight`"),
    (["data.sft=gone.jsonl"], "data.sft", "gone.jsonl", "no such file in"),
    (["data.prompts=gone.jsonl"], "data.prompts", "gone.jsonl", "no such file in"),
    (["data.evaluation=gone.jsonl"], "data.evaluation", "gone.jsonl", "no such file in"),
    (["cluster.ranks=0", "cluster.threads=1"], "cluster.ranks", "0", "above 0"),
    (["cluster.nodes=0"], "cluster.nodes", "0", "above 0"),
    (["cluster.threads=0"], "cluster.threads", "0", "above 0"),
    (["cluster.ranks=200", "cluster.threads=1"], "algorithm.prompts_per_step", "72", "multiple of 100"),
    (["checkpoint.every_steps=0"], "checkpoint.every_steps", "0", "above 0"),
    (["checkpoint.keep=1"], "checkpoint.keep", "1", "2 or more"),
    (["cluster.watchdog=1800"], "cluster.watchdog", "1800", "below cluster.timeout"),
    (["cluster.watchdog=0"], "cluster.watchdog", "0", "above 0"),
    (["cluster.slow_factor=1"], "cluster.slow_factor", "1", "above 1"),
    (["optimizer.max_skipped=0"], "optimizer.max_skipped", "0", "above 0"),
    (["optimizer.betas=[0.9]"], "optimizer.betas", "[0.9]", "two values in [0, 1)"),
    (["optimizer.betas=[0.9,1.0]"], "optimizer.betas", "[0.9, 1.0]", "two values in [0, 1)"),
    (["+algorithm.foo=1"], "algorithm.foo", "no such field", "the fields are listed in docs/configuration.md"),
    (["algorithm.steps=many"], "algorithm.steps", "'many'", "Integer"),
    (["parallel.sequence=perhaps"], "parallel.sequence", "perhaps", "use true or false"),
    (["seed=null"], "seed", "None", "int"),
    (
        ["rollout.max_response_tokens=???"],
        "rollout.max_response_tokens",
        "missing",
        "the fields are listed in docs/configuration.md",
    ),
]


@pytest.mark.parametrize(("overrides", "field", "value", "remedy"), IMPOSSIBLE)
def test_impossible_values_name_field_value_and_remedy(
    overrides: list[str], field: str, value: str, remedy: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        configured(*overrides)
    text = str(caught.value)
    assert text.startswith(field)
    assert value in text
    assert remedy in text
    assert "\n" not in text


def test_prompts_are_shared_on_a_gpu_where_that_is_said() -> None:
    """null shares on a CPU alone: tests/megatron_ext/test_flex.py."""
    config = configured("parallel.shared_prompts=true", "cluster.platform=cuda", "precision=bf16")
    assert config.parallel.shared_prompts


@pytest.mark.parametrize("variable", ["TORCH_COMPILE_DISABLE", "TORCHDYNAMO_DISABLE"])
def test_prompts_are_not_shared_on_a_gpu_where_torch_may_not_compile(
    variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This process has the first of them, for the CPU platform."""
    monkeypatch.delenv("TORCH_COMPILE_DISABLE", raising=False)
    on_gpu = ["cluster.platform=cuda", "precision=bf16"]
    requirements.check_compiler(configured("parallel.shared_prompts=true", *on_gpu))
    monkeypatch.setenv(variable, "1")
    requirements.check_compiler(configured(*on_gpu))
    with pytest.raises(ConfigError, match=rf"parallel.shared_prompts=true: .* {variable}=1 .* unset it, or use"):
        requirements.check_compiler(configured("parallel.shared_prompts=true", *on_gpu))


def test_an_fp8_cache_wants_its_rounding_corrected(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a processor that has it."""
    monkeypatch.setattr("rollout.vllm_platform.processor_flags", lambda cpuinfo: FP8_CACHE_INSTRUCTIONS)
    corrected = ["rollout.kv_cache_dtype=fp8", "algorithm.importance_sampling=token_truncated"]
    assert configured(*corrected, "precision=bf16").rollout.kv_cache_dtype == "fp8"
    for overrides in (corrected[:1], [*corrected, "precision=fp32"]):
        with pytest.raises(ConfigError, match=r"rollout.kv_cache_dtype='fp8': .* rounded keys and values: .* correct"):
            configured("precision=bf16", *overrides)


@pytest.mark.parametrize(
    ("override", "line"),
    [
        (
            "algorithm.lerning_rate=1",
            "algorithm.lerning_rate=1: no such field; did you mean algorithm.learning_rate? the fields",
        ),
        ("parallel=tp3", "In 'config': Could not find 'parallel/tp3' Available options in 'parallel': "),
    ],
)
def test_what_hydra_refuses_is_told_in_one_line(override: str, line: str) -> None:
    with pytest.raises(HydraException) as caught:
        configured(override)
    told = command_line.one_line(caught.value)
    assert told.startswith(line)
    assert "\n" not in told


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["nonsense=1"], "error: nonsense=1: no such field; the fields are listed in docs/configuration.md"),
        (["algorithm.steps=0"], "error: algorithm.steps=0: must be above 0"),
    ],
)
def test_the_command_stops_at_once_with_one_line(overrides: list[str], line: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "recipes.train", "recipe=demo", f"run_dir={tmp_path / 'run'}", *overrides]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr == ""
    assert done.stdout.startswith(line)
    assert done.stdout.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["algorithm=ppo", "critic.warmup_steps=56"],
            "critic.warmup_steps=56: the policy is trained in what is",
        ),
        (["algorithm.prompts_per_step=1000"], "data.mix has 'harmful', of which data.prompts holds "),
        (["+data.scores.wit=[benign]"], "rewards.mix, data.scores: unknown verifier 'wit' ("),
        (
            ["rollout=search", "rollout.environment.name=sea"],
            "rollout.environment.name='sea': no such environment",
        ),
        (
            ["rollout=search", "rollout.environment.settings.corpus=null"],
            "rollout.environment.settings of 'search': corpus=None, endpoint=None: give one of them",
        ),
        (
            ["rollout.engines=64000"],
            "rollout.engines=64000: 64000 on a node need more than 96000 GiB (rollout.kv_cache",
        ),
        (
            ["data.scores.safety=[none]"],
            "data.scores.safety=['none']: recipes/data/demo/test.jsonl, recipes/data/demo/outside.jsonl has rows",
        ),
        (["algorithm.advantage=gpro"], "algorithm.advantage='gpro': no such function; use one of grpo, "),
        (["data.sft=recipes/data/demo/rl.jsonl"], "recipes/data/demo/rl.jsonl:1: field 'response' is missing"),
    ],
)
def test_data_and_parts_are_checked_before_anything_is_made(overrides: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        prepare_run(configured(f"run_dir={tmp_path / 'run'}", *overrides))
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_model_folder_that_is_not_there_is_told(tmp_path: Path) -> None:
    """On the terminal, though libraries' warnings go to a log by then."""
    command = [sys.executable, "-m", "recipes.train", "recipe=demo", f"run_dir={tmp_path / 'run'}"]
    command += [f"model.path={tmp_path / 'gone'}", "model.gguf_package=null"]
    with warm.processes():
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1].startswith(f"error: model.path='{tmp_path / 'gone'}': no config.json there;")


def test_a_model_of_random_weights_is_the_same_each_time(tmp_path: Path) -> None:
    """It has its processor, and no folder is written over."""
    weights = []
    for name in ("one", "two"):
        model = configured("model=vqa_tiny", f"model.path={tmp_path / name}").model
        assert prepare_model.prepare(model)
        assert not prepare_model.prepare(model)
        weights.append(load_file(tmp_path / name / "model.safetensors"))
    assert weights[0].keys() == weights[1].keys() and all(
        torch.equal(weights[0][key], weights[1][key]) for key in weights[0]
    )
    assert sum(tensor.numel() for tensor in weights[0].values()) > 10**6
    assert max(float(tensor.float().std()) for tensor in weights[0].values()) > 0.01, "random, not zero"
    assert AutoProcessor.from_pretrained(tmp_path / "one").tokenizer.chat_template
    nowhere = configured(f"model.path={tmp_path / 'three'}", f"model.random_weights_of={tmp_path / 'gone'}").model
    with pytest.raises(ConfigError, match=r"^model\.random_weights_of='.*gone': no config\.json there"):
        prepare_model.prepare(nowhere)


def test_a_mistyped_model_folder_is_not_made_from_the_package(tmp_path: Path) -> None:
    path = str(tmp_path / "SmolLM2-135M-Instuct")
    with pytest.raises(
        ConfigError, match=rf"^model\.path='{path}': no config.json .* name SmolLM2-135M-Instruct is made"
    ):
        prepare_model.prepare(configured(f"model.path={path}").model)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("data.mix.poetry=1", ("data", "mix", "poetry"), 1),
        ("data.mix={poetry: 1}", ("data", "mix", "poetry"), 1),
        ("data.scores={my_reward.brief: [task]}", ("data", "scores", "my_reward.brief"), ["task"]),
        ("data.scores.wit=[benign]", ("data", "scores", "wit"), ["benign"]),
        (
            "rewards.mix={safety: {my_reward.brief: 1.0}}",
            ("rewards", "mix", "safety"),
            {"safety": 1.0, "my_reward.brief": 1.0},
        ),
        ("rewards.mix.short={my_reward.brief: 1}", ("rewards", "mix", "short"), {"my_reward.brief": 1}),
        ("rewards.verifiers.brief={rule: length}", ("rewards", "verifiers", "brief"), {"rule": "length"}),
        (
            "rewards.servers.judge={model: m, arguments: [--max-model-len, '512']}",
            ("rewards", "servers", "judge", "arguments"),
            ["--max-model-len", "512"],
        ),
        ("algorithm.kwargs.share=0.5", ("algorithm", "kwargs", "share"), 0.5),
        ("rollout.environment.settings.corpus=x", ("rollout", "environment", "settings", "corpus"), "x"),
    ],
)
def test_free_form_mappings_take_new_keys_as_plain_overrides(
    override: str, path: tuple[str, ...], value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main_s_configuration([override], monkeypatch)(*path) == value


def test_a_servers_new_argument_is_a_plain_override(monkeypatch: pytest.MonkeyPatch) -> None:
    overrides = ["rewards=safework", "rewards.servers.safety.arguments=[--max-model-len, '512']"]
    value_of = main_s_configuration(overrides, monkeypatch)
    assert value_of("rewards", "servers", "safety", "arguments") == ["--max-model-len", "512"]


def main_s_configuration(overrides: list[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """What a program gets that is started with these arguments: a function of a value's path."""
    configs = []

    @hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
    def main(raw: DictConfig) -> None:
        configs.append(asdict(parse(raw)))

    monkeypatch.setattr(sys, "argv", ["program", "recipe=demo", *overrides])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    command_line.from_command_line(main)
    return lambda *path: reduce(getitem, path, configs[0])


def test_help_needs_no_recipe_and_names_all_that_can_be_chosen(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def main() -> None:
        raise AssertionError("the program is not called")

    monkeypatch.setattr(sys.modules["__main__"], "__doc__", "What the program does.\n")
    defaults = yaml.safe_load((CONF / "config.yaml").read_text())["defaults"]
    # Without "override hydra/…" and "optional recipe_stage".
    groups = {name for default in defaults if default != "_self_" for name in default if " " not in name}
    for flag in ("--help", "-h"):
        monkeypatch.setattr(sys, "argv", ["program", flag])
        command_line.from_command_line(main)
        lines = capsys.readouterr().out.splitlines()
        assert lines[0] == "What the program does."
        choices = dict(line.strip().split("=", 1) for line in lines if line.startswith("  "))
        assert set(choices) == groups
        for group, names in choices.items():
            assert {*names.split("|"), "base"} >= {file.stem for file in (CONF / group).glob("*.yaml")}


def test_other_fields_are_no_free_form_mappings() -> None:
    assert with_new_keys(["algorithm.steps=1", "rewards.gate=x", "recipe=demo"], mappings(Config)) == [
        "algorithm.steps=1",
        "rewards.gate=x",
        "recipe=demo",
    ]
    assert with_new_keys(["~data.mix.task", "+data.mix.a=1", "data.mixture=1"], mappings(Config)) == [
        "~data.mix.task",
        "+data.mix.a=1",
        "data.mixture=1",
    ]


def test_servers_take_a_run_s_command_line() -> None:
    known = [*mappings(RewardsConfig, "rewards"), *OTHER_MAPPINGS]
    assert sorted(known) == sorted(mappings(Config))


def test_every_setting_is_described() -> None:
    assert [path for path, _, described in settings.fields(Config) if described is None or not described.doc] == []


def test_the_page_of_all_settings_is_current() -> None:
    assert reference.PAGE.read_text() == reference.page(), "write it anew: python -m recipes.config.reference"
