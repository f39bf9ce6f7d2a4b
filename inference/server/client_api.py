"""The other half of the queue: photos in, tasks followed, cancelled and retried, videos out."""

from pathlib import Path as FilePath
from typing import Annotated

import anyio
import anyio.to_thread
from fastapi import APIRouter, File, Form, Path, Query, Request, UploadFile
from pydantic import BaseModel
from pydantic.json_schema import SkipJsonSchema

from inference.errors import InvalidPhoto, ObjectTooLarge
from inference.media.photo import verify
from inference.queues.item import Item, ItemProgress, Status
from inference.server.answers import Answer, errors
from inference.server.config import ServerConfig
from inference.server.objects import ObjectStore, copy
from inference.server.storage_api import Presigner
from inference.server.store import Group, NewItem, NewPhoto, Store, new_id
from inference.server.wire import Name, Prompt, Provider, iso
from inference.task import MAX_DURATION_S, QUEUE_FPS

EXTENSIONS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "HEIF": "heic"}
"""What the storage path of a photo ends with, by what the photo turned out to be."""

PHOTO_TYPES = {
    "requestBody": {
        "content": {
            "multipart/form-data": {
                "encoding": {"photo": {"contentType": "image/jpeg, image/png, image/webp, image/heic"}}
            }
        }
    }
}
"""What the description says of the photo beside that it is a file."""

MAX_VIDEOS = 20
MAX_PAGE = 200
PHOTOS_AT_ONCE = 2
"""Decoding a photo of the largest size allowed takes some 400 MB, and beats must find a thread meanwhile."""
MIN_DURATION_S = 0.5


class TaskView(BaseModel):
    """A video that was asked for."""

    id: str
    group_id: str
    photo_id: str
    prompt: str
    seconds: float
    inference_provider: str | None
    status: Status
    progress: ItemProgress | None
    cancel_requested: bool
    retry_count: int
    crash_count: int
    worker_id: str | None
    leased_until: str | None
    error_message: str | None
    photo_storage_path: str
    video_storage_path: str | None
    video_url: str | None = None  # of one completed task that was asked for by its id
    runway_task_id: str | None
    veo_operation_id: str | None
    created_at: str
    updated_at: str


class Created(BaseModel):
    """The tasks made of one photo."""

    group_id: str
    photo_id: str
    items: list[TaskView]


class TaskPage(BaseModel):
    """Tasks, newest first; `cursor` asks for the next page, and is null on the last."""

    items: list[TaskView]
    cursor: str | None


class GroupView(BaseModel):
    """A group, and how its videos are doing."""

    id: str
    name: str | None
    status: Status
    counts: dict[Status, int]
    created_at: str


class GroupPage(BaseModel):
    """Groups, newest first; `cursor` asks for the next page, and is null on the last."""

    groups: list[GroupView]
    cursor: str | None


ItemId = Annotated[Name, Path(description="Id of a task")]
GroupId = Annotated[Name, Path(description="Id of a group")]
Seconds = Annotated[float, Form(ge=MIN_DURATION_S, le=MAX_DURATION_S, allow_inf_nan=False)]
Limit = Annotated[int, Query(ge=1, le=MAX_PAGE)]
Cursor = Annotated[Name | SkipJsonSchema[None], Query(description="`cursor` of the page before")]


