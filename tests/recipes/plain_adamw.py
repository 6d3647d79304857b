"""The optimiser of references that are written again with torch."""

from typing import Any

import torch


def adamw(model: Any, learning_rate: float, weight_decay: float = 0.01, epsilon: float = 1e-8) -> torch.optim.AdamW:
    """AdamW with the betas of conf/config.yaml and no weight decay for norms and biases."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, learning_rate, betas=(0.9, 0.95), eps=epsilon)
