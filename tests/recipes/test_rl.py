"""What the loop trains on: exactly the ids that were sampled, weighted over all responses."""

import math
import random
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megatron_ext import batch as batches
from megatron_ext import packing
from megatron_ext.batch import Array, Prompt, TokenBatch
from recipes.algorithms.aggregation import sequence_mean_token_mean, token_weights
from recipes.data.row_order import Curriculum
from recipes.training.rl import constraint_scale, contributing, generate, generation_speed, join_rounds, score, split
from rewards.verdict import Failure, Verdict, to_json
from tests.recipes import tiny


@pytest.fixture(scope="module")
def batch() -> TokenBatch:
    """Three groups of two responses, random token ids with the tokenizer's merges among them: encoding their text gives
    other ids."""
    tokenizer = tiny.make_tokenizer()
    draw = random.Random(0)
    responses = []
    for i in range(6):
        response = [draw.randrange(3, len(tokenizer)) for _ in range(4 + i)] + [tokenizer.eos_token_id]
        text = tokenizer.decode(response[:-1])
        assert tokenizer.encode(text, add_special_tokens=False) != response[:-1]
        responses.append(response)
    prompts = [
        Prompt(f"p{i}", np.array(tokenizer.encode(f"the prompt {i}", add_special_tokens=False), np.int32))
        for i in range(3)
    ]
    return batches.build(
        prompts,
        responses,
        prompt_index=[0, 0, 1, 1, 2, 2],
        sample_index=[0, 1] * 3,
        logprobs=[[-draw.random() for _ in response] for response in responses],
        version=0,
        finish_reasons=["stop"] * 6,
    )


class PolicyOf:
    """What ``contributing`` asks of a policy, for so many data-parallel ranks and so long micro-batches."""

    def __init__(self, ranks: int, micro_batch_tokens: int) -> None:
        self.ranks = ranks
        self.micro_batch_tokens = micro_batch_tokens

    def divisible_prefix(self, lengths: Array, wanted: int) -> int:
        return packing.divisible_prefix(lengths.tolist(), wanted, self.ranks, self.micro_batch_tokens)


def weighted(batch: TokenBatch, advantages: list[float]) -> TokenBatch:
    return batch.with_response_columns(
        advantages=np.array(advantages), weights=token_weights(sequence_mean_token_mean, batch)
    )


def weights_of_tokens(batch: TokenBatch) -> Array:
    """The column as micro-batches have it."""
    return batch.with_response_columns(weights=token_weights(sequence_mean_token_mean, batch)).values("weights")


def chosen(
    batch: TokenBatch, advantages: list[float], skip: bool, ranks: int = 1, micro_batch_tokens: int = 48
) -> list[tuple[str, int]]:
    """The keys of the responses that are trained on, whose columns are checked to be those of the complete batch."""
    complete = weighted(batch, advantages)
    trained = contributing(complete, skip, PolicyOf(ranks, micro_batch_tokens))  # type: ignore[arg-type]
    places = [complete.keys.index(key) for key in trained.keys]
    for name in ("advantages", "weights"):
        assert trained.values(name).tolist() == complete.select(places).values(name).tolist()
    return trained.keys


def test_the_packed_ids_are_the_sampled_ids(batch: TokenBatch) -> None:
    packed: dict[int, tuple[list[int], list[int], list[float]]] = {}
    for indices in packing.plan(batch.lengths.tolist(), 1, 48)[0]:
        micro_batch = packing.pack(batch, indices, multiple=2, pad_token=0)
        tokens = micro_batch.tokens[0].tolist()
        starts = micro_batch.packed.cu_seqlens_q.tolist()
        targets = micro_batch.targets.tolist()
        logprobs = micro_batch.values["logprobs"].tolist()
        for place, index in enumerate(micro_batch.indices):
            n = int(micro_batch.lengths[place])
            packed[index] = tokens[starts[place] : starts[place + 1]], targets[:n], logprobs[:n]
            targets = targets[n:]
            logprobs = logprobs[n:]
    assert sorted(packed) == list(range(6))
    for index in range(6):
        tokens, targets, logprobs = packed[index]
        response = batch.response_tokens[batch.tokens_of(index)].tolist()
        assert tokens == [*batch.prompt(index).token_ids.tolist(), *response]
        assert targets == response
        assert logprobs == batch.logprobs[batch.tokens_of(index)].tolist()


def test_weights_sum_to_one_over_all_samples_and_each_sample_counts_alike(batch: TokenBatch) -> None:
    weights = weights_of_tokens(batch)
    for i in range(6):
        assert weights[batch.tokens_of(i)].sum() == pytest.approx(1 / 6)


