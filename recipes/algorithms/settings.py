"""Settings of the RL algorithm: its loop, and the keywords of its parts (``recipes.algorithms.registry``)."""

from dataclasses import dataclass
from typing import Any

from megatron_ext.optimizer_settings import ScheduleConfig
from megatron_ext.settings import COEFFICIENT, COUNT, FRACTION, FREE, RAISED, setting

POSITIVE = "(0, 1e6]"


@dataclass
class AlgorithmConfig(ScheduleConfig):
    """The settings of the RL algorithm.

    A part (advantage, policy loss, KL estimator, aggregation, importance sampling) is chosen by the name of its
    function, or by the dotted path of a user's own function.
    """

    steps: int = setting("RL steps: rollouts", range=COUNT, on_resume=RAISED)
    prompts_per_step: int = setting("prompts of a step, all ranks together", range=COUNT, unit="prompts")
    samples_per_prompt: int = setting(
        "responses to a prompt, which form its group; one alone has nothing to be compared with", range="[2, 1e6]"
    )
    updates_per_rollout: int = setting("optimiser steps that share a rollout", range=COUNT)
    max_generation_batches: int = setting(
        "dynamic sampling: batches of prompts that are generated at most, until enough groups have differing rewards",
        range=COUNT,
    )
    advantage: str = setting(
        "grpo, dr_grpo, clip_filter, rloo, cale, reinforce_plus_plus, reinforce_plus_plus_baseline; with a critic gae, "
        "gae_whitened"
    )
    advantage_epsilon: float = setting("grpo: added to the group's standard deviation", range=FRACTION)
    clip_filter_cap: float = setting("clip_filter: largest factor", range=POSITIVE)
    cale_alpha: float = setting("cale: factor of a longer answer's reward", range=COEFFICIENT)
    cale_mu: float = setting("cale: weight of the comparison between the halves of a group", range=FRACTION)
    discount: float = setting("reinforce_plus_plus, gae: discount γ of later rewards", range=FRACTION)
    gae_lambda: float = setting("gae: λ", range=FRACTION)
    overlong_fraction: float = setting(
        "last part of rollout.max_response_tokens in which the reward falls by 1; 0 for none", range=FRACTION
    )
    skip_zero_advantage: bool = setting("leave samples without a policy gradient (and their KL term) out of the update")
    policy_loss: str = setting("ppo_clip, ppo_dual_clip, cispo, cpgd, cpgd_sequence, gspo, reinforce")
    clip_low: float = setting("the ratio is clipped below 1 − this; 1 for no lower bound", range="(0, 1]")
    clip_high: float = setting("the ratio is clipped above 1 + this", range=POSITIVE)
    dual_clip: float = setting(
        "ppo_dual_clip: largest ratio where the advantage is negative; 1 is an unchanged policy's", range="(1, 1e6]"
    )
    drift_coefficient: float = setting("cpgd: coefficient of the policy drift", range=COEFFICIENT)
    drift_cap: float = setting("cpgd: largest factor in the drift's gradient", range=COEFFICIENT)
    entropy_coefficient: float = setting("coefficient of the entropy bonus", range=COEFFICIENT)
    kl_estimator: str = setting("estimator of the KL to the reference: k1, k2, k3")
    kl_in: str = setting("where the KL counts", choices=("loss", "reward"))
    kl_coefficient: float = setting("coefficient of the KL to the reference; 0 for none", range=COEFFICIENT)
    reference_every: int | None = setting(
        "where nothing but the metric kl/reference needs the reference: steps from one measurement to the next; null "
        "for no reference",
        range=COUNT,
        unit="steps",
    )
    aggregation: str = setting("token losses to one: token_mean, sequence_mean_token_mean, sequence_sum")
    token_divisor: float = setting("sequence_sum: divisor of a sequence's sum", range="(0, 1e9]")
    value_clip: float = setting("how far a critic's value may move from the rollout's", range=POSITIVE)
    importance_sampling: str = setting(
        "weight of token losses for the mismatch of trainer and rollout: none, token_truncated, sequence_truncated, "
        "icepop"
    )
    tis_cap: float = setting("token_truncated, sequence_truncated: largest weight", range=POSITIVE)
    icepop_low: float = setting("icepop: tokens of a lower trainer / rollout ratio are left out", range=FRACTION)
    icepop_high: float = setting("icepop: tokens of a higher trainer / rollout ratio are left out", range="[1, 1e6]")
    sequence_ratio_bounds: list[float] | None = setting(
        "[low, high]: sequences whose geometric mean of trainer / rollout lies outside are left out; null for none"
    )
    token_ratio_veto: float | None = setting(
        "sequences with a token of a lower trainer / rollout ratio are left out; null for none", range="(0, 1)"
    )
    max_mismatch: float = setting(
        "largest mean absolute difference of trainer's and rollout's log-probs; above it the run stops",
        range=POSITIVE,
        on_resume=FREE,
    )
    kwargs: dict[str, Any] = setting("keyword arguments of the user's own parts")


def check(settings: AlgorithmConfig) -> None:
    """Raises ValueError for settings that do not go together."""
    if settings.kl_estimator == "k1" and settings.kl_in == "loss" and settings.kl_coefficient > 0:
        raise ValueError(
            "algorithm.kl_estimator='k1': its gradient in the loss is zero on average; use k2 or k3, or "
            "algorithm.kl_in=reward"
        )
    if settings.prompts_per_step % settings.updates_per_rollout:
        raise ValueError(
            f"algorithm.updates_per_rollout={settings.updates_per_rollout}: must divide algorithm.prompts_per_step="
            f"{settings.prompts_per_step}"
        )
    bounds = settings.sequence_ratio_bounds
    if bounds is not None and (len(bounds) != 2 or not 0 <= bounds[0] <= 1 <= bounds[1]):
        raise ValueError(f"algorithm.sequence_ratio_bounds={bounds}: give two values around 1, or null for none")
