"""`/jobs/run` and `/wake` on Modal: a web endpoint that scales to zero, and hands work on."""

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import anyio
import anyio.to_thread
import structlog
from starlette.types import ASGIApp

from inference import logs
from inference.build.workers import event_hub
from inference.errors import I2VError, PoolUnavailable, QueueUnavailable
from inference.fleet.containers import Containers, Sized
from inference.fleet.shape import Shape, for_a_cold_start
from inference.leasing.taking import LEASE_LIMIT_S, hand_back
from inference.on_modal import deployment, ticks
from inference.payments.records import Records
from inference.progress.web.follow import Bounds
from inference.providers import DEFAULT, provider_of
from inference.push import answers
from inference.push.answers import Answer
from inference.push.app import create_app
from inference.push.jobs import JobQueue, Standing, attempt_of
from inference.push.opening import build_auth, build_streams, open_jobs
from inference.settings import Settings
from inference.task import Lease

log = structlog.get_logger(__name__)

CALL_S = 10.0
"""How long the platform is waited for, one call."""

LISTENERS = 80
"""Of live progress, a container. It takes 100 requests at once (app.py), and some of them have to be calls."""


class HandsOn:
    """Takes a job and sends its lease to a GPU container; leaves to the next tick what that has rules for.

    A tick knows budgets, failing pools and overflow. So a task for a paid provider, or for a pool that is full, is
    not taken here, and a tick is asked for instead.
    """

    def __init__(self, pool: Containers, size: Sized, wake: Callable[[], Any]) -> None:
        self._pool, self._size, self._wake = pool, size, wake
        self.jobs: JobQueue | None = None  # set while the application is open

    async def run(self, job_id: str, extras: Mapping[str, Any], deadline_s: float) -> Answer:
        """See Runs."""
        del extras
        with anyio.move_on_after(deadline_s) as scope:
            answer = await self._run(job_id)
        if scope.cancelled_caught:
            return answers.busy(job_id, "the platform did not answer in time")
        return answer

    async def check(self) -> None:
        """See Runs."""
        await self._open().check()

    def _open(self) -> JobQueue:
        if self.jobs is None:
            raise QueueUnavailable("this endpoint is starting")
        return self.jobs

    async def _run(self, job_id: str) -> Answer:
        jobs = self._open()
        if not await self._has_room():
            standing = await jobs.standing(job_id)
            if standing.has_ended or standing.is_held:
                return answers.not_taken(job_id, standing)
            return answers.busy(job_id, "every container has enough to do")
        found: Lease | Standing | None = None
        answer = None
        with anyio.CancelScope(shield=True):  # an abandoned request may still take the job
            with anyio.move_on_after(LEASE_LIMIT_S):
                found = await jobs.acquire(job_id)
            if isinstance(found, Lease):
                answer = await self._send(jobs, found)
        if answer is not None:
            return answer
        if isinstance(found, Standing):
            return answers.not_taken(job_id, found)
        raise QueueUnavailable(f"the store of jobs did not answer within {LEASE_LIMIT_S:g} s")

    async def _has_room(self) -> bool:
        try:
            with anyio.fail_after(CALL_S):
                live = await self._pool.live()
        except (PoolUnavailable, TimeoutError) as error:
            log.warning("pool_unknown", error=str(error))
            return False
        return live.running + live.waiting < self._size.slots

    async def _send(self, jobs: JobQueue, lease: Lease) -> Answer:
        job_id = lease.task.item_id
        try:
            if provider_of(lease.task.provider) is not DEFAULT:
                await hand_back(jobs, lease, reason=None)  # fence
                await self._wake()
                return answers.Answer(http_status=202, outcome="accepted", job_id=job_id, job_status="queued")
            with anyio.fail_after(CALL_S):
                await self._pool.send(lease)
        except (I2VError, TimeoutError) as error:
            log.warning("not_sent", item_id=job_id, error=str(error))
            await hand_back(jobs, lease, reason=None)  # fence
            return answers.busy(job_id, "the platform takes nothing now")
        log.info("sent", item_id=job_id, worker_id=lease.worker_id, pool=DEFAULT.pool)
        return answers.accepted(job_id, attempt_of(lease))


def application(
    settings: Settings, shape: Shape, records: Records, pool: Containers, spawn_tick: ticks.Spawn
) -> ASGIApp:
    """What the web endpoint serves. Raises SettingsError where it would be open to all."""
    logs.configure(settings.log_level)
    auth = build_auth(settings)

    async def wake() -> None:
        await ticks.ask(records, spawn_tick)

    hub = event_hub(settings, needed=False)  # jobs are taken without it, too
    streams = build_streams(settings, auth, hub, Bounds(LISTENERS, longest_s=deployment.LISTEN_S))
    deadline_s = settings.push_deadline_s
    runs = HandsOn(pool, shape.sizes[DEFAULT.pool], wake) if settings.queue == "video_jobs" else None

    @asynccontextmanager
    async def opened(_app: Any) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            if hub is not None:
                stack.push_async_callback(anyio.to_thread.run_sync, hub.close)
            if runs is not None:
                runs.jobs = await stack.enter_async_context(open_jobs(for_a_cold_start(settings, shape)))
            yield

    return create_app(auth, runs=runs, wake=wake, deadline_s=deadline_s, beside=streams, lifespan=opened)
