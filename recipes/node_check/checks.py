"""The checks of a node. Each takes the values that were read as arguments, so that it can be called with any values.

A check returns one line that says what it found. It raises Bad with what is wrong and what to do, or NotChecked if
there is nothing to look at.
"""

import glob
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

GIB = 2**30
MIB = 2**20
# Fields of `nvidia-smi --query-gpu`, in the order of `Gpu`'s attributes.
QUERY = (
    "index",
    "name",
    "driver_version",
    "memory.total",
    "memory.free",
    "ecc.errors.uncorrected.volatile.total",
    "remapped_rows.pending",
    "remapped_rows.failure",
)
# What nvidia-smi prints for a field that a GPU does not have: [N/A], [Not Supported].
ABSENT = "["
# Environment variables with folders in which Transformer Engine looks for cuDNN before it takes pip's, in this order.
# It also looks in LD_LIBRARY_PATH (transformer_engine/common/__init__.py, _load_cuda_library_from_system).
CUDNN_FOLDERS = ("CUDNN_HOME", "CUDNN_PATH", "CUDA_HOME", "CUDA_PATH")
DEFAULT_TOOLKIT = "/usr/local/cuda"
CUDNN = "libcudnn.so"
# A memory limit of this size or more means no limit: cgroup v1 then has the largest number of pages.
UNLIMITED = 2**60


class Bad(Exception):
    """The node is not fit for the job. The text says why and what to do."""


class NotChecked(Exception):
    """There is nothing to look at. The text says what is missing."""


@dataclass(frozen=True)
class Gpu:
    """A line of `nvidia-smi --query-gpu`. Memory is in MiB. A field that the GPU does not report is None."""

    index: int
    name: str
    driver: str
    total: float
    free: float
    uncorrected_errors: int | None
    pending_rows: str | None
    failed_rows: str | None


def parse_gpus(text: str) -> list[Gpu]:
    """The GPUs of `nvidia-smi --query-gpu=… --format=csv,noheader,nounits` with the fields of ``QUERY``.

    Raises Bad for a line of another form. nvidia-smi reports a GPU that it can't reach in such a line.
    """
    gpus = []
    for line in filter(None, map(str.strip, text.splitlines())):
        values = [value.strip() for value in line.split(",")]
        if len(values) != len(QUERY) or not values[0].isdigit():
            raise Bad(f"nvidia-smi: {line}; reset the GPU or reboot the node")
        index, name, driver, total, free, errors, pending, failed = values
        if total.startswith(ABSENT) or free.startswith(ABSENT):
            raise Bad(f"nvidia-smi: GPU {index} reports no memory; reset the GPU or reboot the node")
        gpus.append(
            Gpu(
                index=int(index),
                name=name,
                driver=driver,
                total=float(total),
                free=float(free),
                uncorrected_errors=None if errors.startswith(ABSENT) else int(errors),
                pending_rows=None if pending.startswith(ABSENT) else pending,
                failed_rows=None if failed.startswith(ABSENT) else failed,
            )
        )
    return gpus


def driver(gpus: Sequence[Gpu], least: int) -> str:
    """Check that NVIDIA's driver can run the environment's version of CUDA."""
    version = gpus[0].driver
    if int(version.partition(".")[0]) < least:
        raise Bad(f"driver {version}: CUDA 13 needs {least} or newer; have it updated, or use other nodes")
    return f"driver {version}"


def gpu_count(gpus: Sequence[Gpu], needed: int) -> str:
    """Check that at least ``needed`` GPUs are seen."""
    if len(gpus) < needed:
        seen = ", ".join(str(gpu.index) for gpu in gpus) or "none"
        raise Bad(f"{len(gpus)} of {needed} GPUs are seen ({seen}); give --gpus-per-node, or have the node looked at")
    return f"{len(gpus)} x {gpus[0].name}"


def gpu_memory(gpus: Sequence[Gpu], least_share: float) -> str:
    """Check that at least ``least_share`` of each GPU's memory is free."""
    used = [gpu for gpu in gpus if gpu.free < least_share * gpu.total]
    if used:
        shown = ", ".join(f"GPU {gpu.index} {(gpu.total - gpu.free) / 1024:.1f} GiB" for gpu in used)
        raise Bad(f"memory is in use: {shown}; end what an earlier job left there: nvidia-smi --query-compute-apps=pid")
    free = min(gpu.free for gpu in gpus)
    return f"{free / 1024:.1f} GiB free on each"


def gpu_errors(gpus: Sequence[Gpu]) -> str:
    """Check that no GPU has uncorrected ECC errors, or memory rows that wait to be remapped or could not be."""
    if all(gpu.uncorrected_errors is None for gpu in gpus):
        raise NotChecked("the GPUs report no ECC errors")
    faults = []
    for gpu in gpus:
        if gpu.uncorrected_errors:
            faults.append(f"GPU {gpu.index} has {gpu.uncorrected_errors} uncorrected ECC errors")
        if gpu.pending_rows in ("Yes", "1"):
            faults.append(f"GPU {gpu.index} has memory rows to be remapped at its next reset")
        if gpu.failed_rows in ("Yes", "1"):
            faults.append(f"GPU {gpu.index} could not remap a memory row")
    if faults:
        raise Bad(f"{', '.join(faults)}; have the GPU reset or replaced")
    return "no uncorrected ECC errors"


