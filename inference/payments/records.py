"""Small records that outlive the process that wrote them.

A ledger or a dispatcher remembers kilobytes, and needs only one guarantee of its store: of two writers that add the
same key, one is told that it was first. `modal.Dict`, a SQLite file and, in tests, a dict give that guarantee.
"""

import sqlite3
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol, TypeVar

import anyio.lowlevel
import anyio.to_thread

from inference import private
from inference.errors import RecordsUnavailable

T = TypeVar("T")

BUSY_TIMEOUT_S = 10.0
"""How long one process waits for another's write. Writes take milliseconds."""

SCHEMA = "CREATE TABLE IF NOT EXISTS records (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID"


class Records(Protocol):
    """Text by key. Every call is one atomic step.

    Raises RecordsUnavailable, from any method; a write may have been carried out all the same.
    """

    async def add(self, key: str, value: str) -> bool:
        """Writes unless the key exists; returns whether it wrote. Of two callers that race, one gets False."""
        ...

    async def get(self, key: str) -> str | None:
        """The value written last, or None."""
        ...

    async def put(self, key: str, value: str) -> None:
        """Writes, also over an existing value."""
        ...

    async def remove(self, key: str) -> None:
        """Removes the key, if it exists."""
        ...

    async def all(self) -> dict[str, str]:
        """Everything, by key."""
        ...


class MemoryRecords:
    """Records that end with the process: for single runs without a queue, and for tests."""

    def __init__(self, kept: Mapping[str, str] | None = None) -> None:
        self._kept = dict(kept or {})

    async def add(self, key: str, value: str) -> bool:
        """See Records."""
        await anyio.lowlevel.checkpoint()
        if key in self._kept:
            return False
        self._kept[key] = value
        return True

    async def get(self, key: str) -> str | None:
        """See Records."""
        await anyio.lowlevel.checkpoint()
        return self._kept.get(key)

    async def put(self, key: str, value: str) -> None:
        """See Records."""
        await anyio.lowlevel.checkpoint()
        self._kept[key] = value

    async def remove(self, key: str) -> None:
        """See Records."""
        await anyio.lowlevel.checkpoint()
        self._kept.pop(key, None)

    async def all(self) -> dict[str, str]:
        """See Records."""
        await anyio.lowlevel.checkpoint()
        return dict(self._kept)


class SqliteRecords:
    """Records in a file, which several processes may share."""

    def __init__(self, path: Path) -> None:
        self._path = path

    async def add(self, key: str, value: str) -> bool:
        """See Records."""
        insert = "INSERT INTO records VALUES (?, ?) ON CONFLICT DO NOTHING"
        return await self._run(lambda connection: connection.execute(insert, (key, value)).rowcount == 1)

    async def get(self, key: str) -> str | None:
        """See Records."""
        select = "SELECT value FROM records WHERE key = ?"
        row = await self._run(lambda connection: connection.execute(select, (key,)).fetchone())
        return row[0] if row else None

    async def put(self, key: str, value: str) -> None:
        """See Records."""
        upsert = "INSERT INTO records VALUES (?, ?) ON CONFLICT (key) DO UPDATE SET value = excluded.value"
        await self._run(lambda connection: connection.execute(upsert, (key, value)))

    async def remove(self, key: str) -> None:
        """See Records."""
        await self._run(lambda connection: connection.execute("DELETE FROM records WHERE key = ?", (key,)))

    async def all(self) -> dict[str, str]:
        """See Records."""
        return await self._run(lambda connection: dict(connection.execute("SELECT key, value FROM records").fetchall()))

    async def _run(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """One transaction on a connection of its own, so that threads share none and none has to be closed later."""

        def transaction() -> T:
            try:
                private.make_folder(self._path.parent, f"{self._path.name}*", "dispatch-*.lock")
                private.make_file(self._path)  # SQLite gives its journal files the same permissions
                connection = sqlite3.connect(self._path, timeout=BUSY_TIMEOUT_S, isolation_level=None)
                try:
                    connection.execute("PRAGMA synchronous = FULL")  # an intent has to survive a power cut
                    connection.execute(SCHEMA)
                    return work(connection)
                finally:
                    connection.close()
            except (OSError, sqlite3.Error) as error:
                raise RecordsUnavailable(f"{self._path} cannot be used: {error}") from None

        # Not abandoned on cancellation: a write that has begun is finished first.
        return await anyio.to_thread.run_sync(transaction)
