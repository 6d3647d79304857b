"""Export a checkpoint of a run as a Hugging Face folder: ``python -m recipes.export run=FOLDER [step=N] [to=FOLDER]``.

FOLDER is the folder of a run, or of its part ``warm_start``. By default the newest checkpoint is exported, to
``FOLDER/export/step_…``. The export has the same bits as the run's own export. The program is one process without GPUs,
which needs little memory whatever the model's size (``megatron_ext.checkpoint_export``).
"""

import sys
from pathlib import Path

from recipes.command_line import split_arguments
from recipes.run.display import Display
from recipes.run.logs import quiet

USAGE = "usage: python -m recipes.export run=FOLDER [step=N] [to=FOLDER]    for example run=runs/demo"


def main() -> None:
    """Command line: export a checkpoint."""
    own, others = split_arguments(sys.argv[1:], ("run", "step", "to"))
    if "run" not in own or others:
        sys.exit(USAGE)
    with quiet():
        from megatron_ext.checkpoint import CheckpointError
        from recipes.run import exports
    try:
        checkpoint = exports.find_checkpoint(Path(own["run"]), own.get("step"))
        target = Path(own["to"]) if "to" in own else exports.default_target(checkpoint)
        with Display() as display, display.stage(f"export: {checkpoint} to {target}"):
            exports.export(checkpoint, target)
    except (ValueError, CheckpointError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
