"""`/jobs/run` by the contract's table, in virtual time: the real application, runner, keeper and sweep."""

import json
from collections import Counter
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import anyio
import httpx
import pytest

from inference.errors import (
    EngineFailed,
    EngineHung,
    InvalidRequest,
    ProviderUnavailable,
    QueueUnavailable,
    SettingsError,
)
from inference.leasing.retry import Policy
from inference.leasing.runner import Runner
from inference.push import answers
from inference.push.answers import Answer
from inference.push.app import MAX_BODY_BYTES, MAX_WAKE_BYTES, create_app
from inference.push.auth import Auth, Verdict
from inference.push.here import Here
from inference.push.jobs import Standing, Swept
from inference.push.sweeping import Sweeper
from inference.task import Outcome
from inference.testing.memory_queue import Faults
from inference.testing.memory_store import MemoryStore
from tests.leasing.test_runner import SleepyEngine
from tests.push.memory_jobs import MemoryJobs
from tests.simulation.leases import PHOTO
from tests.support.virtual import virtual_time

TOKEN = "a-token-of-callers"
BEARER = {"authorization": f"Bearer {TOKEN}"}
FIELDS = {"job_id", "outcome", "job_status", "attempt_id"}


@dataclass
class Shop:
    """A store with jobs, and a process that serves calls for them."""

    folder: object
    engine: SleepyEngine = field(default_factory=SleepyEngine)
    at_once: int = 1
    extension_s: float = 300
    grace_s: float = 8
    asked: list = field(default_factory=list)  # jobs that a sweep had delivered again

    def __post_init__(self):
        self.store = MemoryStore(clock=anyio.current_time)
        self.jobs = MemoryJobs(self.store, worker_id="here", extension_s=self.extension_s)
        self.there = MemoryJobs(self.store, worker_id="there")
        runner = Runner(self.jobs, self.engine, policy=Policy(), temp_dir=self.folder)
        self.here = Here(self.jobs, runner, at_once=self.at_once)
        self.sweeper = Sweeper(self.jobs, here=self.here)
        auth = Auth(TOKEN, "X-Worker-Token", None)
        self.app = create_app(auth, runs=self.here, wake=self.sweeper.wake, deadline_s=600)

    def add(self, job_id="j-1"):
        """A job that waits."""
        self.store.add(PHOTO, id=job_id, prompt="zoom in")
        return job_id

    def status(self, job_id="j-1"):
        """Of a job."""
        return self.store.get(job_id).status

    @asynccontextmanager
    async def open(self):
        """A client of the process, which is drained in the end."""
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://push", headers=BEARER) as client:
            self.client = client
            async with anyio.create_task_group() as group:
                await group.start(self.here.serve)
                yield self
                await self.here.drain(0)

    async def ask(self, job_id="j-1", **headers):
        """One delivery; what was answered."""
        said = await self.client.post(
            "/jobs/run", json={"job_id": job_id}, headers={name.replace("_", "-"): it for name, it in headers.items()}
        )
        assert set(said.json()) >= FIELDS
        return said

    async def told(self, job_id="j-1", **headers):
        """One delivery; its status and outcome."""
        said = await self.ask(job_id, **headers)
        return said.status_code, said.json()["outcome"]


@pytest.fixture
def shop(tmp_path):
    """A factory: it has to be made inside of virtual time."""
    return lambda **options: Shop(tmp_path, **options)


@virtual_time
async def test_a_job_is_run_and_told(shop):
    """Taken, run to its end, answered; a second delivery of the same job is skipped."""
    async with shop().open() as it:
        it.add()
        said = await it.ask()
        assert (said.status_code, it.status()) == (200, "completed")
        attempt = it.store.get("j-1").worker_id.rpartition(".")[2]
        assert said.json() == {
            "job_id": "j-1",
            "outcome": "completed",
            "job_status": "completed",
            "attempt_id": attempt,
        }
        again = await it.ask()
        assert (again.status_code, again.json()["outcome"], again.json()["attempt_id"]) == (200, "skipped", attempt)
        assert it.engine.runs == 1


@virtual_time
async def test_a_failure_for_good_is_the_end(shop):
    """Bad input fails the job: a redelivery could do nothing."""
    async with shop(engine=SleepyEngine(errors=[InvalidRequest("too long")])).open() as it:
        it.add()
        said = await it.ask()
        assert (said.status_code, said.json()["outcome"], it.status()) == (200, "failed", "failed")
        assert said.json()["error"] == "too long"


