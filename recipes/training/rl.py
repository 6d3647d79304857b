"""The RL loop: generate, score, advantages, update, sync.

Every RL stage uses this loop, whatever its algorithm and its model.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_ext import batch as batches
from megatron_ext import checkpoint, forward_backward
from megatron_ext.batch import Array, TokenBatch
from megatron_ext.checkpoint import POLICY
from megatron_ext.micro_batches import Joined, MicroBatches
from megatron_ext.routing import everywhere, holders
from recipes.algorithms import mismatch, objective
from recipes.algorithms.advantages import AdvantageInputs, at_response_tokens, sample_inputs, trained_inputs
from recipes.algorithms.aggregation import token_weights
from recipes.algorithms.registry import reference_interval, requirements, resolve
from recipes.algorithms.shaping import has_reward_variance, overlong_penalty, select_groups
from recipes.config import Config
from recipes.data.processor import ProcessedPrompt, PromptProcessor
from recipes.data.row_order import Curriculum, curriculum_phases, scheduled
from recipes.data.rows import Row, load_rows
from recipes.data.shared_processing import process
from recipes.data.sources import RowsById
from recipes.evaluation import rates
from recipes.run import records
from recipes.run.run import Run, TrainingState, read_responses
from recipes.run.sample_files import SampleWriter
from recipes.training.critic import Critic, build_critic
from recipes.training.flops import training_flops
from recipes.training.policy import Policy
from recipes.training.rollouts import Rollouts
from recipes.training.setup import Training
from rewards import mixing, objectives
from rewards.verdict import VerifierResult, from_json, or_nan
from rewards.verifiers import search
from rollout.generation import OnResponse
from rollout.prompt_buffer import PromptBuffer, Rollout

# Every row of metrics.jsonl has these keys. Their values are None where the step made no update.
POLICY_METRICS = (
    "kl/old",
    "entropy",
    "perplexity/policy",
    "perplexity/sampler",
    f"{mismatch.NAME}/mean",
    f"{mismatch.NAME}/max",
    "loss",
    "grad_norm",
)


@dataclass
class Loop:
    """The state that the steps of the loop share."""

    config: Config
    policy: Policy
    # None for an algorithm without values.
    critic: Critic | None
    rollouts: Rollouts
    run: Run
    # The rows of the data, by id.
    rows: Mapping[str, Row]
    # Gives the phase that a draw belongs to.
    curriculum: Curriculum
    # Number of steps from one pass under the reference to the next. None without a reference.
    reference_every: int | None
    buffer: PromptBuffer
    rollout: Rollout
    # Returns the verdicts on a batch of one response.
    judge: OnResponse
    # The state of the Lagrange multiplier (rewards.objectives).
    constraint: dict[str, Any]
    # Writes the responses to files.
    samples: SampleWriter

    @property
    def ahead(self) -> bool:
        """Whether the engines generate the next step's responses while the trainer works on this step's.

        Those responses come from weights that are one update older (``rollout.staleness``).
        """
        return self.config.rollout.staleness > 0

    @property
    def in_flight(self) -> bool:
        """Whether the engines receive an update's weights while they generate (``rollout.in_flight_updates``)."""
        return self.config.rollout.in_flight_updates

    def uses_reference(self, step: int) -> bool:
        """Whether this step makes a pass under the reference."""
        return self.reference_every is not None and (step + 1) % self.reference_every == 0


