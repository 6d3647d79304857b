"""GPU memory shared between processes on one host by CUDA IPC: the same GPU, or another one over NVLink or PCIe.

The two functions of a transport, see ``shared_memory``. Not tested without a GPU: docs/gpu_checks.md.

A process opens all memory on its own GPU, also that of others, which it then reads as peers do (NCCL and vLLM's own
all-reduce work so too). Opened on the GPU where it lies, it would take a CUDA context there: with eight GPUs half a GiB
for each of seven other engine workers on every GPU.
"""

import base64
import os
from typing import TypedDict

import torch


class Address(TypedDict):
    """What CUDA needs to open the allocation, and where the storage is in it; handles in base64.

    torch's event of the moment of sharing is left out: each sync tells readers itself when they may read.
    """

    device: str
    handle: str
    size: int
    offset: int
    ref_counter_handle: str
    ref_counter_offset: int


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
    """The storage as memory of this process's GPU. Raises RuntimeError when that GPU can't read the other's memory, or
    this process does not see the other."""
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
    """The GPU's unique name, the same in every process, whatever CUDA_VISIBLE_DEVICES says."""
    return str(torch.cuda.get_device_properties(device).uuid)
