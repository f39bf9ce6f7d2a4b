"""The dispatcher: ticks under virtual time against pools and queues that misbehave."""

import math
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial

import anyio
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from inference.build.engines import price_usd
from inference.errors import (
    BudgetSpent,
    I2VError,
    InvalidTask,
    PoolUnavailable,
    QueueAuthError,
    QueueUnavailable,
    RecordsUnavailable,
)
from inference.fleet.containers import Live, Sized
from inference.fleet.dispatch import LOOK_AHEAD, PROBE_AFTER_S, Dispatcher
from inference.fleet.plan import Rules
from inference.fleet.readings import Readings
from inference.payments.ledger import HALF_A_CENT, RESERVED_S, Ledger
from inference.payments.records import MemoryRecords
from inference.settings import Settings
from inference.task import Input, Lease, Task
from inference.testing.memory_queue import Faults, MemoryQueue
from inference.testing.memory_store import MemoryStore
from tests.simulation.leases import quiet
from tests.support.virtual import run_virtual, virtual_time

NOON = datetime(2026, 11, 21, 12, tzinfo=UTC).timestamp()
APP_LIMIT_S = 55
"""The timeout of `dispatch` in app.py: a tick that took longer would be killed with leases in its hands."""

HINTS = (None, "wan_local", "gen4_turbo", "gen4.5", "veo3.1", "runway_gen4_turbo", "comfyui")

PRICE_USD = partial(price_usd, Settings.isolated())
CLIP_USD = 0.25  # five seconds of gen4_turbo
virtual = settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.too_slow])


def task(provider=None, duration_s=5.0, item_id="item"):
    """A task as a queue hands it out."""
    return Task(
        item_id=item_id,
        group_id="g",
        photo_id="p",
        inputs={"photo": Input(source="g/p.jpg")},
        duration_s=duration_s,
        provider=provider,
    )


@pytest.fixture(autouse=True)
def _quiet():
    quiet()


# ---------------------------------------------------------------- ticks


@dataclass
class FakeContainers:
    """A pool that holds what it is sent until a test takes it away."""

    running: list[Lease] = field(default_factory=list)
    sent: list[Lease] = field(default_factory=list)
    is_ready: bool = True  # False: its containers never get as far as a lease
    probes: int = 0
    fails: dict[str, I2VError] = field(default_factory=dict)  # by method
    takes_s: dict[str, float] = field(default_factory=dict)
    lands_late: bool = False  # a spawn that is answered too late, or not at all, was carried out all the same

    async def live(self):
        """See Containers."""
        await self._turn("live")
        ready = len(self.running) if self.is_ready else 0
        return Live(running=ready, waiting=len(self.running) - ready)

    async def send(self, lease):
        """See Containers."""
        if self.lands_late:
            self._land(lease)
        await self._turn("send")
        if not self.lands_late:
            self._land(lease)

    def _land(self, lease):
        if lease is None:
            self.probes += 1
        else:
            self.running.append(lease)
            self.sent.append(lease)

    async def _turn(self, name):
        await anyio.sleep(self.takes_s.get(name, 0.0))
        if name in self.fails:
            raise self.fails[name]


@dataclass
class WatchedQueue(MemoryQueue):
    """A connection that remembers what it handed out and what came back; can be slow, silent and unable to count."""

    counts: bool = True
    given: list[Lease] = field(default_factory=list)
    returned: list[Lease] = field(default_factory=list)
    errors: list[I2VError | None] = field(default_factory=list)
    takes_s: dict[str, float] = field(default_factory=dict)

    async def lease(self, item_id=None):
        """See TaskQueue."""
        if self.errors and (error := self.errors.pop(0)):
            raise error
        await anyio.sleep(self.takes_s.get("lease", 0.0))
        lease = await MemoryQueue.lease(self, item_id)
        if lease:
            self.given.append(lease)
        return lease

    async def backlog(self):
        """See TaskQueue."""
        await anyio.sleep(self.takes_s.get("backlog", 0.0))
        return await MemoryQueue.backlog(self) if self.counts else None

    async def release(self, lease, reason=None):
        """See TaskQueue."""
        self.returned.append(lease)
        await anyio.sleep(self.takes_s.get("release", 0.0))
        await MemoryQueue.release(self, lease, reason)


