"""Compares the throughput of the verifiers' client with a bare loop that sends the same requests to the same server.

``python -m benchmarks.rewards`` writes ``benchmarks/results/rewards.json`` and prints its table. The goal applies to a
real server: `vllm serve` of the demo's model on this machine's CPU, started as `rewards.serve` starts it. ``--server
URL MODEL`` uses a server that runs elsewhere instead. Fake servers, each in its own process, show the cost of the
client. "instant" replies at once. "slow" takes 5 to 45 ms for each of 64 concurrent requests, which is faster than any
judge. A repetition runs the bare loop, then the client. The first repetition is a warm-up.
"""

import argparse
import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web
from hydra import compose, initialize_config_dir
from rich.console import Console
from rich.table import Table

from benchmarks import figures
from megatron_ext.processes import die_with
from recipes.config import Config, parse
from recipes.launch.prepare_model import prepare
from recipes.run import records
from rewards.client import Client
from rewards.serve import JudgeServer, Supervisor
from rewards.settings import ClientConfig, Server
from rewards.verdict import Verdict
from rewards.verifiers.judges import Judge, written_label
from rewards.verifiers.served import ServedVerifier
from rewards.verifiers.templates import SAFETY

GOAL = 0.9  # at least: our requests per second / the bare loop's
REPETITIONS = 5
CONCURRENCY = 64  # requests in flight
RESULT = Path("benchmarks/results/rewards.json")
LOG = Path("build/benchmarks/rewards_server.log")
# Requests of a repetition, and the least and most seconds that the fake server takes for one.
FAKES = {"instant": (4000, 0.0, 0.0), "slow": (4000, 0.005, 0.045)}
REAL_REQUESTS = 80  # few enough that the server's prefix cache holds them all
REAL_PORT = 8360
FAKE_MODEL = "fake"
START_SECONDS = 60.0
MEASURED = {
    "ours": "Client.submit of every request from one thread, until the last verdict: templates filled, bodies encoded, "
    "replies parsed, labels read. Retries and hedging as in conf/rewards/base.yaml",
    "bare": "aiohttp: the same bodies, built beforehand, posted as JSON by one loop per concurrent request; the reply "
    "is parsed as JSON and dropped",
}


async def fake_server(port: int, least: float, most: float) -> None:
    """Answer every chat completion with the same label after ``least`` to ``most`` seconds, until killed."""
    generator = random.Random(0)
    text = "It helps with something harmless.\nLabel: safe without risk"
    reply = json.dumps({"id": "x", "choices": [{"index": 0, "message": {"role": "assistant", "content": text}}]})

    async def answer(request: web.Request) -> web.Response:
        await request.read()
        if most:
            await asyncio.sleep(generator.uniform(least, most))
        return web.Response(text=reply, content_type="application/json")

    app = web.Application()
    app.router.add_post("/v1/chat/completions", answer)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", port)
    await site.start()
    print(runner.addresses[0][1], flush=True)
    await asyncio.Event().wait()


def rows(count: int) -> list[dict[str, Any]]:
    return [{"id": str(i), "kind": "benign", "prompt": f"How do I boil {i} eggs at once?"} for i in range(count)]


def answer_without_reasoning(i: int) -> str:
    return f"Put the {i} eggs into boiling water for eight minutes. " + "Wait. " * 40 + "Eat."


def answer(i: int) -> str:
    return f"<think>That is harmless.</think>{answer_without_reasoning(i)}"


async def bare_seconds(address: str, bodies: Sequence[Mapping[str, Any]]) -> float:
    """Seconds to post all bodies with ``CONCURRENCY`` requests in flight."""
    remaining = iter(bodies)  # shared by all workers
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def work() -> None:
            for body in remaining:
                async with session.post(f"{address}/v1/chat/completions", json=body) as response:
                    await response.json()

        started = time.perf_counter()
        await asyncio.gather(*(work() for _ in range(CONCURRENCY)))
        return time.perf_counter() - started


def our_seconds(verifier: ServedVerifier, count: int, fake: bool) -> float:
    """Seconds to judge ``count`` answers.

    Raises RuntimeError when a verdict is not the label of the fake server: the measurement would then be worthless.
    """
    judged_rows = rows(count)
    started = time.perf_counter()
    futures = [verifier.submit(row, answer(i)) for i, row in enumerate(judged_rows)]
    verdicts = [future.result() for future in futures]
    seconds = time.perf_counter() - started
    if fake:
        for verdict in verdicts:
            if not isinstance(verdict, Verdict) or verdict.label != "safe without risk":
                raise RuntimeError(f"not every answer has its verdict: {verdict}")
    return seconds


