"""A queue in memory: the oracle that says what the right behaviour is, and can be told to misbehave.

`MemoryStore` keeps the rules of `item.py` in the plainest code there is; the SQL store is tested against it.
`MemoryQueue` is one worker's connection to it, with the faults of a network and of the real server.
"""

import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import TypeVar
from uuid import uuid4

import anyio

from inference.errors import (
    CancelRequested,
    ItemMissing,
    LeaseLost,
    NotHolder,
    ObjectExists,
    ObjectMissing,
    QueueUnavailable,
    Refusal,
    StorageUnavailable,
    WrongState,
)
from inference.media import photo
from inference.progress import Progress
from inference.queues.item import CRASHED, MAX_CRASHES, MAX_FAILURES, RELEASE_S, Item, ItemProgress, Lane, lane
from inference.task import Lease, Video

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Event:
    """One write to the store, accepted or not: what a test reads to see that promises were kept."""

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
        self.items: dict[str, Item] = {}  # in the order they were added, which is the order they are handed out
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

    def candidate(self, worker_type: Lane | None = None) -> Item | None:
        """The item that would be leased next."""
        self._sweep()
        for item in self.items.values():
            waits = item.status == "pending" or self._ran_out(item)
            kind = worker_type is None or lane(item.inference_provider) == worker_type
            if waits and item.retry_count < MAX_FAILURES and kind:
                return item
        return None

    def lease(self, worker_id: str, lease_s: float, worker_type: Lane | None = None) -> Item | None:
        """Hands the oldest waiting item to `worker_id`, or None."""
        item = self.candidate(worker_type)
        return self.assign(item, worker_id, lease_s) if item else None

    def assign(self, item: Item, worker_id: str, lease_s: float) -> Item:
        """The update half of a lease. Called late, it overtakes whoever was given the item in between."""
        item = self._find(item.id)
        return self._write(
            "lease",
            item,
            worker_id,
            status="processing",
            worker_id=worker_id,
            leased_until=self._clock() + lease_s,
            lease_seq=item.lease_seq + 1,
            crash_count=item.crash_count + (1 if self._ran_out(item) else 0),
            progress=None,
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
        return self._write("heartbeat", item, worker_id, leased_until=until, progress=progress or item.progress)

    def complete(
        self,
        item_id: str,
        worker_id: str,
        video_storage_path: str,
        external_ids: dict[str, str] | None = None,
        lease_seq: int | None = None,
    ) -> Item:
        """The holder's video is in storage. Raises ItemMissing, NotHolder (also for an item that was cancelled)."""
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
        )

    def fail(self, item_id: str, worker_id: str, message: str, lease_seq: int | None = None) -> Item:
        """The holder gives up. Raises ItemMissing, NotHolder (also for an item that was cancelled)."""
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
        """A person wants no video any more. Asking twice is asking once. Raises ItemMissing, WrongState."""
        item = self.get(item_id)
        if item.status == "cancelled":
            return item
        if item.status == "pending" or self._ran_out(item):
            return self._write("cancel", item, None, status="cancelled", leased_until=None, cancel_requested=True)
        if item.status == "processing":
            return self._write("cancel", item, None, cancel_requested=True)
        raise WrongState(f"the task is {item.status}: there is nothing to cancel")

    def retry(self, item_id: str) -> Item:
        """A person wants another try at a failed or cancelled item. Raises ItemMissing, WrongState."""
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
            cancel_requested=False,
            progress=None,
            error_message=None,
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

    def _ran_out(self, item: Item) -> bool:
        return item.status == "processing" and item.leased_until is not None and item.leased_until <= self._clock()

    def _sweep(self) -> None:
        """Ends the items whose last lease ran out and that nobody may lease again."""
        for item in list(self.items.values()):
            if not self._ran_out(item):
                continue
            if item.cancel_requested:
                self._write("sweep", item, None, status="cancelled", leased_until=None)
            elif item.crash_count + 1 >= MAX_CRASHES:
                self._write(
                    "sweep",
                    item,
                    None,
                    status="failed",
                    worker_id=None,
                    leased_until=None,
                    crash_count=item.crash_count + 1,
                    error_message=CRASHED,
                )

    def _write(self, verb: str, item: Item, by: str | None, *, accepted: bool = True, **changes: object) -> Item:
        now = self._clock()
        written = item.model_copy(update=changes | {"updated_at": now})
        self.items[item.id] = written
        self.log.append(Event(now, verb, item.id, by, accepted, written.status))
        return written


