"""``python -m recipes.node_check.links recipe=… [overrides…]``: compare the bandwidth between GPUs with a floor.

Every rank of the job runs it, started like the ranks of the run. First, all GPUs of a node do an all-reduce. Then each
GPU exchanges messages with the GPU of the same number in the next node. For a node that is slow inside, or towards both
of its neighbours, it prints ``bad node NAME: why``. If neither node of a slow link is slow towards both of its
neighbours, both nodes are named. If a node is bad, the exit code is 1. On CPUs nothing is measured.
"""

import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any

import hydra
from omegaconf import DictConfig

from megatron_ext.platform import capabilities
from recipes.command_line import from_command_line, with_group
from recipes.launch.slurm import adopt_step
from recipes.node_check.__main__ import DEFAULT, GROUP, node_name, settings_of
from recipes.node_check.settings import Settings
from recipes.run.failure import Place, explain

REPEATS = 5
GB = 1e9
Link = tuple[int, int]


def ring(nodes: int) -> list[list[Link]]:
    """Rounds of links between neighbouring nodes.

    In a round, each node has at most one link. Over all rounds, each node has two links, or one if there are only two
    nodes.
    """
    if nodes < 2:
        return []
    links = [(node, (node + 1) % nodes) for node in range(nodes if nodes > 2 else 1)]
    even = [link for link in links if link[0] % 2 == 0]
    odd = [link for link in links if link[0] % 2 == 1]
    last = []
    if nodes % 2 and nodes > 1:
        # The last even link is to node 0, which already has a link in the first round.
        last = [even.pop()]
    return [links_of_round for links_of_round in (even, odd, last) if links_of_round]


def faults(
    within: Sequence[float], between: Mapping[Link, float], node_floor: float | None, link_floor: float | None
) -> dict[int, str]:
    """Node → why it is bad.

    Args:
        within: the bandwidth within each node.
        between: link → the bandwidth of its slowest pair of GPUs.
        node_floor: least bandwidth within a node, None if it is not checked.
        link_floor: least bandwidth of a link, None if it is not checked.
    """
    reasons = {}
    for node, bandwidth in enumerate(within):
        if node_floor is not None and bandwidth < node_floor:
            reasons[node] = (
                f"its GPUs reduce at {bandwidth:.0f} GB/s, the floor is {node_floor:g} (node_check.node_gb_s)"
            )
    if link_floor is None:
        return reasons
    slow = {link for link, bandwidth in between.items() if bandwidth < link_floor}
    of_node: dict[int, set[Link]] = {}
    for link in between:
        for node in link:
            of_node.setdefault(node, set()).add(link)
    all_slow = {node for node, links in of_node.items() if len(links) > 1 and links <= slow}
    for first, second in sorted(slow):
        culprits = {first, second} & all_slow or {first, second}
        for node in culprits:
            reasons.setdefault(
                node,
                f"{between[first, second]:.1f} GB/s between nodes {first} and {second} of the job, the floor is "
                f"{link_floor:g} (node_check.neighbour_gb_s)",
            )
    return reasons


