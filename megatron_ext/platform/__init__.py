"""Everything that differs between CUDA and CPU. Each platform is one module, and both have the same functions.

features.py describes what each platform can do, without an import of either module. The two modules have:

``name``, ``backend``            platform and torch.distributed backend
``activate()``                   once per process, before any Megatron-Core module is built
``device()``                     where the tensors of this rank are
``layer_specs(config, stage)``   TransformerBlockSubmodules of a decoder, or of one virtual pipeline stage of it
``encoder_layer(config)``        ModuleSpec of a bidirectional layer for vision towers
``config_options()``             TransformerConfig fields that depend on the available kernels
``fuse_gradient_accumulation(module)``  let matrix products add weight gradients to the gradient buffers directly
``overlap_tensor_parallel(config, tokens)``  create the buffers for overlapped tensor-parallel communication
``end_overlap()``                destroy these buffers
``rng_state`` / ``set_rng_state`` the generator state that dropout and sampling on this device use
``empty_on_host(tensors)``       host tensors of these shapes for copies; ``copy_to_host(tensors, copies)`` fills them
``uploads()``                    copies of another thread's tensors to this rank's device, which block no thread
``empty_cache()``                release freed memory to the device
``take_memory_peak()``           peak of the bytes that the allocator reserved since the last call, None without one
``peak_flops()``                 dense BF16 FLOP/s of this rank's device, None where it is not known
``machine()``                    description of the hardware
"""

import importlib
from types import ModuleType

from megatron_ext.platform.features import PLATFORMS, Capabilities, capabilities, native_precision

__all__ = ["PLATFORMS", "Capabilities", "activate", "capabilities", "current", "native_precision"]

_active: ModuleType | None = None


def activate(name: str) -> ModuleType:
    """Select and activate the platform for this process.

    Raises ValueError for an unknown name, and if the process already runs on another platform.
    """
    global _active
    capabilities(name)
    if _active is not None:
        if _active.name != name:
            raise ValueError(
                f"cluster.platform={name!r}: this process already runs on {_active.name!r}; start a new one"
            )
        return _active
    module = importlib.import_module(f"megatron_ext.platform.{name}")
    module.activate()
    _active = module
    return module


def current() -> ModuleType:
    """The active platform module. Raises RuntimeError before ``activate``."""
    if _active is None:
        raise RuntimeError("no platform is active: call megatron_ext.platform.activate('cpu' or 'cuda') first")
    return _active
