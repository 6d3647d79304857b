"""What a step of the loop costs on any number of GPUs: a roofline, the trainer's operations, failures.

Plain Python: nothing here runs a model or reads a file. ``cost`` gives constants and a recipe.
"""

import heapq
import math
import random
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Any

GIB = 2**30
STATE_BYTES = 14  # of a parameter in a checkpoint: its BF16 weight, FP32 master and moments
LATENCY = 0.75  # of generation, from which on the longest response alone bounds it
SCHEDULES = ("colocated", "split", "asynchronous")


@dataclass(frozen=True)
class Machine:
    """conf/scale's ``machine`` and the links of conf/simulate; units are in the names."""

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
        """``size`` bytes shared out over the nodes of ``gpus``, to or from the file system."""
        nodes = math.ceil(gpus / self.gpus_per_node)
        node, cluster = (
            (self.write_gb_s, self.cluster_write_gb_s) if writing else (self.read_gb_s, self.cluster_read_gb_s)
        )
        return size / 1e9 / min(nodes * node, math.ceil(nodes / self.nodes_per_cluster) * cluster)


@dataclass(frozen=True)
class Shapes:
    """A model's sizes and its operations forward: of a token, of a sequence's tokens squared (causal attention), of a
    token that the output layer meets. Backward takes twice as many, in attention 2.5 times (arXiv 2307.08691)."""

    parameters: int
    layers: int
    kv_heads: int
    head_dim: int
    token: int
    square: int
    response: int

    def forward(self, tokens: float, squares: float, responses: float) -> float:
        return self.token * tokens + self.square * squares + self.response * responses

    def training(self, tokens: float, squares: float, responses: float) -> float:
        return 3 * self.token * tokens + 3.5 * self.square * squares + 3 * self.response * responses


def shapes(architecture: Mapping[str, Any]) -> Shapes:
    """From a Hugging Face config.json. A vision tower counts as weights; its operations are left out."""
    text = architecture.get("text_config", architecture)
    hidden, layers, vocabulary = text["hidden_size"], text["num_hidden_layers"], text["vocab_size"]
    heads, kv_heads = text["num_attention_heads"], text["num_key_value_heads"]
    head_dim = text.get("head_dim") or hidden // heads
    layer = 2 * hidden * (heads + kv_heads) * head_dim + 3 * hidden * text["intermediate_size"]
    tower = 0
    if vision := architecture.get("vision_config"):
        matrices = 3 if vision["hidden_act"] == "silu" else 2  # with a gate or without
        width, depth = vision["hidden_size"], vision.get("depth") or vision["num_hidden_layers"]
        tower = depth * (4 * width**2 + matrices * width * vision["intermediate_size"])
    tied = architecture.get("tie_word_embeddings", False)
    return Shapes(
        parameters=layers * layer + (1 if tied else 2) * vocabulary * hidden + tower,
        layers=layers,
        kv_heads=kv_heads,
        head_dim=head_dim,
        token=2 * layers * layer,
        square=2 * layers * heads * head_dim,
        response=2 * hidden * vocabulary,
    )


@dataclass(frozen=True)
class Job:
    """A recipe. ``passes``: forward passes for log-probs; ``kv_cache_gib``: of a GPU with the trainer beside it."""

    tensor: int
    pipeline: int
    context: int
    micro_batch_tokens: int
    prompts: int
    samples: int
    updates: int
    passes: int
    engine_tensor: int
    slots: int
    kv_cache_gib: float
    prompt_limit: int
    response_limit: int

    @property
    def replica(self) -> int:
        """GPUs of one replica of the trainer's model."""
        return self.tensor * self.pipeline * self.context


# Lengths


def log_normal(mean: float, p99: float, limit: float) -> tuple[float, float]:
    """Mean and deviation of the logarithm, for a mean *after* what is longer than ``limit`` has been cut off there, and
    a 99th percentile before. ValueError when no log-normal has both."""
    z99 = NormalDist().inv_cdf(0.99)

    def cut_mean(deviation: float) -> float:
        middle = math.log(p99) - z99 * deviation
        z = (math.log(limit) - middle) / deviation
        below = math.exp(middle + deviation**2 / 2) * NormalDist().cdf(z - deviation)
        return below + limit * (1 - NormalDist().cdf(z))

    low, high = 1e-9, z99  # the mean falls up to there, whatever the limit: beyond, the tail makes it grow again
    if not cut_mean(high) <= mean <= cut_mean(low) * (1 + 1e-9):
        raise ValueError(
            f"mean={mean}, p99={p99}: no log-normal cut off at {limit} has both; use a mean between "
            f"{cut_mean(high):.0f} and {cut_mean(low):.0f}, or another p99"
        )
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if cut_mean(middle) > mean else (low, middle)
    return math.log(p99) - z99 * low, low


