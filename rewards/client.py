"""The client of the judge and reward-model servers. Requests can be submitted from any thread.

An event loop in a thread of its own sends the requests. Every request ends in a verifier's result. Errors, timeouts and
unreadable replies are retried after a backoff with jitter, at another endpoint if there is one. When the retries are
used up, the result is a Failure with the reason. A request that takes much longer than usual is also sent to another
endpoint (hedging), and the first reply is used. The client does not batch requests, since the servers batch concurrent
ones themselves.
"""

import asyncio
import json
import os
import random
import statistics
import threading
import time
from collections import Counter, deque
from collections.abc import Coroutine, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace, TracebackType
from typing import Any, Self

import aiohttp

from rewards.settings import ClientConfig, Server
from rewards.verdict import Failure, Verdict, VerifierResult, as_result
from rewards.verifiers.judges import JudgeRequest

TRANSIENT_STATUSES = (408, 409, 425, 429, 500, 502, 503, 504)
MAX_PAUSE_SECONDS = 30.0  # upper bound of the wait between two tries, whatever the backoff and Retry-After say
CHECK_SECONDS = 10.0
# vLLM's development endpoints. Sleep level 1 moves the weights to the host; mode=wait finishes running requests first.
SLEEP_PATH = "/sleep?level=1&mode=wait"
WAKE_PATH = "/wake_up"
# The first sleep allocates host memory of the size of the weights.
SLEEP_SECONDS = 600.0
EXCERPT_CHARACTERS = 300  # how much of a server's text a Failure's reason quotes
# The usual duration of a request is estimated again after every so many replies. Before the first estimate it is
# infinite.
REPLIES_PER_ESTIMATE = 16
COUNTS = ("asked", "replies", "retries", "hedged", "failed")


class RequestFailed(Exception):
    """A try without a usable reply.

    ``retry`` says that another try may help, and ``pause`` how many seconds it has to wait at least. ``unreached``
    says that no connection could be made.
    """

    def __init__(self, reason: str, *, retry: bool = True, unreached: bool = False, pause: float = 0.0) -> None:
        super().__init__(reason)
        self.retry = retry
        self.unreached = unreached
        self.pause = pause


@dataclass(eq=False)
class JudgeEndpoint:
    """The client's view of one replica of a server."""

    address: str
    in_flight: int = 0
    paused_until: float = 0.0  # time.monotonic()
    hangs: bool = False  # the last try got no reply within ``timeout`` seconds


async def _tell_connected(session: aiohttp.ClientSession, context: SimpleNamespace, event: Any) -> None:
    """aiohttp's hook for a new connection: call the callback that the request passed as ``trace_request_ctx``."""
    if context.trace_request_ctx is not None:
        context.trace_request_ctx()


