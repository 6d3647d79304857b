"""The preflight of the four published models, of runs that can't be, and of a small model that is all there."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from megatron_ext.models import family
from recipes.config import Config, parse
from recipes.data.processor import PromptProcessor
from recipes.errors import ConfigError
from recipes.preflight import alternatives, checks, cost, fit, stages, submission
from recipes.preflight.architecture import model_config, published_file
from recipes.preflight.layout_seconds import Training, layout_seconds
from recipes.preflight.report import FAILS, HOLDS, NOT_CHECKED, Check, NotChecked, Report, Settings
from recipes.preflight.scale_model import batch_size, draw_batch
from recipes.run import folder as run_folder
from recipes.run import records
from rewards import registry
from tests import warm
from tests.recipes import tiny
from tests.rewards import fake_server
from tests.rewards.fake_server import FakeServer

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
# Parameters and tensors of the published checkpoints.
PUBLISHED = {
    "72b": ("Qwen2.5-VL-72B-Instruct", 73_410_777_344, 1353),
    "7b": ("Qwen2.5-VL-7B-Instruct", 8_292_166_656, 729),
    "78b": ("InternVL3-78B-hf", 78_408_318_336, 1648),
    "70b": ("DeepSeek-R1-Distill-Llama-70B", 70_553_706_496, 723),
}
RECIPES = {**PUBLISHED, "72b_long": PUBLISHED["72b"]}
SMALLER = ("parallel.context=1", "parallel.pipeline=1", "parallel.recompute=full", "cluster.ranks=16")
# One rank to build in place of 32, and no lack of memory, where neither is what is wrong.
NO_TENSOR = ("parallel.tensor=1", "parallel.sequence=false", "parallel.context=1")
WHOLE = (*NO_TENSOR, "parallel.pipeline=1", "preflight.device_memory_gib=9999", "preflight.host_memory_gib=99999")
# What is wrong → overrides of safework_70b, the check that must fail, what it must say.
IMPOSSIBLE = {
    "heads": (("parallel.tensor=16", *SMALLER), "attention_heads", ["does not divide 8 KV heads", "parallel.tensor=8"]),
    "layers": (("parallel.pipeline=3", "cluster.ranks=48"), "layout", ["parallel.pipeline=3", "80 layers"]),
    "world": (("cluster.ranks=60",), "configuration", ["cluster.ranks=60", "multiple of 64"]),
    "memory": (("parallel.context=1", "parallel.pipeline=1"), "memory", ["79.1 GiB", "training", "stage 0"]),
    "engine": (("rollout.kv_cache_gib=60",), "memory", ["79.1 GiB", "generating"]),
    "cache": (("rollout.kv_cache_gib=0.5", *WHOLE), "rollout", ["rollout.kv_cache_gib=0.5", "one sequence has 16384"]),
    "engine heads": (("rollout.tensor=3", *WHOLE), "rollout", ["rollout.tensor=3", "64 attention heads"]),
    "devices": (("rollout.engines=16", *WHOLE), "rollout", ["rollout.engines=16", "do not fit on a node's 8"]),
    "engines": (("rollout.engines=9", *WHOLE), "rollout", ["rollout.engines=9", "8 nodes; use a multiple"]),
    "context": (
        ("data.max_prompt_tokens=130000", "parallel.micro_batch_tokens=140000", *WHOLE), "context_length",
        ["131072 positions"],
    ),
    "fp8 device": (("precision=fp8", "preflight=a100", *WHOLE), "precision", ["has no FP8", "precision=bf16"]),
    "fp8 cache": (
        ("rollout.kv_cache_dtype=fp8", "algorithm.importance_sampling=token_truncated", "preflight=a100", *WHOLE),
        "precision", ["rollout.kv_cache_dtype='fp8'", "has no FP8", "rollout.kv_cache_dtype=auto"],
    ),
    "fp8 sizes": (
        ("precision=fp8", "parallel.tensor=32", "parallel.context=1", "parallel.pipeline=2"), "attention_heads",
        ["parallel.tensor=8"],
    ),
    "judge's node": (("rewards.servers.knowledge.replicas=2", *WHOLE), "nodes", ["is more than a node's 8 GPUs"]),
    "data": (("data.prompts=none.jsonl",), "configuration", ["data.prompts='none.jsonl'", "no such file"]),
    "rewards": (("~rewards.mix.general_rule", *WHOLE), "data_and_rewards", ["rewards.mix", "general_rule"]),
    "model": (("model.path=models/nobody",), "architecture", ["model.path='models/nobody'", "no config.json"]),
    "starved pipeline": (
        ("algorithm.prompts_per_step=2", "algorithm.samples_per_prompt=2", "parallel.pipeline=8", "cluster.ranks=8",
         *NO_TENSOR),
        "batch", ["parallel.pipeline=8"],
    ),
    "frozen embedding": (
        ("model.frozen=[embedding]", "parallel.recompute=full"), "ranks", ["model.frozen=['embedding']", "selective"],
    ),
    "frozen stage": (
        (f"model.frozen=[embedding,{','.join(f'decoder.layers.{n}' for n in range(20))}]",), "ranks",
        ["model.frozen=['embedding', 'decoder.layers.0'", "nothing to train on pipeline stage 0"],
    ),
    "frozen nothing": (
        ("model.frozen=[decoder.layer.3]",), "ranks", ["model.frozen: 'decoder.layer.3' begins no parameter's name"],
    ),
    "frozen layer that is not there": (
        ("model.frozen=[decoder.layers.80]",), "ranks",
        ["model.frozen: 'decoder.layers.80': the decoder's layers are 0 to 79"],
    ),
}  # fmt: skip
SHARES = {"safety": 0.25, "value": 0.28, "knowledge": 0.28}  # of a GPU's memory
COLOCATED = [
    "recipe=safework_7b",
    "rewards.placement=colocated",
    "rewards.servers.value.tensor=8",
    *(f"+rewards.servers.{name}.arguments=[--gpu-memory-utilization,'{share}']" for name, share in SHARES.items()),
]
# A layout that can't be ends before models are built.
NARROW = ["rewards.servers.knowledge.tensor=4", "rewards.servers.value.tensor=1"]
NARROW += ["parallel.pipeline=3", "cluster.ranks=48"]
ALL = """
import json, sys
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from recipes.preflight import checks, stages
from recipes.command_line import with_group
from recipes.preflight.report import Settings
from dataclasses import asdict

folder, wanted, output, unsearched = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3], json.loads(sys.argv[4])
reports = {}
ASIDE = ["preflight.files=elsewhere", "preflight.costs=null"]
propose, propose_layouts = checks.alternatives.propose, checks.alternatives.propose_layouts

def examine(overrides):
    raw = compose("config", with_group(overrides, "preflight", "h100"))
    settings = Settings(**OmegaConf.to_container(raw.preflight))
    run = OmegaConf.masked_copy(raw, [key for key in raw if key != "preflight"])
    of_the_run = [override for override in overrides if not stages.OWN.match(override)]
    return asdict(checks.examine(run, settings, lambda text: None, stages.base_model(run, of_the_run)))

