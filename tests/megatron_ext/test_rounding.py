"""FP32 to BF16: the optimiser's rounding of its master weights, and the weight sync's of FP32 shards, bit for bit."""

from megatron_ext import platform

platform.activate("cpu")

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from transformers import LlamaConfig  # noqa: E402

from megatron_ext import model, optimizer, parallel  # noqa: E402
from rollout.weight_sync.network import slot_view  # noqa: E402
from tests.settings import optimizer_config, parallel_config, precision_config, schedule_config  # noqa: E402

TINY = LlamaConfig(
    architectures=["LlamaForCausalLM"], hidden_size=64, intermediate_size=64, num_hidden_layers=1,
    num_attention_heads=2, vocab_size=64, tie_word_embeddings=False,
)  # fmt: skip


def nearest_even(values: torch.Tensor) -> torch.Tensor:
    """BF16's bits from FP32's, in integers: half of the dropped part is added, less one where the kept part is even."""
    bits = values.contiguous().view(torch.int32).long() & 0xFFFFFFFF
    return (((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) & 0xFFFF).to(torch.int32)


def bits_of(values: torch.Tensor) -> torch.Tensor:
    return values.contiguous().view(torch.int16).to(torch.int32) & 0xFFFF


def hard(count: int, seed: int) -> torch.Tensor:
    """Finite FP32 of all exponents, subnormal ones too; a third lies midway between two of BF16, a third beside it."""
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(-(2**31), 2**31, (count,), generator=generator)
    bits[0::3] = (bits[0::3] & ~0xFFFF) | 0x8000
    bits[1::3] = (bits[1::3] & ~0xFFFF) | (0x7FFF + 2 * torch.randint(0, 2, bits[1::3].shape, generator=generator))
    values = bits.to(torch.int32).view(torch.float32)
    return torch.where(values.isfinite(), values, torch.full_like(values, 1.00390625))  # a tie


def test_the_optimisers_rounding_and_the_weight_syncs_are_nearest_even() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        place = parallel.initialize(parallel_config(), seed=1, timeout_seconds=60)
        built = model.build(TINY, place, precision_config())
        adam, _ = optimizer.build(built, optimizer_config(weight_decay=0.0), schedule_config(1e-3), 1)
        adam.reload_model_params()
        expected, rounded = [], 0
        for part in getattr(adam, "chained_optimizers", [adam]):
            for masters, parameters in zip(part.shard_fp32_from_float16_groups, part.model_float16_groups, strict=True):
                for master, parameter in zip(masters, parameters, strict=True):
                    master.data.copy_(hard(master.numel(), rounded).view(master.shape))
                    expected.append((parameter, nearest_even(master.data).view(parameter.shape)))
                    rounded += master.numel()

                    # What a worker does with an FP32 shard in place, and a rank when it packs one for another host.
                    wide = master.data.view(parameter.shape).repeat_interleave(2, 0)[::2]
                    slots = torch.zeros(2, 2 * master.numel(), dtype=torch.uint8)
                    packed = slot_view(slots, 0, 0, tuple(parameter.shape), torch.bfloat16)
                    placed = torch.empty(parameter.shape, dtype=torch.bfloat16)
                    for target in (packed, placed):
                        target.copy_(wide)
                        assert torch.equal(bits_of(target), expected[-1][1])
            part._copy_main_params_to_model_params()
        assert rounded == sum(p.numel() for chunk in built.chunks for p in chunk.module.parameters())
        for parameter, bits in expected:
            assert torch.equal(bits_of(parameter.data), bits)
    finally:
        parallel.destroy()


def test_the_integers_agree_with_known_cases() -> None:
    values = torch.tensor([1.0, 1.00390625, 1.01171875, 1.0039063692, -1.00390625, 0.0])
    assert nearest_even(values).tolist() == [0x3F80, 0x3F80, 0x3F82, 0x3F81, 0xBF80, 0]
