"""Layouts in the order of their seconds, each with the preflight's memory: the search of ``python -m recipes.plan``.

A layout is tried if the settings' own checks accept it and a lower bound of its memory fits. That bound also gives
the largest KV cache that could fit, and with it a lower bound of the seconds, by which the layouts are queued. The
first in the queue then gets models of its ranks without memory, the largest KV cache that really fits, and its seconds,
and goes back to its place; if it is first again, it is a result. So only layouts near the best are built.
"""

import heapq
import itertools
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from omegaconf import DictConfig, OmegaConf

from megatron_ext import layout
from megatron_ext.layout import RECOMPUTE, ParallelConfig, stage_layers
from recipes.config import Config, checks, parse
from recipes.errors import ConfigError
from recipes.preflight import cost, memory_plan, scale_model
from recipes.preflight.alternatives import (
    CONTEXT_SIZES,
    Search,
    as_override,
    layout_overrides,
    prompts_override,
    round_up,
    text_config,
)
from recipes.preflight.fit import CORNERS, STAGES, fit
from recipes.preflight.layout_seconds import Training, layout_seconds
from recipes.preflight.memory_plan import GIB, Judges, TrainerSizes
from recipes.preflight.report import FAILS, Report
from recipes.preflight.scale_model import BatchSize, Generation, Group, Machine, ModelShape, StepEstimate

STEP_TIME, GPUS, CONTEXT = "step_time", "gpus", "context"
GOALS = (STEP_TIME, GPUS, CONTEXT)
MOST_RESULTS = 10
MOST_VIRTUAL = 5  # model chunks on a pipeline rank
# Of a GPU: what processes keep is an estimate (docs/layouts.md).
KEPT_FREE_GIB = 6.0
# One rank holds the model: a layout of which only the rest of the settings can be wrong.
WHOLE = (
    "parallel.tensor=1",
    "parallel.pipeline=1",
    "parallel.virtual_pipeline=1",
    "parallel.first_stage_layers=null",
    "parallel.last_stage_layers=null",
    "parallel.context=1",
    "parallel.sequence=false",
    "parallel.recompute_layers=null",
    "parallel.tp_comm_overlap=false",
)


@dataclass(frozen=True)
class Plan:
    """A layout that fits.

    Attributes:
        config: of the run with it.
        overrides: what it changes of the run.
        seconds: of a step.
        phases: seconds by phase: ``scale_model``'s, and those of ``layout_seconds``.
        bound: what bounds the step.
        fullest_gib: on the fullest GPU.
        fullest_phase: the phase in which it is.
        note: for what the batch is too small, or "".
    """

    config: Config
    overrides: tuple[str, ...]
    seconds: float
    phases: Mapping[str, float]
    bound: str
    fullest_gib: float
    fullest_phase: str
    note: str

    @property
    def layout(self) -> str:
        """The parallel sizes."""
        cut = self.config.parallel
        virtual = f", VP {cut.virtual_pipeline}" if cut.virtual_pipeline > 1 else ""
        data = cut.data_parallel(self.config.cluster.ranks)
        return f"TP {cut.tensor}, PP {cut.pipeline}{virtual}, CP {cut.context}, DP {data}"


