"""The client of a RunPod endpoint, and the pool that a dispatcher sees in it, against a network that misbehaves."""

import json

import anyio
import httpx
import pytest

from inference.errors import AccountError, EngineFailed, InvalidRequest, JobInDoubt, PoolUnavailable
from inference.fleet import shape
from inference.fleet.containers import Live
from inference.on_modal import deployment
from inference.on_runpod import containers
from inference.on_runpod.api import MAX_UNKNOWN, PATIENCE_S, QUIET_S, TRIES, Health, RunPodApi, RunPodJob
from inference.on_runpod.containers import NoContainers, RunPodContainers
from inference.on_runpod.wire import TaskInput, parse
from inference.settings import Settings
from inference.task import Input, Lease, Task
from inference.transfer.storage_errors import FOREIGN
from tests.support.virtual import virtual_time

KEY = "rpa_secret"
TAKEN = {"id": "j1", "status": "IN_QUEUE"}
LEASE = Lease(
    task=Task(
        item_id="i1",
        group_id="g",
        photo_id="p",
        inputs={"photo": Input(source="g/p.jpg")},
        duration_s=5,
        extras={"a": 1},
    ),
    worker_id="cron.1f",
    length_s=300,
)


class Script:
    """A transport that answers each call with the next of its answers, the last one for ever."""

    def __init__(self, *answers, takes_s=0.0):
        self.answers, self.takes_s = list(answers), takes_s
        self.requests, self.at = [], []

    async def __call__(self, request):
        self.requests.append(request)
        self.at.append(anyio.current_time())
        await anyio.sleep(self.takes_s)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        status, payload = answer if isinstance(answer, tuple) else (200, answer)
        return httpx.Response(status, **({"text": payload} if isinstance(payload, str) else {"json": payload}))

    def api(self):
        """A client of it."""
        return RunPodApi(KEY, "https://api.example/v2/", "ep1", transport=httpx.MockTransport(self))

    @property
    def bodies(self):
        """What was posted."""
        return [json.loads(request.content) for request in self.requests]


class ByPath:
    """Answers by what is asked for: /status from a function of time, /health, everything else is taken."""

    def __init__(self, status, health=None):
        self.status, self.health = status, health or {}
        self.asked = []

    async def __call__(self, request):
        call = request.url.path.split("/")[3]
        self.asked.append(call)
        answer = self.status(anyio.current_time()) if call == "status" else self.health if call == "health" else TAKEN
        if isinstance(answer, Exception):
            raise answer
        return httpx.Response(404 if answer is None else 200, json=answer or {})

    def api(self):
        """A client of it."""
        return RunPodApi(KEY, "https://api.example/v2", "ep1", transport=httpx.MockTransport(self))


async def run(script, **options):
    """Sends one job."""
    async with script.api() as api:
        return await api.run({"prompt": "zoom"}, **({"execution_timeout_s": 900, "ttl_s": 1800} | options))


# ---------------------------------------------------------------- sending


@virtual_time
async def test_a_job_is_sent_as_documented():
    """Address, key, policy in milliseconds; a webhook where there is one."""
    script = Script(TAKEN)
    assert await run(script, webhook="https://hook.example/x") == "j1"
    [request] = script.requests
    assert (request.method, str(request.url)) == ("POST", "https://api.example/v2/ep1/run")
    assert request.headers["Authorization"] == f"Bearer {KEY}"
    assert script.bodies == [
        {
            "input": {"prompt": "zoom"},
            "policy": {"executionTimeout": 900_000, "ttl": 1_800_000},
            "webhook": "https://hook.example/x",
        }
    ]


@virtual_time
async def test_limits_are_what_runpod_takes():
    """More than 5 s of work, 10 s of life, and no more than a week."""
    script = Script(TAKEN)
    await run(script, execution_timeout_s=0.1, ttl_s=0.1)
    await run(script, execution_timeout_s=10**7, ttl_s=10**7)
    week_ms = 7 * 86_400_000
    policies = [body["policy"] for body in script.bodies]
    assert policies == [{"executionTimeout": 6000, "ttl": 10_000}, {"executionTimeout": week_ms, "ttl": week_ms}]


@pytest.mark.parametrize(
    "lost",
    [
        httpx.ReadTimeout("slow"),
        httpx.RemoteProtocolError("closed"),
        httpx.ReadError("reset"),
        httpx.WriteError("reset"),
        (500, {"error": "oops"}),
        (502, "<html>"),
        (504, ""),
        (408, {}),
        (200, {}),
        (200, "not json"),
        (200, {"id": "../x", "status": "IN_QUEUE"}),
    ],
    ids=repr,
)
@virtual_time
async def test_a_job_whose_answer_is_lost_is_not_sent_again(lost):
    """It may be running: a second one would be paid for, too."""
    script = Script(lost, TAKEN)
    with pytest.raises(JobInDoubt, match="whether the job was taken is not known"):
        await run(script)
    assert len(script.requests) == 1


