"""The columnar batch: what goes in comes out, through bytes, selection and concatenation, compared with plain lists."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ext import batch as batches
from megatron_ext.batch import Prompt, TokenBatch

TOKEN = st.integers(0, 2**31 - 1)
LOG_PROB = st.floats(-1e4, 0, width=32)


@st.composite
def token_batches(draw: st.DrawFn) -> TokenBatch:
    """Batches with shared prompts, empty responses, media, mixed versions, failures, and rewards that are missing."""
    prompts = [
        Prompt(
            prompt_id=f"{i}-{draw(st.text(max_size=3))}",
            token_ids=np.array(draw(st.lists(TOKEN, min_size=1, max_size=5)), np.int32),
            images=tuple(draw(st.lists(st.text(max_size=4), max_size=2))),
            videos=tuple(tuple(frames) for frames in draw(st.lists(st.lists(st.text(max_size=3)), max_size=2))),
            marked_token_ids=np.array(draw(st.lists(TOKEN, max_size=3)), np.int32),
        )
        for i in range(draw(st.integers(1, 4)))
    ]
    rows = []
    for i in range(draw(st.integers(0, 6))):
        prompt = draw(st.sampled_from(prompts))
        row = one(prompt, i, draw)
        for _ in range(draw(st.integers(0, 2))):
            row = batches.extend(row, one(prompt, i, draw))
        rows.append(row)
    batch = batches.concatenate(rows)
    batch.rewards[:] = draw(st.lists(st.just(math.nan) | st.floats(-9, 9), min_size=len(rows), max_size=len(rows)))
    batch.verdicts[:] = [{"safety": {"score": 0.5, "label": draw(st.text(max_size=3))}} for _ in rows]
    advantages = draw(st.lists(st.floats(-9, 9, width=32), min_size=len(batch.logprobs), max_size=len(batch.logprobs)))
    return batch.with_columns(advantages=np.array(advantages))


def one(prompt: Prompt, index: int, draw: st.DrawFn) -> TokenBatch:
    tokens = draw(st.lists(TOKEN, max_size=4))
    return batches.build(
        [prompt],
        [tokens],
        sample_index=[index],
        logprobs=[draw(st.lists(LOG_PROB, min_size=len(tokens), max_size=len(tokens)))],
        loss_mask=[draw(st.lists(st.booleans(), min_size=len(tokens), max_size=len(tokens)))],
        version=draw(st.integers(0, 3)),
        seeds=[draw(st.integers(0, 2**63 - 1))],
        finish_reasons=[draw(st.sampled_from(["stop", "length", batches.UNFINISHED]))],
    )


def plain(batch: TokenBatch, i: int) -> dict[str, object]:
    """Everything that the batch says of response i, as Python's own types; NaN as None."""
    tokens = batch.tokens_of(i)
    runs = batch.runs_of(i)
    prompt = batch.prompt(i)
    return {
        "prompt": (prompt.prompt_id, prompt.token_ids.tolist(), prompt.images, prompt.videos),
        "marked": prompt.marked_token_ids.tolist(),
        "key": batch.keys[i],
        "tokens": batch.response_tokens[tokens].tolist(),
        "logprobs": batch.logprobs[tokens].tolist(),
        "loss_mask": batch.loss_mask[tokens].tolist(),
        "seed": int(batch.seeds[i]),
        "versions": np.repeat(batch.versions[runs], batch.version_lengths[runs]).tolist(),
        "finish": (batch.finish_reasons[i], batch.failures[i]),
        "verdicts": batch.verdicts[i],
        "reward": None if math.isnan(batch.rewards[i]) else float(batch.rewards[i]),
        "advantages": batch.columns["advantages"][tokens].tolist() if "advantages" in batch.columns else None,
        "length": int(batch.lengths[i]),
    }


def rows(batch: TokenBatch) -> list[dict[str, object]]:
    return [plain(batch, i) for i in range(len(batch))]


