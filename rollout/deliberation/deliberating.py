"""Several concurrent episodes of deliberate search for one question, and their conclusion."""

import asyncio
import re
import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing, asynccontextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from rewards.verifiers.text import THINK_BEGIN
from rollout.deliberation.episodes import Episode, ShownStep
from rollout.deliberation.settings import DeliberationConfig
from rollout.deliberation.voting import Vote, vote
from rollout.environment import Turns, Unavailable, open_environment
from rollout.guidance.clients import Served, ServedGenerator
from rollout.guidance.decoding import Question
from rollout.retrieval import Retriever
from rollout.search import Search
from rollout.settings import EnvironmentConfig

WEIGHTED, MAJORITY = "confidence_weighted", "majority"


@dataclass(frozen=True)
class Source:
    """A document that was shown to the samples with the winning answer."""

    id: str
    # The longest part of the document that was shown to them.
    text: str
    # Whether ``text`` contains the answer, word for word.
    has_answer: bool
    # The id, if it is a web address.
    link: str | None


@dataclass(frozen=True)
class Conclusion:
    """The result of a vote."""

    answer: str
    # The samples with this answer.
    samples: tuple[int, ...]
    # The answer's share of all votes.
    share: float
    # The mean of the confidences that these samples state, from 0 to 10; None if no sample states one.
    confidence: float | None
    # Whether the confidence is at least ``certain_from``.
    is_certain: bool
    sources: tuple[Source, ...]


@dataclass(frozen=True)
class Deliberator(Served):
    """A served model, and the environment in which it searches."""

    config: DeliberationConfig
    turns: Turns

    @property
    def search(self) -> Search:
        # open_deliberator has checked this.
        assert isinstance(self.turns.environment, Search)
        return self.turns.environment

    def over(self, retriever: Retriever) -> "Deliberator":
        """Return a deliberator with the same model that searches other documents."""
        environment = replace(self.search, retriever=retriever)
        return replace(self, turns=replace(self.turns, environment=environment))

    def deliberate(self, question: Question, samples: int) -> "Deliberation":
        """Return an answer, to be read with ``async for step in deliberation.steps()``."""
        return Deliberation(self, question, samples)


class Deliberation:
    """One answer in progress. After the last step, :meth:`conclusion` and :meth:`summary` are complete."""

    def __init__(self, deliberator: Deliberator, question: Question, samples: int) -> None:
        self.config = deliberator.config
        self.question = question
        self.id = uuid.uuid4().hex
        self.episodes = [
            Episode(deliberator.generator, deliberator.turns, question, sample) for sample in range(samples)
        ]
        self.is_complete = False
        self.started = time.monotonic()

    async def steps(self) -> AsyncGenerator[ShownStep, None]:
        """Yield the steps of all samples as they happen. The steps of one sample are in order.

        Raises GeneratorFailed, which ends all samples. Raises Unavailable when the environment failed in every sample.
        """
        # A step, or the task of a sample that has ended.
        arrived: asyncio.Queue[ShownStep | asyncio.Task[None]] = asyncio.Queue()

        async def follow(episode: Episode) -> None:
            async with aclosing(episode.steps()) as steps:
                async for step in steps:
                    arrived.put_nowait(step)

        tasks = [asyncio.create_task(follow(episode)) for episode in self.episodes]
        for task in tasks:
            task.add_done_callback(arrived.put_nowait)
        try:
            under_way = len(tasks)
            while under_way:
                step = await arrived.get()
                if isinstance(step, ShownStep):
                    yield step
                else:
                    step.result()
                    under_way -= 1
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        failures = [episode.failure for episode in self.episodes if episode.finish_reason == "failed"]
        if len(failures) == len(self.episodes):
            raise Unavailable(failures[0])
        self.is_complete = True

    def conclusion(self, weighted: bool) -> Conclusion | None:
        """Return the result of the vote of the samples, or None when no sample has an answer.

        The vote is by majority, or ``weighted`` by the confidence of the samples. A sample whose environment failed has
        no vote.
        """
        voters = [episode for episode in self.episodes if episode.finish_reason != "failed"]
        winner: Vote | None = vote([episode.reply for episode in voters], weighted)
        if winner is None:
            return None
        winners = [voters[place] for place in winner.places]
        answer = str(winners[0].answer)
        stated = [episode.confidence for episode in winners if episode.confidence is not None]
        confidence = fmean(stated) if stated else None
        return Conclusion(
            answer=answer,
            samples=tuple(episode.sample for episode in winners),
            share=winner.share,
            confidence=confidence,
            is_certain=confidence is not None and confidence >= self.config.certain_from,
            sources=tuple(sources(winners, answer)),
        )

    @property
    def chosen(self) -> Conclusion | None:
        """The conclusion of the vote that the configuration selects."""
        return self.conclusion(self.config.weighted)

    @property
    def tokens(self) -> int:
        """The number of tokens of all samples, including those of the environment."""
        return sum(episode.tokens for episode in self.episodes)

    def summary(self) -> dict[str, Any]:
        """Return as JSON what a client should know about how the answer was generated. It has the results of both
        votes."""
        votes = {MAJORITY: self.conclusion(weighted=False), WEIGHTED: self.conclusion(weighted=True)}
        return {
            "id": self.id,
            "vote": WEIGHTED if self.config.weighted else MAJORITY,
            "votes": {name: None if conclusion is None else asdict(conclusion) for name, conclusion in votes.items()},
            "samples": [
                {
                    "answer": episode.answer,
                    "confidence": episode.confidence,
                    "legal": not any(shown.step.fault for shown in episode.shown),
                    "finish_reason": episode.finish_reason,
                    "failure": episode.failure,
                    "tokens": episode.tokens,
                }
                for episode in self.episodes
            ],
            "seconds": time.monotonic() - self.started,
        }


