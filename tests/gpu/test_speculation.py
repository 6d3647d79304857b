"""Speculative decoding in vLLM on the GPU: log-probs are the model's, with CUDA graphs, and also after sleep."""

import time
from collections.abc import Callable
from pathlib import Path

import torch

from megatron_ext import hf_checkpoint, model, parallel
from rollout.engine import Engine, stop_engines
from rollout.sampler import generate
from rollout.sampling import Sampling
from rollout.weight_sync.sync import WeightSync
from tests.gpu.conftest import TINY, tiny_engine
from tests.responses import PlainResponse, make_prompt, plain
from tests.rollout.speculating import LAYERS_SHARE, repeating
from tests.rollout.test_vllm import logprobs_of
from tests.settings import precision_config

TOKENS = 48
SAMPLING = Sampling(max_tokens=TOKENS, stop_token_ids=(2,), temperature=0.2)
PROMPTS = [make_prompt(f"p{i}", ([5 + i, 40 + 3 * i, 90 + i] * 9)[: 5 + 4 * i]) for i in range(4)]


def test_tokens_of_accepted_drafts_have_the_models_log_probs(
    layout: parallel.Parallel, folder: Path, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """Within the bounds of trainer and vLLM, over the temperature; a response alone in fewer steps than it has tokens;
    and the same bits after sleep, wake and sync."""
    settings = tiny_engine(
        folder, sleep=True, speculative={"method": "ngram", "draft_tokens": 3, "lookup_min": 1, "lookup_max": 3}
    )
    engine = Engine(settings, tmp_path / "engine.log")

    def responses(prompts: int = len(PROMPTS), samples: int = 2) -> list[PlainResponse]:
        return plain(generate([engine], PROMPTS[:prompts], SAMPLING, samples_per_prompt=samples, seed=5, step=0))

    try:
        policy = model.build(hf_checkpoint.config(folder), layout, precision_config())
        hf_checkpoint.load(policy.shards, folder)
        for shard in policy.shards:
            if shard.name.endswith(("linear_proj.weight", "linear_fc2.weight")):
                shard.tensor.mul_(LAYERS_SHARE)
        engine.wait_until_ready(time.monotonic() + 400)
        weight_sync = WeightSync(
            policy.shards, [engine], parallel.control_group(), bucket_bytes=1 << 20, verify_every=1, plans=tmp_path
        )
        weight_sync.sync(1)
        first = responses()
        before = engine.health()["progress"]
        (alone,) = responses(prompts=1, samples=1)
        # It counts commands, too.
        steps_at_most = engine.health()["progress"] - before
        engine.call("POST", "/sleep", {})
        engine.call("POST", "/wake", {"tags": ["weights"]})
        weight_sync.sync(1)
        engine.call("POST", "/wake", {"tags": ["kv_cache"]})
        assert responses() == first
    finally:
        stop_engines([engine])
    record_property("tokens_and_steps", [len(alone.tokens), steps_at_most])
    assert steps_at_most < len(alone.tokens)
    network = repeating(TINY.model(0)).float()
    gap = torch.cat([(logprobs_of(network, r, SAMPLING.temperature) - torch.tensor(r.logprobs)).abs() for r in first])
    assert gap.mean() < 0.08 / SAMPLING.temperature and gap.max() < 0.5 / SAMPLING.temperature
