"""The executor: what runs leases and direct requests on one engine, and knows when nothing more should begin here.

    leasing/polling.py     a loop takes leases from a queue               ─┐
    fleet/warm_worker.py   a container is sent leases, and takes the next  ├▶ Executor ▶ Runner ▶ EngineTurns ▶ Engine
    on_runpod/worker.py    an endpoint is sent jobs, some with a photo    ─┘

How work arrives, and who is told how it ended, is the business of those three. Faults are counted here for all of
them, because they are faults of the machine, whichever lease met them. Direct requests count where they come through
`run`, as on an endpoint; on Modal they take a turn at the engine and count for nothing.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import anyio
from anyio.abc import TaskGroup

from inference.engines.turns import EngineTurns
from inference.errors import EngineLost, I2VError
from inference.leasing.runner import Runner
from inference.leasing.taking import RELEASE_LIMIT_S
from inference.task import Lease, Outcome

MAX_FAULTS_IN_A_ROW = 3
"""After this many leases or direct requests that ended badly, none of them through its own fault, nothing more begins;
a video in between starts the count anew. A fleet gives up on a whole pool of machines after as many."""


@dataclass(eq=False)
class _Call:
    """Work that a platform brought, in a task of the executor."""

    scope: anyio.CancelScope = field(default_factory=anyio.CancelScope)
    ended: anyio.Event = field(default_factory=anyio.Event)


class Executor:
    """Runs work on one engine, several pieces at once, until it is told to stop.

    A loop that owns its process calls `run_lease` from tasks of its own. Where a platform brings the work, `serve` runs
    beside the calls and `run` puts each into a task of the executor: a platform cancels its calls within milliseconds
    when a machine is preempted, and handing a lease back takes longer.
    """

    def __init__(self, turns: EngineTurns) -> None:
        self.turns = turns
        self.stopping = anyio.Event()  # nothing more may begin, because somebody said so
        self.fault: I2VError | None = None  # why nothing more should begin, where the engine itself is not the reason
        self.faults_in_a_row = 0
        self.leases = 0  # that run now
        self.worked_at = -float("inf")  # when the last of them ended
        self._calls: set[_Call] = set()
        self._group: TaskGroup | None = None
        self._started, self._closing, self._closed = anyio.Event(), anyio.Event(), anyio.Event()

    @property
    def broken(self) -> bool:
        """Nothing more should be sent here: whatever is wrong ends with this process, if it ends at all."""
        return self.fault is not None or self.turns.lost

    # What goes wrong

    def worked(self) -> None:
        """A video was made."""
        self.faults_in_a_row = 0

    def faulted(self, why: str) -> None:
        """Counts a bad end that the work did not cause: the next piece of work may end the same way here."""
        self.faults_in_a_row += 1
        if self.faults_in_a_row >= MAX_FAULTS_IN_A_ROW:
            self.give_up(EngineLost(f"{MAX_FAULTS_IN_A_ROW} tasks in a row ended badly here: {why}"))

    def give_up(self, fault: I2VError) -> None:
        """Begins nothing more. The first reason stays; later ones are ignored."""
        self.fault = self.fault or fault

    # Work

    async def run_lease(self, runner: Runner, lease: Lease) -> Outcome:
        """Runs one lease to its end and counts faults. Hands it back unstarted where nothing more should begin.

        Outcomes that tell the worker what it should do are no faults: what that means depends on who runs this.
        """
        if self.broken:
            await runner.hand_back(lease)  # fence
            return Outcome(status="released", item_id=lease.task.item_id, error="this worker cannot work any more")
        self.leases += 1
        try:
            outcome = await runner.run(lease)
        finally:
            self.leases -= 1
            self.worked_at = anyio.current_time()
        if outcome.status == "completed":
            self.worked()
        elif outcome.machine_at_fault and outcome.worker_should is None:
            self.faulted(str(outcome.error))
        return outcome

    async def run(self, work: Callable[[], Awaitable[None]], *, lets_go: bool = False) -> None:
        """Runs `work` in a task of the executor; ends with it, or when the executor is closed.

        A caller that is cancelled cancels the work, and waits for its end unless it `lets_go`; the work itself goes on
        to its end in either case. Raises EngineLost where nothing was begun, because the executor is closed.
        """
        await self._started.wait()
        if self._group is None or self._closing.is_set():
            raise EngineLost("this worker is stopping")
        call = _Call()
        self._calls.add(call)
        self._group.start_soon(self._run, work, call)
        try:
            await call.ended.wait()
        except anyio.get_cancelled_exc_class():
            call.scope.cancel()  # fence
            if not lets_go:
                with anyio.CancelScope(shield=True):
                    await call.ended.wait()
            raise

    async def _run(self, work: Callable[[], Awaitable[None]], call: _Call) -> None:
        try:
            with call.scope:
                await work()
        finally:
            self._calls.discard(call)
            call.ended.set()

    # Life

    async def serve(self, first: Callable[[], Awaitable[None]] | None = None) -> None:
        """Runs beside the calls until `close`; everything that is held then is handed back first.

        `first` is done before any work begins.
        """
        try:
            async with anyio.create_task_group() as self._group:
                if first is not None:
                    await first()
                self._started.set()
                await self._closing.wait()
                self._group.cancel_scope.cancel()  # fence
        finally:
            self.stopping.set()
            self._closing.set()
            self._started.set()
            self._closed.set()

    async def stop(self, grace_s: float) -> None:
        """Gives what runs so many seconds, then cancels it. Whoever comes later has to look at `stopping`."""
        self.stopping.set()
        await self._until_ended(grace_s)
        for call in self._calls:
            call.scope.cancel()
        await self._until_ended(RELEASE_LIMIT_S)

    async def close(self) -> None:
        """Hands back what is held, and ends `serve`, which has to be running or about to."""
        self.stopping.set()
        self._closing.set()
        await self._closed.wait()  # fence

    async def _until_ended(self, limit_s: float) -> None:
        with anyio.move_on_after(limit_s):
            for call in tuple(self._calls):
                await call.ended.wait()
