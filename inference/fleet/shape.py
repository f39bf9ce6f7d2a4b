"""The size of a fleet and its limits, worked out of the settings."""

from inference.fleet.containers import Sized
from inference.fleet.plan import Rules
from inference.providers import PoolName
from inference.settings import Settings
from inference.task import Value

INPUTS = 2
"""Leases at once in a GPU container: one generates while the other downloads its photo or uploads its video."""


COLD_START_MARGIN_S = 60.0
"""A lease that waits for a container has to outlive the container's start by this."""


TRANSFERS_S = 600.0
"""How much longer than its generation a job may take: storage.TRANSFER_LIMIT_S, or some tries of ordinary transfers."""


class Shape(Value):
    """What a platform has room for."""

    sizes: dict[PoolName, Sized]  # of the pools there are
    startup_timeout_s: float  # in which a container has to be ready

    def lease_s(self, settings: Settings) -> float:
        """For how long a dispatcher leases: a task waits for a container's start, and nobody beats for it meanwhile."""
        return max(settings.lease_duration_s, self.startup_timeout_s + COLD_START_MARGIN_S)


def rules(settings: Settings, shape: Shape) -> Rules:
    """What the operator decided."""
    return Rules(
        ready_after_s=2.0 * shape.startup_timeout_s,
        overflow_after_s=settings.overflow_after_s,
        overflow_wan_local=settings.overflow_wan_local,
        budget_usd=settings.runway_budget_usd,
    )


def execution_limit_s(settings: Settings) -> float:
    """How long a job may take in a container where another has its turn before it: beyond all limits of its own."""
    return INPUTS * settings.attempt_limit_s + TRANSFERS_S


def for_a_cold_start(settings: Settings, shape: Shape) -> Settings:
    """Settings of who leases for a container."""
    return settings.model_copy(update={"lease_duration_s": shape.lease_s(settings)})
