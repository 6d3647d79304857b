"""New weights in the middle of generating, with real vLLM on a CPU (``in_flight_engine``): which weights sampled which
token, and by which keys and values.

With the scheduling that is tested elsewhere and a bound on thinking, with the asynchronous one that vLLM has on GPUs,
and with drafts.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import warm
from tests.responses import PlainResponse
from tests.rollout.in_flight_engine import (
    ANSWER,
    AT_ONCE,
    BLOCK,
    LENGTHS,
    NEW,
    OLD,
    PROMPTS,
    SAMPLES,
    STEPS_BEFORE,
    THINK,
    VARIANTS,
    model,
)
from tests.rollout.vllm_processes import as_argument
from tests.settings import engine_settings

ROOT = Path(__file__).resolve().parents[2]
NGRAMS = {"method": "ngram", "draft_tokens": 3, "lookup_min": 1, "lookup_max": 3}
TOLERANCE = 1e-3  # nats, of FP32 log-probs by two implementations
every_variant = pytest.mark.parametrize("name", VARIANTS)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("in_flight")
    settings = {}
    for name in VARIANTS:
        model(name, OLD).save_pretrained(folder / name)
        settings[name] = as_argument(
            engine_settings(
                model=str(folder / name),
                dtype="float32",
                max_model_len=192,
                max_num_seqs=AT_ONCE,
                max_num_batched_tokens=512,
                kv_cache_gib=0.05,
                staleness=1,
                in_flight_updates=True,
                thinking=(THINK, ANSWER) if name == "synchronous" else None,
                speculative=NGRAMS if name == "speculative" else {},
            )
        )
    (folder / "settings.json").write_text(json.dumps(settings))
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "TORCH_COMPILE_DISABLE": "1"}
    environment |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1", "VLLM_NO_USAGE_STATS": "1"}
    command = [sys.executable, "-m", "tests.rollout.in_flight_engine", str(folder)]
    with warm.processes():
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return {name: json.loads((folder / f"{name}.json").read_text()) for name in VARIANTS}


def responses(results: dict[str, Any], name: str, when: str) -> list[PlainResponse]:
    return [PlainResponse(**response) for response in results[name][when]["responses"]]


def of_old_weights(response: PlainResponse) -> int:
    return response.versions.count(OLD)


@every_variant
def test_every_request_ends_with_tokens_of_the_old_weights_and_then_of_the_new(
    name: str, results: dict[str, Any]
) -> None:
    updated = responses(results, name, "updated")
    assert [r.key for r in updated] == [(prompt.prompt_id, i) for prompt in PROMPTS for i in range(SAMPLES)]
    for r in updated:
        old = of_old_weights(r)
        assert r.versions == [OLD] * old + [NEW] * (len(r.tokens) - old)
        assert r.finish_reason == ("stop" if r.tokens[-1] == 2 else "length") and len(r.tokens) <= 24
    begun = [of_old_weights(r) > 0 for r in updated]
    assert begun == sorted(begun, reverse=True) and AT_ONCE <= begun.count(True) < len(updated)
    if name == "speculative":
        assert results[name]["drafted"] > 20
    else:
        in_the_middle = [of_old_weights(r) for r in updated[:AT_ONCE] if len(r.tokens) > STEPS_BEFORE]
        assert begun.count(True) == AT_ONCE
        assert in_the_middle and set(in_the_middle) == {STEPS_BEFORE}, "a token a step, that under way included"


@every_variant
def test_tokens_before_the_update_are_those_of_an_undisturbed_batch_bit_for_bit(
    name: str, results: dict[str, Any]
) -> None:
    undisturbed = responses(results, name, "undisturbed")
    assert responses(results, name, "again") == undisturbed, "also after an update, and one that failed"
    for one, other in zip(undisturbed, responses(results, name, "updated"), strict=True):
        old = of_old_weights(other)
        assert (one.tokens[:old], one.logprobs[:old]) == (other.tokens[:old], other.logprobs[:old])
        assert one.versions == [OLD] * len(one.tokens)
        if len(other.tokens) > old:
            assert one.logprobs[old : old + 1] != other.logprobs[old : old + 1]


def reference(name: str, response: PlainResponse, old: int, keys_of: int) -> torch.Tensor:
    """Log-probs of the response's tokens by transformers: the first ``old`` by the old weights, the others by the new
    ones over the keys and values that the weights of version ``keys_of`` made of all tokens but the last of those."""
    prompt = len(response.prompt)
    ids = torch.tensor([response.prompt + response.tokens])
    temperature = VARIANTS[name].temperature
    logits = []
    with torch.no_grad():
        if old:
            first = ids[:, : prompt + old - 1]
            logits.append(model(name, OLD)(first).logits[:, prompt - 1 :])
        if 0 < old < len(response.tokens):
            cache = model(name, keys_of)(first, use_cache=True).past_key_values
            logits.append(model(name, NEW)(ids[:, prompt + old - 1 : -1], past_key_values=cache).logits)
        if old == 0:
            logits.append(model(name, NEW)(ids[:, :-1]).logits[:, prompt - 1 :])
    logprobs = (torch.cat(logits, dim=1)[0] / temperature).log_softmax(-1)
    return logprobs.gather(-1, ids[0, prompt:, None])[:, 0]


def gap(name: str, response: PlainResponse, keys_of: int) -> float:
    """The largest difference of a token that was sampled."""
    expected = reference(name, response, of_old_weights(response), keys_of)
    difference = (expected - torch.tensor(response.logprobs)).abs()
    difference[response.forced] = 0
    return float(difference.max())


@every_variant
def test_log_probs_are_of_the_new_weights_over_the_old_ones_keys_and_values(name: str, results: dict[str, Any]) -> None:
    """Also of requests that began after the update: nothing of their prompts is by the old weights."""
    updated = responses(results, name, "updated")
    assert max(gap(name, r, keys_of=OLD) for r in updated) < TOLERANCE
    if name != "speculative":  # whose layers hardly look at other tokens
        both = [r for r in updated if 0 < of_old_weights(r) < len(r.tokens)]
        assert both and min(gap(name, r, keys_of=NEW) for r in both) > 10 * TOLERANCE


@every_variant
def test_a_request_that_begins_after_the_update_shares_no_block_of_the_old_weights(
    name: str, results: dict[str, Any]
) -> None:
    assert LENGTHS[2] > BLOCK
    assert results[name]["undisturbed"]["cached"] == 2 * BLOCK, "two of the long prompt's three requests"
    long = responses(results, name, "updated")[2 * SAMPLES : 3 * SAMPLES]
    before = sum(of_old_weights(r) > 0 for r in long)
    sharing = [max(0, began - 1) for began in (before, SAMPLES - before)]
    assert results[name]["updated"]["cached"] == sum(sharing) * BLOCK
    if name != "speculative":
        assert sharing == [1, 0]


@every_variant
def test_the_weights_are_those_of_a_sync_between_batches(name: str, results: dict[str, Any]) -> None:
    assert results[name]["digests"] == results[name]["digests of new"]


@every_variant
def test_a_sync_that_fails_in_the_middle_ends_all_requests_in_an_error(name: str, results: dict[str, Any]) -> None:
    failed = results[name]["failed"]
    assert "vLLM's checksum" in failed["sync"]
    assert len(failed["errors"]) + failed["finished"] == len(PROMPTS) * SAMPLES
    assert failed["finished"] <= 1 and all("did not arrive whole" in error for error in failed["errors"])
    assert not failed["running"]
    assert failed["next"].startswith("the last sync failed")


def test_thinking_ends_at_its_budget_by_either_weights(results: dict[str, Any]) -> None:
    """Every prompt begins the thinking; the bound is reached after the update."""
    budget = VARIANTS["synchronous"].thinking_budget
    assert budget is not None and budget > STEPS_BEFORE
    complete = [r for r in responses(results, "synchronous", "updated") if len(r.tokens) >= budget + len(ANSWER)]
    bounded = [r for r in complete if tuple(r.tokens[budget : budget + len(ANSWER)]) == ANSWER]
    assert len(bounded) >= len(complete) - 1 > AT_ONCE // 2
    assert all(r.forced == [budget, budget + 1] for r in bounded if r.tokens.count(THINK[0]) == 0)
