"""The values that travel: what a queue hands out, what an engine is asked for, what comes of it.

All are frozen, JSON-safe (`model_dump_json`, `model_validate_json`) and do no I/O: a Lease goes from the cron
to a container as it is. Durations are seconds; an engine turns them into its own frames.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from inference.errors import InvalidRequest, InvalidTask

QUEUE_FPS = 24
"""Frames per second in which queues count `frame_num`, whatever the engine's own rate (Life-is-Short API)."""

DEFAULT_FRAME_NUM = 121
"""What a queue means by no `frame_num`: five seconds (Life-is-Short API)."""

MIN_DURATION_S = 0.5
"""Shorter than anybody asks for."""

MAX_DURATION_S = 60.0
"""A longer clip than any engine makes; bounds memory and money before an engine applies its own limit."""

MAX_PROMPT_CHARS = 4000
"""Of what people may ask for: far above what any text encoder reads (UMT5 in Wan2.2: 512 tokens). Queues of others
hand out longer ones, of which an engine is given the beginning."""


class Value(BaseModel):
    """A frozen value that refuses unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


Identifier = Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[A-Za-z0-9._:-]+$")]
DurationS = Annotated[float, Field(gt=0, le=MAX_DURATION_S)]

identifier: TypeAdapter[str] = TypeAdapter(Identifier)


def _relative(path: str) -> str:
    """A path that stays where the storage keeps it."""
    if not path or path.startswith("/") or ".." in path.split("/") or "\\" in path or not path.isprintable():
        raise ValueError("must be a relative path without `..`, backslashes or control characters")
    return path


StoragePath = Annotated[str, Field(max_length=1024), AfterValidator(_relative)]
"""Where a queue's storage keeps a photo or a video, as somebody else says: checked before it is believed."""


class Task(Value):
    """One photo to turn into one video."""

    item_id: Identifier  # the video item: one row of the queue
    group_id: str | None = None  # the set of photos it was uploaded with; a queue may know none
    photo_id: str | None = None
    prompt: str = ""  # may be empty: the engine has a default move
    photo_storage_path: str  # where the queue's storage keeps the photo; relative, no `..`
    duration_s: DurationS
    names_duration: bool = True  # False: `duration_s` is what the queue means by naming none
    provider: str | None = None  # the queue's hint: wan_local, gen4_turbo, veo3.1, … (`providers.py`)
    extras: dict[str, Any] = {}  # fields of the wire this version does not know, kept as they came


class _QueuedTask(BaseModel):
    """A task as queues write it; JSON types are taken as they are, never converted.

    What no video depends on may be missing: the real Life-is-Short server has rows without a group, and prompts of any
    length.
    """

    model_config = ConfigDict(strict=True, extra="allow")

    item_id: Identifier
    group_id: str | None = None
    photo_id: str | None = None
    prompt: str | None = None
    photo_storage_path: StoragePath
    frame_num: Annotated[int, Field(ge=2, le=int(MAX_DURATION_S * QUEUE_FPS) + 1)] | None = None  # 24 x seconds + 1
    inference_provider: str | None = None
    leased_until: object = None  # the server's clock: never compared, so not kept


