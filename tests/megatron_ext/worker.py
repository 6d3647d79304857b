"""Forks ``cases.WORLD`` ranks, which do what tests ask for: a case or a checkpoint scenario.

``worker.py FOLDER``: FOLDER has the twins; ``results/<name>.<rank>.pt`` is what each rank found.
"""

import math
import os
import pickle
import resource
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_ext import platform

if __name__ == "__main__":
    platform.activate("cpu")

from megatron_ext import checkpoint, collectives, forward_backward, hf_checkpoint, model, optimizer, packing, parallel
from megatron_ext.blocks import Shard, region
from megatron_ext.offload import HostCopy
from recipes.launch.launcher import fork_ranks
from recipes.preflight import memory
from tests.megatron_ext import cases
from tests.megatron_ext.cases import Case
from tests.megatron_ext.ranks import serve
from tests.sequences import pack
from tests.settings import precision_config

if __name__ == "__main__":
    fork_ranks(cases.WORLD)
RANK = int(os.environ["RANK"])
SEED = 1


def pieces(shards: list[Shard], tensors: list[torch.Tensor]) -> list[tuple[str, tuple[int, ...], torch.Tensor]]:
    """(HF name, start, values) of every block of this rank."""
    return [
        (b.hf_name, b.hf_start, tensor[region(b.local_start, b.shape)].clone())
        for shard, tensor in zip(shards, tensors, strict=True)
        for b in shard.blocks
    ]


def padding_is_zero(shard: Shard) -> bool:
    rest = shard.tensor.clone()
    for block in shard.blocks:
        rest[region(block.local_start, block.shape)] = 0
    return not rest.any().item()


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


