"""GPU hours of a stage of RL, from ``scale_model`` and the costs of conf/scale: an estimate."""

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from megatron_ext.layout import stage_layers
from megatron_ext.platform import capabilities
from recipes.config import Config, job_processes
from recipes.preflight import memory_plan, scale_model
from recipes.preflight.alternatives import judge_nodes
from recipes.preflight.architecture import config_file
from recipes.preflight.report import Settings
from recipes.preflight.scale_model import Job, Machine, ModelShape

CONF = Path(__file__).resolve().parents[2] / "conf"


def job_of(config: Config) -> Job:
    """The settings that the estimate depends on."""
    interval = memory_plan.reference_interval(config)
    reference = 0.0 if interval is None else 1 / interval
    # The policy's own log-probs are computed before the first of several updates.
    passes = reference + int(config.algorithm.updates_per_rollout > 1)
    return Job(
        tensor=config.parallel.tensor,
        pipeline=config.parallel.pipeline,
        virtual_pipeline=config.parallel.virtual_pipeline,
        context=config.parallel.context,
        recompute=recomputed_share(config),
        micro_batch_tokens=config.parallel.micro_batch_tokens,
        activation_bytes=config.precision.dtype.itemsize,
        prompts=config.algorithm.prompts_per_step,
        samples=config.algorithm.samples_per_prompt,
        updates=config.algorithm.updates_per_rollout,
        passes=passes,
        reference=reference,
        engine_tensor=config.rollout.tensor,
        engine_weight_bytes=2 if config.rollout.quantization is None else 1,
        engine_kv_bytes=memory_plan.kv_cache_element_bytes(config),
        slots=config.rollout.max_num_seqs,
        kv_cache_gib=config.rollout.kv_cache_gib,
        prompt_limit=config.data.max_prompt_tokens,
        response_limit=config.rollout.max_response_tokens,
    )


def recomputed_share(config: Config) -> float:
    """``Job.recompute``."""
    cut = config.parallel
    if cut.recompute != "full":
        return 0.0
    if cut.recompute_layers is None:
        return 1.0
    layers = model_shape(config.model.path).layers
    shares = []
    for stage, recomputed in enumerate(cut.recompute_layers):
        shares.append(recomputed * cut.virtual_pipeline / stage_layers(cut, layers, stage))
    return max(shares)


def machine_of(scale: DictConfig, links: DictConfig) -> Machine:
    """The machine of the groups ``scale`` and ``simulate``."""
    constants = {**scale.machine, **links}
    return Machine(**{field.name: constants[field.name] for field in fields(Machine)})


def model_shape(path: str) -> ModelShape:
    """The shape of the model in the folder ``path``, or of the architecture that the project keeps for this name."""
    return scale_model.model_shape(json.loads(config_file(path).read_text()))


def gpu_hours(config: Config, settings: Settings) -> list[str]:
    """Lines with the seconds of a step and the GPU hours of all, for each assumption about the lengths of responses."""
    if "rl" not in config.stage.trains or not capabilities(config.cluster.platform).has_gpus:
        return []
    if settings.costs is None:
        return [f"not made: conf/scale has no costs of {settings.device}"]
    scale = OmegaConf.load(CONF / "scale" / f"{settings.costs}.yaml")
    links = OmegaConf.load(CONF / "simulate" / f"{settings.costs}.yaml")
    assert isinstance(scale, DictConfig) and isinstance(links, DictConfig)
    gpus = job_processes(config)
    judges = judge_nodes(config) * (config.cluster.ranks // config.cluster.nodes)
    steps = config.algorithm.steps
    used = f"{gpus} GPUs and {judges} for the judges" if judges else f"{gpus} GPUs"
    lines = []
    for name, lengths in scale.lengths.items():
        try:
            seconds = step_seconds(config, scale, machine_of(scale, links), lengths)
        except ValueError as error:
            lines.append(f"{name}: not estimated: {error}")
            continue
        hours = steps * seconds * (gpus + judges) / 3600
        lines.append(
            f"{name}, {lengths.response.mean:,} tokens a response: {steps} steps of {seconds:.0f} s on {used}: about "
            f"{hours:,.0f} GPU hours"
        )
    left_out = ["the start, evaluations, checkpoints, failures"]
    if memory_plan.needed(config).values:
        left_out.append("the critic")
    if "vision_config" in config_file(config.model.path).read_text():
        left_out.append("the vision tower")
    lines.append(
        f"from the roofline and the lengths of conf/scale/{settings.costs}.yaml, not measured; left out: "
        f"{', '.join(left_out)}"
    )
    return lines


def step_seconds(config: Config, scale: DictConfig, machine: Machine, lengths: DictConfig) -> float:
    """Seconds of a step with responses of these lengths. Raises ValueError if the run's limits exclude them."""
    job = job_of(config)
    model = model_shape(config.model.path)
    plain: Any = OmegaConf.to_container(lengths)
    batches = [scale_model.draw_batch(job, job.prompts, plain, scale.seed + i) for i in range(scale.draws)]
    apart = config.cluster.engine_nodes > 0
    sync = scale_model.sync_seconds(job, model, machine, disaggregated=apart)
    schedule = "colocated"
    if apart:
        schedule = "asynchronous" if config.rollout.staleness else "split"
        machine = replace(machine, disaggregated_kv_cache_gib=config.rollout.kv_cache_gib)
    gpus = job_processes(config)
    trainers = config.cluster.ranks
    return scale_model.estimate_step(job, model, machine, batches, schedule, gpus, trainers, sync).seconds
