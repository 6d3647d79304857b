"""Prompts with images equal those of transformers' own way from a conversation to inputs, and of vLLM's processor."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoProcessor, Qwen2_5_VLModel

from megatron_ext import batch as batches
from megatron_ext.batch import TokenBatch
from recipes.data.processor import ProcessedPrompt, PromptProcessor, check_rows
from recipes.data.settings import ImagesConfig
from recipes.errors import ConfigError
from recipes.preflight import checks
from rollout import engine_server
from rollout.media import FRAMES_PER_SECOND
from tests.recipes import tiny, vision_models
from tests.settings import engine_settings

LIMITS = ImagesConfig(min_pixels=100, max_pixels=200_000, max_aspect_ratio=250.0)
# Width and height: below and above the model's own limits, wide, high, and of no multiple of a patch.
SIZES = [(56, 56), (100, 61), (20, 20), (500, 380), (600, 12), (9, 300), (84, 57), (59, 113), (140, 140)]
MODELS = ["qwen2_5_vl", "internvl", "internvl_chat"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The three models' folders, and a data file's: ``i<n>.png`` of SIZES, ``f<n>.png`` of one size, others."""
    folder = tmp_path_factory.mktemp("vision")
    for name in MODELS:
        (folder / name).mkdir()
        getattr(vision_models, f"make_{name}")(folder / name)
    for n, (width, height) in enumerate(SIZES):
        vision_models.draw(folder / f"i{n}.png", width, height, n)
    for n in range(5):
        vision_models.draw(folder / f"f{n}.png", 90, 64, 20 + n)
    return folder


@pytest.fixture(scope="module")
def processors(folder: Path) -> dict[str, PromptProcessor]:
    return {name: PromptProcessor(str(folder / name), 1000, LIMITS) for name in MODELS}


TALK = {
    "label": "l",
    "kind": "k",
    "messages": [
        {"role": "system", "content": "the task is short"},
        {"role": "user", "content": "<image> and <image>?"},
        {"role": "assistant", "content": "the task prompt"},
        {"role": "user", "content": "but <image>?"},
    ],
    "images": ["i1.png", "i4.png", "i6.png"],
}


def row(prompt: str, images: list[str] | None = None, videos: list[list[str]] | None = None) -> dict[str, Any]:
    fields: dict[str, Any] = {"id": "x", "label": "l", "kind": "k", "prompt": prompt}
    return fields | ({"images": images} if images else {}) | ({"videos": videos} if videos else {})


ROWS = [
    *(row("what is <image>?", [f"i{n}.png"]) for n in range(len(SIZES))),
    row("<image><image> and\n<image> differ", ["i1.png", "i4.png", "i1.png"]),
    TALK,
    row("the task prompt without one"),
]
CLIPS = [
    row("<video> shows?", videos=[["f0.png", "f1.png", "f2.png", "f3.png"]]),
    row("<image> before <video>, then <image>", ["i1.png", "i6.png"], [["f4.png", "f0.png", "f2.png"]]),
    row("<video> or <video>", videos=[["f1.png"], ["f2.png", "f3.png"]]),
]


def process(processor: PromptProcessor, folder: Path, *rows: dict[str, Any]) -> list[ProcessedPrompt]:
    """By way of a data file in ``folder``."""
    path = folder / "rows.jsonl"
    tiny.write_rows(path, [{**row, "id": str(n)} for n, row in enumerate(rows)])
    return [processor(row) for row in check_rows(processor, str(path), ("id", "prompt"))]