def sources(episodes: list[Episode], answer: str) -> list[Source]:
    """Return the documents that were shown to the episodes, each once.

    Documents that contain the answer come first. Otherwise they are in the order in which they were first shown.
    """
    shown: dict[str, str] = {}
    for episode in episodes:
        for step in episode.shown:
            for document in step.documents:
                shown[document.id] = max(shown.get(document.id, ""), document.text, key=len)
    documents = [Source(name, text, _contains(text, answer), link(name)) for name, text in shown.items()]
    return sorted(documents, key=lambda source: not source.has_answer)  # stable


def link(document_id: str) -> str | None:
    """Return a document's id if it is a web address, else None. An HTTP search engine may use addresses as ids."""
    return document_id if re.fullmatch(r"https?://\S+", document_id) else None


def _contains(text: str, answer: str) -> bool:
    return f" {_words(answer)} " in f" {_words(text)} "


def _words(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


@asynccontextmanager
async def open_deliberator(
    config: DeliberationConfig, environment_config: EnvironmentConfig
) -> AsyncGenerator[Deliberator, None]:
    """Open the environment, connect to the generator and read its tokenizer.

        async with open_deliberator(config, environment) as opened:
            prompt = await opened.generator.encode_chat(opened.model, [{"role": "user", "content": "Hello?"}], {})
            deliberation = opened.deliberate(Question(opened.model, tuple(prompt), max_tokens=512), samples=4)
            async for step in deliberation.steps():
                print(step.sample, step.step, step.reply)
            print(deliberation.chosen)

    Raises ValueError for settings that don't fit. Raises GeneratorFailed and Unavailable for servers that do not
    answer.
    """
    environment = open_search_environment(environment_config)
    generator = ServedGenerator(config.generator, "deliberation.generator")
    try:
        models = await generator.checked_models("set deliberation.generator.address")
        yield await make_deliberator(config, environment, environment_config.max_turns, generator, models)
    finally:
        await generator.close()


async def make_deliberator(
    config: DeliberationConfig,
    environment: Search,
    max_turns: int,
    generator: ServedGenerator,
    models: list[dict[str, Any]],
) -> Deliberator:
    """Return a deliberator for an open environment and generator.

    Raises ValueError and Unavailable as :func:`open_deliberator` does.
    """
    await asyncio.to_thread(environment.check)
    folder = config.tokenizer or str(models[0].get("root"))
    # The grammar of a search always uses this mark, whatever thinking marks a configuration has.
    turns = Turns(environment, read_tokenizer(folder), max_turns, THINK_BEGIN)
    return Deliberator(generator, models, config, turns)


def open_search_environment(config: EnvironmentConfig) -> Search:
    """Open the search environment.

    Raises ValueError for settings that don't fit, and for an environment that is no ``rollout.search.Search``.
    """
    environment = None if config.name is None else open_environment(config.name, config.settings)
    if not isinstance(environment, Search):
        raise ValueError(
            f"rollout.environment.name={config.name!r}: the steps of deliberate search need one that opens a "
            "rollout.search.Search; use search"
        )
    return environment


def read_tokenizer(folder: str) -> Any:
    """Return the tokenizer in a folder. Raises ValueError if there is none, because nothing is downloaded."""
    if not (Path(folder) / "tokenizer_config.json").is_file():
        raise ValueError(
            f"deliberation.tokenizer: {folder} is no folder with a tokenizer_config.json on this machine; give the "
            "model's folder, or a copy of its tokenizer's files"
        )
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True)
