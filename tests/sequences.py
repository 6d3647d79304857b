"""Prompts and responses as plain lists, for tests that compare a ``TokenBatch`` with them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megatron_ext import batch as batches
from megatron_ext import packing
from megatron_ext.batch import Prompt, TokenBatch


@dataclass(frozen=True)
class PlainSequence:
    """``values``: columns of the response's tokens by name."""

    prompt: list[int]
    response: list[int]
    values: Mapping[str, Sequence[float]] = field(default_factory=dict)
    vision: Any = None

    def __len__(self) -> int:
        return len(self.prompt) + len(self.response)


def token_batch(sequences: Sequence[PlainSequence], shared_prompts: bool = False) -> TokenBatch:
    """Each sequence as the one response to a prompt of its own; with ``shared_prompts`` those with the same list of
    tokens as their prompt are responses to one."""
    prompts = list(sequences)
    if shared_prompts:
        prompts = list({id(s.prompt): s for s in sequences}.values())
    prompt_of = {id(s.prompt): n for n, s in enumerate(prompts)}
    batch = batches.build(
        [Prompt(f"p{i}", np.array(s.prompt, np.int32)) for i, s in enumerate(prompts)],
        [s.response for s in sequences],
        prompt_index=[prompt_of[id(s.prompt)] for s in sequences] if shared_prompts else None,
        vision=[s.vision for s in prompts],
    )
    names = sequences[0].values if sequences else {}
    columns = {name: np.concatenate([np.asarray(s.values[name], float) for s in sequences]) for name in names}
    return batch.with_columns(**columns)


def pack(
    sequences: Sequence[PlainSequence],
    indices: Sequence[int],
    multiple: int,
    pad_token: int,
    device: Any,
    context: int = 1,
    context_rank: int = 0,
    shared_prompts: bool = False,
    length: int | None = None,
    tower: packing.Tower | None = None,
    encoded: bool = False,
) -> packing.MicroBatch:
    """``packing.pack`` of plain sequences."""
    return packing.pack(
        token_batch(sequences, shared_prompts),
        indices,
        lambda tensor: tensor.to(device),
        multiple=multiple,
        pad_token=pad_token,
        length=length,
        context=context,
        context_rank=context_rank,
        shared_prompts=shared_prompts,
        tower=tower,
        encoded=encoded,
    )
