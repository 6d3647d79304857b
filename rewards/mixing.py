"""From verdicts to one reward: the row's label picks which verifiers run and with which weights.

The table is SafeWork-R1's (arXiv 2507.18576): reward = sum of weight x score over the verifiers of the label's mix.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from statistics import fmean
from typing import Any

from megatron_ext import dotted_path
from rewards import settings
from rewards.client import Client
from rewards.settings import RewardsConfig, Server, VerifierSettings
from rewards.verdict import Failure, Judgement, Row, Verdict, Verifier
from rewards.verifiers.judges import Judge, Scalar
from rewards.verifiers.served import ServedVerifier
from rewards.verifiers.templates import TEMPLATES

REGISTERED = {
    "safety": "rewards.verifiers.safety.score",
    "capability": "rewards.verifiers.capability.score",
    "helpfulness": "rewards.verifiers.helpfulness.score",
    "format": "rewards.verifiers.format.score",
    "math": "rewards.verifiers.mathematics.score",
    "exact": "rewards.verifiers.exact.score",
    "search_format": "rewards.verifiers.search.format_score",
    "search_accuracy": "rewards.verifiers.search.accuracy",
    "search_reliability": "rewards.verifiers.search.reliability",
    "false_certain": "rewards.verifiers.search.false_certain",
    "choice": "rewards.verifiers.choice.score",
    "rule_check": "rewards.verifiers.rule_check.score",
    "instructions": "rewards.verifiers.instructions.score",
    "length": "rewards.verifiers.length.score",
    "repetition": "rewards.verifiers.repetition.score",
}


def load_verifiers(names: Iterable[str]) -> dict[str, Verifier]:
    """Verifier functions by name; a name is registered here or the dotted path of a function (`package.module.score`).

    Raises ValueError naming the unknown verifier and the registered ones.
    """
    return {name: _load(name) for name in names}


def servers_of(names: Iterable[str], config: RewardsConfig) -> dict[str, Server]:
    """The servers behind these verifiers, by name."""
    found = settings.verifiers(config)
    wanted = {found[name].server for name in names if name in found}
    return {name: server for name, server in settings.servers(config).items() if name in wanted}


def open_verifiers(names: Iterable[str], config: RewardsConfig, client: Client) -> dict[str, Verifier]:
    """The same, where ``rewards.verifiers`` says what some of the names are; it goes before the registered ones.

    ``client`` has the servers of :func:`servers_of`. Raises ValueError naming an unknown template or rule.
    """
    found = settings.verifiers(config)
    return {name: _configured(found[name], client) if name in found else _load(name) for name in names}


def _configured(verifier: VerifierSettings, client: Client) -> Verifier:
    if verifier.rule is not None:
        return partial(_load(verifier.rule), **verifier.arguments)
    assert verifier.template is not None and verifier.server is not None  # settings.check
    model = client.pools[verifier.server].server.model
    return ServedVerifier(find_template(verifier.template), verifier.server, model, verifier.request, client)


def find_template(name: str) -> Judge | Scalar:
    """A registered one or a dotted path. Raises ValueError for what is neither."""
    if name in TEMPLATES:
        return TEMPLATES[name]
    found = _import(name, f"unknown template {name!r}", TEMPLATES, "a rewards.verifiers.judges.Judge")
    if not isinstance(found, Judge | Scalar):
        raise ValueError(
            f"template {name!r} is a {type(found).__name__}, not a rewards.verifiers.judges.Judge or Scalar"
        )
    return found


def _load(name: str) -> Verifier:
    path = REGISTERED.get(name, name)
    return _import(path, f"unknown verifier {name!r}", REGISTERED, "a function score(row, response) -> Verdict")


def _import(path: str, unknown: str, known: Iterable[str], what: str) -> Any:
    try:
        return dotted_path.load(path)
    except ValueError as error:
        raise ValueError(
            f"{unknown} ({error}); use a registered one ({', '.join(sorted(known))}) or the dotted path of {what}"
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


def check_row(row: Row, verifiers: Mapping[str, Verifier], table: Mapping[str, Mapping[str, float]]) -> None:
    """Raises ValueError for a label without a mix and for a row that a verifier of its mix can't judge.

    A rule says so by judging an empty response; judges are not asked.
    """
    for name in label_weights(row, table):
        verifier = verifiers[name]
        if isinstance(verifier, ServedVerifier):
            verifier.judge.check(row)
        else:
            verifier(row, "")


def mix(verdicts: Mapping[str, Judgement], weights: Mapping[str, float]) -> float | None:
    """Weighted sum of the scores; None when a weighted verifier failed.

    Raises ValueError when a weighted verifier said nothing at all.
    """
    missing = sorted(set(weights) - set(verdicts))
    if missing:
        raise ValueError(f"no verdict from {missing}, which the mix weighs; verdicts came from {sorted(verdicts)}")
    total = 0.0
    for name, weight in weights.items():
        verdict = verdicts[name]
        if isinstance(verdict, Failure):
            return None
        total += weight * verdict.score
    return total


def judge_all(
    asked: Sequence[tuple[Row, str, Iterable[str]]], verifiers: Mapping[str, Verifier]
) -> list[dict[str, Judgement]]:
    """What the named verifiers say of each (row, response, names). Servers are asked everything at once, rules go on
    meanwhile."""
    waiting: dict[tuple[int, str], Future[Judgement]] = {}
    for i, (row, response, names) in enumerate(asked):
        for name in names:
            if isinstance(verifier := verifiers[name], ServedVerifier):
                waiting[i, name] = verifier.submit(row, response)
    ruled = {
        (i, name): verifiers[name](row, response)
        for i, (row, response, names) in enumerate(asked)
        for name in names
        if (i, name) not in waiting
    }
    return [
        {name: ruled[i, name] if (i, name) in ruled else waiting[i, name].result() for name in names}
        for i, (_, _, names) in enumerate(asked)
    ]


def reward(
    row: Row, response: str, verifiers: Mapping[str, Verifier], table: Mapping[str, Mapping[str, float]]
) -> tuple[float | None, dict[str, Judgement]]:
    """The mixed reward of one response (None when a verifier failed) and the verdicts behind it; only the verifiers of
    the row's label run."""
    weights = label_weights(row, table)
    (verdicts,) = judge_all([(row, response, weights)], verifiers)
    return mix(verdicts, weights), verdicts


def verifier_means(judged: Iterable[Mapping[str, Judgement]]) -> dict[str, float]:
    """Mean score of each verifier over the samples that it gave a verdict on."""
    scores: dict[str, list[float]] = {}
    for verdicts in judged:
        for name, verdict in verdicts.items():
            if isinstance(verdict, Verdict):
                scores.setdefault(name, []).append(verdict.score)
    return {name: fmean(scores[name]) for name in sorted(scores)}


def failed_share(judged: Sequence[Mapping[str, Judgement]], most: float) -> float:
    """The share of the samples on which some verifier failed. Raises RuntimeError, with the reasons, above ``most``."""
    found = [
        (name, verdict.reason)
        for verdicts in judged
        for name, verdict in list(verdicts.items())
        if isinstance(verdict, Failure)
    ]
    failed = sum(any(isinstance(v, Failure) for v in verdicts.values()) for verdicts in judged)
    share = failed / max(len(judged), 1)
    if share > most:
        reasons = "; ".join(f"{count} x {name}: {why}" for (name, why), count in Counter(found).most_common(3))
        raise RuntimeError(
            f"{failed} of {len(judged)} samples have no reward, rewards.client.max_failed={most}: {reasons}; see to "
            "the servers, then go on with resume=true"
        )
    return share
