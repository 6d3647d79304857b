"""A batch of responses as all ranks see it: the ranks that have engines make it in the background, all collect it.

Tokens stay where they were made: the other ranks get what is said of each response.
"""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch.distributed as dist

from megatron_ext import batch as batches
from megatron_ext.batch import UNFINISHED, Prompt, TokenBatch
from megatron_ext.collectives import on_all_ranks, on_all_ranks_bytes
from rollout import sampler
from rollout.engine import EngineDied
from rollout.engine_nodes import COLLECT, GENERATE, EngineNodes
from rollout.environment import Turns
from rollout.sampler import Key
from rollout.sampling import Sampling

# Gives the verdicts on a batch of one response: verifier name → plain JSON.
OnResponse = Callable[[TokenBatch], dict[str, Any]]

TRAINING, HELD_OUT = "training", "held out"  # whose rows the prompts are

MAX_CONCURRENT_VERDICTS = 32  # calls of ``on_response`` that may wait for a verifier at the same time
MAX_CONCURRENT_REPLIES = 32  # of an environment


@dataclass(frozen=True)
class Fleet:
    """The engines of all nodes as one rank sees them.

    ``engines``: those of this rank; on each node one rank has all, the others none. ``node`` of ``nodes``: every node
    has as many engines. ``turns``: the environment that takes part, on ranks that have engines. ``engine_nodes``: where
    the engines are on nodes of their own.
    """

    engines: Sequence[sampler.Generator]
    node: int = 0
    nodes: int = 1
    turns: Turns | None = None
    engine_nodes: EngineNodes | None = None


