"""The preflight of the four published models, of runs that can't be, and of a small model that is all there."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir

from recipes.config import parse
from recipes.preflight.checks import reward_servers
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
SMALLER = ("parallel.context=1", "parallel.pipeline=1", "parallel.recompute=full", "cluster.ranks=16")
# One rank to build in place of 32, and no lack of memory, where neither is what is wrong.
NO_TENSOR = ("parallel.tensor=1", "parallel.sequence=false", "parallel.context=1")
WHOLE = (*NO_TENSOR, "parallel.pipeline=1", "preflight.device_memory_gib=9999", "preflight.host_memory_gib=99999")
# What is wrong → overrides of safework_70b, the check that must fail, what it must say.
IMPOSSIBLE = {
    "heads": (("parallel.tensor=16", *SMALLER), "attention_heads", ["does not divide 8 KV heads", "parallel.tensor=8"]),
    "layers": (("parallel.pipeline=3", "cluster.ranks=48"), "layout", ["parallel.pipeline=3", "80 layers"]),
    "world": (("cluster.ranks=60",), "configuration", ["cluster.ranks=60", "multiple of 64"]),
    "memory": (("parallel.context=1", "parallel.pipeline=1"), "memory", ["training needs", "parallel.recompute=full"]),
    "engine": (("rollout.kv_cache_gib=60",), "memory", ["beside the trainer", "rollout.kv_cache_gib="]),
    "cache": (("rollout.kv_cache_gib=0.5", *WHOLE), "rollout", ["rollout.kv_cache_gib=0.5", "one sequence has 16384"]),
    "engine heads": (("rollout.tensor=3", *WHOLE), "rollout", ["rollout.tensor=3", "64 attention heads"]),
    "devices": (("rollout.engines=16", *WHOLE), "rollout", ["rollout.engines=16", "do not fit on a node's 8"]),
    "engines": (("rollout.engines=9", *WHOLE), "rollout", ["rollout.engines=9", "8 nodes; use a multiple"]),
    "context": (
        ("data.max_prompt_tokens=130000", "parallel.micro_batch_tokens=140000", *WHOLE), "context_length",
        ["131072 positions"],
    ),
    "fp8 device": (("precision=fp8", "preflight=a100", *WHOLE), "precision", ["has no FP8", "precision=bf16"]),
    "fp8 sizes": (
        ("precision=fp8", "parallel.tensor=32", "parallel.context=1", "parallel.pipeline=2"), "attention_heads",
        ["parallel.tensor=8"],
    ),
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
    *(f"+rewards.servers.{name}.arguments=[--gpu-memory-utilization,'{share}']" for name, share in SHARES.items()),
]
# A layout that can't be ends before models are built.
NARROW = ["rewards.servers.knowledge.tensor=4", "rewards.servers.value.tensor=1"]
NARROW += ["parallel.pipeline=3", "cluster.ranks=48"]
ALL = """
import json, sys
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from recipes.preflight import checks
from recipes.preflight.__main__ import command_line
from recipes.preflight.report import Settings
from dataclasses import asdict

folder, wanted, output = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
found = {}
with initialize_config_dir(folder, version_base="1.3"):
    for name, overrides in wanted.items():
        raw = compose("config", command_line(overrides))
        settings = Settings(**OmegaConf.to_container(raw.preflight))
        run = OmegaConf.masked_copy(raw, [key for key in raw if key != "preflight"])
        found[name] = asdict(checks.examine(run, settings, lambda text: None))
