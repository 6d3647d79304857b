"""What a trainer's process keeps of a GPU beside its tensors: ``python -m tests.gpu.footprint FREE``.

FREE: bytes of the GPU that were free before. The last line is JSON with the fields of conf/preflight, in GiB.
"""

import gc
import json
import os
import socket
import sys

from megatron_ext import platform

if __name__ == "__main__":
    platform.activate("cuda")

import torch

from megatron_ext import forward_backward, optimizer, parallel
from tests.gpu.conftest import OPTIMIZER, SCHEDULE
from tests.gpu.test_fp8 import LAYERS_72B, TOKENS, batch, build, loss
from tests.settings import parallel_config, precision_config

GIB = 2**30


def outside(free_before: int) -> int:
    """Bytes that this process has on the GPU and that are not its allocator's."""
    torch.cuda.synchronize()
    return free_before - torch.cuda.mem_get_info()[0] - torch.cuda.memory_reserved()


def step(layout: parallel.Parallel) -> None:
    """One step of four layers of the 72B model; nothing of it is kept."""
    policy = build(LAYERS_72B, layout, precision_config("bf16"))
    optim, schedule = optimizer.build(policy, OPTIMIZER, SCHEDULE, steps=2)
    optim.reload_model_params()
    micro = batch(LAYERS_72B, TOKENS, 1)
    torch.cuda.reset_peak_memory_stats()
    forward_backward.accumulate_gradients(policy, micro, loss)
    optimizer.step(optim, schedule)


def measure(free_before: int, layout: parallel.Parallel) -> dict[str, float]:
    """The context is what is there before the first step. Workspaces are what comes beside the allocator later, and
    what libraries have taken from it: what stays when all else is gone."""
    context = outside(free_before)
    step(layout)
    fragmentation = torch.cuda.max_memory_reserved() - torch.cuda.max_memory_allocated()
    later = outside(free_before) - context
    gc.collect()
    of_libraries = torch.cuda.memory_allocated()
    return {
        "device_memory_gib": torch.cuda.mem_get_info()[1] / GIB,
        "context_gib": context / GIB,
        "workspace_gib": (later + of_libraries) / GIB,
        "fragmentation_gib": fragmentation / GIB,
    }


def main() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    layout = parallel.initialize(parallel_config(), seed=1, timeout_seconds=120)
    footprint = measure(int(sys.argv[1]), layout)
    parallel.destroy()
    print(json.dumps(footprint))


if __name__ == "__main__":
    main()
