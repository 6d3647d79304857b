"""What a judge's server asks of `vllm serve` in vLLM's GPU build: arguments, variables, paths, fields of JSON.

The sources are those of ``tests.test_vllm_contract``, whose digests are the pinned GPU wheel's.
"""

import ast
import inspect
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from omegaconf import OmegaConf

from rewards import client, settings, token_guard
from rewards.serve import JudgeServer
from rewards.settings import Server
from rewards.verifiers import judges
from rewards.verifiers.templates import TEMPLATES
from tests.settings import CONF
from tests.test_vllm_contract import ROOT, fields, fields_of_module, function, method, refused, the_class, tree

ARGUMENTS = "vllm/engine/arg_utils.py"
FRONTEND = "vllm/entrypoints/launchers/cli_args.py"
CHAT = "vllm/entrypoints/openai/chat_completion/protocol.py"
POOLING = "vllm/entrypoints/pooling/pooling/protocol.py"
POOLING_BASE = "vllm/entrypoints/pooling/base/protocol.py"
# Path → the file with its route, and the HTTP method by which we ask.
ROUTES = {
    "/health": ("vllm/entrypoints/serve/instrumentator/health.py", "get"),
    "/v1/models": ("vllm/entrypoints/openai/models/api_router.py", "get"),
    judges.CHAT_PATH: ("vllm/entrypoints/openai/chat_completion/api_router.py", "post"),
    judges.POOLING_PATH: ("vllm/entrypoints/pooling/pooling/api_router.py", "post"),
    urlsplit(client.SLEEP_PATH).path: ("vllm/entrypoints/serve/dev/sleep/api_router.py", "post"),
    urlsplit(client.WAKE_PATH).path: ("vllm/entrypoints/serve/dev/sleep/api_router.py", "post"),
}


def annotations(file: str, class_name: str) -> dict[str, str]:
    body = the_class(file, class_name).body
    return {ast.unparse(n.target): ast.unparse(n.annotation) for n in body if isinstance(n, ast.AnnAssign)}


def literal(file: str, name: str) -> tuple[str, ...]:
    """The values of ``name = Literal[…]``."""
    (assignment,) = (n for n in tree(file).body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == name)
    assert isinstance(assignment.value, ast.Subscript) and ast.unparse(assignment.value.value) == "Literal"
    values: tuple[str, ...] = ast.literal_eval(assignment.value.slice)
    return values


def options() -> dict[str, bool]:
    """The options of `vllm serve` → whether a value follows. vLLM makes them of fields. A bool is a flag, and has
    a second one that begins with "--no-"."""
    flags = ("bool", "bool | None")
    takes_value = {}
    for class_name in ("BaseFrontendArgs", "FrontendArgs"):
        for name, kind in annotations(FRONTEND, class_name).items():
            takes_value["--" + name.replace("_", "-")] = kind not in flags
    kinds = annotations(ARGUMENTS, "EngineArgs")
    for call in ast.walk(the_class(ARGUMENTS, "EngineArgs")):
        if isinstance(call, ast.Call) and ast.unparse(call.func).endswith("_group.add_argument"):
            names = [word.value for word in call.args if isinstance(word, ast.Constant)]
            long = [name for name in names if name.startswith("--")]
            for name in long:
                takes_value[name] = kinds.get(name.removeprefix("--").replace("-", "_")) not in flags
    negated = {name.replace("--", "--no-", 1): False for name, has_value in takes_value.items() if not has_value}
    return takes_value | negated


def server(arguments: list[str], runner: str, key_variable: str | None) -> Server:
    return Server("models/judge", None, runner, [], key_variable, "127.0.0.1", 8100, 1, 8, arguments, "judge")


def shipped_arguments() -> list[list[str]]:
    """``arguments`` of all servers in conf/."""
    arguments = []

    def look(value: Any, under: tuple[str, ...]) -> None:
        if isinstance(value, Mapping):
            for name, inner in value.items():
                look(inner, (*under, str(name)))
        elif under[-1] == "arguments" and any("server" in name for name in under):
            arguments.append([str(word) for word in value])

    for file in CONF.rglob("*.yaml"):
        look(OmegaConf.to_container(OmegaConf.load(file), resolve=False), (str(file),))
    return arguments


def faults(command: list[str]) -> list[str]:
    """What vLLM's parser would not take: `serve MODEL`, and then options, each with one value or none."""
    known = options()
    assert command[0] == "serve" and not command[1].startswith("-")
    problems = []
    rest = command[2:]
    while rest:
        option, *rest = rest
        name, _, value = option.partition("=")
        if name not in known:
            problems.append(f"no option {name}")
        elif not value and known[name] == (not rest or rest[0].startswith("--")):
            problems.append(f"{name} {'lacks a value' if known[name] else 'takes no value'}")
        if rest and not rest[0].startswith("--"):
            rest = rest[1:]
    return problems


