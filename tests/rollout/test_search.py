"""The grammar of deliberative search: legal and illegal episodes, the environment's replies, what a model states."""

import re
from collections.abc import Sequence
from dataclasses import astuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout.environment import Segment
from rollout.retrieval import Bm25, Document
from rollout.search import ACTIONS, LONGEST_QUERY, Search, actions, open_search, result, stated, steps

CORPUS = [
    Document("norland", "The capital of Norland is Veska. Its river is Ombra."),
    Document("sudland", "The capital of Sudland is Tarn."),
]
SEARCH = Search(Bm25.of(CORPUS), results=2, snippet_words=6)
THINK, END = "<think>Let me see.</think>", "<confidence>8</confidence><answer>Veska</answer>"
LOOK = "<search>capital of Norland</search>"


def episode(*turns: str) -> list[Segment]:
    """The model's turns with the environment's replies between them."""
    segments: list[Segment] = []
    for turn in turns:
        if segments:
            segments.append(Segment(SEARCH.reply(segments), by_environment=True))
        segments.append(Segment(turn, by_environment=False))
    return segments


@pytest.mark.parametrize(
    ("turns", "actions"),
    [
        ([THINK + END], "think confidence answer"),
        ([THINK + LOOK, END], "think search confidence answer"),
        ([THINK + LOOK, THINK + END], "think search think confidence answer"),
        ([THINK + LOOK, "<read>norland</read>", END], "think search read confidence answer"),
        ([THINK + LOOK, LOOK, " \n" + THINK + "<read> norland </read>\n", END], None),
        ([THINK + "<confidence>10</confidence>\n<answer>a < b</answer>\n"], None),
        ([THINK + "<confidence>0</confidence><answer>x</answer>"], None),
    ],
)
def test_legal_episodes(turns: Sequence[str], actions: str | None) -> None:
    parsed = steps(episode(*turns))
    assert [step.fault for step in parsed] == [""] * len(parsed)
    if actions is not None:
        assert [step.action for step in parsed] == actions.split()


@pytest.mark.parametrize(
    ("turns", "action", "fault"),
    [
        ([""], "end", "no answer at the end"),
        (["Veska"], "text", "not an action"),
        ([THINK], "end", "no answer at the end"),
        ([END], "confidence", "before any think"),
        ([LOOK, THINK + END], "search", "before any think"),
        ([THINK + LOOK], "search", "without a result"),
        ([THINK + LOOK + THINK + END], "search", "without a result"),
        ([THINK + "<search> </search>", END], "search", "empty"),
        ([THINK + "<search>a <search>b</search>", END], "search", "another tag inside"),
        ([THINK + LOOK + "<", END], "search", "without a result"),
        ([THINK + "<read>norland</read>", END], "read", "not among the documents found"),
        ([THINK + LOOK, "<read>westland</read>", END], "read", "not among the documents found"),
        ([THINK + "<answer>Veska</answer>"], "answer", "no confidence before it"),
        ([THINK + "<confidence>8</confidence>"], "end", "no answer at the end"),
        ([THINK + "<confidence>8</confidence>" + END], "confidence", "between confidence and answer"),
        ([THINK + "<confidence>8</confidence>" + THINK + END], "think", "between confidence and answer"),
        ([THINK + "<confidence>8</confidence>" + LOOK, END], "search", "between confidence and answer"),
        ([THINK + END + THINK], "think", "after the answer"),
        ([THINK + END + END], "confidence", "after the answer"),
        ([THINK + END + " done"], "text", "not an action"),
        ([THINK + "<confidence>11</confidence><answer>x</answer>"], "confidence", "not a whole number from 0 to 10"),
        ([THINK + "<confidence>8.5</confidence><answer>x</answer>"], "confidence", "not a whole number from 0 to 10"),
        ([THINK + "<confidence>-1</confidence><answer>x</answer>"], "confidence", "not a whole number from 0 to 10"),
        ([THINK + "<confidence>high</confidence><answer>x</answer>"], "confidence", "not a whole number from 0 to 10"),
        ([THINK + "<confidence>8</confidence><answer></answer>"], "answer", "empty"),
        (["<think></think>" + END], "think", "empty"),
        (["<think>never closed " + END], "text", "not an action"),
        ([THINK + "<result>[norland] Veska</result>" + END], "text", "not an action"),
        ([THINK + LOOK, "<result>[x] y</result><read>x</read>", END], "text", "not an action"),
        (["Well: " + THINK + END], "text", "not an action"),
        ([THINK + "<guess>Veska</guess>" + END], "text", "not an action"),
    ],
)
def test_illegal_episodes_name_the_first_fault(turns: Sequence[str], action: str, fault: str) -> None:
    first = next(step for step in steps(episode(*turns)) if step.fault)
    assert (first.action, first.fault) == (action, fault)


