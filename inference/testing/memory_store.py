"""A queue in memory, as simple as possible: the reference model of the rules in `queues/item.py`.

The SQL store is tested against it, and simulations run on it.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from inference.errors import ItemMissing, NotHolder, ObjectExists, WrongState
from inference.providers import WorkerType, provider_of
from inference.queues.item import (
    CRASHED,
    DONE,
    LOST,
    MAX_CRASHES,
    MAX_FAILURES,
    MAX_LOST,
    RELEASE_S,
    Item,
    ItemProgress,
)


@dataclass(frozen=True, slots=True)
class Event:
    """One write to the store, accepted or not, for tests to check."""

    at_s: float
    verb: str
    item_id: str
    worker_id: str | None
    accepted: bool
    status: str  # of the item afterwards


class MemoryStore:
    """The rows, the objects and a log of every write. One thread, one event loop."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, *, counts_repeated_failures: bool = False) -> None:
        self._clock = clock
        self._counts_repeated_failures = counts_repeated_failures  # as the real Life-is-Short server does
        self.items: dict[str, Item] = {}  # in the order they were added, in which they are leased
        self.objects: dict[str, bytes] = {}
        self.log: list[Event] = []

    def add(self, photo_bytes: bytes, prompt: str = "", **fields: object) -> Item:
        """Stores a photo and adds an item that waits for a worker; `fields` are any other fields of Item."""
        now = self._clock()
        ids = {name: str(fields.pop(name, None) or uuid4()) for name in ("id", "group_id", "photo_id")}
        path = f"{ids['group_id']}/{ids['photo_id']}_original.jpg"
        item = Item.model_validate(
            ids | {"prompt": prompt, "photo_storage_path": path, "created_at": now, "updated_at": now} | fields
        )
        self.items[item.id] = item
        self.objects[path] = photo_bytes
        return item

    def get(self, item_id: str) -> Item:
        """The item as it is now. Raises ItemMissing."""
        self._sweep()
        return self._find(item_id)

    def candidate(self, worker_type: WorkerType | None = None, item_id: str | None = None) -> Item | None:
        """The item that would be leased next, or the given one if it could be. Raises ItemMissing."""
        self._sweep()
        line = self.items.values() if item_id is None else [self._find(item_id)]
        return next((item for item in line if self._waits(item, worker_type)), None)

    def backlog(self, worker_type: WorkerType | None = None) -> int:
        """How many items could be leased now."""
        self._sweep()
        return sum(self._waits(item, worker_type) for item in self.items.values())

    def lease(
        self, worker_id: str, lease_s: float, worker_type: WorkerType | None = None, item_id: str | None = None
    ) -> Item | None:
        """Hands the oldest waiting item, or the given one if it waits, to `worker_id`. Raises ItemMissing."""
        item = self.candidate(worker_type, item_id)
        return self.assign(item, worker_id, lease_s) if item else None

    def assign(self, item: Item, worker_id: str, lease_s: float) -> Item:
        """The update step of a lease. Called late, it takes the item from a worker that leased it in between."""
        item = self._find(item.id)
        return self._write(
            "lease",
            item,
            worker_id,
            status="processing",
            worker_id=worker_id,
            leased_until=self._clock() + lease_s,
            lease_seq=item.lease_seq + 1,
            renewed=False,
            progress=None,
            started_at=self._clock(),
            ended_at=None,
            cost_usd=None,
            **(self._counted(item) if self._ran_out(item) else {}),
        )

    def heartbeat(
        self,
        item_id: str,
        worker_id: str,
        extend_s: float,
        progress: ItemProgress | None = None,
        lease_seq: int | None = None,
    ) -> Item:
        """Renews a lease; a renewal of RELEASE_S or less gives it back. Raises ItemMissing, NotHolder."""
        item = self._held("heartbeat", item_id, worker_id, lease_seq)
        if extend_s <= RELEASE_S:
            status = "cancelled" if item.cancel_requested else "pending"
            return self._write("release", item, worker_id, status=status, worker_id=None, leased_until=None)
        until = self._clock() + extend_s
        said = progress.after(item.progress) if progress else item.progress
        return self._write("heartbeat", item, worker_id, leased_until=until, renewed=True, lost_count=0, progress=said)

    def complete(
        self,
        item_id: str,
        worker_id: str,
        video_storage_path: str,
        external_ids: dict[str, str] | None = None,
        lease_seq: int | None = None,
        *,
        cost_usd: float | None = None,
    ) -> Item:
        """Ends an item whose video is stored. Raises ItemMissing, NotHolder (also for an item that was cancelled)."""
        item = self._find(item_id)
        repeated = (item.status, item.worker_id, item.video_storage_path)
        if repeated == ("completed", worker_id, video_storage_path):
            return item
        item = self._held("complete", item_id, worker_id, lease_seq)
        if item.cancel_requested:
            self._write("complete", item, worker_id, accepted=False, status="cancelled", leased_until=None)
            raise NotHolder("the task was cancelled")
        return self._write(
            "complete",
            item,
            worker_id,
            status="completed",
            leased_until=None,
            video_storage_path=video_storage_path,
            external_ids=external_ids or {},
            error_message=None,
            progress=DONE,
            cost_usd=cost_usd,
        )

    def fail(self, item_id: str, worker_id: str, message: str, lease_seq: int | None = None) -> Item:
        """Records the holder's failure. Raises ItemMissing, NotHolder (also for an item that was cancelled)."""
        item = self._find(item_id)
        if (item.status, item.worker_id) == ("failed", worker_id):
            if self._counts_repeated_failures:
                return self._write("fail", item, worker_id, retry_count=item.retry_count + 1)
            return item
        item = self._held("fail", item_id, worker_id, lease_seq)
        if item.cancel_requested:
            self._write("fail", item, worker_id, accepted=False, status="cancelled", leased_until=None)
            raise NotHolder("the task was cancelled")
        failures = item.retry_count + 1
        return self._write(
            "fail", item, worker_id, status="failed", leased_until=None, retry_count=failures, error_message=message
        )

    def cancel(self, item_id: str) -> Item:
        """Cancels an item, or asks its holder to stop. Idempotent. Raises ItemMissing, WrongState."""
        item = self.get(item_id)
        if item.status == "cancelled":
            return item
        if item.status == "pending" or self._ran_out(item):
            return self._write("cancel", item, None, status="cancelled", cancel_requested=True)
        if item.status == "processing":
            return self._write("cancel", item, None, cancel_requested=True)
        raise WrongState(f"the task is {item.status}: there is nothing to cancel")

    def retry(self, item_id: str) -> Item:
        """Makes a failed or cancelled item wait again. Raises ItemMissing, WrongState."""
        item = self.get(item_id)
        if item.status not in ("failed", "cancelled"):
            raise WrongState(f"the task is {item.status}: only a failed or cancelled one can be retried")
        return self._write(
            "retry",
            item,
            None,
            status="pending",
            worker_id=None,
            leased_until=None,
            retry_count=0,
            crash_count=0,
            lost_count=0,
            cancel_requested=False,
            progress=None,
            error_message=None,
            started_at=None,
            ended_at=None,
            cost_usd=None,
        )

    def put(self, path: str, body: bytes) -> None:
        """Stores an object. Raises ObjectExists."""
        if path in self.objects:
            raise ObjectExists(f"{path} exists already")
        self.objects[path] = body

    def _find(self, item_id: str) -> Item:
        try:
            return self.items[item_id]
        except KeyError:
            raise ItemMissing(f"no task {item_id}") from None

    def _held(self, verb: str, item_id: str, worker_id: str, lease_seq: int | None) -> Item:
        item = self._find(item_id)
        holds = all(
            (
                item.worker_id == worker_id,  # fence
                item.status == "processing",  # fence
                lease_seq in (None, item.lease_seq),  # fence
            )
        )
        if not holds:
            self.log.append(Event(self._clock(), verb, item_id, worker_id, accepted=False, status=item.status))
            raise NotHolder(f"the task is {item.status} and not held by {worker_id}")
        return item

    def _waits(self, item: Item, worker_type: WorkerType | None) -> bool:
        """Whether the item may be leased, after a sweep."""
        waits = item.status == "pending" or self._ran_out(item)
        is_asked_for = worker_type in (None, provider_of(item.inference_provider).worker_type)
        return waits and item.retry_count < MAX_FAILURES and is_asked_for

    def _ran_out(self, item: Item) -> bool:
        return item.status == "processing" and item.leased_until is not None and item.leased_until <= self._clock()

    def _sweep(self) -> None:
        """Ends items whose last permitted lease has expired."""
        for item in list(self.items.values()):
            if not self._ran_out(item):
                continue
            if item.cancel_requested:
                self._write("sweep", item, None, status="cancelled", leased_until=None)
                continue
            counted = self._counted(item)
            if counted.get("crash_count") == MAX_CRASHES or counted.get("lost_count") == MAX_LOST:
                counted["error_message"] = CRASHED if item.renewed else LOST
                self._write("sweep", item, None, status="failed", worker_id=None, leased_until=None, **counted)

    def _counted(self, item: Item) -> dict[str, Any]:
        """The counters that an expired lease increments."""
        return {"crash_count": item.crash_count + 1} if item.renewed else {"lost_count": item.lost_count + 1}

    def _write(self, verb: str, item: Item, by: str | None, *, accepted: bool = True, **changes: object) -> Item:
        now = self._clock()
        if changes.get("status") in ("completed", "failed", "cancelled"):
            changes["ended_at"] = now
        written = item.model_copy(update=changes | {"updated_at": now})
        self.items[item.id] = written
        self.log.append(Event(now, verb, item.id, by, accepted, written.status))
        return written
