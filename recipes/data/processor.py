"""Convert rows to prompts: token ids for the engines and, for rows with images or clips, pixel values for the trainer.

The model's chat template gives the text. The model's own processor (transformers) computes token ids and pixel values.
vLLM runs the same processor on the same files, and its token ids are compared with these (``rollout.engine_server``).
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
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
from megatron_ext.batch import Prompt
from megatron_ext.models import family
from megatron_ext.packing import VisionInputs
from recipes.data.rows import Row, load_rows, media_files, messages
from recipes.data.settings import ImagesConfig
from recipes.data.sources import Rows
from recipes.errors import ConfigError
from rollout import chat_layout
from rollout.media import clip

MEDIA_MARK = re.compile("(<image>|<video>)")
INTERNVL_CHAT = "InternVLChatModel"
CHAT_TOKENS = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}


@dataclass(frozen=True)
class ProcessedPrompt:
    """A prompt as the engines and the trainer take it."""

    prompt: Prompt  # for the engines
    vision: VisionInputs | None  # for the trainer; None for a text-only prompt


class PromptProcessor:
    """Converts the rows of ``load_rows`` to prompts for one model. ``tokenizer`` is the model's.

    Raises ConfigError for a processor that does not fit the model.
    """

    def __init__(self, model_path: str, max_prompt_tokens: int, limits: ImagesConfig) -> None:
        self.max_prompt_tokens = max_prompt_tokens
        self.limits = limits
        raw_config = json.loads(Path(model_path, "config.json").read_text())
        self.architecture = raw_config["architectures"][0]
        self.hf: Any = None  # transformers' processor; None for a text model
        if "vision_config" not in raw_config:
            self.tokenizer = AutoTokenizer.from_pretrained(model_path)
            return
        if self.architecture == INTERNVL_CHAT:
            self.hf = internvl_chat_processor(model_path, raw_config)
        else:
            self.hf = AutoProcessor.from_pretrained(model_path)
            self.hf_config = hf_checkpoint.config(model_path)
            self._check_fit(model_path)
        self.tokenizer = self.hf.tokenizer
        # Prompts with and without images use the same template.
        self.tokenizer.chat_template = self.hf.chat_template

    def __call__(self, row: Row) -> ProcessedPrompt:
        """The prompt of a row.

        Raises ConfigError, naming row, field, file and remedy, for a file that is not an image, an image outside the
        limits, media that the model can't take, and a prompt that is too long.
        """
        files = media_files(row)
        if not files:
            tokens = prompt_tokens(self.tokenizer, row, self.max_prompt_tokens)
            return ProcessedPrompt(Prompt(row["id"], np.array(tokens, np.int32)), None)
        if self.hf is None:
            raise ConfigError(f"row {row['id']!r}: field {files[0][0]}: model.path holds a text model; choose another")
        loaded = {file: self._load_image(f"row {row['id']!r}: field {field}: {file}", file) for field, file in files}
        try:
            return self._with_media(row, loaded)
        except ConfigError:
            raise
        except ValueError as error:  # from transformers' processor, or numbers that disagree
            raise ConfigError(f"row {row['id']!r}: {error}; change its images or drop the row") from error

    def _with_media(self, row: Row, loaded: dict[str, Image.Image]) -> ProcessedPrompt:
        images = row.get("images", [])
        videos = row.get("videos", [])
        is_internvl = isinstance(self.hf, InternVLProcessor)
        if videos and is_internvl:
            raise ValueError("field 'videos': InternVL3 takes the frames of a clip as 'images'")
        inputs: dict[str, Any] = {"text": [self._text(row, len(images), len(videos))]}
        if images:
            inputs["images"] = [loaded[file] for file in images]
        if videos:
            clips = [clip([loaded[file] for file in frames]) for frames in videos]
            inputs["videos"] = [frames for frames, _ in clips]
            inputs["video_metadata"] = [VideoMetadata(**metadata) for _, metadata in clips]
        processed = self.hf(**inputs, return_tensors="pt")
        ids = processed["input_ids"][0].tolist()
        check_length(row, ids, self.max_prompt_tokens)
        if is_internvl:
            vision, unexpanded_ids = self._internvl_inputs(ids, processed)
        else:
            vision, unexpanded_ids = self._qwen_inputs(ids, processed)
        prompt = Prompt(
            prompt_id=row["id"],
            token_ids=np.array(ids, np.int32),
            images=tuple(images),
            videos=tuple(tuple(frames) for frames in videos),
            marked_token_ids=np.array(unexpanded_ids, np.int32),
        )
        return ProcessedPrompt(prompt, vision)

    def _text(self, row: Row, images: int, videos: int) -> str:
        """The prompt's text by the chat template, with one placeholder token for each image and clip.

        transformers' processor then repeats the placeholder for every token of the image or clip.
        """
        turns = [{"role": turn["role"], "content": self._content(turn["content"])} for turn in messages(row)]
        text = apply_chat_template(self.hf, row, turns, tokenize=False)
        for token, count in {self.hf.video_token: videos, self.hf.image_token: images}.items():
            if text.count(token) != count:
                raise ValueError(
                    f"field 'prompt': with the chat template it has {text.count(token)} times {token}, for {count} "
                    f"files: take {token} out of the prompt's own text"
                )
        return text

    def _content(self, text: str) -> Any:
        """A message's content as the chat template takes it: marks become placeholders, or parts {type: image}."""
        if self.architecture == INTERNVL_CHAT:  # its template takes text only
            return text.replace("<image>", self.hf.image_token)
        parts: list[dict[str, str]] = []
        for piece in MEDIA_MARK.split(text):
            if MEDIA_MARK.fullmatch(piece):
                parts.append({"type": piece.strip("<>")})
            elif piece:
                parts.append({"type": "text", "text": piece})
        return parts

    def _load_image(self, where: str, file: str) -> Image.Image:
        """Load an image and check its size. Raises ConfigError with a message that begins with ``where``."""
        limits = self.limits
        try:
            with Image.open(file) as image:
                width, height = image.size
        except Exception as error:  # Pillow's plugins raise many kinds for a damaged file
            raise ConfigError(f"{where}: not a readable image ({error}): replace it or drop the row") from error
        if not limits.min_pixels <= width * height <= limits.max_pixels:
            raise ConfigError(
                f"{where}: {width} x {height} pixels are outside data.images.min_pixels={limits.min_pixels} to "
                f"max_pixels={limits.max_pixels}: resize it or change the limit"
            )
        if max(width, height) > limits.max_aspect_ratio * min(width, height):
            raise ConfigError(
                f"{where}: {width} x {height} pixels are beyond data.images.max_aspect_ratio="
                f"{limits.max_aspect_ratio}: crop it or raise the limit"
            )
        try:
            return load_image(file)
        except Exception as error:
            raise ConfigError(f"{where}: a damaged image ({error}): replace it or drop the row") from error

    def _check_fit(self, model_path: str) -> None:
        """Check that the processor's files and config.json agree on the number of tokens of an image."""
        vision = self.hf_config.vision_config
        images = self.hf.image_processor
        # (the processor's field, its value, config.json's field, its value)
        pairs: list[tuple[str, Any, str, Any]]
        if isinstance(self.hf, InternVLProcessor):
            size = [images.size["height"], images.size["width"]]
            pairs = [
                ("size", size, "vision_config.image_size", list(vision.image_size)),
                ("image_seq_length", self.hf.image_seq_length, "image_seq_length", self.hf_config.image_seq_length),
            ]
        else:
            pairs = [
                ("patch_size", images.patch_size, "vision_config.patch_size", vision.patch_size),
                ("merge_size", images.merge_size, "vision_config.spatial_merge_size", vision.spatial_merge_size),
                (
                    "temporal_patch_size",
                    images.temporal_patch_size,
                    "vision_config.temporal_patch_size",
                    vision.temporal_patch_size,
                ),
            ]
        for field, value, config_field, config_value in pairs:
            if value != config_value:
                raise ConfigError(
                    f"model.path={model_path!r}: its processor has {field}={value}, config.json has {config_field}="
                    f"{config_value}: take both from the same model"
                )

    def _qwen_inputs(self, ids: list[int], processed: Any) -> tuple[VisionInputs, list[int]]:
        """The inputs of Qwen2.5-VL: the patches of images and clips, in the order of their tokens.

        Also returns the token ids with a single placeholder for each image or clip, as vLLM takes them.
        """
        patches_per_token = self.hf_config.vision_config.spatial_merge_size**2
        items = {
            self.hf.image_token_id: split_by_item(processed, "pixel_values", "image_grid_thw"),
            self.hf.video_token_id: split_by_item(processed, "pixel_values_videos", "video_grid_thw"),
        }
        pixels: list[torch.Tensor] = []
        grids: list[torch.Tensor] = []
        placeholders: list[int] = []
        unexpanded_ids: list[int] = []
        place = 0
        while place < len(ids):
            token = ids[place]
            unexpanded_ids.append(token)
            count = 1
            if token in items:
                patches, grid = next(items[token], (None, torch.zeros(3, dtype=torch.long)))
                count = int(grid.prod()) // patches_per_token
                if patches is None or ids[place : place + count] != [token] * count:
                    raise ValueError(
                        f"the image tokens from place {place} on do not agree with a grid of {grid.tolist()} patches, "
                        f"which are {count} tokens"
                    )
                pixels.append(patches)
                grids.append(grid)
                placeholders += range(place, place + count)
            place += count
        if any(list(remaining) for remaining in items.values()):
            raise ValueError(f"fewer image tokens than images: {len(grids)} places")
        grid = torch.stack(grids)
        seconds = [float(second) for second in processed.get("second_per_grid_ts", [])]
        positions = family(self.architecture).prompt_positions(self.hf_config, ids, grid, seconds)
        return VisionInputs(torch.cat(pixels), grid, placeholders, positions), unexpanded_ids

    def _internvl_inputs(self, ids: list[int], processed: Any) -> tuple[VisionInputs, list[int]]:
        """The inputs of InternVL3: all tiles, and the token ids as vLLM takes them.

        vLLM expands one placeholder token to ``<img>``, placeholders and ``</img>``. For models of the chat layout it
        expands the text ``<image>`` instead.
        """
        unexpanded_image = [self.hf.image_token_id]
        if self.architecture == INTERNVL_CHAT:
            unexpanded_image = self.tokenizer.encode("<image>", add_special_tokens=False)
        tiles = processed["pixel_values"]
        tokens_per_tile = self.hf.image_seq_length
        placeholders = [place for place, token in enumerate(ids) if token == self.hf.image_token_id]
        if len(placeholders) != len(tiles) * tokens_per_tile:
            raise ValueError(
                f"{len(placeholders)} image tokens do not agree with {len(tiles)} tiles of {tokens_per_tile} tokens"
            )
        unexpanded_ids: list[int] = []
        for token in ids:
            if token == self.hf.start_image_token_id:
                unexpanded_ids += unexpanded_image
            elif token not in (self.hf.image_token_id, self.hf.end_image_token_id):
                unexpanded_ids.append(token)
        return VisionInputs(tiles, None, placeholders, None), unexpanded_ids


