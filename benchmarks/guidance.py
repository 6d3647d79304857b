"""Compares guided decoding with sampling the same number of tokens: ``python -m benchmarks.guidance --run FOLDER
--values FOLDER --benign FILE [--judge VERIFIER] [field=value …]``.

It writes ``benchmarks/results/guidance.json`` and prints its table. All answers are in ``build/benchmarks/guidance/``.
The exported model of ``--run`` answers the run's held-out prompts (``data.evaluation``). The run's verifiers
(``data.scores``) score the answers. ``--values`` is the run that trained the value model. ``field=value`` changes
settings of the run. ``guidance.field=value`` changes both modes, such as
``'guidance.weights={safety: 1, knowledge: 0}'``.

- ``plain``: one sampled answer.
- ``guided``: monitor and steer. The threshold is first calibrated on the benign prompts of ``--benign``.
- ``best_of_n``: plain answers to a prompt are sampled until they have as many tokens as ``guided`` took for it, dropped
  tokens included. The answer whose complete text has the best value is chosen. So this method never has fewer tokens
  than ``guided``.
- ``best_of_n_judge``: chooses among the same answers by the score of ``--judge``, a verifier of the run. A judge or a
  reward model is started as for a run. Without ``--judge`` the mean score of the verifiers that score the answers
  decides. That is the best possible choice, which no judge surpasses.
- ``search``: the same three for the mode search.

Both vLLM servers are started on this machine's CPU. ``--servers GENERATOR VALUES`` gives the addresses of servers that
run elsewhere. Test prompts that the value model or the calibration saw are refused.
"""

import argparse
import asyncio
import json
import os
import sys
import time
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from rich.console import Console
from rich.table import Table

from benchmarks import figures
from megatron_ext import hf_checkpoint, settings
from recipes.config import Config
from recipes.data.rows import load_rows, messages
from recipes.data.sources import Row
from recipes.evaluate import run_config
from recipes.evaluation import evaluate, rates
from recipes.evaluation.statistics import mean_interval, paired_difference
from recipes.run import records
from rewards import mixing, registry
from rewards.client import Client
from rewards.serve import JudgeServer, Supervisor, judge_servers
from rewards.settings import RewardsConfig, Server
from rewards.verdict import Verdict, Verifier, VerifierResult, to_json
from rollout.guidance import settings as guidance_settings
from rollout.guidance.calibrate import calibrate, read_rows
from rollout.guidance.clients import Piece
from rollout.guidance.decisions import weighted
from rollout.guidance.decoding import Question, gather
from rollout.guidance.opening import OpenGuide, messages_of, open_guide
from rollout.guidance.reading import Buffer
from rollout.guidance.settings import MONITOR, SEARCH, CalibrateConfig, GuidanceConfig
from rollout.thinking import with_opening

RESULT = Path("benchmarks/results/guidance.json")
FOLDER = Path("build/benchmarks/guidance")
PORTS = {"generate": 8371, "pooling": 8372}
MOST_TIME = 1.3  # goal: time per token of guided decoding / that of sampling, at most
METHODS = ("plain", "best_of_n", "best_of_n_judge", "guided")
BENIGN = "benign"  # the kind of rows that the calibration's level applies to


@dataclass(frozen=True)
class Sample:
    """A plain answer. ``scored``: number of tokens up to the end of its text."""

    text: str
    token_ids: tuple[int, ...]
    scored: int


@dataclass(frozen=True)
class Answer:
    """A method's answer to a prompt. ``tokens``: number generated for it, including those dropped or not chosen."""

    text: str
    tokens: int
    was_steered: bool = False
    unguided: str | None = None


@dataclass(frozen=True)
class Method:
    """A method's answers to all prompts, and the seconds for all of them.

    ``sampling_seconds`` leaves out the choice among samples.
    """

    answers: list[Answer]
    seconds: float
    sampling_seconds: float


