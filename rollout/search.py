"""Deliberative search: think, search, read, state a confidence, answer (Deliberative Searcher, arXiv 2507.16727).

The action space is the paper's. How an action is written, and that an episode has one confidence, right before its one
answer, are our choice:

    <think>…</think><search>capital of Norland</search>
    <result>[norland] The capital of Norland is Veska.</result>         from the environment
    <read>norland</read>
    <result>The capital of Norland is Veska. Its river is …</result>    from the environment
    <think>…</think><confidence>8</confidence><answer>Veska</answer>
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from rollout.environment import Segment
from rollout.retrieval import Bm25, Endpoint, Retriever

ACTIONS = ("think", "search", "read", "confidence", "answer")
_BEGIN = re.compile(f"<({'|'.join(ACTIONS)})>")
_TAG = re.compile(rf"</?(?:{'|'.join(ACTIONS)}|result)>")
_CONFIDENCE = re.compile(r"10|[0-9]")
_FOUND = re.compile(r"^\[([^\[\]\n]+)\] ", re.MULTILINE)
LONGEST_QUERY = 2000  # characters, what web search engines read of a query; the rest is cut off
NOTHING_FOUND, NO_DOCUMENT = "nothing found", "no such document was found"


@dataclass(frozen=True)
class Step:
    """An action of an episode and what is wrong with it; an empty ``fault``: nothing."""

    action: str
    content: str
    fault: str


@dataclass(frozen=True)
class Action:
    """``<name>content</name>`` and where it begins and ends in its text."""

    name: str
    content: str
    start: int
    end: int


@dataclass(frozen=True)
class Search:
    """The environment: the retriever's documents, ``results`` for each search, the first ``snippet_words`` of each.

    The model's text is only ever a query, of at most ``LONGEST_QUERY`` characters, and an id: a reply's time and memory
    grow with the corpus and with the text's length, whatever is in it.
    """

    retriever: Retriever
    results: int
    snippet_words: int

    @property
    def stops(self) -> Sequence[str]:
        return "</search>", "</read>"

    def reply(self, segments: Sequence[Segment]) -> str:
        """``<result>…</result>`` for the search or read with which the response ends. Raises Unavailable."""
        said = segments[-1].text
        stop = max(self.stops, key=said.rfind)
        end = said.rfind(stop) + len(stop)
        last = next((action for action in actions(said) if action.end == end), None)
        if last is None:
            return result(NOTHING_FOUND)  # an end without a beginning: the verifier says so
        content = last.content.strip()
        if stop == "</read>":
            text = self.retriever.read(content) if content in found_ids(segments) else None
            return result(NO_DOCUMENT if text is None else text)
        hits = self.retriever.search(content[:LONGEST_QUERY], self.results)
        lines = [f"[{hit.id}] {' '.join(hit.text.split()[: self.snippet_words])}" for hit in hits]
        return result("\n".join(lines) or NOTHING_FOUND)

    def check(self) -> None:
        """Raises Unavailable when the retriever does not answer."""
        self.retriever.search("test", 1)


def open_search(
    *,
    corpus: str | None,
    endpoint: str | None,
    results: int,
    snippet_words: int,
    timeout: float,
    retries: int,
) -> Search:
    """Over a ``corpus`` (JSONL, BM25 in this process) or an HTTP ``endpoint``, exactly one of them.

    ``timeout`` (seconds) and ``retries`` are the endpoint's. Raises ValueError for values that can't work.
    """
    for name, value, least in (
        ("results", results, 1),
        ("snippet_words", snippet_words, 1),
        ("timeout", timeout, 0.001),
        ("retries", retries, 0),
    ):
        if not least <= value <= 1e7:
            raise ValueError(f"{name}={value}: must be at least {least}, at most 1e7")
    if (corpus is None) == (endpoint is None):
        raise ValueError(f"corpus={corpus!r}, endpoint={endpoint!r}: give one of them and leave the other null")
    retriever: Retriever
    if corpus is not None:
        retriever = Bm25.load(corpus)
    else:
        assert endpoint is not None
        retriever = Endpoint(endpoint, timeout, retries)
    return Search(retriever, results, snippet_words)


def result(text: str) -> str:
    """What the environment puts into a response; tags of the grammar in a document are not the document's to give: a
    space stands for each, so that what is left and right of one makes no other."""
    return f"<result>{_TAG.sub(' ', text)}</result>"


def actions(text: str) -> Iterator[Action]:
    """From left to right: a begin that has an end, the next of its name. What is inside one is not another."""
    position, unended = 0, set[str]()
    while begin := _BEGIN.search(text, position):
        name, position = begin.group(1), begin.end()
        end = -1 if name in unended else text.find(f"</{name}>", position)
        if end < 0:
            unended.add(name)  # none behind this one either
            continue
        content, position = text[position:end], end + len(f"</{name}>")
        yield Action(name, content, begin.start(), position)


def found_ids(segments: Sequence[Segment]) -> set[str]:
    """Ids of the documents that the environment's replies to searches listed."""
    found: set[str] = set()
    for before, segment in pairwise(segments):
        if segment.by_environment and before.text.rstrip().endswith("</search>"):
            found.update(_FOUND.findall(segment.text.removeprefix("<result>")))
    return found


def steps(segments: Sequence[Segment]) -> list[Step]:
    """Every action of a response with its fault, in order; at the end what is missing. All without a fault: legal.

    First a think. Then think, search and read in any order, each search and read answered by the environment, and a
    read only of a document that a search found. At last one confidence (a whole number from 0 to 10) and one answer.
    """
    done: list[Step] = []
    for place, segment in enumerate(segments):
        if segment.by_environment:
            continue
        position, end = 0, len(segment.text.rstrip())
        seen = found_ids(segments[: place + 1])
        for action in actions(segment.text):
            if segment.text[position : action.start].strip():
                break
            position, content = action.end, action.content.strip()
            ends_turn = place + 1 < len(segments) and position == end
            done.append(Step(action.name, content, _fault(action.name, content, done, ends_turn, seen)))
        if rest := segment.text[position:].strip():
            done.append(Step("text", rest, "not an action"))
    if not done or done[-1].action != "answer":
        done.append(Step("end", "", "no answer at the end"))
    return done


def _fault(action: str, content: str, done: Sequence[Step], ends_turn: bool, seen: set[str]) -> str:
    before = done[-1].action if done else None
    if _TAG.search(content):
        return "another tag inside"
    if not content:
        return "empty"
    if before is None and action != "think":
        return "before any think"
    if before == "answer":
        return "behind the answer"
    if before == "confidence" and action != "answer":
        return "between confidence and answer"
    if action == "confidence" and not _CONFIDENCE.fullmatch(content):
        return "not a whole number from 0 to 10"
    if action == "answer" and before != "confidence":
        return "no confidence before it"
    if action in ("search", "read") and not ends_turn:
        return "without a result"
    if action == "read" and content not in seen:
        return "not among the documents found"
    return ""


def stated(segments: Sequence[Segment]) -> tuple[str | None, int | None]:
    """The answer and the confidence (0 to 10) that the model states last; None for none.

    A text without any action is an answer as a whole, without a confidence (our choice: what a model that does not know
    the grammar says).
    """
    text = "".join(segment.text for segment in segments if not segment.by_environment)
    if not _TAG.search(text):
        return text.strip() or None, None
    said = {action.name: action.content.strip() for action in actions(text)}
    confidence = said.get("confidence", "")
    return said.get("answer") or None, int(confidence) if _CONFIDENCE.fullmatch(confidence) else None
