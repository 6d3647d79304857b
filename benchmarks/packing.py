"""Measures how full and how balanced packed micro-batches are, compared with first-fit and with peers' methods.

``python -m benchmarks.packing`` writes ``benchmarks/results/packing.json`` and prints its tables. No model runs. Each
method packs sequences of random lengths, and its plan is examined. The peers' methods are reimplemented here from their
descriptions. All methods use our estimate of a sequence's cost, even if a peer has its own.
"""

import heapq
import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from hydra import compose, initialize_config_dir
from rich.console import Console
from rich.table import Table

from megatron_ext import platform

platform.activate("cpu")  # before Megatron-Core is imported

from benchmarks import figures  # noqa: E402
from megatron_ext import batch as batches  # noqa: E402
from megatron_ext import packing  # noqa: E402
from megatron_ext.batch import Prompt, TokenBatch  # noqa: E402
from megatron_ext.layout import ParallelConfig  # noqa: E402
from megatron_ext.packing import Cost, VisionInputs, cost_of  # noqa: E402
from megatron_ext.weight_map import round_up  # noqa: E402
from recipes.config import Config, parse, samples_per_step  # noqa: E402
from recipes.preflight.architecture import model_config  # noqa: E402
from recipes.run import records  # noqa: E402

RESULT = Path("benchmarks/results/packing.json")
SEEDS = 10
USEFUL_GOAL = 0.98  # at least: tokens / computed tokens, padding included
IMBALANCE_GOAL = 0.02  # at most: cost of the costliest rank / mean cost of a rank - 1
RECIPES = {"safework_72b": (1, 2, 4, 8), "safework_7b": (16, 32)}  # recipe → data-parallel ranks
LARGE = 16384  # sequences of the plan of which only the time is measured

Plan = list[list[list[int]]]  # rank → micro-batch → indices of its sequences
Packs = list[list[int]]  # micro-batch → indices of its sequences
Partition = list[tuple[int, list[int]]]  # (sum, indices) of each part, the largest sum first


@dataclass(frozen=True)
class Lengths:
    """Log-normal lengths: (median in tokens, standard deviation of the logarithm).

    ``images`` is the share of prompts with an image. Half of the variance of a response's length comes from its prompt,
    so the samples of a group share it.
    """

    description: str
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
    """The sequences of one step and the limits for packing them."""

    lengths: list[int]  # in tokens, padded
    costs: list[int]
    tokens: int  # of all sequences, without padding
    ranks: int  # data-parallel
    limit: int  # tokens of a micro-batch
    pack_multiple: int  # a micro-batch is padded to a multiple of these tokens


def main() -> None:
    made_by = figures.source("benchmarks.packing")
    cases = []
    for recipe, sizes in RECIPES.items():
        for ranks in sizes:
            for name in DISTRIBUTIONS:
                cases.append(measure(recipe, ranks, name))
                print(f"{recipe}, {ranks} data-parallel ranks, {name}: done", file=sys.stderr, flush=True)
    result = {
        "seeds": list(range(SEEDS)),
        **records.environment(platform.current().machine(), 1),
        "distributions": {name: lengths.description for name, lengths in DISTRIBUTIONS.items()},
        "methods": {name: " ".join((method.__doc__ or "").split()) for name, method in METHODS.items()},
        **verdict(cases),
        "large": large(),
        "cases": cases,
    }
    figures.write(RESULT, "python -m benchmarks.packing", made_by, result)
    Console().print(*tables(result), f"{RESULT} has all numbers", sep="\n")


def measure(recipe: str, ranks: int, distribution: str) -> dict[str, Any]:
    """The spread of each measure over the seeds, for every method on the recipe's batches."""
    per_seed: dict[str, list[dict[str, float]]] = {name: [] for name in METHODS}
    for seed in range(SEEDS):
        batch = draw(recipe, ranks, DISTRIBUTIONS[distribution], seed)
        for name, method in METHODS.items():
            method_plan, milliseconds = timed(method, batch)
            per_seed[name].append({**examine(batch, method_plan), "milliseconds": milliseconds})
    methods = {name: {key: spread([row[key] for row in rows]) for key in rows[0]} for name, rows in per_seed.items()}
    return {"recipe": recipe, "data_parallel": ranks, "distribution": distribution, "methods": methods}


def large() -> dict[str, float]:
    """Milliseconds of our plan for many sequences."""
    batch = draw("safework_7b", 16, DISTRIBUTIONS["reasoning"], 0, LARGE)
    milliseconds = [timed(ours, batch)[1] for _ in range(3)]
    return {"sequences": LARGE, "milliseconds": statistics.median(milliseconds)}


