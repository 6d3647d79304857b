"""Forks ``cases.WORLD`` ranks, which do the jobs that tests ask for: a case or a checkpoint scenario.

``worker.py FOLDER``: FOLDER has the twins. Each rank writes its results to ``results/<name>.<rank>.pt``.
"""

import math
import os
import pickle
import resource
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_ext import platform

if __name__ == "__main__":
    platform.activate("cpu")

from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

from megatron_ext import (
    checkpoint,
    collectives,
    forward_backward,
    hf_checkpoint,
    model,
    optimizer,
    packing,
    parallel,
    routing,
    scalar_head,
)
from megatron_ext.batch import Array, TokenBatch
from megatron_ext.blocks import Shard, region
from megatron_ext.host_buffers import HostBuffers
from megatron_ext.micro_batches import MicroBatches
from megatron_ext.offload import HostCopy
from recipes.launch.launcher import fork_ranks
from recipes.preflight import memory
from tests.megatron_ext import cases, routes
from tests.megatron_ext.cases import Case
from tests.megatron_ext.ranks import serve
from tests.sequences import token_batch
from tests.settings import precision_config
from tests.te import watched

if __name__ == "__main__":
    fork_ranks(cases.WORLD)
RANK = int(os.environ["RANK"])
SEED = 1
BUCKET = 50_000  # elements


def pieces(shards: list[Shard], tensors: list[torch.Tensor]) -> list[tuple[str, tuple[int, ...], torch.Tensor]]:
    """(HF name, start, values) of every block of this rank. ``tensors`` are in the order and shapes of the shards."""
    result = []
    for shard, tensor in zip(shards, tensors, strict=True):
        for block in shard.blocks:
            values = tensor[region(block.local_start, block.shape)].clone()
            result.append((block.hf_name, block.hf_start, values))
    return result


def padding_is_zero(shard: Shard) -> bool:
    """Whether every element outside of the shard's blocks is 0."""
    padding = shard.tensor.clone()
    for block in shard.blocks:
        padding[region(block.local_start, block.shape)] = 0
    return not padding.any().item()


