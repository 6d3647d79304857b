"""All that differs between vLLM on a CPU and on a GPU: the rest of rollout/ asks :func:`of` and never the device.

One :class:`VllmPlatform` for each device, at the end of this file. The file imports neither torch nor vLLM before a
function needs it, because the settings and the engines' owner read it too.
"""

import importlib
import inspect
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partialmethod
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

from megatron_ext.platform.features import processor_flags

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist

# vLLM's online FP8 of linear layers, by what has a scale: a weight, each output channel, each block of 128 x 128.
# Activations are FP8 too, with a scale for each token, or (for blocks) for each 128 neighbours in it.
QUANTIZATIONS = ("fp8_per_tensor", "fp8_per_channel", "fp8_per_block")

# vLLM's formats of the key-value cache: the weights', or E4M3 without scales, so that values above 448 become 448.
KV_CACHE_DTYPES = ("auto", "fp8")
# What vLLM's attention wants of a processor for the latter (``_get_attn_isa``); where there is AMX, there are these.
FP8_CACHE_INSTRUCTIONS = {"avx512f", "avx512bw", "avx512dq", "avx512vl"}

# Sequences. A larger step computes for longer than its kernels take to launch.
LARGEST_GRAPH = 512

SPIN_SECONDS = 0.002
RECHECK_SECONDS = 0.02


@dataclass(frozen=True)
class VllmPlatform:
    """What vLLM does differently on one kind of device, and what the weight sync does differently because of it."""

    name: str
    quantizations: tuple[str, ...]
    """Values of ``rollout.quantization`` that vLLM has there."""
    lacks_for_fp8_cache: Callable[[], list[str]]
    """Names the instructions that vLLM needs for ``rollout.kv_cache_dtype=fp8`` and this machine lacks."""
    engine_arguments: Mapping[str, Any]
    """Arguments of vLLM's ``EngineArgs`` that depend on the device."""
    graph_sizes: Callable[[int], list[int]]
    """``rollout.max_num_seqs`` → numbers of sequences whose decoding steps can be captured as CUDA graphs."""
    environment: Callable[[int, Sequence[int]], dict[str, str]]
    """(threads of a worker, the node's devices that the engine sees) → variables of the engine's process."""
    change_vllm: Callable[[], None]
    """Changes vLLM in this process: call it in the engine and its workers before a model is built. Repeated calls do
    nothing."""
    after_start: Callable[[], None]
    """Called in each worker once the engine has started."""
    transport: str
    """Module with ``share`` and ``attach``: memory of this device between processes of one host."""
    device_id: Callable[["torch.device"], str]
    """Names a device within its host, alike in all processes."""
    current_device: Callable[[], "torch.device"]
    """Where this process keeps its tensors."""
    network_group: Callable[["dist.ProcessGroup"], "dist.ProcessGroup"]
    """gloo group of all processes that sync → group over which packed weights cross the network. Collective."""
    synchronize_device: Callable[["torch.device"], None]
    """Waits for all kernels on the device."""
    synchronize_stream: Callable[["torch.device"], None]
    """Waits for the kernels on the current stream of the device."""
    copying_cores: Callable[[], int]
    """How many of this process's cores take part in copying weights into place."""
    in_host_memory: bool
    """Whether tensors are in the host's memory, so that the C library can copy them."""

    @property
    def splits_prompts(self) -> bool:
        """Whether vLLM prefills a long prompt in several steps (chunked prefill)."""
        return bool(self.engine_arguments["enable_chunked_prefill"])

    def load_transport(self) -> ModuleType:
        return importlib.import_module(self.transport)


def graph_arguments(sizes: Sequence[int], step_tokens: int = 1) -> dict[str, Any]:
    """Arguments of vLLM's ``EngineArgs`` with which an engine captures decoding steps of so many sequences, or none.

    vLLM's torch.compile stays off, so that a graph replays the kernels of an engine without graphs. ``step_tokens`` of
    a sequence are computed in a step at most. If it is more than one, sequences differ in them, and graphs serve every
    step that is small enough (with FlashAttention 3; vLLM has no such graphs with another attention).
    """
    if not sizes:
        return {"enforce_eager": True}
    without_compilation = 0
    graphs = {
        "mode": without_compilation,
        "cudagraph_mode": "FULL_DECODE_ONLY" if step_tokens == 1 else "FULL",
        "cudagraph_capture_sizes": [size * step_tokens for size in sizes],
    }
    return {"enforce_eager": False, "compilation_config": graphs}


