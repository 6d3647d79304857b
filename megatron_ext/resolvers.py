"""What ``${name:…}`` means in conf/; whoever reads one calls :func:`register` first.

``${cores:N}``: this machine's cores shared among N processes; an N below 1 is told by the
field that has it. ``${times:A,B}``: A x B. ``${native_precision:PLATFORM}``:
:func:`native_precision` of this machine's processor, on cuda bf16.
"""

import operator
import os
from pathlib import Path

from omegaconf import OmegaConf

# x86's names, then Arm's. AVX-512 alone is no such thing: there BF16 is turned into FP32 first.
BF16_INSTRUCTIONS = {"avx512_bf16", "amx_bf16", "bf16", "svebf16"}


def native_precision(cpuinfo: str) -> str:
    """bf16 where the processor that ``cpuinfo`` (/proc/cpuinfo) describes multiplies in BF16, else fp32.

    PyTorch takes BF16 everywhere; a matrix product on a processor with AVX2 alone takes seven times as long as in FP32.
    """
    words = {word for line in cpuinfo.splitlines() if line.startswith(("flags", "Features")) for word in line.split()}
    return "bf16" if words & BF16_INSTRUCTIONS else "fp32"


def here(platform: str) -> str:
    return "bf16" if platform == "cuda" else native_precision(Path("/proc/cpuinfo").read_text())


def register() -> None:
    cores = len(os.sched_getaffinity(0))
    OmegaConf.register_new_resolver("cores", lambda share: max(1, cores // max(1, share)), replace=True)
    OmegaConf.register_new_resolver("times", operator.mul, replace=True)
    OmegaConf.register_new_resolver("native_precision", here, replace=True)
