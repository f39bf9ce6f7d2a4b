"""The route that turns an uploaded photo into tasks."""

import hashlib
import json
from functools import partial
from pathlib import Path as FilePath
from typing import Annotated

import anyio
import anyio.to_thread
from fastapi import APIRouter, File, Form, Header, UploadFile
from pydantic import BaseModel
from pydantic.json_schema import SkipJsonSchema

from inference.errors import InvalidPhoto, ObjectTooLarge
from inference.media.photo import verify
from inference.queues.item import Item
from inference.server.answers import Answer, errors
from inference.server.client_api import TaskView, task_view
from inference.server.config import ServerConfig
from inference.server.live import Live
from inference.server.objects import ObjectStore, copy
from inference.server.rows.store import NewItem, NewPhoto, Once, Store, new_id
from inference.server.tidy import discard
from inference.server.wire import Name, Prompt, Provider
from inference.task import MAX_DURATION_S, MIN_DURATION_S, QUEUE_FPS

EXTENSIONS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "HEIF": "heic"}
"""The extension of a photo's storage path, by the format that was detected."""

PHOTO_TYPES = {
    "requestBody": {
        "content": {
            "multipart/form-data": {
                "encoding": {"photo": {"contentType": "image/jpeg, image/png, image/webp, image/heic"}}
            }
        }
    }
}
"""What the OpenAPI description adds about the photo."""

MAX_VIDEOS = 20
PHOTOS_AT_ONCE = 2
"""Decoding 100 megapixels takes half a GB, as WebP three times that; and threads must remain free for heartbeats."""


class Created(BaseModel):
    """The tasks made of one photo."""

    group_id: str
    photo_id: str
    items: list[TaskView]


Seconds = Annotated[float, Form(ge=MIN_DURATION_S, le=MAX_DURATION_S, allow_inf_nan=False)]


def submit_routes(config: ServerConfig, store: Store, objects: ObjectStore, live: Live) -> APIRouter:
    """The route that takes photos."""
    routes = APIRouter(prefix="/api", tags=["tasks"])
    decoding = anyio.CapacityLimiter(PHOTOS_AT_ONCE)
    add = partial(add_items, store=store, objects=objects, config=config)

    @routes.post(
        "/tasks",
        summary="Submit a photo",
        status_code=201,
        responses=errors(400, 401, 409),
        openapi_extra=PHOTO_TYPES,
    )
    async def create(  # noqa: PLR0917 - FastAPI passes them by name
        photo: Annotated[UploadFile, File(description="JPEG, PNG, WebP or HEIC")],
        prompt: Annotated[Prompt, Form(description="What should happen, e.g. slow dolly-in")] = "",
        seconds: Seconds = 5.0,
        count: Annotated[int, Form(ge=1, le=MAX_VIDEOS, description="How many videos of this photo")] = 1,
        group: Annotated[
            Name | SkipJsonSchema[None], Form(description="Id or name of a group; a new one unless given")
        ] = None,
        inference_provider: Annotated[Provider | SkipJsonSchema[None], Form()] = None,
        idempotency_key: Annotated[
            Name | SkipJsonSchema[None],
            Header(description="Unique to this request: repeated under the same key, it makes nothing new for a day"),
        ] = None,
    ) -> Answer[Created]:
        """Stores a photo and asks for videos of it.

        Send an `Idempotency-Key`, such as a UUID, and repeat the request as it is when its answer is lost: the answer
        names the tasks that were made the first time. 409 for another request under a key that was used.
        """
        wanted = [NewItem(prompt, frame_num(seconds), inference_provider) for _ in range(count)]
        once = None
        if idempotency_key is not None:
            asked = (prompt, seconds, count, group, inference_provider)
            once = Once(idempotency_key, await anyio.to_thread.run_sync(fingerprint, photo, asked))
        items = await anyio.to_thread.run_sync(store.made_by, once) if once else []
        if not items:
            stored = await anyio.to_thread.run_sync(
                store_photo, photo, group, store, objects, config.max_photo_bytes, limiter=decoding
            )
            items = await anyio.to_thread.run_sync(add, stored, wanted, once)
        views = [task_view(item, live=live) for item in items]
        return Answer(data=Created(group_id=items[0].group_id, photo_id=items[0].photo_id, items=views))

    return routes


def store_photo(photo: UploadFile, group: str | None, store: Store, objects: ObjectStore, max_bytes: int) -> NewPhoto:
    """Puts an uploaded photo into storage, checked; its group is found or made. Raises InvalidPhoto, ObjectTooLarge."""
    with objects.incoming() as file:
        copy(photo.file, file)
        size_bytes = file.tell()
        if size_bytes > max_bytes:
            raise ObjectTooLarge(f"photo: more than {max_bytes} bytes")
        try:
            info = verify(FilePath(file.name))
        except InvalidPhoto as error:
            raise InvalidPhoto(f"photo: {error}") from None
        group_id, photo_id = store.group(group) if group else new_id(), new_id()  # a new group is added with its tasks
        path = f"{group_id}/{photo_id}_original.{EXTENSIONS[info.format]}"
        store.removal.expect(path)
        objects.place(file, path)
    return NewPhoto(
        id=photo_id,
        group_id=group_id,
        storage_path=path,
        original_filename=(photo.filename or "").replace("\x00", "")[:255] or None,
        width=info.width,
        height=info.height,
        size_bytes=size_bytes,
    )


def add_items(
    photo: NewPhoto,
    wanted: list[NewItem],
    once: Once | None,
    *,
    store: Store,
    objects: ObjectStore,
    config: ServerConfig,
) -> list[Item]:
    """Asks for videos of a stored photo.

    If that fails, or the same request was answered before, the photo is removed unless a row names it: the rows may
    have been written although the database's answer was lost.
    """
    try:
        items = store.add(photo, wanted, once)
    except BaseException:
        discard([photo.storage_path], store, objects, config)
        raise
    if items[0].photo_id != photo.id:
        discard([photo.storage_path], store, objects, config)
    return items


def fingerprint(photo: UploadFile, asked: tuple[object, ...]) -> str:
    """A digest that tells requests apart: by the photo's bytes, not its name, and by everything else asked for."""
    digest = hashlib.file_digest(photo.file, "sha256")  # type: ignore[arg-type]  # a spooled file is one
    photo.file.seek(0)
    digest.update(json.dumps(asked).encode())
    return digest.hexdigest()


def frame_num(seconds: float) -> int:
    """How queues count a duration (Life-is-Short API: 24·seconds + 1)."""
    return round(seconds * QUEUE_FPS) + 1
