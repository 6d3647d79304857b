"""A lock on a run's folder that keeps out a second launch, also one on another host of a shared file system.

A launch first writes its own lock file into the folder and then looks for lock files of others. So if two launches
start at the same moment, at least one of them sees the other and withdraws. File names are unique and never used again,
so anyone can remove the lock of a dead launch at any time. The lock does not use ``flock``, which many shared file
systems lack.

A launch that is killed leaves its lock. Whether its process is alive can be determined on the same host and for jobs of
Slurm. It can't be determined for other hosts. Then the error message says how to find out.
"""

import contextlib
import json
import os
import random
import shutil
import socket
import subprocess
import time
import uuid
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from recipes.errors import ConfigError

PREFIX = "lock."
ATTEMPTS = 3  # to take the lock, where launches see each other
SQUEUE_SECONDS = 30.0
# The PID namespace of processes that are in no container.
HOST_NAMESPACE = "pid:[4026531836]"


@dataclass(frozen=True)
class Holder:
    """The process that holds a lock."""

    host: str
    # The boot id of the running kernel.
    boot: str
    # The PID namespace of the process.
    namespace: str
    pid: int
    # When the process started, in clock ticks since the boot. A later process with the same pid has another start.
    started: int
    # The time at which the lock was taken.
    since: str
    # Slurm's cluster and job number, CLUSTER/JOB. None outside Slurm.
    job: str | None
    # How often Slurm has requeued the job.
    restart: int

    def __str__(self) -> str:
        job = f", Slurm job {_job_number(self.job)}" if self.job else ""
        return f"process {self.pid} on {self.host}{job}, since {self.since}"


def this_process() -> Holder:
    """This process as a holder, for the content of its lock."""
    job = os.environ.get("SLURM_JOB_ID")
    return Holder(
        host=socket.gethostname(),
        boot=Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        namespace=os.readlink("/proc/self/ns/pid"),
        pid=os.getpid(),
        started=start_of(os.getpid()) or 0,
        since=datetime.now(UTC).isoformat(sep=" ", timespec="seconds"),
        job=f"{os.environ.get('SLURM_CLUSTER_NAME', '')}/{job}" if job else None,
        restart=int(os.environ.get("SLURM_RESTART_COUNT", "0")),
    )


def start_of(pid: int) -> int | None:
    """When a process started, in clock ticks since the boot, or None for a process that has ended."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    state, *fields = stat.rpartition(")")[2].split()
    # Field 22 of proc(5). A zombie has ended; nobody has asked for its exit code yet.
    return None if state in "ZX" else int(fields[18])


def take(folder: Path) -> Path:
    """Lock the folder and return the lock file, for :func:`release`.

    Raises ConfigError while another launch uses the folder.
    """
    own = folder / f"{PREFIX}{uuid.uuid4().hex[:16]}"
    for attempt in range(1, ATTEMPTS + 1):
        # The file gets the name of a lock only when it is complete.
        partial = folder / f".{own.name}.partial"
        partial.write_text(json.dumps(asdict(this_process()), indent=2) + "\n")
        partial.rename(own)
        try:
            check(folder, own)
            return own
        except ConfigError:
            own.unlink()
            if attempt == ATTEMPTS:
                raise
        # The other launch may have seen this lock at the same moment and withdraw as well.
        time.sleep(random.uniform(0.1, 0.5))
    raise AssertionError


def check(folder: Path, own: Path | None = None) -> None:
    """Raises ConfigError while a launch other than that of the lock ``own`` uses the folder.

    Removes the locks of dead launches.
    """
    for lock in folder.glob(f"{PREFIX}*"):
        if lock == own:
            continue
        try:
            holder = Holder(**json.loads(lock.read_text()))
        except FileNotFoundError:
            continue  # released in between
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{lock} is no lock of a run ({error}); if nothing uses {folder}, remove it") from error
        if not is_dead(holder, this_process()):
            raise ConfigError(
                f"run_dir={str(folder)!r}: another launch uses it: {holder}. Wait for its end or give another run_dir. "
                f"If it is dead ({_how_to_tell(holder)}), remove {lock} and start again"
            )
        lock.unlink(missing_ok=True)


def release(lock: Path) -> None:
    """Remove the lock of this process. Does nothing in a process that was forked from the lock's holder."""
    with contextlib.suppress(OSError, ValueError, TypeError):
        if Holder(**json.loads(lock.read_text())).pid == os.getpid():
            lock.unlink()


def is_dead(holder: Holder, observer: Holder) -> bool:
    """Whether the holder's process is known to have ended, as seen by a process ``observer`` on this host."""
    if (holder.boot, holder.namespace) == (observer.boot, observer.namespace):
        return not _runs(holder)
    on_hosts = holder.namespace == observer.namespace == HOST_NAMESPACE
    if on_hosts and holder.host == observer.host:
        return True  # the host has been rebooted since
    if holder.job is None:
        return False
    if holder.job == observer.job:
        return (
            holder.restart < observer.restart
        )  # Slurm requeues a job whose processes have ended, or whose node is lost
    return _cluster(holder.job) == os.environ.get("SLURM_CLUSTER_NAME", "") and _slurm_has_ended(holder.job)


def _runs(holder: Holder) -> bool:
    """Whether the holder's process is running. Called on the holder's host."""
    started = start_of(holder.pid)
    if started is None:
        try:
            os.kill(holder.pid, 0)
        except PermissionError:
            return True  # another user's, which /proc may hide
        except ProcessLookupError:
            pass
    return started == holder.started


def _slurm_has_ended(job: str) -> bool:
    """Whether Slurm reports that a job neither runs nor waits.

    False where Slurm can't be asked, as in most containers.
    """
    if shutil.which("squeue") is None:
        return False
    command = ["squeue", "--noheader", "--format=%T", f"--jobs={_job_number(job)}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SQUEUE_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return False
    if done.returncode:
        return "Invalid job id" in done.stderr  # Slurm forgets jobs a few minutes after their end
    return not done.stdout.strip()


def _how_to_tell(holder: Holder) -> str:
    if holder.job:
        return f"`squeue --jobs={_job_number(holder.job)}` does not list the job"
    return f"`ps -p {holder.pid}` on {holder.host} lists nothing, or that host is gone"


def _cluster(job: str) -> str:
    return job.partition("/")[0]


def _job_number(job: str) -> str:
    return job.partition("/")[2]
