"""Types of the wire: what a text or a number may be before it comes near a database."""

from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, StringConstraints

from inference.task import MAX_PROMPT_CHARS


def _whole(value: Any) -> Any:
    """JSON has one kind of number: 600.0 is 600."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


MAX_INT = 2**31 - 1
"""What an integer column of PostgreSQL holds."""

WholeSeconds = Annotated[int, Field(strict=True, ge=1, le=86_400), BeforeValidator(_whole)]
LeaseSeq = Annotated[int, Field(strict=True, ge=0, le=MAX_INT), BeforeValidator(_whole)]
Fraction = Annotated[float, Field(strict=True, ge=0, le=1, allow_inf_nan=False)]

# PostgreSQL holds no NUL in a text, and names have no use for control characters.
Name = Annotated[str, StringConstraints(min_length=1, max_length=200, pattern=r"^[^\x00-\x1f\x7f]+$")]
Prompt = Annotated[str, StringConstraints(max_length=MAX_PROMPT_CHARS, pattern=r"^[^\x00]*$")]
StoragePath = Annotated[str, StringConstraints(min_length=1, max_length=1000, pattern=r"^[^\x00-\x1f\x7f]+$")]

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
