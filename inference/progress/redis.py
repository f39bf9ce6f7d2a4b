"""Progress that several processes share, in Redis: a stream for each project.

    i2v:progress:{project_id}   a stream; the field `event` of each entry is one event as JSON

A stream keeps about the last thousand events, and is gone a day after the last one. It takes a single Redis, 5 or
newer, behind TLS with `rediss://`. A cluster would not do: one question reads the streams of many projects.
"""

import os
import secrets
import threading
import weakref
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Self

import anyio
import structlog

from inference.errors import SettingsError, one_line
from inference.progress.events import Event, as_json
from inference.progress.follower import BLOCK_S, Followed, Follower
from inference.progress.gate import INTERVAL_S, Gate
from inference.progress.hub import KEPT, START, MemoryHub, ProgressHub, Published, Subscription
from inference.progress.outbox import Away, Entry, Outbox

if TYPE_CHECKING:
    from redis import Redis

log = structlog.get_logger(__name__)

PREFIX = "i2v:progress:"
WAKE_PREFIX = "i2v:wake:"
"""Keys of streams, and of one stream for each process that follows some, in which it is told to look for new projects.
A user of Redis with rights of its own (ACL) needs RIGHTS."""

RIGHTS = "~i2v:* +xadd +xread +xrevrange +expire +type"
"""As ACL SETUSER takes them."""

FIELD = "event"
"""Of an entry."""

KEPT_IN_REDIS = KEPT + 100
"""Entries of a stream. More than a MemoryHub keeps, so that it knows of everything that Redis has trimmed."""

EXPIRE_S = 86_400
"""A stream is gone so long after its last event."""

TIMEOUT_S = 1.0
"""For a connection to Redis, and for an answer: who reports progress has something better to do than to wait."""

READY_S = 2.0
"""A new listener waits for so long for what was published before it came."""

LOOK_S = 0.01
LOOK_LATER_S = 0.25
"""How often it looks whether that is there, at first and after `READY_S`."""

CLOSE_S = 2.0
"""How long closing waits for events that are still to be sent."""


def open_hub(url: str | None, *, in_background: bool = True) -> ProgressHub:
    """The hub for this process: in its memory without a URL, else in that Redis, which need not be there yet.

    `in_background`: publishing never waits for Redis. For event loops; call `close` at the end.
    Raises SettingsError that names REDIS_URL.
    """
    return MemoryHub() if url is None else RedisHub(url, in_background=in_background)


def try_out(url: str) -> str:
    """Uses a Redis as a hub does, once, and says which it is. One stream stays there for a second.

    Raises SettingsError that names REDIS_URL, and Away with what Redis says.
    """
    streams = _Streams(url)
    try:
        version = streams.try_out()
    finally:
        streams.rest()
        streams.close()
    return f"Redis {version} at {streams.where}" if version else f"Redis at {streams.where}"


