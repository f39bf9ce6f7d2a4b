"""The Life-is-Short dialect, against a small server that behaves as the real one does."""

import json
import math
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import anyio.abc
import httpx
import pytest
import structlog
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from inference.errors import (
    CancelRequested,
    I2VError,
    InvalidPhoto,
    InvalidTask,
    ItemMissing,
    LeaseLost,
    ObjectExists,
    ObjectUnsigned,
    QueueAuthError,
    QueueError,
    QueueFailed,
    QueueRefused,
    QueueUnavailable,
    SettingsError,
    StorageAway,
    StorageUnavailable,
    UrlExpired,
)
from inference.leasing.polling import Worker
from inference.leasing.retry import Policy
from inference.leasing.runner import Runner
from inference.progress.stages import Progress
from inference.queues.lifeisshort import LifeIsShortQueue
from inference.task import GenerationRequest, Input, Lease, Task, Video, parse_task
from inference.transfer.storage import Storage
from tests.leasing.test_runner import SleepyEngine

pytestmark = pytest.mark.anyio

KEY = "key-0123456789"
ITEM = "0b2f8a5c-6a3e-4a7e-9f1d-1c2d3e4f5a6b"
WIRE_TASK: dict[str, Any] = {
    "item_id": ITEM,
    "group_id": "7d1c0c3a-0000-4000-8000-000000000001",
    "photo_id": "7d1c0c3a-0000-4000-8000-000000000002",
    "prompt": "waves roll in",
    "photo_storage_path": "7d1c/7d1c_original.JPG",
    "leased_until": "2026-01-01T00:10:00.000Z",
    "frame_num": 73,
    "inference_provider": "wan_local",
}
Answer = httpx.Response | Exception


class RealServer:
    """API and storage of one deployment, one task in it; behaves as the real server was seen to.

    `hiccups` and `lost_replies` name calls that go wrong once each: a 404 for no reason, and an answer that never
    arrives although the call was carried out. `failing` counts calls that the API itself answers with 500.
    `expired` counts presigned URLs that are born too old.

    What presign and report say was measured against the real routes over the real storage server: a path that is
    taken and a photo that is missing are both 500 without the reason, and 404 is what a report gets where the route's
    own SELECT failed. A completed report without its object is 500; its words were not written down.
    """

    def __init__(self, **task: Any) -> None:
        self.task: dict[str, Any] | None = WIRE_TASK | task
        self.holder: str | None = None
        self.status = "pending"
        self.retry_count = 0
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.objects: dict[str, bytes] = {}
        self.hiccups: list[str] = []
        self.lost_replies: list[str] = []
        self.failing: Counter[str] = Counter()
        self.expired = 0
        self.taken = refusal(500, "Failed to generate upload URL")  # for a path that is taken; others say why
        self.heartbeat_data: dict[str, Any] = {"leased_until": "2026-01-01T00:10:00.000Z"}

    def sent(self, call: str) -> list[dict[str, Any]]:
        return [body for name, body in self.calls if name == call]

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if request.url.host == "storage.example":
            call, answer = request.method, self._storage(request)
        else:
            call = request.url.path.removeprefix("/api/worker/")
            answer = self._api(call, request)
        if call in self.lost_replies:
            self.lost_replies.remove(call)
            raise httpx.ReadTimeout("no answer")
        return answer

    def _api(self, call: str, request: httpx.Request) -> httpx.Response:  # noqa: PLR0911, C901  a rule of the wire each
        body = json.loads(request.content)
        self.calls.append((call, body))
        if request.headers.get("Authorization") != f"Worker {KEY}":
            return refusal(401, "Unauthorized")
        if call in self.hiccups:
            self.hiccups.remove(call)
            return refusal(404, "Task not found or lease expired")
        if self.failing[call] > 0:
            self.failing[call] -= 1
            return refusal(500, "Internal server error")
        match call:
            case "next-task":
                self.holder, self.status = body["worker_id"], "processing"
                return success(self.task)
            case "heartbeat":
                if (body["item_id"], body["worker_id"], self.status) != (ITEM, self.holder, "processing"):
                    return refusal(404, "Task not found or lease expired")
                return success(self.heartbeat_data)
            case "presign":
                return self._presign(body)
            case "report":
                if body["worker_id"] != self.holder:
                    return refusal(403, "Worker ID mismatch")
                if body["status"] == "completed" and body["video_storage_path"] not in self.objects:
                    return refusal(500, "Internal server error")
                self.status = body["status"]
                self.retry_count += body["status"] == "failed"
                return success(None)
        return refusal(404, "Not found")

    def _presign(self, body: dict[str, Any]) -> httpx.Response:
        if body["operation"] == "download":
            path = f"photos/{body['storage_path']}"
            if path not in self.objects:
                return refusal(500, "Failed to generate download URL")
            return success({"url": self._sign(path), "expires_in": 3600})
        path = f"videos/{body['video_item_id']}.{body['file_extension']}"
        if path in self.objects:
            return self.taken
        return success({"url": self._sign(path), "expires_in": 7200, "storage_path": path})

    def _sign(self, path: str) -> str:
        self.expired -= 1
        return f"https://storage.example/{path}?token={'old' if self.expired >= 0 else 'new'}"

    def _storage(self, request: httpx.Request) -> httpx.Response:
        path = request.url.path.strip("/")
        if request.url.params["token"] == "old":
            return supabase("InvalidJWT", 400)
        if request.method == "GET":
            return httpx.Response(200, content=self.objects[path])
        if path in self.objects:
            return supabase("KeyAlreadyExists", 409)
        self.objects[path] = request.content
        return httpx.Response(200, json={"Key": path})


def success(data: object) -> httpx.Response:
    return httpx.Response(200, json={"success": True, "data": data})


def refusal(status: int, error: str) -> httpx.Response:
    return httpx.Response(status, json={"success": False, "error": error})


def supabase(code: str, status: int) -> httpx.Response:
    return httpx.Response(400, json={"statusCode": str(status), "error": code, "code": code, "message": "no"})


def queue_on(server: Callable[[httpx.Request], httpx.Response], **options: Any) -> LifeIsShortQueue:
    transport = httpx.MockTransport(server)
    options = {"api_key": KEY, "worker_id": "host-1", "storage": Storage(transport=transport)} | options
    return LifeIsShortQueue("https://queue.example", transport=transport, **options)


def answering(status: int, **content: Any) -> LifeIsShortQueue:
    """A queue that gets this answer to everything."""
    return queue_on(lambda _: httpx.Response(status, **content))


def held(**extras: Any) -> Lease:
    task = parse_task(WIRE_TASK | extras)
    return Lease(task=task, worker_id="host-1.abcdef012345", length_s=300)


