"""Save edits as training data: a row for ``stage=sft`` and a preference pair for ``stage=reward_model``."""

import difflib
import json
import os
import re
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from recipes.page.conversation import Branch, Refused, Turn, messages, whole_response
from rewards.verifiers.text import without_thinking
from rollout.guidance.edits import shared_start

KEPT, REMOVED, ADDED = "kept", "removed", "added"
SFT_FILE, PAIRS_FILE = "sft.jsonl", "pairs.jsonl"
# Limits up to which a changed part is compared word by word: its number of words, before and after, and its number of
# pairs of an old and an equal new word. The page waits for the comparison, whose time grows with the square of both.
MOST_WORDS = 2_000
MOST_PAIRS = 50_000
LONGEST_NAME = 100  # characters of a person's name
MEDIA_MARKS = ("<image>", "<video>")

type Diff = list[tuple[str, str]]


def diff(before: str, after: str) -> Diff:
    """The parts that a text keeps, loses and gains, by words.

    The kept and removed parts together are ``before``. The kept and added parts together are ``after``.
    """
    start = shared_start(before, after)
    old, new = before[start:], after[start:]
    parts: Diff = [(KEPT, before[:start])]
    old_words, new_words = (re.findall(r"\s*\S+|\s+", text) for text in (old, new))
    new_counts = Counter(new_words)
    pairs = sum(count * new_counts[word] for word, count in Counter(old_words).items())
    if pairs > MOST_PAIRS or max(len(old_words), len(new_words)) > MOST_WORDS:
        parts += [(REMOVED, old), (ADDED, new)]
    else:
        matcher = difflib.SequenceMatcher(None, old_words, new_words, autojunk=False)
        for operation, first, last, new_first, new_last in matcher.get_opcodes():
            if operation == "equal":
                parts.append((KEPT, "".join(old_words[first:last])))
            else:
                parts.append((REMOVED, "".join(old_words[first:last])))
                parts.append((ADDED, "".join(new_words[new_first:new_last])))
    return [(kind, text) for kind, text in parts if text]


@dataclass(frozen=True)
class SavedEdit:
    """The rows of an edit."""

    sft: dict[str, Any]
    # None if both branches have the same answer or the branch that was edited has none, because a reward model reads no
    # thinking.
    pair: dict[str, Any] | None


def edit_rows(turns: Sequence[Turn], branch: Branch, about: Mapping[str, str], marks: Sequence[str]) -> SavedEdit:
    """The rows of the last turn's branch ``branch``, which continues from an edit.

    Its answer is the chosen one, and the answer of the branch that was edited is the rejected one. ``about``: who, when
    and model. Raises Refused for a branch that has no edit, no end or no answer, and for a conversation with one of
    ``MEDIA_MARKS``.
    """
    turn = turns[-1]
    if branch.parent is None or branch.edited is None:
        raise Refused("nobody has edited this answer")
    if branch.finish_reason != "stop":
        raise Refused("this answer has no end: let the model go on until it ends")
    parent = turn.branches[branch.parent]
    chosen = whole_response(turn, branch, marks)
    rejected = whole_response(turn, parent, marks)
    if not without_thinking(chosen):
        raise Refused("this answer has no text after its thinking")
    asked = messages(turns, marks)
    if any(mark in text for mark in MEDIA_MARKS for text in (chosen, *(each["content"] for each in asked))):
        raise Refused(f"the conversation has {' or '.join(MEDIA_MARKS)}, which stands for a file in a row of data")
    more = {**about, "diff": diff(parent.text, branch.edited)}
    row_id = f"edit-{uuid.uuid4().hex}"
    sft = {"id": row_id, "messages": [*asked, {"role": "assistant", "content": chosen}], **more}
    if without_thinking(chosen) == without_thinking(rejected) or not without_thinking(rejected):
        return SavedEdit(sft, None)
    return SavedEdit(sft, {"id": row_id, "messages": asked, "chosen": chosen, "rejected": rejected, **more})


def about(person: str, model: str) -> dict[str, str]:
    """Who saved an edit, when, and the model. Raises Refused for an empty or too long name."""
    name = " ".join(person.split())
    if not 0 < len(name) <= LONGEST_NAME:
        raise Refused(
            f"write your name, of at most {LONGEST_NAME} characters, beside the title: it is saved with edits"
        )
    return {"who": name, "when": datetime.now(UTC).isoformat(timespec="seconds"), "model": model}


class EditFiles:
    """Two files in a folder to which rows are appended. Nothing is ever removed. Only their owner can read them."""

    def __init__(self, folder: Path, max_mib: int) -> None:
        self.folder = folder
        self.max_bytes = max_mib * 2**20

    def append(self, saved: SavedEdit) -> None:
        """Append the rows of an edit. Raises Refused for a file that would be too large, before anything is written."""
        lines = [(self.folder / SFT_FILE, _line(saved.sft))]
        if saved.pair is not None:
            lines.append((self.folder / PAIRS_FILE, _line(saved.pair)))
        for path, line in lines:
            size = path.stat().st_size if path.exists() else 0
            if size + len(line) > self.max_bytes:
                raise Refused(f"{path} has {size} bytes and may have {self.max_bytes}: move it, or raise max_saved_mib")
        self.folder.mkdir(parents=True, exist_ok=True)
        for path, line in lines:
            file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            try:
                # One call for a line, so that several processes can append to the file.
                os.write(file, line)
            finally:
                os.close(file)


def _line(row: Mapping[str, Any]) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode("utf-8", errors="replace") + b"\n"
