"""Quantising in place what vLLM's layers hold, for each kind of scales, against the arithmetic written out.

The layers are vLLM's own, created by vLLM's online methods. Two things depend on the processor and have stand-ins: the
operator that rounds to FP8 with a given scale, which a CPU lacks, and the kernel, which vLLM chooses by what the
processor can do. One stand-in for the kernel keeps the weight as it is quantised; the other stores it in an order of
its own, as vLLM's kernels for AMX do.
"""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from tests import warm

ROOT = Path(__file__).resolve().parents[2]
FP8_MAX = 448.0
SHAPES = {"qkv_proj": (96, 64), "down_proj": (64, 160), "wide": (200, 300)}


def rounded(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """FP8 by division."""
    return (weight.float() / scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)


def per_tensor(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    scale = weight.float().abs().max().reshape(1) / FP8_MAX
    return {"weight": rounded(weight, scale).t(), "weight_scale": scale}


def per_channel(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    scale = weight.float().abs().amax(1, keepdim=True) / FP8_MAX
    return {"weight": rounded(weight, scale).t(), "weight_scale": scale}


def per_block(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """One block after the other; vLLM multiplies by the reciprocal here."""
    quantised = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    scales = torch.empty(-(-weight.shape[0] // 128), -(-weight.shape[1] // 128), dtype=torch.float32)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            at = slice(128 * i, 128 * (i + 1)), slice(128 * j, 128 * (j + 1))
            scales[i, j] = weight[at].float().abs().max().clamp(1e-4) / FP8_MAX
            quantised[at] = (weight[at].float() * (1.0 / scales[i, j])).to(torch.float8_e4m3fn)
    return {"weight": quantised, "weight_scale_inv": scales}


REFERENCES = {"fp8_per_tensor": per_tensor, "fp8_per_channel": per_channel, "fp8_per_block": per_block}


def weights(seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return {name: torch.randn(shape).to(torch.bfloat16) for name, shape in SHAPES.items()}


def keep(weight: torch.Tensor) -> torch.Tensor:
    """The order of a kernel that multiplies by the weight as it is quantised."""
    return weight


def in_tiles(weight: torch.Tensor) -> torch.Tensor:
    """The order of a kernel that reads 4 rows at a time, in another shape."""
    return weight.unflatten(0, (-1, 4)).transpose(1, 2).contiguous()


def stand_in(order: Callable[[torch.Tensor], torch.Tensor]) -> None:
    from vllm import _custom_ops
    from vllm.model_executor.layers.quantization.online import fp8
    from vllm.model_executor.utils import replace_parameter

    def process_weights_after_loading(layer: Any) -> None:
        replace_parameter(layer, "weight", order(layer.weight.data))

    kernel = SimpleNamespace(process_weights_after_loading=process_weights_after_loading, input_quant_key=lambda: None)
    fp8.init_fp8_linear_kernel = lambda **arguments: kernel
    _custom_ops.scaled_fp8_quant = lambda weight, scale: (rounded(weight, scale), scale)


def make_model(kind: str) -> torch.nn.Module:
    """vLLM's linear layers as its dummy loader leaves them, and a loader that cuts nothing."""
    from vllm.config.load import LoadConfig
    from vllm.config.quantization import _ONLINE_SHORTHANDS
    from vllm.model_executor.layers.linear import ReplicatedLinear
    from vllm.model_executor.layers.quantization.online.base import OnlineQuantizationConfig
    from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader

    config = OnlineQuantizationConfig(_ONLINE_SHORTHANDS[kind])

    class Layers(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, (out, size) in SHAPES.items():
                layer = ReplicatedLinear(size, out, bias=name == "wide", quant_config=config, prefix=name)
                self.add_module(name, layer)

        def load_weights(self, given: Any) -> None:
            parameters = dict(self.named_parameters())
            for name, tensor in given:
                parameters[name].weight_loader(parameters[name], tensor)

    model = Layers()
    DummyModelLoader(LoadConfig(load_format="dummy")).load_weights(model, None)
    return model


def check(kind: str, order: Callable[[torch.Tensor], torch.Tensor]) -> None:
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import parallel_state
    from vllm.utils.torch_utils import set_default_torch_dtype

    from rollout.weight_sync.quantised import Staging, check_kernels, quantised_layers, requantise, unquantised
    from rollout.weight_sync.vllm_layout import trace_layout

    config = VllmConfig()
    with set_current_vllm_config(config), set_default_torch_dtype(torch.bfloat16):
        if not parallel_state.model_parallel_is_initialized():
            parallel_state.init_distributed_environment(1, 0, "tcp://127.0.0.1:0", 0, "gloo")
            parallel_state.initialize_model_parallel(1, 1)
        config.model_config = SimpleNamespace(dtype=torch.bfloat16)  # all that the layers ask of it
        model = make_model(kind)
        layers = quantised_layers(model)
        assert list(layers) == [f"{name}.weight" for name in SHAPES]
        check_kernels(layers)
        live = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in model.named_parameters()}

        # The plan is made on the unquantised layout, and making it touches nothing.
        shapes = {f"{name}.weight": shape for name, shape in SHAPES.items()} | {"wide.bias": (200,)}
        with unquantised(model):
            layouts = trace_layout(model, shapes)
        assert {layout.name: (layout.shape, layout.dtype) for layout in layouts} == {
            name: (shape, "bfloat16") for name, shape in shapes.items()
        }
        for name, tensor in model.named_parameters():
            assert tensor.data_ptr() == live[name][0] and same(tensor, live[name][1])

        # Two other weights, and the first again; piece by piece into memory for one layer.
        parameters_of_loads = []
        for seed in (1, 2, 1):
            staging = Staging(layers, torch.device("cpu"))
            for name, weight in weights(seed).items():
                staging.weight(f"{name}.weight")[: len(weight) // 2] = weight[: len(weight) // 2]
                staging.weight(f"{name}.weight")[len(weight) // 2 :] = weight[len(weight) // 2 :]
                staging.quantise(f"{name}.weight")
                expected = REFERENCES[kind](weight)
                expected["weight"] = order(expected["weight"])
                for each, values in expected.items():
                    tensor = getattr(model.get_submodule(name), each)
                    assert same(tensor, values), f"{kind}: {name}.{each} of seed {seed}"
            assert not staging.weights and staging.peak_bytes == 2 * 200 * 300
            parameters_of_loads.append({name: tensor.clone() for name, tensor in model.named_parameters()})
        for name, tensor in model.named_parameters():
            assert tensor.data_ptr() == live[name][0], "kernels and graphs read the same memory"
            assert same(parameters_of_loads[0][name], parameters_of_loads[2][name])
            assert not name.endswith(".weight") or not same(parameters_of_loads[0][name], parameters_of_loads[1][name])

        # A vLLM that makes something else the second time is refused, and the layer keeps what it has.
        layer = model.get_submodule("wide")
        method, before = layer.quant_method.process_weights_after_loading, parameters_of_loads[2]["wide.weight"]

        def with_more(layer: Any) -> None:
            method(layer)
            layer.register_parameter("azp", torch.nn.Parameter(torch.zeros(1)))

        layer.quant_method.process_weights_after_loading = with_more
        try:
            requantise(layer, weights(2)["wide"])
        except RuntimeError as error:
            assert "azp" in str(error)
        else:
            raise AssertionError("not refused")
        assert same(layer.weight, before)


def main() -> None:
    for order in (keep, in_tiles):
        stand_in(order)
        for kind in REFERENCES:
            check(kind, order)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(bits(a), bits(b))


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """A copy, because a tensor of one element may have any stride, and another type's view needs a stride of 1."""
    return tensor.detach().clone(memory_format=torch.contiguous_format).flatten().view(torch.uint8)


def test_layers_are_quantised_in_place_as_the_arithmetic_says() -> None:
    """In a process of its own: vLLM's groups and stand-ins would stay."""
    command = [sys.executable, "-m", "tests.rollout.test_quantised"]
    with warm.processes():
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


if __name__ == "__main__":
    main()
