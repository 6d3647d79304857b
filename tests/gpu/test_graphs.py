"""CUDA graphs of an engine's decoding steps: they compute what an engine without graphs computes, and they read the
weights and the cache that are there now, after sleep and after every sync."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from megatron_ext import forward_backward, hf_checkpoint, model, parallel
from rollout.engine import Engine, stop_engines
from rollout.sampler import generate
from rollout.sampling import Sampling
from rollout.weight_sync.sync import WeightSync
from tests.gpu.conftest import tiny_engine
from tests.responses import PlainResponse, make_prompt, plain
from tests.settings import precision_config

SAMPLING = Sampling(max_tokens=16, stop_token_ids=(2,))
PROMPTS = [make_prompt(f"p{i}", [3 + (7 * i + j) % 200 for j in range(3 + 10 * i)]) for i in range(4)]

Engines = tuple[Engine, Engine, model.Model, WeightSync]


@pytest.fixture(scope="module", params=[None, "fp8_per_channel"])
def engines(
    request: pytest.FixtureRequest,
    layout: parallel.Parallel,
    folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Engines]:
    """An engine with graphs, one without, the trainer's model, and the sync from it to both."""
    home = tmp_path_factory.mktemp("graphs")
    pair = [
        Engine(
            tiny_engine(folder, sleep=True, quantization=request.param, cuda_graphs=cuda_graphs),
            home / f"{name}.log",
        )
        for name, cuda_graphs in (("graphs", True), ("eager", False))
    ]
    try:
        policy = model.build(hf_checkpoint.config(folder), layout, precision_config())
        hf_checkpoint.load(policy.shards, folder)
        for engine in pair:
            engine.wait_until_ready(time.monotonic() + 400)
        weight_sync = WeightSync(
            policy.shards, pair, parallel.control_group(), bucket_bytes=1 << 20, verify_every=1, plans=home
        )
        weight_sync.sync(1)
        yield pair[0], pair[1], policy, weight_sync
    finally:
        stop_engines(pair)


def responses(engine: Engine) -> list[PlainResponse]:
    return plain(generate([engine], PROMPTS, SAMPLING, samples_per_prompt=2, seed=5, step=0))


def gaps(ours: list[PlainResponse], theirs: list[PlainResponse]) -> torch.Tensor:
    """Of the log-probs of each response's tokens up to the first that differs. At least half of them are left."""
    differences = []
    for a, b in zip(ours, theirs, strict=True):
        same = next((i for i, (x, y) in enumerate(zip(a.tokens, b.tokens, strict=False)) if x != y), len(a.tokens))
        differences += [abs(x - y) for x, y in zip(a.logprobs[:same], b.logprobs[:same], strict=True)]
    assert len(differences) > sum(len(response.tokens) for response in ours) / 2
    return torch.tensor(differences)


def hold_bounds(gap: torch.Tensor) -> None:
    """Those of trainer and vLLM: kernels may add in another order in a batch that is padded to a graph's size."""
    assert gap.mean() < 0.08 and gap.max() < 0.5


def test_graphs_say_what_an_engine_without_them_says(
    engines: Engines, record_property: Callable[[str, object], None]
) -> None:
    graphs, eager, _, _ = engines
    gap = gaps(responses(graphs), responses(eager))
    record_property("mean_and_largest_gap", [float(gap.mean()), float(gap.max())])
    hold_bounds(gap)


def test_graphs_read_the_weights_that_a_sync_left_also_after_sleep(engines: Engines) -> None:
    """Every bit after sleep and a sync of the same weights; an engine without graphs says the same of other weights."""
    graphs, eager, policy, weight_sync = engines
    before = responses(graphs)
    for engine in (graphs, eager):
        engine.call("POST", "/sleep", {})
        engine.call("POST", "/wake", {"tags": ["weights"]})
    weight_sync.sync(1)
    for engine in (graphs, eager):
        engine.call("POST", "/wake", {"tags": ["kv_cache"]})
    assert responses(graphs) == before

    weights = forward_backward.copy_weights(policy)
    for shard in policy.shards:
        shard.tensor.mul_(0.75)
    weight_sync.sync(2)
    other = responses(graphs)
    assert [response.logprobs for response in other] != [response.logprobs for response in before]
    hold_bounds(gaps(other, responses(eager)))

    with torch.no_grad():
        for shard, weight in zip(policy.shards, weights, strict=True):
            shard.tensor.copy_(weight)
    weight_sync.sync(1)
    assert responses(graphs) == before