@virtual_time
async def test_a_failure_that_may_pass_is_delivered_again(shop):
    """The provider's outage: released and answered 503, a second delivery meanwhile waits, a later one completes."""
    async with shop(engine=SleepyEngine(errors=[ProviderUnavailable("overloaded")])).open() as it:
        it.add()
        said = await it.ask()
        assert (said.status_code, said.json()["outcome"], it.status()) == (503, "released", "pending")
        assert int(said.headers["retry-after"]) > 0
        assert await it.told() == (503, "busy")
        await anyio.sleep(60)
        assert await it.told() == (200, "completed")


@virtual_time
async def test_attempts_inside_count_as_one_delivery(shop):
    """What the runner itself tries again needs no redelivery."""
    async with shop(engine=SleepyEngine(errors=[EngineFailed("once")])).open() as it:
        it.add()
        assert await it.told() == (200, "completed")


@virtual_time
async def test_a_cancelled_job_ends_canceled(shop):
    """Cancelled in the last stage, too: 200, and nobody delivers it again."""
    it = shop(engine=SleepyEngine(seconds=100))
    async with it.open():
        it.add()

        async def cancel():
            await anyio.sleep(99)
            it.store.cancel("j-1")

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(cancel)
            said = await it.ask()
        assert (said.status_code, said.json()["outcome"], said.json()["job_status"]) == (200, "canceled", "canceled")
        assert it.status() == "cancelled"


@virtual_time
async def test_a_live_holder_is_left_alone_and_a_dead_one_is_not(shop):
    """503 while somebody alive has it, whatever is asked and cancelled; taken over once its lease is stale."""
    async with shop().open() as it:
        it.add()
        lease = await it.there.acquire("j-1")
        for _ in range(3):
            said = await it.ask()
            assert (said.status_code, said.json()["outcome"]) == (503, "held")
            assert said.json()["attempt_id"] == lease.token
            assert said.headers["retry-after"] == "30"
            await anyio.sleep(100)
        await anyio.sleep(it.there.lease_s)
        assert await it.told() == (200, "completed")


@virtual_time
async def test_a_stolen_lease_is_fenced(shop):
    """200 only once another holder is known to have it; 503 while nobody is."""
    it = shop(engine=SleepyEngine(seconds=400))
    async with it.open():
        it.add()

        async def steal():
            await anyio.sleep(50)
            it.store.assign(it.store.get("j-1"), "thief.1", 600)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(steal)
            said = await it.ask()
        assert (said.status_code, said.json()["outcome"]) == (200, "self_fenced")
        assert it.store.get("j-1").worker_id == "thief.1"


def test_a_lost_lease_that_nobody_has_is_delivered_again():
    """Nothing is acknowledged on a guess: unknown, or still under our own attempt."""
    lost = Outcome(status="lease_lost", item_id="j-1")
    ours = Standing(job_status="processing", attempt_id="a", is_held=True)
    stale = Standing(job_status="processing", attempt_id="b", is_held=False)
    theirs = Standing(job_status="processing", attempt_id="b", is_held=True)
    over = Standing(job_status="completed", attempt_id="a", has_ended=True)
    told = [answers.ended(lost, "a", it).http_status for it in (None, ours, stale, theirs, over)]
    assert told == [503, 503, 503, 200, 200]
    assert answers.ended(lost, "a", over).outcome == "completed"
    assert answers.ended(lost, "b", over).outcome == "self_fenced"
    failed = Outcome(status="failed", item_id="j-1")
    waits = Standing(job_status="queued", attempt_id="a")
    assert [answers.ended(failed, "a", it).http_status for it in (None, waits)] == [200, 503]


@virtual_time
async def test_sixteen_deliveries_at_once_are_one_attempt(shop):
    """Exactly one runs, and no other is answered 2xx before it has ended; with room for all of them, too."""
    for at_once in (1, 16):
        it = shop(at_once=at_once)
        async with it.open():
            it.add()
            told = []

            async def deliver(it=it, told=told):
                told.append(await it.told())

            async with anyio.create_task_group() as tasks:
                for _ in range(16):
                    tasks.start_soon(deliver)
            assert Counter(status for status, _ in told) == {200: 1, 503: 15}
            assert {word for _, word in told} <= {"completed", "held", "busy"}  # busy: while the first is acquiring
            assert it.engine.runs == 1


@virtual_time
async def test_work_that_outlasts_the_deadline_goes_on(shop):
    """202 before the caller's patience ends, then 503 for others, and the job completes all the same."""
    async with shop(engine=SleepyEngine(seconds=1000)).open() as it:
        it.add()
        began = anyio.current_time()
        said = await it.ask(x_dispatch_deadline="60")
        assert (said.status_code, said.json()["outcome"], said.json()["job_status"]) == (202, "accepted", "processing")
        assert 50 <= anyio.current_time() - began < 60
        it.add("j-2")
        assert await it.told("j-2") == (503, "busy")
        assert await it.told("j-1") == (503, "held")
        await anyio.sleep(1000)
        assert it.status() == "completed"
        assert await it.told("j-1") == (200, "skipped")


