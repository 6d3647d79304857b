"""A real Slurm of several nodes on this machine: munged, slurmctld and a slurmd for each node.

A node is a process namespace with its own host name, address (127.0.1.K), /dev/shm and /proc; all share one network and
one file system. Their GPUs are links to /dev/null: **fake**, Slurm counts and hands them out, and nothing can run on
them. Nothing needs systemd, cgroups, or a Slurm that is set up; everything is in one folder.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

PACKAGES = ["slurm-wlm", "slurmctld", "slurmd", "slurm-client", "munge"]
INSTALL_SECONDS = 120
PROGRAMS = ["slurmctld", "slurmd", "sbatch", "munged"]
SBIN = os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/sbin"])
FAKE_GPUS, CPUS, MEMORY_MIB = 8, 128, 20000  # what a node says that it has, not what it has
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE")

# A node's first process. All nodes' names are in its /etc/hosts, as a cluster's name service has them.
NODE = """
hostname "$1"
mount -t tmpfs tmpfs /dev/shm
mount --bind "$2/hosts" /etc/hosts
exec slurmd -D -N "$1" -f "$2/slurm.conf"
"""


def install() -> str | None:
    """Install Debian's packages where they are absent. Returns why there can be no cluster, None if there can."""
    if os.geteuid() != 0:
        return "a Slurm of several nodes needs root (namespaces, slurmd)"
    if subprocess.run(["unshare", "--uts", "--mount", "--pid", "--fork", "true"], capture_output=True).returncode:
        return "this machine does not let root make namespaces (unshare --uts --mount --pid)"
    if not all(shutil.which(program, path=SBIN) for program in PROGRAMS):
        if not shutil.which("apt-get"):
            return "Slurm is not installed, and there is no apt-get to install it with"
        command = ["apt-get", "install", "-y", "--no-install-recommends", *PACKAGES]
        environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        try:
            done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=INSTALL_SECONDS)
        except subprocess.TimeoutExpired:
            return f"Slurm is not installed, and apt-get did not install it in {INSTALL_SECONDS} s"
        if done.returncode:
            return f"Slurm is not installed, and apt-get can't install it: {done.stderr.strip()[-200:]}"
    return None


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        listeners = [stack.enter_context(socket.create_server(("", 0))) for _ in range(count)]
        return [listener.getsockname()[1] for listener in listeners]


def configuration(folder: Path, nodes: int) -> str:
    """slurm.conf. Heterogeneous jobs start only in the backfill scheduler, hence its short interval."""
    control, *ports = free_ports(nodes + 1)
    lines = [
        "ClusterName=tests",
        f"SlurmctldHost={socket.gethostname()}(127.0.0.1)",
        f"SlurmctldPort={control}",
        f"AuthInfo=socket={folder}/munge/socket,cred_expire=5",  # a requeue waits that long; less is refused
        "SlurmUser=root",
        "SlurmdUser=root",
        "ProctrackType=proctrack/linuxproc",
        "TaskPlugin=task/none",
        "SelectType=select/cons_tres",
        "GresTypes=gpu",
        "SlurmdParameters=config_overrides",
        "SchedulerParameters=bf_interval=1,sched_interval=5,batch_sched_delay=0",
        "SlurmdTimeout=30",  # a busy machine's slurmd answers late; a lost node is one from then on
        "KillWait=5",
        "PreemptType=preempt/partition_prio",
        "PreemptMode=REQUEUE",
        "PreemptParameters=send_user_signal",
        "MessageTimeout=60",
        "TCPTimeout=10",
        "JobRequeue=1",
        "ReturnToService=2",
        "MinJobAge=600",
        "MpiDefault=none",
        f"StateSaveLocation={folder}/state",
        f"SlurmdSpoolDir={folder}/spool-%n",
        f"SlurmctldPidFile={folder}/slurmctld.pid",
        f"SlurmdPidFile={folder}/slurmd-%n.pid",
        f"SlurmctldLogFile={folder}/slurmctld.log",
        f"SlurmdLogFile={folder}/slurmd-%n.log",
    ]
    for k, port in enumerate(ports, start=1):
        lines.append(
            f"NodeName=node{k} NodeAddr=127.0.1.{k} NodeHostname=node{k} Port={port} CPUs={CPUS} "
            f"RealMemory={MEMORY_MIB} Gres=gpu:{FAKE_GPUS}"
        )
    shared = f"Nodes=node[1-{nodes}] MaxTime=INFINITE OverSubscribe=NO"
    lines.append(f"PartitionName=tests {shared} Default=YES PriorityTier=1 GraceTime=300")
    lines.append(f"PartitionName=urgent {shared} PriorityTier=2 PreemptMode=OFF")
    return "\n".join(lines) + "\n"


