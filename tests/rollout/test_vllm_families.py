"""Each family in real vLLM on the CPU, loaded from our export: greedy samples, and where vLLM puts each weight.

Two processes export from Megatron-Core at TP 2. ``python -m tests.rollout.test_vllm_families``, started by the first of
them in the engine server's place, builds one engine after another from the exports, and then is the engine server.
"""

import gc
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_ext.batch import TokenBatch
from megatron_ext.blocks import Block, Shard
from megatron_ext.processes import die_with
from rollout import engine_server
from rollout.engine import EngineSettings
from rollout.sampling import Sampling
from tests.megatron_ext import ranks
from tests.responses import plain
from tests.rollout import family_twins, sleeping_engine, vllm_processes

NAMES = ("qwen2", "qwen3", "qwen2_5_vl", "internvl_6b", "internvl_6b_chat", "internvl_300m", "internvl_300m_chat")
every_family = pytest.mark.parametrize("name", NAMES)


def main() -> None:
    """All families' results to ``families.json``; then serve as the engine server does."""
    die_with(int(sys.argv[3]))
    folder = Path(json.loads(sys.argv[1])["model"]).parent
    results = {}
    of_the_model = sleeping_engine.make_cpu_workers_sleep()
    for name, (requests, sampling) in family_twins.load_work(folder).items():
        import_model(folder / f"{name}-export")
        results[name] = examine(
            family_twins.engine_settings(folder / f"{name}-export"), requests, sampling, of_the_model
        )
    (folder / "families.partial").write_text(json.dumps(results))
    (folder / "families.partial").rename(folder / "families.json")
    engine_server.main()


def import_model(folder: Path) -> None:
    """vLLM would start a process of a quarter of a minute to look at each new class, were it not imported here."""
    from vllm import ModelRegistry

    (architecture,) = json.loads((folder / "config.json").read_text())["architectures"]
    ModelRegistry.register_model(architecture, ModelRegistry.models[architecture].load_model_cls())


def examine(
    settings: EngineSettings, requests: TokenBatch, sampling: Sampling, of_the_model: dict[int, torch.Tensor]
) -> dict[str, Any]:
    """Responses and digests of an engine that loaded its weights from disk, the same after it slept and lost them
    (``woken``), and what became of its layout."""
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    settings = replace(settings, loads_weights=True)
    loop = engine_server.EngineLoop(settings, engine_server.build_llm_engine(settings))
    responses = plain(vllm_processes.generate(loop, requests, sampling))
    answer = {**loop.weights.digest(), "responses": [asdict(response) for response in responses]}
    checkpoint = load_file(Path(settings.model) / "model.safetensors")
    sleeping_engine.let_sleep(loop, of_the_model)
    shards = []
    for tensor_name, tensor in checkpoint.items():
        start = (0,) * tensor.ndim
        shards.append(Shard(tensor_name, tensor, (Block(tensor_name, start, start, tuple(tensor.shape)),)))
    weight_sync = sleeping_engine.weight_sync_within(loop, shards, Path(settings.model) / "plans")
    sleeping_engine.fall_asleep_and_wake(loop, lambda: weight_sync.sync(0))
    woken = plain(vllm_processes.generate(loop, requests, sampling))
    answer["woken"] = {**loop.weights.digest(), "responses": [asdict(response) for response in woken]}
    (model,) = loop.llm.apply_model(lambda model: model)
    answer |= examine_layout(model, checkpoint)
    loop.llm.engine_core.shutdown()
    del loop, model
    gc.collect()
    cleanup_dist_env_and_memory()
    return answer


@torch.no_grad()
def examine_layout(model: torch.nn.Module, checkpoint: dict[str, torch.Tensor]) -> dict[str, Any]:
    """``covered``: names in the traced layout. ``wrong``: those that plain slices of the checkpoint do not give, bit
    for bit. ``changed``: all tensors, buffers of every kind too, that other weights in the checkpoint change.
    """
    from rollout.weight_sync.vllm_layout import trace_layout, weight_tensors

    tensors = weight_tensors(model)
    layouts = trace_layout(model, {name: tuple(tensor.shape) for name, tensor in checkpoint.items()})
    wrong = []
    for layout in layouts:
        built = torch.full(layout.shape, float("nan"), dtype=getattr(torch, layout.dtype))
        for padding in layout.padding:
            built[_slices(padding.start, padding.shape)] = 0
        for region in layout.regions:
            source = checkpoint[region.hf_name][_slices(region.hf_start, region.shape)]
            built[_slices(region.start, region.shape)] = source
        if not torch.equal(built, tensors[layout.name]):
            wrong.append(layout.name)
    everything = dict(model.named_parameters()) | dict(model.named_buffers())
    before = {name: tensor.clone() for name, tensor in everything.items()}
    model.load_weights((name, tensor + 1) for name, tensor in checkpoint.items())  # type: ignore[operator]
    changed = [name for name, tensor in everything.items() if not torch.equal(tensor, before[name])]
    return {"covered": [layout.name for layout in layouts], "wrong": wrong, "changed": changed}


