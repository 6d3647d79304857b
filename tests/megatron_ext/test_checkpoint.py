"""Resuming is exact, another layout may go on, and neither a wrong layout nor an interrupted save is taken for good."""

import binascii
import json
from math import prod
from pathlib import Path

import pytest
import torch

from megatron_ext import checkpoint, optimizer_shards
from tests.megatron_ext import cases, vl_twins
from tests.megatron_ext.cases import Case
from tests.megatron_ext.ranks import Ranks, RanksOf
from tests.megatron_ext.reference import all_pieces, assemble, stored
from tests.megatron_ext.vl_twins import Results


@pytest.mark.parametrize("case", [*cases.RESUMES, *vl_twins.RESUMES], ids=lambda case: case.name)
def test_resuming_goes_on_bit_for_bit(case: Case, ranks_of: RanksOf) -> None:
    for rank in ranks_of(case).results(f"resume-{case.name}"):
        assert rank["step"] == 3
        assert rank["loaded"], "the loaded weights differ from the saved ones"
        assert rank["random_numbers"], "the random numbers do not go on"
        assert rank["resumed"] == rank["went_on"]
        assert rank["same_weights"], "the weights after the resumed steps differ"


@pytest.mark.parametrize("case", [case for case in cases.RESUMES if not case.frozen], ids=lambda case: case.name)
def test_a_model_goes_to_the_host_and_back_bit_for_bit(case: Case, results: Results) -> None:
    """In the test above the run that goes on did so in the middle, the resumed one did not."""
    for rank in results(f"resume-{case.name}"):
        on_host = rank["on_host"]
        assert on_host["left"] == 0
        assert on_host["left_with_weights"] == on_host["weights"]
        assert on_host["back"] == on_host["all"] - on_host["gradients"] > on_host["weights"]
        assert on_host["gradients"] >= on_host["weights"]  # they come back with the next pass


@pytest.mark.parametrize(("saved", "case"), [*cases.RELAYOUTS, *vl_twins.RELAYOUTS], ids=lambda case: case.name)
def test_another_layout_goes_on_within_fp32_bounds(saved: Case, case: Case, ranks_of: RanksOf) -> None:
    results = ranks_of(case).results
    before, after = results(f"resume-{saved.name}"), results(f"relayout-{case.name}")
    for rank in after:
        assert rank["step"] == 3
        for (loss, norm), (loss_before, norm_before) in zip(rank["resumed"], before[0]["went_on"], strict=True):
            assert loss == pytest.approx(loss_before, abs=2e-6)
            assert norm == pytest.approx(norm_before, rel=2e-6)
    like = vl_twins.tensors(ranks_of(case).folder / case.twin)
    expected, actual = (assemble(all_pieces(ranks, "weights"), like) for ranks in (before, after))
    # Two steps from equal weights and moments; a lost moment or master weight would show at 1e-4 and above.
    assert {n: e for n in like if (e := float((actual[n] - expected[n]).abs().max())) > 5e-6} == {}


def test_a_last_micro_batch_without_images_is_no_hindrance_to_an_early_reduction(vision_launched: Ranks) -> None:
    """The tower's gradients are reduced as soon as they are there, and on a rank whose last micro-batch has no images
    they are zeros: the same losses and norms as with the reduction at the end, on the same ranks' sum of gradients."""
    early, late = (vision_launched.results(f"resume-{run.name}") for run in (vl_twins.EARLY_DP2, vl_twins.TP2_DP2))
    for rank in early:
        for (loss, norm), (loss_late, norm_late) in zip(rank["went_on"], late[0]["went_on"], strict=True):
            assert loss == pytest.approx(loss_late, abs=2e-6)
            assert norm == pytest.approx(norm_late, rel=2e-6)


def test_frozen_layers_of_the_whole_model_keep_their_bits_on_every_stage(launched: Ranks, results: Results) -> None:
    before = vl_twins.tensors(launched.folder / cases.FROZEN_PP2_DP2.twin)
    after = assemble(all_pieces(results(f"resume-{cases.FROZEN_PP2_DP2.name}"), "weights"), before)
    kept = {name for name, tensor in before.items() if tensor.equal(after[name])}
    frozen = ("model.embed_tokens.", "model.layers.0.", "model.layers.3.")
    assert kept == {name for name in before if name.startswith(frozen)}


@pytest.mark.parametrize("case", cases.RESUMES, ids=lambda case: case.name)
def test_old_and_interrupted_saves_are_removed_and_never_read(case: Case, results: Results) -> None:
    """Three saves with ``keep`` 2, and a folder that an interrupted fourth left before the second."""
    for rank in results(f"resume-{case.name}"):
        assert rank["latest_with_interrupted"] == "step_000001"
        assert rank["folders"] == ["step_000002", "step_000003"]


def test_a_layout_with_other_padding_is_refused(results: Results) -> None:
    (rank,) = results("other-padding")
    assert rank["error"].startswith("ValueError")
    assert "padded_groups=4 (parallel.tensor=2), parallel.tensor=1 needs 3" in rank["error"]


