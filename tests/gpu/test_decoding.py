"""What an engine's decoding step costs beside arithmetic, with CUDA graphs and without: 80 narrow layers, whose
arithmetic takes no time."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from transformers import LlamaConfig

from megatron_ext import model, parallel
from rollout.engine import Engine, stop_engines
from rollout.sampler import generate
from rollout.sampling import Sampling
from rollout.vllm_platform import decoding_graph_sizes
from rollout.weight_sync.sync import WeightSync
from tests.gpu.test_fp8 import FREE_GIB
from tests.responses import make_prompt
from tests.rollout.twins import Twin
from tests.settings import CONF, engine_settings, precision_config

# As many layers as the 72B model.
NARROW = Twin(heads=8, kv_heads=4, vocab=256, tied=False, bias=False, dtype=torch.bfloat16, intermediate=256, layers=80)
FEW, MANY = 64, 192  # tokens; the model has 256 positions
PROMPT_TOKENS = 3
SEQUENCES = 8
MOST_DECODE_MS = 100
TABLE = yaml.safe_load((CONF / "preflight" / "h100.yaml").read_text())
# As many as the recipes' engines decode at once, so that as many graphs are captured.
MAX_NUM_SEQS = yaml.safe_load((CONF / "rollout" / "vllm.yaml").read_text())["max_num_seqs"]


@dataclass(frozen=True)
class Step:
    """Milliseconds of an engine's decoding step, and GiB of the GPU that the engine had taken when it was ready."""

    ms: float
    engine_gib: float


def decoding_step(config: LlamaConfig, layout: parallel.Parallel, folder: Path, cuda_graphs: bool) -> Step:
    """A step of eight sequences: the difference between a long and a short generation, so that prefill and HTTP don't
    count. The weights are random."""
    config.save_pretrained(folder / "model")
    settings = engine_settings(
        model=str(folder / "model"),
        dtype="bfloat16",
        max_model_len=MANY + 32,
        max_num_seqs=MAX_NUM_SEQS,
        max_num_batched_tokens=512,
        kv_cache_gib=0.5,
        platform="cuda",
        cuda_graphs=cuda_graphs,
    )
    prompts = [make_prompt(f"p{i}", [3 + i] * PROMPT_TOKENS) for i in range(SEQUENCES)]
    policy = model.build(config, layout, precision_config())
    with torch.no_grad():
        for shard in policy.shards:
            shard.tensor.normal_(std=0.02)
    free_bytes = torch.cuda.mem_get_info()[0]
    engine = Engine(settings, folder / "engine.log")

    def run(tokens: int) -> tuple[float, int]:
        """Seconds and steps. One of the tokens ends a response; the longest one says how many steps there were."""
        started = time.perf_counter()
        sampling = Sampling(tokens, (config.vocab_size - 1,))
        batch = generate([engine], prompts, sampling, samples_per_prompt=1, seed=5, step=0)
        return time.perf_counter() - started, int(batch.lengths.max()) - PROMPT_TOKENS

    try:
        engine.wait_until_ready(time.monotonic() + 400)
        engine_bytes = free_bytes - torch.cuda.mem_get_info()[0]
        WeightSync(
            policy.shards, [engine], parallel.control_group(), bucket_bytes=1 << 20, verify_every=1, plans=folder
        ).sync(1)
        run(FEW)
        (few, few_steps), (many, many_steps) = (min(run(tokens) for _ in range(3)) for tokens in (FEW, MANY))
    finally:
        stop_engines([engine])
    assert few_steps < many_steps
    return Step(1000 * (many - few) / (many_steps - few_steps), engine_bytes / 2**30)


def test_an_engines_step_of_80_narrow_layers(
    layout: parallel.Parallel, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """Scheduler, sampling and 80 layers: what a decoding step of the 72B model costs beside reading weights; and what
    its graphs take of the GPU, whose nodes are as many as those of wide layers. Without graphs it takes longer."""
    config = NARROW.config()
    config.architectures = ["LlamaForCausalLM"]
    steps = {}
    for cuda_graphs in (True, False):
        home = tmp_path / str(cuda_graphs)
        home.mkdir()
        steps[cuda_graphs] = decoding_step(config, layout, home, cuda_graphs)
    graphs, eager = steps[True], steps[False]
    captured = len(decoding_graph_sizes(MAX_NUM_SEQS))
    graph_gib = (graphs.engine_gib - eager.engine_gib) / captured
    record_property("decode_ms", graphs.ms)
    record_property("decode_ms_without_graphs", eager.ms)
    record_property("graph_gib", graph_gib)
    assert 0 < graph_gib < TABLE["graph_gib"] + FREE_GIB / captured
    assert 0 < graphs.ms < MOST_DECODE_MS
    assert graphs.ms < eager.ms
