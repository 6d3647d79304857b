"""The RL loop. It reads as the algorithm; its parts are in rollout/, rewards/, recipes/algorithms/, megatron_ext/."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from megatron_ext import checkpoint, forward_backward, optimizer
from megatron_ext.packing import MicroBatch, PackedSequence, VisionInputs
from recipes.algorithms import mismatch, objective
from recipes.algorithms.advantages import AdvantageInputs, broadcast_to_tokens
from recipes.algorithms.registry import requirements, resolve
from recipes.algorithms.shaping import has_reward_variance, overlong_penalty, select_groups
from recipes.data.processor import ProcessedPrompt
from recipes.data.row_order import curriculum_phases, scheduled
from recipes.data.rows import Row, load_rows
from recipes.data.sources import RowsById
from recipes.run import records
from recipes.training import critic as critics
from recipes.training.session import Session
from rewards import mixing, objectives
from rewards.verdict import VerifierResult, from_json, or_nan, to_json
from rewards.verifiers import search
from rollout import prompt_buffer as prompt_buffers
from rollout.prompt_buffer import PromptBuffer, Rollout
from rollout.sample import Sample


@dataclass(frozen=True)
class Group:
    """A prompt and what was made of it: its responses, what the verifiers say of each, and its reward, NaN where one of
    them failed."""

    row: Row
    vision: VisionInputs | None
    samples: list[Sample]
    judged: list[dict[str, VerifierResult]]
    rewards: list[float]


def fit(session: Session, reference: Path) -> None:
    """Prompts → rollout → rewards → advantages → Megatron steps → weight bridge → rollout, ``algorithm.steps`` times.

    ``reference`` is the Hugging Face folder of the policy that the KL penalty refers to. Where the run has a
    checkpoint, the loop goes on behind the newest. With ``rollout.staleness`` the next step's samples are made, by
    weights one update older, while the trainer works on this one's.
    """
    config, model, algorithm = session.config, session.model, session.config.algorithm
    rows = load_rows(config.data.prompts)
    advantage, aggregation = resolve("advantage", algorithm), resolve("aggregation", algorithm)
    loss = objective.loss(algorithm, session.parallel.context_group)
    needs = requirements(algorithm)
    warmup = config.critic.warmup_steps if needs.values else 0  # steps in which the policy stays as it is
    optim, schedule = session.build_optimizer(algorithm, (algorithm.steps - warmup) * algorithm.updates_per_rollout)
    critic = critics.build(session, reference, optim)  # None where the advantages need none
    reference_weights = forward_backward.load_weights(model, reference) if needs.reference else None
    done, ahead = 0, config.rollout.staleness
    by_id = RowsById(rows)
    pool, constraint = make_pool(session, rows), objectives.initial_state(config.rewards.constraint)
    saver, newest = session.open_checkpoints()
    if newest:
        done = checkpoint.load(newest, model, optim, schedule)
        critics.load(critic, newest)
        progress = checkpoint.progress(newest)
        pool.load(progress["pool"])
        constraint = progress["constraint"]
    session.truncate_records(done)
    streamed = None if session.judges_sleep else partial(judge, session, by_id)
    rollout = Rollout(pool, session.fleet, session.control, streamed)

    for step in range(done, algorithm.steps):
        saver.check()
        if not ahead or step == done:
            with session.phase("sync"):
                sync_bytes = session.sync_weights(step)
        groups = collect(session, rollout, by_id, constraint, step, started=ahead > 0 and step > done)
        if ahead and step + 1 < algorithm.steps:
            with session.phase("sync"):
                sync_bytes = session.sync_weights(step)
            rollout.start((step + 1) * algorithm.max_generation_batches)

        with session.phase("reward"):
            samples, judged = [s for g in groups for s in g.samples], [j for g in groups for j in g.judged]
            lengths = torch.tensor([[len(s.response_token_ids) for s in g.samples] for g in groups])
            failed = mixing.failed_share(judged, config.rewards.client.max_failed)
            constraint = objectives.next_state(constraint, config.rewards.constraint, judged)
            rewards = torch.tensor([g.rewards for g in groups], dtype=torch.float64)
            longest = config.rollout.max_response_tokens
            shaped = rewards + overlong_penalty(lengths, longest=longest, overlong_fraction=algorithm.overlong_fraction)

        with session.phase("logprobs"):
            sequences = [packed(s, g.vision) for g in groups for s in g.samples]
            penalties = kl_rewards(session, sequences, reference_weights)
            outcomes = AdvantageInputs(shaped, lengths, penalties, critics.values(session, critic, sequences))
            advantages = broadcast_to_tokens(advantage(outcomes), lengths)
            size = len(samples) // algorithm.updates_per_rollout
            shares = [slice(i, i + size) for i in range(0, len(samples), size)]
            weights = [token_weights(aggregation, sequences[s], rewards.flatten()[s].tolist()) for s in shares]
            skip = algorithm.skip_zero_advantage
            chosen = [
                contributing(sequences[s], advantages[s], weighing, skip, session.enough)
                for s, weighing in zip(shares, weights, strict=True)
            ]
            updates = [session.micro_batches(sequences) for sequences in chosen]
            for micro_batches in updates:
                if reference_weights is not None:
                    with forward_backward.swapped_weights(model, reference_weights):
                        add_log_probs(session, micro_batches, "reference")
                if len(updates) > 1:
                    add_log_probs(session, micro_batches, "old")

        sums: dict[str, float] = {}
        with session.phase("train"):
            session.restore_states()
            for micro_batches in updates:
                found = forward_backward.accumulate_gradients(
                    model, micro_batches, loss, config.rollout.temperature, algorithm.entropy_coefficient > 0
                )
                if math.isfinite(found["loss"]):  # else there is no update
                    mismatch.check(mismatch.report(found), max_mismatch=algorithm.max_mismatch)
                if step < warmup:
                    found["grad_norm"] = optimizer.skip(optim)
                elif not session.update(optim, schedule, found):
                    continue
                forward_backward.add_metrics(sums, {**found, "updates": 1})
            value_metrics = critics.train(session, critic, outcomes, sequences, list(chain(*weights)))

        metrics = {
            "step": step + 1,
            "reward/mean": float(rewards.nanmean()),
            "reward_failed": failed,
            **session.server_counts(),
            "constraint/multiplier": constraint["multiplier"],
            **{f"reward/{name}": score for name, score in mixing.verifier_means(judged).items()},
            **search.metrics(judged, constraint["multiplier"]),
            **of_updates(sums),
            **value_metrics,
            "trained_samples": sum(map(len, chosen)),
            "response_length/mean": float(lengths.double().mean()),
            "staleness/max": step - min(version for s in samples for version in s.weight_versions),
            "forced_tokens": sum(len(s.forced) for s in samples),
            records.TOKENS_PER_SECOND: int(lengths.sum()) / session.seconds["generate"],
            "sync/bytes": sync_bytes,
        }
        record(session, metrics, groups, advantages)
        if session.saves(step + 1, algorithm.steps):
            with session.phase("checkpoint"):  # behind the step's record; its time shows in the next one
                models = {checkpoint.POLICY: checkpoint.snapshot(model, optim, schedule), **critics.snapshot(critic)}
                saver.save(step + 1, models, {**session.progress(), "pool": pool.to_json(), "constraint": constraint})
            session.saved(saver, step + 1)
    saver.wait()
    session.sync_weights(algorithm.steps)


def make_pool(session: Session, rows: Sequence[Row]) -> PromptBuffer:
    """The prompts of the data's successive steps, and how many of them are in flight."""
    c = session.config

    def draw(step: int) -> list[ProcessedPrompt]:
        batch = scheduled(rows, curriculum_phases(c.data), step, c.algorithm.prompts_per_step, c.seed)
        return [session.prompts(row) for row in batch]

    return PromptBuffer(
        draw,
        session.sampling(c.rollout.temperature, c.rollout.partial_rollout_tokens),
        wanted=c.algorithm.prompts_per_step,
        oversample=c.rollout.oversample,
        samples_per_prompt=c.algorithm.samples_per_prompt,
        seed=c.seed,
    )


