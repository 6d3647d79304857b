"""Measures the host's part of an RL step: from the engines' responses to the micro-batches and the records.

``python -m benchmarks.scale_path`` writes ``benchmarks/results/scale_path.json`` and prints its table. Ranks are
processes over gloo, eight on a node. They call the functions that a step of ``recipes/training/rl.py`` calls: generate,
score, advantages, micro-batches, record. There is no model. The engines' responses are random tokens, and the passes
between the micro-batches and the record are left out. Eight ranks are a replica of the trainer (tensor parallel), so
``ranks / 8`` replicas share the responses.

A measurement begins when the last response has arrived and is judged. It ends with the step's record. Each rank
reports:

* ``seconds``: CPU time of all its threads until a pass can begin, and of the record. It excludes other processes on the
  same cores. It includes copying to and from the sockets, but not the network's own time. The step takes as long as the
  rank with the most.
* ``streamed``: CPU time of a pass's micro-batches after the first. A thread builds them while the device computes.
* ``received``: bytes that its TCP sockets received (the kernel's count).
* ``peak``: peak memory above the memory before the engines responded. It includes the responses that an engine's rank
  holds, and the micro-batches, which are on the device when there is a GPU. The micro-batches are read once, as a pass
  reads them, so that few exist at a time.
* ``share``: bytes of token ids, log-probs and loss mask of the responses that it trains on.
* ``micro_batches``: bytes of the largest micro-batch's tensors, times the number of micro-batches that exist at a time.

Case B has 4,096 samples of 16,384 tokens. It is measured with fewer tokens, at three sizes each on 8 and on 64 ranks.
A least-squares fit of ``constant + x + tokens x (everywhere + divided / replicas)`` to these six measurements gives the
figures of the full case on 8, 64 and 1,024 ranks. For seconds and received bytes, ``x`` is proportional to the ranks
(messages of all ranks). For sizes it is proportional to 1 / replicas (a replica's part of the samples). ``residuals``
has the largest relative error of the fit.

The image case has 1,024 samples with short responses. Each prompt has 16 samples and its own image of 4 megapixels. The
image processor is Qwen2.5-VL's with its published limits. The tower is a stand-in that is trained, so that pixels are
in the micro-batches. The figures also include processing the prompts before the engines get them. ``share`` includes
the rank's part of the pixels that it trains on. The case is measured with fewer prompts, at three numbers on 8 and on
64 ranks, and extrapolated by a line for each number of ranks. ``alone`` estimates, from a few prompts, the cost of one
rank that processes all prompts by itself, as every rank would without sharing.
"""

import collections
import hashlib
import json
import multiprocessing
import os
import socket
import struct
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import PIL.Image
import torch
import torch.distributed as dist
from hydra import compose, initialize_config_dir
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedTokenizerFast

from megatron_ext import platform

platform.activate("cpu")  # before Megatron-Core is imported

from benchmarks import figures  # noqa: E402
from megatron_ext import batch as batches  # noqa: E402
from megatron_ext.batch import Prompt, TokenBatch  # noqa: E402
from megatron_ext.micro_batches import AHEAD  # noqa: E402
from megatron_ext.models import qwen2_5_vl  # noqa: E402
from megatron_ext.packing import MicroBatch, cost_of  # noqa: E402
from megatron_ext.parallel import Parallel  # noqa: E402
from recipes.algorithms.registry import reference_interval  # noqa: E402
from recipes.config import Config, parse  # noqa: E402
from recipes.data.processor import ProcessedPrompt, PromptProcessor  # noqa: E402
from recipes.data.row_order import Curriculum  # noqa: E402
from recipes.data.rows import Row  # noqa: E402
from recipes.data.shared_processing import process  # noqa: E402
from recipes.preflight.architecture import model_config, published_config  # noqa: E402
from recipes.run import records  # noqa: E402
from recipes.run.clock import PhaseClock  # noqa: E402
from recipes.run.display import Display  # noqa: E402
from recipes.run.run import Run  # noqa: E402
from recipes.run.sample_files import SampleWriter  # noqa: E402
from recipes.training import rl  # noqa: E402
from recipes.training.policy import Policy  # noqa: E402
from recipes.training.rollouts import Rollouts  # noqa: E402
from rewards import objectives  # noqa: E402
from rewards.verdict import Verdict, Verifier  # noqa: E402
from rollout.prompt_buffer import PromptBuffer, Rollout  # noqa: E402
from rollout.sampling import Sampling  # noqa: E402

