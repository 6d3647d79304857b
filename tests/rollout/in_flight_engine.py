"""``python -m tests.rollout.in_flight_engine FOLDER``: vLLM on a CPU that gets other weights in the middle of a batch.

Trainer rank and engine are this one process. The settings of each of :data:`VARIANTS` are in ``FOLDER/settings.json``;
the results go to ``FOLDER/NAME.json``.
"""

import gc
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from rollout import engine_server
from rollout.engine import EngineSettings
from rollout.engine_server import Refused
from rollout.frames import ERROR
from rollout.sampler import make_requests
from rollout.sampling import Sampling
from tests.responses import make_prompt, plain
from tests.rollout import speculating, vllm_processes
from tests.rollout.sleeping_engine import schedule, weight_sync_within
from tests.rollout.twins import UNTIED, Twin, tensor_parallel_shards

THINK, ANSWER = (5,), (6, 7)
VARIANTS = {
    "synchronous": Sampling(max_tokens=24, stop_token_ids=(2,), thinking_budget=14),
    "asynchronous": Sampling(max_tokens=24, stop_token_ids=(2,)),
    # What is sampled coolly repeats tokens, after which something is drafted.
    "speculative": Sampling(max_tokens=24, stop_token_ids=(2,), temperature=0.5),
}
BLOCK = 128  # tokens of a block of vLLM's KV cache on a CPU: only whole ones are shared
LONG = BLOCK + 12
# Eight of the twelve requests run at once: one of the long prompt's and all of the last one begin after the update.
LENGTHS = (4, 11, LONG, 7)
PROMPTS = [
    make_prompt(f"p{i}", [8 + (7 * i + j) % 60 for j in range(length - 1)] + list(THINK))
    for i, length in enumerate(LENGTHS)
]
SAMPLES = 3
AT_ONCE = 8
STEPS_BEFORE = 9
OLD, NEW = 10, 11  # versions; the weights are those of the seeds 0 and 1


def twin(name: str) -> Twin:
    return speculating.TWIN if name == "speculative" else UNTIED


def model(name: str, version: int) -> Any:
    """transformers' model with the weights of this version."""
    hf_model = twin(name).model(version - OLD)
    return speculating.repeating(hf_model) if name == "speculative" else hf_model


class Engine:
    """vLLM, and a trainer that has the weights of two versions."""

    def __init__(self, name: str, settings: EngineSettings, folder: Path) -> None:
        self.name = name
        self.sampling = VARIANTS[name]
        schedule(name == "asynchronous")
        self.loop = engine_server.EngineLoop(settings, engine_server.build_llm_engine(settings))
        queue = self.loop.llm.engine_core.engine_core.batch_queue
        assert (queue is not None) == (name == "asynchronous")
        self.maker = tensor_parallel_shards(twin(name), model(name, OLD).state_dict(), 1, 0, torch.float32)
        self.weight_sync = weight_sync_within(self.loop, self.maker.shards, folder)

    def sync(self, version: int) -> None:
        self.maker.weights = model(self.name, version).state_dict()
        self.maker.fill()
        self.weight_sync.sync(version)

    def responses(self, interrupt: Callable[[], object] | None = None) -> dict[str, Any]:
        """All responses by the old weights, and how many tokens of prompts came from the prefix cache. ``interrupt`` is
        called before a step in the middle."""
        self.sync(OLD)
        requests = make_requests(PROMPTS, SAMPLES, seed=5, step=0)
        cached = self.loop.cached_prompt_tokens

        def before_step(step: int) -> None:
            if step == STEPS_BEFORE and interrupt is not None:
                interrupt()

        batch = vllm_processes.generate(self.loop, requests, self.sampling, before_step)
        responses = [asdict(response) for response in plain(batch)]
        return {"responses": responses, "cached": self.loop.cached_prompt_tokens - cached}

    def fail(self) -> dict[str, Any]:
        """A sync in the middle that corrupts a weight: what became of it, of the requests, and of the next batch."""
        self.sync(OLD)
        requests = make_requests(PROMPTS, SAMPLES, seed=5, step=0)
        messages: list[bytes] = []
        self.loop.add_batch(requests, self.sampling, None, messages.append)
        for _ in range(STEPS_BEFORE):
            self.loop._step()
        checksums = self.weight_sync._checksums

        def checksums_then_corrupt() -> Any:
            of_good_weights = checksums()
            self.maker.shards[0].tensor[0] += 1
            return of_good_weights

        self.weight_sync._checksums = checksums_then_corrupt  # type: ignore[method-assign]
        outcome: dict[str, Any] = {}
        try:
            self.weight_sync.sync(NEW)
        except RuntimeError as error:  # of the engine, which is called directly
            outcome["sync"] = str(error)
        self.weight_sync._checksums = checksums  # type: ignore[method-assign]
        outcome["errors"] = [message.decode(errors="replace") for message in messages if message.startswith(ERROR)]
        outcome["finished"] = len(messages) - len(outcome["errors"])
        outcome["running"] = self.loop.llm.has_unfinished_requests() or self.loop.health()["unfinished_requests"]
        try:
            self.loop.add_batch(requests, self.sampling, None, messages.append)
        except Refused as refused:
            outcome["next"] = str(refused)
        return outcome


def run(engine: Engine) -> dict[str, Any]:
    counts = speculating.count_drafts(engine.loop)
    results: dict[str, Any] = {"undisturbed": engine.responses()}
    results["updated"] = engine.responses(lambda: engine.sync(NEW))
    results["digests"] = engine.loop.weights.digest()["workers"]
    engine.sync(NEW)
    results["digests of new"] = engine.loop.weights.digest()["workers"]
    results["failed"] = engine.fail()
    results["again"] = engine.responses()
    return {**results, "drafted": counts["drafted"]}


def main(argument: str) -> None:
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    os.environ[engine_server.ENGINE_PID] = str(os.getpid())
    folder = Path(argument)
    for name, settings in json.loads((folder / "settings.json").read_text()).items():
        engine = Engine(name, EngineSettings.from_json(settings), folder / "plans")
        (folder / f"{name}.json").write_text(json.dumps(run(engine)))
        engine.loop.llm.engine_core.shutdown()
        del engine
        gc.collect()
        cleanup_dist_env_and_memory()


if __name__ == "__main__":
    main(*sys.argv[1:])
