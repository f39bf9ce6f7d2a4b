"""Trackers: what work says of itself, and that it is never the worse for it."""

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from inference.progress import tracker as trackers
from inference.progress.eta import StageHistory
from inference.progress.events import as_json, event_of
from inference.progress.hub import MemoryHub, install
from inference.progress.tracker import BatchProgressTracker, ProgressTracker


class Ear:
    """A hub that keeps what is published, as it travels."""

    def __init__(self) -> None:
        self.heard = []

    def publish(self, event) -> None:
        """As ProgressHub.publish."""
        self.heard.append(json.loads(as_json(event)))
        assert event_of.validate_json(as_json(event)) is not None

    @property
    def percents(self) -> list[int]:
        """What bars show."""
        return [each["progress_percent"] for each in self.heard if each["type"] == "progress"]


class Request:
    """What Celery says of the call that a task runs in (celery.app.task.Context)."""

    def __init__(self, task_id: str | None, retries: int = 0) -> None:
        self.id = task_id
        self.retries = retries


class BoundTask:
    """As a bound Celery task: `update_state` writes into the result backend, which may be away."""

    def __init__(self, task_id: str | None = "5f0c") -> None:
        self.request = Request(task_id)
        self.states = []
        self.errors = []

    def update_state(self, task_id=None, state=None, meta=None):
        """As celery.app.task.Task.update_state, with a backend that writes JSON."""
        assert task_id is None  # of the task that runs here
        if self.errors:
            raise self.errors.pop(0)
        self.states.append((state, json.loads(json.dumps(meta))))


@pytest.fixture
def ear():
    """A hub that listens."""
    return Ear()


def test_events_have_the_documents_form(ear):
    """Every field of the three events, and beside them in the metadata only what tells tries apart."""
    tracker = ProgressTracker(None, "film-1", "director", hub=ear)
    tracker.update(0.35, "processing", "clip 3 of 10", {"current_clip": 3})
    tracker.complete({"final_video_path": "1.mp4"})
    ProgressTracker(None, "film-1", "director", hub=ear).error("no credits", {"retry_after": 60, "error_code": "402"})
    progress, completion, error = ear.heard
    assert all(each.pop("timestamp").endswith("Z") for each in ear.heard)
    assert progress.pop("metadata") == {"current_clip": 3, "lease": tracker._lease, "sequence": 1}
    of = {"project_id": "film-1", "task_name": "director"}
    assert progress == of | {
        "type": "progress", "progress": 0.35, "progress_percent": 35, "status": "processing", "message": "clip 3 of 10"
    }  # fmt: skip
    assert completion == of | {"type": "completion", "result": {"final_video_path": "1.mp4"}}
    assert error == of | {
        "type": "error", "error": "no credits", "details": {"retry_after": 60, "error_code": "402"}
    }  # fmt: skip


def test_a_celery_task_is_told_as_well(ear):
    """PROGRESS with the event as its meta. SUCCESS and FAILURE are Celery's to write."""
    task = BoundTask()
    tracker = ProgressTracker(task, "film-1", "director", hub=ear)
    tracker.update(0.35, "processing", "clip 3 of 10")
    tracker.complete({"path": "1.mp4"})
    assert task.states == [("PROGRESS", ear.heard[0]), ("PROGRESS", ear.heard[1])]


def test_a_backend_is_not_written_to_for_nothing():
    """Neither for a percent and a status that it has, nor where the task was called as a plain function."""
    task, called = BoundTask(), BoundTask(None)
    tracker = ProgressTracker(task, "film-1", "director")
    for step in range(1000):
        tracker.update(step / 1000)
    assert [meta["progress_percent"] for _, meta in task.states] == list(range(100))
    ProgressTracker(called, "film-1", "director").update(0.5)
    assert called.states == []


