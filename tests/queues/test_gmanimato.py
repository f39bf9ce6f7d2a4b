"""The GmAnimato dialect, against an application of ours that behaves as the real one does."""

import base64
import json
from collections.abc import Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from inference.errors import (
    I2VError,
    InvalidPhoto,
    InvalidTask,
    LeaseLost,
    ObjectTooLarge,
    QueueAuthError,
    QueueFailed,
    QueueRefused,
    QueueUnavailable,
    SettingsError,
    StorageRefused,
)
from inference.leasing.retry import Policy
from inference.leasing.runner import Runner
from inference.leasing.taking import CLAIM_LIMIT_S
from inference.progress.stages import Progress
from inference.queues import gmanimato
from inference.queues.gmanimato import GmAnimatoQueue
from inference.queues.gmanimato_wire import parse_job
from inference.task import Input, Lease, Task, Video
from inference.transfer.bucket import Bucket
from inference.transfer.storage import Storage
from tests.leasing.test_runner import SleepyEngine
from tests.support.gmanimato_app import (
    DATABASE_DOWN,
    GATEWAY_DOWN,
    HANGS,
    HANGS_AFTER,
    REPLY_LOST,
    REQUEST_LOST,
    WORKFLOW,
    Application,
    Fault,
    GmAnimatoServer,
    as_json,
    page,
)
from tests.support.s3_server import S3Server
from tests.support.virtual import virtual_time

pytestmark = pytest.mark.anyio

HALF = Progress(stage="render", done=1, total=2, fraction=0.5)


def queue_on(app: Application, **options: Any) -> GmAnimatoQueue:
    """A queue whose requests reach the application without sockets."""
    options = {
        "worker_id": "host-1",
        "storage": Storage(transport=httpx.MockTransport(app.answer)),
        "transport": httpx.MockTransport(app.answer),
    } | options
    return GmAnimatoQueue("https://gmanimato.test", app.secret, **options)


def answering(status: int, **content: Any) -> GmAnimatoQueue:
    """A queue that gets this answer to everything."""
    transport = httpx.MockTransport(lambda _: httpx.Response(status, **content))
    return GmAnimatoQueue(
        "https://gmanimato.test", "s", worker_id="host-1", storage=Storage(transport=transport), transport=transport
    )


@asynccontextmanager
async def served(app: GmAnimatoServer, **options: Any):
    """A queue on a real server."""
    async with (
        Storage(trusted_origins=[app.url]) as storage,
        GmAnimatoQueue(app.url, app.secret, worker_id="host-1", storage=storage, **options) as queue,
    ):
        yield queue


@pytest.fixture
def app():
    """The application, without sockets."""
    return Application(origin="https://gmanimato.test")


@pytest.fixture
def make_video(tmp_path: Path) -> Callable[..., Video]:
    """Makes a video of some bytes."""

    def make(body: bytes = b"frames", name: str = "clip.mp4", others: dict[str, bytes] | None = None) -> Video:
        path = tmp_path / name
        path.write_bytes(body)
        files = {}
        for number, (other, content) in enumerate((others or {}).items()):
            files[other] = tmp_path / f"other-{number}"
            files[other].write_bytes(content)
        return Video(path=path, width=64, height=48, fps=24, frames=25, size_bytes=len(body), others=files)

    return make


# Jobs


async def test_a_job_as_the_application_answers_it(app, photo_bytes):
    """The graph, the photo under the name that the graph calls, the weights; half an hour, and two seconds a beat."""
    video_id = app.add(photo_bytes)
    async with queue_on(app) as queue:
        lease = await queue.lease()
    task = lease.task
    assert task.item_id == f"local-{video_id}"
    assert list(task.inputs) == [f"{video_id}.png"]
    assert task.inputs[f"{video_id}.png"].kind == "image"
    assert task.workflow["14"]["inputs"]["image"] == f"{video_id}.png"
    assert task.node_weights == {"44": 60, "4": 20, "16": 15}
    assert task.extras == {"video_id": video_id, "callback_url": f"https://gmanimato.test/api/i2v-webhook/{video_id}"}
    assert (lease.length_s, lease.beat_interval_s) == (86_400, 2)
    assert lease.worker_id.startswith("host-1.")
    assert Lease.model_validate_json(lease.model_dump_json()) == lease


async def test_first_and_last_photo_and_videos(app, photo_bytes):
    """Two photos under their names; newer versions carry videos, and perhaps no image."""
    both = app.add(photo_bytes, photo_bytes, inline=True)
    none = app.add(photo_bytes, videos={"ref_video.mp4": b"film"}, images=[])
    async with queue_on(app) as queue:
        first, second = (await queue.lease()).task, (await queue.lease()).task
    assert list(first.inputs) == [f"{both}_first.png", f"{both}_last.png"]
    assert all(each.source.startswith("data:image/png;base64,") for each in first.inputs.values())
    assert second.item_id == f"local-{none}"
    assert {name: each.kind for name, each in second.inputs.items()} == {"ref_video.mp4": "video"}


async def test_the_older_form(app, photo_bytes):
    """Flat: `id` is the video's, `job_id` is what the webhook wants to read, and no graph means a plain photo task."""
    video_id = app.add_flat(photo_bytes)
    with_graph = app.add_flat(photo_bytes, workflow=WORKFLOW)
    async with queue_on(app) as queue:
        lease = await queue.lease()
        await queue.fail(lease, "no")
        second = (await queue.lease()).task
    task = lease.task
    assert (task.item_id, task.prompt, task.workflow) == (f"local-{video_id}", "waves roll in", None)
    assert list(task.inputs) == ["photo"]
    assert (task.extras["video_id"], task.extras["tags"]) == (video_id, ["sea"])
    assert app.jobs[video_id].status == "failed"
    assert (second.extras["video_id"], second.workflow) == (with_graph, WORKFLOW)
    assert list(second.inputs) == ["photo"]


