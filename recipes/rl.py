"""The RL loop. It reads as the algorithm; its parts are in rollout/, rewards/, recipes/algorithms/, megatron_ext/."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from megatron_ext import checkpoint, optimizer, steps
from megatron_ext.packing import MicroBatch, PackedSequence, VisionInputs
from megatron_ext.weight_map import round_up
from recipes import records, trainer
from recipes.algorithms import algorithm
from recipes.algorithms.losses import kl_k3, sequence_mean_token_mean
from recipes.data import prompts
from recipes.session import Session
from rewards import mixing
from rewards.verdict import Verdict
from rollout.sample import Sample


def fit(session: Session, reference: Path) -> None:
    """Prompts → rollout → rewards → advantages → Megatron step → weight bridge → rollout, ``algorithm.steps`` times.

    ``reference`` is the Hugging Face folder of the policy that the KL penalty refers to. Where the run has a
    checkpoint, the loop goes on behind the newest, exactly: a step's prompts and seeds depend on nothing but the step.
    """
    config, model = session.config, session.model
    algo, rows = algorithm(config.algorithm.name), prompts.load_rows(config.data.prompts)
    optim, schedule = session.build_optimizer(config.algorithm, config.algorithm.steps)
    reference_weights = steps.load_weights(model, reference)
    folder, done = session.run_dir / "checkpoints", 0
    if newest := checkpoint.latest(folder):
        done = checkpoint.load(newest, model, optim, schedule)
    session.truncate_records(done)
    session.sync_weights(done)

    def loss(log_probs: torch.Tensor, batch: MicroBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        values, now = batch.values, log_probs.detach()
        gap = (now - values["rollout"]).abs()
        worst = gap.max() if len(gap) else gap.sum()  # a context-parallel rank can have none of a micro-batch's tokens
        measured = {"kl": kl_k3(now, values["reference"]).sum(), "gap": gap.sum(), "gap/max": worst}
        return (algo.token_loss(log_probs, batch, config.algorithm) * values["weight"]).sum(), measured

    for step in range(done, config.algorithm.steps):
        batch = prompts.mixed(rows, config.data.mix, step, config.algorithm.prompts_per_step, config.seed)

        with session.phase("generate"):
            asked = [session.prompts(row) for row in batch]
            group = config.algorithm.samples_per_prompt
            samples = session.generate([a.prompt for a in asked], group, step, config.rollout.temperature)

        with session.phase("reward"):
            judged = [
                mixing.reward(batch[i // group], session.text(s), session.verifiers, config.rewards.mix)
                for i, s in enumerate(samples)
            ]
            rewards = torch.tensor([reward for reward, _ in judged], dtype=torch.float64).view(-1, group)
            advantages = algo.advantages(rewards, config.algorithm).flatten().tolist()

        with session.phase("logprobs"):
            lengths = [len(s.response_token_ids) for s in samples]
            images = [a.vision for a in asked for _ in range(group)]
            sequences = contributing(
                samples, images, advantages, config.algorithm.skip_zero_advantage, trainer.sequence_multiple(config)
            )
            trained_tokens = sum(len(s.response) for s in sequences)
            micro_batches = session.micro_batches(sequences)
            with steps.weights_of(model, reference_weights):
                found = steps.log_probs(model, micro_batches, config.rollout.temperature)
            for micro, log_probs in zip(micro_batches, found, strict=False):  # none off the last pipeline stage
                micro.values["reference"] = log_probs

        with session.phase("train"):
            sums = steps.accumulate_gradients(model, micro_batches, loss, config.rollout.temperature)
            grad_norm = optimizer.step(optim, schedule)

        with session.phase("sync"):
            sync_bytes = session.sync_weights(step + 1)

        metrics = {
            "step": step + 1,
            "reward/mean": float(rewards.mean()),
            **{f"reward/{name}": score for name, score in verifier_means(judged).items()},
            "kl/reference": sums["kl"] / trained_tokens,
            "logprob_gap/mean": sums["gap"] / trained_tokens,
            "logprob_gap/max": sums["gap/max"],
            "loss": sums["loss"],
            "grad_norm": grad_norm,
            "trained_samples": len(sequences),
            "response_length/mean": fmean(lengths),
            records.TOKENS_PER_SECOND: sum(lengths) / session.seconds["generate"],
            "sync/bytes": sync_bytes,
        }
        record(session, metrics, batch, samples, judged, advantages)
        if step + 1 == config.algorithm.steps or (step + 1) % config.checkpoint.every_steps == 0:
            with session.phase("checkpoint"):  # behind the step's record; its time shows in the next one
                checkpoint.save(folder, step + 1, model, optim, schedule, config.checkpoint.keep)


def contributing(
    samples: list[Sample],
    images: Sequence[VisionInputs | None],
    advantages: list[float],
    skip_zero_advantage: bool,
    multiple: int,
) -> list[PackedSequence]:
    """The sequences to train on, weighted as a mean over *all* samples.

    A zero advantage (a group of equal rewards) gives no policy gradient; leaving such samples out saves their passes
    and drops only their KL term. Some are kept to make a multiple of ``multiple`` (``trainer.sequence_multiple``).
    """
    weights = sequence_mean_token_mean([len(s.response_token_ids) for s in samples])
    sequences = [
        PackedSequence(
            list(s.prompt_token_ids),
            list(s.response_token_ids),
            {"rollout": s.logprobs, "advantage": [advantage] * len(weight), "weight": weight},
            vision,
        )
        for s, vision, advantage, weight in zip(samples, images, advantages, weights, strict=True)
    ]
    if not skip_zero_advantage:
        return sequences
    order = sorted(range(len(sequences)), key=lambda i: advantages[i] == 0)  # stable: the useful ones first
    wanted = max(1, sum(advantage != 0 for advantage in advantages))
    return [sequences[i] for i in order[: round_up(wanted, multiple)]]


def verifier_means(judged: list[tuple[float, dict[str, Verdict]]]) -> dict[str, float]:
    """Mean score of each verifier over the samples that it judged."""
    names = sorted({name for _, verdicts in judged for name in verdicts})
    return {name: fmean(v[name].score for _, v in judged if name in v) for name in names}


def record(
    session: Session,
    metrics: dict[str, Any],
    batch: list[prompts.Row],
    samples: list[Sample],
    judged: list[tuple[float, dict[str, Verdict]]],
    advantages: list[float],
) -> None:
    """Rank 0 writes the step's metrics and samples and shows them; the phase clocks start anew."""
    times = {f"time/{name}": seconds for name, seconds in session.seconds.items()}
    row = {**metrics, "time/step": sum(session.seconds.values()), **times}
    session.seconds.clear()
    if session.rank != 0:
        return
    group = session.config.algorithm.samples_per_prompt
    lines = [
        {
            "step": metrics["step"],
            "prompt_id": sample.prompt_id,
            "sample_index": sample.sample_index,
            "prompt": batch[i // group]["prompt"],
            "response": session.text(sample),
            "reward": reward,
            "verdicts": {name: {"score": v.score, "label": v.label} for name, v in verdicts.items()},
            "advantage": advantage,
            "weight_version": sample.weight_version,
        }
        for i, (sample, (reward, verdicts), advantage) in enumerate(zip(samples, judged, advantages, strict=True))
    ]
    records.append_rows(session.run_dir / "samples.jsonl", lines)
    records.append_rows(session.run_dir / "metrics.jsonl", [row])
    session.display.step(row, session.config.algorithm.steps)
    if session.wandb is not None:
        session.wandb.log(row, step=metrics["step"])
