"""Jobs of several nodes, whole but for vLLM: ``python -m tests.recipes.apart_jobs FOLDER`` runs each configuration of
FOLDER/configs.pickle, one after the other. The nodes are processes of this machine.

The engines are those of ``steps``, each with weights of its own. The weight sync puts the shards of all ranks together
and sends them over the group that it is given. Where the run's folder is called "dies", the engines die once.
"""

import copy
import os
import pickle
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load, save

from megatron_ext.batch import TokenBatch
from megatron_ext.blocks import Shard, region
from megatron_ext.collectives import all_gather_bytes
from recipes.config import Config, job_processes
from recipes.launch.launcher import fork_ranks, run_in_child
from recipes.training import engine_node, setup
from recipes.training.stages import run_stage
from rollout.engine import EngineDied
from rollout.sampling import Sampling
from tests.recipes import steps

DIES = "dies"
DIES_IN = 2  # the number of its batch
BYTES = 7


class Engine(steps.Engine):
    """Has weights of its own, which a sync replaces. It may die before the second response of a batch."""

    def __init__(self, settings: Any, log_path: Path) -> None:
        self.model = copy.deepcopy(steps.model(settings.model))
        self.log_path = log_path
        self.dies = log_path.parents[1].name == DIES
        self.batches = 0

    def restart(self) -> None:
        self.alive = True
        for tensor in self.model.state_dict().values():
            tensor.zero_()

    def generate(
        self, requests: TokenBatch, sampling: Sampling, num_complete: int | None = None
    ) -> Iterator[TokenBatch]:
        self.batches += 1
        for number, response in enumerate(super().generate(requests, sampling, num_complete)):
            if self.dies and self.batches == DIES_IN and number == 1:
                self.alive = False
                raise EngineDied(f"{self.log_path.stem} is gone")
            yield response


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
            tensors = engine.model.state_dict()
            for of_rank in of_ranks:
                for name, values in load(of_rank).items():
                    hf_name, start, _ = name.split(" ")
                    place = region(tuple(map(int, start.split(","))), tuple(values.shape))
                    tensors[hf_name][place] = values
            engine.version = version
        return {"bytes": BYTES}


def job(config: Config) -> None:
    """The launcher, and each process of the job."""
    fork_ranks(job_processes(config), config.cluster.nodes + config.cluster.engine_nodes)
    # See ``steps.main``.
    torch.set_num_threads(1)
    setup.Engine = Engine  # type: ignore[misc, assignment]
    setup.WeightSync = WeightSync  # type: ignore[misc, assignment]
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
