"""The check of a node: checks on made-up inputs, GPUs behind a fake nvidia-smi, clocks and links between processes."""

import contextlib
import io
import multiprocessing
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hypothesis import given
from hypothesis import strategies as st

from recipes.command_line import with_group
from recipes.node_check import __main__ as program
from recipes.node_check import checks, clock, links
from recipes.node_check.checks import GIB, Bad, NotChecked
from tests.gpu import small_run

ROOT = Path(__file__).resolve().parents[2]
# As nvidia-smi prints it on a DGX H100; the figures are made up.
LINE = "{index}, NVIDIA H100 80GB HBM3, {driver}, 81559, {free}, {errors}, {pending}, {failed}\n"
HEALTHY = {"driver": "580.95.05", "free": "81004", "errors": "0", "pending": "No", "failed": "No"}
PEERS = """\
 \tGPU0\tGPU1\tGPU2\t
 GPU0\tX\tOK\tOK\t
 GPU1\tOK\tX\t{state}\t
 GPU2\tOK\tOK\tX\t

Legend:

  X    = Self
  OK   = Status Ok
  CNS  = Chipset not supported
  GNS  = GPU not supported
  TNS  = Topology not supported
  NS   = Not supported
  U    = Unknown
"""


def gpu_lines(count: int, **last: str) -> str:
    """As many GPUs, the last of which differs."""
    lines = [LINE.format(index=index, **HEALTHY) for index in range(count - 1)]
    return "".join([*lines, LINE.format(index=count - 1, **(HEALTHY | last))])


def settings(**changed: Any) -> Any:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        raw = compose(
            "config", ["recipe=demo", "+node_check=h100", *(f"node_check.{k}={v}" for k, v in changed.items())]
        )
    return program.settings_of(raw)


def test_gpus_are_read_and_healthy_ones_pass() -> None:
    gpus = checks.parse_gpus(gpu_lines(8))
    assert len(gpus) == 8 and gpus[7].index == 7 and gpus[0].name == "NVIDIA H100 80GB HBM3"
    assert checks.driver(gpus, 580) == "driver 580.95.05"
    assert checks.gpu_count(gpus, 8) == "8 x NVIDIA H100 80GB HBM3"
    assert checks.gpu_memory(gpus, 0.97) == "79.1 GiB free on each"
    assert checks.gpu_errors(gpus) == "no uncorrected ECC errors"


FAULTS: list[tuple[dict[str, str], Callable[[list[checks.Gpu]], str], str]] = [
    ({}, lambda gpus: checks.gpu_count(gpus, 4), r"3 of 4 GPUs are seen \(0, 1, 2\)"),
    ({"free": "40000"}, lambda gpus: checks.gpu_memory(gpus, 0.97), "memory is in use: GPU 2 40.6 GiB"),
    ({"errors": "2"}, checks.gpu_errors, "GPU 2 has 2 uncorrected ECC errors"),
    ({"pending": "Yes"}, checks.gpu_errors, "GPU 2 has memory rows to be remapped"),
    ({"failed": "Yes"}, checks.gpu_errors, "GPU 2 could not remap a memory row"),
]


@pytest.mark.parametrize(("last", "check", "why"), FAULTS)
def test_a_faulty_gpu_is_named(last: dict[str, str], check: Callable[[list[checks.Gpu]], str], why: str) -> None:
    with pytest.raises(Bad, match=why):
        check(checks.parse_gpus(gpu_lines(3, **last)))


def test_a_driver_that_is_too_old_is_told() -> None:
    gpus = checks.parse_gpus(LINE.format(index=0, **HEALTHY | {"driver": "570.124.06"}))
    with pytest.raises(Bad, match=r"driver 570\.124\.06: CUDA 13 needs 580"):
        checks.driver(gpus, 580)


@pytest.mark.parametrize(
    "line",
    [
        "Unable to determine the device handle for GPU 0000:9B:00.0: Unknown Error\n",
        "3, [GPU is lost], [GPU is lost], [GPU is lost], [GPU is lost], [N/A], [N/A], [N/A]\n",
    ],
)
def test_a_gpu_that_is_lost_is_told(line: str) -> None:
    with pytest.raises(Bad, match=r"nvidia-smi: .*reset the GPU or reboot the node"):
        checks.parse_gpus(gpu_lines(2) + line)