def judge(session: Session, rows: Mapping[str, Row], sample: Sample) -> dict[str, Any]:
    """What the verifiers of its label say of a sample, as JSON; runs beside the engines in several threads."""
    row = rows[sample.prompt_id]
    return session.judge(row, sample, list(mixing.label_weights(row, session.config.rewards.mix)))


def judge_groups(session: Session, rows: Mapping[str, Row], groups: Sequence[prompt_buffers.RolloutGroup]) -> None:
    """Collective: set the groups' results when the engines have made all of them and sleep."""
    indices = range(session.config.algorithm.samples_per_prompt)
    samples = [group.samples[i] for group in groups for i in indices]
    results = iter(session.judge_together(samples, partial(judge, session, rows)))
    for group in groups:
        group.results = {i: next(results) for i in indices}


def collect(
    session: Session,
    rollout: Rollout,
    rows: Mapping[str, Row],
    constraint: dict[str, Any],
    step: int,
    started: bool,
) -> list[Group]:
    """The step's groups, generated and judged; ``constraint``: the multiplier's state; ``started``: the engines are at
    it already, and behind it they sleep. Collective.

    Dynamic sampling (``algorithm.max_generation_batches`` above 1): further prompts are asked until enough groups have
    differing rewards; where the rounds do not give as many, others fill up.
    """
    algorithm, rewarding = session.config.algorithm, session.config.rewards
    indices = range(algorithm.samples_per_prompt)
    groups: list[Group] = []
    for draw in range(step * algorithm.max_generation_batches, (step + 1) * algorithm.max_generation_batches):
        with session.phase("generate"):  # and reward: each sample is judged while others are being generated
            if groups or not started:
                session.wake_engines()
                rollout.start(draw)
            found = rollout.collect(partial(session.sync_weights, step))
        if session.judges_sleep:
            with session.phase("judge"):
                judge_groups(session, rows, found)
        for made in found:
            judged = [{name: from_json(data) for name, data in made.results[i].items()} for i in indices]
            row = rows[made.asked.prompt.prompt_id]
            weights = objectives.constrained_weights(
                mixing.label_weights(row, rewarding.mix), rewarding.constraint, constraint
            )
            mixed = objectives.group_rewards(judged, weights, rewarding.normalise, rewarding.gate)
            samples = [made.samples[i] for i in indices]
            groups.append(Group(row, made.asked.vision, samples, judged, list(map(or_nan, mixed))))
        rewards = torch.tensor([g.rewards for g in groups], dtype=torch.float64)
        if int(has_reward_variance(rewards).sum()) >= algorithm.prompts_per_step:
            break
    with session.phase("sync"):  # which wakes them
        session.sleep_engines()
    return [groups[i] for i in select_groups(rewards, algorithm.prompts_per_step)]