@pytest.fixture
def video(tmp_path: Path) -> Video:
    path = tmp_path / "video.mp4"
    path.write_bytes(b"an mp4")
    return Video(path=path, width=16, height=16, fps=16, frames=49, size_bytes=6)


@pytest.fixture
def photo_bytes(tmp_path: Path) -> bytes:
    path = tmp_path / "sample.jpg"
    Image.new("RGB", (64, 48), "navy").save(path)
    return path.read_bytes()


# Leasing


async def test_every_lease_has_its_own_worker_id():
    """The server may hand one task to two callers: the worker_id is what tells them apart."""
    server = RealServer()
    async with queue_on(server, lease_s=599.5, extension_s=120) as queue:
        first, second = await queue.lease(), await queue.lease()
    assert first is not None
    assert second is not None
    assert first.task == parse_task(WIRE_TASK)
    assert first.length_s == 120
    assert first.worker_id.startswith("host-1.")
    assert len(first.token) >= 10
    assert first.worker_id != second.worker_id
    assert server.sent("next-task")[0] == {"worker_id": first.worker_id, "lease_duration_seconds": 600}


async def test_worker_type_is_sent_only_when_set():
    """Older deployments do not know the field."""
    server = RealServer()
    async with queue_on(server, worker_type="runway") as queue:
        await queue.lease()
    assert server.sent("next-task")[0]["worker_type"] == "runway"


@pytest.mark.parametrize("body", [{"success": True, "data": None}, {"success": True}])
async def test_nothing_to_do(body):
    """No task is no error."""
    assert await answering(200, json=body).lease() is None


async def test_a_malformed_task_is_reported_and_logged():
    """Its people see what is wrong; nobody burns a GPU on it; the payload is in the log."""
    server = RealServer(frame_num="121", photo_storage_path="../secrets")
    async with queue_on(server) as queue:
        with structlog.testing.capture_logs() as logs, pytest.raises(InvalidTask) as caught:
            await queue.lease()
    report = server.sent("report")[0]
    assert (report["status"], report["worker_id"]) == ("failed", server.holder)
    assert "frame_num" in report["error_message"]
    assert "photo_storage_path" in report["error_message"]
    assert caught.value.item_id == ITEM
    assert "'frame_num': '121'" in logs[0]["payload"]


@pytest.mark.parametrize("trouble", ["hiccup", "lost"])
async def test_a_malformed_task_that_cannot_be_reported(trouble):
    """The report is one try, and the task's own error is the one to see."""
    server = RealServer(frame_num=1)
    (server.hiccups if trouble == "hiccup" else server.lost_replies).append("report")
    async with queue_on(server) as queue:
        with pytest.raises(InvalidTask, match="frame_num"):
            await queue.lease()
    assert len(server.sent("report")) == 1


async def test_a_task_without_a_usable_id_is_not_reported():
    """There is nothing to report it under."""
    server = RealServer(item_id="a b")
    async with queue_on(server) as queue:
        with pytest.raises(InvalidTask, match="item_id"):
            await queue.lease()
    assert server.sent("report") == []


def test_a_task_as_the_wire_has_it():
    """Every documented field; what is not known is kept, the server's clock is not."""
    task = parse_task(WIRE_TASK | {"lease_seq": 7, "mood": {"calm": True}})
    assert task == Task(
        item_id=ITEM,
        group_id=WIRE_TASK["group_id"],
        photo_id=WIRE_TASK["photo_id"],
        prompt="waves roll in",
        inputs={"photo": Input(source="7d1c/7d1c_original.JPG")},
        duration_s=3.0,
        provider="wan_local",
        extras={"lease_seq": 7, "mood": {"calm": True}},
    )


@pytest.mark.parametrize("frame_num,seconds", [(73, 3), (121, 5), (169, 7), (241, 10), (None, 5), (1441, 60)])
def test_frames_are_seconds_at_24_a_second(frame_num, seconds):
    """24 x seconds + 1, and null means 121."""
    task = parse_task(WIRE_TASK | {"frame_num": frame_num})
    assert (task.duration_s, task.names_duration) == (seconds, frame_num is not None)


@pytest.mark.anyio
async def test_what_a_task_carries_beyond_that_is_ignored_with_one_line():
    """By name: whoever wonders why `resolution` did nothing finds out. What we use is not among it."""
    ours = {"lease_seq": 3, "takes": ["progress"], "beat_interval_s": 2.0}
    for extras, lines in ((ours | {"resolution": "4k", "end_photo": "x"}, 1), (ours, 0)):
        with structlog.testing.capture_logs() as logs:
            async with queue_on(lambda _, task=WIRE_TASK | extras: success(task)) as queue:
                assert await queue.lease() is not None
        ignored = [line for line in logs if line["event"] == "ignored"]
        assert [line["fields"] for line in ignored] == [["end_photo", "resolution"]] * lines


def test_an_older_deployment():
    """Fields it does not send have their meaning all the same."""
    wire = {name: WIRE_TASK[name] for name in ("item_id", "group_id", "photo_id", "photo_storage_path")}
    task = parse_task(wire | {"prompt": None})
    assert (task.prompt, task.duration_s, task.provider) == ("", 5.0, None)


def test_what_no_video_depends_on_fails_no_task():
    """The real server has rows without a group and prompts of any length; its own worker renders them."""
    task = parse_task(WIRE_TASK | {"group_id": None, "photo_id": None, "prompt": "waves " * 1000})
    assert (task.group_id, task.photo_id, len(task.prompt)) == (None, None, 6000)
    assert GenerationRequest.from_task(task).prompt == ("waves " * 1000)[:4000]
    assert Task.model_validate_json(task.model_dump_json()) == task


