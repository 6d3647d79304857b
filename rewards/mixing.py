"""From verdicts to a reward: the row's label picks which verifiers run, and their weights.

As in SafeWork-R1 (arXiv 2507.18576): reward = sum of weight x score over the verifiers of the label's mix.
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

SHOWN = 3  # kinds of failures in a message, the most frequent ones


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
    """The results of the named verifiers for one response, by name and in their order.

    Sends the requests to servers first, runs the rules while these are pending, and then waits. A rule that raises, and
    a function that returns no result or takes too long, gives a Failure. Thread-safe: call it from several threads to
    have many responses verified at the same time.
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
    """What the call returns; where it raises, a Failure with the reason and the traceback."""
    try:
        return call()
    except FunctionFailed as error:
        return Failure(str(error), traceback=error.traceback)
    except Exception as error:  # for a row that a rule can't verify, or a judge can't be asked about
        return Failure(describe(error), traceback="".join(traceback.format_exception(error)))


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


@dataclass(frozen=True)
class Failures:
    """How often a verifier failed for one reason. ``row``: the id of the first sample's row; ``traceback``: its own."""

    verifier: str
    reason: str
    count: int
    row: str
    traceback: str

    def __str__(self) -> str:
        return f"{self.count} x verifier {self.verifier}: {self.reason}; first on row {self.row!r}"


def failures(results: Sequence[Mapping[str, VerifierResult]], rows: Sequence[str]) -> list[Failures]:
    """The failed verdicts by verifier and reason, the most frequent first.

    ``results``: one mapping per sample; ``rows``: the id of each sample's row.
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
    """The share of the samples with a failed verifier, in [0, 1]. ``results``: one mapping per sample; ``failed``:
    their :func:`failures`.

    Raises RuntimeError with the most frequent reasons when the share is above ``max_failed``.
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
