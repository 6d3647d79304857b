"""Where the CPU platform and the checkpoint code lean on Megatron-Core's and torch's insides, those are as they were.

Sources are read, not imported, so each failure names the spot that an upgrade moved and what has to be looked at again.
"""

import ast
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import distribution, version
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from megatron_ext import platform
from megatron_ext.platform import cpu

ROOT = Path(__file__).resolve().parents[2]
Results = Callable[[str], list[dict[str, Any]]]


@dataclass(frozen=True)
class Spot:
    """``texts`` that ``file`` of a package must hold (runs of white space count as one), and who relies on that."""

    package: str
    file: str
    relied_on_by: str
    texts: tuple[str, ...]


CPU = "megatron_ext/platform/cpu.py: "
CHECKPOINT = "megatron_ext/checkpoint.py: "
SPOTS = (
    Spot("megatron-core", "megatron/core/jit.py", CPU + "torch.compile", ("jit_fuser = torch.compile",)),
    Spot(
        "megatron-core",
        "megatron/core/distributed/param_and_grad_buffer.py",
        CPU + "torch.cuda.current_device, current_stream",
        ("device=torch.cuda.current_device()", "torch.cuda.current_stream()"),
    ),
    Spot(
        "megatron-core",
        "megatron/core/pipeline_parallel/p2p_communication.py",
        CPU + "torch.cuda.synchronize",
        ("torch.cuda.synchronize()",),
    ),
    Spot(
        "megatron-core",
        "megatron/core/pipeline_parallel/schedules.py",
        CPU + '_CudaMeansCpu, device="cuda"',
        ('torch.zeros([], dtype=torch.int, device="cuda")',),
    ),
    Spot(
        "megatron-core",
        "megatron/core/dist_checkpointing/strategies/filesystem_async.py",
        CHECKPOINT + "save, _results_queue",
        (
            "if _results_queue is None: ctx = mp.get_context(mp_mode) _results_queue = ctx.Manager().Queue()",
            "return _results_queue",
        ),
    ),
    Spot(
        "megatron-core",
        "megatron/core/tensor_parallel/random.py",
        CPU + "_set_cuda_rng_state, torch.cuda RNG functions",
        (
            "def _set_cuda_rng_state(new_state: torch.Tensor, device: int = -1, graph_safe: bool = False):",
            "_set_cuda_rng_state(self.states_[name], graph_safe=self.use_cudagraphable_rng)",
            "return torch.cuda.random.get_rng_state(device=device)",
            "orig_rng_state = torch.cuda.get_rng_state()",
            "torch.cuda.manual_seed(seed)",
        ),
    ),
    Spot(
        "megatron-core",
        "megatron/core/optimizer/clip_grads.py",
        CPU + "_l2_norm (without Transformer Engine)",
        (
            "l2_norm_impl = local_multi_tensor_l2_norm",
            "grad_norm, _ = multi_tensor_applier( l2_norm_impl, dummy_overflow_buf, [grads_for_norm], False",
            "device='cuda'",
        ),
    ),
    Spot(
        "megatron-core",
        "megatron/core/utils.py",
        CPU + "_l2_norm's arguments",
        (
            "def local_multi_tensor_applier(op, noop_flag_buffer, tensor_lists, *args): "
            '"""Multi tensor op applier""" return op(2048 * 32, noop_flag_buffer, tensor_lists, *args)',
        ),
    ),
    Spot(
        "megatron-core",
        "megatron/core/models/common/embeddings/rope_utils.py",
        CPU + "_rotary_packed",
        (
            "fused_apply_rotary_pos_emb_thd = None",
            "return fused_apply_rotary_pos_emb_thd( t, cu_seqlens, freqs,",
            "def _apply_rotary_pos_emb_bshd( t: Tensor, freqs: Tensor, rotary_interleaved: bool = False,",
        ),
    ),
    Spot(
        "megatron-core",
        "megatron/core/optimizer/distrib_optimizer.py",
        CPU + "_CudaMeansCpu, Tensor.type()",
        ("['torch.cuda.HalfTensor', 'torch.cuda.BFloat16Tensor']", "model_param.type() == 'torch.cuda.FloatTensor'"),
    ),
    Spot(
        "megatron-core",
        "megatron/core/optimizer/optimizer.py",
        CPU + "_CudaMeansCpu, Tensor.type()",
        ("['torch.cuda.HalfTensor', 'torch.cuda.BFloat16Tensor']", "param.type() == 'torch.cuda.FloatTensor'"),
    ),
    Spot(
        "megatron-core",
        "megatron/core/distributed/finalize_model_grads.py",
        CPU + "RMSNorm's sequence_parallel attribute",
        ('config.sequence_parallel and getattr(param, "sequence_parallel", False)',),
    ),
    Spot(
        "megatron-core",
        "megatron/core/transformer/torch_norm.py",
        CPU + "RMSNorm stands in because the official one refuses sequence parallelism",
        ("not config.sequence_parallel",),
    ),
    Spot(
        "megatron-core",
        "megatron/core/models/gpt/gpt_layer_specs.py",
        CPU + "layer_specs",
        ("def get_gpt_layer_local_submodules(",),
    ),
    Spot(
        "megatron-core",
        "megatron/core/models/gpt/gpt_model.py",
        "megatron_ext/forward_backward.py: log-probs in the output_processor",
        (
            "return output_processor( hidden_states=hidden_states,",
            "output_layer=self.output_layer, output_weight=output_weight,",
            "context=output_processor_context",
        ),
    ),
    Spot(
        "megatron-core",
        "megatron/core/optimizer/distrib_optimizer.py",
        CHECKPOINT + "_load_groups, _prime",
        (
            'steps = list(set([s["step"].item() for s in inner_state_dict["state"].values()]))',
            's["step"] = step',
        ),
    ),
    Spot(
        "megatron-core",
        "megatron/core/optimizer/optimizer.py",
        "megatron_ext/optimizer.py: zero_grad after each update",
        ("param.grad = param.main_grad",),
    ),
    Spot(
        "torch",
        "torch/cuda/__init__.py",
        CPU + "torch.cuda.current_device, synchronize, current_stream",
        ("def current_device() -> int:", "def synchronize(", "def current_stream("),
    ),
    Spot(
        "torch",
        "torch/cuda/random.py",
        CPU + "torch.cuda RNG functions",
        ("def get_rng_state(", "def set_rng_state(", "def manual_seed("),
    ),
)


