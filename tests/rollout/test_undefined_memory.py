"""Nothing that a sleeping engine lost is used afterwards: vLLM on a CPU over a fake of its sleep (``sleeping_engine``).

With the scheduling that is tested elsewhere, with the asynchronous one that vLLM has on GPUs, and with drafts.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rollout.sampling import Sampling
from tests import warm
from tests.rollout.sleeping_engine import VARIANTS
from tests.rollout.twins import TIED
from tests.rollout.vllm_processes import as_argument
from tests.settings import engine_settings

ROOT = Path(__file__).resolve().parents[2]
SAME = ("slept once", "slept twice", "broken off", "broken off and slept")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of each variant: what the engine had and said, by when."""
    folder = tmp_path_factory.mktemp("sleeping")
    settings = engine_settings(
        model=str(TIED.save(folder / "model", seed=0)),
        dtype="bfloat16",
        max_model_len=96,
        max_num_seqs=8,
        max_num_batched_tokens=96,
        kv_cache_gib=0.02,
    )
    sampling = Sampling(max_tokens=10, stop_token_ids=(2, 11))
    command = [sys.executable, "-m", "tests.rollout.sleeping_engine", as_argument(settings), as_argument(sampling)]
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "TORCH_COMPILE_DISABLE": "1"}
    environment |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1", "VLLM_NO_USAGE_STATS": "1"}
    with warm.processes():
        done = subprocess.run(
            [*command, str(folder)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400
        )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return {name: json.loads((folder / f"{name}.json").read_text()) for name in VARIANTS}


@pytest.mark.parametrize("variant", VARIANTS)
def test_after_sleep_and_after_a_batch_that_was_broken_off_every_bit_is_as_before(
    variant: str, results: dict[str, Any]
) -> None:
    """Parameters with their padding, tokens, log-probs. Parameters, buffers and the cache are where they were: a CUDA
    graph would read them."""
    first = results[variant]["first"]
    assert len(first["responses"]) == 8
    for when in SAME:
        assert results[variant][when]["digests"] == first["digests"], when
        assert results[variant][when]["responses"] == first["responses"], when
        assert results[variant][when]["addresses"] == first["addresses"], when
    other = results[variant]["other"]
    assert len(first["addresses"]) > 20 and other["addresses"] == first["addresses"]
    assert all(other["digests"][0][name] != digest for name, digest in first["digests"][0].items())
    assert other["responses"] != first["responses"]


def test_asynchronous_scheduling_says_the_same(results: dict[str, Any]) -> None:
    ours, theirs = (results[name]["first"]["responses"] for name in ("synchronous", "asynchronous"))
    assert [response["tokens"] for response in theirs] == [response["tokens"] for response in ours]


def test_tokens_are_drafted_where_it_is_asked_for(results: dict[str, Any]) -> None:
    assert [results[name]["drafted"] > 0 for name in VARIANTS] == [False, False, True]
