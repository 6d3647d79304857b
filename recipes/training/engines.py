"""The engines of a node, and the verifiers and the environment that judge and answer their responses."""

from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import AutoTokenizer

from megatron_ext.platform import capabilities
from megatron_ext.precision import DTYPES
from recipes.config import Config, engines_of_a_node, gpus_of_a_node
from recipes.errors import ConfigError
from recipes.run import records
from rewards import registry, settings
from rewards.client import Client
from rewards.verdict import Verifier
from rollout.engine import EngineSettings
from rollout.environment import Turns, open_environment


@dataclass(frozen=True)
class Judging:
    """The verifiers and the environment of responses, on ranks that start engines. Elsewhere all is None or empty."""

    # The client of the verifiers' servers.
    client: Client | None
    verifiers: dict[str, Verifier]
    # The environment that answers responses. None without one.
    turns: Turns | None


def open_judging(config: Config, names: Collection[str], stack: ExitStack) -> Judging:
    """Open the verifiers of these names, the client of their servers, and the environment."""
    client = stack.enter_context(Client(registry.servers_of(names, config.rewards), config.rewards.client))
    if config.rewards.placement == settings.COLOCATED:
        client.sleep(connect_seconds=config.rewards.supervisor.startup_timeout)
    turns = None
    environment = config.rollout.environment
    if environment.name is not None:
        replies = open_environment(environment.name, environment.settings)
        tokenizer = AutoTokenizer.from_pretrained(config.model.path)
        turns = Turns(replies, tokenizer, environment.max_turns, config.rollout.thinking_marks[0])
    return Judging(client, registry.open_verifiers(names, config.rewards, client), turns)


def record_restart(run_dir: Path, engine: str) -> None:
    """Record in events.jsonl that an engine was restarted. Called on the rank that owns the engine."""
    records.event(run_dir, "engine restart", engine=engine)


def engine_settings(config: Config, nodes: int) -> list[EngineSettings]:
    """The settings of each engine of one of the job's nodes.

    Raises ConfigError where the engines can't be distributed over the nodes.
    """
    count = engines_of_a_node(config, nodes)
    shared = EngineSettings(
        rollout=config.rollout,
        model=config.model.path,
        dtype=DTYPES[config.precision.name],
        max_model_len=config.data.max_prompt_tokens + config.rollout.max_response_tokens,
        platform=config.cluster.platform,
        thinking=thinking_marks(config),
    )
    if not capabilities(config.cluster.platform).has_gpus:
        return [shared] * count
    gpus = range(gpus_of_a_node(config, nodes))
    engines = []
    for i in range(count):
        # The GPUs of the engine's workers come first. The engine sees the others to read the trainer's weights there.
        of_workers = [gpu for gpu in gpus if gpu // config.rollout.tensor == i]
        others = [gpu for gpu in gpus if gpu // config.rollout.tensor != i]
        engines.append(replace(shared, devices=(*of_workers, *others)))
    return engines


def thinking_marks(config: Config) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """The token ids of ``rollout.thinking_marks``, or None without a thinking budget.

    Raises ConfigError for a mark without tokens.
    """
    if config.rollout.thinking_budget is None:
        return None
    tokenizer = AutoTokenizer.from_pretrained(config.model.path)
    begin, end = (tuple(tokenizer.encode(mark, add_special_tokens=False)) for mark in config.rollout.thinking_marks)
    if not begin or not end:
        raise ConfigError(
            f"rollout.thinking_marks={config.rollout.thinking_marks}: a mark has no token; give two texts"
        )
    return begin, end
