"""Two PPO steps of the loop against PPO written again with transformers, torch and NumPy, on the same responses.

Everything that makes such a step acts: the KL in the reward (from the second step on, when policy and reference
differ), the overlong penalty, tokens that are not trained on, a response without a reward, two updates a rollout whose
second one clips, the entropy bonus, truncated importance sampling, the critic and its clip.
"""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from megatron_ext import batch as batches
from megatron_ext.batch import Prompt, TokenBatch
from tests.megatron_ext import ranks
from tests.recipes import ppo_worker, tiny
from tests.recipes.one_rank import one_rank
from tests.recipes.plain_adamw import adamw

STEPS, PROMPTS, SAMPLES, LONGEST = 2, 4, 4, 8
BETA, DISCOUNT, LAMBDA, CLIP_LOW, CLIP_HIGH, ENTROPY, CAP, VALUE_CLIP = 0.3, 0.9, 0.8, 0.005, 0.01, 0.01, 1.1, 0.02
LEARNING_RATE, CRITIC_LEARNING_RATE, TEMPERATURE = 1e-3, 2e-3, 0.8
# Large enough that AdamW does not turn the sign of a gradient that is all but 0 into a step.
EPSILON, WEIGHT_DECAY, CLIP_NORM = 1e-3, 0.01, 1.0
SETTINGS = (
    "stage.trains=[rl]", "stage.evaluates=false", "precision=fp32", "parallel=tp1", "cluster.threads=1",
    "parallel.micro_batch_tokens=64", "algorithm=ppo", f"algorithm.steps={STEPS}", "algorithm.updates_per_rollout=2",
    f"algorithm.kl_coefficient={BETA}", f"algorithm.discount={DISCOUNT}", f"algorithm.gae_lambda={LAMBDA}",
    f"algorithm.clip_low={CLIP_LOW}", f"algorithm.clip_high={CLIP_HIGH}", f"algorithm.entropy_coefficient={ENTROPY}",
    f"algorithm.learning_rate={LEARNING_RATE}", "algorithm.min_lr_ratio=0.1", "algorithm.warmup_fraction=0.0",
    "algorithm.importance_sampling=token_truncated", f"algorithm.tis_cap={CAP}", "algorithm.max_mismatch=5",
    "algorithm.overlong_fraction=0.5", f"algorithm.value_clip={VALUE_CLIP}", "critic.warmup_fraction=0.0",
    f"critic.learning_rate={CRITIC_LEARNING_RATE}", f"rollout.temperature={TEMPERATURE}",
    f"optimizer.epsilon={EPSILON}", f"optimizer.weight_decay={WEIGHT_DECAY}", f"optimizer.clip_grad_norm={CLIP_NORM}",
)  # fmt: skip


def responses(step: int) -> TokenBatch:
    """16 responses of 2 to 8 random tokens, of which about a sixth are forced, with rewards but for one."""
    draw = np.random.default_rng(step)
    prompts = [Prompt(f"{step}-{i}", draw.integers(3, 300, 3 + i).astype(np.int32)) for i in range(PROMPTS)]
    lengths = draw.integers(2, LONGEST + 1, PROMPTS * SAMPLES)
    masks = [draw.random(n) > 0.17 for n in lengths]
    batch = batches.build(
        prompts,
        [draw.integers(3, 300, n) for n in lengths],
        prompt_index=np.repeat(np.arange(PROMPTS), SAMPLES),
        sample_index=list(range(SAMPLES)) * PROMPTS,
        logprobs=[np.where(mask, draw.normal(-6, 1, n), 0) for mask, n in zip(masks, lengths, strict=True)],
        loss_mask=masks,
        version=step - 1,
    )
    rewards = draw.random(PROMPTS * SAMPLES)
    rewards[5] = math.nan
    return replace(batch, rewards=rewards)


