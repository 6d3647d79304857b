"""How often a trained judge finds the label:
``python -m recipes.evaluation.judge_accuracy recipe=ladder_demo stage=judge``.

`vllm serve` serves the verifier's model as in an RL run; the client asks it about ``stage.sft.held_out`` with the
template and the parsing of the verifier. The run's folder gets ``judge.json``.
"""

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig

from recipes.config import Config, parse
from recipes.data import judge_sft
from recipes.data.rows import Row
from recipes.errors import ConfigError
from recipes.evaluation.statistics import mean_interval
from recipes.launch.command_line import from_command_line
from recipes.run import records
from rewards import mixing, settings
from rewards.client import Client
from rewards.serve import ServerDied, Supervisor, replicas
from rewards.verdict import Judgement, Verdict
from rewards.verifiers.served import ServedVerifier


@hydra.main(version_base="1.3", config_path="../../conf", config_name="config")
def main(raw: DictConfig) -> None:
    try:
        report = measure(parse(raw))
    except (ConfigError, ServerDied) as error:
        sys.exit(f"error: {error}")
    low, high = report["accuracy"]["interval"]
    print(f"accuracy {report['accuracy']['mean']:.3f} [{low:.3f}, {high:.3f}] of {report['accuracy']['n']} answers")


def measure(config: Config) -> dict[str, Any]:
    """Start the judge's server where it has no endpoints, ask, stop it and write the report.

    Raises ConfigError when the recipe trains no judge or no verifier asks it, ServerDied.
    """
    sft = config.stage.sft
    if sft.judge is None or sft.held_out is None:
        raise ConfigError("stage.sft.judge, stage.sft.held_out: name the judge's template and its held-out rows")
    found = settings.verifiers(config.rewards)
    name = next((name for name, verifier in found.items() if verifier.template == sft.judge), None)
    if name is None:
        raise ConfigError(f"rewards.verifiers: none has template={sft.judge!r} (stage.sft.judge); add one")
    rows = judge_sft.load_labelled_answers(sft.held_out, judge_sft.find_judge(sft.judge))
    servers = mixing.servers_of([name], config.rewards)
    run_dir = Path(config.run_dir)
    alone = replace(config.rewards, placement=settings.DISAGGREGATED)  # nobody shares its GPUs here
    started = replicas(alone, run_dir / "servers", config.cluster.platform)
    supervisor = Supervisor(
        [replica for replica in started if replica.server.name in servers], config.rewards.supervisor
    )
    try:
        supervisor.start()
        with Client(servers, config.rewards.client) as client:
            verifier = mixing.open_verifiers([name], config.rewards, client)[name]
            assert isinstance(verifier, ServedVerifier)
            asked = [verifier.submit(judge_sft.verifier_row(row), row["answer"]) for row in rows]
            report = compared(rows, [judgement.result() for judgement in asked])
    finally:
        supervisor.stop()
    records.write_json(run_dir / "judge.json", report)
    return report


def compared(rows: Sequence[Row], judgements: Sequence[Judgement]) -> dict[str, Any]:
    """Accuracy with its interval, where an unreadable judgement is a wrong one, and by label {n, right, said}."""
    said = [judgement.label if isinstance(judgement, Verdict) else "unreadable" for judgement in judgements]
    right = [float(label == row["label"]) for label, row in zip(said, rows, strict=True)]
    labels = sorted({row["label"] for row in rows})
    of = {label: [s for s, row in zip(said, rows, strict=True) if row["label"] == label] for label in labels}
    return {
        "accuracy": mean_interval(right),
        "unreadable": said.count("unreadable"),
        "labels": {
            label: {"n": len(found), "right": found.count(label), "said": dict(Counter(found))}
            for label, found in of.items()
        },
    }


if __name__ == "__main__":
    from_command_line(main)
