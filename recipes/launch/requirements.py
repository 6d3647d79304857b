"""Check what a run needs in addition to valid settings: data rows, parts of the algorithm, verifiers, servers."""

import os

from megatron_ext.platform.features import capabilities
from recipes.config import Config, engines_of_a_node, generates, nodes_with_engines
from recipes.config.stages import learned_principles
from recipes.errors import ConfigError

ENGINE_GIB = 0.5  # host memory that a vLLM process needs at least, without weights and KV cache


def check_supervised(config: Config) -> None:
    """Read the rows that SFT, reward models and value models train on. Raises ConfigError with file, line and field."""
    from recipes.data.rows import PAIR_FIELDS, load_rows
    from recipes.data.sft_examples import load_sft_rows
    from recipes.data.value_examples import load_rollouts

    if "sft" in config.stage.trains:
        for path in filter(None, (config.data.sft, config.stage.sft.held_out)):
            load_sft_rows(path, config.stage.sft.judge)
    if "reward_model" in config.stage.trains:
        for path in (config.stage.reward_model.pairs, config.stage.reward_model.held_out):
            load_rows(path, PAIR_FIELDS)
    if "value_model" in config.stage.trains:
        settings = config.stage.value_model
        principles = learned_principles(settings.principles)
        prompts = load_rows(config.data.prompts)
        load_rollouts(settings.rollouts, prompts, principles, settings.held_out_share, config.seed)


def check_parts(config: Config) -> None:
    """Load the algorithm's parts, the verifiers, the environment and the data, and try the verifiers on the data.

    Raises ConfigError with the field.
    """
    from recipes.algorithms.registry import REGISTRY, resolve
    from recipes.data.row_order import curriculum_phases, scheduled
    from recipes.data.rows import load_rows
    from recipes.data.source_spec import source_names
    from recipes.launch.trial import try_verifiers
    from rewards import mixing, registry
    from rewards.client import Client
    from rollout.environment import open_environment

    check_memory(config)
    check_compiler(config)
    for name in REGISTRY:
        resolve(name, config.algorithm)
    rows = load_rows(config.data.prompts)
    held_out = load_rows(config.data.evaluation)
    scheduled(rows, curriculum_phases(config.data), 0, config.algorithm.prompts_per_step, config.seed)
    try:
        names = {*mixing.verifier_names(config.rewards.mix), *config.data.scores}
        with Client(registry.servers_of(names, config.rewards), config.rewards.client) as client:
            verifiers = registry.open_verifiers(names, config.rewards, client)
            try_verifiers(config, verifiers, rows, held_out)
        environment = config.rollout.environment
        if environment.name is not None:
            open_environment(environment.name, environment.settings)
    except ValueError as error:
        fields = "" if str(error).startswith(("rollout.", "rewards.verifiers.")) else "rewards.mix, data.scores: "
        raise ConfigError(f"{fields}{error}") from error
    for name, wanted in config.data.scores.items():
        if not set(held_out.kinds).intersection(wanted):
            raise ConfigError(
                f"data.scores.{name}={wanted}: {source_names(config.data.evaluation)} has rows of the kinds "
                f"{sorted(held_out.kinds)} only; name one of these or drop the score"
            )


def check_compiler(config: Config) -> None:
    """Check that attention with shared prompts can be compiled on GPUs.

    Raises ConfigError if the environment turns compilation off, because torch would then compute all attention scores
    of a pack one by one.
    """
    if not (config.parallel.shared_prompts and capabilities(config.cluster.platform).has_gpus):
        return
    for variable in ("TORCH_COMPILE_DISABLE", "TORCHDYNAMO_DISABLE"):
        if os.environ.get(variable, "0") == "1":
            raise ConfigError(
                f"parallel.shared_prompts=true: needs torch.compile, which {variable}=1 in the environment turns off; "
                "unset it, or use parallel.shared_prompts=null"
            )


def check_memory(config: Config) -> None:
    """On CPUs, check that the engines of a node fit into this machine's memory. Raises ConfigError."""
    if capabilities(config.cluster.platform).has_gpus or not generates(config):
        return
    engines = engines_of_a_node(config, nodes_with_engines(config))
    each = config.rollout.kv_cache_gib + ENGINE_GIB
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    if engines * each > memory:
        raise ConfigError(
            f"rollout.engines={config.rollout.engines}: {engines} on a node need more than {engines * each:.0f} GiB "
            f"(rollout.kv_cache_gib={config.rollout.kv_cache_gib:g} and vLLM's {ENGINE_GIB:g} each, beside weights), "
            f"this machine has {memory:.0f}: use at most {int(memory / each) * nodes_with_engines(config)}"
        )


def check_servers(config: Config) -> None:
    """Check that the verifiers' servers and the environment respond. Raises ConfigError naming those that do not."""
    from rewards import mixing, registry
    from rewards.client import Client
    from rollout.environment import Unavailable, open_environment

    names = {*mixing.verifier_names(config.rewards.mix), *config.data.scores}
    try:
        with Client(registry.servers_of(names, config.rewards), config.rewards.client) as client:
            client.check()
        environment = config.rollout.environment
        if environment.name is not None:
            open_environment(environment.name, environment.settings).check()
    except (ValueError, Unavailable) as error:
        raise ConfigError(str(error)) from error
