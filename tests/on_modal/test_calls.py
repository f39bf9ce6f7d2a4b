"""What the web endpoint on Modal decides; the deployment itself is in test_deployment.py."""

from collections import deque
from dataclasses import dataclass, field

import anyio
import pytest

from inference.errors import PoolUnavailable, RecordsUnavailable, SettingsError
from inference.fleet.containers import Live, Sized
from inference.on_modal import deployment, ticks
from inference.on_modal.calls import HandsOn
from inference.payments.records import MemoryRecords
from inference.settings import Settings
from inference.testing.memory_store import MemoryStore
from tests.push.memory_jobs import MemoryJobs
from tests.simulation.leases import PHOTO
from tests.support.virtual import virtual_time


@dataclass
class Pool:
    """Containers that only count."""

    running: int = 0
    sent: list = field(default_factory=list)
    refuses: bool = False
    is_away: bool = False

    async def live(self):
        """See Containers."""
        if self.is_away:
            raise PoolUnavailable("away")
        return Live(running=self.running, waiting=0)

    async def send(self, lease):
        """See Containers."""
        if self.refuses:
            raise PoolUnavailable("too many inputs wait")
        self.sent.append(lease.task.item_id)


class Endpoint:
    """A table, a pool, and what is told to callers."""

    def __init__(self):
        self.store = MemoryStore(clock=anyio.current_time)
        self.pool, self.wakes = Pool(), 0
        self.runs = HandsOn(self.pool, Sized(slots=4, engines=2), self.wake)
        self.runs.jobs = MemoryJobs(self.store)

    async def wake(self):
        """A tick is asked for."""
        self.wakes += 1

    async def ask(self, job_id="j-1"):
        """Status and outcome."""
        answer = await self.runs.run(job_id, {}, 60)
        return answer.http_status, answer.outcome

    def status(self, job_id="j-1"):
        """Of a job."""
        return self.store.get(job_id).status


@virtual_time
async def test_a_job_is_sent_to_a_container():
    """Taken here, held there; then skipped."""
    it = Endpoint()
    it.store.add(PHOTO, id="j-1")
    assert await it.ask() == (202, "accepted")
    assert it.pool.sent == ["j-1"]
    assert await it.ask() == (503, "held")
    it.store.complete("j-1", it.store.get("j-1").worker_id, "v.mp4")
    assert await it.ask() == (200, "skipped")
    assert it.wakes == 0


@virtual_time
async def test_what_has_no_room_is_not_taken():
    """Full, or not to be seen: 503, and the job waits for whoever asks again; one that ended is skipped."""
    it = Endpoint()
    it.store.add(PHOTO, id="j-1")
    it.store.add(PHOTO, id="over")
    it.store.cancel("over")
    for it.pool.running, it.pool.is_away in ((4, False), (0, True)):
        assert await it.ask() == (503, "busy")
        assert await it.ask("over") == (200, "skipped")
        assert it.status() == "pending"


@virtual_time
async def test_a_container_that_cannot_be_started():
    """The lease goes back, so that nobody waits until it is stale."""
    it = Endpoint()
    it.pool.refuses = True
    it.store.add(PHOTO, id="j-1")
    assert await it.ask() == (503, "busy")
    assert it.status() == "pending"


@virtual_time
async def test_paid_work_is_left_to_the_tick():
    """Which knows budgets: the job goes back, a tick is asked for, and nobody has to deliver again."""
    it = Endpoint()
    it.store.add(PHOTO, id="j-1", inference_provider="gen4_turbo")
    assert await it.ask() == (202, "accepted")
    assert (it.pool.sent, it.wakes, it.status()) == ([], 1, "pending")


class Platform:
    """A function of which one input runs at a time."""

    def __init__(self, records):
        self.records, self.ticks, self.refuses = records, 0, 0
        self._waiting = deque()
        self._is_running = False

    async def spawn(self):
        """An input."""
        if self.refuses:
            self.refuses -= 1
            raise PoolUnavailable("refused")
        self._waiting.append(1)

    async def serve(self):
        """Runs what waits."""
        while True:
            while self._waiting:
                self._waiting.popleft()
                await ticks.begun(self.records)
                self.ticks += 1
                await anyio.sleep(20)
            await anyio.sleep(0.1)


@virtual_time
async def test_a_burst_is_one_tick_and_one_more():
    """Fifty calls before the tick begins are one tick; fifty while it runs are one more at its end."""
    records = MemoryRecords()
    platform = Platform(records)
    async with anyio.create_task_group() as tasks:
        for _ in range(50):
            await ticks.ask(records, platform.spawn)
        tasks.start_soon(platform.serve)
        await anyio.sleep(5)
        assert platform.ticks == 1
        for _ in range(50):
            await ticks.ask(records, platform.spawn)
        await anyio.sleep(100)
        assert platform.ticks == 2
        await ticks.ask(records, platform.spawn)
        await anyio.sleep(1)
        assert platform.ticks == 3
        tasks.cancel_scope.cancel()


@virtual_time
async def test_a_tick_that_was_refused_is_asked_for_again():
    """The record of it does not stay behind; and one that did is removed by the cron's next tick."""
    records = MemoryRecords()
    platform = Platform(records)
    platform.refuses = 1
    with pytest.raises(PoolUnavailable):
        await ticks.ask(records, platform.spawn)
    await ticks.ask(records, platform.spawn)
    assert len(platform._waiting) == 1
    await records.add(ticks.ASKED, "0")  # whoever wrote it died before the spawn
    platform._waiting.clear()
    await ticks.begun(records)
    await ticks.ask(records, platform.spawn)
    assert len(platform._waiting) == 1


@virtual_time
async def test_a_tick_goes_on_without_its_note():
    """Records that are away cost calls, and not the cron."""

    class Away(MemoryRecords):
        async def remove(self, key):
            del key
            raise RecordsUnavailable("away")

    await ticks.begun(Away())


def test_what_a_deployment_with_a_table_needs():
    """Its keys, and leases that outlive a container's start."""
    table = Settings.isolated(queue="video_jobs", push_token="t", bucket_url="https://s3.example.com")
    assert deployment.keys_of(table) == [
        "I2V_JOBS_DATABASE_URL",
        "BUCKET_ACCESS_KEY_ID",
        "BUCKET_SECRET_ACCESS_KEY",
        "I2V_PUSH_TOKEN",
    ]
    assert deployment.keys_of(Settings.isolated(redis_url="redis://:p@r/0"))[-1] == "REDIS_URL"
    assert table.for_containers() == {"I2V_QUEUE": "video_jobs", "BUCKET_ENDPOINT_URL": "https://s3.example.com"}
    with pytest.raises(SettingsError, match="I2V_JOBS_STALE"):
        deployment.refuse_deployment(table)
    deployment.refuse_deployment(table.model_copy(update={"jobs_stale_s": 1000.0}))
    assert deployment.takes_calls(table)
    assert not deployment.takes_calls(Settings.isolated())
    open_to_all = Settings.isolated(push_audience="https://x.example.com")
    with pytest.raises(SettingsError, match="I2V_PUSH_CALLERS"):
        deployment.refuse_deployment(open_to_all)
