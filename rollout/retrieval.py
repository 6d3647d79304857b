"""Retrievers for a search environment: BM25 over a corpus in this process, or a search engine over HTTP."""

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

# The maximum number of bytes of an endpoint's reply. A longer one is an error.
LONGEST_REPLY = 1 << 20
# Seconds before the first retry. The pause doubles with each further retry.
PAUSE = 0.2


@dataclass(frozen=True)
class Document:
    """A document that a search may return.

    Raises ValueError for an ``id`` that is empty or that contains a bracket or a line break, because search results
    show it in brackets.
    """

    id: str
    text: str

    def __post_init__(self) -> None:
        if not self.id.strip() or set(self.id) & set("[]\n"):
            raise ValueError(f"document id {self.id!r}: use a name without brackets and line breaks")


class Retriever(Protocol):
    """A source of documents. Several threads call its functions concurrently. They may raise Unavailable."""

    def search(self, query: str, count: int) -> list[Document]:
        """Return at most ``count`` documents, the best first."""
        ...

    def read(self, document_id: str) -> str | None:
        """Return the full text of a document, or None for an unknown id."""
        ...


@dataclass(frozen=True)
class Bm25:
    """Okapi BM25 in Lucene's form (Robertson et al. 1994), with the defaults of bm25s, k1 = 1.5 and b = 0.75.

    A word has two or more word characters and is converted to lower case. English stop words are left out. Documents
    with equal scores are in the order of the corpus. Documents without any word of the query are not returned.
    """

    documents: Sequence[Document]
    texts: dict[str, str]
    """Id → text."""
    index: Any
    """A ``bm25s.BM25``."""

    @staticmethod
    def of(documents: Sequence[Document]) -> "Bm25":
        """Index the documents. Raises ValueError for a corpus without documents or words, and for a repeated id."""
        if not documents:
            raise ValueError("the corpus has no document")
        texts: dict[str, str] = {}
        for document in documents:
            if document.id in texts:
                raise ValueError(f"document id {document.id!r} occurs twice; make ids unique")
            texts[document.id] = document.text
        # Imported here, because it imports numba. That takes a second, which only runs with a search should spend.
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
        """Return the score of every document, [documents]."""
        indexed_words = [word for word in words(query) if word in self.index.vocab_dict]
        return self.index.get_scores(indexed_words) if indexed_words else np.zeros(len(self.documents))

    def search(self, query: str, count: int) -> list[Document]:
        scores = self.scores(query)
        # The sort is stable, so documents with equal scores stay in the order of the corpus.
        best = np.argsort(-scores, kind="stable")[:count]
        return [self.documents[i] for i in best if scores[i] > 0]

    def read(self, document_id: str) -> str | None:
        return self.texts.get(document_id)


def words(text: str) -> list[str]:
    """Return the words of a text that the index uses."""
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
    """A search engine over HTTP at ``address``. Requests and replies are JSON.

    * ``POST address/search {"query": text, "count": n}`` → ``{"documents": [{"id": …, "text": …}, …]}``, best first.
    * ``POST address/read {"id": …}`` → ``{"text": …}``, or ``{"text": null}`` for an unknown id.
    """

    address: str
    # The limit in seconds of a complete try.
    timeout: float
    # The number of further tries after the first.
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
        """Send a POST request with retries. Raises Unavailable when no try gets a JSON object."""
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
        """The opener of requests, which is built once, because building it reads the machine's certificates."""
        # A proxy that environment variables name can't reach this machine's loopback.
        proxies = {} if is_loopback(urlsplit(self.address).netloc) else urllib.request.getproxies()
        return urllib.request.build_opener(urllib.request.ProxyHandler(proxies))

    def _post(self, address: str, body: dict[str, Any]) -> bytes:
        """Send a POST request and return the body of the reply.

        Raises OSError and HTTPException, and ValueError for a body that is too long.
        """
        deadline = time.monotonic() + self.timeout
        request = urllib.request.Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})
        with self._opener.open(request, timeout=self.timeout) as reply:
            data = bytearray()
            while True:
                part = reply.read1(1 << 16)
                if not part:
                    return bytes(data)
                data += part
                # urllib's timeout applies to each read, so a server could send a byte at a time forever.
                if time.monotonic() > deadline:
                    raise TimeoutError(f"no complete reply within {self.timeout} s")
                if len(data) > LONGEST_REPLY:
                    raise ValueError(f"a reply of more than {LONGEST_REPLY} bytes")
