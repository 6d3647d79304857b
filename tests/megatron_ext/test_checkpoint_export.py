"""A checkpoint becomes the Hugging Face folder that the ranks export, whatever their layout, in little memory."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from megatron_ext import checkpoint_export, hf_checkpoint, shard_files
from megatron_ext.checkpoint import COMPLETE, MANIFEST, CheckpointError, latest
from megatron_ext.precision import DTYPES
from megatron_ext.scalar_head import REWARD, Head
from megatron_ext.shard_files import TensorPart
from tests.megatron_ext import cases, vl_twins
from tests.megatron_ext.cases import Case
from tests.megatron_ext.ranks import ROOT, Ranks, RanksOf

# What an export may take beside the program itself (docs/stages.md).
BOUND_BYTES = 128 << 20


def export(checkpoint: Path, source: Path, target: Path, precision: str = "fp32", head: Head | None = None) -> None:
    layout = hf_checkpoint.export_layout(source, getattr(torch, DTYPES[precision]), head)
    target.mkdir()
    checkpoint_export.export(checkpoint, layout, target)


@pytest.mark.parametrize("case", [*cases.RESUMES, *vl_twins.RESUMES], ids=lambda case: case.name)
def test_every_byte_is_that_of_the_ranks_export(case: Case, ranks_of: RanksOf, tmp_path: Path) -> None:
    """The checkpoint was saved and the ranks exported at the same moment, after updates."""
    folder = ranks_of(case).after(f"resume-{case.name}")
    checkpoint = latest(folder / "checkpoints" / case.name)
    assert checkpoint is not None
    export(checkpoint, folder / case.twin, tmp_path / "hf", case.precision, REWARD if case.is_scalar else None)
    expected = {path.name: path.read_bytes() for path in (folder / "exports" / f"resume-{case.name}").iterdir()}
    exported = {path.name: path.read_bytes() for path in (tmp_path / "hf").iterdir()}
    assert {name: len(content) for name, content in exported.items()} == {n: len(c) for n, c in expected.items()}
    assert [name for name in expected if exported[name] != expected[name]] == []


def make(folder: Path, vocab: int, ffn: int) -> int:
    """Write ``source``, a Hugging Face folder without values, and ``checkpoint``, one of two tensor-parallel ranks of
    that model in BF16. Returns the bytes of its tensors."""
    source, checkpoint = folder / "source", folder / "checkpoint"
    for subfolder in (source, checkpoint):
        subfolder.mkdir(parents=True)
    hidden, layers = 2048, 2
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "vocab_size": vocab,
        "tie_word_embeddings": True,
    }
    (source / "config.json").write_text(json.dumps(config))
    hf: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    megatron: dict[str, tuple[int, ...]] = {"embedding.word_embeddings.weight": (vocab, hidden)}
    for n in range(layers):
        hf |= {f"model.layers.{n}.mlp.{name}_proj.weight": (ffn, hidden) for name in ("gate", "up")}
        hf[f"model.layers.{n}.mlp.down_proj.weight"] = (hidden, ffn)
        megatron[f"decoder.layers.{n}.mlp.linear_fc1.weight"] = (2 * ffn, hidden)
        megatron[f"decoder.layers.{n}.mlp.linear_fc2.weight"] = (hidden, ffn)
    header: dict[str, Any] = {}
    end = 0
    for name, shape in hf.items():
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + 2 * shape[0] * shape[1]]}
        end = header[name]["data_offsets"][1]
    hf_checkpoint._create(source / "model.safetensors", header)
    entries = []
    for rank in range(2):
        parts = []
        for name, (rows, columns) in megatron.items():
            by_columns = name.endswith("linear_fc2.weight")  # row-parallel: each rank has half of the columns
            shape = (rows, columns // 2) if by_columns else (rows // 2, columns)
            start = (0, rank * columns // 2) if by_columns else (rank * rows // 2, 0)
            parts.append(TensorPart(f"policy/{name}", (rows, columns), start, values(start, shape)))
        entries.append(shard_files.write(checkpoint / f"rank_{rank:05d}.safetensors", parts))
    shard_files.write_json(
        checkpoint / COMPLETE, shard_files.write_json(checkpoint / MANIFEST, shard_files.manifest(entries))
    )
    return end


def values(start: tuple[int, ...], shape: tuple[int, ...]) -> torch.Tensor:
    """Small integers that differ by row and column."""
    rows = torch.arange(start[0], start[0] + shape[0], dtype=torch.int32)[:, None]
    columns = torch.arange(start[1], start[1] + shape[1], dtype=torch.int32)
    return ((7 * rows + 3 * columns) % 251).to(torch.bfloat16)


MEASURE = """
import sys
from pathlib import Path
from tests.megatron_ext.test_checkpoint_export import export

def peak():
    (line,) = [line for line in open("/proc/self/status") if line.startswith("VmHWM:")]
    return int(line.split()[1]) << 10

small, large = map(Path, sys.argv[1:])
export(small / "checkpoint", small / "source", small / "hf", "bf16")
before = peak()
export(large / "checkpoint", large / "source", large / "hf", "bf16")
print(peak() - before)
"""


def test_the_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """The peak of a process that exports a large model, above that of its export of a small one."""
    small, large = tmp_path / "small", tmp_path / "large"
    assert make(small, 16, 16) < BOUND_BYTES / 100
    assert make(large, 16384, 20480) > 4 * BOUND_BYTES
    printed = subprocess.run(
        [sys.executable, "-c", MEASURE, str(small), str(large)], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert int(printed.stdout) < BOUND_BYTES
    with safe_open(large / "hf" / "model.safetensors", framework="pt") as exported:
        up, down = exported.get_slice("model.layers.1.mlp.up_proj.weight"), "model.layers.0.mlp.down_proj.weight"
        # Up projections are the second half of Megatron's tensor.
        assert torch.equal(up[20000:20010], values((20480 + 20000, 0), (10, 2048)))
        assert torch.equal(exported.get_slice(down)[2000:], values((2000, 0), (48, 20480)))


def test_a_damaged_file_and_another_model_are_refused(launched: Ranks, tmp_path: Path) -> None:
    folder = launched.after(f"resume-{cases.TP2_SP_DP2.name}")
    saved = latest(folder / "checkpoints" / cases.TP2_SP_DP2.name)
    assert saved is not None
    # 132 tokens are 130 and padding, but the tied model has one tensor for embedding and head.
    with pytest.raises(CheckpointError, match=r"are both model\.embed_tokens\.weight in .*tied"):
        export(saved, folder / "tied", tmp_path / "tied")
    with pytest.raises(CheckpointError, match=r"has nothing of model\.layers\.0\.self_attn\.k_proj\.bias, "):
        export(saved, folder / "qwen2", tmp_path / "qwen2")
    copy = tmp_path / saved.name
    shutil.copytree(saved, copy)
    with (copy / "rank_00001.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        last = file.read()
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 4]))
    with pytest.raises(CheckpointError, match=r"is damaged: rank_00001\.safetensors has the checksum"):
        export(copy, folder / "untied", tmp_path / "damaged")
    assert list((tmp_path / "damaged").iterdir()) == []
