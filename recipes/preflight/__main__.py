"""``python -m recipes.preflight recipe=… [overrides…] [preflight.output=FILE.json]``: is this run possible?

Needs no GPU and no weights. It builds each distinct rank's Megatron-Core model without memory, compares the weight map
with transformers' own model tensor by tensor, adds up the memory, and checks what else ends a job at its first step.
The exit code is 0 only if every check holds; each one that does not says what to change. ``preflight=h200`` (a file of
conf/preflight/) holds the run against another device.
"""

import json
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import hydra
from omegaconf import DictConfig, OmegaConf

from recipes.command_line import from_command_line
from recipes.preflight import view
from recipes.preflight.checks import examine
from recipes.preflight.report import Settings


def command_line(arguments: list[str]) -> list[str]:
    """The arguments with the Hydra group ``preflight`` added, which the configuration of a run does not have."""
    if any(argument.startswith("preflight=") for argument in arguments):
        return [f"+{a}" if a.startswith("preflight=") else a for a in arguments]
    overrides = (i for i, a in enumerate(arguments) if "=" in a and not a.startswith("-"))
    at = next(overrides, len(arguments))  # beside the others: Hydra wants them in one row
    return [*arguments[:at], "+preflight=h100", *arguments[at:]]


@hydra.main(version_base="1.3", config_path="../../conf", config_name="config")
def main(raw: DictConfig) -> None:
    started = time.monotonic()
    settings = Settings(**OmegaConf.to_container(raw.preflight))  # type: ignore[arg-type]
    run = OmegaConf.masked_copy(raw, [str(key) for key in raw if key != "preflight"])
    with view.progress() as say, quiet():
        report = examine(run, settings, say)
    report.seconds = round(time.monotonic() - started, 1)
    if settings.output:
        Path(settings.output).parent.mkdir(parents=True, exist_ok=True)
        Path(settings.output).write_text(json.dumps(asdict(report), indent=2) + "\n")
    view.show(report)
    sys.exit(0 if report.ok else 1)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep libraries' notes off standard error; they are shown if the block raises."""
    sys.stderr.flush()
    own = os.dup(2)
    with tempfile.TemporaryFile() as notes, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        os.dup2(notes.fileno(), 2)
        try:
            yield
        except BaseException:
            sys.stderr.flush()
            notes.seek(0)
            os.write(own, notes.read())
            raise
        finally:
            sys.stderr.flush()
            os.dup2(own, 2)
            os.close(own)


if __name__ == "__main__":
    sys.argv[1:] = command_line(sys.argv[1:])
    from_command_line(main)
