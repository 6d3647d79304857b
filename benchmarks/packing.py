"""How full and how even packed micro-batches are, next to first-fit and to what peers publish.

``python -m benchmarks.packing`` writes ``benchmarks/results/packing.json`` and prints its tables. Nothing runs on a
model: lengths are drawn, each method shares them out, and what it made is counted. The peers' methods are written here
anew from their descriptions, with our estimate of a sequence's work where they have one of their own.
"""

import heapq
import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from hydra import compose, initialize_config_dir
from rich.console import Console
from rich.table import Table

from megatron_ext import batch as batches
from megatron_ext import platform
from megatron_ext.batch import Prompt, TokenBatch
from megatron_ext.layout import ParallelConfig
from megatron_ext.packing import Cost, VisionInputs, cost_of, plan
from megatron_ext.weight_map import round_up
from recipes.config import Config, parse, samples_per_step
from recipes.preflight.architecture import model_config
from recipes.run import records

RESULT = Path("benchmarks/results/packing.json")
SEEDS = 10
USEFUL_GOAL = 0.98  # tokens / tokens that are computed, at least
IMBALANCE_GOAL = 0.02  # the costliest rank's sum / the mean - 1, at most
RECIPES = {"safework_72b": (1, 2, 4, 8), "safework_7b": (16, 32)}  # recipe → data-parallel ranks
LARGE = 16384  # sequences, for the time of a plan alone

Plan = list[list[list[int]]]  # rank → micro-batches → sequences
Packs = list[list[int]]


@dataclass(frozen=True)
class Lengths:
    """Lognormal lengths: medians in tokens and deviations of the logarithm; a share of the prompts has an image.

    Half of a response's variance is its prompt's, shared by the samples of a group.
    """

    says: str
    prompt: tuple[float, float]
    response: tuple[float, float]
    images: float


DISTRIBUTIONS = {
    "reasoning": Lengths(
        "DeepSeek-R1's traces on OpenR1-Math-220k: three quarters below 8192 tokens and most of the others up to 16384 "
        "(huggingface.co/blog/open-r1/update-2), taken as 90 % below 16384; cut off at the recipe's 8192",
        (250, 1.0),
        (3800, 1.14),
        0.0,
    ),
    "answers": Lengths("our choice: shorter answers with a long tail", (250, 1.0), (700, 1.0), 0.0),
    "images": Lengths(
        "our choice: the same answers; half of the prompts with an image of 64 to 5350 tokens",
        (250, 1.0),
        (700, 1.0),
        0.5,
    ),
}


@dataclass(frozen=True)
class Batch:
    """One step: padded lengths and costs of the sequences, and what they are shared out over."""

    lengths: list[int]
    costs: list[int]
    tokens: int
    ranks: int
    limit: int
    pack_multiple: int


def main() -> None:
    platform.activate("cpu")
    cases = []
    for recipe, sizes in RECIPES.items():
        for ranks in sizes:
            for name in DISTRIBUTIONS:
                cases.append(measure(recipe, ranks, name))
                print(f"{recipe}, {ranks} data-parallel ranks, {name}: done", file=sys.stderr, flush=True)
    result = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": "python -m benchmarks.packing",
        "seeds": list(range(SEEDS)),
        **records.environment(platform.current().machine(), 1),
        "distributions": {name: shape.says for name, shape in DISTRIBUTIONS.items()},
        "methods": {name: " ".join((method.__doc__ or "").split()) for name, method in METHODS.items()},
        **verdict(cases),
        "large": large(),
        "cases": cases,
    }
    RESULT.parent.mkdir(exist_ok=True)
    records.write_json(RESULT, result)
    Console().print(*tables(result), f"{RESULT} has all numbers", sep="\n")


