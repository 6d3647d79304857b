"""Save and resume: Megatron-Core's sharded state in files without pickle, loadable under another parallel layout.

A checkpoint is a folder ``step_000012`` with:

- one safetensors file per rank: weights, FP32 masters, moments and RNG states (``shard_files``);
- ``progress.json``: the step, the schedules and what the caller continues from;
- ``manifest.json``: size and checksum of every file, and where the parts of each tensor are;
- ``complete.json``, written last: the manifest's checksum. A folder without it was interrupted and is never read.

A thread writes the files from a copy of the state on the host while training continues.
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

from megatron_ext import optimizer_shards, platform, shard_files, worlds
from megatron_ext.collectives import all_gather_json, from_rank_zero, on_all_ranks
from megatron_ext.host_buffers import HostBuffers
from megatron_ext.model import Model
from megatron_ext.parallel import control_group

MANIFEST = "manifest.json"
COMPLETE = "complete.json"
PROGRESS = "progress.json"
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
    """A checkpoint could not be written, or no intact one is left to read."""


@dataclass(frozen=True)
class Snapshot:
    """The state of a model, optimiser and schedule at one moment.

    Attributes:
        parts: the tensors that this rank writes, copied to the host.
        common: plain values (JSON) that are equal on all ranks: parameter groups, schedule.
        layout: the platform, the parallel sizes and the paddings under which it was taken.
    """

    parts: list[shard_files.TensorPart]
    common: dict[str, Any]
    layout: dict[str, Any]


def snapshot(
    model: Model, optimizer: MegatronOptimizer, scheduler: OptimizerParamScheduler, buffers: HostBuffers
) -> Snapshot:
    """Copy this rank's part of the model, optimiser, schedule and RNG states to the host.

    Training may change the state as soon as this returns. The copies are in ``buffers``: the snapshot that was there
    must have been written (``Saver.wait``).
    """
    _create_moments(optimizer)
    state = _model_state(model)
    moments = optimizer_shards.state_parts(_distributed(optimizer), state)
    state["optimizer"] = _distributed(optimizer).state_dict()
    state["scheduler"] = scheduler.state_dict()
    state["rng"] = _rng_tensors()
    force_all_tensors_to_non_fp8(state)
    sharded, common = save_preprocess(state)
    parts = []
    for tensor in nested_values(sharded):
        # Of replicated tensors only the main replica is written.
        if isinstance(tensor, ShardedTensor) and is_main_replica(tensor.replica_id):
            part = shard_files.TensorPart(tensor.key, tensor.global_shape, tensor.global_offset, tensor.data)
            parts.append(part)
    parts += moments
    copies = buffers.copy([part.values for part in parts])
    on_host = [replace(part, values=copy) for part, copy in zip(parts, copies, strict=True)]
    return Snapshot(on_host, common, _layout(model))


class Saver:
    """Writes the checkpoints of one folder in the background, one at a time."""

    def __init__(self, folder: Path, keep: int) -> None:
        """Collective.

        Args:
            folder: the folder of all checkpoints of a run, on a file system that all ranks share.
            keep: number of complete checkpoints to keep; from 2 on there is one to fall back to.
        """
        self.folder = folder
        self.keep = keep
        # The writing thread needs a group of its own: collectives of two threads must not mix.
        self.group = worlds.new_group("gloo")
        self.thread: threading.Thread | None = None
        self.failure: Exception | None = None

    def save(
        self,
        step: int,
        models: Mapping[str, Snapshot],
        progress: Mapping[str, Any],
        blobs: Mapping[str, bytes] | None = None,
    ) -> None:
        """Collective: wait for the previous save, then begin to write ``folder/step_…``.

        Args:
            step: number of finished steps.
            models: name → snapshot; ``POLICY`` must be among them.
            progress: what else the caller continues from (JSON); :func:`progress` returns it.
            blobs: file name → content of further files, the same on every rank.

        Raises:
            CheckpointError: the previous save failed.
        """
        self.wait()
        target = self.folder / f"step_{step:06d}"
        if dist.get_rank() == 0:
            shutil.rmtree(target, ignore_errors=True)
            target.mkdir(parents=True)
        dist.barrier(group=self.group)
        content = {
            **progress,
            "step": step,
            "layout": models[POLICY].layout,
            "models": {name: model.common for name, model in models.items()},
        }
        # Serialised before this returns, because the caller may change the values afterwards.
        progress_json = json.dumps(content)
        parts = []
        for name, model in models.items():
            parts += [replace(part, key=f"{name}/{part.key}") for part in model.parts]
        self.thread = threading.Thread(
            target=self._write, args=(target, parts, progress_json, blobs or {}), name="checkpoint", daemon=True
        )
        self.thread.start()

    def check(self) -> None:
        """Raises CheckpointError if the latest save has failed by now."""
        if self.failure is not None:
            raise self.failure

    def wait(self) -> None:
        """Wait until the latest save is complete. Raises CheckpointError if it failed."""
        self.join(None)
        self.check()

    def join(self, seconds: float | None) -> None:
        """Wait until the latest save is complete or has failed, at most ``seconds``; None waits without limit."""
        if self.thread is not None:
            self.thread.join(seconds)

    def _write(
        self, target: Path, parts: list[shard_files.TensorPart], progress_json: str, blobs: Mapping[str, bytes]
    ) -> None:
        rank = dist.get_rank()
        file = target / f"rank_{rank:05d}.safetensors"
        try:
            written = on_all_ranks(lambda: shard_files.write(file, parts), self.group)
            from_rank_zero(partial(self._complete, target, written, json.loads(progress_json), blobs), self.group)
        except Exception as error:  # raised by the training thread in check()
            if rank == 0 and not (target / COMPLETE).is_file():
                shutil.rmtree(target, ignore_errors=True)
            self.failure = CheckpointError(
                f"{target.name} was not written: {error}; make room in {self.folder} or mend what is said, and go on "
                "with resume=true from the checkpoint before it"
            )

    def _complete(
        self, target: Path, written: list[dict[str, Any]], content: dict[str, Any], blobs: Mapping[str, bytes]
    ) -> None:
        """On rank 0: write the further files and the JSON files, the mark of completeness last, and remove old
        checkpoints."""
        blob_entries = [shard_files.write_bytes(target / name, data) for name, data in blobs.items()]
        entries = [*written, *blob_entries, shard_files.write_json(target / PROGRESS, content)]
        manifest_entry = shard_files.write_json(target / MANIFEST, shard_files.manifest(entries))
        shard_files.write_json(target / COMPLETE, {**manifest_entry, "step": content["step"]})
        self._remove_old(target)

    def _remove_old(self, newest: Path) -> None:
        """Remove interrupted saves, and all complete checkpoints but the last ``keep`` up to ``newest``."""
        for interrupted in _interrupted(self.folder):
            shutil.rmtree(interrupted)
        complete = sorted(folder for folder in self.folder.glob("step_*") if folder.name <= newest.name)
        for old in complete[: -self.keep]:
            shutil.rmtree(old)


def _interrupted(folder: Path) -> list[Path]:
    """The checkpoints whose save was interrupted, in order of their steps."""
    return sorted(checkpoint for checkpoint in folder.glob("step_*") if not (checkpoint / COMPLETE).is_file())


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint, its files unverified; None if there is none."""
    return max((mark.parent for mark in folder.glob(f"step_*/{COMPLETE}")), default=None)


