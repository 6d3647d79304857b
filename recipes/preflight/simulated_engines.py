"""Simulate the workers of a vLLM engine on one machine without GPUs, from a ``config.json`` alone.

``python -m recipes.preflight.simulated_engines MODEL_FOLDER DTYPE TENSOR PIPELINE OUTPUT.json < SHAPES.json`` reads the
checkpoint's tensors ``{name: shape}``. It writes the ``workers`` of the answer that such an engine gives to
``/weights/layout``.

vLLM's model class is built for one worker after another. torch's "fake" process groups give the process the rank of the
worker. Parameters are on torch's "meta" device, where they have a shape and no memory. The process can't do anything
else afterwards.
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
    """The layouts of the parameters of every worker of one engine, traced in a separate process.

    Workers are in vLLM's order of ranks: the tensor-parallel rank varies fastest.

    Args:
        model_folder: needs a ``config.json`` and no weights.
        dtype: vLLM's name of the weights' dtype.
        tensor: tensor-parallel size of the engine.
        pipeline: pipeline-parallel size of the engine.
        hf_shapes: name → shape of the checkpoint's tensors (``simulated_ranks.checkpoint_tensors``).

    Raises:
        LayoutError: vLLM refuses the layout, or a parameter can't be traced. The message has the end of the process's
            output.
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
    """Make this process simulate vLLM workers."""
    from torch.testing._internal.distributed import fake_pg  # noqa: F401  registers the backend "fake"
    from vllm.distributed import parallel_state
    from vllm.model_executor.models import registry

    new_group = dist.new_group
    coordinator = parallel_state.GroupCoordinator

    def fake_group(ranks: list[int], **options: Any) -> dist.ProcessGroup:
        return new_group(ranks, backend="fake")

    def group(group_ranks: Any, local_rank: int, *unused: Any, group_name: str, **options: Any) -> Any:
        """A group without shared memory, message queue and communicator, all of which would wait for other workers."""
        return coordinator(group_ranks, local_rank, "fake", use_device_communicator=False, group_name=group_name)

    dist.new_group = fake_group  # type: ignore[assignment]
    parallel_state.init_model_parallel_group = group
    # vLLM inspects model classes in another process, so that this one does not initialise CUDA.
    registry._run_in_subprocess = lambda function: function()


def engine_config(model_folder: Path | str, dtype: str, tensor: int, pipeline: int) -> Any:
    """vLLM's configuration of an engine. Only the settings that its parameters depend on are set."""
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
    """vLLM's model of worker ``rank`` of the engine, with empty parameters on ``device``. Needs :func:`activate`."""
    from torch.testing._internal.distributed.fake_pg import FakeStore
    from vllm.config import set_current_vllm_config
    from vllm.distributed import parallel_state
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    sizes = config.parallel_config
    # The context has the attention layers of the previous worker.
    config.compilation_config.static_forward_context.clear()
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
        # torch's hook would prefix every line with "[rank]", once for each group that there was.
        sys.excepthook = sys.__excepthook__


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
    traced = trace(engine_config(model_folder, dtype, int(tensor), int(pipeline)), hf_shapes)
    workers = [[asdict(layout) for layout in worker] for worker in traced]
    Path(output).write_text(json.dumps({"workers": workers}))


if __name__ == "__main__":
    main(*sys.argv[1:])
