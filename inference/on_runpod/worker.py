"""A worker behind an endpoint: one engine, and jobs of four kinds from whoever calls it, several at once.

    task     a lease that somebody else took       renewed, then run and reported as everywhere
    drain    so many tasks of the queue            leased, run and reported, until there are no more
    photo    no queue at all                       generated, and the video uploaded or put into the answer
    workflow no queue either, and ComfyUI's graph  run there, and all files uploaded or put into the answer

Every job gets an answer that JSON can hold. How jobs arrive, and how progress is posted, is up to `runpod_handler.py`.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from typing import Any

import anyio
import structlog

from inference import logs
from inference.build.engines import build_engine, choose_engine, load_engine
from inference.build.queues import bucket_of, open_queue, open_storage
from inference.build.workers import build_runner, clear_temp, open_events
from inference.doctor import require_machine
from inference.engines.base import Engine
from inference.engines.turns import EngineTurns
from inference.errors import EngineLost, I2VError, InvalidRequest, PartsMissing, SettingsError, UrlExpired
from inference.leasing.executor import Executor
from inference.leasing.polling import Worker
from inference.leasing.runner import Runner
from inference.leasing.taking import hand_back
from inference.on_runpod.comfy import WorkflowInput, as_worker_comfyui, run_workflow, workflow_in
from inference.on_runpod.direct import DirectContext, render
from inference.on_runpod.progress_posts import ProgressPosts
from inference.on_runpod.wire import DirectInput, DrainInput, TaskInput, answer_of, failure, parse, parse_s3
from inference.progress.eta import StageHistory
from inference.progress.stages import Progress, Sink, both
from inference.providers import DEFAULT, is_paid
from inference.queues.base import TaskQueue
from inference.settings import Settings
from inference.task import Lease, Outcome
from inference.transfer.bucket import Bucket

log = structlog.get_logger(__name__)

Post = Callable[[dict[str, object]], Awaitable[None]]

STOPPING = "this worker is being stopped; send the job again"
REPLACED = "this worker failed and is being replaced; send the job again"
REFRESH = {"refresh_worker": True}


class RunPodWorker:
    """Answers jobs. Made before there is an event loop; the first job opens the rest."""

    def __init__(self, settings: Settings) -> None:
        """Raises SettingsError."""
        if settings.api_url:  # its videos may go to a queue
            settings = choose_engine(settings)
        if is_paid(settings.engine):
            raise SettingsError("I2V_ENGINE: an endpoint runs wan or preview; for Runway, which needs no GPU: i2v work")
        worker_type = settings.worker_type or (DEFAULT.worker_type if settings.queue_knows_worker_type else None)
        self._settings = settings.model_copy(update={"worker_type": worker_type})
        self._bucket = bucket_of(settings)
        self._engine: Engine | None = None
        self._history = StageHistory()  # of its tasks, each of which has a runner of its own
        self._opening = asyncio.Lock()
        self._executor: Executor  # set once it is open
        self._serving: asyncio.Task[None] | None = None  # since then
        self._leases: set[tuple[str, str]] = set()  # item and holder of every task job that runs
        self._stopping = False
        self._is_closed = False  # it could not be opened, or has ended

    @property
    def broken(self) -> bool:
        """Nothing should be sent here any more: another worker has to take its place."""
        return self._is_closed or (self._serving is not None and self._executor.broken)

    def load(self) -> None:
        """Loads the engine, before there is a job that waits for it.

        Raises EngineLost where disk, ffmpeg, weights or GPU are not there, SettingsError.
        """
        if self._engine is None:
            clear_temp(self._settings)
            require_machine(self._settings)
            self._engine = build_engine(self._settings)
            log.info("engine_ready", engine=self._engine.name)

    async def run(self, job: Mapping[str, Any], post: Post) -> dict[str, Any]:
        """The answer to a job: what was made, or an error that says whether another try can help.

        `post` is given snapshots of the progress, the last one before the answer is there. A job that is cancelled
        hands back what it leased, and only then ends. Whatever is wrong with this worker ends with its process, if it
        ends at all: then `broken` is set, and the answer asks the platform for another one.
        """
        said: dict[str, Any] = {}
        try:
            await self._opened()
            await self._executor.run(lambda: self._work(job, post, said))
        except Exception as error:  # nothing could be opened, or all has ended: no job can be answered here
            self._is_closed = True
            log.exception("not_opened", job_id=job.get("id"))
            return _failed(error) | REFRESH
        said = said or failure(STOPPING if self._stopping else REPLACED, retryable=True)
        if said.get("error") == STOPPING:  # workers come and go
            said["machine_at_fault"] = False
        return said | REFRESH if self.broken else said

    async def close(self, grace_s: float) -> None:
        """Gives running jobs so many seconds, then ends them: tasks are handed back, callers told to ask again."""
        self._stopping = True
        log.info("stopping", grace_s=grace_s)
        if self._serving is not None:
            await self._executor.stop(grace_s)

    async def _opened(self) -> None:
        settings = self._settings
        async with self._opening:
            if self._serving is None:
                clear_temp(settings)
                async with AsyncExitStack() as stack:
                    storage = await stack.enter_async_context(open_storage(settings, ()))
                    own = await stack.enter_async_context(open_storage(settings, _origins(self._bucket)))
                    self._hub = await stack.enter_async_context(open_events(settings, needed=False))
                    self._queue = await stack.enter_async_context(open_queue(settings)) if settings.api_url else None
                    engine = self._engine or await load_engine(settings)
                    turns = EngineTurns(engine, limit_s=settings.attempt_limit_s, strict=True)
                    self._here = DirectContext(settings, turns, storage, self._bucket, own)
                    self._executor = Executor(turns)
                    # In a task of its own, which no job's end cancels; platforms run handlers on asyncio.
                    self._serving = asyncio.create_task(self._serve(stack.pop_all()))
            if self._is_closed:
                raise EngineLost(REPLACED)

    async def _serve(self, stack: AsyncExitStack) -> None:
        try:
            async with stack:
                await self._executor.serve()
        finally:
            self._is_closed = True

    async def _work(self, job: Mapping[str, Any], post: Post, said: dict[str, Any]) -> None:
        """Fills in `said`. A drain that is cancelled still says which of its tasks had ended."""
        posts = ProgressPosts(as_worker_comfyui(post) if self._settings.engine == "comfyui" else post)
        async with anyio.create_task_group() as beside:
            beside.start_soon(posts.run)
            await self._answer(job, posts.sink, said)
            posts.finish()

    async def _answer(self, job: Mapping[str, Any], sink: Sink, said: dict[str, Any]) -> None:
        """The one place where an error becomes an answer."""
        settings = self._settings
        payload, job_id = job.get("input"), str(job.get("id") or "video")
        try:
            asked = workflow_in(payload, job_id) or parse(
                payload, worker_id=settings.worker_id, lease_s=settings.lease_extension_s
            )
            match asked:
                case TaskInput():
                    said |= await self._run(asked.lease, sink)
                case DrainInput():
                    await self._drain(asked.drain, sink, said)
                case DirectInput():
                    self._refuse_unfit()
                    said |= await render(asked, parse_s3(job.get("s3Config")), job_id, self._here, sink)
                    self._executor.worked()
                case WorkflowInput():
                    self._refuse_unfit()
                    said |= await run_workflow(asked, parse_s3(job.get("s3Config")), job_id, self._here, sink)
                    self._executor.worked()
        except I2VError as error:
            log.warning("job_failed", job_id=job.get("id"), error=str(error))
            said |= _failed(error)
            if error.hand_back and not _is_of_the_job(error):
                self._executor.faulted(str(error))
        except Exception as error:
            log.exception("unexpected_error", job_id=job.get("id"))
            said |= _failed(error)

    async def _run(self, lease: Lease, sink: Sink) -> dict[str, Any]:
        queue, key = self._asked_queue(), (lease.task.item_id, lease.worker_id)
        if key in self._leases:  # platforms deliver a job again when they are in doubt
            raise InvalidRequest(f"task {lease.task.item_id} is being worked on here under the same lease")
        try:
            self._refuse_unfit()
        except I2VError:
            await hand_back(queue, lease)
            raise
        runner = self._runner(queue, lambda lease: both(logs.stages(lease.task.item_id), sink))
        self._leases.add(key)
        try:
            outcome = await self._executor.run_lease(runner, lease)
        finally:
            self._leases.discard(key)
        said = answer_of(outcome)
        if outcome.status == "lease_lost" and lease.worker_id == self._settings.worker_id:
            said["error"] += "; give the worker_id that it was leased under"
        return said

    async def _drain(self, count: int, sink: Sink, said: dict[str, Any]) -> None:
        """Several at a time, so that one generates while the others download or upload."""
        queue = self._asked_queue()
        self._refuse_unfit()
        outcomes: list[Outcome] = []
        settings = self._settings
        runner = self._runner(queue, lambda lease: logs.stages(lease.task.item_id))

        def ended(outcome: Outcome) -> None:
            outcomes.append(outcome)
            sink(Progress(stage="drain", done=len(outcomes), total=count, fraction=min(len(outcomes) / count, 0.99)))

        worker = Worker(
            queue,
            runner,
            executor=self._executor,
            concurrency=settings.concurrency,
            poll_interval_s=settings.poll_interval_s,
            grace_s=settings.shutdown_grace_s,
            on_outcome=ended,
        )
        try:
            await worker.run(at_most=count)
        except I2VError as error:
            said |= _failed(error)
        finally:  # what ended before stays ended, also where the rest is cancelled
            completed = sum(outcome.status == "completed" for outcome in outcomes)
            said |= {"tasks": [answer_of(outcome) for outcome in outcomes], "completed": completed}

    def _runner(self, queue: TaskQueue, sink: Callable[[Lease], Sink]) -> Runner:
        turns = self._executor.turns
        return build_runner(self._settings, queue, turns, sink=sink, hub=self._hub, history=self._history)

    def _asked_queue(self) -> TaskQueue:
        if self._queue is None:
            raise SettingsError("VERCEL_API_URL is not set on this endpoint: it has no queue to take tasks from")
        return self._queue

    def _refuse_unfit(self) -> None:
        """Raises EngineLost where nothing more should begin here."""
        if self._stopping or self.broken:
            raise EngineLost(STOPPING if self._stopping else REPLACED)


def _is_of_the_job(error: I2VError) -> bool:
    """Whether other jobs can be done here all the same: an address or a queue that settings do not allow for, or parts
    of ComfyUI that are not in this endpoint's image, concern only the job that needs them.
    """
    return error.stops_worker or isinstance(error, PartsMissing)


def _origins(bucket: Bucket | None) -> list[str]:
    return [bucket.origin] if bucket else []


def _failed(error: Exception) -> dict[str, Any]:
    if not isinstance(error, I2VError):
        return failure(f"internal error: {type(error).__name__}: {error}", retryable=True)
    # Another try does not help with a URL that has expired, which only the caller can sign anew, nor with settings and
    # an image, which all workers of this endpoint share.
    may_pass = (error.retryable or error.hand_back) and not (isinstance(error, UrlExpired) or _is_of_the_job(error))
    return failure(str(error), retryable=may_pass)
