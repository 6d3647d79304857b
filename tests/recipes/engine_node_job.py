"""A job of four trainer ranks and two engines' nodes of two processes each, with fake engines.

``python -m tests.recipes.engine_node_job FOLDER`` forks its processes; each writes what it found. Where the folder is
called "gone" the trainer ends without telling the others.
"""

import json
import os
import sys
import time
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from megatron_ext import parallel, platform, worlds
from megatron_ext.batch import TokenBatch
from megatron_ext.collectives import all_gather_json
from recipes.launch.launcher import fork_ranks
from recipes.training import engine_node, setup
from recipes.training.rollouts import Rollouts
from rollout import sampler
from rollout.engine import EngineDied
from rollout.engine_nodes import END, EngineNodes
from rollout.generation import HELD_OUT, TRAINING, Generation
from rollout.sampling import Sampling
from tests.responses import answer, make_prompt, plain
from tests.settings import parallel_config, rollout_config

TRAINERS, NODES, PER_NODE = 4, 2, 2
SIZE = TRAINERS + NODES * PER_NODE
SAMPLING = Sampling(max_tokens=4, stop_token_ids=(2,))
PROMPTS = [make_prompt(f"p{i}", [i] * (1 + i)) for i in range(5)]
REQUESTS = sampler.make_requests(PROMPTS, 2, seed=1, step=2)
BYTES = 11
GONE = "gone"
TIMEOUT = 8.0  # seconds, of the group in which the trainer gives its order later than that


class Engine:
    """Its tokens follow from seed and version. It dies in its batch number ``dies_in``, before the second response."""

    def __init__(self, node: int, dies_in: int) -> None:
        self.log_path = Path(f"engine_{node}.log")
        self.dies_in = dies_in
        self.alive = True
        self.batches = 0
        self.version = -1

    def restart(self) -> None:
        self.alive = True

    def wait_until_ready(self, deadline: float) -> None:
        assert self.alive and deadline > time.monotonic()

    def generate(self, requests: TokenBatch, sampling: Sampling, num_complete: int | None = None) -> Any:
        self.batches += 1
        for i in range(len(requests)):
            if self.batches == self.dies_in and i == 1:
                self.alive = False
                raise EngineDied("gone")
            tokens = tokens_of(int(requests.seeds[i]), self.version)
            yield answer(requests, i, tokens, logprob=-0.5, finish_reason="stop", version=self.version)


def tokens_of(seed: int, version: int) -> list[int]:
    return [seed % 7, version]


class WeightSync:
    """Gives the version of the trainer's rank 0 to the engines of all processes, over the job's group."""

    def __init__(self, engines: list[Engine], group: dist.ProcessGroup) -> None:
        self.engines, self.group = engines, group
        self.attached = 0

    def attach(self, engines: list[Engine]) -> None:
        self.attached += 1

    def sync(self, version: int) -> dict[str, int]:
        value = torch.tensor([version if dist.get_rank(self.group) == 0 else -7])
        dist.broadcast(value, group=self.group, group_src=0)
        for engine in self.engines:
            engine.version = int(value)
        return {"bytes": BYTES}


def rollouts(engine_nodes: EngineNodes, control: dist.ProcessGroup, node: int, engines: list[Engine]) -> Rollouts:
    restarts: list[str] = []
    rollouts = Rollouts(
        config=rollout_config(engines=2),
        seed=1,
        tokenizer=SimpleNamespace(eos_token_id=2),
        engines=engines,  # type: ignore[arg-type]
        weight_sync=WeightSync(engines, engine_nodes.group),  # type: ignore[arg-type]
        control=control,
        node=node,
        nodes=NODES,
        verifiers={},
        client=SimpleNamespace(take_counts=lambda: {f"of {node}": 1}) if engines else None,  # type: ignore[arg-type]
        turns=None,
        judges_share_gpus=False,
        make_room=setup.keep_memory,
        heartbeat=lambda phase: None,
        on_restart=restarts.append,
        engine_nodes=engine_nodes,
    )
    rollouts.restarts = restarts  # type: ignore[attr-defined]
    return rollouts


