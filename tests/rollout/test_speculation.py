"""Speculative decoding in vLLM: greedily the same tokens, otherwise samples of the model's distribution.

Sleep, sync and broken batches with drafts: ``test_undefined_memory``.
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from rollout.sampling import Sampling
from tests import warm
from tests.responses import PlainResponse
from tests.rollout.speculating import PROMPTS, SAMPLES, SAMPLINGS, TWIN, repeating
from tests.rollout.vllm_processes import as_argument
from tests.settings import engine_settings

ROOT = Path(__file__).resolve().parents[2]
NGRAMS = {"method": "ngram", "draft_tokens": 3, "lookup_min": 1, "lookup_max": 3}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("speculating")
    repeating(TWIN.model(0)).save_pretrained(folder / "model")
    settings = engine_settings(
        model=str(folder / "model"),
        dtype="float32",
        max_model_len=64,
        max_num_seqs=32,
        max_num_batched_tokens=128,
        kv_cache_gib=0.05,
        speculative=NGRAMS,
    )
    command = [sys.executable, "-m", "tests.rollout.speculating", as_argument(settings), str(folder)]
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "TORCH_COMPILE_DISABLE": "1"}
    environment |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1", "VLLM_NO_USAGE_STATS": "1"}
    with warm.processes():
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return json.loads((folder / "found.json").read_text())


def responses(results: dict[str, Any], engine: str, sampling: str) -> list[PlainResponse]:
    return [PlainResponse(**response) for response in results[engine][sampling]["responses"]]


def test_greedy_tokens_are_those_of_an_engine_without_drafts(results: dict[str, Any]) -> None:
    plain, speculative = (responses(results, engine, "greedy") for engine in ("plain", "speculative"))
    assert len(plain) == len(PROMPTS) * SAMPLES
    assert [r.tokens for r in speculative] == [r.tokens for r in plain]
    for ours, theirs in zip(plain, speculative, strict=True):
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=2e-4)
    for name, said in results["speculative"].items():
        assert said["accepted"] > 20, name
        assert results["plain"][name]["drafted"] == 0


def test_the_same_requests_give_the_same_bits(results: dict[str, Any]) -> None:
    assert results["speculative"]["again"]["responses"] == results["speculative"]["sampled"]["responses"]
    assert results["speculative"]["sampled"]["responses"] != results["plain"]["sampled"]["responses"]


def distributions(response: PlainResponse, sampling: Sampling, model: torch.nn.Module) -> torch.Tensor:
    """Log-probs of all tokens at each place of the response, as the sampling makes them: FP64 [tokens, vocabulary]."""
    with torch.no_grad():
        logits = model(torch.tensor([response.prompt + response.tokens])).logits[0].double()
    logprobs = (logits[len(response.prompt) - 1 : -1] / sampling.temperature).log_softmax(-1)
    ordered, order = logprobs.sort(descending=True)
    mass_before = ordered.exp().cumsum(-1) - ordered.exp()
    outside = torch.zeros_like(logprobs).scatter(-1, order, (mass_before >= sampling.top_p).double()).bool()
    return logprobs.masked_fill(outside, -math.inf).log_softmax(-1)


@pytest.mark.parametrize("name", [name for name, sampling in SAMPLINGS.items() if sampling.temperature])
@pytest.mark.parametrize("engine", ["speculative", "plain"])
def test_samples_are_drawn_from_the_models_distribution(engine: str, name: str, results: dict[str, Any]) -> None:
    """The log-prob of each token is the model's. On average a token's log-prob is the negative entropy at its place,
    whatever came before: what is drawn in another way, such as a draft that is accepted too often, misses that. The
    variance of the sum over all places is known; more than four standard deviations are a chance of 6 in 100,000."""
    model = repeating(TWIN.model(0))
    excess, variance, tokens = 0.0, 0.0, 0
    for response in responses(results, engine, name):
        logprobs = distributions(response, SAMPLINGS[name], model)
        chosen = logprobs.gather(-1, torch.tensor(response.tokens)[:, None])[:, 0]
        assert (chosen - torch.tensor(response.logprobs)).abs().max() < 2e-4 / SAMPLINGS[name].temperature
        probabilities = logprobs.exp()
        finite = logprobs.masked_fill(probabilities == 0, 0.0)
        expected = (probabilities * finite).sum(-1)
        excess += float((chosen - expected).sum())
        variance += float(((probabilities * finite**2).sum(-1) - expected**2).sum())
        tokens += len(response.tokens)
    assert tokens > 500
    assert abs(excess) < 4 * math.sqrt(variance)


def test_vllm_still_repeats_no_temperature_on_a_cpu(results: dict[str, Any]) -> None:
    """If this fails, vLLM does it itself: remove ``vllm_platform.mend_expansion``."""
    assert results["expanded by vLLM"] == [-1.0] * 3
    assert results["expanded"] == [0.5, 0.5, 1.0]
