"""A whole run on two nodes, each with a rank and an engine, is the run on one node with two of each."""

import subprocess
import sys
from pathlib import Path
from typing import Any

from recipes import records
from tests.recipes import tiny
from tests.rollout import two_hosts

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = ("stage.trains=[rl]", "parallel=tp2_sp", "cluster.ranks=2", "rollout.engines=2", "algorithm.steps=2")


def without_times(folder: Path) -> list[dict[str, Any]]:
    timed = ("time/", records.TOKENS_PER_SECOND)
    rows = records.read_rows(folder / "metrics.jsonl")
    return [{name: value for name, value in row.items() if not name.startswith(timed)} for row in rows]


def test_a_run_on_two_nodes_is_that_on_one(tmp_path: Path) -> None:
    """The ranks are one tensor-parallel group across the nodes. Metrics, samples and evaluation are equal to the last
    bit: a prompt is with the same engine in the same batch, and the weights that crossed the network are the same."""
    tiny.make(tmp_path)
    both, one = tmp_path / "two-nodes", tmp_path / "one-node"
    arguments = tiny.overrides(tmp_path, both, *OPTIONS)
    prepare = [sys.executable, "-m", "recipes.prepare", *arguments]
    torchrun = [
        sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1",
        f"--master-addr={two_hosts.ADDRESS_A}", "--master-port=29512",
    ]  # fmt: skip
    node = [[*torchrun, f"--node-rank={i}", "-m", "recipes.train", *arguments] for i in range(2)]
    subprocess.run(prepare, cwd=ROOT, check=True)
    done = two_hosts.run([node[0]], [node[1]])
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    tiny.complete(tiny.overrides(tmp_path, one, *OPTIONS))

    assert without_times(both) == without_times(one)
    for name in ("samples.jsonl", "answers.json"):
        assert (both / name).read_bytes() == (one / name).read_bytes()
    logs = {path.name for path in (both / "logs").iterdir()}
    assert {"engine_0.log", "engine_1.log", "rank_0.log", "rank_1.log"} <= logs
