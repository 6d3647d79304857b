"""Group relative policy optimisation (Shao et al. 2024, DeepSeekMath) with SafeWork-R1's settings."""

from torch import Tensor

from megatron_ext.packing import MicroBatch
from recipes.algorithms.losses import clipped_policy_loss, kl_k3
from recipes.config import AlgorithmConfig


def advantages(rewards: Tensor, config: AlgorithmConfig) -> Tensor:
    """Rewards [prompts, samples] → (R − group mean) / (group std + ε), same shape; a group of equal rewards gives 0.

    The std is the population's (our choice: the report does not say).
    """
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    scaled = centred / (rewards.std(dim=1, correction=0, keepdim=True) + config.advantage_epsilon)
    equal = rewards.amax(dim=1, keepdim=True) == rewards.amin(dim=1, keepdim=True)
    return scaled.masked_fill(equal, 0.0)  # exactly: a mean is rounded


def token_loss(log_probs: Tensor, batch: MicroBatch, config: AlgorithmConfig) -> Tensor:
    """Loss per response token [R]: clipped surrogate plus ``kl_coefficient`` × k3 to the reference.

    One update per rollout: the policy that sampled is the policy being updated, so its log-probs are these, without
    gradient.
    """
    surrogate = clipped_policy_loss(log_probs, log_probs.detach(), batch.values["advantage"], config.clip_ratio)
    if config.kl_coefficient == 0:
        return surrogate
    return surrogate + config.kl_coefficient * kl_k3(log_probs, batch.values["reference"])
