"""A whole fleet under trio's virtual clock: cron, containers that come and go, Runway, and money; replayable by seed.

`python -m tests.simulation.fleet --seeds 1000` runs as many as wanted; `--seed 42` replays one and prints its log.

One seed makes one world: a MemoryStore, a cron that runs the real Dispatcher, a platform whose containers start
cold, run the real WarmWorker, are preempted (their calls come back), killed, or cannot load their weights for a
while, and a provider that takes money, with the real Ledger between it and the containers. Messages to the queue, the
records and the provider are lost on the way. Then the weather clears, and `check` looks for broken promises.
"""

import argparse
import functools
import math
import random
import shutil
import sys
import tempfile
import time
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import anyio
from anyio.abc import TaskGroup

from inference.build.engines import price_usd
from inference.engines.base import Job
from inference.engines.runway.models import model_for
from inference.errors import (
    CancelRequested,
    EngineFailed,
    EngineLost,
    I2VError,
    LeaseLost,
    PoolUnavailable,
    RecordsUnavailable,
    Refusal,
    WeightsError,
)
from inference.fleet.containers import Live, Sized
from inference.fleet.dispatch import Dispatcher
from inference.fleet.plan import Rules, may_stay
from inference.fleet.readings import Readings
from inference.fleet.warm_worker import BrokenEngine, WarmWorker
from inference.leasing.retry import Policy
from inference.leasing.runner import Runner
from inference.payments.ledger import HALF_A_CENT, Ledger, digest
from inference.payments.records import MemoryRecords
from inference.providers import provider_of
from inference.settings import Settings
from inference.task import GenerationRequest, Lease, Video
from inference.testing.memory_queue import Faults
from inference.testing.memory_store import MemoryStore
from tests.simulation.leases import (
    PHOTO,
    TERMINAL,
    Broken,
    Generation,
    MortalQueue,
    SimulatedEngine,
    check_fenced,
    check_one_end,
    quiet,
)
from tests.support.virtual import run_virtual

MINUTE_S = 60.0
DAY_S = 86_400.0
TICK_LIMIT_S = 55.0  # the timeout of `dispatch` in app.py
GRACE_S = 30.0  # what a platform leaves a container on its way out
SETTLE_S = 24 * 3600.0


# ---------------------------------------------------------------- the platform


@dataclass(eq=False)
class Call:
    """One input of a platform's function. It comes back when its container is preempted."""

    lease: Lease | None


@dataclass(eq=False)
class Container:
    """One container, from its cold start to its end. Billed all along."""

    name: str
    began_at: float
    warm_at: float = math.inf
    ended_at: float = math.inf
    running: list[Call] = field(default_factory=list)
    host: WarmWorker | None = None
    leaving: bool = False
    dead: bool = False  # killed: nothing of it is heard any more
    life: anyio.CancelScope = field(default_factory=anyio.CancelScope)
    calls: anyio.CancelScope = field(default_factory=anyio.CancelScope)


