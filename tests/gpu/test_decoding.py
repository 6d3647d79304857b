"""What an engine's decoding step costs beside arithmetic: 80 narrow layers, whose arithmetic takes no time."""

import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import LlamaConfig

from megatron_ext import model, parallel
from rollout.engine import Engine, stop_engines
from rollout.sampler import generate
from rollout.sampling import Sampling
from rollout.weight_sync.sync import WeightSync
from tests.responses import make_prompt
from tests.rollout.twins import Twin
from tests.settings import engine_settings, precision_config

# As many layers as the 72B model.
NARROW = Twin(heads=8, kv_heads=4, vocab=256, tied=False, bias=False, dtype=torch.bfloat16, intermediate=256, layers=80)
FEW, MANY = 64, 192  # tokens; the model has 256 positions
PROMPT_TOKENS = 3
SEQUENCES = 8
MOST_DECODE_MS = 100


def step_ms(config: LlamaConfig, layout: parallel.Parallel, folder: Path) -> float:
    """Milliseconds of a decoding step of eight sequences: the difference between a long and a short generation, so that
    prefill and HTTP don't count. The weights are random."""
    config.save_pretrained(folder / "model")
    settings = engine_settings(
        model=str(folder / "model"),
        dtype="bfloat16",
        max_model_len=MANY + 32,
        max_num_seqs=SEQUENCES,
        max_num_batched_tokens=512,
        kv_cache_gib=0.5,
        platform="cuda",
    )
    prompts = [make_prompt(f"p{i}", [3 + i] * PROMPT_TOKENS) for i in range(SEQUENCES)]
    engine = Engine(settings, folder / "engine.log")

    def run(tokens: int) -> tuple[float, int]:
        """Seconds and steps. One of the tokens ends a response; the longest one says how many steps there were."""
        started = time.perf_counter()
        sampling = Sampling(tokens, (config.vocab_size - 1,))
        batch = generate([engine], prompts, sampling, samples_per_prompt=1, seed=5, step=0)
        return time.perf_counter() - started, int(batch.lengths.max()) - PROMPT_TOKENS

    try:
        policy = model.build(config, layout, precision_config())
        with torch.no_grad():
            for shard in policy.shards:
                shard.tensor.normal_(std=0.02)
        engine.wait_until_ready(time.monotonic() + 400)
        WeightSync(
            policy.shards, [engine], parallel.control_group(), bucket_bytes=1 << 20, verify_every=1, plans=folder
        ).sync(1)
        run(FEW)
        (few, few_steps), (many, many_steps) = (min(run(tokens) for _ in range(3)) for tokens in (FEW, MANY))
    finally:
        stop_engines([engine])
    assert few_steps < many_steps
    return 1000 * (many - few) / (many_steps - few_steps)


def test_an_engines_step_of_80_narrow_layers(
    layout: parallel.Parallel, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """Scheduler, sampling and the launches of 80 layers: what a decoding step of the 72B model costs beside reading
    weights."""
    config = NARROW.config()
    config.architectures = ["LlamaForCausalLM"]
    decode_ms = step_ms(config, layout, tmp_path)
    record_property("decode_ms", decode_ms)
    assert 0 < decode_ms < MOST_DECODE_MS
