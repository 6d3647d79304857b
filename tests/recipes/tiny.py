"""A tiny random Llama with a tokenizer and data sets of its own, and whole runs on it, as a user starts them."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tests import warm

ROOT = Path(__file__).resolve().parents[2]
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
OPENS_THINKING = TEMPLATE.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
KINDS = {"harmful": "safety", "borderline": "safety", "benign": "safety", "task": "general_rule"}
LETTERS = "tests.recipes.letters.letters"


def make_tokenizer() -> Any:
    """Byte-level BPE with a few merges and ChatML's special tokens: few id sequences are what encoding would give."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())
    )
    tokenizer.train_from_iterator([row["prompt"] for row in make_rows(4)] + ["user", "assistant"] * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=TEMPLATE
    )


def make_rows(per_kind: int) -> list[dict[str, Any]]:
    """Rows of the demo's schema, ``per_kind`` of each kind."""
    return [
        {"id": f"{kind}-{i}", "label": label, "kind": kind, "prompt": f"the {kind} prompt {i}"}
        | ({"answer": str(i)} if kind == "task" else {"keywords": ["prompt", kind]})
        for kind, label in KINDS.items()
        for i in range(per_kind)
    ]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make(folder: Path, width: int = 96, heads: int = 6, kv_heads: int = 3) -> None:
    """Write ``model/``, ``sft.jsonl``, ``rl.jsonl``, ``eval.jsonl`` and ``conf/rewards/letters.yaml`` into ``folder``.

    Three key-value groups do not divide by two (the trainer pads them), nor the vocabulary of 300 by 128. ``width``: of
    the hidden states and of the feed-forward layer.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=width,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=32,
        vocab_size=len(tokenizer),
        tie_word_embeddings=True,
        max_position_embeddings=128,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        initializer_range=0.1,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = {
        "rl": make_rows(4),
        "eval": [{**row, "id": f"eval-{row['id']}"} for row in make_rows(2)],
        "sft": [{**row, "response": f"the answer {row['id']}"} for row in make_rows(2)],
    }
    for name, content in rows.items():
        write_rows(folder / f"{name}.jsonl", content)
    mix = {"safety": {"safety": 0.5, LETTERS: 0.5}, "general_rule": {"capability": 0.5, LETTERS: 0.5}}
    (folder / "conf" / "rewards").mkdir(parents=True)
    (folder / "conf" / "rewards" / "letters.yaml").write_text(json.dumps({"defaults": ["base"], "mix": mix}))


def overrides(folder: Path, run_dir: Path, *more: str) -> list[str]:
    """Hydra overrides that make the demo's recipe a tiny one: 2 SFT steps, 4 RL steps of 4 prompts x 4 samples."""
    return [
        f"--config-dir={folder / 'conf'}",
        "recipe=demo",
        "rewards=letters",
        f"model.path={folder / 'model'}",
        # All weights are trained.
        "model.frozen=[]",
        *(f"data.{field}={folder / file}" for field, file in DATA_FILES.items()),
        "~data.scores.refusal",  # whose prompts these are not
        f"run_dir={run_dir}",
        "data.mix={" + ",".join(f"{kind}:1" for kind in KINDS) + "}",
        "data.evaluation_samples=1",
        "data.max_prompt_tokens=40",
        "rollout.max_response_tokens=8",
        "rollout.kv_cache_gib=0.05",
        "rollout.threads=1",
        "parallel.micro_batch_tokens=128",
        "stage.sft.steps=2",
        "stage.sft.rows_per_step=4",
        "stage.sft.learning_rate=1e-3",
        "algorithm.steps=4",
        "algorithm.prompts_per_step=4",
        "algorithm.samples_per_prompt=4",
        "algorithm.updates_per_rollout=1",
        "algorithm.learning_rate=1e-3",
        "optimizer.betas=[0.9,0.95]",
        "checkpoint.every_steps=1",
        *more,
    ]


SECRET = "sesame-4711-of-the-environment"  # of every run
DATA_FILES = {"sft": "sft.jsonl", "prompts": "rl.jsonl", "evaluation": "eval.jsonl"}


def marked(pid: int, marker: str) -> bool:
    try:
        return marker.encode() in Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:  # ended, or another user's
        return False