def test_the_older_form_with_a_graph_that_names_the_photo():
    """Its own worker uploads the photo as `<id>.png`, so graphs written for that load this name."""
    graph = {"1": {"class_type": "LoadImage", "inputs": {"image": "7.png"}}}
    assert list(parse_job(FLAT | {"workflow": graph}).inputs) == ["7.png"]
    deep: Any = "7.png"
    for _ in range(5000):
        deep = [deep]
    assert list(parse_job(FLAT | {"workflow": {"1": {"inputs": {"image": deep}}}}).inputs) == ["7.png"]


@pytest.mark.parametrize(
    "name", ["Screenshot 2026-05-01 at 3.41.12\u202fPM.png", "\U0001f469\u200d\U0001f52c.png", "海 1.png"]
)
def test_names_as_people_have_them(name):
    """Reference images keep the names of their files: macOS puts a narrow space into those of screenshots."""
    assert list(parse_job(nested(images=[{"name": name, "image": "https://s3.test/7"}])).inputs) == [name]


GRAPH = {"1": {"class_type": "A", "inputs": {}}}
NESTED = {"id": "local-7", "input": {"workflow": GRAPH, "images": [{"name": "7.png", "image": "https://s3.test/7"}]}}
FLAT = {"id": "7", "job_id": "local-7", "original_image_url": "https://s3.test/7", "prompt": None}


def nested(**fields: Any) -> dict[str, Any]:
    return NESTED | {"input": NESTED["input"] | fields}


def test_what_no_video_depends_on_fails_no_job():
    """Weights that are none, a callback_url that is none, null in place of lists, fields of the future."""
    weights = {"1": 2, "2": "x", "3": float("nan"), "4": -1, "5": True}
    payload = nested(node_weights=weights, callback_url=7, videos=None, mood="calm") | {"priority": 3}
    assert parse_job(payload) == Task(
        item_id="local-7",
        inputs={"7.png": Input(source="https://s3.test/7")},
        workflow=GRAPH,
        node_weights={"1": 2.0},
        duration_s=5,
        names_duration=False,
        extras={"mood": "calm", "priority": 3, "video_id": "7"},
    )
    assert parse_job(nested(images=None)).inputs == {}
    assert parse_job(FLAT | {"job_id": None}).item_id == "7"
    assert list(parse_job(FLAT | {"last_image_url": "data:image/png;base64,AA=="}).inputs) == ["photo", "last_photo"]


@pytest.mark.parametrize(
    "payload,field",
    [
        (nested(workflow=None), "input.workflow"),
        (nested(workflow={}), "input.workflow"),
        (nested(workflow="graph"), "input.workflow"),
        (nested(images={}), "input.images"),
        (nested(images=[{"name": "a"}]), "input.images.0.image"),
        (nested(images=[{"name": "", "image": "https://x"}]), "input.images.0.name"),
        (nested(images=[{"name": "a\n", "image": "https://x"}]), "input.images.0.name"),
        (nested(images=[{"name": "a", "image": "photos/a.png"}]), "input.images.0.image"),
        (nested(images=[{"name": "a", "image": "ftp://x/a"}]), "input.images.0.image"),
        (nested(images=[{"name": "a", "image": "https://x"}] * 2), "same name"),
        (nested(videos=[{"name": "7.png", "image": "https://x"}]), "same name"),
        (NESTED | {"input": None}, "input"),
        (FLAT | {"original_image_url": None}, "original_image_url"),
        (FLAT | {"workflow": 7}, "workflow"),
    ],
)
def test_a_malformed_job_names_its_field(payload, field):
    """And its id, so that it can be reported failed. What a data URI holds is not repeated."""
    with pytest.raises(InvalidTask, match=field) as caught:
        parse_job(payload)
    assert caught.value.item_id == "local-7"


@pytest.mark.parametrize("bad", [None, "", 7, "a b", "local-..", "..", "a/b", "x" * 201, "local-"])
def test_an_id_that_is_no_part_of_a_path(bad):
    """It would lead to another route, or to another folder of a bucket."""
    with pytest.raises(InvalidTask, match="id") as caught:
        parse_job(NESTED | {"id": bad})
    assert caught.value.item_id is None


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=12,
)


@given(
    st.one_of(
        JSON,
        st.fixed_dictionaries(
            {"id": JSON | st.just("local-7"), "input": JSON | st.fixed_dictionaries({"workflow": JSON, "images": JSON})}
        ),
        st.fixed_dictionaries({"id": st.just("7"), "original_image_url": JSON | st.just("https://x"), "prompt": JSON}),
    )
)
def test_any_payload_is_a_task_or_an_invalid_one(payload):
    """Whatever is sent, it ends in one of two ways."""
    try:
        task = parse_job(payload)
    except InvalidTask:
        return
    assert task.workflow is not None or "photo" in task.inputs


@pytest.mark.parametrize("faults", [[], [REQUEST_LOST, DATABASE_DOWN]])
def test_a_malformed_job_is_reported_failed(faults, photo_bytes):
    """Nobody else would: it is said to its page, and again if that is not heard."""

    @virtual_time
    async def story():
        app = Application(origin="https://gmanimato.test")
        video_id = app.add(photo_bytes, workflow=None)
        app.faults["webhook"].extend(faults)
        async with queue_on(app) as queue:
            with pytest.raises(InvalidTask, match=r"input\.workflow"):
                await queue.lease()
        assert app.jobs[video_id].status == "failed"
        assert "input.workflow" in app.finals(video_id)[0].body["error"]

    story()


async def test_a_malformed_job_is_logged_without_what_it_holds(app, photo_bytes):
    """Photos may be in it, and signed URLs: the log names its fields."""
    images = [
        {"name": "", "image": "data:image/png;base64,UElYRUxT"},
        {"name": "a", "image": "https://s3.test/a?sig=1"},
    ]
    app.add(photo_bytes, images=images)
    async with queue_on(app) as queue:
        with structlog.testing.capture_logs() as logs, pytest.raises(InvalidTask):
            await queue.lease()
    assert not [word for word in ("UElYRUxT", "base64", "sig=1") if word in repr(logs)]
    assert "input.images" in logs[0]["fields"]


