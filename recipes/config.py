"""The configuration's shape and its checks. Defaults stand in conf/ only; a field here has none."""

import difflib
import os
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Optional, get_args, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from megatron_ext import layout, precision, resolvers
from recipes import ranges, trainer
from recipes.data.row_order import curriculum_phases
from recipes.data.source_spec import parse_sources
from recipes.errors import ConfigError
from rewards import settings
from rewards.settings import RewardsConfig
from rollout.engine import CPU_QUANTIZATION, QUANTIZATIONS

resolvers.register()

# OmegaConf's structured configurations read Optional, not ``| None``.


@dataclass
class RecipeConfig:
    name: str


@dataclass
class SftConfig:
    judge: Optional[str]  # noqa: UP045
    epochs: Optional[float]  # noqa: UP045
    steps: Optional[int]  # noqa: UP045
    rows_per_step: int
    aggregation: str
    held_out: Optional[str]  # noqa: UP045
    held_out_every: int
    learning_rate: float
    min_lr_ratio: float
    warmup_fraction: float
    decay: str


@dataclass
class RewardModelConfig:
    pairs: str
    held_out: str
    held_out_every: int
    epochs: Optional[float]  # noqa: UP045
    steps: Optional[int]  # noqa: UP045
    pairs_per_step: int
    learning_rate: float
    min_lr_ratio: float
    warmup_fraction: float
    decay: str


@dataclass
class StageConfig:
    name: str
    trains: list[str]
    after: Optional[str]  # noqa: UP045
    evaluates: bool
    ladder: list[str]
    sft: SftConfig
    reward_model: RewardModelConfig


@dataclass
class ModelConfig:
    path: str
    frozen: list[str]
    gguf_package: Optional[str] = None  # noqa: UP045
    gguf_file: Optional[str] = None  # noqa: UP045


@dataclass
class AlgorithmConfig:
    steps: int
    prompts_per_step: int
    samples_per_prompt: int
    updates_per_rollout: int
    max_generation_batches: int
    learning_rate: float
    min_lr_ratio: float
    warmup_fraction: float
    decay: str
    advantage: str
    advantage_epsilon: float
    clip_filter_cap: float
    cale_alpha: float
    cale_mu: float
    discount: float
    gae_lambda: float
    overlong_fraction: float
    skip_zero_advantage: bool
    policy_loss: str
    clip_low: float
    clip_high: float
    dual_clip: float
    drift_coefficient: float
    drift_cap: float
    entropy_coefficient: float
    kl_estimator: str
    kl_in: str
    kl_coefficient: float
    aggregation: str
    token_divisor: float
    value_clip: float
    importance_sampling: bool
    tis_cap: float
    sequence_ratio_bounds: Optional[list[float]]  # noqa: UP045
    token_ratio_veto: Optional[float]  # noqa: UP045
    max_mismatch: float
    kwargs: dict[str, Any]


@dataclass
class ParallelConfig:
    tensor: int
    pipeline: int
    virtual_pipeline: int
    first_stage_layers: Optional[int]  # noqa: UP045
    last_stage_layers: Optional[int]  # noqa: UP045
    context: int
    sequence: bool
    recompute: str
    distributed_optimizer: bool
    micro_batch_tokens: int


@dataclass
class PrecisionConfig:
    name: str
    recipe: Optional[str]  # noqa: UP045
    format: Optional[str]  # noqa: UP045
    bf16_layers: int
    parameter_gather: bool


@dataclass
class EnvironmentConfig:
    """``settings`` are the keywords of the environment's function (``rollout.environment``)."""

    name: Optional[str]  # noqa: UP045
    max_turns: int
    settings: dict[str, Any]


@dataclass
class RolloutConfig:
    engines: int
    tensor: int
    max_response_tokens: int
    temperature: float
    top_p: float
    max_num_seqs: int
    max_num_batched_tokens: int
    kv_cache_gib: float
    threads: int
    startup_timeout: float
    stall_timeout: float
    staleness: int
    oversample: float
    partial_rollout_tokens: Optional[int]  # noqa: UP045
    thinking_budget: Optional[int]  # noqa: UP045
    thinking_marks: list[str]
    environment: EnvironmentConfig
    sleep: bool
    quantization: Optional[str]  # noqa: UP045
    sync_bucket_mib: int
    sync_verify_every: int


