"""vLLM with an FP8 key-value cache on the CPU: its samples are those of a model whose keys and values are truncated.

Its kernel there rounds toward zero, those for a GPU to the nearest (``tests/gpu/test_fp8_cache.py``), and it wants
AVX-512. On another processor the setting is refused, and so does vLLM refuse it.
"""

import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from benchmarks.fp8_gap import (
    ROUNDED_ATTENTION,
    ROUNDED_CACHE,
    TRUNCATED_CACHE,
    attend_to_a_rounded_cache,
    toward_zero,
)
from rollout import settings as rollout_settings
from rollout import vllm_platform
from rollout.engine import Engine, EngineError, stop_engines
from rollout.sampler import generate
from rollout.sampling import Sampling
from rollout.weight_sync.sync import WeightSync
from tests import warm
from tests.responses import PlainResponse, make_prompt, plain
from tests.rollout.test_vllm import logprobs_of
from tests.rollout.twins import Twin, tensor_parallel_shards
from tests.settings import engine_settings, rollout_config

# vLLM's dtype → the largest share of the gap to the unrounded model that may be left to the one with a truncated cache.
# Measured: 0.000006 and 0.61. What BF16 rounds first falls to FP8's next number now and then.
SHARES = {"float32": 0.001, "bfloat16": 0.85}
TWIN = Twin(heads=4, kv_heads=2, vocab=203, tied=True, bias=True, dtype=torch.float32)
SAMPLING = Sampling(max_tokens=16, stop_token_ids=(2,))
PROMPTS = [make_prompt(f"p{i}", [3 + (7 * i + j) % 180 for j in range(3 + 10 * i)]) for i in range(4)]


def in_fp8(values: torch.Tensor) -> torch.Tensor:
    return values.clamp(-448.0, 448.0).to(torch.float8_e4m3fn).float()


def test_toward_zero_takes_the_nearest_number_of_fp8_that_is_not_larger() -> None:
    """Against a search among all numbers of FP8."""
    numbers = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    torch.manual_seed(0)
    values = torch.cat([numbers, 10 ** (6 * torch.rand(2000) - 3), torch.tensor([1e-9, 447.9, 448.0, 500.0])])
    not_larger = numbers[torch.searchsorted(numbers, values, right=True) - 1]
    assert torch.equal(toward_zero(values), not_larger)
    assert torch.equal(toward_zero(-values), -not_larger)


@pytest.mark.parametrize("rounds_queries", [False, True])
def test_the_reference_rounds_what_an_fp8_cache_holds_and_nothing_else(rounds_queries: bool) -> None:
    """Against attention written out. A key above FP8's largest number becomes that."""
    torch.manual_seed(0)
    query, key, value = (3 * torch.randn(1, heads, 5, 32) for heads in (4, 2, 2))
    key[0, 0, 1, 3] = 500.0
    output, _ = attend_to_a_rounded_cache(
        torch.nn.Module(), query, key, value, None, scaling=32**-0.5, rounds_queries=rounds_queries
    )
    if rounds_queries:
        query = in_fp8(query)
    key, value = (in_fp8(x).repeat_interleave(2, 1) for x in (key, value))
    assert key[0, 0, 1, 3] == 448.0
    scores = query @ key.transpose(2, 3) / 32**0.5
    weights = scores.masked_fill(torch.ones(5, 5).triu(1).bool(), float("-inf")).softmax(-1)
    assert torch.allclose(output, (weights @ value).transpose(1, 2), atol=1e-4)


def test_transformers_computes_with_the_reference() -> None:
    tokens = torch.tensor([[5, 9, 140, 5, 77]])
    logits = []
    for attention in ("sdpa", ROUNDED_CACHE, TRUNCATED_CACHE, ROUNDED_ATTENTION):
        model = TWIN.model(0).float()
        model.set_attn_implementation(attention)
        with torch.no_grad():
            logits.append(model(tokens).logits)
    unrounded, rounded, truncated, attention = logits
    assert 0.01 < (rounded - unrounded).abs().max() < 10
    assert 0.01 < (truncated - rounded).abs().max() < 10
    assert 0.01 < (attention - rounded).abs().max() < 10


