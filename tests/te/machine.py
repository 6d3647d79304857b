"""``python -m tests.te.machine``: a template (see ``tests.warm``) of processes on a machine with a fake GPU.

They have Transformer Engine, with kernels computed by torch (``fake_kernels``). A process has the fake GPU from when it
activates the platform ``cuda``. Engines for that platform are those of vLLM's CPU build, which can sleep here.
"""

import importlib
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import warm
from tests.te import fake_extension, fake_gpu, fake_kernels

NAME = "tests.te.machine"
PROBE_SIZE = 192  # of the product by which slow ranks are found


def load() -> None:
    """Import what processes need: what asks for a GPU meanwhile, finds it."""
    with pytest.MonkeyPatch.context() as during_imports:
        for patch in fake_gpu.patches(torch.device("cpu")):
            during_imports.setattr(*patch)
        fake_kernels.install(fake_extension.install())
        fake_kernels.install_attention()
        for module in warm.IMPORTED[:-1]:
            importlib.import_module(module)
    importlib.import_module(warm.IMPORTED[-1])
    activate_a_fake()
    start_engines_on_the_cpu()
    let_engines_sleep()
    warm.program = NAME


def activate_a_fake() -> None:
    from megatron_ext.platform import cuda, features

    activate = cuda.activate

    def activate_on_a_fake_gpu() -> None:
        if not torch.cuda.is_available():
            fake_gpu.begin("cpu")
        activate()

    cuda.activate = activate_on_a_fake_gpu
    features.CAPABILITIES["cuda"] = replace(features.CAPABILITIES["cuda"], probe_size=PROBE_SIZE)


def start_engines_on_the_cpu() -> None:
    """The transports of the weight sync between GPUs have a fake of their own, ``tests.rollout.fake_cuda``."""
    from rollout import vllm_platform

    real, vllm_platform._cuda_device = vllm_platform.CUDA, vllm_platform.CPU.current_device
    vllm_platform.CUDA = replace(
        vllm_platform.CPU, name="cuda", quantizations=real.quantizations, network_group=real.network_group
    )
    vllm_platform.PLATFORMS["cuda"] = vllm_platform.CUDA


def let_engines_sleep() -> None:
    """As in ``tests.rollout.sleeping_engine``: what sleeps is filled with NaN. The bytes are given back to the fake GPU
    (``fake_gpu.GIVEN_BACK``)."""
    from vllm.platforms.cpu import CpuPlatform
    from vllm.v1.worker.cpu_worker import CPUWorker

    from tests.rollout import sleeping_engine

    of_the_model = sleeping_engine.make_cpu_workers_sleep()

    class Backend(sleeping_engine.UndefinedMemory):
        def __init__(self, worker: Any) -> None:
            self.sizes = {
                "weights": sum(tensor.untyped_storage().nbytes() for tensor in of_the_model.values()),
                "kv_cache": sum(cache.nbytes for cache in worker.model_runner.kv_caches),
            }
            super().__init__([*of_the_model.values(), *worker.model_runner.kv_caches])
            self.asleep: set[str] = set()

        def suspend(self, level: int) -> None:
            super().suspend(level)
            self.give_back(set(self.sizes))

        def resume(self, tags: list[str] | None) -> None:
            self.give_back(self.asleep - set(tags or self.sizes))

        def give_back(self, asleep: set[str]) -> None:
            self.asleep = asleep
            size = sum(self.sizes[tag] for tag in asleep)
            Path(os.environ[fake_gpu.GIVEN_BACK], str(os.getpid())).write_text(str(size))

    def backend(worker: Any) -> Backend:
        if worker._sleep_mode_backend is None:
            worker._sleep_mode_backend = Backend(worker)
        return worker._sleep_mode_backend

    CPUWorker.sleep_mode_backend = property(backend)
    CpuPlatform.is_sleep_mode_available = lambda platform: True


if __name__ == "__main__":
    # Not as __main__, whose place another module takes.
    from tests.te import machine

    warm.main(machine.load)