json.dump(found, open(output, "w"))
"""
Reports = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> Reports:
    """Every report, from one process: what takes time is the imports."""
    wanted = {size: [f"recipe=safework_{size}"] for size in PUBLISHED}
    wanted["128"] = ["recipe=safework_7b", "cluster.nodes=16"]
    wanted["disaggregated"] = ["recipe=safework_7b", "preflight.engines=disaggregated"]
    wanted["fp8"] = ["recipe=safework_7b", "precision=fp8"]
    wanted["critic"] = ["recipe=safework_7b", "algorithm=ppo"]
    wanted["sleeping critic"] = [*wanted["critic"], "critic.offload=true"]
    wanted["engine awake"] = ["recipe=safework_7b", "rollout.sleep=false"]
    wanted["colocated"] = [*COLOCATED, "optimizer.offload=true"]
    wanted["judge's weights"] = [*COLOCATED, *NARROW]
    wanted["crowded"] = [*COLOCATED, "rewards.servers.value.arguments=[]", "preflight.host_memory_gib=300"]
    wanted |= {name: ["recipe=safework_70b", *overrides] for name, (overrides, _, _) in IMPOSSIBLE.items()}
    file = tmp_path_factory.mktemp("preflight") / "reports.json"
    with warm.processes():
        done = subprocess.run(
            [sys.executable, "-c", ALL, str(ROOT / "conf"), json.dumps(wanted), str(file)],
            cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=1200,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(file.read_text())


def failed(report: dict[str, Any]) -> dict[str, str]:
    return {check["name"]: check["detail"] for check in report["checks"] if not check["ok"]}


@pytest.mark.parametrize("size", PUBLISHED)
def test_published_models_are_built_whole(size: str, reports: Reports) -> None:
    report, (model, parameters, tensors) = reports[size], PUBLISHED[size]
    assert failed(report) == {}
    assert report["model"] == model
    assert report["parameters_total"] == parameters
    assert report["hf_tensors"] == {
        "expected": tensors, "covered": tensors, "missing": [], "unexpected": [], "duplicated": [],
    }  # fmt: skip


@pytest.mark.parametrize("size", PUBLISHED)
def test_every_rank_of_a_replica_is_there_and_fits(size: str, reports: Reports) -> None:
    report = reports[size]
    layout = report["layout"]
    places = [(stage, tensor) for stage in range(layout["pipeline"]) for tensor in range(layout["tensor"])]
    assert [(rank["pp"], rank["tp"]) for rank in report["parameters_per_rank"]] == places
    assert [(rank["pp"], rank["tp"]) for rank in report["memory_gib"]] == places
    # Norms, and with them the vision towers' replicated parts, are on every tensor-parallel rank.
    held = sum(rank["count"] for rank in report["parameters_per_rank"])
    assert report["parameters_total"] < held < 1.01 * report["parameters_total"]
    assert report["fits"]
    assert all(rank["total"] <= report["device_memory_gib"] for rank in report["memory_gib"])


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
    states = rank["weights"] + rank["gradients"] + rank["optimizer"]
    training = states + rank["activations"] + rank["logits"] + rank["workspace"] + rank["reserve"]
    generating = states + rank["kv_cache"] + rank["vllm"] + rank["reserve"]
    assert rank["total"] == pytest.approx(max(training, generating), abs=0.01)


def test_batch_is_alike_on_every_rank(reports: Reports) -> None:
    batch = reports["7b"]["batch"]
    assert (batch["prompts"], batch["samples"], batch["data_parallel_ranks"]) == (128, 1024, 16)
    assert batch["samples_per_rank"] == batch["micro_batches_per_rank"] == 64  # of full length, each fills one


def test_twice_the_devices_halve_the_optimizer_states(reports: Reports) -> None:
    half, whole = reports["128"], reports["7b"]
    assert failed(half) == {}
    for a, b in zip(half["memory_gib"], whole["memory_gib"], strict=True):
        assert a["optimizer"] == pytest.approx(b["optimizer"] / 2, rel=0.001)
        assert a["weights"] == pytest.approx(b["weights"], rel=0.001)


def test_disaggregated_engines_leave_their_memory_to_the_trainer(reports: Reports) -> None:
    report = reports["disaggregated"]
    assert failed(report) == {}
    assert all(rank["kv_cache"] == rank["vllm"] == 0 for rank in report["memory_gib"])
    assert report["engine_gib"]["vllm"] > 15  # 8.3 billion parameters of 2 bytes


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
    states = apart["gradients"] + apart["optimizer"]
    assert rank["judges"] == pytest.approx(room * sum(SHARES.values()), abs=0.01)
    assert rank["judging"] == pytest.approx(rank["weights"] + rank["judges"] + rank["reserve"], abs=0.01)
    assert rank["generating"] == pytest.approx(apart["generating"] - states + 3.0, abs=0.01)
    assert rank["training"] == pytest.approx(apart["training"] + 3.0, abs=0.01)
    assert rank["syncing"] == pytest.approx(rank["generating"] - rank["kv_cache"], abs=0.01)
    assert rank["total"] == max(rank[phase] for phase in ("generating", "judging", "training", "syncing"))
    judges = room * SHARES["safety"] + 8 * room * SHARES["value"] + 2 * PUBLISHED["72b"][1] / 2**30
    fullest = {name: max(r[name] for r in report["memory_gib"]) for name in ("weights", "optimizer")}
    reference, optimizer = 8 * fullest["weights"], 8 * fullest["optimizer"]
    for phase, parts in {
        "generating": {"reference": reference, "optimizer": optimizer, "judges": judges},
        "judging": {"reference": reference, "optimizer": optimizer},
        "training": {"reference": 2 * reference, "judges": judges},
        "syncing": {"reference": reference, "optimizer": optimizer, "judges": judges},
    }.items():
        assert report["host_gib"][phase] == pytest.approx(parts, abs=0.01), phase
    assert "judging" not in reports["7b"]["phases"] and list(reports["7b"]["host_gib"]["generating"]) == ["reference"]


def test_a_phase_that_does_not_fit_the_gpu_or_the_host_names_what_to_change(reports: Reports) -> None:
    wrong = failed(reports["crowded"])
    assert list(wrong) == ["memory", "host_memory"]
    assert wrong["memory"].startswith("the judges beside the trainer need ")
    for words in (
        "optimizer.offload=true",
        "--gpu-memory-utilization",
        "value 0.92",
        "rewards.placement=disaggregated",
    ):
        assert words in wrong["memory"]
    for words in (
        "300 GiB of a node's host while training",
        "rewards.placement=disaggregated",
        "judges",
        "cluster.nodes",
    ):
        assert words in wrong["host_memory"]
    detail = failed(reports["judge's weights"])["judges"]
    assert "rewards.servers.knowledge: 34.2 GiB of weights" in detail and "0.28 lets it have 22.1" in detail
    awake = failed(reports["engine awake"])
    assert list(awake) == ["memory"] and "training needs" in awake["memory"] and "rollout.sleep=true" in awake["memory"]


def test_a_critic_is_counted(reports: Reports) -> None:
    """The policy's states once more, without the output layer of 152,064 rows; asleep, nothing while the engine
    generates, and while it is trained what it has beyond the policy's gradients and optimiser: weights."""
    (policy,), (awake,), (asleep,) = (reports[name]["memory_gib"][:1] for name in ("7b", "critic", "sleeping critic"))
    states = sum(policy[name] for name in ("weights", "gradients", "optimizer"))
    # Over two tensor-parallel ranks; its optimiser over the 32 data- and context-parallel ones.
    output_layer = 152064 * 3584 / 2 * (2 + 4 + 12 / 32) / 2**30
    assert awake["critic"] == awake["critic_idle"]
    assert states - awake["critic"] == pytest.approx(output_layer, abs=0.003)
    assert awake["training"] == pytest.approx(policy["training"] + awake["critic"], abs=0.01)
    assert awake["generating"] == pytest.approx(policy["generating"] + awake["critic"], abs=0.01)
    assert asleep["critic"] < policy["weights"]
    assert asleep["generating"] == policy["generating"]
    on_host = reports["sleeping critic"]["host_gib"]
    its = 8 * max(rank["critic_asleep"] for rank in reports["sleeping critic"]["memory_gib"])
    assert on_host["generating"]["critic"] == pytest.approx(its, abs=0.01)
    assert asleep["critic_asleep"] > policy["weights"] and "critic" not in reports["critic"]["host_gib"]["generating"]
    assert policy["critic"] == policy["critic_idle"] == 0
    assert failed(reports["sleeping critic"]) == {}
    assert "critic.offload=true" in failed(reports["critic"])["memory"]  # no room for both and the engine
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


