"""Transformer Engine's Python part and the sources of its compiled part, in versions from pins.txt, without a GPU.

They lie in ``build/transformer_engine``, beside the environment and not in it: the CPU environment has no Transformer
Engine, and that is how all other tests run. The first use fetches them, 2 MB.
"""

import fcntl
import runpy
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PINS: dict[str, str] = runpy.run_path(str(ROOT / "setup.py"), run_name="setup")["read_pins"](ROOT / "pins.txt")
PYTHON = "transformer-engine"  # without its kernels, which are another package's
COMPILED = "transformer-engine-torch"  # distributed as source
VERSION = PINS[PYTHON]
FOLDER = ROOT / "build" / "transformer_engine" / VERSION


def site() -> Path:
    """The folder from which ``transformer_engine`` is imported. Raises RuntimeError if it can't be fetched."""
    return _fetched(FOLDER) / "site"


def sources() -> Path:
    """The unpacked source distribution of ``transformer_engine_torch``. Raises RuntimeError if it can't be fetched."""
    return _fetched(FOLDER) / "sources"


def _fetched(folder: Path) -> Path:
    """The folder with both, fetched by the first process that asks."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            unfinished = folder.with_name(f"{folder.name}.unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            _fetch(unfinished)
            unfinished.rename(folder)
    return folder


def _fetch(folder: Path) -> None:
    uv = Path(sys.executable).with_name("uv")
    target = ("--python", sys.executable, "--target", str(folder / "site"), "--no-deps")
    _run(str(uv), "pip", "install", *target, f"{PYTHON}=={PINS[PYTHON]}")
    # uv can't download without building.
    options = ("--no-deps", "--no-binary", ":all:", "--no-build-isolation", "--disable-pip-version-check")
    _run(sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), f"{COMPILED}=={PINS[COMPILED]}")
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        packed.extractall(folder, filter="data")
    archive.unlink()
    (unpacked,) = folder.glob("transformer_engine_torch-*")
    unpacked.rename(folder / "sources")


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode != 0:
        raise RuntimeError(
            f"the rehearsal of the GPU needs Transformer Engine {VERSION} in {FOLDER.relative_to(ROOT)}, 2 MB that its "
            "first use fetches from the package registry. This failed; run it once with a network, or copy that "
            f"folder:\n{' '.join(command)}\n{done.stdout}{done.stderr}"
        )


if __name__ == "__main__":
    print(_fetched(FOLDER))
