"""Oversampling, cutting and carrying over, with an engine whose response lengths are drawn from the seeds."""

import json
import random
from collections import Counter
from dataclasses import dataclass

import pytest
import torch.distributed as dist

from megatron_ext.batch import Prompt, TokenBatch
from rollout.generation import Fleet
from rollout.prompt_buffer import PromptBuffer, Rollout
from rollout.sampler import shares
from rollout.sampling import Sampling
from tests.responses import answer, make_prompt, plain

PROMPTS_PER_STEP = 4
SAMPLES = 2
LONGEST = 40


@dataclass
class Processed:
    prompt: Prompt
    vision: object = None


def draw(i):
    return [Processed(make_prompt(f"{i}-{j}", [i, j]), vision=f"pixels {i}-{j}") for j in range(PROMPTS_PER_STEP)]


def draw_ids(i):
    return [processed.prompt.prompt_id for processed in draw(i)]


class Engine:
    """One token a step for every request; a response ends after a number of tokens that its first seed decides."""

    def __init__(self):
        self.alive = True
        self.version = 0
        self.seeds = []
        self.lengths = {}

    def generate(self, requests, sampling, num_complete=None):
        self.seeds += requests.seeds.tolist()
        partial_lengths = requests.response_lengths.tolist()
        for key, seed, length in zip(requests.keys, requests.seeds.tolist(), partial_lengths, strict=True):
            if length == 0:
                self.lengths[key] = random.Random(seed).randint(1, LONGEST)
        remaining = Counter(prompt_id for prompt_id, _ in requests.keys)
        running = list(range(len(requests)))
        step = 0
        while running:
            step += 1
            for i in list(running):
                key = requests.keys[i]
                ended = partial_lengths[i] + step == self.lengths[key]
                if not ended and step != sampling.round_tokens:
                    continue
                running.remove(i)
                reason = "stop" if ended else "unfinished"
                yield answer(requests, i, [7] * step, logprob=-1.0, finish_reason=reason, version=self.version)
                remaining[key[0]] -= 1
                if num_complete is not None and list(remaining.values()).count(0) == num_complete:
                    return


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    store = tmp_path_factory.mktemp("prompt_buffer") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def make_buffer(oversample, round_tokens=None, draws=draw):
    sampling = Sampling(max_tokens=LONGEST, stop_token_ids=(2,), round_tokens=round_tokens)
    return PromptBuffer(
        draws,
        sampling,
        prompts_per_step=PROMPTS_PER_STEP,
        oversample=oversample,
        samples_per_prompt=SAMPLES,
        seed=3,
    )


def saved(buffer):
    """The buffer's state as a checkpoint's files hold it."""
    progress, responses = buffer.state()
    return json.dumps(progress), responses.to_bytes()


def restored(buffer, state):
    """A new buffer of the same settings, with a state from files."""
    progress, responses = state
    oversample = buffer.num_in_flight / PROMPTS_PER_STEP
    again = make_buffer(oversample, buffer.sampling.round_tokens, buffer.draw)
    again.load(json.loads(progress), TokenBatch.from_bytes(responses))
    return again


def judge(response):
    (one,) = plain(response)
    return {"length": len(one.tokens)}


def run(buffer, engine, group, steps, first=0):
    """Each step's batch; between the steps a checkpoint could hold the buffer."""
    taken = []
    for step in range(first, first + steps):
        engine.version = step
        rollout = Rollout(buffer, Fleet([engine]), group, judge)
        rollout.start(step)
        state = saved(buffer)
        assert saved(restored(buffer, state)) == state
        batch = rollout.collect(pytest.fail)
        taken.append(batch)
        responses = plain(batch)
        assert [r.sample_index for r in responses] == list(range(SAMPLES)) * PROMPTS_PER_STEP
        assert batch.group_index.tolist() == [n for n in range(PROMPTS_PER_STEP) for _ in range(SAMPLES)]
        assert all(r.verdicts == {"length": len(r.tokens)} for r in responses)
        assert all(r.finish_reason == "stop" for r in responses)
    return taken


def names(taken):
    """The prompts of each step, in order."""
    return [[r.prompt_id for r in plain(batch)[::SAMPLES]] for batch in taken]


def content(taken):
    return [(plain(batch), batch.vision) for batch in taken]


def prompt_ids(groups):
    return [group.processed.prompt.prompt_id for group in groups]


def test_without_oversampling_a_step_takes_its_draw(group):
    for round_tokens in (None, 8):
        engine = Engine()
        taken = run(make_buffer(1.0, round_tokens), engine, group, 3)
        assert names(taken) == [draw_ids(i) for i in range(3)]
        assert [batch.vision for batch in taken] == [[f"pixels {name}" for name in draw_ids(i)] for i in range(3)]
        assert len(set(engine.seeds)) == len(engine.seeds)


