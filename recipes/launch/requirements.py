"""What a run needs beside its settings: rows that fit, parts and verifiers that exist, servers that answer."""

from recipes.config import Config
from recipes.errors import ConfigError


def check_supervised(config: Config) -> None:
    """Read the rows of stages that learn from answers. Raises ConfigError naming file, line and field."""
    from recipes.data.rows import PAIR_FIELDS, load_rows
    from recipes.data.sft_examples import load_sft_rows

    if "sft" in config.stage.trains:
        for path in filter(None, (config.data.sft, config.stage.sft.held_out)):
            load_sft_rows(path, config.stage.sft.judge)
    if "reward_model" in config.stage.trains:
        for path in (config.stage.reward_model.pairs, config.stage.reward_model.held_out):
            load_rows(path, PAIR_FIELDS)


def check_parts(config: Config) -> None:
    """Find the algorithm's parts, the verifiers and the data that the run will ask for.

    Raises ConfigError naming the field.
    """
    from recipes.algorithms.registry import REGISTRY, resolve
    from recipes.data.row_order import curriculum_phases, scheduled
    from recipes.data.rows import load_rows
    from recipes.data.source_spec import source_names
    from rewards import mixing
    from rewards.client import Client
    from rollout.environment import open_environment

    for name in REGISTRY:
        resolve(name, config.algorithm)
    rows = load_rows(config.data.prompts)
    scheduled(rows, curriculum_phases(config.data), 0, config.algorithm.prompts_per_step, config.seed)
    try:
        names = {*mixing.verifier_names(config.rewards.mix), *config.data.scores}
        with Client(mixing.servers_of(names, config.rewards), config.rewards.client) as client:
            verifiers = mixing.open_verifiers(names, config.rewards, client)
        for row in rows:
            mixing.check_row(row, verifiers, config.rewards.mix)
        if (place := config.rollout.environment).name is not None:
            open_environment(place.name, place.settings)
    except ValueError as error:
        where = "" if str(error).startswith("rollout.") else "rewards.mix, data.scores: "
        raise ConfigError(f"{where}{error}") from error
    kinds = set(load_rows(config.data.evaluation).kinds)
    for name, wanted in config.data.scores.items():
        if not kinds.intersection(wanted):
            raise ConfigError(
                f"data.scores.{name}={wanted}: {source_names(config.data.evaluation)} has rows of the kinds "
                f"{sorted(kinds)} only; name one of these or drop the score"
            )


def check_servers(config: Config) -> None:
    """Ask the verifiers' servers and the environment whether they are there. Raises ConfigError naming those that are
    not."""
    from rewards import mixing
    from rewards.client import Client
    from rollout.environment import Unavailable, open_environment

    names = {*mixing.verifier_names(config.rewards.mix), *config.data.scores}
    try:
        with Client(mixing.servers_of(names, config.rewards), config.rewards.client) as client:
            client.check()
        if (place := config.rollout.environment).name is not None:
            open_environment(place.name, place.settings).check()
    except (ValueError, Unavailable) as error:
        raise ConfigError(str(error)) from error
