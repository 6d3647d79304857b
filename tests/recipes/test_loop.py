"""Runs of the loop in this process, on one rank, with the engine of ``steps``: what they write down and where the
weights end is computed again with transformers, torch and NumPy, from the sampled tokens on."""

import copy
import json
import math
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_ext import checkpoint, forward_backward, model, shard_files
from megatron_ext.blocks import Shard, region
from megatron_ext.model import Model
from recipes.config import Config, parse
from recipes.preflight import memory
from recipes.run import records, sample_files
from recipes.training.policy import Policy
from recipes.training.rollouts import Rollouts
from rollout.sampler import request_seed
from tests.recipes import steps, tiny
from tests.recipes.kill_check import timeless
from tests.recipes.letters import letters
from tests.recipes.one_rank import make_folder, one_rank
from tests.recipes.plain_adamw import adamw
from tests.recipes.test_config import composed, overridden

STEPS, PROMPTS, SAMPLES, LONGEST = 3, 4, 4, 8
BETA, LEARNING_RATE, TEMPERATURE = 0.2, 1e-3, 0.8
EPSILON, WEIGHT_DECAY, CLIP_NORM = 1e-3, 0.01, 1.0  # see tests/recipes/test_ppo_step.py
CLIP = 0.2  # algorithm.clip_low and clip_high
TOKEN_METRICS = ("kl/reference", "kl/old", "entropy", "perplexity/policy", "perplexity/sampler")
COMMON = (
    "stage.evaluates=false",
    "stage.trains=[rl]",
    "cluster.ranks=1",
    "cluster.threads=1",
    "parallel.tensor=1",
    "parallel.sequence=false",
    f"algorithm.steps={STEPS}",
    f"algorithm.learning_rate={LEARNING_RATE}",
    "algorithm.min_lr_ratio=1.0",
    "algorithm.warmup_fraction=0.0",
    f"rollout.temperature={TEMPERATURE}",
    f"optimizer.epsilon={EPSILON}",
    f"optimizer.weight_decay={WEIGHT_DECAY}",
    f"optimizer.clip_grad_norm={CLIP_NORM}",
)
# Forced tokens, the overlong penalty and the KL in the loss act.
GRPO = (f"algorithm.kl_coefficient={BETA}", "algorithm.overlong_fraction=0.5", "rollout.thinking_budget=4")
MIX = {"safety": {"safety": 0.25, tiny.LETTERS: 0.75}, "general_rule": {"capability": 0.25, tiny.LETTERS: 0.75}}
BYTES = 7


class Engine(steps.Engine):
    """An engine of its own weights, which a sync replaces."""

    def __init__(self, settings: Any, log_path: Path) -> None:
        self.model = copy.deepcopy(steps.model(settings.model))


class WeightSync:
    """Puts the only rank's shards together, into each engine's model."""

    def __init__(self, shards: Sequence[Shard], engines: Sequence[Engine], *unused: Any, **options: Any) -> None:
        self.shards = shards
        self.engines = engines

    def sync(self, version: int) -> dict[str, int]:
        for engine in self.engines:
            tensors = engine.model.state_dict()
            for shard in self.shards:
                for block in shard.blocks:
                    values = shard.tensor.detach()[region(block.local_start, block.shape)]
                    tensors[block.hf_name][region(block.hf_start, block.shape)] = values
            engine.version = version
        return {"bytes": BYTES}


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("loop")
    tiny.make(folder)
    return folder


