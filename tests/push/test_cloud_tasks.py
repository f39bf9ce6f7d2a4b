"""The real client of Cloud Tasks, a queue on loopback that delivers, OIDC tokens of a test's key, and the application
behind a real server.
"""

import threading
import time
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field

import anyio
import anyio.to_thread
import grpc
import httpx
import pytest

from inference.errors import ProviderUnavailable, QueueAuthError, QueueUnavailable, SettingsError
from inference.leasing.retry import Policy
from inference.leasing.runner import Runner
from inference.push import oidc
from inference.push.app import create_app
from inference.push.auth import Auth
from inference.push.enqueue import Tasks, enqueue, open_client, task_id
from inference.push.here import Here
from inference.push.jobs import Swept
from inference.push.oidc import Certificates, GoogleTokens
from inference.push.opening import serve_calls
from inference.push.sweeping import Sweeper
from inference.server.listening import listen
from inference.testing.memory_store import MemoryStore
from tests.leasing.test_runner import SleepyEngine
from tests.push.memory_jobs import MemoryJobs
from tests.simulation.leases import PHOTO
from tests.support.google import ACCOUNT, AUDIENCE, QUEUE, CloudTasks, Issuer

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def issuer() -> Issuer:
    """Keys take a moment to make."""
    return Issuer()


@dataclass
class Site:
    """A queue of Cloud Tasks and the service that it calls."""

    issuer: Issuer
    folder: object
    engine: SleepyEngine = field(default_factory=lambda: SleepyEngine(seconds=0.05))
    lease_s: float = 600.0
    audience: str = AUDIENCE  # that the service accepts

    def __post_init__(self):
        self.issuer.away = False
        self.store = MemoryStore()
        self.jobs = MemoryJobs(self.store, worker_id="here")
        self.there = MemoryJobs(self.store, worker_id="there", lease_s=self.lease_s)
        self.google = CloudTasks(self.issuer)
        self.here = Here(self.jobs, Runner(self.jobs, self.engine, policy=Policy(), temp_dir=self.folder))

    @asynccontextmanager
    async def open(self):
        """Serves both, and drains in the end."""
        with self.serving() as (certificates_url, target), httpx.Client(timeout=5) as client:
            tokens = GoogleTokens(
                self.audience, [ACCOUNT], certificates=Certificates(client), certificates_url=certificates_url
            )
            app = create_app(Auth(None, "x", tokens), runs=self.here, deadline_s=30)
            async with anyio.create_task_group() as group:
                await group.start(self.here.serve)
                host, port = await group.start(serve_calls, app, listen("127.0.0.1", 0))
                self.tasks = self.tasks_of(target, f"http://{host}:{port}/jobs/run")
                yield self
                await self.here.drain(0)
                group.cancel_scope.cancel()

    @contextmanager
    def serving(self):
        """Google's two services."""
        with self.issuer.serving() as certificates_url, self.google.serving() as target:
            yield certificates_url, target

    def tasks_of(self, target, url):
        """The real client."""
        return Tasks(
            open_client(target),
            QUEUE,
            url,
            deadline_s=30,
            service_account=ACCOUNT,
            audience=AUDIENCE,
            call_s=1.0,
        )

    async def submit(self, job_id="j-1"):
        """A row and its task."""
        return await enqueue(lambda: self.jobs.insert({"prompt": "zoom"}, job_id), self.tasks, {"project": "p"})

    async def until(self, condition, limit_s=10):
        """Until something is true."""
        with anyio.fail_after(limit_s):
            while not condition():
                await anyio.sleep(0.02)

    def statuses(self):
        """Of all deliveries."""
        return self.google.statuses()


@pytest.fixture
def site(issuer, tmp_path):
    """A factory."""
    return lambda **options: Site(issuer, tmp_path, **options)


async def test_a_job_from_enqueueing_to_its_end(site):
    """Row, task, token, call, video; a second enqueueing of the same job is the same job."""
    async with site().open() as it:
        assert await it.submit() == "j-1"
        await it.until(lambda: it.statuses() == [200])
        assert it.store.get("j-1").status == "completed"
        assert await it.submit() == "j-1"
        assert await it.tasks.ask("j-1") is False
        assert list(it.google.tasks) == ["video-j-1"]
        task = it.google.tasks["video-j-1"]
        assert task.dispatch_deadline.total_seconds() == 30
        assert "Authorization" not in task.http_request.headers


async def test_a_transient_failure_is_delivered_again(site):
    """[503, 200], as the contract has it."""
    engine = SleepyEngine(seconds=0.02, errors=[ProviderUnavailable("overloaded")])
    async with site(engine=engine).open() as it:
        original = it.here._judge

        def impatient(outcome):  # the pause after an outage is half a minute
            original(outcome)
            it.here._rests_until = -float("inf")

        it.here._judge = impatient
        await it.submit()
        await it.until(lambda: 200 in it.statuses())
        assert it.statuses() == [503, 200]


