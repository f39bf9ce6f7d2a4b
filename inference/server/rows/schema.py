"""The tables, named as the Life-is-Short documents name them, and the database's own clock.

Times are seconds since the epoch, as a double, so that SQLite and PostgreSQL share every statement. They always
come from the database: several servers may share one, and their clocks need not agree.
"""

import hashlib
from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Double,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    Table,
    Text,
    false,
    text,
)
from sqlalchemy.sql.elements import Grouping
from sqlalchemy.sql.expression import ColumnElement, case

from inference.providers import DEFAULT, PROVIDERS
from inference.sql.statement import constant

metadata = MetaData()

groups = Table(
    "groups",
    metadata,
    Column("id", Text, primary_key=True),
    Column("name", Text, unique=True),
    Column("created_at", Double, nullable=False),
)

photos = Table(
    "photos",
    metadata,
    Column("id", Text, primary_key=True),
    Column("group_id", Text, ForeignKey("groups.id"), nullable=False),
    Column("storage_path", Text, nullable=False),
    Column("original_filename", Text),
    Column("width", Integer),
    Column("height", Integer),
    Column("size_bytes", Integer),
    Column("created_at", Double, nullable=False),
)

video_items = Table(
    "video_items",
    metadata,
    Column("id", Text, primary_key=True),
    Column("group_id", Text, ForeignKey("groups.id"), nullable=False),
    Column("photo_id", Text, ForeignKey("photos.id"), nullable=False),
    Column("prompt", Text, nullable=False),
    Column("frame_num", Integer),
    Column("inference_provider", Text),
    Column("status", Text, nullable=False),
    Column("worker_id", Text),
    Column("leased_until", Double),
    Column("lease_seq", Integer, nullable=False),
    Column("retry_count", Integer, nullable=False),
    Column("renewed", Boolean, nullable=False, server_default=false()),
    Column("crash_count", Integer, nullable=False),
    Column("lost_count", Integer, nullable=False, server_default="0"),
    Column("cancel_requested", Boolean, nullable=False),
    Column("progress_stage", Text),
    Column("progress_fraction", Double),
    Column("video_storage_path", Text),
    Column("error_message", Text),
    Column("runway_task_id", Text),
    Column("veo_operation_id", Text),
    Column("created_at", Double, nullable=False),
    Column("updated_at", Double, nullable=False),
    Column("started_at", Double, server_default=text("NULL")),
    Column("ended_at", Double, server_default=text("NULL")),
    Column("cost_usd", Double, server_default=text("NULL")),
    CheckConstraint(
        "status IN ('pending', 'processing', 'completed', 'failed', 'cancelled')",
        name="video_items_status",
    ),
)

idempotency_keys = Table(
    "idempotency_keys",
    metadata,
    Column("key", Text, primary_key=True),
    Column("fingerprint", Text, nullable=False),  # of the request that came with it
    Column("photo_id", Text, nullable=False),  # of the tasks that were made; they may have been deleted since
    Column("created_at", Double, nullable=False),
)

# Written before an object may come to be, and kept until a row names it or nothing can store it any more. So the sweep
# knows what to look for without a look at the folder, and touches nothing that this database has not heard of.
unnamed_objects = Table(
    "unnamed_objects",
    metadata,
    Column("path", Text, primary_key=True),
    Column("item_id", Text),  # whose video it may become; none for a photo
    Column("recorded_at", Double, nullable=False),  # when it could be stored last, as far as is known
)

# What was completed and has been deleted since was paid for nevertheless. One row a day, so none has to be tidied away.
deleted_videos = Table(
    "deleted_videos",
    metadata,
    Column("day", BigInteger, primary_key=True),  # on which they were completed: its midnight in UTC
    Column("spent_usd", Double, nullable=False),
    Column("unpriced", Integer, nullable=False),  # videos without a known price
)

ONGOING = text("status IN ('pending', 'processing')")
"""The predicate of the two indexes of the line. SQLite uses them only where a query repeats it word for word."""

ENDED = text("status IN ('completed', 'failed', 'cancelled')")
"""The predicate of the index of what has ended; as ONGOING."""


_by_hint = case(
    *(
        (video_items.c.inference_provider.in_(map(constant, provider.models)), constant(provider.worker_type))
        for provider in PROVIDERS
        if provider is not DEFAULT
    ),
    else_=constant(DEFAULT.worker_type),
)
worker_type: ColumnElement[str] = Grouping(_by_hint)  # PostgreSQL wants an expression in an index to be in parentheses
"""Whose workers an item waits for: `providers.provider_of`, as SQL. Databases use the index of it only where a query
repeats it word for word."""

LINE_BY_WORKER_TYPE = "video_items_line_by_"
"""How the names of its indexes begin: of this version's, and of those that went by an earlier table of providers."""


LEASES_BY_TIME = "video_items_leases"
"""The index of earlier versions in which every renewal of a lease had to be written."""


def _digest(rule: ColumnElement[Any]) -> str:
    return hashlib.sha256(str(rule).encode()).hexdigest()[:8]


# Renewals write to no column of any index and to none of their conditions.
def _partial_index(name: str, *columns: Any, where: Any) -> Index:
    named = [video_items.c[column] if isinstance(column, str) else column for column in columns]
    return Index(name, *named, sqlite_where=where, postgresql_where=where)


# What a lease takes next is the first of these that nobody holds. The ended items, soon nearly all, are not in it;
# those being worked on are, since a lapsed one keeps its place in the line: as many as there are workers.
_partial_index("video_items_line", "created_at", "id", where=ONGOING)
# The same for workers of one type. Its name holds the rule, so that a database that a version with other providers left
# gets this one, too; `database.py` drops the other.
_partial_index(LINE_BY_WORKER_TYPE + _digest(worker_type), worker_type, "created_at", "id", where=ONGOING)
# What is worked on: whose lease ran out is looked for among these, as many as there are workers. The time is not in the
# index, since each renewal changes it: PostgreSQL would then write the item to every index again.
_partial_index("video_items_processing", "id", where=text("status = 'processing'"))
# What ended, by status: pages of it, and how much there is. And which videos were made lately, and for how much.
_partial_index("video_items_ended", "status", "id", where=ENDED)
_partial_index("video_items_completed", "ended_at", where=text("status = 'completed'"))
# What people list, which is in the order of the ids. There is no index of all items by created_at: while most of
# them wait PostgreSQL would lease along that one, and walk past ever more ended items when they no longer do.
Index("video_items_of_group", video_items.c.group_id, video_items.c.id)
# Deleting asks which items are left of a photo, and which photos a group has.
Index("video_items_of_photo", video_items.c.photo_id, video_items.c.id)
Index("photos_of_group", photos.c.group_id)
