"""What a process keeps of a GPU, how fast memory is copied, and what an engine's step costs beside arithmetic."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from megatron_ext import hf_checkpoint, model, parallel
from rollout.engine import Engine, stop_engines
from rollout.sampler import generate
from rollout.sampling import Sampling
from rollout.weight_sync.sync import WeightSync
from tests.gpu.test_fp8 import FREE_GIB
from tests.responses import make_prompt
from tests.rollout.twins import Twin
from tests.settings import CONF, engine_settings, precision_config

ROOT = Path(__file__).resolve().parents[2]
TABLE = yaml.safe_load((CONF / "preflight" / "h100.yaml").read_text())
LINKS = yaml.safe_load((CONF / "simulate" / "h100.yaml").read_text())
COPIED_BYTES = 2**30
REPEATS = 10
# As many layers as the 72B model, so narrow that their arithmetic takes no time.
NARROW = Twin(heads=8, kv_heads=4, vocab=256, tied=False, bias=False, dtype=torch.bfloat16, intermediate=256, layers=80)
FEW, MANY = 64, 192  # tokens; the model has 256 positions
MOST_DECODE_MS = 100

Record = Callable[[str, object], None]


def test_a_trainers_process_keeps_what_the_preflight_counts(gpu: None, record_property: Record) -> None:
    """More than the table of conf/preflight and what the recipes leave free would not fit."""
    torch.cuda.synchronize()
    free = torch.cuda.mem_get_info()[0]
    command = [sys.executable, "-m", "tests.gpu.footprint", str(free)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=300)
    assert done.returncode == 0
    found = json.loads(done.stdout.splitlines()[-1])
    for name, value in found.items():
        record_property(name, value)
    names = ("context_gib", "workspace_gib", "fragmentation_gib")
    assert all(found[name] >= 0 for name in names)
    assert sum(found[name] for name in names) < sum(TABLE[name] for name in names) + FREE_GIB


@pytest.mark.parametrize("name", ["copy_gb_s", "pcie_gb_s"])
def test_memory_is_copied_at_half_the_assumed_speed_or_more(name: str, gpu: None, record_property: Record) -> None:
    """Within the GPU, and from pinned memory of the host. Less means a slot of fewer lanes or a throttled GPU."""
    target = torch.empty(COPIED_BYTES, dtype=torch.uint8, device="cuda")
    source = torch.empty_like(target)
    if name == "pcie_gb_s":
        source = torch.empty(COPIED_BYTES, dtype=torch.uint8, pin_memory=True)
    target.copy_(source, non_blocking=True)
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(REPEATS):
        target.copy_(source, non_blocking=True)
    torch.cuda.synchronize()
    speed = REPEATS * COPIED_BYTES / (time.perf_counter() - started) / 1e9
    record_property(name, speed)
    assert speed > LINKS[name] / 2


def test_an_engines_step_of_80_narrow_layers(
    layout: parallel.Parallel, tmp_path: Path, record_property: Record
) -> None:
    """Scheduler, sampling and the launches of 80 layers: what a decoding step of the 72B model costs beside reading
    weights. The difference between a long and a short generation, so that prefill and HTTP don't count."""
    folder = NARROW.save(tmp_path / "narrow", seed=0)
    settings = engine_settings(
        model=str(folder),
        dtype="bfloat16",
        max_model_len=MANY + 32,
        max_num_seqs=8,
        max_num_batched_tokens=512,
        kv_cache_gib=0.5,
        platform="cuda",
    )
    prompts = [make_prompt(f"p{i}", [3 + i, 4, 5]) for i in range(8)]
    engine = Engine(settings, tmp_path / "engine.log")

    def seconds(tokens: int) -> float:
        started = time.perf_counter()
        batch = generate([engine], prompts, Sampling(tokens, ()), samples_per_prompt=1, seed=5, step=0)
        assert int(batch.lengths.sum()) == sum(3 + tokens for _ in prompts)
        return time.perf_counter() - started

    try:
        policy = model.build(hf_checkpoint.config(folder), layout, precision_config())
        hf_checkpoint.load(policy.shards, folder)
        engine.wait_until_ready(time.monotonic() + 400)
        WeightSync(
            policy.shards, [engine], parallel.control_group(), bucket_bytes=1 << 20, verify_every=1, plans=tmp_path
        ).sync(1)
        seconds(FEW)
        few, many = (min(seconds(tokens) for _ in range(3)) for tokens in (FEW, MANY))
    finally:
        stop_engines([engine])
    decode_ms = 1000 * (many - few) / (MANY - FEW)
    record_property("decode_ms", decode_ms)
    assert 0 < decode_ms < MOST_DECODE_MS
