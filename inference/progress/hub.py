"""Where events go, and where listeners get them: each project is a stream of its own, of bounded length."""

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol

from inference.progress.events import Event

START = "0-0"
"""The id before every other: who asks for what came after it gets all that is kept."""


@dataclass(frozen=True, slots=True)
class Published:
    """An event of a stream."""

    id: str  # "milliseconds-number", as Redis numbers the entries of a stream; grows along the stream
    event: Event
    json: str  # the event, written once for all listeners


class Subscription(Protocol):
    """One listener's way through a stream."""

    resumed: bool  # False: nothing is known of the id that was named, or events after it are gone; `snapshot` has all
    snapshot: list[Published]  # where `resumed` is False: the newest event of each task, in the order of the stream

    def __aiter__(self) -> AsyncIterator[Published]:
        """Events in order, each once. Raises ListenerTooSlow where the listener fell behind too far.

        Ends when the hub is closed.
        """
        ...


class ProgressHub(Protocol):
    """Takes events and hands them to listeners."""

    def publish(self, event: Event) -> None:
        """Adds an event to the stream of its project. Raises nothing: an event that cannot be told is a log line."""
        ...

    def subscribe(self, project_id: str, after: str | None = None) -> AbstractAsyncContextManager[Subscription]:
        """Follows a project: after the event of the id `after`, or without one from a snapshot on."""
        ...

    def close(self) -> None:
        """Ends every subscription; later events go nowhere."""
        ...