@dataclass(frozen=True)
class Verifying:
    """Scores answers by the verifiers of ``data.scores``, and by the outcome judge or, without one, by their mean."""

    scores: Mapping[str, Sequence[str]]
    verifiers: Mapping[str, Verifier]
    judge: str | None

    def of_answer(self, row: Row, text: str) -> dict[str, VerifierResult]:
        """The results of the verifiers that score rows of this kind."""
        return mixing.verify(row, text, evaluate.score_names(row, self.scores), self.verifiers)

    def outcome(self, row: Row, text: str) -> float:
        """The judge's score. Raises RuntimeError without a verdict."""
        if self.judge is None:
            return mean_score(self.of_answer(row, text)) or 0.0
        (result,) = mixing.verify(row, text, [self.judge], self.verifiers).values()
        if not isinstance(result, Verdict):
            raise RuntimeError(f"--judge {self.judge}: no verdict on an answer to {row['id']!r}: {result}")
        return result.score


def mean_score(results: Mapping[str, VerifierResult]) -> float | None:
    """The mean score of the results that are verdicts, or None if there are none."""
    scores = [result.score for result in results.values() if isinstance(result, Verdict)]
    return sum(scores) / len(scores) if scores else None


def guidance_config(
    config: Config, principles: Sequence[str], mode: str, overrides: Sequence[str] = ()
) -> GuidanceConfig:
    """The defaults of the mode with the overrides and the run's sampling."""
    changes = settings.with_new_keys(overrides, settings.mappings(GuidanceConfig, "guidance"))
    with initialize_config_dir(str(Path("conf").resolve()), version_base="1.3"):
        raw = compose("guidance", [f"guidance={mode}", "guidance.threshold=0", *changes]).guidance
    raw["values"].principles = list(principles)
    raw.thinking_marks = list(config.rollout.thinking_marks)
    raw.max_tokens = config.rollout.max_response_tokens
    raw.log = str(FOLDER / f"{mode}.jsonl")
    return guidance_settings.read(raw)


def at(config: GuidanceConfig, generator: str, values: str) -> GuidanceConfig:
    """The settings with the addresses of the servers."""
    return replace(
        config,
        generator=replace(config.generator, address=generator),
        values=replace(config.values, address=values),
    )


async def compare(
    configs: Mapping[str, GuidanceConfig], options: CalibrateConfig, rows: Sequence[Row], verifying: Verifying
) -> dict[str, Any]:
    """Run all methods on all rows.

    ``configs`` has the settings of both modes. ``options`` has those of the calibration. Its temperature, seed and
    concurrency apply to all answers.
    """
    calibration = await calibrate(configs[MONITOR], options)
    monitor = replace(configs[MONITOR], threshold=calibration.threshold)
    results: dict[str, Any] = {
        "calibration": {
            name: getattr(calibration, name) for name in ("level", "n", "rank", "threshold", "lowest_scores")
        }
    }
    plain = await choose(monitor, options, rows, await draw(monitor, options, rows, [1] * len(rows)), first)
    reports = {"plain": report(plain, rows, verifying)}
    for mode, config in ((MONITOR, monitor), (SEARCH, configs[SEARCH])):
        guided = await answered(config, options, rows)
        samples = await draw(config, options, rows, [answer.tokens for answer in guided.answers])
        methods = {
            "guided": guided,
            "best_of_n": await choose(config, options, rows, samples, best_value),
            "best_of_n_judge": await choose(config, options, rows, samples, best_outcome(rows, verifying)),
        }
        of_mode = {name: report(method, rows, verifying) for name, method in methods.items()}
        of_measures = measure(reports | of_mode, rows, verifying)
        of_mode |= {
            "differences": differences(of_mode["guided"], reports | of_mode),
            "measure_differences": of_measures,
        }
        of_mode |= {"goals": goals(guided, methods["best_of_n"], of_mode["differences"], rows, options.level, mode)}
        results |= of_mode if mode == MONITOR else {mode: of_mode}
    return reports | results


async def answered(config: GuidanceConfig, options: CalibrateConfig, rows: Sequence[Row]) -> Method:
    """The guided answers."""
    async with open_guide(config) as opened:
        opening = await opening_mark(opened, rows[0])

        async def answer(place: int) -> Answer:
            prompt, max_tokens = await encoded(opened, rows[place])
            seed = seed_of(options, place)
            sampling = {"temperature": options.temperature}
            under_way = opened.guide.answer(Question(opened.model, tuple(prompt), max_tokens, sampling, seed=seed))
            text = "".join([step.text async for step in under_way.steps()])
            return Answer(
                whole_answer(text, opening), under_way.generated_tokens, under_way.steered > 0, under_way.unguided
            )

        answers, seconds = await all_of(answer, len(rows), options.concurrency)
    return Method(answers, seconds, seconds)