def newest_intact(folder: Path, say: Callable[[str], None]) -> Path | None:
    """Collective: the newest complete checkpoint whose files have the checksums of when they were written.

    The ranks share the reading of the files. A damaged checkpoint is renamed to ``damaged_step_…``, reported with
    ``say``, and the one before it is checked. Returns None if the folder has no complete checkpoint.

    Raises:
        CheckpointError: all checkpoints of the folder are damaged.
    """
    group = control_group()
    damaged: list[str] = []

    def name_of_latest() -> str | None:
        checkpoint = latest(folder)
        return None if checkpoint is None else checkpoint.name

    for name in from_rank_zero(lambda: [checkpoint.name for checkpoint in _interrupted(folder)], group):
        say(f"checkpoint {name} was not finished when the run ended: it is left out")
    while True:
        name = from_rank_zero(name_of_latest, group)
        if name is None:
            break
        faults = _faults(folder / name)
        if not faults:
            return folder / name
        say(f"checkpoint {name} is damaged ({'; '.join(faults)}): it is set aside as damaged_{name}")
        damaged.append(name)
        from_rank_zero(partial(_set_aside, folder / name), group)
    if damaged:
        raise CheckpointError(
            f"{folder}: no intact checkpoint is left, {', '.join(damaged)} are damaged; put one back from a copy of "
            "the folder, or start anew with resume=false"
        )
    return None


