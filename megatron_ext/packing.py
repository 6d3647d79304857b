"""Packed (THD) micro-batches: which sequences go together, and their tensors.

The plan is a pure function of all sequence lengths, so every rank derives the same one: ranks cannot disagree on the
number of micro-batches, and a data-parallel rank may get any sequence without changing the update.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams

from megatron_ext.weight_map import round_up


@dataclass(frozen=True)
class VisionInputs:
    """Images and video clips of a prompt, in token order, as the model's processor makes them.

    ``pixels``: Qwen2.5-VL [patches, channels x frames x patch x patch]; InternVL3 [tiles, 3, height, width].
    ``grid``: Qwen2.5-VL [images, 3] (frames, rows, columns of patches); None for InternVL3.
    ``placeholders``: places, in the prompt, of the tokens that the vision tower's output rows replace, in order.
    ``positions``: mRoPE [3][prompt tokens], or None. Response tokens go on behind the greatest, alike on all three.
    """

    pixels: torch.Tensor
    grid: torch.Tensor | None
    placeholders: list[int]
    positions: list[list[int]] | None


@dataclass(frozen=True)
class PackedSequence:
    """One prompt and response. ``values`` holds per-response-token floats (advantages, log-probs, weights) by name."""

    prompt: list[int]
    response: list[int]
    values: dict[str, Sequence[float]] = field(default_factory=dict)
    vision: VisionInputs | None = None

    def __len__(self) -> int:
        return len(self.prompt) + len(self.response)

    def positions(self) -> list[list[int]]:
        """[3][tokens] for mRoPE: a text's three are the same."""
        if self.vision is None or self.vision.positions is None:
            return [list(range(len(self)))] * 3
        start = max(map(max, self.vision.positions)) + 1
        return [[*axis, *range(start, start + len(self.response))] for axis in self.vision.positions]


@dataclass(frozen=True)
class VisionBatch:
    """``rows`` [N] of the tower's output for ``pixels`` and ``grid`` replace this rank's tokens at ``places`` [N]."""

    pixels: torch.Tensor
    grid: torch.Tensor | None
    rows: torch.Tensor
    places: torch.Tensor


