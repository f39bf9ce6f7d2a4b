"""What the caller of `/jobs/run` is told, and so whether it delivers the job again.

Cloud Tasks takes any 2xx as the end of a task and delivers it again after anything else (cloud.google.com/tasks/docs,
"Retry"), so a 2xx is given only where a further delivery could do nothing.
"""

from typing import Any, Literal, cast

from inference.errors import I2VError, InvalidTask, ItemMissing
from inference.push.jobs import Standing
from inference.task import Outcome, Value

RETRY_AFTER_S = 30
"""When a caller may ask again, where nothing tells better: a few times within the 90 s for which some queues retry."""

Word = Literal[
    "completed", "failed", "canceled",  # it ended here
    "skipped",  # it had ended before
    "accepted",  # it goes on, and nobody has to ask again
    "held",  # another attempt has it
    "busy",  # nothing more can begin here now
    "released",  # it was begun and given back
    "self_fenced",  # another attempt took it from this one
    "unknown_job", "refused", "malformed", "unavailable",
]  # fmt: skip


ENDS = ("completed", "failed", "canceled")
"""What a job's status is called once it has ended."""


class Answer(Value):
    """One answer: its HTTP status, and what its body says."""

    http_status: int
    outcome: Word
    job_id: str | None = None
    job_status: str | None = None
    attempt_id: str | None = None
    error: str | None = None  # one line, for people
    retry_after_s: int | None = None

    def body(self) -> dict[str, Any]:
        """The four fields of every answer, and the error where there is one."""
        told = self.model_dump(include={"job_id", "outcome", "job_status", "attempt_id"})
        return told | ({"error": self.error} if self.error else {})


def not_taken(job_id: str, found: Standing) -> Answer:
    """Where a job could not be taken: it has ended, or somebody alive has it."""
    return Answer(
        http_status=200 if found.has_ended else 503,
        outcome="skipped" if found.has_ended else "held",
        job_id=job_id,
        job_status=found.job_status,
        attempt_id=found.attempt_id,
        retry_after_s=None if found.has_ended else min(RETRY_AFTER_S, round(found.retry_after_s or RETRY_AFTER_S)),
    )


def accepted(job_id: str, attempt_id: str) -> Answer:
    """Where the work goes on after the answer."""
    return Answer(http_status=202, outcome="accepted", job_id=job_id, job_status="processing", attempt_id=attempt_id)


def busy(job_id: str, why: str, retry_after_s: float = RETRY_AFTER_S) -> Answer:
    """Where nothing more can begin."""
    return Answer(http_status=503, outcome="busy", job_id=job_id, error=why, retry_after_s=max(1, round(retry_after_s)))


def for_error(job_id: str | None, error: I2VError) -> Answer:
    """Where the job could not even be looked at."""
    match error:
        case ItemMissing():
            return Answer(http_status=404, outcome="unknown_job", job_id=job_id, error=str(error))
        case InvalidTask():  # the store has written it down as failed: a redelivery would change nothing
            return Answer(http_status=200, outcome="failed", job_id=job_id, job_status="failed", error=str(error))
        case _:
            return Answer(
                http_status=503,
                outcome="unavailable",
                job_id=job_id,
                error=str(error),
                retry_after_s=RETRY_AFTER_S,
            )


def ended(outcome: Outcome, attempt_id: str, found: Standing | None) -> Answer:
    """Where an attempt has ended here. `found`: where the job stands after it; None where that is not known."""
    job_status: str | None
    match outcome.status:
        case "completed":
            http_status, word, job_status = 200, "completed", "completed"
        case "cancelled":
            http_status, word, job_status = 200, "canceled", "canceled"
        case "failed" if found is None or found.has_ended:
            http_status, word, job_status = 200, "failed", "failed"
        case "lease_lost" if (
            found
            and found.has_ended
            and (found.job_status == "canceled" or (found.attempt_id == attempt_id and found.job_status in ENDS))
        ):  # it ended under this attempt, whose report was refused, or accepted in an answer that was lost
            http_status, word, job_status = 200, found.job_status, found.job_status
        case "lease_lost" if found and (found.has_ended or (found.is_held and found.attempt_id != attempt_id)):
            http_status, word, job_status = 200, "self_fenced", found.job_status
        case _:  # released; failed with a try left; lost, and nobody is known to have it
            http_status, word, job_status = 503, "released", found.job_status if found else None
    return Answer(
        http_status=http_status,
        outcome=cast("Word", word),
        job_id=outcome.item_id,
        job_status=job_status,
        attempt_id=attempt_id,
        error=outcome.error,
        retry_after_s=None if http_status == 200 else RETRY_AFTER_S,
    )
