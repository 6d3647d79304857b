"""Write the Hugging Face folder that a run starts from, if it does not exist yet.

The weights are those of the GGUF file of a Python package, or random.
"""

import importlib.util
import shutil
from pathlib import Path

from recipes.config.launch import ModelConfig
from recipes.errors import ConfigError

# ChatML without the default system prompt of the package's template: shorter prompts, same special tokens.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def prepare(model: ModelConfig) -> bool:
    """Write ``model.path`` if it does not exist. Return whether it was written.

    Raises ConfigError if the folder does not exist and can't be made from the model's settings.
    """
    target = Path(model.path)
    if (target / "config.json").is_file():
        return False
    if model.random_weights_of is not None:
        make_random(Path(model.random_weights_of), target)
        return True
    if model.gguf_package is None or model.gguf_file is None:
        raise ConfigError(
            f"model.path={model.path!r}: no config.json there; give the folder of a Hugging Face checkpoint"
        )
    if not model.gguf_file.startswith(f"{target.name}."):
        name = model.gguf_file.rsplit(".", maxsplit=2)[0]
        raise ConfigError(
            f"model.path={model.path!r}: no config.json there; give the folder of a Hugging Face checkpoint. Only a "
            f"folder of the name {name} is made from model.gguf_file={model.gguf_file!r}"
        )
    spec = importlib.util.find_spec(model.gguf_package)
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(f"model.gguf_package={model.gguf_package!r} is not installed: make env")
    source = spec.submodule_search_locations[0]

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    network = AutoModelForCausalLM.from_pretrained(source, gguf_file=model.gguf_file, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=model.gguf_file)
    # The GGUF reader does not set this. The value is SmolLM2's.
    network.config.rms_norm_eps = 1e-5
    if hasattr(network.config, "quantization_config"):
        del network.config.quantization_config
    network.hf_quantizer = None
    network.is_quantized = False
    tokenizer.chat_template = CHAT_TEMPLATE
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    network.to(torch.bfloat16).save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(target)
    return True


def make_random(source: Path, target: Path) -> None:
    """Write a copy of ``source`` with random BF16 weights to ``target``. The weights are the same on every machine.

    Raises ConfigError if ``source`` has no config.json.
    """
    if not (source / "config.json").is_file():
        raise ConfigError(f"model.random_weights_of={str(source)!r}: no config.json there; give a folder that has one")

    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(source)
    torch.manual_seed(0)
    network = getattr(transformers, config.architectures[0])(config)
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(source, partial)
    network.to(torch.bfloat16).save_pretrained(partial)
    partial.rename(target)
