"""The accuracy of a trained judge on labelled answers:
``python -m recipes.evaluation.judge_accuracy recipe=ladder_demo stage=judge``.

`vllm serve` serves the verifier's model as in an RL run, and the verifier judges the rows of ``stage.sft.held_out``.
The report is ``judge.json`` in the run's folder.
"""

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig

from recipes.command_line import from_command_line
from recipes.config import Config, parse
from recipes.data import judge_sft
from recipes.data.rows import Row
from recipes.errors import ConfigError
from recipes.evaluation.statistics import mean_interval
from recipes.run import records
from rewards import registry, settings
from rewards.client import Client
from rewards.serve import ServerDied, Supervisor, judge_servers
from rewards.verdict import Verdict, VerifierResult
from rewards.verifiers.served import ServedVerifier


@hydra.main(version_base="1.3", config_path="../../conf", config_name="config")
def main(raw: DictConfig) -> None:
    try:
        report = measure(parse(raw))
    except (ConfigError, ServerDied) as error:
        sys.exit(f"error: {error}")
    accuracy = report["accuracy"]
    low, high = accuracy["interval"]
    print(f"accuracy {accuracy['mean']:.3f} [{low:.3f}, {high:.3f}] of {accuracy['n']} answers")


def measure(config: Config) -> dict[str, Any]:
    """Judge the held-out rows, write the report, and return it.

    If the judge's server has no endpoints, it is started before and stopped after that. Raises ConfigError if the
    recipe trains no judge or no verifier uses it, and ServerDied.
    """
    sft = config.stage.sft
    if sft.judge is None or sft.held_out is None:
        raise ConfigError("stage.sft.judge, stage.sft.held_out: name the judge's template and its held-out rows")
    configured = settings.verifiers(config.rewards)
    names = [name for name, verifier in configured.items() if verifier.template == sft.judge]
    if not names:
        raise ConfigError(f"rewards.verifiers: none has template={sft.judge!r} (stage.sft.judge); add one")
    name = names[0]
    rows = judge_sft.load_labelled_answers(sft.held_out, judge_sft.find_judge(sft.judge))
    servers = registry.servers_of([name], config.rewards)
    run_dir = Path(config.run_dir)
    # Nothing else runs on the server's GPUs here.
    rewards = replace(config.rewards, placement=settings.DISAGGREGATED)
    processes = [
        process
        for process in judge_servers(rewards, run_dir / "servers", config.cluster.platform)
        if process.server.name in servers
    ]
    supervisor = Supervisor(processes, rewards.supervisor)
    try:
        supervisor.start()
        with Client(servers, rewards.client) as client:
            verifier = registry.open_verifiers([name], rewards, client)[name]
            assert isinstance(verifier, ServedVerifier)
            futures = [verifier.submit(judge_sft.verifier_row(row), row["answer"]) for row in rows]
            report = accuracy_report(rows, [future.result() for future in futures])
    finally:
        supervisor.stop()
    records.write_json(run_dir / "judge.json", report)
    return report


def accuracy_report(rows: Sequence[Row], results: Sequence[VerifierResult]) -> dict[str, Any]:
    """The accuracy with its interval, and for each label {n, right, said: {the judge's label: count}}.

    ``results`` has the judge's result for each row. A failure counts as wrong, and as the label "unreadable".
    """
    judge_labels = [result.label if isinstance(result, Verdict) else "unreadable" for result in results]
    is_right = [float(label == row["label"]) for label, row in zip(judge_labels, rows, strict=True)]
    by_label: dict[str, list[str]] = {label: [] for label in sorted({row["label"] for row in rows})}
    for judge_label, row in zip(judge_labels, rows, strict=True):
        by_label[row["label"]].append(judge_label)
    return {
        "accuracy": mean_interval(is_right),
        "unreadable": judge_labels.count("unreadable"),
        "labels": {
            label: {"n": len(of_label), "right": of_label.count(label), "said": dict(Counter(of_label))}
            for label, of_label in by_label.items()
        },
    }


if __name__ == "__main__":
    from_command_line(main)
