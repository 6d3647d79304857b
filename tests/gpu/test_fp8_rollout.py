"""FP8 weights in vLLM on the GPU: a sync makes of the trainer's weights what vLLM makes of the checkpoint's."""

import time
from pathlib import Path

import pytest

from megatron_ext import hf_checkpoint, model, parallel
from rollout.engine import Engine, stop_engines
from rollout.sampler import generate, make_requests
from rollout.sampling import Sampling
from rollout.vllm_platform import QUANTIZATIONS
from rollout.weight_sync.sync import WeightSync
from tests.gpu.conftest import tiny_engine
from tests.responses import make_prompt, plain
from tests.rollout.test_vllm import fresh_results, start_fresh
from tests.settings import precision_config

SAMPLING = Sampling(max_tokens=16, stop_token_ids=(2,))
PROMPTS = [make_prompt(f"p{i}", [3 + (7 * i + j) % 200 for j in range(3 + 10 * i)]) for i in range(4)]


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_a_sync_quantises_as_vllm_does_when_it_loads_the_checkpoint(
    quantization: str, layout: parallel.Parallel, folder: Path, tmp_path: Path
) -> None:
    """Digests of all tensors, FP8 values and scales, and every token and log-prob, of a fresh vLLM on the export."""
    policy = model.build(hf_checkpoint.config(folder), layout, precision_config())
    hf_checkpoint.load(policy.shards, folder)
    export = tmp_path / "export"
    hf_checkpoint.export(policy.shards, folder, export, True)
    settings = tiny_engine(export, quantization=quantization)
    requests = make_requests(PROMPTS, 2, seed=5, step=0)
    fresh = start_fresh(settings, requests, SAMPLING, tmp_path / "fresh")
    assert fresh.wait(400) == 0
    workers, expected = fresh_results(tmp_path / "fresh")
    engine = Engine(settings, tmp_path / "engine.log")
    try:
        engine.wait_until_ready(time.monotonic() + 400)
        weight_sync = WeightSync(
            policy.shards, [engine], parallel.control_group(), bucket_bytes=1 << 20, verify_every=1, plans=tmp_path
        )
        for version in (1, 2):  # the second quantises over what the first left
            weight_sync.sync(version)
            assert engine.call("GET", "/weights/digest")["workers"] == workers
        responses = plain(generate([engine], PROMPTS, SAMPLING, samples_per_prompt=2, seed=5, step=0))
        assert [(r.key, r.tokens, r.logprobs) for r in responses] == [(r.key, r.tokens, r.logprobs) for r in expected]
    finally:
        stop_engines([engine])
