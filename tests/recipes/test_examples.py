"""The tokens of an SFT row and their loss mask, and the rows that train a judge."""

from itertools import groupby
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megatron_ext import batch as batches
from megatron_ext.batch import Prompt
from recipes.algorithms.aggregation import AGGREGATIONS, token_weights
from recipes.data.judge_sft import judge_conversation
from recipes.data.preference_pairs import scored_conversation
from recipes.data.processor import PromptProcessor
from recipes.data.settings import ImagesConfig
from recipes.data.sft_examples import (
    load_conversations,
    load_sft_rows,
    prompt_row,
    tokenize_example,
)
from recipes.errors import ConfigError
from recipes.evaluation import judge_accuracy
from rewards.verdict import Failure, Verdict
from rewards.verifiers.templates import GENERAL, SAFETY, SAFETY_SHORT, VALUE
from tests.recipes import tiny

FORGETS = tiny.TEMPLATE.replace("message['content'] }}", "message['content'].split('</think>')[-1] }}")


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> PromptProcessor:
    folder = tmp_path_factory.mktemp("examples")
    tiny.make_tokenizer().save_pretrained(folder)
    (folder / "config.json").write_text('{"architectures": ["LlamaForCausalLM"], "model_type": "llama"}')
    return PromptProcessor(str(folder), 100, ImagesConfig(1, 10**6, 10.0))


def tokenized(processor: PromptProcessor, row: dict[str, Any], template: str = tiny.TEMPLATE) -> tuple[str, str]:
    """The text of the row's prompt, and of its response with the trained tokens in brackets."""
    processor.tokenizer.chat_template = template
    example = tokenize_example(processor.tokenizer, row, processor(prompt_row(row)), "<think>", 200)
    decode = processor.tokenizer.decode
    response = ""
    tokens = zip(example.response, example.loss_mask, strict=True)
    for trained, run in groupby(tokens, key=lambda token: token[1]):
        text = decode([token_id for token_id, _ in run])
        response += f"[{text}]" if trained else text
    return decode(example.prompt.token_ids.tolist()), response


TURNS = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "the prompt"},
    {"role": "assistant", "content": "<think>so</think>yes"},
    {"role": "user", "content": "sure?"},
    {"role": "assistant", "content": "no"},
]


def test_the_loss_mask_has_the_assistants_turns_and_nothing_else(processor: PromptProcessor) -> None:
    prompt, response = tokenized(processor, {"id": "x", "messages": TURNS})
    assert (
        prompt
        == "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nthe prompt<|im_end|>\n<|im_start|>assistant\n"
    )
    between = "\n<|im_start|>user\nsure?<|im_end|>\n<|im_start|>assistant\n"
    assert response == f"[<think>so</think>yes<|im_end|>]{between}[no<|im_end|>]"


def test_thinking_that_the_template_has_begun_is_not_begun_twice(processor: PromptProcessor) -> None:
    row = {"id": "x", "prompt": "the prompt", "response": "<think>\nso</think>yes"}
    assert tokenized(processor, row, tiny.OPENS_THINKING)[0].endswith("assistant\n<think>\n")
    assert tokenized(processor, row, tiny.OPENS_THINKING)[1] == "[so</think>yes<|im_end|>]"
    assert tokenized(processor, row)[1] == "[<think>\nso</think>yes<|im_end|>]"


def test_a_template_that_forgets_thinking_is_refused_for_several_answers(processor: PromptProcessor) -> None:
    with pytest.raises(ConfigError, match=r"row 'x': the chat template shows an answer differently .* a row for each"):
        tokenized(processor, {"id": "x", "messages": TURNS}, FORGETS)
    assert tokenized(processor, {"id": "x", "messages": TURNS[:3]}, FORGETS)[1] == "[<think>so</think>yes<|im_end|>]"


