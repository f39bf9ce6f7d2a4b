"""The messages of the RunPod endpoint: what a job's input may hold, and what its answer holds."""

import base64
import binascii
import difflib
from collections.abc import Mapping
from typing import Annotated, Any

import httpx
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, SecretStr, ValidationError

from inference.errors import InvalidRequest, InvalidTask, one_line
from inference.task import (
    MAX_DURATION_S,
    MAX_PROMPT_CHARS,
    PHOTO,
    QUEUE_FPS,
    DurationS,
    GenerationRequest,
    Identifier,
    Lease,
    Outcome,
    Task,
    Video,
    asked_as,
    explain,
    parse_task,
    storage_path,
)
from inference.transfer.network import flaw_in

PAYLOAD_BYTES = 10_000_000
"""The largest body of a `/run` request, and the largest answer that certainly arrives (docs.runpod.io: 10 MB, by
`/runsync` 20 MB; a worker cannot tell which of them its job came by)."""

INLINE_BYTES = (PAYLOAD_BYTES - 100_000) // 4 * 3
"""The largest mp4 that fits into an answer as base64, beside the other fields."""

INLINE_BITS_PER_S = 5_000_000
"""Below this rate, compression of 720p becomes visible (support.google.com/youtube/answer/1722171: 5 Mbit/s)."""

INLINE_S = INLINE_BYTES * 8 / INLINE_BITS_PER_S
"""The longest video that fits into an answer, whatever the photo shows: 11.9 s."""

MAX_DRAIN = 1000
MAX_ERROR_CHARS = 1000

KINDS = "task, drain, photo_url and photo_base64, the last two with a prompt, or a workflow"


def is_http(url: str) -> str:
    """The URL itself. Raises ValueError for what no client could fetch."""
    try:
        parsed = httpx.URL(url)
    except (httpx.InvalidURL, UnicodeError):
        parsed = httpx.URL()
    if flaw_in(parsed):
        raise ValueError("has to be a URL that starts with https:// or http://, with a port that there is")
    return url


HttpUrl = Annotated[str, Field(max_length=8192), AfterValidator(is_http)]


class Wire(BaseModel):
    """JSON types are not converted: a number in quotes is a mistake, and so is an unknown field."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False, hide_input_in_errors=True)


class S3Config(Wire):
    """`s3Config`, beside `input`, as RunPod documents it; `region` is our addition."""

    accessId: Annotated[str, Field(min_length=1)]  # noqa: N815 - RunPod's names
    accessSecret: Annotated[SecretStr, Field(min_length=1)]  # noqa: N815
    bucketName: Annotated[str, Field(min_length=1)]  # noqa: N815
    endpointUrl: HttpUrl  # noqa: N815
    region: str | None = None


class DirectInput(Wire):
    """One photo to one video, without a queue."""

    photo_url: HttpUrl | None = None
    photo_base64: str | None = None  # plain, or as a data: URL
    prompt: Annotated[str, Field(max_length=MAX_PROMPT_CHARS)]
    negative_prompt: Annotated[str, Field(max_length=MAX_PROMPT_CHARS)] | None = None
    seconds: DurationS = 5.0
    seed: Annotated[int, Field(ge=0, le=2**63 - 1)] | None = None
    preset: str | None = None  # if given, has to be the preset that this endpoint runs
    upload_url: HttpUrl | None = None  # a presigned PUT

    @property
    def request(self) -> GenerationRequest:
        """The request to the engine."""
        return GenerationRequest(
            prompt=self.prompt, negative_prompt=self.negative_prompt, duration_s=self.seconds, seed=self.seed
        )

    def photo_bytes(self, limit_bytes: int) -> bytes:
        """The photo inside the input. Raises InvalidRequest."""
        given = self.photo_base64 or ""
        text = given.partition(",")[2] if given.startswith("data:") else given
        if len(text) // 4 * 3 > limit_bytes:
            raise InvalidRequest(f"photo_base64: larger than {limit_bytes} bytes")
        try:
            return base64.b64decode("".join(text.split()), validate=True)
        except (binascii.Error, ValueError):
            raise InvalidRequest("photo_base64: not base64") from None


class DrainInput(Wire):
    """Asks the worker to lease tasks from the queue itself."""

    drain: Annotated[int, Field(ge=1, le=MAX_DRAIN)]


class _TaskInput(Wire):
    task: dict[str, Any]
    worker_id: Identifier | None = None
    length_s: float | None = None
    beat_interval_s: float | None = None
    tries_left: int | None = None


class TaskInput(BaseModel):
    """A task that was leased by the sender."""

    model_config = ConfigDict(frozen=True)

    lease: Lease


Input = TaskInput | DrainInput | DirectInput


SYNONYMS = {"image_url": "photo_url", "image_base64": "photo_base64", "duration": "seconds"}
"""Other workers' names for our fields. `image` and `frame_num` are accepted, too, and converted (`_translated`)."""

# Fields of other workers (wan and ComfyUI templates of RunPod's hub) that have another meaning here, or none.
OF_THE_PRESET = "the endpoint's preset decides"
OF_THE_PHOTO = "the video has the photo's shape, and the size that the endpoint's I2V_WAN_AREA allows"
MEANT = {
    "length": "a number of frames elsewhere: say how many seconds",
    "num_frames": "say how many seconds",
    "fps": OF_THE_PRESET,
    "steps": OF_THE_PRESET,
    "num_inference_steps": OF_THE_PRESET,
    "cfg": OF_THE_PRESET,
    "guidance_scale": OF_THE_PRESET,
    "width": OF_THE_PHOTO,
    "height": OF_THE_PHOTO,
    "size": OF_THE_PHOTO,
    "resolution": OF_THE_PHOTO,
    "image_path": "give a photo_url or photo_base64",
    "model": "preset",
}


