"""``memory_worker.py real|simulated FILE.json``: what ranks of tiny models hold, measured, or built without memory.

The ranks are one process in fake process groups: collectives give nonsense, sizes are those of real ranks.
"""

import gc
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakSet

import torch

from megatron_ext import platform

platform.activate("cpu")

from megatron.core import parallel_state as mpu  # noqa: E402
from megatron.core.pipeline_parallel import schedules  # noqa: E402
from transformers import InternVLConfig, LlamaConfig, Qwen2_5_VLConfig  # noqa: E402

from megatron_ext import forward_backward, images, model, optimizer, packing  # noqa: E402
from megatron_ext.parallel import Parallel  # noqa: E402
from recipes.preflight import memory, simulated_ranks  # noqa: E402
from recipes.preflight.memory import Shape  # noqa: E402
from tests.megatron_ext import cases  # noqa: E402
from tests.megatron_ext.memory_cases import CASES, MemoryCase  # noqa: E402
from tests.sequences import PlainSequence, pack  # noqa: E402
from tests.settings import precision_config  # noqa: E402

SEQUENCES = ((10, 20), (6, 14), (30, 3))  # prompt and response tokens; 83 in all


def hf_config(case: MemoryCase) -> Any:
    """Four KV groups and a vocabulary of 130: padded under TP 4. With ``vision`` a family's tower before Qwen2.5."""
    text = {
        "vocab_size": 130, "hidden_size": 192, "intermediate_size": 240, "num_hidden_layers": 4,
        "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 256, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": case.tied,
    }  # fmt: skip
    if not case.vision:
        return LlamaConfig(architectures=["LlamaForCausalLM"], **text)
    rope = {"rope_type": "default", "rope_theta": 1e6}
    if case.vision == "internvl":
        return InternVLConfig(
            architectures=["InternVLForConditionalGeneration"],
            text_config=text | {"model_type": "qwen2", "rope_parameters": rope},
            vision_config={
                "hidden_size": 160, "intermediate_size": 240, "num_hidden_layers": 4, "num_attention_heads": 5,
                "image_size": 112, "patch_size": 14, "norm_type": "rms_norm", "use_qk_norm": True,
            },
            tie_word_embeddings=case.tied,
        )  # fmt: skip
    return Qwen2_5_VLConfig(
        architectures=["Qwen2_5_VLForConditionalGeneration"],
        text_config=text | {"rope_parameters": rope | {"mrope_section": [4, 4, 4]}},
        vision_config={
            "depth": 4, "hidden_size": 160, "intermediate_size": 240, "num_heads": 4, "out_hidden_size": 192,
            "patch_size": 14, "spatial_merge_size": 2, "window_size": 56, "fullatt_block_indexes": [1],
        },
        tie_word_embeddings=case.tied,
    )  # fmt: skip


def build(case: MemoryCase, here: Parallel) -> model.Model:
    frozen = ("vision",) if case.frozen else ()
    return model.build(hf_config(case), here, precision_config(case.precision), frozen)


def live() -> dict[int, int]:
    """Storage → bytes, of every tensor that Python knows."""
    gc.collect()
    tensors = [t for t in gc.get_objects() if isinstance(t, torch.Tensor)]
    return {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}


def new_bytes(before: dict[int, int]) -> int:
    return sum(size for storage, size in live().items() if storage not in before)


def micro_batch(built: model.Model, case: MemoryCase) -> packing.MicroBatch:
    sequences = [PlainSequence([1] * p, [2] * r, {"weight": [1.0] * r}) for p, r in SEQUENCES]
    if case.vision:  # 64 patches of an eight by eight frame are 16 tokens
        last = sequences[-1]
        qwen = case.vision == "qwen"
        seen = packing.VisionInputs(
            torch.zeros((64, 3 * 2 * 14 * 14) if qwen else (1, 3, 112, 112)),
            torch.tensor([[1, 8, 8]]) if qwen else None,
            placeholders=list(range(16)),
            positions=[list(range(len(last.prompt)))] * 3 if qwen else None,
        )
        here = built.parallel
        seen.part = packing.Part.of(seen.pixels, here.tensor_rank, here.tensor)
        if case.frozen and built.tower is not None:
            images.encode(built, [seen])
        sequences[-1] = PlainSequence(last.prompt, last.response, last.values, seen)
    layout = built.parallel.config
    device = platform.current().device()
    return pack(
        sequences,
        [0, 1, 2],
        built.token_multiple,
        0,
        device,
        layout.context,
        built.parallel.context_rank,
        shared_prompts=bool(layout.shared_prompts),
        tower=built.tower,
        encoded=case.frozen,
    )


def shape_of(batch: packing.MicroBatch) -> Shape:
    starts = batch.packed.cu_seqlens_q
    patches = 0 if batch.vision is None else 4 * len(batch.vision.rows)
    return Shape(batch.tokens.shape[1], len(batch.predict), len(starts) - 1, batch.packed.max_seqlen_q, patches)


