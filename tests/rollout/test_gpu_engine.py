"""What an engine and a trainer's rank on GPUs are started with; no GPU is needed to say it."""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_ext.platform import cuda
from rollout import chat_layout
from rollout import settings as rollout_settings
from rollout.engine import environment
from rollout.engine_server import engine_args
from tests.settings import engine_settings, rollout_config

QUEUES = "CUDA_DEVICE_MAX_CONNECTIONS"


def on_gpus(**changes: Any) -> Any:
    return engine_settings("model", "bfloat16", 64, platform="cuda", devices=(1, 0), **changes)


def test_a_rank_chooses_one_hardware_queue_before_cuda_starts_and_engines_do_not_inherit_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first call of CUDA reads the variable. Here it finds no GPU."""
    monkeypatch.setenv(QUEUES, "")
    monkeypatch.delenv(QUEUES)
    seen = []

    def first_call() -> bool:
        seen.append(os.environ.get(QUEUES))
        return False

    monkeypatch.setattr(torch.cuda, "is_available", first_call)
    with pytest.raises(RuntimeError, match="no CUDA device is visible"):
        cuda.activate()
    assert seen == ["1"]
    assert QUEUES not in environment(on_gpus())


def test_workers_are_spawned_so_that_they_end_with_their_engine() -> None:
    """The workers of a CPU's engine, which vLLM spawns by itself, are killed with it in ``test_vllm``."""
    for settings in (on_gpus(), engine_settings("model", "bfloat16", 64)):
        assert environment(settings)["VLLM_WORKER_MULTIPROC_METHOD"] == "spawn"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Of a model. Arguments are made without vLLM, whose import takes long; ``tests/test_vllm_contract.py`` compares
    their names."""
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(EngineArgs=SimpleNamespace))  # type: ignore[arg-type]
    monkeypatch.setattr(chat_layout, "register", lambda: None)
    (tmp_path / "config.json").write_text(json.dumps({}))
    return str(tmp_path)


@pytest.mark.parametrize("changes", [{}, {"async_scheduling": True}, {"model_runner_v2": True}])
def test_vllm_works_on_a_gpu_as_on_a_cpu_unless_told_otherwise(changes: dict[str, bool], folder: str) -> None:
    settings = engine_settings(folder, "bfloat16", 64, platform="cuda", devices=(0,), **changes)
    assert engine_args(settings).async_scheduling is changes.get("async_scheduling", False)
    assert environment(settings)["VLLM_USE_V2_MODEL_RUNNER"] == ("1" if "model_runner_v2" in changes else "0")
    for name in changes:
        with pytest.raises(ValueError, match=f"rollout.{name}=true: vLLM has it on GPUs only"):
            rollout_settings.check(rollout_config(**changes), "cpu")
        rollout_settings.check(rollout_config(**changes), "cuda")


def test_an_engine_captures_the_steps_of_so_many_sequences_as_it_decodes_at_once(folder: str) -> None:
    """Nineteen of up to 128, the default; 100 is no multiple of 8 and is captured itself. Nothing is compiled."""
    graphs = engine_args(engine_settings(folder, "bfloat16", 64, platform="cuda", devices=(0,)))
    assert not graphs.enforce_eager
    assert graphs.compilation_config == {
        "mode": 0,
        "cudagraph_mode": "FULL_DECODE_ONLY",
        "cudagraph_capture_sizes": [1, 2, 4, *range(8, 129, 8)],
    }
    hundred = engine_args(engine_settings(folder, "bfloat16", 64, platform="cuda", devices=(0,), max_num_seqs=100))
    assert hundred.compilation_config["cudagraph_capture_sizes"][-2:] == [96, 100]
    two = engine_args(engine_settings(folder, "bfloat16", 64, platform="cuda", devices=(0,), max_num_seqs=2))
    assert two.compilation_config["cudagraph_capture_sizes"] == [1, 2]


@pytest.mark.parametrize(("platform", "cuda_graphs"), [("cuda", False), ("cpu", True)])
def test_without_graphs_an_engine_launches_each_kernel_by_itself(platform: str, cuda_graphs: bool, folder: str) -> None:
    """A CPU has none."""
    eager = engine_args(engine_settings(folder, "bfloat16", 64, platform=platform, cuda_graphs=cuda_graphs))
    assert eager.enforce_eager and not hasattr(eager, "compilation_config")


def test_drafts_and_the_graphs_of_steps_that_verify_them(folder: str) -> None:
    """Sequences differ in their draft tokens, so that graphs serve any step of so many tokens."""
    ngrams = {"method": "ngram", "draft_tokens": 3, "lookup_min": 2, "lookup_max": 5}
    arguments = engine_args(
        engine_settings(folder, "bfloat16", 64, platform="cuda", devices=(0,), max_num_seqs=8, speculative=ngrams)
    )
    assert arguments.speculative_config == {
        "method": "ngram",
        "num_speculative_tokens": 3,
        "prompt_lookup_min": 2,
        "prompt_lookup_max": 5,
    }
    assert arguments.compilation_config["cudagraph_mode"] == "FULL"
    assert arguments.compilation_config["cudagraph_capture_sizes"] == [4, 8, 16, 32]
    none = engine_args(engine_settings(folder, "bfloat16", 64, platform="cuda", devices=(0,)))
    assert not hasattr(none, "speculative_config")