@pytest.mark.parametrize("platform", ["cuda", "cpu"])
@pytest.mark.parametrize("runner", settings.RUNNERS)
def test_vllm_serve_takes_the_command(runner: str, platform: str, tmp_path: Path) -> None:
    """Also with all arguments in conf/, and the share of a GPU that docs/layouts.md gives to each of several judges."""
    shipped = shipped_arguments()
    assert ["--max-model-len", "512"] in shipped
    devices = range(8) if platform == "cuda" else None
    cpu_arguments = OmegaConf.load(CONF / "rewards" / "base.yaml").supervisor.cpu_arguments
    for arguments in [*shipped, ["--gpu-memory-utilization", "0.25"]]:
        judge = JudgeServer(server(arguments, runner, "TOKEN"), 0, tmp_path, devices, cpu_arguments, sleeps=True)
        command = judge.command()
        assert faults(command) == []
        assert ("--enable-sleep-mode" in command) == (platform == "cuda"), "vLLM refuses it on a CPU"
        # It takes all words up to the next option.
        assert command[command.index("--served-model-name") + 2].startswith("--")
    assert set(settings.RUNNERS) <= set(literal("vllm/config/scheduler.py", "RunnerType"))
    assert settings.OWN_ARGUMENTS.keys() <= options().keys()


def test_a_command_that_does_not_fit_is_found() -> None:
    assert faults(["serve", "model", "--port", "8000", "--enforce-eager", "--dtype=float32"]) == []
    assert faults(["serve", "model", "--ports", "8000"]) == ["no option --ports"]
    assert faults(["serve", "model", "--port", "--enforce-eager"]) == ["--port lacks a value"]
    assert faults(["serve", "model", "--enforce-eager", "1"]) == ["--enforce-eager takes no value"]


def test_our_process_calls_the_command_as_vllm_does() -> None:
    """``rewards.vllm_process``: one command of that name, and each of its methods."""
    ours = ast.parse((ROOT / "rewards" / "vllm_process.py").read_text())
    file = "vllm/entrypoints/cli/serve.py"
    called = {}
    for node in ast.walk(ours):
        if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("command."):
            name = ast.unparse(node.func).removeprefix("command.")
            called[name] = refused(method(file, "ServeSubcommand", name), len(node.args), set())
    assert called == {"subparser_init": [], "validate": [], "cmd": []}
    assert ast.unparse(function(file, "cmd_init").body[-1]) == "return [ServeSubcommand()]"
    names = {ast.unparse(n) for n in the_class(file, "ServeSubcommand").body}
    assert "name = 'serve'" in names
    # It leaves what is set as it is: children are spawned, each imports our module and ends with its parent.
    setup = ast.unparse(function("vllm/entrypoints/serve/utils/api_utils.py", "cli_env_setup"))
    assert "if 'VLLM_WORKER_MULTIPROC_METHOD' not in os.environ" in setup


def test_variables_of_a_server_are_vllms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKEN", "secret")
    for name in [name for name in os.environ if name.startswith("VLLM_")]:
        monkeypatch.delenv(name)
    ours: set[str] = set()
    for devices in (range(8), None):
        judge = JudgeServer(server([], "generate", "TOKEN"), 0, tmp_path, devices, [], sleeps=True)
        ours |= {name for name in judge.environment() if name.startswith("VLLM_")}
    assert {"VLLM_API_KEY", "VLLM_SERVER_DEV_MODE", "VLLM_WORKER_MULTIPROC_METHOD"} <= ours
    assert ours <= fields_of_module("vllm/envs.py")
    # Without it there is no /sleep.
    routers = ast.unparse(function("vllm/entrypoints/launchers/api_server/routers.py", "register_api_routers"))
    assert (
        "if envs.VLLM_SERVER_DEV_MODE:\n        from vllm.entrypoints.serve import register_vllm_dev_api_routers"
        in (routers)
    )
    development = ast.unparse(function("vllm/entrypoints/serve/__init__.py", "register_vllm_dev_api_routers"))
    assert "attach_sleep_router(app)" in development
    registered = ast.unparse(function("vllm/entrypoints/serve/middleware/register.py", "init_entrypoints_middleware"))
    assert "args.api_key or [envs.VLLM_API_KEY]" in registered


def test_vllm_has_the_paths_that_we_ask() -> None:
    asked = {
        str(node.value).partition("?")[0]
        for file in ("rewards/client.py", "rewards/serve.py", "rewards/verifiers/judges.py")
        for node in ast.walk(ast.parse((ROOT / file).read_text()))
        if isinstance(node, ast.Constant) and re.match(r"/\w", str(node.value))
    }
    assert asked == ROUTES.keys()
    for path, (file, http_method) in ROUTES.items():
        routes = [
            decorator.args[0].value
            for n in tree(file).body
            if isinstance(n, ast.AsyncFunctionDef)
            for decorator in n.decorator_list
            if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == f"router.{http_method}"
            if isinstance(decorator.args[0], ast.Constant)
        ]
        assert path in routes


