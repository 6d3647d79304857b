"""Settings for tests: the defaults of conf/, but for what a test gives."""

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from megatron_ext.layout import ParallelConfig
from megatron_ext.optimizer_settings import OptimizerConfig, ScheduleConfig
from megatron_ext.precision import PrecisionConfig
from megatron_ext.settings import read
from rollout.engine import EngineSettings
from rollout.settings import RolloutConfig

CONF = Path(__file__).resolve().parents[1] / "conf"


def parallel_config(**changes: Any) -> ParallelConfig:
    """One rank, and what is given."""
    return read(ParallelConfig, "parallel", OmegaConf.load(CONF / "parallel" / "tp1.yaml"), changes)


def precision_config(name: str = "bf16", **changes: Any) -> PrecisionConfig:
    """BF16, and what is given."""
    return read(
        PrecisionConfig, "precision", OmegaConf.load(CONF / "precision" / "bf16.yaml"), {"name": name} | changes
    )


def rollout_config(**changes: Any) -> RolloutConfig:
    """One engine with one thread, and what is given."""
    changes = {"max_response_tokens": 32, "threads": 1} | changes
    return read(RolloutConfig, "rollout", OmegaConf.load(CONF / "rollout" / "vllm.yaml"), changes)


def optimizer_config(**changes: Any) -> OptimizerConfig:
    """AdamW, and what is given."""
    return read(OptimizerConfig, "optimizer", OmegaConf.load(CONF / "config.yaml").optimizer, changes)


def schedule_config(learning_rate: float, **changes: Any) -> ScheduleConfig:
    """A constant learning rate without warm-up, and what is given."""
    values: dict[str, Any] = {
        "learning_rate": learning_rate,
        "min_lr_ratio": 1.0,
        "warmup_fraction": 0.0,
        "decay": "constant",
    }
    return ScheduleConfig(**(values | changes))


def engine_settings(
    model: str,
    dtype: str,
    max_model_len: int,
    *,
    platform: str = "cpu",
    devices: tuple[int, ...] = (),
    thinking: Any = None,
    **changes: Any,
) -> EngineSettings:
    """An engine of one worker; ``changes`` are of ``rollout``."""
    return EngineSettings(
        rollout=rollout_config(**changes),
        model=model,
        dtype=dtype,
        max_model_len=max_model_len,
        platform=platform,
        devices=devices,
        thinking=thinking,
    )
