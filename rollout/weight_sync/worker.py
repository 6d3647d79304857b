"""The weight sync inside each vLLM worker process, as vLLM's ``worker_extension_cls``.

vLLM loads the module before it builds the model. Its ``collective_rpc`` calls the methods with JSON text. They never
raise, because an exception inside a collective call ends the engine. They return a failure as ``{"error": …}``.
"""

import hashlib
import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import wraps
from typing import Any

import torch
from vllm.config import set_current_vllm_config

from megatron_ext.blocks import region
from rollout import vllm_platform
from rollout.vllm_platform import pack_layers
from rollout.weight_sync.checksum import rectangle_checksum
from rollout.weight_sync.copying import Batch, Copiers, batches, by_rows, copy_batch, even_threads
from rollout.weight_sync.layout import ParameterLayout
from rollout.weight_sync.memory import Signals, attach_tensors, place_of
from rollout.weight_sync.network import slot_view
from rollout.weight_sync.plan import Copy, Recv, TensorInfo, read_rows
from rollout.weight_sync.quantised import Staging, check_kernels, quantised_layers, unquantised
from rollout.weight_sync.vllm_layout import trace_layout, weight_tensors

PLATFORM = vllm_platform.of_vllm()
# vLLM's worker processes import this module before they build a model or a queue.
PLATFORM.change_vllm()


def _errors_as_json(method: Callable[..., Any]) -> Callable[..., str]:
    @wraps(method)
    def wrapped(*args: Any) -> str:
        try:
            return json.dumps(method(*args))
        except Exception as error:
            # The caller raises the error. Raising it here would end the engine.
            return json.dumps({"error": f"{type(error).__name__}: {error}"})

    return wrapped


@dataclass(frozen=True)
class _Target:
    """The rectangle that a copy writes: in a live parameter, or in the staged copy of a weight that is quantised."""

    name: str
    region: tuple[slice, ...]
    # None for a weight that is quantised.
    parameter: torch.Tensor | None

    def view(self, staging: Staging) -> torch.Tensor:
        tensor = staging.weight(self.name) if self.parameter is None else self.parameter
        return tensor[self.region]


_Pairs = list[tuple[_Target, torch.Tensor]]
"""(target, source) views."""


@dataclass
class _WorkerPlan:
    """A worker's share of a plan, resolved to views of mapped memory."""

    tensors: dict[str, TensorInfo]
    source_signals: list[Signals]
    """The signals of the ranks on this host whose shards ``copies`` and ``staged_copies`` read."""
    copies: list[Batch]
    copiers: Copiers
    """The threads that execute ``copies``."""
    padding: list[torch.Tensor]
    """The parts of live parameters that hold zeros instead of weights. They are zeroed at each sync, because the
    contents of memory are undefined after a sleep."""
    recvs: list[_Pairs]
    """[round]: the copies from the slots of ranks on this host, which may start once the round is ready."""
    slot_signals: list[tuple[Signals, int]]
    """For each rank whose slots ``recvs`` reads: its signals, and this worker's number among the readers of the
    slots."""
    staging: Staging
    staged_copies: dict[str, _Pairs]
    """For each quantised weight: its copies from shards on this host."""
    complete_after: dict[int, list[str]]
    """Round → the quantised weights that are complete after it on every worker of the engine. The workers quantise a
    weight together. Round -1 has the weights of which no part crosses the network."""
    staged_checksums: list[list[Any]]
    """The checksums of the quantised weights before quantisation, at the last verified sync."""