class RedisHub:
    """A hub for all processes that use the same Redis.

    Publishing is synchronous: from any thread or event loop, and in children of a fork. While Redis is away, events
    wait in memory (`outbox.py`). Listeners are served from a copy in memory that one thread keeps up to date
    (`follower.py`), so they cost one connection together, and work under asyncio and trio.
    """

    def __init__(self, url: str, *, in_background: bool = False, interval_s: float = INTERVAL_S) -> None:
        """Connects when there is something to say. Raises SettingsError that names REDIS_URL, and never shows it.

        `in_background`: publishing never waits for Redis. `interval_s`: between two progress events of a task.
        """
        self._url = url
        self._in_background = in_background
        self._interval_s = interval_s
        self._begin()
        _hubs.add(self)

    def _begin(self) -> None:
        self._streams = _Streams(self._url)
        where = self._streams.where
        self._here = MemoryHub()
        self._follower = Follower(self._streams, self._here, where=where)
        self._outbox = Outbox(self._streams.add, where=where, in_background=self._in_background)
        self._gate = Gate(self._put, interval_s=self._interval_s)

    def publish(self, event: Event) -> None:
        """Adds an event to the stream of its project, if the gate lets it through. Raises nothing.

        Waits about a second where Redis has just stopped answering, and not while it is known to be away.
        """
        self._gate.offer(event)

    def _put(self, event: Event) -> None:
        self._outbox.put(Entry(event.project_id, event.task_name, as_json(event)))

    @asynccontextmanager
    async def subscribe(self, project_id: str, after: str | None = None) -> AsyncIterator[Subscription]:
        """Follows a project: after the event of the id `after`, or without one from a snapshot on.

        Where Redis is away, all that it has comes as soon as it is back. Raises ValueError for an id that cannot be
        encoded.
        """
        project_id.encode()  # one question reads for all listeners, and would fail for all
        followed, is_to_be_told = self._follower.follow(project_id)
        try:
            if is_to_be_told:
                await anyio.to_thread.run_sync(self._streams.wake, abandon_on_cancel=True)
            with anyio.move_on_after(READY_S):
                # The thread that reads knows no event loop, and is nearly always done at the first look.
                while not (followed.is_ready or self._follower.is_away or self._follower.is_closed):  # noqa: ASYNC110
                    await anyio.sleep(LOOK_S)
            async with AsyncExitStack() as stack:
                open_it = partial(stack.enter_async_context, self._here.subscribe(project_id, after))
                yield await open_it() if followed.is_ready else _Late(self._follower, followed, open_it)
        finally:
            self._follower.unfollow(followed)

    def close(self, timeout_s: float = CLOSE_S) -> None:
        """Sends what waits, for at most so long, and ends every subscription; later events go nowhere."""
        self._gate.close()
        self._outbox.close(timeout_s)
        if self._follower.close():
            self._streams.wake()
        self._here.close()
        self._streams.close()


class _Late:
    """A subscription that began while Redis was away: the real one is opened once Redis has answered."""

    def __init__(self, follower: Follower, followed: Followed, open_it: Callable[[], Awaitable[Subscription]]) -> None:
        self.resumed = False
        self.snapshot: list[Published] = []
        self._follower = follower
        self._followed = followed
        self._open = open_it
        self._first: deque[Published] = deque()
        self._then: AsyncIterator[Published] | None = None

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Published:
        if self._then is None:
            while not self._followed.is_ready:
                if self._follower.is_closed:
                    raise StopAsyncIteration
                await anyio.sleep(LOOK_LATER_S)
            opened = await self._open()
            self._first.extend(opened.snapshot)
            self._then = aiter(opened)
        return self._first.popleft() if self._first else await anext(self._then)


