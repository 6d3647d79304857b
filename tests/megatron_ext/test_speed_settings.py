"""Each setting of speed and memory reaches Megatron-Core's configurations; what it does is tested where it acts."""

from typing import Any

import pytest

from megatron_ext import platform

platform.activate("cpu")

import torch  # noqa: E402
from megatron.core.tensor_parallel import checkpoint  # noqa: E402
from transformers import LlamaConfig  # noqa: E402

from megatron_ext import layout, model  # noqa: E402
from megatron_ext.models import llama  # noqa: E402
from megatron_ext.weight_map import sharding_of  # noqa: E402
from tests.settings import parallel_config, precision_config  # noqa: E402

SIZES = LlamaConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=8, num_attention_heads=2)
PP2 = {"pipeline": 2}
NO_RECOMPUTE = {"recompute_granularity": None}


def configured(stage: int, **changes: Any) -> tuple[Any, Any]:
    """TransformerConfig of a pipeline stage and DistributedDataParallelConfig."""
    sizes = parallel_config(**changes)
    layout.check(sizes.model_parallel, sizes)
    sharding = sharding_of(SIZES, sizes.tensor, 0)
    config = model.language_config(llama, SIZES, sharding, sizes, precision_config(), stage)
    return config, model.ddp_config(sizes)


@pytest.mark.parametrize(
    ("changes", "stage", "transformer", "ddp"),
    [
        ({}, 0, {"variable_seq_lengths": False, "tp_comm_overlap": False, **NO_RECOMPUTE}, {}),
        (PP2, 0, {"variable_seq_lengths": True}, {}),
        ({**PP2, "constant_length": True}, 0, {"variable_seq_lengths": False}, {}),
        (
            {"recompute": "selective"}, 0,
            {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}, {},
        ),
        (
            {"recompute": "selective", "recompute_modules": ["mlp"]}, 0,
            {"recompute_granularity": "selective", "recompute_modules": ["mlp"]}, {},
        ),
        (
            {"recompute": "full"}, 0,
            {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}, {},
        ),
        (
            {**PP2, "recompute": "full", "recompute_layers": [3, 0]}, 0,
            {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 3}, {},
        ),
        ({**PP2, "recompute": "full", "recompute_layers": [3, 0]}, 1, NO_RECOMPUTE, {}),
        (
            {"tensor": 2, "sequence": True, "constant_length": True, "tp_comm_overlap": True}, 0,
            {"tp_comm_overlap": True, "tp_comm_bulk_dgrad": True, "tp_comm_bulk_wgrad": True,
             "tp_comm_overlap_ag": True, "tp_comm_overlap_rs": True}, {},
        ),
        ({"overlap_grad_reduce": True}, 0, {}, {"overlap_grad_reduce": True}),
        ({"overlap_grad_reduce": False}, 0, {}, {"overlap_grad_reduce": False, "overlap_param_gather": False}),
        # Transformer Engine's matrices get it one by one (tests/te/test_layers.py), Megatron-Core's own have it not.
        ({"gradient_accumulation_fusion": True}, 0, {"gradient_accumulation_fusion": False}, {}),
    ],
)  # fmt: skip
def test_every_setting_reaches_megatron_core(
    changes: dict[str, Any], stage: int, transformer: dict[str, Any], ddp: dict[str, Any]
) -> None:
    config, ddp_config = configured(stage, **changes)
    assert {name: getattr(config, name) for name in transformer} == transformer
    assert {name: getattr(ddp_config, name) for name in ddp} == ddp


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"recompute": "selective", "recompute_modules": []}, ["recompute_modules=[]", "recompute=none"]),
        (
            {"recompute": "selective", "recompute_modules": ["layernorm"]},
            ["recompute_modules=['layernorm']", "a part of the matrix after them", "use mlp"],
        ),
        ({"recompute_layers": [1]}, ["recompute_layers=[1]", "parallel.recompute=full", "null"]),
        ({"recompute": "full", "recompute_layers": [1, 1]}, ["recompute_layers=[1, 1]", "parallel.pipeline=1"]),
        ({**PP2, "recompute": "full", "recompute_layers": [0, 0]}, ["recompute_layers=[0, 0]", "null for all"]),
        ({**PP2, "recompute": "full", "recompute_layers": [-1, 2]}, ["recompute_layers=[-1, 2]"]),
        (
            {"tensor": 2, "sequence": True, "tp_comm_overlap": True},
            ["tp_comm_overlap=true", "parallel.constant_length=false", "one number of tokens"],
        ),
        (
            {"tensor": 2, "constant_length": True, "tp_comm_overlap": True},
            ["tp_comm_overlap=true", "parallel.sequence=false"],
        ),
    ],
)
def test_what_would_do_nothing_or_harm_is_refused(changes: dict[str, Any], words: list[str]) -> None:
    sizes = parallel_config(**changes)
    with pytest.raises(ValueError) as error:
        layout.check(sizes.model_parallel, sizes)
    assert [word for word in words if word not in str(error.value)] == []


@pytest.mark.parametrize(
    ("changes", "chunk"),
    [({**PP2, "recompute_layers": [5, 0]}, 4), ({**PP2, "virtual_pipeline": 2, "recompute_layers": [0, 3]}, 2)],
)
def test_more_layers_than_a_chunk_has_are_not_recomputed(changes: dict[str, Any], chunk: int) -> None:
    SIZES.architectures = ["LlamaForCausalLM"]
    with pytest.raises(ValueError, match=f"recompute_layers.* has {chunk} layers"):
        model.check(SIZES, parallel_config(recompute="full", **changes))
    model.check(SIZES, parallel_config(recompute="full", **(changes | {"recompute_layers": [chunk, chunk]})))


@pytest.mark.parametrize(
    ("modules", "of_tower"),
    [(["mlp"], {}), (["core_attn", "mlp"], {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]})],
)
def test_a_towers_feed_forward_layers_are_not_recomputed_alone(modules: list[str], of_tower: dict[str, Any]) -> None:
    sizes = parallel_config(recompute="selective", recompute_modules=modules)
    assert model.tower_recompute_options(sizes) == of_tower
    assert model.recompute_options(sizes, 0)["recompute_modules"] == modules


def test_megatron_core_still_can_not_recompute_what_returns_a_bias() -> None:
    """If it can, towers' feed-forward layers may be recomputed."""
    bias = torch.nn.Parameter(torch.ones(2))
    checkpoint(lambda hidden: (2 * hidden, bias), False, torch.ones(2, requires_grad=True))
    assert not bias.is_leaf


def test_layers_of_stages() -> None:
    uneven = parallel_config(pipeline=4, first_stage_layers=17)
    assert [layout.stage_layers(uneven, 80, stage) for stage in range(4)] == [17, 21, 21, 21]
    both = parallel_config(pipeline=3, first_stage_layers=1, last_stage_layers=2)
    assert [layout.stage_layers(both, 8, stage) for stage in range(3)] == [1, 5, 2]
    assert layout.stage_layers(parallel_config(), 8, 0) == 8
