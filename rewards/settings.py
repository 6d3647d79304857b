"""The settings of the rewards: mixes, verifiers, the verifiers' servers, and the client of these servers.

``recipes.config`` includes :class:`RewardsConfig` as a group. ``rewards.serve`` reads this group without the others.
The defaults are in conf/rewards/base.yaml.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from omegaconf import DictConfig

from megatron_ext import settings
from megatron_ext.settings import COEFFICIENT, FRACTION, FREE, SECONDS, setting

LOOPBACK = ("127.0.0.1", "localhost")
# Arguments of `vllm serve` → the field that sets them. Given directly, they could make a server listen without a token,
# or expose the token.
OWN_ARGUMENTS = {"--host": "host", "--port": "port", "--uds": "host", "--api-key": "key_variable"}
RUNNERS = ("generate", "pooling")
PLACEMENTS = DISAGGREGATED, COLOCATED = "disaggregated", "colocated"
NORMALISATIONS = ("none", "group")
UPDATES = DUAL_ASCENT, MULTIPLICATIVE_WEIGHTS = "dual_ascent", "multiplicative_weights"
# Free-form mappings of the other groups of a run's configuration.
OTHER_MAPPINGS = (
    "algorithm.kwargs",
    "rollout.environment.settings",
    "data.mix",
    "data.scores",
    "stage.value_model.principles",
)
WAIT = "[0, 1e7]"
COUNT = "[0, 1000]"


@dataclass
class ClientConfig:
    """Requests to the servers."""

    concurrency: int = setting("requests in flight per replica", range="[1, 1e6]")
    timeout: float = setting("longest request", range=SECONDS, unit="seconds")
    retries: int = setting(
        "retries of a request after errors and unreadable replies; then the verifier has failed", range=COUNT
    )
    backoff: float = setting(
        "wait before the first retry, doubled each time, times 0.5 to 1.5", range=WAIT, unit="seconds"
    )
    cooldown: float = setting("time without requests to a replica that can't be reached", range=WAIT, unit="seconds")
    outage: float = setting(
        "longest wait for a server that can't be reached; then its requests fail", range=WAIT, unit="seconds"
    )
    hedge_after: float = setting(
        "a request that takes this many times the usual duration is also sent to another replica", range="(1, 1e6]"
    )
    max_failed: float = setting(
        "abort above this share of a step's samples with a failed verdict, of a server or a function", range=FRACTION
    )


@dataclass
class FunctionsConfig:
    """Verifier functions that the user wrote. Each call runs in a separate process, which is killed on a timeout."""

    timeout: float = setting("longest verdict; then it has failed", range=SECONDS, unit="seconds")
    processes: int = setting("processes of a function on each node: calls that run side by side", range="[1, 1000]")


@dataclass
class SupervisorConfig:
    """Servers that `python -m rewards.serve` starts."""

    startup_timeout: float = setting("longest start of a server", range=SECONDS, unit="seconds")
    stop_timeout: float = setting("time from SIGTERM to SIGKILL", range=WAIT, unit="seconds")
    restarts: int = setting("restarts of a server that died; then all stop. None when colocated", range=COUNT)
    first_device: int = setting("the first GPU for servers", range="[0, 1024]")
    cpu_arguments: list[str] = setting("arguments of `vllm serve` where cluster.platform is cpu")


@dataclass
class ConstraintConfig:
    """Keeps a verifier's mean score at or above a floor by a Lagrange multiplier."""

    verifier: str | None = setting("the verifier; null for no constraint")
    update: str = setting("update of the multiplier", choices=UPDATES)
    floor: float = setting("floor of the mean score", range=FRACTION)
    rate: float = setting("of the multiplier's update, times (floor − mean score)", range="(0, 1e6]")
    proportional: float = setting("added to the multiplier, times (floor − mean score); damps it", range=COEFFICIENT)
    initial: float = setting("the multiplier at the first step", range=COEFFICIENT)
    maximum: float = setting("largest multiplier", range=COEFFICIENT)


