"""Complete runs whose engines are on a node of their own, beside two of the trainer's, against colocated ones: the same
samples, metrics, answers and weights, bit for bit, in step, one step ahead and with updates in flight, also where all
engines die once.

The engines and the weight sync are those of ``apart_jobs``; the log-probs that an engine gives are of the weights that
it has, so that a response of other weights differs. One run has vLLM's engines and the real weight sync.
"""

import json
import pickle
from operator import itemgetter
from pathlib import Path
from typing import Any

import pytest

from recipes.run import records, sample_files
from tests.megatron_ext import ranks
from tests.recipes import tiny
from tests.recipes.apart_jobs import DIES, IN_FLIGHT_DIES, SYNCS
from tests.recipes.kill_check import timeless
from tests.recipes.one_rank import make_folder
from tests.recipes.test_loop import MIX, PROMPTS, SAMPLES, STEPS, configured

CORRECTED = ("algorithm.importance_sampling=token_truncated", "algorithm.max_mismatch=5")
IN_STEP = ("stage.evaluates=true", "algorithm.max_mismatch=1e-3")
AHEAD = ("rollout.staleness=1", *CORRECTED)
# What is carried over goes on at any engine, and all ranks hold it.
CARRIED = (*AHEAD, "rollout.oversample=1.5", "rollout.partial_rollout_tokens=3")
IN_FLIGHT = (*AHEAD, "rollout.in_flight_updates=true")
TWO_NODES = ("cluster.nodes=2", "cluster.ranks=2", "rollout.engines=2")
APART = (*TWO_NODES, "cluster.engine_nodes=1")
JOBS = {
    "in_step": (*TWO_NODES, *IN_STEP),
    "in_step_apart": (*APART, *IN_STEP),
    DIES: (*APART, *IN_STEP),
    "ahead": (*TWO_NODES, *AHEAD),
    "ahead_apart": (*APART, *AHEAD),
    "carried": (*TWO_NODES, *CARRIED),
    "carried_apart": (*APART, *CARRIED),
    "in_flight": (*TWO_NODES, *IN_FLIGHT),
    "in_flight_apart": (*APART, *IN_FLIGHT),
    IN_FLIGHT_DIES: (*APART, *IN_FLIGHT),
    "carried_in_flight": (*APART, *CARRIED, "rollout.in_flight_updates=true"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("apart")
    tiny.make(folder)
    configs = []
    for name, overrides in JOBS.items():
        make_folder(folder / name)
        configs.append(configured(folder, folder / name, MIX, *overrides))
    (folder / "configs.pickle").write_bytes(pickle.dumps(configs))
    ranks.run("tests.recipes.apart_jobs", folder)
    return folder


def samples(run_dir: Path) -> list[dict[str, Any]]:
    return sorted(sample_files.read(run_dir), key=itemgetter("step", "prompt_id", "sample_index"))


def same(one: Path, other: Path) -> None:
    assert len(samples(one)) == STEPS * PROMPTS * SAMPLES
    assert samples(one) == samples(other)
    metrics = [timeless(list(records.read_rows(run_dir / "metrics.jsonl"))) for run_dir in (one, other)]
    assert metrics[0] == metrics[1]
    weights = [(run_dir / "hf" / "model.safetensors").read_bytes() for run_dir in (one, other)]
    assert weights[0] == weights[1]


def restarts(run_dir: Path) -> list[str]:
    events = records.read_rows(run_dir / "events.jsonl")
    return sorted(event["engine"] for event in events if event["kind"] == "engine restart")


def answers(run_dir: Path) -> Any:
    return json.loads((run_dir / "answers.json").read_text())


def test_in_step_the_run_is_the_colocated_one(folder: Path) -> None:
    same(folder / "in_step", folder / "in_step_apart")
    assert answers(folder / "in_step") == answers(folder / "in_step_apart")
    assert answers(folder / "in_step")["after"]


def test_engines_that_all_die_are_started_again_on_their_node_and_change_no_bit(folder: Path) -> None:
    same(folder / "in_step", folder / DIES)
    assert restarts(folder / DIES) == ["engine_0", "engine_1"]
    assert restarts(folder / "in_step_apart") == []


@pytest.mark.parametrize("name", ["ahead", "carried"])
def test_one_step_ahead_the_run_is_the_colocated_one(folder: Path, name: str) -> None:
    same(folder / name, folder / f"{name}_apart")
    stale = [row["staleness/max"] for row in records.read_rows(folder / f"{name}_apart" / "metrics.jsonl")]
    assert stale[0] == 0 and max(stale) >= 1


def ages(run_dir: Path, name: str) -> list[float]:
    return [row[f"staleness/{name}"] for row in records.read_rows(run_dir / "metrics.jsonl")]


def versions(run_dir: Path) -> list[set[int]]:
    """By step: those of the samples' last tokens."""
    lines = samples(run_dir)
    return [{line["weight_version"] for line in lines if line["step"] == step} for step in range(1, STEPS + 1)]


def synced(run_dir: Path) -> list[int]:
    return [int(line) for line in (run_dir / SYNCS).read_text().split()]


def test_an_update_in_flight_changes_the_weights_in_the_middle_and_is_the_only_sync_of_its_step(folder: Path) -> None:
    same(folder / "in_flight", folder / "in_flight_apart")
    for name in ("in_flight", "in_flight_apart"):
        assert synced(folder / name) == [0, 1, 2, 3]
        assert versions(folder / name) == [{0}, {0, 1}, {1, 2}]
        assert ages(folder / name, "max") == [0, 1, 1]
        first, *others = ages(folder / name, "mean")
        assert first == 0 and all(0 < age < 1 for age in others)
    assert ages(folder / "ahead", "mean") == [0, 1, 1]
    assert synced(folder / "ahead") == [0, 0, 1, 3], "the last one at the end of the run"


def test_where_engines_have_died_an_update_waits_for_the_batch_and_a_sync_starts_them_again(folder: Path) -> None:
    run_dir = folder / IN_FLIGHT_DIES
    assert restarts(run_dir) == ["engine_0", "engine_1"]
    assert len(samples(run_dir)) == STEPS * PROMPTS * SAMPLES
    # What the engines had not finished is made by the weights of the sync that started them again.
    assert synced(run_dir) == [0, 1, 2, 3]
    assert versions(run_dir) == [{0}, {0, 1}, {1, 2}]


def test_partial_rollouts_go_on_in_flight(folder: Path) -> None:
    run_dir = folder / "carried_in_flight"
    assert len(samples(run_dir)) == STEPS * PROMPTS * SAMPLES
    assert synced(run_dir) == [0, 1, 2, 3]
    oldest, mean = ages(run_dir, "max"), ages(run_dir, "mean")
    assert all(0 <= age <= step and mean[step] <= age for step, age in enumerate(oldest))


REAL = ("stage.trains=[rl]", "stage.evaluates=false", "precision=fp32", "parallel=tp2_sp", "algorithm.steps=3")


def test_a_run_with_vllms_engines_is_the_colocated_one(folder: Path) -> None:
    for name, more in (("vllm", TWO_NODES[1:]), ("vllm_apart", APART)):
        tiny.complete(tiny.overrides(folder, folder / name, *REAL, *AHEAD, *more))
    same(folder / "vllm", folder / "vllm_apart")
