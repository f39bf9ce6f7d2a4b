"""A job as the table has it, what a queue asks of the table, and what whoever pushes jobs is told. Needs no extra.

queued ──acquire──▶ processing ──complete──▶ completed
  ▲                  │  │  │
  │◀────release──────┘  │  └──────fail─────▶ failed
  │                     │
  └──── no beat ────────┘   (MAX_CRASHES or MAX_LOST times: failed; cancel_requested: canceled)

cancel_requested: a queued job ends `canceled` at once; one that is worked on when its holder writes next, releases
it, or is found dead.
"""

from collections.abc import Mapping
from typing import Any, Protocol

from inference.task import Value

STATUSES = ("queued", "processing", "completed", "failed", "canceled")

WAITING_S = 600.0
"""A job that waits for so long is asked for again. Within it, whoever added it asks, and a caller that was told to come
again comes (Cloud Tasks: after seconds first, and after an hour at the latest)."""

AT_ONCE = 100
"""Jobs that one sweep lists as waiting."""

ONGOING = frozenset({"queued", "processing"})


class JobRow(Value):
    """One row of the table."""

    id: str
    status: str  # one of STATUSES, or a word of the application's own, which is no business of ours
    input: Any = None  # as the application wrote it; see `wire.py`
    attempt_id: str | None = None  # who holds it, or ended it
    worker: str | None = None
    silent_s: float | None = None  # seconds since its holder was heard of; None where nobody holds it
    beaten: bool = False  # this holder was heard of
    attempts: int = 0
    crashes: int = 0
    losses: int = 0
    progress: Any = None  # see `wire.py`; None where no beat told any
    cancel_requested: bool = False
    artifact_key: str | None = None
    error: str | None = None


class Jobs(Protocol):
    """What a VideoJobsQueue needs of a table."""

    stale_s: float  # without a beat for so long, a holder is dead

    def check(self) -> None: ...
    def acquire(self, attempt_id: str, worker: str) -> JobRow | None: ...
    def acquire_given(self, job_id: str, attempt_id: str, worker: str, *, any_kind: bool = False) -> JobRow | None: ...
    def backlog(self) -> int: ...
    def get(self, job_id: str) -> JobRow: ...
    def beat(self, job_id: str, attempt_id: str, progress: Mapping[str, Any] | None = None) -> bool: ...
    def look(self, job_id: str, attempt_id: str) -> bool: ...
    def complete(self, job_id: str, attempt_id: str, artifact_key: str) -> str: ...
    def fail(self, job_id: str, attempt_id: str, message: str) -> str: ...
    def release(self, job_id: str, attempt_id: str) -> str: ...
    def add(self, job_id: str, content: Mapping[str, Any]) -> bool: ...
    def sweep(self, waiting_s: float = WAITING_S) -> "Swept": ...
    def close(self) -> None: ...


class Standing(Value):
    """Where a job stands, as the table has it now."""

    job_status: str  # as JobRow.status
    attempt_id: str | None = None  # of the attempt that holds or ended it; None where there was none
    has_ended: bool = False  # nothing will be done about it any more
    is_held: bool = False  # an attempt has it whose last beat is fresh
    retry_after_s: float | None = None  # when its holder counts as dead, if it is not heard of again


class Swept(Value):
    """What a sweep found. Ids of jobs."""

    requeued: tuple[str, ...] = ()  # their holder was dead, so they wait again
    canceled: tuple[str, ...] = ()  # were to be, and nobody alive worked on them
    failed: tuple[str, ...] = ()  # their holders died too often
    waiting: tuple[str, ...] = ()  # have waited for longer than a delivery takes: whoever was to ask for them has not
