"""From verdicts to a reward: the row's label picks which verifiers run, and their weights.

As in SafeWork-R1 (arXiv 2507.18576): reward = sum of weight x score over the verifiers of the label's mix.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean

from rewards.verdict import Failure, Row, Verdict, Verifier, VerifierResult
from rewards.verifiers.served import ServedVerifier

# ``rewards.mix``: label → verifier → weight.
type MixTable = Mapping[str, Mapping[str, float]]


def verifier_names(table: MixTable) -> list[str]:
    """Every verifier that some label of the mix table needs, sorted."""
    return sorted({name for weights in table.values() for name in weights})


def label_weights(row: Row, table: MixTable) -> Mapping[str, float]:
    """Verifier → weight for the row's label. Raises ValueError for a label that the table lacks."""
    label = row["label"]
    if label not in table:
        raise ValueError(
            f"row {row['id']!r} has label {label!r}, which rewards.mix lacks (it has {sorted(table)}); "
            f"add `{label}: {{<verifier>: <weight>}}` to the mix"
        )
    return table[label]


def check_row(row: Row, verifiers: Mapping[str, Verifier], table: MixTable) -> None:
    """Raises ValueError for a label without a mix, and for a row that a verifier of its mix can't verify.

    Rules are run on an empty response. Judges are not asked.
    """
    for name in label_weights(row, table):
        verifier = verifiers[name]
        if isinstance(verifier, ServedVerifier):
            verifier.template.check(row)
        else:
            verifier(row, "")


def verify(
    row: Row, response: str, names: Iterable[str], verifiers: Mapping[str, Verifier]
) -> dict[str, VerifierResult]:
    """The results of the named verifiers for one response, by name and in their order.

    Sends the requests to servers first, runs the rules while these are pending, and then waits. Thread-safe: call it
    from several threads to have many responses verified at the same time.
    """
    names = list(names)
    pending = {}
    for name in names:
        verifier = verifiers[name]
        if isinstance(verifier, ServedVerifier):
            pending[name] = verifier.submit(row, response)
    of_rules = {name: verifiers[name](row, response) for name in names if name not in pending}
    return {name: pending[name].result() if name in pending else of_rules[name] for name in names}


def mix(results: Mapping[str, VerifierResult], weights: Mapping[str, float]) -> float | None:
    """The weighted sum of the scores; None when a weighted verifier failed.

    Raises ValueError when a weighted verifier has no result.
    """
    missing = sorted(set(weights) - set(results))
    if missing:
        raise ValueError(f"no verdict from {missing}, which the mix weighs; verdicts came from {sorted(results)}")
    total = 0.0
    for name, weight in weights.items():
        result = results[name]
        if isinstance(result, Failure):
            return None
        total += weight * result.score
    return total


def verifier_means(results: Iterable[Mapping[str, VerifierResult]]) -> dict[str, float]:
    """Verifier → mean score over the samples that it gave a verdict on. ``results``: one mapping per sample."""
    scores: dict[str, list[float]] = {}
    for of_sample in results:
        for name, result in of_sample.items():
            if isinstance(result, Verdict):
                scores.setdefault(name, []).append(result.score)
    return {name: fmean(scores[name]) for name in sorted(scores)}


def failed_share(results: Sequence[Mapping[str, VerifierResult]], max_failed: float) -> float:
    """The share of the samples with a failed verifier, in [0, 1]. ``results``: one mapping per sample.

    Raises RuntimeError with the most frequent reasons when the share is above ``max_failed``.
    """
    reasons: Counter[tuple[str, str]] = Counter()
    failed = 0
    for of_sample in results:
        failures = {name: result for name, result in of_sample.items() if isinstance(result, Failure)}
        reasons.update((name, failure.reason) for name, failure in failures.items())
        failed += bool(failures)
    share = failed / max(len(results), 1)
    if share > max_failed:
        shown = "; ".join(f"{count} x {name}: {reason}" for (name, reason), count in reasons.most_common(3))
        raise RuntimeError(
            f"{failed} of {len(results)} samples have no reward, rewards.client.max_failed={max_failed}: {shown}; see "
            "to the servers, then go on with resume=true"
        )
    return share
