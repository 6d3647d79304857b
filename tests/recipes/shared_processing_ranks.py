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

from megatron_ext import images
from recipes.data.processor import PromptProcessor
from recipes.data.rows import load_rows
from recipes.data.shared_processing import process
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
    media of each row; ``received``: bytes of pixels; ``error``: of a row whose file is damaged."""
    processor = PromptProcessor(str(folder / name), 1000, LIMITS)
    rows = list(load_rows(str(folder / f"{name}.jsonl")))
    seen: Counter[str] = Counter()
    with_media = processor._with_media
    processor._with_media = lambda row, loaded: seen.update([row["id"]]) or with_media(row, loaded)  # type: ignore[method-assign]
    prompts = process(processor, rows, torch.bfloat16, group)
    counted = dict(seen)
    inputs = [prompt.vision for prompt in prompts if prompt.vision is not None]
    wanted = np.array([wants(i, rank) for i in range(len(inputs))])
    received = []
    irecv = dist.irecv

    def counting(block: torch.Tensor, **arguments: Any) -> Any:
        received.append(block.nbytes)
        return irecv(block, **arguments)

    dist.irecv = counting
    model: Any = SimpleNamespace(
        parallel=SimpleNamespace(tensor=TENSOR, tensor_rank=rank % TENSOR),
        config=SimpleNamespace(params_dtype=torch.bfloat16),
    )
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
        "received": sum(received),
        "error": error,
    }


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
