"""The session of ``benchmarks.loop``: the run's own, and behind a timed phase the yardstick does the same work.

Import it after ``megatron_ext.platform.activate``.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from benchmarks import yardsticks
from benchmarks.yardsticks import Yardstick
from megatron_ext.collectives import all_gather_json, from_rank_zero
from megatron_ext.packing import MicroBatch, PackedSequence
from recipes.config import Config
from recipes.training import rl, sft
from recipes.training.session import Session, open_session
from recipes.training.stages import warm_start
from rollout.engine import Engine
from rollout.sample import Request, Sample, Sampling


class RecordingEngine:
    """An engine that remembers its last batch: what was asked, and the response to each (prompt_id, sample_index)."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.settings, self.alive = engine, engine.settings, True
        self.question: dict[str, Any] = {}
        self.responses: dict[tuple[str, int], list[int]] = {}

    def generate(self, requests: Sequence[Request], sampling: Sampling, enough: int | None = None) -> Iterator[Sample]:
        self.question = {"requests": [request.to_json() for request in requests], "sampling": asdict(sampling)}
        self.responses = {}
        for sample in self.engine.generate(requests, sampling, enough):
            self.responses[sample.prompt_id, sample.sample_index] = list(sample.response_token_ids)
            yield sample


@dataclass
class MeasuredSession(Session):
    """``yardsticks`` (by name) and ``recorder`` exist on rank 0; ``answers`` holds one entry per step on every rank."""

    yardsticks: dict[str, Yardstick] = field(default_factory=dict)
    recorder: RecordingEngine | None = None
    answers: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: {"generation": [], "training": []})
    sequences: list[PackedSequence] = field(default_factory=list)
    packed: list[MicroBatch] = field(default_factory=list)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """The run's phase; then, off the clock and with all ranks waiting, the yardstick of that phase."""
        with super().phase(name):
            yield
        if name == "generate":
            self.answers["generation"].append(from_rank_zero(self._generate_bare, self.control))
        elif name == "train":
            references = all_gather_json(self._references(), self.control)
            self.answers["training"].append(from_rank_zero(lambda: self._train_plain(references), self.control))

    def micro_batches(self, sequences: list[PackedSequence], together: int = 1) -> list[MicroBatch]:
        self.sequences, self.packed = sequences, super().micro_batches(sequences, together)
        return self.packed

    def _generate_bare(self) -> dict[str, Any]:
        assert self.recorder is not None
        answer = self.yardsticks["generation"].ask(self.recorder.question)
        asked = [(r["prompt_id"], r["sample_index"]) for r in self.recorder.question["requests"]]
        ours = [self.recorder.responses[key] for key in asked]
        return {
            "bare_seconds": answer["seconds"],
            "tokens": sum(map(len, ours)),
            "bare_tokens": sum(map(len, answer["responses"])),
            "samples": len(ours),
            "identical_samples": sum(a == b for a, b in zip(ours, answer["responses"], strict=True)),
        }

    def _references(self) -> list[tuple[int, list[float]]]:
        """(sequence, its reference log-probs) of this rank's micro-batches; none off the last pipeline stage."""
        return [
            (index, values.tolist())
            for batch in self.packed
            if "reference" in batch.values
            for index, values in zip(batch.indices, batch.values["reference"].split(batch.lengths), strict=True)
        ]

    def _train_plain(self, references: list[list[tuple[int, list[float]]]]) -> dict[str, Any]:
        found = {index: values for rank in references for index, values in rank}
        sequences = [
            {"prompt": s.prompt, "response": s.response, "values": s.values | {"reference": found[i]}}
            for i, s in enumerate(self.sequences)
        ]
        return self.yardsticks["training"].ask({"sequences": sequences})


def run(config: Config) -> dict[str, list[dict[str, Any]]] | None:
    """Collective: the demo's stages up to RL, then its RL steps with yardsticks; their answers, on rank 0 only."""
    with open_session(config) as session, ExitStack() as stack:
        if "sft" in config.stage.trains:
            with session.display.stage("SFT warm start"):
                sft.fit(warm_start(session))
        start = session.run_dir / "start"
        session.export(start)
        measured = MeasuredSession(**vars(session))
        if session.rank == 0:
            logs = session.run_dir / "logs"
            engine = session.engines[0]
            settings = replace(engine.settings, model=str(start))
            measured.recorder = RecordingEngine(engine)
            measured.engines = [measured.recorder]  # type: ignore[list-item]
            measured.yardsticks = {
                "training": yardsticks.training(config, settings, start, logs / "plain_transformers.log"),
                "generation": yardsticks.generation(settings, start, logs / "bare_vllm.log"),
            }
            for yardstick in measured.yardsticks.values():
                stack.enter_context(yardstick)
        rl.fit(measured, reference=start)
        return measured.answers if session.rank == 0 else None
