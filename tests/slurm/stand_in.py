"""In the place of .venv/bin/python where a test is about the scripts: writes down how it was called and trains nothing.

``rewards.placement`` is the real one where a recipe has judges. ``rewards.serve`` answers /health on the ports of the
servers that its arguments name, until SIGTERM. ``STAND_IN_EXIT`` ("recipes.train=7") makes a module fail, a server
when ranks run. ``STAND_IN_STARTS`` ("hangs,0") is what the ranks do in each of the job's starts: wait ("hangs"); wait,
while rank 0 saves and fails with code 7 ("saves"); fail when there is a file ``lost-JOB`` ("notices"); end with a code.
``recipes.launch.has_new_checkpoint`` looks for the file ``checkpoint-JOB``, which is what they save.
``recipes.node_check`` calls the node STAND_IN_BAD_NODE bad.
"""

import json
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path

PORTS: dict[str, int] = json.loads(Path("ports.json").read_text())
FAILING, _, CODE = os.environ.get("STAND_IN_EXIT", "").partition("=")
JOB = os.environ["SLURM_JOB_ID"]


def record(**what: object) -> None:
    with open("calls.jsonl", "a") as calls:  # a short line is written at once
        calls.write(json.dumps(what) + "\n")


def training() -> bool:
    return '"recipes.train"' in Path("calls.jsonl").read_text()


def answer(listener: socket.socket) -> None:
    while True:
        connection, _ = listener.accept()
        with connection:
            connection.recv(1000)
            connection.sendall(b"HTTP/1.0 200 OK\r\n\r\n")


def serve(arguments: list[str]) -> None:
    own = [name for name in PORTS if f"++rewards.servers.{name}.host=0.0.0.0" in arguments]
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    for name in own:
        listener = socket.create_server(("0.0.0.0", PORTS[name]))
        threading.Thread(target=answer, args=[listener], daemon=True).start()
    while not ended.wait(0.1) and not (FAILING == "rewards.serve" and training()):
        pass
    record(module="stopped", host=socket.gethostname(), servers=own)


def train(does: str) -> int:
    """The exit code."""
    if does == "saves" and os.environ["SLURM_PROCID"] == "0":
        Path(f"checkpoint-{JOB}").touch()
        return 7
    while does == "notices":
        if Path(f"lost-{JOB}").exists():
            return 1
        time.sleep(0.1)
    if does in ("hangs", "saves"):
        time.sleep(600)
    return int(does)


def main() -> None:
    module, arguments = sys.argv[2], sys.argv[3:]
    if module == "rewards.placement":
        if not any(argument.startswith("recipe=safework") for argument in arguments):
            return
        os.execv(os.environ["STAND_IN_PYTHON"], [os.environ["STAND_IN_PYTHON"], *sys.argv[1:]])
    start, starts = int(os.environ.get("SLURM_RESTART_COUNT", "0")), os.environ.get("STAND_IN_STARTS", "0").split(",")
    names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "MASTER_ADDR", "OMP_NUM_THREADS")
    record(
        module=module,
        job=JOB,
        host=socket.gethostname(),
        arguments=arguments,
        start=start,
        token=len(os.environ.get("REWARDS_TOKEN", "")),
        **{name: os.environ.get(name) for name in names},
    )
    if module == "rewards.serve":
        serve(arguments)
    if module == "recipes.node_check" and socket.gethostname() == os.environ.get("STAND_IN_BAD_NODE"):
        print(f"bad node {socket.gethostname()}: made up")
        sys.exit(1)
    if module == "recipes.launch.has_new_checkpoint":
        saved = Path(f"checkpoint-{JOB}")
        sys.exit(not (saved.exists() and saved.stat().st_mtime > Path(arguments[0]).stat().st_mtime))
    if module == "recipes.train" and FAILING == "rewards.serve":
        time.sleep(600)
    if module == FAILING:
        sys.exit(int(CODE))
    sys.exit(train(starts[min(start, len(starts) - 1)]) if module == "recipes.train" else 0)


if __name__ == "__main__":
    main()
