"""What of a task's progress is worth telling: not too often, never backwards, and nothing that is stale."""

import heapq
import itertools
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import structlog

from inference.progress.events import MAX_PROGRESS, CompletionEvent, ErrorEvent, Event, ProgressEvent, percent

log = structlog.get_logger(__name__)

INTERVAL_S = 0.5
"""Between two progress events of a task: two a second are enough for people."""

LATE_S = 10.0
"""For so long after the end of a task, progress that names no lease is taken for a late word of the try that ended."""

FORGET_S = 3600.0
"""A task that nothing was heard of for so long is forgotten, and begins anew when it is heard of again."""

IDLE_S = 5.0
"""For so long the thread waits for something to do before it ends; it is started again when needed."""

TRIES = 8
"""So many earlier tries of a task are remembered, to know what is late."""

PENDING = "pending"
"""The status of a task that waits, for the first time or again: whatever was said of an earlier try has no meaning."""


AIMED_AT_THE_WORK = ("SoftTimeLimitExceeded",)
"""Names of exceptions that are no fault of the code they come out of: Celery raises this one wherever a task is."""


def is_aimed_at_the_work(error: BaseException) -> bool:
    """Whether somebody wants to stop the work itself: those who only report its progress have to let it pass."""
    return type(error).__name__ in AIMED_AT_THE_WORK


class Gate:
    """Lets events of each task through to `send`, in this order of questions:

    - Is it stale? So is what an earlier lease says, a sequence number that was passed already, and progress after the
      end of its lease. Lease and sequence are optional, and are found in the event's metadata or details. A result is
      the application's own, and is never looked into.
    - Does it go back? Within one lease the fraction never falls, and stays below 1 until the completion.
    - Is it too soon? Of what comes within half a second after the last progress event, the newest waits until that time
      is over. An end is sent at once, and what waits is dropped.

    A task that is pending again begins anew, so its fraction may fall.

    Safe to call from any thread. `send` is called in the caller's thread, or in a thread of the gate for what waited;
    for one task never in two threads at once, so the order is kept. What it raises costs a log line.
    """

    def __init__(
        self,
        send: Callable[[Event], None],
        *,
        interval_s: float = INTERVAL_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._send = send
        self._interval_s = interval_s
        self._clock = clock
        self._begin()

    def _begin(self) -> None:
        self._process = os.getpid()
        self._lock = threading.Lock()  # of everything here but what a task holds
        self._wake = threading.Condition(self._lock)
        self._tasks: dict[tuple[str, str], _Task] = {}
        self._due: list[tuple[float, int, _Task]] = []  # a heap: when to send what waits
        self._numbers = itertools.count()  # so that equal times never compare tasks
        self._thread: threading.Thread | None = None
        self._swept_at = self._clock()
        self._closed = False

    def offer(self, event: Event) -> None:
        """Sends the event now, later, or never."""
        if os.getpid() != self._process:  # a fork took the locks along in whatever state, but not the thread
            self._begin()
        now = self._clock()
        with self._lock:
            if self._closed:
                return
            task = self._task(event, now)
        with task.lock:
            passed, due_at = task.judge(event, now, self._interval_s)
            if passed is not None:
                self._tell(passed)
        if due_at is not None:
            with self._lock:
                heapq.heappush(self._due, (due_at, next(self._numbers), task))
                self._see_to_thread()

    def send_due(self) -> None:
        """Sends what has waited long enough."""
        while True:
            with self._lock:
                if not self._due or self._due[0][0] > self._clock():
                    return
                task = heapq.heappop(self._due)[2]
            with task.lock:
                if event := task.take(self._clock(), self._interval_s):
                    self._tell(event)

    def close(self) -> None:
        """Sends what waits, and lets nothing through any more."""
        with self._lock:
            self._closed = True
            waiting = [task for _, _, task in sorted(self._due)]
            self._due.clear()
            self._wake.notify_all()
        for task in waiting:
            with task.lock:
                if event := task.take(self._clock(), 0):
                    self._tell(event)

    def _tell(self, event: Event) -> None:
        try:
            self._send(event)
        except Exception as error:  # whoever reports progress has something better to do than to see to it
            if is_aimed_at_the_work(error):
                raise
            log.exception("progress could not be told", project_id=event.project_id, task_name=event.task_name)

    def _task(self, event: Event, now: float) -> "_Task":
        if now - self._swept_at > FORGET_S / 10:
            self._swept_at = now
            self._tasks = {key: task for key, task in self._tasks.items() if now - task.heard_at < FORGET_S}
        key = (event.project_id, event.task_name)
        task = self._tasks.get(key)
        if task is None:
            task = self._tasks[key] = _Task()
        task.heard_at = now
        return task

    def _see_to_thread(self) -> None:
        if self._thread is not None:
            self._wake.notify_all()
            return
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)
        try:
            self._thread.start()
        except RuntimeError:  # no thread is to be had, as while the interpreter ends: what waits goes with the next
            self._thread = None

    def _run(self) -> None:
        while True:
            self.send_due()
            with self._lock:
                if self._due:
                    self._wake.wait(max(0.0, self._due[0][0] - self._clock()))
                elif (self._closed or not self._wake.wait(IDLE_S)) and not self._due:
                    self._thread = None
                    return


