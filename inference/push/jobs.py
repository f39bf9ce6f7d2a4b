"""What a push application asks of a store of jobs, beside what any queue does."""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from inference.queues.base import TaskQueue
from inference.queues.video_jobs.job import Standing, Swept
from inference.task import Lease

__all__ = ["JobQueue", "Standing", "Swept", "attempt_of"]


@runtime_checkable
class JobQueue(TaskQueue, Protocol):
    """A queue whose jobs can be asked for by id. Raises as TaskQueue, from any method."""

    async def acquire(self, job_id: str) -> Lease | Standing:
        """Takes a job under a new attempt id, or says why it cannot be taken: it has ended, or is held.

        Raises ItemMissing for an unknown job; InvalidTask for a malformed one, which was reported failed.
        """
        ...

    async def insert(self, given: Mapping[str, Any], job_id: str) -> str:
        """Adds a job with this input, unless one of that id is there; returns its id. Raises InvalidTask."""
        ...

    async def standing(self, job_id: str) -> Standing:
        """Where a job stands. Raises ItemMissing."""
        ...

    async def sweep(self) -> Swept:
        """Takes jobs from dead holders, and lists those that somebody has to ask for again."""
        ...


def attempt_of(lease: Lease) -> str:
    """The attempt id of a lease, which is what fences its writes."""
    return lease.token
