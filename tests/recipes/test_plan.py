"""The planner against an exhaustive search, the preflight and sums made by hand; its goals and its refusals."""

import json
import math
import os
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from benchmarks import plan_order
from recipes.preflight.layout_seconds import Training, layout_seconds
from recipes.preflight.scale_model import (
    TRAINING_PARTS,
    BatchSize,
    Group,
    Machine,
    batch_size,
    draw_batch,
    engine_of,
    estimate_step,
    generating_seconds,
    least_training_seconds,
    longest_alone_seconds,
    model_shape,
    simulate_generation,
    tensor_parallel_seconds,
    trainer_seconds,
    training_seconds,
)
from tests import warm
from tests.benchmarks.test_scale_simulation import JOB, LENGTHS, MACHINE, MODEL

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
# Two GPUs for a model of 8.3 billion parameters: some layouts need recomputation or offload, some fit in no way.
SMALL = (
    "recipe=safework_7b",
    "cluster.nodes=1",
    "cluster.ranks=2",
    "algorithm.prompts_per_step=16",
    "preflight.device_memory_gib=120",
    "preflight.files=elsewhere",
)
THREE_NODES = (*SMALL, "cluster.nodes=3", "cluster.ranks=6")
# Two nodes in all, already divided.
DIVIDED = (
    *SMALL,
    "cluster.engine_nodes=1",
    "rollout.staleness=1",
    "rollout.sleep=false",
    "rollout.engines=${cluster.engine_nodes}",
    "rollout.tensor=2",
    "rollout.kv_cache_gib=20",
    "parallel.context=1",
    "parallel.recompute=full",
    "algorithm.importance_sampling=token_truncated",
)
CASES = {
    "small": (SMALL, "step_time", 10),
    "fewest": (("recipe=safework_7b", "cluster.nodes=2", "cluster.ranks=16", "preflight.files=elsewhere"), "gpus", 3),
    "longest": (SMALL, "context", 3),
    "three nodes": (THREE_NODES, "step_time", 14),
    "divided": (DIVIDED, "step_time", 2),
}
# What can't be planned → overrides, and what it must say.
IMPOSSIBLE = {
    "goal": (("recipe=safework_7b",), "speed", ["goal='speed'", "step_time, gpus, context"]),
    "platform": (("recipe=demo", "stage=rl"), "step_time", ["cluster.platform='cpu'", "cluster=slurm_h100"]),
    "stage": (("recipe=safework_7b", "stage=sft"), "step_time", ["stage.trains=['sft']", "stage=rl"]),
    "costs": (("recipe=safework_7b", "preflight=h200"), "step_time", ["preflight.costs=null", "preflight.costs=h100"]),
    "setting": (
        ("recipe=safework_7b", "parallel.recompute=half"), "step_time",
        ["parallel.recompute='half'", "none, selective, full"],
    ),
    "model": (("recipe=safework_7b", "model.path=models/nobody"), "step_time", ["models/nobody", "no config.json"]),
    "lengths": (
        ("recipe=safework_7b", "rollout.max_response_tokens=512"), "step_time",
        ["rollout.max_response_tokens=512", "reasoning: mean=4383", "answers: mean=1128"],
    ),
}  # fmt: skip
PROGRAM = """
import itertools, json, sys
from dataclasses import asdict
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from recipes import plan
from recipes.command_line import with_group
from recipes.config import parse
from recipes.errors import ConfigError
from recipes.preflight import checks, fit, planner, stages
from recipes.preflight.report import Report, Settings

folder, cases, impossible, output = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3]), sys.argv[4]
results = {}
planners = []
create = planner.Planner.__init__

def remember(self, *arguments):
    create(self, *arguments)
    planners.append(self)

planner.Planner.__init__ = remember
checks.alternatives.propose = lambda *arguments: None

def composed(overrides):
    raw = compose("config", with_group(overrides, "preflight", "h100"))
    settings = Settings(**OmegaConf.to_container(raw.preflight))
    run = OmegaConf.masked_copy(raw, [key for key in raw if key != "preflight"])
    return run, settings, [word for word in overrides if not stages.OWN.match(word)]

def checked(overrides, everything):
    "The preflight as a user runs it with the overrides; or its checks of whether a run fits alone, which take less."
    run, settings, arguments = composed(overrides)
    if everything:
        report = checks.examine(run, settings, lambda text: None, stages.base_model(run, arguments))
    else:
        report = Report("", "", "", "", settings.device_memory_gib)
        fit.fit(parse(run), planners[-1].search.hf_config, settings, report)
    config = parse(run)
    # The judges' servers need a node of eight GPUs.
    return {"failed": [asdict(check) for check in report.checks if check.state == "fails" and check.name != "nodes"],
            "total": max((rank["total"] for rank in report.memory_gib), default=None),
            "engine": sum(report.engine_gib.values()) if config.cluster.engine_nodes else 0.0,
            "ahead": [config.rollout.staleness, config.rollout.sleep, config.optimizer.offload,
                      config.algorithm.importance_sampling],
            "costs": plan.cost.gpu_hours(config, settings) if config.cluster.ranks % 8 == 0 else []}

def exhaustive(whole, planned):
    "Every layout that the configuration accepts and whose models fit: the fastest of each, the fastest first."
    best = {}
    for config in planned.layouts(whole):
        for offload, tensor in itertools.product((False, True), (1, 2)):
            built = planned.build(planner.with_engines(config, tensor, offload))
            if built is not None:
                shape = repr(config.parallel)
                best[shape] = min(best.get(shape, built.seconds), built.seconds)
    return sorted(best.values())

def exhaustive_apart(nodes, response, planned):
    "The same of every division of the nodes."
    best = {}
    for trainers in range(1, nodes):
        whole = planned.whole(trainers, nodes - trainers, response)
        for config in planned.layouts(whole):
            for tensor in (1, 2):
                built = planned.build(planner.with_engines(config, tensor, False))
                if built is not None:
                    shape = repr(config.parallel)
                    best[shape] = min(best.get(shape, built.seconds), built.seconds)
    return sorted(best.values())

def refusals_of(planned):
    "What a planner says of a run whose engines generate on the GPUs of a trainer that works, and of colocated judges."
    raw = planned.search.raw
    ahead = ["parallel.context=1", "rollout.staleness=1", "rollout.sleep=false"]
    ahead.append("algorithm.importance_sampling=token_truncated")
    planned.search.raw = planner.merged(raw, ahead)
    _, own = planned.own()
    planned.search.raw = planner.merged(raw, ["rewards.placement=colocated"])
    divisions = list(planned.divisions(2, 8192))
    planned.search.raw = raw
    return {"own": own, "divisions": len(divisions), "apart": planned.apart_refused}

def outer_stages(planned):
    "Layers of the first and last stage that are tried for a run with 12 on the first of two."
    raw = planned.search.raw
    planned.search.raw = planner.merged(raw, ["parallel.pipeline=2", "parallel.first_stage_layers=12"])
    tried = {str(sizes): planned.outer_stages(*sizes) for sizes in ((2, 1), (2, 2), (4, 1))}
    whole = planned.whole(1, 0, 8192)
    even = planner.replace(whole, parallel=planned.sizes(whole.parallel, 1, 2, 1, 1, "none"))
    tried["even"] = planned.overrides(even)
    planned.search.raw = raw
    return tried

def bounds(whole, planned):
    "Layout, the lower bound, and what the built model has."
    compared = []
    for config in planned.layouts(whole):
        report = Report("", "", "", "", 0)
        fit.fit(config, planned.search.hf_config, planned.search.settings, report, part=fit.CORNERS)
        built = fit.BUILT[fit.key(config, fit.CORNERS)]
        for place, sizes in zip(built.counts, built.sizes):
            least = planned.least(config, place["pp"])
            compared.append([repr(config.parallel), asdict(least), asdict(sizes)])
    return compared

def answered(overrides, goal):
    run, settings, arguments = composed(overrides)
    return plan.answer(run, settings, goal, arguments, lambda text: None)

with initialize_config_dir(folder, version_base="1.3"):
    for name, (overrides, goal, most) in cases.items():
        planner.MOST_RESULTS = most
        answer = answered(overrides, goal)
        results[name] = {
            "own": plan.as_json(answer["own"]),
            "own_refused": answer["own_refused"],
            "plans": [plan.as_json(entry) for entry in answer["plans"]],
            "all_nodes": answer["nodes"],
            "nodes": [entry.config.cluster.nodes + entry.config.cluster.engine_nodes for entry in answer["plans"]],
            "apart": [entry.apart for entry in answer["plans"]],
            "responses": [entry.config.rollout.max_response_tokens for entry in answer["plans"]],
        }
        for n, entry in enumerate(results[name]["plans"]):
            changed = {word.partition("=")[0] for word in entry["overrides"]}
            given = [word for word in overrides if word.partition("=")[0] not in changed]
            entry["preflight"] = checked([*given, *entry["overrides"]], everything=n == 0)
        if name == "small":
            whole = planners[-1].whole(1, 0, answer["plans"][0].config.rollout.max_response_tokens)
            results[name]["exhaustive"] = exhaustive(whole, planners[-1])
            results[name]["bounds"] = bounds(whole, planners[-1])
            results[name]["refusals"] = refusals_of(planners[-1])
            results[name]["outer stages"] = outer_stages(planners[-1])
        if name == "three nodes":
            response = answer["plans"][0].config.rollout.max_response_tokens
            results[name]["exhaustive"] = exhaustive_apart(3, response, planners[-1])
    refusals = {}
    for name, (overrides, goal, words) in impossible.items():
        try:
            answered(overrides, goal)
            refusals[name] = None
        except ConfigError as error:
            refusals[name] = str(error)
json.dump({"cases": results, "refusals": refusals}, open(output, "w"))
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Every answer, from one process: one that simulates ranks can't train afterwards."""
    file = tmp_path_factory.mktemp("plan") / "found.json"
    arguments = [str(ROOT / "conf"), json.dumps(CASES), json.dumps(IMPOSSIBLE), str(file)]
    with warm.processes():
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, *arguments],
            cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=900,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(file.read_text())


