"""A fake GPU for one process: ``torch.cuda`` answers as with an H100, and its tensors are on the CPU or on "meta".

The platform ``cuda``, Megatron-Core's wrappers and Transformer Engine's Python run as they are. What is faked: the
compiled extension (``fake_extension``), kernels (``fake_kernels``), the device, NCCL (gloo, under its name).
"""

import contextlib
import functools
import gc
import logging
import os
import types
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroupGloo
from torch.overrides import TorchFunctionMode

from megatron_ext.platform import cpu

MEMORY = 80 * 2**30
# A folder with a file for each process that has given memory back to the GPU: its bytes.
GIVEN_BACK = "FAKE_GPU_MEMORY"
FACTORIES = ("arange", "empty", "full", "ones", "rand", "randn", "tensor", "zeros")
UUID = "GPU-00000000-fake"
Patch = tuple[Any, str, Any]  # object, name, value


class _CudaMeans(TorchFunctionMode):
    """Tensors that are asked for on "cuda" are made on ``device``."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.")
        if "cuda" in str(kwargs.get("device")):
            kwargs = {**kwargs, "device": self.device}
        if kwargs.get("pin_memory"):
            return _pinned(func(*args, **{**kwargs, "pin_memory": False}))
        return func(*args, **kwargs)


class _Stream:
    """A stream or an event: everything happens at once."""

    cuda_stream = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def wait_stream(self, stream: Any) -> None: ...
    def wait_event(self, event: Any) -> None: ...
    def record_event(self, event: Any = None) -> None: ...
    def synchronize(self) -> None: ...


class _Generator(torch.Generator):
    """On the CPU, whatever the device."""

    def __new__(cls, device: Any = "cpu") -> Any:
        return super().__new__(cls)


def begin(device: str) -> types.ModuleType:
    """From now on this process has a GPU; on "cpu" it computes. Returns the platform ``cuda``, which is not activated.

    Transformer Engine has been imported, as ``machine`` does.
    """
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    os.environ["TORCH_COMPILE_DISABLE"] = "1"
    for patched, name, value in patches(torch.device(device)):
        setattr(patched, name, value)
    from megatron.core.tensor_parallel import random

    random._set_cuda_rng_state = lambda new_state, device=-1, graph_safe=False: torch.set_rng_state(new_state)
    from megatron_ext.platform import cuda

    cuda.device = lambda: torch.device(device)
    _CudaMeans(torch.device(device)).__enter__()
    return cuda


def activate(device: str) -> types.ModuleType:
    """:func:`begin`, and the platform ``cuda`` is this process's."""
    from megatron_ext import platform

    begin(device)
    return platform.activate("cuda")


def patches(device: torch.device) -> Iterator[Patch]:
    """What is put in the place of torch's own."""
    properties = types.SimpleNamespace(
        name="NVIDIA fake H100", major=9, minor=0, multi_processor_count=132, total_memory=MEMORY, uuid=UUID
    )
    answers: dict[str, Any] = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: device,
        "set_device": lambda device: None,
        "get_device_capability": lambda device=None: (properties.major, properties.minor),
        "get_device_properties": lambda device=None: properties,
        "get_device_name": lambda device=None: properties.name,
        "synchronize": lambda device=None: None,
        "current_stream": lambda device=None: _Stream(),
        "is_current_stream_capturing": lambda: False,
        "empty_cache": lambda: None,
        "memory_allocated": lambda device=None: allocated(),
        "max_memory_allocated": lambda device=None: allocated(),
        "max_memory_reserved": lambda device=None: allocated(),
        "reset_peak_memory_stats": lambda device=None: None,
        "host_memory_stats": lambda: dict(_pinned_stats),
        "mem_get_info": lambda device=None: (MEMORY // 2 + given_back(), MEMORY),
        "Stream": _Stream,
        "stream": lambda stream: contextlib.nullcontext(),
        "set_sync_debug_mode": lambda mode: None,
        "Event": _Stream,
        "manual_seed": lambda seed: None,
        "manual_seed_all": lambda seed: None,
    }
    for name, answer in answers.items():
        yield torch.cuda, name, answer
    for module in (torch.cuda, torch.cuda.random):
        yield module, "get_rng_state", lambda device=None: torch.get_rng_state()
        yield module, "set_rng_state", lambda state, device=None: torch.set_rng_state(state)
    yield torch, "compile", lambda model=None, **options: model if model is not None else lambda function: function
    yield torch, "Generator", _Generator
    yield torch.optim.Optimizer, "_accelerator_graph_capture_health_check", lambda self: None
    # What backward passes call, too: the mode does not reach into them. On "meta" there are none, and torch.device as a
    # context knows the factories by identity.
    if device.type == "cpu":
        for name in FACTORIES:
            yield torch, name, _placed(getattr(torch, name), device)
    yield torch.Tensor, "to", _placed(torch.Tensor.to, device)
    yield torch.Tensor, "cuda", lambda self, *args, **kwargs: self
    yield torch.Tensor, "pin_memory", lambda self, *args, **kwargs: self
    yield torch.Tensor, "is_pinned", _is_pinned
    yield torch.Tensor, "record_stream", lambda self, stream: None
    yield torch.Tensor, "is_cuda", property(lambda self: True)
    yield from _nccl()


