"""The trainer on one GPU: Transformer Engine layers, NCCL, the distributed optimiser, checkpoints."""

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_ext import checkpoint, forward_backward, hf_checkpoint, model, optimizer, packing, parallel
from megatron_ext.blocks import region
from megatron_ext.host_buffers import HostBuffers
from megatron_ext.micro_batches import MicroBatches
from recipes.algorithms import mismatch
from recipes.algorithms.sequences import sequences_of
from tests.gpu.conftest import OPTIMIZER, SCHEDULE, TINY
from tests.sequences import PlainSequence, pack, token_batch
from tests.settings import precision_config

ROOT = Path(__file__).resolve().parents[2]


def sequences() -> list[PlainSequence]:
    """Six prompts and responses of random tokens; weights make the loss the mean of token means."""
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(3, 20, (6, 2), generator=draw).tolist()
    tokens = [[torch.randint(0, TINY.vocab, (n,), generator=draw).tolist() for n in pair] for pair in lengths]
    return [PlainSequence(p, r, {"weight": [1 / (6 * len(r))] * len(r)}) for p, r in tokens]


def micro_batches() -> list[packing.MicroBatch]:
    (plan,) = packing.plan([len(s) for s in sequences()], 1, 64)
    assert len(plan) > 1 and max(map(len, plan)) > 1, "several micro-batches, several sequences in one"
    return [pack(sequences(), indices, 1, 0, "cuda") for indices in plan]


