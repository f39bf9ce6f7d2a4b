"""What reports the progress of a piece of work, from within it.

    tracker = ProgressTracker(self, project_id, "director")          `self`: a bound Celery task, or None
    tracker.update(0.35, "processing", "clip 3 of 10", {"clip": 3})
    tracker.complete({"path": "videos/1.mp4"})
    tracker.error("no credits", {"error_code": "402"})               in its place, where it failed

    with ProgressTracker(None, project_id, "director") as tracker:   completes, or tells the error that comes out
        ...

Events go to the hub that is given, or to the one that is installed in this process; where there is neither, this is
silent. A Celery task is told as well, so that its result backend knows. Nothing here ever makes the work fail: what
cannot be told is a line in the log.
"""

import math
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

import structlog

from inference.progress.eta import StageHistory, TaskEta
from inference.progress.events import MAX_PROGRESS, CompletionEvent, ErrorEvent, Event, ProgressEvent, percent
from inference.progress.gate import INTERVAL_S, PENDING, is_aimed_at_the_work
from inference.progress.hub import ProgressHub, installed

log = structlog.get_logger(__name__)

PROCESSING = "processing"

STATE = "PROGRESS"
"""The state of a Celery task that reports its progress. SUCCESS and FAILURE are Celery's own to write, when the task
has returned or raised: a FAILURE that holds anything but an exception cannot be read back (celery.backends.base)."""

ROUNDING = 1e-6
"""What adding up fractions may lead above 1, without being percent."""

PAUSE_S = 30.0
"""A result backend that failed is left alone for so long: each try may cost seconds."""

HISTORY = StageHistory()
"""How long work took that this process tracked, by the name of the task: `eta_s` comes from it."""

_lease_lock = threading.Lock()
_last_lease = 0


