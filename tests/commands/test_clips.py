"""Where clips go, and what is said of many that are waited for."""

import shlex

import anyio.to_thread
import httpx
import pytest

from inference.commands import clips
from inference.commands.clips import _placed, _progress, collect, later
from inference.commands.outputs import Output
from inference.errors import EngineFailed, NotWritable, SettingsError
from inference.server.client import QueueClient
from tests.server.harness import KEY, complete, config, jpeg, running_server
from tests.support.proxy import Proxy, Record

TASK = {
    "id": "01a224bb-2aad-78f7-b746-7aa16abb865d",
    "group_id": "g",
    "status": "pending",
    "progress": None,
    "error_message": None,
    "photo_filename": "a.jpg",
}


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path, monkeypatch):
    """Where the commands are given."""
    monkeypatch.chdir(tmp_path)


def task(number, **fields):
    """One of several."""
    return TASK | {"id": f"task-{number}"} | fields


@pytest.mark.parametrize(
    "given, count, goes_to",
    [
        ("out.mp4", 1, "out.mp4"),
        ("clips/", 1, "clips/a.mp4"),
        ("here", 1, "here/a.mp4"),
        ("clips", 2, "clips/a.mp4"),
        ("clips/", None, "clips/a.mp4"),
        ("여름 휴가/", 2, "여름 휴가/a.mp4"),
        ("here.mp4", 3, "here.mp4/a.mp4"),
    ],
)
def test_one_clip_has_a_file_and_several_a_folder(tmp_path, given, count, goes_to):
    """A folder is what is one, what ends as one, and for several what has no ending."""
    (tmp_path / "here").mkdir()
    (tmp_path / "here.mp4").mkdir()
    assert Output.of(given, count).paths([TASK]) == {TASK["id"]: tmp_path / goes_to}
    assert {path.name for path in tmp_path.iterdir()} == {"here", "here.mp4"}  # nothing is left of the trial


@pytest.mark.parametrize(
    "given, count, error, says",
    [
        ("out.mp4", 2, SettingsError, "--output takes one video"),
        ("out.mov", 2, SettingsError, "give a folder, not out.mov"),
        ("out", 1, SettingsError, "has to end in .mp4"),
        ("a.txt/", 2, SettingsError, "is a file, and no folder"),
        ("no/where/", 2, SettingsError, "there is no folder"),
        ("/proc/clips/", 2, NotWritable, "/proc/clips cannot be written"),
    ],
)
def test_an_output_that_cannot_be_is_refused_before_anything_is_sent(tmp_path, given, count, error, says):
    """With its path."""
    (tmp_path / "a.txt").touch()
    with pytest.raises(error, match=says):
        Output.of(given, count)


def test_no_two_clips_have_one_name(tmp_path):
    """Two photos of a name, from two folders; several clips of one photo; names that Windows and macOS take for one."""
    names = ["a.jpg", "a.png", "A.JPG", "여름.heic", None]
    tasks = [task(number, photo_filename=name) for number, name in enumerate(names)]
    paths = Output.of(f"{tmp_path}/", 5).paths(tasks)
    assert [path.name for path in paths.values()] == ["a.mp4", "a (2).mp4", "A (3).mp4", "여름.mp4", "task-4.mp4"]


def test_a_clip_replaces_no_other(tmp_path):
    """It gets the next number; the same clip again is enough once, as where a fetch is repeated."""

    def put(wanted, content):
        fresh = tmp_path / "fresh"
        fresh.write_bytes(content)
        return _placed(fresh, tmp_path / wanted).name

    assert [put("a.mp4", b"one"), put("a.mp4", b"two"), put("a.mp4", b"three")] == ["a.mp4", "a (2).mp4", "a (3).mp4"]
    assert [put("a.mp4", b"two"), put("a (2).mp4", b"four")] == ["a (2).mp4", "a (4).mp4"]
    assert (tmp_path / "a.mp4").read_bytes() == b"one"


