"""Save and resume through Megatron-Core's distributed checkpointing: sharded, and loadable under another layout.

A checkpoint is a folder ``step_000012`` that holds the model, the optimiser (FP32 masters and moments), the
learning-rate schedule, every rank's RNG state and ``progress.json``. ``latest.json`` is written last, so an interrupted
save is never read.
"""

import json
import os
import queue
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

from megatron_ext import platform
from megatron_ext.collectives import all_gather_json
from megatron_ext.model import Model
from megatron_ext.parallel import control_group

# The one format of Megatron-Core's distributed optimiser that loads under any layout.
_OPTIMIZER_FORMAT = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": False,
}


def save(
    folder: Path,
    step: int,
    model: Model,
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
    keep: int,
    progress: dict[str, Any],
    also: Callable[[Path], None] = lambda checkpoint: None,
) -> None:
    """Collective: write ``folder/step_…``, point ``latest.json`` at it, remove older checkpoints beyond ``keep``.

    ``progress``: what else the caller goes on from (JSON; :func:`progress` gives it back). ``also`` may write more into
    the checkpoint before it counts as complete: another model, by :func:`write`.
    """
    target = folder / f"step_{step:06d}"
    if dist.get_rank() == 0:
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
    dist.barrier()
    write(target, model, optimizer, scheduler)
    also(target)
    if dist.get_rank() == 0:
        (target / "progress.json").write_text(json.dumps(progress | {"step": step, "layout": _layout(model)}))
        pointer = folder / "latest.json.partial"
        pointer.write_text(json.dumps({"folder": target.name, "step": step}))
        os.replace(pointer, folder / "latest.json")
        _remove_old(folder, target, keep)
    dist.barrier()


def write(target: Path, model: Model, optimizer: MegatronOptimizer, scheduler: OptimizerParamScheduler) -> None:
    """Collective: write one model's state into the folder, which is made where it is not there. ``read`` reads it."""
    _check_padding(optimizer)
    if dist.get_rank() == 0:
        target.mkdir(exist_ok=True)
    dist.barrier()
    _prime(optimizer)
    state = _state(model, optimizer, loading=False)
    state["scheduler"] = scheduler.state_dict()
    state["rng"] = _rng_tensors()
    # Megatron-Core would start a manager process for this queue: seconds, and it outlives a kill -9 of its rank.
    filesystem_async._results_queue = queue.Queue()
    dist_checkpointing.save(state, str(target))
    dist.barrier()


def _remove_old(folder: Path, newest: Path, keep: int) -> None:
    """Leave the ``keep`` last complete checkpoints up to ``newest``; what interrupted saves left goes too."""
    complete = []
    for found in sorted(folder.glob("step_*")):
        if not (found / "progress.json").is_file():
            shutil.rmtree(found)
        elif found.name <= newest.name:
            complete.append(found)
    for old in complete[:-keep]:
        shutil.rmtree(old)


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint, or None when there is none."""
    pointer = folder / "latest.json"
    return folder / json.loads(pointer.read_text())["folder"] if pointer.is_file() else None


def progress(checkpoint: Path) -> dict[str, Any]:
    """The step, the layout and what the caller gave :func:`save`."""
    return json.loads((checkpoint / "progress.json").read_text())


def load(checkpoint: Path, model: Model, optimizer: MegatronOptimizer, scheduler: OptimizerParamScheduler) -> int:
    """Collective: restore everything in place and return the number of finished steps, which is the data position too.

    Another layout may load it as long as attention and vocabulary are padded to the same sizes; raises ValueError
    naming both paddings otherwise. RNG states belong to a layout and are restored only into the same one.
    """
    written, now = progress(checkpoint)["layout"], _layout(model)
    for field in ("padded_groups", "padded_vocab", "padded_vision_heads"):
        if written[field] != now[field]:
            raise ValueError(
                f"{checkpoint}: written with {field}={written[field]} (parallel.tensor={written['tensor']}), "
                f"parallel.tensor={now['tensor']} needs {now[field]}: resume with a tensor-parallel size that pads "
                "alike"
            )
    read(checkpoint, model, optimizer, scheduler, rng=written == now)
    return int(progress(checkpoint)["step"])


def read(
    folder: Path, model: Model, optimizer: MegatronOptimizer, scheduler: OptimizerParamScheduler, rng: bool
) -> None:
    """Collective: restore what ``write`` wrote, in place; ``rng``: the ranks' RNG states too, in the same layout."""
    _prime(optimizer)
    state = _state(model, optimizer, loading=True)
    if rng:
        state["rng"] = _rng_tensors()
    loaded = dist_checkpointing.load(state, str(folder))
    for field in ("max_lr", "min_lr"):  # Megatron-Core matches parameter groups by them
        if loaded["scheduler"][field] != getattr(scheduler, field):
            raise ValueError(
                f"{folder}: written with {field}={loaded['scheduler'][field]}, this run has "
                f"{getattr(scheduler, field)}: resume with the learning rate the run began with"
            )
    for i, chunk in enumerate(model.chunks):
        chunk.module.load_state_dict(loaded[f"model{i}"])
    _load_optimizer(optimizer, loaded["optimizer"])
    scheduler.load_state_dict(loaded["scheduler"])
    if rng:
        _set_rng_tensors(loaded["rng"])