class _Streams:
    """The commands of Redis that are used, with its exceptions as Away."""

    def __init__(self, url: str) -> None:
        address = _parsed(url)
        self.where = _where(address)
        self._password = str(address.get("password") or "")
        # Any: redis-py types what it answers as a union over all its protocols and options.
        self._writing: Any = _client(address, timeout_s=TIMEOUT_S)
        self._reading: Any = _client(address, timeout_s=BLOCK_S + TIMEOUT_S)
        self._wake_key = WAKE_PREFIX + secrets.token_hex(8)
        self._woken_by = START
        # Keys of streams that are something else: one question for all would fail on them.
        self._no_streams: set[str] = set()
        self.at_work = threading.Lock()  # one thread at a time writes, so that all of them take one connection

    def add(self, entries: Sequence[Entry], *, again: bool) -> None:
        """Appends entries to their streams. Raises Away."""
        from redis.exceptions import ResponseError  # noqa: PLC0415 - an extra

        with self.at_work, self._as_away():
            if again:
                entries = self._without_those_there(entries)
            pipeline = self._writing.pipeline(transaction=False)
            for entry in entries:
                pipeline.xadd(PREFIX + entry.project_id, {FIELD: entry.json}, maxlen=KEPT_IN_REDIS, approximate=True)
            for project_id in dict.fromkeys(entry.project_id for entry in entries):
                pipeline.expire(PREFIX + project_id, EXPIRE_S)
            for answer in pipeline.execute(raise_on_error=False):
                if isinstance(answer, ResponseError) and str(answer).startswith("WRONGTYPE"):
                    log.warning("progress could not be told: a key of its stream has another type", store=self.where)
                elif isinstance(answer, Exception):
                    raise answer

    def _without_those_there(self, entries: Sequence[Entry]) -> list[Entry]:
        """Entries that Redis does not have. An event is never the same as another: it has a timestamp."""
        there = {
            (project_id, fields.get(FIELD))
            for project_id in {entry.project_id for entry in entries}
            for _, fields in self._kept(project_id)
        }
        return [entry for entry in entries if (entry.project_id, entry.json) not in there]

    def _kept(self, project_id: str) -> Any:
        """All entries of a project; none where its key is no stream, of which `add` tells."""
        from redis.exceptions import ResponseError  # noqa: PLC0415 - an extra

        try:
            return self._writing.xrevrange(PREFIX + project_id, count=KEPT_IN_REDIS)
        except ResponseError as error:
            if not str(error).startswith("WRONGTYPE"):
                raise
            return []

    def read(
        self, positions: Mapping[str, str], *, count: int, block_s: float | None
    ) -> list[tuple[str, list[tuple[str, str]]]]:
        """For each project, what came after the id that is its position. Raises Away."""
        from redis.exceptions import ResponseError  # noqa: PLC0415 - an extra

        asked = {PREFIX + project_id: position for project_id, position in positions.items()}
        asked = {key: position for key, position in asked.items() if key not in self._no_streams}
        with self._as_away():
            block_ms = None if block_s is None else round(block_s * 1000)
            try:
                answer = self._reading.xread({**asked, self._wake_key: self._woken_by}, count=count, block=block_ms)
            except ResponseError as error:
                if not str(error).startswith("WRONGTYPE"):
                    raise
                self._no_streams |= {key for key in asked if self._reading.type(key) not in ("stream", "none")}
                log.warning("progress cannot be followed: a key of its stream has another type", store=self.where)
                return []
            found = []
            for key, entries in answer:
                if key == self._wake_key:
                    self._woken_by = entries[-1][0]
                else:
                    texts = [(identity, fields.get(FIELD, "")) for identity, fields in entries]
                    found.append((key.removeprefix(PREFIX), texts))
            return found

    def wake(self) -> None:
        """Ends the wait of `read`. Raises nothing: where Redis is away, `read` does not wait for it either."""
        try:
            with self.at_work, self._as_away():
                pipeline = self._writing.pipeline(transaction=False)
                pipeline.xadd(self._wake_key, {"wake": ""}, maxlen=1)
                pipeline.expire(self._wake_key, 60)
                pipeline.execute()
        except Away:
            pass

    def try_out(self) -> str:
        """Does once all that is done to a stream, on one of its own, and says the server's version. Raises Away."""
        from redis.exceptions import ResponseError  # noqa: PLC0415 - an extra

        project_id = f"doctor-{secrets.token_hex(8)}"
        with self._as_away():
            version = ""
            with suppress(ResponseError):  # a user with rights of its own needs none for this
                version = self._writing.info("server").get("redis_version", "")
            try:
                self._writing.xadd(PREFIX + project_id, {FIELD: "{}"}, maxlen=KEPT_IN_REDIS, approximate=True)
                self._writing.expire(PREFIX + project_id, 1)
                self._writing.xrevrange(PREFIX + project_id, count=1)
                self._reading.xread({PREFIX + project_id: START, self._wake_key: START}, count=1)
                self._reading.type(PREFIX + project_id)
            except ResponseError as error:
                raise type(error)(f"{error}; it has to be Redis 5 or newer, and its user needs {RIGHTS}") from None
        return version

    def rest(self) -> None:
        """Nothing is read for a while: lets go of the connection for that."""
        self._reading.connection_pool.disconnect()

    def close(self) -> None:
        """Lets go of the connection for everything else."""
        self._writing.connection_pool.disconnect()

    @contextmanager
    def _as_away(self) -> Iterator[None]:
        from redis.exceptions import RedisError  # noqa: PLC0415 - an extra

        try:
            yield
        except (RedisError, OSError) as error:
            # After a failover the same connection leads to a server that takes no writes any more.
            self._writing.connection_pool.disconnect()
            reason = str(error).replace(self._password, "…") if self._password else str(error)
            raise Away(f"{type(error).__name__}: {one_line(reason, 200)}") from None