async def test_a_job_that_cannot_be_reported_is_told_loudly(app, photo_bytes):
    """An unusable id, or a webhook that does not know it."""
    video_id = app.add(photo_bytes, workflow=None)
    app.jobs[video_id].answer["id"] = "local-unknown"
    app.callbacks = "absent"
    app.jobs[app.add(photo_bytes)].answer["id"] = "a b"
    async with queue_on(app) as queue:
        for _ in range(2):
            with structlog.testing.capture_logs() as logs, pytest.raises(InvalidTask):
                await queue.lease()
            assert [line for line in logs if line["log_level"] == "error"]


# Asking for a job


async def test_nothing_to_do(app):
    """404 is an empty queue, and no reason to ask anything else."""
    async with queue_on(app) as queue:
        assert await queue.lease() is None
        assert await queue.backlog() is None
        with pytest.raises(QueueRefused, match="only the next"):
            await queue.lease("local-7")
    assert [each.method for each in app.asked] == ["GET"]
    assert app.asked[0].headers["accept-encoding"] == "identity"


async def test_a_404_that_may_be_an_address_without_a_queue():
    """A worker would wait there for ever: at the first 404 that does not say why, one OPTIONS tells; never HEAD."""
    asked = []

    def elsewhere(request, status, allow):
        asked.append(request.method)
        headers = {"Allow": allow} if allow else {}
        return httpx.Response(404 if request.method == "GET" else status, headers=headers, text="<h1>Not Found</h1>")

    cases = ((405, "GET, HEAD", True), (204, "", True), (405, "", False), (404, "", False), (303, "", False))
    for status, allow, is_there in cases:
        transport = httpx.MockTransport(lambda request, of=(status, allow): elsewhere(request, *of))
        async with GmAnimatoQueue(
            "https://wrong.test", "s", worker_id="w", storage=Storage(), transport=transport
        ) as queue:
            if is_there:
                assert [await queue.lease() for _ in range(3)] == [None] * 3
            else:
                with pytest.raises(QueueRefused, match="GMANIMATO_API_URL"):
                    await queue.lease()
    assert asked == ["GET", "OPTIONS", "GET", "GET"] * 2 + ["GET", "OPTIONS"] * 3


def test_a_wrong_address_of_a_real_server():
    """A folder too many: SvelteKit's hook sends strangers to its login."""
    with GmAnimatoServer() as app:

        async def main():
            async with GmAnimatoQueue(f"{app.url}/old", app.secret, worker_id="w", storage=Storage()) as queue:
                with pytest.raises(QueueRefused, match="login"):
                    await queue.lease()
                with pytest.raises(QueueRefused, match="login"):
                    await queue.check()

        anyio.run(main)


async def test_the_secret(app):
    """401 names the setting and ends the worker; it travels in its own header, and to this route only."""
    async with GmAnimatoQueue(
        "https://gmanimato.test/api/",
        "another-secret",
        worker_id="w",
        storage=Storage(),
        transport=httpx.MockTransport(app.answer),
    ) as queue:
        with pytest.raises(QueueAuthError, match="WORKER_TASK_SECRET") as caught:
            await queue.lease()
    assert "another-secret" not in str(caught.value)
    app.secret = None
    transport = httpx.MockTransport(app.answer)
    async with GmAnimatoQueue(
        "https://gmanimato.test", "s", worker_id="w", storage=Storage(), transport=transport
    ) as queue:
        with pytest.raises(QueueAuthError, match="in the application"):
            await queue.lease()


async def test_the_secret_goes_nowhere_else(photo_bytes):
    """A callback_url is whatever a job says."""
    seen: list[httpx.Request] = []
    app = Application(callbacks="given", callback_url="https://elsewhere.test/hook", origin="https://gmanimato.test")

    async def watch(request):
        seen.append(request)
        return await app.answer(request)

    app.add(photo_bytes)
    async with queue_on(app, transport=httpx.MockTransport(watch)) as queue:
        await queue.heartbeat(await queue.lease())
    assert [request.url.host for request in seen] == ["gmanimato.test", "elsewhere.test", "gmanimato.test"]
    assert ["x-worker-secret" in request.headers for request in seen] == [True, False, False]


async def test_a_500_has_lost_a_job(app, photo_bytes):
    """It was claimed before the photo could not be fetched: said loudly, with the reason; no outage."""
    video_id = app.add(photo_bytes, error="Error: Failed to fetch image: 403 Forbidden")
    async with queue_on(app) as queue:
        with structlog.testing.capture_logs() as logs, pytest.raises(QueueFailed, match="403 Forbidden"):
            await queue.lease()
        assert await queue.lease() is None
    assert app.jobs[video_id].status == "processing"
    assert [(line["log_level"], line["answer"]) for line in logs] == [
        ("error", "Error: Failed to fetch image: 403 Forbidden")
    ]


@pytest.mark.parametrize(
    "status,content,expected",
    [
        (200, {"text": "<h1>Sign in</h1>"}, QueueRefused),
        (200, {"json": []}, InvalidTask),
        (302, {"headers": {"Location": "https://login.test/?next=x"}}, QueueRefused),
        (400, {"json": {"error": "no"}}, QueueRefused),
        (403, {"text": "blocked"}, QueueAuthError),
        (429, {"text": "slow down"}, QueueUnavailable),
        (500, {"text": "<h1>500</h1>"}, QueueFailed),
        (502, {"text": "Bad Gateway"}, QueueUnavailable),
        (504, {"text": "Gateway Timeout"}, QueueUnavailable),
    ],
)
async def test_other_answers(status, content, expected):
    """Each is the error that says who is at fault; no query of a redirect is shown."""
    async with answering(status, **content) as queue:
        with pytest.raises(I2VError) as caught:
            await queue.lease()
    assert type(caught.value) is expected
    assert "next=" not in str(caught.value)


