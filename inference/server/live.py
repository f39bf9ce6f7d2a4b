"""What changes in the queue becomes events, for whoever follows a group of tasks or the whole queue; and how long what
is ongoing will take.

A store calls `changed` with every item that it has changed. What other servers on the same database change is heard of
only through a hub that they share.
"""

import heapq
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, NamedTuple

import anyio.to_thread

from inference.progress.eta import StageHistory, TaskEta
from inference.progress.events import CompletionEvent, ErrorEvent, Event, ProgressEvent, percent
from inference.progress.hub import ProgressHub
from inference.providers import WorkerType, provider_of
from inference.queues.item import Item
from inference.server.rows.removal import DeletedItem
from inference.server.rows.store import InLine, Store

QUEUE = "queue"
"""The project in which every task of this queue is told; a group's are told under the group's id as well."""

MAX_OF_GROUP = 200
"""The newest tasks of a group that a listener is told of at first."""

MAX_ONGOING = 200
"""As MAX_OF_GROUP: of the tasks of the whole queue that wait, and as many of those that are worked on."""

MAX_NEWEST = 50
"""As MAX_OF_GROUP: of all tasks of the queue."""

MAX_RUNNING = 10_000
"""Tasks whose speed is remembered: more than any fleet has, and of some the end was told to another server."""

MAX_LINE = 5000
"""Where more tasks than this are ongoing, nobody is told when the last of them will be ready."""

SEED = 50
"""The completed tasks that a server looks at when it starts, to know how long tasks take."""

STARTING = "starting"
"""What a worker does before it says something of its own: a cold start, the way to the worker."""

WHOLE = "whole"
"""The only stage of a past task of which it is known how long it took, and not what took how long."""

FROM_THE_START_S = 5.0
"""Somebody who hears of a task no later than this after its lease knows how long each of its stages takes."""


class _Running(NamedTuple):
    """One try of one task."""

    lease_seq: int
    began_s: float  # on this process's monotonic clock
    is_from_the_start: bool
    eta: TaskEta