def test_a_gpu_without_ecc_is_not_called_faulty() -> None:
    none = {"errors": "[N/A]", "pending": "[N/A]", "failed": "[N/A]"}
    with pytest.raises(NotChecked, match="no ECC errors"):
        checks.gpu_errors(checks.parse_gpus(LINE.format(index=0, **HEALTHY | none)))


def test_peer_access_is_of_every_pair() -> None:
    assert checks.peer_access(PEERS.format(state="OK")) == "peer access between 3 GPUs"
    with pytest.raises(Bad, match="no peer access: GPU1-GPU2 CNS; look at"):
        checks.peer_access(PEERS.format(state="CNS"))
    with pytest.raises(NotChecked, match="no matrix"):
        checks.peer_access("Failed to initialize\n")


def test_another_cudnn_is_found_where_transformer_engine_and_the_linker_look(tmp_path: Path) -> None:
    cudnn = tmp_path / "site-packages" / "nvidia" / "cudnn"
    site = tmp_path / "opt" / "cuda"
    for folder in (cudnn / "lib", site / "targets" / "lib", tmp_path / "stubs"):
        folder.mkdir(parents=True)
    for file in (cudnn / "lib" / "libcudnn.so.9", site / "targets" / "lib" / "libcudnn.so.8"):
        file.touch()
    nowhere = str(tmp_path / "nowhere")
    assert checks.one_cudnn({"CUDNN_HOME": str(cudnn)}, nowhere, str(cudnn)) == "one cuDNN"
    assert checks.one_cudnn({"CUDA_HOME": str(tmp_path / "stubs")}, nowhere, str(cudnn)) == "one cuDNN"
    with pytest.raises(Bad, match=r"libcudnn\.so\.8 \(CUDA_HOME\); do not load the site's CUDA or cuDNN modules"):
        checks.one_cudnn({"CUDA_HOME": str(site)}, nowhere, str(cudnn))
    with pytest.raises(Bad, match=r"libcudnn\.so\.8 \(LD_LIBRARY_PATH\)"):
        checks.one_cudnn({"LD_LIBRARY_PATH": f"/none:{site / 'targets' / 'lib'}"}, nowhere, str(cudnn))
    with pytest.raises(Bad, match=r"libcudnn\.so\.8 \(/"):
        checks.one_cudnn({}, str(site), str(cudnn))


def test_a_compiler_and_python_s_headers_are_wanted(tmp_path: Path) -> None:
    header = tmp_path / "Python.h"
    with pytest.raises(Bad, match=r"no .*Python\.h, which Triton compiles against"):
        checks.compiler(lambda name: f"/usr/bin/{name}", header)
    header.touch()
    assert checks.compiler(lambda name: "/usr/bin/cc" if name == "cc" else None, header) == "/usr/bin/cc, Python.h"
    with pytest.raises(Bad, match="no C compiler"):
        checks.compiler(lambda name: None, header)


