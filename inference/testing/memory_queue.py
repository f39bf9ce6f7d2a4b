"""A TaskQueue in memory, for tests: one worker's connection to a MemoryStore, with faults that can be injected.

The faults are those of a network, and of the real Life-is-Short server, which may lease a task twice.
"""

import functools
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import TypeVar

import anyio

from inference.errors import (
    CancelRequested,
    I2VError,
    LeaseLost,
    ObjectMissing,
    QueueFailed,
    QueueUnavailable,
    Refusal,
    StorageUnavailable,
)
from inference.media import photo
from inference.progress.stages import Progress
from inference.providers import WorkerType
from inference.queues.base import SegmentStore
from inference.queues.item import RELEASE_S, Item, ItemProgress
from inference.task import Lease, Video, VideoFormat
from inference.testing.memory_store import MemoryStore

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Faults:
    """How badly a connection behaves: probabilities per call, and seconds."""

    lose_request: float = 0.0  # the request never arrives; the caller waits `timeout_s` for nothing
    lose_reply: float = 0.0  # carried out, but the answer is lost
    answer_500: float = 0.0  # refused without being carried out
    double_lease: float = 0.0  # select and update as two steps with a pause between, as the real server does
    delay_s: float = 0.0  # up to this long each way
    stall: float = 0.0  # one direction takes `timeout_s` longer
    timeout_s: float = 10.0
    double_lease_pause_s: float = 2.0  # up to this long between select and update


@dataclass(slots=True)
class MemorySegments:
    """A SegmentStore whose next calls raise what is scripted."""

    segments: dict[str, bytes] = field(default_factory=dict)
    errors: list[I2VError] = field(default_factory=list)

    async def find(self, key: str, target: Path) -> bool:
        """See SegmentStore."""
        self._raise_scripted()
        if key not in self.segments:
            return False
        target.write_bytes(self.segments[key])  # noqa: ASYNC240 - no threads: they would not wait for a virtual clock
        return True

    async def keep(self, key: str, path: Path) -> None:
        """See SegmentStore."""
        self._raise_scripted()
        self.segments[key] = path.read_bytes()  # noqa: ASYNC240 - as above

    def _raise_scripted(self) -> None:
        if self.errors:
            raise self.errors.pop(0)


@dataclass(slots=True)
class MemoryQueue:
    """One worker's connection to a MemoryStore: a TaskQueue."""

    store: MemoryStore
    worker_id: str = "memory"
    lease_s: float = 600
    extension_s: float = 300
    worker_type: WorkerType | None = None
    faults: Faults = field(default_factory=Faults)
    random: Random = field(default_factory=lambda: Random(0))
    hands_back: bool = True
    video_formats: tuple[VideoFormat, ...] = ("mp4",)
    kept: SegmentStore | None = None

    async def check(self) -> str | None:
        """See TaskQueue."""
        return await self._call(lambda: None)

    async def check_storage(self) -> str | None:
        """See TaskQueue: photos and videos are in memory, too."""
        return await self._call(lambda: None)

    async def lease(self, item_id: str | None = None) -> Lease | None:
        """See TaskQueue."""
        # Not from self.random: two queues with the same seed must not make the same fencing token.
        worker_id = f"{self.worker_id}.{secrets.token_hex(6)}"
        if self._happens(self.faults.double_lease):
            item = await self._overtaking_lease(worker_id, item_id)
        else:
            item = await self._call(lambda: self.store.lease(worker_id, self.lease_s, self.worker_type, item_id))
        return Lease(task=item.to_task(), worker_id=worker_id, length_s=self.extension_s) if item else None

    async def backlog(self) -> int | None:
        """See TaskQueue."""
        return await self._call(lambda: self.store.backlog(self.worker_type))

    async def heartbeat(self, lease: Lease, progress: Progress | None = None) -> None:
        """See TaskQueue."""
        said = ItemProgress(stage=progress.stage, fraction=progress.fraction) if progress else None
        item_id, worker_id = lease.task.item_id, lease.worker_id
        item = await self._write(lambda: self.store.heartbeat(item_id, worker_id, lease.length_s, said))
        if item.cancel_requested:
            raise CancelRequested("the task was cancelled")

    async def fetch_inputs(self, lease: Lease, folder: Path) -> dict[str, Path]:
        """See TaskQueue."""
        found = {}
        for number, (name, given) in enumerate(lease.task.inputs.items(), 1):
            body = await self._call(functools.partial(self.store.objects.get, given.source))
            if body is None:
                raise ObjectMissing(f"the photo {given.source} is not in storage")
            found[name] = folder / f"{number}-{Path(given.source).name}"
            found[name].write_bytes(body)
            photo.verify(found[name])
        return found

    def segments(self, lease: Lease) -> SegmentStore | None:
        """See TaskQueue: one store for all tasks."""
        del lease
        return self.kept

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
        except QueueFailed:
            raise
        except QueueUnavailable as error:
            raise StorageUnavailable(str(error)) from None

    async def complete(self, lease: Lease, storage_path: str, video: Video) -> None:
        """See TaskQueue."""
        ids, cost_usd = dict(video.external_ids), video.cost_usd
        item_id, worker_id = lease.task.item_id, lease.worker_id
        await self._write(lambda: self.store.complete(item_id, worker_id, storage_path, ids, cost_usd=cost_usd))

    async def fail(self, lease: Lease, message: str) -> None:
        """See TaskQueue."""
        await self._write(lambda: self.store.fail(lease.task.item_id, lease.worker_id, message))

    async def release(self, lease: Lease, reason: str | None = None) -> None:
        """See TaskQueue."""
        del reason  # the task goes on elsewhere
        await self._write(lambda: self.store.heartbeat(lease.task.item_id, lease.worker_id, RELEASE_S))

    async def _overtaking_lease(self, worker_id: str, item_id: str | None) -> Item | None:
        chosen = await self._call(lambda: self.store.candidate(self.worker_type, item_id))
        if chosen is None:
            return None
        await anyio.sleep(self.random.uniform(0, self.faults.double_lease_pause_s))
        # The real server would reopen an ended item, too; no worker could guarantee anything against that.
        ended = self.store.get(chosen.id).status not in ("pending", "processing")
        return None if ended else self.store.assign(chosen, worker_id, self.lease_s)

    async def _write(self, operation: Callable[[], T]) -> T:
        """A holder's call: any refusal of the store means that the lease is lost."""
        try:
            return await self._call(operation)
        except Refusal as refusal:
            raise LeaseLost(str(refusal)) from None

    async def _call(self, operation: Callable[[], T]) -> T:
        await self._travel()
        if self._happens(self.faults.lose_request):
            await anyio.sleep(self.faults.timeout_s)
            raise QueueUnavailable("the request was lost")
        if self._happens(self.faults.answer_500):
            raise QueueFailed("the queue answered 500")
        try:
            result = operation()
        except Refusal:
            await self._travel()
            raise
        await self._travel()
        if self._happens(self.faults.lose_reply):
            raise QueueUnavailable("the reply was lost")
        return result

    async def _travel(self) -> None:
        stalled = self.faults.timeout_s if self._happens(self.faults.stall) else 0.0
        await anyio.sleep(self.random.uniform(0, self.faults.delay_s) + stalled)

    def _happens(self, probability: float) -> bool:
        return probability > 0 and self.random.random() < probability
