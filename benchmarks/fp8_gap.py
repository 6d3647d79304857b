"""How far vLLM's log-probs are from the trainer's when its weights are FP8, next to BF16.

``python -m benchmarks.fp8_gap`` writes ``benchmarks/results/fp8_gap.json`` and prints its table. Megatron on one rank
has SmolLM2's weights in BF16 and computes the log-probs of what each engine sampled. ``fp8_per_channel`` is vLLM's own
FP8, weights and activations, which its CPU build can run. The others are emulated and say what rounding the weights
alone does: weights that went through FP8 and back to BF16, in an engine without FP8.
"""

import itertools
import json
import os
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra import compose, initialize_config_dir
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

MODEL = Path("build/models/SmolLM2-135M-Instruct")
PROMPTS = Path("recipes/data/demo/eval.jsonl")
RESULT = Path("benchmarks/results/fp8_gap.json")
EVERY, SAMPLES, TOKENS, SEED = 8, 2, 48, 0  # every so many prompts
CAP = 2.0  # of the ratios, for the share that is clipped
FP8_MAX = 448.0
FUSED = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))  # as vLLM holds them


def through_fp8(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (weight / scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).float() * scale


def per_tensor(weight: torch.Tensor) -> torch.Tensor:
    return through_fp8(weight, weight.abs().max() / FP8_MAX)


def per_channel(weight: torch.Tensor) -> torch.Tensor:
    return through_fp8(weight, weight.abs().amax(1, keepdim=True) / FP8_MAX)


def per_block(weight: torch.Tensor) -> torch.Tensor:
    """Blocks of 128 x 128."""
    rows = [torch.cat([per_tensor(block) for block in band.split(128, 1)], 1) for band in weight.split(128)]
    return torch.cat(rows)


ROUNDINGS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "emulated_weights_per_tensor": per_tensor,
    "emulated_weights_per_channel": per_channel,
    "emulated_weights_per_block": per_block,
}


def rounded_model(rounding: Callable[[torch.Tensor], torch.Tensor], folder: Path) -> Path:
    """The model with its linear layers' weights rounded, those that vLLM fuses together."""
    network = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.bfloat16)
    for layer in network.model.layers:
        modules = dict(layer.self_attn.named_modules()) | dict(layer.mlp.named_modules())
        for names in FUSED:
            parts = [modules[name].weight.data for name in names]
            made = rounding(torch.cat(parts).float()).to(torch.bfloat16)
            for part, new in zip(parts, made.split([len(part) for part in parts]), strict=True):
                part.copy_(new)
    network.save_pretrained(folder)
    return folder


