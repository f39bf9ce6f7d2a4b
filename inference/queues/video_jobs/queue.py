"""TaskQueue over a table of jobs in PostgreSQL; photos and videos are objects of an S3 bucket, or lie at URLs.

A holder writes once in BEAT_S: that it is alive, and how far it is; the answer says whether somebody wants it to stop.
So there is no separate look for cancellations. Each acquire has an attempt id of its own, a UUID, with which every
write is fenced; it is the last part of the lease's worker_id.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Self, TypeVar
from uuid import uuid4

import anyio
import anyio.to_thread
import httpx
import structlog
from pydantic import ValidationError

from inference import inputs
from inference.errors import (
    CancelRequested,
    I2VError,
    InvalidTask,
    ItemMissing,
    LeaseLost,
    NotHolder,
    ObjectMissing,
    QueueRefused,
    SettingsError,
    StorageAway,
    StorageUnavailable,
    StorageUnreached,
    one_line,
    write_error,
)
from inference.progress.stages import Progress
from inference.queues.base import SegmentStore
from inference.queues.video_jobs.job import ONGOING, WAITING_S, JobRow, Jobs, Standing, Swept
from inference.queues.video_jobs.wire import parse_job, progress_json
from inference.task import Input, Lease, Video, VideoFormat, explain, identifier
from inference.transfer.bucket import Bucket
from inference.transfer.storage import Storage

T = TypeVar("T")
log = structlog.get_logger(__name__)

BEAT_S = 10.0
"""How often a holder writes. A cancelled job stops after it (the contract's cancel poll, of 10 s)."""

MAX_TRIES = 2
"""How often a job is begun at most where it fails in a way that may pass: once more, perhaps on another machine. More
would let one odd photo take three workers for broken."""

THREADS = 20
"""For calls to the database: as many as its connections. Where a network swallows packets they wait for a while, and
must not take the threads that other work needs."""

MAX_MESSAGE_CHARS = 1000
MAX_SEGMENT_BYTES = 500_000_000
"""Of one finished segment, which we made ourselves: ten minutes of 1080p at a high quality."""


class VideoJobsQueue:
    """TaskQueue over a table. Raises SettingsError for a worker_id that cannot work."""

    hands_back = True
    video_formats: tuple[VideoFormat, ...] = ("mp4",)

    def __init__(
        self,
        jobs: Jobs,
        *,
        worker_id: str,
        storage: Storage,
        bucket: Bucket,
        max_photo_bytes: int = 50_000_000,
    ) -> None:
        """`jobs`: the table, whose verbs block. It is closed with this queue."""
        self.jobs = jobs
        self._worker_id = worker_id
        self._storage, self._bucket, self._max_photo_bytes = storage, bucket, max_photo_bytes
        self._deliveries: dict[str, int] = {}  # by attempt: how many uploads were begun
        self._threads = anyio.CapacityLimiter(THREADS)
        try:
            identifier.validate_python(f"{worker_id}.{uuid4()}")
        except ValidationError as error:
            raise SettingsError(f"WORKER_ID: {explain(error)}") from None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        with anyio.CancelScope(shield=True):
            await self._in_thread(self.jobs.close)

    async def check(self) -> None:
        """As TaskQueue.check."""
        await self._in_thread(self.jobs.check)

    async def check_storage(self) -> str | None:
        """As TaskQueue.check_storage: the bucket's host. Photos may be elsewhere, too."""
        url = await self._sign(self._bucket.download_url, "check")
        await self._storage.check(url)
        return httpx.URL(url).host

    async def insert(self, given: Mapping[str, Any], job_id: str) -> str:
        """Adds a job that waits, unless there is one of that id, which stays as it is; returns its id.

        Raises InvalidTask for an input that no worker could take, QueueRefused for an id that no job can have.
        """
        try:
            identifier.validate_python(job_id)
        except ValidationError:
            raise QueueRefused(f"{one_line(job_id, 100)}: no id of a job; use letters, digits and ._:-") from None
        parse_job(job_id, given)
        try:
            await self._in_thread(self.jobs.add, job_id, given)
        except ItemMissing as error:
            raise QueueRefused(f"no such job can be added: {error}") from None
        return job_id

    async def acquire(self, job_id: str) -> Lease | Standing:
        """The given job, for whichever kind of worker it waits, or where it stands instead.

        Raises ItemMissing; InvalidTask for a malformed job, which was reported failed; and as TaskQueue.lease.
        """
        lease = await self._acquire_given(job_id, any_kind=True)
        return await self.standing(job_id) if lease is None else lease

    async def standing(self, job_id: str) -> Standing:
        """Where a job stands. Raises ItemMissing."""
        job = await self._in_thread(self.jobs.get, _known(job_id))
        silent_s = self.jobs.stale_s if job.silent_s is None else job.silent_s
        is_held = job.status == "processing" and silent_s < self.jobs.stale_s
        return Standing(
            job_status=job.status,
            attempt_id=job.attempt_id,
            has_ended=job.status not in ONGOING,
            is_held=is_held,
            retry_after_s=max(1.0, self.jobs.stale_s - silent_s) if is_held else None,
        )

    async def sweep(self, waiting_s: float = WAITING_S) -> Swept:
        """Ends what nobody may acquire again, frees the jobs of dead holders, and lists what waits for too long.

        Redelivery alone saves none of them: a caller stops after some attempts, mostly long before a dead holder counts
        as one, and whoever adds a job may be killed before it has asked for it. Two sweeps at once do no harm.
        """
        return await self._in_thread(self.jobs.sweep, waiting_s)

    async def lease(self, item_id: str | None = None) -> Lease | None:
        """As TaskQueue.lease."""
        if item_id is not None:
            return await self._acquire_given(item_id, any_kind=False)
        job = await self._in_thread(self.jobs.acquire, str(uuid4()), self._worker_id)
        return None if job is None else await self._lease_of(job)

    async def _acquire_given(self, job_id: str, *, any_kind: bool) -> Lease | None:
        acquire = partial(self.jobs.acquire_given, any_kind=any_kind)
        job = await self._in_thread(acquire, _known(job_id), str(uuid4()), self._worker_id)
        return None if job is None else await self._lease_of(job)

    async def _lease_of(self, job: JobRow) -> Lease:
        """The lease of a job that was just acquired. Raises InvalidTask for a malformed one, after it was failed."""
        try:
            return Lease(
                task=parse_job(job.id, job.input),
                worker_id=f"{self._worker_id}.{job.attempt_id}",
                length_s=self.jobs.stale_s,
                beat_interval_s=min(BEAT_S, self.jobs.stale_s / 6),
                tries_left=max(0, MAX_TRIES - job.attempts),
            )
        except InvalidTask as error:
            log.warning("malformed task", item_id=one_line(job.id, 100), problem=str(error))
            try:
                message = one_line(str(error), MAX_MESSAGE_CHARS)
                await self._in_thread(self.jobs.fail, job.id, job.attempt_id or "", message)
            except I2VError as unreported:  # its holder is dead soon, and the next one fails it again
                log.warning("malformed task could not be reported", problem=str(unreported))
            raise

    async def backlog(self) -> int | None:
        """As TaskQueue.backlog."""
        return await self._in_thread(self.jobs.backlog)

    async def heartbeat(self, lease: Lease, progress: Progress | None = None) -> None:
        """As TaskQueue.heartbeat."""
        told = None if progress is None else progress_json(progress, len(lease.task.segments))
        with _fenced():
            is_canceled = await self._in_thread(self.jobs.beat, lease.task.item_id, lease.token, told)
        self._stop_if(lease, is_canceled)

    async def still_wanted(self, lease: Lease) -> None:
        """Writes nothing. Raises LeaseLost, CancelRequested."""
        with _fenced():
            is_canceled = await self._in_thread(self.jobs.look, lease.task.item_id, lease.token)
        self._stop_if(lease, is_canceled)

    async def fetch_inputs(self, lease: Lease, folder: Path) -> dict[str, Path]:
        """As TaskQueue.fetch_inputs. If the bucket cannot be reached, every other task would fail as well."""
        ours = {name: item for name, item in lease.task.inputs.items() if inputs.source_kind(item.source) == "path"}
        others = {name: item for name, item in lease.task.inputs.items() if name not in ours}
        signed = {
            name: Input(kind=item.kind, source=await self._sign(self._bucket.download_url, item.source))
            for name, item in ours.items()
        }
        with _reaching_bucket():
            found = await self._fetch(signed, folder / "bucket")
        found |= await self._fetch(others, folder / "elsewhere")
        return {name: found[name] for name in lease.task.inputs}

    async def _fetch(self, wanted: dict[str, Input], folder: Path) -> dict[str, Path]:
        if not wanted:
            return {}
        try:
            await anyio.Path(folder).mkdir(exist_ok=True)
        except OSError as error:
            raise write_error(error, f"{folder.name}: cannot be made: {error.strerror}") from error
        return await inputs.fetch(wanted, folder, storage=self._storage, max_bytes=self._max_photo_bytes)

    def segments(self, lease: Lease) -> SegmentStore | None:
        """As TaskQueue.segments: in the bucket, whoever made them."""
        return BucketSegments(self, lease)

    async def deliver(self, lease: Lease, video: Video) -> str:
        """As TaskQueue.deliver; returns the object's key.

        No attempt ever had the same id, so nobody else has written there. A second upload of the same attempt is
        another object: the first may be stored, and its answer lost.
        """
        await self.still_wanted(lease)
        number = self._deliveries[lease.token] = self._deliveries.get(lease.token, 0) + 1
        name = "final.mp4" if number == 1 else f"final-{number}.mp4"
        key = f"video-jobs/{lease.task.item_id}/attempts/{lease.token}/{name}"
        await self.put(key, video.path)
        return key

    async def complete(self, lease: Lease, storage_path: str, video: Video) -> None:
        """As TaskQueue.complete."""
        del video  # the row holds where it is
        await self._end(lease, self.jobs.complete, storage_path)

    async def fail(self, lease: Lease, message: str) -> None:
        """As TaskQueue.fail, and safe to repeat."""
        await self._end(lease, self.jobs.fail, one_line(message, MAX_MESSAGE_CHARS) or "no reason given")

    async def release(self, lease: Lease, reason: str | None = None) -> None:
        """As TaskQueue.release."""
        del reason  # the task goes on elsewhere
        with _fenced():
            await self._in_thread(self.jobs.release, lease.task.item_id, lease.token)
        self._deliveries.pop(lease.token, None)

    async def _end(self, lease: Lease, verb: Callable[[str, str, str], str], said: str) -> None:
        """Raises LeaseLost, CancelRequested where a person came first: the job has ended canceled."""
        with _fenced():
            status = await self._in_thread(verb, lease.task.item_id, lease.token, said)
        self._deliveries.pop(lease.token, None)
        self._stop_if(lease, status == "canceled")

    @staticmethod
    def _stop_if(lease: Lease, is_canceled: object) -> None:
        if is_canceled:
            raise CancelRequested(f"task {lease.task.item_id}: cancelled by a person")

    async def get(self, key: str, target: Path) -> bool:
        """Puts an object of ours at `target`; False where there is none. Raises StorageError, DiskFull."""
        url = await self._sign(self._bucket.download_url, key)
        try:
            with _reaching_bucket():
                await self._storage.download(url, target, max_bytes=MAX_SEGMENT_BYTES)
        except ObjectMissing:
            return False
        return True

    async def put(self, key: str, path: Path) -> None:
        """Stores a video. Raises StorageError, DiskFull."""
        url = await self._sign(partial(self._bucket.upload_url, content_type="video/mp4"), key)
        try:
            with _reaching_bucket():
                await self._storage.upload(url, path)
        except ObjectMissing as error:  # an upload that meets a missing bucket is not the fault of the task
            raise StorageUnavailable(f"nothing can be stored there: {error}") from None

    async def _sign(self, sign: Callable[[str], str], key: str) -> str:
        return await self._in_thread(sign, key)

    async def _in_thread(self, call: Callable[..., T], *arguments: object) -> T:
        """Runs a call that blocks. A caller that gives up does not wait for it; it may be carried out all the same."""
        return await anyio.to_thread.run_sync(call, *arguments, abandon_on_cancel=True, limiter=self._threads)


class BucketSegments:
    """SegmentStore of one job. Its keys are digests of what was asked for, so any attempt may use what another kept.

    Nothing is deleted. Segments have a prefix of their own, by which a rule of the bucket can let them expire.
    """

    def __init__(self, queue: VideoJobsQueue, lease: Lease) -> None:
        self._queue, self._lease = queue, lease

    async def find(self, key: str, target: Path) -> bool:
        """As SegmentStore.find. A film asks before each segment, so here a cancelled one ends between two of them.

        Raises LeaseLost, CancelRequested, too.
        """
        await self._queue.still_wanted(self._lease)
        return await self._queue.get(self._key(key), target)

    async def keep(self, key: str, path: Path) -> None:
        """As SegmentStore.keep."""
        await self._queue.put(self._key(key), path)

    def _key(self, key: str) -> str:
        return f"video-segments/{self._lease.task.item_id}/{key}.mp4"


def _known(job_id: str) -> str:
    """Raises ItemMissing for what no job is called."""
    try:
        return identifier.validate_python(job_id)
    except ValidationError:
        raise ItemMissing(f"no task {one_line(job_id, 100)}") from None


@contextmanager
def _fenced() -> Iterator[None]:
    """A refused write of a holder means that the job is somebody else's, or gone. Raises LeaseLost."""
    try:
        yield
    except (NotHolder, ItemMissing) as error:
        raise LeaseLost(str(error)) from None


@contextmanager
def _reaching_bucket() -> Iterator[None]:
    """If the bucket's host cannot be reached, every other task would fail as well. Raises StorageAway."""
    try:
        yield
    except StorageUnreached as error:
        raise StorageAway(f"this worker cannot reach its bucket: {error}") from None
