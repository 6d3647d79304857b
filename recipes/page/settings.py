"""Settings of the page for people. Defaults stand in conf/serve.yaml; docs/page.md says how they go together."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ext import settings
from megatron_ext.settings import COUNT, SECONDS, setting
from rewards.verdict import Verifier
from rollout.deliberation.settings import DeliberationConfig
from rollout.guidance.settings import LOOPBACK, GuidanceConfig
from rollout.settings import EnvironmentConfig


@dataclass
class PageConfig:
    """The page that `python -m recipes.serve` opens (`conf/serve.yaml`), beside `guidance`."""

    host: str = setting("address that it listens on; any but the loopback needs key_variable")
    port: int = setting("its port", range="[1, 65535]")
    key_variable: str | None = setting("environment variable that holds the token of users; null for no token")
    devices: list[int] = setting("GPUs of the vLLM that the page starts, its tensor-parallel ranks; [] for the CPU")
    arguments: list[str] = setting("further arguments of `vllm serve`; the default ones are for a CPU")
    startup_timeout: float = setting("longest start of vLLM", range=SECONDS, unit="seconds")
    temperature: float | None = setting(
        "sampling temperature of the answers; null for that of the model's generation_config.json", range="[0, 2]"
    )
    edits: str | None = setting("folder of saved edits; null for edits/ in the run's folder, or in runs/")
    max_characters: int = setting("longest message or edited text", range="[1, 200000]", unit="characters")
    max_turns: int = setting(
        "longest conversation, all its branches together", range=COUNT, unit="messages of the user"
    )
    max_branches: int = setting("answers to a message that are kept side by side", range="[1, 1000]")
    max_conversations: int = setting("conversations in memory; the longest unused one is forgotten", range=COUNT)
    max_answers: int = setting("answers under way at once", range="[1, 1000]")
    max_saved_mib: int = setting("largest file of saved edits", range=COUNT, unit="MiB")
    max_documents: int = setting("a person's own documents for deliberate search", range="[1, 1000]")
    max_document_kib: int = setting("largest own document", range="[1, 65536]", unit="KiB")
    max_documents_of_all: int = setting("own documents of all people; they are in memory", range=COUNT)


@dataclass(frozen=True)
class Setup:
    """Everything that a page is opened with."""

    page: PageConfig
    guidance: GuidanceConfig
    # Whether there is a value server.
    has_values: bool
    # Folder of saved edits.
    edits: Path
    # Name that edits are saved with until a person gives another one.
    person: str
    # Token of the users, None for no token.
    token: str | None
    # They judge the answers.
    verifiers: Mapping[str, Verifier]
    # None if the page has no deliberate search.
    deliberation: DeliberationConfig | None
    environment: EnvironmentConfig | None


def read(raw: Mapping[str, Any]) -> PageConfig:
    """The typed, checked group ``page`` of a raw configuration. Raises ValueError."""
    config = settings.read(PageConfig, "page", raw)
    settings.check(config, "page")
    if config.host not in LOOPBACK and config.key_variable is None:
        raise ValueError(
            f"page.host={config.host!r}: others can reach it there, so it wants a token: set page.key_variable to the "
            "name of an environment variable that holds one, or use page.host=127.0.0.1"
        )
    return config
