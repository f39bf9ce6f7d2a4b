"""The bodies of answers: as they came over the wire, and never more of them than was wanted.

Whoever answers may send without end, and 1.6 KB of brotli, or of gzip twice, unfold into gigabytes inside httpx. Hence
nothing here is decompressed: every request asks for `identity`, and what comes compressed all the same is not read.
"""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import cast

import anyio
import httpx

IDENTITY = {"Accept-Encoding": "identity"}
"""Asks for bytes as they are; only then can a length be compared with what arrives."""

MAX_JSON_BYTES = 8_000_000
"""Of an answer that holds no file. The longest is a page of tasks with the longest prompts, which has half of that."""

COMPRESSIONS = {"gzip", "x-gzip", "deflate", "br", "zstd", "compress", "x-compress", "dcb", "dcz"}
"""Content codings that change bytes (iana.org/assignments/http-parameters). Storages hand back whatever an object was
stored with: `aws-chunked`, `base64`, `UTF-8`, `binary` and `none` were all seen above bytes that were intact."""


def compression(response: httpx.Response) -> str | None:
    """The first coding that a body has to be decompressed by; None where its bytes are as they should be."""
    named = (each.strip().lower() for each in response.headers.get("Content-Encoding", "").split(","))
    return next((each for each in named if each in COMPRESSIONS), None)


@asynccontextmanager
async def arriving(response: httpx.Response) -> AsyncIterator[AsyncIterator[bytes]]:
    """The body as it came over the wire, to be left at any point.

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
    """At most so many bytes of the body; none of one that is compressed."""
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
    """A response hook for clients of httpx that puts the `beginning` of the body in the body's place.

    The status stays. What was cut or compressed is not valid JSON, so whoever parses it notices.
    """

    async def bound(response: httpx.Response) -> None:
        read = await beginning(response, limit_bytes)
        response.headers.pop("Content-Encoding", None)
        response.stream = httpx.ByteStream(read)

    return bound