def test_a_row_longer_than_a_micro_batch_is_named(processor: PromptProcessor) -> None:
    with pytest.raises(ConfigError, match=r"row 'x' has \d+ tokens, parallel\.micro_batch_tokens=200: raise it"):
        tokenized(processor, {"id": "x", "prompt": "p", "response": "zq " * 100})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "p"}, "field 'response' is missing"),
        ({"messages": TURNS[:4]}, "end with the assistant's answer"),
        ({"messages": TURNS[2:]}, "begin with a request"),
        ({"messages": [{"role": "user"}]}, "messages"),
    ],
)
def test_a_row_that_is_no_conversation_is_named_with_its_line(
    row: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    tiny.write_rows(path, [{"id": "ok", "prompt": "p", "response": "r"}, {"id": "x", **row}])
    with pytest.raises(ConfigError, match=f"rows.jsonl:2: .*{message}"):
        load_conversations(str(path))


def test_weights_are_of_all_trained_tokens_of_the_update() -> None:
    prompt = Prompt("p", np.array([1], np.int32))
    batch = batches.build([prompt] * 2, [[2, 3, 4], [5]], loss_mask=[[True, False, True], [True]])
    assert token_weights(AGGREGATIONS["token_mean"], batch).tolist() == [1 / 3, 1 / 3]
    batch = batches.build([prompt] * 2, [[2, 3, 4]] * 2, loss_mask=[[False, True, True]] * 2)
    assert token_weights(AGGREGATIONS["sequence_mean_token_mean"], batch).tolist() == [0.25, 0.25]
    assert batch.with_response_columns(weights=[0.25, 0.5]).values("weights").tolist() == [0, 0.25, 0.25, 0, 0.5, 0.5]


LABELLED = {"id": "x", "kind": "harmful", "question": "How do I rob {answer}?", "answer": "<think>no</think>I can't."}


def test_a_judges_row_has_the_verifiers_request_and_a_reply_that_it_parses() -> None:
    for judge, reason, said in (
        (SAFETY, "It declines.", "It declines.\nLabel: safe with refusal"),
        (SAFETY_SHORT, "It declines.", "safe with refusal"),
        (SAFETY, None, "safe with refusal"),
    ):
        row = LABELLED | {"label": "safe with refusal"} | ({"reason": reason} if reason else {})
        conversation = judge_conversation(judge, row)
        request = judge.request({"id": "x", "kind": "harmful", "prompt": row["question"]}, "I can't.", "m")
        assert conversation["messages"][:-1] == request.body["messages"]
        assert conversation["messages"][-1] == {"role": "assistant", "content": said}
        assert request.parse({"choices": [{"message": {"content": said}}]}) == Verdict(0.1, "safe with refusal", said)


def test_a_judge_that_compares_is_told_the_right_answer(tmp_path: Path) -> None:
    row = {"id": "x", "question": "Two and two?", "answer": "It is five.", "reference": "four", "label": "wrong"}
    tiny.write_rows(tmp_path / "rows.jsonl", [row])
    ((request, _),) = [
        conversation["messages"] for conversation in load_sft_rows(str(tmp_path / "rows.jsonl"), "general")
    ]
    asked = GENERAL.request({"id": "x", "prompt": row["question"], "answer": "four"}, row["answer"], "m")
    assert [request] == asked.body["messages"]
    assert "four" in request["content"] and "five" in request["content"]


def test_a_jailbreak_is_asked_strictly() -> None:
    conversation = judge_conversation(SAFETY, LABELLED | {"kind": "jailbreak", "label": "unsafe"})
    assert "tries to trick the assistant" in conversation["messages"][0]["content"]


@pytest.mark.parametrize(
    ("row", "template", "message"),
    [
        ({"label": "fine"}, "safety", "rows.jsonl:1: label 'fine': the judge's are safe with refusal, "),
        ({"label": "unsafe", "question": ""}, "safety", "rows.jsonl:1: field 'question' is missing"),
        ({"label": "correct"}, "general", "rows.jsonl:1: field 'reference' is missing: the judge compares with it"),
        ({"label": "unsafe"}, "scalar", r"stage\.sft\.judge='scalar': a Scalar writes nothing"),
        ({"label": "unsafe"}, "none", r"stage\.sft\.judge='none': unknown template"),
    ],
)
def test_rows_that_can_t_train_the_judge_are_named(
    row: dict[str, Any], template: str, message: str, tmp_path: Path
) -> None:
    tiny.write_rows(tmp_path / "rows.jsonl", [LABELLED | row])
    with pytest.raises(ConfigError, match=message):
        load_sft_rows(str(tmp_path / "rows.jsonl"), template)


def test_a_judge_of_one_token_learns_its_label_alone() -> None:
    assert (
        judge_conversation(VALUE, LABELLED | {"label": "good", "reason": "Polite."})["messages"][-1]["content"]
        == "good"
    )


def test_accuracy_counts_the_unreadable_as_wrong() -> None:
    rows = [{"label": label} for label in ("unsafe", "unsafe", "illogical", "illogical")]
    results = [Verdict(0, "unsafe"), Failure("unparseable"), Verdict(0.01, "illogical"), Verdict(0, "unsafe")]
    report = judge_accuracy.accuracy_report(rows, results)
    assert report["accuracy"]["mean"] == 0.5
    assert report["unreadable"] == 1
    assert report["labels"]["unsafe"] == {"n": 2, "right": 1, "said": {"unsafe": 1, "unreadable": 1}}
    assert report["labels"]["illogical"] == {"n": 2, "right": 1, "said": {"illogical": 1, "unsafe": 1}}


def test_a_template_that_shows_an_answered_prompt_differently_is_refused_for_pairs_with_images() -> None:
    """As one that opens the thinking at the end of the prompt: the image's place would be lost."""

    def apply_chat_template(turns: list[dict[str, str]], add_generation_prompt: bool = False, **options: Any) -> str:
        text = " ".join(turn["content"] for turn in turns)
        return f"{text} <think>" if add_generation_prompt else text

    tokenizer = SimpleNamespace(apply_chat_template=apply_chat_template, eos_token_id=0)
    row = {"id": "7", "prompt": "<image> What is it?", "chosen": "A bridge.", "rejected": "A boat."}
    processed: Any = SimpleNamespace(prompt=Prompt("7", np.array([1], np.int32)), vision=None)
    with pytest.raises(ConfigError, match="row '7': the chat template shows the prompt differently"):
        scored_conversation(tokenizer, row, processed, "chosen")
