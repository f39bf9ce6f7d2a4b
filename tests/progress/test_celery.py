"""Progress of Celery's tasks, with real workers and a real Redis that is broker, result backend and hub at once."""

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

import anyio
import pytest
from celery import Celery
from structlog.testing import capture_logs

from inference.errors import SettingsError
from inference.progress.celery import connect, redis_url
from inference.progress.hub import START
from inference.progress.redis import RedisHub
from inference.progress.tracker import ProgressTracker
from tests.support.celery_workers import APP, Worker, workers
from tests.support.processes import environment, until
from tests.support.redis_server import PASSWORD, redis_server

ROOT = Path(__file__).parent.parent.parent

SLOTS = {"prefork": 3, "solo": 1}
"""Tasks that each worker runs at once."""


class Site:
    """A Redis, two workers, and an application that sends them tasks."""

    def __init__(self, server, folder) -> None:
        self.server = server
        self.app = Celery("client", broker=server.url, backend=server.url, set_as_current=False)
        self.workers = {
            pool: Worker(folder, pool, "--pool", pool, "-c", str(slots), "-Q", f"celery,{pool}", url=server.url)
            for pool, slots in SLOTS.items()
        }

    def send(self, name: str, *args, queue: str = "celery", **kwargs):
        """One of the tasks of `tests.support.celery_app`."""
        return self.app.send_task(f"{APP}.{name}", args, kwargs, queue=queue)

    def events(self, project_id: str) -> list[dict]:
        """What is in the stream of a project."""
        return [json.loads(text) for text in self.server.events(project_id)]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """They run, and survive what the tests do to them."""
    folder = tmp_path_factory.mktemp("celery")
    with redis_server(folder, keeps_data=True) as server:
        site = Site(server, folder)
        with workers(*site.workers.values()):
            yield site
        site.app.close()


async def all_that_come(subscription, tasks: int) -> list:
    """Events until so many tasks have ended."""
    heard, ended = [], 0
    with anyio.fail_after(60):
        async for published in subscription:
            heard.append(published)
            ended += published.event.type != "progress"
            if ended == tasks:
                break
    return heard


def check_order(heard) -> None:
    """Each event once, in the order of the stream, and of each task in the order in which it was said."""
    order = [tuple(map(int, each.id.split("-"))) for each in heard]
    assert all(one < other for one, other in pairwise(order))
    assert len({each.json for each in heard}) == len(heard)
    tasks: dict[str, list] = {}
    for each in heard:
        tasks.setdefault(each.event.task_name, []).append(each.event)
    for events in tasks.values():
        assert [event.type for event in events] == ["progress"] * (len(events) - 1) + ["completion"]
        sequence = [event.metadata["sequence"] for event in events[:-1]]
        assert sequence == sorted(set(sequence))


@pytest.mark.anyio
async def test_forty_tasks_over_two_workers_and_a_page_that_comes_late(site):
    """It gets every event once and in order, as if it had been there; and each task's state survives."""
    results = [site.send("work", "film", f"task-{number}", 4, 0.03) for number in range(40)]
    with_ends = lambda: sum(event["type"] == "completion" for event in site.events("film"))  # noqa: E731
    await anyio.to_thread.run_sync(until, lambda: with_ends() >= 15, 30, "some tasks have ended")
    page = RedisHub(site.server.url)
    try:
        async with page.subscribe("film", START) as subscription:
            assert subscription.resumed
            heard = await all_that_come(subscription, 40)
    finally:
        page.close()
    assert [each.json for each in heard] == site.server.events("film")
    check_order(heard)
    assert {each.event.task_name for each in heard} == {f"task-{number}" for number in range(40)}
    processes = {each.event.result["pid"] for each in heard if each.event.type == "completion"}
    assert len(processes) == sum(SLOTS.values())
    until(lambda: {result.state for result in results} == {"SUCCESS"}, 60, "all states say so")
    assert {result.result["pid"] for result in results} == processes


