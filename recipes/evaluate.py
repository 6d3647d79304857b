"""Evaluate a model as a stage does, and compare it with another: ``python -m recipes.evaluate …``.

- ``run=FOLDER [step=N] [field=value …]``: a run's model, or its checkpoint after N steps, with the run's settings;
- ``run=FOLDER model=FOLDER [field=value …]``: a Hugging Face folder, with a run's settings;
- ``model=FOLDER recipe=… [overrides …]``: a Hugging Face folder, with a recipe's settings.

``against=FOLDER`` is a Hugging Face folder. Its scores on the same prompts are subtracted pair by pair. ``to=FOLDER``
gets ``evaluation.json`` and ``answers.json``, in the same form as in a run. A checkpoint is exported first
(``recipes.export``). vLLM reads the weights, and no trainer starts. Reward servers without endpoints are started, as
for a stage of a pipeline.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import hydra
import yaml
from omegaconf import DictConfig, OmegaConf

from recipes.command_line import CONF, from_command_line, split_arguments
from recipes.config import Config, parse
from recipes.config.stages import WITH_HEAD
from recipes.errors import ConfigError
from recipes.launch.pipeline import run_with_servers
from recipes.run.display import Display
from recipes.run.logs import quiet
from rewards.serve import ServerDied

OWN = ("run", "step", "model", "against", "to")
USAGE = """usage: python -m recipes.evaluate run=FOLDER [step=N] [against=FOLDER] [to=FOLDER] [field=value …]
       python -m recipes.evaluate model=FOLDER run=FOLDER [against=FOLDER] [to=FOLDER] [field=value …]
       python -m recipes.evaluate model=FOLDER recipe=… [against=FOLDER] [to=FOLDER] [overrides …]"""


def main() -> None:
    """Command line: evaluate and exit with the exit code of the evaluation."""
    own, overrides = split_arguments(sys.argv[1:], OWN)
    if ("run" not in own and "model" not in own) or ("step" in own and ("run" not in own or "model" in own)):
        sys.exit(USAGE)
    with quiet():
        from megatron_ext.checkpoint import CheckpointError
    try:
        config = run_config(Path(own["run"]), overrides) if "run" in own else recipe_config(overrides)
        code = evaluate(config, own)
    except (ValueError, CheckpointError, ServerDied, OSError) as error:
        sys.exit(f"error: {error}")
    sys.exit(code)


def run_config(run_dir: Path, overrides: Sequence[str]) -> Config:
    """A run's configuration, with the overrides applied. Raises ConfigError."""
    from recipes.run import exports

    for override in overrides:
        if "=" not in override:
            raise ConfigError(f"{override}: give field=value")
    stored = OmegaConf.create(exports.read_config(run_dir))
    merged = OmegaConf.merge(stored, OmegaConf.from_dotlist(list(overrides)))
    assert isinstance(merged, DictConfig)
    return parse(merged)


def recipe_config(overrides: Sequence[str]) -> Config:
    """The configuration that Hydra composes from the overrides. Raises ConfigError."""
    composed: list[Config] = []

    @hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
    def compose(raw: DictConfig) -> None:
        composed.append(parse(raw))

    sys.argv[1:] = overrides
    from_command_line(compose)
    if not composed:  # a text was printed instead, such as the help
        sys.exit()
    return composed[0]


def evaluate(config: Config, own: Mapping[str, str]) -> int:
    """Evaluate the models that the command line's ``own`` arguments name, with ``config``, and return the exit code.

    Raises ConfigError for a model or settings that can't be evaluated, before anything is written or started. Raises
    ServerDied.
    """
    if set(config.stage.trains).intersection(WITH_HEAD) or config.stage.sft.judge is not None:
        raise ConfigError(
            f"stage {config.stage.name} trains a judge, a reward model or a value model, which answers no prompts; its "
            "run has judge.json (python -m recipes.evaluation.judge_accuracy), reward_model.json or value_model.json"
        )
    for field in ("model", "against"):
        if field in own and not (Path(own[field]) / "config.json").is_file():
            raise ConfigError(f"{field}={own[field]}: no config.json there; give a Hugging Face folder")
    model = Path(own["model"]) if "model" in own else run_model(Path(own["run"]), own.get("step"))
    models = [str(model), *([own["against"]] if "against" in own else [])]
    folder = Path(own["to"]) if "to" in own else default_folder(own.get("run", "runs"), models)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"to={folder}: is there already, and nothing is overwritten; give another folder")
    folder.mkdir(parents=True, exist_ok=True)
    config = replace(
        config,
        run_dir=str(folder),
        resume=False,
        model=replace(config.model, path=str(model)),
        stage=replace(config.stage, evaluates=True),
    )
    (folder / "config.yaml").write_text(yaml.safe_dump(asdict(config), sort_keys=False))
    # Verifiers that only the training uses are not needed.
    scoring = {name: entry for name, entry in config.rewards.verifiers.items() if name in config.data.scores}
    with_scoring = replace(config, rewards=replace(config.rewards, verifiers=scoring))
    command = [sys.executable, "-m", "recipes.evaluate_folders", str(folder), *models]
    return run_with_servers(command, with_scoring)


def run_model(run_dir: Path, step: str | None) -> Path:
    """The Hugging Face folder of a run's checkpoint after ``step`` steps, which is exported where it is not yet.

    Without ``step`` it is the run's own export, or the newest checkpoint of a run that has not finished. Raises
    ConfigError and CheckpointError.
    """
    from recipes.run import exports

    if step is None and (run_dir / "hf" / "config.json").is_file():
        return run_dir / "hf"
    checkpoint = exports.find_checkpoint(run_dir, step)
    target = exports.default_target(checkpoint)
    if not target.is_dir():
        with Display() as display, display.stage(f"export: {target}"):
            exports.export(checkpoint, target)
    return target


def default_folder(parent: str, models: Sequence[str]) -> Path:
    """``evaluations/MODEL`` or ``evaluations/MODEL_against_OTHER`` in the folder of the run, or in runs/."""
    return Path(parent) / "evaluations" / "_against_".join(Path(model).absolute().name for model in models)


if __name__ == "__main__":
    main()
