"""``memory_worker.py real|simulated FILE.json``: what ranks of tiny models hold, measured, or built without memory.

The ranks are one process in fake process groups: collectives give nonsense, sizes are those of real ranks.
"""

import gc
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state as mpu
from megatron.core.pipeline_parallel import schedules
from transformers import LlamaConfig, Qwen2_5_VLConfig

from megatron_ext import memory, model, optimizer, packing, platform, simulation, steps
from megatron_ext.memory import Shape
from megatron_ext.model import ModelSettings
from megatron_ext.parallel import Parallel
from megatron_ext.precision import Precision
from tests.megatron_ext import cases
from tests.megatron_ext.memory_cases import CASES, MemoryCase

SEQUENCES = ((10, 20), (6, 14), (30, 3))  # prompt and response tokens; 83 in all


def hf_config(case: MemoryCase) -> Any:
    """Four KV groups and a vocabulary of 130: padded under TP 4. With ``vision`` a Qwen2.5-VL with a frozen tower."""
    text = {
        "vocab_size": 130, "hidden_size": 192, "intermediate_size": 240, "num_hidden_layers": 4,
        "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 256, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": case.tied,
    }  # fmt: skip
    if not case.vision:
        return LlamaConfig(architectures=["LlamaForCausalLM"], **text)
    return Qwen2_5_VLConfig(
        architectures=["Qwen2_5_VLForConditionalGeneration"],
        text_config=text | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 4, 4]}},
        vision_config={
            "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "out_hidden_size": 192,
            "patch_size": 14, "spatial_merge_size": 2, "window_size": 112, "fullatt_block_indexes": [1],
        },
        tie_word_embeddings=case.tied,
    )  # fmt: skip


def build(case: MemoryCase, here: Parallel) -> model.Model:
    frozen = ("vision",) if case.vision else ()
    settings = ModelSettings(Precision(case.precision), case.recompute, case.distributed_optimizer, frozen)
    return model.build(hf_config(case), here, settings)


def live() -> dict[int, int]:
    """Storage → bytes, of every tensor that Python knows."""
    gc.collect()
    tensors = [t for t in gc.get_objects() if isinstance(t, torch.Tensor)]
    return {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}


def new_bytes(before: dict[int, int]) -> int:
    return sum(size for storage, size in live().items() if storage not in before)


def micro_batch(built: model.Model, case: MemoryCase) -> packing.MicroBatch:
    sequences = [packing.PackedSequence([1] * p, [2] * r, {"weight": [1.0] * r}) for p, r in SEQUENCES]
    if case.vision:  # 32 patches of a four by eight frame are eight tokens
        first = sequences[0]
        places = list(range(8))
        pixels = torch.zeros(32, 3 * 2 * 14 * 14)
        seen = packing.VisionInputs(pixels, torch.tensor([[1, 4, 8]]), places, [list(range(len(first.prompt)))] * 3)
        sequences[0] = packing.PackedSequence(first.prompt, first.response, first.values, seen)
    layout = built.parallel.layout
    device = platform.current().device()
    return packing.pack(
        sequences, [0, 1, 2], built.token_multiple, 0, device, layout.context, built.parallel.context_rank
    )


def shape_of(batch: packing.MicroBatch) -> Shape:
    starts = batch.packed.cu_seqlens_q
    patches = 0 if batch.vision is None else len(batch.vision.pixels)
    return Shape(batch.tokens.shape[1], len(batch.predict), len(starts) - 1, batch.packed.max_seqlen_q, patches)


def saved_bytes(built: model.Model, batch: packing.MicroBatch) -> int:
    """What autograd keeps of one forward pass through all of this rank's chunks, parameters left out."""
    own = {p.untyped_storage()._cdata for chunk in built.chunks for p in chunk.module.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage()._cdata not in own:
            kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    images = {} if batch.vision is None else {"vision": batch.vision}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        for chunk in built.chunks:
            if not chunk.module.pre_process:
                rows = batch.tokens.shape[1]
                if built.config.sequence_parallel:
                    rows //= built.parallel.tensor
                received = torch.zeros(rows, 1, built.config.hidden_size, dtype=built.config.params_dtype)
                chunk.module.set_input_tensor(received.requires_grad_())
            chunk(
                **images,
                input_ids=batch.tokens,
                position_ids=batch.positions,
                attention_mask=None,
                packed_seq_params=batch.packed,
                output_processor=partial(steps._log_probs_of_hidden, built, 1.0),
                output_processor_context=batch,
            )
    return sum(t.untyped_storage().nbytes() for t in kept.values())


def measure(case: MemoryCase, here: Parallel) -> dict[str, Any]:
    """Bytes that really came to be, and beside them the formulas'."""
    before = live()
    built = build(case, here)
    found: dict[str, Any] = {"built": new_bytes(before)}
    batch = micro_batch(built, case)
    found["saved"], found["estimate"] = saved_bytes(built, batch), estimate(built, shape_of(batch))
    before = live()
    optim, _ = optimizer.build(built, optimizer.OptimizerSettings(**cases.SETTINGS), steps=10)  # type: ignore[arg-type]
    optim.step()
    found["optimizer"] = new_bytes(before)
    return found | states(built)


def states(built: model.Model) -> dict[str, Any]:
    layout = built.parallel.layout
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


def estimate(built: model.Model, shape: Shape) -> int:
    """``memory.activations`` and ``memory.logits``, without what autograd does not keep of one forward pass: the layer
    that full recompute makes again, what the schedule keeps of a stage, and the 16-bit copy of the logits."""
    config, local = built.config, memory._local(built.config, shape)
    in_flight = memory.in_flight(built, 1)
    total = memory.activations(built, shape, 1, "cpu") + memory.logits(built, shape)
    if config.recompute_granularity == "full":
        total -= memory.layer(config, shape, "cpu")
    if built.parallel.layout.pipeline > 1:
        total -= in_flight * local.cut * config.hidden_size * local.size
    if built.parallel.is_last_stage and local.size < 4:
        total -= shape.predicting * built.sharding.padded_vocab // built.parallel.tensor * local.size
    return total


def main(kind: str, file: str) -> None:
    if kind == "simulated":
        simulation.activate()
    else:
        platform.activate("cpu")
    results = {}
    for case in CASES:
        with simulation.rank(case.rank, case.world, case.layout) as here:
            if kind == "real":
                results[case.name] = measure(case, here)
            else:
                with torch.device("meta"):
                    results[case.name] = states(build(case, here))
    Path(file).write_text(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
