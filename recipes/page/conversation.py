"""What a person and a model have said to each other: turns, and for each the branches of the answer."""

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
# Unscored pieces of a stream are joined up to this length: an element of the page for each would be too many.
LONGEST_PASSAGE = 400  # characters


class Refused(ValueError):
    """What a person asks for can't be done; the message says why."""


@dataclass(frozen=True)
class Passage:
    """A part of an answer: a sentence with its values, or what the model wrote without, or what a person wrote.

    ``origin``: model, person, or how guided decoding came to it (draft, sampled, correction).
    """

    text: str
    token_ids: tuple[int, ...]
    values: Mapping[str, float] | None = None
    score: float | None = None
    origin: str = MODEL


@dataclass
class Branch:
    """One answer. ``parent`` is the place of the branch that a person edited, ``edited`` the text that the model went
    on from; both None for the first answer. ``finish_reason`` is None while the answer is under way, ``stopped`` if a
    person or an error ended it. ``notice`` says what went wrong.
    ``verdicts``: of the run's verifiers, by name, once the answer has ended. ``deliberation``: the deliberate search
    whose answer it is, if it is one; then its text is that answer alone, and has no tokens. ``following``: the next
    message, with the answers to it."""

    passages: list[Passage] = field(default_factory=list)
    parent: int | None = None
    edited: str | None = None
    finish_reason: str | None = None
    notice: str | None = None
    verdicts: Mapping[str, Verdict] = field(default_factory=dict)
    is_saved: bool = False
    deliberation: Deliberation | None = None
    following: "Turn | None" = None

    @property
    def text(self) -> str:
        return "".join(passage.text for passage in self.passages)

    @property
    def token_ids(self) -> tuple[int, ...]:
        return tuple(token for passage in self.passages for token in passage.token_ids)

    def add(self, passage: Passage) -> None:
        """Append a passage; an unscored one continues the last, if that is short."""
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
    """A message of the person and the answers to it. ``chosen`` is the one that the conversation goes on from.

    ``prompt_ids`` are empty until the message is encoded; ``opens_thinking``: the chat template begins the thinking.
    ``searches``: it is answered by deliberate search.
    """

    message: str
    branches: list[Branch]
    chosen: int = 0
    prompt_ids: tuple[int, ...] = ()
    opens_thinking: bool = False
    searches: bool = False

    @property
    def answer(self) -> Branch:
        return self.branches[self.chosen]


@dataclass
class Conversation:
    """The state of one tab: a tree of messages and answers. ``root`` stands before the first message, ``asked`` counts
    the messages in all branches. ``version`` changes with everything but the growth of an answer; ``task`` writes the
    chosen answer of the last turn, while the conversation is busy. ``person`` is the name that edits are saved with.
    ``session``: of the browser whose tab it is. ``searches``: the next message is to be answered by deliberate
    search."""

    root: Branch = field(default_factory=Branch)
    asked: int = 0
    person: str = ""
    session: str = ""
    version: int = 0
    task: asyncio.Task[None] | None = None
    is_busy: bool = False
    searches: bool = False

    @property
    def turns(self) -> list[Turn]:
        """The messages from the first one on, along the chosen answers."""
        return turns_after(self.root)

    def append(self, turn: Turn) -> None:
        """A further message, after the last chosen answer."""
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
    """Where thinking and answer stand in a response, [start, end) in characters; None for what it does not have."""

    thinking: tuple[int, int] | None
    answer: tuple[int, int] | None


def sections(text: str, opens_thinking: bool, marks: Sequence[str]) -> Sections:
    """Tell thinking and answer apart, in the beginning of a response too. Whitespace before each is left out.

    ``opens_thinking``: the prompt ends with the mark that begins the thinking.
    """
    begin, end = marks
    start = 0
    if not opens_thinking or text.lstrip().startswith(begin):
        start = text.find(begin)
        if start < 0 or text[:start].strip():
            # A mark that is coming is not an answer.
            has_answer = not begin.startswith(text.strip())
            return Sections(None, (_visible(text, 0), len(text)) if has_answer else None)
        start += len(begin)
    stop = text.find(end, start)
    if stop < 0:
        return Sections((_visible(text, start), len(text)), None)
    return Sections((min(_visible(text, start), stop), stop), (_visible(text, stop + len(end)), len(text)))


def sections_of(turn: Turn, branch: Branch, marks: Sequence[str]) -> Sections:
    """Where thinking and answer stand in a branch's text."""
    if branch.deliberation is not None:
        return Sections(None, (0, len(branch.text)) if branch.text else None)
    return sections(branch.text, turn.opens_thinking, marks)


def _visible(text: str, start: int) -> int:
    """Where the first character from ``start`` on stands that is no whitespace."""
    return len(text) - len(text[start:].lstrip())


def answer_of(turn: Turn, branch: Branch, marks: Sequence[str]) -> str:
    """The answer without its thinking; empty when the thinking has not ended."""
    answer = sections_of(turn, branch, marks).answer
    return "" if answer is None else branch.text[slice(*answer)].strip()


def messages(turns: Sequence[Turn], marks: Sequence[str]) -> list[dict[str, str]]:
    """The conversation up to the last message, earlier answers without their thinking, as chat templates of models
    that think have it."""
    history = []
    for turn in turns[:-1]:
        answer = answer_of(turn, turn.answer, marks)
        history += [{"role": "user", "content": turn.message}, {"role": "assistant", "content": answer}]
    return [*history, {"role": "user", "content": turns[-1].message}]


def whole_response(turn: Turn, branch: Branch, marks: Sequence[str]) -> str:
    """A branch's text, after the mark of thinking where the chat template has written that into the prompt."""
    return with_opening(branch.text, marks[0]) if turn.opens_thinking else branch.text


def after_edit(passages: Sequence[Passage], kept_text: str, edit: Edit) -> list[Passage]:
    """The passages of an answer after an edit: those that are kept as a whole, the kept beginning of the next one, and
    what the person wrote. ``kept_text`` is the text of the kept tokens."""
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