@dataclass
class VerifierConfig:
    """An entry of ``rewards.verifiers``: a judge (``template`` and ``server``) or a ``rule`` with arguments."""

    template: str | None = setting("a judge's template by name, or the dotted path of the user's own")
    server: str | None = setting("the judge's server: a name of rewards.servers")
    request: dict[str, Any] = setting("further fields of the judge's requests")
    rule: str | None = setting("a rule by name, or the dotted path of the user's own function")
    arguments: dict[str, Any] = setting("keyword arguments of the rule's function")


# The values of the fields that an entry of ``rewards.verifiers`` leaves out.
NOTHING: dict[str, Any] = {"template": None, "server": None, "request": {}, "rule": None, "arguments": {}}


@dataclass
class ServerConfig:
    """A model and where it is served.

    With ``endpoints``, the servers run elsewhere. Without any, ``rewards.serve`` starts them on ``host``, at the ports
    from ``port`` on.
    """

    model: str = setting("folder or hub name of the model")
    hub: str | None = setting(
        "repository of the Hugging Face Hub from which recipes.download fills that folder; null for none",
        on_resume=FREE,
    )
    runner: str = setting("vLLM's: generate for judges, pooling for reward models with one output", choices=RUNNERS)
    endpoints: list[str] = setting(
        "addresses of replicas that run elsewhere; [] for servers that are started here", on_resume=FREE
    )
    key_variable: str | None = setting(
        "environment variable that holds the server's token; null for no token", on_resume=FREE
    )
    host: str = setting("address that a server listens on; any but the loopback needs key_variable", on_resume=FREE)
    port: int = setting("port of the first replica; replica i has port + i", range="[1, 65535]", on_resume=FREE)
    replicas: int = setting("replicas of the server", range="[1, 1024]", on_resume=FREE)
    tensor: int = setting("tensor-parallel size of a replica", range="[1, 1024]", on_resume=FREE)
    arguments: list[str] = setting("further arguments of `vllm serve`")


@dataclass
class Server(ServerConfig):
    """An entry of ``rewards.servers`` with its name."""

    name: str = setting("the server's name")

    @property
    def addresses(self) -> list[str]:
        """The base address of each replica, without /v1."""
        if self.endpoints:
            return [address.rstrip("/").removesuffix("/v1") for address in self.endpoints]
        host = self.host if self.host != "0.0.0.0" else "127.0.0.1"
        return [f"http://{host}:{self.port + i}" for i in range(self.replicas)]

    def key(self, environment: Mapping[str, str] = os.environ) -> str | None:
        """The server's token, or None. Raises ValueError if the variable that should hold it is missing or empty."""
        if self.key_variable is None:
            return None
        if not environment.get(self.key_variable):
            raise ValueError(
                f"rewards.servers.{self.name}.key_variable={self.key_variable!r}: no such environment variable, or an "
                "empty one; export the server's token in it"
            )
        return environment[self.key_variable]


@dataclass
class RewardsConfig:
    """Verifiers, their servers, and how scores become a reward."""

    # The weights are numbers. The type is Any because OmegaConf refuses 1 for 1.0 in a nested mapping of floats.
    mix: dict[str, dict[str, Any]] = setting("weights of the verifiers' scores, by the row's label")
    verifiers: dict[str, Any] = setting(
        "verifiers with settings, by name: {template, server, request} or {rule, arguments}"
    )
    server: ServerConfig = setting("defaults of the entries of servers")
    servers: dict[str, Any] = setting("judges and reward models, by name; an entry has what differs from server")
    placement: str = setting(
        "disaggregated: servers have their own GPUs; colocated: those of trainer and engines",
        choices=PLACEMENTS,
        on_resume=FREE,
    )
    client: ClientConfig = setting("requests to the servers", on_resume=FREE)
    functions: FunctionsConfig = setting("verifier functions of the user's own", on_resume=FREE)
    supervisor: SupervisorConfig = setting("servers that are started here", on_resume=FREE)
    normalise: str = setting(
        "group: bring each verifier's scores to mean 0 and std 1 within a prompt's group, before the mix",
        choices=NORMALISATIONS,
    )
    gate: str | None = setting("a verifier whose score multiplies the sum of a mix that has it; null for none")
    constraint: ConstraintConfig = setting("a floor for a verifier's mean score")


