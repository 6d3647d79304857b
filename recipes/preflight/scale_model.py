"""Estimate the seconds of a training step on any number of GPUs, from a roofline, operation counts and failure rates.

The module only computes. It runs no model and reads no file. ``cost`` supplies the constants and the recipe.
"""

import heapq
import math
import random
from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Any, NamedTuple

GIB = 2**30
BF16_BYTES = 2
FP32_BYTES = 4
# The BF16 weight, and in FP32 the master weight and both Adam moments.
CHECKPOINT_BYTES_PER_PARAMETER = 14
# Generation is bound by its longest response if that takes this share of the generation time or more.
LONGEST_RESPONSE_SHARE = 0.75
# Number of divisions into trainer and engine GPUs that are tried at most.
MAX_SPLITS = 24
SCHEDULES = ("colocated", "split", "asynchronous")
# Parts of the phases "logprobs" and "train" that are reported as causes.
TRAINING_PARTS = ("pipeline idle", "tensor parallel", "gradients")


@dataclass(frozen=True)
class Machine:
    """The constants of ``machine`` in conf/scale and the links of conf/simulate. The names contain the units."""

    gpus_per_node: int
    peak_tflops: float
    hbm_gb_s: float
    hbm_share: float
    mfu: float
    prefill_share: float
    decode_ms: float
    all_reduce_us: float
    packed: float
    disaggregated_kv_cache_gib: float
    switch_s: float
    judge_latency_s: float
    judge_samples_s: float
    write_gb_s: float
    read_gb_s: float
    cluster_write_gb_s: float
    cluster_read_gb_s: float
    nodes_per_cluster: int
    mtbf_gpu_hours: float
    restart_s: float
    network_gb_s: float
    pcie_gb_s: float
    nvlink_gb_s: float
    order_ms: float

    def storage_seconds(self, size: float, gpus: int, writing: bool) -> float:
        """Seconds to write or read ``size`` bytes, spread evenly over the nodes of ``gpus``."""
        if writing:
            node_gb_s = self.write_gb_s
            cluster_gb_s = self.cluster_write_gb_s
        else:
            node_gb_s = self.read_gb_s
            cluster_gb_s = self.cluster_read_gb_s
        nodes = math.ceil(gpus / self.gpus_per_node)
        clusters = math.ceil(nodes / self.nodes_per_cluster)
        return size / 1e9 / min(nodes * node_gb_s, clusters * cluster_gb_s)


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a model and the floating-point operations of its forward pass."""

    parameters: int
    layers: int
    hidden_size: int
    kv_heads: int
    head_dim: int
    # Operations of one token in the linear layers of the decoder.
    token_flops: int
    # Causal attention over a sequence of n tokens takes square_flops × n² operations.
    square_flops: int
    # Operations of one token in the output layer.
    output_flops: int

    @property
    def mlp_flops(self) -> int:
        """The part of ``token_flops`` in the MLPs."""
        query = self.square_flops // (2 * self.layers)
        attention_parameters = 2 * self.hidden_size * (query + self.kv_heads * self.head_dim)
        return self.token_flops - 2 * self.layers * attention_parameters

    def forward_flops(self, tokens: float, squares: float, output_tokens: float) -> float:
        """Operations of a forward pass. ``squares`` is the sum of the squared sequence lengths."""
        return self.token_flops * tokens + self.square_flops * squares + self.output_flops * output_tokens

    def training_flops(self, tokens: float, squares: float, output_tokens: float) -> float:
        """Operations of a forward and a backward pass.

        The backward pass takes twice as many as the forward pass, and 2.5 times as many in attention (arXiv
        2307.08691).
        """
        return 3 * self.token_flops * tokens + 3.5 * self.square_flops * squares + 3 * self.output_flops * output_tokens


def model_shape(architecture: Mapping[str, Any]) -> ModelShape:
    """The shape that a Hugging Face config.json describes.

    The weights of a vision tower are counted. Its operations are not.
    """
    text = architecture.get("text_config", architecture)
    hidden = text["hidden_size"]
    layers = text["num_hidden_layers"]
    heads = text["num_attention_heads"]
    kv_heads = text["num_key_value_heads"]
    head_dim = text.get("head_dim") or hidden // heads

    attention_parameters = 2 * hidden * (heads + kv_heads) * head_dim
    mlp_parameters = 3 * hidden * text["intermediate_size"]
    layer_parameters = attention_parameters + mlp_parameters
    embedding_parameters = text["vocab_size"] * hidden
    embeddings = 1 if architecture.get("tie_word_embeddings", False) else 2
    vision_parameters = 0
    if "vision_config" in architecture:
        vision_parameters = _vision_parameters(architecture["vision_config"])
    return ModelShape(
        parameters=layers * layer_parameters + embeddings * embedding_parameters + vision_parameters,
        layers=layers,
        hidden_size=hidden,
        kv_heads=kv_heads,
        head_dim=head_dim,
        token_flops=2 * layers * layer_parameters,
        square_flops=2 * layers * heads * head_dim,
        output_flops=2 * embedding_parameters,
    )


def _vision_parameters(vision: Mapping[str, Any]) -> int:
    width = vision["hidden_size"]
    depth = vision.get("depth") or vision["num_hidden_layers"]
    mlp_matrices = 3 if vision["hidden_act"] == "silu" else 2  # a gated MLP has a third matrix
    return depth * (4 * width**2 + mlp_matrices * width * vision["intermediate_size"])


@dataclass(frozen=True)
class Job:
    """The settings of a recipe that the estimate depends on."""

    tensor: int
    pipeline: int
    virtual_pipeline: int
    context: int
    # Share of the layers whose forward pass runs again before their backward pass. It is the share of the pipeline
    # stage with the largest one, for which the other stages wait.
    recompute: float
    micro_batch_tokens: int
    # Bytes of an element of a hidden state.
    activation_bytes: int
    prompts: int
    samples: int
    updates: int
    # Forward passes for log-probs in a step.
    passes: float
    # The part of ``passes`` under the reference: at most 1, and less if not every step makes this pass.
    reference: float
    engine_tensor: int
    # Bytes of one of an engine's weights.
    engine_weight_bytes: int
    # Bytes of an element of a key or a value in an engine's KV cache.
    engine_kv_bytes: int
    # Sequences that an engine decodes at once.
    slots: int
    # KV cache on each GPU that an engine shares with the trainer.
    kv_cache_gib: float
    prompt_limit: int
    response_limit: int

    @property
    def model_parallel(self) -> int:
        """GPUs of one replica of the trainer's model."""
        return self.tensor * self.pipeline * self.context