@dataclass
class SlowRecords(MemoryRecords):
    """Records that answer late, or not at all."""

    takes_s: float = 0.0
    error: I2VError | None = None

    def __post_init__(self):
        super().__init__()

    async def _turn(self):
        await anyio.sleep(self.takes_s)
        if self.error:
            raise self.error

    async def add(self, key, value):
        """See Records."""
        await self._turn()
        return await MemoryRecords.add(self, key, value)

    async def get(self, key):
        """See Records."""
        await self._turn()
        return await MemoryRecords.get(self, key)

    async def put(self, key, value):
        """See Records."""
        await self._turn()
        await MemoryRecords.put(self, key, value)

    async def remove(self, key):
        """See Records."""
        await self._turn()
        await MemoryRecords.remove(self, key)

    async def all(self):
        """See Records."""
        await self._turn()
        return await MemoryRecords.all(self)


class Yard:
    """A store, its queue, two pools, and the dispatcher between them. The books' clock can be set ahead."""

    def __init__(self, *, gpu=4, engines=2, runway=2, lanes=False, faults=None, **of_the_rules):
        self.store = MemoryStore(clock=anyio.current_time)
        self.ahead_s = 0.0
        self.records = SlowRecords()
        self.rules = Rules(**of_the_rules)
        kinds = ("runway", "wan") if lanes else (None,)
        self.queues = {
            kind: WatchedQueue(store=self.store, worker_type=kind, lease_s=960, faults=faults or Faults())
            for kind in kinds
        }
        self.readings = Readings(self.records, clock=self.clock)
        self.ledger = Ledger(self.records, budget_usd=self.rules.budget_usd, clock=self.clock)
        self.gpu, self.runway = FakeContainers(), FakeContainers()
        self.pools = {"gpu": (Sized(slots=gpu, engines=engines), self.gpu)}
        if runway is not None:
            self.pools["runway"] = (Sized(slots=runway, engines=max(1, runway)), self.runway)
        self.dispatcher = self.another_dispatcher()

    def another_dispatcher(self):
        """One more beside the first, with a connection to everything."""
        return Dispatcher(self.queues, self.pools, self.readings, self.ledger, self.rules, price_usd=PRICE_USD)

    def clock(self):
        """Wall-clock seconds, as the books and the readings see them."""
        return NOON + self.ahead_s + anyio.current_time()

    def add(self, number=1, provider=None, **fields):
        """Puts tasks into the queue."""
        return [
            self.store.add(
                b"", inference_provider=provider, id=f"{provider or 'any'}-{len(self.store.items)}", **fields
            )
            for _ in range(number)
        ]

    async def tick(self):
        """One tick, and a look at where its leases are."""
        try:
            return await self.dispatcher.tick()
        finally:
            self.check()

    @property
    def given(self):
        """Every lease that any queue handed out."""
        return [lease for queue in self.queues.values() for lease in queue.given]

    def check(self):
        """Every lease is in exactly one pool or went back; no pool holds more than it has room for."""
        returned = [lease.worker_id for queue in self.queues.values() for lease in queue.returned]
        sent = [lease.worker_id for pool in (self.gpu, self.runway) for lease in pool.sent]
        assert sorted(returned + sent) == sorted(lease.worker_id for lease in self.given)
        for name, (size, containers) in self.pools.items():
            assert len(containers.running) <= size.slots, name

    def providers(self, containers):
        """Hints of what a pool holds."""
        return [lease.task.provider for lease in containers.running]

    async def pay(self, lease, *, ending="delivered", cost_usd=CLIP_USD):
        """What a Runway container does to the books for one lease. Raises BudgetSpent."""
        purchase = self.ledger.purchase(lease.task.item_id, lease.worker_id)
        if await purchase.resume("digest") is None:
            assert await purchase.intend("digest", model="gen4_turbo", cost_usd=cost_usd)
            await purchase.created(f"task-{lease.task.item_id}")
        if ending:
            await purchase.end(ending)

    def end(self, containers, lease, *, failed=False):
        """A lease ends, and its slot is free again."""
        containers.running.remove(lease)
        if failed:
            self.store.fail(lease.task.item_id, lease.worker_id, "no")
        else:
            self.store.complete(lease.task.item_id, lease.worker_id, "videos/x.mp4")


