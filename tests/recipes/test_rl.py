"""What the loop trains on: exactly the ids that were sampled, weighted over all samples."""

import math
import random
from dataclasses import replace

import pytest

from megatron_ext.packing import PackedSequence, enough, pack, plan
from recipes.algorithms.aggregation import sequence_mean_token_mean
from recipes.training.rl import contributing, packed, token_weights
from rollout.sample import Sample
from tests.recipes import tiny


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    """Random token ids with the tokenizer's merges among them; encoding their text gives other ids."""
    tokenizer = tiny.make_tokenizer()
    draw = random.Random(0)
    made = []
    for i in range(6):
        response = [draw.randrange(3, len(tokenizer)) for _ in range(4 + i)] + [tokenizer.eos_token_id]
        text = tokenizer.decode(response[:-1])
        assert tokenizer.encode(text, add_special_tokens=False) != response[:-1]
        prompt = tokenizer.encode(f"the prompt {i}", add_special_tokens=False)
        log_probs = tuple(-draw.random() for _ in response)
        made.append(
            Sample(f"p{i // 2}", i % 2, tuple(prompt), tuple(response), log_probs, "stop", (0,) * len(response))
        )
    return made


def chosen(
    samples: list[Sample], advantages: list[float], skip: bool, ranks: int = 1, limit: int = 48
) -> list[PackedSequence]:
    sequences = [packed(s, None) for s in samples]
    of_tokens = [[a] * len(s.response) for a, s in zip(advantages, sequences, strict=True)]
    weights = token_weights(sequence_mean_token_mean, sequences, [0.0] * len(samples))

    def planned(ordered: list[PackedSequence], wanted: int) -> int:
        return enough([len(s) for s in ordered], wanted, ranks, limit)

    return contributing(sequences, of_tokens, weights, skip, planned)


def test_the_packed_ids_are_the_sampled_ids(samples: list[Sample]) -> None:
    sequences = chosen(samples, [0.5] * 6, False)
    found: dict[int, tuple[list[int], list[int], list[float]]] = {}
    for indices in plan([len(s) for s in sequences], 1, 48)[0]:
        batch = pack(sequences, indices, 2, 0, "cpu")
        tokens, starts = batch.tokens[0].tolist(), batch.packed.cu_seqlens_q.tolist()
        targets, rollout = batch.targets.tolist(), batch.values["rollout"].tolist()
        for place, index in enumerate(batch.indices):
            n = batch.lengths[place]
            found[index] = tokens[starts[place] : starts[place + 1]], targets[:n], rollout[:n]
            targets, rollout = targets[n:], rollout[n:]
    assert sorted(found) == list(range(6))
    for index, sample in enumerate(samples):
        tokens, targets, rollout = found[index]
        assert tokens == [*sample.prompt_token_ids, *sample.response_token_ids]
        assert targets == list(sample.response_token_ids)
        assert rollout == pytest.approx(list(sample.logprobs), abs=1e-7)


def test_weights_sum_to_one_over_all_samples_and_each_sample_counts_alike(samples: list[Sample]) -> None:
    sequences = chosen(samples, [0.5] * 6, False)
    for sequence in sequences:
        assert sum(sequence.values["weight"]) == pytest.approx(1 / 6)
        assert sequence.values["advantage"] == [0.5] * len(sequence.response)


def test_leaving_out_zero_advantages_leaves_the_other_weights(samples: list[Sample]) -> None:
    advantages = [0.0, 1.0, 0.0, 0.0, -1.0, 0.0]
    every = chosen(samples, advantages, False)
    assert chosen(samples, advantages, True, ranks=1) == chosen(samples, advantages, True, ranks=2) == every[1:5:3]
    assert chosen(samples, advantages, True, ranks=3) == [every[1], every[4], every[0]], "filled up for three ranks"
    none = [0.0] * 6
    assert chosen(samples, none, True, ranks=2) == chosen(samples, none, False)[:2], "no rank goes without"


def test_three_sequences_for_two_ranks_are_filled_up_only_where_a_micro_batch_takes_one(samples: list[Sample]) -> None:
    advantages = [0.0, 1.0, 1.0, 0.0, -1.0, 0.0]
    every = chosen(samples, advantages, False)
    useful = [every[i] for i in (1, 2, 4)]
    longest = max(map(len, every))
    assert chosen(samples, advantages, True, ranks=2, limit=2 * longest) == useful
    assert chosen(samples, advantages, True, ranks=2, limit=longest) == [*useful, every[0]]


def test_a_sample_without_a_reward_weighs_nothing_and_the_others_what_they_would_without_it(
    samples: list[Sample],
) -> None:
    sequences = [packed(s, None) for s in samples]
    found = token_weights(sequence_mean_token_mean, sequences, [1.0, math.nan, 0.0, 1.0, math.nan, 0.5])
    without = token_weights(sequence_mean_token_mean, [sequences[i] for i in (0, 2, 3, 5)], [0.0] * 4)
    assert [found[i] for i in (0, 2, 3, 5)] == without
    assert found[1] == [0.0] * len(sequences[1].response)
    assert found[4] == [0.0] * len(sequences[4].response)


def test_a_forced_token_weighs_nothing_and_the_others_share_what_it_had(samples: list[Sample]) -> None:
    forced = [replace(samples[0], forced=(1, 3)), *samples[1:]]
    found, whole = (
        token_weights(sequence_mean_token_mean, [packed(s, None) for s in made], [0.0] * 6)
        for made in (forced, samples)
    )
    n = len(samples[0].response_token_ids)
    assert found[0] == [0.0 if i in (1, 3) else 1 / (6 * (n - 2)) for i in range(n)]
    assert found[1:] == whole[1:]
