"""Seconds that a layout adds to a step of ``scale_model``, which knows its pipeline's idle time, the bytes that its
tensor-parallel groups exchange, the layers that are recomputed in full, and its gradients. It knows no stages of
unequal numbers of layers, and no modules that are recomputed alone.

An exchange counts as if nothing were computed meanwhile, so the sums are for an order of layouts: they are above the
model's own, whose constants were fitted to whole steps.
"""

from dataclasses import dataclass

from megatron_ext.layout import CORE_ATTENTION, MLP, ParallelConfig, stage_layers
from recipes.preflight import scale_model
from recipes.preflight.scale_model import FP32_BYTES, BatchSize, Job, Machine, ModelShape

OPTIMIZER_BYTES = 3 * FP32_BYTES  # of a parameter: master weight and both moments
# Collectives of a layer: attention and feed-forward layer each gather their input and scatter their output. Backward
# does the reverse of both and gathers the input again for the weights' gradients.
FORWARD_COLLECTIVES = 4
BACKWARD_COLLECTIVES = 6
# Without sequence parallelism an all-reduce takes the place of two of them, and nothing is gathered again.
BACKWARD_WITHOUT_SEQUENCE = 4


@dataclass(frozen=True)
class Training:
    """The training of a step under a layout.

    Attributes:
        sizes: the layout; its sizes are also those of ``job``.
        offload: whether the optimiser's states leave for the host in each step.
        job: the settings of the recipe that the cost model depends on.
        model: the model's shape.
        machine: the costs.
        batch: all sequences of the step.
        gpus: of the trainer.
    """

    sizes: ParallelConfig
    offload: bool
    job: Job
    model: ModelShape
    machine: Machine
    batch: BatchSize
    gpus: int

    @property
    def micro_batches(self) -> int:
        """Of an update, on a data-parallel rank."""
        return scale_model.micro_batches(self.job, self.batch, self.machine, self.gpus)

    @property
    def tokens(self) -> float:
        """On one context-parallel rank of a replica."""
        return self.batch.tokens / self.sizes.data_parallel(self.gpus) / self.sizes.context

    @property
    def layers(self) -> float:
        """Of a pipeline rank."""
        return self.model.layers / self.sizes.pipeline

    @property
    def forward_passes(self) -> float:
        """How often a layer runs forward in a step, on average; backward it runs once."""
        return self.job.passes + 1 + self.job.recompute


def layout_seconds(training: Training) -> dict[str, float]:
    """What the layout adds to ``scale_model.training_seconds`` of the batch, in seconds by cause."""
    return {
        "selective recompute": recompute_seconds(training),
        "uneven stages": uneven_seconds(training),
        "tensor latency": latency_seconds(training),
        "context exchange": context_seconds(training),
        "pipeline exchange": pipeline_seconds(training),
        "offload": offload_seconds(training),
    }


def recompute_seconds(training: Training) -> float:
    """Of the modules that selective recompute runs again; a feed-forward layer has half of a layer's collectives."""
    if training.sizes.recompute != "selective":
        return 0.0
    modules = training.sizes.recompute_modules
    machine = training.machine
    model = training.model
    flops = 0.0
    collectives = 0.0
    if CORE_ATTENTION in modules:
        flops += model.forward_flops(0, training.batch.squares, 0)
    if MLP in modules:
        flops += model.mlp_flops * training.batch.tokens
        of_layers = scale_model.tensor_parallel_seconds(training.job, model, training.batch, machine, training.gpus)
        collectives = of_layers / 2
    return flops / (training.gpus * machine.peak_tflops * 1e12 * machine.mfu) + collectives


def uneven_seconds(training: Training) -> float:
    """Of the layers that the stage with most of them has beyond an even share: the other stages wait for it."""
    sizes = training.sizes
    model = training.model
    job = training.job
    batch = training.batch
    most_layers = max(stage_layers(sizes, model.layers, stage) for stage in range(sizes.pipeline))
    beyond_even_share = most_layers / training.layers - 1
    forward_flops = model.forward_flops(batch.tokens, batch.squares, output_tokens=0)
    flops = (job.passes + job.recompute) * forward_flops
    flops += model.training_flops(batch.tokens, batch.squares, output_tokens=0)
    of_operations = flops / (training.gpus * training.machine.peak_tflops * 1e12 * training.machine.mfu)
    collectives = scale_model.tensor_parallel_seconds(job, model, batch, training.machine, training.gpus)
    return beyond_even_share * (of_operations + (job.passes + job.recompute + 2) * collectives)


def latency_seconds(training: Training) -> float:
    """Of starting the collectives among tensor-parallel ranks, whatever their size."""
    sizes = training.sizes
    if sizes.tensor == 1:
        return 0.0
    of_backward = BACKWARD_COLLECTIVES if sizes.sequence else BACKWARD_WITHOUT_SEQUENCE
    collectives = training.forward_passes * FORWARD_COLLECTIVES + of_backward
    micro_batches = training.job.updates * training.micro_batches
    return training.layers * collectives * micro_batches * training.machine.all_reduce_us / 1e6


def context_seconds(training: Training) -> float:
    """Of the keys and values that a context-parallel rank receives from the others, in the backward pass once more and
    with their gradients."""
    sizes = training.sizes
    model = training.model
    machine = training.machine
    heads = max(1, model.kv_heads // sizes.tensor)
    key_and_value = 2 * heads * model.head_dim * training.job.activation_bytes
    received = training.tokens * (sizes.context - 1) * key_and_value
    within_node = sizes.tensor * sizes.context <= machine.gpus_per_node
    link_gb_s = machine.nvlink_gb_s if within_node else machine.network_gb_s
    return training.layers * (training.forward_passes + 2) * received / link_gb_s / 1e9


def pipeline_seconds(training: Training) -> float:
    """Of the hidden states that a stage sends to the next, once for each of its chunks, and of their gradients."""
    sizes = training.sizes
    machine = training.machine
    if sizes.pipeline == 1:
        return 0.0
    cut = sizes.tensor if sizes.sequence else 1
    sent = training.tokens * training.model.hidden_size * training.job.activation_bytes / cut
    # Ranks of neighbouring stages are as many apart as a stage has.
    within_node = training.gpus // sizes.pipeline < machine.gpus_per_node
    link_gb_s = machine.nvlink_gb_s if within_node else machine.network_gb_s
    passes = training.job.passes + 2
    return sizes.virtual_pipeline * passes * sent / link_gb_s / 1e9


def offload_seconds(training: Training) -> float:
    """Of the optimiser's states on their way to the host and back."""
    if not training.offload:
        return 0.0
    states = OPTIMIZER_BYTES * training.model.parameters / training.gpus
    return 2 * states / training.machine.pcie_gb_s / 1e9