class _Task:
    """What a gate knows of one task."""

    __slots__ = ("_ended_at", "_fraction", "_held", "_lease", "_sent_at", "_sequence", "heard_at", "lock")

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.heard_at = 0.0
        self._lease: float | None = None  # None: no event has named one
        self._sequence: float | None = None  # the highest of this lease
        self._fraction = 0.0
        self._ended_at: float | None = None
        self._sent_at: float | None = None  # the last progress event
        self._held: ProgressEvent | None = None

    def judge(self, event: Event, now: float, interval_s: float) -> tuple[Event | None, float | None]:
        """The event to send now, if any; and when the one that has just begun to wait is due, if one has."""
        if self._is_stale(event, now):
            return None, None
        if not isinstance(event, ProgressEvent):
            self._held = None
            self._ended_at = now
            return event, None
        self._fraction = max(self._fraction, min(event.progress, MAX_PROGRESS))
        if (event.progress, event.progress_percent) != (self._fraction, percent(self._fraction)):
            forward = {"progress": self._fraction, "progress_percent": percent(self._fraction)}
            event = event.model_copy(update=forward)
        if self._sent_at is None or now - self._sent_at >= interval_s:
            self._held = None
            self._sent_at = now
            return event, None
        is_first = self._held is None
        self._held = event
        return None, self._sent_at + interval_s if is_first else None

    def take(self, now: float, interval_s: float) -> Event | None:
        """What waits, if it still does and has waited long enough.

        It may have begun to wait later than when this call was planned for, and is due at another call then.
        """
        if self._held is None or (self._sent_at is not None and now - self._sent_at < interval_s):
            return None
        event, self._held = self._held, None
        self._sent_at = now
        return event

    def _is_stale(self, event: Event, now: float) -> bool:
        is_progress = isinstance(event, ProgressEvent)
        lease, sequence = _mark(event, "lease"), _mark(event, "sequence")
        if lease is not None and self._lease is not None and lease < self._lease:
            return True
        is_same_try = lease is None or lease == self._lease
        if not is_same_try:
            self._lease = lease
            self._begin_anew()
        elif sequence is not None and self._sequence is not None and sequence <= self._sequence and is_progress:
            return True
        if isinstance(event, ProgressEvent) and event.status == PENDING:
            self._begin_anew()
        elif self._ended_at is not None and is_progress:
            if lease is not None or now - self._ended_at < LATE_S:
                return True
            self._begin_anew()
        if sequence is not None:
            self._sequence = sequence if self._sequence is None else max(sequence, self._sequence)
        return False

    def _begin_anew(self) -> None:
        self._sequence = None
        self._fraction = 0.0
        self._ended_at = None
        self._held = None


class Tries:
    """Which tries of a task are over, for who hears of it from several processes, each with a gate of its own.

    Celery gives a task to a second worker when the first one seems to be gone, and that one may go on all the same.
    Numbers of tries come from clocks that may differ, so a lower number alone says nothing: a try is over once a later
    one was heard after it.
    """

    def __init__(self) -> None:
        self._newest: float | None = None
        self._earlier: deque[float] = deque(maxlen=TRIES)
        self._has_ended = False

    def is_late(self, event: Event) -> bool:
        """Whether the event is a late word of a try that is over."""
        lease = _mark(event, "lease")
        if lease is not None and lease != self._newest:
            if lease in self._earlier and self._newest is not None and lease < self._newest:
                return True
            if self._newest is not None:
                self._earlier.append(self._newest)
            self._newest = lease
            self._has_ended = False
        if not isinstance(event, ProgressEvent):
            self._has_ended = True
            return False
        if event.status == PENDING:
            self._has_ended = False
        return self._has_ended and lease is not None


def _mark(event: Event, name: str) -> float | None:
    """A number that an event carries among what is free in it."""
    match event:
        case ProgressEvent():
            value: Any = event.metadata.get(name)
        case ErrorEvent():
            value = event.details.get(name)
        case CompletionEvent():
            return None
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None