def test_the_least_memory_limit_of_the_cgroups_above_counts(tmp_path: Path) -> None:
    """Slurm limits a job's cgroup, and leaves those of its steps at their maximum."""
    step = tmp_path / "system.slice" / "job_7" / "step_0"
    step.mkdir(parents=True)
    (step / "memory.max").write_text("max\n")
    (step.parent / "memory.max").write_text(f"{100 * GIB}\n")
    (step.parent.parent / "memory.max").write_text(f"{500 * GIB}\n")
    assert checks.memory_limit(tmp_path, "0::/system.slice/job_7/step_0\n") == 100 * GIB
    assert checks.memory_limit(tmp_path, "0::/system.slice\n") == 500 * GIB
    assert checks.memory_limit(tmp_path, "0::/\n") is None
    first = tmp_path / "memory" / "slurm" / "job_7"
    first.mkdir(parents=True)
    (first / "memory.limit_in_bytes").write_text(f"{64 * GIB}\n")
    (first.parent / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    assert checks.memory_limit(tmp_path, "5:cpuset:/slurm\n4:memory:/slurm/job_7\n") == 64 * GIB
    assert checks.memory_limit(tmp_path, "4:cpu,memory:/slurm\n") is None


def test_a_job_without_the_node_s_memory_is_told() -> None:
    assert checks.host_memory(None, 2000 * GIB, 0.9) == "2000 of 2000 GiB of host memory"
    assert checks.host_memory(1990 * GIB, 2000 * GIB, 0.9).startswith("1990 of 2000")
    with pytest.raises(Bad, match="may use 64 of the node's 2000 GiB: submit with --exclusive --mem=0"):
        checks.host_memory(64 * GIB, 2000 * GIB, 0.9)
    assert checks.host_memory(64 * GIB, 2000 * GIB, None).startswith("64 of 2000"), "a CPU node may be shared"


def test_small_limits_are_told() -> None:
    assert checks.shared_memory(2 * GIB, 1) and checks.open_files(4096, 4096) and checks.disk("/tmp", 5 * GIB, 5)
    with pytest.raises(Bad, match=r"/dev/shm has 0\.06 GiB free, 1 are needed"):
        checks.shared_memory(64 << 20, 1)
    with pytest.raises(Bad, match="may open 1024 files, 4096 are needed"):
        checks.open_files(1024, 4096)
    with pytest.raises(Bad, match=r"TMPDIR=/scratch has 1\.0 GiB free, 5 are needed"):
        checks.disk("/scratch", GIB, 5)


def test_a_clock_that_is_off_is_told() -> None:
    assert checks.clock(-0.0124, 2.0) == "clock -12 ms"
    with pytest.raises(Bad, match=r"the clock is -7\.5 s beside the first node's"):
        checks.clock(-7.5, 2.0)


def test_clocks_are_compared_over_a_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other side's clock is 100 s behind; it starts late, and one node never comes."""
    probe = socket.create_server(("127.0.0.1", 0))
    port = probe.getsockname()[1]
    probe.close()
    reached: list[int] = []

    def late() -> None:
        time.sleep(0.3)
        with socket.create_server(("127.0.0.1", port)) as listener:
            reached.append(clock.serve(listener, 2, timeout=1.0))

    server = threading.Thread(target=late)
    server.start()
    form = clock.FORMAT

    class Behind:
        size = form.size
        unpack = staticmethod(form.unpack)

        @staticmethod
        def pack(value: float) -> bytes:
            return form.pack(value - 100)

    monkeypatch.setattr(clock, "FORMAT", Behind)
    assert clock.offset("127.0.0.1", port, timeout=30) == pytest.approx(100, abs=1)
    server.join()
    assert reached == [1]
    with pytest.raises(OSError):
        clock.offset("127.0.0.1", port, timeout=0.1)


def test_strangers_are_not_counted_and_nobody_waits_for_them() -> None:
    """One is silent, one speaks HTTP, longer than all of a node's questions, one hangs up; the node that comes after
    them gets its answer at once."""
    reached: list[int] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = listener.getsockname()
        strangers = [socket.create_connection(address) for _ in range(3)]
        strangers[1].sendall(b"GET / HTTP/1.0\r\n" + clock.QUESTIONS * b"X-Scanner: anybody there?\r\n" + b"\r\n")
        strangers[2].close()
        server = threading.Thread(target=lambda: reached.append(clock.serve(listener, 1, timeout=60)))
        server.start()
        started = time.monotonic()
        assert clock.offset(*address, timeout=30) == pytest.approx(0, abs=1)
        server.join()
        assert time.monotonic() - started < clock.QUESTION_SECONDS
        assert reached == [1]
        strangers[0].close()
        strangers[1].close()
        assert clock.serve(listener, 1, timeout=0.5) == 0


FAKE = """#!/bin/sh
case "$1" in
  --query-gpu*) cat "$0.gpus"; exit ${SMI_EXIT:-0} ;;
  topo) cat "$0.peers" ;;
esac
"""


@pytest.fixture
def fake_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fake nvidia-smi that prints what a test gives it."""
    fake = tmp_path / "bin" / "nvidia-smi"
    fake.parent.mkdir()
    fake.write_text(FAKE)
    fake.chmod(0o755)
    (tmp_path / "bin" / "nvidia-smi.peers").write_text(PEERS.format(state="OK"))
    (tmp_path / "bin" / "nvidia-smi.gpus").write_text(gpu_lines(3))
    monkeypatch.setenv("PATH", f"{fake.parent}:{os.environ['PATH']}")
    return fake


def gpu_check_results(ranks: int) -> list[str]:
    results = []
    for work in program.gpu_checks(settings(), ranks):
        try:
            results.append(work())
        except Bad as error:
            results.append(f"bad: {error}")
    return results


def test_the_gpu_checks_ask_nvidia_smi(fake_nvidia_smi: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [result for result in gpu_check_results(3) if result.startswith("bad")] == []
    assert len(gpu_check_results(3)) == 5
    (fake_nvidia_smi.parent / "nvidia-smi.peers").write_text(PEERS.format(state="NS"))
    (bad,) = [result for result in gpu_check_results(3) if result.startswith("bad")]
    assert "GPU1-GPU2 NS" in bad
    (fake_nvidia_smi.parent / "nvidia-smi.gpus").write_text("NVIDIA-SMI has failed\n")
    monkeypatch.setenv("SMI_EXIT", "9")
    assert gpu_check_results(3) == [
        "bad: nvidia-smi --query-gpu=index,name,driver_version,memory.total,memory.free,"
        "ecc.errors.uncorrected.volatile.total,remapped_rows.pending,remapped_rows.failure: NVIDIA-SMI has failed; "
        "reset the GPU or reboot the node"
    ]
    fake_nvidia_smi.unlink()
    monkeypatch.setenv("PATH", str(fake_nvidia_smi.parent))
    assert gpu_check_results(1) == [
        "bad: no nvidia-smi: the node has no NVIDIA driver, or the container was started without it"
    ]


def test_the_command_line_gets_the_group() -> None:
    assert with_group(["recipe=demo", "seed=2"], program.GROUP, program.DEFAULT) == [
        "+node_check=h100",
        "recipe=demo",
        "seed=2",
    ]
    assert with_group(["recipe=demo", "node_check=own"], program.GROUP, program.DEFAULT) == [
        "recipe=demo",
        "+node_check=own",
    ]


@given(st.integers(min_value=0, max_value=40))
def test_the_ring_has_each_neighbour_once_and_each_node_once_a_round(nodes: int) -> None:
    rounds = links.ring(nodes)
    all_links = [frozenset(link) for links_of_round in rounds for link in links_of_round]
    expected = {frozenset((node, (node + 1) % nodes)) for node in range(nodes)} if nodes > 1 else set()
    assert len(all_links) == len(set(all_links)) and set(all_links) == expected
    for links_of_round in rounds:
        members = [node for link in links_of_round for node in link]
        assert len(members) == len(set(members))


def test_a_node_that_is_slow_towards_both_neighbours_is_the_bad_one() -> None:
    within = [300.0, 310.0, 305.0, 90.0]
    between = {(0, 1): 3.0, (1, 2): 2.0, (2, 3): 45.0, (3, 0): 44.0}
    reasons = links.faults(within, between, 150, 20)
    assert sorted(reasons) == [1, 3]
    assert ("reduce at 90 GB/s, the floor is 150" in reasons[3] and "2.0 GB/s" in reasons[1]) or "3.0 GB/s" in reasons[
        1
    ]
    assert sorted(links.faults(within[:3], {(0, 1): 3.0, (1, 2): 40.0, (2, 0): 40.0}, 150, 20)) == [0, 1], "either"
    assert sorted(links.faults([300, 300], {(0, 1): 3.0}, 150, 20)) == [0, 1]
    assert links.faults(within, between, None, None) == {}


def _rank(rank: int, world: int, port: int, results: Any) -> None:
    import torch
    import torch.distributed as dist

    from recipes.node_check import links

    torch.set_num_threads(1)
    os.environ["SLURMD_NODENAME"] = f"node{rank // 2}"
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        fine = links.check(settings(link_mib=1, node_gb_s=1e-6, neighbour_gb_s=1e-6), 2, torch.device("cpu"))
    impossible = links.check(settings(link_mib=1, node_gb_s="null", neighbour_gb_s=1e9), 2, torch.device("cpu"))
    results.put((rank, fine, sorted(impossible), printed.getvalue()))
    dist.destroy_process_group()


def test_the_links_between_processes_are_measured() -> None:
    """Two nodes of two ranks, over gloo; on GPUs it is NCCL."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch.distributed", "recipes.node_check.links"])
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    results = context.Queue()
    processes = [context.Process(target=_rank, args=(rank, 4, port, results)) for rank in range(4)]
    for process in processes:
        process.start()
    of_ranks = [results.get(timeout=300) for _ in processes]
    for process in processes:
        process.join()
    assert sorted(of_rank[:3] for of_rank in of_ranks) == [(rank, {}, ["node0", "node1"]) for rank in range(4)]
    # Rank 0 prints what the check of two nodes reads (docs/gpu_checks.md, rung 3).
    (_, _, _, line), *others = sorted(of_ranks)
    assert len(small_run.links(line)) == 1 and "; between nodes: node0-node1 " in line
    assert {text for *_, text in others} == {""}
