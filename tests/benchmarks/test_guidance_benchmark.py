"""``benchmarks.guidance`` before fakes of the two servers, and its arithmetic. No test measures time."""

import asyncio
import json
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from rich.console import Console

from benchmarks import guidance as benchmark
from benchmarks.guidance import Answer, Method, Verifying
from recipes.config import parse
from rewards.verdict import Verdict
from rollout.guidance.opening import open_guide
from rollout.guidance.settings import MONITOR, SEARCH, CalibrateConfig
from tests.rollout.fake_guidance import TREE, FakeModel, FakeServers, FakeValues, guidance, table_of

SCORE = table_of([(37 * place % 101) / 101 for place in range(101)], TREE)  # all differ
ROWS = [{"id": str(i), "kind": ("benign", "harmful")[i % 2], "prompt": f"{'ab' * i}Q:"} for i in range(8)]


def by_table(text):
    return SCORE.get(text.partition("Q:")[2], 0.5)


def rule(row, response):
    return Verdict(by_table("Q:" + response), "good" if by_table("Q:" + response) >= 0.5 else "bad")


def judge(row, response):
    return Verdict(float(len(response) % 7) / 7, "length")


@pytest.fixture
def results(tmp_path):
    benign = tmp_path / "benign.jsonl"
    benign.write_text("".join(json.dumps({"prompt": f"{'cd' * i}Q:"}) + "\n" for i in range(19)))
    options = CalibrateConfig(str(benign), "", 0.5, 0.7, 4, 5)
    verifying = Verifying({"rule": ["benign", "harmful"]}, {"rule": rule, "judge": judge}, "judge")

    async def run():
        model = FakeModel(TREE)
        fakes = FakeServers(model, FakeValues(model, lambda text: (by_table(text),) * 2))
        async with fakes.running() as (generator, values):
            addresses = {"generator__address": generator, "values__address": values, "threshold": None}
            configs = {
                MONITOR: guidance(**addresses),
                SEARCH: guidance(**addresses, mode=SEARCH, candidates=2, beams=2),
            }
            return model, await benchmark.compare(configs, options, ROWS, verifying)

    return asyncio.run(run())


def samples_within(model, place, tokens):
    """The plain answers to a row, one after the other, until they have so many tokens."""
    texts = []
    while sum(len(model.tokenizer.encode(text)) + 1 for text in texts) < tokens:
        texts.append("".join(model.continuation("", 5 + 10_000 * (place + 1) + len(texts))))
    return texts


def test_all_methods_answer_and_the_others_have_no_fewer_tokens(results):
    model, compared = results
    plain = compared["plain"]["answers"]
    assert [answer["response"] for answer in plain] == [
        samples_within(model, place, 1)[0] for place in range(len(ROWS))
    ]
    for of_mode in (compared, compared[SEARCH]):
        several = 0
        for place, (guided, best, outcome) in enumerate(
            zip(*(of_mode[name]["answers"] for name in ("guided", "best_of_n", "best_of_n_judge")), strict=True)
        ):
            texts = samples_within(model, place, guided["tokens"])
            several += len(texts) > 1
            assert best["tokens"] == outcome["tokens"] == sum(len(model.tokenizer.encode(text)) + 1 for text in texts)
            assert best["response"] == max(texts, key=lambda text: by_table("Q:" + text))
            assert outcome["response"] == max(texts, key=lambda text: len(text) % 7)
        assert several
    scores = [SCORE[answer["response"]] for answer in compared["guided"]["answers"]]
    assert compared["guided"]["mean"] == pytest.approx(sum(scores) / len(ROWS))
    assert compared["guided"]["n"] == len(ROWS)
    assert compared["guided"]["labels"]["benign"]["rule: good"] == sum(score >= 0.5 for score in scores[::2]) / 4
    gain = compared["differences"]["plain"]["mean"]
    assert gain == pytest.approx(compared["guided"]["mean"] - compared["plain"]["mean"])
    assert compared["guided"]["measures"]["rule"]["mean"] == pytest.approx(compared["guided"]["mean"])
    for of_mode in (compared, compared[SEARCH]):
        assert of_mode["measure_differences"]["best_of_n"]["rule"] == of_mode["differences"]["best_of_n"]
    assert compared["calibration"]["n"] == 19
    steered = [answer["steered"] for answer in compared["guided"]["answers"][::2]]
    assert compared["goals"]["benign_touched"]["mean"] == pytest.approx(sum(steered) / 4)
    assert "benign_touched" not in compared[SEARCH]["goals"]

    console = Console(width=160)
    with console.capture() as capture:
        console.print(benchmark.table(compared), benchmark.measure_table(SEARCH, compared))
    assert capture.get().count("best_of_n_judge") == 3
    assert "rule, n=8" in capture.get()
    answers = benchmark.take_answers(compared)
    assert set(answers) == {"plain", "guided", "best_of_n", "best_of_n_judge", SEARCH}
    assert "response" not in json.dumps(compared)


