"""``recipes.preflight.scale_model`` against closed forms, brute force and published counts; a recipe's estimates."""

import json
import math
import random
from dataclasses import fields, replace
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from benchmarks import scale_simulation
from recipes.config import parse
from recipes.errors import ConfigError
from recipes.preflight.cost import job_of
from recipes.preflight.scale_model import (
    Engine,
    Group,
    Job,
    Machine,
    ModelShape,
    batch_size,
    best_interval,
    best_step,
    daly_interval,
    draw_batch,
    engine_of,
    estimate_step,
    fit_log_normal,
    generating_seconds,
    goodput,
    judge_seconds,
    simulate_engine,
    simulate_generation,
    trainer_seconds,
    training_seconds,
)

ROOT = Path(__file__).resolve().parents[2]
ENGINE = Engine(
    weight_bytes=2e9,
    kv_bytes_per_token=1e5,
    flops_per_token=1e9,
    attention_flops=0,
    slots=64,
    kv_cache_tokens=10**6,
    bytes_per_second=1e12,
    flops_per_second=1e15,
    overhead_seconds=1e-3,
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
    virtual_pipeline=1,
    context=1,
    recompute=False,
    micro_batch_tokens=100,
    activation_bytes=2,
    prompts=16,
    samples=4,
    updates=1,
    passes=1,
    reference=1,
    engine_tensor=2,
    engine_weight_bytes=2,
    engine_kv_bytes=2,
    slots=32,
    kv_cache_gib=10,
    prompt_limit=100,
    response_limit=400,
)
MODEL = ModelShape(
    parameters=10**9,
    layers=10,
    hidden_size=512,
    kv_heads=4,
    head_dim=64,
    token_flops=2 * 10**9,
    square_flops=4000,
    output_flops=10**8,
)
LENGTHS = {"prompt": {"mean": 40, "p99": 100}, "response": {"mean": 150, "p99": 900}}


def recipe(*overrides: str):
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("config", ["recipe=safework_72b", "+scale=h100", "+simulate=h100", *overrides])


def test_parameters_are_the_published_ones_without_norms():
    model = scale_simulation.model_shape("models/DeepSeek-R1-Distill-Llama-70B")
    assert model.parameters == 70_553_706_496 - 161 * 8192


def test_operations_are_those_that_the_trainer_balances_by():
    from benchmarks.packing import configured

    _, cost = configured("safework_72b", 1)
    model = scale_simulation.model_shape("models/Qwen2.5-VL-72B-Instruct")
    assert model.training_flops(1, 0, 0) == cost.token
    assert model.training_flops(0, 1, 0) == cost.square
    assert model.training_flops(0, 0, 1) == cost.response
    assert model.parameters == pytest.approx(73_410_777_344, rel=0.001)


@pytest.mark.parametrize(("mean", "p99", "limit"), [(1128, 7166, 8192), (4383, 53900, 8192), (400, 900, 10**9)])
def test_lengths_have_the_stated_mean_and_percentile(mean, p99, limit):
    log_mean, deviation = fit_log_normal(mean, p99, limit)
    generator = random.Random(1)
    lengths = sorted(math.exp(generator.gauss(log_mean, deviation)) for _ in range(40000))
    truncated_mean = sum(min(length, limit) for length in lengths) / len(lengths)
    assert truncated_mean == pytest.approx(mean, rel=0.02)
    assert lengths[int(0.99 * len(lengths))] == pytest.approx(p99, rel=0.08)


def test_lengths_that_no_log_normal_has_are_refused():
    with pytest.raises(ValueError, match="mean=100, p99=90"):
        fit_log_normal(100, 90, 10**9)


@pytest.mark.parametrize("slots", [8, 4])
def test_equal_lengths_take_what_the_formula_says(slots):
    """Eight responses of 50 tokens to a prompt of 20 tokens, decoded at once or in two halves.

    A step reads the weights and the cached keys and values.
    """
    generation = simulate_engine(replace(ENGINE, slots=slots), [Group(20, (50,) * 8)])
    steps = [(2e9 + slots * (20 + i) * 1e5) / 1e12 + 1e-3 for i in range(50)]
    prefill = 20 * 1e9 / 1e15
    assert generation.seconds == pytest.approx(8 / slots * sum(steps) + prefill)
    assert len(generation.end_times) == 8
    assert sum(generation.seconds_by_cause.values()) == pytest.approx(generation.seconds)


