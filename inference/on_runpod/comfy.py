"""A job that brings a ComfyUI workflow: read and answered as runpod-workers/worker-comfyui does it, and with video.

    {"workflow": {…}, "images": [{"name", "image"}], "videos": [{"name", "video"}], "node_weights": {"44": 60}}
    {"images": [{"filename", "type": "base64" | "s3_url", "data"}], "files": […], "errors": […], "video": {…}, …}

worker-comfyui (its handler.py) lists images alone and skips every video. Here `images` has whatever the workflow made,
the video first. `files` is the convention of GmAnimato and of the fork of that worker that it calls: what lies in a
bucket once more, by URLs without a signature, because the application keeps them for good, in 500 characters, and has
a key of its own. Of that fork are `videos`, URLs as sources and `node_weights`, too.

Fields that nothing here reads are ignored, as worker-comfyui does: a payload that works there works here.
"""

import base64
import json
import mimetypes
import re
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import anyio
import anyio.to_thread
import structlog
from pydantic import AliasChoices, ConfigDict, Field, ValidationError

from inference import logs
from inference.build.workers import build_policy
from inference.engines.base import Job
from inference.errors import EncodeFailed, I2VError, InvalidRequest, SettingsError, StorageError
from inference.inputs import fetch
from inference.leasing.retry import Policy, repeat
from inference.leasing.scratch import scratch_folder
from inference.media import foreign
from inference.media.clip import shrink
from inference.on_runpod.callback import Callback
from inference.on_runpod.direct import DirectContext, Target, bucket_in
from inference.on_runpod.progress_posts import ProgressPosts
from inference.on_runpod.wire import INLINE_BYTES, HttpUrl, S3Config, Wire, answer, is_http
from inference.progress.stages import Sink, StageTracker, both, plan
from inference.task import (
    DEFAULT_FRAME_NUM,
    GenerationRequest,
    Input,
    InputName,
    Video,
    duration_s,
    explain,
)
from inference.transfer.bucket import Bucket
from inference.transfer.storage import Storage

log = structlog.get_logger(__name__)

ELSEWHERE = ("task", "drain", "photo_url", "photo_base64", "upload_url")
"""Fields that ask for something else than a workflow, or for its files in one place that cannot hold several."""

MAX_NAME_CHARS = 100
"""Of a file's name as part of an object's key; an application may have room for 500 characters of URL."""

TOO_LARGE = "set BUCKET_ENDPOINT_URL, or give an s3Config"


class _Image(Wire):
    model_config = ConfigDict(extra="ignore")

    name: InputName
    image: Annotated[str, Field(min_length=1, repr=False)]  # base64, with or without `data:…,` before it, or a URL


class _Video(Wire):
    model_config = ConfigDict(extra="ignore")

    name: InputName
    # GmAnimato's templates call it `image`, too.
    video: Annotated[str, Field(min_length=1, repr=False, validation_alias=AliasChoices("video", "image"))]


class WorkflowInput(Wire):
    """A graph in API format, and the files that it names."""

    workflow: Annotated[dict[str, Any], Field(min_length=1)]
    images: list[_Image] = Field(default_factory=list)
    videos: list[_Video] = Field(default_factory=list)
    node_weights: dict[str, Annotated[float, Field(ge=0)]] = Field(default_factory=dict)
    callback_url: HttpUrl | None = None  # of an application that is told, too

    @property
    def inputs(self) -> dict[str, Input]:
        """The files by name. Raises InvalidRequest where a name stands for two of them."""
        found: dict[str, Input] = {}
        for where, name, given in self._files():
            source = Input(kind="video" if where.startswith("videos") else "image", source=_source(given, where))
            if found.setdefault(name, source) != source:
                raise InvalidRequest(f"{where}.name: {name} is another file already; give every file a name of its own")
        return found

    @property
    def request(self) -> GenerationRequest:
        """The request to the engine; the graph says how long the video is."""
        return GenerationRequest(
            duration_s=duration_s(DEFAULT_FRAME_NUM),
            names_duration=False,
            workflow=self.workflow,
            node_weights=self.node_weights,
            video_formats=("mp4", "webm"),
        )

    def _files(self) -> Iterator[tuple[str, str, str]]:
        """The field, the name and the content of each file."""
        for number, image in enumerate(self.images):
            yield f"images.{number}", image.name, image.image
        for number, video in enumerate(self.videos):
            yield f"videos.{number}", video.name, video.video


