"""Taking away, on each database: rows in one go, and of objects only those that nobody can come to need."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from inference.errors import ItemMissing, NotHolder, StorageUnavailable
from inference.server.rows.store import NewItem, NewPhoto

DAY_S = 24 * 3600


def add(sql, count=1, group="group-1"):
    """Items of one photo."""
    photo = NewPhoto(group, "")
    return sql.store.add(NewPhoto(group, f"{group}/{photo.id}_original.jpg", id=photo.id), items(count))


def items(count):
    """Videos wanted."""
    return [NewItem() for _ in range(count)]


def nobodys(sql, stale_s=DAY_S, keep_s=DAY_S):
    """What is nobody's, and whether it is over."""
    return {it.path: it.is_over for it in sql.store.removal.nobodys(stale_s, keep_s, limit=100)}


def completed(sql, item, path=None):
    """The item, done by w."""
    sql.store.lease("w", 60, None, item.id)
    path = path or f"videos/{item.id}.mp4"
    sql.store.removal.expect(path, item.id)
    return sql.store.complete(item.id, "w", path)


def test_a_photo_goes_with_the_last_item_of_it(sql):
    """And a video with its own."""
    first, second = add(sql, 2)
    done = completed(sql, first)
    assert sql.store.removal.delete(first.id) == [done.video_storage_path]
    assert sql.store.removal.delete(second.id) == [second.photo_storage_path]
    for item in (first, second):
        with pytest.raises(ItemMissing, match=f"no task {item.id}"):
            sql.store.removal.delete(item.id)
    # The URL that the video came by may still hold, so what comes by it is looked for; nobody sends a photo again.
    assert nobodys(sql) == {done.video_storage_path: False, second.photo_storage_path: True}


def test_two_deletions_at_once_leave_no_photo(sql):
    """Each of the last two items of a photo might leave it to the other."""
    for _ in range(5):
        pair = add(sql, 2)
        together = threading.Barrier(2)

        def delete(item, together=together):
            together.wait()
            return sql.store.removal.delete(item.id)

        with ThreadPoolExecutor(2) as pool:
            paths = [path for gone in pool.map(delete, pair) for path in gone]
        assert paths == [pair[0].photo_storage_path]


def test_whoever_holds_a_deleted_item_cannot_write(sql):
    """Every call finds nothing, and the item does not come back."""
    [item] = add(sql)
    sql.store.lease("w", 60)
    sql.store.removal.delete(item.id)
    for write in (
        lambda: sql.store.heartbeat(item.id, "w", 60),
        lambda: sql.store.complete(item.id, "w", "v"),
        lambda: sql.store.fail(item.id, "w", "no"),
    ):
        with pytest.raises(ItemMissing):
            write()
    assert sql.store.list_items() == []


def test_a_group_goes_as_a_whole(sql):
    """Its items whatever their status, its photos, its name; others stay."""
    group = sql.store.group("Holiday")
    [one], [two, three] = add(sql, group=group), add(sql, 2, group=group)
    [other] = add(sql)
    video = completed(sql, one).video_storage_path
    sql.store.lease("w", 60, None, two.id)
    gone = sql.store.removal.delete_group(group)
    assert gone.items == 3
    assert sorted(gone.paths) == sorted([one.photo_storage_path, three.photo_storage_path, video])
    assert [it.id for it in sql.store.list_items()] == [other.id]
    with pytest.raises(ItemMissing, match="no group"):
        sql.store.removal.delete_group(group)
    assert sql.store.group("Holiday") != group


def test_a_group_that_goes_meanwhile_is_made_again(sql):
    """A photo on its way to it finds it gone, and comes all the same."""
    group = sql.store.group()
    sql.store.removal.delete_group(group)
    [item] = add(sql, group=group)
    assert sql.store.get(item.id).group_id == group


def test_what_ended_goes_after_its_time(sql):
    """Not what waits or is worked on, however old; at most so many at once; empty groups last."""
    old = [add(sql)[0] for _ in range(5)]
    for item in old[:2]:
        completed(sql, item)
    sql.store.cancel(old[2].id)
    sql.store.lease("w", 60, None, old[3].id)
    sql.run(f"UPDATE video_items SET updated_at = {sql.now} - 100")
    [new] = add(sql)
    sql.store.cancel(new.id)
    empty, used = sql.store.group("empty"), sql.store.group("used")
    [in_use] = add(sql, group=used)
    assert sql.store.removal.delete_ended(1000, 10) == 0
    assert [sql.store.removal.delete_ended(50, 2) for _ in range(3)] == [2, 1, 0]
    assert {it.id for it in sql.store.list_items()} == {old[3].id, old[4].id, new.id, in_use.id}
    sql.run("UPDATE groups SET created_at = 0")
    assert sql.store.removal.delete_ended(50, 2) == 0
    assert {it.id for it in sql.store.list_groups()} == {"group-1", used}
    assert empty not in nobodys(sql)


