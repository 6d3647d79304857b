"""Copies in batches, and the threads that share them out."""

import threading

import pytest
import torch

from rollout.weight_sync import copying
from rollout.weight_sync.copying import Copiers, batches, copy_batch


def test_batches_hold_every_element_once_and_cut_what_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copying, "BATCH_BYTES", 64)
    whole = torch.zeros(9, 12)  # a strided target, rows of 20 bytes
    sources = [torch.arange(45.0).view(9, 5) + 1, torch.arange(3.0) - 7, torch.arange(40).view(2, 20)]
    targets = [whole[:, 4:9], torch.zeros(3, dtype=torch.bfloat16), torch.zeros(2, 20, dtype=torch.int64)]
    made = batches(zip(targets, sources, strict=True))
    moves = [[to.nbytes for to, _ in batch.moves] for batch in made]
    others = [[to.nbytes for to in batch.targets] for batch in made]
    # 3 rows of 20 bytes leave room for a piece, strided as they are; 3 numbers of 2 bytes are converted. The rows of
    # the rest, of 160 bytes and longer than a batch, are in one piece.
    assert others == [[60, 60], [60, 6], [], []]
    assert moves == [[], [], [160], [160]]
    for batch in made:
        copy_batch(batch)
    for target, source in zip(targets, sources, strict=True):
        assert torch.equal(target, source.to(target.dtype))
    assert whole.sum() == sources[0].sum()


def test_threads_share_the_work_and_use_one_core_each() -> None:
    before = torch.get_num_threads()
    copiers, all_here = Copiers(3), threading.Barrier(3, timeout=30)
    assert torch.get_num_threads() == before
    left, found = list(range(3)), []

    def work() -> bool:
        if not left:
            return False
        item = left.pop()
        all_here.wait()  # passes when three threads work at once
        found.append((item, torch.get_num_threads()))
        return True

    copiers.run(work)
    assert sorted(found) == [(0, 1), (1, 1), (2, 1)]
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
