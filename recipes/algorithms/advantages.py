"""Advantages of a rollout: for each sample, [prompts, samples], or for each response token, [tokens].

They are computed in FP64 over the full rollout, which every rank knows. A sample without a reward has the reward NaN:
it is left out of every mean and gets the advantage 0. ``broadcast_to_tokens`` maps advantages of samples to tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from recipes.algorithms.needs import needs


@dataclass(frozen=True)
class AdvantageInputs:
    """A scored rollout. Raises ValueError where the shapes do not fit.

    ``rewards`` [prompts, samples], NaN where there is none. ``lengths`` [prompts, samples]: response tokens.
    ``token_rewards`` [tokens], prompt by prompt, sample by sample: a token's reward beside that of its sequence, which
    is −``kl_coefficient`` × KL where ``algorithm.kl_in`` is the reward. ``values`` [tokens]: a critic's expected return
    before each token; None without a critic.
    """

    rewards: Tensor
    lengths: Tensor
    token_rewards: Tensor
    values: Tensor | None = None

    def __post_init__(self) -> None:
        if self.rewards.dim() != 2 or self.rewards.shape != self.lengths.shape:
            raise ValueError(
                f"rewards {list(self.rewards.shape)} and lengths {list(self.lengths.shape)}: both must be "
                "[prompts, samples]; with one dimension the groups are unknown"
            )
        tokens = int(self.lengths.sum())
        for name, values in (("token_rewards", self.token_rewards), ("values", self.values)):
            if values is not None and values.shape != (tokens,):
                raise ValueError(f"{name} {list(values.shape)}: the lengths add up to [{tokens}]")

    @property
    def judged(self) -> Tensor:
        """[prompts, samples]: whether there is a reward."""
        return ~self.rewards.isnan()

    @property
    def totals(self) -> Tensor:
        """[prompts, samples]: each sample's reward plus the sum of its token rewards."""
        sums = [part.sum() for part in self.token_rewards.double().split(self.lengths.flatten().tolist())]
        return self.rewards.double() + torch.stack(sums).view_as(self.rewards)


def dr_grpo(inputs: AdvantageInputs) -> Tensor:
    """R − group mean (Dr. GRPO, Liu et al. 2025, section 3.2; CPGD's equal weight). Equal rewards give exactly 0."""
    return _centred(inputs.totals)


def grpo(inputs: AdvantageInputs, *, advantage_epsilon: float) -> Tensor:
    """(R − group mean) / (group std + ε) (DeepSeekMath, Shao et al. 2024; CPGD's std weight).

    The std is the population's (our choice: the SafeWork-R1 report does not say).
    """
    centred = _centred(inputs.totals)
    std = _group_mean((centred**2).masked_fill(~inputs.judged, torch.nan)).sqrt()
    return (centred / (std + advantage_epsilon)).masked_fill(centred == 0, 0.0)


def clip_filter(inputs: AdvantageInputs, *, clip_filter_cap: float) -> Tensor:
    """min(cap, groups / groups with differing rewards) × (R − group mean): CPGD's clip-filter-like weight.

    As if groups of equal rewards had been replaced by others (Liu et al. 2025, arXiv 2505.12504, section 4.3).
    """
    centred = _centred(inputs.totals)
    differing = int((centred != 0).any(dim=1).sum())
    return centred * min(clip_filter_cap, len(centred) / max(differing, 1))


def rloo(inputs: AdvantageInputs) -> Tensor:
    """R − mean of the others in the group (Ahmadian et al. 2024, eq. 8), which is n/(n − 1) × (R − group mean)."""
    n = inputs.judged.sum(dim=1, keepdim=True)
    return _centred(inputs.totals) * n / (n - 1).clamp(min=1)


def cale(inputs: AdvantageInputs, *, cale_alpha: float, cale_mu: float) -> Tensor:
    """Length-conditioned: μ inter + (1 − μ) intra, over the shorter and the longer half of each group.

    Inter: α R − mean of the shorter half for a long answer, R − α × mean of the longer half for a short one. Intra:
    R − mean of the own half. With α < 1 a short right answer is worth more than a long one. Not published by
    SafeWork-R1; from its authors' description. Our choices: of an odd group the shorter half has one more; equal
    lengths keep the order of the samples; a group of one length has no halves and gets R − mean.
    """
    totals = inputs.totals
    advantages = torch.zeros_like(totals)
    for row, rewards, lengths, judged in zip(advantages, totals, inputs.lengths, inputs.judged, strict=True):
        group = judged.nonzero().squeeze(1)
        order = group[lengths[group].argsort(stable=True)]
        half = (len(order) + 1) // 2
        short = order[:half]
        long = order[half:]
        if len(long) == 0 or lengths[order[0]] == lengths[order[-1]]:
            row.copy_(_centred(rewards.unsqueeze(0))[0])
            continue
        inter_short = rewards[short] - cale_alpha * rewards[long].mean()
        inter_long = cale_alpha * rewards[long] - rewards[short].mean()
        row[short] = cale_mu * inter_short + (1 - cale_mu) * (rewards[short] - rewards[short].mean())
        row[long] = cale_mu * inter_long + (1 - cale_mu) * (rewards[long] - rewards[long].mean())
    return advantages


