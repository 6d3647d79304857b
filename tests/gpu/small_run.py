"""A small recipe in the 72B recipe's ways: sleeping engines of several GPUs, offloaded states, every sync verified."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.recipes import tiny

# Eight key-value heads, as the 72B model has: one for each of eight tensor-parallel ranks.
MODEL = {"width": 256, "heads": 16, "kv_heads": 8}
LINKS = re.compile(r"^GB/s within a node: at least ([\d.]+); between nodes: \S+ ([\d.]+)$", re.MULTILINE)


def overrides(folder: Path, run_dir: Path, steps: int, *more: str) -> list[str]:
    """Of ``steps`` steps of RL, on the model and data that ``tiny.make`` has put into ``folder``."""
    return tiny.overrides(
        folder,
        run_dir,
        "stage=rl",
        "cluster=slurm_h100",
        "precision=bf16",
        "parallel.sequence=true",
        "rollout.sleep=true",
        "rollout.sync_verify_every=1",
        "rollout.kv_cache_gib=1.0",
        "optimizer.offload=true",
        "stage.evaluates=false",
        "checkpoint.every_steps=100",
        f"algorithm.steps={steps}",
        *more,
    )


def rows(run_dir: Path) -> list[dict[str, Any]]:
    file = run_dir / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def assert_sound(metrics: Sequence[dict[str, Any]], steps: int) -> None:
    """Each step once and in order. Before the first update the policy is the reference; syncs move bytes; trainer and
    engines differ by rounding (the run itself stops above ``algorithm.max_mismatch``)."""
    assert [row["step"] for row in metrics] == list(range(1, steps + 1))
    assert metrics[0]["kl/reference"] == 0
    assert metrics[-1]["kl/reference"] > 0
    for row in metrics:
        assert row["train_inference_mismatch/mean"] > 0 and row["grad_norm"] > 0 and row["sync/bytes"] > 0


def links(log: str) -> list[tuple[float, float]]:
    """GB/s within the nodes and between the two, of each start of a job: what ``recipes.node_check.links`` printed."""
    return [(float(within), float(between)) for within, between in LINKS.findall(log)]


def seconds(row: dict[str, Any]) -> dict[str, float]:
    """The phases of a step."""
    return {key: value for key, value in row.items() if key.startswith("time/")}
