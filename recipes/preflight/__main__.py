"""``python -m recipes.preflight recipe=… [overrides…] [preflight.output=FILE.json]``: is this run possible?

Needs no GPU and no weights. It builds the Megatron-Core model of each distinct rank without memory, compares its
parameters with transformers' model tensor by tensor, adds up the memory, and checks what else would end a job at its
first step. A check that fails says what to change; the exit code is 0 only if all hold. ``preflight=h200`` (a file of
conf/preflight/) chooses another device.
"""

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

import hydra
from omegaconf import DictConfig, OmegaConf

from recipes.command_line import from_command_line
from recipes.preflight import view
from recipes.preflight.checks import examine
from recipes.preflight.report import Settings


def command_line(arguments: list[str]) -> list[str]:
    """The arguments with Hydra's group ``preflight`` added, which the configuration of a run does not have."""
    if any(argument.startswith("preflight=") for argument in arguments):
        return [f"+{a}" if a.startswith("preflight=") else a for a in arguments]
    overrides = (i for i, a in enumerate(arguments) if "=" in a and not a.startswith("-"))
    # Hydra wants all overrides next to each other.
    at = next(overrides, len(arguments))
    return [*arguments[:at], "+preflight=h100", *arguments[at:]]


@hydra.main(version_base="1.3", config_path="../../conf", config_name="config")
def main(raw: DictConfig) -> None:
    """Run the checks, write the report and print it."""
    started = time.monotonic()
    settings = Settings(**OmegaConf.to_container(raw.preflight))  # type: ignore[arg-type]
    run = OmegaConf.masked_copy(raw, [str(key) for key in raw if key != "preflight"])
    with view.progress() as say, view.quiet():
        report = examine(run, settings, say)
    report.seconds = round(time.monotonic() - started, 1)
    if settings.output:
        Path(settings.output).parent.mkdir(parents=True, exist_ok=True)
        Path(settings.output).write_text(json.dumps(asdict(report), indent=2) + "\n")
    view.show(report)
    sys.exit(0 if report.ok else 1)


if __name__ == "__main__":
    sys.argv[1:] = command_line(sys.argv[1:])
    from_command_line(main)
