"""What a report shows of samples.jsonl, gathered in one pass: the file can be larger than memory."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from recipes.evaluation.statistics import Interval, mean_interval, normal_interval
from recipes.run.records import read_rows

FOLLOWED = 4  # prompts whose answers are shown over training
MOMENTS = 3  # of each: the first answer, one in the middle, the last

type Row = dict[str, Any]


@dataclass
class Samples:
    """``scores``: step → verifier → mean over prompts and its interval; ``labels``: verifier → step → label → count;
    ``tokens``: of each step's responses; ``groups``: one prompt's samples, of the first and of the last step;
    ``followed``: answers to the same prompt from early to late."""

    scores: dict[int, dict[str, Interval]] = field(default_factory=dict)
    labels: dict[str, dict[int, Counter[str]]] = field(default_factory=lambda: defaultdict(dict))
    tokens: dict[int, list[int]] = field(default_factory=dict)
    groups: list[list[Row]] = field(default_factory=list)
    followed: list[list[Row]] = field(default_factory=list)


def gather(path: Path) -> Samples:
    """Read the file step by step. Raises ValueError for a line that is not JSON."""
    found = Samples()
    seen: dict[str, list[Row]] = {}  # best sample of the first step's prompts, each time they come again
    rows: list[Row] = []

    first: list[Row] = []

    def end_step() -> None:
        _add_step(found, rows)
        for prompt, best in _best(rows).items():
            if prompt in seen or len(found.scores) == 1:
                seen.setdefault(prompt, []).append(best)

    for row in read_rows(path):
        if rows and row["step"] != rows[0]["step"]:
            end_step()
            first, rows = first or rows, []
        rows.append(row)
    if rows:
        end_step()
    found.groups = [widest_group(each) for each in (first, rows) if each]
    again = sorted((each for each in seen.values() if len(each) > 1), key=lambda each: -_gain(each))
    found.followed = [_moments(each) for each in again[:FOLLOWED]]
    return found


def _add_step(found: Samples, rows: Sequence[Row]) -> None:
    step = rows[0]["step"]
    scores: dict[str, dict[Any, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        for name, verdict in row["verdicts"].items():
            if "score" in verdict:
                scores[name][row["prompt_id"]].append(verdict["score"])
            counts = found.labels[name].setdefault(step, Counter())
            counts[str(verdict.get("label", "no verdict"))] += 1
    found.scores[step] = {}
    for name, of_prompts in scores.items():
        means = [fmean(values) for values in of_prompts.values()]
        if all(0 <= mean <= 1 for mean in means):
            found.scores[step][name] = mean_interval(means)
        elif len(means) > 1:
            found.scores[step][name] = normal_interval(means)
    if lengths := [row["tokens"] for row in rows if "tokens" in row]:
        found.tokens[step] = lengths


def _best(rows: Sequence[Row]) -> dict[Any, Row]:
    """Each prompt's sample of the highest reward, the first of equals."""
    best: dict[Any, Row] = {}
    for row in rows:
        if row["reward"] is not None and row["reward"] > best.get(row["prompt_id"], {"reward": -1e300})["reward"]:
            best[row["prompt_id"]] = row
    return best


def _gain(answers: Sequence[Row]) -> float:
    return abs(answers[-1]["reward"] - answers[0]["reward"])


def _moments(answers: Sequence[Row]) -> list[Row]:
    places = {round(i * (len(answers) - 1) / (MOMENTS - 1)) for i in range(MOMENTS)}
    return [answers[place] for place in sorted(places)]


def widest_group(rows: Sequence[Row]) -> list[Row]:
    """The samples of the prompt whose rewards differ most."""
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["prompt_id"], []).append(row)
    rewards = {i: [r["reward"] for r in group if r["reward"] is not None] for i, group in groups.items()}
    widest = max(groups, key=lambda i: max(rewards[i]) - min(rewards[i]) if rewards[i] else -1.0)
    return sorted(groups[widest], key=lambda row: row["sample_index"])


def split_thinking(response: str, marks: Sequence[str]) -> tuple[str, str]:
    """What a response thinks, and what it says behind that; the first is empty where it does not think."""
    begin, end = marks
    before, mark, after = response.rpartition(end)
    if mark:
        return before.partition(begin)[2].strip() if begin in before else before.strip(), after.strip()
    if begin in response:
        return response.partition(begin)[2].strip(), ""
    return "", response


def bins(groups: Mapping[str, Sequence[int]], count: int = 16) -> tuple[list[int], dict[str, list[float]]]:
    """Edges of ``count`` bins of whole size, and of each group the share of values in each."""
    highest = max(max(values) for values in groups.values())
    size = max(1, -(-(highest + 1) // count))
    edges = [size * i for i in range(count + 1)]
    shares = {}
    for name, values in groups.items():
        found = Counter(min(value // size, count - 1) for value in values)
        shares[name] = [found[i] / len(values) for i in range(count)]
    return edges, shares
