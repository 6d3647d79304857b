"""Collectives on small JSON values over a gloo group, on every platform. Nothing is pickled."""

import json
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

# The number of bytes of a value that are sent together with its size. A value of at most this length takes one
# collective instead of two.
HEAD_BYTES = 1024
RESULT, ERROR = b"+", b"-"  # the first byte of a message of ``on_all_ranks_bytes``


def all_gather_json(value: Any, group: dist.ProcessGroup) -> list[Any]:
    """Collective: all-gather the JSON values of all ranks of a gloo group, in rank order."""
    payloads = all_gather_bytes(json.dumps(value).encode(), group)
    return [json.loads(payload) for payload in payloads]


def all_gather_bytes(payload: bytes, group: dist.ProcessGroup) -> list[bytes]:
    """Collective: all-gather the bytes of all ranks of a gloo group, in rank order. The lengths may differ.

    The first ``HEAD_BYTES`` bytes are gathered together with the lengths. The rest of each longer value is broadcast
    with its own length. Often only one rank of a node has a value. Padding to the longest value would then multiply the
    bytes sent by the number of ranks of a node.
    """
    heads = _all_gather(len(payload).to_bytes(8, "little") + payload[:HEAD_BYTES], 8 + HEAD_BYTES, group)
    sizes = [int.from_bytes(head[:8], "little") for head in heads]
    rank = dist.get_rank(group)
    tails = []
    sends = []
    for source, size in enumerate(sizes):
        tail = torch.empty(max(0, size - HEAD_BYTES), dtype=torch.uint8)
        if source == rank and len(tail):
            tail = torch.frombuffer(bytearray(payload[HEAD_BYTES:]), dtype=torch.uint8)
        if len(tail):
            sends.append(dist.broadcast(tail, group=group, group_src=source, async_op=True))
        tails.append(tail)
    for send in sends:
        send.wait()
    return [head[8 : 8 + size] + tail.numpy().tobytes() for head, size, tail in zip(heads, sizes, tails, strict=True)]


def _all_gather(data: bytes, length: int, group: dist.ProcessGroup) -> list[bytes]:
    """All-gather ``data`` of every rank, padded to ``length`` bytes."""
    padded = torch.frombuffer(bytearray(data.ljust(length, b"\0")), dtype=torch.uint8)
    parts = [torch.empty_like(padded) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, padded, group=group)
    return [part.numpy().tobytes() for part in parts]


def from_rank_zero(work: Callable[[], Any], group: dist.ProcessGroup) -> Any:
    """Collective: run ``work`` on rank 0 of a gloo group and return its result (JSON) on all ranks.

    An exception of ``work`` is raised unchanged on rank 0, and as RuntimeError with its text on the others.
    """
    rank = dist.get_rank(group)
    message: dict[str, Any] = {}
    failure: Exception | None = None
    if rank == 0:
        try:
            message = {"value": work()}
        except Exception as error:  # sent to all ranks and raised below
            failure = error
            message = {"error": f"{type(error).__name__}: {error}"}
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
    """Collective: run ``work`` on every rank of a gloo group. Returns all results (JSON) in rank order.

    An exception of ``work`` is raised unchanged on its rank, and as RuntimeError with its text on the others.
    """
    results = on_all_ranks_bytes(lambda: json.dumps(work()).encode(), group)
    return [json.loads(result) for result in results]


def on_all_ranks_bytes(work: Callable[[], bytes], group: dist.ProcessGroup) -> list[bytes]:
    """Like :func:`on_all_ranks`, for results that are bytes."""
    failure: Exception | None = None
    try:
        message = RESULT + work()
    except Exception as error:  # sent to all ranks and raised below
        failure = error
        message = ERROR + f"{type(error).__name__}: {error}".encode()
    messages = all_gather_bytes(message, group)
    if failure is not None:
        raise failure
    errors = [
        f"rank {rank}: {message[1:].decode()}" for rank, message in enumerate(messages) if message.startswith(ERROR)
    ]
    if errors:
        raise RuntimeError("; ".join(errors))
    return [message[1:] for message in messages]


def _bytes(value: Any) -> torch.Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
