"""Weights over TCP between two hosts' worth of processes (``two_hosts``).

Host a has two trainer ranks (TP 2) and an engine, host b only an engine and the rank that owns it. The engine on a
reads the trainer's memory; the one on b gets everything over gloo, in many small rounds.
``python -m tests.rollout.test_two_hosts FOLDER RANK`` is one rank.
"""

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from rollout.engine import Engine, stop_engines
from rollout.weight_sync.sync import WeightSync, WeightSyncError
from tests.rollout import two_hosts
from tests.rollout.twins import TIED, tensor_parallel_shards
from tests.settings import engine_settings

ROOT = Path(__file__).resolve().parents[2]
BUCKET = 1 << 16


def run_rank(folder: str, number: str) -> None:
    rank = int(number)
    dist.init_process_group("gloo", init_method=f"tcp://{two_hosts.ADDRESS_A}:29511", rank=rank, world_size=3)
    settings = engine_settings(
        model=f"{folder}/model",
        dtype="bfloat16",
        max_model_len=96,
        max_num_seqs=8,
        max_num_batched_tokens=96,
        kv_cache_gib=0.02,
    )
    engines = [] if rank == 1 else [Engine(settings, Path(folder, f"logs-{rank}", "engine_0.log"))]
    for engine in engines:
        engine.wait_until_ready(time.monotonic() + 600)
    trainer = tensor_parallel_shards(TIED, TIED.model(0).state_dict(), 2, rank, torch.float32) if rank < 2 else None
    weight_sync = WeightSync(
        trainer.shards if trainer else [], engines, dist.group.WORLD,
        bucket_bytes=BUCKET, verify_every=2, plans=Path(folder, "plans"),
    )  # fmt: skip
    answer: dict[str, Any] = {"slots": list(weight_sync.network.slots.shape), "digests": [], "reports": []}

    def digests() -> None:
        answer["digests"].append([engine.call("GET", "/weights/digest")["workers"] for engine in engines])

    for version, seed in enumerate((0, 1, 2, 0)):
        if rank == 1:
            time.sleep(0.5)  # its host's worker has its order already, and waits for this rank's weights
        if trainer:
            trainer.weights = TIED.model(seed).state_dict()
            trainer.fill()
        answer["reports"].append(weight_sync.sync(version))
        digests()
    if rank == 2:  # the engine that gets its weights over the network dies while they are on their way
        engines[0].process.kill()
    try:
        weight_sync.sync(5)
    except WeightSyncError as error:
        answer["error"] = str(error)
    answer["messages"] = [m._asdict() for m in weight_sync.plan.messages]
    answer["placed"] = [
        [len(c) for c in weight_sync.plan.copies[e]] + [len(a) for a in weight_sync.plan.recvs[e]] for e in (0, 1)
    ]
    Path(folder, f"rank-{rank}.json").write_text(json.dumps(answer))
    dist.barrier()
    stop_engines(engines)


def test_an_engine_on_another_host_holds_the_same_bits(tmp_path: Path) -> None:
    TIED.save(tmp_path / "model", seed=0)
    rank = [sys.executable, "-m", "tests.rollout.test_two_hosts", str(tmp_path)]
    done = two_hosts.run([[*rank, "0"], [*rank, "1"]], [[*rank, "2"]])
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    a, silent, b = (json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(3))
    assert a["digests"] == b["digests"], "read in place on one host, over the network on the other"
    first, second, third, again = a["digests"]
    assert first == again and first != second != third != first
    assert silent["digests"] == [[], [], [], []]
    assert [report["verified"] for report in a["reports"]] == [True, False, True, False]

    weights = sum(2 * math.prod(tensor.shape) for tensor in dict(TIED.model(0).named_parameters()).values())
    crossed = sum(message["size"] for message in a["messages"])
    assert weights <= crossed < 1.02 * weights, "once, and little of it padding"
    assert {m["receiver"] for m in a["messages"]} == {2} and {m["sender"] for m in a["messages"]} == {0, 1}
    rounds = 1 + max(m["round"] for m in a["messages"])
    assert rounds >= weights / BUCKET and all(rank["slots"][1] <= BUCKET for rank in (a, silent, b))
    copies, recvs = zip(*a["placed"], strict=True)
    assert copies[0] and not copies[1] and recvs[1] and not recvs[0]

    assert "engine_0" in b["error"] and b["error"] == a["error"] == silent["error"], "told to all, and nobody hangs"


if __name__ == "__main__":
    run_rank(*sys.argv[1:])
