"""A batch as two trainer ranks see it: aligned verdicts, a loss of all engines, failures. The engines are fakes."""

import gc
import json
import threading
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from megatron_ext.batch import concatenate
from megatron_ext.routing import everywhere
from rollout.engine import EngineDied
from rollout.generation import Fleet, Generation
from rollout.prompt_buffer import PromptBuffer, Rollout
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


def written(key, count):
    """The first ``count`` tokens of a response that goes over several rounds."""
    return [(int(key[0][1:]) + 7 * key[1] + place) % 97 for place in range(count)]


def length_of(key):
    return 1 + (3 * int(key[0][1:]) + key[1]) % 7


class InRounds:
    """Goes on from what any node's engine has written."""

    alive = True

    def generate(self, requests, sampling, num_complete=None):
        for i, key in enumerate(requests.keys):
            begun = int(requests.response_lengths[i])
            assert requests.response_tokens[requests.tokens_of(i)].tolist() == written(key, begun)
            end = min(begun + sampling.round_tokens, length_of(key))
            reason = "stop" if end == length_of(key) else "unfinished"
            tokens = written(key, end)[begun:]
            yield answer(requests, i, tokens, logprob=-0.5, finish_reason=reason, version=0)


def partial_rollouts_on_two_nodes():
    """Three steps of two prompts, of four in flight; the responses have 1 to 7 tokens, 2 in a round."""

    def draw(i):
        return [SimpleNamespace(prompt=make_prompt(f"p{2 * i + j}", [1] * (1 + i)), vision=None) for j in range(2)]

    sampling = Sampling(max_tokens=8, stop_token_ids=(2,), round_tokens=2)
    buffer = PromptBuffer(draw, sampling, prompts_per_step=2, oversample=2, samples_per_prompt=2, seed=1)
    rollout = Rollout(buffer, Fleet([InRounds()], node=dist.get_rank(), nodes=2), dist.group.WORLD)
    steps = []
    for step in range(3):
        rollout.start(step)
        steps.append(rollout.collect(None))
    progress, left_over = buffer.state()
    places = [progress, plain(left_over) == plain(everywhere(left_over, dist.group.WORLD)), len(left_over)]
    return concatenate([replace(batch, vision=None) for batch in steps]), places


CASES = (
    judged_early,
    all_lost_once,
    all_lost_for_ever,
    judge_raises,
    on_two_nodes,
    two_complete_on_two_nodes,
    partial_rollouts_on_two_nodes,
)


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


def test_partial_rollouts_go_on_at_any_node_and_a_checkpoint_has_all_their_tokens(ranks):
    first, second = (outcomes["partial_rollouts_on_two_nodes"] for outcomes in ranks)
    assert first["responses"] == second["responses"] and len(first["responses"]) == 3 * 2 * 2
    for response in first["responses"]:
        key = (response["prompt_id"], response["sample_index"])
        assert response["tokens"] == written(key, length_of(key))
    assert first["more"] == second["more"]
    ((_, all_held, left_over),) = first["more"]
    assert all_held and left_over


def test_nodes_share_the_number_of_complete_prompts(ranks):
    shares = [outcomes["two_complete_on_two_nodes"]["more"][0] for outcomes in ranks]
    assert shares == [[1], [1]]


def test_no_thread_of_the_groups_outlives_them_after_failures_too(ranks):
    """Nothing but reference cycles holds the group."""
    for outcomes in ranks:
        assert outcomes["threads"]
        assert not [name for name in outcomes["threads"] if "gloo" in name]
