"""Films: which segments are generated, kept, found and paid for, whatever happens between them."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import anyio
import anyio.to_thread
import numpy as np
import pytest

from inference.engines.turns import EngineTurns
from inference.errors import (
    BudgetSpent,
    CancelRequested,
    EngineFailed,
    EngineLost,
    InvalidRequest,
    LeaseLost,
    StorageUnavailable,
)
from inference.leasing.film import Film, FilmJob, FolderStore
from inference.leasing.retry import Policy, repeat
from inference.leasing.runner import Runner
from inference.payments.ledger import Ledger
from inference.payments.records import MemoryRecords
from inference.progress.stages import StageTracker
from inference.queues.base import SegmentStore
from inference.task import GenerationRequest, Input, Lease, Segment, Task
from inference.testing.memory_queue import MemoryQueue, MemorySegments
from inference.testing.memory_store import MemoryStore
from tests.media.test_video import encode

pytestmark = pytest.mark.anyio

FRAMES = 4
NO_WAIT = Policy(retry_wait_s=0, attempts=2)
PRICE_USD = 0.25


@dataclass
class ClipEngine:
    """Makes real clips of four frames; before each, does what comes next in `script`; pays where there is a ledger."""

    script: list[Exception | Callable[[], object] | None] = field(default_factory=list)
    prompts: list[str] = field(default_factory=list)  # of each attempt
    orders: list[str] = field(default_factory=list)  # prompts that were paid for
    name: str = "clips"
    stages: dict[str, float] = field(default_factory=lambda: {"think": 1.0, "draw": 3.0})

    async def check(self):
        """See Engine."""

    async def generate(self, request, inputs, folder, job):
        """See Engine."""
        self.prompts.append(request.prompt)
        assert list(inputs) == ["photo"]
        if job.purchase and await job.purchase.resume(request.prompt) is None:
            assert await job.purchase.intend(request.prompt, model="m", cost_usd=PRICE_USD)
            await job.purchase.created(f"id-{len(self.orders)}")
            self.orders.append(request.prompt)
        job.report("think", 1)
        step = self.script.pop(0) if self.script else None
        if isinstance(step, Exception):
            raise step
        if step is not None and inspect.iscoroutine(waiting := step()):
            await waiting
        await anyio.lowlevel.checkpoint()
        job.raise_if_cancelled()
        grey = np.full((48, 64, 3), 100, np.uint8)
        clip = partial(encode, folder / "clip.mp4", [grey] * FRAMES, width=64, height=48)
        video = await anyio.to_thread.run_sync(clip)
        (folder / "left.tmp").touch()
        job.report("draw", 1)
        return video.model_copy(update={"cost_usd": PRICE_USD if job.purchase else None})


@dataclass
class FilmQueue(MemoryQueue):
    """Hands out one film, and counts how often its photos are fetched."""

    fetched: int = 0

    async def fetch_inputs(self, lease, folder):
        """See TaskQueue."""
        self.fetched += 1
        return await MemoryQueue.fetch_inputs(self, lease, folder)


class Scene:
    """A film of `count` segments in a queue, its segments kept in memory, and a runner."""

    def __init__(
        self, photo: bytes, folder: Path, *, count=3, paid: bool = False, kept: bool = True, usd_per_s=None, **task
    ):
        self.store = MemoryStore(clock=anyio.current_time)
        self.segments = MemorySegments()
        self.queue = FilmQueue(store=self.store, worker_id="me", kept=self.segments if kept else None)
        self.ledger = Ledger(MemoryRecords(), budget_usd=count * PRICE_USD) if paid else None
        self.folder, self.seen, self.policy, self.usd_per_s = folder, [], NO_WAIT, usd_per_s
        item = self.store.add(photo, "")
        path = self.store.get(item.id).to_task().inputs["photo"].source
        self.task = Task(
            item_id=item.id,
            inputs={"p": Input(source=path)},
            segments=tuple(Segment(photo="p", prompt=f"move {n}", duration_s=1) for n in range(1, count + 1)),
            duration_s=1,
            **task,
        )

    async def run(self, *script, **engine):
        """One lease of a new worker, whose engine follows the script; returns outcome and engine."""
        engine = ClipEngine(list(script), **engine)
        runner = Runner(
            self.queue,
            engine,
            policy=self.policy,
            temp_dir=self.folder,
            ledger=self.ledger,
            sink=lambda _: self.seen.append,
            usd_per_s=self.usd_per_s,
        )
        lease = await self.queue.lease()
        lease = Lease(task=self.task, worker_id=lease.worker_id, length_s=lease.length_s)
        self.lease = lease
        return await runner.run(lease), engine


@pytest.fixture
def scene(photo_bytes, tmp_path):
    """A factory: scenes are made where there is a clock."""
    return partial(Scene, photo_bytes, tmp_path)


def film(photo: Path, folder: Path, engine: ClipEngine, *, segments: tuple[Segment, ...], **given) -> Film:
    """A film without a queue."""
    turns = given.pop("turns", None) or EngineTurns(engine)
    return Film(
        turns,
        segments,
        GenerationRequest(duration_s=1),
        {"p": photo},
        folder,
        given.pop("job", None) or FilmJob(None, len(segments)),
        attempt=partial(repeat, policy=NO_WAIT),
        **given,
    )


def moves(count: int) -> tuple[Segment, ...]:
    """Segments of one photo with different prompts."""
    return tuple(Segment(photo="p", prompt=f"move {n}", duration_s=1) for n in range(1, count + 1))


@pytest.fixture
def photo(tmp_path, photo_bytes):
    """One that is one."""
    path = tmp_path / "photo"
    path.write_bytes(photo_bytes)
    return path


# --- in order


@pytest.mark.parametrize("anyio_backend", ["asyncio", "trio"])
async def test_a_film_in_order(scene):
    """Photos once, segments one by one, then the film; the temporary folder is left empty."""
    it = scene(fade_s=1 / 24)
    outcome, engine = await it.run()
    assert outcome.status == "completed", outcome.error
    assert engine.prompts == ["move 1", "move 2", "move 3"]
    assert (outcome.video.frames, outcome.video.width) == (3 * FRAMES - 2, 64)
    assert outcome.video.size_bytes == len(it.store.objects[outcome.storage_path])
    assert it.queue.fetched == 1
    assert list(outcome.stage_seconds) == ["download", "segments", "join", "upload", "report"]
    assert len(it.segments.segments) == 3
    assert list(it.folder.iterdir()) == []


async def test_a_film_costs_the_time_of_the_segments_that_this_lease_made(scene):
    """What another worker has made before is not paid for twice."""

    async def long():
        await anyio.sleep(0.05)

    it = scene(usd_per_s=2.0)
    outcome, _ = await it.run(None, long, InvalidRequest("no"))
    assert (outcome.status, outcome.video) == ("failed", None)
    it.store.retry(it.task.item_id)
    outcome, engine = await it.run(long)
    assert engine.prompts == ["move 3"]
    assert 0.1 <= outcome.video.cost_usd <= 2 * outcome.stage_seconds["segments"]
    it.store.items[it.task.item_id] = it.store.items[it.task.item_id].model_copy(update={"status": "pending"})
    outcome, engine = await it.run()
    assert (outcome.status, outcome.video.cost_usd, engine.prompts) == ("completed", 0, [])


async def test_progress_is_told_by_stage_and_segment(scene):
    """In the words of the contract; the fraction never falls, also where a segment is tried twice."""
    it = scene()
    await it.run(None, EngineFailed("once"))
    fractions = [progress.fraction for progress in it.seen]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1
    details = [dict(progress.detail) for progress in it.seen[:-1]]
    assert details[0] == {
        "stages_completed": 0, "stages_total": 5, "stage_index": 0, "stage": "download",
        "segments_done": 0, "segments_total": 3,
    }  # fmt: skip
    assert [detail["stage"] for detail in details] == [progress.stage for progress in it.seen[:-1]]
    assert all(detail["stages_completed"] == detail["stage_index"] for detail in details)
    done = [detail["segments_done"] for detail in details]
    assert done == sorted(done)
    assert set(done) == {0, 1, 2, 3}
    inside = [progress.done for progress in it.seen if progress.stage == "segments"]
    assert {0.25, 0.99, 1, 1.25, 2.25, 3} <= set(inside)  # the first of two stages is a quarter of the engine's work
    assert details[-1]["stages_completed"] == 4


async def test_sixty_segments(scene):
    """As many as there may be, through the whole of it."""
    outcome, engine = await (it := scene(count=60)).run()
    assert outcome.status == "completed", outcome.error
    assert (len(engine.prompts), outcome.video.frames, len(it.segments.segments)) == (60, 60 * FRAMES, 60)


async def test_others_have_their_turn_between_segments(photo, tmp_path):
    """A film holds the engine for one segment at a time."""
    engine = ClipEngine()
    turns = EngineTurns(engine)
    order = engine.prompts

    async def other():
        async with turns.taken():
            order.append("other")

    async with anyio.create_task_group() as tasks:
        engine.script = [lambda: tasks.start_soon(other), None]
        await film(photo, tmp_path, engine, segments=moves(2), turns=turns).made()
    assert order == ["move 1", "other", "move 2"]


# --- what goes wrong


async def test_one_segment_is_tried_again_and_not_the_film(scene):
    """By cause, as a whole task is."""
    outcome, engine = await (it := scene()).run(None, EngineFailed("once"))
    assert outcome.status == "completed"
    assert engine.prompts == ["move 1", "move 2", "move 2", "move 3"]
    outcome, engine = await scene().run(None, InvalidRequest("no such move"))
    assert (outcome.status, outcome.error) == ("failed", "segment 2 of 3: no such move")
    assert engine.prompts == ["move 1", "move 2"]
    assert list(it.folder.iterdir()) == []


async def test_the_next_holder_goes_on_where_the_last_one_was(scene):
    """What was finished is not generated again; a segment is kept before the next one begins."""
    it = scene()
    kept_at: list[int] = []
    outcome, _ = await it.run(
        lambda: kept_at.append(len(it.segments.segments)),
        lambda: kept_at.append(len(it.segments.segments)),
        EngineLost("the GPU is gone"),
    )
    assert outcome.status == "released"
    assert kept_at == [0, 1]
    outcome, engine = await it.run()
    assert outcome.status == "completed", outcome.error
    assert engine.prompts == ["move 3"]
    assert outcome.video.frames == 3 * FRAMES


async def test_a_kept_segment_that_is_damaged_is_made_again(scene):
    """It is looked at before it is used, and replaced."""
    it = scene()
    await it.run(None, None, EngineLost("gone"))
    first, second = it.segments.segments
    whole = it.segments.segments[first]
    it.segments.segments[first] = whole[:100]
    outcome, engine = await it.run()
    assert outcome.status == "completed"
    assert engine.prompts == ["move 1", "move 3"]
    assert len(it.segments.segments[first]) == len(whole)
    assert second in it.segments.segments


async def test_a_segment_that_cannot_be_kept_at_first_is_not_made_again(scene):
    """Only the keeping is repeated."""
    it = scene()
    it.segments.errors = [StorageUnavailable("for a moment")]  # when it is looked for
    outcome, engine = await it.run(lambda: it.segments.errors.append(StorageUnavailable("and when it is kept")))
    assert outcome.status == "completed"
    assert engine.prompts == ["move 1", "move 2", "move 3"]


@pytest.mark.parametrize("lost_after, runs", [(1, 1), (2, 2)])
async def test_a_lease_that_is_lost_is_noticed_at_the_boundary(photo, tmp_path, lost_after, runs):
    """Before the next segment, and before the join: nothing more is spent on what belongs to somebody else."""
    engine, done = ClipEngine(), []

    def check():
        if len(done) == lost_after:
            raise LeaseLost("somebody else has it")

    making = film(
        photo, tmp_path, engine, segments=moves(2), job=FilmJob(None, 2, check=check),
        on_segment=lambda number, _: done.append(number),
    )  # fmt: skip
    with pytest.raises(LeaseLost, match=r"^somebody else has it"):
        await making.made()
    assert len(engine.prompts) == runs
    assert not (tmp_path / "film.mp4").exists()


async def test_a_cancelled_film_ends_in_the_middle_of_a_segment(scene):
    """The engine sees it at its next step; what was finished is kept for whoever asks again."""
    it = scene()

    def cancel():
        it.job.cancel(CancelRequested("the task was cancelled"))

    engine = ClipEngine([None, cancel])
    it.job = FilmJob(None, 3)
    photo = it.folder / "p"
    photo.write_bytes(it.store.objects[it.task.inputs["p"].source])
    with pytest.raises(CancelRequested, match=r"^the task was cancelled"):
        await film(photo, it.folder, engine, segments=moves(3), job=it.job, store=it.segments).made()
    assert engine.prompts == ["move 1", "move 2"]
    assert len(it.segments.segments) == 1


async def test_a_cancel_that_the_queue_tells_ends_the_film_cancelled(scene):
    """As for any other task."""
    it = scene()
    it.policy = Policy(second_beat_s=0.01, heartbeat_interval_s=0.05)
    outcome, engine = await it.run(lambda: it.store.cancel(it.task.item_id), lambda: anyio.sleep(60))
    assert outcome.status == "cancelled"
    assert len(engine.prompts) <= 2
    assert it.store.get(it.task.item_id).status == "cancelled"


# --- what makes a segment the same


async def test_a_key_holds_all_that_a_clip_depends_on(photo, tmp_path):
    """Another prompt, length, photo, engine, setting or seed is another segment; a fade is not."""
    engine = ClipEngine()
    first = moves(1)[0]
    other = tmp_path / "other"
    other.write_bytes(photo.read_bytes() + b" ")

    async def keys(segment=first, *, engine=engine, inputs=None, request=None, **given):
        making = film(photo, tmp_path, engine, segments=(segment,), **given)
        making.inputs = inputs or making.inputs
        request = request or making.request
        return tuple(await making._keys([request.for_segment(segment)]))

    same = await keys()
    assert same == await keys(fade_s=1.0) == await keys(request=GenerationRequest(duration_s=9))
    others = [
        await keys(Segment(photo="p", prompt="other", duration_s=1)),
        await keys(Segment(photo="p", prompt="move 1", duration_s=2)),
        await keys(inputs={"p": other}),
        await keys(engine=ClipEngine(name="better")),
        await keys(recipe="quality"),
        await keys(request=GenerationRequest(duration_s=1, seed=1)),
        await keys(request=GenerationRequest(duration_s=1, max_area_px=10_000)),
        await keys(request=GenerationRequest(duration_s=1, provider="gen4_turbo")),
    ]
    assert len({same, *others}) == 9


async def test_what_is_asked_for_twice_is_made_twice(photo, tmp_path):
    """And found twice: a film that shows one photo two times shows two clips of it."""
    store = MemorySegments()
    twice = (*moves(1), *moves(1), Segment(photo="p", prompt="other", duration_s=1))
    engine = ClipEngine()
    await film(photo, tmp_path, engine, segments=twice, store=store).made()
    assert engine.prompts == ["move 1", "move 1", "other"]
    again = ClipEngine()
    found = []
    await film(
        photo, tmp_path, again, segments=twice[::-1], store=store, on_segment=lambda *each: found.append(each)
    ).made()
    assert again.prompts == []
    assert found == [(1, True), (2, True), (3, True)]


# --- what is paid


async def test_each_segment_is_paid_for_once(scene):
    """Its payment ends when its clip is kept, and the film costs what its segments cost."""
    outcome, engine = await (it := scene(paid=True)).run(None, EngineFailed("after it was paid for"))
    assert outcome.status == "completed", outcome.error
    assert engine.prompts == ["move 1", "move 2", "move 2", "move 3"]
    assert engine.orders == ["move 1", "move 2", "move 3"]
    assert outcome.video.cost_usd == pytest.approx(0.75)
    payments = await it.ledger.payments()
    assert [(payment.status, payment.part_of) for payment in payments] == [("delivered", it.task.item_id)] * 3


async def test_a_takeover_pays_nothing_twice(scene):
    """Neither for what was kept, nor for what was paid for and not fetched; the dead worker left its payments open."""
    it = scene(paid=True)
    outcome, engine = await it.run(None, None, EngineLost("after it was paid for"))
    assert (outcome.status, len(engine.orders)) == ("released", 3)
    # Of the second segment, the worker died after it was kept and before the payment was ended.
    second = (await it.ledger.payments())[1]
    await it.ledger.write(second, status="created", ended_at=None)
    assert await it.ledger.is_paid_for(it.task.item_id)
    outcome, engine = await it.run()
    assert outcome.status == "completed", outcome.error
    assert (engine.prompts, engine.orders) == (["move 3"], [])
    assert [payment.status for payment in await it.ledger.payments()] == ["delivered"] * 3
    assert await it.ledger.spent_usd() == pytest.approx(0.75)


async def test_without_a_store_payments_stay_open_until_the_film_is_delivered(scene):
    """The next holder fetches all of it again from the provider, and orders nothing."""
    it = scene(paid=True, kept=False)
    await it.run(None, None, EngineLost("after it was paid for"))
    assert [payment.status for payment in await it.ledger.payments()] == ["created"] * 3
    outcome, engine = await it.run()
    assert outcome.status == "completed", outcome.error
    assert (len(engine.prompts), engine.orders) == (3, [])
    assert [payment.status for payment in await it.ledger.payments()] == ["delivered"] * 3


async def test_what_was_reserved_for_a_film_is_for_its_segments(scene):
    """It is used up by them, and is no money that somebody else spent; the rest is freed at the end."""
    it = scene(paid=True)
    await it.ledger.reserve(it.task.item_id, 0.75)  # all that may be spent today
    left = []
    it.queue.kept = Watched(it.segments, it.ledger, left)
    outcome, _ = await it.run()
    assert outcome.status == "completed", outcome.error
    assert left == pytest.approx([0.75, 0.75, 0.75])  # paid and reserved together are always the film's price
    assert await it.ledger.spent_usd() == pytest.approx(0.75)


async def test_a_film_that_the_budget_has_no_room_for_is_handed_back(scene):
    """With what was finished kept for the next day."""
    it = scene(paid=True)
    await it.ledger.reserve("another", 0.5)
    outcome, engine = await it.run()
    assert (outcome.status, engine.orders) == ("released", ["move 1"])
    assert outcome.error.startswith("segment 2 of 3: $0.75 of today's")
    with pytest.raises(BudgetSpent):
        await it.ledger.purchase("more", "me").intend("r", model="m", cost_usd=PRICE_USD)


@dataclass
class Watched:
    """A store that looks into the books whenever a segment is kept."""

    store: SegmentStore
    ledger: Ledger
    spent: list[float]

    async def find(self, key, target):
        """See SegmentStore."""
        return await self.store.find(key, target)

    async def keep(self, key, path):
        """See SegmentStore."""
        self.spent.append(await self.ledger.spent_usd())
        await self.store.keep(key, path)


# --- in a folder


async def test_a_folder_keeps_segments_whole(tmp_path):
    """What is half written has another name, and what is kept can be replaced."""
    store = FolderStore(tmp_path / "deep" / "folder")
    (tmp_path / "a").write_bytes(b"one")
    assert not await store.find("k", tmp_path / "target")
    await store.keep("k", tmp_path / "a")
    (tmp_path / "a").write_bytes(b"two")
    await store.keep("k", tmp_path / "a")
    assert await store.find("k", tmp_path / "target")
    assert (tmp_path / "target").read_bytes() == b"two"
    assert [path.name for path in store.folder.iterdir()] == ["k.mp4"]


async def test_progress_of_a_film_without_a_queue(photo, tmp_path):
    """It has two stages."""
    seen = []
    stages = {"segments": 9.0, "join": 1.0}
    job = FilmJob(StageTracker(stages, seen.append), 1, stages)
    await film(photo, tmp_path, ClipEngine(), segments=moves(1), job=job).made()
    assert {(each.detail["stage"], each.detail["stage_index"]) for each in seen} == {("segments", 0), ("join", 1)}
    assert seen[0].detail["stages_total"] == 2