class WeightSyncWorker:
    """A mixin of vLLM's worker class. It uses that class's ``rank``, ``vllm_config``, ``model_runner`` and
    ``get_model``."""

    rank: int
    vllm_config: Any
    model_runner: Any
    get_model: Callable[[], torch.nn.Module]

    weight_sync_layouts: list[ParameterLayout]
    weight_sync_worker_plan: _WorkerPlan

    @_errors_as_json
    def weight_sync_start(self) -> Any:
        """Finish the setup of the worker. Called once, when the engine has started."""
        PLATFORM.after_start()
        return {}

    @_errors_as_json
    def weight_sync_layout(self, hf_shapes: str) -> Any:
        """Trace vLLM's weight loaders for checkpoint tensors ``{name: shape}``.

        Returns the layout of each parameter, and the worker's place.
        """
        shapes = {name: tuple(shape) for name, shape in json.loads(hf_shapes).items()}
        model = self.get_model()
        with unquantised(model) as layers:
            check_kernels(layers)
            traced = trace_layout(model, shapes)
        self.weight_sync_layouts = [replace(layout, staged=layout.name in layers) for layout in traced]
        return {
            "parameters": [asdict(layout) for layout in self.weight_sync_layouts],
            "place": place_of(_device(model), PLATFORM),
        }

    @_errors_as_json
    def weight_sync_plan(self, message: str) -> Any:
        """Map the memory of the ranks on this host, and resolve this worker's share of the plan to pairs of views.

        The message is ``{"tensors", "shards": {rank: address}, "slots": {rank: address}, "signals": {rank: address},
        "rounds", "workers"}``. ``workers`` has the share of each worker: ``{"copies", "recvs", "readers": {rank: the
        worker's number among the readers of that rank's slots}}``.
        """
        body = json.loads(message)
        share = body["workers"][self.rank]
        model = self.get_model()
        with unquantised(model) as layers:
            parameters = weight_tensors(model)
        shards = {int(rank): attach_tensors(address) for rank, address in body["shards"].items()}
        slots = {int(rank): attach_tensors(address)["slots"] for rank, address in body["slots"].items()}
        signals = {}
        for rank, address in body["signals"].items():
            signals[int(rank)] = Signals(attach_tensors(address)["signals"], address["pid"])

        def target(item: Copy | Recv) -> _Target:
            live = None if item.parameter in layers else parameters[item.parameter].detach()
            return _Target(item.parameter, region(item.parameter_start, item.shape), live)

        planned_copies = read_rows(Copy, share["copies"])
        copies: list[tuple[torch.Tensor, list[torch.Tensor]]] = []
        staged_copies: dict[str, _Pairs] = {name: [] for name in layers}
        for parts in by_rows(planned_copies, parameters):
            name = parts[0].parameter
            sources = [shards[part.rank][part.shard][region(part.local_start, part.shape)] for part in parts]
            if name in layers:
                staged_copies[name] += zip(map(target, parts), sources, strict=True)
            else:
                shape = (*parts[0].shape[:-1], sum(part.shape[-1] for part in parts))
                live = parameters[name].detach()[region(parts[0].parameter_start, shape)]
                copies.append((live, sources))

        recvs: list[_Pairs] = [[] for _ in range(body["rounds"])]
        for recv in read_rows(Recv, share["recvs"]):
            dtype = parameters[recv.parameter].dtype
            received = slot_view(slots[recv.rank], recv.round, recv.offset, recv.shape, dtype)
            recvs[recv.round].append((target(recv), received))

        slot_signals = []
        for rank, reader in share["readers"].items():
            slot_signals.append((signals[int(rank)], reader))
            signals[int(rank)].register(reader)

        if hasattr(self, "weight_sync_worker_plan"):
            self.weight_sync_worker_plan.copiers.stop()
        self.weight_sync_worker_plan = _WorkerPlan(
            tensors={
                name: TensorInfo(tuple(shape), dtype, unit) for name, (shape, dtype, unit) in body["tensors"].items()
            },
            source_signals=[signals[rank] for rank in sorted({copy.rank for copy in planned_copies})],
            copies=batches(copies),
            copiers=Copiers(even_threads(PLATFORM.copying_cores(), len(body["workers"]))),
            padding=[
                parameters[layout.name].detach()[region(part.start, part.shape)]
                for layout in self.weight_sync_layouts
                if not layout.staged
                for part in layout.padding
            ],
            recvs=recvs,
            slot_signals=slot_signals,
            staging=Staging(layers, _device(model)),
            staged_copies=staged_copies,
            complete_after=_completion_rounds(layers, body["workers"]),
            staged_checksums=[],
        )
        return {}

    @_errors_as_json
    def weight_sync_update(self, message: str) -> Any:
        """Zero the padding, copy every rectangle into its parameter, then pack the linear layers.

        The message is ``{"sequence", "verify"}``. Returns the seconds of copying and of packing, and, with ``verify``,
        the checksums of the new contents of the parameters.
        """
        body = json.loads(message)
        plan = self._worker_plan()
        staging = plan.staging
        verify = body["verify"]
        rounds = len(plan.recvs)
        # Signals count rounds over all syncs. Each sync has one additional round, which signals that the shards are
        # final.
        first = body["sequence"] * (1 + rounds) + 1
        remaining = iter(plan.copies)

        def copy_some() -> bool:
            batch = next(remaining, None)
            if batch is None:
                return False
            copy_batch(batch)
            return True

        if verify:
            plan.staged_checksums = []
        for padding in plan.padding:
            padding.zero_()
        try:
            for signals in plan.source_signals:
                # This request may arrive before the rank's weights are final.
                signals.wait_ready(first, meanwhile=lambda: False)
            started = time.perf_counter()
            for round_number, pairs in enumerate(plan.recvs):
                for signals, _ in plan.slot_signals:
                    signals.wait_ready(first + round_number + 1, meanwhile=copy_some)
                for target, source in pairs:
                    target.view(staging).copy_(source)
                PLATFORM.synchronize_stream(staging.device)
                for signals, reader in plan.slot_signals:
                    signals.set_consumed(reader, first + round_number + 1)
                self._quantise(plan.complete_after[round_number], verify)
            plan.copiers.run(copy_some)
            self._quantise(plan.complete_after[-1], verify)
            PLATFORM.synchronize_stream(staging.device)
        finally:
            # This is needed after a failure too, because the ranks must not wait for this worker.
            for signals, reader in plan.slot_signals:
                signals.set_consumed(reader, first + rounds)
        copying_seconds = time.perf_counter() - started
        checksums = self._region_checksums() if verify else []
        return {"checksums": checksums, "copying_seconds": copying_seconds, "packing_seconds": pack_layers()}

    @_errors_as_json
    def weight_sync_zero_cache(self) -> Any:
        """Zero the KV cache, whose contents are undefined after a sleep.

        Attention reads whole blocks. It gives entries that no token has written the weight 0, but 0 times NaN is NaN.
        """
        for cache in self.model_runner.kv_caches:
            cache.zero_()
        return {}

    @_errors_as_json
    def weight_sync_checksums(self) -> Any:
        """Return the checksums of the live parameters, one per region of the layout.

        For a quantised weight, it is the checksum from before quantisation, at the last verified sync.
        """
        return {"checksums": self._region_checksums()}

    @_errors_as_json
    def weight_sync_digests(self) -> Any:
        """Return the SHA-256 of the bytes of every parameter. Equal digests mean bitwise equal parameters."""
        model = self.get_model()
        quantised = quantised_layers(model)
        with unquantised(model):
            tensors = {name: tensor for name, tensor in weight_tensors(model).items() if name not in quantised}
        for weight_name, layer in quantised.items():
            prefix = weight_name.removesuffix("weight")
            for name, tensor in layer.named_parameters():
                tensors[prefix + name] = tensor
        return {"digests": {name: _digest(tensor) for name, tensor in tensors.items()}}

    def _worker_plan(self) -> _WorkerPlan:
        if not hasattr(self, "weight_sync_worker_plan"):
            raise RuntimeError("there is no plan yet: construct a WeightSync first")
        return self.weight_sync_worker_plan

    def _quantise(self, names: list[str], verify: bool) -> None:
        """Quantise these weights one after another, after copying their parts from shards on this host."""
        plan = self._worker_plan()
        layouts = {layout.name: layout for layout in self.weight_sync_layouts} if verify else {}
        for name in names:
            for target, source in plan.staged_copies[name]:
                target.view(plan.staging).copy_(source)
            if verify:
                weight = {name: plan.staging.weight(name)}
                plan.staged_checksums += _checksums([layouts[name]], weight, plan.tensors)
            with set_current_vllm_config(self.vllm_config):
                plan.staging.quantise(name)

    def _region_checksums(self) -> list[list[Any]]:
        """Return ``[hf_name, hf_start, checksum]`` of each region."""
        plan = self._worker_plan()
        model = self.get_model()
        with unquantised(model) as layers:
            parameters = weight_tensors(model)
        live_layouts = [layout for layout in self.weight_sync_layouts if layout.name not in layers]
        return [*plan.staged_checksums, *_checksums(live_layouts, parameters, plan.tensors)]