RESULT = Path("benchmarks/results/scale_path.json")
RANKS_PER_NODE = 8
REPLICA = 8  # ranks, tensor parallel
SAMPLES_PER_PROMPT = 16
PROMPT_SHARE = 32  # one in this many of a sample's tokens belongs to the prompt: 512 of 16,384
SEED = 0
SECONDS = 1800  # timeout of a collective
TOKENIZER = "conf/model/vqa_tiny/tokenizer.json"
JUDGE_TEXT = "The response refuses, says why and offers help. " * 20  # what a judge writes on a response
TCP_INFO_BYTES_RECEIVED = 128  # offset of tcpi_bytes_received in Linux's struct tcp_info
FULL_TOKENS = 16384  # per sample of case B
FULL_RANKS = (8, 64, 1024)
GOALS = {"seconds": 5.0, "received": 1.2, "peak": 2.0}  # at most, at 64 ranks. The last two are multiples of a share
SIZES = ("seconds", "streamed", "received", "peak", "share", "micro_batches")
IMAGE_SIDE = 2000  # pixels
IMAGE_SAMPLES = 1024
IMAGE_MODEL = "conf/model/vqa_tiny"  # a processor of Qwen2.5-VL's class, with other limits
IMAGE_LIMITS = {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 16384}  # pixels, for the published models
IMAGES_ALONE = 2
IMAGE = "image.jpg"  # in the run's folder
UNIT = 28  # pixels of a token's side