@virtual_time
async def test_silence_is_an_outage():
    """Within the time that a worker waits for a lease, and with what it may have cost."""
    app = Application()
    app.faults["task"].append(HANGS)
    async with queue_on(app) as queue:
        began_at = anyio.current_time()
        with pytest.raises(QueueUnavailable, match="is lost"):
            await queue.lease()
        assert anyio.current_time() - began_at < CLAIM_LIMIT_S


def test_a_job_that_is_too_long(monkeypatch, photo_bytes):
    """Cut off, it is no JSON any more; its id is at the front, so it is reported all the same."""
    monkeypatch.setattr(gmanimato, "MAX_TASK_BYTES", 300)
    with GmAnimatoServer() as app:
        video_id = app.add(photo_bytes, inline=True)

        async def main():
            async with served(app) as queue:
                with pytest.raises(InvalidTask, match="longer than 300"):
                    await queue.lease()

        anyio.run(main)
        assert app.jobs[video_id].status == "failed"


async def test_a_long_job(monkeypatch, app, photo_bytes):
    """Is parsed beside the event loop."""
    monkeypatch.setattr(gmanimato, "THREAD_BYTES", 300)
    video_id = app.add(photo_bytes, inline=True)
    async with queue_on(app) as queue:
        assert (await queue.lease()).task.extras["video_id"] == video_id


@pytest.mark.parametrize(
    "url,options,named",
    [
        ("gmanimato.test", {}, "GMANIMATO_API_URL"),
        ("http://gmanimato.test", {}, "GMANIMATO_API_URL"),
        ("http://8.8.8.8:3000", {}, "GMANIMATO_API_URL"),
        ("https://gmanimato.test?x=1", {}, "GMANIMATO_API_URL"),
        ("https://gmanimato.test", {"secret": ""}, "WORKER_TASK_SECRET"),
        ("https://gmanimato.test", {"secret": "geheim\u00fcber"}, "WORKER_TASK_SECRET"),
        ("https://gmanimato.test", {"worker_id": "a b"}, "WORKER_ID"),
        ("https://gmanimato.test", {"callback_base_url": "localhost:5173"}, "CALLBACK_BASE_URL"),
    ],
)
def test_settings_that_cannot_work(url, options, named):
    """Are told before anything is asked."""
    options = {"secret": "s", "worker_id": "w", "storage": Storage()} | options
    with pytest.raises(SettingsError, match=named):
        GmAnimatoQueue(url, options.pop("secret"), **options)


@pytest.mark.parametrize(
    "url", ["http://192.168.1.7:3000", "http://app:3000", "http://box.lan", "http://[fd00::7]:3000"]
)
def test_an_application_of_the_same_network(url):
    """Plain http will do there, as its own documents have it; that the secret can be read on the way is said."""
    with capture_logs() as logs:
        GmAnimatoQueue(url, "s", worker_id="w", storage=Storage())
    assert [line["event"] for line in logs] == ["the secret travels unencrypted"]


# Progress


async def test_progress_as_the_page_shows_it(app, photo_bytes):
    """Percent of the whole, and what the graph is at; nothing before there is any."""
    video_id = app.add(photo_bytes)
    detail = {"completed_nodes": 2, "total_nodes": 4, "current_node": "44", "current_node_progress": 50.0, "secret": 1}
    async with queue_on(app) as queue:
        lease = await queue.lease()
        await queue.heartbeat(lease)
        assert app.asked[-1].body == {"id": f"local-{video_id}", "status": "processing"}
        await queue.heartbeat(lease, HALF)
        assert (app.jobs[video_id].percentage, app.jobs[video_id].details["current_node"]) == (50, None)
        await queue.heartbeat(lease, HALF.model_copy(update={"fraction": 2.5, "detail": detail}))
    del detail["secret"]
    assert (app.jobs[video_id].percentage, app.jobs[video_id].details) == (100, detail)


@pytest.mark.parametrize("fault", [REQUEST_LOST, DATABASE_DOWN, GATEWAY_DOWN, Fault(page(401, "Sign in"))])
async def test_progress_that_is_not_heard_costs_nothing(app, photo_bytes, fault):
    """A line in the log when it begins, one when it is over, and no error."""
    app.add(photo_bytes)
    app.callbacks = "absent"
    async with queue_on(app) as queue:
        lease = await queue.lease()
        app.faults["webhook"].extend([fault] * 3)
        with structlog.testing.capture_logs() as logs:
            for _ in range(5):
                await queue.heartbeat(lease, HALF)
    assert [(line["event"], line["log_level"]) for line in logs] == [
        ("progress not accepted", "warning"),
        ("progress accepted again", "info"),
    ]


@virtual_time
async def test_a_webhook_that_hangs_does_not_hold_up_a_beat():
    """A keeper gives a heartbeat fifteen seconds."""
    app = Application(origin="https://gmanimato.test")
    app.add(b"photo")
    app.faults["webhook"].extend([HANGS] * 2)
    async with queue_on(app) as queue:
        lease = await queue.lease()
        with anyio.fail_after(14):
            await queue.heartbeat(lease, HALF)


@pytest.mark.parametrize("status", [403, 404])
async def test_a_job_that_is_gone(app, photo_bytes, status):
    """Deleted, or started anew under another id: the work stops, and nothing more is sent."""
    video_id = app.add(photo_bytes)
    async with queue_on(app) as queue:
        lease = await queue.lease()
        if status == 404:
            del app.jobs[video_id]
        else:
            app.jobs[video_id].id = "another"
        with pytest.raises(LeaseLost, match=str(status)):
            await queue.heartbeat(lease, HALF)
        count = len(app.asked)
        await queue.fail(lease, "no")
        await queue.heartbeat(lease, HALF)
    assert len(app.asked) == count


async def test_a_job_that_is_gone_when_it_ends(app, photo_bytes):
    """Nobody is told, and nobody is there to be."""
    video_id = app.add(photo_bytes)
    async with queue_on(app) as queue:
        lease = await queue.lease()
        del app.jobs[video_id]
        with pytest.raises(LeaseLost):
            await queue.fail(lease, "no")


# Where the webhook is