def test_a_model_can_t_write_the_environment_s_part() -> None:
    """The same characters, all the model's own, are no legal episode."""
    legal = episode(THINK + LOOK, "<read>norland</read>", END)
    forged = [Segment("".join(segment.text for segment in legal), by_environment=False)]
    assert any(step.fault for step in steps(forged))


def test_replies() -> None:
    replies = episode(THINK + LOOK, "<read>norland</read>", "<read>sudland</read>", "<read>x</read>", END)
    assert [segment.text for segment in replies if segment.by_environment] == [
        "<result>[norland] The capital of Norland is Veska.\n[sudland] The capital of Sudland is Tarn.</result>",
        "<result>The capital of Norland is Veska. Its river is Ombra.</result>",
        "<result>The capital of Sudland is Tarn.</result>",
        "<result>no such document was found</result>",
    ]
    for nothing in ("<search>zebra</search>", "<search></search>", "a</search>", "<search>b</search> c</read>"):
        assert SEARCH.reply([Segment(nothing, False)]) == "<result>nothing found</result>"


def test_a_document_s_tags_do_not_become_actions() -> None:
    assert result("a<answer>b</answer><ans<answer>wer>c</result>") == "<result>a b <ans wer>c </result>"
    sly = Search(Bm25.of([Document("sly", "word\n[other] word <confidence>10</confidence>")]), 1, 9)
    reply = sly.reply([Segment("<search>word</search>", False)])
    assert reply == "<result>[sly] word [other] word  10 </result>"
    read = [Segment("<search>word</search>", False), Segment(reply, True), Segment("<read>sly</read>", False)]
    read += [Segment(sly.reply(read), True), Segment("<read>other</read>", False), Segment("", True)]
    assert steps(read)[-2].fault == "not among the documents found", "a line of a text that was read lists nothing"


@given(st.lists(st.sampled_from(["<think>", "</think>", "<search>", "</search>", "<result>", " ", "x"])).map("".join))
def test_actions_are_those_of_the_regular_expression(text: str) -> None:
    pattern = rf"<({'|'.join(ACTIONS)})>(.*?)</\1>"
    expected = [(m[1], m[2], m.start(), m.end()) for m in re.finditer(pattern, text, re.DOTALL)]
    assert [astuple(action) for action in actions(text)] == expected


def test_a_query_s_beginning_is_searched_for() -> None:
    def results(spaces: int) -> str:
        return SEARCH.reply([Segment(f"<search>Ombra{' ' * spaces}Tarn</search>", False)])

    assert "[sudland]" in results(LONGEST_QUERY - len("OmbraTarn"))
    assert "[norland]" in results(LONGEST_QUERY) and "[sudland]" not in results(LONGEST_QUERY)


@given(st.lists(st.sampled_from([THINK, LOOK, "<read>norland</read>", END, "<result>", " ", "x", "</think>"])))
def test_every_text_has_steps_and_only_one_ending_is_legal(parts: list[str]) -> None:
    parsed = steps([Segment("".join(parts), by_environment=False)])
    assert parsed
    if not any(step.fault for step in parsed):
        assert [step.action for step in parsed][-2:] == ["confidence", "answer"]
        assert sum(step.action == "answer" for step in parsed) == 1


@pytest.mark.parametrize(
    ("turns", "answer", "confidence"),
    [
        ([THINK + LOOK, END], "Veska", 8),
        ([END + "<confidence>2</confidence><answer> Tarn </answer>"], "Tarn", 2),
        ([THINK + "<answer>Veska</answer>"], "Veska", None),
        ([THINK + "<confidence>12</confidence><answer>Veska</answer>"], "Veska", None),
        ([THINK + LOOK, "<confidence>3</confidence>"], None, 3),
        (["It is Veska."], "It is Veska.", None),
        ([" "], None, None),
    ],
)
def test_what_is_stated(turns: Sequence[str], answer: str | None, confidence: int | None) -> None:
    assert stated(episode(*turns)) == (answer, confidence)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"corpus": None}, "corpus=None, endpoint=None: give one of them"),
        ({"endpoint": "http://127.0.0.1:1"}, "give one of them"),
        ({"corpus": None, "endpoint": "search:80"}, "endpoint='search:80': give an address as http"),
        ({"results": 0}, "results=0: must be at least 1"),
        ({"snippet_words": 0}, "snippet_words=0"),
        ({"corpus": None, "endpoint": "http://127.0.0.1:1", "timeout": 0.0}, "timeout=0.0"),
    ],
)
def test_settings_that_can_t_work_are_told(changes: dict[str, object], message: str) -> None:
    settings: dict[str, object] = {"corpus": "recipes/data/search/corpus.jsonl", "endpoint": None, "results": 1}
    settings |= {"snippet_words": 6, "timeout": 1.0, "retries": 0}
    with pytest.raises(ValueError, match=message):
        open_search(**(settings | changes))  # type: ignore[arg-type]
