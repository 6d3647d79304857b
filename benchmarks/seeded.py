"""Runs a recipe with several seeds. Complete runs of the same code and data can be kept."""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks import figures
from recipes.run import records

PROVENANCE = "provenance.json"  # written last into a run's folder: overrides, source digests and minutes


def run(run_dir: Path, recipe: str, seed: int, *, more: Sequence[str] = (), reuse: bool = False) -> None:
    """Train ``recipe`` with ``seed`` in an empty ``run_dir``. With ``reuse`` a complete run there is kept.

    ``more``: Hydra overrides. A run is complete if it ended with the code, the data and the overrides that a new run
    would have. Raises CalledProcessError if the run fails, and RuntimeError if a source file changed meanwhile.
    """
    source_before = figures.source("recipes.train", Path("."))
    overrides = [f"recipe={recipe}", f"seed={seed}", f"run_dir={run_dir}", *more]
    made_by = {"overrides": overrides, "source": source_before}
    provenance_file = run_dir / PROVENANCE
    if reuse and provenance_file.is_file():
        kept = json.loads(provenance_file.read_text())
        if made_by.items() <= kept.items():
            return
        print(f"{run_dir} is from other code, data or overrides: running it again", flush=True)
    shutil.rmtree(run_dir, ignore_errors=True)
    started = time.monotonic()
    subprocess.run([sys.executable, "-m", "recipes.train", *overrides], check=True)
    minutes = (time.monotonic() - started) / 60
    if figures.source("recipes.train", Path(".")) != source_before:
        raise RuntimeError(f"code or data changed during the run {run_dir}, which makes it worthless: run it again")
    records.write_json(provenance_file, {**made_by, "minutes": minutes})
