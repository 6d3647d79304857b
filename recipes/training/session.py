"""What a run holds: trainer, engines, weight bridge, tokenizer, records. Opened once, closed on every way out."""

import logging
import math
import os
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from transformers import AutoTokenizer

from megatron_ext import checkpoint, hf_checkpoint, optimizer, parallel, platform
from megatron_ext import model as models
from megatron_ext.collectives import all_gather_json, from_rank_zero, on_all_ranks
from megatron_ext.offload import HostCopy
from megatron_ext.optimizer_settings import ScheduleConfig
from megatron_ext.packing import Cost, MicroBatch, PackedSequence, cost_of, enough, pack, plan
from megatron_ext.precision import DTYPES
from megatron_ext.scalar_head import scalar_config
from megatron_ext.weight_map import round_up
from recipes.config import Config, engines_of_a_node, generates
from recipes.data.processor import ImageLimits, PromptProcessor
from recipes.data.sft_examples import Example, tokenize_example
from recipes.errors import ConfigError
from recipes.run import logs, preemption, records
from recipes.run.display import Display
from recipes.run.loggers import Logger, open_loggers
from recipes.run.watchdog import NOTICE, Watchdog, probe, slow_ranks
from rewards import mixing, registry, settings
from rewards.client import Client
from rewards.verdict import Failure, Row, Verifier, to_json
from rollout import sampler
from rollout.engine import Engine, EngineSettings, stop_engines
from rollout.environment import Turns, open_environment, segments
from rollout.generation import Fleet, Generation
from rollout.sample import Prompt, Sample, Sampling
from rollout.weight_sync.sync import WeightSync

BETWEEN = "loop"  # what a rank does between two phases


