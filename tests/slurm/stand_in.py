"""In the place of .venv/bin/python where a test is about the scripts: writes down how it was called and trains nothing.

``rewards.placement`` is the real one where a recipe has judges. ``rewards.serve`` answers /health on the ports of the
servers that its arguments name, until SIGTERM. ``STAND_IN_EXIT`` ("recipes.train=7") makes a module fail, a server
when ranks run. ``STAND_IN_STARTS`` ("hangs,0") is what the ranks do in each of the job's starts: wait ("hangs"); wait,
while rank 0 saves and fails with code 7 ("saves"); fail when there is a file ``lost-JOB`` ("notices"); write what a run
writes ("runs", see ``run``); end with a code.
``recipes.launch.has_new_checkpoint`` looks for the file ``checkpoint-JOB``, which is what they save.
``recipes.node_check`` calls the node STAND_IN_BAD_NODE bad.
"""

import json
import os
import shutil
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
    servers = [name for name in PORTS if f"++rewards.servers.{name}.host=0.0.0.0" in arguments]
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    for name in servers:
        listener = socket.create_server(("0.0.0.0", PORTS[name]))
        threading.Thread(target=answer, args=[listener], daemon=True).start()
    while not ended.wait(0.1) and not (FAILING == "rewards.serve" and training()):
        pass
    record(module="stopped", host=socket.gethostname(), servers=servers)


def run(arguments: list[str], resumes: bool) -> int:
    """What a run that is preempted after its first step, and resumed, leaves in its folder. The figures are made up."""
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
    settings = dict(argument.split("=", 1) for argument in arguments if argument[0] not in "-~")
    folder, last = Path(settings["run_dir"]), int(settings["algorithm.steps"])
    if os.environ["SLURM_PROCID"] != "0":
        if not resumes:
            signal.sigwait([signal.SIGUSR1])
        return 0

    def event(kind: str, **details: object) -> None:
        with (folder / "events.jsonl").open("a") as events:
            events.write(json.dumps({"time": time.time(), "kind": kind, **details}) + "\n")

    folder.mkdir(exist_ok=True)
    machine = {"device": "8 x NVIDIA H100 80GB HBM3", "processes": int(os.environ["SLURM_NTASKS"])}
    (folder / "environment.json").write_text(json.dumps({"machine": machine, "versions": {}}))
    event("resume" if resumes else "start")
    steps = range(2, last + 1) if resumes else [1]
    with (folder / "metrics.jsonl").open("a") as metrics:
        for step in steps:
            row = {"step": step, "kl/reference": 0.1 * (step > 1), "train_inference_mismatch/mean": 0.01}
            metrics.write(json.dumps(row | {"grad_norm": 1.0, "sync/bytes": 10, "time/train": 2.0}) + "\n")
    if not resumes:
        signal.sigwait([signal.SIGUSR1])
    event("checkpoint", step=steps[-1])
    if not resumes:
        event("stop")
        return 75
    shutil.copytree(settings["model.path"], folder / "hf")
    event("finish")
    return 0


def train(does: str, arguments: list[str]) -> int:
    """The exit code."""
    if does == "runs":
        return run(arguments, "resume=true" in arguments)
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
    if module == "recipes.node_check.links" and os.environ["SLURM_PROCID"] == "0":
        print("GB/s within a node: at least 391; between nodes: node1-node2 46.1")
    if module == "recipes.launch.has_new_checkpoint":
        saved = Path(f"checkpoint-{JOB}")
        sys.exit(not (saved.exists() and saved.stat().st_mtime > Path(arguments[0]).stat().st_mtime))
    if module == "recipes.train" and FAILING == "rewards.serve":
        time.sleep(600)
    if module == FAILING:
        sys.exit(int(CODE))
    does = starts[min(start, len(starts) - 1)]
    sys.exit(train(does, arguments) if module == "recipes.train" else 0)


if __name__ == "__main__":
    main()
