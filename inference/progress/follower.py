"""Streams that other processes write to, followed by one thread for all listeners of this process."""

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import structlog
from pydantic import ValidationError

from inference.progress.events import event_of
from inference.progress.hub import START, MemoryHub, Published
from inference.progress.outbox import Away, Outage

log = structlog.get_logger(__name__)

BATCH = 100
"""Entries of a stream that are read in one go."""

BLOCK_S = 5.0
"""For so long one question to the store waits for an answer."""

KEEP_S = 60.0
"""A project is followed for so long after its last listener left: pages are reloaded, and connections are lost."""

FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 5.0
"""Between two tries to reach a store that is away. See Outage."""

BREATH_S = 0.02
"""Between two full batches, so that listeners take what came before their buffers are full."""


class Source(Protocol):
    """Where the streams are."""

    def read(
        self, positions: Mapping[str, str], *, count: int, block_s: float | None
    ) -> Sequence[tuple[str, Sequence[tuple[str, str]]]]:
        """For each project, what came after the id that is its position: (id, JSON) in order, at most `count` of each.

        With `block_s`, waits for so long until there is something, or until somebody wakes it. Raises Away.
        """
        ...

    def rest(self) -> None:
        """Nothing is read for a while. Raises nothing."""
        ...


@dataclass(slots=True)
class Followed:
    """One project that has listeners here, or had a short while ago."""

    project_id: str
    listeners: int = 0
    left_at: float = 0.0
    position: str = START  # the last id that was read
    is_ready: bool = False  # all that the stream had when it was first read is here


class Follower:
    """Feeds a MemoryHub with what is written to the streams of all projects that have listeners."""

    def __init__(self, source: Source, into: MemoryHub, *, where: str) -> None:
        self._source = source
        self._into = into
        self._where = where
        self._changed = threading.Condition()
        self._followed: dict[str, Followed] = {}
        self._thread: threading.Thread | None = None
        self._outage = Outage(FIRST_PAUSE_S, LONGEST_PAUSE_S)
        self._closed = False

    @property
    def is_away(self) -> bool:
        """Whether the last try to read failed."""
        return self._outage.is_on

    @property
    def is_closed(self) -> bool:
        """Whether nothing is read any more."""
        return self._closed

    def follow(self, project_id: str) -> tuple[Followed, bool]:
        """One listener more, and whether whoever reads has to be told. Each call needs an `unfollow` later."""
        with self._changed:
            followed = self._followed.get(project_id)
            is_new = followed is None
            if followed is None:
                followed = self._followed[project_id] = Followed(project_id)
            runs = self._thread is not None
            if self._thread is None and not self._closed:
                thread = threading.Thread(target=self._run, name="progress-follower", daemon=True)
                thread.start()  # raises where the process may have no more threads: the next listener tries again
                self._thread = thread
            followed.listeners += 1
            return followed, is_new and runs and not self.is_away

    def unfollow(self, followed: Followed) -> None:
        """One listener less."""
        with self._changed:
            followed.listeners -= 1
            followed.left_at = time.monotonic()

    def close(self) -> bool:
        """Reads nothing more. Whether somebody may be waiting in `Source.read`; that is not waited for."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            return self._thread is not None and not self.is_away

    def _run(self) -> None:
        while self._is_needed():
            try:
                self._ask()
            except Away as away:
                if not self.is_away and not self._closed:  # one line an outage
                    log.warning("progress of others cannot be followed for now", store=self._where, reason=str(away))
                self._wait_out()
            except Exception:  # without this thread every listener would wait for ever
                log.exception("progress of others could not be followed", store=self._where)
                self._wait_out()

    def _is_needed(self) -> bool:
        with self._changed:
            for followed in self._long_left():
                del self._followed[followed.project_id]
                self._into.forget(followed.project_id)
            if self._closed or not self._followed:
                self._source.rest()  # before another thread can begin
                self._thread = None
                return False
            return True

    def _ask(self) -> None:
        with self._changed:
            asked = list(self._followed.values())
        is_new = any(not followed.is_ready for followed in asked)
        positions = {followed.project_id: followed.position for followed in asked}
        answer = dict(self._source.read(positions, count=BATCH, block_s=None if is_new else BLOCK_S))
        if self.is_away:
            log.info("progress of others is followed again", store=self._where)
            self._outage.end()
        self._take(asked, answer)

    def _long_left(self) -> list[Followed]:
        past = time.monotonic() - KEEP_S
        return [it for it in self._followed.values() if not it.listeners and it.left_at < past]

    def _wait_out(self) -> None:
        with self._changed:
            self._outage.go_on()
            self._changed.wait_for(lambda: self._closed, self._outage.draw_pause_s())

    def _take(self, asked: list[Followed], answer: Mapping[str, Sequence[tuple[str, str]]]) -> None:
        is_full = False
        for followed in asked:
            entries = answer.get(followed.project_id, ())
            for identity, text in entries:
                followed.position = identity
                try:
                    event = event_of.validate_json(text)
                except ValidationError as error:
                    flaws = error.error_count()
                    log.warning("an entry of a stream is no event", project_id=followed.project_id, flaws=flaws)
                    continue
                self._into.feed(followed.project_id, Published(identity, event, text))
            is_full |= followed.is_ready and len(entries) == BATCH
            followed.is_ready |= len(entries) < BATCH
        if is_full:
            with self._changed:
                self._changed.wait_for(lambda: self._closed, BREATH_S)
