"""Both vision-language families: in which layouts they run, what ranks and transformers compute, and Qwen2.5-VL's twin.

``vl_twins.py FOLDER`` forks ``cases.WORLD`` ranks, which do the runs that tests ask for.

InternVL3's twins are in ``internvl_twins``.
"""

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from megatron_ext import (
    checkpoint,
    forward_backward,
    hf_checkpoint,
    images,
    model,
    optimizer,
    packing,
    parallel,
    platform,
)
from megatron_ext.batch import TokenBatch
from megatron_ext.host_buffers import HostBuffers
from megatron_ext.layout import ParallelConfig
from megatron_ext.micro_batches import MicroBatches
from megatron_ext.models import qwen2_5_vl
from megatron_ext.packing import VisionInputs
from recipes.launch.launcher import fork_ranks
from tests.megatron_ext import cases, internvl_twins
from tests.megatron_ext.cases import Case
from tests.megatron_ext.ranks import serve
from tests.sequences import PlainSequence, token_batch
from tests.settings import precision_config
from tests.te import watched

Results = Callable[[str], list[dict[str, Any]]]


@dataclass(frozen=True)
class Run(Case):
    """A case of a vision-language twin. ``frozen`` as in ``model.build``."""

    frozen: tuple[str, ...] = ()
    last_stage_layers: int | None = None

    @property
    def layout(self) -> ParallelConfig:
        return replace(super().layout, last_stage_layers=self.last_stage_layers)

    @property
    def is_internvl(self) -> bool:
        return not self.twin.startswith("qwen")


def qwen(name: str, **options: Any) -> Run:
    return Run(f"qwen-{name}", **{"twin": "qwen"} | options)


def internvl(twin: str, name: str, **options: Any) -> Run:
    return Run(f"{twin}-{name}", twin=twin, **options)


