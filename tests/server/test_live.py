"""What changes is told to those who listen, and how long it will take."""

import json

import httpx
import pytest

from inference.errors import NotHolder
from inference.progress.eta import MIN_RUNS
from inference.progress.events import CompletionEvent, ErrorEvent, ProgressEvent
from inference.progress.hub import START, MemoryHub
from inference.progress.stages import Progress
from inference.queues.item import ItemProgress
from inference.queues.lifeisshort import LifeIsShortQueue
from inference.server import live
from inference.server.live import QUEUE, Live
from inference.server.rows.store import NewItem, NewPhoto, Store
from inference.task import Video
from inference.transfer.storage import Storage
from tests.server.harness import KEY, config, jpeg, running_server


class Clock:
    """Time that moves when it is told to."""

    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


class Here:
    """A store, and what is told of it."""

    def __init__(self, folder):
        self.clock = Clock()
        self.store = Store(f"sqlite:///{folder / 'queue.db'}")
        self.hub = MemoryHub(interval_s=0)
        self.live = Live(self.store, self.hub, clock=self.clock)
        self.store.tell(self.live.changed, self.live.deleted)
        self.group_id = self.store.group("group")

    def add(self, count=1, group_id=None, **fields):
        """Items that wait."""
        group_id = group_id or self.group_id
        return self.store.add(NewPhoto(group_id, "p"), [NewItem(**fields) for _ in range(count)])

    def beat(self, item, stage, fraction, worker="w"):
        """Its holder says how far it is."""
        return self.store.heartbeat(item.id, worker, 600, ItemProgress(stage=stage, fraction=fraction))

    async def told(self, project_id):
        """All that was told of a project."""
        async with self.hub.subscribe(project_id, START) as subscription:
            self.hub.close()
            return [published.event async for published in subscription]

    def run(self, took_s=10.0, **fields):
        """One task from its beginning to its end, which takes so long on the clock."""
        [item] = self.add(**fields)
        self.store.lease("w", 600, None, item.id)
        self.beat(item, "generate", 0.0)
        self.clock.now_s += took_s / 2
        self.beat(item, "generate", 0.5)
        self.clock.now_s += took_s / 2
        return self.store.complete(item.id, "w", "v")


@pytest.fixture
def here(tmp_path):
    """See Here."""
    place = Here(tmp_path)
    yield place
    place.hub.close()
    place.store.close()


def brief(events):
    """The type of each, and how far it says the task is."""
    return [
        (event.status, event.metadata["stage"], event.progress_percent) if event.type == "progress" else event.type
        for event in events
    ]


@pytest.mark.anyio
async def test_a_task_is_told_from_its_waiting_to_its_end(here):
    """To who follows its group and to who follows the whole queue, in the same words."""
    [item] = here.add()
    here.store.lease("w", 600)
    for fraction in (0.25, 0.5):
        here.beat(item, "denoise", fraction)
    here.store.complete(item.id, "w", "v", cost_usd=0.25)
    of_group, of_queue = await here.told(here.group_id), await here.told(QUEUE)
    assert brief(of_group) == [
        ("pending", "waiting", 0),
        ("processing", "starting", 0),
        ("processing", "denoise", 25),
        ("processing", "denoise", 50),
        "completion",
    ]
    assert {event.project_id for event in of_group} == {here.group_id}
    assert {event.project_id for event in of_queue} == {QUEUE}
    assert {event.task_name for event in of_group + of_queue} == {item.id}
    assert brief(of_queue) == brief(of_group)
    *_, last, end = of_group
    assert isinstance(last, ProgressEvent)
    assert last.metadata.items() >= {"lease": 1, "photo_id": item.photo_id, "group_id": here.group_id}.items()
    assert isinstance(end, CompletionEvent)
    assert end.result == {"item_id": item.id, "group_id": here.group_id, "cost_usd": 0.25}


@pytest.mark.anyio
async def test_how_it_ended_otherwise_is_told_by_its_code(here):
    """Failed, cancelled, deleted: an error each, of which a program can tell what it is."""
    failed, cancelled, deleted = here.add(3)
    here.store.lease("w", 600)
    here.store.fail(failed.id, "w", "the prompt was refused")
    here.store.cancel(cancelled.id)
    here.store.removal.delete(deleted.id)
    ends = {event.task_name: event for event in await here.told(QUEUE) if isinstance(event, ErrorEvent)}
    assert {name: event.details["error_code"] for name, event in ends.items()} == {
        failed.id: "failed",
        cancelled.id: "cancelled",
        deleted.id: "deleted",
    }
    assert ends[failed.id].error == "the prompt was refused"


