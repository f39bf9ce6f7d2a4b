"""Tables of jobs to test, each with the means to let a holder die."""

from typing import Any
from uuid import UUID

import psycopg

from inference.queues.video_jobs.schema import Names
from inference.queues.video_jobs.store import JobStore, create
from inference.testing.memory_jobs import MemoryJobs

STALE_S = 480.0
OURS = Names()
THEIRS = Names(
    "app.jobs",
    {
        "id": "job_id",
        "status": "state",
        "input": "payload",
        "attempt_id": "attempt",
        "cancel_requested": "cancel",
        "attempts": "tries",
        "created_at": "inserted_at",
        "progress": "so_far",
    },
)
THEIR_TABLE = """
CREATE SCHEMA app;
CREATE TYPE app.state AS ENUM ('draft', 'queued', 'processing', 'completed', 'failed', 'canceled');
CREATE TABLE app.jobs (
    customer text NOT NULL DEFAULT 'somebody',
    job_id uuid PRIMARY KEY,
    state app.state NOT NULL DEFAULT 'draft',
    payload json NOT NULL,
    attempt uuid,
    cancel boolean,
    tries smallint,
    so_far json,
    error varchar(40),
    worker varchar(3),
    inserted_at timestamp NOT NULL DEFAULT now()
);
"""
"""A table as an application may have it: other names, an enum, UUIDs, JSON as text, counters at NULL."""

TABLES = {"ours": OURS, "theirs": THEIRS}


def uuid(number: int) -> str:
    """An id that both kinds of tables can have."""
    return str(UUID(int=number))


class MemorySubject:
    """The table in memory. Its time stands still."""

    now = 1000.0

    def __init__(self, worker_type: Any = None) -> None:
        self.store = MemoryJobs(lambda: self.now, stale_s=STALE_S, worker_type=worker_type)

    def expire(self, job_id: str, seconds: float = STALE_S + 1) -> None:
        """The holder was heard of last so long ago."""
        if job_id in self.store.beat_at:
            self.store.beat_at[job_id] = self.now - seconds

    def age(self, job_id: str, seconds: float) -> None:
        """The job was added so long ago."""
        self.store.added_at[job_id] = self.now - seconds


class SqlSubject:
    """The table in a PostgreSQL."""

    def __init__(self, url: str, names: Names = OURS, worker_type: Any = None) -> None:
        self.url, self.names = url, names
        self.admin = psycopg.connect(url, autocommit=True)
        self.store = JobStore(url, names, stale_s=STALE_S, worker_type=worker_type)

    @staticmethod
    def prepare(url: str, names: Names) -> None:
        """Makes the table in an empty database."""
        if names is THEIRS:
            with psycopg.connect(url, autocommit=True) as admin:
                admin.execute(THEIR_TABLE)
        create(url, names)

    def wipe(self) -> None:
        """No job is left."""
        self.admin.execute(f"DELETE FROM {self.names.table}")

    def set(self, job_id: str, column: str, value: str) -> None:
        """Writes a column behind the store's back; `value` is SQL."""
        self.admin.execute(
            f"UPDATE {self.names.table} SET {self.names.column(column)} = {value} "
            f"WHERE {self.names.column('id')} = '{job_id}'"
        )

    def expire(self, job_id: str, seconds: float = STALE_S + 1) -> None:
        """See MemorySubject."""
        self.admin.execute(
            f"UPDATE {self.names.table} SET lease_beat_at = clock_timestamp() - interval '{seconds} seconds' "
            f"WHERE {self.names.column('id')} = '{job_id}' AND lease_beat_at IS NOT NULL"
        )

    def age(self, job_id: str, seconds: float) -> None:
        """See MemorySubject."""
        self.set(job_id, "created_at", f"clock_timestamp() - interval '{seconds} seconds'")

    def value(self, job_id: str, column: str) -> Any:
        """A column as it lies there."""
        return self.admin.execute(
            f"SELECT {self.names.column(column)} FROM {self.names.table} WHERE {self.names.column('id')} = '{job_id}'"
        ).fetchone()[0]

    def close(self) -> None:
        """Closes every connection."""
        self.store.close()
        self.admin.close()
