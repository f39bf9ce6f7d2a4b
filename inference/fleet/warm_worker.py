"""A container's side of a fleet: runs the leases it is sent and, while it is warm, takes the next ones itself.

Leases run on an `Executor`, in tasks that no call's end cancels. Whoever owns the process runs `serve` beside the
calls, and `close` on the way out.
"""

from collections.abc import Awaitable, Callable, Mapping

import anyio
import structlog

from inference.engines.turns import EngineTurns
from inference.errors import EngineLost, I2VError, InvalidTask, QueueUnavailable
from inference.fleet.readings import Readings
from inference.leasing.executor import Executor
from inference.leasing.runner import Runner
from inference.leasing.taking import hand_back, lease_from
from inference.providers import PoolName
from inference.queues.base import TaskQueue
from inference.task import Lease, Outcome, Task, Video

log = structlog.get_logger(__name__)

LOOK_AHEAD = 3
"""How many tasks for other pools a warm container looks past before it leaves the queue to the next tick."""

DRY_EVERY_S = 30.0
"""How often a container that finds the queue empty writes that into the fleet's readings, at most."""

OUTAGE_RESTS: Mapping[PoolName, tuple[PoolName, ...]] = {"gpu": ("gpu", "runway"), "runway": ("runway",)}
"""Pools to which nothing should be sent for a while, by the one that met somebody's outage."""

NOTE_S = 10.0
"""How long reading or writing the fleet's records may take."""


class BrokenEngine:
    """What stands for an engine that could not be loaded: every task goes back, and the fleet's readings say why.

    No task fails, because none is at fault. The reason is in what the cron says and in the answer to each call.
    """

    name = "broken"
    stages: Mapping[str, float] = {"load": 1.0}

    def __init__(self, fault: I2VError) -> None:
        self._fault = fault

    async def check(self) -> None:
        """As Engine.check: each task is told why it goes back."""

    async def generate(self, *_: object) -> Video:
        """Raises EngineLost."""
        raise EngineLost(f"the engine could not be loaded: {self._fault}")


