"""The project's engine server that can also load what a peer exported: ``/weights/update`` with ``{"exported": …}``.

Both sides of the comparison are so the same vLLM process with the same parameters.
"""

import json
import time
from typing import Any

from rollout import engine_server
from rollout.weight_sync.receiver import WeightReceiver


class LoadingReceiver(WeightReceiver):
    def update(self, body: dict[str, Any]) -> dict[str, Any]:
        """A sync of the weight bridge, or a peer's load: seconds of the slowest worker, and of packing on a CPU."""
        if "exported" not in body:
            return super().update(body)
        self.stale = True
        answers = self._call("load_exported", json.dumps(body["exported"]))
        started = time.perf_counter()
        self._call("bridge_finish")
        return {
            "load_seconds": max(answer["seconds"] for answer in answers),
            "pack_seconds": time.perf_counter() - started,
        }


def main() -> None:
    engine_server.WeightReceiver = LoadingReceiver  # type: ignore[misc]
    engine_server.WORKER_EXTENSION = "benchmarks.peers.worker.LoadingWorker"
    engine_server.main()


if __name__ == "__mp_main__":  # in a worker that vLLM spawns
    engine_server.die_with_engine()
if __name__ == "__main__":
    main()
