"""What a listener is told, whatever carries it: a snapshot, or what it missed; then everything as it happens."""

import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol

import structlog
from starlette.requests import HTTPConnection

from inference.errors import is_legible
from inference.progress.events import Event, as_json
from inference.progress.hub import ProgressHub

log = structlog.get_logger(__name__)

MAX_PROJECT_ID = 200

EVENT_ID = re.compile(r"[0-9]{1,18}-[0-9]{1,18}")
"""Ids of events, as far as a stream of Redis can have them: it takes no number above 2^64."""

Snapshot = Callable[[str], Awaitable[list[Event]]]
"""The newest event of each task of a project, from wherever an application keeps its tasks."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """What is granted to listeners."""

    listeners: int = 750
    """At once; more are asked to come again later. Fewer than a server of ours has connections, since others need some,
    too."""

    send_s: float = 10.0
    """For one event to be taken. Who needs longer counts as dead."""

    longest_s: float = 3600.0
    """A listener is sent away after so long and may come again: its permission is looked at only when it comes."""


class Tell(Protocol):
    """Sends one event to a listener."""

    async def __call__(self, event_id: str | None, text: str) -> None:
        """`text`: the event as JSON. `event_id`: None where following cannot be resumed after this event."""
        ...


def is_project_id(text: str) -> bool:
    """Whether a project may have this id: some characters that people can read, in any script."""
    return 0 < len(text) <= MAX_PROJECT_ID and all(map(is_legible, text))


def last_seen(connection: HTTPConnection) -> str | None:
    """The id of the last event that the listener knows.

    An EventSource that connects again sends it in a header, and repeats whatever its address had in the first place.
    """
    given = connection.headers.get("last-event-id") or connection.query_params.get("after") or ""
    return given if EVENT_ID.fullmatch(given, endpos=40) else None


async def follow(hub: ProgressHub, project_id: str, after: str | None, snapshot: Snapshot | None, tell: Tell) -> None:
    """Tells a listener of a project what came after the id, or else a snapshot, and then everything.

    Ends when the hub is closed. Raises ListenerTooSlow, and what `tell` raises.
    """
    async with hub.subscribe(project_id, after) as subscription:
        if not subscription.resumed:
            events = await _asked(snapshot, project_id)
            known = subscription.snapshot
            if events is None:
                for published in known:
                    await tell(published.id, published.json)
            for number, event in enumerate(events or [], start=1):
                # The application's snapshot is newer than all that the hub knew when the subscription began, so a
                # listener that has the whole of it can go on from there.
                is_last = number == len(events or [])
                await tell(known[-1].id if is_last and known else None, as_json(event))
        async for published in subscription:
            await tell(published.id, published.json)


async def _asked(snapshot: Snapshot | None, project_id: str) -> list[Event] | None:
    if snapshot is None:
        return None
    try:
        return await snapshot(project_id)
    except Exception as error:  # noqa: BLE001 - an application's own; what the hub knows is better than nothing
        log.warning("no_snapshot", project_id=project_id, error=repr(error))
        return None
