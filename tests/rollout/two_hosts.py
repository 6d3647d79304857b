"""Two hosts' worth of processes on this machine: network and host-name namespaces joined by a virtual cable.

``python -m tests.rollout.two_hosts COMMANDS_A COMMANDS_B`` (JSON lists of commands) is what :func:`run` starts in a
namespace of its own: it becomes host a, makes host b and the cable, and runs the commands, all at the same time.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

ADDRESS_A, ADDRESS_B = "10.77.0.1", "10.77.0.2"
ROOT = Path(__file__).resolve().parents[2]
PRIVATE = ["unshare", "--user", "--map-root-user", "--net", "--uts"]
HOST_B = f"""
hostname host-b
ip link set lo up
until ip link show cable-b > /dev/null 2>&1; do sleep 0.1; done
ip address add {ADDRESS_B}/24 dev cable-b
ip link set cable-b up
exec "$@"
"""
TIMEOUT_SECONDS = 400


def run(on_a: Sequence[Sequence[str]], on_b: Sequence[Sequence[str]]) -> subprocess.CompletedProcess[str]:
    """Run the commands on both hosts; the exit code is 0 only if all are. Skips the test where that is not allowed."""
    if not shutil.which("ip") or subprocess.run([*PRIVATE, "true"], capture_output=True).returncode:
        pytest.skip("needs iproute2 and the right to make user and network namespaces (unshare --user --net)")
    command = [*PRIVATE, sys.executable, "-m", "tests.rollout.two_hosts", json.dumps(on_a), json.dumps(on_b)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=TIMEOUT_SECONDS)


def everything(commands: str) -> None:
    """Run all commands at the same time; exit as the worst of them."""
    running = [subprocess.Popen(command) for command in json.loads(commands)]
    sys.exit(max(abs(process.wait()) for process in running))


def main(on_a: str, on_b: str) -> None:
    subprocess.run(["hostname", "host-a"], check=True)
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    mine = [sys.executable, "-m", "tests.rollout.two_hosts"]
    b = subprocess.Popen(
        ["unshare", "--net", "--uts", "sh", "-c", HOST_B, "sh", *mine, on_b],
        env=os.environ | {"GLOO_SOCKET_IFNAME": "cable-b"},
    )
    namespace = Path(f"/proc/{b.pid}/ns/net")
    while namespace.readlink() == Path("/proc/self/ns/net").readlink():
        time.sleep(0.05)
    for command in (
        f"link add cable-a type veth peer name cable-b netns {b.pid}",
        f"address add {ADDRESS_A}/24 dev cable-a",
        "link set cable-a up",
    ):
        subprocess.run(["ip", *command.split()], check=True)
    a = subprocess.Popen([*mine, on_a], env=os.environ | {"GLOO_SOCKET_IFNAME": "cable-a"})
    sys.exit(max(abs(process.wait()) for process in (a, b)))


if __name__ == "__main__":
    everything(sys.argv[1]) if len(sys.argv) == 2 else main(*sys.argv[1:])
