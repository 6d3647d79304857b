"""Save and resume: sharded state as Megatron-Core describes it, in files without pickle, loadable under another layout.

A checkpoint is a folder ``step_000012`` with a file of tensors from each rank (weights, FP32 masters, moments and RNG
states; ``shard_files``), ``progress.json`` (the step, schedules, what the caller goes on from), ``manifest.json`` (the
size and checksum of every file, where each tensor's parts are) and, written last, ``complete.json`` with the manifest's
own checksum. What has no ``complete.json`` was interrupted and is never read.

The files are written by a thread while training goes on, from a copy of the state on the host.
"""

import json
import shutil
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace, merge, nested_values
from megatron.core.dist_checkpointing.mapping import apply_factory_merges, is_main_replica
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess, save_preprocess
from megatron.core.dist_checkpointing.utils import extract_sharded_base, force_all_tensors_to_non_fp8
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

from megatron_ext import optimizer_shards, platform, shard_files
from megatron_ext.collectives import all_gather_json, from_rank_zero, on_all_ranks
from megatron_ext.model import Model
from megatron_ext.parallel import control_group

MANIFEST, COMPLETE, PROGRESS = "manifest.json", "complete.json", "progress.json"
# Fields of ParallelConfig. RNG states belong to them and to the number of replicas.
SIZES = (
    "tensor",
    "pipeline",
    "virtual_pipeline",
    "first_stage_layers",
    "last_stage_layers",
    "context",
    "sequence",
)
POLICY = "policy"


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or none can be read."""


@dataclass(frozen=True)
class Snapshot:
    """A model's state at one moment: ``parts`` is what this rank writes of it, copied to the host; ``common`` (JSON) is
    the same on every rank."""

    parts: list[shard_files.TensorPart]
    common: dict[str, Any]
    layout: dict[str, Any]


def snapshot(model: Model, optimizer: MegatronOptimizer, scheduler: OptimizerParamScheduler) -> Snapshot:
    """Copy this rank's part of the model, optimiser, schedule and RNG states; training may go on at once."""
    _prime(optimizer)
    state = _state(model)
    moments = optimizer_shards.parts(_distributed(optimizer), state)
    state["optimizer"] = _distributed(optimizer).state_dict()
    state["scheduler"] = scheduler.state_dict()
    state["rng"] = _rng_tensors()
    force_all_tensors_to_non_fp8(state)
    sharded, common = save_preprocess(state)
    own = [
        shard_files.TensorPart(t.key, t.global_shape, t.global_offset, t.data)
        for t in nested_values(sharded)
        if isinstance(t, ShardedTensor) and is_main_replica(t.replica_id)
    ] + moments
    copies = platform.current().to_host([part.values.detach() for part in own])
    return Snapshot(
        [replace(part, values=copy) for part, copy in zip(own, copies, strict=True)], common, _layout(model)
    )


class Saver:
    """Writes the checkpoints of one run's folder, one at a time, beside the training."""

    def __init__(self, folder: Path, keep: int) -> None:
        """Collective. ``keep``: so many complete checkpoints stay; with 2 and more there is one to fall back to."""
        self.folder, self.keep = folder, keep
        self.group = dist.new_group(backend="gloo")  # the thread's own
        self.thread: threading.Thread | None = None
        self.failure: Exception | None = None

    def save(self, step: int, models: Mapping[str, Snapshot], progress: Mapping[str, Any]) -> None:
        """Collective: begin to write ``folder/step_…``; the former save is awaited first.

        ``progress``: what else the caller goes on from (JSON; :func:`progress` gives it back).
        Raises CheckpointError where the former save failed.
        """
        self.wait()
        target = self.folder / f"step_{step:06d}"
        if dist.get_rank() == 0:
            shutil.rmtree(target, ignore_errors=True)
            target.mkdir(parents=True)
        dist.barrier(group=self.group)
        described = {
            **progress,
            "step": step,
            "layout": models[POLICY].layout,
            "models": {name: one.common for name, one in models.items()},
        }
        text = json.dumps(described)  # now: the caller may go on to change it
        parts = [
            shard_files.TensorPart(f"{name}/{part.key}", part.global_shape, part.start, part.values)
            for name, one in models.items()
            for part in one.parts
        ]
        self.thread = threading.Thread(target=self._write, args=(target, parts, text), name="checkpoint", daemon=True)
        self.thread.start()

    def check(self) -> None:
        """Raises CheckpointError when the save that was begun last has failed by now."""
        if self.failure is not None:
            raise self.failure

    def wait(self) -> None:
        """Until the save that was begun last is complete. Raises CheckpointError when it failed."""
        self.join(None)
        self.check()

    def join(self, seconds: float | None) -> None:
        """Until the save that was begun last is complete, or has failed; at most so long."""
        if self.thread is not None:
            self.thread.join(seconds)

    def _write(self, target: Path, parts: list[shard_files.TensorPart], described: str) -> None:
        rank = dist.get_rank()
        own = target / f"rank_{rank:05d}.safetensors"
        try:
            written = on_all_ranks(lambda: shard_files.write(own, parts), self.group)
            from_rank_zero(partial(self._complete, target, written, json.loads(described)), self.group)
        except Exception as error:  # raised by the training thread
            if rank == 0 and not (target / COMPLETE).is_file():
                shutil.rmtree(target, ignore_errors=True)
            self.failure = CheckpointError(
                f"{target.name} was not written: {error}; make room in {self.folder} or mend what is said, and go on "
                "with resume=true from the checkpoint before it"
            )

    def _complete(self, target: Path, written: list[dict[str, Any]], described: dict[str, Any]) -> None:
        written = [*written, shard_files.write_json(target / PROGRESS, described)]
        entry = shard_files.write_json(target / MANIFEST, shard_files.manifest(written))
        shard_files.write_json(target / COMPLETE, {**entry, "step": described["step"]})
        self._remove_old(target)

    def _remove_old(self, newest: Path) -> None:
        """Leave the ``keep`` last complete checkpoints up to ``newest``; what interrupted saves left goes too."""
        for left in _unfinished(self.folder):
            shutil.rmtree(left)
        complete = sorted(found for found in self.folder.glob("step_*") if found.name <= newest.name)
        for old in complete[: -self.keep]:
            shutil.rmtree(old)