with initialize_config_dir(folder, version_base="1.3"):
    for name, overrides in wanted.items():
        searched = name not in unsearched
        checks.alternatives.propose = propose if searched else lambda *arguments: None
        checks.alternatives.propose_layouts = propose_layouts if searched else lambda *arguments: None
        reports[name] = report = examine([*ASIDE, *overrides])
        # What a report proposes is checked anew, as a user would, without what asked for the proposal.
        for proposals in report["proposals"].values():
            for proposal in proposals:
                fields = {override.partition("=")[0] for override in proposal["overrides"]} | {"preflight.nodes"}
                kept = [override for override in overrides if override.partition("=")[0] not in fields]
                again = examine([*ASIDE, *kept, *proposal["overrides"]])
                reports[" ".join([name, *proposal["overrides"]])] = again
json.dump(reports, open(output, "w"))
"""
Reports = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> Reports:
    """Every report, from one process: what takes time is the imports."""
    wanted = {size: [f"recipe=safework_{size}"] for size in RECIPES}
    wanted["128"] = ["recipe=safework_7b", "cluster.nodes=16"]
    wanted["72b_async"] = ["recipe=safework_72b_async"]
    wanted["without graphs"] = ["recipe=safework_7b", "rollout.cuda_graphs=false"]
    wanted["fp8 keys and values"] = [
        "recipe=safework_7b", "rollout.kv_cache_dtype=fp8", "algorithm.importance_sampling=token_truncated",
    ]  # fmt: skip
    wanted["fp8"] = ["recipe=safework_7b", "precision=fp8"]
    wanted["critic"] = ["recipe=safework_7b", "algorithm=ppo"]
    wanted["sleeping critic"] = [*wanted["critic"], "critic.offload=true"]
    wanted["engine awake"] = ["recipe=safework_7b", "rollout.sleep=false"]
    wanted["colocated"] = [*COLOCATED, "optimizer.offload=true"]
    wanted["judge's weights"] = [*COLOCATED, *NARROW]
    wanted["crowded"] = [*COLOCATED, "rewards.servers.value.arguments=[]", "preflight.host_memory_gib=300"]
    wanted["two phases"] = ["recipe=safework_7b", "algorithm=ppo", "rollout.sleep=false"]
    wanted["no room"] = ["recipe=safework_7b", "preflight.device_memory_gib=6"]
    wanted["three nodes"] = ["recipe=safework_7b", "parallel.tensor=4", "parallel.pipeline=4", "cluster.nodes=3"]
    wanted["four nodes in all"] = ["recipe=safework_7b", "preflight.nodes=4"]
    wanted["qwen3"] = ["recipe=safework_7b", "model=qwen3_8b"]
    wanted["smollm2"] = ["recipe=demo", "model.path=nowhere/SmolLM2-135M-Instruct"]
    wanted["later stage"] = ["recipe=safework_7b", "stage=rl_search"]
    wanted |= {name: ["recipe=safework_70b", *overrides] for name, (overrides, _, _) in IMPOSSIBLE.items()}
    # A search over layouts of 70B takes minutes.
    unsearched = ["judge's weights", *(name for name in IMPOSSIBLE if name != "engine")]
    file = tmp_path_factory.mktemp("preflight") / "reports.json"
    with warm.processes():
        done = subprocess.run(
            [sys.executable, "-c", ALL, str(ROOT / "conf"), json.dumps(wanted), str(file), json.dumps(unsearched)],
            cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=1200,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(file.read_text())


def failed(report: dict[str, Any]) -> dict[str, str]:
    return {check["name"]: check["detail"] for check in report["checks"] if check["state"] == FAILS}


def not_checked(report: dict[str, Any]) -> dict[str, str]:
    return {check["name"]: check["detail"] for check in report["checks"] if check["state"] == NOT_CHECKED}


def proposed(report: dict[str, Any]) -> dict[str, list[str]]:
    """Title → the overrides of each proposal."""
    return {
        title: [" ".join(proposal["overrides"]) for proposal in proposals]
        for title, proposals in report["proposals"].items()
    }


@pytest.mark.parametrize("size", RECIPES)
def test_published_models_are_built_whole(size: str, reports: Reports) -> None:
    report, (model, parameters, tensors) = reports[size], RECIPES[size]
    assert failed(report) == {}
    assert report["model"] == model
    assert report["parameters_total"] == parameters
    assert report["hf_tensors"] == {
        "expected": tensors, "covered": tensors, "missing": [], "unexpected": [], "duplicated": [],
    }  # fmt: skip


@pytest.mark.parametrize("size", RECIPES)
def test_every_rank_of_a_replica_is_there_and_fits(size: str, reports: Reports) -> None:
    report = reports[size]
    layout = report["layout"]
    places = [(stage, tensor) for stage in range(layout["pipeline"]) for tensor in range(layout["tensor"])]
    assert [(rank["pp"], rank["tp"]) for rank in report["parameters_per_rank"]] == places
    assert [(rank["pp"], rank["tp"]) for rank in report["memory_gib"]] == places
    # Norms, and with them the vision towers' replicated parts, are on every tensor-parallel rank.
    held = sum(rank["count"] for rank in report["parameters_per_rank"])
    assert report["parameters_total"] < held < 1.01 * report["parameters_total"]
    # Much is an estimate until it has run on a GPU.
    assert all(rank["total"] <= report["device_memory_gib"] - 6 for rank in report["memory_gib"])


def test_what_processes_keep_of_a_gpu_is_counted_by_process_group_and_slot(reports: Reports) -> None:
    """Trainer and engine have a context and workspaces each. The ranks' groups are those of tensor, pipeline, context,
    gradients and all ranks, and the weight sync's; two slots of a sync are 1 GiB. The engine has its tensor group, and
    CUDA graphs of 35 sizes."""
    context, workspace, communicator, fragmentation, slots, graph = 0.55, 0.5, 0.3, 1.0, 1.0, 0.035
    one_process = context + workspace
    engine = one_process + 35 * graph
    of_70b = one_process + engine + 7 * communicator + fragmentation + slots
    # Without pipeline, and with engines of one GPU.
    of_7b = one_process + engine + 5 * communicator + fragmentation + slots
    for size, expected in (("70b", of_70b), ("7b", of_7b), ("without graphs", of_7b - 35 * graph)):
        assert reports[size]["memory_gib"][0]["reserve"] == pytest.approx(expected, abs=0.01)
    apart = reports["72b_async"]
    # The tensor group is the engine's too.
    assert apart["memory_gib"][0]["reserve"] == pytest.approx(of_70b - engine - communicator, abs=0.01)


def test_parameters_of_a_llama_stage_are_those_counted_by_hand(reports: Reports) -> None:
    """20 layers of the 70B model over 8 ranks, and on the last stage the norm and the output layer."""
    layer = 8192 * (8192 + 2 * 1024) // 8 + 8192 * 8192 // 8 + 3 * 8192 * 28672 // 8 + 2 * 8192
    counts = {(rank["pp"], rank["tp"]): rank["count"] for rank in reports["70b"]["parameters_per_rank"]}
    assert counts[1, 3] == 20 * layer
    assert counts[3, 7] == 20 * layer + 8192 + 128256 * 8192 // 8


def test_memory_of_a_llama_stage_is_that_counted_by_hand(reports: Reports) -> None:
    """BF16 weights, FP32 gradients, and 12 bytes for each weight shared by the two context-parallel ranks."""
    (rank,) = (r for r in reports["70b"]["memory_gib"] if (r["pp"], r["tp"]) == (1, 0))
    gib = 2139422720 / 2**30  # padding is far below the rounding
    assert rank["weights"] == pytest.approx(2 * gib, abs=0.001)
    assert rank["gradients"] == pytest.approx(4 * gib, abs=0.001)
    assert rank["optimizer"] == pytest.approx(6 * gib, abs=0.001)
    # Fused gradients: autograd gets a tensor of each shape of the layer's matrices in their place.
    layer = 8192 * (8192 + 2 * 1024) // 8 + 8192 * 8192 // 8 + 3 * 8192 * 28672 // 8
    assert rank["buffers"] == pytest.approx(2 * layer / 2**30, abs=0.001)
    idle = rank["weights"] + rank["optimizer"] + rank["buffers"] + rank["reserve"]
    passes = rank["activations"] + rank["logits"] + rank["micro_batches"] + rank["workspace"]
    training = idle + rank["gradients"] + passes
    generating = idle + rank["kv_cache"] + rank["vllm"]
    assert rank["training"] == pytest.approx(training, abs=0.01)
    assert rank["generating"] == pytest.approx(generating, abs=0.01)
    assert rank["total"] == max(rank[phase] for phase in ("generating", "training", "syncing"))


def test_the_images_of_three_micro_batches_are_on_the_ranks_with_the_tower(reports: Reports) -> None:
    """One that is read and two that wait, full of images: of each of 16,384 tokens an eighth of what the frozen encoder
    makes of four patches, 1,280 numbers of two bytes each, and three indices. Of the one that is read there is the
    whole besides. Other stages have ids and columns alone."""
    token = 4 * 1280 * 2
    images = 16_384 * (3 * (token / 8 + 3 * 8) + token) / 2**30
    for rank in reports["72b"]["memory_gib"]:
        assert rank["micro_batches"] == pytest.approx(images if rank["pp"] == 0 else 0.0, abs=0.04)


def test_batch_is_alike_on_every_rank(reports: Reports) -> None:
    batch = reports["7b"]["batch"]
    assert (batch["sequences_per_update"], batch["data_parallel_ranks"]) == (1024, 16)
    assert batch["sequences_per_rank"] == batch["micro_batches_per_rank"] == 64  # of full length, each fills one


def test_twice_the_devices_halve_the_optimizer_states(reports: Reports) -> None:
    half, whole = reports["128"], reports["7b"]
    assert failed(half) == {}
    for a, b in zip(half["memory_gib"], whole["memory_gib"], strict=True):
        assert a["optimizer"] == pytest.approx(b["optimizer"] / 2, rel=0.001)
        assert a["weights"] == pytest.approx(b["weights"], rel=0.001)


def test_the_long_recipe_has_room_for_responses_of_32768_tokens(reports: Reports) -> None:
    """A quarter of a sequence of 40,960 tokens on each context-parallel rank, against half of one of 16,384: all of a
    layer's activations are as many times more. Four ranks share the optimiser's states in place of two."""
    long, short = reports["72b_long"], reports["72b"]
    details = {check["name"]: check["detail"] for check in long["checks"] if check["state"] == HOLDS}
    assert details["context_length"] == "40960 of the model's 128000 positions"
    assert "23 sequences of full length" in details["rollout"]
    assert [long["layout"][name] for name in ("tensor", "pipeline", "context", "data")] == [8, 4, 4, 1]
    for ours, theirs in zip(long["memory_gib"], short["memory_gib"], strict=True):
        assert ours["optimizer"] == pytest.approx(theirs["optimizer"] / 2, rel=0.001)
        # The vision tower runs whole on each rank of the first stage, however many divide a sequence.
        more = 10_240 / 8_192
        assert ours["activations"] == pytest.approx(more * theirs["activations"], rel=0.1 if ours["pp"] == 0 else 0.001)


def test_an_fp8_cache_of_the_same_size_holds_twice_the_tokens(reports: Reports) -> None:
    tokens = {}
    for name in ("7b", "fp8 keys and values"):
        (detail,) = (check["detail"] for check in reports[name]["checks"] if check["name"] == "rollout")
        tokens[name] = int(re.search(r"holds (\d+) tokens", detail)[1])  # type: ignore[index]
    assert tokens["fp8 keys and values"] == pytest.approx(2 * tokens["7b"], abs=1)


def test_engines_with_nodes_of_their_own_have_what_the_trainer_has_not(reports: Reports) -> None:
    """Beside an engine's worker is the process that receives weights: a context, a communicator and two slots."""
    report, colocated = reports["72b_async"], reports["72b"]
    assert failed(report) == {}
    for rank, beside_an_engine in zip(report["memory_gib"], colocated["memory_gib"], strict=True):
        assert rank["kv_cache"] == rank["vllm"] == 0
        for name in ("weights", "gradients", "optimizer", "activations"):
            assert rank[name] == beside_an_engine[name]
    assert report["engine_gib"]["vllm"] > 17  # an eighth of 73.4 billion parameters of 2 bytes
    engine, receiver = 0.55 + 0.5 + 35 * 0.035 + 0.3, 0.55 + 0.3 + 1.0
    assert report["engine_gib"]["reserve"] == pytest.approx(engine + receiver, abs=0.01)
    (nodes,) = (check["detail"] for check in report["checks"] if check["name"] == "nodes")
    assert nodes == "8 for the trainer, 8 for engines, 2 for the judges alone"
    # The pixels of two steps, one of them generated ahead: a rank has processed a 64th. The rest is of the one that is
    # trained on, an eighth on each of a replica's tensor-parallel ranks.
    pixels, encoded = 3 * 2 * 14 * 14 * 2, 1280 * 2
    images = 8 * 128 * 8192 * 4 * (2 * pixels / 64 + (pixels + encoded) / 8) / 2**30
    assert report["host_gib"]["training"]["images"] == pytest.approx(images, abs=0.01)


