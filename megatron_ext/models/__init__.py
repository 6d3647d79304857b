"""Model families. Each has one file, which is selected by the architecture name in the Hugging Face configuration."""

import importlib
from types import ModuleType

FAMILIES = {
    "LlamaForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen2_5_VLForConditionalGeneration": "qwen2_5_vl",
    "InternVLForConditionalGeneration": "internvl3",
    "InternVLChatModel": "internvl3",
    # With a scalar head in place of the output layer (megatron_ext/scalar_head.py).
    "LlamaForSequenceClassification": "llama",
    "Qwen2ForSequenceClassification": "qwen2",
    "Qwen3ForSequenceClassification": "qwen3",
    "Qwen2_5_VLForSequenceClassification": "qwen2_5_vl",
    "InternVLForSequenceClassification": "internvl3",
}


def family(architecture: str) -> ModuleType:
    """The module of the architecture's family. Raises ValueError naming an unknown architecture and the known ones."""
    if architecture not in FAMILIES:
        raise ValueError(
            f"model.path holds a {architecture!r}: known architectures are {', '.join(sorted(FAMILIES))}; "
            "add one file under megatron_ext/models/ and a line in FAMILIES (docs/architecture.md)"
        )
    return importlib.import_module(f"megatron_ext.models.{FAMILIES[architecture]}")