def _unfinished(folder: Path) -> list[Path]:
    """What interrupted saves left there."""
    return sorted(found for found in folder.glob("step_*") if not (found / COMPLETE).is_file())


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint, unverified, or None when there is none."""
    return max((found.parent for found in folder.glob(f"step_*/{COMPLETE}")), default=None)


def newest_whole(folder: Path, say: Callable[[str], None]) -> Path | None:
    """Collective: the newest checkpoint that is complete and whose files have the bytes that were written.

    The ranks share the reading. One that is damaged is renamed to ``damaged_step_…``, told by ``say``, and the one
    before it is tried. None where the folder has no complete checkpoint.

    Raises:
        CheckpointError: checkpoints were there, and all are damaged.
    """
    group, damaged = control_group(), []
    for name in from_rank_zero(lambda: [left.name for left in _unfinished(folder)], group):
        say(f"checkpoint {name} was not finished when the run ended: it is left out")
    while (name := from_rank_zero(lambda: getattr(latest(folder), "name", None), group)) is not None:
        faults = _faults(folder / name)
        if not faults:
            return folder / name
        say(f"checkpoint {name} is damaged ({'; '.join(faults)}): it is set aside as damaged_{name}")
        damaged.append(name)
        from_rank_zero(partial(_set_aside, folder / name), group)
    if damaged:
        raise CheckpointError(
            f"{folder}: no whole checkpoint is left, {', '.join(damaged)} are damaged; put one back from a copy of the "
            "folder, or start anew with resume=false"
        )
    return None


def _set_aside(checkpoint: Path) -> None:
    aside = checkpoint.with_name(f"damaged_{checkpoint.name}")
    shutil.rmtree(aside, ignore_errors=True)
    checkpoint.rename(aside)


def _faults(checkpoint: Path) -> list[str]:
    """Collective: what is wrong with a checkpoint's files, the same on all ranks."""
    group = control_group()

    def listed() -> dict[str, Any]:
        try:
            entry = json.loads((checkpoint / COMPLETE).read_text())
            if found := shard_files.fault(checkpoint / MANIFEST, entry):
                return {"fault": found}
            return {"files": json.loads((checkpoint / MANIFEST).read_text())["files"]}
        except (OSError, ValueError, KeyError) as error:
            return {"fault": f"{COMPLETE}: {type(error).__name__}: {error}"}

    if "fault" in (found := from_rank_zero(listed, group)):
        return [found["fault"]]
    mine = sorted(found["files"])[dist.get_rank() :: dist.get_world_size()]
    faults = [fault for name in mine if (fault := shard_files.fault(checkpoint / name, found["files"][name]))]
    return [fault for rank in all_gather_json(faults, group) for fault in rank]


def progress(checkpoint: Path) -> dict[str, Any]:
    """The step, the layout and what the caller gave :meth:`Saver.save`."""
    return json.loads((checkpoint / PROGRESS).read_text())


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
    read(checkpoint, POLICY, model, optimizer, scheduler, rng=written == now)
    return int(progress(checkpoint)["step"])


