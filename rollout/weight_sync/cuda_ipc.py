"""GPU memory shared between the processes of a host by CUDA IPC: of the same GPU, or of another over NVLink or PCIe.

This module has the two functions of a transport, see ``shared_memory``. Not tested without a GPU: docs/gpu_checks.md.

A process opens all memory, including that of other GPUs, on its own GPU, and reads it by peer access. NCCL and vLLM's
own all-reduce do the same. Opening the memory on the GPU that holds it would create a CUDA context there. With eight
GPUs that would take half a GiB for each of seven other engine workers on every GPU.
"""

import base64
import os
from typing import TypedDict

import torch


class Address(TypedDict):
    """What CUDA needs to open an allocation, and where the storage is in it. Handles are in base64.

    torch's event, which marks the moment of sharing, is left out, because the weight sync itself signals the readers
    when they may read.
    """

    device: str
    handle: str
    size: int
    offset: int
    ref_counter_handle: str
    ref_counter_offset: int


def share(storage: torch.UntypedStorage) -> Address:
    """Share a storage and return its address. Raises RuntimeError under ``expandable_segments``.

    Memory of expandable segments has no CUDA IPC handle. Opening it by file descriptor needs a permission between
    processes (pidfd_getfd) that most clusters and containers refuse.
    """
    options = os.environ.get("PYTORCH_ALLOC_CONF", "") + os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "")
    if "expandable_segments:true" in options.lower():
        raise RuntimeError(
            "expandable_segments:True in PYTORCH_ALLOC_CONF: an engine can't map such memory; remove it where engines "
            "share the trainer's GPUs"
        )
    device, handle, size, offset, counter, counter_offset, _event, _event_sync_required = storage._share_cuda_()

    def text(data: bytes) -> str:
        return base64.b64encode(data).decode()

    return {
        "device": uuid(device),
        "handle": text(handle),
        "size": size,
        "offset": offset,
        "ref_counter_handle": text(counter),
        "ref_counter_offset": counter_offset,
    }


def attach(address: Address) -> torch.UntypedStorage:
    """Open the storage at an address on this process's GPU.

    Raises RuntimeError when this process does not see the GPU that holds the storage, or when its own GPU can't read
    that GPU's memory.
    """
    visible = [uuid(index) for index in range(torch.cuda.device_count())]
    if address["device"] not in visible:
        raise RuntimeError(
            f"GPU {address['device']} of the trainer is not visible to the engine (it sees {visible}): give both the "
            "node's GPUs in CUDA_VISIBLE_DEVICES"
        )
    own = torch.cuda.current_device()
    source = visible.index(address["device"])
    if source != own and not torch.cuda.can_device_access_peer(own, source):
        raise RuntimeError(
            f"GPU {visible[own]} can't read the memory of GPU {address['device']} (no peer access, see nvidia-smi topo "
            "-p2p r): engines need it to take the trainer's weights; use nodes whose GPUs are connected"
        )
    return torch.UntypedStorage._new_shared_cuda(
        own,
        base64.b64decode(address["handle"]),
        address["size"],
        address["offset"],
        base64.b64decode(address["ref_counter_handle"]),
        address["ref_counter_offset"],
        b"",
        False,
    )


def uuid(device: int) -> str:
    """Return the GPU's unique id, which is the same in every process, whatever CUDA_VISIBLE_DEVICES says."""
    return str(torch.cuda.get_device_properties(device).uuid)
