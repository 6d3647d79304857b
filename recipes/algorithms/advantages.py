"""Advantages of a rollout: per sample, [prompts, samples], or per trained token, [tokens].

They are computed in FP64 over the full rollout, which every rank knows. Tokens that the loss mask leaves out (an
environment's reply, a forced end of thinking) are not among the inputs, so returns, discounts and whitening go from one
trained token to the next. ``trained_inputs`` removes these tokens, and ``at_response_tokens`` puts zeros in their
places. A sample without a reward has the reward NaN. It is left out of every mean and gets the advantage 0.

Standard deviations have n − 1 in the denominator, as in TRL and verl, both those of a group and those of a rollout's
tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from recipes.algorithms.needs import needs


@dataclass(frozen=True)
class AdvantageInputs:
    """The rewards and values of a scored rollout, of trained tokens only.

    Per-token inputs are ordered by prompt and then by sample. Raises ValueError where the shapes do not fit.
    """

    # [prompts, samples], NaN for a sample without a reward.
    rewards: Tensor
    # [prompts, samples]: the number of trained tokens, 0 for a sample without any.
    lengths: Tensor
    # [tokens]: the reward of a token beside that of its sequence. This is −kl_coefficient × KL where algorithm.kl_in is
    # the reward.
    token_rewards: Tensor
    # [tokens]: a critic's expected return before each token. None without a critic.
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
        """[prompts, samples]: whether the sample has a reward."""
        return ~self.rewards.isnan()

    @property
    def totals(self) -> Tensor:
        """[prompts, samples]: each sample's reward plus the sum of its token rewards."""
        sums = [part.sum() for part in self.token_rewards.double().split(self.lengths.flatten().tolist())]
        return self.rewards.double() + torch.stack(sums).view_as(self.rewards)


def trained_inputs(
    rewards: Tensor, response_lengths: Tensor, loss_mask: Tensor, token_rewards: Tensor, values: Tensor | None
) -> AdvantageInputs:
    """Build the inputs from the trained tokens of a rollout. Tokens that the loss mask leaves out are removed.

    ``rewards`` and ``response_lengths`` are [prompts, samples]. ``loss_mask`` (bool), ``token_rewards`` and ``values``
    have an element for each response token, [R].
    """
    sample_of_token = torch.arange(rewards.numel()).repeat_interleave(response_lengths.flatten())
    lengths = torch.bincount(sample_of_token[loss_mask], minlength=rewards.numel())
    return AdvantageInputs(
        rewards=rewards,
        lengths=lengths.view_as(rewards),
        token_rewards=token_rewards[loss_mask],
        values=None if values is None else values[loss_mask],
    )


def sample_inputs(rewards: Tensor, trained_lengths: Tensor) -> AdvantageInputs:
    """Build the inputs where no token has a reward or a value of its own. Both arguments are [prompts, samples]."""
    no_rewards = torch.zeros((), dtype=torch.float64).expand(int(trained_lengths.sum()))  # one number in memory
    return AdvantageInputs(rewards=rewards, lengths=trained_lengths, token_rewards=no_rewards)


def at_response_tokens(trained: Tensor, loss_mask: Tensor) -> Tensor:
    """Scatter per-token numbers of the trained tokens, [tokens], to all response tokens, [R].

    Tokens that the loss mask leaves out get 0.
    """
    everywhere = torch.zeros(len(loss_mask), dtype=trained.dtype)
    everywhere[loss_mask] = trained
    return everywhere


def dr_grpo(inputs: AdvantageInputs) -> Tensor:
    """R − group mean (Dr. GRPO, Liu et al. 2025, section 3.2; CPGD's equal weight). Equal rewards give exactly 0."""
    return _centred(inputs.totals)


def grpo(inputs: AdvantageInputs, *, advantage_epsilon: float) -> Tensor:
    """(R − group mean) / (group std + ε) (DeepSeekMath, Shao et al. 2024; CPGD's std weight).

    The std has n − 1 in its denominator, as in SafeWork-R1's run. n is the number of the group's samples with a reward.
    """
    centred = _centred(inputs.totals)  # 0 for samples without a reward
    n = inputs.judged.sum(dim=1, keepdim=True)
    variance = (centred**2).sum(dim=1, keepdim=True) / (n - 1).clamp(min=1)
    return (centred / (variance.sqrt() + advantage_epsilon)).masked_fill(centred == 0, 0.0)


def clip_filter(inputs: AdvantageInputs, *, clip_filter_cap: float) -> Tensor:
    """min(cap, groups / groups with differing rewards) × (R − group mean): CPGD's clip-filter-like weight.

    The factor acts as if groups of equal rewards had been replaced by others (Liu et al. 2025, arXiv 2505.12504,
    section 4.3).
    """
    centred = _centred(inputs.totals)
    differing = int((centred != 0).any(dim=1).sum())
    return centred * min(clip_filter_cap, len(centred) / max(differing, 1))


def rloo(inputs: AdvantageInputs) -> Tensor:
    """R − mean of the others in the group (Ahmadian et al. 2024, eq. 8), which is n/(n − 1) × (R − group mean)."""
    n = inputs.judged.sum(dim=1, keepdim=True)
    return _centred(inputs.totals) * n / (n - 1).clamp(min=1)


