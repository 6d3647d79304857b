"""The engine process: vLLM in the main thread, and an HTTP server on a Unix socket that only the same user can reach.

``rollout.engine.Engine`` starts it as ``python -m rollout.engine_server SETTINGS_JSON LISTEN_FD OWNER_PID``.

The main thread owns vLLM. HTTP handlers put callables into a queue, and the main thread runs them between two engine
steps. When there are no requests, it sleeps on the queue. A batch is added by one callable, so the composition of every
step depends on the requests alone, and so does every bit of the result.

Routes. Bodies are JSON unless noted; an error is ``{"error": text}`` with status 409.

* ``GET /health``
* ``POST /generate``: binary, see ``rollout.frames``. With ``num_complete`` it ends when that many prompts have all
  their responses.
* ``POST /weights/layout``, ``POST /weights/plan``, ``POST /weights/update``, ``GET /weights/checksum``,
  ``GET /weights/digest``: see ``rollout.weight_sync``.
* ``POST /sleep``
* ``POST /wake``: ``{"tags": ["weights"]}`` before a weight sync, ``{"tags": ["kv_cache"]}`` after it.
* ``POST /shutdown``
"""

import asyncio
import gc
import io
import json
import os
import queue
import sys
import threading
import traceback
from collections import Counter
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ext.batch import UNFINISHED, Prompt, TokenBatch, build, offsets
from megatron_ext.processes import die_with
from rollout import vllm_platform
from rollout.engine import EngineSettings
from rollout.frames import BATCH, DONE, ERROR, frame, read_frames
from rollout.sampling import Sampling
from rollout.thinking import forced_positions, reasoning_config
from rollout.user_socket import UserSocket
from rollout.weight_sync.receiver import WeightReceiver

ENGINE_PID = "ROLLOUT_ENGINE_PID"
WORKER_EXTENSION = "rollout.weight_sync.worker.WeightSyncWorker"


class Refused(Exception):
    """A request that the engine does not serve; the text goes to the client."""


def die_with_engine() -> None:
    """Make this vLLM worker end with the engine that spawned it, even while it still imports vLLM."""
    die_with(int(os.environ[ENGINE_PID]))


def build_llm_engine(settings: EngineSettings) -> Any:
    """Build vLLM's engine with the worker extension of the weight sync."""
    # The objects that imports create stay alive. Garbage collection took a sixth of the time of the imports.
    gc.disable()
    from vllm.v1.engine.llm_engine import LLMEngine

    # In the worker processes, the worker extension calls this.
    vllm_platform.of(settings.platform).change_vllm()
    gc.enable()
    return LLMEngine.from_engine_args(engine_args(settings))


