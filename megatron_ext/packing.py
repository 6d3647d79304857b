"""Packed (THD) micro-batches: which sequences are packed together, and the tensors of a pack.

The plan is a pure function of all sequences' lengths and images, so every rank derives the same plan. Ranks therefore
cannot disagree on the number of micro-batches. A sequence may go to any data-parallel rank without changing the update.
"""

import heapq
from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any, Protocol

import numpy as np
import torch

from megatron_ext.batch import Array, TokenBatch, offsets
from megatron_ext.layout import token_multiple
from megatron_ext.models import family
from megatron_ext.packed import PROMPT, Pack
from megatron_ext.weight_map import round_up, sharding_of


@dataclass(frozen=True)
class Part:
    """This tensor-parallel rank's part of a tensor whose rows are split over ``ranks`` ranks.

    Every rank has the same number of successive rows. Zeros pad the rows after the last one.
    """

    # The rows of this rank.
    rows: torch.Tensor
    # The number of rows of the whole tensor, without padding.
    total: int
    # The number of ranks that the rows are split over.
    ranks: int

    @classmethod
    def of(cls, rows: torch.Tensor, rank: int, ranks: int) -> "Part":
        """The part of ``rows`` that belongs to ``rank``, as a copy."""
        count = -(-len(rows) // ranks)
        part = rows.new_zeros(count, *rows.shape[1:])
        own = rows[rank * count : (rank + 1) * count]
        part[: len(own)] = own
        return cls(part, len(rows), ranks)


@dataclass
class VisionInputs:
    """The images and video clips of a prompt, in token order, as the model's processor returns them."""

    # Qwen2.5-VL: [patches, channels x frames x patch x patch]. InternVL3: [tiles, 3, height, width]. On torch's meta
    # device, which has shapes alone, if another rank has the pixels.
    pixels: torch.Tensor
    # Qwen2.5-VL: [images, 3] (frames, rows, columns of patches). InternVL3: None.
    grid: torch.Tensor | None
    # Indices in the prompt of the tokens that the vision tower's output rows replace, in order.
    placeholders: list[int]
    # mRoPE positions [3][prompt tokens], or None. Response tokens continue from the greatest position, with the same
    # position on all three axes.
    positions: list[list[int]] | None
    # The next two are set on the tensor-parallel ranks that train on the images, by ``megatron_ext.images``.
    # This rank's part of the pixels.
    part: Part | None = None
    # This rank's part of the output of a frozen encoder, [placeholders, projector's input width].
    encoded: Part | None = None


@dataclass(frozen=True)
class Cost:
    """Floating-point operations of a training step, forward and backward, on all ranks together."""

    # Per token of a sequence.
    token: int
    # Factor of the squared sequence length: causal attention.
    square: int
    # Per response token: the output layer.
    response: int
    # Per token of an image.
    image: int

    def of(self, batch: TokenBatch) -> list[int]:
        """The cost of each response with its prompt, [S].

        The costs are Python's integers, because their sums exceed 64 bits.
        """
        return [
            self._of_sequence(length, response_length, image_tokens)
            for length, response_length, image_tokens in zip(
                batch.lengths.tolist(), batch.response_lengths.tolist(), _image_tokens(batch), strict=True
            )
        ]

    def of_prompts(self, batch: TokenBatch) -> list[int]:
        """The cost of each response's prompt alone, [S]."""
        prompt_lengths = batch.prompt_lengths.tolist()
        return [
            self._of_sequence(length, 0, image_tokens)
            for length, image_tokens in zip(prompt_lengths, _image_tokens(batch), strict=True)
        ]

    def _of_sequence(self, length: int, response_length: int, image_tokens: int) -> int:
        linear = self.token * length + self.response * response_length + self.image * image_tokens
        return linear + self.square * length**2


def _image_tokens(batch: TokenBatch) -> list[int]:
    """The number of image tokens in each response's prompt, [S]."""
    if batch.vision is None:
        return [0] * len(batch)
    of_prompts = [0 if vision is None else len(vision.placeholders) for vision in batch.vision]
    return [of_prompts[prompt] for prompt in batch.prompt_index]


def cost_of(hf_config: Any, frozen: Sequence[str]) -> Cost:
    """Compute the cost of a model from its shapes.

    A parameter takes two operations per token in the forward pass and twice as many in the backward pass. Attention is
    two matrix products in the forward pass and five in the backward pass (FlashAttention-2, arXiv 2307.08691). The
    causal mask halves each product.

    A vision tower that ``frozen`` names has no cost here, because it runs before the passes. For a trained tower, its
    attention (mostly within windows or tiles) and the projector are left out. They are at most 1 % of the cost of an
    image token in the 70B class and 6 % in the 7B model.
    """
    text = family(hf_config.architectures[0]).text_config(hf_config)
    sharding = sharding_of(text, 1, 0)
    attention = sharding.heads * sharding.head_dim
    key_or_value = sharding.groups * sharding.head_dim
    # Parameters of one layer: query, output, key and value; then gate, up and down.
    projections = 2 * text.hidden_size * (attention + key_or_value)
    feed_forward = 3 * text.hidden_size * text.intermediate_size
    image = 0
    vision = getattr(hf_config, "vision_config", None)
    if vision is not None and "vision" not in frozen:
        layers = getattr(vision, "depth", None) or vision.num_hidden_layers
        matrices = 3 if vision.hidden_act == "silu" else 2  # with a gate or without
        vision_feed_forward = matrices * vision.hidden_size * vision.intermediate_size
        patch = layers * (4 * vision.hidden_size**2 + vision_feed_forward)
        image = 4 * 6 * patch  # two by two patches form a token
    return Cost(
        token=6 * text.num_hidden_layers * (projections + feed_forward),
        square=7 * text.num_hidden_layers * attention,
        response=6 * text.hidden_size * text.vocab_size,
        image=image,
    )


OnDevice = Callable[[torch.Tensor], torch.Tensor]  # a tensor on the host → on this rank's device


def on_host(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor itself: the ``OnDevice`` function that leaves tensors on the host."""
    return tensor


class Tower(Protocol):
    """The part of a family's vision tower that packing uses."""

    # The precision in which the tower takes pixels.
    dtype: torch.dtype

    def layout(self, grid: torch.Tensor | None, on_device: OnDevice) -> Any:
        """Compute what the tower's forward pass takes in addition to the pixels.

        ``grid`` has the grids of all images and clips and is on the host.
        """


@dataclass(frozen=True)
class VisionBatch:
    """The images of a micro-batch, and the tokens that the tower's output rows replace."""

    # Pixels, or the encoder's output if ``encoded``.
    images: torch.Tensor
    # None if ``images`` is complete. Otherwise ``images`` is this tensor-parallel rank's part, and ``order`` has the
    # index of each row of the whole in the concatenated parts of all ranks.
    order: torch.Tensor | None
    encoded: bool
    # The result of ``Tower.layout``. None if ``encoded``.
    layout: Any
    # Row ``rows[i]`` of the tower's output replaces this rank's token at ``places[i]``. Both are [N].
    rows: torch.Tensor
    places: torch.Tensor


@dataclass
class MicroBatch:
    """Packed sequences with S responses. This rank has T tokens of the pack and predicts R response tokens.

    Without context parallelism the R tokens are all tokens of the S responses. With it they are this rank's part.

    ``pack`` puts all tensors where its ``on_device`` puts them. They include everything that a pass needs, so a pass
    takes nothing from the host and never waits for the device.
    """

    tokens: torch.Tensor  # [1, T]
    # [3, 1, T]: positions on the three axes of mRoPE. The axes are equal for a text.
    positions: torch.Tensor
    packed: Pack
    # [R]: the index of the token whose hidden state predicts each response token. The last token of a shared prompt
    # predicts the first token of each of its responses, so it occurs once for each response.
    predict: torch.Tensor
    # [R]: the response tokens.
    targets: torch.Tensor
    # Name → [R] FP32: ``logprobs``, ``loss_mask`` and the batch's further columns, including those of responses.
    values: dict[str, torch.Tensor]
    # The index in the batch of each of the S responses.
    indices: list[int]
    # [S]: the number of tokens of each response on this rank.
    lengths: torch.Tensor
    # [S]: the number of tokens of each response on all context-parallel ranks.
    response_lengths: torch.Tensor
    # [R]: the response of each token, as an index into the S responses; ascending.
    owners: torch.Tensor
    # [R]: the index of each token in the token columns of the batch.
    places: torch.Tensor
    vision: VisionBatch | None


def plan(
    lengths: Sequence[int],
    data_parallel: int,
    micro_batch_tokens: int,
    group: int = 1,
    costs: Sequence[int] | None = None,
) -> list[list[list[int]]]:
    """Assign sequences to micro-batches. Returns data-parallel rank → micro-batches → indices of sequences.

    A micro-batch has one or more sequences and at most ``micro_batch_tokens`` tokens. Every rank has the same number of
    micro-batches. That number is a multiple of ``group``, because the interleaved pipeline schedule needs a multiple of
    its stages. ``costs`` [sequences] is the work of each sequence (``Cost.of``), by default its length. Only the ratios
    of the costs matter.

    1. Pack the sequences of all ranks into the fewest micro-batches.
    2. Pack them again under the smallest bound on a micro-batch's cost that needs no more micro-batches (MULTIFIT;
       Coffman, Garey and Johnson, SIAM Journal on Computing 7, 1978).
    3. Sort the micro-batches by cost. Deal each round of ``data_parallel`` neighbours to the ranks, the costliest to
       the rank with the least cost so far.
    4. Where the sums still differ, move single sequences.

    So the costs of the ranks differ little in any round and hardly at all in total. Their numbers of sequences may
    differ.

    Raises ValueError for a sequence that is longer than a micro-batch, and for fewer sequences than micro-batches.
    There are always enough sequences if their number is a multiple of ``data_parallel`` x ``group``. There are also
    enough if their number is larger than ``data_parallel`` x ``group`` and two of the longest sequences fit into a
    micro-batch.
    """
    longest = max(lengths, default=0)
    if longest > micro_batch_tokens:
        raise ValueError(
            f"parallel.micro_batch_tokens={micro_batch_tokens} is below a sequence of {longest} tokens: raise it to "
            "the longest prompt plus response"
        )
    packs, count = _fewest(lengths, data_parallel, micro_batch_tokens, group)
    if count > len(lengths):
        raise ValueError(
            f"{len(lengths)} sequences for {count} micro-batches, {count // data_parallel} on each of {data_parallel} "
            f"data-parallel ranks: use a multiple of {data_parallel * group} sequences "
            "(algorithm.prompts_per_step x algorithm.samples_per_prompt, stage.sft.rows_per_step)"
        )
    work = lengths if costs is None else costs

    def cost(indices: list[int]) -> int:
        return sum(work[i] for i in indices)

    # Bisect the bound between the mean cost, which is out of reach, and the costliest micro-batch so far.
    mean = -(-sum(work) // count)
    low = mean
    high = max(map(cost, packs))
    while high - low > mean // 1000:
        bound = (low + high) // 2
        # A sequence's size is its share of the token limit or of the cost bound, whichever is larger. Both shares are
        # multiplied by both limits, so that they stay integers.
        sizes = [max(n * bound, c * micro_batch_tokens) for n, c in zip(lengths, work, strict=True)]
        candidate = _best_fit(sizes, micro_batch_tokens * bound)
        if len(candidate) <= count:
            packs = candidate
            high = bound
        else:
            low = bound + 1
    # Too few packs for all ranks: halve the costliest ones.
    while len(packs) < count:
        costliest = max((members for members in packs if len(members) > 1), key=cost)
        halves: tuple[list[int], list[int]] = ([], [])
        for i in costliest:
            min(halves, key=cost).append(i)
        packs.remove(costliest)
        packs += halves
    packs.sort(key=lambda members: (-cost(members), members[0]))
    ranks: list[list[list[int]]] = [[] for _ in range(data_parallel)]
    load = [0] * data_parallel
    for start in range(0, count, data_parallel):
        least_loaded_first = sorted(range(data_parallel), key=lambda rank: (load[rank], rank))
        for rank, indices in zip(least_loaded_first, packs[start : start + data_parallel], strict=True):
            ranks[rank].append(indices)
            load[rank] += cost(indices)
    _even_out(ranks, load, lengths, micro_batch_tokens, work)
    return ranks


def _even_out(
    ranks: list[list[list[int]]], load: list[int], lengths: Sequence[int], limit: int, costs: Sequence[int]
) -> None:
    """Even out the costs of the ranks, in place.

    While the costliest rank is more than half a percent above the mean, one of its sequences moves to the least loaded
    rank that has room. Batches of few micro-batches with a very long sequence need this.
    """
    mean = sum(load) // len(load)
    while max(load) > mean + mean // 200:
        high = load.index(max(load))
        for low in sorted(range(len(ranks)), key=lambda r: (load[r], r)):
            target = min(ranks[low], key=lambda indices: sum(lengths[i] for i in indices))
            room = limit - sum(lengths[i] for i in target)
            gap = load[high] - load[low]
            movable = [
                (abs(gap - 2 * costs[i]), i, source)
                for source in ranks[high]
                if len(source) > 1
                for i in source
                if lengths[i] <= room and costs[i] < gap
            ]
            if movable:
                _, i, source = min(movable)
                source.remove(i)
                target.append(i)
                load[high] -= costs[i]
                load[low] += costs[i]
                break
        else:
            return


def divisible_prefix(
    lengths: Sequence[int], wanted: int, data_parallel: int, micro_batch_tokens: int, group: int = 1
) -> int:
    """The length of the shortest prefix of the sequences, at least ``wanted``, that ``plan`` can divide over all ranks.

    Returns the number of sequences if there is no such prefix.
    """
    for count in range(max(1, wanted), len(lengths)):
        if _fewest(lengths[:count], data_parallel, micro_batch_tokens, group)[1] <= count:
            return count
    return len(lengths)


def units(batch: TokenBatch, together: int = 1) -> list[list[int]]:
    """Divide the batch's responses into units of ``together`` successive responses. Returns the indices of each unit.

    A unit stays in one micro-batch.
    """
    return [list(range(first, first + together)) for first in range(0, len(batch), together)]


def units_of_shared_prompts(
    batch: TokenBatch, data_parallel: int, micro_batch_tokens: int, group: int = 1
) -> list[list[int]]:
    """Divide the batch's responses into units of responses to the same prompt. Returns the indices of each unit.

    A prompt has several units if its responses do not fit into one micro-batch. If there are too few units for all
    ranks (``plan``), the units with the most response tokens are halved.
    """
    lengths = batch.lengths.tolist()
    response_lengths = batch.response_lengths.tolist()
    of_prompt: dict[int, list[list[int]]] = {}
    room: dict[int, int] = {}
    for i, prompt in enumerate(batch.prompt_index.tolist()):
        if prompt in room and response_lengths[i] <= room[prompt]:
            of_prompt[prompt][-1].append(i)
            room[prompt] -= response_lengths[i]
        else:
            of_prompt.setdefault(prompt, []).append([i])
            room[prompt] = micro_batch_tokens - lengths[i]
    chosen = [unit for prompt_units in of_prompt.values() for unit in prompt_units]
    heap = [(-sum(response_lengths[i] for i in unit), unit) for unit in chosen if len(unit) > 1]
    heapq.heapify(heap)
    while (
        heap
        and len(chosen) < _fewest(unit_lengths(batch, chosen, 1, True), data_parallel, micro_batch_tokens, group)[1]
    ):
        _, longest = heapq.heappop(heap)
        chosen.remove(longest)
        middle = len(longest) // 2
        for half in (longest[:middle], longest[middle:]):
            chosen.append(half)
            if len(half) > 1:
                heapq.heappush(heap, (-sum(response_lengths[i] for i in half), half))
    return sorted(chosen)


def unit_lengths(batch: TokenBatch, chosen: Sequence[Sequence[int]], multiple: int, shared_prompts: bool) -> list[int]:
    """The number of tokens of each unit when it is packed, with its sequences padded to ``multiple``.

    With ``shared_prompts`` a unit is one sequence, which contains the prompt once.
    """
    lengths = batch.lengths.tolist()
    if not shared_prompts:
        return [sum(round_up(lengths[i], multiple) for i in unit) for unit in chosen]
    prompt_lengths = batch.prompt_lengths.tolist()
    return [
        round_up(sum(lengths[i] for i in unit) - (len(unit) - 1) * prompt_lengths[unit[0]], multiple) for unit in chosen
    ]


def unit_costs(batch: TokenBatch, chosen: Sequence[Sequence[int]], cost: Cost, shared_prompts: bool) -> list[int]:
    """The cost of each unit. With ``shared_prompts`` the unit's prompt counts once."""
    costs = cost.of(batch)
    sums = [sum(costs[i] for i in unit) for unit in chosen]
    if not shared_prompts:
        return sums
    prompt_costs = cost.of_prompts(batch)
    return [total - (len(unit) - 1) * prompt_costs[unit[0]] for total, unit in zip(sums, chosen, strict=True)]


def _fewest(lengths: Sequence[int], data_parallel: int, limit: int, group: int) -> tuple[list[list[int]], int]:
    """Pack sequences into few packs of at most ``limit`` tokens. Returns the packs and the number of micro-batches.

    The number of micro-batches, on all ranks together, is the number of packs rounded up to a multiple of
    ``data_parallel`` x ``group``.
    """
    packs = _best_fit(lengths, limit)
    return packs, round_up(max(1, len(packs)), data_parallel * group)


def _best_fit(sizes: Sequence[int], room: int) -> list[list[int]]:
    """Pack items into packs of size ``room`` by best-fit decreasing. Returns the indices of each pack.

    The largest item goes first. Each item goes into the pack with the least room that suffices. An item larger than
    ``room`` gets a pack of its own.
    """
    packs: list[list[int]] = []
    open_packs: list[tuple[int, int]] = []  # (room left, index of the pack), sorted
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        place = bisect_left(open_packs, (sizes[i], 0))
        if place < len(open_packs):
            room_left, pack_index = open_packs.pop(place)
        else:
            room_left = room
            pack_index = len(packs)
            packs.append([])
        packs[pack_index].append(i)
        insort(open_packs, (room_left - sizes[i], pack_index))
    return packs


def pack(
    batch: TokenBatch,
    indices: Sequence[int],
    on_device: OnDevice = on_host,
    *,
    multiple: int,
    pad_token: int,
    length: int | None = None,
    context: int = 1,
    context_rank: int = 0,
    shared_prompts: bool = False,
    tower: Tower | None = None,
    encoded: bool = False,
) -> MicroBatch:
    """Pack the responses ``indices`` of a batch, each with its prompt.

    The images are packed on ranks that have the model's vision tower (``tower``): their pixels, or with ``encoded`` the
    output of the tower's encoder.

    Dummy sequences pad the pack. None is longer than the longest real sequence. They pad the tokens of all
    context-parallel ranks to ``length``, or, if ``length`` is None, the T tokens of each rank to a multiple of
    ``multiple``.

    With ``shared_prompts`` successive responses to one prompt form one sequence (``megatron_ext.packed``).

    Under context parallelism each sequence is padded and divided into 2 x ``context`` slices of equal length. A rank
    has the ``context_rank``-th slice from either end, so that causal attention costs every rank the same. Padding
    follows the sequence, where causal attention does not see it.
    """
    assert context == 1 or not shared_prompts, "the slices of a sequence would not cost every rank the same"
    chosen = np.asarray(indices, np.int64)
    cuts = token_multiple(context)
    sequences = _sequences(batch, chosen, shared_prompts)
    response_lengths = batch.response_lengths
    prompt_lengths = [len(batch.prompt(responses[0]).token_ids) for responses in sequences]
    lengths = np.array([response_lengths[responses].sum() for responses in sequences], np.int64) + prompt_lengths
    padded_lengths = -(-lengths // cuts) * cuts
    longest = int(padded_lengths.max())
    used = int(padded_lengths.sum())
    total = round_up(used, multiple * cuts) if length is None else length
    assert used <= total, f"sequences of {used} tokens in a pack of {total}"
    starts = offsets([*padded_lengths.tolist(), *_pieces_of(total - used, longest)])

    tokens = np.full(total, pad_token, np.int64)
    positions = np.empty((3, total), np.int64)
    segments = np.full(total, PROMPT, np.int64)
    placeholders: list[Array] = []
    # For each response token of the pack: the index in the pack of the token that predicts it, and the index of the
    # response token in the batch's columns.
    predictors: list[Array] = []
    columns: list[Array] = []
    for place, responses in enumerate(sequences):
        start = int(starts[place])
        prompt = batch.prompt(responses[0]).token_ids
        prompt_end = start + len(prompt)
        vision = None if batch.vision is None else batch.vision[batch.prompt_index[responses[0]]]
        tokens[start:prompt_end] = prompt
        positions[:, start:prompt_end] = sequence_positions(len(prompt), vision)
        end = prompt_end
        for number, i in enumerate(responses, 1):
            response = batch.tokens_of(i)
            first = end
            end = first + int(response_lengths[i])
            tokens[first:end] = batch.response_tokens[response]
            of_sequence = sequence_positions(len(prompt) + end - first, vision)
            positions[:, first:end] = of_sequence[..., len(prompt) :]
            segments[first:end] = number
            predictors.append(np.append(prompt_end - 1, np.arange(first, end - 1))[: end - first])
            columns.append(np.arange(response.start, response.stop))
        padded_end = int(starts[place + 1])
        positions[:, end:padded_end] = np.arange(padded_end - end)
        if vision is not None:
            placeholders.append(start + np.asarray(vision.placeholders, np.int64))
    for start, end in pairwise(starts[len(sequences) :].tolist()):
        positions[:, start:end] = np.arange(end - start)

    local = context_slices(starts, context, context_rank)
    predict = np.concatenate(predictors)
    column_places = np.concatenate(columns)
    owners = np.repeat(np.arange(len(chosen)), response_lengths[chosen])
    if context > 1:
        # For each place in the pack: the index among this rank's tokens, or -1 for a token of another rank.
        local_token = np.full(total, -1, np.int64)
        local_token[local] = np.arange(len(local))
        predict = local_token[predict]
        is_local = predict >= 0
        predict = predict[is_local]
        column_places = column_places[is_local]
        owners = owners[is_local]
        tokens = tokens[local]
        positions = positions[:, local]
    values = {"logprobs": batch.logprobs, "loss_mask": batch.loss_mask, **batch.columns}
    of_tokens = {name: column[column_places].astype(np.float32, copy=False) for name, column in values.items()}
    for name, column in batch.response_columns.items():
        of_tokens[name] = np.where(of_tokens["loss_mask"], column[chosen[owners]], np.float32(0))

    def moved(array: Array) -> torch.Tensor:
        return on_device(torch.from_numpy(array))

    vision = None
    if tower is not None:
        vision = _pack_vision(batch, sequences, placeholders, local, total, tower, encoded, on_device)
    cu_seqlens = moved(starts.astype(np.int32))
    local_positions = moved(positions)
    return MicroBatch(
        tokens=moved(tokens).unsqueeze(0),
        positions=local_positions.unsqueeze(1),
        packed=Pack(
            qkv_format="thd",
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_kv=cu_seqlens,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
            positions=local_positions[0],
            segments=moved(segments) if shared_prompts else None,
        ),
        predict=moved(predict),
        targets=moved(batch.response_tokens[column_places].astype(np.int64)),
        values={name: moved(column) for name, column in of_tokens.items()},
        indices=chosen.tolist(),
        lengths=moved(np.bincount(owners, minlength=len(chosen))),
        response_lengths=moved(response_lengths[chosen]),
        owners=moved(owners),
        places=moved(column_places),
        vision=vision,
    )


def _pieces_of(tokens: int, longest: int) -> list[int]:
    """Divide ``tokens`` into pieces of at most ``longest`` tokens. Returns their lengths."""
    whole, rest = divmod(tokens, longest)
    return [longest] * whole + ([rest] if rest else [])


def _sequences(batch: TokenBatch, chosen: Array, shared_prompts: bool) -> list[list[int]]:
    """The indices of the responses in each packed sequence."""
    if not shared_prompts:
        return [[i] for i in chosen.tolist()]
    return [list(responses) for _, responses in groupby(chosen.tolist(), key=lambda i: batch.prompt_index[i])]


def sequence_positions(length: int, vision: VisionInputs | None) -> Array:
    """The position of each token: [3, length] on mRoPE's three axes, or [length] for a text.

    Response tokens continue after the prompt's greatest position, with the same position on all three axes.
    """
    if vision is None or vision.positions is None:
        return np.arange(length)
    prompt = np.asarray(vision.positions)
    following = prompt.max() + 1 + np.arange(length - prompt.shape[1])
    return np.concatenate([prompt, np.broadcast_to(following, (3, len(following)))], axis=1)


def context_ranges(starts: Sequence[int] | Array, context: int, rank: int) -> list[list[range]]:
    """The places in the pack of the tokens of context-parallel rank ``rank``, for each sequence.

    ``starts`` has the start of each sequence, and the end of the last one as its last entry.
    """
    ranges = []
    for start, end in pairwise(int(place) for place in starts):
        size = (end - start) // token_multiple(context)
        pieces = (rank, 2 * context - 1 - rank) if context > 1 else (0,)
        ranges.append([range(start + piece * size, start + (piece + 1) * size) for piece in pieces])
    return ranges


def context_slices(starts: Sequence[int] | Array, context: int, rank: int) -> Array:
    """The places of ``context_ranges``, joined into one array."""
    if context == 1:
        return np.arange(int(starts[-1]))
    pieces = [np.arange(r.start, r.stop) for ranges in context_ranges(starts, context, rank) for r in ranges]
    return np.concatenate(pieces) if pieces else np.empty(0, np.int64)


def _pack_vision(
    batch: TokenBatch,
    sequences: Sequence[Sequence[int]],
    placeholders: list[Array],
    local: Array,
    total: int,
    tower: Tower,
    encoded: bool,
    on_device: OnDevice,
) -> VisionBatch | None:
    """The images of the sequences' prompts, in the tower's precision, and the local tokens that its rows replace."""
    if not placeholders or batch.vision is None:
        return None
    inputs = [batch.vision[batch.prompt_index[responses[0]]] for responses in sequences]
    inputs = [vision for vision in inputs if vision is not None]
    # For each place in the pack: the row of the tower's output that replaces the token, or -1 for none.
    places = np.concatenate(placeholders)
    row_of = np.full(total, -1, np.int64)
    row_of[places] = np.arange(len(places))
    rows = row_of[local]
    replaced = np.flatnonzero(rows >= 0)
    parts = []
    for vision in inputs:
        part = vision.encoded if encoded else vision.part
        if part is None:
            assert not encoded, "images.encode comes first"
            assert not vision.pixels.is_meta, "images.exchange comes first"
            part = Part(vision.pixels, len(vision.pixels), 1)
        parts.append(part)
    assert len({part.ranks for part in parts}) == 1, "images.exchange divides all images of a step or none"
    order = None
    if parts[0].ranks > 1:
        order = on_device(torch.from_numpy(order_of_parts(parts)))
    layout = None
    if not encoded:
        grids = [vision.grid for vision in inputs if vision.grid is not None]
        layout = tower.layout(torch.cat(grids) if grids else None, on_device)
    return VisionBatch(
        images=on_device(torch.cat([part.rows.to(tower.dtype) for part in parts])),
        order=order,
        encoded=encoded,
        layout=layout,
        rows=on_device(torch.from_numpy(rows[replaced])),
        places=on_device(torch.from_numpy(replaced)),
    )


def order_of_parts(parts: Sequence[Part]) -> Array:
    """int64 [total rows]: the index of each row in the concatenation of all ranks' parts.

    Each rank first concatenates its own parts, one for each tensor. The result is then concatenated over the ranks.
    """
    counts = [len(part.rows) for part in parts]
    places = []
    for part, start in zip(parts, offsets(counts).tolist(), strict=False):
        row = np.arange(part.total)
        places.append(row // len(part.rows) * sum(counts) + start + row % len(part.rows))
    return np.concatenate(places)