def fit(training: Training, run: Run, reference: Path) -> None:
    """Train the policy until it has made ``algorithm.steps`` steps.

    Training resumes from the newest checkpoint where there is one. ``run`` stores the records and checkpoints.
    ``reference`` is the Hugging Face folder of the reference policy, to which the KL penalty is computed.
    """
    config = training.config
    policy = training.policy
    loop = prepare(training, run, reference)
    checkpoints, newest = run.open_checkpoints()
    first_step = resume(loop, newest) if newest else 0
    run.begin(first_step)
    last_step = config.algorithm.steps
    generating = False  # whether this step's responses are under way already

    for step in range(first_step, last_step):
        checkpoints.check()
        if not generating:
            placed_bytes = sync(loop, step)
        generated_ahead = generating
        batch, all_rounds = generate(loop, step, generated_ahead)
        generating = loop.ahead and step + 1 < last_step
        if generating:
            if not (loop.in_flight and loop.rollouts.version == step):
                placed_bytes = sync(loop, step)
            start(loop, step + 1, 0)

        batch, score_metrics = score(loop, batch, all_rounds)
        batch, inputs = compute_advantages(loop, batch)
        update_metrics = update(loop, step, batch, inputs)
        # A sync restarts an engine that has died. No request may reach the engine before that sync has ended.
        if generating and loop.in_flight and loop.rollouts.engines_alive():
            placed_bytes = sync(loop, step + 1)

        metrics = {
            "step": step + 1,
            **score_metrics,
            **update_metrics,
            **generation_metrics(loop, step, batch),
            records.TOKENS_PER_SECOND: None if generated_ahead else generation_speed(loop, all_rounds),
            "sync/bytes": placed_bytes,
            "skipped_updates": policy.guard.take_skipped(),
        }
        record(loop, metrics, batch)
        checkpoints.after_step(step + 1, last_step, partial(training_state, loop))

    loop.samples.wait()
    checkpoints.wait()
    loop.rollouts.sync_weights(last_step)


# Before the first step


def prepare(training: Training, run: Run, reference: Path) -> Loop:
    """Collective: prepare what the steps share.

    Builds the optimiser, the critic where the algorithm needs values, and loads the reference where a step uses it.
    """
    config = training.config
    policy = training.policy
    rollouts = training.rollouts
    assert rollouts is not None  # recipes.config.generates
    algorithm = config.algorithm
    needs = requirements(algorithm)
    # The policy makes no update while a critic warms up.
    warmup = config.critic.warmup_steps if needs.values else 0
    policy.build_optimizer(algorithm, (algorithm.steps - warmup) * algorithm.updates_per_rollout)
    critic = build_critic(config, policy, reference) if needs.values else None
    reference_every = reference_interval(algorithm)
    if reference_every is not None:
        policy.load_reference(reference)
    rows = load_rows(config.data.prompts)
    by_id = RowsById(rows)
    curriculum = Curriculum(curriculum_phases(config.data))
    buffer = PromptBuffer(
        partial(draw_prompts, config, training.processor, rows, curriculum=curriculum, group=rollouts.control),
        rollouts.sampling(config.rollout.temperature, config.rollout.partial_rollout_tokens),
        prompts_per_step=algorithm.prompts_per_step,
        oversample=config.rollout.oversample,
        samples_per_prompt=algorithm.samples_per_prompt,
        seed=config.seed,
    )
    judge = partial(judge_response, config, rollouts, by_id)
    # Judges that share the GPUs with the engines judge only after all responses have been generated.
    on_response = None if rollouts.judges_share_gpus else judge
    return Loop(
        config=config,
        policy=policy,
        critic=critic,
        rollouts=rollouts,
        run=run,
        rows=by_id,
        curriculum=curriculum,
        reference_every=reference_every,
        buffer=buffer,
        rollout=Rollout(buffer, rollouts.fleet, rollouts.control, on_response),
        judge=judge,
        constraint=objectives.initial_state(config.rewards.constraint),
        samples=SampleWriter(run.folder, run.rank),
    )


def draw_prompts(
    config: Config,
    processor: PromptProcessor,
    rows: Sequence[Row],
    draw: int,
    *,
    curriculum: Curriculum,
    group: dist.ProcessGroup,
) -> list[ProcessedPrompt]:
    """Collective over a gloo group: the prompts of the run's ``draw``-th draw."""
    batch = scheduled(rows, curriculum.of_draws(), draw, config.algorithm.prompts_per_step, config.seed)
    return process(processor, batch, config.precision.dtype, group)


