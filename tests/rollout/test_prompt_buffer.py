"""Oversampling, cutting and carrying over, with an engine whose response lengths are drawn from the seeds."""

import json
import random
from collections import Counter
from dataclasses import dataclass

import pytest
import torch.distributed as dist

from rollout.generation import Fleet
from rollout.prompt_buffer import PromptBuffer, Rollout
from rollout.sample import Prompt, Sample, Sampling
from rollout.sampler import shares

WANTED, SAMPLES, LONGEST = 4, 2, 40


@dataclass
class Asked:
    prompt: Prompt


def draw(i):
    return [Asked(Prompt(f"{i}-{j}", (i, j))) for j in range(WANTED)]


class Engine:
    """One token a step for every request; a response ends after a number of tokens that its first seed decides."""

    def __init__(self):
        self.alive, self.version, self.seeds, self.lengths = True, 0, [], {}

    def generate(self, requests, sampling, enough=None):
        self.seeds += [r.seed for r in requests]
        left, running, at = Counter(r.prompt_id for r in requests), list(requests), 0
        for r in requests:
            if r.begun is None:
                self.lengths[r.key] = random.Random(r.seed).randint(1, LONGEST)
        while running:
            at += 1
            for r in list(running):
                total = len(r.begun_token_ids) + at
                ended = total == self.lengths[r.key]
                if ended or at == sampling.round_tokens:
                    running.remove(r)
                    new = Sample(
                        r.prompt_id,
                        r.sample_index,
                        r.prompt_token_ids,
                        (7,) * at,
                        (-1.0,) * at,
                        "stop" if ended else "unfinished",
                        (self.version,) * at,
                    )
                    yield new.after(r.begun)
                    left[r.prompt_id] -= 1
                    if enough is not None and list(left.values()).count(0) == enough:
                        return


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    store = tmp_path_factory.mktemp("pool") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def make_pool(oversample, round_tokens=None, drawn=draw):
    sampling = Sampling(max_tokens=LONGEST, stop_token_ids=(2,), round_tokens=round_tokens)
    return PromptBuffer(drawn, sampling, wanted=WANTED, oversample=oversample, samples_per_prompt=SAMPLES, seed=3)


def run(pool, engine, group, steps, first=0):
    """Each step's groups, with a pool that a checkpoint has held."""
    taken = []
    for step in range(first, first + steps):
        engine.version = step
        rollout = Rollout(pool, Fleet([engine]), group, lambda sample: len(sample.response_token_ids))
        rollout.start(step)
        state = json.dumps(pool.to_json())
        taken.append(rollout.collect(pytest.fail))
        again = make_pool(pool.size / WANTED, pool.sampling.round_tokens, pool.draw)
        again.load(json.loads(state))
        assert json.dumps(again.to_json()) == state
        for g in taken[-1]:
            assert sorted(g.samples) == sorted(g.results) == list(range(SAMPLES))
            assert all(g.results[i] == len(s.response_token_ids) for i, s in g.samples.items())
            assert all(s.finish_reason == "stop" for s in g.samples.values())
    return taken


def names(taken):
    return [[g.asked.prompt.prompt_id for g in step] for step in taken]


def content(taken):
    return [[(g.drawn, sorted(g.samples.items()), sorted(g.results.items())) for g in step] for step in taken]


def test_without_oversampling_a_step_takes_its_draw(group):
    for round_tokens in (None, 8):
        engine = Engine()
        taken = run(make_pool(1.0, round_tokens), engine, group, 3)
        assert names(taken) == [[a.prompt.prompt_id for a in draw(i)] for i in range(3)]
        assert len(set(engine.seeds)) == len(engine.seeds)


@pytest.mark.parametrize("round_tokens", [None, 8])
def test_no_prompt_is_lost_and_none_is_taken_twice(group, round_tokens):
    steps, engine = 30, Engine()
    pool = make_pool(1.5, round_tokens)
    taken = [name for step in names(run(pool, engine, group, steps)) for name in step]
    assert len(taken) == len(set(taken)) == steps * WANTED
    left = [g.asked.prompt.prompt_id for g in pool.groups]
    assert sorted(taken + left) == sorted(a.prompt.prompt_id for i in range(pool.draws) for a in draw(i))
    assert max(int(name.split("-")[0]) for name in taken) <= steps, "a step draws no more than it takes"
    assert len(set(engine.seeds)) == len(engine.seeds), "no two pieces of noise are the same"


