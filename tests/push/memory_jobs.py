"""A store of jobs in memory: what a push application asks for, over the rules of MemoryStore."""

import secrets
from dataclasses import dataclass, field

from inference.push.jobs import Standing, Swept
from inference.task import Lease
from inference.testing.memory_queue import MemoryQueue
from tests.simulation.leases import PHOTO

WORDS = {"pending": "queued", "processing": "processing", "cancelled": "canceled"}


@dataclass(slots=True)
class MemoryJobs(MemoryQueue):
    """One worker's connection to a MemoryStore: a JobQueue."""

    found: list[Swept] = field(default_factory=list)  # what the next sweeps find
    sweeps: int = 0

    async def acquire(self, job_id):
        """See JobQueue."""
        worker_id = f"{self.worker_id}.{secrets.token_hex(6)}"
        item = await self._call(lambda: self.store.lease(worker_id, self.lease_s, None, job_id))
        if item is None:
            return await self.standing(job_id)
        return Lease(task=item.to_task(), worker_id=worker_id, length_s=self.extension_s)

    async def insert(self, given, job_id):
        """See JobQueue."""
        if job_id not in self.store.items:
            self.store.add(PHOTO, id=job_id, prompt=given.get("prompt", ""))
        return job_id

    async def standing(self, job_id):
        """See JobQueue."""
        item = await self._call(lambda: self.store.get(job_id))
        return Standing(
            job_status=WORDS.get(item.status, item.status),
            attempt_id=item.worker_id and item.worker_id.rpartition(".")[2],
            has_ended=item.status in ("completed", "failed", "cancelled"),
            is_held=item.status == "processing" and item.leased_until > self.store._clock(),
        )

    async def sweep(self):
        """See JobQueue."""
        self.sweeps += 1
        return self.found.pop(0) if self.found else Swept()