@dataclass(frozen=True)
class Case:
    """``samples`` of ``tokens`` each, prompt included, on ``ranks``.

    With ``image_side``, in pixels, a prompt also has a square image, whose tokens are not counted in ``tokens``.
    """

    ranks: int
    samples: int
    tokens: int
    image_side: int = 0

    @property
    def replicas(self) -> int:
        return self.ranks // self.replica

    @property
    def nodes(self) -> int:
        return -(-self.ranks // RANKS_PER_NODE)

    @property
    def replica(self) -> int:
        return min(self.ranks, REPLICA)

    @property
    def response_tokens(self) -> int:
        return self.tokens - self.tokens // PROMPT_SHARE

    @property
    def prompt_tokens(self) -> int:
        """An upper limit. An image has a token for each 28 x 28 pixels, plus the chat template's."""
        text = self.tokens - self.response_tokens
        return text + (round(self.image_side / UNIT) ** 2 + 64 if self.image_side else 0)


# Three sizes for each of two numbers of ranks.
CASES = tuple(Case(ranks, 4096, tokens) for ranks in (8, 64) for tokens in (512, 1024, 2048))
IMAGE_CASES = (
    *(Case(8, samples, 256, IMAGE_SIDE) for samples in (128, 256, 384)),
    *(Case(64, samples, 256, IMAGE_SIDE) for samples in (64, 128, 192)),
)


def main() -> None:
    made_by = figures.source("benchmarks.scale_path")
    measured = [measure(case) for case in CASES]
    full, residuals = extrapolated(measured)
    of_images = [measure(case) for case in IMAGE_CASES]
    full_images, image_residuals = extrapolated_images(of_images, IMAGE_SAMPLES)
    result = {
        **records.environment(platform.current().machine(), max(case.ranks for case in CASES)),
        "goals": GOALS,
        "full": full,
        "measured": measured,
        "residuals": residuals,
        "images": {
            "full": full_images,
            "measured": of_images,
            "residuals": image_residuals,
            "alone": alone(IMAGE_SIDE, IMAGES_ALONE, IMAGE_SAMPLES // SAMPLES_PER_PROMPT),
        },
    }
    figures.write(RESULT, "python -m benchmarks.scale_path", made_by, result)
    Console().print(table(result), f"{RESULT} has all numbers", sep="\n")


# The loop without engines and model


class Engine:
    """Answers each request with random tokens. They are read from the bytes of a frame, as vLLM's client does."""

    alive = True

    def __init__(self, vocabulary: int) -> None:
        self.vocabulary = vocabulary

    def generate(
        self, requests: TokenBatch, sampling: Sampling, num_complete: int | None = None
    ) -> Iterator[TokenBatch]:
        for i, seed in enumerate(requests.seeds.tolist()):
            yield TokenBatch.from_bytes(self.respond(requests.select([i]), sampling, seed))

    def respond(self, request: TokenBatch, sampling: Sampling, seed: int) -> bytes:
        """Responses up to a sixteenth shorter than the limit. The first eighth counts as forced tokens."""
        numbers = np.random.default_rng(seed)
        length = int(sampling.max_tokens - numbers.integers(0, sampling.max_tokens // 16 + 1))
        continuation = batches.build(
            request.prompts,
            [numbers.integers(3, self.vocabulary, length, np.int32)],
            logprobs=[-numbers.random(length, np.float32)],
            loss_mask=[np.arange(length) >= length // 8],
            version=0,
            finish_reasons=["stop"],
        )
        return batches.extend(request, continuation).to_bytes()


class MeasuredRollout(Rollout):
    """Begins to measure when all responses have arrived and are judged."""

    meter: "Meter"

    def collect(self, *arguments: Any) -> TokenBatch:
        # If there are fewer prompts than nodes, some nodes have engines without requests.
        if len(self.generation.requests):
            self.generation.running.result()
            for verdict in self.generation.verdicts.values():
                verdict.result()
        self.meter.begin()
        return super().collect(*arguments)


class Meter:
    """What this rank has used since :meth:`begin`, which is collective."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.memory_before = status_bytes("VmRSS")

    def begin(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        self.received = received_bytes()
        dist.barrier(group=self.group)
        self.wall = time.perf_counter()
        self.cpu = time.process_time()

    def read(self) -> dict[str, float]:
        return {
            "seconds": time.process_time() - self.cpu,
            "wall": time.perf_counter() - self.wall,
            "received": received_bytes() - self.received,
            "peak": status_bytes("VmHWM") - self.memory_before,
        }


def status_bytes(name: str) -> int:
    """A size of this process, from /proc."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith(f"{name}:")]
    return int(line.split()[1]) << 10


def received_bytes() -> int:
    """Bytes that this process's TCP sockets have received so far."""
    total = 0
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # no socket, or one without a connection
            with socket.fromfd(int(name), socket.AF_INET, socket.SOCK_STREAM) as duplicate:
                info = duplicate.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
            (received,) = struct.unpack_from("Q", info, TCP_INFO_BYTES_RECEIVED)
            total += received
    return total


def configured(case: Case, run_dir: Path) -> Config:
    """The 7B recipe at the case's size."""
    overrides = [
        "recipe=safework_7b",
        "rewards=rules",
        "parallel=tp8_sp",
        f"parallel.tensor={case.replica}",
        f"parallel.sequence={'true' if case.replica > 1 else 'false'}",
        f"cluster.ranks={case.ranks}",
        f"rollout.engines={case.nodes}",
        f"algorithm.prompts_per_step={case.samples // SAMPLES_PER_PROMPT}",
        f"algorithm.samples_per_prompt={SAMPLES_PER_PROMPT}",
        f"data.max_prompt_tokens={case.prompt_tokens}",
        f"data.images.max_pixels={max(case.image_side**2, UNIT**2)}",
        f"data.images.min_pixels={UNIT**2}",
        f"rollout.max_response_tokens={case.response_tokens}",
        f"parallel.micro_batch_tokens={2 * (case.prompt_tokens + case.response_tokens)}",
        "rollout.oversample=1",
        "rollout.sleep=false",
        "rollout.environment.name=null",
        f"run_dir={run_dir}",
    ]
    with initialize_config_dir(str(Path("conf").resolve()), version_base="1.3"):
        return parse(compose("config", overrides))


def verify(row: Mapping[str, Any], response: str) -> Verdict:
    """A score that depends on the response's text, with as much text as a judge writes."""
    digest = hashlib.blake2b(response.encode(), digest_size=4).digest()
    return Verdict(digest[0] / 255, "scored", JUDGE_TEXT)


def open_loop(case: Case, config: Config, rank: int, group: dist.ProcessGroup) -> rl.Loop:
    """The loop of a rank as ``rl.prepare`` makes it, without a model."""
    node, local_rank = divmod(rank, RANKS_PER_NODE)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=TOKENIZER, eos_token="<|im_end|>")
    run_dir = Path(config.run_dir)
    label = next(iter(config.rewards.mix))
    names = [f"p{n}" for n in range(case.samples // SAMPLES_PER_PROMPT)]
    rows: dict[str, Row] = {
        name: {"id": name, "prompt": "a question", "kind": "benign", "label": label} for name in names
    }
    tower = None
    draw: Callable[[int], list[ProcessedPrompt]] = partial(draw_text, case, len(tokenizer))
    if case.image_side:
        rows = {name: {**row, "prompt": "<image>", "images": [str(run_dir / IMAGE)]} for name, row in rows.items()}
        tower = StandInTower(config.precision.dtype)
        draw = MeasuredDraw(image_processor(config), list(rows.values()), config.precision.dtype, group)
    verifiers: dict[str, Verifier] = {name: verify for weights in config.rewards.mix.values() for name in weights}
    parallel = Parallel(
        config=config.parallel,
        data=case.replicas,
        tensor_rank=rank % case.replica,
        pipeline_rank=0,
        context_rank=0,
        data_rank=rank // case.replica,
    )
    hf_config = model_config(config.model.path)
    policy = Policy(
        model=SimpleNamespace(  # type: ignore[arg-type]
            token_multiple=config.parallel.tensor * config.precision.token_multiple,
            pack_tokens=None,
            tower=tower,
            parallel=parallel,
        ),
        parallel=parallel,
        source=config.model.path,
        cost=cost_of(hf_config, config.model.frozen),
        pad_token=0,
        temperature=config.rollout.temperature,
        optimizer_config=config.optimizer,
        guard=None,  # type: ignore[arg-type]
        states=None,  # type: ignore[arg-type]
    )
    rollouts = Rollouts(
        config=config.rollout,
        seed=SEED,
        tokenizer=tokenizer,
        engines=[Engine(len(tokenizer))] if local_rank == 0 else [],  # type: ignore[list-item]
        weight_sync=None,
        control=group,
        node=node,
        nodes=case.nodes,
        verifiers=verifiers,
        client=None,
        turns=None,
        judges_share_gpus=False,
        make_room=lambda: None,
        heartbeat=lambda phase: None,
        on_restart=lambda name: None,
    )
    watchdog: Any = SimpleNamespace(beat=lambda phase: None)
    run = Run(
        root=run_dir,
        folder=run_dir,
        run_id="scale_path",
        rank=rank,
        control=group,
        processes=dist.get_world_size(),
        device=torch.device("cpu"),
        display=Display(active=False),
        clock=PhaseClock(watchdog),
        loggers=[],
        checkpoint_every=1,
        checkpoints_kept=1,
        slow_factor=1e9,
        write_settings=lambda: None,
    )
    buffer = PromptBuffer(
        draw,
        rollouts.sampling(config.rollout.temperature),
        prompts_per_step=config.algorithm.prompts_per_step,
        oversample=config.rollout.oversample,
        samples_per_prompt=SAMPLES_PER_PROMPT,
        seed=SEED,
    )
    judge = partial(rl.judge_response, config, rollouts, rows)
    return rl.Loop(
        config=config,
        policy=policy,
        critic=None,
        rollouts=rollouts,
        run=run,
        rows=rows,
        curriculum=Curriculum([(0, {})]),
        reference_every=reference_interval(config.algorithm),
        buffer=buffer,
        rollout=MeasuredRollout(buffer, rollouts.fleet, group, judge),
        judge=judge,
        constraint=objectives.initial_state(config.rewards.constraint),
        samples=SampleWriter(run_dir, rank),
    )


def draw_text(case: Case, vocabulary: int, draw: int) -> list[ProcessedPrompt]:
    """Prompts of random tokens."""
    numbers = np.random.default_rng(SEED)
    length = case.tokens - case.response_tokens
    count = case.samples // SAMPLES_PER_PROMPT
    prompts = [Prompt(f"p{n}", numbers.integers(3, vocabulary, length, np.int32)) for n in range(count)]
    return [ProcessedPrompt(prompt, None) for prompt in prompts]


class MeasuredDraw:
    """Collective. Draws prompts with images as ``rl.draw_prompts`` does. ``used``: the cost for this rank."""

    def __init__(
        self, processor: PromptProcessor, rows: Sequence[Row], dtype: torch.dtype, group: dist.ProcessGroup
    ) -> None:
        self.processor = processor
        self.rows = rows
        self.dtype = dtype
        self.group = group
        self.used: dict[str, float] = {}

    def __call__(self, draw: int) -> list[ProcessedPrompt]:
        meter = Meter(self.group)
        meter.begin()
        prompts = process(self.processor, self.rows, self.dtype, self.group)
        self.used = meter.read()
        return prompts


class StandInTower(torch.nn.Module):
    """A trained vision tower with Qwen2.5-VL's layout but without layers."""

    layout = qwen2_5_vl.VisionTower.layout

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.hf_config = published_config("Qwen2.5-VL-72B-Instruct").vision_config  # type: ignore[union-attr]
        self.weight = torch.nn.Parameter(torch.zeros(1))


def image_processor(config: Config) -> PromptProcessor:
    processor = PromptProcessor(IMAGE_MODEL, config.data.max_prompt_tokens, config.data.images)
    processor.hf.image_processor.size = dict(IMAGE_LIMITS)
    return processor


def draw_image(path: Path, side: int) -> None:
    """Write a JPEG with content like a photograph's: smooth shapes with noise."""
    numbers = np.random.default_rng(SEED)
    coarse = PIL.Image.fromarray(numbers.integers(0, 256, (side // 50 + 1, side // 50 + 1, 3), np.uint8))
    smooth = np.asarray(coarse.resize((side, side), PIL.Image.Resampling.BICUBIC), np.int16)
    noisy = np.clip(smooth + numbers.integers(-8, 9, smooth.shape, np.int16), 0, 255)
    PIL.Image.fromarray(noisy.astype(np.uint8)).save(path, quality=90)


def alone(side: int, count: int, prompts: int) -> dict[str, float]:
    """Estimates ``seconds`` and ``bytes`` of pixels of a rank that processes all ``prompts`` by itself.

    It measures ``count`` of them, in a separate process.
    """
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as name:
        process_alone = context.Process(target=write_alone, args=(Path(name), side, count))
        process_alone.start()
        process_alone.join()
        used = json.loads((Path(name) / "alone.json").read_text())
    return {name: value * prompts / count for name, value in used.items()} | {"prompts": prompts, "measured": count}


def write_alone(folder: Path, side: int, count: int) -> None:
    torch.set_num_threads(1)
    draw_image(folder / IMAGE, side)
    processor = image_processor(configured(Case(1, SAMPLES_PER_PROMPT, 64, side), folder))
    row = {"id": "p", "prompt": "<image>", "images": [str(folder / IMAGE)]}
    begin = time.process_time()
    kept = [processor(row).vision for _ in range(count)]
    seconds = time.process_time() - begin
    pixels = sum(vision.pixels.nbytes for vision in kept if vision is not None)
    (folder / "alone.json").write_text(json.dumps({"seconds": seconds, "bytes": pixels}))


# A step


def step(loop: rl.Loop, group: dist.ProcessGroup) -> dict[str, Any]:
    """Collective. Runs one step and returns what this rank used."""
    assert isinstance(loop.rollout, MeasuredRollout)
    meter = loop.rollout.meter = Meter(group)
    batch, all_rounds = rl.generate(loop, 0, False)
    batch, score_metrics = rl.score(loop, batch, all_rounds)
    batch, _ = rl.compute_advantages(loop, batch)
    updates, micro_batches_of_updates = rl.pack_updates(loop, batch)
    streamed = 0.0
    for of_update in micro_batches_of_updates:
        of_pass = iter(of_update)
        next(of_pass)  # the pass waits for the first one
        after_first = time.process_time()
        collections.deque(of_pass, maxlen=0)  # as a pass reads them, each for a moment
        streamed += time.process_time() - after_first
    policy_metrics = rl.policy_metrics({}, loop.uses_reference(0))
    metrics = {"step": 1, **score_metrics, **policy_metrics, **rl.generation_metrics(loop, 0, batch)}
    rl.record(loop, metrics, batch)
    used = meter.read()
    used["seconds"] -= streamed
    loop.samples.wait()
    if isinstance(loop.buffer.draw, MeasuredDraw):
        drawn = loop.buffer.draw.used
        used |= {name: drawn[name] + used[name] for name in ("seconds", "wall", "received")}
        used["peak"] = max(drawn["peak"], used["peak"])
    micro_batches = [each for of_update in micro_batches_of_updates for each in of_update]
    pixels = sum(
        vision.part.rows.nbytes
        for part in updates
        for vision in part.vision or []
        if vision is not None and vision.part is not None
    )
    trained = sum(
        int(part.response_lengths[each.indices].sum())
        for part, of_update in zip(updates, micro_batches_of_updates, strict=True)
        for each in of_update
    )
    return {
        **used,
        "streamed": streamed,
        "share": 9 * trained + pixels,
        "micro_batches": (1 + AHEAD) * max(sum(tensor.nbytes for tensor in tensors_of(each)) for each in micro_batches),
        "digest": digest(micro_batches),
    }


def tensors_of(micro_batch: MicroBatch) -> list[torch.Tensor]:
    """The tensors that do not depend on which other responses this rank holds."""
    named = [micro_batch.values[name] for name in sorted(micro_batch.values)]
    if micro_batch.vision is not None:
        named += [micro_batch.vision.images, micro_batch.vision.rows, micro_batch.vision.places]
    return [micro_batch.tokens, micro_batch.positions, micro_batch.predict, micro_batch.targets, *named]


def digest(micro_batches: Sequence[MicroBatch]) -> str:
    """A digest of all bits that the passes get."""
    hashed = hashlib.sha256()
    for micro_batch in micro_batches:
        hashed.update(json.dumps([micro_batch.indices, micro_batch.lengths.tolist()]).encode())
        for tensor in tensors_of(micro_batch):
            hashed.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return hashed.hexdigest()[:16]


def rank_main(case: Case, config: Config, rank: int, folder: Path) -> None:
    """Run one rank in its own process and write its figures to a file."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=case.ranks,
        timeout=timedelta(seconds=SECONDS),
    )
    group = dist.group.WORLD
    assert group is not None
    used = step(open_loop(case, config, rank, group), group)
    (folder / f"rank_{rank}.json").write_text(json.dumps(used))
    dist.barrier()
    dist.destroy_process_group()


def measure(case: Case) -> dict[str, Any]:
    """Fork the ranks and combine their figures. Raises RuntimeError if a rank fails."""
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = configured(case, folder)
        if case.image_side:
            draw_image(folder / IMAGE, case.image_side)
        processes = [context.Process(target=rank_main, args=(case, config, rank, folder)) for rank in range(case.ranks)]
        for forked in processes:
            forked.start()
        for forked in processes:
            forked.join()
        exit_codes = [forked.exitcode for forked in processes]
        if any(exit_codes):
            raise RuntimeError(f"{case}: ranks ended with {exit_codes}")
        ranks = [json.loads((folder / f"rank_{rank}.json").read_text()) for rank in range(case.ranks)]
        return {**asdict(case), **summary(ranks), "lines": digest_of_lines(folder)}


def summary(ranks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Each figure's maximum over the ranks, and the goals' ratios, each from the rank where it is worst."""
    return {
        **{name: max(rank[name] for rank in ranks) for name in ("wall", *SIZES)},
        "received_to_share": max(rank["received"] / rank["share"] for rank in ranks),
        "peak_to_share": max(rank["peak"] / (rank["share"] + rank["micro_batches"]) for rank in ranks),
        "digests": sorted({rank["digest"] for rank in ranks}),
    }


def digest_of_lines(folder: Path) -> str:
    """A digest of the records of the step's samples, independent of their order."""
    lines = sorted(line for path in folder.rglob("step_*.jsonl") for line in path.read_bytes().splitlines())
    return hashlib.sha256(b"\n".join(lines)).hexdigest()[:16]


def extrapolated(measured: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """The figures of case B for each of ``FULL_RANKS``, and each figure's residual (see the module's docstring)."""
    samples = measured[0]["samples"]
    full = [Case(ranks, samples, FULL_TOKENS) for ranks in FULL_RANKS]
    cases = [Case(row["ranks"], samples, row["tokens"]) for row in measured]
    rows: list[dict[str, Any]] = [{"ranks": case.ranks, "samples": samples, "tokens": case.tokens} for case in full]
    residuals = {}
    for name in SIZES:
        weights, residuals[name] = fitted([terms(name, case) for case in cases], [row[name] for row in measured])
        for row, case in zip(rows, full, strict=True):
            row[name] = float(weights @ terms(name, case))
    return rows, residuals


def extrapolated_images(
    measured: Sequence[Mapping[str, Any]], samples: int
) -> tuple[list[dict[str, Any]], dict[str, dict[str, float]]]:
    """The figures of ``samples`` for each number of ranks, and the residuals by number of ranks.

    The figures are extrapolated by a line through those of fewer samples.
    """
    rows = []
    residuals: dict[str, dict[str, float]] = {}
    for ranks in sorted({row["ranks"] for row in measured}):
        of_ranks = [row for row in measured if row["ranks"] == ranks]
        full: dict[str, Any] = {"ranks": ranks, "samples": samples, "tokens": of_ranks[0]["tokens"]}
        residuals[str(ranks)] = {}
        for name in SIZES:
            points = [[1.0, row["samples"]] for row in of_ranks]
            weights, residuals[str(ranks)][name] = fitted(points, [row[name] for row in of_ranks])
            full[name] = float(weights @ [1.0, samples])
        rows.append(full)
    return rows, residuals


def fitted(points: Sequence[Sequence[float]], figures_at: Sequence[float]) -> tuple[np.ndarray, float]:
    """Least-squares weights of the points' terms, and the largest relative error of their sum."""
    of_points = np.asarray(points, np.float64)
    scale = np.abs(of_points).max(axis=0)
    weights = np.linalg.lstsq(of_points / scale, np.asarray(figures_at, np.float64))[0] / scale
    off = np.abs(of_points @ weights - figures_at)
    return weights, float((off / np.maximum(np.abs(figures_at), 1e-9)).max())


def terms(name: str, case: Case) -> list[float]:
    """The terms whose weighted sum is a figure."""
    changing = case.ranks if name in ("seconds", "streamed", "received") else 1 / case.replicas
    return [1.0, changing, case.tokens, case.tokens / case.replicas]


def table(result: Mapping[str, Any]) -> Table:
    """Measured and extrapolated figures, with sizes in MB (10^6 bytes)."""
    shown = Table(
        "ranks", "samples", "tokens", "seconds", "streamed", "received", "share", "peak", "share + micro-batches"
    )
    images = result["images"]
    for rows in (result["measured"], result["full"], images["measured"], images["full"]):
        for row in rows:
            sizes = [row["received"], row["share"], row["peak"], row["share"] + row["micro_batches"]]
            cells = [f"{size / 1e6:.1f}" for size in sizes]
            counts = [str(row[name]) for name in ("ranks", "samples", "tokens")]
            shown.add_row(*counts, f"{row['seconds']:.2f}", f"{row['streamed']:.2f}", *cells)
        shown.add_section()
    return shown


if __name__ == "__main__":
    main()
