"""What conf/rewards says: the mixes, the verifiers, the servers behind them, and how they are asked.

``recipes.config`` has :class:`RewardsConfig` as a group; ``rewards.serve`` reads it by itself. Defaults stand in
conf/rewards/base.yaml.
"""

import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Optional

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

LOOPBACK = ("127.0.0.1", "localhost")
LONGEST = 1e7  # seconds
# Of `vllm serve`, and the fields that set them: past these a server could listen without a token, or show it.
OWN_ARGUMENTS = {"--host": "host", "--port": "port", "--uds": "host", "--api-key": "key_variable"}
RUNNERS = ("generate", "pooling")
PLACEMENTS = DISAGGREGATED, COLOCATED = "disaggregated", "colocated"
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

    mix: dict[str, dict[str, Any]]  # numbers; OmegaConf refuses 1 for 1.0 in a mapping of a mapping
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


WORDS = {str: "a text", int: "a whole number", list: "a list of texts", dict: "a mapping", type(None): "null"}
SERVER_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("model", "runner", "host"), (str,)),
    **dict.fromkeys(("endpoints", "arguments"), (list,)),
    **dict.fromkeys(("port", "replicas", "tensor"), (int,)),
    "key_variable": (str, type(None)),
}
VERIFIER_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("template", "server", "rule"), (str, type(None))),
    **dict.fromkeys(("request", "arguments"), (dict, type(None))),
}


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
    return {name: _server(f"rewards.servers.{name}", name, config, entry) for name, entry in config.servers.items()}


def _server(where: str, name: str, config: RewardsConfig, entry: Any) -> Server:
    values = {**config.server, **_mapping(where, entry or {})}
    _check_keys(where, values, SERVER_TYPES)
    if missing := sorted(set(SERVER_TYPES) - set(values)):
        raise ValueError(f"{where}.{missing[0]} is missing; the fields are {sorted(SERVER_TYPES)}")
    _check_types(where, values, SERVER_TYPES)
    return Server(name, **(values | {key: tuple(values[key]) for key in ("endpoints", "arguments")}))


def used(config: RewardsConfig) -> list[Server]:
    """Those that some verifier asks."""
    names = {verifier.server for verifier in verifiers(config).values()}
    return [server for server in servers(config).values() if server.name in names]


def verifiers(config: RewardsConfig) -> dict[str, VerifierSettings]:
    """Every configured verifier by name; what an entry leaves out is empty. Raises ValueError for an unknown field."""
    for name, entry in config.verifiers.items():
        where = f"rewards.verifiers.{name}"
        _check_keys(where, _mapping(where, entry), VERIFIER_TYPES)
        _check_types(where, entry, VERIFIER_TYPES)
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


def _mapping(where: str, entry: Any) -> Mapping[str, Any]:
    if not isinstance(entry, Mapping):
        raise ValueError(f"{where}={entry!r}: give a mapping of fields, {{field: value, …}}")
    return entry