class SimulatedPool:
    """Containers: a function of a platform that scales with its inputs, as Modal's do."""

    def __init__(
        self,
        group: TaskGroup,
        open_warm_worker: Callable[[Container], WarmWorker],
        *,
        name: str,
        max_containers: int,
        inputs: int,
        cold_start_s: float,
        scaledown_s: float,
    ) -> None:
        self._group, self._open_warm_worker, self._name = group, open_warm_worker, name
        self._max_containers, self._inputs = max_containers, inputs
        self._cold_start_s, self._scaledown_s = cold_start_s, scaledown_s
        self._changed = anyio.Event()
        self.backlog: deque[Call] = deque()
        self.containers: list[Container] = []
        self.history: list[Container] = []
        self.trouble: Callable[[], str | None] = lambda: None  # with the platform's own calls

    async def live(self):
        """See Containers."""
        await self._answer(None)
        return Live(running=sum(len(each.running) for each in self.containers), waiting=len(self.backlog))

    async def send(self, lease):
        """See Containers."""
        await self._answer(lambda: self._take(Call(lease)))

    def preempt(self, container):
        """Its calls are cancelled and come back to another container; it has a while for its good-byes."""
        container.leaving = True
        container.calls.cancel()
        self._notify()

    def kill(self, container):
        """It is gone from one moment to the next; its calls come back."""
        container.dead = True
        container.life.cancel()

    async def _answer(self, work):
        trouble = self.trouble()
        await anyio.sleep(0.1)
        if trouble == "hang":
            await anyio.sleep(1000)
        if work and trouble != "lost":
            work()
        if trouble:
            raise PoolUnavailable(f"the platform does not answer ({trouble})")

    def _take(self, call):
        self.backlog.append(call)
        self._scale()

    def _scale(self):
        open_ = [each for each in self.containers if not each.leaving and not (each.host and each.host.broken)]
        wanted = math.ceil((len(self.backlog) + sum(len(each.running) for each in open_)) / self._inputs)
        for _ in range(min(wanted, self._max_containers) - len(open_)):
            if len(self.containers) >= self._max_containers + 2:  # those on their way out count, too, after a while
                return
            self._start()
        self._notify()

    def _start(self):
        container = Container(f"{self._name}{len(self.history)}", anyio.current_time())
        self.containers.append(container)
        self.history.append(container)
        self._group.start_soon(self._live, container)

    def _notify(self):
        self._changed.set()
        self._changed = anyio.Event()

    async def _live(self, container):
        try:
            with container.life:
                await anyio.sleep(self._cold_start_s)
                container.warm_at = anyio.current_time()
                container.host = self._open_warm_worker(container)
                async with anyio.create_task_group() as process:
                    process.start_soon(container.host.serve)
                    await self._work(container)
                    with anyio.move_on_after(GRACE_S):
                        await container.host.close()
                    process.cancel_scope.cancel()
        finally:
            container.ended_at = anyio.current_time()
            self.containers.remove(container)
            self.backlog.extendleft(container.running)
            container.running = []
            if self.backlog:
                self._scale()

    async def _work(self, container):
        async with anyio.create_task_group() as calls:
            container.calls = calls.cancel_scope
            idle_since = anyio.current_time()
            while not container.leaving:
                while self.backlog and len(container.running) < self._inputs and not container.host.broken:
                    call = self.backlog.popleft()
                    container.running.append(call)
                    calls.start_soon(self._run, container, call)
                if container.running:
                    idle_since = math.inf
                elif container.host.broken or anyio.current_time() >= idle_since + self._scaledown_s:
                    break
                elif idle_since == math.inf:
                    idle_since = anyio.current_time()
                changed = self._changed
                with anyio.CancelScope(deadline=idle_since + self._scaledown_s):
                    await changed.wait()
            container.leaving = True

    async def _run(self, container, call):
        with suppress(EngineLost):  # it is stopping
            await container.host.run(call.lease)
        container.running.remove(call)
        self._notify()


async def cron(tick: Callable[[], Awaitable[object]], *, on_tick: Callable[[float], None] = lambda _: None) -> None:
    """Every minute, one at a time, and ended by the platform where it takes too long."""
    while True:
        began_at = anyio.current_time()
        with anyio.move_on_after(TICK_LIMIT_S), suppress(I2VError):
            await tick()
        on_tick(anyio.current_time() - began_at)
        await anyio.sleep_until(began_at + MINUTE_S * math.ceil((anyio.current_time() - began_at + 1e-9) / MINUTE_S))


# ---------------------------------------------------------------- records and the provider


class FlakyRecords(MemoryRecords):
    """Records whose calls get lost, before or after they were carried out."""

    def __init__(self, pick):
        super().__init__()
        self.pick, self.weather = pick, 0.0

    def seen_by(self, container):
        """The same records over a container's own line, which goes silent with it."""
        return RecordsOf(self, container)

    async def call(self, method, *arguments):
        """One call over a line."""
        chance = self.pick.random()
        await anyio.sleep(self.pick.uniform(0, 0.2))
        if chance < self.weather / 2:
            raise RecordsUnavailable("the request was lost")
        answer = await getattr(MemoryRecords, method)(self, *arguments)
        if chance < self.weather:
            raise RecordsUnavailable("the answer was lost")
        return answer


@dataclass
class RecordsOf:
    """Records, as one process reaches them."""

    records: FlakyRecords
    container: Container | None

    def __getattr__(self, method):
        async def call(*arguments):
            if self.container and self.container.dead:
                await anyio.sleep_forever()
            return await self.records.call(method, *arguments)

        return call


@dataclass
class Charge:
    """One clip that the provider was asked for: money, whatever becomes of it."""

    item_id: str
    cost_usd: float
    at: float
    ends_at: float
    ending: str
    stopped: bool = False

    @property
    def status(self):
        """As the provider tells it."""
        if self.stopped:
            return "CANCELLED"
        return "RUNNING" if anyio.current_time() < self.ends_at else self.ending


