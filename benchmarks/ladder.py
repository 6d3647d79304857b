"""Times the demo of the ladder, all stages: ``python -m benchmarks.ladder``.

It runs ``python -m recipes.train recipe=ladder_demo`` into ``runs/ladder_demo`` and writes
``benchmarks/results/ladder_demo.json``: each stage's measures and seconds, the judge's accuracy, and the total time.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

import yaml

from benchmarks import figures
from recipes.run import records

RESULT = Path("benchmarks/results/ladder_demo.json")
RUN = Path("runs/ladder_demo")
COMMAND = ["-m", "recipes.train", "recipe=ladder_demo"]


def main() -> None:
    made_by = figures.source("benchmarks.ladder")
    started = time.monotonic()
    subprocess.run([sys.executable, *COMMAND], check=True)
    minutes = (time.monotonic() - started) / 60
    finished_files = sorted(RUN.glob(f"*/{records.FINISHED}"), key=lambda path: path.stat().st_mtime)
    launches = [json.loads(path.read_text()) for path in finished_files]
    first_stage = finished_files[0].parent
    figures.write(
        RESULT,
        "python -m benchmarks.ladder",
        made_by,
        {
            **json.loads((first_stage / "environment.json").read_text()),
            "precision": yaml.safe_load((first_stage / "config.yaml").read_text())["precision"]["name"],
            "minutes": minutes,
            "stage_seconds": {launch["stage"]: launch["seconds"] for launch in launches},
            "judge_accuracy": json.loads((RUN / "judge" / "judge.json").read_text())["accuracy"],
            **json.loads((RUN / "ladder.json").read_text()),
        },
    )
    print(f"the ladder took {minutes:.1f} minutes; {RESULT} has its measures")


if __name__ == "__main__":
    main()
