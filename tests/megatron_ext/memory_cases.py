"""Ranks of tiny models, of which ``memory_worker`` measures what they hold."""

from dataclasses import dataclass, field
from typing import Any

from megatron_ext.layout import ParallelConfig
from tests.settings import parallel_config


@dataclass(frozen=True)
class MemoryCase:
    """Rank ``rank`` of ``world`` ranks."""

    name: str
    sizes: dict[str, Any] = field(default_factory=dict)
    world: int = 1
    rank: int = 0
    precision: str = "bf16"
    recompute: str = "none"
    modules: tuple[str, ...] = ("core_attn",)
    distributed_optimizer: bool = True
    tied: bool = False
    vision: str = ""
    frozen: bool = False

    @property
    def layout(self) -> ParallelConfig:
        return parallel_config(
            **self.sizes,
            recompute=self.recompute,
            recompute_modules=list(self.modules),
            distributed_optimizer=self.distributed_optimizer,
        )


TP2_SP = {"tensor": 2, "sequence": True}
PP2_LAYERS = {"pipeline": 2, "recompute_layers": [1, 0]}
TP2_SP_PP2 = {"tensor": 2, "pipeline": 2, "sequence": True}
CASES = (
    MemoryCase("one"),
    MemoryCase("one-fp32", precision="fp32"),
    MemoryCase("one-selective", recompute="selective"),
    MemoryCase("one-mlp", recompute="selective", modules=("mlp",)),
    MemoryCase("one-both", recompute="selective", modules=("core_attn", "mlp")),
    MemoryCase("one-full", recompute="full"),
    MemoryCase("one-two-layers", {"recompute_layers": [2]}, recompute="full"),
    MemoryCase("one-shared", {"shared_prompts": True}),
    MemoryCase("one-whole-optimizer", distributed_optimizer=False),
    MemoryCase("tp2", {"tensor": 2}, world=2),
    MemoryCase("tp2-sp", TP2_SP, world=2, rank=1),
    MemoryCase("tp4-sp-padded", {"tensor": 4, "sequence": True}, world=4, rank=3),
    MemoryCase("dp2-first", world=2),
    MemoryCase("dp2-last", world=2, rank=1),
    MemoryCase("cp2", {"context": 2}, world=2),
    MemoryCase("tp2-sp-pp2-first", TP2_SP_PP2, world=8, tied=True),
    MemoryCase("tp2-sp-pp2-last", TP2_SP_PP2, world=8, rank=6, tied=True),
    MemoryCase("tp2-sp-mlp", TP2_SP, world=2, recompute="selective", modules=("mlp",)),
    MemoryCase("pp2-layers-first", PP2_LAYERS, world=2, recompute="full"),
    MemoryCase("pp2-layers-last", PP2_LAYERS, world=2, rank=1, recompute="full"),
    MemoryCase("pp2-virtual-first", {"pipeline": 2, "virtual_pipeline": 2}, world=2),
    MemoryCase("tp2-sp-full", TP2_SP, world=2, recompute="full"),
    MemoryCase("qwen-frozen", vision="qwen", frozen=True),
    MemoryCase("qwen-tp2-sp-frozen", TP2_SP, world=4, rank=2, vision="qwen", frozen=True),
    MemoryCase("qwen", vision="qwen"),
    MemoryCase("qwen-selective", vision="qwen", recompute="selective"),
    MemoryCase("qwen-mlp", vision="qwen", recompute="selective", modules=("mlp",)),
    MemoryCase("qwen-full", vision="qwen", recompute="full"),
    MemoryCase("internvl-frozen", vision="internvl", frozen=True),
    MemoryCase("internvl", vision="internvl"),
    MemoryCase("internvl-selective", vision="internvl", recompute="selective"),
    MemoryCase("internvl-mlp", vision="internvl", recompute="selective", modules=("mlp",)),
    MemoryCase("internvl-tp2-sp-full", TP2_SP, world=2, vision="internvl", recompute="full"),
)
