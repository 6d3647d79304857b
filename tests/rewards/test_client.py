"""The client against real HTTP servers that misbehave."""

import asyncio
import logging
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from rewards import mixing
from rewards.client import Client
from rewards.settings import ClientConfig, Server
from rewards.verdict import Failure, Row, Verdict, Verifier, VerifierResult
from rewards.verifiers.judges import JudgeRequest
from rewards.verifiers.served import ServedVerifier
from tests.rewards import fake_server
from tests.rewards.fake_server import JUDGE, MODEL, FakeServer, first, free_port, good, replies, says, status

ROOT = Path(__file__).resolve().parents[2]
ROW: Row = {"id": "r", "label": "l", "kind": "k", "prompt": "why?"}
GOOD = Verdict(1.0, "good", "Label: good")


def settings(**changed: Any) -> ClientConfig:
    values: dict[str, Any] = {
        "concurrency": 8, "timeout": 2.0, "retries": 2, "backoff": 0.01, "cooldown": 0.05, "outage": 0.0,
        "hedge_after": 1e9, "max_failed": 0.0,
    }  # fmt: skip
    return ClientConfig(**(values | changed))


def server(*addresses: str, key: str | None = None) -> Server:
    return Server(MODEL, None, "generate", addresses, key, "127.0.0.1", 8100, 1, 1, [], "judge")


@contextmanager
def asking(*addresses: str, key: str | None = None, **changed: Any) -> Iterator[tuple[Client, ServedVerifier]]:
    with Client({"judge": server(*addresses, key=key)}, settings(**changed)) as client:
        yield client, ServedVerifier(JUDGE, "judge", MODEL, {}, client)


def submit_all(verifier: ServedVerifier, count: int, seconds: float = 20) -> list[VerifierResult]:
    futures = [verifier.submit(ROW, f"answer {i}") for i in range(count)]
    return [future.result(seconds) for future in futures]


@pytest.mark.parametrize(
    "bad",
    [
        status(500),
        status(503),
        status(429, **{"Retry-After": "0"}),
        fake_server.truncated,
        fake_server.cut_off,
        says("I could not say."),
        says(""),
        replies({"error": "overloaded"}),
        replies([]),
        replies({"choices": []}),
        replies({"choices": [{"message": None}]}),
    ],
    ids=[
        "500", "503", "429", "truncated", "cut off", "garbage", "empty", "error object", "list", "no choice", "no text",
    ],
)  # fmt: skip
def test_what_goes_wrong_once_is_tried_again_and_always_is_a_failure(bad: fake_server.Behaviour) -> None:
    with FakeServer(first(2, bad)) as fake, asking(fake.address) as (client, verifier):
        assert verifier(ROW, "answer") == GOOD
        assert client.take_counts()["judge/retries"] == 2
    with FakeServer(bad) as fake, asking(fake.address) as (client, verifier):
        result = verifier(ROW, "answer")
        assert isinstance(result, Failure)
        assert result.reason
        assert len(fake.bodies) == 3
        counts = client.take_counts()
        assert (counts["judge/asked"], counts["judge/retries"], counts["judge/failed"]) == (1, 2, 1)


def test_a_question_is_json_and_says_so() -> None:
    with FakeServer(fake_server.prompt_answer) as fake, asking(fake.address) as (_, verifier):
        assert verifier(ROW, "answer") == GOOD
        assert fake.headers[0]["Content-Type"] == "application/json"


