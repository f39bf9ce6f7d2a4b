"""A SQLite or PostgreSQL database, configured for leasing, with its errors mapped to ours.

Connections are in autocommit: a single statement is its own transaction, in one round trip. Operations with two or more
statements begin one with `transaction`; on SQLite as a writer from the start, since a transaction that reads first
fails at its first write if another process has written in between, whatever the timeout.

A pooler in front of PostgreSQL (pgbouncer, Supabase's port 6543) may give each transaction another connection. So
nothing is prepared or set for longer than a transaction.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from inference import private
from inference.errors import QueueRefused, QueueUnavailable, SettingsError
from inference.sql.statement import Statement

BUSY_S = 10.0
"""How long a writer waits for its turn, and a caller for a connection, before QueueUnavailable is raised."""

EXAMINED_PART = 100
"""Checks for damage take at most one hundredth of the time."""

# Until PostgreSQL has statistics about a new backlog it assumes a short one, and would not take the first item from its
# index but read and sort all of it for each lease: 10 ms for 20,000 items, measured.
NO_SORTING = "SET LOCAL enable_sort = off"

FILLFACTOR_PERCENT = 75
"""How full PostgreSQL may pack the pages of a table whose rows are renewed. It writes a renewal, which changes nothing
that is indexed, beside what it replaces and leaves every index alone, but only if the page has room. PostgreSQL stores
what makes a row longer than about a quarter of a page elsewhere (its TOAST threshold), so a quarter is room for any."""

SCHEMA_LOCK = 0x693276  # "i2v": an advisory lock of PostgreSQL, so that servers starting at once do not collide

SILENCE = {"tcp_user_timeout": 15_000, "keepalives_idle": 10, "keepalives_interval": 5, "keepalives_count": 3}
"""A network that swallows packets is noticed after about 15 s, which Linux alone would wait out for a quarter of an
hour. Options of libpq: milliseconds the first, then seconds."""

Row = dict[str, Any]


class Database:
    """Runs statements. Safe to use from many threads.

    Raises, from any method: QueueUnavailable where a retry may help, QueueRefused where it cannot.
    """

    def __init__(self, url: str, prepare: Callable[[Connection], None]) -> None:
        """Opens the database, and sees to its tables with `prepare`, in a transaction that runs nowhere else meanwhile.

        Raises SettingsError for an unusable address, and what `prepare` raises.
        """
        self._url = _parse(url)
        self.dialect_name = self._url.get_backend_name()
        self._sqlite = self.dialect_name == "sqlite"
        self._begin = "BEGIN IMMEDIATE" if self._sqlite else "BEGIN"
        # SQLite allows one writer at a time, and polls with pauses of milliseconds while another one writes. Threads of
        # this process take turns here instead, and wake up as soon as it is their turn.
        self._turns = Turns() if self._sqlite else None
        self._engine = _open_sqlite(self._url) if self._sqlite else _open_postgresql(self._url)
        self._compiled: dict[Statement, tuple[str, Mapping[str, Any]]] = {}
        self._columns: dict[Statement, tuple[str, ...]] = {}
        self._driver: Any = self._engine.dialect.dbapi
        self._examining = threading.Lock()
        self._examine_from = 0.0  # monotonic seconds
        self._damage: str | None = None
        try:
            self._prepare(prepare)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Closes every connection."""
        self._engine.dispose()

    def examine(self) -> None:
        """Checks a whole SQLite file for damage, on a new connection that has none of it cached.

        Raises QueueUnavailable where it is damaged. PostgreSQL checks its own files. Strangers may trigger this check,
        which takes 0.25 s for 100,000 items (measured), so its result holds for EXAMINED_PART times as long.
        """
        if not self._sqlite or not self._examining.acquire(blocking=False):
            return
        try:
            began = time.monotonic()
            if began >= self._examine_from:
                self._damage = self._find_damage()
                ended = time.monotonic()
                self._examine_from = ended + EXAMINED_PART * (ended - began)
        finally:
            self._examining.release()
        if self._damage is not None:
            raise QueueUnavailable(f"the database is damaged: {self._damage}")

    def _find_damage(self) -> str | None:
        file = f"file:{quote(str(Path(self._url.database or '').absolute()))}?mode=ro"
        try:
            with closing(self._driver.connect(file, uri=True, timeout=BUSY_S)) as connection:
                [found] = connection.execute("PRAGMA quick_check(1)").fetchone()
        except self._driver.Error as error:
            return _reason(error)
        return None if found == "ok" else str(found).replace("\n", " ")

    def read(self, statement: Statement, **parameters: Any) -> list[Row]:
        """Runs one statement that changes nothing."""
        with self._connection() as connection:
            return self._run(connection, statement, parameters)

    def write(self, statement: Statement, **parameters: Any) -> list[Row]:
        """Runs one statement as a transaction of its own; the rows it returns are committed."""
        with self._connection() as connection, self._taking_turns():
            return self._run(connection, statement, parameters)

    def write_unsorted(self, statement: Statement, **parameters: Any) -> list[Row]:
        """As `write`, on PostgreSQL alone, where every order asked for has its index and no plan may sort instead.

        Several commands in one message are one transaction, in one round trip. Such a message has no place for
        parameters, so the driver writes them into the text, quoted.
        """
        with self._connection() as connection:
            text, own = self._text(statement)
            cursor = self._driver.ClientCursor(connection)
            cursor.execute(f"{NO_SORTING}; {text}", {**own, **parameters})
            cursor.nextset()
            return self._rows(cursor, statement)

    @contextmanager
    def transaction(self) -> Iterator["Transaction"]:
        """Several statements that are carried out together or not at all."""
        with self._connection() as connection, self._taking_turns():
            connection.execute(self._begin)
            try:
                yield Transaction(self, connection)
                connection.execute("COMMIT")
            except BaseException:
                # The first error is the one that matters. A connection that cannot roll back is discarded below.
                with suppress(self._driver.Error):
                    connection.execute("ROLLBACK")
                raise

    def _run(self, connection: Any, statement: Statement, parameters: Mapping[str, Any]) -> list[Row]:
        text, own = self._text(statement)
        return self._rows(connection.execute(text, {**own, **parameters}), statement)

    def _text(self, statement: Statement) -> tuple[str, Mapping[str, Any]]:
        """A statement in SQL, and those of its parameters that are not the caller's."""
        if statement not in self._compiled:
            compiled = statement.sql.compile(dialect=self._engine.dialect)
            # SQLAlchemy adds parameters of its own, such as the zero of OFFSET, whose values it knows.
            constants = {name: value for name, value in compiled.params.items() if value is not None}
            self._compiled[statement] = (str(compiled), constants)
        return self._compiled[statement]

    def _rows(self, cursor: Any, statement: Statement) -> list[Row]:
        names = self._columns.get(statement)
        if names is None:
            # Read once a statement: psycopg makes an object per column each time, which takes a sixth of a call.
            names = self._columns[statement] = tuple(column[0] for column in cursor.description or ())
        # All rows are read: SQLite commits a single statement only after its last row.
        return [dict(zip(names, values, strict=True)) for values in cursor.fetchall()] if names else []

    @contextmanager
    def _connection(self) -> Iterator[Any]:
        """A connection of the driver itself: SQLAlchemy's own work per call would take longer than these calls."""
        with self._mapped():
            pooled = self._engine.raw_connection()
            try:
                yield pooled.driver_connection
            except self._driver.Error as error:
                if self._engine.dialect.is_disconnect(error, pooled.driver_connection, None):
                    pooled.invalidate(error)
                    self._engine.dispose()  # a server that was restarted has ended all the others, too
                raise
            finally:
                pooled.close()

    def _prepare(self, prepare: Callable[[Connection], None]) -> None:
        with self._mapped(), self._taking_turns(), self._engine.connect() as connection:
            connection.exec_driver_sql("BEGIN IMMEDIATE" if self._sqlite else "BEGIN")
            if not self._sqlite:
                connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({SCHEMA_LOCK})")
            prepare(connection)
            connection.exec_driver_sql("COMMIT")

    def _taking_turns(self) -> AbstractContextManager[object]:
        return self._turns.take() if self._turns else nullcontext()

    @contextmanager
    def _mapped(self) -> Iterator[None]:
        driver = self._driver
        try:
            yield
        except (driver.DataError, driver.IntegrityError) as error:
            raise QueueRefused(f"the database does not accept this: {_reason(error)}") from error
        except (driver.Error, SQLAlchemyError) as error:
            raise QueueUnavailable(f"the database is not available, try again: {_reason(error)}") from error


