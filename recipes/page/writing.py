"""Write the answers of a served model to a conversation, and answers that continue from an edit."""

import asyncio
import sys
from collections import OrderedDict
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any

from recipes.page.conversation import (
    STOPPED,
    UNDER_WAY,
    Branch,
    Conversation,
    Passage,
    Refused,
    Turn,
    after_edit,
    messages,
    whole_response,
)
from recipes.page.documents import Library, OwnRetriever
from recipes.page.scores import judged
from recipes.page.settings import PageConfig, Setup
from rewards.verdict import Verifier
from rollout.deliberation.deliberating import Deliberator, make_deliberator, open_search_environment
from rollout.environment import Unavailable
from rollout.guidance.clients import GeneratorFailed, Served, ServedGenerator, ValuesUnavailable
from rollout.guidance.decoding import Guide, Question
from rollout.guidance.edits import edit_text
from rollout.guidance.opening import open_guide
from rollout.guidance.settings import GuidanceConfig

# A thinking mark may be a special token, and the text of a stream must be the text of all of its tokens.
SAMPLING = {"skip_special_tokens": False}


class Conversations:
    """The conversations in memory, by owner. If there are too many, the least recently used one is forgotten."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.by_owner: OrderedDict[tuple[str, str], Conversation] = OrderedDict()

    def of(self, owner: tuple[str, str], person: str) -> Conversation:
        """The conversation of an owner, which is the session of a browser and a tab in it.

        A new conversation gets the name ``person``.
        """
        conversation = self.by_owner.setdefault(owner, Conversation(person=person, session=owner[0]))
        self.by_owner.move_to_end(owner)
        idle = [known for known, other in self.by_owner.items() if not other.is_busy and known != owner]
        for known in idle[: max(len(self.by_owner) - self.most, 0)]:
            del self.by_owner[known]
        return conversation


@dataclass
class Writer:
    """The model that answers."""

    page: PageConfig
    guidance: GuidanceConfig
    generator: ServedGenerator
    # Guides the decoding of the answers, None without.
    guide: Guide | None
    model: str
    # Most tokens of prompt and answer together, None if the server does not state it.
    context: int | None
    # They judge the answers.
    verifiers: Mapping[str, Verifier]
    # Answers by deliberate search, None without.
    deliberator: Deliberator | None
    # The own documents of people. Deliberate search reads those of a session, if there are any.
    library: Library
    under_way: int = 0

    def ask(self, conversation: Conversation, message: str) -> None:
        """Begin to answer a message. Raises Refused."""
        if not message.strip():
            raise Refused("the message is empty")
        self.check_length("the message", message)
        if conversation.asked >= self.page.max_turns:
            raise Refused(
                f"a conversation has at most {self.page.max_turns} messages, all of its branches together; begin a new "
                "one"
            )
        self._claim(conversation)
        conversation.append(Turn(message, [Branch()], searches=conversation.searches))
        self._start(conversation)

    async def continue_from(self, conversation: Conversation, place: int, number: int, edited: str) -> None:
        """Begin a new branch from an edit of the answer ``number`` of the turn at ``place``.

        The new branch keeps the whole tokens at the beginning that ``edited`` shares with the answer. The rest of
        ``edited`` follows, and the model continues from there. The conversation goes on from the new branch. Later
        messages stay in the branch that they follow. Raises Refused, EditRefused and GeneratorFailed.
        """
        self.check_length("the edited text", edited)
        turn = conversation.turns[place]
        if len(turn.branches) >= self.page.max_branches:
            raise Refused(f"a message has at most {self.page.max_branches} answers side by side")
        passages = await self._claim_for_edit(conversation, turn.branches[number], edited)
        turn.branches.append(Branch(passages, parent=number, edited=edited))
        turn.chosen = len(turn.branches) - 1
        self._start(conversation)

    async def go_on(self, conversation: Conversation, place: int, number: int) -> None:
        """Continue a stopped answer in its own branch. No message may follow it.

        Raises Refused, EditRefused and GeneratorFailed.
        """
        turn = conversation.turns[place]
        branch = turn.branches[number]
        if branch.following is not None:
            raise Refused("a later message follows this answer: edit it, and go on in a branch beside it")
        # An incomplete character at the end of the stopped answer is dropped.
        branch.passages = await self._claim_for_edit(conversation, branch, branch.text)
        branch.finish_reason = branch.notice = None
        turn.chosen = number
        self._start(conversation)

    def choose(self, conversation: Conversation, place: int, number: int) -> None:
        """Make the conversation go on from the answer ``number`` of the turn at ``place`` and the messages after it.

        Raises Refused.
        """
        if conversation.is_busy:
            raise Refused(UNDER_WAY)
        conversation.turns[place].chosen = number
        conversation.changed()

    def stop(self, conversation: Conversation) -> None:
        """Stop the answer that is under way. The text that was generated so far stays."""
        if conversation.task is not None:
            conversation.task.cancel()

    def check_length(self, what: str, text: str) -> None:
        """Raises Refused for a text that is too long."""
        if len(text) > self.page.max_characters:
            raise Refused(f"{what} has {len(text)} characters, and may have {self.page.max_characters}")

    async def _claim_for_edit(self, conversation: Conversation, branch: Branch, edited: str) -> list[Passage]:
        """Claim the conversation and return the branch's passages after an edit. On an error, release it again."""
        self._claim(conversation)
        try:
            edit = await edit_text(self.generator, self.model, branch.token_ids, edited)
            kept_text = edited[: len(edited) - len(edit.tail)]
            return after_edit(branch.passages, kept_text, edit)
        except BaseException:
            self._release(conversation)
            raise

    def _claim(self, conversation: Conversation) -> None:
        """Mark the conversation as busy. Raises Refused if it is, or if too many answers are under way."""
        if conversation.is_busy:
            raise Refused(UNDER_WAY)
        if self.under_way >= self.page.max_answers:
            raise Refused(f"{self.under_way} answers are under way, as many as this page gives at once; try again")
        conversation.is_busy = True
        self.under_way += 1
        conversation.changed()

    def _release(self, conversation: Conversation) -> None:
        conversation.is_busy = False
        conversation.task = None
        self.under_way -= 1
        conversation.changed()

    def _start(self, conversation: Conversation) -> None:
        """Start the task that writes the chosen answer of the last turn."""
        turn = conversation.turns[-1]
        branch = turn.answer

        async def run() -> None:
            try:
                if turn.searches:
                    await self._deliberate(conversation, branch)
                else:
                    await self._write(conversation, branch)
                    await self._judge(turn, branch)
            except (Refused, GeneratorFailed, ValuesUnavailable, Unavailable) as error:
                branch.notice = str(error)
            except Exception as error:
                branch.notice = f"{type(error).__name__}: {error}"
                print(f"an answer failed: {branch.notice}", file=sys.stderr)

        def end(_: asyncio.Task[None]) -> None:
            branch.finish_reason = branch.finish_reason or STOPPED
            self._release(conversation)

        conversation.task = asyncio.create_task(run())
        conversation.task.add_done_callback(end)
        conversation.changed()

    async def _write(self, conversation: Conversation, branch: Branch) -> None:
        """Generate the answer from the branch's passages to its end."""
        prefix, room = await self._prefix(conversation, branch, self.guidance.max_tokens)
        sampling: dict[str, Any] = dict(SAMPLING)
        if self.page.temperature is not None:
            sampling["temperature"] = self.page.temperature
        if self.guide is None:
            options = {**sampling, "max_tokens": room}
            async with aclosing(self.generator.stream(self.model, prefix, options)) as pieces:
                async for piece in pieces:
                    branch.add(Passage(piece.text, piece.token_ids))
                    branch.finish_reason = piece.finish_reason
            return
        answer = self.guide.answer(Question(self.model, prefix, room, sampling))
        async with aclosing(answer.steps()) as steps:
            async for step in steps:
                branch.add(Passage(step.text, step.token_ids, step.values, step.score, step.origin))
        branch.finish_reason = answer.finish_reason
        if answer.unguided is not None:
            branch.notice = f"not guided to the end: {answer.unguided}"

    async def _deliberate(self, conversation: Conversation, branch: Branch) -> None:
        """Answer by deliberate search. The branch's text is the answer of the vote."""
        assert self.deliberator is not None  # or the page has no switch
        deliberator = self.deliberator
        if self.library.names(conversation.session):
            deliberator = deliberator.over(OwnRetriever(self.library, conversation.session))
        config = deliberator.config
        prompt, room = await self._prefix(conversation, branch, config.max_tokens)
        question = Question(self.model, prompt, room, {"temperature": config.temperature})
        branch.deliberation = deliberator.deliberate(question, config.samples)
        conversation.changed()
        async with aclosing(branch.deliberation.steps()) as steps:
            async for _ in steps:
                pass
        conclusion = branch.deliberation.chosen
        if conclusion is None:
            branch.notice = "none of the samples came to an answer"
        else:
            branch.add(Passage(conclusion.answer, ()))
        branch.finish_reason = "stop"

    async def _prefix(self, conversation: Conversation, branch: Branch, longest: int) -> tuple[tuple[int, ...], int]:
        """The tokens to continue from, and how many tokens may follow if an answer has at most ``longest``.

        Raises Refused if no token may follow.
        """
        turn = conversation.turns[-1]
        if not turn.prompt_ids:
            await self._encode(conversation, turn)
        prefix = (*turn.prompt_ids, *branch.token_ids)
        room = longest - len(branch.token_ids)
        if self.context is not None:
            room = min(room, self.context - len(prefix))
        if room < 1:
            raise Refused(
                f"the conversation has {len(prefix)} tokens; the model takes {self.context} with the answer, and the "
                f"longest answer has {longest}: begin a new one"
            )
        return prefix, room

    async def _judge(self, turn: Turn, branch: Branch) -> None:
        response = whole_response(turn, branch, self.guidance.thinking_marks)
        branch.verdicts = await judged(self.verifiers, turn.message, response)

    async def _encode(self, conversation: Conversation, turn: Turn) -> None:
        begin = self.guidance.thinking_marks[0]
        prompt_ids = await self.generator.encode_chat(
            self.model, messages(conversation.turns, self.guidance.thinking_marks), {}
        )
        prompt = await self.generator.decode(self.model, prompt_ids)
        turn.opens_thinking = prompt.rstrip().endswith(begin)
        turn.prompt_ids = tuple(prompt_ids)
        conversation.changed()