def _parsed(url: str) -> dict[str, Any]:
    """What redis-py reads in the URL. Raises SettingsError, which shows nothing of the URL: a password is in it."""
    try:
        from redis.connection import parse_url  # noqa: PLC0415 - an extra
    except ImportError:
        raise SettingsError(
            "REDIS_URL is set, but the package `redis` is missing: pip install 'serverless-i2v[redis]'"
        ) from None
    try:
        return dict(parse_url(url))  # type: ignore[no-untyped-call]
    except ValueError:
        raise SettingsError(
            "REDIS_URL is not a URL of Redis, such as redis://:PASSWORD@HOST:6379/0, rediss:// for TLS, or "
            "unix:///path/to/redis.sock; write special characters of a password as %40 and the like"
        ) from None


def _where(address: Mapping[str, Any]) -> str:
    """Which Redis it is, for log lines."""
    place = address.get("path") or f"{address.get('host', 'localhost')}:{address.get('port', 6379)}"
    return f"{place}/{address.get('db', 0)}"


def _client(address: Mapping[str, Any], *, timeout_s: float) -> "Redis":
    from redis import Redis  # noqa: PLC0415 - an extra
    from redis.backoff import NoBackoff  # noqa: PLC0415
    from redis.connection import ConnectionPool  # noqa: PLC0415
    from redis.retry import Retry  # noqa: PLC0415

    ours: dict[str, Any] = {
        "decode_responses": True,
        "encoding_errors": "replace",
        "protocol": 2,
        "retry": Retry(NoBackoff(), 0),  # redis-py's own retries would wait longer, and append an event twice
        "socket_timeout": timeout_s,
    }
    if "path" not in address:
        ours |= {"socket_connect_timeout": TIMEOUT_S, "socket_keepalive": True}
    pool = ConnectionPool(**{**address, **ours})
    try:
        pool.make_connection()
    except (TypeError, ValueError):
        raise SettingsError("REDIS_URL has a parameter after `?` that redis-py does not know for its scheme") from None
    return Redis(connection_pool=pool)


_hubs: "weakref.WeakSet[RedisHub]" = weakref.WeakSet()
_held: "list[_Streams]" = []
_forking = threading.Lock()  # two threads that fork at once would wait for each other


def _wait_for_others() -> None:
    """Before a fork: another thread may hold a lock of Python's own, as of an import, which a child would inherit."""
    _forking.acquire()
    _held.extend(hub._streams for hub in _hubs)  # noqa: SLF001 - of this module's own class
    for streams in _held:
        streams.at_work.acquire()


def _go_on() -> None:
    while _held:
        _held.pop().at_work.release()
    _forking.release()


def _begin_anew() -> None:
    """In a child: the parent's sockets, threads and locks are of no use, and what waits is the parent's to send."""
    _held.clear()
    for hub in _hubs:
        hub._begin()  # noqa: SLF001
    _forking.release()  # it was taken in this thread


if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
    os.register_at_fork(before=_wait_for_others, after_in_parent=_go_on, after_in_child=_begin_anew)
