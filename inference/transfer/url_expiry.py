"""What a presigned URL says of itself: no clip is made for a place that cannot take it, or not any more.

    S3, R2, MinIO, Google   X-Amz-Date and X-Amz-Expires, or X-Goog-…   Signature Version 4
    older S3, Alibaba       Expires, in seconds since the epoch         Signature Version 2
    Azure                   se, in ISO 8601, and sig                    shared access signature
    Supabase                token, a JWT with `exp`                     RFC 7519

Nothing here knows whether a signature is right: only who signed can tell.
"""

import base64
import json
import re
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime, timedelta

import httpx

EARLIEST_S = 1e9
"""Of 2001: what is less is no moment at which a URL ends."""


SENT_HEADERS = {"host", "content-type", "content-length"}
"""Headers of an upload that a signature may cover: only of these can whoever signs know the values."""

UNSIGNED = "UNSIGNED-PAYLOAD"
"""What signers for S3 put in the place of a body's digest when they do not know the body."""

CHECKSUM = re.compile(r"x-amz-checksum-(?:crc32|crc32c|crc64nvme|sha1|sha256)")
"""Of S3 (docs.aws.amazon.com/AmazonS3/latest/API/API_PutObject.html)."""


def ends_at(url: str) -> datetime | None:
    """The moment, in UTC, from which the URL is refused; None where it does not say, or not in words we know."""
    query = _query(url)
    # A caller's own text: numbers beyond any calendar, dates that are none, tokens of something else.
    with suppress(LookupError, ValueError, TypeError, OverflowError, OSError, RecursionError):
        for signer in ("amz", "goog"):
            if f"x-{signer}-expires" in query:
                signed_at = datetime.strptime(query[f"x-{signer}-date"], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
                return signed_at + timedelta(seconds=int(query[f"x-{signer}-expires"]))
        if _is_of_azure(query):
            end = datetime.fromisoformat(query["se"])
            return end.astimezone(UTC) if end.tzinfo else end.replace(tzinfo=UTC)
        if "expires" in query:
            return _moment(int(query["expires"]))
        payload = query["token"].split(".")[1]
        claims = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
        return _moment(claims["exp"])
    return None


def flaw(url: str) -> str | None:
    """Why a clip that is not made yet cannot be stored there, whenever it is tried; None where nothing speaks against.

    What was signed has to arrive as it was signed, so it cannot be mended here.
    """
    query = _query(url)
    for signer in ("amz", "goog"):
        signed = query.get(f"x-{signer}-signedheaders", "").lower().split(";")
        if unknown := sorted({name.strip() for name in signed} - SENT_HEADERS - {""}):
            return f"signed for headers that are not sent ({', '.join(unknown)}); sign host and Content-Type alone"
    digest = query.get("x-amz-content-sha256", UNSIGNED)
    if digest != UNSIGNED or any(CHECKSUM.fullmatch(name) for name in query):
        return "signed with the checksum of another body; sign without one (requestChecksumCalculation: WHEN_REQUIRED)"
    if _is_of_azure(query) and not set(query.get("sp", "w")) & {"c", "w"}:
        return "signed for reading alone (sp); sign it for creating or writing"
    return None


def upload_headers(url: str) -> dict[str, str]:
    """What this storage wants to be sent beside a file."""
    # https://learn.microsoft.com/rest/api/storageservices/put-blob: without it the answer is 400.
    return {"x-ms-blob-type": "BlockBlob"} if _is_of_azure(_query(url)) else {}


def _query(url: str) -> dict[str, str]:
    return {name.lower(): value for name, value in httpx.URL(url).params.items()}


def _is_of_azure(query: Mapping[str, str]) -> bool:
    return "sig" in query and "sv" in query


def _moment(seconds: float) -> datetime | None:
    # Some servers mean a duration by `expires`, and `true` is a number to Python.
    return datetime.fromtimestamp(seconds, UTC) if seconds >= EARLIEST_S else None
