"""From verdicts to one reward: the row's label picks which verifiers run and with which weights.

The table is SafeWork-R1's (arXiv 2507.18576): reward = sum of weight x score over the verifiers of the label's mix.
"""

import importlib
from collections.abc import Iterable, Mapping

from rewards.verdict import Row, Verdict, Verifier

REGISTERED = {
    "safety": "rewards.verifiers.safety.score",
    "capability": "rewards.verifiers.capability.score",
    "helpfulness": "rewards.verifiers.helpfulness.score",
}


def load_verifiers(names: Iterable[str]) -> dict[str, Verifier]:
    """Verifier functions by name; a name is registered here or the dotted path of a function (`package.module.score`).

    Raises ValueError naming the unknown verifier and the registered ones.
    """
    return {name: _load(name) for name in names}


def _load(name: str) -> Verifier:
    module, _, function = REGISTERED.get(name, name).rpartition(".")
    try:
        return getattr(importlib.import_module(module), function)
    except (ValueError, ModuleNotFoundError, AttributeError) as error:
        known = ", ".join(sorted(REGISTERED))
        raise ValueError(
            f"unknown verifier {name!r} ({error}); use a registered one ({known}) or the dotted path of a function "
            "score(row, response) -> Verdict"
        ) from error


def verifier_names(table: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Every verifier that some label of the mix table needs, sorted."""
    return sorted({name for weights in table.values() for name in weights})


def label_weights(row: Row, table: Mapping[str, Mapping[str, float]]) -> Mapping[str, float]:
    """The mix of the row's label. Raises ValueError for a label that the table lacks."""
    label = row["label"]
    if label not in table:
        raise ValueError(
            f"row {row['id']!r} has label {label!r}, which rewards.mix lacks (it has {sorted(table)}); "
            f"add `{label}: {{<verifier>: <weight>}}` to the mix"
        )
    return table[label]


def mix(verdicts: Mapping[str, Verdict], weights: Mapping[str, float]) -> float:
    """Weighted sum of the scores. Raises ValueError when a weighted verifier gave no verdict."""
    missing = sorted(set(weights) - set(verdicts))
    if missing:
        raise ValueError(f"no verdict from {missing}, which the mix weighs; verdicts came from {sorted(verdicts)}")
    return sum(weight * verdicts[name].score for name, weight in weights.items())


def reward(
    row: Row, response: str, verifiers: Mapping[str, Verifier], table: Mapping[str, Mapping[str, float]]
) -> tuple[float, dict[str, Verdict]]:
    """The mixed reward of one response and the verdicts behind it; only the verifiers of the row's label run."""
    weights = label_weights(row, table)
    verdicts = {name: verifiers[name](row, response) for name in weights}
    return mix(verdicts, weights), verdicts
