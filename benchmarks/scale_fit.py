"""Measures how well the cost model predicts published steps of models that its constants were not fitted to.

``python -m benchmarks.scale_fit`` fits the constants :data:`FITTED` of conf/scale/h100.yaml to the steps that the file
lists as ``published``. One fit uses all steps. Each other fit leaves one model out, and its ratios for this model are
predictions. ``benchmarks/results/scale_fit.json`` has each fit's constants, and for each step the ratio of our seconds
to the published ones. The program takes some minutes on one core.
"""

from dataclasses import replace
from typing import Any

import numpy as np
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from benchmarks import figures
from benchmarks.scale_simulation import DEFAULT_RECIPE, OWN_OVERRIDES, compare_with_published
from recipes.preflight.cost import CONF, machine_of
from recipes.preflight.scale_model import Machine

RESULT = figures.RESULTS / "scale_fit.json"
# Options of the search: the difference of logarithms for a derivative, the damping at first and at most, and the least
# relative decrease of the sum with which the search continues.
DIFFERENCE, FIRST_DAMPING, MOST_DAMPING, LEAST_GAIN = 0.02, 0.01, 10.0, 0.02
FITTED = ("hbm_share", "mfu", "decode_ms", "all_reduce_us", "switch_s")


def model_of(name: str) -> str:
    """The model of a published step, with which the step's name begins."""
    return name.partition(",")[0]


def ratios(values: np.ndarray, machine: Machine, scale: DictConfig, left_out: str | None = None) -> dict[str, float]:
    """Published step → our seconds / the published ones, with these ``values`` of the constants.

    The steps of the model ``left_out`` are not included.
    """
    fitted: dict[str, Any] = dict(zip(FITTED, map(float, values), strict=True))
    with_values = replace(machine, **fitted)
    cases = [case for case in scale.published if model_of(case.name) != left_out]
    compared = [compare_with_published(case, with_values, scale) for case in cases]
    return {each["name"]: each["ratio"] for each in compared}


def fit(machine: Machine, scale: DictConfig, left_out: str | None) -> np.ndarray:
    """The constants with the smallest sum of squared log ratios over the published steps, except those of ``left_out``.

    The search starts from the constants of conf/scale and varies their logarithms, so that all stay above 0. It makes
    Levenberg-Marquardt steps: a step that does not lower the sum is tried again with more damping.
    """

    def residuals(logarithms: np.ndarray) -> np.ndarray:
        return np.log(list(ratios(np.exp(logarithms), machine, scale, left_out).values()))

    present = np.log([getattr(machine, name) for name in FITTED])
    of_present = residuals(present)
    jacobian = None
    damping = FIRST_DAMPING
    while damping <= MOST_DAMPING:
        if jacobian is None:
            moved = [residuals(present + DIFFERENCE * direction) for direction in np.eye(len(FITTED))]
            jacobian = (np.array(moved) - of_present).T / DIFFERENCE
        damped = jacobian.T @ jacobian + damping * np.eye(len(FITTED))
        candidate = present - np.linalg.solve(damped, jacobian.T @ of_present)
        of_candidate = residuals(candidate)
        before, after = of_present @ of_present, of_candidate @ of_candidate
        if after >= before:
            damping *= 10
            continue
        present, of_present, jacobian = candidate, of_candidate, None
        damping /= 10
        if after > (1 - LEAST_GAIN) * before:
            break
    return np.exp(present)


def measure(scale: DictConfig, machine: Machine) -> dict[str, Any]:
    """Left-out model, or "none" → the fit's constants and all ratios. "conf" has those of the file's own constants."""
    models = dict.fromkeys(model_of(case.name) for case in scale.published)
    stated = np.array([getattr(machine, name) for name in FITTED])
    fits = {"conf": stated, "none": fit(machine, scale, None)}
    fits |= {name: fit(machine, scale, name) for name in models}
    return {
        name: {
            "constants": dict(zip(FITTED, map(float, values), strict=True)),
            "ratios": ratios(values, machine, scale),
        }
        for name, values in fits.items()
    }


def show(fits: dict[str, Any]) -> None:
    """Print the ratios of the file's constants and of the predictions."""
    table = Table(
        "published", "conf/scale", "fitted to all", "fitted to the other models", title="our seconds / published"
    )
    for name in fits["conf"]["ratios"]:
        of_others = fits[model_of(name)]
        columns = [f"{each['ratios'][name]:.2f}" for each in (fits["conf"], fits["none"], of_others)]
        table.add_row(name, *columns)
    constants = Table("left out", *FITTED)
    for name, each in fits.items():
        constants.add_row(name, *(f"{value:.3g}" for value in each["constants"].values()))
    Console().print(table, constants)


def main() -> None:
    made_by = figures.source("benchmarks.scale_fit")
    with initialize_config_dir(str(CONF), version_base="1.3"):
        raw = compose("config", [*OWN_OVERRIDES, DEFAULT_RECIPE])
    fits = measure(raw.scale, machine_of(raw.scale, raw.simulate))
    figures.write(RESULT, "python -m benchmarks.scale_fit", made_by, {"fits": fits})
    show(fits)


if __name__ == "__main__":
    main()
