"""Presigned GET, PUT and forms: photos in, videos out.

The URLs carry credentials in their query, and strangers who submit tasks may choose some of them. So errors and logs
hold host and path only, connections go through `inference.transfer.network`, and sizes are limited.

Requests go straight to a transport. httpx's client is left out on purpose: it logs whole URLs at INFO, keeps
cookies, and reads the bodies of redirects to their end.
"""

import re
import secrets
from collections.abc import AsyncIterator, Awaitable, Collection, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Self, TypeVar

import anyio
import httpcore
import httpx

from inference.errors import (
    I2VError,
    ObjectEmpty,
    ObjectTooLarge,
    SettingsError,
    StorageRefused,
    StorageUnavailable,
    UrlMalformed,
)
from inference.transfer.body import IDENTITY, arriving, beginning, compression
from inference.transfer.network import GuardedNetwork, GuardedTransport, flaw_in
from inference.transfer.storage_errors import FOREIGN, mapped, media_type, redact, refusal, said_by
from inference.transfer.url_expiry import upload_headers

__all__ = ["Storage", "redact"]

T = TypeVar("T")

CONNECT_TIMEOUT_S = 10.0
IDLE_TIMEOUT_S = 30.0
"""A transfer that moves no byte for this long has failed."""
TRANSFER_LIMIT_S = 600.0
"""For one whole transfer: a peer that sends a byte now and then must not block a lease for ever."""
MAX_REDIRECTS = 5
CHUNK_BYTES = 1024 * 1024
"""Per write and switch of threads: below 1 MiB the switches reduce the throughput."""
MAX_REFUSAL_BYTES = 64 * 1024  # how much of an error page is read
PAGES = {"text/html", "text/xml", "application/xml", "application/json", "application/problem+json"}
"""Media types of error pages, which photos never have."""


