"""The estimate is true: to the byte for weights, gradients and optimiser, within 5 % for what autograd keeps."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from recipes.preflight import memory
from tests import warm
from tests.megatron_ext.memory_cases import CASES, MemoryCase

ROOT = Path(__file__).resolve().parents[2]
SCALARS = 4 * 128  # torch's Adam counts the steps of each of the few parameters; the loop keeps a few numbers more
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
Measured = dict[str, dict[str, Any]]


def measured(kind: str, folder: Path) -> Measured:
    """Run ``memory_worker`` in a process of its own: a process that simulates ranks can do nothing else."""
    file = folder / f"{kind}.json"
    with warm.processes():
        completed = subprocess.run(
            [sys.executable, "-m", "tests.megatron_ext.memory_worker", kind, str(file)],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "TORCH_COMPILE_DISABLE": "1"},
            capture_output=True,
            text=True,
            timeout=600,
        )
    assert completed.returncode == 0, completed.stderr[-4000:]
    return json.loads(file.read_text())


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Measured:
    return measured("real", tmp_path_factory.mktemp("memory"))


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Measured:
    return measured("simulated", tmp_path_factory.mktemp("memory"))


@every_case
def test_weights_and_gradients_are_exact(case: MemoryCase, real: Measured) -> None:
    """All that building a model allocates, rotary frequencies apart."""
    here = real[case.name]
    formula = here["formula"]
    assert formula["weights"] + formula["gradients"] + formula["rotary"] == here["built"]


@every_case
def test_optimizer_states_are_exact(case: MemoryCase, real: Measured) -> None:
    here = real[case.name]
    assert 0 <= here["optimizer"] - here["formula"]["optimizer"] <= SCALARS
    assert here["formula"]["optimizer"] > 100 * SCALARS


@every_case
def test_building_without_memory_gives_the_same_sizes(case: MemoryCase, real: Measured, simulated: Measured) -> None:
    here, there = real[case.name], simulated[case.name]
    for name in ("weights", "gradients", "optimizer"):
        assert there["formula"][name] == here["formula"][name]
    assert there["fullest_optimizer"] == here["fullest_optimizer"]


@every_case
def test_activations_are_within_five_percent(case: MemoryCase, real: Measured) -> None:
    here = real[case.name]
    assert here["estimate"] == pytest.approx(here["saved"], rel=0.05)


@every_case
def test_what_a_micro_batch_holds_is_within_five_percent(case: MemoryCase, real: Measured) -> None:
    """Ids, positions, indices and columns; on ranks with a tower the images in its precision."""
    here = real[case.name]
    assert here["inputs_estimate"] == pytest.approx(here["inputs"], rel=0.05)


@pytest.mark.parametrize("name", ["qwen", "internvl"])
def test_what_a_trained_tower_keeps_is_within_five_percent(name: str, real: Measured) -> None:
    """Beyond the same model with a frozen tower: the language model's share would hide an error."""
    trained, frozen = real[name], real[f"{name}-frozen"]
    expected = trained["saved"] - frozen["saved"]
    assert expected > frozen["saved"] / 2
    assert trained["estimate"] - frozen["estimate"] == pytest.approx(expected, rel=0.05)


@every_case
def test_passes_in_flight_are_megatron_cores(case: MemoryCase, real: Measured) -> None:
    """64 micro-batches: the schedule's warm-up passes, and the one that is under way."""
    here = real[case.name]
    assert here["in_flight"] == here["warm_up"] + 1


@every_case
def test_sharing_prompts_keeps_a_block_mask_for_each_pass_in_flight_on_a_gpu(case: MemoryCase, real: Measured) -> None:
    """test_flex has what a block mask holds."""
    here = real[case.name]
    added = here["sharing_adds"]
    assert added["gpu"] == here["in_flight"] * added["block_mask"] > 0
    assert added["cpu"] == 0


