"""Losses of a critic, per response token [R]."""

import torch
from torch import Tensor


def clipped(values: Tensor, old_values: Tensor, returns: Tensor, *, value_clip: float) -> Tensor:
    """max((V − R)², (V_old + clip(V − V_old, ±ε) − R)²) / 2 with ε = ``value_clip``, as in the code of PPO's authors.

    V are ``values``, which have the gradient. V_old are ``old_values``, with which the advantages were computed. R are
    ``returns``, which are the advantages (GAE) plus the old values.
    """
    clipped_values = old_values + (values - old_values).clamp(-value_clip, value_clip)
    return torch.maximum((values - returns) ** 2, (clipped_values - returns) ** 2) / 2
