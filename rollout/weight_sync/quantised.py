"""Weights that vLLM keeps in FP8: staged unquantised, one layer after another, and quantised in place.

When vLLM's online quantisation loads a linear layer, it computes the layer's tensors (FP8 values, transposed or not,
and scales) from the checkpoint's weight. The weight sync works with that unquantised weight: the trace of the loaders,
the plan and the checksums. A sync stages it, vLLM's own code quantises it, and the result goes into the memory whose
addresses kernels and CUDA graphs hold. Besides the engine's weights a sync needs memory for the layers of which a part
has arrived, and for vLLM's result of one layer.

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
    """The linear layers whose weight vLLM quantises while loading, by the weight's name, in the model's order."""
    return {
        f"{name}.weight": layer
        for name, layer in model.named_modules()
        if isinstance(getattr(layer, "quant_method", None), OnlineLinearBase)
    }


@contextmanager
def unquantised(model: torch.nn.Module) -> Iterator[dict[str, Any]]:
    """Within the block, each of :func:`quantised_layers` has the weight that the loaders fill: [out, in], on the meta
    device."""
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
    """Have vLLM quantise ``weight`` [out, in] as when it loads the layer, into the tensors that the layer has now.

    Collective over the engine's tensor-parallel workers, because all shards of a tensor share its scale. Raises
    RuntimeError when dtype, shape or strides differ from the layer's tensors: kernels would still use the old ones.
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
    """The unquantised weights of a sync in progress, on ``device``: from the arrival of the first part until the weight
    is quantised."""

    def __init__(self, layers: dict[str, Any], device: torch.device) -> None:
        self.layers = layers
        self.device = device
        self.weights: dict[str, torch.Tensor] = {}
        self.bytes = 0
        self.peak_bytes = 0

    def weight(self, name: str) -> torch.Tensor:
        """The weight of this name. It starts as zeros, because elements that the loaders leave out are padding."""
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
    """Give the layer the parameters of vLLM's ``create_weights``: ``weight``, and the bias, which stays unquantised."""
    loader = layer.weight.weight_loader
    # vLLM wraps the loader in one that waits until the layer is complete.
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
    """Raises LayoutError for a kernel that also changes the bias, which the weight sync writes unchanged."""
    for name, layer in layers.items():
        kernel = getattr(layer.quant_method, "fp8_linear", None)
        if "Marlin" in type(kernel).__name__:
            raise LayoutError(
                f"{name}: vLLM chose {type(kernel).__name__} (a GPU without FP8): use rollout.quantization=null there"
            )
