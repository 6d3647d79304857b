"""Forward and training passes over packed micro-batches, on any layout: log-probabilities, values, gradients."""

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from functools import partial
from itertools import tee
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from megatron.core.tensor_parallel.layers import (
    linear_with_frozen_weight,
    linear_with_grad_accumulation_and_async_allreduce,
)
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)

from megatron_ext import hf_checkpoint, parallel, platform
from megatron_ext.blocks import Shard
from megatron_ext.collectives import all_gather_json
from megatron_ext.entropy import vocab_parallel_entropy
from megatron_ext.host_buffers import HostBuffers
from megatron_ext.micro_batches import Joined, MicroBatches
from megatron_ext.model import Model
from megatron_ext.packing import MicroBatch

# (output [R], micro-batch) → (loss, metrics). The output is log-probs or values; values of several labels are
# [R, labels]. The metrics are sums, which are added up over micro-batches and ranks.
LossFunction = Callable[[torch.Tensor, MicroBatch], tuple[torch.Tensor, dict[str, torch.Tensor]]]
# A list of micro-batches, or an iterable that builds them while it is read.
Batches = Sequence[MicroBatch] | MicroBatches | Joined
# Whether a loss gets entropies in addition to log-probs: "none" for no entropies, "measured" for entropies without a
# gradient, "trained" for entropies with a gradient.
Entropies = Literal["none", "measured", "trained"]


def log_probs(model: Model, batches: Batches, temperature: float = 1.0) -> list[torch.Tensor]:
    """Compute the log-probs [R] (FP32) of each micro-batch's response tokens.

    Returns an empty list on all pipeline stages but the last. Under context parallelism the R tokens are this rank's
    part of the response tokens.
    """
    return _without_gradient(model, batches, _log_probs_head(model, temperature), _outputs)


def all_log_probs(model: Model, batches: Batches, total: int, temperature: float = 1.0) -> torch.Tensor:
    """Collective: compute ``log_probs`` of all ``total`` response tokens of the batch.

    Returns FP32 [total] on the host, on every rank.
    """
    return _gathered(model, _without_gradient(model, batches, _log_probs_head(model, temperature), _placed), total)


def values(model: Model, batches: Batches) -> list[torch.Tensor]:
    """Compute the value before each response token with a model that has a scalar head.

    Each micro-batch has FP32 values [R], or [R, labels] with several labels. Pipeline stages and context parallelism
    are as in ``log_probs``.

    The value of a complete sequence is the value before one more token. To get it, append any token as the response.
    """
    return _without_gradient(model, batches, partial(_values_of_hidden, model), _outputs)


def all_values(model: Model, batches: Batches, total: int) -> torch.Tensor:
    """Collective: compute ``values`` of all ``total`` response tokens of the batch.

    Returns FP32 [total], or [total, labels] with several labels, on the host, on every rank.
    """
    return _gathered(model, _without_gradient(model, batches, partial(_values_of_hidden, model), _placed), total)


def loss_sums(model: Model, batches: Batches, loss: LossFunction, temperature: float = 1.0) -> dict[str, float]:
    """Collective: compute the metric sums that ``accumulate_gradients`` returns, without computing gradients."""

    def sums(output: torch.Tensor, batch: MicroBatch) -> dict[str, torch.Tensor]:
        value, metrics = loss(output, batch)
        return {**metrics, "loss": value}

    return reduce_metrics(model, _without_gradient(model, batches, _log_probs_head(model, temperature), sums))


def _log_probs_head(model: Model, temperature: float, entropies: Entropies = "none") -> Callable[..., torch.Tensor]:
    return partial(_log_probs_of_hidden, model, temperature, entropies)


