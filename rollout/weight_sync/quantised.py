"""Weights that vLLM keeps in FP8: put together unquantised, one layer after the other, and quantised in place.

vLLM's online quantisation makes a linear layer's tensors (FP8 values, transposed or not, and scales) from the weight as
a checkpoint has it, when it loads the layer. For the bridge such a layer has its unquantised weight: the loaders are
traced on it, the plan speaks of it, its checksum is verified. At a sync that weight is staged, vLLM's own code
quantises it, and the result goes into the memory that kernels and CUDA graphs know. Beside the engine's own weights a
sync needs memory for the layers that have begun to arrive, and for what vLLM makes of one.

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
    """For the block, the weights of ``quantised_layers`` are what the loaders fill, [out, in], on the meta device."""
    layers = quantised_layers(model)
    live = {name: dict(layer._parameters) for name, layer in layers.items()}
    try:
        for layer in layers.values():
            _set_weight(layer, torch.empty(_shape(layer), dtype=layer.orig_dtype, device="meta"))
        yield layers
    finally:
        for name, layer in layers.items():
            _restore(layer, live[name])


def requantise(layer: Any, weight: torch.Tensor) -> None:
    """Have vLLM quantise ``weight`` [out, in] as when it loads the layer, into the tensors that the layer has now.

    Collective over the engine's tensor-parallel workers: the scale of a whole tensor is that of all its shards.
    Raises RuntimeError when vLLM makes other tensors than before: kernels would go on with the old ones.
    """
    live = dict(layer._parameters)
    try:
        _set_weight(layer, weight)
        layer._already_called_process_weights_after_loading = False
        layer.quant_method.process_weights_after_loading(layer)
        made = dict(layer._parameters)
    finally:
        _restore(layer, live)
    describe = {name: _describe(tensor) for name, tensor in live.items()}
    if describe != (found := {name: _describe(tensor) for name, tensor in made.items()}):
        raise RuntimeError(f"vLLM quantised {type(layer).__name__} to {found}, at first it was {describe}")
    for name, tensor in live.items():
        if tensor is not None and tensor is not made[name]:
            tensor.data.copy_(made[name])


class Staging:
    """The unquantised weights on their way, on ``device``: made when the first part arrives, gone once quantised."""

    def __init__(self, layers: dict[str, Any], device: torch.device) -> None:
        self.layers, self.device = layers, device
        self.weights: dict[str, torch.Tensor] = {}
        self.bytes = self.peak_bytes = 0

    def weight(self, name: str) -> torch.Tensor:
        """Zeros at first: what the loaders leave out is padding."""
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
    """As vLLM's ``create_weights``: the weight alone, and the bias, which is never quantised."""
    loader = layer.weight.weight_loader
    while loader.__name__ == "online_process_loader":  # puts the loading off until the layer is complete
        loader = loader.__wrapped__
    parameter = ModelWeightParameter(data=weight, input_dim=1, output_dim=0, weight_loader=loader)
    layer._parameters = {"weight": parameter} | {n: p for n, p in layer._parameters.items() if n == "bias"}
    layer.update_param_tp_status()


def _restore(layer: Any, parameters: dict[str, Any]) -> None:
    layer._parameters = parameters


def _describe(tensor: torch.Tensor | None) -> Any:
    return None if tensor is None else (str(tensor.dtype), tuple(tensor.shape), tensor.stride())


def check_kernels(layers: dict[str, Any]) -> None:
    """Raises LayoutError for a kernel that also changes the bias, which the bridge writes as it is."""
    for name, layer in layers.items():
        kernel = getattr(layer.quant_method, "fp8_linear", None)
        if "Marlin" in type(kernel).__name__:
            raise LayoutError(
                f"{name}: vLLM chose {type(kernel).__name__} (a GPU without FP8): use rollout.quantization=null there"
            )
