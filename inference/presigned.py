"""When a presigned URL ends, as it says itself: no clip is made for a place that cannot take it any more.

    S3, R2, MinIO, Google   X-Amz-Date and X-Amz-Expires, or X-Goog-…   Signature Version 4
    older S3, Alibaba       Expires, in seconds since the epoch         Signature Version 2
    Supabase                token, a JWT with `exp`                     RFC 7519

Nothing here knows whether a signature is right: only who signed can tell.
"""

import base64
import json
from contextlib import suppress
from datetime import UTC, datetime, timedelta

import httpx

EARLIEST_S = 1e9
"""Of 2001: what is less is no moment at which a URL ends."""


def ends_at(url: str) -> datetime | None:
    """The moment, in UTC, from which the URL is refused; None where it does not say, or not in words we know."""
    query = {name.lower(): value for name, value in httpx.URL(url).params.items()}
    # A caller's own text: numbers beyond any calendar, dates that are none, tokens of something else.
    with suppress(LookupError, ValueError, TypeError, OverflowError, OSError, RecursionError):
        for signer in ("amz", "goog"):
            if f"x-{signer}-expires" in query:
                signed_at = datetime.strptime(query[f"x-{signer}-date"], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
                return signed_at + timedelta(seconds=int(query[f"x-{signer}-expires"]))
        if "expires" in query:
            return _moment(int(query["expires"]))
        payload = query["token"].split(".")[1]
        claims = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
        return _moment(claims["exp"])
    return None


def _moment(seconds: float) -> datetime | None:
    # Some servers mean a duration by `expires`, and `true` is a number to Python.
    return datetime.fromtimestamp(seconds, UTC) if seconds >= EARLIEST_S else None
