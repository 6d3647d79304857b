"""Which host of a cluster serves what: ``python -m rewards.placement HOST,HOST… FIRST GPUS recipe=… [overrides…]``.

The hosts have ``GPUS`` each, those from number ``FIRST`` on are free for servers. Prints nothing when the run needs no
server from here. Else: the trainer's overrides; ``rewards.supervisor.startup_timeout`` and the addresses; for each host
that serves, its name and the overrides of its ``python -m rewards.serve``. The token is in ``REWARDS_TOKEN`` on both.
With ``rewards.placement=colocated`` every host has all servers, for itself; those of the first, where this runs, are
waited for here, the others by their host's ranks.
"""

import sys
from collections.abc import Mapping, Sequence

import hydra
from omegaconf import DictConfig

from megatron_ext.platform import capabilities
from rewards import settings
from rewards.settings import RewardsConfig, Server

TOKEN = "REWARDS_TOKEN"


def place(servers: Sequence[Server], hosts: Sequence[str], gpus: int | None) -> dict[str, str]:
    """Server → host: the largest first, each on the emptiest host; replicas stay together.

    ``gpus``: free ones of a host, None on CPUs. Raises ValueError for a server that finds no room.
    """
    taken = dict.fromkeys(hosts, 0)
    placed = {}
    for server in sorted(servers, key=lambda server: -server.replicas * server.tensor):
        host = min(hosts, key=lambda host: taken[host])
        taken[host] += server.replicas * server.tensor
        if gpus is not None and taken[host] > gpus:
            raise ValueError(
                f"rewards.servers.{server.name}: replicas={server.replicas} x tensor={server.tensor} GPUs are not free "
                f"on one of {len(hosts)} hosts with {gpus} for servers: give the servers more nodes, or "
                "rewards.supervisor.first_device a lower value"
            )
        placed[server.name] = host
    return placed


def needed(config: RewardsConfig) -> list[Server]:
    """Those that a verifier uses and that run nowhere yet."""
    return [server for server in settings.used(config) if not server.endpoints]


def lines(config: RewardsConfig, placed: Mapping[str, str]) -> list[str]:
    """What is printed."""
    servers = [server for server in settings.servers(config).values() if server.name in placed]
    addresses = {
        s.name: [f"http://{placed[s.name]}:{port}" for port in range(s.port, s.port + s.replicas)] for s in servers
    }
    token = {s.name: f"++rewards.servers.{s.name}.key_variable={TOKEN}" for s in servers}
    elsewhere = {
        name: f"++rewards.servers.{name}.endpoints=[{','.join(map(repr, found))}]" for name, found in addresses.items()
    }
    trainer = " ".join(f"{elsewhere[s.name]} {token[s.name]}" for s in servers)
    every = " ".join(address for found in addresses.values() for address in found)
    result = [trainer, f"{config.supervisor.startup_timeout:.0f} {every}"]
    for host in dict.fromkeys(placed.values()):
        overrides = [
            f"++rewards.servers.{s.name}.host=0.0.0.0 {token[s.name]}" if placed[s.name] == host else elsewhere[s.name]
            for s in servers
        ]
        result.append(f"{host} {' '.join(overrides)}")
    return result


def shared_lines(config: RewardsConfig, servers: Sequence[Server], hosts: Sequence[str], gpus: int | None) -> list[str]:
    """What is printed for colocated servers. Raises ValueError for one that finds no room on a host."""
    for s in servers:
        if gpus is not None and s.replicas * s.tensor > gpus:
            raise ValueError(
                f"rewards.servers.{s.name}: replicas={s.replicas} x tensor={s.tensor} GPUs, a node has {gpus}: "
                "rewards.placement=colocated puts all of a server on each node; use fewer"
            )
    token = " ".join(f"++rewards.servers.{s.name}.key_variable={TOKEN}" for s in servers)
    addresses = " ".join(address for s in servers for address in s.addresses)
    return [token, f"{config.supervisor.startup_timeout:.0f} {addresses}", *(f"{host} {token}" for host in hosts)]


@hydra.main(version_base="1.3", config_path="../conf", config_name="config")
def main(raw: DictConfig) -> None:
    first, gpus = map(int, PLACE[1:])
    try:
        config = settings.read(raw.rewards)
        has_gpus = capabilities(raw.cluster.platform).has_gpus
        servers = needed(config) if raw.stage.evaluates or "rl" in raw.stage.trains else []
        if not servers:
            return
        if config.placement == settings.COLOCATED:
            if first == 0:
                raise ValueError(
                    "rewards.placement=colocated: the job has a second component for the servers, which would be on "
                    "other GPUs; submit one component (slurm/train.sh), or use rewards.placement=disaggregated"
                )
            free = gpus - config.supervisor.first_device if has_gpus else None
            print("\n".join(shared_lines(config, servers, PLACE[0].split(","), free)))
            return
        if has_gpus and config.supervisor.first_device < first:
            raise ValueError(
                f"rewards.supervisor.first_device={config.supervisor.first_device}: the trainer's ranks have the GPUs "
                f"below {first} of each node; use {first} or more, or a job with a second component for the servers"
            )
        free = gpus - config.supervisor.first_device if has_gpus else None
        print("\n".join(lines(config, place(servers, PLACE[0].split(","), free))))
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    PLACE, sys.argv[1:] = sys.argv[1:4], sys.argv[4:]
    main()