@virtual_time
async def test_each_task_goes_where_its_hint_says():
    """In one tick, from one queue."""
    it = Yard()
    for provider in (None, "gen4_turbo", "wan_local", "veo3.1"):
        it.add(provider=provider)
    said = await it.tick()
    assert it.providers(it.gpu) == [None, "wan_local"]
    assert it.providers(it.runway) == ["gen4_turbo", "veo3.1"]
    assert said.startswith("sent 2 to gpu, 2 to runway")
    assert [what for _, what in await it.readings.decisions()] == [said]


@virtual_time
async def test_nobody_pays_for_a_hint_that_is_not_known():
    """It waits for a GPU, even where none works, everything else overflows, and `wan_local` may."""
    for lanes in (False, True):
        it = Yard(lanes=lanes, overflow_wan_local=True, overflow_after_s=0)
        await it.readings.faulted("gpu", "no weights", certain=True)
        for provider in ("comfyui", None, "wan_local"):
            it.add(provider=provider)
        await it.tick()
        assert (it.providers(it.runway), it.providers(it.gpu)) == ([None, "wan_local"], [])
        await it.readings.worked("gpu", 10.0)
        await it.tick()
        assert it.providers(it.gpu) == ["comfyui"]


@virtual_time
async def test_a_pool_that_takes_nothing_leaves_its_tasks_to_others():
    """Somebody else takes them from the queue; the GPU does not, and what is for it is not held up."""
    for lanes in (False, True):
        it = Yard(runway=0, lanes=lanes)
        it.add(60, "veo3.1")
        it.add(2)
        if not lanes:  # no more than it looks past, or what stands behind them waits for its turn
            for item_id in list(it.store.items)[:20]:
                it.store.cancel(item_id)
        await it.tick()
        assert (it.providers(it.gpu), it.runway.sent) == ([None, None], [])
        assert it.dispatcher.troubles == []


@virtual_time
async def test_what_did_not_do_as_it_was_asked_is_told():
    """In the decision, and to whoever runs the tick; the next one begins anew."""
    it = Yard(runway=None)
    it.add(1)
    it.gpu.fails["live"] = PoolUnavailable("who are you")
    assert "gpu: who are you" in await it.tick()
    assert it.dispatcher.troubles == ["gpu: who are you"]
    it.gpu.fails = {"send": PoolUnavailable("no room")}
    assert "handed back 1; gpu: no room" in await it.tick()
    assert it.dispatcher.troubles == ["gpu: no room"]
    it.gpu.fails = {}
    it.queues[None].errors.append(QueueUnavailable("away"))
    await it.tick()
    assert it.dispatcher.troubles == ["away"]
    await it.tick()
    assert (it.dispatcher.troubles, len(it.gpu.running)) == ([], 1)


@virtual_time
async def test_without_a_runway_key_hints_are_only_hints():
    """Everything is for the GPU."""
    for lanes in (False, True):
        it = Yard(runway=None, lanes=lanes)
        it.add(2, "veo3.1")
        it.add(1)
        await it.tick()
        assert len(it.gpu.running) == 3


@virtual
@given(
    tasks=st.lists(st.tuples(st.sampled_from(HINTS), st.sampled_from([25, 121, 241, 700])), max_size=30),
    slots=st.tuples(st.integers(0, 5), st.none() | st.integers(0, 5)),
    lanes=st.booleans(),
    counts=st.booleans(),
    budget_usd=st.sampled_from([0.0, 0.3, 2.0, 50.0]),
    overflow_after_s=st.sampled_from([0.0, 60.0, 600.0]),
    troubled=st.dictionaries(st.sampled_from(["gpu", "runway"]), st.sampled_from(["live", "send"])),
    minutes=st.integers(1, 4),
)
def test_every_lease_ends_up_in_one_place(
    *, tasks, slots, lanes, counts, budget_usd, overflow_after_s, troubled, minutes
):
    """Whatever the queue holds and whatever the pools do: sent once, or handed back before the tick ends."""

    async def scene():
        gpu, runway = slots
        it = Yard(gpu=gpu, runway=runway, lanes=lanes, budget_usd=budget_usd, overflow_after_s=overflow_after_s)
        for queue in it.queues.values():
            queue.counts = counts
        for provider, frame_num in tasks:
            it.add(provider=provider, frame_num=frame_num)
        for name, method in troubled.items():
            getattr(it, name).fails[method] = PoolUnavailable("no")
        for _ in range(minutes):
            await it.tick()
            await anyio.sleep(60)
        held = {lease.task.item_id for pool in (it.gpu, it.runway) for lease in pool.running}
        for item in it.store.items.values():
            assert item.status == ("processing" if item.id in held else "pending")
        assert await it.ledger.spent_usd() <= budget_usd + HALF_A_CENT

    run_virtual(scene)


