"""The bridge inside each vLLM worker process: loaded as vLLM's ``worker_extension_cls``, before the model is built.

Methods are called through vLLM's ``collective_rpc`` and pass JSON text. They never raise, because an exception inside
a collective call kills the engine: a failure comes back as ``{"error": …}``.

On a CPU vLLM packs the weight of every linear layer into a oneDNN handle and drops (or, for the LM head, forgets) the
weight itself. :func:`keep_linear_weights` makes it keep the weight, which is then written in place, and
:func:`pack_layers` packs it again with vLLM's own code, so that kernels, bits and speed are those of plain vLLM.
"""

import hashlib
import inspect
import json
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partialmethod, wraps
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from vllm.config import set_current_vllm_config
from vllm.distributed.device_communicators import shm_broadcast
from vllm.model_executor.layers import utils as vllm_layers
from vllm.platforms import current_platform

from megatron_ext.blocks import region
from rollout.weight_sync.checksum import rectangle_checksum
from rollout.weight_sync.copying import Batch, Copiers, batches, by_rows, copy_batch, even_threads
from rollout.weight_sync.layout import ParameterLayout
from rollout.weight_sync.memory import Signals, attach_tensors, here
from rollout.weight_sync.network import slot_view
from rollout.weight_sync.plan import Arrival, Copy, TensorInfo, read
from rollout.weight_sync.quantised import Staging, check_kernels, quantised_layers, unquantised
from rollout.weight_sync.vllm_layout import trace_layout, weight_tensors

SPIN_SECONDS = 0.002
LOOK_AGAIN_SECONDS = 0.02

_packed_layers: list[torch.nn.Module] = []
_vllm_pack = vllm_layers.dispatch_cpu_unquantized_gemm


def _pack(layer: Any) -> None:
    """Have vLLM prepare its kernel for ``layer`` from the present weight, leaving the layer's tensors as they are."""
    bias = getattr(layer, "bias", None)
    # vLLM writes into what it is given: some kernels convert the bias in place.
    stand_in = SimpleNamespace(
        weight=_apart_in_cache(layer.weight), bias=None if bias is None else bias.detach().clone()
    )
    _vllm_pack(stand_in, remove_weight=False)
    del stand_in.weight  # the handle has its own

    def cpu_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return stand_in.cpu_linear(x, weight, None if bias is None else stand_in.bias)

    layer.__dict__["cpu_linear"] = cpu_linear


