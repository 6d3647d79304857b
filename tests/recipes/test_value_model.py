"""The value-model stage as a user starts it: what it learns from, its updates, its export, and what a real `vllm serve`
makes of it."""

import json
import re
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from megatron_ext.batch import TokenBatch
from recipes.config.stages import learned_principles
from recipes.data import value_examples
from recipes.data.processor import PromptProcessor
from recipes.data.row_order import shuffled
from recipes.data.rows import load_rows
from recipes.data.sources import Row, RowsById
from recipes.data.value_examples import Split, load_rollouts, prefix_batch
from recipes.errors import ConfigError
from recipes.run import exports, records
from recipes.training import value_model
from tests import served
from tests.recipes import tiny
from tests.recipes.plain_adamw import adamw

STEPS, ROLLOUTS, LEARNING_RATE, SEED = 3, 4, 2e-3, 1
SHARE = 0.4  # held out
BLOCK = 32  # tokens of a block of the prefix cache, the least on a CPU
PRINCIPLES = {"safety": ["safety"], "value": [], "knowledge": ["capability"], "courtesy": ["polite", "brief"]}
LEARNED = learned_principles(PRINCIPLES)
MARKS = ("<think>", "</think>")
SENTENCES = ("Sure, the word is this.", "I will not do it.", "It is a prompt!", "the answer\n", "<think>a task</think>")
OPTIONS = (
    "stage=value_model",
    "stage.value_model.epochs=null",
    f"stage.value_model.steps={STEPS}",
    f"stage.value_model.rollouts_per_step={ROLLOUTS}",
    f"stage.value_model.learning_rate={LEARNING_RATE}",
    f"stage.value_model.held_out_share={SHARE}",
    "stage.value_model.random_prefixes=2",
    "stage.value_model.decay=constant",
    "stage.value_model.warmup_fraction=0",
    "stage.value_model.principles=" + json.dumps(PRINCIPLES).replace('"', ""),
    "precision=fp32",
    "parallel=tp1",
    "parallel.context=2",
    "cluster.ranks=2",
    "parallel.micro_batch_tokens=256",
)


def samples(prompts: list[dict[str, Any]], per_prompt: int) -> list[dict[str, Any]]:
    """Lines of samples.jsonl. Of each kind of prompt other verifiers were asked; one failed on every fifth."""
    chance = np.random.default_rng(5)
    failure = {"reason": "no reply", "raw": "", "traceback": ""}
    lines = []
    for row in prompts:
        for index in range(per_prompt):
            names = ["capability"] if row["kind"] == "task" else ["safety", "polite", "brief"]
            if row["kind"] == "borderline":
                names = ["safety"]
            verdicts = {name: {"score": float(chance.integers(0, 5) / 4), "label": "", "raw": ""} for name in names}
            if len(lines) % 5 == 2:
                verdicts[names[-1]] = failure
            response = " ".join(chance.choice(SENTENCES, chance.integers(1, 4)))
            line = {"step": 1 + index, "prompt_id": row["id"], "sample_index": index, "prompt": row["prompt"]}
            lines.append(line | {"response": response.strip(), "tokens": 9, "reward": 0.5, "verdicts": verdicts})
    return lines


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("value_model")
    tiny.make(folder)
    tiny.write_rows(folder / "samples.jsonl", samples(tiny.make_rows(4), 3))
    return folder


@pytest.fixture(scope="module")
def run_dir(twin: Path) -> Path:
    kept = [o for o in tiny.overrides(twin, twin / "run") if not o.startswith("stage.sft")]
    tiny.complete([*kept, *OPTIONS, f"stage.value_model.rollouts={twin / 'samples.jsonl'}"])
    return twin / "run"


@pytest.fixture(scope="module")
def loaded(twin: Path) -> Split:
    prompts = load_rows(str(twin / "rl.jsonl"))
    return load_rollouts(str(twin / "samples.jsonl"), prompts, LEARNED, SHARE, SEED)


