"""Simulate the trainer's ranks one after another in one process, without memory for parameters.

``model.build`` makes a rank's model as on the real rank, with the same modules, shapes, buffers and blocks. There are
two differences. The device is torch's "meta", whose tensors have a shape and no memory. The process groups have torch's
"fake" backend, whose collectives return at once.
"""

import itertools
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the backend "fake" too
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.core_model_loading import revert_weight_conversion

from megatron_ext import model as models
from megatron_ext import parallel, platform
from megatron_ext.layout import ParallelConfig
from megatron_ext.model import Model
from megatron_ext.parallel import Parallel
from megatron_ext.precision import PrecisionConfig
from megatron_ext.scalar_head import HF_OUTPUT_LAYER, TENSOR, has_scalar_head

META = torch.device("meta")
# Results of checkpoint_tensors, by the repr of the architecture's configuration.
_tensors: dict[str, dict[str, tuple[int, ...]]] = {}
# The start and the extent of a block within a tensor, in each dimension.
Rectangle = tuple[tuple[int, ...], tuple[int, ...]]


def activate() -> None:
    """Make this process build models on the meta device. It can't train or load weights afterwards."""
    cpu = platform.activate("cpu")
    cpu.device = lambda: META  # type: ignore[attr-defined]
    torch.cuda.current_device = lambda: META  # type: ignore[assignment, return-value]


@contextmanager
def rank(number: int, world: int, sizes: ParallelConfig) -> Iterator[Parallel]:
    """Make this process rank ``number`` of ``world`` within the with block.

    Raises ValueError if the sizes do not fit the world.
    """
    dist.init_process_group("fake", store=FakeStore(), rank=number, world_size=world)
    try:
        yield parallel.initialize(sizes, seed=1, timeout_seconds=60)
    finally:
        parallel.destroy()


def distinct_ranks(world: int, sizes: ParallelConfig) -> list[int]:
    """The ranks whose models differ: those with data- and context-parallel rank 0.

    They are sorted by pipeline rank, then by tensor-parallel rank. Megatron-Core numbers ranks so that the
    tensor-parallel rank varies fastest and the pipeline rank slowest.
    """
    per_stage = world // sizes.pipeline
    return [stage * per_stage + tensor for stage in range(sizes.pipeline) for tensor in range(sizes.tensor)]


def build(hf_config: Any, here: Parallel, precision: PrecisionConfig, frozen: Sequence[str] = ()) -> Model:
    """``model.build`` without memory. Needs :func:`activate`, and must be called within :func:`rank`."""
    with torch.device(META):
        return models.build(hf_config, here, precision, frozen)


@dataclass
class Coverage:
    """Which rectangles of the Hugging Face tensors the ranks of one replica hold, from the blocks of their shards.

    A rectangle on several tensor-parallel ranks of one stage is replicated and counts once. A rectangle that is twice
    on one rank, or on two stages, is a duplicate. Tied embeddings may be on both the first and the last stage.

    Attributes:
        held: tensor → rectangle → pipeline stages that hold it.
        duplicated: tensors of which one rank holds a rectangle twice.
    """

    held: dict[str, dict[Rectangle, set[int]]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(set)))
    duplicated: set[str] = field(default_factory=set)

    def add(self, model: Model) -> None:
        """Add the blocks of one rank."""
        seen: set[tuple[str, Rectangle]] = set()
        for shard in model.shards:
            for block in shard.blocks:
                rectangle = (block.hf_start, block.shape)
                if (block.hf_name, rectangle) in seen:
                    self.duplicated.add(block.hf_name)
                seen.add((block.hf_name, rectangle))
                self.held[block.hf_name][rectangle].add(model.parallel.pipeline_rank)

    def compare(self, expected: dict[str, tuple[int, ...]], tied: bool) -> dict[str, Any]:
        """Compare with the tensors of the checkpoint.

        Args:
            expected: name → shape of the checkpoint's tensors.
            tied: whether the embeddings are tied.

        Returns:
            The counts ``expected`` and ``covered`` (each element held exactly once), and the names of tensors that are
            ``missing`` in part or completely, ``unexpected`` or ``duplicated``.
        """
        missing = []
        duplicated = set(self.duplicated)
        most_stages = 2 if tied else 1
        for name, shape in expected.items():
            rectangles = self.held.get(name, {})
            on_too_many_stages = any(len(stages) > most_stages for stages in rectangles.values())
            if on_too_many_stages or _overlap(list(rectangles)):
                duplicated.add(name)
            all_inside = all(_is_inside(rectangle, shape) for rectangle in rectangles)
            held_elements = sum(math.prod(extents) for _, extents in rectangles)
            if not all_inside or held_elements < math.prod(shape):
                missing.append(name)
        unexpected = sorted(set(self.held) - set(expected))
        wrong = {*missing, *duplicated}
        return {
            "expected": len(expected),
            "covered": sum(name not in wrong for name in expected),
            "missing": missing,
            "unexpected": unexpected,
            "duplicated": sorted(duplicated),
        }


def _is_inside(rectangle: Rectangle, shape: tuple[int, ...]) -> bool:
    """Whether a tensor of this shape has all of the rectangle."""
    start, extents = rectangle
    if len(start) != len(shape):
        return False
    return all(first + extent <= size for first, extent, size in zip(start, extents, shape, strict=True))


def _overlap(rectangles: list[Rectangle]) -> bool:
    """Whether two of the rectangles share an element."""
    return any(_share_an_element(one, other) for one, other in itertools.combinations(rectangles, 2))


def _share_an_element(one: Rectangle, other: Rectangle) -> bool:
    for start, extent, other_start, other_extent in zip(*one, *other, strict=True):
        if start >= other_start + other_extent or other_start >= start + extent:
            return False
    return True


def checkpoint_tensors(hf_config: Any) -> dict[str, tuple[int, ...]]:
    """Name → shape of each tensor in a checkpoint of this architecture. Tied tensors count once.

    The shapes come from transformers' model, built without memory, and the names from transformers' table of the names
    in published checkpoints. This takes seconds, so the result is cached for a search of layouts.
    """
    key = repr(hf_config)
    if key not in _tensors:
        _tensors[key] = _checkpoint_tensors(hf_config)
    return _tensors[key]


def _checkpoint_tensors(hf_config: Any) -> dict[str, tuple[int, ...]]:
    auto = AutoModelForImageTextToText if hasattr(hf_config, "vision_config") else AutoModelForCausalLM
    with torch.device(META):
        network = auto.from_config(hf_config)
    named = revert_weight_conversion(network, dict(network.named_parameters()))
    shapes = {name: tuple(tensor.shape) for name, tensor in named.items()}
    if has_scalar_head(hf_config):
        # transformers does not have a model with a scalar head for every family, so the tensors are derived from those
        # of the language model.
        shapes = {name: shape for name, shape in shapes.items() if not name.endswith(HF_OUTPUT_LAYER)}
        shapes[TENSOR] = (hf_config.num_labels, hf_config.get_text_config().hidden_size)
    return shapes
