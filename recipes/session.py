"""What a run holds: trainer, engines, weight bridge, tokenizer, records. Opened once, closed on every way out."""

import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
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

from megatron_ext import hf_checkpoint, optimizer, parallel, platform
from megatron_ext import model as models
from megatron_ext.collectives import on_all_ranks
from megatron_ext.optimizer import OptimizerSettings
from megatron_ext.packing import Cost, MicroBatch, PackedSequence, cost_of, enough, pack, plan
from megatron_ext.precision import DTYPES
from megatron_ext.weight_map import round_up
from recipes import records, trainer
from recipes.config import Config, ConfigError
from recipes.data.processor import ImageLimits, PromptProcessor
from recipes.display import Display
from rewards import mixing
from rewards.client import Client
from rewards.verdict import Verifier
from rollout import sampler
from rollout.engine import Engine, EngineSettings, stop_engines
from rollout.generation import Fleet, Generation
from rollout.sample import Prompt, Sample, Sampling
from rollout.weight_sync.bridge import WeightBridge


@dataclass
class Session:
    """One run on this rank. ``engines``: those of this node, on its first rank, else none, and ``verifiers`` alike;
    ``node`` of ``nodes``; ``control`` is a gloo group of all ranks."""

    config: Config
    run_dir: Path
    rank: int
    display: Display
    parallel: parallel.Parallel
    model: models.Model
    prompts: PromptProcessor
    tokenizer: Any
    engines: list[Engine]
    bridge: WeightBridge
    control: dist.ProcessGroup
    verifiers: dict[str, Verifier]
    wandb: Any
    node: int
    nodes: int
    cost: Cost  # of a sequence of the model
    version: int = 0  # of the weights that the engines have
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the block's wall time to ``seconds[name]``."""
        started = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - started

    def build_optimizer(self, stage: Any, steps: int) -> tuple[MegatronOptimizer, OptimizerParamScheduler]:
        """A fresh optimiser for a stage's learning-rate settings, with master weights taken from the model."""
        c = self.config.optimizer
        built, scheduler = optimizer.build(
            self.model,
            OptimizerSettings(
                learning_rate=stage.learning_rate,
                minimum_fraction=stage.minimum_fraction,
                warmup_fraction=stage.warmup_fraction,
                decay=stage.decay,
                betas=(c.betas[0], c.betas[1]),
                epsilon=c.epsilon,
                weight_decay=c.weight_decay,
                clip_grad_norm=c.clip_grad_norm,
            ),
            steps,
        )
        built.reload_model_params()
        return built, scheduler

    def sync_weights(self, version: int) -> int:
        """Collective: bring every engine to the trainer's weights, verified bit for bit; returns the bytes placed.

        ``version`` is the number of RL steps that made the weights, so that a resumed run's samples name the same one.
        Engines that died are started again first.
        """

        def prepare() -> int:
            died = [engine for engine in self.engines if not engine.alive]
            for engine in died:
                engine.restart()
            wait_until_ready(died, time.monotonic() + self.config.rollout.startup_timeout)
            self._tell_sleepers("/wake", ["weights"])
            return len(died)

        if any(on_all_ranks(prepare, self.control)):
            self.bridge.attach(self.engines)
        placed, self.version = self.bridge.sync(version)["bytes"], version
        on_all_ranks(lambda: self._tell_sleepers("/wake", ["kv_cache"]), self.control)
        return placed

    def sleep_engines(self) -> None:
        """Collective: the engines' GPU memory is the trainer's until the next sync, where ``rollout.sleep`` says so."""
        on_all_ranks(lambda: self._tell_sleepers("/sleep", ["weights", "kv_cache"]), self.control)

    def _tell_sleepers(self, path: str, tags: list[str]) -> None:
        for engine in self.engines:
            if engine.settings.sleep and engine.alive:
                engine.call("POST", path, {"tags": tags})

    @property
    def fleet(self) -> Fleet:
        return Fleet(self.engines, self.node, self.nodes)

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
        requests = sampler.make_requests(prompts, samples_per_prompt, self.config.seed, step)
        generation = Generation(self.fleet, requests, self.sampling(temperature), on_sample)
        return generation.collect(self.control, partial(self.sync_weights, self.version))

    def text(self, sample: Sample) -> str:
        """The response as a reader sees it. For verifiers and people only: training uses the token ids."""
        return self.tokenizer.decode(sample.response_token_ids, skip_special_tokens=True).strip()

    def micro_batches(self, sequences: list[PackedSequence]) -> list[MicroBatch]:
        """This data-parallel rank's packed micro-batches of a batch that every rank knows whole."""
        layout, costs = self.parallel.layout, [self.cost.of(s) for s in sequences]
        tokens = self.config.parallel.micro_batch_tokens
        ranks = plan(self._lengths(sequences), self.parallel.data, tokens, layout.micro_batch_multiple, costs)
        pad, device = self.tokenizer.pad_token_id or 0, platform.current().device()
        return [
            pack(sequences, indices, self.model.token_multiple, pad, device, layout.context, self.parallel.context_rank)
            for indices in ranks[self.parallel.data_rank]
        ]

    def enough(self, sequences: list[PackedSequence], wanted: int) -> int:
        """How many of the first sequences, at least ``wanted``, ``micro_batches`` can share out."""
        tokens, group = self.config.parallel.micro_batch_tokens, self.parallel.layout.micro_batch_multiple
        return enough(self._lengths(sequences), wanted, self.parallel.data, tokens, group)

    def _lengths(self, sequences: list[PackedSequence]) -> list[int]:
        return [round_up(len(s), self.parallel.layout.token_multiple) for s in sequences]

    def truncate_records(self, step: int) -> None:
        """Drop the records of later steps, which a resumed run makes again."""
        if self.rank == 0:
            for name in ("metrics.jsonl", "samples.jsonl"):
                if (self.run_dir / name).exists():
                    records.truncate_after(self.run_dir / name, step)

    def export(self, folder: Path) -> None:
        """Collective: the present weights as a Hugging Face folder, written by one data-parallel replica."""
        hf_checkpoint.export(self.model.shards, self.config.model.path, folder, self.parallel.is_first_replica)