def test_arithmetic_bounds_a_step_where_it_takes_longer():
    assert ENGINE.step_seconds(64, 0) == {"weights": 2e-3, "KV cache": 0, "overhead": 1e-3}
    slow = replace(ENGINE, flops_per_token=1e11)
    assert slow.step_seconds(64, 0) == {"arithmetic": 64 * 1e11 / 1e15, "overhead": 1e-3}


def test_events_equal_a_simulation_of_every_step():
    """Sequences are admitted in order as slots become free. The reference takes one step at a time."""
    generator = random.Random(3)
    groups = []
    for _ in range(6):
        prompt = generator.randint(1, 50)
        groups.append(Group(prompt, tuple(generator.randint(1, 80) for _ in range(4))))
    engine = replace(ENGINE, slots=5)

    waiting = []  # [tokens in the cache, tokens to generate, tokens to prefill]
    for group in groups:
        for sample, response in enumerate(group.response_tokens):
            waiting.append([group.prompt_tokens, response, group.prompt_tokens if sample == 0 else 0])
    running = []
    seconds = 0.0
    end_times = []
    while waiting or running:
        while waiting and len(running) < 5:
            running.append(waiting.pop(0))
            seconds += engine.prefill_seconds(running[-1][2])
        cached = sum(sequence[0] for sequence in running)
        seconds += sum(engine.step_seconds(len(running), cached).values())
        for sequence in running:
            sequence[0] += 1
            sequence[1] -= 1
            if sequence[1] == 0:
                end_times.append(seconds)
        running = [sequence for sequence in running if sequence[1] > 0]

    generation = simulate_engine(engine, groups)
    assert generation.seconds == pytest.approx(seconds)
    assert generation.end_times == pytest.approx(end_times)


def test_a_full_cache_preempts_sequences_and_all_are_answered():
    groups = [Group(50, (100,) * 4), Group(50, (30, 60, 90, 120))]
    roomy = simulate_engine(ENGINE, groups)
    full = simulate_engine(replace(ENGINE, kv_cache_tokens=400), groups)
    assert len(full.end_times) == 8
    assert full.seconds > roomy.seconds
    assert full.seconds_by_cause["prefill"] > roomy.seconds_by_cause["prefill"]
    with pytest.raises(ValueError, match="holds no sequence of 170"):
        simulate_engine(replace(ENGINE, kv_cache_tokens=169), groups)


def test_more_engines_and_more_bandwidth_are_not_slower():
    groups = draw_batch(JOB, 16, LENGTHS, 1)
    counts = (1, 2, 4, 16, 64)
    seconds = [simulate_generation(ENGINE, engines, groups, JOB.response_limit).seconds for engines in counts]
    assert seconds == sorted(seconds, reverse=True)
    assert seconds[3] == seconds[4], "a prompt's samples stay on one engine: beyond 16 engines the others have no work"
    faster = simulate_generation(replace(ENGINE, bytes_per_second=2e12), 4, groups, JOB.response_limit)
    assert faster.seconds < seconds[2]
    assert 0 < faster.longest_alone <= faster.seconds, "no number of engines is faster than the longest response"


def test_judges_take_samples_one_after_another():
    assert judge_seconds([7.0] * 10, 5, 3) == pytest.approx(10 / 5 + 3)
    assert judge_seconds([1.0, 2.0, 3.0], 100, 3) == pytest.approx(3.01)


def without_attention_and_output(model):
    return replace(model, square_flops=0, output_flops=0)


