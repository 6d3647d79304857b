"""Reductions over the trained response tokens of each packed sequence.

Under context parallelism a rank holds a part of a sequence's tokens, and the reductions include the context-parallel
group: its ranks run the same micro-batches in the same order, as attention needs them to. A reduction has no gradient,
so no gradient crosses ranks; a sequence-level loss gets its gradient through the tokens (``policy_losses.gspo``).
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Sequences:
    """A micro-batch's sequences, S of them, with R response tokens on this rank.

    ``lengths`` [S]: response tokens of each sequence on this rank, in the order of the tokens (``MicroBatch.lengths``).
    ``loss_mask`` bool [R]: the tokens that are trained on; the others count in no reduction. ``context_group``: the
    ranks that hold the other tokens; None when this rank holds all.
    """

    lengths: list[int]
    loss_mask: Tensor
    context_group: dist.ProcessGroup | None = None

    def sum(self, tokens: Tensor) -> Tensor:
        """[R] → [S] FP64: the sum over each sequence, without gradient, in a fixed order of additions: bits repeat."""
        trained = tokens.detach().double().masked_fill(~self.loss_mask, 0.0)
        parts = trained.split(self.lengths)
        return self._reduced(torch.stack([part.sum() for part in parts]), dist.ReduceOp.SUM)

    def minimum(self, tokens: Tensor) -> Tensor:
        """[R] → [S] FP64: the minimum over each sequence, without gradient; infinity where no token is trained on."""
        # A context-parallel rank can have no token of a sequence.
        infinity = torch.tensor([torch.inf], dtype=torch.float64, device=tokens.device)
        parts = tokens.detach().double().masked_fill(~self.loss_mask, torch.inf).split(self.lengths)
        return self._reduced(torch.stack([torch.cat([part, infinity]).min() for part in parts]), dist.ReduceOp.MIN)

    def total_lengths(self) -> Tensor:
        """[S] FP64: response tokens of each sequence on all ranks together, those that are not trained on too."""
        local_lengths = torch.tensor(self.lengths, dtype=torch.float64, device=self.loss_mask.device)
        return self._reduced(local_lengths, dist.ReduceOp.SUM)

    def mean(self, tokens: Tensor) -> Tensor:
        """[R] → [S] FP64: the mean over each sequence, without gradient; 0 where no token is trained on."""
        trained_tokens = self.sum(torch.ones_like(tokens))
        return self.sum(tokens) / trained_tokens.clamp(min=1)

    def broadcast(self, sequences: Tensor, like: Tensor) -> Tensor:
        """[S] → [R], in ``like``'s precision: each sequence's value at each of its tokens."""
        counts = torch.tensor(self.lengths, device=sequences.device)
        return torch.repeat_interleave(sequences, counts, output_size=len(like)).to(like.dtype)

    def _reduced(self, values: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
        if self.context_group is not None:
            dist.all_reduce(values, operation, group=self.context_group)
        return values
