"""What the containers of a fleet tell the next tick: how long clips take, which pool fails, what was decided.

Kept in records that outlive every container. Nothing here decides who owns a task: a reading that is a little old
costs a minute, never a clip. Times are wall-clock seconds, since no two readers share a process.

Containers write at the same time, and the records have no compare-and-set. They do have `add`, which fails where the
key exists already. So every value is kept in numbered versions: a writer reads the newest one and adds the next number.
Where another writer has added that number first, it reads again and tries the number after that.
"""

import json
import time
from collections.abc import Callable
from typing import Any

from pydantic import ValidationError

from inference.leasing.executor import MAX_FAULTS_IN_A_ROW
from inference.payments.records import Records
from inference.providers import PoolName
from inference.task import Value

SMOOTHING = 0.3
"""Weight of the newest clip in the running mean of seconds per clip: about the last five count."""

DECISIONS_KEPT = 20

NUMBERS_KEPT = 50
"""Versions that are kept of a value; older ones are removed. A slow writer has to find its number taken, and not
removed and free again: that would take so many others between its read and its `add`, which are milliseconds apart."""


class PoolRecord(Value):
    """What is known of one pool."""

    clip_s: float | None = None  # seconds one generation takes, a running mean; None until one was made
    clips: int = 0
    faults: int = 0  # in a row
    failing: str | None = None  # why nothing should be sent there; None while it works
    failing_at: float = 0.0  # when that was found, or last tried again
    tries: int = 0  # how often it was tried again since
    waiting_since: float | None = None  # when all that was sent there was first seen waiting for a container


class Readings:
    """Readings of a fleet. Raises RecordsUnavailable."""

    def __init__(self, records: Records, *, fleet: str | None = None, clock: Callable[[], float] = time.time) -> None:
        """`fleet`: a name that keeps its readings apart from those of other fleets in the same records."""
        self._records, self._clock = records, clock
        # Records that exist have this name; under another one, a fleet would have to learn anew.
        self._prefix = "board" if fleet is None else f"board/{fleet}"

    async def pool(self, name: PoolName) -> PoolRecord:
        """What is known of a pool; of one that was never heard of, nothing."""
        _, text = await self._newest(name)
        return _read(text)

    async def worked(self, name: PoolName, clip_s: float | None = None) -> None:
        """The pool can work; with `clip_s`, it made a clip in so many seconds of its engine's time."""

        def change(known: PoolRecord) -> dict[str, Any]:
            update: dict[str, Any] = {"faults": 0, "failing": None, "tries": 0}
            if clip_s is not None:
                before = clip_s if known.clip_s is None else known.clip_s
                update |= {"clip_s": round(before + SMOOTHING * (clip_s - before), 3), "clips": known.clips + 1}
            return update

        await self._update(name, change)

    async def faulted(self, name: PoolName, why: str, *, certain: bool = False) -> None:
        """A lease ended badly and its task may not be to blame; `certain` where the pool cannot work as it is."""

        def change(known: PoolRecord) -> dict[str, Any]:
            faults = known.faults + 1
            is_failing = certain or faults >= MAX_FAULTS_IN_A_ROW
            return {"faults": faults} | ({"failing": why, "failing_at": self._clock()} if is_failing else {})

        await self._update(name, change)

    async def tried(self, name: PoolName) -> None:
        """A failing pool was asked to show that it works again."""
        await self._update(name, lambda known: {"failing_at": self._clock(), "tries": known.tries + 1})

    async def seen_waiting(self, name: PoolName, *, waits: bool) -> float:
        """Whether all that was sent to a pool waits for a container; returns for how long that has been so."""

        def change(known: PoolRecord) -> dict[str, Any]:
            is_known = waits == (known.waiting_since is not None)
            return {} if is_known else {"waiting_since": self._clock() if waits else None}

        known = await self._update(name, change)
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
        at = self._clock()
        await self._change("decisions", lambda text: json.dumps([*_decisions(text), (at, decision)][-DECISIONS_KEPT:]))

    async def decisions(self) -> list[tuple[float, str]]:
        """When and what, oldest first."""
        _, text = await self._newest("decisions")
        return _decisions(text)

    async def _update(self, name: PoolName, change: Callable[[PoolRecord], dict[str, Any]]) -> PoolRecord:
        """Changes fields of what is known of a pool; returns what is known then."""

        def changed(text: str | None) -> str:
            known = _read(text)
            return known.model_copy(update=change(known)).model_dump_json()

        return _read(await self._change(name, changed))

    async def _change(self, key: str, change: Callable[[str | None], str]) -> str:
        """Replaces a value by what `change` makes of it, also while others write; `change` may be called repeatedly."""
        while True:
            number, text = await self._newest(key)
            if (changed := change(text)) == text:
                return changed
            if await self._records.add(f"{self._prefix}/{key}/{number + 1}", changed):
                await self._put(f"{key}/newest", str(number + 1))
                await self._records.remove(f"{self._prefix}/{key}/{number + 1 - NUMBERS_KEPT}")
                return changed

    async def _newest(self, key: str) -> tuple[int, str | None]:
        """The newest version's number and text; 0 and None where there is none."""
        said = await self._get(f"{key}/newest") or ""
        number = int(said) if said.isdecimal() else 0
        text = await self._get(f"{key}/{number}") if number else None
        while (later := await self._get(f"{key}/{number + 1}")) is not None:  # added, but `newest` does not name it yet
            number, text = number + 1, later
        return number, text

    async def _get(self, key: str) -> str | None:
        return await self._records.get(f"{self._prefix}/{key}")

    async def _put(self, key: str, value: str) -> None:
        await self._records.put(f"{self._prefix}/{key}", value)


def _read(text: str | None) -> PoolRecord:
    try:
        return PoolRecord.model_validate_json(text) if text else PoolRecord()
    except ValidationError:  # written by another version of this code: measure anew
        return PoolRecord()


def _decisions(text: str | None) -> list[tuple[float, str]]:
    try:
        return [(float(at), str(what)) for at, what in json.loads(text or "[]")]
    except (ValueError, TypeError):
        return []