def test_a_tower_with_other_padding_is_refused(vision_launched: Ranks) -> None:
    (rank,) = vision_launched.results("other-padding")
    assert rank["error"].startswith("ValueError")
    assert "padded_vision_heads=6 (parallel.tensor=2), parallel.tensor=1 needs 5" in rank["error"]


def test_a_save_that_one_rank_cannot_write_fails_on_all_and_leaves_the_former_ones(results: Results) -> None:
    ranks = results("damaged")
    assert len(ranks) == 4
    for rank, answer in enumerate(ranks):
        assert answer["full"].startswith("CheckpointError: step_000004 was not written: ")
        assert "File too large" in answer["full"] and "rank_00001.safetensors" in answer["full"]
        assert ("rank 1: OSError" in answer["full"]) == (rank != 1)
        assert "make room in " in answer["full"]
        assert answer["after_full"] == ["step_000002", "step_000003"]


def test_a_damaged_checkpoint_is_set_aside_by_name_and_the_one_before_taken(results: Results) -> None:
    for rank in results("damaged"):
        whole, fallen_back, none_left = rank["newest"]
        assert whole.endswith("step_000003")
        assert fallen_back == "no error"
        first, newest, second = rank["messages"]
        assert first.startswith("checkpoint step_000003 is damaged (rank_00001.safetensors has the checksum ")
        assert newest.endswith("step_000002")
        assert second.startswith("checkpoint step_000002 is damaged (manifest.json has the checksum ")
        assert none_left.startswith("CheckpointError") and "no intact checkpoint is left" in none_left
        assert "start anew with resume=false" in none_left
        assert rank["folders"] == ["damaged_step_000002", "damaged_step_000003"]


def test_files_are_safetensors_and_json(launched: Ranks) -> None:
    """And no byte of a pickle is needed: in test_another_layout every way to unpickle fails while loading."""
    name = cases.TP2_SP_DP2.name
    newest = checkpoint.latest(launched.after(f"resume-{name}") / "checkpoints" / name)
    assert newest is not None
    names = sorted(path.name for path in newest.iterdir())
    tensors = [f"rank_{rank:05d}.safetensors" for rank in range(4)]
    assert names == ["complete.json", "manifest.json", "progress.json", *tensors]
    for name in names[:3]:
        json.loads((newest / name).read_bytes())
    whole = stored(newest)
    assert whole["policy/embedding.word_embeddings.weight"].shape == (132, 192)
    assert {name.split("/")[0] for name in whole} == {"policy"}
    for file in json.loads((newest / "manifest.json").read_bytes())["files"]:
        data = (newest / file).read_bytes()
        entry = json.loads((newest / "manifest.json").read_bytes())["files"][file]
        assert entry == {"bytes": len(data), "crc32": f"{binascii.crc32(data):08x}"}


def test_latest_is_the_last_that_is_complete(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path) is None
    for step in (4, 11, 12):
        (tmp_path / f"step_{step:06d}").mkdir()
    assert checkpoint.latest(tmp_path) is None
    for step in (4, 11):
        (tmp_path / f"step_{step:06d}" / "complete.json").touch()
    assert checkpoint.latest(tmp_path) == tmp_path / "step_000011"


def test_data_parallel_ranks_write_as_much_of_the_optimiser_each(launched: Ranks) -> None:
    """Three FP32 states of every parameter, each element once; what is held in copies the first holder writes."""
    name = cases.TP2_SP_DP2.name
    newest = checkpoint.latest(launched.after(f"resume-{name}") / "checkpoints" / name)
    assert newest is not None
    tensors = json.loads((newest / "manifest.json").read_text())["tensors"]
    written = dict.fromkeys(range(4), 0)
    for name, tensor in tensors.items():
        if "/optimizer.state." in name:
            sizes = {part[0]: 0 for part in tensor["parts"]}
            for file, _, _, shape in tensor["parts"]:
                sizes[file] += prod(shape)
                written[int(file.removeprefix("rank_").removesuffix(".safetensors"))] += prod(shape)
            assert sum(sizes.values()) == prod(tensor["shape"]), name
    tensor_ranks = [(written[rank], written[rank + 2]) for rank in (0, 1)]  # data-parallel neighbours
    assert all(abs(one - other) < 0.1 * one for one, other in tensor_ranks), written


@pytest.mark.parametrize("shape", [(7,), (3, 5), (4, 1), (2, 3, 4)])
def test_a_range_of_a_tensor_is_few_boxes_in_its_order(shape: tuple[int, ...]) -> None:
    tensor = torch.arange(prod(shape)).view(shape)
    for start in range(tensor.numel()):
        for stop in range(start + 1, tensor.numel() + 1):
            boxes = list(optimizer_shards.boxes(shape, start, stop))
            values = [tensor[tuple(slice(a, a + n) for a, n in zip(*box, strict=True))] for box in boxes]
            assert torch.cat([value.flatten() for value in values]).tolist() == list(range(start, stop))
            assert len(boxes) <= 2 * len(shape) - 1
