"""Order, seeds and spreading of samples, with engines that answer in an order of their own."""

import json

import pytest

from rollout.engine import EngineError
from rollout.sample import Prompt, Sample, Sampling
from rollout.sampler import generate, make_requests, request_seed, split_evenly

SAMPLING = Sampling(max_tokens=4, stop_token_ids=(2,))
PROMPTS = [Prompt(f"p{i}", (i, i + 1)) for i in range(5)]


class BackwardsEngine:
    """Answers the last request first; remembers what it was asked."""

    def __init__(self, fail_after=None):
        self.asked, self.fail_after = [], fail_after

    def generate(self, requests, sampling):
        self.asked += requests
        for i, r in enumerate(reversed(requests)):
            if i == self.fail_after:
                raise EngineError("gone")
            yield Sample(r.prompt_id, r.sample_index, r.prompt_token_ids, (r.seed % 7,), (-0.1,), "stop", 3)


def ask(engines, **changes):
    return generate(engines, PROMPTS, SAMPLING, **{"samples_per_prompt": 3, "seed": 1, "step": 2} | changes)


def test_samples_come_by_prompt_and_index_whatever_the_engines_do():
    engines = [BackwardsEngine(), BackwardsEngine()]
    samples = ask(engines)
    assert [(s.prompt_id, s.sample_index) for s in samples] == [(f"p{i}", j) for i in range(5) for j in range(3)]
    assert [len(engine.asked) for engine in engines] == [7, 8]
    assert samples == ask([BackwardsEngine()]) == ask([BackwardsEngine() for _ in range(20)])


def test_seeds_depend_on_all_four_parts_and_on_nothing_else():
    parts = [(s, step, p, i) for s in (0, 1) for step in (0, 1) for p in ("a", "b") for i in (0, 1)]
    seeds = {request_seed(*part) for part in parts}
    assert len(seeds) == 16 and all(0 <= seed < 2**63 for seed in seeds)
    assert request_seed(0, 1, "a", 1) == 0xBD6849E519AD08B1 >> 1  # `printf 0/1/1/a | b2sum -l 64`


def test_an_engine_that_fails_ends_the_batch():
    with pytest.raises(EngineError, match="gone"):
        ask([BackwardsEngine(), BackwardsEngine(fail_after=2)])


def test_requests_are_split_evenly_and_in_order():
    parts = split_evenly(range(11), 4)
    assert [x for part in parts for x in part] == list(range(11))
    assert sorted(map(len, parts)) == [2, 3, 3, 3]


def test_samples_survive_json_exactly():
    sample = Sample("p", 1, (1, 2), (3, 4), (-0.1234567890123456789, -1e-9), "length", 7)
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
    ],
)
def test_impossible_values_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
