"""Real vLLM on the CPU, fed by two trainer ranks: this process is rank 0, a spawned one is rank 1.

All processes start at once, because importing vLLM takes most of the time; the tests share them and run in order.
"""

import json
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist

from megatron_ext.batch import TokenBatch
from recipes.preflight.simulated_engines import layouts
from rollout.engine import Engine, EngineError, EngineSettings, stop_engines
from rollout.sampler import generate, make_requests
from rollout.sampling import Sampling
from rollout.weight_sync.layout import ParameterLayout
from rollout.weight_sync.sync import WeightSync, WeightSyncError
from tests import warm
from tests.responses import PlainResponse, make_prompt, plain
from tests.rollout.twins import TIED, UNTIED, Twin, tensor_parallel_shards
from tests.rollout.vllm_processes import DIGESTS, REQUESTS, RESPONSES, ForeignEngine, as_argument
from tests.settings import engine_settings

TWINS = {"tied": TIED, "untied": UNTIED}
STARTUP_SECONDS = 400
SAMPLING = Sampling(max_tokens=10, stop_token_ids=(2, 11))
PROMPTS = [make_prompt(f"p{i}", [3 + (7 * i + j) % 180 for j in range(3 + 10 * i)]) for i in range(4)]
ROOT = Path(__file__).resolve().parents[2]


def settings_of(twin: Twin, folder: Path, tp: int) -> EngineSettings:
    dtype = str(twin.dtype).removeprefix("torch.")
    return engine_settings(
        model=str(folder),
        dtype=dtype,
        max_model_len=96,
        max_num_seqs=8,
        max_num_batched_tokens=96,  # less than the prompts of a batch: they enter over several steps
        kv_cache_gib=0.02,
        tensor=tp,
        staleness=1,
        in_flight_updates=True,
    )


class TrainerRank:
    """One of two trainer ranks: shards of both twins in FP32 and a weight sync for each."""

    def __init__(self, rank: int, store: str) -> None:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
        self.rank, self.plans = rank, Path(store).parent / "plans"
        self.trained_models: dict[str, Any] = {}
        self.weight_syncs: dict[str, WeightSync] = {}

    def connect(self, name: str, engine: Engine | None) -> None:
        twin = TWINS[name]
        self.trained_models[name] = tensor_parallel_shards(
            twin, twin.model(0).state_dict(), 2, self.rank, torch.float32
        )
        engines = [engine] if engine else []
        assert dist.group.WORLD is not None
        self.weight_syncs[name] = WeightSync(
            self.trained_models[name].shards,
            engines,
            dist.group.WORLD,
            bucket_bytes=1 << 20,
            verify_every=1,
            plans=self.plans,
        )

    def load(self, name: str, seed: int) -> None:
        self.trained_models[name].weights = TWINS[name].model(seed).state_dict()
        self.trained_models[name].fill()

    def disturb(self, name: str, shard_name: str, rank: int) -> None:
        if rank == self.rank:
            (shard,) = [shard for shard in self.trained_models[name].shards if shard.name == shard_name]
            shard.tensor[0] += 1

    def sync(self, name: str, version: int) -> Any:
        return self.weight_syncs[name].sync(version)


def second_rank(store: str, pipe: Any) -> None:
    trainer = TrainerRank(1, store)
    while True:
        method, args = pipe.recv()
        if method == "exit":
            return
        try:
            pipe.send(getattr(trainer, method)(*args))
        except WeightSyncError as error:
            pipe.send(error)


