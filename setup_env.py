"""Makes the environment: ``make env``, which finds a Python and starts this file with it.

It runs before any package is there, with the standard library alone. The environment is always made from nothing, so
that it holds what pins.txt says and no more; with uv's cache that takes seconds.

``transformer_engine_torch``, a package of the extra ``gpu``, is distributed as source and has to be compiled for the
very torch that runs it. That is done once, from the headers that pip brings (a C++ compiler and neither nvcc nor a CUDA
toolkit), and the wheel is kept in wheels/.
"""

import argparse
import ctypes
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent
GIB = 2**30
EXTRAS = ("cpu", "gpu")
DISK_GIB = {"cpu": 10, "gpu": 12}

COMPILED = "transformer-engine-torch"
# What it is compiled with, beside what torch itself depends on. cuda_runtime.h includes headers of crt. nvcc is asked
# for its release only; without pip's the build would ask the site's, whatever release that is.
BUILD_PACKAGES = (
    "torch",
    "nvidia-cuda-crt",
    "nvidia-cuda-cccl",
    "nvidia-cuda-nvcc",
    "ninja",
    "setuptools",
    "packaging",
)
BUILD_VARIABLES = {
    "NVTE_FRAMEWORK": "pytorch",
    # Headers of pip's packages, also where there is a toolkit, which has neither cudnn.h nor nccl.h.
    "NVTE_BUILD_USE_NVIDIA_WHEELS": "1",
    # From the pinned source, instead of a file of the project's release page.
    "NVTE_PYTORCH_FORCE_BUILD": "TRUE",
}
# Files compiled at a time, unless MAX_JOBS is set. Each takes up to 3 GiB of memory, and a login node is shared.
BUILD_JOBS = 8
# Variables by which a site's CUDA toolkit would be found. The job scripts unset them too (slurm/library.sh).
TOOLKIT_VARIABLES = ("CUDA_HOME", "CUDA_PATH")