def test_the_cases_differ(real: Measured) -> None:
    """Else the tests above would say little: recompute keeps less, sequence parallelism and context parallelism too."""
    saved = {name: here["saved"] for name, here in real.items()}
    assert saved["one-full"] < saved["one-selective"] < saved["one"] < saved["one-fp32"]
    assert saved["one-full"] < saved["one-two-layers"] < saved["one"]
    assert saved["one-both"] < min(saved["one-mlp"], saved["one-selective"]) and saved["one-mlp"] < saved["one"]
    assert saved["pp2-layers-first"] < saved["one"] / 2
    assert saved["tp2-sp"] < saved["tp2"] < saved["one"]
    assert saved["cp2"] < saved["one"]
    # Towers too: without, they keep more than half of what their language models keep.
    assert saved["qwen-full"] < saved["qwen"] / 6
    assert saved["internvl"] - saved["internvl-selective"] > saved["one"] - saved["one-selective"]
    states = {name: here["formula"] for name, here in real.items()}
    assert states["dp2-first"]["optimizer"] != states["dp2-last"]["optimizer"]
    assert real["dp2-last"]["fullest_optimizer"] == states["dp2-first"]["optimizer"] > states["dp2-last"]["optimizer"]
    assert states["one-whole-optimizer"]["weights"] < states["one"]["weights"]  # no padded buffer


def test_activations_of_cuda_are_the_published_formula() -> None:
    """Korthikanti et al., section 4.2: a GPT layer under tensor and sequence parallelism keeps s b h / t times 34
    bytes, without the attention's scores. Ours has no dropout masks, which are 2 of them, and a scale for each norm's
    row and each head's softmax, which the paper leaves out.
    """
    hidden, ffn, heads, tokens, tensor = 1024, 4096, 16, 512, 2
    config = type("Config", (), {
        "tensor_model_parallel_size": tensor, "sequence_parallel": True, "params_dtype": torch.bfloat16,
        "hidden_size": hidden, "ffn_hidden_size": ffn, "num_attention_heads": heads, "num_query_groups": heads,
        "kv_channels": hidden // heads, "recompute_granularity": None, "qk_layernorm": False, "fp8": None,
        "gated_linear_unit": False, "normalization": "RMSNorm",
    })()  # fmt: skip
    published = tokens * hidden // tensor * (34 - 2)
    scales = 2 * 4 * tokens // tensor + 4 * tokens * heads // tensor
    assert memory.layer(config, memory.Shape(tokens, tokens, 1, tokens), fused_kernels=True) == published + scales


def test_key_value_cache_per_token() -> None:
    """Llama 70B, by hand: 80 layers x key and value x 128 x 2 bytes, one of 8 heads on each of 8 ranks; on 16 ranks
    vLLM repeats them."""
    text = LlamaConfig(num_hidden_layers=80, hidden_size=8192, num_attention_heads=64, num_key_value_heads=8)
    assert memory.kv_bytes_per_token(text, 1) == 8 * 40960
    assert memory.kv_bytes_per_token(text, 8) == memory.kv_bytes_per_token(text, 16) == 40960


def test_a_step_that_verifies_drafts_has_more_logits() -> None:
    """Of 8 sequences with 4 draft tokens each, five FP32 tensors in place of two of one token each."""
    text = LlamaConfig(num_hidden_layers=2, hidden_size=64, vocab_size=1000)
    plain, speculative = (memory.engine(text, 0, 1, 0, 8, step_tokens=tokens) for tokens in (1, 5))
    assert (plain, speculative) == (8 * 1000 * 2 * 4, 8 * 5 * 1000 * 5 * 4)


def test_fp8_halves_an_engines_matrices_and_needs_room_to_quantise_a_layer() -> None:
    """Against transformers' model: embeddings, norms and the output layer stay in BF16."""
    text = LlamaConfig(
        num_hidden_layers=6, hidden_size=64, intermediate_size=160, num_attention_heads=4, num_key_value_heads=2
    )
    with torch.device("meta"):
        network = LlamaForCausalLM(text)
    in_fp8 = [
        sum(module.weight.numel() for module in layer.modules() if isinstance(module, torch.nn.Linear))
        for layer in network.model.layers
    ]
    parameters = network.num_parameters()
    saved = memory.engine(text, parameters, 2, 1, 1) - memory.engine(text, parameters, 2, 1, 1, fp8=True)
    assert saved == (sum(in_fp8) - (2 + 1) * in_fp8[0]) // 2