class Cluster:
    """``folder`` is the cluster's own, with a short path (a socket is in it). Ends with :meth:`stop`."""

    def __init__(self, folder: Path, nodes: int) -> None:
        self.folder, self.nodes = folder, nodes
        self.daemons: list[subprocess.Popen[bytes]] = []  # munged and slurmctld
        self.slurmds: dict[str, subprocess.Popen[bytes]] = {}  # by node
        keep = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_", "RANK", "MASTER_"))}
        self.environment = keep | {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": SBIN}
        for name in ("munge", "state"):
            (folder / name).mkdir(mode=0o700)
        (folder / "munge" / "key").write_bytes(os.urandom(128))
        (folder / "munge" / "key").chmod(0o600)
        (folder / "slurm.conf").write_text(configuration(folder, nodes))
        (folder / "cgroup.conf").write_text("CgroupPlugin=disabled\n")
        fakes = [folder / f"fake-gpu{i}" for i in range(FAKE_GPUS)]
        for fake in fakes:
            fake.symlink_to("/dev/null")
        (folder / "gres.conf").write_text("".join(f"Name=gpu File={fake}\n" for fake in fakes))
        names = [f"127.0.1.{k} node{k}\n" for k in range(1, nodes + 1)]
        (folder / "hosts").write_text("127.0.0.1 localhost\n" + "".join(names))

    def start(self) -> None:
        munge = self.folder / "munge"
        self.daemons.append(
            self.daemon(
                ["munged", "--foreground", "--force", f"--key-file={munge}/key", f"--socket={munge}/socket"]
                + [f"--{what}-file={munge}/{what}" for what in ("pid", "log", "seed")]
            )
        )
        self.wait_for("munge's socket", (munge / "socket").exists)
        self.daemons.append(self.daemon(["slurmctld", "-D", "-f", str(self.folder / "slurm.conf")]))
        for k in range(1, self.nodes + 1):
            self.start_node(f"node{k}")
        self.wait_for_nodes()

    def start_node(self, name: str) -> None:
        own = ["unshare", "--uts", "--mount", "--pid", "--fork", "--kill-child=KILL", "--mount-proc"]
        self.slurmds[name] = self.daemon([*own, "bash", "-ec", NODE, "bash", name, str(self.folder)])

    def lose_node(self, name: str) -> None:
        """As when it loses its power: the kernel ends all that is in its process namespace."""
        process = self.slurmds.pop(name)
        process.kill()
        process.wait()

    def wait_for_nodes(self) -> None:
        self.wait_for(
            "nodes that are idle", lambda: self.call("sinfo", "-hN", "-ptests", "-o%t").split() == ["idle"] * self.nodes
        )

    def daemon(self, command: list[str]) -> subprocess.Popen[bytes]:
        with (self.folder / "daemons.log").open("ab") as log:
            return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self.environment)

    def wait_for[T](self, what: str, happened: Callable[[], T], seconds: float = 120) -> T:
        """What ``happened`` returns, as soon as that is true."""
        deadline = time.monotonic() + seconds
        while not (found := happened()):
            assert time.monotonic() < deadline, f"no {what} within {seconds} s:\n{self.logs()}"
            time.sleep(0.1)
        return found

    def logs(self) -> str:
        return "\n".join(f"--- {path.name}\n{path.read_text()[-3000:]}" for path in self.folder.glob("*.log"))

    def call(self, *command: str) -> str:
        """A Slurm command's standard output; empty while the controller is not up."""
        return subprocess.run(command, env=self.environment, capture_output=True, text=True).stdout

    def field(self, job: str, name: str) -> str:
        """A field of ``scontrol show job``; of a heterogeneous job's first component."""
        return next((fields.get(name, "") for fields in self.components(job)), "")

    def components(self, job: str) -> list[dict[str, str]]:
        """The fields of ``scontrol show job`` of each component; none while the controller does not answer."""
        lines = self.call("scontrol", "show", "job", "--oneliner", job).splitlines()
        pairs = [[word.partition("=") for word in line.split()] for line in lines if "JobState=" in line]
        return [{name: value for name, _, value in words} for words in pairs]

    def wait_for_end(self, job: str, seconds: float) -> tuple[str, str]:
        """The job's state and exit code (CODE:SIGNAL), of the first component, when all components' processes have
        ended: until then Slurm says COMPLETING."""

        def ended() -> list[dict[str, str]]:
            found = self.components(job)
            return found if all(fields["JobState"] in ENDED for fields in found) else []

        first, *_ = self.wait_for(f"end of job {job}", ended, seconds)
        return first["JobState"], first["ExitCode"]

    def processes_with(self, marker: str) -> dict[int, str]:
        """Living processes, on any node, with the text in their environment: pid → command line."""
        found = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError):
                    if marker.encode() in (entry / "environ").read_bytes():
                        found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        return found

    def stop(self) -> None:
        """End all by pid: the nodes with everything on them, then the controller and munged."""
        for name in list(self.slurmds):
            self.lose_node(name)
        for process in reversed(self.daemons):
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
