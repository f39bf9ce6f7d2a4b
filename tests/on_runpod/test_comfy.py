"""Jobs with a ComfyUI workflow at an endpoint: read and answered as worker-comfyui does it, and with video.

What worker-comfyui takes and answers was seen in its handler.py, tests/test_handler.py and docs/configuration.md; what
GmAnimato sends and reads, in its src/lib/runpod.ts and its workflow builders.
"""

import base64
import io
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import anyio
import anyio.lowlevel
import httpx
import imageio_ffmpeg
import numpy as np
import pytest
import structlog
from PIL import Image

from inference.errors import EngineError, InvalidRequest
from inference.media.video import VideoWriter, probe
from inference.on_runpod import callback as callback_module
from inference.on_runpod import comfy
from inference.on_runpod.answer import completed
from inference.on_runpod.api import RunPodJob
from inference.on_runpod.callback import Callback
from inference.on_runpod.comfy import as_worker_comfyui, workflow_in
from inference.on_runpod.worker import RunPodWorker
from inference.progress.stages import Progress
from inference.settings import Settings
from inference.task import Input
from tests.support.s3_server import S3Server

pytestmark = pytest.mark.anyio

GRAPH = {
    "14": {"inputs": {"image": "x.png"}, "class_type": "LoadImage", "_meta": {"title": "Load Image"}},
    "16": {"inputs": {"images": ["14", 0], "filename_prefix": "Wan22"}, "class_type": "SaveVideo"},
}


def png():
    """A small picture."""
    file = io.BytesIO()
    Image.linear_gradient("L").resize((96, 64)).convert("RGB").save(file, "PNG")
    return file.getvalue()


PNG = png()
PLAIN = base64.b64encode(PNG).decode()
INPUT = {"workflow": GRAPH, "images": [{"name": "x.png", "image": PLAIN}]}


class FakeComfy:
    """Makes a small video and what else it is told to, and remembers what it was asked."""

    name = "comfyui"

    def __init__(self):
        self.stages = {"workflow": 1.0}
        self.asked = []
        self.others = {"ComfyUI_00001_.png": PNG}
        self.noise_frames = 0
        self.video_name = "Wan22_00001_.mp4"
        self.webm_name = None
        self.fails_with = None
        self.before = anyio.lowlevel.checkpoint

    async def check(self):
        """See Engine."""

    async def generate(self, request, inputs, folder, job):
        """A video of three black frames, or of noise, which does not compress."""
        self.asked.append((request, {name: path.read_bytes() for name, path in inputs.items()}))
        job.report("workflow", 1, 4, {"completed_nodes": 1, "total_nodes": 4, "current_node": "44"})
        await self.before()
        if self.fails_with:
            raise self.fails_with
        noise = np.random.default_rng(1)
        made = folder / "made"
        made.mkdir()
        with VideoWriter(made / self.video_name, width=96, height=64, fps=16) as writer:
            for _ in range(self.noise_frames or 3):
                picture = np.zeros((64, 96, 3), np.uint8)
                writer.write(noise.integers(0, 256, picture.shape, np.uint8) if self.noise_frames else picture)
        video = writer.video(seed=7)
        if self.webm_name:
            webm = made / self.webm_name
            command = [imageio_ffmpeg.get_ffmpeg_exe(), "-loglevel", "error", "-i", video.path, "-c:v", "libvpx"]
            await anyio.run_process([*command, "-b:v", "4M", "-deadline", "realtime", webm])
            video = video.model_copy(update={"path": webm, "size_bytes": webm.stat().st_size})
        others = {}
        for name, content in self.others.items():
            others[name] = made / name
            others[name].write_bytes(content)
        return video.model_copy(update={"others": others})


class Box:
    """An endpoint around a fake ComfyUI engine, and what its jobs said meanwhile."""

    def __init__(self, folder, engine="comfyui", **settings):
        self.engine = FakeComfy()
        self.settings = Settings.isolated(temp_dir=folder, engine=engine, **settings)
        self.endpoint = RunPodWorker(self.settings)
        self.endpoint._engine = self.engine
        self.posted = []

    async def post(self, snapshot):
        """As RunPod takes it."""
        self.posted.append(json.loads(json.dumps(snapshot)))

    async def run(self, payload=INPUT, **top):
        """One job's answer, as it travels."""
        return json.loads(json.dumps(await self.endpoint.run({"id": "j1", "input": payload, **top}, self.post)))


