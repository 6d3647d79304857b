"""Opens the policy, the rollouts and the run of a launch. They are closed however the launch ends."""

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import yaml

from megatron_ext import hf_checkpoint, parallel, platform, worlds
from megatron_ext import model as models
from megatron_ext.blocks import Shard
from megatron_ext.checkpoint import Saver
from megatron_ext.collectives import from_rank_zero, on_all_ranks
from megatron_ext.offload import HostCopy, release_gradients
from megatron_ext.packing import cost_of
from megatron_ext.scalar_head import scalar_config
from recipes.config import Config, generates, job_processes
from recipes.config.resume import differences
from recipes.data.processor import PromptProcessor
from recipes.run import folder as run_folder
from recipes.run import logs, records
from recipes.run.clock import PhaseClock
from recipes.run.display import Display
from recipes.run.exports import trained_head
from recipes.run.loggers import open_loggers
from recipes.run.preemption import Preempted
from recipes.run.run import Run
from recipes.run.watchdog import NOTICE, Watchdog
from recipes.training.engines import Judging, engine_settings, open_judging, record_restart
from recipes.training.policy import Policy, UpdateGuard
from recipes.training.rollouts import Rollouts, wait_until_ready
from rewards import mixing, settings
from rollout.engine import Engine, EngineSettings, stop_engines
from rollout.engine_nodes import END, EngineNodes
from rollout.weight_sync.sync import WeightSync

PLANS = Path("build/weight_sync")  # plans of weight syncs, by the hash of their inputs


@dataclass(frozen=True)
class Training:
    """One launch on this rank."""

    config: Config
    policy: Policy
    # None for stages that do not generate.
    rollouts: Rollouts | None
    run: Run
    processor: PromptProcessor


@contextmanager
def open_training(config: Config) -> Iterator[Training]:
    """Collective: build the trainer and start the engines, then plan the weight sync from trainer to engines.

    The engines start while the trainer reads its weights.
    """
    run_dir = Path(config.run_dir)
    rank = int(os.environ["RANK"])
    logs.redirect_output(run_dir / "logs", rank)
    node, nodes = node_with_engines(config)
    apart = config.cluster.engine_nodes > 0
    # The first rank of a node starts the node's engines, and responses are judged where the engines are.
    starts_engines = generates(config) and not apart and int(os.environ["LOCAL_RANK"]) == 0
    engines_to_start = engine_settings(config, nodes) if starts_engines else []

    with ExitStack() as stack:
        display = stack.enter_context(Display(active=rank == 0))
        judging = open_judging(config, names_of_verifiers(config), stack) if starts_engines else Judging(None, {}, None)

        with display.stage("trainer: process groups, Megatron-Core model"):
            torch.set_num_threads(config.cluster.threads)
            engine_nodes = join_engine_nodes(config) if apart else None
            groups = parallel.initialize(config.parallel, config.seed, config.cluster.timeout)
            stack.push(leave_groups)
            if engine_nodes is not None:
                stack.push(partial(end_engine_nodes, engine_nodes))
            control = parallel.control_group()
            # Remove the notice of an earlier launch before any watchdog starts, those of the engines' nodes included.
            from_rank_zero(lambda: (run_dir / "logs" / NOTICE).unlink(missing_ok=True), control)
            model = build_model(config, groups)

        # Only after the model has been built: the engines may use the memory that its gradients had.
        engines = start_engines(engines_to_start, node, run_dir, stack)

        with display.stage("trainer: weights"):
            hf_checkpoint.load(model.shards, config.model.path)
            processor = PromptProcessor(config.model.path, config.data.max_prompt_tokens, config.data.images)

        weight_sync = None
        if generates(config):
            syncing = control if engine_nodes is None else engine_nodes.group
            weight_sync = open_weight_sync(config, model.shards, engines, syncing, display)

        run = open_run(config, rank, control, display, stack)
        policy = make_policy(config, groups, model, processor, run)
        rollouts = None
        if weight_sync is not None:
            rollouts = Rollouts(
                config=config.rollout,
                seed=config.seed,
                tokenizer=processor.tokenizer,
                engines=engines,
                weight_sync=weight_sync,
                control=control,
                node=node,
                nodes=nodes,
                verifiers=judging.verifiers,
                client=judging.client,
                turns=judging.turns,
                judges_share_gpus=config.rewards.placement == settings.COLOCATED,
                make_room=keep_memory if apart else policy.release_memory,
                heartbeat=run.clock.watchdog.beat,
                on_restart=partial(record_restart, run_dir),
                engine_nodes=engine_nodes,
            )
            # The engines sleep until the first sync, while optimiser and critic are built.
            rollouts.sleep()
        yield Training(config, policy, rollouts, run, processor)


def node_with_engines(config: Config) -> tuple[int, int]:
    """The index of this process's node among the nodes that have engines, and the number of these nodes.

    With ``cluster.engine_nodes`` the engines' nodes follow the trainer's. The trainer's ranks then get the index of the
    first of them, 0.
    """
    node = int(os.environ["GROUP_RANK"])
    if config.cluster.engine_nodes:
        return max(0, node - config.cluster.nodes), config.cluster.engine_nodes
    return node, int(os.environ["GROUP_WORLD_SIZE"])


def names_of_verifiers(config: Config) -> set[str]:
    """The names of the verifiers of the rewards and of those that score held-out answers."""
    return {*mixing.verifier_names(config.rewards.mix), *config.data.scores}


def join_engine_nodes(config: Config) -> EngineNodes:
    """Collective over all processes of the job: create the worlds and the group of a job with engines' nodes.

    The trainer's ranks form one world and the other processes another. The group has all processes.
    """
    worlds.join(config.cluster.ranks, config.cluster.timeout)
    return EngineNodes(worlds.job_group("gloo"), config.cluster.ranks)


