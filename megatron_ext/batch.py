"""The one batch of the project: columns of tokens, from the generation engine to the micro-batches of the trainer.

A ``TokenBatch`` holds S responses to P prompts as flat arrays with offsets, so no code loops over tokens. Engines
return it. Verifiers read it. Advantages and loss masks are columns of it. ``megatron_ext.packing`` packs it into
micro-batches. A checkpoint stores partial rollouts as one batch. Supervised stages build it from their rows.
``docs/batch.md`` has the layout on one page.

In RL every rank has all columns of responses, [S], but the tokens of only some responses: first those that its engines
generated, later those that it trains on (``megatron_ext.routing``).

Processes exchange batches as safetensors bytes. Columns are stored as they are in memory; text is one entry of JSON
bytes. This module needs numpy and safetensors only, so an engine's client can import it without torch.
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

UNFINISHED = "unfinished"  # a partial rollout: a later round continues the response
# The safetensors entry that holds the text columns, as bytes of JSON. They are not in the header, because safetensors
# refuses a header above 100 MB, which the raw answers of judges on some thousand responses can reach.
TEXT = "text"


@dataclass(frozen=True)
class Prompt:
    """A prompt in the form in which it is sent to the engines."""

    prompt_id: str
    # int32 [tokens]: the prompt after the chat template, with a placeholder token for each output row of the vision
    # tower.
    token_ids: Array
    # File names, in prompt order. A video is the list of its frames' files.
    images: tuple[str, ...] = ()
    videos: tuple[tuple[str, ...], ...] = ()
    # int32: the prompt with one mark for each image or video. vLLM's own processor must turn it into exactly
    # ``token_ids``. Empty for a text-only prompt.
    marked_token_ids: Array = field(default_factory=lambda: np.empty(0, np.int32))


@dataclass(eq=False)
class TokenBatch:
    """S responses to P prompts.

    The batch holds the tokens of some of the responses, R tokens in all. Of the other responses it has only the columns
    of responses, [S], which include the number of tokens.

    Raises ValueError where the columns do not fit each other.
    """

    prompts: list[Prompt]  # [P]
    # int32 [S]: the prompt of each response.
    prompt_index: Array
    # int32 [S]: the group of each response. A reward is compared only with the rewards of the same group.
    group_index: Array
    # int32 [S]: the number of a response among the responses to its prompt.
    sample_index: Array
    # int64 [S]: the number of tokens of each response, whether or not this batch holds them.
    response_lengths: Array
    # int64 [S]: the number of tokens of each response that the loss mask covers.
    trained_lengths: Array
    # int64 [S + 1]: response i has the tokens ``response_offsets[i]`` up to ``response_offsets[i + 1]`` of the token
    # columns. The two are equal where this batch does not hold the response's tokens.
    response_offsets: Array
    # int32 [R]: token ids, never decoded and encoded again.
    response_tokens: Array
    # float32 [R]: natural log-probability under the distribution that was sampled from (after temperature and top-p;
    # for greedy decoding the plain softmax). 0 for a token that was not sampled.
    logprobs: Array
    # bool [R]: whether a token is trained on. False for forced tokens (an end of thinking, an environment's reply,
    # other speakers' turns) and for all tokens of a response without a reward.
    loss_mask: Array
    # int64 [S]: the seed of the sampling noise. 0 where nothing is sampled.
    seeds: Array
    # Runs of successive tokens that were sampled by one version of the weights. A version is the number of the weight
    # sync. Response i has the runs ``version_offsets[i]`` up to ``version_offsets[i + 1]``; int64 [S + 1].
    version_offsets: Array
    # int32 [V]: the version of each of the V runs.
    versions: Array
    # int32 [V]: the number of tokens of each run.
    version_lengths: Array
    # [S]: "stop" (the last token is a stop token), "length", "unfinished" (a partial rollout), "turn" (an environment
    # replies next), "turns" (the environment's replies are used up), "failed" (``failures`` says why), or "" for a
    # response that was not generated.
    finish_reasons: list[str]
    failures: list[str]  # [S]
    # [S]: verifier name → plain JSON, see ``rewards.verdict``.
    verdicts: list[dict[str, Any]]
    # float64 [S]: NaN for a response without a reward.
    rewards: Array
    # Further float32 [R] columns by name: ``advantages``, ``weights`` (of the token's loss), ``old_values``,
    # ``returns``.
    columns: dict[str, Array] = field(default_factory=dict)
    # float32 [S] columns by name. The value applies to each trained token of the response; all other tokens have 0.
    response_columns: dict[str, Array] = field(default_factory=dict)
    # [P]: the inputs of the trainer's vision tower (``megatron_ext.packing.VisionInputs``), None for a text prompt.
    # They are attached where they are used and never serialised.
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
        """int64 [S]: the number of tokens of each response's prompt."""
        lengths = np.array([len(prompt.token_ids) for prompt in self.prompts], np.int64)
        return lengths[self.prompt_index]

    @property
    def held(self) -> Array:
        """bool [S]: whether this batch holds the tokens of each response. True for a response without tokens."""
        return self.response_offsets[1:] - self.response_offsets[:-1] == self.response_lengths

    @property
    def lengths(self) -> Array:
        """int64 [S]: the number of tokens of prompt and response together."""
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
        """The slice of a token column that belongs to response i.

        Raises LookupError if this batch does not hold the response's tokens.
        """
        tokens = slice(int(self.response_offsets[i]), int(self.response_offsets[i + 1]))
        if tokens.stop - tokens.start != self.response_lengths[i]:
            raise LookupError(f"the tokens of response {self.keys[i]} are on other ranks")
        return tokens

    def runs_of(self, i: int) -> slice:
        """The slice of ``versions`` and ``version_lengths`` that belongs to response i."""
        return slice(int(self.version_offsets[i]), int(self.version_offsets[i + 1]))

    def broadcast(self, per_response: Array) -> Array:
        """[S] → [R]: repeat each response's value for each of its tokens that this batch holds."""
        return np.repeat(per_response, np.diff(self.response_offsets))

    def with_columns(self, **columns: Array) -> "TokenBatch":
        """The same batch with these token columns added, as float32 [R]."""
        added = {name: np.asarray(column, np.float32) for name, column in columns.items()}
        return replace(self, columns={**self.columns, **added})

    def with_response_columns(self, **columns: Array) -> "TokenBatch":
        """The same batch with these columns of responses added, as float32 [S]."""
        added = {name: np.asarray(column, np.float32) for name, column in columns.items()}
        return replace(self, response_columns={**self.response_columns, **added})

    def values(self, name: str) -> Array:
        """float32 [R]: the token column ``name``, or the column of responses ``name`` repeated for each token.

        A column of responses is 0 where the loss mask is False.
        """
        if name in self.columns:
            return self.columns[name]
        return np.where(self.loss_mask, self.broadcast(self.response_columns[name]), np.float32(0))

    def without_loss(self, responses: Array) -> "TokenBatch":
        """The same batch with the loss mask set to False for all tokens of the chosen responses.

        ``responses``, bool [S], is True for the chosen ones.
        """
        return replace(
            self,
            loss_mask=self.loss_mask & ~self.broadcast(responses),
            trained_lengths=np.where(responses, 0, self.trained_lengths),
        )

    def without_tokens(self) -> "TokenBatch":
        """The same batch without tokens: it keeps the columns of responses only."""
        return replace(
            self,
            response_offsets=np.zeros(len(self) + 1, np.int64),
            response_tokens=self.response_tokens[:0],
            logprobs=self.logprobs[:0],
            loss_mask=self.loss_mask[:0],
            columns={name: column[:0] for name, column in self.columns.items()},
        )

    def select(self, indices: Sequence[int] | Array) -> "TokenBatch":
        """The batch of the responses at ``indices``, in that order.

        Prompts without a selected response are left out. If the responses are successive ones, the token columns are
        views of this batch's columns.
        """
        chosen = np.asarray(indices, np.int64)
        place: dict[int, int] = {}  # index of a prompt here → its index among the prompts that are kept
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
        """Serialise the batch in the safetensors format, without ``vision``. Inverse of :meth:`from_bytes`."""
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
        """Read a batch from the bytes of :meth:`to_bytes`. Raises ValueError for bytes that hold no batch."""
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


