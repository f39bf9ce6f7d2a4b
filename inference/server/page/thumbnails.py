"""Small pictures of stored photos, made when they are first asked for and kept for a while."""

import io
from collections import OrderedDict
from pathlib import Path

import anyio
import anyio.to_thread
from PIL import Image

from inference.media.photo import open_photo
from inference.server.objects import ObjectStore
from inference.server.rows.store import Store

SIDE_PX = 640
"""The longer side. Cards are up to 420 pixels wide, and phones have two or three pixels for each."""

QUALITY = 80

AT_ONCE = 2
"""As many as are decoded for submissions at once, see submit_api: children of that number are kept ready."""

MAX_KEPT_BYTES = 64_000_000
"""About a thousand pictures."""


class Thumbnails:
    """Makes and keeps them. For one event loop."""

    def __init__(self, store: Store, objects: ObjectStore) -> None:
        self._store, self._objects = store, objects
        self._kept: OrderedDict[str, bytes] = OrderedDict()  # by the photo's id, longest unused first
        self._kept_bytes = 0
        self._under_way: dict[str, anyio.Event] = {}
        self._making = anyio.CapacityLimiter(AT_ONCE)

    async def get(self, photo_id: str) -> bytes:
        """A JPEG. Raises ItemMissing, ObjectMissing, InvalidPhoto, MachineFault, QueueUnavailable."""
        while (made := self._kept.get(photo_id)) is None:
            if (other := self._under_way.get(photo_id)) is not None:
                await other.wait()
                continue
            self._under_way[photo_id] = anyio.Event()
            try:
                made = await anyio.to_thread.run_sync(self._make, photo_id, limiter=self._making)
                self._keep(photo_id, made)
            finally:
                self._under_way.pop(photo_id).set()
            return made
        self._kept.move_to_end(photo_id)
        return made

    def _make(self, photo_id: str) -> bytes:
        return thumbnail(self._objects.path(self._store.photo_path(photo_id)))

    def _keep(self, photo_id: str, made: bytes) -> None:
        self._kept[photo_id] = made
        self._kept_bytes += len(made)
        while self._kept_bytes > MAX_KEPT_BYTES:
            _, dropped = self._kept.popitem(last=False)
            self._kept_bytes -= len(dropped)


def thumbnail(photo: Path) -> bytes:
    """A photo as a small upright JPEG, without anything that its camera wrote into it. Blocking.

    Raises InvalidPhoto, MachineFault.
    """
    picture = open_photo(photo, cover=(SIDE_PX, SIDE_PX))
    picture.thumbnail((SIDE_PX, SIDE_PX), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=QUALITY, optimize=True, progressive=True)
    return file.getvalue()
