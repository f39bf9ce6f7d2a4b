"""The table's verbs: one conditional statement each; only if it changed nothing is the row read, to find out why.

Blocking, and safe to use from many threads and processes at once. `testing.memory_jobs` does the same in memory.

Raises, from any method: QueueUnavailable where a retry may help (the database does not answer), QueueRefused for a
value that the database cannot hold.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Self
from uuid import UUID

from sqlalchemy import BigInteger, Connection, Integer, Table, Uuid
from sqlalchemy.types import TypeEngine

from inference.errors import ItemMissing, NotHolder, SettingsError, WrongState
from inference.providers import WorkerType
from inference.queues.video_jobs.job import AT_ONCE, WAITING_S, JobRow, Swept
from inference.queues.video_jobs.schema import Names, described, migrate
from inference.queues.video_jobs.statements import Statements
from inference.sql.database import Database, Row
from inference.sql.statement import Statement


class JobStore:
    """The table in PostgreSQL. A holder is dead after `stale_s` without a beat."""

    def __init__(
        self, url: str, names: Names | None = None, *, stale_s: float, worker_type: WorkerType | None = None
    ) -> None:
        """Connects, and looks whether the table fits.

        Raises SettingsError for another database than PostgreSQL, and for a table as `schema.described` does.
        """
        self.stale_s = stale_s
        tables: list[Table] = []
        self._database = _connect(url, lambda connection: tables.append(described(connection, names or Names())))
        self._sql = Statements(tables[0], stale_s, worker_type)
        self._id_type = tables[0].c.id.type

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes every connection."""
        self._database.close()

    def check(self) -> None:
        """Proves that the database answers."""
        self._database.read(self._sql.check)

    # ------------------------------------------------------------ applications

    def add(self, job_id: str, content: Mapping[str, Any]) -> bool:
        """Adds a job that waits; False where there is one of that id already, which stays as it is.

        Raises ItemMissing for an id that no job can have here.
        """
        return bool(self._database.write(self._sql.add, job_id=self._id(job_id), input=json.dumps(content)))

    def get(self, job_id: str) -> JobRow:
        """The job as it is now. Raises ItemMissing."""
        for row in self._database.read(self._sql.get, job_id=self._id(job_id)):
            return _job(row)
        raise ItemMissing(f"no task {job_id}")

    def cancel(self, job_id: str) -> JobRow:
        """Cancels a job, or asks its holder to stop. Idempotent. Raises ItemMissing, WrongState."""
        for row in self._database.write(self._sql.cancel, job_id=self._id(job_id)):
            return _job(row)
        job = self.get(job_id)
        if job.status == "canceled":
            return job
        raise WrongState(f"the task is {job.status}: there is nothing to cancel")

    def sweep(self, waiting_s: float = WAITING_S) -> Swept:
        """Ends what nobody may acquire again, and puts the jobs of other dead holders back into the line.

        Lists jobs that were added at least `waiting_s` ago and wait.
        """
        requeued = self._database.write(self._sql.requeue)
        ended = self._end_swept()
        waiting = self._database.read(self._sql.waiting, age_s=waiting_s, limit=AT_ONCE)
        return Swept(
            requeued=_ids(requeued),
            canceled=_ids(row for row in ended if row["status"] == "canceled"),
            failed=_ids(row for row in ended if row["status"] == "failed"),
            waiting=_ids(waiting),
        )

    def _end_swept(self) -> list[Row]:
        return self._database.write(self._sql.end_swept)

    # ------------------------------------------------------------ workers

    def acquire(self, attempt_id: str, worker: str) -> JobRow | None:
        """Hands the oldest job that waits to a new attempt; None where none does."""
        taken = self._database.write_unsorted(self._sql.acquire_next, attempt_id=attempt_id, worker=worker)
        return _job(taken[0]) if taken else None

    def acquire_given(self, job_id: str, attempt_id: str, worker: str, *, any_kind: bool = False) -> JobRow | None:
        """Hands a given job to a new attempt; None where it cannot be had now. `any_kind`: whoever it waits for.

        Raises ItemMissing.
        """
        statement = self._sql.acquire_given if any_kind else self._sql.acquire_given_in_line
        values = {"job_id": self._id(job_id), "attempt_id": attempt_id, "worker": worker}
        for row in self._database.write(statement, **values):
            return _job(row)
        self.get(job_id)
        self._end_swept()
        return None

    def backlog(self) -> int:
        """How many jobs could be acquired now."""
        return int(self._database.read(self._sql.backlog)[0]["waiting"])

    def beat(self, job_id: str, attempt_id: str, progress: Mapping[str, Any] | None = None) -> bool:
        """The attempt is alive; returns whether somebody wants it to stop. Raises ItemMissing, NotHolder."""
        told = None if progress is None else json.dumps(progress)
        for row in self._database.write(self._sql.beat, **self._held(job_id, attempt_id), progress=told):
            return bool(row["cancel_requested"])
        raise self._not_held(job_id)

    def look(self, job_id: str, attempt_id: str) -> bool:
        """As `beat`, and writes nothing."""
        for row in self._database.read(self._sql.look, **self._held(job_id, attempt_id)):
            return bool(row["cancel_requested"])
        raise self._not_held(job_id)

    def complete(self, job_id: str, attempt_id: str, artifact_key: str) -> str:
        """Ends a job whose video is stored: `completed`, or `canceled` where that was asked for first.

        Idempotent. Raises ItemMissing, NotHolder.
        """
        values = {**self._held(job_id, attempt_id), "artifact_key": artifact_key}
        return self._end(self._sql.complete, values, ("completed", "canceled"))

    def fail(self, job_id: str, attempt_id: str, message: str) -> str:
        """Ends a job that cannot be made: `failed`, or `canceled`. Idempotent. Raises ItemMissing, NotHolder."""
        values = {**self._held(job_id, attempt_id), "message": message}
        return self._end(self._sql.fail, values, ("failed", "canceled"))

    def release(self, job_id: str, attempt_id: str) -> str:
        """Lets a job go: `queued`, or `canceled`. Raises ItemMissing, NotHolder."""
        return self._end(self._sql.release, self._held(job_id, attempt_id), ("canceled",))

    # ------------------------------------------------------------ within

    def _end(self, statement: Statement, values: dict[str, Any], repeated: tuple[str, ...]) -> str:
        for row in self._database.write(statement, **values):
            return str(row["status"])
        job = self.get(values["job_id"])
        key = values.get("artifact_key")
        same = key is None or job.status == "canceled" or job.artifact_key == key
        if job.attempt_id == values["attempt_id"] and job.status in repeated and same:
            return job.status
        raise _refusal(job)

    def _not_held(self, job_id: str) -> NotHolder:
        return _refusal(self.get(job_id))

    def _held(self, job_id: str, attempt_id: str) -> dict[str, Any]:
        return {"job_id": self._id(job_id), "attempt_id": attempt_id}

    def _id(self, job_id: str) -> str:
        """The id as the table has it. Raises ItemMissing for one that it cannot have."""
        try:
            return _as_stored(job_id, self._id_type)
        except ValueError:
            raise ItemMissing(f"no task {job_id}: ids are {self._id_type} here") from None


