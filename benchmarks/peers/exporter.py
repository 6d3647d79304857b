"""One rank of a peer's trainer: builds the model, loads the checkpoint and exports full Hugging Face tensors.

``python -m benchmarks.peers.exporter PEER SETTINGS_JSON`` runs in the peer's own environment, once per rank, with
torchrun's variables. Rank 0 writes the answer to the file that the setting ``output`` names.

The peer's own code builds the model and exports it. Two things are ours, because neither project runs without a GPU:
the CPU patches of ``megatron_ext.platform``, and a stand-in for Transformer Engine, which has no CPU build. The
stand-in has Transformer Engine's class and parameter names, because the weight maps of both projects use them. No
forward pass is run.
"""

import importlib.metadata
import json
import mmap
import os
import statistics
import sys
import time
import types
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_submodules
from megatron.core.tensor_parallel import ColumnParallelLinear, model_parallel_cuda_manual_seed
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer
from safetensors import safe_open

from benchmarks.memcpy import copy_bytes
from megatron_ext import platform

Export = Callable[[], Iterable[tuple[str, torch.Tensor]]]
ALIGNMENT = 64  # bytes; each tensor starts at a multiple in the memory that vLLM reads


class RMSNorm(torch.nn.Module):
    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **unused: Any) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))


class TELayerNormColumnParallelLinear(ColumnParallelLinear):
    """Megatron-Core's own linear layer with the norm's weight beside it, named as in Transformer Engine's fused one."""

    def __init__(self, input_size: int, output_size: int, *, config: Any, **options: Any) -> None:
        super().__init__(input_size, output_size, config=config, **options)
        self.layer_norm_weight = torch.nn.Parameter(torch.ones(input_size, dtype=config.params_dtype))


def layer_specs(config: Any) -> TransformerBlockSubmodules:
    """The decoder of ``config`` with Transformer Engine's parameter names and Megatron-Core's CPU layers."""
    submodules = get_gpt_layer_local_submodules(qk_layernorm=False, normalization="RMSNorm")
    submodules.input_layernorm = submodules.pre_mlp_layernorm = IdentityOp
    submodules.self_attention.submodules.linear_qkv = TELayerNormColumnParallelLinear
    submodules.mlp.keywords["submodules"].linear_fc1 = TELayerNormColumnParallelLinear
    layer = ModuleSpec(module=TransformerLayer, submodules=submodules)
    return TransformerBlockSubmodules(layer_specs=[layer] * config.num_layers, layer_norm=RMSNorm)


