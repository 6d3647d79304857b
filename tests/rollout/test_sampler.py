"""Order, seeds and spreading of samples, with engines that answer in an order of their own."""

import json
import random

import pytest

from rollout.engine import EngineDied, EngineError
from rollout.sample import Prompt, Request, Sample, Sampling
from rollout.sampler import assign, generate, make_requests, request_seed

SAMPLING = Sampling(max_tokens=4, stop_token_ids=(2,))
PROMPTS = [Prompt(f"p{i}", (i, i + 1)) for i in range(5)]


class BackwardsEngine:
    """Answers the last request first; remembers what it was asked. It dies or refuses after some answers."""

    def __init__(self, dies_after=None, refuses_after=None):
        self.batches, self.alive = [], True
        self.dies_after, self.refuses_after = dies_after, refuses_after

    def generate(self, requests, sampling, enough=None):
        self.batches.append(list(requests))
        for i, r in enumerate(reversed(requests)):
            if i == self.dies_after:
                self.alive = False
                raise EngineDied("gone")
            if i == self.refuses_after:
                raise EngineError("stale")
            yield Sample(r.prompt_id, r.sample_index, r.prompt_token_ids, (r.seed % 7,), (-0.1,), "stop", (3,))


def ask(engines, **changes):
    return generate(engines, PROMPTS, SAMPLING, **{"samples_per_prompt": 3, "seed": 1, "step": 2} | changes)


def test_samples_come_by_prompt_and_index_whatever_the_engines_do():
    engines = [BackwardsEngine(), BackwardsEngine()]
    samples = ask(engines)
    assert [(s.prompt_id, s.sample_index) for s in samples] == [(f"p{i}", j) for i in range(5) for j in range(3)]
    assert [len(batch) for engine in engines for batch in engine.batches] == [9, 6]
    assert samples == ask([BackwardsEngine()]) == ask([BackwardsEngine() for _ in range(20)])


def test_seeds_depend_on_all_four_parts_and_on_nothing_else():
    parts = [(s, step, p, i) for s in (0, 1) for step in (0, 1) for p in ("a", "b") for i in (0, 1)]
    seeds = {request_seed(*part) for part in parts}
    assert len(seeds) == 16 and all(0 <= seed < 2**63 for seed in seeds)
    assert request_seed(0, 1, "a", 1) == 0xBD6849E519AD08B1 >> 1  # `printf 0/1/1/a | b2sum -l 64`


def test_an_engine_that_refuses_ends_the_batch():
    with pytest.raises(EngineError, match="stale"):
        ask([BackwardsEngine(), BackwardsEngine(refuses_after=2)])


def test_what_a_dead_engine_left_is_made_by_the_others_after_their_own():
    undisturbed = ask([BackwardsEngine(), BackwardsEngine(), BackwardsEngine()])
    engines = [BackwardsEngine(), BackwardsEngine(dies_after=1), BackwardsEngine(dies_after=2)]
    assert ask(engines) == undisturbed
    first, second = engines[0].batches[0], [r.key for r in engines[0].batches[1]]
    missing = [r.key for r in engines[1].batches[0][:-1]] + [r.key for r in engines[2].batches[0][:-2]]
    assert len(first) == 6 and sorted(second) == sorted(missing)
    again = [BackwardsEngine(dies_after=0), BackwardsEngine(dies_after=2)]
    with pytest.raises(EngineDied, match="gone"):
        ask(again)
    with pytest.raises(EngineDied, match="none of the 2 engines is alive"):
        ask(again)
    assert [len(engine.batches) for engine in again] == [1, 1]


def longest_first(costs, parts):
    """Loads when each cost in falling order goes to the part that has least."""
    loads = [0] * parts
    for cost in sorted(costs, reverse=True):
        loads.sort()
        loads[0] += cost
    return sorted(loads)


def test_prompts_go_whole_to_the_least_loaded_engine_longest_first():
    draw = random.Random(0)
    for _ in range(50):
        lengths = [draw.randint(1, 60) for _ in range(draw.randint(1, 12))]
        prompts = [Prompt(f"p{i}", (1,) * n) for i, n in enumerate(lengths)]
        requests = make_requests(prompts, 3, 0, 0)
        draw.shuffle(requests)
        count = draw.randint(1, 5)
        parts = assign(requests, count, SAMPLING)
        assert parts == assign(requests, count, SAMPLING)
        assert [[r for r in requests if r in part] for part in parts] == parts
        homes = [{i for i, part in enumerate(parts) for r in part if r.prompt_id == p.prompt_id} for p in prompts]
        assert all(len(home) == 1 for home in homes)
        costs = [n + 3 * SAMPLING.max_tokens for n in lengths]
        loads = [sum(c for c, home in zip(costs, homes, strict=True) if home == {i}) for i in range(count)]
        assert sorted(loads) == longest_first(costs, count)


def test_what_is_left_of_a_begun_response_counts():
    begun = Sample("long", 0, (1,), (5,) * 90, (-1.0,) * 90, "unfinished", (0,) * 90)
    requests = [Request("long", 0, (1,), 0, begun=begun), *(Request(f"p{i}", 0, (1,), 0) for i in range(2))]
    parts = assign(requests, 2, Sampling(max_tokens=100, stop_token_ids=(2,)))
    assert [[r.prompt_id for r in part] for part in parts] == [["long", "p0"], ["p1"]]


def test_a_continued_sample_is_whole_again():
    begun = Sample("p", 0, (1,), (5, 6), (-1.0, -2.0), "unfinished", (3, 3), (1,))
    more = Sample("p", 0, (1,), (7, 8), (0.0, -4.0), "stop", (4, 4), (0,))
    whole = Sample("p", 0, (1,), (5, 6, 7, 8), (-1.0, -2.0, 0.0, -4.0), "stop", (3, 3, 4, 4), (1, 2))
    assert more.after(begun) == whole and more.after(None) == more
    assert whole.weight_version == 4


def test_samples_survive_json_exactly():
    sample = Sample("p", 1, (1, 2), (3, 4), (-0.1234567890123456789, -1e-9), "length", (7, 8), (1,))
    assert Sample.from_json(json.loads(json.dumps(sample.to_json()))) == sample


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: make_requests([PROMPTS[0], PROMPTS[0]], 1, 0, 0), "prompt_id 'p0' occurs more than once"),
        (lambda: make_requests(PROMPTS, 0, 0, 0), "samples_per_prompt=0"),
        (lambda: Sampling(max_tokens=0, stop_token_ids=(2,)), "sampling.max_tokens=0"),
        (lambda: Sampling(max_tokens=1, stop_token_ids=()), "sampling.stop_token_ids is empty"),
        (lambda: Sampling(1, (2,), temperature=-1.0), "sampling.temperature=-1.0"),
        (lambda: Sampling(1, (2,), temperature=float("nan")), "sampling.temperature=nan"),
        (lambda: Sampling(1, (2,), top_p=0.0), "sampling.top_p=0.0"),
        (lambda: Sampling(1, (2,), round_tokens=0), "sampling.round_tokens=0"),
        (lambda: Sampling(1, (2,), thinking_budget=0), "sampling.thinking_budget=0"),
    ],
)
def test_impossible_values_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
