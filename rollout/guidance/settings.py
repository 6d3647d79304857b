"""Settings of guided decoding. The defaults are in conf/guidance/; docs/guided_decoding.md explains how to combine
them."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from megatron_ext import settings
from megatron_ext.settings import COUNT, SECONDS, TOKENS, setting

MODES = MONITOR, SEARCH = "monitor", "search"
POLICIES = STOP, UNGUIDED = "stop", "unguided"
LOOPBACK = ("127.0.0.1", "localhost", "::1")
# The maximum number of connections that the openai client opens to a server.
MAX_CONNECTIONS = 1000
SCORE = "[-1e6, 1e6]"


@dataclass
class GeneratorConfig:
    """The `vllm serve` that generates."""

    address: str = setting("base address, as http://HOST:PORT")
    key_variable: str | None = setting("environment variable that holds its token; null for no token")
    timeout: float = setting("longest silence", range=SECONDS, unit="seconds")
    retries: int = setting("retries of a request that got no reply", range="[0, 100]")


@dataclass
class ValuesConfig:
    """The `vllm serve --runner pooling` of the value model."""

    address: str = setting("base address, as http://HOST:PORT")
    key_variable: str | None = setting("environment variable that holds its token; null for no token")
    principles: list[str] = setting("names of the value model's outputs, in their order")
    timeout: float = setting("longest wait for values, retries included", range=SECONDS, unit="seconds")
    retries: int = setting("retries of a request that got no reply", range="[0, 100]")
    on_failure: str = setting(
        "without values: stop ends the answer with an error; unguided goes on without, and says so", choices=POLICIES
    )


@dataclass
class CorrectionConfig:
    """Texts that replace a segment below the threshold if no candidate reaches the threshold. Inserted verbatim."""

    thinking: str | None = setting("text where the model thinks; null for none")
    answer: str | None = setting("text where it answers; null for none")
    max_corrections: int = setting("insertions in an answer at most", range="[0, 1e6]")


@dataclass
class ServerConfig:
    """The endpoint that `python -m rollout.guidance.serve` opens."""

    host: str = setting("address that it listens on; any but the loopback needs key_variable")
    port: int = setting("its port", range="[1, 65535]")
    key_variable: str | None = setting("environment variable that holds the token of clients; null for no token")
    max_requests: int = setting("answers under way at once; further requests get status 429", range=COUNT)
    max_request_mib: float = setting("largest request", range="(0, 1e4]", unit="MiB")


@dataclass
class GuidanceConfig:
    """Value-guided decoding of a served model."""

    mode: str = setting(
        "monitor: resample or correct a segment below the threshold; search: choose each among candidates",
        choices=MODES,
    )
    generator: GeneratorConfig = setting("who generates")
    values: ValuesConfig = setting("who scores")
    weights: dict[str, float] = setting("weight of each principle, equal where none is given; their sum is free")
    router: str | None = setting(
        "file of rollout.guidance.fit_router, weights by the query; null for the fixed weights"
    )
    calibration: str | None = setting("file of rollout.guidance.calibrate, with the threshold of monitor")
    threshold: float | None = setting("threshold of monitor where there is no calibration", range=SCORE)
    candidates: int = setting("segments sampled for a choice, for each beam", range="[0, 256]")
    beams: int = setting("search: beginnings of an answer that are kept", range="[1, 256]")
    max_segment_tokens: int = setting("longest segment", range=TOKENS, unit="tokens")
    max_steered: int = setting("monitor: segments of an answer that are steered at most", range="[0, 1e6]")
    budget_tokens: int = setting(
        "tokens generated for an answer, dropped ones too; after them it goes on unguided and says so",
        range=TOKENS,
        unit="tokens",
    )
    max_tokens: int = setting("longest answer; also what a request has that names none", range=TOKENS, unit="tokens")
    thinking_marks: list[str] = setting("texts that begin and end the thinking")
    correction: CorrectionConfig = setting("texts that correct")
    log: str | None = setting("JSON lines to which every decision is appended, text included; null for none")
    server: ServerConfig = setting("the endpoint")


@dataclass
class CalibrateConfig:
    """Settings that `python -m rollout.guidance.calibrate` reads in addition to the group ``guidance``."""

    prompts: str = setting("JSON lines of held-out benign prompts: each has prompt or messages")
    output: str = setting("file to write, which must not exist")
    level: float = setting("share of benign prompts that may be touched", range="(0, 1)")
    temperature: float = setting("sampling temperature of the answers", range="[0, 100]")
    concurrency: int = setting("answers under way at once", range="[1, 1000]")
    seed: int = setting("seed of the answers' sampling", range="[0, 1e9]")


@dataclass
class FitRouterConfig:
    """Settings that `python -m rollout.guidance.fit_router` reads in addition to the group ``guidance``."""

    rows: str = setting("JSON lines: each has prompt or messages, and in label the principle that matters")
    output: str = setting("file to write, which must not exist")
    penalty: float = setting("weight of the squared coefficients", range="(0, 1e6]")
    held_out: float = setting("share of the rows on which the accuracy is measured", range="(0, 1)")
    seed: int = setting("seed of the split", range="[0, 1e9]")


def new_file(field: str, path: str) -> Path:
    """Return the path that ``field`` names. Raises ValueError if it exists, because no file is replaced."""
    if Path(path).exists():
        raise ValueError(f"{field}={path!r}: it exists, and is not replaced; name another file")
    return Path(path)


def read(raw: Mapping[str, Any]) -> GuidanceConfig:
    """Return the typed, checked group ``guidance`` of a raw configuration. Raises ValueError."""
    config = settings.read(GuidanceConfig, "guidance", raw)
    settings.check(config, "guidance")
    check(config)
    return config


def check(config: GuidanceConfig) -> None:
    """Raise ValueError naming the first field whose value can't be combined with the others."""
    check_address("guidance.generator", config.generator.address)
    check_address("guidance.values", config.values.address)
    principles = config.values.principles
    if not principles or len(set(principles)) < len(principles):
        raise ValueError(f"guidance.values.principles={principles}: give each output of the value model a name")
    weights = config.weights
    if weights and (
        set(weights) != set(principles) or min(weights.values()) < 0 or not 0 < sum(weights.values()) < 1e6
    ):
        raise ValueError(
            f"guidance.weights={dict(weights)}: give each of {principles} a weight of 0 or more, one of them above 0"
        )
    if config.mode == MONITOR and (config.threshold is None) == (config.calibration is None):
        raise ValueError(
            f"guidance.calibration={config.calibration!r}, guidance.threshold={config.threshold}: give one of them; "
            "`python -m rollout.guidance.calibrate` writes a calibration"
        )
    corrects = config.correction.max_corrections and (config.correction.thinking or config.correction.answer)
    if config.candidates == 0 and (config.mode == SEARCH or not corrects):
        raise ValueError("guidance.candidates=0: use 1 or more; with mode=monitor a correction would do, too")
    if len(config.thinking_marks) != 2 or not all(config.thinking_marks):
        raise ValueError(f"guidance.thinking_marks={config.thinking_marks}: give what begins and what ends thinking")
    check_server("guidance.server", config.server, max(config.candidates, 1) * config.beams, "candidates and beams")


