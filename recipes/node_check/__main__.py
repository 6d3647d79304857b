"""``python -m recipes.node_check recipe=… [overrides…] [node_check.FIELD=…]``: is this node fit for the job?

The job scripts start it once on every node, before anything else. A node that is not fit prints a line
``bad node NAME: why`` for each fault, and the exit code is 1. On a CPU, only the checks that apply there are made.
``python -m recipes.node_check.links`` measures the links between GPUs. ``node_check=h200`` would choose another file of
conf/node_check/.
"""

import os
import resource
import shutil
import socket
import struct
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import hydra
from omegaconf import DictConfig, OmegaConf

from megatron_ext.platform import capabilities, features
from recipes.command_line import from_command_line, with_group
from recipes.node_check import checks, clock
from recipes.node_check.checks import Bad, NotChecked
from recipes.node_check.settings import Settings

NVIDIA_SMI_SECONDS = 60
# Hydra's group of the settings, and its file by default.
GROUP, DEFAULT = "node_check", "h100"


def settings_of(raw: DictConfig) -> Settings:
    """The group ``node_check``."""
    return Settings(**OmegaConf.to_container(raw.node_check))  # type: ignore[arg-type]


def node_name() -> str:
    """Slurm's name of this node, by which a job can exclude it. Outside Slurm, the host name."""
    return os.environ.get("SLURMD_NODENAME", socket.gethostname())


@hydra.main(version_base="1.3", config_path="../../conf", config_name="config")
def main(raw: DictConfig) -> None:
    """Make the checks and print the faults. If there are none, the first node prints what its checks found."""
    settings = settings_of(raw)
    has_gpus = capabilities(str(raw.cluster.platform)).has_gpus
    gpus = settings.gpus if settings.gpus is not None else raw.cluster.ranks // raw.cluster.nodes
    fits = []
    faults = []
    for work in node_checks(settings, has_gpus, gpus):
        try:
            fits.append(work())
        except NotChecked as reason:
            fits.append(f"not checked: {reason}")
        except (Bad, OSError, subprocess.SubprocessError) as error:
            faults.append(str(error))
    for fault in faults:
        print(f"bad node {node_name()}: {fault}", flush=True)
    if not faults and is_first():
        print(f"{node_name()}: {'; '.join(fits)}", flush=True)
    sys.exit(1 if faults else 0)


def is_first() -> bool:
    """Whether this is the job step's first node."""
    return os.environ.get("SLURM_NODEID", "0") == "0"


def node_checks(settings: Settings, has_gpus: bool, gpus: int) -> Iterator[Callable[[], str]]:
    """The checks that apply to this node, each ready to be called."""
    if has_gpus:
        yield from gpu_checks(settings, gpus)
        yield lambda: checks.one_cudnn(os.environ, own=features.cudnn_folder())
        yield lambda: checks.compiler(shutil.which, checks.python_header(sysconfig.get_path("include")))
    yield lambda: checks.host_memory(
        checks.memory_limit(Path("/sys/fs/cgroup"), Path("/proc/self/cgroup").read_text()),
        os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        settings.host_memory_share if has_gpus else None,
    )
    if (shm := settings.shm_gib) is not None:
        yield lambda: checks.shared_memory(shutil.disk_usage("/dev/shm").free, shm)
    if (files := settings.open_files) is not None:
        yield lambda: checks.open_files(resource.getrlimit(resource.RLIMIT_NOFILE)[0], files)
    if (disk := settings.disk_gib) is not None:
        folder = tempfile.gettempdir()
        yield lambda: checks.disk(folder, shutil.disk_usage(folder).free, disk)
    yield lambda: compare_clocks(settings)


def gpu_checks(settings: Settings, needed: int) -> Iterator[Callable[[], str]]:
    """The checks that ask nvidia-smi. If it can't be asked, there is a single check, which fails."""
    if not checks.has_nvidia_smi():
        yield lambda: fail("no nvidia-smi: the node has no NVIDIA driver, or the container was started without it")
        return
    query = f"--query-gpu={','.join(checks.QUERY)}"
    try:
        gpus = checks.parse_gpus(nvidia_smi(query, "--format=csv,noheader,nounits"))
    except (Bad, OSError, subprocess.SubprocessError) as error:
        text = str(error)
        yield lambda: fail(text)
        return
    yield lambda: checks.gpu_count(gpus, needed)
    if not gpus:
        return
    if (driver := settings.driver) is not None:
        yield lambda: checks.driver(gpus, driver)
    if (share := settings.gpu_free_share) is not None:
        yield lambda: checks.gpu_memory(gpus, share)
    yield lambda: checks.gpu_errors(gpus)
    if len(gpus) > 1:
        yield lambda: checks.peer_access(nvidia_smi("topo", "-p2p", "r"))


def fail(text: str) -> str:
    """A check that can only fail."""
    raise Bad(text)


def nvidia_smi(*arguments: str) -> str:
    """The standard output of nvidia-smi. Raises Bad with its error."""
    done = subprocess.run(["nvidia-smi", *arguments], capture_output=True, text=True, timeout=NVIDIA_SMI_SECONDS)
    if done.returncode:
        raise Bad(f"nvidia-smi {arguments[0]}: {(done.stdout + done.stderr).strip()}; reset the GPU or reboot the node")
    return done.stdout


def compare_clocks(settings: Settings) -> str:
    """Compare this node's clock with the first node's. The first node answers all others and reports missing ones."""
    nodes = int(os.environ.get("SLURM_STEP_NUM_NODES", "1"))
    if nodes == 1 or settings.clock_skew is None:
        raise NotChecked("one node has one clock")
    host = os.environ["MASTER_ADDR"]
    port = int(os.environ["MASTER_PORT"])
    if is_first():
        with socket.create_server(("", port)) as listener:
            reached = clock.serve(listener, nodes - 1, settings.timeout)
        if reached < nodes - 1:
            # This is the fault of the other nodes, not of this one. They report it themselves if they run.
            print(f"{nodes - 1 - reached} of {nodes} nodes have not reached {host}:{port}", flush=True)
        return f"{reached + 1} nodes reach port {port}"
    try:
        return checks.clock(clock.offset(host, port, settings.timeout), settings.clock_skew)
    except (OSError, struct.error) as error:
        raise Bad(
            f"can't reach the first node at {host}:{port} ({error}): its network interface, or its name"
        ) from error


if __name__ == "__main__":
    sys.argv[1:] = with_group(sys.argv[1:], GROUP, DEFAULT)
    from_command_line(main)
