"""Asks the servers behind the verifiers, from any thread: an event loop in a thread of its own.

Every question ends in a judgement. Errors, timeouts and unreadable replies are tried again, after a pause with jitter
and where possible at another replica; what is left is a Failure with its reason. A question that takes much longer than
usual is also sent to another replica, and the first reply counts. Servers batch what is under way by themselves.
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
from types import TracebackType
from typing import Any, Self

import aiohttp

from rewards.settings import ClientConfig, Server
from rewards.verdict import Failure, Judgement, Verdict
from rewards.verifiers.judges import Ask

TRANSIENT = (408, 409, 425, 429, 500, 502, 503, 504)
LONGEST_PAUSE = 30.0  # seconds between two tries, whatever the backoff and a server's Retry-After say
CHECK_SECONDS = 10.0
# vLLM's development endpoints. Level 1 keeps the weights on the host; what a server is still at is finished first.
SLEEP, WAKE = "/sleep?level=1&mode=wait", "/wake_up"
SLEEP_SECONDS = 600.0  # the first sleep allocates as much of the host's memory as the weights have
EXCERPT = 300  # characters of a server's error that a reason shows
KNOWN_TIMES = 16  # replies after which the usual time is known, and again reckoned


class Unanswered(Exception):
    """A try without a reply. ``again``: another may help, after ``pause`` seconds; ``unreached``: no connection."""

    def __init__(self, reason: str, *, again: bool = True, unreached: bool = False, pause: float = 0.0) -> None:
        super().__init__(reason)
        self.again, self.unreached, self.pause = again, unreached, pause


@dataclass(eq=False)
class Replica:
    address: str
    under_way: int = 0
    rests_until: float = 0.0  # time.monotonic()


class Pool:
    """The replicas of one server, used in the client's loop only."""

    def __init__(self, server: Server, settings: ClientConfig, session: aiohttp.ClientSession, key: str | None) -> None:
        self.server, self.settings, self.session, self._key = server, settings, session, key
        self.replicas = [Replica(address) for address in server.addresses]
        self.waiting: deque[asyncio.Future[None]] = deque()
        self.counts: Counter[str] = Counter()
        self.times: deque[float] = deque(maxlen=256)
        self.usual = float("inf")  # seconds, a median
        self.lost_since: float | None = None  # when all replicas rested and none had replied since
        self.reason = ""  # why the last one rests

    async def judge(self, ask: Ask, data: bytes) -> Judgement:
        """Ask until there is a verdict or no try is left."""
        self.counts["asked"] += 1
        tries = 0
        replica: Replica | None = None
        while True:
            pause, again = 0.0, True
            try:
                replica = await self._acquire(avoid=replica)
                judgement = self._read(ask, await self._reply(replica, ask.path, data))
            except Unanswered as error:
                judgement, pause, again = Failure(str(error)), error.pause, error.again
                tries -= error.unreached  # not asked; how long a server is waited for is bounded by ``outage``
            if isinstance(judgement, Verdict):
                return judgement
            tries += 1
            if not again or tries > self.settings.retries:
                self.counts["failed"] += 1
                return judgement
            if judgement.raw and ask.again:
                data = encode({**ask.body, **ask.again, "seed": tries})
            self.counts["retries"] += 1
            wait = self.settings.backoff * 2 ** max(tries - 1, 0) * random.uniform(0.5, 1.5)
            await asyncio.sleep(min(max(wait, pause), LONGEST_PAUSE))

    def _read(self, ask: Ask, reply: Any) -> Judgement:
        """Of a reply, which may be any JSON."""
        try:
            return ask.read(reply)
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            shown = json.dumps(reply)[:EXCERPT]
            return Failure(f"the reply is not of the expected form ({type(error).__name__}: {error}): {shown}")

    async def _reply(self, replica: Replica, path: str, data: bytes) -> Any:
        """The replica's, or that of another one which was asked too because it took so long."""
        after = self.usual * self.settings.hedge_after
        if len(self.replicas) == 1 or after > self.settings.timeout:
            return await self._post(replica, path, data)
        first = asyncio.create_task(self._post(replica, path, data))
        tasks = {first}
        try:
            await asyncio.wait(tasks, timeout=after)
            if not first.done() and (other := self._free(replica)) is not None and other is not replica:
                self.counts["hedged"] += 1
                other.under_way += 1
                tasks.add(asyncio.create_task(self._post(other, path, data)))
            while True:
                done, left = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                good = next((task for task in done if task.exception() is None), None)
                if good is not None or not left:
                    return (good or first).result()
                tasks = left
                first = next(iter(left))
        finally:
            for task in tasks:
                task.cancel()

    async def _post(self, replica: Replica, path: str, data: bytes) -> Any:
        """One request at a replica that counts it as under way. Raises Unanswered."""
        started = time.monotonic()
        try:
            async with self.session.post(
                replica.address + path,
                data=data,
                headers=self._headers(),
                timeout=aiohttp.ClientTimeout(total=self.settings.timeout),
            ) as response:
                self.lost_since = None
                text = await response.text(errors="replace")
                if response.status != 200:
                    again = response.status in TRANSIENT
                    raise Unanswered(
                        f"{replica.address}{path}: status {response.status}: {self._excerpt(text)}",
                        again=again,
                        pause=_seconds(response.headers.get("Retry-After")),
                    )
            reply = json.loads(text)
        except TimeoutError:
            reason = f"{replica.address}{path}: no reply in {self.settings.timeout:g} s"
            self._down(replica, reason)
            raise Unanswered(reason) from None
        except aiohttp.ClientError as error:
            reason = f"{replica.address}{path}: {self._excerpt(f'{type(error).__name__}: {error}')}"
            if unreached := isinstance(error, aiohttp.ClientConnectorError):
                self._down(replica, reason)
            raise Unanswered(reason, unreached=unreached) from None
        except ValueError as error:
            raise Unanswered(f"{replica.address}{path}: not JSON ({error}): {self._excerpt(text)}") from None
        finally:
            replica.under_way -= 1
            self._wake()
        self.times.append(time.monotonic() - started)
        self.counts["replies"] += 1
        if self.counts["replies"] % KNOWN_TIMES == 0:
            self.usual = statistics.median(self.times)
        return reply

    def _headers(self) -> dict[str, str]:
        key = {} if self._key is None else {"Authorization": f"Bearer {self._key}"}
        return {"Content-Type": "application/json"} | key

    def _excerpt(self, text: str) -> str:
        """What a reason may show of a server's words: short, and never the key."""
        shown = text[: EXCERPT * 10] if self._key is None else text.replace(self._key, "***")
        return " ".join(shown.split())[:EXCERPT]

    async def _acquire(self, avoid: Replica | None) -> Replica:
        """The least busy replica, counted as under way; waits while all are busy or resting.

        Raises Unanswered when no replica has been reached for ``outage`` seconds.
        """
        while (replica := self._free(avoid)) is None:
            if self._lost():
                raise Unanswered(f"no replica of {self.server.name} could be reached: {self.reason}", again=False)
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self.waiting.append(waiter)
            await waiter
        replica.under_way += 1
        return replica

    def _free(self, avoid: Replica | None) -> Replica | None:
        """One that can take a request now; ``avoid`` only if there is no other."""
        now = time.monotonic()
        found = [r for r in self.replicas if r.under_way < self.settings.concurrency and r.rests_until <= now]
        return min(found, key=lambda replica: (replica is avoid, replica.under_way), default=None)

    def _wake(self, most: int = 1) -> None:
        """Let the next that wait look again."""
        while self.waiting and most:
            if not (waiter := self.waiting.popleft()).done():
                waiter.set_result(None)
                most -= 1

    def _down(self, replica: Replica, reason: str) -> None:
        """Leave the replica alone for a while, behind which as many may look again as it can take."""
        now = time.monotonic()
        if replica.rests_until > now:
            return
        replica.rests_until, self.reason = now + self.settings.cooldown, reason
        asyncio.get_running_loop().call_later(self.settings.cooldown + 0.001, self._wake, self.settings.concurrency)
        if self.lost_since is None and all(r.rests_until > now for r in self.replicas):
            self.lost_since = now
        if self._lost():
            self._wake(len(self.waiting))

    def _lost(self) -> bool:
        now = time.monotonic()
        resting = all(replica.rests_until > now for replica in self.replicas)
        return resting and self.lost_since is not None and now - self.lost_since >= self.settings.outage

    async def tell(self, path: str, patience: float) -> None:
        """POST to every replica. Raises RuntimeError naming one that refuses, or can't be reached for ``patience``
        seconds."""
        await asyncio.gather(*(self._tell(replica.address + path, patience) for replica in self.replicas))

    async def _tell(self, url: str, patience: float) -> None:
        deadline = time.monotonic() + patience
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

    async def check(self, started: bool) -> list[str]:
        """What is wrong with each replica; empty when all serve the model. Without ``started`` one that can't be
        reached is not wrong: its server may not run yet."""
        return [f"{r.address}: {why}" for r in self.replicas if (why := await self._missing(r, started))]

    async def _missing(self, replica: Replica, started: bool) -> str | None:
        try:
            timeout = aiohttp.ClientTimeout(total=CHECK_SECONDS)
            url = f"{replica.address}/v1/models"
            async with self.session.get(url, headers=self._headers(), timeout=timeout) as response:
                text = await response.text(errors="replace")
                if response.status != 200:
                    return f"status {response.status}: {self._excerpt(text)}"
            served = [entry["id"] for entry in json.loads(text)["data"]]
        except TimeoutError:
            return f"no reply in {CHECK_SECONDS:g} s"
        except aiohttp.ClientConnectorError as error:
            return self._excerpt(f"{type(error).__name__}: {error}") if started else None
        except aiohttp.ClientError as error:
            return self._excerpt(f"{type(error).__name__}: {error}")
        except (ValueError, LookupError, TypeError):
            return f"not a list of models: {self._excerpt(text)}"
        return None if self.server.model in served else f"it serves {served}, not {self.server.model!r}"


