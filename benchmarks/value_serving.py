"""Measures the cost of asking a value server after every segment of a response: ``python -m benchmarks.value_serving``.

It writes ``benchmarks/results/value_serving.json`` and prints its table. The servers are stock `vllm serve --runner
pooling` with the demo's base model and a random head of three values. The cost does not depend on the weights. They are
started as `rewards.serve` starts a server: ``classify`` with vLLM's prefix cache, which is on by default, ``classify``
without it, and ``token_classify``.

One client measures one server after the other and sends token ids, one request after another. It asks for the values of
the prompt and of each prefix of ``RESPONSES`` random responses that ends with a segment. A segment ``alone`` is a
request with only the segment's tokens. Its seconds are the cost of the segment if all tokens before it were free.
"""

import json
import os
import random
import statistics
import sys
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from benchmarks import figures
from recipes.config import Config, parse
from recipes.launch.prepare_model import prepare
from recipes.run import records
from rewards.serve import JudgeServer, Supervisor
from rewards.settings import Server

RESULT = Path("benchmarks/results/value_serving.json")
MODEL = Path("build/benchmarks/value_model")
LOGS = Path("build/benchmarks")
PORT = 8370  # port of the first server
RESPONSES, SEGMENTS = 2, 24
PROMPT_TOKENS = 64
SEGMENT_TOKENS = (8, 40)  # least and most, drawn uniformly
BLOCK_TOKENS = 32  # block size of the prefix cache, the least on a CPU. vLLM's default is 16 on a GPU and 128 on a CPU
SERVERS: dict[str, Sequence[str]] = {
    "classify": [],
    "classify, no prefix cache": ["--no-enable-prefix-caching"],
    "token_classify": ["--pooler-config.task", "token_classify"],
}
MEASURED = {
    "tokens_computed": "tokens of a request that the prefix cache did not have, mean over the segments' requests",
    "alone": "milliseconds of a request that has the tokens of one segment alone, median",
    "first": "milliseconds of a request after one of the first 8 segments of a response, median",
    "last": "milliseconds of a request after one of the last 8 segments of a response, median",
    "response": "seconds of all requests of a response, median over the responses",
}


def main() -> None:
    made_by = figures.source("benchmarks.value_serving", recipes=["demo"])
    load = os.getloadavg()[0]
    with initialize_config_dir(str(Path("conf").resolve()), version_base="1.3"):
        demo = parse(compose("config", ["recipe=demo"]))
    vocabulary = make_model(demo)
    responses = random_responses(vocabulary)
    cases = measure_servers(demo, responses)
    result = {
        **records.environment("cpu", 1),
        "load_average_before": load,
        "model": f"{Path(demo.model.path).name} with a random head of three values, float32",
        "settings": {
            "responses": RESPONSES,
            "segments": SEGMENTS,
            "prompt_tokens": PROMPT_TOKENS,
            "segment_tokens": SEGMENT_TOKENS,
            "block_tokens": BLOCK_TOKENS,
            "threads": os.environ.get("OMP_NUM_THREADS", "all cores"),
            "arguments": {name: [*shared_arguments(demo), *more] for name, more in SERVERS.items()},
        },
        "response_tokens": [len(response[-1]) - PROMPT_TOKENS for response in responses],
        "mean_segment_tokens": statistics.mean(map(len, segments_of(responses))),
        "measured": MEASURED,
        "cases": cases,
    }
    figures.write(RESULT, "python -m benchmarks.value_serving", made_by, result)
    Console(width=None if sys.stdout.isatty() else 140).print(table(cases), f"{RESULT} has the raw figures", sep="\n")


def make_model(demo: Config) -> int:
    """Write the base model with a random head for the demo's principles to ``MODEL``. Returns the vocabulary's size."""
    prepare(demo.model)
    principles = list(demo.stage.value_model.principles)
    model = AutoModelForSequenceClassification.from_pretrained(
        demo.model.path,
        num_labels=len(principles),
        id2label=dict(enumerate(principles)),
        problem_type="multi_label_classification",
    )
    model.save_pretrained(MODEL)
    AutoTokenizer.from_pretrained(demo.model.path).save_pretrained(MODEL)
    return int(model.config.vocab_size)


def random_responses(vocabulary: int) -> list[list[list[int]]]:
    """For each response, the prefixes whose values are requested: the prompt, and the prompt with 1, 2, … segments."""
    chance = random.Random(0)
    responses = []
    for _ in range(RESPONSES):
        lengths = [PROMPT_TOKENS, *(chance.randint(*SEGMENT_TOKENS) for _ in range(SEGMENTS))]
        prefixes: list[list[int]] = [[]]
        for length in lengths:
            prefixes.append(prefixes[-1] + [chance.randrange(vocabulary) for _ in range(length)])
        responses.append(prefixes[1:])
    return responses


