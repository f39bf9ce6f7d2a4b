"""What is left of a tick's plan while the dispatcher spends it: slots, money, and leases that go back at the end."""

from dataclasses import dataclass

import anyio

from inference.fleet.plan import Plan, Rules, choices, cost_usd
from inference.fleet.readings import PoolName
from inference.queues.base import TaskQueue
from inference.queues.item import Lane, lane
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
        began_at: float,
        *,
        has_runway: bool,
        paid_for: frozenset[str],
        troubles: list[str],
    ) -> None:
        """`paid_for`: items whose clip is being made at Runway, or waits there; going on with it costs nothing."""
        self.plan, self._rules, self._has_runway, self._paid_for = plan, rules, has_runway, paid_for
        self._left: dict[PoolName, int] = {"gpu": plan.gpu, "runway": plan.runway}
        self._overflow_left, self._budget_usd = plan.overflow, plan.budget_usd
        self._leases_until = began_at + LEASE_UNTIL_S
        self.sent: dict[PoolName, int] = {"gpu": 0, "runway": 0}
        self.aside: list[Aside] = []
        self._closed: set[PoolName] = set()  # pools that did not take what was sent
        self.troubles = troubles
        self.malformed = 0

    def has_room(self, kind: Lane | None) -> bool:
        """Whether any task of a kind could be sent somewhere."""
        if anyio.current_time() >= self._leases_until:
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
        is_due = lane(task.provider) == "runway" or task.item_id in self._paid_for  # there, overflow or not
        for name in self.choices(task):
            if not self._is_open(name):
                continue
            if name == "gpu":
                return name
            price_usd = self.price_usd(task)
            if price_usd is None and is_due:
                return name  # the engine says why not, before anything is paid
            if price_usd is not None and price_usd <= self._budget_usd and (is_due or self._overflow_left > 0):
                return name
        return None

    def choices(self, task: Task) -> tuple[PoolName, ...]:
        """The pools that may take a task in this fleet, first choice first."""
        found = choices(task, self._rules, has_runway=self._has_runway)
        return ("runway", *found) if task.item_id in self._paid_for else found

    def price_usd(self, task: Task) -> float | None:
        """What sending it to Runway may cost from now on; None where Runway cannot make it."""
        return 0.0 if task.item_id in self._paid_for else cost_usd(task, self._rules)

    def close(self, name: PoolName, why: str) -> None:
        """A pool did not take what was sent: it is left alone for the rest of the tick."""
        self._closed.add(name)
        self.troubles.append(f"{name}: {why}")

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
        return self._left[name] > 0 and name not in self._closed
