"""The weight sync between GPUs over a fake driver (``fake_cuda``): order, device and lifetime of what it shares.

``python -m tests.rollout.test_fake_cuda`` plays each case: ranks and vLLM workers are threads that run the project's
``cuda_ipc``, ``Network`` and ``WeightSyncWorker``. Cases with a line of ours taken out show that the fake finds it.
"""

import gc
import json
import math
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ext.blocks import Block
from rollout import vllm_platform
from rollout.weight_sync import memory, network
from rollout.weight_sync.layout import ParameterLayout, Region
from rollout.weight_sync.memory import Signals
from rollout.weight_sync.plan import Place, Plan, Topology
from rollout.weight_sync.planner import build_plan
from rollout.weight_sync.sync import WeightSync, _engine_share, _readers
from tests import warm
from tests.rollout.fake_cuda import Clock, Driver, DriverError, Process, install, join

ROOT = Path(__file__).resolve().parents[2]
SHAPE = (16, 16)
TENSORS = 24
BUCKET = 4 << 10
SYNCS = 3


def values(sync: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(sync)
    return {f"t{i}": torch.randn(SHAPE, generator=generator).bfloat16() for i in range(TENSORS)}


class World:
    """Ranks and the workers of engines with one worker each, all on GPUs of their own but for what ``places`` says.

    ``holders``: the ranks that have all weights, in FP32.
    """

    def __init__(self, driver: Driver, ranks: list[Place], holders: int, engines: list[Place]) -> None:
        self.driver = driver
        table = [(f"s{i}", Block(f"t{i}", (0, 0), (0, 0), SHAPE)) for i in range(TENSORS)]
        regions = [(f"p{i}", Region((0, 0), f"t{i}", (0, 0), SHAPE)) for i in range(TENSORS)]
        tables = [table if rank < holders else [] for rank in range(len(ranks))]
        topology = Topology(tuple(ranks), tuple((place,) for place in engines))
        layouts = [ParameterLayout(name, SHAPE, "bfloat16", (part,), ()) for name, part in regions]
        self.plan: Plan = build_plan(tables, [layouts], topology, BUCKET)
        self.readers = _readers(self.plan)
        self.ranks = [Process(f"rank {n}", int(place.device)) for n, place in enumerate(ranks)]
        self.workers = [Process(f"worker {n}", int(place.device)) for n, place in enumerate(engines)]
        driver.ranks = dict(enumerate(self.ranks))
        self.shards: list[dict[str, torch.Tensor]] = []
        self.networks: list[network.Network] = []
        self.slots: list[torch.Tensor | None] = [None] * len(ranks)
        for n, process in enumerate(self.ranks):
            with driver.within(process):
                names = [name for name, _ in tables[n]]
                self.shards.append({name: driver.allocate(torch.zeros(SHAPE)) for name in names})
        self.attach()

    def attach(self) -> None:
        """As ``WeightSync.attach``: everything that an engine's start needs."""
        self.networks = []
        addresses = []
        for n, process in enumerate(self.ranks):
            with self.driver.within(process):
                device = torch.device("cpu")
                self.slots[n] = slots = network.make_slots(self.plan, n, device, self.slots[n])
                readers = len(self.readers[n])
                rank_network = network.Network(
                    self.plan,
                    n,
                    self.shards[n],
                    slots,
                    readers,
                    None,  # type: ignore[arg-type]
                )
                self.networks.append(rank_network)
                shared = {"slots": memory.share_tensors({"slots": slots}) if readers else None}
                shared["shards"] = memory.share_tensors(self.shards[n])
                self.driver.host_memory.add(rank_network.signals.values.data_ptr())
                shared["signals"] = memory.share_tensors({"signals": rank_network.signals.values})
            addresses.append(shared)
        self.engines = [
            self.worker(e, json.loads(json.dumps(_engine_share(self.plan, e, self.readers, addresses))))
            for e in range(len(self.workers))
        ]

    def worker(self, e: int, share: Any) -> Any:
        """The project's part of a vLLM worker, with a model of plain parameters."""
        from rollout.weight_sync.worker import WeightSyncWorker

        with self.driver.within(self.workers[e]):
            model = torch.nn.Module()
            for i in range(TENSORS):
                tensor = torch.full(SHAPE, math.nan, dtype=torch.bfloat16)
                model.register_parameter(f"p{i}", torch.nn.Parameter(tensor, requires_grad=False))
            worker: Any = WeightSyncWorker()
            worker.rank = 0
            worker.get_model = lambda: model
            worker.weight_sync_layouts = []
            answer = json.loads(worker.weight_sync_plan(json.dumps(share)))
            if "error" in answer:
                raise DriverError(answer["error"])
        return worker

    def sync(self, sequence: int) -> None:
        """Every rank updates its weights and brings them (``WeightSync.sync``), every worker takes what it needs."""

        def rank(n: int) -> None:
            for name, tensor in self.shards[n].items():
                tensor.copy_(values(sequence)["t" + name[1:]])
            weight_sync: Any = object.__new__(WeightSync)
            weight_sync.platform = vllm_platform.CPU
            weight_sync.device = torch.device("cpu")
            weight_sync.network = self.networks[n]
            weight_sync.plan = self.plan
            weight_sync.syncs = sequence
            weight_sync.verify_every = 1 << 30
            weight_sync.engines = []
            weight_sync._post_to_engines = lambda path, bodies: list
            weight_sync._on_all_ranks = lambda function: function()
            weight_sync.sync(version=sequence)

        def worker(e: int) -> None:
            message = json.dumps({"sequence": sequence, "verify": False})
            answer = json.loads(self.engines[e].weight_sync_update(message))
            if "error" in answer:
                raise DriverError(answer["error"])

        programs = [(process, partial(rank, n)) for n, process in enumerate(self.ranks)]
        programs += [(process, partial(worker, e)) for e, process in enumerate(self.workers)]
        self.together(programs)
        for engine in self.engines:
            for i in range(TENSORS):
                parameter = engine.get_model().get_parameter(f"p{i}")
                assert torch.equal(parameter, values(sequence)[f"t{i}"]), (sequence, i)
        # The workers answer, and the ranks tell each other.
        heard: Clock = {}
        for process in (*self.ranks, *self.workers):
            join(heard, process.host)
        for process in (*self.ranks, *self.workers):
            join(process.host, heard)

    def together(self, programs: list[tuple[Process, Callable[[], None]]]) -> None:
        errors: list[BaseException] = []

        def run(process: Process, program: Callable[[], None]) -> None:
            try:
                with self.driver.within(process):
                    program()
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=run, args=each) for each in programs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]


