"""Traces the weight loaders of a vLLM model to find out where each element of its parameters comes from.

The model's ``load_weights`` gets meta tensors instead of a checkpoint. A view of a meta tensor has an offset and
strides. So when a loader copies into a parameter, source and target show which rectangle goes where. The trace reads no
weights and writes only padding, which is zeros. A loader that does more than slice and copy (converts, adds,
transposes) can't be described by rectangles, and is refused with the name of the parameter.

The trace uses no vLLM internals. Any module with ``load_weights(iterable of (name, tensor))`` works, also on the meta
device.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rollout.weight_sync.layout import Index, LayoutError, ParameterLayout, Rectangle, Region, check_exact_cover

# Buffers of vLLM's attention layers that are 1 unless the checkpoint has scales for the KV cache.
UNIT_SCALES = ("_q_scale", "_k_scale", "_v_scale", "_prob_scale")


def _strides(shape: Index) -> Index:
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def view_rectangle(view: torch.Tensor, base_shape: Index) -> Rectangle | None:
    """Return the rectangle that ``view`` covers in a contiguous tensor of ``base_shape``.

    Returns None when the elements of the view are no rectangle, or are in another order.
    """
    if view.ndim != len(base_shape):
        return None
    strides = _strides(base_shape)
    if any(n > 1 and a != b for n, a, b in zip(view.shape, view.stride(), strides, strict=True)):
        return None
    start = []
    rest = view.storage_offset()
    for stride in strides:
        start.append(rest // stride)
        rest %= stride
    rectangle = Rectangle(tuple(start), tuple(view.shape))
    base = Rectangle((0,) * len(base_shape), base_shape)
    return rectangle if base.contains(rectangle) else None


class _Recorder(TorchDispatchMode):
    """Records copies from the meta tensors ``sources`` into ``parameters`` instead of executing them."""

    def __init__(self, sources: Mapping[str, torch.Tensor], parameters: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self.sources = {tensor.untyped_storage()._cdata: (name, tensor) for name, tensor in sources.items()}
        self.parameters = {tensor.untyped_storage()._cdata: (name, tensor) for name, tensor in parameters.items()}
        self.regions: dict[str, list[Region]] = {name: [] for name in parameters}
        self.padding: dict[str, list[Rectangle]] = {name: [] for name in parameters}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.copy_.default and args[1].is_meta:
            self._record_copy(args[0], args[1])
            return args[0]
        is_fill = func in (torch.ops.aten.fill_.Scalar, torch.ops.aten.zero_.default)
        if is_fill and args[0].untyped_storage()._cdata in self.parameters:
            self._record_fill(args[0], args[1] if len(args) > 1 else 0)
        else:
            self._refuse_writes(func, args)
        return func(*args, **(kwargs or {}))

    def _refuse_writes(self, func: Any, args: Any) -> None:
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is None or not argument.alias_info.is_write or not isinstance(value, torch.Tensor):
                continue
            storage = value.untyped_storage()._cdata
            for known in (self.sources, self.parameters):
                if storage in known:
                    name, _ = known[storage]
                    raise LayoutError(f"{name}: vLLM's loader changes it by {func}: more than slicing and copying")

    def _target(self, target: torch.Tensor, what: str) -> tuple[str, Rectangle]:
        name, parameter = self.parameters.get(target.untyped_storage()._cdata, (None, None))
        if name is None or parameter is None:
            raise LayoutError(
                f"{what}: vLLM writes it into a tensor of shape {tuple(target.shape)} that is no parameter"
            )
        rectangle = view_rectangle(target, tuple(parameter.shape))
        if rectangle is None or target.dtype != parameter.dtype:
            raise LayoutError(f"{what}: vLLM writes it into {name} but not as a rectangle")
        return name, rectangle

    def _record_copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        hf_name, tensor = self.sources.get(source.untyped_storage()._cdata, (None, None))
        if hf_name is None or tensor is None:
            name, _ = self._target(target, "a converted tensor")
            raise LayoutError(f"{name}: vLLM's loader computes its values instead of slicing them")
        name, rectangle = self._target(target, hf_name)
        hf_rectangle = view_rectangle(source, tuple(tensor.shape))
        if hf_rectangle is None or hf_rectangle.shape != rectangle.shape or source.dtype != tensor.dtype:
            raise LayoutError(f"{name}: vLLM's loader takes no plain rectangle of {hf_name} for it")
        self.regions[name].append(Region(rectangle.start, hf_name, hf_rectangle.start, rectangle.shape))

    def _record_fill(self, target: torch.Tensor, value: Any) -> None:
        if not target.numel():
            return
        name, rectangle = self._target(target, "padding")
        if value != 0:
            raise LayoutError(f"{name}: vLLM's loader fills {rectangle} with {value}; only zero padding is known")
        self.padding[name].append(rectangle)


def weight_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return every parameter and persistent buffer of ``model`` that a checkpoint must provide. Tied ones occur once.

    Raises LayoutError for a parameter that vLLM has emptied or made strided, because weights can't be written into it
    in place.
    """
    buffers = dict(model.named_buffers())
    tensors: dict[str, torch.Tensor] = dict(model.named_parameters())
    parameters = {id(parameter) for parameter in model.parameters()}
    for name in model.state_dict():
        buffer = buffers.get(name)
        if buffer is None or id(buffer) in parameters:
            continue
        if name.rpartition(".")[2] in UNIT_SCALES:
            if not buffer.is_meta and bool((buffer != 1).any()):
                raise LayoutError(f"{name} is {buffer}: scales of the key-value cache are not supported")
            continue
        tensors[name] = buffer
    for name, tensor in tensors.items():
        if not tensor.numel() or not tensor.is_contiguous():
            raise LayoutError(
                f"{name} has shape {tuple(tensor.shape)} and strides {tensor.stride()} after loading: vLLM keeps this "
                "weight elsewhere (packed), so it can't be written in place; adapt rollout/vllm_platform.py"
            )
    return tensors


def trace_layout(model: torch.nn.Module, hf_shapes: Mapping[str, Index]) -> list[ParameterLayout]:
    """Return the layout of every weight tensor of ``model`` in terms of the checkpoint tensors in ``hf_shapes``.

    ``hf_shapes`` is name → shape. Raises LayoutError naming the parameter when an element has no source or more than
    one, or when a loader does more than copy rectangles.
    """
    tensors = weight_tensors(model)
    dtype = next(model.parameters()).dtype
    sources = {name: torch.empty(shape, dtype=dtype, device="meta") for name, shape in hf_shapes.items()}
    recorder = _Recorder(sources, {name: tensor.detach() for name, tensor in tensors.items()})
    with torch.no_grad(), recorder:
        model.load_weights(iter(sources.items()))  # type: ignore[operator]
    layouts = []
    for name, tensor in tensors.items():
        regions = recorder.regions[name]
        padding = recorder.padding[name]
        shape = tuple(tensor.shape)
        check_exact_cover(f"vLLM parameter {name}", shape, [*(region.target for region in regions), *padding])
        dtype_name = str(tensor.dtype).removeprefix("torch.")
        layouts.append(ParameterLayout(name, shape, dtype_name, tuple(regions), tuple(padding)))
    return layouts
