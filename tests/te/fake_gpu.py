"""A fake GPU for one process: ``torch.cuda`` answers as with an H100, and its tensors are on the CPU or on "meta".

The platform ``cuda``, Megatron-Core's wrappers and Transformer Engine's Python run as they are. What is faked: the
compiled extension (``fake_extension``), kernels (``fake_kernels``), the device, NCCL (gloo).
"""

import functools
import logging
import os
import types
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

MEMORY = 80 * 2**30
FACTORIES = ("arange", "empty", "full", "ones", "rand", "randn", "tensor", "zeros")


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
            kwargs = {**kwargs, "pin_memory": False}
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


def activate(device: str) -> types.ModuleType:
    """Make this process one with a GPU and activate the platform ``cuda``, which is returned; on "cpu" it computes."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    os.environ["TORCH_COMPILE_DISABLE"] = "1"
    torch.compile = lambda model=None, **options: model if model is not None else lambda function: function
    _fake_torch(torch.device(device))
    from tests.te import fake_extension, fake_kernels

    fake_kernels.install(fake_extension.install())
    fake_kernels.install_attention()
    from megatron.core.tensor_parallel import random

    random._set_cuda_rng_state = lambda new_state, device=-1, graph_safe=False: torch.set_rng_state(new_state)
    from megatron_ext import platform
    from megatron_ext.platform import cuda

    cuda.activate()
    cuda.backend = "gloo"
    cuda.device = lambda: torch.device(device)
    platform._active = cuda
    _CudaMeans(torch.device(device)).__enter__()
    return cuda


def _placed(function: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """The function with "cuda" meaning ``device``, also as the argument of ``Tensor.to``."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        args = tuple(device if isinstance(a, str | torch.device) and "cuda" in str(a) else a for a in args)
        if "cuda" in str(kwargs.get("device")):
            kwargs = {**kwargs, "device": device}
        return function(*args, **kwargs)

    return call


def _fake_torch(device: torch.device) -> None:
    properties = types.SimpleNamespace(
        name="NVIDIA fake H100", major=9, minor=0, multi_processor_count=132, total_memory=MEMORY
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
        "Stream": _Stream,
        "Event": _Stream,
        "manual_seed": lambda seed: None,
        "manual_seed_all": lambda seed: None,
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, answer)
    for module in (torch.cuda, torch.cuda.random):
        module.get_rng_state = lambda device=None: torch.get_rng_state()
        module.set_rng_state = lambda state, device=None: torch.set_rng_state(state)
    torch.Generator = _Generator  # type: ignore[misc]
    torch.optim.Optimizer._accelerator_graph_capture_health_check = lambda self: None  # type: ignore[attr-defined]
    # What backward passes call, too: the mode does not reach into them. On "meta" there are none, and torch.device as a
    # context knows the factories by identity.
    if device.type == "cpu":
        for name in FACTORIES:
            setattr(torch, name, _placed(getattr(torch, name), device))
    torch.Tensor.to = _placed(torch.Tensor.to, device)  # type: ignore[method-assign]
    torch.Tensor.cuda = torch.Tensor.pin_memory = lambda self, *args, **kwargs: self  # type: ignore[assignment]
    torch.Tensor.is_cuda = property(lambda self: True)  # type: ignore[assignment]