@pytest.fixture(scope="module")
def cases(answers: dict[str, Any]) -> dict[str, Any]:
    return answers["cases"]


@pytest.mark.parametrize("case", CASES)
def test_each_layout_passes_the_preflight_and_has_the_memory_that_is_printed(case: str, cases: dict[str, Any]) -> None:
    assert cases[case]["plans"]
    for plan in cases[case]["plans"]:
        preflight = plan["preflight"]
        assert preflight["failed"] == [], plan["overrides"]
        assert max(preflight["total"], preflight["engine"]) == pytest.approx(plan["fullest_gib"], abs=0.001)
        assert plan["fullest_phase"] in ("engine", "generating", "judging", "training", "syncing")
        assert (plan["fullest_phase"] == "engine") == (preflight["engine"] > preflight["total"])
        # The preflight's GPU hours are of the same step.
        for line in preflight["costs"][:1]:
            assert f"steps of {plan['seconds']:.0f} s" in line


def test_the_order_is_that_of_an_exhaustive_search(cases: dict[str, Any]) -> None:
    small = cases["small"]
    seconds = [plan["seconds"] for plan in small["plans"]]
    assert len(small["exhaustive"]) > 3
    assert seconds == pytest.approx(small["exhaustive"][: len(seconds)])
    assert len(seconds) == min(10, len(small["exhaustive"]))
    layouts = [(plan["layout"], [word for word in plan["overrides"] if "recompute" in word]) for plan in small["plans"]]
    assert len({str(layout) for layout in layouts}) == len(layouts)