@dataclass
class Costs:
    """The cost model for one run: constants, the model's shape and the batches that a step is the mean of.

    ``limits``: longest prompt and response in tokens, at which the lengths are cut. A search for a longer context keeps
    them, because nobody knows how long the answers would become. ``lengths``: the name of the lengths in ``scale``.
    """

    machine: Machine
    model: ModelShape
    scale: DictConfig
    limits: tuple[int, int]
    lengths: str
    batches: dict[int, list[list[Group]]] = field(default_factory=dict)
    sizes: dict[int, list[BatchSize]] = field(default_factory=dict)
    generations: dict[tuple[Any, ...], Generation] = field(default_factory=dict)

    def of_prompts(self, job: scale_model.Job) -> list[list[Group]]:
        """Batches of as many prompts."""
        if job.prompts not in self.batches:
            lengths: Any = OmegaConf.to_container(self.scale.lengths[self.lengths])
            seeds = range(self.scale.seed, self.scale.seed + self.scale.draws)
            self.batches[job.prompts] = [scale_model.draw_batch(job, job.prompts, lengths, seed) for seed in seeds]
            self.sizes[job.prompts] = [scale_model.batch_size(batch) for batch in self.batches[job.prompts]]
        return self.batches[job.prompts]

    def simulate(
        self, engine: scale_model.Engine, engines: int, groups: Sequence[Group], response_limit: int
    ) -> Generation:
        """:func:`recipes.preflight.scale_model.simulate_generation`, once for each kind of engine: layouts share it."""
        key = (engine, engines, id(groups), response_limit)
        if key not in self.generations:
            self.generations[key] = scale_model.simulate_generation(engine, engines, groups, response_limit)
        return self.generations[key]

    def estimate(self, config: Config) -> tuple[StepEstimate, dict[str, float]]:
        """The colocated step, and what the layout adds to it."""
        prompt_limit, response_limit = self.limits
        job = replace(cost.job_of(config), prompt_limit=prompt_limit, response_limit=response_limit)
        gpus = config.cluster.ranks
        batches = self.of_prompts(job)
        sync = scale_model.sync_seconds(job, self.model, self.machine, disaggregated=False)
        step = scale_model.estimate_step(
            job=job,
            model=self.model,
            machine=self.machine,
            batches=batches,
            schedule="colocated",
            gpus=gpus,
            trainers=gpus,
            sync=sync,
            simulate=self.simulate,
        )
        added: dict[str, float] = defaultdict(float)
        for size in self.sizes[job.prompts]:
            for cause, seconds in layout_seconds(self.training(config, job, size)).items():
                added[cause] += seconds / len(batches)
        return step, dict(added)

    def training(self, config: Config, job: scale_model.Job, batch: BatchSize) -> Training:
        """The training of a batch under the configuration's layout."""
        return Training(
            sizes=config.parallel,
            offload=config.optimizer.offload,
            job=job,
            model=self.model,
            machine=self.machine,
            batch=batch,
            gpus=config.cluster.ranks,
        )


def lengths_within(scale: DictConfig, limits: tuple[int, int]) -> str:
    """The first lengths in the file of costs that can be cut at the limits. Raises ConfigError if none can."""
    refused = []
    for name, lengths in scale.lengths.items():
        try:
            for part, limit in zip((lengths.prompt, lengths.response), limits, strict=True):
                scale_model.fit_log_normal(part.mean, part.p99, limit)
            return str(name)
        except ValueError as error:
            refused.append(f"{name}: {error}")
    raise ConfigError(
        f"data.max_prompt_tokens={limits[0]}, rollout.max_response_tokens={limits[1]}: no lengths of conf/scale can be "
        f"cut there ({'; '.join(refused)}); raise them, or add lengths to the file of preflight.costs"
    )


def total_seconds(step: StepEstimate, added: Mapping[str, float]) -> float:
    """Of the step with what its layout adds."""
    return step.seconds + sum(added.values())


def bound_of(step: StepEstimate, added: Mapping[str, float]) -> str:
    """The longer of generation and training, and the cause that takes most of it."""
    layout_added = sum(added.values())
    training = scale_model.trainer_seconds(step.phases)
    if scale_model.generating_seconds(step.phases) >= training + layout_added:
        return step.bound
    causes = {cause: step.phases[cause] for cause in scale_model.TRAINING_PARTS}
    causes["arithmetic"] = training - sum(causes.values())
    causes |= added
    return f"training: {max(causes, key=lambda cause: causes[cause])}"


@dataclass(frozen=True, order=True)
class Candidate:
    """A layout in the queue, ordered by ``seconds`` for as many prompts as the run has; ``number`` breaks ties.

    ``shape``: what its models depend on. ``plan`` is set when it has been built.
    """

    seconds: float
    number: int
    shape: str = field(compare=False)
    config: Config = field(compare=False)
    plan: Plan | None = field(compare=False)


