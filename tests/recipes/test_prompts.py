"""Rows in a fixed order that is a function of seed and position, and their token ids."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recipes.data.processor import prompt_tokens
from recipes.data.row_order import NEVER, Curriculum, interleaved, ordered, permuted, scheduled, shuffled
from recipes.data.rows import SFT_FIELDS, load_rows
from recipes.data.sft_examples import episode_tokens
from recipes.errors import ConfigError
from tests.recipes import tiny

MIX = {"harmful": 3, "borderline": 2, "benign": 2, "task": 3}
ROW = {"id": "a", "label": "safety", "kind": "benign", "prompt": "p"}


def rows_of(counts: dict[str, int]) -> list[dict[str, Any]]:
    return [{"id": f"{kind}{i}", "kind": kind} for kind, count in counts.items() for i in range(count)]


def mixed(rows: Any, mix: dict[str, int], step: int, count: int, seed: int) -> list[Any]:
    """One mix all along."""
    return scheduled(rows, [(0, mix)], step, count, seed)


def ids(rows: Any) -> list[str]:
    return [row["id"] for row in rows]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny.make_tokenizer()


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], r"rows\.jsonl: holds no rows"),
        ([json.dumps(ROW), "{"], r"rows\.jsonl:2: not JSON"),
        (["[1]"], r"rows\.jsonl:1: not a JSON object but list"),
        ([json.dumps({**ROW, "kind": ""})], r"rows\.jsonl:1: field 'kind' is missing or empty; every row needs"),
        ([json.dumps({**ROW, "prompt": 3})], r"rows\.jsonl:1: field 'prompt' is 3; write text: '3'"),
        ([json.dumps({**ROW, "id": 7})], r"rows\.jsonl:1: field 'id' is 7; write text: '7'$"),
        ([json.dumps({k: v for k, v in ROW.items() if k != "label"})], r"rows\.jsonl:1: field 'label' is missing"),
        ([json.dumps(ROW), json.dumps(ROW)], r"rows\.jsonl:2: id 'a' occurs twice; make ids unique"),
    ],
)
def test_a_broken_file_is_named_with_line_and_field(tmp_path: Path, lines: list[str], message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(ConfigError, match=message):
        load_rows(str(path))


def test_rows_are_loaded_in_order_with_all_their_fields(tmp_path: Path) -> None:
    rows = [{**ROW, "id": str(i), "keywords": ["ü"]} for i in range(3)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    assert [*load_rows(str(path))] == rows
    with pytest.raises(ConfigError, match="'response' is missing"):
        load_rows(str(path), SFT_FIELDS)


@given(size=st.integers(1, 400), key=st.text(max_size=5))
def test_the_keyed_permutation_is_one(size: int, key: str) -> None:
    assert sorted(permuted(place, size, key) for place in range(size)) == list(range(size))


def test_every_order_of_five_rows_is_equally_frequent() -> None:
    """Chi-squared over the 120 orders, within four deviations of its mean."""
    counts = Counter(tuple(permuted(place, 5, str(key)) for place in range(5)) for key in range(6000))
    statistic = sum((count - 50) ** 2 / 50 for count in counts.values()) + 50 * (120 - len(counts))
    assert abs(statistic - 119) < 4 * (2 * 119) ** 0.5


@given(size=st.integers(1, 60), window=st.integers(1, 30), seed=st.integers(0, 9))
def test_no_row_comes_back_within_the_window(size: int, window: int, seed: int) -> None:
    """In each epoch every row, at any size that the window allows."""
    window = min(window, size // 2 + 1)
    stream = [ordered(position, size, seed, window) for position in range(5 * size)]
    for epoch in range(5):
        assert sorted(stream[epoch * size : (epoch + 1) * size]) == list(range(size))
    assert all(len(set(stream[i : i + window])) == window for i in range(len(stream) - window + 1))


def test_a_far_place_of_large_data_is_found_at_once() -> None:
    """Ten million rows, a thousandth epoch: by computing it, not by going there."""
    size = 10_000_000
    begin = 1000 * size
    assert len({ordered(begin + place, size, 1, 100) for place in range(-200, 400)}) == 600


@given(size=st.integers(1, 12), start=st.integers(0, 40), count=st.integers(0, 40), seed=st.integers(0, 5))
def test_shuffled_is_one_stream_cut_anywhere(size: int, start: int, count: int, seed: int) -> None:
    rows = rows_of({"a": size})
    stream = shuffled(rows, 0, start + count, seed)
    assert shuffled(rows, start, count, seed) == stream[start:]
    for epoch in range(len(stream) // size):
        assert sorted(ids(stream[epoch * size : (epoch + 1) * size])) == sorted(ids(rows))


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    rows = rows_of({"a": 20})
    first, second = shuffled(rows, 0, 20, 1), shuffled(rows, 20, 20, 1)
    assert first != second
    assert first != shuffled(rows, 0, 20, 2)
    assert first != rows


def test_mixed_keeps_the_shares_exactly_and_spreads_them() -> None:
    cycle = interleaved(MIX)
    assert Counter(cycle) == MIX
    assert all(a != b for a, b in zip(cycle, cycle[1:] + cycle[:1], strict=True))
    rows = rows_of(dict.fromkeys(MIX, 12))
    for step in range(7):
        assert Counter(row["kind"] for row in mixed(rows, MIX, step, 10, 1)) == MIX


@given(count=st.integers(1, 20), seed=st.integers(0, 3))
def test_mixed_steps_are_cuts_of_one_stream_that_covers_each_kind_per_epoch(count: int, seed: int) -> None:
    sizes = {"harmful": 11, "borderline": 7, "benign": 6, "task": 13}
    rows = rows_of(sizes)
    steps = -(-120 // count)
    stream = [row for step in range(steps) for row in mixed(rows, MIX, step, count, seed)]
    for kind, size in sizes.items():
        of_kind = ids(row for row in stream if row["kind"] == kind)
        for epoch in range(len(of_kind) // size):
            assert len(set(of_kind[epoch * size : (epoch + 1) * size])) == size
    for end in range(0, len(stream), 10):
        assert Counter(row["kind"] for row in stream[:end]) == {k: n * (end // 10) for k, n in MIX.items() if end}


@given(count=st.integers(1, 20), step=st.integers(0, 50), seed=st.integers(0, 3))
def test_no_prompt_occurs_twice_in_a_step(count: int, step: int, seed: int) -> None:
    """Also where a step draws from the end of one epoch and the start of the next."""
    rows = rows_of(dict.fromkeys(MIX, 10))
    batch = mixed(rows, MIX, step, count, seed)
    assert len(batch) == count
    assert len(set(ids(batch))) == count


KIND_SIZES = {"harmful": 23, "benign": 19, "task": 21}
PHASES = [(0, {"harmful": 1, "task": 3}), (4, {"harmful": 2, "benign": 2, "task": 1}), (9, {"benign": 1})]


@given(count=st.integers(1, 9), seed=st.integers(0, 3), cut=st.integers(0, 14))
def test_a_curriculum_changes_the_mix_and_skips_nothing(count: int, seed: int, cut: int) -> None:
    """Each kind's stream goes on where it stopped: whatever the phases, its rows come in the order of one stream. A
    step depends on its number alone, so a resumed run needs no state."""
    rows = rows_of(KIND_SIZES)
    steps = [ids(scheduled(rows, PHASES, step, count, seed)) for step in range(15)]
    assert steps[cut:] == [ids(scheduled(rows, PHASES, step, count, seed)) for step in range(cut, 15)]
    drawn = [name for step in steps for name in step]
    window = {kind: max(-(-count // sum(m.values())) * m[kind] for _, m in PHASES if kind in m) for kind in KIND_SIZES}
    for kind, size in KIND_SIZES.items():
        of_kind = [name for name in drawn if name.startswith(kind)]
        expected = [f"{kind}{ordered(position, size, seed, window[kind])}" for position in range(len(of_kind))]
        assert of_kind == expected
    for (begin, mix), end in zip(PHASES, (4, 9, 15), strict=True):
        kinds = [name.rstrip("0123456789") for step in steps[begin:end] for name in step]
        total = sum(mix.values())
        for cycle in range(len(kinds) // total):
            assert Counter(kinds[cycle * total : (cycle + 1) * total]) == mix
    assert all(len(set(step)) == count for step in steps)


@given(data=st.data(), count=st.integers(1, 9), seed=st.integers(0, 3))
def test_a_phase_begins_with_the_first_draw_for_its_step(data: st.DataObject, count: int, seed: int) -> None:
    """However many draws a step makes, also none. No kind's stream skips a row, and a curriculum that goes on from a
    checkpoint's draws gives what the undisturbed one gives, for the draws before the checkpoint too."""
    rows = rows_of(KIND_SIZES)
    draws_of_steps = data.draw(st.lists(st.integers(0, 3), min_size=12, max_size=12))
    cut = data.draw(st.integers(0, 12))
    curriculum = Curriculum(PHASES)
    drawn: list[list[str]] = []
    resumed: list[Curriculum] = []
    for step, draws in enumerate([*draws_of_steps, 1]):
        if step == cut:
            resumed.append(Curriculum(PHASES))
            resumed[0].resume(curriculum.state(), step, len(drawn))
        for each in (curriculum, *resumed):
            each.reach(step, len(drawn))
        mix = [mix for first_step, mix in PHASES if first_step <= step][-1]
        for _ in range(draws):
            drawn.append(ids(scheduled(rows, curriculum.of_draws(), len(drawn), count, seed)))
            assert {name.rstrip("0123456789") for name in drawn[-1]} <= mix.keys()
    again = [ids(scheduled(rows, resumed[0].of_draws(), draw, count, seed)) for draw in range(len(drawn))]
    assert again == drawn
    for kind, size in KIND_SIZES.items():
        of_kind = [name for of_draw in drawn for name in of_draw if name.startswith(kind)]
        window = max(-(-count // sum(mix.values())) * mix[kind] for _, mix in PHASES if kind in mix)
        assert of_kind == [f"{kind}{ordered(place, size, seed, window)}" for place in range(len(of_kind))]


def test_a_curriculum_that_was_changed_goes_by_its_present_steps() -> None:
    """Between phases that have begun another one has had no draw; one that is put off has not begun."""
    first, second = {"a": 1}, {"b": 1}
    state = [(0, 0), (10, 25)]
    for phases, expected in [
        ([(0, first), (10, second)], [0, 25]),
        ([(0, first), (100, second)], [0, NEVER]),
        ([(0, first), (5, second), (10, first)], [0, 25, 25]),
        ([(0, first), (10, second), (15, first), (20, second)], [0, 25, 40, NEVER]),
    ]:
        curriculum = Curriculum(phases)
        curriculum.resume(state, finished=20, draws=40)
        assert [draw for draw, _ in curriculum.of_draws()] == expected
    curriculum.reach(20, 40)
    assert [draw for draw, _ in curriculum.of_draws()] == [0, 25, 40, 40]


def test_one_draw_a_step_begins_the_phases_with_their_steps() -> None:
    curriculum = Curriculum(PHASES)
    for step in range(12):
        curriculum.reach(step, step)
    assert curriculum.of_draws() == PHASES


def test_one_phase_is_the_mix() -> None:
    rows = rows_of(dict.fromkeys(MIX, 12))
    for step in range(5):
        assert scheduled(rows, [(0, MIX), (3, MIX)], step, 10, 1) == mixed(rows, MIX, step, 10, 1)


def test_a_kind_with_too_few_rows_is_refused() -> None:
    rows = rows_of({**dict.fromkeys(MIX, 6), "task": 3})
    with pytest.raises(ConfigError, match=r"'task', of which data\.prompts holds 3 rows; 4 are needed"):
        mixed(rows, MIX, 0, 10, 1)
    with pytest.raises(ConfigError, match=r"'joke', of which data\.prompts holds 0 rows; its kinds are .*task"):
        mixed(rows, {"joke": 1}, 0, 1, 1)
    with pytest.raises(ConfigError, match=r"data\.curriculum has 'joke', of which data\.prompts holds 0 rows"):
        scheduled(rows, [(0, {"task": 1}), (7, {"joke": 1})], 0, 1, 1)


def test_prompt_tokens_are_the_chat_template_with_an_open_answer(tokenizer: Any) -> None:
    tokens = prompt_tokens(tokenizer, {"id": "x", "prompt": "the task prompt 1"}, 40)
    text = "<|im_start|>user\nthe task prompt 1<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(tokens) == text
    assert tokens == tokenizer.encode(text, add_special_tokens=False)
    assert tokens.count(tokenizer.eos_token_id) == 1


def test_a_prompt_that_is_too_long_is_named(tokenizer: Any) -> None:
    row = {"id": "x", "prompt": "the task prompt 1"}
    length = len(prompt_tokens(tokenizer, row, 40))
    assert len(prompt_tokens(tokenizer, row, length)) == length
    with pytest.raises(ConfigError, match=rf"row 'x' has {length} prompt tokens, data.max_prompt_tokens={length - 1}"):
        prompt_tokens(tokenizer, row, length - 1)


def test_response_tokens_end_the_turn_once(tokenizer: Any) -> None:
    tokens, loss_mask = episode_tokens(tokenizer, {"id": "x", "response": "the answer"})
    assert tokens[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(tokens[:-1]) == "the answer"
    assert tokenizer.eos_token_id not in tokens[:-1]
    assert loss_mask == [True] * len(tokens)
