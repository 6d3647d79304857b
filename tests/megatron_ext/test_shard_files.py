"""Parts of tensors in files: any box is read back from any cut, and what is not whole is said."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_ext import shard_files
from megatron_ext.shard_files import Reader, TensorPart

WHOLE = torch.arange(6 * 10, dtype=torch.bfloat16).view(6, 10)


def write(folder: Path, cuts: list[list[tuple[int, int, int, int]]]) -> dict:
    """Each file's boxes of WHOLE as (rows from, to, columns from, to); gives the manifest."""
    written = [
        shard_files.write(
            folder / f"{i}.safetensors",
            [TensorPart("whole", (6, 10), (a, c), WHOLE[a:b, c:d].clone()) for a, b, c, d in boxes],
        )
        for i, boxes in enumerate(cuts)
    ]
    return shard_files.manifest(written)


@pytest.mark.parametrize("cuts", [[[(0, 6, 0, 10)]], [[(0, 2, 0, 10), (2, 6, 0, 3)], [(2, 6, 3, 9)], [(2, 6, 9, 10)]]])
def test_every_box_is_read_back_from_any_cut(tmp_path: Path, cuts: list[list[tuple[int, int, int, int]]]) -> None:
    described = write(tmp_path, cuts)
    with Reader(tmp_path, described["tensors"]) as reader:
        for a, b, c, d in [(0, 6, 0, 10), (1, 3, 2, 10), (5, 6, 9, 10), (2, 2, 0, 10), (0, 6, 3, 4)]:
            target = torch.full((b - a, d - c), -1.0)
            reader.fill("whole", (6, 10), (a, c), target)
            assert torch.equal(target, WHOLE[a:b, c:d].float())


def test_files_are_what_safetensors_reads(tmp_path: Path) -> None:
    bits = torch.tensor([True, False]), torch.tensor(2.5, dtype=torch.float64), torch.zeros(0, 3)
    shard_files.write(
        tmp_path / "f", [TensorPart(str(i), tuple(t.shape), (0,) * t.dim(), t) for i, t in enumerate(bits)]
    )
    tensors = load_file(tmp_path / "f")
    assert [torch.equal(tensors[name], t) for name, t in zip(("0@0", "1@", "2@0,0"), bits, strict=True)] == [True] * 3


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    described = write(tmp_path, [[(0, 6, 0, 4)]])
    with Reader(tmp_path, described["tensors"]) as reader:
        with pytest.raises(ValueError, match="8 of 12 elements of whole are there"):
            reader.fill("whole", (6, 10), (0, 2), torch.empty(4, 3))
        with pytest.raises(ValueError, match=r"whole has the shape \[6, 10\], asked for is \[6, 12\]"):
            reader.fill("whole", (6, 12), (0, 0), torch.empty(1, 1))
        with pytest.raises(ValueError, match="holds no tensor other"):
            reader.fill("other", (1,), (0,), torch.empty(1))


def test_faults_are_named(tmp_path: Path) -> None:
    (expected,) = write(tmp_path, [[(0, 6, 0, 10)]])["files"].values()
    path = tmp_path / "0.safetensors"
    assert shard_files.fault(path, expected) is None
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    assert shard_files.fault(path, expected) == f"{path.name} has {len(content) - 1} bytes, {len(content)} were written"
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert str(shard_files.fault(path, expected)).startswith(f"{path.name} has the checksum ")
    path.unlink()
    assert shard_files.fault(path, expected) == f"{path.name}: No such file or directory"


def test_a_full_disk_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "f").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"No space left on device: '.*/f'"):
        shard_files.write(tmp_path / "f", [TensorPart("whole", (6, 10), (0, 0), WHOLE)])
