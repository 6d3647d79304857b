"""A user's own verifier functions: what is accepted, what is refused and how it is told, and what bounds them."""

import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from rewards import functions, mixing, settings
from rewards.functions import FunctionFailed
from rewards.registry import open_verifiers
from rewards.verdict import Failure, Verdict, Verifier, VerifierResult, as_result, from_json, to_json
from rollout.environment import Segment

CONF = Path(__file__).resolve().parents[2] / "conf"
OWN = "tests.rewards.own"
ROW: dict[str, Any] = {"id": "r1", "label": "l", "kind": "k", "prompt": "?"}


def opened(name: str, arguments: dict[str, Any] | None = None, **limits: Any) -> Verifier:
    raw: Any = OmegaConf.load(CONF / "rewards" / "base.yaml")
    raw.functions = {**raw.functions, **limits}
    path = f"{OWN}.{name}"
    if arguments is None:
        return open_verifiers([path], settings.read(raw), None)[path]
    raw.verifiers = {"mine": {"rule": path, "arguments": arguments}}
    return open_verifiers(["mine"], settings.read(raw), None)["mine"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("number", Verdict(0.25, "0.2")),
        ("integer", Verdict(1.0, "1.0")),
        ("single_precision", Verdict(0.5, "0.5")),
        ("verdict", Verdict(0.0, "r1: 3 words")),
        ("instance", Verdict(0.75, "0.8")),
    ],
)
def test_a_function_returns_a_number_or_a_verdict(name: str, expected: Verdict) -> None:
    result = opened(name)(ROW, "one two three four")
    assert result == expected
    assert from_json(to_json(result)) == result


def test_a_function_has_its_arguments_and_may_give_no_reward() -> None:
    verifier = opened("verdict", {"limit": 4})
    assert verifier(ROW, "one two three four") == Verdict(1.0, "r1: 4 words")
    assert verifier(ROW, "") == Failure("there is no response")


def test_a_function_sees_which_part_the_environment_wrote() -> None:
    verifier = opened("model_words")
    segments = [Segment("a", False), Segment("b", True), Segment("c", False), Segment("d", False)]
    assert verifier({**ROW, "segments": segments}, "abcd") == Verdict(0.75, "0.8")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing", "it returned None (NoneType), not a number from 0 to 1 or a Verdict"),
        ("truth", "it returned True (bool), not a number from 0 to 1 or a Verdict: write float(…) around it"),
        ("text", "it returned '1.0' (str), not a number"),
        ("many", "it returned [1.0] (list), not a number"),
        ("not_a_number", "it returned nan (float), not a number from 0 to 1 or a Verdict"),
        ("two", "it returned 2.0 (float), not a number from 0 to 1 or a Verdict"),
        (
            "verdict_of_two",
            "it raised ValueError: verdict 'too good' has the score 2.0: a verifier gives one in [0, 1]",
        ),
        ("verdict_of_text", "it raised ValueError: verdict 'well' has the score '1.0': a verifier gives one"),
        ("verdict_without_label", "it raised ValueError: verdict with label=None"),
        ("raises", "it raised KeyError: 'no such field' (own.py:"),
        ("exits", "it raised SystemExit: 3 (own.py:"),
        ("dies", "it died"),
    ],
)
def test_what_is_no_result_is_a_failure_that_says_what_is_expected(name: str, message: str) -> None:
    with pytest.raises(FunctionFailed) as caught:
        opened(name)(ROW, "an answer")
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
    assert ('row["no such field"]' in caught.value.traceback) == (name == "raises")


def test_nearly_a_number_is_told_how_it_becomes_one() -> None:
    with pytest.raises(TypeError, match=r"write float\(…\) around it$"):
        as_result(True)
    with pytest.raises(TypeError, match=r"Verdict$"):
        as_result(float("nan"))


def test_a_number_is_a_score_whose_label_is_the_number() -> None:
    assert as_result(0.25) == Verdict(0.25, "0.2")
    assert as_result(1) == Verdict(1.0, "1.0")


def test_a_message_shows_the_beginning_of_a_long_value() -> None:
    with pytest.raises(TypeError, match=rf"^it returned '{'x' * 199}… \(str\), not a number"):
        as_result("x" * 1000)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "one_parameter",
            r"has the parameters \(response: str\) -> float and is called with \(row, response\): too many",
        ),
        ("three_parameters", r"missing a required argument: 'limit'"),
        ("awaits", "is async; a call has a process of its own, so it may simply wait"),
        ("yields", "is async; a call has a process of its own, so it may simply wait"),
        ("Scorer", "is a class, not a function"),
        ("constant", "is 3, not a function"),
    ],
)
def test_what_can_not_be_called_is_refused_when_it_is_opened(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=rf"^verifier '{OWN}\.{name}' .*{message}") as caught:
        opened(name)
    assert "write `def score(row, response)` that returns a number from 0 to 1" in str(caught.value)


def test_arguments_that_the_function_lacks_are_refused() -> None:
    with pytest.raises(ValueError, match=r"an unexpected keyword argument 'limits'.*rewards\.verifiers\.mine\.arg"):
        opened("verdict", {"limits": 3})


def test_a_module_that_can_not_be_imported_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "broken_reward.py").write_text("import os\n\nos.no_such_function()\n")
    raw = OmegaConf.load(CONF / "rewards" / "base.yaml")
    with pytest.raises(
        ValueError, match=r"^'broken_reward.score': its module .*AttributeError.*\(broken_reward.py:3\)"
    ):
        open_verifiers(["broken_reward.score"], settings.read(raw), None)  # type: ignore[arg-type]


