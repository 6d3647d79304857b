"""The layouts of the recipes for 7B to 78B models, on models with few layers. Every width is the real one.

``python -m tests.rollout.shipped trainer FOLDER`` writes the blocks of every rank, ``… vllm FOLDER`` the parameters of
every engine worker; both build without memory. :func:`plan` joins them. ``… inputs FOLDER`` writes the sizes of FP8.
"""

import json
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir

from megatron_ext import resolvers, settings
from megatron_ext.layout import ParallelConfig
from rollout.weight_sync.layout import ParameterLayout
from rollout.weight_sync.plan import Plan, ShardTable
from rollout.weight_sync.planner import build_plan

RECIPES = ("safework_7b", "safework_70b", "safework_72b", "safework_78b")
# (engines on nodes of their own, bytes of a round): with small rounds there are many, with the recipes' own few.
VARIANTS = {"together": (False, 64 << 20), "apart": (True, 128 << 20)}
CONF = Path(__file__).resolve().parents[2] / "conf"
GPUS_OF_A_NODE = 8


def recipe(name: str) -> Any:
    resolvers.register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", [f"recipe={name}"])


def small(raw: Any) -> tuple[Any, ParallelConfig]:
    """The recipe's model with one layer for each pipeline stage and two in the tower, and its layout."""
    from recipes.preflight.architecture import model_config

    layout = settings.read(ParallelConfig, "parallel", raw.parallel, {"recompute": "none"})
    layers = layout.pipeline
    fields = model_config(raw.model.path).to_dict()
    text = fields.get("text_config") or fields
    text["num_hidden_layers"] = layers
    if text.get("layer_types"):
        text["layer_types"] = text["layer_types"][:layers]
    if fields.get("vision_config"):
        depth = "depth" if "depth" in fields["vision_config"] else "num_hidden_layers"
        fields["vision_config"][depth] = 2
        if "fullatt_block_indexes" in fields["vision_config"]:
            fields["vision_config"]["fullatt_block_indexes"] = [1]
    from transformers import CONFIG_MAPPING

    return CONFIG_MAPPING[fields["model_type"]].from_dict(fields), layout


def trainer(folder: Path) -> None:
    """``trainer.json``: of each recipe the table of every rank."""
    from recipes.preflight.weight_sync import trainer_tables
    from tests.settings import precision_config

    tables = {}
    for name in RECIPES:
        raw = recipe(name)
        config, layout = small(raw)
        of_ranks = trainer_tables(config, layout, raw.cluster.ranks, precision_config())
        tables[name] = [[[shard, asdict(block)] for shard, block in table] for table in of_ranks]
    (folder / "trainer.json").write_text(json.dumps(tables))


def vllm(folder: Path) -> None:
    """``vllm.json``: of each recipe the layouts of every worker of an engine."""
    from recipes.preflight import simulated_engines, simulated_ranks

    simulated_engines.activate()
    layouts = {}
    for name in RECIPES:
        raw = recipe(name)
        config, _ = small(raw)
        config.save_pretrained(folder / name)
        shapes = simulated_ranks.checkpoint_tensors(config)
        engine = simulated_engines.engine_config(folder / name, "bfloat16", raw.rollout.tensor, 1)
        layouts[name] = [[asdict(layout) for layout in worker] for worker in simulated_engines.trace(engine, shapes)]
    (folder / "vllm.json").write_text(json.dumps(layouts))


def inputs(folder: Path) -> None:
    """``inputs.json``: of each recipe, by an engine's tensor-parallel size, the inputs of a worker's matrices to which
    vLLM gives a scale for each block. A CPU has no kernel for them, so there is none."""
    import vllm
    from vllm.model_executor.layers.quantization.online import fp8

    from recipes.preflight import simulated_engines

    simulated_engines.activate()
    vllm.EngineArgs = partial(vllm.EngineArgs, quantization="fp8_per_block")  # type: ignore[misc, assignment]
    fp8.init_fp8_linear_kernel = lambda **arguments: None
    inputs: dict[str, dict[int, list[int]]] = {}
    for name in RECIPES:
        config, _ = small(recipe(name))
        config.save_pretrained(folder / name)
        heads = config.get_text_config().num_attention_heads
        inputs[name] = {}
        for tensor in (n for n in (1, 2, 4, 8) if heads % n == 0):
            engine = simulated_engines.engine_config(folder / name, "bfloat16", tensor, 1)
            with simulated_engines.worker(engine, 0, simulated_engines.META) as model:
                methods = ((layer, getattr(layer, "quant_method", None)) for layer in model.modules())
                layers = [layer for layer, method in methods if isinstance(method, fp8.OnlineLinearBase)]
                inputs[name][tensor] = sorted({layer.input_size_per_partition for layer in layers})
    (folder / "inputs.json").write_text(json.dumps(inputs))


def plan(folder: Path, name: str, variant: str) -> Plan:
    """The plan of a recipe, from what both programs wrote."""
    from recipes.preflight.weight_sync import topology
    from rollout.weight_sync.sync import _parse_table

    raw = recipe(name)
    apart, bucket = VARIANTS[variant]
    written = json.loads((folder / "trainer.json").read_text())[name]
    tables: list[ShardTable] = [_parse_table([[shard, [block]] for shard, block in table]) for table in written]
    workers = json.loads((folder / "vllm.json").read_text())[name]
    layouts = [[ParameterLayout.from_json(layout) for layout in worker] for worker in workers]
    where = topology(len(tables), raw.rollout.engines, raw.rollout.tensor, GPUS_OF_A_NODE, apart)
    receivers: list[ShardTable] = [[] for _ in range(len(where.ranks) - len(tables))]
    return build_plan([*tables, *receivers], layouts, where, bucket)


if __name__ == "__main__":
    {"trainer": trainer, "vllm": vllm, "inputs": inputs}[sys.argv[1]](Path(sys.argv[2]))