@virtual_time
async def test_an_answer_that_never_comes_is_a_lost_one():
    """After two minutes."""
    script = Script(TAKEN, takes_s=10_000)
    with pytest.raises(JobInDoubt):
        await run(script)
    assert anyio.current_time() <= 121


@pytest.mark.parametrize("refused", [httpx.ConnectError("no"), httpx.ConnectTimeout("no"), (429, {"error": "slow"})])
@virtual_time
async def test_a_job_that_was_certainly_not_taken_is_sent_again(refused):
    """After a pause; not for ever."""
    script = Script(refused, refused, TAKEN)
    assert await run(script) == "j1"
    assert len(script.requests) == 3
    assert script.at[-1] > script.at[0]
    script = Script(refused)
    with pytest.raises(EngineFailed):
        await run(script)
    assert len(script.requests) == TRIES


REFUSALS = [
    (400, InvalidRequest, "bad thing"),
    (401, AccountError, "RUNPOD_API_KEY"),
    (402, AccountError, "needs funds"),
    (403, AccountError, "RUNPOD_API_KEY"),
    (404, AccountError, "RUNPOD_ENDPOINT_ID"),
    (413, InvalidRequest, "larger than RunPod takes"),
    (307, AccountError, "RUNPOD_ENDPOINT_BASE_URL"),
]


@pytest.mark.parametrize("status, kind, said", REFUSALS)
@virtual_time
async def test_a_refusal_says_what_to_do(status, kind, said):
    """Once, in one line, and without the key that a server repeated."""
    script = Script((status, {"error": f"bad thing\n{KEY}"}))
    with pytest.raises(kind, match=said) as caught:
        await run(script)
    assert len(script.requests) == 1
    assert KEY not in str(caught.value)
    assert "\n" not in str(caught.value)
    if status != 404:  # of a job it says something else
        async with script.api() as api:
            for ask in (api.health, lambda: api.status("j1"), lambda: api.cancel("j1")):
                with pytest.raises(kind, match=said):
                    await ask()


@pytest.mark.parametrize("foreign", FOREIGN, ids=lambda kind: kind.__name__)
@virtual_time
async def test_no_foreign_exception_comes_out(foreign):
    """Whatever httpx, anyio and the system raise."""
    error = foreign.__new__(foreign)
    Exception.__init__(error, "strange")
    with pytest.raises((EngineFailed, JobInDoubt)):
        await run(Script(error))
    async with Script(error).api() as api:
        with pytest.raises(EngineFailed):
            await api.health()


# ---------------------------------------------------------------- looking


@virtual_time
async def test_questions_are_asked_again():
    """Looking and cancelling change nothing when they are done twice."""
    for ask in (lambda api: api.status("j1"), lambda api: api.cancel("j1"), lambda api: api.health()):
        script = Script(httpx.ReadTimeout("slow"), (503, "<html>"), (429, {}), TAKEN)
        async with script.api() as api:
            assert await ask(api) is not None
        assert len(script.requests) == 4


@virtual_time
async def test_what_is_not_known_is_passed_over():
    """New fields, new statuses, missing counts, null."""
    told = {"id": "j1", "status": "PONDERING", "workerId": "w", "delayTime": 12, "executionTime": None}
    async with Script(told).api() as api:
        job = await api.status("j1")
        assert (job.has_ended, job.is_waiting, job.delay_ms, job.execution_ms) == (False, False, 12, None)
    for told, queued in (({}, 0), ({"jobs": None, "workers": {"new": 3}}, 0), ({"jobs": {"inQueue": 2}}, 2)):
        async with Script(told).api() as api:
            found = await api.health()
            assert (found.jobs.in_queue, found.jobs.in_progress, found.workers.ready) == (queued, 0, 0)
    for told in ([], "not json", {"jobs": {"inQueue": -1}}):
        async with Script((200, told)).api() as api:
            with pytest.raises(EngineFailed, match="not what its documents say"):
                await api.health()
            with pytest.raises(EngineFailed, match="not what its documents say"):
                await api.status("j1")


@virtual_time
async def test_a_job_that_is_not_known_is_none():
    """Its endpoint may be there all the same."""
    async with Script((404, {"error": "job not found"})).api() as api:
        assert await api.status("j1") is None
        assert await api.cancel("j1") is None


