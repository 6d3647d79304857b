"""Settings of deliberate search at inference. The defaults are in conf/deliberation/.

The environment is the one of training, ``rollout.environment``.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_ext import settings
from megatron_ext.settings import TOKENS, setting
from rollout.guidance.settings import GeneratorConfig, ServerConfig, check_address, check_server
from rollout.settings import EnvironmentConfig

MOST_SAMPLES = 256


@dataclass
class DeliberationConfig:
    """Deliberate search: a served model searches, reads, states a confidence and answers. Several answers vote."""

    generator: GeneratorConfig = setting("who generates: a `vllm serve` of a model that was trained to search")
    tokenizer: str | None = setting("folder of the model's tokenizer; null for the folder that the server names")
    samples: int = setting("answers to a question, which vote", range=f"[1, {MOST_SAMPLES}]")
    weighted: bool = setting("a vote counts as much as the confidence that is stated; false: all count alike")
    certain_from: int = setting("confidence from which an answer is called certain", range="[0, 10]")
    temperature: float = setting("sampling temperature", range="[0, 2]")
    max_tokens: int = setting(
        "longest response with the environment's part; also what a request has that names none",
        range=TOKENS,
        unit="tokens",
    )
    server: ServerConfig = setting("the endpoint")


@dataclass
class AskConfig:
    """Settings that `python -m rollout.deliberation.ask` reads in addition to the group ``deliberation``."""

    question: str = setting("the question")
    seed: int | None = setting("seed of the sampling; null for a new one each time", range="[0, 1e9]")


def read_environment(raw: Mapping[str, Any]) -> EnvironmentConfig:
    """Return the typed, checked group ``rollout.environment`` of a raw configuration. Raises ValueError."""
    environment = settings.read(EnvironmentConfig, "rollout.environment", raw)
    settings.check(environment, "rollout.environment")
    return environment


def read(raw: Mapping[str, Any]) -> DeliberationConfig:
    """Return the typed, checked group ``deliberation`` of a raw configuration. Raises ValueError."""
    config = settings.read(DeliberationConfig, "deliberation", raw)
    settings.check(config, "deliberation")
    check_address("deliberation.generator", config.generator.address)
    check_server("deliberation.server", config.server, config.samples, "samples")
    return config
