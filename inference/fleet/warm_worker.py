"""A container's side of a fleet: runs the leases it is sent and, while it is warm, takes the next ones itself.

Work runs in tasks of the host, not of the calls that brought it: a platform cancels its calls within milliseconds
when a container is preempted, and handing a lease back takes longer. Whoever owns the process runs `serve` beside
the calls, and `close` on the way out.
"""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import anyio
import structlog
from anyio.abc import TaskGroup

from inference.engines.base import Job
from inference.errors import EngineLost, I2VError, InvalidTask, QueueUnavailable
from inference.fleet.readings import FAULTS, Board
from inference.leasing.runner import Runner
from inference.leasing.taking import hand_back, lease_from
from inference.providers import PoolName
from inference.queues.base import TaskQueue
from inference.task import GenerationRequest, Lease, Outcome, Task, Video

log = structlog.get_logger(__name__)

LOOK_AHEAD = 3
"""How many tasks for other pools a warm container looks past before it leaves the queue to the next tick."""

DRY_EVERY_S = 30.0
"""How often a container that finds the queue empty says so on the board."""

OUTAGE_RESTS: Mapping[PoolName, tuple[PoolName, ...]] = {"gpu": ("gpu", "runway"), "runway": ("runway",)}
"""Pools to which nothing should be sent for a while, by the one that met somebody's outage."""

NOTE_S = 10.0
"""How long the board is waited for."""


class BrokenEngine:
    """What stands for an engine that could not be loaded: every task goes back, and the fleet's board is told why.

    No task fails for it, for none is at fault: the reason is in what the cron says and in the answer to a call.
    """

    name = "broken"
    stages: Mapping[str, float] = {"load": 1.0}

    def __init__(self, fault: I2VError) -> None:
        self._fault = fault

    async def generate(self, request: GenerationRequest, photo: Path, folder: Path, job: Job) -> Video:  # noqa: ARG002
        """Raises EngineLost."""
        raise EngineLost(f"the engine could not be loaded: {self._fault}")


@dataclass
class _Call:
    """One call of the platform: a lease, and what its slot takes from the queue after it."""

    drain_until: float
    scope: anyio.CancelScope = field(default_factory=anyio.CancelScope)
    ended: anyio.Event = field(default_factory=anyio.Event)
    outcomes: list[Outcome] = field(default_factory=list)