class Transaction:
    """Statements between a BEGIN and a COMMIT."""

    def __init__(self, database: Database, connection: Any) -> None:
        self._database = database
        self._connection = connection

    def run(self, statement: Statement, **parameters: Any) -> list[Row]:
        """Runs one statement."""
        return self._database._run(self._connection, statement, parameters)  # noqa: SLF001 - its other half


class Turns:
    """A fair lock: it is handed over in the order of the requests.

    Python's own lock goes to the fastest thread, mostly the one that has just released it: with eight writers, the
    slowest hundredth of claims waited for 15 to 30 ms. With a fair lock a claim waits for seven others at most.
    """

    def __init__(self, patience_s: float = BUSY_S) -> None:
        self._patience_s = patience_s
        self._mutex = threading.Lock()
        self._taken = False
        self._waiting: deque[threading.Lock] = deque()

    @contextmanager
    def take(self) -> Iterator[None]:
        """Waits for its turn. Raises QueueUnavailable where that takes too long."""
        self._acquire()
        try:
            yield
        finally:
            self._release()

    def _acquire(self) -> None:
        with self._mutex:
            if not self._taken:
                self._taken = True
                return
            gate = threading.Lock()
            gate.acquire()
            self._waiting.append(gate)
        if gate.acquire(timeout=self._patience_s):
            return
        with self._mutex:
            if gate in self._waiting:
                self._waiting.remove(gate)
                raise QueueUnavailable("the database is not available, try again: too many writers")
        # The lock was handed over in the moment of the timeout, so it is this thread's turn after all.

    def _release(self) -> None:
        with self._mutex:
            if self._waiting:
                self._waiting.popleft().release()
            else:
                self._taken = False