def test_the_pause_before_a_further_try_doubles(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    sleep = asyncio.sleep

    async def record_pause(seconds: float, result: Any = None) -> Any:
        pauses.append(seconds)
        return await sleep(0, result)

    monkeypatch.setattr("rewards.client.asyncio.sleep", record_pause)
    monkeypatch.setattr("rewards.client.random.uniform", lambda low, high: (low + high) / 2)
    with FakeServer(says("Hmm.")) as fake, asking(fake.address, retries=3, backoff=0.25) as (_, verifier):
        assert isinstance(verifier(ROW, "answer"), Failure)
    assert [pause for pause in pauses if pause in (0.125, 0.25, 0.5, 1.0, 2.0, 4.0)] == [0.25, 0.5, 1.0]


def test_a_refused_request_is_not_tried_again() -> None:
    with FakeServer(status(400, "the prompt is too long")) as fake, asking(fake.address) as (_, verifier):
        result = verifier(ROW, "answer")
        assert isinstance(result, Failure)
        assert "status 400: the prompt is too long" in result.reason
        assert len(fake.bodies) == 1


def test_an_unreadable_text_is_asked_for_again_with_another_seed_and_kept() -> None:
    with FakeServer(says("Hmm.")) as fake, asking(fake.address) as (_, verifier):
        assert verifier(ROW, "answer") == Failure("unparseable", "Hmm.")
        assert [(body["temperature"], body.get("seed")) for body in fake.bodies] == [(0.0, None), (1.0, 1), (1.0, 2)]


def test_a_server_that_hangs_ends_in_a_failure_in_time() -> None:
    with FakeServer(fake_server.never) as fake, asking(fake.address, timeout=0.2) as (_, verifier):
        started = time.monotonic()
        result = verifier(ROW, "answer")
        assert isinstance(result, Failure)
        assert "no reply in 0.2 s" in result.reason
        assert time.monotonic() - started < 30


def test_a_hanging_replica_costs_no_verdict() -> None:
    with FakeServer(fake_server.never) as hung, FakeServer(fake_server.prompt_answer) as fine:
        with asking(hung.address, fine.address, timeout=0.3, cooldown=60) as (_, verifier):
            assert submit_all(verifier, 50) == [GOOD] * 50
        assert len(hung.bodies) <= 8


def test_the_number_under_way_is_bounded_per_replica_and_the_load_is_spread() -> None:
    with FakeServer(fake_server.slow_answer) as one, FakeServer(fake_server.slow_answer) as two:
        with asking(one.address, two.address, concurrency=4) as (_, verifier):
            assert submit_all(verifier, 80) == [GOOD] * 80
        assert (one.most_under_way, two.most_under_way) == (4, 4)
        assert 30 <= len(one.bodies) <= 50
        assert len(one.bodies) + len(two.bodies) == 80


def test_a_straggler_is_hedged_and_the_first_reply_counts() -> None:
    hanging = threading.Event()

    async def behave(number: int, request: web.Request, body: dict[str, Any]) -> web.Response:
        if hanging.is_set():
            await asyncio.sleep(3600)
        await asyncio.sleep(0.01)
        return good()

    with FakeServer(behave) as slow, FakeServer(fake_server.slow_answer) as fine:
        with asking(slow.address, fine.address, hedge_after=5, timeout=30) as (client, verifier):
            submit_all(verifier, 40)
            hanging.set()
            started = time.monotonic()
            assert submit_all(verifier, 8) == [GOOD] * 8
            assert time.monotonic() - started < 25, "the hanging reply's time is up after 30 s"
            counts = client.take_counts()
        assert counts["judge/hedged"] > 0
        assert counts["judge/retries"] == 0


def test_judging_starts_as_soon_as_an_answer_is_given_and_from_any_thread() -> None:
    with FakeServer(fake_server.slow_answer) as fake, asking(fake.address) as (_, verifier):
        futures: list[Any] = []
        threads = [threading.Thread(target=lambda i=i: futures.append(verifier.submit(ROW, f"{i}"))) for i in range(8)]
        for thread in threads:
            thread.start()
            thread.join()
        deadline = time.monotonic() + 30
        while len(fake.bodies) < 8 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert len(fake.bodies) == 8, "asked before anyone waited"
        assert [future.result(60) for future in futures] == [GOOD] * 8


def test_all_judges_of_a_response_are_asked_at_once_and_rules_run_meanwhile() -> None:
    with FakeServer(fake_server.slow_answer) as fake, asking(fake.address) as (_, verifier):
        in_flight = []

        def rule(row: Row, response: str) -> Verdict:
            deadline = time.monotonic() + 60
            while len(fake.bodies) < 6 and time.monotonic() < deadline:
                time.sleep(0.001)
            in_flight.append(len(fake.bodies))
            return Verdict(0.5, response)

        judges = [f"judge {i}" for i in range(6)]
        verifiers: dict[str, Verifier] = dict.fromkeys(judges, verifier) | {"rule": rule}
        names = [*judges[:3], "rule", *judges[3:]]
        results = mixing.verify(ROW, "answer", names, verifiers)
        assert in_flight == [6]
        assert fake.most_under_way == 6
        assert mixing.verify(ROW, "answer", ["rule"], verifiers) == {"rule": Verdict(0.5, "answer")}
        assert len(fake.bodies) == 6
    assert list(results) == names
    assert results == dict.fromkeys(judges, GOOD) | {"rule": Verdict(0.5, "answer")}


def start_process(port: int) -> subprocess.Popen[bytes]:
    process = subprocess.Popen([sys.executable, "-m", "tests.rewards.fake_server", str(port)], cwd=ROOT)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        try:
            socket.create_connection(("127.0.0.1", port), 0.2).close()
            return process
        except OSError:
            time.sleep(0.05)
    raise AssertionError("the fake server did not start")


def test_a_server_killed_in_mid_batch() -> None:
    """Alone it leaves failures; with another replica none; and one that is started again is waited for."""
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    process = start_process(port)
    try:
        with asking(address) as (client, verifier):
            asked = [verifier.submit(ROW, f"{i}") for i in range(500)]
            for future in asked[:20]:
                future.result(60)
            process.send_signal(signal.SIGKILL)
            process.wait()
            results = [future.result(60) for future in asked]
            assert results[:20] == [GOOD] * 20
            lost = [f for f in results if isinstance(f, Failure)]
            assert len(lost) >= 100
            assert all(str(port) in f.reason for f in lost)
            assert client.take_counts()["judge/failed"] == len(lost)

        process = start_process(port)
        with FakeServer(fake_server.slow_answer) as other, asking(address, other.address) as (_, verifier):
            asked = [verifier.submit(ROW, f"{i}") for i in range(200)]
            asked[20].result(60)
            process.send_signal(signal.SIGKILL)
            process.wait()
            assert [future.result(60) for future in asked] == [GOOD] * 200

        process = start_process(port)
        with asking(address, outage=60) as (_, verifier):
            asked = [verifier.submit(ROW, f"{i}") for i in range(200)]
            asked[20].result(60)
            process.send_signal(signal.SIGKILL)
            process.wait()
            process = start_process(port)
            assert [future.result(60) for future in asked] == [GOOD] * 200
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    ("replicas", "cooldown"), [(8, 0.1), (1, 0.0), (1, 60.0)], ids=["never all paused", "no pause", "a longer pause"]
)
def test_a_server_that_is_gone_is_waited_for_as_long_as_an_outage_may_last(replicas: int, cooldown: float) -> None:
    gone = [f"http://127.0.0.1:{free_port()}" for _ in range(replicas)]
    with asking(*gone, outage=1.0, cooldown=cooldown, backoff=0.1, retries=0) as (_, verifier):
        started = time.monotonic()
        result = verifier.submit(ROW, "answer").result(20)
        seconds = time.monotonic() - started
    assert isinstance(result, Failure)
    assert "no replica of judge could be reached: http://127.0.0.1:" in result.reason
    assert 1.0 <= seconds < 10


