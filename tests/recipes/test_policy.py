"""Updates that are not finite are left out, counted and, too many in a row, end the run."""

import math
from typing import Any

import pytest

from recipes.training.policy import UpdateGuard


class FakeOptimizer:
    """In the place of Megatron-Core's optimiser: its gradient norms are given, and it remembers its updates."""

    def __init__(self, *norms: float) -> None:
        self.norms = list(norms)
        self.updates = 0

    def zero_grad(self) -> None:
        pass

    def prepare_grads(self) -> bool:
        return False

    def get_grad_norm(self) -> float:
        return self.norms.pop(0)

    def step(self, *arguments: Any, **keywords: Any) -> tuple[bool, float, None]:
        self.updates += 1
        return True, 1.0, None


class FakeSchedule:
    def step(self, increment: int) -> None:
        pass


def guard(max_skipped: int) -> tuple[UpdateGuard, list[str]]:
    lines: list[str] = []
    return UpdateGuard(max_skipped, lines.append, lambda kind, **details: lines.append(f"{kind} {details}")), lines


def apply(guarded: UpdateGuard, optimizer: FakeOptimizer, loss: float, model: str = "policy") -> bool:
    return guarded.apply(optimizer, FakeSchedule(), {"loss": loss}, model)  # type: ignore[arg-type]


def test_an_update_without_a_finite_loss_is_skipped_and_counted() -> None:
    guarded, lines = guard(3)
    optimizer = FakeOptimizer(0.5)
    assert apply(guarded, optimizer, 1.0)
    assert not apply(guarded, optimizer, math.nan)
    assert optimizer.updates == 1
    assert guarded.take_skipped() == 1 and guarded.take_skipped() == 0
    assert lines[0].startswith("update of the policy skipped (loss nan") and "skipped update" in lines[1]


def test_an_update_resets_the_count_in_a_row_of_its_model_only() -> None:
    guarded, _ = guard(3)
    for model in ("policy", "critic", "policy"):
        assert not apply(guarded, FakeOptimizer(), math.inf, model)
    assert apply(guarded, FakeOptimizer(0.5), 1.0, "critic")
    assert guarded.in_a_row == {"policy": 2, "critic": 0}


def test_too_many_skipped_updates_in_a_row_end_the_run_with_the_setting_and_the_remedy() -> None:
    guarded, _ = guard(2)
    assert not apply(guarded, FakeOptimizer(), math.nan)
    with pytest.raises(RuntimeError, match=r"2 updates in a row were skipped, optimizer\.max_skipped=2; .* Lower the"):
        apply(guarded, FakeOptimizer(), math.nan)