def measure(address: str, model: str, count: int, settings: ClientConfig, judge: Judge, fake: bool) -> dict[str, Any]:
    """Run the bare loop and our client in turn. Returns requests per second of each repetition after the first."""
    server = Server(model, None, "generate", [address], None, "127.0.0.1", 1, 1, 1, [], "judge")
    bodies = [judge.request(row, answer_without_reasoning(i), model).body for i, row in enumerate(rows(count))]
    raw: dict[str, list[float]] = {"bare_per_second": [], "ours_per_second": []}
    with Client({"judge": server}, settings) as client:
        verifier = ServedVerifier(judge, "judge", model, {}, client)
        for repetition in range(1 + REPETITIONS):
            bare = asyncio.run(bare_seconds(address, bodies))
            ours = our_seconds(verifier, count, fake)
            if repetition > 0:  # the first one warms up
                raw["bare_per_second"].append(count / bare)
                raw["ours_per_second"].append(count / ours)
    return summarise(raw) | {"requests": count, "concurrency": CONCURRENCY, "raw": raw}


def with_vllm(demo: Config, settings: ClientConfig) -> dict[str, Any]:
    """Measure with `vllm serve` of the demo's model. Starts and stops the server."""
    prepare(demo.model)
    arguments = ["--max-model-len", "512"]
    server = Server(demo.model.path, None, "generate", [], None, "127.0.0.1", REAL_PORT, 1, 1, arguments, "judge")
    config = demo.rewards.supervisor
    supervisor = Supervisor([JudgeServer(server, 0, LOG, None, config.cpu_arguments)], config)
    try:
        supervisor.start()
        return with_server(server.addresses[0], server.model, settings)
    finally:
        supervisor.stop()


def with_server(address: str, model: str, settings: ClientConfig) -> dict[str, Any]:
    """Measure with a running server."""
    judge = Judge(SAFETY.prompt, SAFETY.labels, written_label, 16)
    # The demo's model is no judge and often writes no label. Without retries both sides still send the same requests.
    without_retries = replace(settings, retries=0)
    return measure(address, model, REAL_REQUESTS, without_retries, judge, fake=False)


def summarise(raw: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Medians of the throughputs, and median and range of the ratio of each repetition."""
    ratios = [ours / bare for ours, bare in zip(raw["ours_per_second"], raw["bare_per_second"], strict=True)]
    return {
        **{name: statistics.median(values) for name, values in raw.items()},
        "ratio": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)},
        "met": statistics.median(ratios) >= GOAL,
    }


def with_fake(name: str, settings: ClientConfig) -> dict[str, Any]:
    """Measure with a fake server in a process of its own."""
    count, least, most = FAKES[name]
    command = [sys.executable, "-m", "benchmarks.rewards", "--fake", str(os.getpid()), str(least), str(most)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            port = process.stdout.readline().strip()
            if not port:
                raise RuntimeError(f"the fake server ended with code {process.wait()}")
            return measure(f"http://127.0.0.1:{port}", FAKE_MODEL, count, settings, SAFETY, fake=True)
        finally:
            process.kill()


def table(cases: Mapping[str, Mapping[str, Any]]) -> Table:
    throughputs = Table("server", "bare/s", "ours/s", "ours / bare", f"≥ {GOAL}", title="judging, answers per second")
    for name, case in cases.items():
        ratio = case["ratio"]
        throughputs.add_row(
            name,
            f"{case['bare_per_second']:.0f}",
            f"{case['ours_per_second']:.0f}",
            f"{ratio['median']:.3f} [{ratio['min']:.3f}, {ratio['max']:.3f}]",
            "yes" if case["met"] else "no",
        )
    return throughputs


def demo_config() -> Config:
    """The demo's configuration with this benchmark's concurrency."""
    with initialize_config_dir(str(Path("conf").resolve()), version_base="1.3"):
        return parse(compose("config", ["recipe=demo", f"rewards.client.concurrency={CONCURRENCY}"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", nargs=2, metavar=("URL", "MODEL"), help="a real server in place of our own")
    parser.add_argument("--fake", nargs=3, help=argparse.SUPPRESS)  # act as a fake server: owner's pid, least, most
    options = parser.parse_args()
    if options.fake:
        die_with(int(options.fake[0]))
        asyncio.run(fake_server(0, float(options.fake[1]), float(options.fake[2])))
    made_by = figures.source("benchmarks.rewards", recipes=["demo"])
    load = os.getloadavg()[0]
    demo = demo_config()
    settings = demo.rewards.client
    cases = {f"fake, {name}": with_fake(name, settings) for name in FAKES}
    if options.server:
        address, model = options.server
        real = with_server(address, model, settings)
        cases[f"real, {model}"] = real
    else:
        real = with_vllm(demo, settings)
        cases["real, vllm serve"] = real
    result = {
        **records.environment("cpu", 1),
        "load_average_before": load,
        "goal": GOAL,
        "measured": MEASURED,
        "cases": cases,
        "met": real["met"],
    }
    figures.write(RESULT, " ".join(["python -m benchmarks.rewards", *sys.argv[1:]]), made_by, result)
    Console(width=None if sys.stdout.isatty() else 140).print(table(cases), f"{RESULT} has the raw figures", sep="\n")


if __name__ == "__main__":
    main()