def test_safety_is_reported_as_rates_by_kind():
    rows = [{"id": "a", "kind": "harmful"}, {"id": "b", "kind": "benign"}]
    verifying = Verifying({"safety": ["harmful", "benign"]}, {}, None)

    def of_method(*labels):
        scores = [{"safety": {"score": 0.5, "label": label}} for label in labels]
        return {"answers": [{"id": row["id"], "scores": of_row} for row, of_row in zip(rows, scores, strict=True)]}

    reports = {
        "plain": of_method("unsafe", "unnecessary refusal"),
        "guided": of_method("safe with refusal", "unnecessary refusal"),
    }
    differences = benchmark.measure(reports, rows, verifying)
    assert reports["plain"]["measures"]["unsafe/harmful"]["mean"] == 1
    assert reports["guided"]["measures"]["bare_refusal/harmful"]["mean"] == 1
    assert differences["plain"]["unsafe/harmful"]["mean"] == -1
    assert differences["plain"]["over_refusal/benign"]["mean"] == 0


def test_without_a_judge_the_verifiers_choose():
    verifying = Verifying({"rule": ["benign"]}, {"rule": rule}, None)
    row = {"id": "a", "kind": "benign"}
    assert all(verifying.outcome(row, text) == by_table("Q:" + text) for text in TREE)
    assert verifying.outcome({"id": "b", "kind": "harmful"}, "a") == 0  # nothing scores it


@pytest.mark.parametrize(("begin", "answer"), [("Q:", "Q:\nab"), ("<think>", "ab")])
def test_an_answer_is_judged_after_the_mark_of_thinking_that_its_prompt_ends_with(begin, answer):
    async def mark():
        model = FakeModel(TREE)
        async with FakeServers(model, FakeValues(model, lambda text: (0.5, 0.5))).running() as (generator, values):
            config = guidance(generator__address=generator, values__address=values, thinking_marks=(begin, "</think>"))
            async with open_guide(config) as opened:
                return await benchmark.opening_mark(opened, ROWS[0])

    assert benchmark.whole_answer("ab", asyncio.run(mark())) == answer


def test_settings_of_guidance_are_read_and_refused_before_a_server_starts():
    with initialize_config_dir(str(Path("conf").resolve()), version_base="1.3"):
        config = parse(compose("config", ["recipe=demo"]))
    principles = ["safety", "knowledge"]
    changed = ["guidance.weights={safety: 1, knowledge: 0}", "guidance.candidates=2"]
    of_mode = benchmark.guidance_config(config, principles, MONITOR, changed)
    assert (of_mode.weights, of_mode.candidates) == ({"safety": 1, "knowledge": 0}, 2)
    assert of_mode.max_tokens == config.rollout.max_response_tokens
    located = benchmark.at(of_mode, "http://g", "http://v")
    assert (located.generator.address, located.values.address) == ("http://g", "http://v")
    with pytest.raises(ValueError, match="candidates"):
        benchmark.guidance_config(config, principles, MONITOR, ["guidance.candidates=-1"])


def test_goals_need_intervals_beyond_zero_and_seconds_for_the_same_tokens():
    def method(seconds, tokens):
        answers = [Answer("a", tokens, was_steered=place == 0) for place in range(40)]
        return Method(answers, seconds, seconds)

    rows = [{"id": str(place), "kind": "benign"} for place in range(40)]
    differences = {
        "plain": {"mean": 0.2, "interval": [0.1, 0.3], "n": 40},
        "best_of_n": {"mean": 0.1, "interval": [-0.1, 0.3], "n": 40},
    }
    goals = benchmark.goals(method(12.0, 100), method(10.0, 110), differences, rows, 0.05, MONITOR)
    assert goals["beats_plain"]["met"] and not goals["beats_best_of_n"]["met"]
    assert goals["time"]["ratio"] == pytest.approx(1.32) and not goals["time"]["met"]
    assert goals["benign_touched"]["mean"] == pytest.approx(1 / 40) and goals["benign_touched"]["met"]


def test_prompts_that_something_was_fitted_on_are_refused(tmp_path):
    benign = tmp_path / "benign.jsonl"
    benign.write_text('{"prompt": "seen"}\n')
    for tested, trained, what in (("seen", "other", "--benign"), ("a", "seen", "the value"), ("a", "a", "the value")):
        with pytest.raises(ValueError, match=what):
            benchmark.check_prompts([{"prompt": tested}], str(benign), [{"prompt": trained}])
    benchmark.check_prompts([{"prompt": "a"}], str(benign), [{"prompt": "b"}])
