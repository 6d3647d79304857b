"""Held-out evaluation: every score with its interval, for greedy and sampled answers, and the paired difference
between the models before and after training."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from recipes.data.rows import Row
from recipes.evaluation import rates, voting
from recipes.evaluation.statistics import mean_interval, paired_difference
from rewards.verdict import VerifierResult, to_json
from rewards.verifiers.text import THINK_BEGIN, THINK_END

# The step number for the sampling seeds. No training step has it, and all models that are compared share it.
EVALUATION_STEP = -1
# The models that one launch compares, in order. "base" is there only if the launch trains twice.
MODELS = ["base", "before", "after"]
GREEDY = "greedy"
SAMPLED = "sampled"
SEARCH_SCORES = {"search_accuracy", "search_reliability"}

# An answer in the form of answers.json: {id, response, thinking_tokens, scores: {score name: verdict or failure}}.
type Answer = dict[str, Any]
# "greedy" and "sampled" → answers, by prompt and then by sample.
type Answers = dict[str, list[Answer]]


@dataclass(frozen=True)
class Response:
    """A model's response to a held-out prompt."""

    row_id: str  # the prompt's id
    text: str
    thinking_tokens: int
    results: Mapping[str, VerifierResult]  # score name → the verifier's result


def comparable_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings, other than the model, that an evaluation depends on.

    Answers that were generated with equal settings can be compared.
    """
    data = config["data"]
    rollout = config["rollout"]
    return {
        "seed": config["seed"],
        **{name: data[name] for name in ("evaluation", "evaluation_samples", "max_prompt_tokens", "scores")},
        **{name: rollout[name] for name in ("temperature", "top_p", "max_response_tokens", "thinking_budget")},
    }


def answer(
    generate: Callable[[int, float], Sequence[Response]], samples_per_prompt: int, temperature: float
) -> Answers:
    """Generate a model's answers to all held-out prompts: one greedy answer, and ``samples_per_prompt`` sampled ones.

    ``generate(samples per prompt, temperature)`` returns the responses to all prompts, by prompt and then by sample.
    """
    answers = {GREEDY: [to_answer(response) for response in generate(1, 0.0)]}
    if samples_per_prompt > 0:
        answers[SAMPLED] = [to_answer(response) for response in generate(samples_per_prompt, temperature)]
    return answers


def to_answer(response: Response) -> Answer:
    """The response in the form of answers.json."""
    return {
        "id": response.row_id,
        "response": response.text,
        "thinking_tokens": response.thinking_tokens,
        "scores": {name: to_json(result) for name, result in response.results.items()},
    }


def sample_lines(rows: Iterable[Row], answers: Answers) -> Iterator[dict[str, Any]]:
    """A model's sampled answers in the form of a run's samples. ``rows`` are the prompts.

    The lines have the fields that ``recipes.data.value_examples`` reads.
    """
    prompts = {row["id"]: row["prompt"] for row in rows}
    samples: Counter[str] = Counter()
    for answer in answers[SAMPLED]:
        row_id = answer["id"]
        yield {
            "step": 0,
            "prompt_id": row_id,
            "sample_index": samples[row_id],
            "prompt": prompts[row_id],
            "response": answer["response"],
            "verdicts": answer["scores"],
        }
        samples[row_id] += 1


def score_names(row: Row, scores: Mapping[str, Sequence[str]]) -> list[str]:
    """The verifiers that score a row. ``scores`` (``data.scores``): verifier → kinds of rows."""
    return [name for name, kinds in scores.items() if row["kind"] in kinds]


def thinking_tokens(text: str, written: str, tokens: int, encode: Callable[[str], Sequence[int]]) -> int:
    """The number of tokens of a response up to the end of its thinking.

    It is 0 for a response without thinking, and ``tokens``, the length of the response, if the thinking does not end.

    ``written`` is the text of the response's tokens. If the prompt has begun the thinking, ``text`` also has the mark
    for that before ``written``. ``encode`` maps text to token ids, without special tokens.
    """
    if THINK_END in written:
        return len(encode(written.partition(THINK_END)[0]))
    return tokens if THINK_BEGIN in text else 0


def summary(answers: Answers, names: Sequence[str]) -> dict[str, Any]:
    """{score: {mean, interval, n}} of one model's greedy answers, and the same for its sampled answers under "sampled".

    "sampled" is there only if the model has sampled answers. Scores without a verdict are left out.
    """
    summaries: dict[str, Any] = {}
    for mode, rows in answers.items():
        summaries[mode] = {}
        for name in names:
            with_verdict = scored(rows, name)
            if with_verdict:
                values = [row["scores"][name]["score"] for row in with_verdict]
                summaries[mode][name] = mean_interval(values, [row["id"] for row in with_verdict])
    return _greedy_on_top(summaries)


def difference(before: Answers, after: Answers, names: Sequence[str]) -> dict[str, Any]:
    """The paired difference after − before on the same prompts, in the form of :func:`summary`.

    Pairs of answers in which one has no verdict are left out. So are scores without any complete pair.
    """
    differences: dict[str, Any] = {}
    for mode in after:
        differences[mode] = {}
        for name in names:
            values_before = []
            values_after = []
            ids = []
            for row_before, row_after in zip(before[mode], after[mode], strict=True):
                score_before = _score(row_before, name)
                score_after = _score(row_after, name)
                if score_before is not None and score_after is not None:
                    values_before.append(score_before)
                    values_after.append(score_after)
                    ids.append(row_after["id"])
            if ids:
                differences[mode][name] = paired_difference(values_before, values_after, ids)
    return _greedy_on_top(differences)


def _greedy_on_top(by_mode: dict[str, Any]) -> dict[str, Any]:
    """{score: …, "sampled": {score: …}} from {"greedy": {score: …}, "sampled": {score: …}}."""
    others = {mode: scores for mode, scores in by_mode.items() if mode != GREEDY}
    return by_mode[GREEDY] | others


def report(stage: str, rows: Iterable[Row], names: Sequence[str], models: Mapping[str, Answers]) -> dict[str, Any]:
    """The content of evaluation.json: a summary of each model, the difference of the last two, and the greedy answers.

    If the scores include those of search questions, it also has ``votes``, the majority votes over several sampled
    answers (:mod:`recipes.evaluation.voting`).

    Args:
        stage: the name of the stage.
        rows: the held-out prompts, in the order of the answers.
        names: the scores. Those of safety verifiers become rates (:mod:`recipes.evaluation.rates`).
        models: name (of ``MODELS``) → answers. Without "before" there is no difference.
    """
    rows = list(rows)
    measured, measures = rates.with_rates(models, names, {row["id"]: row["kind"] for row in rows})
    transcripts = []
    for i, row in enumerate(rows):
        greedy = {model: answers[GREEDY][i] for model, answers in models.items()}
        transcripts.append(
            {
                "id": row["id"],
                "kind": row["kind"],
                "prompt": row["prompt"],
                **({"images": row["images"]} if "images" in row else {}),
                **{model: answer["response"] for model, answer in greedy.items()},
                "labels": {model: _format_labels(answer) for model, answer in greedy.items()},
            }
        )
    evaluation = {
        "stage": stage,
        **{model: summary(answers, measures) for model, answers in measured.items()},
        "transcripts": transcripts,
    }
    if "before" in models:
        evaluation["difference"] = difference(measured["before"], measured["after"], measures)
    if set(names) >= SEARCH_SCORES:
        votes = {
            model: voting.search_summary(answers[SAMPLED]) for model, answers in models.items() if SAMPLED in answers
        }
        if votes:
            evaluation["votes"] = votes
    return evaluation


def _format_labels(answer: Answer) -> str:
    return ", ".join(f"{name}: {result.get('label', 'no verdict')}" for name, result in answer["scores"].items())


def scored(answers: Sequence[Answer], name: str) -> list[Answer]:
    """The answers with a verdict of this verifier."""
    return [answer for answer in answers if _score(answer, name) is not None]


def _score(answer: Answer, name: str) -> float | None:
    """The score of this verifier, or None if it did not run or failed."""
    return answer["scores"].get(name, {}).get("score")