def timed(method: Callable[[Batch], Plan], batch: Batch) -> tuple[Plan, float]:
    """The plan, and its milliseconds of CPU time, which other work on the machine does not change."""
    started = time.process_time()
    method_plan = method(batch)
    return method_plan, 1000 * (time.process_time() - started)


@cache
def configured(recipe: str, ranks: int) -> tuple[Config, Cost]:
    """The recipe with ``ranks`` data-parallel ranks, and the costs of its model."""
    with initialize_config_dir(str(Path("conf").resolve()), version_base="1.3"):
        model_parallel = parse(compose("config", [f"recipe={recipe}"])).parallel.model_parallel
        gpus = model_parallel * ranks
        config = parse(compose("config", [f"recipe={recipe}", f"cluster.ranks={gpus}", "rollout.engines=1"]))
    return config, cost_of(model_config(config.model.path), config.model.frozen)


def draw(recipe: str, ranks: int, lengths: Lengths, seed: int, samples: int | None = None) -> Batch:
    """A random batch with the recipe's limits, layout and model, on ``ranks`` data-parallel ranks.

    It has ``samples`` sequences, by default as many as a step of the recipe.
    """
    config, cost = configured(recipe, ranks)
    if samples is None:
        samples = samples_per_step(config)
    group_size = config.algorithm.samples_per_prompt
    limits = (config.data.max_prompt_tokens, config.rollout.max_response_tokens)
    responses = sample(random.Random(seed), lengths, samples // group_size, group_size, limits)
    multiple = config.precision.token_multiple
    return batch_of(responses, cost, config.parallel, multiple, ranks, config.parallel.micro_batch_tokens)


def batch_of(
    responses: TokenBatch, cost: Cost, parallel: ParallelConfig, multiple: int, ranks: int, limit: int
) -> Batch:
    """Pads as ``Policy.micro_batches`` and ``megatron_ext.packing.pack`` do."""
    return Batch(
        lengths=[round_up(length, parallel.token_multiple) for length in responses.lengths.tolist()],
        costs=cost.of(responses),
        tokens=int(responses.lengths.sum()),
        ranks=ranks,
        limit=limit,
        pack_multiple=parallel.tensor * multiple * parallel.token_multiple,
    )


def sample(
    generator: random.Random, lengths: Lengths, prompts: int, group_size: int, limits: tuple[int, int]
) -> TokenBatch:
    """``group_size`` responses to each of ``prompts`` prompts, truncated to ``limits`` (prompt, response)."""
    prompt_limit, response_limit = limits
    prompt_median, prompt_deviation = lengths.prompt
    response_median, response_deviation = lengths.response
    half_deviation = response_deviation / math.sqrt(2)  # half of the variance
    drawn_prompts = []
    drawn_responses = []
    images = []
    for n in range(prompts):
        prompt_tokens = math.ceil(prompt_median * math.exp(generator.gauss(0, prompt_deviation)))
        vision = None
        if generator.random() < lengths.images:
            image_tokens = round(64 * math.exp(generator.random() * math.log(5350 / 64)))  # 64 to 5350, log-uniform
            prompt_tokens += image_tokens
            vision = VisionInputs(None, None, list(range(image_tokens)), None)  # type: ignore[arg-type]
        drawn_prompts.append(Prompt(f"p{n}", np.zeros(min(prompt_tokens, prompt_limit), np.int32)))
        images.append(vision)
        shared_noise = generator.gauss(0, half_deviation)
        for _ in range(group_size):
            own_noise = generator.gauss(0, half_deviation)
            response_tokens = math.ceil(response_median * math.exp(shared_noise + own_noise))
            drawn_responses.append(np.zeros(min(response_tokens, response_limit), np.int32))
    prompt_index = np.repeat(np.arange(prompts), group_size)
    return batches.build(drawn_prompts, drawn_responses, prompt_index=prompt_index, vision=images)


def examine(batch: Batch, plan: Plan) -> dict[str, float]:
    """The measures of a plan.

    Returns:
        micro_batches: of each rank.
        least: the fewest micro-batches of a rank that could hold the tokens.
        useful_tokens: share of the computed tokens that are no padding.
        useful_if_constant: the same where every micro-batch is padded to the limit (``parallel.constant_length``).
        filled: share of the micro-batches' limit that is used.
        beyond: share of micro-batches above the limit, which may not fit in memory.
        largest: tokens of the largest micro-batch / the limit.
        imbalance: cost of the costliest rank / mean cost of a rank - 1.
        rounds: the same if all ranks waited for each other after every micro-batch.
        worst_round: the same for the most unbalanced of these rounds.
        stages: cost of the costliest micro-batch, which delays the others of a pipeline, / mean cost - 1.

    Raises:
        ValueError: a sequence is missing or occurs twice, a micro-batch is empty, or ranks have different numbers of
            micro-batches.
    """
    sequences = sorted(i for rank in plan for indices in rank for i in indices)
    if sequences != list(range(len(batch.lengths))):
        raise ValueError("a plan has each sequence once")
    if len({len(rank) for rank in plan}) != 1 or not all(indices for rank in plan for indices in rank):
        raise ValueError("a plan has as many micro-batches on every rank, none empty")
    sizes = [sum(batch.lengths[i] for i in indices) for rank in plan for indices in rank]
    padded_sizes = [round_up(size, batch.pack_multiple) for size in sizes]
    costs = [[sum(batch.costs[i] for i in indices) for indices in rank] for rank in plan]
    rank_costs = [sum(rank) for rank in costs]
    mean_rank_cost = sum(rank_costs) / len(rank_costs)
    # A round is the micro-batches with the same position on all ranks.
    rounds = list(zip(*costs, strict=True))
    longest_in_rounds = [max(costs_of_ranks) for costs_of_ranks in rounds]
    round_imbalances = [max(costs_of_ranks) * len(rounds[0]) / sum(costs_of_ranks) for costs_of_ranks in rounds]
    return {
        "micro_batches": len(plan[0]),
        "least": -(-sum(batch.lengths) // (batch.limit * batch.ranks)),
        "useful_tokens": batch.tokens / sum(padded_sizes),
        "useful_if_constant": batch.tokens / (round_up(batch.limit, batch.pack_multiple) * len(sizes)),
        "filled": sum(sizes) / (batch.limit * len(sizes)),
        "beyond": sum(size > batch.limit for size in sizes) / len(sizes),
        "largest": max(sizes) / batch.limit,
        "imbalance": max(rank_costs) / mean_rank_cost - 1,
        "rounds": sum(longest_in_rounds) / mean_rank_cost - 1,
        "worst_round": max(round_imbalances) - 1,
        "stages": max(longest_in_rounds) * len(sizes) / sum(rank_costs) - 1,
    }


def ours(batch: Batch) -> Plan:
    """``megatron_ext.packing.plan``.

    MULTIFIT packs under the token limit. A round has micro-batches of similar cost. In each round the costliest
    micro-batch goes to the rank with the least cost.
    """
    return packing.plan(batch.lengths, batch.ranks, batch.limit, 1, batch.costs)


def first_fit(batch: Batch) -> Plan:
    """Every rank gets equally many sequences, in their order, and packs them by first-fit.

    A rank with fewer micro-batches than another splits its largest.
    """
    sequences_per_rank = len(batch.lengths) // batch.ranks
    ranks = [list(range(rank * sequences_per_rank, (rank + 1) * sequences_per_rank)) for rank in range(batch.ranks)]
    return pack_each_rank(ranks, batch)


def first_fit_decreasing(batch: Batch) -> Plan:
    """The former plan of this project.

    The sequences go to the ranks by length, the longest first, each to the rank with the fewest tokens. Every rank gets
    equally many sequences and packs them by first-fit in the order of length. A rank with fewer micro-batches than
    another splits its largest.
    """
    sequences_per_rank = len(batch.lengths) // batch.ranks
    ranks: Packs = [[] for _ in range(batch.ranks)]
    tokens = [0] * batch.ranks
    for i in sorted(range(len(batch.lengths)), key=lambda i: (-batch.lengths[i], i)):
        open_ranks = [rank for rank in range(batch.ranks) if len(ranks[rank]) < sequences_per_rank]
        rank = min(open_ranks, key=lambda rank: (tokens[rank], rank))
        ranks[rank].append(i)
        tokens[rank] += batch.lengths[i]
    return pack_each_rank(ranks, batch)


def pack_each_rank(ranks: Packs, batch: Batch) -> Plan:
    """Pack each rank's sequences by first-fit. A rank with fewer micro-batches than another splits its largest."""
    plan = [fit_first(sequences, batch.lengths, batch.limit) for sequences in ranks]
    most_micro_batches = max(len(packs) for packs in plan)
    for packs in plan:
        split_largest(packs, batch.lengths, most_micro_batches)
    return plan


def verl(batch: Batch) -> Plan:
    """verl's balance_batch and rearrange_micro_batches, by our reading.

    Karmarkar-Karp on the sequences' costs gives every rank equally many sequences. On each rank Karmarkar-Karp again
    makes as many micro-batches as the tokens of the fullest rank need. They are sorted by the squares of the lengths.
    The token limit can be exceeded.
    """
    ranks = differencing(batch.costs, batch.ranks, equal=True)
    count = max(-(-sum(batch.lengths[i] for i in rank) // batch.limit) for rank in ranks)
    plan = []
    for rank in ranks:
        positions = differencing([batch.costs[i] for i in rank], count, equal=False)
        packs = [[rank[position] for position in pack] for pack in positions]
        packs.sort(key=lambda pack: -sum(batch.lengths[i] ** 2 for i in pack))
        plan.append(packs)
    return plan


def slime(batch: Batch) -> Plan:
    """slime's build_dp_schedule with balance_data, by our reading.

    First-fit packs all sequences in their order. The largest micro-batches are split until their number is a multiple
    of the ranks. Karmarkar-Karp on their costs gives every rank equally many micro-batches.
    """
    packs = fit_first(range(len(batch.lengths)), batch.lengths, batch.limit)
    split_largest(packs, batch.lengths, round_up(len(packs), batch.ranks))
    costs = [sum(batch.costs[i] for i in pack) for pack in packs]
    return [[packs[p] for p in rank] for rank in differencing(costs, batch.ranks, equal=True)]


def nemo_rl(batch: Batch) -> Plan:
    """NeMo-RL's sequence packing, by our reading.

    Modified first-fit decreasing (Johnson and Garey 1985) packs all sequences. Single sequences move to new
    micro-batches until the number of micro-batches is a multiple of the ranks. The micro-batches go to the ranks in
    turn.
    """
    packs = modified_first_fit_decreasing(batch.lengths, batch.limit)
    count = round_up(len(packs), batch.ranks)
    donors = sorted((pack for pack in packs if len(pack) > 1), key=len, reverse=True)
    while len(packs) < count:
        donor = next(pack for pack in donors if len(pack) > 1)
        packs.append([donor.pop()])
    return [packs[rank :: batch.ranks] for rank in range(batch.ranks)]


METHODS: dict[str, Callable[[Batch], Plan]] = {
    "ours": ours,
    "first_fit": first_fit,
    "first_fit_decreasing": first_fit_decreasing,
    "verl": verl,
    "slime": slime,
    "nemo_rl": nemo_rl,
}


def fit_first(order: Iterable[int], lengths: Sequence[int], limit: int) -> Packs:
    """First-fit: each sequence goes into the first pack with enough room."""
    packs: Packs = []
    room: list[int] = []
    for i in order:
        for p, tokens in enumerate(room):
            if tokens >= lengths[i]:
                packs[p].append(i)
                room[p] -= lengths[i]
                break
        else:
            packs.append([i])
            room.append(limit - lengths[i])
    return packs


def split_largest(packs: Packs, lengths: Sequence[int], count: int) -> None:
    """Split the pack with the most tokens into two of similar size until there are ``count`` packs, in place."""
    while len(packs) < count:
        largest = max((pack for pack in packs if len(pack) > 1), key=lambda pack: sum(lengths[i] for i in pack))
        halves: tuple[list[int], list[int]] = ([], [])
        for i in sorted(largest, key=lambda i: -lengths[i]):
            smaller_half = min(halves, key=lambda half: sum(lengths[j] for j in half))
            smaller_half.append(i)
        packs.remove(largest)
        packs += halves


def differencing(values: Sequence[int], parts: int, equal: bool) -> Packs:
    """Partition the indices of ``values`` by Karmarkar and Karp's largest differencing method.

    With ``equal`` all ``parts`` get equally many values. The method starts with one partial solution for each value (or
    for each ``parts`` values of similar size). It repeatedly takes the two solutions with the widest gap between their
    parts. It combines them, the largest part of one with the smallest of the other.
    """
    order = sorted(range(len(values)), key=lambda i: values[i])
    chunk_size = parts if equal else 1
    heap: list[tuple[int, int, Partition]] = []  # minus the gap, number of the solution, solution
    for number, start in enumerate(range(0, len(order), chunk_size)):
        solution: Partition = [(values[i], [i]) for i in order[start : start + chunk_size]]
        solution += [(0, [])] * (parts - len(solution))
        solution.sort(reverse=True)
        heapq.heappush(heap, (solution[-1][0] - solution[0][0], number, solution))
    while len(heap) > 1:
        _, number, first = heapq.heappop(heap)
        _, _, second = heapq.heappop(heap)
        combined = [
            (first_sum + second_sum, first_indices + second_indices)
            for (first_sum, first_indices), (second_sum, second_indices) in zip(first, reversed(second), strict=True)
        ]
        combined.sort(key=lambda part: part[0], reverse=True)
        heapq.heappush(heap, (combined[-1][0] - combined[0][0], number, combined))
    _, _, solution = heap[0]
    return [sorted(indices) for _, indices in solution]


def modified_first_fit_decreasing(lengths: Sequence[int], limit: int) -> Packs:
    """Johnson and Garey, Journal of Complexity 1 (1985).

    1. Each sequence above half of the limit opens a pack.
    2. In descending order of their size, these packs get one sequence above a third of the limit if it fits.
    3. In ascending order, the packs without such a sequence get two above a sixth.
    4. All packs get the largest sequences that fit.
    5. The remaining sequences go into new packs by first-fit decreasing.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    packs = [[i] for i in order if 2 * lengths[i] > limit]
    room = [limit - lengths[pack[0]] for pack in packs]
    medium = [i for i in order if 2 * lengths[i] <= limit < 3 * lengths[i]]
    small = [i for i in order if 3 * lengths[i] <= limit < 6 * lengths[i]]
    tiny = [i for i in order if 6 * lengths[i] <= limit]

    def move_largest(candidates: list[int], p: int) -> bool:
        """Move the largest candidate that fits into pack ``p``. False if none fits."""
        for position, i in enumerate(candidates):
            if lengths[i] <= room[p]:
                packs[p].append(i)
                room[p] -= lengths[i]
                del candidates[position]
                return True
        return False

    for p in range(len(packs)):
        move_largest(medium, p)
    for p in reversed(range(len(packs))):
        has_no_medium = len(packs[p]) == 1
        if has_no_medium and len(small) > 1 and lengths[small[-1]] + lengths[small[-2]] <= room[p]:
            move_largest([small.pop()], p)
            move_largest(small, p)
    remaining = sorted(medium + small + tiny, key=lambda i: (-lengths[i], i))
    for p in range(len(packs)):
        while move_largest(remaining, p):
            pass
    return packs + fit_first(remaining, lengths, limit)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, minimum and maximum."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def verdict(cases: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The worst of our plans over all cases and seeds, and whether it meets the goals."""
    our_measures = [case["methods"]["ours"] for case in cases]
    useful_tokens = min(measures["useful_tokens"]["min"] for measures in our_measures)
    imbalance = max(measures["imbalance"]["max"] for measures in our_measures)
    milliseconds = max(measures["milliseconds"]["max"] for measures in our_measures)
    return {
        "useful_tokens": {"worst": useful_tokens, "goal": f"≥ {USEFUL_GOAL}", "met": useful_tokens >= USEFUL_GOAL},
        "imbalance": {"worst": imbalance, "goal": f"≤ {IMBALANCE_GOAL}", "met": imbalance <= IMBALANCE_GOAL},
        "milliseconds": {"worst": milliseconds},
    }


def tables(result: dict[str, Any]) -> list[Table]:
    """A table of the methods' medians for each case, and one of our worst figures and their goals."""

    def percent(measure: dict[str, float]) -> str:
        return f"{100 * measure['median']:.2f} %"

    tables_of_cases = []
    for case in result["cases"]:
        title = f"{case['recipe']}, {case['data_parallel']} data-parallel ranks, {case['distribution']}"
        table = Table(
            "", "micro-batches", "useful", "if constant", "filled", "beyond limit", "imbalance", "in rounds", "stages",
            "ms", title=title,
        )  # fmt: skip
        for name, measures in case["methods"].items():
            table.add_row(
                name,
                f"{measures['micro_batches']['median']:g} (≥ {measures['least']['median']:g})",
                percent(measures["useful_tokens"]),
                percent(measures["useful_if_constant"]),
                percent(measures["filled"]),
                percent(measures["beyond"]),
                percent(measures["imbalance"]),
                percent(measures["rounds"]),
                percent(measures["stages"]),
                f"{measures['milliseconds']['median']:.1f}",
            )
        tables_of_cases.append(table)
    goals = Table("", "worst", "goal", "met", title="ours, over all cases and seeds")
    for name in ("useful_tokens", "imbalance"):
        figure = result[name]
        goals.add_row(name, f"{100 * figure['worst']:.2f} %", figure["goal"], "yes" if figure["met"] else "no")
    return [*tables_of_cases, goals]


if __name__ == "__main__":
    main()