def _source(given: str, where: str) -> str:
    """A file as Input has it: a URL or a data URI. Raises InvalidRequest."""
    if given[:8].lower().startswith(("http://", "https://")):
        try:
            return is_http(given)
        except ValueError as error:
            raise InvalidRequest(f"{where}: {error}") from None
    # As worker-comfyui reads it: what comes before a comma says nothing that the bytes do not say better.
    text = "".join((given.partition(",")[2] if "," in given else given).split())
    return f"data:application/octet-stream;base64,{text}"


def workflow_in(payload: object, job_id: str) -> WorkflowInput | None:
    """A job's input, where it brings a workflow; None for other inputs, which `wire.parse` reads.

    As at worker-comfyui it may be JSON in a string. Raises InvalidRequest naming every wrong field.
    """
    if isinstance(payload, str):
        try:
            payload = json.loads(payload)
        except (ValueError, RecursionError):
            return None
    if not isinstance(payload, Mapping) or payload.get("workflow") is None:
        return None
    given = {name: value for name, value in payload.items() if value is not None and value != ""}
    if other := [name for name in ELSEWHERE if name in given]:
        raise InvalidRequest(f"input: workflow and {' and '.join(other)} exclude each other")
    if ignored := sorted(given.keys() - WorkflowInput.model_fields.keys()):
        log.info("fields_ignored", job_id=job_id, fields=ignored)
    try:
        return WorkflowInput.model_validate({name: given[name] for name in WorkflowInput.model_fields if name in given})
    except ValidationError as error:
        raise InvalidRequest(explain(error)) from None


async def run_workflow(
    asked: WorkflowInput, s3: S3Config | None, job_id: str, here: DirectContext, sink: Sink
) -> dict[str, Any]:
    """The answer to a job with a workflow, of which its `callback_url` is told as well.

    Raises StorageError, MachineFault, EngineError, MediaError.
    """
    if asked.callback_url is None:
        return await _run(asked, s3, job_id, here, sink)
    failed: Exception | None = None
    allow_private = here.settings.allow_private_addresses
    async with Callback(asked.callback_url, job_id, allow_private=allow_private) as callback:
        posts = ProgressPosts(callback.progress)
        async with anyio.create_task_group() as beside:
            beside.start_soon(posts.run)
            try:
                said = await _run(asked, s3, job_id, here, both(sink, posts.sink))
            except Exception as error:  # noqa: BLE001 - raised below, when progress has stopped
                failed = error
            posts.finish()
        if failed is not None:
            await callback.failed(str(failed) if isinstance(failed, I2VError) else "internal error of the worker")
            raise failed
        await callback.completed(said.get("files") or said["images"][:1])
    return said


async def _run(
    asked: WorkflowInput, s3: S3Config | None, job_id: str, here: DirectContext, sink: Sink
) -> dict[str, Any]:
    """What cannot end well is refused before the GPU is touched.

    Files go to the bucket of `s3`, else to the operator's, else as base64 into the answer, as far as they fit.
    """
    settings, policy = here.settings, build_policy(here.settings)
    if settings.engine != "comfyui":
        raise InvalidRequest(
            f"workflow: this endpoint runs {settings.engine}; a workflow needs one with I2V_ENGINE=comfyui"
        )
    inputs = asked.inputs
    bucket = bucket_in(s3) or here.bucket
    shelf = _Shelf(bucket, here.storage if s3 else here.own_storage, job_id, policy) if bucket else None
    if shelf is not None:
        await shelf.check()
    tracker = StageTracker(plan(here.turns.stages), both(logs.stages(job_id), sink))
    job = Job(tracker)
    with scratch_folder(settings.temp_dir, keep=policy.keep_temp) as folder:
        job.report("download")
        fetched = await repeat(
            lambda: fetch(inputs, folder, storage=here.storage, max_bytes=settings.max_photo_bytes), policy
        )
        job.report("wait")
        async with here.turns.taken():
            video = await repeat(lambda: here.turns.generate(asked.request, fetched, folder, job), policy)
        job.report("upload")
        if shelf is not None:
            stored = await shelf.take(video)
            facts = answer(video, tracker.stage_seconds(), filename=video.path.name, url=stored.images[0]["data"])
        else:
            video, stored = await anyio.to_thread.run_sync(_inline, video, folder)
            facts = answer(video, tracker.stage_seconds(), filename=video.path.name)
        for error in stored.errors:
            log.warning("file_left_out", job_id=job_id, error=error)
        return stored.as_answer() | facts


@dataclass
class _Stored:
    """The files of an answer."""

    images: list[dict[str, str]] = field(default_factory=list)
    files: list[dict[str, str]] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def as_answer(self) -> dict[str, Any]:
        """`images`, and the others where there are some."""
        parts = {"images": self.images, "files": self.files, "errors": self.errors}
        return {name: entries for name, entries in parts.items() if entries or name == "images"}