class Lost(Exception):
    """A request to the provider was not answered; `sent` where it was carried out."""

    def __init__(self, *, sent):
        super().__init__()
        self.sent = sent


class Provider:
    """Takes money for every creation that reaches it, the same one twice if it is asked twice."""

    def __init__(self, pick, clip_s):
        self.pick, self.clip_s = pick, clip_s
        self.weather = self.failures = 0.0
        self.charges: dict[str, Charge] = {}

    async def create(self, item_id, cost_usd):
        """A new generation: its id. Raises Lost."""
        await anyio.sleep(self.pick.uniform(0.1, 2))
        chance = self.pick.random()
        if chance < self.weather / 2:
            raise Lost(sent=False)
        now, name = anyio.current_time(), f"task-{len(self.charges)}"
        ending = "FAILED" if self.pick.random() < self.failures else "SUCCEEDED"
        self.charges[name] = Charge(item_id, cost_usd, now, now + self.clip_s * self.pick.uniform(0.5, 2), ending)
        if chance < self.weather:
            await anyio.sleep(60)
            raise Lost(sent=True)
        return name


@dataclass
class PaidEngine:
    """engines/runway/ without HTTP, files and threads: the same steps in the same order, on the real books."""

    provider: Provider
    container: Container
    model: str
    name: str = "paid"
    stages: dict[str, float] = field(default_factory=lambda: {"order": 1.0, "render": 9.0})

    async def check(self):
        """See Engine."""

    async def generate(self, request: GenerationRequest, inputs: dict[str, Path], folder: Path, job: Job) -> Video:  # noqa: ARG002
        """See Engine."""
        item_id = request.prompt
        model = model_for(request.provider, self.model)
        cost_usd = model.cost_usd(request.duration_s, audio=False)
        job.report("order")
        task_id = await self._pay(job, item_id, model.name, cost_usd)
        job.report("render")
        try:
            while (status := self.provider.charges[task_id].status) == "RUNNING":
                await anyio.sleep(5)
                job.raise_if_cancelled()
        except (CancelRequested, LeaseLost, anyio.get_cancelled_exc_class()):
            await self._let_go(job, task_id)
            raise
        if status != "SUCCEEDED":
            with suppress(RecordsUnavailable):
                await job.purchase.end("failed", "INTERNAL")
            raise EngineFailed(f"task {task_id}: {status}")
        path = folder / "runway.mp4"
        path.write_text(f"{item_id} by {task_id}")
        size_bytes = path.stat().st_size
        return Video(path=path, width=64, height=48, fps=24, frames=25, size_bytes=size_bytes, cost_usd=cost_usd)

    async def _pay(self, job, item_id, model, cost_usd):
        request = digest(item=item_id)
        while True:
            paid = await job.purchase.resume(request)
            if paid is not None:
                return paid.external_id
            if not await job.purchase.intend(request, model=model, cost_usd=cost_usd):
                continue
            with anyio.CancelScope(shield=True):
                if self.container.dead:
                    await anyio.sleep_forever()
                try:
                    task_id = await self.provider.create(item_id, cost_usd)
                except Lost as lost:
                    if not lost.sent:
                        with suppress(RecordsUnavailable):
                            await self._within(job.purchase.withdraw)
                        raise EngineFailed("the provider cannot be reached") from None
                    continue  # which finds our own intent, and says that it is in doubt
                with suppress(RecordsUnavailable):
                    await self._within(partial(job.purchase.created, task_id, cost_usd))
                return task_id

    async def _let_go(self, job, task_id):
        reason = job.cancelled_by
        if reason is None or (isinstance(reason, LeaseLost) and not reason.confirmed):
            return  # whoever gets the task next goes on with it
        with anyio.CancelScope(shield=True), anyio.move_on_after(10), suppress(RecordsUnavailable):
            charge = self.provider.charges[task_id]
            if await job.purchase.is_ours() and charge.status == "RUNNING":
                charge.stopped = True
                await job.purchase.end("cancelled")

    async def _within(self, work):
        with anyio.move_on_after(15):
            await work()


# ---------------------------------------------------------------- one world


