"""A fleet's parts, built from settings and from what a platform lends: records, and pools of containers.

What a container of a pool does (`open_host`), what the cron does (`open_dispatcher`), what a person wants to know
(`report`). A platform's own file wires these to its functions and does no more.
"""

import functools
import hashlib
import json
import re
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import anyio
import structlog

from inference import logs
from inference.board import Board, PoolName
from inference.build import build_runner, load_engine, open_queue
from inference.dispatch import Containers, Dispatcher, Sized
from inference.engines.base import Engine
from inference.engines.wan.presets import PRESETS
from inference.errors import EngineLost, I2VError, PoolUnavailable, SettingsError
from inference.host import BrokenEngine, Host
from inference.ledger import Ledger
from inference.plan import Rules, may_stay
from inference.queues.base import TaskQueue
from inference.queues.item import Lane
from inference.records import MemoryRecords, Records
from inference.settings import Settings
from inference.task import Task, Value

log = structlog.get_logger(__name__)

EngineName = Literal["preview", "wan", "runway"]

INPUTS = 2
"""Leases at once in a GPU container: one generates while the other downloads its photo or uploads its video."""

CRON_FIELDS = 5
CRON_FIELD = re.compile(r"[0-9A-Za-z*,/-]+")  # Modal's client passes on anything

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


def on_modal(settings: Settings) -> Shape:
    """GPU containers, and Runway where there is a key."""
    gpus, clips = settings.modal_max_containers, settings.runway_concurrency
    sizes: dict[PoolName, Sized] = {"gpu": Sized(slots=gpus * INPUTS, engines=gpus)}
    if settings.runway_key:
        sizes["runway"] = Sized(slots=clips, engines=clips)
    return Shape(sizes=sizes, startup_timeout_s=settings.modal_startup_timeout_s)


def on_runpod(settings: Settings) -> Shape:
    """The workers of an endpoint. With a key for Runway, tasks for it are others': a pool that takes nothing."""
    gpus = settings.runpod_max_workers
    sizes: dict[PoolName, Sized] = {"gpu": Sized(slots=gpus * INPUTS, engines=gpus)}
    if settings.runway_key:
        sizes["runway"] = Sized(slots=0, engines=1)
    return Shape(sizes=sizes, startup_timeout_s=settings.runpod_init_timeout_s)


def rules(settings: Settings, shape: Shape) -> Rules:
    """What the operator decided."""
    return Rules(
        ready_after_s=2.0 * shape.startup_timeout_s,
        overflow_after_s=settings.overflow_after_s,
        overflow_wan_local=settings.overflow_wan_local,
        budget_usd=settings.runway_budget_usd,
        runway_model=settings.runway_model,
        runway_audio=settings.runway_audio,
        runway_duration_s=settings.runway_duration_s,
    )


def execution_limit_s(settings: Settings) -> float:
    """How long a job may take in a container where another has its turn before it: beyond all limits of its own."""
    return INPUTS * settings.attempt_limit_s + TRANSFERS_S


@functools.cache
def version(settings: Settings) -> str:
    """A name for this code with these settings: after a deployment, containers of the one before take no more."""
    digest = hashlib.sha256(json.dumps(settings.for_containers(), sort_keys=True).encode())
    folder = Path(__file__).parent
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def for_a_cold_start(settings: Settings, shape: Shape) -> Settings:
    """Settings of who leases for a container."""
    return settings.model_copy(update={"lease_duration_s": shape.lease_s(settings)})


def ledger(settings: Settings, records: Records) -> Ledger:
    """The books of what is paid for."""
    return Ledger(records, budget_usd=settings.runway_budget_usd)


def refuse_deployment(settings: Settings) -> None:
    """Raises SettingsError for what would only be found out by a container, one line for each problem."""
    problems = []
    fields = settings.modal_cron.split()
    if len(fields) != CRON_FIELDS or not all(CRON_FIELD.fullmatch(each) for each in fields):
        problems.append(f"I2V_MODAL_CRON: {settings.modal_cron!r} is not a cron line of five fields, such as * * * * *")
    if settings.attempt_limit_s >= settings.modal_timeout_s:
        problems.append(
            f"I2V_MODAL_TIMEOUT ({settings.modal_timeout_s} s) has to be longer than I2V_ATTEMPT_LIMIT "
            f"({settings.attempt_limit_s:g} s): the platform would end a generation before its own limit does"
        )
    unfree = [each for each in PRESETS[settings.wan_preset].repositories if not each.commercial_use]
    if unfree and not settings.accept_non_commercial:
        problems.append(
            f"I2V_WAN_PRESET: {unfree[0].name} is for non-commercial use only ({unfree[0].license}): "
            "if yours is, set I2V_ACCEPT_NON_COMMERCIAL=true"
        )
    problems += [
        f"{name}: {value!r} has a line break, which an image cannot hold"
        for name, value in settings.for_containers().items()
        if not value.isprintable()
    ]
    if problems:
        raise SettingsError("\n".join(problems))