@dataclass
class MicroBatch:
    """Packed sequences. T tokens on this rank, R of its tokens predict a response token.

    ``tokens`` [1, T]. ``positions`` [3, 1, T x context ranks]: mRoPE's, of all context-parallel ranks. ``predict`` [R]
    indexes the token whose hidden state predicts a response token; ``targets`` [R] those tokens; ``values`` name → [R]
    FP32; ``lengths`` response tokens of each sequence on this rank; ``indices`` the place of each sequence in the whole
    batch; ``places`` [R] that of each token among the response tokens of the whole batch. Under context parallelism a
    rank's R tokens are a part of the sequences' response tokens, else all.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    packed: PackedSeqParams
    predict: torch.Tensor
    targets: torch.Tensor
    values: dict[str, torch.Tensor]
    lengths: list[int]
    indices: list[int]
    places: torch.Tensor
    vision: VisionBatch | None


def plan(lengths: Sequence[int], data_parallel: int, micro_batch_tokens: int, group: int = 1) -> list[list[list[int]]]:
    """rank → micro-batches → sequence indices: balanced, each at most ``micro_batch_tokens``, as many on every rank.

    Their number is a multiple of ``group``: the interleaved pipeline schedule wants one of the pipeline's stages.

    Longest first into the emptiest rank, then first-fit by length; a rank short of micro-batches splits its largest.
    Every rank gets as many sequences, or a rank could have fewer sequences than another has micro-batches.
    Raises ValueError when a sequence is longer than a micro-batch, the ranks do not divide the sequences or a rank has
    fewer sequences than micro-batches.
    """
    per_rank, rest = divmod(len(lengths), data_parallel)
    if per_rank == 0 or rest:
        raise ValueError(
            f"{len(lengths)} sequences for {data_parallel} data-parallel ranks: use a multiple of {data_parallel} "
            "(algorithm.prompts_per_step x algorithm.samples_per_prompt, stage.sft.rows_per_step)"
        )
    longest = max(lengths)
    if longest > micro_batch_tokens:
        raise ValueError(
            f"parallel.micro_batch_tokens={micro_batch_tokens} is below a sequence of {longest} tokens: raise it to "
            "the longest prompt plus response"
        )
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    ranks: list[list[int]] = [[] for _ in range(data_parallel)]
    load = [0] * data_parallel
    for i in order:
        rank = min((r for r in range(data_parallel) if len(ranks[r]) < per_rank), key=lambda r: (load[r], r))
        ranks[rank].append(i)
        load[rank] += lengths[i]
    micro = [_fit(indices, lengths, micro_batch_tokens) for indices in ranks]
    count = round_up(max(len(m) for m in micro), group)
    if count > per_rank:
        raise ValueError(
            f"{per_rank} sequences for each data-parallel rank, but parallel.virtual_pipeline needs a multiple of "
            f"parallel.pipeline={group} micro-batches, {count}: use more prompts a step or virtual_pipeline=1"
        )
    for batches in micro:
        while len(batches) < count:
            largest = max(range(len(batches)), key=lambda b: (len(batches[b]), -b))
            half = len(batches[largest]) // 2
            batches[largest : largest + 1] = [batches[largest][:half], batches[largest][half:]]
    return micro


def _fit(indices: list[int], lengths: Sequence[int], limit: int) -> list[list[int]]:
    batches: list[list[int]] = []
    room: list[int] = []
    for i in indices:
        b = next((b for b, free in enumerate(room) if free >= lengths[i]), None)
        if b is None:
            batches.append([i])
            room.append(limit - lengths[i])
        else:
            batches[b].append(i)
            room[b] -= lengths[i]
    return batches


def pack(
    sequences: Sequence[PackedSequence], indices: list[int], multiple: int, pad_token: int, device: Any,
    context: int = 1, context_rank: int = 0,
) -> MicroBatch:  # fmt: skip
    """Pack ``sequences[i] for i in indices``; a dummy sequence pads T to ``multiple``.

    Under context parallelism each sequence is padded to 2 x ``context`` slices of equal length, of which a rank has the
    ``context_rank``-th from either end: so causal attention costs every rank the same. Padding lies behind a sequence,
    where causal attention does not look.
    """
    chosen = [sequences[i] for i in indices]
    cuts = 2 * context if context > 1 else 1
    padded = [round_up(len(s), cuts) for s in chosen]
    if dummy := -sum(padded) % (multiple * cuts):
        padded.append(dummy)
    starts = list(accumulate(padded, initial=0))
    first = list(accumulate((len(s.response) for s in sequences), initial=0))
    tokens = [pad_token] * starts[-1]
    positions: list[list[int]] = [[], [], []]
    # By place in the whole pack: which response token it predicts, as (sequence in the pack, place in the response).
    predicts: dict[int, tuple[int, int]] = {}
    placeholders: list[int] = []
    for n, (s, start, size) in enumerate(zip(chosen, starts, padded, strict=False)):
        tokens[start : start + len(s)] = s.prompt + s.response
        predicts |= {start + len(s.prompt) - 1 + i: (n, i) for i in range(len(s.response))}
        for axis, values in zip(positions, s.positions(), strict=True):
            axis += [*values, *range(size - len(s))]
        if s.vision is not None:
            placeholders += [start + place for place in s.vision.placeholders]
    for axis in positions:
        axis += range(starts[-1] - len(axis))
    local = context_slices(starts, context, context_rank)
    mine = [(place, *predicts[at]) for place, at in enumerate(local) if at in predicts]
    cu_seqlens = torch.tensor(starts, dtype=torch.int32, device=device)
    return MicroBatch(
        tokens=torch.tensor([[tokens[at] for at in local]], device=device),
        positions=torch.tensor(positions, device=device).unsqueeze(1),
        packed=PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_kv=cu_seqlens,
            max_seqlen_q=max(padded),
            max_seqlen_kv=max(padded),
        ),
        predict=torch.tensor([place for place, _, _ in mine], dtype=torch.long, device=device),
        targets=torch.tensor([chosen[n].response[i] for _, n, i in mine], dtype=torch.long, device=device),
        values={
            name: torch.tensor([chosen[n].values[name][i] for _, n, i in mine], dtype=torch.float32, device=device)
            for name in chosen[0].values
        },
        lengths=[sum(n == m for _, m, _ in mine) for n in range(len(chosen))],
        indices=list(indices),
        places=torch.tensor([first[indices[n]] + i for _, n, i in mine], dtype=torch.long, device=device),
        vision=_pack_vision([s.vision for s in chosen if s.vision is not None], placeholders, local, device),
    )


def context_slices(starts: Sequence[int], context: int, rank: int) -> list[int]:
    """Places in the pack of a context-parallel rank's tokens; sequences begin at ``starts``, whose last is the end."""
    if context == 1:
        return list(range(starts[-1]))
    local: list[int] = []
    for start, end in pairwise(starts):
        size = (end - start) // (2 * context)
        for piece in (rank, 2 * context - 1 - rank):
            local += range(start + piece * size, start + (piece + 1) * size)
    return local


def _pack_vision(
    inputs: list[VisionInputs], placeholders: list[int], local: list[int], device: Any
) -> VisionBatch | None:
    if not inputs:
        return None
    row_at = {at: row for row, at in enumerate(placeholders)}
    here = [(row_at[at], place) for place, at in enumerate(local) if at in row_at]
    grids = [v.grid for v in inputs if v.grid is not None]
    return VisionBatch(
        pixels=torch.cat([v.pixels for v in inputs]).to(device),
        grid=torch.cat(grids).to(device) if grids else None,
        rows=torch.tensor([row for row, _ in here], dtype=torch.long, device=device),
        places=torch.tensor([place for _, place in here], dtype=torch.long, device=device),
    )
