"""What conf/rewards says: the mixes, the verifiers, the servers behind them, and how they are asked.

``recipes.config`` has :class:`RewardsConfig` as a group; ``rewards.serve`` reads it by itself. Defaults stand in
conf/rewards/base.yaml.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Optional

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

LOOPBACK = ("127.0.0.1", "localhost")
RUNNERS = ("generate", "pooling")
PLACEMENTS = APART, COLOCATED = "apart", "colocated"
NORMALISATIONS = ("none", "group")
DUAL_ASCENT, MULTIPLICATIVE_WEIGHTS = "dual_ascent", "multiplicative_weights"

# OmegaConf's structured configurations read Optional, not ``| None``.


@dataclass
class ClientConfig:
    concurrency: int
    timeout: float
    retries: int
    backoff: float
    cooldown: float
    outage: float
    hedge_after: float
    max_failed: float


@dataclass
class SupervisorConfig:
    startup_timeout: float
    stop_timeout: float
    restarts: int
    first_device: int
    cpu_arguments: list[str]


@dataclass
class ConstraintConfig:
    verifier: Optional[str]  # noqa: UP045
    update: str
    floor: float
    rate: float
    initial: float
    maximum: float


@dataclass
class RewardsConfig:
    """An entry of ``verifiers`` has fields of :class:`VerifierSettings`. ``server`` has those of :class:`Server`, each
    with its default; an entry of ``servers`` has what differs."""

    mix: dict[str, dict[str, float]]
    verifiers: dict[str, Any]
    server: dict[str, Any]
    servers: dict[str, Any]
    placement: str
    client: ClientConfig
    supervisor: SupervisorConfig
    normalise: str
    gate: Optional[str]  # noqa: UP045
    constraint: ConstraintConfig


@dataclass(frozen=True)
class VerifierSettings:
    """A name of the mix that is not just a rule's: a judge (``template`` and ``server``) or a ``rule`` with arguments.

    ``request`` are further fields of the judge's requests, ``arguments`` those of the rule's function.
    """

    template: str | None
    server: str | None
    request: Mapping[str, Any]
    rule: str | None
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class Server:
    """A model and who serves it: ``endpoints``, or, without any, ``rewards.serve`` on ``host``, ports from ``port``.

    ``runner`` is vLLM's: "generate" for judges, "pooling" for reward models. ``tensor`` is a replica's tensor-parallel
    size, ``arguments`` further ones of ``vllm serve``. ``key_variable`` names the environment variable with the token.
    """

    name: str
    model: str
    runner: str
    endpoints: tuple[str, ...]
    key_variable: str | None
    host: str
    port: int
    replicas: int
    tensor: int
    arguments: tuple[str, ...]

    @property
    def addresses(self) -> list[str]:
        """Base addresses without a path."""
        if self.endpoints:
            return [address.rstrip("/").removesuffix("/v1") for address in self.endpoints]
        host = self.host if self.host != "0.0.0.0" else "127.0.0.1"
        return [f"http://{host}:{self.port + i}" for i in range(self.replicas)]

    def key(self, environment: Mapping[str, str] = os.environ) -> str | None:
        """The token. Raises ValueError when the variable that should hold it is empty."""
        if self.key_variable is None:
            return None
        if not environment.get(self.key_variable):
            raise ValueError(
                f"rewards.servers.{self.name}.key_variable={self.key_variable!r}: no such environment variable, or an "
                "empty one; export the server's token in it"
            )
        return environment[self.key_variable]


def read(raw: DictConfig) -> RewardsConfig:
    """The typed, checked group of a raw Hydra configuration. Raises ValueError."""
    try:
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(RewardsConfig), raw))
    except OmegaConfBaseException as error:
        where = getattr(error, "full_key", None) or ""
        raise ValueError(f"rewards.{where}: {str(error).splitlines()[0]}; the fields are in conf/rewards") from error
    assert isinstance(config, RewardsConfig)
    check(config)
    return config


def servers(config: RewardsConfig) -> dict[str, Server]:
    """Every server by name. Raises ValueError naming the field for an unknown or missing one."""
    known = {f.name for f in fields(Server)} - {"name"}
    found = {}
    for name, entry in config.servers.items():
        values = {**config.server, **(entry or {})}
        if wrong := sorted(set(values) ^ known):
            raise ValueError(
                f"rewards.servers.{name}: {wrong[0]!r} is unknown or missing; the fields are {sorted(known)}"
            )
        lists = {key: tuple(values[key]) for key in ("endpoints", "arguments")}
        found[name] = Server(name, **(values | lists))
    return found


def used(config: RewardsConfig) -> list[Server]:
    """Those that some verifier asks."""
    names = {verifier.server for verifier in verifiers(config).values()}
    return [server for server in servers(config).values() if server.name in names]


def verifiers(config: RewardsConfig) -> dict[str, VerifierSettings]:
    """Every configured verifier by name; what an entry leaves out is empty. Raises ValueError for an unknown field."""
    known = [f.name for f in fields(VerifierSettings)]
    for name, entry in config.verifiers.items():
        if unknown := sorted(set(entry) - set(known)):
            raise ValueError(f"rewards.verifiers.{name}: {unknown[0]!r} is unknown; the fields are {sorted(known)}")
    return {
        name: VerifierSettings(
            template=entry.get("template"),
            server=entry.get("server"),
            request=entry.get("request") or {},
            rule=entry.get("rule"),
            arguments=entry.get("arguments") or {},
        )
        for name, entry in config.verifiers.items()
    }


def check(config: RewardsConfig) -> None:
    """Raises ValueError naming the first field whose value can't work."""
    found = servers(config)
    for name, server in found.items():
        where = f"rewards.servers.{name}"
        if not server.model:
            raise ValueError(f"{where}.model is empty: give the model's folder or name")
        if server.runner not in RUNNERS:
            raise ValueError(f"{where}.runner={server.runner!r}: use one of {', '.join(RUNNERS)}")
        for count in ("replicas", "tensor"):
            if getattr(server, count) < 1:
                raise ValueError(f"{where}.{count}={getattr(server, count)}: must be at least 1")
        if not server.endpoints and server.host not in LOOPBACK and server.key_variable is None:
            raise ValueError(
                f"{where}.host={server.host!r}: others can reach it there, so it wants a token: set key_variable to "
                "the name of an environment variable that holds one, or use host=127.0.0.1"
            )
    _check_apart([server for server in found.values() if not server.endpoints])
    if config.placement == COLOCATED:
        _check_colocated(used(config))
    for name, verifier in verifiers(config).items():
        _check_verifier(f"rewards.verifiers.{name}", verifier, found)
    c = config.client
    for field_name, value, fits, wanted in (
        ("client.concurrency", c.concurrency, c.concurrency >= 1, "at least 1"),
        ("client.timeout", c.timeout, c.timeout > 0, "above 0"),
        ("client.retries", c.retries, c.retries >= 0, "0 or more"),
        ("client.backoff", c.backoff, c.backoff >= 0, "0 or more"),
        ("client.cooldown", c.cooldown, c.cooldown >= 0, "0 or more"),
        ("client.outage", c.outage, c.outage >= 0, "0 or more"),
        ("client.hedge_after", c.hedge_after, c.hedge_after > 1, "above 1: it multiplies the usual time"),
        ("client.max_failed", c.max_failed, 0 <= c.max_failed <= 1, "in [0, 1]"),
        ("placement", config.placement, config.placement in PLACEMENTS, f"one of {', '.join(PLACEMENTS)}"),
        ("normalise", config.normalise, config.normalise in NORMALISATIONS, f"one of {', '.join(NORMALISATIONS)}"),
    ):
        if not fits:
            raise ValueError(f"rewards.{field_name}={value!r}: must be {wanted}")
    if config.gate is not None and (
        config.normalise != "none" or not any(config.gate in weights for weights in config.mix.values())
    ):
        raise ValueError(
            f"rewards.gate={config.gate!r}: multiplies the sum of a mix that has it, which some mix must, and is not "
            f"brought to mean 0: rewards.normalise={config.normalise!r} must be none"
        )
    if (limit := config.constraint).verifier is not None:
        if limit.update not in (DUAL_ASCENT, MULTIPLICATIVE_WEIGHTS):
            raise ValueError(
                f"rewards.constraint.update={limit.update!r}: use {DUAL_ASCENT} or {MULTIPLICATIVE_WEIGHTS}"
            )
        if limit.update == MULTIPLICATIVE_WEIGHTS and limit.initial == 0:
            raise ValueError(
                "rewards.constraint.initial=0.0: multiplied it stays 0; use more with update=multiplicative_weights"
            )
        if not any(limit.verifier in weights for weights in config.mix.values()):
            raise ValueError(
                f"rewards.constraint.verifier={limit.verifier!r}: no mix has it; name one that some mix has"
            )
        if not 0 <= limit.floor <= 1:
            raise ValueError(f"rewards.constraint.floor={limit.floor}: scores are in [0, 1]")
        if not 0 <= limit.initial <= limit.maximum or limit.rate <= 0:
            raise ValueError(
                f"rewards.constraint: rate={limit.rate} must be above 0, initial={limit.initial} in [0, maximum="
                f"{limit.maximum}]"
            )


