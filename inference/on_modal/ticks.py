"""Ticks that are asked for: a burst of calls makes one tick now, and one more at its end.

A tick that was asked for and has not begun sees all work there is until then, so that nobody has to ask for another.
The platform runs one tick at a time, and the next waits for it.
"""

import time
from collections.abc import Awaitable, Callable

import anyio
import structlog

from inference.build.extras import needing_extra
from inference.errors import I2VError, PoolUnavailable
from inference.payments.records import Records
from inference.settings import Settings

log = structlog.get_logger(__name__)

ASKED = "calls/tick-asked"
"""The record that a tick was asked for and has not begun."""

SWEEP_S = 5.0
"""How long a sweep may take: what it leaves of the platform's limit is the tick's."""

Spawn = Callable[[], Awaitable[None]]
"""Starts a tick, or puts it behind the one that runs. Raises PoolUnavailable."""


async def ask(records: Records, spawn: Spawn) -> None:
    """Makes sure that a tick begins from now on. Raises RecordsUnavailable, PoolUnavailable.

    Where this process dies between the record and the spawn, the next tick of the cron removes the record.
    """
    if not await records.add(ASKED, f"{time.time():.0f}"):
        return
    try:
        await spawn()
    except PoolUnavailable:
        await records.remove(ASKED)  # fence
        raise


async def begun(records: Records) -> None:
    """Says that a tick begins: who asks from now on needs another. Has to be called before the tick looks around."""
    try:
        await records.remove(ASKED)  # fence
    except I2VError as error:  # the tick itself can do without; calls fall back on the cron
        log.warning("tick_not_noted", error=str(error))


async def sweep(settings: Settings) -> None:
    """Looks for jobs of dead holders, before a tick leases them; goes without where the table does not answer."""
    with needing_extra("push", "a queue in PostgreSQL"):
        from inference.push.opening import open_jobs  # noqa: PLC0415 - an extra
    try:
        with anyio.fail_after(SWEEP_S):
            async with open_jobs(settings) as jobs:
                await jobs.sweep()
    except (I2VError, TimeoutError) as error:
        log.warning("not_swept", error=str(error))
