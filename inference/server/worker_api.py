"""The worker API: next-task, heartbeat, presign and report, and our own extension, backlog."""

import re
from collections.abc import Callable, Coroutine
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Body, Request, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel, BeforeValidator, Field, StringConstraints

from inference.errors import NotHolder
from inference.providers import WorkerType
from inference.queues.item import Item, ItemProgress
from inference.server.answers import Answer, Failure, documented, errors, example, failure
from inference.server.config import ServerConfig
from inference.server.examples import GROUP_ID, ITEM_ID, OF_A_LEASE, PHOTO_ID, PHOTO_PATH, VIDEO_PATH
from inference.server.objects import ObjectStore
from inference.server.rows.store import Store
from inference.server.storage_api import VIDEOS, Presigner
from inference.server.wire import (
    UNKNOWN_ERROR,
    CostUsd,
    ErrorText,
    ForeignBody,
    ForeignName,
    Fraction,
    LeaseSeq,
    Name,
    Seconds,
    StoragePath,
    iso,
)
from inference.server.workers import Workers

# Messages of the real server, which never give the reason (measured against its routes and its storage).
NO_DOWNLOAD = "Failed to generate download URL"  # the object does not exist
NO_UPLOAD = "Failed to generate upload URL"  # the path is taken: the storage presigns no upload to it
NO_VIDEO = "Failed to generate video URL"  # a completed report names a video that is not in storage


class NextTask(ForeignBody):
    """Asks for work."""

    model_config = example({"worker_id": OF_A_LEASE["worker_id"], "lease_duration_seconds": 600})

    worker_id: Annotated[ForeignName, Field(description="Unique to this lease")]
    lease_duration_seconds: Seconds = 600
    worker_type: WorkerType | None = None
    item_id: Annotated[Name | None, Field(description="This task and no other; an extension of ours")] = None


class LeasedTask(BaseModel):
    """What to make, of what, and until when it is yours."""

    model_config = example(
        {
            "item_id": ITEM_ID,
            "group_id": GROUP_ID,
            "photo_id": PHOTO_ID,
            "prompt": "slow dolly-in",
            "photo_storage_path": PHOTO_PATH,
            "leased_until": "2026-01-31T12:10:00.000Z",
            "frame_num": 121,
            "inference_provider": None,
            "lease_seq": 1,
            "beat_interval_s": 1.0,
            "takes": ["progress", "cost_usd"],
        }
    )

    item_id: str
    group_id: str
    photo_id: str
    prompt: str
    photo_storage_path: str
    leased_until: str
    frame_num: int | None
    inference_provider: str | None
    lease_seq: int  # counts the leases of this item; may be sent along with later calls as a second fence
    beat_interval_s: float  # how often this queue would like to hear how far the work is
    takes: list[str]  # what this queue would like to hear that the contract does not have


TAKES = ("progress", "cost_usd")
"""What this server takes beyond the contract: the progress of heartbeats, which it tells to all who listen, so that
workers need not; and in the report of a completed task, what the video cost."""


class AskBacklog(BaseModel):
    """Asks how much work there is."""

    model_config = example({"worker_type": "wan"})

    worker_type: WorkerType | None = None


class Backlog(BaseModel):
    """How many tasks could be leased now."""

    waiting: int


class ReportedProgress(BaseModel):
    """How far the holder is."""

    stage: Name
    fraction: Fraction


class Heartbeat(ForeignBody):
    """Renews a lease; of one second, hands the task back."""

    model_config = example(
        {**OF_A_LEASE, "extend_seconds": 300, "progress": {"stage": "render", "fraction": 0.35}, "lease_seq": 1}
    )

    item_id: Name
    worker_id: ForeignName
    extend_seconds: Seconds = 300
    progress: ReportedProgress | None = None
    lease_seq: LeaseSeq | None = None


class Renewed(BaseModel):
    """Until when it is yours now, and whether anybody still wants it."""

    leased_until: str
    cancel_requested: bool


class PresignDownload(ForeignBody):
    """Asks for a URL to read a photo."""

    model_config = example({"operation": "download", "storage_path": PHOTO_PATH})

    operation: Literal["download"]
    storage_path: StoragePath


