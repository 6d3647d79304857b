"""The seconds that a layout adds to a training step of ``scale_model``.

``scale_model`` already counts the pipeline bubble, the bytes that tensor-parallel groups exchange, layers under full
recompute, and the reduction of gradients. It does not know stages with unequal numbers of layers, modules that are
recomputed alone, or what a micro-batch costs apart from its tokens.

An exchange counts as if it did not overlap with any computation. The sums are therefore larger than the steps of
``scale_model``, whose constants were fitted to whole steps. They serve to rank layouts.
"""

from dataclasses import dataclass

from megatron_ext.layout import CORE_ATTENTION, MLP, ParallelConfig, stage_layers
from recipes.preflight import scale_model
from recipes.preflight.scale_model import BF16_BYTES, FP32_BYTES, BatchSize, Job, Machine, ModelShape

# Optimiser bytes of a parameter: the master weight and both moments.
OPTIMIZER_BYTES = 3 * FP32_BYTES
# Collectives of a layer with sequence parallelism. In the forward pass, attention and the MLP each all-gather their
# input and reduce-scatter their output. The backward pass does the reverse of both, and all-gathers the input again for
# the weights' gradients.
FORWARD_COLLECTIVES = 4
BACKWARD_COLLECTIVES = 6
# Without sequence parallelism, one all-reduce takes the place of an all-gather and a reduce-scatter, and the backward
# pass gathers no input again.
BACKWARD_WITHOUT_SEQUENCE = 4
# The collectives among them that scale_model counts bytes for. The two others gather the inputs again.
COUNTED_BACKWARD_COLLECTIVES = 4


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
        """Micro-batches of one data-parallel rank in one update."""
        return scale_model.micro_batches(self.job, self.batch, self.machine, self.gpus)

    @property
    def tokens(self) -> float:
        """Tokens of the step on one context-parallel rank of a replica."""
        return self.batch.tokens / self.sizes.data_parallel(self.gpus) / self.sizes.context

    @property
    def layers(self) -> float:
        """Layers of a pipeline stage, on average."""
        return self.model.layers / self.sizes.pipeline

    @property
    def forward_passes(self) -> float:
        """Forward passes of a layer in a step, on average, with full recomputation. The layer runs backward once."""
        return self.job.passes + 1 + self.job.recompute

    @property
    def recomputes_mlp(self) -> bool:
        """Whether the MLPs are recomputed without the rest of their layers."""
        return self.sizes.recompute == "selective" and MLP in self.sizes.recompute_modules


def layout_seconds(training: Training) -> dict[str, float]:
    """The seconds that the layout adds to ``scale_model.training_seconds`` of the batch, by cause."""
    return {
        "selective recompute": recompute_seconds(training),
        "uneven stages": uneven_seconds(training),
        "weights": weights_seconds(training),
        "tensor latency": latency_seconds(training),
        "tensor gather": gather_seconds(training),
        "context exchange": context_seconds(training),
        "pipeline exchange": pipeline_seconds(training),
        "offload": offload_seconds(training),
    }


def recompute_seconds(training: Training) -> float:
    """Seconds of the modules that selective recompute runs again. An MLP has half of the collectives of its layer."""
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
    """Seconds of the layers that the largest stage has beyond an even share. The other stages wait for it."""
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


def weights_seconds(training: Training) -> float:
    """Seconds in which a GPU moves its weights and their gradients through its memory, once per micro-batch.

    A forward pass reads the BF16 weights, and so does the backward pass. Its products are added to FP32 gradients,
    which are read and written. If Transformer Engine does not fuse this addition, each product is written first, in
    BF16, and read again. A pipeline's idle time is longer by the same share as the passes.
    """
    job = training.job
    model = training.model
    machine = training.machine
    passes = job.passes + job.recompute + 2
    if training.recomputes_mlp:
        passes += model.mlp_flops / model.token_flops
    read = passes * BF16_BYTES
    accumulated = 2 * FP32_BYTES
    if not training.sizes.gradient_accumulation_fusion:
        accumulated += 2 * BF16_BYTES
    parameters = model.parameters / job.tensor / job.pipeline
    bubble = (job.pipeline - 1) / job.virtual_pipeline / training.micro_batches
    micro_batches = job.updates * training.micro_batches * (1 + bubble)
    return micro_batches * parameters * (read + accumulated) / machine.hbm_gb_s / machine.hbm_share / 1e9


def latency_seconds(training: Training) -> float:
    """Seconds of the latency of the tensor-parallel collectives, which does not depend on their size."""
    sizes = training.sizes
    if sizes.tensor == 1:
        return 0.0
    of_backward = BACKWARD_COLLECTIVES if sizes.sequence else BACKWARD_WITHOUT_SEQUENCE
    forward_passes = training.forward_passes
    if training.recomputes_mlp:
        forward_passes += 0.5  # half of a layer's collectives are its MLP's
    collectives = forward_passes * FORWARD_COLLECTIVES + of_backward
    micro_batches = training.job.updates * training.micro_batches
    return training.layers * collectives * micro_batches * training.machine.all_reduce_us / 1e6


def gather_seconds(training: Training) -> float:
    """Seconds of the all-gathers that repeat a layer's inputs in the backward pass, for the weights' gradients."""
    if not training.sizes.sequence:
        return 0.0
    of_forward = scale_model.tensor_parallel_seconds(
        training.job, training.model, training.batch, training.machine, training.gpus
    )
    repeated = BACKWARD_COLLECTIVES - COUNTED_BACKWARD_COLLECTIVES
    return of_forward * repeated / FORWARD_COLLECTIVES


def context_seconds(training: Training) -> float:
    """Seconds in which a context-parallel rank receives keys and values from the other ranks.

    The backward pass receives them once more, and their gradients.
    """
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
    """Seconds of the hidden states that a stage sends to the next one, once for each of its chunks, and of their
    gradients. Each message has a latency."""
    sizes = training.sizes
    machine = training.machine
    if sizes.pipeline == 1:
        return 0.0
    cut = sizes.tensor if sizes.sequence else 1
    sent = training.tokens * training.model.hidden_size * training.job.activation_bytes / cut
    # A rank of the next stage is one stage's number of ranks away.
    within_node = training.gpus // sizes.pipeline < machine.gpus_per_node
    link_gb_s = machine.nvlink_gb_s if within_node else machine.network_gb_s
    passes = training.job.passes + 2
    messages = training.job.updates * training.micro_batches * passes
    of_chunk = passes * sent / link_gb_s / 1e9 + messages * machine.all_reduce_us / 1e6
    return sizes.virtual_pipeline * of_chunk


def offload_seconds(training: Training) -> float:
    """Seconds of the copies of the optimiser states to the host and back."""
    if not training.offload:
        return 0.0
    states = OPTIMIZER_BYTES * training.model.parameters / training.gpus
    return 2 * states / training.machine.pcie_gb_s / 1e9
