"""Exchange of response tokens between ranks.

Every rank has the columns of all responses, but few ranks need the tokens of all responses. The functions are
collectives over a gloo group. All ranks call them with the same responses in the same order.
"""

from dataclasses import replace

import numpy as np
import torch
import torch.distributed as dist

from megatron_ext.batch import Array, TokenBatch, offsets
from megatron_ext.collectives import all_gather_bytes


def holders(batch: TokenBatch, group: dist.ProcessGroup) -> Array:
    """Collective: int [S], the first rank that holds the tokens of each response.

    Raises ValueError for a response that no rank holds.
    """
    return _first_holders(of_ranks(batch.held, group), batch)


def exchange(batch: TokenBatch, wanted: Array, group: dist.ProcessGroup) -> TokenBatch:
    """Collective: return the batch with the tokens of exactly the responses that this rank wants.

    ``wanted``, bool [S], is True for the responses that this rank wants. A response comes from the first rank that
    holds it. If all other ranks need the same responses from a rank, it broadcasts them. Otherwise it sends each rank
    the responses that this rank needs. Raises ValueError for a response that no rank holds.
    """
    rank = dist.get_rank(group)
    held = of_ranks(batch.held, group)
    missing = of_ranks(wanted, group) & ~held
    source = _first_holders(held, batch)
    sent: list[dist.Work | None] = []
    outgoing: dict[bytes, torch.Tensor] = {}  # flags of the responses in a block → the block
    incoming: list[tuple[Array, torch.Tensor]] = []
    for sender in np.unique(source[missing.any(axis=0)]).tolist():
        of_sender = np.flatnonzero(source == sender)
        parts = missing[:, of_sender]  # [receivers, responses of the sender]
        others = np.delete(parts, sender, axis=0)
        if (others == others[0]).all():
            responses = of_sender[others[0]]
            block = _block(batch, responses) if rank == sender else _empty_block(batch, responses)
            sent.append(dist.broadcast(block, group=group, group_src=sender, async_op=True))
            if rank != sender:
                incoming.append((responses, block))
        elif rank == sender:
            for receiver in np.flatnonzero(parts.any(axis=1)).tolist():
                part = parts[receiver].tobytes()
                if part not in outgoing:
                    outgoing[part] = _block(batch, of_sender[parts[receiver]])
                sent.append(dist.isend(outgoing[part], group=group, group_dst=receiver))
        elif parts[rank].any():
            responses = of_sender[parts[rank]]
            block = _empty_block(batch, responses)
            sent.append(dist.irecv(block, group=group, group_src=sender))
            incoming.append((responses, block))
    for work in sent:
        assert work is not None  # it is for a rank outside the group
        work.wait()
    if not missing.any() and (wanted == batch.held).all():
        return batch
    return _assembled(batch, wanted, incoming)


def everywhere(batch: TokenBatch, group: dist.ProcessGroup) -> TokenBatch:
    """Collective: return the batch with the tokens of all responses, on every rank."""
    return exchange(batch, np.ones(len(batch), np.bool_), group)


def of_ranks(flags: Array, group: dist.ProcessGroup) -> Array:
    """Collective: all-gather each rank's bool [S] into bool [ranks, S]."""
    gathered = all_gather_bytes(np.packbits(flags).tobytes(), group)
    packed = np.stack([np.frombuffer(of_rank, np.uint8) for of_rank in gathered])
    return np.unpackbits(packed, axis=1, count=len(flags)).astype(np.bool_)


def _first_holders(held: Array, batch: TokenBatch) -> Array:
    nowhere = np.flatnonzero(~held.any(axis=0))
    if len(nowhere):
        raise ValueError(f"no rank holds the tokens of response {batch.keys[nowhere[0]]}")
    return held.argmax(axis=0)


def _columns(batch: TokenBatch) -> list[Array]:
    """All token columns, in an order that is the same on every rank."""
    return [
        batch.response_tokens,
        batch.logprobs,
        batch.loss_mask,
        *(batch.columns[name] for name in sorted(batch.columns)),
    ]


def _block(batch: TokenBatch, responses: Array) -> torch.Tensor:
    """The tokens of these responses, column after column, as bytes."""
    places = [batch.tokens_of(i) for i in responses.tolist()]
    pieces = [column[place].view(np.uint8) for column in _columns(batch) for place in places]
    return torch.from_numpy(np.concatenate(pieces))


def _empty_block(batch: TokenBatch, responses: Array) -> torch.Tensor:
    """An empty buffer with the size of another rank's :func:`_block` of these responses."""
    token_bytes = sum(column.itemsize for column in _columns(batch))
    return torch.empty(int(batch.response_lengths[responses].sum()) * token_bytes, dtype=torch.uint8)


def _assembled(batch: TokenBatch, wanted: Array, incoming: list[tuple[Array, torch.Tensor]]) -> TokenBatch:
    """The batch with the tokens of the wanted responses, from this rank's batch and from the blocks of other ranks."""
    ends = offsets(np.where(wanted, batch.response_lengths, 0))
    columns = [np.empty(int(ends[-1]), column.dtype) for column in _columns(batch)]
    for target, own in zip(columns, _columns(batch), strict=True):
        for i in np.flatnonzero(wanted & batch.held).tolist():
            target[ends[i] : ends[i + 1]] = own[batch.tokens_of(i)]
    for responses, block in incoming:
        start = 0
        content = block.numpy()
        for target in columns:
            for i in responses.tolist():
                stop = start + int(batch.response_lengths[i]) * target.itemsize
                target[ends[i] : ends[i + 1]] = content[start:stop].view(target.dtype)
                start = stop
    response_tokens, logprobs, loss_mask, *others = columns
    return replace(
        batch,
        response_offsets=ends,
        response_tokens=response_tokens,
        logprobs=logprobs,
        loss_mask=loss_mask,
        columns=dict(zip(sorted(batch.columns), others, strict=True)),
    )