def import_engine() -> None:
    """The imports of the Wan engine, which take longer than all else that needs no GPU."""
    with suppress(Exception):  # whatever it is, loading the engine meets it again, and tells
        import inference.engines.wan.engine  # noqa: F401, PLC0415 - an extra


@asynccontextmanager
async def open_dispatcher(
    settings: Settings,
    shape: Shape,
    records: Records,
    containers: Mapping[PoolName, Containers],
    board: Board | None = None,
) -> AsyncIterator[Dispatcher]:
    """What the cron runs. `board`: where the records hold more than one. Raises SettingsError, RecordsUnavailable."""
    own = for_a_cold_start(settings, shape)
    kinds: tuple[Lane | None, ...] = ("runway", "wan") if settings.queue_lanes else (settings.worker_type,)
    async with AsyncExitStack() as stack:
        queues: dict[Lane | None, TaskQueue] = {
            kind: await stack.enter_async_context(open_queue(own.model_copy(update={"worker_type": kind})))
            for kind in kinds
        }
        pools = {name: (size, containers[name]) for name, size in shape.sizes.items()}
        board = board or Board(records)
        await board.deployed(version(settings))
        yield Dispatcher(queues, pools, board, ledger(settings, records), rules(settings, shape))


@asynccontextmanager
async def open_host(
    settings: Settings,
    pool: PoolName,
    engine_name: EngineName,
    records: Records,
    *,
    drain: bool = False,
    by_hand: bool = False,
) -> AsyncIterator[Host]:
    """A container's engine and what runs leases on it. Never raises for an engine that cannot be loaded.

    A platform would start the next container on the same lease, and the next: so it goes back, and the board is told. A
    host that a person started `by_hand` tells the fleet's board nothing: its code and preset may be others.
    Raises SettingsError for a queue that is not configured.
    """
    own = settings.model_copy(update={"engine": engine_name, "worker_type": "wan" if settings.queue_lanes else None})
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
    async with open_queue(own) as queue:
        books, board = ledger(settings, records), Board(MemoryRecords() if by_hand else records)

        async def fits(task: Task) -> bool:
            return await may_stay(task, books, has_runway=settings.runway_key is not None)

        async def is_current() -> bool:
            return await board.version() in (None, version(settings))

        sink = lambda lease: logs.stages(lease.task.item_id)  # noqa: E731
        yield Host(
            pool,
            queue,
            build_runner(own, queue, engine, ledger=books, sink=sink),
            board,
            fault=fault,
            fits=fits,
            is_current=is_current,
            # The last task it takes has to end within the platform's own limit for a call.
            drain_s=max(0.0, settings.modal_timeout_s - settings.attempt_limit_s) if drain else 0.0,
            linger_s=settings.modal_linger_s,
            poll_interval_s=settings.poll_interval_s,
        )


async def report(
    settings: Settings, shape: Shape, records: Records, containers: Mapping[PoolName, Containers]
) -> list[str]:
    """What a person wants to know of a fleet: pools, queue, money, the last ticks. Raises RecordsUnavailable."""
    board, books = Board(records), ledger(settings, records)
    lines = []
    for name, size in shape.sizes.items():
        known = await board.pool(name)
        try:
            live = await containers[name].live()
            held = f"{live.running + live.waiting}"
        except PoolUnavailable as error:
            held = f"? ({error})"
        pace = f"{known.clip_s:.1f} s a clip, {known.clips} made" if known.clip_s else "no clip made yet"
        failing = f", FAILING since {_time(known.failing_at)}: {known.failing}" if known.failing else ""
        lines.append(f"{name:8} {held} of {size.slots} slots held, {pace}{failing}")
    try:
        async with open_queue(settings) as queue:
            waiting = await queue.backlog()
        lines.append(f"queue    {'the queue cannot tell how many' if waiting is None else waiting} wait")
    except I2VError as error:
        lines.append(f"queue    FAILING: {error}")
    if "runway" in shape.sizes:
        lines.append(
            f"money    ${await books.spent_usd():.2f} of ${settings.runway_budget_usd:.2f} spent today at Runway"
        )
    for payment in await books.payments():
        if payment.is_open:
            standing = f"{payment.standing(books.now())} {payment.external_id or ''}".rstrip()
            lines.append(f"payment  {payment.item_id} {payment.model} ${payment.cost_usd:.2f} {standing}")
    lines += [f"tick     {_time(at)} {decision}" for at, decision in (await board.decisions())[-10:]]
    return lines


def _time(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%m-%d %H:%M:%SZ")
