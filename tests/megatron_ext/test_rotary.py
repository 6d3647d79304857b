"""Rotary embeddings of packs: a layer looks up nothing, and makes nothing on the device."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_ext import platform

platform.activate("cpu")

from megatron.core.models.common.embeddings import rope_utils  # noqa: E402

from megatron_ext.packed import Pack, RotaryAtPositions  # noqa: E402
from megatron_ext.platform import cuda  # noqa: E402

# What makes the host wait for the device, or copies from the host to it.
WAITS = {"aten::_local_scalar_dense", "aten::_to_copy", "aten::lift_fresh", "aten::nonzero"}


class Recorder(TorchDispatchMode):
    """Notes the names of the operations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(operation.name().partition(".")[0])
        return operation(*args, **(kwargs or {}))


def test_a_layer_on_a_gpu_waits_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a context-parallel rank too; Transformer Engine's kernel is stood in for."""
    calls = []

    def kernel(t: torch.Tensor, starts: torch.Tensor, freqs: torch.Tensor, interleaved: bool = False) -> torch.Tensor:
        calls.append(starts)
        return t * freqs[:, 0]

    monkeypatch.setattr(rope_utils, "fused_apply_rotary_pos_emb_thd", kernel)
    cuda._rotary_per_token()
    rotary = rope_utils.fused_apply_rotary_pos_emb_thd
    t, freqs, sequences = torch.ones(6, 2, 4), torch.full((6, 1, 1, 4), 2.0), torch.tensor([0, 8, 12])
    rotary(t, sequences, freqs, cp_size=2, cp_rank=1)
    with Recorder() as of_layer:
        rotated = rotary(t, sequences, freqs, cp_size=2, cp_rank=1, interleaved=False)
    assert of_layer.names & WAITS == set()
    assert torch.equal(rotated, 2 * t)
    assert calls[0] is calls[1] and calls[0].tolist() == [0, 6], "the pack is one sequence; each token has its angle"


def test_the_angles_of_a_pack_are_those_of_its_positions() -> None:
    class Angles(torch.nn.Module):
        def get_rotary_seq_len(self, *given: Any) -> int:
            return 5

        def forward(self, length: int, packed_seq: bool) -> torch.Tensor:
            return torch.arange(length).view(-1, 1, 1, 1)

    pack = Pack(qkv_format="thd", positions=torch.tensor([3, 0, 4, 3]), segments=None)
    rotary = RotaryAtPositions(Angles())
    length = rotary.get_rotary_seq_len(None, None, None, None, pack)
    assert rotary(length, packed_seq=True).flatten().tolist() == [3, 0, 4, 3]
