"""A job with fake engines on nodes of their own (``engine_node_job``): who sees whom, who makes which response and who
gets it, and how the processes of the engines' nodes end."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from recipes.config import parse
from recipes.errors import ConfigError
from recipes.train import check_processes
from rollout import sampler
from tests.megatron_ext import ranks
from tests.recipes.engine_node_job import BYTES, GONE, NODES, PER_NODE, SIZE, TRAINERS, tokens_of
from tests.recipes.test_config import composed, overridden


def run_job(folder: Path) -> list[dict[str, Any]]:
    ranks.run("tests.recipes.engine_node_job", folder)
    return [json.loads((folder / f"{number}.json").read_text()) for number in range(SIZE)]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_job(tmp_path_factory.mktemp("job"))


def test_the_trainers_collectives_count_the_trainers_ranks_alone(job: list[dict[str, Any]]) -> None:
    assert [outcome["world"] for outcome in job] == [TRAINERS] * TRAINERS + [NODES * PER_NODE] * (NODES * PER_NODE)
    for outcome in job[:TRAINERS]:
        assert outcome["sum"] == 0 + 1 + 2 + 3 and outcome["data_ranks"] == [0, 0, 1, 1]


def expected(version_of: Any) -> list[dict[str, Any]]:
    """The responses to REQUESTS, from what identifies each, and the version that made it."""
    responses = []
    for prompt in range(5):
        for index in range(2):
            seed = sampler.request_seed(1, 2, f"p{prompt}", index)
            tokens = tokens_of(seed, version_of(prompt))
            responses.append({"prompt_id": f"p{prompt}", "sample_index": index, "prompt": [prompt] * (1 + prompt)})
            responses[-1] |= {
                "tokens": tokens,
                "logprobs": [-0.5] * 2,
                "forced": [],
                "finish_reason": "stop",
                "failure": "",
            }
            responses[-1] |= {"versions": [version_of(prompt)] * 2}
            responses[-1] |= {"verdicts": {"of": [f"p{prompt}", index], "tokens": tokens}}
    return responses


def node_of(prompt: int) -> int:
    """Costliest first to the emptier node: the costs are 13, 12, 11, 10 and 9 tokens."""
    return {4: 0, 3: 1, 2: 1, 1: 0, 0: 0}[prompt]


def test_two_ranks_of_the_trainer_hold_what_the_engines_nodes_made_and_all_know_it(job: list[dict[str, Any]]) -> None:
    responses = expected(lambda prompt: 3)
    for rank, outcome in enumerate(job[:TRAINERS]):
        assert outcome["first"]["keys"] == [[r["prompt_id"], r["sample_index"]] for r in responses]
        assert outcome["first"]["verdicts"] == [r["verdicts"] for r in responses]
        node = {0: 0, 2: 1}.get(rank)
        assert outcome["first"]["held"] == [r for r in responses if node_of(int(r["prompt_id"][1:])) == node]
        assert outcome["placed"] == BYTES


def test_an_engine_that_dies_is_started_again_and_makes_what_is_missing(job: list[dict[str, Any]]) -> None:
    held = [response for outcome in job[:TRAINERS] for response in outcome["second"]["held"]]
    versions = {(r["prompt_id"], r["sample_index"]): r["versions"][0] for r in held}
    of_node_0 = [(f"p{i}", index) for i in (0, 1, 4) for index in (0, 1)]
    assert [versions[key] for key in of_node_0] == [3, 4, 4, 4, 4, 4], "one response was made before its engine died"
    assert all(version == 3 for key, version in versions.items() if key not in of_node_0) and len(versions) == 10
    assert [outcome["restarts"] for outcome in job[TRAINERS:]] == [["engine_0"], [], [], []]
    assert [outcome["attached"] for outcome in job[TRAINERS:]] == [1, 1, 1, 1], "a restarted engine has a new plan"


def test_verdicts_and_counts_come_from_the_engines_nodes(job: list[dict[str, Any]]) -> None:
    for outcome in job[:TRAINERS]:
        assert outcome["counts"] == {"servers/of 0": 1, "servers/of 1": 1}
        assert outcome["held_out"] == [["p0", 0, {"held out": 1}], ["p1", 0, {"held out": 0}]]
        assert outcome["held_out_held"] == [True, True]


def test_a_process_of_an_engines_node_waits_for_an_order_beyond_any_timeout_and_the_trainer_waits_for_its_end(
    job: list[dict[str, Any]],
) -> None:
    assert [outcome["late"] for outcome in job[TRAINERS:]] == ["end"] * (NODES * PER_NODE)
    last_ready = max(outcome["ready"] for outcome in job[TRAINERS:])
    assert all(outcome["ended"] >= last_ready for outcome in job)


def test_a_process_of_an_engines_node_ends_when_it_is_told_or_the_trainer_is_gone(
    job: list[dict[str, Any]], tmp_path: Path
) -> None:
    assert not any("error" in outcome for outcome in job)
    (tmp_path / GONE).mkdir()
    alone = run_job(tmp_path / GONE)
    assert all("onnection" in outcome["error"] for outcome in alone[TRAINERS:])


def test_a_job_of_other_nodes_or_of_one_machine_with_gpus_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ranks.ROOT)
    sizes = ["cluster.nodes=2", "cluster.engine_nodes=1", "cluster.ranks=4"]
    config = parse(overridden(composed("recipe=demo"), sizes))
    on_gpus = replace(config, cluster=replace(config.cluster, platform="cuda"))
    monkeypatch.delenv("RANK", raising=False)
    check_processes(config)
    with pytest.raises(ConfigError, match=r"cluster\.engine_nodes=1: on GPUs .* start the job with sbatch"):
        check_processes(on_gpus)
    sizes_and_places = {
        "WORLD_SIZE": "6",
        "GROUP_WORLD_SIZE": "3",
        "LOCAL_WORLD_SIZE": "2",
        "RANK": "5",
        "GROUP_RANK": "2",
    }
    for name, value in sizes_and_places.items():
        monkeypatch.setenv(name, value)
    check_processes(config)
    check_processes(on_gpus)
    monkeypatch.setenv("GROUP_RANK", "0")
    with pytest.raises(ConfigError, match=r"engine_nodes=1: rank 5 is on node 0, .* use srun --distribution=block"):
        check_processes(config)
    monkeypatch.setenv("GROUP_RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"cluster\.engine_nodes=1.* are 6 processes on 3 nodes, the job has 4 on 2;"):
        check_processes(config)
