"""Any vLLM layout on one machine without GPUs: what each worker's parameters are made of, from a ``config.json`` alone.

``python -m recipes.preflight.simulated_engines MODEL_FOLDER DTYPE TENSOR PIPELINE OUTPUT.json < SHAPES.json`` with the
checkpoint's tensors ``{name: shape}`` writes the ``workers`` of what such an engine answers to ``/weights/layout``.

vLLM's own model class is built for one worker after another: torch's "fake" process groups say which worker it is, and
on torch's meta device a parameter has a shape and no memory. Both spoil a process for anything else.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from rollout import chat_layout
from rollout.weight_sync.layout import Index, LayoutError, ParameterLayout
from rollout.weight_sync.vllm_layout import trace_layout

META = torch.device("meta")
TIMEOUT_SECONDS = 600
ROOT = Path(__file__).resolve().parents[2]


def layouts(
    model_folder: Path | str, dtype: str, tensor: int, pipeline: int, hf_shapes: Mapping[str, Index]
) -> list[list[ParameterLayout]]:
    """Of every worker of one engine, in vLLM's rank order: tensor-parallel ranks run fastest.

    ``model_folder`` needs a ``config.json`` and no weights; ``hf_shapes`` are the checkpoint's tensors (see
    ``recipes.preflight.simulated_ranks.checkpoint_tensors``). Takes a process of its own. Raises LayoutError with the
    end of its     output when vLLM refuses the layout or a parameter can't be traced.
    """
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "layouts.json")
        arguments = (str(Path(model_folder).resolve()), dtype, str(tensor), str(pipeline), str(output))
        done = subprocess.run(
            [sys.executable, "-m", "recipes.preflight.simulated_engines", *arguments],
            input=json.dumps(dict(hf_shapes)),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=TIMEOUT_SECONDS,
        )
        if done.returncode:
            raise LayoutError(f"{model_folder} in vLLM at TP {tensor}, PP {pipeline}: …{done.stdout[-2000:]}")
        workers = json.loads(output.read_text())["workers"]
    return [[ParameterLayout.from_json(parameter) for parameter in worker] for worker in workers]


def activate() -> None:
    """Make this process simulate vLLM workers, from now on."""
    from torch.testing._internal.distributed import fake_pg  # noqa: F401  registers the backend "fake"
    from vllm.distributed import parallel_state
    from vllm.model_executor.models import registry

    new_group, coordinator = dist.new_group, parallel_state.GroupCoordinator

    def fake_group(ranks: list[int], **options: Any) -> dist.ProcessGroup:
        return new_group(ranks, backend="fake")

    def group(group_ranks: Any, local_rank: int, *unused: Any, group_name: str, **options: Any) -> Any:
        """Ranks alone: no shared memory, no message queue, no communicator, which would wait for the others."""
        return coordinator(group_ranks, local_rank, "fake", use_device_communicator=False, group_name=group_name)

    dist.new_group = fake_group  # type: ignore[assignment]
    parallel_state.init_model_parallel_group = group
    # vLLM looks at model classes in another process to keep this one clean of CUDA.
    registry._run_in_subprocess = lambda function: function()


def engine_config(model_folder: Path | str, dtype: str, tensor: int, pipeline: int) -> Any:
    """vLLM's configuration of an engine, as far as its parameters depend on it."""
    from vllm import EngineArgs

    chat_layout.register()
    arguments = EngineArgs(
        model=str(model_folder),
        skip_tokenizer_init=True,
        load_format="dummy",
        dtype=dtype,
        tensor_parallel_size=tensor,
        pipeline_parallel_size=pipeline,
        max_model_len=64,
        enforce_eager=True,
    )
    return arguments.create_engine_config()


@contextmanager
def worker(config: Any, rank: int, device: torch.device) -> Iterator[torch.nn.Module]:
    """vLLM's model of worker ``rank`` of the engine, its parameters empty on ``device``. Needs :func:`activate`."""
    from torch.testing._internal.distributed.fake_pg import FakeStore
    from vllm.config import set_current_vllm_config
    from vllm.distributed import parallel_state
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    sizes = config.parallel_config
    config.compilation_config.static_forward_context.clear()  # the attention layers of the worker before
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=sizes.world_size)
    try:
        with set_current_vllm_config(config):
            ranks = list(range(sizes.world_size))
            parallel_state._WORLD = parallel_state.init_world_group(ranks, rank, "fake")
            parallel_state._NODE_COUNT = 1
            parallel_state.initialize_model_parallel(sizes.tensor_parallel_size, sizes.pipeline_parallel_size)
            with set_default_torch_dtype(config.model_config.dtype), device:
                model = initialize_model(config)
            yield model
    finally:
        parallel_state.destroy_model_parallel()
        parallel_state.destroy_distributed_environment()
        sys.excepthook = sys.__excepthook__  # torch's adds "[rank]" to every line, once for every group that there was


def trace(config: Any, hf_shapes: Mapping[str, Index]) -> list[list[ParameterLayout]]:
    """:func:`layouts` in this process. Needs :func:`activate`."""
    traced = []
    for rank in range(config.parallel_config.world_size):
        with worker(config, rank, META) as model:
            traced.append(trace_layout(model, hf_shapes))
    return traced


def main(model_folder: str, dtype: str, tensor: str, pipeline: str, output: str) -> None:
    hf_shapes = {name: tuple(shape) for name, shape in json.load(sys.stdin).items()}
    activate()
    found = trace(engine_config(model_folder, dtype, int(tensor), int(pipeline)), hf_shapes)
    Path(output).write_text(json.dumps({"workers": [[asdict(layout) for layout in worker] for worker in found]}))


if __name__ == "__main__":
    main(*sys.argv[1:])
