"""Data-parallel ranks that make PPO steps on given responses, by the loop's own functions and without engines.

``ppo_worker.py FOLDER`` forks two. FOLDER has ``overrides.json`` and ``step_1.safetensors``, ``step_2.safetensors``
(token batches with rewards). Rank 0 writes the batches with their columns, the metrics of each step, and both models.
"""

import dataclasses
import json
import os
import sys
from collections import defaultdict
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from hydra import compose, initialize_config_dir

from megatron_ext import platform

platform.activate("cpu")

from megatron_ext import hf_checkpoint, parallel, scalar_head  # noqa: E402
from megatron_ext.batch import TokenBatch  # noqa: E402
from recipes.config import parse  # noqa: E402
from recipes.launch.launcher import fork_ranks  # noqa: E402
from recipes.training import rl, setup  # noqa: E402
from tests.recipes import tiny  # noqa: E402

STEPS = 2


def main(folder: Path) -> None:
    with initialize_config_dir(str(tiny.ROOT / "conf"), version_base="1.3"):
        config = parse(compose("config", overrides=json.loads((folder / "overrides.json").read_text())))
    groups = parallel.initialize(config.parallel, config.seed, 600)
    # What surrounds the loop and has no part in a step.
    run: Any = SimpleNamespace(
        phase=lambda name: nullcontext(),
        log=print,
        event=print,
        count=lambda **counted: None,
        folder=folder,
        rank=int(os.environ["RANK"]),
    )
    tokenizer = SimpleNamespace(pad_token_id=0)
    rollouts: Any = SimpleNamespace(
        sampling=lambda *arguments: None,
        server_counts=dict,
        judges_share_gpus=False,
        fleet=None,
        control=parallel.control_group(),
    )
    processor: Any = SimpleNamespace(tokenizer=tokenizer)
    model = setup.build_model(config, groups)
    hf_checkpoint.load(model.shards, config.model.path)
    policy = setup.make_policy(config, groups, model, processor, run)
    loop = rl.prepare(setup.Training(config, policy, rollouts, run, processor), run, Path(config.model.path))
    assert loop.critic is not None
    loop.rows = defaultdict(lambda: {"kind": "chat"})  # the given responses are not to prompts of the data

    metrics = []
    for step in range(STEPS):
        file = folder / f"step_{step + 1}.safetensors"
        given = TokenBatch.from_bytes(file.read_bytes())
        batch, _ = rl.score(loop, given, given)
        batch, inputs = rl.compute_advantages(loop, batch)
        metrics.append(rl.update(loop, step, batch, inputs))
        if os.environ["RANK"] == "0":
            (folder / f"scored_{step + 1}.safetensors").write_bytes(batch.to_bytes())
    writes = groups.is_first_replica
    policy.export(folder / "policy")
    hf_checkpoint.export(loop.critic.model.shards, config.model.path, folder / "critic", writes, scalar_head.REWARD)
    if os.environ["RANK"] == "0":
        (folder / "metrics.json").write_text(json.dumps(metrics))
        (folder / "algorithm.json").write_text(json.dumps(dataclasses.asdict(config.algorithm)))
    parallel.destroy()


if __name__ == "__main__":
    fork_ranks(2)
    main(Path(sys.argv[1]))