class Planner:
    """Searches the layouts of one run.

    Attributes:
        search: of the run, and the device that it is to fit.
        costs: of a step.
        parameters: of the complete model.
        without_models: layouts of which Megatron-Core builds no model.
    """

    def __init__(self, search: Search, costs: Costs) -> None:
        from recipes.preflight import simulated_ranks

        self.search = search
        self.costs = costs
        self.text = text_config(search.hf_config)
        tensors = simulated_ranks.checkpoint_tensors(search.hf_config)
        self.parameters = sum(map(math.prod, tensors.values()))
        self.without_models: set[str] = set()
        self.judges: list[Judges] = []

    @property
    def room(self) -> float:
        """GiB of a GPU that may be used."""
        return self.search.settings.device_memory_gib - KEPT_FREE_GIB

    def plans(self, goal: str) -> list[Plan]:
        """The best layouts for a goal, at most ``MOST_RESULTS``, the best first."""
        raw = self.search.raw
        results: list[Plan] = []
        for nodes, response in targets(goal, raw, self.text):
            self.search.say(f"{nodes} nodes, responses of {response} tokens")
            wanted = MOST_RESULTS - len(results)
            results += itertools.islice(self.in_order(self.whole(nodes, response)), wanted)
            if len(results) == MOST_RESULTS:
                break
        return results

    def whole(self, nodes: int, response: int) -> Config:
        """The configuration on so many nodes with responses of so many tokens, under a layout that fits any of them.

        Raises ConfigError for what no layout makes possible.
        """
        raw = self.search.raw
        overrides = [*WHOLE, f"cluster.nodes={nodes}", f"rollout.max_response_tokens={response}"]
        on_nodes = merged(raw, overrides)
        if on_nodes.cluster.ranks * raw.cluster.nodes != raw.cluster.ranks * nodes:
            raise ConfigError(
                f"cluster.ranks={raw.cluster.ranks}: goal={GPUS} wants it to follow from cluster.nodes; leave it out"
            )
        longest = round_up(raw.data.max_prompt_tokens + response, layout.token_multiple(CONTEXT_SIZES[-1]))
        tokens = max(raw.parallel.micro_batch_tokens, longest)
        prompts = prompts_override(on_nodes, on_nodes.cluster.ranks)
        config = parse(merged(on_nodes, [f"parallel.micro_batch_tokens={tokens}", *prompts]))
        return with_prompts(config, raw.algorithm.prompts_per_step)

    def in_order(self, whole: Config) -> Iterator[Plan]:
        """Layouts that fit, the fastest first; one for each trainer's layout, with its best offload and engines."""
        queue = list(self.candidates(whole))
        heapq.heapify(queue)
        numbers = itertools.count(len(queue))
        done: set[str] = set()
        while queue:
            candidate = heapq.heappop(queue)
            if candidate.shape in done | self.without_models:
                continue
            if candidate.plan is not None:
                done.add(candidate.shape)
                yield candidate.plan
                continue
            plan = self.build(candidate.config)
            if plan is not None:
                seconds = plan.seconds * self.run_prompts / plan.config.algorithm.prompts_per_step
                heapq.heappush(queue, replace(candidate, seconds=seconds, number=next(numbers), plan=plan))

    @property
    def run_prompts(self) -> int:
        """Prompts of a step as the run has them."""
        return int(self.search.raw.algorithm.prompts_per_step)

    # What is tried

    def candidates(self, whole: Config) -> Iterator[Candidate]:
        """Layouts whose memory may suffice, with a lower bound of their seconds."""
        number = itertools.count()
        for config in self.layouts(whole):
            stages = sorted({0, config.parallel.pipeline - 1})
            least = [self.least(config, stage) for stage in stages]
            for offload, engine_tensor in itertools.product((False, True), divisors(self.gpus_of_node(whole))):
                tried = with_engines(config, engine_tensor, offload)
                if self.text.num_attention_heads % engine_tensor or refused(tried):
                    continue
                bounded = self.bounded(tried, least)
                if bounded is None:
                    continue
                step, added = self.costs.estimate(bounded)
                seconds = total_seconds(step, added) * self.run_prompts / bounded.algorithm.prompts_per_step
                yield Candidate(seconds, next(number), repr(bounded.parallel), bounded, None)

    def layouts(self, whole: Config) -> Iterator[Config]:
        """The run with each layout that the settings' checks and the model's accept."""
        from megatron_ext import model

        raw = self.search.raw
        ranks = whole.cluster.ranks
        layers = self.text.num_hidden_layers
        pipelines = sorted({*divisors(layers), raw.parallel.pipeline})
        for tensor, pipeline, context in itertools.product(
            divisors(self.gpus_of_node(whole)), pipelines, CONTEXT_SIZES
        ):
            if ranks % (tensor * pipeline * context):
                continue
            for virtual in range(1, MOST_VIRTUAL + 1 if pipeline > 1 else 2):
                for recompute in RECOMPUTE:
                    sizes = self.sizes(whole.parallel, tensor, pipeline, virtual, context, recompute)
                    try:
                        model.check(self.search.hf_config, sizes)
                    except ValueError:
                        continue
                    config = self.with_sizes(whole, sizes)
                    if not refused(config):
                        yield config

    def sizes(
        self, parallel: ParallelConfig, tensor: int, pipeline: int, virtual: int, context: int, recompute: str
    ) -> ParallelConfig:
        """The layout; the outer stages' own numbers of layers stay with the run's own pipeline."""
        own = self.search.raw.parallel
        keeps = (pipeline, virtual) == (own.pipeline, own.virtual_pipeline)
        return replace(
            parallel,
            tensor=tensor,
            pipeline=pipeline,
            virtual_pipeline=virtual,
            context=context,
            sequence=tensor > 1,
            tp_comm_overlap=own.tp_comm_overlap and tensor > 1,
            recompute=recompute,
            recompute_layers=None,
            first_stage_layers=own.first_stage_layers if keeps else None,
            last_stage_layers=own.last_stage_layers if keeps else None,
        )

    def with_sizes(self, whole: Config, sizes: ParallelConfig) -> Config:
        """The configuration with the layout, and the nearest number of prompts that its replicas share evenly."""
        replicas = sizes.data_parallel(whole.cluster.ranks) * sizes.micro_batch_multiple
        changed = prompts_override(self.search.raw, replicas)
        prompts = int(changed[0].partition("=")[2]) if changed else self.run_prompts
        return with_prompts(replace(whole, parallel=sizes), prompts)

    def gpus_of_node(self, config: Config) -> int:
        return config.cluster.ranks // config.cluster.nodes

    # Memory

    def bounded(self, config: Config, least: Sequence[TrainerSizes]) -> Config | None:
        """The configuration with the largest KV cache that a lower bound of its memory leaves room for; None without
        room. ``least``: of the first and the last pipeline stage."""
        settings = self.search.settings
        engine = memory_plan.engine_bytes(config, self.search.hf_config, self.parameters)
        judges = self.colocated_judges(config)
        without_cache = replace(config, rollout=replace(config.rollout, kv_cache_gib=0.0))
        phases = memory_plan.on_device(config)
        ranks = [memory_plan.rank_memory(without_cache, sizes, engine, settings, judges).gib(phases) for sizes in least]
        return self.with_cache(config, ranks)

    def colocated_judges(self, config: Config) -> Judges:
        """The judges' memory on the trainer's GPUs, alike under all layouts."""
        if not self.judges:
            self.judges.append(memory_plan.judges(config, self.search.settings))
        return self.judges[0]

    def with_cache(self, config: Config, ranks: Sequence[Mapping[str, float]]) -> Config | None:
        """The configuration with the largest KV cache, in whole GiB, that fits beside the memory of ``ranks``; None if
        they do not fit, or it would hold less than one sequence.

        ``ranks``: GiB by phase, without a KV cache. No more than all sequences of an engine need.
        """
        from recipes.preflight import memory

        largest = math.inf
        for phase, names in memory_plan.on_device(config).items():
            free = self.room - max(rank[phase] for rank in ranks)
            if free < 0:
                return None
            if "kv_cache" in names:
                largest = min(largest, free)
        size = memory_plan.kv_cache_element_bytes(config)
        of_sequence = memory_plan.longest(config) * memory.kv_bytes_per_token(self.text, config.rollout.tensor, size)
        cache = min(math.floor(largest), math.ceil(config.rollout.max_num_seqs * of_sequence / GIB))
        if cache < 1 or cache * GIB < of_sequence:
            return None
        return replace(config, rollout=replace(config.rollout, kv_cache_gib=float(cache)))

    def least(self, config: Config, stage: int) -> TrainerSizes:
        """A lower bound of what the trainer needs on a GPU of a pipeline stage, the first or the last: the decoder and
        the embeddings, without a vision tower, a critic and padding."""
        from megatron_ext import platform
        from megatron_ext.model import Model, language_config
        from megatron_ext.models import family
        from megatron_ext.parallel import Parallel
        from megatron_ext.weight_map import sharding_of
        from recipes.preflight import memory

        cut = config.parallel
        arch = family(self.search.hf_config.architectures[0])
        sharding = sharding_of(self.text, cut.tensor, 0)
        of_model = language_config(arch, self.text, sharding, cut, config.precision, stage)
        data = cut.data_parallel(config.cluster.ranks)
        here = Parallel(cut, data, tensor_rank=0, pipeline_rank=stage, context_rank=0, data_rank=0)
        empty = Model(
            chunks=[],
            config=of_model,
            hf_config=self.search.hf_config,
            sharding=sharding,
            parallel=here,
            shards=[],
            token_multiple=cut.tensor,
            pack_tokens=None,
            padded_vision_heads=0,
        )
        pack = cut.micro_batch_tokens
        tokens = round_up(pack // cut.context, cut.tensor)
        longest = memory_plan.longest(config)
        shape = memory.Shape(tokens=tokens, predicting=tokens, sequences=pack // longest, longest=longest)
        fused_kernels = platform.capabilities(config.cluster.platform).fused_kernels

        layers = stage_layers(cut, self.text.num_hidden_layers, stage)
        tied = self.text.tie_word_embeddings
        embeddings = (stage == 0) + (stage == cut.pipeline - 1) - (tied and cut.pipeline == 1)
        decoder = layers * memory.decoder_matrices(self.text) // cut.tensor
        elements = decoder + embeddings * self.text.vocab_size * self.text.hidden_size // cut.tensor
        frozen = config.model.frozen
        trained = decoder if frozen else elements
        if any(name.startswith("decoder") for name in frozen):
            trained = 0
        size = of_model.params_dtype.itemsize
        sharing = cut.context * data
        row = shape.tokens // cut.tensor * self.text.hidden_size * size
        flights = memory.in_flight(empty, memory_plan.micro_batches(config))
        chunk = memory.layers_of_chunk(of_model, layers // cut.virtual_pipeline, shape, fused_kernels)
        chunk += row if cut.pipeline > 1 else 0
        states = (2 if size == memory.FP32 else 3) * memory.FP32
        return TrainerSizes(
            weights=elements * size,
            gradients=trained * memory.FP32,
            optimizer=trained * states // sharing,
            activations=flights * chunk + memory.remade(of_model, shape, fused_kernels),
            logits=memory.logits(empty, shape),
            micro_batches=0,
            workspace=memory.workspace(empty, shape),
            buffers=0,
            images_on_host=0,
            critic={False: (0, 0, 0), True: (0, 0, 0)},
        )

    def build(self, config: Config) -> Plan | None:
        """The plan with the largest KV cache that fits beside the models of its ranks, None if they do not fit."""
        report = self.report(config)
        if "ranks" in report.in_state(FAILS):
            self.without_models.add(repr(config.parallel))
        if not report.memory_gib:
            return None
        exact = self.with_cache(config, [without_cache(rank, report.phases) for rank in report.memory_gib])
        if exact is None:
            return None
        overrides = self.overrides(exact)
        # As a command line with the overrides is read.
        composed = self.search.config(overrides)
        if composed is None:
            return None
        report = self.report(composed)
        plan = self.plan_of(composed, overrides, report) if report.ok else None
        return plan if plan is not None and plan.fullest_gib <= self.room else None

    def plan_of(self, config: Config, overrides: Sequence[str], report: Report) -> Plan:
        """The plan of a configuration whose checks hold."""
        fullest = max(report.memory_gib, key=lambda rank: rank["total"])
        step, added = self.costs.estimate(config)
        return Plan(
            config=config,
            overrides=tuple(overrides),
            seconds=total_seconds(step, added),
            phases={**step.phases, **added},
            bound=bound_of(step, added),
            fullest_gib=fullest["total"],
            fullest_phase=max(report.phases, key=lambda phase: fullest[phase]),
            note=step.note,
        )

    def own(self) -> tuple[Plan | None, str]:
        """The run's own layout with its own engines; None and the reason if it does not fit or is impossible."""
        try:
            config = parse(self.search.raw)
        except ConfigError as error:
            return None, str(error)
        report = self.report(config)
        if not report.ok:
            return None, "; ".join(check.detail for check in report.checks if check.state == FAILS)
        return self.plan_of(config, (), report), ""

    def report(self, config: Config) -> Report:
        """The preflight's checks of whether the configuration fits, with models of a rank of each stage that can be the
        fullest: where all stages have as many layers, the first has most passes in flight, and the last the logits."""
        cut = config.parallel
        self.search.say(f"models of TP {cut.tensor}, PP {cut.pipeline}, VP {cut.virtual_pipeline}, CP {cut.context}")
        even = cut.first_stage_layers is None and cut.last_stage_layers is None
        settings = self.search.settings
        report = Report(config.recipe.name, config.stage.name, "", settings.device, settings.device_memory_gib)
        fit(config, self.search.hf_config, settings, report, part=CORNERS if even else STAGES)
        return report

    def overrides(self, config: Config) -> list[str]:
        """What a configuration changes of the run."""
        raw = self.search.raw
        cut = config.parallel
        changed = []
        if config.cluster.nodes != raw.cluster.nodes:
            changed.append(f"cluster.nodes={config.cluster.nodes}")
        changed += layout_overrides(raw, cut.tensor, cut.pipeline, cut.context)
        own = (raw.parallel.pipeline, raw.parallel.virtual_pipeline)
        if cut.pipeline == own[0] and cut.virtual_pipeline != own[1]:
            outer = ("first_stage_layers", "last_stage_layers")
            changed += [f"parallel.{name}=null" for name in outer if raw.parallel[name] is not None]
        changed = [override for override in changed if not override.startswith("parallel.virtual_pipeline=")]
        wanted = {
            "parallel.virtual_pipeline": cut.virtual_pipeline,
            "parallel.recompute": cut.recompute,
            "parallel.recompute_layers": cut.recompute_layers,
            "parallel.micro_batch_tokens": cut.micro_batch_tokens,
            "optimizer.offload": config.optimizer.offload,
            "algorithm.prompts_per_step": config.algorithm.prompts_per_step,
            "rollout.tensor": config.rollout.tensor,
            "rollout.engines": config.rollout.engines,
            "rollout.kv_cache_gib": config.rollout.kv_cache_gib,
            "rollout.max_response_tokens": config.rollout.max_response_tokens,
        }
        # On its nodes: the number of engines may follow from them.
        on_nodes = merged(raw, changed)
        for name, value in wanted.items():
            if OmegaConf.select(on_nodes, name) != value:
                changed.append(as_override(name, value))
        return changed


def targets(goal: str, raw: DictConfig, text: Any) -> Iterator[tuple[int, int]]:
    """Numbers of nodes and tokens of a response in the order in which a goal prefers them."""
    nodes = int(raw.cluster.nodes)
    response = int(raw.rollout.max_response_tokens)
    if goal == STEP_TIME:
        yield nodes, response
    elif goal == GPUS:
        for count in range(1, nodes + 1):
            yield count, response
    else:
        longest = text.max_position_embeddings - raw.data.max_prompt_tokens
        doublings = int(math.log2(longest / response)) if longest >= response else 0
        for doubling in range(doublings, -1, -1):
            yield nodes, response * 2**doubling


def merged(raw: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """The composed configuration with overrides."""
    changed = OmegaConf.merge(raw, OmegaConf.from_dotlist(list(overrides)))
    assert isinstance(changed, DictConfig)
    return changed


def with_prompts(config: Config, count: int) -> Config:
    return replace(config, algorithm=replace(config.algorithm, prompts_per_step=count))


def with_engines(config: Config, tensor: int, offload: bool) -> Config:
    """The configuration with as many engines of ``tensor`` GPUs as there is room for."""
    rollout = replace(config.rollout, tensor=tensor, engines=config.cluster.ranks // tensor)
    return replace(config, rollout=rollout, optimizer=replace(config.optimizer, offload=offload))


def refused(config: Config) -> bool:
    """Whether the settings' own checks refuse the layout: those of them that depend on what is searched here."""
    try:
        layout.check(config.cluster.ranks, config.parallel)
        checks.check_precision(config)
        checks.check_recompute(config)
        checks.check_overlap(config)
        checks.check_shared_memory(config)
        checks.check_batch(config)
        checks.check_engine_batch(config)
    except ValueError:
        return True
    return False


def without_cache(rank: Mapping[str, float], phases: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """GiB of a rank by phase, without the KV cache."""
    return {phase: rank[phase] - (rank["kv_cache"] if "kv_cache" in names else 0.0) for phase, names in phases.items()}


def divisors(count: int) -> list[int]:
    return [size for size in range(1, count + 1) if count % size == 0]