def trainer(shared: Rollouts, end: bool) -> dict[str, Any]:
    """Two batches, the second while the trainer works and while node 0's only engine dies; and a held-out one."""
    rank = dist.get_rank()
    outcome: dict[str, Any] = {"world": dist.get_world_size(), "placed": shared.sync_weights(3)}
    first = Generation(shared.fleet, REQUESTS, SAMPLING)
    batch = first.collect(shared.control, lambda: fails("an engine died"))
    outcome["first"] = responses(batch)

    second = Generation(shared.fleet, REQUESTS, SAMPLING)
    mean = torch.tensor([float(rank)])
    dist.all_reduce(mean)  # of the step: the engines' processes have no part in it
    outcome["sum"] = float(mean)
    outcome["data_ranks"] = all_gather_json(parallel.mpu.get_data_parallel_rank(), shared.control)
    outcome["second"] = responses(second.collect(shared.control, lambda: shared.sync_weights(4)))
    outcome["counts"] = shared.server_counts()
    held_out = shared.generate(
        PROMPTS[:2], 1, step=9, temperature=0.0, on_response=lambda response: fails("judged on a rank of the trainer")
    )
    outcome["held_out"] = [[*key, held_out.verdicts[i]] for i, key in enumerate(held_out.keys)]
    outcome["held_out_held"] = held_out.held.tolist()
    if end:
        shared.order(END)
    return outcome


def responses(batch: TokenBatch) -> dict[str, Any]:
    """What this rank knows of all responses, and those that it holds."""
    held = batch.select([i for i, is_held in enumerate(batch.held.tolist()) if is_held])
    return {
        "keys": [list(key) for key in batch.keys],
        "verdicts": batch.verdicts,
        "held": [asdict(response) for response in plain(held)],
    }


def main() -> None:
    folder = Path(sys.argv[1])
    fork_ranks(SIZE, SIZE // PER_NODE)
    number = int(os.environ["RANK"])
    end = folder.name != GONE
    torch.set_num_threads(1)
    platform.activate("cpu")
    worlds.join(TRAINERS, 120)
    engine_nodes = EngineNodes(worlds.job_group("gloo"), TRAINERS)
    outcome: dict[str, Any] = {}
    if number < TRAINERS:
        parallel.initialize(parallel_config(tensor=2), 1, 120)
        outcome = trainer(rollouts(engine_nodes, parallel.control_group(), 0, []), end)
    else:
        node, local_rank = divmod(number - TRAINERS, PER_NODE)
        engines = [Engine(node, dies_in=2 if node == 0 else 0)] if local_rank == 0 else []
        shared = rollouts(engine_nodes, engine_nodes.group, node, engines)
        judges = {TRAINING: verdict, HELD_OUT: lambda response: {"held out": node}}
        try:
            engine_node.obey(shared, engine_nodes, judges if engines else {})
        except RuntimeError as error:
            outcome["error"] = str(error)
        outcome |= {"world": dist.get_world_size(), "restarts": shared.restarts}  # type: ignore[attr-defined]
        outcome["attached"] = shared.weight_sync.attached  # type: ignore[union-attr]
    if end:
        outcome |= end_late(number < TRAINERS)
    (folder / f"{number}.json").write_text(json.dumps(outcome))
    parallel.destroy()


def end_late(is_trainer: bool) -> dict[str, Any]:
    """The last order comes after the group's timeout, and the processes of the engines' nodes end a second after it."""
    assert worlds._job is not None
    worlds._job = replace(worlds._job, timeout=timedelta(seconds=TIMEOUT))
    engine_nodes = EngineNodes(worlds.job_group("gloo"), TRAINERS)
    outcome: dict[str, Any] = {}
    if is_trainer:
        time.sleep(TIMEOUT + 1)
        setup.end_engine_nodes(engine_nodes, None)
    else:
        outcome["late"] = engine_nodes.next_order().name
        time.sleep(1)
        outcome["ready"] = time.monotonic()
        setup.end_engine_nodes(engine_nodes, None)
    return outcome | {"ended": time.monotonic()}


def verdict(response: TokenBatch) -> dict[str, Any]:
    (one,) = plain(response)
    return {"of": list(one.key), "tokens": one.tokens}


def fails(what: str) -> Any:
    raise AssertionError(what)


if __name__ == "__main__":
    main()
