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

from megatron_ext.blocks import region
from rollout.weight_sync.checksum import rectangle_checksum
from rollout.weight_sync.layout import ParameterLayout
from rollout.weight_sync.memory import Signals, attach_tensors, here
from rollout.weight_sync.network import slot_view
from rollout.weight_sync.plan import Arrival, Copy, TensorInfo, read
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
    """A worker's share of a plan: (target, source) views, and what its parameters' checksums need.

    ``arrivals``: for each round the ranks in whose slots it lands and the views to copy when it has.
    """

    tensors: dict[str, TensorInfo]
    copies: list[tuple[torch.Tensor, torch.Tensor]]
    arrivals: list[list[tuple[torch.Tensor, torch.Tensor]]]
    signals: dict[int, tuple[Signals, int]]


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
        model = self.get_model()  # type: ignore[attr-defined]
        self.bridge_layouts = trace_layout(model, shapes)
        return {
            "parameters": [asdict(layout) for layout in self.bridge_layouts],
            "place": here(next(model.parameters()).device),
        }

    @_reports_errors
    def bridge_plan(self, message: str) -> Any:
        """Map the memory of the ranks on this host and resolve this worker's share of the plan to pairs of views.

        ``{"tensors", "shards": {rank: address}, "slots": {rank: address}, "rounds", "workers": [its share of each
        worker: {"copies", "arrivals", "readers": {rank: number among the readers of its slots}}]}``.
        """
        body = json.loads(message)
        share = body["workers"][self.rank]  # type: ignore[attr-defined]
        parameters = weight_tensors(self.get_model())  # type: ignore[attr-defined]
        shards = {rank: attach_tensors(address) for rank, address in body["shards"].items()}
        slots = {rank: attach_tensors(address) for rank, address in body["slots"].items()}

        def target(item: Copy | Arrival) -> torch.Tensor:
            return parameters[item.parameter].detach()[region(item.parameter_start, item.shape)]

        copies = [
            (target(c), shards[str(c.rank)][c.shard][region(c.local_start, c.shape)])
            for c in read(Copy, share["copies"])
        ]
        arrivals: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[] for _ in range(body["rounds"])]
        for a in read(Arrival, share["arrivals"]):
            place = target(a)
            packed = slot_view(slots[str(a.rank)]["slots"], a.round, a.offset, a.shape, place.dtype)
            arrivals[a.round].append((place, packed))
        signals = {}
        for rank, reader in share["readers"].items():
            signals[int(rank)] = (Signals(slots[rank]["signals"], body["slots"][rank]["pid"]), reader)
            signals[int(rank)][0].register(reader)
        tensors = {
            name: TensorInfo(tuple(shape), dtype, unit) for name, (shape, dtype, unit) in body["tensors"].items()
        }
        self.bridge_placement = _Placement(tensors, copies, arrivals, signals)
        return {}

    @_reports_errors
    def bridge_update(self, message: str) -> Any:
        """Copy every rectangle into place; ``{"sequence", "verify"}``. Returns the checksums of what the parameters
        hold then, if they are to be verified."""
        body = json.loads(message)
        placement = self._placement()
        rounds = len(placement.arrivals)
        first = body["sequence"] * rounds
        local = iter(placement.copies)

        def copy_one() -> bool:
            for target, source in local:
                target.copy_(source)
                return True
            return False

        try:
            for t, arrivals in enumerate(placement.arrivals):
                for signals, _ in placement.signals.values():
                    signals.wait_landed(first + t + 1, meanwhile=copy_one)
                for target, source in arrivals:
                    target.copy_(source)
                self._finish_copies()
                for signals, reader in placement.signals.values():
                    signals.place(reader, first + t + 1)
            while copy_one():
                pass
            self._finish_copies()
        finally:  # after a failure too: the ranks must not wait for this worker
            for signals, reader in placement.signals.values():
                signals.place(reader, first + rounds)
        return self._region_checksums() if body["verify"] else {"checksums": []}

    def _finish_copies(self) -> None:
        if current_platform.is_cuda():
            torch.cuda.current_stream().synchronize()

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
        return {"checksums": [[*item] for item in _checksums(self.bridge_layouts, tensors, self._placement().tensors)]}


def _checksums(
    layouts: list[ParameterLayout], parameters: dict[str, torch.Tensor], tensors: dict[str, TensorInfo]
) -> Iterator[tuple[str, tuple[int, ...], int]]:
    for layout in layouts:
        for part in layout.regions:
            info = tensors[part.hf_name]
            values = parameters[layout.name][region(part.start, part.shape)]
            yield part.hf_name, part.hf_start, rectangle_checksum(values, part.hf_start, info.shape, info.unit)


def _digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.detach().contiguous().cpu().view(torch.uint8).numpy().tobytes()).hexdigest()


# Imported in every worker process before the model is built.
if current_platform.is_cpu():
    keep_linear_weights()
