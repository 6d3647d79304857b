"""Deliberate search with several samples: ``python -m benchmarks.search --run FOLDER [field=value …]``.

It writes ``benchmarks/results/search.json`` and draws ``search_reliability.svg`` beside it; all answers are in
``build/benchmarks/search/``. The run's exported model answers the run's held-out search questions, ``--samples`` times
each, by the code of ``rollout.deliberation`` and in the run's environment, and the run's verifiers judge the answers.

- ``accuracy``: of votes over k samples, by majority and weighted by confidence. The samples of a question are cut into
  as many groups of k as there are, and their votes are averaged.
- ``false_certain``: the share of the answers that are wrong and certain, the rate that the paper reports.
- ``calibration``: the expected calibration error and the AUC of what is stated against being right: of the confidence
  of one answer (a tenth of it), and of the share of the votes of the answer of all samples.
- ``reliability``: for each confidence from 0 to 10, how many answers state it, and how many of them are right.

vLLM is started on this machine's CPU, or runs elsewhere: ``--server ADDRESS``.
"""

import argparse
import asyncio
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from hydra import compose, initialize_config_dir
from rich.console import Console
from rich.table import Table

from benchmarks import figures
from recipes.config import Config
from recipes.data.rows import load_rows, messages
from recipes.data.sources import Row
from recipes.evaluate import run_config
from recipes.evaluation import value_accuracy
from recipes.evaluation.statistics import mean_interval, paired_difference
from recipes.run import records
from rewards.serve import JudgeServer, running
from rewards.settings import Server
from rewards.verifiers import search as verifiers
from rollout.deliberation import settings
from rollout.deliberation.deliberating import MAJORITY, WEIGHTED, Deliberation, open_deliberator
from rollout.deliberation.settings import DeliberationConfig
from rollout.deliberation.voting import UNSTATED_CONFIDENCE, Reply, vote
from rollout.guidance.decoding import Question, gather
from rollout.settings import EnvironmentConfig

RESULT = figures.RESULTS / "search.json"
FOLDER = Path("build/benchmarks/search")
LABEL = "search"  # of the rows that are asked
PORT = 8765
CONFIDENCES = range(11)
VOTES = {MAJORITY: False, WEIGHTED: True}


@dataclass(frozen=True)
class Sample:
    """One answer to a row, and what the verifiers say of it."""

    reply: Reply
    is_right: bool
    outcome: str
    is_legal: bool
    tokens: int
    response: str


@dataclass(frozen=True)
class Asked:
    """A row and the answers to it."""

    row: Row
    samples: Sequence[Sample]


async def ask(
    config: DeliberationConfig, environment: EnvironmentConfig, rows: Sequence[Row], seed: int, concurrency: int
) -> list[Asked]:
    """Ask every row, ``concurrency`` at once. Raises ValueError for a prompt that leaves no room."""
    slots = asyncio.Semaphore(concurrency)
    async with open_deliberator(config, environment) as opened:

        async def one(place: int, row: Row) -> Asked:
            async with slots:
                prompt = await opened.generator.encode_chat(opened.model, messages(row), {})
                context = opened.context(opened.model)
                if context is not None and len(prompt) + config.max_tokens > context:
                    raise ValueError(
                        f"row {row['id']!r}: {len(prompt)} tokens of the prompt and {config.max_tokens} of the "
                        f"response, and the model takes {context}"
                    )
                sampling = {"temperature": config.temperature}
                question = Question(
                    opened.model, tuple(prompt), config.max_tokens, sampling, seed=seed + 1_000_000 * (place + 1)
                )
                deliberation = opened.deliberate(question, config.samples)
                async for _ in deliberation.steps():
                    pass
                return Asked(row, judged(row, deliberation, config.certain_from))

        return await gather([one(place, row) for place, row in enumerate(rows)])


def judged(row: Row, deliberation: Deliberation, certain_from: int) -> list[Sample]:
    """The samples with their verdicts; one whose search failed says nothing of the model and is left out."""
    samples = []
    for episode in deliberation.episodes:
        if episode.finish_reason == "failed":
            continue
        of_episode = {**row, "segments": episode.said}
        response = "".join(segment.text for segment in episode.said)
        is_right = verifiers.accuracy(of_episode, response).score == 1
        reliability = verifiers.reliability(of_episode, response, certain_from=certain_from)
        is_legal = verifiers.format_score(of_episode, response).score == 1
        samples.append(Sample(episode.reply, is_right, reliability.label, is_legal, episode.tokens, response))
    return samples


