"""vLLM's worker with more methods: load a peer's exported tensors, do nothing, and turn packing on or off."""

import json
import time
from typing import Any

import torch

from rollout.weight_sync import worker
from rollout.weight_sync.worker import WeightSyncWorker, pack_layers


class LoadingWorker(WeightSyncWorker):
    """The weight sync's worker. It keeps the unpacked linear weights, without which ``load_weights`` fails on a CPU."""

    def nothing(self) -> str:
        return "{}"

    def set_packs(self, whether: str) -> str:
        """Whether later weight syncs pack the linear layers. Until one does, the kernels use old weights."""
        worker.pack_layers = pack_layers if json.loads(whether) else lambda: 0.0
        return "{}"

    def load_exported(self, message: str) -> str:
        """Call ``load_weights`` with tensors in shared memory, then pack. Returns the seconds of both, or an error.

        The message is ``{"pid", "fd", "bytes", "tensors": [[name, shape, offset]]}``; all tensors are BF16. Parsing it
        and mapping the memory are not timed.
        """
        try:
            body = json.loads(message)
            path = f"/proc/{body['pid']}/fd/{body['fd']}"
            memory = torch.from_file(path, shared=True, size=body["bytes"], dtype=torch.uint8)
            weights = [(name, _view(memory, offset, shape)) for name, shape, offset in body["tensors"]]
            model: Any = self.get_model()
            started = time.perf_counter()
            with torch.no_grad():
                model.load_weights(iter(weights))
            loaded = time.perf_counter() - started
            return json.dumps({"load_seconds": loaded, "pack_seconds": pack_layers()})
        except Exception as error:  # reported to the caller; raising would kill the engine
            return json.dumps({"error": f"{type(error).__name__}: {error}"})


def _view(memory: torch.Tensor, offset: int, shape: list[int]) -> torch.Tensor:
    size = torch.Size(shape).numel() * torch.bfloat16.itemsize
    return memory[offset : offset + size].view(torch.bfloat16).view(shape)
