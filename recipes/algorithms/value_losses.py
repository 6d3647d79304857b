"""Losses of a critic, per response token [R]."""

import torch
from torch import Tensor


def clipped(values: Tensor, old_values: Tensor, returns: Tensor, *, value_clip: float) -> Tensor:
    """max((V − R)², (V_old + clip(V − V_old, ±ε) − R)²) / 2, with ε = ``value_clip`` (PPO's, as its authors coded it).

    ``values`` has the gradient; ``old_values`` are those that made the advantages, ``returns`` = GAE + old values.
    """
    near = old_values + (values - old_values).clamp(-value_clip, value_clip)
    return torch.maximum((values - returns) ** 2, (near - returns) ** 2) / 2
