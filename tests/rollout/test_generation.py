"""A batch as two trainer ranks see it: aligned verdicts, a loss of all engines, failures. The engines are fakes."""

import gc
import json
import threading
from dataclasses import asdict
from pathlib import Path

import pytest
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from megatron_ext.routing import everywhere
from rollout.engine import EngineDied
from rollout.generation import Fleet, Generation
from rollout.sampler import make_requests, request_seed
from rollout.sampling import Sampling
from tests.responses import PlainResponse, answer, make_prompt, plain

SAMPLING = Sampling(max_tokens=4, stop_token_ids=(2,))
REQUESTS = make_requests([make_prompt(f"p{i}", [i, i + 1]) for i in range(3)], 2, seed=1, step=2)


class Engine:
    """Answers the last request first; dies in the batches that ``deaths`` names, after so many responses."""

    def __init__(self, deaths=None, gate=None):
        self.deaths = deaths or {}
        self.gate = gate
        self.alive = True
        self.batches = 0

    def generate(self, requests, sampling, num_complete=None):
        self.batches += 1
        dies_after = self.deaths.get(self.batches)
        for count, i in enumerate(reversed(range(len(requests)))):
            if count == dies_after:
                self.alive = False
                raise EngineDied(f"gone in batch {self.batches}")
            if self.gate is not None and i == 0:
                assert self.gate.wait(120), "no response was judged before the batch's end"
            token = int(requests.seeds[i]) % 7
            yield answer(requests, i, [token], logprob=-0.5, finish_reason="stop", version=0)


def on_rank_zero(*engines):
    return engines if dist.get_rank() == 0 else ()


def verdict(response):
    (one,) = plain(response)
    return verdict_on(one.key, one.tokens)


def verdict_on(key, tokens):
    return {"of": list(key), "token": tokens[0]}


def on_two_nodes():
    """Each rank has the engines of a node: the first one's dies once, and all ranks resync."""
    engine = Engine({1: 0} if dist.get_rank() == 0 else None)
    syncs = []

    def resync():
        syncs.append(1)
        dist.barrier()
        engine.alive = True

    fleet = Fleet([engine], node=dist.get_rank(), nodes=2)
    batch = Generation(fleet, REQUESTS, SAMPLING, verdict).collect(dist.group.WORLD, resync)
    return batch, len(syncs), engine.batches


def two_complete_on_two_nodes():
    """Two of three prompts: one from each node."""
    asked = []

    class Asked(Engine):
        def generate(self, requests, sampling, num_complete=None):
            asked.append(num_complete)
            yield from super().generate(requests, sampling)

    fleet = Fleet([Asked()], node=dist.get_rank(), nodes=2)
    batch = Generation(fleet, REQUESTS, SAMPLING, None, num_complete=2).collect(dist.group.WORLD, None)
    return batch, asked


def judged_early():
    """The last response comes only when the first has been judged."""
    gate = threading.Event()

    def judge(response):
        gate.set()
        return verdict(response)

    generation = Generation(Fleet(on_rank_zero(Engine(gate=gate))), REQUESTS, SAMPLING, judge)
    return (generation.collect(dist.group.WORLD, None),)


def all_lost_once():
    """Both engines die; the ranks sync, and only what is missing is made again."""
    engines = [Engine({1: 1}), Engine({1: 0})]
    syncs = []

    def resync():
        syncs.append(1)
        dist.barrier()
        for engine in engines:
            engine.alive = True

    generation = Generation(Fleet(on_rank_zero(*engines)), REQUESTS, SAMPLING, verdict)
    return generation.collect(dist.group.WORLD, resync), len(syncs)


def all_lost_for_ever():
    engine = Engine({1: 1, 2: 1, 3: 0})

    def resync():
        engine.alive = True

    Generation(Fleet(on_rank_zero(engine)), REQUESTS, SAMPLING).collect(dist.group.WORLD, resync)