@dataclass
class Session:
    """One run on this rank. ``engines``: those of this node, on its first rank, else none, ``verifiers`` and ``turns``
    (an environment's) alike; ``node`` of ``nodes``; ``control`` is a gloo group of all ranks. Stages that don't
    generate have no engines and no ``bridge``."""

    config: Config
    run_dir: Path
    rank: int
    display: Display
    parallel: parallel.Parallel
    model: models.Model
    prompts: PromptProcessor
    tokenizer: Any
    engines: list[Engine]
    bridge: WeightSync | None
    control: dist.ProcessGroup
    verifiers: dict[str, Verifier]
    client: Client | None
    turns: Turns | None
    loggers: list[Logger]
    node: int
    nodes: int
    cost: Cost  # of a sequence of the model
    watchdog: Watchdog
    run_id: str  # a resumed run's is the one it began with
    savers: list[checkpoint.Saver]
    states: HostCopy | None  # optimizer.offload: the model's gradients, and its optimiser's states once it has one
    version: int = 0  # of the weights that the engines have
    engines_rest: bool = False  # they were told to sleep since the last sync
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    laps: list[tuple[str, float]] = field(default_factory=list)  # phases and what is between them, in their order
    lap_began: float = field(default_factory=time.perf_counter)
    skipped: int = 0  # updates of this step whose loss or gradient was not finite
    skipped_in_a_row: Counter[str] = field(default_factory=Counter)  # of each model
    ending: bool = False  # a rank was told to end soon (recipes.run.preemption)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the block's wall time to ``seconds[name]``; its begin and its end are progress for the watchdog."""
        self._lap(BETWEEN)
        self.watchdog.beat(name)
        yield
        self.seconds[name] += self._lap(name)
        self.watchdog.beat(BETWEEN)

    def _lap(self, name: str) -> float:
        """What has taken the time since the last call; returns its seconds."""
        now = time.perf_counter()
        self.laps.append((name, now - self.lap_began))
        self.lap_began = now
        return self.laps[-1][1]

    def build_optimizer(
        self, stage: ScheduleConfig, steps: int, model: models.Model | None = None
    ) -> tuple[MegatronOptimizer, OptimizerParamScheduler]:
        """A fresh optimiser for a stage's learning-rate settings, with master weights taken from the model: the
        policy, or another ``model``."""
        self.restore_states()
        built, scheduler = optimizer.build(model or self.model, self.config.optimizer, stage, steps)
        built.reload_model_params()
        if self.states is not None and model is None:
            self.states.optimizer = built
        return built, scheduler

    def update(
        self,
        built: MegatronOptimizer,
        schedule: OptimizerParamScheduler,
        found: dict[str, float],
        model: str = checkpoint.POLICY,
    ) -> bool:
        """One update of a model by the accumulated gradients, and ``found["grad_norm"]``; or none, on any rank, where
        the loss or the norm is not finite: returns whether there was one.

        Raises RuntimeError after ``optimizer.max_skipped`` without one in a row.
        """
        if math.isfinite(found["loss"]):
            found["grad_norm"] = optimizer.step(built, schedule)
        else:
            optimizer.skip(built)
            found["grad_norm"] = math.nan
        if math.isfinite(found["grad_norm"]):
            self.skipped_in_a_row[model] = 0
            return True
        self.skipped += 1
        self.skipped_in_a_row[model] += 1
        told = f"loss {found['loss']}, gradient norm {found['grad_norm']}"
        self.say(f"update of the {model} skipped ({told}): {self.skipped_in_a_row[model]} in a row")
        self.event("skipped update", model=model, why=told)
        if self.skipped_in_a_row[model] >= (most := self.config.optimizer.max_skipped):
            raise RuntimeError(
                f"{told}: {self.skipped_in_a_row[model]} updates in a row were skipped, optimizer.max_skipped={most}; "
                "the weights are those before them. Lower the learning rate, look at the samples of these steps, or "
                "raise the bound, and go on with resume=true"
            )
        return False

    def restore_states(self) -> None:
        """Before training: bring gradients and optimiser states back from the host, where ``optimizer.offload`` left
        them; engines and judges on these devices are to be asleep."""
        if self.states is not None:
            self.states.restore()

    def sync_weights(self, version: int) -> int:
        """Collective: bring every engine to the trainer's weights, verified bit for bit; returns the bytes placed.

        ``version`` is the number of RL steps that made the weights, so that a resumed run's samples name the same one.
        Engines that died are started again first. With ``optimizer.offload`` the trainer's states make room for them.
        """
        assert self.bridge is not None, "this run has no engines (recipes.config.generates)"
        self.watchdog.beat("sync")
        on_all_ranks(self._make_room, self.control)

        def prepare() -> int:
            died = [engine for engine in self.engines if not engine.alive]
            for engine in died:
                engine.restart()
                records.event(Path(self.config.run_dir), "engine restart", engine=engine.log_path.stem)
            wait_until_ready(died, time.monotonic() + self.config.rollout.startup_timeout)
            self._tell_sleepers("/wake", ["weights"])
            return len(died)

        if any(on_all_ranks(prepare, self.control)):
            self.bridge.attach(self.engines)
        placed, self.version, self.engines_rest = self.bridge.sync(version)["bytes"], version, False
        on_all_ranks(lambda: self._tell_sleepers("/wake", ["kv_cache"]), self.control)
        return placed

    def _make_room(self) -> None:
        """For engines: this rank's states, where they may go, and what its allocator kept of activations."""
        if self.states is not None:
            self.states.release()
        platform.current().empty_cache()

    def sleep_engines(self) -> None:
        """Collective: the engines' GPU memory is the trainer's until the next sync, where ``rollout.sleep`` says so."""
        on_all_ranks(lambda: self._tell_sleepers("/sleep", ["weights", "kv_cache"]), self.control)
        self.engines_rest = True

    def wake_engines(self) -> None:
        """Collective: a sync of the weights they had, where the engines were put to sleep."""
        if self.engines_rest:
            self.sync_weights(self.version)

    def _tell_sleepers(self, path: str, tags: list[str]) -> None:
        for engine in self.engines:
            if engine.settings.rollout.sleep and engine.alive:
                engine.call("POST", path, {"tags": tags})

    @property
    def fleet(self) -> Fleet:
        return Fleet(self.engines, self.node, self.nodes, self.turns)

    def sampling(self, temperature: float, round_tokens: int | None = None) -> Sampling:
        c = self.config.rollout
        return Sampling(
            max_tokens=c.max_response_tokens,
            stop_token_ids=(self.tokenizer.eos_token_id,),
            temperature=temperature,
            top_p=c.top_p if temperature > 0 else 1.0,
            round_tokens=round_tokens,
            thinking_budget=c.thinking_budget,
        )

    def generate(
        self,
        prompts: list[Prompt],
        samples_per_prompt: int,
        step: int,
        temperature: float,
        on_sample: Callable[[Sample], Any] | None = None,
    ) -> tuple[list[Sample], list[Any]]:
        """Collective: samples by prompt, then index, and what ``on_sample`` (``Generation``) said of each; the same on
        every rank. ``step`` decides the noise."""
        self.watchdog.beat("generate")
        self.wake_engines()
        requests = sampler.make_requests(prompts, samples_per_prompt, self.config.seed, step)
        streamed = None if self.judges_sleep else on_sample
        generation = Generation(self.fleet, requests, self.sampling(temperature), streamed)
        samples, results = generation.collect(self.control, partial(self.sync_weights, self.version))
        if on_sample is not None and self.judges_sleep:
            results = self.judge_together(samples, on_sample)
        return samples, results

    @property
    def judges_sleep(self) -> bool:
        """Whether the judges' servers share GPUs with engines and trainer, and judge when all is generated."""
        return self.config.rewards.placement == settings.COLOCATED

    def judge_together(self, samples: Sequence[Sample], judge: Callable[[Sample], Any]) -> list[Any]:
        """Collective: what ``judge`` says of each sample, as JSON. The engines sleep from here on, the judges' servers
        are awake meanwhile; each node's judge their share."""
        self.sleep_engines()

        def work() -> list[Any]:
            if self.client is None:
                return []
            own = samples[self.node :: self.nodes]
            with self.client.awake(), ThreadPoolExecutor(len(own) or 1, "judge") as threads:  # the client bounds them
                return list(threads.map(judge, own))

        shares = [iter(share) for share in on_all_ranks(work, self.control) if share]
        return [next(shares[i % self.nodes]) for i in range(len(samples))]

    def text(self, sample: Sample) -> str:
        """The response as a reader sees it. For verifiers and people only: training uses the token ids."""
        return self.tokenizer.decode(sample.response_token_ids, skip_special_tokens=True).strip()

    def judge(self, row: Row, sample: Sample, names: list[str]) -> dict[str, Any]:
        """What the named verifiers say of a sample, as JSON; runs beside the engines in several threads.

        With an environment the row also has the response's ``segments``; where that failed, all verifiers have.
        """
        if sample.failure:
            return {name: to_json(Failure(sample.failure)) for name in names}
        if self.turns is not None:
            row = {**row, "segments": segments(self.tokenizer, sample)}
        judged = mixing.verify(row, self.text(sample), names, self.verifiers)
        return {name: to_json(judgement) for name, judgement in judged.items()}

    def server_counts(self) -> dict[str, int]:
        """Collective: what became of the requests of all nodes to each verifier's server since the last call."""
        total: Counter[str] = Counter()
        for counts in all_gather_json(self.client.take_counts() if self.client else {}, self.control):
            total.update(counts)
        return {f"servers/{name}": count for name, count in total.items()}

    def micro_batches(self, sequences: list[PackedSequence], together: int = 1) -> list[MicroBatch]:
        """This data-parallel rank's packed micro-batches of a batch that every rank knows whole. So many successive
        sequences stay ``together``."""
        layout = self.parallel.config
        ranks = plan(
            _sums(self._lengths(sequences), together),
            self.parallel.data,
            self.config.parallel.micro_batch_tokens,
            layout.micro_batch_multiple,
            _sums([self.cost.of(s) for s in sequences], together),
        )
        pad, device = self.tokenizer.pad_token_id or 0, platform.current().device()
        return [
            pack(
                sequences,
                [together * i + n for i in indices for n in range(together)],
                self.model.token_multiple,
                pad,
                device,
                layout.context,
                self.parallel.context_rank,
            )
            for indices in ranks[self.parallel.data_rank]
        ]

    def enough(self, sequences: list[PackedSequence], wanted: int) -> int:
        """How many of the first sequences, at least ``wanted``, ``micro_batches`` can share out."""
        tokens, group = self.config.parallel.micro_batch_tokens, self.parallel.config.micro_batch_multiple
        return enough(self._lengths(sequences), wanted, self.parallel.data, tokens, group)

    def _lengths(self, sequences: list[PackedSequence]) -> list[int]:
        return [round_up(len(s), self.parallel.config.token_multiple) for s in sequences]

    def example(self, row: Row) -> Example:
        """An SFT row's tokens. Raises ConfigError naming a row that can't be used."""
        c = self.config
        return tokenize_example(self.prompts, row, c.rollout.thinking_marks[0], c.parallel.micro_batch_tokens)

    def record(self, metrics: dict[str, Any]) -> dict[str, Any]:
        """Collective: rank 0 writes a step's metrics with the seconds of its phases, which are returned, and names the
        ranks that were slow; the clocks start anew. Here the ranks learn that one of them was told to end."""
        self._lap(BETWEEN)
        factor, alone = self.config.cluster.slow_factor, [("probe", probe(platform.current().device()))]
        ranks = all_gather_json([self.laps, alone, preemption.preemption_requested()], self.control)
        self.laps, self.lap_began = [], time.perf_counter()  # all ranks are here
        self.ending = any(r[2] for r in ranks)
        for line in slow_ranks([r[0] for r in ranks], factor, 1.0) + slow_ranks([r[1] for r in ranks], factor, 0.0):
            self.say(line)
        times = {f"time/{name}": seconds for name, seconds in self.seconds.items()}
        row = {**metrics, "skipped_updates": self.skipped, "time/step": sum(self.seconds.values()), **times}
        self.seconds.clear()
        self.skipped = 0
        if self.rank == 0:
            records.append_rows(self.run_dir / "metrics.jsonl", [row])
            part = "" if self.run_dir == Path(self.config.run_dir) else f"{self.run_dir.name}/"
            for log in self.loggers:
                log(row, part)
        return row

    def event(self, kind: str, **what: Any) -> None:
        """Rank 0 writes it down."""
        if self.rank == 0:
            records.event(Path(self.config.run_dir), kind, **what)

    def truncate_records(self, step: int) -> None:
        """Drop the records of later steps, which a resumed run makes again."""
        if self.rank == 0:
            for name in ("metrics.jsonl", "samples.jsonl"):
                if (self.run_dir / name).exists():
                    records.truncate_after(self.run_dir / name, step)

    def open_checkpoints(self) -> tuple[checkpoint.Saver, Path | None]:
        """Collective: what writes the run's checkpoints, and the newest whole one that is there."""
        folder = self.run_dir / "checkpoints"
        newest = checkpoint.newest_intact(folder, self.say)
        if newest:
            self.skipped_in_a_row = Counter(checkpoint.progress(newest)["skipped_in_a_row"])
        self.savers.append(checkpoint.Saver(folder, self.config.checkpoint.keep))
        return self.savers[-1], newest

    def saves(self, step: int, total: int) -> bool:
        """Whether there is a checkpoint behind this many of the part's steps."""
        return step == total or step % self.config.checkpoint.every_steps == 0 or self.ending

    def saved(self, saver: checkpoint.Saver, step: int) -> None:
        """A checkpoint of so many steps has begun. Raises Preempted when it is complete, where the run is to end."""
        self.event("checkpoint", step=step)
        if self.ending:
            saver.wait()
            raise preemption.Preempted(f"told to end by {preemption.SIGNAL.name}: step {step} is saved")

    def progress(self) -> dict[str, Any]:
        """What every stage's checkpoint holds beside its models."""
        return {"run": self.run_id, "skipped_in_a_row": self.skipped_in_a_row}

    def say(self, text: str) -> None:
        """A line for people, from rank 0, in its log too."""
        self.display.message(text)
        if self.rank == 0:
            logging.getLogger(__name__).warning(text)

    def export(self, folder: Path) -> None:
        """Collective: the present weights as a Hugging Face folder, written by one data-parallel replica."""
        self.watchdog.beat("export")
        writes, scalar = self.parallel.is_first_replica, self.model.is_scalar
        hf_checkpoint.export(self.model.shards, self.config.model.path, folder, writes, scalar)


