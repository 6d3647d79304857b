"""``python -m tests.benchmarks.small_scale_path FOLDER`` measures tiny cases, in a process that may fork ranks."""

import json
import sys
from pathlib import Path

from benchmarks import scale_path
from benchmarks.scale_path import Case

# One rank alone; two replicas on two nodes, with shorter and with longer samples.
CASES = {"alone": Case(1, 64, 64), "short": Case(16, 64, 64), "long": Case(16, 64, 1024)}
# With images on one rank, and on two replicas.
CASES |= {"images alone": Case(1, 64, 64, 112), "images": Case(16, 64, 64, 112)}


def main() -> None:
    measured = {name: scale_path.measure(case) for name, case in CASES.items()}
    measured["processed alone"] = scale_path.alone(112, 2, 4)
    Path(sys.argv[1], "measured.json").write_text(json.dumps(measured))


if __name__ == "__main__":
    main()
