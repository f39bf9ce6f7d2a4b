"""The table of jobs: our own, or one that an application has already.

Every column can have another name. Columns that we do not know are never touched, and none is dropped or altered:
`migrate` only adds what is missing. Times are the database's own. `lease_beat_at` is when the holder was heard of last;
nothing but an acquire and its beats writes it.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import BigInteger, Boolean, Column, Connection, DateTime, Integer, MetaData, String, Table, Text, text
from sqlalchemy.dialects.postgresql import JSON, JSONB, UUID
from sqlalchemy.exc import ProgrammingError
from sqlalchemy.types import TypeEngine, UserDefinedType

from inference.errors import SettingsError
from inference.queues.video_jobs.job import STATUSES
from inference.sql.database import FILLFACTOR_PERCENT

DEFAULT_TABLE = "video_jobs"

NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_$]{0,62}")
"""Names of tables and columns that are taken: PostgreSQL's own rule, without quotes or blanks."""

TEXTS = ("text", "character varying")
KEYS = (*TEXTS, "uuid")
JSONS = ("jsonb", "json")
INTEGERS = ("integer", "bigint", "smallint")
MOMENT = ("timestamp with time zone",)
ANY_MOMENT = (*MOMENT, "timestamp without time zone")


@dataclass(frozen=True, slots=True)
class _Rule:
    """What a column has to be, and how a missing one is made."""

    types: tuple[str, ...]  # as PostgreSQL calls them
    made: str  # type and default of a column that we add
    is_the_jobs: bool = False  # says what the job is: a table of an application without it is no table of jobs


RULES: Mapping[str, _Rule] = {
    "id": _Rule((*KEYS, "bigint", "integer"), "text PRIMARY KEY", is_the_jobs=True),
    "status": _Rule(TEXTS, "text NOT NULL DEFAULT 'queued'", is_the_jobs=True),
    "input": _Rule(JSONS, "jsonb NOT NULL", is_the_jobs=True),
    "attempt_id": _Rule(KEYS, "text"),  # of who holds the job, or ended it; new for each acquire
    "worker": _Rule(TEXTS, "text"),  # the name of the same, for people
    "lease_beat_at": _Rule(MOMENT, "timestamptz"),  # NULL where nobody holds it
    "beaten": _Rule(("boolean",), "boolean NOT NULL DEFAULT false"),  # this holder was heard of
    "attempts": _Rule(INTEGERS, "integer NOT NULL DEFAULT 0"),  # acquires
    "crashes": _Rule(INTEGERS, "integer NOT NULL DEFAULT 0"),  # holders that went silent
    "losses": _Rule(INTEGERS, "integer NOT NULL DEFAULT 0"),  # in a row, holders that were never heard of
    "progress": _Rule(JSONS, "jsonb"),
    "cancel_requested": _Rule(("boolean",), "boolean NOT NULL DEFAULT false"),
    "artifact_key": _Rule(TEXTS, "text"),  # the video, in the bucket
    "error": _Rule(TEXTS, "text"),
    "created_at": _Rule(ANY_MOMENT, "timestamptz NOT NULL DEFAULT now()"),
    "updated_at": _Rule(ANY_MOMENT, "timestamptz NOT NULL DEFAULT now()"),
}
"""Every column, by the name it has in this package."""

MIGRATE = "run `i2v push migrate`"


@dataclass(frozen=True)
class Names:
    """What the table and its columns are called in the database.

    Raises SettingsError for a name that cannot be one, and for a column that does not exist here.
    """

    table: str = DEFAULT_TABLE  # may begin with a schema: `app.video_jobs`
    columns: Mapping[str, str] = field(default_factory=dict)  # by our names; those left out are called as here

    def __post_init__(self) -> None:
        parts = self.table.split(".")
        if len(parts) > 2 or not all(NAME.fullmatch(part) for part in parts):
            raise SettingsError(f"I2V_JOBS_TABLE: {self.table!r} is no name of a table such as video_jobs")
        if unknown := sorted(self.columns.keys() - RULES.keys()):
            raise SettingsError(f"I2V_JOBS_COLUMNS: no column {', '.join(unknown)}; there are {', '.join(RULES)}")
        for ours, theirs in self.columns.items():
            if not NAME.fullmatch(theirs):
                raise SettingsError(f"I2V_JOBS_COLUMNS: {ours}: {theirs!r} is no name of a column")
        called = [self.column(ours) for ours in RULES]
        if twice := sorted({name for name in called if called.count(name) > 1}):
            raise SettingsError(f"I2V_JOBS_COLUMNS: {', '.join(twice)}: stands for two columns")

    def column(self, ours: str) -> str:
        """What a column of ours is called there."""
        return self.columns.get(ours, ours)

    @property
    def schema(self) -> str | None:
        """The schema that the table's name begins with."""
        return self.table.rpartition(".")[0] or None

    @property
    def bare(self) -> str:
        """The table's name without its schema."""
        return self.table.rpartition(".")[2]

    @property
    def quoted(self) -> str:
        """The table's name as SQL."""
        return ".".join(f'"{part}"' for part in self.table.split("."))


