"""Progress through a real Redis: every listener gets every event once and in order, whatever happens to Redis."""

import json
import re
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import anyio
import pytest
from structlog.testing import capture_logs

from inference.errors import SettingsError
from inference.progress import follower
from inference.progress.events import CompletionEvent, ErrorEvent, ProgressEvent
from inference.progress.hub import KEPT, START, MemoryHub, Published
from inference.progress.outbox import MAX_WAITING, Away, Entry, Outbox
from inference.progress.redis import EXPIRE_S, FIELD, KEPT_IN_REDIS, PREFIX, RIGHTS, RedisHub, _Streams, open_hub
from tests.support.processes import environment, until
from tests.support.redis_server import PASSWORD, PASSWORD_IN_URL, RedisServer, redis_server

ROOT = Path(__file__).parent.parent.parent

NOTICED_S = 1.9
"""A second of patience with a Redis that does not answer, and what a busy machine adds."""


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request):
    """Listeners live in either loop."""
    return request.param


@pytest.fixture(scope="module")
def shared_server(tmp_path_factory):
    """One Redis for all tests that do it no harm."""
    with redis_server(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
def server(shared_server):
    """It has nothing in it."""
    shared_server.client.flushall()
    return shared_server


@pytest.fixture(params=[True, False], ids=["keeps its data", "forgets its data"])
def mortal(request, tmp_path):
    """A Redis that may be killed."""
    with redis_server(tmp_path, keeps_data=request.param) as server:
        yield server


@contextmanager
def hub_of(server: RedisServer, **how):
    """A process's hub that tells everything at once."""
    hub = RedisHub(server.url, interval_s=0, **how)
    try:
        yield hub
    finally:
        hub.close()


def progress(number: int, *, project: str = "film", task: str = "director") -> ProgressEvent:
    """An event that can be told from others by its message."""
    return ProgressEvent(
        project_id=project, task_name=task, progress=0, progress_percent=0, status="processing", message=str(number)
    )


def say(hub, numbers, **of) -> None:
    """Publishes events with these numbers."""
    for number in numbers:
        hub.publish(progress(number, **of))


def numbers(published) -> list[int]:
    """Which events these are."""
    return [int(each.event.message) for each in published]


async def take(subscription, count: int, *, within_s: float = 10) -> list[Published]:
    """The next events of a subscription."""
    events = aiter(subscription)
    with anyio.fail_after(within_s):
        return [await anext(events) for _ in range(count)]


async def nothing_more(subscription) -> bool:
    """Whether no event comes within a tenth of a second."""
    with anyio.move_on_after(0.1):
        return not await anext(aiter(subscription))
    return True


@pytest.mark.anyio
@pytest.mark.parametrize("in_background", [False, True], ids=["directly", "in the background"])
async def test_what_one_process_says_another_hears(server, in_background):
    """Once and in order, however late it comes; other projects are not in between."""
    with hub_of(server, in_background=in_background) as says, hub_of(server) as hears:
        say(says, range(50))
        say(says, range(100, 103), project="other")
        until(lambda: len(server.events("film")) == 50, 5, "all was stored")
        async with hears.subscribe("film", START) as early:
            assert early.resumed
            say(says, range(50, 60))
            heard = await take(early, 60)
            assert numbers(heard) == list(range(60))
            async with hears.subscribe("film", heard[20].id) as late:
                assert late.resumed
                assert numbers(await take(late, 39)) == list(range(21, 60))
                assert await nothing_more(late)
            server.client.config_resetstat()
            assert await nothing_more(early)
            assert server.client.info("commandstats").get("cmdstat_xread", {"calls": 0})["calls"] <= 1  # and not again


@pytest.mark.anyio
async def test_what_cannot_be_resumed_begins_with_a_snapshot(server):
    """The newest event of each task, and then what follows; also where Redis has dropped the beginning."""
    with hub_of(server) as says, hub_of(server) as hears:
        say(says, range(3), task="director")
        say(says, range(3, 5), task="audio")
        for after in (None, "1-0", "9999999999999-0", "no id"):
            async with hears.subscribe("film", after) as subscription:
                assert not subscription.resumed
                assert numbers(subscription.snapshot) == [2, 4]
        pipeline = server.client.pipeline()
        for number in range(KEPT_IN_REDIS + 200):
            fields = {FIELD: progress(number).model_dump_json()}
            pipeline.xadd(f"{PREFIX}long", fields, maxlen=KEPT_IN_REDIS, approximate=True)
        ids = pipeline.execute()
        async with hears.subscribe("long", START) as subscription:
            assert not subscription.resumed
            assert numbers(subscription.snapshot) == [KEPT_IN_REDIS + 199]
        async with hears.subscribe("long", ids[-KEPT]) as subscription:
            assert subscription.resumed
            assert len(await take(subscription, KEPT - 1)) == KEPT - 1


@pytest.mark.anyio
async def test_many_listeners_are_one_connection(server):
    """And the stream of a project that nobody follows any more is read anew, whole, by the next who does."""
    with hub_of(server) as says, hub_of(server) as hears, pytest.MonkeyPatch.context() as patch:
        projects = [f"film-{number}" for number in range(10)]
        for project in projects:
            say(says, range(3), project=project)
        before = server.clients()
        heard = []

        async def listen(project):
            async with hears.subscribe(project, START) as subscription:
                heard.append(numbers(await take(subscription, 3)))

        async with anyio.create_task_group() as listeners:
            for project in projects * 10:
                listeners.start_soon(listen, project)
        assert heard == [[0, 1, 2]] * 100
        assert server.clients() - before <= 2  # one reads; one tells it to look for new projects
        patch.setattr(follower, "KEEP_S", 0)
        async with hears.subscribe("another"):
            until(lambda: list(hears._follower._followed) == ["another"], 5, "nobody follows the others")
            assert list(hears._here._streams) == ["another"]
        say(says, range(3, 5), project=projects[0])
        async with hears.subscribe(projects[0], START) as subscription:
            assert subscription.resumed
            assert numbers(await take(subscription, 5)) == [0, 1, 2, 3, 4]


def test_a_stream_is_bounded_and_ends(server):
    """About a thousand entries, for a day after the last."""
    with hub_of(server) as hub:
        say(hub, range(KEPT_IN_REDIS + 300))
        hub.publish(CompletionEvent(project_id="film", task_name="director", result={"path": "films/1.mp4"}))
        assert KEPT <= server.client.xlen(f"{PREFIX}film") < KEPT_IN_REDIS + 200
        assert EXPIRE_S - 5 < server.client.ttl(f"{PREFIX}film") <= EXPIRE_S
        assert json.loads(server.events("film")[-1])["result"] == {"path": "films/1.mp4"}


@pytest.mark.anyio
async def test_what_others_write_into_a_stream_is_passed_over(server):
    """Entries that are no events; and a key of another type costs the events of that project alone."""
    server.client.xadd(f"{PREFIX}film", {"other": "field"})
    server.client.xadd(f"{PREFIX}film", {FIELD: '{"type": "unknown"}'})
    server.client.set(f"{PREFIX}string", "text")
    with hub_of(server) as hub, capture_logs() as logs:
        say(hub, [0], project="string")
        say(hub, [1])
        async with hub.subscribe("film", START) as subscription:
            assert numbers(await take(subscription, 1)) == [1]
    assert len(logs) == 3


@pytest.mark.anyio
async def test_a_key_of_another_type_stops_nobody_else(server):
    """Neither who follows beside it, nor what is sent again after an outage."""
    server.client.set(f"{PREFIX}string", "text")
    source = _Streams(server.url)
    with capture_logs() as logs:
        source.add([Entry("string", "director", "{}"), Entry("film", "director", "{}")], again=True)
    assert server.client.xlen(f"{PREFIX}film") == 1
    server.client.delete(f"{PREFIX}film")
    with hub_of(server) as hub, capture_logs() as logs:
        async with hub.subscribe("string", START), hub.subscribe("film", START) as subscription:
            say(hub, [1, 2])
            assert numbers(await take(subscription, 2)) == [1, 2]
    assert len(logs) == 1


@pytest.mark.anyio
async def test_a_user_of_redis_with_few_rights(server):
    """The guide says which are enough."""
    rights = re.search(r"`(~i2v:\* .+?)`", (ROOT / "docs" / "progress.md").read_text())[1]
    assert rights == RIGHTS
    server.client.execute_command("ACL", "SETUSER", "limited", "on", ">word", *rights.split())
    limited = RedisHub(server.url.replace("//:", "//limited:").replace(PASSWORD_IN_URL, "word"), interval_s=0)
    with capture_logs() as logs, hub_of(server) as says:
        say(limited, [1])
        async with limited.subscribe("other"), limited.subscribe("film", START) as subscription:
            say(says, [2])
            assert numbers(await take(subscription, 2)) == [1, 2]
        limited.close()
    assert logs == []


@pytest.mark.anyio
async def test_killed_and_back_in_the_middle(mortal):
    """Nobody who publishes waits, nothing is lost or told twice, listeners go on, and each side logs it once."""
    with hub_of(mortal) as says, hub_of(mortal) as hears, capture_logs() as logs:
        async with hears.subscribe("film", START) as subscription:
            say(says, range(20))
            heard = await take(subscription, 20)
            mortal.kill()
            begun_at = time.monotonic()
            say(says, range(20, 40))
            assert time.monotonic() - begun_at < NOTICED_S
            mortal.start()
            heard += await take(subscription, 20)
            say(says, range(40, 60))
            heard += await take(subscription, 20)
            assert await nothing_more(subscription)
        assert numbers(heard) == list(range(60))
        order = [tuple(map(int, each.id.split("-"))) for each in heard]
        assert all(one < other for one, other in pairwise(order))
        async with hears.subscribe("film", heard[30].id) as subscription:
            assert numbers(await take(subscription, 29)) == list(range(31, 60))
    assert sorted(line["event"] for line in logs) == [
        "progress can be told again",
        "progress cannot be told for now",
        "progress of others cannot be followed for now",
        "progress of others is followed again",
    ]
    assert PASSWORD not in str(logs)


@pytest.mark.anyio
async def test_silent_and_back_in_the_middle(tmp_path):
    """A Redis that takes what is sent and does not answer costs a second, once. What it has taken is not sent again."""
    with redis_server(tmp_path) as server, hub_of(server) as hub:
        say(hub, [0])
        server.freeze()
        begun_at = time.monotonic()
        say(hub, range(1, 10))
        took_s = time.monotonic() - begun_at
        server.thaw()
        async with hub.subscribe("film", START) as subscription:
            assert numbers(await take(subscription, 10)) == list(range(10))
            assert await nothing_more(subscription)
        assert 0.9 < took_s < NOTICED_S


@pytest.mark.anyio
async def test_a_listener_that_comes_while_redis_is_away(tmp_path):
    """It waits no longer than it has to, and gets everything once Redis is there. So does one that knew a part."""
    with redis_server(tmp_path, keeps_data=True) as server, hub_of(server) as says:
        say(says, range(5))
        known = server.client.xrange(f"{PREFIX}film")[2][0]
        server.kill()
        with hub_of(server) as hears:
            begun_at = time.monotonic()
            async with hears.subscribe("film", START) as all_of_it, hears.subscribe("film", known) as rest:
                assert time.monotonic() - begun_at < NOTICED_S
                assert not all_of_it.resumed
                assert not all_of_it.snapshot
                server.start()
                say(says, [5])
                assert numbers(await take(all_of_it, 6)) == list(range(6))
                assert numbers(await take(rest, 3)) == [3, 4, 5]


@pytest.mark.anyio
async def test_a_hub_that_is_closed_ends_its_subscriptions(server):
    """At once, whether Redis is there or not; later ones end as well, and nothing runs any more."""
    with redis_hub_away() as away, hub_of(server) as there:
        for hub in (away, there):
            async with hub.subscribe("film") as subscription:
                hub.close()
                with anyio.fail_after(1):
                    assert [each async for each in subscription] == []
            async with hub.subscribe("film") as subscription:
                with anyio.fail_after(1):
                    assert [each async for each in subscription] == []
            say(hub, [1])
    until(lambda: not threads("progress-follower"), 5, "no thread reads")
    assert server.events("film") == []


@contextmanager
def redis_hub_away():
    """A hub whose Redis is not there."""
    hub = RedisHub("redis://127.0.0.1:1/0")
    yield hub
    hub.close()


def threads(name: str) -> list[threading.Thread]:
    """Threads that run under a name."""
    return [each for each in threading.enumerate() if each.name == name]


def test_what_is_said_at_the_end_is_stored(server):
    """A hub in the background sends what waits before it is closed."""
    hub = RedisHub(server.url, in_background=True)
    for number in range(200):
        hub.publish(CompletionEvent(project_id="film", task_name=f"task-{number}"))
    hub.close()
    assert len(server.events("film")) == 200
    assert not threads("progress-outbox")


def test_a_redis_that_is_never_there_costs_one_line(server):
    """Nobody waits for it, also at the end; the password is in no line, be it right or wrong."""
    wrong = server.url.replace("pass-word", "wrong-word")
    for url in ("redis://:pass-word@127.0.0.1:1/0", wrong):
        with capture_logs() as logs:
            hub = RedisHub(url, interval_s=0)
            begun_at = time.monotonic()
            say(hub, range(500))
            hub.publish(ErrorEvent(project_id="film", task_name="director", error="no photo"))
            hub.close(timeout_s=0.5)
            assert time.monotonic() - begun_at < NOTICED_S
        assert [line["event"] for line in logs] == [
            "progress cannot be told for now",
            "progress is lost: the store was away until the end",
        ]
        assert "-word" not in str(logs)


@pytest.mark.anyio
async def test_an_id_that_cannot_be_encoded_is_refused(server):
    """Before it could harm those who follow something else."""
    with hub_of(server) as hub:
        with pytest.raises(ValueError, match="surrogates not allowed"):
            async with hub.subscribe("\ud800"):
                pass
        say(hub, [1])
        async with hub.subscribe("film", START) as subscription:
            assert numbers(await take(subscription, 1)) == [1]


SPEAKS = """
import sys, threading
from inference.progress.events import CompletionEvent, ProgressEvent
from inference.progress.redis import RedisHub

url, name, how = sys.argv[1:]
hub = RedisHub(url, interval_s=0, in_background=how == "background")
for number in range(400):
    hub.publish(ProgressEvent(project_id="film", task_name=name, progress=0, progress_percent=0,
                              status="processing", message=str(number)))
    threading.Event().wait(0.05)
hub.publish(CompletionEvent(project_id="film", task_name=name))
hub.close(timeout_s=20)
"""


def speaker(server, name: str) -> subprocess.Popen:
    """A process that says 400 things and the end, in the way that its name begins with."""
    how = name.partition("-")[0]
    return subprocess.Popen([sys.executable, "-c", SPEAKS, server.url, name, how], cwd=ROOT, env=environment())


@pytest.mark.slow
@pytest.mark.anyio
async def test_a_redis_that_is_killed_again_and_again(tmp_path):
    """Three processes speak for twenty seconds; each listener hears each of their 400 events once and in order."""
    names = [f"{how}-{number}" for number, how in enumerate(("direct", "background", "direct"))]
    with redis_server(tmp_path, keeps_data=True) as server, hub_of(server) as hub:
        heard: list[list[Published]] = [[], [], []]

        async def listen(mine, after):
            ended = 0
            async with hub.subscribe("film", after) as subscription:
                async for published in subscription:
                    mine.append(published)
                    ended += published.event.type == "completion"
                    if ended == len(names):
                        return

        speakers = [speaker(server, name) for name in names]
        with anyio.fail_after(90):
            async with anyio.create_task_group() as listeners:
                for mine in heard:
                    listeners.start_soon(listen, mine, START)
                for up_s, down_s in ((4, 0.2), (2, 3), (1, 1), (3, 2), (0.5, 0.5)):
                    await anyio.sleep(up_s)
                    server.kill()
                    await anyio.sleep(down_s)
                    server.start()
        assert [speaker.wait(10) for speaker in speakers] == [0, 0, 0]
    for mine in heard:
        for name in names:
            said = [each.event for each in mine if each.event.task_name == name]
            assert [int(event.message) for event in said[:-1]] == list(range(400))
    assert heard[0] == heard[1] == heard[2]


FORKS = """
import os, sys
from inference.progress.events import ProgressEvent
from inference.progress.redis import RedisHub

hub = RedisHub(sys.argv[1], interval_s=0, in_background=sys.argv[2] == "background")

def say(name):
    for number in range(50):
        hub.publish(ProgressEvent(project_id="film", task_name=name, progress=0, progress_percent=0,
                                  status="processing", message=str(number)))

say("parent")
children = []
for _ in range(2):
    child = os.fork()
    children = [*children, child] if child else []
say(f"process-{os.getpid()}")
hub.close()
for child in children:
    assert os.waitpid(child, 0)[1] == 0
os._exit(0)
"""


@pytest.mark.parametrize("how", ["directly", "background"])
def test_children_of_a_fork_have_connections_of_their_own(server, how):
    """Four processes publish through one hub that was used before they forked: each event arrives once."""
    subprocess.run([sys.executable, "-c", FORKS, server.url, how], check=True, cwd=ROOT, env=environment(), timeout=30)
    found: dict[str, list[int]] = {}
    for text in server.events("film"):
        event = json.loads(text)
        found.setdefault(event["task_name"], []).append(int(event["message"]))
    assert len(found) == 5  # what the parent said before, and four processes
    assert all(said == list(range(50)) for said in found.values())


TWO_FORKS = """
import concurrent.futures.thread, os, threading
from inference.progress.redis import RedisHub

hub = RedisHub("redis://127.0.0.1:1")
begun = threading.Semaphore(0)
os.register_at_fork(before=begun.release)  # called before the hub's

def fork():
    child = os.fork()
    if not child:
        os._exit(0)
    os.waitpid(child, 0)

threads = [threading.Thread(target=fork) for _ in range(2)]
with hub._streams.at_work:
    for thread in threads:
        thread.start()
        begun.acquire()
    threads[1].join(0.2)
for thread in threads:
    thread.join()
"""


def test_two_threads_that_fork_at_once():
    """Both come back, also where a third one talks to Redis meanwhile."""
    subprocess.run([sys.executable, "-c", TWO_FORKS], check=True, cwd=ROOT, env=environment(), timeout=15)


@pytest.mark.parametrize(
    "url",
    [
        "http://:secret@redis:6379",
        "redis:6379",
        "redis://:secret/secret@redis:6379/0",
        "redis://:secret@redis:port/0",
        "redis://:secret@redis:6379/0?colour=secret",
        "redis://:secret@redis:6379/0?ssl_ca_certs=secret.pem",
        "redis://:secret@redis:6379/0?socket_timeout=secret",
        "",
    ],
)
def test_a_url_that_is_none(url):
    """Is refused at once, under its setting's name and without what is in it."""
    with pytest.raises(SettingsError, match=r"^REDIS_URL ") as refused:
        open_hub(url)
    assert "secret" not in str(refused.value)
    assert refused.value.__cause__ is None


def test_a_hub_is_opened_without_redis_and_without_its_package(monkeypatch):
    """No URL, and it is in memory. A URL without the package is refused with what to do."""
    monkeypatch.setitem(sys.modules, "redis.connection", None)
    hub = open_hub(None)
    assert isinstance(hub, MemoryHub)
    hub.close()
    with pytest.raises(SettingsError, match=r"pip install 'serverless-i2v\[redis\]'"):
        open_hub("redis://redis")


@pytest.mark.parametrize(
    "url", ["redis://redis", "rediss://:word@redis:6380/2?ssl_cert_reqs=none", "unix:///redis.sock"]
)
def test_a_url_of_every_kind(url):
    """Is taken, and nothing is asked of it yet."""
    open_hub(url).close()


class Store:
    """Takes entries, or is away."""

    def __init__(self) -> None:
        self.has: list[Entry] = []
        self.is_away = False

    def __call__(self, entries, *, again):
        if self.is_away:
            raise Away("told to be")
        self.has += [entry for entry in entries if not (again and entry in self.has)]


def test_while_a_store_is_away_for_long_the_newest_event_of_each_task_is_kept():
    """What waits is bounded, and the newest of each task is there in the end."""
    store = Store()
    outbox = Outbox(store, where="a store", in_background=False)
    store.is_away = True
    for number in range(MAX_WAITING * 3 + 7):
        outbox.put(Entry("film", f"task-{number % 20}", str(number)))
        assert len(outbox._waiting) <= MAX_WAITING
    store.is_away = False
    outbox.close(5)
    newest = {entry.task_name: int(entry.json) for entry in store.has}
    assert sorted(newest.values()) == list(range(MAX_WAITING * 3 + 7 - 20, MAX_WAITING * 3 + 7))
    order = [int(entry.json) for entry in store.has]
    assert order == sorted(order)


def test_more_tasks_than_can_wait():
    """Cost the oldest of them."""
    store = Store()
    outbox = Outbox(store, where="a store", in_background=False)
    store.is_away = True
    for number in range(MAX_WAITING * 2):
        outbox.put(Entry("film", f"task-{number}", str(number)))
    store.is_away = False
    outbox.close(5)
    order = [int(entry.json) for entry in store.has]
    assert MAX_WAITING // 2 <= len(order) <= MAX_WAITING
    assert order == list(range(order[0], MAX_WAITING * 2))


def test_a_process_that_may_have_no_more_threads(monkeypatch):
    """What waits goes with the first entry after it may."""
    store = Store()
    outbox = Outbox(store, where="a store", in_background=True)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", no_thread)
        with pytest.raises(RuntimeError):
            outbox.put(Entry("film", "director", "1"))
    outbox.put(Entry("film", "director", "2"))
    outbox.close(5)
    assert [entry.json for entry in store.has] == ["1", "2"]


def test_an_outage_is_not_over_before_something_has_arrived():
    """What no store could take says nothing of the store."""
    store = Store()
    store.is_away = True
    flaws = []

    def send(entries, *, again):
        if entries[0].json == "bad" and flaws:
            raise ValueError("not this one")
        flaws.append(1)
        store(entries, again=again)

    outbox = Outbox(send, where="a store", in_background=True)
    with capture_logs() as logs:
        outbox.put(Entry("film", "director", "bad"))
        until(lambda: len(logs) == 2, 5, "it was tried again, and is no outage")
        assert outbox.is_away
        store.is_away = False
        outbox.put(Entry("film", "director", "good"))
        until(lambda: store.has, 5, "the other has arrived")
        outbox.close(5)
    assert [line["event"] for line in logs] == [
        "progress cannot be told for now",
        "progress could not be told",
        "progress can be told again",
    ]


def no_thread(_: threading.Thread) -> None:
    """As `threading.Thread.start` where the system has no more."""
    raise RuntimeError("can't start new thread")


def test_an_entry_that_no_store_takes_is_not_tried_for_ever():
    """Others come through."""
    store = Store()

    def send(entries, *, again):
        if any(entry.json == "bad" for entry in entries):
            raise ValueError("not this one")
        store(entries, again=again)

    outbox = Outbox(send, where="a store", in_background=True)
    with capture_logs() as logs:
        outbox.put(Entry("film", "director", "bad"))
        until(lambda: logs, 5, "it was tried")
        outbox.put(Entry("film", "director", "good"))
        outbox.close(5)
    assert [entry.json for entry in store.has] == ["good"]
    assert len(logs) == 1
