"""Calibrates the threshold of monitor: ``python -m rollout.guidance.calibrate calibrate.prompts=… calibrate.output=…``.

It answers every prompt of a held-out file of benign prompts once, scored but never steered, and keeps the lowest score
of each answer. The output file has the conformal threshold for ``calibrate.level`` (``rollout.guidance.decisions``).
The prompts must come from the same distribution as the benign prompts that will be served. They must be neither in the
value model's training data nor in a test set.
"""

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig
from rich.console import Console

from megatron_ext import settings
from rollout.guidance import calibration, decisions
from rollout.guidance.calibration import Calibration
from rollout.guidance.clients import GeneratorFailed, ValuesUnavailable
from rollout.guidance.decoding import Question, gather
from rollout.guidance.opening import OpenGuide, messages_of, only_scoring, open_guide
from rollout.guidance.settings import CalibrateConfig, GuidanceConfig, new_file
from rollout.guidance.settings import check as check_guidance


def read_rows(path: str) -> list[Any]:
    """Return the rows of a JSON-lines file. Raises ValueError naming an invalid line."""
    rows = []
    with Path(path).open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise ValueError(f"{path}:{number}: not JSON: {error}") from None
                messages_of(row, f"{path}:{number}")
                rows.append(row)
    return rows


async def lowest_score(opened: OpenGuide, row: Any, temperature: float, seed: int) -> float:
    """Generate one answer and return the lowest score of its segments, infinity for an answer without a score.

    Raises ValueError for a prompt that does not fit into the model's context.
    """
    prompt = await opened.generator.encode_chat(opened.model, messages_of(row, "row"), {})
    max_tokens = opened.guide.config.max_tokens
    context = opened.context(opened.model)
    if context is not None:
        max_tokens = min(max_tokens, context - len(prompt))
    if max_tokens < 1:
        raise ValueError(f"a prompt of {len(prompt)} tokens does not fit into the model's {context}")
    question = Question(opened.model, tuple(prompt), max_tokens, {"temperature": temperature}, seed=seed)
    answer = opened.guide.answer(question)
    async for _ in answer.steps():
        pass
    # An answer without text has no scored segment, so it can't be below a threshold.
    return float("inf") if answer.lowest_score is None else answer.lowest_score


async def calibrate(config: GuidanceConfig, options: CalibrateConfig) -> Calibration:
    """Answer and score the prompts.

    Raises ValueError for too few prompts, before anything is generated.
    """
    rows = read_rows(options.prompts)
    decisions.conformal_threshold([0.0] * len(rows), options.level)
    slots = asyncio.Semaphore(options.concurrency)

    async with open_guide(only_scoring(config)) as opened:

        async def score(place: int) -> float:
            async with slots:
                # The streams of an answer use consecutive seeds. An answer that is not steered has one stream.
                return await lowest_score(opened, rows[place], options.temperature, options.seed + place)

        lowest = await gather([score(place) for place in range(len(rows))])
        value_model = opened.values.model
        model = opened.model
    threshold = decisions.conformal_threshold(lowest, options.level)
    conditions = calibration.conditions(config, value_model)
    conditions |= {"model": model, "temperature": options.temperature, "prompts": options.prompts, "seed": options.seed}
    rank = sorted(lowest).index(threshold) + 1
    return Calibration(options.level, len(lowest), rank, threshold, conditions, sorted(lowest))


@hydra.main(version_base="1.3", config_path="../../conf", config_name="guidance")
def main(raw: DictConfig) -> None:
    try:
        options = settings.read(CalibrateConfig, "calibrate", raw.calibrate)
        settings.check(options, "calibrate")
        config = settings.read(GuidanceConfig, "guidance", raw.guidance)
        settings.check(config, "guidance")
        check_guidance(only_scoring(config))
        output = new_file("calibrate.output", options.output)
        result = asyncio.run(calibrate(config, options))
        output.parent.mkdir(parents=True, exist_ok=True)
        calibration.write(result, output)
    except (ValueError, OSError, GeneratorFailed, ValuesUnavailable) as error:
        sys.exit(f"error: {error}")
    Console().print(
        f"{result.n} prompts, level {result.level:g}: threshold {result.threshold:.6g}, the {result.rank}-th smallest "
        f"of the lowest scores; written to {output}"
    )


if __name__ == "__main__":
    sys.argv[1:] = settings.with_new_keys(sys.argv[1:], settings.mappings(GuidanceConfig, "guidance"))
    main()
