"""vLLM on the CPU samples from prompts with images and clips as a plain forward on the trainer's inputs says.

The engine is a program of its own, ``python -m tests.rollout.test_vllm_vision SETTINGS SAMPLING FOLDER``.
"""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, Qwen2_5_VLForConditionalGeneration

from megatron_ext.batch import TokenBatch
from megatron_ext.packing import sequence_positions
from recipes.data.processor import ProcessedPrompt, PromptProcessor
from recipes.data.settings import ImagesConfig
from rollout import engine_server
from rollout.engine import EngineSettings, environment
from rollout.sampler import make_requests
from rollout.sampling import Sampling
from tests import warm
from tests.recipes import vision_models
from tests.responses import PlainResponse, plain
from tests.rollout.vllm_processes import REQUESTS, as_argument, generate, sampling_from
from tests.settings import engine_settings

ROOT = Path(__file__).resolve().parents[2]
NORM = "visual.merger.ln_q.weight"
SAMPLES = 3
RESPONSES = ("before.safetensors", "after.safetensors")


def main(settings: str, sampling: str, folder: str) -> None:
    """Responses by the weights on disk, then by the same with one tensor of the tower doubled."""
    loaded = replace(EngineSettings.from_json(settings), loads_weights=True)
    loop = engine_server.EngineLoop(loaded, engine_server.build_llm_engine(loaded))
    requests = TokenBatch.from_bytes(Path(folder, REQUESTS).read_bytes())
    for name in RESPONSES:
        responses = generate(loop, requests, sampling_from(sampling))
        Path(folder, name).write_bytes(responses.to_bytes())
        loop.llm.apply_model(lambda model: dict(model.named_parameters())[NORM].data.mul_(2))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = vision_models.make_qwen2_5_vl(tmp_path_factory.mktemp("qwen2_5_vl"))
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(AutoConfig.from_pretrained(folder)).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0, 0.2) if "norm" in name or "ln_q" in name else parameter.normal_(0.0, 0.1)
    model.save_pretrained(folder)
    return model


def logprobs(model: Any, processed: ProcessedPrompt, response: PlainResponse) -> torch.Tensor:
    """Of the response's tokens, by transformers' model on the trainer's pixel values and position ids."""
    tokens = response.prompt + response.tokens[:-1]
    ids = torch.tensor([tokens])
    positions = np.broadcast_to(sequence_positions(len(tokens), processed.vision), (3, len(tokens)))
    inputs: dict[str, Any] = {"position_ids": torch.tensor(positions)[:, None]}
    if processed.vision is not None:
        assert processed.vision.grid is not None
        placeholders = [tokens[place] for place in processed.vision.placeholders]
        pixels = processed.vision.pixels.split(processed.vision.grid.prod(1).tolist())
        kinds = []
        place = 0
        for grid in processed.vision.grid:
            kinds.append(placeholders[place] == model.config.video_token_id)
            place += int(grid.prod()) // 4
        for is_clip, data, size in (
            (False, "pixel_values", "image_grid_thw"),
            (True, "pixel_values_videos", "video_grid_thw"),
        ):
            if is_clip in kinds:
                inputs[data] = torch.cat([p for p, kind in zip(pixels, kinds, strict=True) if kind == is_clip])
                inputs[size] = processed.vision.grid[torch.tensor(kinds) == is_clip]
    with torch.no_grad():
        all_logprobs = model(input_ids=ids, **inputs).logits[0].log_softmax(-1)
    answer = torch.tensor(response.tokens)
    return all_logprobs[-len(answer) :].gather(-1, answer[:, None])[:, 0]


def test_responses_are_those_of_the_trainers_inputs_also_after_the_tower_changed(model: Any, tmp_path: Path) -> None:
    """In FP32. What vLLM keeps of an image must not outlive the weights that saw it."""
    names = [vision_models.draw(tmp_path / f"{n}.png", *size, n) for n, size in enumerate([(100, 60), (40, 300)])]
    images = [str(tmp_path / name) for name in names]
    frames = [str(tmp_path / vision_models.draw(tmp_path / f"f{n}.png", 64, 48, 10 + n)) for n in range(3)]
    rows = [
        {"id": "images", "prompt": "see <image> and <image>!", "images": images},
        {"id": "clip", "prompt": "<video> then <image>", "images": images[1:], "videos": [frames]},
        {"id": "text", "prompt": "a prompt without"},
    ]
    processor = PromptProcessor(model.config._name_or_path, 200, ImagesConfig(100, 100_000, 20.0))
    processed = {row["id"]: processor(row) for row in rows}
    settings = engine_settings(
        model=model.config._name_or_path,
        dtype="float32",
        max_model_len=208,
        max_num_seqs=8,
        max_num_batched_tokens=208,  # less than the prompts of a batch: they enter over several steps
        kv_cache_gib=0.05,
    )
    # A response that ends at an image token never shows one to transformers, which would want an image for it.
    stop = tuple(processor.tokenizer.convert_tokens_to_ids(vision_models.QWEN_TOKENS))
    sampling = Sampling(max_tokens=8, stop_token_ids=stop)
    requests = make_requests([prompt.prompt for prompt in processed.values()], SAMPLES, seed=1, step=0)
    (tmp_path / REQUESTS).write_bytes(requests.to_bytes())
    arguments = (as_argument(settings), as_argument(sampling), str(tmp_path))
    with warm.processes():
        log = subprocess.run(
            [sys.executable, "-m", "tests.rollout.test_vllm_vision", *arguments],
            cwd=ROOT,
            env=environment(settings) | {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=400,
        )
    assert log.returncode == 0, log.stdout.decode()[-4000:]
    before, after = (plain(TokenBatch.from_bytes((tmp_path / name).read_bytes())) for name in RESPONSES)
    assert [r.key for r in before] == [r.key for r in after] == requests.keys
    assert len(before) == SAMPLES * len(rows)
    for responses in (before, after):
        for response in responses:
            expected = logprobs(model, processed[response.prompt_id], response)
            assert (expected - torch.tensor(response.logprobs)).abs().max() < 2e-5
        with torch.no_grad():
            model.model.visual.merger.ln_q.weight.mul_(2)
    old = {response.prompt_id: response.logprobs for response in before if response.sample_index == 0}
    new = {response.prompt_id: response.logprobs for response in after if response.sample_index == 0}
    assert old["text"] == new["text"] and old["images"] != new["images"] and old["clip"] != new["clip"]


if __name__ == "__mp_main__":
    engine_server.die_with_engine()
if __name__ == "__main__":
    main(*sys.argv[1:])
