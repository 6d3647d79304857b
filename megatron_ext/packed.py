"""The description of a pack for the layers: where its sequences are, each token's position, and shared prompts.

Responses that share their prompt's pass form one sequence with it:

    tokens      p0 p1 p2 | a0 a1 a2 a3 | b0 b1
    segments     0  0  0 |  1  1  1  1 |  2  2
    positions    0  1  2 |  3  4  5  6 |  3  4

A token attends to the tokens of its own segment and of the prompt that do not come after it. The positions of each
response continue from the prompt's end. So each response has the same hidden states as in a sequence of its own, and
the prompt's gradients are the sums over its responses. Loss and gradients are the same, from fewer tokens.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams

PROMPT = 0
# The number of keys, and of queries, in a block of scores. A block that is completely masked is skipped
# (``megatron_ext.flex``).
BLOCK = 128


@dataclass
class Pack(PackedSeqParams):
    """Megatron-Core's description of a pack, with positions and segments of its tokens.

    The sequence boundaries are those of the pack on all context-parallel ranks together.
    """

    # [T] int64: the positions of this rank's tokens, for rotary embeddings.
    positions: torch.Tensor = field(kw_only=True)
    # [T] int64: ``PROMPT``, or the number of the response within its sequence, from 1. None if prompts are not shared.
    segments: torch.Tensor | None = field(kw_only=True)


def sees(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Whether a token of segment ``queries`` attends to a token of segment ``keys`` that does not come after it."""
    return (keys == PROMPT) | (keys == queries)


class RotaryAtPositions(torch.nn.Module):
    """A GPTModel's rotary embedding, with the angles of each token of a pack.

    GPTModel calls :meth:`get_rotary_seq_len` with the pack, and directly after it asks for the angles of that length.
    So the angles of all tokens are looked up once for all layers. No layer has to know the boundaries of the sequences
    and of a context-parallel rank's slices.
    """

    def __init__(self, rotary: Any) -> None:
        super().__init__()
        self.rotary = rotary
        self.positions: torch.Tensor | None = None

    def get_rotary_seq_len(self, inference: Any, decoder: Any, decoder_input: Any, config: Any, packed: Pack) -> int:
        """The length of the longest sequence. Stores the positions of the pack for the next call of the module."""
        self.positions = packed.positions
        length: int = self.rotary.get_rotary_seq_len(inference, decoder, decoder_input, config, packed)
        return length

    def forward(self, length: int, **options: Any) -> torch.Tensor:
        """The rotary angles of the pack's tokens, [tokens, 1, 1, head_dim]."""
        angles: torch.Tensor = self.rotary(length, **options)
        return angles[self.positions]