def tensors_of(value: Any) -> Iterator[torch.Tensor]:
    """All that a micro-batch holds."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_of(item)
    elif is_dataclass(value):
        for field in fields(value):
            yield from tensors_of(getattr(value, field.name))


@dataclass(eq=False)
class Saved:
    tensor: torch.Tensor


def saved_bytes(built: model.Model, batch: packing.MicroBatch) -> int:
    """What autograd keeps of one forward pass through all of this rank's chunks, parameters left out, and what
    belongs to a part of the graph that is gone at the end: recompute drops some."""
    parameter_storages = {p.untyped_storage()._cdata for chunk in built.chunks for p in chunk.module.parameters()}
    kept: WeakSet[Saved] = WeakSet()

    def keep(tensor: torch.Tensor) -> Saved:
        kept.add(saved := Saved(tensor))
        return saved

    outputs = []
    images = {} if batch.vision is None else {"vision": batch.vision}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved.tensor):
        for chunk in built.chunks:
            if not chunk.module.pre_process:
                rows = batch.tokens.shape[1]
                if built.config.sequence_parallel:
                    rows //= built.parallel.tensor
                received = torch.zeros(rows, 1, built.config.hidden_size, dtype=built.config.params_dtype)
                chunk.module.set_input_tensor(received.requires_grad_())
            output = chunk(
                **images,
                input_ids=batch.tokens,
                position_ids=batch.positions,
                attention_mask=None,
                packed_seq_params=batch.packed,
                output_processor=partial(forward_backward._log_probs_of_hidden, built, 1.0, False),
                output_processor_context=batch,
            )
            outputs.append(output)  # the graph lives as long as they do
    return memory.storage_bytes(s.tensor for s in kept if s.tensor.untyped_storage()._cdata not in parameter_storages)


def measure(case: MemoryCase, here: Parallel) -> dict[str, Any]:
    """Bytes that really came to be, and beside them the formulas'."""
    before = live()
    built = build(case, here)
    measured: dict[str, Any] = {"built": new_bytes(before)}
    batch = micro_batch(built, case)
    measured["inputs"] = memory.storage_bytes(tensors_of(batch))
    measured["inputs_estimate"] = memory.micro_batch(built, shape_of(batch), len(batch.values))
    measured["saved"], measured["estimate"] = saved_bytes(built, batch), estimate(built, shape_of(batch))
    measured["sharing_adds"] = {
        "gpu": sharing_adds(built, shape_of(batch), fused_kernels=True),
        "cpu": sharing_adds(built, shape_of(batch), fused_kernels=False),
        "block_mask": memory.block_mask(shape_of(batch)),
    }
    before = live()
    optim, _ = optimizer.build(built, cases.OPTIMIZER, cases.SCHEDULE, steps=10)
    optim.step()
    measured["optimizer"] = new_bytes(before)
    return measured | states(built)


def states(built: model.Model) -> dict[str, Any]:
    layout = built.parallel.config
    rotary = [module.inv_freq for chunk in built.chunks for module in chunk.modules() if hasattr(module, "inv_freq")]
    return {
        "formula": {
            "weights": memory.weights(built),
            "gradients": memory.gradients(built),
            "optimizer": memory.optimizer(built, mpu.get_data_parallel_rank(with_context_parallel=True)),
            "rotary": memory.storage_bytes(rotary),
        },
        "fullest_optimizer": memory.fullest_optimizer(built),
        "in_flight": memory.in_flight(built, 64),
        "warm_up": schedules.get_pp_rank_microbatches(64, len(built.chunks), layout.pipeline)[2],
    }


def sharing_adds(built: model.Model, shape: Shape, fused_kernels: bool) -> int:
    """To the estimate of 64 micro-batches' activations, where prompts are shared."""
    of_layout = []
    for shared_prompts in (True, None):
        sizes = replace(built.parallel.config, shared_prompts=shared_prompts)
        model_of_layout = replace(built, parallel=replace(built.parallel, config=sizes))
        of_layout.append(memory.activations(model_of_layout, shape, 64, fused_kernels))
    return of_layout[0] - of_layout[1]


def estimate(built: model.Model, shape: Shape) -> int:
    """``memory.activations`` and ``memory.logits``, without what autograd does not keep of one forward pass: what the
    backward pass makes again, what the schedule keeps of a stage, and the 16-bit copy of the logits."""
    config, local = built.config, memory._local(built.config, shape)
    in_flight = memory.in_flight(built, 1)
    total = memory.activations(built, shape, 1, fused_kernels=False) + memory.logits(built, shape)
    total -= max(memory.remade(config, shape, fused_kernels=False), memory.vision(built, shape, fused_kernels=False)[1])
    if built.parallel.config.pipeline > 1:
        total -= in_flight * local.cut * config.hidden_size * local.size
    if built.parallel.is_last_stage and local.size < 4:
        total -= shape.predicting * built.sharding.padded_vocab // built.parallel.tensor * local.size
    return total


def main(kind: str, file: str) -> None:
    if kind == "simulated":
        simulated_ranks.activate()
    results = {}
    for case in CASES:
        with simulated_ranks.rank(case.rank, case.world, case.layout) as here:
            if kind == "real":
                results[case.name] = measure(case, here)
            else:
                with torch.device("meta"):
                    results[case.name] = states(build(case, here))
    Path(file).write_text(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
