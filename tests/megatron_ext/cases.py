"""What the ranks compute and what the tests compare: tiny models, layouts, and the one batch of sequences."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2ForSequenceClassification,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from megatron_ext.layout import ParallelConfig
from tests.sequences import PlainSequence
from tests.settings import optimizer_config, parallel_config, schedule_config

WORLD = 4
STEPS = 2
# Enough to clip: the gradient norm of the random models is above 1. Epsilon is of the size of the clipped gradient's
# elements. With a smaller one AdamW turns the sign of a gradient into a step, whatever its size, and the sign of an
# element that is all but 0 depends on the order in which a processor adds.
OPTIMIZER = optimizer_config(epsilon=1e-3)
SCHEDULE = schedule_config(1e-3)
# Three key-value groups and 130 tokens do not divide by 2 or 4: attention and vocabulary get padded. The untied model's
# 132 tokens need no padding under any layout here, so its checkpoints may change layout. The even one's sizes are
# multiples of 8 on each of 8 ranks.
TWINS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "tied": (LlamaConfig, LlamaForCausalLM, {"vocab_size": 130, "tie_word_embeddings": True}),
    "untied": (LlamaConfig, LlamaForCausalLM, {"vocab_size": 132, "tie_word_embeddings": False}),
    "sharded": (LlamaConfig, LlamaForCausalLM, {"vocab_size": 132, "tie_word_embeddings": False}),
    "even": (
        LlamaConfig,
        LlamaForCausalLM,
        {
            "vocab_size": 256,
            "tie_word_embeddings": False,
            "hidden_size": 256,
            "intermediate_size": 256,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
        },
    ),
    "long": (
        LlamaConfig,
        LlamaForCausalLM,
        {
            "vocab_size": 130,
            "tie_word_embeddings": False,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "num_key_value_heads": 1,
            "head_dim": 8,
            "max_position_embeddings": 65536,
        },
    ),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {"vocab_size": 130, "tie_word_embeddings": False}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"vocab_size": 130, "tie_word_embeddings": True}),
    "scalar": (
        LlamaConfig,
        LlamaForSequenceClassification,
        {"vocab_size": 130, "tie_word_embeddings": True, "num_labels": 1, "problem_type": "regression"},
    ),
    "scalar-qwen2": (
        Qwen2Config,
        Qwen2ForSequenceClassification,
        {"vocab_size": 130, "num_labels": 3, "problem_type": "multi_label_classification"},
    ),
}


def make_twins(folder: Path) -> None:
    """Random Hugging Face models; ``sharded`` is the untied one again, in several files."""
    for name, (config_class, model_class, options) in TWINS.items():
        torch.manual_seed(0)
        sizes = {
            "hidden_size": 192,
            "intermediate_size": 240,
            "num_hidden_layers": 4,
            "num_attention_heads": 6,
            "num_key_value_heads": 3,
            "head_dim": 32,
            "max_position_embeddings": 128,
        }
        config = config_class(
            rms_norm_eps=1e-5,
            initializer_range=0.05,
            **(sizes | options),
        )
        model = model_class(config).float()
        with torch.no_grad():
            for parameter in (p for n, p in model.named_parameters() if "norm" in n):
                parameter.normal_(1.0, 0.2)
            for parameter in (p for n, p in model.named_parameters() if n.endswith("bias")):
                parameter.normal_(0.0, 0.2)
        model.save_pretrained(folder / name, max_shard_size="700KB" if name == "sharded" else "5GB")


@dataclass(frozen=True)
class Case:
    """A layout and how the batch goes through it.

    ``reverse`` turns the order of the sequences around, ``swap`` gives each data-parallel rank the next one's share.
    """

    name: str
    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    context: int = 1
    virtual: int = 1
    first_stage_layers: int | None = None
    recompute: str = "none"
    sequence: bool = False
    micro_batch_tokens: int = 96
    reverse: bool = False
    swap: bool = False
    distributed_optimizer: bool = True
    twin: str = "tied"
    precision: str = "fp32"
    temperature: float = 1.0
    frozen: tuple[str, ...] = ()  # as in model.build
    shared_prompts: bool = False
    constant: bool = False  # packs are padded to micro_batch_tokens
    recompute_modules: tuple[str, ...] = ("core_attn",)
    recompute_layers: tuple[int, ...] | None = None
    reduce_early: bool = False  # gradients are reduced during the backward pass, in several buckets
    overlap: bool = False  # on a GPU: fused gradients, and communication during matrix products

    @property
    def is_scalar(self) -> bool:
        return self.twin.startswith("scalar")

    @property
    def ranks(self) -> int:
        return self.layout.model_parallel * self.data

    @property
    def layout(self) -> ParallelConfig:
        return parallel_config(
            tensor=self.tensor,
            pipeline=self.pipeline,
            virtual_pipeline=self.virtual,
            context=self.context,
            sequence=self.sequence,
            first_stage_layers=self.first_stage_layers,
            recompute=self.recompute,
            recompute_modules=list(self.recompute_modules),
            recompute_layers=None if self.recompute_layers is None else list(self.recompute_layers),
            gradient_accumulation_fusion=self.overlap,
            overlap_grad_reduce=self.reduce_early,
            tp_comm_overlap=self.overlap,
            distributed_optimizer=self.distributed_optimizer,
            micro_batch_tokens=self.micro_batch_tokens,
            constant_length=self.constant,
            shared_prompts=self.shared_prompts,
        )


CASES = (
    Case("one"),
    Case("one-micro-batch", micro_batch_tokens=400),
    Case("one-small-micro-batches", micro_batch_tokens=38),
    Case("one-reversed", reverse=True),
    Case("one-temperature", temperature=0.7),
    Case("tp2-sp", tensor=2, sequence=True),
    Case("tp3-sp-temperature", tensor=3, sequence=True, temperature=0.7),
    Case("tp4-sp", tensor=4, sequence=True),
    Case("pp2", pipeline=2),
    Case("pp4", pipeline=4),
    Case("dp2", data=2),
    Case("dp2-swapped", data=2, swap=True),
    Case("dp2-whole-optimizer", data=2, distributed_optimizer=False),
    Case("dp4", data=4),
    Case("tp2-sp-dp2", tensor=2, data=2, sequence=True),
    Case("tp2-sp-pp2", tensor=2, pipeline=2, sequence=True),
    Case("pp2-dp2", pipeline=2, data=2),
    Case("pp2-vp2", pipeline=2, virtual=2),
    Case("pp2-uneven", pipeline=2, first_stage_layers=1),
    Case("cp2", context=2),
    Case("cp4", context=4, distributed_optimizer=False),
    Case("cp2-dp2", context=2, data=2),
    Case("tp2-sp-cp2", tensor=2, context=2, sequence=True),
    Case("pp2-vp2-cp2", pipeline=2, virtual=2, context=2),
    Case("one-recompute-selective", recompute="selective"),
    Case("tp2-sp-recompute-full", tensor=2, sequence=True, recompute="full"),
    Case("pp2-vp2-recompute-full", pipeline=2, virtual=2, recompute="full"),
    Case("one-recompute-mlp", recompute="selective", recompute_modules=("mlp",)),
    Case(
        "tp2-sp-recompute-both", tensor=2, sequence=True, recompute="selective", recompute_modules=("core_attn", "mlp")
    ),
    Case("pp2-recompute-layers", pipeline=2, recompute="full", recompute_layers=(1, 0)),
    Case("pp2-vp2-recompute-layers", pipeline=2, virtual=2, recompute="full", recompute_layers=(1, 1)),
    Case("early-dp2", data=2, reduce_early=True),
    Case("early-tp2-sp-pp2", tensor=2, pipeline=2, sequence=True, reduce_early=True),
    Case("early-pp2-vp2-dp2", pipeline=2, virtual=2, data=2, distributed_optimizer=False, reduce_early=True),
    Case("early-cp2-recompute-mlp", context=2, recompute="selective", recompute_modules=("mlp",), reduce_early=True),
    Case("qwen2-tp2-sp-pp2", tensor=2, pipeline=2, sequence=True, twin="qwen2"),
    Case("qwen3-tp2", tensor=2, twin="qwen3"),
    Case("qwen3-tp2-sp-cp2", tensor=2, context=2, sequence=True, twin="qwen3"),
    Case("qwen3-pp2-dp2", pipeline=2, data=2, twin="qwen3"),
    Case("untied-tp2-sp-pp2", tensor=2, pipeline=2, sequence=True, twin="untied"),
    Case("sharded-tp2-dp2", tensor=2, data=2, twin="sharded"),
    Case("scalar-one", twin="scalar"),
    Case("scalar-tp2-sp-cp2", tensor=2, context=2, sequence=True, twin="scalar"),
    Case("scalar-tp2-sp-pp2", tensor=2, pipeline=2, sequence=True, twin="scalar"),
    Case("scalar-pp2-vp2-dp2", pipeline=2, virtual=2, data=2, twin="scalar"),
    Case("scalar-dp2", data=2, micro_batch_tokens=38, twin="scalar"),
    Case("scalar-qwen2-tp2-sp-dp2", tensor=2, data=2, sequence=True, twin="scalar-qwen2"),
    Case("scalar-qwen2-pp2-cp2", pipeline=2, context=2, twin="scalar-qwen2"),
    Case("shared-one", shared_prompts=True),
    Case("shared-one-small-micro-batches", shared_prompts=True, micro_batch_tokens=38),
    Case("shared-tp2-sp", tensor=2, sequence=True, shared_prompts=True),
    Case("shared-tp2-sp-pp2", tensor=2, pipeline=2, sequence=True, shared_prompts=True),
    Case("shared-pp2-vp2-dp2", pipeline=2, virtual=2, data=2, shared_prompts=True),
    Case("shared-dp4", data=4, shared_prompts=True),
    Case("shared-tp2-sp-recompute-full", tensor=2, sequence=True, recompute="full", shared_prompts=True),
    Case("shared-recompute-selective", recompute="selective", shared_prompts=True),
    Case("shared-qwen3-tp2", tensor=2, twin="qwen3", shared_prompts=True),
    Case("shared-qwen2-pp2-dp2", pipeline=2, data=2, twin="qwen2", shared_prompts=True),
    Case("shared-scalar-tp2-sp-dp2", tensor=2, data=2, sequence=True, twin="scalar", shared_prompts=True),
    Case("constant-one", constant=True),
    Case("constant-tp2-sp-pp2", tensor=2, pipeline=2, sequence=True, constant=True),
    Case("constant-pp2-dp2", pipeline=2, data=2, distributed_optimizer=False, constant=True),
    Case("constant-pp2-vp2-cp2", pipeline=2, virtual=2, context=2, distributed_optimizer=False, constant=True),
    Case("constant-shared-tp2-sp-pp2", tensor=2, pipeline=2, sequence=True, shared_prompts=True, constant=True),
    Case("overlap-tp2-sp-pp2", tensor=2, pipeline=2, sequence=True, constant=True, overlap=True),
    Case("bf16-one", precision="bf16"),
    Case("shared-bf16-tp2-sp", tensor=2, sequence=True, precision="bf16", shared_prompts=True),
    Case("bf16-tp2-sp", tensor=2, sequence=True, precision="bf16"),
)

# Micro-batches built as they are read, and in a list: with one reader, with several.
STREAMED = ("tp2-sp-pp2", "pp2-vp2", "cp2-dp2")

# One micro-batch of 40,960 tokens, a response of 32,768 among them, on one rank and divided over four. The twin has one
# layer and one head, because attention takes half a billion products for each.
LONG_TOKENS = 40_960
LONG_ONE = Case("long-one", twin="long", micro_batch_tokens=LONG_TOKENS)
LONG_CP4 = Case("long-cp4", twin="long", micro_batch_tokens=LONG_TOKENS, context=4, distributed_optimizer=False)
# Tokens of prompt and response of each sequence. None is a multiple of CP 4's eight slices; padded they fill the pack.
LONG_LENGTHS = ((997, 32_768), (3_000, 999), (999, 1_000), (499, 500), (90, 100))

# Checkpoints: who saves, and who goes on from it under the same layout and then under another one.
TP2_SP_DP2 = Case("untied-tp2-sp-dp2", tensor=2, data=2, sequence=True, twin="untied")
PP2_DP2 = Case("untied-pp2-dp2", pipeline=2, data=2, twin="untied")
PP2_VP2_CP2 = Case("untied-pp2-vp2-cp2", pipeline=2, virtual=2, context=2, twin="untied")
SCALAR_TP2_SP_PP2 = Case("scalar-resume-tp2-sp-pp2", tensor=2, pipeline=2, sequence=True, twin="scalar")
FROZEN = ("embedding", "decoder.layers.0", "decoder.layers.3")  # a layer of each stage
FROZEN_PP2_DP2 = Case("untied-frozen-pp2-dp2", pipeline=2, data=2, twin="untied", frozen=FROZEN)
RESUMES = (
    TP2_SP_DP2,
    PP2_DP2,
    PP2_VP2_CP2,
    SCALAR_TP2_SP_PP2,
    Case("bf16-pp2", pipeline=2, precision="bf16"),
    FROZEN_PP2_DP2,
    Case("tied-tp2-pp2", tensor=2, pipeline=2),  # a padded bucket with another one after it
    Case("tied-frozen-tp2-sp-dp2", tensor=2, data=2, sequence=True, frozen=("embedding",)),  # its head too
    Case("tied-early-tp2-sp-dp2", tensor=2, data=2, sequence=True, reduce_early=True),
)
RELAYOUTS = (
    (TP2_SP_DP2, Case("untied-tp4", tensor=4, twin="untied")),
    (TP2_SP_DP2, Case("untied-early-tp2-pp2", tensor=2, pipeline=2, twin="untied", reduce_early=True)),
    (PP2_DP2, Case("untied-dp4", data=4, twin="untied")),
    (PP2_VP2_CP2, Case("untied-pp4", pipeline=4, twin="untied")),
    (FROZEN_PP2_DP2, Case("untied-frozen-dp4", data=4, twin="untied", frozen=FROZEN)),
)
DAMAGED = (TP2_SP_DP2, Case("untied-damaged", tensor=2, data=2, sequence=True, twin="untied"))
OTHER_PADDING = (TP2_SP_DP2, Case("untied-one", twin="untied"))
# A job → the job whose checkpoint it reads.
EARLIER = {f"relayout-{case.name}": f"resume-{saved.name}" for saved, case in RELAYOUTS}
EARLIER |= dict.fromkeys(["damaged", "other-padding"], f"resume-{TP2_SP_DP2.name}")


# A case with packs of constant length → the same without.
UNPADDED = {
    "constant-one": "one",
    "constant-tp2-sp-pp2": "tp2-sp-pp2",
    "constant-pp2-dp2": "pp2-dp2",
    "constant-pp2-vp2-cp2": "pp2-vp2-cp2",
    "constant-shared-tp2-sp-pp2": "shared-tp2-sp-pp2",
}


def by_name(name: str) -> Case:
    (case_of_name,) = (case for case in CASES if case.name == name)
    return case_of_name


def token_loss(case: Case, output: torch.Tensor) -> torch.Tensor:
    """Of log-probs or values [R]; far enough from the values that their gradient is clipped too. Of several labels
    [R, labels] each has a target and a weight of its own."""
    if output.dim() == 2:
        places = torch.arange(output.shape[1])
        return ((output - 3 - places) ** 2 / (4 + places)).mean(dim=1)
    return (output - 3) ** 2 / 4 if case.is_scalar else -output


def has_whole_gradients(case: Case) -> bool:
    """Reduce-scatter leaves a rank the sum of its own part of the gradients only."""
    return case.data * case.context == 1 or not case.distributed_optimizer


def batch(case: Case) -> list[PlainSequence]:
    """8 sequences of 6 to 38 tokens; of the long twin ``LONG_LENGTHS``. ``weight`` makes the loss the mean over
    sequences of token means; ``place`` is the token's in its response. Where the case shares prompts, they have three.
    """
    generator = torch.Generator().manual_seed(0)
    vocabulary = TWINS[case.twin][2]["vocab_size"]
    draw: Callable[[int], list[int]] = lambda n: torch.randint(0, vocabulary, (n,), generator=generator).tolist()  # noqa: E731
    lengths: Sequence[Sequence[int]] = LONG_LENGTHS
    if case.twin != "long":
        lengths = torch.randint(3, 20, (8, 2), generator=generator).tolist()
    count = len(lengths)
    sequences = [
        PlainSequence(draw(p), draw(r), {"weight": [1 / (count * r)] * r, "place": list(range(r))}) for p, r in lengths
    ]
    if case.shared_prompts:
        # 4, 3 and 1 responses to a prompt, not all beside each other.
        prompts = [sequences[n].prompt for n in (0, 0, 1, 0, 1, 2, 1, 0)]
        sequences = [replace(s, prompt=prompt) for s, prompt in zip(sequences, prompts, strict=True)]
    return sequences[::-1] if case.reverse else sequences


def original_index(case: Case, index: int) -> int:
    """The place of a sequence of ``batch(case)`` in the batch that is not reversed."""
    return 7 - index if case.reverse else index
