"""``python -m tests.rollout.speculating SETTINGS FOLDER``: vLLM on a CPU with speculative decoding and without.

Both load the same weights. ``FOLDER/found.json`` has what they said, by :data:`SAMPLINGS`, and how many draft tokens
were made and accepted.
"""

import gc
import json
import os
import sys
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from rollout import engine_server, vllm_platform
from rollout.engine import EngineSettings
from rollout.sampler import make_requests
from rollout.sampling import Sampling
from tests.responses import make_prompt, plain
from tests.rollout import vllm_processes
from tests.rollout.twins import Twin

TWIN = Twin(heads=4, kv_heads=2, vocab=70, tied=False, bias=True, dtype=torch.float32)
# Of the layers' outputs: small enough for a token to follow from the one before it, so that texts repeat themselves.
LAYERS_SHARE = 2.0**-8
PROMPTS = [make_prompt(f"p{i}", ([5 + i, 20 + 3 * i, 50 + i] * 9)[: 5 + 2 * i]) for i in range(8)]
SAMPLES = 4
SAMPLINGS = {
    "greedy": Sampling(max_tokens=40, stop_token_ids=(2,), temperature=0.0),
    "sampled": Sampling(max_tokens=40, stop_token_ids=(2,)),
    "cool": Sampling(max_tokens=40, stop_token_ids=(2,), temperature=0.5),
    "nucleus": Sampling(max_tokens=40, stop_token_ids=(2,), temperature=0.7, top_p=0.8),
}


def repeating(model: torch.nn.Module) -> Any:
    """The model with layers that say little."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                parameter.mul_(LAYERS_SHARE)
    return model


def count_drafts(loop: engine_server.EngineLoop) -> Counter[str]:
    """From now on the draft tokens of this process's engine are counted, if it drafts any: "drafted", "accepted".

    Its own object is changed: an import of the class before vLLM's, which brings numba, ends vLLM's search for its
    kernels in all modules.
    """
    counts: Counter[str] = Counter()
    drafter = getattr(loop.llm.model_executor.driver_worker.worker.model_runner, "drafter", None)
    if drafter is not None:
        propose = drafter.propose

        def counted(most: int, sampled: list[list[int]], *arguments: Any, **options: Any) -> list[list[int]]:
            """``sampled``: the tokens of each sequence's step, all but one of them accepted drafts."""
            drafts = propose(most, sampled, *arguments, **options)
            counts["drafted"] += sum(map(len, drafts))
            counts["accepted"] += sum(len(tokens) - 1 for tokens in sampled if tokens)
            return drafts

        drafter.propose = counted
    return counts


def said_by(settings: EngineSettings) -> dict[str, Any]:
    """By sampling: the responses and the draft tokens. "again" is "sampled" once more."""
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    loop = engine_server.EngineLoop(settings, engine_server.build_llm_engine(settings))
    counts = count_drafts(loop)
    said = {}
    for name, sampling in {**SAMPLINGS, "again": SAMPLINGS["sampled"]}.items():
        requests = make_requests(PROMPTS, SAMPLES, seed=5, step=0)
        counts.clear()
        responses = plain(vllm_processes.generate(loop, requests, sampling))
        said[name] = {
            "responses": [asdict(response) for response in responses],
            "drafted": counts["drafted"],
            "accepted": counts["accepted"],
        }
    loop.llm.engine_core.shutdown()
    del loop
    gc.collect()
    cleanup_dist_env_and_memory()
    return said


def expanded_by_vllm() -> list[float]:
    """What vLLM itself makes on a CPU of two temperatures for two and one draft tokens, in memory that holds -1."""
    from vllm.utils import cpu_triton_utils

    temperatures = torch.full((3,), -1.0)
    cpu_triton_utils._expand_kernel_impl(temperatures, torch.tensor([0.5, 0.25]), torch.tensor([2, 3]), 0, 1)
    return temperatures.tolist()


def main(argument: str, folder: str) -> None:
    os.environ[engine_server.ENGINE_PID] = str(os.getpid())
    speculative = replace(EngineSettings.from_json(argument), loads_weights=True)
    without = replace(speculative.rollout, speculative=replace(speculative.rollout.speculative, method=None))
    results = {
        "plain": said_by(replace(speculative, rollout=without)),
        "speculative": said_by(speculative),
        "expanded by vLLM": expanded_by_vllm(),
        "expanded": vllm_platform.expand_by_sequence(
            torch.tensor([0.5, 0.0, 0.25]), torch.tensor([2, 3, 3]), 3, replace_to=1
        ).tolist(),
    }
    Path(folder, "found.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
