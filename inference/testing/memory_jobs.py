"""A table of jobs in memory, as simple as possible: the reference model of `queues/video_jobs`.

The table in PostgreSQL is tested against it, and simulations run on it.
"""

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from inference.errors import ItemMissing, NotHolder, WrongState
from inference.providers import WorkerType, provider_of
from inference.queues.item import CRASHED, DONE, LOST, MAX_CRASHES, MAX_LOST
from inference.queues.video_jobs.job import AT_ONCE, ONGOING, WAITING_S, JobRow, Swept


@dataclass(frozen=True, slots=True)
class Event:
    """One write to the table, accepted or not, for tests to check."""

    at_s: float
    verb: str
    job_id: str
    attempt_id: str | None
    accepted: bool
    status: str  # of the job afterwards


class MemoryJobs:
    """The rows, and a log of every write. One thread. See `Jobs` and `JobStore` for what each verb promises."""

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        *,
        stale_s: float = 480.0,
        worker_type: WorkerType | None = None,
    ) -> None:
        self.stale_s = stale_s
        self._clock, self._worker_type = clock, worker_type
        self.rows: dict[str, JobRow] = {}  # in the order they were added; silent_s is in `beat_at`
        self.beat_at: dict[str, float] = {}
        self.added_at: dict[str, float] = {}
        self.log: list[Event] = []

    def check(self) -> None:
        """It is there."""

    def close(self) -> None:
        """Keeps everything."""

    def add(self, job_id: str, content: Mapping[str, Any]) -> bool:
        """See JobStore."""
        if job_id in self.rows:
            return False
        self.rows[job_id] = JobRow(id=job_id, status="queued", input=copy.deepcopy(dict(content)))
        self.added_at[job_id] = self._clock()
        return True

    def get(self, job_id: str) -> JobRow:
        """See JobStore."""
        if job_id not in self.rows:
            raise ItemMissing(f"no task {job_id}")
        beat_at = self.beat_at.get(job_id)
        silent_s = None if beat_at is None else self._clock() - beat_at
        return self.rows[job_id].model_copy(update={"silent_s": silent_s})

    def cancel(self, job_id: str) -> JobRow:
        """See JobStore."""
        job = self.get(job_id)
        if job.status == "canceled":
            return job
        if job.status not in ONGOING:
            raise WrongState(f"the task is {job.status}: there is nothing to cancel")
        ends = job.status == "queued" or self._is_stale(job)
        return self._write("cancel", job, None, status="canceled" if ends else job.status, cancel_requested=True)

    def sweep(self, waiting_s: float = WAITING_S) -> Swept:
        """See JobStore."""
        ended = self._end_swept()
        requeued = [job for job in map(self.get, self.rows) if self._is_stale(job)]
        for job in requeued:
            self.beat_at.pop(job.id)
            self._write("requeue", job, None, status="queued", attempt_id=None, **self._counted(job))
        long_ago = self._clock() - waiting_s
        waiting = [job.id for job in self.rows.values() if job.status == "queued" and self.added_at[job.id] <= long_ago]
        return Swept(
            requeued=tuple(job.id for job in requeued),
            canceled=tuple(job_id for job_id in ended if self.rows[job_id].status == "canceled"),
            failed=tuple(job_id for job_id in ended if self.rows[job_id].status == "failed"),
            waiting=tuple(waiting[:AT_ONCE]),
        )

    def acquire(self, attempt_id: str, worker: str) -> JobRow | None:
        """See JobStore."""
        chosen = next((job for job in map(self.get, self.rows) if self._is_for(job) and self._waits(job)), None)
        self._end_swept()
        return None if chosen is None else self._take(chosen, attempt_id, worker)

    def acquire_given(self, job_id: str, attempt_id: str, worker: str, *, any_kind: bool = False) -> JobRow | None:
        """See JobStore."""
        job = self.get(job_id)
        if self._waits(job) and (any_kind or self._is_for(job)):
            return self._take(job, attempt_id, worker)
        self._end_swept()
        return None

    def backlog(self) -> int:
        """See JobStore."""
        return sum(self._is_for(job) and self._waits(job) for job in map(self.get, self.rows))

    def beat(self, job_id: str, attempt_id: str, progress: Mapping[str, Any] | None = None) -> bool:
        """See JobStore."""
        job = self._held("beat", job_id, attempt_id)
        self.beat_at[job_id] = self._clock()
        told = job.progress if progress is None else copy.deepcopy(dict(progress))
        self._write("beat", job, attempt_id, beaten=True, losses=0, progress=told)
        return job.cancel_requested

    def look(self, job_id: str, attempt_id: str) -> bool:
        """See JobStore."""
        return self._held("look", job_id, attempt_id).cancel_requested

    def complete(self, job_id: str, attempt_id: str, artifact_key: str) -> str:
        """See JobStore."""
        job = self.get(job_id)
        if job.attempt_id == attempt_id and (
            job.status == "canceled" or (job.status, job.artifact_key) == ("completed", artifact_key)
        ):
            return job.status
        job = self._held("complete", job_id, attempt_id)
        if job.cancel_requested:
            return self._end("complete", job, status="canceled")
        done = None
        if job.progress is not None:
            stages, segments = job.progress.get("stages_total"), job.progress.get("segments_total")
            whole = {"stage_index": stages, "stages_completed": stages, "segments_done": segments, "fraction": 1}
            done = {**job.progress, **whole, "stage": DONE.stage}
        return self._end("complete", job, status="completed", artifact_key=artifact_key, progress=done)

    def fail(self, job_id: str, attempt_id: str, message: str) -> str:
        """See JobStore."""
        job = self.get(job_id)
        if job.attempt_id == attempt_id and job.status in ("failed", "canceled"):
            return job.status
        job = self._held("fail", job_id, attempt_id)
        if job.cancel_requested:
            return self._end("fail", job, status="canceled")
        return self._end("fail", job, status="failed", error=message)

    def release(self, job_id: str, attempt_id: str) -> str:
        """See JobStore."""
        job = self.get(job_id)
        if (job.attempt_id, job.status) == (attempt_id, "canceled"):
            return job.status
        job = self._held("release", job_id, attempt_id)
        if job.cancel_requested:
            return self._end("release", job, status="canceled")
        return self._end("release", job, status="queued", attempt_id=None)

    # ------------------------------------------------------------ within

    def _is_for(self, job: JobRow) -> bool:
        hint = job.input.get("provider") if isinstance(job.input, dict) else None
        return self._worker_type is None or provider_of(hint).worker_type == self._worker_type

    def _is_stale(self, job: JobRow) -> bool:
        return job.status == "processing" and (job.silent_s is None or job.silent_s >= self.stale_s)

    def _is_free(self, job: JobRow) -> bool:
        return job.status == "queued" or self._is_stale(job)

    def _was_last(self, job: JobRow) -> bool:
        """The third dead holder, or the hundredth that never came, is the last."""
        last = job.crashes + 1 >= MAX_CRASHES if job.beaten else job.losses + 1 >= MAX_LOST
        return job.status == "processing" and last

    def _waits(self, job: JobRow) -> bool:
        return self._is_free(job) and not job.cancel_requested and not self._was_last(job)

    def _counted(self, job: JobRow) -> dict[str, int]:
        """The counters after the job's holder was found dead."""
        return {"crashes": job.crashes + job.beaten, "losses": job.losses + (not job.beaten)}

    def _take(self, job: JobRow, attempt_id: str, worker: str) -> JobRow:
        counted = self._counted(job) if job.status == "processing" else {}
        self.beat_at[job.id] = self._clock()
        return self._write(
            "acquire",
            job,
            attempt_id,
            status="processing",
            attempt_id=attempt_id,
            worker=worker,
            beaten=False,
            attempts=job.attempts + 1,
            progress=None,
            error=None,
            **counted,
        )

    def _end_swept(self) -> list[str]:
        swept = [
            job
            for job in map(self.get, self.rows)
            if self._is_free(job) and (job.cancel_requested or self._was_last(job))
        ]
        for job in swept:
            self.beat_at.pop(job.id, None)
            if job.cancel_requested:
                self._write("sweep", job, None, status="canceled")
            else:
                why = CRASHED if job.beaten else LOST
                self._write("sweep", job, None, status="failed", error=why, **self._counted(job))
        return [job.id for job in swept]

    def _held(self, verb: str, job_id: str, attempt_id: str) -> JobRow:
        job = self.get(job_id)
        if (job.attempt_id, job.status) != (attempt_id, "processing"):
            self.log.append(Event(self._clock(), verb, job_id, attempt_id, accepted=False, status=job.status))
            raise NotHolder(f"the task is {job.status} and not held by this attempt")
        return job

    def _end(self, verb: str, job: JobRow, **changes: Any) -> str:
        self.beat_at.pop(job.id, None)
        return self._write(verb, job, job.attempt_id, **changes).status

    def _write(self, verb: str, job: JobRow, by: str | None, **changes: Any) -> JobRow:
        self.rows[job.id] = job.model_copy(update=changes)
        self.log.append(Event(self._clock(), verb, job.id, by, accepted=True, status=self.rows[job.id].status))
        return self.get(job.id)