class Trainer:
    """Runs a method of :class:`TrainerRank` on both ranks."""

    def __init__(self, store: str) -> None:
        self.pipe, theirs = multiprocessing.get_context("spawn").Pipe()
        arguments = (store, theirs)
        self.process = multiprocessing.get_context("spawn").Process(target=second_rank, args=arguments, daemon=True)
        self.process.start()
        self.rank_zero = TrainerRank(0, store)

    def connect(self, name: str, engine: Engine) -> None:
        self.pipe.send(("connect", (name, None)))
        self.rank_zero.connect(name, engine)
        assert self.pipe.recv() is None

    def do(self, method: str, *args: Any) -> Any:
        """The result on rank 0. When it raises, the other rank must have raised the same."""
        self.pipe.send((method, args))
        try:
            result = getattr(self.rank_zero, method)(*args)
        except WeightSyncError as error:
            theirs = self.pipe.recv()
            assert isinstance(theirs, WeightSyncError) and str(theirs) == str(error)
            raise
        theirs = self.pipe.recv()
        assert not isinstance(theirs, Exception), theirs
        return result

    def close(self) -> None:
        if self.process.is_alive():
            self.pipe.send(("exit", ()))
            self.process.join(30)
        dist.destroy_process_group()


@dataclass
class World:
    """Everything that the tests share."""

    tied: Engine
    untied: ForeignEngine
    doomed: Engine
    owner: subprocess.Popen[bytes]
    fresh: subprocess.Popen[bytes]
    fresh_folder: Path
    trainer: Trainer

    def ready(self, engine: Engine) -> Engine:
        engine.wait_until_ready(time.monotonic() + STARTUP_SECONDS)
        return engine


def program(*arguments: str) -> "subprocess.Popen[bytes]":
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "TORCH_COMPILE_DISABLE": "1"}
    environment |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1", "VLLM_NO_USAGE_STATS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "tests.rollout.vllm_processes", *arguments], cwd=ROOT, env=environment
    )


def start_fresh(
    settings: EngineSettings, requests: TokenBatch, sampling: Sampling, folder: Path
) -> "subprocess.Popen[bytes]":
    """vLLM that loads its weights from disk (``vllm_processes.fresh``)."""
    folder.mkdir()
    (folder / REQUESTS).write_bytes(requests.to_bytes())
    return program("fresh", as_argument(settings), as_argument(sampling), str(folder))


def fresh_results(folder: Path) -> tuple[list[dict[str, str]], list[PlainResponse]]:
    """Digests of each worker's parameters, and the responses in the order of the requests."""
    responses = TokenBatch.from_bytes((folder / RESPONSES).read_bytes())
    return json.loads((folder / DIGESTS).read_text()), plain(responses)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("vllm")
    models = {name: twin.save(folder / name, seed=0) for name, twin in TWINS.items()}
    tied = settings_of(TIED, models["tied"], tp=1)
    untied = settings_of(UNTIED, models["untied"], tp=2)
    too_long = replace(tied, max_model_len=100_000, rollout=replace(tied.rollout, max_num_batched_tokens=100_000))

    requests = make_requests(PROMPTS, 2, seed=5, step=0)
    fresh_folder = folder / "fresh"
    owner_output = folder / "owner.json"
    tied_engine = Engine(tied, folder / "tied.log")
    with warm.processes():
        fresh = start_fresh(tied, requests, SAMPLING, fresh_folder)
        owner = program("owner", as_argument(untied), str(folder / "untied.log"), str(owner_output))
        engines = [tied_engine, Engine(too_long, folder / "doomed.log")]
        trainer = Trainer(str(folder / "store"))
    try:
        while not owner_output.exists() or not owner_output.read_text():
            time.sleep(0.1)
        foreign = ForeignEngine(untied, folder / "untied.log", **json.loads(owner_output.read_text()))
        yield World(engines[0], foreign, engines[1], owner, fresh, fresh_folder, trainer)
    finally:
        trainer.close()
        for process in (owner, fresh):
            process.kill()
            process.wait()
        stop_engines(engines)


def sample(engine: Engine, sampling: Sampling = SAMPLING, seed: int = 5) -> list[PlainResponse]:
    return plain(generate([engine], PROMPTS, sampling, samples_per_prompt=2, seed=seed, step=0))


