"""Estimate the seconds of an RL step and the GPU hours of a stage, for the planner and the preflight.

The estimate comes from ``scale_model``, ``layout_seconds`` and the costs of conf/scale.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from statistics import fmean
from typing import Any

from omegaconf import DictConfig, OmegaConf

from megatron_ext.layout import stage_layers
from megatron_ext.platform import capabilities
from recipes.command_line import CONF
from recipes.config import Config, job_processes
from recipes.preflight import memory_plan, scale_model
from recipes.preflight.alternatives import judge_nodes
from recipes.preflight.architecture import config_file
from recipes.preflight.layout_seconds import Training, layout_seconds
from recipes.preflight.report import Settings
from recipes.preflight.scale_model import BatchSize, Engine, Generation, Group, Job, Machine, ModelShape, StepEstimate


def job_of(config: Config) -> Job:
    """The settings of the configuration that the estimate depends on."""
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
    """The value of ``Job.recompute`` for a configuration."""
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
    """The machine that the groups ``scale`` and ``simulate`` describe."""
    constants = {**scale.machine, **links}
    return Machine(**{field.name: constants[field.name] for field in fields(Machine)})


def model_shape(path: str) -> ModelShape:
    """The shape of the model in the folder ``path``, or of the published model with the folder's name."""
    return scale_model.model_shape(json.loads(config_file(path).read_text()))


def read(costs: str) -> tuple[DictConfig, Machine]:
    """The file of conf/scale with this name, and the machine that it and its namesake in conf/simulate describe."""
    scale = OmegaConf.load(CONF / "scale" / f"{costs}.yaml")
    links = OmegaConf.load(CONF / "simulate" / f"{costs}.yaml")
    assert isinstance(scale, DictConfig) and isinstance(links, DictConfig)
    return scale, machine_of(scale, links)


