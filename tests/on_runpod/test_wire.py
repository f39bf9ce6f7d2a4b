"""What may be sent to the RunPod endpoint, and what mistakes are told as."""

import base64
import re

import pytest

from inference.errors import InvalidRequest
from inference.on_runpod.wire import (
    INLINE_BYTES,
    INLINE_S,
    PAYLOAD_BYTES,
    DirectInput,
    DrainInput,
    TaskInput,
    answer_of,
    parse,
    parse_s3,
)
from inference.task import Input, Lease, Outcome, Task

WIRE_TASK = {
    "item_id": "a1",
    "group_id": "g",
    "photo_id": "p",
    "prompt": None,
    "photo_storage_path": "g/p_original.jpg",
    "frame_num": 121,
    "inference_provider": "wan_local",
    "leased_until": "2026-01-01T00:00:00Z",
    "new_field": 1,
}
OURS = {"item_id": "a1", "group_id": "g", "photo_id": "p", "photo_storage_path": "g/p.jpg", "duration_s": 5}
PHOTO = {"photo_base64": "QUJD", "prompt": "zoom in"}
S3 = {"accessId": "id", "accessSecret": "hush", "bucketName": "b", "endpointUrl": "https://s3.example.com"}


def read(payload):
    """What the endpoint makes of an input."""
    return parse(payload, worker_id="pod1", lease_s=300)


def test_a_task_as_the_queue_hands_it_out():
    """Frames become seconds, what nobody knows is kept, and the holder is whom the job names."""
    asked = read({"task": WIRE_TASK, "worker_id": "w.123"})
    assert isinstance(asked, TaskInput)
    assert (asked.lease.worker_id, asked.lease.length_s) == ("w.123", 300)
    assert (asked.lease.task.duration_s, asked.lease.task.extras) == (5, {"new_field": 1})
    assert read({"task": WIRE_TASK}).lease.worker_id == "pod1"


def test_a_lease_of_ours():
    """What a dispatcher sends arrives as the same value."""
    task = Task(item_id="a1", group_id="g", photo_id="p", inputs={"photo": Input(source="g/p.jpg")}, duration_s=2.5)
    lease = Lease(task=task, worker_id="cron.1", length_s=860)
    assert read(lease.model_dump(mode="json")).lease == lease


def test_a_lease_of_ours_from_before_there_were_inputs():
    """A dispatcher may be older than the workers that it sends to."""
    asked = read({"task": OURS, "worker_id": "cron.1", "length_s": 860})
    assert asked.lease.task.inputs == {"photo": Input(source="g/p.jpg")}
    assert asked.lease.length_s == 860


def test_a_photo_and_a_drain():
    """The other two kinds, with what is left out."""
    asked = read({**PHOTO, "seed": 7})
    assert isinstance(asked, DirectInput)
    assert (asked.seconds, asked.request.seed, asked.photo_bytes(100)) == (5, 7, b"ABC")
    assert read({**PHOTO, "seconds": 3}).request.duration_s == 3
    assert read({"drain": 4}) == DrainInput(drain=4)


@pytest.mark.parametrize(
    "other, ours",
    [
        ({"image_url": "https://a.b/c.jpg"}, {"photo_url": "https://a.b/c.jpg"}),
        ({"image_base64": "QUJD"}, {"photo_base64": "QUJD"}),
        ({"image": "HTTPS://a.b/c.jpg"}, {"photo_url": "HTTPS://a.b/c.jpg"}),
        ({"image": "QUJD"}, {"photo_base64": "QUJD"}),
        ({"image": "data:image/png;base64,QUJD"}, {"photo_base64": "data:image/png;base64,QUJD"}),
        (PHOTO | {"duration": 3}, PHOTO | {"seconds": 3}),
        (PHOTO | {"frame_num": 73}, PHOTO | {"seconds": 3}),
        (PHOTO | {"frame_num": 73, "duration": 3.0, "seconds": 3}, PHOTO | {"seconds": 3}),
        (PHOTO | {"image": "QUJD", "image_url": None, "seed": None, "steps": None}, PHOTO),
    ],
)
def test_words_of_other_workers(other, ours):
    """What means the same is taken; what is said twice alike, too, and null says nothing."""
    assert read({"prompt": "", **other}) == read({"prompt": "", **ours})


def test_base64_as_browsers_make_it():
    """A data: URL, and line breaks."""
    assert read({**PHOTO, "photo_base64": "data:image/jpeg;base64,QU\nJD"}).photo_bytes(100) == b"ABC"