@pytest.mark.parametrize(
    "error, why",
    [
        ("no\nphoto", "no photo"),
        (json.dumps({"error_type": "E", "error_message": "GPU gone", "error_traceback": "…"}), "GPU gone"),
        ({"a": 1}, "{'a': 1}"),
        ("12", "12"),
        (None, "RunPod does not say why"),
        ("x" * 1000, "x" * 300),
    ],
)
def test_why_a_job_failed_is_one_line(error, why):
    """Of the SDK's own report of an exception, only the message."""
    assert RunPodJob(id="j1", status="FAILED", error=error).why == why


def test_names_are_runpods():
    """`i2v runpod health --json` says what RunPod says."""
    told = Health.model_validate({"jobs": {"inProgress": 1}, "workers": {"idle": 2}}).model_dump()
    assert (told["jobs"]["inProgress"], told["workers"]["idle"]) == (1, 2)


# ---------------------------------------------------------------- following


class Watched:
    """What a caller was told, and when."""

    def __init__(self):
        self.told = []

    def sink(self, progress):
        """See Sink."""
        self.told.append((round(anyio.current_time()), progress.stage, progress.fraction))

    @property
    def stages(self):
        """In order, each once in a row."""
        return [
            stage
            for (_, stage, _), before in zip(self.told, [None, *self.told], strict=False)
            if not before or before[1] != stage
        ]


async def follow(server, wait_s=1800.0):
    """Follows one job; what it came to, and what was told."""
    watched = Watched()
    async with server.api() as api:
        job = await api.until_ended("j1", watched.sink, wait_s=wait_s)
    return job, watched


def working(stage, fraction):
    """A job in progress, with a snapshot of its worker."""
    return TAKEN | {"status": "IN_PROGRESS", "output": {"stage": stage, "done": 1, "total": 2, "fraction": fraction}}


def over_time(*steps):
    """A function of time: (from second, answer)."""
    return lambda now: next(answer for since, answer in reversed(steps) if now >= since)


@virtual_time
async def test_a_job_is_followed_to_its_end():
    """In queue, then the worker's own stages; what overtakes on the way is left out, and the fraction never falls."""
    done = TAKEN | {"status": "COMPLETED", "output": {"x": 1}}
    steps = ((0, TAKEN), (5, TAKEN | {"status": "RUNNING"}), (8, working("load", 0.1)), (10, working("render", 0.6)))
    job, watched = await follow(ByPath(over_time(*steps, (12, working("load", 0.2)), (14, done))))
    assert (job.status, job.output) == ("COMPLETED", {"x": 1})
    assert watched.stages == ["in queue", "running", "load", "render"]
    fractions = [fraction for _, _, fraction in watched.told]
    assert fractions == sorted(fractions)


@pytest.mark.parametrize("status", ["COMPLETED", "FAILED", "CANCELLED", "TIMED_OUT"])
@virtual_time
async def test_every_end_is_one(status):
    """What became of it is for the caller to judge."""
    job, _ = await follow(ByPath(over_time((0, TAKEN | {"status": status}))))
    assert job.status == status


@virtual_time
async def test_a_long_wait_is_explained():
    """After a while, and again from time to time: which workers there are, or how many are before it."""
    server = ByPath(
        over_time((0, TAKEN), (100, TAKEN | {"status": "COMPLETED"})), {"workers": {"initializing": 1, "throttled": 2}}
    )
    _, watched = await follow(server)
    assert watched.stages == ["in queue", "in queue, no worker is ready: 1 initializing, 2 throttled, 0 unhealthy"]
    assert next(at for at, stage, _ in watched.told if "ready" in stage) == pytest.approx(QUIET_S, abs=2)
    assert server.asked.count("health") == pytest.approx(100 / QUIET_S, abs=1)
    server.health, server.status = {"jobs": {"inQueue": 4}, "workers": {"running": 3}}, lambda _: TAKEN
    with pytest.raises(EngineFailed, match="in queue with 3 more, 3 workers are busy"):
        await follow(server, wait_s=60)


def test_an_endpoint_without_workers_is_said_to_have_none():
    """Three zeros help nobody."""
    asked = "in queue, the endpoint has no workers: is its max workers above 0?"
    for told in ({}, {"jobs": {"inQueue": 1}, "workers": {"throttled": 0}}):
        assert Health.model_validate(told).wait == asked
    assert "0 initializing, 1 throttled" in Health.model_validate({"workers": {"throttled": 1}}).wait


@virtual_time
async def test_a_job_that_no_worker_takes_is_given_up():
    """At the limit of its caller, with what it waited for; one that was at work already waits anew."""
    server = ByPath(lambda _: TAKEN, {"workers": {"throttled": 1}})
    with pytest.raises(EngineFailed, match=r"within the 10 minutes of --wait \(in queue, no worker is ready"):
        await follow(server, wait_s=600)
    assert anyio.current_time() == pytest.approx(600, abs=3)
    began = anyio.current_time()
    server.status = lambda now: working("load", 0.1) if 500 < now - began < 510 else TAKEN
    with pytest.raises(EngineFailed):
        await follow(server, wait_s=600)
    assert anyio.current_time() - began == pytest.approx(1110, abs=3)


