"""``python -m recipes.preflight recipe=… [overrides…] [preflight.output=FILE.json]``: is this run possible?

It needs no GPU and no weights. It builds the Megatron-Core model of each distinct rank without memory, compares its
parameters with transformers' model tensor by tensor, adds up the memory, and checks what else would end a job at its
first step.

A check holds, or fails and says what to change, or could not be made here and says how to make it. The exit code is 1
if a check fails. ``stage=ladder`` checks all stages. A stage whose predecessor has not run is checked with the model
that the first stage starts from. ``preflight=h200`` (a file of conf/preflight/) chooses another device.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import hydra
from hydra import compose
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from recipes.command_line import from_command_line, with_group
from recipes.config import Config, parse
from recipes.preflight import memory_plan, stages, submission, view
from recipes.preflight.checks import examine
from recipes.preflight.report import HOLDS, Report, Settings
from recipes.run.logs import quiet


@hydra.main(version_base="1.3", config_path="../../conf", config_name="config")
def main(raw: DictConfig) -> None:
    """Run the checks of each stage, write the report and print it."""
    settings = Settings(**OmegaConf.to_container(raw.preflight))  # type: ignore[arg-type]
    if submission.in_job():
        node_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / memory_plan.GIB
        settings = replace(settings, host_memory_gib=min(settings.host_memory_gib, node_gib))
    reports = []
    with view.progress() as say, quiet():
        command_line = HydraConfig.get().overrides.task
        for arguments in stages.launches(raw, command_line):
            reports.append(report_of(arguments, command_line, settings, say))
    if settings.output:
        content = asdict(reports[0]) if len(reports) == 1 else {r.stage: asdict(r) for r in reports}
        Path(settings.output).parent.mkdir(parents=True, exist_ok=True)
        Path(settings.output).write_text(json.dumps(content, indent=2) + "\n")
    view.show(reports)
    sys.exit(0 if all(report.ok for report in reports) else 1)


def report_of(arguments: list[str], command_line: list[str], settings: Settings, say: Callable[[str], None]) -> Report:
    """The report of one launch of the command line. ``arguments``: the overrides of this launch."""
    started = time.monotonic()
    run = compose("config", overrides=arguments)
    # In a job, the model of an earlier stage has to exist. Before, the base model stands in for it.
    stand_in = None if submission.in_job() else stages.base_model(run, command_line)
    report = examine(run, settings, say, stand_in)
    if "nodes" in report.in_state(HOLDS):
        add_submission(report, parse(run), command_line, say)
    report.seconds = round(time.monotonic() - started, 1)
    return report


def add_submission(report: Report, config: Config, command_line: list[str], say: Callable[[str], None]) -> None:
    """Add the command that submits the run, and check that Slurm would take it. A run without GPUs needs none."""
    if not submission.needs_slurm(config):
        return

    def slurm() -> str:
        command = submission.submission(config, report.recipe, command_line)
        of_ladder = "stage=ladder" in command_line
        report.submit = submission.ladder_command(command, report.recipe, command_line) if of_ladder else str(command)
        return submission.ask_slurm(command)

    say("Slurm")
    report.check("slurm", slurm)


if __name__ == "__main__":
    sys.argv[1:] = with_group(sys.argv[1:], "preflight", "h100")
    from_command_line(main)
