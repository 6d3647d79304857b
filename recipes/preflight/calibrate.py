"""``python -m recipes.preflight.calibrate FILE.json``: replace estimates in conf/ by measurements of the GPU checks.

FILE is the record of a rung of docs/gpu_checks.md (benchmarks/results/gpu/one_gpu.json, node.json or two_nodes.json).
``RUNGS`` maps its figures to the fields of conf/. Only the values of a file change. Its order and comments stay, and a
new first line names the fields that were measured. Nothing is written if a figure is missing, belongs to a failed check
or to another GPU than the file of conf/ is for, or lies outside the plausible range.
"""

import json
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_ext.platform.features import peak_flops
from recipes.command_line import CONF
from recipes.errors import ConfigError

SIGNIFICANT_DIGITS = 4

# (check, figure) → measured value
type Measured = Callable[[str, str], float]


@dataclass(frozen=True)
class Estimate:
    """A number in conf/ and where its measured value comes from.

    Attributes:
        group, field: the group of conf/ and the dotted name in its file.
        measured: computes the value from figures.
        low, high: the plausible range, both ends included. A value outside of it points to a faulty measurement.
    """

    group: str
    field: str
    measured: Callable[[Measured], float]
    low: float
    high: float


TRAINER = "test_memory.py::test_a_trainers_process_keeps_what_the_preflight_counts"
COPIES = "test_memory.py::test_memory_is_copied_at_half_the_assumed_speed_or_more"
SLEEP = "test_sleep.py::test_a_sleeping_engine_gives_its_memory_back_and_wakes_to_the_same_bits"
JUDGE = "test_colocation.py::test_a_judges_server_gives_its_memory_back_and_wakes_to_the_same_verdict"
DECODE = "test_decoding.py::test_an_engines_step_of_80_narrow_layers"
READ = "test_memory.py::test_an_engine_reads_whole_72b_layers_at_half_the_assumed_speed_or_more"
FILES = "test_memory.py::test_files_are_written_and_read"
SYNC = "test_rollout.py::test_other_weights_change_every_digest_and_the_old_ones_bring_all_back"
NODE = "test_node.py::test_the_links_and_communicators_of_the_node"
BLOCK = "test_node.py::test_a_block_of_the_72b_model_over_all_gpus_keeps_them_busy"
BETWEEN = "test_two_nodes.py::test_the_links_between_the_nodes_hold_their_floor"


def context_gib(measured: Measured) -> float:
    """GiB of a CUDA context: the larger of a trainer's and an engine's.

    The figure of an engine's process includes a workspace, which is subtracted.
    """
    of_engine = measured(SLEEP, "engine_process_gib") - measured(TRAINER, "workspace_gib")
    return max(measured(TRAINER, "context_gib"), of_engine)