def measure(settings: Settings, ranks_of_node: int, device: Any) -> tuple[float, dict[Link, float]]:
    """Collective: measure the bandwidth within this node, and this rank's bandwidth on each of its links, in GB/s."""
    import torch
    import torch.distributed as dist

    world = dist.get_world_size()
    rank = dist.get_rank()
    node, local = divmod(rank, ranks_of_node)
    message = torch.zeros(settings.link_mib << 18, dtype=torch.float32, device=device)
    answer = torch.empty_like(message)
    # The first operation of a communicator is one that all its ranks take part in.
    dist.all_reduce(message[:1])
    own_node, _ = dist.new_subgroups(ranks_of_node)

    within = float("inf")
    if ranks_of_node > 1:
        seconds = time_of(lambda: dist.all_reduce(message, group=own_node), message)
        # Bus bandwidth as in nccl-tests: in a ring, each rank sends and receives this many bytes.
        bus_bytes = 2 * (ranks_of_node - 1) / ranks_of_node * message.nbytes
        within = bus_bytes / seconds / GB

    between = {}
    for links in ring(world // ranks_of_node):
        mine = next((link for link in links if node in link), None)
        if mine is not None:
            other = (mine[1] if mine[0] == node else mine[0]) * ranks_of_node + local

            def exchange(other: int = other) -> None:
                sends_and_receives = [dist.P2POp(dist.isend, message, other), dist.P2POp(dist.irecv, answer, other)]
                for request in dist.batch_isend_irecv(sends_and_receives):
                    request.wait()

            between[mine] = message.nbytes / time_of(exchange, message) / GB
        dist.all_reduce(message[:1])
    return within, between


def time_of(work: Callable[[], object], tensor: Any) -> float:
    """Seconds of one call: the mean of ``REPEATS`` calls, after one call that opens the connections."""
    work()
    # float() waits for the device.
    float(tensor[0])
    started = time.perf_counter()
    for _ in range(REPEATS):
        work()
    float(tensor[0])
    return (time.perf_counter() - started) / REPEATS


def check(settings: Settings, ranks_of_node: int, device: Any) -> dict[str, str]:
    """Collective: measure the links of all nodes. Returns node name → why the node is bad, on every rank."""
    import torch.distributed as dist

    from megatron_ext.collectives import all_gather_json

    within, between = measure(settings, ranks_of_node, device)
    control = dist.new_group(backend="gloo")
    speeds = [[*link, speed] for link, speed in between.items()]
    of_ranks = all_gather_json([node_name(), within, speeds], control)
    names = []
    within_nodes = []
    for first_rank in range(0, len(of_ranks), ranks_of_node):
        ranks = of_ranks[first_rank : first_rank + ranks_of_node]
        names.append(ranks[0][0])
        within_nodes.append(min(bandwidth for _, bandwidth, _ in ranks))
    slowest: dict[Link, float] = {}
    for _, _, links in of_ranks:
        for first, second, speed in links:
            slowest[first, second] = min(speed, slowest.get((first, second), float("inf")))
    if dist.get_rank() == 0:
        shown = []
        for (first, second), speed in sorted(slowest.items())[:8]:
            shown.append(f"{names[first]}-{names[second]} {speed:.1f}")
        between_nodes = ", ".join(shown) or "one node"
        print(f"GB/s within a node: at least {min(within_nodes):.0f}; between nodes: {between_nodes}", flush=True)
    bad = faults(within_nodes, slowest, settings.node_gb_s, settings.neighbour_gb_s)
    return {names[node]: why for node, why in bad.items()}


@hydra.main(version_base="1.3", config_path="../../conf", config_name="config")
def main(raw: DictConfig) -> None:
    settings = settings_of(raw)
    name = str(raw.cluster.platform)
    if not capabilities(name).has_gpus:
        return
    adopt_step()

    import torch.distributed as dist

    from megatron_ext import platform

    try:
        active = platform.activate(name)
        dist.init_process_group(active.backend, timeout=timedelta(seconds=settings.timeout))
        bad = check(settings, int(os.environ["LOCAL_WORLD_SIZE"]), active.device())
    except RuntimeError as error:
        # If one rank fails, all ranks of its group fail, so no node is reported as bad.
        place = Place(int(os.environ["RANK"]), node_name(), "the check of the links")
        print(f"error: {explain(str(error), place) or error}", flush=True)
        # Communicators that have failed can hang while they are torn down.
        os._exit(1)
    if os.environ["RANK"] == "0":
        for node, why in bad.items():
            print(f"bad node {node}: {why}", flush=True)
    dist.destroy_process_group()
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    sys.argv[1:] = with_group(sys.argv[1:], GROUP, DEFAULT)
    from_command_line(main)
