"""Rows of a data set → prompts with images and clips: what the trainer computes on and what the engines are asked.

The model's own processor of transformers makes token ids and pixel values, and its chat template the text. vLLM runs
the same processor on the same files; its token ids are compared with these (``rollout.engine_server``).
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import (
    AutoProcessor,
    AutoTokenizer,
    GotOcr2ImageProcessorPil,
    InternVLProcessor,
    InternVLVideoProcessor,
)
from transformers.image_utils import load_image
from transformers.utils.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from transformers.video_utils import VideoMetadata

from megatron_ext import hf_checkpoint
from megatron_ext.models import family
from megatron_ext.packing import VisionInputs
from recipes.data.prompts import Row, asked, check_length, load_rows, media_files, prompt_tokens, templated
from recipes.data.sources import Rows
from recipes.errors import ConfigError
from rollout import chat_layout
from rollout.media import clip
from rollout.sample import Media, Prompt

MARK = re.compile("(<image>|<video>)")
INTERNVL_CHAT = "InternVLChatModel"
CHAT_TOKENS = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}


@dataclass(frozen=True)
class ImageLimits:
    """What an image or frame may be before the model's processor resizes it: its pixels, and its longer side by its
    shorter one."""

    min_pixels: int
    max_pixels: int
    max_aspect_ratio: float


@dataclass(frozen=True)
class ProcessedPrompt:
    """``prompt`` for the engines; ``vision`` for the trainer, None for a prompt of text alone."""

    prompt: Prompt
    vision: VisionInputs | None


class PromptProcessor:
    """Makes the prompts of one model, of rows that ``load_rows`` gave. ``tokenizer`` is the model's.

    Raises ConfigError for a processor that does not fit the model.
    """

    def __init__(self, model_path: str, max_prompt_tokens: int, limits: ImageLimits) -> None:
        self.max_prompt_tokens, self.limits = max_prompt_tokens, limits
        raw = json.loads(Path(model_path, "config.json").read_text())
        self.architecture = raw["architectures"][0]
        self.hf: Any = None  # transformers' processor of a model that sees
        if "vision_config" not in raw:
            self.tokenizer = AutoTokenizer.from_pretrained(model_path)
            return
        if self.architecture == INTERNVL_CHAT:
            self.hf = internvl_chat_processor(model_path, raw)
        else:
            self.hf = AutoProcessor.from_pretrained(model_path)
            self.hf_config = hf_checkpoint.config(model_path)
            self._check_fit(model_path)
        self.tokenizer = self.hf.tokenizer
        self.tokenizer.chat_template = self.hf.chat_template  # prompts without images as those with some

    def __call__(self, row: Row) -> ProcessedPrompt:
        """Raises ConfigError naming row, field, file and remedy for a file that is no image, an image outside the
        limits or one that the model can't take, and a prompt that is too long."""
        files = media_files(row)
        if not files:
            tokens = prompt_tokens(self.tokenizer, row, self.max_prompt_tokens)
            return ProcessedPrompt(Prompt(row["id"], tuple(tokens)), None)
        if self.hf is None:
            raise ConfigError(f"row {row['id']!r}: field {files[0][0]}: model.path holds a text model; choose another")
        loaded = {file: self._load(f"row {row['id']!r}: field {field}: {file}", file) for field, file in files}
        try:
            return self._with_media(row, loaded)
        except ConfigError:
            raise
        except ValueError as error:  # what transformers' processor refuses, and counts that disagree
            raise ConfigError(f"row {row['id']!r}: {error}; change its images or drop the row") from error

    def _with_media(self, row: Row, loaded: dict[str, Image.Image]) -> ProcessedPrompt:
        images, videos = row.get("images", []), row.get("videos", [])
        internvl = isinstance(self.hf, InternVLProcessor)
        if videos and internvl:
            raise ValueError("field 'videos': InternVL3 takes the frames of a clip as 'images'")
        clips = [clip([loaded[file] for file in frames]) for frames in videos]
        inputs: dict[str, Any] = {"text": [self._text(row, len(images), len(videos))]}
        if images:
            inputs["images"] = [loaded[file] for file in images]
        if clips:
            inputs["videos"] = [frames for frames, _ in clips]
            inputs["video_metadata"] = [VideoMetadata(**metadata) for _, metadata in clips]
        made = self.hf(**inputs, return_tensors="pt")
        ids = made["input_ids"][0].tolist()
        check_length(row, ids, self.max_prompt_tokens)
        vision, marked = self._tiles(ids, made) if internvl else self._patches(ids, made)
        media = Media(tuple(images), tuple(tuple(frames) for frames in videos), tuple(marked))
        return ProcessedPrompt(Prompt(row["id"], tuple(ids), media), vision)

    def _text(self, row: Row, images: int, videos: int) -> str:
        """The chat-templated prompt with a placeholder token for each image and clip, which the processor repeats."""

        def content(text: str) -> Any:
            if self.architecture == INTERNVL_CHAT:  # its template knows text only
                return text.replace("<image>", self.hf.image_token)
            return [
                {"type": part[1:-1]} if MARK.fullmatch(part) else {"type": "text", "text": part}
                for part in MARK.split(text)
                if part
            ]

        messages = [{"role": turn["role"], "content": content(turn["content"])} for turn in asked(row)]
        text = templated(self.hf, row, messages, tokenize=False)
        for token, count in {self.hf.video_token: videos, self.hf.image_token: images}.items():
            if text.count(token) != count:
                raise ValueError(
                    f"field 'prompt': with the chat template it has {text.count(token)} times {token}, for {count} "
                    f"files: take {token} out of the prompt's own text"
                )
        return text

    def _load(self, what: str, file: str) -> Image.Image:
        low, high, ratio = self.limits.min_pixels, self.limits.max_pixels, self.limits.max_aspect_ratio
        try:
            with Image.open(file) as image:
                width, height = image.size
        except Exception as error:  # Pillow's plugins raise many kinds for a damaged file
            raise ConfigError(f"{what}: not a readable image ({error}): replace it or drop the row") from error
        if not low <= width * height <= high:
            raise ConfigError(
                f"{what}: {width} x {height} pixels are outside data.images.min_pixels={low} to max_pixels={high}: "
                "resize it or change the limit"
            )
        if max(width, height) > ratio * min(width, height):
            raise ConfigError(
                f"{what}: {width} x {height} pixels are beyond data.images.max_aspect_ratio={ratio}: crop it or raise "
                "the limit"
            )
        try:
            return load_image(file)
        except Exception as error:
            raise ConfigError(f"{what}: a damaged image ({error}): replace it or drop the row") from error

    def _check_fit(self, model_path: str) -> None:
        """The processor's files and config.json agree on what a placeholder token stands for."""
        vision, images = self.hf_config.vision_config, self.hf.image_processor
        if isinstance(self.hf, InternVLProcessor):
            size = [images.size["height"], images.size["width"]]
            pairs = [
                ("size", size, "vision_config.image_size", list(vision.image_size)),
                ("image_seq_length", self.hf.image_seq_length, "image_seq_length", self.hf_config.image_seq_length),
            ]
        else:
            pairs = [
                (ours, getattr(images, ours), f"vision_config.{theirs}", getattr(vision, theirs))
                for ours, theirs in (
                    ("patch_size", "patch_size"),
                    ("merge_size", "spatial_merge_size"),
                    ("temporal_patch_size", "temporal_patch_size"),
                )
            ]
        for ours, found, theirs, expected in pairs:
            if found != expected:
                raise ConfigError(
                    f"model.path={model_path!r}: its processor has {ours}={found}, config.json has {theirs}="
                    f"{expected}: take both from the same model"
                )

    def _patches(self, ids: list[int], made: Any) -> tuple[VisionInputs, list[int]]:
        """Qwen2.5-VL: images and clips in token order, and the ids with one placeholder for each."""
        merge = self.hf_config.vision_config.spatial_merge_size**2
        waiting = {
            self.hf.image_token_id: by_item(made, "pixel_values", "image_grid_thw"),
            self.hf.video_token_id: by_item(made, "pixel_values_videos", "video_grid_thw"),
        }
        pixels: list[torch.Tensor] = []
        grids: list[torch.Tensor] = []
        placeholders: list[int] = []
        marked: list[int] = []
        place = 0
        while place < len(ids):
            marked.append(ids[place])
            count = 1
            if ids[place] in waiting:
                patches, grid = next(waiting[ids[place]], (None, torch.zeros(3, dtype=torch.long)))
                count = int(grid.prod()) // merge
                if patches is None or ids[place : place + count] != [ids[place]] * count:
                    raise ValueError(
                        f"the image tokens from place {place} on do not agree with a grid of {grid.tolist()} patches, "
                        f"which are {count} tokens"
                    )
                pixels.append(patches)
                grids.append(grid)
                placeholders += range(place, place + count)
            place += count
        if any(list(rest) for rest in waiting.values()):
            raise ValueError(f"fewer image tokens than images: {len(grids)} places")
        grid = torch.stack(grids)
        seconds = [float(second) for second in made.get("second_per_grid_ts", [])]
        positions = family(self.architecture).prompt_positions(self.hf_config, ids, grid, seconds)
        return VisionInputs(torch.cat(pixels), grid, placeholders, positions), marked

    def _tiles(self, ids: list[int], made: Any) -> tuple[VisionInputs, list[int]]:
        """InternVL3: all tiles, and the ids with what vLLM expands to ``<img>``, placeholders and ``</img>``.

        vLLM looks for one placeholder token, or for the text ``<image>`` where the model has the chat layout.
        """
        mark = [self.hf.image_token_id]
        if self.architecture == INTERNVL_CHAT:
            mark = self.tokenizer.encode("<image>", add_special_tokens=False)
        tiles, per_tile = made["pixel_values"], self.hf.image_seq_length
        placeholders = [place for place, token in enumerate(ids) if token == self.hf.image_token_id]
        if len(placeholders) != len(tiles) * per_tile:
            raise ValueError(
                f"{len(placeholders)} image tokens do not agree with {len(tiles)} tiles of {per_tile} tokens"
            )
        marked: list[int] = []
        for token in ids:
            if token == self.hf.start_image_token_id:
                marked += mark
            elif token not in (self.hf.image_token_id, self.hf.end_image_token_id):
                marked.append(token)
        return VisionInputs(tiles, None, placeholders, None), marked