def parse(payload: object, *, worker_id: str, lease_s: float) -> Input:
    """What a job's `input` asks for. Raises InvalidRequest naming every wrong field.

    A task comes as a queue hands it out or, with `length_s`, as one of our Lease values. `worker_id` and `lease_s` (how
    long a renewal lasts) apply where the job does not name them.
    """
    if not isinstance(payload, Mapping):
        raise InvalidRequest(f"input: has to be an object with one of {KINDS}")
    given, theirs = _in_our_words(payload)
    asked = [name for name in ("task", "drain", "photo_url", "photo_base64") if name in given]
    if len(asked) != 1:
        why = f"{' and '.join(theirs[name] for name in asked)} exclude each other" if asked else "nothing to do"
        raise InvalidRequest(f"input: {why}; give one of {KINDS}")
    kinds: dict[str, type[_TaskInput | DrainInput | DirectInput]] = {"task": _TaskInput, "drain": DrainInput}
    kind = kinds.get(asked[0], DirectInput)
    with asked_as(theirs):
        try:
            found = kind.model_validate(given)
        except ValidationError as error:
            hints = {name: _hint(name, kind) for name in given.keys() - kind.model_fields.keys()}
            raise InvalidRequest(explain(error, hints)) from None
    return TaskInput(lease=_lease(found, worker_id, lease_s)) if isinstance(found, _TaskInput) else found


def _in_our_words(payload: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """An input with our field names, and the sender's names for them. Raises InvalidRequest if two contradict."""
    ours: dict[str, Any] = {}
    theirs: dict[str, str] = {}
    for name, value in payload.items():
        if value is None:
            continue
        own, same = _translated(name, value)
        if own in ours and ours[own] != same:
            raise InvalidRequest(f"{theirs[own]} and {name} contradict each other; give {own} alone")
        ours[own], theirs[own] = same, name
    return ours, theirs


def _translated(name: str, value: Any) -> tuple[str, Any]:
    if name == "image":
        return ("photo_url" if str(value)[:8].lower().startswith(("http://", "https://")) else "photo_base64"), value
    if name == "frame_num":  # as queues count frames: 24 x seconds + 1
        most = int(MAX_DURATION_S * QUEUE_FPS) + 1
        if type(value) is not int or not 1 < value <= most:
            raise InvalidRequest(f"frame_num: has to be a whole number from 2 to {most}: 24 for each second, and one")
        return "seconds", (value - 1) / QUEUE_FPS
    return SYNONYMS.get(name, name), value


def _hint(name: str, kind: type[Wire]) -> str:
    """The field that may have been meant by an unknown one."""
    if kind is DirectInput and name in MEANT:
        return MEANT[name]
    close = difflib.get_close_matches(name, kind.model_fields, n=1)
    return f"did you mean {close[0]}?" if close else f"permitted are {', '.join(kind.model_fields)}"


def _lease(given: _TaskInput, worker_id: str, lease_s: float) -> Lease:
    try:
        if given.length_s is None:
            task = parse_task(given.task)
        else:
            task = Task.model_validate(_with_inputs(given.task))
            for given_input in task.inputs.values():
                storage_path.validate_python(given_input.source)
        return Lease(
            task=task,
            worker_id=given.worker_id or worker_id,
            length_s=given.length_s or lease_s,
            beat_interval_s=given.beat_interval_s,
            tries_left=given.tries_left,
        )
    except ValidationError as error:
        raise InvalidRequest(f"task: {explain(error)}") from None
    except InvalidTask as error:
        raise InvalidRequest(f"task: {error}") from None


def _with_inputs(task: dict[str, Any]) -> dict[str, Any]:
    """A task of a Lease value; senders of an earlier version name the photo's path in a field of its own."""
    if "inputs" in task:
        return task
    if "photo_storage_path" not in task:
        raise InvalidRequest("task: photo_storage_path: field required, or inputs")
    others = {name: value for name, value in task.items() if name != "photo_storage_path"}
    return others | {"inputs": {PHOTO: {"source": task["photo_storage_path"]}}}


def parse_s3(payload: object) -> S3Config | None:
    """The `s3Config` of a job. Raises InvalidRequest naming every wrong field."""
    try:
        return None if payload is None else S3Config.model_validate(payload)
    except ValidationError as error:
        raise InvalidRequest(f"s3Config: {explain(error)}") from None


def answer(video: Video, timings: Mapping[str, float], **where: str) -> dict[str, Any]:
    """The answer for a finished video; `where`: its url, base64 or storage_path."""
    facts = video.model_dump(mode="json", include={"width", "height", "fps", "frames", "size_bytes"})
    return {
        "video": {**where, **facts, "seconds": round(video.duration_s, 3)},
        "seed": video.seed,
        "timings": dict(timings),
    }


def answer_of(outcome: Outcome) -> dict[str, Any]:
    """The answer for a task of the queue, which was told already; a retry is up to the queue."""
    whose: dict[str, Any] = {"item_id": outcome.item_id, "status": outcome.status}
    if outcome.video is not None:
        return answer(outcome.video, outcome.stage_seconds, storage_path=outcome.storage_path or "") | whose
    may_pass = outcome.status == "released" or (outcome.status == "failed" and outcome.machine_at_fault)
    whose["machine_at_fault"] = outcome.machine_at_fault
    if outcome.worker_should is not None:
        whose["worker_should"] = outcome.worker_should  # `wait`: an outage elsewhere
    return failure(outcome.error or outcome.status, retryable=may_pass) | whose


def failure(message: str, *, retryable: bool) -> dict[str, Any]:
    """The answer without a video. RunPod takes `error` as the job's error, and the rest as its output."""
    return {"error": one_line(message, MAX_ERROR_CHARS), "retryable": retryable}
