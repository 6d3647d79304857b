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

    def encode(text: str) -> list[int]:
        return rollouts.tokenizer.encode(text, add_special_tokens=False)

    def generate(samples_per_prompt: int, temperature: float) -> list[evaluate.Response]:
        step = evaluate.EVALUATION_STEP
        batch = rollouts.generate(prompts, samples_per_prompt, step=step, temperature=temperature, on_response=judge)
        responses = []
        for i, (row_id, _) in enumerate(batch.keys):
            text = rollouts.text(batch, i)
            thinking = evaluate.thinking_tokens(text, int(batch.response_lengths[i]), encode)
            results = {name: from_json(verdict) for name, verdict in batch.verdicts[i].items()}
            responses.append(evaluate.Response(row_id, text, thinking, results))
        return responses

    return evaluate.answer(generate, config.data.evaluation_samples, config.rollout.temperature)


def judge_response(config: Config, rollouts: Rollouts, rows: Mapping[str, Row], response: TokenBatch) -> dict[str, Any]:
    """The scores of a batch of one answer. Called from several threads."""
    row = rows[response.prompt(0).prompt_id]
    return rollouts.judge(row, response, evaluate.score_names(row, config.data.scores))
