"""Where events go, and where listeners get them: each project is a stream of its own, of bounded length."""

import itertools
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Any, Protocol, Self

import anyio
from anyio import lowlevel

from inference.errors import ListenerTooSlow
from inference.progress.events import Event, as_json
from inference.progress.gate import INTERVAL_S, Gate, Tries

KEPT = 1000
"""Events of a project that late listeners can still get."""

FORGET_S = 3600.0
"""A project without events and listeners for so long is forgotten."""

BUFFER = 256
"""Events that may wait for one listener: two minutes of a task that says something twice a second."""

START = "0-0"
"""The id before every other: who asks for what came after it gets all that is kept."""


@dataclass(frozen=True, slots=True)
class Published:
    """An event of a stream."""

    id: str  # "milliseconds-number", as Redis numbers the entries of a stream; grows along the stream
    event: Event
    json: str  # the event, written once for all listeners


class Subscription(Protocol):
    """One listener's way through a stream."""

    resumed: bool  # False: nothing is known of the id that was named, or events after it are gone; `snapshot` has all
    snapshot: list[Published]  # where `resumed` is False: the newest event of each task, in the order of the stream

    def __aiter__(self) -> AsyncIterator[Published]:
        """Events in order, each once. Raises ListenerTooSlow where the listener fell behind too far.

        Ends when the hub is closed.
        """
        ...


class ProgressHub(Protocol):
    """Takes events and hands them to listeners."""

    def publish(self, event: Event) -> None:
        """Adds an event to the stream of its project. Raises nothing: an event that cannot be told is a log line."""
        ...

    def subscribe(self, project_id: str, after: str | None = None) -> AbstractAsyncContextManager[Subscription]:
        """Follows a project: after the event of the id `after`, or without one from a snapshot on."""
        ...

    def close(self) -> None:
        """Ends every subscription; later events go nowhere."""
        ...


_installed: ProgressHub | None = None


def install(hub: ProgressHub | None) -> None:
    """Makes this the hub of the process: trackers that are given none publish there. None takes it away."""
    global _installed  # noqa: PLW0603 - a process has one, as it has one log
    _installed = hub


def installed() -> ProgressHub | None:
    """The hub of the process, if it has one."""
    return _installed


class MemoryHub:
    """A hub for the listeners of one process, in its memory.

    Publishing works from any thread, subscribing in any event loop. Nobody waits for a listener: it is woken in its own
    loop, and one for whom too many events wait is ended.
    """

    def __init__(self, *, interval_s: float = INTERVAL_S, clock: Callable[[], float] = time.monotonic) -> None:
        """`interval_s`: between two progress events of a task."""
        self._clock = clock
        self._gate = Gate(self._number, interval_s=interval_s, clock=clock)
        self._lock = threading.Lock()
        self._streams: dict[str, _Stream] = {}
        self._bells: dict[Any, _Bell] = {}  # of event loops in which somebody listens
        self._last_id = (0, 0)
        self._swept_at = clock()
        self._closed = False

    def publish(self, event: Event) -> None:
        """Adds an event to the stream of its project, if the gate lets it through. Raises nothing."""
        self._gate.offer(event)

    def feed(self, project_id: str, published: Published) -> None:
        """Adds an event that was published elsewhere, under the id it has there.

        It has passed the gate of its own process. One that does not come after the last of its stream is ignored, and
        so is a late word of a try that is over.
        """
        with self._lock:
            self._stream(project_id).feed(published)

    def forget(self, project_id: str) -> None:
        """Drops a project without listeners. For who feeds it, and stops; it can be fed again from its beginning."""
        with self._lock:
            if (stream := self._streams.get(project_id)) and not stream.listeners:
                del self._streams[project_id]

    @asynccontextmanager
    async def subscribe(self, project_id: str, after: str | None = None) -> AsyncIterator[Subscription]:
        """Follows a project: after the event of the id `after`, or without one from a snapshot on."""
        loop = lowlevel.current_token().native_token
        with self._lock:
            bell = self._bells.setdefault(loop, _Bell(loop))
            bell.listeners += 1
            listener = _Listener(bell)
            stream = self._stream(project_id)
            stream.welcome(listener, after)
            if self._closed:
                listener.end()
        try:
            yield listener
        finally:
            with self._lock:
                stream.listeners.discard(listener)
                stream.used_at = self._clock()
                bell.listeners -= 1
                if not bell.listeners:
                    del self._bells[loop]

    def close(self) -> None:
        """Ends every subscription once it has delivered what it has; later events go nowhere."""
        self._gate.close()
        with self._lock:
            self._closed = True
            for stream in self._streams.values():
                for listener in stream.listeners:
                    listener.end()

    def _number(self, event: Event) -> None:
        text = as_json(event)
        with self._lock:
            now_ms = time.time_ns() // 1_000_000
            last_ms, last_n = self._last_id
            # Ids grow even where the clock was set back.
            self._last_id = (now_ms, 0) if now_ms > last_ms else (last_ms, last_n + 1)
            self._stream(event.project_id).add(Published("{}-{}".format(*self._last_id), event, text))

    def _stream(self, project_id: str) -> "_Stream":
        now = self._clock()
        if now - self._swept_at > FORGET_S / 10:
            self._swept_at = now
            self._streams = {
                project: stream
                for project, stream in self._streams.items()
                if stream.listeners or now - stream.used_at < FORGET_S
            }
        stream = self._streams.get(project_id)
        if stream is None:
            stream = self._streams[project_id] = _Stream()
        stream.used_at = now
        return stream