@asynccontextmanager
async def open_writer(setup: Setup) -> AsyncGenerator[Writer, None]:
    """Connect to the generator, and to the value server and the search engine if there are any.

    Raises ValueError, GeneratorFailed, ValuesUnavailable and Unavailable.
    """
    if setup.has_values:
        async with open_guide(setup.guidance) as opened:
            yield await make_writer(setup, opened, opened.guide)
        return
    generator = ServedGenerator(setup.guidance.generator)
    try:
        models = await generator.checked_models("give the address of one that runs as generator=URL")
        yield await make_writer(setup, Served(generator, models), None)
    finally:
        await generator.close()


async def make_writer(setup: Setup, served: Served, guide: Guide | None) -> Writer:
    """A writer over an open generator and guide. Raises ValueError and Unavailable like :func:`open_writer`."""
    deliberator = None
    if setup.environment is not None and setup.deliberation is not None:
        environment = open_search_environment(setup.environment)
        max_turns = setup.environment.max_turns
        deliberator = await make_deliberator(
            setup.deliberation, environment, max_turns, served.generator, served.models
        )
    return Writer(
        page=setup.page,
        guidance=setup.guidance,
        generator=served.generator,
        guide=guide,
        model=served.model,
        context=served.context(served.model),
        verifiers=setup.verifiers,
        deliberator=deliberator,
        library=Library(setup.page),
    )