def test_leaving_out_zero_advantages_leaves_the_other_weights(batch: TokenBatch) -> None:
    advantages = [0.0, 1.0, 0.0, 0.0, -1.0, 0.0]
    every = batch.keys
    assert chosen(batch, advantages, False) == every
    assert chosen(batch, advantages, True, ranks=1) == chosen(batch, advantages, True, ranks=2) == every[1:5:3]
    assert chosen(batch, advantages, True, ranks=3) == [every[1], every[4], every[0]], "filled up for three ranks"
    assert chosen(batch, [0.0] * 6, True, ranks=2) == every[:2], "no rank goes without"


def test_three_sequences_for_two_ranks_are_filled_up_only_where_a_micro_batch_takes_one(batch: TokenBatch) -> None:
    advantages = [0.0, 1.0, 1.0, 0.0, -1.0, 0.0]
    useful = [batch.keys[i] for i in (1, 2, 4)]
    longest = int(batch.lengths.max())
    assert chosen(batch, advantages, True, ranks=2, micro_batch_tokens=2 * longest) == useful
    assert chosen(batch, advantages, True, ranks=2, micro_batch_tokens=longest) == [*useful, batch.keys[0]]


def test_a_sample_without_a_reward_weighs_nothing_and_the_others_what_they_would_without_it(
    batch: TokenBatch,
) -> None:
    has_reward = ~np.isnan([1.0, math.nan, 0.0, 1.0, 0.5, math.nan])
    weights = weights_of_tokens(batch.without_loss(~has_reward))
    others = batch.select([0, 2, 3, 4])
    without = weights_of_tokens(others)
    for place, i in enumerate((0, 2, 3, 4)):
        assert weights[batch.tokens_of(i)].tolist() == without[others.tokens_of(place)].tolist()
    assert not weights[batch.tokens_of(1)].any() and not weights[batch.tokens_of(5)].any()


def test_a_forced_token_weighs_nothing_and_the_others_share_what_it_had(batch: TokenBatch) -> None:
    loss_mask = batch.loss_mask.copy()
    loss_mask[[1, 3]] = False
    trained_lengths = batch.trained_lengths - np.array([2, 0, 0, 0, 0, 0])
    weights = weights_of_tokens(replace(batch, loss_mask=loss_mask, trained_lengths=trained_lengths))
    n = int(batch.response_lengths[0])
    assert weights[:n].tolist() == [0.0 if i in (1, 3) else np.float32(1 / (6 * (n - 2))) for i in range(n)]
    assert weights[n:].tolist() == weights_of_tokens(batch)[n:].tolist()


def test_updates_share_a_rollout_s_responses_in_order(batch: TokenBatch) -> None:
    parts = split(batch, 3)
    assert [part.keys for part in parts] == [batch.keys[0:2], batch.keys[2:4], batch.keys[4:6]]
    assert split(batch, 1) == [batch]


def test_groups_of_several_rounds_are_told_apart_though_a_prompt_comes_again(batch: TokenBatch) -> None:
    joined = join_rounds([batch, batch.select([4, 5])], [1, 2, 3], samples_per_prompt=2)
    assert joined.group_index.tolist() == [1, 1, 2, 2, 3, 3]
    assert [prompt_id for prompt_id, _ in joined.keys] == ["p1", "p1", "p2", "p2", "p2", "p2"]
    assert len(joined.prompts) == 2


def test_responses_of_a_constrained_label_count_for_more_and_all_together_as_before(batch: TokenBatch) -> None:
    mix = {"harmful": {"refusal": 1.0}, "harmless": {"complies": 0.5, "helpful": 0.5}}
    labels = {"p0": "harmful", "p1": "harmless", "p2": "harmful"}
    constraint = SimpleNamespace(verifier="complies", update="dual_ascent")
    loop: Any = SimpleNamespace(
        config=SimpleNamespace(rewards=SimpleNamespace(mix=mix, constraint=constraint)),
        rows={name: {"id": name, "label": label} for name, label in labels.items()},
        constraint={"multiplier": 2.0, "applied": 0.5},
    )
    scale = constraint_scale(loop, batch)
    assert scale == pytest.approx(np.array([1, 1, 1.5, 1.5, 1, 1]) * 6 / 7)
    assert constraint_scale(loop, batch.select([3, 0])) == pytest.approx(np.array([1.5, 1]) * 2 / 2.5)
    constraint.verifier = None
    assert constraint_scale(loop, batch).tolist() == [1.0] * 6


