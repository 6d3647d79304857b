"""The CPU half of the checkpoint test: ``python -m tests.gpu.cpu_checkpoint save|load MODEL_FOLDER FOLDER``.

``save`` makes one update and a checkpoint, ``load`` reads one; either leaves the weights, by Hugging Face
name, in ``weights.pt``. ``load`` then makes an update.
"""

import os
import socket
import sys
from pathlib import Path

from megatron_ext import platform

platform.activate("cpu")

import torch  # noqa: E402

from megatron_ext import checkpoint, hf_checkpoint, model, optimizer, parallel  # noqa: E402
from megatron_ext.host_buffers import HostBuffers  # noqa: E402
from tests.gpu.conftest import OPTIMIZER, SCHEDULE  # noqa: E402
from tests.settings import parallel_config, precision_config  # noqa: E402


def main() -> None:
    action, source, target = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    layout = parallel.initialize(parallel_config(), seed=1, timeout_seconds=120)
    policy = model.build(hf_checkpoint.config(source), layout, precision_config())
    hf_checkpoint.load(policy.shards, source)
    optim, schedule = optimizer.build(policy, OPTIMIZER, SCHEDULE, steps=10)
    optim.reload_model_params()

    def update() -> None:
        """One step with random gradients."""
        draw = torch.Generator().manual_seed(1)
        for parameter in policy.chunks[0].module.parameters():
            parameter.main_grad.copy_(torch.randn(parameter.shape, generator=draw))
        optimizer.step(optim, schedule)

    if action == "save":
        update()
        saver = checkpoint.Saver(target, keep=1)
        saver.save(1, {checkpoint.POLICY: checkpoint.snapshot(policy, optim, schedule, HostBuffers())}, {})
        saver.wait()
    else:
        newest = checkpoint.latest(target)
        assert newest is not None and checkpoint.load(newest, policy, optim, schedule) == 1
    torch.save({s.blocks[0].hf_name: s.tensor for s in policy.shards}, target / "weights.pt")
    if action == "load":
        loaded = [shard.tensor.clone() for shard in policy.shards]
        update()
        assert not all(torch.equal(shard.tensor, old) for shard, old in zip(policy.shards, loaded, strict=True))
    parallel.destroy()


if __name__ == "__main__":
    main()
