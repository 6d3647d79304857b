"""Settings of the rollout: engines, sampling, weight sync, environment."""

from dataclasses import dataclass
from typing import Any

from megatron_ext.platform.features import capabilities
from megatron_ext.settings import COUNT, FREE, SECONDS, TOKENS, setting
from rollout import vllm_platform
from rollout.vllm_platform import KV_CACHE_DTYPES, QUANTIZATIONS


@dataclass
class EnvironmentConfig:
    """What replies to the model in the middle of a response (``rollout.environment``)."""

    name: str | None = setting("search, or the dotted path of the user's own; null for none")
    max_turns: int = setting("replies in a response at most", range="[1, 1e6]")
    settings: dict[str, Any] = setting("keyword arguments of the environment's function")


@dataclass
class SpeculativeConfig:
    """Speculative decoding: a method drafts the next tokens of a response, and the model verifies them in one step.

    A draft token is accepted with the probability that the model gives it. A rejected token is replaced by one that is
    drawn from the rest of the model's distribution (Leviathan et al. 2023, arXiv 2211.17192). So samples and log-probs
    are those of the model itself.
    """

    method: str | None = setting(
        "ngram: the tokens that followed the same ones earlier in prompt or response; null for no drafts",
        choices=("ngram",),
    )
    draft_tokens: int = setting("draft tokens of a sequence in a step at most", range="[1, 128]", unit="tokens")
    lookup_min: int = setting("ngram: fewest equal tokens before a draft", range=TOKENS, unit="tokens")
    lookup_max: int = setting("ngram: most equal tokens that are looked for", range=TOKENS, unit="tokens")

    @property
    def step_tokens(self) -> int:
        """The maximum number of tokens of a sequence that a decoding step computes."""
        return 1 if self.method is None else 1 + self.draft_tokens


@dataclass
class RolloutConfig:
    """Settings of the engines, which are vLLM processes that sample with the weights of the last weight sync."""

    engines: int = setting("vLLM processes, all nodes together", range="[1, 1e5]", on_resume=FREE)
    tensor: int = setting("tensor-parallel size of an engine", range="[1, 1e5]", on_resume=FREE)
    max_response_tokens: int = setting("longest response", range=TOKENS, unit="tokens")
    temperature: float = setting("sampling temperature; vLLM takes a lower one for 0.01", range="[0.01, 100]")
    top_p: float = setting("nucleus sampling: probability mass of the tokens sampled from", range="(0, 1]")
    max_num_seqs: int = setting("sequences that an engine decodes at once", range="[1, 1e6]", on_resume=FREE)
    max_num_batched_tokens: int = setting(
        "tokens of an engine's step at most", range=TOKENS, unit="tokens", on_resume=FREE
    )
    kv_cache_gib: float = setting("key-value cache of each engine worker", range="(0, 1e5]", unit="GiB", on_resume=FREE)
    threads: int = setting(
        "CPU threads of each engine worker; trainer and engines take turns", range="[1, 1e5]", on_resume=FREE
    )
    startup_timeout: float = setting("longest start of an engine", range=SECONDS, unit="seconds", on_resume=FREE)
    stall_timeout: float = setting(
        "longest time in which a busy engine finishes no step; then it is killed, and the next sync restarts it",
        range=SECONDS,
        unit="seconds",
        on_resume=FREE,
    )
    staleness: int = setting(
        "1: the next step's samples are generated, with weights one update older, while the trainer works",
        range="[0, 1]",
        unit="updates",
    )
    in_flight_updates: bool = setting(
        "with staleness: an update's weights go to the engines in the middle of generating. A response goes on by the "
        "new weights, with the keys and values of the old; where in it they change depends on time, so that no run "
        "repeats another's bits"
    )
    oversample: float = setting(
        "prompts in flight for each prompt of a step; above 1 a step takes the groups that are complete first",
        range="[1, 1e3]",
    )
    partial_rollout_tokens: int | None = setting(
        "with oversample: generate in rounds of this many tokens, and carry incomplete responses over to the next "
        "step; null to generate them anew",
        range=TOKENS,
        unit="tokens",
    )
    thinking_budget: int | None = setting(
        "longest thinking, after which its end is forced; null for no bound", range=TOKENS, unit="tokens"
    )
    thinking_marks: list[str] = setting("texts that begin and end the thinking")
    environment: EnvironmentConfig = setting("the environment")
    cuda_graphs: bool = setting(
        "GPU: decoding steps are captured as CUDA graphs when an engine starts, and replayed", on_resume=FREE
    )
    async_scheduling: bool = setting("GPU: vLLM prepares a step while the GPU computes the one before", on_resume=FREE)
    model_runner_v2: bool = setting("GPU: vLLM's second model runner in place of the first", on_resume=FREE)
    sleep: bool = setting("GPU: engines give their memory to the trainer while it works", on_resume=FREE)
    quantization: str | None = setting(
        "FP8 of the engines' linear layers, quantised at each sync; null for none", choices=QUANTIZATIONS
    )
    kv_cache_dtype: str = setting(
        "format of keys and values in the engines' cache: auto (the weights') or fp8 (E4M3, half of the bytes)",
        choices=KV_CACHE_DTYPES,
    )
    speculative: SpeculativeConfig = setting("speculative decoding", on_resume=FREE)
    sync_bucket_mib: int = setting(
        "weight sync: bytes of a rank's message to engines on other hosts; at most two are in memory",
        range="[1, 1e6]",
        unit="MiB",
        on_resume=FREE,
    )
    sync_verify_every: int = setting(
        "weight sync: syncs between two comparisons of all parameters' checksums; also at the first",
        range=COUNT,
        on_resume=FREE,
    )