def _reason(error: Exception) -> str:
    """An error in one line, without the statement, its parameters or the address of the database."""
    original = getattr(error, "orig", None) or error
    return str(original).strip().partition("\n")[0] or type(original).__name__


def _parse(url: str) -> URL:
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        raise SettingsError("the database URL is malformed: sqlite:///file or postgresql://…") from None
    if parsed.drivername in ("postgres", "postgresql"):
        parsed = parsed.set(drivername="postgresql+psycopg")
    # A hint in the addresses of poolers for other clients, which is not needed here.
    parsed = parsed.difference_update_query(["pgbouncer"])
    if parsed.drivername not in ("sqlite", "postgresql+psycopg"):
        raise SettingsError(f"the database URL begins with {parsed.drivername}: it must be sqlite or postgresql")
    if parsed.drivername == "sqlite" and parsed.database in (None, "", ":memory:"):
        raise SettingsError("the database URL names no file: sqlite:///file")
    return parsed


def _open_postgresql(url: URL) -> Engine:
    # No ping before each use: a dead connection fails one call, which is retried, and empties the pool.
    return create_engine(
        url,
        isolation_level="AUTOCOMMIT",
        pool_size=10,
        max_overflow=10,
        pool_timeout=BUSY_S,
        connect_args={"connect_timeout": 5, "prepare_threshold": None, **SILENCE},
    )


def _open_sqlite(url: URL) -> Engine:
    file = Path(url.database or "")
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        private.make_file(file)  # SQLite gives its journal files the same permissions
        for suffix in ("-wal", "-shm"):
            private.close(file.with_name(file.name + suffix))
    except OSError as error:
        raise QueueUnavailable(f"the database file cannot be made: {error.strerror}") from None
    engine = create_engine(
        url,
        paramstyle="named",
        isolation_level="AUTOCOMMIT",
        pool_size=10,
        max_overflow=30,
        pool_timeout=BUSY_S,
        connect_args={"timeout": BUSY_S, "check_same_thread": False},
    )

    @event.listens_for(engine, "connect")
    def prepare(connection: Any, _record: object) -> None:
        cursor = connection.cursor()
        cursor.execute(f"PRAGMA busy_timeout = {BUSY_S * 1000:.0f}")
        cursor.execute("PRAGMA synchronous = FULL")  # what was committed survives a power cut
        cursor.execute("PRAGMA foreign_keys = ON")
        _use_wal(cursor)
        cursor.close()

    return engine


def _use_wal(cursor: Any) -> None:
    """Switches to write-ahead logging, so that reads and a write run side by side. Retries while the file is busy."""
    give_up_at = time.monotonic() + BUSY_S
    while cursor.execute("PRAGMA journal_mode").fetchone()[0] != "wal":
        try:
            cursor.execute("PRAGMA journal_mode = WAL").fetchone()
        except Exception:
            if time.monotonic() > give_up_at:
                raise
            time.sleep(0.01)
