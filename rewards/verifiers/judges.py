"""Verifiers that are models: prompt template → request → parse → score. Who answers, and how, is the client's matter.

A :class:`Judge` writes its finding (chat completions), a :class:`Scalar` is a reward model with one output (pooling).
Which label is worth what stands in the template's table. Text that is no label of it is a Failure, never a score.
"""

import base64
import math
import mimetypes
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from rewards.verdict import Failure, Judgement, Row, Verdict
from rewards.verifiers.text import without_thinking

TOP_TOKENS = 20  # the most that vLLM and OpenAI's API give
# Below this the judge said something else than a label (our choice).
LEAST_MASS = 0.5
JAILBREAK = "jailbreak"


@dataclass(frozen=True)
class Ask:
    """One question to a server: its path, its JSON body, what reads the JSON reply, and the fields that are added to
    the body when the reply could not be read and the question is put again."""

    path: str
    body: Mapping[str, Any]
    read: Callable[[Any], Judgement]
    again: Mapping[str, Any] = field(default_factory=dict)


type Labels = Mapping[str, float]
type Reading = Callable[[Mapping[str, Any], Labels], Judgement]


def written_label(choice: Mapping[str, Any], labels: Labels) -> Judgement:
    """The label behind the last "label:" of a judge's text, or the text when it is nothing but a label."""
    raw = choice["message"]["content"] or ""
    text = without_thinking(raw)
    stated = re.findall(r"label\W*?[:=]([^\n]*)", text, re.IGNORECASE)
    found = (stated[-1] if stated else text).strip(" \t\n.,;:!\"'`*#[]()").casefold()
    for label, score in labels.items():
        if found == label.casefold():
            return Verdict(score, label, raw)
    return Failure("unparseable", raw)


def label_probabilities(choice: Mapping[str, Any], labels: Labels) -> dict[str, float]:
    """The probability that the judge's first token begins each label and no other."""
    found = dict.fromkeys(labels, 0.0)
    for top in choice["logprobs"]["content"][0]["top_logprobs"]:
        token = top["token"].strip().casefold()
        begun = [label for label in labels if token and label.casefold().startswith(token)]
        if len(begun) == 1:
            found[begun[0]] += math.exp(top["logprob"])
    return found


def threshold(choice: Mapping[str, Any], labels: Labels, *, label: str, least: float) -> Judgement:
    """The score of ``label`` where its probability is at least ``least``, else the other label's."""
    found = label_probabilities(choice, labels)
    raw = _shown(found)
    if sum(found.values()) < LEAST_MASS:
        return Failure("unparseable", raw)
    (other,) = set(labels) - {label}
    given = label if found[label] >= least else other
    return Verdict(labels[given], given, raw)


def true_or_false(choice: Mapping[str, Any], labels: Labels) -> Judgement:
    """(p_TRUE + 1 − p_FALSE) / 2, written for a table of two labels worth 1 and 0: ½ + Σ p (score − ½)."""
    found = label_probabilities(choice, labels)
    raw = _shown(found)
    if sum(found.values()) < LEAST_MASS:
        return Failure("unparseable", raw)
    score = 0.5 + sum(found[label] * (worth - 0.5) for label, worth in labels.items())
    return Verdict(min(max(score, 0.0), 1.0), max(found, key=lambda label: found[label]), raw)


def _shown(found: Mapping[str, float]) -> str:
    return ", ".join(f"P({label}) = {probability:.4f}" for label, probability in found.items())


def good_at_least_half(label: str) -> Reading:
    """:func:`threshold` at ½."""
    return partial(threshold, label=label, least=0.5)


