"""wandb and TensorBoard by the configuration: what their files hold."""

import struct
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from tensorboardX.proto.event_pb2 import Event

from recipes.config import Config, parse
from recipes.run.loggers import open_loggers

ROOT = Path(__file__).resolve().parents[2]
ROWS = [
    ({"step": 300, "reward/mean": 0.25, "sync/bytes": 1 << 40, "label": "text"}, ""),
    ({"step": 1, "loss": -2.5}, "warm_start/"),
]


@pytest.fixture
def config(monkeypatch: pytest.MonkeyPatch) -> Config:
    monkeypatch.chdir(ROOT)
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return parse(compose("config", overrides=["recipe=demo", "logger=tensorboard"]))


def scalars(file: Path) -> set[tuple[str, int, float]]:
    """Tag, step and value of each scalar of an event file."""
    values = set()
    data = file.read_bytes()
    while data:  # a record: its length, a checksum, an Event, a checksum
        (size,) = struct.unpack("<Q", data[:8])
        event = Event.FromString(data[12 : 12 + size])
        values |= {(value.tag, event.step, value.simple_value) for value in event.summary.value}
        data = data[16 + size :]
    return values


def test_loggers_are_those_of_the_configuration(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """wandb without a key writes below the run's folder and asks for none."""
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # and its .netrc
    both = replace(config, logger=replace(config.logger, wandb_project="safework"))
    with ExitStack() as stack:
        for log in open_loggers(both, tmp_path, "run1", stack):
            for row, part in ROWS:
                log(row, part)
    (events,) = (tmp_path / "tensorboard").glob("events.out.tfevents.*")
    assert scalars(events) == {("reward/mean", 300, 0.25), ("sync/bytes", 300, 2.0**40), ("warm_start/loss", 1, -2.5)}
    (written,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    expected = (b"reward/mean", b"0.25", b"warm_start/step", b"warm_start/loss", b"-2.5")
    deadline = time.monotonic() + 60  # wandb's own process writes it, and may end a moment later
    while missing := [each for each in expected if each not in written.read_bytes()]:
        assert time.monotonic() < deadline, missing
        time.sleep(0.1)


def test_without_a_logger_nothing_is_written(config: Config, tmp_path: Path) -> None:
    none = replace(config, logger=replace(config.logger, tensorboard=False))
    with ExitStack() as stack:
        assert open_loggers(none, tmp_path, "run1", stack) == []
    assert list(tmp_path.iterdir()) == []