@dataclass(frozen=True)
class Drawn:
    """Plain answers, by prompt, and the seconds for all of them."""

    by_prompt: list[list[Sample]]
    seconds: float


async def draw(config: GuidanceConfig, options: CalibrateConfig, rows: Sequence[Row], budgets: Sequence[int]) -> Drawn:
    """Sample plain answers to each prompt, one after the other, until they reach the prompt's budget of tokens."""
    async with open_guide(config) as opened:
        opening = await opening_mark(opened, rows[0])

        async def samples(place: int) -> list[Sample]:
            prompt, max_tokens = await encoded(opened, rows[place])
            of_prompt: list[Sample] = []
            while sum(len(sample.token_ids) for sample in of_prompt) < budgets[place]:
                # The first answer to a prompt is that of the method "plain".
                seed = seed_of(options, place) + len(of_prompt)
                fields = {"temperature": options.temperature, "max_tokens": max_tokens, "seed": seed}
                sample = await one_sample(opened, prompt, fields)
                of_prompt.append(replace(sample, text=whole_answer(sample.text, opening)))
            return of_prompt

        return Drawn(*await all_of(samples, len(rows), options.concurrency))


# (guide, index of the row, its prompt, answers to it) → the index of the best answer
type Choice = Callable[[OpenGuide, int, Sequence[int], Sequence[Sample]], Awaitable[int]]


async def choose(
    config: GuidanceConfig, options: CalibrateConfig, rows: Sequence[Row], drawn: Drawn, choice: Choice
) -> Method:
    """Choose one of the plain answers to each prompt."""
    async with open_guide(config) as opened:

        async def chosen(place: int) -> Answer:
            samples = drawn.by_prompt[place]
            prompt, _ = await encoded(opened, rows[place])
            best = await choice(opened, place, prompt, samples)
            return Answer(samples[best].text, sum(len(sample.token_ids) for sample in samples))

        answers, seconds = await all_of(chosen, len(rows), options.concurrency)
    return Method(answers, drawn.seconds + seconds, drawn.seconds)


async def first(opened: OpenGuide, place: int, prompt: Sequence[int], samples: Sequence[Sample]) -> int:
    """The index of the answer of the method "plain"."""
    return 0


async def best_value(opened: OpenGuide, place: int, prompt: Sequence[int], samples: Sequence[Sample]) -> int:
    """The index of the sample whose complete text has the best value, with guided decoding's weights."""
    values = await opened.values.score([[*prompt, *sample.token_ids[: sample.scored]] for sample in samples])
    weights = opened.guide.router.weights(None)
    scores = [weighted(row, weights) for row in values]
    return scores.index(max(scores))


def best_outcome(rows: Sequence[Row], verifying: Verifying) -> Choice:
    """Chooses the index of the sample with the judge's best score."""

    async def choice(opened: OpenGuide, place: int, prompt: Sequence[int], samples: Sequence[Sample]) -> int:
        scores = [await asyncio.to_thread(verifying.outcome, rows[place], sample.text) for sample in samples]
        return scores.index(max(scores))

    return choice


async def one_sample(opened: OpenGuide, prompt: Sequence[int], fields: Mapping[str, Any]) -> Sample:
    """One plain answer."""

    async def decode(token_ids: Sequence[int]) -> str:
        return await opened.generator.decode(opened.model, token_ids)

    buffer = Buffer(decode)
    pieces: AsyncGenerator[Piece, None] = opened.generator.stream(opened.model, prompt, fields)
    async with aclosing(pieces) as stream:
        async for piece in stream:
            buffer.add(piece)
    visible = len(buffer.text.rstrip())
    scored = (await buffer.reach(visible))[1] if visible else 0
    return Sample(buffer.text, tuple(buffer.token_ids), scored)


async def encoded(opened: OpenGuide, row: Row) -> tuple[list[int], int]:
    """A row's prompt and the token limit of an answer. Raises ValueError if the prompt leaves no room for one."""
    prompt = await opened.generator.encode_chat(opened.model, messages(row), {})
    longest = opened.guide.config.max_tokens
    context = opened.context(opened.model)
    room = longest if context is None else min(longest, context - len(prompt))
    if room < 1:
        raise ValueError(f"row {row['id']!r}: its prompt has {len(prompt)} tokens, and the model takes {context}")
    return prompt, room


