"""Who works for this queue, as far as this process has heard."""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

FORGET_S = 600.0
"""Who was not heard of for this long is gone."""

MAX_WORKERS = 1000
"""The most that are remembered. Names come from outside, so anybody with the key could make up any number of them."""

MAX_ITEMS = 20
"""The most tasks that are remembered of one worker: more than one machine works on at once."""


@dataclass(frozen=True, slots=True)
class WorkerSeen:
    """A worker, or a pool of containers that go by one name."""

    name: str
    worker_type: str | None  # what kind of tasks it asks for; None: any
    heard_s_ago: float
    item_ids: tuple[str, ...]  # what it works on, in the order in which it began


@dataclass(slots=True)
class _Heard:
    at_s: float
    worker_type: str | None = None
    items: dict[str, float] = field(default_factory=dict)  # when each was heard of


class Workers:
    """Remembers for a while who was heard of. Safe to call from any thread.

    Of workers that asked another server on the same database, this one knows nothing.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._heard: OrderedDict[str, _Heard] = OrderedDict()  # who was heard of last is at the end

    def asked(self, worker_id: str, worker_type: str | None = None) -> None:
        """It asked for a task, and says of which kind."""
        with self._lock:
            self._of(worker_id).worker_type = worker_type

    def heard(self, worker_id: str, item_id: str) -> None:
        """It has a task, or renewed it."""
        with self._lock:
            it = self._of(worker_id)
            it.items[item_id] = it.at_s
            if len(it.items) > MAX_ITEMS:
                del it.items[next(iter(it.items))]

    def ended(self, worker_id: str, item_id: str) -> None:
        """It handed a task back, or its work on it ended."""
        with self._lock:
            self._of(worker_id).items.pop(item_id, None)

    def seen(self) -> list[WorkerSeen]:
        """Who was heard of, the latest first."""
        with self._lock:
            now_s = self._clock()
            self._forget(now_s)
            return [
                WorkerSeen(
                    name=name,
                    worker_type=it.worker_type,
                    heard_s_ago=max(0.0, now_s - it.at_s),
                    item_ids=tuple(item for item, at_s in it.items.items() if at_s > now_s - FORGET_S),
                )
                for name, it in reversed(self._heard.items())
            ]

    def _of(self, worker_id: str) -> _Heard:
        now_s = self._clock()
        name = name_of(worker_id)
        it = self._heard.setdefault(name, _Heard(now_s))
        it.at_s = now_s
        self._heard.move_to_end(name)
        self._forget(now_s)
        return it

    def _forget(self, now_s: float) -> None:
        while self._heard:
            name, it = next(iter(self._heard.items()))
            if it.at_s > now_s - FORGET_S and len(self._heard) <= MAX_WORKERS:
                return
            del self._heard[name]


def name_of(worker_id: str) -> str:
    """A worker's name: what is before the last dot, since each lease has a worker_id of its own, NAME.token."""
    name, _, _ = worker_id.rpartition(".")
    return name or worker_id