def test_fp8_keeps_less_of_a_layer_and_more_of_its_weights(reports: Reports) -> None:
    fp8, bf16 = reports["fp8"], reports["7b"]
    assert failed(fp8) == {}
    assert fp8["memory_gib"][0]["activations"] < bf16["memory_gib"][0]["activations"]
    assert fp8["memory_gib"][0]["weights"] > bf16["memory_gib"][0]["weights"]


def test_each_phase_has_what_is_awake_in_it_and_the_rest_sleeps_on_the_host(reports: Reports) -> None:
    """Judges and the optimiser's states in turn: three servers asleep leave 1 GiB each. On the host are eight ranks'
    states and the judges' weights: those of the 72B judge are known, of the others the most that they may take."""
    report, room = reports["colocated"], 79.1
    assert failed(report) == {}
    (rank,), (apart,) = report["memory_gib"][:1], reports["7b"]["memory_gib"][:1]
    assert rank["judges"] == pytest.approx(room * sum(SHARES.values()), abs=0.01)
    resident = rank["weights"] + rank["buffers"]
    assert rank["judging"] == pytest.approx(resident + rank["judges"] + rank["reserve"], abs=0.01)
    assert rank["generating"] == pytest.approx(apart["generating"] - apart["optimizer"] + 3.0, abs=0.01)
    assert rank["training"] == pytest.approx(apart["training"] + 3.0, abs=0.01)
    assert rank["syncing"] == pytest.approx(rank["generating"] - rank["kv_cache"], abs=0.01)
    assert rank["total"] == max(rank[phase] for phase in ("generating", "judging", "training", "syncing"))
    judges = room * SHARES["safety"] + 8 * room * SHARES["value"] + 2 * PUBLISHED["72b"][1] / 2**30
    fullest = {name: max(r[name] for r in report["memory_gib"]) for name in ("weights", "optimizer")}
    weights, optimizer = 8 * fullest["weights"], 8 * fullest["optimizer"]
    # Kept in all phases: the reference beside the policy's own weights, what a checkpoint is written from, and images.
    # Of these a rank has a 64th of the pixels that all process, and half of what its replica trains on with what the
    # frozen encoder makes of them: of each of 128 prompts' 8,192 tokens four patches.
    pixels, encoded = 3 * 2 * 14 * 14 * 2, 1280 * 2
    images = 8 * 128 * 8192 * 4 * (pixels / 64 + (pixels + encoded) / 2) / 2**30
    kept = {"reference": 2 * weights, "optimizer": optimizer, "checkpoint": weights + optimizer, "images": images}
    assert report["host_gib"]["judging"] == pytest.approx(kept, abs=0.01)
    for phase in ("generating", "training", "syncing"):
        assert report["host_gib"][phase] == pytest.approx(kept | {"judges": judges}, abs=0.01), phase
    assert "judging" not in reports["7b"]["phases"]
    assert list(reports["7b"]["host_gib"]["generating"]) == ["reference", "checkpoint", "images"]
    assert "images" not in reports["70b"]["host_gib"]["generating"], "a model of text"


