"""A container's side of a fleet, under virtual time: what it runs, what it takes itself, and what it hands back."""

import asyncio
from dataclasses import dataclass, field

import anyio
import pytest

from inference.engines.base import Job
from inference.errors import (
    AccountError,
    AddressRefused,
    EngineFailed,
    EngineLost,
    InvalidRequest,
    InvalidTask,
    QueueAuthError,
    QueueUnavailable,
    RecordsUnavailable,
    StorageAway,
    WeightsError,
)
from inference.fleet.plan import may_stay
from inference.fleet.readings import Readings
from inference.fleet.warm_worker import DRY_EVERY_S, LOOK_AHEAD, BrokenEngine, WarmWorker
from inference.leasing.executor import MAX_FAULTS_IN_A_ROW
from inference.leasing.runner import Runner
from inference.payments.ledger import Ledger
from inference.task import GenerationRequest
from inference.testing.memory_queue import Faults
from inference.testing.memory_store import MemoryStore
from tests.fleet.test_dispatch import SlowRecords, WatchedQueue
from tests.leasing.test_runner import SleepyEngine
from tests.simulation.leases import PHOTO
from tests.support.virtual import virtual_time

CLIP_S = 100.0


@dataclass
class BusyEngine(SleepyEngine):
    """Remembers when it began each generation."""

    seconds: float = CLIP_S
    began_at: list[float] = field(default_factory=list)

    async def check(self):
        """See Engine."""

    async def generate(self, request, inputs, folder, job):
        """See Engine."""
        self.began_at.append(anyio.current_time())
        return await SleepyEngine.generate(self, request, inputs, folder, job)


@dataclass
class Road(WatchedQueue):
    """A connection on which photos and videos take their time."""

    async def fetch_inputs(self, lease, folder):
        """See TaskQueue."""
        await anyio.sleep(self.takes_s.get("photo", 0.0))
        return await WatchedQueue.fetch_inputs(self, lease, folder)

    async def deliver(self, lease, video):
        """See TaskQueue."""
        await anyio.sleep(self.takes_s.get("video", 0.0))
        return await WatchedQueue.deliver(self, lease, video)


class Box:
    """A store, and one container on it. `async with` serves it."""

    def __init__(self, folder, *, engine=None, fault=None, pool="gpu", drain_s=3600.0, linger_s=20.0):
        self.store = MemoryStore(clock=anyio.current_time)
        self.queue = Road(store=self.store, worker_id="box")
        self.cron = WatchedQueue(store=self.store, worker_id="cron", lease_s=960)
        self.records = SlowRecords()
        self.readings = Readings(self.records, clock=lambda: 1e9 + anyio.current_time())
        self.engine = BrokenEngine(fault) if fault else engine or BusyEngine()
        self.runner = Runner(self.queue, self.engine, temp_dir=folder)
        self.host = WarmWorker(
            pool,
            self.queue,
            self.runner,
            self.readings,
            fault=fault,
            fits=self._fits,
            is_current=self._is_current,
            drain_s=drain_s,
            linger_s=linger_s,
        )
        self.ended = {}  # when each call ended
        self.is_current = True

    async def _fits(self, task):
        return await may_stay(task, Ledger(self.records), has_runway=True)

    async def _is_current(self):
        return self.is_current

    async def __aenter__(self):
        self._group = anyio.create_task_group()
        await self._group.__aenter__()
        self._group.start_soon(self.host.serve)
        return self

    async def __aexit__(self, *error):
        await self.host.close()
        return await self._group.__aexit__(*error)

    def add(self, number=1, provider=None, photo=PHOTO):
        """Puts tasks into the queue."""
        return [self.store.add(photo, inference_provider=provider) for _ in range(number)]

    async def call(self, name, lease, **options):
        """One call of the platform, which is remembered."""
        try:
            return await self.host.run(lease, **options)
        finally:
            self.ended[name] = anyio.current_time()

    def statuses(self):
        """How the items are, in the order they were added."""
        return [item.status for item in self.store.items.values()]


@pytest.fixture
def box(tmp_path):
    """A factory: boxes have to be made inside of virtual time."""
    return lambda **options: Box(tmp_path, **options)


def statuses(outcomes):
    """How leases ended."""
    return [outcome.status for outcome in outcomes]