@pytest.fixture(scope="module")
def make_batch(twin: Path) -> Any:
    processor = PromptProcessor(str(twin / "model"), 40, None)  # type: ignore[arg-type]
    prompts = RowsById(load_rows(str(twin / "rl.jsonl")))
    options: dict[str, Any] = {"thinking_marks": MARKS, "random_prefixes": 2, "seed": SEED, "max_tokens": 256}

    def make(rows: Sequence[Row], **more: Any) -> TokenBatch:
        processed = [processor(prompts[row["prompt_id"]]) for row in rows]
        return prefix_batch(processor.tokenizer, rows, processed, principles=list(LEARNED), **options | more)

    return make


def trained_prefixes(make_batch: Any, row: Row) -> list[list[int]]:
    """The token ids of the prompt and of each trained prefix of the response behind it."""
    batch = make_batch([row])
    prompt, response = batch.prompts[0].token_ids.tolist(), batch.response_tokens.tolist()
    return [prompt + response[:length] for length in np.flatnonzero(batch.columns[value_examples.WEIGHT])]


# What it learns from


def test_no_prompt_is_trained_on_and_held_out(loaded: Split, twin: Path) -> None:
    here, there = ({row["prompt_id"] for row in part} for part in (loaded.trained, loaded.held_out))
    assert here and there and not here & there
    lines = [json.loads(line) for line in (twin / "samples.jsonl").read_text().splitlines()]
    with_score = [line for line in lines if any("score" in verdict for verdict in line["verdicts"].values())]
    assert len(loaded.trained) + len(loaded.held_out) == len(with_score) < len(lines)
    other = [value_examples.is_held_out(row["prompt"], SHARE, SEED + 1) for row in tiny.make_rows(4)]
    assert other != [value_examples.is_held_out(row["prompt"], SHARE, SEED) for row in tiny.make_rows(4)]


def test_a_principles_score_is_the_mean_of_its_verifiers_that_gave_one() -> None:
    verdicts = {"a": {"score": 0.0}, "b": {"score": 1.0}, "c": {"reason": "no reply"}}
    principles = {"mean": ["a", "b"], "one": ["b", "c"], "failed": ["c"], "not asked": ["d"]}
    assert value_examples.principle_scores(verdicts, principles) == {"mean": 0.5, "one": 1.0}


