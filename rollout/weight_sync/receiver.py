"""The state of one engine's weights, kept by its main thread: their version, and whether they may be used."""

import json
from typing import Any

from rollout.weight_sync.layout import LayoutError, wrap


def total_checksums(workers: list[list[Any]]) -> dict[str, int]:
    """Return the checksum of each HF tensor.

    ``workers`` has, for each worker, ``[hf_name, hf_start, checksum]`` of the rectangles that it holds. A rectangle
    that several workers hold counts once. Raises LayoutError naming the tensor when such replicas differ.
    """
    rectangles: dict[tuple[str, tuple[int, ...]], int] = {}
    for worker in workers:
        for hf_name, hf_start, value in worker:
            if rectangles.setdefault((hf_name, tuple(hf_start)), value) != value:
                raise LayoutError(
                    f"{hf_name}: vLLM's workers hold different values of the part that starts at {hf_start}"
                )
    totals: dict[str, int] = {}
    for (hf_name, _), value in rectangles.items():
        totals[hf_name] = wrap(totals.get(hf_name, 0) + value)
    return totals


class WeightReceiver:
    """Runs the methods of the weight sync on all workers of an engine, and keeps the state of the engine's weights.

    ``version`` is that of the last successful sync, None before the first one. ``stale`` is true from the start of an
    update until the update is complete (and verified, if it is to be). The engine generates only while ``stale`` is
    false. All methods raise RuntimeError with the errors of the workers.

    Requests that are running during an update keep the KV cache that the old weights computed, as in PipelineRL
    (arXiv 2509.19128). They also keep the encoder outputs of their images.
    """

    def __init__(self, llm_engine: Any) -> None:
        self.llm = llm_engine
        self.version: int | None = None
        self.stale = False
        self._call("weight_sync_start")

    def layout(self, body: dict[str, Any]) -> dict[str, Any]:
        """Return the layouts and the places of the workers.

        ``{"tensors": {hf_name: shape}}`` → ``{"workers": [the parameter layouts of each worker], "places"}``.
        """
        answers = self._call("weight_sync_layout", json.dumps(body["tensors"]))
        return {
            "workers": [answer["parameters"] for answer in answers],
            "places": [answer["place"] for answer in answers],
        }

    def set_plan(self, body: dict[str, Any]) -> dict[str, Any]:
        """Send the workers their shares of a plan, see ``WeightSyncWorker.weight_sync_plan``."""
        self._call("weight_sync_plan", json.dumps(body))
        return {}

    def update(self, body: dict[str, Any]) -> dict[str, Any]:
        """Copy the trainer's present weights into the workers. The body is ``{"version", "sequence", "checksums"}``.

        ``checksums`` are those that the weights must have afterwards, or null for no verification. Returns
        ``{"copying_seconds", "packing_seconds"}`` of the slowest worker.
        """
        self.stale = True
        verify = body["checksums"] is not None
        expected = body["checksums"] or {}
        answers = self._call("weight_sync_update", json.dumps({"sequence": body["sequence"], "verify": verify}))
        actual = total_checksums([answer["checksums"] for answer in answers])
        wrong = sorted(name for name in expected.keys() | actual.keys() if expected.get(name) != actual.get(name))
        if wrong:
            raise RuntimeError(
                f"{wrong[0]}: vLLM's checksum {actual.get(wrong[0])} after the copy is not the trainer's "
                f"{expected.get(wrong[0])} ({len(wrong)} of {len(expected)} tensors differ)"
            )
        if self.llm.has_unfinished_requests():
            self._forget_prefixes()
        elif not self.llm.reset_prefix_cache():
            raise RuntimeError("vLLM did not reset its prefix cache after the weights changed")
        elif self.llm.model_config.is_multimodal_model:
            # Only for multimodal models, because it is an additional call on all workers.
            self.llm.reset_encoder_cache()
        self.arrived(body["version"])
        slowest = max(answers, key=lambda answer: answer["copying_seconds"] + answer["packing_seconds"])
        return {name: slowest[name] for name in ("copying_seconds", "packing_seconds")}

    def arrived(self, version: int) -> None:
        """Mark the weights as complete. From now on vLLM records this version with each token that it samples."""
        self.llm.set_weight_version(str(version))
        self.version = version
        self.stale = False

    def _forget_prefixes(self) -> None:
        """Evict all KV-cache blocks from the prefix cache, so that new requests reuse no block of the old weights.

        Running requests keep their blocks. Because of them, vLLM refuses to reset its prefix cache.
        """
        cache = self.llm.engine_core.engine_core.scheduler.kv_cache_manager
        cache.evict_blocks(set(range(cache.block_pool.num_gpu_blocks)))

    def zero_cache(self) -> None:
        """Zero the memory of the KV cache after a wake."""
        self._call("weight_sync_zero_cache")

    def checksum(self) -> dict[str, Any]:
        """Return ``{"tensors": {hf_name: checksum of the values that vLLM holds now}}``."""
        answers = self._call("weight_sync_checksums")
        return {"tensors": total_checksums([answer["checksums"] for answer in answers])}

    def digest(self) -> dict[str, Any]:
        """Return ``{"workers": [{parameter: SHA-256 of its bytes}]}``."""
        return {"workers": [answer["digests"] for answer in self._call("weight_sync_digests")]}

    def _call(self, method: str, *args: str) -> list[dict[str, Any]]:
        answers = [json.loads(answer) for answer in self.llm.collective_rpc(method, args=args)]
        errors = [f"worker {i}: {answer['error']}" for i, answer in enumerate(answers) if "error" in answer]
        if errors:
            raise RuntimeError("; ".join(errors))
        return answers
