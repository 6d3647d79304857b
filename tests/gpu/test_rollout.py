"""vLLM on the GPU, fed from the trainer's tensors on the same GPU by CUDA IPC."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_ext import forward_backward, hf_checkpoint, model, packing, parallel
from megatron_ext.batch import TokenBatch
from rollout.engine import Engine, stop_engines
from rollout.sampler import generate
from rollout.sampling import Sampling
from rollout.weight_sync.checksum import rectangle_checksum
from rollout.weight_sync.sync import WeightSync
from tests.gpu.conftest import TINY, tiny_engine
from tests.responses import PlainResponse, make_prompt, plain
from tests.settings import precision_config

SAMPLING = Sampling(max_tokens=16, stop_token_ids=(2,))
PROMPTS = [make_prompt(f"p{i}", [3 + (7 * i + j) % 200 for j in range(3 + 10 * i)]) for i in range(4)]


class Rollout:
    """A trainer model, an engine beside it on the same GPU, and the weight sync between them."""

    def __init__(self, policy: model.Model, engine: Engine, plans: Path) -> None:
        self.policy, self.engine = policy, engine
        self.weight_sync = WeightSync(
            policy.shards, [engine], parallel.control_group(), bucket_bytes=1 << 20, verify_every=1, plans=plans
        )

    def generate(self) -> TokenBatch:
        return generate([self.engine], PROMPTS, SAMPLING, samples_per_prompt=2, seed=5, step=0)

    def responses(self) -> list[PlainResponse]:
        return plain(self.generate())

    def digests(self) -> dict[str, str]:
        (worker,) = self.engine.call("GET", "/weights/digest")["workers"]
        return worker


@pytest.fixture(scope="module")
def rollout(layout: parallel.Parallel, folder: Path, tmp_path_factory: pytest.TempPathFactory):
    settings = tiny_engine(folder)
    scratch = tmp_path_factory.mktemp("engine")
    engine = Engine(settings, scratch / "engine_0.log")
    try:
        policy = model.build(hf_checkpoint.config(folder), layout, precision_config())
        hf_checkpoint.load(policy.shards, folder)
        engine.wait_until_ready(time.monotonic() + 400)
        new_rollout = Rollout(policy, engine, scratch)
        new_rollout.weight_sync.sync(1)
        yield new_rollout
    finally:
        stop_engines([engine])


def test_after_a_sync_vllm_holds_the_checkpoints_bits(rollout: Rollout) -> None:
    """vLLM's checksums against those of the Hugging Face tensors, which never went through the trainer."""
    checksums = rollout.engine.call("GET", "/weights/checksum")["tensors"]
    plan = rollout.weight_sync.plan.tensors
    expected = {
        name: rectangle_checksum(tensor, (0,) * tensor.ndim, tuple(tensor.shape), plan[name].unit)
        for name, tensor in TINY.model(0).state_dict().items()
    }
    assert checksums == expected


def test_other_weights_change_every_digest_and_the_old_ones_bring_all_back(
    rollout: Rollout, record_property: Callable[[str, object], None]
) -> None:
    before = rollout.digests()
    weights = forward_backward.copy_weights(rollout.policy)
    for shard in rollout.policy.shards:
        shard.tensor.mul_(1.5)
    record_property("sync_of_a_tiny_model_ms", 1000 * rollout.weight_sync.sync(2)["seconds"])
    changed = rollout.digests()
    assert all(changed[name] != digest for name, digest in before.items())
    with torch.no_grad():
        for shard, weight in zip(rollout.policy.shards, weights, strict=True):
            shard.tensor.copy_(weight)
    rollout.weight_sync.sync(1)
    assert rollout.digests() == before


def test_the_same_batch_gives_the_same_bits(rollout: Rollout) -> None:
    assert rollout.responses() == rollout.responses()


def test_log_probs_of_samples_are_the_trainers(
    rollout: Rollout, record_property: Callable[[str, object], None]
) -> None:
    """The bounds of the CPU test: BF16's 8 bits at logits of order 10 (one rounding of a logit is up to 0.03)."""
    batch = rollout.generate()
    (plan,) = packing.plan(batch.lengths.tolist(), 1, 256)
    micro_batches = [packing.pack(batch, indices, torch.Tensor.cuda, multiple=1, pad_token=0) for indices in plan]
    responses = plain(batch)
    gaps = []
    log_probs = forward_backward.log_probs(rollout.policy, micro_batches)
    for values, micro_batch in zip(log_probs, micro_batches, strict=True):
        sampled = torch.tensor([p for i in micro_batch.indices for p in responses[i].logprobs])
        gaps.append((values.cpu() - sampled).abs())
    gap = torch.cat(gaps)
    record_property("mean_and_largest_gap", [float(gap.mean()), float(gap.max())])
    assert gap.mean() < 0.08 and gap.max() < 0.5