@dataclass
class Costs:
    """The cost model for one model and one assumption about the lengths of responses.

    It caches the random batches that a step is the mean of, and the simulated generation of each kind of engine.

    Attributes:
        machine: the costs.
        model: the model's shape.
        scale: the file of conf/scale.
        limits: longest prompt and response in tokens, at which the lengths are truncated. A search for a longer context
            keeps those of the run, because nobody knows how long the responses would become.
        lengths: the name of the lengths in ``scale``.
        batches: number of prompts → batches.
        sizes: number of prompts → sizes of these batches.
        generations: engine, number of engines, batch and response limit → generation.
    """

    machine: Machine
    model: ModelShape
    scale: DictConfig
    limits: tuple[int, int]
    lengths: str
    batches: dict[int, list[list[Group]]] = field(default_factory=dict)
    sizes: dict[int, list[BatchSize]] = field(default_factory=dict)
    generations: dict[tuple[Any, ...], Generation] = field(default_factory=dict)

    def of_prompts(self, job: Job) -> list[list[Group]]:
        """The batches with the job's number of prompts."""
        if job.prompts not in self.batches:
            lengths: Any = OmegaConf.to_container(self.scale.lengths[self.lengths])
            seeds = range(self.scale.seed, self.scale.seed + self.scale.draws)
            self.batches[job.prompts] = [scale_model.draw_batch(job, job.prompts, lengths, seed) for seed in seeds]
            self.sizes[job.prompts] = [scale_model.batch_size(batch) for batch in self.batches[job.prompts]]
        return self.batches[job.prompts]

    def simulate(self, engine: Engine, engines: int, groups: Sequence[Group], response_limit: int) -> Generation:
        """:func:`recipes.preflight.scale_model.simulate_generation` with a cache.

        Layouts with the same engines share the result.
        """
        key = (engine, engines, id(groups), response_limit)
        if key not in self.generations:
            self.generations[key] = scale_model.simulate_generation(engine, engines, groups, response_limit)
        return self.generations[key]

    def job(self, config: Config) -> Job:
        """The job of the configuration, with the limits at which the lengths are truncated."""
        prompt_limit, response_limit = self.limits
        return replace(job_of(config), prompt_limit=prompt_limit, response_limit=response_limit)

    def machine_for(self, config: Config) -> Machine:
        """The machine, with the configuration's KV cache for engines on nodes of their own."""
        return replace(self.machine, disaggregated_kv_cache_gib=config.rollout.kv_cache_gib)

    def estimate(self, config: Config) -> StepEstimate:
        """The estimate of a step, with what its layout adds.

        Raises ValueError if no distribution of lengths can be truncated at the limits.
        """
        job = self.job(config)
        machine = self.machine_for(config)
        apart = config.cluster.engine_nodes > 0
        schedule = "colocated"
        if apart:
            schedule = "asynchronous" if config.rollout.staleness else "split"

        def added(batch: BatchSize) -> dict[str, float]:
            return layout_seconds(
                Training(
                    sizes=config.parallel,
                    offload=config.optimizer.offload,
                    job=job,
                    model=self.model,
                    machine=machine,
                    batch=batch,
                    gpus=config.cluster.ranks,
                )
            )

        def simulate(engine: Engine, engines_that_fit: int, groups: Sequence[Group], response_limit: int) -> Generation:
            """With the run's engines, which may be fewer than those that fit on its GPUs."""
            return self.simulate(engine, config.rollout.engines, groups, response_limit)

        return scale_model.estimate_step(
            job=job,
            model=self.model,
            machine=machine,
            batches=self.of_prompts(job),
            schedule=schedule,
            gpus=job_processes(config),
            trainers=config.cluster.ranks,
            sync=scale_model.sync_seconds(job, self.model, machine, disaggregated=apart),
            simulate=simulate,
            added=added,
        )

    def least(self, config: Config, simulated: bool) -> tuple[float, float]:
        """Lower bounds of the seconds of a step and of its training, under any layout of the trainer.

        The engines are on nodes of their own and generate one step ahead. If ``simulated``, the bound includes the
        whole generation, which takes a second to simulate. Otherwise it includes only the longest response.
        """
        job = self.job(config)
        machine = self.machine_for(config)
        engine = scale_model.engine_of(job, self.model, machine, disaggregated=True)
        engines = (job_processes(config) - config.cluster.ranks) // job.engine_tensor
        sync = scale_model.sync_seconds(job, self.model, machine, disaggregated=True)
        trained = []
        steps = []
        batches = self.of_prompts(job)
        for batch, size in zip(batches, self.sizes[job.prompts], strict=True):
            training = scale_model.least_training_seconds(job, self.model, size, machine, config.cluster.ranks)
            if simulated:
                generating = self.simulate(engine, engines, batch, job.response_limit).seconds
            else:
                generating = scale_model.longest_alone_seconds(engine, batch)
            trained.append(training)
            steps.append(sync + max(generating, training))
        return fmean(steps), fmean(trained)


def gpu_hours(config: Config, settings: Settings) -> list[str]:
    """Lines with the seconds of a step and the GPU hours of all steps, one for each assumption about response lengths.

    The last line names what the estimate leaves out.
    """
    if "rl" not in config.stage.trains or not capabilities(config.cluster.platform).has_gpus:
        return []
    if settings.costs is None:
        return [f"not made: conf/scale has no costs of {settings.device}"]
    scale, machine = read(settings.costs)
    limits = (config.data.max_prompt_tokens, config.rollout.max_response_tokens)
    gpus = job_processes(config)
    judges = judge_nodes(config) * (config.cluster.ranks // config.cluster.nodes)
    steps = config.algorithm.steps
    used = f"{gpus} GPUs and {judges} for the judges" if judges else f"{gpus} GPUs"
    lines = []
    for name, lengths in scale.lengths.items():
        costs = Costs(machine, model_shape(config.model.path), scale, limits, str(name))
        try:
            seconds = costs.estimate(config).seconds
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