@pytest.mark.parametrize("round_tokens", [None, 8])
def test_no_prompt_is_lost_and_none_is_taken_twice(group, round_tokens):
    steps = 30
    engine = Engine()
    buffer = make_buffer(1.5, round_tokens)
    taken = [name for step in names(run(buffer, engine, group, steps)) for name in step]
    assert len(taken) == len(set(taken)) == steps * PROMPTS_PER_STEP
    left = prompt_ids(buffer.groups)
    assert sorted(taken + left) == sorted(name for i in range(buffer.draws) for name in draw_ids(i))
    assert max(int(name.split("-")[0]) for name in taken) <= steps, "a step draws no more than it takes"
    assert len(set(engine.seeds)) == len(engine.seeds), "no two pieces of noise are the same"


def test_a_cut_prompt_is_tried_again_first_and_from_its_beginning(group):
    engine = Engine()
    buffer = make_buffer(1.5)
    first = run(buffer, engine, group, 1)
    (taken,) = names(first)
    cut = [name for name in [*draw_ids(0), *draw_ids(1)][:6] if name not in taken]
    assert len(cut) == 2 and prompt_ids(buffer.groups[:2]) == cut
    assert not any(waiting.responses for waiting in buffer.groups)
    longest = {prompt_id: 0 for prompt_id, _ in engine.lengths}
    for (prompt_id, _), length in engine.lengths.items():
        longest[prompt_id] = max(longest[prompt_id], length)
    assert sorted(longest, key=longest.__getitem__)[:4] == sorted(taken, key=longest.__getitem__)
    (second,) = run(buffer, engine, group, 1, first=1)
    assert all(r.versions == [1] * len(r.logprobs) for r in plain(second))


def test_what_is_carried_over_goes_on_under_the_next_weights(group):
    engine = Engine()
    taken = run(make_buffer(2.0, round_tokens=8), engine, group, 12)
    mixed = 0
    for step, batch in enumerate(taken):
        for r in plain(batch):
            assert len(r.tokens) == len(r.logprobs) == len(r.versions)
            assert len(r.tokens) == engine.lengths[r.key]
            last = r.versions[-1]
            assert r.versions == sorted(r.versions) and last <= step
            earlier = {version: count for version, count in Counter(r.versions).items() if version != last}
            assert all(count % 8 == 0 for count in earlier.values()), "complete rounds"
            mixed += len(set(r.versions)) > 1
    assert mixed > 10


@pytest.mark.parametrize("round_tokens", [None, 8])
def test_a_run_resumed_from_the_buffer_s_state_takes_the_same(group, round_tokens):
    """The state of a checkpoint after step 3, also when step 4 was under way."""
    uninterrupted = run(make_buffer(1.5, round_tokens), Engine(), group, 8)
    engine = Engine()
    buffer = make_buffer(1.5, round_tokens)
    assert content(run(buffer, engine, group, 4)) == content(uninterrupted)[:4]
    Rollout(buffer, Fleet([engine]), group).start(4)
    resumed = restored(buffer, saved(buffer))
    assert content(run(resumed, engine, group, 4, first=4)) == content(uninterrupted)[4:]


def test_a_prompt_that_is_in_flight_waits_for_its_next_turn(group):
    """Six prompts, four a draw: each comes again while it may still be in flight."""

    def narrow(i):
        return [Processed(make_prompt(f"p{(4 * i + j) % 6}", [j])) for j in range(4)]

    buffer = make_buffer(1.5, 8, narrow)
    taken = [name for step in names(run(buffer, Engine(), group, 12)) for name in step]
    drawn = Counter(processed.prompt.prompt_id for i in range(buffer.draws) for processed in narrow(i))
    assert Counter(taken) + Counter(prompt_ids(buffer.groups)) == drawn
    with pytest.raises(ValueError, match="7 prompts in flight need as many different ones"):
        make_buffer(1.75, 8, narrow).in_flight()


def test_oversampling_below_one_is_refused():
    with pytest.raises(ValueError, match=r"rollout\.oversample=0\.5"):
        make_buffer(0.5)


def test_shares_are_integers_in_proportion():
    assert shares(4, [3, 3]) == [2, 2]
    assert shares(5, [4, 2, 0]) == [3, 2, 0]
    generator = random.Random(0)
    for _ in range(200):
        sizes = [generator.randint(0, 9) for _ in range(generator.randint(1, 6))] + [1]
        total = generator.randint(0, sum(sizes))
        parts = shares(total, sizes)
        assert sum(parts) == total
        for part, size in zip(parts, sizes, strict=True):
            assert abs(part - total * size / sum(sizes)) < 1 and part <= size