def read_pins() -> dict[str, str]:
    """Each package's version in pins.txt; setup.py, which needs setuptools, checks the file."""
    lines = (ROOT / "pins.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))


# What can be missing. Each function returns what is wrong and what to do, or None.


def other_extra(environment: Path, extra: str) -> str | None:
    """An environment of another extra is not replaced. Also one whose making was broken off has its record."""
    extras = [path.name.partition("-")[2] for path in environment.glob(".install*-*")]
    if not extras or extras == [extra]:
        return None
    return (
        f"{environment} was made with EXTRA={extras[0]}, and EXTRA={extra} would replace it; remove it first: "
        f"rm -r {environment}"
    )


def full_disk(folder: Path, free: int, needed_gib: int) -> str | None:
    """``free``: bytes free on the folder's disk."""
    if free >= needed_gib * GIB:
        return None
    return f"{free // GIB} GiB free on the disk of {folder}, {needed_gib} GiB are needed; make room and run again"


def no_numa_library() -> str | None:
    try:
        ctypes.CDLL("libnuma.so.1")
    except OSError:
        return "vLLM on a CPU needs the system library libnuma.so.1; on Debian: apt-get install libnuma1"
    return None


def no_compiler(compiler: str) -> str | None:
    """``compiler``: a command that compiles C++, with its options."""
    remedy = "on Debian: apt-get install g++; on a cluster: module load gcc, or name one: CXX=/path/to/g++"
    command = [*shlex.split(compiler), "-std=c++20", "-fsyntax-only", "-x", "c++", "-"]
    try:
        done = subprocess.run(command, input="#include <concepts>\n", capture_output=True, text=True)
    except OSError:
        return f"no C++ compiler ({compiler}); {remedy}"
    if done.returncode:
        reason = done.stderr.strip().partition("\n")[0]
        return f"{compiler} can't compile C++20, in which torch's headers are written ({reason}); {remedy}"
    return None


def no_python_header(folder: Path) -> str | None:
    """``folder``: where this Python's headers should be."""
    if (folder / "Python.h").is_file():
        return None
    return (
        f"no {folder / 'Python.h'}, which Transformer Engine and Triton compile against; on Debian: apt-get install "
        "python3-dev, or name another Python: make env PYTHON=/path/to/python3.12"
    )


def old_driver(driver: tuple[int, int] | None, runtime: str) -> str | None:
    """``driver``: the newest CUDA that NVIDIA's driver runs, None without a driver; ``runtime``: the pinned one."""
    major, minor = map(int, runtime.split(".")[:2])
    if driver is None or driver >= (major, minor):
        return None
    return (
        f"NVIDIA's driver runs CUDA {driver[0]}.{driver[1]} at most, and pins.txt has CUDA {major}.{minor} "
        "(nvidia-cuda-runtime); have the driver updated, or make the environment where there is a newer one"
    )


def driver_cuda() -> tuple[int, int] | None:
    """The newest CUDA that this machine's driver runs, None without a driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    version = ctypes.c_int()
    if driver.cuDriverGetVersion(ctypes.byref(version)) != 0:
        return None
    return version.value // 1000, version.value % 1000 // 10


def missing(extra: str, environment: Path, pins: Mapping[str, str]) -> list[str]:
    """All that this machine lacks for the extra. Nothing has been fetched or removed yet."""
    folder = environment.absolute().parent
    folder.mkdir(parents=True, exist_ok=True)
    faults = [
        other_extra(environment, extra),
        full_disk(folder, shutil.disk_usage(folder).free, DISK_GIB[extra]),
    ]
    if extra == "cpu":
        faults.append(no_numa_library())
    if extra == "gpu":
        driver = driver_cuda()
        if driver is None:
            print("==> no NVIDIA driver here, as on many login nodes: each job checks its nodes' (recipes/node_check)")
        faults += [
            no_compiler(os.environ.get("CXX", "c++")),
            no_python_header(Path(sysconfig.get_path("include"))),
            old_driver(driver, pins["nvidia-cuda-runtime"]),
        ]
    return [fault for fault in faults if fault]


# The installation.

Run = Callable[[list[str], Mapping[str, str]], None]


def run(command: list[str], variables: Mapping[str, str]) -> None:
    """Run a step in the repository. Ends the program with the step's exit code if it fails."""
    environment = {name: value for name, value in os.environ.items() if name not in TOOLKIT_VARIABLES}
    done = subprocess.run(command, cwd=ROOT, env={**environment, **variables})
    if done.returncode:
        sys.exit(done.returncode)


def wheel_folder(pins: Mapping[str, str]) -> Path:
    """Where the compiled package is kept: its name has all that it was compiled for."""
    _, libc = platform.libc_ver()
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    return ROOT / "wheels" / f"{COMPILED}-{pins[COMPILED]}-torch-{pins['torch']}-{python}-glibc-{libc}"


def build_command(python: Path, version: str, folder: Path) -> list[str]:
    """Compile the package with what the environment holds: its torch is the one that will run it.

    pip's own cache is left out: it tells a package's builds for two releases of torch not apart.
    """
    options = [
        "--no-build-isolation",
        "--no-deps",
        "--no-cache-dir",
        "--no-binary",
        COMPILED,
        "--wheel-dir",
        str(folder),
    ]
    return [str(python), "-m", "pip", "wheel", "--disable-pip-version-check", *options, f"{COMPILED}=={version}"]


def build_variables(environment: Path) -> dict[str, str]:
    """The environment's ninja is found first. Files are compiled at a time as there are cores, up to ``BUILD_JOBS``."""
    jobs = min(len(os.sched_getaffinity(0)), BUILD_JOBS)
    programs = f"{environment.absolute() / 'bin'}{os.pathsep}{os.environ['PATH']}"
    return {**BUILD_VARIABLES, "PATH": programs, "MAX_JOBS": os.environ.get("MAX_JOBS", str(jobs))}


def install(extra: str, environment: Path, pins: Mapping[str, str], run: Run = run) -> None:
    """Make the environment step by step. The extra is recorded in it from the first step on."""
    python = environment.absolute() / "bin" / "python"
    run([sys.executable, "-m", "venv", "--clear", str(environment.absolute())], {})
    record = environment / f".installing-{extra}"
    record.touch()
    run(
        [
            str(python),
            "-m",
            "pip",
            "install",
            "--quiet",
            "--disable-pip-version-check",
            "--constraint",
            "pins.txt",
            "uv",
        ],
        {},
    )
    uv = [str(python.with_name("uv")), "pip", "install", "--python", str(python)]
    uv += ["--constraints", "pins.txt", "--build-constraints", "pins.txt"]
    wheels = []
    if extra == "gpu":
        folder = wheel_folder(pins)
        if not folder.exists():
            run([*uv, *BUILD_PACKAGES], {})
            print(f"==> compiling {COMPILED} {pins[COMPILED]}, 20 minutes of one core", flush=True)
            unfinished = folder.with_name(f"{folder.name}.unfinished")
            run(build_command(python, pins[COMPILED], unfinished), build_variables(environment))
            unfinished.rename(folder)
        else:
            print(f"==> {COMPILED} was compiled before, and is taken from {folder.relative_to(ROOT)}", flush=True)
        wheels = [str(path) for path in folder.glob("*.whl")]
    run([*uv, "-e", f".[{extra},dev]", *wheels], {})
    if extra == "gpu":
        run([str(python), str(ROOT / "setup_env.py"), "--check-imports"], {})
    record.rename(environment / f".installed-{extra}")


# What was installed.


def loaded_folders(library: str, maps: Iterable[str]) -> set[str]:
    """The folders of a library's files in a process; ``maps``: the lines of its /proc/PID/maps."""
    paths = (line.split(maxsplit=5)[-1].strip() for line in maps)
    return {os.path.dirname(path) for path in paths if re.match(rf"{library}\w*\.so", os.path.basename(path))}


def check_imports() -> None:
    """Import what the trainer and the engines use, as they do, and look which cuDNN that has loaded.

    It runs in the environment that was made. No driver is needed.
    """
    spec = importlib.util.find_spec("nvidia.cudnn")
    assert spec is not None and spec.submodule_search_locations
    (own,) = spec.submodule_search_locations
    os.environ["CUDNN_HOME"] = own  # as megatron_ext/platform/cuda.py
    for name in ("torch", "transformer_engine.pytorch", "megatron.core.extensions.transformer_engine", "vllm"):
        importlib.import_module(name)
    loaded = loaded_folders("libcudnn", Path("/proc/self/maps").read_text().splitlines())
    if loaded != {f"{own}/lib"}:
        sys.exit(f"error: cuDNN was loaded from {', '.join(sorted(loaded)) or 'nowhere'}, and not from {own}/lib alone")
    print(f"==> torch, Transformer Engine, Megatron-Core and vLLM are imported; one cuDNN, {own}/lib")


def size_gb(folder: Path) -> float:
    """What the files of a folder take on the disk."""
    return sum(path.lstat().st_blocks * 512 for path in folder.rglob("*")) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description="Makes the environment; see `make env`.")
    parser.add_argument("--extra", choices=EXTRAS, default="cpu", help="what the machine computes with")
    parser.add_argument("--venv", type=Path, default=Path(".venv"), help="the environment's folder")
    parser.add_argument(
        "--check-imports", action="store_true", help="import what this Python's environment holds, only"
    )
    arguments = parser.parse_args()
    if arguments.check_imports:
        check_imports()
        return
    pins = read_pins()
    faults = missing(arguments.extra, arguments.venv, pins)
    for fault in faults:
        print(f"error: {fault}", file=sys.stderr)
    if faults:
        sys.exit(1)
    begin = time.monotonic()
    print(
        f"==> Python {platform.python_version()} ({sys.executable}): making {arguments.venv} with "
        f".[{arguments.extra},dev]; minutes the first time",
        flush=True,
    )
    install(arguments.extra, arguments.venv, pins)
    minutes = (time.monotonic() - begin) / 60
    print(f"==> {arguments.venv} is ready: {size_gb(arguments.venv):.1f} GB, {minutes:.1f} minutes")


if __name__ == "__main__":
    main()
