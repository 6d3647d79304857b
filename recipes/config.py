"""The configuration's shape and its checks. Defaults stand in conf/ only; a field here has none."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megatron_ext import layout, precision
from recipes import trainer

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
    name: str
    steps: int
    prompts_per_step: int
    samples_per_prompt: int
    learning_rate: float
    minimum_fraction: float
    warmup_fraction: float
    decay: str
    clip_ratio: float
    kl_coefficient: float
    advantage_epsilon: float
    skip_zero_advantage: bool


@dataclass
class RewardsConfig:
    mix: dict[str, dict[str, float]]


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


def check(config: Config) -> None:
    """Raises ConfigError naming the first field whose value can't work."""
    c = config
    choices: list[tuple[str, Any, tuple[Any, ...]]] = [
        ("cluster.platform", c.cluster.platform, ("cpu", "cuda")),
        ("parallel.recompute", c.parallel.recompute, ("none", "selective", "full")),
        ("algorithm.decay", c.algorithm.decay, ("constant", "linear", "cosine")),
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
        "algorithm.clip_ratio": c.algorithm.clip_ratio,
        "parallel.micro_batch_tokens": c.parallel.micro_batch_tokens,
        "rollout.engines": c.rollout.engines,
        "rollout.tensor": c.rollout.tensor,
        "rollout.max_response_tokens": c.rollout.max_response_tokens,
        "rollout.sync_bucket_mib": c.rollout.sync_bucket_mib,
        "rollout.sync_verify_every": c.rollout.sync_verify_every,
        "rollout.temperature": c.rollout.temperature,
        "data.max_prompt_tokens": c.data.max_prompt_tokens,
        "data.images.min_pixels": c.data.images.min_pixels,
        "data.images.max_pixels": c.data.images.max_pixels,
        "data.images.max_aspect_ratio": c.data.images.max_aspect_ratio,
        "data.evaluation_samples": c.data.evaluation_samples,
        "cluster.ranks": c.cluster.ranks,
        "cluster.threads": c.cluster.threads,
        "checkpoint.every_steps": c.checkpoint.every_steps,
        "checkpoint.keep": c.checkpoint.keep,
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
    if not c.stage.names:
        raise ConfigError("stage.names=[]: name at least one of sft, rl")
    if c.algorithm.samples_per_prompt < 2:
        raise ConfigError(
            f"algorithm.samples_per_prompt={c.algorithm.samples_per_prompt}: a group needs at least 2 samples to "
            "compare"
        )
    if c.algorithm.kl_coefficient < 0:
        raise ConfigError(f"algorithm.kl_coefficient={c.algorithm.kl_coefficient}: use 0 or more")
    if len(c.optimizer.betas) != 2 or not all(0 <= beta < 1 for beta in c.optimizer.betas):
        raise ConfigError(f"optimizer.betas={c.optimizer.betas}: give two values in [0, 1)")
    if "sft" in c.stage.names and c.stage.sft is None:
        raise ConfigError(f"stage.names={c.stage.names}: 'sft' needs stage.sft, which is empty: choose stage=sft_rl")
    try:
        layout.check(c.cluster.ranks, trainer.layout(c))
        precision.check(trainer.precision(c))
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if c.precision.name == "fp8" and c.cluster.platform == "cpu":
        raise ConfigError("precision.name='fp8': needs a GPU with FP8 (H100 or newer); use precision=bf16 on a CPU")
    longest = c.data.max_prompt_tokens + c.rollout.max_response_tokens
    if c.parallel.micro_batch_tokens < longest:
        raise ConfigError(
            f"parallel.micro_batch_tokens={c.parallel.micro_batch_tokens}: the longest sequence has {longest} tokens "
            f"(data.max_prompt_tokens + rollout.max_response_tokens); use at least that"
        )
    multiple = trainer.sequence_multiple(c)
    shared_out = {"algorithm.prompts_per_step x samples_per_prompt": samples_per_step(c)}
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