def test_training_is_six_operations_a_parameter_and_token_and_the_pipeline_fills_once():
    batch = batch_size([Group(10, (10,) * 40)])
    model = without_attention_and_output(MODEL)
    one_gpu = training_seconds(replace(JOB, tensor=1, pipeline=1), model, batch, MACHINE, 1)
    assert one_gpu["train"] == pytest.approx(6 * 10**9 * 800 / 0.5e15)
    three_stages = training_seconds(replace(JOB, tensor=1, pipeline=3), model, batch, MACHINE, 3)
    bubble = (8 + 2) / 8  # 800 tokens in micro-batches of 100
    swap = 6 * 10**9 / 3 / 55e9  # the policy's weights go, the reference's come and the policy's come back
    assert three_stages["train"] == pytest.approx(6 * 10**9 * 800 / 3 / 0.5e15 * bubble)
    assert three_stages["logprobs"] == pytest.approx(2 * 10**9 * 800 / 3 / 0.5e15 * bubble + swap)


def test_virtual_stages_divide_the_bubble_and_recomputed_layers_are_a_third_forward_pass():
    batch = batch_size([Group(10, (10,) * 40)])
    model = without_attention_and_output(MODEL)
    job = replace(JOB, tensor=1, pipeline=3)
    virtual = training_seconds(replace(job, virtual_pipeline=2), model, batch, MACHINE, 3)
    assert virtual["train"] == pytest.approx(6 * 10**9 * 800 / 3 / 0.5e15 * (1 + 2 / 2 / 8))
    recomputed = training_seconds(replace(job, recompute=True), model, batch, MACHINE, 3)
    assert recomputed["train"] == pytest.approx(8 * 10**9 * 800 / 3 / 0.5e15 * (8 + 2) / 8)
    with_output = replace(model, output_flops=10**8)
    plain = training_seconds(job, with_output, batch, MACHINE, 3)
    again = training_seconds(replace(job, recompute=True), with_output, batch, MACHINE, 3)
    layers = 2 * 10**9 * 800 / 3 / 0.5e15 * (8 + 2) / 8  # the output layer is outside what is recomputed
    assert again["train"] - plain["train"] == pytest.approx(layers)


def test_a_run_without_a_reference_moves_no_weights_and_makes_no_pass_for_it():
    batch = batch_size([Group(10, (10,) * 40)])
    alone = training_seconds(replace(JOB, passes=0, reference=0), MODEL, batch, MACHINE, 4)
    assert alone["logprobs"] == 0
    policy = training_seconds(replace(JOB, passes=1, reference=0), MODEL, batch, MACHINE, 4)
    reference = training_seconds(JOB, MODEL, batch, MACHINE, 4)
    swap = 3 * 2 * 10**9 / 4 / 55e9
    assert reference["logprobs"] - policy["logprobs"] == pytest.approx(swap)
    every_tenth_step = training_seconds(replace(JOB, passes=0.1, reference=0.1), MODEL, batch, MACHINE, 4)
    assert every_tenth_step["logprobs"] == pytest.approx(reference["logprobs"] / 10)


@pytest.mark.parametrize(("tensor", "gb_s"), [(2, 360), (8, 360), (16, 45)])
def test_a_tensor_parallel_group_waits_for_four_collectives_a_layer_and_pass(tensor, gb_s):
    """By hand: two all-gathers and two reduce-scatters in the forward pass, as many in the backward pass; over the
    network where the group is larger than a node."""
    batch = batch_size([Group(10, (10,) * 40)])
    job = replace(JOB, tensor=tensor, pipeline=1)
    gpus = 2 * tensor  # two replicas with 400 tokens each
    times = training_seconds(job, MODEL, batch, MACHINE, gpus)
    received = 400 * 512 * 2 * (tensor - 1) / tensor  # bytes, of BF16 activations, by each GPU
    of_a_pass = 10 * 4 * received / (gb_s * 1e9)
    assert times["tensor parallel"] == pytest.approx((1 + 2) * of_a_pass)
    recomputed = training_seconds(replace(job, recompute=True), MODEL, batch, MACHINE, gpus)
    assert recomputed["tensor parallel"] == pytest.approx((1 + 3) * of_a_pass)
    free = training_seconds(job, MODEL, batch, replace(MACHINE, nvlink_gb_s=1e12, network_gb_s=1e12), gpus)
    gradients = times["gradients"] - free["gradients"]
    assert times["train"] - free["train"] - gradients == pytest.approx(2 * of_a_pass, rel=1e-3)