@virtual_time
async def test_lost_looks_are_borne_for_a_while():
    """Minutes: the result is kept for half an hour. Nobody waits for ever, though."""
    done = TAKEN | {"status": "COMPLETED"}
    away = httpx.ConnectError("no network")
    job, watched = await follow(ByPath(over_time((0, TAKEN), (10, away), (10 + PATIENCE_S - 30, done))))
    assert job.status == "COMPLETED"
    assert watched.stages == ["in queue", "RunPod does not answer"]
    began = anyio.current_time()
    with pytest.raises(EngineFailed, match="no network"):
        await follow(ByPath(lambda _: away))
    assert anyio.current_time() - began == pytest.approx(PATIENCE_S, abs=30)


@virtual_time
async def test_a_job_that_is_gone_is_not_waited_for():
    """A new one may not be known at once; one that stays unknown was forgotten."""
    done = TAKEN | {"status": "COMPLETED"}
    job, _ = await follow(ByPath(over_time((0, None), (MAX_UNKNOWN - 1, done))))
    assert job.status == "COMPLETED"
    with pytest.raises(EngineFailed, match=r"did not find job j1 in 6 looks: unless that passes, it is forgotten"):
        await follow(ByPath(lambda _: None))


@virtual_time
async def test_a_key_that_is_withdrawn_ends_the_watch():
    """Asking again would not help."""
    with pytest.raises(AccountError):
        async with Script(TAKEN, (401, {})).api() as api:
            await api.until_ended("j1", lambda _: None, wait_s=60)


# ---------------------------------------------------------------- as a pool


def pool(script, **options):
    """The endpoint as a dispatcher sees it."""
    return RunPodContainers(script.api(), **({"execution_timeout_s": 4200, "lease_s": 860} | options))


@virtual_time
async def test_the_pool_counts_jobs():
    """Those at work, and those on their way to a worker."""
    assert await pool(Script({"jobs": {"inProgress": 2, "inQueue": 3}})).live() == Live(running=2, waiting=3)
    assert await pool(Script({})).live() == Live(running=0, waiting=0)


@virtual_time
async def test_a_lease_travels_whole():
    """The worker finds in it what the queue handed out, under the name of its lease; nothing at all is a probe."""
    script = Script(TAKEN)
    it = pool(script, webhook="https://hook.example/x")
    await it.send(LEASE)
    await it.send(None)
    first, second = script.bodies
    assert parse(first["input"], worker_id="other", lease_s=1) == TaskInput(lease=LEASE)
    assert second["input"] == {"drain": 1}
    # RunPod's ttl counts the work, too: what waited for as long as its lease allows can still end.
    assert first["policy"] == {"executionTimeout": 4_200_000, "ttl": 5_060_000}
    assert first["webhook"] == "https://hook.example/x"


@pytest.mark.parametrize("trouble", [httpx.ReadTimeout("slow"), (401, {}), (429, {}), (400, {}), (500, {})], ids=repr)
@virtual_time
async def test_whatever_goes_wrong_the_lease_was_not_sent(trouble):
    """The dispatcher knows one error."""
    with pytest.raises(PoolUnavailable):
        await pool(Script(trouble)).send(LEASE)
    with pytest.raises(PoolUnavailable):
        await pool(Script(trouble)).live()


@virtual_time
async def test_a_pool_of_others_takes_nothing():
    """And holds nothing."""
    assert await NoContainers().live() == Live(running=0, waiting=0)
    with pytest.raises(PoolUnavailable):
        await NoContainers().send(LEASE)


def test_leases_outlive_a_cold_start():
    """Of the platform in question."""
    settings = Settings.isolated(runpod_init_timeout_s=2000, modal_startup_timeout_s=900, lease_duration_s=600)
    runpod, modal = containers.on_runpod(settings), deployment.on_modal(settings)
    assert (runpod.lease_s(settings), modal.lease_s(settings)) == (2060, 960)
    assert shape.for_a_cold_start(settings, runpod).lease_duration_s == 2060
    assert (shape.rules(settings, runpod).ready_after_s, shape.rules(settings, modal).ready_after_s) == (4000, 1800)


def test_the_size_of_an_endpoint():
    """Two leases a worker; Runway is a pool that takes nothing, where somebody has a key for it."""
    plain = containers.on_runpod(Settings.isolated(runpod_max_workers=4)).sizes
    assert {name: (size.slots, size.engines) for name, size in plain.items()} == {"gpu": (8, 4)}
    keyed = containers.on_runpod(Settings.isolated(runpod_max_workers=4, runway_key="k")).sizes
    assert keyed["runway"].slots == 0