class World:
    """Everything one seed stands for."""

    def __init__(self, seed: int, folder: Path) -> None:
        self.random = pick = random.Random(seed)
        self.folder = folder
        self.store = MemoryStore(clock=anyio.current_time)
        self.ahead_s = 0.0
        self.calm = pick.random() < 0.4  # no message is lost; spawns are refused, containers preempted, weights fail
        weather = 0.0 if self.calm else pick.choice([0.0, 0.02, 0.1])
        self.faults = Faults(
            lose_request=weather * pick.random(),
            lose_reply=weather * pick.random(),
            answer_500=weather * pick.random(),
            stall=weather * pick.random(),
            double_lease=0.0 if self.calm else pick.choice([0.0, 0.2]),
            delay_s=pick.choice([0.0, 0.1, 1.0]),
        )
        self.lanes = pick.random() < 0.5
        self.counts = pick.random() < 0.5
        self.records = FlakyRecords(random.Random(pick.random()))
        self.records.weather = 0.0 if self.calm else pick.choice([0.0, 0.01, 0.05])
        self.provider = Provider(random.Random(pick.random()), pick.choice([20.0, 90.0]))
        self.provider.weather = 0.0 if self.calm else pick.choice([0.0, 0.1])
        self.provider.failures = pick.choice([0.0, 0.2])
        self.has_runway = pick.random() < 0.8
        self.platform_trouble = pick.choice([0.0, 0.05, 0.2])
        self.violence = pick.choice([0.0, 1 / 1200, 1 / 200])  # containers struck, a second
        self.broken_until = pick.choice([0.0, 0.0, 900.0, 3000.0])
        self.engine_trouble = pick.choice([0.0, 0.0, 0.05])
        self.clip_s = pick.choice([12.0, 42.0, 300.0])
        self.cold_start_s = pick.choice([5.0, 60.0, 200.0])
        if self.calm and self.violence > 1 / 300:  # or a lease could wait for containers that never get warm
            self.cold_start_s = 5.0
        self.drain = pick.random() < 0.75
        self.linger_s = pick.choice([0.0, 20.0, 120.0])
        self.max_containers = pick.choice([1, 2, 4])
        self.tier = pick.choice([1, 3])
        self.generations: list[Generation] = []
        self.unrest = True
        self.rules = Rules(
            overflow_after_s=pick.choice([0.0, 120.0, 600.0]),
            overflow_wan_local=pick.random() < 0.5,
            budget_usd=pick.choice([0.0, 0.6, 5.0]),
        )
        self.base = datetime(2026, 11, 21, pick.randrange(24), tzinfo=UTC).timestamp()

    def clock(self) -> float:
        """Wall-clock seconds of everybody."""
        return self.base + self.ahead_s + anyio.current_time()

    async def run(self) -> None:
        """Storms first, then fair weather until everything has ended and everybody has gone home."""
        async with anyio.create_task_group() as world:
            self.gpu = self._pool(world, "g", self._gpu_host, self.max_containers, 2)
            self.runway = self._pool(world, "r", self._runway_host, 1, self.tier)
            world.start_soon(self._cron)
            world.start_soon(self._violence)
            await self._people()
            await anyio.sleep(self.random.uniform(0, 1800))
            self._clear()
            await self._settle()
            world.cancel_scope.cancel()

    def _pool(self, group, name, open_warm_worker, max_containers, inputs):
        pool = SimulatedPool(
            group,
            open_warm_worker,
            name=name,
            max_containers=max_containers,
            inputs=inputs,
            cold_start_s=self.cold_start_s if name == "g" else 3.0,
            scaledown_s=2.0 if self.drain else max(2.0, self.linger_s),
        )

        def trouble():
            is_troubled = self.unrest and self.random.random() < self.platform_trouble
            return self.random.choice(["lost", "carried out", "hang"]) if is_troubled else None

        pool.trouble = trouble
        return pool

    def _queue(self, name, kind, container=None, lease_s=600.0):
        world = self

        class Line(MortalQueue):
            @property
            def is_silent(self):
                return container is not None and container.dead

            async def backlog(self):
                return await MortalQueue.backlog(self) if world.counts else None

            async def _call(self, operation):
                if self.is_silent:
                    await anyio.sleep_forever()
                self.faults = world.faults if world.unrest else Faults()
                return await MortalQueue._call(self, operation)

        line = random.Random(self.random.random())
        return Line(store=self.store, worker_id=name, lease_s=lease_s, worker_type=kind, random=line)

    def _gpu_host(self, container):
        queue = self._queue(container.name, "wan" if self.lanes else None, container)
        fault = None
        if self.unrest and anyio.current_time() < self.broken_until:
            fault = WeightsError("the weights are damaged")
        trouble = self.engine_trouble if self.unrest else 0.0
        engine = SimulatedEngine(container.name, self.clip_s, self.generations, trouble, trouble, trouble / 3)
        return self._host("gpu", container, queue, BrokenEngine(fault) if fault else engine, fault)

    def _runway_host(self, container):
        queue = self._queue(container.name, "wan" if self.lanes else None, container)
        return self._host("runway", container, queue, PaidEngine(self.provider, container, "gen4_turbo"), None)

    def _host(self, pool, container, queue, engine, fault):
        records = self.records.seen_by(container)
        ledger = Ledger(records, budget_usd=self.rules.budget_usd, clock=self.clock)
        policy = Policy(attempt_limit_s=1200)
        at_once = 1 if pool == "gpu" else self.tier
        runner = Runner(queue, engine, policy=policy, temp_dir=self.folder, ledger=ledger, at_once=at_once)
        return WarmWorker(
            pool,
            queue,
            runner,
            Readings(records, clock=self.clock),
            fault=fault,
            fits=functools.partial(may_stay, ledger=ledger, has_runway=self.has_runway),
            drain_s=3600.0 if self.drain and pool == "gpu" else 0.0,
            linger_s=self.linger_s,
        )

    async def _cron(self):
        lease_s = max(600.0, self.cold_start_s + 960)
        kinds = ("runway", "wan") if self.lanes else (None,)
        queues = {kind: self._queue("cron", kind, lease_s=lease_s) for kind in kinds}
        records = self.records.seen_by(None)
        pools = {"gpu": (Sized(slots=2 * self.max_containers, engines=self.max_containers), self.gpu)}
        if self.has_runway:
            pools["runway"] = (Sized(slots=self.tier, engines=self.tier), self.runway)
        dispatcher = Dispatcher(
            queues,
            pools,
            Readings(records, clock=self.clock),
            Ledger(records, budget_usd=self.rules.budget_usd, clock=self.clock),
            self.rules,
            price_usd=functools.partial(price_usd, Settings.isolated()),
        )
        self.ticks = []
        await cron(dispatcher.tick, on_tick=self.ticks.append)

    async def _violence(self):
        while True:
            await anyio.sleep(10)
            for pool in (self.gpu, self.runway):
                for container in list(pool.containers):
                    if not self.unrest or container.leaving or self.random.random() > 10 * self.violence:
                        continue
                    if self.calm or self.random.random() < 0.6:
                        pool.preempt(container)
                    else:
                        pool.kill(container)

    async def _people(self):
        """Families upload, now and then; somebody changes their mind."""
        pick = self.random
        hints = [None, None, "wan_local", "gen4_turbo"]
        for burst in range(pick.randint(1, 4)):
            for number in range(pick.randint(1, 8)):
                kind = "bad" if pick.random() < 0.05 else "item"
                item_id = f"{kind}-{burst}-{number}"
                self.store.add(PHOTO, id=item_id, prompt=item_id, inference_provider=pick.choice(hints))
            if pick.random() < 0.3:
                with suppress(Refusal):
                    self.store.cancel(pick.choice(list(self.store.items)))
            await anyio.sleep(pick.uniform(0, 1500))

    def _clear(self):
        self.unrest = False
        self.records.weather = self.provider.weather = self.provider.failures = 0.0

    def _give_up_on_runway(self):
        """Nothing may be spent, ever: whoever asked for a model of Runway's has to think again."""
        for item in list(self.store.items.values()):
            if item.status == "pending" and provider_of(item.inference_provider).is_paid:
                self.store.cancel(item.id)

    async def _settle(self):
        """Until the end of every task, with a new day's budget every few hours, and until the last container left."""
        ends_at = anyio.current_time() + SETTLE_S
        while any(self.store.get(item_id).status not in TERMINAL for item_id in self.store.items):
            await anyio.sleep(600)
            self.ahead_s += 6 * 3600
            if self.rules.budget_usd == 0:
                self._give_up_on_runway()
            if anyio.current_time() > ends_at:
                left = [item for item in self.store.items.values() if item.status not in TERMINAL]
                raise Broken(f"unfinished after {SETTLE_S / 3600:g} h: {left}")
        await anyio.sleep(self.linger_s + 900)  # a probe of a pool that failed may have started a last container
        left = [each.name for pool in (self.gpu, self.runway) for each in pool.containers]
        if left:
            raise Broken(f"containers are still there, with nothing to do: {left}")