# Sequence lengths


def fit_log_normal(mean: float, p99: float, limit: float) -> tuple[float, float]:
    """Mean and standard deviation of the logarithm of a length, for a log-normal distribution.

    Args:
        mean: mean length in tokens once longer sequences are truncated to ``limit``.
        p99: 99th percentile of the length in tokens before truncation.
        limit: tokens.

    Raises:
        ValueError: no log-normal distribution has both.
    """
    z99 = NormalDist().inv_cdf(0.99)

    def truncated_mean(deviation: float) -> float:
        log_mean = math.log(p99) - z99 * deviation
        z_limit = (math.log(limit) - log_mean) / deviation
        below_limit = math.exp(log_mean + deviation**2 / 2) * NormalDist().cdf(z_limit - deviation)
        return below_limit + limit * (1 - NormalDist().cdf(z_limit))

    # With p99 fixed, the mean falls as the deviation grows to z99, whatever the limit. Beyond z99, the tail raises the
    # mean again.
    low = 1e-9
    high = z99
    least_mean = truncated_mean(high)
    greatest_mean = truncated_mean(low)
    if not least_mean <= mean <= greatest_mean * (1 + 1e-9):
        raise ValueError(
            f"mean={mean}, p99={p99}: no log-normal truncated at {limit} has both; use a mean between "
            f"{least_mean:.0f} and {greatest_mean:.0f}, or another p99"
        )
    for _ in range(100):  # bisection
        middle = (low + high) / 2
        if truncated_mean(middle) > mean:
            low = middle
        else:
            high = middle
    return math.log(p99) - z99 * low, low


@dataclass(frozen=True)
class Group:
    """The tokens of a prompt and of each of its responses."""

    prompt_tokens: int
    response_tokens: tuple[int, ...]


