"""wandb and TensorBoard by the configuration, held against the formats' own libraries."""

import struct
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from hydra import compose, initialize_config_dir

from recipes.config import Config, parse
from recipes.loggers import EventFile, crc32c, open_loggers

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


def event_class():
    """`Event` of TensorFlow's event.proto, the fields that a file of scalars has."""
    file = descriptor_pb2.FileDescriptorProto(name="event.proto", package="t", syntax="proto3")
    types = descriptor_pb2.FieldDescriptorProto
    messages = {
        "Value": [("tag", 1, types.TYPE_STRING, None), ("simple_value", 2, types.TYPE_FLOAT, None)],
        "Summary": [("value", 1, types.TYPE_MESSAGE, ".t.Value")],
        "Event": [
            ("wall_time", 1, types.TYPE_DOUBLE, None),
            ("step", 2, types.TYPE_INT64, None),
            ("file_version", 3, types.TYPE_STRING, None),
            ("summary", 5, types.TYPE_MESSAGE, ".t.Summary"),
        ],
    }
    for name, fields in messages.items():
        message = file.message_type.add(name=name)
        for field, number, kind, of in fields:
            label = types.LABEL_REPEATED if field == "value" else types.LABEL_OPTIONAL
            message.field.add(name=field, number=number, type=kind, label=label, type_name=of)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("t.Event"))


def records(data: bytes) -> list[bytes]:
    found = []
    while data:
        (size,) = struct.unpack("<Q", data[:8])
        found.append(data[12 : 12 + size])
        for part, checksum in ((data[:8], data[8:12]), (found[-1], data[12 + size : 16 + size])):
            rotated = (struct.unpack("<I", checksum)[0] - 0xA282EAD8) & 0xFFFFFFFF
            assert (rotated >> 17 | rotated << 15) & 0xFFFFFFFF == crc32c(part)
        data = data[16 + size :]
    return found


def test_the_checksum_is_the_standards() -> None:
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(bytes(32)) == 0x8A9136AA  # RFC 3720, B.4


def test_event_files_are_what_protobuf_writes(tmp_path: Path) -> None:
    file = EventFile(tmp_path / "tensorboard")
    for row, part in ROWS:
        file.log(row, part)
    kind = event_class()
    found = [kind.FromString(record) for record in records(file.path.read_bytes())]
    assert [event.SerializeToString() for event in found] == records(file.path.read_bytes())
    assert [event.file_version for event in found] == ["brain.Event:2", "", ""]
    scalars = [(event.step, [(value.tag, value.simple_value) for value in event.summary.value]) for event in found]
    assert scalars[1:] == [
        (300, [("reward/mean", 0.25), ("sync/bytes", float(1 << 40))]),
        (1, [("warm_start/loss", -2.5)]),
    ]


def test_loggers_are_those_of_the_configuration(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """wandb without a key writes below the run's folder and asks for none."""
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # and its .netrc
    both = replace(config, logger=replace(config.logger, wandb_project="safework"))
    with ExitStack() as stack:
        for log in open_loggers(both, tmp_path, stack):
            for row, part in ROWS:
                log(row, part)
    assert len(list((tmp_path / "tensorboard").glob("events.out.tfevents.*"))) == 1
    (written,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    data = written.read_bytes()
    for text in (b"reward/mean", b"0.25", b"warm_start/step", b"warm_start/loss", b"-2.5"):
        assert text in data


def test_without_a_logger_nothing_is_written(config: Config, tmp_path: Path) -> None:
    none = replace(config, logger=replace(config.logger, tensorboard=False))
    with ExitStack() as stack:
        assert open_loggers(none, tmp_path, stack) == []
    assert list(tmp_path.iterdir()) == []
