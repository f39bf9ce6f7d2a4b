"""The values that travel: what a queue hands out, what an engine is asked for, what the result is.

All are frozen, JSON-safe (`model_dump_json`, `model_validate_json`) and do no I/O, so that a Lease can be sent from the
scheduled dispatcher to a container. Durations are seconds; an engine turns them into its own frames.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from inference.errors import InvalidRequest, InvalidTask, is_legible

QUEUE_FPS = 24
"""Frames per second in which queues count `frame_num`, whatever the engine's own rate (Life-is-Short API)."""

DEFAULT_FRAME_NUM = 121
"""What a task without `frame_num` stands for: five seconds (Life-is-Short API)."""

MIN_DURATION_S = 0.5
"""The shortest clip that is accepted."""

MAX_DURATION_S = 60.0
"""Longer than any engine can make. It bounds memory and cost before an engine applies its own limit."""

MAX_SEGMENTS = 60
"""The most segments of one film."""

MAX_FADE_S = 10.0
"""The longest cross-fade between two segments of a film."""

MAX_PROMPT_CHARS = 4000
"""The longest prompt that our own interfaces accept: far above what any text encoder reads (UMT5 in Wan2.2: 512
tokens). Foreign queues may hand out longer prompts; an engine gets the beginning of those."""


class Value(BaseModel):
    """A frozen value that refuses unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


Identifier = Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[A-Za-z0-9._:-]+$")]
DurationS = Annotated[float, Field(gt=0, le=MAX_DURATION_S)]

identifier: TypeAdapter[str] = TypeAdapter(Identifier)


def _relative(path: str) -> str:
    """Refuses paths that could lead out of the storage's folder."""
    if not path or path.startswith("/") or ".." in path.split("/") or "\\" in path or not path.isprintable():
        raise ValueError("must be a relative path without `..`, backslashes or control characters")
    return path


StoragePath = Annotated[str, Field(max_length=1024), AfterValidator(_relative)]
"""Where a queue's storage keeps a photo or a video. The path comes from outside, so it is validated."""

storage_path: TypeAdapter[str] = TypeAdapter(StoragePath)


def _nameable(name: str) -> str:
    """Refuses names that no line of a log could show."""
    if not all(is_legible(character) for character in name):
        raise ValueError("must be printable")
    return name


PHOTO, LAST_PHOTO = "photo", "last_photo"
"""The names of the two inputs that engines which generate from a photo understand: where the video begins and ends."""

InputName = Annotated[str, Field(min_length=1, max_length=255), AfterValidator(_nameable)]
"""What a task calls one of its files: `photo`, `last_photo`, or the name by which its workflow refers to it."""

InputKind = Literal["image", "video"]

VideoFormat = Literal["mp4", "webm"]
"""What a video may be delivered as. `mp4` is H.264 in mp4, which every browser plays."""


class Input(Value):
    """One file that a task brings. What it holds is verified when it is fetched, not before."""

    kind: InputKind = "image"
    source: Annotated[str, Field(min_length=1, repr=False)]  # a path in the queue's storage, a URL, or a data URI


LEASE_SEQ, TAKES = "lease_seq", "takes"
"""Extra fields of tasks from the embedded queue, which other queues may have, too: which lease of the task this is, and
what the queue takes of its workers that not every one does."""


class Segment(Value):
    """One part of a film: a clip made of one photo."""

    photo: InputName  # one of the task's inputs; several segments may show the same
    prompt: str = ""  # empty: the task's
    duration_s: DurationS


