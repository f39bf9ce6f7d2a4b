"""The tables, named as the Life-is-Short documents name them, and the database's own clock.

Times are seconds since the epoch, as a double, so that SQLite and PostgreSQL share every statement. They always
come from the database: several servers may share one, and their clocks need not agree.
"""

from typing import Any

from sqlalchemy import (
    Boolean,
    CheckConstraint,
    Column,
    Computed,
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
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.expression import ColumnElement


class Clock(ColumnElement[float]):
    """The database's time now, in seconds since the epoch."""

    inherit_cache = True
    type = Double()


@compiles(Clock, "sqlite")
def _sqlite_clock(_element: Clock, _compiler: SQLCompiler, **_options: Any) -> str:
    # unixepoch('subsec') is NULL before SQLite 3.42. Constant within one statement.
    return "((julianday('now') - 2440587.5) * 86400.0)"


@compiles(Clock, "postgresql")
def _postgresql_clock(_element: Clock, _compiler: SQLCompiler, **_options: Any) -> str:
    # Not now(): that is when the transaction began, before it waited for a lock.
    return "extract(epoch FROM clock_timestamp())::double precision"


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
    # The same rule as `queues.item.lane`, computed here so that an index can hold each kind's own line.
    Column(
        "lane",
        Text,
        Computed(
            "CASE WHEN coalesce(inference_provider, '') IN ('', 'wan_local') THEN 'wan' ELSE 'runway' END",
            persisted=True,
        ),
    ),
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

ONGOING = text("status IN ('pending', 'processing')")
"""The predicate of the two indexes below. SQLite uses them only where a query repeats it word for word."""


def _partial_index(name: str, *columns: str, where: Any) -> Index:
    return Index(name, *(video_items.c[column] for column in columns), sqlite_where=where, postgresql_where=where)


# What a lease takes next is the first of these that nobody holds. The ended items, soon nearly all, are not in it;
# those being worked on are, since a lapsed one keeps its place in the line: as many as there are workers.
_partial_index("video_items_line", "created_at", "id", where=ONGOING)
_partial_index("video_items_line_by_lane", "lane", "created_at", "id", where=ONGOING)
# Whose lease ran out.
_partial_index("video_items_leases", "leased_until", where=text("status = 'processing'"))
# What people list, which is in the order of the ids. There is no index of all items by created_at: while most of
# them wait PostgreSQL would lease along that one, and walk past ever more ended items when they no longer do.
Index("video_items_of_group", video_items.c.group_id, video_items.c.id)
# Deleting asks which items are left of a photo, and which photos a group has.
Index("video_items_of_photo", video_items.c.photo_id, video_items.c.id)
Index("photos_of_group", photos.c.group_id)