@dataclass(frozen=True)
class _Shelf:
    """The place of one job in a bucket."""

    bucket: Bucket
    storage: Storage
    job_id: str
    policy: Policy

    async def check(self) -> None:
        """Raises InvalidRequest where nothing can be signed for the bucket, and as Storage.check."""
        target = await anyio.to_thread.run_sync(self._target, self._key("video.mp4"), "video/mp4")
        await self.storage.check(target.put_url)

    async def take(self, video: Video) -> _Stored:
        """Stores the video and what else there is. Raises StorageError where the video could not be stored."""
        stored, taken = _Stored(), set[str]()
        for name, path in _files_of(video):
            key, number = self._key(name), len(taken)
            while key in taken:  # two names that are one in a key
                key, number = self._key(name, f"{number}-"), number + 1
            taken.add(key)
            content_type = mimetypes.guess_type(name)[0] or "application/octet-stream"
            target = await anyio.to_thread.run_sync(self._target, key, content_type)
            try:
                await target.take(path, self.policy, content_type=content_type)
            except StorageError as error:
                if path == video.path:
                    raise
                stored.errors.append(f"{name} was not stored: {error}")
                continue
            entry = {"filename": name, "type": "s3_url"}
            stored.images.append(entry | {"data": target.url})
            stored.files.append(entry | {"data": self.bucket.object_url(key)})
        return stored

    def _key(self, name: str, prefix: str = "") -> str:
        plain = re.sub(r"[^A-Za-z0-9._-]", "_", name)[-MAX_NAME_CHARS:].lstrip(".") or "file"
        return f"{re.sub(r'[^A-Za-z0-9_-]', '_', self.job_id)}/{prefix}{plain}"

    def _target(self, key: str, content_type: str) -> Target:
        """Signs. Half a second the first time, for all that it imports."""
        try:
            put_url = self.bucket.upload_url(key, content_type=content_type)
            return Target(self.storage, put_url, self.bucket.download_url(key))
        except SettingsError as error:
            raise InvalidRequest(f"s3Config: {error}") from None


def _inline(video: Video, folder: Path) -> tuple[Video, _Stored]:
    """The files as base64: the video whatever it takes, for it is made already, and others while there is room."""
    if video.size_bytes > INLINE_BYTES:
        video = _shrunk(video, folder)
    stored, room_bytes = _Stored(), INLINE_BYTES
    for name, path in _files_of(video):
        size_bytes = path.stat().st_size
        if size_bytes > room_bytes:
            stored.errors.append(f"{name} is {size_bytes / 1e6:.1f} MB, more than is left in an answer: {TOO_LARGE}")
            continue
        room_bytes -= size_bytes
        data = base64.b64encode(path.read_bytes()).decode("ascii")
        stored.images.append({"filename": name, "type": "base64", "data": data})
    return video, stored


def _shrunk(video: Video, folder: Path) -> Video:
    """The video as an mp4 that an answer holds, encoded again as little as that takes.

    Raises EncodeFailed where no encoding fits, MediaError, MachineFault.
    """
    mp4, smaller = (folder / stage / f"{video.path.stem}.mp4" for stage in ("mp4", "smaller"))
    for path in (mp4, smaller):
        path.parent.mkdir(exist_ok=True)
    foreign.as_mp4(video.path, mp4)
    if mp4.stat().st_size > INLINE_BYTES:
        try:
            shrink(mp4, smaller, INLINE_BYTES)
        except EncodeFailed as error:
            raise EncodeFailed(f"{error}: {TOO_LARGE}") from None
        mp4 = smaller
    return video.model_copy(update={"path": mp4, "size_bytes": mp4.stat().st_size})


def _files_of(video: Video) -> list[tuple[str, Path]]:
    return [(video.path.name, video.path), *video.others.items()]


def as_worker_comfyui(post: Callable[[dict[str, object]], Awaitable[None]]) -> Callable[..., Awaitable[None]]:
    """Posts each snapshot of a progress with the fields beside ours that worker-comfyui posts (`progress_update`)."""

    async def posting(snapshot: dict[str, Any]) -> None:
        theirs = {
            "type": "progress",
            "value": snapshot["done"],
            "max": snapshot["total"],
            "percent": round(100 * snapshot["fraction"], 1),
            "node": snapshot.get("detail", {}).get("current_node"),
        }
        await post(snapshot | theirs)

    return posting