TP2_SP: dict[str, Any] = {"tensor": 2, "sequence": True}
CP2: dict[str, Any] = {"context": 2, "distributed_optimizer": False}  # so that a rank has whole gradients
CP4: dict[str, Any] = {"context": 4, "distributed_optimizer": False}
VISION = ("vision",)
RUNS = (
    qwen("one"),
    qwen("frozen", frozen=VISION),
    qwen("tp2", tensor=2),
    qwen("tp2-sp", **TP2_SP),
    qwen("pp2", pipeline=2),
    qwen("pp2-uneven", pipeline=2, first_stage_layers=1, last_stage_layers=3),
    qwen("pp2-vp2", pipeline=2, virtual=2),
    qwen("cp2", **CP2),
    qwen("pp2-cp2", pipeline=2, **CP2),
    qwen("cp4-frozen", frozen=VISION, **CP4),
    qwen("dp2", data=2),
    qwen("tp2-sp-dp2-frozen", data=2, frozen=VISION, **TP2_SP),
    qwen("tp2-sp-pp2", pipeline=2, **TP2_SP),
    qwen("recompute-selective", recompute="selective"),
    qwen("tp2-sp-recompute-mlp", recompute="selective", recompute_modules=("mlp",), **TP2_SP),
    qwen("recompute-full", recompute="full"),
    qwen("recompute-full-frozen", recompute="full", frozen=VISION),
    qwen("recompute-full-frozen-embedding", recompute="full", frozen=("vision.patch_embed",)),
    qwen("tp2-sp-recompute-full", recompute="full", **TP2_SP),
    qwen("tied-pp2", pipeline=2, twin="qwen-tied"),
    qwen("shared-one", shared_prompts=True),
    qwen("shared-tp2-sp-frozen", frozen=VISION, shared_prompts=True, **TP2_SP),
    qwen("pp2-frozen-projector", frozen=(*VISION, "vision.projector"), pipeline=2),
    qwen("shared-tp2-sp-pp2", pipeline=2, shared_prompts=True, **TP2_SP),
    internvl("6b-hf", "one"),
    internvl("6b-hf", "tp2", tensor=2),
    internvl("6b-hf", "tp2-sp", **TP2_SP),
    internvl("6b-hf", "tp2-sp-frozen", frozen=VISION, **TP2_SP),
    internvl("6b-hf", "pp2", pipeline=2),
    internvl("6b-hf", "pp2-uneven", pipeline=2, last_stage_layers=1),
    internvl("6b-hf", "pp2-vp2", pipeline=2, virtual=2),
    internvl("6b-hf", "cp2", **CP2),
    internvl("6b-hf", "pp2-cp2", pipeline=2, **CP2),
    internvl("6b-hf", "cp4", **CP4),
    internvl("6b-hf", "dp2", data=2),
    internvl("6b-hf", "tp2-sp-pp2", pipeline=2, **TP2_SP),
    internvl("6b-hf", "pp2-recompute-selective", pipeline=2, recompute="selective"),
    internvl("6b-hf", "recompute-mlp", recompute="selective", recompute_modules=("core_attn", "mlp")),
    internvl("6b-hf", "tp2-sp-recompute-full", recompute="full", **TP2_SP),
    internvl("6b-hf", "recompute-full-frozen", recompute="full", frozen=VISION),
    internvl("6b-hf", "shared-tp2-sp-dp2", data=2, shared_prompts=True, **TP2_SP),
    internvl("6b-chat", "one"),
    internvl("6b-chat", "tp2-sp", **TP2_SP),
    internvl("300m-hf", "one"),
    internvl("300m-hf", "tp2-sp", **TP2_SP),
    internvl("300m-hf", "recompute-full", recompute="full"),
    internvl("300m-chat", "one"),
    internvl("300m-chat", "tp2-sp", **TP2_SP),
)
# Checkpoints, as in ``cases``. InternVL3's five heads are padded under TP 2, so its degree must stay.
TP2_DP2 = qwen("tp2-dp2", tensor=2, data=2)
PP2_DP2 = internvl("6b-hf", "pp2-dp2", pipeline=2, data=2)
TP2_DP2_FROZEN = internvl("300m-hf", "tp2-dp2-frozen", tensor=2, data=2, frozen=VISION)
# Gradients are reduced during the backward pass of the last micro-batch, which has no images on one rank.
EARLY_DP2 = qwen("early-dp2", data=2, reduce_early=True)
RESUMES = (TP2_DP2, PP2_DP2, TP2_DP2_FROZEN, EARLY_DP2)
RELAYOUTS = (
    (TP2_DP2, qwen("pp2", pipeline=2)),
    (PP2_DP2, internvl("6b-hf", "dp2", data=2)),
    (TP2_DP2_FROZEN, internvl("300m-hf", "tp2-pp2-frozen", tensor=2, pipeline=2, frozen=VISION)),
)
OTHER_PADDING = (TP2_DP2_FROZEN, internvl("300m-hf", "frozen", frozen=VISION))
# A job → the job whose checkpoint it reads.
EARLIER = {f"relayout-{run.name}": f"resume-{saved.name}" for saved, run in RELAYOUTS}
EARLIER["other-padding"] = f"resume-{TP2_DP2_FROZEN.name}"
# Adam divides by a gradient's size: a greater epsilon keeps rounding out of the step where there is next to none.
OPTIMIZER = replace(cases.OPTIMIZER, epsilon=1e-4, clip_grad_norm=0.1)
# Prefixes of frozen parameters → tensors of the checkpoint.
FROZEN_TENSORS = {
    "vision": r"visual\.(?!merger\.)|vision_",
    "vision.patch_embed": r"visual\.patch_embed\.",
    "vision.projector": r"visual\.merger\.",
}
# The encoder is frozen, so that it runs before the passes.
KEPT = tuple(run for run in RUNS if "vision" in run.frozen)

TEXT_TOKENS = 120  # of the vocabulary; the special tokens come after them
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
    """4 tower layers, two of them with full attention, and 4 language layers with 4 query and 2 key-value heads, in
    several files."""
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
    model.save_pretrained(folder, max_shard_size="200KB")


def batch(hf_config: Any) -> list[PlainSequence]:
    """As many sequences as ``SIZES``, of 7 to 60 tokens, with the values of ``cases.batch``."""
    generator = torch.Generator().manual_seed(0)

    def text(low: int) -> list[int]:
        count = int(torch.randint(low, 7, (), generator=generator))
        return torch.randint(0, TEXT_TOKENS, (count,), generator=generator).tolist()

    sequences = []
    for sizes in SIZES:
        prompt = text(low=0 if sizes else 3)
        for size in sizes:
            prompt += placeholders(hf_config, size) + text(low=1)
        response = text(low=2)
        values: dict[str, Sequence[float]] = {"place": list(range(len(response)))}
        values["weight"] = [1 / (len(SIZES) * len(response))] * len(response)
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
        sequences.append(PlainSequence(prompt, response, values, vision))
    return sequences