@pytest.mark.parametrize(
    "field,value",
    [
        *[("frame_num", value) for value in (1, 0, -73, 1442, 121.5, 121.0, "121", True, [], {})],
        *[
            ("photo_storage_path", value)
            for value in ("", "/etc/passwd", "a/../b", "..", "a\\b", "a\0b", "a\nb", 7, None)
        ],
        *[("item_id", value) for value in (None, "", 7, "a b", "a/b", "x" * 201)],
        ("prompt", 7),
        ("inference_provider", 7),
        ("group_id", 7),
    ],
)
def test_malformed_fields_are_named(field, value):
    """The error says which field, and has the id unless that is what is wrong."""
    with pytest.raises(InvalidTask, match=field) as caught:
        parse_task(WIRE_TASK | {field: value})
    assert caught.value.item_id == (None if field == "item_id" else ITEM)
    assert "\n" not in str(caught.value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(JSON | st.dictionaries(st.sampled_from([*WIRE_TASK, "other"]), JSON).map(lambda odd: WIRE_TASK | odd))
def test_any_payload_is_a_task_or_an_invalid_one(payload):
    """No other exception comes of what a server may send."""
    try:
        task = parse_task(payload)
    except InvalidTask:
        return
    assert ".." not in task.inputs["photo"].source.split("/")
    assert 0 < task.duration_s <= 60


# A given task, and the backlog: the real server knows neither


async def test_a_given_task_that_happens_to_be_the_next():
    """The server ignores what it does not know, and nothing is wrong with its answer; nor with having nothing."""
    server = RealServer()
    async with queue_on(server) as queue:
        lease = await queue.lease(ITEM)
        server.task = None
        assert await queue.lease(ITEM) is None
    assert server.sent("next-task")[0] == {
        "worker_id": lease.worker_id,
        "lease_duration_seconds": 600,
        "item_id": ITEM,
    }
    assert server.sent("heartbeat") == []


@pytest.mark.parametrize("wrong", [{}, {"frame_num": "121"}])
async def test_another_task_than_the_given_one_goes_back(wrong):
    """At once and under its own worker_id; not even failed where it is malformed, since nobody asked for it."""
    server = RealServer(**wrong)
    async with queue_on(server) as queue:
        with pytest.raises(QueueRefused, match=r"only the next task.* run without an item id"):
            await queue.lease("wanted")
    assert server.sent("heartbeat") == [{"item_id": ITEM, "worker_id": server.holder, "extend_seconds": 1}]
    assert server.sent("report") == []


@pytest.mark.parametrize("troubles", [["hiccup"], ["lost"], ["hiccup", "hiccup"]])
def test_another_task_that_does_not_go_back_at_the_first_try(troubles):
    """A second one, as for any beat; then its lease runs out by itself, and the reason to stop stays the same."""
    server = RealServer()
    server.lost_replies = ["heartbeat"] * troubles.count("lost")
    server.hiccups = ["heartbeat"] * troubles.count("hiccup")

    async def lease() -> None:
        async with queue_on(server) as queue:
            with pytest.raises(QueueRefused, match="only the next task"):
                await queue.lease("wanted")

    with structlog.testing.capture_logs() as logs:
        assert 1 < virtually(lease) < 5
    assert len(server.sent("heartbeat")) == 2
    assert [(line["log_level"], line["item_id"]) for line in logs] == [("warning", ITEM)] * len(troubles)


async def test_a_given_task_without_a_usable_id_is_malformed():
    """Nobody knows which it is, so it is neither handed back nor reported."""
    server = RealServer(item_id=7)
    async with queue_on(server) as queue:
        with pytest.raises(InvalidTask, match="item_id"):
            await queue.lease("wanted")
    assert [name for name, _ in server.calls] == ["next-task"]


async def test_a_given_task_that_the_queue_does_not_have():
    """Said by the API, it is the task that is missing; said by something else, the API."""
    with pytest.raises(ItemMissing, match=r"queue\.example has no task wanted"):
        await answering(404, json={"success": False, "error": "no task wanted"}).lease("wanted")
    with pytest.raises(QueueRefused, match="no worker API at this URL"):
        await answering(404, html="<h1>404</h1>").lease("wanted")


@pytest.mark.parametrize("kind", [None, "wan"])
async def test_the_backlog_of_a_server_that_tells(kind):
    """Of this connection's kind, every time it is asked."""
    asked = []

    def server(request: httpx.Request) -> httpx.Response:
        asked.append((request.url.path, json.loads(request.content)))
        return success({"waiting": len(asked)})

    async with queue_on(server, worker_type=kind) as queue:
        assert [await queue.backlog(), await queue.backlog()] == [1, 2]
    assert asked == [("/api/worker/backlog", {"worker_type": kind} if kind else {})] * 2


@pytest.mark.parametrize(
    "answer",
    [
        httpx.Response(404, html="<h1>404</h1>"),
        httpx.Response(405),
        refusal(404, "Not found"),
        refusal(405, "Method not allowed"),
    ],
)
async def test_a_server_that_tells_no_backlog_is_asked_once(answer):
    """It cannot tell; and the next tick need not ask again."""
    asked = []
    async with queue_on(lambda request: asked.append(request) or answer) as queue:
        assert [await queue.backlog(), await queue.backlog()] == [None, None]
    assert len(asked) == 1


@pytest.mark.parametrize(
    "answer,error",
    [
        (refusal(401, "Unauthorized"), QueueAuthError),
        (refusal(500, "database"), QueueFailed),
        (httpx.Response(200, html="<h1>Maintenance</h1>"), QueueUnavailable),
        (refusal(400, "no"), QueueRefused),
        *[
            (success(data), QueueRefused)
            for data in (None, 3, {}, {"waiting": -1}, {"waiting": "3"}, {"waiting": True})
        ],
    ],
)
async def test_a_backlog_that_could_not_be_told_this_time(answer, error):
    """Raised as from any call, and asked for again the next time."""
    asked = []
    async with queue_on(lambda request: asked.append(request) or answer) as queue:
        for _ in range(2):
            with pytest.raises(error, match="backlog"):
                await queue.backlog()
    assert len(asked) == 2


# Heartbeats


def virtually(test: Callable[[], Any]) -> float:
    """Runs it under a clock that jumps; returns the seconds that passed on it."""

    async def timed() -> float:
        await test()
        return trio.current_time() - started

    clock = trio.testing.MockClock(autojump_threshold=0)
    started = clock.current_time()
    return trio.run(timed, clock=clock)


async def test_a_beat_extends_the_lease_by_its_length():
    """Only the documented fields: the server may refuse others."""
    server = RealServer()
    async with queue_on(server, extension_s=299.5) as queue:
        lease = await queue.lease()
        await queue.heartbeat(lease, Progress(stage="denoise", done=1, total=2, fraction=0.5))
    assert server.sent("heartbeat") == [{"item_id": ITEM, "worker_id": lease.worker_id, "extend_seconds": 300}]


def test_a_404_of_a_hiccup_is_not_a_lost_lease():
    """The real server says 404 for both; a second beat tells."""
    server = RealServer()
    server.hiccups = ["heartbeat"]

    async def beat() -> None:
        async with queue_on(server) as queue:
            await queue.heartbeat(await queue.lease())

    assert 1 < virtually(beat) < 5
    assert len(server.sent("heartbeat")) == 2


def test_an_overtaken_lease_is_lost():
    """The later of two leases wins; the first must hear of it, after asking twice."""
    server = RealServer()

    async def overtake() -> None:
        async with queue_on(server) as queue:
            first, second = await queue.lease(), await queue.lease()
            with pytest.raises(LeaseLost):
                await queue.heartbeat(first)
            await queue.heartbeat(second)

    virtually(overtake)
    assert len(server.sent("heartbeat")) == 3


@pytest.mark.parametrize("length_s", [2, 5, 12, 13, 60])
def test_a_lease_of_any_length_hears_that_it_was_lost(length_s, tmp_path):
    """Asking twice fits into the time of a beat of so short a lease. Not having heard would blame this machine."""
    server, outcomes = RealServer(), []

    async def overtake() -> None:
        async with queue_on(server, extension_s=length_s) as queue:
            first, _ = await queue.lease(), await queue.lease()
            outcomes.append(await Runner(queue, SleepyEngine(), temp_dir=tmp_path).run(first))

    assert virtually(overtake) < length_s / 5
    assert (outcomes[0].status, outcomes[0].machine_at_fault) == ("lease_lost", False)
    assert "not ours any more" in outcomes[0].error


def test_an_unconfirmed_404_is_not_certain():
    """When the second beat gets no answer, the lease may still be ours."""
    server = RealServer()
    server.hiccups = ["heartbeat"]

    def flaky(request: httpx.Request) -> httpx.Response:
        if len(server.sent("heartbeat")) == 1:
            raise httpx.ConnectError("down")
        return server(request)

    async def beat() -> None:
        async with queue_on(flaky) as queue:
            lease = await queue.lease()
            with pytest.raises(QueueUnavailable):
                await queue.heartbeat(lease)

    virtually(beat)


async def test_403_is_a_lost_lease_at_once():
    """Somebody else's worker_id is on the task."""
    with pytest.raises(LeaseLost):
        await answering(403, json={"success": False, "error": "mismatch"}).heartbeat(held())


@pytest.mark.parametrize(
    "page", [{"html": "<h1>The deployment could not be found</h1>"}, {"json": {"error": {"code": "not_found"}}}]
)
@pytest.mark.parametrize("status", [400, 403, 404])
async def test_only_the_api_can_take_a_lease_away(status, page):
    """A firewall or a deployment in between answers as it likes; the lease is still ours as far as anyone knows."""
    queue = answering(status, **page)
    with pytest.raises(QueueUnavailable):
        await queue.heartbeat(held())
    with pytest.raises(QueueUnavailable):
        await queue.complete(held(), "videos/1.mp4", Video(path="v", width=1, height=1, fps=1, frames=1, size_bytes=1))


async def test_progress_goes_to_servers_that_speak_of_cancelling():
    """The first answer with `cancel_requested` shows that the server knows our extensions."""
    server = RealServer(lease_seq=7)
    server.heartbeat_data = {"cancel_requested": False}
    progress = Progress(stage="denoise", done=1, total=2, fraction=0.5)
    async with queue_on(server) as queue:
        lease = await queue.lease()
        await queue.heartbeat(lease, progress)
        await queue.heartbeat(lease, progress)
        server.heartbeat_data = {"cancel_requested": True}
        with pytest.raises(CancelRequested, match=ITEM):
            await queue.heartbeat(lease)
    first, second, third = server.sent("heartbeat")
    assert "progress" not in first
    assert second["progress"] == {"stage": "denoise", "fraction": 0.5}
    assert "progress" not in third
    assert {beat["lease_seq"] for beat in (first, second, third)} == {7}


async def test_progress_goes_at_once_to_servers_that_take_it():
    """Their tasks say so, also to a container that has never asked them for anything."""
    server = RealServer(takes=["progress"])
    async with queue_on(server) as queue:
        lease = await queue.lease()
    async with queue_on(server) as container:
        await container.heartbeat(
            Lease.model_validate_json(lease.model_dump_json()), Progress(stage="a", done=1, total=2, fraction=0.5)
        )
    [beat] = server.sent("heartbeat")
    assert beat["progress"] == {"stage": "a", "fraction": 0.5}


@pytest.mark.parametrize("wanted,interval_s", [(2.0, 2), (1, 1), (0.1, 0.5), (1e4, 1e4), (None, None)])
async def test_a_queue_says_how_often_it_wants_to_hear(wanted, interval_s):
    """Nobody beats more than twice a second; more seldom than its own settings a worker does not beat either."""
    async with queue_on(RealServer(beat_interval_s=wanted)) as queue:
        lease = await queue.lease()
    assert lease.beat_interval_s == interval_s
    assert Lease.model_validate_json(lease.model_dump_json()) == lease


@pytest.mark.parametrize("wanted", ["2", True, -1, 0, 10**400, math.inf, math.nan, [2], {}])
async def test_an_interval_that_makes_no_sense_is_ignored_with_one_line(wanted):
    """A field of that name may mean something else elsewhere."""
    with structlog.testing.capture_logs() as logs:
        async with queue_on(lambda _: success_as_is(WIRE_TASK | {"beat_interval_s": wanted})) as queue:
            lease = await queue.lease()
    assert lease.beat_interval_s is None
    assert [line["fields"] for line in logs if line["event"] == "ignored"] == [["beat_interval_s"]]


def success_as_is(data: object) -> httpx.Response:
    """As JSON that is none, with NaN and Infinity, which some servers write."""
    return httpx.Response(200, content=json.dumps({"success": True, "data": data}))


@pytest.mark.parametrize("lease_seq", [True, "7", 7.5, None])
async def test_only_an_integer_is_a_lease_seq(lease_seq):
    """A field of that name may mean something else elsewhere."""
    server = RealServer(lease_seq=lease_seq)
    async with queue_on(server) as queue:
        await queue.heartbeat(await queue.lease())
    assert "lease_seq" not in server.sent("heartbeat")[0]


def test_release_is_the_shortest_lease():
    """It lapses at once, and no retry is counted."""
    server = RealServer()

    async def release() -> None:
        async with queue_on(server) as queue:
            lease = await queue.lease()
            await queue.release(lease)
            server.holder = "other"
            with pytest.raises(LeaseLost):
                await queue.release(lease)

    virtually(release)
    assert [beat["extend_seconds"] for beat in server.sent("heartbeat")] == [1, 1, 1]


# Photos


async def test_fetch_inputs(tmp_path, photo_bytes):
    """The file is in the folder, and an expired URL was presigned again."""
    server = RealServer()
    server.objects["photos/7d1c/7d1c_original.JPG"] = photo_bytes
    server.expired = 1
    async with queue_on(server) as queue:
        inputs = await queue.fetch_inputs(held(), tmp_path)
    assert inputs == {"photo": tmp_path / "photo.jpg"}
    assert inputs["photo"].read_bytes() == photo_bytes
    assert len(server.sent("presign")) == 2


async def test_presigning_again_is_done_once(tmp_path, video):
    """A clock that is hours off would otherwise turn for ever."""
    server = RealServer()
    server.objects["photos/7d1c/7d1c_original.JPG"] = b"a photo"
    server.expired = 99
    async with queue_on(server) as queue:
        with pytest.raises(UrlExpired):
            await queue.fetch_inputs(held(), tmp_path)
        with pytest.raises(UrlExpired):
            await queue.deliver(held(), video)
    assert len(server.sent("presign")) == 4


async def test_a_photo_that_does_not_decode(tmp_path):
    """What was downloaded is looked at before a GPU is."""
    server = RealServer()
    server.objects["photos/7d1c/7d1c_original.JPG"] = b"not a photo"
    async with queue_on(server) as queue:
        with pytest.raises(InvalidPhoto):
            await queue.fetch_inputs(held(), tmp_path)


@pytest.mark.parametrize("call", ["presign", "GET", "PUT"])
@pytest.mark.parametrize("page", [refusal(404, "Task not found"), httpx.Response(404, json={"code": "not_found"})])
async def test_one_404_costs_no_task(tmp_path, photo_bytes, call, page):
    """Wherever it comes from: a photo that the storage signed is there, and a finished clip has a place."""
    server, hiccups = RealServer(), [page]
    server.objects["photos/7d1c/7d1c_original.JPG"] = photo_bytes

    def hiccuping(request: httpx.Request) -> httpx.Response:
        it = request.method if request.url.host == "storage.example" else request.url.path.split("/")[-1]
        return hiccups.pop() if hiccups and it == call else server(request)

    async with queue_on(hiccuping) as queue:
        runner = Runner(queue, SleepyEngine(seconds=0), policy=Policy(retry_wait_s=0), temp_dir=tmp_path)
        with anyio.fail_after(9):
            outcome = await runner.run(await queue.lease())
    assert not hiccups
    assert (outcome.status, outcome.error) == ("completed", None)


@pytest.mark.parametrize("method", ["GET", "PUT"])
async def test_a_storage_that_this_machine_cannot_reach_fails_no_task(tmp_path, photo_bytes, method):
    """No name, no route, no TLS, a firewall: no task is to blame, and the next would fare no better."""
    server = RealServer()
    server.objects["photos/7d1c/7d1c_original.JPG"] = photo_bytes

    def unreachable(request: httpx.Request) -> httpx.Response:
        if request.method == method:
            raise httpx.ConnectError("certificate verify failed")
        return server(request)

    async with queue_on(unreachable) as queue:
        runner = Runner(queue, SleepyEngine(seconds=0), policy=Policy(retry_wait_s=0), temp_dir=tmp_path)
        with anyio.fail_after(9):
            outcome = await runner.run(await queue.lease())
    assert (outcome.status, outcome.worker_should) == ("released", "wait")
    assert "certificate verify failed" in outcome.error
    assert server.retry_count == 0


async def test_a_video_without_a_place_is_not_the_tasks_own_fault(video):
    """The bucket is gone, say: else every clip would be made and thrown away, and no worker would ever stop."""

    def server(request: httpx.Request) -> httpx.Response:
        if request.method == "PUT":
            return supabase("not_found", 404)
        return success({"url": "https://storage.example/v.mp4", "storage_path": "videos/v.mp4"})

    with pytest.raises(StorageUnavailable) as caught:
        await queue_on(server).deliver(held(), video)
    assert not caught.value.task_at_fault


async def test_an_empty_photo_is_the_tasks_own_fault(tmp_path):
    """Whoever leased it next would find the same 0 bytes, however long it waited for them."""
    server = RealServer()
    server.objects["photos/7d1c/7d1c_original.JPG"] = b""
    async with queue_on(server) as queue:
        with pytest.raises(I2VError, match="empty") as caught:
            await queue.fetch_inputs(held(), tmp_path)
    assert caught.value.task_at_fault


async def test_a_missing_photo_is_told_from_a_storage_that_is_away(tmp_path):
    """Both are 500 without a reason. Where an upload is signed the storage works: it is the photo that is missing."""
    server = RealServer()
    async with queue_on(server) as queue:
        with pytest.raises(ObjectUnsigned, match="Failed to generate download URL") as missing:
            await queue.fetch_inputs(held(), tmp_path)
    assert [body["operation"] for body in server.sent("presign")] == ["download", "upload"]
    assert (missing.value.retryable, missing.value.task_at_fault) == (True, True)
    async with queue_on(lambda request: failed(json.loads(request.content)["operation"])) as queue:
        with pytest.raises(StorageAway, match="Failed to generate upload URL") as away:
            await queue.fetch_inputs(held(), tmp_path)
    assert (away.value.retryable, away.value.hand_back, away.value.is_outage) == (True, True, True)


def test_missing_photos_fail_within_seconds_and_stop_no_worker(tmp_path):
    """Three tries, five seconds apart, as the documents say; however many there are, this machine can work."""
    server, outcomes = RealServer(), []

    async def work() -> None:
        async with queue_on(server) as queue:
            runner = Runner(queue, SleepyEngine(), temp_dir=tmp_path)
            worker = Worker(queue, runner, concurrency=1, on_outcome=outcomes.append)
            await worker.run(at_most=4)

    assert 40 < virtually(work) < 100
    assert [(it.status, it.machine_at_fault) for it in outcomes] == [("failed", False)] * 4
    assert server.retry_count == 4


@pytest.mark.parametrize(
    "status,error,expected",
    [
        (200, "Failed to presign", ObjectUnsigned),
        (404, "No such file", ObjectUnsigned),
        (400, "Object not found", ObjectUnsigned),
        (500, "Object not found", ObjectUnsigned),  # else it would be handed back and leased again for ever
        (401, "Worker not found", QueueAuthError),
        (400, "storage_path is required", QueueRefused),
        (500, "Internal error", StorageAway),  # no upload is signed either, so nothing is known of the photo
    ],
)
async def test_a_photo_that_cannot_be_presigned(tmp_path, status, error, expected):
    """Supabase signs only what exists, so a missing photo shows here."""
    with pytest.raises(I2VError, match=error) as caught:
        await answering(status, json={"success": False, "error": error}).fetch_inputs(held(), tmp_path)
    assert type(caught.value) is expected


@pytest.mark.parametrize(
    "data", [None, {}, {"url": 7}, {"url": ""}, {"url": "https://s/", "storage_path": "/a"}, {"url": "https://s/"}]
)
async def test_a_presign_answer_of_another_shape(video, data):
    """What the server calls the path is reported, so it must be one."""
    with pytest.raises(QueueRefused, match="presign"):
        await answering(200, json={"success": True, "data": data}).deliver(held(), video)


# Delivery


async def test_deliver(video):
    """The plain path where it is free, even if the first URL had expired."""
    server = RealServer()
    server.expired = 1
    async with queue_on(server) as queue:
        assert await queue.deliver(held(), video) == f"videos/{ITEM}.mp4"
    assert server.objects == {f"videos/{ITEM}.mp4": b"an mp4"}


async def test_the_video_of_an_earlier_prompt_is_not_ours(video):
    """An admin queued the item again with another prompt: the old object stays, and is not reported."""
    server = RealServer()
    server.objects[f"videos/{ITEM}.mp4"] = b"of the earlier prompt"
    async with queue_on(server) as queue:
        path = await queue.deliver(held(), video)
    assert path == f"videos/{ITEM}.abcdef012345.mp4"
    assert server.objects == {f"videos/{ITEM}.mp4": b"of the earlier prompt", path: b"an mp4"}


def failed(call: str) -> httpx.Response:
    """What the real route answers where the storage signs nothing."""
    return refusal(500, f"Failed to generate {call} URL")


@pytest.mark.parametrize(
    "status,says",
    [
        *[(status, "Failed to presign: The resource already exists") for status in (200, 400, 409, 500)],
        (400, "DUPLICATE"),
        (500, "Failed to generate upload URL"),
    ],
)
async def test_a_taken_path_that_is_not_even_presigned(video, status, says):
    """As Supabase does where overwriting was not asked for, whatever status its words are passed on with, if any."""
    server = RealServer()
    server.taken = refusal(status, says)
    server.objects[f"videos/{ITEM}.mp4"] = b"of the earlier prompt"
    async with queue_on(server) as queue:
        second = await queue.deliver(held(), video)
        third = await queue.deliver(held(), video)
    assert second == f"videos/{ITEM}.abcdef012345.mp4"
    assert third.startswith(f"videos/{ITEM}.abcdef012345-")
    assert server.objects == {f"videos/{ITEM}.mp4": b"of the earlier prompt", second: b"an mp4", third: b"an mp4"}


async def test_an_upload_whose_answer_was_lost(video):
    """It was stored all the same; each further try finds a path of its own."""
    server = RealServer()
    server.objects[f"videos/{ITEM}.mp4"] = b"of an earlier prompt"
    async with queue_on(server) as queue:
        await queue.deliver(held(), video)  # its caller never heard of it
        path = await queue.deliver(held(), video)
        server.lost_replies = ["PUT"]
        server.objects.clear()
        with pytest.raises(StorageUnavailable):
            await queue.deliver(held(), video)
        assert await queue.deliver(held(), video) == f"videos/{ITEM}.abcdef012345.mp4"
    assert path.startswith(f"videos/{ITEM}.abcdef012345-")


async def test_a_server_that_ignores_the_extension(video):
    """Then there is no path to be had, and nothing was overwritten."""

    def server(request: httpx.Request) -> httpx.Response:
        if request.method == "PUT":
            return supabase("Duplicate", 409)
        return success({"url": "https://storage.example/v.mp4", "storage_path": "videos/v.mp4"})

    with pytest.raises(ObjectExists):
        await queue_on(server).deliver(held(), video)


async def test_a_server_that_signs_no_upload_at_all(video):
    """Then it is not the path: three were asked for at once, and whoever called decides how often to come again."""
    asked = []
    async with queue_on(lambda request: asked.append(json.loads(request.content)) or failed("upload")) as queue:
        with pytest.raises(QueueFailed, match="Failed to generate upload URL") as caught:
            await queue.deliver(held(), video)
    assert (caught.value.task_at_fault, caught.value.hand_back) == (False, False)
    assert len({it["file_extension"] for it in asked}) == len(asked) == 3


async def test_a_task_whose_worker_was_killed_before_its_report(tmp_path, photo_bytes):
    """Its video lies at the plain path, which is refused from then on; the next lease completes the task anyway."""
    server = RealServer()
    server.objects["photos/7d1c/7d1c_original.JPG"] = photo_bytes
    async with queue_on(server) as queue:
        runner = Runner(queue, SleepyEngine(seconds=0), temp_dir=tmp_path)
        server.objects[f"videos/{ITEM}.mp4"] = b"of the worker that was killed"
        lease = await queue.lease()
        with anyio.fail_after(5):
            outcome = await runner.run(lease)
    assert (outcome.status, server.status) == ("completed", "completed")
    assert outcome.storage_path == f"videos/{ITEM}.{lease.token}.mp4"
    assert server.objects[outcome.storage_path] == b"frames"
    assert server.sent("report")[0]["video_storage_path"] == outcome.storage_path


async def test_an_upload_for_a_task_the_server_does_not_find(video):
    """A hiccup where a heartbeat is answered: the next path is asked for. Only a beat may call a lease lost."""
    server = RealServer()
    async with queue_on(server) as queue:
        lease = await queue.lease()
        server.hiccups = ["presign"]
        assert await queue.deliver(lease, video) == f"videos/{ITEM}.{lease.token}.mp4"
        server.hiccups = ["presign"] * 3
        with pytest.raises(QueueFailed, match=ITEM):
            await queue.deliver(lease, video)
    assert len(server.sent("heartbeat")) == 4


def test_an_upload_for_a_task_that_is_gone(video):
    """The beat says so, twice, and nothing else is asked for."""
    server = RealServer()

    async def deliver() -> None:
        async with queue_on(server) as queue:
            server.hiccups = ["presign"]
            with pytest.raises(LeaseLost):
                await queue.deliver(held(), video)

    virtually(deliver)
    assert [name for name, _ in server.calls] == ["presign", "heartbeat", "heartbeat"]


# Reports


async def test_complete(video):
    """The path and the ids the report knows; twice is once."""
    server = RealServer(lease_seq=7)
    server.objects["videos/1.mp4"] = b"an mp4"
    paid = video.model_copy(update={"external_ids": {"runway_task_id": "r-1", "comfy_id": "c-1"}})
    async with queue_on(server) as queue:
        lease = await queue.lease()
        server.lost_replies = ["report"]
        with pytest.raises(QueueUnavailable):
            await queue.complete(lease, "videos/1.mp4", paid)
        await queue.complete(lease, "videos/1.mp4", paid)
    assert server.status == "completed"
    assert server.sent("report")[0] == {
        "item_id": ITEM,
        "worker_id": lease.worker_id,
        "lease_seq": 7,
        "status": "completed",
        "video_storage_path": "videos/1.mp4",
        "runway_task_id": "r-1",
    }


@pytest.mark.parametrize(
    "extras,cost_usd,reported",
    [
        ({"takes": ["progress", "cost_usd"]}, 0.25, {"cost_usd": 0.25}),
        ({"takes": ["progress", "cost_usd"]}, 0.0, {"cost_usd": 0.0}),
        ({"takes": ["cost_usd"]}, None, {}),
        ({"takes": ["progress"]}, 0.25, {}),
        ({"takes": "cost_usd"}, 0.25, {}),
        ({"takes": None}, 0.25, {}),
        ({}, 0.25, {}),
    ],
)
async def test_what_a_video_cost_is_told_to_who_takes_it(video, extras, cost_usd, reported):
    """The real server knows no such field, so it is told nothing of it."""
    server = RealServer(**extras)
    server.objects["videos/1.mp4"] = b"an mp4"
    async with queue_on(server) as queue:
        lease = await queue.lease()
        await queue.complete(lease, "videos/1.mp4", video.model_copy(update={"cost_usd": cost_usd}))
    [report] = server.sent("report")
    assert {name: report[name] for name in report if name == "cost_usd"} == reported


def test_a_failed_report_whose_answer_was_lost():
    """It is asked about, never repeated: each one that lands counts against the task."""
    server = RealServer()

    async def report() -> None:
        async with queue_on(server) as queue:
            lease = await queue.lease()
            server.lost_replies = ["report"]
            with pytest.raises(QueueUnavailable):
                await queue.fail(lease, "no")
            with pytest.raises(LeaseLost):
                await queue.heartbeat(lease)

    virtually(report)
    assert server.retry_count == 1


@pytest.mark.parametrize(
    "message,reported",
    [("two\nlines\0\ud800!", "two lines !"), ("x" * 5000, "x" * 1000), ("", "no reason given")],
)
async def test_error_messages_fit_the_server(message, reported):
    """One line, bounded, nothing that PostgreSQL refuses."""
    server = RealServer()
    async with queue_on(server) as queue:
        await queue.fail(await queue.lease(), message)
    assert server.sent("report")[0]["error_message"] == reported


@pytest.mark.parametrize("status", [403, 404])
def test_reporting_what_is_not_ours(status, video):
    """Both mean to stop quietly; a 404 once a heartbeat has said the same."""

    async def report() -> None:
        queue = answering(status, json={"success": False, "error": "no"})
        with pytest.raises(LeaseLost):
            await queue.complete(held(), "videos/1.mp4", video)
        with pytest.raises(LeaseLost):
            await queue.fail(held(), "no")

    assert virtually(report) < 10


@pytest.mark.parametrize("end", ["completed", "failed"])
async def test_a_404_to_a_report_is_asked_about(video, end):
    """The real route says it for any error of its own SELECT: a beat that is answered shows that the task is ours.

    It also shows that a failure has not landed, so that repeating it counts it once.
    """
    server = RealServer()
    server.objects["videos/1.mp4"] = b"an mp4"
    async with queue_on(server) as queue:
        lease = await queue.lease()
        server.hiccups = ["report"]
        await (queue.complete(lease, "videos/1.mp4", video) if end == "completed" else queue.fail(lease, "no"))
    assert (server.status, server.retry_count) == (end, end == "failed")
    assert [name for name, _ in server.calls][1:] == ["report", "heartbeat", "report"]


async def test_a_report_that_is_not_found_while_beats_are_answered(video):
    """It may be next time: nothing is lost before a beat says so."""
    server = RealServer()
    async with queue_on(server) as queue:
        lease = await queue.lease()
        server.hiccups = ["report"] * 2
        with pytest.raises(QueueFailed, match="404"):
            await queue.complete(lease, "videos/1.mp4", video)


def test_a_404_to_handing_back_is_not_believed_at_once():
    """Else the task would wait for its lease to run out."""
    server = RealServer()

    async def release() -> None:
        async with queue_on(server) as queue:
            lease = await queue.lease()
            server.hiccups = ["heartbeat"]
            await queue.release(lease)

    virtually(release)
    assert [beat["extend_seconds"] for beat in server.sent("heartbeat")] == [1, 1]


# Errors of the wire


@pytest.mark.parametrize(
    "answer,error,says",
    [
        (refusal(400, "worker_id is required"), QueueRefused, "worker_id is required"),
        (refusal(200, "no such luck"), QueueRefused, "no such luck"),
        (refusal(401, "Unauthorized"), QueueAuthError, "WORKER_API_KEY"),
        (httpx.Response(401, html="<h1>Log in</h1>"), QueueAuthError, "WORKER_API_KEY"),
        (refusal(404, "Not found"), QueueRefused, "no worker API at this URL"),
        (httpx.Response(404, html="<h1>404</h1>"), QueueRefused, "no worker API at this URL"),
        (
            httpx.Response(308, headers={"Location": "https://www.queue.example/x?s=1"}),
            QueueRefused,
            "www.queue.example",
        ),
        (refusal(429, "slow"), QueueUnavailable, "429 slow"),
        (refusal(500, "database"), QueueFailed, "500 database"),
        (httpx.Response(502, html="<h1>Bad gateway</h1>"), QueueUnavailable, "502"),
        (httpx.Response(200, html="<h1>Maintenance</h1>"), QueueUnavailable, "something other"),
        (httpx.Response(200, content=b"[" * 100_000), QueueUnavailable, "something other"),
        (httpx.Response(200, json=[1]), QueueRefused, "not an answer"),
        (httpx.Response(200, json={"success": "yes"}), QueueRefused, "not an answer"),
        (refusal(400, f"bad key {KEY}"), QueueRefused, "bad key …"),
    ],
)
async def test_answers_and_their_errors(answer, error, says):
    """Each says what to do where something can be done, and none holds the key."""
    queue = queue_on(lambda _: answer)
    for call in (queue.lease, queue.check):
        if call == queue.check and answer.status_code == 404 and b"success" in answer.content:
            continue  # to a probe that is the good answer
        with pytest.raises(QueueError, match=says) as caught:
            await call()
        assert type(caught.value) is error
        assert KEY not in f"{caught.value!r} {caught.value.__context__!r}"


async def test_an_api_that_was_there_is_waited_for():
    """While a deployment changes hands its address answers 404; stopping would hand back what is being made."""
    answers = [httpx.Response(404, html="<h1>DEPLOYMENT_NOT_FOUND</h1>"), refusal(404, "Not found"), success(None)]
    queue = queue_on(lambda _: answers.pop())
    assert await queue.lease() is None
    for _ in range(2):
        with pytest.raises(QueueUnavailable, match="404"):
            await queue.lease()


def subclasses(root: type) -> set[type]:
    return {root}.union(*(subclasses(child) for child in root.__subclasses__()))


@pytest.mark.parametrize(
    "kind",
    sorted(
        subclasses(httpx.HTTPError) | subclasses(httpx.StreamError) | {httpx.InvalidURL, OSError},
        key=lambda kind: kind.__name__,
    ),
    ids=lambda kind: kind.__name__,
)
async def test_no_exception_of_httpx_escapes(kind):
    """No answer is no answer, whatever httpx calls it."""

    def fail(_: httpx.Request) -> httpx.Response:
        error = kind.__new__(kind)
        Exception.__init__(error, f"with {KEY}")
        raise error

    with pytest.raises(QueueUnavailable) as caught:
        await queue_on(fail).lease()
    assert KEY not in str(caught.value)


def test_a_server_that_never_answers():
    """A call ends within its limit, however slowly bytes arrive."""

    async def forever(_: httpx.Request) -> httpx.Response:
        await trio.sleep_forever()
        raise AssertionError

    async def lease() -> None:
        with pytest.raises(QueueUnavailable, match="TimeoutError"):
            await queue_on(forever, request_timeout_s=10).lease()

    assert 10 <= virtually(lease) < 11


async def test_check_leases_nothing():
    """A 404 to a beat for a task that cannot exist proves address and key."""
    server = RealServer()
    async with queue_on(server) as queue:
        await queue.check()
    assert [name for name, _ in server.calls] == ["heartbeat"]
    async with queue_on(server, api_key="wrong") as queue:
        with pytest.raises(QueueAuthError):
            await queue.check()


async def test_vercels_deployment_protection_is_not_the_key(video):
    """Its page is told as what it is; with the bypass every call gets through, and the secret is said nowhere."""
    bypass, real = "bypass-0123456789", RealServer()
    page = httpx.Response(401, html='<script>document.cookie = "_vercel_sso_nonce=abc"</script>')

    def server(request: httpx.Request) -> httpx.Response:
        return real(request) if request.headers.get("x-vercel-protection-bypass") == bypass else page

    for secret in (None, "wrong"):
        async with queue_on(server, bypass=secret) as queue:
            for call in (queue.lease, queue.check, lambda: queue.heartbeat(held())):
                with pytest.raises(QueueAuthError, match="Deployment Protection") as caught:
                    await call()
                assert "WORKER_API_KEY" not in str(caught.value)
                assert "wrong" not in str(caught.value)
    storage = Storage(transport=httpx.MockTransport(real))
    async with queue_on(server, bypass=f" {bypass}\n", storage=storage) as queue:
        lease = await queue.lease()
        await queue.heartbeat(lease)
        assert await queue.deliver(lease, video)
    async with queue_on(lambda _: refusal(400, f"no {bypass}"), bypass=bypass) as queue:
        with pytest.raises(QueueRefused, match="no …"):
            await queue.lease()


# Settings


@pytest.mark.parametrize("path", ["", "/", "/api", "/api/"])
async def test_addresses_with_and_without_api(path):
    """Deployments configure it either way."""
    seen = []

    def server(request: httpx.Request) -> httpx.Response:
        seen.append((str(request.url), request.headers.get("Authorization")))
        return success(None)

    transport = httpx.MockTransport(server)
    for scheme in ("worker", "bearer"):
        async with LifeIsShortQueue(
            f"https://queue.example{path}",
            KEY,
            worker_id="w",
            storage=Storage(),
            auth_scheme=scheme,
            transport=transport,
        ) as queue:
            await queue.lease()
    url = "https://queue.example/api/worker/next-task"
    assert seen == [(url, f"Worker {KEY}"), (url, f"Bearer {KEY}")]


@pytest.mark.parametrize("url", ["http://localhost:3000", "http://127.0.0.1:3000/api", "http://[::1]:3000"])
async def test_this_machine_may_do_without_https_and_key(url):
    """The embedded server on a laptop."""
    transport = httpx.MockTransport(lambda request: success(None) if "Authorization" not in request.headers else None)
    async with LifeIsShortQueue(url, None, worker_id="w", storage=Storage(), transport=transport) as queue:
        assert await queue.lease() is None


@asynccontextmanager
async def listening(answer: bytes) -> AsyncIterator[tuple[str, list[str]]]:
    """A server on loopback that answers everything so: its origin, and the first line of each request."""
    seen = []

    async def serve(stream: anyio.abc.SocketStream) -> None:
        async with stream:
            request = await stream.receive()
            while not request.startswith(b"CONNECT") and b"}" not in request:
                request += await stream.receive()
            seen.append(request.partition(b"\r\n")[0].decode())
            await stream.send(answer)

    listener = await anyio.create_tcp_listener(local_host="127.0.0.1")
    async with listener, anyio.create_task_group() as tasks:
        tasks.start_soon(listener.serve, serve)
        yield f"http://127.0.0.1:{listener.extra(anyio.abc.SocketAttribute.local_port)}", seen
        tasks.cancel_scope.cancel()


async def test_this_machine_is_not_looked_for_behind_a_proxy(monkeypatch):
    """A proxy would look for the embedded server on itself, and be told the key; over https it learns a name."""
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    answer = b'HTTP/1.1 200 OK\r\nContent-Length: 16\r\n\r\n{"success":true}'
    async with listening(b"HTTP/1.1 502 No\r\n\r\n") as (proxy, asked), listening(answer) as (origin, seen):
        for name in ("http_proxy", "https_proxy", "all_proxy"):
            monkeypatch.setenv(name, proxy)
        async with LifeIsShortQueue(origin, KEY, worker_id="w", storage=Storage()) as queue:
            assert await queue.lease() is None
        assert (len(seen), asked) == (1, [])
        async with LifeIsShortQueue("https://queue.example", KEY, worker_id="w", storage=Storage()) as queue:
            with pytest.raises(QueueUnavailable):
                await queue.lease()
        assert asked == ["CONNECT queue.example:443 HTTP/1.1"]


@pytest.mark.parametrize(
    "url",
    [
        "http://queue.example",
        "http://10.0.0.1",
        "",
        "queue.example",
        "ftp://h",
        "https://u:p@h",
        "https://h?x",
        "https://[::1",
        "https://h:99999",
        "http://127.0.0.1:65536",
    ],
)
def test_addresses_the_key_must_not_travel_to(url):
    """In the clear only on this machine."""
    with pytest.raises(SettingsError, match="VERCEL_API_URL"):
        LifeIsShortQueue(url, KEY, worker_id="w", storage=Storage())


@pytest.mark.parametrize(
    "options,says",
    [
        ({"api_key": "a\nb"}, "WORKER_API_KEY"),
        ({"api_key": "ключ"}, "WORKER_API_KEY"),
        ({"bypass": "ключ"}, "VERCEL_AUTOMATION_BYPASS_SECRET"),
        ({"worker_id": "my host"}, "WORKER_ID"),
        ({"extension_s": 1}, "LEASE_DURATION"),
        ({"lease_s": 0}, "LEASE_DURATION"),
    ],
)
def test_settings_that_cannot_work(options, says):
    """Found before a task is leased, and without showing the key."""
    with pytest.raises(SettingsError, match=says) as caught:
        queue_on(RealServer(), **options)
    assert str(options.get("api_key")) not in str(caught.value)
