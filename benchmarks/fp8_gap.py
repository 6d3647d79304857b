"""Measures the log-prob difference between the BF16 trainer and vLLM with FP8 weights, an FP8 KV cache, and neither.

``python -m benchmarks.fp8_gap`` writes ``benchmarks/results/fp8_gap.json`` and prints its table. Megatron-Core on one
rank has SmolLM2's weights in BF16 and computes the log-probs of each engine's samples.

* ``fp8_per_channel`` is vLLM's own FP8 for weights and activations, which its CPU build supports.
* ``fp8_cache`` is vLLM's own FP8 KV cache. It is measured if the processor has AVX-512.
* The other weight formats are emulated by a BF16 engine whose weights were rounded to FP8 and back. They show the
  effect of rounding the weights only.
* The other caches are emulated too: transformers scores the BF16 engine's samples. ``emulated_cache`` rounds keys and
  values to the nearest FP8 number. ``emulated_cache_on_cpu`` rounds them toward zero, as vLLM's CPU kernel does.
  ``emulated_cache_and_queries`` rounds queries too, as vLLM does on an H100.
"""

import itertools
import json
import os
import socket
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from rich.console import Console
from rich.table import Table
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer

PROMPTS = Path("recipes/data/demo/test.jsonl")
RESULT = Path("benchmarks/results/fp8_gap.json")
PROMPT_STRIDE = 8  # every eighth prompt of the file
SAMPLES_PER_PROMPT = 2
MAX_RESPONSE_TOKENS = 48
SEED = 0
TIS_CAP = 2.0  # of the importance ratios, for the share that is clipped
FP8_MAX = 448.0  # of float8_e4m3fn
# vLLM fuses these linear layers into one, so their weights share their scales.
FUSED = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))


def through_fp8(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """``weight`` (FP32) rounded to FP8 with ``scale`` and back."""
    return (weight / scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).float() * scale


def nearest(values: torch.Tensor) -> torch.Tensor:
    """``values`` (FP32) rounded to the nearest FP8 number and back. Values above the largest become the largest."""
    return through_fp8(values, torch.ones(()))


def toward_zero(values: torch.Tensor) -> torch.Tensor:
    """``values`` (FP32) truncated to FP8 and back, as vLLM's CPU kernel does (``float_to_fp8e4m3_scalar``)."""
    rounded = values.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    is_too_large = rounded.float().abs() > values.abs()
    # FP8 numbers of one sign have the same order as their bytes.
    next_below = (rounded.view(torch.uint8) - 1).view(torch.float8_e4m3fn)
    return torch.where(is_too_large, next_below.float(), rounded.float())


def per_tensor(weight: torch.Tensor) -> torch.Tensor:
    return through_fp8(weight, weight.abs().max() / FP8_MAX)


def per_channel(weight: torch.Tensor) -> torch.Tensor:
    return through_fp8(weight, weight.abs().amax(1, keepdim=True) / FP8_MAX)


def per_block(weight: torch.Tensor) -> torch.Tensor:
    """One scale for each block of 128 x 128."""
    rounded_rows = []
    for rows in weight.split(128):
        blocks = [per_tensor(block) for block in rows.split(128, dim=1)]
        rounded_rows.append(torch.cat(blocks, dim=1))
    return torch.cat(rounded_rows)


ROUNDINGS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "emulated_weights_per_tensor": per_tensor,
    "emulated_weights_per_channel": per_channel,
    "emulated_weights_per_block": per_block,
}


# Attention implementations of transformers.
ROUNDED_CACHE = "rounded_cache"
TRUNCATED_CACHE = "truncated_cache"
ROUNDED_ATTENTION = "rounded_attention"


