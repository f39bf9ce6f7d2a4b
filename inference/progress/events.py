"""Progress as applications hear of it: three events in JSON, whatever made them and whatever carries them.

    {"type": "progress",   "project_id", "task_name", "progress": 0.35, "progress_percent": 35, "status", "message",
                           "metadata", "timestamp"}
    {"type": "error",      "project_id", "task_name", "error", "details", "timestamp"}
    {"type": "completion", "project_id", "task_name", "result", "timestamp"}

An event is a snapshot and not a difference, so that missing one loses nothing. A project is whatever an application
follows as one: a film, an upload, a group of photos. Tasks of a project are told apart by their `task_name`.

What this package writes into `metadata`, all of it optional:

    stage      where the task is now
    eta_s      seconds that are left, as far as is known
    lease      a number that grows with every new try of the task: what an earlier try still says is stale
    sequence   grows with every event of one try
"""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter

from inference.task import Value

MAX_PROGRESS = 0.99
"""Until the completion of a task was accepted; then it is 1."""


def percent(progress: float) -> int:
    """0.35 of a task is 35 %, and 0.999 is 99: what is not whole yet is never rounded up."""
    return int(progress * 100 + 1e-6)  # 0.29 * 100 is 28.999999999999996


def timestamp() -> str:
    """Now, in UTC, as events have it: 2026-01-31T12:00:00.000Z."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


class _Event(Value):
    project_id: str
    task_name: str


class ProgressEvent(_Event):
    """How far a task is."""

    type: Literal["progress"] = "progress"
    progress: Annotated[float, Field(ge=0, le=1)]
    progress_percent: Annotated[int, Field(ge=0, le=100)]
    status: str
    message: str = ""
    metadata: Mapping[str, Any] = Field(default_factory=dict)
    timestamp: str = Field(default_factory=timestamp)


class ErrorEvent(_Event):
    """A task ended without a result. `details` may have `retry_after` in seconds and an `error_code`."""

    type: Literal["error"] = "error"
    error: str
    details: Mapping[str, Any] = Field(default_factory=dict)
    timestamp: str = Field(default_factory=timestamp)


class CompletionEvent(_Event):
    """A task ended with a result."""

    type: Literal["completion"] = "completion"
    result: Mapping[str, Any] = Field(default_factory=dict)
    timestamp: str = Field(default_factory=timestamp)


Event = ProgressEvent | ErrorEvent | CompletionEvent

event_of: TypeAdapter[Event] = TypeAdapter(Annotated[Event, Field(discriminator="type")])
"""Reads an event from JSON or from a mapping. Raises pydantic's ValidationError."""


def as_json(event: Event) -> str:
    """The event as it travels. What JSON has no form for is written as `str` has it; NaN becomes null.

    Raises pydantic's PydanticSerializationError for text that cannot be encoded, such as a lone surrogate.
    """
    return event.model_dump_json(fallback=str)


def is_terminal(event: Event) -> bool:
    """Whether the task has ended with this event: such an event is never left out."""
    return not isinstance(event, ProgressEvent)