def configured(twin: Path, run_dir: Path, mix: Mapping[str, Mapping[str, float]], *more: str) -> Config:
    _, recipe, _, *small = tiny.overrides(twin, run_dir)
    overrides = [*small, *COMMON, "~rewards.mix", f"+rewards.mix={json.dumps(mix).replace('"', '')}", *more]
    return parse(overridden(composed(recipe, "rewards=base", "precision=fp32"), overrides))


def train(twin: Path, run_dir: Path, *more: str, mix: Mapping[str, Mapping[str, float]] = MIX) -> Path:
    """A run as a rank of ``recipes.train`` makes it; its folder."""
    make_folder(run_dir)
    with one_rank() as patched:
        patched.setattr(steps.setup, "Engine", Engine)
        patched.setattr(steps.setup, "WeightSync", WeightSync)
        patched.setattr(steps.setup.logs, "redirect_output", lambda folder, rank: None)
        with steps.setup.open_training(configured(twin, run_dir, mix, *more)) as training:
            steps.run_stage(training)
    return run_dir


def rows(run_dir: Path, name: str) -> list[dict[str, Any]]:
    return list(records.read_rows(run_dir / name))


@pytest.fixture(scope="module")
def run_dir(twin: Path) -> Path:
    return train(twin, twin / "run", *GRPO)


@dataclass
class Sample:
    """A response as the engine makes it."""

    prompt_id: str
    prompt: list[int]
    response: list[int]
    mask: torch.Tensor
    reward: float

    def distribution(self, model: Any) -> torch.distributions.Categorical:
        tokens = torch.tensor([self.prompt + self.response])
        return torch.distributions.Categorical(logits=model(tokens).logits[0, len(self.prompt) - 1 : -1] / TEMPERATURE)

    def log_probs(self, model: Any) -> torch.Tensor:
        return self.distribution(model).log_prob(torch.tensor(self.response))


def sampled(tokenizer: Any, row: Mapping[str, Any]) -> Sample:
    """The tokens of a line of samples, by the engine's rule."""
    chance = random.Random(f"{row['prompt_id']}/{row['sample_index']}")
    length = chance.randint(1, LONGEST)
    response = [chance.randrange(3, len(tokenizer)) for _ in range(length - 1)] + [tokenizer.eos_token_id]
    message = [{"role": "user", "content": row["prompt"]}]
    prompt = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False)
    return Sample(row["prompt_id"], prompt, response, torch.arange(length) != 1, row["reward"])


class Reference:
    """GRPO, one sequence at a time."""

    def __init__(self, folder: Path) -> None:
        load = {"dtype": torch.float32, "attn_implementation": "eager"}
        self.policy = AutoModelForCausalLM.from_pretrained(folder, **load)
        self.reference = AutoModelForCausalLM.from_pretrained(folder, **load)
        self.optimizer = adamw(self.policy, LEARNING_RATE, WEIGHT_DECAY, EPSILON)

    def step(self, samples: Sequence[Sample], updates: int = 1) -> dict[str, Any]:
        """The updates of a rollout, each on an equal part of the samples; the means of their metrics, and the advantage
        of each sample."""
        half = LONGEST / 2
        totals = np.array([s.reward - max(0.0, (len(s.response) - half) / half) for s in samples]).reshape(-1, SAMPLES)
        deviations = totals - totals.mean(1, keepdims=True)
        advantages = (deviations / (totals.std(1, ddof=1, keepdims=True) + 1e-9)).flatten()
        with torch.no_grad():
            olds = [sample.log_probs(self.policy) for sample in samples]
        size = len(samples) // updates
        tokens: dict[str, list[torch.Tensor]] = {name: [] for name in TOKEN_METRICS}
        sums = {"loss": 0.0, "grad_norm": 0.0}
        for first in range(0, len(samples), size):
            part = slice(first, first + size)
            for name, value in self.update(samples[part], advantages[part], olds[part], tokens).items():
                sums[name] += value / updates
        means = {name: float(torch.cat(values).mean()) for name, values in tokens.items()}
        means["perplexity/policy"] = math.exp(means["perplexity/policy"])
        means["perplexity/sampler"] = math.exp(means["perplexity/sampler"])
        return {"advantages": advantages, **sums, **means}

    def update(
        self,
        samples: Sequence[Sample],
        advantages: np.ndarray,
        olds: Sequence[torch.Tensor],
        tokens: Mapping[str, list[torch.Tensor]],
    ) -> dict[str, float]:
        """The clipped loss and the KL penalty; adds each trained token's metrics to ``tokens``."""
        loss = torch.zeros(())
        for sample, advantage, old in zip(samples, advantages, olds, strict=True):
            distribution = sample.distribution(self.policy)
            now = distribution.log_prob(torch.tensor(sample.response))
            with torch.no_grad():
                of_reference = sample.log_probs(self.reference)
            k3 = (of_reference - now).exp() - 1 - (of_reference - now)
            ratio = (now - old).exp()
            clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
            losses = torch.maximum(-ratio * float(advantage), -clipped * float(advantage)) + BETA * k3
            loss = loss + losses[sample.mask].mean() / len(samples)
            for name, values in (
                ("kl/reference", k3),
                ("kl/old", (now - old).exp() - 1 - (now - old)),  # the samples are the old policy's
                ("entropy", distribution.entropy()),
                ("perplexity/policy", -old),
                ("perplexity/sampler", -old),
            ):
                tokens[name].append(values.detach()[sample.mask].double())
        self.optimizer.zero_grad()
        loss.backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(self.policy.parameters(), CLIP_NORM)
        self.optimizer.step()
        return {"loss": loss.item(), "grad_norm": float(grad_norm)}


