"""Maps a storage's refusals, and the exceptions of httpx, anyio and the system, to our errors.

No message made here holds the query, userinfo or fragment of a URL, because they may be credentials.
"""

import errno
import json
import re
import ssl
from contextlib import suppress
from typing import Any, NamedTuple
from urllib.parse import unquote

import anyio
import httpx

from inference.errors import (
    NO_ROOM_ERRNOS,
    I2VError,
    ObjectExists,
    ObjectMissing,
    ObjectTooLarge,
    StorageError,
    StorageRefused,
    StorageUnavailable,
    StorageUnreached,
    UrlExpired,
    UrlMalformed,
    one_line,
    write_error,
)
from inference.transfer.body import compression

MAX_REASON_CHARS = 200
MIN_SECRET_CHARS = 4  # shorter parts of a query are flags; replacing them would garble the text

DISK_ERRNOS = NO_ROOM_ERRNOS | {errno.EROFS, errno.EIO}
"""Operating system errors that are the fault of this machine's disk, and not of the task."""


# Error codes of storages: Supabase (github.com/supabase/storage, internal/errors/codes.ts) and S3
# (docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html), which R2 and GCS follow. They precede the HTTP status,
# which Supabase sets to 400 for nearly all of them.
ERROR_OF_CODE: dict[str, type[StorageError]] = {
    "InvalidJWT": UrlExpired,  # also for an expired token
    "ExpiredToken": UrlExpired,
    "ExpiredRequest": UrlExpired,
    "KeyAlreadyExists": ObjectExists,
    "ResourceAlreadyExists": ObjectExists,
    "Duplicate": ObjectExists,
    "EntityTooLarge": ObjectTooLarge,
    "NoSuchKey": ObjectMissing,
    "not_found": ObjectMissing,
    "InvalidMimeType": StorageRefused,
    "InvalidSignature": StorageRefused,
    "SlowDown": StorageUnavailable,
    "InternalError": StorageUnavailable,
    "ServiceUnavailable": StorageUnavailable,
    "DatabaseTimeout": StorageUnavailable,
    "RequestTimeout": StorageUnavailable,  # S3 sends it as 400
    "OperationAborted": StorageUnavailable,  # S3 sends it as 409: another writer at this moment
}
ERROR_OF_STATUS: dict[int, type[StorageError]] = {
    404: ObjectMissing,
    408: StorageUnavailable,
    409: ObjectExists,
    410: ObjectMissing,
    413: ObjectTooLarge,
    429: StorageUnavailable,
}
TRANSIENT = (
    httpx.TransportError,
    TimeoutError,
    ConnectionError,
    ssl.SSLError,
    anyio.BrokenResourceError,
    anyio.ClosedResourceError,
    anyio.EndOfStream,
)
FOREIGN = (
    *TRANSIENT,
    httpx.HTTPError,
    httpx.InvalidURL,
    httpx.StreamError,
    httpx.CookieConflict,
    OSError,
    UnicodeError,
)
"""The exceptions that httpx, anyio and the operating system raise during a transfer."""

QUOTES_WHAT_WAS_SENT = (httpx.LocalProtocolError, httpx.InvalidURL, UnicodeError)
"""Foreign exceptions whose message repeats part of the request: `Illegal header value b'Bearer …'`."""


def reason_of(error: Exception) -> str:
    """The message of a foreign exception; only its name where the message could contain a key."""
    said = "" if isinstance(error, QUOTES_WHAT_WAS_SENT) else str(error)
    return said or type(error).__name__


def redact(url: str) -> str:
    """scheme://host/path of a URL, for logs and errors: no query, userinfo or fragment. Never raises.

    Of a data URI, which is a photo written as a URL, nothing is left but its scheme.
    """
    if url[:5].lower() == "data:":
        return "data:…"
    bare = re.split(r"[?#]", url, maxsplit=1)[0]
    return one_line(re.sub(r"//[^/]*@", "//", bare), MAX_REASON_CHARS)


def media_type(response: httpx.Response) -> str:
    """`text/html` of `Text/HTML; charset=utf-8`; empty where the response has no media type."""
    return str(response.headers.get("Content-Type", "")).split(";")[0].strip().lower()


class Said(NamedTuple):
    """What a response says about itself, in its error body or else in its status."""

    status: int
    codes: tuple[str, ...]
    message: str


def said_by(response: httpx.Response, page: bytes) -> Said:
    """Reads Supabase's JSON and S3's XML; from anything else only the HTTP status."""
    text = page.decode("utf-8", "replace")
    fields: Any = None
    with suppress(ValueError, RecursionError):
        fields = json.loads(text)
    if not isinstance(fields, dict):
        # Two expressions instead of an XML parser, which entity expansion could attack.
        code = re.search(r"<Code>([^<]{1,80})</Code>", text)
        message = re.search(r"<Message>([^<]{1,1000})</Message>", text)
        return Said(response.status_code, (code[1],) if code else (), message[1] if message else response.reason_phrase)
    status = str(fields.get("statusCode"))
    return Said(
        int(status) if re.fullmatch("[1-5][0-9][0-9]", status) else response.status_code,
        tuple(name for name in (fields.get("code"), fields.get("error")) if isinstance(name, str)),
        str(fields.get("message") or ""),
    )


def refusal(response: httpx.Response, page: bytes, url: str) -> StorageError:
    """The error that an unsuccessful response stands for: by its code, else its message, else its status."""
    said = said_by(response, page)
    kind = next((ERROR_OF_CODE[code] for code in said.codes if code in ERROR_OF_CODE), None)
    if kind is None and said.status in (400, 401, 403) and "expired" in said.message.lower():
        kind = UrlExpired  # AWS: 403 AccessDenied "Request has expired"
    if kind is None and max(said.status, response.status_code) >= 500:
        kind = StorageUnavailable
    kind = kind or ERROR_OF_STATUS.get(said.status, StorageRefused)
    reason = " ".join(filter(None, (*said.codes[:1], said.message))) or "no reason given"
    if response.is_success or response.is_redirect:
        reason = f"not an object but {media_type(response) or 'no media type'}; {reason}"
    if coding := compression(response):
        reason += f", on a page that is compressed with {coding} and was not read"
    return kind(f"{redact(url)}: {response.status_code} {_scrub(reason, url)}")


def mapped(error: Exception, url: str) -> I2VError:
    """Our error for one of FOREIGN."""
    where, what = redact(url), _scrub(f"{type(error).__name__} {error}", url)
    if isinstance(error, OSError) and error.errno in DISK_ERRNOS:
        return write_error(error, f"cannot keep {where} here: {error.strerror}")
    if isinstance(error, httpx.InvalidURL | httpx.UnsupportedProtocol | UnicodeError):
        return UrlMalformed(f"{where}: {what}")
    if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
        return StorageUnreached(f"{where}: {what}")
    if isinstance(error, TRANSIENT) and not isinstance(error, httpx.LocalProtocolError):
        return StorageUnavailable(f"{where}: {what}")
    return StorageRefused(f"{where}: {what}")  # such as a file that is not there


def _scrub(text: str, url: str) -> str:
    """`text` without any part of the URL's query: servers often repeat a URL that they did not understand."""
    for secret in re.split("[&=?#]", url.partition("?")[2]):
        if len(secret) >= MIN_SECRET_CHARS:
            text = text.replace(secret, "…").replace(unquote(secret), "…")
    return one_line(re.sub(r"\?\S+", "?…", text), MAX_REASON_CHARS)
