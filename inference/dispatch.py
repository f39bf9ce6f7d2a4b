"""How many tasks to lease for which pool, and the tick that leases them and sends each to where it will run.

`plan` decides from numbers alone. What a task may do goes by the queue's hint at a provider:

    hint             GPU pool                        Runway pool
    none             first choice                    on overflow
    wan_local        always                          on overflow, where I2V_OVERFLOW_WAN_LOCAL allows it
    a Runway model   only where there is no key      always, where there is a key

Overflow: the GPU pool is failing, or the expected wait passes a limit. The wait is (waiting + held) x seconds per
clip / engines where the queue can count what waits. Where it cannot, it is the time since the queue was last seen
empty, for nothing in it waits longer, and only while the GPU pool is full. Runway has its own limits: the slots of
its concurrency tier, and dollars a day.

A tick leases only what can start, and keeps no task: each lease travels to a container at once, and one that no pool
can take is handed back before the tick ends.
"""

import math
from collections.abc import Mapping
from typing import Annotated, Protocol

import anyio
import structlog
from pydantic import Field

from inference.board import Board, PoolName
from inference.engines.runway_models import model_for
from inference.errors import I2VError, InvalidRequest, InvalidTask, PoolUnavailable, QueueUnavailable
from inference.keeper import hand_back
from inference.ledger import Ledger
from inference.queues.base import TaskQueue
from inference.queues.item import Lane, lane
from inference.task import Lease, Task, Value
from inference.worker import lease_from

log = structlog.get_logger(__name__)

FIRST_CLIP_S = 60.0
"""Seconds per clip until one was measured: on the slow side, so that a cold fleet overflows early, not late."""

LOOK_AHEAD = 8
"""How many tasks that no pool can take now a tick looks past, in a queue that does not hand out by kind."""

PROBE_AFTER_S = 600.0
"""How long a failing pool is left alone before one container without a task is asked whether it works again."""

TICK_S = 40.0
"""When a tick stops leasing: one call (10 s) and what it hands back (6 s) fit in before the next minute."""

Count = Annotated[int, Field(ge=0)]


class Pool(Value):
    """One pool of containers as a tick finds it."""

    slots: Count  # leases that it can hold at once
    held: Count  # leases that are running there or on their way
    engines: Annotated[int, Field(ge=1)]  # generations at once
    clip_s: Annotated[float, Field(gt=0)] = FIRST_CLIP_S  # of one generation
    failing: str | None = None  # why it cannot work

    @property
    def free(self) -> int:
        """Leases that could start now."""
        return 0 if self.failing else max(0, self.slots - self.held)


class Fleet(Value):
    """Everything a plan is made from, but the rules."""

    gpu: Pool
    runway: Pool | None = None  # None: no key, so that hints at Runway are only hints
    waiting: Count | None = None  # tasks in the queue; None where it cannot tell
    undry_s: Annotated[float, Field(ge=0)] = 0.0  # since the queue was last seen empty
    spent_usd: Annotated[float, Field(ge=0)] = 0.0  # at Runway today, money set aside included


class Rules(Value):
    """What the operator decided."""

    overflow_after_s: Annotated[float, Field(ge=0)] = 600.0
    overflow_wan_local: bool = False
    budget_usd: Annotated[float, Field(ge=0)] = 10.0  # a day
    runway_model: str = "gen4_turbo"


class Plan(Value):
    """What may be leased in one tick."""

    gpu: Count = 0
    runway: Count = 0
    overflow: Count = 0  # how many of `runway` may be tasks that a GPU would take, too
    budget_usd: Annotated[float, Field(ge=0)] = 0.0  # for all of `runway` together
    wait_s: float | None = 0.0  # expected; None: for as long as the GPU pool fails
    why: str = ""


def plan(fleet: Fleet, rules: Rules) -> Plan:
    """How many tasks to lease for which pool. See the module's table."""
    gpu, runway = fleet.gpu, fleet.runway
    wait_s: float | None
    if fleet.waiting is not None:
        wait_s = (fleet.waiting + gpu.held) * gpu.clip_s / gpu.engines
        too_many = max(0, math.ceil((wait_s - rules.overflow_after_s) * gpu.engines / gpu.clip_s))
    else:
        wait_s = 0.0 if gpu.free else fleet.undry_s
        too_many = runway.free if runway and wait_s > rules.overflow_after_s else 0
    if gpu.failing:
        wait_s, too_many = None, runway.free if runway else 0
    budget_usd = max(0.0, rules.budget_usd - fleet.spent_usd)
    slots = runway.free if runway and budget_usd > 0 else 0
    return Plan(
        gpu=gpu.free,
        runway=slots,
        overflow=min(slots, too_many),
        budget_usd=budget_usd if slots else 0.0,
        wait_s=wait_s,
        why=_why(fleet, wait_s, budget_usd),
    )


