"""What the loop trains on: exactly the ids that were sampled, weighted over all samples."""

import random
from typing import Any

import pytest

from megatron_ext.packing import pack, plan
from recipes.rl import contributing, verifier_means
from rewards.verdict import Verdict
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
        made.append(Sample(f"p{i // 2}", i % 2, tuple(prompt), tuple(response), log_probs, "stop", 0))
    return made


def test_the_packed_ids_are_the_sampled_ids(samples: list[Sample]) -> None:
    sequences = contributing(samples, [None] * len(samples), [0.5] * 6, False, 1)
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
    sequences = contributing(samples, [None] * len(samples), [0.5] * 6, False, 1)
    for sequence in sequences:
        assert sum(sequence.values["weight"]) == pytest.approx(1 / 6)
        assert sequence.values["advantage"] == [0.5] * len(sequence.response)


def test_leaving_out_zero_advantages_leaves_the_other_weights(samples: list[Sample]) -> None:
    advantages = [0.0, 1.0, 0.0, 0.0, -1.0, 0.0]
    every = contributing(samples, [None] * len(samples), advantages, False, 1)
    chosen = contributing(samples, [None] * len(samples), advantages, True, 2)
    assert chosen == [every[1], every[4]]
    assert contributing(samples, [None] * len(samples), advantages, True, 3) == [every[1], every[4], every[0]], (
        "filled up for three ranks"
    )
    none = [0.0] * 6
    assert (
        contributing(samples, [None] * len(samples), none, True, 2)
        == contributing(samples, [None] * len(samples), none, False, 1)[:2]
    ), "no rank goes without"


def test_a_verifier_is_averaged_over_the_samples_it_judged() -> None:
    judged: list[Any] = [
        (0.0, {"safety": Verdict(0.5, "a")}),
        (0.0, {"safety": Verdict(1.0, "b"), "capability": Verdict(0.25, "c")}),
    ]
    assert verifier_means(judged) == {"capability": 0.25, "safety": 0.75}
