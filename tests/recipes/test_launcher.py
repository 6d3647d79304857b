"""Forked ranks: what they have, and that none outlives another's failure. How whole runs end is in test_run."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import os, signal, sys, time
from torch.distributed import TCPStore
from recipes.launch import launcher
launcher.GRACE_SECONDS = 0.5
launcher.fork_ranks(3)
rank = int(os.environ["RANK"])
if rank == 0:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
leads = os.getsid(0) == os.getpid()
store.set(f"rank {rank}", f"{os.environ['LOCAL_RANK']} of {os.environ['WORLD_SIZE']}, session {leads}")
ranks = [store.get(f"rank {other}").decode() for other in range(3)]
if rank == 1:
    print(*ranks, os.getppid(), sep="\\n", flush=True)
    sys.exit(3)
time.sleep(60)
"""


def test_a_rank_that_fails_ends_also_one_that_hears_no_sigterm_and_its_exit_code_is_the_launchers() -> None:
    launcher = subprocess.Popen(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    printed, log = launcher.communicate(timeout=300)  # which also waits until no rank holds the pipes
    assert launcher.returncode == 3
    assert printed.splitlines() == [*(f"{rank} of 3, session True" for rank in range(3)), str(launcher.pid)]
    ends = {line.split()[1]: line.rsplit(" ", 1)[1] for line in log.splitlines() if line.startswith("rank ")}
    assert ends == {"1": "3", "2": "143", "0": "137"}