@dataclass
class ImagesConfig:
    min_pixels: int
    max_pixels: int
    max_aspect_ratio: float


@dataclass
class PhaseConfig:
    from_step: int
    mix: dict[str, int]


@dataclass
class DataConfig:
    """``sft``, ``prompts`` and ``evaluation`` are sources, or lists of them: see ``recipes.data.source_spec``."""

    sft: Any
    prompts: Any
    evaluation: Any
    max_prompt_tokens: int
    mix: dict[str, int]
    curriculum: list[PhaseConfig]
    images: ImagesConfig
    evaluation_samples: int
    scores: dict[str, list[str]]


@dataclass
class ClusterConfig:
    platform: str
    nodes: int
    ranks: int
    threads: int
    timeout: float
    watchdog: float
    slow_factor: float


@dataclass
class LoggerConfig:
    wandb_project: Optional[str]  # noqa: UP045
    tensorboard: bool


@dataclass
class OptimizerConfig:
    betas: list[float]
    epsilon: float
    weight_decay: float
    clip_grad_norm: float
    max_skipped: int
    offload: bool


@dataclass
class CriticConfig:
    path: Optional[str]  # noqa: UP045
    learning_rate: float
    min_lr_ratio: float
    warmup_fraction: float
    decay: str
    warmup_steps: int
    offload: bool


@dataclass
class CheckpointConfig:
    every_steps: int
    keep: int


@dataclass
class Config:
    """One field per Hydra group, plus what every stage shares."""

    recipe: RecipeConfig
    stage: StageConfig
    model: ModelConfig
    algorithm: AlgorithmConfig
    rewards: RewardsConfig
    parallel: ParallelConfig
    precision: PrecisionConfig
    rollout: RolloutConfig
    data: DataConfig
    cluster: ClusterConfig
    logger: LoggerConfig
    optimizer: OptimizerConfig
    critic: CriticConfig
    checkpoint: CheckpointConfig
    seed: int
    run_dir: str
    resume: bool


