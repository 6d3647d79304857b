"""A GPU by turns: the trainer's states and a judge's server give their memory back, and are the same afterwards."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from megatron_ext import checkpoint, forward_backward, model, optimizer
from megatron_ext.host_buffers import HostBuffers
from megatron_ext.offload import HostCopy, release_gradients
from megatron_ext.parallel import Parallel
from megatron_ext.platform import cuda
from recipes.preflight import memory
from rewards.client import Client
from rewards.serve import JudgeServer, Supervisor
from rewards.settings import ClientConfig, Server, SupervisorConfig
from rewards.verdict import Verdict
from rewards.verifiers.served import ServedVerifier
from tests.gpu.conftest import OPTIMIZER, SCHEDULE
from tests.gpu.test_sleep import SEGMENT_GIB, free_gib
from tests.gpu.test_trainer import loss, micro_batches
from tests.rewards.fake_server import free_port
from tests.rewards.test_serve import FIRST_TOKEN, ROW, make_judge

SHARE = 0.2  # of the GPU's memory


def states(policy: model.Model, optim: object) -> list[torch.Tensor]:
    """Weights, masters and moments."""
    (inner,) = (each.optimizer for each in optim.chained_optimizers)  # type: ignore[attr-defined]
    masters = [p for group in inner.param_groups for p in group["params"]]
    moments = [state[name] for state in inner.state.values() for name in ("exp_avg", "exp_avg_sq")]
    return [*(shard.tensor for shard in policy.shards), *masters, *moments]


def test_the_trainers_states_leave_the_gpu_and_come_back_to_the_bit(policy: model.Model) -> None:
    optim, schedule = optimizer.build(policy, OPTIMIZER, SCHEDULE, steps=10)
    optim.reload_model_params()
    forward_backward.accumulate_gradients(policy, micro_batches(), loss)
    optimizer.step(optim, schedule)
    before = [tensor.detach().cpu().clone() for tensor in states(policy, optim)]
    host, held = HostCopy(policy, optim, weights=False), torch.cuda.memory_allocated()
    weights = sum(shard.tensor.nbytes for shard in policy.shards)
    gradients = memory.gradients(policy)
    assert gradients >= 0.95 * 2 * weights  # in FP32, of weights in BF16
    release_gradients(policy)
    assert held - torch.cuda.memory_allocated() == gradients
    host.release()
    # Masters and two moments in FP32 too.
    assert held - torch.cuda.memory_allocated() >= 0.95 * 8 * weights
    assert all(torch.equal(shard.tensor.cpu(), old) for shard, old in zip(policy.shards, before, strict=False))
    host.restore()
    after = [tensor.detach().cpu() for tensor in states(policy, optim)]
    assert all(torch.equal(new, old) for new, old in zip(after, before, strict=True))
    assert torch.cuda.memory_allocated() == held - gradients, "the next pass takes it again"


def test_the_hosts_memory_is_pinned_and_taken_once(policy: model.Model, folder: Path) -> None:
    """A second step takes none for the reference, a checkpoint and offloaded states."""
    optim, schedule = optimizer.build(policy, OPTIMIZER, SCHEDULE, steps=10)
    optim.reload_model_params()
    reference = forward_backward.load_weights(policy, folder)
    policy_weights, snapshots, host = HostBuffers(), HostBuffers(), HostCopy(policy, optim, weights=False)

    def step() -> int:
        """Also returns how often the host's memory was taken since the process began."""
        with forward_backward.swapped_weights(policy, reference, policy_weights):
            forward_backward.log_probs(policy, micro_batches())
        forward_backward.accumulate_gradients(policy, micro_batches(), loss)
        optimizer.step(optim, schedule)
        checkpoint.snapshot(policy, optim, schedule, snapshots)
        host.release()
        host.restore()
        return torch.cuda.host_memory_stats()["allocations.allocated"]

    taken = step()
    kept = [*reference, *policy_weights.tensors, *snapshots.tensors, *host.buffers.tensors]
    assert all(tensor.is_pinned() for tensor in kept)
    assert step() == taken
    addresses = [tensor.data_ptr() for tensor in (*policy_weights.tensors, *snapshots.tensors, *host.buffers.tensors)]
    assert addresses == [tensor.data_ptr() for tensor in kept[len(reference) :]]


def test_the_hosts_memory_takes_no_more_than_its_size(layout: Parallel) -> None:
    """torch's default rounds each tensor up to a power of two, which the preflight does not count. What a tensor gave
    back is not handed out for a larger one."""
    for mebibytes in (70, 120):  # 128 is the next power of two of both
        size = (mebibytes << 20) + 4096
        taken = torch.cuda.host_memory_stats()["allocated_bytes.allocated"]
        (tensor,) = cuda.empty_on_host([torch.empty(size, dtype=torch.uint8, device="cuda")])
        assert tensor.is_pinned()
        assert torch.cuda.host_memory_stats()["allocated_bytes.allocated"] - taken == size
        del tensor


@pytest.fixture(scope="module")
def judge(gpu: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, float]]:
    """A judge's server that shares the GPU and has started, and what its process keeps asleep, in GiB."""
    folder = tmp_path_factory.mktemp("judge")
    make_judge(folder / "model")
    arguments = ["--max-model-len", "4096", "--gpu-memory-utilization", str(SHARE), "--enforce-eager"]
    server = Server(
        str(folder / "model"), None, "generate", [], None, "127.0.0.1", free_port(), 1, 1, arguments, "judge"
    )
    config = SupervisorConfig(startup_timeout=400, stop_timeout=20, restarts=0, first_device=0, cpu_arguments=[])
    supervisor = Supervisor([JudgeServer(server, 0, folder / "judge.log", range(1), (), sleeps=True)], config)
    without_judge = free_gib()
    try:
        supervisor.start()
        yield server, without_judge - free_gib()
    finally:
        supervisor.stop()


def test_a_judges_server_gives_its_memory_back_and_wakes_to_the_same_verdict(
    judge: tuple[Server, float], record_property: Callable[[str, object], None]
) -> None:
    """It is asleep when it is ready; awake it takes its share, three times the same. Nothing is lost on the way, but
    for workspaces that the first time creates."""
    server, asleep_gib = judge
    record_property("asleep_gib", asleep_gib)
    asked = ClientConfig(
        concurrency=4, timeout=60, retries=0, backoff=0.1, cooldown=1, outage=0, hedge_after=1e9, max_failed=0
    )
    total = torch.cuda.mem_get_info()[1] / 2**30
    with Client({"judge": server}, asked) as client:
        verifier = ServedVerifier(FIRST_TOKEN, "judge", server.model, {}, client)
        asleep, verdicts, left = free_gib(), [], []
        for _ in range(3):
            with client.awake():
                verdicts.append(verifier(ROW, "Put it into boiling water."))
                assert asleep - free_gib() > 0.7 * SHARE * total
            left.append(free_gib())
    assert left[0] - left[-1] < SEGMENT_GIB
    assert isinstance(verdicts[0], Verdict) and verdicts[0] == verdicts[1] == verdicts[2]
