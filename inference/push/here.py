"""Jobs that are run in this process, one at a time unless told otherwise."""

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import anyio
import structlog
from anyio.abc import TaskGroup, TaskStatus

from inference.errors import EngineHung, I2VError, InvalidTask, QueueUnavailable, SettingsError
from inference.leasing.executor import Executor
from inference.leasing.polling import MAX_OUTAGE_PAUSE_S, OUTAGE_PAUSE_S
from inference.leasing.runner import Runner
from inference.leasing.taking import LEASE_LIMIT_S, RELEASE_LIMIT_S, lease_from
from inference.push import answers
from inference.push.answers import Answer
from inference.push.jobs import JobQueue, Standing, attempt_of
from inference.task import Lease, Outcome

log = structlog.get_logger(__name__)


@dataclass(eq=False)
class _Attempt:
    """One lease that runs here."""

    lease: Lease
    ended: anyio.Event = field(default_factory=anyio.Event)
    outcome: Outcome | None = None  # None also after the end of one that was cut off, and handed back


class Here:
    """Takes jobs by their id and runs them on the engine of this process.

    A job runs in a task of this object, not of the request that asked for it: it goes on after the caller's deadline.
    """

    def __init__(self, jobs: JobQueue, runner: Runner, *, executor: Executor | None = None, at_once: int = 1) -> None:
        self._jobs, self._runner, self._executor = jobs, runner, executor or Executor(runner.turns)
        self._free = at_once
        self._running: set[_Attempt] = set()
        self._group: TaskGroup | None = None
        self._stopping = anyio.Event()
        self._outages = 0  # jobs in a row that went back because of somebody's outage
        self._rests_until = -float("inf")
        self.fault: I2VError | None = None  # why nothing more should run in this process
        self.freed = anyio.Event()  # set when a job has ended here, and then made anew

    # What is asked

    async def run(self, job_id: str, extras: Mapping[str, Any], deadline_s: float) -> Answer:
        """See Runs."""
        if extras:
            log.info("asked_with", item_id=job_id, fields=sorted(extras)[:20])
        if why := self._why_not():
            standing = await self._jobs.standing(job_id)  # one that has ended needs nobody: the caller may forget it
            if standing.has_ended or standing.is_held:
                return answers.not_taken(job_id, standing)
            return answers.busy(job_id, why, max(answers.RETRY_AFTER_S, self._rests_until - anyio.current_time()))
        self._free -= 1
        attempt = None
        try:
            found = await self._acquire(job_id)
            if isinstance(found, Standing):
                return answers.not_taken(job_id, found)
            attempt = await self._start(found)
        finally:
            if attempt is None:
                self._free += 1
        if attempt is None:
            return answers.busy(job_id, "this worker is stopping")
        with anyio.move_on_after(deadline_s):
            await attempt.ended.wait()
        return await self._answer(attempt)

    async def check(self) -> None:
        """See Runs."""
        if self.fault is not None:
            raise self.fault
        await self._jobs.check()

    async def take_waiting(self) -> int:
        """Takes jobs that wait, until none does or nothing more fits in; returns how many.

        Raises as TaskQueue.lease.
        """
        taken = 0
        while self._why_not() is None:
            self._free -= 1
            started = None
            try:
                try:
                    lease = await lease_from(self._jobs)
                except InvalidTask as error:
                    log.error("invalid_task", item_id=error.item_id, error=str(error))  # noqa: TRY400 - no traceback
                    continue
                if lease is None:
                    return taken
                started = await self._start(lease)
            finally:
                if started is None:
                    self._free += 1
            taken += started is not None
        return taken

    # Life

    async def serve(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Runs jobs until it is drained, or nothing more can work here. Cancelled, it hands back what runs.

        Raises EngineHung, EngineLost, SettingsError where the process should end.
        """
        async with anyio.create_task_group() as self._group:
            task_status.started()
            await self._stopping.wait()
        if self._executor.turns.hung:
            raise EngineHung("the engine is stuck; this process has to be started again")
        if self.fault is not None:
            raise self.fault

    async def drain(self, grace_s: float) -> None:
        """Takes nothing more. What runs has `grace_s` to finish, then is handed back; all has ended after that."""
        self._stopping.set()
        with anyio.move_on_after(grace_s):
            for attempt in tuple(self._running):
                await attempt.ended.wait()
        if self._group is not None:
            self._group.cancel_scope.cancel()  # fence
        with anyio.move_on_after(RELEASE_LIMIT_S):
            for attempt in tuple(self._running):
                await attempt.ended.wait()

    # Inside

    def _why_not(self) -> str | None:
        """Why nothing more may begin now."""
        if self._group is None or self._stopping.is_set():
            return "this worker is stopping"
        if self._executor.broken:
            return "this worker cannot work any more"
        if anyio.current_time() < self._rests_until:
            return "a service that this worker needs has an outage"
        if self._free <= 0:
            return "this worker has enough to do"
        return None

    async def _acquire(self, job_id: str) -> Lease | Standing:
        # Shielded, since an abandoned request may still take the job, which nobody would then work on.
        with anyio.CancelScope(shield=True), anyio.move_on_after(LEASE_LIMIT_S):
            return await self._jobs.acquire(job_id)
        raise QueueUnavailable(f"the store of jobs did not answer within {LEASE_LIMIT_S:g} s")

    async def _start(self, lease: Lease) -> _Attempt | None:
        """Runs a lease from now on; hands it back where the process has begun to stop meanwhile."""
        if self._group is None or self._stopping.is_set():
            await self._runner.hand_back(lease)  # fence
            return None
        attempt = _Attempt(lease)
        self._running.add(attempt)
        self._group.start_soon(self._run, attempt)
        return attempt

    async def _run(self, attempt: _Attempt) -> None:
        try:
            attempt.outcome = await self._executor.run_lease(self._runner, attempt.lease)
            self._judge(attempt.outcome)
        finally:
            self._running.discard(attempt)
            self._free += 1
            attempt.ended.set()
            freed, self.freed = self.freed, anyio.Event()
            freed.set()

    def _judge(self, outcome: Outcome) -> None:
        if outcome.status == "completed":
            self._outages = 0
        if outcome.worker_should == "stop":
            self._give_up(SettingsError(str(outcome.error)))
        elif self._executor.broken:
            self._give_up(self._executor.fault)
        elif outcome.worker_should == "wait" and anyio.current_time() >= self._rests_until:
            pause_s = min(MAX_OUTAGE_PAUSE_S, OUTAGE_PAUSE_S * 2.0 ** min(self._outages, 10))
            self._rests_until = anyio.current_time() + random.uniform(0.75, 1.25) * pause_s
            self._outages += 1
            log.warning("waiting_for_an_outage_to_end", error=outcome.error, next_task_s=round(pause_s))

    def _give_up(self, fault: I2VError | None) -> None:
        self.fault = self.fault or fault
        self._stopping.set()

    async def _answer(self, attempt: _Attempt) -> Answer:
        job_id, attempt_id = attempt.lease.task.item_id, attempt_of(attempt.lease)
        if not attempt.ended.is_set():
            log.info("answered_early", item_id=job_id)
            return answers.accepted(job_id, attempt_id)
        outcome = attempt.outcome or Outcome(status="released", item_id=job_id, error="this worker was stopped")
        found = None
        if outcome.status in ("failed", "lease_lost", "released"):  # whether somebody has to ask again is in the store
            try:
                found = await self._jobs.standing(job_id)
            except I2VError as error:
                log.warning("standing_unknown", item_id=job_id, error=str(error))
        return answers.ended(outcome, attempt_id, found)
