"""The arithmetic of ``benchmarks.rewards``, and that both sides send the same requests. No test measures time."""

import asyncio

import pytest
from rich.console import Console

from benchmarks import rewards
from rewards.client import Client
from rewards.settings import Server
from rewards.verifiers.served import ServedVerifier
from rewards.verifiers.templates import SAFETY
from tests.rewards.fake_server import FakeServer, says


def test_the_ratio_is_taken_in_each_repetition():
    summary = rewards.summarise({"bare_per_second": [100.0, 200.0, 100.0], "ours_per_second": [95.0, 180.0, 80.0]})
    assert summary["bare_per_second"] == 100.0
    assert summary["ours_per_second"] == 95.0
    assert summary["ratio"] == pytest.approx({"median": 0.9, "min": 0.8, "max": 0.95})
    assert summary["met"]
    assert not rewards.summarise({"bare_per_second": [100.0], "ours_per_second": [89.0]})["met"]


def test_the_table_says_what_was_met():
    case = rewards.summarise({"bare_per_second": [100.0], "ours_per_second": [89.0]})
    console = Console(width=140)
    with console.capture() as capture:
        console.print(rewards.table({"fake, slow": case}))
    assert "fake, slow" in capture.get()
    assert "0.890 [0.890, 0.890]" in capture.get()
    assert " no " in capture.get()


def by_prompt(bodies):
    return sorted(bodies, key=lambda body: body["messages"][0]["content"])


def test_both_sides_send_the_same_requests_and_a_wrong_verdict_is_no_measurement():
    settings = rewards.demo_config().rewards.client
    assert settings.concurrency == rewards.CONCURRENCY
    bodies = [
        SAFETY.request(row, rewards.answer_without_reasoning(i), "fake").body for i, row in enumerate(rewards.rows(5))
    ]
    with FakeServer(says("Label: safe without risk")) as fake:
        server = Server("fake", None, "generate", [fake.address], None, "127.0.0.1", 1, 1, 1, [], "judge")
        assert asyncio.run(rewards.bare_seconds(fake.address, bodies)) > 0
        bare_bodies = fake.bodies
        fake.bodies = []
        with Client({"judge": server}, settings) as client:
            verifier = ServedVerifier(SAFETY, "judge", "fake", {}, client)
            assert rewards.our_seconds(verifier, 5, fake=True) > 0
            assert by_prompt(fake.bodies) == by_prompt(bare_bodies) == by_prompt(bodies)
            fake.behave = says("Label: unsafe")
            with pytest.raises(RuntimeError, match="not every answer has its verdict"):
                rewards.our_seconds(verifier, 5, fake=True)
