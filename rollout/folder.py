"""Reads a user's own folder of texts, and splits the texts into passages that a search lists and a model reads."""

from collections.abc import Iterator
from pathlib import Path

SUFFIXES = (".md", ".markdown", ".txt")
# The maximum size of all texts together. There is a maximum because the index is in memory.
MOST_BYTES = 256 << 20
# The maximum number of words of a passage. Our choice: several passages fit into a response.
PASSAGE_WORDS = 200


def read_folder(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield (id, text) of each passage of the texts in a folder and its subfolders, in the order of their paths.

    A text is a UTF-8 file with one of ``SUFFIXES``. Hidden files and links are left out. The id is the path relative to
    the folder, followed by ``#2`` and so on for the passages after the first. Raises ValueError naming a file that is
    not UTF-8, or the folder if its texts are too large or if there are none.
    """
    read_bytes = 0
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        is_hidden = any(part.startswith(".") for part in relative.parts)
        if path.suffix.lower() not in SUFFIXES or is_hidden or path.is_symlink() or not path.is_file():
            continue
        read_bytes += path.stat().st_size
        if read_bytes > MOST_BYTES:
            raise ValueError(
                f"{folder}: its texts have more than {MOST_BYTES >> 20} MiB; give a folder with less, or a search "
                "engine behind HTTP (endpoint)"
            )
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not UTF-8 ({error}); convert it, or move it elsewhere") from error
        for number, passage in enumerate(passages(text), start=1):
            yield (str(relative) if number == 1 else f"{relative}#{number}"), passage
    if not read_bytes:
        raise ValueError(f"{folder}: no text in it; give a folder with files that end with {', '.join(SUFFIXES)}")


def passages(text: str) -> Iterator[str]:
    """Yield passages of at most ``PASSAGE_WORDS`` words, each of whole paragraphs.

    A longer paragraph is cut after ``PASSAGE_WORDS`` words.
    """
    gathered: list[str] = []
    count = 0
    for paragraph in _paragraphs(text):
        length = len(paragraph.split())
        if count + length > PASSAGE_WORDS and gathered:
            yield "\n\n".join(gathered)
            gathered = []
            count = 0
        gathered.append(paragraph)
        count += length
    if gathered:
        yield "\n\n".join(gathered)


def _paragraphs(text: str) -> Iterator[str]:
    """Yield the parts between empty lines. A part that is too long is cut into pieces without its line breaks."""
    lines: list[str] = []
    for line in [*text.splitlines(), ""]:
        if line.strip():
            lines.append(line.rstrip())
            continue
        words = " ".join(lines).split()
        if len(words) <= PASSAGE_WORDS:
            if lines:
                yield "\n".join(lines)
        else:
            for start in range(0, len(words), PASSAGE_WORDS):
                yield " ".join(words[start : start + PASSAGE_WORDS])
        lines = []
