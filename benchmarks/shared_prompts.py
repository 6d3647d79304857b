"""Times log-probs and training with and without shared prompts (``parallel.shared_prompts``).

``python -m benchmarks.shared_prompts`` writes ``benchmarks/results/shared_prompts.json`` and prints its table. Both
sides of a ratio run the functions of an RL step on the same responses, in turns, on two tensor-parallel ranks as in the
demo:

* ``demo``: SmolLM2-135M with the demo's frozen embeddings. It has as many prompts of the demo's training data, and
  responses to each, as a step of the demo. Response lengths are uniform from 2 to 26 tokens, about the demo's.
* ``demo, eight responses``: the same with half of the prompts and twice the responses to each.
* ``vision``: a twin of Qwen2.5-VL with random weights. There are twelve prompts, each with an image of 224 x 224 pixels
  (64 tokens), a question of 20 tokens and eight responses of 2 to 26 tokens.
"""

import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from hydra import compose, initialize_config_dir
from rich.console import Console
from rich.table import Table

from benchmarks import figures
from recipes.config import parse
from recipes.launch.launcher import fork_ranks
from recipes.launch.prepare_model import prepare
from recipes.run import records

RESULT = Path("benchmarks/results/shared_prompts.json")
RANKS = 2
REPETITIONS = 3  # measured, after one warm-up of both sides
VISION_PROMPTS = 12
VISION_SAMPLES = 8
RESPONSE_TOKENS = (2, 26)
QUESTION_TOKENS = 20
GRID = (1, 16, 16)  # patches of an image: frames, rows, columns
SEED = 0
GOALS = {
    "demo": 1.8,
    "demo, eight responses": 1.8,
    "vision": 2.5,
}  # at least: seconds without / seconds with shared prompts


def main() -> None:
    made_by = figures.source("benchmarks.shared_prompts", recipes=["demo"])
    with initialize_config_dir(str(Path("conf").resolve()), version_base="1.3"):
        config = parse(compose("config", ["recipe=demo"]))
    prepare(config.model)

    from megatron_ext import platform

    platform.activate("cpu")
    import torch

    from megatron_ext import parallel

    if "RANK" not in os.environ:
        fork_ranks(RANKS)
    torch.set_num_threads(config.cluster.threads)
    layout = replace(config.parallel, shared_prompts=True, micro_batch_tokens=4096)
    groups = parallel.initialize(layout, SEED, config.cluster.timeout)
    rank = int(os.environ["RANK"])
    prompts, samples = config.algorithm.prompts_per_step, config.algorithm.samples_per_prompt
    frozen = config.model.frozen
    cases = {
        "demo": measure(*text_case(config, prompts, samples), groups, config, frozen),
        "demo, eight responses": measure(*text_case(config, prompts // 2, samples * 2), groups, config, frozen),
        "vision": measure(*vision_case(), groups, config, []),
    }
    parallel.destroy()
    if rank > 0:
        return
    result = {
        **records.environment(platform.current().machine(), RANKS),
        "goals": GOALS,
        "cases": cases,
    }
    figures.write(RESULT, "python -m benchmarks.shared_prompts", made_by, result)
    Console().print(table(cases), f"{RESULT} has the raw times", sep="\n")


def text_case(config: Any, count: int, samples: int) -> tuple[Any, Any]:
    """(transformers' configuration, batch) of the demo, with ``samples`` responses to each of ``count`` prompts."""
    from megatron_ext import hf_checkpoint
    from recipes.data.processor import PromptProcessor
    from recipes.data.rows import load_rows

    processor = PromptProcessor(config.model.path, config.data.max_prompt_tokens, config.data.images)
    rows = load_rows(config.data.prompts)
    chosen = np.random.default_rng(SEED).choice(len(rows), count, replace=False)
    prompts = [processor(rows[int(n)]).prompt for n in chosen]
    hf_config = hf_checkpoint.config(config.model.path)
    return hf_config, batch_of(prompts, samples, None, hf_config.vocab_size)


def vision_case() -> tuple[Any, Any]:
    """(transformers' configuration, batch) of the twin: a tower of 8 layers, a language model of 12."""
    import torch
    from transformers import Qwen2_5_VLConfig

    from megatron_ext.batch import Prompt
    from megatron_ext.models import qwen2_5_vl
    from megatron_ext.packing import VisionInputs

    hf_config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 32_000,
            "hidden_size": 512,
            "intermediate_size": 1408,
            "num_hidden_layers": 12,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 12, 12]},
        },
        vision_config={
            "depth": 8,
            "hidden_size": 256,
            "intermediate_size": 768,
            "num_heads": 8,
            "out_hidden_size": 512,
            "fullatt_block_indexes": [3, 7],
        },
        image_token_id=31_900,
        video_token_id=31_901,
        vision_start_token_id=31_902,
        vision_end_token_id=31_903,
        architectures=["Qwen2_5_VLForConditionalGeneration"],
    )
    vision = hf_config.vision_config
    random = np.random.default_rng(SEED)
    grid = torch.tensor([GRID])
    image_tokens = int(np.prod(GRID)) // vision.spatial_merge_size**2
    patch = 3 * vision.temporal_patch_size * vision.patch_size**2
    prompts = []
    images = []
    for n in range(VISION_PROMPTS):
        question = random.integers(0, 31_000, QUESTION_TOKENS).tolist()
        tokens = [31_902, *[hf_config.image_token_id] * image_tokens, 31_903, *question]
        prompts.append(Prompt(f"p{n}", np.array(tokens, np.int32)))
        positions = qwen2_5_vl.prompt_positions(hf_config, tokens, grid, [])
        places = list(range(1, 1 + image_tokens))
        pixels = torch.randn(int(grid.prod()), patch, generator=torch.Generator().manual_seed(n))
        images.append(VisionInputs(pixels, grid, places, positions))
    return hf_config, batch_of(prompts, VISION_SAMPLES, images, 31_000)


