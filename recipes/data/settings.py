"""The settings of the data: the sources of rows, the mix of prompts in a step, and the limits of images."""

from dataclasses import dataclass
from typing import Any

from megatron_ext.settings import COUNT, TOKENS, setting
from recipes.data.row_order import curriculum_phases
from recipes.data.source_spec import parse_sources


@dataclass
class ImagesConfig:
    """Limits of an image's size, before the model's processor resizes it."""

    min_pixels: int = setting("smallest area of an image", range=COUNT, unit="pixels")
    max_pixels: int = setting("largest area of an image", range=COUNT, unit="pixels")
    max_aspect_ratio: float = setting("longer side over shorter side at most", range="[1, 1e6]")


@dataclass
class PhaseConfig:
    """A mix of prompts that applies from a step on."""

    from_step: int = setting("first step of the phase")
    mix: dict[str, int] = setting("shares of the prompts, by kind")


@dataclass
class DataConfig:
    """The data of a run.

    A source is a file of JSON lines, a folder of .jsonl files, a .parquet file, a folder saved by ``datasets``, or a
    hub's org/name[/subset][@revision]:split.
    """

    sft: Any = setting("source, or sources, of SFT rows")
    prompts: Any = setting("source of RL prompts, or several: [{source: …, weight: 2}, …]")
    evaluation: Any = setting("source, or sources, of held-out prompts")
    max_prompt_tokens: int = setting("longest prompt", range=TOKENS, unit="tokens")
    mix: dict[str, int] = setting("shares of a step's prompts, by kind; 0 leaves a kind out")
    curriculum: list[PhaseConfig] = setting(
        "mixes in place of mix from a step on: [{from_step: 0, mix: {…}}, {from_step: 50, mix: {…}}]"
    )
    images: ImagesConfig = setting("limits of images")
    evaluation_samples: int = setting(
        "sampled responses to a held-out prompt, beside the greedy one; 0 for greedy only", range="[0, 1e6]"
    )
    scores: dict[str, list[str]] = setting("what the evaluation reports: a verifier, and the kinds of its rows")


def check(data: DataConfig) -> None:
    """Raises ValueError for shares, phases, limits and sources that can't work."""
    former: int | None = None
    for i, (from_step, mix) in enumerate(curriculum_phases(data)):
        field = f"data.curriculum[{i}]" if data.curriculum else "data"
        if not mix or not all(isinstance(share, int) and 0 <= share <= 10**6 for share in mix.values()):
            raise ValueError(f"{field}.mix={mix}: give kinds of prompts shares of 1 and more, 0 for none of a kind")
        if former is None and from_step:
            raise ValueError(f"{field}.from_step={from_step}: the first phase begins with step 0")
        if former is not None and from_step <= former:
            raise ValueError(f"{field}.from_step={from_step}: must be above {former}, the step of the phase before it")
        former = from_step
    if data.images.min_pixels > data.images.max_pixels:
        raise ValueError(
            f"data.images.min_pixels={data.images.min_pixels}: is above data.images.max_pixels="
            f"{data.images.max_pixels}; lower it"
        )
    for name in ("sft", "prompts", "evaluation"):
        try:
            parse_sources(getattr(data, name))
        except ValueError as error:
            raise ValueError(f"data.{name}={error}") from error
