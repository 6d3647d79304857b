"""Explains errors of NCCL, CUDA and gloo by a message that names rank, host, phase and remedy.

:func:`explain` explains an error that is raised in Python. An error that ends the process without Python, as NCCL's
watchdog does, leaves its text and the stacks in the rank's log. :func:`from_logs` explains it from there.
"""

import re
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple


class Cause(NamedTuple):
    """A kind of error, with its meaning and remedy for people."""

    # A regular expression that matches the error's text.
    pattern: str
    meaning: str
    remedy: str


# The patterns match texts of torch 2.13, NCCL 2.29, gloo and the CUDA runtime. More specific ones come first.
CAUSES = (
    Cause(
        r"CUDA out of memory",
        "the GPU's memory is full",
        "lower parallel.micro_batch_tokens or rollout.kv_cache_gib",
    ),
    Cause(
        r"uncorrectable ECC error|uncorrectable NVLink error|GPU has fallen off the bus|hardware stack error",
        "the GPU is broken",
        "exclude the node (sbatch --exclude) and have it looked at; go on with resume=true",
    ),
    Cause(
        r"driver version is insufficient|driver on your system is too old|forward compatibility was attempted"
        r"|provided PTX was compiled",
        "the driver is too old for this CUDA",
        "use nodes with a newer driver; python -m recipes.node_check names the others",
    ),
    Cause(
        r"no kernel image is available",
        "the kernels are not built for this GPU",
        "use an A100, H100 or H200, or another build of torch",
    ),
    Cause(
        r"busy or unavailable|invalid device ordinal|no CUDA-capable device",
        "the rank does not get its GPU",
        "start one rank per GPU; look for processes of earlier jobs: nvidia-smi",
    ),
    Cause(
        r"illegal memory access|unspecified launch failure|misaligned address|device-side assert",
        "a kernel failed",
        "CUDA_LAUNCH_BLOCKING=1 names the kernel; where one node alone fails so, it is its GPU",
    ),
    Cause(
        r"(?:collective operation|Work) timeout|Timed out waiting|timed out after",
        "a rank did not come to an operation of all",
        "read the stacks of the other ranks: one is elsewhere, or slow; raise cluster.timeout if a phase takes so long",
    ),
    Cause(
        r"ncclRemoteError|remote process exited|Connection (?:closed|reset) by peer|Broken pipe|Socket closed",
        "another rank ended, or its network failed",
        "read the log of the rank that failed first",
    ),
    Cause(
        r"ncclSystemError|unhandled system error|ibv_|socketStartConnect|no socket interface|connectFullMesh",
        "the network between nodes failed",
        "check NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME and the fabric's variables in the site file; NCCL_DEBUG=INFO "
        "shows what NCCL chose",
    ),
    Cause(
        r"unhandled cuda error|ncclUnhandledCudaError|ncclInternalError|ncclInvalidUsage|NCCL error",
        "NCCL failed",
        "NCCL_DEBUG=INFO shows why; compare versions and variables on the nodes",
    ),
    Cause(
        r"CUDA error|CUDA driver error|CUBLAS_STATUS|cuDNN error",
        "CUDA failed",
        "CUDA_LAUNCH_BLOCKING=1 names the kernel",
    ),
)
# A file in logs/. The first rank whose error Python reports creates it.
FAILED = "failed"
HEADER = "log of rank"
# A line of torch's C++ log: level (E or F), month and day, time.
LINE = re.compile(r"\[?[EF](\d{4} \d\d:\d\d:\d\d\.\d+)")
FRAME = re.compile(r'File "[^"]*?((?:recipes|megatron_ext|rollout)/[\w/]+\.py)", line (\d+) in (\w+)')
LOOPS = ("recipes/training/rl.py", "recipes/training/supervised.py", "recipes/training/stages.py")
# Functions of these files that are in every stack.
OUTER = ("fit", "run_stage", "train")
TAIL_BYTES = 1 << 20


@dataclass(frozen=True)
class Place:
    """The place of an error."""

    rank: int
    host: str
    # What the rank was doing.
    phase: str


def header(rank: int) -> str:
    """The first line that a launch writes to a rank's log."""
    return f"{HEADER} {rank} on {socket.gethostname()}"


def explain(text: str, place: Place) -> str | None:
    """The message for an error's text, or None for an error that is of neither NCCL, CUDA nor gloo."""
    where = f"rank {place.rank} on {place.host}, in {place.phase}"
    for cause in CAUSES:
        match = re.search(cause.pattern, text)
        if match:
            return f"{where}: {cause.meaning}: {_line_of(text, match)}; {cause.remedy}"
    return None


def _line_of(text: str, match: re.Match[str]) -> str:
    """The line of the match, without the logger's prefix, cut to 200 characters."""
    begin = text.rfind("\n", 0, match.start()) + 1
    end = text.find("\n", match.end())
    line = text[begin : end if end >= 0 else len(text)]
    return re.sub(r"^(?:\[[^\]]*\]:?\s*)+", "", line).strip()[:200]


def from_logs(folder: Path) -> str | None:
    """The message for the earliest error that torch's C++ code wrote to the ranks' logs in the last launch.

    None where there is no such error. Also None where a rank has reported its error from Python, since the errors of
    other ranks follow from it.
    """
    if (folder / FAILED).exists():
        return None
    earliest: tuple[str, str] | None = None
    for path in folder.glob("rank_*.log"):
        text = _last_launch(path)
        for line in text.splitlines():
            stamp = LINE.search(line)
            if stamp is None or (earliest is not None and stamp[1] >= earliest[0]):
                continue
            message = explain(line, _place(path, text))
            if message is not None:
                earliest = (stamp[1], message)
                break
    return earliest[1] if earliest is not None else None


def _last_launch(path: Path) -> str:
    """The end of a log, from the header of the last launch on."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL_BYTES))
        text = file.read().decode(errors="replace")
    return text[max(0, text.rfind(f"{HEADER} ")) :]


def _place(path: Path, text: str) -> Place:
    rank = int(path.stem.removeprefix("rank_"))
    named = re.match(rf"{HEADER} \d+ on (\S+)", text)
    return Place(rank, named[1] if named else "its node", phase_of_stacks(text))


def phase_of_stacks(text: str) -> str:
    """The phase that faulthandler's stacks show: the innermost function that is in a file of a training loop."""
    for file, line, function in FRAME.findall(text):
        if file in LOOPS and function not in OUTER:
            return f"{function} ({file}:{line})"
    return "a phase that its log does not show"
