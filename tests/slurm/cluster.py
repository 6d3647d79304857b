"""A real Slurm of several nodes on this machine: munged, slurmctld and a slurmd for each node.

A node is a set of namespaces: it has its own processes, host name, network with a cable to a switch (10.98.0.K),
/dev/shm and /proc; all share one file system. Their GPUs are links to /dev/null: **fake**, Slurm counts and hands them
out, and nothing can run on them. Nothing needs systemd, cgroups, or a Slurm that is set up; everything is in one
folder, and the kernel ends every process when the one that started the cluster has ended, in whatever way.
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

from tests import debian

PACKAGES = ["slurm-wlm", "slurmctld", "slurmd", "slurm-client", "munge", "iproute2", "shellcheck"]
INSTALL_SECONDS = 120
PROGRAMS = ["slurmctld", "slurmd", "sbatch", "munged", "ip", "shellcheck"]
SBIN = os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/sbin"])
CONTROL_PORT, NODE_PORT = 6817, 6818
CONTROL_ADDRESS = "10.98.0.254"  # the login node's as well
FAKE_GPUS, CPUS, MEMORY_MIB = 8, 128, 20000  # what a node says that it has, not what it has
# The controller takes a node's answer in up to 2 s after it came (agent.c, _agent_nodes_update); a node that is DOWN by
# then is up again (ReturnToService=2), though it was lost in between.
LATE_ANSWER_SECONDS = 3
KILL_SECONDS = 5  # from Slurm's SIGTERM to its SIGKILL
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE")

NAMESPACES = ["unshare", "--uts", "--mount", "--pid", "--fork", "--kill-child=KILL", "--mount-proc"]
WITH_US = ["setpriv", "--pdeathsig=KILL"]  # the kernel ends the process when we have ended

# The network of the controller, to which it is the switch.
SWITCH = f"""
ip link set lo up
ip link add switch type bridge
ip address add {CONTROL_ADDRESS}/24 dev switch
ip link set switch up
"""

# In a node's network: $1 is its name, $2 its address, $3 a process in the switch's network; the rest becomes the node.
# The kernel takes its time with the cable of a node that was lost.
CABLE = """
ip link set lo up
until ip link add eth0 type veth peer name "$1" netns "$3"; do sleep 0.2; done
ip address add "$2/24" dev eth0
ip link set eth0 up
nsenter --net="/proc/$3/ns/net" ip link set "$1" master switch up
exec "${@:4}"
"""

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
    if not all(shutil.which(program, path=SBIN) for program in PROGRAMS) and (
        reason := debian.install(PACKAGES, INSTALL_SECONDS)
    ):
        return f"Slurm is {reason}"
    command = [*NAMESPACES, "--net", "sh", "-ec", SWITCH]
    if subprocess.run(command, env=os.environ | {"PATH": SBIN}, capture_output=True).returncode:
        return f"root can't make namespaces and a bridge on this machine ({' '.join(NAMESPACES)} --net)"
    return None


def address(k: int) -> str:
    return f"10.98.0.{k}"


def configuration(folder: Path, nodes: int) -> str:
    """slurm.conf. Heterogeneous jobs start only in the backfill scheduler, hence its short interval."""
    lines = [
        "ClusterName=tests",
        f"SlurmctldHost={socket.gethostname()}({CONTROL_ADDRESS})",
        f"SlurmctldPort={CONTROL_PORT}",
        f"AuthInfo=socket={folder}/munge/socket,cred_expire=5",  # a requeue waits that long; less is refused
        "SlurmUser=root",
        "SlurmdUser=root",
        "ProctrackType=proctrack/linuxproc",
        "TaskPlugin=task/none",
        "SelectType=select/cons_tres",
        "GresTypes=gpu",
        "SlurmdParameters=config_overrides",
        "SchedulerParameters=bf_interval=1,sched_interval=1,batch_sched_delay=0",
        "SlurmdTimeout=300",  # a busy machine's slurmd answers late; see Cluster.notice
        f"KillWait={KILL_SECONDS}",
        "PreemptType=preempt/partition_prio",
        "PreemptMode=REQUEUE",
        "PreemptParameters=send_user_signal",
        "MessageTimeout=60",
        "TCPTimeout=2",
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
    for k in range(1, nodes + 1):
        lines.append(
            f"NodeName=node{k} NodeAddr={address(k)} NodeHostname=node{k} Port={NODE_PORT} CPUs={CPUS} "
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
        self.inside: list[str] = []  # before a command: in the cluster's network
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
        names = [f"{address(k)} node{k}\n" for k in range(1, nodes + 1)]
        (folder / "hosts").write_text("127.0.0.1 localhost\n" + "".join(names))

    def start(self) -> None:
        munge = self.folder / "munge"
        command = f"munged --foreground --force --key-file={munge}/key --socket={munge}/socket " + " ".join(
            f"--{what}-file={munge}/{what}" for what in ("pid", "log", "seed")
        )
        self.daemons.append(self.daemon(["unshare", "--net", "sh", "-ec", f"{SWITCH}exec {command}"]))
        self.inside = ["nsenter", f"--net=/proc/{self.daemons[0].pid}/ns/net"]
        self.wait_for("munge's socket", (munge / "socket").exists)
        self.daemons.append(self.daemon([*self.inside, "slurmctld", "-D", "-f", str(self.folder / "slurm.conf")]))
        for k in range(1, self.nodes + 1):
            self.start_node(f"node{k}")
        self.wait_for_nodes()

    def start_node(self, name: str) -> None:
        cable = ["bash", "-ec", CABLE, "bash", name, address(int(name.removeprefix("node"))), str(self.daemons[0].pid)]
        node = [*NAMESPACES, "bash", "-ec", NODE, "bash", name, str(self.folder)]
        self.slurmds[name] = self.daemon(["unshare", "--net", *cable, *node])

    def lose_node(self, name: str) -> None:
        """As when it loses its power: the kernel ends all that is in its process namespace. Slurm does not know yet."""
        process = self.slurmds.pop(name)
        process.kill()
        process.wait()

    def notice(self, name: str) -> None:
        """What Slurm does by itself when a node has not answered for SlurmdTimeout."""
        time.sleep(LATE_ANSWER_SECONDS)
        self.run("scontrol", "update", f"NodeName={name}", "State=DOWN", "Reason=lost").check_returncode()

    def wait_for_nodes(self) -> None:
        self.wait_for(
            "nodes that are idle", lambda: self.call("sinfo", "-hN", "-ptests", "-o%t").split() == ["idle"] * self.nodes
        )

    def daemon(self, command: list[str]) -> subprocess.Popen[bytes]:
        with (self.folder / "daemons.log").open("ab") as log:
            return subprocess.Popen(
                [*WITH_US, *command], stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self.environment
            )

    def wait_for[T](self, what: str, happened: Callable[[], T], seconds: float = 120) -> T:
        """Wait until ``happened`` returns a true value, and return it. ``what`` names it in the error."""
        deadline = time.monotonic() + seconds
        result = happened()
        while not result:
            assert time.monotonic() < deadline, f"no {what} within {seconds} s:\n{self.logs()}"
            dead = [daemon.args for daemon in (*self.daemons, *self.slurmds.values()) if daemon.poll() is not None]
            assert not dead, f"{dead} ended before {what}:\n{self.logs()}"
            time.sleep(0.25)
            result = happened()
        return result

    def logs(self) -> str:
        return "\n".join(f"--- {path.name}\n{path.read_text()[-3000:]}" for path in self.folder.glob("*.log"))

    def run(self, *command: str, folder: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
        """A command as a user gives it on the cluster's login node."""
        return subprocess.run(
            [*self.inside, *command], cwd=folder, env=self.environment | environment, capture_output=True, text=True
        )

    def call(self, *command: str) -> str:
        """A Slurm command's standard output; empty while the controller is not up."""
        return self.run(*command).stdout

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
        first, *_ = self.wait_for(f"end of job {job}", lambda: self.ended(job), seconds)
        return first["JobState"], first["ExitCode"]

    def wait_for_file(self, job: str, path: Path, seconds: float) -> None:
        """A file that the job makes."""
        self.wait_for(f"{path.name} of job {job}", lambda: self.ended(job) or path.exists(), seconds)
        assert path.exists(), f"job {job} ended without {path.name}:\n{self.logs()}"

    def ended(self, job: str) -> list[dict[str, str]]:
        """The fields of each component of a job that has ended; none of another."""
        components = self.components(job)
        if any(fields["JobState"] == "PENDING" and "HetJobId" in fields for fields in components):
            # backfill looks again only when something has changed, as on a cluster in use it always has
            self.call("scontrol", "update", f"JobId={job}", "Comment=waiting")
        return components if all(fields["JobState"] in ENDED for fields in components) else []

    def cancel_all(self) -> None:
        """What a test that failed has left in the queue."""
        if self.call("squeue", "-h"):
            self.call("scancel", "--user=root")
            self.wait_for("empty queue", lambda: not self.call("squeue", "-h"))

    def processes_with(self, marker: str) -> dict[int, str]:
        """Living processes, on any node, with the text in their environment: pid → command line."""
        processes = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError):
                    if marker.encode() in (entry / "environ").read_bytes():
                        processes[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        return processes

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