def placeholders(hf_config: Any, size: tuple[int, int, int]) -> list[int]:
    """Tokens of an image (one frame) or a clip (several), between the start and end marks."""
    frames, rows, columns = size
    token = hf_config.image_token_id if frames == 1 else hf_config.video_token_id
    count = frames * rows * columns // hf_config.vision_config.spatial_merge_size**2
    return [hf_config.vision_start_token_id, *[token] * count, hf_config.vision_end_token_id]


def hugging_face_inputs(hf_config: Any, sequence: PlainSequence) -> dict[str, Any]:
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


def make_twins(folder: Path) -> None:
    make_qwen2_5_vl(folder / "qwen")
    make_qwen2_5_vl(folder / "qwen-tied", tied=True)
    internvl_twins.make_twins(folder)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All of a checkpoint's, by name."""
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


@dataclass(frozen=True)
class Reference:
    """transformers, one sequence at a time: the tower's ``rows`` of all images and clips, ``log_probs`` by sequence,
    ``gradients`` by tensor of the checkpoint."""

    rows: torch.Tensor
    log_probs: dict[int, torch.Tensor]
    loss: float
    gradients: dict[str, torch.Tensor]


def reference(folder: Path, run: Run) -> Reference:
    source = folder / run.twin.replace("-chat", "-hf")
    hf = AutoModelForImageTextToText.from_pretrained(source, dtype=torch.float32, attn_implementation="eager")
    sequences = batch_of(run, hf.config)
    seen = [s.vision for s in sequences if s.vision is not None]
    with torch.no_grad():
        if run.is_internvl:
            rows = [hf.get_image_features(v.pixels).pooler_output.flatten(0, 1) for v in seen]
        else:
            rows = [hf.model.visual(v.pixels, grid_thw=v.grid).pooler_output for v in seen]
    log_probs, loss = {}, torch.zeros(())
    for i, s in enumerate(sequences):
        if run.is_internvl:
            images = {} if s.vision is None else {"pixel_values": s.vision.pixels}
            inputs = {"input_ids": torch.tensor([s.prompt + s.response]), **images}
        else:
            inputs = hugging_face_inputs(hf.config, s)
        logits = hf(**inputs).logits[0, len(s.prompt) - 1 : -1]
        response_log_probs = torch.distributions.Categorical(logits=logits).log_prob(torch.tensor(s.response))
        log_probs[i] = response_log_probs.detach()
        loss = loss - response_log_probs.mean() / len(sequences)
    loss.backward()
    saved_name = internvl_twins.published if run.is_internvl else published
    gradients = {saved_name(name): p.grad for name, p in hf.named_parameters()}
    if run.twin.endswith("-chat"):
        gradients = internvl_twins.chat_tensors(gradients)
    return Reference(torch.cat(rows), log_probs, loss.item(), gradients)


def batch_of(run: Run, hf_config: Any) -> list[PlainSequence]:
    """Where the run shares prompts, two successive sequences have the first one's, with its images."""
    sequences = internvl_twins.batch() if run.is_internvl else batch(hf_config)
    if not run.shared_prompts:
        return sequences
    first_of_pairs = [sequences[n - n % 2] for n in range(len(sequences))]
    return [
        replace(s, prompt=first.prompt, vision=first.vision) for s, first in zip(sequences, first_of_pairs, strict=True)
    ]


