"""The polling worker: lease, run, repeat, several leases at once; drains when told to stop."""

import math
import random
from collections.abc import Callable

import anyio
import structlog
from anyio.abc import TaskGroup

from inference.errors import (
    DiskFull,
    EngineHung,
    I2VError,
    InvalidTask,
    ProviderUnavailable,
    QueueFailed,
    QueueUnavailable,
    SettingsError,
)
from inference.leasing.executor import Executor
from inference.leasing.runner import Runner
from inference.leasing.taking import CLAIM_LIMIT_S, hand_back, lease_from
from inference.queues.base import TaskQueue
from inference.task import Lease, Outcome

log = structlog.get_logger(__name__)

MAX_BACKOFF_S = 60.0
"""The longest pause between questions to a queue that does not answer."""

OUTAGE_PAUSE_S, MAX_OUTAGE_PAUSE_S = 30.0, 1800.0
"""How long no task is taken after the first that went back because of somebody's outage, and how long at most: each
such task in a row doubles it. An exit would do worse, for supervisors start a worker again within seconds."""

STUCK_AFTER_S = 2 * CLAIM_LIMIT_S
"""A question to the queue, with the look at the engine before it, that takes longer than all of its limits together."""

IDLE_LINE_S = 300.0
"""How often a worker without a task says that it is there."""


NOT_NOW: dict[type[I2VError], str] = {
    ProviderUnavailable: "engine_unavailable",
    DiskFull: "disk_full",
    QueueUnavailable: "queue_unavailable",
}
"""Why no task is taken for a moment, and what a log calls it."""