def report(asked: Sequence[Asked]) -> dict[str, Any]:
    """The figures. Intervals are over questions."""
    flat = [(of_row.row, sample) for of_row in asked for sample in of_row.samples]
    ids = [row["id"] for row, _ in flat]
    outcomes = Counter(sample.outcome for _, sample in flat)
    most = min(len(of_row.samples) for of_row in asked)
    sizes = [2**power for power in range(most.bit_length()) if 2**power <= most]
    accuracy = {size: {name: votes(asked, size, weighted) for name, weighted in VOTES.items()} for size in sizes}
    result: dict[str, Any] = {
        "questions": len(asked),
        "answers": len(flat),
        "kinds": Counter(of_row.row["kind"] for of_row in asked),
        "outcomes": {name: outcomes[name] / len(flat) for name in verifiers.OUTCOMES},
        "false_certain": mean_interval([float(sample.outcome == "false certain") for _, sample in flat], ids),
        "legal": mean_interval([float(sample.is_legal) for _, sample in flat], ids),
        "stated": mean_interval([float(sample.reply.confidence is not None) for _, sample in flat], ids),
        "tokens": fmean(sample.tokens for _, sample in flat),
        "accuracy": {
            str(size): {name: mean_interval(scores, of) for name, (scores, of) in of_votes.items()}
            for size, of_votes in accuracy.items()
        },
        "calibration": {"one_answer": calibration_of_answers(asked)}
        | {name: calibration_of_votes(asked, weighted) for name, weighted in VOTES.items()},
        "reliability": reliability([sample for _, sample in flat]),
    }
    if 4 in accuracy:
        # The paper's claim: four weighted by confidence are as good as sixteen by majority.
        of_majority = by_question(*accuracy[sizes[-1]][MAJORITY])
        of_four = by_question(*accuracy[4][WEIGHTED])
        names = list(of_four)
        result["four_weighted_minus_most_by_majority"] = paired_difference(
            [of_majority[name] for name in names], [of_four[name] for name in names], names
        )
    return result


def votes(asked: Sequence[Asked], size: int, weighted: bool) -> tuple[list[float], list[str]]:
    """1.0 for each group of ``size`` samples whose vote is right, else 0.0; and the question of each."""
    scores = []
    ids = []
    for of_row in asked:
        for start in range(0, len(of_row.samples) - size + 1, size):
            group = of_row.samples[start : start + size]
            winner = vote([sample.reply for sample in group], weighted)
            scores.append(float(winner is not None and group[winner.places[0]].is_right))
            ids.append(of_row.row["id"])
    return scores, ids


def by_question(scores: Sequence[float], ids: Sequence[str]) -> dict[str, float]:
    """The mean score of each question."""
    gathered: dict[str, list[float]] = {}
    for score, name in zip(scores, ids, strict=True):
        gathered.setdefault(name, []).append(score)
    return {name: fmean(of_question) for name, of_question in gathered.items()}


def calibration_of_answers(asked: Sequence[Asked]) -> dict[str, Any]:
    """Of the confidence that each answer states, against being right. Samples without an answer are left out."""
    with_answer = [
        (of_row.row["id"], sample) for of_row in asked for sample in of_row.samples if sample.reply.answer is not None
    ]
    values = [stated(sample) / CONFIDENCES[-1] for _, sample in with_answer]
    scores = [float(sample.is_right) for _, sample in with_answer]
    return measures(values, scores, [name for name, _ in with_answer])


def calibration_of_votes(asked: Sequence[Asked], weighted: bool) -> dict[str, Any]:
    """Of the share of the votes of the answer of all samples, against being right."""
    values, scores, ids = [], [], []
    for of_row in asked:
        winner = vote([sample.reply for sample in of_row.samples], weighted)
        if winner is not None:
            values.append(winner.share)
            scores.append(float(of_row.samples[winner.places[0]].is_right))
            ids.append(of_row.row["id"])
    return measures(values, scores, ids)


def measures(values: Sequence[float], scores: Sequence[float], ids: Sequence[str]) -> dict[str, Any]:
    """``ece`` and ``auc`` with intervals, ``n``, and the mean ``value`` and ``score``; empty where there is no
    answer."""
    if not values:
        return {}
    of_values = value_accuracy.accuracy(values, scores, ids)
    return {name: of_values[name] for name in ("n", "value", "score", "ece", "auc")}


def reliability(samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """For each confidence the answers that state it and the share of them that is right, None where there is none.

    An answer that states none counts as certain, as in training.
    """
    rows = []
    for confidence in CONFIDENCES:
        those = [sample for sample in samples if sample.reply.answer is not None and stated(sample) == confidence]
        right = fmean(sample.is_right for sample in those) if those else None
        rows.append({"confidence": confidence, "n": len(those), "accuracy": right})
    return rows


def stated(sample: Sample) -> int:
    confidence = sample.reply.confidence
    return UNSTATED_CONFIDENCE if confidence is None else confidence


def draw(result: dict[str, Any]) -> str:
    """The reliability diagram as SVG: accuracy over stated confidence, the area of a dot as its number of answers."""
    left, top, side = 56, 34, 300
    most = max(row["n"] for row in result["reliability"])
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left + side + 24} {top + side + 52}" '
        'font-family="sans-serif" font-size="12" fill="#333">',
        '<rect width="100%" height="100%" fill="#fff"/>',
        f'<text x="{left}" y="20" font-weight="bold">Accuracy by stated confidence</text>',
        f'<rect x="{left}" y="{top}" width="{side}" height="{side}" fill="none" stroke="#bbb"/>',
        f'<path d="M{left} {top + side}L{left + side} {top}" stroke="#999" stroke-dasharray="4 4"/>',
    ]
    for tick in CONFIDENCES[::2]:
        x = left + side * tick / 10
        y = top + side - side * tick / 10
        parts.append(f'<text x="{x}" y="{top + side + 18}" text-anchor="middle">{tick}</text>')
        parts.append(f'<text x="{left - 8}" y="{y + 4}" text-anchor="end">{tick / 10:.1f}</text>')
    for row in result["reliability"]:
        if row["n"]:
            x = left + side * row["confidence"] / 10
            y = top + side - side * row["accuracy"]
            title = f"confidence {row['confidence']}: {row['accuracy']:.2f} of {row['n']} answers are right"
            radius = 3 + 15 * (row["n"] / most) ** 0.5
            parts.append(
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}" fill="#2a6fb0" fill-opacity="0.55">'
                f"<title>{title}</title></circle>"
            )
    middle = left + side / 2
    parts.append(f'<text x="{middle}" y="{top + side + 40}" text-anchor="middle">stated confidence</text>')
    return "".join(parts) + "</svg>\n"