class ProgressTracker:
    """Reports one try of one task. Safe to use from any thread.

    The fraction never falls, and stays below 1 until `complete`. After `complete` or `error` nothing more is said.
    """

    def __init__(self, task: Any, project_id: str, task_name: str, *, hub: ProgressHub | None = None) -> None:
        """`task`: whatever has Celery's `update_state`, or None. `hub`: in place of the one of the process."""
        self.project_id, self.task_name = _text(project_id), _text(task_name)
        self._task = task
        self._hub = hub
        self._lock = threading.RLock()
        self._lease = _new_lease()
        self._sequence = 0
        self._fraction = 0.0
        self._ended = False
        self._eta = TaskEta(HISTORY, self.task_name)
        self._told: tuple[float, int, str] = (-math.inf, -1, "")  # what the Celery task knows: when, percent, status
        self._silent_until = -math.inf

    def update(
        self,
        progress: float,
        status: str = PROCESSING,
        message: str = "",
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        """So much is done: a fraction of the whole, 0..1, or percent above that, so 75 is 0.75.

        What is no number leaves the fraction as it is. `metadata` may hold anything; what JSON has no form for is
        written as `str` has it, and `lease` and `sequence` are the tracker's own. Where it names a `stage`, `eta_s` is
        told as soon as it is known.
        """
        with self._harmless():
            free = self._plain(metadata)
            self._move(self._fraction_of(progress), _text(status), _text(message), free, free.get("stage"))

    def complete(self, result: Mapping[str, Any] | None = None) -> None:
        """It ended well."""
        with self._harmless():
            outcome = self._plain(result)
            event = CompletionEvent(project_id=self.project_id, task_name=self.task_name, result=outcome)
            with self._lock:
                if self._ended:
                    return
                self._ended = True
                self._eta.complete(time.monotonic())
            self._tell(event)

    def error(self, error: str | BaseException, details: Mapping[str, Any] | None = None) -> None:
        """It ended without a result. `details` may have `retry_after`, in seconds, and an `error_code`.

        Anything else may be in it, too, but for `lease`, which tells tries apart.
        """
        with self._harmless():
            said = _text(error) or (type(error).__name__ if isinstance(error, BaseException) else "failed")
            free = self._plain(details) | {"lease": self._lease}
            event = ErrorEvent(project_id=self.project_id, task_name=self.task_name, error=said, details=free)
            with self._lock:
                if self._ended:
                    return
                self._ended = True
            self._tell(event)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self.complete()
        elif any(base.__name__ == "TaskPredicate" for base in type(error).__mro__):
            # celery.exceptions: Retry, Ignore and Reject say what becomes of the task, and are no errors. It waits.
            self.update(self._fraction, PENDING, type(error).__name__.lower())
        else:
            self.error(error, {"error_code": type(error).__name__})

    def _fraction_of(self, progress: object) -> float:
        """As a fraction; 0 for what is no number, so that what was done before stays."""
        try:
            fraction = float(progress)  # type: ignore[arg-type]
        except (TypeError, ValueError):
            fraction = math.nan
        if not math.isfinite(fraction):
            log.warning("progress is not a number", task_name=self.task_name, progress=_text(progress)[:80])
            return 0.0
        return fraction / 100 if fraction > 1 + ROUNDING else fraction

    def _plain(self, value: object) -> dict[str, Any]:
        """What the application tells, in types of JSON. If that fails, the event is told without it."""
        try:
            return _plain_mapping(value if value is None or isinstance(value, Mapping) else {"value": value})
        except Exception as error:
            if is_aimed_at_the_work(error):
                raise
            log.warning("a part of progress could not be told", task_name=self.task_name, error=repr(error))
            return {}

    def _move(self, fraction: float, status: str, message: str, free: dict[str, Any], stage: str | None) -> None:
        with self._lock:
            if self._ended:
                return
            self._sequence += 1
            self._fraction = max(self._fraction, min(fraction, MAX_PROGRESS))
            if stage is not None:
                now = time.monotonic()
                self._eta.observe(_text(stage), self._fraction, now)
                if (left_s := self._eta.left_s(now)) is not None:
                    free.setdefault("eta_s", round(left_s, 1))
            event = ProgressEvent(
                project_id=self.project_id,
                task_name=self.task_name,
                progress=self._fraction,
                progress_percent=percent(self._fraction),
                status=status,
                message=message,
                metadata=free | {"lease": self._lease, "sequence": self._sequence},
            )
        self._tell(event)

    def _tell(self, event: Event) -> None:
        hub = self._hub or installed()
        if hub is not None:
            hub.publish(event)
        if self._task is not None:
            self._tell_task(event)

    def _tell_task(self, event: Event) -> None:
        """Writes the event into the state of the Celery task, unless it says nothing new."""
        request = getattr(self._task, "request", None)
        if request is not None and not _keeps_states(self._task, request):
            return
        now = time.monotonic()
        if isinstance(event, ProgressEvent):
            told_at, *told = self._told
            says_nothing_new = told == [event.progress_percent, event.status] and now - told_at < INTERVAL_S
            if says_nothing_new or now < self._silent_until:
                return
            self._told = (now, event.progress_percent, event.status)
        try:
            self._task.update_state(state=STATE, meta=event.model_dump(mode="json"), **_impatience(self._task))
        except Exception:
            self._silent_until = now + PAUSE_S
            raise

    @contextmanager
    def _harmless(self) -> Iterator[None]:
        """Whatever goes wrong, the work goes on; only what is aimed at the work itself passes through."""
        try:
            yield
        except Exception as error:
            if is_aimed_at_the_work(error):
                raise
            log.warning("progress could not be told", task_name=self.task_name, error=repr(error))


class BatchProgressTracker(ProgressTracker):
    """Reports work on several items as one task: the whole is the mean of the items."""

    def __init__(
        self, task: Any, project_id: str, task_name: str, total_items: int, *, hub: ProgressHub | None = None
    ) -> None:
        super().__init__(task, project_id, task_name, hub=hub)
        self.total_items = total_items
        self._items: dict[int, float] = {}

    @property
    def completed_items(self) -> int:
        """How many items are done."""
        with self._lock:
            return sum(done >= 1 for done in self._items.values())

    def update_item(self, index: int, progress: float, status: str = PROCESSING, message: str = "") -> None:
        """So much of an item is done: a fraction, 0..1, or percent above that. Items count from 0.

        One that does not exist is a line in the log.
        """
        with self._harmless():
            if index not in range(self.total_items):
                log.warning("no such item", task_name=self.task_name, item=_text(index), total=self.total_items)
                return
            fraction = min(max(self._fraction_of(progress), 0.0), 1.0)
            with self._lock:
                self._items[index] = max(self._items.get(index, 0.0), fraction)
                whole = math.fsum(self._items.values()) / self.total_items
                counts = {
                    "total_items": self.total_items,
                    "completed_items": self.completed_items,
                    "current_item": index,
                }
            self._move(whole, _text(status), _text(message), counts, "items")


def _keeps_states(task: Any, request: Any) -> bool:
    """Whether Celery stores the end of this call. Where it does not, PROGRESS would stay for ever."""
    if getattr(request, "id", None) is None:  # called as a plain function
        return False
    if getattr(request, "is_eager", False) and not getattr(task, "store_eager_result", False):
        return False
    return not (getattr(request, "ignore_result", False) or getattr(task, "ignore_result", False))


def _impatience(task: Any) -> dict[str, int]:
    """With `result_backend_always_retry`, Celery tries for ever to store a state. Only the task's end is worth that."""
    return {"max_retries": 0} if getattr(getattr(task, "backend", None), "always_retry", False) is True else {}


def _new_lease() -> int:
    """A number that no later try of a task falls below: milliseconds since 1970.

    A task that Celery tries again may be given to any worker, and the same work may be asked for anew under the same
    name, so counting the tries of one Celery task would not do.
    """
    global _last_lease  # noqa: PLW0603 - one for the process
    with _lease_lock:
        _last_lease = max(_last_lease + 1, time.time_ns() // 1_000_000)
        return _last_lease


def _text(value: object) -> str:
    """As `str` has it. Half of a character of two halves, which nothing could encode, becomes a question mark."""
    return str(value).encode("utf-8", "replace").decode()


def _plain_mapping(value: Mapping[str, Any] | None) -> dict[str, Any]:
    return {_text(name): _plain(each) for name, each in (value or {}).items()}


def _plain(value: Any) -> Any:
    """In types of JSON."""
    match value:
        case None | bool() | int():
            return value
        case float():
            return value if math.isfinite(value) else None
        case Mapping():
            return _plain_mapping(value)
        case list() | tuple() | set() | frozenset():
            return [_plain(each) for each in value]
        case _:
            return _text(value)
