"""What each platform can do. Needs no torch, because a configuration is checked before anything large is imported."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path

# Names on x86, then on Arm. AVX-512 without BF16 is not enough, because torch then converts BF16 to FP32 first.
BF16_INSTRUCTIONS = {"avx512_bf16", "amx_bf16", "bf16", "svebf16"}


@dataclass(frozen=True)
class Capabilities:
    """The properties of a platform. Code outside this package asks for them instead of the platform's name.

    Attributes:
        has_gpus: every rank and every engine or judge process has GPUs of its own, so the number of GPUs in a node
            limits the number of processes.
        can_sleep: an engine or judge can release its device memory and take it back (vLLM's sleep mode).
        has_fp8: matrix products in FP8 are possible on the newest devices of the platform.
        has_fp32_context_parallel: attention in FP32 can be divided over context-parallel ranks. Transformer Engine
            cannot: its fused kernel supports only 16-bit types, and its unfused kernel no context parallelism.
        shares_prompts: the meaning of ``parallel.shared_prompts=null``. False where sharing has never been run.
        fused_kernels: the platform has Transformer Engine's norms, RoPE, SwiGLU and flash attention. They keep less for
            the backward pass than torch's separate operations.
        can_fork_after_imports: a process that has imported torch and Megatron-Core may fork ranks.
        probe_size: side of the square matrix whose product with itself takes about a millisecond.
    """

    has_gpus: bool
    can_sleep: bool
    has_fp8: bool
    has_fp32_context_parallel: bool
    shares_prompts: bool
    fused_kernels: bool
    can_fork_after_imports: bool
    probe_size: int


CAPABILITIES = {
    "cpu": Capabilities(
        has_gpus=False,
        can_sleep=False,
        has_fp8=False,
        has_fp32_context_parallel=True,
        shares_prompts=True,
        fused_kernels=False,
        can_fork_after_imports=True,
        probe_size=192,
    ),
    "cuda": Capabilities(
        has_gpus=True,
        can_sleep=True,
        has_fp8=True,
        has_fp32_context_parallel=False,
        shares_prompts=False,
        fused_kernels=True,
        # Imports may initialise CUDA, and a CUDA context does not survive a fork.
        can_fork_after_imports=False,
        probe_size=4096,
    ),
}
PLATFORMS = tuple(CAPABILITIES)


def capabilities(name: str) -> Capabilities:
    """What the platform ``name`` can do. Raises ValueError for an unknown name."""
    if name not in CAPABILITIES:
        raise ValueError(f"cluster.platform={name!r}: use one of {', '.join(PLATFORMS)}")
    return CAPABILITIES[name]


def native_precision(name: str) -> str:
    """The fastest 16- or 32-bit precision of the platform on this machine: "bf16" or "fp32".

    An unknown name is treated like "cpu". The check of cluster.platform reports it.
    """
    if name in CAPABILITIES and CAPABILITIES[name].has_gpus:
        return "bf16"
    return processor_precision(Path("/proc/cpuinfo").read_text())


def processor_precision(cpuinfo: str) -> str:
    """Return "bf16" for a processor with BF16 instructions, else "fp32". ``cpuinfo`` is the text of /proc/cpuinfo.

    PyTorch accepts BF16 on every processor. But on a processor with only AVX2, a matrix product in BF16 takes seven
    times as long as in FP32.
    """
    return "bf16" if processor_flags(cpuinfo) & BF16_INSTRUCTIONS else "fp32"


def processor_flags(cpuinfo: str) -> set[str]:
    """Linux's names of the processor's features. ``cpuinfo`` is the text of /proc/cpuinfo."""
    flags: set[str] = set()
    for line in cpuinfo.splitlines():
        if line.startswith(("flags", "Features")):
            flags.update(line.split())
    return flags


# (words of a device's name, dense BF16 FLOP/s from NVIDIA's data sheets). The first entry that matches counts.
PEAK_FLOPS = (
    (("H100", "PCIe"), 756e12),
    (("H100", "NVL"), 835e12),
    (("H100",), 989e12),
    (("H200", "NVL"), 835e12),
    (("H200",), 989e12),
    (("H800",), 989e12),
    (("GH200",), 989e12),
    (("A100",), 312e12),
    (("A800",), 312e12),
    (("B200",), 2250e12),
)


def peak_flops(device_name: str) -> float | None:
    """Dense BF16 FLOP/s of the device with the name that CUDA reports. None if it is not in the table."""
    words = set(device_name.replace("-", " ").split())
    for wanted, flops in PEAK_FLOPS:
        if words.issuperset(wanted):
            return flops
    return None


def cudnn_folder() -> str | None:
    """The folder of the cuDNN that is installed with torch. None where a container has it elsewhere."""
    try:
        spec = importlib.util.find_spec("nvidia.cudnn")
    except ModuleNotFoundError:
        # Nothing of NVIDIA's is installed.
        spec = None
    if spec is None or not spec.submodule_search_locations:
        return None
    return next(iter(spec.submodule_search_locations))
