"""What the GPU checks share: one message where there is no GPU, a tiny model, and this process as the only rank."""

import os
import socket
from pathlib import Path

import pytest
import torch

from tests.rollout.twins import Twin
from tests.settings import optimizer_config, parallel_config, precision_config, schedule_config

TINY = Twin(heads=4, kv_heads=2, vocab=256, tied=False, bias=False, dtype=torch.bfloat16)
OPTIMIZER = optimizer_config(weight_decay=0.1)
SCHEDULE = schedule_config(0.1)  # far above what BF16 rounds away


@pytest.fixture(scope="session", autouse=True)
def gpu() -> None:
    if not torch.cuda.is_available():
        pytest.fail("no CUDA device is visible: these checks need one NVIDIA GPU and `make gpu-check EXTRA=gpu`")


@pytest.fixture(scope="session")
def folder(gpu: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as a Hugging Face folder, BF16, seed 0."""
    return TINY.save(tmp_path_factory.mktemp("tiny"), seed=0)


@pytest.fixture(scope="session")
def layout(gpu: None):
    """This process as a world of one rank, on NCCL."""
    from megatron_ext import parallel, platform

    platform.activate("cuda")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = str(port)
    yield parallel.initialize(parallel_config(), seed=1, timeout_seconds=120)
    parallel.destroy()


@pytest.fixture
def policy(layout, folder: Path):
    """A fresh trainer model on Transformer Engine with the tiny model's weights."""
    from megatron_ext import hf_checkpoint, model

    built = model.build(hf_checkpoint.config(folder), layout, precision_config())
    hf_checkpoint.load(built.shards, folder)
    return built