# The comment above an estimate gives the reason for its range. "The check's bound" is the limit at which the GPU check
# itself fails.
RUNGS: dict[str, tuple[Estimate, ...]] = {
    "one_gpu": (
        # An 80 GB H100 has 79.1 GiB for CUDA, an H200 139.8; ECC and MIG change a little.
        Estimate("preflight", "device_memory_gib", lambda m: m(TRAINER, "device_memory_gib"), 70, 150),
        # A bare context takes 0.3 to 0.5 GiB on an H100; three times that with all kernels loaded.
        Estimate("preflight", "context_gib", context_gib, 0.2, 1.5),
        # cuBLAS and Transformer Engine have 32 MiB a handle, attention up to a GiB.
        Estimate("preflight", "workspace_gib", lambda m: m(TRAINER, "workspace_gib"), 0.0, 2.0),
        # Between nothing and a tenth of the GPU. More is a leak.
        Estimate("preflight", "fragmentation_gib", lambda m: m(TRAINER, "fragmentation_gib"), 0.0, 8.0),
        # A context and a workspace.
        Estimate("preflight", "asleep_gib", lambda m: m(JUDGE, "asleep_gib"), 0.2, 3.5),
        # At most half of the memory's bandwidth (3,350 GB/s; H200 4,800), since each byte is read and written.
        Estimate("simulate", "copy_gb_s", lambda m: m(f"{COPIES}[copy_gb_s]", "copy_gb_s"), 600, 2400),
        # PCIe 5.0 x16: 63 GB/s.
        Estimate("simulate", "pcie_gb_s", lambda m: m(f"{COPIES}[pcie_gb_s]", "pcie_gb_s"), 25, 63),
        # An HTTP request and a few collectives over loopback.
        Estimate("simulate", "order_ms", lambda m: m(SYNC, "sync_of_a_tiny_model_ms"), 1, 1000),
        # Low: a thousand kernels of at least 1 µs. High: the check's bound.
        Estimate("scale", "machine.decode_ms", lambda m: m(DECODE, "decode_ms"), 1, 100),
        # Low: a thousand graph nodes of at least 2 KiB. High: five times what vLLM's logs report for other models.
        Estimate("preflight", "graph_gib", lambda m: m(DECODE, "graph_gib"), 0.002, 0.18),
        # The check's bound is half of the estimate. Kernels that only read reach 0.95 of the data sheet's bandwidth.
        Estimate("scale", "machine.hbm_share", lambda m: m(READ, "hbm_share"), 0.4, 1.0),
        # HTTP, and the unmapping and mapping of a few thousand pages of 2 MiB. A minute would mean paging.
        Estimate("scale", "machine.switch_s", lambda m: m(SLEEP, "switch_s"), 0.01, 60),
        # Low: the check's bound, a tenth of the estimates. Two adapters of 400 Gb/s carry 100 GB/s.
        Estimate("scale", "machine.write_gb_s", lambda m: m(FILES, "write_gb_s"), 0.4, 100),
        Estimate("scale", "machine.read_gb_s", lambda m: m(FILES, "read_gb_s"), 0.8, 100),
    ),
    "node": (
        # The check's bound.
        Estimate("preflight", "communicator_gib", lambda m: m(NODE, "communicator_gib"), 0.0, 2.0),
        # The check's bound is half of the estimate. NVLink 4 has 450 GB/s in each direction.
        Estimate("simulate", "nvlink_gb_s", lambda m: m(NODE, "nvlink_gb_s"), 150, 450),
        # Low: launches of at least 2 µs each. High: the check's bound.
        Estimate("simulate", "round_us", lambda m: m(NODE, "round_us"), 5, 2000),
        # Low: NCCL's latency over eight GPUs. High: the check's bound.
        Estimate("scale", "machine.all_reduce_us", lambda m: m(NODE, "all_reduce_us"), 5, 200),
        # No published training of dense models on H100 is above 0.6.
        Estimate("scale", "machine.mfu", lambda m: m(BLOCK, "mfu"), 0.2, 0.65),
    ),
    "two_nodes": (
        # 400 Gb/s are 50 GB/s. 200 Gb/s with a tenth lost are 22 GB/s.
        Estimate("simulate", "network_gb_s", lambda m: m(BETWEEN, "network_gb_s"), 15, 50),
    ),
}


def calibrate(record: Path, conf: Path = CONF) -> list[str]:
    """Write the figures of ``record`` into the files of ``conf`` for its GPU. Return one line for each changed value.

    Raises ConfigError, before anything is written, if a figure can't be used or a file has no field for it.
    """
    if record.stem not in RUNGS:
        raise ConfigError(f"{record}: no rung; the files are {', '.join(f'{rung}.json' for rung in RUNGS)}")
    if not record.exists():
        raise ConfigError(f"{record} does not exist: run the rung first, docs/gpu_checks.md")
    entries = json.loads(record.read_text())
    gpu = gpu_of(record, entries, conf)
    texts: dict[Path, str] = {}
    changed: dict[Path, list[str]] = {}
    lines = []
    for estimate in RUNGS[record.stem]:
        value = estimate.measured(lambda check, figure: figure_of(record, entries, check, figure))
        if not estimate.low <= value <= estimate.high:
            raise ConfigError(
                f"{record}: {estimate.group}.{estimate.field} would be {value:.4g}, plausible are {estimate.low:g} to "
                f"{estimate.high:g}: find out what was measured (recipes/preflight/calibrate.py)"
            )
        file = conf / estimate.group / f"{gpu}.yaml"
        text = texts.setdefault(file, file.read_text() if file.exists() else "")
        start, stop = place(file, text, estimate.field)
        new = number(value)
        lines.append(f"conf/{estimate.group}/{gpu}.yaml: {estimate.field} {text[start:stop]} -> {new}")
        texts[file] = text[:start] + new + text[stop:]
        changed.setdefault(file, []).append(estimate.field)
    newest = max(entry["date"] for entry in entries.values())
    device = next(iter(entries.values()))["machine"]["device"]
    for file, fields in changed.items():
        file.write_text(with_source(texts[file], record.name, f"{device}, {newest[:10]}", fields))
    return lines