def judge_raises():
    def judge(response):
        raise ValueError(f"no verdict on {response.prompt(0).prompt_id}")

    Generation(Fleet(on_rank_zero(Engine())), REQUESTS, SAMPLING, judge).collect(dist.group.WORLD, None)


CASES = (judged_early, all_lost_once, all_lost_for_ever, judge_raises, on_two_nodes, two_complete_on_two_nodes)


def outcome(case):
    """What a rank gets, as JSON; of an exception its text."""
    try:
        batch, *more = case()
    except Exception as error:
        return {"error": str(error), "type": type(error).__name__}
    whole = everywhere(batch, dist.group.WORLD)
    responses = [asdict(response) for response in plain(whole)]
    return {"responses": responses, "more": more, "held": batch.held.tolist()}


def run_rank(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    outcomes = {case.__name__: outcome(case) for case in CASES}
    dist.destroy_process_group()
    gc.collect()  # frames of the failures' exceptions hold the group; its threads may abort a process at its end
    outcomes["threads"] = sorted(task.read_text().strip() for task in Path("/proc/self/task").glob("*/comm"))
    Path(folder, f"{rank}.json").write_text(json.dumps(outcomes))


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("generation")
    multiprocessing.spawn(run_rank, (str(folder),), nprocs=2)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def expected():
    """The responses to REQUESTS with their verdicts, from what identifies each."""
    responses = []
    for n in range(3):
        for index in range(2):
            key = (f"p{n}", index)
            tokens = [request_seed(1, 2, *key) % 7]
            response = PlainResponse(*key, [n, n + 1], tokens, [-0.5], [], [0], "stop", "", verdict_on(key, tokens))
            responses.append(asdict(response))
    return responses


def test_verdicts_come_aligned_on_every_rank_and_begin_before_the_last_response(ranks):
    for outcomes in ranks:
        assert outcomes["judged_early"]["responses"] == expected()


def test_when_all_engines_die_all_ranks_sync_and_the_rest_is_made(ranks):
    for outcomes in ranks:
        assert outcomes["all_lost_once"]["responses"] == expected()
        assert outcomes["all_lost_once"]["more"] == [1]


def test_engines_that_die_again_without_a_response_end_the_run_on_every_rank(ranks):
    first, second = (outcomes["all_lost_for_ever"] for outcomes in ranks)
    assert first == {"error": "gone in batch 3", "type": "EngineDied"}
    assert second == {"error": "rank 0: EngineDied: gone in batch 3", "type": "RuntimeError"}


def test_a_verifier_that_raises_ends_the_run_on_every_rank(ranks):
    first, second = (outcomes["judge_raises"] for outcomes in ranks)
    assert first["type"] == "ValueError" and "no verdict on p" in first["error"]
    assert second["type"] == "RuntimeError" and second["error"] == f"rank 0: ValueError: {first['error']}"


def test_two_nodes_make_a_batch_together(ranks):
    """Their shares are those of ``assign``; both have all responses in the order of the requests."""
    first, second = (outcomes["on_two_nodes"] for outcomes in ranks)
    assert first["responses"] == second["responses"] == expected()
    assert first["more"] == [1, 2] and second["more"] == [1, 1], "only the one that lost its engine asks again"


def test_tokens_stay_where_they_were_made(ranks):
    first, second = (outcomes["on_two_nodes"]["held"] for outcomes in ranks)
    assert any(first) and [not held for held in first] == second
    assert [outcomes["judged_early"]["held"] for outcomes in ranks] == [[True] * 6, [False] * 6]


def test_nodes_share_the_number_of_complete_prompts(ranks):
    shares = [outcomes["two_complete_on_two_nodes"]["more"][0] for outcomes in ranks]
    assert shares == [[1], [1]]


def test_no_thread_of_the_groups_outlives_them_after_failures_too(ranks):
    """Nothing but reference cycles holds the group."""
    for outcomes in ranks:
        assert outcomes["threads"]
        assert not [name for name in outcomes["threads"] if "gloo" in name]
