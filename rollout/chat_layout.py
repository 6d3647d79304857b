"""InternVL's chat layout for vLLM: it has the model, but its configuration's class comes as code with each folder."""

from typing import Any

from transformers import AutoConfig, PretrainedConfig, Qwen2Config


class InternVLChatConfig(PretrainedConfig):
    """config.json of the chat layout, its fields named as vLLM's ``InternVLChatModel`` reads them."""

    model_type = "internvl_chat"

    def __init__(
        self, llm_config: dict[str, Any] | None = None, vision_config: dict[str, Any] | None = None, **options: Any
    ) -> None:
        self.text_config = Qwen2Config(**(llm_config or {}))
        self.vision_config = PretrainedConfig(**(vision_config or {}))
        super().__init__(**options)


def register() -> None:
    """Have transformers, and so vLLM, know the layout's configuration in this process: none of its code is run."""
    AutoConfig.register(InternVLChatConfig.model_type, InternVLChatConfig, exist_ok=True)
