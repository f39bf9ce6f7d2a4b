"""What applications hear of a lease: events of a hub, from the first snapshot to the end."""

from dataclasses import dataclass, field

import anyio
import pytest
from structlog.testing import capture_logs

from inference.errors import EngineLost, InvalidRequest
from inference.leasing.runner import Runner
from inference.leasing.telling import Telling
from inference.progress.events import Event, event_of
from inference.progress.stages import Progress
from inference.task import PHOTO, Input, Lease, Outcome, Task, Video
from inference.testing.memory_queue import MemoryQueue
from inference.testing.memory_store import MemoryStore
from tests.leasing.test_runner import SleepyEngine
from tests.support.virtual import virtual_time


@dataclass
class Told:
    """A hub whose only listener is the test: every event, before any gate."""

    events: list[Event] = field(default_factory=list)

    def publish(self, event):
        """See ProgressHub."""
        self.events.append(event_of.validate_json(event.model_dump_json()))


class Deaf:
    """A hub that breaks its promise to raise nothing."""

    def publish(self, event):  # noqa: ARG002
        """Raises."""
        raise RuntimeError("deaf")


def lease_of(**extras):
    """A lease, of a task with these fields of its queue."""
    task = Task(
        item_id="item", group_id="group", prompt="p", inputs={PHOTO: Input(source="a.jpg")}, duration_s=5, extras=extras
    )
    return Lease(task=task, worker_id="me.1", length_s=600)


@dataclass
class Scene:
    """One task in a store, and a runner that tells of it."""

    photo: bytes
    hub: object = field(default_factory=Told)
    engine: SleepyEngine = field(default_factory=SleepyEngine)

    def __post_init__(self):
        self.store = MemoryStore(clock=anyio.current_time)
        self.queue = MemoryQueue(store=self.store, worker_id="me")
        self.item = self.store.add(self.photo, "a prompt")

    async def run(self, **given):
        """Leases the task and runs it."""
        return await Runner(self.queue, self.engine, hub=self.hub, **given).run(await self.queue.lease())


@virtual_time
async def test_a_lease_from_its_first_snapshot_to_its_completion(photo_bytes):
    """A project is a group, a task its item; what is done never falls, and only the completion says that all is."""
    it = Scene(photo_bytes)
    outcome = await it.run(usd_per_s=0.001)
    assert outcome.status == "completed"
    *told, end = it.hub.events
    assert {(event.project_id, event.task_name) for event in it.hub.events} == {(it.item.group_id, it.item.id)}
    assert {(event.type, event.status) for event in told} == {("progress", "processing")}
    assert [event.metadata["stage"] for event in told] == ["download", "wait", "sleep", "upload", "report"]
    assert [event.message for event in told] == [event.metadata["stage"] for event in told]
    done = [event.progress for event in told]
    assert done == sorted(done)
    assert (done[0], told[-1].progress_percent) == (0, 98)
    assert [event.metadata["sequence"] for event in told] == [1, 2, 3, 4, 5]
    assert {event.metadata["lease"] for event in told} == {1}  # as its queue counts
    assert (told[2].metadata["done"], told[2].metadata["total"]) == (1, 2)
    assert end.type == "completion"
    assert end.result == {
        "item_id": it.item.id,
        "group_id": it.item.group_id,
        "storage_path": outcome.storage_path,
        "seconds": 10,
        "duration_s": pytest.approx(25 / 24),
        "cost_usd": 0.01,
        "lease": 1,
    }


@pytest.mark.parametrize(
    "error, status, told",
    [
        (
            InvalidRequest("prompt: too rude"),
            "failed",
            ("error", "prompt: too rude", {"error_code": "failed", "lease": 1}),
        ),
        (EngineLost("no GPU"), "released", ("progress", "pending", "no GPU")),
    ],
)
@virtual_time
async def test_a_lease_that_ends_otherwise(photo_bytes, error, status, told):
    """A failure is the end of the task; a task that goes back waits again, for its beginning."""
    it = Scene(photo_bytes, engine=SleepyEngine(errors=[error]))
    assert (await it.run()).status == status
    end = it.hub.events[-1]
    if told[0] == "error":
        assert (end.type, end.error, end.details) == told
    else:
        assert (end.type, end.status, end.message) == told
        assert end.progress == 0
        assert end.metadata["sequence"] > it.hub.events[-2].metadata["sequence"]