def read(raw: DictConfig) -> RewardsConfig:
    """Read this group from a raw Hydra configuration, typed and checked. Raises ValueError."""
    config = settings.read(RewardsConfig, "rewards", raw)
    settings.check(config, "rewards")
    check(config)
    return config


def servers(config: RewardsConfig) -> dict[str, Server]:
    """Every server by name. Raises ValueError naming a field that is unknown or has the wrong type."""
    return {
        name: settings.read(Server, f"rewards.servers.{name}", asdict(config.server), entry or {}, {"name": name})
        for name, entry in config.servers.items()
    }


def used(config: RewardsConfig) -> list[Server]:
    """The servers that at least one verifier uses."""
    names = {verifier.server for verifier in verifiers(config).values()}
    return [server for server in servers(config).values() if server.name in names]


def verifiers(config: RewardsConfig) -> dict[str, VerifierConfig]:
    """Every verifier of ``rewards.verifiers`` by name. Raises ValueError in the same cases as :func:`servers`."""
    return {
        name: settings.read(VerifierConfig, f"rewards.verifiers.{name}", NOTHING, entry)
        for name, entry in config.verifiers.items()
    }


def check(config: RewardsConfig) -> None:
    """Check fields whose valid values depend on each other. Raises ValueError naming the first wrong one."""
    configured = servers(config)
    for name, server in configured.items():
        if not server.model:
            raise ValueError(f"rewards.servers.{name}.model is empty: give the model's folder or name")
        settings.check(server, f"rewards.servers.{name}")
        _check_server(f"rewards.servers.{name}", server)
    _check_server("rewards.server", config.server)
    _check_apart([server for server in configured.values() if not server.endpoints])
    if config.placement == COLOCATED:
        _check_colocated(used(config))
    for name, verifier in verifiers(config).items():
        _check_verifier(f"rewards.verifiers.{name}", verifier, configured)
    _check_mix(config)
    _check_constraint(config)


def _check_mix(config: RewardsConfig) -> None:
    for label, weights in config.mix.items():
        for name, weight in weights.items():
            if not isinstance(weight, (int, float)) or isinstance(weight, bool) or not 0 <= weight <= 1e6:
                raise ValueError(
                    f"rewards.mix.{label}.{name}={weight!r}: give a number from 0 to 1e6; for the opposite of a "
                    "verifier write one that returns 1 - score"
                )
    if config.gate is not None and (
        config.normalise != "none" or not any(config.gate in weights for weights in config.mix.values())
    ):
        raise ValueError(
            f"rewards.gate={config.gate!r}: multiplies the sum of a mix that has it, which some mix must, and is not "
            f"brought to mean 0: rewards.normalise={config.normalise!r} must be none"
        )


def _check_constraint(config: RewardsConfig) -> None:
    constraint = config.constraint
    if constraint.initial > constraint.maximum:
        raise ValueError(f"rewards.constraint.initial={constraint.initial}: must be in [0, rewards.constraint.maximum]")
    if constraint.verifier is None:
        return
    if constraint.update == MULTIPLICATIVE_WEIGHTS and constraint.proportional > 0:
        raise ValueError(
            f"rewards.constraint.proportional={constraint.proportional}: update=multiplicative_weights has none; use 0"
        )
    if constraint.update == MULTIPLICATIVE_WEIGHTS and constraint.initial == 0:
        raise ValueError(
            "rewards.constraint.initial=0.0: multiplied it stays 0; use more with update=multiplicative_weights"
        )
    if not any(constraint.verifier in weights for weights in config.mix.values()):
        raise ValueError(
            f"rewards.constraint.verifier={constraint.verifier!r}: no mix has it; name one that some mix has"
        )


