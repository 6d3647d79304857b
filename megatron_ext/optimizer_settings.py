"""Settings of AdamW and of its learning-rate schedule. Pure, because it is imported before a run has any rank."""

from dataclasses import dataclass

from megatron_ext.settings import COUNT, FRACTION, FREE, setting

DECAYS = ("constant", "linear", "cosine")


@dataclass
class ScheduleConfig:
    """The learning rate over a stage's updates: linear warm-up from 0, then a decay."""

    learning_rate: float = setting("largest learning rate", range="(0, 1]")
    min_lr_ratio: float = setting("learning rate at the end of the decay, as a part of the largest", range=FRACTION)
    warmup_fraction: float = setting("part of the updates in which the learning rate rises from 0", range="[0, 1)")
    decay: str = setting("shape of the decay", choices=DECAYS)


@dataclass
class OptimizerConfig:
    """AdamW, for every model that is trained."""

    betas: list[float] = setting("decay rates of the two moments, each in [0, 1)")
    epsilon: float = setting("added to the denominator", range="(0, 1]")
    weight_decay: float = setting("decoupled weight decay; norms and biases get none", range=FRACTION)
    clip_grad_norm: float = setting("largest norm of the gradient; larger ones are scaled to it", range="(0, 1e6]")
    max_skipped: int = setting(
        "updates in a row skipped for a loss or gradient that is not finite, after which the run stops",
        range=COUNT,
        on_resume=FREE,
    )
    offload: bool = setting(
        "GPU: keep optimiser states and gradients on the host while engines generate and judges judge",
        on_resume=FREE,
    )


def check(settings: OptimizerConfig) -> None:
    """Check the settings. Raises ValueError for betas that AdamW can't have."""
    betas = settings.betas
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"optimizer.betas={betas}: give two values in [0, 1)")
