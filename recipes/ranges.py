"""The numbers that each field of the configuration may have: what is checked before anything else.

Upper bounds without a reason of their own are far beyond any use; they catch a slipped exponent.
"""

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

COUNT, TOKENS, PIXELS, SECONDS = "[1, 1e9]", "[1, 1e8]", "[1, 1e9]", "(0, 1e7]"
RATE, FRACTION, WARMUP, COEFFICIENT = "(0, 1]", "[0, 1]", "[0, 1)", "[0, 1e6]"

# An interval for each number of ``Config``, except those of ``rewards`` (rewards.settings has its own).
RANGES = {
    "seed": "[0, 2147483647]",
    **{f"stage.sft.{name}": COUNT for name in ("steps", "rows_per_step", "held_out_every")},
    **{f"stage.reward_model.{name}": COUNT for name in ("steps", "pairs_per_step", "held_out_every")},
    "stage.sft.epochs": "(0, 1e6]",
    "stage.reward_model.epochs": "(0, 1e6]",
    **{
        f"{where}.{name}": interval
        for where in ("stage.sft", "stage.reward_model", "algorithm", "critic")
        for name, interval in (("learning_rate", RATE), ("min_lr_ratio", FRACTION), ("warmup_fraction", WARMUP))
    },
    **{
        f"algorithm.{name}": COUNT
        for name in ("steps", "prompts_per_step", "updates_per_rollout", "max_generation_batches")
    },
    "algorithm.samples_per_prompt": "[2, 1e6]",  # a group has something to compare
    "algorithm.advantage_epsilon": FRACTION,
    "algorithm.clip_filter_cap": "(0, 1e6]",
    "algorithm.cale_alpha": COEFFICIENT,
    "algorithm.cale_mu": FRACTION,
    "algorithm.discount": FRACTION,
    "algorithm.gae_lambda": FRACTION,
    "algorithm.overlong_fraction": FRACTION,
    "algorithm.clip_low": "(0, 1)",
    "algorithm.clip_high": "(0, 1e6]",
    "algorithm.dual_clip": "(1, 1e6]",  # 1 is the ratio of an unchanged policy
    "algorithm.drift_coefficient": COEFFICIENT,
    "algorithm.drift_cap": COEFFICIENT,
    "algorithm.entropy_coefficient": COEFFICIENT,
    "algorithm.kl_coefficient": COEFFICIENT,
    "algorithm.token_divisor": "(0, 1e9]",
    "algorithm.value_clip": "(0, 1e6]",
    "algorithm.tis_cap": "(0, 1e6]",
    "algorithm.token_ratio_veto": "(0, 1)",
    "algorithm.max_mismatch": "(0, 1e6]",
    **{f"parallel.{name}": "[1, 1e5]" for name in ("tensor", "pipeline", "virtual_pipeline", "context")},
    **{f"parallel.{name}": "[1, 1e4]" for name in ("first_stage_layers", "last_stage_layers")},
    "parallel.micro_batch_tokens": TOKENS,
    "precision.bf16_layers": "[0, 1e4]",
    "rollout.engines": "[1, 1e5]",
    "rollout.tensor": "[1, 1e5]",
    "rollout.max_response_tokens": TOKENS,
    "rollout.temperature": "(0, 100]",
    "rollout.top_p": "(0, 1]",
    "rollout.max_num_seqs": "[1, 1e6]",
    "rollout.max_num_batched_tokens": TOKENS,
    "rollout.kv_cache_gib": "(0, 1e5]",
    "rollout.threads": "[1, 1e5]",
    "rollout.startup_timeout": SECONDS,
    "rollout.stall_timeout": SECONDS,
    "rollout.staleness": "[0, 1]",
    "rollout.oversample": "[1, 1e3]",
    "rollout.partial_rollout_tokens": TOKENS,
    "rollout.thinking_budget": TOKENS,
    "rollout.environment.max_turns": "[1, 1e6]",
    "rollout.sync_bucket_mib": "[1, 1e6]",
    "rollout.sync_verify_every": COUNT,
    "data.max_prompt_tokens": TOKENS,
    "data.evaluation_samples": "[0, 1e6]",  # 0: greedy only
    "data.images.min_pixels": PIXELS,
    "data.images.max_pixels": PIXELS,
    "data.images.max_aspect_ratio": "[1, 1e6]",
    "cluster.nodes": "[1, 1e5]",
    "cluster.ranks": "[1, 1e6]",
    "cluster.threads": "[1, 1e5]",
    "cluster.timeout": SECONDS,
    "cluster.watchdog": SECONDS,
    "cluster.slow_factor": "(1, 1e6]",
    "optimizer.epsilon": RATE,
    "optimizer.weight_decay": FRACTION,
    "optimizer.clip_grad_norm": "(0, 1e6]",
    "optimizer.max_skipped": COUNT,
    "critic.warmup_steps": "[0, 1e9]",
    "checkpoint.every_steps": COUNT,
    "checkpoint.keep": "[2, 1e6]",  # one to fall back to
}


def numbers(config: Any, prefix: str = "") -> Iterator[tuple[str, int | float]]:
    """Dotted path and value of each number in nested dataclasses; lists and mappings are left out."""
    for field in fields(config):
        value = getattr(config, field.name)
        if is_dataclass(value):
            yield from numbers(value, f"{prefix}{field.name}.")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield f"{prefix}{field.name}", value


def outside(value: float, interval: str, whole: bool) -> str | None:
    """What ``value`` has to be instead, None where it lies in the ``interval``; NaN lies in none."""
    low, high = (float(bound) for bound in interval[1:-1].split(","))
    above = value > low if interval[0] == "(" else value >= low
    below = value < high if interval[-1] == ")" else value <= high
    if above and below:
        return None
    if high <= 1:
        return "use 0 or 1" if whole else f"must be in {interval}"
    if above:
        return f"must be {'below' if interval[-1] == ')' else 'at most'} {high:g}"
    if interval[0] == "(" or (whole and low == 1):
        return f"must be above {low if interval[0] == '(' else 0:g}"
    return f"use {low:g} or more"


def impossible(config: Any, nullable: set[str]) -> str | None:
    """The first field of ``config`` whose number lies outside its interval, with value and remedy; None for none.

    ``nullable``: the fields that may be null instead.
    """
    for path, value in numbers(config):
        if path.startswith("rewards."):
            continue
        if (remedy := outside(value, RANGES[path], isinstance(value, int))) is not None:
            return f"{path}={value}: {remedy}" + (", or null for none" if path in nullable else "")
    return None