@virtual_time
async def test_a_lease_is_run_and_the_board_is_told(box):
    """The outcome comes back, and how long the engine took is what the next tick reckons with."""
    async with box(drain_s=0) as it:
        [item] = it.add()
        outcomes = await it.host.run(await it.cron.lease())
        assert [(each.status, each.item_id) for each in outcomes] == [("completed", item.id)]
        known = await it.readings.pool("gpu")
        assert (known.clip_s, known.clips, known.failing) == (CLIP_S, 1, None)


@virtual_time
async def test_a_warm_container_takes_the_next_task_at_once(box):
    """No minute is spent waiting for the cron while there is work."""
    async with box() as it:
        it.add(4)
        outcomes = await it.host.run(await it.cron.lease())
        assert statuses(outcomes) == ["completed"] * 4
        assert it.engine.began_at == [0, 100, 200, 300]
        assert len(it.queue.given) == 3


@virtual_time
async def test_draining_ends_in_time(box):
    """The platform ends a call after a while: no task is taken that might not end before."""
    async with box(drain_s=250) as it:
        it.add(9)
        outcomes = await it.host.run(await it.cron.lease())
        assert statuses(outcomes) == ["completed"] * 3  # begun at 0, 100 and 200 s
        assert it.statuses() == ["completed"] * 3 + ["pending"] * 6


@virtual_time
async def test_without_draining_a_call_is_one_lease(box):
    """By setting, and where a person asked for one task."""
    async with box(drain_s=0) as it:
        it.add(2)
        assert len(await it.host.run(await it.cron.lease())) == 1
        assert anyio.current_time() == CLIP_S
    async with box() as it:
        it.add(2)
        assert len(await it.host.run(await it.cron.lease(), drain=False)) == 1


@virtual_time
async def test_two_calls_keep_one_engine_busy(box):
    """One generates while the other transfers: after the first photo there is no gap."""
    async with box() as it:
        it.queue.takes_s = {"photo": 20, "video": 30}
        it.add(6)
        async with anyio.create_task_group() as calls:
            for name in range(2):
                calls.start_soon(it.call, name, await it.cron.lease())
        assert it.engine.began_at == [20, 120, 220, 320, 420, 520]
        assert it.statuses() == ["completed"] * 6


@virtual_time
async def test_one_lingers_for_a_while(box):
    """After the last work of the container an empty queue is asked again, by one call; the other slot is free."""
    async with box(linger_s=20) as it:
        it.queue.takes_s = {"video": 30}
        it.add(2)
        async with anyio.create_task_group() as calls:
            for name in range(2):
                calls.start_soon(it.call, name, await it.cron.lease())
        # The first is done at 130 s and asks on while the second works, until 230 s, and for 20 s after.
        assert it.ended == {1: 230, 0: 250}


@virtual_time
async def test_what_comes_while_it_lingers_is_taken(box):
    """Within one interval of polling, and the waiting begins anew after it."""
    async with box(linger_s=20) as it:
        it.add()
        async with anyio.create_task_group() as calls:
            calls.start_soon(it.call, "it", await it.cron.lease())
            await anyio.sleep(CLIP_S + 16)
            it.add()
        assert it.engine.began_at == [0, CLIP_S + 20]
        assert it.ended == {"it": 2 * CLIP_S + 40}


@virtual_time
async def test_lingering_ends_with_the_drain(box):
    """The platform's own limit goes before ours."""
    async with box(drain_s=110, linger_s=1000) as it:
        it.add()
        await it.call("it", await it.cron.lease())
        assert it.ended["it"] == pytest.approx(110, abs=5)


@virtual_time
async def test_tasks_of_other_pools_are_handed_back(box):
    """They do not stop the drain, and they are free for the next tick at once."""
    async with box(linger_s=0) as it:
        it.add()
        it.add(2, "gen4_turbo")
        it.add()
        outcomes = await it.host.run(await it.cron.lease())
        assert statuses(outcomes) == ["completed"] * 2
        assert it.statuses() == ["completed", "pending", "pending", "completed"]
        assert it.engine.began_at == [0, CLIP_S]


@virtual_time
async def test_how_far_it_looks_is_limited(box):
    """A queue full of other pools' tasks is not leased up and down; nobody keeps any of them."""
    async with box(linger_s=0) as it:
        it.add()
        it.add(50, "gen4_turbo")
        it.add()
        await it.host.run(await it.cron.lease())
        assert len(it.queue.given) == len(it.queue.returned) == LOOK_AHEAD + 1
        assert it.statuses() == ["completed"] + ["pending"] * 51


