"""Small collectives on plain data over a gloo group, on every platform: JSON in, JSON out, nothing is unpickled."""

import json
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist


def all_gather_json(value: Any, group: dist.ProcessGroup) -> list[Any]:
    """``value`` of every rank of a gloo group, in rank order."""
    payload = _bytes(value)
    size = torch.tensor([len(payload)])
    sizes = [torch.empty_like(size) for _ in range(dist.get_world_size(group))]
    dist.all_gather(sizes, size, group=group)
    padded = torch.zeros(int(max(sizes)), dtype=torch.uint8)
    padded[: len(payload)] = payload
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded, group=group)
    return [json.loads(part[: int(n)].numpy().tobytes()) for part, n in zip(parts, sizes, strict=True)]


def from_rank_zero(work: Callable[[], Any], group: dist.ProcessGroup) -> Any:
    """Run ``work`` on rank 0 of ``group`` and give its JSON-able result to all.

    Rank 0's exception is raised there as it is, and as RuntimeError with its text on the other ranks.
    """
    rank = dist.get_rank(group)
    message: dict[str, Any] = {}
    failure: Exception | None = None
    if rank == 0:
        try:
            message = {"value": work()}
        except Exception as error:  # told to all ranks, raised below
            failure, message = error, {"error": f"{type(error).__name__}: {error}"}
    data = _bytes(message)
    size = torch.tensor([len(data)])
    dist.broadcast(size, group=group, group_src=0)
    if rank != 0:
        data = torch.empty(int(size), dtype=torch.uint8)
    dist.broadcast(data, group=group, group_src=0)
    if failure is not None:
        raise failure
    message = json.loads(data.numpy().tobytes())
    if "error" in message:
        raise RuntimeError(f"rank 0: {message['error']}")
    return message["value"]


def on_all_ranks(work: Callable[[], Any], group: dist.ProcessGroup) -> list[Any]:
    """Run ``work`` on every rank of ``group`` and give all JSON-able results, in rank order, to all.

    A rank's exception is raised there as it is, and as RuntimeError with its text on the others.
    """
    failure: Exception | None = None
    try:
        message = {"value": work()}
    except Exception as error:  # told to all ranks, raised below
        failure, message = error, {"error": f"{type(error).__name__}: {error}"}
    messages = all_gather_json(message, group)
    if failure is not None:
        raise failure
    errors = [f"rank {rank}: {told['error']}" for rank, told in enumerate(messages) if "error" in told]
    if errors:
        raise RuntimeError("; ".join(errors))
    return [told["value"] for told in messages]


def _bytes(value: Any) -> torch.Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
