"""What a token needs to know of its sequence: sums over the response tokens of each packed sequence.

Under context parallelism a rank holds a part of a sequence's tokens. Then the sums are added up over the
context-parallel group: its ranks run the same micro-batches in the same order, as attention needs them to. A sum
carries no gradient, so none has to cross ranks; a sequence-level loss takes its gradient through its own tokens
(``policy_losses.gspo``).
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Sequences:
    """A micro-batch's sequences, S of them, with R response tokens on this rank.

    ``lengths`` [S]: response tokens of each that are here, in the order of the tokens (``MicroBatch.lengths``).
    ``context_group``: the ranks that hold the other parts; None when all tokens are here.
    """

    lengths: list[int]
    context_group: dist.ProcessGroup | None = None

    def sum(self, tokens: Tensor) -> Tensor:
        """[R] → [S], over the whole sequences, without gradient. The order of adding is fixed: bits repeat."""
        parts = tokens.detach().double().split(self.lengths)
        return self._reduced(torch.stack([part.sum() for part in parts]), dist.ReduceOp.SUM)

    def minimum(self, tokens: Tensor) -> Tensor:
        """[R] → [S], the least of each whole sequence, without gradient."""
        nothing = torch.tensor([torch.inf], dtype=torch.float64, device=tokens.device)
        parts = tokens.detach().double().split(self.lengths)
        return self._reduced(torch.stack([torch.cat([part, nothing]).min() for part in parts]), dist.ReduceOp.MIN)

    def whole_lengths(self, device: torch.device) -> Tensor:
        """[S] FP64: response tokens of each sequence, on all ranks together."""
        here = torch.tensor(self.lengths, dtype=torch.float64, device=device)
        return self._reduced(here, dist.ReduceOp.SUM)

    def mean(self, tokens: Tensor) -> Tensor:
        """[R] → [S]: the mean over each whole sequence, without gradient."""
        return self.sum(tokens) / self.whole_lengths(tokens.device)

    def spread(self, sequences: Tensor, like: Tensor) -> Tensor:
        """[S] → [R], in ``like``'s precision: each sequence's value for each of its tokens."""
        counts = torch.tensor(self.lengths, device=sequences.device)
        return torch.repeat_interleave(sequences, counts, output_size=len(like)).to(like.dtype)

    def _reduced(self, values: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
        if self.context_group is not None:
            dist.all_reduce(values, operation, group=self.context_group)
        return values
