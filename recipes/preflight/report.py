"""The preflight's settings and its report: the types that the checks fill in and the view prints."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Settings:
    """conf/preflight/: the device and the nodes that a run is checked against.

    Attributes:
        output: JSON file for the report, None for no file.
        device: name of the device, for messages.
        device_memory_gib: memory of one device.
        fp8: whether the device multiplies in FP8.
        reserve_gib: device memory for CUDA contexts, NCCL buffers and fragmentation.
        engines: "colocated" with the trainer's ranks or "disaggregated", on devices of their own.
        host_memory_gib: memory of one node's host for offloaded tensors.
        asleep_gib: device memory that a sleeping judge's process still holds.
    """

    output: str | None
    device: str
    device_memory_gib: float
    fp8: bool
    reserve_gib: float
    engines: str
    host_memory_gib: float
    asleep_gib: float


@dataclass(frozen=True)
class Check:
    """The result of one check: ``detail`` says what was found, or what to change."""

    name: str
    ok: bool
    detail: str


@dataclass
class Report:
    """The content of the JSON file. A field stays None or empty when an earlier check failed.

    Attributes:
        recipe: name of the recipe.
        model: name of the model's folder.
        device: name of the device.
        device_memory_gib: memory of one device.
        layout: the parallel sizes, with ``data`` and ``recompute``.
        parameters_total: parameters of the complete model.
        parameters_per_rank: ``pp``, ``tp`` and ``count`` of each distinct rank of a replica.
        hf_tensors: comparison of the policy's weight map with the checkpoint (``simulated_ranks.Coverage.compare``).
        critic_tensors: the same for a critic.
        memory_gib: for each distinct rank ``pp``, ``tp``, the fields of ``memory.Memory``, each phase and ``total``.
        phases: phase of a step → the fields of ``memory.Memory`` that are on the device in it.
        host_gib: phase → name → offloaded tensors on one node's host.
        engine_gib: ``vllm`` and ``kv_cache`` of one engine's device.
        fits: whether the largest rank and the engines fit the device.
        batch: counts of one step: prompts, samples, micro-batches.
        checks: results in the order of the checks.
        seconds: duration of the preflight.
    """

    recipe: str
    model: str
    device: str
    device_memory_gib: float
    layout: dict[str, Any] | None = None
    parameters_total: int | None = None
    parameters_per_rank: list[dict[str, int]] = field(default_factory=list)
    hf_tensors: dict[str, Any] | None = None
    critic_tensors: dict[str, Any] | None = None
    memory_gib: list[dict[str, Any]] = field(default_factory=list)
    phases: dict[str, list[str]] = field(default_factory=dict)
    host_gib: dict[str, dict[str, float]] = field(default_factory=dict)
    engine_gib: dict[str, float] | None = None
    fits: bool = False
    batch: dict[str, Any] | None = None
    checks: list[Check] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        """Whether every check so far holds."""
        return all(check.ok for check in self.checks)

    def check(self, name: str, work: Callable[[], str]) -> bool:
        """Run one check and record its result; returns whether it holds.

        ``work`` returns what it found, or raises ValueError or OSError with what to change.
        """
        try:
            result = Check(name, True, work())
        except (ValueError, OSError) as error:
            result = Check(name, False, str(error))
        self.checks.append(result)
        return result.ok
