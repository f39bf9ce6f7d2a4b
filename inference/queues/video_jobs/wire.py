"""The JSON of a job: what its `input` may hold, and what `progress` says.

    {"photo": "photos/7.jpg", "prompt": "waves", "seconds": 5}
    {"segments": [{"photo": "a.jpg", "prompt": "slow dolly-in", "seconds": 4}, {"photo": "b.jpg"}], "fade": 0.5}

A photo is a key in the bucket, an http(s) URL or a data URI. The JSON was written by an application, and partly by its
users, so it is validated here, once; JSON types are never converted.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from inference.errors import InvalidTask
from inference.inputs import MAX_INPUTS, source_kind
from inference.progress.stages import DELIVERY_STAGES, Progress
from inference.task import (
    LAST_PHOTO,
    MAX_DURATION_S,
    MAX_FADE_S,
    MAX_SEGMENTS,
    PHOTO,
    QUEUE_FPS,
    DurationS,
    Input,
    InputName,
    Segment,
    Task,
    duration_s,
    explain,
    storage_path,
)


def _reachable(source: str) -> str:
    """Refuses keys that could lead out of the bucket's folder; URLs and data URIs are judged when they are fetched."""
    return storage_path.validate_python(source) if source_kind(source) == "path" else source


Source = Annotated[str, Field(min_length=1), AfterValidator(_reachable)]


class _SegmentInput(BaseModel):
    """One part of a film."""

    model_config = ConfigDict(strict=True, extra="forbid")

    photo: Source
    prompt: str | None = None
    seconds: DurationS | None = None


class _JobInput(BaseModel):
    """One photo, the segments of a film, or a workflow with its files."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    photo: Source | None = None
    last_photo: Source | None = None
    segments: Annotated[list[_SegmentInput], Field(min_length=1, max_length=MAX_SEGMENTS)] | None = None
    fade: Annotated[float, Field(ge=0, le=MAX_FADE_S)] = 0.0  # seconds
    prompt: str | None = None
    seconds: DurationS | None = None
    frame_num: Annotated[int, Field(ge=2, le=int(MAX_DURATION_S * QUEUE_FPS) + 1)] | None = None  # 24 x seconds + 1
    provider: Annotated[str, Field(max_length=100)] | None = None
    workflow: dict[str, Any] | None = None
    inputs: Annotated[dict[InputName, Input], Field(max_length=MAX_INPUTS)] = {}  # files that a workflow names

    @model_validator(mode="after")
    def _is_one_kind_of_job(self) -> Self:
        if self.segments is None:
            if self.photo is None and self.workflow is None:
                raise ValueError("photo: is missing; a job has a photo, segments or a workflow")
        elif self.photo is not None or self.last_photo is not None or self.workflow is not None:
            raise ValueError("segments: not together with photo, last_photo or workflow")
        elif self.seconds is not None or self.frame_num is not None:
            raise ValueError("segments: each has its own seconds, the job has none")
        if self.seconds is not None and self.frame_num is not None:
            raise ValueError("seconds: not together with frame_num")
        if self.inputs and self.workflow is None:
            raise ValueError("inputs: only together with a workflow")
        for name, item in self.inputs.items():
            if name in {PHOTO, LAST_PHOTO}:
                raise ValueError(f"inputs: {name} is a field of the job itself")
            _reachable(item.source)
        return self


def parse_job(job_id: str, content: object) -> Task:
    """The task that a job's `input` stands for. Unknown fields go to `extras` unchanged.

    Raises InvalidTask naming every wrong field.
    """
    try:
        if not isinstance(content, Mapping):
            raise InvalidTask("malformed job: input has to be a JSON object", item_id=job_id)
        wire = _JobInput.model_validate(content)
        return _film(job_id, wire) if wire.segments is not None else _single(job_id, wire)
    except ValidationError as error:
        raise InvalidTask(f"malformed job: {_told(error)}", item_id=job_id) from None


def _told(error: ValidationError) -> str:
    # Rules about the whole job name their field themselves.
    return explain(error).removeprefix("value: ")


def _single(job_id: str, wire: _JobInput) -> Task:
    given = {PHOTO: wire.photo, LAST_PHOTO: wire.last_photo}
    return Task(
        item_id=job_id,
        prompt=wire.prompt or "",
        inputs={name: Input(source=source) for name, source in given.items() if source is not None} | wire.inputs,
        workflow=wire.workflow,
        duration_s=duration_s(wire.frame_num) if wire.seconds is None else wire.seconds,
        names_duration=wire.seconds is not None or wire.frame_num is not None,
        provider=wire.provider,
        extras=wire.model_extra or {},
    )


def _film(job_id: str, wire: _JobInput) -> Task:
    """A photo that several segments show is one input, so it is fetched once."""
    names: dict[str, str] = {}
    segments = []
    for number, each in enumerate(wire.segments or (), 1):
        name = names.setdefault(each.photo, f"photo-{number}")
        seconds = duration_s(None) if each.seconds is None else each.seconds
        segments.append(Segment(photo=name, prompt=each.prompt or "", duration_s=seconds))
    return Task(
        item_id=job_id,
        prompt=wire.prompt or "",
        inputs={name: Input(source=source) for source, name in names.items()},
        segments=tuple(segments),
        fade_s=wire.fade,
        duration_s=min(MAX_DURATION_S, sum(segment.duration_s for segment in segments)),
        provider=wire.provider,
        extras=wire.model_extra or {},
    )


TOLD = ("stages_completed", "stages_total", "stage_index", "stage", "segments_done", "segments_total")
"""The fields of a job's `progress`, as applications read them."""

_STAGES = tuple(DELIVERY_STAGES)


def progress_json(progress: Progress, segments: int = 0) -> dict[str, Any]:
    """A job's `progress`: the fields of TOLD, and `fraction` of the whole, 0 to 1.

    What the work itself says of them, as a film does, is taken over. Otherwise the stages are those of any delivery:
    whatever an engine calls its own stages is `generate`.
    """
    stage = progress.stage if progress.stage in _STAGES else "generate"
    index = _STAGES.index(stage)
    total = max(1, segments)
    counted = {
        "stages_completed": index,
        "stages_total": len(_STAGES),
        "stage_index": index,
        "stage": progress.stage,
        "segments_done": total if index > _STAGES.index("generate") else 0,
        "segments_total": total,
    }
    said = {name: progress.detail[name] for name in TOLD if name in progress.detail}
    return {**counted, **said, "fraction": round(progress.fraction, 4)}