def field_types(type_: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted path and type of everything below a dataclass; a group comes before its fields."""
    for field in fields(type_):
        hint = get_type_hints(type_)[field.name]
        yield f"{prefix}{field.name}", hint
        if is_dataclass(hint):
            yield from field_types(hint, f"{prefix}{field.name}.")


FIELD_TYPES = dict(field_types(Config))
NULLABLE = {path for path, hint in FIELD_TYPES.items() if type(None) in get_args(hint)}


def unknown_field(path: str) -> str:
    """The error about a field that is not there, with the nearest that is: beside it, else of its name, else of any."""
    parent, _, name = path.rpartition(".")
    names = {known: known.rpartition(".")[2] for known in FIELD_TYPES}
    beside = [each for known, each in names.items() if known.rpartition(".")[0] == parent]
    near = [f"{parent}.{each}".removeprefix(".") for each in difflib.get_close_matches(name, beside, 1, 0.6)]
    near = near or difflib.get_close_matches(path, [known for known, each in names.items() if each == name], 1, 0.0)
    similar = difflib.get_close_matches(name, names.values(), 1, 0.8)
    near = near or [known for known, each in names.items() if each in similar]
    hint = f"did you mean {near[0]}? " if near else ""
    return f"no such field; {hint}the fields are listed in conf/"


def parse(raw: DictConfig) -> Config:
    """The typed, checked configuration. Raises ConfigError on an unknown key, a missing or an impossible value."""
    try:
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), raw))
    except OmegaConfBaseException as error:
        field = getattr(error, "full_key", None) or "configuration"
        if isinstance(error, ConfigKeyError):
            raise ConfigError(f"{field}: {unknown_field(field)}") from error
        raise ConfigError(f"{field}: {str(error).splitlines()[0]}; the fields are listed in conf/") from error
    assert isinstance(config, Config)
    config.model.path = os.path.normpath(config.model.path)  # a stage's is beside its own folder: ${run_dir}/../…
    check(config)
    return config


def samples_per_step(config: Config) -> int:
    """Responses of one RL step, all ranks together."""
    return config.algorithm.prompts_per_step * config.algorithm.samples_per_prompt


def samples_per_update(config: Config) -> int:
    """Responses of one optimiser step, all ranks together."""
    return samples_per_step(config) // config.algorithm.updates_per_rollout


def generates(config: Config) -> bool:
    """Whether a stage asks engines for responses."""
    return config.stage.evaluates or "rl" in config.stage.trains


def engines_of_a_node(config: Config, nodes: int) -> int:
    """How many. Raises ConfigError where the nodes do not share them evenly, or one has too few GPUs for its own."""
    c = config.rollout
    if c.engines % nodes:
        raise ConfigError(f"rollout.engines={c.engines}: the job has {nodes} nodes; use a multiple, each gets as many")
    count, gpus = c.engines // nodes, config.cluster.ranks // nodes  # a rank a GPU
    if config.cluster.platform == "cuda" and count * c.tensor > gpus:
        raise ConfigError(
            f"rollout.engines={c.engines}, rollout.tensor={c.tensor}: {count} engines of so many GPUs do not fit on a "
            f"node's {gpus}"
        )
    return count


def check_schedule(where: str, chosen: SftConfig | RewardModelConfig | CriticConfig) -> None:
    """Raises ConfigError for learning-rate settings that can't be."""
    if chosen.decay not in ("constant", "linear", "cosine"):
        raise ConfigError(f"{where}.decay={chosen.decay!r}: use one of constant, linear, cosine")


def check_supervised(c: Config) -> None:
    """Raises ConfigError for what the stages that learn from data alone can't do."""
    for stage, chosen in (("sft", c.stage.sft), ("reward_model", c.stage.reward_model)):
        if stage not in c.stage.trains:
            continue
        where = f"stage.{stage}"
        check_schedule(where, chosen)
        if (chosen.steps is None) == (chosen.epochs is None):
            raise ConfigError(
                f"{where}.steps={chosen.steps}, {where}.epochs={chosen.epochs}: give one of them, null the other"
            )
        per_step = "rows_per_step" if isinstance(chosen, SftConfig) else "pairs_per_step"
        sources = {"held_out": chosen.held_out, "pairs": getattr(chosen, "pairs", None)}
        for field, source in sources.items():
            try:
                if source is not None:
                    parse_sources(source)
            except ValueError as error:
                raise ConfigError(f"{where}.{field}={error}") from error
        if (size := getattr(chosen, per_step)) % (multiple := trainer.sequence_multiple(c)):
            raise ConfigError(f"{where}.{per_step}={size}: use a multiple of {multiple}, the data-parallel ranks")
    if c.stage.sft.aggregation not in ("token_mean", "sequence_mean_token_mean"):
        raise ConfigError(
            f"stage.sft.aggregation={c.stage.sft.aggregation!r}: use one of token_mean, sequence_mean_token_mean"
        )


def check_data(data: DataConfig) -> None:
    """Raises ConfigError for shares, phases and sources that can't be."""
    for i, (from_step, mix) in enumerate(curriculum_phases(data)):
        field = f"data.curriculum[{i}]" if data.curriculum else "data"
        if not mix or not all(isinstance(share, int) and 0 <= share <= 10**6 for share in mix.values()):
            raise ConfigError(f"{field}.mix={mix}: give kinds of prompts shares of 1 and more, 0 for none of a kind")
        before = curriculum_phases(data)[i - 1][0] if i else None
        if before is None and from_step:
            raise ConfigError(f"{field}.from_step={from_step}: the first phase begins with step 0")
        if before is not None and from_step <= before:
            raise ConfigError(f"{field}.from_step={from_step}: must be above {before}, the step of the phase before it")
    if data.images.min_pixels > data.images.max_pixels:
        raise ConfigError(
            f"data.images.min_pixels={data.images.min_pixels}: is above data.images.max_pixels="
            f"{data.images.max_pixels}; lower it"
        )
    for name in ("sft", "prompts", "evaluation"):
        try:
            parse_sources(getattr(data, name))
        except ValueError as error:
            raise ConfigError(f"data.{name}={error}") from error


def check_algorithm(c: Config) -> None:
    """Raises ConfigError for what the algorithm's parts can't do together."""
    a = c.algorithm
    if a.kl_estimator == "k1" and a.kl_in == "loss" and a.kl_coefficient > 0:
        raise ConfigError(
            "algorithm.kl_estimator='k1': its gradient in the loss is zero on average; use k2 or k3, or "
            "algorithm.kl_in=reward"
        )
    if a.prompts_per_step % a.updates_per_rollout:
        raise ConfigError(
            f"algorithm.updates_per_rollout={a.updates_per_rollout}: must divide algorithm.prompts_per_step="
            f"{a.prompts_per_step}"
        )
    bounds = a.sequence_ratio_bounds
    if bounds is not None and (len(bounds) != 2 or not 0 <= bounds[0] <= 1 <= bounds[1]):
        raise ConfigError(f"algorithm.sequence_ratio_bounds={bounds}: give two values around 1, or null for none")


def check_rollout(c: Config) -> None:
    """Raises ConfigError for what the rollout's settings can't do, alone or with each other."""
    r = c.rollout
    if r.partial_rollout_tokens is not None and r.oversample == 1:
        raise ConfigError(
            f"rollout.partial_rollout_tokens={r.partial_rollout_tokens}: carries over what rollout.oversample puts in "
            "flight; with rollout.oversample=1 nothing is left over: use more than 1, or null"
        )
    if (r.staleness or r.partial_rollout_tokens) and not c.algorithm.importance_sampling:
        field = "staleness=1" if r.staleness else f"partial_rollout_tokens={r.partial_rollout_tokens}"
        raise ConfigError(
            f"rollout.{field}: samples come from older weights; correct for it: algorithm.importance_sampling=true"
        )
    if r.sleep and (c.cluster.platform == "cpu" or r.staleness):
        raise ConfigError(
            "rollout.sleep=true: needs a GPU and rollout.staleness=0 (it generates while the trainer works)"
        )
    colocated = c.rewards.placement == settings.COLOCATED
    for field, chosen in (("optimizer.offload=true", c.optimizer.offload), ("rewards.placement=colocated", colocated)):
        if chosen and r.staleness:
            raise ConfigError(f"{field}: needs rollout.staleness=0 (with 1 it generates while it trains)")
    if colocated and c.cluster.platform == "cuda" and not r.sleep:
        raise ConfigError("rewards.placement=colocated: engines make room for judges: needs rollout.sleep=true")
    if r.quantization is not None:
        if r.quantization not in QUANTIZATIONS:
            raise ConfigError(f"rollout.quantization={r.quantization!r}: use null or one of {', '.join(QUANTIZATIONS)}")
        if c.cluster.platform == "cpu" and r.quantization != CPU_QUANTIZATION:
            raise ConfigError(
                f"rollout.quantization={r.quantization!r}: needs cluster.platform=cuda; on a CPU vLLM has "
                f"{CPU_QUANTIZATION} only"
            )
        if c.precision.name == "fp32" or not c.algorithm.importance_sampling:
            raise ConfigError(
                f"rollout.quantization={r.quantization!r}: samples come from rounded weights: needs precision=bf16 (or "
                "fp8), and correct for it: algorithm.importance_sampling=true"
            )
    if r.thinking_budget is not None and len(r.thinking_marks) != 2:
        raise ConfigError(f"rollout.thinking_marks={r.thinking_marks}: give what begins and what ends the thinking")
    if r.environment.name is not None and (r.oversample > 1 or r.thinking_budget is not None):
        raise ConfigError(
            f"rollout.environment.name={r.environment.name!r}: its turns are made in rounds, whole, and its tokens are "
            "the only forced ones: use rollout.oversample=1 and rollout.thinking_budget=null"
        )


def check_critic(c: Config) -> None:
    """Raises ConfigError for what the critic's settings can't do."""
    k = c.critic
    check_schedule("critic", k)
    if k.path is not None and not (Path(k.path) / "config.json").is_file():
        raise ConfigError(
            f"critic.path={k.path!r}: no config.json there: give a Hugging Face folder, or null for the policy's"
        )
    if not 0 <= k.warmup_steps < c.algorithm.steps:
        raise ConfigError(
            f"critic.warmup_steps={k.warmup_steps}: the policy is trained in what is left of algorithm.steps="
            f"{c.algorithm.steps}; use 0 or more, and fewer than these"
        )
    for field, offload in (("critic.offload", k.offload), ("optimizer.offload", c.optimizer.offload)):
        if offload and c.precision.parameter_gather:
            raise ConfigError(
                f"{field}=true: can't move the states of FP8 weights (precision.parameter_gather=true) to the host; "
                "set one false"
            )


def check(config: Config) -> None:
    """Raises ConfigError naming the first field whose value can't work."""
    c = config
    if (wrong := ranges.impossible(c, NULLABLE)) is not None:
        raise ConfigError(wrong)
    choices: list[tuple[str, Any, tuple[Any, ...]]] = [
        ("cluster.platform", c.cluster.platform, ("cpu", "cuda")),
        ("parallel.recompute", c.parallel.recompute, ("none", "selective", "full")),
        ("algorithm.decay", c.algorithm.decay, ("constant", "linear", "cosine")),
        ("algorithm.kl_in", c.algorithm.kl_in, ("loss", "reward")),
        *(("stage.trains", name, ("sft", "reward_model", "rl")) for name in c.stage.trains),
    ]
    for field, value, allowed in choices:
        if value not in allowed:
            raise ConfigError(f"{field}={value!r}: use one of {', '.join(map(str, allowed))}")
    check_rollout(c)
    check_critic(c)
    if not c.stage.trains and not c.stage.ladder:
        raise ConfigError("stage.trains=[]: name at least one of sft, reward_model, rl, or give stage.ladder")
    check_algorithm(c)
    if c.cluster.watchdog >= c.cluster.timeout:
        raise ConfigError(
            f"cluster.watchdog={c.cluster.watchdog}: must be below cluster.timeout={c.cluster.timeout}, "
            "behind which a collective fails without saying where the others are"
        )
    if len(c.optimizer.betas) != 2 or not all(0 <= beta < 1 for beta in c.optimizer.betas):
        raise ConfigError(f"optimizer.betas={c.optimizer.betas}: give two values in [0, 1)")
    try:
        layout.check(c.cluster.ranks, trainer.layout(c))
        precision.check(trainer.precision(c))
        settings.check(c.rewards)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if c.precision.name == "fp8" and c.cluster.platform == "cpu":
        raise ConfigError("precision.name='fp8': needs a GPU with FP8 (H100 or newer); use precision=bf16 on a CPU")
    cuts = trainer.layout(c).token_multiple
    longest = -(-(c.data.max_prompt_tokens + c.rollout.max_response_tokens) // cuts) * cuts
    if c.parallel.micro_batch_tokens < longest:
        raise ConfigError(
            f"parallel.micro_batch_tokens={c.parallel.micro_batch_tokens}: the longest sequence has {longest} tokens "
            "(data.max_prompt_tokens + rollout.max_response_tokens, cut for parallel.context); use at least that"
        )
    multiple = trainer.sequence_multiple(c)
    shared_out = {"algorithm.prompts_per_step x samples_per_prompt / updates_per_rollout": samples_per_update(c)}
    for field, count in shared_out.items():
        if count % multiple:
            stages = (
                ", times the pipeline's stages for parallel.virtual_pipeline" if c.parallel.virtual_pipeline > 1 else ""
            )
            raise ConfigError(f"{field}={count}: use a multiple of {multiple}, the data-parallel ranks{stages}")
    check_supervised(c)
    check_data(c.data)
