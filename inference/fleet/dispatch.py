"""The tick that leases tasks and sends each to where it will run.

A tick leases only what can start (`plan.py`), and keeps no task: each lease travels to a container at once, and one
that no pool can take is handed back before the tick ends.
"""

from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from typing import TypeVar

import anyio
import structlog

from inference.errors import (
    I2VError,
    InvalidTask,
    PoolUnavailable,
    QueueUnavailable,
    RecordsUnavailable,
)
from inference.fleet.containers import Containers, Live, Sized
from inference.fleet.plan import FIRST_CLIP_S, Fleet, Plan, Pool, Rules, plan
from inference.fleet.readings import Readings
from inference.fleet.tick_state import Aside, TickState
from inference.leasing.taking import hand_back, lease_from
from inference.payments.ledger import Ledger, paid_in_parts
from inference.providers import DEFAULT, PAID, PoolName, WorkerType, is_paid
from inference.queues.base import TaskQueue
from inference.task import Lease, Task

T = TypeVar("T")
log = structlog.get_logger(__name__)

LOOK_AHEAD: dict[PoolName, int] = {DEFAULT.pool: 8, PAID.pool: 50}
"""How many tasks that no pool can take now a tick looks past in one queue, by their first choice. Those for the GPU
move on by themselves; those for Runway can stand there until midnight, and must not hide all others."""

PROBE_AFTER_S = 600.0
"""How long a failing pool is left alone before one container without a task is asked whether it works again, while
tasks wait; twice as long after each time that it did not."""

MAX_DOUBLINGS = 4

PLAN_S, TICK_S = 22.0, 36.0
"""Seconds into a tick: looking around has to have ended; leasing (until LEASE_UNTIL_S) and sending are given up.
Handing back (6 s), the money set aside (4 s) and writing down what was done (4 s) come on top: 50 s of a minute."""

CALL_S = 10.0
"""How long a queue or a platform is waited for, one call."""

NOTE_S = 4.0
"""How long writing into the readings or the ledger may take at the end of a tick."""