def deliberation_config(config: Config, address: str, samples: int) -> DeliberationConfig:
    """The defaults, at this server, with the run's sampling."""
    with initialize_config_dir(str(Path("conf").resolve()), version_base="1.3"):
        raw = compose("deliberation", ["deliberation.server.max_requests=1"]).deliberation
    raw.generator.address = address
    raw.tokenizer = config.model.path
    raw.samples = samples
    raw.temperature = config.rollout.temperature
    raw.max_tokens = config.rollout.max_response_tokens
    return settings.read(raw)


@contextmanager
def generator(config: Config, address: str | None) -> Iterator[str]:
    """The address of a server of the run's model; it is started here if there is none."""
    if address is not None:
        yield address
        return
    server = Server(config.model.path, None, "generate", [], None, "127.0.0.1", PORT, 1, 1, [], "generator")
    log = FOLDER / "servers" / "generator.log"
    start = JudgeServer(server, 0, log, None, config.rewards.supervisor.cpu_arguments)
    with running([start], replace(config.rewards.supervisor, restarts=0)):
        yield server.addresses[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--run", required=True, help="folder of the run whose model answers, runs/ladder_demo/rl_search"
    )
    parser.add_argument("--samples", type=int, default=16, help="answers to each question")
    parser.add_argument("--concurrency", type=int, default=8, help="questions under way at once")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--server", help="address of a running server of the model")
    parser.add_argument("--result", type=Path, default=RESULT, help="file to write; the diagram goes beside it")
    parser.add_argument("overrides", nargs="*", metavar="field=value", help="other settings of the run")
    options = parser.parse_args()
    made_by = figures.source("benchmarks.search")
    load = os.getloadavg()[0]
    run = Path(options.run)
    config = run_config(run, [f"model.path={run / 'hf'}", *options.overrides])
    if config.rollout.top_p != 1:
        raise ValueError(f"rollout.top_p={config.rollout.top_p}: the samples are drawn with 1; give rollout.top_p=1")
    rows = [row for row in load_rows(config.data.evaluation) if row["label"] == LABEL]
    if not rows:
        raise ValueError(
            f"data.evaluation={config.data.evaluation}: no row has the label {LABEL}; give data.evaluation"
        )
    FOLDER.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with generator(config, options.server) as address:
        deliberation = deliberation_config(config, address, options.samples)
        asked = asyncio.run(ask(deliberation, config.rollout.environment, rows, options.seed, options.concurrency))
    answers = [
        {"id": of_row.row["id"], "kind": of_row.row["kind"], "prompt": of_row.row["prompt"]}
        | {"samples": [sample.response for sample in of_row.samples]}
        for of_row in asked
    ]
    records.write_json(FOLDER / "answers.json", {"answers": answers})
    result = {
        **records.environment("cpu" if options.server is None else "server elsewhere", 1),
        "load_average_before": load,
        "stage": config.stage.name,
        "seconds": time.monotonic() - started,
        **report(asked),
    }
    figures.write(options.result, " ".join(["python -m benchmarks.search", *sys.argv[1:]]), made_by, result)
    options.result.with_name(f"{options.result.stem}_reliability.svg").write_text(draw(result))
    Console(width=None if sys.stdout.isatty() else 120).print(
        table(result), f"{options.result} has the figures", sep="\n"
    )


def table(result: dict[str, Any]) -> Table:
    """A row for each number of samples."""
    false_certain = figures.with_interval(result["false_certain"])
    shown = Table("samples", "majority", "weighted by confidence", title=f"accuracy; false and certain {false_certain}")
    for size, of_votes in result["accuracy"].items():
        shown.add_row(size, *(figures.with_interval(of_votes[name]) for name in VOTES))
    for name, measured in result["calibration"].items():
        if measured:
            shown.add_row(f"ECE, {name}", figures.with_interval(measured["ece"]), "")
    return shown


if __name__ == "__main__":
    main()
