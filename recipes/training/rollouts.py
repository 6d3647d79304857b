"""The rollouts on this rank: the engines with the policy's weights, their responses, and the verdicts on them."""

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch.distributed as dist

from megatron_ext.batch import Prompt, TokenBatch
from megatron_ext.collectives import all_gather_json, on_all_ranks
from megatron_ext.routing import everywhere, holders
from rewards import mixing
from rewards.client import Client
from rewards.verdict import Failure, Row, Verifier, to_json
from rollout import sampler
from rollout.engine import Engine
from rollout.engine_nodes import ALIVE, SERVER_COUNTS, SYNC, EngineNodes
from rollout.environment import Turns, segments
from rollout.generation import HELD_OUT, Fleet, Generation, OnResponse
from rollout.sampling import Sampling
from rollout.settings import RolloutConfig
from rollout.thinking import whole_text
from rollout.weight_sync.sync import WeightSync


@dataclass
class Rollouts:
    """The engines, verifiers and weight sync of this rank, and the methods that all ranks call together.

    ``engines``, ``verifiers``, ``client`` and ``turns`` exist on the first rank of each node. Elsewhere they are empty
    or None.

    Where the engines are on nodes of their own, each process there has a Rollouts too. It calls the same methods by
    order of the trainer's rank 0 (``engine_node``).
    """

    config: RolloutConfig
    seed: int
    tokenizer: Any
    engines: list[Engine]
    # None where the engines read their weights from model.path when they start.
    weight_sync: WeightSync | None
    # A gloo group of all ranks.
    control: dist.ProcessGroup
    # This rank's node among the nodes that have engines, and the number of these nodes.
    node: int
    nodes: int
    verifiers: dict[str, Verifier]
    # The client of the verifiers' servers.
    client: Client | None
    # The environment that answers responses.
    turns: Turns | None
    # Whether the judges' servers sleep while engines and trainer work, and judge a complete batch.
    judges_share_gpus: bool
    # Frees the trainer's memory for the engines.
    make_room: Callable[[], None]
    # Gets the name of a phase that makes progress.
    heartbeat: Callable[[str], None]
    # Gets the name of an engine that died and is restarted.
    on_restart: Callable[[str], None]
    # Not None where the engines are on nodes of their own.
    engine_nodes: EngineNodes | None = None
    # The version of the weights in the engines.
    version: int = 0
    # Whether the engines have been put to sleep since the last sync.
    asleep: bool = False

    @property
    def group(self) -> dist.ProcessGroup:
        """The gloo group of all processes that take part in rollouts: the trainer's ranks and the engines' nodes."""
        return self.control if self.engine_nodes is None else self.engine_nodes.group

    def order(self, name: str, **arguments: Any) -> None:
        """Have the processes of the engines' nodes, if there are any, call the same method (``EngineNodes.order``)."""
        if self.engine_nodes is not None:
            self.engine_nodes.order(name, **arguments)

    # Weights and sleep

    def sync_weights(self, version: int) -> int:
        """Collective: update every engine to the policy's weights and return the number of bytes placed.

        ``version`` is the number of RL steps that the weights have been trained for, so that the responses of a
        resumed run have the same version. Engines that died are restarted first.
        """
        self.heartbeat("sync")
        self.order(SYNC, version=version)
        on_all_ranks(self.make_room, self.group)
        restarted = on_all_ranks(self._prepare_engines, self.group)
        placed = 0
        if self.weight_sync is not None:
            if any(restarted):
                self.weight_sync.attach(self.engines)
            placed = self.weight_sync.sync(version)["bytes"]
        self.version = version
        self.asleep = False
        on_all_ranks(lambda: self._call_sleepers("/wake", ["kv_cache"]), self.group)
        return placed

    def engines_alive(self) -> bool:
        """Collective: whether every engine process is alive."""
        self.order(ALIVE)
        return all(on_all_ranks(lambda: all(engine.alive for engine in self.engines), self.group))

    def sleep(self) -> None:
        """Collective: with ``rollout.sleep``, have the engines free their GPU memory until the next sync."""
        on_all_ranks(lambda: self._call_sleepers("/sleep", ["weights", "kv_cache"]), self.control)
        self.asleep = self.config.sleep

    def wake(self) -> None:
        """Collective: wake engines that were put to sleep and give them the weights that they had before."""
        if self.asleep:
            self.sync_weights(self.version)

    def _prepare_engines(self) -> int:
        """Restart this rank's dead engines and return their number.

        With ``rollout.sleep`` the engines then allocate the memory of their weights again.
        """
        dead = [engine for engine in self.engines if not engine.alive]
        for engine in dead:
            engine.restart()
            self.on_restart(engine.log_path.stem)
        wait_until_ready(dead, time.monotonic() + self.config.startup_timeout)
        self._call_sleepers("/wake", ["weights"])
        return len(dead)

    def _call_sleepers(self, path: str, tags: list[str]) -> None:
        for engine in self.engines:
            if self.config.sleep and engine.alive:
                engine.call("POST", path, {"tags": tags})

    # Generation

    @property
    def fleet(self) -> Fleet:
        """This rank's engines as ``rollout.generation`` takes them."""
        return Fleet(self.engines, self.node, self.nodes, self.turns, self.engine_nodes)

    def sampling(self, temperature: float, round_tokens: int | None = None) -> Sampling:
        """The run's sampling settings at a temperature. Greedy decoding has no top-p."""
        return Sampling(
            max_tokens=self.config.max_response_tokens,
            stop_token_ids=(self.tokenizer.eos_token_id,),
            temperature=temperature,
            top_p=self.config.top_p if temperature > 0 else 1.0,
            round_tokens=round_tokens,
            thinking_budget=self.config.thinking_budget,
        )

    def generate(
        self,
        prompts: Sequence[Prompt],
        samples_per_prompt: int,
        *,
        step: int,
        temperature: float,
        on_response: OnResponse,
    ) -> TokenBatch:
        """Collective: generate responses to held-out prompts, with the verdicts that ``on_response`` returns.

        The responses are ordered by prompt and then by sample index. Every rank gets all tokens. The sampling noise
        depends on ``step``.
        """
        self.heartbeat("generate")
        self.wake()
        requests = sampler.make_requests(prompts, samples_per_prompt, self.seed, step)
        streamed = None if self.judges_share_gpus else on_response
        generation = Generation(self.fleet, requests, self.sampling(temperature), streamed, rows=HELD_OUT)
        batch = generation.collect(self.control, partial(self.sync_weights, self.version))
        judged = self.judge_together(batch, on_response) if self.judges_share_gpus else batch
        return everywhere(judged, self.control)

    def text(self, batch: TokenBatch, i: int) -> str:
        """The text of response i for verifiers and people. Training uses the token ids.

        Where the chat template has put the mark of thinking into the prompt, the text begins with this mark.
        """
        prompt = batch.prompt(i).token_ids
        return whole_text(self.tokenizer, prompt, self.written(batch, i), self.config.thinking_marks[0])

    def written(self, batch: TokenBatch, i: int) -> str:
        """The text of response i's own tokens."""
        # An array: transformers would check each element of a list.
        tokens = batch.response_tokens[batch.tokens_of(i)]
        return self.tokenizer.decode(tokens, skip_special_tokens=True).strip()

    # Verdicts

    def judge(self, row: Row, response: TokenBatch, names: Sequence[str]) -> dict[str, Any]:
        """The verdicts of the named verifiers on a batch of one response, as plain JSON.

        Called from several threads while engines generate. With an environment the verifiers also get the response's
        ``segments`` in the row. Where the environment failed, every verdict is a failure.
        """
        (failure,) = response.failures
        if failure:
            return {name: to_json(Failure(failure)) for name in names}
        if self.turns is not None:
            row = {**row, "segments": segments(self.tokenizer, response, self.turns.think_begin)}
        results = mixing.verify(row, self.text(response, 0), names, self.verifiers)
        return {name: to_json(result) for name, result in results.items()}

    def judge_together(self, batch: TokenBatch, judge: OnResponse) -> TokenBatch:
        """Collective: judge a complete batch and return it with verdicts.

        Puts the engines to sleep and keeps the judges' servers awake while they judge. Each node's servers judge the
        responses of that node's engines.
        """
        self.sleep()
        holder = holders(batch, self.control)

        def judge_share() -> list[dict[str, Any]]:
            """The verdicts on the responses that this rank holds."""
            if self.client is None:
                return []
            responses = [batch.select([i]) for i in np.flatnonzero(holder == dist.get_rank(self.control))]
            # The client limits the number of concurrent requests.
            with self.client.awake(), ThreadPoolExecutor(len(responses) or 1, "judge") as threads:
                return list(threads.map(judge, responses))

        shares = [iter(share) for share in on_all_ranks(judge_share, self.control)]
        return replace(batch, verdicts=[next(shares[rank]) for rank in holder])

    def server_counts(self) -> dict[str, int]:
        """Collective: the request counts of each verifier's server since the last call, summed over all nodes."""
        self.order(SERVER_COUNTS)
        total: Counter[str] = Counter()
        counts: Mapping[str, int] = self.client.take_counts() if self.client else {}
        for of_rank in all_gather_json(counts, self.group):
            total.update(of_rank)
        return {f"servers/{name}": count for name, count in total.items()}


def wait_until_ready(engines: Sequence[Engine], deadline: float) -> None:
    """Wait until all engines answer.

    Raises EngineError for an engine that does not answer by ``deadline`` (``time.monotonic``).
    """
    for engine in engines:
        engine.wait_until_ready(deadline)