@virtual_time
async def test_a_queue_that_does_not_answer_is_asked_again(box):
    """One lost message does not send a warm GPU home."""
    async with box() as it:
        it.add(2)
        it.queue.errors = [QueueUnavailable("away"), QueueUnavailable("away")]
        outcomes = await it.host.run(await it.cron.lease())
        assert statuses(outcomes) == ["completed"] * 2
        assert it.engine.began_at == [0, CLIP_S + 10]


@virtual_time
async def test_a_queue_that_refuses_us_ends_the_drain(box):
    """Asking again with the same key cures nothing."""
    async with box() as it:
        it.add(2)
        it.queue.errors = [QueueAuthError("no")]
        assert len(await it.host.run(await it.cron.lease())) == 1
        assert anyio.current_time() == CLIP_S


@virtual_time
async def test_a_malformed_task_does_not_end_the_drain(box):
    """Its queue reported it; a queue of nothing else is left alone after a few."""
    async with box(linger_s=0) as it:
        it.add(2)
        it.queue.errors = [InvalidTask("frame_num", item_id="x")]
        assert len(await it.host.run(await it.cron.lease())) == 2
        it.add(2)
        it.queue.errors = [InvalidTask("frame_num")] * 1000
        assert len(await it.host.run(await it.cron.lease())) == 1
        assert len(it.queue.errors) == 1000 - LOOK_AHEAD - 1


@virtual_time
async def test_an_empty_queue_is_told_to_the_board(box):
    """Where a queue cannot count, this is how a tick knows that nobody waits for long; not at every question."""
    async with box(linger_s=100) as it:
        it.add()
        await it.host.run(await it.cron.lease())
        assert await it.readings.undry_s() <= DRY_EVERY_S


@virtual_time
async def test_a_cancelled_call_hands_its_lease_back(box):
    """The platform gives a preempted call milliseconds; the handing back goes on without it, and close waits for it."""
    async with box() as it:
        it.queue.takes_s["release"] = 3
        it.add(2)
        async with anyio.create_task_group() as calls:
            calls.start_soon(it.call, "it", await it.cron.lease())
            await anyio.sleep(50)
            calls.cancel_scope.cancel()
        assert it.ended == {"it": 50}  # at once
        assert it.statuses() == ["processing", "pending"]
        await it.host.close()
        assert it.statuses() == ["pending", "pending"]
        assert anyio.current_time() == 53


@pytest.mark.anyio
async def test_a_call_that_asyncio_cancels_hands_its_lease_back(box):
    """As platforms do it: the call's own task is cancelled, from outside of every scope of ours."""
    it = box()
    serving = asyncio.create_task(it.host.serve())
    it.add()
    call = asyncio.create_task(it.host.run(await it.cron.lease()))
    while not it.engine.runs:
        await asyncio.sleep(0)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    await it.host.close()
    await serving
    assert it.statuses() == ["pending"]


@virtual_time
async def test_a_cancelled_call_leaves_the_others_alone(box):
    """A person's one-off is given up; what the fleet sent goes on."""
    async with box(linger_s=0) as it:
        it.add(2)
        leases = [await it.cron.lease(), await it.cron.lease()]
        async with anyio.create_task_group() as calls:
            calls.start_soon(it.call, "stays", leases[0])
            with anyio.move_on_after(50):
                await it.call("goes", leases[1], drain=False)
        assert it.statuses() == ["completed", "completed"]  # the second by the drain of the first
        assert [lease.task.item_id for lease in it.queue.given] == [leases[1].task.item_id]


@virtual_time
async def test_closing_hands_everything_back(box):
    """Promptly, whatever is being done: `serve` ends, and so do the calls."""
    it = box()
    async with anyio.create_task_group() as container:
        container.start_soon(it.host.serve)
        it.add(3)
        for name in range(2):
            container.start_soon(it.call, name, await it.cron.lease())
        await anyio.sleep(150)  # the first is done, and the second and the third are on
        assert it.statuses() == ["completed", "processing", "processing"]
        await it.host.close()
    assert it.statuses() == ["completed", "pending", "pending"]
    assert anyio.current_time() == 150
    with pytest.raises(EngineLost, match="stopping"):
        await it.host.run(await it.cron.lease())
    await it.host.close()  # once more is harmless


