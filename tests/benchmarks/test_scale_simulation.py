"""``recipes.preflight.scale_model`` against closed forms, brute force, published counts; a recipe's whole answer."""

import json
import math
import random
from dataclasses import fields, replace
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from benchmarks import scale_simulation
from recipes.errors import ConfigError
from recipes.preflight.scale_model import (
    Engine,
    Group,
    Job,
    Machine,
    Shapes,
    best_interval,
    best_step,
    daly,
    draw,
    generate,
    generate_on,
    goodput,
    judge,
    log_normal,
    one_step,
    train,
    work,
)

ROOT = Path(__file__).resolve().parents[2]
ENGINE = Engine(
    weights=2e9,
    kv=1e5,
    operations=1e9,
    square=0,
    slots=64,
    capacity=10**6,
    bytes_s=1e12,
    operations_s=1e15,
    overhead_s=1e-3,
)
MACHINE = Machine(
    gpus_per_node=8,
    peak_tflops=1000,
    hbm_gb_s=1000,
    hbm_share=1.0,
    mfu=0.5,
    prefill_share=1.0,
    decode_ms=1.0,
    all_reduce_us=0,
    packed=1.0,
    disaggregated_kv_cache_gib=50,
    switch_s=3,
    judge_latency_s=2,
    judge_samples_s=100,
    write_gb_s=4,
    read_gb_s=8,
    cluster_write_gb_s=20,
    cluster_read_gb_s=40,
    nodes_per_cluster=32,
    mtbf_gpu_hours=50000,
    restart_s=600,
    network_gb_s=45,
    pcie_gb_s=55,
    nvlink_gb_s=360,
    order_ms=20,
)
JOB = Job(
    tensor=2,
    pipeline=2,
    context=1,
    micro_batch_tokens=100,
    prompts=16,
    samples=4,
    updates=1,
    passes=1,
    engine_tensor=2,
    slots=32,
    kv_cache_gib=10,
    prompt_limit=100,
    response_limit=400,
)
MODEL = Shapes(parameters=10**9, layers=10, kv_heads=4, head_dim=64, token=2 * 10**9, square=4000, response=10**8)
LENGTHS = {"prompt": {"mean": 40, "p99": 100}, "response": {"mean": 150, "p99": 900}}


def recipe(*overrides: str):
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("config", ["recipe=safework_72b", "+scale=h100", "+simulate=h100", *overrides])


def test_parameters_are_the_published_ones_without_norms():
    assert scale_simulation.shapes("models/DeepSeek-R1-Distill-Llama-70B").parameters == 70_553_706_496 - 161 * 8192


def test_operations_are_those_that_the_trainer_balances_by():
    from benchmarks.packing import configured

    _, cost = configured("safework_72b", 1)
    found = scale_simulation.shapes("models/Qwen2.5-VL-72B-Instruct")
    assert found.training(1, 0, 0) == cost.token
    assert found.training(0, 1, 0) == cost.square
    assert found.training(0, 0, 1) == cost.response
    assert found.parameters == pytest.approx(73_410_777_344, rel=0.001)


@pytest.mark.parametrize(("mean", "p99", "limit"), [(1128, 7166, 8192), (4383, 53900, 8192), (400, 900, 10**9)])
def test_lengths_have_the_stated_mean_and_percentile(mean, p99, limit):
    middle, deviation = log_normal(mean, p99, limit)
    noise = random.Random(1)
    drawn = sorted(math.exp(noise.gauss(middle, deviation)) for _ in range(40000))
    assert sum(min(n, limit) for n in drawn) / len(drawn) == pytest.approx(mean, rel=0.02)
    assert drawn[int(0.99 * len(drawn))] == pytest.approx(p99, rel=0.08)


def test_lengths_that_no_log_normal_has_are_refused():
    with pytest.raises(ValueError, match="mean=100, p99=90"):
        log_normal(100, 90, 10**9)


@pytest.mark.parametrize("slots", [8, 4])
def test_equal_lengths_take_what_the_formula_says(slots):
    """Eight responses of 50 to a prompt of 20, in one wave or two; a step reads the weights and what is cached."""
    found = generate_on(replace(ENGINE, slots=slots), [Group(20, (50,) * 8)])
    steps = [(2e9 + slots * (20 + i) * 1e5) / 1e12 + 1e-3 for i in range(50)]
    prefill = 20 * 1e9 / 1e15
    assert found.seconds == pytest.approx(8 / slots * sum(steps) + prefill)
    assert len(found.ends) == 8
    assert sum(found.spent.values()) == pytest.approx(found.seconds)


