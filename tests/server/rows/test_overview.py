"""The whole queue in a few numbers, and what a store tells of its changes."""

import time

import pytest
import structlog.testing

from inference.errors import ItemMissing
from inference.queues.item import CRASHED, MAX_CRASHES, ItemProgress
from inference.server.rows.removal import DeletedItem
from inference.server.rows.store import NewItem, NewPhoto

DAY_S, HOUR_S = 24 * 3600, 3600


def completed(sql, ended_s_ago=0.0, **report):
    """An item that was completed some time ago."""
    item = sql.add()
    sql.store.lease("w", 600, None, item.id)
    sql.store.complete(item.id, "w", "v", **report)
    sql.run(f"UPDATE video_items SET ended_at = {sql.now} - :ago WHERE id = :id", ago=ended_s_ago, id=item.id)
    return item


def test_an_empty_queue_is_all_noughts(sql):
    """Every status is counted, also where nothing has it; nothing waits, so nothing has waited."""
    seen = sql.store.overview()
    assert seen.counts == dict.fromkeys(("pending", "processing", "completed", "failed", "cancelled"), 0)
    assert (seen.oldest_wait_s, seen.completed_last_hour, seen.spent_today_usd, seen.unpriced_today) == (None, 0, 0, 0)


def test_items_are_counted_by_status(sql):
    """Of each as many as there are; what ran out for good has ended when it is counted."""
    items = [sql.add() for _ in range(6)]
    for item in items[:4]:
        sql.store.lease("w", 600, None, item.id)
    sql.store.complete(items[0].id, "w", "v")
    sql.store.fail(items[1].id, "w", "no")
    sql.store.cancel(items[2].id)
    sql.expire(items[2].id)
    assert sql.store.overview().counts == {"pending": 2, "processing": 1, "completed": 1, "failed": 1, "cancelled": 1}


def test_what_was_made_lately_and_for_how_much(sql):
    """An hour back from now, and today's in UTC; what has no known price is counted."""
    now_s = time.time()
    today_s = now_s % DAY_S  # since midnight
    for ended_s_ago, cost_usd in (
        (0, 0.25),
        (min(1, today_s / 2), None),
        (today_s + 60, 8.0),
        (today_s + 60, None),
        (2 * DAY_S, 16.0),
    ):
        completed(sql, ended_s_ago, cost_usd=cost_usd)
    seen = sql.store.overview()
    assert (seen.spent_today_usd, seen.unpriced_today) == (0.25, 1)
    assert seen.completed_last_hour == (2 if today_s + 60 > HOUR_S else 4)
    assert seen.counts["completed"] == 5


def test_what_was_paid_today_stays_counted_when_it_is_deleted(sql):
    """One by one and with a group; what was completed earlier, failed or never ended is none of today's."""
    today_s = time.time() % DAY_S
    for cost_usd in (0.25, 0.5, None):
        completed(sql, cost_usd=cost_usd)
    yesterdays = completed(sql, today_s + 60, cost_usd=8.0)
    failed, waiting = sql.add(), sql.add()
    sql.store.lease("w", 600, None, failed.id)
    sql.store.fail(failed.id, "w", "no")
    first, second, _ = (item for item in reversed(sql.store.list_items(status="completed")) if item.id != yesterdays.id)
    for item in (first, yesterdays, failed, waiting):
        sql.store.removal.delete(item.id)
    completed(sql, cost_usd=1.0)
    seen = sql.store.overview()
    assert (seen.spent_today_usd, seen.unpriced_today) == (1.75, 1)
    assert second.cost_usd == 0.5
    sql.store.removal.delete_group("group-1")
    seen = sql.store.overview()
    assert (seen.spent_today_usd, seen.unpriced_today, seen.counts["completed"]) == (1.75, 1, 0)


def test_the_oldest_wait_is_of_what_waits_now(sql):
    """From when it was added or retried, and however often it was handed back; what is worked on does not wait."""
    oldest, newer = sql.add(), sql.add()
    for item, age_s in ((oldest, 1000), (newer, 100)):
        sql.run(
            f"UPDATE video_items SET created_at = {sql.now} - :s, updated_at = {sql.now} - :s WHERE id = :id",
            s=age_s,
            id=item.id,
        )
    wait_s = lambda: sql.store.overview().oldest_wait_s  # noqa: E731
    assert wait_s() == pytest.approx(1000, abs=20)
    sql.store.lease("w", 600, None, oldest.id)
    assert wait_s() == pytest.approx(100, abs=20)
    sql.store.heartbeat(oldest.id, "w", 1)  # handed back
    assert wait_s() == pytest.approx(1000, abs=20)
    sql.store.cancel(oldest.id)
    sql.store.retry(oldest.id)
    sql.store.lease("w", 600, None, newer.id)
    assert wait_s() == pytest.approx(0, abs=20)


def test_the_last_completed_come_first(sql):
    """As many as are asked for; what an earlier server beside this one completed has no time and is left out."""
    early, late, unknown = completed(sql, 50), completed(sql, 10), completed(sql)
    sql.run("UPDATE video_items SET ended_at = NULL WHERE id = :id", id=unknown.id)
    assert [item.id for item in sql.store.last_completed(9)] == [late.id, early.id]
    assert [item.id for item in sql.store.last_completed(1)] == [late.id]


