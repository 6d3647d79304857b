"""A batch of samples as all trainer ranks see it: rank 0 has the engines make it in the background, all collect it."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch.distributed as dist

from megatron_ext.collectives import from_rank_zero
from rollout import sampler
from rollout.engine import EngineDied
from rollout.sample import Request, Sample, Sampling

JUDGED_AT_ONCE = 32  # calls of ``on_sample`` that may wait for a verifier at the same time


class Generation:
    """Requests that the engines are working on since this was made; :meth:`collect` waits for the samples.

    Every rank makes one; ``engines`` is empty but on rank 0. There ``on_sample`` gets each finished sample at once, in
    a thread, while others are still being made; its result (JSON) goes with the sample. With ``enough``, only until so
    many prompts have all their samples.
    """

    def __init__(
        self,
        engines: Sequence[sampler.Generator],
        requests: Sequence[Request],
        sampling: Sampling,
        on_sample: Callable[[Sample], Any] | None = None,
        enough: int | None = None,
    ) -> None:
        self.engines, self.requests, self.sampling = engines, requests, sampling
        self.on_sample, self.enough = on_sample, enough
        self.samples: dict[tuple[str, int], Sample] = {}
        self.judged: dict[tuple[str, int], Future[Any]] = {}
        self.judges = ThreadPoolExecutor(JUDGED_AT_ONCE, "on_sample")
        self.restarted = False
        self._start()

    def collect(self, group: dist.ProcessGroup, resync: Callable[[], object]) -> tuple[list[Sample], list[Any]]:
        """Collective over ``group`` (gloo): the samples in the order of the requests, and what ``on_sample`` said of
        each (None for none).

        When no engine is left, every rank calls ``resync``, which starts and syncs them, and what is missing is asked
        again: same seeds, by the weights of that sync. Raises on every rank what an engine or ``on_sample`` raised, and
        EngineDied when all engines die a second time without having finished anything.
        """
        while from_rank_zero(self._lost, group):
            resync()
            self._start()
        samples, results = from_rank_zero(self._outcome, group)
        self.judges.shutdown()
        return [Sample.from_json(sample) for sample in samples], results

    def _start(self) -> None:
        """Have the missing samples made by a thread of rank 0."""
        self.finished_before = len(self.samples)
        if self.engines:
            worker = ThreadPoolExecutor(1, "generation")
            self.running = worker.submit(self._generate)
            worker.shutdown(wait=False)

    def _generate(self) -> None:
        for sample in sampler.stream(self.engines, self.requests, self.sampling, self.enough, self.samples.keys()):
            self.samples[sample.key] = sample
            if self.on_sample is not None and sample.finish_reason != "unfinished":
                self.judged[sample.key] = self.judges.submit(self.on_sample, sample)

    def _lost(self) -> bool:
        """Wait for the thread; true when all engines died and it is worth starting them again."""
        try:
            self.running.result()
            return False
        except EngineDied:
            if self.restarted and len(self.samples) == self.finished_before:
                raise
            self.restarted = True
            return True

    def _outcome(self) -> tuple[list[dict[str, Any]], list[Any]]:
        made = [request for request in self.requests if request.key in self.samples]
        samples = sampler.in_order(made, self.samples.values())
        results = [self.judged[sample.key].result() if sample.key in self.judged else None for sample in samples]
        return [sample.to_json() for sample in samples], results
