"""Storms over one paid task, in virtual time: whatever crashes, is lost, late or handed on, it is paid for once.

Workers take the lease of one item one after the other, sometimes two at once, each with its own way to the books and to
Runway, on which requests and replies get lost. They crash, are stopped, are paused past their lease, or finish. A
failing seed replays exactly.
"""

import base64
import random
from dataclasses import dataclass, field

import anyio
import anyio.lowlevel
import httpx
import pytest
import trio
from structlog.testing import capture_logs

from inference.engines.base import Job
from inference.engines.runway.models import MODELS
from inference.engines.runway.paid import Order, PaidTask
from inference.engines.runway.wire import RunwayApi
from inference.errors import I2VError, LeaseLost, PaymentInDoubt, RecordsUnavailable
from inference.payments.ledger import Ledger
from inference.payments.records import MemoryRecords
from tests.simulation.leases import PHOTO
from tests.support.runway_server import RunwayBooks
from tests.support.virtual import run_virtual

LEASE_S = 300.0
BEAT_S = 60.0
ORDER = Order(MODELS["gen4_turbo"], 5, "1280:720", "slow push", None, PHOTO, "digest of the photo")


@dataclass
class World:
    """One item, its books, one Runway, and the weather."""

    seed: int
    replays: int
    runway: RunwayBooks = field(default_factory=RunwayBooks)
    records: MemoryRecords = field(default_factory=MemoryRecords)
    delivered: list[str] = field(default_factory=list)
    in_doubt: bool = False  # as the last worker that ended found it
    leased_until: float = 0.0
    holder: "Worker | None" = None

    def __post_init__(self) -> None:
        pick = self.random = random.Random(self.seed)
        self.runway.pending_looks = pick.choice([0, 3, 20])
        self.trouble = pick.choice([0.0, 0.1, 0.4])
        self.delay_s = pick.choice([0.0, 0.3, 20.0])
        self.breaks = pick.choice([0.0, 0.05])
        self.doubles = pick.random() < 0.3
        self.pauses = pick.choice([0.0, 0.02])

    async def run(self) -> None:
        """A storm of leases, then fair weather for the last ones."""
        async with anyio.create_task_group() as late:  # workers that were told to stop, and are not done yet
            for number in range(self.random.randint(1, 5)):
                await self.lease(number, late)
            self.trouble = self.delay_s = self.breaks = self.pauses = 0.0
            for number in range(10, 13):
                await self.lease(number, late, fate="finish")

    async def lease(self, number: int, late: anyio.abc.TaskGroup, fate: str | None = None) -> None:
        """One worker with the item, until somebody else may have it."""
        if self.delivered:
            return
        if self.doubles and not fate:
            late.start_soon(self.overtaken, Worker(self, f"w.{number}.overtaken"))
        worker = self.holder = Worker(self, f"w.{number}")
        self.leased_until = anyio.current_time() + LEASE_S
        late.start_soon(worker.run)
        fate = fate or self.random.choice(["finish", "crash", "stop", "stop", "lose"])
        with anyio.move_on_after(None if fate == "finish" else self.random.uniform(0, 150)):
            await worker.done.wait()
        if fate == "crash":
            worker.dead = True
            worker.scope.cancel()
        if fate in ("crash", "lose") and not worker.done.is_set():
            worker.beats = False
            await anyio.sleep_until(self.leased_until)
        if fate == "lose":
            worker.lose()
        worker.scope.cancel()  # a stopped worker hands the lease back at once, whatever it still has to end
        self.holder = None
        await anyio.sleep(self.random.choice([0, 1, 100]))

    async def overtaken(self, worker: "Worker") -> None:
        """A queue that is not atomic gave the same task to two at once; a beat tells one of them."""
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(worker.run)
            await anyio.sleep(self.random.uniform(0, BEAT_S))
            worker.lose()


