"""``python -m tests.te.examine OUTPUT TWINS VISION_TWINS``: what needs the real layers but no arithmetic, as JSON.

Models are built on torch's "meta" device, on both platforms, and compared by name.
"""

import importlib.util
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.te import fake_gpu

if __name__ == "__main__":
    CUDA = fake_gpu.activate("meta")

import torch
import transformer_engine.pytorch as te
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensorFactory
from megatron.core.fp8_utils import get_fp8_context
from transformer_engine.pytorch.attention.dot_product_attention import utils as attention
from transformer_engine.pytorch.module import base as te_base
from transformer_engine.pytorch.quantization import FP8GlobalStateManager

from megatron_ext import checkpoint, hf_checkpoint, model, platform
from megatron_ext.layout import ParallelConfig
from megatron_ext.parallel import Parallel
from megatron_ext.platform import cpu
from megatron_ext.weight_map import unfused_name
from recipes.preflight import memory, simulated_ranks
from recipes.preflight.architecture import published_config
from tests.settings import CONF, parallel_config, precision_config
from tests.te import contract, fake_extension, packages
from tests.te.examine_cases import FP8, PUBLISHED, TEXT_TWINS, UB_SWITCHES, VISION_TWINS

META = torch.device("meta")
BF16 = precision_config("bf16")
SPEED = parallel_config(
    tensor=2,
    sequence=True,
    micro_batch_tokens=96,
    constant_length=True,
    gradient_accumulation_fusion=True,
    tp_comm_overlap=True,
)
ALL_AXES = {"tensor": 2, "sequence": True, "pipeline": 2, "virtual_pipeline": 2, "context": 2}
FROZEN = (
    "decoder.layers.0.input_layernorm",
    "decoder.layers.1.pre_mlp_layernorm",
    "decoder.layers.2.self_attention",
    "decoder.layers.3.mlp",
    "decoder.layers.3.self_attention.linear_qkv",
    "decoder.final_layernorm",
    "embedding",
)
# Of a parameter, what Megatron-Core reads when it reduces gradients and norms.
MARKS = ("sequence_parallel", "tensor_model_parallel", "shared", "requires_grad")


@contextmanager
def on(chosen: Any) -> Iterator[None]:
    """Build for the platform ``chosen`` within the block."""
    platform._active = chosen
    try:
        yield
    finally:
        platform._active = CUDA


def described(built: model.Model) -> dict[str, Any]:
    """A rank's parameters, sharded state and sizes, under names that both platforms have."""
    parameters = {}
    for module in (module for chunk in built.chunks for module in chunk.modules()):
        if isinstance(module, te.RMSNorm | te.LayerNorm):
            # Its reset_parameters does so, which it calls on every device but this one.
            for parameter in module.parameters():
                parameter.sequence_parallel = module.sequence_parallel
    named = (parameter for chunk in built.chunks for parameter in chunk.module.parameters())
    for shard, parameter in zip(built.shards, named, strict=True):
        blocks = [(b.hf_name, b.hf_start, b.local_start, b.shape) for b in shard.blocks]
        marks = {mark: bool(getattr(parameter, mark, False)) for mark in MARKS}
        parameters[unfused_name(shard.name)] = [tuple(parameter.shape), str(parameter.dtype), marks, blocks]
    sharded, extra = {}, []
    for leaf in nested_values(checkpoint._model_state(built)):
        if isinstance(leaf, ShardedObject):
            extra.append(leaf.key)
            continue
        pieces = nested_values(leaf.build()) if isinstance(leaf, ShardedTensorFactory) else [leaf]
        for piece in pieces:
            sharded[piece.key] = [piece.global_shape, piece.global_offset, piece.local_shape, piece.replica_id]
    # Which rank owns which parameter depends on their order.
    sharing = max(buffer.data_parallel_group.size() for chunk in built.chunks for buffer in chunk.buffers)
    states = sum(memory.optimizer(built, rank) for rank in range(sharing))
    sizes = {"weights": memory.weights(built), "gradients": memory.gradients(built), "optimizer": states}
    return {"parameters": parameters, "sharded": sharded, "extra": extra, "sizes": sizes}