def apply_chat_template(model: Any, row: Row, turns: Sequence[Mapping[str, Any]], **options: Any) -> Any:
    """Apply the chat template of a tokenizer or processor to the messages ``turns``, up to where the answer starts.

    Raises ConfigError naming the row if the template rejects them.
    """
    try:
        return model.apply_chat_template(turns, add_generation_prompt=True, **options)
    except Exception as error:  # a template can raise any exception
        raise ConfigError(
            f"row {row['id']!r}: field 'messages': the model's chat template refuses them ({error}): change them or "
            "drop the row"
        ) from error


def prompt_tokens(tokenizer: Any, row: Row, max_prompt_tokens: int) -> list[int]:
    """The token ids of a text prompt by the chat template. Raises ConfigError naming a row that is too long."""
    ids = apply_chat_template(tokenizer, row, messages(row), tokenize=True, return_dict=False)
    check_length(row, ids, max_prompt_tokens)
    return list(ids)


def check_length(row: Row, ids: Sequence[int], max_prompt_tokens: int) -> None:
    """Raises ConfigError naming the row when its prompt is too long."""
    if len(ids) > max_prompt_tokens:
        raise ConfigError(
            f"row {row['id']!r} has {len(ids)} prompt tokens, data.max_prompt_tokens={max_prompt_tokens}: "
            "raise it or drop the row"
        )


