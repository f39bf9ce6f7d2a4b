"""The queue's rows in SQL: the same methods, results and refusals as `testing.memory_store`, its reference model.

Blocking, and safe to use from many threads and processes at once. Every method is one conditional statement; only if it
changed nothing is the row read, to find out why.

Raises, from any method: QueueUnavailable where a retry may help (the database is locked, full, unreachable),
QueueRefused for a value the database cannot hold.
"""

import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from operator import itemgetter
from typing import Any, Literal, get_args
from uuid import UUID

import structlog

from inference.errors import ItemMissing, NotHolder, WrongState
from inference.providers import WorkerType
from inference.queues.item import RELEASE_S, Item, ItemProgress, Status
from inference.server.rows import statements
from inference.server.rows.migration import migrate
from inference.server.rows.removal import NAME, DeletedItem, Removal
from inference.sql.database import Database, Row, Transaction
from inference.sql.statement import Statement
from inference.task import Value, duration_s

log = structlog.get_logger(__name__)


def new_id() -> str:
    """A UUID of version 7 (RFC 9562): ids sort by when they were made, so rows are listed in the order of their ids.

    Time down to a quarter of a microsecond, as the RFC's method 3 has it, then 62 random bits.
    """
    milliseconds, rest_ns = divmod(time.time_ns(), 1_000_000)
    fraction = rest_ns * 4096 // 1_000_000
    value = milliseconds << 80 | 0x7 << 76 | fraction << 64 | 0b10 << 62 | secrets.randbits(62)
    return str(UUID(int=value))


@dataclass(frozen=True, slots=True)
class NewPhoto:
    """A photo whose file is in storage."""

    group_id: str
    storage_path: str
    id: str = field(default_factory=new_id)
    original_filename: str | None = None
    width: int | None = None  # pixels
    height: int | None = None  # pixels
    size_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class NewItem:
    """A requested video of a photo."""

    prompt: str = ""
    frame_num: int | None = None
    inference_provider: str | None = None
    id: str = field(default_factory=new_id)


@dataclass(frozen=True, slots=True)
class Once:
    """An idempotent request: it creates its tasks once, however often it arrives."""

    key: str  # the client's own, unique to the request
    fingerprint: str  # digest of the request: another request under the same key is an error


class Overview(Value):
    """How the whole queue is doing. Days are those of UTC, on the database's clock."""

    counts: dict[Status, int]  # of every status, 0 where there is none
    oldest_wait_s: float | None  # of the items that wait now
    completed_last_hour: int
    spent_today_usd: float  # for the videos that were completed today, deleted ones too; nothing for failed tasks
    unpriced_today: int  # of those, how many have no known price


@dataclass(frozen=True, slots=True)
class InLine:
    """As much of an ongoing item as tells how long it will take."""

    id: str
    group_id: str
    inference_provider: str | None
    frame_num: int | None
    status: Status

    @property
    def duration_s(self) -> float:
        """Seconds of video wanted."""
        return duration_s(self.frame_num)


class Group(Value):
    """Photos that were uploaded together, and how their videos are doing."""

    id: str
    name: str | None
    created_at: float
    counts: dict[Status, int]

    @property
    def status(self) -> Status:
        """Pending until an item was leased, processing until all have ended, then failed if any failed."""
        present = {status for status, count in self.counts.items() if count}
        if present <= {"pending"}:
            return "pending"
        if present & {"pending", "processing"}:
            return "processing"
        for status in ("failed", "completed"):
            if status in present:
                return status
        return "cancelled"