def test_a_state_says_what_the_last_event_says(site):
    """Also to who knows only the task's id: PROGRESS with the event, then SUCCESS with the result."""
    result = site.send("work", "state", "director", 8, 0.2)
    until(lambda: result.state == "PROGRESS" and result.info["progress_percent"] >= 25, 60, "it is under way")
    told = result.info
    assert told["type"] == "progress"
    assert (told["project_id"], told["task_name"], told["status"]) == ("state", "director", "processing")
    until(lambda: result.state == "SUCCESS", 60, "it is done")
    assert result.result.keys() == {"pid"}


def test_a_task_that_fails_without_a_word(site):
    """Ends for listeners, too. One that told its tracker ends once, and one that is tried again goes on."""
    results = [
        site.send("fail", "bad", "silent", says_so=False),
        site.send("fail", "bad", "told", says_so=True),
        site.send("fail_once", "bad", "again"),
        site.send("fail_inside", "bad"),
    ]
    # After an outage of Redis, which another test makes, Celery asks for tasks again after up to half a minute.
    until(lambda: all(result.ready() for result in results), 60, "all have ended")
    assert [result.state for result in results] == ["FAILURE", "FAILURE", "SUCCESS", "FAILURE"]
    assert str(results[0].result) == "no photo\nat all"
    ends: dict[str, list] = {}
    for event in site.events("bad"):
        if event["type"] != "progress":
            ends.setdefault(event["task_name"], []).append(event)
    assert {name: [event["type"] for event in events] for name, events in ends.items()} == {
        "silent": ["error"],
        "told": ["error"],
        "again": ["completion"],
        "outside": ["error"],
        "inside": ["error"],
    }
    assert ends["silent"][0]["error"] == "no photo at all"
    assert ends["silent"][0]["details"]["error_code"] == "ValueError"
    assert ends["told"][0]["details"]["error_code"] == "402"


@pytest.mark.anyio
async def test_redis_killed_and_back_in_the_middle(site):
    """Each task succeeds, in the time that it takes; a page goes on, and gets all once; each process logs it once."""
    page = RedisHub(site.server.url)
    results = [
        site.send("work", "storm", f"{pool}-{number}", 30, 0.1, queue=pool)
        for pool, slots in SLOTS.items()
        for number in range(slots)
    ]
    try:
        async with page.subscribe("storm", START) as subscription:
            names = set()
            with anyio.fail_after(60):
                async for published in subscription:
                    names.add(published.event.task_name)
                    if len(names) == 4:
                        break
            site.server.kill()
            await anyio.sleep(1)
            site.server.start()
            heard = await all_that_come(subscription, 4)
            ended = [each for each in heard if each.event.type == "completion"]
            assert len(ended) == 4
        async with page.subscribe("storm", START) as subscription:
            everything = await all_that_come(subscription, 4)
    finally:
        page.close()
    check_order(everything)
    assert {each.json for each in heard} < {each.json for each in everything}
    until(lambda: {result.state for result in results} == {"SUCCESS"}, 30, "all have succeeded")
    until(lambda: all(len(set(outages(worker))) == 1 for worker in site.workers.values()), 60, "each outage has ended")
    assert any(outages(worker)[0] for worker in site.workers.values())
    for worker in site.workers.values():
        assert outages(worker)[0] <= SLOTS[worker.name]
        assert PASSWORD not in worker.said()
        assert site.server.url not in worker.said()


def outages(worker: Worker) -> tuple[int, int]:
    """How many of a worker's processes noticed one, and how many its end."""
    said = worker.said()
    return said.count("progress cannot be told for now"), said.count("progress can be told again")


@pytest.mark.slow
def test_a_pool_of_threads(tmp_path):
    """Announces no processes, and its tasks' events are told all the same; a warm shutdown loses none."""
    with redis_server(tmp_path) as server:
        worker = Worker(tmp_path, "threads", "--pool", "threads", "-c", "4", url=server.url)
        app = Celery("client", broker=server.url, backend=server.url, set_as_current=False)
        with workers(worker):
            results = [app.send_task(f"{APP}.work", ("film", f"task-{number}", 5, 0.1)) for number in range(8)]
            failed = app.send_task(f"{APP}.fail", ("film", "bad"), {"says_so": False})
            until(lambda: all(result.ready() for result in [*results, failed]), 30, "all have ended")
        app.close()
        ends = [json.loads(text) for text in server.events("film") if '"type":"progress"' not in text]
        assert sorted(event["type"] for event in ends) == ["completion"] * 8 + ["error"]
        assert ends[[event["type"] for event in ends].index("error")]["task_name"] == "bad"


