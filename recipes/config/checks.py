"""Rules between settings of several rooms. Each room checks its own."""

from pathlib import Path

from megatron_ext import layout, optimizer_settings, precision, settings
from megatron_ext.platform.features import capabilities
from recipes.algorithms import settings as algorithm_settings
from recipes.config.launch import check_cluster
from recipes.config.schema import Config, generates, samples_per_update, sequence_multiple
from recipes.config.stages import STAGES, WITH_HEAD, check_supervised
from recipes.data import settings as data_settings
from recipes.errors import ConfigError
from rewards import settings as reward_settings
from rollout import settings as rollout_settings
from rollout import vllm_platform


def check(config: Config) -> None:
    """Raises ValueError naming the first field whose value can't work, the value and what to do."""
    settings.check(config)
    check_folder(config)
    rollout_settings.check(config.rollout, config.cluster.platform)
    algorithm_settings.check(config.algorithm)
    check_cluster(config.cluster)
    optimizer_settings.check(config.optimizer)
    layout.check(config.cluster.ranks, config.parallel)
    check_optimizer_states(config)
    precision.check(config.precision)
    reward_settings.check(config.rewards)
    check_stage(config)
    check_precision(config)
    check_recompute(config)
    check_overlap(config)
    check_samples_of_other_weights(config)
    check_shared_memory(config)
    check_engine_nodes(config)
    check_critic(config)
    check_batch(config)
    check_engine_batch(config)
    check_supervised(config.stage, sequence_multiple(config))
    data_settings.check(config.data)


def check_folder(config: Config) -> None:
    """Raises ConfigError for an impossible run_dir, and for resume and overwrite together."""
    if not config.run_dir.strip():
        raise ConfigError(f"run_dir={config.run_dir!r}: give the run's folder")
    if config.run_dir.startswith("~"):
        raise ConfigError(f"run_dir={config.run_dir!r}: nothing puts your home in place of ~ here; write $HOME")
    if config.resume and config.overwrite:
        raise ConfigError(
            "resume=true, overwrite=true: the first goes on with the folder's run, the second begins anew"
        )


def check_stage(config: Config) -> None:
    """Check that a launch does something. A model with a head for an output layer must be the only one it trains."""
    trains = config.stage.trains
    if not trains and not config.stage.ladder:
        raise ConfigError(f"stage.trains=[]: name at least one of {', '.join(STAGES)}, or give stage.ladder")
    if len(trains) > 1 and set(trains).intersection(WITH_HEAD):
        raise ConfigError(
            f"stage.trains={trains}: a reward or value model has a head in place of the output layer: give it a stage "
            "of its own"
        )


def check_optimizer_states(config: Config) -> None:
    """Check that a checkpoint can be written."""
    if not config.parallel.distributed_optimizer:
        raise ConfigError(
            "parallel.distributed_optimizer=false: a checkpoint holds the distributed optimiser's states; use true"
        )


def check_precision(config: Config) -> None:
    """FP8 needs a GPU with FP8. On a GPU, FP32 does not work with context parallelism."""
    possible = capabilities(config.cluster.platform)
    if config.precision.name == "fp8" and not possible.has_fp8:
        raise ConfigError("precision.name='fp8': needs a GPU with FP8 (H100 or newer); use precision=bf16 on a CPU")
    context = config.parallel.context
    if config.precision.name == "fp32" and context > 1 and not possible.has_fp32_context_parallel:
        raise ConfigError(
            f"precision.name='fp32', parallel.context={context}: on a GPU no attention kernel divides FP32 sequences; "
            "use parallel.context=1 or precision=bf16"
        )


def check_recompute(config: Config) -> None:
    """Refuse selective recompute of a module that would save no memory."""
    parallel = config.parallel
    selective = parallel.recompute == "selective"
    if selective and layout.CORE_ATTENTION in parallel.recompute_modules and has_fused_kernels(config):
        raise ConfigError(
            f"parallel.recompute_modules={list(parallel.recompute_modules)}: flash attention keeps no scores, and "
            "recomputed it would keep its inputs twice; use [mlp], or parallel.recompute=full"
        )


def check_overlap(config: Config) -> None:
    """Check that Transformer Engine can do what is chosen, on this platform, in this precision and on these ranks."""
    parallel = config.parallel
    for name in ("gradient_accumulation_fusion", "tp_comm_overlap"):
        if getattr(parallel, name) and not has_fused_kernels(config):
            raise ConfigError(f"parallel.{name}=true: Transformer Engine does it, on a GPU; set it false on a CPU")
    if not parallel.tp_comm_overlap:
        return
    per_node = config.cluster.ranks // config.cluster.nodes
    if per_node % parallel.tensor:
        raise ConfigError(
            f"parallel.tp_comm_overlap=true with parallel.tensor={parallel.tensor} and {per_node} ranks of a node: its "
            "buffers are within a node; use a divisor, or parallel.tp_comm_overlap=false"
        )
    precision = config.precision
    if precision.name == "fp32" or precision.recipe == "blockwise":
        shown = f"precision.recipe={precision.recipe!r}" if precision.name == "fp8" else "precision.name='fp32'"
        raise ConfigError(
            f"parallel.tp_comm_overlap=true with {shown}: Transformer Engine's buffers take BF16, and FP8 with one "
            "scale a tensor; use precision=bf16 or precision.recipe=current, or parallel.tp_comm_overlap=false"
        )


def has_fused_kernels(config: Config) -> bool:
    return capabilities(config.cluster.platform).fused_kernels