class _Native(UserDefinedType[str]):
    """A type that an application made, such as an enum of its statuses."""

    cache_ok = True

    def __init__(self, name: str) -> None:
        self.name = name

    def get_col_spec(self, **_: Any) -> str:
        """The type's name as SQL."""
        return self.name


@dataclass(frozen=True, slots=True)
class _Found:
    """A column as it is in the database."""

    type: str
    labels: tuple[str, ...]  # of an enum
    chars: int | None = None  # the longest text it takes; None: any


_COLUMNS = text("""
    SELECT attname, format_type(coalesce(nullif(typbasetype, 0), atttypid), NULL),
           ARRAY(SELECT enumlabel::text FROM pg_enum WHERE enumtypid = atttypid ORDER BY enumsortorder),
           CASE WHEN atttypid = 'character varying'::regtype AND atttypmod > 4 THEN atttypmod - 4 END
    FROM pg_attribute JOIN pg_type ON pg_type.oid = atttypid
    WHERE attrelid = to_regclass(:table) AND attnum > 0 AND NOT attisdropped
""")

_READS = text(
    "SELECT has_table_privilege(to_regclass(:table), 'SELECT') AND has_table_privilege(to_regclass(:table), 'UPDATE')"
)


# Of the status alone.
_CHECKS = text("""
    SELECT pg_get_constraintdef(oid) FROM pg_constraint
    WHERE conrelid = to_regclass(:table) AND contype = 'c' AND conkey = ARRAY(
        SELECT attnum FROM pg_attribute WHERE attrelid = to_regclass(:table) AND attname = :status)
""")


_IS_UNIQUE = text("""
    SELECT EXISTS (
        SELECT FROM pg_index JOIN pg_attribute ON attrelid = indrelid AND attnum = indkey[0]
        WHERE indrelid = to_regclass(:table) AND indisunique AND indnkeyatts = 1 AND indpred IS NULL AND attname = :id
    )
""")


def _found(connection: Connection, names: Names) -> dict[str, _Found]:
    rows = connection.execute(_COLUMNS, {"table": names.quoted})
    return {name: _Found(kind, tuple(labels), chars) for name, kind, labels, chars in rows}


def migrate(connection: Connection, names: Names) -> list[str]:
    """Makes the table, or adds the columns that it lacks, and two indexes. Changes nothing else.

    Returns what was made, in words. Raises SettingsError for a table that is not one of jobs, as `described`.
    """
    try:
        return _migrate(connection, names)
    except ProgrammingError as error:  # what PostgreSQL does not know, or does not let this user do
        said = str(error.orig).partition("\n")[0]
        raise SettingsError(f"the table {names.table} could not be made or completed: {said}") from None


def _migrate(connection: Connection, names: Names) -> list[str]:
    there = _found(connection, names)
    added = {ours: rule for ours, rule in RULES.items() if names.column(ours) not in there}
    made = [f'"{names.column(ours)}" {rule.made}' for ours, rule in added.items()]
    told = [f"column {names.column(ours)} of {names.table}" for ours in added]
    if not there:
        told = [f"table {names.table}"]
        status, words = f'"{names.column("status")}"', ", ".join(f"'{word}'" for word in STATUSES)
        made.append(f"CHECK ({status} IN ({words}))")
        room = f"WITH (fillfactor = {FILLFACTOR_PERCENT})"
        connection.exec_driver_sql(f"CREATE TABLE {names.quoted} ({', '.join(made)}) {room}")
    elif lacking := [ours for ours, rule in added.items() if rule.is_the_jobs]:
        raise SettingsError(_lacks(names, lacking))
    elif made:
        _refuse_wrong(connection, names, there)
        added_now = ", ".join(f"ADD COLUMN {column}" for column in made)
        connection.exec_driver_sql(f"ALTER TABLE {names.quoted} {added_now}")
    described(connection, names)
    _make_indexes(connection, names)
    return told


