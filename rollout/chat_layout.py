"""InternVL's chat layout for vLLM. vLLM has the model, but the configuration's class is code in each model folder."""

from typing import Any

from transformers import AutoConfig, PretrainedConfig, Qwen2Config


class InternVLChatConfig(PretrainedConfig):
    """The config.json of the chat layout, with the field names that vLLM's ``InternVLChatModel`` reads."""

    model_type = "internvl_chat"

    def __init__(
        self, llm_config: dict[str, Any] | None = None, vision_config: dict[str, Any] | None = None, **options: Any
    ) -> None:
        self.text_config = Qwen2Config(**(llm_config or {}))
        self.vision_config = PretrainedConfig(**(vision_config or {}))
        super().__init__(**options)


def register() -> None:
    """Register the configuration with transformers, and thereby with vLLM, in this process.

    So vLLM does not need the code in the model folder.
    """
    AutoConfig.register(InternVLChatConfig.model_type, InternVLChatConfig, exist_ok=True)
