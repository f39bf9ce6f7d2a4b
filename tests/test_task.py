"""The values that travel."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from inference.task import GenerationRequest, Input, Lease, Segment, Task, duration_s, explain

TASK = Task(
    item_id="7b0c", group_id="g", photo_id="p", prompt="파도", inputs={"photo": Input(source="g/p_original.jpg")},
    duration_s=5.0, extras={"priority": 3},
)  # fmt: skip


def test_a_lease_survives_the_journey_to_a_container():
    """JSON and back gives the same value, extras included."""
    lease = Lease(task=TASK, worker_id="box.1f2e", length_s=300)
    assert Lease.model_validate_json(lease.model_dump_json()) == lease
    assert json.loads(lease.model_dump_json())["task"]["extras"] == {"priority": 3}
    assert lease.token == "1f2e"


def test_values_are_frozen():
    """Nobody down the line changes a task."""
    with pytest.raises(ValidationError):
        TASK.prompt = "other"


@pytest.mark.parametrize(
    "field, value",
    [
        ("item_id", ""), ("item_id", "../etc"), ("duration_s", 0), ("duration_s", float("nan")), ("duration_s", 61),
        ("prompt", None), ("surprise", 1),
    ],
)  # fmt: skip
def test_a_wrong_field_is_named(field, value):
    """The message says which field is wrong."""
    with pytest.raises(ValidationError) as caught:
        Task.model_validate(TASK.model_dump() | {field: value})
    assert field in explain(caught.value)
    assert "\n" not in explain(caught.value)


@given(st.integers(2, 1441))
def test_frame_num_counts_frames_at_24_per_second(frame_num):
    """The documented rule: frame_num = 24·seconds + 1."""
    assert 24 * duration_s(frame_num) + 1 == pytest.approx(frame_num)


def test_no_frame_num_means_five_seconds():
    """No number, or null, means 121 frames."""
    assert duration_s(None) == 5.0


def test_a_request_takes_only_what_the_task_says():
    """Everything else stays the engine's choice."""
    request = GenerationRequest.from_task(TASK)
    assert request.prompt == "파도"
    assert request.duration_s == 5.0
    assert (request.seed, request.steps, request.guidance, request.max_area_px) == (None, None, None, None)


def film(*photos: str, **fields) -> Task:
    """A task of segments that show these photos."""
    segments = tuple(Segment(photo=photo, prompt="pan left", duration_s=3) for photo in photos)
    inputs = {photo: Input(source=f"g/{photo}.jpg") for photo in photos}
    return Task(**{"item_id": "f", "inputs": inputs, "segments": segments, "duration_s": 3, **fields})


def test_a_film_needs_no_photo_of_its_own():
    """Its segments name theirs, the same one twice if they like; it travels as any other task."""
    task = film("a", "b", "a", fade_s=0.5)
    assert Task.model_validate_json(task.model_dump_json()) == task
    assert [segment.photo for segment in task.segments] == ["a", "b", "a"]


@pytest.mark.parametrize(
    "fields, told",
    [
        ({"inputs": {"a": Input(source="g/a.jpg")}}, "segment 2 shows a photo that is not among the task's inputs"),
        ({"workflow": {}}, "segments or a workflow, not both"),
        ({"segments": ()}, "needs an input named photo"),
        ({"segments": (Segment(photo="a", duration_s=1),) * 61}, "segments: tuple should have at most 60 items"),
        ({"fade_s": -1}, "fade_s"),
    ],
)
def test_a_film_that_cannot_be_is_refused(fields, told):
    """Before anything is spent on it."""
    with pytest.raises(ValidationError) as refused:
        film("a", "b", **fields)
    assert told in explain(refused.value)


def test_a_segment_is_asked_for_as_the_film_is():
    """With its own photo, prompt and length; without a prompt, the film's."""
    request = GenerationRequest.from_task(film("a", prompt="slow", provider="veo3.1"), ("webm", "mp4"))
    asked = request.for_segment(Segment(photo="a", prompt="fast", duration_s=2))
    assert (asked.prompt, asked.duration_s, asked.provider, asked.video_formats) == ("fast", 2, "veo3.1", ("mp4",))
    assert request.for_segment(Segment(photo="a", duration_s=2)).prompt == "slow"
