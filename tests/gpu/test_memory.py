"""What a process keeps of a GPU, and how fast memory is copied and read, and files are written and read."""

import copy
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import yaml

from megatron_ext import parallel
from tests.gpu import node_cases, test_decoding
from tests.gpu.test_fp8 import FREE_GIB
from tests.settings import CONF

ROOT = Path(__file__).resolve().parents[2]
TABLE = yaml.safe_load((CONF / "preflight" / "h100.yaml").read_text())
LINKS = yaml.safe_load((CONF / "simulate" / "h100.yaml").read_text())
MACHINE = yaml.safe_load((CONF / "scale" / "h100.yaml").read_text())["machine"]
COPIED_BYTES = 2**30
REPEATS = 10
FEW, MANY = 2, 6  # layers
# A rank of each of eight GPUs writes its part of a checkpoint.
FILES, FILE_BYTES, BLOCK_BYTES = 8, 2**30, 2**24

Record = Callable[[str, object], None]


def test_a_trainers_process_keeps_what_the_preflight_counts(gpu: None, record_property: Record) -> None:
    """More than the table of conf/preflight and what the recipes leave free would not fit."""
    torch.cuda.synchronize()
    free = torch.cuda.mem_get_info()[0]
    command = [sys.executable, "-m", "tests.gpu.footprint", str(free)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=300)
    assert done.returncode == 0
    footprint = json.loads(done.stdout.splitlines()[-1])
    for name, value in footprint.items():
        record_property(name, value)
    names = ("context_gib", "workspace_gib", "fragmentation_gib")
    assert all(footprint[name] >= 0 for name in names)
    assert sum(footprint[name] for name in names) < sum(TABLE[name] for name in names) + FREE_GIB


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


def test_an_engine_reads_whole_72b_layers_at_half_the_assumed_speed_or_more(
    layout: parallel.Parallel, tmp_path: Path, record_property: Record
) -> None:
    """A decoding step of eight sequences reads each weight once. The difference between engines of six and of two
    layers, so that nothing else counts; a layer is 1.8 GB, whose reading takes longer than its launches."""
    step_ms = {}
    for layers in (FEW, MANY):
        config = copy.deepcopy(node_cases.LAYERS_72B)
        config.update({"num_hidden_layers": layers, "vocab_size": 256})
        (tmp_path / str(layers)).mkdir()
        step_ms[layers] = test_decoding.decoding_step(config, layout, tmp_path / str(layers), cuda_graphs=True).ms
    weights = node_cases.layer_weights(node_cases.LAYERS_72B)
    speed = (MANY - FEW) * 2 * weights / (step_ms[MANY] - step_ms[FEW]) / 1e6
    share = speed / MACHINE["hbm_gb_s"]
    record_property("hbm_share", share)
    assert MACHINE["hbm_share"] / 2 < share < 1


def test_files_are_written_and_read(record_property: Record) -> None:
    """As a node's ranks do with a checkpoint, in the folder of the runs."""
    folder = ROOT / "runs"
    folder.mkdir(exist_ok=True)
    written, read = file_speeds(folder)
    record_property("write_gb_s", written)
    record_property("read_gb_s", read)
    assert written > MACHINE["write_gb_s"] / 10
    assert read > MACHINE["read_gb_s"] / 10


def file_speeds(folder: Path) -> tuple[float, float]:
    """GB/s at which eight threads write a file each until it is on the disk, and read it again. The kernel is asked to
    forget what was written; where a file system's client keeps it, reading seems faster than it is."""
    block = os.urandom(BLOCK_BYTES)

    def write(file: Path) -> None:
        with file.open("wb", buffering=0) as opened:
            for _ in range(FILE_BYTES // BLOCK_BYTES):
                opened.write(block)
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def read(file: Path) -> None:
        total = 0
        into = bytearray(BLOCK_BYTES)
        with file.open("rb", buffering=0) as opened:
            while size := opened.readinto(into):
                total += size
        assert total == FILE_BYTES

    speeds = []
    with tempfile.TemporaryDirectory(dir=folder) as scratch, ThreadPoolExecutor(FILES) as threads:
        files = [Path(scratch, str(number)) for number in range(FILES)]
        for work in (write, read):
            started = time.perf_counter()
            list(threads.map(work, files))
            speeds.append(FILES * FILE_BYTES / (time.perf_counter() - started) / 1e9)
    return speeds[0], speeds[1]
