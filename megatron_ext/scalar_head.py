"""Critics, reward models and value models: a linear layer hidden size → labels in place of the output layer.

Such a model computes one number for each token and label. A critic and a reward model have one label. A value model has
one label for each principle. The Hugging Face form is transformers' …ForSequenceClassification: the decoder's tensors,
``score.weight`` [labels, hidden size] and no output layer. Transformers has these classes for the text families. For
the vision-language families the names follow the same pattern (our choice).
"""

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
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


@dataclass(frozen=True)
class Head:
    """The outputs of a scalar head, as the model's configuration describes them."""

    # The names of the outputs, in order.
    labels: tuple[str, ...]
    # transformers' name of the task. For "regression" vLLM returns the outputs as they are. For
    # "multi_label_classification", whose loss is the binary cross-entropy, it returns the sigmoid of each output.
    problem_type: str


REWARD = Head(("LABEL_0",), "regression")  # "LABEL_0" is transformers' name for a label without a name


def value_head(principles: Sequence[str]) -> Head:
    """The head of a value model: the sigmoid of each output is the value of one of the ``principles``."""
    return Head(tuple(principles), "multi_label_classification")


class ScalarHead(torch.nn.Module):
    """Hidden states [R, hidden size] → FP32 [R], or [R, labels] with several labels.

    The weight is replicated on every tensor-parallel rank.
    """

    def __init__(self, hidden_size: int, labels: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(labels, hidden_size, dtype=dtype))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return F.linear(hidden.float(), self.weight.float()).squeeze(-1)


def has_scalar_head(hf_config: Any) -> bool:
    """Whether the configuration is that of a model with a scalar head."""
    return bool(hf_config.architectures[0].endswith(ARCHITECTURE))


def architecture(base_architecture: str) -> str:
    """The name of the architecture with a scalar head that belongs to ``base_architecture``.

    ``base_architecture`` is a language model's architecture, or already one with a scalar head. Raises ValueError
    naming an architecture that has no form with a scalar head here.
    """
    stem = base_architecture
    for ending in ("ForCausalLM", "ForConditionalGeneration", ARCHITECTURE):
        stem = stem.removesuffix(ending)
    name = stem + ARCHITECTURE
    if name not in FAMILIES:
        known = sorted(known for known in FAMILIES if known.endswith(ARCHITECTURE))
        raise ValueError(f"a {base_architecture!r} has no form with a scalar head: there are {', '.join(known)}")
    return name


def scalar_config(hf_config: Any, head: Head = REWARD) -> Any:
    """A copy of the configuration, for the same decoder with this head.

    ``hf_config`` may already have the head. Raises ValueError like ``architecture``, and for a model whose head has
    other outputs.
    """
    if has_scalar_head(hf_config):
        labels = tuple(hf_config.id2label[i] for i in range(hf_config.num_labels))
        is_other = labels != head.labels and max(len(labels), len(head.labels)) > 1
        if is_other:
            raise ValueError(
                f"a {hf_config.architectures[0]!r} with the outputs {', '.join(labels)}, not {', '.join(head.labels)}: "
                "start from a language model, or from a model with the same outputs in the same order"
            )
    config = copy.deepcopy(hf_config)
    config.architectures = [architecture(hf_config.architectures[0])]
    config.id2label = dict(enumerate(head.labels))
    config.label2id = {label: i for i, label in enumerate(head.labels)}
    config.problem_type = head.problem_type
    return config


def head_of(hf_config: Any) -> Head | None:
    """The head that :func:`scalar_config` wrote into a configuration, or None for a language model."""
    if not has_scalar_head(hf_config):
        return None
    return Head(tuple(hf_config.id2label.values()), hf_config.problem_type)


def with_scalar_head(mappings: Sequence[ModuleMapping]) -> tuple[ModuleMapping, ...]:
    """A family's mappings with the scalar head in place of the output layer."""
    head = ParamMapping((TENSOR,), OUTPUT_LAYER, replicated)
    changed = []
    for module in mappings:
        params = tuple(head if param.megatron_name == OUTPUT_LAYER else param for param in module.params)
        changed.append(replace(module, params=params))
    return tuple(changed)


def with_score_tensor(headers: dict[Path, dict[str, Any]], labels: int, hidden_size: int) -> dict[Path, dict[str, Any]]:
    """Safetensors headers of a language model, changed to those of a model with a scalar head.

    The output layer is removed, and ``score.weight`` is added in the last file. The offsets of the other tensors are
    not adjusted.
    """
    changed = {}
    for file, header in headers.items():
        changed[file] = {name: entry for name, entry in header.items() if not name.endswith(HF_OUTPUT_LAYER)}
    last_file = max(changed)
    changed[last_file].setdefault(TENSOR, {"shape": [labels, hidden_size]})
    return changed


def describe(folder: Path, headers: dict[Path, dict[str, Any]], head: Head) -> None:
    """Rewrite ``config.json`` and the index of an exported folder, which were copied from a language model's folder.

    ``headers`` are the safetensors headers of the exported files. The padding token stays the same. A model without one
    gets its end-of-text token. Raises ValueError like ``architecture``.
    """
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config |= {
        "architectures": [architecture(config["architectures"][0])],
        "id2label": {str(i): label for i, label in enumerate(head.labels)},
        "label2id": {label: i for i, label in enumerate(head.labels)},
        "problem_type": head.problem_type,
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