class Task(Value):
    """What to turn into one video: a photo, several photos as the segments of a film, or a workflow with its files."""

    item_id: Identifier  # the video item: one row of the queue
    group_id: str | None = None  # the set of photos it was uploaded with; not every queue has groups
    photo_id: str | None = None
    prompt: str = ""  # may be empty: the engine has a default
    inputs: dict[InputName, Input]  # by name; a task without segments or a workflow has a `photo`
    segments: Annotated[tuple[Segment, ...], Field(max_length=MAX_SEGMENTS)] = ()  # in the order in which they are seen
    fade_s: Annotated[float, Field(ge=0, le=MAX_FADE_S)] = 0.0  # between two segments; 0 is a hard cut
    workflow: dict[str, Any] | None = None  # a ComfyUI graph in API format, which then decides everything else
    node_weights: dict[str, float] = {}  # how long the workflow's nodes take, relative to each other, where known
    duration_s: DurationS  # without meaning for a task with segments, which have their own
    names_duration: bool = True  # False: the queue named none, and `duration_s` is its default
    provider: str | None = None  # the queue's hint: wan_local, gen4_turbo, veo3.1, … (`providers.py`)
    extras: dict[str, Any] = {}  # fields that this version does not know, kept unchanged

    @model_validator(mode="after")
    def _has_something_to_begin_with(self) -> Self:
        if self.segments and self.workflow is not None:
            raise ValueError("a task has segments or a workflow, not both")
        for number, segment in enumerate(self.segments, 1):
            if segment.photo not in self.inputs:
                raise ValueError(f"segment {number} shows a photo that is not among the task's inputs")
        if not self.segments and self.workflow is None and PHOTO not in self.inputs:
            raise ValueError("a task without segments or a workflow needs an input named photo")
        return self

    @property
    def lease_seq(self) -> int | None:
        """How often the task was handed out so far, where its queue counts that."""
        counted = self.extras.get(LEASE_SEQ)
        return counted if isinstance(counted, int) and not isinstance(counted, bool) else None

    def takes(self, what: str) -> bool:
        """Whether the queue says that it takes `what` of its workers, as the embedded one says of `progress`."""
        listed = self.extras.get(TAKES)
        return isinstance(listed, list) and what in listed


class _QueuedTask(BaseModel):
    """A task as queues write it; JSON types are never converted.

    Fields that no video depends on may be missing: the real Life-is-Short server has rows without a group, and prompts
    of any length.
    """

    model_config = ConfigDict(strict=True, extra="allow")

    item_id: Identifier
    group_id: str | None = None
    photo_id: str | None = None
    prompt: str | None = None
    photo_storage_path: StoragePath
    frame_num: Annotated[int, Field(ge=2, le=int(MAX_DURATION_S * QUEUE_FPS) + 1)] | None = None  # 24 x seconds + 1
    inference_provider: str | None = None
    leased_until: object = None  # a time on the server's clock, which is never compared with ours


def parse_task(payload: object) -> Task:
    """Turns a task as queues write it into a Task. Unknown fields go to `extras` unchanged.

    Raises InvalidTask naming every wrong field, with the item_id where the payload has a usable one.
    """
    try:
        wire = _QueuedTask.model_validate(payload)
    except ValidationError as error:
        item_id = payload.get("item_id") if isinstance(payload, Mapping) else None
        try:
            usable = identifier.validate_python(item_id, strict=True)
        except ValidationError:
            usable = None
        raise InvalidTask(f"malformed task: {explain(error)}", item_id=usable) from None
    return Task(
        item_id=wire.item_id,
        group_id=wire.group_id,
        photo_id=wire.photo_id,
        prompt=wire.prompt or "",
        inputs={PHOTO: Input(source=wire.photo_storage_path)},
        duration_s=duration_s(wire.frame_num),
        names_duration=wire.frame_num is not None,
        provider=wire.inference_provider,
        extras=wire.model_extra or {},
    )


def duration_s(frame_num: int | None) -> float:
    """The duration that `frame_num` stands for in a queue."""
    return ((DEFAULT_FRAME_NUM if frame_num is None else frame_num) - 1) / QUEUE_FPS


class Lease(Value):
    """A task and the right to work on it for a limited time.

    `worker_id` is unique to the lease and serves as the fencing token: every write carries it. The deadline is not part
    of the value: the process that runs the lease keeps it on its own monotonic clock, counted from the moment before
    the last renewal was sent.
    """

    task: Task
    worker_id: Identifier
    length_s: Annotated[float, Field(ge=2, le=86_400)]  # how long each renewal lasts
    tries_left: Annotated[int, Field(ge=0)] | None = None  # handed out again after what may pass; None: not counted
    beat_interval_s: Annotated[float, Field(gt=0)] | None = None  # how often the queue wants to hear; None: any

    @property
    def token(self) -> str:
        """The part of worker_id that is unique to this lease: short, safe in a file name."""
        return self.worker_id.rsplit(".", 1)[-1]


