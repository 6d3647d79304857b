"""The answers of the engines' weights to the held-out prompts."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from megatron_ext.batch import TokenBatch
from recipes.config import Config
from recipes.data.processor import PromptProcessor
from recipes.data.rows import Row, load_rows
from recipes.data.shared_processing import process
from recipes.data.sources import RowsById
from recipes.evaluation import evaluate
from recipes.evaluation.evaluate import Answers
from recipes.training.rollouts import Rollouts
from rewards.verdict import from_json


def held_out_answers(config: Config, rollouts: Rollouts, processor: PromptProcessor) -> Answers:
    """Collective: the answers of the engines' present weights to the held-out prompts."""
    rows = load_rows(config.data.evaluation)
    processed = process(processor, rows, config.precision.dtype, rollouts.control, keep_pixels=False)
    prompts = [each.prompt for each in processed]
    judge = partial(judge_response, config, rollouts, RowsById(rows))

    def generate(samples_per_prompt: int, temperature: float) -> list[evaluate.Response]:
        step = evaluate.EVALUATION_STEP
        batch = rollouts.generate(prompts, samples_per_prompt, step=step, temperature=temperature, on_response=judge)
        return [response_of(rollouts, batch, i) for i in range(len(batch))]

    return evaluate.answer(generate, config.data.evaluation_samples, config.rollout.temperature)


def response_of(rollouts: Rollouts, batch: TokenBatch, i: int) -> evaluate.Response:
    """Response i of a batch in the evaluation's form."""

    def encode(text: str) -> list[int]:
        return rollouts.tokenizer.encode(text, add_special_tokens=False)

    text = rollouts.text(batch, i)
    num_tokens = int(batch.response_lengths[i])
    thinking = evaluate.thinking_tokens(text, rollouts.written(batch, i), num_tokens, encode)
    results = {name: from_json(verdict) for name, verdict in batch.verdicts[i].items()}
    return evaluate.Response(batch.prompt(i).prompt_id, text, thinking, results)


def judge_response(config: Config, rollouts: Rollouts, rows: Mapping[str, Row], response: TokenBatch) -> dict[str, Any]:
    """The verdicts on a batch of one answer, by the verifiers of its scores. Called from several threads."""
    row = rows[response.prompt(0).prompt_id]
    return rollouts.judge(row, response, evaluate.score_names(row, config.data.scores))
