"""Find settings, layouts and numbers of nodes with which a run fits. Every proposal has passed ``fit.fit``."""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations, islice
from typing import Any

from omegaconf import DictConfig, OmegaConf

from megatron_ext.platform import capabilities
from recipes.config import Config, generates, parse
from recipes.errors import ConfigError
from recipes.preflight import memory_plan
from recipes.preflight.fit import ALL, CORNERS, SHAPES, fit
from recipes.preflight.report import FAILS, Proposal, Report, Settings
from rewards import placement
from rewards.settings import COLOCATED, DISAGGREGATED

KV_CACHE = "rollout.kv_cache_gib"
OFFLOAD = "optimizer.offload=true"
RECOMPUTE = "parallel.recompute=full"
# Settings that each layout is tried with, in this order.
WITH = ((), (OFFLOAD,), (RECOMPUTE,), (OFFLOAD, RECOMPUTE))
# Settings that are changed together.
MOST_SETTINGS = 3
# Proposals under one title.
MOST_PROPOSALS = 3
CONTEXT_SIZES = (1, 2, 4, 8)
# Numbers of nodes that are tried, both above and below the run's.
NODES_TRIED = 16
Say = Callable[[str], None]


class Search:
    """Tries overrides of one run.

    Attributes:
        raw: the composed configuration of the run.
        settings: the group ``preflight``.
        hf_config: transformers' configuration of the run's model.
        say: called with what is tried next.
    """

    def __init__(self, raw: DictConfig, settings: Settings, hf_config: Any, say: Say) -> None:
        self.raw = raw
        self.settings = settings
        self.hf_config = hf_config
        self.say = say

    def config(self, overrides: Sequence[str]) -> Config | None:
        """The configuration with the overrides, or None if it is impossible."""
        try:
            changed = OmegaConf.merge(self.raw, OmegaConf.from_dotlist(list(overrides)))
            assert isinstance(changed, DictConfig)
            return parse(changed)
        except ConfigError:
            return None

    def report(self, overrides: Sequence[str], part: str) -> Report | None:
        """The results of :func:`recipes.preflight.fit.fit` with the overrides, or None if they are impossible."""
        config = self.config(overrides)
        if config is None:
            return None
        report = Report(
            config.recipe.name, config.stage.name, "", self.settings.device, self.settings.device_memory_gib
        )
        fit(config, self.hf_config, self.settings, report, part=part)
        return report

    def proposal(self, overrides: Sequence[str]) -> Proposal | None:
        """A proposal of the overrides if every check holds with them, otherwise None."""
        self.say(f"does it fit with {' '.join(overrides)}")
        report = None
        # Only two ranks first: most overrides that do not fit already fail with these.
        for part in (CORNERS, ALL):
            report = self.report(overrides, part)
            if report is None or not report.ok:
                return None
        assert report is not None and report.layout is not None
        cut = report.layout
        sizes = f"tensor {cut['tensor']} x pipeline {cut['pipeline']} x context {cut['context']} x data {cut['data']}"
        fullest = max(rank["total"] for rank in report.memory_gib)
        return Proposal(tuple(overrides), f"{sizes}, at most {fullest:.1f} GiB")


def propose(raw: DictConfig, config: Config, hf_config: Any, settings: Settings, report: Report, say: Say) -> None:
    """Add proposals to the report: what fits if the run does not, and the best use of ``preflight.nodes``."""
    search = Search(raw, settings, hf_config, say)
    failed = set(report.in_state(FAILS)) & set(SHAPES)
    if failed and failed <= {"memory", "host_memory"}:
        candidates = settings_to_try(config, settings, report)
        proposals = settings_that_fit(search, config, candidates)
        names = ", ".join(candidates) or "the settings that save memory"
        none = f"It does not fit with {names}, nor with up to {MOST_SETTINGS} of them together"
        report.proposals["It fits with" if proposals else none] = proposals
        if not proposals:
            report.proposals |= layouts_that_fit(search, raw)
    elif failed & {"attention_heads", "layout", "ranks", "batch"}:
        report.proposals = layouts_that_fit(search, raw)
    if settings.nodes is not None:
        title, proposals = use_of_nodes(search, raw, config, settings.nodes)
        report.proposals[title] = proposals


