"""The project's engine server whose ``/weights/update`` can also load what a peer exported (``{"exported": …}``), do
nothing on all workers (``{"nothing": true}``), and say whether later syncs pack (``{"packs": false}``).

Both sides of the comparison are so the same vLLM process with the same parameters.
"""

import json
from typing import Any

from rollout import engine_server
from rollout.weight_sync.receiver import WeightReceiver


class LoadingReceiver(WeightReceiver):
    def update(self, body: dict[str, Any]) -> dict[str, Any]:
        """A weight sync, or a peer's load: seconds of the slowest worker, and those of packing."""
        if "nothing" in body:
            self._call("nothing")
            return {}
        if "packs" in body:
            self._call("set_packs", json.dumps(body["packs"]))
            return {}
        if "exported" not in body:
            return super().update(body)
        self.stale = True
        answers = self._call("load_exported", json.dumps(body["exported"]))
        return {name: max(answer[name] for answer in answers) for name in ("load_seconds", "pack_seconds")}


def main() -> None:
    engine_server.WeightReceiver = LoadingReceiver  # type: ignore[misc]
    engine_server.WORKER_EXTENSION = "benchmarks.peers.worker.LoadingWorker"
    engine_server.main()


if __name__ == "__mp_main__":  # in a worker that vLLM spawns
    engine_server.die_with_engine()
if __name__ == "__main__":
    main()
