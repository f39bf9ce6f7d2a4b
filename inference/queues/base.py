"""What every queue of tasks can do, whatever its wire looks like."""

from pathlib import Path
from typing import Protocol

from inference.progress.tracker import Progress
from inference.task import Lease, Video


class TaskQueue(Protocol):
    """A place that hands out tasks and takes back one terminal outcome for each.

    Every method is one try: it raises QueueUnavailable or StorageUnavailable when repeating may help, and the
    runner decides whether and when to repeat. What belongs to one dialect alone (presigning, a 404 that needs
    confirming, a duplicate upload) stays inside its adapter.

    Raises, from any method: QueueUnavailable, its QueueFailed where the queue itself says that it could not,
    QueueAuthError, QueueRefused.
    """

    async def check(self) -> None:
        """Proves that the queue is there and takes the key, leasing nothing."""
        ...

    async def check_storage(self) -> str | None:
        """The host that photos and videos are at, which is not visited; None where that shows with the first task.

        Raises AddressRefused where this worker's settings do not let it go there, StorageUnavailable where the host has
        no address.
        """
        ...

    async def lease(self, item_id: str | None = None) -> Lease | None:
        """Takes the next task under a new worker_id, or None where there is nothing to do.

        With an `item_id` takes that task out of its turn, and no other; None where it cannot be leased now: somebody
        holds it, it ended, or it waits for another kind of worker. Raises ItemMissing for a task that the queue does
        not have, QueueRefused where the queue hands out only the next one.

        Raises InvalidTask when the queue handed out something malformed; it was reported failed where it could be.
        """
        ...

    async def backlog(self) -> int | None:
        """How many tasks wait that `lease` would hand out now, one after the other; None where the queue cannot tell.

        By the time it is told it may have changed: good for deciding how many workers to start, and for no more.
        """
        ...

    async def heartbeat(self, lease: Lease, progress: Progress | None = None) -> None:
        """Renews the lease for `lease.length_s` from now.

        Raises LeaseLost when it is certainly no longer ours, CancelRequested when a person cancelled the task
        (the lease was renewed all the same).
        """
        ...

    async def fetch_photo(self, lease: Lease, folder: Path) -> Path:
        """Puts the task's photo into `folder` and returns its path. It is known to decode.

        Raises StorageError, InvalidPhoto, MachineFault, LeaseLost, CancelRequested.
        """
        ...

    async def deliver(self, lease: Lease, video: Video) -> str:
        """Stores the video where the queue wants it, never over something that is there; returns its storage path.

        Raises StorageError, LeaseLost, CancelRequested.
        """
        ...

    async def complete(self, lease: Lease, storage_path: str, video: Video) -> None:
        """Reports the delivered video. Doing it twice is doing it once. Raises LeaseLost, CancelRequested."""
        ...

    async def fail(self, lease: Lease, message: str) -> None:
        """Reports that no video will come of this lease.

        Not safe to repeat blindly: after QueueUnavailable ask with `heartbeat`; LeaseLost means it had landed.
        Raises LeaseLost, CancelRequested.
        """
        ...

    async def release(self, lease: Lease) -> None:
        """Hands the task back so that another worker can take it at once; no failure is counted.

        A task whose cancellation was requested ends cancelled instead. Raises LeaseLost.
        """
        ...