def conversation(row: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    """The row as transformers' chat templates want it, files named in it."""
    images, videos = iter(row.get("images", [])), iter(row.get("videos", []))
    messages = []
    for turn in row.get("messages") or [{"role": "user", "content": row["prompt"]}]:
        parts: list[dict[str, Any]] = []
        text = turn["content"]
        while text:
            places = {text.find(mark): mark for mark in ("<image>", "<video>") if mark in text}
            at = min(places, default=len(text))
            if at:
                parts.append({"type": "text", "text": text[:at]})
            mark = places.get(at)
            if mark == "<image>":
                parts.append({"type": "image", "path": str(folder / next(images))})
            elif mark == "<video>":
                parts.append({"type": "video", "path": [str(folder / name) for name in next(videos)]})
            text = text[at + len(mark or "") :]
        messages.append({"role": turn["role"], "content": parts})
    return messages


def transformers_inputs(processor: Any, row: dict[str, Any], folder: Path) -> Any:
    metadata = [
        {"total_num_frames": len(frames), "fps": FRAMES_PER_SECOND, "frames_indices": list(range(len(frames)))}
        for frames in row.get("videos", [])
    ]
    return processor.apply_chat_template(
        conversation(row, folder),
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"video_metadata": metadata} if metadata else {},
    )


def in_token_order(expected: Any, hf: Any) -> list[torch.Tensor]:
    """transformers' patches: a tensor for each image and each clip, in the order of their tokens."""
    ids = expected["input_ids"][0].tolist()
    in_order = []
    patches = {
        kind: iter(expected[pixels].split(expected[grid].prod(1).tolist())) if pixels in expected else iter(())
        for kind, pixels, grid in (
            (hf.image_token_id, "pixel_values", "image_grid_thw"),
            (hf.video_token_id, "pixel_values_videos", "video_grid_thw"),
        )
    }
    for before, token in zip([None, *ids], ids, strict=False):
        if token in patches and token != before:
            in_order.append(next(patches[token]))
    assert not any(list(rest) for rest in patches.values())
    return in_order


@pytest.mark.parametrize("case", [*ROWS, *CLIPS])
def test_qwen2_5_vl_prompts_equal_transformers(
    processors: dict[str, PromptProcessor], folder: Path, case: dict[str, Any]
) -> None:
    (processed,) = process(processors["qwen2_5_vl"], folder, case)
    hf = AutoProcessor.from_pretrained(folder / "qwen2_5_vl")
    expected = transformers_inputs(hf, case, folder)
    assert list(processed.prompt.token_ids) == expected["input_ids"][0].tolist()
    if processed.vision is None:
        assert "images" not in case and "videos" not in case
        return
    patches = in_token_order(expected, hf)
    assert torch.equal(processed.vision.pixels, torch.cat(patches))
    assert processed.vision.grid is not None
    assert processed.vision.grid.prod(1).tolist() == [len(p) for p in patches]
    assert sorted(map(tuple, processed.vision.grid.tolist())) == sorted(
        tuple(grid)
        for name in ("image_grid_thw", "video_grid_thw")
        if name in expected
        for grid in expected[name].tolist()
    )
    kinds = torch.tensor(processed.prompt.token_ids)
    is_placeholder = (kinds == hf.image_token_id) | (kinds == hf.video_token_id)
    assert processed.vision.placeholders == is_placeholder.nonzero().flatten().tolist()
    # transformers leaves a clip's duration out of where the text goes on; vLLM and the trainer do not. The two agree up
    # to the end of the first clip, see the comparison with vLLM.
    config = AutoConfig.from_pretrained(folder / "qwen2_5_vl")
    model = Qwen2_5_VLModel._from_config(config)
    names = ("mm_token_type_ids", "image_grid_thw", "video_grid_thw", "second_per_grid_ts")
    positions, _ = model.get_rope_index(expected["input_ids"], **{n: expected[n] for n in names if n in expected})
    clips = (kinds == hf.video_token_id).nonzero().flatten().tolist()
    compared = next((i for i in range(clips[0], len(kinds)) if kinds[i] != hf.video_token_id), None) if clips else None
    assert torch.equal(torch.tensor(processed.vision.positions)[:, :compared], positions[:, 0, :compared])