def check_samples_of_other_weights(config: Config) -> None:
    """Samples from other weights than the trainer's need importance sampling."""
    rollout = config.rollout
    corrected = config.algorithm.importance_sampling != "none"
    if (rollout.staleness or rollout.partial_rollout_tokens) and not corrected:
        field = "staleness=1" if rollout.staleness else f"partial_rollout_tokens={rollout.partial_rollout_tokens}"
        raise ConfigError(
            f"rollout.{field}: samples come from older weights; correct for it: "
            "algorithm.importance_sampling=token_truncated"
        )
    rounded = []
    if rollout.quantization is not None:
        rounded.append((f"quantization={rollout.quantization!r}", "weights"))
    if rollout.kv_cache_dtype == "fp8":
        rounded.append(("kv_cache_dtype='fp8'", "keys and values"))
    for field, what in rounded:
        if config.precision.name == "fp32" or not corrected:
            raise ConfigError(
                f"rollout.{field}: samples come from rounded {what}: needs precision=bf16 (or fp8), and correct for "
                "it: algorithm.importance_sampling=token_truncated"
            )


def check_shared_memory(config: Config) -> None:
    """Check that trainer, engines and judges can make room for each other on the GPUs that they share."""
    rollout = config.rollout
    colocated = config.rewards.placement == reward_settings.COLOCATED
    for field, chosen in (
        ("optimizer.offload=true", config.optimizer.offload),
        ("rewards.placement=colocated", colocated),
    ):
        if chosen and rollout.staleness:
            raise ConfigError(f"{field}: needs rollout.staleness=0 (with 1 it generates while it trains)")
    if colocated and capabilities(config.cluster.platform).can_sleep and not rollout.sleep:
        raise ConfigError("rewards.placement=colocated: engines make room for judges: needs rollout.sleep=true")


def check_engine_nodes(config: Config) -> None:
    """Engines on nodes of their own do not share memory. Settings that make room for them are refused."""
    nodes = config.cluster.engine_nodes
    if not nodes:
        return
    for field, chosen, remedy in (
        ("rollout.sleep=true", config.rollout.sleep, "false"),
        ("optimizer.offload=true", config.optimizer.offload, "false"),
        (
            "rewards.placement=colocated",
            config.rewards.placement == reward_settings.COLOCATED,
            reward_settings.DISAGGREGATED,
        ),
    ):
        if chosen:
            raise ConfigError(
                f"{field}: makes room on the trainer's nodes for engines or judges, and with cluster.engine_nodes="
                f"{nodes} the engines are on other nodes; use {field.split('=')[0]}={remedy}"
            )
    if config.cluster.ranks % config.cluster.nodes:
        raise ConfigError(
            f"cluster.ranks={config.cluster.ranks}, cluster.nodes={config.cluster.nodes}: with cluster.engine_nodes "
            "every node has as many processes; use a multiple"
        )


def check_critic(config: Config) -> None:
    """Check that the critic's folder exists, and that its warm-up leaves steps in which the policy is trained."""
    path = config.critic.path
    if path is not None and not (Path(path) / "config.json").is_file():
        raise ConfigError(
            f"critic.path={path!r}: no config.json there: give a Hugging Face folder, or null for the policy's"
        )
    if config.critic.warmup_steps >= config.algorithm.steps:
        raise ConfigError(
            f"critic.warmup_steps={config.critic.warmup_steps}: the policy is trained in what is left of "
            f"algorithm.steps={config.algorithm.steps}; use 0 or more, and fewer than these"
        )


def check_batch(config: Config) -> None:
    """Check that the longest sequence fits into a micro-batch and that data-parallel ranks share an update evenly."""
    multiple = config.parallel.token_multiple
    tokens = config.data.max_prompt_tokens + config.rollout.max_response_tokens
    longest = -(-tokens // multiple) * multiple
    if config.parallel.micro_batch_tokens < longest:
        raise ConfigError(
            f"parallel.micro_batch_tokens={config.parallel.micro_batch_tokens}: the longest sequence has {longest} "
            "tokens (data.max_prompt_tokens + rollout.max_response_tokens, cut for parallel.context); use at least that"
        )
    samples = samples_per_update(config)
    if samples % sequence_multiple(config):
        stages = ""
        if config.parallel.virtual_pipeline > 1:
            stages = ", times the pipeline's stages for parallel.virtual_pipeline"
        raise ConfigError(
            f"algorithm.prompts_per_step x samples_per_prompt / updates_per_rollout={samples}: use a multiple of "
            f"{sequence_multiple(config)}, the data-parallel ranks{stages}"
        )


def check_engine_batch(config: Config) -> None:
    """Check that an engine's step has room for one token of every sequence and its draft tokens.

    On a platform whose engines do not split prompts, the step also needs room for a complete sequence.
    """
    if not generates(config):
        return
    rollout = config.rollout
    least = rollout.max_num_seqs * rollout.speculative.step_tokens
    if not vllm_platform.of(config.cluster.platform).splits_prompts:
        least = max(least, config.data.max_prompt_tokens + rollout.max_response_tokens)
    if rollout.max_num_batched_tokens < least:
        raise ConfigError(
            f"rollout.max_num_batched_tokens={rollout.max_num_batched_tokens}: use at least {least} "
            "(rollout.max_num_seqs, times 1 + rollout.speculative.draft_tokens with rollout.speculative.method; on a "
            "CPU data.max_prompt_tokens + rollout.max_response_tokens)"
        )