class Storage:
    """Fetches and stores objects by presigned URL. Every call is one attempt.

    `trusted_origins` (`https://minio.lan:9000`) belong to the operator and may have any address, and so may every port
    of the hosts in `trusted_hosts` (`http://localhost:3000`). All other URLs must lead to public addresses, unless
    `allow_private`. `transport` replaces the network and its guard, for tests.

    Raises SettingsError for a trusted origin or host that is not a URL.
    """

    def __init__(
        self,
        *,
        trusted_origins: Collection[str] = (),
        trusted_hosts: Collection[str] = (),
        allow_private: bool = False,
        max_download_bytes: int = 50_000_000,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        trusted: set[tuple[str, int | None]] = {_trusted(origin) for origin in trusted_origins}
        trusted |= {(_trusted(url)[0], None) for url in trusted_hosts}
        self._max_download_bytes = max_download_bytes
        self._network = GuardedNetwork(trusted=trusted, allow_private=allow_private)
        self._transport = transport or GuardedTransport(self._network)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Closes connections."""
        await self._transport.aclose()

    async def check(self, url: str) -> None:
        """Checks that a worker may connect to a URL, without connecting.

        Raises AddressRefused, UrlMalformed, StorageUnavailable where its host cannot be found.
        """
        host, port = _endpoint(_parsed(url))
        try:
            await self._network.addresses(host, port)
        except httpcore.ConnectError as error:
            raise StorageUnavailable(f"{redact(url)}: {error}") from None

    async def download(self, url: str, path: Path, *, max_bytes: int | None = None) -> int:
        """Fetches an object into `path`, which appears only when complete; returns its size in bytes.

        `max_bytes` replaces this storage's own limit.
        Raises AddressRefused, UrlExpired, ObjectMissing, ObjectEmpty, ObjectTooLarge, StorageUnavailable,
        StorageRefused, DiskFull.
        """
        return await _map_errors(url, self._download(url, path, max_bytes or self._max_download_bytes))

    async def upload(self, url: str, path: Path, *, content_type: str = "video/mp4") -> None:
        """Stores a file. After StorageUnavailable it may have been stored all the same.

        Raises AddressRefused, UrlExpired, ObjectExists, ObjectMissing, ObjectTooLarge, StorageUnavailable,
        StorageRefused, DiskFull.
        """
        await _map_errors(url, self._upload(url, path, content_type))

    async def submit(self, url: str, fields: Mapping[str, str], body: bytes, *, name: str, content_type: str) -> None:
        """Stores bytes through a presigned form, as a browser would (S3's POST). Raises as `upload`."""
        await _map_errors(url, self._submit(url, fields, (name, body, content_type)))

    async def _download(self, url: str, path: Path, max_bytes: int) -> int:
        for _ in range(MAX_REDIRECTS + 1):
            request = _request("GET", url)
            async with self._answer(request) as response:
                if not response.has_redirect_location:
                    return await self._save(response, url, path, max_bytes)
                url = str(request.url.join(response.headers["Location"]))
        raise StorageRefused(f"{redact(url)}: more than {MAX_REDIRECTS} redirects")

    async def _save(self, response: httpx.Response, url: str, path: Path, max_bytes: int) -> int:
        if response.status_code != 200 or media_type(response) in PAGES:
            raise refusal(response, await beginning(response, MAX_REFUSAL_BYTES), url)
        if coding := compression(response):
            raise StorageRefused(f"{redact(url)}: compressed with {coding}, though identity was asked for")
        declared = _declared_bytes(response)
        if declared is not None and declared > max_bytes:
            raise _too_large(url, max_bytes)
        partial = anyio.Path(path.with_name(f".{path.name}.{secrets.token_hex(4)}.part"))
        try:
            received, unwritten = 0, bytearray()
            async with await anyio.open_file(partial, "wb") as file, arriving(response) as parts:
                async for part in parts:
                    received += len(part)
                    if received > max_bytes:
                        raise _too_large(url, max_bytes)
                    unwritten += part
                    if len(unwritten) >= CHUNK_BYTES:
                        await file.write(unwritten)
                        unwritten.clear()
                await file.write(unwritten)
            if declared is not None and received != declared:
                raise StorageUnavailable(f"{redact(url)}: ended after {received} of {declared} bytes")
            if received == 0:
                raise ObjectEmpty(f"{redact(url)}: the object is empty")
            await partial.replace(path)
        finally:
            with anyio.CancelScope(shield=True):
                await partial.unlink(missing_ok=True)
        return received

    async def _upload(self, url: str, path: Path, content_type: str) -> None:
        async with await anyio.open_file(path, "rb") as file:
            size_bytes = await file.seek(0, 2)
            if size_bytes == 0:
                raise StorageRefused(f"{path.name}: nothing to upload, the file is empty")
            headers = {
                "Content-Type": content_type,
                "Content-Length": str(size_bytes),  # chunked bodies bypass Supabase's limit, and S3 refuses them
                "Connection": "close",  # otherwise Supabase refuses a large duplicate without reading the rest
            }
            await self._send("PUT", url, headers, _FileBody(file))

    async def _submit(self, url: str, fields: Mapping[str, str], file: tuple[str, bytes, str]) -> None:
        form = httpx.Request("POST", url, data=dict(fields), files={"file": file})
        headers = {name: form.headers[name] for name in ("Content-Type", "Content-Length")}
        await self._send("POST", url, headers, httpx.ByteStream(form.read()))

    async def _send(self, method: str, url: str, headers: dict[str, str], content: httpx.AsyncByteStream) -> None:
        for _ in range(MAX_REDIRECTS + 1):
            request = _request(method, url, headers | upload_headers(url), content)
            async with self._answer(request) as response:
                page = await beginning(response, MAX_REFUSAL_BYTES)
            # Only these ask for the same request again, as AWS does until a new bucket is known everywhere.
            if response.status_code not in (307, 308) or not response.has_redirect_location:
                return _accept(response, page, url)
            elsewhere = request.url.join(response.headers["Location"])
            if request.url.scheme == "https" and elsewhere.scheme == "http":
                raise StorageRefused(f"{redact(url)}: redirects to {redact(str(elsewhere))}, where all could read it")
            url = str(elsewhere)
        raise StorageRefused(f"{redact(url)}: more than {MAX_REDIRECTS} redirects")

    @asynccontextmanager
    async def _answer(self, request: httpx.Request) -> AsyncIterator[httpx.Response]:
        if flaw := flaw_in(request.url):
            raise UrlMalformed(f"{redact(str(request.url))}: {flaw}")
        response = await self._transport.handle_async_request(request)
        response.request = request
        try:
            yield response
        finally:
            with anyio.CancelScope(shield=True):
                await response.aclose()


class _FileBody(httpx.AsyncByteStream):
    """An open file, sent from its beginning each time.

    It is not a generator, since a generator that is left half-way has to be closed.
    """

    def __init__(self, file: anyio.AsyncFile[bytes]) -> None:
        self._file = file
        self._is_begun = False

    def __aiter__(self) -> AsyncIterator[bytes]:
        self._is_begun = False
        return self

    async def __anext__(self) -> bytes:
        if not self._is_begun:
            self._is_begun = True
            await self._file.seek(0)
        if chunk := await self._file.read(CHUNK_BYTES):
            return chunk
        raise StopAsyncIteration


def _request(
    method: str, url: str, headers: Mapping[str, str] = {}, content: httpx.AsyncByteStream | None = None
) -> httpx.Request:
    # As `stream`, which httpx passes on unchanged; `content` would be wrapped into a generator.
    parsed = httpx.URL(url)
    return httpx.Request(
        method,
        parsed,
        headers={
            "Host": parsed.netloc.decode("ascii"),
            "User-Agent": "serverless-i2v",
            "Accept": "*/*",
            **IDENTITY,
            **headers,
        },
        stream=content or httpx.ByteStream(b""),
        extensions={"timeout": httpx.Timeout(IDLE_TIMEOUT_S, connect=CONNECT_TIMEOUT_S).as_dict()},
    )


def _accept(response: httpx.Response, page: bytes, url: str) -> None:
    """Raises StorageError where an upload was not accepted, also if the status says otherwise."""
    if not response.is_success or media_type(response) == "text/html" or said_by(response, page).status >= 400:
        raise refusal(response, page, url)


def _too_large(url: str, max_bytes: int) -> ObjectTooLarge:
    return ObjectTooLarge(f"{redact(url)}: larger than {max_bytes} bytes")


def _declared_bytes(response: httpx.Response) -> int | None:
    length = response.headers.get("Content-Length", "")
    return int(length) if re.fullmatch("[0-9]{1,15}", length) else None


def _trusted(origin: str) -> tuple[str, int]:
    try:
        return _endpoint(_parsed(origin))
    except UrlMalformed:
        raise SettingsError(
            f"{redact(origin)}: a trusted origin looks like https://host or https://host:port"
        ) from None


def _parsed(url: str) -> httpx.URL:
    try:
        parsed = httpx.URL(url)
    except (httpx.InvalidURL, UnicodeError):
        parsed = httpx.URL()
    if flaw := flaw_in(parsed):
        raise UrlMalformed(f"{redact(url)}: {flaw}")
    return parsed


def _endpoint(url: httpx.URL) -> tuple[str, int]:
    return url.raw_host.decode(), url.port or (443 if url.scheme == "https" else 80)


async def _map_errors(url: str, work: Awaitable[T]) -> T:
    try:
        with anyio.fail_after(TRANSFER_LIMIT_S):
            return await work
    except I2VError:
        raise
    except FOREIGN as error:
        failure = mapped(error, url)
    raise failure  # outside of the handler: a foreign error in its context might show the query