def _check_server(where: str, server: ServerConfig) -> None:
    if server.port + server.replicas - 1 > 65535:
        raise ValueError(f"{where}.port={server.port}: use 1 to 65535, for the last replica's too")
    for address in server.endpoints:
        if not re.fullmatch(r"https?://[^/\s]+(/\S*)?", address):
            raise ValueError(f"{where}.endpoints={address!r}: give an address as http://HOST:PORT or https://HOST")
        if "@" in address.partition("://")[2].partition("/")[0]:
            raise ValueError(f"{where}.endpoints: an address has a user and password; give a token by key_variable")
    for argument in server.arguments:
        option = argument.partition("=")[0]
        if option in OWN_ARGUMENTS:
            raise ValueError(f"{where}.arguments has {option}: use {OWN_ARGUMENTS[option]} instead")
    if not server.endpoints and server.host not in LOOPBACK and server.key_variable is None:
        raise ValueError(
            f"{where}.host={server.host!r}: others can reach it there, so it wants a token: set key_variable to "
            "the name of an environment variable that holds one, or use host=127.0.0.1"
        )


def _check_apart(ours: list[Server]) -> None:
    """Check that the servers started here have different models and ports. Raises ValueError."""
    models: dict[tuple[str, str], str] = {}
    ports: dict[int, str] = {}
    for server in ours:
        other = models.setdefault((server.model, server.runner), server.name)
        if other != server.name:
            raise ValueError(
                f"rewards.servers.{server.name}.model={server.model!r} is served by {other!r} already: name that one "
                "as the server of both's verifiers, and raise its replicas"
            )
        for port in range(server.port, server.port + server.replicas):
            other = ports.setdefault(port, server.name)
            if other != server.name:
                raise ValueError(
                    f"rewards.servers.{server.name}.port={server.port}: its replicas need port {port}, which is "
                    f"{other!r}'s; set them further apart"
                )


def _check_colocated(shared: list[Server]) -> None:
    """Check the servers that are put to sleep. Raises ValueError.

    They must be started here, and only this host may reach them: whoever can reach vLLM's development endpoints can
    make it do anything.
    """
    for server in shared:
        where = f"rewards.servers.{server.name}"
        if server.endpoints:
            raise ValueError(
                f"{where}.endpoints={list(server.endpoints)}: rewards.placement=colocated puts servers to sleep, which "
                "only those that rewards.serve starts here are made for; use endpoints=[], or placement=disaggregated"
            )
        if server.host not in LOOPBACK:
            raise ValueError(
                f"{where}.host={server.host!r}: with rewards.placement=colocated a server has vLLM's development "
                "endpoints, which others must not reach; use host=127.0.0.1"
            )


def _check_verifier(where: str, verifier: VerifierConfig, servers: Mapping[str, Server]) -> None:
    if (verifier.template is None) == (verifier.rule is None):
        raise ValueError(f"{where}: give a template (and the server that answers) or a rule (and its arguments)")
    if verifier.rule is not None and (verifier.server or verifier.request):
        raise ValueError(f"{where}.rule={verifier.rule!r}: a rule has no server and no request; drop them")
    if verifier.template is not None and verifier.arguments:
        raise ValueError(f"{where}.template={verifier.template!r}: arguments are a rule's; use request for more fields")
    if verifier.template is not None and verifier.server not in servers:
        raise ValueError(
            f"{where}.server={verifier.server!r}: no such server; rewards.servers has {sorted(servers)}, name one of "
            "them"
        )


def with_new_keys(arguments: Sequence[str]) -> list[str]:
    """A run's command line, in which overrides of free-form mappings may add new keys.

    For a program that reads no group of the configuration but the rewards.
    """
    return settings.with_new_keys(arguments, [*settings.mappings(RewardsConfig, "rewards"), *OTHER_MAPPINGS])
