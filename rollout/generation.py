"""Generation of a batch of responses: ranks with engines generate it in the background, and all ranks collect it.

The tokens of a response stay on the rank whose engines generated them. The other ranks receive only the columns that
describe the response (:func:`without_tokens`).
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

# Returns the verdicts on a batch of one response: verifier name → plain JSON.
OnResponse = Callable[[TokenBatch], dict[str, Any]]

# The data set that the prompts come from.
TRAINING, HELD_OUT = "training", "held out"

# The maximum number of concurrent calls of ``on_response``, which may wait for a verifier.
MAX_CONCURRENT_VERDICTS = 32
# The maximum number of concurrent calls of an environment.
MAX_CONCURRENT_REPLIES = 32


@dataclass(frozen=True)
class Fleet:
    """The engines of all nodes, from the point of view of one rank."""

    # The engines of this rank. On each node one rank has all engines of the node, and the other ranks have none.
    engines: Sequence[sampler.Generator]
    # The index of this rank's node among ``nodes``. Every node has the same number of engines.
    node: int = 0
    nodes: int = 1
    # The environment that replies between the model's turns, on ranks that have engines.
    turns: Turns | None = None
    # Set where the engines run on separate nodes.
    engine_nodes: EngineNodes | None = None


class Generation:
    """Requests that the engines work on from construction on; :meth:`collect` waits for the responses.

    Every rank constructs one. On each node, the rank that has the engines sends them the node's share of the requests
    (``sampler.assign``). On that rank, ``on_response`` is called with each finished response at once, in a thread,
    while others are still being generated. Its verdicts become a column of the batch. With ``num_complete``, generation
    stops when that many prompts have all their responses.

    With an environment, the responses are generated in rounds. A round is one turn of each unfinished response. So the
    sequences that run concurrently depend on the requests alone, and not on how long the environment takes; the same
    holds for every bit of the responses.

    Where the engines run on separate nodes, the processes there construct a Generation too. The verdicts then come from
    their ``on_response``, the one for the data set ``rows``.
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
        # Responses whose next turn is still to be generated.
        self.partial: dict[Key, TokenBatch] = {}
        self.verdicts: dict[Key, Future[dict[str, Any]]] = {}
        self.judges = ThreadPoolExecutor(MAX_CONCURRENT_VERDICTS, "on_response")
        self.replies = ThreadPoolExecutor(MAX_CONCURRENT_REPLIES, "environment")
        self.restarted = False
        self._start()

    def collect(self, group: dist.ProcessGroup, resync: Callable[[], object]) -> TokenBatch:
        """Collective over ``group`` (gloo): return the responses in the order of the requests.

        Each rank holds the tokens of the responses that its engines generated.

        When all engines of a node have died, every rank calls ``resync``, which starts the engines and syncs their
        weights. The missing responses are then requested again, with the same seeds and the weights of that sync.

        Where the engines run on separate nodes, the processes there take part and hand the tokens to the trainer's
        ranks. ``group`` is then not used.

        Raises on every rank what an engine or ``on_response`` raised. Raises EngineDied when all engines of a node die
        again without having made progress since the restart.
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
        """Start a thread that generates the missing responses, if this rank has requests."""
        self.amount_before = self._amount()
        if len(self.requests):
            worker = ThreadPoolExecutor(1, "generation")
            self.running = worker.submit(self._generate)
            worker.shutdown(wait=False)

    def _generate(self) -> None:
        # Each iteration is one round of turns. Without an environment there is one round.
        while True:
            waiting: list[Future[TokenBatch]] = []
            requests = self._next_turns()
            responses = sampler.stream(self.engines, requests, self.sampling, self.num_complete, self.responses.keys())
            try:
                for response in responses:
                    if response.finish_reasons == ["turn"] and self.turns is not None:
                        waiting.append(self.replies.submit(self.turns.reply, response, self.sampling.max_tokens))
                    else:
                        self._keep(response)
            finally:
                # Turns that have ended are kept also when an engine dies.
                for reply in waiting:
                    self._keep(reply.result())
            if not waiting:
                return

    def _next_turns(self) -> TokenBatch:
        """Return the requests of the next round.

        A request that has had a turn continues from the response so far, with a new seed.
        """
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
        """Return a measure of progress: the number of finished responses, and of tokens in the unfinished ones."""
        return len(self.responses), sum(len(response.response_tokens) for response in self.partial.values())

    def _lost_all_engines(self) -> bool:
        """Wait for the generating thread. Return whether all its engines died and should be started again.

        Raises EngineDied when they died again without having made progress since the restart.
        """
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
        """Return this rank's responses in the order of the requests, with their verdicts, and drop them here."""
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
    """Return the batch without the tokens of prompts and responses, for the ranks that already have the prompts."""
    names = [Prompt(prompt.prompt_id, np.empty(0, np.int32)) for prompt in batch.prompts]
    return replace(batch.without_tokens(), prompts=names)
