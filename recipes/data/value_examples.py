"""Training data of a value model: scored responses from a run's samples, and the prefixes to train on.

A response's score for a principle is the mean score of the principle's verifiers. Either all responses to a prompt are
trained on, or all are held out.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, overload

import numpy as np

from megatron_ext import batch as batches
from megatron_ext.batch import Array, TokenBatch
from recipes.data.processor import ProcessedPrompt
from recipes.data.rows import without_nulls
from recipes.data.source_spec import parse_sources, source_names
from recipes.data.sources import Row, Rows, RowsById, open_source
from recipes.errors import ConfigError
from rewards.verdict import is_score
from rollout.guidance.segments import segment_ends
from rollout.thinking import opens_thinking, without_opening

FIELDS = ("step", "prompt_id", "sample_index", "prompt", "response", "verdicts")
SETTINGS = "stage.value_model"
WEIGHT = "weight"  # the column of the prefixes' weights


@dataclass(frozen=True)
class Part(Sequence[Row]):
    """A subset of the rows: those with the given ``numbers``, in that order."""

    rows: Rows
    numbers: Array

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, number: int) -> Row: ...
    @overload
    def __getitem__(self, number: slice) -> list[Row]: ...
    def __getitem__(self, number: int | slice) -> Row | list[Row]:
        if isinstance(number, slice):
            return [self.rows[int(n)] for n in self.numbers[number]]
        return self.rows[int(self.numbers[number])]


@dataclass(frozen=True)
class Split:
    """The responses to train on and those that are held out. No prompt has responses in both parts.

    A row has ``sample`` (step/prompt id/sample index), ``prompt_id``, ``response`` and ``scores`` (principle → score).
    Every row has at least one score.
    """

    trained: Part
    held_out: Part


def load_rollouts(
    source: Any, prompts: Rows, principles: Mapping[str, Sequence[str]], held_out_share: float, seed: int
) -> Split:
    """Load the responses of one source or several, and split them. Responses without any score are left out.

    Args:
        source: ``stage.value_model.rollouts``. The rows are those of a run's samples.
        prompts: the rows that were answered. The conversation and images of a response are looked up by the prompt's
            id.
        principles: principle → the names of its verifiers.
        held_out_share: share of the prompts that are held out, by a hash of the seed and the prompt's text.
        seed: the seed of the split.

    Raises ConfigError, naming source, line and field where there is one: for an invalid row, for a prompt that is not
    in ``prompts``, for a principle for which no response has a score, and for an empty part of the split.
    """
    normalise = partial(
        _normalise, prompts=RowsById(prompts), principles=principles, held_out_share=held_out_share, seed=seed
    )
    rows = Rows([open_source(spec) for spec in parse_sources(source)], normalise)
    # The kind of a row is the pair (whether it is held out, the principles that it has scores for).
    numbers: dict[bool, list[Array]] = {False: [], True: []}
    scored: set[str] = set()
    for (held_out, names), streams in rows.streams.items():
        if names:
            numbers[held_out] += [of_source for _, of_source in streams]
            scored.update(names)
    for principle, verifiers in principles.items():
        if principle not in scored:
            raise ConfigError(
                f"{SETTINGS}.principles.{principle}={list(verifiers)}: no response in {source_names(source)} has a "
                "score of these verifiers; name those that scored them, or give [] to leave the principle out"
            )
    for held_out, part in ((False, "trained on"), (True, "held out")):
        if not numbers[held_out]:
            raise ConfigError(
                f"{SETTINGS}.held_out_share={held_out_share:g}: no response in {source_names(source)} is {part}; "
                "change the share, or add responses to more prompts"
            )
    return Split(
        trained=Part(rows, np.sort(np.concatenate(numbers[False]))),
        held_out=Part(rows, np.sort(np.concatenate(numbers[True]))),
    )


def _normalise(
    raw: Row,
    folder: Path,
    *,
    prompts: RowsById,
    principles: Mapping[str, Sequence[str]],
    held_out_share: float,
    seed: int,
) -> Row:
    """Convert a line of samples to a row of :class:`Split`. Raises ValueError naming the field."""
    row = without_nulls(raw)
    missing = [field for field in FIELDS if field not in row]
    if missing:
        raise ValueError(f"field {missing[0]!r} is missing; a line of samples has {', '.join(FIELDS)}")
    for field in ("prompt_id", "response"):
        if not isinstance(row[field], str):
            raise ValueError(f"field {field!r} is {row[field]!r}; write text")
    prompt_id = row["prompt_id"]
    prompt = prompts.get(prompt_id)
    if prompt is None:
        raise ValueError(f"field 'prompt_id' is {prompt_id!r}, which is not in data.prompts; name the run's prompts")
    if prompt["prompt"] != row["prompt"]:
        raise ValueError(
            f"field 'prompt' differs from that of row {prompt_id!r} of data.prompts; name the run's prompts"
        )
    scores = principle_scores(row["verdicts"], principles)
    sample = f"{row['step']}/{prompt_id}/{row['sample_index']}"
    return {
        "id": f"{folder}: {sample}",  # several runs may have the same samples
        "kind": (is_held_out(row["prompt"], held_out_share, seed), tuple(scores)),
        "sample": sample,
        "prompt_id": prompt_id,
        "response": row["response"],
        "scores": scores,
    }


def principle_scores(verdicts: Mapping[str, Any], principles: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """Principle → the mean score of its verifiers. Raises ValueError for a score outside [0, 1].

    Verifiers that did not run or failed have no score. A principle whose verifiers have no score is left out.
    """
    means = {}
    for principle, verifiers in principles.items():
        scores = [verdicts[name]["score"] for name in verifiers if "score" in verdicts.get(name, {})]
        if not all(map(is_score, scores)):
            raise ValueError(f"field 'verdicts' has the scores {scores} of {list(verifiers)}; give numbers in [0, 1]")
        if scores:
            means[principle] = sum(scores) / len(scores)
    return means


def is_held_out(prompt: str, share: float, seed: int) -> bool:
    """Whether the responses to a prompt are held out. This is true for about a ``share`` of the prompts."""
    return _hash(f"{seed}/{prompt}") < share * 2**64


def _hash(text: str) -> int:
    """A hash of the text, in [0, 2^64)."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def prefix_batch(
    tokenizer: Any,
    rows: Sequence[Row],
    prompts: Sequence[ProcessedPrompt],
    *,
    principles: Sequence[str],
    thinking_marks: Sequence[str],
    random_prefixes: int,
    seed: int,
    max_tokens: int,
) -> TokenBatch:
    """The batch of the rows' responses to their ``prompts``, with a loss weight and the scores at each token.

    Each response ends with an end-of-turn token, because the value of a prefix is the model's output before the next
    token. If a prompt ends with the mark that begins the thinking, that mark is removed from the response.

    The column :data:`WEIGHT` selects the prefixes to train on. Within a response their weights are equal and sum to
    1 / (number of scores in the batch). So each score counts equally, however long its response is. The columns
    ``score/<principle>`` hold the response's score at each of its tokens, or NaN if it has none.

    Raises ConfigError naming a row with more than ``max_tokens`` tokens.
    """
    parts = []
    num_scores = sum(len(row["scores"]) for row in rows)
    for row, processed in zip(rows, prompts, strict=True):
        response = row["response"]
        if opens_thinking(tokenizer, processed.prompt.token_ids, thinking_marks[0]):
            response = without_opening(response, thinking_marks[0])
        encoded = tokenizer(response, add_special_tokens=False, return_offsets_mapping=True)
        tokens = np.array([*encoded["input_ids"], tokenizer.eos_token_id], np.int32)
        total = len(processed.prompt.token_ids) + len(tokens)
        if total > max_tokens:
            raise ConfigError(
                f"sample {row['sample']!r} has {total} tokens, parallel.micro_batch_tokens={max_tokens}: raise it or "
                "drop the row"
            )
        token_starts = np.array(encoded["offset_mapping"], np.int64).reshape(-1, 2)[:, 0]
        ends = segment_ends(response, thinking_marks, complete=True)
        chance = np.random.default_rng([seed, _hash(row["sample"])])
        lengths = prefix_lengths(token_starts, ends, chance.integers(0, len(tokens), random_prefixes))
        weights = np.zeros(len(tokens), np.float32)
        weights[lengths] = 1 / (len(lengths) * num_scores)
        columns = {WEIGHT: weights}
        for principle in principles:
            score = row["scores"].get(principle, np.nan)
            columns[score_column(principle)] = np.full(len(tokens), score, np.float32)
        part = batches.build([processed.prompt], [tokens], vision=[processed.vision])
        parts.append(part.with_columns(**columns))
    return batches.concatenate(parts)


def score_column(principle: str) -> str:
    """The name of the batch's column that holds the scores of a principle."""
    return f"score/{principle}"


def prefix_lengths(token_starts: Array, ends: Sequence[int], more: Array) -> Array:
    """The lengths in tokens of the prefixes of a response to train on, ascending and without duplicates.

    They are 0 (the prompt alone), the lengths that cover the ``ends`` of segments, and those in ``more``.

    ``token_starts`` [tokens] is the offset in characters at which each token begins. A prefix that covers a segment has
    all tokens that begin before the segment's end. So it includes a token that extends into the next segment.
    """
    return np.unique(np.concatenate([[0], np.searchsorted(token_starts, np.asarray(ends, np.int64)), more]))