def _check_apart(ours: list[Server]) -> None:
    """Servers that we start: one for each model, and no port twice."""
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
    """Servers that are put to sleep: ours, and nobody else's. Whoever reaches vLLM's development endpoints can have it
    do anything."""
    for server in shared:
        where = f"rewards.servers.{server.name}"
        if server.endpoints:
            raise ValueError(
                f"{where}.endpoints={list(server.endpoints)}: rewards.placement=colocated puts servers to sleep, which "
                "only those that rewards.serve starts here are made for; use endpoints=[], or placement=apart"
            )
        if server.host not in LOOPBACK:
            raise ValueError(
                f"{where}.host={server.host!r}: with rewards.placement=colocated a server has vLLM's development "
                "endpoints, which others must not reach; use host=127.0.0.1"
            )


def _check_verifier(where: str, verifier: VerifierSettings, found: Mapping[str, Server]) -> None:
    if (verifier.template is None) == (verifier.rule is None):
        raise ValueError(f"{where}: give a template (and the server that answers) or a rule (and its arguments)")
    if verifier.rule is not None and (verifier.server or verifier.request):
        raise ValueError(f"{where}.rule={verifier.rule!r}: a rule has no server and no request; remove them")
    if verifier.template is not None and verifier.arguments:
        raise ValueError(f"{where}.template={verifier.template!r}: arguments are a rule's; use request for more fields")
    if verifier.template is not None and verifier.server not in found:
        raise ValueError(
            f"{where}.server={verifier.server!r}: no such server; rewards.servers has {sorted(found)}, name one of them"
        )
