"""The bridge inside each vLLM worker process: loaded as vLLM's ``worker_extension_cls``, before the model is built.

Methods are called through vLLM's ``collective_rpc`` and pass JSON text. They never raise, because an exception inside
a collective call kills the engine: a failure comes back as ``{"error": …}``.

On a CPU vLLM packs the weight of every linear layer into a oneDNN handle and drops (or, for the LM head, forgets) the
weight itself. :func:`keep_linear_weights` makes it keep the weight, which is then written in place, and
:meth:`WeightBridgeWorker.bridge_finish` packs it again with vLLM's own code, so that kernels, bits and speed are those
of plain vLLM.
"""

import hashlib
import inspect
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import wraps
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from vllm.model_executor.layers import utils as vllm_layers
from vllm.platforms import current_platform

from rollout.weight_sync.checksum import rectangle_checksum
from rollout.weight_sync.layout import ParameterLayout
from rollout.weight_sync.plan import Copy, Plan
from rollout.weight_sync.shared_memory import SharedMemoryReceiver
from rollout.weight_sync.vllm_layout import trace_layout, weight_tensors

_packed_layers: list[torch.nn.Module] = []
_vllm_pack = vllm_layers.dispatch_cpu_unquantized_gemm


def _pack(layer: torch.nn.Module) -> None:
    """Have vLLM prepare its kernel for ``layer`` from the present weight, leaving the layer's tensors as they are."""
    bias = getattr(layer, "bias", None)
    # vLLM writes into what it is given: some kernels convert the bias in place.
    stand_in = SimpleNamespace(weight=layer.weight, bias=None if bias is None else bias.detach().clone())
    _vllm_pack(stand_in, remove_weight=False)

    def cpu_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return stand_in.cpu_linear(x, weight, None if bias is None else stand_in.bias)

    layer.__dict__["cpu_linear"] = cpu_linear


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
    """A worker's share of a plan: target and source views per copy, and what its parameters' checksums need."""

    plan: Plan
    copies: list[tuple[Copy, torch.Tensor, torch.Tensor]]
    buffers: list[SharedMemoryReceiver]


class WeightBridgeWorker:
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
        self.bridge_layouts = trace_layout(self.get_model(), shapes)  # type: ignore[attr-defined]
        return {"parameters": [asdict(layout) for layout in self.bridge_layouts]}

    @_reports_errors
    def bridge_plan(self, message: str) -> Any:
        """Map the senders' buffers and resolve the plan's copies for this worker to pairs of views."""
        body = json.loads(message)
        plan = Plan.from_json(body["plan"])
        buffers = [SharedMemoryReceiver(address) for address in body["addresses"]]
        tensors = weight_tensors(self.get_model())  # type: ignore[attr-defined]
        copies = []
        for copy in plan.copies[self.rank]:  # type: ignore[attr-defined]
            piece = plan.pieces[copy.piece]
            dtype = getattr(torch, plan.tensors[piece.hf_name].dtype)
            size = piece.rectangle.size * dtype.itemsize
            packed = buffers[piece.holders[0].rank].buffer[piece.offset : piece.offset + size]
            source = _part(packed.view(dtype).view(piece.rectangle.shape), copy.start, copy.shape)
            target = _part(tensors[copy.parameter].detach(), copy.parameter_start, copy.shape)
            copies.append((copy, target, source))
        self.bridge_placement = _Placement(plan, copies, buffers)
        return {}

    @_reports_errors
    def bridge_update(self) -> Any:
        """Copy every rectangle into place, then return the checksums of what the parameters hold now."""
        for copy, target, source in self._placement().copies:
            try:
                target.copy_(source)
            except Exception as error:
                raise RuntimeError(f"{copy.parameter}: {error}") from error
        return self._region_checksums()

    @_reports_errors
    def bridge_checksums(self) -> Any:
        """Checksums of the live parameters, one per region of the layout."""
        return self._region_checksums()

    @_reports_errors
    def bridge_finish(self) -> Any:
        """Pack the linear layers again from their new weights (CPU; elsewhere kernels read the live weight)."""
        for layer in _packed_layers:
            _pack(layer)
        return {}

    @_reports_errors
    def bridge_digests(self) -> Any:
        """SHA-256 of the bytes of every parameter: equal digests mean equal bits."""
        tensors = weight_tensors(self.get_model())  # type: ignore[attr-defined]
        return {"digests": {name: _digest(tensor) for name, tensor in tensors.items()}}

    def _placement(self) -> _Placement:
        if not hasattr(self, "bridge_placement"):
            raise RuntimeError("there is no plan yet: make a WeightBridge first")
        return self.bridge_placement

    def _region_checksums(self) -> Any:
        tensors = weight_tensors(self.get_model())  # type: ignore[attr-defined]
        return {"checksums": [[*item] for item in _checksums(self.bridge_layouts, tensors, self._placement().plan)]}


def _part(tensor: torch.Tensor, start: tuple[int, ...], shape: tuple[int, ...]) -> torch.Tensor:
    return tensor[tuple(slice(a, a + n) for a, n in zip(start, shape, strict=True))]


def _checksums(
    layouts: list[ParameterLayout], tensors: dict[str, torch.Tensor], plan: Plan
) -> Iterator[tuple[str, tuple[int, ...], int]]:
    for layout in layouts:
        for region in layout.regions:
            info = plan.tensors[region.hf_name]
            values = _part(tensors[layout.name], region.start, region.shape)
            yield region.hf_name, region.hf_start, rectangle_checksum(values, region.hf_start, info.shape, info.unit)


def _digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.detach().contiguous().cpu().view(torch.uint8).numpy().tobytes()).hexdigest()


# Imported in every worker process before the model is built.
if current_platform.is_cpu():
    keep_linear_weights()
