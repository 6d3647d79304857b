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

from megatron_ext import hf_checkpoint, parallel, platform
from megatron_ext import model as models
from megatron_ext.checkpoint import Saver
from megatron_ext.collectives import from_rank_zero, on_all_ranks
from megatron_ext.offload import HostCopy, release_gradients
from megatron_ext.packing import cost_of
from megatron_ext.scalar_head import scalar_config
from recipes.config import Config, generates
from recipes.config.resume import differences
from recipes.data.processor import PromptProcessor
from recipes.run import folder as run_folder
from recipes.run import logs, records
from recipes.run.clock import PhaseClock
from recipes.run.display import Display
from recipes.run.exports import trained_head
from recipes.run.loggers import open_loggers
from recipes.run.run import Run
from recipes.run.watchdog import NOTICE, Watchdog
from recipes.training.engines import Judging, engine_settings, open_judging, record_restart
from recipes.training.policy import Policy, UpdateGuard
from recipes.training.rollouts import Rollouts, wait_until_ready
from rewards import mixing, settings
from rollout.engine import Engine, stop_engines
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
    node = int(os.environ["GROUP_RANK"])
    nodes = int(os.environ["GROUP_WORLD_SIZE"])
    logs.redirect_output(run_dir / "logs", rank)
    # The first rank of a node starts the node's engines, and responses are judged where the engines are.
    starts_engines = generates(config) and int(os.environ["LOCAL_RANK"]) == 0
    engines_to_start = engine_settings(config, nodes) if starts_engines else []

    with ExitStack() as stack:
        display = stack.enter_context(Display(active=rank == 0))
        names = {*mixing.verifier_names(config.rewards.mix), *config.data.scores}
        judging = open_judging(config, names, stack) if starts_engines else Judging(None, {}, None)

        with display.stage("trainer: process groups, Megatron-Core model"):
            torch.set_num_threads(config.cluster.threads)
            groups = parallel.initialize(config.parallel, config.seed, config.cluster.timeout)
            stack.callback(parallel.destroy)
            control = parallel.control_group()
            model = build_model(config, groups)

        # Only now, for their memory may be that of the gradients.
        engines: list[Engine] = []
        stack.callback(stop_engines, engines)
        for i, engine_config in enumerate(engines_to_start):
            number = node * len(engines_to_start) + i
            engines.append(Engine(engine_config, run_dir / "logs" / f"engine_{number}.log"))

        with display.stage("trainer: weights"):
            hf_checkpoint.load(model.shards, config.model.path)
            processor = PromptProcessor(config.model.path, config.data.max_prompt_tokens, config.data.images)

        weight_sync = None
        if generates(config):
            with display.stage("vLLM: engines ready"):
                deadline = time.monotonic() + config.rollout.startup_timeout
                on_all_ranks(partial(wait_until_ready, engines, deadline), control)
            with display.stage("weight sync: plan from trainer shards to vLLM's layout"):
                weight_sync = WeightSync(
                    model.shards,
                    engines,
                    control,
                    bucket_bytes=config.rollout.sync_bucket_mib << 20,
                    verify_every=config.rollout.sync_verify_every,
                    plans=PLANS,
                )

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
                make_room=policy.release_memory,
                heartbeat=run.clock.watchdog.beat,
                on_restart=partial(record_restart, run_dir),
            )
            rollouts.sleep()  # until the first sync: optimiser and critic are made meanwhile
        yield Training(config, policy, rollouts, run, processor)


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
    from_rank_zero(lambda: (run_dir / "logs" / NOTICE).unlink(missing_ok=True), control)
    watchdog = Watchdog(run_dir / "logs", rank, config.cluster.watchdog)
    stack.callback(watchdog.stop)
    run = Run(
        root=run_dir,
        folder=run_dir,
        run_id=run_id,
        rank=rank,
        control=control,
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