async def opening_mark(opened: OpenGuide, row: Row) -> str | None:
    """The thinking mark with which the chat template ends every prompt (here that of ``row``), or None."""
    token_ids = await opened.generator.encode_chat(opened.model, messages(row), {})
    prompt = await opened.generator.decode(opened.model, token_ids)
    begin = opened.guide.config.thinking_marks[0]
    return begin if prompt.rstrip().endswith(begin) else None


def whole_answer(text: str, opening: str | None) -> str:
    """An answer as verifiers read it: with the mark that the chat template has already written in front."""
    return text if opening is None else with_opening(text, opening)


def seed_of(options: CalibrateConfig, place: int) -> int:
    """The seed of a row's first answer. Further answers have the following seeds."""
    return options.seed + 10_000 * (place + 1)


async def all_of[T](work: Callable[[int], Awaitable[T]], count: int, concurrency: int) -> tuple[list[T], float]:
    """The results of ``work`` for 0 to ``count`` − 1, at most ``concurrency`` at once, and the total seconds."""
    slots = asyncio.Semaphore(concurrency)

    async def one(place: int) -> T:
        async with slots:
            return await work(place)

    start = time.perf_counter()
    results = await gather([one(place) for place in range(count)])
    return results, time.perf_counter() - start


def report(method: Method, rows: Sequence[Row], verifying: Verifying) -> dict[str, Any]:
    """A method's figures.

    ``mean``: average over the prompts with a verdict, each with the mean of its scores. ``labels``: kind of prompts →
    verifier: label → share. ``tokens``: mean number generated for a prompt.
    """
    results = [verifying.of_answer(row, answer.text) for row, answer in zip(rows, method.answers, strict=True)]
    means = {}
    labels: dict[str, Counter[str]] = {}
    for row, of_answer in zip(rows, results, strict=True):
        score = mean_score(of_answer)
        if score is not None:
            means[row["id"]] = score
        for name, result in of_answer.items():
            if isinstance(result, Verdict):
                labels.setdefault(row["kind"], Counter())[f"{name}: {result.label}"] += 1
    kinds = Counter(row["kind"] for row in rows)
    return {
        **mean_interval(list(means.values()), list(means)),
        "tokens": sum(answer.tokens for answer in method.answers) / len(rows),
        "seconds": method.seconds,
        "sampling_seconds": method.sampling_seconds,
        "labels": {
            kind: {label: count / kinds[kind] for label, count in sorted(counts.items())}
            for kind, counts in labels.items()
        },
        "by_prompt": means,
        "answers": [
            {
                "id": row["id"],
                "kind": row["kind"],
                "response": answer.text,
                "tokens": answer.tokens,
                "steered": answer.was_steered,
                "unguided": answer.unguided,
                "scores": {name: to_json(result) for name, result in of_answer.items()},
            }
            for row, answer, of_answer in zip(rows, method.answers, results, strict=True)
        ],
    }


def measure(reports: Mapping[str, Any], rows: Sequence[Row], verifying: Verifying) -> dict[str, Any]:
    """Guided minus each other method on the same prompts: method → measure → {mean, interval, n}.

    Measures have the names of evaluation.json, such as unsafe/harmful. Adds ``measures`` to each report: measure →
    {mean, interval, n}.
    """
    kinds = {row["id"]: row["kind"] for row in rows}
    answers = {name: {evaluate.GREEDY: of_method["answers"]} for name, of_method in reports.items()}
    measured, names = rates.with_rates(answers, verifying.scores, kinds)
    for name, of_method in reports.items():
        of_method["measures"] = evaluate.summary(measured[name], names)
    return {
        name: evaluate.difference(measured[name], measured["guided"], names) for name in reports if name != "guided"
    }