class Backend:
    """A result backend that is away. What it is asked to retry, it would retry for ever."""

    always_retry = True


class Task:
    """A bound task, as far as a tracker knows one. `max_retries` is as in celery.backends.base, `_ensure_retryable`."""

    backend = Backend()

    def update_state(self, *, state, meta, max_retries=None):
        assert max_retries == 0, "it would never come back"
        raise ConnectionError(f"{state} {meta['progress']}")


def test_progress_is_not_stored_at_any_price():
    """Where Celery is told to try for ever, that is for results. A tracker tries once, and then for a while not."""
    with capture_logs() as logs:
        tracker = ProgressTracker(Task(), "film", "director")
        for number in range(10):
            tracker.update(number / 10)
    assert [line["error"] for line in logs] == ["ConnectionError('PROGRESS 0.0')"]


TWO_APPS = """
from celery import Celery, signals
from inference.progress.celery import connect
from inference.progress.hub import installed

own, other = (Celery(name, broker=f"redis://{name}", set_as_current=False) for name in ("own", "other"))
for app in (other, own):
    connect(app)
own.set_current()
signals.worker_process_init.send(sender=None)
assert installed()._hub._streams.where == "own:6379/0", installed()._hub._streams.where
"""


def test_a_program_with_two_apps():
    """A worker's process tells the Redis of its own app, although the signal does not say which that is."""
    subprocess.run([sys.executable, "-c", TWO_APPS], check=True, cwd=ROOT, env=environment(), timeout=30)


SILENT = """
import sys
from celery import Celery
from inference.progress.celery import connect
from inference.progress.tracker import ProgressTracker

app = Celery("silent", broker="memory://")
app.conf.task_always_eager = True
connect(app)

@app.task(bind=True)
def director(self):
    tracker = ProgressTracker(self, "film", "director")
    tracker.update(0.5)
    tracker.complete({})
    return "done"

assert director.delay().get() == "done"
assert director() == "done"
"""


def test_without_redis_and_without_a_worker_nothing_is_said():
    """A task that is run where it was called, as in an application's own tests, is silent."""
    command = [sys.executable, "-c", SILENT]
    ran = subprocess.run(command, capture_output=True, check=False, cwd=ROOT, env=environment(), timeout=30, text=True)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")


class Conf:
    """Addresses of an application."""

    result_backend: str | None = None
    broker_url: str | list[str] | None = None

    def __init__(self, **urls) -> None:
        self.__dict__ |= urls


class App:
    """As much of an application as is looked at."""

    CASES: ClassVar = [
        ({"broker_url": "redis://one"}, "redis://one"),
        ({"broker_url": "redis://one", "result_backend": "redis://:word@two/3"}, "redis://:word@two/3"),
        ({"broker_url": "amqp://one;redis://two", "result_backend": "db+sqlite:///x"}, "redis://two"),
        ({"broker_url": ["amqp://one", "redis://two"]}, "redis://two"),
        (
            {"result_backend": "rediss://:w@one:6380/0?ssl_cert_reqs=CERT_NONE"},
            "rediss://:w@one:6380/0?ssl_cert_reqs=none",
        ),
        ({"result_backend": "redis+socket:///run/redis.sock?virtual_host=/2"}, "unix:///run/redis.sock?db=2"),
        ({"broker_url": "amqp://one", "result_backend": "rpc://"}, None),
        ({"broker_url": "sentinel://one"}, None),
        ({}, None),
    ]

    def __init__(self, **urls) -> None:
        self.conf = Conf(**urls)


@pytest.mark.parametrize("urls, found", App.CASES)
def test_the_redis_of_an_application(urls, found):
    """Results first, then the broker, in the form that redis-py reads."""
    assert redis_url(App(**urls)) == found
    if found:
        RedisHub(found)


def test_a_url_that_is_none_is_refused_where_the_application_is_made():
    """And not when a worker begins."""
    with pytest.raises(SettingsError, match="REDIS_URL"):
        connect(App(), "http://redis")
