"""What the ranks of eight GPUs compute for the checks: layouts, links, and a block of the 72B model."""

from typing import Any

from transformers import LlamaConfig

from tests.megatron_ext.cases import Case

WORLD = 8


def case(name: str, **layout: Any) -> Case:
    """In BF16, of the model that eight ranks divide without padding."""
    return Case(name, precision="bf16", twin="even", **layout)


# Every kind of parallelism over all GPUs, alone and with the others; the last of them has the 72B layout's kinds.
LAYOUTS = (
    case("node-one"),
    case("node-tp8-sp", tensor=8, sequence=True),
    case("node-dp8", data=8),
    case("node-pp4-dp2", pipeline=4, data=2),
    case("node-tp2-sp-pp2-vp2-dp2", tensor=2, sequence=True, pipeline=2, virtual=2, data=2),
    case("node-tp2-sp-cp4", tensor=2, sequence=True, context=4),
    case("node-overlap-tp8-sp", tensor=8, sequence=True, constant=True, overlap=True, micro_batch_tokens=256),
    case("node-tp2-sp-pp2-cp2", tensor=2, sequence=True, pipeline=2, context=2),
)
# Three key-value groups become eight, 130 tokens 136.
PADDED = Case("node-padded-tp8-sp", tensor=8, sequence=True, precision="bf16", twin="qwen2")
# Who saves a checkpoint, and who goes on from it.
SAVED = case("node-saved-tp2-sp-pp2-dp2", tensor=2, sequence=True, pipeline=2, data=2)
RELAYOUT = case("node-relayout-tp4-sp-dp2", tensor=4, sequence=True, data=2)
LINKS = Case("node-links", data=WORLD)
SPEED = Case("node-speed", tensor=WORLD, sequence=True)
# The same with the tensor-parallel communication behind the matrix products.
OVERLAP = Case("node-overlap", tensor=WORLD, sequence=True, constant=True, overlap=True)
EARLIER = {RELAYOUT.name: SAVED.name}

# Four layers of Qwen2.5-VL-72B's language model, and the tokens of a rank of its layout (a context-parallel half).
LAYERS_72B = LlamaConfig(
    architectures=["LlamaForCausalLM"],
    vocab_size=152064,
    hidden_size=8192,
    intermediate_size=29568,
    num_hidden_layers=4,
    num_attention_heads=64,
    num_key_value_heads=8,
    head_dim=128,
    max_position_embeddings=16384,
    tie_word_embeddings=False,
)
TOKENS = 8192
PASSES = 10
# A message by which bandwidths are measured; a tensor of a decoding step of 64 sequences of the 72B model.
LINK_MIB = 512
SMALL = (64, 8192)
SMALL_REPEATS = 200
# Of a weight sync between nodes; the 72B recipe's has 37.
ROUNDS = 64


def layer_weights(config: LlamaConfig) -> int:
    """Elements of a decoder layer's matrices."""
    heads = 2 * config.num_attention_heads + 2 * config.num_key_value_heads
    return config.hidden_size * (heads * config.head_dim + 3 * config.intermediate_size)


def training_flops(config: LlamaConfig, tokens: int, predicting: int) -> int:
    """Of a forward and backward pass of one sequence of ``tokens``, ``predicting`` of which need logits."""
    matrices = config.num_hidden_layers * layer_weights(config)
    # Causal attention: half of 2 x 2 products of tokens x tokens; the backward pass costs twice the forward.
    attention = config.num_hidden_layers * 2 * tokens**2 * config.num_attention_heads * config.head_dim
    head = config.hidden_size * config.vocab_size * predicting
    return 6 * (matrices * tokens + head) + 3 * attention
