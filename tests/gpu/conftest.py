"""What the GPU checks share: one message where there is no GPU, a tiny model, and this process as the only rank."""

import os
import socket
from pathlib import Path

import pytest
import torch

from megatron_ext.layout import Layout
from megatron_ext.model import ModelSettings
from megatron_ext.optimizer import OptimizerSettings
from megatron_ext.precision import Precision
from tests.rollout.twins import Twin

TINY = Twin(heads=4, kv_heads=2, vocab=256, tied=False, bias=False, dtype=torch.bfloat16)
BF16 = ModelSettings(Precision("bf16"), recompute="none", distributed_optimizer=True)
SETTINGS = OptimizerSettings(
    learning_rate=0.1,  # far above what BF16 rounds away
    min_lr_ratio=1.0,
    warmup_fraction=0.0,
    decay="constant",
    betas=(0.9, 0.95),
    epsilon=1e-8,
    weight_decay=0.1,
    clip_grad_norm=1.0,
)


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
    yield parallel.initialize(Layout(), seed=1, timeout_seconds=120)
    parallel.destroy()


@pytest.fixture
def policy(layout, folder: Path):
    """A fresh trainer model on Transformer Engine with the tiny model's weights."""
    from megatron_ext import hf_checkpoint, model

    built = model.build(hf_checkpoint.config(folder), layout, BF16)
    hf_checkpoint.load(built.shards, folder)
    return built