def _as_stored(job_id: str, kind: TypeEngine[Any]) -> str:
    """Raises ValueError for what no id of that type is written as."""
    if isinstance(kind, Uuid):
        return str(UUID(job_id))
    if isinstance(kind, Integer):
        bits = 64 if isinstance(kind, BigInteger) else 32
        if str(int(job_id)) != job_id or not -(2 ** (bits - 1)) <= int(job_id) < 2 ** (bits - 1):
            raise ValueError
    return job_id


def create(url: str, names: Names | None = None) -> list[str]:
    """Makes the table, or adds what it lacks, as `schema.migrate`. Raises SettingsError, QueueUnavailable."""
    made: list[str] = []
    _connect(url, lambda connection: made.extend(migrate(connection, names or Names()))).close()
    return made


def _connect(url: str, prepare: Callable[[Connection], None]) -> Database:
    if not url.startswith(("postgres://", "postgresql://", "postgresql+psycopg://")):
        raise SettingsError("I2V_JOBS_DATABASE_URL: has to be a PostgreSQL, such as postgresql://user:password@host/db")
    return Database(url, prepare)


def _refusal(job: JobRow) -> NotHolder:
    return NotHolder(f"the task is {job.status} and not held by this attempt")


def _ids(rows: Iterable[Row]) -> tuple[str, ...]:
    return tuple(str(row["id"]) for row in rows)


def _job(row: Row) -> JobRow:
    # An application may have left columns of its own at NULL, which stands for our defaults.
    fields = {name: value for name, value in row.items() if name in JobRow.model_fields and value is not None}
    for name in fields.keys() & {"id", "attempt_id"}:  # which may be UUIDs there
        fields[name] = str(fields[name])
    return JobRow.model_validate(fields)
