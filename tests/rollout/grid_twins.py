"""Twins of every family, the layouts that the grid pairs, and two programs that make their sides of it.

``python -m tests.rollout.grid_twins trainer FOLDER`` builds every trainer rank's Megatron-Core model without memory;
``… vllm FOLDER`` builds every vLLM worker's model and has vLLM load the checkpoints. Each does all families.
"""

import json
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from megatron_ext.blocks import Block
from tests.settings import parallel_config, precision_config

ROOT = Path(__file__).resolve().parents[2]
TEXT = {
    "hidden_size": 256,  # heads of 32: vLLM has attention for them on a CPU
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,  # the trainer pads them to four at TP 4, where vLLM replicates them
    "vocab_size": 203,
    "max_position_embeddings": 128,
}
ROTARY = {"rope_theta": 10000.0, "rope_scaling": None}


def architecture(name: str, text: dict[str, Any], vision: dict[str, Any]) -> dict[str, Any]:
    """A real model's configuration with smaller sizes."""
    config = json.loads((ROOT / "conf/model/architectures" / f"{name}.json").read_text())
    config.get("text_config", config).update(text)
    if vision:
        config["vision_config"].update(vision)
    return config


def plain(model_type: str, name: str, **options: Any) -> dict[str, Any]:
    return {"model_type": model_type, "architectures": [name], **TEXT, **ROTARY, **options}


def qwen_vision(heads: int) -> dict[str, Any]:
    return {
        "depth": 2,
        "hidden_size": 16 * heads,
        "intermediate_size": 48,
        "num_heads": heads,
        "out_hidden_size": 256,
        "fullatt_block_indexes": [1],
    }


QWEN_VL_TEXT = TEXT | {"rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]}}
INTERN_VISION = {
    "hidden_size": 80,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 5,
    "image_size": [56, 56],
}


@dataclass(frozen=True)
class Family:
    """A twin's configuration, the dtype in which vLLM holds it, and the (tensor, pipeline) of its engines."""

    config: dict[str, Any]
    engines: tuple[tuple[int, int], ...] = ((1, 1), (2, 1), (4, 1), (1, 2), (2, 2))
    dtype: str = "bfloat16"


FAMILIES = {
    "llama": Family(
        architecture("DeepSeek-R1-Distill-Llama-70B", TEXT | ROTARY | {"head_dim": 32}, {}), dtype="float32"
    ),
    # Three KV groups: the trainer pads them, and vLLM wants a tensor-parallel size that divides them.
    "llama_tied": Family(
        plain(
            "llama",
            "LlamaForCausalLM",
            hidden_size=192,
            num_attention_heads=6,
            num_key_value_heads=3,
            vocab_size=190,
            tie_word_embeddings=True,
        ),
        engines=((1, 1), (3, 1), (1, 2)),
    ),
    "qwen2": Family(plain("qwen2", "Qwen2ForCausalLM", tie_word_embeddings=False)),
    "qwen3": Family(plain("qwen3", "Qwen3ForCausalLM", head_dim=64, vocab_size=330, tie_word_embeddings=True)),
    "qwen2_5_vl": Family(architecture("Qwen2.5-VL-72B-Instruct", QWEN_VL_TEXT, qwen_vision(4))),
    # Six heads in the tower: the trainer pads them at TP 4, vLLM wants a divisor.
    "qwen2_5_vl_six": Family(
        architecture("Qwen2.5-VL-72B-Instruct", QWEN_VL_TEXT, qwen_vision(6)), engines=((2, 1), (1, 2))
    ),
    # Five heads: the trainer pads them at every tensor-parallel size, vLLM's workers hold all.
    "internvl3": Family(architecture("InternVL3-78B-hf", TEXT | ROTARY, INTERN_VISION)),
    "internvl3_300m": Family(
        architecture(
            "InternVL3-78B-hf",
            TEXT | ROTARY,
            INTERN_VISION | {"norm_type": "layer_norm", "use_qk_norm": False, "attention_bias": True},
        ),
        engines=((1, 1), (2, 1)),
    ),
}
# Layouts of the trainer and how many ranks run them: what tensor, pipeline and context leave is data parallelism.
sizes = partial(parallel_config, distributed_optimizer=False)
TRAINERS = {
    "one": (sizes(), 1),
    "tp2_dp2": (sizes(tensor=2, sequence=True), 4),
    "tp4": (sizes(tensor=4), 4),
    "pp2_uneven": (sizes(pipeline=2, first_stage_layers=1), 2),
    "pp4_dp2": (sizes(pipeline=4), 8),
    "tp2_pp2_vp2": (sizes(tensor=2, pipeline=2, virtual_pipeline=2), 4),
    "tp2_cp2_pp2": (sizes(tensor=2, context=2, pipeline=2), 8),
    "tp4_pp2_uneven": (sizes(tensor=4, pipeline=2, last_stage_layers=1), 8),
    "tp2_pp4_dp2": (sizes(tensor=2, pipeline=4), 16),
}


def write_configs(folder: Path) -> None:
    for name, family in FAMILIES.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(family.config))


