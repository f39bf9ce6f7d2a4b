"""What the containers of a fleet tell the next tick: how long clips take, which pool fails, what was decided.

Kept in records that outlive every container. Nothing here decides who owns a task: a reading that is lost or a
little old costs a minute, never a clip. Times are wall-clock seconds, since no two readers share a process.
"""

import json
import time
from collections.abc import Callable
from typing import Any, Literal

from pydantic import ValidationError

from inference.records import Records
from inference.task import Value

PoolName = Literal["gpu", "runway"]

SMOOTHING = 0.3
"""Weight of the newest clip in the running mean of seconds per clip: about the last five count."""

FAULTS = 3
"""Leases of one pool in a row that its machines failed, not the tasks, until the pool counts as failing."""

DECISIONS_KEPT = 20


class PoolRecord(Value):
    """What is known of one pool."""

    clip_s: float | None = None  # seconds one generation takes, a running mean; None until one was made
    clips: int = 0
    faults: int = 0  # in a row
    failing: str | None = None  # why nothing should be sent there; None while it works
    failing_at: float = 0.0  # when that was found, or last tried again
    tries: int = 0  # how often it was tried again since
    waiting_since: float | None = None  # when all that was sent there was first seen waiting for a container


class Board:
    """Readings of a fleet. Raises RecordsUnavailable."""

    def __init__(self, records: Records, *, fleet: str | None = None, clock: Callable[[], float] = time.time) -> None:
        """`fleet`: which of those that share the records; where there is one, it needs no name."""
        self._records, self._clock = records, clock
        self._prefix = "board" if fleet is None else f"board/{fleet}"

    async def pool(self, name: PoolName) -> PoolRecord:
        """What is known of a pool; of one that was never heard of, nothing."""
        text = await self._get(name)
        try:
            return PoolRecord.model_validate_json(text) if text else PoolRecord()
        except ValidationError:  # of an earlier version: it is measured anew
            return PoolRecord()

    async def worked(self, name: PoolName, clip_s: float | None = None) -> None:
        """The pool can work; with `clip_s`, it made a clip in so many seconds of its engine's time."""
        known = await self.pool(name)
        update: dict[str, Any] = {"faults": 0, "failing": None, "tries": 0}
        if clip_s is not None:
            before = clip_s if known.clip_s is None else known.clip_s
            update |= {"clip_s": round(before + SMOOTHING * (clip_s - before), 3), "clips": known.clips + 1}
        if (changed := known.model_copy(update=update)) != known:
            await self._write(name, changed)

    async def faulted(self, name: PoolName, why: str, *, certain: bool = False) -> None:
        """A lease ended badly and its task may not be to blame; `certain` where the pool cannot work as it is."""
        known = await self.pool(name)
        faults = known.faults + 1
        update: dict[str, Any] = {"faults": faults}
        if certain or faults >= FAULTS:
            update |= {"failing": why, "failing_at": self._clock()}
        await self._write(name, known.model_copy(update=update))

    async def tried(self, name: PoolName) -> None:
        """A failing pool was asked to show that it works again."""
        known = await self.pool(name)
        await self._write(name, known.model_copy(update={"failing_at": self._clock(), "tries": known.tries + 1}))

    async def seen_waiting(self, name: PoolName, *, waits: bool) -> float:
        """Whether all that was sent to a pool waits for a container; returns for how long that has been so."""
        known = await self.pool(name)
        if waits != (known.waiting_since is not None):
            known = known.model_copy(update={"waiting_since": self._clock() if waits else None})
            await self._write(name, known)
        return self.since_s(known.waiting_since) if known.waiting_since is not None else 0.0

    async def deployed(self, version: str) -> None:
        """What was deployed last: containers of anything else take no more tasks."""
        if await self.version() != version:
            await self._put("version", version)

    async def version(self) -> str | None:
        """What was deployed last; None before its first tick."""
        return await self._get("version")

    def since_s(self, at: float) -> float:
        """Seconds since a reading was taken."""
        return max(0.0, self._clock() - at)

    async def dry(self) -> None:
        """The queue had nothing to give."""
        await self._put("dry", json.dumps(self._clock()))

    async def undry_s(self) -> float:
        """Seconds since the queue was last seen empty: nothing in it waits longer. 0 where it was never seen."""
        try:
            at = float(json.loads(await self._get("dry") or ""))
        except (ValueError, TypeError):  # none yet, or of another version
            await self.dry()
            return 0.0
        return self.since_s(at)

    async def decided(self, decision: str) -> None:
        """Keeps what a tick did, for whoever asks; the oldest is forgotten."""
        kept = await self.decisions()
        await self._put("decisions", json.dumps([*kept, [self._clock(), decision]][-DECISIONS_KEPT:]))

    async def decisions(self) -> list[tuple[float, str]]:
        """When and what, oldest first."""
        try:
            return [(float(at), str(what)) for at, what in json.loads(await self._get("decisions") or "[]")]
        except (ValueError, TypeError):
            return []

    async def _get(self, key: str) -> str | None:
        return await self._records.get(f"{self._prefix}/{key}")

    async def _put(self, key: str, value: str) -> None:
        await self._records.put(f"{self._prefix}/{key}", value)

    async def _write(self, name: PoolName, record: PoolRecord) -> None:
        await self._put(name, record.model_dump_json())
