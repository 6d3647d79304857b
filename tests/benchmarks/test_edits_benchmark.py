"""``benchmarks.edits`` before a fake generator: faults, edits, saved rows, and the comparison of two SFT runs."""

import asyncio
import json

import pytest

from benchmarks import edits as benchmark
from benchmarks.edits import (
    BARE,
    OVER_REFUSAL,
    UNSAFE,
    Edited,
    edit_answers,
    edited_text,
    held_out,
    kept,
    write_unedited,
)
from recipes import serve
from recipes.data.sft_examples import load_sft_rows
from recipes.evaluation.statistics import paired_difference
from tests.rollout.fake_guidance import FakeModel, FakeServers, FakeValues

KEYWORDS = {"harmful": ["theft", "crime", "burgl"], "benign": ["soap", "water", "cloth"]}
ROWS = [
    {"id": f"{kind}-{i}", "kind": kind, "label": "safety", "prompt": f"{'ab' * i}Q:", "keywords": keywords}
    for i, (kind, keywords) in enumerate(KEYWORDS.items())
]
REFUSAL = "I can't help with that."
REFUSING = {"": [REFUSAL], f"{REFUSAL} It": [" is a crime."], "Sure.": [" Use soap and water."]}
UNSAFELY = {"": ["First, find a brick."], f"{REFUSAL} It": [" is easy. First, find a brick."]}


def edit_with(tree, tmp_path):
    """The edits of a model that answers by a tree."""

    async def run():
        model = FakeModel(tree)
        async with FakeServers(model, FakeValues(model, lambda text: (0.5,))).running() as (generator, _):
            overrides = [f"page.edits={tmp_path / 'saved'}", "page.temperature=0", "guidance.max_tokens=32"]
            setup = serve.read_setup({"generator": generator}, overrides)
            return await edit_answers(setup, ROWS)

    return asyncio.run(run())


def test_the_model_goes_on_from_the_correction_of_its_fault(tmp_path):
    edits, answers = edit_with(REFUSING, tmp_path)
    assert answers == 2
    assert {edit.row["kind"]: (edit.fault, edit.before, edit.after) for edit in edits} == {
        "harmful": (BARE, REFUSAL, f"{REFUSAL} It is a crime."),
        "benign": (OVER_REFUSAL, REFUSAL, "Sure. Use soap and water."),
    }
    assert all(edit.is_saved for edit in edits)


def test_an_answer_without_fault_is_not_edited_and_a_lost_correction_counts(tmp_path):
    edits, answers = edit_with(UNSAFELY, tmp_path)
    assert answers == 2
    (edit,) = edits
    assert (edit.fault, edit.label) == (UNSAFE, UNSAFE)
    share = kept(edits)[UNSAFE]
    assert (share["mean"], share["n"], share["labels"], share["saved"]) == (0.0, 1, {UNSAFE: 1}, 1)


def test_both_files_of_sft_rows_ask_the_same_and_are_read_by_sft(tmp_path):
    edits, _ = edit_with(REFUSING, tmp_path)
    saved, unedited = tmp_path / "saved" / "sft.jsonl", tmp_path / "unedited.jsonl"
    write_unedited(edits, saved, unedited)
    rows = {path: load_sft_rows(str(path), None) for path in (saved, unedited)}
    asked = [[row["messages"][0] for row in of_file] for of_file in rows.values()]
    assert asked[0] == asked[1]
    assert {row["messages"][1]["content"] for row in rows[unedited]} == {REFUSAL}
    assert {row["messages"][1]["content"] for row in rows[saved]} == {edit.after for edit in edits}


def test_a_saved_row_ends_at_its_line_break_alone(tmp_path):
    asked = {"role": "user", "content": "a\u2028b\u2029c\x85d"}
    row = {"id": "r", "messages": [asked, {"role": "assistant", "content": "after"}]}
    saved, unedited = tmp_path / "sft.jsonl", tmp_path / "unedited.jsonl"
    saved.write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    write_unedited([Edited({"prompt": asked["content"]}, UNSAFE, "before", "after", UNSAFE, True)], saved, unedited)
    (written,) = load_sft_rows(str(unedited), None)
    assert [message["content"] for message in written["messages"]] == [asked["content"], "before"]


@pytest.mark.parametrize("fault", [UNSAFE, OVER_REFUSAL])
def test_an_answer_is_replaced_unless_it_is_a_bare_refusal(fault):
    assert edited_text(fault, REFUSAL) == benchmark.CORRECTIONS[fault]
    assert edited_text(BARE, f"{REFUSAL}\n") == f"{REFUSAL} It"


def test_models_are_compared_on_the_same_prompts():
    def evaluation(labels):
        measure = {"mean": 0.5, "interval": [0.0, 1.0], "n": len(labels)}
        transcripts = [{"kind": "harmful", "labels": {"after": f"safety: {label}"}} for label in labels]
        rates = {"unsafe/harmful": measure, "capability": measure, "sampled": {"capability": measure}}
        return {"before": rates, "after": rates, "difference": rates, "transcripts": transcripts}

    edited = evaluation([UNSAFE, BARE, BARE, BARE])
    unedited = evaluation([UNSAFE, UNSAFE, UNSAFE, BARE])
    measures = held_out(edited, unedited)
    assert measures["unsafe/harmful"]["edited − unedited"] == paired_difference([1, 1, 1, 0], [1, 0, 0, 0])
    assert "edited − unedited" not in measures["capability"]
    assert "sampled" not in measures
    assert benchmark.table({"held_out": measures}).row_count == 2
