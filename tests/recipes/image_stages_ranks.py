"""``python -m tests.recipes.image_stages_ranks FOLDER``: four ranks train SFT, a reward model and a value model on rows
with images, in several layouts: with prompts that they process between them, and with all prompts on every rank."""

import json
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from hydra import compose, initialize_config_dir

from megatron_ext import platform

platform.activate("cpu")

from megatron_ext import forward_backward, hf_checkpoint, parallel  # noqa: E402
from megatron_ext.batch import TokenBatch  # noqa: E402
from recipes.config import Config, parse  # noqa: E402
from recipes.data.processor import ProcessedPrompt, PromptProcessor  # noqa: E402
from recipes.data.rows import Row, media_files  # noqa: E402
from recipes.data.shared_processing import with_pixels_as  # noqa: E402
from recipes.launch.launcher import fork_ranks  # noqa: E402
from recipes.training import reward_model, setup, sft, value_model  # noqa: E402
from recipes.training.policy import Policy  # noqa: E402
from tests.recipes import tiny  # noqa: E402

RANKS = 4
STAGES: dict[str, ModuleType] = {"sft": sft, "reward_model": reward_model, "value_model": value_model}
LAYOUTS = {
    "dp4": (),
    "tp2-dp2": ("parallel.tensor=2", "parallel.sequence=true"),
    "cp2-dp2": ("parallel.context=2",),
    "pp2-dp2": ("parallel.pipeline=2",),
    "tp2-pp2": ("parallel.tensor=2", "parallel.sequence=true", "parallel.pipeline=2"),
}
CASES = (
    *(("sft", layout) for layout in LAYOUTS),
    *(("reward_model", layout) for layout in ("tp2-dp2", "pp2-dp2")),
    *(("value_model", layout) for layout in ("dp4", "cp2-dp2")),
)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    overrides = json.loads((folder / "overrides.json").read_text())
    answers: dict[str, Any] = {}
    for number, (stage, layout) in enumerate(CASES):
        with initialize_config_dir(str(tiny.ROOT / "conf"), version_base="1.3"):
            chosen = [*overrides["all"], *overrides[stage], *LAYOUTS[layout], f"stage={stage}"]
            config = parse(compose("config", overrides=chosen))
        dist.init_process_group(
            "gloo",
            store=dist.PrefixStore(str(number), store),
            rank=rank,
            world_size=RANKS,
            timeout=timedelta(seconds=600),
        )
        groups = parallel.initialize(config.parallel, config.seed, 600)
        answers[f"{stage} {layout}"] = {
            name: trained(config, groups, stage, name == "shared") for name in ("shared", "alone")
        }
        parallel.destroy()
    torch.save(answers, folder / f"rank_{rank}.pt")


def trained(config: Config, groups: parallel.Parallel, stage: str, shared: bool) -> dict[str, Any]:
    """``metrics`` and ``weights`` after the stage's steps; ``processed``: of each call, which rows with media were
    asked and which this rank processed; ``packed``: as :func:`watched_images` has it."""
    metrics: list[dict[str, Any]] = []
    # What surrounds the stage and has no part in a step.
    run: Any = SimpleNamespace(
        phase=lambda name: nullcontext(),
        log=print,
        event=print,
        count=lambda **counted: None,
        begin=lambda step: None,
        record=metrics.append,
        display=SimpleNamespace(progress=lambda *arguments: None),
        open_checkpoints=lambda: (SimpleNamespace(check=nothing, after_step=nothing, wait=nothing), None),
        folder=Path(config.run_dir),
        rank=int(os.environ["RANK"]),
        control=parallel.control_group(),
    )
    processor = PromptProcessor(config.model.path, config.data.max_prompt_tokens, config.data.images)
    model = setup.build_model(config, groups)
    hf_checkpoint.load(model.shards, config.model.path)
    policy = setup.make_policy(config, groups, model, processor, run)
    with watched_processing(STAGES[stage], processor, shared) as processed, watched_images(policy) as packed:
        STAGES[stage].fit(setup.Training(config, policy, None, run, processor), run)
    weights = [weight.clone() for weight in forward_backward.copy_weights(model)]
    return {"metrics": metrics, "weights": weights, "processed": processed, "packed": packed}


def nothing(*arguments: Any) -> None:
    """The run has no checkpoints."""


@contextmanager
def watched_processing(module: ModuleType, processor: PromptProcessor, shared: bool) -> Iterator[list[dict[str, Any]]]:
    """Of each call of a stage's ``process`` the ids of rows with media that it was ``asked`` for, and how often this
    rank has ``seen`` each. Without ``shared`` every rank makes all prompts."""
    calls: list[dict[str, Any]] = []
    seen: Counter[str] = Counter()
    process = module.process
    with_media = processor._with_media
    processor._with_media = lambda row, loaded: seen.update([row["id"]]) or with_media(row, loaded)  # type: ignore[method-assign]

    def alone(processor: PromptProcessor, rows: Sequence[Row], dtype: torch.dtype, _: Any) -> list[ProcessedPrompt]:
        prompts = [processor(row) for row in rows]
        return [prompt if prompt.vision is None else with_pixels_as(prompt, dtype, "cpu") for prompt in prompts]

    def watched(processor: PromptProcessor, rows: Sequence[Row], *others: Any) -> list[ProcessedPrompt]:
        seen.clear()
        prompts: list[ProcessedPrompt] = (process if shared else alone)(processor, rows, *others)
        calls.append({"asked": sorted({row["id"] for row in rows if media_files(row)}), "seen": dict(seen)})
        return prompts

    module.process = watched  # type: ignore[attr-defined]
    try:
        yield calls
    finally:
        module.process = process  # type: ignore[attr-defined]


@contextmanager
def watched_images(policy: Policy) -> Iterator[list[dict[str, Any]]]:
    """Of each batch that is packed, by distinct images: whether this rank trains on them (``wanted``) and whether it
    has them afterwards (``has``); the bytes of pixels that it ``received``, and those that it ``lacked``."""
    packed: list[dict[str, Any]] = []
    pack = policy.pack
    layout = policy.parallel

    def watched(batch: TokenBatch, plan: Sequence[Sequence[int]], *others: Any) -> Any:
        received: list[int] = []
        irecv = dist.irecv

        def counting(block: torch.Tensor, **arguments: Any) -> Any:
            received.append(block.nbytes)
            return irecv(block, **arguments)

        dist.irecv = counting
        try:
            micro_batches = pack(batch, plan, *others)
        finally:
            dist.irecv = irecv
        of_plan = {int(batch.prompt_index[i]) for indices in plan for i in indices}
        distinct = {id(vision): vision for vision in batch.vision or [] if vision is not None}
        wanted = {
            id(vision)
            for place, vision in enumerate(batch.vision or [])
            if vision is not None and place in of_plan and layout.pipeline_rank == 0
        }
        lacked = [v.pixels for key, v in distinct.items() if key in wanted and v.pixels.is_meta]
        packed.append(
            {
                "wanted": [key in wanted for key in distinct],
                "has": [v.part is not None or v.encoded is not None for v in distinct.values()],
                "received": sum(received),
                "lacked": sum(-(-len(p) // layout.tensor) * p[0].numel() * p.itemsize for p in lacked),
            }
        )
        return micro_batches

    policy.pack = watched  # type: ignore[method-assign]
    yield packed


if __name__ == "__main__":
    fork_ranks(RANKS)
    main(Path(sys.argv[1]))
