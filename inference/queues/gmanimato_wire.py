"""Messages of GmAnimato's worker and webhook routes, validated in this one place."""

import json
import math
import re
from collections.abc import Mapping
from typing import Annotated, Any, NamedTuple, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from inference.errors import InvalidTask, QueueAuthError, QueueError, QueueFailed, QueueRefused, QueueUnavailable
from inference.progress.stages import Progress
from inference.task import LAST_PHOTO, PHOTO, Input, InputName, Lease, Task, duration_s, explain

LOCAL = "local-"
"""Before the id of a video, in the id of its job: that job is for workers of this queue."""

VIDEO_ID, CALLBACK_URL = "video_id", "callback_url"
"""Extras of a task: what the application calls the video, and where it wants to hear of it."""

GATEWAYS = (502, 503, 504)
"""Statuses of a gateway whose server does not answer. The server may carry out the request all the same, and later."""

BODY_LIMIT_BYTES = 512 * 1024
"""The longest body of a request that SvelteKit's adapter for Node takes unless BODY_SIZE_LIMIT says otherwise."""

BODY_LIMIT_SETTING = "I2V_WEBHOOK_BYTES"
"""What tells this worker that the application takes more."""

ROOM = (
    "set BUCKET_ENDPOINT_URL, BUCKET_NAME, BUCKET_ACCESS_KEY_ID and BUCKET_SECRET_ACCESS_KEY here, so that videos go "
    f"to a bucket, or raise BODY_SIZE_LIMIT in the application and {BODY_LIMIT_SETTING} here"
)
"""What to do where videos do not fit into a request."""

UNCONFIGURED = "Worker secret not configured"
NO_TASK = "No tasks available"

DETAILS = ("completed_nodes", "total_nodes", "current_node", "current_node_progress")
"""What the application shows of a graph at work."""


def _job_id(text: str) -> str:
    """Refuses ids that would not be one part of a URL's path."""
    if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._:-]*", text.removeprefix(LOCAL)):
        raise ValueError("must be made of letters, digits and ._:- and not begin with a dot")
    return text


def _source(text: str) -> str:
    if not re.match(r"(data:|https?://)", text, re.IGNORECASE):
        raise ValueError("must be an http(s) URL or a data URI")
    return text


JobId = Annotated[str, Field(min_length=1, max_length=200), AfterValidator(_job_id)]
Source = Annotated[str, AfterValidator(_source)]
Workflow = Annotated[dict[str, Any], Field(min_length=1)]

job_id: TypeAdapter[str] = TypeAdapter(JobId)