def resume(loop: Loop, folder: Path) -> int:
    """Collective: restore the loop from a checkpoint and return the number of steps that the checkpoint has finished.

    Raises ValueError for a checkpoint of another version, whose progress.json lacks an entry.
    """
    progress = checkpoint.progress(folder)
    missing = {"curriculum", "prompt_buffer", "constraint"} - progress.keys()
    if missing:
        raise ValueError(
            f"{folder}: progress.json has no {', '.join(sorted(missing))}: another version wrote this checkpoint. "
            "Resume with that version, or begin a new run from its exported weights"
        )
    finished = loop.policy.load(folder)
    if loop.critic is not None:
        loop.critic.load(folder)
    prompt_buffer = progress["prompt_buffer"]
    # buffer.load draws the prompts in flight again and needs the curriculum for this.
    loop.curriculum.resume(progress["curriculum"], finished, prompt_buffer["draws"])
    loop.buffer.load(prompt_buffer, read_responses(folder))
    loop.constraint = progress["constraint"]
    return finished


def training_state(loop: Loop) -> TrainingState:
    """Collective: the content of a checkpoint.

    First waits until the sample files of the steps so far are written, so that they exist before the checkpoint is
    complete.
    """
    loop.samples.wait()
    models = {POLICY: loop.policy.snapshot()}
    if loop.critic is not None:
        models |= loop.critic.snapshot()
    in_flight, responses = loop.buffer.state()
    progress = {
        **loop.policy.progress(),
        "curriculum": loop.curriculum.state(),
        "prompt_buffer": in_flight,
        "constraint": loop.constraint,
    }
    return TrainingState(models, progress, responses)


# Sync and generate


def sync(loop: Loop, step: int) -> int:
    """Collective: send the policy's weights to the engines and return the number of bytes placed."""
    with loop.run.phase("sync"):
        return loop.rollouts.sync_weights(step)


def start(loop: Loop, step: int, round_number: int) -> None:
    """Collective: have the engines begin a round of prompts of a step.

    Rounds are numbered from 0. A step has up to ``algorithm.max_generation_batches`` of them.
    """
    loop.curriculum.reach(step, loop.buffer.draws)
    loop.rollout.start(step * loop.config.algorithm.max_generation_batches + round_number)


def generate(loop: Loop, step: int, started: bool) -> tuple[TokenBatch, TokenBatch]:
    """Collective: generate and judge the responses of a step.

    Returns two batches, both with verdicts and rewards. The first has the groups that the step trains on. The second
    has the responses of all rounds, from which these groups were chosen, without tokens and vision inputs.
    ``started`` says that the engines are generating already. Afterwards the engines sleep (``rollout.sleep``).

    With dynamic sampling (``algorithm.max_generation_batches`` above 1) the engines generate further rounds of prompts
    until enough groups have differing rewards. If all rounds together give too few such groups, other groups fill up
    the step.
    """
    algorithm = loop.config.algorithm
    rounds: list[TokenBatch] = []
    for round_number in range(algorithm.max_generation_batches):
        # Verifiers judge each response while others are being generated.
        with loop.run.phase("generate"):
            if rounds or not started:
                loop.rollouts.wake()
                start(loop, step, round_number)
            batch = loop.rollout.collect(partial(loop.rollouts.sync_weights, step))
        if loop.rollouts.judges_share_gpus:
            with loop.run.phase("judge"):
                batch = loop.rollouts.judge_together(batch, loop.judge)
        rounds.append(replace(batch, rewards=mix_rewards(loop, batch)))
        rewards = by_group(np.concatenate([done.rewards for done in rounds]), algorithm.samples_per_prompt)
        if int(has_reward_variance(rewards).sum()) >= algorithm.prompts_per_step:
            break
    # The next sync wakes the engines.
    with loop.run.phase("sync"):
        loop.rollouts.sleep()
    groups = select_groups(rewards, algorithm.prompts_per_step)
    all_rounds = batches.concatenate([replace(done.without_tokens(), vision=None) for done in rounds])
    return join_rounds(rounds, groups, algorithm.samples_per_prompt), all_rounds


