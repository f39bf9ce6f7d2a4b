"""The net under a queue that is pushed: jobs that nobody was called for, and jobs whose holder is dead.

Redelivery alone saves neither. A caller stops after some attempts, mostly long before a dead holder counts as one; and
whoever adds a job may be killed before it has called anybody.
"""

from collections.abc import Awaitable, Callable
from typing import NamedTuple

import anyio
import anyio.to_thread
import structlog

from inference.errors import I2VError
from inference.queues.video_jobs.store import Jobs, Undispatched

log = structlog.get_logger(__name__)

UNDISPATCHED_S = 600.0
"""A job that waits for so long is called for again. Within it, whoever added it calls, and a caller that was asked to
come again comes again (Cloud Tasks: first after seconds, at the latest after an hour)."""

AT_ONCE = 100
"""Jobs that one sweep calls for."""


class Report(NamedTuple):
    """What one sweep did: ids of jobs."""

    ended: list[str]
    requeued: list[str]
    called: list[str]
    not_called: list[str]  # calling failed; the next sweep tries again


async def sweep(
    jobs: Jobs, call: Callable[[Undispatched], Awaitable[None]], *, undispatched_s: float = UNDISPATCHED_S
) -> Report:
    """Ends what nobody may acquire again, frees the jobs of dead holders, and calls somebody for what waits too long.

    `call` gets somebody to work on a job, and raises I2VError where that failed. Two sweeps at once do no harm: each
    job is acquired once. Raises QueueUnavailable, QueueRefused.
    """
    swept = await anyio.to_thread.run_sync(jobs.sweep)
    called, not_called = [], []
    for job in await anyio.to_thread.run_sync(jobs.undispatched, undispatched_s, AT_ONCE):
        try:
            await call(job)
        except I2VError as error:
            log.warning("nobody could be called", item_id=job.id, problem=str(error))
            not_called.append(job.id)
            continue
        await anyio.to_thread.run_sync(jobs.note_dispatch, job.id)
        called.append(job.id)
    return Report(swept.ended, swept.requeued, called, not_called)
