"""``benchmarks.search`` before a fake server, and its arithmetic by hand. No test measures time."""

import asyncio
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import pytest
from rich.console import Console

from benchmarks import search as benchmark
from benchmarks.search import Asked, Sample
from recipes.evaluation.statistics import mean_interval
from rollout.deliberation.voting import Reply
from tests.rollout.fake_guidance import FakeServers, FakeValues
from tests.rollout.fake_searcher import ENVIRONMENT, HF_TOKENIZER, SCRIPTS, FakeSearcher, deliberation

ROWS = [
    {"id": "a", "label": "search", "kind": "read", "prompt": "What is the capital of Norland?", "answer": "Veska"},
    {"id": "b", "label": "search", "kind": "missing", "prompt": "Which ruler does Norland have?", "answer": "Ombra"},
]


def sample(answer, confidence, right):
    certain = "certain" if confidence is None or confidence >= 5 else "uncertain"
    return Sample(Reply(answer, confidence), right, f"{str(right).lower()} {certain}", True, 10, "")


def test_a_run_s_rows_are_asked_and_judged_by_the_verifiers(tmp_path):
    HF_TOKENIZER.save_pretrained(tmp_path)
    model = FakeSearcher()

    async def run():
        fakes = FakeServers(model, FakeValues(model, lambda text: ()), str(tmp_path))
        async with fakes.running() as (generator, _):
            config = deliberation(generator__address=generator, samples=6)
            return await benchmark.ask(config, ENVIRONMENT, ROWS, seed=1, concurrency=2)

    first, second = asyncio.run(run())
    assert [asked.row["id"] for asked in (first, second)] == ["a", "b"]
    # The six samples follow the three scripts twice, in the order in which the server got them.
    samples = sorted((s.reply.answer, s.reply.confidence, s.outcome, s.is_legal) for s in first.samples)
    assert samples == [
        ("Tarn", 1, "false uncertain", True),
        ("Tarn", 1, "false uncertain", True),
        ("Tarn", 2, "false uncertain", True),
        ("Tarn", 2, "false uncertain", True),
        ("Veska", 9, "true certain", True),
        ("Veska", 9, "true certain", True),
    ]
    assert {s.outcome for s in second.samples} == {"false certain", "false uncertain"}
    assert len({options["seed"] for _, options in model.requests}) == len(model.requests), "noise of their own"
    read = next(s for s in first.samples if s.reply.confidence == 9)
    assert read.response.startswith(SCRIPTS[0][0] + "<result>[norland]") and read.response.count("<result>") == 2


def test_the_figures_by_hand():
    right, wrong = sample("Veska", 9, True), sample("Tarn", 2, False)
    asked = [
        Asked(ROWS[0], [wrong, replace(wrong, reply=Reply("tarn", 1)), right, wrong, right, right, wrong, right]),
        Asked(ROWS[1], [sample("x", 8, False), sample(None, None, False)] * 4),
    ]
    result = benchmark.report(asked)
    assert (result["questions"], result["answers"], result["kinds"]) == (2, 16, {"read": 1, "missing": 1})
    # Row b is never right. Of row a's samples half are right; of its pairs by majority the first of two different
    # answers wins: T T | V T | V V | T V.
    assert result["accuracy"]["1"]["majority"] == mean_interval(
        [0, 0, 1, 0, 1, 1, 0, 1] + [0] * 8, ["a"] * 8 + ["b"] * 8
    )
    assert result["accuracy"]["2"]["majority"]["mean"] == pytest.approx((2 / 4 + 0) / 2)
    assert result["accuracy"]["2"]["confidence_weighted"]["mean"] == pytest.approx((3 / 4 + 0) / 2)
    # T t V T: by majority wrong, 2 + 1 + 2 against 9; V V T V right.
    assert result["accuracy"]["4"]["majority"]["mean"] == pytest.approx((1 / 2 + 0) / 2)
    assert result["accuracy"]["4"]["confidence_weighted"]["mean"] == pytest.approx((1 + 0) / 2)
    assert list(result["accuracy"]) == ["1", "2", "4", "8"]
    assert result["false_certain"]["mean"] == pytest.approx((0 + 1) / 2), "an unstated confidence counts as certain"
    assert result["stated"]["mean"] == pytest.approx((1 + 0.5) / 2)
    # Of 12 answers: 1 with 0.1 and 3 with 0.2 are wrong, 4 with 0.9 are right, 4 with 0.8 are wrong.
    one = result["calibration"]["one_answer"]
    assert one["n"] == 12 and one["score"] == pytest.approx(4 / 12)
    assert one["ece"]["mean"] == pytest.approx((0.1 + 3 * 0.2 + 4 * 0.1 + 4 * 0.8) / 12)
    # Of the votes of all eight: 4 to 4, the first wins, or 36 of 43; and all for x.
    majority, weighted = (result["calibration"][name] for name in ("majority", "confidence_weighted"))
    assert (majority["value"], majority["score"]) == (pytest.approx((1 / 2 + 1) / 2), 0)
    assert (weighted["value"], weighted["score"]) == (pytest.approx((36 / 43 + 1) / 2), 1 / 2)
    by_confidence = {row["confidence"]: (row["n"], row["accuracy"]) for row in result["reliability"] if row["n"]}
    assert by_confidence == {1: (1, 0), 2: (3, 0), 8: (4, 0), 9: (4, 1)}
    assert result["four_weighted_minus_most_by_majority"]["mean"] == pytest.approx((1 - 0) / 2)

    picture = ElementTree.fromstring(benchmark.draw(result))
    titles = [title.text for title in picture.iter("{http://www.w3.org/2000/svg}title")]
    assert titles[-1] == "confidence 9: 1.00 of 4 answers are right" and len(titles) == 4
    console = Console(record=True, width=120)
    console.print(benchmark.table(result))
    assert "false and certain 0.500" in console.export_text()


def test_a_question_without_any_answer_has_no_vote():
    asked = [Asked(ROWS[0], [sample(None, None, False)] * 2)]
    result = benchmark.report(asked)
    assert result["calibration"] == {"one_answer": {}, "majority": {}, "confidence_weighted": {}}
    assert result["accuracy"]["2"]["majority"]["mean"] == 0