def test_engines_apart_are_ordered_as_by_an_exhaustive_search_of_all_divisions(cases: dict[str, Any]) -> None:
    three = cases["three nodes"]
    apart = [plan["seconds"] for plan, is_apart in zip(three["plans"], three["apart"], strict=True) if is_apart]
    assert len(apart) == 7
    assert apart == pytest.approx(three["exhaustive"][:7])
    # Layouts of both divisions.
    trainers = {word for plan in three["plans"] for word in plan["overrides"] if word.startswith("cluster.nodes=")}
    assert trainers == {"cluster.nodes=1", "cluster.nodes=2"}


def test_both_kinds_are_found_and_only_engines_apart_are_one_step_ahead(cases: dict[str, Any]) -> None:
    for name, nodes in (("three nodes", 3), ("divided", 2)):
        case = cases[name]
        assert case["all_nodes"] == nodes and set(case["nodes"]) == {nodes}
        half = len(case["plans"]) // 2
        assert case["apart"].count(True) == case["apart"].count(False) == half > 0
        seconds = [plan["seconds"] for plan in case["plans"]]
        if all("prompts_per_step" not in word for plan in case["plans"] for word in plan["overrides"]):
            assert seconds == sorted(seconds)
        for plan, apart in zip(case["plans"], case["apart"], strict=True):
            staleness, sleep, offload, correction = plan["preflight"]["ahead"]
            assert (staleness, sleep) == ((1, False) if apart else (0, True))
            if apart:
                assert not offload and correction == "token_truncated"


