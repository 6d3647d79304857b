"""Search the fastest layouts that fit, for ``python -m recipes.plan``.

A layout is tried if the settings' own checks accept it and a lower bound of its memory fits. This bound also gives an
upper bound of the KV cache, and with it a lower bound of the seconds. The layouts wait in a priority queue by this
bound. When a layout is first, the models of its ranks are built without memory. They give the largest KV cache that
really fits, and with it the layout's seconds. The layout then goes back into the queue at its new place. When it is
first again, it is a result. In this way, only layouts near the best are built.

"Apart" means that the engines have nodes of their own and generate one step ahead. A division of the nodes between
trainer and engines waits in the queue with a bound that needs no layout: first from the longest response or the
trainer's operations, then from the whole generation. The layouts of its trainer are made when the division is first.
"""

import heapq
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from omegaconf import DictConfig, OmegaConf

from megatron_ext import layout
from megatron_ext.layout import RECOMPUTE, ParallelConfig, stage_layers
from recipes.config import Config, checks, job_processes, parse
from recipes.errors import ConfigError
from recipes.preflight import memory_plan, scale_model
from recipes.preflight.alternatives import (
    CONTEXT_SIZES,
    Search,
    as_override,
    layout_overrides,
    prompts_override,
    round_up,
    text_config,
)
from recipes.preflight.cost import Costs
from recipes.preflight.fit import CORNERS, STAGES, fit
from recipes.preflight.memory_plan import GIB, Judges, TrainerSizes
from recipes.preflight.report import FAILS, Report

STEP_TIME, GPUS, CONTEXT = "step_time", "gpus", "context"
GOALS = (STEP_TIME, GPUS, CONTEXT)
MOST_RESULTS = 10
# Model chunks on a pipeline rank.
MOST_VIRTUAL = 5
# Margin that is left free on a GPU, because what processes keep there is an estimate (docs/layouts.md).
KEPT_FREE_GIB = 6.0
# The importance-sampling correction for samples that are one update old, if the run has none.
CORRECTION = "token_truncated"
# A layout with the model on one rank, and an engine. If a configuration with it is impossible, the reason is another
# setting than the layout.
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
    # A run may derive the number of engines from the engines' nodes. Without such nodes it would be 0.
    "rollout.engines=1",
)


@dataclass(frozen=True)
class Plan:
    """A layout that fits.

    Attributes:
        config: the run's configuration with the layout.
        overrides: the overrides that turn the run's configuration into this one.
        seconds: seconds of a step.
        training: seconds of the trainer in a step.
        phases: seconds by phase, from ``scale_model``, and by cause, from ``layout_seconds``.
        bound: what bounds the step.
        fullest_gib: memory in use on the fullest GPU.
        fullest_phase: the phase with this memory, or "engine" for a GPU of the engines' own nodes.
        note: for what the batch is too small, or "".
    """

    config: Config
    overrides: tuple[str, ...]
    seconds: float
    training: float
    phases: Mapping[str, float]
    bound: str
    fullest_gib: float
    fullest_phase: str
    note: str

    @property
    def apart(self) -> bool:
        """Whether the engines have nodes of their own."""
        return self.config.cluster.engine_nodes > 0

    @property
    def layout(self) -> str:
        """The parallel sizes."""
        cut = self.config.parallel
        virtual = f", VP {cut.virtual_pipeline}" if cut.virtual_pipeline > 1 else ""
        data = cut.data_parallel(self.config.cluster.ranks)
        return f"TP {cut.tensor}, PP {cut.pipeline}{virtual}, CP {cut.context}, DP {data}"


def lengths_within(scale: DictConfig, limits: tuple[int, int]) -> str:
    """The name of the first lengths in the file of costs that can be truncated at the limits.

    Raises ConfigError if none can.
    """
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


@dataclass(frozen=True, order=True)
class Candidate:
    """An entry of the queue: one or several layouts, in the order of lower bounds of their seconds.

    Attributes:
        seconds: lower bound of the seconds of a step, for the run's number of prompts.
        training: lower bound of the seconds of the trainer. It decides where generation takes longer under all layouts.
        shape: what the layout's models depend on, or "" for several layouts.
        refine: makes the candidates that replace this one when it is first in the queue.
        plan: set when the layout has been built.
    """

    seconds: float
    training: float
    shape: str = field(compare=False)
    refine: Callable[[], Iterable["Candidate"]] = field(compare=False)
    plan: Plan | None = field(compare=False, default=None)