class Policy:
    """A freshly built model with the twin's weights, its optimiser and this rank's micro-batches."""

    def __init__(self, folder: Path, case: Case, layout: parallel.Parallel) -> None:
        self.case, self.twin, self.layout = case, folder / case.twin, layout
        hf = hf_checkpoint.config(self.twin)
        self.model = model.build(hf, layout, precision_config(case.precision), case.frozen)
        hf_checkpoint.load(self.model.shards, self.twin)
        self.optimizer, self.schedule = optimizer.build(self.model, cases.OPTIMIZER, cases.SCHEDULE, steps=10)
        self.optimizer.reload_model_params()
        sequences = cases.batch(case)
        group = case.pipeline if case.virtual > 1 else 1
        self.plan = packing.plan([len(s) for s in sequences], layout.data, case.micro_batch_tokens, group)
        self.entropies: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        device = platform.current().device()
        mine = self.plan[(layout.data_rank + case.swap) % layout.data]
        self.micro = [
            pack(sequences, indices, self.model.token_multiple, 0, device, case.context, layout.context_rank)
            for indices in mine
        ]

    def weights(self) -> list[torch.Tensor]:
        return forward_backward.copy_weights(self.model)

    def loss(self, output: torch.Tensor, batch: packing.MicroBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        if not self.case.is_scalar:
            output, entropies = output
            self.entropies |= self.by_sequence(batch, entropies.detach())
        furthest = max(batch.values["place"].tolist(), default=0.0)
        losses = cases.token_loss(self.case, output) * batch.values["weight"]
        return losses.sum(), {"longest/max": torch.tensor(furthest + 1)}

    def by_sequence(
        self, batch: packing.MicroBatch, values: torch.Tensor
    ) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
        """Sequence → (places in its response, values) of the tokens on this rank."""
        places = batch.values["place"].long().split(batch.lengths)
        parts = zip(batch.indices, places, values.split(batch.lengths), strict=True)
        return {cases.original_index(self.case, i): (where, part) for i, where, part in parts}

    def log_probs(self) -> list[torch.Tensor]:
        """Or the values, of a model with a scalar head."""
        if self.case.is_scalar:
            return forward_backward.values(self.model, self.micro)
        return forward_backward.log_probs(self.model, self.micro, self.case.temperature)

    def gradients(self) -> dict[str, float]:
        return forward_backward.accumulate_gradients(
            self.model, self.micro, self.loss, self.case.temperature, "none" if self.case.is_scalar else "measured"
        )

    def train(self, count: int) -> list[tuple[float, float]]:
        """(loss, gradient norm) of ``count`` steps."""
        return [(self.gradients()["loss"], optimizer.step(self.optimizer, self.schedule)) for _ in range(count)]

    def save(self, folder: Path, step: int, keep: int) -> None:
        """As a run does, but waits for the files."""
        saver = checkpoint.Saver(folder, keep)
        saver.save(step, {checkpoint.POLICY: checkpoint.snapshot(self.model, self.optimizer, self.schedule)}, {})
        saver.wait()

    def export(self, folder: Path) -> None:
        """As a run does."""
        is_scalar = self.model.is_scalar
        hf_checkpoint.export(self.model.shards, self.twin, folder, self.layout.is_first_replica, is_scalar)

    def load(self, folder: Path) -> int:
        newest = checkpoint.latest(folder)
        assert newest is not None
        return checkpoint.load(newest, self.model, self.optimizer, self.schedule)


def numbers_read(policy: Policy) -> int:
    """Load the twin again and count the numbers that safetensors hands out."""
    counted = 0

    class Counting:
        def __init__(self, source: Any) -> None:
            self.source = source

        def get_shape(self) -> list[int]:
            return self.source.get_shape()

        def __getitem__(self, index: Any) -> torch.Tensor:
            nonlocal counted
            piece = self.source[index]
            counted += piece.numel()
            return piece

    @contextmanager
    def counting_open(*args: Any, **kwargs: Any) -> Iterator[Any]:
        with real_open(*args, **kwargs) as tensors:
            # Only slices are offered: asking for a whole tensor fails.
            yield type("Slices", (), {"get_slice": staticmethod(lambda name: Counting(tensors.get_slice(name)))})

    real_open = hf_checkpoint.safe_open
    hf_checkpoint.safe_open = counting_open  # type: ignore[misc, assignment]
    try:
        hf_checkpoint.load(policy.model.shards, policy.twin)
    finally:
        hf_checkpoint.safe_open = real_open  # type: ignore[misc]
    return counted


def run_case(folder: Path, case: Case, layout: parallel.Parallel) -> dict[str, Any]:
    policy = Policy(folder, case, layout)
    shards = policy.model.shards
    found: dict[str, Any] = {"plan": policy.plan, "loss": [], "grad_norm": [], "longest": []}
    found["blocks"] = [
        (s.name, tuple(s.tensor.shape), [(b.hf_name, b.hf_start, b.local_start, b.shape) for b in s.blocks])
        for s in shards
    ]
    found["numbers_read"] = numbers_read(policy)
    policy.export(folder / "exports" / case.name)

    first = policy.log_probs()
    found["log_probs"] = {}
    for micro, values in zip(policy.micro, first, strict=False):  # none off the last pipeline stage
        found["log_probs"] |= policy.by_sequence(micro, values)
    for step in range(cases.STEPS):
        sums = policy.gradients()
        found["loss"].append(sums["loss"])
        found["longest"].append(sums["longest/max"])
        if step == 0:
            found["entropies"] = dict(policy.entropies)
        if step == 0 and cases.has_whole_gradients(case):
            parameters = [p for chunk in policy.model.chunks for p in chunk.module.parameters()]
            found["gradients"] = pieces(shards, [p.main_grad for p in parameters])
        found["grad_norm"].append(optimizer.step(policy.optimizer, policy.schedule))
    found["weights"] = pieces(shards, [s.tensor for s in shards])
    found["padding_is_zero"] = all(padding_is_zero(s) for s in shards)

    # The reference policy is the one that training began with.
    trained = policy.weights()
    reference = forward_backward.load_weights(policy.model, policy.twin)
    moved = policy.log_probs()
    with forward_backward.swapped_weights(policy.model, reference):
        found["reference_log_probs_equal"] = equal(policy.log_probs(), first)
    found["log_probs_moved"] = not moved or not equal(moved, first)
    found["own_weights_back"] = equal(policy.weights(), trained) and not equal(trained, reference)
    try:
        with forward_backward.swapped_weights(policy.model, reference):
            raise KeyError("on purpose")
    except KeyError:
        found["own_weights_back_after_error"] = equal(policy.weights(), trained)
    return found


def run_on_host(policy: Policy) -> dict[str, int]:
    """Bytes on the device: of all, of the weights, and what is left with all and with all but the weights away. All is
    back afterwards."""
    chunks = policy.model.chunks
    weights = [p.data for chunk in chunks for p in chunk.module.parameters()]
    gradients = [buffer.grad_data for chunk in chunks for buffer in chunk.buffers]
    (inner,) = (optimizer.optimizer for optimizer in policy.optimizer.chained_optimizers)
    masters = [p.data for group in inner.param_groups for p in group["params"]]
    moments = [state[name] for state in inner.state.values() for name in ("exp_avg", "exp_avg_sq")]
    all_of_it = [*weights, *gradients, *masters, *moments]
    found = {"all": memory.storage_bytes(all_of_it), "weights": memory.storage_bytes(weights)}
    for name, with_weights in (("left", True), ("left_with_weights", False)):
        host = HostCopy(policy.model, policy.optimizer, with_weights)
        host.release()
        found[name] = memory.storage_bytes(all_of_it)
        host.restore()
    return found | {"back": memory.storage_bytes(all_of_it)}


def run_resume(folder: Path, case: Case, layout: parallel.Parallel) -> dict[str, Any]:
    """Save twice around an interrupted save, go on; start anew from the checkpoint, go on: both must be the same."""
    to = folder / "checkpoints" / case.name
    policy = Policy(folder, case, layout)
    policy.train(1)
    policy.save(to, 1, keep=2)
    policy.train(1)
    if dist.get_rank() == 0:
        (to / "step_000009").mkdir()  # what an interrupted save leaves
    dist.barrier()
    latest_with_interrupted = checkpoint.latest(to)
    policy.save(to, 2, keep=2)
    policy.train(1)
    policy.save(to, 3, keep=2)
    policy.export(folder / "exports" / f"resume-{case.name}")
    saved, drawn = policy.weights(), torch.rand(4)
    on_host = run_on_host(policy)
    went_on, after = policy.train(2), policy.weights()

    again = Policy(folder, case, layout)
    torch.manual_seed(RANK + 77)
    step = again.load(to)
    found = {
        "step": step,
        "loaded": equal(again.weights(), saved),
        "random_numbers": torch.equal(torch.rand(4), drawn),
        "went_on": went_on,
        "resumed": again.train(2),
        "same_weights": equal(again.weights(), after),
        "weights": pieces(again.model.shards, after),
        "on_host": on_host,
        "latest_with_interrupted": latest_with_interrupted.name if latest_with_interrupted else None,
        "folders": sorted(p.name for p in to.iterdir()),
    }
    dist.barrier()
    return found


def run_not_finite(folder: Path, case: Case, layout: parallel.Parallel) -> dict[str, Any]:
    """One update; a second whose loss is NaN on the last rank alone; the second again, without."""
    policy = Policy(folder, case, layout)
    policy.train(1)
    weights, updates = policy.weights(), policy.schedule.num_steps
    moments = [t.clone() for t in moments_of(policy)]
    whole, last = policy.loss, case.ranks - 1 == RANK
    policy.loss = lambda output, batch: (whole(output, batch)[0] * (math.nan if last else 1), {})  # type: ignore[method-assign]
    (poisoned,) = policy.train(1)
    found = {
        "poisoned": poisoned,
        "weights": equal(policy.weights(), weights),
        "moments": equal(moments_of(policy), moments),
        "updates": policy.schedule.num_steps - updates,
    }
    policy.loss = whole  # type: ignore[method-assign]
    again, alone = policy.train(1), Policy(folder, case, layout)
    return found | {"again": again, "alone": alone.train(2)[1:], "same": equal(policy.weights(), alone.weights())}


def moments_of(policy: Policy) -> list[torch.Tensor]:
    (inner,) = (optimizer.optimizer for optimizer in policy.optimizer.chained_optimizers)
    return [state[name] for state in inner.state.values() for name in ("exp_avg", "exp_avg_sq", "step")]


def run_damaged(folder: Path, saved: Case, case: Case, layout: parallel.Parallel) -> dict[str, Any]:
    """The two checkpoints of ``saved`` and a third that rank 1 can't write; then the newest loses a bit of a rank's
    file, and the one before a part of its manifest."""
    to, policy = folder / "checkpoints" / case.name, Policy(folder, case, layout)
    if RANK == 0:
        shutil.copytree(folder / "checkpoints" / saved.name, to)
    dist.barrier()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    if RANK == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    found: dict[str, Any] = {"full": error_text(lambda: policy.save(to, 4, keep=1))}
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    dist.barrier()
    found["after_full"] = sorted(p.name for p in to.iterdir())
    said: list[str] = []
    found["newest"] = [str(checkpoint.newest_intact(to, said.append))]
    for path in (to / "step_000003" / "rank_00001.safetensors", to / "step_000002" / "manifest.json"):
        if RANK == 0:
            content = bytearray(path.read_bytes())
            content[len(content) // 2] ^= 4
            path.write_bytes(content)
        dist.barrier()
        found["newest"].append(error_text(lambda: said.append(str(checkpoint.newest_intact(to, said.append)))))
    return found | {"said": said, "folders": sorted(p.name for p in to.iterdir())}


@contextmanager
def no_unpickling() -> Iterator[None]:
    """Within it every way to unpickle fails."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("something was unpickled")

    places = [(pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")]
    real = [getattr(*place) for place in places]
    try:
        for module, name in places:
            setattr(module, name, refuse)
        yield
    finally:
        for (module, name), function in zip(places, real, strict=True):
            setattr(module, name, function)


def run_relayout(folder: Path, saved: Case, case: Case, layout: parallel.Parallel) -> dict[str, Any]:
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
    policy = Policy(folder, case, layout)
    return {"error": error_text(lambda: policy.load(folder / "checkpoints" / saved.name))}


def run_collectives(folder: Path, case: Case, layout: parallel.Parallel) -> dict[str, Any]:
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


def main() -> None:
    jobs: dict[str, tuple[Case, Callable[..., dict[str, Any]], tuple[Case, ...]]] = {
        "collectives": (Case("collectives", data=4), run_collectives, ()),
        **{case.name: (case, run_case, ()) for case in cases.CASES},
        **{f"resume-{case.name}": (case, run_resume, ()) for case in cases.RESUMES},
        **{f"relayout-{case.name}": (case, run_relayout, (saved,)) for saved, case in cases.RELAYOUTS},
        "not-finite": (cases.TP2_SP_DP2, run_not_finite, ()),
        "damaged": (cases.DAMAGED[1], run_damaged, cases.DAMAGED[:1]),
        "other-padding": (cases.OTHER_PADDING[1], run_other_padding, cases.OTHER_PADDING[:1]),
    }
    serve(Path(sys.argv[1]), jobs, SEED)


if __name__ == "__main__":
    main()
