"""Combine the verdicts of several verifiers into one reward.

The row's label selects which verifiers run and their weights. The reward is the sum of weight x score over the
verifiers of the label's mix, as in SafeWork-R1 (arXiv 2507.18576).
"""

import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from statistics import fmean

from rewards.functions import FunctionFailed
from rewards.verdict import Failure, Row, Verdict, Verifier, VerifierResult, describe
from rewards.verifiers.served import ServedVerifier

# ``rewards.mix``: label → verifier → weight.
type MixTable = Mapping[str, Mapping[str, float]]

SHOWN = 3  # how many kinds of failures an error message lists, the most frequent first


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


def verify(
    row: Row, response: str, names: Iterable[str], verifiers: Mapping[str, Verifier]
) -> dict[str, VerifierResult]:
    """Verify one response: a mapping from verifier name to result, in the order of ``names``.

    Requests to servers are sent first. The rules run while these requests are pending, and then the replies are
    awaited. A rule that raises gives a Failure. So does a function that returns no result or takes too long.
    Thread-safe: several threads can verify different responses at the same time.
    """
    names = list(names)
    pending: dict[str, Future[VerifierResult] | Failure] = {}
    for name in names:
        verifier = verifiers[name]
        if isinstance(verifier, ServedVerifier):
            pending[name] = _or_failure(partial(verifier.submit, row, response))
    results: dict[str, VerifierResult] = {}
    for name in names:
        if name not in pending:
            results[name] = _or_failure(partial(verifiers[name], row, response))
    for name, sent in pending.items():
        results[name] = sent if isinstance(sent, Failure) else sent.result()
    return {name: results[name] for name in names}


def _or_failure[T](call: Callable[[], T]) -> T | Failure:
    """Return the call's value, or a Failure with the reason and the traceback if the call raises."""
    try:
        return call()
    except FunctionFailed as error:
        return Failure(str(error), traceback=error.traceback)
    except Exception as error:  # e.g. ValueError for a row that the rule or the judge can't handle
        return Failure(describe(error), traceback="".join(traceback.format_exception(error)))


def mix(results: Mapping[str, VerifierResult], weights: Mapping[str, float]) -> float | None:
    """The weighted sum of the scores, or None if a verifier in ``weights`` failed.

    Raises ValueError if a verifier in ``weights`` has no result.
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
    """Verifier → mean of its scores over the samples for which it returned a verdict.

    ``results`` has one mapping per sample.
    """
    scores: dict[str, list[float]] = {}
    for of_sample in results:
        for name, result in of_sample.items():
            if isinstance(result, Verdict):
                scores.setdefault(name, []).append(result.score)
    return {name: fmean(scores[name]) for name in sorted(scores)}


@dataclass(frozen=True)
class Failures:
    """How often a verifier failed for one reason."""

    verifier: str
    reason: str
    count: int
    # The id of the row of the first sample that failed, and the traceback of that failure.
    row: str
    traceback: str

    def __str__(self) -> str:
        return f"{self.count} x verifier {self.verifier}: {self.reason}; first on row {self.row!r}"


def failures(results: Sequence[Mapping[str, VerifierResult]], rows: Sequence[str]) -> list[Failures]:
    """The failures grouped by verifier and reason, the most frequent first.

    ``results`` has one mapping per sample, and ``rows`` the id of each sample's row.
    """
    by_reason: dict[tuple[str, str], Failures] = {}
    for of_sample, row in zip(results, rows, strict=True):
        for name, result in of_sample.items():
            if isinstance(result, Failure):
                key = (name, result.reason)
                first = by_reason.get(key, Failures(name, result.reason, 0, row, result.traceback))
                by_reason[key] = replace(first, count=first.count + 1)
    return sorted(by_reason.values(), key=lambda failed: -failed.count)


def failed_share(
    results: Sequence[Mapping[str, VerifierResult]], failed: Sequence[Failures], max_failed: float
) -> float:
    """The share of the samples, in [0, 1], for which at least one verifier failed.

    ``results`` has one mapping per sample, and ``failed`` is what :func:`failures` returns for them. Raises
    RuntimeError with the most frequent reasons if the share is above ``max_failed``.
    """
    without = 0
    for of_sample in results:
        without += any(isinstance(result, Failure) for result in of_sample.values())
    share = without / max(len(results), 1)
    if share > max_failed:
        shown = "; ".join(map(str, failed[:SHOWN]))
        raise RuntimeError(
            f"{without} of {len(results)} samples have no reward, rewards.client.max_failed={max_failed}: {shown}; "
            f"mend the verifiers or their servers, then go on with resume=true\n{failed[0].traceback}".rstrip()
        )
    return share
