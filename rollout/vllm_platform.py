"""All differences between vLLM on a CPU and vLLM on a GPU.

The rest of rollout/ calls :func:`of` and never branches on the device. There is one :class:`VllmPlatform` for each
device, at the end of this file. The module imports torch and vLLM only inside the functions that need them, because the
settings and the process that owns the engines import it too.
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

# vLLM's online FP8 quantisation of linear layers. A weight has one scale for the tensor, one for each output channel,
# or one for each block of 128 x 128. Activations are FP8 too, with one scale for each token, or, with blocks, one for
# each 128 neighbouring elements of a token.
QUANTIZATIONS = ("fp8_per_tensor", "fp8_per_channel", "fp8_per_block")

# vLLM's formats of the KV cache. "auto" is the dtype of the weights. "fp8" is E4M3 without scales, so values above 448
# become 448.
KV_CACHE_DTYPES = ("auto", "fp8")
# The processor instructions that vLLM's attention needs for an FP8 cache (``_get_attn_isa``). A processor with AMX has
# all of them.
FP8_CACHE_INSTRUCTIONS = {"avx512f", "avx512bw", "avx512dq", "avx512vl"}

# The largest number of sequences in a CUDA graph. The kernels of a larger step run longer than they take to launch.
LARGEST_GRAPH = 512

SPIN_SECONDS = 0.002
RECHECK_SECONDS = 0.02


@dataclass(frozen=True)
class VllmPlatform:
    """What is particular to one kind of device, in vLLM and therefore in the weight sync."""

    name: str
    quantizations: tuple[str, ...]
    """The values of ``rollout.quantization`` that vLLM supports on this device."""
    lacks_for_fp8_cache: Callable[[], list[str]]
    """Returns the names of the instructions that vLLM needs for ``rollout.kv_cache_dtype=fp8`` and that this machine
    lacks."""
    engine_arguments: Mapping[str, Any]
    """Arguments of vLLM's ``EngineArgs`` that depend on the device."""
    graph_sizes: Callable[[int], list[int]]
    """``rollout.max_num_seqs`` → the batch sizes (in sequences) whose decoding steps are captured as CUDA graphs."""
    environment: Callable[[int, Sequence[int]], dict[str, str]]
    """(threads of a worker, the node's devices that the engine sees) → environment variables of the engine process."""
    change_vllm: Callable[[], None]
    """Patches vLLM in this process. Call it in the engine and in its workers before a model is built. Repeated calls
    do nothing."""
    after_start: Callable[[], None]
    """Called in each worker once the engine has started."""
    transport: str
    """The module whose ``share`` and ``attach`` share memory of this device between the processes of a host."""
    device_id: Callable[["torch.device"], str]
    """Returns an id of a device that is unique on its host and the same in all processes."""
    current_device: Callable[[], "torch.device"]
    """Returns the device on which this process keeps its tensors."""
    network_group: Callable[["dist.ProcessGroup"], "dist.ProcessGroup"]
    """Collective: gloo group of all ranks of the weight sync → group over which packed weights cross the network."""
    synchronize_device: Callable[["torch.device"], None]
    """Waits for all kernels on the device."""
    synchronize_stream: Callable[["torch.device"], None]
    """Waits for the kernels on the current stream of the device."""
    copying_cores: Callable[[], int]
    """Returns how many of the process's cores copy weights into vLLM's parameters."""
    in_host_memory: bool
    """Whether tensors are in host memory, so that the C library can copy them."""

    @property
    def splits_prompts(self) -> bool:
        """Whether vLLM prefills a long prompt in several steps (chunked prefill)."""
        return bool(self.engine_arguments["enable_chunked_prefill"])

    def load_transport(self) -> ModuleType:
        return importlib.import_module(self.transport)