def _state(model: Model, optimizer: MegatronOptimizer, loading: bool) -> dict[str, Any]:
    # Names count layers in the whole model, so a checkpoint does not depend on chunks and stages.
    state: dict[str, Any] = {f"model{i}": chunk.module.sharded_state_dict() for i, chunk in enumerate(model.chunks)}
    state["optimizer"] = optimizer.sharded_state_dict(dict(state), is_loading=loading, metadata=_OPTIMIZER_FORMAT)
    return state


def _layout(model: Model) -> dict[str, Any]:
    return {
        "platform": platform.current().name,
        **asdict(model.parallel.layout),
        "data": model.parallel.data,
        "padded_groups": model.sharding.padded_groups,
        "padded_vocab": model.sharding.padded_vocab,
        "padded_vision_heads": model.padded_vision_heads,
    }


def _distributed(optimizer: MegatronOptimizer) -> Any:
    """The one DistributedOptimizer behind Megatron-Core's chain (experts would add a second)."""
    (only,) = optimizer.chained_optimizers
    return only


def _check_padding(optimizer: MegatronOptimizer) -> None:
    """Megatron-Core 0.19 saves shifted moments behind a gradient bucket that it had to pad. All raise ValueError then.

    Only pipeline stages with tied embeddings have a second bucket, and only odd vocabulary shards are padded.
    """
    buckets = [bucket for buffer in _distributed(optimizer).buffers for bucket in buffer.buckets[:-1]]
    local = [[b.numel_unpadded, b.grad_data.numel()] for b in buckets if b.grad_data.numel() != b.numel_unpadded]
    found = [sizes for rank in all_gather_json(local, control_group()) for sizes in rank]
    if found:
        size, padded = found[0]
        raise ValueError(
            f"the tied embedding has {size} elements on a rank, which Megatron-Core pads to {padded}: it can't "
            "checkpoint that; use another parallel.tensor, or parallel.pipeline=1"
        )


def _prime(optimizer: MegatronOptimizer) -> None:
    """Create zero moments before the first step: Megatron-Core reads a torch optimiser's step counter."""
    inner = _distributed(optimizer).optimizer
    if isinstance(inner, torch.optim.AdamW | torch.optim.Adam):
        for parameter in (p for group in inner.param_groups for p in group["params"] if not inner.state[p]):
            zeros = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
            inner.state[parameter] = {"step": torch.tensor(0.0), **zeros}


def _load_optimizer(optimizer: MegatronOptimizer, loaded: dict[str, Any]) -> None:
    """Load in two parts, because Megatron-Core 0.19 mishandles torch's per-parameter ``step`` tensor.

    Its state loader looks ``step`` up among the saved tensors (it is not there), and its group loader gives every
    parameter the same ``step`` tensor, so that each update would count once per parameter. docs/dependencies.md names
    the version.
    """
    distributed = _distributed(optimizer)
    moments = loaded.pop("param_state")
    distributed.load_state_dict(loaded)
    states = list(distributed.optimizer.state.values())
    counters = [state.pop("step", None) for state in states]
    distributed.load_parameter_state_from_fully_reshardable(moments)
    for state, counter in zip(states, counters, strict=True):
        if counter is not None:
            state["step"] = counter.clone()


def _rng_tensors() -> dict[str, ShardedTensor]:
    """This rank's RNG states as tensors under keys of its own (no pickled objects)."""
    states = {"device": platform.current().rng_state(), **get_cuda_rng_tracker().get_states()}
    rank = dist.get_rank()
    return {name: ShardedTensor.from_rank_offsets(f"rng.{rank}.{name}", state.cpu()) for name, state in states.items()}


def _set_rng_tensors(states: dict[str, torch.Tensor]) -> None:
    platform.current().set_rng_state(states.pop("device"))
    get_cuda_rng_tracker().set_states(states)