@dataclass
class Run:
    """What the ranks made: metrics of each step, the batches with their columns, and both models' tensors."""

    metrics: list[dict[str, Any]]
    scored: list[TokenBatch]
    policy: dict[str, Tensor]
    critic: dict[str, Tensor]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ppo_step")
    tiny.make(folder)
    return folder


@pytest.fixture(scope="module", params=["two ranks", "this process"])
def run(folder: Path, request: pytest.FixtureRequest) -> Run:
    """In this process too, where ``make mutation`` sees which functions a test calls."""
    count = 2 if request.param == "two ranks" else 1
    # Without the folder of a user's own configuration, which compose has no argument for.
    overrides = [argument for argument in tiny.overrides(folder, folder / "run") if not argument.startswith("--")]
    overrides[overrides.index("rewards=letters")] = "rewards=base"
    (folder / "overrides.json").write_text(json.dumps([*overrides, *SETTINGS, f"cluster.ranks={count}"]))
    for step in range(1, STEPS + 1):
        (folder / f"step_{step}.safetensors").write_bytes(responses(step).to_bytes())
    if count == 2:
        ranks.run("tests.recipes.ppo_worker", folder)
    else:
        with one_rank():
            ppo_worker.main(folder)
    return Run(
        json.loads((folder / "metrics.json").read_text()),
        [TokenBatch.from_bytes((folder / f"scored_{step}.safetensors").read_bytes()) for step in range(1, STEPS + 1)],
        load_file(folder / "policy" / "model.safetensors"),
        load_file(folder / "critic" / "model.safetensors"),
    )


@dataclass
class Sample:
    """A response, one at a time; ``mask`` are its trained tokens."""

    prompt: Tensor
    response: Tensor
    mask: Tensor
    sampler: Tensor
    reward: float

    @property
    def tokens(self) -> Tensor:
        return torch.cat([self.prompt, self.response]).unsqueeze(0)


def samples_of(batch: TokenBatch) -> list[Sample]:
    samples = []
    for i in range(len(batch)):
        at = batch.tokens_of(i)
        reward = float(batch.rewards[i])
        mask = torch.from_numpy(batch.loss_mask[at]) & (not math.isnan(reward))
        response = torch.from_numpy(batch.response_tokens[at]).long()
        prompt = torch.from_numpy(batch.prompt(i).token_ids).long()
        samples.append(Sample(prompt, response, mask, torch.from_numpy(batch.logprobs[at]), reward))
    return samples


