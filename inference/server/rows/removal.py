"""Deletes tasks, photos and groups, and finds the objects that no row names any more.

A row is deleted in one transaction that also records which objects are left without a row. Recorded objects are removed
from storage afterwards, by any server, and again if a process was killed in between. An object that this database has
not recorded is never removed, so another queue may keep its objects in the same folder.

Statements as in `statements.py`, with the same rules for their fences.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import structlog
from sqlalchemy import Double, Integer, Text, and_, bindparam, case, cast, delete, exists, or_, select
from sqlalchemy.dialects import postgresql, sqlite

from inference.errors import ItemMissing
from inference.server.rows.schema import deleted_videos, groups, photos, unnamed_objects
from inference.server.rows.schema import video_items as items
from inference.server.rows.statements import PENDING, PROCESSING, ZERO, now
from inference.sql.database import Database, Transaction
from inference.sql.statement import Clock, Statement

log = structlog.get_logger(__name__)

DAY_S = 24 * 3600

ended = and_(items.c.status != PENDING, items.c.status != PROCESSING)

ENDED_BEFORE = Statement(
    "ended_before",
    "Items that ended some time ago.",
    select(items.c.id)
    .where(ended, items.c.updated_at < now - bindparam("age_s", type_=Double))
    .limit(bindparam("limit", type_=Integer)),
)

# Rows are locked in a fixed order, groups, photos, items, days of deleted videos (the earliest first), so that two
# deletions cannot deadlock.

LOCK_PHOTO_OF = Statement(
    "lock_photo_of",
    "Keeps others from deleting items of the same photo meanwhile: two at once would each see the other's item, and "
    "both leave the photo.",
    select(photos.c.id)
    .where(photos.c.id == select(items.c.photo_id).where(items.c.id == bindparam("item_id")).scalar_subquery())
    .with_for_update(),
)

_deleted = (
    items.c.id,
    items.c.group_id,
    items.c.photo_id,
    items.c.video_storage_path.label("path"),
    items.c.status,
    items.c.ended_at,
    items.c.cost_usd,
)

DELETE_ITEM = Statement(
    "delete_item",
    "Takes an item away, whoever holds it: its holder finds nothing to write to. Or only if it ended some time ago.",
    delete(items)
    .where(
        items.c.id == bindparam("item_id", type_=Text),
        or_(
            cast(bindparam("age_s"), Double).is_(None),
            and_(ended, items.c.updated_at < now - bindparam("age_s")),
        ),
    )
    .returning(*_deleted),
)

DELETE_PHOTO = Statement(
    "delete_photo",
    "Takes a photo away of which no item is left.",
    delete(photos)
    .where(
        photos.c.id == bindparam("photo_id", type_=Text),
        ~exists().where(items.c.photo_id == photos.c.id),
    )
    .returning(photos.c.storage_path.label("path")),
)

LOCK_GROUP = Statement(
    "lock_group",
    "Keeps others from adding to a group meanwhile.",
    select(groups.c.id).where(groups.c.id == bindparam("group_id", type_=Text)).with_for_update(),
)

LOCK_PHOTOS_OF_GROUP = Statement(
    "lock_photos_of_group",
    "As lock_photo_of, for all photos of a group.",
    select(photos.c.id).where(photos.c.group_id == bindparam("group_id", type_=Text)).with_for_update(),
)

DELETE_ITEMS_OF_GROUP = Statement(
    "delete_items_of_group",
    "Takes every item of a group away.",
    delete(items).where(items.c.group_id == bindparam("group_id", type_=Text)).returning(*_deleted),
)

DELETE_PHOTOS_OF_GROUP = Statement(
    "delete_photos_of_group",
    "Takes every photo of a group away.",
    delete(photos)
    .where(photos.c.group_id == bindparam("group_id", type_=Text))
    .returning(photos.c.storage_path.label("path")),
)

DELETE_GROUP = Statement(
    "delete_group", "Takes a group away.", delete(groups).where(groups.c.id == bindparam("group_id", type_=Text))
)

DELETE_EMPTY_GROUPS = Statement(
    "delete_empty_groups",
    "Takes groups away that were made some time ago and hold nothing any more.",
    delete(groups).where(
        groups.c.created_at < now - bindparam("age_s", type_=Double),
        ~exists().where(items.c.group_id == groups.c.id),
        ~exists().where(photos.c.group_id == groups.c.id),
    ),
)

KEEP_PRICE = {
    name: Statement(
        "keep_price",
        "Adds deleted videos to what was paid for on the day when they were completed.",
        kind.insert(deleted_videos)
        .values(day=bindparam("day"), spent_usd=bindparam("spent_usd"), unpriced=bindparam("unpriced"))
        .on_conflict_do_update(
            index_elements=["day"],
            set_={
                "spent_usd": deleted_videos.c.spent_usd + bindparam("spent_usd", type_=Double),
                "unpriced": deleted_videos.c.unpriced + bindparam("unpriced", type_=Integer),
            },
        ),
    )
    for name, kind in (("sqlite", sqlite), ("postgresql", postgresql))
}

# ---------------------------------------------------------------- objects that no row names

_of_path = unnamed_objects.c.path == bindparam("path", type_=Text)
_of_record = items.c.id == unnamed_objects.c.item_id

EXPECT = {
    name: Statement(
        "expect",
        "Writes down that an object may come to be.",
        kind.insert(unnamed_objects)
        .values(path=bindparam("path"), item_id=bindparam("item_id", type_=Text), recorded_at=Clock())
        .on_conflict_do_update(index_elements=["path"], set_={"recorded_at": Clock()}),
    )
    for name, kind in (("sqlite", sqlite), ("postgresql", postgresql))
}

NOT_WRITTEN_DOWN = Statement(
    "not_written_down",
    "The item, if an object could be a video of it that did not complete it and that nobody wrote down.",
    select(items.c.id).where(
        items.c.id == bindparam("item_id", type_=Text),
        items.c.video_storage_path.is_distinct_from(bindparam("path", type_=Text)),
        ~exists().where(unnamed_objects.c.path == bindparam("path")),
    ),
)

UNNAME = {
    name: Statement(
        "unname",
        "Writes down that an object is there whose row goes.",
        kind.insert(unnamed_objects)
        .values(
            path=bindparam("path"),
            item_id=bindparam("item_id", type_=Text),
            # The upload URL of a video may still be valid, so the video could be stored once more. A photo has no such
            # URL and its row is gone, so it may be removed at once.
            recorded_at=case((cast(bindparam("item_id"), Text).is_(None), ZERO), else_=Clock()),
        )
        .on_conflict_do_nothing(),
    )
    for name, kind in (("sqlite", sqlite), ("postgresql", postgresql))
}

NAME = Statement("name", "A row names the object from now on.", delete(unnamed_objects).where(_of_path))

FORGET_NAMED = Statement(
    "forget_named",
    "Strikes out the videos that completed their items.",
    delete(unnamed_objects).where(exists().where(_of_record, items.c.video_storage_path == unnamed_objects.c.path)),
)

nobodys: list[Any] = [
    or_(
        unnamed_objects.c.item_id.is_not(None),
        # A photo is stored shortly before its row is written.
        unnamed_objects.c.recorded_at <= now - bindparam("stale_s", type_=Double),  # fence
    ),
    # The item's holder may still report the video, and a waiting item may be leased again by a worker that has already
    # stored a video of it.
    ~exists().where(_of_record, ~ended),  # fence
    ~exists().where(_of_record, items.c.video_storage_path == unnamed_objects.c.path),  # fence
]
"""No row names the object, and no active lease can add such a row."""

# Nobody can store the object again: photos have no upload URL, and that of a video has expired.
_is_over = or_(
    unnamed_objects.c.item_id.is_(None),
    unnamed_objects.c.recorded_at < now - bindparam("keep_s", type_=Double),
)

NOBODYS = Statement(
    "nobodys",
    "A page of objects that are nobody's, should they be there; and whether none can be stored there any more.",
    select(unnamed_objects.c.path, _is_over.label("is_over"))
    .where(*nobodys, unnamed_objects.c.path > bindparam("after", type_=Text))
    .order_by(unnamed_objects.c.path)
    .limit(bindparam("limit", type_=Integer)),
)

LOCK_ITEM_OF = Statement(
    "lock_item_of",
    "Keeps an item from being put back in the line, leased and completed while a video of it is looked at.",
    select(items.c.id)
    .where(items.c.id == select(unnamed_objects.c.item_id).where(_of_path).scalar_subquery())
    .with_for_update(),
)

IS_NOBODYS = Statement(
    "is_nobodys", "Whether an object is nobody's.", select(unnamed_objects.c.path).where(*nobodys, _of_path)
)

FORGET = Statement(
    "forget",
    "Strikes out an object that is gone, once none can be stored there any more.",
    delete(unnamed_objects).where(_of_path, _is_over),
)


class DeletedItem(NamedTuple):
    """An item that is no more."""

    id: str
    group_id: str


class Gone(NamedTuple):
    """What was deleted."""

    items: int
    paths: list[str]  # of the objects that have no row now


class Unnamed(NamedTuple):
    """An object without a row, which may or may not exist in storage."""

    path: str
    is_over: bool  # nobody can store it again


class Removal:
    """Deletes rows, and keeps the list of objects that have none.

    Raises, from any method: QueueUnavailable, QueueRefused.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self.on_delete: Callable[[DeletedItem], None] | None = None  # see `Store.tell`

    # ------------------------------------------------------------ rows

    def delete(self, item_id: str) -> list[str]:
        """Deletes an item, and its photo if no other item uses it; returns the paths of objects without a row.

        The item's holder is told at its next call. Raises ItemMissing.
        """
        paths = self._delete(item_id, None)
        if paths is None:
            raise ItemMissing(f"no task {item_id}")
        return paths

    def delete_group(self, group_id: str) -> Gone:
        """Deletes a group with its photos and items. Raises ItemMissing."""
        with self._database.transaction() as transaction:
            if not transaction.run(LOCK_GROUP, group_id=group_id):
                raise ItemMissing(f"no group {group_id}")
            transaction.run(LOCK_PHOTOS_OF_GROUP, group_id=group_id)
            of_items = transaction.run(DELETE_ITEMS_OF_GROUP, group_id=group_id)
            of_photos = transaction.run(DELETE_PHOTOS_OF_GROUP, group_id=group_id)
            transaction.run(DELETE_GROUP, group_id=group_id)
            gone = Gone(len(of_items), self._unname(transaction, of_items + of_photos))
            self._keep_prices(transaction, of_items)
        for row in of_items:
            self._tell(DeletedItem(row["id"], group_id))
        return gone

    def delete_ended(self, age_s: float, limit: int) -> int:
        """Deletes up to `limit` items that ended more than `age_s` ago, then empty groups; returns how many.

        Their objects are found by the next `nobodys`.
        """
        rows = self._database.read(ENDED_BEFORE, age_s=age_s, limit=limit)
        if not rows:
            self._database.write(DELETE_EMPTY_GROUPS, age_s=age_s)
        return sum(self._delete(row["id"], age_s) is not None for row in rows)

    def _delete(self, item_id: str, age_s: float | None) -> list[str] | None:
        with self._database.transaction() as transaction:
            transaction.run(LOCK_PHOTO_OF, item_id=item_id)
            gone = transaction.run(DELETE_ITEM, item_id=item_id, age_s=age_s)
            if not gone:
                return None
            photo = transaction.run(DELETE_PHOTO, photo_id=gone[0]["photo_id"])
            paths = self._unname(transaction, gone + photo)
            self._keep_prices(transaction, gone)
        self._tell(DeletedItem(gone[0]["id"], gone[0]["group_id"]))
        return paths

    def _tell(self, deleted: DeletedItem) -> None:
        if self.on_delete is None:
            return
        try:
            self.on_delete(deleted)
        except Exception:
            log.exception("a deletion could not be told", item_id=deleted.id)

    def _unname(self, transaction: Transaction, gone: list[dict[str, Any]]) -> list[str]:
        named = [row for row in gone if row["path"] is not None]
        for row in named:
            transaction.run(UNNAME[self._database.dialect_name], path=row["path"], item_id=row.get("id"))
        return [row["path"] for row in named]

    def _keep_prices(self, transaction: Transaction, gone: list[dict[str, Any]]) -> None:
        """What was paid for stays counted."""
        by_day: dict[int, list[float | None]] = {}
        for row in gone:
            if row["status"] == "completed" and row["ended_at"] is not None:
                by_day.setdefault(int(row["ended_at"] // DAY_S * DAY_S), []).append(row["cost_usd"])
        for day, prices in sorted(by_day.items()):
            known = [price for price in prices if price is not None]
            transaction.run(
                KEEP_PRICE[self._database.dialect_name],
                day=day,
                spent_usd=sum(known),
                unpriced=len(prices) - len(known),
            )

    # ------------------------------------------------------------ objects

    def expect(self, path: str, item_id: str | None = None) -> None:
        """Records an object before it can be stored: a video of an item, or else a photo."""
        self._database.write(EXPECT[self._database.dialect_name], path=path, item_id=item_id)

    def adopt(self, path: str, item_id: str) -> None:
        """Records an existing object, if it belongs to an item of this database and no row names it."""
        if self._database.read(NOT_WRITTEN_DOWN, path=path, item_id=item_id):
            self.expect(path, item_id)

    def forget_named(self) -> None:
        """Drops records of objects that a row names by now."""
        self._database.write(FORGET_NAMED)

    def nobodys(self, stale_s: float, keep_s: float, *, after: str = "", limit: int) -> list[Unnamed]:
        """A page of objects that no row names, ordered by path. Not all of them exist in storage.

        A photo may wait for its row for `stale_s`; a video can be stored for `keep_s` after its URL was signed.
        """
        ages = {"stale_s": stale_s, "keep_s": keep_s}
        rows = self._database.read(NOBODYS, **ages, after=after, limit=limit)
        return [Unnamed(row["path"], bool(row["is_over"])) for row in rows]

    def discard(self, path: str, remove: Callable[[str], None], stale_s: float = 0, keep_s: float = 0) -> bool:
        """Calls `remove` with the path of an object if no row names it, and prevents that one is added meanwhile.

        Returns whether it did.
        """
        with self._database.transaction() as transaction:
            transaction.run(LOCK_ITEM_OF, path=path)
            if not transaction.run(IS_NOBODYS, path=path, stale_s=stale_s):
                return False
            remove(path)
            transaction.run(FORGET, path=path, keep_s=keep_s)
            return True