def by_item(made: Any, pixels: str, grid: str) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The patches and the grid of each image or clip; none when the processor made none."""
    if grid in made:
        yield from zip(made[pixels].split(made[grid].prod(1).tolist()), made[grid], strict=True)


def check_rows(processor: PromptProcessor, source: Any, required: Sequence[str]) -> Rows:
    """Load a source and make every prompt once, before anything is started; images take their time to resize.

    Raises ConfigError naming file, line and field of the first row that can't be used.
    """
    rows = load_rows(source, required)
    for number, row in enumerate(rows):
        try:
            processor(row)
        except ConfigError as error:
            raise ConfigError(f"{rows.where(number)}: {error}") from error
    return rows


def internvl_chat_processor(model_path: str, config: dict[str, Any]) -> InternVLProcessor:
    """transformers' processor for InternVL3's chat layout, whose repository has none but code to be run.

    The folder needs InternVL3's tokenizer, with its three image tokens, and config.json. Tiles are cut as that code and
    vLLM cut them: with Pillow's resize and ImageNet's mean and deviation. Raises ConfigError for a tokenizer without
    the tokens, and for settings that transformers' processor does not have.
    """
    chat_layout.register()  # or transformers asks at the terminal whether to run the folder's code
    known = AutoTokenizer.from_pretrained(model_path).get_vocab()
    if missing := [token for token in CHAT_TOKENS.values() if token not in known]:
        raise ConfigError(f"model.path={model_path!r}: its tokenizer has no {missing[0]!r}: take InternVL3's own")
    for field in ("dynamic_image_size", "use_thumbnail"):
        if config[field] is not True:
            raise ConfigError(f"model.path={model_path!r}: config.json has {field}={config[field]}; InternVL3 has true")
    # The class wants a token for clips too; none is ever offered.
    names = CHAT_TOKENS | {"video_token": CHAT_TOKENS["context_image_token"]}
    tokenizer = AutoTokenizer.from_pretrained(model_path, extra_special_tokens=names)
    size = config["vision_config"]["image_size"]
    images = GotOcr2ImageProcessorPil(
        size={"height": size, "width": size},
        crop_to_patches=True,
        min_patches=config["min_dynamic_patch"],
        max_patches=config["max_dynamic_patch"],
        image_mean=IMAGENET_DEFAULT_MEAN,
        image_std=IMAGENET_DEFAULT_STD,
    )
    return InternVLProcessor(
        images,
        tokenizer,
        InternVLVideoProcessor(),
        image_seq_length=int((size // config["vision_config"]["patch_size"] * config["downsample_ratio"]) ** 2),
        chat_template=tokenizer.chat_template,
    )