def test_quantised_weights_are_read_in_half_the_time():
    bf16 = engine_of(JOB, MODEL, MACHINE, disaggregated=False)
    fp8 = engine_of(replace(JOB, engine_weight_bytes=1), MODEL, MACHINE, disaggregated=False)
    assert fp8.weight_bytes == bf16.weight_bytes / 2 == 10**9 / 2


def test_an_fp8_cache_holds_twice_the_tokens_and_is_read_in_half_the_time():
    bf16 = engine_of(JOB, MODEL, MACHINE, disaggregated=False)
    fp8 = engine_of(replace(JOB, engine_kv_bytes=1), MODEL, MACHINE, disaggregated=False)
    assert fp8.kv_bytes_per_token == bf16.kv_bytes_per_token / 2
    assert fp8.kv_cache_tokens == pytest.approx(2 * bf16.kv_cache_tokens, abs=1)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ((), {"passes": 1, "reference": 1, "recompute": False, "engine_weight_bytes": 2, "virtual_pipeline": 1}),
        (("algorithm.kl_coefficient=0",), {"passes": 0, "reference": 0}),
        (("algorithm.kl_coefficient=0", "algorithm.reference_every=10"), {"passes": 0.1, "reference": 0.1}),
        (("algorithm.reference_every=10",), {"passes": 1, "reference": 1}),
        (("algorithm.updates_per_rollout=2",), {"passes": 2, "reference": 1}),
        (("parallel.recompute=full",), {"recompute": True}),
        (
            ("rollout.quantization=fp8_per_channel", "algorithm.importance_sampling=token_truncated"),
            {"engine_weight_bytes": 1, "engine_kv_bytes": 2},
        ),
        (
            ("rollout.kv_cache_dtype=fp8", "algorithm.importance_sampling=token_truncated"),
            {"engine_weight_bytes": 2, "engine_kv_bytes": 1},
        ),
    ],
)
def test_the_estimate_is_of_what_the_recipe_does(overrides, expected, monkeypatch):
    monkeypatch.chdir(ROOT)
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        job = job_of(parse(compose("config", ["recipe=safework_72b", *overrides])))
    assert {name: getattr(job, name) for name in expected} == expected


def test_schedules_are_sums_and_a_maximum_of_the_phases():
    batches = [draw_batch(JOB, 16, LENGTHS, 1)]
    split = estimate_step(JOB, MODEL, MACHINE, batches, "split", 24, 8, 1.5)
    asynchronous = estimate_step(JOB, MODEL, MACHINE, batches, "asynchronous", 24, 8, 1.5)
    colocated = estimate_step(JOB, MODEL, MACHINE, batches, "colocated", 24, 24, 1.5)
    for step in (split, asynchronous, colocated):
        generating = generating_seconds(step.phases)
        assert generating == step.phases["generate"] + step.phases["judge"]
        training = trainer_seconds(step.phases)
        assert training == step.phases["logprobs"] + step.phases["train"]
        both = max(generating, training) if step is asynchronous else generating + training
        switch = MACHINE.switch_s if step is colocated else 0
        assert step.seconds == pytest.approx(both + 1.5 + switch)
    assert split.phases == asynchronous.phases
    assert asynchronous.seconds < split.seconds


def test_the_best_split_is_the_shortest_step_of_all():
    batches = [draw_batch(JOB, 16, LENGTHS, 1)]
    best = best_step(JOB, MODEL, MACHINE, batches, "split", 64, 0.5)
    splits = range(8, 57, 8)
    steps = [estimate_step(JOB, MODEL, MACHINE, batches, "split", 64, trainers, 0.5) for trainers in splits]
    assert best.seconds == min(step.seconds for step in steps)
    assert "no room" in best_step(JOB, MODEL, MACHINE, batches, "split", 8, 0.5).note


def test_a_batch_that_feeds_no_replica_or_stage_is_named():
    lengths = {**LENGTHS, "response": {"mean": 20, "p99": 60}}
    batches = [draw_batch(replace(JOB, response_limit=150), 2, lengths, 1)]
    many_replicas = estimate_step(JOB, MODEL, MACHINE, batches, "colocated", 64, 64, 0)
    assert many_replicas.note == "batch too small: 8 samples for 16 replicas"
    fewer_replicas = estimate_step(JOB, MODEL, MACHINE, batches, "colocated", 32, 32, 0)
    assert fewer_replicas.note == "batch too small: 1 micro-batches for 2 stages"