def test_the_trained_prefixes_end_with_segments_or_anywhere(loaded: Split, make_batch: Any, twin: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(twin / "model")
    for row in loaded.trained:
        batch = make_batch([row])
        length = len(batch.prompts[0].token_ids)
        texts = [tokenizer.decode(prefix[length:]) for prefix in trained_prefixes(make_batch, row)]
        ends = [m.end() for m in re.finditer(r"[.!](?= )|</think>|\S(?=\n)|\S$", row["response"])]
        at_segment_ends = {"", *(row["response"][:end] for end in ends)}
        assert at_segment_ends <= set(texts)
        assert len(texts) <= len(at_segment_ends) + 2
        assert batch.columns[value_examples.WEIGHT].sum() == pytest.approx(1 / len(row["scores"]))
    assert (batch.columns[value_examples.WEIGHT] == make_batch([row]).columns[value_examples.WEIGHT]).all()
    more = make_batch([row], random_prefixes=1000).columns[value_examples.WEIGHT]
    assert (more > 0).all(), "every prefix can be drawn, the prompt alone and the complete response too"


def test_thinking_that_the_template_has_begun_is_not_begun_twice(twin: Path) -> None:
    processor = PromptProcessor(str(twin / "model"), 60, None)  # type: ignore[arg-type]
    processor.tokenizer.chat_template = tiny.OPENS_THINKING
    processed = processor({"id": "x", "prompt": "the prompt"})
    options: dict[str, Any] = {"thinking_marks": MARKS, "random_prefixes": 0, "seed": SEED, "max_tokens": 256}
    row = {"sample": "1/x/0", "response": "<think>\nI think so.</think>Yes.", "scores": {"safety": 1.0}}
    batch = prefix_batch(processor.tokenizer, [row], [processed], principles=["safety"], **options)
    decode = processor.tokenizer.decode
    assert decode(batch.prompts[0].token_ids).endswith("assistant\n<think>\n")
    assert decode(batch.response_tokens) == "I think so.</think>Yes.<|im_end|>"
    ends = np.flatnonzero(batch.columns[value_examples.WEIGHT])
    prefixes = [decode(batch.response_tokens[:end]) for end in ends]
    assert prefixes == ["", "I think so.</think>", "I think so.</think>Yes."]


def test_a_score_that_a_response_lacks_gives_no_loss_and_no_gradient() -> None:
    nan = float("nan")
    scores = torch.tensor([[0.0, nan], [1.0, 0.25], [nan, 1.0]])
    outputs = torch.tensor([[0.3, 5.0], [-0.2, 0.7], [9.0, 0.1]], requires_grad=True)
    columns = {value_examples.score_column(name): scores[:, i] for i, name in enumerate("ab")}
    batch: Any = type("Batch", (), {"values": {**columns, value_examples.WEIGHT: torch.tensor([0.5, 0.0, 0.25])}})
    loss, metrics = value_model.prefix_loss(outputs, batch, principles=["a", "b"])
    loss.backward()
    first, third = torch.sigmoid(torch.tensor([0.3, 0.1])).tolist()
    assert loss.item() == pytest.approx(-0.5 * np.log(1 - first) - 0.25 * np.log(third))
    assert metrics["squared_error"].item() == pytest.approx(0.5 * first**2 + 0.25 * (third - 1) ** 2)
    expected = torch.tensor([[0.5 * first, 0.0], [0.0, 0.0], [0.0, 0.25 * (third - 1)]])
    assert torch.allclose(outputs.grad, expected)  # type: ignore[arg-type]


BAD = [
    ({"prompt_id": "gone"}, r"samples\.jsonl:3: field 'prompt_id' is 'gone', which is not in data\.prompts"),
    ({"prompt": "another"}, r"samples\.jsonl:3: field 'prompt' differs from that of row 'harmful-0' of data\.prompts"),
    ({"verdicts": None}, r"samples\.jsonl:3: field 'verdicts' is missing; a line of samples has step, prompt_id"),
    (
        {"verdicts": {"safety": {"score": 2}}},
        r"samples\.jsonl:3: field 'verdicts' has the scores \[2\] of \['safety'\]",
    ),
    ({"response": 7}, r"samples\.jsonl:3: field 'response' is 7; write text"),
    ({"sample_index": 0, "step": 1}, r"samples\.jsonl:3: id .*1/harmful-0/0' occurs twice"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[str(change) for change, _ in BAD])
def test_a_bad_row_is_named(change: dict[str, Any], message: str, twin: Path, tmp_path: Path) -> None:
    lines = samples(tiny.make_rows(4), 3)
    lines[2] |= change
    tiny.write_rows(tmp_path / "samples.jsonl", lines)
    with pytest.raises(ConfigError, match=message):
        load_rollouts(str(tmp_path / "samples.jsonl"), load_rows(str(twin / "rl.jsonl")), LEARNED, SHARE, SEED)


def test_a_principle_without_scores_and_an_empty_part_are_named(twin: Path, make_batch: Any, loaded: Split) -> None:
    source, prompts = str(twin / "samples.jsonl"), load_rows(str(twin / "rl.jsonl"))
    with pytest.raises(ConfigError, match=r"principles\.value=\['judge'\]: no response in .* has a score of these"):
        load_rollouts(source, prompts, {**LEARNED, "value": ["judge"]}, SHARE, SEED)
    for share, part in ((1e-9, "held out"), (1 - 1e-9, "trained on")):
        with pytest.raises(ConfigError, match=rf"stage\.value_model\.held_out_share=.*: no response .* is {part}"):
            load_rollouts(source, prompts, LEARNED, share, SEED)
    with pytest.raises(ConfigError, match=r"sample '.*' has \d+ tokens, parallel\.micro_batch_tokens=20: raise it"):
        make_batch([loaded.trained[0]], max_tokens=20)


# What it learns


@pytest.fixture(scope="module")
def expected(twin: Path, loaded: Split, make_batch: Any) -> dict[str, Any]:
    """Plain transformers and torch, each prefix on its own: losses, gradient norms and weights of all steps."""
    model = AutoModelForSequenceClassification.from_pretrained(
        twin / "model", num_labels=len(LEARNED), dtype=torch.float32, attn_implementation="eager"
    )
    torch.nn.init.zeros_(model.score.weight)
    named = dict(model.named_parameters())
    adam = adamw(model, LEARNING_RATE)
    rows = shuffled(loaded.trained, 0, STEPS * ROLLOUTS, SEED)
    losses, norms = [], []
    for step in range(STEPS):
        adam.zero_grad()
        of_scores = []
        for row in rows[step * ROLLOUTS : (step + 1) * ROLLOUTS]:
            outputs = [model(torch.tensor([ids])).logits[0] for ids in trained_prefixes(make_batch, row)]
            for place, principle in enumerate(LEARNED):
                if principle in row["scores"]:
                    logits = torch.stack(outputs)[:, place]
                    target = torch.full_like(logits, row["scores"][principle])
                    of_scores.append(F.binary_cross_entropy_with_logits(logits, target))
        loss = torch.stack(of_scores).mean()
        loss.backward()
        losses.append(loss.item())
        norms.append(torch.nn.utils.clip_grad_norm_(named.values(), 1.0).item())
        adam.step()
    return {"loss": losses, "grad_norm": norms, "weights": {name: p.detach().clone() for name, p in named.items()}}


def test_every_step_equals_plain_transformers_and_torch(run_dir: Path, expected: dict[str, Any]) -> None:
    rows = list(records.read_rows(run_dir / "metrics.jsonl"))
    assert rows[0]["loss"] == pytest.approx(0.693147, abs=1e-6), "with a head of zeros every value is a half"
    assert [row["loss"] for row in rows] == pytest.approx(expected["loss"], rel=1e-4)
    assert [row["grad_norm"] for row in rows] == pytest.approx(expected["grad_norm"], rel=1e-3)
    exported = load_file(run_dir / "hf" / "model.safetensors")
    start = load_file(run_dir.parent / "model" / "model.safetensors")
    assert exported.keys() == expected["weights"].keys()
    for name, value in expected["weights"].items():
        moved = value - (start[name].float() if name in start else 0.0)
        assert float((exported[name] - value).norm() / moved.norm()) < 5e-3, name


def test_the_last_checkpoint_exports_to_every_byte_of_the_runs_own_export(run_dir: Path, tmp_path: Path) -> None:
    exports.export(exports.find_checkpoint(run_dir, None), tmp_path / "hf")
    for path in (run_dir / "hf").iterdir():
        assert (tmp_path / "hf" / path.name).read_bytes() == path.read_bytes(), path.name


def quarters(prompt: list[int], response: list[int]) -> list[list[int]]:
    """The prompt with 0, 25, 50, 75 and 100 % of a response's tokens, rounded up."""
    return [prompt + response[: -(-len(response) * part // 4)] for part in range(5)]


def test_the_report_has_the_values_that_transformers_gives_the_export(
    run_dir: Path, loaded: Split, make_batch: Any
) -> None:
    report = json.loads((run_dir / "value_model.json").read_text())
    model, loading = AutoModelForSequenceClassification.from_pretrained(
        run_dir / "hf", dtype=torch.float32, output_loading_info=True
    )
    assert not loading["missing_keys"] and not loading["unexpected_keys"] and not loading["mismatched_keys"]
    assert list(model.config.id2label.values()) == list(LEARNED)
    by_sample = {row["sample"]: row for row in loaded.held_out}
    assert {entry["sample"] for entry in report["responses"]} == by_sample.keys()
    of_scores = []
    for entry in report["responses"]:
        row = by_sample[entry["sample"]]
        batch = make_batch([row])
        prompt, response = batch.prompts[0].token_ids.tolist(), batch.response_tokens.tolist()
        with torch.no_grad():
            values = torch.stack([model(torch.tensor([ids])).logits[0] for ids in quarters(prompt, response[:-1])])
            assert entry["scores"] == row["scores"]
            reported = torch.tensor([entry["values"][principle] for principle in LEARNED]).T
            assert torch.allclose(reported, values.sigmoid(), atol=2e-5)
            # transformers' loss for the export's problem type is the stage's.
            for place, (principle, score) in (
                (list(LEARNED).index(name), (name, s)) for name, s in row["scores"].items()
            ):
                assert principle == model.config.id2label[place]
                logits = [model(torch.tensor([ids])).logits[0] for ids in trained_prefixes(make_batch, row)]
                chosen = torch.stack(logits)[:, [place]]
                of_scores.append(model.loss_function(torch.full_like(chosen, score), chosen, model.config).item())
    assert report["loss"] == pytest.approx(np.mean(of_scores), abs=1e-5)

    whole = report["principles"]["safety"]["100"]
    scored = [entry for entry in report["responses"] if "safety" in entry["scores"]]
    assert whole["n"] == len(scored)
    correlation = np.corrcoef([e["values"]["safety"][-1] for e in scored], [e["scores"]["safety"] for e in scored])[
        0, 1
    ]
    assert whole["correlation"]["mean"] == pytest.approx(correlation)
    low, high = whole["correlation"]["interval"]
    assert -1 <= low <= whole["correlation"]["mean"] <= high <= 1
    last = list(records.read_rows(run_dir / "metrics.jsonl"))[-1]
    assert last["held_out_loss"] == report["loss"]
    assert last["held_out_correlation/safety/100"] == whole["correlation"]["mean"]


# How it is served


def post(address: str, path: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(address + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as reply:
        return json.loads(reply.read())


def counter(address: str, name: str) -> int:
    """The sum of a counter of the server's metrics."""
    with urllib.request.urlopen(f"{address}/metrics", timeout=60) as reply:
        lines = reply.read().decode().splitlines()
    return int(sum(float(line.split()[-1]) for line in lines if line.startswith(f"vllm:{name}_total")))


def kept_tokens(ids: list[int], cached: set[tuple[int, ...]]) -> int:
    """How many of a request's first tokens a prefix cache of whole blocks has; afterwards it has this request's too.
    The last token is always computed."""
    prefixes = [tuple(ids[:end]) for end in range(BLOCK, len(ids) + 1, BLOCK)]
    is_kept = [prefix in cached and len(prefix) < len(ids) for prefix in prefixes]
    cached.update(prefixes)
    return BLOCK * [*is_kept, False].index(False)


def test_a_stock_server_gives_the_trainers_values_and_keeps_the_prefix(
    run_dir: Path, loaded: Split, make_batch: Any, tmp_path: Path
) -> None:
    """``classify`` by token ids: the sigmoids by principle, and only what no earlier request had is computed."""
    report = json.loads((run_dir / "value_model.json").read_text())
    by_sample = {row["sample"]: row for row in loaded.held_out}
    cached: set[tuple[int, ...]] = set()
    kept = 0
    model = served.Model(run_dir / "hf", "pooling", ["--block-size", str(BLOCK)])
    with served.serving([model], tmp_path) as (server,):
        (address,) = server.server.addresses
        for entry in report["responses"][:6]:
            batch = make_batch([by_sample[entry["sample"]]])
            prompt, response = batch.prompts[0].token_ids.tolist(), batch.response_tokens.tolist()
            for place, ids in enumerate(quarters(prompt, response[:-1])):
                (reply,) = post(address, "/classify", {"model": str(model.folder), "input": [ids]})["data"]
                values = [entry["values"][principle][place] for principle in LEARNED]
                assert reply["probs"] == pytest.approx(values, abs=2e-5)
                assert reply["label"] == list(LEARNED)[int(np.argmax(reply["probs"]))]
                kept += kept_tokens(ids, cached)
        deadline = time.monotonic() + 30  # the counters of a request may be written after its reply
        while counter(address, "prefix_cache_hits") != kept and time.monotonic() < deadline:
            time.sleep(0.1)
        assert counter(address, "prefix_cache_hits") == kept > 0
