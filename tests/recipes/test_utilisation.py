"""Tokens per second, MFU and memory: closed forms, and the operations that a real forward and backward pass does."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_ext.platform import features
from recipes.run import utilisation
from recipes.training.flops import training_flops
from tests.sequences import PlainSequence, token_batch

ROOT = Path(__file__).resolve().parents[2]
GIB = 2**30
LLAMA = LlamaConfig(
    architectures=["LlamaForCausalLM"],
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=160,
    tie_word_embeddings=False,
    attn_implementation="eager",
)
TOKENS = 24


def test_the_flops_of_an_update_are_those_of_the_pass() -> None:
    """torch counts the matrix products of transformers' model: in linear layers all, in attention the complete square,
    of which a causal kernel does half, and its backward pass 2.5 times the forward pass instead of twice."""
    model = LlamaForCausalLM(LLAMA)
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, TOKENS, dtype=torch.long)).logits.sum().backward()
    counted = {str(operation): flops for operation, flops in counter.get_flop_counts()["Global"].items()}
    linear, attention = counted["aten.mm"], counted["aten.bmm"]

    policy: Any = SimpleNamespace(hf_config=LLAMA, is_scalar=False)
    all_are_responses = token_batch([PlainSequence([], [1] * TOKENS)])
    assert training_flops(policy, all_are_responses) == linear + attention / 6 * 3.5

    output_layer = 3 * 2 * LLAMA.vocab_size * LLAMA.hidden_size
    with_prompt = token_batch([PlainSequence([1] * 10, [1] * (TOKENS - 10))])
    assert training_flops(policy, with_prompt) == training_flops(policy, all_are_responses) - 10 * output_layer
    critic: Any = SimpleNamespace(hf_config=LLAMA, is_scalar=True)
    assert training_flops(critic, with_prompt) == training_flops(policy, all_are_responses) - TOKENS * output_layer
    two = token_batch([PlainSequence([], [1] * TOKENS)] * 2)
    assert training_flops(policy, two) == 2 * training_flops(policy, all_are_responses)


def test_throughput_is_of_the_step_and_all_processes_and_mfu_of_its_training_phase_and_ranks() -> None:
    seconds = {"generate": 6.0, "train": 4.0}
    metrics = utilisation.throughput(tokens=800, flops=8e12, seconds=seconds, ranks=4, processes=8, peak_flops=1e12)
    assert metrics == {"throughput/tokens_per_second_per_rank": 10.0, "throughput/mfu": 0.5}


def test_nothing_is_made_up_where_the_peak_is_not_known_or_nothing_was_counted() -> None:
    seconds = {"train": 4.0}
    unknown = utilisation.throughput(tokens=800, flops=8e12, seconds=seconds, ranks=1, processes=1, peak_flops=None)
    assert list(unknown) == ["throughput/tokens_per_second_per_rank"]
    assert utilisation.throughput(0, 0, seconds, ranks=1, processes=1, peak_flops=1e12) == {}


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA B200", 2250),
        ("NVIDIA H20", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_the_peak_is_that_of_the_device_s_data_sheet(name: str, tera: float | None) -> None:
    assert features.peak_flops(name) == (None if tera is None else tera * 1e12)


def test_the_simulated_h100_has_the_same_peak() -> None:
    scale = OmegaConf.load(ROOT / "conf" / "scale" / "h100.yaml")
    assert scale.machine.peak_tflops * 1e12 == features.peak_flops("NVIDIA H100 80GB HBM3")


MEMINFO = "MemTotal:       2113534976 kB\nMemFree:        1900000000 kB\nMemAvailable:   2000000000 kB\n"


def test_memory_is_that_of_the_fullest_rank_and_node() -> None:
    used = utilisation.used_memory(MEMINFO)
    assert used == (2113534976 - 2000000000) * 1024
    on_gpus = utilisation.memory([(70 * GIB, 3 * GIB, used), (71 * GIB, 2 * GIB, used - GIB)])
    assert on_gpus == {"memory/device_peak_gib": 71, "memory/rank_peak_gib": 3, "memory/node_gib": used / GIB}
    assert "memory/device_peak_gib" not in utilisation.memory([(None, GIB, GIB)])