def of(device: str) -> VllmPlatform:
    """The platform of a device type, by torch's name of it. Raises ValueError for one that is not supported."""
    if device not in PLATFORMS:
        raise ValueError(f"device={device!r}: not supported; use one of {', '.join(PLATFORMS)}")
    return PLATFORMS[device]


def of_vllm() -> VllmPlatform:
    """The platform that vLLM has chosen in this process."""
    from vllm.platforms import current_platform

    return of(current_platform.device_type)


def of_trainer() -> VllmPlatform:
    """The platform of the trainer's ranks, by the backend of their default process group."""
    import torch
    import torch.distributed as dist

    return CUDA if torch.cuda.is_available() and dist.get_backend() == "nccl" else CPU


# CPU: the engine's process


def _cpu_environment(threads: int, devices: Sequence[int]) -> dict[str, str]:
    return {
        "CUDA_VISIBLE_DEVICES": "",
        # The first call of a compiled function costs half a minute.
        "TORCH_COMPILE_DISABLE": "1",
        # The trainer shares the cores: with pinned threads a batch took 12 times as long.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": str(threads),
        # An idle engine then uses no core.
        "OMP_WAIT_POLICY": "PASSIVE",
        # A thread polls for a moment before it sleeps, because a small model's kernels follow each other closely, and
        # waking a thread takes longer. Generation takes 0.7 of the time. Beside a busy process it takes 1.2 times as
        # long, and with ten times the count 3 times.
        "GOMP_SPINCOUNT": "2000",
        # Copies of 32 KiB and more use non-temporal stores (1.4 times as fast: the weights do not fit into the caches)
        # into huge pages where the kernel gives them (0.9 of the time).
        "GLIBC_TUNABLES": f"glibc.cpu.x86_non_temporal_threshold={32 << 10}:glibc.malloc.hugetlb=1",
        # malloc keeps freed memory: each weight sync packs every linear layer again, and fresh pages for that took as
        # long as the packing.
        "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
        "MALLOC_TRIM_THRESHOLD_": str(1 << 30),
    }


def _unlink_shared_memory() -> None:
    """Remove the names of the shared memory through which tensor-parallel CPU workers reduce.

    All workers have mapped it by now. A name that is left outlives workers that are killed, and so does the memory.
    """
    if "VLLM_DIST_IDENT" in os.environ:
        for path in Path("/dev/shm").glob(os.environ["VLLM_DIST_IDENT"] + "*"):
            path.unlink(missing_ok=True)


@cache
def _change_vllm_on_cpu() -> None:
    keep_linear_weights()
    spin_less()
    mend_expansion()


def spin_less() -> None:
    """Shorten the busy waiting of vLLM's processes for a call or an answer: SPIN_SECONDS, then they sleep.

    vLLM's own second takes the cores from workers that still compute, and from the trainer. A message may fail to wake
    a sleeping process, because zmq drops a message that is sent within about a millisecond of another one. So a
    sleeping process looks again every RECHECK_SECONDS; vLLM's own 5 seconds showed as a pause in a batch.
    """
    from vllm.distributed.device_communicators import shm_broadcast

    condition = shm_broadcast.SpinCondition
    condition.__init__ = partialmethod(condition.__init__, busy_loop_s=SPIN_SECONDS)
    shm_broadcast.SHM_READER_RECHECK_INTERVAL_MS = int(1e3 * RECHECK_SECONDS)


def _no_graphs(sequences: int) -> list[int]:
    return []


def _cpu_lacks_for_fp8_cache() -> list[str]:
    return sorted(FP8_CACHE_INSTRUCTIONS - processor_flags(Path("/proc/cpuinfo").read_text()))


def mend_expansion() -> None:
    """Replace the function by which vLLM's rejection sampler repeats a sequence's temperature for each draft token.

    Of vLLM 0.32 it does nothing on a CPU: a C++ kernel for integers gets converted copies, and drafts are verified
    at the temperatures that happened to be in memory.
    """
    from vllm.v1.sample import rejection_sampler

    parameters = list(inspect.signature(rejection_sampler.expand_batch_to_tokens).parameters)
    if parameters != list(inspect.signature(expand_by_sequence).parameters):
        raise RuntimeError(
            f"vllm.v1.sample.rejection_sampler.expand_batch_to_tokens{tuple(parameters)} has changed: adapt "
            "rollout/vllm_platform.py to this vLLM"
        )
    rejection_sampler.expand_batch_to_tokens = expand_by_sequence


