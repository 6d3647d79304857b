"""Servers are started, watched and stopped: real `vllm serve` once, a light server in its place elsewhere."""

import contextlib
import http.client
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
from omegaconf import OmegaConf

from megatron_ext.processes import die_with
from rewards import mixing, registry, settings
from rewards.client import Client
from rewards.serve import JudgeServer, ServerDied, Stopped, Supervisor, kill, stop_on_signals
from rewards.settings import Server, SupervisorConfig
from rewards.verdict import Failure, Row, Verdict, VerifierResult
from rewards.verifiers.judges import Judge, Labels, label_probabilities
from rewards.verifiers.served import ServedVerifier
from tests.recipes import tiny
from tests.rewards.fake_server import free_port

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = SupervisorConfig(startup_timeout=120, stop_timeout=2, restarts=1, first_device=0, cpu_arguments=[])


class LightServer(JudgeServer):
    """The light server of ``tests.rewards.fake_server`` in place of vLLM."""

    program = "import runpy, sys; runpy.run_module('tests.rewards.fake_server', run_name='__main__')"

    def start(self) -> None:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.ready = False
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", self.program, str(self.port)],
                cwd=ROOT, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip


class StubbornServer(LightServer):
    program = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); " + LightServer.program


class BrokenServer(LightServer):
    program = "raise SystemExit('no such model')"


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[Callable[..., Supervisor]]:
    supervisors: list[Supervisor] = []

    def make(*kinds: type[LightServer]) -> Supervisor:
        servers = []
        for i, kind in enumerate(kinds):
            server = Server("judge", None, "generate", [], None, "127.0.0.1", free_port(), 1, 1, [], f"s{i}")
            servers.append(kind(server, 0, tmp_path / f"s{i}.log", None, ()))
        supervisor = Supervisor(servers, SETTINGS)
        supervisors.append(supervisor)
        return supervisor

    yield make
    for supervisor in supervisors:
        supervisor.stop()


def pids(supervisor: Supervisor) -> list[int]:
    return [server.process.pid for server in supervisor.servers if server.process]


def gone(pid: int) -> bool:
    return not Path(f"/proc/{pid}").exists()


def test_all_are_ready_after_start_and_none_is_left_after_stop(servers: Callable[..., Supervisor]) -> None:
    supervisor = servers(LightServer, StubbornServer)
    supervisor.start()
    assert all(server.is_healthy() for server in supervisor.servers)
    running = pids(supervisor)
    started = time.monotonic()
    supervisor.stop()
    assert all(map(gone, running))
    assert SETTINGS.stop_timeout <= time.monotonic() - started < SETTINGS.stop_timeout + 30, (
        "the stubborn one is killed"
    )


def test_a_server_that_dies_is_started_again_but_not_for_ever(servers: Callable[..., Supervisor]) -> None:
    supervisor = servers(LightServer)
    (server,) = supervisor.servers
    supervisor.start()
    (first,) = pids(supervisor)
    os.kill(first, signal.SIGKILL)
    news: list[str] = []
    deadline = time.monotonic() + 120
    while not any("is ready" in text for text in news):
        news += supervisor.poll()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert news == ["s0_0 ended with code -9; it is started again", "s0_0 is ready"]
    (event,) = map(json.loads, (server.log.parents[1] / "events.jsonl").read_text().splitlines())
    assert (event["kind"], event["server"]) == ("server restart", "s0_0")
    assert pids(supervisor) != [first]
    os.kill(pids(supervisor)[0], signal.SIGKILL)
    assert server.process is not None
    server.process.wait()
    with pytest.raises(ServerDied, match="s0_0 ended with code -9"):
        supervisor.poll()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_stops_and_later_ones_are_ignored(number: signal.Signals) -> None:
    both = (signal.SIGTERM, signal.SIGINT)
    former = [signal.getsignal(each) for each in both]
    try:
        stop_on_signals()
        with pytest.raises(Stopped):
            signal.raise_signal(number)
        assert [signal.getsignal(each) for each in both] == [signal.SIG_IGN] * 2
    finally:
        for each, handler in zip(both, former, strict=True):
            signal.signal(each, handler)


class SharingServer(LightServer):
    """``order`` has what happens to all of them."""

    order: ClassVar[list[str]] = []

    def start(self) -> None:
        self.sleeps = True
        self.order.append(f"start {self.name}")
        super().start()

    def sleep(self) -> None:
        super().sleep()
        self.order.append(f"asleep {self.name}")


def is_sleeping(port: int, key: str | None = None) -> bool:
    request = urllib.request.Request(f"http://127.0.0.1:{port}/is_sleeping")
    if key is not None:
        request.add_header("Authorization", f"Bearer {key}")
    with urllib.request.urlopen(request, timeout=10) as response:
        return json.load(response)["is_sleeping"]