@pytest.fixture
def box(tmp_path):
    """An endpoint without a bucket."""
    return Box(tmp_path / "temp")


# What comes


@pytest.mark.parametrize(
    "payload",
    [
        {"workflow": {"key": "value"}},
        {"workflow": {"key": "value"}, "images": [{"name": "image1.png", "image": "base64string"}]},
        '{"workflow": {"key": "value"}}',
        {"workflow": {"key": "value"}, "images": None, "comfy_org_api_key": None},
        {"workflow": GRAPH, "images": [], "videos": [], "node_weights": {"44": 60.0, "4": 15}},
    ],
)
def test_what_worker_comfyui_and_gmanimato_send_is_taken(payload):
    """The inputs of the one's own tests, and of the other's builders."""
    read = workflow_in(payload, "j1")
    given = json.loads(payload) if isinstance(payload, str) else payload
    assert read.request.workflow == given["workflow"]
    assert [*read.inputs] == [image["name"] for image in given.get("images") or []]


@pytest.mark.parametrize(
    "payload",
    [None, 5, "no JSON", '"text"', pytest.param("[" * 100_000, id="deep"), {}, [], {"workflow": None, "drain": 1}],
)
def test_other_inputs_are_left_to_others(payload):
    """They say what is wrong there."""
    assert workflow_in(payload, "j1") is None


@pytest.mark.parametrize(
    "payload, told",
    [
        ({"workflow": "{}"}, "workflow: input should be a valid dictionary"),
        ({"workflow": {}}, "workflow: dictionary should have at least 1 item"),
        ({"workflow": GRAPH, "drain": 2, "photo_url": "https://a.b/c"}, "workflow and drain and photo_url exclude"),
        ({"workflow": GRAPH, "upload_url": "https://a.b/c"}, "workflow and upload_url exclude each other"),
        ({"workflow": GRAPH, "images": {"x.png": PLAIN}}, "images: input should be a valid list"),
        ({"workflow": GRAPH, "images": [{"name": "x.png"}]}, "images.0.image: field required"),
        ({"workflow": GRAPH, "images": [{"image": PLAIN}]}, "images.0.name: field required"),
        ({"workflow": GRAPH, "images": [{"name": "x", "image": ""}]}, "images.0.image: string should have at least 1"),
        ({"workflow": GRAPH, "images": [{"name": "a\nb", "image": "A"}]}, "images.0.name: must be printable"),
        ({"workflow": GRAPH, "images": [{"name": "x", "image": "https://"}]}, "images.0: has to be a URL"),
        ({"workflow": GRAPH, "videos": [{"name": "x"}]}, "videos.0.video: field required"),
        ({"workflow": GRAPH, "videos": [{"name": "x", "video": 5}]}, "videos.0.video: input should be a valid string"),
        ({"workflow": GRAPH, "callback_url": "app/hook"}, "callback_url: has to be a URL"),
        ({"workflow": GRAPH, "node_weights": {"4": "15"}}, "node_weights.4: input should be a valid number"),
        ({"workflow": GRAPH, "node_weights": {"4": -1}}, "node_weights.4: input should be greater than or equal to 0"),
        (
            {"workflow": GRAPH, "images": [{"name": "x", "image": "AAAA"}, {"name": "x", "image": "BBBB"}]},
            "images.1.name: x is another file already",
        ),
        (
            {"workflow": GRAPH, "images": [{"name": "x", "image": "AAAA"}], "videos": [{"name": "x", "video": "AAAA"}]},
            "videos.0.name: x is another file already",
        ),
    ],
)
def test_a_mistake_names_the_field(payload, told):
    """In one line, and never what was sent."""
    with pytest.raises(InvalidRequest) as raised:
        _ = workflow_in(payload, "j1").inputs
    assert told in str(raised.value)
    assert PLAIN not in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("called", ["video", "image"])
