"""Deliberative search: think, search, read, state a confidence, answer (Deliberative Searcher, arXiv 2507.16727).

The action space is that of the paper. Two points are our choice: the notation of an action, and that an episode has one
confidence, immediately before its only answer.

    <think>…</think><search>capital of Norland</search>
    <result>[norland] The capital of Norland is Veska.</result>         from the environment
    <read>norland</read>
    <result>The capital of Norland is Veska. Its river is …</result>    from the environment
    <think>…</think><confidence>8</confidence><answer>Veska</answer>
"""

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from rollout.environment import Segment
from rollout.retrieval import Bm25, Document, Endpoint, Retriever

ACTIONS = ("think", "search", "read", "confidence", "answer")
_BEGIN = re.compile(f"<({'|'.join(ACTIONS)})>")
_TAG = re.compile(rf"</?(?:{'|'.join(ACTIONS)}|result)>")
_CONFIDENCE = re.compile(r"10|[0-9]")
_LISTED_ID = re.compile(r"^\[([^\[\]\n]+)\] ", re.MULTILINE)
_LISTED = re.compile(r"^\[([^\[\]\n]+)\] (.*)$", re.MULTILINE)
# The maximum number of characters of a query, about as many as web search engines read. The rest is cut off.
LONGEST_QUERY = 2000
NOTHING_FOUND = "nothing found"
NO_DOCUMENT = "no such document was found"


@dataclass(frozen=True)
class Step:
    """An action of an episode and its ``fault``, empty for a legal action."""

    action: str
    content: str
    fault: str


@dataclass(frozen=True)
class Action:
    """``<name>content</name>``, which is ``text[start:end]``."""

    name: str
    content: str
    start: int
    end: int


@dataclass(frozen=True)
class Search:
    """The search environment. A search returns the first ``snippet_words`` words of ``results`` documents.

    The model's text is used only as a query of at most ``LONGEST_QUERY`` characters and as a document id. So the time
    and memory of a reply are linear in the size of the corpus and in the length of the text, whatever the text
    contains.
    """

    retriever: Retriever
    results: int
    snippet_words: int

    @property
    def stops(self) -> Sequence[str]:
        return "</search>", "</read>"

    def reply(self, segments: Sequence[Segment]) -> str:
        """Return ``<result>…</result>`` for the search or read with which the response ends. Raises Unavailable."""
        turn = segments[-1].text
        stop = max(self.stops, key=turn.rfind)
        end = turn.rfind(stop) + len(stop)
        last_action = next((action for action in actions(turn) if action.end == end), None)
        if last_action is None:
            # This is an end tag without a begin tag. The verifier reports it.
            return result(NOTHING_FOUND)
        content = last_action.content.strip()
        if stop == "</read>":
            text = self.retriever.read(content) if content in listed_ids(segments) else None
            return result(NO_DOCUMENT if text is None else text)
        lines = []
        for document in self.retriever.search(content[:LONGEST_QUERY], self.results):
            snippet = " ".join(document.text.split()[: self.snippet_words])
            lines.append(f"[{document.id}] {snippet}")
        return result("\n".join(lines) or NOTHING_FOUND)

    def check(self) -> None:
        """Raise Unavailable when the retriever does not answer."""
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
    """Open the search environment for a corpus or an endpoint, of which exactly one must be given.

    ``corpus`` is a JSONL file or a folder of texts, which is searched by BM25 in this process. ``endpoint`` is the
    address of an HTTP search engine. ``timeout`` (seconds) and ``retries`` apply to the endpoint. Raises ValueError for
    settings out of range.
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
    if endpoint is not None and not endpoint.startswith(("http://", "https://")):
        raise ValueError(f"endpoint={endpoint!r}: give an address as http://HOST:PORT or https://HOST")
    retriever: Retriever
    if corpus is not None:
        retriever = Bm25.load(corpus)
    else:
        assert endpoint is not None
        retriever = Endpoint(endpoint, timeout, retries)
    return Search(retriever, results, snippet_words)


def result(text: str) -> str:
    """Return the environment's reply with this text.

    Each tag of the grammar in ``text`` is replaced, because a document must not act for the model. The replacement is a
    space, so that the text on both sides of a tag does not form another tag.
    """
    return f"<result>{_TAG.sub(' ', text)}</result>"


def documents_in(action: str, content: str, reply: str) -> list[Document]:
    """Return the documents in the environment's ``reply`` to a search or a read, each with the text that it shows."""
    shown = reply.removeprefix("<result>").removesuffix("</result>")
    if action == "search":
        return [Document(match[1], match[2]) for match in _LISTED.finditer(shown)]
    return [Document(content, shown)] if action == "read" and shown != NO_DOCUMENT else []


