"""Who works for this queue, as far as this process has heard."""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from inference.providers import WorkerType

FORGET_S = 600.0
"""Who was not heard of for this long is gone."""

MAX_WORKERS = 1000
MAX_ITEMS = 5000
"""The most that are remembered. Names come from outside: whoever has the key can make up any number of them."""


@dataclass(frozen=True, slots=True)
class WorkerSeen:
    """A worker, or a pool of containers that go by one name."""

    name: str
    worker_type: WorkerType | None  # what kind of tasks it asked for last; None: any, or it has asked for none
    heard_s_ago: float
    item_ids: tuple[str, ...]  # the tasks that it has


@dataclass(frozen=True, slots=True)
class _Heard:
    name: str  # of the worker
    at_s: float
    worker_type: WorkerType | None = None


class Workers:
    """Remembers for a while who was heard of. Safe to call from any thread.

    Of workers that asked another server on the same database, this one knows nothing.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        # Who, and of which task, was heard of last is at the end.
        self._workers: OrderedDict[str, _Heard] = OrderedDict()
        self._items: OrderedDict[str, _Heard] = OrderedDict()

    def asked(self, worker_id: str, worker_type: WorkerType | None = None) -> None:
        """It asked for a task, of this kind."""
        with self._lock:
            heard = _Heard(name_of(worker_id), self._clock(), worker_type)
            self._note(self._workers, heard.name, heard, MAX_WORKERS)

    def heard(self, worker_id: str, item_id: str) -> None:
        """It got a task, or renewed it."""
        with self._lock:
            name = name_of(worker_id)
            known = self._workers.get(name)
            heard = _Heard(name, self._clock(), known.worker_type if known else None)
            self._note(self._workers, name, heard, MAX_WORKERS)
            self._note(self._items, item_id, heard, MAX_ITEMS)

    def ended(self, worker_id: str, item_id: str) -> None:
        """It reported the end of a task, or handed it back."""
        self.heard(worker_id, item_id)
        with self._lock:
            self._items.pop(item_id, None)

    def seen(self) -> list[WorkerSeen]:
        """Who was heard of, the latest first."""
        with self._lock:
            now_s = self._clock()
            for those, most in ((self._workers, MAX_WORKERS), (self._items, MAX_ITEMS)):
                _forget(those, now_s, most)
            items: dict[str, list[str]] = {}
            for item_id, heard in self._items.items():
                items.setdefault(heard.name, []).append(item_id)
            return [
                WorkerSeen(it.name, it.worker_type, max(0.0, now_s - it.at_s), tuple(sorted(items.get(it.name, ()))))
                for it in reversed(self._workers.values())
            ]

    @staticmethod
    def _note(those: OrderedDict[str, _Heard], key: str, heard: _Heard, most: int) -> None:
        those[key] = heard
        those.move_to_end(key)
        _forget(those, heard.at_s, most)


def _forget(those: OrderedDict[str, _Heard], now_s: float, most: int) -> None:
    while those:
        key, heard = next(iter(those.items()))
        if heard.at_s > now_s - FORGET_S and len(those) <= most:
            return
        del those[key]


def name_of(worker_id: str) -> str:
    """A worker's name: what is before the last dot, since each lease has a worker_id of its own, NAME.token."""
    name, _, _ = worker_id.rpartition(".")
    return name or worker_id
