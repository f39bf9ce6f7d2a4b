"""The polling worker: takes, runs, waits, drains, and knows when to give up."""

import itertools
import threading
from dataclasses import dataclass, field
from types import SimpleNamespace

import anyio
import pytest
import structlog

from inference.engines.base import run_in_thread
from inference.errors import (
    AccountError,
    AddressRefused,
    EngineFailed,
    EngineHung,
    EngineLost,
    I2VError,
    InvalidTask,
    ProviderUnavailable,
    QueueAuthError,
    QueueFailed,
    QueueUnavailable,
    SettingsError,
    StorageAway,
)
from inference.leasing import scratch
from inference.leasing.polling import Worker
from inference.leasing.retry import Policy, repeat
from inference.leasing.runner import Runner
from inference.testing.memory_store import MemoryStore
from tests.leasing.test_runner import ScriptedQueue, SleepyEngine
from tests.simulation.leases import PHOTO
from tests.support.virtual import virtual_time


@dataclass
class CountingQueue(ScriptedQueue):
    """Remembers when it was asked for a lease; can be scripted to refuse and to answer late."""

    asked_at: list[float] = field(default_factory=list)
    errors: list[I2VError | None] = field(default_factory=list)
    answers_after_s: float = 0

    async def lease(self, item_id=None):
        """See TaskQueue."""
        self.asked_at.append(anyio.current_time())
        error = self.errors.pop(0) if self.errors else None
        if error:
            raise error
        lease = await ScriptedQueue.lease(self, item_id)
        await anyio.sleep(self.answers_after_s)
        return lease


class Box:
    """A worker on its queue, with a number of tasks waiting."""

    def __init__(self, photo, folder, tasks=0, engine=None, **options):
        self.store = MemoryStore(clock=anyio.current_time)
        self.queue = CountingQueue(store=self.store, worker_id="box")
        self.engine = engine or SleepyEngine(seconds=100)
        self.outcomes = []
        runner = Runner(self.queue, self.engine, policy=Policy(), temp_dir=folder)
        self.worker = Worker(self.queue, runner, on_outcome=self.outcomes.append, **options)
        for _ in range(tasks):
            self.store.add(photo)

    def statuses(self):
        """How many items are in which status."""
        return sorted(item.status for item in self.store.items.values())


@pytest.fixture
def box(photo_bytes, tmp_path):
    """A factory: boxes have to be made inside of virtual time."""
    return lambda tasks=0, **options: Box(photo_bytes, tmp_path, tasks, **options)


async def stop_at(it, at_s, *, now=False):
    """Stops the worker after a while."""
    await anyio.sleep(at_s)
    it.worker.stop_now() if now else it.worker.stop()


@virtual_time
async def test_a_backlog_keeps_the_engine_busy(box):
    """With two leases at once there is no gap between generations, and never a third lease."""
    it = box(tasks=5)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(stop_at, it, 501)
        await it.worker.run()
    assert it.statuses() == ["completed"] * 5
    assert it.engine.runs == 5
    assert [outcome.status for outcome in it.outcomes] == ["completed"] * 5
    held = 0
    for event in it.store.log:
        held += {"lease": 1, "complete": -1}.get(event.verb, 0)
        assert held <= 2


@virtual_time
async def test_an_empty_queue_is_asked_by_interval(box):
    """About every POLL_INTERVAL with a little jitter: a fleet must not ask in step."""
    it = box(poll_interval_s=5)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(stop_at, it, 1000)
        await it.worker.run()
    gaps = [after - before for before, after in zip(it.queue.asked_at, it.queue.asked_at[1:], strict=False)]
    assert 4 <= min(gaps) < max(gaps) <= 6


@virtual_time
async def test_an_idle_worker_says_so_now_and_then(box):
    """At once, then every five minutes, with the last task; never while it works or is asked for one task."""
    it = box(poll_interval_s=5)
    with structlog.testing.capture_logs() as logged:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(it.worker.run)
            await anyio.sleep(1000)
            [item_id] = [it.store.add(PHOTO).id]
            await anyio.sleep(1000)
            it.worker.stop()
        await box().worker.run(at_most=1)
    lines = [line for line in logged if line["event"] == "idle"]
    polls = [line["polls"] for line in lines]
    assert polls[0] == 1
    assert all(50 <= count <= 76 for count in polls[1:])
    before, after = lines[:4], lines[4:]
    assert not any("last_item_id" in line for line in before)
    assert [(line["last_item_id"], line["last_status"]) for line in after] == [(item_id, "completed")] * 2
    assert [round(line["last_s_ago"] / 100) for line in after] == [3, 6]