def engine_args(settings: EngineSettings) -> Any:
    """The settings as vLLM's ``EngineArgs``."""
    from vllm import EngineArgs

    from rollout import chat_layout

    chat_layout.register()
    has_vision_tower = "vision_config" in json.loads(Path(settings.model, "config.json").read_text())
    optional = {} if settings.thinking is None else {"reasoning_config": reasoning_config(settings.thinking)}
    speculative = settings.rollout.speculative
    if speculative.method is not None:
        optional["speculative_config"] = {
            "method": speculative.method,
            "num_speculative_tokens": speculative.draft_tokens,
            "prompt_lookup_min": speculative.lookup_min,
            "prompt_lookup_max": speculative.lookup_max,
        }
    platform = vllm_platform.of(settings.platform)
    graphs = platform.graph_sizes(settings.rollout.max_num_seqs) if settings.rollout.cuda_graphs else []
    return EngineArgs(
        model=settings.model,
        # The engine takes and returns token ids, and stop tokens are explicit, so it needs no tokenizer. There are two
        # exceptions: vLLM's image processor needs one for the placeholder tokens, and stop strings need one.
        skip_tokenizer_init=not (has_vision_tower or settings.tokenizer),
        # The images of a prompt are processed once for all its samples, see ``add_batch``.
        mm_processor_cache_gb=0,
        # The trainer uses the pixel values of transformers' processor, so the engine must use the same ones.
        mm_device_do_normalize=False,
        # Dummy weights are never used, because the engine does not generate before the first weight sync.
        load_format="auto" if settings.loads_weights else "dummy",
        dtype=settings.dtype,
        quantization=settings.rollout.quantization,
        tensor_parallel_size=settings.rollout.tensor,
        max_model_len=settings.max_model_len,
        max_num_seqs=settings.rollout.max_num_seqs,
        max_num_batched_tokens=settings.rollout.max_num_batched_tokens,
        kv_cache_dtype=settings.rollout.kv_cache_dtype,
        kv_cache_memory_bytes=int(settings.rollout.kv_cache_gib * 2**30),
        # The size of the KV cache is set above, so this is only the share of memory that vLLM requires to be free. It
        # is low because the trainer uses memory too.
        gpu_memory_utilization=0.05,
        async_scheduling=settings.rollout.async_scheduling,
        logprobs_mode="processed_logprobs",
        # Sampling parameters come from the request alone, without defaults from the model folder.
        generation_config="vllm",
        worker_extension_cls=WORKER_EXTENSION,
        enable_sleep_mode=settings.rollout.sleep,
        disable_log_stats=True,
        seed=0,
        **vllm_platform.graph_arguments(graphs, speculative.step_tokens),
        **platform.engine_arguments,
        **optional,
    )


@dataclass(frozen=True)
class Batch:
    """The requests of one ``/generate`` call."""

    # vLLM's request ids.
    ids: list[str]
    # Receives the frames of the answer.
    sink: Callable[[bytes], Any]
    requests: TokenBatch
    sampling: Sampling
    # By prompt id: the number of responses that are still missing.
    remaining: Counter[str]
    # The batch ends when this many prompts have all their responses. None: when all have.
    num_complete: int | None