def attend_to_a_rounded_cache(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    *,
    scaling: float,
    rounding: Callable[[torch.Tensor], torch.Tensor] = nearest,
    rounds_queries: bool = False,
    **unused: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of a complete sequence to keys and values as vLLM's FP8 cache without scales holds them.

    ``query`` is [1, heads, tokens, head_dim], ``key`` and ``value`` are [1, groups, tokens, head_dim]; returns
    [1, tokens, heads, head_dim].
    """
    key = rounding(key.float()).to(key.dtype)
    value = rounding(value.float()).to(value.dtype)
    if rounds_queries:
        query = rounding(query.float()).to(query.dtype)
    output = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
    return output.transpose(1, 2).contiguous(), None


AttentionInterface.register(ROUNDED_CACHE, attend_to_a_rounded_cache)
AttentionInterface.register(TRUNCATED_CACHE, partial(attend_to_a_rounded_cache, rounding=toward_zero))
AttentionInterface.register(ROUNDED_ATTENTION, partial(attend_to_a_rounded_cache, rounds_queries=True))


def rounded_model(model_path: Path, rounding: Callable[[torch.Tensor], torch.Tensor], folder: Path) -> Path:
    """Write the model to ``folder``, with rounded weights in linear layers. Fused layers are rounded together."""
    network = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.bfloat16)
    for layer in network.model.layers:
        modules = dict(layer.self_attn.named_modules()) | dict(layer.mlp.named_modules())
        for names in FUSED:
            weights = [modules[name].weight.data for name in names]
            rounded = rounding(torch.cat(weights).float()).to(torch.bfloat16)
            rows = [len(weight) for weight in weights]
            for weight, rounded_weight in zip(weights, rounded.split(rows), strict=True):
                weight.copy_(rounded_weight)
    network.save_pretrained(folder)
    return folder


def main() -> None:
    from megatron_ext import platform

    platform.activate("cpu")

    from benchmarks import figures
    from megatron_ext import forward_backward, hf_checkpoint, model, packing, parallel
    from megatron_ext.batch import Prompt, TokenBatch
    from megatron_ext.packing import MicroBatch
    from recipes.algorithms import mismatch
    from recipes.algorithms.sequences import sequences_of
    from recipes.config import parse
    from recipes.launch.prepare_model import prepare
    from recipes.run import records
    from rollout import vllm_platform
    from rollout.engine import Engine, EngineSettings, stop_engines
    from rollout.sampler import generate
    from rollout.sampling import Sampling
    from rollout.weight_sync.sync import WeightSync

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    made_by = figures.source("benchmarks.fp8_gap", recipes=["demo"])
    with initialize_config_dir(str(Path("conf").resolve()), version_base="1.3"):
        demo = parse(compose("config", ["recipe=demo"]))
    prepare(demo.model)
    model_path = Path(demo.model.path)
    tokenizer = AutoTokenizer.from_pretrained(model_path)

    def make_prompt(prompt_id: str, text: str) -> Prompt:
        message = [{"role": "user", "content": text}]
        token_ids = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False)
        return Prompt(prompt_id, np.array(token_ids, np.int32))

    started = time.monotonic()
    with PROMPTS.open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in itertools.islice(file, 0, None, PROMPT_STRIDE)]
    prompts = [make_prompt(row["id"], row["prompt"]) for row in rows]
    rollout = replace(
        demo.rollout,
        max_num_seqs=64,
        max_num_batched_tokens=2048,
        kv_cache_gib=0.5,
        threads=len(os.sched_getaffinity(0)),
    )
    plain = EngineSettings(rollout, str(model_path), dtype="bfloat16", max_model_len=256, platform="cpu")
    changed: dict[str, dict[str, Any]] = {"bf16": {}, "fp8_per_channel": {"quantization": "fp8_per_channel"}}
    lacking = vllm_platform.CPU.lacks_for_fp8_cache()
    if not lacking:
        changed["fp8_cache"] = {"kv_cache_dtype": "fp8"}
    with tempfile.TemporaryDirectory() as scratch:
        home = Path(scratch)
        engines = [
            Engine(replace(plain, rollout=replace(rollout, **changes)), home / f"{name}.log")
            for name, changes in changed.items()
        ]
        try:
            layout = parallel.initialize(replace(demo.parallel, tensor=1, sequence=False), SEED, 600)
            policy = model.build(hf_checkpoint.config(model_path), layout, replace(demo.precision, name="bf16"))
            for engine in engines:
                engine.wait_until_ready(time.monotonic() + 600)
            group = parallel.control_group()
            weight_syncs = [
                WeightSync(policy.shards, [engine], group, bucket_bytes=1 << 28, verify_every=1, plans=home)
                for engine in engines
            ]

            def sample(number: int, weights: Path) -> TokenBatch:
                """Samples of engine ``number`` with ``weights``."""
                hf_checkpoint.load(policy.shards, weights)
                weight_syncs[number].sync(next(versions))
                sampling = Sampling(max_tokens=MAX_RESPONSE_TOKENS, stop_token_ids=(tokenizer.eos_token_id,))
                return generate(
                    [engines[number]], prompts, sampling, samples_per_prompt=SAMPLES_PER_PROMPT, seed=SEED, step=0
                )

            def by_the_trainer(batch: TokenBatch, micro_batches: list[MicroBatch]) -> list[torch.Tensor]:
                """Log-probs of the response tokens of each micro-batch."""
                hf_checkpoint.load(policy.shards, model_path)
                return forward_backward.log_probs(policy, micro_batches)

            def by_transformers(
                attention: str, batch: TokenBatch, micro_batches: list[MicroBatch]
            ) -> list[torch.Tensor]:
                """The same by transformers with another attention."""
                network = AutoModelForCausalLM.from_pretrained(
                    model_path, dtype=torch.bfloat16, attn_implementation=attention
                )
                return [torch.cat([scores(network, batch, i) for i in micro.indices]) for micro in micro_batches]

            def scores(network: torch.nn.Module, batch: TokenBatch, i: int) -> torch.Tensor:
                """Log-probs of the tokens of response ``i``."""
                response = batch.response_tokens[batch.tokens_of(i)]
                tokens = torch.tensor(np.concatenate([batch.prompt(i).token_ids, response]), dtype=torch.int64)
                with torch.no_grad():
                    predicted = network(tokens[None]).logits[0, -len(response) - 1 : -1].float().log_softmax(-1)
                return predicted.gather(-1, tokens[-len(response) :, None])[:, 0]

            def gaps(
                batch: TokenBatch,
                score: Callable[[TokenBatch, list[MicroBatch]], list[torch.Tensor]] = by_the_trainer,
            ) -> dict[str, float]:
                """The trainer's metrics of the mismatch, over all response tokens."""
                (plan_of_rank,) = packing.plan(batch.lengths.tolist(), 1, 2048)
                micro_batches = [
                    packing.pack(batch, indices, multiple=policy.token_multiple, pad_token=0)
                    for indices in plan_of_rank
                ]
                log_probs = score(batch, micro_batches)
                totals: dict[str, float] = {}
                for micro_batch, values in zip(micro_batches, log_probs, strict=True):
                    sequences = sequences_of(micro_batch, None)
                    sums = mismatch.sums(values, micro_batch.values["logprobs"], sequences, tis_cap=TIS_CAP)
                    forward_backward.add_metrics(totals, {name: float(value) for name, value in sums.items()})
                report = mismatch.report(totals)
                keys = ("mean", "max", "k3", "clipped", "ess")
                metrics = {key: report[f"{mismatch.NAME}/{key}"] for key in keys}
                return {"tokens": totals[f"{mismatch.NAME}/tokens"], **metrics}

            versions = itertools.count(1)
            samples = {name: sample(number, model_path) for number, name in enumerate(changed)}
            results = {name: gaps(batch) for name, batch in samples.items()}
            for name, attention in (
                ("emulated_cache", ROUNDED_CACHE),
                ("emulated_cache_on_cpu", TRUNCATED_CACHE),
                ("emulated_cache_and_queries", ROUNDED_ATTENTION),
            ):
                results[name] = gaps(samples["bf16"], partial(by_transformers, attention))
            for name, rounding in ROUNDINGS.items():
                results[name] = gaps(sample(0, rounded_model(model_path, rounding, home / name)))
        finally:
            stop_engines(engines)
            parallel.destroy()
    figures.write(
        RESULT,
        "python -m benchmarks.fp8_gap",
        made_by,
        {
            "seed": SEED,
            "samples": len(prompts) * SAMPLES_PER_PROMPT,
            "response_tokens_at_most": MAX_RESPONSE_TOKENS,
            "seconds": round(time.monotonic() - started, 1),
            **records.environment(platform.current().machine(), 1),
            "fp8_cache_lacks": lacking,
            "gap": results,
        },
    )
    Console().print(table(results), f"{RESULT} has all numbers", sep="\n")
    if lacking:
        print(f"fp8_cache was left out: vLLM's attention needs {', '.join(lacking)}, which this processor lacks")


def table(results: dict[str, dict[str, float]]) -> Table:
    gaps = Table("vLLM", "tokens", "mean gap", "max gap", "k3", "ESS", title="trainer BF16 against rollout")
    for name, gap in results.items():
        figures = [f"{gap[key]:.4f}" for key in ("mean", "max", "k3", "ess")]
        gaps.add_row(name, f"{gap['tokens']:.0f}", *figures)
    return gaps


if __name__ == "__main__":
    main()