def _apart_in_cache(weight: torch.Tensor) -> torch.Tensor:
    """The weight; its rows further apart where they are a whole number of 2 KiB long: oneDNN packs column by column,
    and such rows share few of the cache's sets, which takes twice as long as with this copy (BF16)."""
    rows, width = weight.shape
    if (
        weight.stride(0) * weight.element_size() % 2048
        or weight.dtype == torch.float32
        or vllm_layers.check_cpu_sgl_kernel(rows, width, weight.dtype)  # packed by another kernel, row by row
    ):
        return weight
    return weight.new_empty(rows, width + 64 // weight.element_size())[:, :width].copy_(weight)


def pack_layers() -> float:
    """Pack all linear layers again from their weights (CPU; elsewhere kernels read the live weight); seconds."""
    started = time.perf_counter()
    for layer in _packed_layers:
        _pack(layer)
    return time.perf_counter() - started


def _keep_weight_and_pack(layer: torch.nn.Module, remove_weight: bool) -> None:
    if layer.weight.ndim != 2:
        raise RuntimeError(f"{type(layer).__name__}: the weight bridge knows 2-D linear weights only on a CPU")
    _packed_layers.append(layer)
    _pack(layer)


def keep_linear_weights() -> None:
    """Replace vLLM's packing of CPU linear layers by one that keeps the weights; once per process.

    Raises RuntimeError when vLLM has moved the patched function: its signature is the check here, and
    :func:`rollout.weight_sync.vllm_layout.weight_tensors` refuses any weight that vanished nevertheless.
    """
    parameters = list(inspect.signature(_vllm_pack).parameters)
    if parameters != ["layer", "remove_weight"]:
        raise RuntimeError(
            f"vllm.model_executor.layers.utils.dispatch_cpu_unquantized_gemm{tuple(parameters)} has changed: adapt "
            "rollout/weight_sync/worker.py to this vLLM"
        )
    vllm_layers.dispatch_cpu_unquantized_gemm = _keep_weight_and_pack


def _reports_errors(method: Callable[..., Any]) -> Callable[..., str]:
    @wraps(method)
    def wrapped(*args: Any) -> str:
        try:
            return json.dumps(method(*args))
        except Exception as error:  # reported to the caller; raising would kill the engine
            return json.dumps({"error": f"{type(error).__name__}: {error}"})

    return wrapped


@dataclass
class _Placement:
    """A worker's share of a plan: (target, source) views, and what its parameters' checksums need.

    ``copies``: from the ranks ``sources`` on this host, in batches, which ``copiers`` make. ``arrivals``: for each
    round the ranks in whose slots it lands and the views to copy when it has. ``staged_copies``: those of each
    quantised weight. ``complete``: the quantised weights that have all their arrivals after a round, on every worker of
    the engine, which quantise together; -1: that have none.
    """

    tensors: dict[str, TensorInfo]
    sources: list[Signals]
    copies: list[Batch]
    copiers: Copiers
    arrivals: list[list[tuple["_Target", torch.Tensor]]]
    signals: dict[int, tuple[Signals, int]]
    staging: Staging
    staged_copies: dict[str, list[tuple["_Target", torch.Tensor]]]
    complete: dict[int, list[str]]
    checksums: list[list[Any]]  # of the quantised weights, as they were at the last verified sync


@dataclass(frozen=True)
class _Target:
    """A rectangle of a live parameter, or of a quantised weight (``parameter`` None) when it is being staged."""

    name: str
    region: tuple[slice, ...]
    parameter: torch.Tensor | None

    def view(self, staging: Staging) -> torch.Tensor:
        tensor = staging.weight(self.name) if self.parameter is None else self.parameter
        return tensor[self.region]


class WeightSyncWorker:
    """Mixed into vLLM's worker class, whose ``get_model``, ``rank`` and life it shares."""

    bridge_layouts: list[ParameterLayout]
    bridge_placement: _Placement

    @_reports_errors
    def bridge_started(self) -> Any:
        """Drop the names of the shared memory through which CPU workers reduce: all have mapped it, and only the names
        would outlive a kill."""
        if "VLLM_DIST_IDENT" in os.environ:
            for path in Path("/dev/shm").glob(os.environ["VLLM_DIST_IDENT"] + "*"):
                path.unlink(missing_ok=True)
        return {}

    @_reports_errors
    def bridge_layout(self, hf_shapes: str) -> Any:
        """Trace vLLM's loaders with checkpoint tensors ``{name: shape}``; returns the layout of each parameter."""
        shapes = {name: tuple(shape) for name, shape in json.loads(hf_shapes).items()}
        model = self.get_model()  # type: ignore[attr-defined]
        with unquantised(model) as layers:
            check_kernels(layers)
            traced = trace_layout(model, shapes)
        self.bridge_layouts = [replace(layout, staged=layout.name in layers) for layout in traced]
        return {
            "parameters": [asdict(layout) for layout in self.bridge_layouts],
            "place": here(next(model.parameters()).device),
        }

    @_reports_errors
    def bridge_plan(self, message: str) -> Any:
        """Map the memory of the ranks on this host and resolve this worker's share of the plan to pairs of views.

        ``{"tensors", "shards": {rank: address}, "slots": {rank: address}, "signals": {rank: address}, "rounds",
        "workers": [its share of each worker: {"copies", "arrivals", "readers": {rank: number among the readers of its
        slots}}]}``.
        """
        body = json.loads(message)
        share = body["workers"][self.rank]  # type: ignore[attr-defined]
        with unquantised(self.get_model()) as layers:  # type: ignore[attr-defined]
            parameters = weight_tensors(self.get_model())  # type: ignore[attr-defined]
        shards = {rank: attach_tensors(address) for rank, address in body["shards"].items()}
        slots = {rank: attach_tensors(address) for rank, address in body["slots"].items()}
        progress = {
            rank: Signals(attach_tensors(address)["signals"], address["pid"])
            for rank, address in body["signals"].items()
        }

        def target(item: Copy | Arrival) -> _Target:
            live = None if item.parameter in layers else parameters[item.parameter].detach()
            return _Target(item.parameter, region(item.parameter_start, item.shape), live)

        copies: list[tuple[torch.Tensor, list[torch.Tensor]]] = []
        staged_copies: dict[str, list[tuple[_Target, torch.Tensor]]] = {name: [] for name in layers}
        planned = read(Copy, share["copies"])
        for parts in by_rows(planned, parameters):
            name = parts[0].parameter
            sources = [shards[str(c.rank)][c.shard][region(c.local_start, c.shape)] for c in parts]
            if name in layers:
                staged_copies[name] += zip(map(target, parts), sources, strict=True)
            else:
                shape = (*parts[0].shape[:-1], sum(c.shape[-1] for c in parts))
                copies.append((parameters[name].detach()[region(parts[0].parameter_start, shape)], sources))
        arrivals: list[list[tuple[_Target, torch.Tensor]]] = [[] for _ in range(body["rounds"])]
        for a in read(Arrival, share["arrivals"]):
            dtype = parameters[a.parameter].dtype
            packed = slot_view(slots[str(a.rank)]["slots"], a.round, a.offset, a.shape, dtype)
            arrivals[a.round].append((target(a), packed))
        last = dict.fromkeys(layers, -1)
        for worker in body["workers"]:
            for a in read(Arrival, worker["arrivals"]):
                if a.parameter in last:
                    last[a.parameter] = max(last[a.parameter], a.round)
        complete: dict[int, list[str]] = defaultdict(list)
        for name, at in last.items():
            complete[at].append(name)
        signals = {}
        for rank, reader in share["readers"].items():
            signals[int(rank)] = (progress[rank], reader)
            progress[rank].register(reader)
        tensors = {
            name: TensorInfo(tuple(shape), dtype, unit) for name, (shape, dtype, unit) in body["tensors"].items()
        }
        device = next(self.get_model().parameters()).device  # type: ignore[attr-defined]
        cores = len(os.sched_getaffinity(0)) if device.type == "cpu" else 1
        copiers = Copiers(even_threads(cores, len(body["workers"])))
        if hasattr(self, "bridge_placement"):
            self.bridge_placement.copiers.stop()
        self.bridge_placement = _Placement(
            tensors,
            [progress[rank] for rank in sorted({str(c.rank) for c in planned})],
            batches(copies),
            copiers,
            arrivals,
            signals,
            Staging(layers, device),
            staged_copies,
            complete,
            [],
        )
        return {}

    @_reports_errors
    def bridge_update(self, message: str) -> Any:
        """Copy every rectangle into place, then pack the linear layers; ``{"sequence", "verify"}``. Returns the
        checksums of what the parameters hold then, if they are to be verified, and the seconds of both."""
        body = json.loads(message)
        placement = self._placement()
        staging, verify = placement.staging, body["verify"]
        rounds = len(placement.arrivals)
        first = body["sequence"] * (1 + rounds) + 1
        local = iter(placement.copies)

        def copy_some() -> bool:
            for batch in local:
                copy_batch(batch)
                return True
            return False

        if verify:
            placement.checksums = []
        try:
            for rank in placement.sources:
                rank.wait_landed(first, meanwhile=lambda: False)  # this order may be here before the rank
            begun = time.perf_counter()
            for t, arrivals in enumerate(placement.arrivals):
                for signals, _ in placement.signals.values():
                    signals.wait_landed(first + t + 1, meanwhile=copy_some)
                for target, source in arrivals:
                    target.view(staging).copy_(source)
                self._finish_copies()
                for signals, reader in placement.signals.values():
                    signals.place(reader, first + t + 1)
                self._quantise(placement.complete[t], verify)
            placement.copiers.run(copy_some)
            self._quantise(placement.complete[-1], verify)
            self._finish_copies()
        finally:  # after a failure too: the ranks must not wait for this worker
            for signals, reader in placement.signals.values():
                signals.place(reader, first + rounds)
        copied = time.perf_counter() - begun
        checksums = self._region_checksums() if verify else {"checksums": []}
        return checksums | {"copying_seconds": copied, "packing_seconds": pack_layers()}

    def _quantise(self, names: list[str], verify: bool) -> None:
        """Quantise these weights, one after the other, when the copies from this host are made too."""
        placement = self._placement()
        layouts = {layout.name: layout for layout in self.bridge_layouts} if verify else {}
        for name in names:
            for target, source in placement.staged_copies[name]:
                target.view(placement.staging).copy_(source)
            if verify:
                weight = {name: placement.staging.weight(name)}
                placement.checksums += map(list, _checksums([layouts[name]], weight, placement.tensors))
            with set_current_vllm_config(self.vllm_config):  # type: ignore[attr-defined]
                placement.staging.quantise(name)

    def _finish_copies(self) -> None:
        if current_platform.is_cuda():
            torch.cuda.current_stream().synchronize()

    @_reports_errors
    def bridge_checksums(self) -> Any:
        """Checksums of the live parameters, one per region of the layout; of a quantised weight, those of what it was
        made of at the last verified sync."""
        return self._region_checksums()

    @_reports_errors
    def bridge_digests(self) -> Any:
        """SHA-256 of the bytes of every parameter: equal digests mean equal bits."""
        model = self.get_model()  # type: ignore[attr-defined]
        quantised = quantised_layers(model)
        with unquantised(model):
            tensors = {name: tensor for name, tensor in weight_tensors(model).items() if name not in quantised}
        for name, layer in quantised.items():
            prefix = name.removesuffix("weight")
            tensors |= {prefix + each: tensor for each, tensor in layer.named_parameters()}
        return {"digests": {name: _digest(tensor) for name, tensor in tensors.items()}}

    def _placement(self) -> _Placement:
        if not hasattr(self, "bridge_placement"):
            raise RuntimeError("there is no plan yet: make a WeightSync first")
        return self.bridge_placement

    def _region_checksums(self) -> Any:
        placement = self._placement()
        with unquantised(self.get_model()) as layers:  # type: ignore[attr-defined]
            tensors = weight_tensors(self.get_model())  # type: ignore[attr-defined]
        layouts = [layout for layout in self.bridge_layouts if layout.name not in layers]
        return {"checksums": [*placement.checksums, *map(list, _checksums(layouts, tensors, placement.tensors))]}


def _checksums(
    layouts: list[ParameterLayout], parameters: dict[str, torch.Tensor], tensors: dict[str, TensorInfo]
) -> Iterator[tuple[str, tuple[int, ...], int]]:
    for layout in layouts:
        for part in layout.regions:
            info = tensors[part.hf_name]
            values = parameters[layout.name][region(part.start, part.shape)]
            yield part.hf_name, part.hf_start, rectangle_checksum(values, part.hf_start, info.shape, info.unit)


def _digest(tensor: torch.Tensor) -> str:
    # A copy with a stride of 1, which another type's view needs: a tensor of one element may have any stride.
    flat = torch.empty(tensor.numel(), dtype=tensor.dtype, device="cpu")
    flat.copy_(tensor.detach().flatten())
    return hashlib.sha256(flat.view(torch.uint8).numpy().tobytes()).hexdigest()


def spin_less() -> None:
    """Have vLLM's processes look for a call or an answer again and again for SPIN_SECONDS behind the last, then sleep
    until it comes. vLLM's own second takes the cores from the workers that are still at work, and from the trainer. A
    message may not wake a sleeper (zmq drops one that is sent within about a millisecond of another), who looks for
    itself after LOOK_AGAIN_SECONDS; vLLM's own 5 were seen as a pause in a batch."""
    condition = shm_broadcast.SpinCondition
    condition.__init__ = partialmethod(condition.__init__, busy_loop_s=SPIN_SECONDS)
    shm_broadcast.SHM_READER_RECHECK_INTERVAL_MS = int(1e3 * LOOK_AGAIN_SECONDS)


# Imported in the engine's process and in its workers, before a model is built or a queue made.
if current_platform.is_cpu():
    keep_linear_weights()
    spin_less()
