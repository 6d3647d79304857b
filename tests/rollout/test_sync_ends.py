"""A weight sync ends, whatever the layouts: what ranks and workers do, replayed under NCCL's rules (``nccl_rules``)."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from megatron_ext.blocks import Block
from rollout.weight_sync.layout import ParameterLayout, Region
from rollout.weight_sync.plan import Place, Plan, Topology
from rollout.weight_sync.planner import build_plan
from rollout.weight_sync.schedule import ALIGNMENT
from rollout.weight_sync.sync import _readers
from tests import warm
from tests.rollout import nccl_rules, shipped
from tests.rollout.nccl_rules import (
    GLOO,
    NCCL,
    Collective,
    Consumed,
    Deadlock,
    Group,
    Message,
    Ready,
    Replay,
    Together,
    WaitConsumed,
    WaitReady,
)
from tests.rollout.test_network import BUCKET, CASES, SHAPE, TENSORS, plan_of
from tests.rollout.test_reshard_grid import two_sides

ROOT = Path(__file__).resolve().parents[2]


def programs(plan: Plan, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What each rank does, what each worker does, and who reads each rank's slots."""
    workers = []
    for recvs_of_engine in plan.recvs:
        slot_ranks = [sorted({recv.rank for recv in recvs}) for recvs in recvs_of_engine]
        workers.append([nccl_rules.worker_events(plan, ranks) for ranks in slot_ranks])
    ranks = [nccl_rules.record(plan, rank, patch) for rank in range(len(plan.slot_bytes))]
    return {"ranks": ranks, "workers": workers, "readers": _readers(plan)}


def idle(plan: Plan) -> set[tuple[int, int]]:
    """(round, rank) of every rank without a message in a round."""
    busy = {(m.round, rank) for m in plan.messages for rank in (m.sender, m.receiver)}
    return {(t, rank) for t in range(plan.rounds) for rank in range(len(plan.slot_bytes))} - busy


def without_collectives(recorded: dict[str, Any]) -> dict[str, Any]:
    ranks = [[event for event in events if event != Collective()] for events in recorded["ranks"]]
    return recorded | {"ranks": ranks}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What both sides of the shipped layouts wrote."""
    folder = tmp_path_factory.mktemp("shipped")
    with warm.processes():
        command = [sys.executable, "-m", "tests.rollout.shipped"]
        sides = [
            subprocess.Popen([*command, side, str(folder)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            for side in ("trainer", "vllm")
        ]
    for side in sides:
        said, _ = side.communicate(timeout=600)
        assert side.returncode == 0, said.decode()[-4000:]
    return folder


@pytest.mark.parametrize("variant", shipped.VARIANTS)
@pytest.mark.parametrize("name", shipped.RECIPES)
def test_a_sync_of_every_shipped_layout_ends(
    name: str, variant: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some ranks are idle in some rounds. Each has called a collective first, so that none waits to be connected."""
    plan = shipped.plan(folder, name, variant)
    recorded = programs(plan, monkeypatch)
    assert all(events[0] == Collective() for events in recorded["ranks"])
    Replay(**recorded).run()


@given(two_sides())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_sync_of_any_layouts_ends(monkeypatch: pytest.MonkeyPatch, sides: tuple[Any, ...]) -> None:
    _, tables, _, layouts, topology = sides
    for bucket in (ALIGNMENT, 1 << 16):
        plan = build_plan(tables, layouts, topology, bucket)
        Replay(**programs(plan, monkeypatch)).run()


def test_a_rank_without_a_message_keeps_the_others_waiting_only_without_the_first_collective(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ranks 0 and 1 have all the messages; rank 2, on the engine's host too, has none."""
    topology = Topology((Place("a", "0"), Place("b", "0"), Place("b", "1")), ((Place("b", "0"),),))
    tensors = [(f"s{i}", Block(f"t{i}", (0, 0), (0, 0), SHAPE)) for i in range(TENSORS)]
    regions = [(f"p{i}", Region((0, 0), f"t{i}", (0, 0), SHAPE)) for i in range(TENSORS)]
    worker = [ParameterLayout(name, SHAPE, "bfloat16", (region,), ()) for name, region in regions]
    plan = build_plan([tensors, [], []], [worker], topology, BUCKET)
    assert {rank for _, rank in idle(plan)} == {2} and plan.rounds > 2
    recorded = programs(plan, monkeypatch)
    Replay(**recorded).run()
    with pytest.raises(Deadlock, match="rank 0 at Synchronise"):
        Replay(**without_collectives(recorded)).run()


def send(peer: int, size: int = 1) -> Group:
    return Group((Message(True, peer, size),))


def receive(peer: int, size: int = 1) -> Group:
    return Group((Message(False, peer, size),))


def both(peer: int) -> Group:
    return Group((*send(peer).messages, *receive(peer).messages))


# What two or three ranks do; whether it ends under NCCL's rules and under gloo's.
ORDERS = {
    "in one group": ([[both(1)], [both(0)]], True, True),
    "one after the other": ([[send(1), receive(1)], [receive(0), send(0)]], True, True),
    "both send first": ([[send(1), receive(1)], [send(0), receive(0)]], False, True),
    "in a ring": ([[send(1), receive(2)], [send(2), receive(0)], [send(0), receive(1)]], False, True),
    "in a ring, cut": ([[send(1), receive(2)], [receive(0), send(2)], [receive(1), send(0)]], True, True),
    "nobody receives": ([[send(1)], [Collective()]], False, False),
}


@pytest.mark.parametrize("name", ORDERS)
def test_the_replay_finds_what_hangs(name: str) -> None:
    ranks, ends_in_nccl, ends_in_gloo = ORDERS[name]
    connected = [[Collective(), *events] for events in ranks]
    for rules, ends in ((NCCL, ends_in_nccl), (GLOO, ends_in_gloo)):
        if ends:
            Replay(connected, rules=rules).run()
        else:
            with pytest.raises(Deadlock):
                Replay(connected, rules=rules).run()


def test_sizes_that_differ_are_found() -> None:
    with pytest.raises(Deadlock, match="a send of 2 bytes meets a receive of 1"):
        Replay([[Collective(), send(1, 2)], [Collective(), receive(0, 1)]]).run()


def test_a_worker_that_waits_for_a_round_and_a_rank_that_waits_for_the_worker_are_found() -> None:
    rank = [Collective(), WaitConsumed(1), Ready(1)]
    workers = [[[WaitReady(0, 1), Consumed(1)]]]
    with pytest.raises(Deadlock, match="rank 0 at WaitConsumed"):
        Replay([rank], workers, [[(0, 0)]]).run()
    Replay([[Collective(), Ready(1), WaitConsumed(1)]], workers, [[(0, 0)]]).run()
    two_workers = [[[WaitReady(0, 1), Together(0)], [Together(0), WaitReady(0, 1)]]]
    Replay([[Ready(1)]], two_workers, [[]]).run()


def test_messages_in_another_order_on_one_side_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan of a chain, with forwards sent before the messages of their round."""
    plan = plan_of(*CASES["chain"])
    recorded = programs(plan, monkeypatch)
    Replay(**recorded).run()
    swapped = [list(events) for events in recorded["ranks"]]
    groups = [i for i, event in enumerate(swapped[2]) if isinstance(event, Group)]
    swapped[2][groups[1]], swapped[2][groups[2]] = swapped[2][groups[2]], swapped[2][groups[1]]
    with pytest.raises(Deadlock):
        Replay(**recorded | {"ranks": swapped}).run()
