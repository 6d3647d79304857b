"""PPO's critic: a model with a scalar head, on the policy's ranks and in the policy's layout.

The value of a response token is the expected return given the tokens before it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_ext import checkpoint, forward_backward, hf_checkpoint, scalar_head
from megatron_ext import model as models
from megatron_ext.batch import TokenBatch
from megatron_ext.checkpoint import Snapshot
from megatron_ext.host_buffers import HostBuffers
from megatron_ext.models import family
from megatron_ext.offload import HostCopy, release_gradients
from megatron_ext.packing import MicroBatch
from recipes.algorithms import value_losses
from recipes.algorithms.advantages import AdvantageInputs, at_response_tokens, gae
from recipes.algorithms.settings import AlgorithmConfig
from recipes.config import Config
from recipes.errors import ConfigError
from recipes.training.policy import Policy

NAME = "critic"  # in a checkpoint


@dataclass(frozen=True)
class Critic:
    """The critic on this rank: its model, optimiser and schedule."""

    algorithm: AlgorithmConfig
    model: models.Model
    optimizer: MegatronOptimizer
    schedule: OptimizerParamScheduler
    # Copies of the policy's optimiser states, which are on the host while the critic works, and of the whole critic,
    # which is on the host at other times. None without critic.offload.
    host_copies: tuple[HostCopy, HostCopy] | None
    # Holds the copies that a checkpoint is written from.
    snapshot_buffers: HostBuffers = field(default_factory=HostBuffers)

    @contextmanager
    def awake(self) -> Iterator[None]:
        """Keep the critic on the device within the block. With ``critic.offload`` it is on the host otherwise."""
        if self.host_copies is None:
            yield
            return
        policy, critic = self.host_copies
        policy.release()
        critic.restore()
        try:
            yield
        finally:
            critic.release()
            policy.restore()

    def values(self, policy: Policy, batch: TokenBatch) -> torch.Tensor:
        """Collective: the values before all response tokens, FP32 [R], on every rank's host."""
        with self.awake():
            micro_batches = policy.micro_batches(batch, model=self.model)
            return forward_backward.all_values(self.model, micro_batches, len(batch.response_tokens))

    def train(self, policy: Policy, batch: TokenBatch, inputs: AdvantageInputs) -> dict[str, float]:
        """Collective: make as many updates on a rollout as the policy makes, and return their metrics.

        The critic learns from every response that has a reward, also where the advantage is 0. The column ``weights``
        has the aggregation weights of the policy loss, which are 0 where the loss mask is False. So the update depends
        neither on the micro-batch split nor on the number of ranks.
        """
        loss_mask = torch.from_numpy(batch.loss_mask)
        old_values, returns = value_targets(inputs, loss_mask, self.algorithm.discount, self.algorithm.gae_lambda)
        batch = batch.with_columns(old_values=old_values.numpy(), returns=returns.numpy())
        size = len(batch) // self.algorithm.updates_per_rollout
        sums: dict[str, float] = {}
        with self.awake():
            for first in range(0, len(batch), size):
                part = batch.select(range(first, first + size))
                micro_batches = policy.micro_batches(part, model=self.model)
                loss = value_loss(self.algorithm.value_clip)
                metrics = forward_backward.accumulate_gradients(self.model, micro_batches, loss)
                if policy.guard.apply(self.optimizer, self.schedule, metrics, NAME):
                    forward_backward.add_metrics(sums, {**metrics, "updates": 1})
            release_gradients(self.model)
        if not sums:
            return {}
        trained = torch.from_numpy(batch.values("weights") > 0)
        num_trained = int(trained.sum())
        return {
            "value/loss": sums["loss"] / sums["updates"],
            "value/grad_norm": sums["grad_norm"] / sums["updates"],
            "value/clipped": sums["clipped"] / max(num_trained, 1),
            "value/mean": float(old_values[trained].mean()) if num_trained else 0.0,
            "value/explained_variance": explained_variance(old_values[trained], returns[trained]),
        }

    def snapshot(self) -> dict[str, Snapshot]:
        """Collective: the critic's part of a checkpoint, by name.

        The previous snapshot must have been written, since its buffers are reused.
        """
        with self.awake():
            return {NAME: checkpoint.snapshot(self.model, self.optimizer, self.schedule, self.snapshot_buffers)}

    def load(self, folder: Path) -> None:
        """Collective: restore the critic from a checkpoint, bit for bit.

        Raises ConfigError for a checkpoint without a critic.
        """
        if NAME not in checkpoint.progress(folder)["models"]:
            raise ConfigError(f"{folder}: holds no critic: resume with the algorithm the run began with, or start anew")
        with self.awake():
            checkpoint.read(folder, NAME, self.model, self.optimizer, self.schedule, rng=False)


