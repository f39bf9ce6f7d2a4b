"""Workers and what they are made of: the runner, how leases are kept, the ledger, where events go."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import anyio
import anyio.to_thread
import structlog

from inference.build.engines import recipe
from inference.engines.base import Engine
from inference.engines.turns import EngineTurns
from inference.errors import SettingsError
from inference.leasing.polling import Worker
from inference.leasing.retry import Policy
from inference.leasing.runner import Runner
from inference.leasing.scratch import sweep
from inference.payments.ledger import Ledger
from inference.payments.records import Records, SqliteRecords
from inference.progress.eta import StageHistory
from inference.progress.hub import ProgressHub
from inference.progress.redis import open_hub
from inference.progress.stages import Sink
from inference.providers import is_paid
from inference.queues.base import TaskQueue
from inference.settings import Settings
from inference.task import Lease, Outcome

log = structlog.get_logger(__name__)


def build_ledger(settings: Settings, records: Records | None = None) -> Ledger:
    """The books of what was paid for, and what may be spent in a day.

    `records`: those that a platform lends; without, a file that every process of this machine shares.
    """
    return Ledger(records or SqliteRecords(settings.ledger_path), budget_usd=settings.runway_budget_usd)


WEBHOOK_PAUSES_S = (2.0, 60.0)
"""Between the tries of a call that nobody answers, doubling, for a queue without leases. A job whose end is never told
stays open there, so even five tries have to outlast the restart of an application."""


def build_policy(settings: Settings) -> Policy:
    """How leases are kept, and how often things are tried."""
    return Policy(
        heartbeat_interval_s=settings.heartbeat_interval_s,
        attempt_limit_s=settings.attempt_limit_s,
        attempts=settings.max_tries,
        patience_attempts=settings.webhook_retries,
        patience_pauses_s=WEBHOOK_PAUSES_S if settings.queue == "gmanimato" else None,
        keep_temp=not settings.auto_cleanup_temp,
    )


def clear_temp(settings: Settings) -> None:
    """Makes the temporary folder, and clears away what killed workers left there. Raises SettingsError."""
    if settings.temp_dir:
        try:
            settings.temp_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SettingsError(f"TEMP_DIR: {settings.temp_dir} cannot be made: {error.strerror}") from None
    if settings.auto_cleanup_temp:
        sweep(settings.temp_dir)


def event_hub(settings: Settings, *, needed: bool = True) -> ProgressHub | None:
    """As `open_events`, for who closes it otherwise: `close` blocks while it sends what waits."""
    if settings.redis_url is None:
        return None
    try:
        return open_hub(settings.redis_url.get_secret_value())
    except SettingsError as error:
        if needed:
            raise
        log.error("no_events", error=str(error))  # noqa: TRY400 - the message is the point
        return None


@asynccontextmanager
async def open_events(settings: Settings, *, needed: bool = True) -> AsyncIterator[ProgressHub | None]:
    """Where applications hear of the leases of this process; None where no Redis is set.

    What waits to be told is sent at the end, for some seconds at most. Raises SettingsError for a URL that is none, or
    where the package is missing; unless it is `needed`, that is a log line, and nobody hears of anything.
    """
    hub = event_hub(settings, needed=needed)
    try:
        yield hub
    finally:
        if hub is not None:
            with anyio.CancelScope(shield=True):
                await anyio.to_thread.run_sync(hub.close)


def build_runner(
    settings: Settings,
    queue: TaskQueue,
    engine: Engine | EngineTurns,
    *,
    ledger: Ledger | None = None,
    sink: Callable[[Lease], Sink] | None = None,
    hub: ProgressHub | None = None,
    history: StageHistory | None = None,
) -> Runner:
    """What runs leases; clears away what killed workers left behind.

    `hub`, `history`: as Runner has them. Raises SettingsError where the temporary folder cannot be made.
    """
    clear_temp(settings)
    return Runner(
        queue,
        engine,
        policy=build_policy(settings),
        temp_dir=settings.temp_dir,
        sink=sink,
        ledger=ledger,
        recipe=recipe(settings),
        at_once=settings.runway_concurrency if is_paid(settings.engine) else 1,
        usd_per_s=usd_per_s(settings),
        hub=hub,
        history=history,
    )


def usd_per_s(settings: Settings) -> float | None:
    """What a second of this machine's engine costs; None where that is not known, or its provider names prices."""
    if is_paid(settings.engine) or settings.gpu_usd_per_hour is None:
        return None
    return settings.gpu_usd_per_hour / 3600


def build_worker(
    settings: Settings,
    queue: TaskQueue,
    engine: Engine,
    *,
    sink: Callable[[Lease], Sink] | None = None,
    on_outcome: Callable[[Outcome], None] | None = None,
    hub: ProgressHub | None = None,
) -> Worker:
    """A polling worker. Raises SettingsError where the temporary folder cannot be made."""
    pays = is_paid(settings.engine)
    # A task that cannot be handed back is not taken before the engine is free for it: another worker may be idle.
    held = settings.concurrency if queue.hands_back or "concurrency" in settings.model_fields_set else 1
    return Worker(
        queue,
        build_runner(settings, queue, engine, ledger=build_ledger(settings) if pays else None, sink=sink, hub=hub),
        concurrency=max(held, settings.runway_concurrency) if pays else held,
        poll_interval_s=settings.poll_interval_s,
        grace_s=settings.shutdown_grace_s,
        on_outcome=on_outcome,
    )