def loss(log_probs: torch.Tensor, batch: packing.MicroBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    return -(log_probs * batch.values["weight"]).sum(), {}


def hugging_face(
    dtype: torch.dtype, of: Sequence[PlainSequence] | None = None
) -> tuple[torch.nn.Module, list[torch.Tensor]]:
    """transformers' model with the same BF16 weights, computing in ``dtype``, and its log-probs of each response."""
    network = TINY.model(0).to(dtype)
    log_probs = []
    for s in of or sequences():
        ids = torch.tensor([s.prompt + s.response])
        scores = network(ids).logits[0].float().log_softmax(-1)
        first = len(s.prompt) - 1
        log_probs.append(scores[first:-1].gather(-1, ids[0, first + 1 :, None])[:, 0])
    return network, log_probs


def gradients_of_hugging_face(dtype: torch.dtype, of: Sequence[PlainSequence] | None = None) -> dict[str, torch.Tensor]:
    network, log_probs = hugging_face(dtype, of)
    (-torch.stack([values.mean() for values in log_probs]).mean()).backward()
    return {name: p.grad.float() for name, p in network.named_parameters() if p.grad is not None}


def ours(policy: model.Model) -> torch.Tensor:
    """All log-probs in the order of the sequences."""
    batches = micro_batches()
    by_index: dict[int, torch.Tensor] = {}
    for values, batch in zip(forward_backward.log_probs(policy, batches), batches, strict=True):
        by_index |= dict(zip(batch.indices, values.cpu().split(batch.lengths.tolist()), strict=True))
    return torch.cat([by_index[i] for i in sorted(by_index)])


def weights(policy: model.Model) -> list[torch.Tensor]:
    return [shard.tensor.clone() for shard in policy.shards]


def test_the_process_group_is_nccl_and_its_sums_are_exact(layout: parallel.Parallel) -> None:
    assert dist.get_backend() == "nccl"
    values = torch.arange(1000.0, device="cuda")
    dist.all_reduce(values)
    assert torch.equal(values.cpu(), torch.arange(1000.0))
    assert dist.get_backend(parallel.control_group()) == "gloo"


def test_what_the_checks_start_is_not_told_that_it_is_a_rank(layout: parallel.Parallel) -> None:
    """Else ``recipes.train`` believes that torchrun started it."""
    assert {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"} & os.environ.keys() == set()


def test_log_probs_are_as_near_to_fp32_as_those_of_transformers_in_bf16(policy: model.Model) -> None:
    exact = torch.cat(hugging_face(torch.float32)[1]).detach()
    rounded = torch.cat(hugging_face(torch.bfloat16)[1]).detach()
    error, allowed = (ours(policy) - exact).abs(), (rounded - exact).abs()
    assert error.mean() <= 1.5 * allowed.mean()
    assert error.max() <= 2 * allowed.max()


def test_gradients_are_as_near_to_fp32_as_those_of_transformers_in_bf16(policy: model.Model) -> None:
    """Every parameter, mapped back to its Hugging Face name; distances relative to the norm of the FP32 gradient."""
    exact, rounded = (gradients_of_hugging_face(dtype) for dtype in (torch.float32, torch.bfloat16))
    forward_backward.accumulate_gradients(policy, micro_batches(), loss)
    assert_as_near(policy, exact, rounded)


def assert_as_near(policy: model.Model, exact: dict[str, torch.Tensor], rounded: dict[str, torch.Tensor]) -> None:
    """The gradients in the policy's buffers are about as near to the exact ones as the rounded ones are."""
    seen = {name: torch.zeros_like(g) for name, g in exact.items()}
    parameters = [p for chunk in policy.chunks for p in chunk.module.parameters()]
    for shard, parameter in zip(policy.shards, parameters, strict=True):
        for block in shard.blocks:
            piece = parameter.main_grad[region(block.local_start, block.shape)].cpu()
            seen[block.hf_name][region(block.hf_start, block.shape)] = piece
    for name, gradient in exact.items():
        distance, allowed = ((g[name] - gradient).norm() / gradient.norm() for g in (seen, rounded))
        assert distance <= 1.5 * allowed + 0.01, name


def of_two_prompts() -> list[PlainSequence]:
    """Three responses to each of two prompts, which are longer than a block of FlexAttention's. The packs of a prompt
    have two blocks and three."""
    draw = torch.Generator().manual_seed(1)
    prompts = [torch.randint(0, TINY.vocab, (n,), generator=draw).tolist() for n in (140, 236)]
    return [replace(s, prompt=prompts[i // 3]) for i, s in enumerate(sequences())]


@pytest.mark.parametrize("length", [None, 512])
def test_responses_that_share_their_prompt_are_as_near_to_fp32(length: int | None, policy: model.Model) -> None:
    """``parallel.shared_prompts=true``: FlexAttention's compiled kernels. After packs of two lengths, or of one, no
    other pack compiles anything."""
    of = of_two_prompts()

    def packs(order: Sequence[Sequence[int]]) -> list[packing.MicroBatch]:
        return [pack(of, indices, 1, 0, "cuda", shared_prompts=True, length=length) for indices in order]

    batches = packs([(0, 1, 2), (3, 4, 5)])
    exact, rounded = (torch.cat(hugging_face(dtype, of)[1]).detach() for dtype in (torch.float32, torch.bfloat16))
    log_probs = torch.cat(forward_backward.log_probs(policy, batches)).cpu()
    error, allowed = (log_probs - exact).abs(), (rounded - exact).abs()
    assert error.mean() <= 1.5 * allowed.mean()
    assert error.max() <= 2 * allowed.max()
    forward_backward.accumulate_gradients(policy, batches, loss)
    assert_as_near(policy, *(gradients_of_hugging_face(dtype, of) for dtype in (torch.float32, torch.bfloat16)))

    stats = torch._dynamo.utils.counters["stats"]
    compiled = stats["unique_graphs"]
    others = packs([(0, 1), (4, 5), (2, 3)])
    forward_backward.log_probs(policy, others)
    forward_backward.accumulate_gradients(policy, others, loss)
    assert stats["unique_graphs"] == compiled


def test_gradients_that_products_add_up_are_those_that_are_added_afterwards(
    policy: model.Model, layout: parallel.Parallel, folder: Path
) -> None:
    """``parallel.gradient_accumulation_fusion``, over several micro-batches: nothing is rounded to BF16 on the way."""
    fusing = replace(layout, config=replace(layout.config, gradient_accumulation_fusion=True))
    fused = fresh(folder, fusing)
    gradients = []
    for built in (policy, fused):
        forward_backward.accumulate_gradients(built, micro_batches(), loss)
        gradients.append([p.main_grad.clone() for chunk in built.chunks for p in chunk.module.parameters()])
    for ours, theirs in zip(*gradients, strict=True):
        assert (ours - theirs).norm() <= 2**-8 * theirs.norm()
    assert not all(torch.equal(ours, theirs) for ours, theirs in zip(*gradients, strict=True))


@pytest.mark.parametrize("shared_prompts", [False, True])
def test_no_pass_waits_for_the_gpu(shared_prompts: bool, policy: model.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """With micro-batches that a thread copies from pinned memory, and RL's reductions over sequences and buckets: torch
    raises where the host would wait. The log-probs are those of micro-batches that were there before, bit for bit."""

    def corrected_loss(
        log_probs: torch.Tensor, batch: packing.MicroBatch
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        of_batch = sequences_of(batch, None)
        rollout = batch.values["logprobs"]
        correction = mismatch.sequence_truncated(log_probs, rollout, of_batch, tis_cap=2.0)
        value, _ = loss(log_probs * correction, batch)
        return value, mismatch.sums(log_probs, rollout, of_batch, tis_cap=2.0)

    of = of_two_prompts() if shared_prompts else sequences()
    plan = [batch.indices for batch in micro_batches()]
    listed = [pack(of, indices, 1, 0, "cuda", shared_prompts=shared_prompts) for indices in plan]
    build = partial(packing.pack, multiple=1, pad_token=0, shared_prompts=shared_prompts)
    streamed = MicroBatches(token_batch(of, shared_prompts), plan, build)
    # Kernels load, and tables are made, when they are first needed.
    expected = forward_backward.log_probs(policy, listed)
    sums = forward_backward.accumulate_gradients(policy, listed, corrected_loss)

    run = forward_backward._run

    def unwaiting(*args: Any, **kwargs: Any) -> Any:
        torch.cuda.set_sync_debug_mode("error")
        try:
            return run(*args, **kwargs)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(forward_backward, "_run", unwaiting)
    for ours, theirs in zip(forward_backward.log_probs(policy, streamed), expected, strict=True):
        assert torch.equal(ours, theirs)
    again = forward_backward.accumulate_gradients(policy, streamed, corrected_loss)
    assert again == pytest.approx(sums, rel=1e-6)


def test_one_step_of_the_distributed_optimizer_is_adamw(policy: model.Model) -> None:
    """FP32 master weights: the new BF16 weight is the exact one, rounded once (by 2**-8 at most)."""
    optim, schedule = optimizer.build(policy, OPTIMIZER, SCHEDULE, steps=10)
    optim.reload_model_params()
    forward_backward.accumulate_gradients(policy, micro_batches(), loss)
    parameters = [p for chunk in policy.chunks for p in chunk.module.parameters()]
    gradients = [p.main_grad.double().clone() for p in parameters]
    before = [p.detach().double() for p in parameters]
    norm = float(torch.stack([g.square().sum() for g in gradients]).sum().sqrt())
    assert optimizer.step(optim, schedule) == pytest.approx(norm, rel=1e-4)
    for parameter, old, gradient in zip(parameters, before, gradients, strict=True):
        g = gradient * min(1.0, OPTIMIZER.clip_grad_norm / norm)
        decay = OPTIMIZER.weight_decay if old.ndim > 1 else 0.0
        # The first step's bias-corrected moments are g and g²: AdamW, Loshchilov and Hutter 2019, algorithm 2.
        new = old * (1 - SCHEDULE.learning_rate * decay) - SCHEDULE.learning_rate * g / (g.abs() + OPTIMIZER.epsilon)
        assert not torch.equal(parameter.detach().double(), old)
        torch.testing.assert_close(parameter.detach().double(), new, rtol=2**-8, atol=1e-4)


def test_the_reference_swap_gives_the_weights_back_bit_for_bit(policy: model.Model, folder: Path) -> None:
    before, first = weights(policy), ours(policy)
    for shard in policy.shards:
        shard.tensor.mul_(1.5)
    with forward_backward.swapped_weights(policy, forward_backward.load_weights(policy, folder), HostBuffers()):
        assert all(torch.equal(a, b) for a, b in zip(weights(policy), before, strict=True))
        assert torch.equal(ours(policy), first)
    assert all(torch.equal(a, 1.5 * b) for a, b in zip(weights(policy), before, strict=True))


def step_with_noise(policy: model.Model, optim: object, schedule: object, seed: int) -> None:
    """One update from seeded gradients: attention kernels need not repeat their bits, the optimiser must."""
    draw = torch.Generator(device="cuda").manual_seed(seed)
    for chunk in policy.chunks:
        chunk.zero_grad_buffer()
        for parameter in chunk.module.parameters():
            parameter.main_grad.copy_(torch.randn(parameter.shape, generator=draw, device="cuda"))
    optimizer.step(optim, schedule)


def update_of(optim: object) -> int:
    """The number of the optimiser's last update, by which FusedAdam corrects its moments."""
    (inner,) = (each.optimizer for each in optim.chained_optimizers)  # type: ignore[attr-defined]
    (number,) = {group["step"] for group in inner.param_groups if group["params"]}
    return number


def fresh(folder: Path, layout: parallel.Parallel) -> model.Model:
    built = model.build(hf_checkpoint.config(folder), layout, precision_config())
    hf_checkpoint.load(built.shards, folder)
    return built


@pytest.mark.parametrize("updates", [0, 1])  # 0: as a step that trains the critic alone leaves the policy
def test_a_run_goes_on_from_its_checkpoint_bit_for_bit(
    updates: int, folder: Path, layout: parallel.Parallel, tmp_path: Path
) -> None:
    first = fresh(folder, layout)
    optim, schedule = optimizer.build(first, OPTIMIZER, SCHEDULE, steps=10)
    optim.reload_model_params()
    for seed in range(updates):
        step_with_noise(first, optim, schedule, seed)
    saver = checkpoint.Saver(tmp_path, keep=1)
    saver.save(1, {checkpoint.POLICY: checkpoint.snapshot(first, optim, schedule, HostBuffers())}, {})
    drawn = torch.rand(4, device="cuda")
    step_with_noise(first, optim, schedule, seed=2)  # while the files are written
    saver.wait()

    second = fresh(folder, layout)
    optim, schedule = optimizer.build(second, OPTIMIZER, SCHEDULE, steps=10)
    newest = checkpoint.latest(tmp_path)
    assert newest is not None
    assert checkpoint.load(newest, second, optim, schedule) == 1
    assert torch.equal(torch.rand(4, device="cuda"), drawn), "the RNG goes on where it was"
    step_with_noise(second, optim, schedule, seed=2)
    assert all(torch.equal(a, b) for a, b in zip(weights(second), weights(first), strict=True))


@pytest.mark.parametrize("direction", ["cpu to gpu", "gpu to cpu"])
def test_a_checkpoint_moves_between_cpu_and_gpu(
    direction: str, folder: Path, layout: parallel.Parallel, tmp_path: Path
) -> None:
    """The weights in the checkpoint differ from the folder's, and arrive on the other platform with the same bits.
    There the optimiser goes on from the step after the checkpoint's."""

    def on_the_cpu(action: str) -> None:
        command = [sys.executable, "-m", "tests.gpu.cpu_checkpoint", action, str(folder), str(tmp_path)]
        subprocess.run(command, cwd=ROOT, check=True, timeout=300)

    here = fresh(folder, layout)
    optim, schedule = optimizer.build(here, OPTIMIZER, SCHEDULE, steps=10)
    optim.reload_model_params()
    if direction == "cpu to gpu":
        on_the_cpu("save")
        newest = checkpoint.latest(tmp_path)
        assert newest is not None
        assert checkpoint.load(newest, here, optim, schedule) == 1
        loaded = [shard.tensor.clone() for shard in here.shards]
        step_with_noise(here, optim, schedule, seed=1)
        assert update_of(optim) == 2
        assert not all(torch.equal(shard.tensor, old) for shard, old in zip(here.shards, loaded, strict=True))
        for shard, old in zip(here.shards, loaded, strict=True):
            shard.tensor.copy_(old)
    else:
        step_with_noise(here, optim, schedule, seed=1)
        saver = checkpoint.Saver(tmp_path, keep=1)
        saver.save(1, {checkpoint.POLICY: checkpoint.snapshot(here, optim, schedule, HostBuffers())}, {})
        saver.wait()
        on_the_cpu("load")
    there = torch.load(tmp_path / "weights.pt", weights_only=True)
    # The two platforms name fused norms differently; the Hugging Face names of their blocks are common.
    mine = {s.blocks[0].hf_name: s.tensor.cpu() for s in here.shards}
    assert mine.keys() == there.keys()
    assert [name for name in mine if not torch.equal(mine[name], there[name])] == []
    start = {s.blocks[0].hf_name: s.tensor.cpu() for s in fresh(folder, layout).shards}
    assert not torch.equal(mine["model.norm.weight"], start["model.norm.weight"])
