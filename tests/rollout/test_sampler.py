"""Order, seeds and spreading of samples, with engines that answer in an order of their own."""

import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from megatron_ext import batch as batches
from rollout.engine import EngineDied, EngineError
from rollout.sampler import assign, generate, make_requests, request_seed
from rollout.sampling import Sampling
from tests.responses import PlainResponse, answer, make_prompt, plain

SAMPLING = Sampling(max_tokens=4, stop_token_ids=(2,))
PROMPTS = [make_prompt(f"p{i}", [i, i + 1]) for i in range(5)]


class BackwardsEngine:
    """Answers the last request first; remembers what it was asked. It dies or refuses after some answers."""

    def __init__(self, dies_after=None, refuses_after=None):
        self.batches = []  # the keys that were asked in each
        self.alive = True
        self.dies_after = dies_after
        self.refuses_after = refuses_after

    def generate(self, requests, sampling, num_complete=None):
        self.batches.append(requests.keys)
        for count, i in enumerate(reversed(range(len(requests)))):
            if count == self.dies_after:
                self.alive = False
                raise EngineDied("gone")
            if count == self.refuses_after:
                raise EngineError("stale")
            token = int(requests.seeds[i]) % 7
            yield answer(requests, i, [token], logprob=-0.5, finish_reason="stop", version=3)


def ask(engines, **changes):
    arguments = {"samples_per_prompt": 3, "seed": 1, "step": 2} | changes
    return plain(generate(engines, PROMPTS, SAMPLING, **arguments))


def test_responses_come_by_prompt_and_index_whatever_the_engines_do():
    engines = [BackwardsEngine(), BackwardsEngine()]
    responses = ask(engines)
    keys = [(f"p{i}", j) for i in range(5) for j in range(3)]
    assert [response.key for response in responses] == keys
    assert [response.prompt for response in responses] == [[i, i + 1] for i in range(5) for _ in range(3)]
    assert [response.tokens for response in responses] == [[request_seed(1, 2, *key) % 7] for key in keys]
    assert [len(batch) for engine in engines for batch in engine.batches] == [9, 6]
    assert responses == ask([BackwardsEngine()]) == ask([BackwardsEngine() for _ in range(20)])


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
    first, second = engines[0].batches
    missing = engines[1].batches[0][:-1] + engines[2].batches[0][:-2]
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


def test_a_prompt_s_requests_go_to_one_engine_the_least_loaded_longest_first():
    draw = random.Random(0)
    for _ in range(50):
        lengths = [draw.randint(1, 60) for _ in range(draw.randint(1, 12))]
        prompts = [make_prompt(f"p{i}", [1] * n) for i, n in enumerate(lengths)]
        order = list(range(3 * len(prompts)))
        draw.shuffle(order)
        requests = make_requests(prompts, 3, 0, 0).select(order)
        count = draw.randint(1, 5)
        parts = [part.tolist() for part in assign(requests, count, SAMPLING)]
        assert parts == [part.tolist() for part in assign(requests, count, SAMPLING)]
        assert sorted(place for part in parts for place in part) == list(range(len(requests)))
        assert all(part == sorted(part) for part in parts), "in the order of the requests"
        prompt_ids = [[requests.prompt(place).prompt_id for place in part] for part in parts]
        assert all(number == 3 for part in prompt_ids for number in Counter(part).values())
        costs = {prompt.prompt_id: n + 3 * SAMPLING.max_tokens for prompt, n in zip(prompts, lengths, strict=True)}
        loads = [sum(costs[prompt_id] for prompt_id in set(part)) for part in prompt_ids]
        assert sorted(loads) == longest_first(costs.values(), count)


def test_what_is_left_of_a_begun_response_counts():
    prompts = [make_prompt(name, [1]) for name in ("long", "p0", "p1")]
    requests = batches.build(prompts, [[5] * 90, [], []])
    parts = assign(requests, 2, Sampling(max_tokens=100, stop_token_ids=(2,)))
    assert [[prompts[place].prompt_id for place in part] for part in parts] == [["long", "p0"], ["p1"]]


def test_a_response_that_went_on_is_complete_again():
    prompt = make_prompt("p", [1])
    partial = batches.build(
        [prompt], [[5, 6]], logprobs=[[-1.0, -2.0]], loss_mask=[[True, False]], version=3, finish_reasons=["unfinished"]
    )
    continuation = batches.build(
        [replace(prompt, token_ids=np.empty(0, np.int32))],
        [[7, 8]],
        logprobs=[[0.0, -4.0]],
        loss_mask=[[False, True]],
        version=4,
        finish_reasons=["stop"],
    )
    complete = PlainResponse(
        prompt_id="p",
        sample_index=0,
        prompt=[1],
        tokens=[5, 6, 7, 8],
        logprobs=[-1.0, -2.0, 0.0, -4.0],
        forced=[1, 2],
        versions=[3, 3, 4, 4],
        finish_reason="stop",
        failure="",
        verdicts={},
    )
    assert plain(batches.extend(partial, continuation)) == [complete]


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