def test_a_run_that_is_divided_is_planned_in_both_ways(cases: dict[str, Any]) -> None:
    divided = cases["divided"]
    assert divided["own"] is not None and divided["own"]["overrides"] == []
    back = next(plan for plan, apart in zip(divided["plans"], divided["apart"], strict=True) if not apart)
    wanted = {
        "cluster.nodes=2",
        "cluster.engine_nodes=0",
        "cluster.ranks=4",
        "rollout.staleness=0",
        "rollout.sleep=true",
    }
    assert wanted <= set(back["overrides"])


def test_engines_apart_have_the_largest_cache_that_their_gpus_leave_room_for(cases: dict[str, Any]) -> None:
    """Within a GiB of what is left of 120 GiB, less the 6 that stay free."""
    for plan, apart in zip(cases["three nodes"]["plans"], cases["three nodes"]["apart"], strict=True):
        if apart:
            assert 113 < plan["preflight"]["engine"] <= 114


def test_what_excludes_engines_apart_or_the_own_layout_is_said(cases: dict[str, Any]) -> None:
    refusals = cases["small"]["refusals"]
    assert "rollout.staleness=1" in refusals["own"] and "cluster.engine_nodes=0" in refusals["own"]
    assert refusals["divisions"] == 0
    assert "rewards.placement=colocated" in refusals["apart"]


def test_a_runs_own_numbers_of_layers_are_tried_beside_an_even_share(cases: dict[str, Any]) -> None:
    tried = cases["small"]["outer stages"]
    assert tried["(2, 1)"] == [[None, None], [12, None]]
    assert tried["(2, 2)"] == tried["(4, 1)"] == [[None, None]]
    assert "parallel.first_stage_layers=null" in tried["even"]
    assert not any("pipeline" in word for word in tried["even"])


def test_the_bound_of_memory_is_below_the_models_and_near_them(cases: dict[str, Any]) -> None:
    assert cases["small"]["bounds"]
    for layout, least, built in cases["small"]["bounds"]:
        for name in ("weights", "gradients", "optimizer", "activations", "logits", "workspace"):
            assert least[name] <= built[name], (layout, name)
        # What is left out is the tower, whose weights are a tenth of the model's, and the workspace's largest matrix.
        assert sum(least[name] for name in ("weights", "activations", "logits")) >= 0.7 * sum(
            built[name] for name in ("weights", "activations", "logits")
        ), layout


def test_seconds_are_the_sum_of_the_phases(cases: dict[str, Any]) -> None:
    for case in cases.values():
        for plan, apart in zip(case["plans"], case["apart"], strict=True):
            phases = dict(plan["phases"])
            parts = [phases.pop(name) for name in TRAINING_PARTS]
            assert min(parts) >= 0
            if not apart:
                assert sum(phases.values()) == pytest.approx(plan["seconds"])
                continue
            sync = phases.pop("sync")
            generating = phases.pop("generate") + phases.pop("judge")
            training = sum(phases.values())
            # The mean of the longer one of each batch.
            assert sync + max(generating, training) <= plan["seconds"] + 1e-6
            assert plan["seconds"] < 0.9 * (sync + generating + training)


def test_the_goal_of_few_gpus_wants_the_fewest_nodes_first(cases: dict[str, Any]) -> None:
    nodes = cases["fewest"]["nodes"]
    assert nodes == sorted(nodes) and nodes[0] == 1
    plans = cases["fewest"]["plans"]
    on_one = [plan["seconds"] for plan, count in zip(plans, nodes, strict=True) if count == 1]
    assert on_one == sorted(on_one)
    for plan, count in zip(plans, nodes, strict=True):
        if count == 1:
            assert {"cluster.nodes=1", "cluster.ranks=8"} <= set(plan["overrides"])


def test_the_goal_of_a_long_context_wants_the_longest_responses_first(cases: dict[str, Any]) -> None:
    responses = cases["longest"]["responses"]
    assert responses == sorted(responses, reverse=True)
    assert responses[0] > 8192
    for plan, response in zip(cases["longest"]["plans"], responses, strict=True):
        assert (f"rollout.max_response_tokens={response}" in plan["overrides"]) == (response != 8192)


