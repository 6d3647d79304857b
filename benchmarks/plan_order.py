"""Checks whether the planner orders layouts as their measured seconds do.

``python -m benchmarks.plan_order [layouts=N]`` has three steps:

1. It measures the costs of computation and communication on this machine and writes them in the form of conf/scale
   (``runs/plan_order/scale.yaml``).
2. It predicts a training step of a small twin under 54 layouts on two ranks. The functions are those that order layouts
   in ``recipes.plan``: the cost model and a layout's additions to it.
3. It runs these steps with Megatron-Core over gloo: log-probs under a reference whose weights come from the host,
   gradients, and the optimiser's update.

It writes ``benchmarks/results/plan_order.json`` with Spearman's correlation of predicted and measured seconds, and
prints the table. Use an idle machine with two cores or more. Each rank has its own core, because on a shared core
another rank would use the time in which a pipeline stage is idle. Engines are not measured.
"""

import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from datetime import timedelta
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table

from benchmarks import figures
from megatron_ext.layout import CORE_ATTENTION, MLP, RECOMPUTE, ParallelConfig
from megatron_ext.processes import die_with
from recipes.command_line import split_arguments
from recipes.config import Config, parse
from recipes.launch.launcher import fork_ranks
from recipes.preflight import scale_model
from recipes.preflight.layout_seconds import Training, layout_seconds, weights_seconds
from recipes.preflight.scale_model import Group, Job, Machine
from recipes.run import records

RESULT = Path("benchmarks/results/plan_order.json")
SCALE = Path("runs/plan_order/scale.yaml")
GOAL = 0.9  # at least: the correlation
RANKS = 2
REPETITIONS = 3  # after one warm-up. The fastest one counts
SEED = 0
SEQUENCES = 16
PROMPT_TOKENS = 32
RESPONSE_TOKENS = (96, 224)
# Tensor, pipeline, virtual and context size. The remaining ranks are data-parallel.
SIZES = ((1, 1, 1, 1), (2, 1, 1, 1), (1, 2, 1, 1), (1, 2, 2, 1), (1, 2, 4, 1), (1, 1, 1, 2))
# From a sequence or two in a micro-batch to all of a replica's sequences in one.
MICRO_BATCH_TOKENS = (256, 1024, 4096)
USUAL_TOKENS = 1024
SMALL_TOKENS = 256  # with the usual tokens, they tell what a micro-batch costs apart from its tokens
TWIN: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": 8192,
    "max_position_embeddings": 1024,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": False,
}
PLAIN = (1, 1, 1, 1)  # the layout that measures the share of the peak and the memory's bandwidth
FILLER_SIZE = 256  # of the matrices that fill a core's idle time


def main() -> None:
    made_by = figures.source("benchmarks.plan_order", recipes=["demo"])
    cores = len(os.sched_getaffinity(0))
    if cores < RANKS:
        sys.exit(f"error: {cores} core here: each of the {RANKS} ranks needs one of its own")
    wanted = layouts_wanted(sys.argv[1:])
    with initialize_config_dir(str(Path("conf").resolve()), version_base="1.3"):
        config = parse(compose("config", ["recipe=demo"]))

    from megatron_ext import platform

    platform.activate("cpu")
    import torch

    if "RANK" not in os.environ:
        fork_ranks(RANKS)
    torch.set_num_threads(1)
    occupy_core(int(os.environ["RANK"]))
    bench = Bench(config)
    machine = bench.measure_machine()
    if bench.rank == 0:
        write_scale(SCALE, machine)
    rows = []
    for sizes in wanted:
        seconds = bench.measure(sizes, bench.batch(SEED), REPETITIONS)["step"]
        rows.append({**described(sizes), "measured": seconds, **predict(sizes, machine, bench.element_bytes)})
    if bench.rank > 0:
        return
    result = {
        **records.environment(platform.current().machine(), RANKS),
        "goal": GOAL,
        "twin": TWIN,
        "machine_costs": {name: value for name, value in vars(machine).items() if math.isfinite(value)},
        "correlation": spearman([row["predicted"] for row in rows], [min(row["measured"]) for row in rows]),
        "layouts": rows,
    }
    figures.write(RESULT, f"python -m benchmarks.plan_order layouts={len(wanted)}", made_by, result)
    Console(width=140).print(table(rows), f"Spearman's correlation {result['correlation']:.3f}, goal {GOAL}")


