"""One container on Modal: its calls carry JSON, and a `WarmWorker` does what they ask."""

import asyncio
import secrets
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import anyio
import anyio.to_thread
import structlog
from pydantic import ValidationError

from inference import logs
from inference.build.engines import load_engine
from inference.build.queues import open_queue
from inference.build.workers import build_ledger, build_runner, open_events
from inference.engines.base import Engine, Job
from inference.errors import EngineLost, I2VError
from inference.fleet.opening import version
from inference.fleet.plan import may_stay
from inference.fleet.readings import Readings
from inference.fleet.shape import COLD_START_MARGIN_S
from inference.fleet.warm_worker import BrokenEngine, WarmWorker
from inference.leasing.direct import generated, name_of
from inference.leasing.scratch import put, scratch_folder
from inference.payments.records import MemoryRecords, Records
from inference.progress.stages import StageTracker, plan
from inference.providers import DEFAULT, EngineName, PoolName
from inference.settings import Settings
from inference.task import PHOTO, GenerationRequest, Lease, Task, Video, explain

log = structlog.get_logger(__name__)


class ModalContainer:
    """Opened when a container starts, closed on its way out."""

    def __init__(self, settings: Settings, records: Records) -> None:
        self._settings, self._records = settings, records
        self._stack = AsyncExitStack()

    async def open(self, pool: PoolName, engine: EngineName, *, drain: bool = False, by_hand: bool = False) -> None:
        """Loads the engine, and serves from then on. Raises SettingsError."""
        logs.configure(self._settings.log_level)
        self._settings.warn_of_unread()
        opening = open_warm_worker(self._settings, pool, engine, self._records, drain=drain, by_hand=by_hand)
        self._worker = await self._stack.enter_async_context(opening)
        # In a task of its own, which no call's end cancels; platforms run functions on asyncio.
        self._serving = asyncio.create_task(self._worker.serve())

    @property
    def broken(self) -> bool:
        """Whether the next call should get a new container, on another machine perhaps."""
        return self._worker.broken

    async def run(self, lease: dict[str, Any] | None, *, drain: bool) -> list[dict[str, Any]]:
        """Runs what a call brought, and says how it ended."""
        outcomes = await self._worker.run(Lease.model_validate(lease) if lease else None, drain=drain)
        return [outcome.model_dump(mode="json") for outcome in outcomes]

    async def render(self, request: dict[str, Any], photo: bytes) -> dict[str, Any]:
        """One video without a queue, {"video": …, "mp4": bytes}, or {"error": one line}."""
        try:
            asked = GenerationRequest.model_validate(request)
            video, mp4 = await render(self._settings, self._records, self._worker, asked, photo)
        except ValidationError as error:
            return {"error": explain(error)}
        except I2VError as error:
            return {"error": str(error)}
        return {"video": video.model_dump(mode="json"), "mp4": mp4}

    async def close(self) -> None:
        """Hands back what is held."""
        await self._worker.close()
        await self._serving
        await self._stack.aclose()


async def render(
    settings: Settings, records: Records, worker: WarmWorker, request: GenerationRequest, photo: bytes
) -> tuple[Video, bytes]:
    """One video of a photo without a queue; and the bytes of its mp4.

    The same request of the same photo goes on with what an interrupted one paid for. Raises InvalidPhoto,
    MachineFault, EngineError.
    """
    name = f"by-hand-{name_of(request, photo)}"
    purchase = build_ledger(settings, records).purchase(name, f"by-hand.{secrets.token_hex(6)}")
    job = Job(StageTracker(plan(worker.turns.stages), logs.stages(name)), purchase)
    with scratch_folder(settings.temp_dir) as folder:
        path = folder / "photo"
        await anyio.to_thread.run_sync(put, path, photo)
        async with generated(worker.turns, request, {PHOTO: path}, folder, job) as video:
            return video, await anyio.to_thread.run_sync(video.path.read_bytes)


@asynccontextmanager
async def open_warm_worker(
    settings: Settings,
    pool: PoolName,
    engine_name: EngineName,
    records: Records,
    *,
    drain: bool = False,
    by_hand: bool = False,
) -> AsyncIterator[WarmWorker]:
    """A container's engine and what runs leases on it. Never raises for an engine that cannot be loaded.

    If it raised, the platform would start one container after another on the same lease. So the lease goes back, and
    the readings say why. A container that a person started `by_hand` writes no readings: its code and preset may
    differ from the fleet's. Raises SettingsError for a queue that is not configured.
    """
    own = settings.model_copy(
        update={"engine": engine_name, "worker_type": DEFAULT.worker_type if settings.queue_knows_worker_type else None}
    )
    fault: I2VError | None = None
    engine: Engine
    try:
        # Before the platform's own limit, or it would end this container and start another.
        with anyio.fail_after(max(settings.modal_startup_timeout_s - COLD_START_MARGIN_S, 5)):
            engine = await load_engine(own)
    except TimeoutError:
        fault = EngineLost(f"no engine within I2V_MODAL_STARTUP_TIMEOUT ({settings.modal_startup_timeout_s} s)")
    except I2VError as error:
        fault = error
    except Exception as error:  # a bug here must not become a loop of containers
        fault = EngineLost(f"internal error: {type(error).__name__}: {error}")
        log.exception("unexpected_error")
    if fault is not None:
        log.error("engine_not_loaded", pool=pool, error=str(fault))
        engine = BrokenEngine(fault)
    async with open_events(own, needed=False) as hub, open_queue(own) as queue:
        books, readings = build_ledger(settings, records), Readings(MemoryRecords() if by_hand else records)

        async def fits(task: Task) -> bool:
            return await may_stay(task, books, has_runway=settings.runway_key is not None)

        async def is_current() -> bool:
            return await readings.version() in (None, version(settings))

        sink = lambda lease: logs.stages(lease.task.item_id)  # noqa: E731
        yield WarmWorker(
            pool,
            queue,
            build_runner(own, queue, engine, ledger=books, sink=sink, hub=hub),
            readings,
            fault=fault,
            fits=fits,
            is_current=is_current,
            # The last task it takes has to end within the platform's own limit for a call.
            drain_s=max(0.0, settings.modal_timeout_s - settings.attempt_limit_s) if drain else 0.0,
            linger_s=settings.modal_linger_s,
            poll_interval_s=settings.poll_interval_s,
        )
