"""The rounds between ranks over gloo, without vLLM: a thread beside each receiving rank stands for its workers."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_ext.blocks import Block
from rollout.weight_sync.layout import ParameterLayout, Region
from rollout.weight_sync.memory import Signals, alive, attach_tensors, share_tensors
from rollout.weight_sync.network import Network, slot_view
from rollout.weight_sync.plan import Place, Topology
from rollout.weight_sync.planner import build_plan
from tests import warm

TENSORS, SHAPE, BUCKET = 40, (16, 16), 8 * 1024
ROOT = Path(__file__).resolve().parents[2]
# Holders of everything and hosts that want everything: few and many make a chain, as many make none.
CASES = {"chain": (1, 4), "split": (2, 2)}


def plan_of(holders: int, receivers: int):
    table = [(f"s{i}", Block(f"t{i}", (0, 0), (0, 0), SHAPE)) for i in range(TENSORS)]
    worker = [
        ParameterLayout(f"p{i}", SHAPE, "bfloat16", (Region((0, 0), f"t{i}", (0, 0), SHAPE),), ())
        for i in range(TENSORS)
    ]
    hosts = tuple(Place(f"h{i}", "0") for i in range(receivers))
    topology = Topology((Place("trainer", "0"),) * holders + hosts, tuple((host,) for host in hosts))
    return build_plan([table] * holders + [[]] * receivers, [worker], topology, BUCKET)


def values(sync: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(sync)
    return {f"s{i}": torch.randn(SHAPE, generator=generator) for i in range(TENSORS)}


def main(case: str, rank: str, folder: str) -> None:
    holders, receivers = CASES[case]
    me, world = int(rank), holders + receivers
    plan = plan_of(holders, receivers)
    assert any(m.forwarded for m in plan.messages) == (case == "chain")
    dist.init_process_group("gloo", init_method=f"file://{folder}/{case}", rank=me, world_size=world)
    shards = {name: torch.empty(SHAPE) for name in values(0)} if me < holders else {}
    network = Network(plan, me, shards, torch.device("cpu"), int(me >= holders), dist.group.WORLD)
    parameters = {f"p{i}": torch.zeros(SHAPE, dtype=torch.bfloat16) for i in range(TENSORS)}

    def worker(sequence: int) -> None:
        first = sequence * (1 + plan.rounds) + 1
        for t in range(plan.rounds):
            network.signals.wait_ready(first + t + 1, meanwhile=lambda: False)
            time.sleep(0.002 * (me % 3))  # some are slow: nobody may overwrite what they have not read
            for a in plan.recvs[me - holders][0]:
                if a.round == t:
                    parameters[a.parameter][a.parameter_start[0] : a.parameter_start[0] + a.shape[0]] = slot_view(
                        network.slots, t, a.offset, a.shape, torch.bfloat16
                    )
            network.signals.set_consumed(0, first + t + 1)

    for sequence in range(3):
        for name, tensor in shards.items():
            tensor.copy_(values(sequence)[name])
        if me >= holders:
            network.signals.register(0)
            reader = threading.Thread(target=worker, args=(sequence,))
            reader.start()
        network.begin(sequence)
        network.run(sequence)
        if me >= holders:
            reader.join()
            for name, expected in values(sequence).items():
                assert torch.equal(parameters["p" + name[1:]], expected.bfloat16()), (sequence, name)
        dist.barrier()
    assert network.slots.shape[1] <= BUCKET


@pytest.mark.parametrize("case", CASES)
def test_every_host_gets_every_bit_in_every_sync(case: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.rollout.test_network", case]
    with warm.processes():
        ranks = [subprocess.Popen([*command, str(rank), str(tmp_path)], cwd=ROOT) for rank in range(sum(CASES[case]))]
    try:
        assert [rank.wait(300) for rank in ranks] == [0] * len(ranks)
    finally:
        for process in ranks:
            process.kill()


def test_a_rank_that_aborts_or_dies_ends_the_waiting_of_workers() -> None:
    signals = Signals.create(readers=1)
    signals.set_ready(3)
    signals.wait_ready(3, meanwhile=lambda: False)
    signals.abort()
    with pytest.raises(RuntimeError, match=f"process {os.getpid()} aborted"):
        signals.wait_ready(4, meanwhile=lambda: False)
    dead = subprocess.Popen(["true"])
    while alive(dead.pid):  # from here on a zombie, which counts as dead
        time.sleep(0.01)
    assert Path(f"/proc/{dead.pid}").exists()
    with pytest.raises(RuntimeError, match=f"process {dead.pid} died while this one waited for the trainer"):
        Signals(torch.zeros(1, dtype=torch.int64), dead.pid).wait_ready(1, meanwhile=lambda: False)
    signals.values[2] = dead.pid
    signals.wait_consumed(10)  # its engine's answer tells of it
    dead.wait()


def test_the_work_meanwhile_ends_when_the_round_is_ready() -> None:
    signals, done = Signals.create(readers=0), []

    def work() -> bool:
        done.append(len(done))
        if len(done) == 3:
            signals.set_ready(1)
        return True

    signals.wait_ready(1, meanwhile=work)
    assert done == [0, 1, 2]


def test_shared_tensors_keep_their_views_and_are_seen_from_outside() -> None:
    """Two views of one storage and one of another: moved into shared memory in place, read and written elsewhere."""
    flat = torch.arange(24.0)
    tensors = {"a": flat[:12].view(3, 4), "b": flat[12:].view(4, 3).t(), "c": torch.ones(2, dtype=torch.bfloat16)}
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    address = share_tensors(tensors)
    assert len(address["storages"]) == 2 and share_tensors(tensors) == address
    seen = attach_tensors(address)
    for name, tensor in seen.items():
        assert torch.equal(tensor, before[name]) and tensor.stride() == tensors[name].stride()
    flat.mul_(2)
    assert torch.equal(seen["b"], 2 * before["b"])
    seen["a"].zero_()
    assert not flat[:12].any() and flat[12:].all()


class Wrapper(torch.Tensor):
    """As Transformer Engine's FP8 tensors: its elements are in other tensors."""

    def untyped_storage(self) -> torch.UntypedStorage:
        return torch.UntypedStorage(0)


def test_a_tensor_whose_elements_are_elsewhere_is_not_shared() -> None:
    """Its storage is empty: an engine would read nothing, in silence."""
    weight = torch.zeros(4, 8, dtype=torch.bfloat16).as_subclass(Wrapper)
    with pytest.raises(RuntimeError, match="weight: a Wrapper of 64 bytes with a storage of 0"):
        share_tensors({"weight": weight})


if __name__ == "__main__":
    main(*sys.argv[1:])