class Host:
    """Runs what one container is sent, as many leases at once as the platform sends it."""

    def __init__(
        self,
        pool: PoolName,
        queue: TaskQueue,
        runner: Runner,
        board: Board,
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
        self._pool, self._queue, self._runner, self._board = pool, queue, runner, board
        self._fault, self._fits, self._is_current = fault, fits, is_current
        self._drain_s, self._linger_s, self._poll_interval_s = drain_s, linger_s, poll_interval_s
        self._group: TaskGroup | None = None
        self._started, self._closing = anyio.Event(), anyio.Event()
        self._closed = anyio.Event()
        self._working = 0
        self._is_lingering = False
        self._worked_at = self._dry_at = -float("inf")
        self._faults = 0
        self.broken = False  # nothing more should be sent to this container

    @property
    def stages(self) -> Mapping[str, float]:
        """What its engine reports, with each stage's relative duration."""
        return self._runner.engine_stages

    async def serve(self) -> None:
        """Runs beside the calls until `close`; everything that is held then is handed back first."""
        try:
            async with anyio.create_task_group() as self._group:
                if self._fault is not None:
                    await self._record(self._board.faulted(self._pool, str(self._fault), certain=True))
                self._started.set()
                await self._closing.wait()
                self._group.cancel_scope.cancel()  # fence
        finally:
            self._closing.set()
            self._started.set()
            self._closed.set()

    async def close(self) -> None:
        """Hands back what is held, and ends `serve`, which has to be running or about to."""
        self._closing.set()
        await self._closed.wait()  # fence

    async def run(self, lease: Lease | None, *, drain: bool = True) -> list[Outcome]:
        """Runs a lease, then whatever this call may take from the queue; None only shows that this pool can work.

        Without `drain`, that one lease alone. A call that is cancelled hands its lease back, and does so to its end
        after the call is gone.
        """
        await self._started.wait()
        if self._group is None or self._closing.is_set():
            if lease is not None:  # it came too late, and nobody else knows of it
                await hand_back(self._queue, lease)  # fence
            raise EngineLost("this container is stopping")
        drain_s = self._drain_s if drain else 0.0
        call = _Call(drain_until=anyio.current_time() + drain_s)
        self._group.start_soon(self._work, lease, call)
        try:
            await call.ended.wait()
        except anyio.get_cancelled_exc_class():
            call.scope.cancel()  # fence
            raise
        return call.outcomes

    async def render(self, request: GenerationRequest, photo: Path, folder: Path, job: Job) -> Video:
        """One video in `folder` for somebody who has no task in the queue, in turn with those who have. One try.

        Raises why there is no engine, and as Engine.generate.
        """
        if self._fault is not None:
            raise self._fault
        return await self._runner.generate(request, photo, folder, job)

    async def _work(self, lease: Lease | None, call: _Call) -> None:
        try:
            with call.scope:
                if lease is None and self._fault is None:
                    await self._record(self._board.worked(self._pool))
                while lease is not None or (lease := await self._next(call)) is not None:
                    outcome = await self._run(lease)
                    call.outcomes.append(outcome)
                    if outcome.worker_should is not None:  # the next task would end the same way
                        return
                    lease = None
        finally:
            call.ended.set()

    async def _run(self, lease: Lease) -> Outcome:
        if self.broken:
            await hand_back(self._queue, lease)  # fence
            return Outcome(status="released", item_id=lease.task.item_id, error="this container cannot work any more")
        self._working += 1
        try:
            outcome = await self._runner.run(lease)
        finally:
            self._working -= 1
            self._worked_at = anyio.current_time()
        await self._judge(outcome)
        return outcome

    async def _judge(self, outcome: Outcome) -> None:
        """Tells the board how it went, and finds out whether this container should go on."""
        if outcome.status == "completed":
            self._faults = 0
            clip_s = sum(outcome.stage_seconds.get(stage, 0.0) for stage in self.stages)
            await self._record(self._board.worked(self._pool, clip_s))
        elif outcome.machine_at_fault:
            self._faults += 1
            is_lost = outcome.status == "released" or self._runner.engine_hung
            self.broken = self.broken or is_lost or self._fault is not None or self._faults >= FAULTS
            # Weights that do not load here load nowhere, and settings are the same everywhere; a machine that was
            # lost is one of many.
            certain = self._fault is not None or outcome.worker_should == "stop"
            await self._record(self._board.faulted(self._pool, str(outcome.error), certain=certain))
        elif outcome.worker_should == "wait":
            # A new container would not help. The pool for Runway is the provider; on a GPU it is the queue's storage
            # that is away, and were only this pool to rest, its tasks would overflow to Runway without their photos.
            for pool in OUTAGE_RESTS[self._pool]:
                await self._record(self._board.faulted(pool, str(outcome.error)))

    async def _next(self, call: _Call) -> Lease | None:
        """The next task this call may take: at once while there are some, then asking again for a while."""
        while self._may_take(call):
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
            waits_on = self._working > 0 or anyio.current_time() - self._worked_at < self._linger_s
            if self._is_lingering or not waits_on:
                return None
            self._is_lingering = True
            try:
                await anyio.sleep(self._poll_interval_s)
            finally:
                self._is_lingering = False
        return None

    def _may_take(self, call: _Call) -> bool:
        return not self.broken and self._fault is None and anyio.current_time() < call.drain_until

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
            await self._record(self._board.dry())

    async def _record(self, writing: Awaitable[None]) -> None:
        """A board that cannot be written costs a reading, not a task."""
        try:
            with anyio.fail_after(NOTE_S):
                await writing
        except (I2VError, TimeoutError) as error:
            log.warning("board_not_written", error=str(error))
