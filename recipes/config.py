"""The configuration's shape and its checks. Defaults stand in conf/ only; a field here has none."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megatron_ext import layout, precision
from recipes import trainer
from rewards import settings
from rewards.settings import RewardsConfig
from rollout.engine import CPU_QUANTIZATION, QUANTIZATIONS

# ${cores:N} in conf/ is this machine's cores shared among N processes.
OmegaConf.register_new_resolver("cores", lambda share: max(1, len(os.sched_getaffinity(0)) // share), replace=True)

# OmegaConf's structured configurations read Optional, not ``| None``.


@dataclass
class RecipeConfig:
    name: str


@dataclass
class SftConfig:
    steps: int
    rows_per_step: int
    learning_rate: float
    minimum_fraction: float
    warmup_fraction: float
    decay: str


@dataclass
class StageConfig:
    names: list[str]
    sft: Optional[SftConfig]  # noqa: UP045


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
    sampling_rounds: int
    learning_rate: float
    minimum_fraction: float
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
    importance_sampling: bool
    importance_cap: float
    sequence_ratio_bounds: Optional[list[float]]  # noqa: UP045
    token_ratio_veto: Optional[float]  # noqa: UP045
    mismatch_alarm: float
    own: dict[str, Any]


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
    max_step_tokens: Optional[int]  # noqa: UP045
    thinking_budget: Optional[int]  # noqa: UP045
    thinking_marks: list[str]
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
class DataConfig:
    sft: str
    prompts: str
    evaluation: str
    max_prompt_tokens: int
    mix: dict[str, int]
    images: ImagesConfig
    evaluation_samples: int
    scores: dict[str, list[str]]


@dataclass
class ClusterConfig:
    platform: str
    ranks: int
    threads: int
    timeout: float


@dataclass
class LoggerConfig:
    wandb_project: Optional[str]  # noqa: UP045


@dataclass
class OptimizerConfig:
    betas: list[float]
    epsilon: float
    weight_decay: float
    clip_grad_norm: float


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
    checkpoint: CheckpointConfig
    seed: int
    run_dir: str
    resume: bool


class ConfigError(ValueError):
    """A field, its value and what to do."""


def parse(raw: DictConfig) -> Config:
    """The typed, checked configuration. Raises ConfigError on an unknown key, a missing or an impossible value."""
    try:
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), raw))
    except OmegaConfBaseException as error:
        field = getattr(error, "full_key", None) or "configuration"
        raise ConfigError(f"{field}: {str(error).splitlines()[0]}; the fields are listed in conf/") from error
    assert isinstance(config, Config)
    check(config)
    return config


def samples_per_step(config: Config) -> int:
    """Responses of one RL step, all ranks together."""
    return config.algorithm.prompts_per_step * config.algorithm.samples_per_prompt


def samples_per_update(config: Config) -> int:
    """Responses of one optimiser step, all ranks together."""
    return samples_per_step(config) // config.algorithm.updates_per_rollout


def check_algorithm(c: Config) -> None:
    """Raises ConfigError for what the algorithm's parts can't do together."""
    a = c.algorithm
    if a.samples_per_prompt < 2:
        raise ConfigError(
            f"algorithm.samples_per_prompt={a.samples_per_prompt}: a group needs at least 2 samples to compare"
        )
    for name in ("kl_coefficient", "drift_coefficient", "drift_cap", "entropy_coefficient", "advantage_epsilon"):
        if (value := getattr(a, name)) < 0:
            raise ConfigError(f"algorithm.{name}={value}: use 0 or more")
    if a.dual_clip <= 1:
        raise ConfigError(f"algorithm.dual_clip={a.dual_clip}: must be above 1, the ratio of an unchanged policy")
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
    if a.token_ratio_veto is not None and not 0 < a.token_ratio_veto < 1:
        raise ConfigError(f"algorithm.token_ratio_veto={a.token_ratio_veto}: must be in (0, 1), or null for none")


def check_rollout(c: Config) -> None:
    """Raises ConfigError for what the rollout's settings can't do, alone or with each other."""
    r = c.rollout
    for field, bound in (("max_step_tokens", r.max_step_tokens), ("thinking_budget", r.thinking_budget)):
        if bound is not None and bound < 1:
            raise ConfigError(f"rollout.{field}={bound}: use 1 or more, or null for no bound")
    if r.staleness not in (0, 1):
        raise ConfigError(f"rollout.staleness={r.staleness}: use 0 (generate, then train) or 1 (one step ahead)")
    if r.oversample < 1:
        raise ConfigError(f"rollout.oversample={r.oversample}: use 1 (as many prompts as a step takes) or more")
    if r.max_step_tokens is not None and r.oversample == 1:
        raise ConfigError(
            f"rollout.max_step_tokens={r.max_step_tokens}: carries over what rollout.oversample puts in flight; with "
            "rollout.oversample=1 nothing is left over: use more than 1, or null"
        )
    if (r.staleness or r.max_step_tokens) and not c.algorithm.importance_sampling:
        field = "staleness=1" if r.staleness else f"max_step_tokens={r.max_step_tokens}"
        raise ConfigError(
            f"rollout.{field}: samples come from older weights; correct for it: algorithm.importance_sampling=true"
        )
    if r.sleep and (c.cluster.platform == "cpu" or r.staleness):
        raise ConfigError(
            "rollout.sleep=true: needs a GPU and rollout.staleness=0 (it generates while the trainer works)"
        )
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


def check(config: Config) -> None:
    """Raises ConfigError naming the first field whose value can't work."""
    c = config
    choices: list[tuple[str, Any, tuple[Any, ...]]] = [
        ("cluster.platform", c.cluster.platform, ("cpu", "cuda")),
        ("parallel.recompute", c.parallel.recompute, ("none", "selective", "full")),
        ("algorithm.decay", c.algorithm.decay, ("constant", "linear", "cosine")),
        ("algorithm.kl_in", c.algorithm.kl_in, ("loss", "reward")),
        *(("stage.names", name, ("sft", "rl")) for name in c.stage.names),
    ]
    if c.stage.sft:
        choices.append(("stage.sft.decay", c.stage.sft.decay, ("constant", "linear", "cosine")))
    for field, value, allowed in choices:
        if value not in allowed:
            raise ConfigError(f"{field}={value!r}: use one of {', '.join(map(str, allowed))}")
    positive = {
        "algorithm.steps": c.algorithm.steps,
        "algorithm.prompts_per_step": c.algorithm.prompts_per_step,
        "algorithm.learning_rate": c.algorithm.learning_rate,
        "algorithm.updates_per_rollout": c.algorithm.updates_per_rollout,
        "algorithm.sampling_rounds": c.algorithm.sampling_rounds,
        "algorithm.clip_high": c.algorithm.clip_high,
        "algorithm.clip_filter_cap": c.algorithm.clip_filter_cap,
        "algorithm.importance_cap": c.algorithm.importance_cap,
        "algorithm.mismatch_alarm": c.algorithm.mismatch_alarm,
        "parallel.micro_batch_tokens": c.parallel.micro_batch_tokens,
        "rollout.engines": c.rollout.engines,
        "rollout.tensor": c.rollout.tensor,
        "rollout.max_response_tokens": c.rollout.max_response_tokens,
        "rollout.sync_bucket_mib": c.rollout.sync_bucket_mib,
        "rollout.sync_verify_every": c.rollout.sync_verify_every,
        "rollout.temperature": c.rollout.temperature,
        "rollout.stall_timeout": c.rollout.stall_timeout,
        "data.max_prompt_tokens": c.data.max_prompt_tokens,
        "data.images.min_pixels": c.data.images.min_pixels,
        "data.images.max_pixels": c.data.images.max_pixels,
        "data.images.max_aspect_ratio": c.data.images.max_aspect_ratio,
        "data.evaluation_samples": c.data.evaluation_samples,
        "cluster.ranks": c.cluster.ranks,
        "cluster.threads": c.cluster.threads,
        "checkpoint.every_steps": c.checkpoint.every_steps,
        "checkpoint.keep": c.checkpoint.keep,
        "algorithm.token_divisor": c.algorithm.token_divisor,  # may be the longest response: behind it
    }
    if c.stage.sft:
        positive |= {
            "stage.sft.steps": c.stage.sft.steps,
            "stage.sft.rows_per_step": c.stage.sft.rows_per_step,
            "stage.sft.learning_rate": c.stage.sft.learning_rate,
        }
    for field, value in positive.items():
        if value <= 0:
            raise ConfigError(f"{field}={value}: must be above 0")
    fractions = {
        "algorithm.minimum_fraction": (c.algorithm.minimum_fraction, 0 <= c.algorithm.minimum_fraction <= 1, "[0, 1]"),
        "algorithm.warmup_fraction": (c.algorithm.warmup_fraction, 0 <= c.algorithm.warmup_fraction < 1, "[0, 1)"),
        "algorithm.clip_low": (c.algorithm.clip_low, 0 < c.algorithm.clip_low < 1, "(0, 1)"),
        "algorithm.discount": (c.algorithm.discount, 0 <= c.algorithm.discount <= 1, "[0, 1]"),
        "algorithm.gae_lambda": (c.algorithm.gae_lambda, 0 <= c.algorithm.gae_lambda <= 1, "[0, 1]"),
        "algorithm.overlong_fraction": (
            c.algorithm.overlong_fraction,
            0 <= c.algorithm.overlong_fraction <= 1,
            "[0, 1]",
        ),
        "algorithm.cale_mu": (c.algorithm.cale_mu, 0 <= c.algorithm.cale_mu <= 1, "[0, 1]"),
        "rollout.top_p": (c.rollout.top_p, 0 < c.rollout.top_p <= 1, "(0, 1]"),
    }
    if c.stage.sft:
        fractions |= {
            "stage.sft.minimum_fraction": (
                c.stage.sft.minimum_fraction, 0 <= c.stage.sft.minimum_fraction <= 1, "[0, 1]",
            ),
            "stage.sft.warmup_fraction": (c.stage.sft.warmup_fraction, 0 <= c.stage.sft.warmup_fraction < 1, "[0, 1)"),
        }  # fmt: skip
    for field, (value, fits, interval) in fractions.items():
        if not fits:
            raise ConfigError(f"{field}={value}: must be in {interval}")
    check_rollout(c)
    if not c.stage.names:
        raise ConfigError("stage.names=[]: name at least one of sft, rl")
    check_algorithm(c)
    if len(c.optimizer.betas) != 2 or not all(0 <= beta < 1 for beta in c.optimizer.betas):
        raise ConfigError(f"optimizer.betas={c.optimizer.betas}: give two values in [0, 1)")
    if "sft" in c.stage.names and c.stage.sft is None:
        raise ConfigError(f"stage.names={c.stage.names}: 'sft' needs stage.sft, which is empty: choose stage=sft_rl")
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
    if c.stage.sft:
        shared_out["stage.sft.rows_per_step"] = c.stage.sft.rows_per_step
    for field, count in shared_out.items():
        if count % multiple:
            stages = (
                ", times the pipeline's stages for parallel.virtual_pipeline" if c.parallel.virtual_pipeline > 1 else ""
            )
            raise ConfigError(f"{field}={count}: use a multiple of {multiple}, the data-parallel ranks{stages}")
    if not c.data.mix or any(share <= 0 for share in c.data.mix.values()):
        raise ConfigError(f"data.mix={c.data.mix}: give every kind of prompt a share of at least 1")
    for field, path in (
        ("data.sft", c.data.sft),
        ("data.prompts", c.data.prompts),
        ("data.evaluation", c.data.evaluation),
    ):
        if not Path(path).is_file():
            raise ConfigError(f"{field}={path!r}: no such file in {os.getcwd()}")
