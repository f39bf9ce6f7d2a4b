"""Stores to test, each with the means to let a lease run out."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import pytest
from sqlalchemy import create_engine, text

from inference.queues.item import Item
from inference.server.rows.store import NewItem, NewPhoto, Store, new_id
from inference.testing.memory_store import MemoryStore
from tests.support import postgres

GROUP = "group-1"
SQL = ("sqlite", "postgresql")


class Subject(Protocol):
    """A store under test."""

    store: Any

    def add(self, **fields: Any) -> Item:
        """One more item, last in the line."""

    def expire(self, item_id: str) -> None:
        """Lets the item's lease have run out a second ago."""

    def row(self, item_id: str) -> Item:
        """The row as it lies there: looking at it sweeps nothing."""

    def remaining_s(self, item: Item) -> float | None:
        """How long a lease has to go, by the store's clock."""


class MemorySubject:
    """The store in memory. Its time stands still."""

    now = 1000.0

    def __init__(self) -> None:
        self.store = MemoryStore(lambda: self.now)

    def add(self, **fields: Any) -> Item:
        """See Subject."""
        return self.store.add(b"", group_id=GROUP, **fields)

    def expire(self, item_id: str) -> None:
        """See Subject."""
        item = self.store.items[item_id]
        self.store.items[item_id] = item.model_copy(update={"leased_until": self.now - 1})

    def row(self, item_id: str) -> Item:
        """See Subject."""
        return self.store.items[item_id]

    def remaining_s(self, item: Item) -> float | None:
        """See Subject."""
        return None if item.leased_until is None else item.leased_until - self.now


class SqlSubject:
    """The SQL store on an empty database."""

    def __init__(self, url: str) -> None:
        self.store = Store(url)
        self.url = url
        self.dialect = self.store._database.dialect_name
        self.now = "strftime('%s', 'now')" if self.dialect == "sqlite" else "extract(epoch FROM clock_timestamp())"
        self._admin = create_engine(self.store._database._url, isolation_level="AUTOCOMMIT")
        self.wipe()

    def run(self, statement: str, **parameters: Any) -> None:
        """Runs SQL behind the store's back."""
        with self._admin.connect() as connection:
            connection.execute(text(statement), parameters)

    def wipe(self) -> None:
        """Leaves one empty group."""
        for table in ("video_items", "photos", "groups", "unnamed_objects", "idempotency_keys", "deleted_videos"):
            self.run(f"DELETE FROM {table}")
        self.run("INSERT INTO groups (id, created_at) VALUES (:id, 0)", id=GROUP)

    def add(self, **fields: Any) -> Item:
        """See Subject."""
        photo_id = fields.pop("photo_id", None) or new_id()
        photo = NewPhoto(GROUP, f"{GROUP}/{photo_id}_original.jpg", id=photo_id)
        return self.store.add(photo, [NewItem(**fields)])[0]

    def expire(self, item_id: str) -> None:
        """See Subject."""
        self.run(f"UPDATE video_items SET leased_until = {self.now} - 1 WHERE id = :id", id=item_id)

    def row(self, item_id: str) -> Item:
        """See Subject."""
        return self.store._find(item_id)

    def remaining_s(self, item: Item) -> float | None:
        """See Subject."""
        return None if item.leased_until is None else item.leased_until - time.time()

    def close(self) -> None:
        """Closes every connection."""
        self.store.close()
        self._admin.dispose()


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    """A PostgreSQL for this process."""
    with postgres.server() as url:
        yield url


@contextmanager
def _database(kind: str, request: pytest.FixtureRequest, folder: Path) -> Iterator[str]:
    if kind == "sqlite":
        yield f"sqlite:///{folder / 'queue.db'}"
    else:
        with postgres.database(request.getfixturevalue("postgres_server")) as url:
            yield url


@pytest.fixture(params=SQL)
def sql(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[SqlSubject]:
    """The SQL store, on each database."""
    with _database(request.param, request, tmp_path) as url:
        subject = SqlSubject(url)
        yield subject
        subject.close()


@pytest.fixture(params=("memory", *SQL))
def subject(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Subject]:
    """Each store there is."""
    if request.param == "memory":
        yield MemorySubject()
        return
    with _database(request.param, request, tmp_path) as url:
        made = SqlSubject(url)
        yield made
        made.close()