class EngineLoop:
    """vLLM, the state of its weights, and the queue of callables that other threads submit."""

    def __init__(self, settings: EngineSettings, llm_engine: Any) -> None:
        self.settings = settings
        self.llm = llm_engine
        self.weights = WeightReceiver(llm_engine)
        if settings.loads_weights:
            self.weights.arrived(0)
        self.commands: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]]] = queue.SimpleQueue()
        # By vLLM's request id: the batch, and the index of the request in it.
        self.unfinished: dict[str, tuple[Batch, int]] = {}
        self.next_id = 0
        self.progress = 0
        self.asleep: set[str] = set()
        self.prompt_tokens = 0
        self.cached_prompt_tokens = 0
        self.stopping = False

    def submit(self, function: Callable[[], Any]) -> Future[Any]:
        """Queue ``function``, which the main thread runs between two engine steps. Returns the future of its result."""
        future: Future[Any] = Future()
        self.commands.put((function, future))
        return future

    def run(self) -> None:
        """Serve until :meth:`stop` has run. Raises what vLLM's step raises; the engine is then unusable."""
        while not self.stopping:
            busy = self.llm.has_unfinished_requests()
            try:
                self._execute(*self.commands.get(block=not busy))
                continue
            except queue.Empty:
                pass
            self._step()

    def stop(self) -> None:
        self.stopping = True

    def health(self) -> dict[str, Any]:
        return {
            "weight_version": self.weights.version,
            "stale": self.weights.stale,
            "workers": self.settings.rollout.tensor,
            "unfinished_requests": len(self.unfinished),
            # The number of steps, accepted requests and executed commands so far.
            "progress": self.progress,
            "asleep": sorted(self.asleep),
            # Prompt tokens of all finished requests so far, and those of them that came from the prefix cache.
            "prompt_tokens": self.prompt_tokens,
            "cached_prompt_tokens": self.cached_prompt_tokens,
        }

    def add_batch(
        self, requests: TokenBatch, sampling: Sampling, num_complete: int | None, sink: Callable[[bytes], Any]
    ) -> list[str]:
        """Check every request, then add all of them. Returns vLLM's request ids.

        ``sink`` receives a frame for each response. The batch ends with the engine step in which ``num_complete``
        prompts have all their responses. Then ``sink`` receives a done frame, and the other requests are dropped.

        Raises Refused for a request that this engine can't serve.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        self._check_usable()
        if sampling.thinking_budget is not None and self.settings.thinking is None:
            raise Refused(
                f"sampling.thinking_budget={sampling.thinking_budget}: this engine has no thinking marks; set "
                "rollout.thinking_budget"
            )
        if sampling.stops and not self.settings.tokenizer:
            raise Refused(
                f"sampling.stops={sampling.stops}: this engine has no tokenizer; set rollout.environment.name"
            )
        inputs = []
        for prompt in requests.prompts:
            length = len(prompt.token_ids)
            if not length or length + sampling.max_tokens > self.settings.max_model_len:
                raise Refused(
                    f"prompt {prompt.prompt_id!r}: {length} prompt tokens and max_tokens={sampling.max_tokens} "
                    f"do not fit into the engine's {self.settings.max_model_len} (data.max_prompt_tokens + "
                    "rollout.max_response_tokens), or the prompt is empty"
                )
        for prompt in requests.prompts:
            inputs.append(engine_input(self.llm.renderer, prompt))
            self.progress += 1
        if not self.llm.has_unfinished_requests():
            # Prefix-cache entries of earlier batches would change the composition of this batch's steps. The encoder
            # cache may hold images that were encoded by earlier weights.
            self.llm.reset_prefix_cache()
            self.llm.reset_encoder_cache()
        ids: list[str] = []
        remaining = Counter(prompt_id for prompt_id, _ in requests.keys)
        batch = Batch(ids, sink, requests, sampling, remaining, num_complete)
        try:
            for i in range(len(requests)):
                ids.append(str(self.next_id))
                self.next_id += 1
                earlier_tokens = requests.response_tokens[requests.tokens_of(i)].tolist()
                still_allowed = sampling.max_tokens - len(earlier_tokens)
                params = SamplingParams(
                    temperature=sampling.temperature,
                    top_p=sampling.top_p,
                    max_tokens=min(still_allowed, sampling.round_tokens or still_allowed),
                    thinking_token_budget=sampling.thinking_budget,
                    stop_token_ids=list(sampling.stop_token_ids),
                    seed=int(requests.seeds[i]),
                    logprobs=0,
                    flat_logprobs=True,
                    stop=list(sampling.stops),
                    detokenize=bool(sampling.stops),
                    include_stop_str_in_output=True,
                    output_kind=RequestOutputKind.FINAL_ONLY,
                )
                tokens = requests.prompt(i).token_ids.tolist() + earlier_tokens
                engine_request = inputs[requests.prompt_index[i]] | {"prompt_token_ids": tokens}
                self.llm.add_request(ids[-1], engine_request, params)
                self.unfinished[ids[-1]] = (batch, i)
        except Exception:
            # vLLM refused a request, so no request of the batch may run.
            self.abort(ids)
            raise
        return ids

    def abort(self, ids: list[str]) -> None:
        """Drop those of the requests that are unfinished, because no client waits for them any more."""
        unfinished = [request_id for request_id in ids if self.unfinished.pop(request_id, None)]
        if unfinished:
            self.llm.abort_request(unfinished)

    def change_weights(self, function: Callable[[Any], dict[str, Any]], body: Any) -> dict[str, Any]:
        """Run a step of the weight sync. Raises Refused while requests are running and while the weights are asleep."""
        if "weights" in self.asleep:
            raise Refused('the weights are asleep: POST /wake {"tags": ["weights"]} before a sync')
        return self.between_batches(function, body)

    def update_weights(self, function: Callable[[Any], dict[str, Any]], body: Any) -> dict[str, Any]:
        """Run a weight update, with ``rollout.in_flight_updates`` also while requests are running.

        Such an update happens between two engine steps. Running requests continue with the new weights and keep the
        KV cache that the old weights computed. If the new weights do not arrive completely, the running requests end in
        an error.
        """
        if not self.settings.rollout.in_flight_updates:
            return self.change_weights(function, body)
        self._finish_scheduled_steps()
        try:
            return function(body)
        finally:
            if self.weights.stale:
                self._fail_all("the weights changed in the middle of the response, and did not arrive whole")

    def between_batches(self, function: Callable[[Any], dict[str, Any]], body: Any) -> dict[str, Any]:
        """Run a change of weights or memory. Raises Refused while requests are running."""
        if self.llm.has_unfinished_requests():
            raise Refused(f"{len(self.unfinished)} requests are still running: weights change only between batches")
        return function(body)

    def sleep(self, _: Any) -> dict[str, Any]:
        """Release the memory of the weights and the KV cache.

        With ``loads_weights``, where no weight sync brings the weights, host memory keeps a copy of them. Otherwise no
        copy is kept, so a weight sync must follow the wake.
        """
        if not self.settings.rollout.sleep:
            raise Refused("rollout.sleep is false: this engine keeps its memory (a CPU has no sleep mode)")
        self.weights.stale = not self.settings.loads_weights
        self.asleep = {"weights", "kv_cache"}
        self.llm.sleep(level=1 if self.settings.loads_weights else 2)
        return {}

    def wake(self, body: dict[str, Any]) -> dict[str, Any]:
        """Allocate the memory of ``tags`` again: ``weights`` before a weight sync, ``kv_cache`` after it."""
        tags = set(body["tags"]) & self.asleep
        if tags:
            self.llm.wake_up(sorted(tags))
            self.asleep -= tags
        if "kv_cache" in tags:
            self.weights.zero_cache()
        return {}

    def _check_usable(self) -> None:
        if self.asleep:
            raise Refused(f"asleep: {', '.join(sorted(self.asleep))}: wake and sync before generating")
        if self.weights.stale:
            raise Refused(
                "the last sync failed or the engine slept, so the weights are stale: sync again before generating"
            )
        if self.weights.version is None:
            raise Refused("no weights yet: sync once before generating")

    def _execute(self, function: Callable[[], Any], future: "Future[Any]") -> None:
        try:
            future.set_result(function())
        except Exception as error:
            # The client receives the error, and the engine continues.
            traceback.print_exc()
            future.set_exception(error)
        self.progress += 1

    def _finish(self, batch: Batch, i: int, output: Any) -> None:
        self.prompt_tokens += len(output.prompt_token_ids)
        self.cached_prompt_tokens += output.num_cached_tokens
        try:
            response = finished_response(batch.requests, i, batch.sampling, output, self.settings.thinking)
        except Refused as error:
            batch.sink(frame(ERROR, str(error).encode()))
        else:
            batch.sink(frame(BATCH, response.to_bytes()))
        batch.remaining[batch.requests.prompt(i).prompt_id] -= 1
        if batch.num_complete is not None and list(batch.remaining.values()).count(0) == batch.num_complete:
            self.abort(batch.ids)
            batch.sink(frame(DONE))

    def _step(self) -> None:
        for output in self.llm.step():
            if output.finished and output.request_id in self.unfinished:
                self._finish(*self.unfinished.pop(output.request_id), output)
        self.progress += 1

    def _finish_scheduled_steps(self) -> None:
        """Process the tokens of steps that vLLM has already scheduled, without scheduling a further step.

        With ``rollout.async_scheduling`` a step is in progress between two calls of vLLM's ``step``.
        """
        core = self.llm.engine_core.engine_core
        if core.batch_queue is None:
            return
        core.pause_scheduler("keep", clear_cache=False)
        while core.batch_queue:
            self._step()
        core.resume_scheduler()

    def _fail_all(self, reason: str) -> None:
        """End all requests with an error."""
        for batch, _ in self.unfinished.values():
            batch.sink(frame(ERROR, reason.encode()))
        self.abort(list(self.unfinished))


def engine_input(renderer: Any, prompt: Prompt) -> Any:
    """Convert a prompt to the input of vLLM's engine. Images and videos go through vLLM's own processor.

    Raises Refused when that processor returns other token ids than the trainer has.
    """
    from vllm.inputs import TokensPrompt, tokens_input

    tokens = prompt.token_ids.tolist()
    if not prompt.images and not prompt.videos:
        return tokens_input(tokens)

    from transformers.image_utils import load_image

    from rollout.media import clip

    media = {
        "image": [load_image(path) for path in prompt.images],
        "video": [clip([load_image(path) for path in frames]) for frames in prompt.videos],
    }
    marked = TokensPrompt(
        prompt_token_ids=prompt.marked_token_ids.tolist(),
        multi_modal_data={kind: items for kind, items in media.items() if items},
    )
    (rendered,) = renderer.render_cmpl([marked])
    rendered_tokens = rendered["prompt_token_ids"]
    if rendered_tokens != tokens:
        raise Refused(
            f"prompt {prompt.prompt_id!r}: the {len(rendered_tokens)} tokens that vLLM's processor makes of it are not "
            f"the trainer's {len(tokens)}: give both the same model folder and files, and one environment"
        )
    return rendered


def finished_response(requests: TokenBatch, i: int, sampling: Sampling, output: Any, thinking: Any) -> TokenBatch:
    """Convert a finished ``RequestOutput`` of vLLM to a batch of one response.

    The response does not include the tokens that request ``i`` continued from. vLLM reports which weight version
    sampled which tokens (``WeightReceiver.arrived``).

    Raises Refused in three cases: the log-probs belong to other tokens than the sampled ones; a log-prob is not
    finite, which means broken weights or a broken kernel; or vLLM sampled a token that the thinking budget should have
    forced (module ``rollout.thinking``).
    """
    completion = output.outputs[0]
    prompt = requests.prompt(i)
    tokens = np.array(completion.token_ids, np.int32)
    if completion.logprobs.token_ids != list(completion.token_ids):
        raise Refused(f"prompt {prompt.prompt_id!r}: vLLM gave log-probabilities of other tokens than it sampled")
    logprobs = np.array(completion.logprobs.logprobs, np.float32)
    if not np.isfinite(logprobs).all():
        raise Refused(f"prompt {prompt.prompt_id!r}: log-probabilities are not finite: check the weights")
    sampled = np.ones(len(tokens), bool)
    budget = sampling.thinking_budget
    if budget is not None:
        forced = forced_positions(output.prompt_token_ids, completion.token_ids, thinking, budget)
        sampled[list(forced)] = False
    if logprobs[~sampled].any():
        raise Refused(f"prompt {prompt.prompt_id!r}: vLLM did not end the thinking after {budget} tokens")
    reason = completion.finish_reason
    # ``stop_reason`` is text for one of ``sampling.stops``. For a stop token it is the token's id or None.
    if isinstance(completion.stop_reason, str):
        reason = "turn"
    num_earlier_tokens = int(requests.response_lengths[i])
    if reason == "length" and num_earlier_tokens + len(tokens) < sampling.max_tokens:
        reason = UNFINISHED
    response = build(
        # Without the prompt's tokens, which the client has.
        [Prompt(prompt.prompt_id, np.empty(0, np.int32))],
        [tokens],
        sample_index=requests.sample_index[[i]],
        logprobs=[logprobs],
        loss_mask=[sampled],
        finish_reasons=[reason],
    )
    runs = completion.weight_versions
    return replace(
        response,
        version_offsets=offsets([len(runs)]),
        versions=np.array([int(run.version) for run in runs], np.int32),
        version_lengths=np.array([run.end - run.start for run in runs], np.int32),
    )


async def serve(loop: EngineLoop, listener: UserSocket) -> None:
    """Answer HTTP on ``listener`` for as long as the process lives."""
    from aiohttp import web

    async def on_main_thread(function: Callable[[], Any]) -> Any:
        return await asyncio.wrap_future(loop.submit(function))

    async def generate(http: web.Request) -> web.StreamResponse:
        (_, header), (_, columns) = read_frames(io.BytesIO(await http.read()).read)
        settings = json.loads(header)
        sampling = settings["sampling"]
        for name in ("stop_token_ids", "stops"):
            sampling[name] = tuple(sampling[name])
        frames: asyncio.Queue[bytes] = asyncio.Queue()
        event_loop = asyncio.get_running_loop()
        ids = await on_main_thread(
            lambda: loop.add_batch(
                TokenBatch.from_bytes(columns),
                Sampling(**sampling),
                settings["num_complete"],
                lambda message: event_loop.call_soon_threadsafe(frames.put_nowait, message),
            )
        )
        response = web.StreamResponse(headers={"Content-Type": "application/octet-stream"})
        try:
            await response.prepare(http)
            for _ in ids:
                message = await frames.get()
                if message.startswith(DONE):
                    break
                await response.write(message)
            await response.write(frame(DONE))
        finally:
            loop.submit(lambda: loop.abort(ids))
        return response

    def weights(
        function: Callable[[Any], dict[str, Any]], guard: Callable[..., dict[str, Any]] = loop.change_weights
    ) -> Callable[[web.Request], Any]:
        async def handler(http: web.Request) -> web.Response:
            body = await http.json() if http.can_read_body else None
            return web.json_response(await on_main_thread(lambda: guard(function, body)))

        return handler

    async def health(_: web.Request) -> web.Response:
        return web.json_response(loop.health())

    async def shutdown(_: web.Request) -> web.Response:
        loop.submit(loop.stop)
        return web.json_response({})

    @web.middleware
    async def errors_as_json(
        request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        try:
            return await handler(request)
        except web.HTTPException:
            raise
        except Exception as error:
            text = str(error) if isinstance(error, Refused) else f"{type(error).__name__}: {error}"
            return web.json_response({"error": text}, status=409)

    app = web.Application(client_max_size=2**30, middlewares=[errors_as_json], handler_args={"access_log": None})
    app.add_routes(
        [
            web.get("/health", health),
            web.post("/generate", generate),
            web.post("/weights/layout", weights(loop.weights.layout)),
            web.post("/weights/plan", weights(loop.weights.set_plan)),
            web.post("/weights/update", weights(loop.weights.update, loop.update_weights)),
            web.get("/weights/checksum", weights(lambda _: loop.weights.checksum())),
            web.get("/weights/digest", weights(lambda _: loop.weights.digest())),
            web.post("/sleep", weights(loop.sleep, loop.between_batches)),
            web.post("/wake", weights(loop.wake, loop.between_batches)),
            web.post("/shutdown", shutdown),
        ]
    )
    runner = web.AppRunner(app)
    await runner.setup()
    await web.SockSite(runner, listener).start()
    await asyncio.Event().wait()


def main() -> None:
    """Start vLLM, then serve until ``/shutdown``.

    When a step of vLLM fails, the process exits with status 1 and a traceback in the log.
    """
    settings = EngineSettings.from_json(sys.argv[1])
    die_with(int(sys.argv[3]))
    os.environ[ENGINE_PID] = str(os.getpid())
    listener = UserSocket(fileno=int(sys.argv[2]))
    loop = EngineLoop(settings, build_llm_engine(settings))
    threading.Thread(target=lambda: asyncio.run(serve(loop, listener)), daemon=True).start()
    status = 1
    try:
        loop.run()
        status = 0
    except Exception:
        traceback.print_exc()
    # Exit without a teardown of weights and caches, which is slow. The kernel ends vLLM's workers with this process.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


# This runs in a worker that vLLM spawns, because multiprocessing imports the main module before anything else.
if __name__ == "__mp_main__":
    die_with_engine()
if __name__ == "__main__":
    main()
