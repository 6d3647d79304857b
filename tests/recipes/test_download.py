"""``recipes.download`` against a hub on this machine: a fake one, which speaks the real one's HTTP."""

import hashlib
import http.server
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from hydra import compose, initialize_config_dir

from recipes import download
from recipes.config import parse
from recipes.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
REPOSITORY = "somebody/a-model"
COMMIT = "c" * 40
WEIGHTS = bytes(range(256)) * 400


@dataclass
class Hub:
    """``files`` of the one repository, and ``asked``: method and path of each request. A request for the content of
    ``breaks`` ends after half of it."""

    files: dict[str, bytes]
    asked: list[tuple[str, str]] = field(default_factory=list)
    breaks: str = ""
    address: str = ""

    def contents(self) -> list[str]:
        """Files whose content was asked for."""
        return [path.rsplit("/", 1)[1] for method, path in self.asked if method == "GET" and "resolve" in path]


class Handler(http.server.BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        path = self.path.partition("?")[0]
        self.hub.asked.append((self.command, path))
        if path.startswith(f"/api/models/{REPOSITORY}/tree/"):
            self.reply(
                [
                    {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                    for name, content in self.hub.files.items()
                ]
            )
        elif path.startswith(f"/api/models/{REPOSITORY}"):
            siblings = [{"rfilename": name} for name in self.hub.files]
            self.reply({"id": REPOSITORY, "sha": COMMIT, "siblings": siblings})
        elif path.startswith(f"/{REPOSITORY}/resolve/") and path.rsplit("/", 1)[1] in self.hub.files:
            name = path.rsplit("/", 1)[1]
            content = self.hub.files[name]
            self.send_response(200)
            self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command == "GET":
                end = len(content) // 2 if self.hub.breaks == name else len(content)
                self.wfile.write(content[:end])
                self.close_connection = True
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

    def reply(self, value: Any) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def use(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    """As HF_ENDPOINT does, which is read when huggingface_hub is imported."""
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template.replace(constants.ENDPOINT, address))
    monkeypatch.setattr(constants, "ENDPOINT", address)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    fake = Hub({"config.json": b"{}", "model.safetensors": WEIGHTS, "pytorch_model.bin": b"x" * 1000})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("OfHub", (Handler,), {"hub": fake}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    fake.address = f"http://127.0.0.1:{server.server_port}"
    use(monkeypatch, fake.address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    yield fake
    server.shutdown()
    server.server_close()


def test_a_repository_is_fetched_once(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "models" / "a"
    download.download({folder: REPOSITORY})
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert (folder / "config.json").read_bytes() == b"{}"
    assert not (folder / "pytorch_model.bin").exists(), "a second copy of the weights"
    assert f"2 files, {len(WEIGHTS) / 1e9:.1f} GB" in capsys.readouterr().out
    hub.asked.clear()
    download.download({folder: REPOSITORY})
    assert hub.contents() == []
    assert "complete" in capsys.readouterr().out


def test_a_download_that_broke_off_goes_on_with_the_file_that_is_missing(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between huggingface_hub's tries
    hub.breaks = "model.safetensors"
    with pytest.raises(ConfigError, match=r"somebody/a-model: .*; run it again, it goes on from here"):
        download.download({tmp_path / "a": REPOSITORY})
    assert not (tmp_path / "a" / "model.safetensors").exists()
    hub.breaks = ""
    hub.asked.clear()
    download.download({tmp_path / "a": REPOSITORY})
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == WEIGHTS
    assert hub.contents() == ["model.safetensors"]


def test_a_file_of_the_users_is_not_replaced(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "config.json").write_text('{"mine": true}')
    with pytest.raises(ConfigError, match=r"has other files than somebody/a-model: config\.json; move them away"):
        download.download({tmp_path / "a": REPOSITORY})
    assert (tmp_path / "a" / "config.json").read_text() == '{"mine": true}'
    assert hub.contents() == []


def test_a_full_disk_is_found_before_the_first_byte(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two folders on one disk, each of which alone would fit."""
    usage = type("Usage", (), {"free": len(WEIGHTS) + 100})
    monkeypatch.setattr(download.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ConfigError, match=r"GB are free on the disk of .*b: make room"):
        download.download({tmp_path / "a": REPOSITORY, tmp_path / "b": REPOSITORY})
    assert hub.contents() == []
    download.download({tmp_path / "a": REPOSITORY})


def test_what_can_not_be_read_is_told(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"somebody/else: .*; check the name, the network \(HF_ENDPOINT"):
        download.plan(tmp_path, "somebody/else")
    hub.files.pop("model.safetensors")
    with pytest.raises(ConfigError, match="no weights as safetensors"):
        download.plan(tmp_path, REPOSITORY)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between huggingface_hub's tries
    use(monkeypatch, "http://127.0.0.1:9")
    with pytest.raises(ConfigError, match=r"somebody/a-model: .*; check the name, the network"):
        download.plan(tmp_path, REPOSITORY)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="HF_HUB_OFFLINE is set, so somebody/a-model can't be read"):
        download.plan(tmp_path, REPOSITORY)


def test_a_recipe_names_its_model_and_the_authors_judges() -> None:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        first, later, elsewhere = (
            download.folders(parse(compose("config", ["recipe=safework_72b", *more])))
            for more in ([], ["stage=rl_search"], ["rewards.servers.value.endpoints=[http://judge:8000]"])
        )
    judges = {
        Path("models/safework_safety_7b"): "AI45Research/SafeWork-RM-Safety-7B",
        Path("models/safework_value_72b"): "AI45Research/SafeWork-RM-Value-72B",
    }
    model = {Path("models/Qwen2.5-VL-72B-Instruct"): "Qwen/Qwen2.5-VL-72B-Instruct"}
    assert first == model | judges, "the third judge's folder is the model's"
    assert later.keys() <= first.keys()
    assert Path("models/safework_value_72b") not in elsewhere