@virtual
@given(
    weather=st.sampled_from([0.05, 0.3, 0.8]),
    tasks=st.integers(0, 12),
    lanes=st.booleans(),
    seed=st.integers(0, 10_000),
)
def test_a_queue_that_loses_messages_costs_no_task(weather, tasks, lanes, seed):
    """Requests, replies and answers go missing; what the dispatcher was told of, it sends or hands back."""

    async def scene():
        faults = Faults(lose_request=weather / 4, lose_reply=weather / 4, answer_500=weather / 4, stall=weather / 4)
        it = Yard(lanes=lanes, faults=faults)
        for queue in it.queues.values():
            queue.random.seed(seed)
        for number in range(tasks):
            it.add(provider=HINTS[number % len(HINTS)])
        for _ in range(3):
            began_at = anyio.current_time()
            await it.dispatcher.tick()
            assert anyio.current_time() - began_at < APP_LIMIT_S
            known = {lease.worker_id for lease in it.given}
            sent = [lease.worker_id for pool in (it.gpu, it.runway) for lease in pool.sent]
            returned = {lease.worker_id for queue in it.queues.values() for lease in queue.returned}
            assert len(sent) == len(set(sent))
            assert known == returned | set(sent)
            assert not returned & set(sent)
            await anyio.sleep(60)

    run_virtual(scene)


DELAYS = st.sampled_from([0.0, 0.0, 0.5, 5.0, 9.9, 30.0, 1000.0])


@virtual
@given(
    live=DELAYS,
    send=DELAYS,
    lease=DELAYS,
    release=DELAYS,
    backlog=DELAYS,
    records=st.sampled_from([0.0, 0.0, 0.5, 2.0, 1000.0]),
    lanes=st.booleans(),
    failing=st.booleans(),
)
@example(live=9.9, send=9.9, lease=9.9, release=1000, backlog=0, records=0.5, lanes=True, failing=True)
@example(live=0, send=9.9, lease=9.9, release=1000, backlog=9.9, records=2, lanes=True, failing=False)
def test_a_tick_ends_before_the_next_one(*, live, send, lease, release, backlog, records, lanes, failing):
    """However long each call takes; and what it holds when its time is up goes back."""

    async def scene():
        it = Yard(lanes=lanes, runway=5)
        if failing:
            await it.readings.faulted("gpu", "no weights", certain=True)
            it.ahead_s += 2 * PROBE_AFTER_S
        it.add(6, "gen4_turbo")
        it.add(20)
        it.records.takes_s = records
        for pool in (it.gpu, it.runway):
            pool.takes_s = {"live": live, "send": send}
        for queue in it.queues.values():
            queue.takes_s = {"lease": lease, "release": release, "backlog": backlog}
        try:
            await it.dispatcher.tick()
        except PoolUnavailable:
            assert not it.given
        assert anyio.current_time() < APP_LIMIT_S
        it.check()

    run_virtual(scene)


@virtual
@given(after_s=st.floats(0, 30), lanes=st.booleans(), lands_late=st.booleans())
def test_a_cancelled_tick_hands_everything_back(after_s, lanes, lands_late):
    """The cron's container is stopped, perhaps while a spawn is on its way: no lease is left to run out."""

    async def scene():
        it = Yard(lanes=lanes, gpu=8, runway=1, budget_usd=CLIP_USD)
        it.add(3, "gen4_turbo")
        it.add(9)
        for pool in (it.gpu, it.runway):
            pool.takes_s["send"], pool.lands_late = 3.0, lands_late
        for queue in it.queues.values():
            queue.takes_s["lease"] = 1.0
        with anyio.move_on_after(after_s):
            await it.dispatcher.tick()
        sent = {lease.worker_id for pool in (it.gpu, it.runway) for lease in pool.sent}
        returned = {lease.worker_id for queue in it.queues.values() for lease in queue.returned}
        assert sent | returned == {lease.worker_id for lease in it.given}
        if lands_late:  # one spawn may have been on its way: that container is told that its lease is gone
            assert len(sent & returned) <= 1
        else:
            assert not sent & returned
        free = [item for item in it.store.items.values() if item.status == "pending"]
        assert len(free) == 12 - len(sent - returned)
        paid_for = [lease for lease in it.runway.sent if lease.worker_id not in returned]
        assert await it.ledger.spent_usd() == pytest.approx(CLIP_USD * len(paid_for))

    run_virtual(scene)


