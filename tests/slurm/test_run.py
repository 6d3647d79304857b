"""A whole run by slurm/train.sh on two nodes of a real Slurm, a rank and an engine on each node."""

import subprocess
from pathlib import Path

from tests.recipes import tiny
from tests.recipes.test_two_nodes import without_times
from tests.slurm.cluster import Cluster

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = ("stage.trains=[rl]", "parallel=tp2_sp", "rollout.engines=2", "algorithm.steps=1")
SECONDS = 300


def test_a_run_on_two_nodes_of_slurm_is_a_plain_launch(slurm: Cluster, tmp_path: Path) -> None:
    """Metrics, samples and evaluation to the last bit, and no process is left on the nodes."""
    tiny.make(tmp_path)
    log, marker = tmp_path / "job.log", f"TESTS_MARKER={tmp_path}"
    options = ["--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", f"--output={log}"]
    done = subprocess.run(
        ["sbatch", "--parsable", *options, "slurm/train.sh", *tiny.overrides(tmp_path, tmp_path / "job", *OPTIONS)],
        cwd=ROOT,
        env=slurm.environment | dict([marker.split("=")]),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert slurm.wait_for_end(done.stdout.strip(), SECONDS) == ("COMPLETED", "0:0"), log.read_text()[-4000:]
    assert slurm.processes_with(marker) == {}
    assert "every check holds" in log.read_text(), "the preflight came first"

    plain = tmp_path / "plain"
    tiny.complete(tiny.overrides(tmp_path, plain, *OPTIONS, "cluster.ranks=2"))
    assert without_times(tmp_path / "job") == without_times(plain)
    for name in ("samples.jsonl", "answers.json"):
        assert (tmp_path / "job" / name).read_bytes() == (plain / name).read_bytes()