def _device(model: torch.nn.Module) -> torch.device:
    return next(model.parameters()).device


def _completion_rounds(names: Iterable[str], workers: Iterable[Mapping[str, Any]]) -> dict[int, list[str]]:
    """Group parameters by the last round in which any worker receives a part of them, -1 for none: round → names."""
    last_round = dict.fromkeys(names, -1)
    for worker in workers:
        for recv in read_rows(Recv, worker["recvs"]):
            if recv.parameter in last_round:
                last_round[recv.parameter] = max(last_round[recv.parameter], recv.round)
    complete_after: dict[int, list[str]] = defaultdict(list)
    for name, round_number in last_round.items():
        complete_after[round_number].append(name)
    return complete_after


def _checksums(
    layouts: Iterable[ParameterLayout], parameters: Mapping[str, torch.Tensor], tensors: Mapping[str, TensorInfo]
) -> Iterator[list[Any]]:
    for layout in layouts:
        for part in layout.regions:
            info = tensors[part.hf_name]
            values = parameters[layout.name][region(part.start, part.shape)]
            checksum = rectangle_checksum(values, part.hf_start, info.shape, info.unit)
            yield [part.hf_name, part.hf_start, checksum]


def _digest(tensor: torch.Tensor) -> str:
    # A copy with a stride of 1, which a view as another dtype needs. A tensor of one element may have any stride.
    flat = torch.empty(tensor.numel(), dtype=tensor.dtype, device="cpu")
    flat.copy_(tensor.detach().flatten())
    return hashlib.sha256(flat.view(torch.uint8).numpy().tobytes()).hexdigest()