def _make_indexes(connection: Connection, names: Names) -> None:
    """The line: what waits and what is worked on. And what may have to be ended: what is worked on or was canceled.

    Both are partial, so nothing that has ended is in them, and no beat changes what they hold.
    """
    created_at, id_, status, cancel = (
        f'"{names.column(ours)}"' for ours in ("created_at", "id", "status", "cancel_requested")
    )
    for name, columns, holds in (
        ("line", f"{created_at}, {id_}", f"{status} IN ('queued', 'processing')"),
        ("open", id_, f"{status} = 'processing' OR {cancel} AND {status} = 'queued'"),
    ):
        connection.exec_driver_sql(
            f'CREATE INDEX IF NOT EXISTS "{names.bare[:50]}_i2v_{name}" ON {names.quoted} ({columns}) WHERE {holds}'
        )


def described(connection: Connection, names: Names) -> Table:
    """The table as it is there; its columns by our names (`table.c.status`). Changes nothing.

    Raises SettingsError where it is missing, lacks a column, has one of a wrong type, or may not be written to.
    """
    there = _found(connection, names)
    if not there:
        raise SettingsError(f"the database has no table {names.table}: {MIGRATE}")
    if lacking := [ours for ours in RULES if names.column(ours) not in there]:
        raise SettingsError(_lacks(names, lacking))
    _refuse_wrong(connection, names, there)
    if not connection.execute(_READS, {"table": names.quoted}).scalar_one():
        raise SettingsError(f"this database user may not write to {names.table}: GRANT SELECT, INSERT, UPDATE on it")
    columns = [
        Column(names.column(ours), _type(there[names.column(ours)]), key=ours, primary_key=ours == "id")
        for ours in RULES
    ]
    return Table(names.bare, MetaData(), *columns, schema=names.schema)


def _lacks(names: Names, lacking: list[str]) -> str:
    called = ", ".join(names.column(ours) for ours in lacking)
    if any(RULES[ours].is_the_jobs for ours in lacking):
        return (
            f"the table {names.table} has no column {called}: say in I2V_JOBS_COLUMNS what it is called there, or "
            "name another table in I2V_JOBS_TABLE"
        )
    return f"the table {names.table} lacks {called}: {MIGRATE}, which adds columns and changes no other"


def _refuse_wrong(connection: Connection, names: Names, there: Mapping[str, _Found]) -> None:
    """Raises SettingsError that names every column that cannot hold what it has to."""
    wrong = []
    for ours, rule in RULES.items():
        column = there.get(names.column(ours))
        if column is None or column.type in rule.types:
            continue
        if ours == "status" and column.labels:
            if missing := [word for word in STATUSES if word not in column.labels]:
                wrong.append(f"{names.column(ours)} has no value {', '.join(missing)}")
            continue
        wrong.append(f"{names.column(ours)} is {column.type} and has to be {' or '.join(rule.types)}")
    for (rule_text,) in connection.execute(_CHECKS, {"table": names.quoted, "status": names.column("status")}):
        allowed = [word for word in STATUSES if f"'{word}'" in rule_text]
        if allowed and (missing := [word for word in STATUSES if word not in allowed]):
            wrong.append(f"a CHECK of {names.column('status')} does not allow {', '.join(missing)}")
    if not connection.execute(_IS_UNIQUE, {"table": names.quoted, "id": names.column("id")}).scalar_one():
        wrong.append(f"{names.column('id')} is no primary key, nor otherwise unique")
    if wrong:
        raise SettingsError(f"the table {names.table} does not fit: {'; '.join(wrong)}")


def _type(column: _Found) -> TypeEngine[Any]:
    if column.labels:
        return _Native(column.type)
    known: dict[str, TypeEngine[Any]] = {
        "uuid": UUID(as_uuid=False),
        "jsonb": JSONB(),
        "json": JSON(),
        "boolean": Boolean(),
        "timestamp with time zone": DateTime(timezone=True),
        "timestamp without time zone": DateTime(),
    }
    if column.type in INTEGERS:
        return BigInteger() if column.type == "bigint" else Integer()
    return known.get(column.type) or (Text() if column.chars is None else String(column.chars))
