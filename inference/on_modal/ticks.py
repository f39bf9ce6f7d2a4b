"""Ticks that are asked for: a burst of calls makes one tick now, and one more at its end.

A tick that was asked for and has not begun sees all work there is until then, so that nobody has to ask for another.
The platform runs one tick at a time, and the next waits for it.
"""

import time
from collections.abc import Awaitable, Callable

import structlog

from inference.errors import I2VError, PoolUnavailable
from inference.payments.records import Records

log = structlog.get_logger(__name__)

ASKED = "calls/tick-asked"
"""The record that a tick was asked for and has not begun."""

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
        await records.remove(ASKED)
        raise


async def begun(records: Records) -> None:
    """Says that a tick begins: who asks from now on needs another. Has to be called before the tick looks around."""
    try:
        await records.remove(ASKED)
    except I2VError as error:  # the tick itself can do without; calls fall back on the cron
        log.warning("tick_not_noted", error=str(error))