def build_critic(config: Config, policy: Policy, policy_folder: Path) -> Critic:
    """Collective: build the critic from ``critic.path``, or from the policy's folder where that is not set.

    If the folder holds a language model, the scalar head starts at zero, and so do all values. Raises ConfigError where
    the size of the model's vocabulary differs from the policy's.
    """
    folder = Path(config.critic.path or policy_folder)
    hf_config = scalar_head.scalar_config(hf_checkpoint.config(folder))
    vocabulary = vocabulary_size(hf_config)
    policy_vocabulary = vocabulary_size(policy.model.hf_config)
    if vocabulary != policy_vocabulary:
        raise ConfigError(
            f"critic.path={str(folder)!r}: its vocabulary has {vocabulary} tokens, the policy's {policy_vocabulary}; "
            "use a model with the policy's tokenizer"
        )
    model = models.build(hf_config, policy.parallel, config.precision, config.model.frozen)
    release_gradients(model)
    hf_checkpoint.load(model.shards, folder)
    updates = config.algorithm.steps * config.algorithm.updates_per_rollout
    optimizer, schedule = policy.new_optimizer(model, config.critic, updates)
    host_copies = None
    if config.critic.offload:
        critic_copy = HostCopy(model, optimizer)
        critic_copy.release()
        host_copies = (policy.states, critic_copy)
    return Critic(config.algorithm, model, optimizer, schedule, host_copies)


def vocabulary_size(hf_config: object) -> int:
    """The number of tokens in the vocabulary of a model's language part."""
    text_config = family(hf_config.architectures[0]).text_config(hf_config)  # type: ignore[attr-defined]
    return int(text_config.vocab_size)


def value_targets(
    inputs: AdvantageInputs, loss_mask: torch.Tensor, discount: float, gae_lambda: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The values that the advantages were computed with, and the returns, which are GAE plus these values.

    Both are float64 [R] and 0 for tokens that the loss mask leaves out.
    """
    assert inputs.values is not None
    old_values = inputs.values.double()
    returns = gae(inputs, discount=discount, gae_lambda=gae_lambda) + old_values
    return at_response_tokens(old_values, loss_mask), at_response_tokens(returns, loss_mask)


def value_loss(value_clip: float) -> forward_backward.LossFunction:
    """The critic's loss function: (values [R], micro-batch) → (loss, number of clipped tokens).

    The loss is the weighted sum of the clipped value losses.
    """

    def loss(values: torch.Tensor, batch: MicroBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        old_values = batch.values["old_values"]
        returns = batch.values["returns"]
        weights = batch.values["weights"]
        losses = value_losses.clipped(values, old_values, returns, value_clip=value_clip)
        unclipped = (values.detach() - returns) ** 2 / 2
        clipped = (losses.detach() > unclipped) & (weights > 0)
        return (losses * weights).sum(), {"clipped": clipped.sum()}

    return loss


def explained_variance(values: torch.Tensor, returns: torch.Tensor) -> float:
    """1 − Var(returns − values) / Var(returns).

    It is 1 for a perfect critic and 0 for constant values. Where all returns are equal, the result is 0.
    """
    if len(returns) == 0 or returns.amax() == returns.amin():
        return 0.0
    return float(1 - (returns - values).var(correction=0) / returns.var(correction=0))
