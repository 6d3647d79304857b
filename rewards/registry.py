"""Look up verifiers by name.

A name is a registered rule, the dotted path of a function that the user wrote, or an entry of ``rewards.verifiers``.
"""

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

from megatron_ext import dotted_path
from rewards import settings
from rewards.client import Client
from rewards.functions import Function, check_function
from rewards.settings import FunctionsConfig, RewardsConfig, Server, VerifierConfig
from rewards.verdict import Verifier, describe
from rewards.verifiers.judges import Judge, Scalar
from rewards.verifiers.served import ServedVerifier
from rewards.verifiers.templates import TEMPLATES

RULES = {
    "safety": "rewards.verifiers.safety.score",
    "capability": "rewards.verifiers.capability.score",
    "helpfulness": "rewards.verifiers.helpfulness.score",
    "refusal": "rewards.verifiers.refusal.score",
    "complies": "rewards.verifiers.refusal.complies",
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
    """A registered template of a judge or reward model, or the one at a dotted path.

    Raises ValueError for any other name.
    """
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
    except (Exception, SystemExit) as error:  # the user's module can raise anything
        raise ValueError(f"{path!r}: its module can't be imported: {describe(error)}; mend it") from error


def servers_of(names: Iterable[str], config: RewardsConfig) -> dict[str, Server]:
    """The servers that these verifiers need, by name."""
    configured = settings.verifiers(config)
    needed = {configured[name].server for name in names if name in configured}
    return {name: server for name, server in settings.servers(config).items() if name in needed}


def open_verifiers(names: Iterable[str], config: RewardsConfig, client: Client | None) -> dict[str, Verifier]:
    """The verifiers of these names. An entry of ``rewards.verifiers`` takes precedence over a registered rule.

    ``client`` is connected to the servers of :func:`servers_of`. It may be None if these verifiers need no server.
    Raises ValueError naming an unknown template or rule, or a function that can't be called as a verifier.
    """
    configured = settings.verifiers(config)
    verifiers: dict[str, Verifier] = {}
    for name in names:
        verifier = configured.get(name)
        if verifier is None:
            verifiers[name] = _open_rule(name, name, {}, config.functions)
        elif verifier.rule is not None:
            verifiers[name] = _open_rule(name, verifier.rule, verifier.arguments, config.functions)
        else:
            assert client is not None
            verifiers[name] = _open_judge(verifier, client)
    return verifiers


def _open_rule(name: str, rule: str, arguments: Mapping[str, Any], functions: FunctionsConfig) -> Verifier:
    """The verifier of a rule.

    A registered rule runs in the process of its caller, and a function that the user wrote in processes of its own.
    """
    function = find_rule(rule)
    check_function(name, function, arguments)
    if rule not in RULES:
        return Function(rule, arguments, functions)
    return partial(function, **arguments) if arguments else function


def _open_judge(verifier: VerifierConfig, client: Client) -> ServedVerifier:
    assert verifier.template is not None and verifier.server is not None  # settings.check
    model = client.pools[verifier.server].server.model
    return ServedVerifier(find_template(verifier.template), verifier.server, model, verifier.request, client)