def draw_batch(job: Job, prompts: int, lengths: Mapping[str, Mapping[str, float]], seed: int) -> list[Group]:
    """Draw random lengths for ``prompts`` prompts and their samples.

    ``lengths`` has the arguments of ``fit_log_normal`` for "prompt" and "response". By our choice, half of the variance
    of a response's length belongs to its prompt, so the samples of a group share it.
    """
    generator = random.Random(seed)
    prompt_mean, prompt_deviation = fit_log_normal(**lengths["prompt"], limit=job.prompt_limit)
    response_mean, response_deviation = fit_log_normal(**lengths["response"], limit=job.response_limit)
    half_deviation = response_deviation / math.sqrt(2)  # half of the variance

    def draw_tokens(log_mean: float, deviation: float, limit: int) -> int:
        tokens = round(math.exp(generator.gauss(log_mean, deviation)))
        return max(1, min(limit, tokens))

    groups = []
    for _ in range(prompts):
        group_mean = generator.gauss(response_mean, half_deviation)
        responses = tuple(draw_tokens(group_mean, half_deviation, job.response_limit) for _ in range(job.samples))
        prompt = draw_tokens(prompt_mean, prompt_deviation, job.prompt_limit)
        groups.append(Group(prompt, responses))
    return groups


# Generation


@dataclass(frozen=True)
class Engine:
    """A vLLM engine as a roofline.

    Bytes and operations are those of one GPU of the tensor-parallel group. Bytes and operations per second are what the
    GPU reaches, not its peak.
    """

    weight_bytes: float
    kv_bytes_per_token: float
    # Operations of one token in the linear layers.
    flops_per_token: float
    # Operations of one pair of a query and a key.
    attention_flops: float
    # Sequences that are decoded at once.
    slots: int
    kv_cache_tokens: int
    bytes_per_second: float
    flops_per_second: float
    # Seconds of each decoding step beside memory traffic and arithmetic.
    overhead_seconds: float

    def step_seconds(self, sequences: float, cached_tokens: float) -> dict[str, float]:
        """Seconds of one decoding step by cause: the slower of memory traffic and arithmetic, and the overhead.

        ``cached_tokens`` is the number of tokens of all ``sequences`` in the KV cache.
        """
        weights = self.weight_bytes / self.bytes_per_second
        kv_cache = cached_tokens * self.kv_bytes_per_token / self.bytes_per_second
        flops = sequences * self.flops_per_token + cached_tokens * self.attention_flops
        arithmetic = flops / self.flops_per_second
        if arithmetic > weights + kv_cache:
            return {"arithmetic": arithmetic, "overhead": self.overhead_seconds}
        return {"weights": weights, "KV cache": kv_cache, "overhead": self.overhead_seconds}

    def prefill_seconds(self, tokens: int) -> float:
        return (tokens * self.flops_per_token + tokens**2 / 2 * self.attention_flops) / self.flops_per_second


