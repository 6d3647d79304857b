"""PPO's critic: a model with a scalar head beside the policy, on the same ranks and in the same layout.

Its value of a response token stands before the token: what is still to come when the tokens before it are known. All
functions take None for the critic of an algorithm that has none.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_ext import checkpoint, forward_backward, hf_checkpoint, scalar_head
from megatron_ext import model as models
from megatron_ext.models import family
from megatron_ext.offload import HostCopy
from megatron_ext.packing import MicroBatch, PackedSequence
from recipes.algorithms import value_losses
from recipes.algorithms.advantages import AdvantageInputs, gae
from recipes.algorithms.registry import requirements
from recipes.errors import ConfigError
from recipes.training.session import Session

NAME = "critic"  # in a checkpoint


@dataclass(frozen=True)
class Critic:
    """``sleeps``: with ``critic.offload`` what is on the host while the critic works, the policy's optimiser and
    gradients, and what is there at other times, all of the critic."""

    model: models.Model
    optimizer: MegatronOptimizer
    schedule: OptimizerParamScheduler
    sleeps: tuple[HostCopy, HostCopy] | None


def build(session: Session, policy: Path, policy_optimizer: MegatronOptimizer) -> Critic | None:
    """Collective: the critic that the algorithm wants, from ``critic.path``, or from the policy's folder.

    From a language model its head begins at zero, and so do all values. Raises ConfigError where the folder's model
    has another vocabulary than the policy's.
    """
    config = session.config
    if not requirements(config.algorithm).values:
        return None
    folder = Path(config.critic.path or policy)
    hf_config = scalar_head.scalar_config(hf_checkpoint.config(folder))
    text, own = (family(c.architectures[0]).text_config(c) for c in (hf_config, session.model.hf_config))
    if text.vocab_size != own.vocab_size:
        raise ConfigError(
            f"critic.path={str(folder)!r}: its vocabulary has {text.vocab_size} tokens, the policy's {own.vocab_size}; "
            "use a model with the policy's tokenizer"
        )
    model = models.build(hf_config, session.parallel, config.precision, config.model.frozen)
    hf_checkpoint.load(model.shards, folder)
    updates = config.algorithm.steps * config.algorithm.updates_per_rollout
    own_optimizer, schedule = session.build_optimizer(config.critic, updates, model)
    sleeps = None
    if config.critic.offload:
        # The policy's weights stay: engines on this host read them in place.
        sleeps = HostCopy(session.model, policy_optimizer, weights=False), HostCopy(model, own_optimizer)
        sleeps[1].release()
    return Critic(model, own_optimizer, schedule, sleeps)


@contextmanager
def awake(critic: Critic) -> Iterator[None]:
    """The critic is on the device within the block."""
    if critic.sleeps is None:
        yield
        return
    policy, own = critic.sleeps
    policy.release()
    own.restore()
    try:
        yield
    finally:
        own.release()
        policy.restore()


def values(session: Session, critic: Critic | None, sequences: list[PackedSequence]) -> torch.Tensor | None:
    """Collective: the values before all response tokens of a rollout, FP32 [tokens], on every rank's host."""
    if critic is None:
        return None
    with awake(critic):
        batches = session.micro_batches(sequences)
        found = forward_backward.values(critic.model, batches)
        return forward_backward.gather_tokens(critic.model, batches, found, sum(len(s.response) for s in sequences))


def train(
    session: Session,
    critic: Critic | None,
    outcomes: AdvantageInputs,
    sequences: list[PackedSequence],
    weights: list[list[float]],
) -> dict[str, float]:
    """Collective: the critic's updates on a rollout, as many as the policy's; returns metrics.

    It learns from every sample that has a reward, those whose advantage is zero too. ``weights`` of the response
    tokens are those of the policy's loss, 0 where a token was forced or its sample not judged: the update depends on
    neither micro-batches nor ranks.
    """
    if critic is None:
        return {}
    algorithm = session.config.algorithm
    given, returns = targets(outcomes, sequences, weights, algorithm.discount, algorithm.gae_lambda)
    counted = torch.tensor([w > 0 for of_sequence in weights for w in of_sequence])
    size = len(sequences) // algorithm.updates_per_rollout
    sums: dict[str, float] = {}
    with awake(critic):
        for i in range(0, len(given), size):
            batches = session.micro_batches(given[i : i + size])
            found = forward_backward.accumulate_gradients(critic.model, batches, loss(algorithm.value_clip))
            if session.update(critic.optimizer, critic.schedule, found, NAME):
                forward_backward.add_metrics(sums, {**found, "updates": 1})
    assert outcomes.values is not None
    if not sums:
        return {}
    return {
        "value/loss": sums["loss"] / sums["updates"],
        "value/grad_norm": sums["grad_norm"] / sums["updates"],
        "value/clipped": sums["clipped"] / max(int(counted.sum()), 1),
        "value/mean": float(outcomes.values.double()[counted].mean()) if counted.any() else 0.0,
        "value/explained_variance": explained_variance(outcomes.values.double()[counted], returns[counted]),
    }


def targets(
    outcomes: AdvantageInputs,
    sequences: list[PackedSequence],
    weights: list[list[float]],
    discount: float,
    gae_lambda: float,
) -> tuple[list[PackedSequence], torch.Tensor]:
    """The sequences with what the value loss needs of each token, and the returns [tokens]: GAE + values."""
    assert outcomes.values is not None
    old = outcomes.values.double()
    returns = gae(outcomes, discount=discount, gae_lambda=gae_lambda) + old
    counts = outcomes.lengths.flatten().tolist()
    of_tokens = zip(sequences, old.split(counts), returns.split(counts), weights, strict=True)
    made = [replace(s, values={"old": o.tolist(), "return": r.tolist(), "weight": w}) for s, o, r, w in of_tokens]
    return made, returns


def loss(value_clip: float) -> forward_backward.LossFunction:
    """(values [R], micro-batch) → (the weighted sum of the clipped value losses, how many tokens of it are clipped)."""

    def of(found: torch.Tensor, batch: MicroBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        old, returns, weight = (batch.values[name] for name in ("old", "return", "weight"))
        losses = value_losses.clipped(found, old, returns, value_clip=value_clip)
        clipped = (losses.detach() > (found.detach() - returns) ** 2 / 2) & (weight > 0)
        return (losses * weight).sum(), {"clipped": clipped.sum()}

    return of


def explained_variance(values: torch.Tensor, returns: torch.Tensor) -> float:
    """1 − Var(returns − values) / Var(returns): 1 for a perfect critic, 0 for a constant; 0 where returns are equal."""
    if len(returns) == 0 or returns.amax() == returns.amin():
        return 0.0
    return float(1 - (returns - values).var(correction=0) / returns.var(correction=0))


def snapshot(critic: Critic | None) -> dict[str, checkpoint.Snapshot]:
    """Collective: what a checkpoint has of it beside the policy."""
    if critic is None:
        return {}
    with awake(critic):
        return {NAME: checkpoint.snapshot(critic.model, critic.optimizer, critic.schedule)}


def load(critic: Critic | None, folder: Path) -> None:
    """Collective: restore it from a checkpoint, bit for bit. Raises ConfigError on one of a run without a critic."""
    if critic is None:
        return
    if NAME not in checkpoint.progress(folder)["models"]:
        raise ConfigError(f"{folder}: holds no critic: resume with the algorithm the run began with, or start anew")
    with awake(critic):
        checkpoint.read(folder, NAME, critic.model, critic.optimizer, critic.schedule, rng=False)
