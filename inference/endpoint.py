"""A worker behind an endpoint: one engine, and jobs of three kinds from whoever calls it, several at once.

    task     a lease that somebody else took       renewed, then run and reported as everywhere
    drain    so many tasks of the queue            leased, run and reported, until there are no more
    photo    no queue at all                       generated, and the video uploaded or put into the answer

Every job gets an answer that JSON can hold. How jobs arrive and where snapshots go is the platform file's business.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any

import anyio
import structlog
from anyio.abc import TaskGroup

from inference import logs
from inference.build import build_engine, build_runner, clear_temp, load_engine, open_queue, open_storage
from inference.doctor import require_machine
from inference.engines.base import Engine
from inference.errors import EngineLost, I2VError, SettingsError, one_line
from inference.invocation import Surroundings, bucket_of, render
from inference.keeper import hand_back
from inference.progress import Progress, Sink, both
from inference.queues.base import TaskQueue
from inference.runpod_wire import DirectInput, DrainInput, TaskInput, answer_of, failure, parse, parse_s3
from inference.seat import Seat
from inference.settings import Settings
from inference.snapshots import Snapshots
from inference.task import Lease, Outcome
from inference.worker import Worker

log = structlog.get_logger(__name__)

Post = Callable[[dict[str, object]], Awaitable[None]]

MAX_ERROR_CHARS = 1000
STOPPING = "this worker is being stopped; send the job again"
REPLACED = "the GPU of this worker failed, and the worker is being replaced; send the job again"


@dataclass(eq=False)
class _Call:
    """One job, in a task of the endpoint's: platforms cancel their own half way through whatever it awaits."""

    scope: anyio.CancelScope = field(default_factory=anyio.CancelScope)
    ended: anyio.Event = field(default_factory=anyio.Event)
    answer: dict[str, Any] | None = None


