"""A batch of samples as all ranks see it: the engines' ranks have it made in the background, all collect it."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch.distributed as dist

from megatron_ext.collectives import on_all_ranks
from rollout import sampler
from rollout.engine import EngineDied
from rollout.environment import Turns
from rollout.sample import Request, Sample, Sampling


@dataclass(frozen=True)
class Fleet:
    """The engines of all nodes as one rank sees them: its own (on a node one rank has all, the others none), and which
    of the ``nodes`` it is on. Every node has as many engines. ``turns``: the environment that takes part, where the
    engines are."""

    engines: Sequence[sampler.Generator]
    node: int = 0
    nodes: int = 1
    turns: Turns | None = None


JUDGED_AT_ONCE = 32  # calls of ``on_sample`` that may wait for a verifier at the same time
REPLIES_AT_ONCE = 32  # of an environment


class Generation:
    """Requests that the engines are working on since this was made; :meth:`collect` waits for the samples.

    Every rank makes one. A node's engines get the node's share of the requests (``sampler.assign``), from the rank that
    has them; there ``on_sample`` gets each finished sample at once, in a thread, while others are still being made, and
    its result (JSON) goes with the sample. With ``enough``, only until so many prompts have all their samples.

    With an environment the samples are made in rounds, a turn of each that is not finished: what runs side by side, and
    with it every bit, then depends on the requests alone, and not on how long the environment takes.
    """

    def __init__(
        self,
        fleet: Fleet,
        requests: Sequence[Request],
        sampling: Sampling,
        on_sample: Callable[[Sample], Any] | None = None,
        enough: int | None = None,
    ) -> None:
        self.engines, self.requests, self.turns = fleet.engines, requests, fleet.turns
        self.sampling = replace(sampling, stops=tuple(self.turns.environment.stops)) if self.turns else sampling
        self.on_sample = on_sample
        parts = sampler.assign(requests, fleet.nodes, sampling)
        self.own = parts[fleet.node] if fleet.engines else []
        self.enough = enough
        if enough is not None:
            prompts = [len({request.prompt_id for request in part}) for part in parts]
            self.enough = sampler.shares(enough, prompts)[fleet.node]
        self.samples: dict[tuple[str, int], Sample] = {}
        self.begun: dict[tuple[str, int], Sample] = {}  # those whose next turn is to be made
        self.judged: dict[tuple[str, int], Future[Any]] = {}
        self.judges = ThreadPoolExecutor(JUDGED_AT_ONCE, "on_sample")
        self.replies = ThreadPoolExecutor(REPLIES_AT_ONCE, "environment")
        self.restarted = False
        self._start()

    def collect(self, group: dist.ProcessGroup, resync: Callable[[], object]) -> tuple[list[Sample], list[Any]]:
        """Collective over ``group`` (gloo): the samples in the order of the requests, and what ``on_sample`` said of
        each (None for none).

        When a node has no engine left, every rank calls ``resync``, which starts and syncs them, and what is missing is
        asked again: same seeds, by the weights of that sync. Raises on every rank what an engine or ``on_sample``
        raised, and EngineDied when a node's engines all die a second time without having finished anything.
        """
        while any(on_all_ranks(self._lost, group)):
            resync()
            self._start()
        gathered = [pair for rank in on_all_ranks(self._outcome, group) for pair in rank]
        self.judges.shutdown()
        self.replies.shutdown()
        found = [(Sample.from_json(sample), result) for sample, result in gathered]
        results = {sample.key: result for sample, result in found}
        made = [request for request in self.requests if request.key in results]
        samples = sampler.in_order(made, (sample for sample, _ in found))
        return samples, [results[sample.key] for sample in samples]

    def _start(self) -> None:
        """Have the missing samples made by a thread."""
        self.made_before = self._made()
        if self.own:
            worker = ThreadPoolExecutor(1, "generation")
            self.running = worker.submit(self._generate)
            worker.shutdown(wait=False)

    def _generate(self) -> None:
        while True:  # a round of turns; without an environment there is one
            waiting: list[Future[Sample]] = []
            requests = [self._next_turn(request) for request in self.own]
            try:
                for sample in sampler.stream(self.engines, requests, self.sampling, self.enough, self.samples.keys()):
                    if sample.finish_reason == "turn" and self.turns is not None:
                        waiting.append(self.replies.submit(self.turns.go_on, sample, self.sampling.max_tokens))
                    else:
                        self._keep(sample)
            finally:  # an engine's death takes no turn that has ended
                for reply in waiting:
                    self._keep(reply.result())
            if not waiting:
                return

    def _next_turn(self, request: Request) -> Request:
        """The request, going on from the turns there are, with noise of its own."""
        if (begun := self.begun.get(request.key)) is None:
            return request
        seed = sampler.request_seed(request.seed, len(begun.response_token_ids), *request.key)
        return replace(request, begun=begun, seed=seed)

    def _keep(self, sample: Sample) -> None:
        if self.turns is not None and sample.finish_reason == "unfinished":
            self.begun[sample.key] = sample
            return
        self.samples[sample.key] = sample
        if self.on_sample is not None and sample.finish_reason != "unfinished":
            self.judged[sample.key] = self.judges.submit(self.on_sample, sample)

    def _made(self) -> tuple[int, int]:
        """How much there is: finished samples, and tokens of those with turns to come."""
        return len(self.samples), sum(len(sample.response_token_ids) for sample in self.begun.values())

    def _lost(self) -> bool:
        """Wait for the thread; true when all its engines died and it is worth starting them again."""
        if not self.own:
            return False
        try:
            self.running.result()
            return False
        except EngineDied:
            if self.restarted and self._made() == self.made_before:
                raise
            self.restarted = True
            return True

    def _outcome(self) -> list[tuple[dict[str, Any], Any]]:
        """This rank's samples, each with what ``on_sample`` said of it."""
        return [
            (sample.to_json(), self.judged[key].result() if key in self.judged else None)
            for key, sample in self.samples.items()
        ]
