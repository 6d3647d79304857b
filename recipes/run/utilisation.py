"""How well a step used the machines: tokens per second, MFU, memory."""

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
    """Metrics of a step; without ``peak_flops`` no MFU, and none of what was not counted.

    Args:
        tokens: of prompts and responses that the step is about, all ranks together.
        flops: model FLOPs of the training phase, all ranks together.
        seconds: of each phase.
        ranks: of the trainer, which share its FLOPs.
        processes: of the job, on GPUs one for each: the trainer's ranks and those of the engines' nodes.
        peak_flops: of a rank's device, per second.
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
    """Of this rank: bytes that its device's allocator held at most since the last call (None without a device), most
    bytes of host memory that its process had since its start, and bytes in use on its node."""
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KIB
    return platform.current().take_memory_peak(), resident, used_memory(Path("/proc/meminfo").read_text())


def used_memory(meminfo: str) -> int:
    """Bytes in use, of the text of /proc/meminfo: those that a new process could not get."""
    sizes = {
        name: int(rest.split()[0]) * KIB for name, _, rest in (line.partition(":") for line in meminfo.splitlines())
    }
    return sizes["MemTotal"] - sizes["MemAvailable"]


def memory(of_ranks: list[tuple[int | None, int, int]]) -> dict[str, float]:
    """Metrics of all ranks' :func:`rank_memory`: of each the greatest."""
    on_device = [device for device, _, _ in of_ranks if device is not None]
    metrics = {"memory/device_peak_gib": max(on_device) / GIB} if on_device else {}
    metrics["memory/rank_peak_gib"] = max(resident for _, resident, _ in of_ranks) / GIB
    metrics["memory/node_gib"] = max(used for _, _, used in of_ranks) / GIB
    return metrics