@virtual_time
async def test_closing_waits_for_no_queue_that_is_away(box):
    """A container has seconds on its way out; the lease runs out by itself."""
    it = box()
    async with anyio.create_task_group() as container:
        container.start_soon(it.host.serve)
        it.add()
        container.start_soon(it.call, "it", await it.cron.lease())
        await anyio.sleep(50)
        it.queue.faults = Faults(lose_request=1)
        await it.host.close()
    assert anyio.current_time() <= 60


@virtual_time
async def test_closing_while_it_looks_past_other_tasks_keeps_none(box):
    """What it held aside, and what it had just found for itself, goes back."""
    for after_s in (0.5, 1.5, 2.5, 3.5, 4.5):
        it = box()
        it.queue.takes_s = {"lease": 1.0, "release": 1.0}
        it.add(2, "gen4_turbo")
        it.add(1)
        async with anyio.create_task_group() as container:
            container.start_soon(it.host.serve)
            container.start_soon(it.call, "it", None)
            await anyio.sleep(after_s)
            await it.host.close()
        assert it.statuses() == ["pending"] * 3, after_s


@virtual_time
async def test_a_lease_that_is_gone_costs_no_second_of_the_engine(box):
    """A preempted call comes back with the lease that was handed back, and somebody else may have the task by now."""
    async with box(drain_s=0) as it:
        it.add()
        lease = await it.cron.lease()
        await it.cron.release(lease)
        assert statuses(await it.host.run(lease)) == ["lease_lost"]
        assert it.engine.runs == 0
        other = await it.cron.lease()
        assert statuses(await it.host.run(lease)) == ["lease_lost"]
        assert it.statuses() == ["processing"]
        assert statuses(await it.host.run(other)) == ["completed"]
        assert (await it.readings.pool("gpu")).faults == 0


@virtual_time
async def test_a_call_that_comes_back_with_its_lease_goes_on(box):
    """Its container was killed and could hand nothing back: the same call brings the same lease, and it still holds."""
    it = box()
    it.add()
    lease = await it.cron.lease()
    async with anyio.create_task_group() as container:
        container.start_soon(it.host.serve)
        container.start_soon(it.call, "it", lease)
        await anyio.sleep(50)
        it.queue.faults = Faults(lose_request=1)  # so that the end of this container is not heard
        container.cancel_scope.cancel()
    second = WarmWorker("gpu", it.cron, Runner(it.cron, it.engine), it.readings)
    async with anyio.create_task_group() as container:
        container.start_soon(second.serve)
        assert statuses(await second.run(lease)) == ["completed"]
        await second.close()


@virtual_time
async def test_a_broken_engine_fails_no_task(box):
    """Each goes back; the readings and whoever called hear what is wrong, and nothing is drained."""
    async with box(fault=WeightsError("the weights are damaged")) as it:
        await anyio.wait_all_tasks_blocked()
        assert (await it.readings.pool("gpu")).failing == "the weights are damaged"
        it.add(4)
        leases = [await it.cron.lease() for _ in range(3)]
        outcomes = [await it.host.run(lease) for lease in leases]
        assert [statuses(each) for each in outcomes] == [["released"]] * 3
        assert outcomes[0][0].error == "the engine could not be loaded: the weights are damaged"
        assert it.statuses() == ["pending"] * 4
        assert {item.retry_count + item.crash_count for item in it.store.items.values()} == {0}
        assert it.host.broken
        assert not it.queue.given
        assert (await it.readings.pool("gpu")).failing


@virtual_time
async def test_two_calls_at_a_broken_engine_fail_no_task(box):
    """However close they come."""
    async with box(fault=WeightsError("the weights are damaged")) as it:
        it.add(2)
        async with anyio.create_task_group() as calls:
            for name in range(2):
                calls.start_soon(it.call, name, await it.cron.lease())
        assert it.statuses() == ["pending"] * 2


@virtual_time
async def test_a_broken_engine_does_not_answer_a_probe(box):
    """A probe asks whether the pool works: it does not."""
    async with box(fault=WeightsError("the weights are damaged")) as it:
        assert await it.host.run(None) == []
        assert (await it.readings.pool("gpu")).failing


