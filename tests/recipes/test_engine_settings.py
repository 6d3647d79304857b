"""Which engines a node gets, and which GPUs each of them."""

from dataclasses import replace
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from recipes.config import Config, parse
from recipes.errors import ConfigError
from recipes.training.engines import engine_settings
from rollout.engine import EngineSettings, environment

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def configured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    (tmp_path / "config.json").write_text("{}")

    def of(*overrides: str) -> Config:
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            return parse(compose("config", ["recipe=safework_72b", f"model.path={tmp_path}", *overrides]))

    return of


def test_each_node_has_as_many_and_an_engines_own_gpus_come_first(configured, monkeypatch) -> None:
    """Two engines of four GPUs a node; each sees all eight, to read the trainer's weights there."""
    engines = engine_settings(configured("rollout.engines=16", "rollout.tensor=4"), nodes=8)
    assert [engine.devices for engine in engines] == [(0, 1, 2, 3, 4, 5, 6, 7), (4, 5, 6, 7, 0, 1, 2, 3)]
    assert environment(engines[1])["CUDA_VISIBLE_DEVICES"] == "4,5,6,7,0,1,2,3"
    assert environment(engines[1])["VLLM_ALLREDUCE_USE_SYMM_MEM"] == "0"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "a,b,c,d,e,f,g,h")
    assert environment(engines[1])["CUDA_VISIBLE_DEVICES"] == "e,f,g,h,a,b,c,d"
    assert len(engine_settings(configured(), nodes=8)) == 1


def test_engines_that_nodes_cannot_share_or_hold_are_refused(configured) -> None:
    with pytest.raises(ConfigError, match=r"rollout.engines=8: the job has 3 nodes; use a multiple"):
        engine_settings(configured(), nodes=3)
    with pytest.raises(
        ConfigError, match=r"rollout.engines=16, rollout.tensor=8: 2 engines of so many GPUs do not fit"
    ):
        engine_settings(configured("rollout.engines=16"), nodes=8)


def test_settings_reach_the_engines_process_unchanged(configured) -> None:
    settings = replace(engine_settings(configured("rollout=search"), nodes=8)[0], thinking=((5,), (6, 7)))
    assert EngineSettings.from_json(settings.to_json()) == settings
    assert settings.tokenizer
