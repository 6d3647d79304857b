"""Measured figures go into conf/, exactly; what can't be used is refused before anything is written."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir

from recipes.config import parse
from recipes.errors import ConfigError
from recipes.preflight import calibrate, memory_plan
from recipes.preflight.report import Settings
from tests.settings import CONF

GROUPS = ("preflight", "simulate", "scale")
# Made up, for this test alone: no GPU has been measured. Rung → figures and the values that follow in conf/.
MADE_UP: dict[str, dict[tuple[str, str], float]] = {
    "one_gpu": {
        (calibrate.TRAINER, "device_memory_gib"): 79.125,
        (calibrate.TRAINER, "context_gib"): 0.5,
        (calibrate.TRAINER, "workspace_gib"): 0.25,
        (calibrate.TRAINER, "fragmentation_gib"): 2.03125,
        (calibrate.SLEEP, "engine_process_gib"): 1.0,
        (calibrate.JUDGE, "asleep_gib"): 0.8,
        (f"{calibrate.COPIES}[copy_gb_s]", "copy_gb_s"): 1401.26,
        (f"{calibrate.COPIES}[pcie_gb_s]", "pcie_gb_s"): 52.25,
        (calibrate.SYNC, "sync_of_a_tiny_model_ms"): 12.0,
        (calibrate.DECODE, "decode_ms"): 23.456,
        (calibrate.DECODE, "graph_gib"): 0.03125,
        (calibrate.READ, "hbm_share"): 0.87654,
        (calibrate.SLEEP, "switch_s"): 1.5,
        (calibrate.FILES, "write_gb_s"): 2.5,
        (calibrate.FILES, "read_gb_s"): 11.25,
    },
    "node": {
        (calibrate.NODE, "communicator_gib"): 0.55,
        (calibrate.NODE, "nvlink_gb_s"): 371.0,
        (calibrate.NODE, "all_reduce_us"): 31.0,
        (calibrate.NODE, "round_us"): 150.0,
        (calibrate.BLOCK, "mfu"): 0.4375,
    },
    "two_nodes": {(calibrate.BETWEEN, "network_gb_s"): 44.7},
}
EXPECTED = {
    "one_gpu": [
        "conf/preflight/h100.yaml: device_memory_gib 79.1 -> 79.12",
        "conf/preflight/h100.yaml: context_gib 0.55 -> 0.75",  # an engine's process less a workspace
        "conf/preflight/h100.yaml: workspace_gib 0.5 -> 0.25",
        "conf/preflight/h100.yaml: fragmentation_gib 1.0 -> 2.031",
        "conf/preflight/h100.yaml: asleep_gib 1.0 -> 0.8",
        "conf/simulate/h100.yaml: copy_gb_s 1300 -> 1401.3",
        "conf/simulate/h100.yaml: pcie_gb_s 55 -> 52.25",
        "conf/simulate/h100.yaml: order_ms 20 -> 12.0",
        "conf/scale/h100.yaml: machine.decode_ms 2.0 -> 23.46",
        "conf/preflight/h100.yaml: graph_gib 0.035 -> 0.0312",
        "conf/scale/h100.yaml: machine.hbm_share 0.7 -> 0.8765",
        "conf/scale/h100.yaml: machine.switch_s 11 -> 1.5",
        "conf/scale/h100.yaml: machine.write_gb_s 4 -> 2.5",
        "conf/scale/h100.yaml: machine.read_gb_s 8 -> 11.25",
    ],
    "node": [
        "conf/preflight/h100.yaml: communicator_gib 0.3 -> 0.55",
        "conf/simulate/h100.yaml: nvlink_gb_s 360 -> 371.0",
        "conf/simulate/h100.yaml: round_us 200 -> 150.0",
        "conf/scale/h100.yaml: machine.all_reduce_us 60 -> 31.0",
        "conf/scale/h100.yaml: machine.mfu 0.44 -> 0.4375",
    ],
    "two_nodes": ["conf/simulate/h100.yaml: network_gb_s 45 -> 44.7"],
}


@pytest.fixture
def conf(tmp_path: Path) -> Path:
    """A copy of the groups that are written."""
    for group in GROUPS:
        shutil.copytree(CONF / group, tmp_path / "conf" / group)
    return tmp_path / "conf"


def entries(rung: str) -> dict[str, Any]:
    """As tests/gpu/record.py writes them."""
    recorded: dict[str, Any] = {}
    for (check, figure), value in MADE_UP[rung].items():
        entry = {"outcome": "passed", "seconds": 1.0, "date": "2026-12-01T00:00:00+00:00", "figures": {}}
        entry["machine"] = {"device": "8 x NVIDIA H100 80GB HBM3"}
        recorded.setdefault(check, entry)["figures"][figure] = value
    return recorded


def write(folder: Path, rung: str, content: dict[str, Any]) -> Path:
    file = folder / f"{rung}.json"
    file.write_text(json.dumps(content))
    return file


def texts(conf: Path) -> dict[str, str]:
    return {str(file.relative_to(conf)): file.read_text() for file in sorted(conf.rglob("*.yaml"))}


@pytest.mark.parametrize("rung", calibrate.RUNGS)
def test_measured_values_take_the_place_of_estimates(rung: str, conf: Path, tmp_path: Path) -> None:
    """Each file has one line more, which names what was measured. All else is as it was, but for the numbers."""
    record = write(tmp_path, rung, entries(rung))
    before = texts(conf)
    assert calibrate.calibrate(record, conf) == EXPECTED[rung]
    after = texts(conf)
    for name, text in before.items():
        changes = dict(line.split(": ")[1].split(" ", 1) for line in EXPECTED[rung] if line.startswith(f"conf/{name}"))
        expected = text
        for field, change in changes.items():
            key = field.rpartition(".")[2]
            old, new = change.split(" -> ")
            assert expected.count(f"\n{key}: {old} ") + expected.count(f"\n  {key}: {old} ") == 1
            expected = expected.replace(f"\n{key}: {old} ", f"\n{key}: {new} ")
            expected = expected.replace(f"\n  {key}: {old} ", f"\n  {key}: {new} ")
            value = yaml.safe_load(after[name])
            for part in field.split("."):
                value = value[part]
            assert value == float(new)
        if changes:
            names = ", ".join(field.rpartition(".")[2] for field in changes)
            source = f"# Measured ({rung}.json, 8 x NVIDIA H100 80GB HBM3, 2026-12-01), "
            expected = f"{source}whatever comments below call an estimate: {names}\n{expected}"
        assert after[name] == expected, name

    # A second time nothing changes, and the line stays one.
    again = calibrate.calibrate(record, conf)
    assert [line.split(" -> ")[1] for line in again] == [line.split(" -> ")[1] for line in EXPECTED[rung]]
    assert all(line.split()[2] == line.split()[4] for line in again)
    assert texts(conf) == after


def test_the_preflights_estimate_moves_by_what_was_measured(conf: Path, tmp_path: Path) -> None:
    """The 72B recipe's rank is in six groups: of tensor, pipeline, context and gradients, of all, and of the sync. Its
    engines have 35 graphs."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = parse(compose("config", ["recipe=safework_72b"]))

    def reserve() -> tuple[float, float]:
        settings = Settings(**yaml.safe_load((conf / "preflight" / "h100.yaml").read_text()))
        trainer, engine = memory_plan.reserve(config, settings)
        return trainer / memory_plan.GIB, engine / memory_plan.GIB

    before = reserve()
    for rung in ("one_gpu", "node"):
        calibrate.calibrate(write(tmp_path, rung, entries(rung)), conf)
    after = reserve()
    process = (0.75 - 0.55) + (0.25 - 0.5)
    assert after[0] - before[0] == pytest.approx(process + (2.031 - 1.0) + 6 * (0.55 - 0.3), abs=1e-6)
    graphs = 35 * (0.0312 - 0.035)
    assert after[1] - before[1] == pytest.approx(process + (0.55 - 0.3) + graphs, abs=1e-6)