def graph_arguments(sizes: Sequence[int], step_tokens: int = 1) -> dict[str, Any]:
    """Return the arguments of vLLM's ``EngineArgs`` that select which decoding steps are captured as CUDA graphs.

    ``sizes`` are numbers of sequences; if there are none, no graph is captured. vLLM's torch.compile stays off, so that
    a graph replays the same kernels that an engine without graphs runs.

    A step computes at most ``step_tokens`` tokens of a sequence. If that is more than one, the number differs between
    sequences, and graphs serve every step that is small enough. This needs FlashAttention 3: vLLM has no such graphs
    with another attention.
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
    """Return the platform of a device type, given by its name in torch. Raises ValueError for an unsupported one."""
    if device not in PLATFORMS:
        raise ValueError(f"device={device!r}: not supported; use one of {', '.join(PLATFORMS)}")
    return PLATFORMS[device]


def of_vllm() -> VllmPlatform:
    """Return the platform that vLLM has chosen in this process."""
    from vllm.platforms import current_platform

    return of(current_platform.device_type)


def of_trainer() -> VllmPlatform:
    """Return the platform of the trainer's ranks: CUDA if a GPU is available and the default group's backend is
    NCCL."""
    import torch
    import torch.distributed as dist

    return CUDA if torch.cuda.is_available() and dist.get_backend() == "nccl" else CPU


# CPU: the engine's process


def _cpu_environment(threads: int, devices: Sequence[int]) -> dict[str, str]:
    return {
        "CUDA_VISIBLE_DEVICES": "",
        # The first call of a compiled function takes half a minute.
        "TORCH_COMPILE_DISABLE": "1",
        # Threads are not pinned, because the engine shares the cores with the trainer. With pinned threads a batch took
        # 12 times as long.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": str(threads),
        # With this policy an idle engine uses no core.
        "OMP_WAIT_POLICY": "PASSIVE",
        # A thread polls for a short time before it sleeps. The kernels of a small model follow each other in less time
        # than it takes to wake a thread. With this count, generation takes 0.7 of the time on idle cores, and 1.2 times
        # as long when another process is busy. With ten times the count, it then takes 3 times as long.
        "GOMP_SPINCOUNT": "2000",
        # Copies of 32 KiB and more use non-temporal stores, which are 1.4 times as fast because the weights do not fit
        # into the caches. malloc uses huge pages where the kernel provides them, which takes 0.9 of the time.
        "GLIBC_TUNABLES": f"glibc.cpu.x86_non_temporal_threshold={32 << 10}:glibc.malloc.hugetlb=1",
        # malloc keeps freed memory. Each weight sync packs every linear layer again, and getting fresh pages for that
        # took as long as the packing.
        "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
        "MALLOC_TRIM_THRESHOLD_": str(1 << 30),
    }


def _unlink_shared_memory() -> None:
    """Unlink the shared memory in which tensor-parallel CPU workers do their all-reduce.

    All workers have mapped it by now. If its name were left, the memory would stay allocated after the workers are
    killed.
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
    """Let vLLM's processes busy-wait for a call or an answer for SPIN_SECONDS only, and then sleep.

    vLLM's default of one second takes cores from workers that still compute, and from the trainer.

    A message may fail to wake a sleeping process, because zmq drops a message that is sent within about a millisecond
    of another one. So a sleeping process checks for messages every RECHECK_SECONDS. With vLLM's default of 5 seconds, a
    batch had a visible pause.
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
    """Replace the function with which vLLM's rejection sampler repeats the temperature of a sequence for each of its
    draft tokens.

    In vLLM 0.32 that function has no effect on a CPU: its C++ kernel is for integers and writes into converted copies.
    Drafts are then verified with the temperatures that happened to be in memory.

    Raises RuntimeError when vLLM has changed the function's signature.
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
    """Repeat each value of ``x`` [sequences] once for each token of its sequence. Returns [num_tokens].

    ``cu_num_tokens`` [sequences] is the cumulative number of tokens. Values equal to ``replace_from`` become
    ``replace_to``.
    """
    import torch

    counts = torch.diff(cu_num_tokens, prepend=cu_num_tokens.new_zeros(1))
    values = x.masked_fill(x == replace_from, replace_to)
    return values.repeat_interleave(counts, output_size=num_tokens)


# CPU: linear layers
#
# vLLM packs the weight of every linear layer into a oneDNN handle. It then drops the weight; the LM head keeps its
# weight but no longer reads it. The functions below keep the weight, so that a weight sync can write it in place and
# then pack it again with vLLM's own code. Kernels, bits and speed are those of unmodified vLLM.

_packed_layers: list[Any] = []


