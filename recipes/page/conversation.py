"""The conversation of a person and a model. It has turns, and each turn has branches with answers."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from rewards.verdict import Verdict
from rollout.deliberation.deliberating import Deliberation
from rollout.guidance.edits import Edit
from rollout.thinking import with_opening

MODEL, PERSON = "model", "person"
STOPPED = "stopped"
UNDER_WAY = "an answer is under way; stop it first"
# Unscored pieces of a stream are joined up to this length, because the page has an element for each passage.
LONGEST_PASSAGE = 400  # characters


class Refused(ValueError):
    """Raised if a person's request can't be done. The message says why."""


@dataclass(frozen=True)
class Passage:
    """A part of an answer: a sentence with its values, or text of the model without values, or text of a person.

    ``origin``: model, person, or how guided decoding produced it (draft, sampled, correction).
    """

    text: str
    token_ids: tuple[int, ...]
    values: Mapping[str, float] | None = None
    score: float | None = None
    origin: str = MODEL


@dataclass
class Branch:
    """One answer to a message."""

    passages: list[Passage] = field(default_factory=list)
    # The index of the branch that a person edited, and the text that the model continued from. Both are None for the
    # first answer.
    parent: int | None = None
    edited: str | None = None
    # None while the answer is under way, ``stopped`` if a person or an error ended it.
    finish_reason: str | None = None
    # What went wrong.
    notice: str | None = None
    # Verdicts of the run's verifiers by name, once the answer has ended.
    verdicts: Mapping[str, Verdict] = field(default_factory=dict)
    is_saved: bool = False
    # The deliberate search that the answer comes from, if any. The text is then only the answer of the search, and it
    # has no tokens.
    deliberation: Deliberation | None = None
    # The next message, with the answers to it.
    following: "Turn | None" = None

    @property
    def text(self) -> str:
        return "".join(passage.text for passage in self.passages)

    @property
    def token_ids(self) -> tuple[int, ...]:
        return tuple(token for passage in self.passages for token in passage.token_ids)

    def add(self, passage: Passage) -> None:
        """Append a passage. If it and a short last one are unscored and have the same origin, join them."""
        if self.passages:
            last = self.passages[-1]
            is_alike = last.values is None and passage.values is None and last.origin == passage.origin
            if is_alike and len(last.text) < LONGEST_PASSAGE:
                text = last.text + passage.text
                self.passages[-1] = Passage(text, last.token_ids + passage.token_ids, origin=last.origin)
                return
        self.passages.append(passage)


@dataclass
class Turn:
    """A message of the person and the answers to it."""

    message: str
    branches: list[Branch]
    # Index of the answer that the conversation goes on from.
    chosen: int = 0
    # Empty until the message is encoded.
    prompt_ids: tuple[int, ...] = ()
    # Whether the chat template ends the prompt with the mark that begins the thinking.
    opens_thinking: bool = False
    # Whether the message is answered by deliberate search.
    searches: bool = False

    @property
    def answer(self) -> Branch:
        return self.branches[self.chosen]


@dataclass
class Conversation:
    """The state of one tab: a tree of messages and answers."""

    # Stands before the first message.
    root: Branch = field(default_factory=Branch)
    # Number of messages in all branches.
    asked: int = 0
    # Name that edits are saved with.
    person: str = ""
    # Session of the browser that the tab belongs to.
    session: str = ""
    # Changes with everything but the growth of an answer.
    version: int = 0
    # Writes the chosen answer of the last turn while the conversation is busy.
    task: asyncio.Task[None] | None = None
    is_busy: bool = False
    # Whether the next message is to be answered by deliberate search.
    searches: bool = False

    @property
    def turns(self) -> list[Turn]:
        """The messages from the first one on, along the chosen answers."""
        return turns_after(self.root)

    def append(self, turn: Turn) -> None:
        """Append a message after the last chosen answer."""
        turns = self.turns
        last = turns[-1].answer if turns else self.root
        last.following = turn
        self.asked += 1

    def changed(self) -> None:
        self.version += 1


def turns_after(branch: Branch) -> list[Turn]:
    """The messages after an answer, along the chosen answers."""
    turns = []
    turn = branch.following
    while turn is not None:
        turns.append(turn)
        turn = turn.answer.following
    return turns


@dataclass(frozen=True)
class Sections:
    """The ranges [start, end) of thinking and answer in a response, in characters. None for a part that is missing."""

    thinking: tuple[int, int] | None
    answer: tuple[int, int] | None


def sections(text: str, opens_thinking: bool, marks: Sequence[str]) -> Sections:
    """Separate thinking and answer. The response may be incomplete. Whitespace before each part is left out.

    ``opens_thinking``: the prompt ends with the mark that begins the thinking.
    """
    begin, end = marks
    start = 0
    if not opens_thinking or text.lstrip().startswith(begin):
        start = text.find(begin)
        if start < 0 or text[:start].strip():
            # The beginning of a mark is not an answer.
            has_answer = not begin.startswith(text.strip())
            return Sections(None, (_visible(text, 0), len(text)) if has_answer else None)
        start += len(begin)
    stop = text.find(end, start)
    if stop < 0:
        return Sections((_visible(text, start), len(text)), None)
    return Sections((min(_visible(text, start), stop), stop), (_visible(text, stop + len(end)), len(text)))


def sections_of(turn: Turn, branch: Branch, marks: Sequence[str]) -> Sections:
    """The ranges of thinking and answer in a branch's text."""
    if branch.deliberation is not None:
        return Sections(None, (0, len(branch.text)) if branch.text else None)
    return sections(branch.text, turn.opens_thinking, marks)


def _visible(text: str, start: int) -> int:
    """The index of the first character from ``start`` on that is no whitespace."""
    return len(text) - len(text[start:].lstrip())


def answer_of(turn: Turn, branch: Branch, marks: Sequence[str]) -> str:
    """The answer without its thinking. Empty if the thinking has not ended."""
    answer = sections_of(turn, branch, marks).answer
    return "" if answer is None else branch.text[slice(*answer)].strip()


def messages(turns: Sequence[Turn], marks: Sequence[str]) -> list[dict[str, str]]:
    """The conversation up to the last message, as chat messages.

    Earlier answers have no thinking, as in the chat templates of models that think.
    """
    history = []
    for turn in turns[:-1]:
        answer = answer_of(turn, turn.answer, marks)
        history += [{"role": "user", "content": turn.message}, {"role": "assistant", "content": answer}]
    return [*history, {"role": "user", "content": turns[-1].message}]


def whole_response(turn: Turn, branch: Branch, marks: Sequence[str]) -> str:
    """A branch's text. If the chat template wrote the mark that begins the thinking, the text begins with this mark."""
    return with_opening(branch.text, marks[0]) if turn.opens_thinking else branch.text


def after_edit(passages: Sequence[Passage], kept_text: str, edit: Edit) -> list[Passage]:
    """The passages of an answer after an edit.

    These are the passages that are kept as a whole, the kept beginning of the next one, and the text that the person
    wrote. ``kept_text`` is the text of the kept tokens.
    """
    after: list[Passage] = []
    tokens = characters = 0
    for passage in passages:
        end = tokens + len(passage.token_ids)
        if end > edit.kept or not kept_text.startswith(passage.text, characters):
            break
        after.append(passage)
        tokens = end
        characters += len(passage.text)
    if tokens < edit.kept:
        all_ids = [token for passage in passages for token in passage.token_ids]
        after.append(Passage(kept_text[characters:], tuple(all_ids[tokens : edit.kept])))
    if edit.tail:
        after.append(Passage(edit.tail, edit.tail_ids, origin=PERSON))
    return after