def expand_by_sequence(
    x: "torch.Tensor", cu_num_tokens: "torch.Tensor", num_tokens: int, replace_from: int = 0, replace_to: int = 0
) -> "torch.Tensor":
    """``x`` [sequences] with each value as often as its sequence has tokens, [num_tokens]; ``replace_from`` becomes
    ``replace_to``. ``cu_num_tokens`` [sequences] are the running sums of the tokens."""
    import torch

    counts = torch.diff(cu_num_tokens, prepend=cu_num_tokens.new_zeros(1))
    values = x.masked_fill(x == replace_from, replace_to)
    return values.repeat_interleave(counts, output_size=num_tokens)


# CPU: linear layers
#
# vLLM packs the weight of every linear layer into a oneDNN handle and drops (or, for the LM head, forgets) the weight.
# Here it keeps the weight, so that a sync can write it in place and pack it again with vLLM's own code: kernels, bits
# and speed are those of plain vLLM.

_packed_layers: list[Any] = []


@cache
def vllm_pack() -> Callable[..., None]:
    """vLLM's function that packs a linear layer, as it was before :func:`keep_linear_weights` replaced it.

    Raises RuntimeError when vLLM has changed its signature.
    """
    from vllm.model_executor.layers import utils

    pack = utils.dispatch_cpu_unquantized_gemm
    parameters = list(inspect.signature(pack).parameters)
    if parameters != ["layer", "remove_weight"]:
        raise RuntimeError(
            f"vllm.model_executor.layers.utils.dispatch_cpu_unquantized_gemm{tuple(parameters)} has changed: adapt "
            "rollout/vllm_platform.py to this vLLM"
        )
    return pack


def keep_linear_weights() -> None:
    """Replace vLLM's packing of linear layers by one that keeps the weights.

    Should vLLM pack a weight elsewhere, :func:`rollout.weight_sync.vllm_layout.weight_tensors` refuses the model.
    """
    from vllm.model_executor.layers import utils

    vllm_pack()
    utils.dispatch_cpu_unquantized_gemm = _pack_new_layer


def _pack_new_layer(layer: Any, remove_weight: bool) -> None:
    if layer.weight.ndim != 2:
        raise RuntimeError(f"{type(layer).__name__}: on a CPU the weight sync supports 2-D linear weights only")
    _packed_layers.append(layer)
    pack_layer(layer)


def pack_layers() -> float:
    """Pack all linear layers again from their present weights; returns the seconds that it took.

    Does nothing on a GPU, whose kernels read the weight itself.
    """
    started = time.perf_counter()
    for layer in _packed_layers:
        pack_layer(layer)
    return time.perf_counter() - started


def pack_layer(layer: Any) -> None:
    """Have vLLM prepare its kernel for ``layer`` from the present weight. The layer's own tensors stay as they are."""
    bias = getattr(layer, "bias", None)
    # vLLM gets copies, because it writes into its arguments: some kernels convert the bias in place.
    bias_copy = None if bias is None else bias.detach().clone()
    packed = SimpleNamespace(weight=rows_apart_in_cache(layer.weight), bias=bias_copy)
    vllm_pack()(packed, remove_weight=False)
    # The kernel's handle has a copy of its own.
    del packed.weight

    def cpu_linear(x: "torch.Tensor", weight: "torch.Tensor", bias: "torch.Tensor | None") -> "torch.Tensor":
        return packed.cpu_linear(x, weight, None if bias is None else packed.bias)

    layer.__dict__["cpu_linear"] = cpu_linear


def rows_apart_in_cache(weight: "torch.Tensor") -> "torch.Tensor":
    """``weight`` [out, in], or a copy with a longer stride between rows where that makes the packing faster.

    oneDNN packs column by column. Rows whose length is a multiple of 2 KiB map to few sets of the cache, and packing
    from them takes twice as long as packing from this copy (BF16).
    """
    import torch
    from vllm.model_executor.layers import utils

    rows, width = weight.shape
    itemsize = weight.element_size()
    spread_over_cache = weight.stride(0) * itemsize % 2048 != 0
    # vLLM packs small BF16 weights with another kernel (AMX), row by row.
    packed_by_row = utils.check_cpu_sgl_kernel(rows, width, weight.dtype)
    if spread_over_cache or weight.dtype == torch.float32 or packed_by_row:
        return weight
    one_cache_line = 64 // itemsize
    return weight.new_empty(rows, width + one_cache_line)[:, :width].copy_(weight)


# CPU: the weight sync


def _cpu_device_id(device: "torch.device") -> str:
    return "0"


def _cpu_device() -> "torch.device":
    import torch

    return torch.device("cpu")


def _same_group(group: "dist.ProcessGroup") -> "dist.ProcessGroup":
    return group


def _nothing_to_wait_for(device: "torch.device") -> None:
    """Operations on a CPU have ended when they return."""


