"""Keeping a lease alive with heartbeats ("beats") beside the work, and stopping the work when the lease is lost.

Work stops when the lease could not be renewed for two thirds of its length. Only the report may use the last third: the
queue itself refuses a report that comes too late.
"""

import math
import random
from collections.abc import Awaitable, Callable
from typing import TypeVar

import anyio
import structlog

from inference.engines.base import Job
from inference.errors import (
    CancelRequested,
    I2VError,
    LeaseLost,
    MachineFault,
    QueueError,
    QueueFailed,
    QueueRefused,
    QueueUnavailable,
)
from inference.leasing.retry import Policy, repeat
from inference.leasing.taking import STOPPING, hand_back
from inference.progress.stages import StageTracker
from inference.queues.base import TaskQueue
from inference.task import Lease

T = TypeVar("T")
log = structlog.get_logger(__name__)

WORK_SHARE = 2 / 3
"""For this share of a lease work may go on after the last successful renewal was sent."""


WATCHED_S, WATCHED_SHARE = 0.5, 0.2
"""Where people watch: the shortest time between two beats, and its share of the time since the first, up to the
interval that the queue asks for. At an interval of 2 s, four seconds of work are heard of seven times, where it was
twice, and ten minutes of it 307 times, where it was 300 times."""


class Keeper:
    """Renews one lease beside the work, and ends the work when the lease cannot be renewed."""

    def __init__(self, queue: TaskQueue, lease: Lease, policy: Policy, tracker: StageTracker) -> None:
        self._queue, self._lease, self._policy, self._tracker = queue, lease, policy, tracker
        length_s = lease.length_s
        # Intervals shrink with short leases, so that a few beats can fail before work has to stop.
        self._interval_s = min(policy.heartbeat_interval_s, 0.4 * length_s, lease.beat_interval_s or math.inf)
        # A queue that tells people how far its tasks are hears of the first seconds more often.
        is_watched = lease.beat_interval_s is not None and lease.task.takes("progress")
        self._shortest_s = min(WATCHED_S, self._interval_s) if is_watched else self._interval_s
        self._second_beat_s = min(policy.second_beat_s, 0.2 * length_s, self._shortest_s)
        self._timeout_s = min(policy.beat_timeout_s, 0.2 * length_s)
        self._retry_s = min(policy.beat_retry_s, length_s / 30)
        self._renewed_at = anyio.current_time()
        self.reporting = False  # the report is being sent: only its answer, and no failed beat, ends the lease
        self.heard = False  # the queue answered a beat, if only with 5xx: this machine can reach it
        self.ended: I2VError | None = None
        self._over = False  # the work has returned or raised
        self._released = False

    @property
    def lease_ends_at(self) -> float:
        """When, on this machine's monotonic clock, the queue may give the task to somebody else."""
        return self._renewed_at + self._lease.length_s

    @property
    def work_ends_at(self) -> float:
        """When work has to stop unless the lease is renewed before."""
        return self._renewed_at + self._lease.length_s * (1 if self.reporting else WORK_SHARE)

    def check(self) -> None:
        """Raises LeaseLost or CancelRequested if the lease has ended. Called before every step that has effects.

        It compares clocks itself, because a process that was paused reaches this line before its next beat is due.
        """
        if self.ended is None and anyio.current_time() >= self.work_ends_at:
            self.ended = LeaseLost("the lease could not be renewed in time", confirmed=False)
        if self.ended is not None:
            raise self.ended

    async def first_beat(self) -> None:
        """Confirms the lease before anything is spent on it. Raises LeaseLost, CancelRequested, QueueAuthError.

        Raises MachineFault where the queue rejects our heartbeats as malformed, which is not the task's fault.
        """
        while True:
            self.check()
            try:
                return await self.beat()
            except QueueRefused as error:
                raise MachineFault(f"the queue takes no heartbeats of this worker: {error}") from None
            except QueueUnavailable as error:
                await anyio.sleep_until(min(anyio.current_time() + self._told_retry_s(error), self.work_ends_at))

    async def stage(self, operation: Callable[[], Awaitable[T]]) -> T:
        """Runs one stage of the work, with retries that depend on the error, for as long as the lease lasts.

        A 5xx of the queue counts as a failed attempt, because it may concern this task alone. If a beat then fails as
        well, the queue has an outage, and the stage waits until it is over. Raises what `operation` raises, LeaseLost,
        CancelRequested.
        """

        async def once() -> T:
            try:
                return await operation()
            except QueueFailed as failure:
                await self._require_heartbeat_answered(failure)
                raise

        return await repeat(once, self._policy, self.check, answers_count=True)

    async def report(self, operation: Callable[[], Awaitable[T]]) -> T:
        """Reports the finished work, with retries for as long as the lease lasts. Raises as `stage`."""
        self.reporting = True
        return await repeat(operation, self._policy, self.check)

    async def _require_heartbeat_answered(self, failure: QueueFailed) -> None:
        """Raises QueueUnavailable if a beat fails as well, LeaseLost, CancelRequested."""
        try:
            await self.beat()
        except QueueUnavailable:
            raise QueueUnavailable(str(failure)) from None

    async def guard(self, work: Callable[[], Awaitable[T]], job: Job) -> T:
        """Runs `work` with beats beside it. Raises what `work` raises, or LeaseLost or CancelRequested."""
        result: T
        failure: Exception | None = None
        self._over = False
        async with anyio.create_task_group() as tasks:
            with anyio.CancelScope() as scope:
                tasks.start_soon(self._keep, scope, job)
                try:
                    result = await work()
                except Exception as error:  # noqa: BLE001 - raised again below, outside of the group
                    failure = error
            self._over = True
            tasks.cancel_scope.cancel()
        if self.ended is not None and (scope.cancelled_caught or failure is not None):
            raise self.ended  # the end of the lease is the cause of any other failure
        if failure is not None:
            raise failure
        return result

    async def release(self, reason: str | None = None) -> None:
        """Tries to hand the lease back. If that fails, the lease expires by itself."""
        if self._released:
            return
        self._released = True
        await hand_back(self._queue, self._lease, self._policy, reason)

    async def _keep(self, scope: anyio.CancelScope, job: Job) -> None:
        try:
            await self._beat_on(scope, job)
        except anyio.get_cancelled_exc_class():
            # The worker is being stopped and will write nothing more, so the task is handed back before the engine's
            # thread has noticed: the platform may kill this process before it has.
            if not self._over:
                await self.release(STOPPING)
            raise

    async def _beat_on(self, scope: anyio.CancelScope, job: Job) -> None:
        began_s = anyio.current_time()
        wait_s = self._second_beat_s
        while True:
            await anyio.sleep_until(min(anyio.current_time() + wait_s, self.work_ends_at))
            try:
                self.check()
                await self.beat()
                age_s = anyio.current_time() - began_s
                wait_s = min(self._interval_s, max(self._shortest_s, WATCHED_SHARE * age_s))
            except (LeaseLost, CancelRequested) as error:
                if self.reporting and self.ended is None:
                    # A report that the queue accepted ends the lease, too, so this refused beat may mean success. The
                    # report's own answer decides; beats stop until then.
                    wait_s = float("inf")
                    continue
                self.ended = error
                job.cancel(error)
                scope.cancel()  # fence
                return
            except QueueError as error:
                wait_s = self._told_retry_s(error)

    async def beat(self) -> None:
        """Renews the lease once. Raises LeaseLost, CancelRequested, QueueError."""
        sent_at = anyio.current_time()
        try:
            with anyio.fail_after(max(0.0, min(self._timeout_s, self.work_ends_at - sent_at))):
                await self._queue.heartbeat(self._lease, self._tracker.latest)
        except TimeoutError:
            raise QueueUnavailable("the heartbeat was not answered in time") from None
        except QueueFailed:
            self.heard = True
            raise
        # Counted from before the request was sent: the queue's own count cannot have started earlier.
        self._renewed_at = max(self._renewed_at, sent_at)
        self.heard = True

    def _told_retry_s(self, error: QueueError) -> float:
        log.warning("heartbeat_failed", item_id=self._lease.task.item_id, error=str(error))
        return self._retry_s * random.uniform(0.5, 1.5)