@pytest.mark.parametrize("case", ROWS)
def test_internvl_prompts_equal_transformers(
    processors: dict[str, PromptProcessor], folder: Path, case: dict[str, Any]
) -> None:
    (processed,) = process(processors["internvl"], folder, case)
    hf = AutoProcessor.from_pretrained(folder / "internvl")
    expected = transformers_inputs(hf, case, folder)
    assert list(processed.prompt.token_ids) == expected["input_ids"][0].tolist()
    if processed.vision is None:
        assert "pixel_values" not in expected
        return
    assert torch.equal(processed.vision.pixels, expected["pixel_values"])
    assert processed.vision.grid is None and processed.vision.positions is None
    assert processed.vision.placeholders == (expected["input_ids"][0] == hf.image_token_id).nonzero().flatten().tolist()
    assert len(processed.vision.placeholders) == 4 * len(processed.vision.pixels)


def test_tiles_of_the_two_internvl_layouts_are_of_the_same_places(
    processors: dict[str, PromptProcessor], folder: Path
) -> None:
    """Undone the scaling, they differ as the resizes of Pillow, as chat code has it, and of torchvision do: at sharp
    edges by some levels of 255, where Pillow takes the other axis first."""
    for hf_layout, chat in zip(
        process(processors["internvl"], folder, *ROWS[:-1]),
        process(processors["internvl_chat"], folder, *ROWS[:-1]),
        strict=True,
    ):
        assert hf_layout.vision is not None and chat.vision is not None
        levels = []
        for name, vision in (("internvl", hf_layout.vision), ("internvl_chat", chat.vision)):
            images = processors[name].hf.image_processor
            mean, std = (torch.tensor(values).view(3, 1, 1) for values in (images.image_mean, images.image_std))
            levels.append(255 * (vision.pixels * std + mean))
        assert levels[0].shape == levels[1].shape
        assert (levels[0] - levels[1]).abs().mean() < 1  # two tiles in each other's place: some 60


@pytest.mark.parametrize("name", MODELS)
def test_preflight_counts_the_tokens_of_every_layout(folder: Path, name: str) -> None:
    config: Any = SimpleNamespace(model=SimpleNamespace(path=str(folder / name)))
    fields = json.loads((folder / name / "config.json").read_text())
    text = fields.get("text_config") or fields["llm_config"]
    assert checks.tokenizer(config).endswith(f"in a vocabulary of {text['vocab_size']}")


