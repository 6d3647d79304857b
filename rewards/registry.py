"""Verifiers by name: registered rules, a user's own by dotted path, and those configured in ``rewards.verifiers``."""

from collections.abc import Iterable
from functools import partial
from inspect import signature
from typing import Any

from megatron_ext import dotted_path
from rewards import settings
from rewards.client import Client
from rewards.settings import RewardsConfig, Server, VerifierConfig
from rewards.verdict import Verifier
from rewards.verifiers.judges import Judge, Scalar
from rewards.verifiers.served import ServedVerifier
from rewards.verifiers.templates import TEMPLATES

RULES = {
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


def find_rule(name: str) -> Verifier:
    """A registered rule, or the function at a dotted path (``package.module.score``).

    Raises ValueError naming the unknown verifier and the registered ones.
    """
    path = RULES.get(name, name)
    return _load(path, f"unknown verifier {name!r}", RULES, "a function score(row, response) -> Verdict")


def find_template(name: str) -> Judge | Scalar:
    """A registered template of a judge or reward model, or the one at a dotted path. Raises ValueError for any other
    name."""
    if name in TEMPLATES:
        return TEMPLATES[name]
    template = _load(name, f"unknown template {name!r}", TEMPLATES, "a rewards.verifiers.judges.Judge")
    if not isinstance(template, Judge | Scalar):
        raise ValueError(
            f"template {name!r} is a {type(template).__name__}, not a rewards.verifiers.judges.Judge or Scalar"
        )
    return template


def _load(path: str, problem: str, registered: Iterable[str], expected: str) -> Any:
    try:
        return dotted_path.load(path)
    except ValueError as error:
        raise ValueError(
            f"{problem} ({error}); use a registered one ({', '.join(sorted(registered))}) or the dotted path of "
            f"{expected}"
        ) from error


def servers_of(names: Iterable[str], config: RewardsConfig) -> dict[str, Server]:
    """The servers that these verifiers need, by name."""
    configured = settings.verifiers(config)
    needed = {configured[name].server for name in names if name in configured}
    return {name: server for name, server in settings.servers(config).items() if name in needed}


def open_verifiers(names: Iterable[str], config: RewardsConfig, client: Client | None) -> dict[str, Verifier]:
    """Verifiers by name. An entry of ``rewards.verifiers`` takes precedence over a registered rule.

    ``client`` has the servers of :func:`servers_of`; None where these verifiers need no server. Raises ValueError
    naming an unknown template or rule.
    """
    configured = settings.verifiers(config)
    return {name: _open(name, configured[name], client) if name in configured else find_rule(name) for name in names}


def _open(name: str, verifier: VerifierConfig, client: Client | None) -> Verifier:
    if verifier.rule is not None:
        rule = find_rule(verifier.rule)
        try:
            signature(rule).bind({}, "", **verifier.arguments)
        except TypeError as error:
            raise ValueError(
                f"rewards.verifiers.{name}.arguments={verifier.arguments}: {error}; use the keywords of "
                f"rule={verifier.rule!r}"
            ) from error
        return partial(rule, **verifier.arguments)
    assert verifier.template is not None and verifier.server is not None  # settings.check
    assert client is not None
    model = client.pools[verifier.server].server.model
    return ServedVerifier(find_template(verifier.template), verifier.server, model, verifier.request, client)
