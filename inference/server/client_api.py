"""Routes for people: follow, cancel, retry and delete tasks. `submit_api` creates them."""

from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Path, Query, Request
from pydantic import BaseModel
from pydantic.json_schema import SkipJsonSchema

from inference.queues.item import Item, ItemProgress, Status
from inference.server.answers import Answer, errors, example
from inference.server.config import ServerConfig
from inference.server.examples import GROUP, TASK
from inference.server.live import Live
from inference.server.objects import ObjectStore
from inference.server.rows.store import Group, Store
from inference.server.storage_api import Presigner
from inference.server.tidy import discard
from inference.server.wire import Name, iso

MAX_PAGE = 200


class TaskView(BaseModel):
    """A video that was asked for."""

    model_config = example(TASK)

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
    photo_filename: str | None
    video_storage_path: str | None
    video_url: str | None = None  # only for a completed task that was asked for by its id
    runway_task_id: str | None
    veo_operation_id: str | None
    cost_usd: float | None  # of a completed task, where its worker knew
    eta_s: float | None  # seconds until it is completed, of a task that is worked on and where that can be told
    created_at: str
    updated_at: str
    started_at: str | None  # when it was leased last
    ended_at: str | None


class TaskPage(BaseModel):
    """Tasks, newest first; `cursor` asks for the next page, and is null on the last."""

    items: list[TaskView]
    cursor: str | None


class Deleted(BaseModel):
    """What was deleted, with its photos and videos."""

    tasks: int


class GroupView(BaseModel):
    """A group, and how its videos are doing."""

    model_config = example(GROUP)

    id: str
    name: str | None
    status: Status
    counts: dict[Status, int]
    left_s: float | None = None  # until all of it is completed; only for a group that was asked for by its id
    created_at: str


class GroupPage(BaseModel):
    """Groups, newest first; `cursor` asks for the next page, and is null on the last."""

    groups: list[GroupView]
    cursor: str | None


ItemId = Annotated[Name, Path(description="Id of a task")]
GroupId = Annotated[Name, Path(description="Id of a group")]
Limit = Annotated[int, Query(ge=1, le=MAX_PAGE)]
Cursor = Annotated[Name | SkipJsonSchema[None], Query(description="`cursor` of the page before")]


def client_routes(
    config: ServerConfig, store: Store, objects: ObjectStore, presigner: Presigner, live: Live
) -> APIRouter:
    """The routes a person's program calls."""
    routes = APIRouter(prefix="/api")
    view = partial(task_view, live=live)

    @routes.get("/tasks", tags=["tasks"], summary="List tasks", responses=errors(400, 401))
    def tasks(
        status: Annotated[Status | SkipJsonSchema[None], Query()] = None,
        group: Annotated[Name | SkipJsonSchema[None], Query(description="Id of a group")] = None,
        limit: Limit = 50,
        cursor: Cursor = None,
    ) -> Answer[TaskPage]:
        """Newest first, by status or group if wanted. `cursor` of the answer asks for the next page."""
        page = store.list_items(status=status, group=group, limit=limit, before=cursor)
        more = page[-1].id if len(page) == limit else None
        return Answer(data=TaskPage(items=[view(item) for item in page], cursor=more))

    @routes.get(
        "/tasks/{item_id}", tags=["tasks"], summary="Look at a task, get its video", responses=errors(400, 401, 404)
    )
    def task(item_id: ItemId, request: Request) -> Answer[TaskView]:
        """How far it is, or how it ended; with `video_url`, which needs no key, once it is completed."""
        item = store.get(item_id)
        url = None
        if item.status == "completed" and item.video_storage_path and objects.exists(item.video_storage_path):
            url = presigner.url(request, "download", item.video_storage_path)
        return Answer(data=view(item, url))

    @routes.post(
        "/tasks/{item_id}/cancel", tags=["tasks"], summary="Cancel a task", responses=errors(400, 401, 404, 409)
    )
    def cancel(item_id: ItemId) -> Answer[TaskView]:
        """Ends a task that waits; asks the worker to stop one that is being worked on. 409 for one that has ended."""
        return Answer(data=view(store.cancel(item_id)))

    @routes.post(
        "/tasks/{item_id}/retry", tags=["tasks"], summary="Try a task again", responses=errors(400, 401, 404, 409)
    )
    def retry(item_id: ItemId) -> Answer[TaskView]:
        """Puts a failed or cancelled task back in the line. 409 for any other."""
        return Answer(data=view(store.retry(item_id)))

    @routes.delete(
        "/tasks/{item_id}",
        tags=["tasks"],
        summary="Delete a task, its video and its photo",
        responses=errors(400, 401, 404),
    )
    def delete(item_id: ItemId) -> Answer[Deleted]:
        """Deletes a task and its video, and its photo with the last task of it, whatever its status.

        A worker that has it is answered 404 from then on, and stops.
        """
        discard(store.removal.delete(item_id), store, objects, config)
        return Answer(data=Deleted(tasks=1))

    @routes.get("/groups", tags=["groups"], summary="List groups", responses=errors(400, 401))
    def groups(limit: Limit = 50, cursor: Cursor = None) -> Answer[GroupPage]:
        """Newest first, with how many tasks of each have which status."""
        page = store.list_groups(limit=limit, before=cursor)
        more = page[-1].id if len(page) == limit else None
        return Answer(data=GroupPage(groups=[group_view(group) for group in page], cursor=more))

    @routes.get("/groups/{group_id}", tags=["groups"], summary="Look at a group", responses=errors(400, 401, 404))
    def group(group_id: GroupId) -> Answer[GroupView]:
        """How many of its tasks have which status, and how long the rest takes where that can be told."""
        return Answer(data=group_view(store.get_group(group_id), live.groups_left_s().get(group_id)))

    @routes.delete(
        "/groups/{group_id}", tags=["groups"], summary="Delete a group with all in it", responses=errors(400, 401, 404)
    )
    def delete_group(group_id: GroupId) -> Answer[Deleted]:
        """Deletes a group with its tasks, photos and videos, as deleting each task does."""
        gone = store.removal.delete_group(group_id)
        discard(gone.paths, store, objects, config)
        return Answer(data=Deleted(tasks=gone.items))

    return routes


TIMES = ("leased_until", "created_at", "updated_at", "started_at", "ended_at")


def task_view(item: Item, video_url: str | None = None, *, live: Live) -> TaskView:
    """An item as people see it."""
    shared = item.model_dump(include=TaskView.model_fields.keys() - set(TIMES))
    times: dict[str, Any] = {
        name: None if at_s is None else iso(at_s) for name in TIMES for at_s in [getattr(item, name)]
    }
    return TaskView(
        **shared,
        **times,
        seconds=item.duration_s,
        eta_s=live.left_s(item),
        video_url=video_url,
        runway_task_id=item.external_ids.get("runway_task_id"),
        veo_operation_id=item.external_ids.get("veo_operation_id"),
    )


def group_view(group: Group, left_s: float | None = None) -> GroupView:
    """A group as people see it."""
    return GroupView(
        id=group.id,
        name=group.name,
        status=group.status,
        counts=group.counts,
        left_s=left_s,
        created_at=iso(group.created_at),
    )