def mapped_shared_memory(process: Path) -> set[str]:
    """Names in /dev/shm that a process, /proc/PID, has mapped or open; none when it has ended."""
    names = set()
    with contextlib.suppress(OSError):
        names |= {line.split("/dev/shm/", 1)[1].strip() for line in (process / "maps").open() if "/dev/shm/" in line}
        for descriptor in (process / "fd").iterdir():
            target = os.readlink(descriptor)
            if target.startswith("/dev/shm/"):
                names.add(target.removeprefix("/dev/shm/"))
    return names


class Run:
    """One start of ``python -m recipes.train`` in a process group of its own, as a shell starts it.

    It is forked from a process with all imports, unless it is to be as ``real`` as a user's (see ``tests.warm``). All
    its processes inherit a marker in their environment, by which they are found whatever their parent.
    """

    count = 0

    def __init__(self, arguments: list[str], real: bool = False) -> None:
        Run.count += 1
        self.marker = f"TINY_RUN={os.getpid()}-{Run.count}-end"
        self.shared_before, self.semaphores = set(os.listdir("/dev/shm")), set[str]()
        keep = {key: value for key, value in os.environ.items() if key not in ("RANK", "SLURM_STEP_ID")}
        given = dict([self.marker.split("=")]) | dict.fromkeys(("WANDB_API_KEY", "HF_TOKEN", "JUDGE_KEY"), SECRET)
        with contextlib.nullcontext() if real else warm.processes():
            self.process = subprocess.Popen(
                [sys.executable, "-m", "recipes.train", *arguments],
                cwd=ROOT,
                env=keep | given,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                # What runs in the background ignores SIGINT.
                preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
            )

    def processes(self) -> dict[int, str]:
        """Living processes of the run: pid → command line."""
        command_lines = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and marked(int(entry.name), self.marker):
                try:
                    command_lines[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                except OSError:
                    continue
        return command_lines

    def rank(self, rank: int) -> int | None:
        """Pid of a rank, None before it has opened its log."""
        processes = self.processes()
        for pid in processes:
            self.semaphores |= mapped_shared_memory(Path(f"/proc/{pid}"))
        return next((pid for pid in processes if self.logs_to(pid, f"rank_{rank}.log")), None)

    def logs_to(self, pid: int, name: str) -> bool:
        """Whether a process is the launcher's child with this log."""
        with contextlib.suppress(OSError):
            parent = (Path(f"/proc/{pid}/stat")).read_text().rpartition(")")[2].split()[1]
            return int(parent) == self.process.pid and Path(f"/proc/{pid}/fd/2").readlink().name == name
        return False

    def wait_for(self, what: str, happened: Callable[[], Any], seconds: float = 600) -> Any:
        """Wait until ``happened`` returns something true; returns that. Fails when the run ends first or time is up."""
        deadline = time.monotonic() + seconds
        while not (result := happened()):
            assert self.process.poll() is None, f"the run ended before {what}:\n{self.output()}"
            assert time.monotonic() < deadline, f"no {what} within {seconds} s"
            time.sleep(0.01)
        return result

    def output(self, seconds: float = 600) -> str:
        """What the run printed, waiting for its end."""
        return self.process.communicate(timeout=seconds)[0].decode()

    def remains(self, seconds: float) -> tuple[dict[int, str], set[str]]:
        """Processes and orphaned names in /dev/shm left after ``seconds``; at once when there are none.

        Semaphores count that the run had when :meth:`rank` was asked: those of tests beside this one may lie about.
        """
        deadline = time.monotonic() + seconds
        while True:
            living = (process for process in Path("/proc").iterdir() if process.name.isdigit())
            shared = set(os.listdir("/dev/shm")).difference(self.shared_before, *map(mapped_shared_memory, living))
            shared = {name for name in shared if not name.startswith("sem.") or name in self.semaphores}
            left = (self.processes(), shared)
            if not any(left) or time.monotonic() > deadline:
                return left
            time.sleep(0.1)

    def kill_all(self) -> None:
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def complete(arguments: list[str], seconds: float = 600, real: bool = False) -> str:
    """A :class:`Run` that nothing disturbs; returns what it printed. Fails with the end of its logs when it fails."""
    run = Run(arguments, real)
    try:
        printed = run.output(seconds)
    finally:
        run.kill_all()
    assert run.process.returncode == 0, printed[-4000:]
    return printed
