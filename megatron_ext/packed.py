"""What the layers know of a pack: where its sequences are, each token's position, and which prompts are shared.

Responses that share their prompt's pass are one sequence with it:

    tokens      p0 p1 p2 | a0 a1 a2 a3 | b0 b1
    segments     0  0  0 |  1  1  1  1 |  2  2
    positions    0  1  2 |  3  4  5  6 |  3  4

A token sees those of its own segment and of the prompt that do not come after it, and a response's positions go on from
the prompt's end. So each response has the hidden states that it has alone after its prompt, and the prompt's gradients
are the sums over its responses: the same loss and the same gradients from fewer tokens.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams

PROMPT = 0
# Keys, and queries, of a block of scores that is left out where all of it is hidden (``megatron_ext.flex``).
BLOCK = 128


@dataclass
class Pack(PackedSeqParams):
    """Megatron-Core's description of a pack, of all context-parallel ranks, with more of its tokens.

    ``positions`` [T] int64: of this rank's tokens, for rotary embeddings. ``segments`` [T] int64 where prompts are
    shared: ``PROMPT``, or the number of the response within its sequence, from 1.
    """

    positions: torch.Tensor = field(kw_only=True)
    segments: torch.Tensor | None = field(kw_only=True)


def sees(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Whether a token of segment ``queries`` sees one of segment ``keys`` that does not come after it."""
    return (keys == PROMPT) | (keys == queries)


class RotaryAtPositions(torch.nn.Module):
    """A GPTModel's rotary embedding, with one angle for each token of a pack.

    GPTModel asks for the length of the longest sequence, with the pack, and at once for the angles of that length. So
    they are gathered once for all layers, and no layer has to know where the sequences and a context-parallel rank's
    slices of them are.
    """

    def __init__(self, rotary: Any) -> None:
        super().__init__()
        self.rotary = rotary
        self.positions: torch.Tensor | None = None

    def get_rotary_seq_len(self, inference: Any, decoder: Any, decoder_input: Any, config: Any, packed: Pack) -> int:
        """Keeps the positions of the pack for the call that follows."""
        self.positions = packed.positions
        length: int = self.rotary.get_rotary_seq_len(inference, decoder, decoder_input, config, packed)
        return length

    def forward(self, length: int, **options: Any) -> torch.Tensor:
        """[tokens, 1, 1, head_dim]."""
        angles: torch.Tensor = self.rotary(length, **options)
        return angles[self.positions]