def test_arithmetic_bounds_a_step_where_it_takes_longer():
    assert ENGINE.step(64, 0) == {"weights": 2e-3, "KV cache": 0, "overhead": 1e-3}
    assert replace(ENGINE, operations=1e11).step(64, 0) == {"arithmetic": 64 * 1e11 / 1e15, "overhead": 1e-3}


def test_events_are_what_token_after_token_gives():
    """Sequences enter in order as slots fall free; the reference goes step by step."""
    noise = random.Random(3)
    groups = [Group(noise.randint(1, 50), tuple(noise.randint(1, 80) for _ in range(4))) for _ in range(6)]
    served = replace(ENGINE, slots=5)
    waiting = [[g.prompt, n, 0 if i else g.prompt] for g in groups for i, n in enumerate(g.responses)]
    running, seconds, ends = [], 0.0, []
    while waiting or running:
        while waiting and len(running) < 5:
            running.append(waiting.pop(0))
            seconds += served.prefill(running[-1][2])
        seconds += sum(served.step(len(running), sum(there for there, *_ in running)).values())
        running = [[there + 1, left - 1, 0] for there, left, _ in running]
        ends += [seconds] * sum(left == 0 for _, left, _ in running)
        running = [one for one in running if one[1]]
    found = generate_on(served, groups)
    assert found.seconds == pytest.approx(seconds)
    assert found.ends == pytest.approx(ends)


def test_a_full_cache_sends_sequences_back_and_all_are_answered():
    groups = [Group(50, (100,) * 4), Group(50, (30, 60, 90, 120))]
    free = generate_on(ENGINE, groups)
    full = generate_on(replace(ENGINE, capacity=400), groups)
    assert len(full.ends) == 8
    assert full.seconds > free.seconds
    assert full.spent["prefill"] > free.spent["prefill"]
    with pytest.raises(ValueError, match="holds no sequence of 170"):
        generate_on(replace(ENGINE, capacity=169), groups)


def test_more_engines_and_more_bandwidth_are_not_slower():
    groups = draw(JOB, 16, LENGTHS, 1)
    seconds = [generate(ENGINE, engines, groups, JOB.response_limit).seconds for engines in (1, 2, 4, 16, 64)]
    assert seconds == sorted(seconds, reverse=True)
    assert seconds[3] == seconds[4], "a prompt's samples stay on one engine: beyond 16 none has work"
    faster = generate(replace(ENGINE, bytes_s=2e12), 4, groups, JOB.response_limit)
    assert faster.seconds < seconds[2]
    assert 0 < faster.alone <= faster.seconds, "the longest response alone bounds every number of engines"


def test_judges_take_samples_one_after_another():
    assert judge([7.0] * 10, 5, 3) == pytest.approx(10 / 5 + 3)
    assert judge([1.0, 2.0, 3.0], 100, 3) == pytest.approx(3.01)


def test_training_is_six_operations_a_parameter_and_token_and_the_pipeline_fills_once():
    load = work([Group(10, (10,) * 40)])
    flat = replace(JOB, tensor=1, pipeline=1)
    plain = replace(MODEL, square=0, response=0)
    found = train(flat, plain, load, MACHINE, 1)
    assert found["train"] == pytest.approx(6 * 10**9 * 800 / 0.5e15)
    staged = train(replace(JOB, tensor=1, pipeline=3), plain, load, MACHINE, 3)
    assert staged["train"] == pytest.approx(6 * 10**9 * 800 / 3 / 0.5e15 * (8 + 2) / 8)  # 800 tokens in packs of 100
    assert staged["logprobs"] == pytest.approx(
        2 * 10**9 * 800 / 3 / 0.5e15 * (8 + 2) / 8 + 4 * 10**9 / 3 / 55e9  # and the reference's weights come and go
    )


def test_schedules_are_sums_and_a_maximum_of_the_phases():
    batches = [draw(JOB, 16, LENGTHS, 1)]
    split = one_step(JOB, MODEL, MACHINE, batches, "split", 24, 8, 1.5)
    ahead = one_step(JOB, MODEL, MACHINE, batches, "asynchronous", 24, 8, 1.5)
    together = one_step(JOB, MODEL, MACHINE, batches, "colocated", 24, 24, 1.5)
    for step in (split, ahead, together):
        p = step.phases
        generating, training = p["generate"] + p["judge"], p["logprobs"] + p["train"]
        both = max(generating, training) if step is ahead else generating + training
        assert step.seconds == pytest.approx(both + 1.5 + (MACHINE.switch_s if step is together else 0))
    assert split.phases == ahead.phases
    assert ahead.seconds < split.seconds


