"""How ``make test`` shares the tests and the cores out between its processes, and what ``make test-fast`` leaves out.

``durations.json`` has the seconds that each file's tests took together; ``make test-durations`` renews it.
"""

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from xdist.scheduler import LoadFileScheduling

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch is imported; a run or an engine has threads of its own setting
    os.environ["OMP_NUM_THREADS"] = "1"

# Other processes run beside an example, so its seconds say nothing.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

ROOT = Path(__file__).resolve().parents[1]
DURATIONS = Path(__file__).with_name("durations.json")
# A file whose tests take longer is not part of make test-fast, but for these; one that has no record yet is.
FAST_SECONDS = 1.5
ALWAYS_FAST = (
    "tests/data/test_demo_data.py",
    "tests/recipes/test_advantages.py",
    "tests/recipes/test_config.py",
    "tests/recipes/test_engine_settings.py",
    "tests/recipes/test_policy_losses.py",
    "tests/recipes/test_ppo_step.py",
    "tests/rewards/test_red_team.py",
    "tests/rewards/test_rules.py",
)
NEVER_FAST = "tests/te/"  # fetches packages, and one process computes for all files
SLURM = "tests/slurm/"
# Files that share a Slurm cluster, or what ranks computed. A process takes all of them.
SHARING = {
    SLURM: "cluster",
    NEVER_FAST: "ranks with a fake GPU",
    "tests/megatron_ext/test_checkpoint": "ranks that save",
    "tests/megatron_ext/test_collectives.py": "text ranks",
    "tests/megatron_ext/test_hf_checkpoint.py": "text ranks",
    "tests/megatron_ext/test_layouts.py": "text ranks",
    "tests/megatron_ext/test_not_finite.py": "text ranks",
    "tests/megatron_ext/test_internvl3.py": "vision ranks",
    "tests/megatron_ext/test_qwen2_5_vl.py": "vision ranks",
}

recorded: Counter[str] = Counter()


def file_of(nodeid: str) -> str:
    return nodeid.partition("::")[0]


def scope_of(nodeid: str) -> str:
    """What one process takes at a time: a file, whose tests share runs and engines, or files that share more."""
    file = file_of(nodeid)
    return next((scope for prefix, scope in SHARING.items() if file.startswith(prefix)), file)


class Scheduling(LoadFileScheduling):
    def _split_scope(self, nodeid: str) -> str:
        return scope_of(nodeid)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fast", action="store_true", help="only files whose tests take a few seconds")
    parser.addoption("--record-durations", action="store_true", help=f"of the files that run, in {DURATIONS.name}")


def pytest_xdist_make_scheduler(config: Any, log: Any) -> Scheduling:
    return Scheduling(config, log)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    if not config.getoption("--fast") or not collection_path.is_relative_to(ROOT):
        return None
    file = str(collection_path.relative_to(ROOT))
    seconds = json.loads(DURATIONS.read_text()).get(file, 0)
    slow = seconds > FAST_SECONDS and file not in ALWAYS_FAST
    return True if slow or f"{file}/".startswith(NEVER_FAST) else None


def pytest_collection_modifyitems(items: list[Any]) -> None:
    """Slurm's tests go first: they mostly wait, while the other processes have the cores. Then the longest go first,
    and what is not recorded before them: when one process has no more work, the last file of another is a short one."""
    seconds: Counter[str] = Counter()
    for file, duration in json.loads(DURATIONS.read_text()).items():
        seconds[scope_of(file)] += duration

    def place(item: Any) -> tuple[bool, float]:
        scope = scope_of(item.nodeid)
        return not item.nodeid.startswith(SLURM), -seconds.get(scope, float("inf"))

    items.sort(key=place)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    recorded[file_of(report.nodeid)] += report.duration


def pytest_sessionfinish(session: pytest.Session) -> None:
    if session.config.getoption("--record-durations") and not hasattr(session.config, "workerinput"):
        seconds = json.loads(DURATIONS.read_text()) | {file: round(taken, 1) for file, taken in recorded.items()}
        present = {file: seconds[file] for file in sorted(seconds) if (ROOT / file).exists()}
        DURATIONS.write_text(json.dumps(present, indent=2) + "\n")