class Reference:
    """PPO as in the papers, one sequence at a time."""

    def __init__(self, model: Path) -> None:
        load = {"dtype": torch.float32, "attn_implementation": "eager"}
        self.policy = AutoModelForCausalLM.from_pretrained(model, **load)
        self.reference = AutoModelForCausalLM.from_pretrained(model, **load)
        self.critic = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1, **load)
        torch.nn.init.zeros_(self.critic.score.weight)
        # ``apply`` sets the learning rates.
        self.policy_optimizer = adamw(self.policy, 1.0, WEIGHT_DECAY, EPSILON)
        self.critic_optimizer = adamw(self.critic, 1.0, WEIGHT_DECAY, EPSILON)
        self.updates = 0

    def distribution(self, model: Any, sample: Sample) -> torch.distributions.Categorical:
        logits = model(sample.tokens).logits[0, len(sample.prompt) - 1 : -1]
        return torch.distributions.Categorical(logits=logits / TEMPERATURE)

    def log_probs(self, model: Any, sample: Sample) -> Tensor:
        return self.distribution(model, sample).log_prob(sample.response)

    def values(self, sample: Sample) -> Tensor:
        hidden = self.critic.model(sample.tokens).last_hidden_state
        return self.critic.score(hidden)[0, len(sample.prompt) - 1 : -1, 0]

    def step(self, samples: list[Sample]) -> dict[str, Any]:
        with torch.no_grad():
            old = [self.log_probs(self.policy, sample) for sample in samples]
            references = [self.log_probs(self.reference, sample) for sample in samples]
            old_values = [self.values(sample) for sample in samples]
        advantages, returns = [], []
        for sample, before, reference, values in zip(samples, old, references, old_values, strict=True):
            trained = np.flatnonzero(sample.mask.numpy())
            rewards = (-BETA * (before - reference)).double().numpy()[trained]
            if len(trained):
                # The last half of the longest response is the buffer of the overlong penalty.
                penalty = max(0.0, (len(sample.response) - LONGEST / 2) / (LONGEST / 2))
                rewards[-1] += sample.reward - penalty
            estimates = gae(rewards, values.double().numpy()[trained])
            advantages.append(placed(estimates, sample.mask))
            returns.append(placed(estimates + values.double().numpy()[trained], sample.mask))
        every = np.concatenate([values.numpy()[s.mask.numpy()] for values, s in zip(advantages, samples, strict=True)])
        whitened = [(a - every.mean()) / every.std(ddof=1) * s.mask for a, s in zip(advantages, samples, strict=True)]
        metrics: dict[str, list[float]] = {name: [] for name in ("loss", "grad_norm", "value/loss", "value/grad_norm")}
        tokens: list[dict[str, Tensor]] = []
        half = len(samples) // 2
        for part in (slice(0, half), slice(half, None)):
            self.update_policy(samples[part], old[part], references[part], whitened[part], metrics, tokens)
        for number, part in enumerate((slice(0, half), slice(half, None))):
            self.update_critic(samples[part], old_values[part], returns[part], metrics, self.updates + number)
        self.updates += 2
        return {
            "advantages": torch.cat(whitened),
            **{name: float(np.mean(values)) for name, values in metrics.items()},
            **{name: float(torch.cat([row[name] for row in tokens]).double().mean()) for name in tokens[0]},
        }

    def update_policy(
        self,
        samples: list[Sample],
        old: list[Tensor],
        references: list[Tensor],
        advantages: list[Tensor],
        metrics: dict[str, list[float]],
        tokens: list[dict[str, Tensor]],
    ) -> None:
        count = sum(int(sample.mask.sum()) for sample in samples)
        total = torch.zeros(())
        for sample, before, reference, advantage in zip(samples, old, references, advantages, strict=True):
            if not sample.mask.any():
                continue
            distribution = self.distribution(self.policy, sample)
            now = distribution.log_prob(sample.response)
            ratio = (now - before).exp()
            clipped = ratio.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH)
            a = advantage.float()
            correction = (before - sample.sampler).exp().clamp(max=CAP)
            losses = -torch.minimum(ratio * a, clipped * a) * correction - ENTROPY * distribution.entropy()
            total = total + losses[sample.mask].sum() / count
            row = {
                "clip_fraction/low": (ratio < 1 - CLIP_LOW) & (a < 0),
                "clip_fraction/high": (ratio > 1 + CLIP_HIGH) & (a > 0),
                "kl/old": ratio - 1 - ratio.log(),
                "kl/reference": (reference - now).exp() - 1 - (reference - now),
                "entropy": distribution.entropy(),
                "nll/policy": -before,
                "nll/sampler": -sample.sampler,
            }
            tokens.append({name: value.detach()[sample.mask].double() for name, value in row.items()})
        decayed = 0.1 + 0.9 * (1 + math.cos(math.pi * (self.updates + len(metrics["loss"])) / (2 * STEPS))) / 2
        norm = apply(self.policy, self.policy_optimizer, total, LEARNING_RATE * decayed)
        metrics["loss"].append(total.item())
        metrics["grad_norm"].append(norm)

    def update_critic(
        self,
        samples: list[Sample],
        old_values: list[Tensor],
        returns: list[Tensor],
        metrics: dict[str, list[float]],
        number: int,
    ) -> None:
        count = sum(int(sample.mask.sum()) for sample in samples)
        total = torch.zeros(())
        for sample, old, wanted in zip(samples, old_values, returns, strict=True):
            values = self.values(sample)
            held = old + (values - old).clamp(-VALUE_CLIP, VALUE_CLIP)
            losses = torch.maximum((values - wanted.float()) ** 2, (held - wanted.float()) ** 2) / 2
            total = total + losses[sample.mask].sum() / count
        norm = apply(self.critic, self.critic_optimizer, total, CRITIC_LEARNING_RATE)
        metrics["value/loss"].append(total.item())
        metrics["value/grad_norm"].append(norm)


