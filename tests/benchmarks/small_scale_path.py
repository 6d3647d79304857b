"""``python -m tests.benchmarks.small_scale_path FOLDER`` measures two tiny cases, in a process that may fork ranks."""

import json
import sys
from pathlib import Path

from benchmarks import scale_path

RANKS = (1, 16)  # alone; two replicas on two nodes
SAMPLES = 64
TOKENS = 64


def main() -> None:
    measured = {ranks: scale_path.measure(scale_path.Case(ranks, SAMPLES, TOKENS)) for ranks in RANKS}
    Path(sys.argv[1], "measured.json").write_text(json.dumps(measured))


if __name__ == "__main__":
    main()