def _why(fleet: Fleet, wait_s: float | None, budget_usd: float) -> str:
    gpu, runway = fleet.gpu, fleet.runway
    waiting = "?" if fleet.waiting is None else fleet.waiting
    parts = [f"waiting {waiting}", f"gpu {gpu.held}/{gpu.slots}" + (f" failing: {gpu.failing}" if gpu.failing else "")]
    if wait_s is not None:
        parts.append(f"expected wait {wait_s:.0f} s")
    if runway is not None:
        failing = f" failing: {runway.failing}" if runway.failing else ""
        parts.append(f"runway {runway.held}/{runway.slots}{failing}, ${budget_usd:.2f} left today")
    return ", ".join(parts)


def choices(task: Task, rules: Rules, *, has_runway: bool) -> tuple[PoolName, ...]:
    """The pools that may take a task, first choice first."""
    if lane(task.provider) == "runway":
        return ("runway",) if has_runway else ("gpu",)
    may_overflow = has_runway and (task.provider != "wan_local" or rules.overflow_wan_local)
    return ("gpu", "runway") if may_overflow else ("gpu",)


def cost_usd(task: Task, rules: Rules) -> float | None:
    """What a task costs at Runway, at most; None where Runway cannot make it."""
    try:
        return model_for(task.provider, rules.runway_model).cost_usd(task.duration_s)
    except InvalidRequest:
        return None


class Containers(Protocol):
    """A pool of containers, as the platform that runs it shows it. Raises PoolUnavailable, from any method."""

    async def held(self) -> int:
        """Leases that are running there, and those on their way."""
        ...

    async def send(self, lease: Lease | None) -> None:
        """Starts a container on a lease, or gives it to one that is warm; None only asks whether it can work."""
        ...


class Sized(Value):
    """How large a pool may grow."""

    slots: Count
    engines: Annotated[int, Field(ge=1)]


class Dispatcher:
    """One tick at a time: looks, plans, leases, sends, hands back what does not fit."""

    def __init__(
        self,
        queues: Mapping[Lane | None, TaskQueue],
        pools: Mapping[PoolName, tuple[Sized, Containers]],
        board: Board,
        ledger: Ledger,
        rules: Rules,
    ) -> None:
        """`queues`: a connection that hands out any task under None, or one for each kind of task."""
        self._queues, self._pools, self._board, self._ledger, self._rules = queues, pools, board, ledger, rules

    async def tick(self) -> str:
        """Leases and sends what can start now; returns what was done, in one line that is also on the board.

        Raises QueueAuthError, QueueRefused, RecordsUnavailable; what was leased by then was sent or handed back.
        """
        tick = _Tick(await self._plan(), self._rules, has_runway="runway" in self._pools)
        try:
            for kind, queue in self._queues.items():
                await self._lease_from(queue, kind, tick)
        finally:
            for lease in tick.aside:
                await hand_back(self._queue_of(lease), lease)
        decision = f"sent {tick.sent['gpu']} to gpu, {tick.sent['runway']} to runway ({tick.plan.why}){tick.trouble()}"
        log.log(30 if tick.troubles else 20, "dispatched", decision=decision)
        await self._board.decided(decision)
        return decision

    async def _plan(self) -> Plan:
        gpu = await self._pool("gpu")
        assert gpu is not None  # noqa: S101 - every fleet has one
        waiting = await self._waiting()
        if waiting == 0:
            await self._board.dry()
        return plan(
            Fleet(
                gpu=gpu,
                runway=await self._pool("runway"),
                waiting=waiting,
                undry_s=await self._board.undry_s(),
                spent_usd=await self._ledger.spent_usd() if "runway" in self._pools else 0.0,
            ),
            self._rules,
        )

    async def _pool(self, name: PoolName) -> Pool | None:
        if name not in self._pools:
            return None
        size, containers = self._pools[name]
        known = await self._board.pool(name)
        if known.failing and self._board.since_s(known.failing_at) >= PROBE_AFTER_S:
            await self._probe(name, containers)
        failing = known.failing
        try:
            held = await containers.held()
        except PoolUnavailable as error:
            held, failing = size.slots, str(error)
        return Pool(
            slots=size.slots, held=held, engines=size.engines, clip_s=known.clip_s or FIRST_CLIP_S, failing=failing
        )

    async def _probe(self, name: PoolName, containers: Containers) -> None:
        """Asks a failing pool to show that it works again, with nobody's task at stake."""
        await self._board.tried(name)
        try:
            await containers.send(None)
        except PoolUnavailable as error:
            log.warning("probe_failed", pool=name, error=str(error))

    async def _waiting(self) -> int | None:
        total = 0
        for queue in self._queues.values():
            try:
                waiting = await queue.backlog()
            except I2VError as error:
                log.warning("backlog_unknown", error=str(error))
                return None
            if waiting is None:
                return None
            total += waiting
        return total

    async def _lease_from(self, queue: TaskQueue, kind: Lane | None, tick: "_Tick") -> None:
        """Takes what fits from one queue until it is dry, everything is full, or time is up."""
        while tick.has_room(kind) and len(tick.aside) < LOOK_AHEAD:
            try:
                lease = await lease_from(queue)
            except InvalidTask as error:
                log.error("invalid_task", item_id=error.item_id, error=str(error))  # noqa: TRY400 - no traceback
                tick.malformed += 1
                if tick.malformed > LOOK_AHEAD:
                    return
                continue
            except QueueUnavailable as error:
                tick.troubles.append(str(error))
                return
            if lease is None:
                if kind != "runway" and not tick.aside:
                    await self._board.dry()
                return
            await self._place(lease, queue, tick)

    async def _place(self, lease: Lease, queue: TaskQueue, tick: "_Tick") -> None:
        name = tick.choose(lease.task)
        if name is None:
            tick.aside.append(lease)
            return
        price_usd = cost_usd(lease.task, self._rules) or 0.0 if name == "runway" else 0.0
        try:
            if name == "runway":
                await self._ledger.reserve(lease.task.item_id, price_usd)
            await self._pools[name][1].send(lease)
        except I2VError as error:
            tick.troubles.append(f"{name}: {error}")
            tick.closed.add(name)
            await hand_back(queue, lease)
            if name == "runway":
                await self._ledger.unreserve(lease.task.item_id)
        except BaseException:  # this container is stopped: nobody else knows of this lease
            await hand_back(queue, lease)
            raise
        else:
            tick.count(lease.task, name, price_usd)
            log.info("sent", item_id=lease.task.item_id, worker_id=lease.worker_id, pool=name)

    def _queue_of(self, lease: Lease) -> TaskQueue:
        return self._queues[None] if None in self._queues else self._queues[lane(lease.task.provider)]