@pytest.mark.parametrize(
    "payload, told",
    [
        (None, "input: has to be an object with one of task, drain, "),
        ([PHOTO], "input: has to be an object"),
        ({}, "input: nothing to do; give one of task, drain, photo_url and photo_base64"),
        ({"prompt": "x"}, "input: nothing to do"),
        ({"task": WIRE_TASK, "drain": 1}, "input: task and drain exclude each other"),
        ({**PHOTO, "photo_url": "https://a.b/c"}, "input: photo_url and photo_base64 exclude each other"),
        ({"photo_base64": "QUJD"}, "prompt: field required"),
        ({**PHOTO, "prompt": 5}, "prompt: input should be a valid string"),
        ({**PHOTO, "prompt": "x" * 4001}, "prompt: string should have at most 4000 characters"),
        ({**PHOTO, "seconds": "5"}, "seconds: input should be a valid number"),
        ({**PHOTO, "seconds": True}, "seconds: input should be a valid number"),
        ({**PHOTO, "seconds": 0}, "seconds: input should be greater than 0"),
        ({**PHOTO, "seconds": 61}, "seconds: input should be less than or equal to 60"),
        ({**PHOTO, "seconds": float("nan")}, "seconds: input should be a finite number"),
        ({**PHOTO, "seed": -1}, "seed: input should be greater than or equal to 0"),
        ({**PHOTO, "seed": 1.5}, "seed: input should be a valid integer"),
        ({**PHOTO, "upload_url": "https://host:port/x"}, "upload_url: has to be a URL that starts"),
        ({**PHOTO, "upload_url": "https://[::1/x"}, "upload_url: has to be a URL that starts"),
        ({**PHOTO, "upload_url": "ftp://x/y"}, "upload_url: has to be a URL that starts with https://"),
        ({"photo_url": "file:///etc/passwd", "prompt": ""}, "photo_url: has to be a URL"),
        ({"drain": 0}, "drain: input should be greater than or equal to 1"),
        ({"drain": True}, "drain: input should be a valid integer"),
        ({"drain": 2, "prompt": "x"}, "prompt: extra inputs are not permitted (permitted are drain)"),
        ({**PHOTO, "sed": 1}, "sed: extra inputs are not permitted (did you mean seed?)"),
        (
            {**PHOTO, "xyz": 1},
            "xyz: extra inputs are not permitted (permitted are photo_url, photo_base64, prompt, neg",
        ),
        ({**PHOTO, "a(\\1": 1, "seed": -1}, "a(\\1: extra inputs are not permitted"),
        (
            {**PHOTO, "length": 81},
            "length: extra inputs are not permitted (a number of frames elsewhere: say how many sec",
        ),
        (
            {**PHOTO, "width": 480},
            "width: extra inputs are not permitted (the video has the photo's shape, and the size",
        ),
        ({**PHOTO, "steps": 10}, "steps: extra inputs are not permitted (the endpoint's preset decides)"),
        ({**PHOTO, "duration": 5, "seconds": 4}, "duration and seconds contradict each other; give seconds alone"),
        ({**PHOTO, "duration": 5, "frame_num": 81}, "duration and frame_num contradict each other; give seconds alone"),
        ({**PHOTO, "image": "REVG"}, "photo_base64 and image contradict each other; give photo_base64 alone"),
        ({**PHOTO, "image_url": "https://a.b/c"}, "input: image_url and photo_base64 exclude each other"),
        ({**PHOTO, "duration": "5"}, "duration: input should be a valid number"),
        ({**PHOTO, "duration": 0}, "duration: input should be greater than 0"),
        *(
            ({**PHOTO, "frame_num": frames}, "frame_num: has to be a whole number from 2 to 1441: 24 for each second")
            for frames in (1, 0, -23, 1442, 81.5, "81", True)
        ),
        ({"image_url": "file:///etc/passwd", "prompt": ""}, "image_url: has to be a URL"),
        ({"image": 5, "prompt": ""}, "image: input should be a valid string"),
        ({"task": "a1"}, "task: input should be a valid dictionary"),
        ({"task": {"item_id": "a1"}}, "task: malformed task: photo_storage_path: field required"),
        ({"task": {**WIRE_TASK, "photo_storage_path": "../x"}}, "photo_storage_path: must be a relative"),
        ({"task": {**WIRE_TASK, "frame_num": "many"}}, "frame_num: input should be a valid integer"),
        ({"task": WIRE_TASK, "worker_id": "no spaces"}, "worker_id: string should match pattern"),
        ({"task": OURS, "worker_id": "w", "length_s": 1.0}, "task: length_s: input should be greater"),
        ({"task": {"item_id": "a1"}, "worker_id": "w", "length_s": 60.0}, "task: photo_storage_path: field required"),
        (
            {"task": OURS | {"photo_storage_path": "../../other.jpg"}, "worker_id": "w", "length_s": 60.0},
            "task: value: must be a relative path",
        ),
    ],
)
def test_bad_input_names_the_field(payload, told):
    """One line, and never what was sent."""
    with pytest.raises(InvalidRequest, match=re.escape(told)) as raised:
        read(payload)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "text, told", [("***", "not base64"), ("QUJ", "not base64"), ("QUJD" * 40, "larger than 100 bytes")]
)
def test_a_photo_that_is_none(text, told):
    """Found out before anything is started for it."""
    with pytest.raises(InvalidRequest, match=f"photo_base64: {told}"):
        read({**PHOTO, "photo_base64": text}).photo_bytes(100)


def test_s3_config_as_documented():
    """Beside the input, with RunPod's own names; mistakes never show the secret."""
    config = parse_s3(S3)
    assert (config.bucketName, config.accessSecret.get_secret_value()) == ("b", "hush")
    assert "hush" not in repr(config)
    assert parse_s3(None) is None
    with pytest.raises(InvalidRequest, match=r"s3Config: bucketName: field required; endpointUrl") as raised:
        parse_s3({"accessId": "id", "accessSecret": "hush"})
    assert "hush" not in str(raised.value)


def test_the_room_in_an_answer():
    """The largest mp4 leaves room for its own description; the longest clip has a decent rate."""
    assert len(base64.b64encode(bytes(INLINE_BYTES))) + 10_000 < PAYLOAD_BYTES
    assert 10 < INLINE_S < 12


@pytest.mark.parametrize(
    "status, machine_at_fault, retryable",
    [
        ("released", True, True),
        ("failed", True, True),
        ("failed", False, False),
        ("lease_lost", True, False),
        ("cancelled", False, False),
    ],
)
def test_a_task_that_made_no_video(status, machine_at_fault, retryable):
    """Whether another try can help is told apart from whose fault it was."""
    outcome = Outcome(status=status, item_id="a1", error="why", machine_at_fault=machine_at_fault)
    told = {"error": "why", "retryable": retryable, "item_id": "a1", "status": status}
    assert answer_of(outcome) == told | {"machine_at_fault": machine_at_fault}
