"""AdamW with the distributed optimiser, and its learning-rate schedule, from Megatron-Core."""

import math

from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_ext.model import Model
from megatron_ext.optimizer_settings import OptimizerConfig, ScheduleConfig


def build(
    model: Model, settings: OptimizerConfig, learning: ScheduleConfig, steps: int
) -> tuple[MegatronOptimizer, OptimizerParamScheduler]:
    """Build the optimiser and the learning-rate schedule of a model.

    The optimiser has FP32 master weights and moments. They are sharded over the data-parallel ranks if the model was
    built for the distributed optimiser. The schedule runs over ``steps`` updates. Norms and biases get no weight decay.
    """
    bf16 = model.config.bf16
    optimizer = get_megatron_optimizer(
        MegatronOptimizerConfig(
            optimizer="adam",
            lr=learning.learning_rate,
            min_lr=learning.learning_rate * learning.min_lr_ratio,
            weight_decay=settings.weight_decay,
            adam_beta1=settings.betas[0],
            adam_beta2=settings.betas[1],
            adam_eps=settings.epsilon,
            clip_grad=settings.clip_grad_norm,
            bf16=bf16,
            params_dtype=model.config.params_dtype,
            use_distributed_optimizer=model.chunks[0].ddp_config.use_distributed_optimizer,
            fp8_recipe=model.config.fp8_recipe if model.config.fp8 else None,
        ),
        model.chunks,
        use_gloo_process_groups=False,
    )
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=learning.learning_rate,
        min_lr=learning.learning_rate * learning.min_lr_ratio,
        lr_warmup_steps=int(learning.warmup_fraction * steps),
        lr_decay_steps=steps,
        lr_decay_style=learning.decay,
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=steps,
        wd_incr_style="constant",
    )
    return optimizer, scheduler


def skip(optimizer: MegatronOptimizer) -> float:
    """Skip an update: drop the gradients. Returns a gradient norm of 0."""
    optimizer.zero_grad()
    return 0.0


def step(optimizer: MegatronOptimizer, scheduler: OptimizerParamScheduler) -> float:
    """Make one update. Returns the gradient norm before clipping.

    If the norm is not finite, this returns NaN and makes no update: weights, moments and schedule stay as they are. The
    norm is that of the gradients of all ranks, so all ranks do the same.
    """
    optimizer.prepare_grads()
    grad_norm = optimizer.get_grad_norm()
    if not math.isfinite(grad_norm):
        optimizer.zero_grad()
        return math.nan
    optimizer.step()
    # In FP32 without the distributed optimiser param.grad is the gradient buffer itself. If it stayed set, the next
    # backward pass would count twice.
    optimizer.zero_grad()
    scheduler.step(increment=1)
    return float(grad_norm)
