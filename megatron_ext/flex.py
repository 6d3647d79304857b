"""Attention over a pack with shared prompts, by torch's FlexAttention (arXiv 2412.05496).

The queries that see a key are a range which begins at the key: it ends with the sequence for a key of the prompt, and
with the response for a key of a response. So one number for each key is the whole mask, and the blocks of scores that
are needed follow from the least and the greatest of each block of keys, without a mask of all tokens by all tokens.
"""

from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from megatron_ext.packed import BLOCK, PROMPT, Pack

# How torch compiles it. Without ``fullgraph``, what can't be compiled would compute all scores of a pack, which is too
# slow to be of use. With torch's own choice of ``dynamic``, packs of one length have one kernel; where lengths differ,
# one serves all from the second or third length on, but for packs of a single block. Passes with and without gradients
# have kernels of their own, and so have other numbers of heads. That is more than torch's limit of 8 where there is a
# critic.
COMPILING = {"fullgraph": True, "recompile_limit": 64}
_attend = torch.compile(flex_attention, **COMPILING)  # type: ignore[call-overload]


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packed: Pack, scale: float) -> torch.Tensor:
    """Query [tokens, heads, head_dim], key and value [tokens, groups, head_dim] → [tokens, heads x head_dim].

    torch raises NotImplementedError on a GPU for a head_dim below 16.
    """
    q, k, v = (rows.transpose(0, 1).unsqueeze(0) for rows in (query, key, value))
    output: torch.Tensor = _attend(q, k, v, block_mask=block_mask(packed), scale=scale, enable_gqa=True)
    return output.squeeze(0).transpose(0, 1).reshape(len(query), -1)


def block_mask(packed: Any) -> BlockMask:
    """The blocks of a pack, computed once per micro-batch on its device and kept in ``packed``. The host waits for
    nothing."""
    cached: BlockMask | None = getattr(packed, "block_mask", None)
    if cached is None:
        cached = packed.block_mask = _block_mask(seen_until(packed))
    return cached


def seen_until(packed: Pack) -> torch.Tensor:
    """[tokens] int32: the place after the last query that sees a key."""
    segments = packed.segments
    assert segments is not None
    tokens = len(segments)
    places = torch.arange(tokens, dtype=torch.int32, device=segments.device)
    starts = packed.cu_seqlens_q
    sequence_ends = starts[torch.searchsorted(starts, places, right=True)]
    # The next place where a segment ends, from the back; a sequence ends with a segment, because prompts have tokens.
    ends = torch.full_like(places, tokens)
    ends[:-1] = torch.where(segments[1:] != segments[:-1], places[1:], tokens)
    segment_ends = ends.flip(0).cummin(0).values.flip(0)
    return torch.where(segments == PROMPT, sequence_ends, segment_ends)


def _block_mask(until: torch.Tensor) -> BlockMask:
    """``until`` as ``seen_until`` has it."""

    def sees(batch: Any, head: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return (key <= query) & (query < until[key])

    tokens = len(until)
    blocks = -(-tokens // BLOCK)
    missing = blocks * BLOCK - tokens
    # What is missing in the last block of keys changes none of its answers: no block of queries comes after it.
    by_block = torch.nn.functional.pad(until, (0, missing), value=0).view(blocks, BLOCK)
    starts = torch.arange(0, blocks * BLOCK, BLOCK, device=until.device).unsqueeze(1)
    is_later = starts > starts.T
    full = is_later & (by_block.amin(1) >= starts + BLOCK)
    on_diagonal = starts == starts.T
    partial = (is_later & (by_block.amax(1) > starts) | on_diagonal) & ~full
    return BlockMask.from_kv_blocks(
        *_ordered(partial), *_ordered(full), BLOCK_SIZE=BLOCK, mask_mod=sees, seq_lengths=(tokens, tokens)
    )


def _ordered(needed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each block of queries [blocks of queries, blocks of keys] the number of blocks of keys that are needed, and
    their numbers, before those of the others; int32, with dimensions for batch and head."""
    counts = needed.sum(1, dtype=torch.int32)
    numbers = needed.int().argsort(dim=1, descending=True, stable=True).int()
    return counts[None, None], numbers[None, None]
