"""`make env` names what a machine lacks before it fetches anything, keeps what it compiles, and replaces no environment
of another extra. No test installs or compiles anything."""

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

import setup_env

ROOT = Path(__file__).resolve().parent.parent
PINS = setup_env.read_pins()
FAKE_WHEEL = "made_by_the_fake_builder.whl"


def make(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`make` on a copy of the files that an environment is made from."""
    for name in ("Makefile", "setup.py", "setup_env.py", "pyproject.toml", "pins.txt"):
        shutil.copy(ROOT / name, folder)
    environment = {name: value for name, value in os.environ.items() if name not in ("EXTRA", "MAKEFLAGS")}
    # Where nothing is refused, pip finds no uv, and nothing is installed.
    environment["PIP_NO_INDEX"] = "1"
    return subprocess.run(["make", *arguments], cwd=folder, env=environment, capture_output=True, text=True)


def executable(path: Path, script: str) -> Path:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def test_make_refuses_an_interpreter_that_does_not_run(tmp_path: Path) -> None:
    """A pyenv shim can be on the PATH and fail; the message says what would do."""
    shim = executable(tmp_path / "python3", "echo 'python3.12: command not found' >&2; exit 127")
    done = make(tmp_path, "env", f"PYTHON={shim}")
    assert done.returncode != 0
    assert f"error: no Python 3.12, 3.13 or 3.14 at PYTHON={shim}" in done.stderr
    assert "make env PYTHON=/path/to/python3.12" in done.stderr


def test_make_names_the_missing_system_package(tmp_path: Path) -> None:
    """Debian's python3 comes without ensurepip."""
    script = f'case "$2" in *ensurepip*) exit 1;; *) exec {sys.executable} "$@";; esac'
    done = make(tmp_path, "env", f"PYTHON={executable(tmp_path / 'python3', script)}")
    assert done.returncode != 0 and not (tmp_path / ".venv").exists()
    assert done.stderr.startswith("error: ")
    assert "apt-get install python3-venv" in done.stderr


def test_an_environment_is_not_replaced_by_one_of_another_extra(tmp_path: Path) -> None:
    record = tmp_path / ".venv" / ".installed-gpu"
    record.parent.mkdir()
    record.touch()
    done = make(tmp_path, "env", "EXTRA=cpu", f"PYTHON={sys.executable}")
    assert done.returncode != 0
    expected = "error: .venv was made with EXTRA=gpu, and EXTRA=cpu would replace it; remove it first: rm -r .venv"
    assert expected in done.stderr
    assert record.exists()


@pytest.mark.parametrize("target", ["env", "test", "demo", "gpu-check"])
@pytest.mark.parametrize("record", [".installed-gpu", ".installing-gpu"])
def test_every_target_keeps_the_extra_that_is_there(target: str, record: str, tmp_path: Path) -> None:
    """Also where pins.txt is newer, and where making the environment was broken off."""
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / record).touch()
    os.utime(tmp_path / ".venv" / record, (0, 0))
    done = make(tmp_path, "--dry-run", target)
    assert done.returncode == 0, done.stderr
    assert "setup_env.py --extra gpu --venv .venv" in done.stdout


def test_a_first_environment_is_the_cpu_one_and_the_rehearsal_is_beside_it(tmp_path: Path) -> None:
    assert "setup_env.py --extra cpu --venv .venv" in make(tmp_path, "--dry-run", "env").stdout
    rehearsal = make(tmp_path, "--dry-run", "env-rehearsal").stdout
    assert "setup_env.py --extra gpu --venv build/gpu_env" in rehearsal
    assert "--venv .venv" not in rehearsal


def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path, extra: str) -> str:
    """What the program says that it lacks; nothing is started or made."""
    monkeypatch.setattr(setup_env, "install", lambda *_: pytest.fail("the installation began"))
    monkeypatch.setattr(sys, "argv", ["setup_env.py", "--extra", extra, "--venv", str(folder / ".venv")])
    with pytest.raises(SystemExit) as ended:
        setup_env.main()
    assert ended.value.code == 1
    assert not (folder / ".venv").exists()
    return capsys.readouterr().err


def test_all_that_a_gpu_machine_lacks_is_told_before_anything_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=5 * setup_env.GIB)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(setup_env.sysconfig, "get_path", lambda _: str(tmp_path))
    monkeypatch.setattr(setup_env, "driver_cuda", lambda: (12, 8))
    said = refused(monkeypatch, capsys, tmp_path, "gpu").splitlines()
    assert all(line.startswith("error: ") for line in said)
    needed = setup_env.DISK_GIB["gpu"]
    assert f"5 GiB free on the disk of {tmp_path}, {needed} GiB are needed" in said[0]
    assert "no C++ compiler (no-such-compiler)" in said[1] and "module load gcc" in said[1]
    assert f"no {tmp_path}/Python.h" in said[2] and "python3-dev" in said[2]
    assert "driver runs CUDA 12.8 at most" in said[3]
    assert len(said) == 4


def test_a_cpu_machine_needs_disk_and_vllms_system_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def not_found(name: str) -> None:
        raise OSError(name)

    usage = shutil.disk_usage(tmp_path)._replace(free=5 * setup_env.GIB)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    monkeypatch.setattr(ctypes, "CDLL", not_found)
    disk, library = refused(monkeypatch, capsys, tmp_path, "cpu").splitlines()
    assert f"error: 5 GiB free on the disk of {tmp_path}, 10 GiB are needed" in disk
    assert "libnuma.so.1" in library and "apt-get install libnuma1" in library


