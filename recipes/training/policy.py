"""The policy on this rank: the model that is trained, its optimiser and schedule, and its passes over a batch."""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_ext import (
    checkpoint,
    forward_backward,
    hf_checkpoint,
    images,
    optimizer,
    packing,
    parallel,
    platform,
    scalar_head,
)
from megatron_ext.batch import Array, TokenBatch
from megatron_ext.checkpoint import POLICY, Snapshot
from megatron_ext.host_buffers import HostBuffers
from megatron_ext.micro_batches import Joined, MicroBatches
from megatron_ext.model import Model, shares_prompts
from megatron_ext.offload import HostCopy, release_gradients
from megatron_ext.optimizer_settings import OptimizerConfig, ScheduleConfig
from megatron_ext.packing import Cost, VisionInputs
from megatron_ext.parallel import Parallel
from megatron_ext.routing import exchange
from megatron_ext.weight_map import round_up


@dataclass
class UpdateGuard:
    """Applies updates and skips those whose loss or gradient norm is not finite, on every rank alike."""

    max_skipped: int
    # Shows a line.
    log: Callable[[str], None]
    # Records an event.
    event: Callable[..., None]
    # Updates skipped since the last call of take_skipped, that is in the present step.
    skipped: int = 0
    # Updates of each model skipped since its last applied update.
    in_a_row: Counter[str] = field(default_factory=Counter)

    def apply(
        self,
        model_optimizer: MegatronOptimizer,
        schedule: OptimizerParamScheduler,
        metrics: dict[str, float],
        model: str = POLICY,
    ) -> bool:
        """Make one update with the accumulated gradients and return whether it was applied.

        Sets ``metrics["grad_norm"]``. Raises RuntimeError after ``optimizer.max_skipped`` skipped updates in a row.
        """
        if math.isfinite(metrics["loss"]):
            metrics["grad_norm"] = optimizer.step(model_optimizer, schedule)
        else:
            optimizer.skip(model_optimizer)
            metrics["grad_norm"] = math.nan
        if math.isfinite(metrics["grad_norm"]):
            self.in_a_row[model] = 0
            return True
        self.skipped += 1
        self.in_a_row[model] += 1
        reason = f"loss {metrics['loss']}, gradient norm {metrics['grad_norm']}"
        self.log(f"update of the {model} skipped ({reason}): {self.in_a_row[model]} in a row")
        self.event("skipped update", model=model, why=reason)
        if self.in_a_row[model] >= self.max_skipped:
            raise RuntimeError(
                f"{reason}: {self.in_a_row[model]} updates in a row were skipped, optimizer.max_skipped="
                f"{self.max_skipped}; the weights are those before them. Lower the learning rate, look at the samples "
                "of these steps, or raise the bound, and go on with resume=true"
            )
        return False

    def take_skipped(self) -> int:
        """Return the number of updates skipped since the last call."""
        skipped = self.skipped
        self.skipped = 0
        return skipped


