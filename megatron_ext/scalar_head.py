"""A model with one number for each token: a linear layer hidden size → 1 in place of the output layer.

A critic's values and a reward model's scores. Its Hugging Face form is transformers' …ForSequenceClassification with
one label: the decoder's tensors, ``score.weight`` [1, hidden size] and no output layer. Transformers has these classes
for the text families; for the vision-language ones name and tensor follow them (our choice).
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
from megatron_ext.weight_map import Part, Rule, replicated

ARCHITECTURE = "ForSequenceClassification"
TENSOR = "score.weight"
OUTPUT_LAYER = "output_layer.weight"  # Megatron-Core's name of what is replaced
HF_OUTPUT_LAYER = "lm_head.weight"  # and how Hugging Face's ends


class ScalarHead(torch.nn.Module):
    """Hidden states [R, hidden size] → [R], computed in FP32. Every tensor-parallel rank has the whole of it."""

    def __init__(self, hidden_size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1, hidden_size, dtype=dtype))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return F.linear(hidden.float(), self.weight.float()).squeeze(-1)


def has_scalar_head(hf_config: Any) -> bool:
    """Whether a configuration is one of such a model."""
    return bool(hf_config.architectures[0].endswith(ARCHITECTURE))


def architecture(language_model: str) -> str:
    """The name of the architecture with a scalar head, from the language model's or from itself.

    Raises ValueError naming an architecture that has no such form here.
    """
    stem = language_model
    for ending in ("ForCausalLM", "ForConditionalGeneration", ARCHITECTURE):
        stem = stem.removesuffix(ending)
    if (name := stem + ARCHITECTURE) not in FAMILIES:
        known = sorted(known for known in FAMILIES if known.endswith(ARCHITECTURE))
        raise ValueError(f"a {language_model!r} has no form with a scalar head: there are {', '.join(known)}")
    return name


def scalar_config(hf_config: Any) -> Any:
    """The configuration of the model with a scalar head on a language model's decoder; of such a model, its own.

    Raises ValueError as ``architecture``.
    """
    found = copy.deepcopy(hf_config)
    found.architectures = [architecture(hf_config.architectures[0])]
    found.num_labels = 1
    return found


def with_scalar_head(parts: Sequence[Part]) -> tuple[Part, ...]:
    """A family's weight map with the head in place of the output layer."""
    head = Rule((TENSOR,), OUTPUT_LAYER, replicated)
    return tuple(
        replace(part, rules=tuple(head if rule.megatron == OUTPUT_LAYER else rule for rule in part.rules))
        for part in parts
    )


def with_score_tensor(headers: dict[Path, dict[str, Any]], hidden_size: int) -> dict[Path, dict[str, Any]]:
    """Safetensors headers of a language model → those with ``score.weight`` behind the last, and no output layer.

    Their offsets are no longer those of the tensors that are left.
    """
    found = {
        file: {name: entry for name, entry in header.items() if not name.endswith(HF_OUTPUT_LAYER)}
        for file, header in headers.items()
    }
    found[max(found)].setdefault(TENSOR, {"shape": [1, hidden_size]})
    return found


def describe(folder: Path, headers: dict[Path, dict[str, Any]]) -> None:
    """Make ``config.json`` and the index of an exported folder, copied from a language model's, say what it is.

    Padding: the model's own token, or the end of a text where it has none. ``regression`` has vLLM give the score as it
    is. Raises ValueError as ``architecture``.
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
    if index.is_file():
        tensors = [
            (name, source.name, entry["data_offsets"])
            for source, header in headers.items()
            for name, entry in header.items()
            if name != "__metadata__"
        ]
        content = {
            "metadata": {"total_size": sum(end - start for _, _, (start, end) in tensors)},
            "weight_map": {name: stored_in for name, stored_in, _ in tensors},
        }
        index.write_text(json.dumps(content, indent=2) + "\n")
