"""BM25 next to the formula, and an HTTP search engine on this machine that answers, fails, hangs and drips."""

import json
import math
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from rollout import folder as folder_module
from rollout import retrieval
from rollout.environment import Segment, Unavailable
from rollout.retrieval import Bm25, Document, Endpoint
from rollout.search import Search

DOCUMENTS = [
    Document("a", "red apple red tree"),
    Document("b", "green apple"),
    Document("c", "blue sky over water and over land"),
    Document("d", "apple green"),
]
LENGTHS = [4, 2, 6, 2]  # without the stop word "and"


def bm25(frequency: int, length: int, containing: int) -> float:
    """Robertson's formula in Lucene's form with k1 = 1.5 and b = 0.75, of one word in one of the documents."""
    idf = math.log(1 + (len(LENGTHS) - containing + 0.5) / (containing + 0.5))
    norm = 1.5 * (1 - 0.75 + 0.75 * length / (sum(LENGTHS) / len(LENGTHS)))
    return idf * frequency / (frequency + norm)


def test_scores_are_the_formula_s() -> None:
    index = Bm25.of(DOCUMENTS)
    expected = [bm25(2, 4, 1) + bm25(1, 4, 3), bm25(1, 2, 3), 0.0, bm25(1, 2, 3)]
    assert index.scores("Red apple!") == pytest.approx(expected, rel=1e-6)


def test_the_best_come_first_equal_ones_in_order_and_others_not_at_all() -> None:
    index = Bm25.of(DOCUMENTS)
    assert [d.id for d in index.search("red apple", 4)] == ["a", "b", "d"]
    assert [d.id for d in index.search("green apple", 1)] == ["b"]
    assert [index.search(nothing, 4) for nothing in ("zebra", "", "and the", "?")] == [[]] * 4
    assert (index.read("b"), index.read("z")) == ("green apple", None)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("", "no document"),
        ('{"id": "a"}', "1: a document is an object with the strings `id` and `text`"),
        ('{"id": "a", "text": "x"}\nnope', "2: "),
        ('{"id": "a", "text": "x"}\n{"id": "a", "text": "y"}', "'a' occurs twice"),
        ('{"id": "a]", "text": "x"}', "without brackets"),
        ('{"id": "a", "text": "x y and the"}', "no document has a word"),
    ],
)
def test_a_corpus_that_can_t_be_used_is_told(tmp_path: Path, lines: str, message: str) -> None:
    (tmp_path / "corpus.jsonl").write_text(lines)
    with pytest.raises(ValueError, match=r"corpus\.jsonl.*") as caught:
        Bm25.load(str(tmp_path / "corpus.jsonl"))
    assert message in str(caught.value)


def test_a_line_ends_at_its_line_break_alone(tmp_path: Path) -> None:
    """JSON has these three as they are; str.splitlines() takes them for line breaks."""
    documents = [Document("a", "red\u2028apple\u2029tree\x85end"), Document("b", "green apple")]
    rows = [json.dumps({"id": each.id, "text": each.text}, ensure_ascii=False) for each in documents]
    (tmp_path / "corpus.jsonl").write_text("\n".join(rows), encoding="utf-8")
    assert Bm25.load(str(tmp_path / "corpus.jsonl")).documents == documents


def test_a_folder_of_texts_is_searched_by_passages(tmp_path: Path) -> None:
    folder = tmp_path / "notes"
    (folder / "deep").mkdir(parents=True)
    (folder / ".git").mkdir()
    words = [" ".join(f"word{part}x{i}" for i in range(150)) for part in range(3)]
    long_paragraph = " ".join(f"long{i}" for i in range(450))
    texts = {
        "a.md": "# Rivers\n\nThe river of Norland is Ombra.\n",
        "deep/b.txt": "\n \n".join(words),
        "deep/c.MD": f"short\n\n{long_paragraph}\nend",
        "empty.txt": "",
        "d.py": "Ombra",
        ".git/e.md": "Ombra",
        ".f.md": "Ombra",
    }
    for name, text in texts.items():
        (folder / name).write_text(text)
    (tmp_path / "secret.md").write_text("Ombra")
    (folder / "link.md").symlink_to(tmp_path / "secret.md")
    (folder / "linked").symlink_to(tmp_path)
    index = Bm25.load(str(folder))
    assert [document.id for document in index.documents] == [
        "a.md", "deep/b.txt", "deep/b.txt#2", "deep/b.txt#3", "deep/c.MD", "deep/c.MD#2", "deep/c.MD#3", "deep/c.MD#4",
    ]  # fmt: skip
    assert index.search("Ombra", 5) == [Document("a.md", "# Rivers\n\nThe river of Norland is Ombra.")]
    assert [index.read(f"deep/b.txt{number}") for number in ("", "#2", "#3")] == words
    passages = [str(index.read(f"deep/c.MD{number}")) for number in ("", "#2", "#3", "#4")]
    assert max(len(passage.split()) for passage in passages) <= folder_module.PASSAGE_WORDS
    assert " ".join(passages).split() == texts["deep/c.MD"].split(), "no word is lost"


