"""What GPU checks found: a JSON file for each rung of docs/gpu_checks.md, which ``recipes.preflight.calibrate`` reads.

``{check: {"outcome", "seconds", "date", "source", "machine", "versions", "driver", "figures"}}``. A check that runs
again replaces its own entry alone, so each entry says by which code and on which machine it was made.
"""

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.figures import source
from megatron_ext.platform import cuda
from recipes.node_check import __main__ as node_check
from recipes.node_check import checks
from recipes.run import records


def add(
    file: Path,
    check: str,
    outcome: str,
    seconds: float,
    figures: Mapping[str, object],
    environment: Mapping[str, Any] | None = None,
) -> None:
    """Write a check's entry.

    Args:
        file: of the rung; made if absent.
        check: pytest's name of the check, without folders.
        outcome: pytest's.
        seconds: that the check took without its fixtures.
        figures: name, with its unit, → what was measured.
        environment: of the run that was checked, as in its environment.json; None for this process's.
    """
    if environment is None:
        environment = {**records.environment(cuda.machine(), processes=1), "driver": driver()}
    entries = json.loads(file.read_text()) if file.exists() else {}
    entries[check] = {
        "outcome": outcome,
        "seconds": round(seconds, 1),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "source": source(module=None),
        **environment,
        "figures": figures,
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    records.write_json(file, entries)


def driver() -> str | None:
    """The version of NVIDIA's driver, None where there is no nvidia-smi."""
    if not checks.has_nvidia_smi():
        return None
    return node_check.nvidia_smi("--query-gpu=driver_version", "--format=csv,noheader").split()[0]
