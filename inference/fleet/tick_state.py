"""What is left of a tick's plan while the dispatcher spends it: slots, money, and leases that go back at the end."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import anyio

from inference.fleet.plan import Plan, Rules, choices
from inference.providers import DEFAULT, PAID, PoolName, WorkerType, is_paid, provider_of
from inference.queues.base import TaskQueue
from inference.task import Lease, Task

LEASE_UNTIL_S = 26.0
"""Seconds into a tick until which leases are asked for."""


@dataclass(frozen=True, slots=True)
class Aside:
    """A lease that goes back to its queue when the tick ends."""

    queue: TaskQueue
    lease: Lease
    is_reserved: bool = False  # money was set aside for it


class TickState:
    """What is left of a plan while a tick spends it."""

    def __init__(
        self,
        plan: Plan,
        rules: Rules,
        price_usd: Callable[[Task], float | None],
        began_at: float,
        *,
        may_pay: bool,
        paid_for: frozenset[str],
        begun_usd: Mapping[str, float],
        troubles: list[str],
    ) -> None:
        """`may_pay`: there is a pool that takes money.

        `paid_for`: items whose clip is being made there, or waits there; going on with it costs nothing.
        `begun_usd`: films of which segments were paid for there, and what they cost; going on costs that much less.
        """
        self.plan, self._rules, self._price_usd = plan, rules, price_usd
        self._may_pay, self._paid_for, self._begun_usd = may_pay, paid_for, begun_usd
        self._left: dict[PoolName, int] = {DEFAULT.pool: plan.gpu, PAID.pool: plan.runway}
        self._overflow_left, self._budget_usd = plan.overflow, plan.budget_usd
        self._leases_until = began_at + LEASE_UNTIL_S
        self.sent = dict.fromkeys(self._left, 0)
        self.aside: list[Aside] = []
        self._closed: set[PoolName] = set()  # pools that did not take what was sent
        self.troubles = troubles
        self.malformed = 0

    def has_room(self, worker_type: WorkerType | None) -> bool:
        """Whether a task from the queue for a worker_type could be sent somewhere. None: a queue of all tasks."""
        if anyio.current_time() >= self._leases_until:
            return False
        free, paid = self._is_open(DEFAULT.pool), self._is_open(PAID.pool)
        if worker_type is None:
            return free or paid
        if is_paid(worker_type):
            return paid if self._may_pay else free
        return free or (paid and self._overflow_left > 0)

    def choose(self, task: Task) -> PoolName | None:
        """Where a task can go now."""
        # Tasks for Runway, and tasks that are already paid for, go there even without overflow.
        is_due = provider_of(task.provider).is_paid or self._has_begun(task)
        for name in self.choices(task):
            if not self._is_open(name):
                continue
            if name != PAID.pool:
                return name
            price_usd = self.price_usd(task)
            if price_usd is None and is_due:
                return name  # the engine says why not, before anything is paid
            if price_usd is not None and price_usd <= self._budget_usd and (is_due or self._overflow_left > 0):
                return name
        return None

    def choices(self, task: Task) -> tuple[PoolName, ...]:
        """The pools that may take a task in this fleet, first choice first."""
        found = choices(task, self._rules, has_runway=self._may_pay)
        return (PAID.pool, *found) if self._has_begun(task) else found

    def _has_begun(self, task: Task) -> bool:
        return task.item_id in self._paid_for or task.item_id in self._begun_usd

    def price_usd(self, task: Task) -> float | None:
        """What sending it to the paid pool may cost from now on; None where it cannot be made there."""
        if task.item_id in self._paid_for:
            return 0.0
        price_usd = self._price_usd(task)
        return None if price_usd is None else max(0.0, price_usd - self._begun_usd.get(task.item_id, 0.0))

    def close(self, name: PoolName, why: str) -> None:
        """A pool did not take what was sent: it is left alone for the rest of the tick."""
        self._closed.add(name)
        self.troubles.append(f"{name}: {why}")

    def count(self, task: Task, name: PoolName, price_usd: float) -> None:
        """A task was sent."""
        self.sent[name] += 1
        self._left[name] -= 1
        if name == PAID.pool:
            self._budget_usd -= price_usd
            self._overflow_left -= not provider_of(task.provider).is_paid

    def trouble(self) -> str:
        """What a person should know."""
        parts = [f"handed back {len(self.aside)}"] if self.aside else []
        parts += [f"{self.malformed} malformed"] if self.malformed else []
        parts += self.troubles
        return f"; {'; '.join(parts)}" if parts else ""

    def _is_open(self, name: PoolName) -> bool:
        return self._left[name] > 0 and name not in self._closed
