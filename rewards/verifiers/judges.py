"""Verifiers that are models: prompt template → request → reply → verdict. ``rewards.client`` sends the requests.

A :class:`Judge` is generative and writes a label (chat completions). A :class:`Scalar` is a reward model with one
output (pooling). The template's table has the score of each label. Text that is none of the labels is a Failure, never
a score.
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

from rewards.verdict import Failure, Row, Verdict, VerifierResult
from rewards.verifiers.text import without_thinking

TOP_TOKENS = 20  # the most that vLLM and OpenAI's API return
# With less probability on the labels' tokens, the judge wrote something other than a label (our choice).
MIN_LABEL_PROBABILITY = 0.5
JAILBREAK = "jailbreak"
CHAT_PATH = "/v1/chat/completions"
POOLING_PATH = "/pooling"


@dataclass(frozen=True)
class JudgeRequest:
    """One request to a server.

    ``path`` of the server, the JSON ``body``, and ``parse``, which makes a result of the JSON reply. ``retry_fields``
    are added to the body when a reply could not be parsed and the request is sent again.
    """

    path: str
    body: Mapping[str, Any]
    parse: Callable[[Any], VerifierResult]
    retry_fields: Mapping[str, Any] = field(default_factory=dict)


# Label → score in [0, 1].
type Labels = Mapping[str, float]
# A chat completion's choice and the labels → the result.
type ChoiceParser = Callable[[Mapping[str, Any], Labels], VerifierResult]


def written_label(choice: Mapping[str, Any], labels: Labels) -> VerifierResult:
    """The label after the last "label:" in a judge's text, or the text when it is nothing but a label."""
    raw = choice["message"]["content"] or ""
    text = without_thinking(raw)
    stated = re.findall(r"label\W*?[:=]([^\n]*)", text, re.IGNORECASE)
    written = (stated[-1] if stated else text).strip(" \t\n.,;:!\"'`*#[]()").casefold()
    for label, score in labels.items():
        if written == label.casefold():
            return Verdict(score, label, raw)
    return Failure("unparseable", raw)


def label_probabilities(choice: Mapping[str, Any], labels: Labels) -> dict[str, float]:
    """Label → the probability that the judge's first token begins this label and no other one."""
    probabilities = dict.fromkeys(labels, 0.0)
    for candidate in choice["logprobs"]["content"][0]["top_logprobs"]:
        token = candidate["token"].strip().casefold()
        matching_labels = [label for label in labels if token and label.casefold().startswith(token)]
        if len(matching_labels) == 1:
            probabilities[matching_labels[0]] += math.exp(candidate["logprob"])
    return probabilities


def threshold(choice: Mapping[str, Any], labels: Labels, *, label: str, min_probability: float) -> VerifierResult:
    """Of two labels: ``label`` and its score where its probability is at least ``min_probability``, else the other."""
    probabilities = label_probabilities(choice, labels)
    raw = _format_probabilities(probabilities)
    if sum(probabilities.values()) < MIN_LABEL_PROBABILITY:
        return Failure("unparseable", raw)
    (other_label,) = set(labels) - {label}
    chosen = label if probabilities[label] >= min_probability else other_label
    return Verdict(labels[chosen], chosen, raw)


def true_or_false(choice: Mapping[str, Any], labels: Labels) -> VerifierResult:
    """(p_TRUE + 1 − p_FALSE) / 2, written for any table of two labels with scores 1 and 0: ½ + Σ p (score − ½)."""
    probabilities = label_probabilities(choice, labels)
    raw = _format_probabilities(probabilities)
    if sum(probabilities.values()) < MIN_LABEL_PROBABILITY:
        return Failure("unparseable", raw)
    score = 0.5 + sum(probabilities[label] * (label_score - 0.5) for label, label_score in labels.items())
    most_probable = max(probabilities, key=lambda label: probabilities[label])
    return Verdict(min(max(score, 0.0), 1.0), most_probable, raw)


def _format_probabilities(probabilities: Mapping[str, float]) -> str:
    return ", ".join(f"P({label}) = {probability:.4f}" for label, probability in probabilities.items())


def good_at_least_half(label: str) -> ChoiceParser:
    """:func:`threshold` at ½."""
    return partial(threshold, label=label, min_probability=0.5)