def apply(model: Any, optimizer: torch.optim.AdamW, loss: Tensor, learning_rate: float) -> float:
    """One update; returns the norm of the gradient before it is clipped."""
    optimizer.zero_grad()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.step()
    return float(norm)


def gae(rewards: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Σ_l (γλ)^l δ_{t+l} over a response's trained tokens, as the double sum."""
    nexts = np.append(values, 0.0)[1:]
    errors = rewards + DISCOUNT * nexts - values
    powers = (DISCOUNT * LAMBDA) ** np.arange(len(errors))
    return np.array([(powers[: len(errors) - t] * errors[t:]).sum() for t in range(len(errors))])


def placed(values: np.ndarray, mask: Tensor) -> Tensor:
    """Numbers of the trained tokens at their places, 0 elsewhere."""
    whole = torch.zeros(len(mask), dtype=torch.float64)
    whole[mask] = torch.from_numpy(values)
    return whole


@pytest.fixture(scope="module")
def expected(folder: Path) -> tuple[Reference, list[dict[str, Any]]]:
    reference = Reference(folder / "model")
    return reference, [reference.step(samples_of(responses(step))) for step in range(1, STEPS + 1)]


Expected = tuple[Reference, list[dict[str, Any]]]


def test_advantages_are_the_papers(run: Run, expected: Expected) -> None:
    """KL in the reward, the overlong penalty, GAE from one trained token to the next, whitening; 0 elsewhere."""
    for scored, wanted in zip(run.scored, expected[1], strict=True):
        advantages = torch.from_numpy(scored.columns["advantages"])
        torch.testing.assert_close(advantages, wanted["advantages"].float(), rtol=1e-4, atol=2e-5)
        assert not advantages[~torch.from_numpy(scored.loss_mask)].any()


@pytest.mark.parametrize(
    "name",
    ["loss", "grad_norm", "value/loss", "value/grad_norm", "kl/reference", "kl/old", "entropy"],
)
def test_losses_gradients_and_divergences_are_the_references(name: str, run: Run, expected: Expected) -> None:
    measured = [row[name] for row in run.metrics]
    assert measured == pytest.approx([row[name] for row in expected[1]], rel=2e-4, abs=2e-6)
    if name.startswith("kl/"):
        assert measured[1] > 1e-5, "it acts"


def test_clip_fractions_and_perplexities_are_the_references(run: Run, expected: Expected) -> None:
    for row, wanted in zip(run.metrics, expected[1], strict=True):
        for name in ("clip_fraction/low", "clip_fraction/high"):
            assert row[name] == pytest.approx(wanted[name], abs=1e-9) and 0 < row[name] < 0.5
        for name in ("policy", "sampler"):
            assert row[f"perplexity/{name}"] == pytest.approx(math.exp(wanted[f"nll/{name}"]), rel=1e-5)


@pytest.mark.parametrize("name", ["policy", "critic"])
def test_both_models_end_where_the_reference_ends(name: str, run: Run, folder: Path, expected: Expected) -> None:
    """Every tensor, relative to how far it moved."""
    model = getattr(expected[0], name)
    start = load_file(folder / "model" / "model.safetensors")
    weights: dict[str, Tensor] = getattr(run, name)
    tensors = {key: value for key, value in model.state_dict().items() if key != "lm_head.weight"}
    assert weights.keys() == tensors.keys()
    for key, wanted in tensors.items():
        before = start[key].float() if key in start else torch.zeros_like(wanted)
        moved = (wanted - before).norm()
        assert moved > 0
        assert (weights[key] - wanted).norm() < 1e-3 * moved, key