def test_a_server_that_is_there_again_may_take_longer_for_a_reply_than_the_outage() -> None:
    """Also for those that wait, because it takes one request at a time."""
    port = free_port()
    with asking(f"http://127.0.0.1:{port}", outage=1.0, cooldown=0.1, backoff=0.1, concurrency=1) as (_, verifier):
        asked = [verifier.submit(ROW, f"{i}") for i in range(2)]
        time.sleep(0.6)
        with FakeServer(late_answer, port):
            assert [future.result(20) for future in asked] == [GOOD] * 2


async def late_answer(number: int, request: web.Request, body: dict[str, Any]) -> web.Response:
    await asyncio.sleep(1.5)
    return fake_server.good()


def test_time_without_requests_is_no_outage() -> None:
    port = free_port()
    with asking(f"http://127.0.0.1:{port}", outage=1.0, timeout=0.2, retries=0) as (_, verifier):
        with FakeServer(fake_server.never, port):
            assert isinstance(verifier.submit(ROW, "answer").result(20), Failure)
        time.sleep(1.1)
        for _ in range(2):
            started = time.monotonic()
            result = verifier.submit(ROW, "answer").result(20)
            assert isinstance(result, Failure)
            assert "no replica of judge could be reached" in result.reason
            assert time.monotonic() - started >= 1.0