@virtual_time
async def test_an_ended_job_is_skipped_by_a_busy_worker(shop):
    """Whoever has enough to do still tells that nothing is left to do."""
    async with shop(engine=SleepyEngine(seconds=100)).open() as it:
        it.add()
        it.add("over")
        it.store.cancel("over")
        assert (await it.ask(x_dispatch_deadline="15")).status_code == 202
        assert await it.told("over") == (200, "skipped")
        assert await it.told("nobody") == (404, "unknown_job")


@virtual_time
async def test_draining_hands_the_job_back(shop):
    """SIGTERM in mid-job: the lease is released, the caller gets 503, new calls get 503."""
    it = shop(engine=SleepyEngine(seconds=100))
    async with it.open():
        it.add()
        told = []

        async def deliver():
            told.append(await it.told())

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(deliver)
            await anyio.sleep(20)
            await it.here.drain(8)
        assert told == [(503, "released")]
        assert it.status() == "pending"
        assert await it.told() == (503, "busy")


@virtual_time
async def test_a_job_that_was_taken_while_draining_began_is_handed_back(shop):
    """The answer of the store comes when nothing may begin any more; so does that of the sweep."""
    it = shop()
    async with it.open():
        it.add()
        it.jobs.faults = Faults(delay_s=4)
        told = []

        async def deliver():
            told.append(await it.told())

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(deliver)
            await anyio.sleep(0.01)
            await it.here.drain(8)
        assert told == [(503, "busy")]
        assert it.status() == "pending"
        assert it.engine.runs == 0


@virtual_time
async def test_what_can_finish_within_the_grace_does(shop):
    """Then the caller is told that it is done."""
    it = shop(engine=SleepyEngine(seconds=25))
    async with it.open():
        it.add()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(it.ask)
            await anyio.sleep(20)
            await it.here.drain(8)
        assert it.status() == "completed"


@virtual_time
async def test_settings_that_would_end_every_job_end_the_process(shop):
    """The job goes back, and `serve` raises what is wrong."""
    it = shop(engine=SleepyEngine(errors=[SettingsError("RUNWAYML_API_SECRET is wrong")]))
    with pytest.RaisesGroup(pytest.RaisesExc(SettingsError, match="RUNWAYML")):
        async with it.open():
            it.add()
            assert await it.told() == (503, "released")
            assert it.status() == "pending"


@virtual_time
async def test_a_stuck_engine_ends_the_process(shop):
    """A thread that does not come back blocks the engine for all that follows."""
    it = shop()
    it.here._executor.turns.hung = True
    it.here._stopping.set()
    with pytest.raises(EngineHung):
        await it.here.serve()


@virtual_time
async def test_a_store_that_is_away_is_503(shop):
    """For a job, and for health; nobody is told that a job is unknown."""
    async with shop().open() as it:
        it.add()
        it.jobs.faults = Faults(answer_500=1.0)
        said = await it.ask()
        assert (said.status_code, said.json()["outcome"], said.json()["job_id"]) == (503, "unavailable", "j-1")
        health = await it.client.get("/jobs/health")
        assert (health.status_code, health.json()["error"]) == (503, "no job can be taken now: the log says why")
        it.jobs.faults = Faults()
        assert (await it.client.get("/jobs/health")).status_code == 503  # as it was a moment ago
        await anyio.sleep(1)
        assert (await it.client.get("/jobs/health", headers={"authorization": ""})).json() == {"status": "ok"}


@virtual_time
async def test_who_may_call(shop):
    """Either header, the scheme in any case; nobody without the secret, on any route that does something."""
    async with shop().open() as it:
        it.add()
        for headers in (
            {"authorization": ""},
            {"authorization": f"Worker {TOKEN}"},
            {"authorization": "Bearer wrong"},
            {"authorization": "Bearer ü"},
            {"authorization": "Bearer a.b.c"},
            {"authorization": "", "x-worker-token": "wrong"},
            {"authorization": "", "x-other-token": TOKEN},
        ):
            for path in ("/jobs/run", "/wake"):
                sent = {name: it.encode() for name, it in headers.items()}
                said = await it.client.post(path, json={"job_id": "j-1"}, headers=sent)
                assert (said.status_code, said.json()["outcome"]) == (401, "refused"), headers
                assert TOKEN not in said.text
        assert it.status() == "pending"
        assert (await it.ask(authorization="", x_worker_token=TOKEN)).status_code == 200
        assert (await it.client.get("/jobs/run")).status_code == 405


def test_a_service_that_is_open_to_all_is_not_made():
    """Neither a secret nor an audience: it refuses to serve."""
    with pytest.raises(SettingsError, match="I2V_PUSH_TOKEN"):
        Auth(None, "X-Worker-Token", None)
    with pytest.raises(SettingsError, match="I2V_PUSH_TOKEN"):
        Auth("", "X-Worker-Token", None)