def digests(engine: Engine) -> list[dict[str, str]]:
    return engine.call("GET", "/weights/digest")["workers"]


def logprobs_of(model: torch.nn.Module, response: PlainResponse, temperature: float = 1.0) -> torch.Tensor:
    """Of the response's tokens, by a plain forward."""
    ids = torch.tensor([response.prompt + response.tokens])
    with torch.no_grad():
        logprobs = (model(ids).logits[0] / temperature).log_softmax(-1)
    first = len(response.prompt) - 1
    return logprobs[first:-1].gather(-1, ids[0, first + 1 :, None])[:, 0]


def gap(twin: Twin, responses: list[PlainResponse], temperature: float = 1.0) -> torch.Tensor:
    """Of all log-probs to those of a plain FP32 forward of the weights as vLLM holds them."""
    model = twin.model(0).float()
    return torch.cat([(logprobs_of(model, r, temperature) - torch.tensor(r.logprobs)).abs() for r in responses])


def test_no_samples_before_the_first_sync(world: World) -> None:
    engine = world.ready(world.tied)
    assert engine.health()["weight_version"] is None
    with pytest.raises(EngineError, match="no weights yet: sync once before generating"):
        sample(engine)


def test_after_a_sync_weights_and_samples_equal_those_of_vllm_that_loaded_the_checkpoint(world: World) -> None:
    """From FP32 shards at TP 2 with padded heads to BF16 vLLM: every parameter's bits, every token and log-prob."""
    world.trainer.connect("tied", world.ready(world.tied))
    report = world.trainer.do("sync", "tied", 1)
    model = TIED.model(0)
    assert report["bytes"] == 2 * sum(parameter.numel() for parameter in model.parameters())
    assert world.fresh.wait(STARTUP_SECONDS) == 0
    workers, expected = fresh_results(world.fresh_folder)
    assert digests(world.tied) == workers
    assert len(expected) == 8
    assert sample(world.tied) == [replace(r, versions=[1] * len(r.tokens)) for r in expected]


def test_samples_say_how_they_were_made(world: World) -> None:
    responses = sample(world.tied)
    by_id = {prompt.prompt_id: prompt.token_ids.tolist() for prompt in PROMPTS}
    for r in responses:
        assert r.versions == [1] * len(r.tokens)
        assert r.prompt == by_id[r.prompt_id]
        assert len(r.logprobs) == len(r.tokens) <= SAMPLING.max_tokens
        stopped = [i for i, token in enumerate(r.tokens) if token in SAMPLING.stop_token_ids]
        assert r.finish_reason == ("stop" if stopped else "length")
        assert stopped in ([], [len(r.tokens) - 1]), "the stop token is kept, and nothing follows it"
        assert r.forced == []
    frequent = {token for r in responses for token in r.tokens}
    early = sample(world.tied, Sampling(max_tokens=10, stop_token_ids=tuple(sorted(frequent))))
    assert all(len(r.tokens) < 10 and r.finish_reason == "stop" for r in early)


def test_the_same_requests_give_the_same_bits_and_other_seeds_others(world: World) -> None:
    first = sample(world.tied)
    other = sample(world.tied, seed=6)
    assert sample(world.tied) == first
    assert [r.tokens for r in other] != [r.tokens for r in first]


def test_logprobs_in_bf16_are_those_of_a_plain_forward(world: World) -> None:
    """Bounds from BF16's 8 bits at logits of order 10: one rounding of a logit is up to 0.03."""
    difference = gap(TIED, sample(world.tied))
    assert difference.max() < 0.5 and difference.mean() < 0.08
    cool = Sampling(max_tokens=10, stop_token_ids=(2,), temperature=0.5)
    difference = gap(TIED, sample(world.tied, cool), temperature=0.5)
    assert difference.max() < 1.0 and difference.mean() < 0.16