def test_videos_come_beside_images(called):
    """GmAnimato's template for reference videos (`data/minimax_ref2v_template.json.tmpl`) calls theirs `image`."""
    asked = {"workflow": GRAPH, "videos": [{"name": "v.mp4", called: "https://a.b/v.mp4", "size": 1}]}
    assert workflow_in(asked, "j1").inputs == {"v.mp4": Input(kind="video", source="https://a.b/v.mp4")}


def test_the_same_file_twice_is_one():
    """A first and a last frame may be the same picture."""
    image = {"name": "x.png", "image": PLAIN}
    assert [*workflow_in({"workflow": GRAPH, "images": [image, image]}, "j1").inputs] == ["x.png"]


async def test_what_nothing_reads_is_ignored_and_said(box):
    """Names only: the key of comfy.org is a secret."""
    with structlog.testing.capture_logs() as logs:
        answer = await box.run({**INPUT, "callback_url": "", "comfy_org_api_key": "hush", "x": 1})
    assert "images" in answer
    [line] = [it for it in logs if it["event"] == "fields_ignored"]
    assert line["fields"] == ["comfy_org_api_key", "x"]
    assert "hush" not in str(logs)


@pytest.mark.parametrize(
    "given", [PLAIN, f"data:image/png;base64,{PLAIN}", f"image/png;base64,{PLAIN}", PLAIN[:40] + "\n" + PLAIN[40:]]
)
async def test_images_come_as_base64_in_any_dress(box, given):
    """And reach the engine under the names that the graph has for them."""
    weights = {"44": 60, "4": 15}
    answer = await box.run({"workflow": GRAPH, "images": [{"name": "x.png", "image": given}], "node_weights": weights})
    assert "error" not in answer
    [(request, inputs)] = box.engine.asked
    assert inputs == {"x.png": PNG}
    assert (request.workflow, request.node_weights, request.video_formats) == (GRAPH, weights, ("mp4", "webm"))