_on_the_host: list[weakref.ref[torch.Tensor]] = []  # pinned tensors, which are not on the fake GPU
_pinned_stats = {"allocations.allocated": 0, "allocated_bytes.allocated": 0}


def _pinned(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that was just made, noted as pinned memory of the host."""
    _on_the_host.append(weakref.ref(tensor))
    _pinned_stats["allocations.allocated"] += 1
    _pinned_stats["allocated_bytes.allocated"] += tensor.nbytes
    return tensor


def _is_pinned(tensor: torch.Tensor, device: Any = None) -> bool:
    return any(noted() is tensor for noted in _on_the_host)


def _placed(function: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """The function with "cuda" meaning ``device``, also as the argument of ``Tensor.to``."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        args = tuple(device if isinstance(a, str | torch.device) and "cuda" in str(a) else a for a in args)
        if "cuda" in str(kwargs.get("device")):
            kwargs = {**kwargs, "device": device}
        return function(*args, **kwargs)

    return call


def allocated() -> int:
    """Bytes of all living tensors but those in pinned memory of the host."""
    gc.collect()
    host = {tensor.untyped_storage()._cdata for tensor in (ref() for ref in _on_the_host) if tensor is not None}
    storages = {}
    for candidate in gc.get_objects():
        if type(candidate) in (torch.Tensor, torch.nn.Parameter):
            storage = candidate.untyped_storage()
            storages[storage._cdata] = storage.nbytes()
    return sum(size for key, size in storages.items() if key not in host)


def given_back() -> int:
    """Bytes that other processes on the GPU have given back since they started."""
    folder = os.environ.get(GIVEN_BACK)
    return sum(int(file.read_text()) for file in Path(folder).iterdir()) if folder else 0


def _nccl() -> Iterator[Patch]:
    """Groups for which NCCL is asked are gloo's, and call themselves NCCL's. A process's groups share one transport."""
    init_process_group, new_group = dist.init_process_group, dist.new_group
    names: dict[Any, str] = {}  # of groups that do not have the default one's backend
    default = ""

    def init(backend: str | None = None, *args: Any, **kwargs: Any) -> None:
        nonlocal default
        names.clear()  # what it holds lives on, with gloo's threads
        init_process_group("gloo" if backend == "nccl" else backend, *args, **kwargs)
        default = backend or dist.distributed_c10d.get_backend()

    def new(ranks: Any = None, timeout: Any = None, backend: str | None = None, *args: Any, **kwargs: Any) -> Any:
        if default == "fake":
            # Of simulated ranks, which have no peers.
            backend = None
        group = new_group(ranks, timeout, "gloo" if backend == "nccl" else backend, *args, **kwargs)
        if backend is not None:
            names[group] = backend
        return group

    def get_backend(group: Any = None) -> str:
        return names.get(group or dist.group.WORLD, default)

    yield ProcessGroupGloo, "__init__", cpu._init_gloo
    yield dist, "init_process_group", init
    yield dist, "new_group", new
    yield dist, "get_backend", get_backend