def check(world: World) -> None:
    """Looks for broken promises in the store's log, the books, and the provider's own."""
    for item in world.store.items.values():
        events = [event for event in world.store.log if event.item_id == item.id]
        check_one_end(item, events, calm=world.calm)
        check_fenced(events)
        if item.status == "completed":
            content = world.store.objects[item.video_storage_path].decode()
            if not content.startswith(f"{item.id} by "):
                raise Broken(f"{item.id} delivers {content!r}")
    check_engines(world)
    check_paid(world)
    if max(world.ticks, default=0.0) >= TICK_LIMIT_S:
        raise Broken(f"a tick took {max(world.ticks):.1f} s")
    if left := list(world.folder.iterdir()):
        raise Broken(f"temporary files were left behind: {left}")


def check_engines(world: World) -> None:
    """A GPU serves one lease at a time."""
    last_end: dict[str, float] = {}
    for generation in sorted(world.generations, key=lambda each: each.started_at):
        if generation.started_at < last_end.get(generation.worker, 0.0):
            raise Broken(f"{generation} began while the engine was busy")
        last_end[generation.worker] = generation.ended_at


def check_paid(world: World) -> None:
    """Every clip is paid for once, is in the books, and within the day's budget."""
    payments = world.payments
    for item_id in {charge.item_id for charge in world.provider.charges.values()}:
        charges = [charge for charge in world.provider.charges.values() if charge.item_id == item_id]
        good = [charge for charge in charges if charge.ending == "SUCCEEDED" and not charge.stopped]
        if len(good) > 1:
            raise Broken(f"{item_id} was paid for {len(good)} times: {charges}")
        if len(charges) > sum(payment.item_id == item_id for payment in payments):
            raise Broken(f"{item_id} was charged {len(charges)} times, and the books have fewer")
    for day in {math.floor(payment.at / DAY_S) for payment in payments}:
        spent = sum(payment.cost_usd for payment in payments if math.floor(payment.at / DAY_S) == day)
        if spent > world.rules.budget_usd + HALF_A_CENT:
            raise Broken(f"${spent:.2f} were spent on one day, ${world.rules.budget_usd:.2f} allowed")


