"""Presigned downloads and uploads, compatible with Supabase's storage.

Its refusals have HTTP status 400; the actual status is in the body, which differs from the bodies of the queue.
"""

from typing import Annotated, Any
from urllib.parse import quote

import anyio.to_thread
import structlog
from fastapi import APIRouter, Query, Request
from fastapi.responses import FileResponse, JSONResponse, Response
from pydantic import BaseModel
from starlette.requests import ClientDisconnect

from inference.errors import (
    BadSignature,
    DiskFull,
    LengthMissing,
    ObjectExists,
    ObjectMissing,
    ObjectTooLarge,
    StorageError,
    StorageRefused,
    UrlExpired,
    WrongMediaType,
)
from inference.server import objects
from inference.server.answers import EarlyAnswer, Failure, documented
from inference.server.config import ServerConfig
from inference.server.objects import ObjectStore, Operation, Signer

DOWNLOAD_PREFIX = "/storage/v1/object/sign/"
UPLOAD_PREFIX = "/storage/v1/object/upload/sign/"
VIDEOS = "videos/"
VIDEO_TYPES = ("video/mp4", "video/webm")

log = structlog.get_logger(__name__)

# Optional for FastAPI, so that a missing token is refused as Supabase does and not as a malformed request.
Token = Annotated[str, Query(description="What presign put there")]


class Stored(BaseModel):
    """A finished upload."""

    Key: str  # bucket/path


class StorageFailure(BaseModel):
    """What Supabase's storage says when it refuses."""

    statusCode: str  # noqa: N815 - the wire's name
    error: str
    message: str
    code: str


# The first row whose class matches: (our error, then Supabase's statusCode, error and code).
REFUSALS: tuple[tuple[type[Exception], str, str, str], ...] = (
    (ObjectExists, "409", "Duplicate", "KeyAlreadyExists"),
    (ObjectTooLarge, "413", "Payload too large", "EntityTooLarge"),
    (WrongMediaType, "415", "invalid_mime_type", "InvalidMimeType"),
    (LengthMissing, "411", "MissingContentLength", "MissingContentLength"),
    (ObjectMissing, "404", "not_found", "NoSuchKey"),
    (BadSignature, "400", "InvalidSignature", "InvalidSignature"),
    (UrlExpired, "400", "InvalidJWT", "InvalidJWT"),
    (StorageRefused, "400", "InvalidJWT", "InvalidJWT"),
)

RESPONSES: dict[int | str, dict[str, Any]] = {
    400: documented(
        StorageFailure,
        "Refused; `statusCode` and `code` say why",
        {
            "statusCode": "409",
            "error": "Duplicate",
            "message": "The resource already exists",
            "code": "KeyAlreadyExists",
        },
    ),
    403: documented(Failure, "Not from a web page"),
    404: documented(Failure, "No such route: a path with a line break"),
    500: documented(StorageFailure, "Try again"),
}


class Presigner:
    """URLs for one object of the bucket."""

    def __init__(self, config: ServerConfig, signer: Signer) -> None:
        self._config = config
        self._signer = signer

    def url(self, request: Request, operation: Operation, path: str) -> str:
        """A URL under the public address, or else under the address of the caller's request."""
        base = (self._config.public_url or str(request.base_url)).rstrip("/")
        prefix = DOWNLOAD_PREFIX if operation == "download" else UPLOAD_PREFIX
        key = f"{self._config.bucket}/{path}"
        token = self._signer.sign(operation, key, self._config.url_lifetime_s)
        return f"{base}{prefix}{quote(key)}?token={token}"


def storage_routes(config: ServerConfig, store: ObjectStore, signer: Signer) -> APIRouter:
    """The routes of the object storage."""
    routes = APIRouter(tags=["storage"])

    @routes.head(DOWNLOAD_PREFIX + "{bucket}/{path:path}", include_in_schema=False)
    @routes.get(
        DOWNLOAD_PREFIX + "{bucket}/{path:path}",
        summary="Download a photo or a video",
        response_class=FileResponse,
        responses=RESPONSES
        | {
            200: {"content": {"*/*": {"schema": {"type": "string", "format": "binary"}}}},
            206: {"description": "The range that was asked for", "content": {"*/*": {}}},
            416: {"description": "No such range", "content": {"text/plain": {}}},
        },
    )
    def download(bucket: str, path: str, token: Token = "") -> Response:
        """The object, in full or the range that was asked for."""
        try:
            signer.check(token, "download", f"{bucket}/{path}")
            return FileResponse(store.path(path))
        except StorageError as error:
            return refusal(error, JSONResponse)

    @routes.put(
        UPLOAD_PREFIX + "{bucket}/{path:path}",
        summary="Upload a video",
        response_model=Stored,
        responses=RESPONSES,
        openapi_extra={
            "requestBody": {
                "required": True,
                "content": {kind: {"schema": {"type": "string", "format": "binary"}} for kind in VIDEO_TYPES},
            }
        },
    )
    async def upload(bucket: str, path: str, request: Request, token: Token = "") -> Response:
        """Stores the body, whole or not at all, and never over another object."""
        try:
            signer.check(token, "upload", f"{bucket}/{path}")
            length = await _admit(request, path, store, config.max_upload_bytes)
        except StorageError as error:
            return refusal(error, EarlyAnswer)
        try:
            await _receive(request, path, store, length)
        except ClientDisconnect:
            log.info("an upload was cut short", path=path)
            return Response(status_code=400)  # the client has left and does not read it
        except (StorageError, DiskFull) as error:
            return refusal(error, JSONResponse)
        return JSONResponse(Stored(Key=f"{bucket}/{path}").model_dump())

    return routes


async def _admit(request: Request, path: str, store: ObjectStore, max_bytes: int) -> int:
    """Refuses what can be refused before the body is read; returns its length in bytes. Raises StorageError."""
    length = _length(request, max_bytes)
    media_type = request.headers.get("content-type", "")
    if path.startswith(VIDEOS) and media_type not in VIDEO_TYPES:
        raise WrongMediaType(f"mime type {media_type} is not supported")
    if not store.accepts(path):
        raise ObjectMissing("Object not found")
    if await anyio.to_thread.run_sync(store.exists, path):
        raise ObjectExists("The resource already exists")
    return length


async def _receive(request: Request, path: str, store: ObjectStore, length: int) -> None:
    """Makes the body the object `path`. Raises StorageError, DiskFull, and ClientDisconnect for a body cut short."""
    with store.incoming() as file:
        received = 0
        async for chunk in request.stream():
            received += len(chunk)
            await anyio.to_thread.run_sync(objects.write, file, chunk)
        if received != length:
            raise ClientDisconnect
        await anyio.to_thread.run_sync(store.place, file, path)


def _length(request: Request, max_bytes: int) -> int:
    length = request.headers.get("content-length", "")
    if not (length.isascii() and length.isdigit()):
        raise LengthMissing("You must provide the Content-Length HTTP header")
    if len(length) > 18 or int(length) > max_bytes:
        raise ObjectTooLarge("The object exceeded the maximum allowed size")
    return int(length)


def refusal(error: Exception, kind: type[JSONResponse]) -> JSONResponse:
    """What the storage answers for an error."""
    for matched, status, name, code in REFUSALS:
        if isinstance(error, matched):
            return kind(StorageFailure(statusCode=status, error=name, message=str(error), code=code).model_dump(), 400)
    log.error("the storage cannot answer", error=str(error))
    failed = StorageFailure(statusCode="500", error="Internal", message=str(error), code="InternalError")
    return kind(failed.model_dump(), 500)