class SilentQueue(CountingQueue):
    """Does not answer, and cannot be given up: as a database whose connection died under a thread."""

    async def lease(self, item_id=None):
        """See TaskQueue."""
        assert item_id is None
        with anyio.CancelScope(shield=True):
            await anyio.sleep(1000)


class SilentAfterOne(SilentQueue):
    """The same once it has given a task."""

    async def lease(self, item_id=None):
        """See TaskQueue."""
        return await CountingQueue.lease(self, item_id) or await super().lease(item_id)


@virtual_time
async def test_a_question_that_nothing_ends_makes_the_worker_stuck(box):
    """Neither a long task nor a long pause does: the loop turns, whatever it waits for."""
    busy, waiting, silent = box(tasks=3), box(poll_interval_s=3600), box()
    busy.engine.seconds = 1500
    silent.worker._queue = SilentQueue(store=silent.store, worker_id="box")
    async with anyio.create_task_group() as tasks:
        for it in (busy, waiting, silent):
            tasks.start_soon(it.worker.run)
        await anyio.sleep(120)
        assert not silent.worker.is_stuck
        await anyio.sleep(800)
        assert [it.worker.is_stuck for it in (busy, waiting, silent)] == [False, False, True]
        for it in (busy, waiting, silent):
            it.worker.stop_now()


@virtual_time
async def test_a_worker_that_runs_a_task_is_not_stuck_before_that_ends(box):
    """Whoever ended it would end a clip that may be paid for; it ends by itself."""
    it = box(tasks=1)
    it.engine.seconds = 500
    it.worker._queue = SilentAfterOne(store=it.store, worker_id="box")
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(it.worker.run)
        await anyio.sleep(400)
        assert not it.worker.is_stuck
        await anyio.sleep(400)
        assert it.worker.is_stuck
        it.worker.stop_now()


@virtual_time
async def test_a_wake_cuts_the_interval_short(box):
    """The queue is asked at once; a burst of wakes while it is asked makes it be asked once more, and no oftener."""
    it = box(poll_interval_s=3600)
    it.queue.answers_after_s = 2

    async def wake(times):
        for _ in range(times):
            it.worker.wake()
            await anyio.sleep(0.01)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(it.worker.run)
        await anyio.sleep(100)
        assert len(it.queue.asked_at) == 1
        await wake(50)
        await anyio.sleep(10)
        assert [round(at, 1) for at in it.queue.asked_at[1:]] == [100.0, 102.0]
        it.store.add(PHOTO)
        await wake(1)
        await anyio.sleep(1)
        assert it.statuses() == ["processing"]
        it.worker.stop_now()


@virtual_time
async def test_a_queue_that_is_away_is_asked_less_and_less(box):
    """Backoff with jitter up to a minute, and back to the interval once it answers."""
    it = box(poll_interval_s=5)
    it.queue.errors = [QueueUnavailable("away")] * 10
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(stop_at, it, 2000)
        await it.worker.run()
    gaps = [after - before for before, after in zip(it.queue.asked_at, it.queue.asked_at[1:], strict=False)]
    assert 30 <= max(gaps) <= 60
    assert gaps[9] >= 30
    assert max(gaps[10:]) <= 6


@virtual_time
async def test_a_queue_that_answers_500_is_asked_by_interval(box):
    """It is there: a row that its next-task stumbles over must not make every worker slow for the tasks behind it."""
    it = box(poll_interval_s=5)
    it.queue.errors = [QueueFailed("500")] * 10
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(stop_at, it, 60)
        await it.worker.run()
    gaps = [after - before for before, after in zip(it.queue.asked_at, it.queue.asked_at[1:], strict=False)]
    assert 4 <= min(gaps) < max(gaps) <= 6