@pytest.mark.parametrize("name", MODELS)
def test_vllm_makes_the_same_of_the_marked_tokens_and_files(
    processors: dict[str, PromptProcessor], folder: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Token ids, pixel values, grids and position ids, bit for bit, with an engine's settings but without an engine."""
    from vllm.model_executor.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration
    from vllm.multimodal.inputs import MultiModalFeatureSpec
    from vllm.renderers import renderer_from_config

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    settings = engine_settings(
        model=str(folder / name),
        dtype="float32",
        max_model_len=1000,
        max_num_seqs=2,
        max_num_batched_tokens=1000,
        kv_cache_gib=0.01,
    )
    vllm_config = engine_server.engine_args(settings).create_engine_config()
    renderer = renderer_from_config(vllm_config)
    rows = ROWS[:-1] + (CLIPS if name == "qwen2_5_vl" else [])
    for processed in process(processors[name], folder, *rows):
        assert (processed.prompt.images or processed.prompt.videos) and processed.vision is not None
        batch = TokenBatch.from_bytes(batches.build([processed.prompt], [[]]).to_bytes())
        engine_input = engine_server.engine_input(renderer, batch.prompts[0])  # raises when the token ids differ
        items = [
            (place, kind, engine_input["mm_kwargs"][kind][item])
            for kind, places in engine_input["mm_placeholders"].items()
            for item, place in enumerate(places)
        ]
        items.sort(key=lambda entry: entry[0].offset)
        pixels = [data[key].data for _, _, data in items for key in data if key.startswith("pixel_values")]
        assert torch.equal(torch.cat(pixels), processed.vision.pixels)
        places = [
            place.offset + i
            for place, _, _ in items
            for i in range(place.length)
            if place.is_embed is None or place.is_embed[i]
        ]
        assert places == processed.vision.placeholders
        if processed.vision.grid is not None:
            grids = [data[f"{kind}_grid_thw"].data for _, kind, data in items]
            assert torch.equal(torch.stack(grids), processed.vision.grid)
            model = Qwen2_5_VLForConditionalGeneration.__new__(Qwen2_5_VLForConditionalGeneration)
            model.__dict__["config"] = vllm_config.model_config.hf_config
            features = [MultiModalFeatureSpec(data, kind, "", place) for place, kind, data in items]
            positions, _ = model.get_mrope_input_positions(engine_input["prompt_token_ids"], features)
            assert positions.tolist() == processed.vision.positions

    shorter = replace(processed.prompt, token_ids=processed.prompt.token_ids[:-1])
    with pytest.raises(
        engine_server.Refused,
        match=rf"prompt '{shorter.prompt_id}': the \d+ tokens that vLLM's processor makes of it are",
    ):
        engine_server.engine_input(renderer, shorter)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (row("<image>", ["none.png"]), r"rows\.jsonl:1: field images\[0\]: no file .*none\.png; names are relative to"),
        (
            row("no mark", ["i0.png"]),
            "field 'images' has 1 entries, the prompt has 0 times <image>: write <image> once",
        ),
        (row("<image> <image>", ["i0.png"]), "field 'images' has 1 entries, the prompt has 2 times <image>"),
        (row("<image>"), "field 'images' has 0 entries, the prompt has 1 times <image>"),
        (row("<video>", ["i0.png"]), "field 'images' has 1 entries, the prompt has 0 times <image>"),
        (row("<image>") | {"images": "i0.png"}, "field 'images' is not a list of file names"),
        (row("<video>") | {"videos": ["f0.png"]}, "field 'videos' is not a list of clips"),
        (row("<video>") | {"videos": [[]]}, "field 'videos' is not a list of clips"),
        (row("<image>", ["text.png"]), r"rows\.jsonl:1: row '0': field images\[0\]: .*text\.png: not a readable image"),
        (row("<image>", ["cut.png"]), r"field images\[0\]: .*cut\.png: a damaged image .*: replace it or drop the row"),
        (row("<image>", ["cut.jpg"]), r"field images\[0\]: .*cut\.jpg: a damaged image"),
        (row("<video>", videos=[["f0.png", "cut.png"]]), r"field videos\[0\]\[1\]: .*cut\.png: a damaged image"),
        (
            row("<video>", videos=[["f0.png", "i0.png"]]),
            r"frame 1 of a clip has \(56, 56\) pixels, the first has \(90, 64",
        ),
        (row("<image>", ["small.png"]), r"9 x 9 pixels are outside data\.images\.min_pixels=100 to max_pixels=200000"),
        (row("<image>", ["large.png"]), "500 x 401 pixels are outside .*: resize it or change the limit"),
        (row("<image>", ["thin.png"]), r"520 x 2 pixels are beyond data\.images\.max_aspect_ratio=250\.0: crop it"),
        (row("<image>", ["narrow.png"]), r"row '0': absolute aspect ratio must be smaller than 200, got 225"),
        (row("<image>" * 3, ["i3.png"] * 3), r"row '0' has 2\d\d prompt tokens, data\.max_prompt_tokens=200: raise it"),
        (row("<image> <|image_pad|>", ["i0.png"]), r"'prompt': .* has 2 times <\|image_pad\|>, for 1 files: take"),
    ],
)
def test_what_cannot_be_used_is_named_with_file_line_and_field(
    folder: Path, case: dict[str, Any], message: str
) -> None:
    (folder / "text.png").write_text("no image")
    for name, size in {"small": (9, 9), "large": (500, 401), "thin": (520, 2), "narrow": (450, 2)}.items():
        vision_models.draw(folder / f"{name}.png", *size, seed=0)
    for suffix in ("png", "jpg"):
        vision_models.draw(folder / f"whole.{suffix}", 90, 64, seed=0)
        (folder / f"cut.{suffix}").write_bytes((folder / f"whole.{suffix}").read_bytes()[:-1500])
    processor = PromptProcessor(str(folder / "qwen2_5_vl"), 200, LIMITS)
    with pytest.raises(ConfigError, match=r"rows\.jsonl:1: .*" + message.removeprefix(r"rows\.jsonl:1: ")):
        process(processor, folder, case)


