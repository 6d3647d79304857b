"""Writes a small model of the 72B's architecture: ``python -m benchmarks.peers.random_model LAYERS FOLDER``.

It is the text model of Qwen2.5-VL-72B (Qwen2: grouped-query attention 8 : 1, biases on query, key and value, untied
embeddings) with random weights, a quarter of the width, an eighth of the vocabulary and heads of the same size. The
embeddings have about the same share of all bytes as in the 72B. 20 layers are 1.18 billion parameters.
"""

import json
import sys
from pathlib import Path
from typing import Any

ARCHITECTURE = Path("conf/model/architectures/Qwen2.5-VL-72B-Instruct.json")
WIDTH_DIVISOR = 4
VOCABULARY_DIVISOR = 8


def config(layers: int) -> dict[str, Any]:
    """Qwen2's configuration with ``layers`` layers."""
    large = json.loads(ARCHITECTURE.read_text())
    scaled = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    kept = (
        "hidden_act",
        "rms_norm_eps",
        "rope_theta",
        "tie_word_embeddings",
        "use_sliding_window",
        "attention_dropout",
    )
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        **{name: large[name] // WIDTH_DIVISOR for name in scaled},
        **{name: large[name] for name in kept},
        "vocab_size": large["vocab_size"] // VOCABULARY_DIVISOR,
        "num_hidden_layers": layers,
        "max_position_embeddings": 4096,
        "torch_dtype": "bfloat16",
    }


def main() -> None:
    layers = int(sys.argv[1])
    folder = Path(sys.argv[2])

    import torch
    from transformers import AutoModelForCausalLM, Qwen2Config

    torch.manual_seed(0)
    values = {name: value for name, value in config(layers).items() if name != "model_type"}
    model = AutoModelForCausalLM.from_config(Qwen2Config(**values)).to(torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases too, so that a misplaced one is noticed
            parameter.normal_(std=0.02)
    partial = folder.with_name(folder.name + ".partial")
    model.save_pretrained(partial, max_shard_size="1TB")
    (partial / "config.json").write_text(json.dumps(config(layers), indent=2))  # read by three versions of transformers
    partial.rename(folder)


if __name__ == "__main__":
    main()