@pytest.mark.parametrize("cancels", [0, 15])
async def test_a_dead_holder_is_waited_for(site, cancels):
    """503 while its lease lives, 200 once it is stale; requests to cancel do not keep a dead holder alive."""
    async with site(lease_s=0.6).open() as it:
        it.store.add(PHOTO, id="j-1")
        await it.there.acquire("j-1")
        await it.tasks.ask("j-1")
        for _ in range(cancels):
            it.store.cancel("j-1")
            await anyio.sleep(0.02)
        await it.until(lambda: 200 in it.statuses(), limit_s=3)
        assert set(it.statuses()[:-1]) == {503}
        assert len(it.statuses()) >= 3
        assert it.store.get("j-1").status == ("cancelled" if cancels else "completed")


async def test_sixteen_tasks_for_one_job_are_one_attempt(site):
    """Deliveries at once, under sixteen names: one attempt, and every task ends."""
    async with site(engine=SleepyEngine(seconds=0.3)).open() as it:
        it.store.add(PHOTO, id="j-1")
        barrier = threading.Barrier(16)

        def deliver():
            token = it.issuer.token()
            barrier.wait(10)
            return httpx.post(
                it.tasks._url, json={"job_id": "j-1"}, headers={"authorization": f"Bearer {token}"}, timeout=10
            ).status_code

        told = []

        async def one():
            told.append(await anyio.to_thread.run_sync(deliver))

        async with anyio.create_task_group() as group:
            for _ in range(16):
                group.start_soon(one)
        assert sorted(told) == [200] + 15 * [503]
        assert it.engine.runs == 1


async def test_a_wrong_audience_starts_nothing(site):
    """401 again and again, until the task is given up; the job waits for a sweep that can do better."""
    it = site(audience="https://elsewhere.example.com/jobs/run")
    it.google.max_attempts = 3
    async with it.open():
        await it.submit()
        await it.until(lambda: it.google.given_up)
        assert it.statuses() == [401, 401, 401]
        assert it.store.get("j-1").status == "pending"


async def test_certificates_that_come_back(site, monkeypatch):
    """503 while they are away, so that no task is lost to it."""
    monkeypatch.setattr(oidc, "AWAY_S", 0.1)
    async with site().open() as it:
        it.issuer.away = True
        await it.submit()
        await it.until(lambda: len(it.statuses()) >= 2)
        it.issuer.away = False
        await it.until(lambda: 200 in it.statuses())
        assert set(it.statuses()[:-1]) == {503}


async def test_draining_in_mid_job(site):
    """503 to the caller, the lease is free, and another process completes the job."""
    async with site(engine=SleepyEngine(seconds=30)).open() as it:
        await it.submit()
        await it.until(lambda: it.engine.runs == 1)
        await it.here.drain(0.1)
        await it.until(it.statuses)
        assert it.statuses()[0] == 503
        assert it.store.get("j-1").status == "pending"


async def test_no_crash_leaves_half_of_it(site):
    """Row without task: the sweep makes one. A task that was given up is made again under another name."""
    it = site()
    it.google.max_attempts = 1
    async with it.open():
        it.google.refuse = grpc.StatusCode.UNAVAILABLE
        assert await it.submit() == "j-1"  # the row is there, so the job is accepted
        assert it.google.tasks == {}
        it.google.refuse = None
        it.jobs.found = [Swept(waiting=("j-1",))]
        await Sweeper(it.jobs, ask=it.tasks.ask_again).once()
        await it.until(lambda: it.statuses() == [200])
        [name] = it.google.tasks
        assert name.startswith("video-j-1-")
        assert int(name.rpartition("-")[2]) == pytest.approx(time.time() // 600, abs=1)


async def test_what_google_refuses(site):
    """Each with what follows from it."""
    it = site()
    with it.serving() as (_, target):
        tasks = it.tasks_of(target, "https://push.example.com/jobs/run")
        for code, error in (
            (grpc.StatusCode.PERMISSION_DENIED, QueueAuthError),
            (grpc.StatusCode.UNAUTHENTICATED, QueueAuthError),
            (grpc.StatusCode.NOT_FOUND, SettingsError),
            (grpc.StatusCode.RESOURCE_EXHAUSTED, QueueUnavailable),
            (grpc.StatusCode.INTERNAL, QueueUnavailable),
        ):
            it.google.refuse = code
            with pytest.raises(error):
                await tasks.ask("j-1")


def test_names_of_tasks():
    """Cloud Tasks takes fewer characters than ids have; different ids keep different names."""
    ids = ["a_b", "a.b", "a:b", "a__b", "a_.b", "a._b", "a_db", "7f0c1e0e-8a5c-4e7b", "A" * 200]
    names = [task_id(it) for it in ids]
    assert len(set(names)) == len(ids)
    assert all(it.replace("-", "").replace("_", "").isalnum() for it in names)
    assert task_id("7f0c1e0e-8a5c_4e7b") == "7f0c1e0e-8a5c_4e7b"


def test_a_task_without_a_token_is_not_made():
    """It could only ever be refused."""
    with pytest.raises(SettingsError, match="I2V_PUSH_SERVICE_ACCOUNT"):
        Tasks(None, QUEUE, "https://x.example/jobs/run", deadline_s=30)