class Worker:
    """One lease, run as Runner and Keeper do."""

    def __init__(self, world: World, name: str) -> None:
        self.world, self.name = world, name
        self.dead = False
        self.beats = True
        self.deadline = anyio.current_time() + LEASE_S * 2 / 3
        self.done = anyio.Event()
        self.scope = anyio.CancelScope()
        books = Ledger(WayToRecords(self), clock=anyio.current_time)
        self.job = Job(None, books.purchase("item", name), self.check)

    def check(self) -> None:
        """By its own clock, as a keeper does."""
        if anyio.current_time() >= self.deadline:
            raise LeaseLost("not renewed in time", confirmed=False)

    def lose(self) -> None:
        """It could not be renewed."""
        self.job.cancel(LeaseLost("not renewed in time", confirmed=False))
        self.scope.cancel()

    async def run(self) -> None:
        """Tries a few times, and reports."""
        try:
            with self.scope:
                async with anyio.create_task_group() as beside:
                    beside.start_soon(self.beat)
                    await self.work()
                    beside.cancel_scope.cancel()
        finally:
            self.done.set()

    async def beat(self) -> None:
        """Renews the lease while it can."""
        while True:
            if anyio.current_time() >= self.deadline:
                self.lose()
                return
            if self.beats and self.world.holder is self:
                self.deadline = anyio.current_time() + LEASE_S * 2 / 3
                self.world.leased_until = anyio.current_time() + LEASE_S
            await anyio.sleep(BEAT_S)

    async def work(self) -> None:
        """See Runner."""
        for _ in range(3):
            try:
                self.check()
                task_id = await self.generate()
                self.check()
            except PaymentInDoubt:
                self.world.in_doubt = True
                return
            except I2VError as error:
                if not error.retryable:
                    return
                await anyio.sleep(5)
            else:
                if self.world.holder is self and not self.dead:
                    self.world.delivered.append(task_id)
                    try:
                        await self.job.purchase.end("delivered")
                    except RecordsUnavailable:
                        return
                return

    async def generate(self) -> str:
        """The engine, without a photo to prepare or a clip to fetch."""

        async def put_photo(order: Order) -> str:
            return "data:image/jpeg;base64," + base64.b64encode(order.photo).decode()

        async with RunwayApi(self.world.runway.key, self.world.runway.url, transport=WayToRunway(self)) as api:
            paid = PaidTask(api, self.job, ORDER, put_photo, poll_interval_s=5, replays=self.world.replays)
            try:
                await paid.pay()
                await paid.succeeded()
            except (LeaseLost, anyio.get_cancelled_exc_class()):
                await paid.let_go()
                raise
            return paid.id

    async def travel(self) -> None:
        """One way takes a while, or ends with the process; now and then everything stands still past a lease."""
        world = self.world
        if self.dead:
            await anyio.sleep_forever()
        await anyio.sleep(world.random.uniform(0, world.delay_s))
        if self.dead:
            await anyio.sleep_forever()
        if world.random.random() < world.pauses:
            trio.lowlevel.current_clock().jump(world.random.uniform(0.5, 1.5) * LEASE_S)
            await anyio.lowlevel.checkpoint()


class WayToRecords:
    """Records as one process reaches them."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker

    async def _call(self, method: str, *arguments: str):
        world = self.worker.world
        await self.worker.travel()
        if world.random.random() < world.breaks:
            raise RecordsUnavailable("not written")
        result = await getattr(world.records, method)(*arguments)
        await self.worker.travel()
        if world.random.random() < world.breaks:
            raise RecordsUnavailable("written, and not heard of")
        return result

    async def add(self, key: str, value: str) -> bool:
        """See Records."""
        return await self._call("add", key, value)

    async def get(self, key: str) -> str | None:
        """See Records."""
        return await self._call("get", key)

    async def put(self, key: str, value: str) -> None:
        """See Records."""
        await self._call("put", key, value)

    async def remove(self, key: str) -> None:
        """See Records."""
        await self._call("remove", key)

    async def all(self) -> dict[str, str]:
        """See Records."""
        return await self._call("all")


class WayToRunway(httpx.AsyncBaseTransport):
    """The network between one process and Runway."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """One request, which may get lost on either way."""
        world = self.worker.world
        trouble = world.random.random() < world.trouble
        what = world.random.choice(["connect", "lost", "reply", "502", "500 after", "429", "late"]) if trouble else ""
        await self.worker.travel()
        if what == "connect":
            raise httpx.ConnectError("no way there")
        if what == "lost":
            raise httpx.WriteError("lost")
        if what in ("502", "429"):
            return httpx.Response(int(what), text="busy")
        target = request.url.raw_path.decode()
        _, status, headers, body = world.runway.handle(request.method, target, request.headers, request.read())
        await self.worker.travel()
        if what == "late":
            await anyio.sleep(100)
        if what == "reply":
            raise httpx.ReadError("lost")
        if what == "500 after":
            return httpx.Response(500, text="broken")
        return httpx.Response(status, headers=headers, content=body)


def play(seed: int, replays: int) -> World:
    """One world to its end."""
    worlds = []

    async def main() -> None:
        worlds.append(World(seed, replays))
        await worlds[0].run()

    with capture_logs():
        run_virtual(main, seed=seed)
    return worlds[0]


async def payments(world: World):
    """The books at the end."""
    return await Ledger(world.records).payments()


@pytest.mark.parametrize("replays", [0, 1])
@pytest.mark.parametrize("first", range(0, 200, 50))
def test_a_request_is_paid_for_once(first, replays):
    """Once, or as often as the operator allowed; in the end it is delivered, or a person is asked."""
    ends = {"delivered": 0, "in doubt": 0}
    for seed in range(first, first + 50):
        world = play(seed, replays)
        told = f"seed {seed}, replays {replays}"
        assert len(world.runway.tasks) <= 1 + replays, told
        assert world.delivered or world.in_doubt, told
        assert len(world.delivered) <= 1, told
        books = []

        async def read(world=world, books=books) -> None:
            books += await payments(world)

        run_virtual(read)
        created = {task.id for task in world.runway.tasks}
        assert {it.external_id for it in books if it.external_id} <= created, told
        # What was paid for is in the books, by its id or as an intent that a person has to look into.
        assert len(books) >= len(created), told
        assert set(world.delivered) <= created, told
        ends["delivered" if world.delivered else "in doubt"] += 1
    assert ends["delivered"] > 10