@pytest.mark.parametrize("dtype", SHARES)
def test_samples_are_those_of_truncated_keys_and_values(dtype: str, tmp_path: Path) -> None:
    """Where the processor can't do it, the setting names what it lacks, and vLLM does not start."""
    lacking = vllm_platform.CPU.lacks_for_fp8_cache()
    twin = replace(TWIN, dtype=getattr(torch, dtype))
    settings = engine_settings(
        model=str(twin.save(tmp_path / "model", seed=0)),
        dtype=dtype,
        max_model_len=64,
        max_num_seqs=8,
        max_num_batched_tokens=64,
        kv_cache_gib=0.02,
        kv_cache_dtype="fp8",
    )
    with warm.processes():
        engine = Engine(settings, tmp_path / "engine.log")
    try:
        if lacking:
            with pytest.raises(ValueError, match=f"rollout.kv_cache_dtype='fp8': .*needs {', '.join(lacking)}, which"):
                rollout_settings.check(settings.rollout, "cpu")
            with pytest.raises(EngineError, match="FP8 KV cache on CPU requires x86 with AVX-512"):
                engine.wait_until_ready(time.monotonic() + 300)
            return
        rollout_settings.check(settings.rollout, "cpu")
        responses = synced_samples(engine, twin, tmp_path)
    finally:
        stop_engines([engine])
    gaps = {}
    for attention in ("sdpa", ROUNDED_CACHE, TRUNCATED_CACHE):
        model = twin.model(0).float()
        model.set_attn_implementation(attention)
        differences = [logprobs_of(model, response) - torch.tensor(response.logprobs) for response in responses]
        gaps[attention] = torch.cat(differences).abs().mean()
    assert gaps["sdpa"] > 0.1
    assert gaps[TRUNCATED_CACHE] < SHARES[dtype] * gaps["sdpa"]
    assert gaps[TRUNCATED_CACHE] < gaps[ROUNDED_CACHE]


def synced_samples(engine: Engine, twin: Twin, folder: Path) -> list[PlainResponse]:
    """Of the twin's weights, which a trainer's rank in this process has."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
    try:
        trainer = tensor_parallel_shards(twin, twin.model(0).state_dict(), 1, 0, torch.float32)
        engine.wait_until_ready(time.monotonic() + 300)
        assert dist.group.WORLD is not None
        WeightSync(trainer.shards, [engine], dist.group.WORLD, bucket_bytes=1 << 20, verify_every=1, plans=folder).sync(
            1
        )
        samples = [generate([engine], PROMPTS, SAMPLING, samples_per_prompt=2, seed=5, step=0) for _ in range(2)]
    finally:
        dist.destroy_process_group()
    first, again = (plain(batch) for batch in samples)
    assert first == again
    return first


@pytest.mark.parametrize("absent", ["avx512f", "avx512bw", "avx512dq", "avx512vl"])
def test_a_processor_without_avx_512_is_refused_by_name(absent: str, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = {"avx2", "avx512f", "avx512bw", "avx512dq", "avx512vl"}
    settings = rollout_config(kv_cache_dtype="fp8")
    monkeypatch.setattr(vllm_platform, "processor_flags", lambda cpuinfo: flags)
    rollout_settings.check(settings, "cpu")
    monkeypatch.setattr(vllm_platform, "processor_flags", lambda cpuinfo: flags - {absent})
    with pytest.raises(ValueError, match=f"a cpu needs {absent}, which this processor lacks; use rollout.kv_cache"):
        rollout_settings.check(settings, "cpu")
    rollout_settings.check(rollout_config(), "cpu")
    rollout_settings.check(settings, "cuda")
