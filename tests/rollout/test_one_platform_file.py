"""rollout/ asks rollout/vllm_platform.py what differs between CPU and GPU, and branches on the device nowhere else."""

import ast
from pathlib import Path

import pytest

ROLLOUT = Path(__file__).resolve().parents[2] / "rollout"
PLATFORM_FILE = ROLLOUT / "vllm_platform.py"
# The transport of GPU memory, which the platform file chooses.
CUDA_FILE = ROLLOUT / "weight_sync" / "cuda_ipc.py"
DEVICES = {"cpu", "cuda", "nccl"}
QUESTIONS = {"is_cpu", "is_cuda", "is_available", "is_cuda_alike", "device_type"}


def branches(source: str) -> list[int]:
    """Lines on which a module compares with the name of a device, looks something up by it, asks torch or vLLM which
    device it has, or (but for the transport of GPU memory) uses ``torch.cuda``."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Compare):
            compared = [node.left, *node.comparators]
        elif isinstance(node, ast.MatchValue):
            compared = [node.value]
        elif isinstance(node, ast.Dict):
            compared = [key for key in node.keys if key is not None]
        else:
            compared = []
        if any(isinstance(part, ast.Constant) and part.value in DEVICES for part in compared):
            lines.append(node.lineno)
        if isinstance(node, ast.Attribute) and (node.attr in QUESTIONS or ast.unparse(node) == "torch.cuda"):
            lines.append(node.lineno)
    return sorted(set(lines))


def test_only_the_platform_file_branches_on_the_device() -> None:
    files = [path for path in ROLLOUT.rglob("*.py") if path not in (PLATFORM_FILE, CUDA_FILE)]
    assert len(files) > 20
    branches_of_files = {str(path.relative_to(ROLLOUT)): branches(path.read_text()) for path in files}
    assert {path: lines for path, lines in branches_of_files.items() if lines} == {}


@pytest.mark.parametrize(
    "line",
    [
        'block_size = 32 if settings.device == "cpu" else 16',
        'if "cuda" != device.type: pass',
        'transports = {"cpu": shared_memory, "cuda": cuda_ipc}',
        "if tensor.is_cuda: pass",
        "if current_platform.is_cpu(): pass",
        "torch.cuda.synchronize()",
        "match device:\n    case 'cuda': pass",
    ],
)
def test_a_branch_is_recognised(line: str) -> None:
    assert branches(line)


def test_what_is_no_branch_is_left_alone() -> None:
    assert (
        branches('device: str = "cpu"\nvllm_platform.of(device).synchronize_device(device)\nflat = tensor.cpu()') == []
    )
