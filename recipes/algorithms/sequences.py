"""Reductions over the trained response tokens of each packed sequence.

Under context parallelism a rank holds a part of a sequence's tokens. The reductions then include an all-reduce over the
context-parallel group, whose ranks run the same micro-batches in the same order, as attention requires. A reduction has
no gradient, so no gradient crosses ranks. A sequence-level loss gets its gradient through the tokens
(``policy_losses.gspo``).
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ext.packing import MicroBatch


@dataclass(frozen=True)
class Sequences:
    """The S sequences of a micro-batch, with R response tokens on this rank.

    All tensors are on the device. All reductions run there too, so that the host never waits for one.
    """

    # int64 [S]: the number of response tokens of each sequence on this rank, in the order of the tokens.
    lengths: Tensor
    # int64 [S]: the number of response tokens of each sequence on all context-parallel ranks together.
    total_lengths: Tensor
    # int64 [R]: the sequence of each token.
    owners: Tensor
    # bool [R]: the tokens that are trained on. The others count in no reduction.
    loss_mask: Tensor
    # The ranks that hold the other tokens of the sequences. None when this rank holds all.
    context_group: dist.ProcessGroup | None = None

    def sum(self, tokens: Tensor) -> Tensor:
        """[R] → [S] FP64: the sum over each sequence, without gradient.

        The order of additions is fixed, so the bits repeat.
        """
        trained = tokens.detach().double().masked_fill(~self.loss_mask, 0.0)
        return self._reduced(trained, "sum", dist.ReduceOp.SUM)

    def minimum(self, tokens: Tensor) -> Tensor:
        """[R] → [S] FP64: the minimum over each sequence, without gradient. Infinity where no token is trained on."""
        trained = tokens.detach().double().masked_fill(~self.loss_mask, torch.inf)
        return self._reduced(trained, "min", dist.ReduceOp.MIN)

    def mean(self, tokens: Tensor) -> Tensor:
        """[R] → [S] FP64: the mean over each sequence, without gradient. 0 where no token is trained on."""
        trained_tokens = self.sum(torch.ones_like(tokens))
        return self.sum(tokens) / trained_tokens.clamp(min=1)

    def broadcast(self, sequences: Tensor, like: Tensor) -> Tensor:
        """[S] → [R], in ``like``'s precision: each sequence's value at each of its tokens."""
        return sequences[self.owners].to(like.dtype)

    def _reduced(self, tokens: Tensor, name: str, operation: dist.ReduceOp.RedOpType) -> Tensor:
        # Without ``unsafe`` the host would read the lengths to check them.
        values = torch.segment_reduce(tokens, name, lengths=self.lengths, unsafe=True)
        if self.context_group is not None:
            dist.all_reduce(values, operation, group=self.context_group)
        return values


def sequences_of(batch: MicroBatch, context_group: dist.ProcessGroup | None) -> Sequences:
    """The sequences of a micro-batch that has the column ``loss_mask``."""
    is_trained = batch.values["loss_mask"] > 0
    return Sequences(batch.lengths, batch.response_lengths, batch.owners, is_trained, context_group)