@virtual_time
async def test_a_probe_marks_the_pool_as_working(box):
    """And the container, which is warm now, takes what waits."""
    async with box(linger_s=0) as it:
        await it.readings.faulted("gpu", "no weights", certain=True)
        assert await it.host.run(None) == []
        assert (await it.readings.pool("gpu")).failing is None
        it.add()
        assert statuses(await it.host.run(None)) == ["completed"]


@virtual_time
async def test_a_lost_engine_breaks_the_container(box):
    """The task goes back unspent; so does what is sent later, without being started; nothing more is taken."""
    async with box(engine=BusyEngine(errors=[EngineLost("the GPU is gone")])) as it:
        it.add(3)
        assert statuses(await it.host.run(await it.cron.lease())) == ["released"]
        assert it.host.broken
        beats = len(it.store.log)
        assert statuses(await it.host.run(await it.cron.lease())) == ["released"]
        assert [event.verb for event in it.store.log[beats:]] == ["lease", "release"]
        assert it.statuses() == ["pending"] * 3
        assert it.engine.runs == 1


@virtual_time
async def test_one_lost_machine_is_not_a_failing_pool(box):
    """The next container gets another GPU; three in a row are told to the next tick."""
    it = box(engine=BusyEngine(errors=[EngineLost("the GPU is gone")] * MAX_FAULTS_IN_A_ROW))
    it.add()
    for number in range(MAX_FAULTS_IN_A_ROW):
        assert (await it.readings.pool("gpu")).failing is None, number
        host = WarmWorker("gpu", it.queue, it.runner, it.readings)
        async with anyio.create_task_group() as container:
            container.start_soon(host.serve)
            await host.run(await it.cron.lease())
            await host.close()
    assert (await it.readings.pool("gpu")).failing == "the GPU is gone"


@virtual_time
async def test_a_providers_outage_rests_its_pool_and_breaks_no_container(box):
    """A new container would meet the same provider. Each call hands back one task, and leaves the others alone."""
    async with box(
        engine=BusyEngine(errors=[AccountError("429 the daily cap")] * MAX_FAULTS_IN_A_ROW), pool="runway"
    ) as it:
        it.add(5)
        for _ in range(MAX_FAULTS_IN_A_ROW):
            assert (await it.readings.pool("runway")).failing is None
            assert statuses(await it.host.run(await it.cron.lease())) == ["released"]
        assert not it.host.broken
        assert (await it.readings.pool("runway")).failing == "429 the daily cap"
        assert it.statuses() == ["pending"] * 5
        assert statuses(await it.host.run(await it.cron.lease(), drain=False)) == ["completed"]
        assert (await it.readings.pool("runway")).failing is None


@virtual_time
async def test_a_storage_that_is_away_rests_all_pools(box):
    """A GPU for every look would be billed, with nobody told. Were only this pool to rest, its tasks would overflow to
    Runway, which cannot fetch their photos either.
    """
    async with box(engine=BusyEngine(errors=[StorageAway("no URL for anything")] * 9 * MAX_FAULTS_IN_A_ROW)) as it:
        it.add(2)
        for _ in range(MAX_FAULTS_IN_A_ROW):
            assert (await it.readings.pool("gpu")).failing is None
            assert statuses(await it.host.run(await it.cron.lease())) == ["released"]
        assert (await it.readings.pool("gpu")).failing == "no URL for anything"
        assert (await it.readings.pool("runway")).failing == "no URL for anything"
        assert not it.host.broken


@virtual_time
async def test_settings_that_end_tasks_are_those_of_the_whole_pool(box):
    """One task is enough to know; nothing more is sent there."""
    refused = AddressRefused("set I2V_ALLOW_PRIVATE_ADDRESSES=true")
    async with box(engine=BusyEngine(errors=[refused] * 9)) as it:
        it.add(3)
        assert statuses(await it.host.run(await it.cron.lease())) == ["released"]
        assert it.host.broken
        assert "I2V_ALLOW_PRIVATE_ADDRESSES" in (await it.readings.pool("gpu")).failing
        assert it.statuses() == ["pending"] * 3


@virtual_time
async def test_a_lost_engine_stops_the_drain_of_the_other_call(box):
    """The lease that it has waits for the engine, and goes back with it."""
    async with box(engine=BusyEngine(errors=[EngineLost("the GPU is gone")] * 9)) as it:
        it.add(5)
        async with anyio.create_task_group() as calls:
            for name in range(2):
                calls.start_soon(it.call, name, await it.cron.lease())
        assert it.statuses() == ["pending"] * 5
        assert it.engine.runs <= 2