def measure(recipe: str, ranks: int, distribution: str) -> dict[str, Any]:
    """Every method on the recipe's batches of all seeds."""
    per_seed: dict[str, list[dict[str, float]]] = {name: [] for name in METHODS}
    for seed in range(SEEDS):
        batch = draw(recipe, ranks, DISTRIBUTIONS[distribution], seed)
        for name, method in METHODS.items():
            made, milliseconds = timed(method, batch)
            per_seed[name].append({**examine(batch, made), "milliseconds": milliseconds})
    found = {name: {key: spread([row[key] for row in rows]) for key in rows[0]} for name, rows in per_seed.items()}
    return {"recipe": recipe, "data_parallel": ranks, "distribution": distribution, "methods": found}


def large() -> dict[str, float]:
    """Milliseconds of our plan for many sequences."""
    batch = draw("safework_7b", 16, DISTRIBUTIONS["reasoning"], 0, LARGE)
    return {"sequences": LARGE, "milliseconds": statistics.median(timed(ours, batch)[1] for _ in range(3))}


def timed(method: Callable[[Batch], Plan], batch: Batch) -> tuple[Plan, float]:
    """The plan, and milliseconds of the process: the machine's other work does not count."""
    started = time.process_time()
    made = method(batch)
    return made, 1000 * (time.process_time() - started)


@cache
def configured(recipe: str, ranks: int) -> tuple[Config, Cost]:
    """The recipe on as many GPUs as ``ranks`` replicas take, and its model's costs."""
    with initialize_config_dir(str(Path("conf").resolve()), version_base="1.3"):
        replica = parse(compose("config", [f"recipe={recipe}"])).parallel.model_parallel
        config = parse(compose("config", [f"recipe={recipe}", f"cluster.ranks={replica * ranks}", "rollout.engines=1"]))
    return config, cost_of(model_config(config.model.path), config.model.frozen)