def figure_of(record: Path, entries: Mapping[str, Any], check: str, figure: str) -> float:
    """A figure of a check. Raises ConfigError if the figure is missing or the check did not pass."""
    if check not in entries or figure not in entries[check]["figures"]:
        raise ConfigError(f"{record} lacks {figure} of {check}: run the whole rung again")
    if entries[check]["outcome"] != "passed":
        raise ConfigError(f"{record}: {check} has {entries[check]['outcome']}; its figures are not used")
    return float(entries[check]["figures"][figure])


def gpu_of(record: Path, entries: Mapping[str, Any], conf: Path) -> str:
    """The name of the GPU's files in ``conf``: the stem of the file of conf/preflight that is a word of the GPU's name.

    Raises ConfigError for a record of several GPUs, and for a GPU without such a file or with another peak than its
    file of conf/scale has.
    """
    devices = {re.sub(r"^\d+ x ", "", entry["machine"]["device"]) for entry in entries.values()}
    if len(devices) != 1:
        raise ConfigError(f"{record} is of several GPUs ({', '.join(sorted(devices))}): run the whole rung on one")
    (device,) = devices
    known = sorted(file.stem for file in (conf / "preflight").glob("*.yaml"))
    names = [name for name in known if name in device.lower().split()]
    costs = conf / "scale" / f"{names[0]}.yaml" if names else None
    is_another = costs is not None and costs.exists() and peak_tflops(costs) != (peak_flops(device) or 0) / 1e12
    if not names or is_another:
        raise ConfigError(f"{record} is of {device!r}: conf/preflight has {', '.join(known)}; make a file for it first")
    return names[0]


def peak_tflops(costs: Path) -> float:
    """Peak TFLOPS of the GPU that a file of conf/scale is for. Boards of the same name differ in their peak."""
    return float(yaml.safe_load(costs.read_text())["machine"]["peak_tflops"])


def place(file: Path, text: str, field: str) -> tuple[int, int]:
    """The indices at which the number of a field begins and ends in the text of a YAML file.

    Raises ConfigError if the file has no such field.
    """
    node = yaml.compose(text)
    for key in field.split("."):
        values = [value for name, value in getattr(node, "value", ()) if name.value == key]
        if not values:
            raise ConfigError(f"{file} has no {field} of its own: write one with the present value first")
        node = values[0]
    return node.start_mark.index, node.end_mark.index


def number(value: float) -> str:
    """A value as text with ``SIGNIFICANT_DIGITS``. It has no exponent, which YAML would read as text."""
    decimals = SIGNIFICANT_DIGITS - 1 - math.floor(math.log10(value or 1))
    return str(round(value, min(max(decimals, 1), SIGNIFICANT_DIGITS)))


def with_source(text: str, record: str, source: str, fields: Sequence[str]) -> str:
    """The text with a first line that names the measured fields. It replaces an earlier line of the same record."""
    mark = f"# Measured ({record}"
    rest = [line for line in text.splitlines() if not line.startswith(mark)]
    names = ", ".join(field.rpartition(".")[2] for field in fields)
    return "\n".join([f"{mark}, {source}), whatever comments below call an estimate: {names}", *rest]) + "\n"


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("use: python -m recipes.preflight.calibrate benchmarks/results/gpu/one_gpu.json")
    try:
        print(*calibrate(Path(sys.argv[1])), sep="\n")
    except ConfigError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