def segments_of(responses: Sequence[Sequence[list[int]]]) -> list[list[int]]:
    """The tokens of every segment of every response."""
    return [prefix[len(shorter) :] for response in responses for shorter, prefix in pairwise(response)]


def shared_arguments(demo: Config) -> list[str]:
    return [*demo.rewards.supervisor.cpu_arguments, "--block-size", str(BLOCK_TOKENS)]


def measure_servers(demo: Config, responses: Sequence[Sequence[list[int]]]) -> dict[str, dict[str, Any]]:
    """Start the servers, measure one after the other, and stop them."""
    servers = []
    for place, (name, more) in enumerate(SERVERS.items()):
        server = Server(str(MODEL), None, "pooling", [], None, "127.0.0.1", PORT + place, 1, 1, [], name)
        log = LOGS / f"value_server_{place}.log"
        servers.append(JudgeServer(server, 0, log, None, [*shared_arguments(demo), *more]))
    supervisor = Supervisor(servers, replace(demo.rewards.supervisor, restarts=0))
    try:
        supervisor.start()
        return {server.server.name: measure(server.server, responses) for server in servers}
    finally:
        supervisor.stop()


def measure(server: Server, responses: Sequence[Sequence[list[int]]]) -> dict[str, Any]:
    """The figures of ``MEASURED``, the requests' tokens, those found in the prefix cache, and all seconds."""
    (address,) = server.addresses
    path = "/classify" if server.name.startswith("classify") else "/pooling"
    segments = segments_of(responses)
    for segment in segments[:5]:  # the first requests warm up
        seconds_of(address, path, segment[::-1])
    alone = [seconds_of(address, path, segment) for segment in segments]
    asked = 0
    hits_before = cache_hits(address)
    seconds: list[list[float]] = []
    for prompt, *prefixes in responses:
        seconds_of(address, path, prompt)
        seconds.append([seconds_of(address, path, prefix) for prefix in prefixes])
        asked += sum(map(len, prefixes))
    hits = cache_hits(address) - hits_before
    return summarise(asked, hits, alone, seconds)


def summarise(asked: int, hits: int, alone: Sequence[float], seconds: Sequence[Sequence[float]]) -> dict[str, Any]:
    """The results of a server. The requests had ``asked`` tokens, of which its prefix cache had ``hits``."""
    requests = sum(map(len, seconds))
    return {
        "tokens_asked": asked,
        "tokens_cached": hits,
        "hit_rate": hits / asked,
        "tokens_computed": (asked - hits) / requests,
        "milliseconds_alone": 1e3 * statistics.median(alone),
        "milliseconds_first": 1e3 * statistics.median(one for response in seconds for one in response[:8]),
        "milliseconds_last": 1e3 * statistics.median(one for response in seconds for one in response[-8:]),
        "seconds_response": statistics.median(map(sum, seconds)),
        "raw": {"alone": alone, "segments": seconds},
    }


def seconds_of(address: str, path: str, tokens: Sequence[int]) -> float:
    """Seconds of a request for the values of a prefix."""
    body = json.dumps({"model": str(MODEL), "input": [list(tokens)]}).encode()
    request = urllib.request.Request(f"{address}{path}", body, {"Content-Type": "application/json"})
    start = time.perf_counter()
    with urllib.request.urlopen(request, timeout=60) as reply:
        reply.read()
    return time.perf_counter() - start


def cache_hits(address: str) -> int:
    """Tokens that were found in the server's prefix cache so far."""
    time.sleep(1)  # the last request's hits are written after its reply
    with urllib.request.urlopen(f"{address}/metrics", timeout=60) as reply:
        lines = reply.read().decode().splitlines()
    return int(sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:prefix_cache_hits_total")))


def table(cases: dict[str, dict[str, Any]]) -> Table:
    """A row for each server."""
    columns = ("server", "tokens cached", "computed", "alone, ms", "first, ms", "last, ms", "response, s")
    shown = Table(*columns, title=f"a request after each segment of {'-'.join(map(str, SEGMENT_TOKENS))} tokens")
    for name, case in cases.items():
        shown.add_row(
            name,
            f"{case['hit_rate']:.0%}",
            f"{case['tokens_computed']:.0f}",
            *(f"{case[f'milliseconds_{part}']:.0f}" for part in ("alone", "first", "last")),
            f"{case['seconds_response']:.2f}",
        )
    return shown


if __name__ == "__main__":
    main()
