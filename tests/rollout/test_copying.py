"""Copies in batches, and the threads that share them out."""

import threading

import pytest
import torch

from rollout.weight_sync import copying
from rollout.weight_sync.copying import Copiers, batches, by_rows, copy_batch, even_threads
from rollout.weight_sync.plan import Copy


def test_batches_hold_every_element_once_and_cut_what_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copying, "BATCH_BYTES", 64)
    strided = torch.zeros(9, 12)  # a strided target, rows of 20 bytes
    sources = [torch.arange(45.0).view(9, 5) + 1, torch.arange(3.0) - 7, torch.arange(40).view(2, 20)]
    targets = [strided[:, 4:9], torch.zeros(3, dtype=torch.bfloat16), torch.zeros(2, 20, dtype=torch.int64)]
    copy_batches = batches((target, [source]) for target, source in zip(targets, sources, strict=True))
    moves = [[size for _, _, size in batch.moves] for batch in copy_batches]
    others = [[to.nbytes for to in batch.targets] for batch in copy_batches]
    # 3 rows of 20 bytes leave room for a piece, strided as they are; 3 numbers of 2 bytes are converted. The rows of
    # the rest, of 160 bytes and longer than a batch, are in one piece.
    assert others == [[60, 60], [60, 6], [], []]
    assert moves == [[], [], [160], [160]]
    for batch in copy_batches:
        copy_batch(batch)
    for target, source in zip(targets, sources, strict=True):
        assert torch.equal(target, source.to(target.dtype))
    assert strided.sum() == sources[0].sum()


def test_copies_of_the_same_rows_go_together_when_they_fill_them() -> None:
    def copy(parameter: str, start: tuple[int, ...], *shape: int) -> Copy:
        return Copy(0, "shard", (0,) * len(shape), shape, parameter, start)

    right, left = copy("down", (0, 8), 6, 4), copy("down", (0, 0), 6, 8)
    lower = copy("down", (6, 0), 3, 12)
    alone = [copy("partly", (0, 0), 6, 8), copy("partly", (0, 8), 3, 4)]  # the rest comes over the network
    others = [copy("bias", (0,), 4), copy("bias", (4,), 2), copy("patches", (0, 0, 0), 2, 1, 3)]
    shapes = {"down": (9, 12), "partly": (6, 12), "bias": (6,), "patches": (2, 2, 3)}
    parameters = {name: torch.empty(shape) for name, shape in shapes.items()}
    groups = list(by_rows([right, *alone, lower, *others, left], parameters))
    assert groups == [[left, right], *([c] for c in alone), [lower], *([c] for c in others)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sources_side_by_side_make_whole_rows(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr(copying, "BATCH_BYTES", 96)
    sources = [torch.randn(9, width) for width in (5, 4, 3)]
    target = torch.zeros(9, 12, dtype=dtype)
    copy_batches = batches([(target, sources)])
    # 2 rows of 48 bytes or 4 of 24 at once, from one tensor; where the dtype changes, each source by itself.
    joins = [[len(to) for to, _ in batch.joins] for batch in copy_batches]
    assert joins == ([[2], [2], [2], [2], [1]] if dtype == torch.float32 else [[], [], []])
    assert [len(batch.targets) for batch in copy_batches] == ([0] * 5 if dtype == torch.float32 else [3] * 3)
    for batch in copy_batches:
        copy_batch(batch)
    assert torch.equal(target, torch.cat(sources, dim=1).to(dtype))


@pytest.mark.parametrize(("cores", "workers", "threads"), [(2, 3, 2), (2, 2, 1), (2, 1, 2), (8, 6, 4), (1, 3, 1)])
def test_every_core_has_as_many_copying_threads(cores: int, workers: int, threads: int) -> None:
    assert even_threads(cores, workers) == threads
    assert workers * threads % cores == 0


def test_threads_share_the_work_and_use_one_core_each() -> None:
    before = torch.get_num_threads()
    copiers, all_here = Copiers(3), threading.Barrier(3, timeout=30)
    assert torch.get_num_threads() == before
    left, taken = list(range(3)), []

    def work() -> bool:
        if not left:
            return False
        item = left.pop()
        all_here.wait()  # passes when three threads work at once
        taken.append((item, torch.get_num_threads()))
        return True

    copiers.run(work)
    assert sorted(taken) == [(0, 1), (1, 1), (2, 1)]
    copiers.stop()


@pytest.mark.parametrize("threads", [1, 2])
def test_what_a_thread_raises_is_raised_when_all_have_ended(threads: int) -> None:
    copiers, items, done = Copiers(threads), iter(range(50)), []

    def work() -> bool:
        if (item := next(items, None)) is None:
            raise OSError("a copy failed")
        done.append(item)
        return True

    with pytest.raises(OSError, match="a copy failed"):
        copiers.run(work)
    assert sorted(done) == list(range(50))
    copiers.stop()
