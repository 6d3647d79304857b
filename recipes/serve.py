"""A page to talk to a model, to read and edit its thinking, and to go on from the edit: ``python -m recipes.serve …``.

- ``model=FOLDER``: a Hugging Face folder. `vllm serve` is started for it here and ends with the page;
- ``run=FOLDER [step=N]``: a run's model, or its checkpoint after N steps, which is exported first (``recipes.export``);
- ``generator=URL``: a `vllm serve` that is running already. With ``run=FOLDER`` too, it serves that run's model.

``values=URL`` is a `vllm serve --runner pooling` with a value model. With it, answers have a value per sentence and are
guided by the settings ``guidance.…``. ``search=PATH`` is a corpus or a folder of texts. With it, the page has a switch
for deliberate search in these texts. A run that was trained in a search environment brings its own environment.
Further arguments override ``page.…``, ``guidance.…``, ``deliberation.…`` and ``rollout.environment.…``
(docs/configuration.md).
"""

import getpass
import os
import secrets
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from megatron_ext import settings as house_settings
from recipes.command_line import CONF, one_line, split_arguments
from recipes.errors import ConfigError
from recipes.evaluate import run_model
from recipes.page import settings
from recipes.page.scores import response_verifiers
from recipes.page.settings import Setup
from recipes.run.logs import quiet
from rewards.serve import JudgeServer, ServerDied, Stopped, Supervisor, running, stop_on_signals
from rewards.settings import Server, SupervisorConfig
from rewards.verdict import Verifier
from rollout.deliberation import settings as deliberation_settings
from rollout.environment import Unavailable
from rollout.guidance import settings as guidance_settings
from rollout.guidance.clients import GeneratorFailed, ValuesUnavailable
from rollout.guidance.settings import MONITOR, GuidanceConfig
from rollout.settings import RolloutConfig

OWN = ("run", "step", "model", "generator", "values", "search")
SOURCES = (["run"], ["model"], ["generator"], ["run", "generator"])
ENVIRONMENT = "rollout.environment."
USAGE = """usage: python -m recipes.serve model=FOLDER [values=URL] [search=PATH] [page.field=value …]
       python -m recipes.serve run=FOLDER [step=N] [values=URL] [search=PATH] [page.field=value …]
       python -m recipes.serve generator=URL [run=FOLDER] [values=URL] [search=PATH] [page.field=value …]"""
MODEL_TOKEN = "SAFEWORK_PAGE_MODEL_TOKEN"  # environment variable with the token of the model's server
LOWEST = -1e6  # a threshold that is below every value
STOP_SECONDS = 20.0


def main() -> None:
    """Command line: serve the page until SIGTERM or Ctrl-C."""
    own, overrides = split_arguments(sys.argv[1:], OWN)
    sources = [name for name in ("run", "model", "generator") if name in own]
    if sources not in SOURCES or ("step" in own and sources != ["run"]):
        sys.exit(USAGE)
    with quiet():
        from megatron_ext.checkpoint import CheckpointError
        from recipes.page.app import serve_page
    stop_on_signals()
    try:
        setup = read_setup(own, overrides)
        with served(setup, own) as supervisor:
            serve_page(setup, supervisor)
    except (ValueError, CheckpointError, ServerDied, GeneratorFailed, ValuesUnavailable, Unavailable, OSError) as error:
        sys.exit(f"error: {error}")
    except Stopped:
        pass


def read_setup(own: Mapping[str, str], overrides: Sequence[str]) -> Setup:
    """Read the settings of the command line. Raises ConfigError and ValueError before anything is started."""
    free = [*house_settings.mappings(GuidanceConfig, "guidance"), *house_settings.mappings(RolloutConfig, "rollout")]
    with_keys = house_settings.with_new_keys(overrides, free)
    try:
        with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
            raw = compose("serve", overrides=with_keys)
    except HydraException as error:
        raise ConfigError(one_line(error)) from error
    page = settings.read(raw.page)
    guidance = raw.guidance
    for name in ("generator", "values"):
        if name in own:
            guidance[name].address = own[name].rstrip("/")
    if "model" in own and not (Path(own["model"]) / "config.json").is_file():
        raise ConfigError(f"model={own['model']}: no config.json there; give a Hugging Face folder")
    verifiers: dict[str, Verifier] = {}
    environment = raw.rollout.environment
    searches = "search" in own
    if "run" in own:
        from recipes.run.exports import read_config

        config = read_config(Path(own["run"]))
        verifiers = response_verifiers(config)
        if not any(override.startswith("guidance.thinking_marks") for override in overrides):
            guidance.thinking_marks = config["rollout"]["thinking_marks"]
        if config["rollout"]["environment"]["name"] is not None:
            searches = True
            changes = [override for override in overrides if override.startswith(ENVIRONMENT)]
            environment = run_environment(config["rollout"]["environment"], changes)
    if "search" in own:
        environment.settings.corpus = own["search"]
        environment.settings.endpoint = None
    if guidance.mode == MONITOR and guidance.calibration is None and guidance.threshold is None:
        # Values are shown only and do not guide the answer.
        guidance.threshold = LOWEST
    edits = Path(page.edits or Path(own.get("run", "runs")) / "edits")
    # A person who reaches a loopback page without a token is most likely the one who started it.
    person = getpass.getuser() if page.key_variable is None else ""
    token = guidance_settings.key("page", page.key_variable)
    return Setup(
        page=page,
        guidance=guidance_settings.read(guidance),
        has_values="values" in own,
        edits=edits,
        person=person,
        token=token,
        verifiers=verifiers,
        deliberation=deliberation_settings.read(raw.deliberation) if searches else None,
        environment=deliberation_settings.read_environment(environment) if searches else None,
    )


def run_environment(of_run: Mapping[str, Any], changes: Sequence[str]) -> DictConfig:
    """A run's environment, with the command line's overrides applied."""
    changed = OmegaConf.from_dotlist([change.removeprefix(ENVIRONMENT) for change in changes])
    merged = OmegaConf.merge(OmegaConf.create(dict(of_run)), changed)
    assert isinstance(merged, DictConfig)
    return merged


@contextmanager
def served(setup: Setup, own: Mapping[str, str]) -> Iterator[Supervisor]:
    """Start `vllm serve` for the model and set its address in the guidance. With ``generator=URL`` nothing is started.

    The server has a random token, so that other users of this machine can't use the model without the page's token.

    Raises ConfigError, CheckpointError and ServerDied.
    """
    servers = []
    page = setup.page
    if "generator" not in own:
        os.environ[MODEL_TOKEN] = secrets.token_hex(32)
        model = Path(own["model"]) if "model" in own else run_model(Path(own["run"]), own.get("step"))
        server = Server(
            model=str(model.absolute()),
            hub=None,
            runner="generate",
            endpoints=[],
            key_variable=MODEL_TOKEN,
            host="127.0.0.1",
            port=free_port(),
            replicas=1,
            tensor=max(len(page.devices), 1),
            arguments=page.arguments,
            name="page",
        )
        log = setup.edits.parent / "servers" / "page.log"
        servers.append(JudgeServer(server, 0, log, page.devices or None, []))
        setup.guidance.generator.address = server.addresses[0]
        setup.guidance.generator.key_variable = MODEL_TOKEN
        print(f"starting vLLM with {model}; its log is {log}", flush=True)
    limits = SupervisorConfig(page.startup_timeout, STOP_SECONDS, restarts=0, first_device=0, cpu_arguments=[])
    with running(servers, limits) as supervisor:
        yield supervisor


def free_port() -> int:
    """A port of the loopback interface that is free at present."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


if __name__ == "__main__":
    main()
