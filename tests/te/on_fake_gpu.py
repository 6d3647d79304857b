"""``python -m tests.te.on_fake_gpu MODULE ARGUMENTS…``: a program of tests/megatron_ext on the platform ``cuda``.

The program activates the platform ``cpu``; here it gets the fake GPU's. To be started within ``machine``.
"""

import runpy
import sys

from tests.te import fake_gpu

if __name__ == "__main__":
    from megatron_ext import platform

    cuda = fake_gpu.activate("cpu")
    platform.activate = lambda name: cuda
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