@dataclass(frozen=True)
class Group:
    """A prompt's tokens and those of each of its responses."""

    prompt: int
    responses: tuple[int, ...]


def draw(job: Job, prompts: int, lengths: Mapping[str, Mapping[str, float]], seed: int) -> list[Group]:
    """A batch. Half of a response's variance is its prompt's, shared by the samples of a group (our choice)."""
    noise = random.Random(seed)
    prompt = log_normal(**lengths["prompt"], limit=job.prompt_limit)
    middle, deviation = log_normal(**lengths["response"], limit=job.response_limit)
    half = deviation / math.sqrt(2)
    cut = lambda value, limit: max(1, min(limit, round(math.exp(value))))  # noqa: E731
    groups = []
    for _ in range(prompts):
        own = noise.gauss(middle, half)
        responses = tuple(cut(noise.gauss(own, half), job.response_limit) for _ in range(job.samples))
        groups.append(Group(cut(noise.gauss(*prompt), job.prompt_limit), responses))
    return groups


# Generation


@dataclass(frozen=True)
class Engine:
    """One engine by roofline; bytes and operations are one GPU's of its tensor-parallel group, per second those that
    are reached."""

    weights: float
    kv: float  # bytes of a token
    operations: float  # of a token through the matrices
    square: float  # of a token and one of those before it
    slots: int
    capacity: int  # tokens that the KV cache holds
    bytes_s: float
    operations_s: float
    overhead_s: float  # of a step

    def step(self, sequences: float, tokens: float) -> dict[str, float]:
        """Seconds of a decoding step by what they go to; ``tokens`` are in the cache: the greater of memory and
        arithmetic, and what comes with every step."""
        weights, kv = self.weights / self.bytes_s, tokens * self.kv / self.bytes_s
        arithmetic = (sequences * self.operations + tokens * self.square) / self.operations_s
        spent = {"arithmetic": arithmetic} if arithmetic > weights + kv else {"weights": weights, "KV cache": kv}
        return {**spent, "overhead": self.overhead_s}

    def prefill(self, tokens: int) -> float:
        return (tokens * self.operations + tokens**2 / 2 * self.square) / self.operations_s


