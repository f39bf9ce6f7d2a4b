"""What a presigned URL says about itself, so that no clip is made for a URL that is unusable or will expire.

    S3, R2, MinIO, Google   X-Amz-Date and X-Amz-Expires, or X-Goog-…   Signature Version 4
    older S3, Alibaba       Expires, in seconds since the epoch         Signature Version 2
    Azure                   se, in ISO 8601, and sig                    shared access signature
    Supabase                token, a JWT with `exp`                     RFC 7519

Signatures are not checked: only the signer can do that.
"""

import base64
import json
import re
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime, timedelta

import httpx

EARLIEST_S = 1e9
"""The year 2001. A smaller number is not the time at which a URL expires."""


SENT_HEADERS = {"host", "content-type", "content-length"}
"""Headers of an upload that a signature may cover: the signer cannot know the values of others."""

UNSIGNED = "UNSIGNED-PAYLOAD"
"""S3's replacement for the digest of a body that the signer does not know."""

CHECKSUM = re.compile(r"x-amz-checksum-(?:crc32|crc32c|crc64nvme|sha1|sha256)")
"""Checksum headers of S3 (docs.aws.amazon.com/AmazonS3/latest/API/API_PutObject.html)."""


def ends_at(url: str) -> datetime | None:
    """The time, in UTC, from which the URL is refused; None where it does not say so in a format above."""
    query = _query(url)
    # Callers may send anything: numbers beyond any calendar, invalid dates, tokens of another kind.
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
    """Why no clip can ever be stored at an upload URL; None where none of the known reasons applies.

    Such a URL cannot be repaired here, because a request has to be sent as it was signed.
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
    """Headers that the storage requires for an upload."""
    # https://learn.microsoft.com/rest/api/storageservices/put-blob: without it the answer is 400.
    return {"x-ms-blob-type": "BlockBlob"} if _is_of_azure(_query(url)) else {}


def _query(url: str) -> dict[str, str]:
    return {name.lower(): value for name, value in httpx.URL(url).params.items()}


def _is_of_azure(query: Mapping[str, str]) -> bool:
    return "sig" in query and "sv" in query


def _moment(seconds: float) -> datetime | None:
    # For some servers `expires` is a duration, and to Python `true` is a number.
    return datetime.fromtimestamp(seconds, UTC) if seconds >= EARLIEST_S else None
