"""Many at once: threads and processes on one database."""

import multiprocessing
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
from psycopg import pq
from sqlalchemy import create_engine, text

from inference.errors import QueueRefused, QueueUnavailable, SettingsError
from inference.server.rows.store import NewItem, NewPhoto, Store, new_id
from inference.sql import database
from tests.support import pgbouncer, postgres

ITEMS = 200
WORKERS = 8


def lease_all(store: Store, worker: int) -> list[str]:
    """Leases until there is nothing left, finishing each."""
    mine = []
    while item := store.lease(f"w{worker}", 600):
        store.heartbeat(item.id, f"w{worker}", 600)
        store.complete(item.id, f"w{worker}", f"videos/{item.id}.mp4")
        mine.append(item.id)
    return mine


def test_no_item_is_leased_twice(sql):
    """Eight threads empty the line together: each item goes to one of them, none is left."""
    wanted = {item.id for item in sql.store.add(NewPhoto("group-1", "p"), [NewItem() for _ in range(ITEMS)])}
    with ThreadPoolExecutor(WORKERS) as pool:
        leased = [item for mine in pool.map(lambda n: lease_all(sql.store, n), range(WORKERS)) for item in mine]
    assert len(leased) == ITEMS
    assert set(leased) == wanted
    assert sql.store.get_group("group-1").counts == {"completed": ITEMS}


def test_a_lapsed_lease_has_one_heir(sql):
    """Many workers reach for one item that ran out: one gets it, one crash is counted."""
    item = sql.add()
    sql.store.lease("w", 600)
    sql.store.heartbeat(item.id, "w", 600)
    sql.expire(item.id)
    together = threading.Barrier(WORKERS)

    def reach(n: int) -> bool:
        together.wait()  # half of them for the next item, half for this one
        return sql.store.lease(f"w{n}", 600, None, item.id if n % 2 else None) is not None

    with ThreadPoolExecutor(WORKERS) as pool:
        assert sum(pool.map(reach, range(WORKERS))) == 1
    assert sql.row(item.id).crash_count == 1


def open_and_lease(url: str) -> list[str]:
    """What one server process does at its start."""
    store = Store(url)
    mine = [item.id for _ in range(10) if (item := store.lease("w", 600))]
    store.close()
    return mine


def test_servers_start_together(tmp_path):
    """Four processes open a database that is not there yet; each finds a working one."""
    url = f"sqlite:///{tmp_path / 'new' / 'queue.db'}"
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        assert pool.map(open_and_lease, [url] * 4) == [[]] * 4
    store = Store(url)
    group = store.group()
    store.add(NewPhoto(group, "p"), [NewItem() for _ in range(40)])
    store.close()


def test_servers_start_together_on_postgresql(postgres_server):
    """As on SQLite, with threads: the tables are made once."""
    with postgres.database(postgres_server) as url, ThreadPoolExecutor(4) as pool:
        assert list(pool.map(open_and_lease, [url] * 4)) == [[]] * 4


def test_a_locked_database_is_unavailable(tmp_path, monkeypatch):
    """A writer that does not get its turn is told to try again; readers are not held up."""
    monkeypatch.setattr(database, "BUSY_S", 0.05)
    path = tmp_path / "queue.db"
    store = Store(f"sqlite:///{path}")
    other = create_engine(f"sqlite:///{path}", isolation_level="AUTOCOMMIT")
    with other.connect() as connection:
        connection.execute(text("BEGIN IMMEDIATE"))
        for write in (store.check, lambda: store.lease("w", 60), store.group):
            with pytest.raises(QueueUnavailable, match="locked"):
                write()
        assert store.list_items() == []
        connection.execute(text("ROLLBACK"))
    assert store.lease("w", 60) is None
    other.dispose()
    store.close()


def test_a_full_database_is_unavailable(tmp_path):
    """A write that does not fit leaves nothing behind and says why; what is there can still be read."""
    store = Store(f"sqlite:///{tmp_path / 'queue.db'}")
    group = store.group()
    with store._database._connection() as connection:
        pages = connection.execute("PRAGMA page_count").fetchone()[0]
        connection.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(QueueUnavailable, match="full"):
        store.add(NewPhoto(group, "p"), [NewItem("x" * 4000) for _ in range(20)])
    assert store.list_items() == []
    store.close()


def test_a_connection_that_died_costs_one_call(sql):
    """After the database dropped its connections the next call may fail, the one after does not."""
    if sql.dialect == "sqlite":
        pytest.skip("a file does not hang up")
    sql.add()
    sql.run(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
        "WHERE pid <> pg_backend_pid() AND datname = current_database()"
    )
    with pytest.raises(QueueUnavailable):
        sql.store.lease("w", 60)
    assert sql.store.lease("w", 60) is not None