class GenerationRequest(Value):
    """What an engine is asked for. None means the engine's own default."""

    prompt: Annotated[str, Field(max_length=MAX_PROMPT_CHARS)] = ""
    negative_prompt: Annotated[str, Field(max_length=MAX_PROMPT_CHARS)] | None = None
    duration_s: DurationS
    names_duration: bool = True  # False: this length is only a default, and an engine may use its own
    max_area_px: Annotated[int, Field(ge=64 * 64, le=3840 * 2160)] | None = None  # width x height of the video
    steps: Annotated[int, Field(ge=1, le=200)] | None = None
    guidance: Annotated[float, Field(ge=0, le=50)] | None = None
    seed: Annotated[int, Field(ge=0, le=2**63 - 1)] | None = None
    provider: str | None = None  # the queue's hint at a provider's model; our own engines ignore it
    workflow: dict[str, Any] | None = None  # a ComfyUI graph in API format, for an engine that runs those
    node_weights: dict[str, float] = {}  # as Task.node_weights
    video_formats: tuple[VideoFormat, ...] = ("mp4",)  # what the receiver takes; anything else becomes the first

    @classmethod
    def from_task(cls, task: Task, video_formats: tuple[VideoFormat, ...] = ("mp4",)) -> Self:
        """The request that a task stands for; what the task does not name is left to the engine."""
        return cls(
            prompt=task.prompt[:MAX_PROMPT_CHARS],
            duration_s=task.duration_s,
            names_duration=task.names_duration,
            provider=task.provider,
            workflow=task.workflow,
            node_weights=task.node_weights,
            video_formats=video_formats,
        )

    def for_segment(self, segment: Segment) -> Self:
        """The same wishes for one segment of a film, which is joined from mp4s."""
        update = {
            "prompt": segment.prompt[:MAX_PROMPT_CHARS] or self.prompt,
            "duration_s": segment.duration_s,
            "names_duration": True,
            "video_formats": ("mp4",),
        }
        return self.model_copy(update=update)


class Video(Value):
    """A finished video in a local folder: an mp4, or what else the request's `video_formats` name."""

    path: Path
    width: int  # pixels
    height: int  # pixels
    fps: float
    frames: int
    size_bytes: int
    seed: int | None = None
    cost_usd: float | None = None  # what its provider charges, or else its seconds at an engine whose price is known
    as_it_came: str | None = None  # why a paid clip was left uncut or not re-encoded; None where all was done
    external_ids: dict[str, str] = {}  # ids at a paid provider, under the names that the queue's report uses
    others: dict[str, Path] = {}  # further files that a workflow made, by file name

    @property
    def duration_s(self) -> float:
        """Seconds from the first frame to the end of the last."""
        return self.frames / self.fps


class Outcome(Value):
    """How one lease ended, as its worker saw it.

    completed   the queue accepted the video
    failed      the queue accepted an error message
    cancelled   a person cancelled the task; the lease was given up
    lease_lost  another worker has the task, the lease could not be renewed in time, or its end could not be reported;
                the queue decides who gets the task next
    released    handed back for another worker: shutdown, preemption, a machine that cannot work
    """

    status: Literal["completed", "failed", "cancelled", "lease_lost", "released"]
    item_id: str
    error: str | None = None  # one line, for people
    video: Video | None = None
    storage_path: str | None = None
    stage_seconds: dict[str, float] = {}  # wall-clock time by stage
    machine_at_fault: bool = False  # this machine may be at fault, so the next task here may fail as well
    worker_should: Literal["stop", "wait"] | None = None  # `stop`: wrong settings; `wait`: an outage elsewhere


def explain(error: ValidationError, hints: Mapping[str, str] = {}) -> str:
    """Pydantic's error in one line: each wrong field, what is wrong with it, and its hint, if there is one."""
    problems = []
    for problem in error.errors(include_url=False, include_input=False):
        field = ".".join(str(part) for part in problem["loc"]) or "value"
        hint = f" ({hints[field]})" if field in hints else ""
        message = problem["msg"].removeprefix("Value error, ")
        problems.append(f"{field}: {message[0].lower()}{message[1:]}{hint}")
    return "; ".join(problems)


@contextmanager
def asked_as(names: Mapping[str, str]) -> Iterator[None]:
    """Errors of the block name fields as the caller knows them, such as `--seconds` for `duration_s`.

    Raises InvalidRequest, also for values that pydantic refuses.
    """
    try:
        yield
    except (ValidationError, InvalidRequest) as error:
        told = explain(error) if isinstance(error, ValidationError) else str(error)
    else:
        return
    for field, name in names.items():
        told = re.sub(rf"(?:^|(?<=; )){re.escape(field)}\b", name.replace("\\", r"\\"), told)
    raise InvalidRequest(told) from None