def draw(recipe: str, ranks: int, shape: Lengths, seed: int, samples: int | None = None) -> Batch:
    """The recipe's number of samples (or ``samples``), limits, layout and model, on ``ranks`` replicas."""
    config, cost = configured(recipe, ranks)
    group = config.algorithm.samples_per_prompt
    longest = config.data.max_prompt_tokens, config.rollout.max_response_tokens
    responses = sample(random.Random(seed), shape, (samples or samples_per_step(config)) // group, group, longest)
    multiple = config.precision.token_multiple
    return batch_of(responses, cost, config.parallel, multiple, ranks, config.parallel.micro_batch_tokens)


def batch_of(
    responses: TokenBatch, cost: Cost, parallel: ParallelConfig, multiple: int, ranks: int, limit: int
) -> Batch:
    """As ``Policy.micro_batches`` and ``pack`` pad."""
    return Batch(
        lengths=[round_up(length, parallel.token_multiple) for length in responses.lengths.tolist()],
        costs=cost.of(responses),
        tokens=int(responses.lengths.sum()),
        ranks=ranks,
        limit=limit,
        pack_multiple=parallel.tensor * multiple * parallel.token_multiple,
    )


def sample(generator: random.Random, shape: Lengths, prompts: int, group: int, longest: tuple[int, int]) -> TokenBatch:
    """``group`` responses to each of ``prompts`` prompts; a length beyond the ``longest`` is cut off there."""
    longest_prompt, longest_response = longest
    drawn_prompts = []
    drawn_responses = []
    images = []
    for n in range(prompts):
        prompt = math.ceil(shape.prompt[0] * math.exp(generator.gauss(0, shape.prompt[1])))
        vision = None
        if generator.random() < shape.images:
            image = round(64 * math.exp(generator.random() * math.log(5350 / 64)))
            prompt += image
            vision = VisionInputs(None, None, list(range(image)), None)  # type: ignore[arg-type]
        drawn_prompts.append(Prompt(f"p{n}", np.zeros(min(prompt, longest_prompt), np.int32)))
        images.append(vision)
        shared = generator.gauss(0, shape.response[1] / math.sqrt(2))
        for _ in range(group):
            own = generator.gauss(0, shape.response[1] / math.sqrt(2))
            response = math.ceil(shape.response[0] * math.exp(shared + own))
            drawn_responses.append(np.zeros(min(response, longest_response), np.int32))
    prompt_index = np.repeat(np.arange(prompts), group)
    return batches.build(drawn_prompts, drawn_responses, prompt_index=prompt_index, vision=images)


def examine(batch: Batch, made: Plan) -> dict[str, float]:
    """What a plan is worth. Raises ValueError where a sequence is left out or micro-batches are not as many everywhere.

    ``useful_tokens``: of those that are computed, padding included. ``filled``: of the micro-batches' room.
    ``beyond``: micro-batches above the limit, which may not fit in memory, of all; ``largest``: the largest's tokens,
    of the limit. ``imbalance``: by how much the costliest rank's step exceeds the mean. ``rounds``: the same if ranks
    met after every micro-batch; ``worst_round``: of the most uneven one. ``stages``: by how much the costliest
    micro-batch, for which the others of a pipeline wait, exceeds the mean.
    """
    if sorted(i for rank in made for indices in rank for i in indices) != list(range(len(batch.lengths))):
        raise ValueError("a plan has each sequence once")
    if len({len(rank) for rank in made}) != 1 or not all(indices for rank in made for indices in rank):
        raise ValueError("a plan has as many micro-batches on every rank, none empty")
    sizes = [sum(batch.lengths[i] for i in indices) for rank in made for indices in rank]
    costs = [[sum(batch.costs[i] for i in indices) for indices in rank] for rank in made]
    rounds = [list(costs_of_round) for costs_of_round in zip(*costs, strict=True)]
    steps = [sum(rank) for rank in costs]
    mean = sum(steps) / len(steps)
    return {
        "micro_batches": len(made[0]),
        "least": -(-sum(batch.lengths) // (batch.limit * batch.ranks)),
        "useful_tokens": batch.tokens / sum(round_up(size, batch.pack_multiple) for size in sizes),
        "filled": sum(sizes) / (batch.limit * len(sizes)),
        "beyond": sum(size > batch.limit for size in sizes) / len(sizes),
        "largest": max(sizes) / batch.limit,
        "imbalance": max(steps) / mean - 1,
        "rounds": sum(map(max, rounds)) / mean - 1,
        "worst_round": max(max(r) * len(r) / sum(r) for r in rounds) - 1,
        "stages": max(map(max, rounds)) * len(sizes) / sum(steps) - 1,
    }


def ours(batch: Batch) -> Plan:
    """``megatron_ext.packing.plan``: MULTIFIT under the token limit, rounds of like cost, costliest to the emptiest."""
    return plan(batch.lengths, batch.ranks, batch.limit, 1, batch.costs)


def first_fit(batch: Batch) -> Plan:
    """As many sequences for every rank, in their order; first-fit on each; who has fewer micro-batches splits its
    largest."""
    share = len(batch.lengths) // batch.ranks
    made = [
        fit_first(list(range(rank * share, (rank + 1) * share)), batch.lengths, batch.limit)
        for rank in range(batch.ranks)
    ]
    most = max(map(len, made))
    for packs in made:
        split_largest(packs, batch.lengths, most)
    return made


def first_fit_decreasing(batch: Batch) -> Plan:
    """This project's plan before: longest first to the rank with the fewest tokens, as many sequences for every rank;
    first-fit by length; who has fewer micro-batches splits its largest."""
    share = len(batch.lengths) // batch.ranks
    ranks: Packs = [[] for _ in range(batch.ranks)]
    load = [0] * batch.ranks
    for i in sorted(range(len(batch.lengths)), key=lambda i: (-batch.lengths[i], i)):
        rank = min((r for r in range(batch.ranks) if len(ranks[r]) < share), key=lambda r: (load[r], r))
        ranks[rank].append(i)
        load[rank] += batch.lengths[i]
    made = [fit_first(indices, batch.lengths, batch.limit) for indices in ranks]
    most = max(map(len, made))
    for packs in made:
        split_largest(packs, batch.lengths, most)
    return made


def verl(batch: Batch) -> Plan:
    """verl's balance_batch and rearrange_micro_batches, by our reading: Karmarkar-Karp on the sequences' work, as many
    for every rank; on each, Karmarkar-Karp again into as many micro-batches as the fullest rank's tokens need, sorted
    by the squares of the lengths. The token limit is not held."""
    ranks = differencing(batch.costs, batch.ranks, equal=True)
    count = max(-(-sum(batch.lengths[i] for i in rank) // batch.limit) for rank in ranks)
    made = []
    for rank in ranks:
        packs = differencing([batch.costs[i] for i in rank], count, equal=False)
        packs = [[rank[i] for i in indices] for indices in packs]
        made.append(sorted(packs, key=lambda indices: -sum(batch.lengths[i] ** 2 for i in indices)))
    return made


def slime(batch: Batch) -> Plan:
    """slime's build_dp_schedule with balance_data, by our reading: first-fit of all sequences in their order, largest
    micro-batches split until the ranks divide them, Karmarkar-Karp on their work, as many for every rank."""
    packs = fit_first(list(range(len(batch.lengths))), batch.lengths, batch.limit)
    split_largest(packs, batch.lengths, round_up(len(packs), batch.ranks))
    work = [sum(batch.costs[i] for i in indices) for indices in packs]
    return [[packs[p] for p in rank] for rank in differencing(work, batch.ranks, equal=True)]


def nemo_rl(batch: Batch) -> Plan:
    """NeMo-RL's sequence packing, by our reading: modified first-fit decreasing (Johnson and Garey 1985) of all
    sequences, single ones moved to new micro-batches until the ranks divide them, dealt out in turn."""
    packs = modified_first_fit_decreasing(batch.lengths, batch.limit)
    count = round_up(len(packs), batch.ranks)
    givers = sorted((p for p in packs if len(p) > 1), key=len, reverse=True)
    while len(packs) < count:
        giver = next(p for p in givers if len(p) > 1)
        packs.append([giver.pop()])
    return [packs[rank :: batch.ranks] for rank in range(batch.ranks)]


METHODS: dict[str, Callable[[Batch], Plan]] = {
    "ours": ours,
    "first_fit": first_fit,
    "first_fit_decreasing": first_fit_decreasing,
    "verl": verl,
    "slime": slime,
    "nemo_rl": nemo_rl,
}


def fit_first(order: Sequence[int], lengths: Sequence[int], limit: int) -> Packs:
    """Each into the first pack that has room."""
    packs: Packs = []
    room: list[int] = []
    for i in order:
        p = next((p for p, left in enumerate(room) if left >= lengths[i]), None)
        if p is None:
            p = len(packs)
            packs.append([])
            room.append(limit)
        packs[p].append(i)
        room[p] -= lengths[i]
    return packs


def split_largest(packs: Packs, lengths: Sequence[int], count: int) -> None:
    """In place, until there are ``count``: the pack with the most tokens becomes two of about as many."""
    while len(packs) < count:
        largest = max((p for p in packs if len(p) > 1), key=lambda p: sum(lengths[i] for i in p))
        halves: tuple[list[int], list[int]] = ([], [])
        for i in sorted(largest, key=lambda i: -lengths[i]):
            min(halves, key=lambda half: sum(lengths[j] for j in half)).append(i)
        packs.remove(largest)
        packs += halves


def differencing(values: Sequence[int], parts: int, equal: bool) -> Packs:
    """Karmarkar and Karp's largest differencing method in ``parts`` ways; ``equal``: as many values in every part.

    Partial solutions, at first one for each value (or for ``parts`` neighbours in size), are joined, the two with the
    widest gap between their parts first: largest part with smallest.
    """
    order = sorted(range(len(values)), key=lambda i: values[i])
    size = parts if equal else 1
    heap: list[tuple[int, int, list[tuple[int, list[int]]]]] = []
    for number, start in enumerate(range(0, len(order), size)):
        one: list[tuple[int, list[int]]] = [(values[i], [i]) for i in order[start : start + size]]
        one = sorted(one + [(0, [])] * (parts - len(one)), reverse=True)
        heapq.heappush(heap, (one[-1][0] - one[0][0], number, one))
    while len(heap) > 1:
        (_, number, one), (_, _, other) = heapq.heappop(heap), heapq.heappop(heap)
        joined = sorted(
            ((a + b, x + y) for (a, x), (b, y) in zip(one, reversed(other), strict=True)),
            key=lambda part: part[0],
            reverse=True,
        )
        heapq.heappush(heap, (joined[-1][0] - joined[0][0], number, joined))
    return [sorted(indices) for _, indices in heap[0][2]]


def modified_first_fit_decreasing(lengths: Sequence[int], limit: int) -> Packs:
    """Johnson and Garey, Journal of Complexity 1 (1985): packs of what is above half the limit, largest first, get one
    above a third each where it fits; the others, emptiest first, two above a sixth; then all the largest that fits, and
    the rest goes to new packs by first-fit decreasing."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    packs = [[i] for i in order if 2 * lengths[i] > limit]
    room = [limit - lengths[p[0]] for p in packs]
    medium = [i for i in order if 2 * lengths[i] <= limit < 3 * lengths[i]]
    small = [i for i in order if 3 * lengths[i] <= limit < 6 * lengths[i]]
    tiny = [i for i in order if 6 * lengths[i] <= limit]

    def put(p: int, candidates: list[int]) -> bool:
        """The largest candidate that fits."""
        at = next((at for at, i in enumerate(candidates) if lengths[i] <= room[p]), None)
        if at is not None:
            packs[p].append(candidates[at])
            room[p] -= lengths[candidates.pop(at)]
        return at is not None

    for p in range(len(packs)):
        put(p, medium)
    for p in reversed(range(len(packs))):
        if len(packs[p]) == 1 and len(small) > 1 and lengths[small[-1]] + lengths[small[-2]] <= room[p]:
            put(p, [small.pop()])
            put(p, small)
    rest = sorted(medium + small + tiny, key=lambda i: (-lengths[i], i))
    for p in range(len(packs)):
        while put(p, rest):
            pass
    return packs + fit_first(rest, lengths, limit)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and greatest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def verdict(cases: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Our worst over all cases and seeds, and whether it meets the goals."""
    mine = [case["methods"]["ours"] for case in cases]
    useful = min(found["useful_tokens"]["min"] for found in mine)
    imbalance = max(found["imbalance"]["max"] for found in mine)
    return {
        "useful_tokens": {"worst": useful, "goal": f"≥ {USEFUL_GOAL}", "met": useful >= USEFUL_GOAL},
        "imbalance": {"worst": imbalance, "goal": f"≤ {IMBALANCE_GOAL}", "met": imbalance <= IMBALANCE_GOAL},
        "milliseconds": {"worst": max(found["milliseconds"]["max"] for found in mine)},
    }


def tables(result: dict[str, Any]) -> list[Table]:
    """Medians of every method in every case, and our worst against the goals."""
    found = []
    for case in result["cases"]:
        title = f"{case['recipe']}, {case['data_parallel']} data-parallel ranks, {case['distribution']}"
        table = Table(
            "", "micro-batches", "useful", "filled", "beyond limit", "imbalance", "in rounds", "stages", "ms",
            title=title,
        )  # fmt: skip
        for name, row in case["methods"].items():
            cells = (f"{100 * row[key]['median']:.2f} %" for key in ("useful_tokens", "filled", "beyond"))
            uneven = (f"{100 * row[key]['median']:.2f} %" for key in ("imbalance", "rounds", "stages"))
            count = f"{row['micro_batches']['median']:g} (≥ {row['least']['median']:g})"
            table.add_row(name, count, *cells, *uneven, f"{row['milliseconds']['median']:.1f}")
        found.append(table)
    goals = Table("", "worst", "goal", "met", title="ours, over all cases and seeds")
    for name in ("useful_tokens", "imbalance"):
        part = result[name]
        goals.add_row(name, f"{100 * part['worst']:.2f} %", part["goal"], "yes" if part["met"] else "no")
    return [*found, goals]


if __name__ == "__main__":
    main()
