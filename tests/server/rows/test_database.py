"""Turns: a lock that is handed over in order, and given up on in time. And what an earlier version left."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from inference.errors import QueueUnavailable, SettingsError
from inference.server.rows.database import Turns
from inference.server.rows.store import Store


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
    before = sql.row(item.id)
    for column in ("renewed", "lost_count"):
        sql.run(f"ALTER TABLE video_items DROP COLUMN {column}")
    for lacking in ("TABLE idempotency_keys", "TABLE unnamed_objects", "INDEX video_items_of_photo"):
        sql.run(f"DROP {lacking}")
    together = threading.Barrier(4)

    def open_it(_number):
        together.wait()
        Store(sql.url).close()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(open_it, range(4)))
    assert sql.row(item.id) == before
    assert sql.store.heartbeat(item.id, "w", 600).renewed
    sql.run("DROP INDEX video_items_of_photo")  # it is there again
    assert sql.store.removal.delete(item.id) == [item.photo_storage_path]


def test_tables_of_somebody_else_are_left_alone(sql):
    """An app's own are called the same: it is told, and nothing is added to them."""
    for table in ("video_items", "photos", "groups"):
        sql.run(f"DROP TABLE {table}")
    sql.run("CREATE TABLE video_items (id TEXT PRIMARY KEY, status TEXT NOT NULL)")
    with pytest.raises(SettingsError, match="has a table video_items of something else"):
        Store(sql.url)
    sql.run("INSERT INTO video_items VALUES ('a', 'pending')")  # as many columns as before