BATCH = BatchSize(tokens=16_000, squares=4_000_000, response_tokens=12_000)


def training(**changes: Any) -> Training:
    """On 16 GPUs of two nodes; ``changes`` are of the layout, with the job's sizes kept equal to them."""
    sizes = replace(plan_order.layout((2, 2, 1, 1), "none", 100), **changes)
    recompute = float(sizes.recompute == "full")
    job = replace(JOB, tensor=sizes.tensor, pipeline=sizes.pipeline, context=sizes.context, recompute=recompute)
    job = replace(job, virtual_pipeline=sizes.virtual_pipeline)
    return Training(sizes, False, job, MODEL, MACHINE, BATCH, gpus=16)


def test_a_plain_layout_adds_nothing() -> None:
    added = layout_seconds(training(tensor=1, pipeline=1, sequence=False))
    assert added.pop("weights") > 0
    assert set(added.values()) == {0.0}


GROUPS = [Group(100, (300, 20)), Group(50, (150, 150))]


def test_one_step_ahead_a_step_is_the_longer_of_generation_and_training_with_what_the_layout_adds() -> None:
    job = replace(JOB, prompts=2, samples=2)
    sync = 7.0
    for added in (0.0, 1.0, 1000.0):
        step = estimate_step(
            job, MODEL, MACHINE, [GROUPS], "asynchronous", 32, 16, sync, added=lambda batch, more=added: {"why": more}
        )
        training = trainer_seconds(training_seconds(job, MODEL, batch_size(GROUPS), MACHINE, 16)) + added
        assert step.training == pytest.approx(training)
        assert step.seconds == pytest.approx(sync + max(generating_seconds(step.phases), training))
    assert step.bound == "training: why"


def test_the_bounds_of_a_division_are_below_every_layout() -> None:
    batch = draw_batch(JOB, 8, LENGTHS, seed=3)
    size = batch_size(batch)
    least = least_training_seconds(JOB, MODEL, size, MACHINE, 16)
    assert least > 0
    for tensor, pipeline, recompute in ((1, 1, 0.0), (2, 2, 0.0), (8, 1, 1.0)):
        job = replace(JOB, tensor=tensor, pipeline=pipeline, recompute=recompute)
        assert least <= trainer_seconds(training_seconds(job, MODEL, size, MACHINE, 16))
    engine = engine_of(JOB, MODEL, MACHINE, disaggregated=True)
    for engines in (1, 4):
        generation = simulate_generation(engine, engines, batch, JOB.response_limit)
        assert longest_alone_seconds(engine, batch) == generation.longest_alone <= generation.seconds


def test_stages_wait_for_the_one_with_most_layers() -> None:
    """4 and 6 of 10 layers: a fifth of all passes through layers once more."""
    passes = MODEL.forward_flops(16_000, 4_000_000, 0) + MODEL.training_flops(16_000, 4_000_000, 0)
    # Of the pass for log-probs, the forward pass and the backward pass.
    collectives = 3 * tensor_parallel_seconds(training().job, MODEL, BATCH, MACHINE, 16)
    uneven = layout_seconds(training(first_stage_layers=4))["uneven stages"]
    assert uneven == pytest.approx(0.2 * (passes / (16 * 1000e12 * 0.5) + collectives))
    assert layout_seconds(training(first_stage_layers=5))["uneven stages"] == 0


def test_selective_recompute_is_that_of_its_modules_in_a_forward_pass() -> None:
    # 1000 TFLOPS, half of which are reached, on 16 GPUs.
    of_attention = MODEL.square_flops * 4_000_000 / (16 * 1000e12 * 0.5)

    def seconds(*modules: str) -> float:
        recomputed = training(recompute="selective", recompute_modules=list(modules))
        return layout_seconds(recomputed)["selective recompute"]

    assert seconds("core_attn") == pytest.approx(of_attention)
    # Of a layer's matrices those of the feed-forward part, and two of its four collectives.
    collectives = tensor_parallel_seconds(training().job, MODEL, BATCH, MACHINE, 16) / 2
    of_mlp = MODEL.mlp_flops * 16_000 / (16 * 1000e12 * 0.5) + collectives
    assert 0 < MODEL.mlp_flops < MODEL.token_flops
    assert seconds("mlp") == pytest.approx(of_mlp)
    assert seconds("core_attn", "mlp") == pytest.approx(of_attention + of_mlp)


