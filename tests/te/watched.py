"""Jobs of the ranks of ``tests.megatron_ext``: passes with RL's loss, in which ``host_waits`` looks for what waits."""

from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir

from megatron_ext import forward_backward
from megatron_ext.micro_batches import MicroBatches
from megatron_ext.model import Model
from megatron_ext.packing import MicroBatch
from megatron_ext.parallel import Parallel
from tests.settings import CONF
from tests.te.host_waits import Watch

TEXT = ("qwen3-tp2-sp-cp2", "shared-tp2-sp")
VISION = ("qwen-cp2", "6b-hf-tp2-sp")
# Parts that reduce over sequences, and metrics of all kinds.
ALGORITHM = {
    "policy_loss": "gspo",
    "importance_sampling": "sequence_truncated",
    "sequence_ratio_bounds": [0.5, 2.0],
    "token_ratio_veto": 1e-4,
    "entropy_coefficient": 0.01,
    "kl_in": "loss",
    "kl_coefficient": 0.1,
}


def text(folder: Path, case: Any, layout: Parallel) -> dict[str, Any]:
    """The job of a case of ``cases``."""
    from tests.megatron_ext import worker  # only in a rank's process

    policy = worker.Policy(folder, case, layout)
    assert isinstance(policy.micro_batches, MicroBatches)
    return passes(policy.model, policy.micro_batches, layout)


def vision(folder: Path, run: Any, layout: Parallel) -> dict[str, Any]:
    """The job of a run of ``vl_twins``."""
    from tests.megatron_ext import vl_twins

    policy = vl_twins.Policy(folder, run, layout)
    return passes(policy.model, policy.micro, layout)


def passes(model: Model, micro_batches: MicroBatches, layout: Parallel) -> dict[str, Any]:
    """What waits in the passes, and what is found in a pass that waits in all ways."""
    from recipes.algorithms import objective
    from recipes.config import parse

    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = parse(compose("config", overrides=["recipe=demo", *options(ALGORITHM)])).algorithm
    drawn = [torch.randn(2, len(m.predict), generator=torch.Generator().manual_seed(0)) for m in micro_batches]
    micro_batches.add("advantages", [numbers[0] for numbers in drawn])
    micro_batches.add("reference", [numbers[1] - 5 for numbers in drawn])
    micro_batches.add("weights", [torch.ones_like(numbers[0]) for numbers in drawn])
    loss = objective.loss(config, layout.context_group)

    def waiting_loss(outputs: torch.Tensor, batch: MicroBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return loss(Waits.apply(outputs), batch)

    watch = Watch()
    run = forward_backward._run

    def watched_run(*args: Any, **kwargs: Any) -> Any:
        with watch:
            return run(*args, **kwargs)

    forward_backward._run = watched_run
    try:
        micro_batches.add("old", forward_backward.log_probs(model, micro_batches))
        metrics = forward_backward.accumulate_gradients(model, micro_batches, loss, entropies="trained")
        waits = sorted(set(watch.waits))
        watch.waits.clear()
        forward_backward.accumulate_gradients(model, micro_batches, waiting_loss, entropies="trained")
    finally:
        forward_backward._run = run
    return {"waits": waits, "seen": sorted({name.split()[0] for name in watch.waits}), "loss": metrics["loss"]}


def options(changes: dict[str, Any]) -> list[str]:
    return [f"algorithm.{name}={value}" for name, value in changes.items()]


class Waits(torch.autograd.Function):
    """The identity, which waits for the device in several ways, forward and backward."""

    @staticmethod
    def forward(ctx: Any, outputs: torch.Tensor) -> torch.Tensor:
        outputs.sum().item()
        outputs.tolist()
        outputs.nonzero()
        torch.tensor([1.0], device=outputs.device)
        torch.arange(3).add(1).to(outputs.device)
        return outputs.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        gradient.cpu()
        gradient[gradient > 0].sum()
        return gradient


SEEN = ["aten::_local_scalar_dense", "aten::index", "aten::nonzero", "cpu", "tensor", "to", "tolist"]