def reinforce_plus_plus(inputs: AdvantageInputs, *, discount: float) -> Tensor:
    """Each token's discounted return, normalised to mean 0 and std 1 over the rollout's tokens, [tokens] (Hu 2025)."""
    rewards = _token_rewards(inputs)
    returns = torch.zeros_like(rewards)
    following = torch.zeros(len(rewards), dtype=rewards.dtype)
    for t in reversed(range(rewards.shape[1])):
        following = rewards[:, t] + discount * following
        returns[:, t] = following
    return _whitened(_packed(returns, inputs.lengths), inputs)


def reinforce_plus_plus_baseline(inputs: AdvantageInputs) -> Tensor:
    """R − group mean, normalised to mean 0 and std 1 over all tokens of the rollout, [tokens] (Hu 2025)."""
    per_sample = dr_grpo(inputs).flatten()
    return _whitened(per_sample.repeat_interleave(inputs.lengths.flatten()), inputs)


@needs(values=True)
def gae(inputs: AdvantageInputs, *, discount: float, gae_lambda: float) -> Tensor:
    """Generalised advantage estimates, [tokens] (Schulman et al. 2016, eq. 16). A critic's returns are these + values.

    A_t = δ_t + γλ A_{t+1} with δ_t = r_t + γ V_{t+1} − V_t; the value after the last token is 0. Raises ValueError
    without ``values``.
    """
    if inputs.values is None:
        raise ValueError("algorithm.advantage=gae: needs a critic's values; choose another advantage without a critic")
    rewards = _token_rewards(inputs)
    values = _padded(inputs.values.double(), inputs.lengths)
    advantages = torch.zeros_like(rewards)
    next_value = torch.zeros(len(rewards), dtype=rewards.dtype)
    next_advantage = torch.zeros(len(rewards), dtype=rewards.dtype)
    for t in reversed(range(rewards.shape[1])):
        # In the padding after a sequence rewards and values are 0, so its last token starts from 0.
        error = rewards[:, t] + discount * next_value - values[:, t]
        next_advantage = error + discount * gae_lambda * next_advantage
        next_value = values[:, t]
        advantages[:, t] = next_advantage
    return _packed(advantages, inputs.lengths).masked_fill(~_judged_tokens(inputs), 0.0)


@needs(values=True)
def gae_whitened(inputs: AdvantageInputs, *, discount: float, gae_lambda: float) -> Tensor:
    """``gae``, normalised to mean 0 and std 1 over the rollout's tokens, [tokens], as PPO implementations do."""
    return _whitened(gae(inputs, discount=discount, gae_lambda=gae_lambda), inputs)


def broadcast_to_tokens(advantages: Tensor, lengths: Tensor) -> Tensor:
    """Advantages of samples [prompts, samples], or of tokens already → those of all response tokens [tokens]."""
    if advantages.dim() == 1:
        return advantages
    return advantages.flatten().repeat_interleave(lengths.flatten())


def _group_mean(values: Tensor) -> Tensor:
    """[prompts, 1]: the mean over what is not NaN."""
    return values.nanmean(dim=1, keepdim=True)


def _centred(totals: Tensor) -> Tensor:
    """Minus the group's mean; 0 for samples without a reward and for groups of equal rewards.

    The latter are set to 0, as the rounded mean of equal rewards can differ from them.
    """
    missing = totals.isnan()
    highest = totals.masked_fill(missing, -torch.inf).amax(1, keepdim=True)
    lowest = totals.masked_fill(missing, torch.inf).amin(1, keepdim=True)
    equal = highest == lowest
    return (totals - _group_mean(totals)).masked_fill(missing | equal, 0.0)


def _token_rewards(inputs: AdvantageInputs) -> Tensor:
    """[sequences, longest]: each token's reward, with the sequence's reward at its last token; 0 in the padding."""
    token_rewards = _padded(inputs.token_rewards.double(), inputs.lengths)
    lengths = inputs.lengths.flatten()
    rewards = inputs.rewards.double().flatten().nan_to_num(nan=0.0)
    token_rewards[torch.arange(len(token_rewards)), lengths - 1] += rewards
    return token_rewards


def _padded(tokens: Tensor, lengths: Tensor) -> Tensor:
    return pad_sequence(tokens.split(lengths.flatten().tolist()), batch_first=True)


def _packed(padded: Tensor, lengths: Tensor) -> Tensor:
    return torch.cat([row[:n] for row, n in zip(padded, lengths.flatten().tolist(), strict=True)])


def _judged_tokens(inputs: AdvantageInputs) -> Tensor:
    return inputs.judged.flatten().repeat_interleave(inputs.lengths.flatten())


def _whitened(tokens: Tensor, inputs: AdvantageInputs) -> Tensor:
    """Mean 0 and population std 1 over the tokens of samples with a reward; 0 elsewhere, and where all are equal."""
    judged = _judged_tokens(inputs)
    known = tokens[judged]
    if len(known) == 0 or known.amax() == known.amin():
        return torch.zeros_like(tokens)
    whitened = (tokens - known.mean()) / known.std(correction=0)
    return whitened.masked_fill(~judged, 0.0)