def propose_layouts(raw: DictConfig, settings: Settings, report: Report, say: Say) -> None:
    """Add layouts and numbers of nodes that fit to the report of a configuration that could not be parsed.

    Nothing is added unless the number of ranks is what makes the configuration impossible.
    """
    from recipes.preflight import simulated_ranks
    from recipes.preflight.architecture import model_config

    cut = raw.parallel
    sizes = (raw.cluster.ranks, cut.tensor, cut.pipeline, cut.context)
    if not all(isinstance(size, int) and size > 0 for size in sizes):
        return
    replica = cut.tensor * cut.pipeline * cut.context
    if raw.cluster.ranks % replica == 0 and not prompts_override(raw, raw.cluster.ranks // replica):
        return
    try:
        hf_config = model_config(str(raw.model.path))
    except (ValueError, OSError):
        return
    simulated_ranks.activate()
    report.proposals = layouts_that_fit(Search(raw, settings, hf_config, say), raw)


def settings_that_fit(search: Search, config: Config, candidates: Sequence[str]) -> list[Proposal]:
    """The smallest combinations of the candidates with which the run fits, at most ``MOST_PROPOSALS`` of them.

    The list is empty if more than ``MOST_SETTINGS`` candidates would be needed.
    """
    for count in range(1, MOST_SETTINGS + 1):
        proposals = []
        for chosen in combinations(candidates, count):
            overrides = with_kv_cache(search, config, chosen) if KV_CACHE in chosen else chosen
            proposal = search.proposal(overrides) if overrides else None
            if proposal is not None:
                proposals.append(proposal)
        if proposals:
            return proposals[:MOST_PROPOSALS]
    return []


def settings_to_try(config: Config, settings: Settings, report: Report) -> list[str]:
    """Overrides that save memory in a phase that does not fit, the cheapest first."""
    room = settings.device_memory_gib
    phases = [phase for phase in report.phases if any(rank[phase] > room for rank in report.memory_gib)]
    on_host = {
        name for sizes in report.host_gib.values() if sum(sizes.values()) > settings.host_memory_gib for name in sizes
    }
    longest = round_up(memory_plan.longest(config), config.parallel.token_multiple)
    can_sleep = capabilities(config.cluster.platform).can_sleep and generates(config)
    has_critic = memory_plan.needed(config).values
    outside_training = [phase for phase in phases if phase != "training"]
    tried = {
        "rollout.sleep=true": phases and can_sleep and not config.rollout.sleep,
        "critic.offload=true": phases and has_critic and not config.critic.offload,
        "critic.offload=false": "critic" in on_host and config.critic.offload,
        OFFLOAD: outside_training and not config.optimizer.offload,
        "optimizer.offload=false": "optimizer" in on_host and config.optimizer.offload,
        KV_CACHE: "generating" in phases,
        RECOMPUTE: "training" in phases and config.parallel.recompute != "full",
        f"parallel.micro_batch_tokens={longest}": "training" in phases and longest < config.parallel.micro_batch_tokens,
        f"rewards.placement={DISAGGREGATED}": (phases or "judges" in on_host) and config.rewards.placement == COLOCATED,
    }
    return [override for override, helps in tried.items() if helps]


def round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def with_kv_cache(search: Search, config: Config, chosen: Sequence[str]) -> list[str]:
    """The settings with the largest KV cache, in whole GiB, that fits beside them. Empty if not even 1 GiB fits."""
    others = [override for override in chosen if override != KV_CACHE]
    report = search.report(others, ALL)
    if report is None or not report.memory_gib:
        return []
    fullest = max(rank["generating"] for rank in report.memory_gib)
    cache = math.floor(config.rollout.kv_cache_gib - max(0.0, fullest - search.settings.device_memory_gib))
    return [*others, f"{KV_CACHE}={cache}"] if 1 <= cache < config.rollout.kv_cache_gib else []


def layouts_that_fit(search: Search, raw: DictConfig) -> dict[str, list[Proposal]]:
    """Layouts for the run's ranks, the nearest first, and the nearest numbers of nodes for the run's layout."""
    nodes, cut = raw.cluster.nodes, raw.parallel
    has_gpus = capabilities(str(raw.cluster.platform)).has_gpus
    machines = f"{nodes} nodes of {raw.cluster.ranks // nodes} GPUs" if has_gpus else f"{raw.cluster.ranks} ranks"
    layouts = list(islice(nearest_layouts(search, raw, raw.cluster.ranks), MOST_PROPOSALS))
    by_title = {f"On {machines} it fits with" if layouts else f"On {machines} no layout fits": layouts}
    if has_gpus:
        sizes = f"tensor {cut.tensor} x pipeline {cut.pipeline} x context {cut.context}"
        on_nodes = [
            proposal
            for direction in (range(nodes - 1, 0, -1), range(nodes + 1, nodes + NODES_TRIED + 1))
            if (proposal := first_of_nodes(search, raw, direction[:NODES_TRIED])) is not None
        ]
        none = f"With {sizes} it fits on no number of nodes up to {NODES_TRIED} more or fewer"
        by_title[f"With {sizes} it fits on" if on_nodes else none] = on_nodes
    return by_title


def first_of_nodes(search: Search, raw: DictConfig, counts: Sequence[int]) -> Proposal | None:
    """A proposal of the first of the numbers of nodes on which the run's layout fits, or None."""
    cut = raw.parallel
    per_node = raw.cluster.ranks // raw.cluster.nodes
    replica = cut.tensor * cut.pipeline * cut.context
    for count in counts:
        ranks = count * per_node
        cuts = cut.tensor * cut.pipeline
        if ranks % replica or too_large(search, raw, cuts, ranks // cuts):
            continue
        prompts = prompts_override(raw, ranks // replica)
        for more in extras(raw):
            proposal = search.proposal([*of_nodes(raw, count), *prompts, *more])
            if proposal is not None:
                return proposal
    return None


def of_nodes(raw: DictConfig, count: int) -> list[str]:
    """Overrides for ``count`` nodes of the trainer.

    The recipes' ``cluster.ranks`` follows ``cluster.nodes``. A number on the command line, which a job always has, does
    not.
    """
    overrides = [f"cluster.nodes={count}"]
    ranks = raw.cluster.ranks // raw.cluster.nodes * count
    follows = OmegaConf.merge(raw, {"cluster": {"nodes": count}}).cluster.ranks == ranks
    return overrides if follows else [*overrides, f"cluster.ranks={ranks}"]


def extras(raw: DictConfig) -> Iterator[tuple[str, ...]]:
    """The entries of ``WITH`` without a setting that the run already has."""
    has = {OFFLOAD: bool(raw.optimizer.offload), RECOMPUTE: raw.parallel.recompute == "full"}
    for overrides in WITH:
        if not any(has[override] for override in overrides):
            yield overrides


def nearest_layouts(search: Search, raw: DictConfig, ranks: int, more: Sequence[str] = ()) -> Iterator[Proposal]:
    """Proposals of layouts for ``ranks`` ranks, the nearest to the run's layout first.

    The overrides ``more`` are added to each. Doubling or halving a size counts as one step away from the run's layout.
    If the data-parallel size does not divide the batch, the number of prompts is changed, which counts as two steps.
    """
    cut = raw.parallel
    per_node = raw.cluster.ranks // raw.cluster.nodes
    tensors = [size for size in range(1, per_node + 1) if per_node % size == 0]
    text = text_config(search.hf_config)
    pipelines = [size for size in range(1, text.num_hidden_layers + 1) if text.num_hidden_layers % size == 0]
    if cut.pipeline not in pipelines and (cut.first_stage_layers or cut.last_stage_layers):
        pipelines.append(cut.pipeline)
    layouts = []
    for tensor in tensors:
        for pipeline in pipelines:
            for context in CONTEXT_SIZES:
                replica = tensor * pipeline * context
                if ranks % replica or too_large(search, raw, tensor * pipeline, ranks // (tensor * pipeline)):
                    continue
                prompts = prompts_override(raw, ranks // replica)
                sizes = zip((tensor, pipeline, context), (cut.tensor, cut.pipeline, cut.context), strict=True)
                distance = sum(abs(math.log2(new / old)) for new, old in sizes) + (2 if prompts else 0)
                overrides = [*more, *layout_overrides(raw, tensor, pipeline, context), *prompts]
                layouts.append((distance, overrides))
    for _, overrides in sorted(layouts, key=lambda layout: layout[0]):
        for with_settings in extras(raw):
            proposal = search.proposal([*overrides, *with_settings])
            if proposal is not None:
                yield proposal
                break


def text_config(hf_config: Any) -> Any:
    """The language model's part of transformers' configuration."""
    from megatron_ext.models import family

    return family(hf_config.architectures[0]).text_config(hf_config)


def too_large(search: Search, raw: DictConfig, cuts: int, sharing: int) -> bool:
    """Whether the decoder's weights, gradients and optimiser states alone exceed the memory of a GPU.

    Args:
        search: of the run.
        raw: the composed configuration of the run.
        cuts: ranks that the weights are sharded over.
        sharing: ranks that share the optimiser states of the same weights.
    """
    from recipes.preflight import memory

    if any(str(name).startswith("decoder") for name in raw.model.frozen):
        return False
    text = text_config(search.hf_config)
    weights = text.num_hidden_layers * memory.decoder_matrices(text) / cuts
    states = weights * (memory_plan.BF16 + memory.FP32 + 3 * memory.FP32 / sharing)
    return states / memory_plan.GIB > search.settings.device_memory_gib - search.settings.context_gib


def layout_overrides(raw: DictConfig, tensor: int, pipeline: int, context: int) -> list[str]:
    """The overrides with which a layout differs from the run's."""
    cut = raw.parallel
    new: dict[str, Any] = {"tensor": tensor, "pipeline": pipeline, "context": context, "sequence": tensor > 1}
    new["tp_comm_overlap"] = cut.tp_comm_overlap and tensor > 1
    if pipeline != cut.pipeline:
        new |= {"virtual_pipeline": 1, "first_stage_layers": None, "last_stage_layers": None, "recompute_layers": None}
    return [as_override(f"parallel.{name}", value) for name, value in new.items() if cut[name] != value]


def as_override(name: str, value: Any) -> str:
    """The override that gives a setting a value on the command line."""
    if value is None:
        return f"{name}=null"
    return f"{name}={str(value).lower() if isinstance(value, bool) else value}"


def prompts_override(raw: DictConfig, replicas: int) -> list[str]:
    """The override of ``algorithm.prompts_per_step`` with which ``replicas`` share the samples of an update evenly.

    It is the value nearest to the run's. The list is empty if the run's own value is already such a value, and for a
    stage without RL.
    """
    if "rl" not in raw.stage.trains:
        return []
    algorithm = raw.algorithm
    prompts = algorithm.prompts_per_step
    for distance in range(replicas * algorithm.updates_per_rollout + 1):
        for count in (prompts - distance, prompts + distance):
            samples = count * algorithm.samples_per_prompt
            if count > 0 and samples % (algorithm.updates_per_rollout * replicas) == 0:
                return [f"algorithm.prompts_per_step={count}"] if distance else []
    return []


def judge_nodes(config: Config) -> int:
    """Number of nodes that only run the judges' servers. Each has as many GPUs as a node of the trainer.

    It is 0 if the servers are on the trainer's nodes, either colocated or from ``rewards.supervisor.first_device`` on.
    Raises ConfigError for a server that needs more GPUs than a node has.
    """
    rewards = config.rewards
    servers = placement.servers_to_start(rewards) if generates(config) else []
    has_gpus = capabilities(config.cluster.platform).has_gpus
    if not servers or not has_gpus or rewards.placement == COLOCATED or rewards.supervisor.first_device:
        return 0
    gpus = config.cluster.ranks // config.cluster.nodes
    count = placement.least_hosts(servers, gpus)
    if count is not None:
        return count
    largest = max(servers, key=lambda server: server.replicas * server.tensor)
    field = f"rewards.servers.{largest.name}"
    raise ConfigError(
        f"{field}: replicas={largest.replicas} x tensor={largest.tensor} is more than a node's {gpus} GPUs; use fewer "
        f"replicas, or {field}.tensor={gpus}"
    )


def use_of_nodes(search: Search, raw: DictConfig, config: Config, nodes: int) -> tuple[str, list[Proposal]]:
    """A title, and layouts for the largest number of trainer nodes with which something fits.

    The nodes of the judges and of the engines are subtracted from ``nodes`` first.
    """
    judges = judge_nodes(config)
    engines = config.cluster.engine_nodes
    others = f"{judges} for the judges"
    if engines:
        others += f" and {engines} for the engines"
    per_node = raw.cluster.ranks // raw.cluster.nodes
    for count in range(nodes - judges - engines, 0, -1):
        proposals = list(islice(nearest_layouts(search, raw, count * per_node, of_nodes(raw, count)), MOST_PROPOSALS))
        if proposals:
            title = f"Of {nodes} nodes, {others}, most are used with"
            return title, proposals
    return f"Of {nodes} nodes, {others}, none is used by a layout that fits", []
