"""Which host serves what: sizes, what does not fit, and that both sides' overrides are what rewards.settings takes."""

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from rewards import placement, settings
from rewards.settings import RewardsConfig

ROOT = Path(__file__).resolve().parents[2]


def rewards(*overrides: str) -> RewardsConfig:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return settings.read(compose("config", ["recipe=safework_72b", *overrides]).rewards)


def test_the_largest_take_the_emptiest_host() -> None:
    config = rewards("rewards.servers.safety.replicas=2")
    placed = placement.place(placement.servers_to_start(config), ["a", "b", "c"], 8)
    assert placed == {"knowledge": "a", "value": "b", "safety": "c"}
    assert placement.place(placement.servers_to_start(config), ["a", "b"], 8) == {
        "knowledge": "a",
        "value": "b",
        "safety": "b",
    }
    assert set(placement.place(placement.servers_to_start(config), ["a"], None).values()) == {"a"}, "CPUs are shared"


def test_the_least_number_of_hosts() -> None:
    """Of servers with 8, 4 and 2 GPUs; None where the largest fits nowhere. CPUs are shared."""
    servers = placement.servers_to_start(rewards("rewards.servers.safety.replicas=2"))
    hosts = {gpus: placement.least_hosts(servers, gpus) for gpus in (4, 8, 13, 14, None)}
    assert hosts == {4: None, 8: 2, 13: 2, 14: 1, None: 1}


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(ValueError, match=r"rewards.servers.value: replicas=1 x tensor=4 GPUs are not free on one of 1"):
        placement.place(placement.servers_to_start(rewards()), ["a"], 8)


def test_the_remedy_is_more_nodes_where_they_would_do() -> None:
    servers = placement.servers_to_start(rewards())
    largest = max(server.replicas * server.tensor for server in servers)
    needed = placement.least_hosts(servers, largest)
    with pytest.raises(ValueError, match=f": give the servers {needed} nodes, or rewards.supervisor.first_device"):
        placement.place(servers, ["a"], largest)
    with pytest.raises(ValueError, match=r": use fewer replicas or a smaller tensor, or rewards\.supervisor"):
        placement.place(servers, ["a"], largest - 1)


def test_servers_that_run_elsewhere_are_left_alone() -> None:
    config = rewards("rewards.servers.value.endpoints=[http://elsewhere:1]")
    assert [server.name for server in placement.servers_to_start(config)] == ["safety", "knowledge"]


def test_both_sides_read_their_overrides() -> None:
    """The trainer's servers are all elsewhere; every host starts what is placed on it and nothing else."""
    config = rewards("rewards.servers.safety.replicas=2")
    placed = placement.place(placement.servers_to_start(config), ["a", "b", "c"], 8)
    trainer, ready, *hosts = placement.disaggregated_lines(config, placed)
    assert ready == "1800 http://c:8100 http://c:8101 http://b:8110 http://a:8120"
    theirs = settings.servers(rewards("rewards.servers.safety.replicas=2", *trainer.split()))
    assert [address for server in theirs.values() for address in server.addresses] == ready.split()[1:]
    for line in hosts:
        host, *overrides = line.split()
        here = rewards("rewards.servers.safety.replicas=2", *overrides)
        started = placement.servers_to_start(here)
        assert {server.name: host for server in started} == {n: h for n, h in placed.items() if h == host}
        assert {(server.host, server.key_variable) for server in started} == {("0.0.0.0", placement.TOKEN_VARIABLE)}


def test_colocated_servers_are_all_on_every_host_for_itself() -> None:
    config = rewards("rewards.placement=colocated")
    trainer, ready, *hosts = placement.colocated_lines(config, placement.servers_to_start(config), ["a", "b"], 8)
    assert ready == "1800 http://127.0.0.1:8100 http://127.0.0.1:8110 http://127.0.0.1:8120"
    assert hosts == [f"a {trainer}", f"b {trainer}"]
    theirs = placement.servers_to_start(rewards("rewards.placement=colocated", *trainer.split()))
    assert [(server.name, server.host, server.key_variable) for server in theirs] == [
        (name, "127.0.0.1", placement.TOKEN_VARIABLE) for name in ("safety", "value", "knowledge")
    ]
    with pytest.raises(ValueError, match=r"rewards\.servers\.knowledge: replicas=1 x tensor=8 GPUs, a node has 4"):
        placement.colocated_lines(config, placement.servers_to_start(config), ["a", "b"], 4)