@pytest.mark.parametrize("change", [-1, 1])
@pytest.mark.parametrize("name", MODELS)
def test_image_tokens_that_disagree_with_the_pixels_are_found(
    folder: Path, name: str, change: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    processor = PromptProcessor(str(folder / name), 1000, LIMITS)
    replace, token = processor.hf.replace_image_token, processor.hf.image_token
    monkeypatch.setattr(
        processor.hf,
        "replace_image_token",
        lambda *args, **options: replace(*args, **options).replace(token, token * (1 + change), 1),
    )
    with pytest.raises(ConfigError, match=r"row '0': .*image tokens .*do not agree with .*; change its images or drop"):
        process(processor, folder, row("<image> twice", ["i1.png"]))


def test_models_that_cannot_take_a_row_say_so(processors: dict[str, PromptProcessor], folder: Path) -> None:
    with pytest.raises(ConfigError, match="field 'videos': InternVL3 takes the frames of a clip as 'images'"):
        process(processors["internvl"], folder, CLIPS[0])
    text = folder / "text"
    tiny.make(text)
    processor = PromptProcessor(str(text / "model"), 1000, LIMITS)
    with pytest.raises(ConfigError, match=r"row '0': field images\[0\]: model\.path holds a text model"):
        process(processor, folder, ROWS[0])
    (processed,) = process(processor, folder, ROWS[-1])
    assert processed.vision is None and not processed.prompt.images and not processed.prompt.videos
    template = "<|im_start|>user\nthe task prompt without one<|im_end|>\n<|im_start|>assistant\n"
    assert processor.tokenizer.decode(processed.prompt.token_ids) == template


def test_a_processor_that_does_not_fit_the_model_is_refused(tmp_path: Path) -> None:
    def refused(make: Any, message: str, **changes: Any) -> None:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        make(folder, **changes)
        with pytest.raises(ConfigError, match=message):
            PromptProcessor(str(folder), 1000, LIMITS)

    qwen, internvl = vision_models.make_qwen2_5_vl, vision_models.make_internvl
    refused(qwen, r"has merge_size=4, config\.json has vision_config\.spatial_merge_size=2: take both", merge_size=4)
    refused(internvl, r"has image_seq_length=16, config\.json has image_seq_length=4", image_seq_length=16)
    chat = vision_models.make_internvl_chat
    refused(chat, r"its tokenizer has no '<IMG_CONTEXT>': take InternVL3's own", tokens=["<img>", "</img>"])
    refused(chat, r"config\.json has use_thumbnail=False; InternVL3 has true", use_thumbnail=False)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1"])
def test_images_of_other_modes_are_made_rgb(processors: dict[str, PromptProcessor], folder: Path, mode: str) -> None:
    vision_models.draw(folder / "mode.png", 90, 64, 3, mode)
    Image.open(folder / "mode.png").convert("RGB").save(folder / "rgb.png")
    processed, rgb = process(
        processors["qwen2_5_vl"], folder, row("<image>", ["mode.png"]), row("<image>", ["rgb.png"])
    )
    assert processed.vision is not None and rgb.vision is not None
    assert torch.equal(processed.vision.pixels, rgb.vision.pixels)
