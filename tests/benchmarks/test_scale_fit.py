"""The fit of the cost model's constants, against steps whose constants are known."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from benchmarks import scale_fit
from recipes.preflight.cost import CONF, machine_of
from recipes.preflight.scale_model import Machine


@pytest.fixture(scope="module")
def case() -> tuple[DictConfig, Machine]:
    """The steps of Llama-3.1-8B alone, which are quick, of one draw of lengths."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        raw: Any = compose("config", ["+scale=h100", "+simulate=h100", "recipe=safework_72b", "scale.draws=1"])
    raw.scale.published = [each for each in raw.scale.published if "8B" in each.name]
    return raw.scale, machine_of(raw.scale, raw.simulate)


def test_the_fit_finds_constants_that_make_the_steps(case: tuple[DictConfig, Machine]) -> None:
    scale, machine = case
    known = replace(machine, mfu=0.3, decode_ms=3.0, switch_s=6.0)
    ratios = scale_fit.ratios(np.array([getattr(known, name) for name in scale_fit.FITTED]), machine, scale)
    for each in scale.published:
        each.seconds *= ratios[each.name]
    before = scale_fit.ratios(np.array([getattr(machine, name) for name in scale_fit.FITTED]), machine, scale)
    assert max(abs(ratio - 1) for ratio in before.values()) > 0.05
    fitted = scale_fit.ratios(scale_fit.fit(machine, scale, left_out=None), machine, scale)
    assert list(fitted.values()) == pytest.approx([1.0] * len(fitted), abs=0.01)


def test_a_model_that_is_left_out_has_no_say(case: tuple[DictConfig, Machine]) -> None:
    scale, machine = case
    stated = [getattr(machine, name) for name in scale_fit.FITTED]
    assert scale_fit.fit(machine, scale, left_out="Llama-3.1-8B") == pytest.approx(stated)