def occupy_core(rank: int) -> None:
    """Bind this rank to a core. A process of idle priority computes on this core whenever the rank waits.

    Two cores of a virtual machine may be two hardware threads of one core. While one rank waits, the other would be
    faster. A pipeline's idle time would then cost less than on GPUs, which share nothing.
    """
    import torch

    core = sorted(os.sched_getaffinity(0))[rank]
    os.sched_setaffinity(0, {core})
    owner = os.getpid()
    if os.fork():
        return
    die_with(owner)
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    matrix = torch.zeros(FILLER_SIZE, FILLER_SIZE)
    while True:
        matrix @ matrix


def layouts_wanted(arguments: Sequence[str]) -> list[ParallelConfig]:
    """All layouts in a random order, or the first ``layouts=N`` of them."""
    own, others = split_arguments(arguments, ("layouts",))
    if others:
        sys.exit(f"error: {' '.join(others)}: give layouts=N, or nothing")
    layouts = [
        layout(sizes, recompute, tokens) for sizes, recompute, tokens in product(SIZES, RECOMPUTE, MICRO_BATCH_TOKENS)
    ]
    count = own.get("layouts", str(len(layouts)))
    if not count.isdigit() or not 3 <= int(count) <= len(layouts):
        sys.exit(f"error: layouts={count}: use 3 to {len(layouts)}")
    order = np.random.default_rng(SEED).permutation(len(layouts))[: int(count)]
    return [layouts[i] for i in order]


def layout(sizes: tuple[int, int, int, int], recompute: str, micro_batch_tokens: int) -> ParallelConfig:
    tensor, pipeline, virtual, context = sizes
    return ParallelConfig(
        tensor=tensor,
        pipeline=pipeline,
        virtual_pipeline=virtual,
        first_stage_layers=None,
        last_stage_layers=None,
        context=context,
        sequence=tensor > 1,
        recompute=recompute,
        recompute_modules=[CORE_ATTENTION, MLP],
        recompute_layers=None,
        distributed_optimizer=True,
        micro_batch_tokens=micro_batch_tokens,
        constant_length=False,
        gradient_accumulation_fusion=False,
        overlap_grad_reduce=False,
        tp_comm_overlap=False,
        shared_prompts=False,
    )


def described(sizes: ParallelConfig) -> dict[str, Any]:
    """A layout as the results file describes it."""
    names = ("tensor", "pipeline", "virtual_pipeline", "context", "recompute", "micro_batch_tokens")
    return {name: getattr(sizes, name) for name in names} | {"data": sizes.data_parallel(RANKS)}


def lengths(seed: int) -> list[Group]:
    """A prompt with one response, ``SEQUENCES`` times."""
    low, high = RESPONSE_TOKENS
    drawn = np.random.default_rng(seed).integers(low, high + 1, SEQUENCES)
    return [Group(PROMPT_TOKENS, (int(response),)) for response in drawn]


def job_of(sizes: ParallelConfig, element_bytes: int) -> Job:
    """The settings that the cost model of training reads. It does not read those of engines."""
    return Job(
        tensor=sizes.tensor,
        pipeline=sizes.pipeline,
        virtual_pipeline=sizes.virtual_pipeline,
        context=sizes.context,
        recompute=float(sizes.recompute == "full"),
        micro_batch_tokens=sizes.micro_batch_tokens,
        activation_bytes=element_bytes,
        prompts=SEQUENCES,
        samples=1,
        updates=1,
        passes=1,
        reference=1,
        engine_tensor=1,
        engine_weight_bytes=element_bytes,
        engine_kv_bytes=element_bytes,
        slots=1,
        kv_cache_gib=0,
        prompt_limit=PROMPT_TOKENS,
        response_limit=RESPONSE_TOKENS[1],
    )


