"""The file of a calibrated threshold: the threshold, the conditions that it holds for, and its scores."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rollout.guidance.decisions import normalised
from rollout.guidance.settings import GuidanceConfig


@dataclass(frozen=True)
class Calibration:
    """A conformal threshold (``rollout.guidance.decisions.conformal_threshold``)."""

    # The largest share of benign answers that may have a segment below the threshold.
    level: float
    # The number of answers.
    n: int
    # The threshold is the ``rank``-th smallest of ``lowest_scores``.
    rank: int
    threshold: float
    # The threshold holds for answers that are sampled under the same conditions.
    conditions: dict[str, Any]
    # The lowest score of each answer.
    lowest_scores: list[float]


def conditions(config: GuidanceConfig, value_model: str) -> dict[str, Any]:
    """Return what a score depends on, in addition to the prompts and the generator's sampling."""
    return {
        "value_model": value_model,
        "principles": list(config.values.principles),
        "weights": list(normalised(config.weights, config.values.principles)),
        "router": None if config.router is None else json.loads(Path(config.router).read_text()),
        "max_segment_tokens": config.max_segment_tokens,
        "max_tokens": config.max_tokens,
        "thinking_marks": list(config.thinking_marks),
    }


def write(calibration: Calibration, path: Path) -> None:
    """Write the calibration. Raises FileExistsError if the file exists, because a file is never replaced."""
    with path.open("x") as file:
        json.dump(asdict(calibration), file, indent=1)


def read_threshold(config: GuidanceConfig, value_model: str) -> float:
    """Return the threshold of the calibration that the configuration names.

    Raises ValueError for a file that can't be read or that was calibrated under other conditions.
    """
    try:
        assert config.calibration is not None
        calibration = Calibration(**json.loads(Path(config.calibration).read_text()))
        threshold = float(calibration.threshold)
        recorded = dict(calibration.conditions)
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"guidance.calibration={config.calibration!r}: {error}; give a file of calibrate") from error
    for name, expected in conditions(config, value_model).items():
        if recorded.get(name) != expected:
            raise ValueError(
                f"guidance.calibration={config.calibration!r}: it was made with {name}={recorded.get(name)!r}, here "
                f"it is {expected!r}: calibrate again, or use what it was made with"
            )
    return threshold