class _Tick:
    """What is left of a plan while a tick spends it."""

    def __init__(self, plan: Plan, rules: Rules, *, has_runway: bool) -> None:
        self.plan, self._rules, self._has_runway = plan, rules, has_runway
        self._left: dict[PoolName, int] = {"gpu": plan.gpu, "runway": plan.runway}
        self._overflow_left, self._budget_usd = plan.overflow, plan.budget_usd
        self._ends_at = anyio.current_time() + TICK_S
        self.sent: dict[PoolName, int] = {"gpu": 0, "runway": 0}
        self.aside: list[Lease] = []  # leased, and no pool can take them now
        self.closed: set[PoolName] = set()  # pools that did not take what was sent
        self.troubles: list[str] = []
        self.malformed = 0

    def has_room(self, kind: Lane | None) -> bool:
        """Whether any task of a kind could be sent somewhere."""
        if anyio.current_time() >= self._ends_at:
            return False
        gpu, runway = self._is_open("gpu"), self._is_open("runway")
        match kind:
            case "wan":
                return gpu or (runway and self._overflow_left > 0)
            case "runway":
                return runway if self._has_runway else gpu
            case _:
                return gpu or runway

    def choose(self, task: Task) -> PoolName | None:
        """Where a task can go now."""
        by_hint = lane(task.provider) == "runway"
        for name in choices(task, self._rules, has_runway=self._has_runway):
            if not self._is_open(name):
                continue
            if name == "gpu":
                return name
            price_usd = cost_usd(task, self._rules)
            if price_usd is None and by_hint:
                return name  # the engine says why not, before anything is paid
            if price_usd is not None and price_usd <= self._budget_usd and (by_hint or self._overflow_left > 0):
                return name
        return None

    def count(self, task: Task, name: PoolName, price_usd: float) -> None:
        """A task was sent."""
        self.sent[name] += 1
        self._left[name] -= 1
        if name == "runway":
            self._budget_usd -= price_usd
            self._overflow_left -= lane(task.provider) != "runway"

    def trouble(self) -> str:
        """What a person should know."""
        parts = [f"handed back {len(self.aside)}"] if self.aside else []
        parts += [f"{self.malformed} malformed"] if self.malformed else []
        parts += self.troubles
        return f"; {'; '.join(parts)}" if parts else ""

    def _is_open(self, name: PoolName) -> bool:
        return self._left[name] > 0 and name not in self.closed