def test_an_old_compiler_is_refused_with_its_own_words(tmp_path: Path) -> None:
    old = executable(tmp_path / "g++", "echo \"error: unrecognized option '-std=c++20'\" >&2; exit 1")
    fault = setup_env.no_compiler(str(old))
    assert fault is not None and "can't compile C++20" in fault and "unrecognized option" in fault
    assert setup_env.no_compiler(str(executable(tmp_path / "c++", "grep -q concepts"))) is None


@pytest.mark.parametrize(
    ("driver", "is_old"), [(None, False), ((12, 9), True), ((13, 0), False), ((13, 1), False), ((14, 0), False)]
)
def test_the_driver_runs_the_cuda_of_the_pins(driver: tuple[int, int] | None, is_old: bool) -> None:
    """Without a driver, on a login node, nothing is refused."""
    assert (setup_env.old_driver(driver, "13.0.96") is not None) == is_old


class Steps:
    """Takes the steps of an installation and makes what they would leave, but for what they would install."""

    def __init__(self, environment: Path) -> None:
        self.environment = environment
        self.taken: list[tuple[list[str], Mapping[str, str]]] = []

    def __call__(self, command: list[str], variables: Mapping[str, str]) -> None:
        self.taken.append((command, variables))
        if "venv" in command:
            self.environment.mkdir(exist_ok=True)
        else:
            assert [path.name for path in self.environment.iterdir()] == [".installing-gpu"], "it is recorded at once"
        if "wheel" in command:
            folder = Path(command[command.index("--wheel-dir") + 1])
            folder.mkdir(parents=True)
            (folder / FAKE_WHEEL).touch()


def test_torch_comes_first_then_the_build_then_the_rest_and_the_wheel_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup_env, "ROOT", tmp_path)
    monkeypatch.setenv("MAX_JOBS", "3")
    environment = tmp_path / "env"
    steps = Steps(environment)
    setup_env.install("gpu", environment, PINS, steps)
    commands = [command for command, _ in steps.taken]
    wheel = setup_env.wheel_folder(PINS) / FAKE_WHEEL
    python, uv = str(environment / "bin" / "python"), str(environment / "bin" / "uv")
    pinned = [uv, "pip", "install", "--python", python, "--constraints", "pins.txt", "--build-constraints", "pins.txt"]
    assert commands[0][1:] == ["-m", "venv", "--clear", str(environment)]
    assert commands[1][:4] == [python, "-m", "pip", "install"] and commands[1][-1] == "uv"
    assert commands[2] == [*pinned, *setup_env.BUILD_PACKAGES]
    assert {"torch", "nvidia-cuda-crt", "nvidia-cuda-cccl"} < set(commands[2])
    assert commands[3][:4] == [python, "-m", "pip", "wheel"]
    assert {"--no-build-isolation", "--no-deps", "--no-cache-dir"} < set(commands[3])
    assert commands[3][-1] == f"transformer-engine-torch=={PINS['transformer-engine-torch']}"
    assert commands[4] == [*pinned, "-e", ".[gpu,dev]", str(wheel)]
    assert commands[5][-1] == "--check-imports"
    build = steps.taken[3][1]
    assert build["NVTE_BUILD_USE_NVIDIA_WHEELS"] == "1" and build["MAX_JOBS"] == "3"
    assert build["PATH"].startswith(f"{environment}/bin:")
    assert [path.name for path in environment.iterdir()] == [".installed-gpu"]

    shutil.rmtree(environment)
    again = Steps(environment)
    setup_env.install("gpu", environment, PINS, again)
    assert [command for command, _ in again.taken] == [*commands[:2], *commands[4:]]


def test_another_torch_or_package_is_another_wheel() -> None:
    folders = {setup_env.wheel_folder(PINS | {name: "9.9"}) for name in ("torch", "transformer-engine-torch")}
    assert len(folders | {setup_env.wheel_folder(PINS)}) == 3


def test_the_cpu_environment_is_made_as_before(tmp_path: Path) -> None:
    class CpuSteps(Steps):
        def __call__(self, command: list[str], variables: Mapping[str, str]) -> None:
            self.taken.append((command, variables))
            self.environment.mkdir(exist_ok=True)

    environment = tmp_path / "env"
    steps = CpuSteps(environment)
    setup_env.install("cpu", environment, PINS, steps)
    assert [command[-1] for command, _ in steps.taken] == [str(environment), "uv", ".[cpu,dev]"]
    assert all(variables == {} for _, variables in steps.taken)
    assert [path.name for path in environment.iterdir()] == [".installed-cpu"]


def test_steps_see_no_toolkit_and_their_failure_ends_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_HOME", "/opt/cuda")
    monkeypatch.setenv("CUDA_PATH", "/opt/cuda")
    setup_env.run(["sh", "-c", 'test -z "$CUDA_HOME$CUDA_PATH" && test "$MINE" = 1'], {"MINE": "1"})
    with pytest.raises(SystemExit) as ended:
        setup_env.run(["sh", "-c", "exit 3"], {})
    assert ended.value.code == 3


def test_the_folders_of_a_loaded_library_are_found() -> None:
    maps = [
        "7f0-7f1 r-xp 00000000 fe:00 11 /env/nvidia/cudnn/lib/libcudnn.so.9",
        "7f1-7f2 r-xp 00000000 fe:00 12 /env/nvidia/cudnn/lib/libcudnn_graph.so.9",
        "7f2-7f3 r-xp 00000000 fe:00 13 /opt/my cuda/lib64/libcudnn.so.9.1.0",
        "7f3-7f4 rw-p 00000000 00:00 0",
        "7f4-7f5 r-xp 00000000 fe:00 14 /usr/lib/libc.so.6",
    ]
    assert setup_env.loaded_folders("libcudnn", maps) == {"/env/nvidia/cudnn/lib", "/opt/my cuda/lib64"}
