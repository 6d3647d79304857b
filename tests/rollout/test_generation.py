"""A batch as two trainer ranks see it: aligned verdicts, a loss of all engines, failures. The engines are fakes."""

import gc
import json
import threading
from pathlib import Path

import pytest
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from rollout.engine import EngineDied
from rollout.generation import Fleet, Generation
from rollout.sample import Prompt, Sample, Sampling
from rollout.sampler import make_requests

SAMPLING = Sampling(max_tokens=4, stop_token_ids=(2,))
REQUESTS = make_requests([Prompt(f"p{i}", (i, i + 1)) for i in range(3)], 2, seed=1, step=2)


class Engine:
    """Answers the last request first; dies in the batches that ``deaths`` names, after so many samples."""

    def __init__(self, deaths=None, gate=None):
        self.deaths, self.gate, self.alive, self.batches = deaths or {}, gate, True, 0

    def generate(self, requests, sampling, enough=None):
        self.batches += 1
        dies_after = self.deaths.get(self.batches)
        for i, r in enumerate(reversed(requests)):
            if i == dies_after:
                self.alive = False
                raise EngineDied(f"gone in batch {self.batches}")
            if self.gate is not None and i == len(requests) - 1:
                assert self.gate.wait(120), "no sample was judged before the batch's end"
            yield Sample(r.prompt_id, r.sample_index, r.prompt_token_ids, (r.seed % 7,), (-0.1,), "stop", (0,))


def on_rank_zero(*engines):
    return engines if dist.get_rank() == 0 else ()


def verdict(sample):
    return {"of": [sample.prompt_id, sample.sample_index], "token": sample.response_token_ids[0]}


def on_two_nodes():
    """Each rank has the engines of a node: the first one's dies once, and all ranks resync."""
    engine, syncs = Engine({1: 0} if dist.get_rank() == 0 else None), []

    def resync():
        syncs.append(1)
        dist.barrier()
        engine.alive = True

    fleet = Fleet([engine], node=dist.get_rank(), nodes=2)
    samples, results = Generation(fleet, REQUESTS, SAMPLING, verdict).collect(dist.group.WORLD, resync)
    return samples, results, len(syncs), engine.batches


def enough_on_two_nodes():
    """Two of three prompts: one from each node."""
    asked = []

    class Asked(Engine):
        def generate(self, requests, sampling, enough=None):
            asked.append(enough)
            yield from super().generate(requests, sampling)

    fleet = Fleet([Asked()], node=dist.get_rank(), nodes=2)
    samples, results = Generation(fleet, REQUESTS, SAMPLING, None, enough=2).collect(dist.group.WORLD, None)
    return samples, results, asked


def judged_early():
    """The last sample comes only when the first has been judged."""
    gate = threading.Event()

    def judge(sample):
        gate.set()
        return verdict(sample)

    return Generation(Fleet(on_rank_zero(Engine(gate=gate))), REQUESTS, SAMPLING, judge).collect(dist.group.WORLD, None)


def all_lost_once():
    """Both engines die; the ranks sync, and only what is missing is made again."""
    engines, syncs = [Engine({1: 1}), Engine({1: 0})], []

    def resync():
        syncs.append(1)
        dist.barrier()
        for engine in engines:
            engine.alive = True

    samples, results = Generation(Fleet(on_rank_zero(*engines)), REQUESTS, SAMPLING, verdict).collect(
        dist.group.WORLD, resync
    )
    return samples, results, len(syncs)


def all_lost_for_ever():
    engine = Engine({1: 1, 2: 1, 3: 0})

    def resync():
        engine.alive = True

    Generation(Fleet(on_rank_zero(engine)), REQUESTS, SAMPLING).collect(dist.group.WORLD, resync)


def judge_raises():
    def judge(sample):
        raise ValueError(f"no verdict on {sample.prompt_id}")

    Generation(Fleet(on_rank_zero(Engine())), REQUESTS, SAMPLING, judge).collect(dist.group.WORLD, None)


CASES = (judged_early, all_lost_once, all_lost_for_ever, judge_raises, on_two_nodes, enough_on_two_nodes)


def outcome(case):
    """What a rank gets, as JSON; of an exception its text."""
    try:
        found = case()
    except Exception as error:
        return {"error": str(error), "type": type(error).__name__}
    samples, results, *more = found
    return {"samples": [sample.to_json() for sample in samples], "results": results, "more": more}


def run_rank(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found = {case.__name__: outcome(case) for case in CASES}
    dist.destroy_process_group()
    gc.collect()  # frames of the failures' exceptions hold the group; its threads may abort a process at its end
    found["threads"] = sorted(task.read_text().strip() for task in Path("/proc/self/task").glob("*/comm"))
    Path(folder, f"{rank}.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("generation")
    multiprocessing.spawn(run_rank, (str(folder),), nprocs=2)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def expected():
    samples = [
        Sample(r.prompt_id, r.sample_index, r.prompt_token_ids, (r.seed % 7,), (-0.1,), "stop", (0,)) for r in REQUESTS
    ]
    return json.loads(json.dumps([[s.to_json() for s in samples], [verdict(s) for s in samples]]))


def test_verdicts_come_aligned_on_every_rank_and_begin_before_the_last_sample(ranks):
    for found in ranks:
        assert [found["judged_early"]["samples"], found["judged_early"]["results"]] == expected()


def test_when_all_engines_die_all_ranks_sync_and_the_rest_is_made(ranks):
    for found in ranks:
        assert [found["all_lost_once"]["samples"], found["all_lost_once"]["results"]] == expected()
        assert found["all_lost_once"]["more"] == [1]


def test_engines_that_die_again_without_a_sample_end_the_run_on_every_rank(ranks):
    first, second = (found["all_lost_for_ever"] for found in ranks)
    assert first == {"error": "gone in batch 3", "type": "EngineDied"}
    assert second == {"error": "rank 0: EngineDied: gone in batch 3", "type": "RuntimeError"}


def test_a_verifier_that_raises_ends_the_run_on_every_rank(ranks):
    first, second = (found["judge_raises"] for found in ranks)
    assert first["type"] == "ValueError" and "no verdict on p" in first["error"]
    assert second["type"] == "RuntimeError" and second["error"] == f"rank 0: ValueError: {first['error']}"


def test_two_nodes_make_a_batch_together(ranks):
    """Their shares are those of ``assign``; both have all samples in the order of the requests."""
    first, second = (rank["on_two_nodes"] for rank in ranks)
    assert first["samples"] == second["samples"] == ranks[0]["all_lost_once"]["samples"]
    assert first["results"] == second["results"] == ranks[0]["all_lost_once"]["results"]
    assert first["more"] == [1, 2] and second["more"] == [1, 1], "only the one that lost its engine asks again"


def test_nodes_share_what_is_enough(ranks):
    shares = [rank["enough_on_two_nodes"]["more"][0] for rank in ranks]
    assert sorted(shares) == [[1], [1]]


def test_no_thread_of_the_groups_outlives_them_behind_failures_too(ranks):
    """Nothing but reference cycles holds the group."""
    for found in ranks:
        assert found["threads"]
        assert not [name for name in found["threads"] if "gloo" in name]