def actions(text: str) -> Iterator[Action]:
    """Yield the actions in ``text`` from left to right.

    An action extends from a begin tag to the next end tag of the same name. Tags inside an action do not begin another
    one. The time is linear in the length of ``text``.
    """
    position = 0
    names_without_end: set[str] = set()
    while True:
        begin = _BEGIN.search(text, position)
        if begin is None:
            return
        name = begin.group(1)
        content_start = begin.end()
        end_tag = f"</{name}>"
        content_end = -1 if name in names_without_end else text.find(end_tag, content_start)
        if content_end < 0:
            # Later begin tags of this name have no end tag either. Searching again would take quadratic time.
            names_without_end.add(name)
            position = content_start
        else:
            position = content_end + len(end_tag)
            yield Action(name, text[content_start:content_end], begin.start(), position)


def listed_ids(segments: Sequence[Segment]) -> set[str]:
    """Return the ids of the documents that the environment's replies to searches listed."""
    ids: set[str] = set()
    for previous, segment in pairwise(segments):
        if segment.by_environment and previous.text.rstrip().endswith("</search>"):
            ids.update(_LISTED_ID.findall(segment.text.removeprefix("<result>")))
    return ids


def steps(segments: Sequence[Segment]) -> list[Step]:
    """Return every action of a response with its fault, in order. A response is legal when no step has a fault.

    Text outside of actions is a step "text". A response without an answer at its end has a last step "end".

    The grammar is as follows. First comes a think. Then think, search and read follow in any order. The environment
    must answer each search and read, and a read is only of a document that a search listed. Last come one confidence
    (an integer from 0 to 10) and one answer.
    """
    all_steps: list[Step] = []
    for place, segment in enumerate(segments):
        if segment.by_environment:
            continue
        has_reply = place + 1 < len(segments)
        turn_end = len(segment.text.rstrip())
        readable_ids = listed_ids(segments[: place + 1])
        position = 0
        for action in actions(segment.text):
            if segment.text[position : action.start].strip():
                break
            position = action.end
            content = action.content.strip()
            is_answered = has_reply and action.end == turn_end
            fault = _fault(action.name, content, all_steps, is_answered, readable_ids)
            all_steps.append(Step(action.name, content, fault))
        rest = segment.text[position:].strip()
        if rest:
            all_steps.append(Step("text", rest, "not an action"))
    if not all_steps or all_steps[-1].action != "answer":
        all_steps.append(Step("end", "", "no answer at the end"))
    return all_steps


def _fault(
    action: str, content: str, earlier_steps: Sequence[Step], is_answered: bool, readable_ids: Collection[str]
) -> str:
    before = earlier_steps[-1].action if earlier_steps else None
    if _TAG.search(content):
        return "another tag inside"
    if not content:
        return "empty"
    if before is None and action != "think":
        return "before any think"
    if before == "answer":
        return "after the answer"
    if before == "confidence" and action != "answer":
        return "between confidence and answer"
    if action == "confidence" and not _CONFIDENCE.fullmatch(content):
        return "not a whole number from 0 to 10"
    if action == "answer" and before != "confidence":
        return "no confidence before it"
    if action in ("search", "read") and not is_answered:
        return "without a result"
    if action == "read" and content not in readable_ids:
        return "not among the documents found"
    return ""


def stated(segments: Sequence[Segment]) -> tuple[str | None, int | None]:
    """Return the last answer and the last confidence (0 to 10) that the model states, each None if there is none.

    A text without any tag counts as the answer, without a confidence. This is our choice, for models that do not know
    the grammar.
    """
    text = "".join(segment.text for segment in segments if not segment.by_environment)
    if not _TAG.search(text):
        return text.strip() or None, None
    last_content = {action.name: action.content.strip() for action in actions(text)}
    answer = last_content.get("answer") or None
    confidence = last_content.get("confidence", "")
    return answer, int(confidence) if _CONFIDENCE.fullmatch(confidence) else None
