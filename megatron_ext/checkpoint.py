"""Save and resume: Megatron-Core's sharded state in files without pickle, loadable under another parallel layout.

A checkpoint is a folder ``step_000012`` with:

- one safetensors file per rank: weights, FP32 masters, moments and RNG states (``shard_files``);
- ``progress.json``: the step, the schedules and the values that the caller resumes from;
- ``manifest.json``: size and checksum of every file, and where the parts of each tensor are;
- ``complete.json``, written last: the manifest's checksum. A save without it was interrupted and is never read.

A background thread writes the files from a copy of the state on the host while training continues.
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
# Fields of ParallelConfig. RNG states are only valid for the same values of these fields and the same number of
# replicas.
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

    Training may change the state as soon as this returns. The copies are in ``buffers`` and overwrite the snapshot that
    was there, which must have been written to disk (``Saver.wait``).
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
        # Only the main replica of a replicated tensor is written.
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
            keep: the number of complete checkpoints to keep. With 2 or more there is one to fall back to.
        """
        self.folder = folder
        self.keep = keep
        # The writing thread needs a process group of its own, because collectives of two threads must not mix.
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
        """Collective: wait for the previous save, then begin to write ``folder/step_…`` in the background.

        Args:
            step: the number of finished steps.
            models: name → snapshot. ``POLICY`` must be one of the names.
            progress: further values (JSON) that the caller resumes from. :func:`progress` returns them.
            blobs: file name → content of further files. Must be the same on every rank.

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
        """Raise CheckpointError if the latest save has already failed."""
        if self.failure is not None:
            raise self.failure

    def wait(self) -> None:
        """Wait until the latest save is complete. Raises CheckpointError if it failed."""
        self.join(None)
        self.check()

    def join(self, seconds: float | None) -> None:
        """Wait until the latest save is complete or has failed, for at most ``seconds``. None waits without limit."""
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
        """On rank 0: write the blobs and the JSON files, ``complete.json`` last. Then remove old checkpoints."""
        blob_entries = [shard_files.write_bytes(target / name, data) for name, data in blobs.items()]
        entries = [*written, *blob_entries, shard_files.write_json(target / PROGRESS, content)]
        manifest_entry = shard_files.write_json(target / MANIFEST, shard_files.manifest(entries))
        shard_files.write_json(target / COMPLETE, {**manifest_entry, "step": content["step"]})
        self._remove_old(target)

    def _remove_old(self, newest: Path) -> None:
        """Remove interrupted saves, and all complete checkpoints up to ``newest`` except the last ``keep`` of them."""
        for interrupted in _interrupted(self.folder):
            shutil.rmtree(interrupted)
        complete = sorted(folder for folder in self.folder.glob("step_*") if folder.name <= newest.name)
        for old in complete[: -self.keep]:
            shutil.rmtree(old)


def _interrupted(folder: Path) -> list[Path]:
    """The checkpoints whose save was interrupted, ordered by step."""
    return sorted(checkpoint for checkpoint in folder.glob("step_*") if not (checkpoint / COMPLETE).is_file())


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint, or None if there is none. Does not verify its files."""
    return max((mark.parent for mark in folder.glob(f"step_*/{COMPLETE}")), default=None)


def newest_intact(folder: Path, say: Callable[[str], None]) -> Path | None:
    """Collective: the newest complete checkpoint whose files still have the checksums in its manifest.

    The ranks divide the reading of the files among them. A damaged checkpoint is reported with ``say`` and renamed to
    ``damaged_step_…``. Then the checkpoint before it is checked. Returns None if the folder has no complete checkpoint.

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
    """Collective: describe what is wrong with the files of a checkpoint.

    Every rank returns the same list. It is empty if all files are intact.
    """
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
    """Read the manifest of a checkpoint: ``files`` and ``tensors`` as ``shard_files.manifest`` returned them.

    Raises CheckpointError if the file is not as it was written.
    """
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

    Returns the number of finished steps, which is also the position in the data. A checkpoint can be loaded under
    another parallel layout if that layout pads attention heads and vocabulary to the same sizes. RNG states are
    restored only under the layout that they were saved with.

    Raises:
        ValueError: the padded sizes differ. The message names both values.
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
    """Collective: restore one of a checkpoint's models with its optimiser and schedule, in place.

    Args:
        checkpoint: the folder ``step_…``.
        name: the model's name in :meth:`Saver.save`.
        model: the model to restore into.
        optimizer: the model's optimiser.
        scheduler: the model's learning-rate schedule.
        rng: whether to restore the RNG states of the ranks too. The layout must then be the same.

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
    # Only the number of updates is restored. The length and height of the schedule come from the settings, which may
    # have changed.
    scheduler.num_steps = loaded["scheduler"]["num_steps"]
    scheduler.step(0)
    if rng:
        _set_rng_tensors(loaded["rng"])


def _fill(reader: shard_files.Reader, name: str, leaf: Any) -> Any:
    """Read the local part of a ShardedTensor."""
    if not isinstance(leaf, ShardedTensor):
        # A checkpoint does not contain the extra objects of layers.
        return leaf.data
    target = torch.empty(leaf.local_shape, dtype=leaf.dtype)
    reader.fill(f"{name}/{leaf.key}", leaf.global_shape, leaf.global_offset, target)
    return target


def _model_state(model: Model) -> dict[str, Any]:
    """The sharded state of each chunk's module, by the chunk's name.

    With ``non_homogeneous_layers`` each layer has a key of its own, with the layer's number in the complete model. So a
    checkpoint does not depend on chunks and stages, and a frozen layer may have no moments.
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
    """The only DistributedOptimizer in Megatron-Core's chain. A model with experts would have a second one."""
    (distributed,) = optimizer.chained_optimizers
    return distributed


def _create_moments(optimizer: MegatronOptimizer) -> None:
    """Create zero moments if the optimiser has not made a step yet.

    A checkpoint contains the moments, and Megatron-Core reads the step counter of a torch optimiser.
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
    """Load the parameter groups and create moments.

    Betas, epsilon and the greatest and least learning rate come from this run's settings.

    A checkpoint of a CPU run is from torch's AdamW, one of a GPU run from Transformer Engine's FusedAdam. A field of a
    group that the checkpoint does not have gets the default of this run's optimiser. FusedAdam has no ``step`` before
    the first update, and takes an integer.

    Megatron-Core 0.19 gives every parameter the same ``step`` tensor, so each update would count once per parameter.
    Therefore ``step`` is cloned for each parameter. docs/dependencies.md names the version.
    """
    _create_moments(optimizer)
    inner = _distributed(optimizer).optimizer
    for group in loaded["optimizer"]["param_groups"]:
        for field, default in inner.defaults.items():
            group.setdefault(field, default)
        group.update(betas=inner.defaults["betas"], eps=inner.defaults["eps"])
        # Megatron-Core matches groups by these two fields. In this project all groups have the schedule's values.
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
