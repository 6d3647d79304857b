"""Documents for a search environment: BM25 over a corpus in this process, or a search engine behind HTTP."""

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import numpy as np

from rollout.environment import Unavailable
from rollout.folder import read_folder
from rollout.guidance.settings import is_loopback

# Bytes. An endpoint's longer reply is an error.
LONGEST_REPLY = 1 << 20
# Seconds before the first retry, doubled for each further one.
PAUSE = 0.2


@dataclass(frozen=True)
class Document:
    """Raises ValueError for an ``id`` that is empty or contains a bracket or a line break, because search results
    show it in brackets."""

    id: str
    text: str

    def __post_init__(self) -> None:
        if not self.id.strip() or set(self.id) & set("[]\n"):
            raise ValueError(f"document id {self.id!r}: use a name without brackets and line breaks")


class Retriever(Protocol):
    """A source of documents. Its functions are called from several threads, and raise Unavailable."""

    def search(self, query: str, count: int) -> list[Document]:
        """At most ``count`` documents, best first."""
        ...

    def read(self, document_id: str) -> str | None:
        """The full text of a document; None for an unknown id."""
        ...


@dataclass(frozen=True)
class Bm25:
    """Okapi BM25 in Lucene's form (Robertson et al. 1994; the library's defaults k1 = 1.5, b = 0.75).

    A word is two or more word characters in lower case; English stop words are left out. Documents with equal scores
    are in the corpus's order, and documents without any word of the query are not returned.
    """

    documents: Sequence[Document]
    texts: dict[str, str]
    """By id."""
    index: Any
    """bm25s.BM25"""

    @staticmethod
    def of(documents: Sequence[Document]) -> "Bm25":
        """Index the documents. Raises ValueError for a corpus without a document or a word, and for a repeated id."""
        if not documents:
            raise ValueError("the corpus has no document")
        texts: dict[str, str] = {}
        for document in documents:
            if document.id in texts:
                raise ValueError(f"document id {document.id!r} occurs twice; make ids unique")
            texts[document.id] = document.text
        # Imported here, because it imports numba, which takes a second that only runs with a search need.
        import bm25s

        index = bm25s.BM25(method="lucene", auto_compile=False)
        all_words = [words(document.text) for document in documents]
        if not any(all_words):
            raise ValueError("no document has a word of two or more letters that is not a stop word")
        index.index(all_words, show_progress=False)
        return Bm25(documents, texts, index)

    @staticmethod
    def load(path: str) -> "Bm25":
        """Index a JSONL file with ``id`` and ``text`` in each line, or a folder of texts (:mod:`rollout.folder`).

        Raises ValueError naming the file and what is wrong in it.
        """
        documents = _from_folder(Path(path)) if Path(path).is_dir() else _from_file(Path(path))
        try:
            return Bm25.of(documents)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def scores(self, query: str) -> np.ndarray:
        """The score of every document, [documents]."""
        indexed_words = [word for word in words(query) if word in self.index.vocab_dict]
        return self.index.get_scores(indexed_words) if indexed_words else np.zeros(len(self.documents))

    def search(self, query: str, count: int) -> list[Document]:
        scores = self.scores(query)
        # Stable: equal scores stay in the corpus's order.
        best = np.argsort(-scores, kind="stable")[:count]
        return [self.documents[i] for i in best if scores[i] > 0]

    def read(self, document_id: str) -> str | None:
        return self.texts.get(document_id)


def words(text: str) -> list[str]:
    """The words of a text that count for the index."""
    import bm25s

    (tokens,) = bm25s.tokenize(text, stopwords="en", return_ids=False, show_progress=False)
    return [word for word in tokens if word]


def _from_folder(folder: Path) -> list[Document]:
    documents = []
    for document_id, text in read_folder(folder):
        try:
            documents.append(Document(document_id, text))
        except ValueError as error:
            raise ValueError(f"{folder}: {error}; rename the file") from error
    return documents


def _from_file(path: Path) -> list[Document]:
    documents = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                row = json.loads(line)
                documents.append(_document(row))
            except ValueError as error:
                raise ValueError(f"{path}:{number}: {error}") from error
    return documents


def _document(row: Any) -> Document:
    if not isinstance(row, dict) or not all(isinstance(row.get(field), str) for field in ("id", "text")):
        raise ValueError("a document is an object with the strings `id` and `text`")
    return Document(row["id"], row["text"])


@dataclass(frozen=True)
class Endpoint:
    """A search engine over HTTP at ``address``; requests and replies are JSON.

    ``POST address/search {"query": text, "count": n}`` → ``{"documents": [{"id": …, "text": …}, …]}``, best first;
    ``POST address/read {"id": …}`` → ``{"text": …}``, or ``{"text": null}`` for an unknown id.
    ``timeout``: seconds of a complete try. ``retries``: further tries after the first.
    """

    address: str
    timeout: float
    retries: int

    def search(self, query: str, count: int) -> list[Document]:
        reply = self._call("search", {"query": query, "count": count})
        try:
            return [_document(row) for row in reply["documents"][:count]]
        except (KeyError, TypeError, ValueError) as error:
            raise Unavailable(f"{self.address}/search: not {{documents: [{{id, text}}]}} ({error!r})") from error

    def read(self, document_id: str) -> str | None:
        reply = self._call("read", {"id": document_id})
        text = reply.get("text")
        if "text" not in reply or not isinstance(text, str | None):
            raise Unavailable(f"{self.address}/read: not {{text: …}}")
        return text

    def _call(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """POST with retries. Raises Unavailable when no try gets a JSON object."""
        reason = ""
        for attempt in range(self.retries + 1):
            if attempt > 0:
                time.sleep(PAUSE * 2 ** (attempt - 1))
            try:
                reply = json.loads(self._post(f"{self.address.rstrip('/')}/{path}", body))
                if isinstance(reply, dict):
                    return reply
                reason = f"a reply that is a {type(reply).__name__}, not an object"
            except (OSError, http.client.HTTPException, ValueError) as error:
                reason = str(error) or type(error).__name__
        raise Unavailable(f"{self.address}/{path}: {reason} ({self.retries + 1} tries)")

    @cached_property
    def _opener(self) -> urllib.request.OpenerDirector:
        """Made once: it reads the machine's certificates."""
        # A proxy of the environment does not reach this machine's loopback.
        proxies = {} if is_loopback(urlsplit(self.address).netloc) else urllib.request.getproxies()
        return urllib.request.build_opener(urllib.request.ProxyHandler(proxies))

    def _post(self, address: str, body: dict[str, Any]) -> bytes:
        """The reply's body. Raises OSError, HTTPException, and ValueError for a body that is too long."""
        deadline = time.monotonic() + self.timeout
        request = urllib.request.Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})
        with self._opener.open(request, timeout=self.timeout) as reply:
            data = bytearray()
            while True:
                part = reply.read1(1 << 16)
                if not part:
                    return bytes(data)
                data += part
                # urllib's timeout is for each read, so a server could send a byte at a time for ever.
                if time.monotonic() > deadline:
                    raise TimeoutError(f"no complete reply within {self.timeout} s")
                if len(data) > LONGEST_REPLY:
                    raise ValueError(f"a reply of more than {LONGEST_REPLY} bytes")