def test_every_phase_that_does_not_fit_the_gpu_or_the_host_is_named(reports: Reports) -> None:
    wrong = failed(reports["crowded"])
    assert list(wrong) == ["memory", "host_memory"]
    assert "judging" in wrong["memory"] and "training" not in wrong["memory"]
    assert "300 GiB" in wrong["host_memory"] and "training" in wrong["host_memory"] and "judges" in wrong["host_memory"]
    for name in ("critic", "two phases", "engine awake", "engine", "memory", "crowded"):
        report, named = reports[name], failed(reports[name])["memory"]
        for phase in report["phases"]:
            too_large = any(rank[phase] > report["device_memory_gib"] for rank in report["memory_gib"])
            assert (f"{phase} " in named) == too_large, (name, phase)
    # Not the first alone.
    assert all(f"{phase} " in failed(reports["two phases"])["memory"] for phase in ("training", "generating"))
    detail = failed(reports["judge's weights"])["colocated_judges"]
    assert "rewards.servers.knowledge: 34.2 GiB of weights" in detail and "0.28 lets it have 22.1" in detail


def test_what_is_proposed_holds_and_nothing_else_is_proposed(reports: Reports) -> None:
    """Each proposal is a report of its own: the same preflight, with its overrides on the command line."""
    assert "critic.offload=true" in proposed(reports["critic"])["It fits with"]
    assert "rollout.sleep=true" in proposed(reports["engine awake"])["It fits with"]
    assert "rollout.sleep=true critic.offload=true" in proposed(reports["two phases"])["It fits with"]
    # Without the optimiser's states the cache of 60 GiB is still too large.
    (cache,) = proposed(reports["engine"])["It fits with"]
    assert cache.startswith("rollout.kv_cache_gib=")
    largest = max(rank["generating"] for rank in reports[f"engine {cache}"]["memory_gib"])
    assert 78.1 < largest <= 79.1, "one GiB more of cache would not fit"
    assert proposed(reports["7b"]) == {}
    checked = 0
    for name in [name for name in reports if reports[name]["proposals"]]:
        for overrides in (one for several in proposed(reports[name]).values() for one in several):
            assert failed(reports[f"{name} {overrides}"]) == {}, (name, overrides)
            checked += 1
    assert checked > 6


def test_where_nothing_fits_the_preflight_says_so(reports: Reports) -> None:
    titles = proposed(reports["no room"])
    assert len(titles) == 3 and all(overrides == [] for overrides in titles.values())
    settings, layouts, nodes = titles
    assert "does not fit with" in settings and "optimizer.offload=true" in settings
    assert layouts == "On 8 nodes of 8 GPUs no layout fits" and "on no number of nodes" in nodes


def test_a_number_of_nodes_that_does_not_fit_is_answered_with_what_does(reports: Reports) -> None:
    """A replica of 32 GPUs on 24: layouts for three nodes, and the nodes that this layout needs."""
    report = reports["three nodes"]
    assert list(failed(report)) == ["configuration"]
    layouts, nodes = proposed(report).values()
    assert len(layouts) == 3
    for overrides in layouts:
        layout = reports[f"three nodes {overrides}"]["layout"]
        assert layout["tensor"] * layout["pipeline"] * layout["context"] * layout["data"] == 24
    assert nodes == ["cluster.nodes=4"]
    (title,) = proposed(reports["four nodes in all"])
    assert title.startswith("Of 4 nodes, 2 for the judges")
    assert proposed(reports["four nodes in all"])[title][0] == "cluster.nodes=2", "the recipe's own layout, on all"


def test_nodes_of_engines_are_among_those_to_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alternatives, "nearest_layouts", lambda search, raw, ranks, more: iter([more]))
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        raw = compose("config", ["recipe=safework_72b_async"])
    title, proposals = alternatives.use_of_nodes(None, raw, parse(raw), 20)  # type: ignore[arg-type]
    assert title == "Of 20 nodes, 2 for the judges and 8 for the engines, most are used with"
    assert proposals == [["cluster.nodes=10"]]


def test_models_that_ship_need_no_folder(reports: Reports) -> None:
    for name, tensors, parameters in (("qwen3", 399, 8_190_735_360), ("smollm2", 272, 134_515_008)):
        assert failed(reports[name]) == {}
        assert reports[name]["parameters_total"] == parameters
        assert reports[name]["hf_tensors"]["covered"] == reports[name]["hf_tensors"]["expected"] == tensors
    for file in (ROOT / "conf" / "model").glob("*.yaml"):
        if file.stem != "base":
            assert published_file(OmegaConf.load(file).path).is_file()


def test_a_stage_is_checked_before_the_stages_before_it_have_run(reports: Reports) -> None:
    report = reports["later stage"]
    assert failed(report) == {}
    assert report["parameters_total"] == PUBLISHED["7b"][1]
    detail = not_checked(report)["model"]
    assert "runs/safework_7b/rl_efficient/hf is what stage rl_efficient will write" in detail
    assert "models/Qwen2.5-VL-7B-Instruct stands in" in detail