@pytest.mark.parametrize("callbacks", ["absent", "https"])
def test_a_callback_url_that_is_missing_or_https_for_an_http_server(callbacks, photo_bytes):
    """The application's own worker renders and never reports; this one finds the route by itself, once."""
    with GmAnimatoServer(callbacks=callbacks) as app:
        video_id = app.add(photo_bytes)

        async def main():
            async with served(app) as queue:
                lease = await queue.lease()
                with structlog.testing.capture_logs() as logs:
                    await queue.heartbeat(lease, HALF)
                    await queue.heartbeat(lease, HALF)
                    await queue.fail(lease, "no")
                assert len(logs) == (callbacks == "https")

        anyio.run(main)
        assert app.jobs[video_id].status == "failed"
        assert [each.status for each in app.webhooks(video_id)] == [201, 201, 201]


@pytest.mark.parametrize(
    "answer",
    [
        httpx.ConnectError("refused"),
        httpx.RemoteProtocolError("no HTTP"),
        httpx.Response(404, text="<h1>Not Found</h1>"),
        httpx.Response(404, json={"error": "not found"}),
        httpx.Response(403, json={"error": "job id mismatch"}),
        httpx.Response(200, text="<h1>Sign in</h1>"),
        httpx.Response(200, json={"ok": True}),
        httpx.Response(302, headers={"Location": "/login"}),
        httpx.Response(502, text="Bad Gateway"),
    ],
    ids=repr,
)
async def test_a_callback_url_that_leads_elsewhere(photo_bytes, answer):
    """Whatever answers there is not the application: its own route is asked, remembered, and believed."""
    app = Application(callbacks="given", callback_url="https://elsewhere.test/hook", origin="https://gmanimato.test")
    video_id, elsewhere = app.add(photo_bytes), []

    async def network(request):
        if request.url.host != "elsewhere.test":
            return await app.answer(request)
        elsewhere.append(request)
        if isinstance(answer, Exception):
            raise answer
        return answer

    async with queue_on(app, transport=httpx.MockTransport(network)) as queue:
        queue.SETTLE_S = 0
        lease = await queue.lease()
        for _ in range(2):
            await queue.heartbeat(lease, HALF)
        await queue.fail(lease, "no")
    assert len(elsewhere) == 1
    assert app.jobs[video_id].status == "failed"


async def test_a_verdict_of_the_webhook_counts_wherever_it_is(photo_bytes):
    """The same application under its public name: its 400 is final, and not asked for again."""
    app = Application(callbacks="given", origin="https://gmanimato.test")
    video_id = app.add(photo_bytes)
    app.callback_url = f"https://public.test/api/i2v-webhook/{video_id}"
    hosts = []

    async def network(request):
        hosts.append(request.url.host)
        return await app.answer(request)

    async with queue_on(app, transport=httpx.MockTransport(network)) as queue:
        lease = await queue.lease()
        await queue.heartbeat(lease, HALF)
        app.faults["webhook"].append(Fault(as_json(400, {"error": "Invalid status"})))
        with pytest.raises(QueueRefused, match="Invalid status"):
            await queue.fail(lease, "no")
        await queue.fail(lease, "no")
    assert hosts == ["gmanimato.test", *["public.test"] * 3]


async def test_an_operator_who_says_where_the_webhook_is(app, photo_bytes):
    """CALLBACK_BASE_URL counts more than what jobs say."""
    app.callbacks, hosts = "https", []
    app.add(photo_bytes)

    async def network(request):
        hosts.append(request.url.netloc.decode())
        return await app.answer(request)

    options = {"transport": httpx.MockTransport(network), "callback_base_url": "http://inside.test:5173/"}
    async with queue_on(app, **options) as queue:
        await queue.heartbeat(await queue.lease(), HALF)
    assert hosts == ["gmanimato.test", "inside.test:5173"]


@pytest.mark.parametrize(
    "answer", [httpx.ConnectError("refused"), httpx.Response(404, json={"error": "not found"})], ids=repr
)
async def test_an_operators_webhook_that_does_not_work(app, photo_bytes, answer):
    """A tunnel that is down, or another deployment: the application that handed out the job is told all the same."""
    video_id = app.add(photo_bytes)

    async def network(request):
        if request.url.host == "tunnel.test":
            if isinstance(answer, Exception):
                raise answer
            return answer
        return await app.answer(request)

    options = {"transport": httpx.MockTransport(network), "callback_base_url": "https://tunnel.test"}
    async with queue_on(app, **options) as queue:
        lease = await queue.lease()
        with structlog.testing.capture_logs() as logs:
            await queue.heartbeat(lease, HALF)
            await queue.fail(lease, "no")
    assert [line["event"] for line in logs] == ["CALLBACK_BASE_URL does not work"]
    assert app.jobs[video_id].status == "failed"


async def test_nobody_answers_anywhere(photo_bytes):
    """Both reasons are told, and the own route is not taken for found."""
    app = Application(callbacks="given", callback_url="https://elsewhere.test/hook?key=1")
    app.add(photo_bytes)

    async def network(request):
        if request.method == "POST":
            raise httpx.ConnectError(f"no route to {request.url.host}")
        return await app.answer(request)

    async with queue_on(app, transport=httpx.MockTransport(network)) as queue:
        lease = await queue.lease()
        with pytest.raises(QueueUnavailable, match=r"elsewhere\.test.*gmanimato\.test") as caught:
            await queue.fail(lease, "no")
    assert "key=1" not in str(caught.value)


# The end of a job


async def complete(queue: GmAnimatoQueue, lease: Lease, video: Video) -> None:
    await queue.complete(lease, await queue.deliver(lease, video), video)


async def test_one_end_and_nothing_after_it(app, photo_bytes, make_video):
    """Late beats, a failure, a release: the first accepted end is the last call."""
    video_id = app.add(photo_bytes)
    async with queue_on(app) as queue:
        lease = await queue.lease()
        await queue.heartbeat(lease, HALF)
        await complete(queue, lease, make_video())
        count = len(app.asked)
        await queue.heartbeat(lease, HALF)
        await complete(queue, lease, make_video())
        await queue.fail(lease, "no")
        await queue.release(lease)
    assert len(app.asked) == count
    assert (app.jobs[video_id].status, len(app.finals(video_id)), app.after_the_end(video_id)) == ("completed", 1, [])


