"""The preflight's settings, and the report that the checks fill in and the view prints."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

HOLDS = "holds"
FAILS = "fails"
NOT_CHECKED = "not checked"
STATES = (HOLDS, FAILS, NOT_CHECKED)

# Values of Settings.files.
HERE = "here"
ELSEWHERE = "elsewhere"


class NotChecked(Exception):
    """Raised by a check that cannot be made here.

    The message says what the check could not see, and where or how to check it.
    """


def size(count: float) -> str:
    """A number of bytes as text for people, in MB, GB or TB (powers of ten)."""
    for unit, least in (("TB", 1e12), ("GB", 1e9)):
        if count >= least:
            return f"{count / least:.2f} {unit}"
    return f"{count / 1e6:.0f} MB"


@dataclass(frozen=True)
class Settings:
    """conf/preflight/: the device and the nodes that a run is checked against.

    Attributes:
        output: JSON file for the report, None for no file.
        files: "here" if this machine has the folders of models and judges, "elsewhere" if another one has.
        nodes: number of nodes for the trainer and the judges together. The preflight searches for their best use; None
            for no search.
        device: name of the device, for messages.
        device_memory_gib: memory of one device.
        fp8: whether the device multiplies in FP8.
        context_gib: device memory of a process's CUDA context.
        communicator_gib: NCCL's device memory for one group of ranks.
        workspace_gib: device memory of a process's libraries.
        graph_gib: device memory of one of an engine's CUDA graphs.
        fragmentation_gib: device memory that the trainer's allocator can't use.
        host_memory_gib: memory of one node's host for offloaded tensors.
        asleep_gib: device memory that a sleeping judge's process still holds.
        costs: name of the files of conf/scale and conf/simulate with the device's speed, None if there are none.
    """

    output: str | None
    files: str
    nodes: int | None
    device: str
    device_memory_gib: float
    fp8: bool
    context_gib: float
    communicator_gib: float
    workspace_gib: float
    graph_gib: float
    fragmentation_gib: float
    host_memory_gib: float
    asleep_gib: float
    costs: str | None


@dataclass(frozen=True)
class Check:
    """The result of one check.

    Attributes:
        name: of the check.
        state: one of ``STATES``.
        detail: what was found, what to change, or how to check it.
    """

    name: str
    state: str
    detail: str


@dataclass(frozen=True)
class Proposal:
    """Overrides with which the same checks were made and hold.

    Attributes:
        overrides: to be added to the command line.
        detail: the layout and the memory of the run with them.
    """

    overrides: tuple[str, ...]
    detail: str


@dataclass
class Report:
    """The content of the JSON file. A field stays None or empty when an earlier check failed.

    Attributes:
        recipe: name of the recipe.
        stage: name of the stage.
        model: name of the model's folder.
        device: name of the device.
        device_memory_gib: memory of one device.
        layout: the parallel sizes, with ``data`` and ``recompute``.
        parameters_total: parameters of the complete model.
        parameters_per_rank: ``pp``, ``tp`` and ``count`` of each distinct rank of a replica.
        hf_tensors: comparison of the policy's weight map with the checkpoint (``simulated_ranks.Coverage.compare``).
        critic_tensors: the same for a critic.
        memory_gib: for each distinct rank ``pp``, ``tp``, the fields of ``memory.Memory``, the sum of each phase, and
            ``total``.
        phases: phase of a step → the fields of ``memory.Memory`` that are on the device in it.
        host_gib: phase → name → offloaded tensors on one node's host.
        engine_gib: ``vllm``, ``kv_cache`` and ``reserve`` of one engine's device.
        batch: counts of one update (``fit.batch``): sequences, data-parallel ranks, micro-batches.
        checks: results in the order of the checks.
        proposals: title → overrides that hold. Made where something does not fit, or where ``Settings.nodes`` is set.
        disk_bytes: upper bound of what the run writes.
        cost: lines with an estimate of the GPU hours.
        submit: the command that submits the run, or all stages of its ladder, to Slurm. None for a run without GPUs,
            and in a job.
        seconds: duration of the preflight.
    """

    recipe: str
    stage: str
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
    batch: dict[str, Any] | None = None
    checks: list[Check] = field(default_factory=list)
    proposals: dict[str, list[Proposal]] = field(default_factory=dict)
    disk_bytes: int = 0
    cost: list[str] = field(default_factory=list)
    submit: str | None = None
    seconds: float = 0.0

    def in_state(self, state: str) -> list[str]:
        """The names of the checks in a state."""
        return [check.name for check in self.checks if check.state == state]

    @property
    def ok(self) -> bool:
        """Whether no check fails. Checks that could not be made do not count."""
        return not self.in_state(FAILS)

    @property
    def verdict(self) -> str:
        """How many checks are in each state."""
        hold, fail, unknown = (len(self.in_state(state)) for state in STATES)
        return f"{hold} hold, {fail} fail, {unknown} not checked"

    def check(self, name: str, work: Callable[[], str], needs: Sequence[str] = ()) -> bool:
        """Run one check, record its result, and return whether it holds.

        Args:
            name: of the check.
            work: makes the check. It returns a line that says what was found, raises ValueError or OSError with what to
                change, or raises NotChecked.
            needs: earlier checks that this one depends on. If one of them does not hold, ``work`` is not called and the
                check is recorded as not checked.
        """
        lacking = [need for need in needs if need not in self.in_state(HOLDS)]
        if lacking:
            self.checks.append(Check(name, NOT_CHECKED, f"can be checked when {' and '.join(lacking)} holds"))
            return False
        try:
            result = Check(name, HOLDS, work())
        except NotChecked as reason:
            result = Check(name, NOT_CHECKED, str(reason))
        except (ValueError, OSError) as error:
            result = Check(name, FAILS, str(error))
        self.checks.append(result)
        return result.state == HOLDS

    def skip(self, names: Sequence[str], need: str) -> None:
        """Record checks as not checked because the earlier check ``need`` does not hold."""
        for name in names:
            self.check(name, lambda: "", [need])