class Client:
    """All servers of a run. A context manager; questions that are under way when it ends are cancelled."""

    def __init__(self, servers: Mapping[str, Server], settings: ClientConfig) -> None:
        """Raises ValueError when the environment lacks a server's token."""
        keys = {name: server.key(os.environ) for name, server in servers.items()}
        self.inbox: deque[tuple[Pool, Ask, bytes, Future[Judgement]]] = deque()
        self.tasks: set[asyncio.Task[None]] = set()
        self.woken = False
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, name="rewards client", daemon=True)
        self.thread.start()
        self.session = self._run(self._open())
        self.pools = {name: Pool(server, settings, self.session, keys[name]) for name, server in servers.items()}

    def check(self, started: bool = True) -> None:
        """Raises ValueError naming every server that does not answer as it should, and what to do. Without ``started``
        those that can't be reached are left out."""
        wrong = [
            f"rewards.servers.{name} ({pool.server.model}) {why}"
            for name, pool in self.pools.items()
            for why in self._run(pool.check(started))
        ]
        if wrong:
            raise ValueError(
                f"{'; '.join(wrong)}; start the servers with `python -m rewards.serve recipe=…` and the run's "
                "overrides, or set endpoints to where they are"
            )

    def sleep(self, patience: float = 0.0) -> None:
        """Have all servers give their GPU memory back, their weights wait on the host. Those that can't be reached are
        waited for up to ``patience`` seconds. Raises RuntimeError."""
        for pool in self.pools.values():
            self._run(pool.tell(SLEEP, patience))

    def wake(self) -> None:
        """Have all servers take their GPU memory and questions again. Raises RuntimeError."""
        for pool in self.pools.values():
            self._run(pool.tell(WAKE, 0.0))

    @contextmanager
    def awake(self) -> Iterator[None]:
        """The servers are awake within the block and asleep behind it. Raises RuntimeError."""
        self.wake()
        try:
            yield
        finally:
            self.sleep()

    def submit(self, server: str, ask: Ask) -> Future[Judgement]:
        """Start asking; returns at once, from any thread."""
        future: Future[Judgement] = Future()
        self.inbox.append((self.pools[server], ask, encode(ask.body), future))
        if not self.woken:  # once for many: waking the loop costs more than all else here
            self.woken = True
            self.loop.call_soon_threadsafe(self._begin)
        return future

    def _begin(self) -> None:
        """In the loop: start on what was submitted."""
        self.woken = False
        while self.inbox:
            task = self.loop.create_task(self._answer(*self.inbox.popleft()))
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)

    async def _answer(self, pool: Pool, ask: Ask, data: bytes, future: Future[Judgement]) -> None:
        try:
            future.set_result(await pool.judge(ask, data))
        except BaseException as error:
            future.set_exception(error)
            raise

    def take_counts(self) -> dict[str, int]:
        """Since the last call, for each server: asked, replies, retries, hedged, failed."""
        names = ("asked", "replies", "retries", "hedged", "failed")
        found = {f"{name}/{what}": pool.counts[what] for name, pool in self.pools.items() for what in names}
        for pool in self.pools.values():
            pool.counts = Counter()
        return found

    def close(self) -> None:
        self._run(self._close())
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
        return asyncio.run_coroutine_threadsafe(work, self.loop).result()

    async def _open(self) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))

    async def _close(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.session.close()


def encode(body: Mapping[str, Any]) -> bytes:
    return json.dumps(body).encode()


def _seconds(retry_after: str | None) -> float:
    """Of a Retry-After header; one with a date is left to the backoff."""
    return float(retry_after) if retry_after and retry_after.isdigit() else 0.0