def one_host(driver: Driver) -> World:
    """Two ranks and two engines on three GPUs: workers copy from the ranks' parameters."""
    return World(driver, [Place("a", "0"), Place("a", "1")], 2, [Place("a", "0"), Place("a", "3")])


def chain(driver: Driver) -> World:
    """One rank has the weights, engines on four hosts want them: in many rounds, and handed on."""
    hosts = [Place(f"h{i}", str(i + 1)) for i in range(4)]
    return World(driver, [Place("a", "0"), *hosts], 1, hosts)


def split(driver: Driver) -> World:
    """Two ranks share the sending to two hosts."""
    hosts = [Place("b", "2"), Place("c", "3")]
    return World(driver, [Place("a", "0"), Place("a", "1"), *hosts], 2, hosts)


def read_from_another_gpu(driver: Driver) -> World:
    """The receiving rank is on another GPU of the engine's host."""
    return World(driver, [Place("a", "0"), Place("b", "1")], 1, [Place("b", "2")])


def syncs(world: World) -> None:
    for sequence in range(1, 4):
        world.sync(sequence)
    for process in (*world.ranks, *world.workers):
        assert process.contexts <= {process.gpu}


def restart(world: World) -> None:
    """An engine is killed, and another one takes its place."""
    world.sync(1)
    world.driver.end(world.workers[0])
    world.workers[0] = Process("worker 0 again", world.workers[0].gpu)
    world.attach()
    gc.collect()
    world.sync(2)
    assert world.driver.kept == 0, f"{world.driver.kept} bytes of GPU memory are lost"


def open_freed_memory(world: World) -> None:
    """An address outlives its slots."""
    with world.driver.within(world.ranks[1]):
        tensor = torch.zeros(8)
        address = memory.share_tensors({"slots": tensor})
        del tensor
        gc.collect()
    with world.driver.within(world.workers[0]):
        memory.attach_tensors(address)


