"""Which order of sleep, wake and sync an engine accepts, with a vLLM that only records its calls; whom its
server hears."""

import asyncio
import contextlib
import json
import os
import socket
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_ext import batch as batches
from rollout import user_socket
from rollout.engine_server import EngineLoop, Refused, serve
from rollout.sampling import Sampling
from tests.settings import engine_settings


class Llm:
    """What :class:`EngineLoop` calls of vLLM's engine; the workers answer every call with nothing."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.busy = False
        self.engine_core = SimpleNamespace(engine_core=SimpleNamespace(batch_queue=None))

    def collective_rpc(self, method: str, args: tuple[str, ...] = ()) -> list[str]:
        if method == "weight_sync_zero_cache":
            self.calls.append(("zero", ["kv_cache"]))
        return [json.dumps({"checksums": []})]

    def has_unfinished_requests(self) -> bool:
        return self.busy

    def reset_prefix_cache(self) -> bool:
        return True

    def reset_encoder_cache(self) -> None:
        pass

    def set_weight_version(self, version: str) -> None:
        pass

    def sleep(self, level: int) -> None:
        self.calls.append(("sleep", level))

    def wake_up(self, tags: list[str]) -> None:
        self.calls.append(("wake", tags))


@pytest.fixture
def loop(tmp_path: Path) -> EngineLoop:
    (tmp_path / "config.json").write_text("{}")
    settings = engine_settings(
        model=str(tmp_path),
        dtype="bfloat16",
        max_model_len=8,
        max_num_seqs=1,
        max_num_batched_tokens=8,
        kv_cache_gib=1.0,
        platform="cuda",
        sleep=True,
    )
    loop = EngineLoop(settings, Llm())
    loop.weights.version = 1
    return loop


def sync(loop: EngineLoop) -> None:
    loop.change_weights(lambda _: setattr(loop.weights, "stale", False) or {}, None)


def refusal(loop: EngineLoop) -> str:
    with pytest.raises(Refused) as refused:
        loop.add_batch(batches.build([], []), Sampling(max_tokens=1, stop_token_ids=(2,)), None, print)
    return str(refused.value)


def test_weights_wake_before_the_sync_and_the_cache_after_it(loop: EngineLoop) -> None:
    loop.between_batches(loop.sleep, {})
    assert loop.health()["asleep"] == ["kv_cache", "weights"]
    assert refusal(loop).startswith("asleep: kv_cache, weights: wake and sync")
    with pytest.raises(Refused, match="the weights are asleep: POST /wake"):
        sync(loop)
    loop.wake({"tags": ["weights"]})
    sync(loop)
    assert refusal(loop).startswith("asleep: kv_cache: wake")
    loop.wake({"tags": ["kv_cache"]})
    loop.wake({"tags": ["weights", "kv_cache"]})  # nothing is asleep: nothing happens
    assert loop.llm.calls == [("sleep", 2), ("wake", ["weights"]), ("wake", ["kv_cache"]), ("zero", ["kv_cache"])]
    assert loop.health()["asleep"] == []
    loop._check_usable()


def test_weights_that_slept_are_stale_until_a_sync(loop: EngineLoop) -> None:
    loop.sleep({})
    loop.wake({"tags": ["weights", "kv_cache"]})
    assert loop.health()["stale"] and "or the engine slept, so the weights are stale: sync again" in refusal(loop)


def test_an_engine_falls_asleep_between_batches_only(loop: EngineLoop) -> None:
    loop.llm.busy = True
    with pytest.raises(Refused, match="requests are still running"):
        loop.between_batches(loop.sleep, {})
    assert loop.llm.calls == [] and loop.health()["asleep"] == []


def test_weights_change_in_the_middle_of_a_batch_only_where_that_is_asked_for(loop: EngineLoop) -> None:
    loop.llm.busy = True
    changes: list[Any] = []
    with pytest.raises(Refused, match="weights change only between batches"):
        loop.update_weights(lambda body: changes.append(body) or {}, "refused")
    loop.settings = replace(loop.settings, rollout=replace(loop.settings.rollout, in_flight_updates=True))
    loop.update_weights(lambda body: changes.append(body) or {}, "taken")
    assert changes == ["taken"]
    with pytest.raises(Refused, match="weights change only between batches"):
        loop.change_weights(lambda body: changes.append(body) or {}, "a plan")


@pytest.fixture
def socket_name(loop: EngineLoop) -> str:
    """Of a server in this process, as the engine's process has it."""
    listener, name = user_socket.listen()
    served = user_socket.UserSocket(fileno=listener.detach())
    threading.Thread(target=lambda: asyncio.run(serve(loop, served)), daemon=True).start()
    return name


def health(name: str) -> int:
    connection = user_socket.UserConnection(name, timeout=600)
    connection.request("GET", "/health")
    return connection.getresponse().status


def answer_to_another_user(name: str) -> bytes:
    """What a process of another user gets when it asks the engine to end; nothing where it is not heard."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.setuid(65534)
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as connection:
            connection.connect(f"\0{name}")
            connection.sendall(b"POST /shutdown HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n")
            os.write(writing, connection.recv(1000))
        os._exit(0)
    os.close(writing)
    os.waitpid(child, 0)
    with open(reading, "rb") as file:
        return file.read()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become another user")
def test_the_engine_hears_its_own_user_only(loop: EngineLoop, socket_name: str) -> None:
    assert health(socket_name) == 200
    assert answer_to_another_user(socket_name) == b""
    assert health(socket_name) == 200
    assert loop.commands.empty(), "nobody asked it to end"


def test_each_side_drops_a_peer_of_another_user(socket_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the test above, with users that are pretended."""
    monkeypatch.setattr(user_socket, "user_of_peer", lambda _: os.geteuid() + 1)
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(f"\0{socket_name}")
        assert connection.recv(1) == b"", "the server has closed it"
    with pytest.raises(PermissionError, match="another user listens"):
        health(socket_name)


def test_the_name_of_a_socket_is_no_file_and_goes_with_its_process() -> None:
    listener, name = user_socket.listen()
    assert not Path(name).exists()
    listener.close()
    with pytest.raises(ConnectionRefusedError):
        health(name)
