"""The one batch of the project: columns of tokens, from the generation engine to the micro-batches of the trainer.

A ``TokenBatch`` holds S responses to P prompts as flat arrays with offsets, so no code loops over tokens. Engines
answer with it, verifiers read it, advantages and loss masks are columns of it, ``megatron_ext.packing`` cuts it into
micro-batches, and a checkpoint holds partial rollouts as one. Supervised stages build it from their rows.
``docs/batch.md`` has the layout on one page.

In RL every rank has the columns of responses, [S], and holds the tokens of some: those that its engines made, later
those that it trains on (``megatron_ext.routing``).

Between processes a batch travels as safetensors bytes: columns as they are in memory, text as one entry of JSON bytes.
This module needs numpy and safetensors only, so an engine's client can import it without torch.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as load_safetensors
from safetensors.numpy import save as save_safetensors

Array = np.ndarray

UNFINISHED = "unfinished"  # a partial rollout: the response goes on in a later round
# The entry with the columns that are text, as bytes of JSON. Not in the header: safetensors refuses one above 100 MB,
# which the raw answers of judges on some thousand responses can reach.
TEXT = "text"


@dataclass(frozen=True)
class Prompt:
    """A prompt as the engines are asked.

    ``token_ids`` int32 [tokens]: chat template applied, a placeholder token for each output row of a vision tower.
    ``images`` and ``videos`` name files, in prompt order; a video is the list of its frames' files.
    ``marked_token_ids`` int32: the prompt with one mark for each image or video, from which vLLM's own processor has to
    make exactly ``token_ids``; empty for a prompt of text alone.
    """

    prompt_id: str
    token_ids: Array
    images: tuple[str, ...] = ()
    videos: tuple[tuple[str, ...], ...] = ()
    marked_token_ids: Array = field(default_factory=lambda: np.empty(0, np.int32))


@dataclass(eq=False)
class TokenBatch:
    """S responses to P prompts. The tokens of some of them are held here, R in all; of the others their number.

    ``prompts`` [P].
    ``prompt_index`` int32 [S]: the prompt of each response.
    ``group_index`` int32 [S]: the group of each response; its rewards are compared with those of its group only.
    ``sample_index`` int32 [S]: which of its prompt's responses it is.
    ``seeds`` int64 [S]: decides the sampling noise; 0 where nothing is sampled.
    ``response_lengths`` int64 [S]: tokens of each response, here or elsewhere.
    ``trained_lengths`` int64 [S]: how many of them the loss mask covers.
    ``response_offsets`` int64 [S + 1]: response i has the tokens ``response_offsets[i]`` up to ``[i + 1]``; none where
    they are not held here.
    ``finish_reasons`` [S]: "stop" (the last token is a stop token), "length", "unfinished" (a partial rollout), "turn"
    (an environment replies next), "turns" (its replies are used up), "failed" (``failures`` says why), "" for a
    response that was not generated.
    ``verdicts`` [S]: verifier name → plain JSON, see ``rewards.verdict``.
    ``rewards`` float64 [S]: NaN for a response that has none.
    ``response_tokens`` int32 [R]: token ids, never decoded and encoded again.
    ``logprobs`` float32 [R]: natural log-probability under the distribution that was sampled from (after temperature
    and top-p; for greedy decoding the plain softmax); 0 for a token that was not sampled.
    ``loss_mask`` bool [R]: whether a token is trained on. False for forced tokens (an end of thinking, an environment's
    reply, other speakers' turns) and for all tokens of a response without a reward.
    ``version_offsets`` int64 [S + 1], ``versions`` int32 [V], ``version_lengths`` int32 [V]: runs of tokens that were
    sampled by one version of the weights, which is the number of the weight sync.
    ``columns``: further float32 [R] columns by name: ``advantages``, ``weights`` (of the token's loss), ``old_values``,
    ``returns``.
    ``response_columns``: float32 [S] columns by name. Each trained token of a response has its value, all others 0.
    ``vision`` [P]: what the trainer's vision tower needs (``megatron_ext.packing.VisionInputs``), None for text. It is
    attached where it is used and never serialised.

    Raises ValueError where the columns do not fit each other.
    """

    prompts: list[Prompt]
    prompt_index: Array
    group_index: Array
    sample_index: Array
    response_lengths: Array
    trained_lengths: Array
    response_offsets: Array
    response_tokens: Array
    logprobs: Array
    loss_mask: Array
    seeds: Array
    version_offsets: Array
    versions: Array
    version_lengths: Array
    finish_reasons: list[str]
    failures: list[str]
    verdicts: list[dict[str, Any]]
    rewards: Array
    columns: dict[str, Array] = field(default_factory=dict)
    response_columns: dict[str, Array] = field(default_factory=dict)
    vision: list[Any] | None = None

    def __post_init__(self) -> None:
        samples = len(self.prompt_index)
        tokens = int(self.response_offsets[-1])
        runs = int(self.version_offsets[-1])
        expected = {
            "group_index": samples,
            "sample_index": samples,
            "seeds": samples,
            "rewards": samples,
            "finish_reasons": samples,
            "failures": samples,
            "verdicts": samples,
            "response_lengths": samples,
            "trained_lengths": samples,
            "response_offsets": samples + 1,
            "version_offsets": samples + 1,
            "response_tokens": tokens,
            "logprobs": tokens,
            "loss_mask": tokens,
            "versions": runs,
            "version_lengths": runs,
        }
        for name, length in expected.items():
            if len(getattr(self, name)) != length:
                raise ValueError(f"TokenBatch.{name} has {len(getattr(self, name))} entries, the batch needs {length}")
        for name, column in self.columns.items():
            if len(column) != tokens:
                raise ValueError(f"TokenBatch.columns[{name!r}] has {len(column)} entries, the batch needs {tokens}")
        for name, column in self.response_columns.items():
            if len(column) != samples:
                raise ValueError(f"TokenBatch.response_columns[{name!r}] has {len(column)} entries, not {samples}")
        trained = int(self.trained_lengths[self.held].sum())
        if np.count_nonzero(self.loss_mask) != trained:
            raise ValueError(
                f"TokenBatch.trained_lengths add up to {trained} tokens that are held, the loss mask has "
                f"{np.count_nonzero(self.loss_mask)}"
            )
        if self.vision is not None and len(self.vision) != len(self.prompts):
            raise ValueError(f"TokenBatch.vision has {len(self.vision)} entries for {len(self.prompts)} prompts")

    def __len__(self) -> int:
        return len(self.prompt_index)

    @property
    def prompt_lengths(self) -> Array:
        """int64 [S]: tokens of each response's prompt."""
        lengths = np.array([len(prompt.token_ids) for prompt in self.prompts], np.int64)
        return lengths[self.prompt_index]

    @property
    def held(self) -> Array:
        """bool [S]: whether the tokens of each response are here. Those of an empty one are."""
        return self.response_offsets[1:] - self.response_offsets[:-1] == self.response_lengths

    @property
    def lengths(self) -> Array:
        """int64 [S]: tokens of prompt and response together."""
        return self.prompt_lengths + self.response_lengths

    @property
    def keys(self) -> list[tuple[str, int]]:
        """(prompt id, sample index) of each response."""
        return [
            (self.prompts[prompt].prompt_id, sample)
            for prompt, sample in zip(self.prompt_index.tolist(), self.sample_index.tolist(), strict=True)
        ]

    def prompt(self, i: int) -> Prompt:
        """The prompt of response i."""
        return self.prompts[self.prompt_index[i]]

    def tokens_of(self, i: int) -> slice:
        """Where the tokens of response i stand in a column of tokens. Raises LookupError where they are not held."""
        tokens = slice(int(self.response_offsets[i]), int(self.response_offsets[i + 1]))
        if tokens.stop - tokens.start != self.response_lengths[i]:
            raise LookupError(f"the tokens of response {self.keys[i]} are on other ranks")
        return tokens

    def runs_of(self, i: int) -> slice:
        """Where the version runs of response i stand."""
        return slice(int(self.version_offsets[i]), int(self.version_offsets[i + 1]))

    def broadcast(self, per_response: Array) -> Array:
        """[S] → [R]: each response's value for each of its tokens that are held."""
        return np.repeat(per_response, np.diff(self.response_offsets))

    def with_columns(self, **columns: Array) -> "TokenBatch":
        """The same batch with these columns of tokens added, as float32."""
        added = {name: np.asarray(column, np.float32) for name, column in columns.items()}
        return replace(self, columns={**self.columns, **added})

    def with_response_columns(self, **columns: Array) -> "TokenBatch":
        """The same batch with these columns of responses added, as float32."""
        added = {name: np.asarray(column, np.float32) for name, column in columns.items()}
        return replace(self, response_columns={**self.response_columns, **added})

    def values(self, name: str) -> Array:
        """float32 [R]: a column of tokens, or a column of responses for each of the tokens that are held."""
        if name in self.columns:
            return self.columns[name]
        return np.where(self.loss_mask, self.broadcast(self.response_columns[name]), np.float32(0))

    def without_loss(self, responses: Array) -> "TokenBatch":
        """The same batch with no token trained on of the responses that ``responses``, bool [S], names."""
        return replace(
            self,
            loss_mask=self.loss_mask & ~self.broadcast(responses),
            trained_lengths=np.where(responses, 0, self.trained_lengths),
        )

    def without_tokens(self) -> "TokenBatch":
        """The columns of responses alone: no tokens are held."""
        return replace(
            self,
            response_offsets=np.zeros(len(self) + 1, np.int64),
            response_tokens=self.response_tokens[:0],
            logprobs=self.logprobs[:0],
            loss_mask=self.loss_mask[:0],
            columns={name: column[:0] for name, column in self.columns.items()},
        )

    def select(self, indices: Sequence[int] | Array) -> "TokenBatch":
        """The responses at ``indices``, in that order; prompts without a response are left out.

        Of successive responses the columns of tokens are views of this batch's.
        """
        chosen = np.asarray(indices, np.int64)
        place: dict[int, int] = {}  # of a prompt among those that are kept
        prompt_index = [place.setdefault(prompt, len(place)) for prompt in self.prompt_index[chosen].tolist()]
        kept = list(place)
        tokens = _slices(self.response_offsets, chosen)
        runs = _slices(self.version_offsets, chosen)
        return TokenBatch(
            prompts=[self.prompts[i] for i in kept],
            prompt_index=np.array(prompt_index, np.int32),
            group_index=self.group_index[chosen],
            sample_index=self.sample_index[chosen],
            response_lengths=self.response_lengths[chosen],
            trained_lengths=self.trained_lengths[chosen],
            response_offsets=offsets(_lengths(self.response_offsets, chosen)),
            response_tokens=_pieces(self.response_tokens, tokens),
            logprobs=_pieces(self.logprobs, tokens),
            loss_mask=_pieces(self.loss_mask, tokens),
            seeds=self.seeds[chosen],
            version_offsets=offsets(_lengths(self.version_offsets, chosen)),
            versions=_pieces(self.versions, runs),
            version_lengths=_pieces(self.version_lengths, runs),
            finish_reasons=[self.finish_reasons[i] for i in chosen],
            failures=[self.failures[i] for i in chosen],
            verdicts=[self.verdicts[i] for i in chosen],
            rewards=self.rewards[chosen],
            columns={name: _pieces(column, tokens) for name, column in self.columns.items()},
            response_columns={name: column[chosen] for name, column in self.response_columns.items()},
            vision=None if self.vision is None else [self.vision[i] for i in kept],
        )

    def to_bytes(self) -> bytes:
        """The batch in the safetensors format; inverse of :meth:`from_bytes`. ``vision`` is left out."""
        tensors: dict[str, Array] = {name: np.ascontiguousarray(getattr(self, name)) for name in BINARY}
        tensors["prompt_offsets"] = offsets([len(prompt.token_ids) for prompt in self.prompts])
        tensors["prompt_tokens"] = _joined([prompt.token_ids for prompt in self.prompts], np.int32)
        tensors["marked_offsets"] = offsets([len(prompt.marked_token_ids) for prompt in self.prompts])
        tensors["marked_tokens"] = _joined([prompt.marked_token_ids for prompt in self.prompts], np.int32)
        for kind, columns in (("columns.", self.columns), ("response_columns.", self.response_columns)):
            tensors |= {f"{kind}{name}": np.ascontiguousarray(column) for name, column in columns.items()}
        text = {
            "prompts": [[prompt.prompt_id, prompt.images, prompt.videos] for prompt in self.prompts],
            "finish_reasons": self.finish_reasons,
            "failures": self.failures,
            "verdicts": self.verdicts,
        }
        tensors[TEXT] = np.frombuffer(json.dumps(text).encode(), np.uint8)
        return save_safetensors(tensors)

    @staticmethod
    def from_bytes(data: bytes) -> "TokenBatch":
        """Raises ValueError for bytes that hold no batch."""
        try:
            tensors = load_safetensors(data)
            text = json.loads(tensors[TEXT].tobytes())
        except (SafetensorError, KeyError, ValueError) as error:
            raise ValueError(f"{len(data)} bytes hold no TokenBatch: {error}") from error
        prompt_offsets = tensors["prompt_offsets"]
        marked_offsets = tensors["marked_offsets"]
        prompts = [
            Prompt(
                prompt_id=prompt_id,
                token_ids=tensors["prompt_tokens"][prompt_offsets[i] : prompt_offsets[i + 1]],
                images=tuple(images),
                videos=tuple(tuple(frames) for frames in videos),
                marked_token_ids=tensors["marked_tokens"][marked_offsets[i] : marked_offsets[i + 1]],
            )
            for i, (prompt_id, images, videos) in enumerate(text.pop("prompts"))
        ]
        arrays: dict[str, Any] = {name: tensors[name] for name in BINARY}
        for kind in ("columns", "response_columns"):
            prefix = f"{kind}."
            named = {name.removeprefix(prefix): tensors[name] for name in tensors if name.startswith(prefix)}
            arrays[kind] = named
        return TokenBatch(prompts=prompts, **arrays, **text)


# The columns that are arrays, by their names in the safetensors file.
BINARY = (
    "prompt_index",
    "group_index",
    "sample_index",
    "response_lengths",
    "trained_lengths",
    "response_offsets",
    "response_tokens",
    "logprobs",
    "loss_mask",
    "seeds",
    "version_offsets",
    "versions",
    "version_lengths",
    "rewards",
)


def build(
    prompts: Sequence[Prompt],
    responses: Sequence[Sequence[int] | Array],
    *,
    prompt_index: Sequence[int] | Array | None = None,
    sample_index: Sequence[int] | Array | None = None,
    logprobs: Sequence[Sequence[float] | Array] | None = None,
    loss_mask: Sequence[Sequence[bool] | Array] | None = None,
    version: int | None = None,
    seeds: Sequence[int] | Array | None = None,
    finish_reasons: Sequence[str] | None = None,
    vision: Sequence[Any] | None = None,
) -> TokenBatch:
    """A batch from one sequence of tokens for each response.

    By default response i answers prompt i, is its first sample, has log-probs of 0, no forced tokens and no version.
    With ``version`` all tokens are by that version of the weights. The responses to one prompt are a group.
    """
    count = len(responses)
    lengths = np.array([len(response) for response in responses], np.int64)
    response_offsets = offsets(lengths)
    has_run = lengths > 0 if version is not None else np.zeros(count, bool)
    total = int(response_offsets[-1])
    prompt_of = np.arange(count, dtype=np.int32) if prompt_index is None else np.asarray(prompt_index, np.int32)
    trained = lengths if loss_mask is None else np.array([np.count_nonzero(mask) for mask in loss_mask], np.int64)
    return TokenBatch(
        prompts=list(prompts),
        prompt_index=prompt_of,
        group_index=prompt_of.copy(),
        sample_index=np.zeros(count, np.int32) if sample_index is None else np.asarray(sample_index, np.int32),
        response_lengths=lengths,
        trained_lengths=trained,
        response_offsets=response_offsets,
        response_tokens=_joined(responses, np.int32),
        logprobs=np.zeros(total, np.float32) if logprobs is None else _joined(logprobs, np.float32),
        loss_mask=np.ones(total, bool) if loss_mask is None else _joined(loss_mask, np.bool_),
        seeds=np.zeros(count, np.int64) if seeds is None else np.asarray(seeds, np.int64),
        version_offsets=offsets(has_run.astype(np.int64)),
        versions=np.full(int(has_run.sum()), version or 0, np.int32),
        version_lengths=lengths[has_run].astype(np.int32),
        finish_reasons=[""] * count if finish_reasons is None else list(finish_reasons),
        failures=[""] * count,
        verdicts=[{} for _ in range(count)],
        rewards=np.full(count, np.nan),
        vision=None if vision is None else list(vision),
    )


def concatenate(batches: Sequence[TokenBatch]) -> TokenBatch:
    """All responses of the batches, in order. Prompts of one id and the same tokens become one.

    Raises ValueError where the batches do not have the same columns, or only some have vision inputs.
    """
    if not batches:
        return build([], [])
    if len(batches) == 1:
        return batches[0]
    columns = [[*batch.columns, *batch.response_columns] for batch in batches]
    if any(names != columns[0] for names in columns):
        raise ValueError(f"batches with different columns: {columns}")
    if len({batch.vision is None for batch in batches}) > 1:
        raise ValueError("some of the batches have vision inputs, others have none")
    prompts: list[Prompt] = []
    vision: list[Any] = []
    place: dict[str, int] = {}
    indices = []
    for batch in batches:
        merged = np.empty(len(batch.prompts), np.int32)
        for i, prompt in enumerate(batch.prompts):
            known = place.get(prompt.prompt_id)
            if known is None or not _same_tokens(prompts[known], prompt):
                known = place[prompt.prompt_id] = len(prompts)
                prompts.append(prompt)
                vision.append(None if batch.vision is None else batch.vision[i])
            merged[i] = known
        indices.append(merged[batch.prompt_index])

    def joined(name: str) -> Array:
        return np.concatenate([getattr(batch, name) for batch in batches])

    return TokenBatch(
        prompts=prompts,
        prompt_index=np.concatenate(indices),
        group_index=joined("group_index"),
        sample_index=joined("sample_index"),
        response_lengths=joined("response_lengths"),
        trained_lengths=joined("trained_lengths"),
        response_offsets=offsets(np.concatenate([np.diff(batch.response_offsets) for batch in batches])),
        response_tokens=joined("response_tokens"),
        logprobs=joined("logprobs"),
        loss_mask=joined("loss_mask"),
        seeds=joined("seeds"),
        version_offsets=offsets(np.concatenate([np.diff(batch.version_offsets) for batch in batches])),
        versions=joined("versions"),
        version_lengths=joined("version_lengths"),
        finish_reasons=[reason for batch in batches for reason in batch.finish_reasons],
        failures=[failure for batch in batches for failure in batch.failures],
        verdicts=[verdicts for batch in batches for verdicts in batch.verdicts],
        rewards=joined("rewards"),
        columns={name: np.concatenate([batch.columns[name] for batch in batches]) for name in batches[0].columns},
        response_columns={
            name: np.concatenate([batch.response_columns[name] for batch in batches])
            for name in batches[0].response_columns
        },
        vision=None if batches[0].vision is None else vision,
    )


def extend(response: TokenBatch, continuation: TokenBatch) -> TokenBatch:
    """A partial rollout and its continuation as one response: batches of one response each.

    Prompt, group, seed and sample index are those of ``response``; finish reason, failure, verdicts and reward those of
    ``continuation``. Raises ValueError unless each batch has one response.
    """
    if len(response) != 1 or len(continuation) != 1:
        counts = f"{len(response)}, {len(continuation)}"
        raise ValueError(f"a continuation joins two batches of one response each, these have {counts}")
    versions = np.concatenate([response.versions, continuation.versions])
    version_lengths = np.concatenate([response.version_lengths, continuation.version_lengths])
    seam = len(response.versions)
    if 0 < seam < len(versions) and versions[seam - 1] == versions[seam]:
        version_lengths[seam - 1] += version_lengths[seam]
        versions = np.delete(versions, seam)
        version_lengths = np.delete(version_lengths, seam)
    tokens = np.concatenate([response.response_tokens, continuation.response_tokens])
    return replace(
        response,
        response_lengths=np.array([len(tokens)], np.int64),
        trained_lengths=response.trained_lengths + continuation.trained_lengths,
        response_offsets=offsets([len(tokens)]),
        response_tokens=tokens,
        logprobs=np.concatenate([response.logprobs, continuation.logprobs]),
        loss_mask=np.concatenate([response.loss_mask, continuation.loss_mask]),
        version_offsets=offsets([len(versions)]),
        versions=versions,
        version_lengths=version_lengths,
        finish_reasons=continuation.finish_reasons,
        failures=continuation.failures,
        verdicts=continuation.verdicts,
        rewards=continuation.rewards,
    )


def offsets(lengths: Sequence[int] | Array) -> Array:
    """int64 [n + 1]: where each of n pieces begins in their concatenation, and where the last one ends."""
    ends = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(np.asarray(lengths, np.int64), out=ends[1:])
    return ends


def _joined(pieces: Sequence[Any], dtype: Any) -> Array:
    if not len(pieces):
        return np.empty(0, dtype)
    return np.concatenate([np.asarray(piece, dtype) for piece in pieces])


def _lengths(ends: Array, chosen: Array) -> Array:
    """The lengths of the chosen pieces, without a pass over the others: batches of one response are selected often."""
    return ends[chosen + 1] - ends[chosen]


def _same_tokens(one: Prompt, other: Prompt) -> bool:
    return one is other or np.array_equal(one.token_ids, other.token_ids)


def _slices(ends: Array, chosen: Array) -> list[slice]:
    """Where the tokens of the chosen responses stand: one slice for successive ones."""
    if len(chosen) and np.array_equal(chosen, np.arange(chosen[0], chosen[0] + len(chosen))):
        return [slice(int(ends[chosen[0]]), int(ends[chosen[-1] + 1]))]
    return [slice(int(start), int(stop)) for start, stop in zip(ends[chosen], ends[chosen + 1], strict=True)]


def _pieces(column: Array, slices: Sequence[slice]) -> Array:
    """The slices of a column in one array: a view where there is one slice."""
    if len(slices) == 1:
        return column[slices[0]]
    return np.concatenate([column[:0], *(column[piece] for piece in slices)])
