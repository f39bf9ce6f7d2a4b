"""The net under every call: jobs of dead holders, and jobs that nobody asked for in time.

A call that is answered 503 is made again, but not for ever: Cloud Tasks gives a task up once both its `max_attempts`
and its `max_retry_duration` are exceeded, which may be after 90 s, while a dead holder's lease is stale only after
minutes. So somebody has to look.
"""

from collections.abc import Awaitable, Callable

import anyio
import structlog

from inference.errors import I2VError, QueueAuthError, SettingsError
from inference.push.here import Here
from inference.push.jobs import JobQueue, Swept

log = structlog.get_logger(__name__)

Ask = Callable[[str], Awaitable[None]]
"""Makes somebody deliver a job again. Raises QueueError, SettingsError."""


class Sweeper:
    """Looks after jobs: asks for each again (`ask`), and takes what waits here (`here`)."""

    def __init__(self, jobs: JobQueue, *, ask: Ask | None = None, here: Here | None = None) -> None:
        self._jobs, self._ask, self._here = jobs, ask, here
        self._lock = anyio.Lock()
        self._woken = anyio.Event()

    async def once(self) -> Swept:
        """One sweep; a second one at the same time waits for the first. Raises as JobQueue.sweep."""
        async with self._lock:
            swept = await self._jobs.sweep()
            if any(ids for _, ids in swept):
                log.info("swept", **{name: len(ids) for name, ids in swept})
            if self._ask is not None:
                for job_id in dict.fromkeys((*swept.requeued, *swept.waiting)):
                    await self._ask(job_id)
            if self._here is not None:
                await self._here.take_waiting()
            return swept

    async def wake(self) -> None:
        """Makes `serve` look now. Any number of calls while it looks make it look once more."""
        self._woken.set()

    async def serve(self, interval_s: float) -> None:
        """Sweeps every `interval_s`, when woken, and when a job has ended here; goes on after errors that may pass.

        Raises QueueAuthError, SettingsError.
        """
        is_first = True
        while True:
            self._woken = anyio.Event()
            freed = self._here.freed if self._here else anyio.Event()
            try:
                await self.once()
            except (QueueAuthError, SettingsError):
                raise
            except I2VError as error:
                log.warning("sweep_failed", error=str(error))
            if is_first:
                is_first = False
                log.info("sweeping", every_s=interval_s)
            with anyio.move_on_after(interval_s):
                await _either(self._woken, freed)


async def _either(*events: anyio.Event) -> None:
    """Until one of them is set."""

    async def wait(event: anyio.Event) -> None:
        await event.wait()
        group.cancel_scope.cancel()

    async with anyio.create_task_group() as group:
        for event in events:
            group.start_soon(wait, event)