def test_the_line_is_what_is_ongoing_in_its_order(sql):
    """What is worked on has its place in it."""
    items = [sql.add(inference_provider="veo3"), sql.add(frame_num=73), sql.add()]
    sql.store.lease("w", 600, None, items[1].id)
    sql.store.cancel(items[2].id)
    first, second = sql.store.in_line(9)
    assert (first.id, first.status, first.inference_provider, first.duration_s) == (items[0].id, "pending", "veo3", 5)
    assert (second.id, second.status, second.group_id, second.duration_s) == (items[1].id, "processing", "group-1", 3)
    assert len(sql.store.in_line(1)) == 1


def test_a_photo_as_it_was_uploaded(sql):
    """Its items know what it was called."""
    photo = NewPhoto(
        "group-1", "group-1/p_original.jpg", original_filename="바다 1.jpg", width=64, height=48, size_bytes=9
    )
    [item] = sql.store.add(photo, [NewItem()])
    assert sql.store.photo_path(photo.id) == photo.storage_path
    assert {it.photo_filename for it in (item, sql.row(item.id), sql.store.lease("w", 60))} == {"바다 1.jpg"}
    with pytest.raises(ItemMissing, match="no photo none"):
        sql.store.photo_path("none")


@pytest.fixture
def told(sql):
    """What the store tells, as it tells it."""
    heard = []
    sql.store.tell(heard.append, heard.append)
    return heard


def test_every_change_is_told_as_it_is_committed(sql, told):
    """Each with the row as it is then, which another connection sees at that moment."""
    seen = []
    sql.store.tell(lambda item: seen.append(item == sql.row(item.id)), told.append)
    photo = NewPhoto("group-1", "p")
    first, second = sql.store.add(photo, [NewItem(), NewItem()])
    sql.store.lease("w", 600)
    sql.store.heartbeat(first.id, "w", 600, ItemProgress(stage="a", fraction=0.5))
    sql.store.heartbeat(first.id, "w", 1)
    sql.store.lease("w", 600)
    sql.store.complete(first.id, "w", "v")
    sql.store.lease("w", 600)
    sql.store.cancel(second.id)
    assert seen == [True] * 9


def test_what_changes_nothing_is_not_told(sql, told):
    """A repeated end, a refused write, a look, a line with nothing in it."""
    item = sql.add()
    sql.store.lease("w", 600)
    sql.store.complete(item.id, "w", "v")
    told.clear()
    sql.store.complete(item.id, "w", "v")
    for write in (lambda: sql.store.fail(item.id, "w", "no"), lambda: sql.store.retry(item.id)):
        with pytest.raises(Exception, match="completed"):
            write()
    assert sql.store.lease("w", 600) is None
    sql.store.get(item.id)
    sql.store.overview()
    assert told == []


@pytest.mark.parametrize("look", ["lease", "get"])
def test_an_end_that_nobody_reported_is_told(sql, told, look):
    """Whoever looks first ends it, be it a worker that asks for another task."""
    deadly, cancelled, waiting = sql.add(), sql.add(), sql.add()
    sql.store.lease("v", 60, None, cancelled.id)
    sql.store.cancel(cancelled.id)
    for _ in range(MAX_CRASHES):
        sql.store.lease("w", 60, None, deadly.id)
        sql.store.heartbeat(deadly.id, "w", 60)
        sql.expire(deadly.id)
    sql.expire(cancelled.id)
    told.clear()
    if look == "lease":
        assert sql.store.lease("u", 60).id == waiting.id
        [leased] = [item for item in told if item.status == "processing"]
        assert leased.id == waiting.id
        told.remove(leased)
    else:
        sql.store.get(waiting.id)
    ends = {item.id: (item.status, item.error_message) for item in told}
    assert ends == {deadly.id: ("failed", CRASHED), cancelled.id: ("cancelled", None)}


def test_a_cancelled_end_is_told(sql, told):
    """The holder is refused, and who listens hears how it ended."""
    item = sql.add()
    sql.store.lease("w", 60)
    sql.store.cancel(item.id)
    told.clear()
    with pytest.raises(Exception, match="cancelled"):
        sql.store.complete(item.id, "w", "v")
    assert [it.status for it in told] == ["cancelled"]


def test_what_is_deleted_is_told(sql, told):
    """One by one, with a group, and by its age."""
    one, other = sql.add(), sql.add()
    told.clear()
    sql.store.removal.delete(one.id)
    assert told == [DeletedItem(one.id, "group-1")]
    sql.store.cancel(other.id)
    told.clear()
    assert sql.store.removal.delete_ended(-1, 9) == 1
    assert told == [DeletedItem(other.id, "group-1")]
    told.clear()
    items = [sql.add() for _ in range(2)]
    told.clear()
    sql.store.removal.delete_group("group-1")
    assert sorted(told) == sorted(DeletedItem(item.id, "group-1") for item in items)


def test_a_listener_that_fails_fails_nobody_else(sql):
    """What it raises is a log line; the change is made and answered."""

    def breaks(_it):
        raise ValueError("deaf")

    sql.store.tell(breaks, breaks)
    with structlog.testing.capture_logs() as logs:
        item = sql.add()
        assert sql.store.lease("w", 60).id == item.id
        sql.store.removal.delete(item.id)
    assert [line["event"] for line in logs] == ["a change could not be told"] * 2 + ["a deletion could not be told"]
