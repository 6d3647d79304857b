"""Runs of one step, whole but for vLLM: ``python -m tests.recipes.steps FOLDER RANKS`` forks ranks that train each
configuration of FOLDER/configs.pickle, one after the other. A run's folder then has what a user's has.

In the place of vLLM :class:`Engine` answers with random tokens, whose log-probabilities are transformers' under the
model that the run begins with.
"""

import functools
import os
import pickle
import random
import sys
from collections import Counter
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from megatron_ext import batch as batches
from megatron_ext import platform
from megatron_ext.batch import UNFINISHED, TokenBatch

platform.activate("cpu")

from recipes.config import Config  # noqa: E402
from recipes.launch.launcher import fork_ranks  # noqa: E402
from recipes.training import setup  # noqa: E402
from recipes.training.stages import run_stage  # noqa: E402
from rollout.engine import EngineSettings  # noqa: E402
from rollout.sampling import Sampling  # noqa: E402

SECONDS = 600  # of a collective


@functools.cache
def model(folder: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


class Engine:
    """Random tokens and lengths, decided by the prompt and the sample's number. With a thinking budget the second token
    is as if it had been forced."""

    alive = True
    version = 0  # of its weights

    def __init__(self, settings: EngineSettings, log_path: Path) -> None:
        self.model = model(settings.model)

    def wait_until_ready(self, deadline: float) -> None:
        pass

    def stop(self) -> None:
        pass

    def generate(
        self, requests: TokenBatch, sampling: Sampling, num_complete: int | None = None
    ) -> Iterator[TokenBatch]:
        missing = Counter(prompt_id for prompt_id, _ in requests.keys)
        for i, (prompt_id, sample_index) in enumerate(requests.keys):
            if num_complete is not None and list(missing.values()).count(0) == num_complete:
                return
            yield self.respond(requests.select([i]), sampling, random.Random(f"{prompt_id}/{sample_index}"))
            missing[prompt_id] -= 1

    def respond(self, request: TokenBatch, sampling: Sampling, chance: random.Random) -> TokenBatch:
        """The request with what a round of generation adds."""
        length = chance.randint(1, sampling.max_tokens)
        begun = len(request.response_tokens)
        vocabulary = self.model.config.vocab_size
        tokens = [chance.randrange(3, vocabulary) for _ in range(length - 1)] + [sampling.stop_token_ids[0]]
        end = length if sampling.round_tokens is None else min(length, begun + sampling.round_tokens)
        prompt = request.prompt(0).token_ids.tolist()
        with torch.no_grad():
            logits = self.model(torch.tensor([prompt + tokens[:end]])).logits[0, len(prompt) - 1 : -1]
        log_probs = (logits / (sampling.temperature or 1.0)).log_softmax(-1)[range(end), tokens[:end]]
        forced = [sampling.thinking_budget is not None and place == 1 for place in range(end)]
        continuation = batches.build(
            request.prompts,
            [tokens[begun:end]],
            logprobs=[log_probs[begun:].tolist()],
            loss_mask=[[not each for each in forced[begun:]]],
            version=self.version,
            finish_reasons=["stop" if end == length else UNFINISHED],
        )
        return batches.extend(request, continuation)


class WeightSync:
    """The weights that the only step begins with are those that the engine has."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        pass

    def sync(self, version: int) -> dict[str, int]:
        return {"bytes": 0}


def train(config: Config, number: int, store: dist.Store) -> None:
    """One run, on every rank."""
    dist.init_process_group(
        "gloo",
        store=dist.PrefixStore(f"run/{number}", store),
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        timeout=timedelta(seconds=SECONDS),
    )
    with setup.open_training(config) as training:
        run_stage(training)


def main() -> None:
    folder = Path(sys.argv[1])
    configs: list[Config] = pickle.loads((folder / "configs.pickle").read_bytes())
    fork_ranks(int(sys.argv[2]))
    # After a fork torch makes its thread pool anew, which two threads must not do at once, and transformers loads a
    # model in several. A rank does this before its first thread; here the engine's model is loaded before that.
    torch.set_num_threads(1)
    setup.Engine = Engine  # type: ignore[misc, assignment]
    setup.WeightSync = WeightSync  # type: ignore[misc, assignment]
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=SECONDS))
    for number, config in enumerate(configs):
        train(config, number, store)


if __name__ == "__main__":
    main()
