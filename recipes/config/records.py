"""Settings of a run's records and checkpoints."""

from dataclasses import dataclass

from megatron_ext.settings import COUNT, setting


@dataclass
class LoggerConfig:
    """Where metrics go beside metrics.jsonl, samples and report.html in run_dir."""

    wandb_project: str | None = setting("Weights & Biases project; offline without a key; null for none")
    tensorboard: bool = setting("write event files to run_dir/tensorboard")


@dataclass
class CheckpointConfig:
    """Checkpoints to resume from."""

    every_steps: int = setting("steps between two checkpoints; also at the end", range=COUNT, unit="steps")
    keep: int = setting("complete checkpoints that are kept; one of them to fall back to", range="[2, 1e6]")