def test_a_ladder_is_checked_stage_by_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    """The judge is no policy: the stage after it continues from the one before it."""
    monkeypatch.chdir(ROOT)
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        arguments = ["recipe=ladder_demo", "+preflight=h100", "preflight.files=elsewhere", "seed=3"]
        launches = stages.launches(compose("config", arguments), arguments)
        composed = [compose("config", overrides) for overrides in launches]
        bases = [stages.base_model(raw, arguments) for raw in composed]
        own_bases = [stages.base_model(raw, [*arguments, "model.path=models/own"]) for raw in composed]
    assert [raw.stage.name for raw in composed] == [
        "sft", "judge", "rl_general", "rl_safety", "rl_efficient", "rl_search",
    ]  # fmt: skip
    assert [raw.stage.after for raw in composed] == [None, None, "sft", "rl_general", "rl_safety", "rl_efficient"]
    assert all("preflight" not in raw and raw.seed == 3 for raw in composed)
    assert bases == [None, None, *["build/models/SmolLM2-135M-Instruct"] * 4]
    assert own_bases == [None, None, *["models/own"] * 4]


def test_what_could_not_be_looked_at_is_counted_and_says_how_to_check_it(reports: Reports) -> None:
    missing = not_checked(reports["7b"])
    judges = [f"judge {name}" for name in ("safety", "value", "knowledge")]
    files = ("run_folder", "model", "tokenizer", "images", "prompts", "disk_space")
    assert sorted(missing) == sorted([*judges, *files])
    for name in (*judges, "run_folder", "model", "disk_space"):
        assert "on another machine" in missing[name]


def test_a_critic_is_counted(reports: Reports) -> None:
    """The policy's states once more, without the output layer of 152,064 rows; while the engine generates without
    gradients. Asleep, nothing while the engine generates, and while it is trained what it has beyond the policy's
    gradients and optimiser: weights."""
    (policy,), (awake,), (asleep,) = (reports[name]["memory_gib"][:1] for name in ("7b", "critic", "sleeping critic"))
    states = sum(policy[name] for name in ("weights", "gradients", "optimizer"))
    # Over two tensor-parallel ranks; its optimiser over the 32 data- and context-parallel ones.
    output_layer = 152064 * 3584 / 2 * (2 + 4 + 12 / 32) / 2**30
    gradients = policy["gradients"] - 152064 * 3584 / 2 * 4 / 2**30
    assert awake["critic"] - awake["critic_idle"] == pytest.approx(gradients, abs=0.003)
    assert states - awake["critic"] == pytest.approx(output_layer, abs=0.003)
    assert awake["training"] == pytest.approx(policy["training"] + awake["critic"], abs=0.01)
    assert awake["generating"] == pytest.approx(policy["generating"] + awake["critic_idle"], abs=0.01)
    assert asleep["critic"] < policy["weights"]
    assert asleep["generating"] == policy["generating"]
    on_host = reports["sleeping critic"]["host_gib"]
    critics_of_a_node = 8 * max(rank["critic_asleep"] for rank in reports["sleeping critic"]["memory_gib"])
    assert on_host["generating"]["critic"] == pytest.approx(critics_of_a_node, abs=0.01)
    assert asleep["critic_asleep"] > policy["weights"] and "critic" not in reports["critic"]["host_gib"]["generating"]
    assert policy["critic"] == policy["critic_idle"] == 0
    assert failed(reports["sleeping critic"]) == {}
    assert list(failed(reports["critic"])) == ["memory"]  # no room for both and the engine
    assert reports["critic"]["critic_tensors"] == reports["7b"]["hf_tensors"]  # score.weight for lm_head.weight


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_what_is_impossible_fails_and_says_what_to_change(name: str, reports: Reports) -> None:
    _, check, words = IMPOSSIBLE[name]
    wrong = failed(reports[name])
    assert check in wrong
    assert [word for word in words if word not in wrong[check]] == [], wrong[check]


def test_one_wrong_thing_fails_one_check(reports: Reports) -> None:
    for name in ("memory", "engine", "cache", "devices", "fp8 device", "rewards", "world"):
        assert list(failed(reports[name])) == [IMPOSSIBLE[name][1]]


def run(monkeypatch: pytest.MonkeyPatch, *overrides: str) -> tuple[Config, Settings]:
    """The typed configuration of a run and the preflight's settings."""
    monkeypatch.chdir(ROOT)
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        raw = compose("config", ["+preflight=h100", *overrides])
    settings = Settings(**OmegaConf.to_container(raw.preflight))  # type: ignore[arg-type]
    return parse(OmegaConf.masked_copy(raw, [str(key) for key in raw if key != "preflight"])), settings


def result(name: str, work: Callable[[], str]) -> tuple[str, str]:
    """State and detail of one check."""
    report = Report("", "", "", "", 0.0)
    report.check(name, work)
    return report.checks[0].state, report.checks[0].detail


def test_a_tensor_parallel_group_that_leaves_its_node_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    text = SimpleNamespace(
        num_attention_heads=64, num_key_value_heads=8, head_dim=128, hidden_size=8192, vocab_size=152064
    )
    ranks = ("recipe=safework_72b", "cluster.nodes=16", "cluster.ranks=64")  # nodes of 4 GPUs
    config, _ = run(monkeypatch, *ranks, "parallel.tensor=8")
    assert "spans 2 nodes of 4 ranks" in fit.attention_heads(config, text)
    assert "parallel.tensor=4 with more parallel.pipeline" in fit.attention_heads(config, text)
    config, _ = run(monkeypatch, *ranks, "parallel.tensor=4")
    assert "nodes" not in fit.attention_heads(config, text)


