"""Which figures are of the present code: ``make figures`` lists the files of ``benchmarks/results``.

Every file carries the digest of each room of the code that made it (:func:`source`), and is written by the one command
that it names (:func:`write`). A file is stale when a room has changed since, however little, or when it has no digest.
"""

import hashlib
import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from recipes.run import records

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
ROOMS = ("recipes", "megatron_ext", "rollout", "rewards", "conf", "benchmarks")
SUFFIXES = (".py", ".yaml", ".jsonl", ".parquet")  # code, configuration and data
GPU_CHECKS = "gpu"  # the folder of files with an entry for each check, which has its own digests
CURRENT = "current"
NO_DIGEST = "no digest"


def source(root: Path = ROOT) -> dict[str, str]:
    """Room → digest of its code, configuration and data."""
    digests = {}
    for room in ROOMS:
        digest = hashlib.sha256()
        for path in sorted((root / room).rglob("*")):
            if path.suffix in SUFFIXES:
                digest.update(f"{path.relative_to(root)}\0".encode())
                digest.update(hashlib.sha256(path.read_bytes()).digest())
        digests[room] = digest.hexdigest()[:16]
    return digests


def write(path: Path, command: str, made_by: Mapping[str, str], result: Mapping[str, Any]) -> None:
    """Write a file of results with its date and its command.

    ``made_by``: what :func:`source` returned when the command began.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    date = datetime.now(UTC).isoformat(timespec="seconds")
    records.write_json(path, {"date": date, "command": command, "source": made_by, **result})


def state(path: Path, present: Mapping[str, str]) -> str:
    """``CURRENT``, ``NO_DIGEST``, or the rooms that have changed since the file was made.

    ``present``: what :func:`source` returns now.
    """
    results = json.loads(path.read_text())
    parts = list(results.values()) if path.parent.name == GPU_CHECKS else [results]
    if any("source" not in part for part in parts):
        return NO_DIGEST
    changed = [room for room in ROOMS if any(part["source"].get(room) != present[room] for part in parts)]
    return f"changed since: {', '.join(changed)}" if changed else CURRENT


def with_interval(measure: Mapping[str, Any], digits: str = ".3f") -> str:
    """A measure's mean and interval for a table. ``digits``: a format specification, "+.2f" for a difference."""
    low, high = measure["interval"]
    return f"{measure['mean']:{digits}} [{low:{digits}}, {high:{digits}}]"


def main() -> None:
    present = source()
    table = Table("file", "date", "command", "code")
    stale = 0
    paths = sorted(RESULTS.rglob("*.json"))
    for path in paths:
        results = json.loads(path.read_text())
        found = state(path, present)
        stale += found != CURRENT
        table.add_row(str(path.relative_to(RESULTS)), results.get("date", "")[:10], results.get("command", ""), found)
    console = Console()
    console.print(table)
    console.print(f"{stale} of {len(paths)} files are stale: not, or not provably, of the present code")


if __name__ == "__main__":
    main()
