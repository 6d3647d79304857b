"""The training that ``benchmarks.loop`` times: a normal run in which a yardstick repeats the work of a timed phase.

Import this module after ``megatron_ext.platform.activate``.
"""

import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch.distributed as dist

from benchmarks import yardsticks
from benchmarks.yardsticks import Yardstick
from megatron_ext.batch import TokenBatch
from megatron_ext.collectives import all_gather_json, from_rank_zero
from megatron_ext.micro_batches import MicroBatches
from recipes.config import Config
from recipes.run.clock import PhaseClock
from recipes.run.watchdog import Watchdog
from recipes.training import rl, sft
from recipes.training.policy import Policy
from recipes.training.setup import open_training
from recipes.training.stages import WARM_START
from rollout.engine import Engine
from rollout.sampler import Key
from rollout.sampling import Sampling

References = list[tuple[int, list[float]]]  # (index of a response, its log-probs under the reference)


class RecordingEngine:
    """An engine that keeps the requests of its last batch and the response to each of them."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.settings = engine.settings
        self.alive = True
        self.requests: TokenBatch | None = None
        self.sampling: Sampling | None = None
        self.responses: dict[Key, TokenBatch] = {}

    def generate(
        self, requests: TokenBatch, sampling: Sampling, num_complete: int | None = None
    ) -> Iterator[TokenBatch]:
        self.requests = requests
        self.sampling = sampling
        self.responses = {}
        for response in self.engine.generate(requests, sampling, num_complete):
            self.responses[response.keys[0]] = response
            yield response


@dataclass
class RecordingPolicy(Policy):
    """A policy that keeps its last training batch, and this rank's micro-batches of it."""

    last_batch: TokenBatch | None = None
    last_micro_batches: MicroBatches | None = None

    def micro_batches_of_own(self, batch: TokenBatch, group: dist.ProcessGroup) -> MicroBatches:
        self.last_batch = batch
        self.last_micro_batches = super().micro_batches_of_own(batch, group)
        return self.last_micro_batches


class MeasuredClock(PhaseClock):
    """The run's clock. After each phase, when it has stopped, it calls ``after_phase`` with the phase's name."""

    def __init__(self, watchdog: Watchdog, after_phase: Callable[[str], None]) -> None:
        super().__init__(watchdog)
        self.after_phase = after_phase

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        with super().phase(name):
            yield
        self.after_phase(name)


@dataclass
class Measurement:
    """Makes the yardsticks repeat what the run has just done, while all ranks wait.

    ``recorder`` and ``yardsticks`` (by name) exist on rank 0 only. ``answers`` exists on every rank and has one entry
    for each step.
    """

    control: dist.ProcessGroup
    policy: RecordingPolicy
    recorder: RecordingEngine | None
    yardsticks: dict[str, Yardstick]
    answers: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: {"generation": [], "training": []})

    def after_phase(self, name: str) -> None:
        """Collective. Runs the yardstick of the phase, if it has one."""
        if name == "generate":
            self.answers["generation"].append(from_rank_zero(self._generate_bare, self.control))
        elif name == "train":
            references = all_gather_json(self._references(), self.control)
            self.answers["training"].append(from_rank_zero(lambda: self._train_plain(references), self.control))

    def _generate_bare(self) -> dict[str, Any]:
        """Bare vLLM answers the engine's last requests. Returns its seconds, and how its responses compare to ours."""
        assert self.recorder is not None
        requests = self.recorder.requests
        sampling = self.recorder.sampling
        assert requests is not None and sampling is not None
        bare_requests = [
            {"prompt_token_ids": requests.prompt(i).token_ids.tolist(), "seed": int(requests.seeds[i])}
            for i in range(len(requests))
        ]
        answer = self.yardsticks["generation"].ask({"requests": bare_requests, "sampling": asdict(sampling)})
        ours = [self.recorder.responses[key].response_tokens.tolist() for key in requests.keys]
        bare = answer["responses"]
        return {
            "bare_seconds": answer["seconds"],
            "tokens": sum(map(len, ours)),
            "bare_tokens": sum(map(len, bare)),
            "samples": len(ours),
            "identical_samples": sum(tokens == bare_tokens for tokens, bare_tokens in zip(ours, bare, strict=True)),
        }

    def _references(self) -> References:
        """The reference log-probs of this rank's micro-batches. Only the last pipeline stage has them."""
        references: References = []
        assert self.policy.last_micro_batches is not None
        for micro_batch in self.policy.last_micro_batches:
            if "reference" in micro_batch.values:
                log_probs = micro_batch.values["reference"].split(micro_batch.lengths.tolist())
                for i, response_log_probs in zip(micro_batch.indices, log_probs, strict=True):
                    references.append((i, response_log_probs.tolist()))
        return references

    def _train_plain(self, references: list[References]) -> dict[str, Any]:
        """Plain transformers makes the same update. ``references`` has the reference log-probs of all ranks."""
        batch = self.policy.last_batch
        assert batch is not None
        reference = dict(itertools.chain.from_iterable(references))
        columns = {"logprobs": batch.logprobs, "loss_mask": batch.loss_mask.astype(float)}
        columns |= {name: batch.values(name) for name in (*batch.columns, *batch.response_columns)}
        sequences = []
        for i in range(len(batch)):
            tokens = batch.tokens_of(i)
            values = {name: column[tokens].tolist() for name, column in columns.items()}
            sequences.append(
                {
                    "prompt": batch.prompt(i).token_ids.tolist(),
                    "response": batch.response_tokens[tokens].tolist(),
                    "values": values | {"reference": reference[i]},
                }
            )
        return self.yardsticks["training"].ask({"sequences": sequences})


def run(config: Config) -> dict[str, list[dict[str, Any]]] | None:
    """Collective. Trains the demo's stages before RL, then RL with yardsticks. Returns their answers on rank 0."""
    with open_training(config) as training, ExitStack() as stack:
        this_run = training.run
        rollouts = training.rollouts
        assert rollouts is not None
        if "sft" in config.stage.trains:
            with this_run.display.stage("SFT warm start"):
                sft.fit(training, this_run.part(WARM_START))
        start = this_run.folder / "start"
        this_run.clock.watchdog.beat("export")
        training.policy.export(start)

        recorder = None
        running_yardsticks: dict[str, Yardstick] = {}
        if this_run.rank == 0:
            logs = this_run.folder / "logs"
            recorder = RecordingEngine(rollouts.engines[0])
            rollouts = replace(rollouts, engines=[recorder])  # type: ignore[list-item]
            settings = replace(recorder.settings, model=str(start))
            running_yardsticks["training"] = yardsticks.training(
                config, settings, start, logs / "plain_transformers.log"
            )
            stack.enter_context(running_yardsticks["training"])
            running_yardsticks["generation"] = yardsticks.generation(settings, start, logs / "bare_vllm.log")
            stack.enter_context(running_yardsticks["generation"])

        policy = RecordingPolicy(**vars(training.policy))
        measurement = Measurement(this_run.control, policy, recorder, running_yardsticks)
        clock = MeasuredClock(this_run.clock.watchdog, measurement.after_phase)
        measured = replace(training, policy=policy, rollouts=rollouts)
        rl.fit(measured, replace(this_run, clock=clock), start)
        return measurement.answers if this_run.rank == 0 else None