def test_the_feed_forward_layers_part_of_the_operations() -> None:
    """Three matrices of hidden x ffn in each layer."""
    shape = model_shape(
        {
            "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 2,
            "head_dim": 16, "intermediate_size": 96, "vocab_size": 100,
        }
    )  # fmt: skip
    assert shape.mlp_flops == 2 * 3 * (3 * 64 * 96)


def test_every_micro_batch_moves_weights_and_gradients_through_memory() -> None:
    """A quarter of the weights on a rank, 40 micro-batches, and one more for the pipeline's bubble.

    In bytes of a parameter: three passes read 2, and the FP32 gradient is read and written.
    """
    bytes_of_parameter = 3 * 2 + 8
    fused = training(gradient_accumulation_fusion=True)
    assert layout_seconds(fused)["weights"] == pytest.approx(41 * 1e9 / 4 * bytes_of_parameter / 1e12)
    # The product is written in BF16, and read again.
    assert layout_seconds(training())["weights"] == pytest.approx(41 * 1e9 / 4 * (bytes_of_parameter + 4) / 1e12)
    # Layers under full recompute run forward once more. Virtual stages make the bubble smaller.
    full = training(gradient_accumulation_fusion=True, recompute="full")
    assert layout_seconds(full)["weights"] == pytest.approx(41 * 1e9 / 4 * (bytes_of_parameter + 2) / 1e12)
    # The MLPs alone read their part of the weights once more.
    mlp = training(gradient_accumulation_fusion=True, recompute="selective", recompute_modules=["mlp"])
    again = bytes_of_parameter + 2 * MODEL.mlp_flops / MODEL.token_flops
    assert layout_seconds(mlp)["weights"] == pytest.approx(41 * 1e9 / 4 * again / 1e12)
    halves = training(gradient_accumulation_fusion=True, virtual_pipeline=2)
    assert layout_seconds(halves)["weights"] == pytest.approx(40.5 * 1e9 / 4 * bytes_of_parameter / 1e12)


def test_a_backward_pass_gathers_a_layers_inputs_again() -> None:
    """Two of four collectives that are all as large, if the sequence is cut between tensor-parallel ranks."""
    forward = tensor_parallel_seconds(training().job, MODEL, BATCH, MACHINE, 16)
    assert layout_seconds(training())["tensor gather"] == pytest.approx(forward / 2)
    assert layout_seconds(training(sequence=False))["tensor gather"] == 0


def test_every_collective_of_a_tensor_parallel_group_has_a_start() -> None:
    # Forward for log-probs and for training four collectives each, backward six; 5 layers; 40 micro-batches of 100.
    machine = replace(MACHINE, all_reduce_us=20)
    started = replace(training(), machine=machine)
    assert layout_seconds(started)["tensor latency"] == pytest.approx(5 * 14 * 40 * 20e-6)
    # Full recompute runs the layers forward once more: four collectives more.
    again = replace(training(recompute="full"), machine=machine)
    assert layout_seconds(again)["tensor latency"] == pytest.approx(5 * 18 * 40 * 20e-6)
    mlp = replace(training(recompute="selective", recompute_modules=["mlp"]), machine=machine)
    assert layout_seconds(mlp)["tensor latency"] == pytest.approx(5 * 16 * 40 * 20e-6)
    assert layout_seconds(replace(training(tensor=1, sequence=False), machine=machine))["tensor latency"] == 0


def test_exchanges_are_bytes_over_the_link_that_they_cross() -> None:
    row = MODEL.hidden_size * 2
    plain = layout_seconds(training())
    # A stage has 8 GPUs, a node: the next stage is on another one. Log-probs, forward, backward; cut by tensor ranks.
    assert plain["pipeline exchange"] == pytest.approx(3 * 4000 * row / 2 / 45e9)
    assert layout_seconds(training(virtual_pipeline=2))["pipeline exchange"] == pytest.approx(3 * 4000 * row / 45e9)
    # 40 micro-batches are three messages each.
    slow = replace(training(), machine=replace(MACHINE, all_reduce_us=20))
    assert layout_seconds(slow)["pipeline exchange"] - plain["pipeline exchange"] == pytest.approx(3 * 40 * 20e-6)
    # Of four context ranks one receives three shares of two heads' keys and values, of 4,000 tokens: a replica of 16.
    split = layout_seconds(training(context=4))
    key_and_value = 2 * 2 * 64 * 2
    assert split["context exchange"] == pytest.approx(5 * 4 * 4000 * 3 * key_and_value / 360e9)
    across = layout_seconds(training(tensor=4, context=4, pipeline=1))
    assert across["context exchange"] == pytest.approx(10 * 4 * 4000 * 3 * 2 * 64 * 2 / 45e9)