class Planner:
    """Searches the layouts of one run.

    Attributes:
        search: of the run, with the device that the run must fit.
        costs: the cost model of a step.
        parameters: number of parameters of the complete model.
        without_models: layouts that Megatron-Core builds no model for.
        apart_refused: why the engines can't have nodes of their own, or "".
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
        self.apart_refused = ""

    @property
    def nodes(self) -> int:
        """Number of nodes of the run: the trainer's and the engines'."""
        cluster = self.search.raw.cluster
        return int(cluster.nodes) + int(cluster.engine_nodes)

    @property
    def room(self) -> float:
        """GiB of a GPU that may be used."""
        return self.search.settings.device_memory_gib - KEPT_FREE_GIB

    def plans(self, goal: str) -> list[Plan]:
        """The best layouts for a goal, at most ``MOST_RESULTS``, the best first.

        For a number of nodes and a length, half of the results are colocated and half have engines apart. If there are
        too few of one kind, there are more of the other. Both kinds are shown because they are not the same algorithm.
        """
        results: list[Plan] = []
        for nodes, response in targets(goal, self.nodes, self.search.raw, self.text):
            self.search.say(f"{nodes} nodes, responses of {response} tokens")
            wanted = MOST_RESULTS - len(results)
            colocated = self.in_order(self.colocated(nodes, response))
            apart = self.in_order(self.divisions(nodes, response))
            taken = [*itertools.islice(colocated, wanted - wanted // 2), *itertools.islice(apart, wanted // 2)]
            taken += itertools.islice(itertools.chain(colocated, apart), wanted - len(taken))
            results += sorted(taken, key=lambda plan: (self.per_prompts(plan.seconds, plan.config), plan.training))
            if len(results) == MOST_RESULTS:
                break
        return results

    def colocated(self, nodes: int, response: int) -> Iterator[Candidate]:
        """The layouts with engines on the trainer's nodes."""
        return self.candidates(self.whole(nodes, 0, response), divisors(self.gpus_of_node))

    def divisions(self, nodes: int, response: int) -> Iterator[Candidate]:
        """The divisions of the nodes between trainer and engines, each with every size of an engine.

        There are none if the run's settings exclude engines apart. ``apart_refused`` then has the reason.
        """
        for trainers in range(1, nodes):
            try:
                whole = self.whole(trainers, nodes - trainers, response)
            except ConfigError as error:
                self.apart_refused = str(error)
                return
            for engine_tensor in divisors(self.gpus_of_node):
                if self.text.num_attention_heads % engine_tensor == 0:
                    yield from self.division(whole, engine_tensor)

    def division(self, whole: Config, engine_tensor: int) -> Iterator[Candidate]:
        """One candidate for all layouts of the trainer beside engines of this size.

        Nothing if the engines do not fit on their GPUs.
        """
        config = self.with_cache(with_engines(whole, engine_tensor, offload=False), [])
        if config is None:
            return

        def bound(simulated: bool, refine: Callable[[], Iterable[Candidate]]) -> Candidate:
            step, training = self.costs.least(config, simulated)
            return Candidate(step, training, "", refine)

        def simulate() -> Iterator[Candidate]:
            yield bound(True, lambda: self.candidates(whole, [engine_tensor]))

        yield bound(False, simulate)

    def whole(self, nodes: int, engine_nodes: int, response: int) -> Config:
        """The configuration for these numbers of nodes and this length of a response, under the layout ``WHOLE``.

        Raises ConfigError for settings that no layout makes possible.
        """
        raw = self.search.raw
        changed = [*self.placement(nodes, engine_nodes), f"rollout.max_response_tokens={response}"]
        on_nodes = merged(raw, [*WHOLE, *changed])
        longest = round_up(raw.data.max_prompt_tokens + response, layout.token_multiple(CONTEXT_SIZES[-1]))
        tokens = max(raw.parallel.micro_batch_tokens, longest)
        prompts = prompts_override(on_nodes, on_nodes.cluster.ranks)
        config = parse(merged(on_nodes, [f"parallel.micro_batch_tokens={tokens}", *prompts]))
        return with_prompts(config, raw.algorithm.prompts_per_step)

    def placement(self, nodes: int, engine_nodes: int) -> list[str]:
        """Overrides for these numbers of nodes of the trainer and of engines.

        Engines on nodes of their own generate one step ahead. Other engines wait for the trainer.
        """
        raw = self.search.raw
        wanted: dict[str, Any] = {"cluster.nodes": nodes, "cluster.engine_nodes": engine_nodes}
        if engine_nodes:
            wanted |= {"rollout.staleness": 1, "rollout.sleep": False, "optimizer.offload": False}
            if raw.algorithm.importance_sampling == "none":
                wanted["algorithm.importance_sampling"] = CORRECTION
        elif raw.cluster.engine_nodes or raw.rollout.staleness:
            wanted |= {"rollout.staleness": 0, "rollout.sleep": True}
        changed = changes(raw, wanted)
        ranks = nodes * self.gpus_of_node
        return changed + changes(merged(raw, changed), {"cluster.ranks": ranks})

    def in_order(self, candidates: Iterator[Candidate]) -> Iterator[Plan]:
        """Plans that fit, the fastest first. There is one for each layout of the trainer, with its best offload and
        engines."""
        numbers = itertools.count()
        queue = [(candidate, next(numbers)) for candidate in candidates]
        heapq.heapify(queue)
        done: set[str] = set()
        while queue:
            candidate, _ = heapq.heappop(queue)
            if candidate.shape in done | self.without_models:
                continue
            if candidate.plan is not None:
                done.add(candidate.shape)
                yield candidate.plan
                continue
            for refined in candidate.refine():
                heapq.heappush(queue, (refined, next(numbers)))

    @property
    def run_prompts(self) -> int:
        """The run's number of prompts of a step."""
        return int(self.search.raw.algorithm.prompts_per_step)

    def per_prompts(self, seconds: float, config: Config) -> float:
        """Seconds of a step of the configuration, scaled to the run's number of prompts."""
        return seconds * self.run_prompts / config.algorithm.prompts_per_step

    # What is tried

    def candidates(self, whole: Config, engine_tensors: Sequence[int]) -> Iterator[Candidate]:
        """Layouts whose memory may suffice, with a lower bound of their seconds."""
        offloads = [False] if whole.cluster.engine_nodes else [False, True]
        for config in self.layouts(whole):
            stages = sorted({0, config.parallel.pipeline - 1})
            least = [self.least(config, stage) for stage in stages]
            for offload, engine_tensor in itertools.product(offloads, engine_tensors):
                tried = with_engines(config, engine_tensor, offload)
                if self.text.num_attention_heads % engine_tensor or refused(tried):
                    continue
                bounded = self.bounded(tried, least)
                if bounded is not None:
                    step = self.costs.estimate(bounded)
                    yield self.candidate(step.seconds, step.training, bounded, None)

    def candidate(self, seconds: float, training: float, config: Config, plan: Plan | None) -> Candidate:
        """The queue's entry for a layout. The layout has been built if there is a plan."""

        def build() -> Iterator[Candidate]:
            built = self.build(config)
            if built is not None:
                yield self.candidate(built.seconds, built.training, built.config, built)

        seconds = self.per_prompts(seconds, config)
        training = self.per_prompts(training, config)
        return Candidate(seconds, training, repr(config.parallel), build, plan)

    def layouts(self, whole: Config) -> Iterator[Config]:
        """The run's configuration with each layout that the settings' checks and the model's checks accept.

        With engines apart, these are only layouts whose replicas share the run's prompts evenly. Other divisions of the
        nodes have other numbers of replicas, so no division has to change the batch.
        """
        from megatron_ext import model

        raw = self.search.raw
        ranks = whole.cluster.ranks
        layers = self.text.num_hidden_layers
        pipelines = sorted({*divisors(layers), raw.parallel.pipeline})
        for tensor, pipeline, context in itertools.product(divisors(self.gpus_of_node), pipelines, CONTEXT_SIZES):
            if ranks % (tensor * pipeline * context):
                continue
            for virtual in range(1, MOST_VIRTUAL + 1 if pipeline > 1 else 2):
                for recompute, outer in itertools.product(RECOMPUTE, self.outer_stages(pipeline, virtual)):
                    first, last = outer
                    sizes = self.sizes(whole.parallel, tensor, pipeline, virtual, context, recompute)
                    sizes = replace(sizes, first_stage_layers=first, last_stage_layers=last)
                    try:
                        model.check(self.search.hf_config, sizes)
                    except ValueError:
                        continue
                    config = self.with_sizes(whole, sizes)
                    changes_batch = config.algorithm.prompts_per_step != self.run_prompts
                    if whole.cluster.engine_nodes and changes_batch:
                        continue
                    if not refused(config):
                        yield config

    def outer_stages(self, pipeline: int, virtual: int) -> list[tuple[int | None, int | None]]:
        """The numbers of layers of the first and the last stage that are tried with a pipeline.

        These are an even share (None) and, with the run's own pipeline, the run's own numbers.
        """
        own = self.search.raw.parallel
        even = (None, None)
        numbers = (own.first_stage_layers, own.last_stage_layers)
        if numbers == even or (pipeline, virtual) != (own.pipeline, own.virtual_pipeline):
            return [even]
        return [even, numbers]

    def sizes(
        self, parallel: ParallelConfig, tensor: int, pipeline: int, virtual: int, context: int, recompute: str
    ) -> ParallelConfig:
        """The layout with these sizes, and with the settings that depend on them."""
        return replace(
            parallel,
            tensor=tensor,
            pipeline=pipeline,
            virtual_pipeline=virtual,
            context=context,
            sequence=tensor > 1,
            tp_comm_overlap=self.search.raw.parallel.tp_comm_overlap and tensor > 1,
            recompute=recompute,
            recompute_layers=None,
        )

    def with_sizes(self, whole: Config, sizes: ParallelConfig) -> Config:
        """The configuration with the layout, and the nearest number of prompts that its replicas share evenly."""
        replicas = sizes.data_parallel(whole.cluster.ranks) * sizes.micro_batch_multiple
        changed = prompts_override(self.search.raw, replicas)
        prompts = int(changed[0].partition("=")[2]) if changed else self.run_prompts
        return with_prompts(replace(whole, parallel=sizes), prompts)

    @property
    def gpus_of_node(self) -> int:
        return int(self.search.raw.cluster.ranks) // int(self.search.raw.cluster.nodes)

    # Memory

    def bounded(self, config: Config, least: Sequence[TrainerSizes]) -> Config | None:
        """The configuration with the largest KV cache that a lower bound of its memory leaves room for.

        None if there is no room. ``least``: lower bounds of the first and the last pipeline stage.
        """
        settings = self.search.settings
        engine = memory_plan.engine_bytes(config, self.search.hf_config, self.parameters)
        judges = self.colocated_judges(config)
        without_cache = replace(config, rollout=replace(config.rollout, kv_cache_gib=0.0))
        phases = memory_plan.on_device(config)
        ranks = [memory_plan.rank_memory(without_cache, sizes, engine, settings, judges).gib(phases) for sizes in least]
        return self.with_cache(config, ranks)

    def colocated_judges(self, config: Config) -> Judges:
        """The judges' memory on the trainer's GPUs, which is the same under all layouts."""
        if not self.judges:
            self.judges.append(memory_plan.judges(config, self.search.settings))
        return self.judges[0]

    def with_cache(self, config: Config, ranks: Sequence[Mapping[str, float]]) -> Config | None:
        """The configuration with the largest KV cache, in whole GiB, that fits beside the memory of ``ranks``.

        Engines apart have the cache on GPUs of their own. The cache is not larger than all sequences of an engine need.
        None if something does not fit, or if the cache would hold less than one sequence.

        ``ranks``: GiB by phase, without a KV cache.
        """
        from recipes.preflight import memory

        largest = math.inf
        if config.cluster.engine_nodes:
            engine = memory_plan.engine_bytes(config, self.search.hf_config, self.parameters)
            gib = memory_plan.engine_gib(config, self.search.settings, engine)
            largest = self.room - gib["vllm"] - gib["reserve"]
        for phase, names in memory_plan.on_device(config).items():
            free = self.room - max((rank[phase] for rank in ranks), default=0.0)
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
        """A lower bound of what the trainer needs on a GPU of the first or the last pipeline stage.

        It counts the decoder and the embeddings, without a vision tower, a critic and padding.
        """
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
        """The plan with the largest KV cache that fits beside the models of its ranks, or None if they do not fit."""
        report = self.report(config)
        if "ranks" in report.in_state(FAILS):
            self.without_models.add(repr(config.parallel))
        if not report.memory_gib:
            return None
        exact = self.with_cache(config, [without_cache(rank, report.phases) for rank in report.memory_gib])
        if exact is None:
            return None
        overrides = self.overrides(exact)
        # The configuration as it is read from a command line with the overrides.
        composed = self.search.config(overrides)
        if composed is None:
            return None
        report = self.report(composed)
        plan = self.plan_of(composed, overrides, report) if report.ok else None
        return plan if plan is not None and plan.fullest_gib <= self.room else None

    def plan_of(self, config: Config, overrides: Sequence[str], report: Report) -> Plan:
        """The plan of a configuration whose checks hold."""
        fullest = max(report.memory_gib, key=lambda rank: rank["total"])
        phase = max(report.phases, key=lambda phase: fullest[phase])
        gib = fullest["total"]
        if config.cluster.engine_nodes:
            assert report.engine_gib is not None
            gib, phase = max((gib, phase), (sum(report.engine_gib.values()), "engine"))
        step = self.costs.estimate(config)
        return Plan(
            config=config,
            overrides=tuple(overrides),
            seconds=step.seconds,
            training=step.training,
            phases={**step.phases, **step.added},
            bound=step.bound,
            fullest_gib=gib,
            fullest_phase=phase,
            note=step.note,
        )

    def own(self) -> tuple[Plan | None, str]:
        """The plan of the run's own layout and engines, or None and the reason if it does not fit or is impossible."""
        try:
            config = parse(self.search.raw)
        except ConfigError as error:
            return None, str(error)
        if config.rollout.staleness and not config.cluster.engine_nodes:
            return None, (
                "rollout.staleness=1 with cluster.engine_nodes=0: the cost model knows no engines that generate on the "
                "GPUs of a trainer that works"
            )
        report = self.report(config)
        if not report.ok:
            return None, "; ".join(check.detail for check in report.checks if check.state == FAILS)
        return self.plan_of(config, (), report), ""

    def report(self, config: Config) -> Report:
        """The preflight's checks of whether the configuration fits.

        A model is built for each pipeline stage that can be the fullest. If all stages have the same number of layers,
        only the first and the last stage can be the fullest. The first has the most passes in flight, and the last has
        the logits.
        """
        cut = config.parallel
        self.search.say(f"models of TP {cut.tensor}, PP {cut.pipeline}, VP {cut.virtual_pipeline}, CP {cut.context}")
        even = cut.first_stage_layers is None and cut.last_stage_layers is None
        settings = self.search.settings
        report = Report(config.recipe.name, config.stage.name, "", settings.device, settings.device_memory_gib)
        fit(config, self.search.hf_config, settings, report, part=CORNERS if even else STAGES)
        return report

    def overrides(self, config: Config) -> list[str]:
        """The overrides that turn the run's configuration into this one."""
        raw = self.search.raw
        cut = config.parallel
        changed = self.placement(config.cluster.nodes, config.cluster.engine_nodes)
        changed += layout_overrides(raw, cut.tensor, cut.pipeline, cut.context)
        changed = [override for override in changed if not override.startswith("parallel.virtual_pipeline=")]
        wanted = {
            "parallel.virtual_pipeline": cut.virtual_pipeline,
            "parallel.first_stage_layers": cut.first_stage_layers,
            "parallel.last_stage_layers": cut.last_stage_layers,
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
        # Compare with the run on the new nodes, because the number of engines may follow from them.
        return changed + changes(merged(raw, changed), wanted)


def targets(goal: str, nodes: int, raw: DictConfig, text: Any) -> Iterator[tuple[int, int]]:
    """Pairs of a number of nodes (at most ``nodes``) and the tokens of a response, best first by the goal."""
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


def changes(raw: DictConfig, wanted: Mapping[str, Any]) -> list[str]:
    """An override for each setting whose value differs from the wanted one."""
    return [as_override(name, value) for name, value in wanted.items() if OmegaConf.select(raw, name) != value]


def merged(raw: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """The composed configuration with overrides."""
    changed = OmegaConf.merge(raw, OmegaConf.from_dotlist(list(overrides)))
    assert isinstance(changed, DictConfig)
    return changed


def with_prompts(config: Config, count: int) -> Config:
    return replace(config, algorithm=replace(config.algorithm, prompts_per_step=count))


def with_engines(config: Config, tensor: int, offload: bool) -> Config:
    """The configuration with as many engines of ``tensor`` GPUs as there is room for."""
    apart = job_processes(config) - config.cluster.ranks
    rollout = replace(config.rollout, tensor=tensor, engines=(apart or config.cluster.ranks) // tensor)
    return replace(config, rollout=rollout, optimizer=replace(config.optimizer, offload=offload))


def refused(config: Config) -> bool:
    """Whether the settings' own checks refuse the layout. Only checks of what is searched here are made."""
    try:
        layout.check(config.cluster.ranks, config.parallel)
        checks.check_precision(config)
        checks.check_recompute(config)
        checks.check_overlap(config)
        checks.check_shared_memory(config)
        checks.check_engine_nodes(config)
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