@virtual_time
async def test_a_refused_spawn_closes_only_its_pool():
    """The lease goes back, that pool gets no more in this tick, and the other one is served."""
    it = Yard()
    it.add(3)
    it.add(2, "gen4_turbo")
    it.gpu.fails["send"] = PoolUnavailable("no such app")
    said = await it.tick()
    assert len(it.gpu.running) == 0
    assert len(it.runway.running) == 2
    assert "gpu: no such app" in said
    assert [item.status for item in it.store.items.values()] == ["pending"] * 3 + ["processing"] * 2
    it.gpu.fails.clear()
    await anyio.sleep(60)
    await it.tick()
    assert len(it.gpu.running) == 3


@virtual_time
async def test_money_for_a_refused_spawn_is_not_kept():
    """The last dollars of the day are there for the next try."""
    it = Yard(budget_usd=CLIP_USD)
    it.add(1, "gen4_turbo")
    it.runway.fails["send"] = PoolUnavailable("no such app")
    await it.tick()
    assert await it.ledger.spent_usd() == 0
    it.runway.fails.clear()
    await it.tick()
    assert len(it.runway.running) == 1


@virtual_time
async def test_money_is_set_aside_before_a_task_is_sent():
    """A container that pays at once finds it reserved, and whoever looks at the books meanwhile sees it."""
    it = Yard()
    spent = []

    class Looking(FakeContainers):
        async def send(self, lease):
            spent.append(await it.ledger.spent_usd())
            await FakeContainers.send(self, lease)

    it.pools["runway"] = (it.pools["runway"][0], Looking())
    it.add(2, "gen4_turbo")
    await it.dispatcher.tick()
    assert spent == [CLIP_USD, 2 * CLIP_USD]


@virtual_time
async def test_books_that_cannot_be_written_close_runway_alone():
    """Nothing is paid for without them; the GPU pool needs none."""
    it = Yard()
    it.add(1, "gen4_turbo")
    it.add(2)

    async def reserve(*_):
        raise RecordsUnavailable("no")

    it.ledger.reserve = reserve
    await it.tick()
    assert (len(it.gpu.running), len(it.runway.running)) == (2, 0)


@virtual_time
async def test_an_unreachable_pool_gets_nothing():
    """Where it cannot be seen how full a pool is, nothing is sent there; after one that hangs the other is served."""
    it = Yard()
    it.add(3)
    it.add(1, "gen4_turbo")
    it.gpu.fails["live"] = PoolUnavailable("no such app")
    await it.tick()
    assert (len(it.gpu.running), len(it.runway.running)) == (0, 1)  # no answer is no reason to pay elsewhere
    it = Yard()
    it.add(3)
    it.runway.takes_s["live"] = 1e9
    await it.tick()
    assert len(it.gpu.running) == 3


@virtual_time
async def test_a_queue_that_is_away_ends_the_tick_in_peace():
    """It says so; the next minute tries again."""
    it = Yard(lanes=True)
    it.add(1)
    for queue in it.queues.values():
        queue.errors = [QueueUnavailable("away")]
    assert "away" in await it.tick()
    await it.tick()
    assert len(it.gpu.running) == 1


@virtual_time
async def test_a_refused_key_hands_back_what_was_leased():
    """The error is told; no lease is kept."""
    it = Yard(gpu=0)
    it.add(2)
    it.queues[None].errors = [None, None, QueueAuthError("no")]
    with pytest.raises(QueueAuthError):
        await it.tick()
    assert [item.status for item in it.store.items.values()] == ["pending"] * 2


@virtual_time
async def test_malformed_tasks_do_not_stop_a_tick():
    """Their queue reported them; the ones behind them are sent. A queue of nothing else is left for the next tick."""
    it = Yard()
    it.add(2)
    it.queues[None].errors = [InvalidTask("frame_num", item_id="x"), None, InvalidTask("frame_num", item_id="y")]
    assert "2 malformed" in await it.tick()
    assert len(it.gpu.running) == 2
    it.queues[None].errors = [InvalidTask("frame_num")] * 1000
    await it.tick()
    assert len(it.queues[None].errors) == 1000 - LOOK_AHEAD["gpu"]


