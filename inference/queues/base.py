"""The interface of every task queue, whatever protocol it speaks."""

from pathlib import Path
from typing import Protocol

from inference.progress.stages import Progress
from inference.task import Lease, Video, VideoFormat


class SegmentStore(Protocol):
    """Keeps finished segments of a film, each under a digest of what was asked for, until its film is delivered.

    Both methods are one attempt, as those of TaskQueue are, and raise StorageError, MachineFault.
    """

    async def find(self, key: str, target: Path) -> bool:
        """Puts the segment kept under `key` at `target`; False where there is none."""
        ...

    async def keep(self, key: str, path: Path) -> None:
        """Keeps the segment at `path` under `key`, whole or not at all; one that is there already may be replaced."""
        ...


class TaskQueue(Protocol):
    """Hands out tasks and accepts one final outcome for each.

    Every method is one attempt: it raises QueueUnavailable or StorageUnavailable where a retry may help, and the runner
    decides whether and when to retry. Details of one queue's protocol (presigning, a 404 that needs confirming, a
    duplicate upload) stay inside its adapter.

    Raises, from any method: QueueUnavailable, its subclass QueueFailed where the queue itself answered that it failed,
    QueueAuthError, QueueRefused.

    `hands_back`: whether a task can be given to another worker. Where it cannot, a task that was taken ends here:
    whatever would hand it back reports it as failed instead.
    `video_formats`: what the queue takes as a video; the first is what anything else is turned into.
    """

    hands_back: bool
    video_formats: tuple[VideoFormat, ...]

    async def check(self) -> str | None:
        """Proves that the queue answers and accepts the key, without leasing a task.

        Returns what stays open, for a queue where not all of this can be known so; None where nothing does.
        """
        ...

    async def check_storage(self) -> str | None:
        """The host that stores photos and videos, found without connecting to it; None where only a task names it.

        Raises AddressRefused where this worker's settings do not allow the host, StorageUnavailable where its name
        cannot be resolved.
        """
        ...

    async def lease(self, item_id: str | None = None) -> Lease | None:
        """Leases the next task under a new worker_id; None where no task is waiting.

        With an `item_id`, leases that task out of turn, and no other; None where it cannot be leased now: another
        worker holds it, it has ended, or it waits for another kind of worker. Raises ItemMissing for a task that the
        queue does not have, QueueRefused where the queue can only hand out the next one.

        Raises InvalidTask for a malformed task; it was reported failed where it has a usable id.
        """
        ...

    async def backlog(self) -> int | None:
        """How many tasks `lease` could hand out now; None where the queue cannot tell.

        The number may be outdated when it arrives. Use it only to decide how many workers to start.
        """
        ...

    async def heartbeat(self, lease: Lease, progress: Progress | None = None) -> None:
        """Renews the lease for `lease.length_s` from now.

        Raises LeaseLost when the lease is certainly no longer ours, CancelRequested when a person cancelled the task
        (the lease was renewed all the same).
        """
        ...

    async def fetch_inputs(self, lease: Lease, folder: Path) -> dict[str, Path]:
        """Puts every input of the task into `folder`; returns their paths by name. Each was verified by its kind.

        Raises StorageError, MediaError, MachineFault, LeaseLost, CancelRequested.
        """
        ...

    def segments(self, lease: Lease) -> SegmentStore | None:
        """Where finished segments of the task's film are kept for its next holder; None where this queue keeps none."""
        ...

    async def deliver(self, lease: Lease, video: Video) -> str:
        """Stores the video where the queue wants it, never over an existing object; returns its storage path.

        Raises StorageError, LeaseLost, CancelRequested.
        """
        ...

    async def complete(self, lease: Lease, storage_path: str, video: Video) -> None:
        """Reports the delivered video. Idempotent. Raises LeaseLost, CancelRequested."""
        ...

    async def fail(self, lease: Lease, message: str) -> None:
        """Reports that this lease has failed.

        Not idempotent: after QueueUnavailable, call `heartbeat` first; LeaseLost then means that it was counted.
        Raises LeaseLost, CancelRequested.
        """
        ...

    async def release(self, lease: Lease, reason: str | None = None) -> None:
        """Hands the task back, so that another worker can lease it at once; no failure is counted.

        A task whose cancellation was requested ends cancelled instead. A queue that takes nothing back reports the task
        failed, with `reason` for people. Raises LeaseLost.
        """
        ...