class Dispatcher:
    """One tick at a time: looks, plans, leases, sends, hands back what does not fit."""

    def __init__(
        self,
        queues: Mapping[WorkerType | None, TaskQueue],
        pools: Mapping[PoolName, tuple[Sized, Containers]],
        readings: Readings,
        ledger: Ledger,
        rules: Rules,
        *,
        price_usd: Callable[[Task], float | None],
    ) -> None:
        """`queues`: a connection that hands out any task under None, or one for each worker_type.

        `price_usd`: what a task costs in the paid pool, at most; None where it cannot be made there.
        """
        self._queues, self._pools, self._readings, self._ledger, self._rules = queues, pools, readings, ledger, rules
        self._price_usd = price_usd
        self._may_pay = PAID.pool in pools
        self.troubles: list[str] = []  # of the last tick: a queue or a pool that did not do what it was asked

    async def tick(self) -> str:
        """Leases and sends what can start now; returns what was done, in one line that the readings keep, too.

        Raises QueueAuthError, QueueRefused, RecordsUnavailable, PoolUnavailable where it took too long to find out
        what there is; what was leased by then was sent or handed back.
        """
        began_at = anyio.current_time()
        self.troubles = []
        try:
            tick = await self._look_around(began_at)
        except I2VError as error:
            await self._note(f"nothing: {error}")
            raise
        try:
            with anyio.CancelScope(deadline=began_at + TICK_S):
                for worker_type, queue in self._queues.items():
                    await self._lease_from(queue, worker_type, tick)
        finally:
            with anyio.CancelScope(shield=True):
                async with anyio.create_task_group() as tasks:
                    for aside in tick.aside:
                        tasks.start_soon(self._give_back, aside)
        sent = ", ".join(f"{count} to {name}" for name, count in tick.sent.items())
        decision = f"sent {sent} ({tick.plan.why}){tick.trouble()}"
        log.log(30 if tick.troubles else 20, "dispatched", decision=decision)
        await self._note(decision)
        return decision

    async def _note(self, decision: str) -> None:
        """For people; what a tick did stands without it."""
        with anyio.move_on_after(NOTE_S), suppress(RecordsUnavailable):
            await self._readings.decided(decision)

    async def _look_around(self, began_at: float) -> TickState:
        try:
            with anyio.fail_after(PLAN_S):
                payments = await self._ledger.payments() if self._may_pay else []
                created = [payment for payment in payments if payment.status == "created"]
                paid_for = frozenset(payment.item_id for payment in created if payment.part_of is None)
                plan = await self._plan(len(paid_for))
                return TickState(
                    plan,
                    self._rules,
                    self._price_usd,
                    began_at,
                    may_pay=self._may_pay,
                    paid_for=paid_for,
                    begun_usd=paid_in_parts(payments),
                    troubles=self.troubles,
                )
        except TimeoutError:
            raise PoolUnavailable(f"records, queue and pools did not all answer within {PLAN_S:g} s") from None

    async def _plan(self, paid_for: int) -> Plan:
        waiting = await self._waiting()
        if waiting == 0:
            await self._readings.dry()
        gpu = await self._pool(DEFAULT.pool, waiting)
        assert gpu is not None  # noqa: S101 - every fleet has one
        return plan(
            Fleet(
                gpu=gpu,
                runway=await self._pool(PAID.pool, None),  # the backlog counts GPU tasks only
                waiting=waiting,
                undry_s=await self._readings.undry_s(),
                spent_usd=await self._ledger.spent_usd() if self._may_pay else 0.0,
                paid_for=paid_for,
            ),
            self._rules,
        )

    async def _pool(self, name: PoolName, waiting: int | None) -> Pool | None:
        if name not in self._pools:
            return None
        size, containers = self._pools[name]
        known = await self._readings.pool(name)
        failing = known.failing
        try:
            live = await _in_time(containers.live())
        except PoolUnavailable as error:
            # One failed look proves no outage: the pool counts as full, so that nothing overflows to a paid one.
            log.warning("pool_unknown", pool=name, error=str(error))
            self.troubles.append(f"{name}: {error}")
            live = Live(running=size.slots, waiting=0)
        else:
            for_s = await self._readings.seen_waiting(name, waits=live.waiting > 0 and live.running == 0)
            if for_s > self._rules.ready_after_s:
                failing = failing or f"no container has become ready for {for_s / 60:.0f} minutes"
        if failing and waiting != 0:
            self.troubles.append(f"{name} is failing")  # why is in the plan
        # Somebody has to wait for it: a container that only shows that it cannot work is billed, too.
        due_s = PROBE_AFTER_S * 2 ** min(known.tries, MAX_DOUBLINGS)
        if known.failing and waiting != 0 and not live.waiting and self._readings.since_s(known.failing_at) >= due_s:
            await self._probe(name, containers)
        held, clip_s = live.running + live.waiting, known.clip_s or FIRST_CLIP_S
        return Pool(slots=size.slots, held=held, engines=size.engines, clip_s=clip_s, failing=failing)

    async def _probe(self, name: PoolName, containers: Containers) -> None:
        """Asks a failing pool to show that it works again, with nobody's task at stake."""
        await self._readings.tried(name)
        try:
            await _in_time(containers.send(None))
        except PoolUnavailable as error:
            log.warning("probe_failed", pool=name, error=str(error))

    async def _waiting(self) -> int | None:
        """Tasks that wait for a GPU, as far as the queue tells tasks apart."""
        total = 0
        for worker_type, queue in self._queues.items():
            if is_paid(worker_type) and self._may_pay:
                continue
            try:
                waiting = await queue.backlog()
            except I2VError as error:
                log.warning("backlog_unknown", error=str(error))
                self.troubles.append(str(error))
                return None
            if waiting is None:
                return None
            total += waiting
        return total

    async def _lease_from(self, queue: TaskQueue, worker_type: WorkerType | None, tick: TickState) -> None:
        """Takes what fits from one queue until it is dry, everything is full, or time is up."""
        passed = dict.fromkeys(LOOK_AHEAD, 0)
        while tick.has_room(worker_type) and all(passed[each] < LOOK_AHEAD[each] for each in passed):
            try:
                lease = await lease_from(queue, limit_s=CALL_S)
            except InvalidTask as error:
                log.error("invalid_task", item_id=error.item_id, error=str(error))  # noqa: TRY400 - no traceback
                tick.malformed += 1
                passed[DEFAULT.pool] += 1
                continue
            except QueueUnavailable as error:
                if str(error) not in tick.troubles:
                    tick.troubles.append(str(error))
                return
            if lease is None:
                if not is_paid(worker_type) and not passed[DEFAULT.pool]:
                    await self._readings.dry()
                return
            if not await self._place(lease, queue, tick):
                passed[tick.choices(lease.task)[0]] += 1

    async def _place(self, lease: Lease, queue: TaskQueue, tick: TickState) -> bool:
        """Sends a lease to where it can go; whatever happens on the way, it was sent or is put aside."""
        name = tick.choose(lease.task)
        if name is None:
            tick.aside.append(Aside(queue, lease))  # fence
            return False
        price_usd = (tick.price_usd(lease.task) or 0.0) if name == PAID.pool else 0.0
        sent = False
        try:
            if price_usd:
                await self._ledger.reserve(lease.task.item_id, price_usd)  # fence
            await _in_time(self._pools[name][1].send(lease))
            sent = True
            tick.count(lease.task, name, price_usd)
            log.info("sent", item_id=lease.task.item_id, worker_id=lease.worker_id, pool=name)
        except I2VError as error:
            tick.close(name, str(error))  # fence
        finally:
            if not sent:  # nobody else knows of this lease
                tick.aside.append(Aside(queue, lease, is_reserved=price_usd > 0))  # fence
        return sent

    async def _give_back(self, aside: Aside) -> None:
        await hand_back(aside.queue, aside.lease)
        if aside.is_reserved:
            with anyio.move_on_after(NOTE_S):
                try:
                    await self._ledger.unreserve(aside.lease.task.item_id)
                except I2VError as error:
                    log.warning("still_reserved", item_id=aside.lease.task.item_id, error=str(error))


async def _in_time(call: Awaitable[T]) -> T:
    """What a platform answers. Raises PoolUnavailable where it does not."""
    try:
        with anyio.fail_after(CALL_S):
            return await call
    except TimeoutError:
        raise PoolUnavailable(f"no answer within {CALL_S:g} s") from None
