"""How many tasks a tick may lease for which pool: decided from numbers alone.

What a task may do goes by the queue's hint at a provider:

    hint             GPU pool                        Runway pool
    none             first choice                    on overflow
    wan_local        always                          on overflow, where I2V_OVERFLOW_WAN_LOCAL allows it
    a Runway model   only where there is no key      always, where there is a key
    one not known    always: see providers.py        never
    (paid for there) where Runway has no room        first choice, and costs nothing more

Overflow: the GPU pool is failing, or the expected wait passes a limit. The wait is (waiting + held) x seconds per
clip / engines where the queue can count what waits. Where it cannot, it is the time since the queue was last seen
empty, for nothing in it waits longer, and only while the GPU pool is full. Runway has its own limits: the slots of
its concurrency tier, and dollars a day.
"""

import math
from typing import Annotated

from pydantic import Field

from inference.payments.ledger import Ledger
from inference.providers import DEFAULT, PAID, PoolName, is_known, provider_of
from inference.task import Task, Value

FIRST_CLIP_S = 60.0
"""Seconds per clip until one was measured: on the slow side, so that a cold fleet overflows early, not late."""

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
    paid_for: Count = 0  # clips at Runway that are paid and not delivered: going on with one costs nothing


class Rules(Value):
    """What the operator decided."""

    ready_after_s: Annotated[float, Field(gt=0)] = 1800.0  # a container that is not there by then never will be
    overflow_after_s: Annotated[float, Field(ge=0)] = 600.0
    overflow_wan_local: bool = False
    budget_usd: Annotated[float, Field(ge=0)] = 10.0  # a day


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
    slots = runway.free if runway and (budget_usd > 0 or fleet.paid_for) else 0
    return Plan(
        gpu=gpu.free,
        runway=slots,
        overflow=min(slots, too_many) if budget_usd > 0 else 0,
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
    provider = provider_of(task.provider)
    if provider.is_paid:
        return (provider.pool,) if has_runway else (DEFAULT.pool,)
    asks_for_it = rules.overflow_wan_local and is_known(task.provider)
    may_overflow = has_runway and (not task.provider or asks_for_it)
    return (provider.pool, PAID.pool) if may_overflow else (provider.pool,)


async def may_stay(task: Task, ledger: Ledger, *, has_runway: bool) -> bool:
    """Whether a warm GPU container keeps a task that it took from the queue itself. Raises RecordsUnavailable."""
    return not has_runway or (not provider_of(task.provider).is_paid and not await ledger.is_paid_for(task.item_id))