@contextmanager
def open_session(config: Config) -> Iterator[Session]:
    """Collective: start engines and trainer side by side, join them by the bridge; all is stopped on the way out."""
    run_dir = Path(config.run_dir)
    rank = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))
    redirect_output(run_dir / "logs", rank)
    c = config
    node, nodes = int(os.environ["GROUP_RANK"]), int(os.environ["GROUP_WORLD_SIZE"])
    starts_engines = generates(c) and int(os.environ["LOCAL_RANK"]) == 0
    settings_of_engines = engine_settings(c, nodes) if starts_engines else []
    with ExitStack() as stack:
        display = stack.enter_context(Display(active=rank == 0))
        verifiers: dict[str, Verifier] = {}
        client: Client | None = None
        if settings_of_engines:  # samples are judged where the engines are
            names = {*mixing.verifier_names(c.rewards.mix), *c.data.scores}
            client = stack.enter_context(Client(registry.servers_of(names, c.rewards), c.rewards.client))
            if c.rewards.placement == settings.COLOCATED:
                client.sleep(connect_seconds=c.rewards.supervisor.startup_timeout)
            verifiers = registry.open_verifiers(names, c.rewards, client)
        turns: Turns | None = None
        if settings_of_engines and c.rollout.environment.name is not None:
            replies = open_environment(c.rollout.environment.name, c.rollout.environment.settings)
            tokenizer = AutoTokenizer.from_pretrained(c.model.path)
            turns = Turns(replies, tokenizer, c.rollout.environment.max_turns)
        engines: list[Engine] = []
        stack.callback(stop_engines, engines)
        for i, its in enumerate(settings_of_engines):
            number = node * len(settings_of_engines) + i
            engines.append(Engine(its, run_dir / "logs" / f"engine_{number}.log"))
        with display.stage("trainer: process groups, Megatron-Core model, weights"):
            torch.set_num_threads(c.cluster.threads)
            layout = parallel.initialize(c.parallel, c.seed, c.cluster.timeout)
            stack.callback(parallel.destroy)
            control = parallel.control_group()
            hf_config = hf_checkpoint.config(c.model.path)
            if "reward_model" in c.stage.trains:
                hf_config = scalar_config(hf_config)
            model = models.build(hf_config, layout, c.precision, c.model.frozen)
            hf_checkpoint.load(model.shards, c.model.path)
            prompts = PromptProcessor(c.model.path, c.data.max_prompt_tokens, ImageLimits(**vars(c.data.images)))
        bridge = None
        if generates(c):
            with display.stage("vLLM: engines ready"):
                deadline = time.monotonic() + c.rollout.startup_timeout
                on_all_ranks(partial(wait_until_ready, engines, deadline), control)
            with display.stage("weight bridge: plan from trainer shards to vLLM's layout"):
                bridge = WeightSync(
                    model.shards,
                    engines,
                    control,
                    bucket_bytes=c.rollout.sync_bucket_mib << 20,
                    verify_every=c.rollout.sync_verify_every,
                    plans=Path("build/weight_sync"),
                )
        run_id = from_rank_zero(lambda: records.run_id(run_dir, c.resume), control)
        if rank == 0:
            (run_dir / "config.yaml").write_text(yaml.safe_dump(asdict(config), sort_keys=False))
            machine = records.environment(platform.current().machine(), dist.get_world_size())
            records.write_json(run_dir / "environment.json", {"run": {"id": run_id}, **machine})
            stack.enter_context(records.launch(run_dir, c.resume))
        loggers = open_loggers(c, run_dir, run_id, stack) if rank == 0 else []
        from_rank_zero(lambda: (run_dir / "logs" / NOTICE).unlink(missing_ok=True), control)
        watchdog = Watchdog(run_dir / "logs", rank, c.cluster.watchdog)
        stack.callback(watchdog.stop)
        savers: list[checkpoint.Saver] = []
        stack.callback(join, savers, c.cluster.timeout)  # a failed run's too
        yield Session(
            config,
            run_dir,
            rank,
            display,
            layout,
            model,
            prompts,
            prompts.tokenizer,
            engines,
            bridge,
            control,
            verifiers,
            client,
            turns,
            loggers,
            node,
            nodes,
            cost_of(hf_config, c.model.frozen),
            watchdog,
            run_id,
            savers,
            HostCopy(model, weights=False) if c.optimizer.offload else None,
        )