def cale(inputs: AdvantageInputs, *, cale_alpha: float, cale_mu: float) -> Tensor:
    """Length-conditioned advantages: μ inter + (1 − μ) intra, over the shorter and the longer half of each group.

    - inter, for a long answer: α R − mean of the shorter half;
    - inter, for a short answer: R − α × mean of the longer half;
    - intra: R − mean of the answer's own half.

    With α < 1 a short right answer is worth more than a long one. SafeWork-R1 has not published the formula; this is
    from its authors' description. Our choices: In a group of odd size the shorter half has one sample more. Samples of
    equal length keep their order. A group whose samples all have the same length has no halves and gets R − mean.
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
        mean_of_short = rewards[short].mean()
        mean_of_long = rewards[long].mean()
        inter_short = rewards[short] - cale_alpha * mean_of_long
        inter_long = cale_alpha * rewards[long] - mean_of_short
        intra_short = rewards[short] - mean_of_short
        intra_long = rewards[long] - mean_of_long
        row[short] = cale_mu * inter_short + (1 - cale_mu) * intra_short
        row[long] = cale_mu * inter_long + (1 - cale_mu) * intra_long
    return advantages


def reinforce_plus_plus(inputs: AdvantageInputs, *, discount: float) -> Tensor:
    """Each token's discounted return, normalised to mean 0 and std 1 over the rollout's tokens, [tokens] (Hu 2025)."""
    rewards = _token_rewards(inputs)
    returns = torch.zeros_like(rewards)
    following = torch.zeros(rewards.shape[1], dtype=rewards.dtype)
    for t in reversed(range(len(rewards))):
        following = rewards[t] + discount * following
        returns[t] = following
    return _whitened(_packed(returns, inputs.lengths), inputs)


def reinforce_plus_plus_baseline(inputs: AdvantageInputs) -> Tensor:
    """R − group mean, normalised to mean 0 and std 1 over all tokens of the rollout, [tokens] (Hu 2025)."""
    per_sample = dr_grpo(inputs).flatten()
    return _whitened(per_sample.repeat_interleave(inputs.lengths.flatten()), inputs)


@needs(values=True)
def gae(inputs: AdvantageInputs, *, discount: float, gae_lambda: float) -> Tensor:
    """Generalised advantage estimates, [tokens] (Schulman et al. 2016, eq. 16).

    A_t = δ_t + γλ A_{t+1} with δ_t = r_t + γ V_{t+1} − V_t, where t + 1 is the next trained token. The value after the
    last token is 0. The returns that a critic learns are these advantages plus the values. Raises ValueError without
    ``values``.
    """
    if inputs.values is None:
        raise ValueError("algorithm.advantage=gae: needs a critic's values; choose another advantage without a critic")
    rewards = _token_rewards(inputs)
    values = _padded(inputs.values.double(), inputs.lengths)
    advantages = torch.zeros_like(rewards)
    next_value = torch.zeros(rewards.shape[1], dtype=rewards.dtype)
    next_advantage = torch.zeros(rewards.shape[1], dtype=rewards.dtype)
    for t in reversed(range(len(rewards))):
        # Rewards and values are 0 in the padding after a sequence, so its last token starts from 0.
        error = rewards[t] + discount * next_value - values[t]
        next_advantage = error + discount * gae_lambda * next_advantage
        next_value = values[t]
        advantages[t] = next_advantage
    return _packed(advantages, inputs.lengths).masked_fill(~_judged_tokens(inputs), 0.0)


@needs(values=True)
def gae_whitened(inputs: AdvantageInputs, *, discount: float, gae_lambda: float) -> Tensor:
    """``gae``, normalised to mean 0 and std 1 over the rollout's tokens, [tokens], as PPO implementations do."""
    return _whitened(gae(inputs, discount=discount, gae_lambda=gae_lambda), inputs)


def _centred(totals: Tensor) -> Tensor:
    """Subtract the group's mean. Samples without a reward and groups of equal rewards get 0.

    Groups of equal rewards are set to 0 explicitly, since rounding can make the mean differ from the rewards.
    """
    missing = totals.isnan()
    highest = totals.masked_fill(missing, -torch.inf).amax(1, keepdim=True)
    lowest = totals.masked_fill(missing, torch.inf).amin(1, keepdim=True)
    equal = highest == lowest
    return (totals - totals.nanmean(dim=1, keepdim=True)).masked_fill(missing | equal, 0.0)


def _token_rewards(inputs: AdvantageInputs) -> Tensor:
    """[longest, sequences]: the rewards of the tokens, 0 in the padding. The last token also gets the sequence's."""
    token_rewards = _padded(inputs.token_rewards.double(), inputs.lengths)
    rewards = inputs.rewards.double().flatten().nan_to_num(nan=0.0)
    lengths = inputs.lengths.flatten()
    (sequences,) = torch.nonzero(lengths, as_tuple=True)
    token_rewards[lengths[sequences] - 1, sequences] += rewards[sequences]
    return token_rewards


def _padded(tokens: Tensor, lengths: Tensor) -> Tensor:
    """Reshape [tokens] to [longest, sequences], with 0 in the padding."""
    return pad_sequence(tokens.split(lengths.flatten().tolist()))


def _packed(padded: Tensor, lengths: Tensor) -> Tensor:
    """The inverse of ``_padded``."""
    sequences = zip(padded.unbind(dim=1), lengths.flatten().tolist(), strict=True)
    return torch.cat([sequence[:length] for sequence, length in sequences])


def _judged_tokens(inputs: AdvantageInputs) -> Tensor:
    return inputs.judged.flatten().repeat_interleave(inputs.lengths.flatten())


def _whitened(tokens: Tensor, inputs: AdvantageInputs) -> Tensor:
    """Normalise to mean 0 and standard deviation 1 over the tokens of samples with a reward.

    The tokens of other samples get 0. Where all tokens are equal, all get 0.
    """
    judged = _judged_tokens(inputs)
    known = tokens[judged]
    if len(known) == 0 or known.amax() == known.amin():
        return torch.zeros_like(tokens)
    whitened = (tokens - known.mean()) / known.std()
    return whitened.masked_fill(~judged, 0.0)