def _without_dot(extension: Any) -> Any:
    return extension.removeprefix(".") if isinstance(extension, str) else extension


EXTENSION = r"([A-Za-z0-9-]{1,20}\.){0,2}([mM][pP]4|[wW][eE][bB][mM])"
Extension = Annotated[str, StringConstraints(pattern=f"^{EXTENSION}$"), BeforeValidator(_without_dot)]


class PresignUpload(ForeignBody):
    """Asks for a URL to store a video."""

    model_config = example({"operation": "upload", "video_item_id": ITEM_ID, "file_extension": "mp4"})

    operation: Literal["upload"]
    video_item_id: Name
    file_extension: Annotated[Extension, Field(description="mp4 or webm, or something unique before it")] = "mp4"


class Presigned(BaseModel):
    """A URL, how many seconds it holds, and for uploads the path to report."""

    url: str
    expires_in: int
    storage_path: str | None = None


class ReportCompleted(ForeignBody):
    """The video is in storage."""

    model_config = example({**OF_A_LEASE, "status": "completed", "video_storage_path": VIDEO_PATH})

    status: Literal["completed"]
    item_id: Name
    worker_id: ForeignName
    video_storage_path: StoragePath
    runway_task_id: ForeignName | None = None
    veo_operation_id: ForeignName | None = None
    cost_usd: Annotated[CostUsd | None, Field(description="What it cost; an extension of ours")] = None
    lease_seq: LeaseSeq | None = None


class ReportFailed(ForeignBody):
    """No video will come of this lease."""

    model_config = example({**OF_A_LEASE, "status": "failed", "error_message": "the photo is broken"})

    status: Literal["failed"]
    item_id: Name
    worker_id: ForeignName
    error_message: ErrorText = UNKNOWN_ERROR
    lease_seq: LeaseSeq | None = None


class Reported(BaseModel):
    """How the task ended."""

    item_id: str
    status: str


