"""Packed (THD) micro-batches: which sequences go together, and their tensors.

The plan is a pure function of all sequence lengths, so every rank derives the same one: ranks cannot disagree on the number
of micro-batches, and a data-parallel rank may get any sequence without changing the update.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
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
    Raises ValueError when a sequence is longer than a micro-batch or there are fewer sequences than ranks.
    """
    if len(lengths) < data_parallel:
        raise ValueError(
            f"{len(lengths)} sequences for {data_parallel} data-parallel ranks: raise algorithm.prompts_per_step"
        )
    longest = max(lengths)
    if longest > micro_batch_tokens:
        raise ValueError(
            f"parallel.micro_batch_tokens={micro_batch_tokens} is below a sequence of {longest} tokens: raise it to the "
            "longest prompt plus response"
        )
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    ranks: list[list[int]] = [[] for _ in range(data_parallel)]
    load = [0] * data_parallel
    for i in order:
        rank = min(range(data_parallel), key=lambda r: (load[r], len(ranks[r]), r))
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
    positions = [p for a, b in zip(starts, starts[1:], strict=False) for p in range(b - a)]
    cu_seqlens = torch.tensor(starts, dtype=torch.int32, device=device)
    longest = max(b - a for a, b in zip(starts, starts[1:], strict=False))
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