@dataclass(frozen=True)
class Judge:
    """A generative verifier.

    ``prompt`` has {question}, {answer} and, where the row has one, {reference} (the row's ``answer``);
    ``strict_prompt`` is for rows tagged as jailbreaks. ``labels`` says what each finding is worth; ``reading`` makes a
    judgement of a completion's choice. ``tokens`` bounds what the judge writes; 1 is for token probabilities.
    ``reasons``: the prompt wants them before the label.
    """

    prompt: str
    labels: Labels
    reading: Reading
    tokens: int
    strict_prompt: str | None = None
    reasons: bool = False

    def check(self, row: Row) -> None:
        """Raises ValueError for a row that it can't judge, whatever the response."""
        if "{reference}" in self.prompt and not row.get("answer"):
            raise ValueError(f"row {row['id']!r} has no `answer`, the reference that its judge compares with; add it")

    def ask(self, row: Row, answer: str, model: str) -> Ask:
        """The request about an answer without thinking."""
        self.check(row)
        strict = self.strict_prompt is not None and JAILBREAK in (row.get("kind"), *row.get("tags", ()))
        prompt = self.strict_prompt if strict and self.strict_prompt else self.prompt
        values = {"question": row["prompt"], "answer": answer, "reference": row.get("answer", "")}
        body = {
            "model": model,
            "messages": [{"role": "user", "content": content(fill(prompt, values), row)}],
            "temperature": 0.0,
            "max_tokens": self.tokens,
        }
        if self.tokens == 1:
            return Ask("/v1/chat/completions", body | {"logprobs": True, "top_logprobs": TOP_TOKENS}, self._read)
        # The same question at temperature 0 would give the same text again.
        return Ask("/v1/chat/completions", body, self._read, {"temperature": 1.0})

    def says(self, label: str, reason: str | None) -> str:
        """What a judge writes that finds this label."""
        return f"{reason}\nLabel: {label}" if self.reasons and reason else label

    def _read(self, reply: Any) -> Judgement:
        return self.reading(reply["choices"][0], self.labels)


@dataclass(frozen=True)
class Scalar:
    """A reward model with one output r, asked with the conversation; its score is σ(r), the Bradley-Terry probability
    of being preferred to an answer of reward 0."""

    def check(self, row: Row) -> None:
        """It can judge any row."""

    def ask(self, row: Row, answer: str, model: str) -> Ask:
        """The request about an answer without thinking."""
        asked = row.get("messages") or [{"role": "user", "content": row["prompt"]}]
        contents = parted([turn["content"] for turn in asked], row)
        messages = [
            *({"role": turn["role"], "content": made} for turn, made in zip(asked, contents, strict=True)),
            {"role": "assistant", "content": answer},
        ]
        body = {"model": model, "messages": messages, "task": "classify", "use_activation": False}
        return Ask("/pooling", body, self._read)

    def _read(self, reply: Any) -> Judgement:
        (value,) = reply["data"][0]["data"]
        if not math.isfinite(value):
            return Failure("the reward is not finite", str(value))
        return Verdict(1 / (1 + math.exp(-max(-700.0, value))), "scalar", f"{value:.6g}")


def fill(template: str, values: Mapping[str, str]) -> str:
    """The template with its {names} replaced once: what an answer has in braces stays as it is."""
    return re.sub(r"\{(\w+)\}", lambda found: values.get(found[1], found[0]), template)


def content(text: str, row: Row) -> str | list[dict[str, Any]]:
    """A message's content: the text, with the row's images (and the frames of its clips) where their marks stand."""
    return parted([text], row)[0]


def parted(texts: Sequence[str], row: Row) -> list[str | list[dict[str, Any]]]:
    """The contents of successive messages, which share the row's images and clips."""
    if not row.get("images") and not row.get("videos"):
        return [*texts]
    images, videos = iter(row.get("images", [])), iter(row.get("videos", []))
    return [_parts(text, images, videos) for text in texts]


def _parts(text: str, images: Iterator[str], videos: Iterator[list[str]]) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = []
    for piece in re.split("(<image>|<video>)", text):
        files = [next(images, None)] if piece == "<image>" else next(videos, []) if piece == "<video>" else None
        if files is None:
            parts += [{"type": "text", "text": piece}] if piece else []
        elif not files or files[0] is None:  # a mark that an answer wrote
            parts.append({"type": "text", "text": piece})
        else:
            parts += [{"type": "image_url", "image_url": {"url": data_url(file)}} for file in files]
    return parts


@lru_cache(maxsize=64)
def data_url(file: str) -> str:
    """An image file as a URL that carries it, so that a server elsewhere needs no access to the file."""
    kind = mimetypes.guess_type(file)[0] or "image/png"
    return f"data:{kind};base64,{base64.b64encode(Path(file).read_bytes()).decode()}"
