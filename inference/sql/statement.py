"""What statements on SQLite and PostgreSQL are made of: a name and a description each, and the database's own clock."""

from dataclasses import dataclass
from typing import Any

from sqlalchemy import Double
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.expression import ColumnElement, literal_column


@dataclass(frozen=True, slots=True, eq=False)
class Statement:
    """One statement and what it is for."""

    name: str
    description: str
    sql: Any  # an Executable; mypy has no name for "and may be a CTE"


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


def constant(value: str | int) -> ColumnElement[Any]:
    """A value as part of a statement's text, where the text decides which index is used."""
    return literal_column(str(value) if isinstance(value, int) else "'" + value.replace("'", "''") + "'")