def test_a_backend_that_is_away_costs_one_line_and_not_the_task():
    """It is left alone for a while; what is aimed at the task itself goes through."""

    class SoftTimeLimitExceeded(Exception):
        """As billiard.exceptions has it: raised by a signal, wherever the task is."""

    task = BoundTask()
    task.errors = [ConnectionError("backend away")]
    tracker = ProgressTracker(task, "film-1", "director")
    with capture_logs() as logs:
        for step in range(10):
            tracker.update(step / 10)
    assert [(line["event"], line["error"]) for line in logs] == [
        ("progress could not be told", "ConnectionError('backend away')")
    ]
    tracker.complete()
    assert [meta["type"] for _, meta in task.states] == ["completion"]
    task.errors = [SoftTimeLimitExceeded()]
    with pytest.raises(SoftTimeLimitExceeded):
        ProgressTracker(task, "film-1", "director").update(0.1)


def test_without_a_hub_it_is_silent_and_with_an_installed_one_it_is_not():
    """A tracker is made before or after; what counts is the hub of the moment."""
    tracker = ProgressTracker(None, "film-1", "director")
    with capture_logs() as logs:
        tracker.update(0.1)
    assert logs == []
    hub = MemoryHub(interval_s=0)
    install(hub)
    try:
        tracker.update(0.2)
        tracker.complete()
        assert [each.event.type for each in hub._streams["film-1"]._kept] == ["progress", "completion"]
    finally:
        install(None)
        hub.close()


@given(st.lists(st.one_of(st.floats(), st.integers(-(10**400), 10**400), st.text(), st.none(), st.just(10**400))))
def test_whatever_is_reported_percent_never_falls_and_work_goes_on(values):
    """Nonsense is a line in the log and leaves the bar where it is."""
    ear = Ear()
    tracker = ProgressTracker(None, "film-1", "director", hub=ear)
    with capture_logs():
        for value in values:
            tracker.update(value)
    assert ear.percents == sorted(ear.percents)
    assert len(ear.percents) <= len(values)
    assert all(0 <= each <= 99 for each in ear.percents)


def test_percent_may_be_told_as_percent(ear):
    """Above 1 it can be nothing else; 100 is 99 until the end."""
    tracker = ProgressTracker(None, "film-1", "director", hub=ear)
    for value in (0.5, 75, 100, 1.0):
        tracker.update(value)
    assert ear.percents == [50, 75, 99, 99]


def test_what_json_has_no_form_for_is_told_as_text(ear):
    """Paths, exceptions, keys that are numbers, numbers that are none, half of an emoji, what holds itself."""

    class Unspeakable:
        def __str__(self) -> str:
            raise RuntimeError("no")

    tracker = ProgressTracker(None, 7, "director", hub=ear)
    metadata = {1: Path("a/b"), "nan": math.nan, "all": [OSError("x"), {"b"}, (1, None, True)], "half": "\ud83d"}
    tracker.update(0.1, "processing", "half \ud83d", metadata)
    told = ear.heard[0]
    assert (told["project_id"], told["message"]) == ("7", "half ?")
    told["metadata"] = {name: value for name, value in told["metadata"].items() if name not in ("lease", "sequence")}
    assert told["metadata"] == {"1": "a/b", "nan": None, "all": ["x", ["b"], [1, None, True]], "half": "?"}
    endless = {}
    endless["self"] = endless
    with capture_logs() as logs:
        tracker.update(0.2, metadata=endless)
        tracker.update(0.3, metadata={"it": Unspeakable()})
        tracker.complete("a word")
    assert [line["event"] for line in logs] == ["progress could not be told"] * 2
    assert ear.heard[-1]["result"] == {"value": "a word"}


def test_a_task_ends_once(ear):
    """The first end counts; what comes after it is not told."""
    tracker = ProgressTracker(None, "film-1", "director", hub=ear)
    tracker.complete()
    tracker.update(0.5)
    tracker.error("late")
    tracker.complete()
    assert [each["type"] for each in ear.heard] == ["completion"]


