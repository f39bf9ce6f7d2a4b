"""What a platform lends the fleet: containers that take leases."""

from typing import Annotated, Protocol

from pydantic import Field

from inference.fleet.plan import Count
from inference.task import Lease, Value


class Live(Value):
    """Leases in a pool, as its platform counts them."""

    running: Count
    waiting: Count  # sent there, and not in a container yet


class Containers(Protocol):
    """A pool of containers, as the platform that runs it shows it. Raises PoolUnavailable, from any method."""

    async def live(self) -> "Live":
        """What is running there now, and what waits for a container."""
        ...

    async def send(self, lease: Lease | None) -> None:
        """Starts a container on a lease, or gives it to one that is warm; None only asks whether it can work."""
        ...


class Sized(Value):
    """How large a pool may grow."""

    slots: Count
    engines: Annotated[int, Field(ge=1)]
