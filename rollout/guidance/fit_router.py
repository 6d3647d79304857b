"""Fits the router: ``python -m rollout.guidance.fit_router fit_router.rows=… fit_router.output=…``.

The value server scores the prompt of each row alone. From these values, the regression of ``rollout.guidance.router``
learns the label of the row, which is the principle that matters for it. The accuracy is measured on held-out rows.
"""

import asyncio
import sys
from collections.abc import Sequence
from typing import Any

import hydra
import numpy as np
from omegaconf import DictConfig
from rich.console import Console

from megatron_ext import settings
from rollout.guidance import router
from rollout.guidance.calibrate import read_rows
from rollout.guidance.clients import GeneratorFailed, ValuesUnavailable
from rollout.guidance.opening import messages_of, only_scoring, open_guide
from rollout.guidance.router import LogisticRouter
from rollout.guidance.settings import FitRouterConfig, GuidanceConfig, new_file
from rollout.guidance.settings import check as check_guidance

# The number of prompts that are scored in one request.
BATCH = 32


def labels_of(rows: Sequence[Any], principles: Sequence[str], path: str) -> np.ndarray:
    """Return the index of each row's principle.

    Raises ValueError for a label that is no principle, and for a principle that no row has as its label.
    """
    labels = []
    for number, row in enumerate(rows, start=1):
        if row.get("label") not in principles:
            raise ValueError(f"{path}: row {number}: label={row.get('label')!r}: use one of {list(principles)}")
        labels.append(list(principles).index(row["label"]))
    missing = [name for place, name in enumerate(principles) if place not in labels]
    if missing:
        raise ValueError(f"{path}: no row has the label {missing[0]!r}")
    return np.array(labels)


def fit_held_out(
    values: np.ndarray, labels: np.ndarray, principles: list[str], options: FitRouterConfig
) -> LogisticRouter:
    """Fit a router on some of the rows, and measure its accuracy on the others. ``values`` is [rows, principles]."""
    order = np.random.default_rng(options.seed).permutation(len(labels))
    held_out = int(len(labels) * options.held_out)
    if held_out < 1 or len(labels) - held_out < len(principles):
        raise ValueError(f"fit_router.rows: {len(labels)} rows are too few for held_out={options.held_out}")
    test, train = order[:held_out], order[held_out:]
    coefficients, intercepts = router.fit(values[train], labels[train], len(principles), options.penalty)
    guesses = (values[test] @ coefficients.T + intercepts).argmax(-1)
    accuracy = float((guesses == labels[test]).mean())
    return LogisticRouter(principles, coefficients.tolist(), intercepts.tolist(), len(train), held_out, accuracy)


async def query_values(config: GuidanceConfig, rows: Sequence[Any]) -> np.ndarray:
    """Return the values of each row's prompt alone, [rows, principles]."""
    values: list[tuple[float, ...]] = []
    async with open_guide(config) as opened:
        for start in range(0, len(rows), BATCH):
            prompts = []
            for row in rows[start : start + BATCH]:
                prompts.append(await opened.generator.encode_chat(opened.model, messages_of(row, "row"), {}))
            values += await opened.values.score(prompts)
    return np.array(values)


@hydra.main(version_base="1.3", config_path="../../conf", config_name="guidance")
def main(raw: DictConfig) -> None:
    try:
        options = settings.read(FitRouterConfig, "fit_router", raw.fit_router)
        settings.check(options, "fit_router")
        config = settings.read(GuidanceConfig, "guidance", raw.guidance)
        settings.check(config, "guidance")
        config = only_scoring(config)
        check_guidance(config)
        output = new_file("fit_router.output", options.output)
        rows = read_rows(options.rows)
        principles = list(config.values.principles)
        labels = labels_of(rows, principles, options.rows)
        fitted = fit_held_out(asyncio.run(query_values(config, rows)), labels, principles, options)
        output.parent.mkdir(parents=True, exist_ok=True)
        router.write(fitted, output)
    except (ValueError, OSError, GeneratorFailed, ValuesUnavailable) as error:
        sys.exit(f"error: {error}")
    Console().print(
        f"{fitted.rows} rows; accuracy {fitted.accuracy:.3f} on {fitted.held_out} held-out rows; written to {output}"
    )


if __name__ == "__main__":
    sys.argv[1:] = settings.with_new_keys(sys.argv[1:], settings.mappings(GuidanceConfig, "guidance"))
    main()