@pytest.mark.anyio
@pytest.mark.parametrize("status", [401, 403, 503])
async def test_verdicts_on_tokens_are_answered(status):
    """A wrong token, an account that is not listed, certificates that are away."""

    class Tokens:
        async def verdict(self, token):
            assert token == "a.b.c"
            return Verdict(status, "why")

    refused = await Auth(None, "x", Tokens()).refusal({"authorization": "bearer a.b.c"})
    assert isinstance(refused, Answer)
    assert (refused.http_status, refused.error) == (status, "why")
    assert (refused.retry_after_s is not None) == (status == 503)


@virtual_time
async def test_bodies(shop):
    """Extra fields are fine; everything else that is wrong is told, and large bodies are not read."""
    async with shop().open() as it:
        it.add()

        async def post(path="/jobs/run", **options):
            return await it.client.post(path, **options)

        for content in (b"", b"{", b"[]", b'"j-1"', b"\xff", b"[" * 100_000):
            assert (await post(content=content)).status_code == 400
        for job_id in (None, 1, "", "a b", "../x", "x" * 201, ["j-1"]):
            said = await post(json={"job_id": job_id})
            assert (said.status_code, said.json()["outcome"]) == (400, "malformed"), job_id
        large = json.dumps({"job_id": "j-1", "x": "y" * MAX_BODY_BYTES}).encode()
        assert (await post(content=large)).status_code == 413
        assert (await post("/wake", content=b"z" * (MAX_WAKE_BYTES + 1))).status_code == 413
        for deadline in ("soon", "nan", "0", "-5", "1e9"):
            assert (await it.ask(x_dispatch_deadline=deadline)).status_code == 400
        assert it.status() == "pending"
        said = await post(json={"job_id": "j-1", "project_id": "p", "nested": {"a": [1]}})
        assert said.status_code == 200


@virtual_time
async def test_a_bug_is_told_without_its_details(shop):
    """503, so that the job is delivered again; the traceback is in the log."""
    async with shop().open() as it:

        async def broken(*_):
            raise ZeroDivisionError("secret detail")

        it.here.run = broken
        said = await it.client.post("/jobs/run", json={"job_id": "j-1"})
        assert said.status_code == 503
        assert "secret" not in said.text


# The sweep, and being woken


@virtual_time
async def test_what_nobody_asks_for_is_taken_by_the_sweep(shop):
    """Without anybody who could deliver again, this process takes what waits: all of it, one after another."""
    it = shop()
    async with it.open(), anyio.create_task_group() as tasks:
        tasks.start_soon(it.sweeper.serve, 60)
        await anyio.sleep(1)
        for number in range(3):
            it.add(f"j-{number}")
        await anyio.sleep(60 + 3 * 15)
        assert [it.status(f"j-{number}") for number in range(3)] == ["completed"] * 3
        tasks.cancel_scope.cancel()


@virtual_time
async def test_a_wake_is_a_look_now(shop):
    """Within a moment instead of at the next interval; a burst makes one look now and one at its end."""
    it = shop(engine=SleepyEngine(seconds=500))
    async with it.open(), anyio.create_task_group() as tasks:
        tasks.start_soon(it.sweeper.serve, 3600)
        await anyio.sleep(10)
        before = it.jobs.sweeps
        it.add()
        async with anyio.create_task_group() as burst:
            for _ in range(50):
                burst.start_soon(lambda: it.client.post("/wake", content=b'{"type": "INSERT"}'))
        await anyio.sleep(1)
        assert it.status() == "processing"
        assert it.jobs.sweeps - before <= 2
        tasks.cancel_scope.cancel()


@virtual_time
async def test_with_a_deliverer_the_sweep_only_asks(shop):
    """Requeued and forgotten jobs are asked for once each, and none is taken here."""
    it = shop()
    asked = []

    async def ask(job_id):
        asked.append(job_id)

    it.jobs.found = [Swept(requeued=("a", "b"), waiting=("b", "c"), failed=("d",))]
    it.add("a")
    await Sweeper(it.jobs, ask=ask).once()
    assert asked == ["a", "b", "c"]
    assert it.status("a") == "pending"


@virtual_time
async def test_the_sweep_survives_outages(shop):
    """It looks again at the next interval; settings that are wrong end it."""
    it = shop()
    errors = [QueueUnavailable("away"), SettingsError("no table")]

    async def sweep():
        raise errors.pop(0)

    it.jobs = type("Jobs", (), {"sweep": staticmethod(sweep)})()
    with pytest.raises(SettingsError, match="no table"):
        await Sweeper(it.jobs).serve(60)
    assert anyio.current_time() >= 60