@dataclass(frozen=True, slots=True)
class Faults:
    """How badly a connection behaves: probabilities per call, and seconds."""

    lose_request: float = 0.0  # never arrives; the caller waits `timeout_s` for nothing
    lose_reply: float = 0.0  # carried out, but the caller does not learn it
    answer_500: float = 0.0  # refused without being carried out
    double_lease: float = 0.0  # select and update as two steps with a pause between, as the real server does
    delay_s: float = 0.0  # up to this long each way
    stall: float = 0.0  # one way takes `timeout_s` longer
    timeout_s: float = 10.0
    double_lease_pause_s: float = 2.0  # up to this long between select and update


@dataclass(slots=True)
class MemoryQueue:
    """One worker's connection to a MemoryStore: a TaskQueue."""

    store: MemoryStore
    worker_id: str = "memory"
    lease_s: float = 600
    extension_s: float = 300
    worker_type: Lane | None = None
    faults: Faults = field(default_factory=Faults)
    random: Random = field(default_factory=lambda: Random(0))

    async def lease(self) -> Lease | None:
        """See TaskQueue."""
        # Not from self.random: two queues with the same seed must not make the same fencing token.
        worker_id = f"{self.worker_id}.{secrets.token_hex(6)}"
        if self._happens(self.faults.double_lease):
            item = await self._overtaking_lease(worker_id)
        else:
            item = await self._call(lambda: self.store.lease(worker_id, self.lease_s, self.worker_type))
        return Lease(task=item.to_task(), worker_id=worker_id, length_s=self.extension_s) if item else None

    async def heartbeat(self, lease: Lease, progress: Progress | None = None) -> None:
        """See TaskQueue."""
        said = ItemProgress(stage=progress.stage, fraction=progress.fraction) if progress else None
        item_id, worker_id = lease.task.item_id, lease.worker_id
        item = await self._call(lambda: self.store.heartbeat(item_id, worker_id, lease.length_s, said))
        if item.cancel_requested:
            raise CancelRequested("the task was cancelled")

    async def fetch_photo(self, lease: Lease, folder: Path) -> Path:
        """See TaskQueue."""
        path = lease.task.photo_storage_path
        body = await self._call(lambda: self.store.objects.get(path))
        if body is None:
            raise ObjectMissing(f"the photo {path} is not in storage")
        target = folder / Path(path).name
        target.write_bytes(body)
        photo.verify(target)
        return target

    async def deliver(self, lease: Lease, video: Video) -> str:
        """See TaskQueue."""
        body = video.path.read_bytes()

        def put() -> str:
            path = f"videos/{lease.task.item_id}.mp4"
            while path in self.store.objects:
                path = f"videos/{lease.task.item_id}.{lease.token}-{secrets.token_hex(2)}.mp4"
            self.store.put(path, body)
            return path

        try:
            return await self._call(put)
        except QueueUnavailable as error:
            raise StorageUnavailable(str(error)) from None

    async def complete(self, lease: Lease, storage_path: str, video: Video) -> None:
        """See TaskQueue."""
        ids = dict(video.external_ids)
        await self._call(lambda: self.store.complete(lease.task.item_id, lease.worker_id, storage_path, ids))

    async def fail(self, lease: Lease, message: str) -> None:
        """See TaskQueue."""
        await self._call(lambda: self.store.fail(lease.task.item_id, lease.worker_id, message))

    async def release(self, lease: Lease) -> None:
        """See TaskQueue."""
        await self._call(lambda: self.store.heartbeat(lease.task.item_id, lease.worker_id, RELEASE_S))

    async def _overtaking_lease(self, worker_id: str) -> Item | None:
        chosen = await self._call(lambda: self.store.candidate(self.worker_type))
        if chosen is None:
            return None
        await anyio.sleep(self.random.uniform(0, self.faults.double_lease_pause_s))
        # The real server would reopen an ended item as well; no worker could keep a promise against that.
        ended = self.store.get(chosen.id).status not in ("pending", "processing")
        return None if ended else self.store.assign(chosen, worker_id, self.lease_s)

    async def _call(self, operation: Callable[[], T]) -> T:
        await self._travel()
        if self._happens(self.faults.lose_request):
            await anyio.sleep(self.faults.timeout_s)
            raise QueueUnavailable("the request was lost")
        if self._happens(self.faults.answer_500):
            raise QueueUnavailable("the queue answered 500")
        try:
            result = operation()
        except Refusal as refusal:
            await self._travel()
            raise LeaseLost(str(refusal)) from None
        await self._travel()
        if self._happens(self.faults.lose_reply):
            raise QueueUnavailable("the reply was lost")
        return result

    async def _travel(self) -> None:
        stalled = self.faults.timeout_s if self._happens(self.faults.stall) else 0.0
        await anyio.sleep(self.random.uniform(0, self.faults.delay_s) + stalled)

    def _happens(self, probability: float) -> bool:
        return probability > 0 and self.random.random() < probability
