"""A person's own documents for deliberate search. They are texts in memory that only one browser session can search."""

import asyncio
import re
from collections.abc import Mapping
from dataclasses import dataclass

from recipes.page.conversation import Refused
from recipes.page.settings import PageConfig
from rollout.folder import passages
from rollout.retrieval import Bm25, Document

# Prefix of the ids of own documents, so that they differ from those of the page's corpus.
OWN = "own/"
LONGEST_NAME = 80  # characters
NOT_IN_A_NAME = re.compile(r"[^\w.,()\- ]")
NOT_IN_A_TEXT = re.compile("[\x00-\x08\x0b\x0e-\x1f\x7f]")


@dataclass(frozen=True)
class Documents:
    """The texts of a session by name, and the index of their passages."""

    texts: Mapping[str, str]
    index: Bm25


class Library:
    """The documents of all sessions. They stay until :meth:`remove` or the end of the process."""

    def __init__(self, page: PageConfig) -> None:
        self.page = page
        self.by_session: dict[str, Documents] = {}
        self.one_at_a_time = asyncio.Lock()

    def names(self, session: str) -> list[str]:
        documents = self.by_session.get(session)
        return [] if documents is None else list(documents.texts)

    async def add(self, session: str, name: str, content: bytes) -> None:
        """Add a file's text. Raises Refused if it is no text, or if it exceeds a limit of the settings."""
        page = self.page
        if len(content) > page.max_document_kib * 1024:
            raise Refused(f"more than {page.max_document_kib} KiB")
        text = checked_text(content)
        name = NOT_IN_A_NAME.sub("_", name)[-LONGEST_NAME:].strip() or "text"
        async with self.one_at_a_time:
            known = self.by_session.get(session)
            texts = {} if known is None else known.texts
            if name in texts:
                raise Refused(f"there is a document {name} already: remove it first, or give this one another name")
            if len(texts) >= page.max_documents:
                raise Refused(f"you have {len(texts)} documents, as many as this page takes: remove one first")
            if sum(len(each.texts) for each in self.by_session.values()) >= page.max_documents_of_all:
                raise Refused(f"this page has {page.max_documents_of_all} documents of all people, and takes no more")
            self.by_session[session] = await asyncio.to_thread(indexed, {**texts, name: text})

    async def remove(self, session: str, name: str) -> None:
        """Forget a document."""
        async with self.one_at_a_time:
            known = self.by_session.get(session)
            if known is None:
                return
            texts = dict(known.texts)
            # Another tab may have removed it.
            texts.pop(name, None)
            if texts:
                self.by_session[session] = await asyncio.to_thread(indexed, texts)
            else:
                del self.by_session[session]


@dataclass(frozen=True)
class OwnRetriever:
    """The retriever for a session's searches. It reads the session's documents as they are at that time."""

    library: Library
    session: str

    def search(self, query: str, count: int) -> list[Document]:
        documents = self.library.by_session.get(self.session)
        return [] if documents is None else documents.index.search(query, count)

    def read(self, document_id: str) -> str | None:
        documents = self.library.by_session.get(self.session)
        return None if documents is None else documents.index.read(document_id)


def checked_text(content: bytes) -> str:
    """The text of a file, whatever its name. Raises Refused if it is not UTF-8 text or is empty."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Refused(f"not a text in UTF-8 ({error.reason} at byte {error.start})") from error
    if control := NOT_IN_A_TEXT.search(text):
        raise Refused(f"not a text: it has the control character U+{ord(control[0]):04X}")
    if not text.strip():
        raise Refused("there is no text in it")
    return text


def indexed(texts: Mapping[str, str]) -> Documents:
    """The texts with an index of their passages. Raises Refused for texts without a word that can be searched."""
    documents = []
    for name, text in texts.items():
        for number, passage in enumerate(passages(text), start=1):
            documents.append(Document(f"{OWN}{name}" if number == 1 else f"{OWN}{name}#{number}", passage))
    try:
        return Documents(texts, Bm25.of(documents))
    except ValueError as error:
        raise Refused(str(error)) from error
