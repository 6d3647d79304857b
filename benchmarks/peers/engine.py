"""The project's engine server with three more kinds of ``/weights/update``.

``{"exported": …}`` loads the tensors that a peer exported, ``{"nothing": true}`` calls all workers without effect, and
``{"packs": false}`` turns off packing in later syncs. Both sides of the comparison therefore use the same vLLM process
and parameters.
"""

import json
from typing import Any

from rollout import engine_server
from rollout.weight_sync.receiver import WeightReceiver


class LoadingReceiver(WeightReceiver):
    def update(self, body: dict[str, Any]) -> dict[str, Any]:
        """A weight sync, or one of the other updates. A peer's load returns the seconds of the slowest worker."""
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