class _Wire(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")


class _File(BaseModel):
    """One image or video; the application calls its source `image` in both cases."""

    model_config = ConfigDict(strict=True, extra="ignore")

    name: InputName
    image: Source


class _Content(_Wire):
    """`input` of a job."""

    workflow: Workflow
    images: list[_File] | None = None
    videos: list[_File] | None = None
    node_weights: object = None
    callback_url: object = None

    @model_validator(mode="after")
    def _names_each_file_once(self) -> Self:
        names = [file.name for file in [*(self.images or []), *(self.videos or [])]]
        if len(names) != len(set(names)):
            raise ValueError("two of the images and videos have the same name")
        return self


class _NestedJob(_Wire):
    """What the application answers."""

    id: JobId
    input: _Content

    def task(self) -> Task:
        """The same as a task."""
        files = [("image", file) for file in self.input.images or []]
        files += [("video", file) for file in self.input.videos or []]
        return Task(
            item_id=self.id,
            inputs={file.name: Input.model_validate({"kind": kind, "source": file.image}) for kind, file in files},
            workflow=self.input.workflow,
            node_weights=_weights(self.input.node_weights),
            duration_s=duration_s(None),
            names_duration=False,
            extras=(self.input.model_extra or {})
            | (self.model_extra or {})
            | _extras(self.id.removeprefix(LOCAL), self.input.callback_url),
        )


class _FlatJob(_Wire):
    """What its documentation describes, and older versions answer: `id` is the video's, `job_id` the job's."""

    id: JobId
    job_id: JobId | None = None
    original_image_url: Source
    last_image_url: Source | None = None
    prompt: str | None = None
    workflow: Workflow | None = None
    node_weights: object = None
    callback_url: object = None

    def task(self) -> Task:
        """The same as a task."""
        # The application's own worker uploads the photo under this name, and graphs written for it load that.
        own_name = f"{self.id}.png"
        name = own_name if _mentions(self.workflow, own_name) else PHOTO
        inputs = {name: Input(source=self.original_image_url)}
        if self.last_image_url is not None:
            inputs[LAST_PHOTO] = Input(source=self.last_image_url)
        return Task(
            item_id=self.job_id or self.id,
            prompt=self.prompt or "",
            inputs=inputs,
            workflow=self.workflow,
            node_weights=_weights(self.node_weights),
            duration_s=duration_s(None),
            names_duration=False,
            extras=(self.model_extra or {}) | _extras(self.id.removeprefix(LOCAL), self.callback_url),
        )


def parse_job(payload: object) -> Task:
    """Turns a job, in either form, into a Task. Fields that are not known go to `extras` unchanged.

    Raises InvalidTask naming every wrong field, with the item_id where the payload has a usable one.
    """
    form = _NestedJob if isinstance(payload, Mapping) and "input" in payload else _FlatJob
    try:
        return form.model_validate(payload).task()
    except ValidationError as error:
        usable = Job.in_ruins(payload)
        raise InvalidTask(f"malformed job: {explain(error)}", item_id=usable and usable.id) from None


def _weights(weights: object) -> dict[str, float]:
    """Those that make sense. They only shape a progress bar, so no job fails for others."""
    if not isinstance(weights, Mapping):
        return {}
    numbers = {
        name: float(weight)
        for name, weight in weights.items()
        if isinstance(name, str) and isinstance(weight, int | float) and not isinstance(weight, bool)
    }
    return {name: weight for name, weight in numbers.items() if math.isfinite(weight) and weight >= 0}


def _mentions(value: object, name: str) -> bool:
    """Whether a value of JSON is this text, or holds it somewhere. Without recursion: it may be nested deeply."""
    left = [value]
    while left:
        each = left.pop()
        if each == name:
            return True
        left.extend(each.values() if isinstance(each, dict) else each if isinstance(each, list) else ())
    return False


def _extras(video_id: str, callback_url: object) -> dict[str, Any]:
    said = {CALLBACK_URL: callback_url} if isinstance(callback_url, str) and callback_url else {}
    return {VIDEO_ID: video_id, **said}


class Job(NamedTuple):
    """What a call to the webhook has to know of a task."""

    id: str  # what the webhook wants to read in `id`
    video_id: str
    callback_url: str | None

    @classmethod
    def of(cls, lease: Lease) -> Self:
        """The job of a lease."""
        task = lease.task
        video_id = task.extras.get(VIDEO_ID)
        if not isinstance(video_id, str):
            video_id = task.item_id.removeprefix(LOCAL)
        return cls(task.item_id, video_id, task.extras.get(CALLBACK_URL))

    @classmethod
    def in_ruins(cls, payload: object) -> Self | None:
        """The job that a malformed payload stands for; None where it has no usable id."""
        if not isinstance(payload, Mapping):
            return None
        ids: list[str] = []
        for name in ("job_id", "id"):
            try:
                ids.append(job_id.validate_python(payload.get(name), strict=True))
            except ValidationError:
                continue
        content = payload.get("input")
        callback_url = (content if isinstance(content, Mapping) else payload).get(CALLBACK_URL)
        if not ids:
            return None
        return cls(ids[0], ids[-1].removeprefix(LOCAL), callback_url if isinstance(callback_url, str) else None)


class Reply(NamedTuple):
    """One answer of the application, or of something in front of it."""

    status: int
    payload: (
        dict[str, Any] | None
    )  # None where the body is no JSON object, so that no route of the application answered
    said: str  # the reason for people: one line

    @property
    def is_success(self) -> bool:
        """Whether a route accepted the call."""
        return 200 <= self.status < 300 and self.payload is not None

    @property
    def is_verdict(self) -> bool:
        """Whether the webhook took or judged the call, wherever it was sent.

        A 403 or 404 is none: it may be of another application, or of another deployment of this one.
        """
        is_of_the_webhook = self.payload is not None and bool({"success", "error"} & self.payload.keys())
        return is_of_the_webhook and (self.is_success or self.status in (400, 413, 500))

    @property
    def is_disowned(self) -> bool:
        """Whether the webhook says that the job is not there, or not called this."""
        return self.status in (403, 404) and self.payload is not None and "error" in self.payload

    @property
    def may_still_be_carried_out(self) -> bool:
        """Whether a server behind a gateway may be at it."""
        return self.status in GATEWAYS

    def no_task(self, where: str) -> QueueError:
        """The error that an answer of the worker route stands for, unless it is a job or says that there is none."""
        told = f"{where}: {self.status} {self.said}".rstrip()
        if self.status == 401:
            return QueueAuthError(f"{told}: WORKER_TASK_SECRET here has to be the application's")
        if self.status == 403:
            return QueueAuthError(f"{told}: something in front of the application refuses this worker")
        if self.status == 500 and UNCONFIGURED in self.said:
            return QueueAuthError(f"{told}: set WORKER_TASK_SECRET in the application, too, and start it again")
        if self.status in (429, *GATEWAYS):
            return QueueUnavailable(told)
        if self.status >= 500:
            return QueueFailed(told)
        return QueueRefused(f"{told}: is GMANIMATO_API_URL the address of GmAnimato?")

    def refusal(self) -> QueueError:
        """The error that an answer of the webhook stands for, unless it is a success."""
        told = f"webhook: {self.status} {self.said}".rstrip()
        if self.status == 413 or (self.status == 500 and "exceeds limit" in self.said):
            return QueueRefused(f"{told}: {ROOM}")
        if self.status == 401:
            return QueueAuthError(f"{told}: something in front of the application asks for a login; let this call pass")
        if self.status == 500 and self.payload is not None:
            return QueueFailed(told)
        if self.status in (429, *GATEWAYS) or self.status >= 500 or (self.status == 404 and self.payload is None):
            return QueueUnavailable(told)
        return QueueRefused(told)


def progress_call(job: Job, progress: Progress | None) -> dict[str, Any]:
    """The body of a call that says how far a job is."""
    call: dict[str, Any] = {"id": job.id, "status": "processing"}
    if progress is not None:
        # The application stores whatever number it is given.
        percentage = round(100 * min(max(progress.fraction, 0.0), 1.0), 1)
        details = {name: progress.detail[name] for name in DETAILS if name in progress.detail}
        call["progress"] = {"percentage": percentage, **details}
    return call


def failed_call(job: Job, message: str) -> dict[str, Any]:
    """The body of a call that ends a job without a video."""
    return {"id": job.id, "status": "failed", "error": message}


def completed_call(job: Job, kind: str, files: Mapping[str, str]) -> dict[str, Any]:
    """The body of a call that ends a job with files by name: the video first, `kind` is s3_url or base64."""
    entries = [{"filename": name, "type": kind, "data": data} for name, data in files.items()]
    return {"id": job.id, "status": "completed", "files": entries}


def encoded(call: Mapping[str, Any]) -> bytes:
    """A body as it is sent."""
    return json.dumps(call, separators=(",", ":"), allow_nan=False).encode()


def base64_bytes(size_bytes: int) -> int:
    """How long a file of this size is as base64."""
    return 4 * math.ceil(size_bytes / 3)