class Site:
    """A server on loopback that has one picture, takes what is PUT, but for pictures, and what is POSTed to it.

    `statuses` are its next answers to POST; None: it says nothing until the caller has gone.
    """

    def __init__(self):
        self.stored, self.content_types = {}, {}
        self.calls, self.statuses = [], []
        self.gone = threading.Event()
        site = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self.answer(200, PNG)

            def do_PUT(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                path = self.path.partition("?")[0]
                if path.endswith(".png"):
                    self.answer(403, b"<Error><Code>AccessDenied</Code></Error>")
                    return
                site.stored[path], site.content_types[path] = body, self.headers["Content-Type"]
                self.answer(200, b"")

            def do_POST(self):
                call = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                site.calls.append(call)
                status = site.statuses.pop(0) if site.statuses else 201
                if status is None:
                    site.gone.wait(5)
                else:
                    self.answer(status, b"{}")

            def answer(self, status, body):
                self.send_response(status)
                self.send_header("Content-Type", "image/png")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"


@pytest.fixture
def site():
    """See Site."""
    found = Site()
    with found.server as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield found
        found.gone.set()
        server.shutdown()


async def test_images_come_by_url_as_gmanimato_gives_them(tmp_path, site):
    """A private address only where the operator allows those."""
    asked = {"workflow": GRAPH, "images": [{"name": "v1.png", "image": f"{site.url}/v1.png?sig=hush"}]}
    box = Box(tmp_path / "a", allow_private_addresses=True)
    assert "images" in await box.run(asked)
    assert box.engine.asked[0][1] == {"v1.png": PNG}
    shut = Box(tmp_path / "b")
    answer = await shut.run(asked)
    assert "not a public address" in answer["error"]
    assert "hush" not in answer["error"]
    assert (answer["retryable"], shut.engine.asked) == (False, [])


async def test_what_is_no_base64_is_refused_before_the_engine(box):
    """By the image's name, and once: the same bytes will not get better."""
    answer = await box.run({"workflow": GRAPH, "images": [{"name": "x.png", "image": "***"}]})
    assert "x.png" in answer["error"]
    assert (answer["retryable"], box.engine.asked) == (False, [])


async def test_another_engine_says_what_runs_workflows(tmp_path):
    """The setting by name."""
    box = Box(tmp_path, engine="preview")
    answer = await box.run()
    assert answer == {
        "error": "workflow: this endpoint runs preview; a workflow needs one with I2V_ENGINE=comfyui",
        "retryable": False,
    }
    assert box.engine.asked == []


async def test_a_photo_goes_through_the_template_of_the_endpoint(box):
    """The other kinds of jobs are what they were."""
    answer = await box.run({"photo_base64": PLAIN, "prompt": "zoom in", "seconds": 1})
    assert len(base64.b64decode(answer["video"]["base64"])) == answer["video"]["size_bytes"]
    [(request, inputs)] = box.engine.asked
    assert (request.workflow, [*inputs], request.video_formats) == (None, ["photo"], ("mp4",))


# What goes


async def test_the_answer_is_worker_comfyuis_with_the_video_first(box):
    """In base64 without a bucket, and what we know of the video beside it."""
    answer = await box.run()
    assert answer.keys() == {"images", "video", "seed", "timings"}
    video, picture = answer["images"]
    assert (video["filename"], video["type"]) == ("Wan22_00001_.mp4", "base64")
    assert picture == {"filename": "ComfyUI_00001_.png", "type": "base64", "data": PLAIN}
    assert len(base64.b64decode(video["data"])) == answer["video"]["size_bytes"]
    facts = answer["video"]
    assert (facts["filename"], facts["width"], facts["height"], facts["frames"]) == ("Wan22_00001_.mp4", 96, 64, 3)
    assert "base64" not in facts  # it would not fit twice
    assert (answer["seed"], answer["timings"].keys()) == (7, {"download", "wait", "workflow", "upload"})
    assert list(box.settings.temp_dir.iterdir()) == []


async def test_our_own_client_reads_the_answer(box, tmp_path, site):
    """`i2v runpod fetch` saves the video of a workflow, wherever it went."""
    own = {"bucket_url": site.url, "bucket_name": "b", "bucket_key_id": "k", "bucket_secret": "s"}
    for endpoint, where in ((box, "base64"), (Box(tmp_path, **own), "url")):
        answer = await endpoint.run()
        made = completed(RunPodJob(id="j1", status="COMPLETED", output=answer)).made
        assert getattr(made, where) == answer["images"][0]["data"]


async def test_a_bucket_gets_everything(tmp_path):
    """Signed for worker-comfyui's callers, and plain for GmAnimato, which stores what it reads."""
    with S3Server() as s3:
        bucket = {"bucket_url": f"{s3.url}/{s3.bucket}", "bucket_key_id": s3.key_id, "bucket_secret": s3.secret}
        box = Box(tmp_path, **bucket)
        box.engine.others = {"a b.png": PNG, "a_b.png": b"one key with the first", "..映像.png": b"third"}
        answer = await box.run()
        assert sorted(s3.keys()) == ["j1/2-a_b.png", "j1/Wan22_00001_.mp4", "j1/__.png", "j1/a_b.png"]
        names = [entry["filename"] for entry in answer["images"]]
        assert names == [entry["filename"] for entry in answer["files"]] == ["Wan22_00001_.mp4", *box.engine.others]
        assert {entry["type"] for entry in answer["images"] + answer["files"]} == {"s3_url"}
        async with httpx.AsyncClient() as client:
            fetched = [(await client.get(entry["data"])).content for entry in answer["images"]]
        assert fetched[1:] == [*box.engine.others.values()]
        assert len(fetched[0]) == answer["video"]["size_bytes"]
    found = [file for file in answer["files"] if file["filename"].endswith((".mp4", ".webm"))]  # as runpod.ts does
    assert [file["data"] for file in found] == [f"{s3.url}/videos/j1/Wan22_00001_.mp4"]
    assert answer["video"]["url"] == answer["images"][0]["data"]
    assert "errors" not in answer


async def test_a_file_that_is_not_stored_is_said_and_the_video_counts(tmp_path, site):
    """Nobody makes the video again for the sake of a picture; without the video there is no answer."""
    own = {"bucket_url": site.url, "bucket_name": "b", "bucket_key_id": "k", "bucket_secret": "s"}
    box = Box(tmp_path, **own)
    answer = await box.run()
    assert [entry["filename"] for entry in answer["images"]] == ["Wan22_00001_.mp4"]
    [error] = answer["errors"]
    assert error.startswith("ComfyUI_00001_.png was not stored: ")
    assert "X-Amz" not in error
    assert site.content_types == {"/b/j1/Wan22_00001_.mp4": "video/mp4"}
    box.engine.video_name = "no.png"
    assert "AccessDenied" in (await box.run())["error"]


async def test_a_bucket_of_the_job_is_checked_before_the_engine(box):
    """Callers' URLs lead to public addresses only."""
    brought = {"accessId": "k", "accessSecret": "hush", "bucketName": "b", "endpointUrl": "http://127.0.0.1:9"}
    answer = await box.run(s3Config=brought)
    assert "not a public address" in answer["error"]
    assert "hush" not in answer["error"]
    assert box.engine.asked == []


async def test_an_answer_holds_what_fits(box, monkeypatch):
    """The video is made smaller, for it is paid for; others are named, and what would take them."""
    monkeypatch.setattr(comfy, "INLINE_BYTES", 60_000)
    box.engine.noise_frames = 16
    box.engine.others = {"large.png": bytes(70_000), "small.txt": b"prompt"}
    answer = await box.run()
    assert [entry["filename"] for entry in answer["images"]] == ["Wan22_00001_.mp4", "small.txt"]
    mp4 = base64.b64decode(answer["images"][0]["data"])
    assert len(mp4) == answer["video"]["size_bytes"] <= 60_000
    path = box.settings.temp_dir / "back.mp4"
    path.write_bytes(mp4)
    assert probe(path).frames == 16
    [error] = answer["errors"]
    assert error == (
        "large.png is 0.1 MB, more than is left in an answer: set BUCKET_ENDPOINT_URL, or give an s3Config"
    )


async def test_a_webm_stays_one_while_it_fits(box, monkeypatch):
    """What is too large becomes an mp4, and is called so."""
    box.engine.noise_frames, box.engine.others, box.engine.webm_name = 16, {}, "Wan22_00001_.webm"
    [webm] = (await box.run())["images"]
    assert webm["filename"] == "Wan22_00001_.webm"
    content = base64.b64decode(webm["data"])
    assert content.startswith(b"\x1a\x45\xdf\xa3")
    monkeypatch.setattr(comfy, "INLINE_BYTES", min(60_000, len(content) - 1))
    [mp4] = (await box.run())["images"]
    assert (mp4["filename"], base64.b64decode(mp4["data"])[4:8]) == ("Wan22_00001_.mp4", b"ftyp")


async def test_a_video_that_fits_in_no_size_says_what_would_take_it(box, monkeypatch):
    """There is no answer without it."""
    monkeypatch.setattr(comfy, "INLINE_BYTES", 1000)
    box.engine.noise_frames = 16
    answer = await box.run()
    assert answer["error"].endswith("do not fit into 1000 bytes: set BUCKET_ENDPOINT_URL, or give an s3Config")
    assert not answer["retryable"]


async def test_progress_has_both_words(box):
    """Those of worker-comfyui's callers, and ours, which our own client reads."""
    assert "images" in await box.run()
    assert box.posted[0].keys() >= {"type", "value", "max", "percent", "node", "stage", "fraction"}
    told = []

    async def post(snapshot):
        told.append(snapshot)

    detail = {"completed_nodes": 3, "current_node": "44"}
    ours = Progress(stage="workflow", done=12, total=25, fraction=0.4561, detail=detail)
    await as_worker_comfyui(post)(ours.model_dump(mode="json"))
    theirs = {"type": "progress", "value": 12, "max": 25, "percent": 45.6, "node": "44"}
    assert told == [ours.model_dump(mode="json") | theirs]
    assert RunPodJob(id="j1", status="IN_PROGRESS", output=told[0]).progress == ours


# The callback


@pytest.fixture
def told(tmp_path, site, monkeypatch):
    """An endpoint with a bucket, and what an application is told by it, without pauses."""
    monkeypatch.setattr(Callback, "PAUSE_S", 0.0)
    own = {"bucket_url": site.url, "bucket_name": "b", "bucket_key_id": "k", "bucket_secret": "s"}
    box = Box(tmp_path / "temp", allow_private_addresses=True, **own)
    box.engine.others = {}
    box.asked = INPUT | {"callback_url": f"{site.url}/api/i2v-webhook/v1"}
    return box


async def test_an_application_is_told_how_far_a_job_is_and_how_it_ended(told, site):
    """As the webhook of GmAnimato reads it: RunPod's id, progress, then the plain URL of the video, and no more."""

    async def until_told():
        while not site.calls:
            await anyio.sleep(0.01)

    told.engine.before = until_told
    answer = await told.run(told.asked)
    *progress, end = site.calls
    assert end == {"id": "j1", "status": "completed", "files": answer["files"]}
    assert end["files"][0]["data"] == f"{site.url}/b/j1/Wan22_00001_.mp4"
    assert progress
    assert {(call["id"], call["status"]) for call in progress} == {("j1", "processing")}
    assert all(0 <= call["progress"]["percentage"] <= 100 for call in progress)


async def test_progress_names_the_nodes(site):
    """As far as the engine does, and within bounds: the webhook takes any percentage."""
    detail = {"completed_nodes": 3, "total_nodes": 9, "current_node": "44", "current_node_progress": 50.0}
    snapshot = Progress(stage="workflow", done=1, total=2, fraction=2.5, detail=detail | {"other": 1})
    async with Callback(f"{site.url}/hook", "j1", allow_private=True) as callback:
        await callback.progress(snapshot.model_dump(mode="json"))
    [call] = site.calls
    assert call == {"id": "j1", "status": "processing", "progress": {"percentage": 100.0} | detail}


async def test_an_application_is_told_why_there_is_no_video(told, site):
    """In one line, once; RunPod is told the same."""
    told.engine.fails_with = EngineError("node 44 (Sampler): the\nsizes do not match")
    answer = await told.run(told.asked)
    [end] = [call for call in site.calls if call["status"] != "processing"]
    assert end == {"id": "j1", "status": "failed", "error": "node 44 (Sampler): the sizes do not match"}
    assert answer["error"] == end["error"]


async def test_a_bug_is_told_without_its_words(told, site):
    """They are for our log."""
    told.engine.fails_with = RuntimeError("hush")
    assert (await told.run(told.asked))["refresh_worker"]
    assert site.calls[-1] == {"id": "j1", "status": "failed", "error": "internal error of the worker"}


async def test_an_end_that_is_not_taken_is_told_again(site, monkeypatch):
    """Five times at most; what RunPod says is there all the same."""
    monkeypatch.setattr(Callback, "PAUSE_S", 0.0)
    site.statuses = [500, 502, 201]
    async with Callback(f"{site.url}/hook", "j1", allow_private=True) as callback:
        await callback.completed([])
        assert len(site.calls) == 3
        site.statuses = [500] * 9
        await callback.failed("why")
    assert len(site.calls) == 3 + 5


async def test_an_application_that_is_not_there_costs_no_video(told):
    """Nor one at an address where no stranger may send a worker; neither shows the query of its URL."""
    nobody = told.asked | {"callback_url": "http://127.0.0.1:1/hook?token=hush"}
    with structlog.testing.capture_logs() as logs:
        assert "images" in await told.run(nobody)
        async with Callback("http://127.0.0.1:1/hook?token=hush", "j1") as callback:
            await callback.completed([])
    problems = [it["problem"] for it in logs if it["event"] == "callback_not_taken"]
    assert len(problems) == 10
    assert "not a public address" in problems[-1]
    assert "hush" not in str(logs)


async def test_the_end_waits_after_progress_that_nobody_answered(site, monkeypatch):
    """The server may carry that out late, and the end would be undone."""
    monkeypatch.setattr(callback_module, "PROGRESS_LIMIT_S", 0.05)
    monkeypatch.setattr(Callback, "SETTLE_S", 0.1)
    site.statuses = [None]
    snapshot = Progress(stage="workflow", done=1, total=2, fraction=0.5).model_dump(mode="json")
    async with Callback(f"{site.url}/hook", "j1", allow_private=True) as callback:
        await callback.progress(snapshot)
        before = anyio.current_time()
        await callback.completed([])
        assert anyio.current_time() - before >= 0.1
        await callback.progress(snapshot)
        before = anyio.current_time()
        await callback.completed([])
        assert anyio.current_time() - before < 0.1
    assert [call["status"] for call in site.calls] == ["processing", "completed"] * 2
