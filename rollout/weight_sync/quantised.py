"""Weights that vLLM keeps in FP8. They are staged unquantised, layer by layer, and then quantised in place.

When vLLM's online quantisation loads a linear layer, it computes the layer's tensors from the checkpoint's weight: FP8
values, transposed or not, and scales. The weight sync works with the unquantised weight in the trace of the loaders, in
the plan and in the checksums. A sync stages this weight, and vLLM's own code quantises it. The result is copied into
the memory whose addresses kernels and CUDA graphs hold.

In addition to the engine's weights, a sync needs memory for the layers of which only a part has arrived, and for the
quantised tensors of one layer.

Written for the online methods of vLLM 0.32 (``vllm/model_executor/layers/quantization/online/fp8.py``).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from vllm.model_executor.layers.quantization.online.fp8 import OnlineLinearBase
from vllm.model_executor.parameter import ModelWeightParameter

from rollout.weight_sync.layout import LayoutError


def quantised_layers(model: torch.nn.Module) -> dict[str, Any]:
    """Return the linear layers whose weights vLLM quantises while loading, by weight name, in the model's order."""
    return {
        f"{name}.weight": layer
        for name, layer in model.named_modules()
        if isinstance(getattr(layer, "quant_method", None), OnlineLinearBase)
    }


@contextmanager
def unquantised(model: torch.nn.Module) -> Iterator[dict[str, Any]]:
    """Give each of :func:`quantised_layers`, within the block, the unquantised weight that vLLM's loaders fill.

    The weight is [out, in], on the meta device. Yields the layers by weight name.
    """
    layers = quantised_layers(model)
    live = {name: dict(layer._parameters) for name, layer in layers.items()}
    try:
        for layer in layers.values():
            _set_weight(layer, torch.empty(_shape(layer), dtype=layer.orig_dtype, device="meta"))
        yield layers
    finally:
        for name, layer in layers.items():
            layer._parameters = live[name]


def requantise(layer: Any, weight: torch.Tensor) -> None:
    """Collective over the engine's tensor-parallel workers: quantise ``weight`` [out, in] into the layer's tensors.

    vLLM quantises it as it does when it loads the layer. The call is collective because all shards of a tensor share a
    scale. Raises RuntimeError when dtype, shape or strides differ from those of the layer's present tensors, because
    kernels would still use those.
    """
    live = dict(layer._parameters)
    try:
        _set_weight(layer, weight)
        layer._already_called_process_weights_after_loading = False
        layer.quant_method.process_weights_after_loading(layer)
        quantised = dict(layer._parameters)
    finally:
        layer._parameters = live
    expected = {name: _describe(tensor) for name, tensor in live.items()}
    actual = {name: _describe(tensor) for name, tensor in quantised.items()}
    if actual != expected:
        raise RuntimeError(f"vLLM quantised {type(layer).__name__} to {actual}, at first it was {expected}")
    for name, tensor in live.items():
        if tensor is not None and tensor is not quantised[name]:
            tensor.data.copy_(quantised[name])


class Staging:
    """The unquantised weights of a sync in progress, on ``device``.

    A weight is held from the arrival of its first part until it is quantised.
    """

    def __init__(self, layers: dict[str, Any], device: torch.device) -> None:
        self.layers = layers
        self.device = device
        self.weights: dict[str, torch.Tensor] = {}
        self.bytes = 0
        self.peak_bytes = 0

    def weight(self, name: str) -> torch.Tensor:
        """Return the staged weight of this name.

        It starts as zeros, because elements that the loaders do not fill are padding.
        """
        if name not in self.weights:
            layer = self.layers[name]
            self.weights[name] = torch.zeros(_shape(layer), dtype=layer.orig_dtype, device=self.device)
            self.bytes += self.weights[name].nbytes
            self.peak_bytes = max(self.peak_bytes, self.bytes)
        return self.weights[name]

    def quantise(self, name: str) -> None:
        weight = self.weights.pop(name)
        self.bytes -= weight.nbytes
        requantise(self.layers[name], weight)


def _shape(layer: Any) -> tuple[int, int]:
    return layer.output_size_per_partition, layer.input_size_per_partition


def _set_weight(layer: Any, weight: torch.Tensor) -> None:
    """Give the layer the parameters that vLLM's ``create_weights`` gives it: ``weight``, and the bias if it has one.

    The bias is not quantised.
    """
    loader = layer.weight.weight_loader
    # vLLM wraps the loader in another one that waits until the layer is complete.
    while loader.__name__ == "online_process_loader":
        loader = loader.__wrapped__
    parameters = {"weight": ModelWeightParameter(data=weight, input_dim=1, output_dim=0, weight_loader=loader)}
    if "bias" in layer._parameters:
        parameters["bias"] = layer._parameters["bias"]
    layer._parameters = parameters
    layer.update_param_tp_status()


def _describe(tensor: torch.Tensor | None) -> Any:
    return None if tensor is None else (str(tensor.dtype), tuple(tensor.shape), tensor.stride())


def check_kernels(layers: dict[str, Any]) -> None:
    """Raise LayoutError for a kernel that also changes the bias, because the weight sync writes the bias unchanged."""
    for name, layer in layers.items():
        kernel = getattr(layer.quant_method, "fp8_linear", None)
        if "Marlin" in type(kernel).__name__:
            raise LayoutError(
                f"{name}: vLLM chose {type(kernel).__name__} (a GPU without FP8): use rollout.quantization=null there"
            )
