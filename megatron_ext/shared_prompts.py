"""Responses to one prompt share its pass: a packed sequence is a prompt and all its responses.

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


@dataclass
class SharedPromptParams(PackedSeqParams):
    """Megatron-Core's description of a pack, with what a shared prompt needs.

    ``segments`` [T] int64: ``PROMPT``, or the number of the response within its sequence, from 1. ``positions`` [T]
    int64: of each token, for rotary embeddings.
    """

    segments: torch.Tensor = field(kw_only=True)
    positions: torch.Tensor = field(kw_only=True)


def sees(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Whether a token of segment ``queries`` sees one of segment ``keys`` that does not come after it."""
    return (keys == PROMPT) | (keys == queries)


class RotaryAtPositions(torch.nn.Module):
    """A GPTModel's rotary embedding, with an angle for each token of a pack whose prompts are shared.

    GPTModel asks for the length of the longest sequence, with the pack, and at once for the angles of that length. The
    platforms' rotary kernels take as many angles as there are tokens as one for each token.
    """

    def __init__(self, rotary: Any) -> None:
        super().__init__()
        self.rotary = rotary
        self.positions: torch.Tensor | None = None

    def get_rotary_seq_len(
        self, inference: Any, decoder: Any, decoder_input: Any, config: Any, packed: PackedSeqParams
    ) -> int:
        """Keeps the positions of the pack for the call that follows."""
        self.positions = packed.positions if isinstance(packed, SharedPromptParams) else None
        length: int = self.rotary.get_rotary_seq_len(inference, decoder, decoder_input, config, packed)
        return length

    def forward(self, length: int, **options: Any) -> torch.Tensor:
        """[tokens, 1, 1, head_dim] of a pack with shared prompts, else [length, 1, 1, head_dim]."""
        angles: torch.Tensor = self.rotary(length, **options)
        return angles if self.positions is None else angles[self.positions]