class Generation:
    """Requests that the engines are working on since this was made; :meth:`collect` waits for the responses.

    Every rank makes one. A node's engines get the node's share of the requests (``sampler.assign``), from the rank that
    has them. There ``on_response`` gets each finished response at once, in a thread, while others are still being
    generated, and its verdicts become a column of the batch. With ``num_complete``, only until so many prompts have all
    their responses.

    With an environment the responses are made in rounds, one turn of each that is not finished: what runs side by
    side, and with it every bit, depends on the requests alone, not on how long the environment takes.

    Where the engines are on nodes of their own, the processes there make one too, and theirs is the ``on_response`` of
    the data of ``rows`` that gives the verdicts.
    """

    def __init__(
        self,
        fleet: Fleet,
        requests: TokenBatch,
        sampling: Sampling,
        on_response: OnResponse | None = None,
        num_complete: int | None = None,
        rows: str = TRAINING,
    ) -> None:
        self.engine_nodes = fleet.engine_nodes
        if self.engine_nodes is not None:
            asked = {"sampling": asdict(sampling), "num_complete": num_complete, "rows": rows}
            self.engine_nodes.order(GENERATE, requests, **asked)
        self.engines = fleet.engines
        self.turns = fleet.turns
        self.keys = requests.keys
        self.prompts = {prompt.prompt_id: prompt for prompt in requests.prompts}
        self.sampling = sampling
        if self.turns is not None:
            self.sampling = replace(sampling, stops=tuple(self.turns.environment.stops))
        self.on_response = on_response
        parts = [requests.select(indices) for indices in sampler.assign(requests, fleet.nodes, sampling)]
        self.requests = parts[fleet.node] if fleet.engines else requests.select([])
        self.num_complete = num_complete
        if num_complete is not None:
            self.num_complete = sampler.shares(num_complete, [len(part.prompts) for part in parts])[fleet.node]
        self.responses: dict[Key, TokenBatch] = {}
        self.partial: dict[Key, TokenBatch] = {}  # responses whose next turn is still to be made
        self.verdicts: dict[Key, Future[dict[str, Any]]] = {}
        self.judges = ThreadPoolExecutor(MAX_CONCURRENT_VERDICTS, "on_response")
        self.replies = ThreadPoolExecutor(MAX_CONCURRENT_REPLIES, "environment")
        self.restarted = False
        self._start()

    def collect(self, group: dist.ProcessGroup, resync: Callable[[], object]) -> TokenBatch:
        """Collective over ``group`` (gloo): the responses in the order of the requests. Each rank holds the tokens of
        those that its engines made.

        When a node has no engine left, every rank calls ``resync``, which starts and syncs them, and what is missing is
        asked again: same seeds, by the weights of that sync. Raises on every rank what an engine or ``on_response``
        raised, and EngineDied when a node's engines all die a second time without having finished anything.

        Where the engines are on nodes of their own, the processes there take part, and hand the tokens to ranks of the
        trainer; ``group`` is not used.
        """
        if self.engine_nodes is not None:
            group = self.engine_nodes.group
            self.engine_nodes.order(COLLECT)
        while any(on_all_ranks(self._lost_all_engines, group)):
            resync()
            self._start()
        finished: list[TokenBatch] = []

        def of_this_rank() -> bytes:
            finished.append(self._finished())
            return without_tokens(finished[0]).to_bytes()

        shares = on_all_ranks_bytes(of_this_rank, group)
        self.judges.shutdown()
        self.replies.shutdown()
        parts = [self._with_prompts(TokenBatch.from_bytes(share)) for share in shares]
        parts[dist.get_rank(group)] = finished[0]
        batch = sampler.in_order(self.keys, parts)
        return batch if self.engine_nodes is None else self.engine_nodes.to_trainers(batch)

    def _start(self) -> None:
        """Start a thread that generates the missing responses."""
        self.amount_before = self._amount()
        if len(self.requests):
            worker = ThreadPoolExecutor(1, "generation")
            self.running = worker.submit(self._generate)
            worker.shutdown(wait=False)

    def _generate(self) -> None:
        while True:  # a round of turns; without an environment there is one
            waiting: list[Future[TokenBatch]] = []
            requests = self._next_turns()
            responses = sampler.stream(self.engines, requests, self.sampling, self.num_complete, self.responses.keys())
            try:
                for response in responses:
                    if response.finish_reasons == ["turn"] and self.turns is not None:
                        waiting.append(self.replies.submit(self.turns.reply, response, self.sampling.max_tokens))
                    else:
                        self._keep(response)
            finally:  # an engine's death takes no turn that has ended
                for reply in waiting:
                    self._keep(reply.result())
            if not waiting:
                return

    def _next_turns(self) -> TokenBatch:
        """The requests; those that have had a turn go on from it, with noise of their own."""
        if not self.partial:
            return self.requests
        seeds = dict(zip(self.requests.keys, self.requests.seeds.tolist(), strict=True))
        rows = []
        for i, key in enumerate(self.requests.keys):
            if key not in self.partial:
                rows.append(self.requests.select([i]))
                continue
            response = self.partial[key]
            seed = sampler.request_seed(seeds[key], len(response.response_tokens), *key)
            rows.append(replace(response, seeds=np.array([seed], np.int64)))
        return batches.concatenate(rows)

    def _keep(self, response: TokenBatch) -> None:
        (key,) = response.keys
        unfinished = response.finish_reasons == [UNFINISHED]
        if self.turns is not None and unfinished:
            self.partial[key] = response
            return
        self.responses[key] = response
        if self.on_response is not None and not unfinished:
            self.verdicts[key] = self.judges.submit(self.on_response, response)

    def _amount(self) -> tuple[int, int]:
        """How much there is: finished responses, and tokens of those with turns to come."""
        return len(self.responses), sum(len(response.response_tokens) for response in self.partial.values())

    def _lost_all_engines(self) -> bool:
        """Wait for the thread; true when all its engines died and it is worth starting them again."""
        if not len(self.requests):
            return False
        try:
            self.running.result()
            return False
        except EngineDied:
            if self.restarted and self._amount() == self.amount_before:
                raise
            self.restarted = True
            return True

    def _finished(self) -> TokenBatch:
        """This rank's responses in the order of the requests, with their verdicts; they are not kept here."""
        finished = batches.concatenate(list(self._with_verdicts()))
        self.responses = {}
        return finished

    def _with_prompts(self, batch: TokenBatch) -> TokenBatch:
        return replace(batch, prompts=[self.prompts[prompt.prompt_id] for prompt in batch.prompts])

    def _with_verdicts(self) -> Iterable[TokenBatch]:
        for key in self.keys:
            if key in self.responses:
                verdicts = self.verdicts[key].result() if key in self.verdicts else {}
                yield replace(self.responses[key], verdicts=[verdicts], prompts=[self.prompts[key[0]]])


def without_tokens(batch: TokenBatch) -> TokenBatch:
    """What the ranks get that have the prompts and not the responses."""
    names = [Prompt(prompt.prompt_id, np.empty(0, np.int32)) for prompt in batch.prompts]
    return replace(batch.without_tokens(), prompts=names)