def _outputs(output: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
    return output


def _placed(output: torch.Tensor, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
    return batch.places, output


def _gathered(model: Model, outputs: list[tuple[torch.Tensor, torch.Tensor]], total: int) -> torch.Tensor:
    """Collective: gather the outputs of all ranks into one tensor, each at its place. The places are in no order.

    The all-reduce sums the outputs of all ranks. Each token is on exactly one data- and context-parallel rank of the
    last pipeline stage, so the sum is exact.
    """
    shape = (total,) if model.labels == 1 else (total, model.labels)
    gathered = torch.zeros(shape, device=platform.current().device())
    if model.parallel.is_last_stage and model.parallel.tensor_rank == 0:
        for places, output in outputs:
            gathered[places] = output
    dist.all_reduce(gathered)
    return gathered.cpu()


def accumulate_gradients(
    model: Model,
    batches: Batches,
    loss: LossFunction,
    temperature: float = 1.0,
    entropies: Entropies = "none",
) -> dict[str, float]:
    """Add the batch's gradients, reduced over all groups, to the parameters. Returns the metric sums of the full batch.

    ``loss`` must already be divided by the counts of the full batch (see ``recipes.algorithms.aggregation``). Gradients
    are summed over micro-batches and data-parallel ranks, so the update depends on neither. ``loss`` gets the log-probs
    [R]. With ``entropies`` it gets [2, R]: the log-probs, then the entropies of the distributions. For a model with a
    scalar head it gets the values [R], or [R, labels] with several labels.
    """
    for chunk in model.chunks:
        # ``offload.release_gradients`` may have freed them.
        chunk.restore_grad_buffers(synchronize=False)
        chunk.zero_grad_buffer()
    model.config.finalize_model_grads_func = lambda chunks, tokens, **kwargs: finalize_model_grads(
        chunks, None, **kwargs
    )

    def loss_of(batch: MicroBatch) -> Callable[..., Any]:
        def with_metrics(output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
            value, metrics = loss(output, batch)
            return value, torch.ones((), dtype=torch.int), {**metrics, "loss": value.detach()}

        return with_metrics

    head = _log_probs_head(model, temperature, entropies)
    if model.is_scalar:
        head = partial(_values_of_hidden, model)
    return reduce_metrics(model, _run(model, batches, head, loss_of, forward_only=False))


def reduce_metrics(model: Model, sums: list[dict[str, torch.Tensor]]) -> dict[str, float]:
    """Sum the metrics over micro-batches and over data- and context-parallel ranks. Every rank gets the result.

    For a metric whose name ends with ``/max``, the result is the maximum.
    """
    local: dict[str, float] = {}
    if model.parallel.is_last_stage and model.parallel.tensor_rank == 0:
        for entry in sums:
            # One copy to the host for all values, because each copy makes the host wait.
            numbers = torch.stack([value.double() for value in entry.values()]).tolist()
            add_metrics(local, dict(zip(entry, numbers, strict=True)))
    total: dict[str, float] = {}
    for of_rank in all_gather_json(local, parallel.control_group()):
        add_metrics(total, of_rank)
    return total


def add_metrics(total: dict[str, float], more: Mapping[str, float]) -> None:
    """Add ``more`` to ``total``, in place. For a metric whose name ends with ``/max``, keep the greater value."""
    for name, value in more.items():
        if name.endswith("/max"):
            total[name] = max(total.get(name, value), value)
        else:
            total[name] = total.get(name, 0.0) + value


def _without_gradient(
    model: Model, batches: Batches, head: Callable[..., torch.Tensor], kept: Callable[[torch.Tensor, MicroBatch], Any]
) -> list[Any]:
    """Run the forward passes and apply ``kept`` to the output of each micro-batch. Returns the results.

    The list is empty on all pipeline stages but the last.
    """

    def keep(batch: MicroBatch) -> Callable[..., Any]:
        return lambda output, non_loss_data=False: kept(output.detach(), batch)

    with torch.no_grad():
        return _run(model, batches, head, keep, forward_only=True, collect_non_loss_data=True)


def _run(
    model: Model,
    batches: Batches,
    head: Callable[..., torch.Tensor],
    loss_of: Callable[[MicroBatch], Any],
    **options: Any,
) -> list[Any]:
    def forward(iterator: Iterator[MicroBatch], chunk: torch.nn.Module) -> tuple[torch.Tensor, Any]:
        batch = next(iterator)
        length = batch.tokens.shape[1] * model.parallel.config.context
        assert length == (model.pack_tokens or length), f"{length} tokens, parallel.constant_length={model.pack_tokens}"
        images = {} if batch.vision is None else {"vision": batch.vision}
        output = chunk(
            **images,
            input_ids=batch.tokens,
            position_ids=batch.positions,
            attention_mask=None,
            packed_seq_params=batch.packed,
            output_processor=head,
            output_processor_context=batch,
        )
        return output, loss_of(batch)

    def read() -> Generator[MicroBatch]:
        yield from batches

    # Closed explicitly, because a pass that raises leaves the generator unfinished.
    with closing(read()) as reading:
        # Each virtual stage reads all micro-batches. A micro-batch is freed when all virtual stages have read it.
        iterators = tee(reading, len(model.chunks))
        return get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=list(iterators) if len(model.chunks) > 1 else iterators[0],
            model=model.chunks if len(model.chunks) > 1 else model.chunks[0],
            num_microbatches=len(batches),
            # The length of a pack on all context-parallel ranks together. It is not used where packs differ in length:
            # stages then send each other the shapes.
            seq_length=model.pack_tokens or model.parallel.config.micro_batch_tokens,
            micro_batch_size=1,
            **options,
        )


def _log_probs_of_hidden(
    model: Model,
    temperature: float,
    entropies: Entropies,
    *,
    hidden_states: Any,
    output_layer: Any,
    output_weight: Any,
    context: Any,
    **_: Any,
) -> torch.Tensor:
    """Hidden states [T(/TP), 1, H] → log-probs [R], or [2, R]: log-probs, then entropies.

    Logits are computed only where a response token is predicted. Padded vocabulary columns are excluded from the
    softmax.
    """
    batch: MicroBatch = context
    if model.config.sequence_parallel:
        hidden = gather_from_sequence_parallel_region(hidden_states, tensor_parallel_output_grad=True)
    else:
        hidden = copy_to_tensor_model_parallel_region(hidden_states)
    weight = output_layer.weight if output_weight is None else output_weight
    linear = linear_with_grad_accumulation_and_async_allreduce if weight.requires_grad else linear_with_frozen_weight
    logits = linear(
        input=hidden.index_select(0, batch.predict),
        weight=weight,
        bias=None,
        gradient_accumulation_fusion=model.config.gradient_accumulation_fusion,
        allreduce_dgrad=False,  # the gather's (or copy's) backward reduces
        sequence_parallel=False,
        tp_group=None,
    ).float()
    if temperature != 1.0:
        logits = logits / temperature
    valid = model.sharding.vocab - model.parallel.tensor_rank * weight.shape[0]
    if valid < weight.shape[0]:
        padding = torch.arange(weight.shape[0], device=logits.device) >= valid
        logits = logits.masked_fill(padding, torch.finfo(logits.dtype).min)
    # The entropy is computed before the cross-entropy, which overwrites the logits.
    entropy = None
    if entropies != "none":
        of_entropy = logits if entropies == "trained" else logits.detach()
        entropy = vocab_parallel_entropy(of_entropy.squeeze(1), mpu.get_tensor_model_parallel_group())
    log_probs = -vocab_parallel_cross_entropy(logits, batch.targets.unsqueeze(1)).squeeze(1)
    return log_probs if entropy is None else torch.stack([log_probs, entropy])


def _values_of_hidden(model: Model, *, hidden_states: Any, output_layer: Any, context: Any, **_: Any) -> torch.Tensor:
    """Hidden states [T(/TP), 1, H] → values [R], or [R, labels] with several labels."""
    batch: MicroBatch = context
    hidden = hidden_states
    if model.config.sequence_parallel:
        # Every rank computes all values with the complete head, so every rank has the head's complete gradient. Each
        # rank keeps its slice of the hidden states' gradient.
        hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
    values: torch.Tensor = output_layer(hidden.squeeze(1).index_select(0, batch.predict))
    return values


@contextmanager
def swapped_weights(model: Model, weights: list[torch.Tensor], own: HostBuffers) -> Iterator[None]:
    """Run the model with other weights, then restore its own weights bit for bit.

    ``weights`` are on the host (for example those of the reference policy). ``own`` has the model's own weights in the
    meantime.
    """
    own_weights = own.copy(_weights(model))
    try:
        _assign(model, weights)
        yield
    finally:
        _assign(model, own_weights)


def copy_weights(model: Model) -> list[torch.Tensor]:
    """Copy this rank's weights to the host, in shard order."""
    return HostBuffers().copy(_weights(model))


def load_weights(model: Model, folder: Path) -> list[torch.Tensor]:
    """Load the weights of another checkpoint in this rank's layout. Returns host tensors in shard order."""
    tensors = platform.current().empty_on_host(_weights(model))
    host = [Shard(s.name, tensor, s.blocks) for s, tensor in zip(model.shards, tensors, strict=True)]
    hf_checkpoint.load(host, folder)
    return tensors


def _weights(model: Model) -> list[torch.Tensor]:
    return [shard.tensor for shard in model.shards]


def _assign(model: Model, weights: list[torch.Tensor]) -> None:
    with torch.no_grad():
        for shard, weight in zip(model.shards, weights, strict=True):
            shard.tensor.copy_(weight, non_blocking=True)
