"""All clips of a group as one zip archive, written while it is sent."""

import os
import zipfile
from collections.abc import Iterator
from time import localtime

from inference.errors import I2VError
from inference.queues.item import Item
from inference.server.objects import ObjectStore
from inference.server.page.names import clip_name, shown_name, unique
from inference.server.rows.store import Store

PAGE = 200
CHUNK_BYTES = 256 * 1024

FIRST_TIME_S = 315_619_200
"""The second day of 1980: archives know no earlier time, and none of a time zone."""


def completed_items(store: Store, group_id: str) -> list[Item]:
    """The completed tasks of a group, oldest first. Raises QueueUnavailable."""
    found: list[Item] = []
    before = None
    while page := store.list_items(status="completed", group=group_id, limit=PAGE, before=before):
        found += page
        before = page[-1].id
    return found[::-1]


def zipped(items: list[Item], objects: ObjectStore) -> Iterator[bytes]:
    """The archive in pieces. Clips are stored as they are: video does not get any smaller.

    A clip that is not in storage any more is left out.
    """
    named = [item for item in items if item.video_storage_path]
    names = unique(
        clip_name(shown_name(item.photo_filename, item.photo_storage_path), item.video_storage_path or "")
        for item in named
    )
    sent = _Outgoing()
    with zipfile.ZipFile(sent, "w", zipfile.ZIP_STORED) as archive:
        for item, name in zip(named, names, strict=True):
            try:
                clip = objects.path(item.video_storage_path or "").open("rb")
            except (I2VError, OSError):
                continue
            with clip, archive.open(_entry(name, os.fstat(clip.fileno())), "w") as member:
                while chunk := clip.read(CHUNK_BYTES):
                    member.write(chunk)
                    yield sent.take()
    yield sent.take()


def _entry(name: str, facts: os.stat_result) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name, localtime(max(facts.st_mtime, FIRST_TIME_S))[:6])
    entry.external_attr = 0o644 << 16  # as Unix has it in the upper half
    entry.file_size = facts.st_size
    return entry


class _Outgoing:
    """A file that is only written to; what was written is taken away piece by piece."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []
        self._position = 0

    def write(self, data: bytes) -> int:
        """As a file; without `seek`, zipfile writes sizes behind the data."""
        self._pieces.append(bytes(data))
        self._position += len(data)
        return len(data)

    def tell(self) -> int:
        """How much was written."""
        return self._position

    def flush(self) -> None:
        """Nothing is held back."""

    def close(self) -> None:
        """Nothing is open."""

    def take(self) -> bytes:
        """What was written since."""
        pieces, self._pieces = self._pieces, []
        return b"".join(pieces)