def differences(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """Where two descriptions differ; a layer's extra state, which a checkpoint leaves out, is of Transformer Engine."""
    lines = []
    for part in ("parameters", "sharded", "sizes"):
        for name in sorted(ours[part].keys() | theirs[part].keys()):
            if ours[part].get(name) != theirs[part].get(name):
                lines.append(f"{part} {name}: {ours[part].get(name)} on a GPU, {theirs[part].get(name)} on a CPU")
    return [*lines, *(key for key in ours["extra"] if not key.endswith("._extra_state"))]


def ends(world: int, sizes: ParallelConfig) -> list[int]:
    """The first tensor-parallel rank of the first stage, and the last of the last."""
    ranks = simulated_ranks.distinct_ranks(world, sizes)
    return [ranks[0], ranks[-1]] if len(ranks) > 1 else ranks


def compared(
    hf: Any,
    sizes: ParallelConfig,
    world: int,
    frozen: tuple[str, ...] = (),
    seen: simulated_ranks.Coverage | None = None,
) -> list[str]:
    """Differences between the platforms at the :func:`ends`. ``seen`` gets the GPU's models."""
    lines = []
    for number in ends(world, sizes):
        descriptions = []
        for chosen in (CUDA, cpu):
            with on(chosen), simulated_ranks.rank(number, world, sizes) as here:
                built = simulated_ranks.build(hf, here, BF16, frozen)
                descriptions.append(described(built))
                if chosen is CUDA and seen is not None:
                    seen.add(built)
        lines += [f"rank {number}: {line}" for line in differences(*descriptions)]
    return lines


def twins(folder: Path, names: tuple[str, ...]) -> dict[str, Any]:
    """Twin → differences, on one rank and under all axes of parallelism together."""
    by_twin = {}
    for name in names:
        hf = hf_checkpoint.config(folder / name)
        by_twin[name] = compared(hf, parallel_config(), 1) + compared(hf, parallel_config(**ALL_AXES), 8)
    return by_twin


def published() -> dict[str, Any]:
    """Published model → differences in its recipe's layout, and which tensors of the checkpoint the GPU's models cover.

    The two ranks of the 7B model's layout are all. That all ranks of the others cover the checkpoint is tested on the
    CPU platform."""
    results: dict[str, Any] = {"differences": {}, "coverage": {}}
    for name, (layout, world) in PUBLISHED.items():
        hf, sizes, seen = published_config(name), settings_of(layout), simulated_ranks.Coverage()
        results["differences"][name] = compared(hf, sizes, world, seen=seen)
        if ends(world, sizes) == simulated_ranks.distinct_ranks(world, sizes):
            expected = simulated_ranks.checkpoint_tensors(hf)
            results["coverage"][name] = seen.compare(expected, hf.tie_word_embeddings)
    return results


def settings_of(layout: str) -> ParallelConfig:
    """A file of conf/parallel, with what it takes from others."""
    from omegaconf import OmegaConf

    file = OmegaConf.load(CONF / "parallel" / f"{layout}.yaml")
    (base,) = file.pop("defaults", [None]) or [None]
    values = {} if base in (None, "tp1") else vars(settings_of(base)).copy()
    return parallel_config(**(values | OmegaConf.to_container(file)))  # type: ignore[operator]


def fp8_layers(folder: Path) -> dict[str, Any]:
    """Precision → Transformer Engine's recipe of each layer, and the quantisers of its matrices."""
    hf = hf_checkpoint.config(folder)
    by_precision = {}
    for name, options in FP8.items():
        with simulated_ranks.rank(0, 1, parallel_config()) as here:
            built = simulated_ranks.build(hf, here, precision_config("fp8", **options))
            layers = []
            for number, layer in enumerate(built.chunks[0].module.decoder.layers):
                with get_fp8_context(built.config, number):
                    enabled = FP8GlobalStateManager.is_fp8_enabled()
                    linear = layer.mlp.linear_fc2
                    linear.init_fp8_metadata(num_gemms=1)
                    recipe = FP8GlobalStateManager.get_fp8_recipe()
                    kinds = {type(q).__name__ for q in linear.quantizers["scaling_fwd"]} if enabled else set()
                layers.append([enabled, type(recipe).__name__, recipe.fp8_format.name, sorted(kinds)])
            parameters = {type(p).__name__ for chunk in built.chunks for p in chunk.module.parameters()}
            by_precision[name] = {"layers": layers, "parameters": sorted(parameters), "multiple": built.token_multiple}
    return by_precision


def speed(folder: Path) -> dict[str, Any]:
    """What the settings of speed have made of Transformer Engine's and Megatron-Core's layers, on one of two ranks: of
    each matrix its switches, of each communication buffer its shape; and their bytes, counted and estimated."""
    hf = hf_checkpoint.config(folder)
    switches = ("fuse_wgrad_accumulation", *UB_SWITCHES)
    with simulated_ranks.rank(0, 2, SPEED) as here:
        built = simulated_ranks.build(hf, here, BF16)
        (chunk,) = built.chunks
        matrices = {}
        for name, module in chunk.module.named_modules():
            if hasattr(module, "fuse_wgrad_accumulation"):
                matrices[name] = {"buffer": module.ub_name, "on": [s for s in switches if getattr(module, s, False)]}
        buffers = {name: user.buffer for (name, _), user in te_base._ub_communicators.items()}
        fused_alone = simulated_ranks.build(hf, replaced(here, tp_comm_overlap=False), BF16)
        results = {
            "matrices": matrices,
            "output layer fuses": chunk.module.output_layer.gradient_accumulation_fusion,
            "buffers": {name: list(buffer.shape) for name, buffer in buffers.items()},
            "bytes": sum(buffer.nbytes for buffer in buffers.values()),
            "estimate": memory.buffers(built) - memory.buffers(fused_alone),
            "estimate of fused gradients": memory.buffers(fused_alone),
            "layer": [list(shard.tensor.shape) for shard in built.shards if "decoder.layers.0." in shard.name],
        }
        try:
            other = hf_checkpoint.config(folder)
            other.hidden_size *= 2
            simulated_ranks.build(other, here, BF16)
        except ValueError as error:
            results["other hidden size"] = str(error)
    results["given up"] = te_base._ub_communicators is None
    return results


def replaced(here: Parallel, **changes: Any) -> Parallel:
    return replace(here, config=replace(here.config, **changes))


def attention_backends() -> dict[str, bool]:
    """Whether packed causal attention has a backend in Transformer Engine, by dtype and context-parallel size."""
    extension: Any = sys.modules[fake_extension.NAME]
    backends = extension.NVTE_Fused_Attn_Backend
    of_any_dtype = extension.get_fused_attn_backend
    has_backend = {}
    for dtype in (torch.bfloat16, torch.float32):
        # cuDNN's attention takes 16 bits: FusedAttention's own assertion.
        answer = backends.NVTE_F16_arbitrary_seqlen if dtype is torch.bfloat16 else backends.NVTE_No_Backend
        extension.get_fused_attn_backend = lambda parameters, answer=answer: (answer, "")
        for context in (False, True):
            asked = attention.AttentionParams(
                qkv_dtype=dtype,
                qkv_layout="thd_thd_thd",
                batch_size=2,
                num_heads=8,
                num_gqa_groups=2,
                max_seqlen_q=128,
                max_seqlen_kv=128,
                head_dim_qk=64,
                head_dim_v=64,
                attn_mask_type="padding_causal",
                context_parallel=context,
            )
            flash, _, fused, _, unfused, _ = attention.get_attention_backend.__wrapped__(asked)
            has_backend[f"{dtype} {context}"] = bool(flash or fused or unfused)
    extension.get_fused_attn_backend = of_any_dtype
    return has_backend


def gathers_blocks() -> dict[int, bool]:
    """Tokens of a sequence-parallel rank → whether they can be gathered in FP8 with block scaling."""
    quantizer = te.Float8BlockQuantizer(te.DType.kFloat8E4M3, rowwise=True, columnwise=True)
    return {tokens: quantizer.is_quantizable(torch.empty(tokens, 8192, device=META)) for tokens in (16, 128, 144, 2048)}


def fp8_storage_bytes() -> int:
    """Of a tensor of Transformer Engine with 512 elements in FP8."""
    tensor = te.Float8Tensor(
        shape=(16, 32),
        dtype=torch.bfloat16,
        data=torch.zeros(16, 32, dtype=torch.uint8, device=META),
        fp8_scale_inv=torch.ones(1, device=META),
        fp8_dtype=te.DType.kFloat8E4M3,
        device=META,
    )
    return tensor.untyped_storage().nbytes()


def calls() -> dict[str, Any]:
    """Megatron-Core's calls into Transformer Engine."""
    (root,) = map(Path, importlib.util.find_spec("megatron.core").submodule_search_locations)  # type: ignore[union-attr]
    te_calls, missing = contract.examine(root, packages.VERSION)
    return {
        "calls": [[call.place, call.target, call.fault] for call in te_calls],
        "missing": missing,
        "unguarded": [place for place in missing if contract.unguarded(place, root)],
    }


def main(output: Path, text: Path, vision: Path) -> None:
    cpu.device = lambda: META
    parts: dict[str, Callable[[], Any]] = {
        "calls": calls,
        "text": lambda: twins(text, TEXT_TWINS),
        "vision": lambda: twins(vision, VISION_TWINS),
        "published": published,
        "frozen": lambda: compared(hf_checkpoint.config(text / "untied"), parallel_config(), 1, FROZEN),
        "fp8": lambda: fp8_layers(text / "untied"),
        "speed": lambda: speed(text / "even"),
        "attention": attention_backends,
        "gathers": gathers_blocks,
        "fp8 storage": fp8_storage_bytes,
    }
    results = {}
    for name, part in parts.items():
        started = time.process_time()
        results[name] = part()
        print(name, f"{time.process_time() - started:.1f} s")
    output.write_text(json.dumps(results))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