def engine_of(job: Job, model: ModelShape, machine: Machine, disaggregated: bool) -> Engine:
    """The engine of a job, on GPUs of its own if ``disaggregated``, otherwise on the trainer's."""
    kv_heads_per_gpu = max(1, model.kv_heads // job.engine_tensor)
    keys_and_values = 2 * model.layers * kv_heads_per_gpu * model.head_dim
    kv_bytes_per_token = keys_and_values * job.engine_kv_bytes
    kv_cache_gib = machine.disaggregated_kv_cache_gib if disaggregated else job.kv_cache_gib
    all_reduce_seconds = 0.0
    if job.engine_tensor > 1:
        all_reduce_seconds = 2 * model.layers * machine.all_reduce_us / 1e6
    return Engine(
        weight_bytes=job.engine_weight_bytes * model.parameters / job.engine_tensor,
        kv_bytes_per_token=kv_bytes_per_token,
        flops_per_token=(model.token_flops + model.output_flops) / job.engine_tensor,
        # Causal attention computes half of a sequence's squared pairs, so square_flops is half of a pair's operations.
        attention_flops=2 * model.square_flops / job.engine_tensor,
        slots=job.slots,
        kv_cache_tokens=int(kv_cache_gib * GIB / kv_bytes_per_token),
        bytes_per_second=machine.hbm_gb_s * 1e9 * machine.hbm_share,
        flops_per_second=machine.peak_tflops * 1e12 * machine.prefill_share,
        overhead_seconds=machine.decode_ms / 1e3 + all_reduce_seconds,
    )


@dataclass
class Generation:
    """The seconds of generating a batch."""

    # Until the last response ends.
    seconds: float = 0.0
    # Of the longest response, if an engine decoded nothing else.
    longest_alone: float = 0.0
    # At which each response ends.
    end_times: list[float] = field(default_factory=list)
    # Of the slowest engine.
    seconds_by_cause: dict[str, float] = field(default_factory=lambda: defaultdict(float))


class WaitingSequence(NamedTuple):
    # The prompt and the tokens that were generated before a preemption.
    context_tokens: int
    remaining_tokens: int
    # Tokens that are prefilled on admission.
    prefill_tokens: int


class RunningSequence(NamedTuple):
    """A sequence that is decoded. In a heap of these, the sequence that ends first comes first."""

    end_step: int
    # Number of admissions before this one.
    admission: int
    # Tokens of the prompt and the complete response.
    final_tokens: int


def simulate_engine(engine: Engine, groups: Sequence[Group]) -> Generation:
    """Simulate continuous batching on one engine, event by event.

    All sequences are submitted at once. One is admitted when a slot is free and the KV cache has room for its context.
    A prompt is prefilled once for all of its samples. When the KV cache is full, the newest sequence is preempted, and
    its context is prefilled again on its next admission.

    Raises:
        ValueError: the KV cache cannot hold one of the sequences.
    """
    waiting: deque[WaitingSequence] = deque()
    for group in groups:
        for sample, response_tokens in enumerate(group.response_tokens):
            total_tokens = group.prompt_tokens + response_tokens
            if total_tokens > engine.kv_cache_tokens:
                raise ValueError(
                    f"a KV cache of {engine.kv_cache_tokens} tokens holds no sequence of {total_tokens} tokens"
                )
            prefill_tokens = group.prompt_tokens if sample == 0 else 0
            waiting.append(WaitingSequence(group.prompt_tokens, response_tokens, prefill_tokens))

    generation = Generation()
    running: list[RunningSequence] = []
    step = 0
    admissions = 0
    cached_tokens = 0
    may_admit = True
    while waiting or running:
        while may_admit and waiting and len(running) < engine.slots:
            if cached_tokens + waiting[0].context_tokens >= engine.kv_cache_tokens:
                break
            sequence = waiting.popleft()
            prefill_seconds = engine.prefill_seconds(sequence.prefill_tokens)
            generation.seconds += prefill_seconds
            generation.seconds_by_cause["prefill"] += prefill_seconds
            final_tokens = sequence.context_tokens + sequence.remaining_tokens
            heapq.heappush(running, RunningSequence(step + sequence.remaining_tokens, admissions, final_tokens))
            admissions += 1
            cached_tokens += sequence.context_tokens

        # The set of running sequences stays the same until one ends or the cache is full. All steps until then are
        # computed at once.
        sequences = len(running)
        steps_to_next_end = running[0].end_step - step
        steps_to_full_cache = max(0, (engine.kv_cache_tokens - cached_tokens) // sequences)
        steps = min(steps_to_next_end, steps_to_full_cache)
        mean_cached_tokens = cached_tokens + sequences * (steps - 1) / 2
        for cause, seconds in engine.step_seconds(sequences, mean_cached_tokens).items():
            generation.seconds_by_cause[cause] += steps * seconds
            generation.seconds += steps * seconds
        step += steps
        cached_tokens += sequences * steps

        if steps < steps_to_next_end:  # the cache is full
            newest = max(running, key=lambda sequence: sequence.admission)
            running.remove(newest)
            heapq.heapify(running)
            remaining_tokens = newest.end_step - step
            context_tokens = newest.final_tokens - remaining_tokens
            waiting.appendleft(WaitingSequence(context_tokens, remaining_tokens, prefill_tokens=context_tokens))
            cached_tokens -= context_tokens
            # Admit nothing until a sequence ends: an admission now would only be preempted again.
            may_admit = False
        while running and running[0].end_step == step:
            ended = heapq.heappop(running)
            cached_tokens -= ended.final_tokens
            generation.end_times.append(generation.seconds)
            may_admit = True
    return generation


def simulate_generation(engine: Engine, engines: int, groups: Sequence[Group], response_limit: int) -> Generation:
    """Simulate the generation of a batch by several engines that run at the same time.

    Prompts are assigned as in ``rollout.sampler.assign``. The longest prompt comes first, and each prompt goes with all
    of its samples to the engine with the fewest tokens. A sample counts as ``response_limit`` tokens, because its
    length is not known beforehand.
    """
    assigned: list[list[Group]] = [[] for _ in range(engines)]
    loads = [(0, number) for number in range(engines)]  # a heap of (tokens, engine)
    for group in sorted(groups, key=lambda group: -group.prompt_tokens):
        load, number = heapq.heappop(loads)
        assigned[number].append(group)
        most_tokens = group.prompt_tokens + response_limit * len(group.response_tokens)
        heapq.heappush(loads, (load + most_tokens, number))
    generations = [simulate_engine(engine, share) for share in assigned if share]
    slowest = max(generations, key=lambda generation: generation.seconds)
    return Generation(
        seconds=slowest.seconds,
        longest_alone=longest_alone_seconds(engine, groups),
        end_times=sorted(end for generation in generations for end in generation.end_times),
        seconds_by_cause=slowest.seconds_by_cause,
    )


def longest_alone_seconds(engine: Engine, groups: Sequence[Group]) -> float:
    """Seconds of the longest response if an engine decoded nothing else. This is a lower bound of any generation."""
    group_of_longest = max(groups, key=lambda group: max(group.response_tokens))
    prompt = group_of_longest.prompt_tokens
    longest = max(group_of_longest.response_tokens)
    mean_step_seconds = sum(engine.step_seconds(1, prompt + (longest - 1) / 2).values())
    return engine.prefill_seconds(prompt) + longest * mean_step_seconds


def judge_seconds(end_times: Sequence[float], samples_per_second: float, latency: float) -> float:
    """Seconds from the end of the last response to the last verdict. The judges take the samples as they end."""
    queue_is_free_at = 0.0
    for end in end_times:
        queue_is_free_at = max(queue_is_free_at, end) + 1 / samples_per_second
    return queue_is_free_at + latency - end_times[-1]


# Training


@dataclass(frozen=True)
class BatchSize:
    """The sizes of a batch that the trainer's costs depend on."""

    # Tokens of prompts and responses.
    tokens: int
    # Sum of the squared sequence lengths.
    squares: int
    response_tokens: int


def batch_size(groups: Sequence[Group]) -> BatchSize:
    lengths = [group.prompt_tokens + response for group in groups for response in group.response_tokens]
    return BatchSize(
        tokens=sum(lengths),
        squares=sum(length**2 for length in lengths),
        response_tokens=sum(sum(group.response_tokens) for group in groups),
    )


def micro_batches(job: Job, batch: BatchSize, machine: Machine, gpus: int) -> int:
    """Micro-batches of one data-parallel rank in one update."""
    data_parallel = gpus // job.model_parallel
    tokens_per_rank = batch.tokens / data_parallel / job.updates
    return max(1, math.ceil(tokens_per_rank / job.micro_batch_tokens / machine.packed))


def training_seconds(job: Job, model: ModelShape, batch: BatchSize, machine: Machine, gpus: int) -> dict[str, float]:
    """Seconds of the log-prob passes ("logprobs") and of the updates ("train") on ``gpus``.

    "pipeline idle", "tensor parallel" and "gradients" are parts of these two. Each pass over the micro-batches has a
    pipeline bubble of stages - 1 micro-batches, which v virtual stages make v times smaller (arXiv 2104.04473). The
    reduce-scatter of FP32 gradients and the all-gather of BF16 weights do not overlap with compute.
    """
    flops_per_second = gpus * machine.peak_tflops * 1e12 * machine.mfu
    bubble = (job.pipeline - 1) / job.virtual_pipeline / micro_batches(job, batch, machine, gpus)
    size = (batch.tokens, batch.squares, batch.response_tokens)
    forward_flops = model.forward_flops(*size)
    update_flops = model.training_flops(*size)
    update_flops += job.recompute * model.forward_flops(batch.tokens, batch.squares, output_tokens=0)
    # Of a forward pass. The backward pass has as many.
    collectives = tensor_parallel_seconds(job, model, batch, machine, gpus)
    forward_collectives = job.passes * collectives
    update_collectives = (2 + job.recompute) * collectives
    forward = job.passes * forward_flops / flops_per_second + forward_collectives
    update = update_flops / flops_per_second + update_collectives

    parameters_per_rank = model.parameters / job.tensor / job.pipeline
    # Three copies: the policy's weights go to the host, the reference's come to the GPU for its pass, and the policy's
    # come back.
    swap = job.reference * 3 * BF16_BYTES * parameters_per_rank / machine.pcie_gb_s / 1e9
    shards = gpus // job.tensor // job.pipeline
    reduced_bytes = job.updates * (FP32_BYTES + BF16_BYTES) * parameters_per_rank * (shards - 1) / shards
    gradients = reduced_bytes / machine.network_gb_s / 1e9
    return {
        "logprobs": forward * (1 + bubble) + swap,
        "train": update * (1 + bubble) + gradients,
        "pipeline idle": (forward + update) * bubble,
        "tensor parallel": forward_collectives + update_collectives,
        "gradients": gradients,
    }


def least_training_seconds(job: Job, model: ModelShape, batch: BatchSize, machine: Machine, gpus: int) -> float:
    """A lower bound of :func:`training_seconds` under any layout: the operations alone, without recomputation."""
    size = (batch.tokens, batch.squares, batch.response_tokens)
    flops = job.passes * model.forward_flops(*size) + model.training_flops(*size)
    return flops / (gpus * machine.peak_tflops * 1e12 * machine.mfu)


def tensor_parallel_seconds(job: Job, model: ModelShape, batch: BatchSize, machine: Machine, gpus: int) -> float:
    """Seconds of the collectives of a GPU's tensor-parallel group in a forward pass over ``batch``.

    With sequence parallelism a layer all-gathers its activations and reduce-scatters them, for attention and again
    for the MLP (arXiv 2205.05198, section 4.2.2). Without it, two all-reduces move as much. The collectives do not
    overlap with compute.
    """
    # Tokens that pass through the GPU's stage.
    tokens = batch.tokens * job.tensor * job.pipeline / gpus
    layers = model.layers / job.pipeline
    received_share = (job.tensor - 1) / job.tensor
    received_bytes = 4 * layers * tokens * model.hidden_size * job.activation_bytes * received_share
    link_gb_s = machine.nvlink_gb_s if job.tensor <= machine.gpus_per_node else machine.network_gb_s
    return received_bytes / link_gb_s / 1e9


def sync_seconds(job: Job, model: ModelShape, machine: Machine, disaggregated: bool) -> float:
    """Seconds in which a GPU of an engine receives its weights over its own link, for any number of engines.

    An engine on the trainer's GPUs receives over NVLink if its node holds a model replica, and its GPU already has the
    trainer's shard. Any other engine receives all weights over the network. The result is within a quarter of the plans
    in docs/layouts.md.
    """
    within_node = not disaggregated and job.model_parallel <= machine.gpus_per_node
    if within_node:
        missing_share = 1 - 1 / (job.tensor * job.pipeline)
        link_gb_s = machine.nvlink_gb_s
    else:
        missing_share = 1.0
        link_gb_s = min(machine.network_gb_s, machine.pcie_gb_s)
    weight_bytes = BF16_BYTES * model.parameters / job.engine_tensor
    return weight_bytes * missing_share / link_gb_s / 1e9 + machine.order_ms / 1e3


# Failures


def goodput(step: float, every_steps: int, save: float, mtbf: float, restart: float) -> float:
    """Share of the wall time that goes into steps that no failure discards.

    A failure loses all steps since the last checkpoint. Times between failures are exponentially distributed, and a
    restart can fail too. The formula is equation 20 of Daly 2006, "A higher order estimate of the optimum checkpoint
    interval for restart dumps".

    Args:
        step: seconds of a step.
        every_steps: steps between checkpoints.
        save: seconds of a checkpoint.
        mtbf: mean seconds between failures.
        restart: seconds of a restart.
    """
    useful = every_steps * step
    if math.isinf(mtbf):
        return useful / (useful + save)
    exponent = (useful + save) / mtbf
    if exponent > 500 or restart / mtbf > 500:
        return 0.0  # no interval is ever completed, and exp would overflow
    return useful / (mtbf * math.exp(restart / mtbf) * math.expm1(exponent))


def best_interval(step: float, save: float, mtbf: float, restart: float) -> int:
    """Steps between checkpoints with the highest goodput: Daly's optimum, rounded up or down to the better of both."""
    ideal_steps = daly_interval(save, mtbf) / step
    candidates = {max(1, math.floor(ideal_steps)), max(1, math.ceil(ideal_steps))}
    return max(candidates, key=lambda every_steps: goodput(step, every_steps, save, mtbf, restart))


def daly_interval(save: float, mtbf: float) -> float:
    """Optimal seconds of work between checkpoints, by Daly's equation 37. Its first term is Young's formula (1974)."""
    if save >= 2 * mtbf:
        return mtbf
    x = math.sqrt(save / 2 / mtbf)
    return math.sqrt(2 * save * mtbf) * (1 + x / 3 + x**2 / 9) - save


# Schedules


@dataclass
class StepEstimate:
    """The estimate of a step for one schedule and number of GPUs. All times are in seconds."""

    gpus: int
    schedule: str
    # GPUs that train and GPUs that generate. In the colocated schedule both are the same GPUs.
    trainers: int = 0
    generators: int = 0
    phases: dict[str, float] = field(default_factory=dict)
    # What the layout adds to the training of ``phases``, by cause.
    added: dict[str, float] = field(default_factory=dict)
    generation_causes: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    longest_alone: float = 0.0
    seconds: float = math.inf
    tokens: float = 0.0
    # What writing a checkpoint adds to a step.
    save: float = 0.0
    # The copy of the training state to the hosts' memory.
    copy: float = 0.0
    restart: float = 0.0
    # Why there is no estimate, or for what the batch is too small.
    note: str = ""

    @property
    def training(self) -> float:
        """Seconds of the trainer, with what its layout adds."""
        return trainer_seconds(self.phases) + sum(self.added.values())

    @property
    def bound(self) -> str:
        """The longer of generation and training, and the cause that takes most of its time."""
        if not self.phases:
            return ""
        generating = generating_seconds(self.phases)
        if generating >= self.training:
            if self.longest_alone >= LONGEST_RESPONSE_SHARE * generating:
                return "generation: the longest response"
            causes = {**self.generation_causes, "judges": self.phases["judge"]}
            return f"generation: {max(causes, key=lambda cause: causes[cause])}"
        causes = {name: self.phases[name] for name in TRAINING_PARTS}
        causes["arithmetic"] = trainer_seconds(self.phases) - sum(causes.values())
        causes |= self.added
        return f"training: {max(causes, key=lambda cause: causes[cause])}"


def generating_seconds(phases: Mapping[str, float]) -> float:
    return phases["generate"] + phases["judge"]


def trainer_seconds(phases: Mapping[str, float]) -> float:
    return phases["logprobs"] + phases["train"]


def nothing_added(batch: BatchSize) -> dict[str, float]:
    return {}


def estimate_step(
    job: Job,
    model: ModelShape,
    machine: Machine,
    batches: Sequence[Sequence[Group]],
    schedule: str,
    gpus: int,
    trainers: int,
    sync: float,
    simulate: Callable[[Engine, int, Sequence[Group], int], Generation] = simulate_generation,
    added: Callable[[BatchSize], Mapping[str, float]] = nothing_added,
) -> StepEstimate:
    """The mean step over ``batches`` on ``gpus``, of which ``trainers`` train and the rest generate.

    In the colocated schedule all GPUs generate. The asynchronous schedule is ``rollout.staleness=1``: after the weight
    sync the engines generate the next batch while the trainer works on this one.

    ``sync``: seconds of a weight sync.
    ``simulate``: :func:`simulate_generation`, or a function that caches its results.
    ``added``: seconds that a layout adds to the training of a batch, by cause (``layout_seconds``).
    """
    disaggregated = schedule != "colocated"
    generators = gpus - trainers if disaggregated else gpus
    engines = generators // job.engine_tensor
    engine = engine_of(job, model, machine, disaggregated)
    prompts = len(batches[0])
    # The number of judges grows with the batch.
    judges_per_second = machine.judge_samples_s * (prompts / job.prompts)
    sizes = [batch_size(batch) for batch in batches]
    estimate = StepEstimate(gpus, schedule, trainers, generators, seconds=0.0)
    phase_means: dict[str, float] = defaultdict(float)
    added_means: dict[str, float] = defaultdict(float)
    for batch, size in zip(batches, sizes, strict=True):
        generation = simulate(engine, engines, batch, job.response_limit)
        phases = {
            "generate": generation.seconds,
            "judge": judge_seconds(generation.end_times, judges_per_second, machine.judge_latency_s),
            "sync": sync + (0 if disaggregated else machine.switch_s),
            **training_seconds(job, model, size, machine, trainers),
        }
        more = added(size)
        training = trainer_seconds(phases) + sum(more.values())
        if schedule == "asynchronous":
            both = max(generating_seconds(phases), training)
        else:
            both = generating_seconds(phases) + training
        for cause, seconds in more.items():
            added_means[cause] += seconds / len(batches)
        for name, seconds in phases.items():
            phase_means[name] += seconds / len(batches)
        estimate.seconds += (phases["sync"] + both) / len(batches)
        estimate.tokens += size.tokens / len(batches)
        for cause, seconds in generation.seconds_by_cause.items():
            estimate.generation_causes[cause] += seconds / len(batches)
        estimate.longest_alone += generation.longest_alone / len(batches)
    estimate.phases = dict(phase_means)
    estimate.added = dict(added_means)

    state_bytes = CHECKPOINT_BYTES_PER_PARAMETER * model.parameters
    estimate.save = machine.storage_seconds(state_bytes, trainers, writing=True)
    estimate.copy = state_bytes / trainers / machine.pcie_gb_s / 1e9
    estimate.restart = machine.restart_s + machine.storage_seconds(state_bytes, trainers, writing=False)
    if schedule == "asynchronous":
        # The trainer writes the checkpoint while it would otherwise wait for the engines. After a restart, it waits for
        # its first batch.
        idle = generating_seconds(phase_means) - estimate.training
        estimate.save = max(0.0, estimate.save - max(0.0, idle))
        estimate.restart += phase_means["generate"]
    smallest = min(sizes, key=lambda size: size.tokens)
    estimate.note = why_too_small(job, smallest, machine, prompts, trainers)
    if not estimate.note and engines > prompts:
        estimate.note = f"batch too small: {prompts} prompts for {engines} engines"
    return estimate


def why_too_small(job: Job, batch: BatchSize, machine: Machine, prompts: int, trainers: int) -> str:
    """Why the trainer's replicas or pipeline stages lack work, or "" if they do not.

    The recipe's own checks refuse the same settings.
    """
    replicas = trainers // job.model_parallel
    samples = prompts * job.samples // job.updates
    if samples < replicas:
        return f"batch too small: {samples} samples for {replicas} replicas"
    count = micro_batches(job, batch, machine, trainers)
    if count < job.pipeline:
        return f"batch too small: {count} micro-batches for {job.pipeline} stages"
    return ""


def best_step(
    job: Job,
    model: ModelShape,
    machine: Machine,
    batches: Sequence[Sequence[Group]],
    schedule: str,
    gpus: int,
    sync: float,
) -> StepEstimate:
    """The step on ``gpus``. Unless it is colocated, the number of trainer GPUs is the one with the shortest step.

    At most ``MAX_SPLITS`` numbers are tried.
    """
    if schedule == "colocated":
        trainers = gpus - gpus % job.model_parallel
        return estimate_step(job, model, machine, batches, schedule, gpus, trainers, sync)
    # The number of trainer GPUs is a multiple of this.
    unit = max(job.model_parallel, job.engine_tensor, machine.gpus_per_node)
    most_units = (gpus - job.engine_tensor) // unit
    if most_units < 1:
        needed = unit + job.engine_tensor
        return StepEstimate(gpus, schedule, note=f"no room: a replica and an engine take {needed} GPUs")
    candidates = sorted({max(1, round(most_units * i / MAX_SPLITS)) for i in range(1, MAX_SPLITS + 1)})
    steps = [estimate_step(job, model, machine, batches, schedule, gpus, units * unit, sync) for units in candidates]
    with_enough_work = [step for step in steps if not step.note] or steps
    return min(with_enough_work, key=lambda step: step.seconds)