class Endpoint:
    """Answers jobs. Made before there is an event loop; the first job opens the rest."""

    def __init__(self, settings: Settings) -> None:
        """Raises SettingsError."""
        if settings.engine == "runway":
            raise SettingsError("I2V_ENGINE: an endpoint runs wan or preview; for Runway, which needs no GPU: i2v work")
        worker_type = settings.worker_type or ("wan" if settings.queue_lanes else None)
        self._settings = settings.model_copy(update={"worker_type": worker_type})
        self._bucket = bucket_of(settings)
        self._engine: Engine | None = None
        self._opening = asyncio.Lock()
        self._group: TaskGroup | None = None
        self._calls: set[_Call] = set()
        self._drains: set[Worker] = set()
        self._stopping = False

    def load(self) -> None:
        """Loads the engine, before there is a job that waits for it.

        Raises EngineLost where weights or GPU are not there, SettingsError.
        """
        if self._engine is None:
            require_machine(self._settings)
            self._engine = build_engine(self._settings)
            log.info("engine_ready", engine=self._engine.name)

    async def run(self, job: Mapping[str, Any], post: Post) -> dict[str, Any]:
        """The answer to a job: what was made, or an error that says whether another try can help.

        `post` is given snapshots of the progress, the last one before the answer is there. A job that is cancelled
        hands back what it leased, and only then ends.
        """
        try:
            group = await self._opened()
        except I2VError as error:
            return _failed(error)
        call = _Call()
        self._calls.add(call)
        group.start_soon(self._work, job, post, call)
        try:
            await call.ended.wait()
        except anyio.get_cancelled_exc_class():
            call.scope.cancel()
            with anyio.CancelScope(shield=True):
                await call.ended.wait()
            raise
        return call.answer or failure(STOPPING, retryable=True)

    async def close(self, grace_s: float) -> None:
        """Gives running jobs so many seconds, then ends them: tasks are handed back, callers told to ask again."""
        self._stopping = True
        log.info("stopping", jobs=len(self._calls), grace_s=grace_s)
        for worker in self._drains:
            worker.stop()
        with anyio.move_on_after(grace_s):
            for call in tuple(self._calls):
                await call.ended.wait()
        for call in self._calls:
            call.scope.cancel()

    async def _opened(self) -> TaskGroup:
        settings = self._settings
        async with self._opening:
            if self._group is None:
                clear_temp(settings)
                stack = AsyncExitStack()
                trusted = [self._bucket.origin] if self._bucket else []
                storage = await stack.enter_async_context(open_storage(settings, trusted))
                self._queue = await stack.enter_async_context(open_queue(settings)) if settings.api_url else None
                self._seat = Seat(self._engine or await load_engine(settings), limit_s=settings.attempt_limit_s)
                self._here = Surroundings(settings, self._seat, storage, self._bucket)
                started: asyncio.Future[TaskGroup] = asyncio.get_running_loop().create_future()
                # In a task of its own, which no job's end cancels; platforms run handlers on asyncio.
                self._serving = asyncio.create_task(self._serve(stack, started))
                self._group = await started
            return self._group

    async def _serve(self, stack: AsyncExitStack, started: asyncio.Future[TaskGroup]) -> None:
        async with stack, anyio.create_task_group() as group:
            started.set_result(group)
            await anyio.sleep_forever()

    async def _work(self, job: Mapping[str, Any], post: Post, call: _Call) -> None:
        snapshots = Snapshots(post)
        try:
            with call.scope:
                async with anyio.create_task_group() as beside:
                    beside.start_soon(snapshots.run)
                    call.answer = await self._answer(job, snapshots.sink)
                    snapshots.finish()
        finally:
            self._calls.discard(call)
            call.ended.set()

    async def _answer(self, job: Mapping[str, Any], sink: Sink) -> dict[str, Any]:
        """The one place where an error becomes an answer."""
        settings = self._settings
        try:
            asked = parse(job.get("input"), worker_id=settings.worker_id, lease_s=settings.lease_extension_s)
            match asked:
                case TaskInput():
                    said = await self._run(asked.lease, sink)
                case DrainInput():
                    said = await self._drain(asked.drain, sink)
                case DirectInput():
                    self._refuse_unfit()
                    job_id = str(job.get("id") or "video")
                    said = await render(asked, parse_s3(job.get("s3Config")), job_id, self._here, sink)
        except I2VError as error:
            log.warning("job_failed", job_id=job.get("id"), error=str(error))
            said = _failed(error)
        except Exception as error:
            log.exception("unexpected_error", job_id=job.get("id"))
            said = failure(
                one_line(f"internal error: {type(error).__name__}: {error}", MAX_ERROR_CHARS), retryable=True
            )
        # What is wrong with a GPU ends with the process, if it ends at all: the platform starts another one.
        return said | {"refresh_worker": True} if self._seat.suspect else said

    async def _run(self, lease: Lease, sink: Sink) -> dict[str, Any]:
        queue = self._asked_queue()
        try:
            self._refuse_unfit()
        except I2VError:
            await hand_back(queue, lease)
            raise
        runner = build_runner(
            self._settings, queue, self._seat, sink=lambda lease: both(logs.stages(lease.task.item_id), sink)
        )
        return answer_of(await runner.run(lease))

    async def _drain(self, count: int, sink: Sink) -> dict[str, Any]:
        """Two at a time, so that one generates while the other downloads or uploads."""
        queue = self._asked_queue()
        self._refuse_unfit()
        outcomes: list[Outcome] = []

        def ended(outcome: Outcome) -> None:
            outcomes.append(outcome)
            sink(Progress(stage="drain", done=len(outcomes), total=count, fraction=min(len(outcomes) / count, 0.99)))

        settings = self._settings
        runner = build_runner(settings, queue, self._seat, sink=lambda lease: logs.stages(lease.task.item_id))
        worker = Worker(
            queue,
            runner,
            concurrency=settings.concurrency,
            poll_interval_s=settings.poll_interval_s,
            grace_s=settings.shutdown_grace_s,
            on_outcome=ended,
        )
        self._drains.add(worker)
        said: dict[str, Any] = {}
        try:
            await worker.run(at_most=count)
        except I2VError as error:  # what ended before stays ended
            said = _failed(error)
        finally:
            self._drains.discard(worker)
        completed = sum(outcome.status == "completed" for outcome in outcomes)
        return said | {"tasks": [answer_of(outcome) for outcome in outcomes], "completed": completed}

    def _asked_queue(self) -> TaskQueue:
        if self._queue is None:
            raise SettingsError("VERCEL_API_URL is not set on this endpoint: it has no queue to take tasks from")
        return self._queue

    def _refuse_unfit(self) -> None:
        """Raises EngineLost where nothing more should begin here."""
        if self._stopping or self._seat.suspect:
            raise EngineLost(STOPPING if self._stopping else REPLACED)


def _failed(error: I2VError) -> dict[str, Any]:
    return failure(one_line(str(error), MAX_ERROR_CHARS), retryable=error.retryable or error.hand_back)
