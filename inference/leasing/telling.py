"""What applications hear of a lease: its snapshots and its outcome, as events of a hub.

    a snapshot        a progress event      status "processing"
    completed         a completion event    with where the video is, what it cost, how long it took
    failed            an error event        error_code "failed"
    cancelled         an error event        error_code "cancelled"
    released          a progress event      status "pending": another worker takes the task, from its beginning
    lease_lost        nothing               whoever has the task now tells of it

The project is the task's group, or the task itself where its queue has no groups; `task_name` is the task's id.
"""

import threading
import time
from collections.abc import Callable
from typing import Any

import structlog

from inference.progress.events import CompletionEvent, ErrorEvent, Event, ProgressEvent, percent
from inference.progress.gate import PENDING
from inference.progress.hub import ProgressHub
from inference.progress.stages import Progress
from inference.task import Lease, Outcome, Task

log = structlog.get_logger(__name__)


class Telling:
    """Tells of one lease. Raises nothing, and may be called from any thread."""

    def __init__(self, hub: ProgressHub | None, lease: Lease) -> None:
        """`hub`: None to tell nobody."""
        task = lease.task
        self._hub = None if task.takes("progress") else hub  # then it publishes the events itself
        self._project_id, self._task_name, self._group_id = task.group_id or task.item_id, task.item_id, task.group_id
        self._lease = _number_of(task)
        self._lock = threading.Lock()
        self._sequence = 0
        self._ended = False

    def sink(self, progress: Progress) -> None:
        """Takes a snapshot."""
        if self._hub is None or progress.stage == "done":  # the completion says so
            return
        with self._lock:
            if self._ended:  # a thread that was left behind
                return
            metadata = self._metadata()
        metadata |= {"stage": progress.stage, "done": progress.done, "total": progress.total}
        if progress.eta_s is not None:
            metadata["eta_s"] = progress.eta_s
        if progress.detail:
            metadata["detail"] = dict(progress.detail)
        self._publish(lambda: self._progress(progress.fraction, "processing", progress.stage, metadata))

    def ended(self, outcome: Outcome) -> None:
        """The lease has ended like this."""
        if self._hub is None:
            return
        with self._lock:
            self._ended = True
            metadata = self._metadata()
        project_id, task_name = self._project_id, self._task_name
        match outcome.status:
            case "completed":
                result = self._result(outcome)
                self._publish(lambda: CompletionEvent(project_id=project_id, task_name=task_name, result=result))
            case "failed" | "cancelled":
                said = outcome.error or outcome.status
                details = {"error_code": outcome.status, "lease": self._lease}
                self._publish(
                    lambda: ErrorEvent(project_id=project_id, task_name=task_name, error=said, details=details)
                )
            case "released":
                self._publish(lambda: self._progress(0.0, PENDING, outcome.error or "", metadata))

    def _metadata(self) -> dict[str, Any]:
        self._sequence += 1
        return {"lease": self._lease, "sequence": self._sequence}

    def _progress(self, fraction: float, status: str, message: str, metadata: dict[str, Any]) -> Event:
        return ProgressEvent(
            project_id=self._project_id,
            task_name=self._task_name,
            progress=fraction,
            progress_percent=percent(fraction),
            status=status,
            message=message,
            metadata=metadata,
        )

    def _result(self, outcome: Outcome) -> dict[str, Any]:
        result: dict[str, Any] = {
            "item_id": self._task_name,
            "group_id": self._group_id,
            "storage_path": outcome.storage_path,
            "seconds": round(sum(outcome.stage_seconds.values()), 3),
            "lease": self._lease,
        }
        if outcome.video is not None:
            result |= {"duration_s": outcome.video.duration_s, "cost_usd": outcome.video.cost_usd}
        return {name: value for name, value in result.items() if value is not None}

    def _publish(self, make: Callable[[], Event]) -> None:
        try:
            if self._hub is not None:
                self._hub.publish(make())
        except Exception as error:  # noqa: BLE001 - telling of a lease never fails it
            log.warning("event_not_told", item_id=self._task_name, error=f"{type(error).__name__}: {error}")


def _number_of(task: Task) -> int:
    """A number that grows with every lease of the task: its queue's count, or the time in milliseconds.

    A time is worth something within one process alone, as clocks of machines differ; there it tells a second try of a
    task from the first.
    """
    return time.time_ns() // 1_000_000 if task.lease_seq is None else task.lease_seq
