"""Every SQL statement of the store, named and described.

Each is built once, compiled once for the database in use, and takes its parameters by name. The conditions of a write
are in its own WHERE, so that it does not depend on what was read before. Each such condition has its own line and is
marked `# fence`; a test removes them one by one and expects the suite to fail each time.

Constants are part of the SQL text and not parameters, because PostgreSQL uses a partial index only if its condition
follows from the text.
"""

from functools import cache
from typing import Any, Literal

from sqlalchemy import (
    BigInteger,
    Double,
    Integer,
    Select,
    Text,
    Update,
    and_,
    bindparam,
    case,
    cast,
    delete,
    func,
    insert,
    literal_column,
    not_,
    null,
    or_,
    select,
    text,
    true,
    union_all,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.sql.expression import ColumnElement

from inference.providers import WorkerType
from inference.queues.item import CRASHED, DONE, LOST, MAX_CRASHES, MAX_FAILURES, MAX_LOST
from inference.server.rows import schema
from inference.server.rows.schema import ENDED, ONGOING, deleted_videos, groups, idempotency_keys, photos
from inference.server.rows.schema import video_items as items
from inference.sql.statement import Clock, Statement, constant

PENDING, PROCESSING, COMPLETED, FAILED, CANCELLED = map(
    constant, ("pending", "processing", "completed", "failed", "cancelled")
)
ZERO, ONE = constant(0), constant(1)
FALSE: ColumnElement[bool] = literal_column("FALSE")

# A subquery is evaluated once a statement; PostgreSQL would evaluate the bare clock for every row.
now = select(Clock()).scalar_subquery()

# As text: within SQLite's RETURNING, SQLAlchemy removes table names, and here two tables have an `id`.
_photo_storage_path: ColumnElement[str] = literal_column(
    "(SELECT storage_path FROM photos WHERE photos.id = video_items.photo_id)"
)
_photo_filename: ColumnElement[str] = literal_column(
    "(SELECT original_filename FROM photos WHERE photos.id = video_items.photo_id)"
)
row = (*items.c, _photo_storage_path.label("photo_storage_path"), _photo_filename.label("photo_filename"))
"""The columns of an `Item`."""

ran_out = and_(items.c.status == PROCESSING, items.c.leased_until <= now)
last_lapse = case(
    (items.c.renewed, items.c.crash_count + ONE >= constant(MAX_CRASHES)),
    else_=items.c.lost_count + ONE >= constant(MAX_LOST),
)


def _lapsed(counts: ColumnElement[bool]) -> dict[str, ColumnElement[Any]]:
    """The counters that an expired lease increments, if `counts`."""
    return {
        "crash_count": items.c.crash_count + case((and_(counts, items.c.renewed), ONE), else_=ZERO),
        "lost_count": items.c.lost_count + case((and_(counts, not_(items.c.renewed)), ONE), else_=ZERO),
    }


held = [
    items.c.id == bindparam("item_id", type_=Text),
    items.c.worker_id == bindparam("worker_id", type_=Text),  # fence
    items.c.status == PROCESSING,  # fence
    or_(bindparam("lease_seq", type_=Integer).is_(None), items.c.lease_seq == bindparam("lease_seq")),  # fence
]
"""The item is held by this worker, under this lease where the worker says which."""

# ---------------------------------------------------------------- sweeping

beyond_leasing = [
    ran_out,  # fence
    or_(items.c.cancel_requested, last_lapse),  # fence
]

ANY_TO_SWEEP = Statement(
    "any_to_sweep",
    "The items whose last lease ran out and that nobody may lease again: mostly none, which spares reads a write.",
    # Without a LIMIT: expecting to find one soon, PostgreSQL would look through the whole table.
    select(items.c.id).where(*beyond_leasing),
)

_swept = (
    select(items.c.id)
    .where(*beyond_leasing)
    .with_for_update(skip_locked=True)  # two concurrent sweeps share the work and cannot deadlock
    .cte("swept")
    .prefix_with("MATERIALIZED")
)

SWEEP = Statement(
    "sweep",
    "Ends the items whose last lease ran out and that nobody may lease again: cancelled, or failed as a killer.",
    update(items)
    .where(items.c.id == _swept.c.id)
    .values(
        status=case((items.c.cancel_requested, CANCELLED), else_=FAILED),
        worker_id=case((items.c.cancel_requested, items.c.worker_id), else_=null()),
        leased_until=null(),
        **_lapsed(not_(items.c.cancel_requested)),
        error_message=case(
            (items.c.cancel_requested, items.c.error_message),
            (items.c.renewed, constant(CRASHED)),
            else_=constant(LOST),
        ),
        updated_at=Clock(),
        ended_at=Clock(),
    )
    .returning(*row),
)

# ---------------------------------------------------------------- leasing

may_be_leased: list[Any] = [
    ONGOING,
    or_(items.c.status == PENDING, items.c.leased_until <= now),  # fence
    items.c.retry_count < constant(MAX_FAILURES),  # fence
    items.c.cancel_requested.is_(False),  # fence
    or_(items.c.status == PENDING, not_(last_lapse)),  # fence
]


def _line(worker_type: WorkerType | None) -> list[Any]:
    """The items that workers of a type may lease. The type is part of the text, so each has its own query plan."""
    return may_be_leased if worker_type is None else [*may_be_leased, schema.worker_type == constant(worker_type)]


def _lease(waiting: Select[Any]) -> Update:
    chosen = (
        waiting.limit(ONE)
        .with_for_update(skip_locked=True)  # nothing on SQLite, where one connection writes at a time
        .cte("chosen")
        .prefix_with("MATERIALIZED")  # or PostgreSQL may run it again for a row that has changed meanwhile
    )
    return (
        update(items)
        .where(items.c.id == chosen.c.id)
        .values(
            status=PROCESSING,
            worker_id=bindparam("worker_id", type_=Text),
            leased_until=Clock() + bindparam("lease_s", type_=Double),
            lease_seq=items.c.lease_seq + ONE,
            renewed=FALSE,
            **_lapsed(items.c.status == PROCESSING),
            progress_stage=null(),
            progress_fraction=null(),
            updated_at=Clock(),
            started_at=Clock(),
            ended_at=null(),
            cost_usd=null(),
        )
        .returning(*row)
    )


@cache
def lease(worker_type: WorkerType | None, *, given: bool, sweep: bool) -> Statement:
    """Leases an item to a worker: the oldest that waits, or the given one if it waits.

    An item whose last lease expired counts a crash. With `sweep` the sweep runs in the same statement, to save
    PostgreSQL a round trip, and the items that it ended are returned as well; SQLite has no UPDATE within a WITH.
    """
    waiting = select(items.c.id).where(*_line(worker_type))
    if given:
        # No ORDER BY: with enable_sort off, PostgreSQL would scan the queue's index instead of using the id.
        waiting = waiting.where(items.c.id == bindparam("item_id", type_=Text))
    else:
        waiting = waiting.order_by(items.c.created_at, items.c.id)
    leasing = _lease(waiting)
    return Statement(
        f"lease_{worker_type or 'any'}{'_given' * given}{'_and_sweep' * sweep}",
        "Hands the oldest item that waits, or whose lease ran out, to a worker; or the given one, if it is such.",
        union_all(select(leasing.cte("leased")), select(SWEEP.sql.cte("ended"))) if sweep else leasing,
    )


@cache
def backlog(worker_type: WorkerType | None) -> Statement:
    """How many items workers of a type could lease now."""
    waiting = select(func.count().label("waiting")).select_from(items).where(*_line(worker_type))
    return Statement(f"backlog_{worker_type or 'any'}", "How many items could be leased now.", waiting)


# ---------------------------------------------------------------- a holder's writes

_fraction = bindparam("fraction", type_=Double)

HEARTBEAT = Statement(
    "heartbeat",
    "Renews a lease, and keeps the progress its holder told.",
    update(items)
    .where(*held)
    .values(
        leased_until=Clock() + bindparam("extend_s", type_=Double),
        renewed=true(),
        lost_count=ZERO,
        progress_stage=func.coalesce(bindparam("stage", type_=Text), items.c.progress_stage),
        progress_fraction=case(
            (items.c.progress_fraction > _fraction, items.c.progress_fraction),
            else_=func.coalesce(_fraction, items.c.progress_fraction),
        ),
        updated_at=Clock(),
    )
    .returning(*row),
)

RELEASE = Statement(
    "release",
    "Hands an item back for another worker at once; no failure is counted. A cancelled one ends.",
    update(items)
    .where(*held)
    .values(
        status=case((items.c.cancel_requested, CANCELLED), else_=PENDING),
        worker_id=null(),
        leased_until=null(),
        updated_at=Clock(),
        ended_at=case((items.c.cancel_requested, Clock())),
    )
    .returning(*row),
)

COMPLETE = Statement(
    "complete",
    "The holder's video is in storage.",
    update(items)
    .where(
        *held,
        items.c.cancel_requested.is_(False),  # fence
    )
    .values(
        status=COMPLETED,
        leased_until=null(),
        video_storage_path=bindparam("video_storage_path", type_=Text),
        runway_task_id=bindparam("runway_task_id", type_=Text),
        veo_operation_id=bindparam("veo_operation_id", type_=Text),
        error_message=null(),
        progress_stage=constant(DONE.stage),
        progress_fraction=ONE,
        updated_at=Clock(),
        ended_at=Clock(),
        cost_usd=bindparam("cost_usd", type_=Double),
    )
    .returning(*row),
)

FAIL = Statement(
    "fail",
    "The holder gives up: one failure more.",
    update(items)
    .where(
        *held,
        items.c.cancel_requested.is_(False),  # fence
    )
    .values(
        status=FAILED,
        leased_until=null(),
        retry_count=items.c.retry_count + ONE,
        error_message=bindparam("message", type_=Text),
        updated_at=Clock(),
        ended_at=Clock(),
    )
    .returning(*row),
)

END_CANCELLED = Statement(
    "end_cancelled",
    "Ends an item that was cancelled under its holder, when the holder wants to end it otherwise.",
    update(items)
    .where(
        *held,
        items.c.cancel_requested,  # fence
    )
    .values(status=CANCELLED, leased_until=null(), updated_at=Clock(), ended_at=Clock())
    .returning(*row),
)

# ---------------------------------------------------------------- a person's writes

_is_nobodys = or_(items.c.status == PENDING, items.c.leased_until <= now)

CANCEL = Statement(
    "cancel",
    "Ends an item that nobody works on; asks the holder of one that is being worked on.",
    update(items)
    .where(
        items.c.id == bindparam("item_id", type_=Text),
        ONGOING,  # fence
    )
    .values(
        status=case((_is_nobodys, CANCELLED), else_=items.c.status),
        cancel_requested=true(),  # leased_until stays: a second reading of the clock could disagree with the first
        updated_at=Clock(),
        ended_at=case((_is_nobodys, now)),
    )
    .returning(*row),
)

RETRY = Statement(
    "retry",
    "Puts a failed or cancelled item back in its old place in the line, its counters at zero.",
    update(items)
    .where(
        items.c.id == bindparam("item_id", type_=Text),
        or_(items.c.status == FAILED, items.c.status == CANCELLED),  # fence
    )
    .values(
        status=PENDING,
        worker_id=null(),
        leased_until=null(),
        retry_count=ZERO,
        crash_count=ZERO,
        lost_count=ZERO,
        cancel_requested=FALSE,
        progress_stage=null(),
        progress_fraction=null(),
        error_message=null(),
        updated_at=Clock(),
        started_at=null(),
        ended_at=null(),
        cost_usd=null(),
    )
    .returning(*row),
)

_new_group = {"id": bindparam("id"), "name": bindparam("name", type_=Text), "created_at": Clock()}

ADD_GROUP = {
    dialect: Statement("add_group", "Adds a group, unless one of that name was added meanwhile.", sql)
    for dialect, sql in (
        ("sqlite", sqlite.insert(groups).values(_new_group).on_conflict_do_nothing()),
        ("postgresql", postgresql.insert(groups).values(_new_group).on_conflict_do_nothing()),
    )
}

ADD_PHOTO = Statement(
    "add_photo",
    "Adds a photo that is in storage already.",
    insert(photos).values(
        id=bindparam("id"),
        group_id=bindparam("group_id"),
        storage_path=bindparam("storage_path"),
        original_filename=bindparam("original_filename"),
        width=bindparam("width"),
        height=bindparam("height"),
        size_bytes=bindparam("size_bytes"),
        created_at=Clock(),
    ),
)

ADD_ITEM = Statement(
    "add_item",
    "Adds an item that waits.",
    insert(items)
    .values(
        id=bindparam("id"),
        group_id=bindparam("group_id"),
        photo_id=bindparam("photo_id"),
        prompt=bindparam("prompt"),
        frame_num=bindparam("frame_num"),
        inference_provider=bindparam("inference_provider"),
        status=PENDING,
        lease_seq=ZERO,
        retry_count=ZERO,
        crash_count=ZERO,
        cancel_requested=FALSE,
        created_at=Clock(),
        updated_at=Clock(),
    )
    .returning(*row),
)

_new_key: dict[str, Any] = {
    "key": bindparam("key"),
    "fingerprint": bindparam("fingerprint"),
    "photo_id": bindparam("photo_id"),
    "created_at": Clock(),
}

ADD_KEY = {
    name: Statement(
        "add_key",
        "Takes an Idempotency-Key, unless it is taken; waits for who takes it now.",
        kind.insert(idempotency_keys)
        .values(_new_key)
        .on_conflict_do_nothing()
        .returning(idempotency_keys.c.key.label("taken")),
    )
    for name, kind in (("sqlite", sqlite), ("postgresql", postgresql))
}

FIND_KEY = Statement(
    "find_key",
    "The request that came with an Idempotency-Key, and what was made of it.",
    select(idempotency_keys.c.fingerprint, idempotency_keys.c.photo_id).where(
        idempotency_keys.c.key == bindparam("key", type_=Text)
    ),
)

FORGET_KEYS = Statement(
    "forget_keys",
    "Frees the Idempotency-Keys of some time ago.",
    delete(idempotency_keys).where(idempotency_keys.c.created_at < now - bindparam("age_s", type_=Double)),
)

# ---------------------------------------------------------------- reads

GET = Statement(
    "get",
    "One item.",
    select(*row).where(items.c.id == bindparam("item_id", type_=Text)),
)


OF_PHOTO = Statement(
    "of_photo",
    "The items of a photo, in the order they were added.",
    select(*row).where(items.c.photo_id == bindparam("photo_id", type_=Text)).order_by(items.c.id),
)


@cache
def list_items(*, status: Literal["ongoing", "ended"] | None, group: bool, before: bool) -> Statement:
    """A page of items, newest first, narrowed by what the caller names. Of a status it says which kind it is of."""
    narrowed: list[Any] = [true()]
    # Of an expression there is no order to walk along, so databases look up what is ongoing and sort it. Along the ids
    # they would walk past all that has ended, until they have found a page of what is ongoing.
    item_id = func.coalesce(items.c.id, constant("")) if status == "ongoing" else items.c.id
    if status:
        narrowed += [items.c.status == bindparam("status", type_=Text), ONGOING if status == "ongoing" else ENDED]
    if group:
        narrowed.append(items.c.group_id == bindparam("group_id", type_=Text))
    if before:
        narrowed.append(item_id < bindparam("before", type_=Text))
    page = select(*row).where(and_(*narrowed)).order_by(item_id.desc()).limit(bindparam("limit", type_=Integer))
    return Statement(f"list_items_{status}_{group:d}{before:d}", "A page of items, newest first.", page)


FIND_GROUP = Statement(
    "find_group",
    "The group of that id, else of that name.",
    select(groups.c.id)
    .where(or_(groups.c.id == bindparam("group", type_=Text), groups.c.name == bindparam("group", type_=Text)))
    .order_by((groups.c.id == bindparam("group", type_=Text)).desc())
    .limit(ONE),
)

_counted = (
    groups.c.id,
    groups.c.name,
    groups.c.created_at,
    items.c.status,
    func.count(items.c.id).label("count"),
)

GET_GROUP = Statement(
    "get_group",
    "How many items of a group have which status; a row for each status.",
    select(*_counted)
    .outerjoin_from(groups, items, items.c.group_id == groups.c.id)
    .where(groups.c.id == bindparam("group_id", type_=Text))
    .group_by(groups.c.id, groups.c.name, groups.c.created_at, items.c.status),
)


@cache
def list_groups(*, before: bool) -> Statement:
    """As get_group, for a page of groups, newest first."""
    chosen = select(groups).order_by(groups.c.id.desc())
    if before:
        chosen = chosen.where(groups.c.id < bindparam("before", type_=Text))
    page = chosen.limit(bindparam("limit", type_=Integer)).subquery("page")
    counted = (
        select(page.c.id, page.c.name, page.c.created_at, items.c.status, func.count(items.c.id).label("count"))
        .outerjoin_from(page, items, items.c.group_id == page.c.id)
        .group_by(page.c.id, page.c.name, page.c.created_at, items.c.status)
        .order_by(page.c.id.desc())
    )
    return Statement(f"list_groups_{before:d}", "As get_group, for a page of groups, newest first.", counted)


PHOTO_PATH = Statement(
    "photo_path",
    "Where one photo is in storage.",
    select(photos.c.storage_path).where(photos.c.id == bindparam("photo_id", type_=Text)),
)

COUNTS = Statement(
    "counts",
    "How many items have which status.",
    union_all(
        *(
            select(items.c.status, func.count().label("count")).where(kind).group_by(items.c.status)
            for kind in (ONGOING, ENDED)
        )
    ),
)

DAY_S, HOUR_S = constant(24 * 3600), constant(3600)
_day = cast(now, BigInteger) - cast(now, BigInteger) % DAY_S  # to half a second: PostgreSQL rounds, SQLite cuts off
_is_of_today = items.c.ended_at >= _day


def _of_deleted(column: ColumnElement[Any]) -> ColumnElement[Any]:
    """What deleted videos add to today's sum."""
    return func.coalesce(select(column).where(deleted_videos.c.day == _day).scalar_subquery(), ZERO)


_waiting_since = case((items.c.started_at.is_(None), items.c.updated_at), else_=items.c.created_at)

LATELY = Statement(
    "lately",
    "How long the oldest item has waited, and what was completed in the last hour, and since midnight (UTC) for how "
    "much, with what has been deleted. An item waits from when it was added or retried; one that was handed back "
    "since, from when it was added.",
    select(
        (now - select(func.min(_waiting_since)).where(ONGOING, items.c.status == PENDING).scalar_subquery()).label(
            "oldest_wait_s"
        ),
        func.count(case((items.c.ended_at > now - HOUR_S, ONE))).label("completed_last_hour"),
        (
            func.coalesce(func.sum(case((_is_of_today, items.c.cost_usd))), ZERO)
            + _of_deleted(deleted_videos.c.spent_usd)
        ).label("spent_today_usd"),
        (
            func.count(case((and_(_is_of_today, items.c.cost_usd.is_(None)), ONE)))
            + _of_deleted(deleted_videos.c.unpriced)
        ).label("unpriced_today"),
    )
    .select_from(items)
    .where(items.c.status == COMPLETED, items.c.ended_at > now - DAY_S),
)

IN_LINE = Statement(
    "in_line",
    "The items that are ongoing, in the order in which they are leased.",
    select(items.c.id, items.c.group_id, items.c.inference_provider, items.c.frame_num, items.c.status)
    .where(ONGOING)
    .order_by(items.c.created_at, items.c.id)
    .limit(bindparam("limit", type_=Integer)),
)

LAST_COMPLETED = Statement(
    "last_completed",
    "The items that were completed last.",
    select(*row)
    .where(items.c.status == COMPLETED, items.c.ended_at > ZERO)
    .order_by(items.c.ended_at.desc())
    .limit(bindparam("limit", type_=Integer)),
)

CHECK = Statement(
    "check",
    "Changes nothing, and fails where the database cannot be written to.",
    update(items).where(text("1 = 0")).values(updated_at=items.c.updated_at),
)