class JsonRoute(APIRoute):
    """Reads a body as JSON whatever its media type says, as the real server does: some workers say text/plain."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """See APIRoute."""
        handle = super().get_route_handler()

        async def handle_json(request: Request) -> Response:
            headers = [header for header in request.scope["headers"] if header[0] != b"content-type"]
            return await handle(Request({**request.scope, "headers": headers}, request.receive))

        return handle_json


def worker_routes(config: ServerConfig, store: Store, objects: ObjectStore, workers: Workers) -> APIRouter:
    """What a worker says of tasks and leases."""
    routes = APIRouter(prefix="/api/worker", tags=["worker"], route_class=JsonRoute)

    @routes.post("/next-task", summary="Lease the next task", responses=errors(400, 401, 404))
    def next_task(asked: NextTask) -> Answer[LeasedTask | None]:
        """Leases the oldest task that waits. `data` is null when there is none.

        With `item_id`, an extension of ours, leases that task if it waits: null when it does not, 404 when there is
        no such task.
        """
        workers.asked(asked.worker_id, asked.worker_type)
        item = store.lease(asked.worker_id, asked.lease_duration_seconds, asked.worker_type, asked.item_id)
        if item is None:
            return Answer(data=None)
        workers.heard(asked.worker_id, item.id)
        return Answer(data=_leased(item, config.beat_interval_s))

    @routes.post("/backlog", summary="Count the tasks that wait", responses=errors(400, 401))
    def backlog(asked: AskBacklog) -> Answer[Backlog]:
        """How many tasks could be leased now, of one kind or of all. An extension of ours to the contract."""
        return Answer(data=Backlog(waiting=store.backlog(asked.worker_type)))

    @routes.post(
        "/heartbeat",
        summary="Renew a lease, or hand the task back",
        responses=errors(400, 401, 404),
        response_model=Answer[Renewed],
    )
    def heartbeat(beat: Heartbeat) -> object:
        """Sets the lease to now + `extend_seconds`; one second hands the task back, uncounted.

        404 when it is not yours any more. `progress` is an extension of ours, and so is the answer's
        `cancel_requested`: nobody wants the video any more.
        """
        said = ItemProgress(stage=beat.progress.stage, fraction=beat.progress.fraction) if beat.progress else None
        try:
            item = store.heartbeat(beat.item_id, beat.worker_id, beat.extend_seconds, said, beat.lease_seq)
        except NotHolder as error:
            return failure(404, str(error))
        (workers.heard if item.status == "processing" else workers.ended)(beat.worker_id, item.id)
        # A task that was handed back has no lease: it ended when the answer was written.
        until = item.updated_at if item.leased_until is None else item.leased_until
        return Answer(data=Renewed(leased_until=iso(until), cancel_requested=item.cancel_requested))

    @routes.post(
        "/report",
        summary="Report how a task ended",
        responses=errors(400, 401, 404) | {403: documented(Failure, "Not yours")},
        response_model=Answer[Reported],
    )
    def report(said: Annotated[ReportCompleted | ReportFailed, Body(discriminator="status")]) -> object:
        """How a task ended. 403 when it is not yours any more, 404 when it is gone.

        500 for a video that is not in storage, at a path that presign gave for this task.
        """
        if isinstance(said, ReportFailed):
            item = store.fail(said.item_id, said.worker_id, said.error_message, said.lease_seq)
        elif _is_video_of(said.item_id, said.video_storage_path) and objects.exists(said.video_storage_path):
            item = store.complete(
                said.item_id,
                said.worker_id,
                said.video_storage_path,
                _external_ids(said),
                said.lease_seq,
                cost_usd=said.cost_usd,
            )
        else:
            store.require_holder(said.item_id, said.worker_id, said.lease_seq)
            return failure(500, NO_VIDEO)
        workers.ended(said.worker_id, item.id)
        return Answer(data=Reported(item_id=item.id, status=item.status))

    return routes


def presign_routes(config: ServerConfig, store: Store, objects: ObjectStore, presigner: Presigner) -> APIRouter:
    """The one that lets a worker at storage without a key of its own."""
    routes = APIRouter(prefix="/api/worker", tags=["worker"], route_class=JsonRoute)

    @routes.post(
        "/presign",
        summary="Get a URL for a photo or a video",
        responses=errors(400, 401, 404),
        response_model=Answer[Presigned],
        response_model_exclude_none=True,
    )
    def presign(
        asked: Annotated[PresignDownload | PresignUpload, Body(discriminator="operation")], request: Request
    ) -> object:
        """A URL for one object, and for nothing else.

        500 for a photo that is not there and for an upload to a path that is taken, as the real server answers: ask
        for another `file_extension`, such as `something-unique.mp4`.
        """
        if isinstance(asked, PresignDownload):
            if not objects.exists(asked.storage_path):
                return failure(500, NO_DOWNLOAD)
            url, reported = presigner.url(request, "download", asked.storage_path), None
        else:
            reported = f"{VIDEOS}{store.get(asked.video_item_id).id}.{asked.file_extension}"
            if objects.exists(reported):
                return failure(500, NO_UPLOAD)
            store.removal.expect(reported, asked.video_item_id)
            url = presigner.url(request, "upload", reported)
        return Answer(data=Presigned(url=url, expires_in=config.url_lifetime_s, storage_path=reported))

    return routes


def _is_video_of(item_id: str, path: str) -> bool:
    """Whether `path` is one that presign may have given for this task: nobody reports what belongs to another."""
    return re.fullmatch(f"{VIDEOS}{re.escape(item_id)}\\.{EXTENSION}", path) is not None


def _external_ids(said: ReportCompleted) -> dict[str, str]:
    given = {"runway_task_id": said.runway_task_id, "veo_operation_id": said.veo_operation_id}
    return {name: value for name, value in given.items() if value is not None}


def _leased(item: Item, beat_interval_s: float) -> LeasedTask:
    return LeasedTask(
        item_id=item.id,
        group_id=item.group_id,
        photo_id=item.photo_id,
        prompt=item.prompt,
        photo_storage_path=item.photo_storage_path,
        leased_until=iso(item.leased_until or item.updated_at),
        frame_num=item.frame_num,
        inference_provider=item.inference_provider,
        lease_seq=item.lease_seq,
        beat_interval_s=beat_interval_s,
        takes=list(TAKES),
    )