def split_by_item(processed: Any, pixels: str, grid: str) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The patches and the grid of each image or clip. Yields nothing if the processor's output has none."""
    if grid in processed:
        patches_of_items = processed[pixels].split(processed[grid].prod(1).tolist())
        yield from zip(patches_of_items, processed[grid], strict=True)


def check_rows(processor: PromptProcessor, source: Any, required: Sequence[str]) -> Rows:
    """Load a source and process every prompt, to find errors before anything starts. This is slow for images.

    Raises ConfigError naming file, line and field of the first row that can't be used.
    """
    rows = load_rows(source, required)
    rows.check_each(processor)
    return rows


def internvl_chat_processor(model_path: str, config: dict[str, Any]) -> InternVLProcessor:
    """transformers' processor for InternVL3's chat layout, whose repository has remote code instead of a processor.

    The folder needs config.json, and InternVL3's tokenizer with its three image tokens. Tiles are cut as the remote
    code and vLLM cut them, with Pillow's resize, and normalised with ImageNet's mean and standard deviation. Raises
    ConfigError for a tokenizer without these tokens, and for settings that transformers' processor does not support.
    """
    # Otherwise transformers asks at the terminal whether to run the folder's code.
    chat_layout.register()
    vocabulary = AutoTokenizer.from_pretrained(model_path).get_vocab()
    missing = [token for token in CHAT_TOKENS.values() if token not in vocabulary]
    if missing:
        raise ConfigError(f"model.path={model_path!r}: its tokenizer has no {missing[0]!r}: take InternVL3's own")
    for field in ("dynamic_image_size", "use_thumbnail"):
        if config[field] is not True:
            raise ConfigError(f"model.path={model_path!r}: config.json has {field}={config[field]}; InternVL3 has true")
    # The class requires a token for clips too, although no clip is ever processed.
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
