"""What the `input` of a job may hold, how a malformed one is told, and what `progress` says."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inference.errors import InvalidTask
from inference.progress.stages import StageTracker, plan
from inference.queues.video_jobs.wire import TOLD, parse_job, progress_json

URL = "https://photos.example/a.jpg"


def test_one_photo():
    """A key, a URL or a data URI; what is not understood is kept."""
    task = parse_job("7", {"photo": "photos/7.jpg", "prompt": "파도", "seconds": 3, "provider": "veo3.1", "tag": [1]})
    assert (task.item_id, task.prompt, task.duration_s, task.names_duration) == ("7", "파도", 3.0, True)
    assert {name: item.source for name, item in task.inputs.items()} == {"photo": "photos/7.jpg"}
    assert (task.provider, task.extras) == ("veo3.1", {"tag": [1]})
    task = parse_job("7", {"photo": URL, "last_photo": "data:image/png;base64,AAAA", "frame_num": 73})
    assert (task.duration_s, list(task.inputs), task.prompt) == (3.0, ["photo", "last_photo"], "")
    assert parse_job("7", {"photo": URL, "prompt": None, "seconds": None}).names_duration is False


def test_a_film_fetches_each_photo_once():
    """However many of its segments show it."""
    segments = [
        {"photo": "a.jpg", "prompt": "left", "seconds": 4},
        {"photo": URL, "seconds": 2.5},
        {"photo": "a.jpg", "prompt": "right"},
    ]
    task = parse_job("f", {"segments": segments, "prompt": "slow", "fade": 0.5, "provider": "wan_local"})
    assert {name: item.source for name, item in task.inputs.items()} == {"photo-1": "a.jpg", "photo-2": URL}
    assert [(segment.photo, segment.prompt, segment.duration_s) for segment in task.segments] == [
        ("photo-1", "left", 4.0),
        ("photo-2", "", 2.5),
        ("photo-1", "right", 5.0),
    ]
    assert (task.prompt, task.fade_s, task.provider) == ("slow", 0.5, "wan_local")


def test_the_longest_film():
    """Sixty segments of a minute."""
    assert len(parse_job("f", {"segments": [{"photo": f"{n}.jpg", "seconds": 60} for n in range(60)]}).inputs) == 60


def test_a_workflow_and_its_files():
    """It decides everything else; a photo is one of its files."""
    graph = {"1": {"class_type": "LoadImage"}}
    task = parse_job("w", {"workflow": graph, "photo": "a.jpg", "inputs": {"mask.png": {"source": URL}}})
    assert (task.workflow, list(task.inputs)) == (graph, ["photo", "mask.png"])


@pytest.mark.parametrize(
    "content, told",
    [
        (None, "input has to be a JSON object"),
        (["a.jpg"], "input has to be a JSON object"),
        ({}, "photo: is missing; a job has a photo, segments or a workflow"),
        ({"photo": ""}, "photo: "),
        ({"photo": 7}, "photo: input should be a valid string"),
        ({"photo": "../secret"}, "photo: must be a relative path"),
        ({"photo": "/etc/passwd"}, "photo: must be a relative path"),
        ({"photo": "a.jpg", "seconds": "5"}, "seconds: input should be a valid number"),
        ({"photo": "a.jpg", "seconds": 61}, "seconds: input should be less than or equal to 60"),
        ({"photo": "a.jpg", "seconds": 5, "frame_num": 121}, "seconds: not together with frame_num"),
        ({"photo": "a.jpg", "prompt": ["x"]}, "prompt: input should be a valid string"),
        ({"photo": "a.jpg", "inputs": {"x.png": {"source": "x"}}}, "inputs: only together with a workflow"),
        ({"segments": []}, "segments: list should have at least 1 item"),
        ({"segments": [{"photo": "a.jpg"}] * 61}, "segments: list should have at most 60 items"),
        ({"segments": [{"photo": "a.jpg"}, {"prompt": "x"}]}, "segments.1.photo: field required"),
        ({"segments": [{"photo": "a.jpg", "second": 3}]}, "segments.0.second: extra inputs are not permitted"),
        ({"segments": [{"photo": "a.jpg"}], "photo": "b.jpg"}, "segments: not together with photo"),
        ({"segments": [{"photo": "a.jpg"}], "seconds": 5}, "segments: each has its own seconds"),
        ({"workflow": {}, "inputs": {"photo": {"source": "x"}}}, "inputs: photo is a field of the job itself"),
        ({"workflow": {}, "inputs": {"a": {"source": "../x"}}}, "must be a relative path"),
    ],
)
def test_a_malformed_job_is_told_by_its_field(content, told):
    """With the job's id, so that it can be failed."""
    with pytest.raises(InvalidTask) as refused:
        parse_job("7", content)
    assert told in str(refused.value)
    assert "\n" not in str(refused.value)
    assert refused.value.item_id == "7"


def test_an_id_that_no_task_can_have_is_told_as_well():
    """An application's own table may have such."""
    with pytest.raises(InvalidTask, match="item_id"):
        parse_job("a b", {"photo": "a.jpg"})


def test_errors_do_not_show_what_a_photo_holds():
    """A data URI is a photo of somebody, and a URL may be signed."""
    for photo in ("data:image/png;base64,SECRET", f"{URL}?signature=SECRET"):
        with pytest.raises(InvalidTask) as refused:
            parse_job("7", {"photo": photo, "seconds": "x", "segments": [{"photo": photo}]})
        assert "SECRET" not in str(refused.value)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
)
fields = st.sampled_from(["photo", "last_photo", "segments", "fade", "seconds", "frame_num", "workflow", "inputs", "x"])


@given(st.dictionaries(fields, json_values, max_size=4) | json_values)
def test_any_json_is_a_task_or_a_malformed_one(content):
    """And never a crash."""
    try:
        task = parse_job("7", content)
    except InvalidTask:
        return
    assert task.item_id == "7"


def test_progress_has_the_fields_that_applications_read():
    """Of any engine, whatever it calls its stages; the percent never falls."""
    tracker = StageTracker(plan({"encode": 1, "denoise": 3}))
    seen = []
    for stage in ("download", "wait", "encode", "denoise", "upload", "report"):
        tracker.update(stage, 1, 2)
        seen.append(progress_json(tracker.latest))
    assert all(set(said) == {*TOLD, "fraction"} for said in seen)
    assert [said["stage_index"] for said in seen] == [0, 1, 2, 2, 3, 4]
    assert [said["stage"] for said in seen] == ["download", "wait", "encode", "denoise", "upload", "report"]
    assert {said["stages_total"] for said in seen} == {5}
    assert [said["segments_done"] for said in seen] == [0, 0, 0, 0, 1, 1]
    fractions = [said["fraction"] for said in seen]
    assert fractions == sorted(fractions)


def test_what_a_film_says_of_its_segments_is_passed_on():
    """And nothing else of its details."""
    tracker = StageTracker(plan({"film": 1}))
    tracker.update("film", 1, 3, {"segments_done": 1, "segments_total": 3, "stages_total": 9, "node": "x"})
    said = progress_json(tracker.latest, 3)
    assert (said["segments_done"], said["segments_total"], said["stages_total"]) == (1, 3, 9)
    assert "node" not in said
