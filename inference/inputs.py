"""What a task brings, put into a folder and verified: files at http(s) URLs, and data URIs, which hold the file itself.

Names, sources and contents come from strangers. A name therefore never becomes a file's name, sizes are bounded before
anything is decoded, a declared media type is not believed, and no error shows what a data URI holds or the query of a
URL.
"""

import base64
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal
from urllib.parse import unquote_to_bytes

import anyio
import anyio.to_thread

from inference.errors import InvalidPhoto, MediaError, ObjectTooLarge, StorageError, UrlMalformed, one_line, write_error
from inference.task import LAST_PHOTO, MAX_SEGMENTS, PHOTO, Input, InputKind
from inference.transfer.storage import Storage

MAX_VIDEO_BYTES = 200_000_000
"""Of one video: ten minutes of 1080p as phones record it are half of that to twice that."""

MAX_TOTAL_BYTES = 500_000_000
"""Of all inputs together. They lie on the disk until the task ends."""

MAX_INPUTS = MAX_SEGMENTS
"""As many photos as a film may show. It is far more than any workflow of an application loads."""

MAX_DATA_HEAD_CHARS = 256
"""How far the comma of a data URI may be from its beginning: media types with parameters are a fraction of that."""

MAX_NAME_CHARS = 80
"""How much of a name an error shows."""

PHOTO_SUFFIXES = {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp", "HEIF": ".heic"}


def source_kind(source: str) -> Literal["path", "url", "data"]:
    """What an input's source is: an http(s) URL, a data URI, or else a path, which only its queue can resolve."""
    start = source[:8].lower()
    if start.startswith("data:"):
        return "data"
    return "url" if start.startswith(("http://", "https://")) else "path"


async def fetch(
    inputs: Mapping[str, Input],
    folder: Path,
    *,
    storage: Storage,
    max_bytes: int,
    max_video_bytes: int = MAX_VIDEO_BYTES,
    max_total_bytes: int = MAX_TOTAL_BYTES,
) -> dict[str, Path]:
    """Puts every input into `folder` and verifies it; returns their paths by name.

    `photo` and `last_photo` keep their names, all others are `input-<n>`; the suffix is that of the content. `storage`
    fetches URLs, so its rules on addresses apply. `max_bytes` is for one image, `max_video_bytes` for one video.
    Paths in a queue's storage are for the queue to resolve first.

    Raises UrlMalformed for a source that is no URL or no proper data URI, ObjectTooLarge, other StorageErrors,
    InvalidPhoto, InvalidVideo, MachineFault. Errors about a file begin with its name, but for the photo's own.
    """
    if len(inputs) > MAX_INPUTS:
        raise ObjectTooLarge(f"inputs: the task brings {len(inputs)} files; the limit is {MAX_INPUTS}")
    paths, left_bytes = {}, max_total_bytes
    for number, (name, item) in enumerate(inputs.items(), 1):
        path = folder / (name if name in {PHOTO, LAST_PHOTO} else f"input-{number}")
        limit_bytes = max_bytes if item.kind == "image" else max_video_bytes
        with _named(name):
            if left_bytes <= 0:
                raise ObjectTooLarge(f"the task's files are together larger than {max_total_bytes} bytes")
            left_bytes -= await _put(item.source, path, storage, min(limit_bytes, left_bytes))
            suffix = await verify(path, item.kind)
            paths[name] = await _renamed(path, suffix)
    return paths


async def verify(path: Path, kind: InputKind) -> str:
    """Checks that a file is a photo or a video that can be used; returns the suffix that its content calls for.

    Raises InvalidPhoto, InvalidVideo, MachineFault.
    """
    return await anyio.to_thread.run_sync(_photo_suffix if kind == "image" else _video_suffix, path)


def _photo_suffix(path: Path) -> str:
    from inference.media import photo  # noqa: PLC0415 - pixels are no matter of a process that only moves tasks

    return PHOTO_SUFFIXES.get(photo.verify(path).format, "")


def _video_suffix(path: Path) -> str:
    from inference.media import foreign  # noqa: PLC0415 - as above

    foreign.verify(path)
    return foreign.SUFFIXES.get(foreign.container(path) or "", "")


async def _put(source: str, path: Path, storage: Storage, limit_bytes: int) -> int:
    """Writes what a source stands for to `path`; returns its size in bytes."""
    match source_kind(source):
        case "url":
            return await storage.download(source, path, max_bytes=limit_bytes)
        case "data":
            return await anyio.to_thread.run_sync(_write_data, source, path, limit_bytes)
        case "path":
            raise UrlMalformed("the source is neither an http(s) URL nor a data URI")


def _write_data(uri: str, path: Path, limit_bytes: int) -> int:
    content = decode_data(uri, limit_bytes)
    try:
        path.write_bytes(content)
    except OSError as error:
        raise write_error(error, f"{path.name}: cannot be written: {error.strerror}") from error
    return len(content)


def decode_data(uri: str, limit_bytes: int) -> bytes:
    """The bytes that a data URI holds (RFC 2397): base64 of the standard alphabet with its padding, or percent-encoded.

    Raises UrlMalformed, ObjectTooLarge; nothing larger than the limit is decoded.
    """
    head, comma, payload = uri[:MAX_DATA_HEAD_CHARS].partition(",")
    if not comma or source_kind(uri) != "data":
        raise UrlMalformed("the data URI has no comma after its media type")
    payload = uri[len(head) + 1 :]
    if not payload.isascii():
        raise UrlMalformed("the data URI has characters that none may have")
    # Each character stands for at most one byte; and three for one where it is percent-encoded, four for three in
    # base64, whose `+`, `/` and `=` may be percent-encoded in turn.
    is_base64 = head.rpartition(";")[2].strip().lower() == "base64"
    if len(payload) - 2 * payload.count("%") > (-(-limit_bytes // 3) * 4 if is_base64 else limit_bytes):
        raise _too_large(limit_bytes)
    if re.search("%(?![0-9A-Fa-f]{2})", payload):
        raise UrlMalformed("the data URI has a % without two hexadecimal digits")
    content = unquote_to_bytes(payload)
    if is_base64:
        try:
            content = base64.b64decode(content, validate=True)
        except ValueError:
            raise UrlMalformed("the data URI says that it is base64, and is not") from None
    if len(content) > limit_bytes:
        raise _too_large(limit_bytes)
    if not content:
        raise UrlMalformed("the data URI is empty")
    return content


def _too_large(limit_bytes: int) -> ObjectTooLarge:
    return ObjectTooLarge(f"the data URI holds more than {limit_bytes} bytes")


async def _renamed(path: Path, suffix: str) -> Path:
    try:
        return Path(await anyio.Path(path).rename(f"{path}{suffix}"))
    except OSError as error:
        raise write_error(error, f"{path.name}: cannot be renamed: {error.strerror}") from error


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Errors of the block begin with the input's name. Those about a photo say so already."""
    try:
        yield
    except (StorageError, MediaError) as error:
        if name == PHOTO and isinstance(error, InvalidPhoto):
            raise
        raise type(error)(f"{one_line(name, MAX_NAME_CHARS)}: {error}") from error