def test_a_later_try_is_told_apart():
    """A tracker made later has a higher lease, also within a millisecond, so nothing of it is taken for stale."""
    leases = [ProgressTracker(None, "film-1", "director")._lease for _ in range(100)]
    assert leases == sorted(set(leases))
    hub = MemoryHub(interval_s=0)
    for _ in range(2):
        tracker = ProgressTracker(None, "film-1", "director", hub=hub)
        tracker.update(0.5)
        tracker.error("again")
    assert [each.event.type for each in hub._streams["film-1"]._kept] == ["progress", "error"] * 2
    hub.close()


def test_a_with_block_ends_the_task(ear):
    """With a completion, or with the error that leaves it; a task that Celery tries again waits instead."""

    class TaskPredicate(Exception):
        """As celery.exceptions has it, above Retry, Ignore and Reject."""

    class Retry(TaskPredicate):
        """Raised by `self.retry()`."""

    with ProgressTracker(None, "film-1", "director", hub=ear) as tracker:
        tracker.update(0.5)
    with pytest.raises(KeyError), ProgressTracker(None, "film-1", "director", hub=ear):
        raise KeyError("script")
    with pytest.raises(Retry), ProgressTracker(None, "film-1", "director", hub=ear):
        raise Retry
    with ProgressTracker(None, "film-1", "director", hub=ear) as tracker:
        tracker.complete({"path": "1.mp4"})
    assert [each["type"] for each in ear.heard] == ["progress", "completion", "error", "progress", "completion"]
    assert (ear.heard[2]["error"], ear.heard[2]["details"]) == ("'script'", {"error_code": "KeyError"})
    assert (ear.heard[3]["status"], ear.heard[3]["message"]) == ("pending", "retry")
    assert ear.heard[4]["result"] == {"path": "1.mp4"}


def test_time_left_is_told_where_stages_are_known(ear, monkeypatch):
    """From the third run on, from the beginning on; without a stage nothing is guessed."""
    now = 0.0
    monkeypatch.setattr(trackers, "HISTORY", StageHistory())
    monkeypatch.setattr(trackers.time, "monotonic", lambda: now)
    for _ in range(4):
        ear.heard.clear()
        tracker = ProgressTracker(None, "film-1", "director", hub=ear)
        for stage, fraction in (("script", 0.0), ("clips", 0.1), ("join", 0.9)):
            tracker.update(fraction, metadata={"stage": stage})
            now += 10
        tracker.update(0.95)
        tracker.complete()
    told = [each["metadata"].get("eta_s") for each in ear.heard if each["type"] == "progress"]
    assert told == [30.0, 20.0, 10.0, None]


def test_a_batch_is_the_mean_of_its_items(ear):
    """Items may go on side by side; one that failed is done as well when it is told so."""
    task = BoundTask()
    batch = BatchProgressTracker(task, "batch-1", "videos", 4, hub=ear)
    batch.update_item(0, 1.0, "processing", "1 of 4 done")
    batch.update_item(1, 0.5)
    batch.update_item(2, 50)
    batch.update_item(0, 0.0)
    batch.update_item(1, 0.0)
    assert ear.percents == [25, 37, 50, 50, 50]
    assert batch.completed_items == 1
    told = ear.heard[-1]["metadata"]
    assert {name: told[name] for name in ("total_items", "completed_items", "current_item")} == {
        "total_items": 4, "completed_items": 1, "current_item": 1
    }  # fmt: skip
    for index in range(4):
        batch.update_item(index, 1.0)
    assert ear.percents[-1] == 99
    batch.complete({"total_processed": 4})
    assert [ear.heard[-1]["type"], task.states[-1][1]["result"]] == ["completion", {"total_processed": 4}]


@pytest.mark.parametrize("index", [-1, 3, "1", None, 0.5, math.nan])
def test_an_item_that_does_not_exist_is_a_line_in_the_log(ear, index):
    """A batch of nothing can be reported, too."""
    with capture_logs() as logs:
        BatchProgressTracker(None, "batch-1", "videos", 3, hub=ear).update_item(index, 1.0)
        BatchProgressTracker(None, "batch-1", "videos", 0, hub=ear).complete()
    assert [line["event"] for line in logs] == ["no such item"]
    assert [each["type"] for each in ear.heard] == ["completion"]
