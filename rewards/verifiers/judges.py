"""Verifiers that are models: a template builds the request and turns the reply into a verdict.

``rewards.client`` sends the requests. A :class:`Judge` is generative and writes a label (chat completions). Its
template has a table with the score of each label. Text that is none of the labels is a Failure, never a score. A
:class:`Scalar` is a reward model with one output (pooling).
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

TOP_TOKENS = 20  # the most log-probs per token that vLLM and OpenAI's API return
# If the labels' tokens have less probability in total, the judge did not answer with a label (our choice).
MIN_LABEL_PROBABILITY = 0.5
JAILBREAK = "jailbreak"
CHAT_PATH = "/v1/chat/completions"
POOLING_PATH = "/pooling"


@dataclass(frozen=True)
class JudgeRequest:
    """One request to a server."""

    path: str  # the URL's path on the server
    body: Mapping[str, Any]  # JSON
    # Turns the JSON reply into a result.
    parse: Callable[[Any], VerifierResult]
    # Added to the body when the request is sent again because the text that the judge wrote could not be parsed.
    retry_fields: Mapping[str, Any] = field(default_factory=dict)


# Label → score in [0, 1].
type Labels = Mapping[str, float]
# A chat completion's choice and the labels → the result.
type ChoiceParser = Callable[[Mapping[str, Any], Labels], VerifierResult]


def written_label(choice: Mapping[str, Any], labels: Labels) -> VerifierResult:
    """The label after the last "label:" in a judge's text, or the whole text if it is nothing but a label."""
    raw = choice["message"]["content"] or ""
    text = without_thinking(raw)
    stated = re.findall(r"label\W*?[:=]([^\n]*)", text, re.IGNORECASE)
    written = (stated[-1] if stated else text).strip(" \t\n.,;:!\"'`*#[]()").casefold()
    for label, score in labels.items():
        if written == label.casefold():
            return Verdict(score, label, raw)
    return Failure("unparseable", raw)


def label_probabilities(choice: Mapping[str, Any], labels: Labels) -> dict[str, float]:
    """Label → the probability that the judge's first token is the beginning of this label and of no other one."""
    probabilities = dict.fromkeys(labels, 0.0)
    for candidate in choice["logprobs"]["content"][0]["top_logprobs"]:
        token = candidate["token"].strip().casefold()
        matching_labels = [label for label in labels if token and label.casefold().startswith(token)]
        if len(matching_labels) == 1:
            probabilities[matching_labels[0]] += math.exp(candidate["logprob"])
    return probabilities


def threshold(choice: Mapping[str, Any], labels: Labels, *, label: str, min_probability: float) -> VerifierResult:
    """The verdict for a table of two labels, by the labels' probabilities.

    It is ``label`` if its probability is at least ``min_probability``, else the other label.
    """
    probabilities = label_probabilities(choice, labels)
    raw = _format_probabilities(probabilities)
    if sum(probabilities.values()) < MIN_LABEL_PROBABILITY:
        return Failure("unparseable", raw)
    (other_label,) = set(labels) - {label}
    chosen = label if probabilities[label] >= min_probability else other_label
    return Verdict(labels[chosen], chosen, raw)


def true_or_false(choice: Mapping[str, Any], labels: Labels) -> VerifierResult:
    """The score (p_TRUE + 1 − p_FALSE) / 2, with the more probable label.

    It is computed as ½ + Σ p (score − ½), which holds for any table of two labels with the scores 1 and 0.
    """
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
    """The template of a generative verifier."""

    # Has the placeholders {question} and {answer}. With {reference}, the judge compares with the row's ``answer``.
    prompt: str
    labels: Labels
    # Turns a completion's choice into a result.
    parse_choice: ChoiceParser
    # The longest text of the judge. With 1, the request asks for token log-probs.
    max_tokens: int
    # The prompt for jailbreaks: rows of this kind, or with this tag.
    strict_prompt: str | None = None
    # Whether the prompt asks for a reason before the label.
    gives_reason: bool = False

    @property
    def compares(self) -> bool:
        """Whether the judge compares the response with a reference answer."""
        return "{reference}" in self.prompt

    def check(self, row: Row) -> None:
        """Raises ValueError for a row for which the judge can't judge any response."""
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
        # A retry at temperature 0 would give the same text again.
        return JudgeRequest(CHAT_PATH, body, self._parse, {"temperature": 1.0})

    def reply_text(self, label: str, reason: str | None) -> str:
        """The reply that the judge should write for this label, for SFT."""
        return f"{reason}\nLabel: {label}" if self.gives_reason and reason else label

    def _parse(self, reply: Any) -> VerifierResult:
        return self.parse_choice(reply["choices"][0], self.labels)


@dataclass(frozen=True)
class Scalar:
    """The template of a reward model with one output r, whose input is the conversation.

    The score is σ(r), the Bradley-Terry probability that the answer is preferred to an answer with reward 0.
    """

    def check(self, row: Row) -> None:
        """Does nothing, as a reward model can score any row."""

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
    """The text with "> " before each line, so that no line of an answer looks like a line of the template."""
    return "\n".join(f"> {line}" for line in text.splitlines()) or ">"


def fill(template: str, values: Mapping[str, str]) -> str:
    """The template with its {names} replaced. It is a single pass, so braces in an answer are left as they are."""
    return re.sub(r"\{(\w+)\}", lambda match: values.get(match[1], match[0]), template)


def content(text: str, row: Row) -> str | list[dict[str, Any]]:
    """A message's content: the text, with the marks replaced by the row's images and the frames of its clips."""
    return contents_with_media([text], row)[0]


def contents_with_media(texts: Sequence[str], row: Row) -> list[str | list[dict[str, Any]]]:
    """The contents of successive messages. The row's images and clips replace the marks of all messages in order."""
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
        elif piece:  # text, or a mark within the answer, for which there is no file
            parts.append({"type": "text", "text": piece})
    return parts


@lru_cache(maxsize=64)
def data_url(file: str) -> str:
    """An image file as a data URL, since a server on another host can't read the file."""
    kind = mimetypes.guess_type(file)[0] or "image/png"
    return f"data:{kind};base64,{base64.b64encode(Path(file).read_bytes()).decode()}"