def read(
    checkpoint: Path,
    name: str,
    model: Model,
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
    rng: bool,
) -> None:
    """Collective: restore one of a checkpoint's models in place; ``rng``: the ranks' RNG states too, in the same
    layout."""
    state = _state(model)
    if rng:
        state["rng"] = _rng_tensors()
    force_all_tensors_to_non_fp8(state)
    sharded, loaded, factories = load_preprocess(state)
    sharded, _ = extract_sharded_base(sharded)
    with shard_files.Reader(checkpoint, json.loads((checkpoint / MANIFEST).read_text())["tensors"]) as reader:
        dict_list_map_inplace(partial(_fill, reader, name), sharded)
        merge(loaded, progress(checkpoint)["models"][name])
        merge(loaded, sharded)
        loaded = apply_factory_merges(loaded, factories)
        for field in ("max_lr", "min_lr"):  # Megatron-Core matches parameter groups by them
            if loaded["scheduler"][field] != getattr(scheduler, field):
                raise ValueError(
                    f"{checkpoint}: written with {field}={loaded['scheduler'][field]}, this run has "
                    f"{getattr(scheduler, field)}: resume with the learning rate the run began with"
                )
        for i, chunk in enumerate(model.chunks):
            chunk.module.load_state_dict(loaded[f"model{i}"])
        _load_groups(optimizer, loaded["optimizer"])
        optimizer_shards.fill(_distributed(optimizer), _state(model), reader, f"{name}/")
    scheduler.load_state_dict(loaded["scheduler"])
    if rng:
        _set_rng_tensors(loaded["rng"])


def _fill(reader: shard_files.Reader, name: str, leaf: Any) -> Any:
    """The tensor that belongs in the place of a ShardedTensor. Objects of layers are not in a checkpoint."""
    if not isinstance(leaf, ShardedTensor):
        return leaf.data
    target = torch.empty(leaf.local_shape, dtype=leaf.dtype)
    reader.fill(f"{name}/{leaf.key}", leaf.global_shape, leaf.global_offset, target)
    return target


def _state(model: Model) -> dict[str, Any]:
    # Names count layers in the whole model, so a checkpoint does not depend on chunks and stages. Each layer is named,
    # as a frozen one has no moments.
    form = {"non_homogeneous_layers": True}
    return {f"model{i}": chunk.module.sharded_state_dict(metadata=form) for i, chunk in enumerate(model.chunks)}


def _layout(model: Model) -> dict[str, Any]:
    return {
        "platform": platform.current().name,
        **{name: getattr(model.parallel.config, name) for name in SIZES},
        "data": model.parallel.data,
        "padded_groups": model.sharding.padded_groups,
        "padded_vocab": model.sharding.padded_vocab,
        "padded_vision_heads": model.padded_vision_heads,
    }


def _distributed(optimizer: MegatronOptimizer) -> Any:
    """The one DistributedOptimizer behind Megatron-Core's chain (experts would add a second)."""
    (only,) = optimizer.chained_optimizers
    return only


def _prime(optimizer: MegatronOptimizer) -> None:
    """Create zero moments before the first step, which would: a checkpoint holds them, and Megatron-Core reads the step
    counter of a torch optimiser."""
    inner = _distributed(optimizer).optimizer
    if isinstance(inner, torch.optim.AdamW | torch.optim.Adam):
        for parameter in (p for group in inner.param_groups for p in group["params"] if not inner.state[p]):
            zeros = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
            inner.state[parameter] = {"step": torch.tensor(0.0), **zeros}
    elif not inner.state:  # Transformer Engine's
        _distributed(optimizer).load_state_dict(_distributed(optimizer).state_dict())  # allocates
        for moment in (m for state in inner.state.values() for m in state.values()):
            moment.zero_()


def _load_groups(optimizer: MegatronOptimizer, loaded: dict[str, Any]) -> None:
    """Load the parameter groups, and have moments.

    Megatron-Core 0.19 gives every parameter the same ``step`` tensor of torch, so that each update would count once per
    parameter. docs/dependencies.md names the version.
    """
    _prime(optimizer)
    _distributed(optimizer).load_state_dict(loaded)
    for state in _distributed(optimizer).optimizer.state.values():
        if "step" in state:
            state["step"] = state["step"].clone()


def _rng_tensors() -> dict[str, ShardedTensor]:
    """This rank's RNG states as tensors under keys of its own (no pickled objects)."""
    states = {"device": platform.current().rng_state(), **get_cuda_rng_tracker().get_states()}
    rank = dist.get_rank()
    return {name: ShardedTensor.from_rank_offsets(f"rng.{rank}.{name}", state.cpu()) for name, state in states.items()}


def _set_rng_tensors(states: dict[str, torch.Tensor]) -> None:
    platform.current().set_rng_state(states.pop("device"))
    get_cuda_rng_tracker().set_states(states)