def test_a_cut_prompt_is_tried_again_first_and_from_its_beginning(group):
    engine, pool = Engine(), make_pool(1.5)
    (first,) = run(pool, engine, group, 1)
    cut = [a.prompt.prompt_id for i in range(2) for a in draw(i)][:6]
    cut = [name for name in cut if name not in names([first])[0]]
    assert len(cut) == 2 and [g.asked.prompt.prompt_id for g in pool.groups[:2]] == cut
    assert not any(g.samples for g in pool.groups)
    longest = {key: 0 for key, _ in engine.lengths}
    for (key, _), length in engine.lengths.items():
        longest[key] = max(longest[key], length)
    assert sorted(longest, key=longest.__getitem__)[:4] == sorted(names([first])[0], key=longest.__getitem__)
    (second,) = run(pool, engine, group, 1, first=1)
    assert all(s.weight_versions == (1,) * len(s.logprobs) for g in second for s in g.samples.values())


def test_what_is_carried_over_goes_on_under_the_next_weights(group):
    engine = Engine()
    taken = run(make_pool(2.0, round_tokens=8), engine, group, 12)
    mixed = 0
    for step, groups in enumerate(taken):
        for g in groups:
            for s in g.samples.values():
                assert len(s.response_token_ids) == len(s.logprobs) == len(s.weight_versions)
                assert len(s.response_token_ids) == engine.lengths[s.key]
                assert list(s.weight_versions) == sorted(s.weight_versions) and s.weight_version <= step
                earlier = {v: n for v, n in Counter(s.weight_versions).items() if v != s.weight_version}
                assert all(n % 8 == 0 for n in earlier.values()), "whole rounds"
                mixed += len(set(s.weight_versions)) > 1
    assert mixed > 10


@pytest.mark.parametrize("round_tokens", [None, 8])
def test_a_run_resumed_from_the_pools_state_takes_the_same(group, round_tokens):
    """The state of a checkpoint behind step 3, also when step 4 was under way."""
    whole = run(make_pool(1.5, round_tokens), Engine(), group, 8)
    engine, pool = Engine(), make_pool(1.5, round_tokens)
    assert content(run(pool, engine, group, 4)) == content(whole)[:4]
    Rollout(pool, Fleet([engine]), group).start(4)
    resumed = make_pool(1.5, round_tokens)
    resumed.load(json.loads(json.dumps(pool.to_json())))
    assert content(run(resumed, engine, group, 4, first=4)) == content(whole)[4:]


def test_a_prompt_that_is_in_flight_waits_for_its_next_turn(group):
    """Six prompts, four a draw: each comes again while it may still be in flight."""

    def narrow(i):
        return [Asked(Prompt(f"p{(4 * i + j) % 6}", (j,))) for j in range(4)]

    pool = make_pool(1.5, 8, narrow)
    taken = [name for step in names(run(pool, Engine(), group, 12)) for name in step]
    drawn = Counter(a.prompt.prompt_id for i in range(pool.draws) for a in narrow(i))
    assert Counter(taken) + Counter(g.asked.prompt.prompt_id for g in pool.groups) == drawn
    with pytest.raises(ValueError, match="7 prompts in flight need as many different ones"):
        make_pool(1.75, 8, narrow).in_flight()


def test_oversampling_below_one_is_refused():
    with pytest.raises(ValueError, match=r"rollout\.oversample=0\.5"):
        make_pool(0.5)


def test_shares_are_whole_and_in_proportion():
    assert shares(4, [3, 3]) == [2, 2]
    assert shares(5, [4, 2, 0]) == [3, 2, 0]
    generator = random.Random(0)
    for _ in range(200):
        sizes = [generator.randint(0, 9) for _ in range(generator.randint(1, 6))] + [1]
        enough = generator.randint(0, sum(sizes))
        found = shares(enough, sizes)
        assert sum(found) == enough
        assert all(abs(n - enough * size / sum(sizes)) < 1 and n <= size for n, size in zip(found, sizes, strict=True))
