"""``python -m tests.te.gpu_suite OUTPUT``: tests/gpu on a fake GPU, its outcomes as JSON {test: [outcome, error]}.

Models are tiny where nothing but their size is in the way. To be started within ``machine``.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rewards import serve
from rollout import vllm_platform
from tests.recipes import tiny
from tests.settings import precision_config
from tests.te import fake_gpu, packages

# vLLM's CPU build has no kernels for them.
LEFT_OUT = ("fp8_per_tensor", "fp8_per_block")
# Of several GPUs, or of a GPU's memory and speed alone: these run in tests/test_gpu_rehearsal.py.
ELSEWHERE = ["test_memory.py", "test_node.py", "test_node_recipe.py", "test_two_nodes.py"]
# Its kernel is not for each processor; tests/rollout/test_fp8_cache.py says which.
if vllm_platform.CPU.lacks_for_fp8_cache():
    ELSEWHERE.append("test_fp8_cache.py")


class Plugin:
    """Changes the checks when they are imported, and keeps what each came to. ``folder``: for the small run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.outcomes: dict[str, list[str]] = {}

    def pytest_collection_finish(self) -> None:
        serve.JudgeServer.start = start_a_fake_judge  # type: ignore[method-assign]
        make_small()
        make_run_small(self.folder)

    def pytest_runtest_logreport(self, report: Any) -> None:
        name = report.nodeid.removeprefix("tests/gpu/")
        if report.when == "call" or report.outcome != "passed":
            self.outcomes[name] = [report.outcome, str(report.longrepr or "")]


def make_small() -> None:
    """Sizes, and FP8 in the arithmetic that there is."""
    from tests.gpu import test_decoding, test_fp8, test_sleep

    for name in test_fp8.FP8:
        test_fp8.FP8[name] = precision_config("bf16")
    for model in (test_fp8.SMALL, test_fp8.LAYERS_72B):
        model.update({"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1, "vocab_size": 256})
        model.update({"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64})
    test_fp8.TOKENS = 512
    batch, losses = test_fp8.batch, test_fp8.losses
    test_fp8.batch = lambda config, tokens, count: batch(config, min(tokens, test_fp8.TOKENS), count)
    test_fp8.losses = lambda config, layout, precision, count: losses(config, layout, precision, 3)
    test_sleep.KV_CACHE_GIB = 0.02
    test_decoding.NARROW = replace(test_decoding.NARROW, layers=2)
    test_decoding.FEW, test_decoding.MANY = 4, 24


def make_run_small(folder: Path) -> None:
    """The demo's recipe on the tests' tiny model and rows."""
    from transformers import AutoModelForCausalLM

    from tests.gpu import test_recipe

    tiny.make(folder)
    network = AutoModelForCausalLM.from_pretrained(folder / "model")
    test_recipe.PARAMETERS = sum(parameter.numel() for parameter in network.parameters())
    test_recipe.RECIPE = [*tiny.overrides(folder, folder / "unused"), *test_recipe.RECIPE]
    test_recipe.RECIPE = [one for one in test_recipe.RECIPE if not one.startswith("run_dir=")]


def start_a_fake_judge(judge: serve.JudgeServer) -> None:
    """In the place of ``JudgeServer.start``; a real ``vllm serve`` sleeps and wakes in tests/rewards/test_serve.py."""
    command = [sys.executable, "-m", "tests.te.fake_judge", *judge.command()]
    judge.process = subprocess.Popen(command, env=judge.environment(), start_new_session=True)


def main(output: Path) -> None:
    memory = output.with_suffix(".memory")
    memory.mkdir()
    os.environ[fake_gpu.GIVEN_BACK] = str(memory)
    # For processes that are started anew, on the CPU platform: they must not take Transformer Engine's kernels.
    os.environ |= {"PYTHONPATH": f"{packages.ROOT}:{packages.site()}", "NVTE_PROJECT_BUILDING": "1"}
    fake_gpu.begin("cpu")
    plugin = Plugin(output.with_suffix(".tiny"))
    chosen = " and ".join(f"not {name}" for name in LEFT_OUT)
    ignored = [f"--ignore=tests/gpu/{name}" for name in ELSEWHERE]
    pytest.main(["-q", "-p", "no:cacheprovider", "--tb=short", "-k", chosen, *ignored, "tests/gpu"], plugins=[plugin])
    output.write_text(json.dumps(plugin.outcomes))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