def parse_task(payload: object) -> Task:
    """A task as queues write it, in our own words. Unknown fields go to `extras` as they are.

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
        photo_storage_path=wire.photo_storage_path,
        duration_s=duration_s(wire.frame_num),
        names_duration=wire.frame_num is not None,
        provider=wire.inference_provider,
        extras=wire.model_extra or {},
    )


def duration_s(frame_num: int | None) -> float:
    """Seconds that a queue means by `frame_num`."""
    return ((DEFAULT_FRAME_NUM if frame_num is None else frame_num) - 1) / QUEUE_FPS


class Lease(Value):
    """A task and the right to work on it for a while.

    `worker_id` is unique to the lease, so it is also the fencing token: every write carries it. The deadline is
    not here: it is monotonic time of whoever runs the lease, counted from before its last renewal was sent.
    """

    task: Task
    worker_id: Identifier
    length_s: Annotated[float, Field(ge=2, le=86_400)]  # how long each renewal lasts

    @property
    def token(self) -> str:
        """The part of worker_id that is unique to this lease: short, safe in a file name."""
        return self.worker_id.rsplit(".", 1)[-1]


class GenerationRequest(Value):
    """What an engine is asked for. None means the engine's own default."""

    prompt: Annotated[str, Field(max_length=MAX_PROMPT_CHARS)] = ""
    negative_prompt: Annotated[str, Field(max_length=MAX_PROMPT_CHARS)] | None = None
    duration_s: DurationS
    names_duration: bool = True  # False: nobody asked for just this length, and an engine may have its own
    max_area_px: Annotated[int, Field(ge=64 * 64, le=3840 * 2160)] | None = None  # width x height of the video
    steps: Annotated[int, Field(ge=1, le=200)] | None = None
    guidance: Annotated[float, Field(ge=0, le=50)] | None = None
    seed: Annotated[int, Field(ge=0, le=2**63 - 1)] | None = None
    last_photo: Path | None = None  # what the video ends on, where the engine can do that
    provider: str | None = None  # the queue's hint at a provider's model; engines of ours have their own

    @classmethod
    def from_task(cls, task: Task) -> Self:
        """The request a task stands for; everything it does not say is the engine's choice."""
        return cls(
            prompt=task.prompt[:MAX_PROMPT_CHARS],
            duration_s=task.duration_s,
            names_duration=task.names_duration,
            provider=task.provider,
        )


class Video(Value):
    """A finished mp4 in a local folder."""

    path: Path
    width: int  # pixels
    height: int  # pixels
    fps: float
    frames: int
    size_bytes: int
    seed: int | None = None
    cost_usd: float | None = None  # what a provider takes for it, where it is paid by the clip
    as_it_came: str | None = None  # why a clip that was paid for is not cut or encoded as asked; None where it is
    external_ids: dict[str, str] = {}  # ids at a paid provider, by the name the queue's report knows them under

    @property
    def duration_s(self) -> float:
        """Seconds from the first frame to the end of the last."""
        return self.frames / self.fps


class Outcome(Value):
    """How one lease ended, as its worker saw it.

    completed   the queue accepted the video
    failed      the queue accepted an error message
    cancelled   a person cancelled the task; the lease was given up
    lease_lost  somebody else has the task, its lease could not be renewed in time, or its end could not be
                reported; the queue decides what becomes of it
    released    handed back for another worker: shutdown, preemption, a machine that cannot work
    """

    status: Literal["completed", "failed", "cancelled", "lease_lost", "released"]
    item_id: str
    error: str | None = None  # one line, for people
    video: Video | None = None
    storage_path: str | None = None
    stage_seconds: dict[str, float] = {}  # where the time went
    machine_at_fault: bool = False  # or may be: the same may happen to the next task here
    worker_should: Literal["stop", "wait"] | None = None  # `stop`: settings are wrong; `wait`: a provider has an outage


def explain(error: ValidationError, hints: Mapping[str, str] = {}) -> str:
    """One line from pydantic's error: every field that is wrong, what is wrong with it, and the hint at it, if any."""
    problems = []
    for problem in error.errors(include_url=False, include_input=False):
        field = ".".join(str(part) for part in problem["loc"]) or "value"
        hint = f" ({hints[field]})" if field in hints else ""
        message = problem["msg"].removeprefix("Value error, ")
        problems.append(f"{field}: {message[0].lower()}{message[1:]}{hint}")
    return "; ".join(problems)


@contextmanager
def asked_as(names: Mapping[str, str]) -> Iterator[None]:
    """What the block finds wrong is told under the names that whoever asked knows: `--seconds` for `duration_s`.

    Raises InvalidRequest, also for what pydantic refuses.
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