def start_engines(chosen: Sequence[EngineSettings], node: int, run_dir: Path, stack: ExitStack) -> list[Engine]:
    """Start this node's engines and do not wait until they are ready. The stack stops them."""
    engines: list[Engine] = []
    stack.callback(stop_engines, engines)
    for i, engine_config in enumerate(chosen):
        number = node * len(chosen) + i
        engines.append(Engine(engine_config, run_dir / "logs" / f"engine_{number}.log"))
    return engines


def open_weight_sync(
    config: Config, shards: Sequence[Shard], engines: Sequence[Engine], group: dist.ProcessGroup, display: Display
) -> WeightSync:
    """Collective over ``group``: wait for the engines and plan the weight sync."""
    with display.stage("vLLM: engines ready"):
        deadline = time.monotonic() + config.rollout.startup_timeout
        on_all_ranks(partial(wait_until_ready, engines, deadline), group)
    with display.stage("weight sync: plan from trainer shards to vLLM's layout"):
        return WeightSync(
            shards,
            engines,
            group,
            bucket_bytes=config.rollout.sync_bucket_mib << 20,
            verify_every=config.rollout.sync_verify_every,
            plans=PLANS,
        )


def keep_memory() -> None:
    """Free no memory. For engines on nodes of their own, which use no memory of the trainer."""


def ends_well(kind: type[BaseException] | None) -> bool:
    """Whether a block that ends with an exception of this kind, or without one (None), ends likewise on all ranks."""
    return kind is None or issubclass(kind, Preempted)


def end_engine_nodes(engine_nodes: EngineNodes, kind: type[BaseException] | None, *unused: object) -> None:
    """Collective over the job: the trainer orders the processes of the engines' nodes to end, and all processes wait
    until the engines have ended.

    They wait because Slurm ends a job soon after its first process has ended. After a failure there is no order: the
    processes of the engines' nodes notice that the trainer is gone.
    """
    if ends_well(kind):
        engine_nodes.order(END)
        engine_nodes.part()


def leave_groups(kind: type[BaseException] | None, *unused: object) -> None:
    """Destroy the process groups, except after a failure.

    After a failure other ranks may wait in a collective of a group. NCCL would then wait for them, and the error would
    not be seen.
    """
    if ends_well(kind):
        parallel.destroy()


def build_model(config: Config, groups: parallel.Parallel) -> models.Model:
    """Collective: build the model of ``model.path``, with a scalar head where the stage trains a reward or value model.

    Its weights are still zero, and its gradient buffers have no memory yet.
    """
    hf_config = hf_checkpoint.config(config.model.path)
    head = trained_head(asdict(config.stage))
    if head is not None:
        hf_config = scalar_config(hf_config, head)
    model = models.build(hf_config, groups, config.precision, config.model.frozen)
    release_gradients(model)
    return model


def make_policy(
    config: Config, groups: parallel.Parallel, model: models.Model, processor: PromptProcessor, run: Run
) -> Policy:
    """The policy of a built model. Skipped updates are logged by the run."""
    return Policy(
        model=model,
        parallel=groups,
        source=config.model.path,
        cost=cost_of(model.hf_config, config.model.frozen),
        pad_token=processor.tokenizer.pad_token_id or 0,
        temperature=config.rollout.temperature,
        optimizer_config=config.optimizer,
        guard=UpdateGuard(config.optimizer.max_skipped, run.log, run.event),
        # Engines on this host read the weights in place.
        states=HostCopy(model, weights=False),
    )


def open_run(config: Config, rank: int, control: dist.ProcessGroup, display: Display, stack: ExitStack) -> Run:
    """Collective: open the records of this launch, its loggers and its watchdog.

    Rank 0 writes environment.json. It writes config.yaml only where the run is not resumed: a resumption may still
    fail, so :meth:`Run.begin` writes the settings then.
    """
    run_dir = Path(config.run_dir)
    run_id = from_rank_zero(lambda: run_folder.run_id(run_dir), control)
    write_settings = partial(run_folder.write_settings, run_dir, config)
    if rank == 0:
        stored = run_dir / records.CONFIG
        changes = []
        if config.resume and stored.is_file():
            changes = differences(yaml.safe_load(stored.read_text()), config)
        else:
            write_settings()
        machine = records.environment(platform.current().machine(), dist.get_world_size())
        records.write_json(run_dir / "environment.json", {"run": {"id": run_id}, **machine})
        stack.enter_context(records.launch(run_dir, config.resume, [str(change) for change in changes]))
    loggers = open_loggers(config, run_dir, run_id, stack) if rank == 0 else []
    watchdog = Watchdog(run_dir / "logs", rank, config.cluster.watchdog)
    stack.callback(watchdog.stop)
    run = Run(
        root=run_dir,
        folder=run_dir,
        run_id=run_id,
        rank=rank,
        control=control,
        processes=job_processes(config),
        device=platform.current().device(),
        display=display,
        clock=PhaseClock(watchdog),
        loggers=loggers,
        checkpoint_every=config.checkpoint.every_steps,
        checkpoints_kept=config.checkpoint.keep,
        slow_factor=config.cluster.slow_factor,
        write_settings=write_settings,
    )
    # Also after a failure, so that checkpoints being written are completed.
    stack.callback(join, run.savers, config.cluster.timeout)
    return run


def join(savers: Sequence[Saver], seconds: float) -> None:
    """Wait until the checkpoints that are being written are complete or have failed, at most ``seconds`` for each."""
    for saver in savers:
        saver.join(seconds)