def training_of(sizes: ParallelConfig, machine: Machine, element_bytes: int, seed: int = SEED) -> Training:
    return Training(
        sizes=sizes,
        offload=False,
        job=job_of(sizes, element_bytes),
        model=scale_model.model_shape(TWIN),
        machine=machine,
        batch=scale_model.batch_size(lengths(seed)),
        gpus=RANKS,
    )


def predict(sizes: ParallelConfig, machine: Machine, element_bytes: int) -> dict[str, Any]:
    """ "predicted" seconds of a training step under a layout, and its "parts"."""
    training = training_of(sizes, machine, element_bytes)
    of_model = scale_model.training_seconds(training.job, training.model, training.batch, machine, RANKS)
    added = layout_seconds(training)
    return {
        "predicted": scale_model.trainer_seconds(of_model) + sum(added.values()),
        "parts": {**of_model, **added},
    }


def write_scale(path: Path, machine: Machine) -> None:
    """Write the costs in the form of conf/scale, together with those of links. Costs that training ignores are .nan."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = OmegaConf.to_yaml(OmegaConf.create({"machine": vars(machine)}))
    path.write_text(f"# Written by benchmarks.plan_order: this machine, {RANKS} ranks of one core each.\n{text}")


class Bench:
    """A rank of the measurement. All methods except :meth:`batch` are collective."""

    def __init__(self, config: Config) -> None:
        import torch
        import torch.distributed as dist
        from transformers import LlamaConfig

        self.config = config
        self.rank = int(os.environ["RANK"])
        self.hf_config = LlamaConfig(**{name: value for name, value in TWIN.items() if name != "model_type"})
        self.dtype = config.precision.dtype
        self.element_bytes = torch.empty(0, dtype=self.dtype).element_size()
        address = os.environ["MASTER_ADDR"]
        self.store = dist.TCPStore(address, int(os.environ["MASTER_PORT"]), is_master=False)
        self.worlds = 0

    def batch(self, seed: int) -> Any:
        """Random tokens with the lengths of the prediction. The weights are those of a token-mean loss."""
        from megatron_ext import batch as batches
        from megatron_ext.batch import Prompt

        random = np.random.default_rng(seed)
        vocabulary = TWIN["vocab_size"]
        groups = lengths(seed)
        prompts = [
            Prompt(f"p{n}", random.integers(0, vocabulary, group.prompt_tokens).astype(np.int32))
            for n, group in enumerate(groups)
        ]
        responses = [random.integers(0, vocabulary, group.response_tokens[0]) for group in groups]
        batch = batches.build(prompts, responses)
        total = sum(map(len, responses))
        return batch.with_columns(weights=np.full(total, 1 / total))

    def join(self) -> None:
        """Start a new world for a layout, because Megatron-Core's groups belong to one layout."""
        import torch.distributed as dist

        self.worlds += 1
        dist.init_process_group(
            "gloo",
            store=dist.PrefixStore(f"world/{self.worlds}", self.store),
            rank=self.rank,
            world_size=RANKS,
            timeout=timedelta(seconds=self.config.cluster.timeout),
        )

    def measure(self, sizes: ParallelConfig, batch: Any, repetitions: int) -> dict[str, list[float]]:
        """Seconds of each repetition: of the complete "step", and of its "gradients" alone.

        "micro_batches" is their number, and "packed" their used share.
        """
        import torch
        import torch.distributed as dist

        from megatron_ext import forward_backward, model, packing, parallel
        from megatron_ext.host_buffers import HostBuffers
        from megatron_ext.offload import HostCopy
        from recipes.training.policy import Policy, UpdateGuard

        self.join()
        groups = parallel.initialize(sizes, SEED, self.config.cluster.timeout)
        built = model.build(self.hf_config, groups, self.config.precision)
        generator = torch.Generator().manual_seed(SEED)
        with torch.no_grad():
            for shard in built.shards:
                shard.tensor.normal_(0.0, 0.02, generator=generator)
        policy = Policy(
            model=built,
            parallel=groups,
            source="",
            cost=packing.cost_of(self.hf_config, ()),
            pad_token=0,
            temperature=1.0,
            optimizer_config=self.config.optimizer,
            guard=UpdateGuard(1, print, lambda *args, **kwargs: None),
            states=HostCopy(built, weights=False),
        )
        policy.build_optimizer(self.config.algorithm, updates=10)
        reference = forward_backward.copy_weights(built)
        own = HostBuffers()

        def loss(log_probs: Any, micro_batch: packing.MicroBatch) -> tuple[Any, dict[str, Any]]:
            return -(log_probs * micro_batch.values["weights"]).sum(), {}

        seconds: dict[str, list[float]] = {"step": [], "gradients": []}
        for repetition in range(1 + repetitions):
            dist.barrier()
            started = time.perf_counter()
            micro_batches = policy.micro_batches(batch)
            with forward_backward.swapped_weights(built, reference, own):
                forward_backward.log_probs(built, micro_batches)
            before_gradients = time.perf_counter()
            metrics = forward_backward.accumulate_gradients(built, micro_batches, loss)
            dist.barrier()
            after_gradients = time.perf_counter()
            policy.update(metrics)
            dist.barrier()
            if repetition:
                seconds["step"].append(time.perf_counter() - started)
                seconds["gradients"].append(after_gradients - before_gradients)
        used = sum(micro_batch.tokens.shape[1] for micro_batch in micro_batches)
        seconds["micro_batches"] = [len(micro_batches)]
        seconds["packed"] = [used / len(micro_batches) / sizes.micro_batch_tokens * sizes.context]
        parallel.destroy()
        return seconds

    def measure_machine(self) -> Machine:
        """The costs of computation and communication on this machine. All ranks return those of rank 0."""
        import torch
        import torch.distributed as dist

        self.join()
        tokens = USUAL_TOKENS
        hidden, inner = TWIN["hidden_size"], TWIN["intermediate_size"]
        left = torch.randn(tokens, hidden).to(self.dtype)
        right = torch.randn(hidden, inner).to(self.dtype)
        product_seconds = self.together(lambda: left @ right)
        share = torch.zeros(tokens // RANKS, hidden, dtype=self.dtype)
        whole = torch.zeros(tokens, hidden, dtype=self.dtype)
        gather = self.together(lambda: dist.all_gather_into_tensor(whole, share))
        scatter = self.together(lambda: dist.reduce_scatter_tensor(share, whole))
        # As many elements as the twin has. The seconds of its gradients' reduction are subtracted below.
        elements = scale_model.model_shape(TWIN).parameters // RANKS * RANKS
        gradients = torch.zeros(elements, dtype=torch.float32)
        gradients_share = torch.zeros(elements // RANKS, dtype=torch.float32)
        weights = torch.zeros(elements, dtype=torch.bfloat16)
        weights_share = torch.zeros(elements // RANKS, dtype=torch.bfloat16)
        reduced = self.together(lambda: dist.reduce_scatter_tensor(gradients_share, gradients), 5)
        gathered = self.together(lambda: dist.all_gather_into_tensor(weights, weights_share), 5)
        copied = self.together(lambda: gradients.clone(), 5)
        one = torch.zeros(1)
        start = self.together(lambda: dist.all_reduce(one))
        dist.destroy_process_group()
        received = share.numel() * self.element_bytes * (RANKS - 1)
        peak = 2 * tokens * hidden * inner / product_seconds
        costs: dict[str, Any] = dict.fromkeys((field.name for field in fields(Machine)), math.nan)
        costs |= {
            "gpus_per_node": RANKS,
            "peak_tflops": peak / 1e12,
            "all_reduce_us": start * 1e6,
            "nvlink_gb_s": 2 * received / (gather + scatter) / 1e9,
            "network_gb_s": 6 * elements * (RANKS - 1) / RANKS / (reduced + gathered) / 1e9,
            "pcie_gb_s": 4 * elements / copied / 1e9,
            "mfu": 1.0,
            "packed": 1.0,
            "hbm_gb_s": 1.0,
            "hbm_share": 1.0,
        }
        # The share of the peak and the memory's bandwidth, measured with other lengths than those of the prediction.
        # The same gradients in more micro-batches differ in what a micro-batch costs apart from its tokens.
        machine = Machine(**costs)
        plain = layout(PLAIN, "none", tokens)
        usual = self.measure(plain, self.batch(SEED + 1), REPETITIONS)
        small = self.measure(layout(PLAIN, "none", SMALL_TOKENS), self.batch(SEED + 1), REPETITIONS)
        more_micro_batches = small["micro_batches"][0] - usual["micro_batches"][0]
        of_micro_batch = (min(small["gradients"]) - min(usual["gradients"])) / more_micro_batches

        training = training_of(plain, machine, self.element_bytes, SEED + 1)
        update = replace(training, job=replace(training.job, passes=0, reference=0))
        at_peak = scale_model.training_seconds(update.job, update.model, update.batch, machine, RANKS)
        computing = min(usual["gradients"]) - at_peak["gradients"] - usual["micro_batches"][0] * of_micro_batch
        if of_micro_batch <= 0 or computing <= 0:
            raise RuntimeError(
                f"gradients took {min(usual['gradients']):.3f} s, and {min(small['gradients']):.3f} s with "
                f"{more_micro_batches:.0f} more micro-batches: the machine is too busy for a measurement"
            )
        share_of_peak = (at_peak["train"] - at_peak["gradients"]) / computing
        bandwidth = weights_seconds(update) / update.micro_batches / of_micro_batch
        agreed = [share_of_peak, usual["packed"][0], bandwidth, *vars(machine).values()]
        self.join()
        # The ranks' clocks differ, but their predictions must be equal.
        values = torch.tensor(agreed, dtype=torch.float64)
        dist.broadcast(values, 0)
        dist.destroy_process_group()
        mfu, packed, bandwidth, *rest = values.tolist()
        costs = dict(zip(vars(machine), rest, strict=True))
        costs |= {"gpus_per_node": RANKS, "mfu": mfu, "packed": packed, "hbm_gb_s": bandwidth}
        return Machine(**costs)

    def together(self, work: Callable[[], Any], repetitions: int = 20) -> float:
        """Median seconds of ``work``, which all ranks run at the same time."""
        import torch.distributed as dist

        seconds = []
        for _ in range(repetitions):
            dist.barrier()
            started = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - started)
        return statistics.median(seconds)


def spearman(one: Sequence[float], other: Sequence[float]) -> float:
    """Spearman's rank correlation: Pearson's of the ranks, equal values sharing the mean of theirs."""
    return float(np.corrcoef(ranked(one), ranked(other))[0, 1])


def ranked(values: Sequence[float]) -> list[float]:
    """The place of each value in their order; equal values share the mean of their places."""
    ordered = sorted(values)
    return [ordered.index(value) + (ordered.count(value) - 1) / 2 for value in values]


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """The layouts in the order of their predicted seconds."""
    names = ["tensor", "pipeline", "virtual_pipeline", "context", "data", "recompute", "micro_batch_tokens"]
    shown = Table(*names, "predicted s", "measured s", "measured / predicted")
    for row in sorted(rows, key=lambda row: row["predicted"]):
        measured = min(row["measured"])
        ratio = measured / row["predicted"]
        shown.add_row(*(str(row[name]) for name in names), f"{row['predicted']:.2f}", f"{measured:.2f}", f"{ratio:.2f}")
    return shown


if __name__ == "__main__":
    main()