def test_offload_moves_the_states_to_the_host_and_back() -> None:
    offloaded = replace(training(), offload=True)
    assert layout_seconds(offloaded)["offload"] == pytest.approx(2 * 12 * MODEL.parameters / 16 / 55e9)


def test_rank_correlation_of_known_orders() -> None:
    assert plan_order.spearman([1, 2, 3, 4], [10, 20, 30, 40]) == pytest.approx(1)
    assert plan_order.spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    # 1 - 6 x (0 + 1 + 1 + 0) / (4 x 15)
    assert plan_order.spearman([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx(0.8)
    assert plan_order.ranked([5, 1, 5, 9]) == [1.5, 0, 1.5, 3]


def test_the_measured_layouts_are_those_that_are_predicted_for_and_differ() -> None:
    layouts = plan_order.layouts_wanted([])
    assert len(layouts) == 54 and len({str(sizes) for sizes in layouts}) == 54
    predicted = [plan_order.predict(sizes, MACHINE, 2)["predicted"] for sizes in layouts]
    assert len(set(predicted)) > 50
    with pytest.raises(SystemExit, match="layouts=2"):
        plan_order.layouts_wanted(["layouts=2"])


def test_a_machine_with_a_single_core_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_order.os, "sched_getaffinity", lambda process: {3})
    with pytest.raises(SystemExit, match="1 core here: each of the 2 ranks needs one of its own"):
        plan_order.main()


# The benchmark with a smaller twin and few tokens.
SMALL_BENCHMARK = """
import sys
from pathlib import Path
from benchmarks import plan_order

folder = Path(sys.argv[1])
plan_order.TWIN |= {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2,
                    "head_dim": 16, "vocab_size": 256}
plan_order.SEQUENCES = 8
plan_order.PROMPT_TOKENS = 8
plan_order.RESPONSE_TOKENS = (16, 32)
plan_order.SMALL_TOKENS = 48
plan_order.REPETITIONS = 1
plan_order.RESULT = folder / "plan_order.json"
plan_order.SCALE = folder / "scale.yaml"
sys.argv[1:] = ["layouts=8"]
plan_order.main()
"""


def test_the_benchmark_measures_the_costs_predicts_and_trains(tmp_path: Path) -> None:
    """All of it at a tiny size: no time is compared."""
    for _ in range(3):  # at this size a busy machine's measurement may be refused
        with warm.processes():
            done = subprocess.run(
                [sys.executable, "-c", SMALL_BENCHMARK, str(tmp_path)],
                cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300,
            )  # fmt: skip
        if done.returncode == 0:
            break
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((tmp_path / "plan_order.json").read_text())
    rows = result["layouts"]
    assert len(rows) == 8 and len({row["data"] for row in rows}) > 1
    for row in rows:
        assert row["predicted"] > 0 and len(row["measured"]) == 1 and row["measured"][0] > 0
    assert -1 <= result["correlation"] <= 1
    # The file of costs has the fields of conf/scale's machine and of its links, and says what was not measured.
    costs = OmegaConf.load(tmp_path / "scale.yaml").machine
    assert set(costs) == {field.name for field in fields(Machine)}
    used = ("peak_tflops", "mfu", "packed", "nvlink_gb_s", "network_gb_s", "pcie_gb_s", "all_reduce_us")
    assert all(costs[name] > 0 for name in used)
    assert math.isnan(costs.decode_ms)


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_what_cannot_be_planned_is_refused_with_a_remedy(name: str, answers: dict[str, Any]) -> None:
    _, _, words = IMPOSSIBLE[name]
    said = answers["refusals"][name]
    assert said is not None
    for word in words:
        assert word in said, said


def test_the_command_line_says_what_is_wrong_in_one_line() -> None:
    with warm.processes():
        done = subprocess.run(
            [sys.executable, "-m", "recipes.plan", "recipe=safework_7b", "goal=speed"],
            cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
    said = (done.stdout + done.stderr).strip()
    assert done.returncode == 1 and said == "error: goal='speed': use one of step_time, gpus, context", said
