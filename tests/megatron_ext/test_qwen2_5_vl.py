"""Both vision-language families against transformers in every layout; then Qwen2.5-VL's own: positions, names, limits.

InternVL3's own tests are in ``test_internvl3.py``.
"""

import json
import re
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
from megatron_ext.models import qwen2_5_vl
from tests.megatron_ext import cases, vl_twins
from tests.megatron_ext.ranks import Ranks
from tests.megatron_ext.reference import all_pieces, assemble
from tests.megatron_ext.test_hf_checkpoint import tensors_by_file
from tests.megatron_ext.test_layouts import above, of_tokens
from tests.megatron_ext.vl_twins import OPTIMIZER, RUNS, Reference, Results, Run

References = Callable[[Run], Reference]
every_run = pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
# (frames, rows, columns): whole windows; rests at the right, below, and both; clips; sides below a window.
GRIDS = ([(1, 8, 8)], [(1, 6, 10), (1, 2, 2)], [(3, 4, 6), (1, 10, 4)], [(2, 14, 18), (1, 2, 12), (4, 4, 4)])


@pytest.fixture(scope="module")
def folder(vision_launched: Ranks) -> Path:
    return vision_launched.folder


@pytest.fixture(scope="module")
def results(vision_launched: Ranks) -> Results:
    return vision_launched.results


@pytest.fixture(scope="module")
def reference(folder: Path) -> References:
    compute = cache(lambda twin, shared: vl_twins.reference(folder, Run("reference", twin=twin, shared_prompts=shared)))
    return lambda run: compute(run.twin, run.shared_prompts)


@pytest.fixture(scope="module")
def hugging_face(folder: Path) -> Qwen2_5_VLForConditionalGeneration:
    return Qwen2_5_VLForConditionalGeneration.from_pretrained(folder / "qwen", dtype=torch.float32)