def test_a_folder_that_can_t_be_used_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"no text in it; give a folder with files that end with \.md"):
        Bm25.load(str(tmp_path))
    (tmp_path / "a[1].md").write_text("xyz")
    with pytest.raises(ValueError, match=r"'a\[1\]\.md': use a name without brackets.*; rename the file"):
        Bm25.load(str(tmp_path))
    (tmp_path / "a[1].md").rename(tmp_path / "a.md")
    (tmp_path / "b.txt").write_bytes("Köln".encode("latin-1"))
    with pytest.raises(ValueError, match=r"b\.txt: not UTF-8"):
        Bm25.load(str(tmp_path))
    (tmp_path / "b.txt").unlink()
    assert len(Bm25.load(str(tmp_path)).documents) == 1
    monkeypatch.setattr(folder_module, "MOST_BYTES", 2)
    with pytest.raises(ValueError, match="its texts have more than 0 MiB"):
        Bm25.load(str(tmp_path))


class Server(ThreadingHTTPServer):
    """``replies``: what the next requests get, in order; the last one is repeated."""

    daemon_threads = True

    def __init__(self, *replies: Any) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.replies, self.asked, self.ended = list(replies), [], threading.Event()
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, body))
        reply = self.server.replies.pop(0) if len(self.server.replies) > 1 else self.server.replies[0]
        if reply == "hang":
            self.server.ended.wait(20)
            return
        if isinstance(reply, int):
            self.send_error(reply)
            return
        data = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(10**6 if reply == b"drip" else len(data)))
        self.end_headers()
        while reply == b"drip" and not self.server.ended.wait(0.05):
            self.wfile.write(b" ")
            self.wfile.flush()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrieval, "PAUSE", 0.01)


@pytest.fixture
def serving() -> Iterator[Any]:
    servers: list[Server] = []

    def serve(*replies: Any) -> Server:
        servers.append(Server(*replies))
        return servers[-1]

    yield serve
    for server in servers:
        server.ended.set()
        server.shutdown()
        server.server_close()


FOUND = {"documents": [{"id": "n", "text": "The capital of Norland is Veska."}, {"id": "s", "text": "x"}]}


def test_an_endpoint_searches_and_reads(serving: Any) -> None:
    server = serving(FOUND, {"text": "The whole text."}, {"text": None})
    endpoint = Endpoint(server.address, timeout=5, retries=0)
    assert endpoint.search("capital", 1) == [Document("n", "The capital of Norland is Veska.")]
    assert (endpoint.read("n"), endpoint.read("z")) == ("The whole text.", None)
    assert server.asked == [
        ("/search", {"query": "capital", "count": 1}),
        ("/read", {"id": "n"}),
        ("/read", {"id": "z"}),
    ]


def test_a_search_engine_on_this_machine_is_asked_without_the_environment_s_proxy_and_others_with_it(
    serving: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, proxy = serving(FOUND), serving(FOUND)
    for name in ("no_proxy", "NO_PROXY", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", proxy.address)
    port = server.server_address[1]
    for name in ("127.0.0.1", "localhost"):
        assert Endpoint(f"http://{name}:{port}", timeout=5, retries=0).search("x", 1)[0].id == "n"
    assert (len(server.asked), proxy.asked) == (2, [])
    assert Endpoint("http://search.invalid", timeout=5, retries=0).search("x", 1)[0].id == "n"
    assert [path for path, _ in proxy.asked] == ["http://search.invalid/search"]


def test_an_endpoint_is_asked_again(serving: Any) -> None:
    server = serving(503, b"no json", [1], FOUND)
    assert Endpoint(server.address, timeout=5, retries=3).search("x", 2)[0].id == "n"
    assert len(server.asked) == 4


@pytest.mark.parametrize("reply", [500, 404, b"no json", [1], {}, {"documents": 3}, {"documents": [{"id": "a"}]}])
def test_an_endpoint_that_fails_is_told_as_that(serving: Any, reply: Any) -> None:
    server = serving(reply)
    search = Search(Endpoint(server.address, timeout=5, retries=1), 1, 5)
    with pytest.raises(Unavailable, match="/search"):
        search.reply([Segment("<search>x</search>", False)])
    with pytest.raises(Unavailable):
        search.check()


@pytest.mark.parametrize("reply", ["hang", b"drip"])
def test_an_endpoint_that_hangs_is_left_in_time(serving: Any, reply: Any) -> None:
    server, started = serving(reply), time.monotonic()
    with pytest.raises(Unavailable, match=r"/search: .*\(2 tries\)"):
        Endpoint(server.address, timeout=0.3, retries=1).search("x", 1)
    assert time.monotonic() - started < 15, "a hanging server's reply would come after 20 s"


def test_nobody_there_and_a_reply_without_a_text(serving: Any) -> None:
    with pytest.raises(Unavailable, match="refused"):
        Endpoint("http://127.0.0.1:1", timeout=1, retries=0).search("x", 1)
    with pytest.raises(Unavailable, match=r"not \{text"):
        Endpoint(serving({"text": 3}).address, timeout=5, retries=0).read("x")