@virtual_time
async def test_a_worker_that_is_stopped_says_that_the_task_waits(photo_bytes):
    """It is handed back, so another worker is going to take it."""
    it = Scene(photo_bytes)
    with anyio.move_on_after(5) as scope:
        await it.run()
    assert scope.cancelled_caught
    assert (it.hub.events[-1].type, it.hub.events[-1].status) == ("progress", "pending")


@virtual_time
async def test_where_no_task_goes_back_a_stop_is_its_end(photo_bytes):
    """The queue was told that it failed, so nobody waits for another worker."""
    it = Scene(photo_bytes)
    it.queue.hands_back = False
    with anyio.move_on_after(5) as scope:
        await it.run()
    assert scope.cancelled_caught
    end = it.hub.events[-1]
    assert (end.type, end.details["error_code"]) == ("error", "failed")


@virtual_time
async def test_a_cancelled_task_and_a_lost_lease(photo_bytes):
    """A person's wish ends the task; of a lost lease only its next holder may tell."""
    it = Scene(photo_bytes, engine=SleepyEngine(seconds=300))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(it.run)
        await anyio.sleep(10)
        it.store.cancel(it.item.id)
    end = it.hub.events[-1]
    assert (end.type, end.details["error_code"]) == ("error", "cancelled")

    it = Scene(photo_bytes, engine=SleepyEngine(seconds=300))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(it.run)
        await anyio.sleep(10)
        it.store.assign(it.store.get(it.item.id), "somebody.else", 600)
    assert {(event.type, event.status) for event in it.hub.events} == {("progress", "processing")}


@pytest.mark.parametrize("takes, told", [(["progress", "cost_usd"], 0), (["cost_usd"], 2), ("progress", 2), (None, 2)])
def test_a_queue_that_tells_of_its_tasks_is_left_to_it(takes, told):
    """Where the task says that its queue takes progress, nobody hears of it twice; what else is there means nothing."""
    hub = Told()
    telling = Telling(hub, lease_of(takes=takes))
    telling.sink(Progress(stage="render", done=1, total=2, fraction=0.5))
    telling.ended(Outcome(status="failed", item_id="item"))
    assert len(hub.events) == told


def test_what_else_is_known_is_told():
    """Seconds that are left, and what the engine says; a task without a group is a project of its own."""
    hub = Told()
    task = lease_of().task.model_copy(update={"group_id": None})
    telling = Telling(hub, lease_of().model_copy(update={"task": task}))
    telling.sink(Progress(stage="nodes", done=1, total=2, fraction=0.57, detail={"node": "KSampler"}, eta_s=7.5))
    [event] = hub.events
    assert (event.project_id, event.task_name, event.progress_percent) == ("item", "item", 57)
    assert (event.metadata["eta_s"], event.metadata["detail"]) == (7.5, {"node": "KSampler"})


def test_a_later_lease_has_a_greater_number():
    """Also where its queue counts none, so that nobody takes a retry for the past; what comes late says nothing."""
    hub = Told()
    first, second = Telling(hub, lease_of()), Telling(hub, lease_of(lease_seq=True))
    snapshot = Progress(stage="render", done=1, total=2, fraction=0.5)
    first.sink(snapshot)
    first.ended(Outcome(status="completed", item_id="item", video=video(), storage_path="a.mp4"))
    first.sink(snapshot)  # a thread that was left behind
    second.sink(snapshot)
    assert [event.type for event in hub.events] == ["progress", "completion", "progress"]
    before, after = hub.events[0].metadata["lease"], hub.events[2].metadata["lease"]
    assert after >= before > 1_700_000_000_000
    assert after is not True


def video():
    """Of one second."""
    return Video(path="video.mp4", width=64, height=48, fps=24, frames=24, size_bytes=6)


@virtual_time
async def test_a_hub_that_raises_costs_a_log_line(photo_bytes):
    """And never the task."""
    it = Scene(photo_bytes, hub=Deaf())
    with capture_logs() as logs:
        assert (await it.run()).status == "completed"
    assert {line["error"] for line in logs if line["event"] == "event_not_told"} == {"RuntimeError: deaf"}
