"""Where a run's metrics go beside metrics.jsonl: wandb and TensorBoard, each by the configuration."""

import netrc
import os
import socket
import struct
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from recipes.config import Config

# Takes a row of metrics.jsonl and, for a part of a run with steps of its own, the part's name with a slash behind it.
type Logger = Callable[[Mapping[str, Any], str], None]

CASTAGNOLI = 0x82F63B78  # reversed polynomial of CRC-32C


def open_loggers(config: Config, run_dir: Path, stack: ExitStack) -> list[Logger]:
    """Those that ``logger`` asks for; ``stack`` closes them."""
    loggers: list[Logger] = []
    if config.logger.wandb_project:
        loggers.append(_open_wandb(config, run_dir, stack))
    if config.logger.tensorboard:
        loggers.append(EventFile(run_dir / "tensorboard").log)
    return loggers


def _open_wandb(config: Config, run_dir: Path, stack: ExitStack) -> Logger:
    """Offline without a key, unless WANDB_MODE says what to do."""
    import wandb

    mode = None if "WANDB_MODE" in os.environ or _has_wandb_key() else "offline"
    run = wandb.init(
        project=config.logger.wandb_project, name=config.recipe.name, dir=run_dir, config=asdict(config), mode=mode
    )
    stack.callback(run.finish)
    seen: set[str] = set()

    def log(row: Mapping[str, Any], part: str) -> None:
        if part not in seen:  # wandb's own steps only rise; a part begins with 1 again
            seen.add(part)
            run.define_metric(f"{part}*", step_metric=f"{part}step")
        run.log({f"{part}{key}": value for key, value in row.items()})

    return log


def _has_wandb_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False


class EventFile:
    """TensorBoard's event file of scalars, a new one in ``folder`` for each launch of a run.

    Records are framed as TensorFlow's `tfrecord.h` says, each holding an `Event` of its event.proto. Written here
    because TensorBoard's own writer comes with the whole of it, and these three messages need nothing of that.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}"
        self._append(_double(1, time.time()) + _bytes(3, b"brain.Event:2"))

    def log(self, row: Mapping[str, Any], part: str) -> None:
        """Write the numbers of a row at its step."""
        values = b"".join(
            _bytes(1, _bytes(1, f"{part}{key}".encode()) + _float(2, float(value)))
            for key, value in row.items()
            if key != "step" and isinstance(value, (int, float))
        )
        self._append(_double(1, time.time()) + b"\x10" + _varint(row["step"]) + _bytes(5, values))

    def _append(self, event: bytes) -> None:
        head = struct.pack("<Q", len(event))
        with self.path.open("ab") as file:
            file.write(head + _masked_crc(head) + event + _masked_crc(event))


def _varint(value: int) -> bytes:
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*found, value])


def _bytes(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(value)) + value


def _double(field: int, value: float) -> bytes:
    return _varint(field << 3 | 1) + struct.pack("<d", value)


def _float(field: int, value: float) -> bytes:
    return _varint(field << 3 | 5) + struct.pack("<f", value)


def crc32c(data: bytes) -> int:
    """CRC-32C (RFC 3720, appendix B.4)."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (CASTAGNOLI if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def _masked_crc(data: bytes) -> bytes:
    """As TensorFlow masks it, so that a checksum of data that has checksums in it is sound."""
    crc = crc32c(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)