@contextmanager
def open_session(config: Config) -> Iterator[Session]:
    """Collective: start engines and trainer side by side, join them by the bridge; all is stopped on the way out."""
    run_dir = Path(config.run_dir)
    rank = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))
    redirect_output(run_dir / "logs", rank)
    c = config
    node, nodes = int(os.environ["GROUP_RANK"]), int(os.environ["GROUP_WORLD_SIZE"])
    settings_of_engines = engine_settings(c, nodes) if int(os.environ["LOCAL_RANK"]) == 0 else []
    with ExitStack() as stack:
        display = stack.enter_context(Display(active=rank == 0))
        verifiers: dict[str, Verifier] = {}
        if settings_of_engines:  # samples are judged where the engines are
            names = {*mixing.verifier_names(c.rewards.mix), *c.data.scores}
            client = stack.enter_context(Client(mixing.servers_of(names, c.rewards), c.rewards.client))
            verifiers = mixing.open_verifiers(names, c.rewards, client)
        engines: list[Engine] = []
        stack.callback(stop_engines, engines)
        for i, its in enumerate(settings_of_engines):
            number = node * len(settings_of_engines) + i
            engines.append(Engine(its, run_dir / "logs" / f"engine_{number}.log"))
        with display.stage("trainer: process groups, Megatron-Core model, weights"):
            torch.set_num_threads(c.cluster.threads)
            layout = parallel.initialize(trainer.layout(c), c.seed, c.cluster.timeout)
            stack.callback(parallel.destroy)
            control = parallel.control_group()
            settings = models.ModelSettings(
                trainer.precision(c), c.parallel.recompute, c.parallel.distributed_optimizer, tuple(c.model.frozen)
            )
            hf_config = hf_checkpoint.config(c.model.path)
            model = models.build(hf_config, layout, settings)
            hf_checkpoint.load(model.shards, c.model.path)
            prompts = PromptProcessor(c.model.path, c.data.max_prompt_tokens, ImageLimits(**vars(c.data.images)))
        with display.stage("vLLM: engines ready"):
            deadline = time.monotonic() + c.rollout.startup_timeout
            on_all_ranks(partial(wait_until_ready, engines, deadline), control)
        with display.stage("weight bridge: plan from trainer shards to vLLM's layout"):
            bridge = WeightBridge(
                model.shards,
                engines,
                control,
                bucket_bytes=c.rollout.sync_bucket_mib << 20,
                verify_every=c.rollout.sync_verify_every,
                plans=Path("build/weight_sync"),
            )
        if rank == 0:
            (run_dir / "config.yaml").write_text(yaml.safe_dump(asdict(config), sort_keys=False))
            machine = records.environment(platform.current().machine(), dist.get_world_size())
            records.write_json(run_dir / "environment.json", machine)
        wandb = None
        if rank == 0 and c.logger.wandb_project:
            import wandb as weights_and_biases

            wandb = weights_and_biases.init(
                project=c.logger.wandb_project, name=c.recipe.name, dir=run_dir, config=asdict(config)
            )
            stack.callback(wandb.finish)
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
            wandb,
            node,
            nodes,
            cost_of(hf_config, c.model.frozen),
        )


def engine_settings(config: Config, nodes: int) -> list[EngineSettings]:
    """Of the engines of one of the job's nodes. Raises ConfigError when these don't share the engines evenly."""
    c = config
    if c.rollout.engines % nodes:
        raise ConfigError(
            f"rollout.engines={c.rollout.engines}: the job has {nodes} nodes; use a multiple, each gets as many"
        )
    count, gpus = c.rollout.engines // nodes, int(os.environ["LOCAL_WORLD_SIZE"])  # a rank a GPU
    if c.cluster.platform == "cuda" and count * c.rollout.tensor > gpus:
        raise ConfigError(
            f"rollout.engines={c.rollout.engines}, rollout.tensor={c.rollout.tensor}: {count} engines of so many GPUs "
            f"do not fit on a node's {gpus}"
        )
    shared = EngineSettings(
        model=c.model.path,
        dtype=DTYPES[c.precision.name],
        max_model_len=c.data.max_prompt_tokens + c.rollout.max_response_tokens,
        max_num_seqs=c.rollout.max_num_seqs,
        max_num_batched_tokens=c.rollout.max_num_batched_tokens,
        kv_cache_gib=c.rollout.kv_cache_gib,
        tensor_parallel_size=c.rollout.tensor,
        threads=c.rollout.threads,
        device=c.cluster.platform,
        thinking=thinking_marks(c),
        sleep=c.rollout.sleep,
        stall_timeout=c.rollout.stall_timeout,
        quantization=c.rollout.quantization,
    )
    if c.cluster.platform == "cpu":
        return [shared] * count
    own_first = [sorted(range(gpus), key=lambda gpu: gpu // c.rollout.tensor != i) for i in range(count)]
    return [replace(shared, devices=tuple(gpus)) for gpus in own_first]


def thinking_marks(config: Config) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Token ids of ``rollout.thinking_marks``; None without a budget."""
    if config.rollout.thinking_budget is None:
        return None
    tokenizer = AutoTokenizer.from_pretrained(config.model.path)
    begin, end = (tuple(tokenizer.encode(mark, add_special_tokens=False)) for mark in config.rollout.thinking_marks)
    return begin, end


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
