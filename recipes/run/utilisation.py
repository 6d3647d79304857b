"""Metrics of how well a step used the machines: tokens per second, MFU and memory."""

import resource
from collections.abc import Mapping
from pathlib import Path

from megatron_ext import platform

GIB = 2**30
KIB = 2**10


def throughput(
    tokens: int,
    flops: float,
    seconds: Mapping[str, float],
    *,
    ranks: int,
    processes: int,
    peak_flops: float | None,
) -> dict[str, float]:
    """The throughput metrics of a step.

    There is no MFU without ``peak_flops``. A metric whose tokens or FLOPs were not counted (0) is left out too.

    Args:
        tokens: number of tokens of the step's prompts and responses, all ranks together.
        flops: model FLOPs of the training phase, all ranks together.
        seconds: the seconds of each phase.
        ranks: number of the trainer's ranks, which share its FLOPs.
        processes: number of processes of the job: the trainer's ranks and those of the engines' nodes. On GPUs there is
            one for each GPU.
        peak_flops: peak FLOPs per second of a rank's device.
    """
    metrics = {}
    step_seconds = sum(seconds.values())
    if tokens and step_seconds:
        metrics["throughput/tokens_per_second_per_rank"] = tokens / step_seconds / processes
    train_seconds = seconds.get("train", 0.0)
    if flops and train_seconds and peak_flops is not None:
        metrics["throughput/mfu"] = flops / train_seconds / ranks / peak_flops
    return metrics


def rank_memory() -> tuple[int | None, int, int]:
    """The memory use of this rank, in bytes: (device peak, host peak, used on the node).

    The device peak is the maximum that the device's allocator has held since the last call, None without a device. The
    host peak is the maximum resident memory of the process since its start.
    """
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KIB
    return platform.current().take_memory_peak(), resident, used_memory(Path("/proc/meminfo").read_text())


def used_memory(meminfo: str) -> int:
    """The bytes in use, from the text of /proc/meminfo. These are the bytes that a new process could not get."""
    sizes = {
        name: int(rest.split()[0]) * KIB for name, _, rest in (line.partition(":") for line in meminfo.splitlines())
    }
    return sizes["MemTotal"] - sizes["MemAvailable"]


def memory(of_ranks: list[tuple[int | None, int, int]]) -> dict[str, float]:
    """The memory metrics of a step: the maximum over all ranks of each value of :func:`rank_memory`, in GiB."""
    on_device = [device for device, _, _ in of_ranks if device is not None]
    metrics = {"memory/device_peak_gib": max(on_device) / GIB} if on_device else {}
    metrics["memory/rank_peak_gib"] = max(resident for _, resident, _ in of_ranks) / GIB
    metrics["memory/node_gib"] = max(used for _, _, used in of_ranks) / GIB
    return metrics
