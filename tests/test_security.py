"""What no file of the rooms may do: unpickle what came over a socket, listen beyond loopback, show a secret."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra.errors import ConfigCompositionException

from recipes.command_line import one_line

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("recipes", "megatron_ext", "rollout", "rewards")
UNPICKLING = {"pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}
OF_OBJECTS = re.compile(
    "(gather|broadcast|scatter|send|recv)_object|_pyobj"
)  # torch.distributed's and zmq's calls that pickle
# The nodes of a job compare their clocks for a few seconds: who asks gets eight bytes. The endpoint of guided decoding
# and the page for people refuse an address other than the loopback without a token
# (tests/rollout/test_guidance_decisions.py, tests/recipes/test_serve_page.py).
ELSEWHERE = {
    "recipes/node_check/__main__.py": "socket.create_server(('', port))",
    "recipes/page/app.py": "uvicorn.Config(app, host=page.host, port=page.port, log_level='warning', "
    "timeout_graceful_shutdown=SHUTDOWN_SECONDS)",
    "rollout/guidance/endpoint.py": "web.run_app(app, host=server.host, port=server.port, "
    "handler_cancellation=True, shutdown_timeout=SHUTDOWN_SECONDS, access_log=None, print=None)",
}
LISTENING = {"create_server", "bind", "start_server", "run_app", "TCPSite"}  # bind: of an address, a pair


def unsafe_places(source: str) -> Iterator[str]:
    """Every place in the source that pickles, or that listens on another address than a constant of loopback."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            for name in names:
                if name.partition(".")[0] in UNPICKLING or name.startswith("multiprocessing.connection"):
                    yield f"{node.lineno}: imports {name}"
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        if OF_OBJECTS.search(node.func.attr):
            yield f"{node.lineno}: calls {node.func.attr}"
        if ast.unparse(node.func) in ("torch.load", "np.load", "numpy.load"):
            safe = {"torch.load": ("weights_only", True)}.get(ast.unparse(node.func), ("allow_pickle", False))
            given = {(keyword.arg, getattr(keyword.value, "value", None)) for keyword in node.keywords}
            if safe not in given and not (safe[0] == "allow_pickle" and "allow_pickle" not in dict(given)):
                yield f"{node.lineno}: {ast.unparse(node.func)} without {safe[0]}={safe[1]}"
        if node.func.attr == "bind" and not any(isinstance(argument, ast.Tuple) for argument in node.args):
            continue
        is_listening = node.func.attr in LISTENING or ast.unparse(node.func) in ("uvicorn.Config", "uvicorn.run")
        if is_listening and "127.0.0.1" not in ast.unparse(node):
            yield f"{node.lineno}: {ast.unparse(node)}"


@pytest.mark.parametrize("room", ROOMS)
def test_nothing_is_unpickled_and_nothing_listens_beyond_loopback(room: str) -> None:
    files = sorted((ROOT / room).rglob("*.py"))
    assert files
    wrong = [(str(path.relative_to(ROOT)), what) for path in files for what in unsafe_places(path.read_text())]
    assert [(path, what) for path, what in wrong if what.partition(": ")[2] != ELSEWHERE.get(path)] == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from cloudpickle import loads",
        "from multiprocessing.connection import Client",
        "dist.all_gather_object(a, b)",
        "dist.broadcast_object_list(a)",
        "torch.load(path)",
        "np.load(path, allow_pickle=True)",
        "socket.create_server(('', 80))",
        "server.bind(('0.0.0.0', 80))",
        "uvicorn.run(app, host=host)",
    ],
)
def test_the_search_finds(source: str) -> None:
    assert list(unsafe_places(source))


def test_an_unknown_field_with_a_secret_is_told_without_it() -> None:
    text = "Could not override 'logger.api_key'.\nTo append to your config use +logger.api_key=hush"
    error = ConfigCompositionException(text)
    assert one_line(error).startswith("logger.api_key: no such field")
    assert "hush" not in one_line(error)