def nothing(*arguments: Any) -> None:
    """In the place of a line of ours."""


def ranks_do_not_wait_for_their_streams(world: World) -> None:
    for rank_network in world.networks:
        rank_network.platform = replace(rank_network.platform, synchronize_stream=nothing)
    syncs(world)


def ranks_do_not_wait_for_the_update(world: World) -> None:
    vllm_platform.CPU = replace(vllm_platform.CPU, synchronize_device=nothing)
    syncs(world)


def ranks_do_not_wait_for_messages(world: World) -> None:
    network.wait_for = nothing
    syncs(world)


def ranks_do_not_wait_for_readers(world: World) -> None:
    Signals.wait_consumed = nothing  # type: ignore[method-assign]
    syncs(world)


def workers_do_not_wait_for_their_streams(world: World) -> None:
    from rollout.weight_sync import worker

    worker.PLATFORM = replace(worker.PLATFORM, synchronize_stream=nothing)
    syncs(world)


def new_slots_at_each_start(world: World) -> None:
    make = network.make_slots
    network.make_slots = lambda plan, rank, device, former: make(plan, rank, device, None)
    restart(world)


# Name → the world, what happens in it, and what the fake or our code must say about it.
CASES: dict[str, tuple[Callable[[Driver], World], Callable[[World], None], str | None]] = {
    "one host": (one_host, syncs, None),
    "chain": (chain, syncs, None),
    "split": (split, syncs, None),
    "another GPU": (read_from_another_gpu, syncs, None),
    "restart": (chain, restart, None),
    "freed": (chain, open_freed_memory, "opens memory that rank 1 has freed"),
    "no stream": (split, ranks_do_not_wait_for_their_streams, "nothing says that the write by rank .'s NCCL has ended"),
    "no update": (one_host, ranks_do_not_wait_for_the_update, "the write by rank .'s stream has ended"),
    "no messages": (chain, ranks_do_not_wait_for_messages, "has ended"),
    # A slot is written while it is read; which of the two comes second, and is told of, is chance.
    "no readers": (
        chain,
        ranks_do_not_wait_for_readers,
        "(the read by worker .'s stream|the write by rank .'s NCCL) has ended",
    ),
    "no worker's stream": (one_host, workers_do_not_wait_for_their_streams, "the read by worker .'s stream has ended"),
    "new slots": (chain, new_slots_at_each_start, "bytes of GPU memory are lost"),
}


def no_peer_access(driver: Driver) -> World:
    driver.peers = lambda a, b: a == b
    return read_from_another_gpu(driver)


CASES["no peers"] = (no_peer_access, syncs, "GPU GPU-2 can't read the memory of GPU GPU-1 .no peer access")


def play(name: str) -> str | None:
    """What went wrong in a case."""
    from rollout.weight_sync import worker

    memory.WAIT_SECONDS = 5
    driver = Driver(8)
    worker.PLATFORM = install(driver)
    make, happen, _ = CASES[name]
    try:
        world = make(driver)
        happen(world)
    except Exception as error:
        return "; ".join([*driver.wrong, f"{type(error).__name__}: {error}"])
    # Before the world ends, in any order.
    return "; ".join(driver.wrong) or None


def main(output: str) -> None:
    """Each case in a fork of its own, because the fake and the lines that are taken out stay."""
    from rollout.weight_sync import worker  # noqa: F401  imported once, for all cases

    for name in CASES:
        if os.fork() == 0:
            # The first call after a fork replaces torch's thread pool, and must not run in two threads at once.
            warm.take_threads()
            Path(output, name).write_text(json.dumps(play(name)))
            os._exit(0)
        os.wait()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | None]:
    folder = tmp_path_factory.mktemp("fake_cuda")
    command = [sys.executable, "-m", "tests.rollout.test_fake_cuda", str(folder)]
    with warm.processes():
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return {name: json.loads((folder / name).read_text()) for name in CASES}


@pytest.mark.parametrize("name", CASES)
def test_what_is_shared_is_used_in_order_on_its_device_and_while_it_lives(
    name: str, results: dict[str, str | None]
) -> None:
    _, _, expected = CASES[name]
    said = results[name]
    if expected is None:
        assert said is None
    else:
        assert said is not None and re.search(expected, said), said


if __name__ == "__main__":
    main(sys.argv[1])