@pytest.mark.anyio
async def test_a_retry_is_heard_of_although_the_task_had_ended(here):
    """Whether it had failed, or was cancelled before anybody had it; the next try begins at nothing."""
    failed, cancelled = here.add(2)
    here.store.lease("w", 600)
    here.beat(failed, "denoise", 0.5)
    here.store.fail(failed.id, "w", "no")
    here.store.cancel(cancelled.id)
    for item in (failed, cancelled):
        here.store.retry(item.id)
        here.store.lease("w", 600, None, item.id)
        here.beat(item, "denoise", 0.25)
    for item, before in ((failed, 4), (cancelled, 2)):
        of_item = [event for event in await here.told(QUEUE) if event.task_name == item.id]
        assert brief(of_item)[before:] == [
            ("pending", "waiting", 0),
            ("processing", "starting", 0),
            ("processing", "denoise", 25),
        ]
        assert brief(of_item)[before - 1] == "error"


@pytest.mark.anyio
async def test_what_was_handed_back_or_ran_out_begins_anew(here):
    """Its next holder knows nothing of how far the one before was."""
    [item] = here.add()
    here.store.lease("v", 600)
    here.beat(item, "denoise", 0.75, "v")
    here.store.heartbeat(item.id, "v", 1)
    here.store.lease("w", 600)
    here.beat(item, "denoise", 0.25)
    events = await here.told(QUEUE)
    assert [event.progress_percent for event in events] == [0, 0, 75, 0, 0, 25]
    assert [event.metadata["lease"] for event in events] == [1, 1, 1, 2, 2, 2]


@pytest.mark.anyio
async def test_a_holder_that_is_asked_to_stop_is_told_to_listeners(here):
    """It may take a while until it does."""
    [item] = here.add()
    here.store.lease("w", 600)
    here.store.cancel(item.id)
    *_, last = await here.told(QUEUE)
    assert (last.status, last.metadata["cancel_requested"]) == ("processing", True)


@pytest.mark.anyio
async def test_a_listener_is_first_told_how_all_is(here):
    """Of a group its newest tasks, of the queue what is ongoing and the newest; the oldest first, each once."""
    old, *_ = here.add(3)
    here.store.lease("w", 600)
    ended = here.add(live.MAX_NEWEST, group_id=here.store.group("other"))
    for item in ended:
        here.store.cancel(item.id)
    here.beat(old, "denoise", 0.5)
    of_queue = await here.live.snapshot(QUEUE)
    assert [event.task_name for event in of_queue] == sorted(event.task_name for event in of_queue)
    assert len(of_queue) == 3 + live.MAX_NEWEST
    assert brief(of_queue)[:3] == [("processing", "denoise", 50), *[("pending", "waiting", 0)] * 2]
    assert brief(await here.live.snapshot(here.group_id)) == brief(of_queue)[:3]
    assert {event.project_id for event in of_queue} == {QUEUE}
    assert await here.live.snapshot("nowhere") == []


def test_nothing_is_known_at_first(here):
    """Unknown is better than wrong."""
    [item, waits] = here.add(2)
    assert here.live.left_s(item) is None
    held = here.store.lease("w", 600)
    assert here.live.left_s(held) is None
    assert (here.live.queue_left_s(), here.live.groups_left_s()[here.group_id]) == (None, None)
    assert here.live.left_s(here.store.get(waits.id)) is None


def test_time_left_goes_by_the_tasks_before(here):
    """From the first moment, by what such tasks took; then by its own speed. Another length is another kind."""
    for _ in range(MIN_RUNS):
        here.run(took_s=10)
    [item] = here.add()
    held = here.store.lease("w", 600)
    assert here.live.left_s(held) == pytest.approx(10, abs=1)
    here.beat(item, "generate", 0.0)
    here.clock.now_s += 4
    assert here.live.left_s(here.beat(item, "generate", 0.4)) == pytest.approx(6, abs=2.5)
    here.store.complete(item.id, "w", "v")
    assert here.live.left_s(here.store.get(item.id)) is None
    here.add(frame_num=241)
    assert here.live.left_s(here.store.lease("w", 600)) is None


@pytest.mark.anyio
async def test_time_left_is_told(here):
    """In the event, where it is known."""
    for _ in range(MIN_RUNS):
        here.run(took_s=10)
    here.add()
    here.store.lease("w", 600)
    *_, waiting, starting = await here.told(QUEUE)
    assert "eta_s" not in waiting.metadata
    assert starting.metadata["eta_s"] == pytest.approx(10, abs=1)


def test_a_lease_of_before_is_not_taken_for_this_one(here):
    """What a late thread says of a lease that another has taken changes nothing."""
    [item] = here.add()
    first = here.store.lease("v", 600)
    here.store.heartbeat(item.id, "v", 1)
    second = here.store.lease("w", 600)
    before = here.live._running[item.id]
    here.live.changed(first)
    assert here.live._running[item.id] is before
    assert before.lease_seq == second.lease_seq
    with pytest.raises(NotHolder):
        here.store.heartbeat(item.id, "v", 600)


