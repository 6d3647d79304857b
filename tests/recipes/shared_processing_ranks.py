"""``python -m tests.recipes.shared_processing_ranks FOLDER``: four ranks process prompts and share their pixels out."""

import multiprocessing
import sys
from collections import Counter
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_ext import batch as batches
from megatron_ext import images
from megatron_ext.batch import Prompt, TokenBatch
from recipes.data.processor import PromptProcessor
from recipes.data.rows import load_rows
from recipes.data.shared_processing import process
from recipes.training import held_out
from tests.recipes.test_processor import LIMITS

RANKS = 4
TENSOR = 2  # ranks that put the parts of an image together
MODELS = ("qwen2_5_vl", "internvl")


def wants(prompt: int, rank: int) -> bool:
    """Two replicas that train on every second and every third prompt."""
    return prompt % (2 + rank // TENSOR) == 0


def rank_main(folder: Path, rank: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS, timeout=timedelta(seconds=300)
    )
    group = dist.group.WORLD
    assert group is not None
    torch.save({name: answer(folder, name, rank, group) for name in MODELS}, folder / f"rank_{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def answer(folder: Path, name: str, rank: int, group: dist.ProcessGroup) -> dict[str, Any]:
    """``prompts`` as this rank has them; ``alone``: as it makes them by itself; ``seen``: how often it processed the
    media of each row; ``held_out``: prompts that the engines are asked, where the rows are the held-out ones, and what
    this rank processed for that; ``kept``: whether it has pixels that nobody needs; ``received``: bytes of pixels;
    ``error``: of a row whose file is damaged."""
    processor = PromptProcessor(str(folder / name), 1000, LIMITS)
    rows = list(load_rows(str(folder / f"{name}.jsonl")))
    seen: Counter[str] = Counter()
    with_media = processor._with_media
    processor._with_media = lambda row, loaded: seen.update([row["id"]]) or with_media(row, loaded)  # type: ignore[method-assign]
    prompts = process(processor, rows, torch.bfloat16, group)
    counted = dict(seen)
    seen.clear()
    without_pixels = process(processor, rows, torch.bfloat16, group, keep_pixels=False)
    seen.clear()
    asked = held_out_prompts(folder / f"{name}.jsonl", processor, group)
    counted_held_out = dict(seen)
    inputs = [prompt.vision for prompt in prompts if prompt.vision is not None]
    wanted = np.array([wants(i, rank) for i in range(len(inputs))])
    received = []
    irecv = dist.irecv

    def counting(block: torch.Tensor, **arguments: Any) -> Any:
        received.append(block.nbytes)
        return irecv(block, **arguments)

    dist.irecv = counting
    model: Any = SimpleNamespace(parallel=SimpleNamespace(tensor=TENSOR, tensor_rank=rank % TENSOR))
    images.exchange(inputs, wanted, model, group)
    dist.irecv = irecv
    error = ""
    try:
        process(processor, [rows[0], {**rows[1], "images": [str(folder / "damaged.png")]}], torch.bfloat16, group)
    except Exception as failure:
        error = f"{type(failure).__name__}: {failure}"
    return {
        "prompts": [vars(each.prompt) | {"vision": each.vision and vars(each.vision)} for each in prompts],
        "alone": [vars(each.prompt) | {"vision": each.vision and vars(each.vision)} for each in map(processor, rows)],
        "seen": counted,
        "held_out": [vars(prompt) for prompt in asked],
        "held_out_seen": counted_held_out,
        "kept": [each.vision is not None and not each.vision.pixels.is_meta for each in without_pixels],
        "received": sum(received),
        "error": error,
    }


def held_out_prompts(file: Path, processor: PromptProcessor, group: dist.ProcessGroup) -> list[Prompt]:
    """What the engines are asked when the rows of a file are the held-out ones."""
    asked: list[Prompt] = []

    def generate(prompts: list[Prompt], *_: Any, **__: Any) -> TokenBatch:
        asked.extend(prompts)
        return batches.build([], [])

    config: Any = SimpleNamespace(
        data=SimpleNamespace(evaluation=str(file), evaluation_samples=0),
        precision=SimpleNamespace(dtype=torch.bfloat16),
        rollout=SimpleNamespace(temperature=1.0),
    )
    rollouts: Any = SimpleNamespace(control=group, tokenizer=None, generate=generate)
    held_out.held_out_answers(config, rollouts, processor)
    return asked


def main() -> None:
    folder = Path(sys.argv[1])
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=rank_main, args=(folder, rank)) for rank in range(RANKS)]
    for process_of_rank in processes:
        process_of_rank.start()
    for process_of_rank in processes:
        process_of_rank.join()
    assert not any(process_of_rank.exitcode for process_of_rank in processes)


if __name__ == "__main__":
    main()