# The fields of TokenBatch that are arrays. Each is an entry of the same name in the safetensors bytes.
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
    """Build a batch from one sequence of token ids for each response.

    By default response i answers prompt i and is its first sample. Log-probs are 0, no token is forced, and no token
    has a version. With ``version`` all tokens belong to that version of the weights. The responses to one prompt form
    a group.
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
    """Join the responses of the batches, in order. Prompts with the same id and the same tokens become one prompt.

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
    """Join a partial rollout and its continuation into one response. Each batch has one response.

    The result takes prompt, group, seed and sample index from ``response``. It takes finish reason, failure, verdicts
    and reward from ``continuation``. Raises ValueError unless each batch has one response.
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
    """int64 [n + 1]: the start of each of n pieces in their concatenation, and the end of the last one."""
    ends = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(np.asarray(lengths, np.int64), out=ends[1:])
    return ends


def _joined(pieces: Sequence[Any], dtype: Any) -> Array:
    if not len(pieces):
        return np.empty(0, dtype)
    return np.concatenate([np.asarray(piece, dtype) for piece in pieces])


def _lengths(ends: Array, chosen: Array) -> Array:
    """The lengths of the chosen pieces.

    The other pieces are not visited, because batches of one response are selected often.
    """
    return ends[chosen + 1] - ends[chosen]


def _same_tokens(one: Prompt, other: Prompt) -> bool:
    return one is other or np.array_equal(one.token_ids, other.token_ids)


def _slices(ends: Array, chosen: Array) -> list[slice]:
    """The slices of the chosen pieces in their column. Successive pieces share one slice."""
    if len(chosen) and np.array_equal(chosen, np.arange(chosen[0], chosen[0] + len(chosen))):
        return [slice(int(ends[chosen[0]]), int(ends[chosen[-1] + 1]))]
    return [slice(int(start), int(stop)) for start, stop in zip(ends[chosen], ends[chosen + 1], strict=True)]


def _pieces(column: Array, slices: Sequence[slice]) -> Array:
    """Join the slices of a column into one array. A single slice gives a view."""
    if len(slices) == 1:
        return column[slices[0]]
    return np.concatenate([column[:0], *(column[piece] for piece in slices)])