def check_speculative(settings: RolloutConfig) -> None:
    """Raise ValueError for settings that can't be combined with speculative decoding."""
    speculative = settings.speculative
    if speculative.method is None:
        return
    if speculative.lookup_min > speculative.lookup_max:
        raise ValueError(
            f"rollout.speculative.lookup_min={speculative.lookup_min}: is more than rollout.speculative.lookup_max="
            f"{speculative.lookup_max}; use at most that"
        )
    field = f"rollout.speculative.method={speculative.method!r}"
    if settings.async_scheduling:
        raise ValueError(
            f"{field}: drafts follow from the tokens of the step before, which a step that is scheduled meanwhile does "
            "not have; use rollout.async_scheduling=false"
        )
    if settings.model_runner_v2:
        raise ValueError(
            f"{field}: vLLM's second model runner verifies drafts in its own way, which has not been tried here; use "
            "rollout.model_runner_v2=false"
        )
    if settings.thinking_budget is not None:
        raise ValueError(
            f"{field}: drafts may go past the end of the thinking that vLLM forces; use rollout.thinking_budget=null"
        )
    if settings.environment.name is not None:
        raise ValueError(
            f"{field}: vLLM looks for the texts that end a turn after a step, which may have gone past them; use "
            "rollout.environment.name=null"
        )


def check(settings: RolloutConfig, platform: str) -> None:
    """Raise ValueError for settings that can't be combined with each other or with the ``platform``."""
    partial = settings.partial_rollout_tokens
    if partial is not None and settings.oversample == 1:
        raise ValueError(
            f"rollout.partial_rollout_tokens={partial}: carries over what rollout.oversample puts in flight; with "
            "rollout.oversample=1 nothing is left over: use more than 1, or null"
        )
    if settings.sleep and (settings.staleness or not capabilities(platform).can_sleep):
        raise ValueError(
            "rollout.sleep=true: needs a GPU and rollout.staleness=0 (it generates while the trainer works)"
        )
    if settings.in_flight_updates and not settings.staleness:
        raise ValueError(
            "rollout.in_flight_updates=true: only with rollout.staleness=1 do the engines generate while the trainer "
            "updates; use that, or rollout.in_flight_updates=false"
        )
    for flag in ("async_scheduling", "model_runner_v2"):
        if getattr(settings, flag) and not capabilities(platform).has_gpus:
            raise ValueError(f"rollout.{flag}=true: vLLM has it on GPUs only; use rollout.{flag}=false")
    vllm = vllm_platform.of(platform)
    if settings.quantization is not None and settings.quantization not in vllm.quantizations:
        raise ValueError(
            f"rollout.quantization={settings.quantization!r}: needs cluster.platform=cuda; on a {platform} vLLM has "
            f"{', '.join(vllm.quantizations)} only"
        )
    lacking = vllm.lacks_for_fp8_cache()
    if settings.kv_cache_dtype == "fp8" and lacking:
        raise ValueError(
            f"rollout.kv_cache_dtype='fp8': vLLM's attention on a {platform} needs {', '.join(lacking)}, which this "
            "processor lacks; use rollout.kv_cache_dtype=auto"
        )
    if len(settings.thinking_marks) != 2 or not all(settings.thinking_marks):
        raise ValueError(
            f"rollout.thinking_marks={settings.thinking_marks}: give what begins and what ends the thinking"
        )
    check_speculative(settings)
    name = settings.environment.name
    if name is not None and (settings.oversample > 1 or settings.thinking_budget is not None):
        raise ValueError(
            f"rollout.environment.name={name!r}: its turns are generated in rounds of complete responses, and its "
            "tokens are the only forced ones: use rollout.oversample=1 and rollout.thinking_budget=null"
        )