class Live:
    """Publishes what a store has changed. Safe to call from any thread; it waits for nobody."""

    def __init__(
        self,
        store: Store,
        hub: ProgressHub,
        history: StageHistory | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._hub = hub
        self._history = history or StageHistory()
        self._clock = clock
        self._lock = threading.Lock()
        self._running: OrderedDict[str, _Running] = OrderedDict()

    def seed(self) -> None:
        """Learns how long tasks take from those that were completed last. Raises QueueUnavailable."""
        for item in reversed(self._store.last_completed(SEED)):
            if item.started_at is not None and item.ended_at is not None:
                self._history.add(kind_of(item), {WHOLE: item.ended_at - item.started_at})

    # ------------------------------------------------------------ what the store calls

    def changed(self, item: Item) -> None:
        """Tells of an item as it is now."""
        eta_s = self._follow(item)
        for project_id in (item.group_id, QUEUE):
            self._hub.publish(event_of_item(item, project_id, eta_s))

    def deleted(self, item: DeletedItem) -> None:
        """Tells of an item that is no more."""
        with self._lock:
            self._running.pop(item.id, None)
        details = {"error_code": "deleted", "group_id": item.group_id}
        for project_id in (item.group_id, QUEUE):
            self._hub.publish(
                ErrorEvent(project_id=project_id, task_name=item.id, error="the task was deleted", details=details)
            )

    # ------------------------------------------------------------ how long it takes

    def left_s(self, item: Item) -> float | None:
        """Seconds until the item is completed, of one that is worked on; None where nobody can tell."""
        with self._lock:
            running = self._running.get(item.id)
        if item.status != "processing" or running is None or running.lease_seq != item.lease_seq:
            return None
        return self._left_s(running, kind_of(item))

    def queue_left_s(self) -> float | None:
        """Seconds until all that is ongoing is completed; None where nobody can tell. Raises QueueUnavailable."""
        ready_s = self.groups_left_s().values()
        known_s = [left_s for left_s in ready_s if left_s is not None]
        return max(known_s, default=None) if len(known_s) == len(ready_s) else None

    def groups_left_s(self) -> Mapping[str, float | None]:
        """The same for each group that has something ongoing, with what is before it in the line.

        If as many tasks as now are worked on at once, each by its turn. Empty where the line is longer than MAX_LINE.
        Raises QueueUnavailable.
        """
        line = self._store.in_line(MAX_LINE + 1)
        if len(line) > MAX_LINE:
            return {}
        ready_s: dict[str, float] = {}
        places: dict[WorkerType, list[float]] = {}  # of each kind of worker: seconds until it is free
        typical_of = cache(self._history.typical_s)
        running = [it for it in line if it.status == "processing"]
        waiting = [it for it in line if it.status == "pending"]
        turns = running + waiting
        for turn, it in enumerate(turns):
            end_s = self._end_s(it, places.setdefault(provider_of(it.inference_provider).worker_type, []), typical_of)
            if end_s is None:  # then nobody knows of those behind it either
                return {**ready_s, **dict.fromkeys(later.group_id for later in turns[turn:])}
            ready_s[it.group_id] = max(ready_s.get(it.group_id, 0.0), end_s)
        return ready_s

    def _left_s(self, running: _Running, kind: str) -> float | None:
        now_s = self._clock()
        left_s = running.eta.left_s(now_s)
        typical_s = self._history.typical_s(kind)
        if left_s is None and typical_s is not None and (rest_s := running.began_s + typical_s - now_s) > 0:
            return rest_s
        return left_s

    def _end_s(self, it: InLine, free: list[float], typical_of: Callable[[str], float | None]) -> float | None:
        """When one is completed: it goes on, or takes the first of the places that are `free` then."""
        kind = kind_of(it)
        typical_s = typical_of(kind)
        if it.status == "processing":
            with self._lock:
                known = self._running.get(it.id)
            end_s = self._left_s(known, kind) if known else None
            end_s = typical_s if end_s is None else end_s
        elif free and typical_s is not None:
            end_s = heapq.heappop(free) + typical_s
        else:
            end_s = None
        if end_s is not None:
            heapq.heappush(free, end_s)
        return end_s

    def _follow(self, item: Item) -> float | None:
        """Notes how far an item is. Returns the seconds that are left of it, where that is known."""
        now_s = self._clock()
        with self._lock:
            running = self._running.get(item.id)
            if running is not None and running.lease_seq > item.lease_seq:
                return None  # this is told late
            if item.status != "processing":
                self._running.pop(item.id, None)
            elif running is None or running.lease_seq != item.lease_seq:
                running = self._begin(item, now_s)
        if item.status == "completed":
            self._learn(item, running, now_s)
        if item.status != "processing" or running is None:
            return None
        if item.progress:
            running.eta.observe(item.progress.stage, item.progress.fraction, now_s)
        return self._left_s(running, kind_of(item))

    def _begin(self, item: Item, now_s: float) -> _Running:
        since_s = item.updated_at - item.started_at if item.started_at is not None else 0.0
        is_from_the_start = since_s < FROM_THE_START_S
        running = _Running(item.lease_seq, now_s - since_s, is_from_the_start, TaskEta(self._history, kind_of(item)))
        if is_from_the_start:
            running.eta.observe(STARTING, 0.0, running.began_s)
        self._running[item.id] = running
        while len(self._running) > MAX_RUNNING:
            self._running.popitem(last=False)
        return running

    def _learn(self, item: Item, running: _Running | None, now_s: float) -> None:
        if running is not None and running.lease_seq == item.lease_seq and running.is_from_the_start:
            running.eta.complete(now_s)
        elif item.started_at is not None and item.ended_at is not None:
            self._history.add(kind_of(item), {WHOLE: item.ended_at - item.started_at})

    # ------------------------------------------------------------ what listeners are told first

    async def snapshot(self, project_id: str) -> list[Event]:
        """How the tasks of a project are now, the oldest first: what a listener is told before all that changes.

        Of a group, its newest tasks; of the whole queue, those that are ongoing and the newest of all. Nothing of a
        project that there is not. Raises QueueUnavailable.
        """
        return await anyio.to_thread.run_sync(self._snapshot, project_id)

    def _snapshot(self, project_id: str) -> list[Event]:
        if project_id == QUEUE:
            items = self._store.list_items(limit=MAX_NEWEST)
            items += self._store.list_items(status="processing", limit=MAX_ONGOING)
            items += self._store.list_items(status="pending", limit=MAX_ONGOING)
        else:
            items = self._store.list_items(group=project_id, limit=MAX_OF_GROUP)
        # An item may be there twice, and have changed meanwhile: what was read later stays.
        newest = {item.id: item for item in items}
        return [event_of_item(newest[item_id], project_id, self.left_s(newest[item_id])) for item_id in sorted(newest)]


def kind_of(item: Item | InLine) -> str:
    """What a task's time is compared with: tasks of the same provider, and of the same length."""
    provider = item.inference_provider or provider_of(item.inference_provider).worker_type
    return f"{provider} {item.duration_s:g} s"


def event_of_item(item: Item, project_id: str, eta_s: float | None = None) -> Event:
    """How an item is, as an event of a project."""
    about: dict[str, Any] = {"group_id": item.group_id, "photo_id": item.photo_id}
    match item.status:
        case "completed":
            result = {"item_id": item.id, "group_id": item.group_id} | _known(cost_usd=item.cost_usd)
            return CompletionEvent(project_id=project_id, task_name=item.id, result=result)
        case "failed":
            details = about | {"error_code": "failed", "lease": item.lease_seq}
            error = item.error_message or "the task failed"
            return ErrorEvent(project_id=project_id, task_name=item.id, error=error, details=details)
        case "cancelled":
            details = about | {"error_code": "cancelled"}
            return ErrorEvent(project_id=project_id, task_name=item.id, error="the task was cancelled", details=details)
        case "pending":  # what an earlier try said has no meaning any more
            fraction, stage, lease = 0.0, "waiting", item.lease_seq + 1
        case "processing":
            fraction, stage, lease = 0.0, STARTING, item.lease_seq
            if item.progress:
                fraction, stage = item.progress.fraction, item.progress.stage
    metadata = about | {"stage": stage, "status": item.status, "lease": lease}
    metadata |= _known(eta_s=None if eta_s is None else round(eta_s, 1), cancel_requested=item.cancel_requested or None)
    return ProgressEvent(
        project_id=project_id,
        task_name=item.id,
        progress=fraction,
        progress_percent=percent(fraction),
        status=item.status,
        message=stage,
        metadata=metadata,
    )


def _known(**fields: Any) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}