def main() -> None:

    from megatron_ext import forward_backward, hf_checkpoint, model, packing, parallel, platform
    from megatron_ext.batch import Prompt, TokenBatch
    from recipes.algorithms import mismatch
    from recipes.algorithms.sequences import Sequences
    from recipes.config import parse
    from recipes.run import records
    from rollout.engine import Engine, EngineSettings, stop_engines
    from rollout.sampler import generate
    from rollout.sampling import Sampling
    from rollout.weight_sync.sync import WeightSync

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    platform.activate("cpu")
    tokenizer = AutoTokenizer.from_pretrained(MODEL)

    def make_prompt(prompt_id: str, text: str) -> Prompt:
        message = [{"role": "user", "content": text}]
        token_ids = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False)
        return Prompt(prompt_id, np.array(token_ids, np.int32))

    started = time.monotonic()
    rows = [json.loads(line) for line in PROMPTS.read_text().splitlines()[::EVERY]]
    prompts = [make_prompt(row["id"], row["prompt"]) for row in rows]
    with initialize_config_dir(str(Path("conf").resolve()), version_base="1.3"):
        demo = parse(compose("config", ["recipe=demo"]))
    rollout = replace(
        demo.rollout,
        max_num_seqs=64,
        max_num_batched_tokens=2048,
        kv_cache_gib=0.5,
        threads=len(os.sched_getaffinity(0)),
    )
    plain = EngineSettings(rollout, str(MODEL), dtype="bfloat16", max_model_len=256, platform="cpu")
    quantised = replace(plain, rollout=replace(rollout, quantization="fp8_per_channel"))
    with tempfile.TemporaryDirectory() as scratch:
        home = Path(scratch)
        engines = [
            Engine(plain, home / "bf16.log"),
            Engine(quantised, home / "fp8.log"),
        ]
        try:
            place = parallel.initialize(replace(demo.parallel, tensor=1, sequence=False), SEED, 600)
            policy = model.build(hf_checkpoint.config(MODEL), place, replace(demo.precision, name="bf16"))
            for engine in engines:
                engine.wait_until_ready(time.monotonic() + 600)
            group = parallel.control_group()
            weight_syncs = [
                WeightSync(policy.shards, [engine], group, bucket_bytes=1 << 28, verify_every=1, plans=home)
                for engine in engines
            ]

            def measure(number: int, weights: Path) -> dict[str, float]:
                """Of responses by ``weights``, against the trainer with the model's own."""
                hf_checkpoint.load(policy.shards, weights)
                engine, weight_sync = engines[number], weight_syncs[number]
                weight_sync.sync(next(versions))
                sampling = Sampling(max_tokens=TOKENS, stop_token_ids=(tokenizer.eos_token_id,))
                batch = generate([engine], prompts, sampling, samples_per_prompt=SAMPLES, seed=SEED, step=0)
                hf_checkpoint.load(policy.shards, MODEL)
                return gaps(batch)

            def gaps(batch: TokenBatch) -> dict[str, float]:
                (planned,) = packing.plan(batch.lengths.tolist(), 1, 2048)
                micro_batches = [
                    packing.pack(batch, indices, multiple=policy.token_multiple, pad_token=0, device="cpu")
                    for indices in planned
                ]
                log_probs = forward_backward.log_probs(policy, micro_batches)
                totals: dict[str, float] = {}
                for micro_batch, values in zip(micro_batches, log_probs, strict=True):
                    sequences = Sequences(micro_batch.lengths, micro_batch.values["loss_mask"] > 0)
                    sums = mismatch.sums(values, micro_batch.values["logprobs"], sequences, tis_cap=CAP)
                    forward_backward.add_metrics(totals, {name: float(value) for name, value in sums.items()})
                report = mismatch.report(totals)
                keys = ("mean", "max", "k3", "clipped", "ess")
                return {"tokens": totals[f"{mismatch.NAME}/tokens"]} | {k: report[f"{mismatch.NAME}/{k}"] for k in keys}

            versions = itertools.count(1)
            results = {"bf16": measure(0, MODEL), "fp8_per_channel": measure(1, MODEL)}
            for name, rounding in ROUNDINGS.items():
                results[name] = measure(0, rounded_model(rounding, home / name))
        finally:
            stop_engines(engines)
            parallel.destroy()
    RESULT.parent.mkdir(exist_ok=True)
    records.write_json(
        RESULT,
        {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": "python -m benchmarks.fp8_gap",
            "seed": SEED,
            "samples": len(prompts) * SAMPLES,
            "response_tokens_at_most": TOKENS,
            "seconds": round(time.monotonic() - started, 1),
            **records.environment(platform.current().machine(), 1),
            "gap": results,
        },
    )
    Console().print(table(results), f"{RESULT} has all numbers", sep="\n")


def table(results: dict[str, dict[str, float]]) -> Table:
    made = Table("weights in vLLM", "tokens", "mean gap", "max gap", "k3", "ESS", title="trainer BF16 against rollout")
    for row in cells(results):
        made.add_row(*row)
    return made


def cells(results: dict[str, dict[str, float]]) -> Iterator[tuple[str, ...]]:
    for name, found in results.items():
        numbers: list[Any] = [found[key] for key in ("mean", "max", "k3", "ess")]
        yield name, f"{found['tokens']:.0f}", *(f"{number:.4f}" for number in numbers)


if __name__ == "__main__":
    main()