def peer_access(matrix: str) -> str:
    """Check that each pair of GPUs can read each other's memory, from the matrix of `nvidia-smi topo -p2p r`.

    NCCL needs it for NVLink, and an engine for the trainer's weights.
    """
    rows = [line.split() for line in matrix.splitlines() if line.split()[:1] and line.split()[0].startswith("GPU")]
    header = rows[0] if rows else []
    pairs = [row for row in rows[1:] if row[0] in header]
    if not pairs or any(len(row) != len(header) + 1 for row in pairs):
        raise NotChecked("nvidia-smi topo -p2p r shows no matrix")
    broken = [
        f"{row[0]}-{other} {state}"
        for row in pairs
        for other, state in zip(header, row[1:], strict=True)
        if row[0] != other and state != "OK"
    ]
    if broken:
        raise Bad(f"no peer access: {', '.join(broken)}; look at nvidia-smi topo -m, the fabric manager, and IOMMU/ACS")
    return f"peer access between {len(header)} GPUs"


def one_cudnn(environment: Mapping[str, str], toolkit: str = DEFAULT_TOOLKIT, own: str | None = None) -> str:
    """Check that no cuDNN can be found beside torch's own. ``own``: the folder of torch's cuDNN.

    Two versions in a process are an error at best: attention then calls a function that the other one lacks.
    """
    folders = {name: environment[name] for name in CUDNN_FOLDERS if environment.get(name)}
    places = [(name, f"{folder}/**/{CUDNN}*") for name, folder in folders.items()]
    places.append((toolkit, f"{toolkit}/**/{CUDNN}*"))
    for folder in filter(None, environment.get("LD_LIBRARY_PATH", "").split(":")):
        places.append(("LD_LIBRARY_PATH", f"{folder}/{CUDNN}*"))
    foreign = []
    for name, pattern in places:
        libraries = [path for path in glob.glob(pattern, recursive=True) if "stub" not in path]
        if libraries and not (own and os.path.realpath(libraries[0]).startswith(os.path.realpath(own))):
            foreign.append(f"{libraries[0]} ({name})")
    if foreign:
        raise Bad(
            f"a cuDNN beside torch's: {', '.join(foreign)}; do not load the site's CUDA or cuDNN modules, and unset "
            "the variable that is named"
        )
    return "one cuDNN"


def compiler(which: Callable[[str], str | None], header: Path) -> str:
    """Check that Triton and torch can compile, which needs a C compiler and Python's headers."""
    compiler_path = which("gcc") or which("cc") or which("clang")
    if compiler_path is None:
        raise Bad("no C compiler (gcc, cc, clang) on the PATH, which Triton needs: module load gcc, or install it")
    if not header.is_file():
        raise Bad(
            f"no {header}, which Triton compiles against: install python3-dev, or make the environment with a Python "
            "that brings its headers (make env PYTHON=…)"
        )
    return f"{compiler_path}, Python.h"


def memory_limit(root: Path, cgroups: str) -> int | None:
    """The least memory limit of this process's cgroup and the cgroups above it, in bytes. None without a limit.

    ``root`` is /sys/fs/cgroup, ``cgroups`` the text of /proc/self/cgroup. Versions 1 and 2 of cgroups are read.
    """
    limits = []
    for line in cgroups.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        base, name = (root / "memory", "memory.limit_in_bytes") if controllers else (root, "memory.max")
        folder = base / path.lstrip("/")
        while True:
            file = folder / name
            text = file.read_text().strip() if file.is_file() else "max"
            if text != "max" and int(text) < UNLIMITED:
                limits.append(int(text))
            if folder == base or base not in folder.parents:
                break
            folder = folder.parent
    return min(limits, default=None)


def host_memory(limit: int | None, total: int, least_share: float | None) -> str:
    """Check that the job may use at least ``least_share`` of the node's memory.

    ``limit`` and ``total``: the job's limit (None for none) and the node's memory, in bytes.
    """
    allowed = total if limit is None else min(limit, total)
    if least_share is not None and allowed < least_share * total:
        raise Bad(
            f"the job may use {allowed / GIB:.0f} of the node's {total / GIB:.0f} GiB: submit with --exclusive "
            "--mem=0, or the site's way to all memory (node_check.host_memory_share)"
        )
    return f"{allowed / GIB:.0f} of {total / GIB:.0f} GiB of host memory"


def shared_memory(free: int, least_gib: float) -> str:
    """Check that /dev/shm has enough free memory. ``free``: in bytes."""
    if free < least_gib * GIB:
        raise Bad(f"/dev/shm has {free / GIB:.2f} GiB free, {least_gib:g} are needed: remove what an earlier job left")
    return f"{free / GIB:.0f} GiB in /dev/shm"


def open_files(soft: int, least: int) -> str:
    """Check that a process may open enough files and sockets."""
    if soft < least:
        raise Bad(
            f"a process may open {soft} files, {least} are needed: ulimit -n {least} before sbatch, or limits.conf"
        )
    return f"{soft} open files"


def disk(folder: str, free: int, least_gib: float) -> str:
    """Check that the folder of temporary files has enough free space. ``free``: in bytes."""
    if free < least_gib * GIB:
        raise Bad(
            f"TMPDIR={folder} has {free / GIB:.1f} GiB free, {least_gib:g} are needed: clean it, or another TMPDIR"
        )
    return f"{free / GIB:.0f} GiB in {folder}"


def clock(offset: float, greatest: float) -> str:
    """Check that the node's clock agrees with the first node's. ``offset``: in seconds."""
    if abs(offset) > greatest:
        raise Bad(
            f"the clock is {offset:+.1f} s beside the first node's: have its time service (chrony, ntpd) looked at"
        )
    return f"clock {offset * 1000:+.0f} ms"


def python_header(include: str) -> Path:
    """Python.h in the folder that sysconfig names."""
    return Path(include) / "Python.h"


def has_nvidia_smi() -> bool:
    """Whether NVIDIA's driver is installed."""
    return shutil.which("nvidia-smi") is not None