def client_routes(config: ServerConfig, store: Store, objects: ObjectStore, presigner: Presigner) -> APIRouter:
    """The routes a person's program calls."""
    routes = APIRouter(prefix="/api", tags=["tasks"])
    decoding = anyio.CapacityLimiter(PHOTOS_AT_ONCE)

    @routes.post("/tasks", status_code=201, responses=errors(400, 401), openapi_extra=PHOTO_TYPES)
    async def create(  # noqa: PLR0917 - FastAPI passes them by name
        photo: Annotated[UploadFile, File(description="JPEG, PNG, WebP or HEIC")],
        prompt: Annotated[Prompt, Form()] = "",
        seconds: Seconds = 5.0,
        count: Annotated[int, Form(ge=1, le=MAX_VIDEOS, description="How many videos of this photo")] = 1,
        group: Annotated[
            Name | SkipJsonSchema[None], Form(description="Id or name of a group; a new one unless given")
        ] = None,
        inference_provider: Annotated[Provider | SkipJsonSchema[None], Form()] = None,
    ) -> Answer[Created]:
        """Stores a photo and asks for videos of it."""
        stored = await anyio.to_thread.run_sync(
            store_photo, photo, group, store, objects, config.max_photo_bytes, limiter=decoding
        )
        wanted = [NewItem(prompt, frame_num(seconds), inference_provider) for _ in range(count)]
        items = await anyio.to_thread.run_sync(add_items, stored, wanted, store, objects)
        views = [task_view(item) for item in items]
        return Answer(data=Created(group_id=stored.group_id, photo_id=stored.id, items=views))

    @routes.get("/tasks", responses=errors(400, 401))
    def tasks(
        status: Annotated[Status | SkipJsonSchema[None], Query()] = None,
        group: Annotated[Name | SkipJsonSchema[None], Query(description="Id of a group")] = None,
        limit: Limit = 50,
        cursor: Cursor = None,
    ) -> Answer[TaskPage]:
        """Tasks, newest first."""
        page = store.list_items(status=status, group=group, limit=limit, before=cursor)
        more = page[-1].id if len(page) == limit else None
        return Answer(data=TaskPage(items=[task_view(item) for item in page], cursor=more))

    @routes.get("/tasks/{item_id}", responses=errors(400, 401, 404))
    def task(item_id: ItemId, request: Request) -> Answer[TaskView]:
        """One task, with a URL of its video when it is completed."""
        item = store.get(item_id)
        url = None
        if item.status == "completed" and item.video_storage_path and objects.exists(item.video_storage_path):
            url = presigner.url(request, "download", item.video_storage_path)
        return Answer(data=task_view(item, url))

    @routes.post("/tasks/{item_id}/cancel", responses=errors(400, 401, 404, 409))
    def cancel(item_id: ItemId) -> Answer[TaskView]:
        """Ends a task that waits; asks the worker to stop one that is being worked on."""
        return Answer(data=task_view(store.cancel(item_id)))

    @routes.post("/tasks/{item_id}/retry", responses=errors(400, 401, 404, 409))
    def retry(item_id: ItemId) -> Answer[TaskView]:
        """Puts a failed or cancelled task back in the line."""
        return Answer(data=task_view(store.retry(item_id)))

    @routes.get("/groups", responses=errors(400, 401))
    def groups(limit: Limit = 50, cursor: Cursor = None) -> Answer[GroupPage]:
        """Groups, newest first."""
        page = store.list_groups(limit=limit, before=cursor)
        more = page[-1].id if len(page) == limit else None
        return Answer(data=GroupPage(groups=[group_view(group) for group in page], cursor=more))

    @routes.get("/groups/{group_id}", responses=errors(400, 401, 404))
    def group(group_id: GroupId) -> Answer[GroupView]:
        """One group."""
        return Answer(data=group_view(store.get_group(group_id)))

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
        group_id, photo_id = store.group(group), new_id()
        path = f"{group_id}/{photo_id}_original.{EXTENSIONS[info.format]}"
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


def add_items(photo: NewPhoto, wanted: list[NewItem], store: Store, objects: ObjectStore) -> list[Item]:
    """Asks for videos of a stored photo; where that fails, the photo goes as well."""
    try:
        return store.add(photo, wanted)
    except BaseException:
        objects.remove(photo.storage_path)
        raise


def frame_num(seconds: float) -> int:
    """How queues count a duration (Life-is-Short API: 24·seconds + 1)."""
    return round(seconds * QUEUE_FPS) + 1


def task_view(item: Item, video_url: str | None = None) -> TaskView:
    """An item as people see it."""
    shared = item.model_dump(include=TaskView.model_fields.keys() - {"leased_until", "created_at", "updated_at"})
    return TaskView(
        **shared,
        seconds=item.duration_s,
        leased_until=None if item.leased_until is None else iso(item.leased_until),
        video_url=video_url,
        runway_task_id=item.external_ids.get("runway_task_id"),
        veo_operation_id=item.external_ids.get("veo_operation_id"),
        created_at=iso(item.created_at),
        updated_at=iso(item.updated_at),
    )


def group_view(group: Group) -> GroupView:
    """A group as people see it."""
    return GroupView(
        id=group.id, name=group.name, status=group.status, counts=group.counts, created_at=iso(group.created_at)
    )
