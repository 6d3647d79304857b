"""A run that is resumed with other settings goes on with these, and with the moments and the place that it had."""

from pathlib import Path
from typing import Any

from megatron_ext import platform

platform.activate("cpu")

import pytest  # noqa: E402
import torch.distributed as dist  # noqa: E402
from transformers import LlamaConfig  # noqa: E402

from megatron_ext import checkpoint, model, optimizer, parallel  # noqa: E402
from megatron_ext.host_buffers import HostBuffers  # noqa: E402
from tests.settings import optimizer_config, parallel_config, precision_config, schedule_config  # noqa: E402

TINY = LlamaConfig(
    architectures=["LlamaForCausalLM"], hidden_size=64, intermediate_size=64, num_hidden_layers=1,
    num_attention_heads=2, vocab_size=64, tie_word_embeddings=False,
)  # fmt: skip
UPDATES = 3


def build(place: Any, steps: int, learning_rate: float, decay: str, **settings: Any) -> tuple[Any, Any, Any]:
    built = model.build(TINY, place, precision_config())
    schedule = schedule_config(learning_rate, min_lr_ratio=0.1, decay=decay)
    return built, *optimizer.build(built, optimizer_config(**settings), schedule, steps)


def hyperparameters(adam: Any) -> list[dict[str, Any]]:
    names = ("lr", "max_lr", "min_lr", "weight_decay", "betas", "eps")
    (part,) = adam.chained_optimizers
    return [{name: group[name] for name in names} for group in part.optimizer.param_groups]


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"steps": 20},
        {"learning_rate": 2e-4},
        {"decay": "linear"},
        {"betas": [0.5, 0.9]},
        {"epsilon": 1e-6},
        {"weight_decay": 0.3},
    ],
    ids=lambda changed: "-".join(changed) or "nothing",
)
def test_the_present_settings_hold_after_resuming(changed: dict[str, Any], tmp_path: Path) -> None:
    """They are those of a run that made as many updates with them from the beginning."""
    began_with = {
        "steps": 10,
        "learning_rate": 1e-3,
        "decay": "cosine",
        "betas": [0.9, 0.95],
        "epsilon": 1e-8,
        "weight_decay": 0.1,
    }
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        place = parallel.initialize(parallel_config(), seed=1, timeout_seconds=60)
        saved, adam, schedule = build(place, **began_with)
        schedule.step(UPDATES)
        saver = checkpoint.Saver(tmp_path, keep=2)
        saver.save(UPDATES, {checkpoint.POLICY: checkpoint.snapshot(saved, adam, schedule, HostBuffers())}, {})
        saver.wait()

        resumed, adam, schedule = build(place, **began_with | changed)
        newest = checkpoint.latest(tmp_path)
        assert newest is not None
        checkpoint.load(newest, resumed, adam, schedule)
        _, expected, of_expected = build(place, **began_with | changed)
        of_expected.step(UPDATES)
        assert hyperparameters(adam) == hyperparameters(expected)
        assert len({group["lr"] for group in hyperparameters(adam)}) == 1
        assert hyperparameters(adam)[0]["lr"] < hyperparameters(adam)[0]["max_lr"]
    finally:
        parallel.destroy()
