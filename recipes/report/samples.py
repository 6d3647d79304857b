"""Summarise a run's samples for the report. They are read in one pass, since they can be larger than memory."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import Any

from recipes.evaluation.statistics import Interval, mean_interval, normal_interval
from recipes.run import sample_files

# The number of prompts whose answers are shown over training, and of answers for each: first, middle, last.
FOLLOWED = 4
MOMENTS = 3

type Row = dict[str, Any]


@dataclass
class Samples:
    """A summary of a run's samples.

    Attributes:
        scores: step → verifier → mean over prompts with its interval.
        labels: verifier → step → label → number of samples.
        tokens: step → response lengths in tokens.
        groups: the samples of one prompt in the first step, and in the last.
        followed: for some prompts, their best answers from early to late.
    """

    scores: dict[int, dict[str, Interval]] = field(default_factory=dict)
    labels: dict[str, dict[int, Counter[str]]] = field(default_factory=lambda: defaultdict(dict))
    tokens: dict[int, list[int]] = field(default_factory=dict)
    groups: list[list[Row]] = field(default_factory=list)
    followed: list[list[Row]] = field(default_factory=list)


def gather(run_dir: Path) -> Samples:
    """Read the samples step by step. Raises ValueError for a line that is not JSON."""
    gathered = Samples()
    # For each prompt of the first step: its best answer in every step that sampled it.
    best_answers: dict[str, list[Row]] = {}
    first_rows: list[Row] = []
    rows: list[Row] = []
    for rows in _steps(run_dir):
        _add_step(gathered, rows)
        first_rows = first_rows or rows
        for prompt, best in _best(rows).items():
            if rows is first_rows:
                best_answers[prompt] = [best]
            elif prompt in best_answers:
                best_answers[prompt].append(best)
    gathered.groups = [widest_group(of_step) for of_step in (first_rows, rows) if of_step]
    repeated = [answers for answers in best_answers.values() if len(answers) > 1]
    repeated.sort(key=lambda answers: -_change(answers))
    gathered.followed = [_moments(answers) for answers in repeated[:FOLLOWED]]
    return gathered


def _steps(run_dir: Path) -> Iterator[list[Row]]:
    """The rows of each step."""
    for _, rows in groupby(sample_files.read(run_dir), key=lambda row: row["step"]):
        yield list(rows)


def _add_step(gathered: Samples, rows: Sequence[Row]) -> None:
    step = rows[0]["step"]
    scores: dict[str, dict[Any, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        for verifier, verdict in row["verdicts"].items():
            if "score" in verdict:
                scores[verifier][row["prompt_id"]].append(verdict["score"])
            counts = gathered.labels[verifier].setdefault(step, Counter())
            counts[str(verdict.get("label", "no verdict"))] += 1
    gathered.scores[step] = {}
    for verifier, scores_of_prompts in scores.items():
        means = [fmean(values) for values in scores_of_prompts.values()]
        if all(0 <= mean <= 1 for mean in means):
            gathered.scores[step][verifier] = mean_interval(means)
        elif len(means) > 1:
            gathered.scores[step][verifier] = normal_interval(means)
    lengths = [row["tokens"] for row in rows if "tokens" in row]
    if lengths:
        gathered.tokens[step] = lengths


def _best(rows: Sequence[Row]) -> dict[Any, Row]:
    """Each prompt's sample with the highest reward, the first one on ties. Prompts without a reward are left out."""
    best: dict[Any, Row] = {}
    for row in rows:
        prompt = row["prompt_id"]
        if row["reward"] is None:
            continue
        if prompt not in best or row["reward"] > best[prompt]["reward"]:
            best[prompt] = row
    return best


def _change(answers: Sequence[Row]) -> float:
    """The absolute difference between the rewards of the last and the first answer."""
    return abs(answers[-1]["reward"] - answers[0]["reward"])


def _moments(answers: Sequence[Row]) -> list[Row]:
    """``MOMENTS`` answers at equal distances, from the first to the last."""
    places = {round(i * (len(answers) - 1) / (MOMENTS - 1)) for i in range(MOMENTS)}
    return [answers[place] for place in sorted(places)]


def widest_group(rows: Sequence[Row]) -> list[Row]:
    """The samples of the prompt whose rewards differ most."""
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["prompt_id"], []).append(row)

    def spread(prompt: Any) -> float:
        rewards = [row["reward"] for row in groups[prompt] if row["reward"] is not None]
        return max(rewards) - min(rewards) if rewards else -1.0

    widest = max(groups, key=spread)
    return sorted(groups[widest], key=lambda row: row["sample_index"])


def split_thinking(response: str, marks: Sequence[str]) -> tuple[str, str]:
    """The thinking in a response, or an empty text, and the answer after it."""
    begin, end = marks
    thinking, end_mark, answer = response.rpartition(end)
    if end_mark:
        if begin in thinking:
            thinking = thinking.partition(begin)[2]
        return thinking.strip(), answer.strip()
    if begin in response:
        return response.partition(begin)[2].strip(), ""
    return "", response


def bins(groups: Mapping[str, Sequence[int]], count: int = 16) -> tuple[list[int], dict[str, list[float]]]:
    """The edges of ``count`` bins with an integer width, and the share of each group's values in every bin."""
    highest = max(max(values) for values in groups.values())
    size = max(1, -(-(highest + 1) // count))
    edges = [size * i for i in range(count + 1)]
    shares = {}
    for name, values in groups.items():
        counts = Counter(min(value // size, count - 1) for value in values)
        shares[name] = [counts[i] / len(values) for i in range(count)]
    return edges, shares
