"""A process on a node that has engines but no part of the trained model. It obeys orders of the trainer's rank 0.

The first process of a node owns the node's engines and judges their responses. All processes take part in weight syncs
and receive weights for the engines of their node.
"""

import os
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from transformers import AutoTokenizer

from recipes.config import Config, generates
from recipes.data.rows import load_rows
from recipes.data.sources import RowsById
from recipes.run import logs
from recipes.run.display import Display
from recipes.run.watchdog import Watchdog
from recipes.training import held_out, rl
from recipes.training.engines import Judging, engine_settings, open_judging, record_restart
from recipes.training.rollouts import Rollouts
from recipes.training.setup import (
    end_engine_nodes,
    join_engine_nodes,
    keep_memory,
    leave_groups,
    names_of_verifiers,
    node_with_engines,
    open_weight_sync,
    start_engines,
)
from rollout.engine_nodes import ALIVE, COLLECT, END, GENERATE, LONGEST_WAIT, SERVER_COUNTS, SYNC, EngineNodes, Order
from rollout.generation import HELD_OUT, TRAINING, Generation, OnResponse
from rollout.sampling import Sampling


def serve(config: Config) -> None:
    """Start this node's engines and serve until the trainer ends the run.

    Raises RuntimeError where the trainer is gone before it has ended the run.
    """
    run_dir = Path(config.run_dir)
    rank = int(os.environ["RANK"])
    logs.redirect_output(run_dir / "logs", rank)
    node, nodes = node_with_engines(config)
    owns_engines = int(os.environ["LOCAL_RANK"]) == 0
    with ExitStack() as stack:
        display = stack.enter_context(Display(active=False))
        engine_nodes = join_engine_nodes(config)
        stack.push(leave_groups)
        stack.push(partial(end_engine_nodes, engine_nodes))
        if not generates(config):
            order = engine_nodes.next_order()
            if order.name != END:
                raise RuntimeError(f"order {order.name!r} in a run that generates nothing")
            return
        judging = Judging(None, {}, None)
        if owns_engines:
            judging = open_judging(config, names_of_verifiers(config), stack)
        chosen = engine_settings(config, nodes) if owns_engines else []
        engines = start_engines(chosen, node, run_dir, stack)
        weight_sync = open_weight_sync(config, [], engines, engine_nodes.group, display)
        # The watchdog ends this process when a rank of the trainer has made no progress.
        watchdog = Watchdog(run_dir / "logs", rank, LONGEST_WAIT.total_seconds())
        stack.callback(watchdog.stop)
        rollouts = Rollouts(
            config=config.rollout,
            seed=config.seed,
            tokenizer=AutoTokenizer.from_pretrained(config.model.path),
            engines=engines,
            weight_sync=weight_sync,
            control=engine_nodes.group,
            node=node,
            nodes=nodes,
            verifiers=judging.verifiers,
            client=judging.client,
            turns=judging.turns,
            judges_share_gpus=False,
            make_room=keep_memory,
            heartbeat=watchdog.beat,
            on_restart=partial(record_restart, run_dir),
            engine_nodes=engine_nodes,
        )
        obey(rollouts, engine_nodes, judges(config, rollouts) if owns_engines else {})


def judges(config: Config, rollouts: Rollouts) -> dict[str, OnResponse]:
    """The functions that judge a response, by the kind of rows that the prompts come from (training or held-out)."""
    of_rows: dict[str, OnResponse] = {}
    if "rl" in config.stage.trains:
        rows = RowsById(load_rows(config.data.prompts))
        of_rows[TRAINING] = partial(rl.judge_response, config, rollouts, rows)
    if config.stage.evaluates:
        rows = RowsById(load_rows(config.data.evaluation))
        of_rows[HELD_OUT] = partial(held_out.judge_response, config, rollouts, rows)
    return of_rows


def obey(rollouts: Rollouts, engine_nodes: EngineNodes, judges_of_rows: dict[str, OnResponse]) -> None:
    """Execute orders until the end of the run. A generation goes on while later orders are executed."""
    generation: Generation | None = None
    while (order := engine_nodes.next_order()).name != END:
        if order.name == GENERATE:
            generation = begin(order, rollouts, judges_of_rows)
        elif order.name == COLLECT:
            assert generation is not None, "an order to generate comes first"
            rollouts.heartbeat("generate")
            generation.collect(rollouts.group, lambda: sync(engine_nodes.next_order(), rollouts))
        elif order.name == ALIVE:
            rollouts.engines_alive()
        elif order.name == SERVER_COUNTS:
            rollouts.server_counts()
        else:
            sync(order, rollouts)
        rollouts.heartbeat("wait")


def begin(order: Order, rollouts: Rollouts, judges_of_rows: dict[str, OnResponse]) -> Generation:
    """Have this node's engines begin to generate responses to their share of the requests."""
    assert order.requests is not None
    arguments = order.arguments
    sampling = Sampling(**arguments["sampling"])
    # Other processes of the node have no responses to judge.
    on_response = judges_of_rows[arguments["rows"]] if rollouts.engines else None
    return Generation(rollouts.fleet, order.requests, sampling, on_response, arguments["num_complete"])


def sync(order: Order, rollouts: Rollouts) -> None:
    """Take part in a weight sync. Dead engines are restarted first."""
    assert order.name == SYNC, f"order {order.name!r}"
    rollouts.sync_weights(order.arguments["version"])
