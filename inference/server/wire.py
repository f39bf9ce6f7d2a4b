"""Types of the wire: what a text or a number may be before it comes near a database.

The real server reads what JavaScript makes of a body, and workers written for it count on that: numbers arrive as
strings, with a fraction or as null, names as numbers, paths with a slash before them. What it takes is taken here and
means the same (measured against the real routes); what says nothing is refused with a clear error.
"""

import json
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, StringConstraints, model_validator

from inference.task import MAX_PROMPT_CHARS


def _whole(value: Any) -> Any:
    """JSON has one kind of number: 600.0 is 600."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


MAX_INT = 2**31 - 1
"""What an integer column of PostgreSQL holds."""

LeaseSeq = Annotated[int, Field(strict=True, ge=0, le=MAX_INT), BeforeValidator(_whole)]
Fraction = Annotated[float, Field(strict=True, ge=0, le=1, allow_inf_nan=False)]

# PostgreSQL holds no NUL in a text, and names have no use for control characters.
Name = Annotated[str, StringConstraints(min_length=1, max_length=200, pattern=r"^[^\x00-\x1f\x7f]+$")]
Prompt = Annotated[str, StringConstraints(max_length=MAX_PROMPT_CHARS, pattern=r"^[^\x00]*$")]


class ForeignBody(BaseModel):
    """A body that workers of others send, too: null is the same as nothing."""

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
    """A number as JavaScript prints it: 7 for 7.0."""
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
"""Of a longer error message the end is kept: a traceback says last what went wrong."""


def _error_text(said: Any) -> str:
    text = said if isinstance(said, str) else json.dumps(said)
    # PostgreSQL takes neither NUL nor lone surrogates, and a text cut off somewhere may end in one.
    text = text[-MAX_ERROR_CHARS:].replace("\x00", "\N{REPLACEMENT CHARACTER}")
    return text.encode("utf-8", "replace").decode() or UNKNOWN_ERROR


UNKNOWN_ERROR = "Unknown error"
"""What the real server keeps of a failure without a reason."""

ErrorText = Annotated[str, BeforeValidator(_error_text)]
"""Whatever a worker says of its failure, up to a whole stderr."""

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
"""The hints of the contract."""


def iso(at_s: float) -> str:
    """Seconds since the epoch as the contract writes times: 2026-01-31T12:00:00.000Z."""
    return datetime.fromtimestamp(at_s, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