def test_reward_servers_that_are_up_must_serve_their_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other two are not up, which is no failure: they start with the run."""
    monkeypatch.chdir(ROOT)

    async def never(n: int, request: Any, body: Any) -> Any:
        raise AssertionError("nothing is to be judged")

    def detail(address: str, model: str) -> str:
        servers = ("rewards=safework", f"rewards.servers.safety.endpoints=[{address}]")
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            raw = compose("config", ["recipe=demo", *servers, f"rewards.servers.safety.model={model}"])
        return reward_servers(parse(raw))

    with FakeServer(never) as fake:
        assert f"safety at {fake.address}" in detail(fake.address, fake_server.MODEL)
        with pytest.raises(ValueError, match=r"rewards\.servers\.safety .*not 'another'"):
            detail(fake.address, "another")


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
    assert "every check holds" in done.stdout
    report = json.loads(file.read_text())
    details = {check["name"]: check["detail"] for check in report["checks"]}
    assert not [name for name, detail in details.items() if "not on this machine" in detail]
    assert "config.json" in details["architecture"]
    assert "zero-padded from 6 to 8" in details["attention_heads"]
    assert report["hf_tensors"]["covered"] == report["hf_tensors"]["expected"] == 2 + 2 * 9


def test_a_failing_run_writes_its_report_and_exits_with_one(tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    done = preflight("recipe=safework_70b", "cluster.ranks=60", f"preflight.output={file}")
    assert done.returncode == 1
    assert "cluster.ranks=60" in done.stdout
    assert json.loads(file.read_text())["parameters_total"] is None
