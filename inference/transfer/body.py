"""Bodies of responses, read with a limit and never decompressed.

A server may send without end, and 1.6 KB of brotli, or of gzip applied twice, unfold into gigabytes inside httpx. So
every request asks for `identity`, and a body that is compressed all the same is not read.
"""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import cast

import anyio
import httpx

IDENTITY = {"Accept-Encoding": "identity"}
"""Asks for an uncompressed body, whose length can be compared with what arrives."""

MAX_JSON_BYTES = 8_000_000
"""For a response without a file. The longest, a page of tasks with the longest prompts, has half of that."""

COMPRESSIONS = {"gzip", "x-gzip", "deflate", "br", "zstd", "compress", "x-compress", "dcb", "dcz"}
"""Content codings that change bytes (iana.org/assignments/http-parameters). Storages return whatever
an object was stored with: `aws-chunked`, `base64`, `UTF-8`, `binary` and `none` were all seen with intact bytes."""


def compression(response: httpx.Response) -> str | None:
    """The first coding of a compressed body; None if the body is not compressed."""
    named = (each.strip().lower() for each in response.headers.get("Content-Encoding", "").split(","))
    return next((each for each in named if each in COMPRESSIONS), None)


@asynccontextmanager
async def arriving(response: httpx.Response) -> AsyncIterator[AsyncIterator[bytes]]:
    """The body as it arrives, which may be left unread at any point.

    httpx nests generators, and closing the outer one leaves the others to the garbage collector, of which trio
    complains. Closing the connection first makes the innermost fail, and with it all of them end.
    """
    stream = cast("httpx.AsyncByteStream", response.stream)  # what an asynchronous transport gives
    parts = _relay(stream)
    try:
        yield parts
    finally:
        with anyio.CancelScope(shield=True), suppress(httpx.HTTPError, httpx.StreamError):
            await stream.aclose()
            async for _ in parts:
                pass


async def _relay(stream: httpx.AsyncByteStream) -> AsyncIterator[bytes]:
    async for part in stream:
        yield part


async def beginning(response: httpx.Response, limit_bytes: int) -> bytes:
    """At most `limit_bytes` of the body; nothing of a compressed one."""
    if compression(response):
        return b""
    read = bytearray()
    async with arriving(response) as parts:
        async for part in parts:
            read += part
            if len(read) >= limit_bytes:
                break
    return bytes(read[:limit_bytes])


def bounded(limit_bytes: int) -> Callable[[httpx.Response], Awaitable[None]]:
    """A response hook for clients of httpx that replaces the body by its `beginning`.

    The status is kept. A truncated or compressed body is not valid JSON, so parsing it fails.
    """

    async def bound(response: httpx.Response) -> None:
        read = await beginning(response, limit_bytes)
        response.headers.pop("Content-Encoding", None)
        response.stream = httpx.ByteStream(read)

    return bound