@given(token_batches())
@settings(max_examples=150, deadline=None)
def test_bytes_give_the_same_batch_back(batch: TokenBatch) -> None:
    again = TokenBatch.from_bytes(batch.to_bytes())
    assert rows(again) == rows(batch)
    assert [p.prompt_id for p in again.prompts] == [p.prompt_id for p in batch.prompts]
    for name in batches.BINARY:
        assert getattr(again, name).dtype == getattr(batch, name).dtype, name
    assert again.to_bytes() == batch.to_bytes()


@given(token_batches(), st.data())
@settings(max_examples=150, deadline=None)
def test_a_selection_has_the_chosen_rows_in_the_chosen_order(batch: TokenBatch, data: st.DataObject) -> None:
    places = st.integers(0, len(batch) - 1) if len(batch) else st.nothing()
    indices = data.draw(st.lists(places, max_size=8 if len(batch) else 0))
    chosen = batch.select(indices)
    assert rows(chosen) == [plain(batch, i) for i in indices]
    assert {p.prompt_id for p in chosen.prompts} == {batch.prompt(i).prompt_id for i in indices}


@given(token_batches())
@settings(max_examples=100, deadline=None)
def test_pieces_joined_again_are_the_batch(batch: TokenBatch) -> None:
    half = len(batch) // 2
    pieces = [batch.select(range(half)), batch.select(range(half, len(batch)))]
    assert rows(batches.concatenate(pieces)) == rows(batch)


def test_a_continuation_keeps_the_versions_of_the_tokens_as_runs() -> None:
    prompt = Prompt("p", np.array([1, 2], np.int32))
    pieces = [batches.build([prompt], [[7] * n], version=version) for n, version in ((2, 0), (3, 0), (1, 4))]
    joined = batches.extend(batches.extend(pieces[0], pieces[1]), pieces[2])
    assert joined.response_tokens.tolist() == [7] * 6
    assert joined.versions.tolist() == [0, 4]
    assert joined.version_lengths.tolist() == [5, 1]
    assert joined.lengths.tolist() == [8]


def test_a_response_that_has_not_begun_has_no_version() -> None:
    batch = batches.build([Prompt("p", np.array([1], np.int32))], [[]], version=3)
    assert len(batch.versions) == 0 and batch.version_offsets.tolist() == [0, 0]


def test_prompts_of_one_id_but_other_tokens_stay_apart() -> None:
    first, second = (batches.build([Prompt("same", np.array([n], np.int32))], [[5]]) for n in (1, 2))
    joined = batches.concatenate([first, second, first])
    assert [p.token_ids.tolist() for p in joined.prompts] == [[1], [2], [1]]
    assert [joined.prompt(i).token_ids.tolist() for i in range(3)] == [[1], [2], [1]]


@pytest.mark.parametrize(
    ("column", "value"), [("rewards", np.zeros(3)), ("logprobs", np.zeros(1, np.float32)), ("finish_reasons", [])]
)
def test_columns_that_do_not_fit_are_refused_by_name(column: str, value: object) -> None:
    batch = batches.build([Prompt("p", np.array([1], np.int32))], [[5, 6]])
    with pytest.raises(ValueError, match=rf"TokenBatch\.{column} has \d entries"):
        TokenBatch(**{**vars(batch), column: value})


def test_verdicts_do_not_fill_the_header_which_safetensors_limits() -> None:
    batch = batches.build([Prompt("p", np.array([1], np.int32))], [[5, 6]])
    batch.verdicts[0] = {"judge": {"raw": "a long answer " * 1000}}
    data = batch.to_bytes()
    header_size = int.from_bytes(data[:8], "little")
    assert header_size < 4096
    assert TokenBatch.from_bytes(data).verdicts == batch.verdicts


@pytest.mark.parametrize("cut", [0, 12, 100, -1])
def test_a_part_of_the_bytes_is_no_batch(cut: int) -> None:
    data = batches.build([Prompt("p", np.array([1], np.int32))], [[5, 6]]).to_bytes()[:cut]
    with pytest.raises(ValueError, match=f"{len(data)} bytes hold no TokenBatch"):
        TokenBatch.from_bytes(data)


def test_other_bytes_are_no_batch() -> None:
    with pytest.raises(ValueError, match="12 bytes hold no TokenBatch"):
        TokenBatch.from_bytes(b"no batch at ")