def packed(sample: Sample, vision: VisionInputs | None) -> PackedSequence:
    """A sample as the trainer takes it: exactly the ids that were sampled, and which of them were not but forced."""
    forced = set(sample.forced)
    sampled = [float(i not in forced) for i in range(len(sample.response_token_ids))]
    values = {"rollout": sample.logprobs, "sampled": sampled}
    return PackedSequence(list(sample.prompt_token_ids), list(sample.response_token_ids), values, vision)


def kl_rewards(session: Session, sequences: list[PackedSequence], reference: list[torch.Tensor] | None) -> torch.Tensor:
    """What each response token of the rollout pays for leaving the reference, [tokens]; 0 where the loss has the KL."""
    algorithm, temperature = session.config.algorithm, session.config.rollout.temperature
    total = sum(len(s.response) for s in sequences)
    if algorithm.kl_in == "loss" or algorithm.kl_coefficient == 0 or reference is None:
        return torch.zeros(total, dtype=torch.float64)
    batches = session.micro_batches(sequences)
    policy = forward_backward.gather_tokens(
        session.model, batches, forward_backward.log_probs(session.model, batches, temperature), total
    )
    with forward_backward.swapped_weights(session.model, reference):
        found = forward_backward.log_probs(session.model, batches, temperature)
    kl = resolve("kl_estimator", algorithm)(
        policy, forward_backward.gather_tokens(session.model, batches, found, total)
    )
    return -algorithm.kl_coefficient * kl.double()