def test_the_best_share_is_the_shortest_step_of_all():
    batches = [draw(JOB, 16, LENGTHS, 1)]
    found = best_step(JOB, MODEL, MACHINE, batches, "split", 64, 0.5)
    each = [one_step(JOB, MODEL, MACHINE, batches, "split", 64, n, 0.5).seconds for n in range(8, 57, 8)]
    assert found.seconds == min(each)
    assert "no room" in best_step(JOB, MODEL, MACHINE, batches, "split", 8, 0.5).note


def test_a_batch_that_feeds_no_replica_or_stage_is_named():
    batches = [draw(replace(JOB, response_limit=150), 2, {**LENGTHS, "response": {"mean": 20, "p99": 60}}, 1)]
    few = one_step(JOB, MODEL, MACHINE, batches, "colocated", 64, 64, 0)
    assert few.note == "batch too small: 8 samples for 16 replicas"
    stages = one_step(JOB, MODEL, MACHINE, batches, "colocated", 32, 32, 0)
    assert stages.note == "batch too small: 1 micro-batches for 2 stages"


def test_without_failures_and_checkpoints_all_time_is_kept():
    assert goodput(100, 10, 0, math.inf, 600) == 1
    assert goodput(100, 10, 50, math.inf, 600) == pytest.approx(1000 / 1050)
    assert goodput(100, 10, 50, 1e12, 600) == pytest.approx(1000 / 1050)


def test_goodput_is_what_drawn_failures_leave():
    """Intervals of 1,000 s and a checkpoint of 100; the mean distance of failures is 2,000 s, a restart takes 300."""
    noise, wall, intervals = random.Random(5), 0.0, 40000
    for _ in range(intervals):
        while (until := noise.expovariate(1 / 2000)) < 1100:
            wall += until
            while (again := noise.expovariate(1 / 2000)) < 300:
                wall += again
            wall += 300
        wall += 1100
    assert goodput(100, 10, 100, 2000, 300) == pytest.approx(intervals * 1000 / wall, rel=0.01)


@pytest.mark.parametrize(("save", "mtbf"), [(1, 3600), (50, 400_000), (60, 10_000), (300, 5000)])
def test_daly_loses_least(save, mtbf):
    best = max(range(1, 30000), key=lambda seconds: goodput(1, seconds, save, mtbf, 600))
    assert daly(save, mtbf) == pytest.approx(best, rel=0.03, abs=1)
    in_steps = max(range(1, 1000), key=lambda every: goodput(97, every, save, mtbf, 600))
    assert abs(best_interval(97, save, mtbf, 600) - in_steps) <= 1


def test_goodput_falls_with_every_cost():
    base = goodput(100, 10, 50, 10_000, 600)
    assert goodput(100, 10, 60, 10_000, 600) < base
    assert goodput(100, 10, 50, 9000, 600) < base
    assert goodput(100, 10, 50, 10_000, 700) < base


def test_storage_is_bounded_by_nodes_and_then_by_the_cluster():
    assert MACHINE.storage_seconds(80e9, 16, writing=True) == pytest.approx(80 / 8)
    assert MACHINE.storage_seconds(80e9, 256, writing=True) == pytest.approx(80 / 20)
    assert MACHINE.storage_seconds(80e9, 257, writing=False) == pytest.approx(80 / 80)


def test_the_recipe_has_its_answer(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    raw = recipe("scale.gpus=[64,128]", "scale.draws=1")
    assert set(raw.scale.machine) | set(raw.simulate) >= {field.name for field in fields(Machine)}
    assert set(raw.scale.machine) <= {field.name for field in fields(Machine)}
    answer = json.loads(json.dumps(scale_simulation.simulate(raw)))
    rows = {(r["lengths"], r["gpus"], r["schedule"]): r for r in answer["rows"]}
    assert len(rows) == 2 * 2 * 3
    assert "no room" in rows["reasoning", 64, "asynchronous"]["note"], "a replica of 64 GPUs leaves none"
    more, fewer = rows["reasoning", 128, "colocated"], rows["reasoning", 64, "colocated"]
    assert more["step"] < fewer["step"] < 2 * more["step"]
    for row in (more, fewer):
        assert 0 < row["goodput"] <= row["best_goodput"] <= row["to_host_goodput"] < 1
    assert all(0.6 < case["ratio"] < 1.6 for case in answer["published"])
    scale_simulation.show(answer)
    assert "one step off" in capsys.readouterr().out


@pytest.mark.parametrize("override", ["scale.batch=half", "scale.sync=fast", "scale.draws=0", "scale.gpus=[0]"])
def test_a_choice_that_is_none_is_named(override, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(ConfigError, match=override.partition("=")[0]):
        scale_simulation.simulate(recipe(override))