@virtual_time
async def test_the_end_waits_for_progress_on_its_way():
    """The webhook keeps no order: what arrives last is what the job is."""
    app = Application(origin="https://gmanimato.test")
    video_id, order = app.add(b"photo"), []

    async def network(request):
        if request.method == "POST" and json.loads(request.content)["status"] == "processing":
            await anyio.sleep(2)
        response = await app.answer(request)
        order.append((anyio.current_time(), request.method))
        return response

    async with queue_on(app, transport=httpx.MockTransport(network)) as queue:
        lease = await queue.lease()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(queue.heartbeat, lease, HALF)
            await anyio.sleep(1)
            tasks.start_soon(queue.fail, lease, "no")
            await anyio.sleep(0.1)
            tasks.start_soon(queue.heartbeat, lease, HALF)  # comes after the end was begun, and is dropped
    assert [each.body["status"] for each in app.webhooks(video_id)] == ["processing", "failed"]


@virtual_time
async def test_a_cancelled_beat_is_still_waited_for():
    """The engine is done and the keeper stops its beats: one that is out is answered first."""
    app = Application(origin="https://gmanimato.test")
    video_id = app.add(b"photo")

    async def network(request):
        if request.method == "POST":
            await anyio.sleep(1)
        return await app.answer(request)

    async with queue_on(app, transport=httpx.MockTransport(network)) as queue:
        lease = await queue.lease()
        with anyio.move_on_after(0.5):
            await queue.heartbeat(lease, HALF)
        assert anyio.current_time() == pytest.approx(1)
        await queue.fail(lease, "no")
        assert anyio.current_time() == pytest.approx(2)
    assert app.after_the_end(video_id) == []


@pytest.mark.parametrize("fault", [REQUEST_LOST, HANGS, GATEWAY_DOWN])
def test_the_end_lets_lost_progress_settle(fault):
    """The server may still be at a call whose answer never came; one that never left needs no time."""

    @virtual_time
    async def story():
        app = Application(origin="https://gmanimato.test", callbacks="absent")
        app.add(b"photo")
        app.faults["webhook"].append(fault)
        async with queue_on(app) as queue:
            lease = await queue.lease()
            await queue.heartbeat(lease, HALF)
            given_up_at = anyio.current_time()
            await queue.fail(lease, "no")
            assert anyio.current_time() == pytest.approx(given_up_at + queue.SETTLE_S)

    story()


@virtual_time
async def test_progress_that_never_left_needs_no_time():
    """Nobody listened."""
    app = Application(origin="https://gmanimato.test", callbacks="absent")
    app.add(b"photo")
    refuse = True

    async def network(request):
        if request.method == "POST" and refuse:
            raise httpx.ConnectError("refused")
        return await app.answer(request)

    async with queue_on(app, transport=httpx.MockTransport(network)) as queue:
        lease = await queue.lease()
        await queue.heartbeat(lease, HALF)
        refuse = False
        await queue.fail(lease, "no")
        assert anyio.current_time() == 0


@pytest.mark.parametrize("fault", [REPLY_LOST, HANGS_AFTER, REQUEST_LOST])
def test_an_end_whose_answer_was_lost_is_repeated_as_it_was(fault, make_video):
    """Whatever comes after it repeats it: a video that the application may have is not replaced by a failure."""

    @virtual_time
    async def story():
        app = Application(origin="https://gmanimato.test")
        video_id = app.add(b"photo")
        async with SimpleQueue(app) as queue:
            lease = await queue.lease()
            app.faults["webhook"].append(fault)
            with pytest.raises(QueueUnavailable):
                await complete(queue, lease, make_video())
            await queue.release(lease, "the worker was stopped")
            await queue.fail(lease, "no")
        ends = [each.body for each in app.webhooks(video_id)]
        assert len(ends) == 2
        assert ends[0] == ends[1]
        assert app.jobs[video_id].status == "completed"

    story()


class SimpleQueue(GmAnimatoQueue):
    """Without threads, for which a virtual clock does not wait."""

    def __init__(self, app: Application, **options: Any) -> None:
        transport = httpx.MockTransport(app.answer)
        options = {"worker_id": "w", "storage": Storage(transport=transport), "transport": transport} | options
        super().__init__("https://gmanimato.test", app.secret, **options)

    async def _content_of(self, path: Path) -> bytes:
        return path.read_bytes()  # noqa: ASYNC240 - on purpose


@virtual_time
async def test_a_worker_that_is_stopped_while_it_tells_of_a_video():
    """The call waits for lost progress to settle, and was not sent yet: the release tells of the video."""
    app = Application(origin="https://gmanimato.test", callbacks="absent")
    video_id = app.add(b"photo")
    app.faults["webhook"].append(GATEWAY_DOWN)
    async with SimpleQueue(app) as queue:
        lease = await queue.lease()
        await queue.heartbeat(lease, HALF)
        with anyio.move_on_after(queue.SETTLE_S / 2):
            await queue.complete(lease, "https://s3.test/b/v.mp4", video_named("v.mp4"))
        await queue.release(lease, "the worker was stopped")
    assert (app.jobs[video_id].status, len(app.finals(video_id))) == ("completed", 1)


async def test_a_video_that_the_application_took_and_could_not_keep(app, photo_bytes, make_video):
    """It answers 201 and says failed: nothing may be sent any more, so the log has to tell it."""
    app.stores_videos = False
    video_id = app.add(photo_bytes)
    async with queue_on(app) as queue:
        lease = await queue.lease()
        with structlog.testing.capture_logs() as logs:
            await complete(queue, lease, make_video())
    assert app.jobs[video_id].status == "failed"
    assert [(line["log_level"], line["item_id"]) for line in logs] == [("error", f"local-{video_id}")]


