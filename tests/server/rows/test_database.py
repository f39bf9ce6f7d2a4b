"""Turns: a lock that is handed over in order, and given up on in time. And what an earlier version left."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy.schema import CreateTable

from inference.errors import QueueUnavailable, SettingsError
from inference.server.rows import schema
from inference.server.rows.migration import INDEX_NAMES
from inference.server.rows.store import Store
from inference.sql.database import Turns


def test_turns_come_in_the_order_they_were_asked_for():
    """Nobody overtakes, and no two have it at once."""
    turns, order, inside = Turns(), [], []

    def work(number):
        with turns.take():
            inside.append(number)
            assert len(inside) == 1
            order.append(number)
            inside.pop()

    threads = []
    with turns.take():
        for number in range(8):
            thread = threading.Thread(target=work, args=(number,))
            thread.start()
            threads.append(thread)
            while len(turns._waiting) <= number:
                threading.Event().wait(0.001)
    for thread in threads:
        thread.join()
    assert order == list(range(8))


def test_a_turn_that_does_not_come_is_given_up_and_leaves_no_gap():
    """Whoever gave up is not handed the lock later on."""
    turns = Turns(patience_s=0.01)
    with turns.take(), pytest.raises(QueueUnavailable, match="too many writers"), turns.take():
        pass
    with turns.take():
        pass


def test_an_error_inside_ends_the_turn():
    """The next one gets it."""
    turns = Turns(patience_s=0.01)

    def fails():
        with turns.take():
            raise ValueError("inside")

    with pytest.raises(ValueError, match="inside"):
        fails()
    with turns.take():
        pass


def test_a_database_of_an_earlier_version_is_brought_up_to_date(sql):
    """By each server that opens it, at once if need be; what is in it stays, and goes on."""
    item = sql.add()
    sql.store.lease("w", 600)
    done, failed = sql.add(), sql.add()
    for each in (done, failed):
        sql.store.lease("w", 600, None, each.id)
    sql.store.complete(done.id, "w", "v")
    sql.store.fail(failed.id, "w", "no")
    before, done, failed = (sql.row(each.id) for each in (item, done, failed))
    for index in ("video_items_ended", "video_items_completed"):
        sql.run(f"DROP INDEX {index}")
    for column in ("renewed", "lost_count", "started_at", "ended_at", "cost_usd"):
        sql.run(f"ALTER TABLE video_items DROP COLUMN {column}")
    sql.run("UPDATE video_items SET progress_stage = 'upload', progress_fraction = 0.9 WHERE id = :id", id=done.id)
    for table in ("idempotency_keys", "unnamed_objects", "deleted_videos"):
        sql.run(f"DROP TABLE {table}")
    sql.run("DROP INDEX video_items_of_photo")
    together = threading.Barrier(4)

    def open_it(_number):
        together.wait()
        Store(sql.url).close()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(open_it, range(4)))
    assert sql.row(item.id) == before.model_copy(update={"started_at": None})
    for was in (done, failed):  # it was written last when it ended
        assert sql.row(was.id) == was.model_copy(update={"started_at": None, "ended_at": was.updated_at})
    assert sql.store.heartbeat(item.id, "w", 600).renewed
    sql.run("DROP INDEX video_items_of_photo")  # it is there again
    assert sql.store.removal.delete(item.id) == [item.photo_storage_path]


FILLFACTOR = "SELECT option_value FROM pg_class, pg_options_to_table(reloptions) WHERE oid = 'video_items'::regclass"


def test_the_index_that_every_renewal_had_to_be_written_in_is_dropped(sql):
    """On PostgreSQL pages get room for renewals, too, as much as somebody who runs the database has chosen."""
    item = sql.add()
    sql.store.lease("w", 600)
    sql.run("DROP INDEX video_items_processing")
    sql.run("CREATE INDEX video_items_leases ON video_items (leased_until) WHERE status = 'processing'")
    chosen = [None]
    if sql.dialect == "postgresql":
        chosen = [("RESET (fillfactor)", "75"), ("SET (fillfactor = 50)", "50")]
    for choice in chosen:
        if choice:
            sql.run(f"ALTER TABLE video_items {choice[0]}")
        Store(sql.url).close()
        with sql._admin.connect() as connection:
            names = {name for (name,) in connection.exec_driver_sql(INDEX_NAMES[sql.dialect])}
            assert "video_items_leases" not in names
            assert names >= {index.name for index in schema.video_items.indexes}
            if choice:
                assert connection.exec_driver_sql(FILLFACTOR).scalars().all() == [choice[1]]
    assert sql.store.heartbeat(item.id, "w", 600).renewed


@pytest.mark.parametrize("sql", ["postgresql"], indirect=True)
def test_a_server_that_starts_waits_for_no_writer_of_another_table(sql):
    """Who adds a task holds `photos` and asks for `video_items`. The other way round, one of the two would fail."""
    sql.add()
    sql.run("CREATE INDEX video_items_leases ON video_items (leased_until) WHERE status = 'processing'")
    impatient = f"{sql.url}{'&' if '?' in sql.url else '?'}options=-c%20lock_timeout%3D1000"
    with sql._admin.execution_options(isolation_level="READ COMMITTED").connect() as writer:
        writer.exec_driver_sql("UPDATE photos SET width = 1")
        Store(impatient).close()  # drops the index
        writer.exec_driver_sql("UPDATE video_items SET retry_count = 0")
        Store(impatient).close()  # has nothing left to do


EARLIER_LANE = """lane TEXT GENERATED ALWAYS AS (
    CASE WHEN coalesce(inference_provider, '') IN ('', 'wan_local') THEN 'wan' ELSE 'runway' END
) STORED"""


def test_a_database_that_went_by_another_table_of_providers_goes_by_this_one(sql):
    """What nobody knows was Runway's there. Each server that opens it sees to that, at once if need be."""
    made = str(CreateTable(schema.video_items).compile(dialect=sql._admin.dialect))
    sql.run("DROP TABLE video_items")
    sql.run(made.replace("status TEXT NOT NULL", f"{EARLIER_LANE}, status TEXT NOT NULL", 1))
    sql.run(f"CREATE INDEX video_items_line_by_lane ON video_items (lane, created_at, id) WHERE {schema.ONGOING}")
    items = [sql.add(inference_provider=hint) for hint in ("comfyui", "veo3.1", None)]
    before = [sql.row(item.id) for item in items]
    together = threading.Barrier(4)

    def open_it(_number):
        together.wait()
        Store(sql.url).close()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(open_it, range(4)))
    assert [sql.row(item.id) for item in items] == before
    with sql._admin.connect() as connection:
        names = {name for (name,) in connection.exec_driver_sql(INDEX_NAMES[sql.dialect])}
    assert names >= {index.name for index in schema.video_items.indexes}
    assert "video_items_line_by_lane" not in names
    assert [sql.store.lease("w", 60, "wan").id for _ in range(2)] == [items[0].id, items[2].id]
    assert sql.store.lease("w", 60, "wan") is None
    assert sql.store.lease("r", 60, "runway").id == items[1].id


def test_tables_of_somebody_else_are_left_alone(sql):
    """An app's own are called the same: it is told, and nothing is added to them."""
    for table in ("video_items", "photos", "groups"):
        sql.run(f"DROP TABLE {table}")
    sql.run("CREATE TABLE video_items (id TEXT PRIMARY KEY, status TEXT NOT NULL)")
    with pytest.raises(SettingsError, match="has a table video_items of something else"):
        Store(sql.url)
    sql.run("INSERT INTO video_items VALUES ('a', 'pending')")  # as many columns as before
