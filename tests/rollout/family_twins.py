"""A tiny random model of each family with its special features on, and the ranks that export it from Megatron-Core.

Head sizes are those for which vLLM has attention on a CPU.
"""

import json
import os
import subprocess
import sys
import time
import unittest.mock
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import (
    AutoModelForImageTextToText,
    InternVLConfig,
    Qwen2_5_VLConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from megatron_ext import hf_checkpoint, model, parallel, platform
from megatron_ext.batch import TokenBatch
from megatron_ext.blocks import Shard
from megatron_ext.packing import sequence_positions
from recipes.data.processor import ProcessedPrompt, PromptProcessor
from recipes.data.settings import ImagesConfig
from recipes.launch.launcher import fork_ranks
from rollout.engine import Engine, EngineSettings, stop_engines
from rollout.sampler import in_order, make_requests
from rollout.sampling import Sampling
from rollout.weight_sync.sync import WeightSync
from tests import settings
from tests.megatron_ext import internvl_twins
from tests.recipes import tiny, vision_models
from tests.responses import make_prompt, plain
from tests.rollout.vllm_processes import as_argument, sampling_from

SYNCED = "qwen2_5_vl"  # is synced too
STARTUP_SECONDS = 400
MAX_TOKENS = 6
IMAGE_TOKENS = 300  # of the vocabulary, the last: those of images


def qwen2(folder: Path) -> Any:
    """Biases on query, key and value; embeddings tied."""
    config = Qwen2Config(
        hidden_size=128, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=303, max_position_embeddings=256, rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
    )  # fmt: skip
    return Qwen2ForCausalLM(config)


def qwen3(folder: Path) -> Any:
    """QK-norm; heads that are wider than the model together; three key-value heads, for two ranks; untied."""
    config = Qwen3Config(
        hidden_size=96, intermediate_size=96, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=3,
        head_dim=64, vocab_size=303, max_position_embeddings=256,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, tie_word_embeddings=False,
    )  # fmt: skip
    return Qwen3ForCausalLM(config)


def qwen2_5_vl(folder: Path) -> Any:
    """mRoPE; two layers of the tower see windows, the last one the whole image."""
    config = Qwen2_5_VLConfig.from_pretrained(vision_models.make_qwen2_5_vl(folder))
    config.vision_config.depth = 3
    config.vision_config.fullatt_block_indexes = [2]
    return AutoModelForImageTextToText.from_config(config)


def internvl(folder: Path, twin: str) -> Any:
    """InternViT-6B's QK-norm over all heads or 300M's biases, five heads; dynamic RoPE; the ``-hf`` layout."""
    config = InternVLConfig.from_pretrained(vision_models.make_internvl(folder))
    features = {"hidden_size": 80, "num_attention_heads": 5, "num_hidden_layers": 2, **internvl_twins.TWINS[twin]}
    for name, value in features.items():
        setattr(config.vision_config, name, value)
    config.text_config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    config.text_config.tie_word_embeddings = config.tie_word_embeddings = False
    return AutoModelForImageTextToText.from_config(config)


MAKERS: dict[str, Callable[[Path], Any]] = {
    "qwen2": qwen2,
    "qwen3": qwen3,
    "qwen2_5_vl": qwen2_5_vl,
    "internvl_6b": lambda folder: internvl(folder, "6b"),
    "internvl_300m": lambda folder: internvl(folder, "300m"),
}


@dataclass(frozen=True)
class Twin:
    """A model's folder of the hub's layout, transformers' model with its weights, prompts, and what ends a response."""

    folder: Path
    hugging_face: Any
    prompts: list[ProcessedPrompt]
    stop: tuple[int, ...]


def engine_settings(folder: Path) -> EngineSettings:
    return settings.engine_settings(
        model=str(folder),
        dtype="float32",
        max_model_len=208,
        max_num_seqs=8,
        max_num_batched_tokens=208,  # less than the prompts of a batch: they enter over several steps
        kv_cache_gib=0.02,
    )


def make(folder: Path) -> dict[str, Twin]:
    """``<name>/`` for each family in ``folder``, InternVL also as ``<name>_chat/``; images for their prompts."""
    twins = {}
    for name, maker in MAKERS.items():
        torch.manual_seed(0)
        hugging_face = maker(folder / name).float().eval()
        with torch.no_grad():
            for parameter_name, parameter in hugging_face.named_parameters():
                _draw(parameter_name, parameter)
            if hasattr(hugging_face.config, "vision_config"):
                hugging_face.get_input_embeddings().weight.mul_(5)  # or responses repeat one token
                hugging_face.lm_head.weight[IMAGE_TOKENS:] = 0  # or they end at once
        hugging_face.save_pretrained(folder / name)
        twins[name] = _twin(folder / name, hugging_face)
        if name.startswith("internvl"):
            _chat_layout(folder / name, folder / f"{name}_chat")
            twins[f"{name}_chat"] = _twin(folder / f"{name}_chat", hugging_face)
    return twins


def _draw(name: str, parameter: torch.Tensor) -> None:
    """No parameter keeps its initial value, so that none can be mixed up."""
    if ("norm" in name or "ln_q" in name) and name.endswith("weight"):
        parameter.normal_(1.0, 0.2)
    elif "lambda" in name:
        parameter.uniform_(0.3, 1.2)
    else:
        parameter.normal_(0.0, 0.1)


def _chat_layout(source: Path, target: Path) -> None:
    internvl_twins._to_chat_layout(source, target)
    vision_models.tokenizer([*vision_models.INTERNVL_TOKENS, "<video>"], tiny.TEMPLATE).save_pretrained(target)
    config = json.loads((target / "config.json").read_text())
    config |= {"use_thumbnail": True, "min_dynamic_patch": 1, "max_dynamic_patch": 6}
    config["vision_config"]["initializer_factor"] = 0.1
    (target / "config.json").write_text(json.dumps(config))


def _twin(folder: Path, hugging_face: Any) -> Twin:
    """Prompts of text alone, of one and of several images, and for Qwen of a clip."""
    if not hasattr(hugging_face.config, "vision_config"):
        texts = [[3 + (7 * n + 3 * i) % 290 for i in range(5 + 12 * n)] for n in range(4)]
        prompts = [ProcessedPrompt(make_prompt(f"p{n}", text), None) for n, text in enumerate(texts)]
        return Twin(folder, hugging_face, prompts, (2,))
    sizes = [(100, 60), (40, 300), (84, 57)]
    images = [str(folder / vision_models.draw(folder / f"i{n}.png", *size, n)) for n, size in enumerate(sizes)]
    frames = [str(folder / vision_models.draw(folder / f"f{n}.png", 64, 48, 10 + n)) for n in range(3)]
    rows: list[dict[str, Any]] = [
        {"id": "images", "prompt": "see <image> and <image>!", "images": images[:2]},
        {"id": "image", "prompt": "<image>", "images": images[2:]},
        {"id": "text", "prompt": "a prompt without"},
    ]
    tokens = vision_models.INTERNVL_TOKENS
    if hugging_face.config.model_type == "qwen2_5_vl":
        rows.append({"id": "clip", "prompt": "<video> then <image>", "images": images[1:2], "videos": [frames]})
        tokens = vision_models.QWEN_TOKENS
    processor = PromptProcessor(str(folder), 200, ImagesConfig(100, 100_000, 20.0))
    # A response that ends at an image token never shows one to transformers, which would want an image for it.
    stop = tuple(processor.tokenizer.convert_tokens_to_ids(tokens))
    return Twin(folder, hugging_face, [processor(row) for row in rows], stop)


def greedy(twin: Twin, processed: ProcessedPrompt) -> tuple[list[int], list[float]]:
    """transformers' most probable tokens, one forward of everything for each, and their log-probs."""
    tokens: list[int] = []
    logprobs: list[float] = []
    while len(tokens) < MAX_TOKENS and not set(tokens) & set(twin.stop):
        ids = torch.tensor([[*processed.prompt.token_ids.tolist(), *tokens]])
        with torch.no_grad():
            logits = twin.hugging_face(input_ids=ids, **_vision_inputs(twin.hugging_face, processed, tokens)).logits[
                0, -1
            ]
        best = int(logits.argmax())
        tokens.append(best)
        logprobs.append(float(logits.log_softmax(-1)[best]))
    return tokens, logprobs


def _vision_inputs(hugging_face: Any, processed: ProcessedPrompt, response: list[int]) -> dict[str, Any]:
    """The trainer's pixels and positions as transformers' model takes them: images and clips apart."""
    config, vision = hugging_face.config, processed.vision
    if not hasattr(config, "vision_config") or vision is None:
        return {}
    if vision.grid is None:
        return {"pixel_values": vision.pixels}
    positions = sequence_positions(len(processed.prompt.token_ids) + len(response), vision)
    inputs: dict[str, Any] = {"position_ids": torch.tensor(positions)[:, None]}
    pixels = vision.pixels.split(vision.grid.prod(1).tolist())
    first = vision.grid.prod(1).cumsum(0) // 4 - vision.grid.prod(1) // 4
    kinds = torch.tensor([int(processed.prompt.token_ids[vision.placeholders[place]]) for place in first])
    for token, data, size in (
        (config.image_token_id, "pixel_values", "image_grid_thw"),
        (config.video_token_id, "pixel_values_videos", "video_grid_thw"),
    ):
        if token in kinds:
            inputs[data] = torch.cat([p for p, kind in zip(pixels, kinds, strict=True) if kind == token])
            inputs[size] = vision.grid[kinds == token]
    return inputs


def save_work(folder: Path, twins: dict[str, Twin]) -> None:
    """What :func:`main` and the engine do: one greedy response to each prompt of each twin."""
    work = {}
    for name, twin in twins.items():
        requests = make_requests([processed.prompt for processed in twin.prompts], 1, seed=0, step=0)
        (folder / f"{name}-requests").write_bytes(requests.to_bytes())
        work[name] = as_argument(Sampling(MAX_TOKENS, twin.stop, temperature=0.0))
    (folder / "work.json").write_text(json.dumps(work))


def load_work(folder: Path) -> dict[str, tuple[TokenBatch, Sampling]]:
    """Inverse of :func:`save_work`: each twin's requests and sampling."""
    work = {}
    for name, sampling in json.loads((folder / "work.json").read_text()).items():
        requests = TokenBatch.from_bytes((folder / f"{name}-requests").read_bytes())
        work[name] = requests, sampling_from(sampling)
    return work


def main(folder: str, program: str) -> None:
    """Two ranks, forked: each twin of ``work.json`` through Megatron-Core to
    ``<name>-export/``; then one is synced to an engine that ``program`` becomes when it is through with the
    exports. What that engine has and says after each sync goes to ``synced.json``.
    """
    here = Path(folder)
    platform.activate("cpu")
    fork_ranks(2)
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", store=dist.FileStore(str(here / "store"), 2), rank=rank, world_size=2)
    layout = parallel.initialize(
        settings.parallel_config(tensor=2, distributed_optimizer=False), seed=1, timeout_seconds=600
    )
    work = load_work(here)
    policies = {}
    for name in work:
        policies[name] = model.build(hf_checkpoint.config(here / name), layout, settings.precision_config("fp32"))
        hf_checkpoint.load(policies[name].shards, here / name)
        hf_checkpoint.export(policies[name].shards, here / name, here / f"{name}-export", writes=True)
    engines = [_start_engine(here / f"{SYNCED}-export", program)] if rank == 0 else []
    try:
        _sync(policies[SYNCED].shards, engines, here, *work[SYNCED])
    finally:
        stop_engines(engines)


def _start_engine(folder: Path, program: str) -> Engine:
    """The module ``program`` in the engine server's place, ready."""
    popen = subprocess.Popen

    def start(command: list[str], **options: Any) -> "subprocess.Popen[bytes]":
        return popen([program if word == "rollout.engine_server" else word for word in command], **options)

    with unittest.mock.patch("subprocess.Popen", start):
        engine = Engine(engine_settings(folder), folder.with_name("engine.log"))
    engine.wait_until_ready(time.monotonic() + STARTUP_SECONDS)
    return engine


def _sync(shards: list[Shard], engines: list[Engine], folder: Path, requests: TokenBatch, sampling: Sampling) -> None:
    """The twin's weights, others, and the twin's again."""
    weight_sync = WeightSync(
        shards, engines, dist.group.WORLD, bucket_bytes=1 << 20, verify_every=1, plans=folder / "plans"
    )
    states = []
    for version in (1, 2, 3):
        hf_checkpoint.load(shards, folder / SYNCED)
        if version == 2:
            for shard in shards:
                shard.tensor.mul_(1.5)
        weight_sync.sync(version)
        for engine in engines:
            responses = plain(in_order(requests.keys, engine.generate(requests, sampling)))
            digests = engine.call("GET", "/weights/digest")["workers"]
            states.append({"workers": digests, "responses": [asdict(response) for response in responses]})
    if engines:
        (folder / "synced.partial").write_text(json.dumps(states))
        (folder / "synced.partial").rename(folder / "synced.json")


if __name__ == "__main__":
    main(*sys.argv[1:])