def test_a_request_comes_to_the_only_replica_that_runs_before_the_server_counts_as_lost() -> None:
    gone = [f"http://127.0.0.1:{free_port()}" for _ in range(7)]
    with FakeServer(fake_server.prompt_answer) as fake, asking(*gone, fake.address, cooldown=0.0) as (_, verifier):
        assert verifier.submit(ROW, "answer").result(20) == GOOD


def test_a_replica_that_is_paused_for_longer_than_the_outage_does_not_delay_its_end() -> None:
    gone = f"http://127.0.0.1:{free_port()}"
    port = free_port()
    with asking(gone, f"http://127.0.0.1:{port}", outage=0.5, cooldown=60.0) as (_, verifier):
        with FakeServer(fake_server.prompt_answer, port):
            assert verifier.submit(ROW, "answer").result(20) == GOOD
        result = verifier.submit(ROW, "answer").result(20)
    assert isinstance(result, Failure)
    assert f"no replica of judge could be reached: http://127.0.0.1:{port}" in result.reason


def test_a_missing_server_stops_the_run_before_it_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeServer(fake_server.prompt_answer) as fake:
        with Client({"judge": server(fake.address)}, settings()) as client:
            client.check()
        with Client({"judge": server(fake.address, f"http://127.0.0.1:{free_port()}")}, settings()) as client:
            with pytest.raises(ValueError, match=r"rewards\.servers\.judge .* `python -m rewards\.serve") as error:
                client.check()
            assert fake.address not in str(error.value)
            client.check(must_run=False)
        other = Server("another", None, "generate", [fake.address + "/v1/"], None, "", 1, 1, 1, [], "judge")
        with Client({"judge": other}, settings()) as client, pytest.raises(ValueError, match="not 'another'"):
            client.check(must_run=False)
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    with pytest.raises(ValueError, match="key_variable='JUDGE_KEY'"):
        Client({"judge": server("http://127.0.0.1:1", key="JUDGE_KEY")}, settings())


def test_servers_sleep_and_wake_with_their_key_and_one_that_does_not_ends_the_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("JUDGE_KEY", "sesame-4711")
    with FakeServer(fake_server.prompt_answer) as one, FakeServer(fake_server.prompt_answer) as two:
        with asking(one.address, two.address, key="JUDGE_KEY") as (client, verifier):
            client.sleep()
            with client.awake():
                assert submit_all(verifier, 4) == [GOOD] * 4
        for fake in (one, two):
            assert fake.events == ["/sleep", "/wake_up", *["asked"] * len(fake.bodies), "/sleep"]
            assert {headers["Authorization"] for headers in fake.headers} == {"Bearer sesame-4711"}
    gone = f"http://127.0.0.1:{free_port()}"
    with (
        asking(gone) as (client, _),
        pytest.raises(RuntimeError, match=r"rewards\.servers\.judge .*/sleep\?level=1.*Conn"),
    ):
        client.sleep(connect_seconds=0.1)
    with (
        asking(gone) as (client, _),
        pytest.raises(RuntimeError, match=r"/wake_up: .*placement=colocated"),
        client.awake(),
    ):
        raise AssertionError("nobody is awake")


def test_the_key_goes_to_the_server_and_nowhere_else(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("JUDGE_KEY", "sesame-4711")
    caplog.set_level(logging.DEBUG)
    refuses = status(401, "the key sesame-4711 is unknown")
    with FakeServer(refuses) as fake, asking(fake.address, key="JUDGE_KEY") as (client, verifier):
        result = verifier(ROW, "answer")
        assert isinstance(result, Failure)
        assert "the key *** is unknown" in result.reason
        client.check()
        assert {headers["Authorization"] for headers in fake.headers_of_checks} == {"Bearer sesame-4711"}
        assert fake.headers[0]["Authorization"] == "Bearer sesame-4711"
        assert "sesame" not in caplog.text + repr(result) + repr(client.pools["judge"].server)


def test_a_request_has_its_own_path_and_parser() -> None:
    with FakeServer(replies({"data": [{"data": [0.0]}]})) as fake, asking(fake.address) as (client, _):

        def parse(reply: Any) -> Verdict:
            return Verdict(0.5, "scalar", str(reply["data"][0]["data"][0]))

        request = JudgeRequest("/pooling", {"model": MODEL}, parse)
        assert client.submit("judge", request).result(60) == Verdict(0.5, "scalar", "0.0")
        assert fake.bodies == [{"model": MODEL}]