def _all_cores() -> int:
    return len(os.sched_getaffinity(0))


# GPU


# vLLM's sums over 4 to 8 workers in NVLink's switch (multimem), whose bits may differ from call to call. Its own mode
# of fixed bits, VLLM_BATCH_INVARIANT, turns them off too. NCCL's (NCCL_NVLS_ENABLE) are the site's to set, for the
# trainer as well: processes that share a communicator must agree.
SUMS_IN_THE_SWITCH = "VLLM_ALLREDUCE_USE_SYMM_MEM"


def _cuda_environment(threads: int, devices: Sequence[int]) -> dict[str, str]:
    environment = {SUMS_IN_THE_SWITCH: os.environ.get(SUMS_IN_THE_SWITCH, "0")}
    if not devices:
        return environment
    all_devices = ",".join(str(index) for index in range(len(devices)))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", all_devices).split(",")
    return environment | {"CUDA_VISIBLE_DEVICES": ",".join(visible[index] for index in devices)}


def decoding_graph_sizes(sequences: int) -> list[int]:
    """vLLM's own choice: 1, 2, 4, multiples of 8, from 256 on of 16, and ``sequences``; none above LARGEST_GRAPH. A
    step with fewer sequences takes the next larger graph."""
    largest = min(sequences, LARGEST_GRAPH)
    sizes = {1, 2, 4, *range(8, 256, 8), *range(256, largest, 16), largest}
    return sorted(size for size in sizes if size <= largest)


def _gpu_lacks_nothing() -> list[str]:
    """The preflight knows which GPUs have FP8."""
    return []


def _do_nothing() -> None:
    pass


def _cuda_device_id(device: "torch.device") -> str:
    from rollout.weight_sync import cuda_ipc

    return cuda_ipc.uuid(device.index)


def _cuda_device() -> "torch.device":
    import torch

    return torch.device("cuda", torch.cuda.current_device())


def _nccl_group(group: "dist.ProcessGroup") -> "dist.ProcessGroup":
    import torch
    import torch.distributed as dist

    from megatron_ext import worlds

    nccl_group = worlds.like(group, "nccl")
    # The first operation of a group connects all its ranks. A round of the weight sync would wait for ever then,
    # because ranks without a message in it call nothing.
    dist.all_reduce(torch.zeros(1, device=_cuda_device()), group=nccl_group)
    return nccl_group


def _synchronize_cuda(device: "torch.device") -> None:
    import torch

    torch.cuda.synchronize(device)


def _synchronize_cuda_stream(device: "torch.device") -> None:
    import torch

    torch.cuda.current_stream(device).synchronize()


def _one_core() -> int:
    return 1


CPU = VllmPlatform(
    name="cpu",
    quantizations=("fp8_per_channel",),
    lacks_for_fp8_cache=_cpu_lacks_for_fp8_cache,
    engine_arguments={
        # vLLM 0.32 fails when it splits the prompt of a request that has a seed: it would rewind the request's
        # generator, which a CPU generator can't.
        "enable_chunked_prefill": False,
        # A group's samples share complete blocks of their prompt. vLLM's default of 128 tokens is longer than many
        # prompts; with 32 a batch of 8 x 8 samples of 75 + 32 tokens took 0.71 of the time (135M, one core).
        "block_size": 32,
    },
    graph_sizes=_no_graphs,
    environment=_cpu_environment,
    change_vllm=_change_vllm_on_cpu,
    after_start=_unlink_shared_memory,
    transport="rollout.weight_sync.shared_memory",
    device_id=_cpu_device_id,
    current_device=_cpu_device,
    network_group=_same_group,
    synchronize_device=_nothing_to_wait_for,
    synchronize_stream=_nothing_to_wait_for,
    copying_cores=_all_cores,
    in_host_memory=True,
)

CUDA = VllmPlatform(
    name="cuda",
    quantizations=QUANTIZATIONS,
    lacks_for_fp8_cache=_gpu_lacks_nothing,
    engine_arguments={"enable_chunked_prefill": True},
    graph_sizes=decoding_graph_sizes,
    environment=_cuda_environment,
    change_vllm=_do_nothing,
    after_start=_do_nothing,
    transport="rollout.weight_sync.cuda_ipc",
    device_id=_cuda_device_id,
    current_device=_cuda_device,
    network_group=_nccl_group,
    synchronize_device=_synchronize_cuda,
    synchronize_stream=_synchronize_cuda_stream,
    copying_cores=_one_core,
    in_host_memory=False,
)

PLATFORMS = {platform.name: platform for platform in (CPU, CUDA)}