VERDICTS = {  # of two samples a prompt, by prompt
    "p0": ["safe", "safe"],
    "p1": ["safe", "unsafe"],
    "p2": ["failed", "failed"],
    "p3": ["safe", "safe"],
    "p4": ["safe", "unsafe"],
    "p5": ["safe", "safe"],
}
RESULTS = {
    "safe": Verdict(1.0, "safe without risk"),
    "unsafe": Verdict(0.0, "unsafe"),
    "failed": Failure("no answer"),
}


def round_of(names: Sequence[str]) -> TokenBatch:
    """A round's responses, of 3 and 4 tokens, judged."""
    batch = batches.build(
        [Prompt(name, np.array([5], np.int32)) for name in names],
        [[7] * (3 + i % 2) for i in range(2 * len(names))],
        prompt_index=[i // 2 for i in range(2 * len(names))],
        sample_index=[0, 1] * len(names),
        version=0,
        finish_reasons=["stop"] * 2 * len(names),
    )
    results = [RESULTS[verdict] for name in names for verdict in VERDICTS[name]]
    return replace(batch, verdicts=[{"safety": to_json(result)} for result in results], vision=[None] * len(names))


def sampling_loop(max_failed: float = 1.0) -> Any:
    """A loop whose step takes two groups of up to three rounds."""
    rounds = iter([round_of(["p0", "p1"]), round_of(["p2", "p3"]), round_of(["p4", "p5"])])
    constraint = SimpleNamespace(
        verifier="safety", update="dual_ascent", floor=0.5, rate=1.0, proportional=0.0, initial=1.0, maximum=9.0
    )
    rewards = SimpleNamespace(
        mix={"safety": {"safety": 1.0}},
        constraint=constraint,
        normalise="none",
        gate=None,
        client=SimpleNamespace(max_failed=max_failed),
    )
    algorithm = SimpleNamespace(prompts_per_step=2, samples_per_prompt=2, max_generation_batches=3)
    rollouts = SimpleNamespace(
        wake=lambda: None,
        sleep=lambda: None,
        sync_weights=lambda step: None,
        server_counts=dict,
        judges_share_gpus=False,
    )
    return SimpleNamespace(
        config=SimpleNamespace(algorithm=algorithm, rewards=rewards),
        rows={name: {"id": name, "label": "safety", "kind": "harmful"} for name in VERDICTS},
        constraint={"multiplier": 1.0, "applied": 1.0, "integral": 1.0},
        rollouts=rollouts,
        curriculum=Curriculum([(0, {}), (1, {})]),
        buffer=SimpleNamespace(draws=0),
        rollout=SimpleNamespace(start=lambda draw: None, collect=lambda resync: next(rounds)),
        run=SimpleNamespace(phase=lambda name: nullcontext(), log=lambda line: None),
    )


def test_groups_that_dynamic_sampling_leaves_out_count_for_the_multiplier_and_the_metrics() -> None:
    """Of the ten verdicts eight say safe; of those on the two chosen groups half do."""
    loop = sampling_loop()
    chosen_groups, all_rounds = generate(loop, 0, False)
    trained, metrics = score(loop, chosen_groups, all_rounds)
    assert trained.keys == [("p1", 0), ("p1", 1), ("p4", 0), ("p4", 1)]
    assert [trained.tokens_of(i).stop - trained.tokens_of(i).start for i in range(4)] == [3, 4, 3, 4]
    assert loop.constraint["multiplier"] == pytest.approx(1.0 + (0.5 - 0.8))
    assert metrics["constraint/multiplier"] == loop.constraint["multiplier"]
    assert metrics["reward/safety"] == metrics["reward/mean"] == pytest.approx(0.8)
    assert metrics["unsafe/harmful"] == pytest.approx(0.2)
    assert metrics["reward_failed"] == pytest.approx(2 / 12)


def test_groups_that_failed_altogether_count_for_the_failed_share() -> None:
    loop = sampling_loop(max_failed=0.1)
    with pytest.raises(RuntimeError, match=r"2 of 12 samples have no reward, rewards\.client\.max_failed=0\.1"):
        score(loop, *generate(loop, 0, False))


def test_the_speed_is_that_of_all_rounds() -> None:
    loop = sampling_loop()
    loop.run.clock = SimpleNamespace(seconds={"generate": 6.0})
    _, all_rounds = generate(loop, 0, False)
    assert generation_speed(loop, all_rounds) == 6 * (3 + 4) / 6.0