class Worker:
    """Takes leases from one queue and runs them, up to `concurrency` at once, until told to stop.

    Two at once keep the engine busy: one lease generates while the other uploads its video or downloads the next
    photo. More only hold tasks that another worker could have started.
    """

    def __init__(
        self,
        queue: TaskQueue,
        runner: Runner,
        *,
        executor: Executor | None = None,
        concurrency: int = 2,
        poll_interval_s: float = 5,
        grace_s: float = 8,
        on_outcome: Callable[[Outcome], None] | None = None,
    ) -> None:
        """`executor`: of the runner's engine, where others use it, too; without, this worker has it for itself."""
        self._queue, self._runner, self._executor = queue, runner, executor or Executor(runner.turns)
        self._poll_interval_s, self._grace_s = poll_interval_s, grace_s
        self._on_outcome = on_outcome
        self._slots = anyio.Semaphore(concurrency)
        self._polling = anyio.CancelScope()
        self._stopping = anyio.Event()
        self._stopping_now = anyio.Event()
        self._unanswered = 0  # questions in a row that the queue did not answer
        self._outages = 0  # tasks in a row that went back because of somebody's outage
        self._pause: anyio.CancelScope | None = None  # in which no task is taken; cancelled when the outage is over
        self._woken = anyio.Event()  # somebody said that there is work
        self._fault: I2VError | None = None
        self._asked_at: float | None = None  # when the question began that has no answer yet
        self._polls = 0  # questions that brought no task, since it was told or a task was there
        self._told_at = -math.inf  # when that was told
        self._last: dict[str, str] = {}  # of the last task that ended, for that line
        self._ended_at = 0.0

    @property
    def is_stuck(self) -> bool:
        """Whether the loop waits for an answer that no limit ends any more, so that only a new process helps.

        Not while tasks run here: they go on without that answer, some of them are paid for, and each has a limit.
        """
        waited_too_long = self._asked_at is not None and anyio.current_time() > self._asked_at + STUCK_AFTER_S
        return waited_too_long and not self._executor.leases

    def wake(self) -> None:
        """Asks the queue now instead of after the interval. Said while it is asked, makes it be asked once more.

        Call from the loop.
        """
        self._woken.set()

    def stop(self) -> None:
        """Takes no more tasks; running ones have `grace_s` to finish, then are handed back. Call from the loop."""
        self._stopping.set()
        self._polling.cancel()

    def stop_now(self) -> None:
        """Takes no more tasks and hands the running ones back at once. Call from the loop."""
        self.stop()
        self._stopping_now.set()

    async def run(self, *, at_most: int | None = None) -> None:
        """Works until stopped; with `at_most`, until so many tasks were taken or the queue has none, and they ended.

        While somebody else has an outage that concerns every task (a provider, the storage), waits longer and longer
        before the next one; with `at_most`, takes no more.

        Raises QueueAuthError, QueueRefused where the queue will not have us, SettingsError where settings of this
        worker end tasks, EngineHung when the engine is stuck, EngineLost when leases keep ending badly for reasons
        that may be this machine's. Everything it held was handed back by then.
        """
        async with anyio.create_task_group() as beside:
            async with anyio.create_task_group() as leases:
                beside.start_soon(self._enforce_stop, leases.cancel_scope)
                beside.start_soon(self._stop_with_executor)
                with self._polling:
                    await self._poll(leases, at_most)
            beside.cancel_scope.cancel()
        if self._executor.turns.hung:
            raise EngineHung("the engine is stuck; this process has to be started again")
        if self._fault is not None:
            raise self._fault

    async def _enforce_stop(self, leases: anyio.CancelScope) -> None:
        await self._stopping.wait()
        with anyio.move_on_after(self._grace_s):
            await self._stopping_now.wait()
        leases.cancel()

    async def _stop_with_executor(self) -> None:
        await self._executor.stopping.wait()
        self.stop()

    async def _poll(self, leases: TaskGroup, at_most: int | None) -> None:
        left = math.inf if at_most is None else at_most
        while left > 0:
            await self._slots.acquire()
            if self._outages and at_most is not None:
                return
            await self._sit_out()
            left -= 1
            lease, pause_s = None, self._poll_interval_s * random.uniform(0.8, 1.2)
            self._woken = anyio.Event()
            waits_for_more = at_most is None
            try:
                lease = await self._ask(tells_idle=waits_for_more)
                self._unanswered = 0
            except (QueueUnavailable, ProviderUnavailable, DiskFull) as error:
                if not waits_for_more:
                    self._fault = self._fault or error
                pause_s = self._backoff_s(error, pause_s)
                event = next(name for kind, name in NOT_NOW.items() if isinstance(error, kind))
                log.warning(event, error=str(error), next_try_s=round(pause_s, 1))
            except InvalidTask as error:
                log.error("invalid_task", item_id=error.item_id, error=str(error))  # noqa: TRY400 - no traceback
                waits_for_more = True
            except I2VError as error:
                self._give_up(error)
            if lease is not None:
                ended = anyio.Event()
                leases.start_soon(self._run, lease, ended)
                if self._outages:  # one task at a time finds out whether the outage is over
                    await ended.wait()
                pause_s = 0.0
            else:
                self._slots.release()
                if not waits_for_more:
                    return
            with anyio.move_on_after(pause_s if left else 0.0):
                await self._woken.wait()

    async def _ask(self, *, tells_idle: bool) -> Lease | None:
        """The queue's next task. Raises as Runner.check and lease_from."""
        self._asked_at = anyio.current_time()
        try:
            await self._runner.check()
            lease = await lease_from(self._queue)
        finally:
            self._asked_at = None
        if tells_idle:
            self._tell_idle(took_one=lease is not None)
        return lease

    def _tell_idle(self, *, took_one: bool) -> None:
        """Says now and then that there is nothing to do: a log without lines could be a worker that hangs."""
        now = anyio.current_time()
        if took_one or self._executor.leases:
            self._polls, self._told_at = 0, now
            return
        self._polls += 1
        if now >= self._told_at + IDLE_LINE_S:
            ago = {"last_s_ago": round(now - self._ended_at)} if self._last else {}
            log.info("idle", polls=self._polls, **self._last, **ago)
            self._polls, self._told_at = 0, now

    def _backoff_s(self, error: I2VError, interval_s: float) -> float:
        """The pause after a question that brought no task. A queue that answers, if only 5xx, is asked as ever."""
        if isinstance(error, QueueFailed):
            self._unanswered = 0
            return interval_s
        self._unanswered = min(self._unanswered + 1, 10)
        return random.uniform(0.5, 1) * min(MAX_BACKOFF_S, self._poll_interval_s * 2.0**self._unanswered)

    async def _sit_out(self) -> None:
        """Waits until tasks may be taken again."""
        if self._pause is not None:
            with self._pause:
                await anyio.sleep_forever()
            self._pause = None

    async def _run(self, lease: Lease, ended: anyio.Event) -> None:
        try:
            if self._stopping.is_set():  # leased by the last request before the stop
                await hand_back(self._queue, lease)
                return
            outcome = await self._executor.run_lease(self._runner, lease)
            self._last = {"last_item_id": outcome.item_id, "last_status": outcome.status}
            self._ended_at = anyio.current_time()
            if self._on_outcome:
                self._on_outcome(outcome)
            await self._judge(outcome)
        finally:
            self._slots.release()
            ended.set()

    async def _judge(self, outcome: Outcome) -> None:
        if outcome.worker_should == "wait":
            self._wait(str(outcome.error))
            return
        if outcome.status == "completed":
            self._outages = 0
            if self._pause is not None:
                self._pause.cancel()
        if outcome.worker_should == "stop":
            self._give_up(SettingsError(str(outcome.error)))
        elif self._executor.broken:
            self._give_up(self._executor.fault)
        elif outcome.machine_at_fault:
            # A moment before the next, in which the machine may recover, or another worker take what was handed back.
            with anyio.move_on_after(self._poll_interval_s * 2**self._executor.faults_in_a_row):
                await self._stopping.wait()

    def _give_up(self, fault: I2VError | None) -> None:
        """Stops for a reason, of which `run` tells the first; None where the engine is lost, and tells it itself."""
        self._fault = self._fault or fault
        self.stop()

    def _wait(self, why: str) -> None:
        """Takes no more tasks for a while. Several tasks that went back in the same outage count once."""
        if self._pause is not None:
            return
        pause_s = random.uniform(0.75, 1.25) * min(MAX_OUTAGE_PAUSE_S, OUTAGE_PAUSE_S * 2.0 ** min(self._outages, 10))
        self._outages += 1
        self._pause = anyio.CancelScope(deadline=anyio.current_time() + pause_s)
        log.warning("waiting_for_an_outage_to_end", error=why, next_task_s=round(pause_s))