class Policy:
    """A freshly built model with the twin's weights, its optimiser and this rank's micro-batches."""

    def __init__(self, folder: Path, run: Run, here: parallel.Parallel) -> None:
        self.twin = folder / run.twin
        hf_config = hf_checkpoint.config(self.twin)
        self.model = model.build(hf_config, here, precision_config("fp32"), run.frozen)
        hf_checkpoint.load(self.model.shards, self.twin)
        self.optimizer, self.schedule = optimizer.build(self.model, OPTIMIZER, cases.SCHEDULE, steps=10)
        self.optimizer.reload_model_params()
        self.sequences = batch_of(run, hf_config)
        micro_batches: Sequence[list[int]] = internvl_twins.MICRO_BATCHES if run.is_internvl else MICRO_BATCHES
        if run.shared_prompts:
            micro_batches = ([0, 1], [2, 3], [4], list(range(5, len(self.sequences))))
        if run.reduce_early:
            micro_batches = sorted(micro_batches, key=lambda chosen: len(chosen) == 1)
        self.plan = micro_batches[here.data_rank :: run.data]
        self.build = partial(
            packing.pack,
            multiple=self.model.token_multiple,
            pad_token=0,
            context=run.context,
            context_rank=here.context_rank,
            shared_prompts=run.shared_prompts,
            tower=self.model.tower,
        )
        self.batch = token_batch(self.sequences, run.shared_prompts)
        self.micro = self.micro_batches(self.batch, encoded=run in KEPT)

    def micro_batches(self, batch: TokenBatch, encoded: bool) -> MicroBatches:
        """One rank has a prompt's pixels at first, another one the next prompt's."""
        vision = [v and on_one_rank(v, i % dist.get_world_size()) for i, v in enumerate(batch.vision or [])]
        in_plan = {int(batch.prompt_index[i]) for indices in self.plan for i in indices}
        inputs = [v for v in vision if v is not None]
        wanted = [i in in_plan and self.model.tower is not None for i, v in enumerate(vision) if v is not None]
        images.exchange(inputs, np.array(wanted, np.bool_), self.model, parallel.control_group())
        if encoded:
            images.encode(self.model, [v for v, is_wanted in zip(inputs, wanted, strict=True) if is_wanted])
        return MicroBatches(replace(batch, vision=vision), self.plan, partial(self.build, encoded=encoded))

    def gradients(self, micro_batches: MicroBatches | None = None) -> float:
        """Accumulates them; returns the loss."""

        def loss(log_probs: torch.Tensor, batch: packing.MicroBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            return -(log_probs * batch.values["weight"]).sum(), {}

        return forward_backward.accumulate_gradients(self.model, micro_batches or self.micro, loss)["loss"]

    def step(self) -> float:
        """Returns the gradients' norm."""
        return optimizer.step(self.optimizer, self.schedule)

    def train(self, count: int) -> list[tuple[float, float]]:
        return [(self.gradients(), self.step()) for _ in range(count)]

    def load(self, folder: Path) -> int:
        newest = checkpoint.latest(folder)
        assert newest is not None
        return checkpoint.load(newest, self.model, self.optimizer, self.schedule)


def on_one_rank(vision: VisionInputs, rank: int) -> VisionInputs:
    """As the other ranks have it, which know the shape of the pixels."""
    return replace(vision, pixels=vision.pixels if dist.get_rank() == rank else vision.pixels.to("meta"))


def main() -> None:
    platform.activate("cpu")
    fork_ranks(cases.WORLD)
    jobs: dict[str, tuple[Case, Callable[..., dict[str, Any]], tuple[Case, ...]]] = {
        **{run.name: (run, _run, ()) for run in RUNS},
        **{f"kept-{run.name}": (run, _kept, ()) for run in KEPT},
        **{f"policy-{run.name}": (run, _policy, ()) for run in KEPT[:1]},
        **{f"resume-{run.name}": (run, _resume, ()) for run in RESUMES},
        **{f"watched-{run.name}": (run, watched.vision, ()) for run in RUNS if run.name in watched.VISION},
        **{f"relayout-{run.name}": (run, _relayout, (saved,)) for saved, run in RELAYOUTS},
        "other-padding": (OTHER_PADDING[1], _other_padding, OTHER_PADDING[:1]),
    }
    serve(Path(sys.argv[1]), jobs, seed=1)


def _run(folder: Path, run: Run, here: parallel.Parallel) -> dict[str, Any]:
    from tests.megatron_ext import worker  # only in a rank's process

    policy = Policy(folder, run, here)
    shards, modules = policy.model.shards, [chunk.module for chunk in policy.model.chunks]
    answer: dict[str, Any] = {
        "loaded": {s.name: s.tensor.clone() for s in shards},
        "numbers_read": worker.numbers_read(policy),
        "numbers_owned": sum(math.prod(b.shape) for s in shards for b in s.blocks),
    }
    hf_checkpoint.export(shards, policy.twin, folder / f"export-{run.name}", writes=here.is_first_replica)
    if modules[0].vision is not None:
        seen = [s.vision for s in policy.sequences if s.vision is not None]
        grid = None if run.is_internvl else torch.cat([v.grid for v in seen])
        layout = modules[0].vision.layout(grid, packing.on_host)
        answer["rows"] = modules[0].vision(torch.cat([v.pixels for v in seen]), layout).detach()
        state = modules[0].sharded_state_dict()
        answer["whole_shapes"] = {key: list(t.global_shape) for key, t in state.items() if isinstance(t, ShardedTensor)}
    answer["log_probs"] = {
        index: (places.long(), values)
        for log_probs, m in zip(forward_backward.log_probs(policy.model, policy.micro), policy.micro, strict=False)
        for index, places, values in zip(
            m.indices, m.values["place"].split(m.lengths.tolist()), log_probs.split(m.lengths.tolist()), strict=True
        )
    }
    answer["pixels"] = [None if m.vision is None else str(m.vision.images.dtype) for m in policy.micro]
    answer["loss"] = policy.gradients()
    parameters = [p for module in modules for p in module.parameters()]
    if cases.has_whole_gradients(run):
        trained = [(s, p) for s, p in zip(shards, parameters, strict=True) if p.requires_grad]
        answer["gradients"] = worker.pieces([s for s, _ in trained], [p.main_grad for _, p in trained])
    answer["grad_norm"] = policy.step()
    answer["weights"] = worker.pieces(shards, parameters)
    answer["padded"] = [s.name for s in shards if sum(math.prod(b.shape) for b in s.blocks) < s.tensor.numel()]
    answer["padding_is_zero"] = all(worker.padding_is_zero(s) for s in shards)
    return answer


def count_encoded(tower: Any) -> list[int]:
    """Patches or tiles of each run of the tower's encoder from now on; none without a tower."""
    seen: list[int] = []
    if tower is None:
        return seen
    encode = tower.encode

    def counting(pixels: torch.Tensor, layout: Any) -> torch.Tensor:
        seen.append(len(pixels))
        return encode(pixels, layout)

    tower.encode = counting
    return seen


def _kept(folder: Path, run: Run, here: parallel.Parallel) -> dict[str, Any]:
    """Two responses to each prompt, whether they share its pass or not: the encoder's output made once for a step, and
    made again in each pass, from whole pixels on every rank. A micro-batch has one prompt, so that products have the
    same shapes and with them the same rounding."""
    from tests.megatron_ext import worker

    policy = Policy(folder, run, here)
    first_of_pairs = [policy.sequences[n - n % 2] for n in range(len(policy.sequences))]
    sequences = [
        replace(s, prompt=first.prompt, vision=first.vision)
        for s, first in zip(policy.sequences, first_of_pairs, strict=True)
    ]
    batch = token_batch(sequences, shared_prompts=True)
    together = 2 if run.shared_prompts else 1
    units = [list(range(first, first + together)) for first in range(0, len(sequences), together)]
    policy.plan = units[here.data_rank :: run.data]
    tower = policy.model.tower
    seen = count_encoded(tower)
    of_step: list[VisionInputs | None] = []
    results: list[dict[str, Any]] = []
    for kept in (True, False):
        seen.clear()
        micro_batches = policy.micro_batches(batch, kept) if kept else MicroBatches(batch, policy.plan, policy.build)
        if kept:
            of_step = micro_batches.batch.vision or []
        # As in a step: log-probs under the reference and as the old policy's, and a pass with gradients.
        passes = [forward_backward.log_probs(policy.model, micro_batches) for _ in range(2)]
        loss = policy.gradients(micro_batches)
        trained = [p for chunk in policy.model.chunks for p in chunk.parameters() if p.requires_grad]
        results.append({"seen": sorted(seen), "passes": passes, "loss": loss})
        results[-1]["gradients"] = [p.main_grad.clone() for p in trained]
    of_rank = {int(batch.prompt_index[i]) for indices in policy.plan for i in indices}
    with_images = [vision for p in sorted(of_rank) if (vision := of_step[p]) is not None]
    once, fresh = results
    return {
        "has_tower": tower is not None,
        "images": sorted(len(vision.pixels) for vision in with_images),
        "kept_rows": [0 if vision.encoded is None else len(vision.encoded.rows) for vision in with_images],
        "rows": [len(vision.placeholders) for vision in with_images],
        "seen": once["seen"],
        "seen_without": fresh["seen"],
        "log_probs": all(worker.equal(a, b) for a, b in zip(once["passes"], fresh["passes"], strict=True)),
        "loss": [once["loss"], fresh["loss"]],
        "gradients": worker.equal(once["gradients"], fresh["gradients"]),
        "greatest": max((float(g.abs().max()) for g in once["gradients"]), default=0.0),
    }


def _policy(folder: Path, run: Run, here: parallel.Parallel) -> dict[str, Any]:
    """A step of the recipes' policy with two responses to each prompt: log-probs under the reference and its own for
    the KL in the reward, and the micro-batches of two updates."""
    from recipes.training.policy import Policy as RecipesPolicy
    from tests.megatron_ext import worker

    twin = Policy(folder, run, here)
    policy = RecipesPolicy(
        model=twin.model,
        parallel=replace(here, config=replace(here.config, micro_batch_tokens=160)),
        source=str(twin.twin),
        cost=packing.cost_of(twin.model.hf_config, run.frozen),
        pad_token=0,
        temperature=1.0,
        optimizer_config=OPTIMIZER,
        guard=None,  # type: ignore[arg-type]
        states=None,  # type: ignore[arg-type]
    )
    first_of_pairs = [twin.sequences[n - n % 2] for n in range(len(twin.sequences))]
    sequences = [
        replace(s, prompt=first.prompt, vision=first.vision)
        for s, first in zip(twin.sequences, first_of_pairs, strict=True)
    ]
    batch = token_batch(sequences, shared_prompts=True)
    seen = count_encoded(twin.model.tower)
    policy.load_reference(twin.twin)
    micro_batches = policy.micro_batches(batch)
    with policy.reference_weights():
        reference = policy.all_log_probs(micro_batches, len(batch.response_tokens))
    log_probs = policy.all_log_probs(micro_batches, len(batch.response_tokens))
    for part in (range(4), range(4, 8)):
        policy.add_log_probs(policy.micro_batches_of_own(batch.select(part), parallel.control_group()), "old")
    another = next(shard for shard in twin.model.shards if images.is_of_encoder(shard.name))
    another.tensor.add_(1e-3)
    return {
        "seen": sorted(seen),
        "images": sorted(len(v.pixels) for v in batch.vision or [] if v is not None),
        "kl": float((reference - log_probs).abs().max()),
        "error": worker.error_text(lambda: policy.load_reference(twin.twin)),
    }


def _resume(folder: Path, run: Run, here: parallel.Parallel) -> dict[str, Any]:
    """Save and go on; start anew from the checkpoint and go on: both must be the same."""
    from tests.megatron_ext import worker

    to = folder / "checkpoints" / run.name
    policy = Policy(folder, run, here)
    policy.train(1)
    saver = checkpoint.Saver(to, keep=1)
    snapshot = checkpoint.snapshot(policy.model, policy.optimizer, policy.schedule, HostBuffers())
    saver.save(3, {checkpoint.POLICY: snapshot}, {})
    saver.wait()
    exported = folder / "exports" / f"resume-{run.name}"
    hf_checkpoint.export(policy.model.shards, folder / run.twin, exported, here.is_first_replica)
    saved, drawn = forward_backward.copy_weights(policy.model), torch.rand(4)
    went_on, after = policy.train(2), forward_backward.copy_weights(policy.model)
    again = Policy(folder, run, here)
    torch.manual_seed(here.tensor_rank + 77)
    return {
        "step": again.load(to),
        "loaded": worker.equal(forward_backward.copy_weights(again.model), saved),
        "random_numbers": torch.equal(torch.rand(4), drawn),
        "went_on": went_on,
        "resumed": again.train(2),
        "same_weights": worker.equal(forward_backward.copy_weights(again.model), after),
        "weights": worker.pieces(again.model.shards, after),
    }


def _relayout(folder: Path, saved: Run, run: Run, here: parallel.Parallel) -> dict[str, Any]:
    from tests.megatron_ext import worker

    policy = Policy(folder, run, here)
    step, resumed = policy.load(folder / "checkpoints" / saved.name), policy.train(2)
    return {
        "step": step,
        "resumed": resumed,
        "weights": worker.pieces(policy.model.shards, forward_backward.copy_weights(policy.model)),
    }


def _other_padding(folder: Path, saved: Run, run: Run, here: parallel.Parallel) -> dict[str, Any]:
    from tests.megatron_ext import worker

    policy = Policy(folder, run, here)
    return {"error": worker.error_text(lambda: policy.load(folder / "checkpoints" / saved.name))}


if __name__ == "__main__":
    main()
