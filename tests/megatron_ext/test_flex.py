"""A GPU's attention over packs with shared prompts: its mask is the text's, its numbers are those of torch's own."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import flex_attention as torchs

from megatron_ext import flex, model, platform
from recipes.preflight import memory
from tests.sequences import PlainSequence, pack
from tests.settings import parallel_config

ROOT = Path(__file__).resolve().parents[2]
HEADS, GROUPS, WIDTH = 6, 2, 8
ARRAYS = ("num_blocks", "indices")
# Tokens of each prompt and of its responses, and of the whole pack, which dummy sequences fill up.
PACKS = {
    "short": ([(5, [3, 4])], 16),
    "one block": ([(40, [20, 1, 30]), (10, [5])], 128),
    "several blocks": ([(300, [150, 20, 170]), (3, [1]), (200, [9, 8, 7])], 1024),
    "not whole blocks": ([(129, [128, 300]), (90, [70, 400])], 1150),
    "a response at the end": ([(2, [600, 3])], 605),
}


def packed(name: str) -> Any:
    return packed_as(*PACKS[name])


def packed_as(prompts: list[tuple[int, list[int]]], length: int) -> Any:
    sequences = []
    for number, (prompt_tokens, responses) in enumerate(prompts):
        prompt = [number] * prompt_tokens
        sequences += [PlainSequence(prompt, [9] * n, {"weight": [1.0] * n}) for n in responses]
    batch = pack(sequences, list(range(len(sequences))), length, 0, "cpu", shared_prompts=True)
    assert batch.tokens.shape == (1, length)
    return batch.packed


def visible(name: str) -> torch.Tensor:
    """[queries, keys], written token by token from the lengths."""
    prompts, length = PACKS[name]
    seen = torch.zeros(length, length, dtype=torch.bool)
    start = 0
    for prompt_tokens, responses in prompts:
        prompt_end = start + prompt_tokens
        for query in range(start, prompt_end):
            seen[query, start : query + 1] = True
        end = prompt_end
        for tokens in responses:
            for query in range(end, end + tokens):
                seen[query, start:prompt_end] = True
                seen[query, end : query + 1] = True
            end += tokens
        start = end
    dummies = range(start, length)
    longest = max(prompt_tokens + sum(responses) for prompt_tokens, responses in prompts)
    for query in dummies:
        first = query - (query - start) % longest
        seen[query, first : query + 1] = True
    return seen


@pytest.mark.parametrize("name", PACKS)
def test_the_block_mask_is_that_of_all_tokens_by_all_tokens(name: str) -> None:
    """Block by block what torch finds in the whole mask, and what its kernels compute within a block."""
    seen = visible(name)
    length = len(seen)
    mask = flex.block_mask(packed(name))
    assert torch.equal(torchs.create_mask(mask.mask_mod, 1, 1, length, length, "cpu")[0, 0], seen)
    expected = torchs.create_block_mask(lambda b, h, q, k: seen[q, k], None, None, length, length, "cpu")
    assert mask.seq_lengths == expected.seq_lengths and mask.BLOCK_SIZE == expected.BLOCK_SIZE
    for part in ("kv", "q", "full_kv", "full_q"):
        counts, wanted_counts = (getattr(m, f"{part}_num_blocks") for m in (mask, expected))
        assert torch.equal(counts, wanted_counts) and counts.dtype == wanted_counts.dtype
        numbers, wanted = (getattr(m, f"{part}_indices") for m in (mask, expected))
        assert torch.equal(numbers, wanted) and numbers.dtype == wanted.dtype


def draw(tokens: int) -> list[torch.Tensor]:
    """Query, key and value."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(tokens, heads, WIDTH) for heads in (HEADS, GROUPS, GROUPS)]
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("name", PACKS)
def test_attention_is_that_over_the_visible_keys(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs and gradients, with fewer key-value heads than heads. FlexAttention itself, not compiled: torch has a
    kernel with a backward pass for GPUs alone, and says so on a CPU."""
    monkeypatch.setattr(flex, "_attend", torchs.flex_attention)
    monkeypatch.setattr(torchs, "_validate_device", lambda *tensors: None)
    monkeypatch.setattr(torchs, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    seen = visible(name)
    inputs = draw(len(seen))
    weights = torch.randn(len(seen), HEADS * WIDTH, generator=torch.Generator().manual_seed(1))
    output = flex.attend(*inputs, packed(name), scale=0.3)
    by_head = [t.transpose(0, 1).unsqueeze(0) for t in inputs]
    attended = F.scaled_dot_product_attention(*by_head, attn_mask=seen, scale=0.3, enable_gqa=True)
    expected = attended[0].transpose(0, 1).flatten(1)
    torch.testing.assert_close(output, expected)
    gradients = torch.autograd.grad((output * weights).sum(), inputs)
    wanted = torch.autograd.grad((expected * weights).sum(), inputs)
    for gradient, wanted_gradient in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(gradient, wanted_gradient)


def test_packs_of_one_length_are_compiled_once_and_those_of_others_three_times_at_most() -> None:
    """In a process that may compile; torch compiles no part of it apart (``fullgraph``)."""
    command = [sys.executable, "-m", "tests.megatron_ext.compiled_attention"]
    environment = {name: value for name, value in os.environ.items() if name != "TORCH_COMPILE_DISABLE"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    graphs = json.loads(done.stdout)
    assert graphs["one length"] == [1, 1, 1]
    assert graphs["many lengths"][:2] == [1, 2] and graphs["many lengths"][-1] <= 3


@pytest.mark.parametrize(
    ("name", "setting", "context", "shares"),
    [("cpu", None, 1, True), ("cpu", None, 2, False), ("cuda", None, 1, False), ("cuda", True, 1, True)],
)
def test_a_gpu_shares_prompts_where_it_is_told_to(
    name: str, setting: bool | None, context: int, shares: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "_active", SimpleNamespace(name=name))
    assert model.shares_prompts(parallel_config(shared_prompts=setting, context=context)) == shares


def test_a_pack_has_one_block_mask() -> None:
    of_pack = packed("one block")
    assert flex.block_mask(of_pack) is flex.block_mask(of_pack)


@pytest.mark.parametrize("name", PACKS)
def test_the_estimate_is_what_a_block_mask_holds(name: str) -> None:
    of_pack = packed(name)
    mask = flex.block_mask(of_pack)
    held = [getattr(mask, f"{part}_{what}") for part in ("kv", "q", "full_kv", "full_q") for what in ARRAYS]
    tokens = len(of_pack.segments)
    shape = memory.Shape(tokens=tokens, predicting=tokens, sequences=1, longest=tokens)
    assert memory.block_mask(shape) == memory.storage_bytes([*held, flex.seen_until(of_pack)])
