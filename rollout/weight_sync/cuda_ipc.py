"""GPU memory shared between processes on one host by CUDA IPC: the same GPU, or another one over NVLink or PCIe.

The two functions of a transport, see ``shared_memory``. Not tested without a GPU: docs/gpu_checks.md.
"""

import base64
import os
from typing import TypedDict

import torch


class Address(TypedDict):
    """What CUDA needs to open the allocation, and where the storage is in it; handles in base64."""

    device: str
    handle: str
    size: int
    offset: int
    ref_counter_handle: str
    ref_counter_offset: int
    event_handle: str
    event_sync_required: bool


def share(storage: torch.UntypedStorage) -> Address:
    """Raises RuntimeError under ``expandable_segments``.

    Such memory has no CUDA IPC handle. Opening it by file descriptor needs a permission between processes
    (pidfd_getfd) that most clusters and containers refuse.
    """
    options = os.environ.get("PYTORCH_ALLOC_CONF", "") + os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "")
    if "expandable_segments:true" in options.lower():
        raise RuntimeError(
            "expandable_segments:True in PYTORCH_ALLOC_CONF: an engine can't map such memory; remove it where engines "
            "share the trainer's GPUs"
        )
    device, handle, size, offset, counter, counter_offset, event, event_sync = storage._share_cuda_()

    def text(data: bytes) -> str:
        return base64.b64encode(data).decode()

    return {
        "device": uuid(device),
        "handle": text(handle),
        "size": size,
        "offset": offset,
        "ref_counter_handle": text(counter),
        "ref_counter_offset": counter_offset,
        "event_handle": text(event),
        "event_sync_required": event_sync,
    }


def attach(address: Address) -> torch.UntypedStorage:
    """Raises RuntimeError when this process does not see the GPU."""
    visible = [uuid(index) for index in range(torch.cuda.device_count())]
    if address["device"] not in visible:
        raise RuntimeError(
            f"GPU {address['device']} of the trainer is not visible to the engine (it sees {visible}): give both the "
            "node's GPUs in CUDA_VISIBLE_DEVICES"
        )
    return torch.UntypedStorage._new_shared_cuda(
        visible.index(address["device"]),
        base64.b64decode(address["handle"]),
        address["size"],
        address["offset"],
        base64.b64decode(address["ref_counter_handle"]),
        address["ref_counter_offset"],
        base64.b64decode(address["event_handle"]),
        address["event_sync_required"],
    )


def uuid(device: int) -> str:
    """The GPU's unique name, the same in every process, whatever CUDA_VISIBLE_DEVICES says."""
    return str(torch.cuda.get_device_properties(device).uuid)