@virtual_time
async def test_settings_that_end_tasks_stop_the_worker_at_once(box):
    """Every task goes back, and what to set is what the worker ends with."""
    it = box(tasks=5, concurrency=1)
    refused = AddressRefused("10.0.0.1 is not public: set I2V_ALLOW_PRIVATE_ADDRESSES=true")
    it.queue.script["fetch_inputs"] = [refused] * 5
    with pytest.raises(SettingsError, match="I2V_ALLOW_PRIVATE_ADDRESSES"):
        await it.worker.run()
    assert it.statuses() == ["pending"] * 5
    assert len(it.queue.asked_at) == 1
    assert {item.retry_count + item.crash_count for item in it.store.items.values()} == {0}


def tried_at(it):
    """When tasks were leased."""
    return [event.at_s for event in it.store.log if event.verb == "lease"]


@virtual_time
async def test_an_outage_of_a_provider_is_waited_for_longer_and_longer(box):
    """Half a minute at first, half an hour at most, one task at a time; none fails, and the worker does not exit."""
    it = box(tasks=9, engine=SleepyEngine(seconds=1, errors=[AccountError("429 the daily cap")] * 1000), concurrency=3)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(stop_at, it, 5 * 3600)
        await it.worker.run()
    assert it.statuses() == ["pending"] * 9
    assert {item.retry_count + item.crash_count for item in it.store.items.values()} == {0}
    alone = tried_at(it)[2:]  # three are held when the first of them finds out
    pauses = [after - before for before, after in itertools.pairwise(alone)]
    assert 20 <= pauses[0] <= 45
    assert all(after > 1.2 * before for before, after in itertools.pairwise(pauses[:5]))
    assert 1350 <= max(pauses) <= 2300
    assert len(tried_at(it)) < 25


@virtual_time
async def test_a_clip_ends_the_wait(box):
    """Whoever had a task running when the outage ended tells the others; the next outage starts at half a minute."""
    it = box(tasks=20, engine=SleepyEngine(seconds=40, errors=[ProviderUnavailable("503")] * 4), concurrency=1)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(stop_at, it, 3600)
        await it.worker.run()
    assert it.statuses() == ["completed"] * 20
    assert it.engine.runs == 4 + 20


@virtual_time
async def test_a_wait_ends_when_a_task_that_ran_on_is_completed(box):
    """Not half an hour later: the provider works again."""
    it = box(tasks=3, engine=SleepyEngine(seconds=70), concurrency=2)
    it.queue.script["fetch_inputs"] = [None, *[StorageAway("no URL for anything")] * 6]  # three tries for each task
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(stop_at, it, 400)
        tasks.start_soon(it.worker.run)
    assert it.statuses() == ["completed"] * 3
    assert tried_at(it)[3] == 70  # the second pause alone would have lasted until 89 s at least


@virtual_time
async def test_a_stop_ends_the_wait(box):
    """A supervisor does not wait for half an hour."""
    it = box(tasks=1, engine=SleepyEngine(seconds=1, errors=[AccountError("no credits")] * 9))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(stop_at, it, 10)
        await it.worker.run()
    assert anyio.current_time() == 10


@virtual_time
async def test_so_many_tasks_are_not_waited_for(box):
    """Who asked for one clip hears at once that there is none now; the rest is left to whoever can."""
    it = box(tasks=5, engine=SleepyEngine(seconds=1, errors=[AccountError("no credits")] * 9), concurrency=1)
    await it.worker.run(at_most=5)
    assert anyio.current_time() < 10
    assert it.engine.runs == 1
    assert it.statuses() == ["pending"] * 5


@virtual_time
async def test_stopping_lets_a_short_rest_finish(box):
    """What is done within the grace time is done; no new task is taken."""
    it = box(tasks=3, grace_s=8, concurrency=1)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(stop_at, it, 95)
        await it.worker.run()
    assert it.statuses() == ["completed", "pending", "pending"]
    assert anyio.current_time() == 100


@virtual_time
async def test_stopping_hands_back_what_takes_longer(box):
    """After the grace time the tasks are free for somebody else, at once and uncounted."""
    it = box(tasks=2, grace_s=8)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(stop_at, it, 50)
        await it.worker.run()
    assert it.statuses() == ["pending", "pending"]
    assert {item.retry_count + item.crash_count for item in it.store.items.values()} == {0}
    assert anyio.current_time() == 58


