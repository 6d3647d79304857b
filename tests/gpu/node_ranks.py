"""A rank on each GPU of this node, for the checks of eight GPUs: ``python -m tests.gpu.node_ranks FOLDER``.

Jobs, folder and results are those of ``tests.megatron_ext.worker``; the CPU's ranks compute the same cases with the
same functions. ``RANKS_PLATFORM`` is the platform, ``cuda`` if it is not set.
"""

import itertools
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from recipes.launch.launcher import fork_ranks

# Functions are compiled as in a run. (The CPU's ranks are not, and the launcher of tests says so.)
os.environ.pop("TORCH_COMPILE_DISABLE", None)
if __name__ == "__main__":
    # Before anything is imported that may initialise CUDA, which a fork does not survive. node_cases.WORLD
    fork_ranks(8)

from megatron_ext import platform

platform.activate(os.environ.get("RANKS_PLATFORM", "cuda"))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from megatron_ext import forward_backward, parallel  # noqa: E402
from recipes.node_check import links  # noqa: E402
from rollout.weight_sync.network import Network, make_slots  # noqa: E402
from rollout.weight_sync.plan import Message, Plan  # noqa: E402
from tests.gpu import node_cases  # noqa: E402
from tests.gpu.test_fp8 import batch, build, loss  # noqa: E402
from tests.megatron_ext import worker  # noqa: E402
from tests.megatron_ext.cases import Case  # noqa: E402
from tests.megatron_ext.ranks import serve  # noqa: E402
from tests.settings import precision_config  # noqa: E402

GIB = 2**30
GB = 1e9


def free_gib() -> float:
    torch.cuda.synchronize()
    return torch.cuda.mem_get_info()[0] / GIB


def run_links(folder: Path, case: Case, layout: parallel.Parallel) -> dict[str, Any]:
    """Bandwidths within the node, the time of a small all-reduce, and what a group's communicator keeps of the GPU."""
    device = platform.current().device()
    message = torch.zeros(node_cases.LINK_MIB << 18, dtype=torch.float32, device=device)
    answer = torch.empty_like(message)
    dist.all_reduce(message)

    before = free_gib()
    group = dist.new_group(list(range(case.ranks)))
    seconds = links.time_of(lambda: dist.all_reduce(message, group=group), message)
    communicator_gib = before - free_gib()
    # As nccl-tests: in a ring each rank sends and receives this part of the message twice.
    bus_bytes = 2 * (case.ranks - 1) / case.ranks * message.nbytes

    neighbour = dist.get_rank() ^ 1

    def exchange() -> None:
        both = [dist.P2POp(dist.isend, message, neighbour), dist.P2POp(dist.irecv, answer, neighbour)]
        for request in dist.batch_isend_irecv(both):
            request.wait()

    exchange_gb_s = message.nbytes / links.time_of(exchange, message) / GB
    small = torch.zeros(node_cases.SMALL, dtype=torch.bfloat16, device=device)

    def many() -> None:
        for _ in range(node_cases.SMALL_REPEATS):
            dist.all_reduce(small)

    rounds = network_of_small_rounds(device)
    sequence = itertools.count()

    return {
        "communicator_gib": communicator_gib,
        "all_reduce_gb_s": bus_bytes / seconds / GB,
        "exchange_gb_s": exchange_gb_s,
        "all_reduce_us": links.time_of(many, small.flatten()) / node_cases.SMALL_REPEATS * 1e6,
        "round_us": links.time_of(lambda: rounds.run(next(sequence)), small.flatten()) / rounds.rounds * 1e6,
    }


def network_of_small_rounds(device: torch.device) -> Network:
    """A weight sync's rounds in each of which every rank sends next to nothing to its neighbour; no worker reads."""
    world = dist.get_world_size()
    messages = [
        Message(round_number, rank, (rank + 1) % world, 0, 1, 1, forwarded=False)
        for round_number in range(node_cases.ROUNDS)
        for rank in range(world)
    ]
    plan = Plan({}, (), (), (), ((),) * world, tuple(messages), (2,) * world, 0)
    slots = make_slots(plan, dist.get_rank(), device, former=None)
    return Network(plan, dist.get_rank(), {}, slots, 0, dist.new_group(list(range(world))))


def run_speed(folder: Path, case: Case, layout: parallel.Parallel) -> dict[str, Any]:
    """Seconds of a forward and backward pass of four layers of the 72B model over all GPUs, and its FLOPs."""
    config = node_cases.LAYERS_72B
    sizes = replace(case.layout, micro_batch_tokens=node_cases.TOKENS)
    policy = build(config, replace(layout, config=sizes), precision_config("bf16"))
    micro = batch(config, node_cases.TOKENS, 1, policy.token_multiple, platform.current().device())

    def passes() -> None:
        for _ in range(node_cases.PASSES):
            forward_backward.accumulate_gradients(policy, micro, loss)

    passes()
    dist.barrier()
    started = time.perf_counter()
    passes()
    torch.cuda.synchronize()
    seconds = (time.perf_counter() - started) / node_cases.PASSES
    return {
        "seconds": seconds,
        "flops": node_cases.training_flops(config, node_cases.TOKENS, len(micro[0].predict)),
        "peak_flops": platform.current().peak_flops(),
    }


def main() -> None:
    jobs: dict[str, tuple[Case, Callable[..., dict[str, Any]], tuple[Case, ...]]] = {
        **{case.name: (case, worker.run_case, ()) for case in (*node_cases.LAYOUTS, node_cases.PADDED)},
        node_cases.SAVED.name: (node_cases.SAVED, worker.run_resume, ()),
        node_cases.RELAYOUT.name: (node_cases.RELAYOUT, worker.run_relayout, (node_cases.SAVED,)),
        node_cases.LINKS.name: (node_cases.LINKS, run_links, ()),
        node_cases.SPEED.name: (node_cases.SPEED, run_speed, ()),
        node_cases.OVERLAP.name: (node_cases.OVERLAP, run_speed, ()),
    }
    serve(Path(sys.argv[1]), jobs, worker.SEED)


if __name__ == "__main__":
    main()
