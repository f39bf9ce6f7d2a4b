"""Events on their way to a store that may be away for a while."""

import random
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import structlog

log = structlog.get_logger(__name__)

MAX_WAITING = 1_000
"""Events that wait for a store to come back. When there are more, only the newest of each task is kept."""

BATCH = 100
"""Events sent in one go after a store came back."""

FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 30.0
"""Between two tries to reach a store that is away. See Outage."""

IDLE_S = 5.0
"""For so long the thread waits for events before it ends; it is started again when needed."""


class Away(Exception):
    """The store does not take anything now. What was sent may have arrived all the same. The message says why."""


class Outage:
    """A store that is away, or is not: how long to wait before the next try."""

    def __init__(self, first_s: float, longest_s: float) -> None:
        self._first_s, self._longest_s = first_s, longest_s
        self._s = 0.0  # above 0 while it is away

    @property
    def is_on(self) -> bool:
        """Whether the last try failed."""
        return self._s > 0

    def go_on(self) -> None:
        """One try more has failed: the pause doubles, from the first to the longest."""
        self._s = min(self._s * 2, self._longest_s) or self._first_s

    def end(self) -> None:
        """The store has answered."""
        self._s = 0.0

    def draw_pause_s(self) -> float:
        """The pause as it is now, give or take a fifth, so that many processes do not come at once."""
        return self._s * random.uniform(0.8, 1.2)


@dataclass(frozen=True, slots=True)
class Entry:
    """One event, ready to be stored."""

    project_id: str
    task_name: str
    json: str


class Send(Protocol):
    """Stores entries, in order."""

    def __call__(self, entries: Sequence[Entry], *, again: bool) -> None:
        """Raises Away. With `again`, entries may have arrived in an earlier try, and those that have are left out."""
        ...


class Outbox:
    """Sends entries in the order in which they were put, each once.

    Directly: `put` sends in the caller's thread, so that nothing is lost when the process ends right after it. While
    the store is away, entries wait in memory, and a daemon thread tries again; only the `put` that notices the outage
    waits for an answer of the store, and others behind it, which keeps the order. In the background: the thread sends
    everything, and `put` never waits.

    Whoever says `where` the store is leaves passwords out. Safe to call from any thread, but not across a fork.
    """

    def __init__(self, send: Send, *, where: str, in_background: bool) -> None:
        self._send = send
        self._where = where
        self._in_background = in_background
        self._changed = threading.Condition()
        self._waiting: deque[Entry] = deque()
        self._sending: list[Entry] = []  # by the thread, at this moment
        self._thread: threading.Thread | None = None
        self._outage = Outage(FIRST_PAUSE_S, LONGEST_PAUSE_S)
        self._may_have_arrived = False
        self._closed = False

    @property
    def is_away(self) -> bool:
        """Whether the last try to reach the store failed."""
        return self._outage.is_on

    def put(self, entry: Entry) -> None:
        """Sends the entry now, or once those before it were sent. Raises what `send` raises, but not Away."""
        with self._changed:
            if self._closed:
                return
            if not (self._in_background or self._waiting or self._sending):
                try:
                    self._send([entry], again=False)
                except Away as away:
                    self._note_outage(away)
                else:
                    return
            self._waiting.append(entry)
            if len(self._waiting) > MAX_WAITING:
                self._keep_newest()
            if self._thread is None:
                thread = threading.Thread(target=self._run, name="progress-outbox", daemon=True)
                thread.start()  # raises where the process may have no more threads: the next entry tries again
                self._thread = thread
            self._changed.notify_all()

    def close(self, timeout_s: float) -> None:
        """Tries once more to send what waits, for at most so long. Later entries go nowhere."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._thread is None, timeout_s)
            if left := len(self._waiting) + len(self._sending):
                log.warning("progress is lost: the store was away until the end", store=self._where, events=left)

    def _run(self) -> None:
        while True:
            with self._changed:
                if self.is_away:
                    self._changed.wait_for(lambda: self._closed, self._outage.draw_pause_s())
                elif not self._waiting and not self._closed:
                    self._changed.wait(IDLE_S)
                if not self._waiting:
                    self._thread = None
                    self._changed.notify_all()
                    return
                self._sending = [self._waiting.popleft() for _ in range(min(BATCH, len(self._waiting)))]
                again = self._may_have_arrived
            failure: Away | None = None
            has_arrived = False
            try:
                self._send(self._sending, again=again)
                has_arrived = True
            except Away as away:
                failure = away
            except Exception:  # these entries cannot be stored at all: others can
                log.exception("progress could not be told", store=self._where, events=len(self._sending))
            with self._changed:
                if failure is not None:
                    self._waiting.extendleft(reversed(self._sending))
                    self._note_outage(failure)
                elif has_arrived and self.is_away:
                    log.info("progress can be told again", store=self._where)
                    self._outage.end()
                self._sending = []
                self._may_have_arrived = self._may_have_arrived and bool(self._waiting)
                if failure and self._closed:
                    self._thread = None
                    self._changed.notify_all()
                    return

    def _note_outage(self, away: Away) -> None:
        if not self.is_away:  # one line an outage
            log.warning("progress cannot be told for now", store=self._where, reason=str(away))
        self._outage.go_on()
        self._may_have_arrived = True

    def _keep_newest(self) -> None:
        newest: dict[tuple[str, str], Entry] = {}
        for entry in reversed(self._waiting):
            newest.setdefault((entry.project_id, entry.task_name), entry)
        kept = list(newest.values())[: MAX_WAITING // 2]
        self._waiting = deque(reversed(kept))
