"""Finds what makes the host wait for the GPU within forward and backward passes, on a fake GPU.

The fake's tensors are all on the CPU, where nothing waits. So a tensor counts as one of the GPU unless it was made
without a device, or of such tensors alone; and what waits is known by its name: reading numbers of a GPU's tensor on
the host, operations whose result's size is such a number, and copies to the GPU of what is on the host, as
``torch.tensor`` makes them of a list. (``Uploads`` copies what is pinned, in a thread of its own.)
"""

import contextlib
import functools
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# They read a number, or the size of their result is one.
OPERATIONS = {
    "aten::_local_scalar_dense",
    "aten::_unique2",
    "aten::bincount",
    "aten::equal",
    "aten::is_nonzero",
    "aten::masked_select",
    "aten::nonzero",
    "aten::unique_consecutive",
    "aten::unique_dim",
}
# Of a tensor on the CPU they read memory or do nothing, so a dispatch mode does not see them.
TO_HOST = ("tolist", "cpu", "numpy")
TO_DEVICE = ("cuda", "to")
# Without a device they make a tensor on the host; some copy a list's numbers, or an array's, to the device.
FACTORIES = ("arange", "empty", "full", "ones", "rand", "randn", "zeros", "get_rng_state")
COPIES = ("tensor", "as_tensor", "from_numpy")
Arguments = tuple[Any, ...]
Options = dict[str, Any]


def _is_on_host(*values: Any) -> bool:
    """Whether there are tensors among them, all on the host."""
    tensors = [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]
    return bool(tensors) and all(getattr(tensor, "is_on_host", False) for tensor in tensors)


def _mark(values: Any) -> None:
    for leaf in tree_leaves(values):
        if isinstance(leaf, torch.Tensor):
            leaf.is_on_host = True  # type: ignore[attr-defined]


def _waits(operation: Any, args: Arguments, options: Options) -> bool:
    """Whether an operation on the GPU does."""
    name = operation.name().partition(".")[0]
    if name in ("aten::index", "aten::index_put", "aten::index_put_"):
        masks = [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)]
        # A number put where a mask is set is a masked_fill.
        is_fill = name != "aten::index" and args[2].numel() == 1
        return bool(masks) and not is_fill
    if name == "aten::repeat_interleave":
        return options.get("output_size") is None
    return name in OPERATIONS


class Watch(TorchDispatchMode):
    """A context; ``waits`` gets what waits within it, in this thread, with its place."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.thread = threading.get_ident()
        self.patches = contextlib.ExitStack()

    def __enter__(self) -> "Watch":
        global _watch
        assert _watch is None
        _watch = self
        for name in (*TO_HOST, *TO_DEVICE):
            self.patches.enter_context(_replaced(torch.Tensor, name, _of_a_tensor))
        for name in (*FACTORIES, *COPIES):
            self.patches.enter_context(_replaced(torch, name, _of_a_factory))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        global _watch
        super().__exit__(*error)
        self.patches.close()
        _watch = None

    def __torch_dispatch__(self, operation: Any, types: Any, args: Arguments = (), kwargs: Any = None) -> Any:
        options = kwargs or {}
        is_on_host = _is_on_host(args, options)
        if not is_on_host and _waits(operation, args, options):
            self.note(operation.name().partition(".")[0])
        result = operation(*args, **options)
        if is_on_host:
            _mark(result)
        return result

    def note(self, name: str) -> None:
        if not _unwatched and threading.get_ident() == self.thread:
            self.waits.append(f"{name} in {_place()}")


_watch: Watch | None = None
_unwatched = 0


@contextlib.contextmanager
def unwatched() -> Iterator[None]:
    """For what stands for a GPU's kernel."""
    global _unwatched
    _unwatched += 1
    try:
        yield
    finally:
        _unwatched -= 1


def as_a_kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, unwatched."""

    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        with unwatched():
            return function(*args, **options)

    return call


def _note(name: str) -> None:
    if _watch is not None:
        _watch.note(name)


def _of_a_tensor(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(tensor: torch.Tensor, *args: Any, **options: Any) -> Any:
        is_on_host = _is_on_host(tensor)
        names_a_device = options.get("device") is not None or any(isinstance(a, str | torch.device) for a in args)
        if name in TO_HOST and not is_on_host:
            _note(name)
        if is_on_host and tensor.numel() and (name == "cuda" or (name == "to" and names_a_device)):
            _note(name)
        return function(tensor, *args, **options)

    return call


def _of_a_factory(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **options: Any) -> Any:
        result = function(*args, **options)
        is_of_a_tensor = any(isinstance(a, torch.Tensor) for a in args)
        if options.get("device") is None and not is_of_a_tensor:
            _mark(result)
        elif name in COPIES and not is_of_a_tensor:
            _note(name)
        return result

    return call


@contextlib.contextmanager
def _replaced(
    owner: Any, name: str, replacement: Callable[[str, Callable[..., Any]], Callable[..., Any]]
) -> Iterator[None]:
    function = getattr(owner, name)
    is_own = name in vars(owner)
    setattr(owner, name, functools.wraps(function)(replacement(name, function)))
    try:
        yield
    finally:
        if is_own:
            setattr(owner, name, function)
        else:
            delattr(owner, name)


def _place() -> str:
    """The innermost line outside of torch and of the fakes."""
    for frame in reversed(traceback.extract_stack()):
        file = Path(frame.filename)
        if "/torch/" not in frame.filename and file.parent != Path(__file__).parent:
            return f"{'/'.join(file.parts[-3:])}:{frame.lineno} ({frame.name})"
    return "?"