def test_sleep_and_wake_do_what_we_ask_of_them() -> None:
    """Level 1 keeps the weights on the host; ``wait`` finishes what runs; /wake_up without tags wakes all."""
    file = "vllm/entrypoints/serve/dev/sleep/api_router.py"
    asked = parse_qs(urlsplit(client.SLEEP_PATH).query)
    arguments = function(file, "sleep").args.args
    assert {argument.arg for argument in arguments} - {"raw_request"} == asked.keys() == {"level", "mode"}
    assert set(asked["mode"]) <= set(literal("vllm/v1/engine/__init__.py", "PauseMode"))
    assert "sleep(level, mode)" in ast.unparse(function(file, "sleep"))
    way = [
        method("vllm/v1/engine/async_llm.py", "AsyncLLM", "sleep"),
        method("vllm/v1/engine/core_client.py", "AsyncMPClient", "sleep_async"),
        method("vllm/v1/engine/core.py", "EngineCore", "sleep"),
    ]
    assert [refused(each, 2, set()) for each in way] == [[], [], []]
    assert "sleep_async(level, mode)" in ast.unparse(way[0]) and "('sleep', level, mode)" in ast.unparse(way[1])
    suspend = ast.unparse(method("vllm/device_allocator/sleep_mode_backend.py", "CuMemBackend", "suspend"))
    assert "if level == 1:\n        offload_tags = ('weights', *offload_tags)" in suspend
    assert asked["level"] == ["1"]
    assert urlsplit(client.WAKE_PATH).query == ""
    assert "if tags == []:\n        tags = None" in ast.unparse(function(file, "wake_up"))


def test_requests_are_vllms_and_replies_have_what_we_read() -> None:
    row = {"id": "r", "prompt": "q", "answer": "a"}
    requests = [template.request(row, "a", "model") for template in TEMPLATES.values()]
    chats = [request for request in requests if request.path == judges.CHAT_PATH]
    sent = {name for chat in chats for name in (*chat.body, *chat.retry_fields)} | {"seed"}
    assert {"top_logprobs", "temperature"} <= sent <= fields(CHAT, "ChatCompletionRequest")
    assert {"content"} <= fields(CHAT, "ChatMessage")
    assert {"message", "logprobs"} <= fields(CHAT, "ChatCompletionResponseChoice")
    assert "top_logprobs" in fields(CHAT, "ChatCompletionLogProbsContent")
    assert {"token", "logprob"} <= fields(CHAT, "ChatCompletionLogProb")
    assert "choices" in fields(CHAT, "ChatCompletionResponse")
    model_config = ast.unparse(the_class("vllm/config/model.py", "ModelConfig"))
    assert f"max_logprobs: int = Field(default={judges.TOP_TOKENS}, ge=-1)" in model_config

    (pooling,) = (request.body for request in requests if request.path == judges.POOLING_PATH)
    bases = [ast.unparse(base) for base in the_class(POOLING, "PoolingChatRequest").bases]
    known = {name for base in bases for name in fields(POOLING_BASE, base)} | fields(POOLING, "PoolingChatRequest")
    assert pooling.keys() <= known
    assert pooling["task"] in literal("vllm/tasks.py", "PoolingTask")
    # The first member of the union with these fields takes the request.
    assert "input" in fields(POOLING_BASE, "CompletionRequestMixin") and "input" not in pooling
    assert "data" in fields(POOLING, "PoolingResponse") & fields(POOLING, "PoolingResponseData")

    cards = "vllm/entrypoints/serve/engine/protocol.py"
    assert "data" in fields(cards, "ModelList") and "id" in fields(cards, "ModelCard")


def test_the_token_guard_is_a_middleware_and_guards_what_vllm_does_not() -> None:
    module, _, name = "rewards.token_guard.require_token".rpartition(".")
    command = JudgeServer(server([], "generate", "TOKEN"), 0, Path(), None, []).command()
    assert f"{module}.{name}" == command[command.index("--middleware") + 1]
    assert module == token_guard.__name__ and inspect.iscoroutinefunction(getattr(token_guard, name))
    registered = ast.unparse(function("vllm/entrypoints/serve/middleware/register.py", "init_entrypoints_middleware"))
    assert "elif inspect.iscoroutinefunction(imported):\n            app.middleware('http')(imported)" in registered
    (guarded,) = (
        ast.literal_eval(n.value)
        for n in tree("vllm/entrypoints/serve/middleware/authenticate.py").body
        if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "GUARDED_PREFIX"
    )
    assert judges.CHAT_PATH.startswith(guarded) and not judges.POOLING_PATH.startswith(guarded)
