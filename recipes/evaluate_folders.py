"""Evaluate Hugging Face folders: ``python -m recipes.evaluate_folders FOLDER MODEL [AGAINST]``.

``recipes.evaluate`` starts this program. FOLDER has the ``config.yaml`` and gets the results. Engines with the weights
of MODEL answer the held-out prompts, then engines with those of AGAINST. Verifiers score the answers as in a run.
"""

import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch.distributed as dist
from omegaconf import OmegaConf

from recipes.config import Config, nodes_with_engines, parse
from recipes.data.processor import PromptProcessor
from recipes.data.rows import load_rows
from recipes.evaluation import evaluate
from recipes.evaluation.evaluate import Answers
from recipes.launch.prepare_run import redirect_stderr
from recipes.run import records
from recipes.run.display import Display
from recipes.training.engines import engine_settings, open_judging, record_restart
from recipes.training.held_out import held_out_answers
from recipes.training.rollouts import Rollouts, wait_until_ready
from rewards import settings
from rollout.engine import Engine, EngineError, stop_engines
from rollout.environment import Unavailable


def main() -> None:
    """Command line: evaluate the folders and print the table of results as a run does."""
    folder = Path(sys.argv[1])
    # The names of the two models in a run's evaluation.
    models = dict(zip(("after", "before"), sys.argv[2:], strict=False))
    (folder / "logs").mkdir(exist_ok=True)
    redirect_stderr(folder)
    try:
        config = parse(OmegaConf.load(folder / "config.yaml"))  # type: ignore[arg-type]
        with Display() as display:
            evaluate_folders(config, models, display)
    except (ValueError, EngineError, Unavailable) as error:
        print(f"error: {error}; logs in {folder / 'logs'}", flush=True)
        traceback.print_exc()
        sys.exit(1)


def evaluate_folders(config: Config, models: Mapping[str, str], display: Display) -> None:
    """Evaluate the models, write the results into ``run_dir`` and show them.

    Writes ``answers.json`` and ``evaluation.json``. If "after" has sampled answers, writes them to ``samples.jsonl``.
    ``models`` maps "after" to the model's folder and "before" to the folder of the model to compare it with, if any.
    """
    folder = Path(config.run_dir)
    answers: dict[str, Answers] = {}
    for name, model in models.items():
        of_model = replace(config, model=replace(config.model, path=model))
        with (
            open_rollouts(of_model, folder / "logs" / name, display) as (rollouts, processor),
            display.stage(f"evaluation: {model}"),
        ):
            answers[name] = held_out_answers(of_model, rollouts, processor)
        records.write_json(folder / "answers.json", answers)
    rows = load_rows(config.data.evaluation)
    if evaluate.SAMPLED in answers["after"]:
        records.append_rows(folder / "samples.jsonl", evaluate.sample_lines(rows, answers["after"]))
    in_order = {name: answers[name] for name in evaluate.MODELS if name in answers}
    evaluation = evaluate.report(config.stage.name, rows, list(config.data.scores), in_order)
    evaluation["models"] = {name: heading(Path(models[name])) for name in in_order}
    records.write_json(folder / "evaluation.json", evaluation)
    display.finish(evaluation, folder)


def heading(model: Path) -> str:
    """The last two parts of a folder's path, such as demo/hf and demo/step_000012. A part ``export`` is left out."""
    parts = [part for part in model.absolute().parts if part != "export"]
    return "/".join(parts[-2:])


@contextmanager
def open_rollouts(config: Config, logs: Path, display: Display) -> Iterator[tuple[Rollouts, PromptProcessor]]:
    """Start engines that read the weights of ``model.path`` from its folder, as many as a run has on each of its nodes.

    This is for a process without trainer ranks. The names of the engines' logs begin with ``logs``.
    """
    with ExitStack() as stack:
        judging = open_judging(config, config.data.scores, stack)
        assert judging.client is not None
        judging.client.check()
        if judging.turns is not None:
            judging.turns.environment.check()
        engines: list[Engine] = []
        stack.callback(stop_engines, engines)
        for number, of_engine in enumerate(engine_settings(config, nodes_with_engines(config))):
            log = logs.with_name(f"{logs.name}_engine_{number}.log")
            engines.append(Engine(replace(of_engine, loads_weights=True), log))
        # A group that has only this process.
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        stack.callback(dist.destroy_process_group)
        control = dist.group.WORLD
        assert control is not None
        processor = PromptProcessor(config.model.path, config.data.max_prompt_tokens, config.data.images)
        with display.stage(f"vLLM: engines with the weights of {config.model.path}"):
            wait_until_ready(engines, time.monotonic() + config.rollout.startup_timeout)
        rollouts = Rollouts(
            config=config.rollout,
            seed=config.seed,
            tokenizer=processor.tokenizer,
            engines=engines,
            weight_sync=None,
            control=control,
            node=0,
            nodes=1,
            verifiers=judging.verifiers,
            client=judging.client,
            turns=judging.turns,
            judges_share_gpus=config.rewards.placement == settings.COLOCATED,
            make_room=lambda: None,
            heartbeat=lambda phase: None,
            on_restart=partial(record_restart, Path(config.run_dir)),
        )
        yield rollouts, processor


if __name__ == "__main__":
    main()