@dataclass
class Policy:
    """The policy model in this world's layout, with its optimiser, its schedule and the reference weights."""

    model: Model
    parallel: Parallel
    # The Hugging Face folder whose configuration and tokenizer an export copies.
    source: str
    # Gives the FLOPs of a sequence, by which micro-batches are balanced.
    cost: Cost
    pad_token: int
    # The sampling temperature.
    temperature: float
    optimizer_config: OptimizerConfig
    guard: UpdateGuard
    # The optimiser states, which may move to the host.
    states: HostCopy
    # The optimiser and its schedule exist after build_optimizer.
    optimizer: MegatronOptimizer | None = None
    schedule: OptimizerParamScheduler | None = None
    # The reference weights on the host. They exist after load_reference.
    reference: list[torch.Tensor] | None = None
    # Holds the model's own weights while the model has the reference's.
    own_weights: HostBuffers = field(default_factory=HostBuffers)
    # Holds the copies that a checkpoint is written from.
    snapshot_buffers: HostBuffers = field(default_factory=HostBuffers)

    # Optimiser, schedule and checkpoints

    def build_optimizer(self, learning: ScheduleConfig, updates: int) -> None:
        """Build a fresh optimiser, with master weights from the model, and a schedule over ``updates`` updates."""
        self.restore_states()
        self.optimizer, self.schedule = self.new_optimizer(self.model, learning, updates)
        self.states.optimizer = self.optimizer

    def new_optimizer(
        self, model: Model, learning: ScheduleConfig, updates: int
    ) -> tuple[MegatronOptimizer, OptimizerParamScheduler]:
        """As :meth:`build_optimizer` for any model of this world, such as a critic; returns both."""
        built, schedule = optimizer.build(model, self.optimizer_config, learning, updates)
        built.reload_model_params()
        return built, schedule

    @property
    def learning_rate(self) -> float:
        """The learning rate of the next update."""
        assert self.schedule is not None
        return self.schedule.get_lr({})

    def update(self, metrics: dict[str, float]) -> bool:
        """Make one update with the accumulated gradients, as :meth:`UpdateGuard.apply`."""
        assert self.optimizer is not None and self.schedule is not None
        return self.guard.apply(self.optimizer, self.schedule, metrics)

    def skip_update(self, metrics: dict[str, float]) -> None:
        """Discard the accumulated gradients and set ``metrics["grad_norm"]`` to 0."""
        assert self.optimizer is not None
        metrics["grad_norm"] = optimizer.skip(self.optimizer)

    def snapshot(self) -> Snapshot:
        """Collective: a copy of model, optimiser and schedule on the host, for a checkpoint.

        The previous snapshot must have been written, since its buffers are reused.
        """
        assert self.optimizer is not None and self.schedule is not None
        return checkpoint.snapshot(self.model, self.optimizer, self.schedule, self.snapshot_buffers)

    def progress(self) -> dict[str, Any]:
        """What a checkpoint stores beside the snapshot, as plain JSON."""
        return {"skipped_in_a_row": self.guard.in_a_row}

    def load(self, folder: Path) -> int:
        """Collective: restore the policy from a checkpoint and return the number of steps that it has finished."""
        assert self.optimizer is not None and self.schedule is not None
        self.guard.in_a_row = Counter(checkpoint.progress(folder)["skipped_in_a_row"])
        return checkpoint.load(folder, self.model, self.optimizer, self.schedule)

    def export(self, folder: Path) -> None:
        """Collective: the present weights as a Hugging Face folder, written by one data-parallel replica."""
        writes = self.parallel.is_first_replica
        hf_checkpoint.export(self.model.shards, self.source, folder, writes, scalar_head.head_of(self.model.hf_config))

    # Memory

    def restore_states(self) -> None:
        """Move the optimiser states back from the host, where ``optimizer.offload`` put them. Called before training.

        Engines and judges on these devices must be asleep.
        """
        self.states.restore()

    def release_memory(self) -> None:
        """Free device memory for the engines. Called before generation.

        Frees the gradients and the memory that the allocator has cached from activations. With ``optimizer.offload``
        the optimiser states move to the host.
        """
        release_gradients(self.model)
        if self.optimizer_config.offload:
            self.states.release()
        platform.current().empty_cache()

    # Passes over a batch

    def micro_batches(self, batch: TokenBatch, together: int = 1, model: Model | None = None) -> MicroBatches:
        """This data-parallel rank's packed micro-batches of a batch whose tokens every rank holds.

        They are for the policy, or for another ``model`` in the policy's layout. ``together`` successive responses
        stay in one micro-batch. With ``together=1``, the responses to a prompt may share the pass over it
        (``megatron_ext.model.shares_prompts``).
        """
        return self.pack(batch, self.plan(batch, together), model or self.model, together)

    def micro_batches_of_own(self, batch: TokenBatch, group: dist.ProcessGroup) -> MicroBatches:
        """Collective over ``group`` (gloo): as :meth:`micro_batches`, for a batch that is distributed over ranks.

        This rank receives the tokens of the responses that it trains on.
        """
        plan = self.plan(batch)
        wanted = np.zeros(len(batch), np.bool_)
        wanted[[i for indices in plan for i in indices]] = True
        return self.pack(exchange(batch, wanted, group), plan, self.model)

    def plan(self, batch: TokenBatch, together: int = 1) -> list[list[int]]:
        """The indices of the responses in each of this data-parallel rank's micro-batches. Needs no tokens."""
        layout = self.parallel.config
        shares = shares_prompts(layout) and together == 1
        if shares:
            units = packing.units_of_shared_prompts(
                batch, self.parallel.data, layout.micro_batch_tokens, layout.micro_batch_multiple
            )
        else:
            units = packing.units(batch, together)
        of_ranks = packing.plan(
            packing.unit_lengths(batch, units, layout.token_multiple, shares),
            self.parallel.data,
            layout.micro_batch_tokens,
            layout.micro_batch_multiple,
            packing.unit_costs(batch, units, self.cost, shares),
        )
        return [[i for unit in chosen for i in units[unit]] for chosen in of_ranks[self.parallel.data_rank]]

    def pack(self, batch: TokenBatch, plan: Sequence[Sequence[int]], model: Model, together: int = 1) -> MicroBatches:
        """Collective: the micro-batches of a plan for a model in the policy's layout.

        This rank must hold their tokens. If the model is the policy and its vision encoder is frozen, the encoder runs
        on the images that it has not encoded yet.
        """
        layout = self.parallel.config
        encoded = model is self.model and model.tower is not None and images.encoder_is_frozen(model.tower)
        self.prepare_images(batch, plan, model, encoded)
        build = partial(
            packing.pack,
            multiple=model.token_multiple,
            pad_token=self.pad_token,
            length=model.pack_tokens,
            context=layout.context,
            context_rank=self.parallel.context_rank,
            shared_prompts=shares_prompts(layout) and together == 1,
            tower=model.tower,
            encoded=encoded,
        )
        return MicroBatches(batch, plan, build)

    def prepare_images(self, batch: TokenBatch, plan: Sequence[Sequence[int]], model: Model, encoded: bool) -> None:
        """Collective: send the images of the plan's prompts to the ranks of the first pipeline stage that lack them.

        With ``encoded`` the model's encoder then runs on them.
        """
        if batch.vision is None:
            return
        in_plan = np.zeros(len(batch.prompts), np.bool_)
        in_plan[batch.prompt_index[[i for indices in plan for i in indices]]] = model.tower is not None
        # Each image once: both answers of a preference pair have the same vision inputs.
        distinct: dict[int, tuple[VisionInputs, bool]] = {}
        for vision, has in zip(batch.vision, in_plan.tolist(), strict=True):
            if vision is not None:
                _, had = distinct.get(id(vision), (vision, False))
                distinct[id(vision)] = (vision, has or had)
        seen = list(distinct.values())
        if not seen:
            return
        lacking = [has and not (encoded and vision.encoded is not None) for vision, has in seen]
        wanted = [lacks and vision.part is None for (vision, _), lacks in zip(seen, lacking, strict=True)]
        inputs = [vision for vision, _ in seen]
        images.exchange(inputs, np.array(wanted, np.bool_), model, parallel.control_group())
        if encoded:
            images.encode(model, [vision for vision, lacks in zip(inputs, lacking, strict=True) if lacks])

    def divisible_prefix(self, lengths: Array, wanted: int) -> int:
        """How many sequences from the first on, at least ``wanted``, can be distributed over all ranks.

        :meth:`micro_batches` distributes them. ``lengths`` [S] are in tokens.
        """
        layout = self.parallel.config
        return packing.divisible_prefix(
            [round_up(length, layout.token_multiple) for length in lengths.tolist()],
            wanted,
            self.parallel.data,
            layout.micro_batch_tokens,
            layout.micro_batch_multiple,
        )

    def add_log_probs(self, micro_batches: MicroBatches | Joined, name: str) -> None:
        """Add the response tokens' log-probs under the present weights to the micro-batches as ``values[name]``.

        The log-probs are taken at the sampling temperature.
        """
        micro_batches.add(name, forward_backward.log_probs(self.model, micro_batches, self.temperature))

    def all_log_probs(self, micro_batches: MicroBatches, total: int) -> torch.Tensor:
        """Collective: log-probs of all response tokens of the batch under the present weights, FP32 [``total``].

        Every rank gets them, on its host.
        """
        return forward_backward.all_log_probs(self.model, micro_batches, total, self.temperature)

    # Reference

    def load_reference(self, folder: Path) -> None:
        """Load the reference weights from a Hugging Face folder to the host, in this rank's layout.

        The passes under the reference use the images as the policy's frozen vision encoder has encoded them. So this
        raises ValueError where the encoder is frozen and the folder's encoder differs from the policy's.
        """
        self.reference = forward_backward.load_weights(self.model, folder)
        if self.model.tower is not None and images.encoder_is_frozen(self.model.tower):
            for shard, weight in zip(self.model.shards, self.reference, strict=True):
                if images.is_of_encoder(shard.name) and not torch.equal(shard.tensor.cpu(), weight):
                    raise ValueError(
                        f"{folder}: {shard.name} is not the policy's, whose vision encoder is frozen "
                        "(model.frozen): train both from the same encoder"
                    )

    @contextmanager
    def reference_weights(self) -> Iterator[None]:
        """Give the model the reference's weights within the block. Its own weights are restored bit for bit."""
        assert self.reference is not None, "load_reference comes first"
        with forward_backward.swapped_weights(self.model, self.reference, self.own_weights):
            yield
