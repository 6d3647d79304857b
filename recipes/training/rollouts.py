"""The rollouts on this rank: engines with the policy's weights, what they generate, and the verdicts on it."""

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
    """``engines``, ``verifiers``, ``client`` and ``turns`` (an environment's) exist on the first rank of each node;
    ``node`` of ``nodes``. ``control`` is a gloo group of all ranks.

    ``engine_nodes``: where the engines are on nodes of their own. Each process there has a Rollouts too, with ``node``
    of ``nodes`` among these, and calls the same methods by order of the trainer's rank 0 (``engine_node``).

    ``judges_share_gpus``: the judges' servers sleep while engines and trainer work, and judge a complete batch.
    ``make_room`` frees the trainer's memory for engines. ``heartbeat`` gets the name of a phase that makes progress,
    ``on_restart`` the name of an engine that died and is started again.

    ``weight_sync``: None where engines read their weights from ``model.path`` when they start.

    ``version`` is that of the weights in the engines; ``asleep``: they were put to sleep since the last sync.
    """

    config: RolloutConfig
    seed: int
    tokenizer: Any
    engines: list[Engine]
    weight_sync: WeightSync | None
    control: dist.ProcessGroup
    node: int
    nodes: int
    verifiers: dict[str, Verifier]
    client: Client | None
    turns: Turns | None
    judges_share_gpus: bool
    make_room: Callable[[], None]
    heartbeat: Callable[[str], None]
    on_restart: Callable[[str], None]
    engine_nodes: EngineNodes | None = None
    version: int = 0
    asleep: bool = False

    @property
    def group(self) -> dist.ProcessGroup:
        """The gloo group of all processes that take part in rollouts: of the trainer, and of nodes of engines alone."""
        return self.control if self.engine_nodes is None else self.engine_nodes.group

    def order(self, name: str, **arguments: Any) -> None:
        """Have the processes of the engines' nodes, where there are any, call the same (``EngineNodes.order``)."""
        if self.engine_nodes is not None:
            self.engine_nodes.order(name, **arguments)

    # Weights and sleep

    def sync_weights(self, version: int) -> int:
        """Collective: bring every engine to the policy's weights; returns the bytes placed.

        ``version`` is the number of RL steps that made the weights, so that a resumed run's responses name the same
        one. Engines that died are started again first.
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
        """Collective: whether every engine lives."""
        self.order(ALIVE)
        return all(on_all_ranks(lambda: all(engine.alive for engine in self.engines), self.group))

    def sleep(self) -> None:
        """Collective: with ``rollout.sleep`` the engines' GPU memory is the trainer's until the next sync."""
        on_all_ranks(lambda: self._call_sleepers("/sleep", ["weights", "kv_cache"]), self.control)
        self.asleep = self.config.sleep

    def wake(self) -> None:
        """Collective: engines that were put to sleep get the weights again that they had."""
        if self.asleep:
            self.sync_weights(self.version)

    def _prepare_engines(self) -> int:
        """Restart this rank's dead engines and wake the memory of the weights; returns how many were restarted."""
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
        """The run's sampling settings at a temperature; greedy decoding takes no top-p."""
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
        """Collective: responses to held-out prompts, by prompt and then sample index, with the verdicts that
        ``on_response`` gives; all tokens on every rank. ``step`` decides the noise."""
        self.heartbeat("generate")
        self.wake()
        requests = sampler.make_requests(prompts, samples_per_prompt, self.seed, step)
        streamed = None if self.judges_share_gpus else on_response
        generation = Generation(self.fleet, requests, self.sampling(temperature), streamed, rows=HELD_OUT)
        batch = generation.collect(self.control, partial(self.sync_weights, self.version))
        judged = self.judge_together(batch, on_response) if self.judges_share_gpus else batch
        return everywhere(judged, self.control)

    def text(self, batch: TokenBatch, i: int) -> str:
        """Response i as a reader sees it: after the mark of thinking where the chat template has written that into the
        prompt. For verifiers and people only: training uses the token ids."""
        prompt = batch.prompt(i).token_ids
        return whole_text(self.tokenizer, prompt, self.written(batch, i), self.config.thinking_marks[0])

    def written(self, batch: TokenBatch, i: int) -> str:
        """The text of response i's own tokens."""
        tokens = batch.response_tokens[batch.tokens_of(i)]  # of a list, transformers would look at each
        return self.tokenizer.decode(tokens, skip_special_tokens=True).strip()

    # Verdicts

    def judge(self, row: Row, response: TokenBatch, names: Sequence[str]) -> dict[str, Any]:
        """What the named verifiers say of a batch of one response, as plain JSON. Called from several threads while
        engines generate.

        With an environment the row also has the response's ``segments``; where the environment failed, all verifiers
        have.
        """
        (failure,) = response.failures
        if failure:
            return {name: to_json(Failure(failure)) for name in names}
        if self.turns is not None:
            row = {**row, "segments": segments(self.tokenizer, response, self.turns.think_begin)}
        results = mixing.verify(row, self.text(response, 0), names, self.verifiers)
        return {name: to_json(result) for name, result in results.items()}

    def judge_together(self, batch: TokenBatch, judge: OnResponse) -> TokenBatch:
        """Collective: the batch with verdicts. The engines sleep from here on and the judges' servers are awake
        meanwhile; each node's servers judge what its engines made."""
        self.sleep()
        holder = holders(batch, self.control)

        def judge_share() -> list[dict[str, Any]]:
            """The verdicts on the responses that this rank holds."""
            if self.client is None:
                return []
            responses = [batch.select([i]) for i in np.flatnonzero(holder == dist.get_rank(self.control))]
            # The client bounds how many are under way.
            with self.client.awake(), ThreadPoolExecutor(len(responses) or 1, "judge") as threads:
                return list(threads.map(judge, responses))

        shares = [iter(share) for share in on_all_ranks(judge_share, self.control)]
        return replace(batch, verdicts=[next(shares[rank]) for rank in holder])

    def server_counts(self) -> dict[str, int]:
        """Collective: what became of the requests of all nodes to each verifier's server since the last call."""
        self.order(SERVER_COUNTS)
        total: Counter[str] = Counter()
        counts: Mapping[str, int] = self.client.take_counts() if self.client else {}
        for of_rank in all_gather_json(counts, self.group):
            total.update(of_rank)
        return {f"servers/{name}": count for name, count in total.items()}


def wait_until_ready(engines: Sequence[Engine], deadline: float) -> None:
    """Wait until all engines answer. Raises EngineError for one that has not by ``deadline`` (``time.monotonic``)."""
    for engine in engines:
        engine.wait_until_ready(deadline)