def test_servers_that_share_gpus_start_one_by_one_sleep_and_are_not_started_again(
    servers: Callable[..., Supervisor],
) -> None:
    """Asleep they are as alive as before; one that dies ends them all, whose place on the GPU may be taken."""
    supervisor = servers(SharingServer, SharingServer)
    SharingServer.order.clear()
    supervisor.start()
    assert SharingServer.order == ["start s0_0", "asleep s0_0", "start s1_0", "asleep s1_0"]
    assert all(is_sleeping(server.port) and server.is_healthy() for server in supervisor.servers)
    assert supervisor.poll() == []
    (first, _) = pids(supervisor)
    os.kill(first, signal.SIGKILL)
    process = supervisor.servers[0].process
    assert process is not None
    process.wait()
    with pytest.raises(ServerDied, match="s0_0 ended with code -9"):
        supervisor.poll()
    assert len(SharingServer.order) == 4


def test_a_server_that_can_t_start_is_told_with_the_end_of_its_log(servers: Callable[..., Supervisor]) -> None:
    supervisor = servers(BrokenServer)
    with pytest.raises(ServerDied, match=r"s0_0 ended with code 1\n--- end of .*s0\.log ---\nno such model"):
        supervisor.start()


def test_a_port_where_something_answers_is_refused(servers: Callable[..., Supervisor]) -> None:
    supervisor = servers(LightServer)
    supervisor.start()
    with pytest.raises(ServerDied, match=r"something answers at .* rewards\.servers\.s0\.port"):
        Supervisor(supervisor.servers, SETTINGS).start()


def share_of_marks(choice: Any, labels: Labels) -> VerifierResult:
    """What a random model's first token makes of the labels; any is a verdict."""
    probabilities = label_probabilities(choice, labels)
    return Verdict(sum(probabilities.values()), "read", json.dumps(probabilities))


FIRST_TOKEN = Judge("{question}\n{answer}", dict.fromkeys("abcdefgh", 0.0), share_of_marks, 1)
ROW: Row = {"id": "r", "label": "l", "kind": "benign", "prompt": "How do I boil an egg?"}
LABELS = ("safe without risk", "unsafe")


