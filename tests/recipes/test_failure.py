"""Errors of NCCL, CUDA and gloo, as torch writes them, become messages with rank, host and phase."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from recipes.run import failure
from recipes.run.failure import Place

PLACE = Place(13, "node7", "train")

# Texts of torch, NCCL and the CUDA runtime, and what the message has to say. Shapes and addresses are made up.
TEXTS = {
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB": "memory is full",
    "CUDA error: uncorrectable ECC error encountered\nCUDA kernel errors might be asynchronously reported": "is broken",
    "CUDA error: uncorrectable NVLink error detected during the execution": "is broken",
    "The NVIDIA driver on your system is too old (found version 12040)": "driver is too old",
    "CUDA error: CUDA driver version is insufficient for CUDA runtime version": "driver is too old",
    "CUDA error: no kernel image is available for execution on the device": "not built for this GPU",
    "CUDA error: CUDA-capable device(s) is/are busy or unavailable": "does not get its GPU",
    "CUDA error: an illegal memory access was encountered": "a kernel failed",
    "[Rank 13] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=5, OpType=ALLREDUCE)": "did not come",
    "NCCL error in: ProcessGroupNCCL.cpp:94, remote process exited or there was a network error\n"
    "ncclRemoteError: A call failed possibly due to a network error": "another rank ended",
    "NCCL error in: NCCLUtils.cpp:77, unhandled system error (run with NCCL_DEBUG=INFO for details)\n"
    "ncclSystemError: System call (e.g. socket, malloc) or external library call failed": "network between nodes",
    "NCCL error in: ProcessGroupNCCL.cpp:94, unhandled cuda error, NCCL version 2.29.7": "NCCL failed",
    "Gloo connectFullMesh failed with [../third_party/gloo/gloo/transport/tcp/pair.cc:144] no error": "network between",
    "[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.7]:1": "another rank ended",
    "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`": "CUDA failed",
    "algorithm.max_mismatch=0.1: the engines sample from another policy": None,
}


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_an_error_is_told_with_rank_host_phase_meaning_and_remedy(text: str) -> None:
    message = failure.explain(text, PLACE)
    wanted = TEXTS[text]
    if wanted is None:
        assert message is None
    else:
        assert message is not None and message.startswith("rank 13 on node7, in train: ")
        assert wanted in message and message.count("; ") >= 1
        assert "\n" not in message


TIMEOUT = (
    "[rank{rank}]:[E1129 05:43:{second}.000000123 ProcessGroupNCCL.cpp:689] [Rank {rank}] Watchdog caught collective "
    "operation timeout: WorkNCCL(SeqNum=52, OpType=_ALLGATHER_BASE, Timeout(ms)=1800000)\n"
    "terminate called after throwing an instance of 'c10::DistBackendError'\n"
)
STACKS = (
    "Fatal Python error: Aborted\n\nCurrent thread 0x00007f (most recent call first):\n"
    '  File "/x/megatron_ext/forward_backward.py", line 150 in _run\n'
    '  File "/x/recipes/training/rl.py", line 352 in policy_update\n'
    '  File "/x/recipes/training/rl.py", line 317 in update\n'
    '  File "/x/recipes/training/rl.py", line 108 in fit\n'
)


def test_the_logs_of_ranks_that_were_aborted_name_the_first(tmp_path: Path) -> None:
    """NCCL's watchdog ends a process without Python. What a former launch left in the log does not count."""
    former = f"log of rank 2 on node1\n{TIMEOUT.format(rank=2, second='01')}"
    (tmp_path / "rank_0.log").write_text("log of rank 0 on node1\n2026-11-29 WARNING rank 0 nothing\n")
    (tmp_path / "rank_1.log").write_text(f"log of rank 1 on node2\n{TIMEOUT.format(rank=1, second='12')}{STACKS}")
    (tmp_path / "rank_2.log").write_text(
        f"{former}log of rank 2 on node7\n{TIMEOUT.format(rank=2, second='10')}{STACKS}"
    )
    message = failure.from_logs(tmp_path)
    assert message is not None
    assert message.startswith(
        "rank 2 on node7, in policy_update (recipes/training/rl.py:352): a rank did not come to an operation of all: "
        "Watchdog caught collective operation timeout: WorkNCCL(SeqNum=52"
    )
    (tmp_path / failure.FAILED).touch()
    assert failure.from_logs(tmp_path) is None, "a rank has told what happened first"
    (tmp_path / failure.FAILED).unlink()
    (tmp_path / "rank_1.log").write_text("log of rank 1 on node2\n")
    (tmp_path / "rank_2.log").write_text("log of rank 2 on node7\n")
    assert failure.from_logs(tmp_path) is None


def test_a_process_that_is_aborted_leaves_its_stacks_in_its_log(tmp_path: Path) -> None:
    program = (
        "import os\nfrom pathlib import Path\nfrom recipes.run.logs import redirect_output\n"
        f"redirect_output(Path({str(tmp_path)!r}), 3)\ndef update():\n    os.abort()\nupdate()\n"
    )
    done = subprocess.run([sys.executable, "-c", program])
    assert done.returncode == -signal.SIGABRT
    log = (tmp_path / "rank_3.log").read_text()
    assert log.startswith("log of rank 3 on ")
    assert "Fatal Python error: Aborted" in log and "in update" in log