def _set_aside(checkpoint: Path) -> None:
    target = checkpoint.with_name(f"damaged_{checkpoint.name}")
    shutil.rmtree(target, ignore_errors=True)
    checkpoint.rename(target)


def _faults(checkpoint: Path) -> list[str]:
    """Collective: what is wrong with the files of a checkpoint, equal on all ranks; empty if they are intact."""
    group = control_group()

    def read_files() -> dict[str, Any]:
        try:
            return {"files": manifest(checkpoint)["files"]}
        except CheckpointError as error:
            return {"fault": str(error)}

    answer = from_rank_zero(read_files, group)
    if "fault" in answer:
        return [answer["fault"]]
    files = answer["files"]
    local_faults = []
    for name in sorted(files)[dist.get_rank() :: dist.get_world_size()]:
        fault = shard_files.fault(checkpoint / name, files[name])
        if fault is not None:
            local_faults.append(fault)
    return [fault for faults in all_gather_json(local_faults, group) for fault in faults]


def manifest(checkpoint: Path) -> dict[str, Any]:
    """``files`` and ``tensors`` of ``shard_files.manifest``. Raises CheckpointError if it is not as it was written."""
    try:
        fault = shard_files.fault(checkpoint / MANIFEST, json.loads((checkpoint / COMPLETE).read_text()))
        if fault is None:
            return json.loads((checkpoint / MANIFEST).read_text())
    except (OSError, ValueError, KeyError) as error:
        fault = f"{COMPLETE}: {type(error).__name__}: {error}"
    raise CheckpointError(fault)


def progress(checkpoint: Path) -> dict[str, Any]:
    """The step, the layout and the values that the caller gave to :meth:`Saver.save`."""
    return json.loads((checkpoint / PROGRESS).read_text())


def load(checkpoint: Path, model: Model, optimizer: MegatronOptimizer, scheduler: OptimizerParamScheduler) -> int:
    """Collective: restore the policy, its optimiser, schedule and RNG states in place.

    Returns the number of finished steps, which is also the position in the data. Another parallel layout may load a
    checkpoint if it pads attention heads and vocabulary to the same sizes. RNG states belong to a layout and are
    restored only into the same one.

    Raises:
        ValueError: the paddings differ; the message names both values.
    """
    written = progress(checkpoint)["layout"]
    now = _layout(model)
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
    """Collective: restore one of a checkpoint's models, its optimiser and schedule in place.

    Args:
        checkpoint: the folder ``step_…``.
        name: the model's name in :meth:`Saver.save`.
        model: the model to restore into.
        optimizer: its optimiser.
        scheduler: its learning-rate schedule.
        rng: whether to restore the RNG states of the ranks too; the layout must be the same.

    Raises:
        ValueError: a tensor is missing or has another shape.
    """
    state = _model_state(model)
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
        for i, chunk in enumerate(model.chunks):
            chunk.module.load_state_dict(loaded[f"model{i}"])
        _load_groups(optimizer, scheduler, loaded["optimizer"])
        optimizer_shards.load_state(_distributed(optimizer), _model_state(model), reader, f"{name}/")
    # The updates that were made; how long and how high the schedule is stands in the settings, which may have changed.
    scheduler.num_steps = loaded["scheduler"]["num_steps"]
    scheduler.step(0)
    if rng:
        _set_rng_tensors(loaded["rng"])