@virtual_time
async def test_stopping_now_does_not_wait(box):
    """A second Ctrl-C hands back at once."""
    it = box(tasks=2, grace_s=1000)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(stop_at, it, 50)
        tasks.start_soon(lambda: stop_at(it, 60, now=True))
        await it.worker.run()
    assert it.statuses() == ["pending", "pending"]
    assert anyio.current_time() == 60


@virtual_time
async def test_a_lease_that_arrives_during_the_stop_is_handed_back(box):
    """The request is not given up half way: its task would be held by nobody until its lease ran out."""
    it = box(tasks=1, grace_s=1000)
    it.queue.answers_after_s = 3
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(stop_at, it, 1)
        await it.worker.run()
    assert (it.statuses(), it.engine.runs) == (["pending"], 0)
    assert anyio.current_time() == 3


@virtual_time
async def test_once_takes_one_task_and_ends(box):
    """One task if there is one, none otherwise."""
    it = box(tasks=2)
    await it.worker.run(at_most=1)
    assert it.statuses() == ["completed", "pending"]
    await box().worker.run(at_most=1)
    assert anyio.current_time() == 100


@virtual_time
async def test_once_says_when_the_queue_is_away(box):
    """A single try that could not be made is an error, not an empty queue."""
    it = box()
    it.queue.errors = [QueueUnavailable("away")]
    with pytest.raises(QueueUnavailable):
        await it.worker.run(at_most=1)


@virtual_time
async def test_a_refused_key_ends_the_worker(box):
    """Asking again with the same key cures nothing."""
    it = box(tasks=1)
    it.queue.errors = [QueueAuthError("the queue does not accept the key")]
    with pytest.raises(QueueAuthError):
        await it.worker.run()
    assert len(it.queue.asked_at) == 1


@virtual_time
async def test_a_malformed_task_does_not_stop_the_worker(box):
    """It was reported by the queue's adapter; the next one is taken after the usual pause."""
    it = box(tasks=1)
    it.queue.errors = [InvalidTask("frame_num: not a number", item_id="x")]
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(stop_at, it, 300)
        await it.worker.run()
    assert it.statuses() == ["completed"]


@virtual_time
async def test_a_broken_machine_stops_taking_tasks(box):
    """After three leases in a row that ended badly because of the machine, the tasks are left to others."""
    it = box(tasks=5, engine=SleepyEngine(errors=[EngineLost("GPU gone")] * 100), concurrency=1)
    with pytest.raises(EngineLost, match="3 tasks in a row"):
        await it.worker.run()
    assert it.engine.runs == 3
    assert it.statuses() == ["pending"] * 5


@virtual_time
async def test_tasks_that_keep_failing_here_are_left_to_others(box):
    """An engine or a storage that never works must not mark a whole queue failed."""
    it = box(tasks=6, engine=SleepyEngine(errors=[EngineFailed("broken")] * 100), concurrency=1)
    with pytest.raises(EngineLost, match="3 tasks in a row"):
        await it.worker.run()
    assert it.statuses() == ["failed"] * 3 + ["pending"] * 3


@virtual_time
async def test_bad_tasks_do_not_stop_a_good_worker(box):
    """Photos that are none say nothing of the machine."""
    it = box()
    for _ in range(5):
        it.store.add(b"not a photo")
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(stop_at, it, 300)
        await it.worker.run()
    assert it.statuses() == ["failed"] * 5


@virtual_time
async def test_the_first_fault_is_the_one_told(box):
    """A queue that goes away while a broken machine stops does not hide why it stopped."""
    it = box(engine=SleepyEngine(seconds=20, errors=[EngineLost("GPU gone")] * 100))
    for _ in range(3):
        it.store.add(PHOTO)

    async def goes_away():
        while it.engine.runs < 3:
            await anyio.sleep(1)
        it.queue.answers_after_s = 40  # longer than the worker waits; the question is under way when it gives up

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(goes_away)
        with pytest.raises(EngineLost, match="3 tasks in a row"):
            await it.worker.run()