def squeezed(text: str) -> str:
    return re.sub(r"\s+", " ", text)


@pytest.mark.parametrize("package", ["megatron-core", "torch"])
def test_the_installed_version_is_the_pinned_one(package: str) -> None:
    pins = dict(line.split("==") for line in (ROOT / "pins.txt").read_text().splitlines() if "==" in line)
    assert version(package).partition("+")[0] == pins[package], (
        f"{package} {version(package)} is installed, pins.txt says {pins[package]}: the patches of "
        "megatron_ext/platform/cpu.py were checked against the latter"
    )


@pytest.mark.parametrize("spot", SPOTS, ids=lambda spot: f"{spot.file.rpartition('/')[2]}-{spot.relied_on_by}")
def test_patched_spots_are_where_they_were(spot: Spot) -> None:
    file = Path(str(distribution(spot.package).locate_file(spot.file)))
    assert file.is_file(), f"{spot.package} has no {spot.file} any more, on which relies {spot.relied_on_by}"
    source = squeezed(file.read_text())
    moved = [text for text in spot.texts if text not in source]
    assert moved == [], f"{spot.package} {version(spot.package)} changed {spot.file}; look again at {spot.relied_on_by}"


def test_every_patch_is_listed_and_every_listed_patch_is_made() -> None:
    """PATCHES, which the documentation points to, names exactly what ``activate`` assigns to other modules."""
    tree = ast.parse((ROOT / "megatron_ext" / "platform" / "cpu.py").read_text())
    (activate,) = (n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "activate")
    targets = [t for n in ast.walk(activate) if isinstance(n, ast.Assign) for t in n.targets]
    assigned = {t.attr for t in targets if isinstance(t, ast.Attribute)}
    (listed,) = (n.value for n in tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "PATCHES")
    assert isinstance(listed, ast.Dict)
    names = [name for key in listed.keys if key is not None for name in ast.literal_eval(key).split(" / ")]
    assert assigned == {name.rpartition(".")[2] for name in names}


def test_the_cpu_platform_is_activated_before_transformer_engine_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    """From then on it can't be imported."""
    monkeypatch.setitem(sys.modules, cpu.TRANSFORMER_ENGINE, ModuleType(cpu.TRANSFORMER_ENGINE))
    compiled = torch.compile
    with pytest.raises(RuntimeError, match="Transformer Engine is imported already"):
        cpu.activate()
    assert torch.compile is compiled


def test_an_unknown_platform_is_refused() -> None:
    with pytest.raises(ValueError, match=r"cluster\.platform='tpu': use one of cpu, cuda"):
        platform.activate("tpu")


def test_nothing_runs_before_a_platform_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "_active", None)
    with pytest.raises(RuntimeError, match="no platform is active"):
        platform.current()


def test_a_second_platform_is_refused_and_the_same_one_is_not(results: Results) -> None:
    for rank in results("collectives"):
        assert rank["second_platform"] == (
            "ValueError: cluster.platform='cuda': this process already runs on 'cpu'; start a new one"
        )
        assert rank["same_platform"]


def test_all_gloo_groups_of_a_rank_share_a_transport(results: Results) -> None:
    for rank in results("collectives"):
        assert rank["threads"].count("pt_gloo_runloop") > 20, "two of each group"
        assert rank["threads"].count("gloo_tcp_loop") == 1