class EndpointPool:
    """The endpoints of one server. All methods run in the client's event loop."""

    def __init__(self, server: Server, settings: ClientConfig, session: aiohttp.ClientSession, key: str | None) -> None:
        self.server = server
        self.settings = settings
        self.session = session
        self._key = key
        self.endpoints = [JudgeEndpoint(address) for address in server.addresses]
        self.waiting: deque[asyncio.Future[None]] = deque()
        self.counts: Counter[str] = Counter()
        self.reply_seconds: deque[float] = deque(maxlen=256)
        self.usual_seconds = float("inf")  # the median of reply_seconds
        self.pending = 0  # requests without a result
        # Endpoint → the time (time.monotonic()) of the first try that got no connection or no reply, in order of time.
        # An endpoint that accepts a connection again is removed, unless it hangs. The mapping is cleared after any
        # response. It is also cleared when no request is pending, because time without requests is no outage.
        self.unreached_since: dict[JudgeEndpoint, float] = {}
        self.unreached_reason = ""  # why the last such try failed

    async def request(self, request: JudgeRequest, data: bytes) -> VerifierResult:
        """Send a request, with retries, until there is a verdict or no try is left. ``data`` is its encoded body."""
        self.counts["asked"] += 1
        self.pending += 1
        try:
            return await self._ask(request, data)
        finally:
            self.pending -= 1
            if self.pending == 0:
                self.unreached_since.clear()

    async def _ask(self, request: JudgeRequest, data: bytes) -> VerifierResult:
        tries = 0
        endpoint: JudgeEndpoint | None = None
        while True:
            pause = 0.0
            retry = True
            result: VerifierResult
            try:
                endpoint = await self._acquire(avoid=endpoint)
                result = self._parse(request, await self._reply(endpoint, request.path, data))
            except RequestFailed as error:
                result = Failure(str(error))
                pause = error.pause
                retry = error.retry
                # Without a connection the server got no request, so this does not count as a try. The setting
                # ``outage`` bounds how long it can go on.
                tries -= error.unreached
            if isinstance(result, Verdict):
                return result
            tries += 1
            if not retry or tries > self.settings.retries:
                self.counts["failed"] += 1
                return result
            if result.raw and request.retry_fields:
                data = encode({**request.body, **request.retry_fields, "seed": tries})
            self.counts["retries"] += 1
            backoff = self.settings.backoff * 2 ** max(tries - 1, 0) * random.uniform(0.5, 1.5)
            await asyncio.sleep(min(max(backoff, pause), MAX_PAUSE_SECONDS))

    def _parse(self, request: JudgeRequest, reply: Any) -> VerifierResult:
        """The result that the template reads from a reply, which may be any JSON value.

        A reply that the template can't read gives a Failure.
        """
        try:
            return as_result(request.parse(reply))
        except Exception as error:  # the template may be the user's own
            excerpt = json.dumps(reply)[:EXCERPT_CHARACTERS]
            return Failure(f"the reply is not of the expected form ({type(error).__name__}: {error}): {excerpt}")

    async def _reply(self, endpoint: JudgeEndpoint, path: str, data: bytes) -> Any:
        """The reply to a request, which is hedged.

        If ``endpoint`` takes much longer than usual, the request is also sent to another endpoint, and the first reply
        is returned. Raises RequestFailed when no endpoint gave one.
        """
        hedge_seconds = self.usual_seconds * self.settings.hedge_after
        if len(self.endpoints) == 1 or hedge_seconds > self.settings.timeout:
            return await self._post(endpoint, path, data)
        first = asyncio.create_task(self._post(endpoint, path, data))
        tasks = {first}
        try:
            await asyncio.wait(tasks, timeout=hedge_seconds)
            if not first.done():
                other = self._free_endpoint(avoid=endpoint)
                if other is not None and other is not endpoint:
                    self.counts["hedged"] += 1
                    other.in_flight += 1
                    tasks.add(asyncio.create_task(self._post(other, path, data)))
            while True:
                done, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                succeeded = next((task for task in done if task.exception() is None), None)
                if succeeded is not None or not pending:
                    return (succeeded or first).result()
                tasks = pending
                first = next(iter(pending))
        finally:
            for task in tasks:
                task.cancel()

    async def _post(self, endpoint: JudgeEndpoint, path: str, data: bytes) -> Any:
        """Send one request to an endpoint and return the reply's JSON value. Raises RequestFailed.

        The caller has already added the request to ``endpoint.in_flight``.
        """
        started = time.monotonic()
        url = endpoint.address + path
        try:
            async with self.session.post(
                url,
                data=data,
                headers=self._headers(),
                timeout=aiohttp.ClientTimeout(total=self.settings.timeout),
                trace_request_ctx=partial(self._note_connected, endpoint),
            ) as response:
                self.unreached_since.clear()
                endpoint.hangs = False
                text = await response.text(errors="replace")
                if response.status != 200:
                    raise RequestFailed(
                        f"{url}: status {response.status}: {self._excerpt(text)}",
                        retry=response.status in TRANSIENT_STATUSES,
                        pause=_retry_after_seconds(response.headers.get("Retry-After")),
                    )
            reply = json.loads(text)
        except TimeoutError:
            reason = f"{url}: no reply in {self.settings.timeout:g} s"
            endpoint.hangs = True
            self._note_unreached(endpoint, reason)
            raise RequestFailed(reason) from None
        except aiohttp.ClientError as error:
            reason = f"{url}: {self._excerpt(f'{type(error).__name__}: {error}')}"
            unreached = isinstance(error, aiohttp.ClientConnectorError)
            if unreached:
                endpoint.hangs = False
                self._note_unreached(endpoint, reason)
                self._raise_if_lost()
            raise RequestFailed(reason, unreached=unreached) from None
        except ValueError as error:
            raise RequestFailed(f"{url}: not JSON ({error}): {self._excerpt(text)}") from None
        finally:
            endpoint.in_flight -= 1
            self._wake_waiting(1)
        self.reply_seconds.append(time.monotonic() - started)
        self.counts["replies"] += 1
        if self.counts["replies"] % REPLIES_PER_ESTIMATE == 0:
            self.usual_seconds = statistics.median(self.reply_seconds)
        return reply

    def _headers(self) -> dict[str, str]:
        headers = {"Content-Type": "application/json"}
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key}"
        return headers

    def _excerpt(self, text: str) -> str:
        """The beginning of a server's text, for a Failure's reason. The key is masked."""
        masked = text[: EXCERPT_CHARACTERS * 10] if self._key is None else text.replace(self._key, "***")
        return " ".join(masked.split())[:EXCERPT_CHARACTERS]

    async def _acquire(self, avoid: JudgeEndpoint | None) -> JudgeEndpoint:
        """The endpoint with the fewest requests in flight, whose ``in_flight`` is incremented.

        Waits while all endpoints are full or paused. Raises RequestFailed if the pool is lost (:meth:`_is_lost`).
        """
        while (endpoint := self._free_endpoint(avoid)) is None:
            self._raise_if_lost()
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self.waiting.append(waiter)
            await waiter
        endpoint.in_flight += 1
        return endpoint

    def _free_endpoint(self, avoid: JudgeEndpoint | None) -> JudgeEndpoint | None:
        """The least busy endpoint that can take a request now, or None. ``avoid`` is taken only if there is no other.

        Among equally busy endpoints, the one whose last pause ended first is taken, so that every endpoint gets
        requests.
        """
        now = time.monotonic()
        free = [
            endpoint
            for endpoint in self.endpoints
            if endpoint.in_flight < self.settings.concurrency and endpoint.paused_until <= now
        ]
        return min(
            free, key=lambda endpoint: (endpoint is avoid, endpoint.in_flight, endpoint.paused_until), default=None
        )

    def _wake_waiting(self, count: int) -> None:
        """Let the first ``count`` waiting requests look for a free endpoint again."""
        while self.waiting and count:
            waiter = self.waiting.popleft()
            if not waiter.done():
                waiter.set_result(None)
                count -= 1

    def _note_unreached(self, endpoint: JudgeEndpoint, reason: str) -> None:
        """Record a try that got no connection or no reply in time, and pause the endpoint.

        If the pool is lost, wake all waiting requests.
        """
        self.unreached_reason = reason
        if endpoint not in self.unreached_since:
            now = time.monotonic()
            self.unreached_since[endpoint] = now
            # Check again at the end of the outage, since the pauses may be longer than that.
            asyncio.get_running_loop().call_at(now + self.settings.outage + 0.001, self._wake_all_if_lost)
        self._pause(endpoint)
        self._wake_all_if_lost()

    def _note_connected(self, endpoint: JudgeEndpoint) -> None:
        """Record that the endpoint accepted a connection, so it is reachable, however long its first reply takes.

        An endpoint that hangs accepts connections too, so for such a one this changes nothing.
        """
        if not endpoint.hangs:
            self.unreached_since.pop(endpoint, None)

    def _pause(self, endpoint: JudgeEndpoint) -> None:
        """Send nothing to the endpoint for ``cooldown`` seconds, then wake as many waiting requests as it can take."""
        now = time.monotonic()
        if endpoint.paused_until > now:
            return
        cooldown = self.settings.cooldown
        endpoint.paused_until = now + cooldown
        loop = asyncio.get_running_loop()
        loop.call_later(cooldown + 0.001, self._wake_waiting, self.settings.concurrency)

    def _is_lost(self) -> bool:
        """Whether the pool counts as lost.

        It is lost when at least ``outage`` seconds have passed since the oldest time in ``unreached_since``, and every
        endpoint is in ``unreached_since`` or paused.
        """
        if not self.unreached_since:
            return False
        now = time.monotonic()
        is_left = any(e not in self.unreached_since and e.paused_until <= now for e in self.endpoints)
        first = next(iter(self.unreached_since.values()))
        return not is_left and now - first >= self.settings.outage

    def _raise_if_lost(self) -> None:
        if self._is_lost():
            reason = f"no replica of {self.server.name} could be reached: {self.unreached_reason}"
            raise RequestFailed(reason, retry=False)

    def _wake_all_if_lost(self) -> None:
        if self._is_lost():
            self._wake_waiting(len(self.waiting))

    async def post_to_all(self, path: str, connect_seconds: float) -> None:
        """POST to every endpoint, for sleep and wake.

        Raises RuntimeError naming an endpoint that refuses, or that can't be reached for ``connect_seconds``.
        """
        urls = [endpoint.address + path for endpoint in self.endpoints]
        await asyncio.gather(*(self._post_until_connected(url, connect_seconds) for url in urls))

    async def _post_until_connected(self, url: str, connect_seconds: float) -> None:
        deadline = time.monotonic() + connect_seconds
        while True:
            try:
                timeout = aiohttp.ClientTimeout(total=SLEEP_SECONDS)
                async with self.session.post(url, headers=self._headers(), timeout=timeout) as response:
                    text = await response.text(errors="replace")
                    if response.status == 200:
                        return
                    reason = f"status {response.status}: {self._excerpt(text)}"
            except TimeoutError:
                reason = f"no reply in {SLEEP_SECONDS:g} s"
            except aiohttp.ClientError as error:
                reason = self._excerpt(f"{type(error).__name__}: {error}")
                if isinstance(error, aiohttp.ClientConnectorError) and time.monotonic() < deadline:
                    await asyncio.sleep(1.0)
                    continue
            raise RuntimeError(
                f"rewards.servers.{self.server.name} ({self.server.model}): {url}: {reason}; with rewards.placement="
                "colocated start `python -m rewards.serve recipe=…` and the run's overrides on every node"
            )

    async def problems(self, must_run: bool) -> list[str]:
        """What is wrong with the endpoints, one text per faulty endpoint. Empty if all serve the model.

        Unless ``must_run``, an endpoint that can't be reached is no problem, as its server may not run yet.
        """
        problems = []
        for endpoint in self.endpoints:
            problem = await self._problem(endpoint, must_run)
            if problem is not None:
                problems.append(f"{endpoint.address}: {problem}")
        return problems

    async def _problem(self, endpoint: JudgeEndpoint, must_run: bool) -> str | None:
        try:
            timeout = aiohttp.ClientTimeout(total=CHECK_SECONDS)
            url = f"{endpoint.address}/v1/models"
            async with self.session.get(url, headers=self._headers(), timeout=timeout) as response:
                text = await response.text(errors="replace")
                if response.status != 200:
                    return f"status {response.status}: {self._excerpt(text)}"
            models = [entry["id"] for entry in json.loads(text)["data"]]
        except TimeoutError:
            return f"no reply in {CHECK_SECONDS:g} s"
        except aiohttp.ClientConnectorError as error:
            return self._excerpt(f"{type(error).__name__}: {error}") if must_run else None
        except aiohttp.ClientError as error:
            return self._excerpt(f"{type(error).__name__}: {error}")
        except (ValueError, LookupError, TypeError):
            return f"not a list of models: {self._excerpt(text)}"
        return None if self.server.model in models else f"it serves {models}, not {self.server.model!r}"