def test_other_weights_change_everything_and_the_old_ones_bring_all_bits_back(world: World) -> None:
    before, samples = digests(world.tied), sample(world.tied)
    world.trainer.do("load", "tied", 1)
    world.trainer.do("sync", "tied", 2)
    (changed,) = digests(world.tied)
    assert all(changed[name] != digest for name, digest in before[0].items())
    assert [s.logprobs for s in sample(world.tied)] != [s.logprobs for s in samples]
    world.trainer.do("load", "tied", 0)
    world.trainer.do("sync", "tied", 1)
    assert digests(world.tied) == before
    assert sample(world.tied) == samples


def test_ranks_that_disagree_about_a_shared_tensor_are_found_before_anything_is_touched(world: World) -> None:
    before = digests(world.tied)
    world.trainer.do("disturb", "tied", "model.norm.weight", 1)
    with pytest.raises(WeightSyncError, match=r"model\.norm\.weight at \(0,\): ranks \[\d, \d\] should hold the same"):
        world.trainer.do("sync", "tied", 3)
    assert digests(world.tied) == before
    assert world.tied.health().items() >= {"weight_version": 1, "stale": False, "workers": 1}.items()
    world.trainer.do("load", "tied", 0)


def test_a_transfer_that_corrupts_a_bit_makes_the_engine_refuse_until_a_good_sync(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight_sync = world.trainer.rank_zero.weight_syncs["tied"]
    (values,) = [
        values for _, piece, values in weight_sync.local_pieces if piece.hf_name.endswith("1.mlp.up_proj.weight")
    ]
    checksums = weight_sync._checksums

    def checksums_then_corrupt() -> Any:
        before = checksums()
        values[0, 0] *= 2
        return before

    monkeypatch.setattr(weight_sync, "_checksums", checksums_then_corrupt)
    with pytest.raises(WeightSyncError, match=r"model\.layers\.1\.mlp\.up_proj\.weight: vLLM's checksum .* \(1 of "):
        world.trainer.do("sync", "tied", 4)
    assert world.tied.health()["stale"]
    with pytest.raises(EngineError, match="the weights are stale: sync again"):
        sample(world.tied)
    monkeypatch.undo()
    world.trainer.do("load", "tied", 0)
    world.trainer.do("sync", "tied", 5)
    assert {version for r in sample(world.tied) for version in r.versions} == {5}


LONG = Sampling(max_tokens=60, stop_token_ids=(2,))
STEPS_BEFORE = 5


def sync_in_the_middle(world: World, generating: "Future[Any]", version: int) -> None:
    """A sync that finds the engine after some steps of a batch. It stands still until the sync has been asked for."""
    while world.tied.health()["unfinished_requests"] == 0:
        assert not generating.done()
    first = world.tied.health()["progress"]
    while world.tied.health()["progress"] < first + STEPS_BEFORE:
        assert not generating.done()
    process = psutil.Process(world.tied.pid)
    process.suspend()
    threading.Timer(1.0, process.resume).start()
    world.trainer.do("sync", "tied", version)


def test_new_weights_reach_an_engine_in_the_middle_of_a_batch(world: World) -> None:
    world.trainer.do("load", "tied", 0)
    world.trainer.do("sync", "tied", 6)
    undisturbed = sample(world.tied, LONG)
    world.trainer.do("load", "tied", 1)
    with ThreadPoolExecutor(1) as threads:
        generating = threads.submit(sample, world.tied, LONG)
        sync_in_the_middle(world, generating, 7)
        updated = generating.result()
    assert [r.key for r in updated] == [r.key for r in undisturbed]
    for r, before in zip(updated, undisturbed, strict=True):
        old = r.versions.count(6)
        assert r.versions == [6] * old + [7] * (len(r.tokens) - old) and old > 0
        assert (r.tokens[:old], r.logprobs[:old]) == (before.tokens[:old], before.logprobs[:old])
        assert r.logprobs[old : old + 1] != before.logprobs[old : old + 1] or len(r.tokens) == old
    assert any(7 in r.versions for r in updated)
    assert world.tied.health().items() >= {"weight_version": 7, "stale": False, "unfinished_requests": 0}.items()
    assert {version for r in sample(world.tied) for version in r.versions} == {7}, "without a second sync"


def test_a_sync_that_fails_in_the_middle_of_a_batch_ends_in_an_error_on_every_side(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On both ranks of the trainer, and for who waits for the responses."""
    weight_sync = world.trainer.rank_zero.weight_syncs["tied"]
    checksums = weight_sync._checksums

    def checksums_then_corrupt() -> Any:
        before = checksums()
        weight_sync.local_pieces[0][2][0] += 1
        return before

    monkeypatch.setattr(weight_sync, "_checksums", checksums_then_corrupt)
    with ThreadPoolExecutor(1) as threads:
        generating = threads.submit(sample, world.tied, LONG)
        with pytest.raises(WeightSyncError, match="vLLM's checksum"):
            sync_in_the_middle(world, generating, 8)
        with pytest.raises(EngineError, match="in the middle of the response, and did not arrive whole"):
            generating.result()
    assert world.tied.health().items() >= {"stale": True, "unfinished_requests": 0}.items()
    monkeypatch.undo()
    world.trainer.do("load", "tied", 0)
    world.trainer.do("sync", "tied", 9)
    assert len(sample(world.tied)) == 8


def test_a_prompt_that_does_not_fit_is_refused_by_name_and_the_batch_with_it(world: World) -> None:
    prompts = [PROMPTS[0], make_prompt("long", [5] * 120)]
    with pytest.raises(EngineError, match="prompt 'long': 120 prompt tokens and max_tokens=10 do not fit"):
        generate([world.tied], prompts, SAMPLING, samples_per_prompt=1, seed=0, step=0)
    assert world.tied.health()["unfinished_requests"] == 0
    assert len(sample(world.tied)) == 8


def test_an_idle_engine_burns_no_cpu(world: World) -> None:
    process = psutil.Process(world.tied.pid)
    before = sum(process.cpu_times()[:2])
    time.sleep(2)
    assert sum(process.cpu_times()[:2]) - before < 0.2


def test_an_engine_that_dies_while_starting_says_why(world: World) -> None:
    with pytest.raises(
        EngineError, match=r"(?s)doomed \(pid \d+\): died while starting \(exit code 1\).*max_model_len"
    ):
        world.ready(world.doomed)


def test_two_vllm_workers_in_fp32(world: World) -> None:
    """TP 2 trainer → TP 2 vLLM with fused biases: the engine first held the checkpoint itself, loaded by vLLM."""
    engine = world.ready(world.untied)
    loaded = digests(engine)
    assert len(loaded) == 2 and loaded[0] != loaded[1]
    world.trainer.connect("untied", engine)
    world.trainer.do("load", "untied", 1)
    world.trainer.do("sync", "untied", 1)
    assert digests(engine) != loaded
    world.trainer.do("load", "untied", 0)
    world.trainer.do("sync", "untied", 2)
    assert digests(engine) == loaded
    samples = sample(engine)
    assert sample(engine) == samples
    assert gap(UNTIED, samples).max() < 2e-4


def workers_of(engine: Engine) -> list[psutil.Process]:
    """vLLM's, which multiprocessing has spawned."""
    return [child for child in psutil.Process(engine.pid).children() if "spawn_main" in " ".join(child.cmdline())]


def test_workers_that_have_answered_leave_their_cores_to_others(world: World) -> None:
    """vLLM's workers poll for a second after each call, which would be 0.8 s of CPU time of each worker here."""
    workers = workers_of(world.untied)
    digests(world.untied)
    before = [sum(worker.cpu_times()[:2]) for worker in workers]
    time.sleep(0.8)
    used = [sum(worker.cpu_times()[:2]) - start for worker, start in zip(workers, before, strict=True)]
    assert len(used) == 2 and max(used) < 0.1


def test_a_simulated_engine_answers_as_a_real_one(world: World) -> None:
    engine = world.ready(world.untied)
    shapes = {name: tuple(tensor.shape) for name, tensor in UNTIED.model(0).state_dict().items()}
    answer = engine.call("POST", "/weights/layout", {"tensors": shapes})["workers"]
    real = [[ParameterLayout.from_json(parameter) for parameter in worker] for worker in answer]
    assert layouts(engine.settings.model, engine.settings.dtype, 2, 1, shapes) == real


def test_an_engine_that_answers_but_makes_no_step_is_found(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of its two workers is stopped in the middle of a batch. In place of the kill the worker may go on, and the
    batch is that of an undisturbed engine; one that goes on in time is left alone."""
    untied = world.untied
    engine = ForeignEngine(
        replace(untied.settings, rollout=replace(untied.settings.rollout, stall_timeout=8.0)),
        untied.log_path,
        untied.pid,
        untied.socket_name,
    )
    undisturbed = sample(untied)
    killed: list[int] = []
    _, worker = workers_of(engine)

    def go_on() -> None:
        killed.append(engine.health()["progress"])
        worker.resume()

    monkeypatch.setattr(engine, "kill", go_on)
    for pause in (1.0, None):
        worker.suspend()
        if pause is not None:
            threading.Timer(pause, worker.resume).start()
        assert sample(engine) == undisturbed
        assert len(killed) == (pause is None)


def mapped_shared_memory(pid: int) -> list[str]:
    """Files in /dev/shm that a process maps and that still have a name."""
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return [line.split(maxsplit=5)[5] for line in lines if "/dev/shm/" in line and not line.endswith("(deleted)")]


def test_nothing_outlives_an_owner_that_is_killed(world: World) -> None:
    """Engine, its two vLLM workers and their helpers, and every name in shared memory.

    A worker of vLLM ends by itself when its pipe closes, unless it is busy. Here the pipe is kept open, so that our own
    lines have to end it.
    """
    engine = psutil.Process(world.ready(world.untied).pid)
    family = [engine, *engine.children(recursive=True)]
    assert len(family) >= 3
    names = {name for process in family for name in mapped_shared_memory(process.pid)}
    assert names, "vLLM's workers no longer share named memory: this test then needs less"
    # multiprocessing's resource trackers end when their pipe closes, and so after the others.
    trackers = [process for process in family if "resource_tracker" in " ".join(process.cmdline())]
    pipes = [entry for entry in Path(f"/proc/{engine.pid}/fd").iterdir() if os.readlink(entry).startswith("pipe:")]
    held = [os.open(pipe, os.O_WRONLY | os.O_NONBLOCK) for pipe in pipes]
    world.owner.kill()
    world.owner.wait()
    _, alive = psutil.wait_procs([process for process in family if process not in trackers], timeout=60)
    for pipe in held:
        os.close(pipe)
    _, left = psutil.wait_procs(family, timeout=60)
    assert not alive and not left
    deadline = time.monotonic() + 60
    while any(os.path.exists(name) for name in names) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not [name for name in names if os.path.exists(name)]
    with pytest.raises(EngineError, match="none of the 1 engines is alive"):
        sample(world.untied)


def test_a_trainer_rank_that_dies_ends_the_sync_with_an_error(world: World) -> None:
    world.trainer.process.kill()
    world.trainer.process.join()
    with pytest.raises(RuntimeError, match=r"[Cc]onnection"):
        world.trainer.rank_zero.sync("tied", 6)


def test_stop_ends_the_engine_without_killing_it_and_can_be_repeated(world: World) -> None:
    stop_engines([world.tied])
    stop_engines([world.tied])
    assert world.tied.process.returncode == 0 and not world.tied.alive