@virtual_time
async def test_an_end_that_was_refused_may_be_followed_by_another():
    """The application took nothing, so the failure is the job's first end."""
    app = Application(origin="https://gmanimato.test")
    video_id = app.add(b"photo")
    async with SimpleQueue(app) as queue:
        lease = await queue.lease()
        for fault, expected in ((DATABASE_DOWN, QueueFailed), (Fault(as_json(400, {"error": "no"})), QueueRefused)):
            app.faults["webhook"].append(fault)
            with pytest.raises(expected):
                await queue.complete(lease, "https://s3.test/b/v.mp4", video_named("v.mp4"))
        await queue.fail(lease, "no")
    assert app.jobs[video_id].status == "failed"


def video_named(name: str) -> Video:
    return Video(path=Path(name), width=64, height=48, fps=24, frames=25, size_bytes=6)


@pytest.mark.parametrize(
    "fault,expected,said",
    [
        (Fault(as_json(400, {"error": "missing id or status"})), QueueRefused, "missing id"),
        (Fault(as_json(500, {"error": "SvelteKitError: … exceeds limit of 524288 bytes."})), QueueRefused, "BUCKET_"),
        (Fault(page(413, "Request Entity Too Large")), QueueRefused, "I2V_WEBHOOK_BYTES"),
        (Fault(page(401, "Sign in")), QueueAuthError, "in front"),
        (DATABASE_DOWN, QueueFailed, "Prisma"),
        (GATEWAY_DOWN, QueueUnavailable, "502"),
        (Fault(page(404, "Not Found")), QueueUnavailable, "404"),
        (Fault(page(429, "Slow down")), QueueUnavailable, "429"),
        (Fault(page(200, "Sign in")), QueueRefused, "200"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
async def test_ends_that_are_not_accepted(app, photo_bytes, fault, expected, said):
    """What another try may cure, and what not."""
    app.add(photo_bytes)
    app.callbacks = "absent"
    async with queue_on(app) as queue:
        lease = await queue.lease()
        app.faults["webhook"].append(fault)
        with pytest.raises(I2VError, match=said) as caught:
            await queue.fail(lease, "no")
    assert type(caught.value) is expected


async def test_a_release_is_an_end_in_words(app, photo_bytes):
    """The queue takes nothing back, so the job fails, and its owner reads what to do."""
    ids = [app.add(photo_bytes) for _ in range(2)]
    async with queue_on(app) as queue:
        assert queue.hands_back is False
        await queue.release(await queue.lease())
        await queue.release(await queue.lease(), "the worker\nwas stopped")
    said = [app.finals(video_id)[0].body["error"] for video_id in ids]
    assert said == [
        "the worker stopped before the video was finished; please start it again",
        "the worker was stopped; please start it again",
    ]


async def test_what_is_remembered_of_a_lease_is_forgotten(app, photo_bytes):
    """After an hour, when the next job is asked for; not while a job is being made."""
    for _ in range(2):
        app.add(photo_bytes)
    async with queue_on(app) as queue:
        ended, going_on = await queue.lease(), await queue.lease()
        await queue.fail(ended, "no")
        await queue.heartbeat(going_on)
        queue._calls[ended.worker_id].over_at -= 4000
        await queue.lease()
        assert list(queue._calls) == [going_on.worker_id]


# Videos


def test_base64_up_to_what_the_application_takes(photo_bytes, make_video):
    """To the byte: what is let through is accepted by the server, and one byte more is refused before any upload."""
    with GmAnimatoServer(body_limit_bytes=20_000) as app:
        video_id = app.add(photo_bytes)

        async def main():
            async with served(app, max_body_bytes=20_000) as queue:
                lease = await queue.lease()
                bare = len(json.dumps({"id": lease.task.item_id, "status": "completed"}, separators=(",", ":")))
                files = len(',"files":[{"filename":"clip.mp4","type":"base64","data":""}]')
                largest = (20_000 - bare - files) // 4 * 3
                with pytest.raises(ObjectTooLarge, match=r"20000.*BUCKET_ENDPOINT_URL.*BODY_SIZE_LIMIT"):
                    await queue.deliver(lease, make_video(b"x" * (largest + 1)))
                await complete(queue, lease, make_video(b"x" * largest))
                return largest

        largest = anyio.run(main)
        job = app.jobs[video_id]
        assert job.status == "completed"
        assert app.objects[job.final_url.removeprefix(f"{app.url}/media/")] == b"x" * largest
        assert 20_000 - 4 < app.finals(video_id)[0].size_bytes <= 20_000


async def test_what_else_was_made_goes_with_the_video_where_there_is_room(app, photo_bytes, make_video):
    """The video first, so that it is the one that the application shows; without the others before not at all."""
    ids = [app.add(photo_bytes) for _ in range(2)]
    async with queue_on(app, max_body_bytes=3000) as queue:
        await complete(queue, await queue.lease(), make_video(others={"last frame.png": b"png", "b.mp4": b"b"}))
        await complete(queue, await queue.lease(), make_video(b"x" * 1500, others={"big.png": b"y" * 1500}))
    first, second = (app.finals(video_id)[0].body["files"] for video_id in ids)
    assert [file["filename"] for file in first] == ["clip.mp4", "last_frame.png", "b.mp4"]
    assert [file["filename"] for file in second] == ["clip.mp4"]
    assert base64.b64decode(second[0]["data"]) == b"x" * 1500


@pytest.mark.parametrize("name", ["clip.gif", "clip", "clip.MP4"])
async def test_only_mp4_and_webm_are_videos(app, photo_bytes, make_video, name):
    """With anything else the application would call a completed job failed."""
    app.add(photo_bytes)
    async with queue_on(app) as queue:
        with pytest.raises(StorageRefused, match="webm"):
            await queue.deliver(await queue.lease(), make_video(name=name))


def test_videos_in_a_bucket(photo_bytes, make_video, tmp_path):
    """Stored under the job and the lease, never over one another; the plain URL is what the application gets."""
    with S3Server() as s3, GmAnimatoServer() as app:
        video_id = app.add(photo_bytes)
        bucket = Bucket(s3.url, s3.bucket, s3.key_id, s3.secret)

        async def main():
            async with (
                Storage(trusted_origins=[app.url, s3.url]) as storage,
                GmAnimatoQueue(
                    app.url, app.secret, worker_id="w", storage=storage, bucket=bucket, prefix="/clips/"
                ) as queue,
            ):
                assert await queue.check_storage() == "127.0.0.1"
                lease = await queue.lease()
                inputs = await queue.fetch_inputs(lease, tmp_path)
                assert [path.read_bytes() for path in inputs.values()] == [photo_bytes]
                await queue.deliver(lease, make_video(b"lost"))
                await complete(queue, lease, make_video(b"kept", "my clip.webm", others={"sheet.png": b"png"}))
                return lease.token

        token = anyio.run(main)
        folder = f"clips/{video_id}/{token}"
        stored = s3.keys()
        assert {key: s3.object_bytes(key) for key in stored} == {
            f"{folder}/clip.mp4": b"lost",
            f"{folder}-2/my_clip.webm": b"kept",
            f"{folder}-2/sheet.png": b"png",
        }
        url = f"{s3.url}/{s3.bucket}/{folder}-2"
        assert app.jobs[video_id].final_url == f"{url}/my_clip.webm"
        assert app.finals(video_id)[0].body["files"] == [
            {"filename": "my_clip.webm", "type": "s3_url", "data": f"{url}/my_clip.webm"},
            {"filename": "sheet.png", "type": "s3_url", "data": f"{url}/sheet.png"},
        ]


@pytest.mark.parametrize("wrong", ["secret", "key", "name"])
def test_a_bucket_that_refuses(photo_bytes, make_video, wrong):
    """Found without a job; and by a job, which then is the last: every other would be rendered and lost, too."""
    with S3Server() as s3, GmAnimatoServer() as app:
        app.add(photo_bytes)
        said = {"name": s3.bucket, "key": s3.key_id, "secret": s3.secret} | {wrong: "wrong-one"}
        bucket = Bucket(s3.url, said["name"], said["key"], said["secret"])

        async def main():
            async with (
                Storage(trusted_origins=[app.url, s3.url]) as storage,
                GmAnimatoQueue(app.url, app.secret, worker_id="w", storage=storage, bucket=bucket) as queue,
            ):
                with pytest.raises(SettingsError, match="BUCKET_NAME"):
                    await queue.check_storage()
                with pytest.raises(SettingsError, match="BUCKET_NAME"):
                    await queue.deliver(await queue.lease(), make_video())

        anyio.run(main)
        assert s3.keys() == []


async def test_a_url_that_is_too_long_is_not_uploaded(app, photo_bytes, make_video):
    """The application refuses more than 500 characters; a name of the engine's is cut."""
    app.add(photo_bytes)
    bucket = Bucket("https://s3.test", "b", "key", "secret")
    async with queue_on(app, bucket=bucket, prefix="p" * 400) as queue:
        with pytest.raises(StorageRefused, match="500 characters"):
            await queue.deliver(await queue.lease(), make_video(name=f"{'v' * 200}.mp4"))
    assert all(each.call == "task" for each in app.asked)


async def test_inputs(app, photo_bytes, tmp_path):
    """By URL and by data URI; what does not decode is refused."""
    good, _ = app.add(photo_bytes, photo_bytes, inline=True), app.add(b"<html>gone</html>", inline=True)
    async with queue_on(app) as queue:
        paths = await queue.fetch_inputs(await queue.lease(), tmp_path)
        assert {name: path.read_bytes() for name, path in paths.items()} == {
            f"{good}_first.png": photo_bytes,
            f"{good}_last.png": photo_bytes,
        }
        with pytest.raises(InvalidPhoto):
            await queue.fetch_inputs(await queue.lease(), tmp_path)


# Checks


async def test_a_look_claims_nothing(app, photo_bytes):
    """Whether the secret is right stays open, and that is said; where videos go is known without a job."""
    video_id = app.add(photo_bytes)
    async with queue_on(app) as queue:
        assert "WORKER_TASK_SECRET" in await queue.check()
        assert await queue.check_storage() is None
    assert app.jobs[video_id].status == "in_queue"


@pytest.mark.parametrize(
    "status,expected", [(403, QueueAuthError), (404, QueueRefused), (500, QueueFailed), (503, QueueUnavailable)]
)
async def test_a_look_at_what_is_no_queue(status, expected):
    """The error says who is at fault."""
    async with answering(status, text="<h1>no</h1>") as queue:
        with pytest.raises(I2VError) as caught:
            await queue.check()
    assert type(caught.value) is expected


# The whole way


@pytest.mark.parametrize("trouble", ["none", "engine", "cancelled"])
def test_a_job_from_claim_to_end(photo_bytes, tmp_path, trouble):
    """The real runner on a real server: exactly one end, and nothing after it, however it comes about."""
    with GmAnimatoServer() as app:
        video_id = app.add(photo_bytes)
        app.jobs[video_id].answer["input"]["images"] = []

        async def main():
            async with served(app) as queue:
                lease = await queue.lease()
                errors = [EngineTrouble] if trouble == "engine" else []
                engine = SleepyEngine(seconds=30 if trouble == "cancelled" else 0.05, errors=errors)
                runner = Runner(queue, engine, policy=Policy(second_beat_s=0.01), temp_dir=tmp_path)
                with anyio.move_on_after(0.2 if trouble == "cancelled" else 30):
                    return (await runner.run(lease)).status

        status = anyio.run(main)
        expected = {"none": "completed", "engine": "failed", "cancelled": None}[trouble]
        assert status == expected
        assert app.jobs[video_id].status == (expected or "failed")
        assert len(app.finals(video_id)) == 1
        assert app.after_the_end(video_id) == []


EngineTrouble = SettingsError("I2V_ENGINE: the machine is set up wrongly")  # handed back, where a queue takes it
