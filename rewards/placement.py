"""Assign the servers to the hosts of a cluster:
``python -m rewards.placement HOST,HOST… FIRST GPUS recipe=… [overrides…]``.

Each host has ``GPUS`` GPUs, of which those from number ``FIRST`` on are free for servers. The output is for the Slurm
scripts. It is empty if no server has to be started. Otherwise it has these lines:

1. the overrides for the trainer;
2. ``rewards.supervisor.startup_timeout`` in seconds, and the addresses to wait for;
3. for each host with servers: its name, and the overrides for its ``python -m rewards.serve``.

The environment variable ``REWARDS_TOKEN`` holds the servers' token, for the servers and for the trainer. With
``rewards.placement=colocated`` every host runs all servers for its own ranks. The scripts wait for the servers of the
first host, where this program runs. The ranks of each other host wait for the servers of their host.
"""

import sys
from collections.abc import Mapping, Sequence

import hydra
from omegaconf import DictConfig

from megatron_ext.platform import capabilities
from rewards import settings
from rewards.settings import RewardsConfig, Server

TOKEN_VARIABLE = "REWARDS_TOKEN"


def place(servers: Sequence[Server], hosts: Sequence[str], gpus: int | None) -> dict[str, str]:
    """Server → host. The largest server is placed first, and each on the host with the fewest GPUs taken.

    All replicas of a server are on one host. ``gpus`` is the number of free GPUs of a host, None on CPUs. Raises
    ValueError for a server that fits on no host.
    """
    host_of, excess = _spread(servers, hosts, gpus)
    if excess is None:
        return host_of
    needed = least_hosts(servers, gpus)
    remedy = "use fewer replicas or a smaller tensor" if needed is None else f"give the servers {needed} nodes"
    raise ValueError(
        f"rewards.servers.{excess.name}: replicas={excess.replicas} x tensor={excess.tensor} GPUs are not free on one "
        f"of {len(hosts)} hosts with {gpus} for servers: {remedy}, or rewards.supervisor.first_device a lower value"
    )


def least_hosts(servers: Sequence[Server], gpus: int | None) -> int | None:
    """The smallest number of hosts on which :func:`place` finds room. None if a server is too large for any host."""
    for count in range(1, len(servers) + 1):
        _, excess = _spread(servers, [str(number) for number in range(count)], gpus)
        if excess is None:
            return count
    return None


def _spread(servers: Sequence[Server], hosts: Sequence[str], gpus: int | None) -> tuple[dict[str, str], Server | None]:
    """The placement of :func:`place`, and the first server that does not fit. None if all fit."""
    taken = dict.fromkeys(hosts, 0)
    host_of = {}
    for server in sorted(servers, key=lambda server: -server.replicas * server.tensor):
        host = min(hosts, key=lambda host: taken[host])
        taken[host] += server.replicas * server.tensor
        host_of[server.name] = host
        if gpus is not None and taken[host] > gpus:
            return host_of, server
    return host_of, None


def servers_to_start(config: RewardsConfig) -> list[Server]:
    """The servers that at least one verifier uses and that have no ``endpoints``."""
    return [server for server in settings.used(config) if not server.endpoints]


def disaggregated_lines(config: RewardsConfig, host_of: Mapping[str, str]) -> list[str]:
    """The output lines for disaggregated servers, which :func:`place` has assigned to hosts."""
    servers = [server for server in settings.servers(config).values() if server.name in host_of]
    addresses: dict[str, list[str]] = {}
    token_override: dict[str, str] = {}
    endpoints_override: dict[str, str] = {}  # for everyone but the server's own host
    for server in servers:
        ports = range(server.port, server.port + server.replicas)
        addresses[server.name] = [f"http://{host_of[server.name]}:{port}" for port in ports]
        quoted = ",".join(map(repr, addresses[server.name]))
        token_override[server.name] = f"++rewards.servers.{server.name}.key_variable={TOKEN_VARIABLE}"
        endpoints_override[server.name] = f"++rewards.servers.{server.name}.endpoints=[{quoted}]"
    trainer = " ".join(f"{endpoints_override[server.name]} {token_override[server.name]}" for server in servers)
    all_addresses = " ".join(address for of_server in addresses.values() for address in of_server)
    lines = [trainer, f"{config.supervisor.startup_timeout:.0f} {all_addresses}"]
    for host in dict.fromkeys(host_of.values()):
        overrides = []
        for server in servers:
            if host_of[server.name] == host:
                overrides.append(f"++rewards.servers.{server.name}.host=0.0.0.0 {token_override[server.name]}")
            else:
                overrides.append(endpoints_override[server.name])
        lines.append(f"{host} {' '.join(overrides)}")
    return lines


def colocated_lines(
    config: RewardsConfig, servers: Sequence[Server], hosts: Sequence[str], gpus: int | None
) -> list[str]:
    """The output lines for colocated servers. ``gpus`` as for :func:`place`.

    Raises ValueError for a server that does not fit on a host.
    """
    for server in servers:
        if gpus is not None and server.replicas * server.tensor > gpus:
            raise ValueError(
                f"rewards.servers.{server.name}: replicas={server.replicas} x tensor={server.tensor} GPUs, a node has "
                f"{gpus}: rewards.placement=colocated puts all of a server on each node; use fewer"
            )
    overrides = " ".join(f"++rewards.servers.{server.name}.key_variable={TOKEN_VARIABLE}" for server in servers)
    addresses = " ".join(address for server in servers for address in server.addresses)
    ready = f"{config.supervisor.startup_timeout:.0f} {addresses}"
    return [overrides, ready, *(f"{host} {overrides}" for host in hosts)]


@hydra.main(version_base="1.3", config_path="../conf", config_name="config")
def main(raw: DictConfig) -> None:
    hosts = CLUSTER_ARGUMENTS[0].split(",")
    first_free_gpu = int(CLUSTER_ARGUMENTS[1])
    gpus_per_host = int(CLUSTER_ARGUMENTS[2])
    try:
        config = settings.read(raw.rewards)
        verifies = raw.stage.evaluates or "rl" in raw.stage.trains
        servers = servers_to_start(config) if verifies else []
        if not servers:
            return
        has_gpus = capabilities(raw.cluster.platform).has_gpus
        first_device = config.supervisor.first_device
        gpus = gpus_per_host - first_device if has_gpus else None
        if config.placement == settings.COLOCATED:
            if first_free_gpu == 0:
                raise ValueError(
                    "rewards.placement=colocated: the job has a second component for the servers, which would be on "
                    "other GPUs; submit one component (slurm/train.sh), or use rewards.placement=disaggregated"
                )
            lines = colocated_lines(config, servers, hosts, gpus)
        else:
            if has_gpus and first_device < first_free_gpu:
                raise ValueError(
                    f"rewards.supervisor.first_device={first_device}: the trainer's ranks have the GPUs below "
                    f"{first_free_gpu} of each node; use {first_free_gpu} or more, or a job with a second component "
                    "for the servers"
                )
            lines = disaggregated_lines(config, place(servers, hosts, gpus))
        print("\n".join(lines))
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    # Hydra parses sys.argv and accepts overrides only, so the other arguments are taken out first.
    CLUSTER_ARGUMENTS = sys.argv[1:4]
    sys.argv[1:] = settings.with_new_keys(sys.argv[4:])
    main()