def _fill(reader: shard_files.Reader, name: str, leaf: Any) -> Any:
    """Read the local part of a ShardedTensor."""
    if not isinstance(leaf, ShardedTensor):
        # Extra objects of layers are not in a checkpoint.
        return leaf.data
    target = torch.empty(leaf.local_shape, dtype=leaf.dtype)
    reader.fill(f"{name}/{leaf.key}", leaf.global_shape, leaf.global_offset, target)
    return target


def _model_state(model: Model) -> dict[str, Any]:
    """Chunk → the sharded state of its module.

    With ``non_homogeneous_layers`` each layer has a key of its own, numbered in the complete model. So a checkpoint
    does not depend on chunks and stages, and a frozen layer may lack moments.
    """
    metadata = {"non_homogeneous_layers": True}
    return {f"model{i}": chunk.module.sharded_state_dict(metadata=metadata) for i, chunk in enumerate(model.chunks)}


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
    """The only DistributedOptimizer in Megatron-Core's chain; a model with experts would have a second."""
    (distributed,) = optimizer.chained_optimizers
    return distributed


def _create_moments(optimizer: MegatronOptimizer) -> None:
    """Create zero moments if the optimiser has not made a step yet.

    A checkpoint contains them, and Megatron-Core reads the step counter of a torch optimiser.
    """
    inner = _distributed(optimizer).optimizer
    if isinstance(inner, torch.optim.AdamW | torch.optim.Adam):
        for group in inner.param_groups:
            for parameter in group["params"]:
                if inner.state[parameter]:
                    continue
                inner.state[parameter] = {
                    "step": torch.tensor(0.0),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
    elif not inner.state:
        # Transformer Engine's optimiser allocates its moments when a state is loaded.
        _distributed(optimizer).load_state_dict(_distributed(optimizer).state_dict())
        for state in inner.state.values():
            for moment in state.values():
                moment.zero_()


def _load_groups(optimizer: MegatronOptimizer, scheduler: OptimizerParamScheduler, loaded: dict[str, Any]) -> None:
    """Load the parameter groups and create moments. The groups keep what this run's settings gave them.

    Torch's AdamW writes the checkpoint of a CPU run, Transformer Engine's FusedAdam that of a GPU run. A field of a
    group that the writer does not have keeps the reader's default. FusedAdam has no ``step`` before the first update,
    and takes an integer.

    Megatron-Core 0.19 gives every parameter the same ``step`` tensor, so each update would count once per parameter.
    docs/dependencies.md names the version.
    """
    _create_moments(optimizer)
    inner = _distributed(optimizer).optimizer
    for group in loaded["optimizer"]["param_groups"]:
        for field, default in inner.defaults.items():
            group.setdefault(field, default)
        group.update(betas=inner.defaults["betas"], eps=inner.defaults["eps"])
        # Megatron-Core matches groups by these two. All groups of this project have the schedule's.
        group.update(max_lr=scheduler.max_lr, min_lr=scheduler.min_lr)
        group["step"] = int(group.get("step", 0))
    _distributed(optimizer).load_state_dict(loaded)
    for state in inner.state.values():
        if "step" in state:
            state["step"] = state["step"].clone()


def _rng_tensors() -> dict[str, ShardedTensor]:
    """This rank's RNG states as tensors whose keys contain the rank."""
    states = {"device": platform.current().rng_state(), **get_cuda_rng_tracker().get_states()}
    rank = dist.get_rank()
    return {name: ShardedTensor.from_rank_offsets(f"rng.{rank}.{name}", state.cpu()) for name, state in states.items()}


def _set_rng_tensors(states: dict[str, torch.Tensor]) -> None:
    platform.current().set_rng_state(states.pop("device"))
    get_cuda_rng_tracker().set_states(states)