@virtual_time
async def test_malformed_tasks_of_one_kind_leave_the_other_alone():
    """Each lane has its own patience."""
    it = Yard(lanes=True)
    it.add(2)
    it.queues["runway"].errors = [InvalidTask("frame_num")] * 1000
    await it.tick()
    assert len(it.gpu.running) == 2


# ---------------------------------------------------------------- neither lane starves


@pytest.mark.parametrize("lanes", [True, False])
@virtual_time
async def test_a_full_gpu_pool_does_not_starve_runway(lanes):
    """Tasks for Runway behind a few that wait for a GPU are found; with lanes, behind any number."""
    it = Yard(gpu=0, lanes=lanes)
    it.add(200 if lanes else LOOK_AHEAD["gpu"] - 1, "wan_local")
    it.add(2, "gen4_turbo")
    await it.tick()
    assert it.providers(it.runway) == ["gen4_turbo"] * 2


@pytest.mark.parametrize("lanes", [True, False])
@pytest.mark.parametrize("why", ["full", "spent", "little left", "failing"])
@virtual_time
async def test_a_stuck_runway_pool_does_not_starve_the_gpu(why, lanes):
    """Tasks that only Runway may take can stand in the queue until midnight; those behind them go to the GPU."""
    it = Yard(runway=0 if why == "full" else 5, lanes=lanes, budget_usd={"spent": 0.0, "little left": 0.1}.get(why, 10))
    if why == "failing":
        await it.readings.faulted("runway", "no credits", certain=True)
    it.add(200 if lanes else LOOK_AHEAD["runway"] - 1, "gen4_turbo")
    it.add(3)
    await it.tick()
    assert it.providers(it.gpu) == [None] * 3
    assert not it.runway.running


@virtual_time
async def test_how_far_a_tick_looks_is_limited():
    """In a queue without lanes, which has to be asked for one task after the other: a known limit."""
    it = Yard(gpu=0)
    it.add(LOOK_AHEAD["gpu"], "wan_local")
    it.add(1, "gen4_turbo")
    await it.tick()
    assert not it.runway.running
    assert len(it.given) == LOOK_AHEAD["gpu"]


@virtual
@given(st.lists(st.sampled_from(["wan_local", "gen4_turbo"]), min_size=1, max_size=24), st.booleans())
def test_everything_is_served_in_the_end(providers, lanes):
    """Minute by minute, with clips that take four minutes in either pool, and money for all."""

    async def scene():
        it = Yard(gpu=2, runway=2, lanes=lanes, budget_usd=100)
        for provider in providers:
            it.add(provider=provider)
        for _ in range(4 * len(providers) + 4):
            await it.tick()
            for containers in (it.gpu, it.runway):
                for lease in list(containers.running):
                    if it.store.get(lease.task.item_id).leased_until - anyio.current_time() <= 960 - 180:
                        it.end(containers, lease)
            await anyio.sleep(60)
        assert {item.status for item in it.store.items.values()} == {"completed"}

    run_virtual(scene)


# ---------------------------------------------------------------- overflow


@virtual_time
async def test_overflow_counts_only_the_excess():
    """Two engines at 60 s a clip make twenty clips in ten minutes: the twenty-first waits too long."""
    for lanes in (False, True):
        it = Yard(gpu=4, engines=2, runway=10, lanes=lanes)
        it.add(23)
        await it.tick()
        assert (len(it.gpu.running), len(it.runway.running)) == (4, 3)


@virtual_time
async def test_tasks_for_runway_do_not_count_as_waiting_for_a_gpu():
    """Where the queue tells kinds apart."""
    it = Yard(gpu=4, engines=2, runway=10, lanes=True, budget_usd=100)
    it.add(100, "gen4_turbo")
    it.add(6)
    await it.tick()
    assert it.providers(it.gpu) == [None] * 4
    assert it.providers(it.runway) == ["gen4_turbo"] * 10


@virtual_time
async def test_wan_local_overflows_only_where_it_may():
    """Even when the GPU pool fails."""
    for allowed in (False, True):
        it = Yard(overflow_wan_local=allowed)
        await it.readings.faulted("gpu", "no weights", certain=True)
        it.add(2, "wan_local")
        await it.tick()
        assert len(it.runway.running) == (2 if allowed else 0)


