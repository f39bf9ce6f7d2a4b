"""The values that travel."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from inference.task import GenerationRequest, Input, Lease, Task, duration_s, explain

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