@pytest.mark.parametrize(
    "tasks, output, group, url, command",
    [
        ([task(1)], None, "g", None, ["task-1", "--wait", "-o", "out.mp4"]),
        ([task(1), task(2)], None, "g", "http://q", ["--group", "g", "--wait", "-o", "clips/", "--url", "http://q"]),
        ([task(1), task(2)], "내 클립/", None, None, ["task-1", "task-2", "--wait", "-o", "내 클립/"]),
    ],
)
def test_the_command_for_later_can_be_typed_as_it_is(tasks, output, group, url, command):
    """With the queue's address and folders that have blanks and Hangul in them."""
    where = output and Output.of(output, len(tasks))
    said = later(tasks, where, group=group, url=url, wait=True)
    assert shlex.split(said) == ["i2v", "fetch", *command]


def test_one_bar_for_all():
    """How much of all is done; what was handed back begins anew, and a failed one is over, too."""
    told = {"stage": "render", "fraction": 0.8}
    working, handed_back = task(1, status="processing", progress=told), task(2, progress=told)
    seen = _progress([working, handed_back, task(3, status="failed", progress=told), task(4)], left_s=7.0)
    assert (seen.stage, seen.done, seen.total, seen.fraction, seen.eta_s) == ("ready", 1, 4, 0.45, 7.0)
    assert [(it.stage, it.fraction) for it in (_progress([t], None) for t in (working, handed_back))] == [
        ("render", 0.8),
        ("pending", 0.0),
    ]


@pytest.fixture
def url(tmp_path):
    """A queue server."""
    with running_server(config(tmp_path / "server")) as url:
        yield url


@pytest.fixture
def photo(tmp_path):
    """A photo on disk."""
    path = tmp_path / "a.jpg"
    path.write_bytes(jpeg())
    return path


@pytest.mark.anyio
async def test_a_clip_that_is_lost_holds_no_other_back(url, photo, tmp_path, capsys):
    """Its task is completed, and the storage has no video of it any more."""
    async with QueueClient(url, KEY) as client:
        tasks = await client.submit(photo, count=2)
        for task in tasks:
            await anyio.to_thread.run_sync(complete, url, task["id"], b"mp4")
        (tmp_path / "server" / "objects" / "videos" / f"{tasks[0]['id']}.mp4").unlink()
        with pytest.raises(EngineFailed, match=r"^1 of 2 clips are missing: a\.jpg "):
            await collect(client, tasks, Output.of("clips/", 2))
    said = capsys.readouterr()
    assert f"task {tasks[0]['id']} is completed and has no video" in said.err
    assert said.out == f"{tmp_path}/clips/a (2).mp4\n"


@pytest.mark.anyio
async def test_a_wait_outlasts_a_question_for_the_time_that_is_left(url, photo):
    """Nobody answers that one; how the tasks are is another question, and has an answer."""
    record = Record()

    def fault(exchange):
        return "drop reply" if "/groups/" in exchange.path else None

    with Proxy(httpx.URL(url).port, "client", record, fault) as proxy:
        async with QueueClient(proxy.url, KEY) as client:
            tasks = await client.submit(photo, count=2)
            for task in tasks:
                await client.cancel(task["id"])
            with pytest.raises(EngineFailed, match="2 of 2 clips are missing"):
                await collect(client, tasks, None)
    assert [exchange.fault for exchange in record.exchanges if "/groups/" in exchange.path] == ["drop reply"]


@pytest.mark.anyio
@pytest.mark.parametrize("has_worker", [False, True])
async def test_a_queue_without_workers_is_said_once(url, photo, capsys, monkeypatch, has_worker):
    """Whoever waits there would wait for ever."""
    monkeypatch.setattr(clips, "NOBODY_S", 0.0)
    monkeypatch.setattr("inference.server.client.POLL_S", 0.01)
    async with QueueClient(url, KEY) as client:
        if has_worker:
            await client._ask("POST", "worker/next-task", json={"worker_id": "w"})
        [task] = await client.submit(photo)
        looks, ask = 0, client.task

        async def task_now(item_id):
            nonlocal looks
            looks += 1
            if looks == 4:
                await client.cancel(item_id)
            return await ask(item_id)

        client.task = task_now
        with pytest.raises(EngineFailed, match="ended cancelled"):
            await collect(client, [task], None)
    assert capsys.readouterr().err.count(
        f"No worker was heard of at this queue in the last 2 min. Start one: i2v work --url {url}\n"
    ) == (0 if has_worker else 1)