@pytest.mark.anyio
async def test_a_stuck_engine_is_told_even_when_the_worker_was_stopped(box):
    """Its thread would keep the process from ending; whoever runs it has to know."""
    never = threading.Event()

    class Stuck(SleepyEngine):
        async def check(self):
            """See Engine."""

        async def generate(self, request, inputs, folder, job):  # noqa: ARG002
            return await run_in_thread(job, never.wait, stop_grace_s=0.05)

    it = box(tasks=1, engine=Stuck(), grace_s=0.05)
    try:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(stop_at, it, 0.3)
            with pytest.raises(EngineHung):
                await it.worker.run()
    finally:
        never.set()
    assert it.statuses() == ["pending"]


@virtual_time
async def test_being_cancelled_hands_everything_back(box):
    """Preemption cancels the worker from outside."""
    it = box(tasks=2)
    with anyio.move_on_after(50):
        await it.worker.run()
    assert it.statuses() == ["pending", "pending"]


@virtual_time
async def test_a_queue_that_is_away_for_minutes_ends_no_worker(box):
    """All that it held is lost, and that is nobody's fault here: it was heard before."""
    it = box(tasks=4, engine=SleepyEngine(seconds=1000), concurrency=3)
    heartbeat = it.queue.heartbeat

    async def away(*arguments):
        if 50 < anyio.current_time() < 250:
            raise QueueUnavailable("away")
        return await heartbeat(*arguments)

    it.queue.heartbeat = away
    with anyio.move_on_after(260):
        await it.worker.run()
    assert [outcome.status for outcome in it.outcomes] == ["lease_lost"] * 3
    assert not any(outcome.machine_at_fault for outcome in it.outcomes)


@virtual_time
async def test_no_task_is_taken_while_the_engine_could_make_none(box):
    """Not every queue takes a task back: an engine whose server is away is waited for before any task is taken."""

    class Away(SleepyEngine):
        async def check(self):
            if anyio.current_time() < 400:
                raise ProviderUnavailable("ComfyUI does not answer")

    it = box(tasks=1, engine=Away(seconds=1), poll_interval_s=5)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(stop_at, it, 500)
        await it.worker.run()
    assert 400 <= it.queue.asked_at[0] < 460
    assert it.statuses() == ["completed"]


@virtual_time
async def test_a_single_task_is_not_waited_for(box):
    """With a number of tasks to take, an engine that is away ends the worker with its error, and nothing was taken."""

    class Away(SleepyEngine):
        async def check(self):
            raise ProviderUnavailable("ComfyUI does not answer")

    it = box(tasks=1, engine=Away())
    with pytest.raises(ProviderUnavailable):
        await it.worker.run(at_most=1)
    assert it.statuses() == ["pending"]


@virtual_time
async def test_no_task_is_taken_where_none_could_begin(box, monkeypatch):
    """A queue that takes no task back: while the disk is full none is taken, and once there is room it goes on."""
    it = box(tasks=1, engine=SleepyEngine(seconds=1), poll_interval_s=5)
    it.queue.hands_back = False

    def usage(_):
        return SimpleNamespace(free=0 if anyio.current_time() < 400 else 10**9)

    monkeypatch.setattr(scratch.shutil, "disk_usage", usage)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(stop_at, it, 500)
        await it.worker.run()
    assert 400 <= it.queue.asked_at[0] < 460
    assert it.statuses() == ["completed"]


@pytest.mark.parametrize("hands_back,waited_s", [(True, 30), (False, 75)])
def test_how_long_the_answer_with_a_task_is_waited_for(box, hands_back, waited_s):
    """Longer where a task whose answer is given up is lost."""

    @virtual_time
    async def story():
        it = box(tasks=1, engine=SleepyEngine(seconds=1))
        it.queue.hands_back, it.queue.answers_after_s = hands_back, 1000
        with pytest.raises(QueueUnavailable, match=f"{waited_s} s"):
            await it.worker.run(at_most=1)

    story()


def test_pauses_that_double():
    """Few tries last longer than the restart of an application."""
    tried_at = []

    async def away():
        tried_at.append(anyio.current_time())
        raise QueueUnavailable("away")

    @virtual_time
    async def story():
        with pytest.raises(QueueUnavailable):
            await repeat(away, Policy(attempts=1, patience_attempts=8, patience_pauses_s=(2, 60)))

    story()
    assert [round(b - a) for a, b in itertools.pairwise(tried_at)] == [2, 4, 8, 16, 32, 60, 60]