def test_without_failures_and_checkpoints_all_time_is_kept():
    assert goodput(100, 10, 0, math.inf, 600) == 1
    assert goodput(100, 10, 50, math.inf, 600) == pytest.approx(1000 / 1050)
    assert goodput(100, 10, 50, 1e12, 600) == pytest.approx(1000 / 1050)


def test_goodput_is_what_drawn_failures_leave():
    """Intervals of 1,000 s, checkpoints of 100 s, restarts of 300 s, and on average 2,000 s between failures."""
    generator = random.Random(5)

    def seconds_to_failure():
        return generator.expovariate(1 / 2000)

    wall = 0.0
    intervals = 40000
    for _ in range(intervals):
        while True:
            failure = seconds_to_failure()
            if failure >= 1100:
                break
            wall += failure
            while True:
                failure = seconds_to_failure()
                if failure >= 300:
                    break
                wall += failure
            wall += 300
        wall += 1100
    assert goodput(100, 10, 100, 2000, 300) == pytest.approx(intervals * 1000 / wall, rel=0.01)


@pytest.mark.parametrize(("save", "mtbf"), [(1, 3600), (50, 400_000), (60, 10_000), (300, 5000)])
def test_dalys_interval_is_the_best(save, mtbf):
    best_seconds = max(range(1, 30000), key=lambda seconds: goodput(1, seconds, save, mtbf, 600))
    assert daly_interval(save, mtbf) == pytest.approx(best_seconds, rel=0.03, abs=1)
    best_steps = max(range(1, 1000), key=lambda every_steps: goodput(97, every_steps, save, mtbf, 600))
    assert abs(best_interval(97, save, mtbf, 600) - best_steps) <= 1


def test_goodput_falls_with_every_cost():
    base = goodput(100, 10, 50, 10_000, 600)
    assert goodput(100, 10, 60, 10_000, 600) < base
    assert goodput(100, 10, 50, 9000, 600) < base
    assert goodput(100, 10, 50, 10_000, 700) < base


def test_storage_is_bounded_by_nodes_and_then_by_the_cluster():
    assert MACHINE.storage_seconds(80e9, 16, writing=True) == pytest.approx(80 / 8)
    assert MACHINE.storage_seconds(80e9, 256, writing=True) == pytest.approx(80 / 20)
    assert MACHINE.storage_seconds(80e9, 257, writing=False) == pytest.approx(80 / 80)


def test_a_recipe_is_estimated_for_every_size_and_schedule(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    raw = recipe("scale.gpus=[64,128]", "scale.draws=1")
    assert set(raw.scale.machine) | set(raw.simulate) >= {field.name for field in fields(Machine)}
    assert set(raw.scale.machine) <= {field.name for field in fields(Machine)}
    answer = json.loads(json.dumps(scale_simulation.simulate(raw)))
    rows = {(r["lengths"], r["gpus"], r["schedule"]): r for r in answer["rows"]}
    assert len(rows) == 2 * 2 * 3
    assert "no room" in rows["reasoning", 64, "asynchronous"]["note"], "a replica of 64 GPUs leaves none"
    on_64 = rows["reasoning", 64, "colocated"]
    on_128 = rows["reasoning", 128, "colocated"]
    assert on_128["step"] < on_64["step"] < 2 * on_128["step"]
    for row in (on_64, on_128):
        assert 0 < row["goodput"] <= row["best_goodput"] <= row["to_host_goodput"] < 1
    assert len(answer["published"]) == 11
    outside = {case["name"]: case["ratio"] for case in answer["published"] if not 0.85 < case["ratio"] < 1.15}
    assert not outside, "the constants of conf/scale were fitted to these steps"
    scale_simulation.show(answer)
    assert "one step off" in capsys.readouterr().out


@pytest.mark.parametrize("override", ["scale.batch=half", "scale.sync=fast", "scale.draws=0", "scale.gpus=[0]"])
def test_an_unknown_choice_or_count_is_refused(override, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(ConfigError, match=override.partition("=")[0]):
        scale_simulation.simulate(recipe(override))
