"""A tiny random vision-language model, a batch of images, clips and text for it, and what ranks compute with them."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from megatron_ext import hf_checkpoint, model, packing, parallel, platform, steps
from megatron_ext.blocks import region
from megatron_ext.layout import Layout
from megatron_ext.models import qwen2_5_vl
from megatron_ext.packing import PackedSequence, VisionInputs
from megatron_ext.precision import Precision

TEXT_TOKENS = 120  # of the vocabulary; the special ones stand behind
SECONDS = 0.75  # between the frames of every clip's grid
# (frames, rows, columns) of patches of each prompt's images and clips. Windows are 4 patches wide: some images have
# whole ones, some have rests at the right, below, or both. Two sequences are text alone, one in a micro-batch of
# its own.
SIZES: tuple[tuple[tuple[int, int, int], ...], ...] = (
    ((1, 6, 4),),
    (),
    ((1, 4, 8), (1, 2, 2)),
    ((2, 4, 6),),
    ((1, 10, 6), (3, 4, 8)),
    (),
    ((1, 2, 10),),
    ((2, 2, 4), (1, 4, 4), (1, 6, 6)),
)
MICRO_BATCHES = ([0, 3, 6], [1], [4, 5], [2, 7])


def make_qwen2_5_vl(folder: Path, tied: bool = False) -> None:
    """4 tower layers, two of them with full attention, and 4 language layers with 4 query and 2 key-value heads."""
    torch.manual_seed(0)
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 132,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        vision_config={
            "depth": 4,
            "hidden_size": 48,
            "intermediate_size": 72,
            "num_heads": 4,
            "patch_size": 4,
            "window_size": 16,
            "out_hidden_size": 64,
            "fullatt_block_indexes": [1, 3],
            "tokens_per_second": 2,
        },
        image_token_id=124,
        video_token_id=125,
        vision_start_token_id=126,
        vision_end_token_id=127,
        tie_word_embeddings=tied,
    )
    model = Qwen2_5_VLForConditionalGeneration(config).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "ln_q" in name:
                parameter.normal_(1.0, 0.2)
            else:
                parameter.normal_(0.0, 0.1)
    model.save_pretrained(folder)


def batch(hf_config: Any) -> list[PackedSequence]:
    """As many sequences as ``SIZES``, of 7 to 60 tokens, with the values of ``cases.batch``."""
    generator = torch.Generator().manual_seed(0)

    def text(low: int) -> list[int]:
        count = int(torch.randint(low, 7, (), generator=generator))
        return torch.randint(0, TEXT_TOKENS, (count,), generator=generator).tolist()

    made = []
    for sizes in SIZES:
        prompt = text(low=0 if sizes else 3)
        for size in sizes:
            prompt += placeholders(hf_config, size) + text(low=1)
        response = text(low=2)
        values = {"weight": [1 / (len(SIZES) * len(response))] * len(response), "place": list(range(len(response)))}
        vision = None
        if sizes:
            grid = torch.tensor(sizes)
            patch = 3 * hf_config.vision_config.temporal_patch_size * hf_config.vision_config.patch_size**2
            kinds = (hf_config.image_token_id, hf_config.video_token_id)
            vision = VisionInputs(
                pixels=torch.randn(int(grid.prod(1).sum()), patch, generator=generator),
                grid=grid,
                placeholders=[place for place, token in enumerate(prompt) if token in kinds],
                positions=qwen2_5_vl.prompt_positions(
                    hf_config, prompt, grid, [SECONDS for frames, _, _ in sizes if frames > 1]
                ),
            )
        made.append(PackedSequence(prompt, response, values, vision))
    return made


def placeholders(hf_config: Any, size: tuple[int, int, int]) -> list[int]:
    """Tokens of an image (one frame) or a clip (several), between the start and end marks."""
    frames, rows, columns = size
    token = hf_config.image_token_id if frames == 1 else hf_config.video_token_id
    count = frames * rows * columns // hf_config.vision_config.spatial_merge_size**2
    return [hf_config.vision_start_token_id, *[token] * count, hf_config.vision_end_token_id]


def hugging_face_inputs(hf_config: Any, sequence: PackedSequence) -> dict[str, Any]:
    """What transformers' model takes for a sequence: it finds positions and places itself, images and clips apart."""
    tokens = torch.tensor([sequence.prompt + sequence.response])
    is_image, is_clip = tokens == hf_config.image_token_id, tokens == hf_config.video_token_id
    inputs: dict[str, Any] = {"input_ids": tokens, "mm_token_type_ids": is_image.int() + 2 * is_clip.int()}
    if sequence.vision is None:
        return inputs
    grid = sequence.vision.grid
    pixels = sequence.vision.pixels.split(grid.prod(1).tolist())
    for kind, name in ((grid[:, 0] == 1, "image"), (grid[:, 0] > 1, "video")):
        if kind.any():
            chosen = torch.cat([p for p, taken in zip(pixels, kind.tolist(), strict=True) if taken])
            inputs["pixel_values" if name == "image" else "pixel_values_videos"] = chosen
            inputs[f"{name}_grid_thw"] = grid[kind]
    inputs["second_per_grid_ts"] = torch.full((int((grid[:, 0] > 1).sum()),), SECONDS)
    return inputs