@virtual_time
async def test_an_unknown_backlog_overflows_after_a_while():
    """Ten minutes with a full GPU pool and a queue that was never seen empty; one look at an empty one starts anew."""
    it = Yard(gpu=1, engines=1)
    it.queues[None].counts = False
    await it.tick()  # it is empty
    it.add(4)
    for minute in range(12):
        await anyio.sleep(60)
        await it.tick()
        assert len(it.gpu.running) == 1
        assert bool(it.runway.running) == (minute >= 10), minute
    assert len(it.runway.running) == 2


@virtual_time
async def test_tasks_that_wait_for_runway_alone_do_not_make_a_queue_look_full():
    """Otherwise the first minute with a full GPU pool would look like hours of waiting."""
    it = Yard(gpu=1, engines=1, budget_usd=CLIP_USD / 2)
    it.queues[None].counts = False
    it.add(3, "gen4_turbo")
    for _ in range(30):
        await it.tick()
        await anyio.sleep(60)
    assert await it.readings.undry_s() <= 60


# ---------------------------------------------------------------- failing pools


@virtual_time
async def test_a_failing_pool_is_probed_and_otherwise_left_alone():
    """No lease until a container has shown that it works; one is asked after ten minutes, then ever more rarely."""
    it = Yard(runway=None)
    await it.readings.faulted("gpu", "no weights", certain=True)
    it.add(3)
    probes = []
    for _ in range(75):
        await it.tick()
        probes.append(it.gpu.probes)
        await anyio.sleep(60)
    assert [probes.index(number) for number in (1, 2, 3)] == [10, 30, 70]
    assert not it.given
    await it.readings.worked("gpu")
    await it.tick()
    assert len(it.gpu.running) == 3


@virtual_time
async def test_nobody_is_asked_while_nobody_waits():
    """A container that only shows whether it works is billed, too."""
    it = Yard(runway=None)
    await it.readings.faulted("gpu", "no weights", certain=True)
    for _ in range(30):
        await it.tick()
        await anyio.sleep(60)
    assert it.gpu.probes == 0


@virtual_time
async def test_runway_is_asked_again_whoever_waits():
    """With a queue that hands out by kind what waits is counted for the GPU alone; asking Runway costs next to none."""
    it = Yard(lanes=True)
    await it.readings.faulted("runway", "no credits", certain=True)
    it.add(1, "gen4_turbo")
    it.ahead_s += PROBE_AFTER_S
    await it.tick()
    assert it.runway.probes == 1


@virtual_time
async def test_containers_that_never_become_ready_are_a_failing_pool():
    """What waits for one for half an hour is no reason to send more; it is over when nothing waits any more."""
    it = Yard()
    it.gpu.is_ready = False
    for _ in range(33):
        it.add(1)
        await it.tick()
        await anyio.sleep(60)
    assert "no container has become ready" in (await it.readings.decisions())[-1][1]
    assert it.runway.sent
    sent = len(it.gpu.sent)
    it.gpu.running.clear()
    it.add(1)
    await it.tick()
    assert len(it.gpu.sent) > sent


@virtual_time
async def test_a_probe_that_is_refused_is_no_end_of_a_tick():
    """The other pool is served all the same."""
    it = Yard()
    await it.readings.faulted("gpu", "no weights", certain=True)
    it.ahead_s += PROBE_AFTER_S
    it.gpu.fails["send"] = PoolUnavailable("no such app")
    it.add(1, "gen4_turbo")
    await it.tick()
    assert len(it.runway.running) == 1


# ---------------------------------------------------------------- money


