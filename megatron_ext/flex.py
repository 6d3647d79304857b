"""Attention over a pack with shared prompts, by torch's FlexAttention (arXiv 2412.05496).

The queries that see a key are a range that begins at the key. For a key of the prompt the range ends with the sequence.
For a key of a response it ends with the response. So the mask is described by one number for each key, the end of its
range. The blocks of scores that are needed follow from the least and the greatest number in each block of keys. No mask
of all tokens by all tokens is built.
"""

from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from megatron_ext.packed import BLOCK, PROMPT, Pack

# Options of torch.compile for FlexAttention. Without ``fullgraph``, code that can't be compiled would compute all
# scores of a pack, which is too slow to be of use.
# With torch's default for ``dynamic``, packs of one length have one kernel. Where lengths differ, one kernel serves all
# lengths from the second or third length on, except packs of a single block. Passes with and without gradients have
# separate kernels, and so have different numbers of heads. With a critic that is more than torch's limit of 8.
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
    """The block mask of a pack. It is computed once per micro-batch on the pack's device and cached in ``packed``.

    The host does not wait for the device.
    """
    cached: BlockMask | None = getattr(packed, "block_mask", None)
    if cached is None:
        cached = packed.block_mask = _block_mask(seen_until(packed))
    return cached


def seen_until(packed: Pack) -> torch.Tensor:
    """[tokens] int32: for each key, the place after the last query that sees it."""
    segments = packed.segments
    assert segments is not None
    tokens = len(segments)
    places = torch.arange(tokens, dtype=torch.int32, device=segments.device)
    starts = packed.cu_seqlens_q
    sequence_ends = starts[torch.searchsorted(starts, places, right=True)]
    # The next place where a segment ends, computed from the back. The end of a sequence is also the end of a segment,
    # because the next sequence begins with prompt tokens.
    ends = torch.full_like(places, tokens)
    ends[:-1] = torch.where(segments[1:] != segments[:-1], places[1:], tokens)
    segment_ends = ends.flip(0).cummin(0).values.flip(0)
    return torch.where(segments == PROMPT, sequence_ends, segment_ends)


def _block_mask(until: torch.Tensor) -> BlockMask:
    """The block mask for ``until``, the result of ``seen_until``."""

    def sees(batch: Any, head: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return (key <= query) & (query < until[key])

    tokens = len(until)
    blocks = -(-tokens // BLOCK)
    missing = blocks * BLOCK - tokens
    # The padding of the last block of keys does not change the result, because no block of queries comes after it.
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
    """Convert ``needed`` [blocks of queries, blocks of keys] to the arguments of ``BlockMask.from_kv_blocks``.

    Returns, for each block of queries, the number of needed blocks of keys, and the indices of all blocks of keys with
    the needed ones first. Both are int32 and have leading dimensions for batch and head.
    """
    counts = needed.sum(1, dtype=torch.int32)
    numbers = needed.int().argsort(dim=1, descending=True, stable=True).int()
    return counts[None, None], numbers[None, None]
