"""The interpolations ``${name:…}`` of the files in conf/. Call :func:`register` before reading a file.

``${cores:N}``: the number of this machine's cores divided by N processes, at least 1.
``${times:A,B}``: A x B.
``${native_precision:PLATFORM}``: :func:`megatron_ext.platform.native_precision`.
"""

import operator
import os

from omegaconf import OmegaConf

from megatron_ext import platform


def register() -> None:
    """Register the interpolations with OmegaConf. Calling it again changes nothing."""
    cores = len(os.sched_getaffinity(0))

    def share_of_cores(processes: int) -> int:
        # A value below 1 is an error in the field that holds it; its check names the field.
        return max(1, cores // max(1, processes))

    OmegaConf.register_new_resolver("cores", share_of_cores, replace=True)
    OmegaConf.register_new_resolver("times", operator.mul, replace=True)
    OmegaConf.register_new_resolver("native_precision", platform.native_precision, replace=True)