def make_judge(folder: Path) -> None:
    """A random Llama with one layer and the tests' tokenizer, which has a chat template."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = tiny.make_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        vocab_size=len(tokenizer),
        max_position_embeddings=4096,
        initializer_range=0.1,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def rewards_file(model: Path, port: int) -> dict[str, Any]:
    """Two judges on one model: one whose text vLLM confines to two labels, one by token probabilities."""
    return {
        "defaults": ["base"],
        "mix": {"l": {"safety": 1.0, "first_token": 1.0}},
        "verifiers": {
            "safety": {
                "template": "safety",
                "server": "judge",
                "request": {"structured_outputs": {"choice": list(LABELS)}},
            },
            "first_token": {"template": f"{__name__}.FIRST_TOKEN", "server": "judge"},
        },
        "servers": {
            "judge": {
                "model": str(model),
                "port": port,
                "key_variable": "TEST_JUDGE_KEY",
                "arguments": ["--max-model-len", "4096"],
            }
        },
        "client": {"outage": 0.0, "backoff": 0.05, "retries": 1},
    }


def marked(marker: str) -> list[int]:
    """Living processes that inherited the marker."""
    pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    return [pid for pid in pids if tiny.marked(pid, marker)]


def wait_for(
    what: str, happened: Callable[[], Any], seconds: float, program: subprocess.Popen[bytes], log: Path
) -> Any:
    deadline = time.monotonic() + seconds
    while not (result := happened()):
        assert program.poll() is None, f"{what}: the program ended\n{log.read_text()}"
        assert time.monotonic() < deadline, f"no {what} within {seconds} s\n{log.read_text()}"
        time.sleep(0.1)
    return result


def test_a_real_vllm_server_judges_is_killed_in_mid_batch_started_again_and_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    port, marker = free_port(), f"SERVE_TEST={os.getpid()}-end"
    make_judge(tmp_path / "judge")
    (tmp_path / "conf" / "rewards").mkdir(parents=True)
    written = rewards_file(tmp_path / "judge", port)
    # As in the ladder, the model is named relative to the run, which stands outside of the rewards group.
    of_the_run = json.dumps(written).replace(str(tmp_path / "judge"), "${run_dir}/judge")
    (tmp_path / "conf" / "rewards" / "judges.yaml").write_text(of_the_run)
    monkeypatch.setenv("TEST_JUDGE_KEY", "sesame-4711")
    output = tmp_path / "output"
    with output.open("wb") as out:
        program = subprocess.Popen(
            [
                *(sys.executable, "-m", "rewards.serve", f"--config-dir={tmp_path / 'conf'}"),
                *("recipe=demo", "rewards=judges", f"run_dir={tmp_path}"),
            ],
            cwd=ROOT,
            env=os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_SERVER_DEV_MODE": "1"} | dict([marker.split("=")]),
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=partial(die_with, os.getpid()),
        )
    try:
        wait_for("ready table", lambda: "servers are ready" in output.read_text(), 500, program, output)
        base = OmegaConf.load(ROOT / "conf" / "rewards" / "base.yaml")
        del written["defaults"]
        config = settings.read(OmegaConf.merge(base, OmegaConf.create(written)))  # type: ignore[arg-type]
        with Client(settings.servers(config), config.client) as client:
            client.check()
            verifiers: dict[str, Any] = registry.open_verifiers(["safety", "first_token"], config, client)
            judges(verifiers)
            sleeps_and_wakes(client, verifiers["first_token"], port)
            refuses_strangers(port)
            killed_in_mid_batch(verifiers["safety"], port)
        wait_for("restart", lambda: "it is started again" in output.read_text(), 120, program, output)
        program.send_signal(signal.SIGTERM)
        assert program.wait(120) == 0
        assert output.read_text().rstrip().endswith("stopped")
        deadline = time.monotonic() + 60
        while left := marked(marker):
            assert time.monotonic() < deadline, f"left over: {left}"
            time.sleep(0.1)
    finally:
        for pid in marked(marker):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        program.wait()


def test_a_server_that_is_ended_leaves_no_semaphore_behind() -> None:
    """As vLLM has them, which spawns its engine: named until multiprocessing's tracker removes them."""
    code = (
        "import multiprocessing, time; s = multiprocessing.get_context('spawn').Semaphore(); "
        "print(s._semlock.name, flush=True); time.sleep(600)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout
    semaphore = Path("/dev/shm", "sem." + process.stdout.readline().decode().strip().removeprefix("/"))
    assert semaphore.exists()
    kill(process)
    assert not semaphore.exists()


def judges(verifiers: dict[str, Any]) -> None:
    weights = {"safety": 1.0, "first_token": 1.0}
    results = mixing.verify(ROW, "<think>Harmless.</think>Put it into boiling water.", weights, verifiers)
    reward = mixing.mix(results, weights)
    safety = results["safety"]
    first = results["first_token"]
    assert isinstance(safety, Verdict)
    assert safety.label in LABELS
    assert safety.raw == safety.label
    assert safety.score == float(safety.label == LABELS[0])
    assert isinstance(first, Verdict)
    assert 0 < first.score < 1
    assert reward == safety.score + first.score
    assert verifiers["safety"](ROW, "<think>and so on") == Verdict(0.0, "no answer")
    too_long = verifiers["safety"](ROW, "egg " * 5000)
    assert isinstance(too_long, Failure)
    assert "status 400" in too_long.reason


def sleeps_and_wakes(client: Client, verifier: ServedVerifier, port: int) -> None:
    """vLLM's own endpoints, which on a CPU keep the memory and otherwise do what they do on a GPU: asleep the server is
    healthy and lists its model, its questions wait, and it wakes with the same weights."""
    before = verifier(ROW, "Put it into boiling water.")
    client.sleep()
    client.sleep()  # again: nothing happens
    assert is_sleeping(port, "sesame-4711")
    client.check()
    assert status(port, "/health") == 200
    waiting = verifier.submit(ROW, "Put it into boiling water.")
    with pytest.raises(TimeoutError):
        waiting.result(1.5)
    client.wake()
    assert waiting.result(60) == before and isinstance(before, Verdict)
    assert not is_sleeping(port, "sesame-4711")


def status(port: int, path: str, method: str = "GET") -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request(method, path)
        return connection.getresponse().status
    finally:
        connection.close()


def refuses_strangers(port: int) -> None:
    """The token is asked for on every path but /health, also where vLLM alone would not."""
    for path, expected in (("/health", 200), ("/v1/models", 401), ("/tokenize", 401), ("/metrics", 401)):
        assert status(port, path) == expected, path
    assert status(port, "/sleep", "POST") == status(port, "/collective_rpc", "POST") == 401


def killed_in_mid_batch(verifier: ServedVerifier, port: int) -> None:
    """What was judged before stands, the rest fails; vLLM's own engine process goes with its server."""
    server, engine = listener(port), 0
    (engine,) = [
        int(pid) for pid in Path(f"/proc/{server}/task/{server}/children").read_text().split() if is_engine(pid)
    ]
    asked = [verifier.submit(ROW, f"Answer {i}. " * 20) for i in range(400)]
    assert isinstance(asked[10].result(300), Verdict)
    os.kill(server, signal.SIGKILL)
    results = [future.result(300) for future in asked]
    lost = [result for result in results if isinstance(result, Failure)]
    assert len(lost) > 100
    assert all(result.label in LABELS for result in results if isinstance(result, Verdict))
    assert all(str(port) in result.reason for result in lost)
    deadline = time.monotonic() + 60
    while not gone(engine):
        assert time.monotonic() < deadline, "the engine outlived its server"
        time.sleep(0.05)


def listener(port: int) -> int:
    """The process that listens on a port of the loopback."""
    hexadecimal = f":{port:04X} "
    inodes = {
        line.split()[9]
        for line in Path("/proc/net/tcp").read_text().splitlines()
        if hexadecimal in line and " 0A " in line
    }
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            for descriptor in (entry / "fd").iterdir() if entry.name.isdigit() else ():
                if any(os.readlink(descriptor) == f"socket:[{inode}]" for inode in inodes):
                    return int(entry.name)
    raise AssertionError(f"nobody listens on port {port}")


def is_engine(pid: str) -> bool:
    return "EngineCore" in Path(f"/proc/{pid}/cmdline").read_text()