@dataclass(frozen=True)
class Judge:
    """The template of a generative verifier.

    ``prompt`` has {question}, {answer} and, to compare with the row's ``answer``, {reference}. ``strict_prompt`` is for
    rows tagged as jailbreaks. ``labels``: the score of each label. ``parse_choice`` makes a result of a completion's
    choice. ``max_tokens`` of the judge's text; with 1 the request asks for token probabilities. ``gives_reason``: the
    prompt wants a reason before the label.
    """

    prompt: str
    labels: Labels
    parse_choice: ChoiceParser
    max_tokens: int
    strict_prompt: str | None = None
    gives_reason: bool = False

    @property
    def compares(self) -> bool:
        """Whether it compares a response with the right answer."""
        return "{reference}" in self.prompt

    def check(self, row: Row) -> None:
        """Raises ValueError for a row that it can't judge any response of."""
        if self.compares and not row.get("answer"):
            raise ValueError(f"row {row['id']!r} has no `answer`, the reference that its judge compares with; add it")

    def request(self, row: Row, answer: str, model: str) -> JudgeRequest:
        """The request about an answer, which is a response without its thinking."""
        self.check(row)
        prompt = self.prompt
        is_jailbreak = JAILBREAK in (row.get("kind"), *row.get("tags", ()))
        if is_jailbreak and self.strict_prompt:
            prompt = self.strict_prompt
        values = {
            "question": quoted(row["prompt"]),
            "answer": quoted(answer),
            "reference": quoted(row.get("answer", "")),
        }
        body = {
            "model": model,
            "messages": [{"role": "user", "content": content(fill(prompt, values), row)}],
            "temperature": 0.0,
            "max_tokens": self.max_tokens,
        }
        if self.max_tokens == 1:
            return JudgeRequest(CHAT_PATH, body | {"logprobs": True, "top_logprobs": TOP_TOKENS}, self._parse)
        # The same request at temperature 0 would give the same text again.
        return JudgeRequest(CHAT_PATH, body, self._parse, {"temperature": 1.0})

    def reply_text(self, label: str, reason: str | None) -> str:
        """The text of a judge that chooses this label, for SFT."""
        return f"{reason}\nLabel: {label}" if self.gives_reason and reason else label

    def _parse(self, reply: Any) -> VerifierResult:
        return self.parse_choice(reply["choices"][0], self.labels)


@dataclass(frozen=True)
class Scalar:
    """The template of a reward model with one output r, whose input is the conversation. The score is σ(r), the
    Bradley-Terry probability of being preferred to an answer of reward 0."""

    def check(self, row: Row) -> None:
        """Nothing: it scores any row."""

    def request(self, row: Row, answer: str, model: str) -> JudgeRequest:
        """The request about an answer, which is a response without its thinking."""
        turns = row.get("messages") or [{"role": "user", "content": row["prompt"]}]
        contents = contents_with_media([turn["content"] for turn in turns], row)
        messages = [
            *({"role": turn["role"], "content": parts} for turn, parts in zip(turns, contents, strict=True)),
            {"role": "assistant", "content": answer},
        ]
        body = {"model": model, "messages": messages, "task": "classify", "use_activation": False}
        return JudgeRequest(POOLING_PATH, body, self._parse)

    def _parse(self, reply: Any) -> VerifierResult:
        (value,) = reply["data"][0]["data"]
        if not math.isfinite(value):
            return Failure("the reward is not finite", str(value))
        return Verdict(1 / (1 + math.exp(-max(-700.0, value))), "scalar", f"{value:.6g}")


def quoted(text: str) -> str:
    """The text with "> " before each line, so that no line of an answer looks like one of the template."""
    return "\n".join(f"> {line}" for line in text.splitlines()) or ">"


def fill(template: str, values: Mapping[str, str]) -> str:
    """The template with its {names} replaced in one pass: braces within an answer are left as they are."""
    return re.sub(r"\{(\w+)\}", lambda match: values.get(match[1], match[0]), template)


def content(text: str, row: Row) -> str | list[dict[str, Any]]:
    """A message's content: the text, with the row's images (and the frames of its clips) in place of their marks."""
    return contents_with_media([text], row)[0]


def contents_with_media(texts: Sequence[str], row: Row) -> list[str | list[dict[str, Any]]]:
    """The contents of successive messages, which share the row's images and clips in order."""
    if not row.get("images") and not row.get("videos"):
        return [*texts]
    images = iter(row.get("images", []))
    videos = iter(row.get("videos", []))
    return [_parts(text, images, videos) for text in texts]


def _parts(text: str, images: Iterator[str], videos: Iterator[list[str]]) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = []
    for piece in re.split("(<image>|<video>)", text):
        files: list[str] = []
        if piece == "<image>":
            image = next(images, None)
            files = [] if image is None else [image]
        elif piece == "<video>":
            files = next(videos, [])
        if files:
            parts += [{"type": "image_url", "image_url": {"url": data_url(file)}} for file in files]
        elif piece:  # text, or a mark that the answer wrote
            parts.append({"type": "text", "text": piece})
    return parts


@lru_cache(maxsize=64)
def data_url(file: str) -> str:
    """An image file as a data URL: a server on another host can't read the file."""
    kind = mimetypes.guess_type(file)[0] or "image/png"
    return f"data:{kind};base64,{base64.b64encode(Path(file).read_bytes()).decode()}"
