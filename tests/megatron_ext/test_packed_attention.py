"""The CPU platform's attention over packs: a block at a time as at once, and both as torch's own for each sequence."""

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from megatron.core.transformer.enums import AttnMaskType

from megatron_ext.packing import context_slices
from megatron_ext.platform import cpu

STARTS = [0, 16, 24, 80, 96]
HEADS, GROUPS, WIDTH = 6, 2, 8


def by_sequence(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, is_causal: bool) -> torch.Tensor:
    """torch's attention, one sequence at a time."""
    outputs = []
    for start, end in pairwise(STARTS):
        q, k, v = (t[start:end].transpose(0, 1).unsqueeze(0) for t in (query, key, value))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, enable_gqa=True)
        outputs.append(attended[0].transpose(0, 1))
    return torch.cat(outputs)


@pytest.mark.parametrize("context", [1, 2, 4])
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("at_once", [True, False])
def test_packed_attention_is_that_of_each_sequence(
    context: int, is_causal: bool, at_once: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outputs, and gradients summed over the context-parallel ranks. The blocks have one to five queries."""
    if not at_once:
        monkeypatch.setattr(cpu, "_MOST_SCORES", 0)
        monkeypatch.setattr(cpu, "_BLOCK_SCORES", 240)
    generator = torch.Generator().manual_seed(context)
    shapes = [(STARTS[-1], heads, WIDTH) for heads in (HEADS, GROUPS, GROUPS, HEADS)]
    query, key, value, weights = (torch.randn(shape, generator=generator) for shape in shapes)
    inputs = [t.requires_grad_() for t in (query, key, value)]
    expected = by_sequence(query, key, value, is_causal)
    expected_gradients = torch.autograd.grad((expected * weights).sum(), inputs)

    config = SimpleNamespace(context_parallel_size=context, kv_channels=WIDTH)
    attention = cpu.PackedAttention(config)
    mask = AttnMaskType.causal if is_causal else AttnMaskType.no_mask
    of_ranks = [torch.from_numpy(context_slices(STARTS, context, rank)) for rank in range(context)]
    gathered = torch.cat(of_ranks)  # as the ranks' keys and values come, one rank after another
    monkeypatch.setattr(cpu, "_gather_context", lambda whole: whole)
    gradients = [torch.zeros_like(t) for t in inputs]
    for rank, rows in enumerate(of_ranks):
        monkeypatch.setattr(cpu, "_context_rank", lambda rank=rank: rank)
        packed = SimpleNamespace(cu_seqlens_q=torch.tensor(STARTS, dtype=torch.int32))
        output = attention(query[rows], key[gathered], value[gathered], None, mask, packed_seq_params=packed)
        torch.testing.assert_close(output, expected[rows])
        of_rank = torch.autograd.grad((output * weights[rows]).sum(), inputs)
        gradients = [sum_so_far + part for sum_so_far, part in zip(gradients, of_rank, strict=True)]
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, wanted)