class WarmWorker:
    """Runs what one container is sent, as many leases at once as the platform sends it."""

    def __init__(
        self,
        pool: PoolName,
        queue: TaskQueue,
        runner: Runner,
        readings: Readings,
        *,
        fault: I2VError | None = None,
        fits: Callable[[Task], Awaitable[bool]] | None = None,
        is_current: Callable[[], Awaitable[bool]] | None = None,
        drain_s: float = 0.0,
        linger_s: float = 0.0,
        poll_interval_s: float = 5.0,
    ) -> None:
        """`fault`: why the runner's engine is a broken one.

        `drain_s`: how long after it began a call may take another task, 0 for never; `fits` says which ones, and
        `is_current` whether what was deployed last is still this.
        `linger_s`: how long an empty queue is asked again after the last work of this container.
        """
        self._pool, self._queue, self._runner, self._readings = pool, queue, runner, readings
        self._fault, self._fits, self._is_current = fault, fits, is_current
        self._drain_s, self._linger_s, self._poll_interval_s = drain_s, linger_s, poll_interval_s
        self._executor = Executor(runner.turns)
        self._is_lingering = False
        self._dry_at = -float("inf")

    @property
    def broken(self) -> bool:
        """Nothing more should be sent to this container."""
        return self._executor.broken

    @property
    def turns(self) -> EngineTurns:
        """The engine, for somebody who has no task in the queue. Raises why there is none."""
        if self._fault is not None:
            raise self._fault
        return self._runner.turns

    async def serve(self) -> None:
        """Runs beside the calls until `close`; everything that is held then is handed back first."""
        await self._executor.serve(self._tell_fault)

    async def _tell_fault(self) -> None:
        if self._fault is not None:
            await self._record(self._readings.faulted(self._pool, str(self._fault), certain=True))

    async def close(self) -> None:
        """Hands back what is held, and ends `serve`, which has to be running or about to."""
        await self._executor.close()

    async def run(self, lease: Lease | None, *, drain: bool = True) -> list[Outcome]:
        """Runs a lease, then whatever this call may take from the queue; None only shows that this pool can work.

        Without `drain`, that one lease alone. A call that is cancelled hands its lease back, and does so to its end
        after the call is gone.
        """
        drain_until = anyio.current_time() + (self._drain_s if drain else 0.0)
        outcomes: list[Outcome] = []

        async def work() -> None:
            if lease is None and self._fault is None:
                await self._record(self._readings.worked(self._pool))
            current = lease or await self._next(drain_until)
            while current is not None:
                outcome = await self._executor.run_lease(self._runner, current)
                await self._judge(outcome)
                outcomes.append(outcome)
                if outcome.worker_should is not None:  # the next task would end the same way
                    return
                current = await self._next(drain_until)

        try:
            await self._executor.run(work, lets_go=True)
        except EngineLost:  # it came too late, and nobody else knows of it
            if lease is not None:
                await hand_back(self._queue, lease)  # fence
            raise
        return outcomes

    async def _judge(self, outcome: Outcome) -> None:
        """Writes down how it went, and finds out whether this container should go on."""
        if outcome.status == "completed":
            clip_s = sum(outcome.stage_seconds.get(stage, 0.0) for stage in self._runner.turns.stages)
            await self._record(self._readings.worked(self._pool, clip_s))
        elif outcome.machine_at_fault:
            if outcome.status == "released" or self._fault is not None:  # another machine takes this one's place
                self._executor.give_up(EngineLost(str(outcome.error)))
            # Weights that do not load here load nowhere, and settings are the same everywhere; a machine that was
            # lost is one of many.
            certain = self._fault is not None or outcome.worker_should == "stop"
            await self._record(self._readings.faulted(self._pool, str(outcome.error), certain=certain))
        elif outcome.worker_should == "wait":
            # A new container would not help. The pool for Runway is the provider; on a GPU it is the queue's storage
            # that is away, and were only this pool to rest, its tasks would overflow to Runway without their photos.
            for pool in OUTAGE_RESTS[self._pool]:
                await self._record(self._readings.faulted(pool, str(outcome.error)))

    async def _next(self, until: float) -> Lease | None:
        """The next task this call may take: at once while there are some, then asking again for a while."""
        while not self.broken and self._fault is None and anyio.current_time() < until:
            lease = None
            try:
                lease = await self._take()
            except QueueUnavailable as error:  # it may be back when the last work here is done, or while one lingers
                log.warning("not_drained", error=str(error))
            except I2VError as error:
                log.warning("not_drained", error=str(error))
                return None
            if lease is not None:
                return lease
            # One asks on. The others leave their slots to the dispatcher, so that what it sends comes to this
            # container, which is warm, and not to a new one.
            waits_on = self._executor.leases > 0 or anyio.current_time() - self._executor.worked_at < self._linger_s
            if self._is_lingering or not waits_on:
                return None
            self._is_lingering = True
            try:
                await anyio.sleep(self._poll_interval_s)
            finally:
                self._is_lingering = False
        return None

    async def _take(self) -> Lease | None:
        """The next task for this pool, or None. Tasks of other pools are handed back at once."""
        aside: list[Lease] = []
        malformed = 0
        if not await self._agrees(self._is_current and self._is_current()):
            return None
        try:
            while len(aside) <= LOOK_AHEAD and malformed <= LOOK_AHEAD:
                try:
                    lease = await lease_from(self._queue)
                except InvalidTask as error:
                    log.error("invalid_task", item_id=error.item_id, error=str(error))  # noqa: TRY400 - no traceback
                    malformed += 1
                    continue
                if lease is None:
                    await self._found_dry()
                    return None
                aside.append(lease)
                if await self._agrees(self._fits and self._fits(lease.task)):
                    return aside.pop()
            return None
        finally:
            with anyio.CancelScope(shield=True):
                async with anyio.create_task_group() as tasks:
                    for lease in aside:
                        tasks.start_soon(hand_back, self._queue, lease)  # fence

    async def _agrees(self, asking: Awaitable[bool] | None) -> bool:
        """What the fleet's records say; a warm GPU does not stand still because they do not answer."""
        try:
            with anyio.fail_after(NOTE_S):
                return asking is None or await asking
        except (I2VError, TimeoutError) as error:
            log.warning("records_not_read", error=str(error))
            return True

    async def _found_dry(self) -> None:
        """The dispatcher reckons with this where the queue cannot tell how many wait."""
        if anyio.current_time() - self._dry_at >= DRY_EVERY_S:
            self._dry_at = anyio.current_time()
            await self._record(self._readings.dry())

    async def _record(self, writing: Awaitable[None]) -> None:
        """Writes a reading. Where that fails, the next tick knows less, but no task is lost."""
        try:
            with anyio.fail_after(NOTE_S):
                await writing
        except (I2VError, TimeoutError) as error:
            log.warning("reading_not_written", error=str(error))