def _order(published_id: str) -> tuple[int, int]:
    """What ids are sorted by. Raises ValueError for what is no id."""
    milliseconds, _, number = published_id.partition("-")
    return int(milliseconds), int(number or 0)


class _Stream:
    """The events of one project."""

    def __init__(self) -> None:
        self.listeners: set[_Listener] = set()
        self.used_at = 0.0
        self._kept: deque[Published] = deque(maxlen=KEPT)
        self._newest: dict[str, Published] = {}  # of each task, in the order of the stream
        self._tries: dict[str, Tries] = {}  # of each task
        self._is_whole = True  # nothing that was ever published here is gone

    def feed(self, published: Published) -> None:
        is_new = not self._kept or _order(published.id) > _order(self._kept[-1].id)
        tries = self._tries.setdefault(published.event.task_name, Tries())
        if is_new and not tries.is_late(published.event):
            self.add(published)

    def add(self, published: Published) -> None:
        self._is_whole = self._is_whole and len(self._kept) < KEPT
        self._kept.append(published)
        self._newest.pop(published.event.task_name, None)
        self._newest[published.event.task_name] = published
        if len(self._newest) > KEPT:
            oldest = next(iter(self._newest))
            del self._newest[oldest]
            self._tries.pop(oldest, None)
        self.listeners = {listener for listener in self.listeners if listener.offer(published)}

    def welcome(self, listener: "_Listener", after: str | None) -> None:
        """Gives a listener what it missed, and from now on everything."""
        missed = self._since(after) if after is not None else None
        if missed is None:
            listener.snapshot = list(self._newest.values())
        else:
            listener.resumed = True
            listener.missed.extend(missed)
        self.listeners.add(listener)

    def _since(self, after: str) -> list[Published] | None:
        """What came after the id, None where that is not known."""
        if after == START:
            return list(self._kept) if self._is_whole else None
        later = list(itertools.takewhile(lambda published: published.id != after, reversed(self._kept)))
        if len(later) == len(self._kept):
            return None  # the id is not among those kept: an old one, or of another process
        return later[::-1]


class _Bell:
    """Wakes the listeners of one event loop, all that an event is for at once: being called from another thread costs
    a loop a system call, as much as sending the event does.
    """

    def __init__(self, loop: Any) -> None:
        """`loop`: as anyio's tokens have it, asyncio's or trio's."""
        # anyio's own `from_thread.run_sync` waits for the function's end, and no publisher should.
        self._call_soon: Callable[[Callable[[], object]], object] = (
            loop.call_soon_threadsafe if hasattr(loop, "call_soon_threadsafe") else loop.run_sync_soon
        )
        self._lock = threading.Lock()
        self._asleep: list[_Listener] = []
        self.listeners = 0

    def ring(self, listener: "_Listener") -> bool:
        """Wakes a listener soon, whatever thread this is. False where the loop is gone."""
        with self._lock:
            self._asleep.append(listener)
            if len(self._asleep) > 1:
                return True  # the loop has been called, and has not come yet
            try:
                self._call_soon(self._wake)
            except RuntimeError:  # the loop has ended without the subscription: asyncio's, and trio's RunFinishedError
                self._asleep.clear()
                return False
            return True

    def _wake(self) -> None:
        with self._lock:
            asleep, self._asleep = self._asleep, []
        for listener in asleep:
            listener.rise()


class _Listener:
    """One subscription. `offer` and `end` are called in any thread, the rest in the listener's event loop."""

    def __init__(self, bell: _Bell) -> None:
        self.resumed = False
        self.snapshot: list[Published] = []
        self.missed: deque[Published] = deque()  # from before it came, so that it is not too slow for them
        self._waiting: deque[Published] = deque()
        self._lock = threading.Lock()
        self._bell = bell
        self._something = anyio.Event()
        self._is_asleep = False  # waits for `_something`, and nobody has called it yet
        self._ended = False
        self._too_slow = False

    def offer(self, published: Published) -> bool:
        """Takes one more event. False: the listener has ended, or does so now."""
        with self._lock:
            if self._ended:
                return False
            if len(self._waiting) < BUFFER:
                self._waiting.append(published)
                return self._wake()
            self._too_slow = self._ended = True
            self._wake()
            return False

    def end(self) -> None:
        with self._lock:
            self._ended = True
            self._wake()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Published:
        while True:
            with self._lock:
                if self._too_slow:
                    raise ListenerTooSlow(f"more than {BUFFER} events waited for this listener: connect again")
                if self.missed:
                    return self.missed.popleft()
                if self._waiting:
                    return self._waiting.popleft()
                if self._ended:
                    raise StopAsyncIteration
                self._something = anyio.Event()
                self._is_asleep = True
            await self._something.wait()

    def rise(self) -> None:
        """Looks again. Called in the listener's event loop."""
        self._something.set()

    def _wake(self) -> bool:
        """False where the listener's event loop is gone."""
        if self._is_asleep:
            self._is_asleep = False
            if not self._bell.ring(self):
                self._ended = True
                return False
        return True