def batch_of(prompts: list[Any], samples: int, images: list[Any] | None, vocabulary: int) -> Any:
    """A batch with ``samples`` random responses to each prompt. The weights are those of a token-mean loss."""
    from megatron_ext import batch as batches

    random = np.random.default_rng(SEED)
    lengths = random.integers(RESPONSE_TOKENS[0], RESPONSE_TOKENS[1] + 1, len(prompts) * samples)
    responses = [random.integers(0, vocabulary, length) for length in lengths]
    batch = batches.build(
        prompts,
        responses,
        prompt_index=np.repeat(np.arange(len(prompts)), samples),
        vision=images,
    )
    return batch.with_columns(weights=np.full(int(lengths.sum()), 1 / lengths.sum()))


def measure(hf_config: Any, batch: Any, groups: Any, config: Any, frozen: list[str]) -> dict[str, Any]:
    """Collective. Times log-probs and training with and without shared prompts. Also returns both losses."""
    import torch
    import torch.distributed as dist

    from megatron_ext import forward_backward, model, packing
    from megatron_ext.offload import HostCopy
    from recipes.training.policy import Policy, UpdateGuard

    built = model.build(hf_config, groups, replace(config.precision, name="bf16"), frozen)
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for shard in built.shards:
            shard.tensor.normal_(0.0, 0.02, generator=generator)
    policies = {}
    for shared in (False, True):
        layout = replace(groups.config, shared_prompts=shared)
        policies[shared] = Policy(
            model=built,
            parallel=replace(groups, config=layout),
            source="",
            cost=packing.cost_of(hf_config, ()),
            pad_token=0,
            temperature=1.0,
            optimizer_config=config.optimizer,
            guard=UpdateGuard(1, print, lambda *args, **kwargs: None),
            states=HostCopy(built, weights=False),
        )

    def loss(log_probs: torch.Tensor, micro_batch: packing.MicroBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return -(log_probs * micro_batch.values["weights"]).sum(), {}

    seconds: dict[bool, list[dict[str, float]]] = {False: [], True: []}
    losses = {}
    tokens = {}
    for repetition in range(1 + REPETITIONS):
        order = (False, True) if repetition % 2 else (True, False)
        for shared in order:
            dist.barrier()
            started = time.perf_counter()
            micro_batches = policies[shared].micro_batches(batch)
            forward_backward.log_probs(built, micro_batches)
            after_log_probs = time.perf_counter()
            losses[shared] = forward_backward.accumulate_gradients(built, micro_batches, loss)["loss"]
            ended = time.perf_counter()
            tokens[shared] = sum(micro_batch.tokens.shape[1] for micro_batch in micro_batches)
            if repetition:
                of_repetition = {"logprobs": after_log_probs - started, "train": ended - after_log_probs}
                seconds[shared].append(of_repetition)
    totals = {shared: [sum(r.values()) for r in repetitions] for shared, repetitions in seconds.items()}
    ratios = sorted(plain / sharing for plain, sharing in zip(totals[False], totals[True], strict=True))
    return {
        "responses": len(batch),
        "tokens": {"without": tokens[False], "with": tokens[True]},
        "loss": {"without": losses[False], "with": losses[True]},
        "seconds": {"without": seconds[False], "with": seconds[True]},
        "ratio": {"median": ratios[len(ratios) // 2], "least": ratios[0], "greatest": ratios[-1]},
    }


def table(cases: dict[str, Any]) -> Table:
    shown = Table("case", "tokens", "with shared prompts", "seconds", "with", "ratio", "goal")
    for name, case in cases.items():
        medians = []
        for side in ("without", "with"):
            totals = sorted(sum(r.values()) for r in case["seconds"][side])
            medians.append(f"{totals[len(totals) // 2]:.2f}")
        ratio = case["ratio"]
        shown.add_row(
            name,
            str(case["tokens"]["without"]),
            str(case["tokens"]["with"]),
            *medians,
            f"{ratio['median']:.2f} [{ratio['least']:.2f}, {ratio['greatest']:.2f}]",
            f"{GOALS[name]}",
        )
    return shown


if __name__ == "__main__":
    main()