def is_loopback(host: str) -> bool:
    """Return whether ``host`` is this machine's loopback.

    ``host`` is a name or an address, with or without a port, in the form of a URL or a Host header. Raises ValueError
    for an invalid host.
    """
    name = urlsplit(f"//{host}").hostname
    if name is None:
        return False
    if name == "localhost":
        return True
    try:
        return ip_address(name).is_loopback
    except ValueError:
        return False


def check_address(field: str, address: str) -> None:
    """Raise ValueError if ``address`` is no base address."""
    if not re.fullmatch(r"https?://[^/\s@]+", address):
        raise ValueError(f"{field}.address={address!r}: give http://HOST:PORT or https://HOST, no path")


def check_server(field: str, server: ServerConfig, connections: int, of: str) -> None:
    """Raise ValueError for too many connections, and for a server that others can reach without a token.

    ``connections`` is the number of connections to the generator that one request may need. ``of`` names the settings
    whose product it is.
    """
    in_flight = server.max_requests * connections
    if in_flight > MAX_CONNECTIONS:
        raise ValueError(
            f"{field}.max_requests={server.max_requests}: times {of} these are {in_flight} connections to the "
            f"generator; use {MAX_CONNECTIONS} or fewer"
        )
    if server.host not in LOOPBACK and server.key_variable is None:
        raise ValueError(
            f"{field}.host={server.host!r}: others can reach it there, so it wants a token: set "
            "key_variable to the name of an environment variable that holds one, or use host=127.0.0.1"
        )


def key(path: str, variable: str | None, environment: Mapping[str, str] = os.environ) -> str | None:
    """Return the token in the environment variable, or None if ``variable`` is None.

    Raises ValueError for a variable that is missing or empty.
    """
    if variable is None:
        return None
    if not environment.get(variable):
        raise ValueError(f"{path}.key_variable={variable!r}: no such environment variable, or an empty one; export it")
    return environment[variable]
