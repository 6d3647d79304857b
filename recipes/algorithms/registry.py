"""The parts of an algorithm, each a function chosen by name: ``algorithm.<part>`` in the configuration.

A keyword of a part's function is a field of ``algorithm`` of the same name: what stands there is what the function
gets. A function of your own is named by its dotted path and has the signature of its part's others; a keyword that is
no field of ``algorithm`` is set in ``algorithm.kwargs``.
"""

from collections.abc import Callable
from functools import partial
from inspect import Parameter, signature
from typing import Any

from megatron_ext import dotted_path
from recipes.algorithms import advantages, aggregation, kl, policy_losses
from recipes.config import AlgorithmConfig
from recipes.errors import ConfigError

Function = Callable[..., Any]

# part → (AdvantageInputs) → [prompts, samples] or [tokens]; (log-probs, old, advantages, Sequences) → [R];
# (log-probs, reference) → [R]; (lengths) → weights of each sequence's tokens.
REGISTRY: dict[str, tuple[Function, ...]] = {
    "advantage": (
        advantages.grpo,
        advantages.dr_grpo,
        advantages.clip_filter,
        advantages.rloo,
        advantages.cale,
        advantages.reinforce_plus_plus,
        advantages.reinforce_plus_plus_baseline,
        advantages.gae,
        advantages.gae_whitened,
    ),
    "policy_loss": (
        policy_losses.ppo_clip,
        policy_losses.ppo_dual_clip,
        policy_losses.cpgd,
        policy_losses.cpgd_sequence,
        policy_losses.gspo,
        policy_losses.reinforce,
    ),
    "kl_estimator": (kl.k1, kl.k2, kl.k3),
    "aggregation": (aggregation.token_mean, aggregation.sequence_mean_token_mean, aggregation.sequence_sum),
}


def resolve(name: str, config: AlgorithmConfig) -> Function:
    """The function that ``algorithm.<name>`` chooses, with its keywords set from ``config``.

    Raises ConfigError for a function that is not there, and for a keyword that is set nowhere.
    """
    chosen: str = getattr(config, name)
    function = _find(name, chosen)
    kwargs: dict[str, Any] = config.kwargs
    settings = {}
    for keyword in signature(function).parameters.values():
        if keyword.kind is not Parameter.KEYWORD_ONLY:
            continue
        if keyword.name in kwargs:
            settings[keyword.name] = kwargs[keyword.name]
        elif hasattr(config, keyword.name):
            settings[keyword.name] = getattr(config, keyword.name)
        elif keyword.default is Parameter.empty:
            raise ConfigError(
                f"algorithm.{name}={chosen!r}: wants {keyword.name!r}; give +algorithm.kwargs.{keyword.name}"
            )
    return partial(function, **settings)


def _find(name: str, chosen: str) -> Function:
    known = {function.__name__: function for function in REGISTRY[name]}
    if chosen in known:
        return known[chosen]
    refusal = ConfigError(
        f"algorithm.{name}={chosen!r}: no such function; use one of {', '.join(known)} or the dotted path of your own"
    )
    try:
        function = dotted_path.load(chosen)
    except ValueError as error:
        raise refusal from error
    if not callable(function):
        raise refusal
    return function