def join(savers: Sequence[checkpoint.Saver], seconds: float) -> None:
    """Until the checkpoints that were begun are complete, or have failed."""
    for saver in savers:
        saver.join(seconds)


def engine_settings(config: Config, nodes: int) -> list[EngineSettings]:
    """Of the engines of one of the job's nodes. Raises ConfigError where they can't be shared out."""
    count = engines_of_a_node(config, nodes)
    tensor = config.rollout.tensor
    shared = EngineSettings(
        rollout=config.rollout,
        model=config.model.path,
        dtype=DTYPES[config.precision.name],
        max_model_len=config.data.max_prompt_tokens + config.rollout.max_response_tokens,
        platform=config.cluster.platform,
        thinking=thinking_marks(config),
    )
    if config.cluster.platform == "cpu":
        return [shared] * count
    gpus = range(config.cluster.ranks // nodes)
    own_first = [sorted(gpus, key=lambda gpu: gpu // tensor != i) for i in range(count)]
    return [replace(shared, devices=tuple(devices)) for devices in own_first]


def thinking_marks(config: Config) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Token ids of ``rollout.thinking_marks``; None without a budget. Raises ConfigError for a mark without tokens."""
    if config.rollout.thinking_budget is None:
        return None
    tokenizer = AutoTokenizer.from_pretrained(config.model.path)
    begin, end = (tuple(tokenizer.encode(mark, add_special_tokens=False)) for mark in config.rollout.thinking_marks)
    if not begin or not end:
        raise ConfigError(
            f"rollout.thinking_marks={config.rollout.thinking_marks}: a mark has no token; give two texts"
        )
    return begin, end


def _sums(values: list[int], count: int) -> list[int]:
    """Of so many successive values each."""
    return [sum(values[i : i + count]) for i in range(0, len(values), count)]


def wait_until_ready(engines: list[Engine], deadline: float) -> None:
    for engine in engines:
        engine.wait_until_ready(deadline)


def redirect_output(folder: Path, rank: int) -> None:
    """Send warnings and library logs to ``rank_<n>.log``; only rank 0's standard output stays on the terminal."""
    folder.mkdir(parents=True, exist_ok=True)
    log = os.open(folder / f"rank_{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 2)
    if rank != 0:
        os.dup2(log, 1)
    os.close(log)
    logs.configure(rank, sys.stderr)
