"""Turn Hydra's composed mapping into the typed, checked configuration."""

import os

from omegaconf import DictConfig

from megatron_ext import resolvers, settings
from recipes.config.checks import check
from recipes.config.schema import Config
from recipes.errors import ConfigError

resolvers.register()


def parse(raw: DictConfig) -> Config:
    """The typed, checked configuration. Raises ConfigError on an unknown key, a missing or an impossible value."""
    try:
        config = settings.read(Config, "", raw)
        # A stage's path is relative to its own folder: ${run_dir}/../sft/hf.
        config.model.path = os.path.normpath(config.model.path)
        check(config)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return config
