"""Opens what a launch trains with: the policy, the rollouts and the run. All is closed on every way out."""

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

PLANS = Path("build/weight_sync")  # plans of weight syncs, by the hash of what they were made from


@dataclass(frozen=True)
class Training:
    """One launch on this rank. ``rollouts`` is None for stages that do not generate."""

    config: Config
    policy: Policy
    rollouts: Rollouts | None
    run: Run
    processor: PromptProcessor


@contextmanager
def open_training(config: Config) -> Iterator[Training]:
    """Collective: build the trainer, start engines while its weights are read, then join them by the weight sync."""
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
            # Before the watchdogs of the engines' nodes, too.
            from_rank_zero(lambda: (run_dir / "logs" / NOTICE).unlink(missing_ok=True), control)
            model = build_model(config, groups)

        # Only now, for their memory may be that of the gradients.
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
            rollouts.sleep()  # until the first sync: optimiser and critic are made meanwhile
        yield Training(config, policy, rollouts, run, processor)


def node_with_engines(config: Config) -> tuple[int, int]:
    """This process's node among those that have engines, and how many these are. With ``cluster.engine_nodes`` they
    follow the trainer's, whose ranks count as on the first of them."""
    node = int(os.environ["GROUP_RANK"])
    if config.cluster.engine_nodes:
        return max(0, node - config.cluster.nodes), config.cluster.engine_nodes
    return node, int(os.environ["GROUP_WORLD_SIZE"])


def names_of_verifiers(config: Config) -> set[str]:
    """Those of the rewards, and those that score held-out answers."""
    return {*mixing.verifier_names(config.rewards.mix), *config.data.scores}


def join_engine_nodes(config: Config) -> EngineNodes:
    """Collective over all processes of the job: make the world of the trainer's ranks, that of the others, and the
    group of all."""
    worlds.join(config.cluster.ranks, config.cluster.timeout)
    return EngineNodes(worlds.job_group("gloo"), config.cluster.ranks)


def start_engines(chosen: Sequence[EngineSettings], node: int, run_dir: Path, stack: ExitStack) -> list[Engine]:
    """Start this node's engines, without waiting for them; the stack stops them."""
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
    """The engines have nodes of their own: nothing of the trainer's memory is theirs."""


def ends_well(kind: type[BaseException] | None) -> bool:
    """Whether a block that ends with an exception of this kind, or None, ends so on all ranks."""
    return kind is None or issubclass(kind, Preempted)


def end_engine_nodes(engine_nodes: EngineNodes, kind: type[BaseException] | None, *unused: object) -> None:
    """Collective over the job: the trainer tells the processes of the engines' nodes that the run is over, and all wait
    until the engines have ended, because Slurm ends a job soon after its first process has ended. After a failure they
    notice that the trainer is gone."""
    if ends_well(kind):
        engine_nodes.order(END)
        engine_nodes.part()


def leave_groups(kind: type[BaseException] | None, *unused: object) -> None:
    """Destroy the process groups. Not after a failure, when others may wait in a collective of one: NCCL would wait for
    them, and the error would not be seen."""
    if ends_well(kind):
        parallel.destroy()


def build_model(config: Config, groups: parallel.Parallel) -> models.Model:
    """Collective: the model of ``model.path``, its weights still zero and its gradients without memory; with a scalar
    head for a reward or value model."""
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
    """The policy around a built model, with the run's log for skipped updates."""
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
    """Collective: records of this launch, loggers and the watchdog. Rank 0 writes environment.json, and config.yaml
    unless the run is resumed, which may still fail (``Run.begin``)."""
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
    stack.callback(join, run.savers, config.cluster.timeout)  # a failed run's checkpoints too
    return run


def join(savers: Sequence[Saver], seconds: float) -> None:
    """Wait until the checkpoints under way are complete or have failed, at most ``seconds`` for each."""
    for saver in savers:
        saver.join(seconds)