class Store:
    """The rows of a queue."""

    def __init__(self, url: str) -> None:
        """Opens the database and creates missing tables. Raises SettingsError, QueueUnavailable."""
        self._database = Database(url, migrate)
        self._sqlite = self._database.dialect_name == "sqlite"
        self._on_change: Callable[[Item], None] | None = None
        self.removal = Removal(self._database)

    def tell(self, on_change: Callable[[Item], None], on_delete: Callable[[DeletedItem], None]) -> None:
        """From now on calls these with each item that this store has changed, and with each that it has deleted.

        That is in the thread that did it, once the change is committed; renewals are changes, too. What is raised by
        them is logged, and the caller of the store does not hear of it.
        """
        self._on_change = on_change
        self.removal.on_delete = on_delete

    def close(self) -> None:
        """Closes every connection."""
        self._database.close()

    def check(self) -> None:
        """Raises QueueUnavailable where the database cannot be written to, or its file is damaged."""
        self._database.write(statements.CHECK)
        self._database.examine()

    # ------------------------------------------------------------ people

    def group(self, name_or_id: str | None = None) -> str:
        """The id of a group: a new one, or the one with this id or name, which is created if it is missing."""
        add_group = statements.ADD_GROUP[self._database.dialect_name]
        if name_or_id is None:
            group_id = new_id()
            self._database.write(add_group, id=group_id, name=None)
            return group_id
        found = self._database.read(statements.FIND_GROUP, group=name_or_id)
        if not found:
            self._database.write(add_group, id=new_id(), name=name_or_id)
            found = self._database.read(statements.FIND_GROUP, group=name_or_id)
        return str(found[0]["id"])

    def add(self, photo: NewPhoto, items: Sequence[NewItem], once: Once | None = None) -> list[Item]:
        """Adds items that wait for a worker, in order, the photo they are made of, and its group; all of it or nothing.

        The photo's file must be in storage. If `once` was answered before, adds nothing and returns the items of then,
        which have another photo. Raises WrongState as `made_by`.
        """
        with self._database.transaction() as transaction:
            made = self._add(transaction, photo, items, once)
        self._tell(made)
        return made or (self.made_by(once) if once else [])

    def _add(
        self, transaction: Transaction, photo: NewPhoto, items: Sequence[NewItem], once: Once | None
    ) -> list[Item]:
        dialect = self._database.dialect_name
        if once and not transaction.run(statements.ADD_KEY[dialect], **asdict(once), photo_id=photo.id):
            return []
        transaction.run(statements.ADD_GROUP[dialect], id=photo.group_id, name=None)
        transaction.run(statements.ADD_PHOTO, **asdict(photo))
        transaction.run(NAME, path=photo.storage_path)
        ids = {"group_id": photo.group_id, "photo_id": photo.id}
        return [_item(row) for item in items for row in transaction.run(statements.ADD_ITEM, **ids, **asdict(item))]

    def made_by(self, once: Once) -> list[Item]:
        """The items that a request created when it first arrived; none if it is new.

        Raises WrongState for another request under the same key, and if all of its items have been deleted.
        """
        for row in self._database.read(statements.FIND_KEY, key=once.key):
            if row["fingerprint"] != once.fingerprint:
                raise WrongState("this Idempotency-Key came with another request before: give each one its own")
            made = self._database.read(statements.OF_PHOTO, photo_id=row["photo_id"])
            if not made:
                raise WrongState("what was made with this Idempotency-Key has been deleted since")
            return [_item(each) for each in made]
        return []

    def forget_keys(self, age_s: float) -> None:
        """Forgets Idempotency-Keys that are older than `age_s`."""
        self._database.write(statements.FORGET_KEYS, age_s=age_s)

    def get(self, item_id: str) -> Item:
        """The item as it is now. Raises ItemMissing."""
        self._sweep()
        return self._find(item_id)

    def list_items(
        self, *, status: Status | None = None, group: str | None = None, limit: int = 50, before: str | None = None
    ) -> list[Item]:
        """The newest items, of a status or a group, older than the item of the id `before`."""
        self._sweep()
        kind: Literal["ongoing", "ended"] | None = None
        if status is not None:
            kind = "ongoing" if status in ("pending", "processing") else "ended"
        statement = statements.list_items(status=kind, group=group is not None, before=before is not None)
        rows = self._database.read(statement, status=status, group_id=group, before=before, limit=limit)
        return [_item(row) for row in rows]

    def get_group(self, group_id: str) -> Group:
        """A group as it is now. Raises ItemMissing."""
        self._sweep()
        for group in _groups(self._database.read(statements.GET_GROUP, group_id=group_id)):
            return group
        raise ItemMissing(f"no group {group_id}")

    def list_groups(self, *, limit: int = 50, before: str | None = None) -> list[Group]:
        """The newest groups, older than the group of the id `before`."""
        self._sweep()
        statement = statements.list_groups(before=before is not None)
        return list(_groups(self._database.read(statement, before=before, limit=limit)))

    def photo_path(self, photo_id: str) -> str:
        """Where a photo is in storage. Raises ItemMissing."""
        for row in self._database.read(statements.PHOTO_PATH, photo_id=photo_id):
            return str(row["storage_path"])
        raise ItemMissing(f"no photo {photo_id}")

    def overview(self) -> Overview:
        """How the whole queue is doing now."""
        self._sweep()
        counts = dict.fromkeys(get_args(Status), 0)
        counts |= {row["status"]: row["count"] for row in self._database.read(statements.COUNTS)}
        [lately] = self._database.read(statements.LATELY)
        return Overview.model_validate(lately | {"counts": counts})

    def in_line(self, limit: int) -> list[InLine]:
        """The items that are ongoing, in the order in which they are leased."""
        return [InLine(**row) for row in self._database.read(statements.IN_LINE, limit=limit)]

    def last_completed(self, limit: int) -> list[Item]:
        """The items that were completed last, the latest first."""
        return [_item(row) for row in self._database.read(statements.LAST_COMPLETED, limit=limit)]

    def cancel(self, item_id: str) -> Item:
        """Cancels an item, or asks its holder to stop. Idempotent. Raises ItemMissing, WrongState."""
        self._sweep()
        for item in self._written(statements.CANCEL, item_id=item_id):
            return item
        item = self._find(item_id)
        if item.status == "cancelled":
            return item
        raise WrongState(f"the task is {item.status}: there is nothing to cancel")

    def retry(self, item_id: str) -> Item:
        """Makes a failed or cancelled item wait again. Raises ItemMissing, WrongState."""
        self._sweep()
        for item in self._written(statements.RETRY, item_id=item_id):
            return item
        item = self._find(item_id)
        raise WrongState(f"the task is {item.status}: only a failed or cancelled one can be retried")

    # ------------------------------------------------------------ workers

    def lease(
        self, worker_id: str, lease_s: float, worker_type: WorkerType | None = None, item_id: str | None = None
    ) -> Item | None:
        """Hands the oldest waiting item, or the given one if it waits, to `worker_id`. Raises ItemMissing."""
        statement = statements.lease(worker_type, given=item_id is not None, sweep=not self._sqlite)
        values = {"worker_id": worker_id, "lease_s": lease_s, "item_id": item_id}
        if self._sqlite:
            with self._database.transaction() as transaction:
                rows = transaction.run(statement, **values) + transaction.run(statements.SWEEP)
        else:
            rows = self._database.write_unsorted(statement, **values)
        changed = [_item(row) for row in rows]
        self._tell(changed)
        for item in changed:
            if item.status == "processing":
                return item
        if item_id is not None:
            self._find(item_id)
        return None

    def backlog(self, worker_type: WorkerType | None = None) -> int:
        """How many items could be leased now."""
        self._sweep()
        return int(self._database.read(statements.backlog(worker_type))[0]["waiting"])

    def heartbeat(
        self,
        item_id: str,
        worker_id: str,
        extend_s: float,
        progress: ItemProgress | None = None,
        lease_seq: int | None = None,
    ) -> Item:
        """Renews a lease; a renewal of RELEASE_S or less gives it back. Raises ItemMissing, NotHolder."""
        holder = {"item_id": item_id, "worker_id": worker_id, "lease_seq": lease_seq}
        if extend_s <= RELEASE_S:
            written = self._written(statements.RELEASE, **holder)
        else:
            said = progress.after(None) if progress else None
            told = {"stage": said.stage if said else None, "fraction": said.fraction if said else None}
            written = self._written(statements.HEARTBEAT, **holder, **told, extend_s=extend_s)
        for item in written:
            return item
        raise _not_held(self._find(item_id), worker_id)

    def complete(
        self,
        item_id: str,
        worker_id: str,
        video_storage_path: str,
        external_ids: dict[str, str] | None = None,
        lease_seq: int | None = None,
        *,
        cost_usd: float | None = None,
    ) -> Item:
        """Ends an item whose video is stored. Raises ItemMissing, NotHolder (also for an item that was cancelled).

        Of the external ids, those with a column are kept: runway_task_id, veo_operation_id. `cost_usd`: what the video
        cost, where that is known.
        """
        holder = {"item_id": item_id, "worker_id": worker_id, "lease_seq": lease_seq}
        ids = {name: (external_ids or {}).get(name) for name in _EXTERNAL_IDS}
        video = {"video_storage_path": video_storage_path, "cost_usd": cost_usd}
        for item in self._written(statements.COMPLETE, **holder, **ids, **video):
            return item
        self._end_if_cancelled(holder)
        item = self._find(item_id)
        if (item.status, item.worker_id, item.video_storage_path) == ("completed", worker_id, video_storage_path):
            return item
        raise _not_held(item, worker_id)

    def fail(self, item_id: str, worker_id: str, message: str, lease_seq: int | None = None) -> Item:
        """Records the holder's failure. Raises ItemMissing, NotHolder (also for an item that was cancelled)."""
        holder = {"item_id": item_id, "worker_id": worker_id, "lease_seq": lease_seq}
        for item in self._written(statements.FAIL, **holder, message=message):
            return item
        self._end_if_cancelled(holder)
        item = self._find(item_id)
        if (item.status, item.worker_id) == ("failed", worker_id):
            return item
        raise _not_held(item, worker_id)

    def require_holder(self, item_id: str, worker_id: str, lease_seq: int | None = None) -> None:
        """Changes nothing. Raises ItemMissing, NotHolder where this worker must not write."""
        item = self._find(item_id)
        if (item.status, item.worker_id) != ("processing", worker_id) or lease_seq not in (None, item.lease_seq):
            raise _not_held(item, worker_id)

    # ------------------------------------------------------------ within

    def _find(self, item_id: str) -> Item:
        for row in self._database.read(statements.GET, item_id=item_id):
            return _item(row)
        raise ItemMissing(f"no task {item_id}")

    def _sweep(self) -> None:
        if self._database.read(statements.ANY_TO_SWEEP):
            self._written(statements.SWEEP)

    def _end_if_cancelled(self, holder: dict[str, Any]) -> None:
        if self._written(statements.END_CANCELLED, **holder):
            raise NotHolder("the task was cancelled")

    def _written(self, statement: Statement, **parameters: Any) -> list[Item]:
        """The items that a statement has changed."""
        items = [_item(row) for row in self._database.write(statement, **parameters)]
        self._tell(items)
        return items

    def _tell(self, changed: list[Item]) -> None:
        if self._on_change is None:
            return
        for item in changed:
            try:
                self._on_change(item)
            except Exception:
                log.exception("a change could not be told", item_id=item.id)


_EXTERNAL_IDS = ("runway_task_id", "veo_operation_id")


def _not_held(item: Item, worker_id: str) -> NotHolder:
    return NotHolder(f"the task is {item.status} and not held by {worker_id}")


def _item(row: Row) -> Item:
    fields = dict(row)
    stage, fraction = fields.pop("progress_stage"), fields.pop("progress_fraction")
    external_ids = {name: value for name in _EXTERNAL_IDS if (value := fields.pop(name)) is not None}
    return Item.model_validate(
        fields | {"progress": {"stage": stage, "fraction": fraction} if stage else None, "external_ids": external_ids}
    )


def _groups(rows: Iterable[Row]) -> Iterator[Group]:
    """Groups from their counts; the rows of one group follow each other."""
    for group_id, counted in groupby(rows, itemgetter("id")):
        of_group = list(counted)
        yield Group(
            id=group_id,
            name=of_group[0]["name"],
            created_at=of_group[0]["created_at"],
            counts={row["status"]: row["count"] for row in of_group if row["status"] is not None},
        )