def add_log_probs(session: Session, micro_batches: list[MicroBatch], name: str) -> None:
    """``values[name]``: log-probs of the micro-batches' response tokens under the model's present weights."""
    found = forward_backward.log_probs(session.model, micro_batches, session.config.rollout.temperature)
    for micro, log_probs in zip(micro_batches, found, strict=False):  # none off the last pipeline stage
        micro.values[name] = log_probs


def of_updates(sums: Mapping[str, float]) -> dict[str, float | None]:
    """Means over the updates that were made, and over their tokens; no values where all of a step's were skipped."""
    if not sums:
        return dict.fromkeys(
            ("kl/reference", "train_inference_mismatch/mean", "train_inference_mismatch/max", "loss", "grad_norm")
        )
    tokens = sums["train_inference_mismatch/tokens"]
    return {
        "kl/reference": sums["kl"] / tokens if "kl" in sums else None,  # without a reference there is none
        **mismatch.report(sums),
        **({"entropy": sums["entropy"] / tokens} if "entropy" in sums else {}),
        "loss": sums["loss"] / sums["updates"],
        "grad_norm": sums["grad_norm"] / sums["updates"],
    }


def token_weights(
    aggregation: Callable[[list[int]], list[list[float]]], sequences: list[PackedSequence], rewards: list[float]
) -> list[list[float]]:
    """The weights of an update's response tokens. Forced tokens, and samples without a reward (NaN), count as if they
    were not there."""
    counted = [
        0 if math.isnan(reward) else int(sum(s.values["sampled"])) for s, reward in zip(sequences, rewards, strict=True)
    ]
    weights = iter(aggregation([n for n in counted if n]))
    found = []
    for sequence, n in zip(sequences, counted, strict=True):
        own = iter(next(weights) if n else [])
        found.append([next(own) if n and sampled else 0.0 for sampled in sequence.values["sampled"]])
    return found


def contributing(
    sequences: list[PackedSequence],
    advantages: list[list[float]],
    weights: list[list[float]],
    skip_zero_advantage: bool,
    enough: Callable[[list[PackedSequence], int], int],
) -> list[PackedSequence]:
    """The sequences to train on, with their tokens' advantages and weights; the weights stay those of *all* samples.

    A zero advantage (a group of equal rewards) gives no policy gradient; leaving such samples out saves their passes
    and drops only their KL term. Some are kept where the others are too few for every rank (``enough``: how many of
    the first sequences, at least so many, do).
    """
    weighted = [
        replace(s, values={**s.values, "advantage": advantage, "weight": weight})
        for s, advantage, weight in zip(sequences, advantages, weights, strict=True)
    ]
    if not skip_zero_advantage:
        return weighted
    order = sorted(range(len(weighted)), key=lambda i: not any(advantages[i]))  # stable: the useful ones first
    wanted = max(1, sum(map(any, advantages)))
    ordered = [weighted[i] for i in order]
    return ordered[: enough(ordered, wanted)]


def record(
    session: Session,
    metrics: dict[str, Any],
    groups: list[Group],
    advantages: list[list[float]],
) -> None:
    """Rank 0 writes the step's samples and metrics and shows them; the phase clocks start anew."""
    if session.rank == 0:
        of_samples = [(g.row, *each) for g in groups for each in zip(g.samples, g.rewards, g.judged, strict=True)]
        lines = [
            {
                "step": metrics["step"],
                "prompt_id": sample.prompt_id,
                "sample_index": sample.sample_index,
                "prompt": row["prompt"],
                "response": session.text(sample),
                "tokens": len(sample.response_token_ids),
                "reward": None if math.isnan(reward) else reward,
                "verdicts": {name: to_json(judgement) for name, judgement in verdicts.items()},
                "advantage": fmean(advantage),
                "weight_version": sample.weight_version,
            }
            for (row, sample, reward, verdicts), advantage in zip(of_samples, advantages, strict=True)
        ]
        records.append_rows(session.run_dir / "samples.jsonl", lines)
    line = session.record(metrics)
    if session.rank == 0:
        session.display.step(line, session.config.algorithm.steps)
