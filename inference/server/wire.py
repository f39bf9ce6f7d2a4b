"""Types of request fields, validated before they reach a database.

The real server is JavaScript and converts types freely, and workers rely on that: numbers arrive as strings, with a
fraction or as null, names as numbers, paths with a leading slash. Whatever the real server accepts is accepted here
with the same meaning (measured against its routes); meaningless values are refused with a clear error.
"""

import json
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, StringConstraints, model_validator

from inference.task import MAX_PROMPT_CHARS


def _whole(value: Any) -> Any:
    """JSON has only one type of number, so 600.0 is 600."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


MAX_INT = 2**31 - 1
"""The maximum of an integer column in PostgreSQL."""

LeaseSeq = Annotated[int, Field(strict=True, ge=0, le=MAX_INT), BeforeValidator(_whole)]
Fraction = Annotated[float, Field(strict=True, ge=0, le=1, allow_inf_nan=False)]

# PostgreSQL stores no NUL in text, and names need no control characters.
Name = Annotated[str, StringConstraints(min_length=1, max_length=200, pattern=r"^[^\x00-\x1f\x7f]+$")]
Prompt = Annotated[str, StringConstraints(max_length=MAX_PROMPT_CHARS, pattern=r"^[^\x00]*$")]


MAX_COST_USD = 100_000
"""Far above what one video costs, so that a mistake does not become the day's sum."""

CostUsd = Annotated[float, Field(strict=True, ge=0, le=MAX_COST_USD, allow_inf_nan=False)]


class ForeignBody(BaseModel):
    """A body that foreign workers send, too: null means that the field is absent."""

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, data: Any) -> Any:
        return {name: value for name, value in data.items() if value is not None} if isinstance(data, dict) else data


def _not_a_flag(value: Any) -> Any:
    if isinstance(value, bool):  # which pydantic would read as 0 or 1
        raise ValueError("has to be a number")  # noqa: TRY004 - what pydantic turns into an answer
    return value


Seconds = Annotated[float, Field(gt=0, le=86_400, allow_inf_nan=False), BeforeValidator(_not_a_flag)]
"""600, 600.5, or either as a string."""


def _number_as_text(value: Any) -> Any:
    """A number as text, as JavaScript prints it: 7 for 7.0."""
    return str(_whole(value)) if isinstance(value, int | float) and not isinstance(value, bool) else value


ForeignName = Annotated[Name, BeforeValidator(_number_as_text)]


def _trimmed(path: Any) -> Any:
    """As Supabase's client cleans a path: `/a//b/` is `a/b`."""
    return "/".join(part for part in path.split("/") if part) if isinstance(path, str) else path


StoragePath = Annotated[
    str,
    StringConstraints(min_length=1, max_length=1000, pattern=r"^[^\x00-\x1f\x7f]+$"),
    BeforeValidator(_trimmed),
]

MAX_ERROR_CHARS = 10_000
"""Only the end of a longer error message is kept, since a traceback ends with the error."""


def _error_text(said: Any) -> str:
    text = said if isinstance(said, str) else json.dumps(said)
    # PostgreSQL stores neither NUL nor lone surrogates, and truncated text may end with one.
    text = text[-MAX_ERROR_CHARS:].replace("\x00", "\N{REPLACEMENT CHARACTER}")
    return text.encode("utf-8", "replace").decode() or UNKNOWN_ERROR


UNKNOWN_ERROR = "Unknown error"
"""What the real server stores for a failure without a message."""

ErrorText = Annotated[str, BeforeValidator(_error_text)]
"""A worker's error message, which may be a whole stderr."""

Provider = Literal[
    "wan_local",
    "gen4_turbo",
    "gen4.5_turbo",
    "gen3a_turbo",
    "veo3",
    "veo3.1",
    "veo3.1_fast",
    "runway_gen4_turbo",
    "runway_veo3.1",
]
"""The provider hints of the API."""


def iso(at_s: float) -> str:
    """Seconds since the epoch as the contract writes times: 2026-01-31T12:00:00.000Z."""
    return datetime.fromtimestamp(at_s, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
