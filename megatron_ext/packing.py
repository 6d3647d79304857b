"""Packed (THD) micro-batches: which sequences go together, and their tensors.

The plan is a pure function of all sequence lengths, so every rank derives the same one: ranks cannot disagree on the
number of micro-batches, and a data-parallel rank may get any sequence without changing the update.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams


@dataclass(frozen=True)
class PackedSequence:
    """One prompt and response. ``values`` holds per-response-token floats (advantages, log-probs, weights) by name."""

    prompt: list[int]
    response: list[int]
    values: dict[str, Sequence[float]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.prompt) + len(self.response)


@dataclass
class MicroBatch:
    """Packed sequences. T tokens in all (padded to the tensor-parallel size), R response tokens.

    ``tokens``, ``positions`` [1, T]; ``predict`` [R] indexes the token whose hidden state predicts a response token;
    ``targets`` [R] those tokens; ``values`` name → [R] FP32; ``lengths`` response tokens of each sequence;
    ``indices`` the place of each sequence in the whole batch.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    packed: PackedSeqParams
    predict: torch.Tensor
    targets: torch.Tensor
    values: dict[str, torch.Tensor]
    lengths: list[int]
    indices: list[int]


def plan(lengths: Sequence[int], data_parallel: int, micro_batch_tokens: int) -> list[list[list[int]]]:
    """rank → micro-batches → sequence indices: balanced, each at most ``micro_batch_tokens``, as many on every rank.

    Longest first into the emptiest rank, then first-fit by length; a rank short of micro-batches splits its largest.
    Every rank gets as many sequences, or a rank could have fewer sequences than another has micro-batches.
    Raises ValueError when a sequence is longer than a micro-batch or the ranks do not divide the sequences.
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
    count = max(len(m) for m in micro)
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
    sequences: Sequence[PackedSequence], indices: list[int], multiple: int, pad_token: int, device: Any
) -> MicroBatch:
    """Pack ``sequences[i] for i in indices``; a dummy sequence pads T to ``multiple`` (the tensor-parallel size)."""
    chosen = [sequences[i] for i in indices]
    tokens: list[int] = []
    starts = [0]
    predict: list[int] = []
    for s in chosen:
        first = len(tokens) + len(s.prompt) - 1
        predict.extend(range(first, first + len(s.response)))
        tokens += s.prompt + s.response
        starts.append(len(tokens))
    if padding := -len(tokens) % multiple:
        tokens += [pad_token] * padding
        starts.append(len(tokens))
    positions = [p for a, b in pairwise(starts) for p in range(b - a)]
    cu_seqlens = torch.tensor(starts, dtype=torch.int32, device=device)
    longest = max(b - a for a, b in pairwise(starts))
    names = chosen[0].values.keys()
    return MicroBatch(
        tokens=torch.tensor([tokens], device=device),
        positions=torch.tensor([positions], device=device),
        packed=PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_kv=cu_seqlens,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
        ),
        predict=torch.tensor(predict, device=device),
        targets=torch.tensor([t for s in chosen for t in s.response], device=device),
        values={n: torch.tensor([v for s in chosen for v in s.values[n]], device=device) for n in names},
        lengths=[len(s.response) for s in chosen],
        indices=list(indices),
    )
