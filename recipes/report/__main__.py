"""``python -m recipes.report run=FOLDER``: rebuild the report of a run."""

import sys
from pathlib import Path

from recipes.report.page import write_report


def main() -> None:
    """Command line: print the path of the rebuilt report."""
    folder = sys.argv[1].removeprefix("run=") if len(sys.argv) == 2 else ""
    if not folder or folder.startswith("-"):
        sys.exit("usage: python -m recipes.report run=FOLDER    for example run=runs/demo")
    try:
        print(write_report(Path(folder)))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
