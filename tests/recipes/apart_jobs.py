"""Jobs of several nodes, whole but for vLLM: ``python -m tests.recipes.apart_jobs FOLDER`` runs each configuration of
FOLDER/configs.pickle, one after the other. The nodes are processes of this machine.

The engines are those of ``steps``, each with weights of its own. The weight sync puts the shards of all ranks together
and sends them over the group that it is given. Where the run's folder is called "dies", the engines die once.

In runs of :data:`IN_FLIGHT` every weight sync in flight finds all engines in the middle of their batch's second
response, or dead.
"""

import copy
import os
import pickle
import random
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load, save

from megatron_ext.batch import UNFINISHED, TokenBatch
from megatron_ext.blocks import Shard, region
from megatron_ext.collectives import all_gather_bytes
from recipes.config import Config, job_processes
from recipes.launch.launcher import fork_ranks, run_in_child
from recipes.training import engine_node, setup
from recipes.training.rollouts import Rollouts
from recipes.training.stages import run_stage
from rollout.engine import EngineDied
from rollout.sampling import Sampling
from tests.recipes import steps

DIES = "dies"
IN_FLIGHT_DIES = "in_flight_dies"
# Which of an engine's batches are under way when an update's weights come. Of the run whose engines die in the second,
# the third makes what is missing of it.
IN_FLIGHT = {"in_flight": (2, 3), "in_flight_apart": (2, 3), IN_FLIGHT_DIES: (4,)}
BEFORE_SYNC = 2  # tokens of the response in whose middle the weights change
SYNCS = "syncs.txt"  # in a run's folder: the version of each sync
WAIT = 300  # seconds
DIES_IN = 2  # the number of its batch
BYTES = 7


class Engine(steps.Engine):
    """Has weights of its own, which a sync replaces, between two responses or where the engine stands still. It may die
    before the second response of a batch."""

    def __init__(self, settings: Any, log_path: Path) -> None:
        self.model = copy.deepcopy(steps.model(settings.model))
        self.log_path = log_path
        self.run_dir = log_path.parents[1]
        self.dies = self.run_dir.name in (DIES, IN_FLIGHT_DIES)
        self.batches = 0
        self.responses = 0  # of the batch
        self.weights = threading.Lock()
        self.stands_still = False
        self.ready = threading.Semaphore(0)  # for a sync in flight
        self.synced = threading.Semaphore(0)

    def restart(self) -> None:
        self.alive = True
        for tensor in self.model.state_dict().values():
            tensor.zero_()

    def generate(
        self, requests: TokenBatch, sampling: Sampling, num_complete: int | None = None
    ) -> Iterator[TokenBatch]:
        self.batches += 1
        self.responses = 0
        for number, response in enumerate(super().generate(requests, sampling, num_complete)):
            if self.dies and self.batches == DIES_IN and number == 1:
                self.alive = False
                self.ready.release()
                raise EngineDied(f"{self.log_path.stem} is gone")
            yield response

    def respond(self, request: TokenBatch, sampling: Sampling, chance: random.Random) -> TokenBatch:
        self.responses += 1
        if self.responses == 2 and self.batches in IN_FLIGHT.get(self.run_dir.name, ()):
            state = chance.getstate()
            request = super().respond(request, replace(sampling, round_tokens=BEFORE_SYNC), chance)
            self.stands_still = True
            self.ready.release()
            assert self.synced.acquire(timeout=WAIT), "no sync came"
            if request.finish_reasons != [UNFINISHED]:
                return request
            chance.setstate(state)
        with self.weights:
            return super().respond(request, sampling, chance)

    def take(self, tensors: dict[str, torch.Tensor], version: int) -> None:
        """New weights."""
        with self.weights:
            for name, values in tensors.items():
                hf_name, start, _ = name.split(" ")
                place = region(tuple(map(int, start.split(","))), tuple(values.shape))
                self.model.state_dict()[hf_name][place] = values
            self.version = version
        if self.stands_still:
            self.stands_still = False
            self.synced.release()
        if self.log_path.stem == "engine_0":
            with open(self.run_dir / SYNCS, "a") as file:
                file.write(f"{version}\n")


class WeightSync:
    """Gives every engine the trainer's weights."""

    def __init__(self, shards: Sequence[Shard], engines: Sequence[Engine], group: dist.ProcessGroup, **options: Any):
        self.shards, self.engines, self.group = shards, engines, group

    def attach(self, engines: Sequence[Engine]) -> None:
        self.engines = engines

    def sync(self, version: int) -> dict[str, int]:
        blocks = {}
        for shard in self.shards:
            for number, block in enumerate(shard.blocks):
                values = shard.tensor.detach()[region(block.local_start, block.shape)]
                start = ",".join(map(str, block.hf_start))
                blocks[f"{block.hf_name} {start} {shard.name}{number}"] = values.contiguous().clone()
        of_ranks = all_gather_bytes(save(blocks), self.group)
        for engine in self.engines:
            engine.take({name: values for of_rank in of_ranks for name, values in load(of_rank).items()}, version)
        return {"bytes": BYTES}


engines_alive = Rollouts.engines_alive


def alive_when_all_stand_still(rollouts: Rollouts) -> bool:
    """As the loop asks it before a sync in flight."""
    engines: Sequence[Any] = rollouts.engines
    for engine in engines:
        if engine.run_dir.name in IN_FLIGHT:
            assert engine.ready.acquire(timeout=WAIT), "the engine is not in the middle of its batch"
    return engines_alive(rollouts)


def job(config: Config) -> None:
    """The launcher, and each process of the job."""
    fork_ranks(job_processes(config), config.cluster.nodes + config.cluster.engine_nodes)
    # See ``steps.main``.
    torch.set_num_threads(1)
    setup.Engine = Engine  # type: ignore[misc, assignment]
    setup.WeightSync = WeightSync  # type: ignore[misc, assignment]
    Rollouts.engines_alive = alive_when_all_stand_still  # type: ignore[method-assign]
    if int(os.environ["RANK"]) >= config.cluster.ranks:
        engine_node.serve(config)
        return
    with setup.open_training(config) as training:
        run_stage(training)


def main() -> None:
    configs: list[Config] = pickle.loads(Path(sys.argv[1], "configs.pickle").read_bytes())
    for config in configs:
        started = time.monotonic()
        run_in_child(partial(job, config))
        print(f"{config.run_dir}: {time.monotonic() - started:.1f} s", flush=True)


if __name__ == "__main__":
    main()