Expected = tuple[Reference, list[dict[str, Any]]]


def computed(twin: Path, run_dir: Path, updates: int = 1) -> Expected:
    """The reference after the run's steps, and each step's metrics."""
    tokenizer = AutoTokenizer.from_pretrained(twin / "model")
    reference = Reference(twin / "model")
    of_steps = []
    for step in range(1, STEPS + 1):
        lines = [row for row in list(sample_files.read(run_dir)) if row["step"] == step]
        of_steps.append(reference.step([sampled(tokenizer, row) for row in lines], updates))
    return reference, of_steps


@pytest.fixture(scope="module")
def expected(twin: Path, run_dir: Path) -> Expected:
    return computed(twin, run_dir)


def test_samples_are_the_engine_s_by_the_weights_of_their_step(twin: Path, run_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(twin / "model")
    prompts = {row["id"]: row["prompt"] for row in records.read_rows(twin / "rl.jsonl")}
    lines = list(sample_files.read(run_dir))
    assert [line["step"] for line in lines] == sorted([1, 2, 3] * PROMPTS * SAMPLES)
    assert [line["sample_index"] for line in lines] == list(range(SAMPLES)) * PROMPTS * STEPS
    for line in lines:
        sample = sampled(tokenizer, line)
        assert line["prompt"] == prompts[line["prompt_id"]]
        assert line["response"] == tokenizer.decode(sample.response[:-1]).strip()
        assert line["tokens"] == len(sample.response)
        assert line["weight_version"] == line["step"] - 1
    for first in range(0, len(lines), SAMPLES):
        assert len({line["prompt_id"] for line in lines[first : first + SAMPLES]}) == 1
    for step in range(1, STEPS + 1):
        kinds = {line["prompt_id"].partition("-")[0] for line in lines if line["step"] == step}
        assert kinds == set(tiny.KINDS), "one prompt of each kind, as data.mix says"


def test_rewards_are_the_mix_of_the_verdicts(run_dir: Path) -> None:
    lines = list(sample_files.read(run_dir))
    for line in lines:
        verdicts = line["verdicts"]
        label = tiny.KINDS[line["prompt_id"].partition("-")[0]]
        assert verdicts.keys() == MIX[label].keys()
        assert verdicts[tiny.LETTERS]["score"] == letters({}, line["response"]).score
        assert line["reward"] == pytest.approx(sum(w * verdicts[name]["score"] for name, w in MIX[label].items()))
    for row in rows(run_dir, "metrics.jsonl"):
        of_step = [line for line in lines if line["step"] == row["step"]]
        assert row["reward/mean"] == pytest.approx(np.mean([line["reward"] for line in of_step]))
        assert row["reward_failed"] == 0
        for name in ("safety", "capability", tiny.LETTERS):
            scores = [line["verdicts"][name]["score"] for line in of_step if name in line["verdicts"]]
            assert row[f"reward/{name}"] == pytest.approx(np.mean(scores))


def test_advantages_are_the_paper_s(run_dir: Path, expected: Expected) -> None:
    lines = list(sample_files.read(run_dir))
    wanted = np.concatenate([step["advantages"] for step in expected[1]])
    assert [line["advantage"] for line in lines] == pytest.approx(wanted, rel=1e-5, abs=1e-6)


def test_metrics_of_the_update_are_the_reference_s(run_dir: Path, expected: Expected) -> None:
    for row, wanted in zip(rows(run_dir, "metrics.jsonl"), expected[1], strict=True):
        for name in ("loss", "grad_norm", "kl/reference", "entropy", "perplexity/policy", "perplexity/sampler"):
            assert row[name] == pytest.approx(wanted[name], rel=3e-4, abs=2e-6), name
    assert rows(run_dir, "metrics.jsonl")[-1]["kl/reference"] > 1e-4, "it acts"


def test_metrics_count_what_was_made(run_dir: Path) -> None:
    lines = list(sample_files.read(run_dir))
    for number, row in enumerate(rows(run_dir, "metrics.jsonl"), 1):
        lengths = [line["tokens"] for line in lines if line["step"] == number]
        forced = sum(length > 1 for length in lengths)
        assert row["step"] == number
        assert row["response_length/mean"] == pytest.approx(np.mean(lengths))
        assert row["forced_tokens"] == forced
        assert row["masked_fraction"] == pytest.approx(forced / sum(lengths))
        assert row["trained_samples"] == PROMPTS * SAMPLES
        assert row["staleness/max"] == 0
        assert row["sync/bytes"] == BYTES
        assert row["skipped_updates"] == 0
        assert row["kl/old"] == row["clip_fraction/low"] == row["clip_fraction/high"] == 0
        assert row["train_inference_mismatch/max"] < 1e-4
        assert row["tokens_per_second"] == pytest.approx(sum(lengths) / row["time/generate"], rel=1e-6)
        phases = {"sync", "generate", "reward", "logprobs", "train"}
        timed = {name.removeprefix("time/") for name in row if name.startswith("time/")}
        assert timed - {"step", "checkpoint"} == phases
        assert all(row[f"time/{phase}"] > 0 for phase in phases)


def test_weights_end_where_the_reference_ends(twin: Path, run_dir: Path, expected: Expected) -> None:
    same_weights(twin, run_dir, expected[0])


def same_weights(twin: Path, run_dir: Path, reference: Reference) -> None:
    """Every tensor, relative to how far it moved."""
    start = load_file(twin / "model" / "model.safetensors")
    weights = load_file(run_dir / "hf" / "model.safetensors")
    tensors = reference.policy.state_dict()
    for name, tensor in weights.items():
        moved = (tensors[name] - start[name].float()).norm()
        assert moved > 0
        assert (tensor - tensors[name]).norm() < 2e-3 * moved, name


def test_two_updates_of_a_rollout_are_the_reference_s(twin: Path) -> None:
    """The second goes by importance ratios to the weights that the rollout began with."""
    run_dir = train(twin, twin / "two_updates", *GRPO, "algorithm.updates_per_rollout=2", "algorithm.max_mismatch=5")
    reference, of_steps = computed(twin, run_dir, updates=2)
    for row, wanted in zip(rows(run_dir, "metrics.jsonl"), of_steps, strict=True):
        assert row["trained_samples"] == PROMPTS * SAMPLES
        assert row["kl/old"] > 1e-6, "the second update's"
        for name in ("loss", "grad_norm", *TOKEN_METRICS):
            assert row[name] == pytest.approx(wanted[name], rel=1e-3, abs=2e-6), name
    same_weights(twin, run_dir, reference)


def test_the_policy_stays_while_the_critic_warms_up(twin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: dict[int, torch.Tensor] = {}  # version → all weights of an engine
    sync = WeightSync.sync

    def note_weights(weight_sync: WeightSync, version: int) -> dict[str, int]:
        counts = sync(weight_sync, version)
        tensors = weight_sync.engines[0].model.state_dict().values()
        synced[version] = torch.cat([tensor.flatten() for tensor in tensors])
        return counts

    monkeypatch.setattr(WeightSync, "sync", note_weights)
    run_dir = train(twin, twin / "warm_up", *PPO, "critic.warmup_steps=1", "algorithm.steps=2")
    first, second = rows(run_dir, "metrics.jsonl")
    assert first["value/loss"] > 0 and first["grad_norm"] == 0 and second["grad_norm"] > 0
    assert torch.equal(synced[1], synced[0]) and not torch.equal(synced[2], synced[0])


def test_each_response_has_a_seed_of_the_run_s(twin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: dict[tuple[str, int], int] = {}
    generate = Engine.generate

    def note_seeds(engine: Engine, requests: Any, *others: Any) -> Any:
        seeds.update(zip(requests.keys, requests.seeds.tolist(), strict=True))
        return generate(engine, requests, *others)

    monkeypatch.setattr(Engine, "generate", note_seeds)
    for seed in (1, 2):
        seeds.clear()
        train(twin, twin / f"seed_{seed}", f"seed={seed}", "algorithm.steps=1")
        assert seeds == {(prompt, index): request_seed(seed, 0, prompt, index) for prompt, index in seeds}
        assert len(seeds) == PROMPTS * SAMPLES


def same_run(one: Path, other: Path) -> None:
    assert list(sample_files.read(one)) == list(sample_files.read(other))
    assert timeless(rows(one, "metrics.jsonl")) == timeless(rows(other, "metrics.jsonl"))
    weights = [(folder / "hf" / "model.safetensors").read_bytes() for folder in (one, other)]
    assert weights[0] == weights[1]


def test_a_resumed_run_is_the_undisturbed_one(twin: Path, run_dir: Path) -> None:
    """Bit for bit, though its first launch was to make fewer steps."""
    train(twin, twin / "resumed", *GRPO, "algorithm.steps=2")
    train(twin, twin / "resumed", *GRPO, "resume=true")
    same_run(twin / "resumed", run_dir)


PPO = ("algorithm.advantage=gae_whitened", "algorithm.updates_per_rollout=2", "algorithm.kl_in=reward", *GRPO[:1])
PPO += ("rewards.constraint.verifier=safety",)


def test_a_resumed_run_has_its_critic_its_multiplier_and_its_responses_in_flight(twin: Path) -> None:
    partial = (*PPO, "rollout.oversample=1.5", "rollout.partial_rollout_tokens=3")
    partial += ("algorithm.importance_sampling=token_truncated", "algorithm.max_mismatch=5")
    train(twin, twin / "ppo", *partial)
    train(twin, twin / "ppo_resumed", *partial, "algorithm.steps=2")
    train(twin, twin / "ppo_resumed", *partial, "resume=true")
    same_run(twin / "ppo_resumed", twin / "ppo")
    metrics = rows(twin / "ppo", "metrics.jsonl")
    assert metrics[-1]["value/loss"] > 0
    assert metrics[-1]["constraint/multiplier"] != metrics[0]["constraint/multiplier"]
    assert any(row["staleness/max"] > 0 for row in metrics), "a response goes on from another step's"


@dataclass
class Passes:
    """What a run has done: loaded the reference, opened its weights, made passes for log-probs."""

    loads: int = 0
    swaps: int = 0
    log_probs: int = 0


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Passes:
    counted = Passes()

    def count(name: str, function: str) -> None:
        called = getattr(forward_backward, function)

        def counting(*given: Any) -> Any:
            setattr(counted, name, getattr(counted, name) + 1)
            return called(*given)

        monkeypatch.setattr(forward_backward, function, counting)

    count("loads", "load_weights")
    count("swaps", "swapped_weights")
    count("log_probs", "log_probs")
    count("log_probs", "all_log_probs")
    return counted


NO_KL = ("algorithm.kl_coefficient=0",)
TWO_UPDATES = ("algorithm.updates_per_rollout=2", "algorithm.max_mismatch=5")


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        pytest.param(NO_KL, Passes(), id="no KL"),
        pytest.param((*NO_KL, *TWO_UPDATES), Passes(log_probs=STEPS), id="no KL, two updates"),
        pytest.param(GRPO, Passes(1, STEPS, STEPS), id="KL in the loss"),
        # One under the policy and one under the reference, for both updates of a step.
        pytest.param((*GRPO, *TWO_UPDATES), Passes(1, STEPS, 2 * STEPS), id="KL in the loss, two updates"),
        pytest.param(PPO, Passes(1, STEPS, 2 * STEPS), id="KL in the reward, two updates"),
    ],
)
def test_a_step_makes_no_pass_without_a_use(
    overrides: Sequence[str], expected: Passes, twin: Path, tmp_path: Path, passes: Passes
) -> None:
    train(twin, tmp_path / "run", *overrides)
    assert passes == expected


def test_the_metric_alone_takes_the_reference_at_its_interval(twin: Path, tmp_path: Path, passes: Passes) -> None:
    """Step 2 of three. It measures what a KL of next to no weight does, and changes no other number of the run."""
    without, every_second = tmp_path / "without", tmp_path / "every_second"
    train(twin, without, *NO_KL)
    train(twin, every_second, *NO_KL, "algorithm.reference_every=2")
    assert passes == Passes(1, 1, 1)
    weighed = train(twin, tmp_path / "weighed", "algorithm.kl_coefficient=1e-9")
    measured = timeless(rows(every_second, "metrics.jsonl"))
    second = measured[1].pop("kl/reference")
    assert second == pytest.approx(rows(weighed, "metrics.jsonl")[1]["kl/reference"], rel=1e-3) and second > 1e-5
    assert measured == timeless(rows(without, "metrics.jsonl"))
    assert all("kl/reference" not in row for row in measured)
    weights = [(run / "hf" / "model.safetensors").read_bytes() for run in (without, every_second)]
    assert weights[0] == weights[1]


@pytest.fixture
def models_built(monkeypatch: pytest.MonkeyPatch) -> list[Model]:
    """The models of a run, in the order in which they are built: the policy's, the critic's."""
    built: list[Model] = []
    build = model.build

    def noting(*given: Any) -> Model:
        built.append(build(*given))
        return built[-1]

    monkeypatch.setattr(model, "build", noting)
    return built


def test_gradients_have_no_memory_while_engines_start_and_generate(
    twin: Path, tmp_path: Path, models_built: list[Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the policy's nor the critic's. The run is that in which they keep it, bit for bit."""
    held: dict[str, list[int]] = {"generate": [], "train": []}
    accumulate_gradients = forward_backward.accumulate_gradients

    class NotingEngine(Engine):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            held["start"] = [memory.gradients(each) for each in models_built]

        def generate(self, *given: Any) -> Any:
            held["generate"] += [memory.gradients(each) for each in models_built]
            return super().generate(*given)

    def noting(of_model: Model, *given: Any, **options: Any) -> dict[str, float]:
        metrics = accumulate_gradients(of_model, *given, **options)
        held["train"].append(memory.gradients(of_model))
        return metrics

    with monkeypatch.context() as patched:
        patched.setattr(forward_backward, "accumulate_gradients", noting)
        patched.setitem(globals(), "Engine", NotingEngine)
        train(twin, tmp_path / "dropped", *PPO)
    assert held["start"] == [0] and held["generate"] == [0, 0] * STEPS
    assert len(held["train"]) == 2 * 2 * STEPS and min(held["train"]) > 0
    monkeypatch.setattr(model.DistributedDataParallel, "offload_grad_buffers", lambda chunk, **options: None)
    train(twin, tmp_path / "kept", *PPO)
    assert all(memory.gradients(each) > 0 for each in models_built[2:])
    same_run(tmp_path / "dropped", tmp_path / "kept")


def test_engines_sleep_until_the_first_sync(twin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The optimiser is made meanwhile; with ``rollout.sleep`` its memory may be theirs afterwards."""
    events: list[str] = []
    build_optimizer = Policy.build_optimizer

    def building(policy: Policy, *given: Any) -> None:
        events.append("optimizer")
        build_optimizer(policy, *given)

    monkeypatch.setattr(Policy, "build_optimizer", building)
    monkeypatch.setattr(
        Rollouts, "_call_sleepers", lambda rollouts, path, tags: events.append(f"{path[1:]} {' '.join(tags)}")
    )
    train(twin, tmp_path / "run", *NO_KL, "algorithm.steps=1")
    asleep, awake = "sleep weights kv_cache", ["wake weights", "wake kv_cache"]
    assert events == [asleep, "optimizer", *awake, asleep, *awake]


def test_a_checkpoint_is_written_before_its_memory_takes_the_next(
    twin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long the files take; the copies of all are in the memory of the first."""
    events: list[str] = []
    addresses: set[int] = set()
    snapshot, write = checkpoint.snapshot, shard_files.write

    def copying(*given: Any) -> checkpoint.Snapshot:
        events.append("copied")
        taken = snapshot(*given)
        addresses.add(taken.parts[0].values.data_ptr())
        return taken

    def writing(*given: Any) -> Any:
        time.sleep(0.5)
        written = write(*given)
        events.append("written")
        return written

    monkeypatch.setattr(checkpoint, "snapshot", copying)
    monkeypatch.setattr(shard_files, "write", writing)
    train(twin, tmp_path / "run", *NO_KL, "checkpoint.every_steps=1")
    assert events == ["copied", "written"] * STEPS and len(addresses) == 1


def test_one_step_ahead_samples_come_from_the_weights_before(twin: Path) -> None:
    ahead = ("rollout.staleness=1", "algorithm.importance_sampling=token_truncated", "algorithm.max_mismatch=5")
    run_dir = train(twin, twin / "ahead", *ahead)
    metrics = rows(run_dir, "metrics.jsonl")
    assert [row["staleness/max"] for row in metrics] == [0, 1, 1]
    assert [row["tokens_per_second"] is None for row in metrics] == [False, True, True]
    versions = {(line["step"], line["weight_version"]) for line in list(sample_files.read(run_dir))}
    assert versions == {(1, 0), (2, 0), (3, 1)}
    in_turn = train(twin, twin / "in_turn")
    prompts = [
        [(line["step"], line["prompt_id"]) for line in list(sample_files.read(folder))] for folder in (run_dir, in_turn)
    ]
    assert prompts[0] == prompts[1], "the steps' prompts are the same"


def test_prompts_are_drawn_again_for_groups_whose_rewards_are_equal(twin: Path) -> None:
    """Each round of four prompts has one task, and only tasks have rewards that differ. A step of four groups takes the
    tasks of both rounds that may be drawn, and fills up with two of the others."""
    mix = {"safety": {"tests.recipes.letters.always_right": 1.0}, "general_rule": {tiny.LETTERS: 1.0}}
    rounds = ("algorithm.max_generation_batches=2", "algorithm.steps=2")
    run_dir = train(twin, twin / "rounds", *rounds, mix=mix)
    lines = list(sample_files.read(run_dir))
    assert len(lines) == 2 * PROMPTS * SAMPLES
    for number, row in enumerate(rows(run_dir, "metrics.jsonl"), 1):
        of_step = [line for line in lines if line["step"] == number]
        differing = {line["prompt_id"] for line in of_step if line["advantage"] != 0}
        assert len(differing) == 2 and all(prompt.startswith("task-") for prompt in differing)
        assert row["trained_samples"] == sum(line["advantage"] != 0 for line in of_step)
    assert len({line["prompt_id"] for line in lines if line["advantage"] != 0}) == 4, "each round has rows of its own"


def test_a_phase_begins_with_its_step_though_the_steps_before_drew_twice(twin: Path) -> None:
    """No reward differs, so that each step draws as often as it may. A run resumed from its checkpoint is the same."""
    mix = {label: {"tests.recipes.letters.always_right": 1.0} for label in MIX}
    phases = "[{from_step:0,mix:{harmful:1,benign:1}},{from_step:2,mix:{borderline:1,task:1}}]"
    options = ("algorithm.max_generation_batches=2", f"data.curriculum={phases}", *NO_KL)
    run_dir = train(twin, twin / "phases", *options, mix=mix)
    kinds = {(line["step"], line["prompt_id"].partition("-")[0]) for line in sample_files.read(run_dir)}
    first, second = ("harmful", "benign"), ("borderline", "task")
    assert kinds == {(step, kind) for step, of_step in ((1, first), (2, first), (3, second)) for kind in of_step}
    train(twin, twin / "phases_resumed", *options, "algorithm.steps=2", mix=mix)
    train(twin, twin / "phases_resumed", *options, "resume=true", mix=mix)
    same_run(twin / "phases_resumed", run_dir)


def test_a_mismatch_above_the_bound_stops_the_run_before_its_update(twin: Path) -> None:
    with pytest.raises(RuntimeError, match=r"is above algorithm\.max_mismatch=1e-09: the engine did not sample from"):
        train(twin, twin / "alarm", "algorithm.max_mismatch=1e-9")
    assert not (twin / "alarm" / "metrics.jsonl").exists() and not (twin / "alarm" / "hf").exists()


def test_a_response_without_a_reward_is_not_trained_on(twin: Path) -> None:
    mix = {label: {"tests.recipes.letters.fails_of_odd_length": 1.0} for label in MIX}
    options = ("rewards.client.max_failed=1.0", "algorithm.steps=1")
    run_dir = train(twin, twin / "failed", *options, mix=mix)
    lines = list(sample_files.read(run_dir))
    (row,) = rows(run_dir, "metrics.jsonl")
    failed = [line for line in lines if len(line["response"]) % 2]
    assert 0 < len(failed) < len(lines)
    assert all(line["reward"] is None and line["advantage"] == 0 for line in failed)
    assert row["reward_failed"] == pytest.approx(len(failed) / len(lines))
    judged = [line for line in lines if line not in failed]
    assert row["reward/mean"] == pytest.approx(np.mean([line["reward"] for line in judged]))
    tokens = sum(line["tokens"] for line in lines)
    assert row["masked_fraction"] == pytest.approx(sum(line["tokens"] for line in failed) / tokens)
    assert row["forced_tokens"] == 0