def published(name: str) -> str:
    """A parameter's name in transformers' model → in a published checkpoint."""
    for prefix, shorter in qwen2_5_vl.RENAMED.items():
        name = name.replace(prefix, shorter, 1) if name.startswith(prefix) else name
    return name


def run(rank: int, twin: str, runs: dict[str, tuple[Layout, tuple[str, ...]]]) -> None:
    """In a process of its own, as ``rank`` of two: each run's results to ``<run>.<rank>.pt`` beside the twin."""
    platform.activate("cpu")
    folder = Path(twin).parent
    for name, (layout, frozen) in runs.items():
        if rank >= layout.model_parallel:
            continue
        store = dist.FileStore(str(folder / f"{name}.store"), layout.model_parallel)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=layout.model_parallel)
        here = parallel.initialize(layout, seed=1, timeout_seconds=600)
        torch.save(_compute(Path(twin), name, here, frozen), folder / f"{name}.{rank}.pt")
        dist.barrier()
        parallel.destroy()


def _compute(twin: Path, name: str, here: parallel.Parallel, frozen: tuple[str, ...]) -> dict[str, Any]:
    hf_config = hf_checkpoint.config(twin)
    settings = model.ModelSettings(Precision("fp32"), "none", distributed_optimizer=False, frozen=frozen)
    policy = model.build(hf_config, here, settings)
    hf_checkpoint.load(policy.shards, twin)
    hf_checkpoint.export(policy.shards, twin, twin.parent / f"export-{name}", writes=here.is_first_replica)
    modules = [chunk.module for chunk in policy.chunks]
    found: dict[str, Any] = {}
    sequences = batch(hf_config)
    if modules[0].vision is not None:
        images = [s.vision for s in sequences if s.vision is not None]
        with torch.no_grad():
            pixels, grid = torch.cat([v.pixels for v in images]), torch.cat([v.grid for v in images])
            found["tower"] = modules[0].vision(pixels, grid)
        state = modules[0].sharded_state_dict()
        found["whole_shapes"] = {key: list(t.global_shape) for key, t in state.items() if isinstance(t, ShardedTensor)}
    micro = [
        packing.pack(
            sequences, indices, policy.token_multiple, 0, platform.current().device(),
            here.layout.context, here.context_rank,
        )
        for indices in MICRO_BATCHES
    ]  # fmt: skip
    found["log_probs"] = {
        index: (places.long(), values)
        for log_probs, m in zip(steps.log_probs(policy, micro), micro, strict=False)  # none off the last stage
        for index, places, values in zip(
            m.indices, m.values["place"].split(m.lengths), log_probs.split(m.lengths), strict=True
        )
    }
    sums = steps.accumulate_gradients(policy, micro, lambda found, m: (-(found * m.values["weight"]).sum(), {}))
    found["loss"] = sums["loss"]
    parameters = [p for module in modules for p in module.parameters()]
    found["gradients"] = [
        (b.hf_name, b.hf_start, p.main_grad[region(b.local_start, b.shape)].clone())
        for shard, p in zip(policy.shards, parameters, strict=True)
        for b in shard.blocks
        if p.requires_grad
    ]
    return found
