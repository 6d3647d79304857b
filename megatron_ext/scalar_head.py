"""Critics and reward models: a linear layer hidden size → 1 in place of the output layer.

Such a model computes one number for each token, a value or a score. Its Hugging Face form is transformers'
…ForSequenceClassification with one label: the decoder's tensors, ``score.weight`` [1, hidden size] and no output
layer. Transformers has these classes for the text families. For the vision-language families the names follow the same
pattern (our choice).
"""

import copy
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from megatron_ext.models import FAMILIES
from megatron_ext.weight_map import ModuleMapping, ParamMapping, replicated

ARCHITECTURE = "ForSequenceClassification"
TENSOR = "score.weight"
# The output layer that the head replaces: Megatron-Core's name, and the end of Hugging Face's name.
OUTPUT_LAYER = "output_layer.weight"
HF_OUTPUT_LAYER = "lm_head.weight"


class ScalarHead(torch.nn.Module):
    """Hidden states [R, hidden size] → FP32 [R]. The weight is replicated on every tensor-parallel rank."""

    def __init__(self, hidden_size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1, hidden_size, dtype=dtype))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return F.linear(hidden.float(), self.weight.float()).squeeze(-1)


def has_scalar_head(hf_config: Any) -> bool:
    """Whether the configuration is that of a model with a scalar head."""
    return bool(hf_config.architectures[0].endswith(ARCHITECTURE))


def architecture(base_architecture: str) -> str:
    """The name of the architecture with a scalar head, from a language model's name or from that name itself.

    Raises ValueError naming an architecture that has no form with a scalar head here.
    """
    stem = base_architecture
    for ending in ("ForCausalLM", "ForConditionalGeneration", ARCHITECTURE):
        stem = stem.removesuffix(ending)
    name = stem + ARCHITECTURE
    if name not in FAMILIES:
        known = sorted(known for known in FAMILIES if known.endswith(ARCHITECTURE))
        raise ValueError(f"a {base_architecture!r} has no form with a scalar head: there are {', '.join(known)}")
    return name


def scalar_config(hf_config: Any) -> Any:
    """A copy of the configuration for the same decoder with a scalar head, or of one that has the head already.

    Raises ValueError as ``architecture``.
    """
    config = copy.deepcopy(hf_config)
    config.architectures = [architecture(hf_config.architectures[0])]
    config.num_labels = 1
    return config


def with_scalar_head(mappings: Sequence[ModuleMapping]) -> tuple[ModuleMapping, ...]:
    """A family's mappings with the scalar head in place of the output layer."""
    head = ParamMapping((TENSOR,), OUTPUT_LAYER, replicated)
    changed = []
    for module in mappings:
        params = tuple(head if param.megatron_name == OUTPUT_LAYER else param for param in module.params)
        changed.append(replace(module, params=params))
    return tuple(changed)


def with_score_tensor(headers: dict[Path, dict[str, Any]], hidden_size: int) -> dict[Path, dict[str, Any]]:
    """Safetensors headers of a language model without the output layer and with ``score.weight`` in the last file.

    The offsets of the other tensors are not adjusted.
    """
    changed = {}
    for file, header in headers.items():
        changed[file] = {name: entry for name, entry in header.items() if not name.endswith(HF_OUTPUT_LAYER)}
    last_file = max(changed)
    changed[last_file].setdefault(TENSOR, {"shape": [1, hidden_size]})
    return changed


def describe(folder: Path, headers: dict[Path, dict[str, Any]]) -> None:
    """Rewrite ``config.json`` and the index of an exported folder, which were copied from a language model's folder.

    ``headers`` are the safetensors headers of the exported files. The padding token stays the model's, or becomes the
    end of a text if it has none. With ``problem_type`` "regression" vLLM returns the score without an activation.
    Raises ValueError as ``architecture``.
    """
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config |= {
        "architectures": [architecture(config["architectures"][0])],
        "id2label": {"0": "LABEL_0"},
        "label2id": {"LABEL_0": 0},
        "problem_type": "regression",
        "tie_word_embeddings": False,
    }
    if config.get("pad_token_id") is None:
        end = config.get("eos_token_id")
        config["pad_token_id"] = end[0] if isinstance(end, list) else end
    file.write_text(json.dumps(config, indent=2) + "\n")
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return
    total_size = 0
    file_of_tensor = {}
    for file_of_header, header in headers.items():
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            start, end = entry["data_offsets"]
            total_size += end - start
            file_of_tensor[name] = file_of_header.name
    content = {"metadata": {"total_size": total_size}, "weight_map": file_of_tensor}
    index.write_text(json.dumps(content, indent=2) + "\n")
