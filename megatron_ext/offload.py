"""Free a model's device memory while another model uses it. Gradients are dropped, what persists moves to the host."""

from collections.abc import Iterator

import torch
from megatron.core.optimizer import MegatronOptimizer

from megatron_ext import platform
from megatron_ext.host_buffers import HostBuffers
from megatron_ext.model import Model


def release_gradients(model: Model) -> None:
    """Free the memory of the gradient buffers. Does nothing if it has already been freed.

    The tensors and all views of them stay the same objects. ``forward_backward.accumulate_gradients`` allocates the
    memory again and begins with zeros.
    """
    for chunk in model.chunks:
        chunk.offload_grad_buffers(empty_cache=False)


class HostCopy:
    """Weights and optimiser states of one model, either on the device or on the host. Gradients are dropped.

    The tensors and all views of them stay the same objects. Only their device memory is released and allocated again.
    Their values are restored bit for bit. The host memory is kept.
    """

    def __init__(self, model: Model, optimizer: MegatronOptimizer | None = None, weights: bool = True) -> None:
        """
        Args:
            model: the model whose tensors are moved.
            optimizer: the model's optimiser. May also be set later.
            weights: whether to move the weights. They must stay on the device if engines read them in place.
        """
        self.model = model
        self.optimizer = optimizer
        self.weights = weights
        self.buffers = HostBuffers()
        # The storages that are on the host, each with its copy.
        self.offloaded: list[tuple[torch.UntypedStorage, torch.Tensor]] = []

    def release(self) -> None:
        """Move the tensors to the host and drop the gradients. Does nothing if the tensors are already on the host."""
        if self.offloaded:
            return
        weights = _storages(p.data for chunk in self.model.chunks for p in chunk.module.parameters())
        states = _storages(self._states())
        if self.weights:
            copied = weights | states
        else:
            # An FP32 parameter is its own master weight, so it is also one of the optimiser's states.
            copied = {key: storage for key, storage in states.items() if key not in weights}
        storages = list(copied.values())
        self.offloaded = list(zip(storages, self.buffers.copy([_bytes(storage) for storage in storages]), strict=True))
        for storage in storages:
            storage.resize_(0)
        release_gradients(self.model)
        platform.current().empty_cache()

    def restore(self) -> None:
        """Move the tensors back to the device. Does nothing if they are already there."""
        for storage, copy in self.offloaded:
            storage.resize_(copy.nbytes)
            _bytes(storage).copy_(copy, non_blocking=True)
        self.offloaded = []

    def _states(self) -> Iterator[torch.Tensor]:
        """FP32 masters and moments on the device. torch keeps its step counters on the host."""
        if self.optimizer is None:
            return
        for optimizer in getattr(self.optimizer, "chained_optimizers", [self.optimizer]):
            inner = optimizer.optimizer
            tensors = [p.data for group in inner.param_groups for p in group["params"]]
            for state in inner.state.values():
                tensors += [value for value in state.values() if isinstance(value, torch.Tensor)]
            yield from (t for t in tensors if t.device == tensors[0].device and t.dim())


def _storages(tensors: Iterator[torch.Tensor]) -> dict[int, torch.UntypedStorage]:
    """The distinct storages of the tensors: address of the implementation → storage."""
    return {t.untyped_storage()._cdata: t.untyped_storage() for t in tensors}


def _bytes(storage: torch.UntypedStorage) -> torch.Tensor:
    """The storage as a flat tensor of bytes."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
