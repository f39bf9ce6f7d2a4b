"""What a push application asks of a store of jobs, beside what any queue does."""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from inference.queues.base import TaskQueue
from inference.task import Lease, Value


class Standing(Value):
    """Where a job stands, as its store sees it now."""

    job_status: str  # the store's word: queued, processing, completed, failed, canceled
    attempt_id: str | None = None  # of the attempt that holds or ended it; None where there was none
    has_ended: bool = False  # nothing will be done about it any more
    is_held: bool = False  # an attempt has it whose last beat is fresh


class Swept(Value):
    """What a sweep found. Ids of jobs; each list is bounded by the store."""

    requeued: tuple[str, ...] = ()  # their holder was dead, so they wait again
    failed: tuple[str, ...] = ()  # their holders died too often
    waiting: tuple[str, ...] = ()  # have waited for longer than a delivery takes: whoever was to ask for them has not


@runtime_checkable
class JobQueue(TaskQueue, Protocol):
    """A queue whose jobs can be asked for by id. Raises as TaskQueue, from any method."""

    async def acquire(self, job_id: str) -> Lease | Standing:
        """Takes a job under a new attempt id, or says why it cannot be taken: it has ended, or is held.

        Raises ItemMissing for an unknown job; InvalidTask for a malformed one, which was reported failed.
        """
        ...

    async def insert(self, given: dict[str, Any], job_id: str) -> str:
        """Adds a job with this input, unless one of that id is there; returns its id. Raises QueueRefused."""
        ...

    async def migrate(self) -> Sequence[str]:
        """Makes what is missing of the table; says what was made, a line each. Raises SettingsError."""
        ...

    async def standing(self, job_id: str) -> Standing:
        """Where a job stands. Raises ItemMissing."""
        ...

    async def sweep(self) -> Swept:
        """Takes jobs from dead holders, and lists those that somebody has to ask for again."""
        ...


def attempt_of(lease: Lease) -> str:
    """The attempt id of a lease, which is what fences its writes."""
    return lease.worker_id
