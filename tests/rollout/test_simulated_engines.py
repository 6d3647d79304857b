"""vLLM's layouts of whole models without memory; those of tiny ones are compared in test_reshard_grid.py."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

from recipes.preflight.simulated_engines import layouts
from rollout.weight_sync.layout import LayoutError

ROOT = Path(__file__).resolve().parents[2]
CONFIG = json.loads((ROOT / "conf/model/architectures/DeepSeek-R1-Distill-Llama-70B.json").read_text())
TENSOR = 8


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """A Llama checkpoint's tensors, written down."""
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    heads, groups = (config[f"num_{kind}_heads"] * config["head_dim"] for kind in ("attention", "key_value"))
    tensor_shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocab, hidden),
        "lm_head.weight": (vocab, hidden),
    }
    for n in range(config["num_hidden_layers"]):
        layer = f"model.layers.{n}."
        tensor_shapes |= {
            f"{layer}{norm}.weight": (hidden,) for norm in ("input_layernorm", "post_attention_layernorm")
        }
        tensor_shapes |= {f"{layer}self_attn.{p}_proj.weight": (groups, hidden) for p in "kv"}
        tensor_shapes |= {f"{layer}mlp.{p}_proj.weight": (inner, hidden) for p in ("gate", "up")}
        tensor_shapes |= {
            f"{layer}self_attn.q_proj.weight": (heads, hidden),
            f"{layer}self_attn.o_proj.weight": (hidden, heads),
        }
        tensor_shapes[f"{layer}mlp.down_proj.weight"] = (hidden, inner)
    return tensor_shapes | {"model.norm.weight": (hidden,)}


def python(file: Path, *lines: str) -> str:
    """A program in Python's place."""
    file.write_text("\n".join(["#!/bin/sh", *lines]))
    file.chmod(0o755)
    return str(file)


def test_70_billion_parameters_at_tp_8_need_little_memory_and_are_where_vllm_cuts_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In 8 GiB of data; one rank's weights are 16 GiB."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    small = python(tmp_path / "small", f"ulimit -d {8 * 2**20}", f'exec {sys.executable} "$@"')
    monkeypatch.setattr(sys, "executable", small)
    workers = layouts(tmp_path, "bfloat16", TENSOR, 1, shapes(CONFIG))
    assert len(workers) == TENSOR
    taken: dict[str, int] = {}
    for n, worker in enumerate(workers):
        by_name = {layout.name: layout for layout in worker}
        fused = by_name["model.layers.79.self_attn.qkv_proj.weight"]
        parts = {part.hf_name.split(".")[-2]: (part.start[0], part.hf_start[0], part.shape) for part in fused.regions}
        assert fused.shape == (1280, 8192) and fused.dtype == "bfloat16"
        assert parts == {
            "q_proj": (0, 1024 * n, (1024, 8192)),
            "k_proj": (1024, 128 * n, (128, 8192)),
            "v_proj": (1152, 128 * n, (128, 8192)),
        }
        (down,) = by_name["model.layers.0.mlp.down_proj.weight"].regions
        assert (down.start, down.hf_start, down.shape) == ((0, 0), (0, 3584 * n), (8192, 3584))
        for part in (part for layout in worker for part in layout.regions):
            taken[part.hf_name] = taken.get(part.hf_name, 0) + math.prod(part.shape)
    expected = shapes(CONFIG)
    assert taken == {n: math.prod(s) * (TENSOR if len(s) == 1 else 1) for n, s in expected.items()}  # norms on all


def test_what_vllm_says_when_it_refuses_a_layout_is_in_the_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", python(tmp_path / "broken", "echo 64 heads and 7 ranks >&2", "exit 1"))
    with pytest.raises(LayoutError, match="in vLLM at TP 7, PP 1: …64 heads and 7 ranks"):
        layouts(tmp_path, "bfloat16", 7, 1, {})