def test_a_server_that_starts_learns_from_what_was_completed(here):
    """Whole tasks, by their kind; with those it can tell at once."""
    for _ in range(MIN_RUNS):
        item = here.run()
        with here.store._database._connection() as connection:
            connection.execute("UPDATE video_items SET started_at = ended_at - 30 WHERE id = ?", (item.id,))
    again = Live(here.store, here.hub, clock=here.clock)
    again.seed()
    here.store.tell(again.changed, again.deleted)
    here.add()
    assert again.left_s(here.store.lease("w", 600)) == pytest.approx(30, abs=1)
    here.clock.now_s += 20
    assert again.left_s(here.store.list_items()[0]) == pytest.approx(10, abs=1)
    here.clock.now_s += 20  # it takes longer than ever: nobody knows how much
    assert again.left_s(here.store.list_items()[0]) is None


def test_tasks_that_were_under_way_when_the_server_started(here):
    """When they were leased is known, and counts when they end; which of their stages took how long is not."""
    items = here.add(MIN_RUNS)
    for _ in items:
        here.store.lease("w", 600)
    with here.store._database._connection() as connection:
        connection.execute("UPDATE video_items SET started_at = started_at - 60")
    again = Live(here.store, here.hub, clock=here.clock)
    here.store.tell(again.changed, again.deleted)
    for item in items:
        here.beat(item, "generate", 0.5)
        here.store.complete(item.id, "w", "v")
    kind = live.kind_of(items[0])
    assert again._history.typical_s(kind) == pytest.approx(60, abs=1)
    assert again._history.medians(kind).keys() == {live.WHOLE}


def test_when_all_will_be_ready(here):
    """What waits takes its turn at as many places as there are now; of a group, with what is before it in the line."""
    for _ in range(MIN_RUNS):
        here.run(took_s=10)
    mine, others = here.group_id, here.store.group("others")
    here.add(2, group_id=mine)
    for _ in range(2):
        here.store.lease("w", 600)
    here.add(3, group_id=others)  # two begin after 10 s, the third after 20
    assert here.live.groups_left_s()[mine] == pytest.approx(10, abs=1)
    assert here.live.groups_left_s()[others] == pytest.approx(30, abs=1)
    here.add(1, group_id=mine)  # beside the others' third
    assert here.live.groups_left_s()[mine] == pytest.approx(30, abs=1)
    here.add(1, group_id=others)
    assert here.live.groups_left_s()[mine] == pytest.approx(30, abs=1)
    assert here.live.queue_left_s() == pytest.approx(40, abs=1)
    assert "nowhere" not in here.live.groups_left_s()


def test_nobody_knows_when_what_nobody_works_on_will_be_ready(here):
    """No worker has one of that kind now; or no such task was ever completed."""
    for _ in range(MIN_RUNS):
        here.run(took_s=10)
    here.add()
    assert here.live.queue_left_s() is None
    here.store.lease("w", 600)
    assert here.live.queue_left_s() is not None
    here.add(inference_provider="veo3.1")
    assert here.live.queue_left_s() is None


@pytest.mark.anyio
async def test_a_worker_over_the_wire(tmp_path):
    """The adapter hears what this queue wants to hear, and says it; a page that comes late is told how it ended."""
    clip = tmp_path / "clip.mp4"
    clip.write_bytes(b"an mp4")
    video = Video(path=clip, width=16, height=16, fps=16, frames=16, size_bytes=6, cost_usd=0.25)
    headers = {"authorization": f"Worker {KEY}"}
    with running_server(config(tmp_path)) as url:
        async with (
            httpx.AsyncClient(base_url=url, headers=headers) as client,
            Storage(allow_private=True) as storage,
            LifeIsShortQueue(url, KEY, worker_id="host-1", storage=storage) as queue,
        ):
            answer = await client.post("/api/tasks", files={"photo": ("a.jpg", jpeg())})
            [made] = answer.json()["data"]["items"]
            path = f"/api/tasks/{made['id']}"
            lease = await queue.lease()
            assert (lease.beat_interval_s, lease.task.extras["takes"]) == (2.0, ["progress", "cost_usd"])
            await queue.heartbeat(lease, Progress(stage="denoise", done=1, total=2, fraction=0.5))
            seen = (await client.get(path)).json()["data"]
            assert seen["progress"] == {"stage": "denoise", "fraction": 0.5}
            [worker] = (await client.get("/api/overview")).json()["data"]["workers"]
            assert (worker["name"], worker["item_ids"]) == ("host-1", [made["id"]])
            await queue.complete(lease, await queue.deliver(lease, video), video)
            seen = (await client.get(path)).json()["data"]
            assert (seen["status"], seen["cost_usd"], seen["progress"]["fraction"]) == ("completed", 0.25, 1.0)
            async with client.stream("GET", f"/events/{made['group_id']}") as stream:
                async for line in stream.aiter_lines():
                    if line.startswith("data:"):
                        told = json.loads(line.removeprefix("data:"))
                        break
    assert told["type"] == "completion"
    assert told["result"] == {"item_id": made["id"], "group_id": made["group_id"], "cost_usd": 0.25}
