"""What a model keeps from step to step, moved to the host and back while another one works on the same device."""

from collections.abc import Iterator

import torch
from megatron.core.optimizer import MegatronOptimizer

from megatron_ext import platform
from megatron_ext.model import Model


class HostCopy:
    """Weights, gradient buffers and optimiser states of ``model``, on the device or on the host.

    Tensors, and views of them, stay the same objects: only the memory behind them goes and comes back, bit for bit.
    Gradients are not kept: each accumulation begins with zeros. ``weights=False`` leaves the weights where they are, as
    those that engines read in place must be. ``optimizer`` may come later.
    """

    def __init__(self, model: Model, optimizer: MegatronOptimizer | None = None, weights: bool = True) -> None:
        self.model, self.optimizer, self.weights = model, optimizer, weights
        self.away: list[tuple[torch.UntypedStorage, int, torch.Tensor | None]] = []

    def release(self) -> None:
        """Move what is on the device to the host; nothing where it has been moved."""
        if self.away:
            return
        weights = _storages(p.data for chunk in self.model.chunks for p in chunk.module.parameters())
        gradients = _storages(buffer.grad_data for chunk in self.model.chunks for buffer in chunk.buffers)
        states = _storages(self._states())
        kept = (weights | states) if self.weights else {k: s for k, s in states.items() if k not in weights}
        for key, storage in (kept | gradients).items():
            host = None if key in gradients else _bytes(storage).to("cpu", copy=True)
            self.away.append((storage, storage.nbytes(), host))
            storage.resize_(0)
        platform.current().empty_cache()

    def restore(self) -> None:
        """Move back what ``release`` moved; nothing where it moved nothing."""
        for storage, size, host in self.away:
            storage.resize_(size)
            if host is None:
                _bytes(storage).zero_()
            else:
                _bytes(storage).copy_(host)
        self.away = []

    def _states(self) -> Iterator[torch.Tensor]:
        """FP32 masters and moments that are on the device; torch keeps its step counters on the host."""
        if self.optimizer is None:
            return
        for optimizer in getattr(self.optimizer, "chained_optimizers", [self.optimizer]):
            inner = optimizer.optimizer
            tensors = [p.data for group in inner.param_groups for p in group["params"]]
            tensors += [t for state in inner.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
            yield from (t for t in tensors if t.device == tensors[0].device and t.dim())


def _storages(tensors: Iterator[torch.Tensor]) -> dict[int, torch.UntypedStorage]:
    """The distinct storages behind the tensors."""
    return {t.untyped_storage()._cdata: t.untyped_storage() for t in tensors}


def _bytes(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