def stand_in_for_transformer_engine() -> None:
    """Let ``import transformer_engine`` succeed: Megatron-Bridge imports it for adapters, which are not used here.

    Call this after Megatron-Core has been imported, because Megatron-Core must not use the stand-in.
    """
    import megatron.core.extensions.transformer_engine
    import megatron.core.utils
    from packaging.version import Version

    class Anything(type):
        def __getattr__(cls, name: str) -> Any:
            return anything(name)

    def anything(name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything(name, (torch.nn.Module,), {})

    for name in ("", ".pytorch", ".pytorch.optimizers"):
        module: Any = types.ModuleType(f"transformer_engine{name}")
        module.__path__ = []
        module.__getattr__ = anything
        sys.modules[module.__name__] = module
        parent, _, child = module.__name__.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
    megatron.core.utils._te_version = Version("2.10.0")


def megatron_bridge(folder: str) -> tuple[Export, list[torch.Tensor]]:
    """Megatron-Bridge as NeMo-RL calls it: ``AutoBridge.export_hf_weights`` with conversion tasks built once."""
    stand_in_for_transformer_engine()
    from megatron.bridge import AutoBridge

    bridge = AutoBridge.from_hf_pretrained(folder)
    provider = bridge.to_megatron_provider(load_weights=True)
    provider.tensor_model_parallel_size = dist.get_world_size()
    provider.transformer_layer_spec = layer_specs
    provider.params_dtype = torch.bfloat16
    for name, value in CPU_OPTIONS.items():
        setattr(provider, name, value)
    provider.finalize()
    model = provider.provide_distributed_model(wrap_with_ddp=False, use_cpu_initialization=True)
    tasks = bridge.get_conversion_tasks(model)
    parameters = [parameter for chunk in model for parameter in chunk.parameters()]
    return lambda: bridge.export_hf_weights(model, show_progress=False, conversion_tasks=tasks), parameters


def mbridge(folder: str) -> tuple[Export, list[torch.Tensor]]:
    """mbridge as verl and slime call it: ``bridge.export_weights``."""
    from mbridge import AutoBridge

    bridge = AutoBridge.from_pretrained(folder)
    bridge.set_extra_args(sequence_parallel=False, **CPU_OPTIONS)
    bridge._get_transformer_layer_spec = lambda vp_stage=None: layer_specs(bridge.config)
    # Not ``get_model``: it only wraps this model, and uses a ModelType that Megatron-Core no longer has.
    model = [bridge._model_provider([])(pre_process=True, post_process=True)]
    with torch.no_grad():
        bridge.load_weights(model, folder)
    parameters = [parameter for chunk in model for parameter in chunk.parameters()]
    return lambda: bridge.export_weights(model), parameters


PEERS = {"megatron_bridge": megatron_bridge, "mbridge": mbridge}
PACKAGES = {
    "megatron_bridge": ("megatron-bridge", "megatron-core", "transformers", "torch"),
    "mbridge": ("mbridge", "megatron-core", "transformers", "torch"),
}
CPU_OPTIONS = {
    "use_cpu_initialization": True,
    "perform_initialization": False,
    "gradient_accumulation_fusion": False,
    "bias_activation_fusion": False,
    "bias_dropout_fusion": False,
    "masked_softmax_fusion": False,
    "persist_layer_norm": False,
}


def hand_over(export: Export, folder: str, memory: torch.Tensor | None) -> tuple[list[list[Any]], int]:
    """Export once, compare the tensors with the checkpoint, and copy them into ``memory`` (uint8; rank 0 only).

    Returns [name, shape, offset] of each tensor, and the bytes of all tensors. Raises RuntimeError when an exported
    tensor differs from the checkpoint's or one is missing: then this benchmark uses the peer wrongly.
    """
    entries: list[list[Any]] = []
    size = 0
    offset = 0
    with checkpoint(folder) as stored:
        missing = set(stored.keys())
        for name, tensor in export():
            if memory is None:
                continue
            if name not in missing or not torch.equal(tensor, stored.get_tensor(name)):
                raise RuntimeError(f"{name} was exported twice, or is not the checkpoint's")
            missing.discard(name)
            tensor = tensor.contiguous()
            data = tensor.view(-1).view(torch.uint8)
            memory[offset : offset + data.numel()] = data
            entries.append([name, list(tensor.shape), offset])
            size += data.numel()
            offset += -(-data.numel() // ALIGNMENT) * ALIGNMENT
    if memory is not None and missing:
        raise RuntimeError(f"{sorted(missing)[0]} was not exported ({len(missing)} tensors missing)")
    return entries, size


def checkpoint(folder: str) -> Any:
    (file,) = Path(folder).glob("*.safetensors")
    return safe_open(file, framework="pt")


def run(peer: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Collective. Seconds of each export, of the start, and of a memcpy of the same bytes; the exported tensors."""
    export, parameters = PEERS[peer](settings["model"])
    start_seconds = time.perf_counter() - STARTED
    export_seconds = []
    for _ in range(1 + settings["repetitions"]):
        dist.barrier()
        started = time.perf_counter()
        for _ in export():
            pass
        dist.barrier()
        export_seconds.append(time.perf_counter() - started)
    memory = None
    if dist.get_rank() == 0:
        memory = torch.frombuffer(mmap.mmap(settings["memory"], 0), dtype=torch.uint8)
    with torch.no_grad():
        tensors, size = hand_over(export, settings["model"], memory)
    bytes_per_rank = torch.tensor([size // dist.get_world_size()])
    dist.broadcast(bytes_per_rank, 0)
    target = torch.zeros(int(bytes_per_rank), dtype=torch.uint8)
    memcpy_seconds = []
    for _ in range(settings["repetitions"]):
        dist.barrier()
        started = time.perf_counter()
        copy_bytes(parameters, target)
        dist.barrier()
        memcpy_seconds.append(time.perf_counter() - started)
    return {
        "first_export_seconds": export_seconds[0],
        "later_export_seconds": export_seconds[1:],
        "memcpy_seconds": memcpy_seconds,
        "start_seconds": start_seconds,
        "bytes": size,
        "tensors": tensors,
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES[peer]},
    }


STARTED = time.perf_counter()


def main() -> None:
    peer, settings = sys.argv[1], json.loads(sys.argv[2])
    platform.activate("cpu")
    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=dist.get_world_size(), create_gloo_process_groups=False
    )
    model_parallel_cuda_manual_seed(0)
    answer = run(peer, settings)
    if dist.get_rank() == 0:
        Path(settings["output"]).write_text(json.dumps(answer))
        print(peer, "export", statistics.median(answer["later_export_seconds"]))
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads would outlive the interpreter


if __name__ == "__main__":
    main()