def test_an_item_that_was_put_back_does_not_go(sql):
    """It had ended when the page of ended ones was read, and waits by the time it is its turn."""
    [item] = add(sql)
    sql.store.cancel(item.id)
    sql.run(f"UPDATE video_items SET updated_at = {sql.now} - 100")
    sql.store.retry(item.id)
    assert sql.store.removal._delete(item.id, 50) is None
    assert sql.store.get(item.id).status == "pending"


def test_a_video_is_somebodys_while_its_item_may_be_completed(sql):
    """While it waits or is worked on; it is nobody's once the item ended otherwise, or is gone."""
    [item] = add(sql)
    paths = [f"videos/{item.id}.{n}.mp4" for n in range(2)]
    for path in paths:
        sql.store.removal.expect(path, item.id)
    assert nobodys(sql) == {}
    sql.store.lease("w", 60)
    assert nobodys(sql) == {}
    sql.expire(item.id)  # a late report still counts
    assert nobodys(sql) == {}
    sql.store.heartbeat(item.id, "w", 1)
    assert nobodys(sql) == {}
    sql.store.lease("w", 60)
    sql.store.complete(item.id, "w", paths[1])
    assert nobodys(sql) == {paths[0]: False}
    sql.store.removal.forget_named()
    assert nobodys(sql) == {paths[0]: False}


def test_what_is_somebodys_is_not_discarded(sql):
    """Asked again under a lock: since the page was read its item may have been put back in the line."""
    removed = []
    [item] = add(sql)
    done, spare = f"videos/{item.id}.mp4", f"videos/{item.id}.2.mp4"
    for path in (done, spare):
        sql.store.removal.expect(path, item.id)
    sql.store.lease("w", 60)
    assert not sql.store.removal.discard(spare, removed.append)
    sql.store.complete(item.id, "w", done)
    assert not sql.store.removal.discard(done, removed.append)
    assert sql.store.removal.discard(spare, removed.append, keep_s=60)
    assert removed == [spare]
    assert nobodys(sql) == {spare: False}  # its URL still holds
    assert sql.store.removal.discard(spare, removed.append, keep_s=-60)
    assert nobodys(sql) == {}
    assert not sql.store.removal.discard("never heard of", removed.append)


def test_a_discard_that_fails_is_not_forgotten(sql):
    """The next one tries again."""
    [item] = add(sql)
    sql.store.removal.delete(item.id)

    def fails(_path):
        raise StorageUnavailable("away")

    with pytest.raises(StorageUnavailable):
        sql.store.removal.discard(item.photo_storage_path, fails)
    assert nobodys(sql) == {item.photo_storage_path: True}


def test_a_photo_is_somebodys_until_it_is_stale(sql):
    """It is in place for a moment before its row; once that is there it has a name."""
    sql.store.removal.expect("group-1/lost_original.jpg")
    sql.store.removal.expect("group-1/named_original.jpg")
    assert nobodys(sql) == {}
    sql.store.add(NewPhoto("group-1", "group-1/named_original.jpg"), items(1))
    assert nobodys(sql, stale_s=-60) == {"group-1/lost_original.jpg": True}
    removed = []
    assert not sql.store.removal.discard("group-1/lost_original.jpg", removed.append, stale_s=60)
    assert sql.store.removal.discard("group-1/lost_original.jpg", removed.append, stale_s=-60)
    assert removed == ["group-1/lost_original.jpg"]


def test_what_was_never_written_down_is_adopted(sql):
    """If it is a video of an item here, other than the one that completed it; once."""
    [item] = add(sql)
    done = completed(sql, item).video_storage_path
    sql.store.removal.forget_named()
    for path, item_id in ((done, item.id), (f"videos/{item.id}.2.mp4", item.id), ("videos/x.mp4", "x")) * 2:
        sql.store.removal.adopt(path, item_id)
    assert nobodys(sql) == {f"videos/{item.id}.2.mp4": False}


def test_pages_follow_each_other(sql):
    """By path, each once."""
    for number in range(5):
        sql.store.removal.expect(f"videos/gone.{number}.mp4", "gone")
    seen, after = [], ""
    while page := sql.store.removal.nobodys(60, 60, after=after, limit=2):
        seen += [it.path for it in page]
        after = seen[-1]
    assert seen == [f"videos/gone.{number}.mp4" for number in range(5)]


def test_holding_is_asked_without_a_change(sql):
    """As every write of a holder would be refused."""
    [item] = add(sql)
    sql.store.lease("w", 60)
    sql.store.require_holder(item.id, "w")
    sql.store.require_holder(item.id, "w", 1)
    for worker, seq in (("other", None), ("w", 2)):
        with pytest.raises(NotHolder):
            sql.store.require_holder(item.id, worker, seq)
    with pytest.raises(ItemMissing):
        sql.store.require_holder("none", "w")
