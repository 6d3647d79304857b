"""Ask one question by deliberate search: ``python -m rollout.deliberation.ask ask.question='…' [deliberation.…=…]``.

It uses a running `vllm serve` of a model that was trained to search, and searches the documents that
``rollout.environment.settings`` names. It prints the steps of all samples as they happen, with their faults. Then it
prints the answer of the vote with its confidence and its sources.
"""

import asyncio
import sys

import hydra
from omegaconf import DictConfig
from rich.console import Console
from rich.text import Text

from megatron_ext import settings as house_settings
from rollout.deliberation import settings
from rollout.deliberation.deliberating import Conclusion, Deliberation, Source, open_deliberator
from rollout.deliberation.episodes import ShownStep
from rollout.deliberation.settings import AskConfig, DeliberationConfig
from rollout.environment import Unavailable
from rollout.guidance import endpoint
from rollout.guidance.clients import GeneratorFailed
from rollout.guidance.openai_form import parse
from rollout.settings import EnvironmentConfig, RolloutConfig

# The maximum number of characters that are shown of a step, of a reply and of a source.
SHOWN_CHARACTERS = 300


async def ask(
    config: DeliberationConfig, environment: EnvironmentConfig, asked: AskConfig, console: Console
) -> Conclusion | None:
    """Answer the question and print the steps and the votes. Returns the conclusion, None without an answer.

    Raises ValueError, GeneratorFailed and Unavailable.
    """
    async with open_deliberator(config, environment) as opened:
        body = {"messages": [{"role": "user", "content": asked.question}], "temperature": config.temperature}
        request = parse(body | {"seed": asked.seed}, is_chat=True)
        question = await endpoint.question_of(request, opened, config.max_tokens)
        deliberation = opened.deliberate(question, config.samples)
        async for step in deliberation.steps():
            console.print(step_text(step))
        print_votes(deliberation, console)
        return deliberation.chosen


def step_text(shown: ShownStep) -> Text:
    """Return a step and the environment's reply to it as text, with the step's fault in red."""
    line = Text(f"[{shown.sample + 1}] {shown.step.action}: {excerpt(shown.step.content)}")
    if shown.step.fault:
        line.append(f"  ✗ {shown.step.fault}", style="red")
    if shown.reply is not None:
        line.append(f"\n    → {excerpt(shown.reply.removeprefix('<result>').removesuffix('</result>'))}", style="dim")
    return line


def print_votes(deliberation: Deliberation, console: Console) -> None:
    """Print both votes, and the sources of the vote that the configuration selects."""
    count = len(deliberation.episodes)
    for name, weighted in (("by majority", False), ("by confidence", True)):
        conclusion = deliberation.conclusion(weighted)
        if conclusion is None:
            console.print(Text(f"{name}: no answer"))
            continue
        confidence = conclusion.confidence
        stated = "states no confidence" if confidence is None else f"confidence {confidence:.1f} of 10"
        certain = "certain" if conclusion.is_certain else "not certain"
        agreeing = f"{len(conclusion.samples)} of {count} answers, {conclusion.share:.0%} of the votes"
        console.print(Text(f"{name}: {conclusion.answer}", style="bold").append(f"  ({agreeing}; {stated}, {certain})"))
    if deliberation.chosen is not None:
        for source in deliberation.chosen.sources:
            console.print(source_text(source))


def source_text(source: Source) -> Text:
    mark = "has the answer" if source.has_answer else "read or listed"
    return Text(f"  {source.id} ({mark}): {excerpt(source.text)}", style="dim")


def excerpt(text: str) -> str:
    """Return a text as one line of at most SHOWN_CHARACTERS characters, with an ellipsis where it is cut."""
    line = " ".join(text.split())
    return line if len(line) <= SHOWN_CHARACTERS else f"{line[:SHOWN_CHARACTERS]}…"


@hydra.main(version_base="1.3", config_path="../../conf", config_name="deliberation")
def main(raw: DictConfig) -> None:
    try:
        config = settings.read(raw.deliberation)
        environment = settings.read_environment(raw.rollout.environment)
        asked = house_settings.read(AskConfig, "ask", raw.ask)
        house_settings.check(asked, "ask")
        asyncio.run(ask(config, environment, asked, Console(highlight=False)))
    except (ValueError, OSError, GeneratorFailed, Unavailable) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    sys.argv[1:] = house_settings.with_new_keys(sys.argv[1:], house_settings.mappings(RolloutConfig, "rollout"))
    main()