def engine(job: Job, model: Shapes, machine: Machine, disaggregated: bool) -> Engine:
    """An engine of a job, on GPUs of its own or beside the trainer."""
    t, heads = job.engine_tensor, max(1, model.kv_heads // job.engine_tensor)
    kv = 2 * model.layers * heads * model.head_dim * 2
    gib = machine.disaggregated_kv_cache_gib if disaggregated else job.kv_cache_gib
    return Engine(
        weights=2 * model.parameters / t,
        kv=kv,
        operations=(model.token + model.response) / t,
        square=2 * model.square / t,  # a token meets all before it; of a sequence's squares causal attention has half
        slots=job.slots,
        capacity=int(gib * GIB / kv),
        bytes_s=machine.hbm_gb_s * 1e9 * machine.hbm_share,
        operations_s=machine.peak_tflops * 1e12 * machine.prefill_share,
        overhead_s=machine.decode_ms / 1e3 + (2 * model.layers * machine.all_reduce_us / 1e6 if t > 1 else 0),
    )


@dataclass
class Generation:
    """Seconds until the last response; those of the longest one alone on an engine; when each ended; where the slowest
    engine's time went."""

    seconds: float = 0.0
    alone: float = 0.0
    ends: list[float] = field(default_factory=list)
    spent: dict[str, float] = field(default_factory=lambda: defaultdict(float))


def generate_on(engine: Engine, groups: Sequence[Group]) -> Generation:
    """Continuous batching on one engine, event by event: all are asked at once, a sequence enters when there is a slot
    and room in the cache, a prompt is prefilled once for its samples, and where the cache fills up the newest sequence
    leaves and is prefilled again later. A sequence is (tokens there are, tokens to come, tokens to prefill)."""
    waiting: deque[tuple[int, int, int]] = deque()
    for group in groups:
        waiting.extend((group.prompt, n, 0 if i else group.prompt) for i, n in enumerate(group.responses))
    running: list[tuple[int, int, int, int]] = []  # heap: step at which it ends, order of entry, tokens then, entered
    found, step, entered, tokens, may_enter = Generation(), 0, 0, 0, True
    while waiting or running:
        while may_enter and waiting and len(running) < engine.slots and tokens + waiting[0][0] < engine.capacity:
            there, to_come, prefilled = waiting.popleft()
            if there + to_come > engine.capacity:
                raise ValueError(f"a KV cache of {engine.capacity} tokens holds no sequence of {there + to_come}")
            found.seconds += (seconds := engine.prefill(prefilled))
            found.spent["prefill"] += seconds
            heapq.heappush(running, (step + to_come, entered, there + to_come, step))
            tokens, entered = tokens + there, entered + 1
        n, steps = len(running), min(running[0][0] - step, max(0, (engine.capacity - tokens) // len(running)))
        for name, seconds in engine.step(n, tokens + n * (steps - 1) / 2).items():
            found.spent[name] += steps * seconds
            found.seconds += steps * seconds
        step, tokens = step + steps, tokens + n * steps
        if running[0][0] > step:  # the cache is full
            newest = max(running, key=lambda one: one[1])
            running.remove(newest)
            heapq.heapify(running)
            there = newest[2] - (newest[0] - step)
            waiting.appendleft((there, newest[0] - step, there))
            tokens, may_enter = tokens - there, False
        while running and running[0][0] == step:
            tokens -= heapq.heappop(running)[2]
            found.ends.append(found.seconds)
            may_enter = True
    return found


def generate(engine: Engine, engines: int, groups: Sequence[Group], limit: int) -> Generation:
    """On several, as ``rollout.sampler.assign`` deals them out: a prompt's samples on one engine, dearest prompt first
    to the least loaded, by what each sample may still get (``limit``)."""
    loads = [(0, i) for i in range(engines)]
    shares: list[list[Group]] = [[] for _ in range(engines)]
    for group in sorted(groups, key=lambda group: -group.prompt):
        load, i = heapq.heappop(loads)
        shares[i].append(group)
        heapq.heappush(loads, (load + group.prompt + limit * len(group.responses), i))
    each = [generate_on(engine, share) for share in shares if share]
    slowest = max(each, key=lambda one: one.seconds)
    prompt, longest = max(((g.prompt, max(g.responses)) for g in groups), key=lambda pair: pair[1])
    alone = engine.prefill(prompt) + longest * sum(engine.step(1, prompt + (longest - 1) / 2).values())
    return Generation(slowest.seconds, alone, sorted(end for one in each for end in one.ends), slowest.spent)


def judge(ends: Sequence[float], samples_s: float, latency: float) -> float:
    """Seconds from the last response to the last verdict: judges take samples as they end, one after another."""
    free = 0.0
    for end in ends:
        free = max(free, end) + 1 / samples_s
    return free + latency - ends[-1]


# Trainer


@dataclass(frozen=True)
class Work:
    """A batch for the trainer: tokens, the sum of their sequences' squares, response tokens."""

    tokens: int
    squares: int
    responses: int


def work(groups: Sequence[Group]) -> Work:
    lengths = [group.prompt + n for group in groups for n in group.responses]
    responses = sum(map(sum, (group.responses for group in groups)))
    return Work(sum(lengths), sum(n * n for n in lengths), responses)


def micro_batches(job: Job, work: Work, machine: Machine, gpus: int) -> int:
    """Of a data-parallel rank in one update."""
    tokens = work.tokens / (gpus // job.replica) / job.updates
    return max(1, math.ceil(tokens / job.micro_batch_tokens / machine.packed))


def train(job: Job, model: Shapes, work: Work, machine: Machine, gpus: int) -> dict[str, float]:
    """Seconds of log-probs and of the updates on ``gpus``, by what they go to. The pipeline idles for its stages less
    one in every pass over the micro-batches; gradients are reduced in FP32 and weights gathered, not overlapped."""
    rate = gpus * machine.peak_tflops * 1e12 * machine.mfu
    idle = (job.pipeline - 1) / micro_batches(job, work, machine, gpus)
    sums = work.tokens, work.squares, work.responses
    forward, training = job.passes * model.forward(*sums) / rate, model.training(*sums) / rate
    of_rank, sharing = model.parameters / job.tensor / job.pipeline, gpus // job.tensor // job.pipeline
    swap = 2 * 2 * of_rank / machine.pcie_gb_s / 1e9  # the reference's weights come from the host, the policy's go back
    reduce = job.updates * (4 + 2) * of_rank * (sharing - 1) / sharing / machine.network_gb_s / 1e9
    return {
        "logprobs": forward * (1 + idle) + swap,
        "train": training * (1 + idle) + reduce,
        "pipeline idle": (forward + training) * idle,
        "gradients": reduce,
    }


def sync_seconds(job: Job, model: Shapes, machine: Machine, disaggregated: bool) -> float:
    """What an engine's GPU takes in through its own link, whatever the number of engines: from its node where that has
    a whole replica, else over the network. Within a quarter of the real plans of docs/layouts.md."""
    near = not disaggregated and job.replica <= machine.gpus_per_node
    lacking = 1 - 1 / (job.tensor * job.pipeline) if near else 1
    speed = machine.nvlink_gb_s if near else min(machine.network_gb_s, machine.pcie_gb_s)
    return 2 * model.parameters / job.engine_tensor * lacking / speed / 1e9 + machine.order_ms / 1e3


# Failures


def goodput(step: float, every: int, save: float, mtbf: float, restart: float) -> float:
    """Share of the wall time that is steps kept: a checkpoint of ``save`` seconds each ``every`` steps, failures with
    exponential distances of ``mtbf`` seconds on the mean, each losing what came after the last checkpoint.

    Daly 2006, "A higher order estimate of the optimum checkpoint interval for restart dumps", equation 20; a restart
    may fail too.
    """
    useful = every * step
    if math.isinf(mtbf):
        return useful / (useful + save)
    exponent = (useful + save) / mtbf
    if exponent > 500 or restart / mtbf > 500:
        return 0.0  # no interval is ever finished
    return useful / (mtbf * math.exp(restart / mtbf) * math.expm1(exponent))


def best_interval(step: float, save: float, mtbf: float, restart: float) -> int:
    """Steps between checkpoints with the best goodput: the better neighbour of Daly's optimum."""
    ideal = daly(save, mtbf) / step
    candidates = {max(1, math.floor(ideal)), max(1, math.ceil(ideal))}
    return max(candidates, key=lambda every: goodput(step, every, save, mtbf, restart))


def daly(save: float, mtbf: float) -> float:
    """Seconds of work between checkpoints that lose least: Daly's equation 37, whose first term is Young's (1974)."""
    if save >= 2 * mtbf:
        return mtbf
    x = math.sqrt(save / 2 / mtbf)
    return math.sqrt(2 * save * mtbf) * (1 + x / 3 + x**2 / 9) - save


# Schedules


@dataclass
class Step:
    """One row: seconds by phase, of the whole step, of a checkpoint beyond it, of the copy
    of a checkpoint's states to the hosts. ``trainers`` and ``generators`` are GPUs
    (the same ones when colocated). ``note`` says why there is none, or what the batch is too small for."""

    gpus: int
    schedule: str
    trainers: int = 0
    generators: int = 0
    phases: dict[str, float] = field(default_factory=dict)
    spent: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    alone: float = 0.0
    seconds: float = math.inf
    tokens: float = 0.0
    save: float = 0.0
    copy: float = 0.0
    restart: float = 0.0
    note: str = ""

    @property
    def bound(self) -> str:
        """The phase that is longest, and what most of it goes to."""
        if not self.phases:
            return ""
        p = self.phases
        generating, training = p["generate"] + p["judge"], p["logprobs"] + p["train"]
        if generating >= training:
            if self.alone >= LATENCY * generating:
                return "generation: the longest response"
            causes = {**self.spent, "judges": p["judge"]}
            return f"generation: {max(causes.items(), key=lambda cause: cause[1])[0]}"
        parts = {"pipeline idle": p["pipeline idle"], "gradients": p["gradients"]}
        return (
            f"training: {max({**parts, 'arithmetic': training - sum(parts.values())}.items(), key=lambda i: i[1])[0]}"
        )


def one_step(
    job: Job,
    model: Shapes,
    machine: Machine,
    batches: Sequence[Sequence[Group]],
    schedule: str,
    gpus: int,
    trainers: int,
    sync: float,
) -> Step:
    """The mean of the batches' steps. ``trainers`` of ``gpus`` train; colocated, all do both. Asynchronous is
    ``rollout.staleness=1``: sync, then generation of the next batch beside the trainer's work on this one."""
    disaggregated = schedule != "colocated"
    generators = gpus - trainers if disaggregated else gpus
    served = engine(job, model, machine, disaggregated)
    found = Step(gpus, schedule, trainers, generators, seconds=0.0)
    engines, growth = generators // job.engine_tensor, len(batches[0]) / job.prompts
    sums: dict[str, float] = defaultdict(float)
    for batch in batches:
        made = generate(served, engines, batch, job.response_limit)
        load = work(batch)
        phases = {
            "generate": made.seconds,
            "judge": judge(made.ends, machine.judge_samples_s * growth, machine.judge_latency_s),
            "sync": sync + (0 if disaggregated else machine.switch_s),
            **train(job, model, load, machine, trainers),
        }
        generating, training = phases["generate"] + phases["judge"], phases["logprobs"] + phases["train"]
        both = max(generating, training) if schedule == "asynchronous" else generating + training
        for name, value in {**phases, "step": phases["sync"] + both, "tokens": load.tokens}.items():
            sums[name] += value / len(batches)
        for name, value in made.spent.items():
            found.spent[name] += value / len(batches)
        found.alone += made.alone / len(batches)
    found.seconds, found.tokens = sums.pop("step"), sums.pop("tokens")
    found.phases, size = dict(sums), STATE_BYTES * model.parameters
    save = machine.storage_seconds(size, trainers, writing=True)
    hidden = max(0.0, sums["generate"] + sums["judge"] - sums["logprobs"] - sums["train"])
    found.save = max(0.0, save - hidden) if schedule == "asynchronous" else save
    found.copy = size / trainers / machine.pcie_gb_s / 1e9
    found.restart = machine.restart_s + machine.storage_seconds(size, trainers, writing=False)
    if schedule == "asynchronous":
        found.restart += sums["generate"]  # the first batch is made while the trainer waits
    found.note = too_small(job, min(map(work, batches), key=lambda w: w.tokens), machine, len(batches[0]), trainers)
    if not found.note and engines > len(batches[0]):
        found.note = f"batch too small: {len(batches[0])} prompts for {engines} engines"
    return found


def too_small(job: Job, work: Work, machine: Machine, prompts: int, trainers: int) -> str:
    """Why a batch does not feed the trainer's replicas and stages, or nothing (as recipes.config and the preflight)."""
    replicas, samples = trainers // job.replica, prompts * job.samples // job.updates
    if samples < replicas:
        return f"batch too small: {samples} samples for {replicas} replicas"
    if (count := micro_batches(job, work, machine, trainers)) < job.pipeline:
        return f"batch too small: {count} micro-batches for {job.pipeline} stages"
    return ""


def best_step(
    job: Job,
    model: Shapes,
    machine: Machine,
    batches: Sequence[Sequence[Group]],
    schedule: str,
    gpus: int,
    sync: float,
) -> Step:
    """Colocated, or with the share of trainer GPUs that makes the shortest step: at most 24 of the possible ones."""
    if schedule == "colocated":
        return one_step(job, model, machine, batches, schedule, gpus, gpus - gpus % job.replica, sync)
    node = max(job.replica, job.engine_tensor, machine.gpus_per_node)
    most = (gpus - job.engine_tensor) // node
    if most < 1:
        return Step(gpus, schedule, note=f"no room: a replica and an engine take {node + job.engine_tensor} GPUs")
    counts = sorted({max(1, round(most * i / 24)) for i in range(1, 25)})
    steps = [one_step(job, model, machine, batches, schedule, gpus, count * node, sync) for count in counts]
    fed = [step for step in steps if not step.note] or steps
    return min(fed, key=lambda step: step.seconds)
