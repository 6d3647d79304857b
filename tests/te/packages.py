"""Transformer Engine's Python part and the sources of its compiled part, in versions from pins.txt, without a GPU.

They lie in ``build/transformer_engine``, beside the environment and not in it: the CPU environment has no Transformer
Engine, and that is how all other tests run.
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
VERSION = PINS["transformer-engine"]
FOLDER = ROOT / "build" / "transformer_engine" / VERSION
# What `import transformer_engine.pytorch` needs besides the CPU environment, 40 MB. Its kernels are not among it.
IMPORTED = ("transformer-engine", "onnx", "onnx-ir", "onnxscript", "ml-dtypes")
COMPILED = "transformer-engine-torch"  # distributed as source


def site() -> Path:
    """The folder from which ``transformer_engine`` is imported. Raises RuntimeError if it can't be fetched."""
    return _fetched() / "site"


def sources() -> Path:
    """The unpacked source distribution of ``transformer_engine_torch``. Raises RuntimeError if it can't be fetched."""
    return _fetched() / "sources"


def _fetched() -> Path:
    """The folder with both, fetched by the first process that asks."""
    FOLDER.parent.mkdir(parents=True, exist_ok=True)
    with (FOLDER.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not FOLDER.exists():
            unfinished = FOLDER.with_name(f"{VERSION}.unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            _fetch(unfinished)
            unfinished.rename(FOLDER)
    return FOLDER


def _fetch(folder: Path) -> None:
    pinned = [f"{name}=={PINS[name]}" for name in IMPORTED]
    uv = Path(sys.executable).with_name("uv")
    _run(str(uv), "pip", "install", "--python", sys.executable, "--target", str(folder / "site"), "--no-deps", *pinned)
    # uv can't download without building.
    source = f"{COMPILED}=={PINS[COMPILED]}"
    options = ("--no-deps", "--no-binary", ":all:", "--no-build-isolation", "--disable-pip-version-check")
    _run(sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), source)
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
            f"Transformer Engine {VERSION} can't be fetched, which the rehearsal of the GPU needs: "
            f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
        )


if __name__ == "__main__":
    print(_fetched())