def test_a_module_that_this_process_can_import_is_imported_in_the_function_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "reward_of_a_path.py").write_text("def score(row, response):\n    return 0.5\n")
    raw: Any = OmegaConf.load(CONF / "rewards" / "base.yaml")
    verifier = open_verifiers(["reward_of_a_path.score"], settings.read(raw), None)["reward_of_a_path.score"]
    assert verifier(ROW, "an answer") == Verdict(0.5, "0.5")


def test_a_call_that_holds_the_interpreter_is_killed_with_its_children_and_holds_nobody_up(tmp_path: Path) -> None:
    verifier = opened("holds_the_interpreter", timeout=3, processes=1)
    turns = []
    ended = threading.Event()

    def count() -> None:
        while not ended.wait(0.01):
            turns.append(1)

    clock = threading.Thread(target=count)
    clock.start()
    with pytest.raises(FunctionFailed, match=r"it took more than 3 s: .* rewards\.functions\.timeout"):
        verifier({**ROW, "pids": str(tmp_path / "pids")}, "x")
    ended.set()
    clock.join()
    assert len(turns) > 10  # a thread of this process went on meanwhile
    for pid in (tmp_path / "pids").read_text().split():
        deadline = time.monotonic() + 60
        while running(int(pid)):  # a killed process that we did not start ends a moment later
            assert time.monotonic() < deadline
            time.sleep(0.01)


def running(pid: int) -> bool:
    """Whether the process is there and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_after_a_call_that_was_killed_the_next_one_works() -> None:
    verifier = opened("sleeps", timeout=2, processes=1)
    with pytest.raises(FunctionFailed, match="it took more than 2 s"):
        verifier({**ROW, "hangs": True}, "x")
    assert verifier(ROW, "x") == Verdict(1.0, "1.0")


def test_a_function_that_always_hangs_is_not_called_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(functions, "LATE_IN_A_ROW", 2)
    verifier: Any = opened("sleeps", timeout=2, processes=1)
    hanging = {**ROW, "hangs": True}
    for row in (hanging, ROW, hanging, hanging):  # a verdict in between begins the count anew
        result = mixing.verify(row, "x", ["mine"], {"mine": verifier})["mine"]
        assert isinstance(result, Failure) == (row is hanging)
    assert mixing.verify(ROW, "x", ["mine"], {"mine": verifier})["mine"] == Failure(
        "it was not called: 2 verdicts in a row took more than 2 s"
    )


def test_a_process_is_kept_and_one_that_died_meanwhile_is_replaced() -> None:
    verifier: Any = opened("number", processes=3)
    verifier(ROW, "x")
    (first,) = [process for process in verifier.pool.free.queue if process is not None]
    verifier(ROW, "x")
    assert [process for process in verifier.pool.free.queue if process is not None] == [first]
    os.kill(first.process.pid, 9)
    first.process.wait()
    assert verifier(ROW, "x") == Verdict(0.25, "0.2")


def test_a_row_that_json_can_not_hold_is_told() -> None:
    with pytest.raises(FunctionFailed, match=r"the row can't be passed on as JSON: .*bytes"):
        opened("number")({**ROW, "picture": b"1"}, "x")


def test_in_a_run_what_goes_wrong_is_a_failed_verdict_with_its_traceback() -> None:
    def lacks_its_field(row: Any, response: str) -> Verdict:
        return Verdict(row["keywords"], "x")

    verifiers = {"mine": opened("raises"), "rule": lacks_its_field, "good": opened("number")}
    results = mixing.verify(ROW, "an answer", verifiers, verifiers)
    assert list(results) == ["mine", "rule", "good"]
    assert results["good"] == Verdict(0.25, "0.2")
    for name, reason in (("mine", "it raised KeyError: 'no such field' (own.py:"), ("rule", "it raised KeyError: ")):
        failure = results[name]
        assert isinstance(failure, Failure)
        assert failure.reason.startswith(reason)
        assert "Traceback (most recent call last)" in failure.traceback
        assert from_json(to_json(failure)) == failure


def test_too_many_failures_name_verifier_count_first_row_and_traceback() -> None:
    failed = Failure("it raised KeyError: 'x' (own.py:5)", traceback="Traceback\n  line 5\nKeyError: 'x'\n")
    other = Failure("no reply")
    good = Verdict(1.0, "good")
    results: list[dict[str, VerifierResult]] = [
        {"mine": good, "judge": other}, {"mine": failed, "judge": good}, {"mine": failed, "judge": good},
        {"mine": good, "judge": good}, {"mine": failed, "judge": other},
    ]  # fmt: skip
    failures = mixing.failures(results, ["a", "b", "c", "d", "e"])
    assert [(entry.verifier, entry.count, entry.row) for entry in failures] == [("mine", 3, "b"), ("judge", 2, "a")]
    assert mixing.failed_share(results, failures, 0.8) == 0.8
    with pytest.raises(RuntimeError) as caught:
        mixing.failed_share(results, failures, 0.7)
    first_line, *rest = str(caught.value).splitlines()
    assert first_line == (
        "4 of 5 samples have no reward, rewards.client.max_failed=0.7: 3 x verifier mine: it raised KeyError: 'x' "
        "(own.py:5); first on row 'b'; 2 x verifier judge: no reply; first on row 'a'; mend the verifiers or their "
        "servers, then go on with resume=true"
    )
    assert rest == ["Traceback", "  line 5", "KeyError: 'x'"]