def trainer(folder: Path) -> None:
    """``trainer.json``: of each family the ``shapes`` of the checkpoint's tensors by transformers' own model, and for
    each layout of each rank the shards: name, shape, blocks (the values of a ``Block``)."""
    from megatron_ext import hf_checkpoint
    from recipes.preflight import simulated_ranks

    simulated_ranks.activate()
    precision = precision_config("fp32")
    families: dict[str, Any] = {}
    for family in FAMILIES:
        config = hf_checkpoint.config(folder / family)
        families[family] = {"shapes": simulated_ranks.checkpoint_tensors(config)}
        for layout_name, (layout, world) in TRAINERS.items():
            families[family][layout_name] = []
            for number in range(world):
                with simulated_ranks.rank(number, world, layout) as here:
                    shards = simulated_ranks.build(config, here, precision).shards
                families[family][layout_name].append(
                    [
                        [
                            s.name,
                            list(s.tensor.shape),
                            [[b.hf_name, b.hf_start, b.local_start, b.shape] for b in s.blocks],
                        ]
                        for s in shards
                    ]
                )
    (folder / "trainer.json").write_text(json.dumps(families))


def blocks(rows: list[list[Any]]) -> list[Block]:
    """From ``trainer.json``."""
    return [
        Block(name, tuple(hf_start), tuple(local_start), tuple(shape)) for name, hf_start, local_start, shape in rows
    ]


def vllm(folder: Path) -> None:
    """``vllm.pt``: by family and engine, of each worker, the ``layouts`` traced without memory, those traced ``live``,
    and the ``parameters`` after vLLM's own loaders read the checkpoint into NaNs."""
    from recipes.preflight import simulated_engines
    from rollout.weight_sync.vllm_layout import trace_layout, weight_tensors

    simulated_engines.activate()
    engines: dict[tuple[str, int, int], dict[str, list[Any]]] = {}
    for name, family in FAMILIES.items():
        checkpoint = load_file(folder / name / "model.safetensors")
        shapes = {name: tuple(tensor.shape) for name, tensor in checkpoint.items()}
        for tensor, pipeline in family.engines:
            config = simulated_engines.engine_config(folder / name, family.dtype, tensor, pipeline)
            workers: dict[str, list[Any]] = {
                "layouts": simulated_engines.trace(config, shapes),
                "live": [],
                "parameters": [],
            }
            for rank in range(tensor * pipeline):
                with simulated_engines.worker(config, rank, torch.device("cpu")) as model, torch.no_grad():
                    for parameter in weight_tensors(model).values():
                        parameter.fill_(float("nan"))
                    model.load_weights(iter(checkpoint.items()))  # type: ignore[operator]
                    workers["parameters"].append({n: t.detach().clone() for n, t in weight_tensors(model).items()})
                    workers["live"].append(trace_layout(model, shapes))
            engines[name, tensor, pipeline] = workers
    torch.save(engines, folder / "vllm.pt")


if __name__ == "__main__":
    {"trainer": trainer, "vllm": vllm}[sys.argv[1]](Path(sys.argv[2]))