@virtual
@given(
    steps=st.lists(
        st.tuples(
            st.sampled_from(HINTS),
            st.sampled_from([49, 121, 241]),
            st.sampled_from(["pay", "pay and fail", "fail before paying", "vanish", "wait"]),
            st.sampled_from([60.0, 60.0, 1800.0, 2 * RESERVED_S, 86_400.0]),
        ),
        max_size=25,
    ),
    budget_usd=st.sampled_from([0.2, 1.0, 3.0]),
    lanes=st.booleans(),
)
def test_the_daily_budget_holds(steps, budget_usd, lanes):
    """Through days of tasks that are paid for, fail, or are never heard of again: money out and money set aside."""

    async def scene():
        it = Yard(gpu=1, runway=3, lanes=lanes, budget_usd=budget_usd, overflow_after_s=60)
        for provider, frame_num, ending, pause_s in steps:
            it.add(2, provider, frame_num=frame_num)
            await it.tick()
            assert await it.ledger.spent_usd() <= budget_usd + HALF_A_CENT
            for lease in list(it.runway.running):
                if ending in ("pay", "pay and fail"):
                    price_usd = PRICE_USD(lease.task) or 0.0
                    await it.pay(lease, ending="failed" if "fail" in ending else "delivered", cost_usd=price_usd)
                if ending == "vanish":
                    it.runway.running.remove(lease)
                elif ending != "wait" and it.store.get(lease.task.item_id).worker_id == lease.worker_id:
                    it.end(it.runway, lease, failed=ending != "pay")
                else:
                    it.runway.running.remove(lease)
            it.gpu.running.clear()
            it.ahead_s += pause_s
            days = {}
            for payment in await it.ledger.payments():
                day = math.floor(payment.at / 86_400)
                days[day] = days.get(day, 0.0) + payment.cost_usd
            assert all(spent <= budget_usd + HALF_A_CENT for spent in days.values())

    run_virtual(scene)


@virtual_time
async def test_the_budget_of_a_day_is_spent_and_no_more():
    """Four clips at a quarter; the others wait for tomorrow, and the GPU takes none of them."""
    it = Yard(runway=10, budget_usd=1.0)
    it.add(6, "gen4_turbo")
    await it.tick()
    assert len(it.runway.running) == 4
    for lease in list(it.runway.running):
        await it.pay(lease)
        it.end(it.runway, lease)
    await it.tick()
    assert not it.runway.running
    it.ahead_s += 86_400
    await it.tick()
    assert len(it.runway.running) == 2
    assert not it.gpu.sent


@virtual_time
async def test_what_was_paid_for_is_fetched_whatever_the_budget_says():
    """A container died with a clip under way at Runway: its task goes back there, not to a GPU, and costs nothing."""
    it = Yard(budget_usd=CLIP_USD, overflow_after_s=0, gpu=0)
    [item] = it.add(1)
    await it.tick()
    [lease] = it.runway.running
    await it.pay(lease, ending=None)
    it.runway.running.clear()
    await anyio.sleep(961)
    assert it.store.get(item.id).status == "processing"  # its lease ran out
    it.pools["gpu"] = (Sized(slots=2, engines=1), it.gpu)
    it.add(1, "gen4_turbo")
    await it.tick()
    assert [lease.task.item_id for lease in it.runway.running] == [item.id]
    assert await it.ledger.spent_usd() == CLIP_USD


@virtual_time
async def test_a_clip_that_runway_cannot_make_is_told_so_there():
    """Its engine names what is wrong, before anything is paid; no money is set aside for it."""
    it = Yard(budget_usd=1)
    it.add(1, "gen4_turbo", frame_num=1000)
    await it.tick()
    assert len(it.runway.running) == 1
    assert await it.ledger.spent_usd() == 0


# ---------------------------------------------------------------- two ticks at once


@virtual
@given(tasks=st.integers(0, 20), apart_s=st.floats(0, 3), lanes=st.booleans(), delay_s=st.floats(0, 1))
def test_two_ticks_at_once_do_no_harm(tasks, apart_s, lanes, delay_s):
    """No task is sent twice. Both may set the same dollars aside and fill the same slots, which one limit of the
    platform (`max_containers=1`) rules out; but what is *paid* stays within the budget even so.
    """

    async def scene():
        it = Yard(lanes=lanes, budget_usd=3 * CLIP_USD, runway=5, faults=Faults(delay_s=delay_s))
        other = it.another_dispatcher()
        it.add(tasks)
        it.add(tasks, "gen4_turbo")
        async with anyio.create_task_group() as both:
            both.start_soon(it.dispatcher.tick)
            await anyio.sleep(apart_s)
            both.start_soon(other.tick)
        sent = [lease.task.item_id for pool in (it.gpu, it.runway) for lease in pool.sent]
        assert len(sent) == len(set(sent))
        paid = 0
        for lease in it.runway.sent:
            try:
                await it.pay(lease)
                paid += 1
            except BudgetSpent:
                continue
        assert paid <= 3

    run_virtual(scene)