@cache
def vllm_pack() -> Callable[..., None]:
    """Return vLLM's function that packs a linear layer, as it was before :func:`keep_linear_weights` replaced it.

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
    """Replace vLLM's function that packs a linear layer by one that also keeps the weight.

    If vLLM packs a weight in another place, :func:`rollout.weight_sync.vllm_layout.weight_tensors` refuses the model.
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
    """Pack all linear layers again from their present weights. Returns the seconds that this took.

    Does nothing on a GPU, where the kernels read the weights directly.
    """
    started = time.perf_counter()
    for layer in _packed_layers:
        pack_layer(layer)
    return time.perf_counter() - started


def pack_layer(layer: Any) -> None:
    """Have vLLM pack the present weight of ``layer`` for its kernel. The tensors of the layer itself do not change."""
    bias = getattr(layer, "bias", None)
    # vLLM gets copies, because it writes into its arguments. Some kernels convert the bias in place.
    bias_copy = None if bias is None else bias.detach().clone()
    packed = SimpleNamespace(weight=rows_apart_in_cache(layer.weight), bias=bias_copy)
    vllm_pack()(packed, remove_weight=False)
    # The kernel's handle has its own copy of the weight.
    del packed.weight

    def cpu_linear(x: "torch.Tensor", weight: "torch.Tensor", bias: "torch.Tensor | None") -> "torch.Tensor":
        return packed.cpu_linear(x, weight, None if bias is None else packed.bias)

    layer.__dict__["cpu_linear"] = cpu_linear


def rows_apart_in_cache(weight: "torch.Tensor") -> "torch.Tensor":
    """Return ``weight`` [out, in], or a copy with a longer stride between rows where that makes packing faster.

    oneDNN packs column by column. Rows whose length is a multiple of 2 KiB map to few sets of the processor cache.
    Packing from them takes twice as long as packing from this copy (measured in BF16).
    """
    import torch
    from vllm.model_executor.layers import utils

    rows, width = weight.shape
    itemsize = weight.element_size()
    spread_over_cache = weight.stride(0) * itemsize % 2048 != 0
    # For small BF16 weights, vLLM uses another kernel (AMX), which packs row by row.
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
    """Do nothing, because operations on a CPU are complete when they return."""


def _all_cores() -> int:
    return len(os.sched_getaffinity(0))


# GPU


# Turns on vLLM's all-reduce over 4 to 8 workers in the NVLink switch (multimem). Its bits may differ from call to call,
# so it is off by default here, as it is with vLLM's own reproducible mode, VLLM_BATCH_INVARIANT. NCCL has its own
# switch reductions (NCCL_NVLS_ENABLE). Those are left to the site, because all processes that share a communicator,
# the trainer's included, must use the same setting.
SUMS_IN_THE_SWITCH = "VLLM_ALLREDUCE_USE_SYMM_MEM"


def _cuda_environment(threads: int, devices: Sequence[int]) -> dict[str, str]:
    environment = {SUMS_IN_THE_SWITCH: os.environ.get(SUMS_IN_THE_SWITCH, "0")}
    if not devices:
        return environment
    all_devices = ",".join(str(index) for index in range(len(devices)))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", all_devices).split(",")
    return environment | {"CUDA_VISIBLE_DEVICES": ",".join(visible[index] for index in devices)}


def decoding_graph_sizes(sequences: int) -> list[int]:
    """Return the numbers of sequences for which CUDA graphs are captured, which are those that vLLM itself chooses.

    These are 1, 2, 4, multiples of 8 up to 256, multiples of 16 from there on, and ``sequences``; none is above
    ``sequences`` or LARGEST_GRAPH. A step with a number in between uses the next larger graph.
    """
    largest = min(sequences, LARGEST_GRAPH)
    sizes = {1, 2, 4, *range(8, 256, 8), *range(256, largest, 16), largest}
    return sorted(size for size in sizes if size <= largest)


def _gpu_lacks_nothing() -> list[str]:
    """Return nothing, because the preflight checks which GPUs have FP8."""
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
    # The first operation of an NCCL group connects all its ranks. Without this all-reduce, that would be a round of the
    # weight sync, which would hang, because ranks without a message in the round make no call.
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
        # vLLM 0.32 fails when it splits the prompt of a request that has a seed: it tries to rewind the request's
        # random generator, which a CPU generator does not support.
        "enable_chunked_prefill": False,
        # The samples of a prompt share the complete KV-cache blocks of that prompt. vLLM's default block of 128 tokens
        # is longer than many prompts. With 32, a batch of 8 x 8 samples of 75 + 32 tokens took 0.71 of the time (135M
        # model, one core).
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