def equal(tensors: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    """Whether both lists have the same tensors, bit for bit."""
    return all(torch.equal(tensor, other) for tensor, other in zip(tensors, others, strict=True))


@contextmanager
def small_buckets() -> Iterator[None]:
    """Where gradients are reduced early, a layer of the twins has several buckets."""
    ddp_config = model.ddp_config
    model.ddp_config = lambda sizes: replace(ddp_config(sizes), bucket_size=BUCKET)
    try:
        yield
    finally:
        model.ddp_config = ddp_config


class Policy:
    """A freshly built model with the twin's weights, its optimiser and this rank's micro-batches."""

    def __init__(self, folder: Path, case: Case, layout: parallel.Parallel) -> None:
        self.case = case
        self.twin = folder / case.twin
        self.layout = layout
        hf_config = hf_checkpoint.config(self.twin)
        with small_buckets():
            self.model = model.build(hf_config, layout, precision_config(case.precision), case.frozen)
        hf_checkpoint.load(self.model.shards, self.twin)
        self.optimizer, self.schedule = optimizer.build(self.model, cases.OPTIMIZER, cases.SCHEDULE, steps=10)
        self.optimizer.reload_model_params()
        sequences = cases.batch(case)
        # With virtual stages the number of micro-batches is a multiple of the pipeline's stages.
        group = case.pipeline if case.virtual > 1 else 1
        batch = token_batch(sequences, case.shared_prompts)
        limit = case.micro_batch_tokens
        if case.shared_prompts:
            units = packing.units_of_shared_prompts(batch, layout.data, limit, group)
        else:
            units = packing.units(batch)
        lengths = packing.unit_lengths(batch, units, case.layout.token_multiple, case.shared_prompts)
        of_ranks = packing.plan(lengths, layout.data, limit, group)
        self.plan = [[[i for unit in chosen for i in units[unit]] for chosen in rank] for rank in of_ranks]
        # Sequence → (places in its response, entropies) of the tokens on this rank.
        self.entropies: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        build = partial(
            packing.pack,
            multiple=self.model.token_multiple,
            pad_token=0,
            length=self.model.pack_tokens,
            context=case.context,
            context_rank=layout.context_rank,
            shared_prompts=case.shared_prompts,
        )
        indices_of_rank = self.plan[(layout.data_rank + case.swap) % layout.data]
        self.micro_batches: forward_backward.Batches = MicroBatches(batch, indices_of_rank, build)

    def weights(self) -> list[torch.Tensor]:
        return forward_backward.copy_weights(self.model)

    def loss(self, output: torch.Tensor, batch: packing.MicroBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss function of the case, with the longest response's tokens as a metric. Keeps the entropies."""
        if not self.case.is_scalar:
            output, entropies = output
            self.entropies |= self.by_sequence(batch, entropies.detach())
        places = batch.values["place"]
        longest = places.amax() + 1 if len(places) else places.new_ones(())
        losses = cases.token_loss(self.case, output) * batch.values["weight"]
        return losses.sum(), {"longest/max": longest}

    def by_sequence(
        self, batch: packing.MicroBatch, values: torch.Tensor
    ) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
        """Sequence → (places in its response, values) of the tokens on this rank."""
        lengths = batch.lengths.tolist()
        places = batch.values["place"].long().split(lengths)
        parts = values.split(lengths)
        result = {}
        for i, sequence_places, sequence_values in zip(batch.indices, places, parts, strict=True):
            result[cases.original_index(self.case, i)] = (sequence_places, sequence_values)
        return result

    def log_probs(self) -> list[torch.Tensor]:
        """Of each micro-batch, the log-probs; of a model with a scalar head, the values."""
        if self.case.is_scalar:
            return forward_backward.values(self.model, self.micro_batches)
        return forward_backward.log_probs(self.model, self.micro_batches, self.case.temperature)

    def accumulate_gradients(self) -> dict[str, float]:
        """The sums of the metrics; the gradients stand in the model's buffers."""
        entropy: forward_backward.Entropies = "none" if self.case.is_scalar else "measured"
        return forward_backward.accumulate_gradients(
            self.model, self.micro_batches, self.loss, self.case.temperature, entropy
        )

    def train(self, count: int) -> list[tuple[float, float]]:
        """(loss, gradient norm) of ``count`` steps."""
        steps = []
        for _ in range(count):
            loss = self.accumulate_gradients()["loss"]
            grad_norm = optimizer.step(self.optimizer, self.schedule)
            steps.append((loss, grad_norm))
        return steps

    def save(self, folder: Path, step: int, keep: int) -> None:
        """Save a checkpoint as a run does, but wait for the files."""
        saver = checkpoint.Saver(folder, keep)
        snapshot = checkpoint.snapshot(self.model, self.optimizer, self.schedule, HostBuffers())
        saver.save(step, {checkpoint.POLICY: snapshot}, {})
        saver.wait()

    def export(self, folder: Path) -> None:
        """Write the Hugging Face model as a run does."""
        head = scalar_head.head_of(self.model.hf_config)
        hf_checkpoint.export(self.model.shards, self.twin, folder, self.layout.is_first_replica, head)

    def load(self, folder: Path) -> int:
        """Load the newest checkpoint, and return its step."""
        newest = checkpoint.latest(folder)
        assert newest is not None
        return checkpoint.load(newest, self.model, self.optimizer, self.schedule)


def numbers_read(policy: Any) -> int:
    """Load the twin again and count the numbers that safetensors hands out."""
    counted = 0

    class CountingSlice:
        def __init__(self, file_slice: Any) -> None:
            self.file_slice = file_slice

        def get_shape(self) -> list[int]:
            return self.file_slice.get_shape()

        def __getitem__(self, index: Any) -> torch.Tensor:
            nonlocal counted
            piece = self.file_slice[index]
            counted += piece.numel()
            return piece

    class CountingFile:
        """An open file that hands out slices only: asking for a whole tensor fails."""

        def __init__(self, file: Any) -> None:
            self.file = file

        def get_slice(self, name: str) -> CountingSlice:
            return CountingSlice(self.file.get_slice(name))

    @contextmanager
    def counting_open(*args: Any, **kwargs: Any) -> Iterator[CountingFile]:
        with real_open(*args, **kwargs) as file:
            yield CountingFile(file)

    real_open = hf_checkpoint.safe_open
    hf_checkpoint.safe_open = counting_open  # type: ignore[misc, assignment]
    try:
        hf_checkpoint.load(policy.model.shards, policy.twin)
    finally:
        hf_checkpoint.safe_open = real_open  # type: ignore[misc]
    return counted


@contextmanager
def shapes_told() -> Iterator[list[int]]:
    """Counts how often this rank tells its neighbours the shapes of tensors, or is told."""
    counted = [0]
    communicate = P2PCommunicator._communicate_shapes

    def count(self: Any, *tensors: Any) -> Any:
        counted[0] += 1
        return communicate(self, *tensors)

    P2PCommunicator._communicate_shapes = count
    try:
        yield counted
    finally:
        P2PCommunicator._communicate_shapes = communicate


@contextmanager
def reduced_early() -> Iterator[list[int]]:
    """Counts the buckets whose reduction begins before all gradients are there."""
    counted = [0]
    start, finish = _ParamAndGradBucketGroup.start_grad_sync, _ParamAndGradBucketGroup.finish_grad_sync
    is_last = [False]

    def count(self: Any, *options: Any, **more: Any) -> None:
        counted[0] += not is_last[0]
        start(self, *options, **more)

    def ends(self: Any, *options: Any, **more: Any) -> None:
        is_last[0] = True
        finish(self, *options, **more)

    _ParamAndGradBucketGroup.start_grad_sync = count
    _ParamAndGradBucketGroup.finish_grad_sync = ends
    try:
        yield counted
    finally:
        _ParamAndGradBucketGroup.start_grad_sync = start
        _ParamAndGradBucketGroup.finish_grad_sync = finish


def run_case(folder: Path, case: Case, layout: parallel.Parallel) -> dict[str, Any]:
    """Load, export, train ``cases.STEPS`` steps, and exchange the weights for the reference policy's and back."""
    policy = Policy(folder, case, layout)
    shards = policy.model.shards
    results: dict[str, Any] = {"plan": policy.plan, "loss": [], "grad_norm": [], "longest": []}
    results["buckets"] = sum(len(chunk.bucket_groups) for chunk in policy.model.chunks)
    results["reduced_early"] = []
    results["pack_lengths"] = [micro_batch.tokens.shape[1] for micro_batch in policy.micro_batches]
    results["blocks"] = []
    for shard in shards:
        blocks = [(block.hf_name, block.hf_start, block.local_start, block.shape) for block in shard.blocks]
        results["blocks"].append((shard.name, tuple(shard.tensor.shape), blocks))
    results["numbers_read"] = numbers_read(policy)
    policy.export(folder / "exports" / case.name)

    first = policy.log_probs()
    results["log_probs"] = {}
    # Ranks of other pipeline stages than the last have no log-probs.
    for batch, values in zip(policy.micro_batches, first, strict=False):
        results["log_probs"] |= policy.by_sequence(batch, values)
    for step in range(cases.STEPS):
        with shapes_told() as told, reduced_early() as early:
            sums = policy.accumulate_gradients()
        results["reduced_early"].append(early[0])
        results["loss"].append(sums["loss"])
        results["longest"].append(sums["longest/max"])
        if step == 0:
            results["entropies"] = dict(policy.entropies)
            results["shapes_told"] = told[0]
        if step == 0 and cases.has_whole_gradients(case):
            main_grads = [p.main_grad for chunk in policy.model.chunks for p in chunk.module.parameters()]
            results["gradients"] = pieces(shards, main_grads)
        results["grad_norm"].append(optimizer.step(policy.optimizer, policy.schedule))
    results["weights"] = pieces(shards, [shard.tensor for shard in shards])
    results["padding_is_zero"] = all(padding_is_zero(shard) for shard in shards)

    # The reference policy is the one that training began with.
    trained = policy.weights()
    reference = forward_backward.load_weights(policy.model, policy.twin)
    buffers = HostBuffers()
    moved = policy.log_probs()
    with forward_backward.swapped_weights(policy.model, reference, buffers):
        results["reference_log_probs_equal"] = equal(policy.log_probs(), first)
    results["log_probs_moved"] = not moved or not equal(moved, first)
    results["own_weights_back"] = equal(policy.weights(), trained) and not equal(trained, reference)
    try:
        with forward_backward.swapped_weights(policy.model, reference, buffers):
            raise KeyError("on purpose")
    except KeyError:
        results["own_weights_back_after_error"] = equal(policy.weights(), trained)
    return results


def run_long(folder: Path, case: Case, layout: parallel.Parallel) -> dict[str, Any]:
    """Log-probs and gradients of the only micro-batch, both from one forward and backward pass."""
    policy = Policy(folder, case, layout)
    (micro_batch,) = policy.micro_batches
    log_probs: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def loss(output: torch.Tensor, batch: packing.MicroBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        log_probs.update(policy.by_sequence(batch, output.detach()))
        return (cases.token_loss(case, output) * batch.values["weight"]).sum(), {}

    sums = forward_backward.accumulate_gradients(policy.model, policy.micro_batches, loss)
    main_grads = [p.main_grad for chunk in policy.model.chunks for p in chunk.module.parameters()]
    return {
        "tokens": micro_batch.tokens.shape[1],
        "log_probs": log_probs,
        "loss": sums["loss"],
        "gradients": pieces(policy.model.shards, main_grads),
    }


def run_streamed(folder: Path, case: Case, layout: parallel.Parallel) -> dict[str, Any]:
    """Two steps with micro-batches that are built as they are read, and with the same in a list."""
    streamed = Policy(folder, case, layout)
    listed = Policy(folder, case, layout)
    listed.micro_batches = list(listed.micro_batches)
    same_log_probs = equal(streamed.log_probs(), listed.log_probs())
    return {
        "streamed": streamed.train(2),
        "listed": listed.train(2),
        "same_log_probs": same_log_probs,
        "same_weights": equal(streamed.weights(), listed.weights()),
        "threads": [thread.name for thread in threading.enumerate() if thread.name == "micro-batches"],
    }


def run_on_host(policy: Policy) -> dict[str, int]:
    """Move the trainer's tensors to the host and back, once with the weights and once without.

    Returns bytes on the device: of all tensors, the weights and the gradients before, of what is left both times, and
    of all tensors afterwards.
    """
    chunks = policy.model.chunks
    weights = [p.data for chunk in chunks for p in chunk.module.parameters()]
    gradients = [buffer.grad_data for chunk in chunks for buffer in chunk.buffers]
    adam = inner_optimizer(policy)
    masters = [p.data for group in adam.param_groups for p in group["params"]]
    moments = [state[name] for state in adam.state.values() for name in ("exp_avg", "exp_avg_sq")]
    tensors = [*weights, *gradients, *masters, *moments]
    sizes = {
        "all": memory.storage_bytes(tensors),
        "weights": memory.storage_bytes(weights),
        "gradients": memory.storage_bytes(gradients),
    }
    for name, with_weights in (("left", True), ("left_with_weights", False)):
        host = HostCopy(policy.model, policy.optimizer, with_weights)
        host.release()
        sizes[name] = memory.storage_bytes(tensors)
        host.restore()
    sizes["back"] = memory.storage_bytes(tensors)
    return sizes


def run_resume(folder: Path, case: Case, layout: parallel.Parallel) -> dict[str, Any]:
    """Save a checkpoint and train two more steps; load it into a new model and train two more steps.

    Both must end with the same weights. Between the first saves stands what an interrupted save leaves.
    """
    checkpoints = folder / "checkpoints" / case.name
    policy = Policy(folder, case, layout)
    policy.train(1)
    policy.save(checkpoints, 1, keep=2)
    policy.train(1)
    if RANK == 0:
        (checkpoints / "step_000009").mkdir()  # what an interrupted save leaves
    dist.barrier()
    latest_with_interrupted = checkpoint.latest(checkpoints)
    policy.save(checkpoints, 2, keep=2)
    policy.train(1)
    policy.save(checkpoints, 3, keep=2)
    policy.export(folder / "exports" / f"resume-{case.name}")
    saved_weights = policy.weights()
    random_numbers = torch.rand(4)
    on_host = run_on_host(policy)
    went_on = policy.train(2)
    final_weights = policy.weights()

    again = Policy(folder, case, layout)
    # The checkpoint's random state must replace this one.
    torch.manual_seed(RANK + 77)
    step = again.load(checkpoints)
    results = {
        "step": step,
        "loaded": equal(again.weights(), saved_weights),
        "random_numbers": torch.equal(torch.rand(4), random_numbers),
        "went_on": went_on,
        "resumed": again.train(2),
        "same_weights": equal(again.weights(), final_weights),
        "weights": pieces(again.model.shards, final_weights),
        "on_host": on_host,
        "latest_with_interrupted": latest_with_interrupted.name if latest_with_interrupted else None,
        "folders": sorted(path.name for path in checkpoints.iterdir()),
    }
    dist.barrier()
    return results


def run_not_finite(folder: Path, case: Case, layout: parallel.Parallel) -> dict[str, Any]:
    """Train one step, then a second one whose loss is NaN on the last rank, then the second one again without NaN.

    Another model trains two steps without NaN.
    """
    policy = Policy(folder, case, layout)
    policy.train(1)
    weights = policy.weights()
    updates = policy.schedule.num_steps
    moments = [moment.clone() for moment in moments_of(policy)]
    finite_loss = policy.loss
    factor = math.nan if case.ranks - 1 == RANK else 1.0

    def poisoned_loss(output: torch.Tensor, batch: packing.MicroBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        loss, _ = finite_loss(output, batch)
        return loss * factor, {}

    policy.loss = poisoned_loss  # type: ignore[method-assign]
    (poisoned,) = policy.train(1)
    results = {
        "poisoned": poisoned,
        "weights": equal(policy.weights(), weights),
        "moments": equal(moments_of(policy), moments),
        "updates": policy.schedule.num_steps - updates,
    }
    policy.loss = finite_loss  # type: ignore[method-assign]
    results["again"] = policy.train(1)
    alone = Policy(folder, case, layout)
    results["alone"] = alone.train(2)[1:]
    results["same"] = equal(policy.weights(), alone.weights())
    return results


def inner_optimizer(policy: Policy) -> torch.optim.Optimizer:
    """Adam, inside of Megatron-Core's wrappers."""
    (megatron_optimizer,) = policy.optimizer.chained_optimizers
    return megatron_optimizer.optimizer


def moments_of(policy: Policy) -> list[torch.Tensor]:
    """What Adam holds of each parameter: both moments and the number of updates."""
    states = inner_optimizer(policy).state.values()
    return [state[name] for state in states for name in ("exp_avg", "exp_avg_sq", "step")]


def run_damaged(folder: Path, saved: Case, case: Case, layout: parallel.Parallel) -> dict[str, Any]:
    """Look for the newest intact one of the two checkpoints of ``saved``, while more and more is damaged.

    First rank 1 cannot write a third checkpoint. Then a bit of a rank's file changes in the newest, and a bit of the
    manifest in the one before.
    """
    checkpoints = folder / "checkpoints" / case.name
    policy = Policy(folder, case, layout)
    if RANK == 0:
        shutil.copytree(folder / "checkpoints" / saved.name, checkpoints)
    dist.barrier()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    if RANK == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    results: dict[str, Any] = {"full": error_text(lambda: policy.save(checkpoints, 4, keep=1))}
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    dist.barrier()
    results["after_full"] = sorted(path.name for path in checkpoints.iterdir())

    messages: list[str] = []

    def find_newest() -> None:
        newest = checkpoint.newest_intact(checkpoints, messages.append)
        messages.append(str(newest))

    results["newest"] = [str(checkpoint.newest_intact(checkpoints, messages.append))]
    for damaged in ("step_000003/rank_00001.safetensors", "step_000002/manifest.json"):
        if RANK == 0:
            content = bytearray((checkpoints / damaged).read_bytes())
            content[len(content) // 2] ^= 4
            (checkpoints / damaged).write_bytes(content)
        dist.barrier()
        results["newest"].append(error_text(find_newest))
    results["messages"] = messages
    results["folders"] = sorted(path.name for path in checkpoints.iterdir())
    return results


@contextmanager
def no_unpickling() -> Iterator[None]:
    """A context in which every way to unpickle raises an error."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("something was unpickled")

    functions = [(pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")]
    originals = [getattr(module, name) for module, name in functions]
    try:
        for module, name in functions:
            setattr(module, name, refuse)
        yield
    finally:
        for (module, name), original in zip(functions, originals, strict=True):
            setattr(module, name, original)


def run_relayout(folder: Path, saved: Case, case: Case, layout: parallel.Parallel) -> dict[str, Any]:
    """Load the checkpoint of ``saved`` under another layout and train two more steps."""
    policy = Policy(folder, case, layout)
    with no_unpickling():
        step = policy.load(folder / "checkpoints" / saved.name)
    resumed = policy.train(2)
    return {"step": step, "resumed": resumed, "weights": pieces(policy.model.shards, policy.weights())}


def error_text(work: Callable[[], Any]) -> str:
    """Type and text of the error that ``work`` raises."""
    try:
        work()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def run_other_padding(folder: Path, saved: Case, case: Case, layout: parallel.Parallel) -> dict[str, Any]:
    """Load the checkpoint of ``saved`` into a model whose padding differs."""
    policy = Policy(folder, case, layout)
    return {"error": error_text(lambda: policy.load(folder / "checkpoints" / saved.name))}


def run_collectives(folder: Path, case: Case, layout: parallel.Parallel) -> dict[str, Any]:
    """Call the collectives of small messages, and activate a platform again."""
    group = parallel.control_group()

    def fails() -> None:
        raise OSError("the engine is gone")

    return {
        # JSON of 2, 1022, 2042 and 3062 bytes: with and without a second collective.
        "gathered": [collectives.all_gather_json("ö" * length * RANK, group) for length in (1, 170)],
        "from_rank_zero": collectives.from_rank_zero(lambda: {"who": RANK, "many": list(range(1000))}, group),
        "error": error_text(lambda: collectives.from_rank_zero(fails, group)),
        "after_error": collectives.from_rank_zero(lambda: "goes on", group),
        "second_platform": error_text(lambda: platform.activate("cuda")),
        "same_platform": platform.activate("cpu") is platform.current(),
        "threads": [comm.read_text().strip() for comm in Path("/proc/self/task").glob("*/comm")],
    }


def run_routing(folder: Path, case: Case, layout: parallel.Parallel) -> dict[str, Any]:
    """Exchange the tokens of responses by several wishes, and count the bytes that come with them."""
    group = parallel.control_group()
    whole = routes.whole()
    held = routes.holding(whole, [RANK in holders for holders in routes.HOLDERS])
    sizes: list[int] = []
    empty_block = routing._empty_block

    def counted(batch: TokenBatch, responses: Array) -> torch.Tensor:
        block = empty_block(batch, responses)
        sizes.append(len(block))
        return block

    routing._empty_block = counted
    exchanged = []
    received = []
    for wanted in routes.wishes():
        exchanged.append(routing.exchange(held, wanted[RANK], group).to_bytes())
        received.append(sum(sizes))
        sizes.clear()
    routing._empty_block = empty_block
    return {
        "exchanged": exchanged,
        "received": received,
        "holders": routing.holders(held, group).tolist(),
        "lost": error_text(lambda: routing.everywhere(whole.without_tokens(), group)),
    }


def main() -> None:
    jobs: dict[str, tuple[Case, Callable[..., dict[str, Any]], tuple[Case, ...]]] = {
        "collectives": (Case("collectives", data=4), run_collectives, ()),
        "routing": (Case("routing", data=routes.RANKS), run_routing, ()),
        **{case.name: (case, run_case, ()) for case in cases.CASES},
        **{f"streamed-{name}": (cases.by_name(name), run_streamed, ()) for name in cases.STREAMED},
        **{f"resume-{case.name}": (case, run_resume, ()) for case in cases.RESUMES},
        **{f"relayout-{case.name}": (case, run_relayout, (saved,)) for saved, case in cases.RELAYOUTS},
        **{case.name: (case, run_long, ()) for case in (cases.LONG_ONE, cases.LONG_CP4)},
        **{f"watched-{name}": (cases.by_name(name), watched.text, ()) for name in watched.TEXT},
        "not-finite": (cases.TP2_SP_DP2, run_not_finite, ()),
        "damaged": (cases.DAMAGED[1], run_damaged, cases.DAMAGED[:1]),
        "other-padding": (cases.OTHER_PADDING[1], run_other_padding, cases.OTHER_PADDING[:1]),
    }
    serve(Path(sys.argv[1]), jobs, SEED)


if __name__ == "__main__":
    main()