@pytest.fixture(scope="module")
def inputs_in_vllm(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, list[int]]]:
    """Recipe → tensor-parallel size → the inputs of what vLLM quantises with a scale for each block."""
    folder = tmp_path_factory.mktemp("inputs")
    with warm.processes():
        done = subprocess.run(
            [sys.executable, "-m", "tests.rollout.shipped", "inputs", str(folder)],
            cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((folder / "inputs.json").read_text())


# Tensor-parallel sizes at which vLLM's ``fp8_per_block`` can run the model.
HOLDING = {"7b": [], "70b": [1, 2, 4, 8], "72b": [1], "78b": [1]}


@pytest.mark.parametrize("size", PUBLISHED)
def test_fp8_blocks_that_do_not_divide_a_workers_matrices_are_refused(
    size: str, inputs_in_vllm: dict[str, dict[str, list[int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sizes as in vLLM's own layers, whose kernels would fail in the first pass."""

    def refused(tensor: int) -> str:
        fields = [f"rollout.tensor={tensor}", "rollout.quantization=fp8_per_block"]
        corrected = "algorithm.importance_sampling=token_truncated"
        config, _ = run(monkeypatch, f"recipe=safework_{size}", *fields, corrected)
        hf_config = model_config(config.model.path)
        text = family(hf_config.architectures[0]).text_config(hf_config)
        uneven = {inputs for inputs in inputs_in_vllm[f"safework_{size}"][str(tensor)] if inputs % 128}
        assert set(fit.uneven_inputs(hf_config, text, tensor, 128).values()) == uneven
        _, detail = result("rollout", lambda: fit.rollout(config, hf_config, text))
        return detail if "rollout.quantization" in detail else ""

    reasons = {tensor: refused(tensor) for tensor in map(int, inputs_in_vllm[f"safework_{size}"])}
    assert [tensor for tensor, why in reasons.items() if not why] == HOLDING[size]
    # The feed-forward layers of 7B's tower have 3,420 inputs.
    channels = "rollout.quantization=null" if size == "7b" else "rollout.quantization=fp8_per_channel"
    remedy = f"use {channels}" + ", or rollout.tensor=1" * (1 in HOLDING[size])
    for tensor, why in reasons.items():
        assert not why or f"rollout.quantization='fp8_per_block', rollout.tensor={tensor}: " in why
        assert not why or why.endswith(remedy)
    if size == "72b":
        assert "feed-forward 3696" in reasons[8]


@pytest.mark.parametrize("quantization", ["fp8_per_tensor", "fp8_per_channel"])
@pytest.mark.parametrize("size", PUBLISHED)
def test_inputs_that_vllm_s_kernel_for_h100_would_pad_are_refused(
    size: str, quantization: str, inputs_in_vllm: dict[str, dict[str, list[int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its padding fails while the model is loaded: vLLM's issue #47005."""
    for tensor, inputs in inputs_in_vllm[f"safework_{size}"].items():
        fields = [f"rollout.tensor={tensor}", f"rollout.quantization={quantization}"]
        config, _ = run(
            monkeypatch, f"recipe=safework_{size}", *fields, "algorithm.importance_sampling=token_truncated"
        )
        hf_config = model_config(config.model.path)
        text = family(hf_config.architectures[0]).text_config(hf_config)
        _, detail = result("rollout", lambda config=config, h=hf_config, t=text: fit.rollout(config, h, t))
        assert ("no multiples of 16" in detail) == any(number % 16 for number in inputs), detail
        assert ("no multiples of 16" in detail) == (size == "7b")


def test_the_tower_counts_where_vllm_quantises_it() -> None:
    """In InternVL3's chat layout, not in the -hf layout; 12,800 inputs over eight workers are 12.5 blocks."""
    hf_config = model_config("InternVL3-78B-hf")
    tower = {"tower's feed-forward": 1600}
    of_text = fit.uneven_inputs(hf_config, hf_config.text_config, 8, 128)
    hf_config.architectures = ["InternVLChatModel"]
    assert fit.uneven_inputs(hf_config, hf_config.text_config, 8, 128) == of_text | tower
    assert not of_text.keys() & tower.keys()


def test_a_judge_holds_fails_or_could_not_be_looked_at(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    async def never(n: int, request: Any, body: Any) -> Any:
        raise AssertionError("nothing is to be judged")

    def of(*overrides: str) -> tuple[str, str]:
        config, settings = run(monkeypatch, "recipe=demo", "rewards=safework", *overrides)
        server = registry.servers_of(["safety"], config.rewards)["safety"]
        return result("judge", lambda: checks.judge(config, settings, server))

    field = "rewards.servers.safety"
    with FakeServer(never) as fake:
        endpoint = f"{field}.endpoints=[{fake.address}]"
        state, detail = of(endpoint, f"{field}.model={fake_server.MODEL}")
        assert state == HOLDS and fake.address in detail
        state, detail = of(endpoint, f"{field}.model=another")
        assert state == FAILS and "not 'another'" in detail
    state, detail = of(endpoint)
    assert state == NOT_CHECKED and f"curl {fake.address}/v1/models" in detail
    state, detail = of()
    assert state == FAILS and "models/safework_safety_7b" in detail and f"{field}.endpoints" in detail
    assert of("preflight.files=elsewhere")[0] == NOT_CHECKED
    state, detail = of(f"{field}.model=somebody/a_judge")
    assert state == NOT_CHECKED and "hf download somebody/a_judge" in detail
    state, detail = of(f"{field}.model=runs/another/judge/hf", "run_dir=runs/rl_safety")
    assert state == FAILS, "no stage of this ladder writes it"
    state, detail = of(f"{field}.model=runs/rl_safety/../judge/hf", "run_dir=runs/rl_safety")
    assert state == NOT_CHECKED and "stage judge will write" in detail
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "one.safetensors").write_bytes(b"0" * 2**20)
    state, detail = of(f"{field}.model={tmp_path}")
    assert state == HOLDS and "starts with the run" in detail
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    state, detail = of(f"{field}.model={tmp_path}")
    assert state == FAILS and "two.safetensors" in detail and "complete the download" in detail


def test_a_folder_with_a_configuration_alone_lacks_weights_and_a_tokenizer(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(published_file("Qwen3-8B").read_text())
    for files, state in (("here", FAILS), ("elsewhere", NOT_CHECKED)):
        config, settings = run(monkeypatch, "recipe=safework_7b", f"model.path={tmp_path}", f"preflight.files={files}")
        assert result("model", partial(checks.model, config, settings, str(tmp_path)))[0] == state
        assert result("tokenizer", partial(checks.tokenizer, config))[0] == NOT_CHECKED
        assert checks.config_file(config.model.path) == tmp_path / "config.json"


def test_a_run_folder_is_refused_as_the_launch_would_refuse_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def of(*overrides: str) -> tuple[str, str]:
        config, settings = run(monkeypatch, "recipe=demo", *overrides)
        return result("run_folder", lambda: checks.run_folder(config, settings))

    folder = tmp_path / "run"
    assert of(f"run_dir={folder}") == (HOLDS, f"{folder} holds no results")
    assert of(f"run_dir={folder}", "preflight.files=elsewhere")[0] == NOT_CHECKED
    assert not folder.exists()
    folder.mkdir()
    run_folder.mark(folder)
    (folder / "metrics.jsonl").write_text("{}")
    state, detail = of(f"run_dir={folder}")
    assert state == FAILS and "resume=true" in detail and "overwrite=true" in detail
    assert of(f"run_dir={folder}", "overwrite=true")[0] == HOLDS
    assert of(f"run_dir={folder}", "resume=true")[0] == HOLDS


def test_a_resumed_ladder_is_checked_from_its_first_unfinished_stage(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(ROOT)
    for stage, file in (("sft", records.FINISHED), ("judge", records.FINISHED), ("rl_general", "metrics.jsonl")):
        (tmp_path / stage).mkdir()
        run_folder.mark(tmp_path / stage)
        (tmp_path / stage / file).write_text("{}")
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        ladder = "stage.ladder=[sft,judge,rl_general,rl_safety]"
        arguments = ["recipe=ladder_demo", ladder, "+preflight=h100", f"run_dir={tmp_path}", "resume=true"]
        launches = stages.launches(compose("config", arguments), arguments)
        composed = [compose("config", overrides) for overrides in launches]
    assert [(raw.stage.name, raw.stage.after, raw.resume) for raw in composed] == [
        ("rl_general", "sft", True),
        ("rl_safety", "rl_general", False),
    ]


def test_ranks_of_the_command_line_follow_the_nodes_of_a_proposal() -> None:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        of_recipe = compose("config", ["recipe=safework_72b"])
        of_job = compose("config", ["recipe=safework_72b", "cluster.nodes=8", "cluster.ranks=64"])
    assert alternatives.of_nodes(of_recipe, 16) == ["cluster.nodes=16"]
    assert alternatives.of_nodes(of_job, 16) == ["cluster.nodes=16", "cluster.ranks=128"]
    assert alternatives.of_nodes(of_job, 8) == ["cluster.nodes=8"]


def test_disk_space_counts_checkpoints_exports_and_samples(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A billion parameters: 14 GB a checkpoint, three of them, 2 GB of exports, 5 bytes a token of samples."""
    config, settings = run(
        monkeypatch, "recipe=safework_7b", f"run_dir={tmp_path}/run", "checkpoint.keep=2", "algorithm.steps=100"
    )
    report = Report("", "", "", "", 0.0, parameters_total=10**9)
    samples = 100 * 1024 * 16384 * 5
    need = 3 * 14 * 10**9 + 2 * 10**9 + samples
    for free, expected in ((need, HOLDS), (need - 1, FAILS)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: SimpleNamespace(free=free))
        state, detail = result("disk", lambda: checks.disk_space(config, settings, report))
        assert state == expected
        for text in ("14.00 GB a checkpoint", "2.00 GB of exported", f"{samples / 1e9:.2f} GB of samples"):
            assert text in detail, detail


def test_gpu_hours_are_those_of_the_recorded_simulation_and_of_the_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    config, settings = run(monkeypatch, "recipe=safework_72b")
    job = cost.job_of(config)
    model = cost.model_shape(config.model.path)
    scale, machine = cost.read("h100")
    recorded = json.loads((ROOT / "benchmarks" / "results" / "scale_simulation.json").read_text())
    lines = cost.gpu_hours(config, settings)
    for name, line in zip(("reasoning", "answers"), lines, strict=False):
        (seconds,) = (
            row["step"]
            for row in recorded["rows"]
            if (row["lengths"], row["gpus"], row["schedule"]) == (name, 64, "colocated")
        )
        added = []
        for draw in range(scale.draws):
            batch = batch_size(draw_batch(job, job.prompts, scale.lengths[name], scale.seed + draw))
            training = Training(config.parallel, False, job, model, machine, batch, gpus=64)
            added.append(sum(layout_seconds(training).values()))
        seconds += sum(added) / len(added)
        hours = config.algorithm.steps * seconds * (64 + 16) / 3600  # two nodes of judges
        assert line.startswith(name) and line.endswith(f"about {hours:,.0f} GPU hours"), line
    assert "conf/scale/h100.yaml, not measured" in lines[-1]
    fewer, settings = run(monkeypatch, "recipe=safework_72b", "rollout.engines=4")
    costs = cost.Costs(
        machine, model, scale, (config.data.max_prompt_tokens, config.rollout.max_response_tokens), "reasoning"
    )
    generating = [costs.estimate(of_run).phases["generate"] for of_run in (config, fewer)]
    assert generating[1] > 1.1 * generating[0], "half of the GPUs have no engine"
    demo, settings = run(monkeypatch, "recipe=demo")
    assert cost.gpu_hours(demo, settings) == []


def preflight(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "recipes.preflight", *arguments],
        cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=600,
    )  # fmt: skip


def test_a_run_that_is_all_there(tmp_path: Path) -> None:
    """The tests' tiny model: its own config.json, headers, tokenizer and data are looked at. Nothing but the
    preflight's own lines is printed."""
    tiny.make(tmp_path)
    file = tmp_path / "out" / "report.json"
    done = preflight(*tiny.overrides(tmp_path, tmp_path / "run"), f"preflight.output={file}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    report = json.loads(file.read_text())
    details = {check["name"]: check["detail"] for check in report["checks"]}
    assert failed(report) == {}
    assert list(not_checked(report)) == ["memory"], "that of a GPU, which a CPU's run has not"
    assert f"{len(details) - 1} hold, 0 fail, 1 not checked" in done.stdout
    assert "config.json" in details["architecture"]
    assert "zero-padded from 6 to 8" in details["attention_heads"]
    assert report["hf_tensors"]["covered"] == report["hf_tensors"]["expected"] == 2 + 2 * 9


def test_a_failing_run_writes_its_report_and_exits_with_one(tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    with warm.processes():
        done = preflight("recipe=safework_70b", "cluster.ranks=60", f"preflight.output={file}")
    assert done.returncode == 1
    assert "cluster.ranks=60" in done.stdout
    report = json.loads(file.read_text())
    assert report["parameters_total"] is None
    unknown = len(report["checks"]) - 1
    assert unknown == len(not_checked(report)) > 10
    assert f"0 hold, 1 fail, {unknown} not checked" in done.stdout


SIZE = "--ntasks-per-node=8 --gpus-per-node=8"
WHOLE_NODES = "--cpus-per-task=8 --exclusive --mem=0"
SUBMISSIONS = {
    "as it is": ("safework_72b", "algorithm=cpgd", "sbatch slurm/safework_72b.sh algorithm=cpgd"),
    "more nodes": (
        "safework_72b",
        "cluster.nodes=16 cluster.ranks=128",
        f"sbatch --nodes=16 {SIZE} : slurm/safework_72b.sh",
    ),
    "more nodes of judges": (
        "safework_72b",
        "rewards.servers.value.tensor=8",
        f"sbatch --nodes=8 {SIZE} : --nodes=3 slurm/safework_72b.sh rewards.servers.value.tensor=8",
    ),
    "nodes of four GPUs": (
        "safework_72b",
        "cluster.nodes=16 cluster.ranks=64 rollout.tensor=4 rewards.servers.knowledge.tensor=4",
        "sbatch --nodes=16 --ntasks-per-node=4 --gpus-per-node=4 : --nodes=3 --gpus-per-node=4 slurm/safework_72b.sh "
        "rollout.tensor=4 rewards.servers.knowledge.tensor=4",
    ),
    "no judges": (
        "safework_72b",
        "rewards=rules",
        f"sbatch --nodes=8 {SIZE} {WHOLE_NODES} --signal=B:USR1@900 slurm/train.sh recipe=safework_72b rewards=rules",
    ),
    "no judges, engines apart": (
        "safework_72b_async",
        "rewards=rules",
        f"sbatch --nodes=16 {SIZE} {WHOLE_NODES} --signal=B:USR1@900 slurm/train.sh recipe=safework_72b_async "
        "cluster.engine_nodes=8 rewards=rules",
    ),
    "no judges, long steps": (
        "safework_72b_long",
        "rewards=rules",
        f"sbatch --nodes=16 {SIZE} {WHOLE_NODES} --signal=B:USR1@3600 slurm/train.sh recipe=safework_72b_long "
        "rewards=rules",
    ),
    "judges beside the ranks": (
        "safework_7b",
        "cluster.nodes=4 cluster.ranks=16 rewards.supervisor.first_device=4 rewards.servers.knowledge.tensor=4",
        f"sbatch --nodes=4 --ntasks-per-node=4 --gpus-per-node=8 {WHOLE_NODES} --signal=B:USR1@900 slurm/train.sh "
        "recipe=safework_7b rewards.supervisor.first_device=4 rewards.servers.knowledge.tensor=4",
    ),
    "no script": (
        "demo",
        "cluster=slurm_h100 cluster.ranks=8 parallel=tp8_sp",
        f"sbatch --nodes=1 {SIZE} {WHOLE_NODES} slurm/train.sh recipe=demo cluster=slurm_h100 parallel=tp8_sp",
    ),
}


@pytest.mark.parametrize(("recipe", "given", "command"), SUBMISSIONS.values(), ids=SUBMISSIONS)
def test_the_command_that_submits_a_run_asks_for_the_nodes_that_it_uses(
    recipe: str, given: str, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = [f"recipe={recipe}", *given.split()]
    config, _ = run(monkeypatch, *overrides)
    assert str(submission.submission(config, recipe, [*overrides, "+preflight=h100"])) == command


def test_the_job_is_checked_against_the_same_device(monkeypatch: pytest.MonkeyPatch) -> None:
    overrides = ["recipe=safework_72b", "+preflight=h200", "preflight.graph_gib=1", "preflight.output=report.json"]
    config, _ = run(monkeypatch, "recipe=safework_72b")
    command = submission.submission(config, "safework_72b", overrides)
    assert str(command) == "sbatch slurm/safework_72b.sh preflight=h200 preflight.graph_gib=1"


def test_a_ladder_is_submitted_by_its_own_script(monkeypatch: pytest.MonkeyPatch) -> None:
    given = ["recipe=safework_72b", "stage=ladder", "data.seed=1", "cluster.nodes=16"]
    config, _ = run(monkeypatch, "recipe=safework_72b", "cluster.nodes=16", "cluster.ranks=128")
    command = submission.submission(config, "safework_72b", given)
    of_ladder = submission.ladder_command(command, "safework_72b", given)
    assert of_ladder == "slurm/ladder.sh slurm/safework_72b.sh cluster.nodes=16 data.seed=1"
    for refused in ("run_dir=runs/mine", "stage.ladder=[sft]"):
        with pytest.raises(ConfigError, match=re.escape(f"{refused}: slurm/ladder.sh")):
            submission.ladder_command(command, "safework_72b", [*given, refused])
    without_judges, _ = run(monkeypatch, "recipe=safework_72b", "rewards=rules")
    command = submission.submission(without_judges, "safework_72b", given)
    with pytest.raises(NotChecked, match=r"a copy of slurm/safework_72b\.sh without the line #SBATCH hetjob"):
        submission.ladder_command(command, "safework_72b", given)


@pytest.mark.parametrize(
    ("recipe", "fields", "says"),
    [
        ("safework_7b", ("rewards.supervisor.first_device=4",), "the 8 ranks of a node have the GPUs below 8"),
        (
            "safework_7b",
            ("cluster.nodes=4", "cluster.ranks=16", "rewards.supervisor.first_device=4"),
            r"rewards\.servers\.knowledge: replicas=1 x tensor=8 GPUs are not free",
        ),
        ("mine", (), r"no slurm/mine\.sh: copy slurm/safework_72b\.sh, with recipe=mine"),
    ],
)
def test_a_job_that_would_end_before_its_first_step_is_not_submitted(
    recipe: str, fields: tuple[str, ...], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, _ = run(monkeypatch, "recipe=safework_7b", *fields)
    with pytest.raises(ConfigError, match=says):
        submission.submission(config, recipe, fields)


def test_a_machine_without_slurm_is_not_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    command = submission.Submission((), "slurm/safework_72b.sh", ())
    state, detail = result("slurm", lambda: submission.ask_slurm(command))
    assert (state, detail) == (NOT_CHECKED, "this machine has no sbatch; run the preflight on a login node")


def test_slurm_is_asked_for_a_run_on_gpus_that_is_in_no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    on_gpus, _ = run(monkeypatch, "recipe=safework_72b")
    on_cpus, _ = run(monkeypatch, "recipe=demo")
    assert submission.needs_slurm(on_gpus) and not submission.needs_slurm(on_cpus)
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    assert not submission.needs_slurm(on_gpus)


def test_the_demos_data_is_called_a_stand_in_on_gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    own = tmp_path / "rows.jsonl"
    own.write_text("{}\n")
    for fields, said in (
        (("recipe=safework_7b",), "recipes/data/ladder/rl.jsonl"),
        (("recipe=safework_7b", f"data.prompts={own}"), ""),
        (("recipe=safework_7b", "stage=sft", f"data.prompts={own}"), "recipes/data/ladder/sft.jsonl"),
        (("recipe=safework_7b", "stage=sft", f"data.sft={own}"), ""),
        (("recipe=demo",), ""),
    ):
        config, _ = run(monkeypatch, *fields)
        assert (said in checks.stand_in(config)) and bool(said) == ("STAND-IN" in checks.stand_in(config))


def test_a_judge_that_no_row_asks_is_remarked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo's labels ask the safety judge of rewards=safework, and none of them asks the other two."""
    config, settings = run(monkeypatch, "recipe=demo", "rewards=safework", "preflight.files=elsewhere")

    def remarked(data_state: str) -> dict[str, bool]:
        report = Report("", "", "", "", 0.0)
        report.checks.append(Check("data_and_rewards", data_state, ""))
        checks.check_judges(config, settings, report)
        return {check.name: "NO ROW ASKS IT" in check.detail for check in report.checks[1:]}

    assert remarked(HOLDS) == {"judge safety": False, "judge value": True, "judge knowledge": True}
    assert not any(remarked(FAILS).values()), "rows that cannot be read ask for nothing and everything"


def test_preference_pairs_that_are_too_long_are_refused_before_the_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tiny.make(tmp_path)
    pairs = [
        {"id": f"pair-{i}", "prompt": "the task prompt", "chosen": "word " * words, "rejected": "answer"}
        for i, words in enumerate((2, 60))
    ]
    tiny.write_rows(tmp_path / "pairs.jsonl", pairs)
    fields = ("recipe=demo", "stage=reward_model", f"model.path={tmp_path / 'model'}")

    def counted(tokens: int) -> int:
        config, _ = run(monkeypatch, *fields, f"parallel.micro_batch_tokens={tokens}")
        processor = PromptProcessor(config.model.path, config.data.max_prompt_tokens, config.data.images)
        return checks.check_pairs(processor, str(tmp_path / "pairs.jsonl"), config)

    assert counted(512) == 2
    with pytest.raises(ConfigError, match=r"'pair-1' has .* parallel\.micro_batch_tokens=128"):
        counted(128)


def test_rollouts_that_are_too_long_are_refused_before_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tiny.make(tmp_path)
    rows = tiny.make_rows(8)
    scored = {"safety": {"score": 0.5, "label": "", "raw": ""}}
    lines = [
        {"step": 1, "prompt_id": row["id"], "sample_index": 0, "prompt": row["prompt"], "response": "word " * (2 + i)}
        | {"tokens": 2 + i, "reward": 0.5, "verdicts": scored}
        for i, row in enumerate(rows)
    ]
    tiny.write_rows(tmp_path / "rows.jsonl", rows)
    tiny.write_rows(tmp_path / "samples.jsonl", lines)
    fields = (
        "recipe=demo",
        "stage=value_model",
        f"model.path={tmp_path / 'model'}",
        f"data.prompts={tmp_path / 'rows.jsonl'}",
        f"stage.value_model.rollouts={tmp_path / 'samples.jsonl'}",
        "stage.value_model.principles={safety: [safety], value: [], knowledge: []}",
    )

    def counted(tokens: int) -> int:
        config, _ = run(monkeypatch, *fields, f"parallel.micro_batch_tokens={tokens}")
        processor = PromptProcessor(config.model.path, config.data.max_prompt_tokens, config.data.images)
        return checks.check_rollouts(processor, config)

    assert counted(512) == len(rows)
    with pytest.raises(ConfigError, match=r"parallel\.micro_batch_tokens=16"):
        counted(16)
