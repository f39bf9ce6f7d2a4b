"""Keeping a lease: beats beside the work, the moment when work has to stop, and handing it back.

Work stops when the lease could not be renewed for two thirds of its length, and only the report may use the last
third, because the queue itself refuses a report that comes too late.
"""

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
from inference.leasing.taking import hand_back
from inference.progress.tracker import ProgressTracker
from inference.queues.base import TaskQueue
from inference.task import Lease

T = TypeVar("T")
log = structlog.get_logger(__name__)

WORK_SHARE = 2 / 3
"""The share of a lease, since its last renewal was sent, in which work may go on (reliability.md, rule 3)."""


class Keeper:
    """Keeps one lease renewed beside the work, and ends the work when it cannot be."""

    def __init__(self, queue: TaskQueue, lease: Lease, policy: Policy, tracker: ProgressTracker) -> None:
        self._queue, self._lease, self._policy, self._tracker = queue, lease, policy, tracker
        length_s = lease.length_s
        # Short leases get everything in proportion, so that a few beats can fail before work has to stop.
        self._interval_s = min(policy.heartbeat_interval_s, 0.4 * length_s)
        self._second_beat_s = min(policy.second_beat_s, 0.2 * length_s)
        self._timeout_s = min(policy.beat_timeout_s, 0.2 * length_s)
        self._retry_s = min(policy.beat_retry_s, length_s / 30)
        self._renewed_at = anyio.current_time()
        self.reporting = False  # from then on the report's own answer says whose the task is; beats only keep it
        self.heard = False  # the queue itself has answered a beat, if only with a 5xx: this machine can reach it
        self.ended: I2VError | None = None
        self._over = False  # the work has ended by itself
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
        """At every boundary: raises LeaseLost or CancelRequested if the lease ended.

        Also where no beat has noticed yet: a process that was paused finds out here, before it writes.
        """
        if self.ended is None and anyio.current_time() >= self.work_ends_at:
            self.ended = LeaseLost("the lease could not be renewed in time", confirmed=False)
        if self.ended is not None:
            raise self.ended

    async def first_beat(self) -> None:
        """Confirms the lease before anything is spent on it. Raises LeaseLost, CancelRequested, QueueAuthError.

        Raises MachineFault where the queue does not understand our heartbeats: that says nothing of the task.
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
        """One stage of the work, tried again by cause for as long as the lease lasts.

        An answer that the queue cannot do it counts as a try, for it may be about this task, unless beats are answered
        no better: then the queue has an outage, and is waited for. Raises what `operation` raises, LeaseLost,
        CancelRequested.
        """

        async def once() -> T:
            try:
                return await operation()
            except QueueFailed as failure:
                await self._ask_whether_it_is_away(failure)
                raise

        return await repeat(once, self._policy, self.check, answers_count=True)

    async def report(self, operation: Callable[[], Awaitable[T]]) -> T:
        """The report of what was made, tried for as long as the lease lasts. Raises as `stage`."""
        self.reporting = True
        return await repeat(operation, self._policy, self.check)

    async def _ask_whether_it_is_away(self, failure: QueueFailed) -> None:
        """Raises QueueUnavailable where not even a beat is answered now, LeaseLost, CancelRequested."""
        try:
            await self.beat()
        except QueueUnavailable:
            raise QueueUnavailable(str(failure)) from None

    async def guard(self, work: Callable[[], Awaitable[T]], job: Job) -> T:
        """Runs `work` with beats beside it. Raises what work raises, or LeaseLost or CancelRequested."""
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
            raise self.ended  # whatever else went wrong, went wrong because of this
        if failure is not None:
            raise failure
        return result

    async def release(self) -> None:
        """Hands the lease back as well as can be; if the queue does not hear it, the lease runs out by itself."""
        if self._released:
            return
        self._released = True
        await hand_back(self._queue, self._lease, self._policy)

    async def _keep(self, scope: anyio.CancelScope, job: Job) -> None:
        try:
            await self._beat_on(scope, job)
        except anyio.get_cancelled_exc_class():
            # Stopped from outside: nothing will be written any more, so the task need not wait until a thread of
            # the engine has noticed. A container runtime may leave no time for both.
            if not self._over:
                await self.release()
            raise

    async def _beat_on(self, scope: anyio.CancelScope, job: Job) -> None:
        wait_s = self._second_beat_s
        while True:
            await anyio.sleep_until(min(anyio.current_time() + wait_s, self.work_ends_at))
            try:
                self.check()
                await self.beat()
                wait_s = self._interval_s
            except (LeaseLost, CancelRequested) as error:
                if self.reporting and self.ended is None:
                    # A report that landed ends the lease, too: its answer decides, for as long as the lease lasts.
                    wait_s = float("inf")
                    continue
                self.ended = error
                job.cancel(error)
                scope.cancel()  # fence
                return
            except QueueError as error:
                wait_s = self._told_retry_s(error)

    async def beat(self) -> None:
        """Renews the lease. Raises LeaseLost, CancelRequested, QueueError."""
        sent_at = anyio.current_time()
        try:
            with anyio.fail_after(max(0.0, min(self._timeout_s, self.work_ends_at - sent_at))):
                await self._queue.heartbeat(self._lease, self._tracker.latest)
        except TimeoutError:
            raise QueueUnavailable("the heartbeat was not answered in time") from None
        except QueueFailed:
            self.heard = True
            raise
        # Not when the answer came: the queue counts from when it heard us, which was no earlier than this.
        self._renewed_at = max(self._renewed_at, sent_at)
        self.heard = True

    def _told_retry_s(self, error: QueueError) -> float:
        log.warning("heartbeat_failed", item_id=self._lease.task.item_id, error=str(error))
        return self._retry_s * random.uniform(0.5, 1.5)
