"""Makes the tables, and brings those of an earlier version up to date."""

from sqlalchemy import Connection, case, inspect, update
from sqlalchemy.schema import CreateColumn, CreateIndex

from inference.errors import SettingsError
from inference.queues.item import DONE
from inference.server.rows.schema import ENDED, LEASES_BY_TIME, LINE_BY_WORKER_TYPE, metadata, video_items
from inference.sql.database import FILLFACTOR_PERCENT

# SQLAlchemy's inspector is not used, because it skips SQLite's indexes on expressions.
INDEX_NAMES = {
    "sqlite": "SELECT name FROM sqlite_master WHERE type = 'index'",
    "postgresql": "SELECT relname FROM pg_class WHERE relkind = 'i' AND pg_table_is_visible(oid)",
}
"""The statements that list all indexes; names of ours begin with that of their table."""


def migrate(connection: Connection) -> None:
    """Makes what is missing. Raises SettingsError for foreign tables that happen to have the same names."""
    metadata.create_all(connection)
    if "ended_at" in _add_columns(connection):
        _fill_in_ends(connection)
    _update_indexes(connection)
    if connection.dialect.name == "postgresql":
        _leave_room(connection)


def _fill_in_ends(connection: Connection) -> None:
    """Rows of earlier versions have no `ended_at`: it was their last write. Completed ones are done to 100 %."""
    is_done = video_items.c.status == "completed"
    ends = {  # in one statement, since PostgreSQL writes a row again for each, and there may be many
        "ended_at": video_items.c.updated_at,
        "progress_stage": case((is_done, DONE.stage), else_=video_items.c.progress_stage),
        "progress_fraction": case((is_done, DONE.fraction), else_=video_items.c.progress_fraction),
    }
    connection.execute(update(video_items).where(ENDED).values(ends))


def _add_columns(connection: Connection) -> set[str]:
    """Adds columns that tables of an earlier version lack, with defaults for existing rows; returns their names.

    Other columns of that version stay: one of its servers may run beside this one, or be returned to.

    Raises SettingsError, and changes nothing, for foreign tables that happen to have the same names.
    """
    added = set()
    for table in metadata.sorted_tables:
        there = {column["name"] for column in inspect(connection).get_columns(table.name)}
        lacking = [column for column in table.columns if column.name not in there]
        if any(column.server_default is None for column in lacking):
            raise SettingsError(
                f"the database has a table {table.name} of something else: give this queue one of its own"
            )
        for column in lacking:
            described = CreateColumn(column).compile(dialect=connection.dialect)
            connection.exec_driver_sql(f"ALTER TABLE {table.name} ADD COLUMN {described}")
            added.add(column.name)
    return added


def _update_indexes(connection: Connection) -> None:
    """Makes those that tables of an earlier version lack; drops the one that renewals wrote to, and those that went by
    another table of providers.

    A server of that version may still run beside this one: without its index it is slower, and no less right. Dropped
    first, for which PostgreSQL locks the whole table: a lock that grew could meet that of a writer half-way. And only
    what lacks is made: to find that an index is there, PostgreSQL locks its table, too, and writers hold several.
    """
    ours = {str(index.name): index for table in metadata.sorted_tables for index in table.indexes}
    there = {name for (name,) in connection.exec_driver_sql(INDEX_NAMES[connection.dialect.name]).fetchall()}
    for name in there - ours.keys():
        if name == LEASES_BY_TIME or name.startswith(LINE_BY_WORKER_TYPE):
            connection.exec_driver_sql(f"DROP INDEX {name}")
    for name, index in ours.items():
        if name not in there:
            connection.execute(CreateIndex(index))


def _leave_room(connection: Connection) -> None:
    """Has PostgreSQL leave room for renewals in the pages that it writes from now on, unless somebody chose otherwise.

    A lease writes its item anew, mostly to such a page, so tables of an earlier version need no other treatment.
    """
    [options] = connection.exec_driver_sql(
        "SELECT reloptions FROM pg_class WHERE oid = 'video_items'::regclass"
    ).fetchone() or (None,)
    if not any(option.startswith("fillfactor=") for option in options or ()):
        connection.exec_driver_sql(f"ALTER TABLE video_items SET (fillfactor = {FILLFACTOR_PERCENT})")