def simulate(seed: int) -> World:
    """Builds and runs the world of one seed and checks it. Raises Broken; the same seed does the same again."""
    folder = Path(tempfile.mkdtemp(prefix="i2v-fleet-"))
    worlds: list[World] = []

    async def main() -> None:
        world = World(seed, folder)
        worlds.append(world)
        await world.run()
        world.payments = await Ledger(MemoryRecords()).payments() if not world.has_runway else await books(world)

    async def books(world):
        world.records.weather = 0.0
        return await Ledger(world.records.seen_by(None), clock=world.clock).payments()

    try:
        run_virtual(main, seed=seed)
        check(worlds[0])
    except BaseExceptionGroup as group:
        raise Broken(f"seed {seed}: {group.exceptions}") from group
    except Broken as broken:
        raise Broken(f"seed {seed}: {broken}") from broken
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return worlds[0]


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=100, help="how many seeds to run (default 100)")
    parser.add_argument("--first", type=int, default=0, help="the first of them (default 0)")
    parser.add_argument("--stop", action="store_true", help="stop at the first broken promise")
    parser.add_argument("--seed", type=int, help="replay this one, with its log")
    arguments = parser.parse_args()
    quiet()
    if arguments.seed is not None:
        world = simulate(arguments.seed)
        for event in world.store.log:
            print(event)
        return
    started = time.monotonic()
    broken, ends, counts = [], {}, {"containers": 0, "ticks": 0, "paid": 0}
    for seed in range(arguments.first, arguments.first + arguments.seeds):
        try:
            world = simulate(seed)
        except Broken as error:
            broken.append(str(error))
            print(error, file=sys.stderr)
            if arguments.stop:
                break
            continue
        counts["containers"] += len(world.gpu.history) + len(world.runway.history)
        counts["ticks"] += len(world.ticks)
        counts["paid"] += len(world.provider.charges)
        for item in world.store.items.values():
            ends[item.status] = ends.get(item.status, 0) + 1
    print(f"{arguments.seeds} seeds in {time.monotonic() - started:.1f} s: {counts}, tasks ended {ends}")
    print(f"broken promises: {len(broken)}")
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    main()
