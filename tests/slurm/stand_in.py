"""In the place of .venv/bin/python where a test is about the scripts: writes down how it was called and trains nothing.

``rewards.placement`` is the real one. ``rewards.serve`` answers /health on the ports of the servers that it was told to
serve, until SIGTERM. ``STAND_IN_EXIT`` ("recipes.train=7") makes a module fail, a server when ranks run.
"""

import http.server
import json
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path

PORTS = {"safety": 8100, "value": 8110, "knowledge": 8120}  # conf/rewards/safework.yaml


FAILING, _, CODE = os.environ.get("STAND_IN_EXIT", "").partition("=")


class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()


def record(**what: object) -> None:
    with open("calls.jsonl", "a") as calls:  # a short line is written at once
        calls.write(json.dumps(what) + "\n")


def training() -> bool:
    return '"recipes.train"' in Path("calls.jsonl").read_text()


def serve(arguments: list[str]) -> None:
    own = [name for name in PORTS if f"++rewards.servers.{name}.host=0.0.0.0" in arguments]
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    for name in own:
        server = http.server.ThreadingHTTPServer(("0.0.0.0", PORTS[name]), Health)
        threading.Thread(target=server.serve_forever, daemon=True).start()
    while not ended.wait(0.1) and not (FAILING == "rewards.serve" and training()):
        pass
    record(module="stopped", host=socket.gethostname(), servers=own)


def main() -> None:
    module, arguments = sys.argv[2], sys.argv[3:]
    if module == "rewards.placement":
        os.execv(os.environ["STAND_IN_PYTHON"], [os.environ["STAND_IN_PYTHON"], *sys.argv[1:]])
    names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "MASTER_ADDR", "OMP_NUM_THREADS")
    record(
        module=module,
        host=socket.gethostname(),
        arguments=arguments,
        token=len(os.environ.get("REWARDS_TOKEN", "")),
        **{name: os.environ.get(name) for name in names},
    )
    if module == "rewards.serve":
        serve(arguments)
    if module == "recipes.train" and FAILING == "rewards.serve":
        time.sleep(600)
    sys.exit(int(CODE) if module == FAILING else 0)


if __name__ == "__main__":
    main()