def differences(guided: Mapping[str, Any], others: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Guided minus each other method on the same prompts: the mean score, {mean, interval, n}."""
    of_others: dict[str, Any] = {}
    for name, other in others.items():
        shared = [row_id for row_id in guided["by_prompt"] if row_id in other.get("by_prompt", {})]
        if name != "guided" and shared:
            before = [other["by_prompt"][row_id] for row_id in shared]
            after = [guided["by_prompt"][row_id] for row_id in shared]
            of_others[name] = paired_difference(before, after, shared)
    return of_others


def goals(
    guided: Method,
    best_of_n: Method,
    difference: Mapping[str, Any],
    rows: Sequence[Row],
    level: float,
    mode: str,
) -> dict[str, Any]:
    """The goals of the mode, and whether they are met. ``time``: seconds per token / those of sampling."""
    seconds = guided.seconds / sum(answer.tokens for answer in guided.answers)
    of_sampling = best_of_n.sampling_seconds / sum(answer.tokens for answer in best_of_n.answers)
    reached: dict[str, Any] = {
        f"beats_{name}": {"by": of_other, "met": of_other["interval"][0] > 0} for name, of_other in difference.items()
    }
    reached["time"] = {"ratio": seconds / of_sampling, "most": MOST_TIME, "met": seconds / of_sampling <= MOST_TIME}
    benign = [answer for row, answer in zip(rows, guided.answers, strict=True) if row["kind"] == BENIGN]
    if mode == MONITOR and benign:
        touched = mean_interval([float(answer.was_steered) for answer in benign])
        # The level bounds the mean over draws of prompts, so the goal is met unless the interval lies above the level.
        reached["benign_touched"] = {**touched, "level": level, "met": touched["interval"][0] <= level}
    return reached


def check_prompts(rows: Sequence[Row], benign_file: str, trained_on: Sequence[Row]) -> None:
    """Raises ValueError if the calibration or the value model saw a test prompt, or if the value model saw a prompt of
    the calibration."""
    test = {row["prompt"] for row in rows}
    benign = {messages_of(row, benign_file)[-1]["content"] for row in read_rows(benign_file)}
    trained = {row["prompt"] for row in trained_on}
    for what, seen in (("--benign", benign & test), ("the value model's prompts", trained & (test | benign))):
        if seen:
            raise ValueError(f"{what}: {min(seen)!r} is among them and is tested or calibrated on; give other prompts")


@contextmanager
def servers(config: Config, values: Path, judge: str | None, running: Sequence[str] | None) -> Iterator[list[str]]:
    """Start the servers that the verifiers need, and also generator and value server unless they are ``running``.

    Yields the addresses of generator and value server when all are ready.
    """
    to_start = judge_servers(scoring_rewards(config, judge), FOLDER / "servers", config.cluster.platform)
    addresses = list(running or ())
    if running is None:
        for runner, folder in (("generate", config.model.path), ("pooling", str(values / "hf"))):
            server = Server(folder, None, runner, [], None, "127.0.0.1", PORTS[runner], 1, 1, [], runner)
            log = FOLDER / "servers" / f"{runner}.log"
            to_start.append(JudgeServer(server, 0, log, None, config.rewards.supervisor.cpu_arguments))
            addresses += server.addresses
    supervisor = Supervisor(to_start, replace(config.rewards.supervisor, restarts=0))
    try:
        supervisor.start()
        yield addresses
    finally:
        supervisor.stop()


def scoring_rewards(config: Config, judge: str | None) -> RewardsConfig:
    """The rewards settings with only the verifiers that this benchmark asks."""
    asked = {*config.data.scores, *([judge] if judge else [])}
    needed = {name: entry for name, entry in config.rewards.verifiers.items() if name in asked}
    return replace(config.rewards, verifiers=needed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, help="folder of the run whose model answers")
    parser.add_argument("--values", required=True, help="folder of the run that trained the value model")
    parser.add_argument("--benign", required=True, help="JSON lines of held-out benign prompts for the calibration")
    parser.add_argument("--judge", help="verifier that chooses for best_of_n_judge; without, those of data.scores")
    parser.add_argument("--level", type=float, default=0.05, help="share of benign prompts that may be touched")
    parser.add_argument("--concurrency", type=int, default=16, help="answers under way at once")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--servers", nargs=2, metavar=("GENERATOR", "VALUES"), help="addresses of running servers")
    parser.add_argument("overrides", nargs="*", metavar="field=value", help="other settings, of the run or of guidance")
    options = parser.parse_args()
    of_guidance = [override for override in options.overrides if override.startswith("guidance.")]
    of_run = [override for override in options.overrides if override not in of_guidance]
    made_by = figures.source("benchmarks.guidance")
    load = os.getloadavg()[0]
    run, values = Path(options.run), Path(options.values)
    config = run_config(run, [f"model.path={run / 'hf'}", *of_run])
    if config.rollout.top_p != 1:
        raise ValueError(f"rollout.top_p={config.rollout.top_p}: a calibration samples with 1; give rollout.top_p=1")
    principles = list(hf_checkpoint.config(values / "hf").id2label.values())
    rows = list(load_rows(config.data.evaluation))
    check_prompts(rows, options.benign, load_rows(run_config(values, []).data.prompts))
    configs = {mode: guidance_config(config, principles, mode, of_guidance) for mode in (MONITOR, SEARCH)}
    FOLDER.mkdir(parents=True, exist_ok=True)
    calibrating = CalibrateConfig(
        options.benign, "", options.level, config.rollout.temperature, options.concurrency, options.seed
    )
    with servers(config, values, options.judge, options.servers) as addresses:
        rewards = scoring_rewards(config, options.judge)
        names = [*config.data.scores, *([options.judge] if options.judge else [])]
        with Client(registry.servers_of(names, rewards), rewards.client) as client:
            verifiers = registry.open_verifiers(names, rewards, client)
            verifying = Verifying(config.data.scores, verifiers, options.judge)
            at_servers = {mode: at(of_mode, *addresses) for mode, of_mode in configs.items()}
            results = asyncio.run(compare(at_servers, calibrating, rows, verifying))
    (FOLDER / "answers.json").write_text(json.dumps(take_answers(results), indent=1, ensure_ascii=False) + "\n")
    result = {
        **records.environment("cpu" if options.servers is None else "servers elsewhere", 1),
        "load_average_before": load,
        "judge": options.judge,
        "principles": principles,
        **results,
    }
    figures.write(RESULT, " ".join(["python -m benchmarks.guidance", *sys.argv[1:]]), made_by, result)
    console = Console(width=None if sys.stdout.isatty() else 140)
    tables = [table(results), *(measure_table(mode, results) for mode in (MONITOR, SEARCH))]
    console.print(*tables, f"{RESULT} has the raw figures", sep="\n")


def take_answers(results: dict[str, Any]) -> dict[str, Any]:
    """Remove the answers from the reports, and return them by the reports' names."""
    answers: dict[str, Any] = {}
    for name, entry in results.items():
        if isinstance(entry, dict) and "answers" in entry:
            answers[name] = entry.pop("answers")
        elif isinstance(entry, dict):
            nested = take_answers(entry)
            if nested:
                answers[name] = nested
    return answers


def table(results: Mapping[str, Any]) -> Table:
    """A row for each method of each mode."""
    shown = Table("method", "score", "n", "guided − it", "tokens", "seconds", title="answers to held-out prompts")
    for mode, of_mode in ((MONITOR, results), (SEARCH, results[SEARCH])):
        for name in METHODS:
            if name not in of_mode:  # plain is listed once
                continue
            method = of_mode[name]
            shown.add_row(
                f"{mode}: {name}",
                figures.with_interval(method),
                str(method["n"]),
                figures.with_interval(of_mode["differences"][name]) if name in of_mode["differences"] else "",
                f"{method['tokens']:.0f}",
                f"{method['seconds']:.0f}",
            )
    return shown


def measure_table(mode: str, results: Mapping[str, Any]) -> Table:
    """A row for each measure, a column for each method of a mode."""
    of_mode = results if mode == MONITOR else results[mode]
    shown = Table("measure", *METHODS, "guided − best_of_n", title=f"{mode}: by measure")
    for name, of_guided in of_mode["guided"]["measures"].items():
        means = [(results if method == "plain" else of_mode)[method]["measures"][name] for method in METHODS]
        difference = of_mode["measure_differences"]["best_of_n"][name]
        columns = [f"{mean['mean']:.2f}" for mean in means]
        shown.add_row(f"{name}, n={of_guided['n']}", *columns, figures.with_interval(difference))
    return shown


if __name__ == "__main__":
    main()