def join_rounds(rounds: Sequence[TokenBatch], groups: Sequence[int], samples_per_prompt: int) -> TokenBatch:
    """The chosen groups of all rounds as one batch. ``groups`` are indices over the groups of all rounds."""
    batch = batches.concatenate(rounds)
    number = np.repeat(np.arange(len(batch) // samples_per_prompt, dtype=np.int32), samples_per_prompt)
    batch = replace(batch, group_index=number)
    return batch.select(np.flatnonzero(np.isin(number, groups)))


def by_group(per_response: Array, samples_per_prompt: int) -> torch.Tensor:
    """Reshape [S] to [prompts, samples]. A batch stores its groups one after another."""
    return torch.from_numpy(per_response.reshape(-1, samples_per_prompt))


def judge_response(config: Config, rollouts: Rollouts, rows: Mapping[str, Row], response: TokenBatch) -> dict[str, Any]:
    """The verdicts on a batch of one response, by the verifiers of its row's label. Called from several threads."""
    row = rows[response.prompt(0).prompt_id]
    return rollouts.judge(row, response, list(mixing.label_weights(row, config.rewards.mix)))


# Score


def mix_rewards(loop: Loop, batch: TokenBatch) -> Array:
    """float64 [S]: the reward of each response, computed by the reward mix of its row.

    NaN where a verifier with a weight failed.
    """
    rewarding = loop.config.rewards
    samples = loop.config.algorithm.samples_per_prompt
    rewards: list[float] = []
    for first in range(0, len(batch), samples):
        row = loop.rows[batch.prompt(first).prompt_id]
        judged = [results_of(verdicts) for verdicts in batch.verdicts[first : first + samples]]
        weights = objectives.constrained_weights(
            mixing.label_weights(row, rewarding.mix), rewarding.constraint, loop.constraint
        )
        mixed = objectives.group_rewards(judged, weights, rewarding.normalise, rewarding.gate)
        rewards += map(or_nan, mixed)
    return np.array(rewards, np.float64)


def results_of(verdicts: Mapping[str, Any]) -> dict[str, VerifierResult]:
    """The verdicts on a response, parsed from JSON."""
    return {name: from_json(verdict) for name, verdict in verdicts.items()}


def score(loop: Loop, batch: TokenBatch, all_rounds: TokenBatch) -> tuple[TokenBatch, dict[str, Any]]:
    """Collective: compute the reward metrics and update the constraint's multiplier.

    Returns the batch, whose loss mask is now False for responses without a reward, and the metrics.

    The metrics of rewards and verdicts and the multiplier are computed from ``all_rounds``. Dynamic sampling selects
    the groups of ``batch`` by their rewards, so means over ``batch`` would be biased.

    Raises RuntimeError where more verdicts failed than ``rewards.client.max_failed`` allows.
    """
    server_counts = loop.rollouts.server_counts()
    # No rank waits for another in this phase, so a rank that is slow here is reported.
    with loop.run.phase("reward"):
        rewarding = loop.config.rewards
        judged = [results_of(verdicts) for verdicts in all_rounds.verdicts]
        failures = mixing.failures(judged, [row_id for row_id, _ in all_rounds.keys])
        for line in map(str, failures[: mixing.SHOWN]):
            loop.run.log(line)
        failed = mixing.failed_share(judged, failures, rewarding.client.max_failed)
        loop.constraint = objectives.next_state(loop.constraint, rewarding.constraint, judged)
        multiplier = loop.constraint["multiplier"]
        metrics = {
            "reward/mean": float(torch.from_numpy(all_rounds.rewards).nanmean()),
            "reward_failed": failed,
            **server_counts,
            "constraint/multiplier": multiplier,
            **{f"reward/{name}": mean for name, mean in mixing.verifier_means(judged).items()},
            **search.metrics(judged, multiplier),
            **rates.metrics(judged, kinds_of(loop, all_rounds)),
            "forced_tokens": int((batch.response_lengths - batch.trained_lengths).sum()),
        }
        return batch.without_loss(np.isnan(batch.rewards)), metrics


def kinds_of(loop: Loop, batch: TokenBatch) -> list[str]:
    """[S]: the kind of each response's row. Each row is read once."""
    kinds = [loop.rows[prompt.prompt_id]["kind"] for prompt in batch.prompts]
    return [kinds[prompt] for prompt in batch.prompt_index]


# Advantages


def compute_advantages(loop: Loop, batch: TokenBatch) -> tuple[TokenBatch, AdvantageInputs]:
    """Collective: compute the advantages and the aggregation weights of a batch.

    Returns the batch with the columns ``advantages`` and ``weights``, which are 0 where the loss mask is False, and
    the inputs that the advantages were computed from. With the KL in the reward, the batch also has the columns that
    :func:`kl_rewards` adds.

    Per-sample advantages need no tokens. Per-token advantages are computed on every rank, and each rank then holds the
    tokens of the full batch.
    """
    algorithm = loop.config.algorithm
    samples = algorithm.samples_per_prompt
    with loop.run.phase("logprobs"):
        lengths = by_group(batch.response_lengths, samples)
        penalty = overlong_penalty(
            lengths,
            longest=loop.config.rollout.max_response_tokens,
            overlong_fraction=algorithm.overlong_fraction,
        )
        rewards = by_group(batch.rewards, samples) + penalty
        kl_is_reward = algorithm.kl_in == "reward" and algorithm.kl_coefficient > 0
        if kl_is_reward or loop.critic is not None:
            batch = everywhere(batch, loop.rollouts.control)
            token_rewards = torch.zeros(len(batch.response_tokens), dtype=torch.float64)
            if kl_is_reward:
                batch, token_rewards = kl_rewards(loop, batch)
            inputs = trained_inputs(
                rewards=rewards,
                response_lengths=lengths,
                loss_mask=torch.from_numpy(batch.loss_mask),
                token_rewards=token_rewards,
                values=None if loop.critic is None else loop.critic.values(loop.policy, batch),
            )
        else:
            inputs = sample_inputs(rewards, by_group(batch.trained_lengths, samples))
        advantage = resolve("advantage", algorithm)
        aggregation = resolve("aggregation", algorithm)
        updates = split(batch, algorithm.updates_per_rollout)
        weights = np.concatenate([token_weights(aggregation, part) for part in updates])
        batch = batch.with_response_columns(weights=weights)
        advantages = advantage(inputs)
        is_constrained = loop.config.rewards.constraint.verifier is not None
        if advantages.dim() == 2:
            of_responses = advantages.flatten().numpy()
            if is_constrained:
                of_responses = of_responses * constraint_scale(loop, batch)
            return batch.with_response_columns(advantages=of_responses), inputs
        batch = everywhere(batch, loop.rollouts.control)
        of_tokens = at_response_tokens(advantages, torch.from_numpy(batch.loss_mask)).numpy()
        if is_constrained:
            of_tokens = of_tokens * batch.broadcast(constraint_scale(loop, batch))
        return batch.with_columns(advantages=of_tokens), inputs


def constraint_scale(loop: Loop, batch: TokenBatch) -> Array:
    """float64 [S]: the factor by which the constraint scales each response's advantages. The mean factor is 1."""
    rewarding = loop.config.rewards
    mixes = [mixing.label_weights(loop.rows[prompt.prompt_id], rewarding.mix) for prompt in batch.prompts]
    of_prompts = [objectives.advantage_scale(weights, rewarding.constraint, loop.constraint) for weights in mixes]
    scale = np.array(of_prompts)[batch.prompt_index]
    return scale / scale.mean()


def kl_rewards(loop: Loop, batch: TokenBatch) -> tuple[TokenBatch, torch.Tensor]:
    """Collective: compute the KL penalty of each response token.

    Returns the batch with the log-probs that the updates need again, and the token rewards, which are
    −``kl_coefficient`` × KL, float64 [R]. The log-probs are the columns ``reference`` and, where a rollout makes
    several updates, ``old``.
    """
    algorithm = loop.config.algorithm
    total = len(batch.response_tokens)
    micro_batches = loop.policy.micro_batches(batch)
    log_probs = loop.policy.all_log_probs(micro_batches, total)
    with loop.policy.reference_weights():
        reference = loop.policy.all_log_probs(micro_batches, total)
    kl = resolve("kl_estimator", algorithm)(log_probs, reference)
    batch = batch.with_columns(reference=reference.numpy())
    if algorithm.updates_per_rollout > 1:
        batch = batch.with_columns(old=log_probs.numpy())
    return batch, -algorithm.kl_coefficient * kl.double()


def split(batch: TokenBatch, updates: int) -> list[TokenBatch]:
    """Split the responses of a batch into equal parts, one for each update of the rollout."""
    size = len(batch) // updates
    if updates == 1:
        return [batch]
    return [batch.select(range(first, first + size)) for first in range(0, len(batch), size)]


# Update


def update(loop: Loop, step: int, batch: TokenBatch, inputs: AdvantageInputs) -> dict[str, Any]:
    """Collective: make the updates of the policy and the critic on a rollout, and return their metrics."""
    policy = loop.policy
    with loop.run.phase("logprobs"):
        updates, micro_batches_of_updates = pack_updates(loop, batch)
        add_log_probs(loop, step, micro_batches_of_updates)
    with loop.run.phase("train"):
        policy.restore_states()
        sums: dict[str, float] = {}
        for micro_batches in micro_batches_of_updates:
            forward_backward.add_metrics(sums, policy_update(loop, step, micro_batches))
        critic_metrics = {} if loop.critic is None else loop.critic.train(policy, batch, inputs)
    loop.run.count(flops=sum(training_flops(policy.model, part) for part in updates))
    if loop.critic is not None:
        loop.run.count(flops=training_flops(loop.critic.model, batch))
    trained = {"trained_samples": sum(map(len, updates))}
    return {**policy_metrics(sums, loop.uses_reference(step)), **critic_metrics, **trained}


def pack_updates(loop: Loop, batch: TokenBatch) -> tuple[list[TokenBatch], list[MicroBatches]]:
    """Collective: the responses of each update of a rollout, and this rank's micro-batches of each update."""
    algorithm = loop.config.algorithm
    parts = split(batch, algorithm.updates_per_rollout)
    updates = [contributing(part, algorithm.skip_zero_advantage, loop.policy) for part in parts]
    return updates, [loop.policy.micro_batches_of_own(part, loop.rollouts.control) for part in updates]


def contributing(batch: TokenBatch, skip_zero_advantage: bool, policy: Policy) -> TokenBatch:
    """The responses that an update trains on. Their aggregation weights stay those of the full update.

    A response whose advantages are 0 (a group of equal rewards) gives no policy gradient. Leaving it out saves its
    forward and backward pass and drops only its KL term. Some of these responses are kept where the others are too few
    to be distributed over all ranks.
    """
    if not skip_zero_advantage:
        return batch
    if "advantages" in batch.columns:
        responses = batch.broadcast(np.arange(len(batch)))
        nonzero = np.bincount(responses, batch.columns["advantages"] != 0, minlength=len(batch)) > 0
    else:
        nonzero = (batch.response_columns["advantages"] != 0) & (batch.trained_lengths > 0)
    nonzero_first = np.argsort(~nonzero, kind="stable")
    count = policy.divisible_prefix(batch.lengths[nonzero_first], max(1, int(nonzero.sum())))
    return batch.select(nonzero_first[:count])


def add_log_probs(loop: Loop, step: int, micro_batches_of_updates: Sequence[MicroBatches]) -> None:
    """Collective: add the log-probs that the updates of a step need to their micro-batches.

    These are the log-probs under the reference, where this step uses it, and those under the present weights as the
    old policy's, where the rollout makes several updates. Each takes one forward pass over the micro-batches of all
    updates. With the KL in the reward, :func:`kl_rewards` has computed them already.
    """
    micro_batches = Joined(micro_batches_of_updates)
    if loop.uses_reference(step) and not micro_batches.has("reference"):
        with loop.policy.reference_weights():
            loop.policy.add_log_probs(micro_batches, "reference")
    if len(micro_batches_of_updates) > 1 and not micro_batches.has("old"):
        loop.policy.add_log_probs(micro_batches, "old")


def policy_update(loop: Loop, step: int, micro_batches: MicroBatches) -> dict[str, float]:
    """Collective: make one update of the policy and return the sums of its metrics.

    The sums are empty where the update was skipped because its loss or gradient norm is not finite. While a critic
    warms up, the sums are returned but the gradients are not applied.

    Raises RuntimeError where the engines did not sample from the trainer's weights (``algorithm.max_mismatch``).
    """
    algorithm = loop.config.algorithm
    policy = loop.policy
    metrics = forward_backward.accumulate_gradients(
        policy.model,
        micro_batches,
        objective.loss(algorithm, policy.parallel.context_group),
        policy.temperature,
        entropies="trained" if algorithm.entropy_coefficient > 0 else "measured",
    )
    measured = mismatch.report(metrics)  # empty where no token is trained on
    # A loss that is not finite makes no update, so its mismatch is not checked.
    if measured and math.isfinite(metrics["loss"]):
        mismatch.check(measured, max_mismatch=algorithm.max_mismatch)
    if loop.critic is not None and step < loop.config.critic.warmup_steps:
        policy.skip_update(metrics)
    elif not policy.update(metrics):
        return {}
    return {**metrics, "updates": 1}


# Metrics and records


def policy_metrics(sums: Mapping[str, float], with_reference: bool) -> dict[str, float | None]:
    """The metrics of a step's updates, as means over the updates or over the tokens that they trained on.

    The values are None where all updates were skipped. ``with_reference`` says whether the step made a pass under the
    reference.
    """
    names = [*POLICY_METRICS, "kl/reference"] if with_reference else POLICY_METRICS
    without_value = dict.fromkeys(names)
    if not sums:
        return without_value
    return {
        **without_value,
        **objective.report(sums),
        "loss": sums["loss"] / sums["updates"],
        "grad_norm": sums["grad_norm"] / sums["updates"],
    }


def generation_metrics(loop: Loop, step: int, batch: TokenBatch) -> dict[str, Any]:
    """The metrics of response lengths, of the share of tokens that are not trained on, and of staleness."""
    tokens = int(batch.response_lengths.sum())
    return {
        "response_length/mean": tokens / len(batch),
        "masked_fraction": float(1 - batch.trained_lengths.sum() / tokens),
        "staleness/max": step - int(batch.versions.min()),
        "staleness/mean": float(np.average(step - batch.versions, weights=batch.version_lengths)),
    }


def generation_speed(loop: Loop, all_rounds: TokenBatch) -> float:
    """Response tokens per second of a step whose rounds all began in its own "generate" phase.

    Where the engines began earlier, the time at which the last of them ended is unknown.
    """
    return int(all_rounds.response_lengths.sum()) / loop.run.clock.seconds["generate"]


def record(loop: Loop, metrics: dict[str, Any], batch: TokenBatch) -> None:
    """Collective: write the metrics and the responses of a step, and restart the clock.

    Rank 0 writes the metrics and shows them. On each rank that holds responses, a thread writes these.
    """
    of_this_rank = np.flatnonzero(holders(batch, loop.rollouts.control) == loop.run.rank)
    if len(of_this_rank):
        loop.samples.write(metrics["step"], partial(sample_lines, loop, metrics["step"], batch, of_this_rank))
    loop.run.count(tokens=int(batch.lengths.sum()))
    row = loop.run.record(metrics)
    if loop.run.rank == 0:
        loop.run.display.step(row, loop.config.algorithm.steps)


def sample_lines(loop: Loop, step: int, batch: TokenBatch, chosen: Array) -> Iterator[dict[str, Any]]:
    """The chosen responses as rows of the sample files. This rank holds their tokens."""
    keys = batch.keys
    for i in chosen.tolist():
        prompt_id, sample_index = keys[i]
        reward = float(batch.rewards[i])
        yield {
            "step": step,
            "prompt_id": prompt_id,
            "sample_index": sample_index,
            "prompt": loop.rows[prompt_id]["prompt"],
            "response": loop.rollouts.text(batch, i),
            "tokens": int(batch.response_lengths[i]),
            "reward": None if math.isnan(reward) else reward,
            "verdicts": batch.verdicts[i],
            "advantage": mean_advantage(batch, i),
            "weight_version": int(batch.versions[batch.runs_of(i)][-1]),
        }


def mean_advantage(batch: TokenBatch, i: int) -> float:
    """The mean advantage of the trained tokens of response i; 0 where it has none."""
    if batch.trained_lengths[i] == 0:
        return 0.0
    if "advantages" in batch.response_columns:
        return float(batch.response_columns["advantages"][i])
    tokens = batch.tokens_of(i)
    trained = batch.columns["advantages"][tokens][batch.loss_mask[tokens]]
    return float(trained.mean(dtype=np.float64))
