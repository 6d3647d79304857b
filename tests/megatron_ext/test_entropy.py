"""The entropy of a distribution cut over ranks, against torch's of the whole one, and its gradient."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_ext import entropy
from megatron_ext.entropy import vocab_parallel_entropy


def logits() -> torch.Tensor:
    """[5, 8] with two columns of padding, FP64."""
    values = 3 * torch.randn(5, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    values[:, 6:] = torch.finfo(torch.float32).min
    return values


def rank(this: int, folder: Path, world: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/{world}", rank=this, world_size=world)
    entropy.ROWS = 2
    part = logits().chunk(world, dim=1)[this].clone().requires_grad_()
    assert dist.group.WORLD is not None
    whole_entropy = vocab_parallel_entropy(part, dist.group.WORLD)
    (whole_entropy * torch.arange(1, 6)).sum().backward()
    measured = vocab_parallel_entropy(part.detach(), dist.group.WORLD)
    assert not measured.requires_grad and torch.equal(measured, whole_entropy)
    torch.save((whole_entropy.detach(), part.grad), folder / f"{world}-{this}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [1, 4])
def test_entropy_and_gradient_are_those_of_the_whole_distribution(world: int, tmp_path: Path) -> None:
    """Also where rows are worked on two at a time, and where the last rank of four has nothing but padding."""
    torch.multiprocessing.spawn(rank, (tmp_path, world), nprocs=world)
    all_logits = logits()[:, :6].requires_grad_()
    expected = torch.distributions.Categorical(logits=all_logits).entropy()
    (expected * torch.arange(1, 6)).sum().backward()
    assert all_logits.grad is not None
    ranks = [torch.load(tmp_path / f"{world}-{this}.pt") for this in range(world)]
    for values, _ in ranks:
        assert values.tolist() == pytest.approx(expected.tolist(), rel=1e-12)
    steep = torch.cat([gradient for _, gradient in ranks], dim=1)
    assert steep[:, :6].flatten().tolist() == pytest.approx(all_logits.grad.flatten().tolist(), abs=1e-12)
    assert torch.equal(steep[:, 6:], torch.zeros(5, 2, dtype=torch.float64))


def test_equal_logits_have_the_logarithm_of_their_number(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/one", rank=0, world_size=1)
    try:
        assert dist.group.WORLD is not None
        entropy = vocab_parallel_entropy(torch.zeros(1, 16, dtype=torch.float64), dist.group.WORLD)
        assert entropy.exp().item() == pytest.approx(16)
    finally:
        dist.destroy_process_group()
