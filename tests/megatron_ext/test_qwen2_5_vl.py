"""Qwen2.5-VL against transformers, on one rank and on two: tower, positions, names, log-probs, loss, gradients."""

import os
import unittest.mock
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen2_5_VLForConditionalGeneration
from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

from megatron_ext import hf_checkpoint
from megatron_ext.blocks import Block, Shard
from megatron_ext.layout import Layout
from megatron_ext.models import qwen2_5_vl
from tests.megatron_ext import vl_twins
from tests.megatron_ext.reference import all_pieces, assemble

# name → (layout, prefixes of frozen parameters)
RUNS: dict[str, tuple[Layout, tuple[str, ...]]] = {
    "one": (Layout(), ()),
    "one-frozen": (Layout(), ("vision",)),
    "tp2": (Layout(tensor=2), ()),
    "tp2-sp": (Layout(tensor=2, sequence=True), ()),
    "pp2": (Layout(pipeline=2), ()),
    "pp2-vp2": (Layout(pipeline=2, virtual=2), ()),
    "cp2": (Layout(context=2), ()),
}
every_run = pytest.mark.parametrize("name", RUNS)
# (frames, rows, columns): whole windows; rests at the right, below, and both; clips; sides below a window.
GRIDS = ([(1, 8, 8)], [(1, 6, 10), (1, 2, 2)], [(3, 4, 6), (1, 10, 4)], [(2, 14, 18), (1, 2, 12), (4, 4, 4)])
Results = Callable[[str], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qwen2_5_vl") / "twin"
    vl_twins.make_qwen2_5_vl(folder)
    return folder


@pytest.fixture(scope="module")
def hugging_face(twin: Path) -> Qwen2_5_VLForConditionalGeneration:
    return Qwen2_5_VLForConditionalGeneration.from_pretrained(twin, dtype=torch.float32, attn_implementation="eager")


@pytest.fixture(scope="module")
def reference(hugging_face: Qwen2_5_VLForConditionalGeneration) -> dict[str, Any]:
    """transformers on the same batch, one sequence at a time: log-probs by sequence, loss, gradients by tensor."""
    log_probs, loss = {}, torch.zeros(())
    for i, s in enumerate(vl_twins.batch(hugging_face.config)):
        inputs = vl_twins.hugging_face_inputs(hugging_face.config, s)
        logits = hugging_face(**inputs).logits[0, len(s.prompt) - 1 : -1]
        found = torch.distributions.Categorical(logits=logits).log_prob(torch.tensor(s.response))
        log_probs[i] = found.detach()
        loss = loss - found.mean() / len(vl_twins.SIZES)
    loss.backward()
    gradients = {vl_twins.published(name): p.grad for name, p in hugging_face.named_parameters()}
    return {"log_probs": log_probs, "loss": loss.item(), "gradients": gradients}


@pytest.fixture(scope="module")
def results(twin: Path) -> Results:
    """``results(run)`` is what each rank found, by rank: two processes go through all of ``RUNS``."""
    environment = {"OMP_NUM_THREADS": "1", "TORCH_COMPILE_DISABLE": "1"}
    with unittest.mock.patch.dict(os.environ, environment):
        torch.multiprocessing.spawn(vl_twins.run, (str(twin), RUNS), nprocs=2)

    @cache
    def load(name: str) -> list[dict[str, Any]]:
        return [torch.load(file, weights_only=True) for file in sorted(twin.parent.glob(f"{name}.*.pt"))]

    return load


def relative_errors(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> dict[str, float]:
    return {n: float((found[n] - e).norm() / e.norm()) for n, e in expected.items()}


@every_run
def test_the_tower_equals_transformers(
    name: str, results: Results, hugging_face: Qwen2_5_VLForConditionalGeneration
) -> None:
    vision = [s.vision for s in vl_twins.batch(hugging_face.config) if s.vision is not None]
    with torch.no_grad():
        expected = [hugging_face.model.visual(v.pixels, grid_thw=v.grid).pooler_output for v in vision]
    towers = [rank["tower"] for rank in results(name) if "tower" in rank]
    assert len(towers) == (1 if RUNS[name][0].pipeline == 2 else len(results(name)))
    for found in towers:
        assert found.shape == torch.cat(expected).shape
        assert relative_errors({"tower": found}, {"tower": torch.cat(expected)})["tower"] < 2e-6


@every_run
def test_log_probs_equal_transformers(name: str, results: Results, reference: dict[str, Any]) -> None:
    """Packed, with and without images in a micro-batch; the pieces of context-parallel ranks together."""
    found: dict[int, dict[int, float]] = {}
    for rank in results(name):
        for index, (places, values) in rank["log_probs"].items():
            found.setdefault(index, {}).update(zip(places.tolist(), values.tolist(), strict=True))
    assert sorted(found) == sorted(reference["log_probs"])
    for index, expected in reference["log_probs"].items():
        values = torch.tensor([found[index][place] for place in range(len(expected))])
        assert (values - expected).abs().max() < 1e-5


@every_run
def test_the_loss_equals_transformers(name: str, results: Results, reference: dict[str, Any]) -> None:
    for rank in results(name):
        assert rank["loss"] == pytest.approx(reference["loss"], abs=2e-6)


@every_run
def test_every_gradient_equals_transformers(name: str, results: Results, reference: dict[str, Any]) -> None:
    """A frozen tower has none but its projector's."""
    expected = reference["gradients"]
    if "vision" in RUNS[name][1]:
        frozen = {n for n in expected if n.startswith("visual.") and not n.startswith("visual.merger.")}
        assert len(frozen) == 1 + 4 * 12  # patch embedding and layers
        expected = {n: g for n, g in expected.items() if n not in frozen}
    found = assemble(all_pieces(results(name), "gradients"), expected)
    assert {n: e for n, e in relative_errors(found, expected).items() if not e < 2e-5} == {}


@every_run
def test_a_round_trip_keeps_every_tensor(name: str, twin: Path, results: Results) -> None:
    assert results(name)
    before, after = (load_file(folder / "model.safetensors") for folder in (twin, twin.parent / f"export-{name}"))
    assert list(after) == list(before)
    assert [n for n in before if not torch.equal(before[n], after[n])] == []


def test_a_checkpoint_knows_how_the_tower_is_cut(results: Results) -> None:
    """Whole shapes of tensors cut by columns, by rows and not at all, from each rank's halves."""
    for rank in results("tp2"):
        expected = {
            "vision.patch_embed.weight": [48, 3, 2, 4, 4],
            "vision.layers.3.self_attention.linear_qkv.weight": [144, 48],
            "vision.layers.3.self_attention.linear_proj.weight": [48, 48],
            "vision.layers.3.mlp.linear_fc2.weight": [48, 72],
            "vision.layers.3.mlp.linear_fc2.bias": [48],
            "vision.projector.linear_fc1.weight": [192, 192],
            "vision.projector.norm.weight": [48],
        }
        assert rank["whole_shapes"] | expected == rank["whole_shapes"]


@pytest.mark.parametrize("grids", GRIDS, ids=str)
def test_windows_and_rotary_angles_equal_transformers(
    grids: list[tuple[int, int, int]], hugging_face: Qwen2_5_VLForConditionalGeneration
) -> None:
    vision, grid = hugging_face.config.vision_config, torch.tensor(grids)
    order, windows = qwen2_5_vl.window_order(grid.tolist(), merge=2, side=2)
    expected, starts = get_vision_window_index(grid, spatial_merge_size=2, window_size=16, patch_size=4)
    assert torch.equal(order, expected)
    assert [4 * units for units in windows] == starts.diff().tolist()
    angles = qwen2_5_vl.rotary_angles(grid.tolist(), vision)
    cos, sin = hugging_face.model.visual.rotary_pos_emb(torch.zeros(()), get_vision_position_ids(grid, 2))
    assert torch.equal(angles.cos(), cos) and torch.equal(angles.sin(), sin)


def prompt(hf_config: Any, sizes: list[tuple[int, int, int]]) -> list[int]:
    tokens = [3, 4]
    for n, size in enumerate(sizes):
        tokens += vl_twins.placeholders(hf_config, size) + [5] * n
    return tokens


@pytest.mark.parametrize(
    ("sizes", "seconds"),
    [
        ([(1, 8, 8)], []),
        ([(1, 6, 10), (1, 2, 2), (1, 10, 6)], []),
        ([(3, 8, 6)], [0.5]),
        ([(4, 4, 8), (1, 4, 2), (2, 8, 2)], [0.25, 0.75]),
        ([(3, 4, 10), (2, 2, 4)], [0.8, 0.5]),
    ],
    ids=str,
)
def test_positions_equal_transformers(
    sizes: list[tuple[int, int, int]], seconds: list[float], hugging_face: Qwen2_5_VLForConditionalGeneration
) -> None:
    """Clips here end before their sides do, in time: see the next test."""
    config = hugging_face.config
    tokens, grid = prompt(config, sizes), torch.tensor(sizes)
    found = qwen2_5_vl.prompt_positions(config, tokens, grid, seconds)
    kinds = torch.tensor([[{config.image_token_id: 1, config.video_token_id: 2}.get(t, 0) for t in tokens]])
    images, clips = grid[grid[:, 0] == 1], grid[grid[:, 0] > 1]
    expected, _ = hugging_face.model.get_rope_index(torch.tensor([tokens]), kinds, images, clips, torch.tensor(seconds))
    assert found == expected[:, 0].tolist()


def test_text_goes_on_behind_a_clips_time(hugging_face: Qwen2_5_VLForConditionalGeneration) -> None:
    """As in vLLM and Qwen's code: the greatest position of 3 frames, 2 seconds apart at 2 a second, is 2 + 1 + 8."""
    config = hugging_face.config
    tokens = [*prompt(config, [(3, 2, 4)]), 6]
    assert qwen2_5_vl.prompt_positions(config, tokens, torch.tensor([[3, 2, 4]]), [2.0]) == [
        [0, 1, 2, 3, 3, 7, 7, 11, 11, 12, 13],
        [0, 1, 2, 3, 3, 3, 3, 3, 3, 12, 13],
        [0, 1, 2, 3, 4, 3, 4, 3, 4, 12, 13],
    ]


@pytest.mark.parametrize(
    ("grid", "seconds", "message"),
    [
        ([(1, 4, 4)], [], "the 4 tokens from place 3 on are not one image or clip of rows=2 columns=2"),
        ([(1, 2, 4), (2, 2, 2)], [], r"seconds=\[\]: give a positive number for each video clip"),
        ([(1, 2, 4)], [], "more placeholder tokens than the grid"),
        ([(1, 2, 4), (2, 2, 2), (1, 2, 2)], [1.0], "the 0 tokens from place"),
    ],
)
def test_tokens_that_do_not_fit_the_grid_are_refused(
    grid: list[tuple[int, int, int]],
    seconds: list[float],
    message: str,
    hugging_face: Qwen2_5_VLForConditionalGeneration,
) -> None:
    config = hugging_face.config
    with pytest.raises(ValueError, match=message):
        qwen2_5_vl.prompt_positions(config, prompt(config, [(1, 2, 4), (2, 2, 2)]), torch.tensor(grid), seconds)


def test_both_ways_of_naming_tensors_are_known(
    twin: Path, tmp_path: Path, hugging_face: Qwen2_5_VLForConditionalGeneration
) -> None:
    """transformers writes the published names, and its own where it read its own."""
    stored = load_file(twin / "model.safetensors")
    hugging_face.save_pretrained(tmp_path / "own", save_original_format=False)
    own = load_file(tmp_path / "own" / "model.safetensors")
    assert not own.keys() & stored.keys() - {"lm_head.weight"}
    assert {vl_twins.published(name) for name in own} == stored.keys()
    shards = [
        Shard(name, torch.full_like(t, float("nan")), (Block(name, (0,) * t.dim(), (0,) * t.dim(), tuple(t.shape)),))
        for name, t in stored.items()
    ]
    hf_checkpoint.load(shards, tmp_path / "own")
    assert [s.name for s in shards if not torch.equal(s.tensor, stored[s.name])] == []
    hf_checkpoint.export(shards, tmp_path / "own", tmp_path / "export", writes=True)
    exported = load_file(tmp_path / "export" / "model.safetensors")
    assert list(exported) == list(own) and all(torch.equal(t, own[name]) for name, t in exported.items())


@pytest.mark.parametrize("tied", [False, True])
def test_where_embeddings_are_tied_is_read_from_the_outer_configuration(tied: bool, tmp_path: Path) -> None:
    vl_twins.make_qwen2_5_vl(tmp_path, tied)
    config = Qwen2_5_VLForConditionalGeneration.config_class.from_pretrained(tmp_path)
    text = qwen2_5_vl.text_config(config)
    (language, _) = qwen2_5_vl.parts(config, 1, 0)
    (head,) = (rule.hf[0] for rule in language.rules if rule.megatron == "output_layer.weight")
    assert text.tie_word_embeddings is tied
    assert head == ("model.embed_tokens.weight" if tied else "lm_head.weight")
    assert (head in load_file(tmp_path / "model.safetensors")) and not hasattr(
        config.text_config, "tie_word_embeddings"
    )


def test_a_tensor_parallel_size_that_does_not_divide_the_tower_is_refused(
    hugging_face: Qwen2_5_VLForConditionalGeneration,
) -> None:
    with pytest.raises(ValueError, match=r"parallel\.tensor=5 does not divide the vision tower's ffn size 72"):
        qwen2_5_vl.parts(hugging_face.config, 5, 0)