@virtual_time
async def test_failures_in_a_row_break_the_container(box):
    """Each told its task; together they say that the machine may be why. A clip in between starts the count anew."""
    failed = EngineFailed("a passing failure")
    # Three tries for each task.
    async with box(engine=BusyEngine(seconds=1, errors=[failed] * 6 + [None] + [failed] * 9)) as it:
        it.add(9)
        outcomes = await it.host.run(await it.cron.lease())
        assert statuses(outcomes) == ["failed"] * 2 + ["completed"] + ["failed"] * MAX_FAULTS_IN_A_ROW
        assert it.host.broken
        assert it.statuses()[-3:] == ["pending"] * 3


@virtual_time
async def test_bad_tasks_break_nothing(box):
    """A request that no machine can do says nothing of this one."""
    async with box(engine=BusyEngine(seconds=1, errors=[InvalidRequest("too long")] * 5)) as it:
        it.add(6)
        outcomes = await it.host.run(await it.cron.lease())
        assert statuses(outcomes) == ["failed"] * 5 + ["completed"]
        assert not it.host.broken


@pytest.mark.parametrize("takes_s", [0.0, 1e9])
@virtual_time
async def test_a_board_that_cannot_be_written_costs_no_task(box, takes_s):
    """Whether it refuses or hangs."""
    async with box(linger_s=0) as it:
        it.records.takes_s = takes_s
        it.records.error = RecordsUnavailable("no")
        it.add(3)
        assert statuses(await it.host.run(await it.cron.lease())) == ["completed"] * 3
    async with box(fault=WeightsError("the weights are damaged")) as it:
        it.records.takes_s = takes_s
        it.records.error = RecordsUnavailable("no")
        it.add()
        assert statuses(await it.host.run(await it.cron.lease())) == ["released"]


@virtual_time
async def test_a_photo_by_hand_takes_its_turn(box, tmp_path):
    """The engine is one; a person's photo waits for the clip that is being made."""
    async with box(linger_s=0) as it:
        it.add()
        async with anyio.create_task_group() as calls:
            calls.start_soon(it.call, "it", await it.cron.lease())
            await anyio.sleep(1)
            async with it.host.turns.taken():
                request = GenerationRequest(duration_s=5)
                video = await it.host.turns.generate(request, {"photo": tmp_path / "p.jpg"}, tmp_path, Job())
        assert video.frames == 25
        assert it.engine.began_at == [0, CLIP_S]


@virtual_time
async def test_a_photo_by_hand_learns_why_there_is_no_engine(box):
    """The very error of the load, which names the command that cures it."""
    async with box(fault=WeightsError("run `i2v weights fetch`")) as it:
        with pytest.raises(WeightsError, match="i2v weights fetch"):
            _ = it.host.turns


@virtual_time
async def test_what_is_paid_for_elsewhere_is_not_made_here(box):
    """Runway makes that clip already; the dispatcher sends it there, and the rest is drained."""
    async with box() as it:
        paid, other = it.add(2)
        purchase = Ledger(it.records).purchase(paid.id, "before.1")
        assert await purchase.resume("r") is None
        assert await purchase.intend("r", model="m", cost_usd=0.25)
        await purchase.created("task-1")
        lease = await it.cron.lease(other.id)
        assert statuses(await it.host.run(lease)) == ["completed"]
        assert it.statuses() == ["pending", "completed"]


@virtual_time
async def test_a_container_of_the_deployment_before_takes_no_more(box):
    """It ends what it has; the next task is for those that run what was deployed last."""
    async with box() as it:
        it.add(2)
        it.is_current = False
        assert statuses(await it.host.run(await it.cron.lease())) == ["completed"]
        assert it.statuses() == ["completed", "pending"]


@virtual_time
async def test_a_lease_that_comes_too_late_is_handed_back(box):
    """The container is closing, and nobody else knows of it."""
    async with box() as it:
        it.add()
        lease = await it.cron.lease()
        await it.host.close()
        with pytest.raises(EngineLost, match="stopping"):
            await it.host.run(lease)
        assert it.statuses() == ["pending"]