class Client:
    """The connections to all servers of a run. A context manager; its end cancels pending requests."""

    def __init__(self, servers: Mapping[str, Server], settings: ClientConfig) -> None:
        """Raises ValueError when the environment lacks a server's token."""
        keys = {name: server.key(os.environ) for name, server in servers.items()}
        self.inbox: deque[tuple[EndpointPool, JudgeRequest, bytes, Future[VerifierResult]]] = deque()
        self.tasks: set[asyncio.Task[None]] = set()
        self.loop_is_woken = False
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, name="rewards client", daemon=True)
        self.thread.start()
        self.session = self._run(self._open_session())
        self.pools = {
            name: EndpointPool(server, settings, self.session, keys[name]) for name, server in servers.items()
        }

    def check(self, must_run: bool = True) -> None:
        """Check that every server serves its model.

        Raises ValueError naming every server that does not, and the remedy. Unless ``must_run``, servers that can't be
        reached are skipped.
        """
        problems = []
        for name, pool in self.pools.items():
            for problem in self._run(pool.problems(must_run)):
                problems.append(f"rewards.servers.{name} ({pool.server.model}) {problem}")
        if problems:
            raise ValueError(
                f"{'; '.join(problems)}; start the servers with `python -m rewards.serve recipe=…` and the run's "
                "overrides, or set endpoints to where they are"
            )

    def sleep(self, connect_seconds: float = 0.0) -> None:
        """Put all servers to sleep: they free their GPU memory and keep their weights in host memory.

        Waits up to ``connect_seconds`` for servers that can't be reached yet. Raises RuntimeError.
        """
        for pool in self.pools.values():
            self._run(pool.post_to_all(SLEEP_PATH, connect_seconds))

    def wake(self) -> None:
        """Wake all servers: they take their GPU memory back and accept requests. Raises RuntimeError."""
        for pool in self.pools.values():
            self._run(pool.post_to_all(WAKE_PATH, 0.0))

    @contextmanager
    def awake(self) -> Iterator[None]:
        """Keep the servers awake within the block, and put them to sleep after it. Raises RuntimeError."""
        self.wake()
        try:
            yield
        finally:
            self.sleep()

    def submit(self, server: str, request: JudgeRequest) -> Future[VerifierResult]:
        """Start a request to the server of this name. Returns at once, and may be called from any thread."""
        future: Future[VerifierResult] = Future()
        self.inbox.append((self.pools[server], request, encode(request.body), future))
        # Wake the loop once for all requests since it last ran: a wake-up costs more than everything else here.
        if not self.loop_is_woken:
            self.loop_is_woken = True
            self.loop.call_soon_threadsafe(self._start_submitted)
        return future

    def _start_submitted(self) -> None:
        """In the event loop: start a task for every request in the inbox."""
        self.loop_is_woken = False
        while self.inbox:
            task = self.loop.create_task(self._complete(*self.inbox.popleft()))
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)

    async def _complete(
        self, pool: EndpointPool, request: JudgeRequest, data: bytes, future: Future[VerifierResult]
    ) -> None:
        try:
            future.set_result(await pool.request(request, data))
        except BaseException as error:
            future.set_exception(error)
            raise

    def take_counts(self) -> dict[str, int]:
        """The counts since the last call, with the key "<server>/<count>" for each of ``COUNTS``."""
        counts = {f"{name}/{count}": pool.counts[count] for name, pool in self.pools.items() for count in COUNTS}
        for pool in self.pools.values():
            pool.counts = Counter()
        return counts

    def close(self) -> None:
        """Cancel pending requests and end the thread."""
        self._run(self._close_session())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Run a coroutine in the event loop, wait for it, and return its result."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result()

    async def _open_session(self) -> aiohttp.ClientSession:
        tracing = aiohttp.TraceConfig()
        tracing.on_connection_create_end.append(_tell_connected)
        return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), trace_configs=[tracing])

    async def _close_session(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.session.close()


def encode(body: Mapping[str, Any]) -> bytes:
    """A request's JSON body."""
    return json.dumps(body).encode()


def _retry_after_seconds(header: str | None) -> float:
    """The seconds of a Retry-After header. 0 for none, and for a date, so that the backoff alone applies."""
    return float(header) if header and header.isdigit() else 0.0