def _check_keys(where: str, entry: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    if unknown := sorted(map(str, set(entry) - set(known))):
        near = difflib.get_close_matches(unknown[0], known, 1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"{where}.{unknown[0]}: no such field; {hint}the fields are {sorted(known)}")


def _check_types(where: str, entry: Mapping[str, Any], known: Mapping[str, tuple[type, ...]]) -> None:
    for name, value in entry.items():
        fits = isinstance(value, known[name]) and (not isinstance(value, bool))
        if isinstance(value, list):
            fits = fits and all(isinstance(item, str) for item in value)
        if not fits:
            names = " or ".join(WORDS[kind] for kind in known[name])
            raise ValueError(f"{where}.{name}={value!r}: give {names}")


def check(config: RewardsConfig) -> None:
    """Raises ValueError naming the first field whose value can't work."""
    _check_server("rewards.server", _server("rewards.server", "", config, {}))
    found = servers(config)
    for name, server in found.items():
        if not server.model:
            raise ValueError(f"rewards.servers.{name}.model is empty: give the model's folder or name")
        _check_server(f"rewards.servers.{name}", server)
    _check_apart([server for server in found.values() if not server.endpoints])
    if config.placement == COLOCATED:
        _check_colocated(used(config))
    for name, verifier in verifiers(config).items():
        _check_verifier(f"rewards.verifiers.{name}", verifier, found)
    c, v, limit = config.client, config.supervisor, config.constraint
    for field_name, value, fits, wanted in (
        ("client.concurrency", c.concurrency, 1 <= c.concurrency <= 1e6, "at least 1, at most 1e6"),
        ("client.timeout", c.timeout, 0 < c.timeout <= LONGEST, f"above 0 seconds, at most {LONGEST:g}"),
        ("client.retries", c.retries, 0 <= c.retries <= 1000, "0 or more, at most 1000"),
        ("client.backoff", c.backoff, 0 <= c.backoff <= LONGEST, f"0 or more seconds, at most {LONGEST:g}"),
        ("client.cooldown", c.cooldown, 0 <= c.cooldown <= LONGEST, f"0 or more seconds, at most {LONGEST:g}"),
        ("client.outage", c.outage, 0 <= c.outage <= LONGEST, f"0 or more seconds, at most {LONGEST:g}"),
        ("client.hedge_after", c.hedge_after, 1 < c.hedge_after <= 1e6, "above 1: it multiplies the usual time"),
        ("client.max_failed", c.max_failed, 0 <= c.max_failed <= 1, "in [0, 1]"),
        ("placement", config.placement, config.placement in PLACEMENTS, f"one of {', '.join(PLACEMENTS)}"),
        ("supervisor.startup_timeout", v.startup_timeout, 0 < v.startup_timeout <= LONGEST, "above 0 seconds"),
        ("supervisor.stop_timeout", v.stop_timeout, 0 <= v.stop_timeout <= LONGEST, "0 or more seconds"),
        ("supervisor.restarts", v.restarts, 0 <= v.restarts <= 1000, "0 or more, at most 1000"),
        ("supervisor.first_device", v.first_device, 0 <= v.first_device <= 1024, "0 or more, at most 1024"),
        ("constraint.floor", limit.floor, 0 <= limit.floor <= 1, "in [0, 1], as scores are"),
        ("constraint.rate", limit.rate, 0 < limit.rate <= 1e6, "above 0, at most 1e6"),
        ("constraint.maximum", limit.maximum, 0 <= limit.maximum <= 1e6, "0 or more, at most 1e6"),
        (
            "constraint.initial",
            limit.initial,
            0 <= limit.initial <= limit.maximum,
            "in [0, rewards.constraint.maximum]",
        ),
        ("normalise", config.normalise, config.normalise in NORMALISATIONS, f"one of {', '.join(NORMALISATIONS)}"),
    ):
        if not fits:
            raise ValueError(f"rewards.{field_name}={value!r}: must be {wanted}")
    for label, weights in config.mix.items():
        for name, weight in weights.items():
            if not isinstance(weight, (int, float)) or isinstance(weight, bool) or not abs(weight) <= 1e6:
                raise ValueError(f"rewards.mix.{label}.{name}={weight!r}: give a number, at most 1e6")
    if config.gate is not None and (
        config.normalise != "none" or not any(config.gate in weights for weights in config.mix.values())
    ):
        raise ValueError(
            f"rewards.gate={config.gate!r}: multiplies the sum of a mix that has it, which some mix must, and is not "
            f"brought to mean 0: rewards.normalise={config.normalise!r} must be none"
        )
    if limit.verifier is not None:
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


def _check_server(where: str, server: Server) -> None:
    if server.runner not in RUNNERS:
        raise ValueError(f"{where}.runner={server.runner!r}: use one of {', '.join(RUNNERS)}")
    for count in ("replicas", "tensor"):
        if not 1 <= getattr(server, count) <= 1024:
            raise ValueError(f"{where}.{count}={getattr(server, count)}: must be at least 1, at most 1024")
    if server.port < 1 or server.port + server.replicas - 1 > 65535:
        raise ValueError(f"{where}.port={server.port}: use 1 to 65535, for the last replica's too")
    for address in server.endpoints:
        if "@" in address.partition("://")[2].partition("/")[0]:
            raise ValueError(f"{where}.endpoints: an address has a user and password; give a token by key_variable")
    if taken := [name for name in server.arguments if name.partition("=")[0] in OWN_ARGUMENTS]:
        name = taken[0].partition("=")[0]
        raise ValueError(f"{where}.arguments has {name}: use {OWN_ARGUMENTS[name]} instead")
    if not server.endpoints and server.host not in LOOPBACK and server.key_variable is None:
        raise ValueError(
            f"{where}.host={server.host!r}: others can reach it there, so it wants a token: set key_variable to "
            "the name of an environment variable that holds one, or use host=127.0.0.1"
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
                "only those that rewards.serve starts here are made for; use endpoints=[], or placement=disaggregated"
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
