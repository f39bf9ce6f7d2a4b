"""Taking a lease from a queue, and handing it back."""

import anyio
import structlog

from inference.errors import (
    I2VError,
    QueueUnavailable,
)
from inference.leasing.retry import Policy, repeat
from inference.queues.base import TaskQueue
from inference.task import Lease

log = structlog.get_logger(__name__)

LEASE_LIMIT_S = 30.0
"""How long to wait for the answer to a lease request before giving up on it."""

CLAIM_LIMIT_S = 75.0
"""The same where the queue takes nothing back: a task whose answer is given up is lost, and that answer may hold photos
and videos, which take their time on a slow line."""

RELEASE_LIMIT_S = 6.0
"""How long handing a lease back may take, while a worker is stopping."""

END_LIMIT_S = 20.0
"""The same where the queue takes nothing back, and is told that the task failed: no lease runs out there, so a task
that nobody reported would wait for ever."""


STOPPING = "the worker that had this task was stopped before its video was finished"
"""Why a lease is handed back by a worker that ends."""


async def hand_back(
    queue: TaskQueue, lease: Lease, policy: Policy | None = None, reason: str | None = STOPPING
) -> None:
    """Tries to hand a lease back. If that fails, the lease expires by itself."""
    time_s = RELEASE_LIMIT_S if queue.hands_back else END_LIMIT_S
    with anyio.CancelScope(shield=True), anyio.move_on_after(time_s):
        try:
            await repeat(lambda: queue.release(lease, reason), policy or Policy())
        except I2VError as error:
            log.info("release_failed", item_id=lease.task.item_id, error=str(error))


async def lease_from(queue: TaskQueue, item_id: str | None = None, *, limit_s: float | None = None) -> Lease | None:
    """Asks for a task and waits for the answer even when cancelled. Raises as TaskQueue.lease.

    The request is shielded because an abandoned one may still lease a task, which nobody would then work on.
    """
    limit_s = limit_s or (LEASE_LIMIT_S if queue.hands_back else CLAIM_LIMIT_S)
    with anyio.CancelScope(shield=True), anyio.move_on_after(limit_s):
        return await (queue.lease() if item_id is None else queue.lease(item_id))
    raise QueueUnavailable(f"the queue did not answer within {limit_s:g} s")