def test_what_the_database_cannot_hold_is_refused(sql):
    """An id that is taken is the caller's mistake, and nothing of the call stays."""
    item = sql.add()
    with pytest.raises(QueueRefused):
        sql.store.add(NewPhoto("group-1", "p"), [NewItem(), NewItem(id=item.id)])
    assert [kept.id for kept in sql.store.list_items()] == [item.id]


@pytest.mark.parametrize("url", ["mysql://x/y", "sqlite://", "sqlite:///:memory:", "no url", "postgresql+asyncpg://x"])
def test_a_database_we_cannot_use_is_a_setting_to_correct(url):
    """The error says what a URL must look like."""
    with pytest.raises(SettingsError, match="the database URL"):
        Store(url)


def test_a_database_that_is_not_there_is_unavailable():
    """Nobody listens: to be tried again, and the address is not told."""
    with pytest.raises(QueueUnavailable, match="not available") as caught:
        Store("postgresql://user:hidden@127.0.0.1:1/x")
    assert "hidden" not in str(caught.value)


def test_a_folder_that_is_a_file_is_told(tmp_path):
    """A path that cannot hold a database is an error of ours, not of the driver."""
    Path(tmp_path / "file").write_text("")
    with pytest.raises(QueueUnavailable):
        Store(f"sqlite:///{tmp_path / 'file' / 'queue.db'}")


def test_ids_sort_by_time():
    """Rows are listed by id, newest first."""
    ids = [new_id() for _ in range(1000)]
    assert ids == sorted(ids)
    assert len(set(ids)) == len(ids)


def test_pages_and_groups(sql):
    """Newest first, narrowed by status and group, a page at a time; a group's status follows its items."""
    named = sql.store.group("holiday")
    assert sql.store.group("holiday") == named == sql.store.group(named)
    items = sql.store.add(NewPhoto(named, "p"), [NewItem(str(n)) for n in range(5)])
    other = sql.add()
    newest_first = [item.id for item in reversed(items)]
    assert [item.id for item in sql.store.list_items(limit=2)] == [other.id, newest_first[0]]
    assert [item.id for item in sql.store.list_items(before=newest_first[0], limit=9)] == newest_first[1:]
    assert [item.id for item in sql.store.list_items(group=named)] == newest_first
    assert sql.store.get_group(named).status == "pending"
    for item in items:
        assert sql.store.lease("w", 60).id == item.id
    assert [item.id for item in sql.store.list_items(status="pending")] == [other.id]
    assert sql.store.get_group(named).status == "processing"
    for item in items[1:]:
        sql.store.complete(item.id, "w", "v")
    assert sql.store.get_group(named).counts == {"completed": 4, "processing": 1}
    sql.store.fail(items[0].id, "w", "no")
    assert sql.store.get_group(named).status == "failed"
    assert [group.id for group in sql.store.list_groups(limit=1)] == [max(named, "group-1")]


def test_a_transaction_pooler_in_between(postgres_server):
    """Its connections know nothing of what was prepared or set before; no item is lost, and plans stay as they are."""
    with (
        postgres.database(postgres_server) as direct,
        pgbouncer.pooler(direct) as url,
        closing(Store(url)) as store,
        ThreadPoolExecutor(WORKERS) as pool,
    ):
        group = store.group()
        wanted = {item.id for item in store.add(NewPhoto(group, "p"), [NewItem() for _ in range(ITEMS)])}
        leased = [item for mine in pool.map(lambda n: lease_all(store, n), range(WORKERS)) for item in mine]
        assert len(leased) == ITEMS
        assert set(leased) == wanted
        settings = store._database._engine.raw_connection()
        with closing(settings):
            for _ in range(20):
                assert settings.driver_connection.execute("SHOW enable_sort").fetchone() == ("on",)


def test_a_lease_is_one_round_trip(postgres_server, tmp_path):
    """The setting for its plan travels with it: PostgreSQL may be far away, and a pooler keeps no session."""
    with (
        postgres.database(postgres_server) as url,
        closing(Store(url)) as store,
        (tmp_path / "wire").open("w+") as wire,
    ):
        [item] = store.add(NewPhoto(store.group(), "p"), [NewItem()])
        worker = "w%(o)s\\r'; -- \N{GREEK SMALL LETTER OMEGA}"
        with closing(store._database._engine.raw_connection()) as only:
            sent = only.driver_connection.pgconn
        sent.trace(wire.fileno())
        sent.set_trace_flags(pq.Trace.SUPPRESS_TIMESTAMPS)
        assert store.lease(worker, 600, "wan", item.id).worker_id == worker
        sent.untrace()
        [message] = [line for line in Path(wire.name).read_text().splitlines() if line.startswith("F\t")]
        assert f'Query\t "{database.NO_SORTING}; ' in message
