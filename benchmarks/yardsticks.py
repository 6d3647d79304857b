"""The two yardsticks of ``benchmarks.loop``, each in its own process: plain transformers and bare vLLM.

They use neither the trainer nor the rollout engine, with two exceptions. The algorithm's loss function is shared, so
that both sides minimise the same loss. The engine's environment variables are shared, so that both vLLMs run under the
same conditions. Only the waiting of idle threads is left to PyTorch's default, because the engine shares its cores with
the ranks, while a yardstick runs when all of them wait.

For each repetition a yardstick reads one JSON line from standard input and writes one as its answer. Between
repetitions it blocks in the read and uses no CPU time.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace, TracebackType
from typing import Any, Self

from megatron_ext.processes import die_with
from recipes.config import Config
from rollout.engine import EngineSettings, environment

TRAINING = (
    "Plain transformers: AutoModelForCausalLM.from_pretrained, SDPA attention, weights, activations and gradients in "
    "the run's precision; torch.optim.AdamW(fused=True) on FP32 master weights, clip_grad_norm_, update copied back. "
    "Samples in the order of the batch, prompts padded left and responses right, in micro-batches of at most "
    "parallel.micro_batch_tokens padded tokens; logits of the response part only (logits_to_keep). What the run "
    "freezes is frozen. One process, every core. Timed: forward, loss, backward, clipping, update; not timed: padding. "
    "Ours is the full train phase."
)
GENERATION = (
    "Bare vLLM: LLM.generate in one process; same prompts, seeds, sampling, log-probs, dtype, threads and limits, "
    "PyTorch's default for how threads wait, no detokenisation on either side; weights from the same checkpoint, "
    "without the weight sync. Timed: LLM.generate alone. Ours is the full generate phase: with tokenisation, HTTP and "
    "broadcast to the ranks."
)

# Variables of the engine's environment that say how idle OpenMP threads wait.
WAIT_VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


class Yardstick:
    """A yardstick process. As a context manager it ends the process; the process also ends when its parent dies."""

    def __init__(self, name: str, settings: dict[str, Any], env: dict[str, str], log: Path) -> None:
        """Start the process. The first :meth:`ask` waits until it is ready."""
        self.name = name
        self.log = log
        with log.open("ab") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.yardsticks", name, json.dumps(settings), str(os.getpid())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=env,
                text=True,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.kill()
        self.process.wait()

    def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        """One repetition. Raises RuntimeError with the path of the log when the process has died."""
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(question) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # the process has died: readline returns nothing, and the error below has the exit code
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the yardstick {self.name!r} ended with code {self.process.wait()}: see {self.log}")
        return json.loads(answer)


def training(config: Config, engine: EngineSettings, folder: Path, log: Path) -> Yardstick:
    """Start plain transformers with the model in ``folder`` on all cores of this machine."""
    settings = {
        "model": str(folder),
        "precision": config.precision.name,
        "temperature": config.rollout.temperature,
        "micro_batch_tokens": config.parallel.micro_batch_tokens,
        "optimizer": asdict(config.optimizer),
        "algorithm": asdict(config.algorithm),
        "frozen": config.model.frozen,
    }
    env = {**yardstick_environment(engine), "OMP_NUM_THREADS": str(len(os.sched_getaffinity(0)))}
    return Yardstick("training", settings, env, log)


def generation(engine: EngineSettings, folder: Path, log: Path) -> Yardstick:
    """Start bare vLLM with the model in ``folder`` and the settings of ``engine``."""
    return Yardstick("generation", {**asdict(engine), "model": str(folder)}, yardstick_environment(engine), log)


def yardstick_environment(engine: EngineSettings) -> dict[str, str]:
    """The engine's environment, with PyTorch's default for how idle threads wait."""
    return {name: value for name, value in environment(engine).items() if name not in WAIT_VARIABLES}


def padded_batches(lengths: Sequence[tuple[int, int]], limit: int) -> list[list[int]]:
    """Split samples, in their order, into micro-batches of at most ``limit`` padded tokens.

    ``lengths`` are the (prompt, response) tokens of each sample. A micro-batch of n samples has n × (longest prompt +
    longest response) tokens. A sample above the limit gets a micro-batch of its own.
    """
    batches: list[list[int]] = []
    longest_prompt = 0
    longest_response = 0
    for i, (prompt, response) in enumerate(lengths):
        longest_prompt = max(longest_prompt, prompt)
        longest_response = max(longest_response, response)
        if batches and (len(batches[-1]) + 1) * (longest_prompt + longest_response) <= limit:
            batches[-1].append(i)
        else:
            batches.append([i])
            longest_prompt = prompt
            longest_response = response
    return batches


def train(settings: dict[str, Any]) -> Any:
    """The function that answers {"sequences": [{prompt, response, values}]} with {seconds, loss, grad_norm, …}."""
    import torch
    import torch.nn.functional as F
    from transformers import AutoModelForCausalLM

    from recipes.algorithms import objective

    options = SimpleNamespace(**settings["algorithm"])
    loss_of: Any = objective.loss(options, None)  # type: ignore[arg-type]
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[settings["precision"]]
    model = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=dtype).train()
    if settings["frozen"] not in ([], ["embedding"]):
        raise ValueError(f"model.frozen={settings['frozen']}: plain transformers freezes nothing or ['embedding']")
    if settings["frozen"]:
        model.get_input_embeddings().requires_grad_(False)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    has_master_weights = dtype is not torch.float32
    masters = weights
    if has_master_weights:
        masters = [weight.detach().float().requires_grad_() for weight in weights]
    adam = torch.optim.AdamW(
        masters,
        lr=options.learning_rate,
        betas=tuple(settings["optimizer"]["betas"]),
        eps=settings["optimizer"]["epsilon"],
        weight_decay=settings["optimizer"]["weight_decay"],
        fused=True,
    )

    def tensors(sequences: list[dict[str, Any]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, dict[str, Any]]:
        """Pad n sequences.

        Returns token ids and attention mask [n, prompt + response], the mask of response tokens [n, response], and the
        values [response tokens of all sequences].
        """
        longest_prompt = max(len(sequence["prompt"]) for sequence in sequences)
        longest_response = max(len(sequence["response"]) for sequence in sequences)
        tokens = torch.zeros(len(sequences), longest_prompt + longest_response, dtype=torch.long)
        mask = torch.zeros_like(tokens)
        values: dict[str, list[float]] = {name: [] for name in sequences[0]["values"]}
        for row, sequence in enumerate(sequences):
            start = longest_prompt - len(sequence["prompt"])
            end = longest_prompt + len(sequence["response"])
            tokens[row, start:end] = torch.tensor(sequence["prompt"] + sequence["response"])
            mask[row, start:end] = 1
            for name, of_sequence in sequence["values"].items():
                values[name] += of_sequence
        response_mask = mask[:, longest_prompt:].bool()
        return tokens, mask, response_mask, {name: torch.tensor(column) for name, column in values.items()}

    def answer(question: dict[str, Any]) -> dict[str, Any]:
        sequences = question["sequences"]
        lengths = [(len(sequence["prompt"]), len(sequence["response"])) for sequence in sequences]
        plan = padded_batches(lengths, settings["micro_batch_tokens"])
        batches = [tensors([sequences[i] for i in indices]) for indices in plan]
        total = 0.0
        started = time.perf_counter()
        for tokens, mask, response_mask, values in batches:
            width = response_mask.shape[1]
            output = model(tokens, attention_mask=mask, logits_to_keep=width + 1, use_cache=False)
            logits = output.logits[:, :-1][response_mask].float()
            if settings["temperature"] != 1.0:
                logits = logits / settings["temperature"]
            log_probs = -F.cross_entropy(logits, tokens[:, -width:][response_mask], reduction="none")
            response_lengths = response_mask.sum(dim=1)
            # The part of a micro-batch that the loss reads.
            micro_batch = SimpleNamespace(
                values=values,
                lengths=response_lengths,
                response_lengths=response_lengths,
                owners=torch.arange(len(response_lengths)).repeat_interleave(response_lengths),
            )
            # Only our side computes entropies, as a metric.
            outputs = torch.stack([log_probs, torch.zeros_like(log_probs)])
            loss, _ = loss_of(outputs, micro_batch)
            loss.backward()
            total += loss.item()
        if has_master_weights:
            for master, weight in zip(masters, weights, strict=True):
                master.grad = weight.grad.float()
                weight.grad = None
        grad_norm = torch.nn.utils.clip_grad_norm_(masters, settings["optimizer"]["clip_grad_norm"])
        adam.step()
        adam.zero_grad()
        if has_master_weights:
            with torch.no_grad():
                for master, weight in zip(masters, weights, strict=True):
                    weight.copy_(master)
        return {
            "seconds": time.perf_counter() - started,
            "loss": total,
            "grad_norm": float(grad_norm),
            "micro_batches": len(batches),
            "tokens": sum(prompt + response for prompt, response in lengths),
            "padded_tokens": sum(tokens.numel() for tokens, *_ in batches),
        }

    return answer


def generate(settings: dict[str, Any]) -> Any:
    """The function that answers {"requests": [{prompt_token_ids, seed}], "sampling"} with {seconds, responses}.

    ``responses`` has the token ids of one response for each request.
    """
    from vllm import LLM, SamplingParams
    from vllm.inputs import tokens_input

    on_cpu = settings["platform"] == "cpu"
    llm = LLM(
        model=settings["model"],
        skip_tokenizer_init=True,
        dtype=settings["dtype"],
        tensor_parallel_size=settings["rollout"]["tensor"],
        max_model_len=settings["max_model_len"],
        max_num_seqs=settings["rollout"]["max_num_seqs"],
        max_num_batched_tokens=settings["rollout"]["max_num_batched_tokens"],
        enable_chunked_prefill=not on_cpu,  # on a CPU the prompt of a seeded request cannot be split
        kv_cache_memory_bytes=int(settings["rollout"]["kv_cache_gib"] * 2**30),
        **({"block_size": 32} if on_cpu else {}),  # as our engine has it, so that the responses are equal bit by bit
        enforce_eager=on_cpu,
        logprobs_mode="processed_logprobs",
        generation_config="vllm",
        disable_log_stats=True,
        seed=0,
    )

    def answer(question: dict[str, Any]) -> dict[str, Any]:
        sampling = question["sampling"]
        prompts = [tokens_input(request["prompt_token_ids"]) for request in question["requests"]]
        parameters = [
            SamplingParams(
                temperature=sampling["temperature"],
                top_p=sampling["top_p"],
                max_tokens=sampling["max_tokens"],
                stop_token_ids=sampling["stop_token_ids"],
                seed=request["seed"],
                logprobs=0,
                detokenize=False,
            )
            for request in question["requests"]
        ]
        llm.reset_prefix_cache()
        started = time.perf_counter()
        outputs = llm.generate(prompts, parameters, use_tqdm=False)
        seconds = time.perf_counter() - started
        return {"seconds": seconds, "responses": [list(output.outputs[0].token_ids) for output in outputs]}

    return answer


def main() -> None:
    """One yardstick process: ``python -m benchmarks.yardsticks NAME SETTINGS_JSON OWNER_PID``."""
    die_with(int(sys.argv[3]))
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)  # libraries print to stdout, which must not mix with the answers
        yardstick = {"training": train, "generation": generate}[sys.argv[1]]
        answer = yardstick(json.loads(sys.argv[2]))
        for line in sys.stdin:
            answers.write(json.dumps(answer(json.loads(line))) + "\n")
            answers.flush()


if __name__ == "__main__":
    main()