def _slices(start: tuple[int, ...], shape: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(a, a + n) for a, n in zip(start, shape, strict=True))


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> dict[str, family_twins.Twin]:
    return family_twins.make(tmp_path_factory.mktemp("families"))


def chosen_families(session: pytest.Session) -> set[str]:
    """The families that tests of this session are about, and the one that is synced."""
    here = [item for item in session.items if item.path == Path(__file__) and hasattr(item, "callspec")]
    return {item.callspec.params["name"] for item in here} | {family_twins.SYNCED}


@pytest.fixture(scope="module")
def processes(twins: dict[str, family_twins.Twin], request: pytest.FixtureRequest) -> Iterator[Any]:
    """The launcher of the exporting ranks, one of which starts the engines."""
    folder = next(iter(twins.values())).folder.parent
    names = chosen_families(request.session)
    family_twins.save_work(folder, {name: twin for name, twin in twins.items() if name in names})
    launcher = ranks.start(
        folder / "ranks.log", "tests.rollout.family_twins", str(folder), "tests.rollout.test_vllm_families"
    )
    yield launcher
    launcher.kill()
    launcher.wait()


def result(folder: Path, name: str, processes: "subprocess.Popen[bytes]") -> Any:
    """The file ``name`` as soon as it is there; fails with what the ranks said when they end before."""
    while not (folder / name).exists():
        ended = processes.poll() is not None
        assert not ended or (folder / name).exists(), (folder / "ranks.log").read_text()[-6000:]
        time.sleep(0.1)
    return json.loads((folder / name).read_text())


@pytest.fixture(scope="module")
def families(twins: dict[str, family_twins.Twin], processes: Any) -> dict[str, Any]:
    return result(next(iter(twins.values())).folder.parent, "families.json", processes)


@every_family
def test_greedy_samples_of_the_export_are_transformers(
    name: str, twins: dict[str, family_twins.Twin], families: dict[str, Any]
) -> None:
    """In FP32, of the model that the export goes back to."""
    responses = {response["prompt_id"]: response for response in families[name]["responses"]}
    assert len(responses) == len(twins[name].prompts)
    for processed in twins[name].prompts:
        tokens, logprobs = family_twins.greedy(twins[name], processed)
        response = responses[processed.prompt.prompt_id]
        assert response["tokens"] == tokens
        assert (torch.tensor(response["logprobs"]) - torch.tensor(logprobs)).abs().max() < 2e-5


@every_family
def test_after_sleep_a_sync_brings_every_bit_that_generation_uses(name: str, families: dict[str, Any]) -> None:
    """Sleep leaves NaN in every tensor of vLLM's model and in its cache."""
    woken = families[name]["woken"]
    assert woken["workers"] == families[name]["workers"]
    assert woken["responses"] == families[name]["responses"]


@every_family
def test_the_layout_says_where_vllm_puts_every_weight(name: str, families: dict[str, Any]) -> None:
    family = families[name]
    assert family["wrong"] == []
    assert sorted(family["covered"]) == sorted(family["changed"]) and len(family["covered"]) > 10


def test_a_vision_language_model_is_synced(
    twins: dict[str, family_twins.Twin], families: dict[str, Any], processes: Any
) -> None:
    """From two ranks: bits and samples equal those of the vLLM that loaded the export, tower included."""
    first, other, again = result(twins[family_twins.SYNCED].folder.parent, "synced.json", processes)
    loaded = families[family_twins.SYNCED]
    assert first["workers"] == again["workers"] == loaded["workers"]
    (before,), (changed,) = first["workers"], other["workers"]
    assert [name for name in before if changed[name] == before[name]] == []

    def said(state: dict[str, Any]) -> list[Any]:
        return [(r["prompt_id"], r["tokens"], r["logprobs"]) for r in state["responses"]]

    assert said(first) == said(again) == said(loaded) != said(other)


if __name__ == "__mp_main__":
    engine_server.die_with_engine()
if __name__ == "__main__":
    main()