def trained(run: Run, gradients: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Those of tensors that the run does not freeze."""
    frozen = [vl_twins.FROZEN_TENSORS[prefix] for prefix in run.frozen]
    return {name: g for name, g in gradients.items() if not any(re.match(pattern, name) for pattern in frozen)}


def scales(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensor → the norm that errors are relative to: its own. Adding one vector to all keys leaves a softmax as it is,
    so the gradient of a key's bias is rounding where no rotation comes between; there the query's shows the scale."""
    like_query = re.compile(r"(vision_tower.*)k_proj\.bias")
    return {name: tensors[like_query.sub(r"\1q_proj.bias", name)].norm() for name in tensors}


def errors(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> dict[str, float]:
    return {name: float((actual[name] - expected[name]).norm() / scale) for name, scale in scales(expected).items()}


@every_run
def test_the_tower_equals_transformers(run: Run, results: Results, reference: References) -> None:
    """With its projector; on the first pipeline stage only."""
    towers = [rank["rows"] for rank in results(run.name) if "rows" in rank]
    assert len(towers) == run.ranks // run.pipeline
    for rows in towers:
        assert rows.shape == reference(run).rows.shape
        assert above(errors({"rows": rows}, {"rows": reference(run).rows}), 2e-6) == {}


@every_run
def test_log_probs_equal_transformers(run: Run, results: Results, reference: References) -> None:
    """Packed, with and without images in a micro-batch; the pieces of data- and context-parallel ranks together."""
    actual, expected = of_tokens(results(run.name), "log_probs"), reference(run).log_probs
    assert actual.keys() == expected.keys()
    assert above({i: float((actual[i] - e).abs().max()) for i, e in expected.items()}, 1e-5) == {}


@every_run
def test_loss_and_gradient_norm_equal_transformers(run: Run, results: Results, reference: References) -> None:
    gradients = trained(run, reference(run).gradients).values()
    norm = float(torch.stack([g.norm() for g in gradients]).norm())
    assert norm > OPTIMIZER.clip_grad_norm  # clipping is at work
    for rank in results(run.name):
        assert rank["loss"] == pytest.approx(reference(run).loss, abs=2e-6)
        assert rank["grad_norm"] == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize("run", [r for r in RUNS if cases.has_whole_gradients(r)], ids=lambda run: run.name)
def test_every_gradient_equals_transformers(run: Run, results: Results, reference: References) -> None:
    """With and without recompute. A frozen tower has none but its projector's."""
    expected = trained(run, reference(run).gradients)
    actual = assemble(all_pieces(results(run.name), "gradients"), expected)
    assert above(errors(actual, expected), 2e-5) == {}


@every_run
def test_weights_after_a_step_equal_torch_adamw(
    run: Run, results: Results, reference: References, folder: Path
) -> None:
    """What is frozen keeps its bits."""
    start = vl_twins.tensors(folder / run.twin)
    expected = {name: torch.nn.Parameter(start[name].clone()) for name in trained(run, reference(run).gradients)}
    for name, parameter in expected.items():
        parameter.grad = reference(run).gradients[name].clone()
    groups = [
        {"params": [p for p in expected.values() if p.dim() > 1], "weight_decay": OPTIMIZER.weight_decay},
        {"params": [p for p in expected.values() if p.dim() == 1], "weight_decay": 0.0},
    ]
    adam = torch.optim.AdamW(groups, cases.SCHEDULE.learning_rate, OPTIMIZER.betas, OPTIMIZER.epsilon)
    torch.nn.utils.clip_grad_norm_(expected.values(), OPTIMIZER.clip_grad_norm)
    adam.step()
    actual = assemble(all_pieces(results(run.name), "weights"), start)
    assert [n for n, tensor in start.items() if n not in expected and not torch.equal(actual[n], tensor)] == []
    moved, should = ({n: tensors[n].detach() - start[n] for n in expected} for tensors in (actual, expected))
    assert above(errors(moved, should), 1e-3) == {}


@every_run
def test_pixels_are_where_the_tower_is(run: Run, results: Results) -> None:
    """On the ranks of the first stage alone, in the model's precision."""
    for rank in results(run.name):
        seen = {pixels for pixels in rank["pixels"] if pixels is not None}
        assert seen == ({"torch.float32"} if "rows" in rank else set())


@pytest.mark.parametrize("run", vl_twins.KEPT, ids=lambda run: run.name)
def test_a_frozen_encoder_runs_once_for_each_prompt_and_step(run: Run, results: Results) -> None:
    """With the bits of an encoder that runs in each pass over each micro-batch."""
    for rank in results(f"kept-{run.name}"):
        assert rank["seen"] == (rank["images"] if rank["has_tower"] else [])
        assert rank["kept_rows"] == [-(-rows // run.tensor) if rank["has_tower"] else 0 for rows in rank["rows"]]
        assert sum(rank["seen_without"]) >= 3 * sum(rank["seen"]), "in three passes"
        assert rank["log_probs"]
        assert rank["loss"][0] == rank["loss"][1]
        assert rank["gradients"] and rank["greatest"] > 0


def test_a_step_of_the_policy_runs_a_frozen_encoder_once_for_each_prompt(results: Results) -> None:
    """Under the reference's projector and its own, whose log-probs are the same before the first update, and in the
    micro-batches of both updates. Another encoder in the reference is refused."""
    (rank,) = results(f"policy-{vl_twins.KEPT[0].name}")
    assert rank["seen"] == rank["images"] and len(rank["seen"]) == 4
    assert rank["kl"] == 0
    assert re.search(r"vision\.\S+ is not the policy's, whose vision encoder is frozen", rank["error"])


@every_run
def test_padding_stays_zero(run: Run, results: Results) -> None:
    assert all(rank["padding_is_zero"] for rank in results(run.name))


@every_run
def test_a_round_trip_keeps_names_files_and_bits(run: Run, results: Results, folder: Path) -> None:
    assert results(run.name)
    source, export = folder / run.twin, folder / f"export-{run.name}"
    assert sorted(f.name for f in export.iterdir()) == sorted(f.name for f in source.iterdir())
    before, after = tensors_by_file(source), tensors_by_file(export)
    assert {file: list(t) for file, t in after.items()} == {file: list(t) for file, t in before.items()}
    differ = [n for file, t in before.items() for n, tensor in t.items() if not torch.equal(tensor, after[file][n])]
    assert differ == []
    for index in source.glob("*.index.json"):
        assert json.loads((export / index.name).read_text()) == json.loads(index.read_text())


def test_qwens_twin_has_several_files(folder: Path) -> None:
    assert len(list((folder / "qwen").glob("*.safetensors"))) > 2
    assert (folder / "qwen" / "model.safetensors.index.json").is_file()


@every_run
def test_a_rank_reads_only_what_it_owns(run: Run, results: Results, folder: Path) -> None:
    """The ranks of a replica read every number once between them; twice what tensor-parallel ranks both have (norms,
    embeddings of patches) and tied embeddings on two stages. Replicas read as much."""
    stored = sum(tensor.numel() for tensor in vl_twins.tensors(folder / run.twin).values())
    ranks = results(run.name)
    assert [rank["numbers_read"] for rank in ranks] == [rank["numbers_owned"] for rank in ranks]
    read = sum(rank["numbers_read"] for rank in ranks) / (run.data * run.context)
    assert read == stored if run.tensor == 1 and "tied" not in run.twin else 1 < read / stored < 1.2


def test_a_checkpoint_knows_how_the_tower_is_cut(results: Results) -> None:
    """Whole shapes of tensors cut by columns, by rows and not at all, from each rank's halves."""
    for rank in results("qwen-tp2"):
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
    positions = qwen2_5_vl.prompt_positions(config, tokens, grid, seconds)
    kinds = torch.tensor([[{config.image_token_id: 1, config.video_token_id: 2}.get(t, 0) for t in tokens]])
    images, clips = grid[grid[:, 0] == 1], grid[grid[:, 0] > 1]
    expected, _ = hugging_face.model.get_rope_index(torch.tensor([tokens]), kinds, images, clips, torch.tensor(seconds))
    assert positions == expected[:, 0].tolist()


def test_text_goes_on_after_a_clips_time(hugging_face: Qwen2_5_VLForConditionalGeneration) -> None:
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
    folder: Path, tmp_path: Path, hugging_face: Qwen2_5_VLForConditionalGeneration
) -> None:
    """transformers writes the published names, and its own where it read its own."""
    stored = vl_twins.tensors(folder / "qwen")
    hugging_face.save_pretrained(tmp_path / "own", save_original_format=False)
    state = load_file(tmp_path / "own" / "model.safetensors")
    assert not state.keys() & stored.keys() - {"lm_head.weight"}
    assert {vl_twins.published(name) for name in state} == stored.keys()
    shards = [
        Shard(name, torch.full_like(t, float("nan")), (Block(name, (0,) * t.dim(), (0,) * t.dim(), tuple(t.shape)),))
        for name, t in stored.items()
    ]
    hf_checkpoint.load(shards, tmp_path / "own")
    assert [s.name for s in shards if not torch.equal(s.tensor, stored[s.name])] == []
    hf_checkpoint.export(shards, tmp_path / "own", tmp_path / "export", writes=True)
    exported = load_file(tmp_path / "export" / "model.safetensors")
    assert list(exported) == list(state) and all(torch.equal(t, state[name]) for name, t in exported.items())


@pytest.mark.parametrize("tied", [False, True])
def test_where_embeddings_are_tied_is_read_from_the_outer_configuration(tied: bool, tmp_path: Path) -> None:
    vl_twins.make_qwen2_5_vl(tmp_path, tied)
    config = Qwen2_5_VLForConditionalGeneration.config_class.from_pretrained(tmp_path)
    text = qwen2_5_vl.text_config(config)
    (language, _) = qwen2_5_vl.param_mappings(config, 1, 0)
    (head,) = (p.hf_names[0] for p in language.params if p.megatron_name == "output_layer.weight")
    assert text.tie_word_embeddings is tied
    assert head == ("model.embed_tokens.weight" if tied else "lm_head.weight")
    assert (head in vl_twins.tensors(tmp_path)) and not hasattr(config.text_config, "tie_word_embeddings")


def test_a_tensor_parallel_size_that_does_not_divide_the_tower_is_refused(
    hugging_face: Qwen2_5_VLForConditionalGeneration,
) -> None:
    with pytest.raises(ValueError, match=r"parallel\.tensor=5 does not divide the vision tower's ffn size 72"):
        qwen2_5_vl.param_mappings(hugging_face.config, 5, 0)
