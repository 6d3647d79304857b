"""The parts of an algorithm. Each is a function, chosen by name: ``algorithm.<part>`` in the configuration.

A keyword-only argument of a part's function gets its value from ``algorithm.kwargs``, or else from the field of
``algorithm`` with its name. A user's own function is named by its dotted path. It has the same signature as the other
functions of its part. If it needs further arguments, it declares them with ``recipes.algorithms.needs``.
"""

from collections.abc import Callable
from functools import partial
from inspect import Parameter, signature
from typing import Any

from megatron_ext import dotted_path
from recipes.algorithms import advantages, aggregation, kl, mismatch, policy_losses
from recipes.algorithms.needs import Needs, needs_of
from recipes.algorithms.settings import AlgorithmConfig
from recipes.errors import ConfigError

Function = Callable[..., Any]

# Signatures, with R response tokens in a micro-batch:
#   advantage:           (AdvantageInputs) → [prompts, samples] or [tokens]
#   policy_loss:         (log_probs, old, advantages) → [R]; with ``reference`` and ``sequences`` where it needs them
#   kl_estimator:        (log_probs, reference) → [R]
#   aggregation:         (trained tokens of each sequence) → [sequences], the weight of each of a sequence's tokens
#   importance_sampling: (trainer, rollout, sequences) → [R], the weight of each token's loss
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
        policy_losses.cispo,
        policy_losses.cpgd,
        policy_losses.cpgd_sequence,
        policy_losses.gspo,
        policy_losses.reinforce,
    ),
    "kl_estimator": (kl.k1, kl.k2, kl.k3),
    "aggregation": (aggregation.token_mean, aggregation.sequence_mean_token_mean, aggregation.sequence_sum),
    "importance_sampling": (
        mismatch.none,
        mismatch.token_truncated,
        mismatch.sequence_truncated,
        mismatch.icepop,
    ),
}


def requirements(config: AlgorithmConfig) -> Needs:
    """The needs of a run of this algorithm.

    These are the needs that its parts declare, and the reference where the KL coefficient is above 0.

    Raises ConfigError for a function that does not exist.
    """
    declared = [needs_of(function_of(name, config)) for name in REGISTRY]
    return Needs(
        values=any(part.values for part in declared),
        reference=config.kl_coefficient > 0 or any(part.reference for part in declared),
        sequences=any(part.sequences for part in declared),
    )


def reference_interval(config: AlgorithmConfig) -> int | None:
    """The number of steps from one pass under the reference to the next. None for a run without a reference.

    It is 1 where the algorithm needs the reference. Otherwise only the metric ``kl/reference`` does, and it is
    ``algorithm.reference_every``.
    """
    return 1 if requirements(config).reference else config.reference_every


def resolve(name: str, config: AlgorithmConfig) -> Function:
    """The function that ``algorithm.<name>`` chooses, with its keywords set from ``config``.

    Raises ConfigError for a function that does not exist, and for a keyword without a value.
    """
    function = function_of(name, config)
    keywords: dict[str, Any] = {}
    for parameter in signature(function).parameters.values():
        keyword = parameter.name
        if parameter.kind is not Parameter.KEYWORD_ONLY:
            continue
        if keyword in config.kwargs:
            keywords[keyword] = config.kwargs[keyword]
        elif hasattr(config, keyword):
            keywords[keyword] = getattr(config, keyword)
        elif parameter.default is Parameter.empty:
            chosen = getattr(config, name)
            raise ConfigError(f"algorithm.{name}={chosen!r}: needs {keyword!r}; give algorithm.kwargs.{keyword}")
    return partial(function, **keywords)


def function_of(name: str, config: AlgorithmConfig) -> Function:
    """The function that ``algorithm.<name>`` chooses: one of :data:`REGISTRY`, or the user's own by dotted path.

    Raises ConfigError where there is none.
    """
    chosen: str = getattr(config, name)
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