def changed(rung: str, check: str, **values: Any) -> dict[str, Any]:
    recorded = copy.deepcopy(entries(rung))
    recorded[check] |= values
    return recorded


REFUSED = {
    "lacks mfu of test_node.py::test_a_block": changed("node", calibrate.BLOCK, figures={}),
    "lacks communicator_gib of test_node.py::test_the_links": {calibrate.BLOCK: entries("node")[calibrate.BLOCK]},
    "has failed; its figures are not used": changed("node", calibrate.BLOCK, outcome="failed"),
    "machine.mfu would be 0.9, plausible are 0.2 to 0.65": changed("node", calibrate.BLOCK, figures={"mfu": 0.9}),
    "is of several GPUs": changed("node", calibrate.BLOCK, machine={"device": "8 x NVIDIA H200"}),
    "is of 'NVIDIA B200': conf/preflight has": {
        check: entry | {"machine": {"device": "8 x NVIDIA B200"}} for check, entry in entries("node").items()
    },
    "is of 'NVIDIA H100 PCIe'": {
        check: entry | {"machine": {"device": "8 x NVIDIA H100 PCIe"}} for check, entry in entries("node").items()
    },
    "h200.yaml has no communicator_gib of its own": {
        check: entry | {"machine": {"device": "8 x NVIDIA H200"}} for check, entry in entries("node").items()
    },
}


@pytest.mark.parametrize("why", REFUSED)
def test_a_record_that_can_not_be_used_changes_nothing(why: str, conf: Path, tmp_path: Path) -> None:
    before = texts(conf)
    with pytest.raises(ConfigError, match=why):
        calibrate.calibrate(write(tmp_path, "node", REFUSED[why]), conf)
    assert texts(conf) == before


def test_a_record_that_is_absent_or_of_no_rung_is_named(conf: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"node\.json does not exist: run the rung first"):
        calibrate.calibrate(tmp_path / "node.json", conf)
    with pytest.raises(ConfigError, match=r"one_gpu\.json, node\.json, two_nodes\.json"):
        calibrate.calibrate(write(tmp_path, "eight", {}), conf)
