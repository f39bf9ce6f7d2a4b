"""The doctor finds what is wrong, says what to do about it, and looks on."""

import http.server
import json
import os
import sys
import tempfile
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest

from inference import doctor
from inference.errors import EngineLost
from inference.progress.redis import RIGHTS
from inference.settings import Settings
from tests.engines.comfyui.graphs import wan
from tests.server.harness import KEY, config, running_server
from tests.support.comfy_server import ComfyServer
from tests.support.gmanimato_app import GmAnimatoServer
from tests.support.redis_server import redis_server

pytestmark = pytest.mark.anyio


async def findings(**settings):
    """Everything that it says, by what was examined."""
    found = [it async for it in doctor.examine(lambda: Settings.isolated(**settings))]
    return {it.name: it for it in found}


async def test_a_sound_machine_without_a_queue():
    """A queue is not needed to try things, so none is no failure."""
    found = await findings()
    assert {name: it.verdict for name, it in found.items()} == {
        "settings": "ok",
        "photos": "ok",
        "ffmpeg": "ok",
        "disk": "ok",
        "data": "ok",
        "queue": "skip",
        "extra server": "ok",
        "extra wan": "ok",
        "extra comfyui": "ok",
    }
    assert "h264" in found["ffmpeg"].text


async def test_a_machine_that_reads_no_heic(monkeypatch):
    """It would hand back what every iPhone sends."""
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    told = (await findings())["photos"]
    assert (told.verdict, "HEIC" in told.text, "pip install pillow-heif" in told.text) == ("FAIL", True, True)


async def test_each_problem_of_the_settings_is_a_line():
    """And what needs them is skipped, not failed."""

    def load():
        return Settings.isolated(lease_duration_s=-1, port=-1)

    found = [it async for it in doctor.examine(load)]
    assert [it.verdict for it in found if it.name == "settings"] == ["FAIL", "FAIL"]
    assert [it.verdict for it in found if it.name == "queue"] == ["skip"]


async def test_an_engine_that_nobody_chose():
    """As `i2v work` refuses to start; the rest is looked at all the same."""
    found = [it async for it in doctor.examine(lambda: Settings.isolated(api_url="https://app.invalid", api_key=KEY))]
    [told] = [it for it in found if it.name == "settings"]
    assert (told.verdict, told.text.startswith("I2V_ENGINE is not set")) == ("FAIL", True)
    assert {"ffmpeg", "disk", "queue"} <= {it.name for it in found}


async def test_a_folder_that_cannot_be_written(tmp_path):
    """TEMP_DIR is named, for that is what to change."""
    (tmp_path / "file").touch()
    found = await findings(temp_dir=tmp_path / "file")
    assert found["disk"].verdict == "FAIL"
    assert "TEMP_DIR" in found["disk"].text


async def test_a_disk_with_little_room(monkeypatch):
    """Still works, but not for long."""
    monkeypatch.setattr(doctor, "ROOM_BYTES", 10**18)
    found = await findings()
    assert found["disk"].verdict == "FAIL"
    assert "GB free" in found["disk"].text


@pytest.mark.parametrize("binary", ["/bin/false", "/nowhere/ffmpeg"])
async def test_an_ffmpeg_that_does_not_work(monkeypatch, binary):
    """Found by using it, not by finding it."""
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", binary)
    found = await findings()
    assert found["ffmpeg"].verdict == "FAIL"
    assert "\n" not in found["ffmpeg"].text


async def test_a_queue_that_takes_the_key_and_one_that_does_not(tmp_path):
    """Without leasing anything; the key itself is not repeated."""
    with running_server(config(tmp_path)) as url:
        assert (await findings(api_url=url, api_key=KEY))["queue"].verdict == "ok"
        refused = (await findings(api_url=url, api_key="not-the-key"))["queue"]
    assert refused.verdict == "FAIL"
    assert "key" in refused.text
    assert "not-the-key" not in refused.text
    gone = (await findings(api_url=url, api_key=KEY))["queue"]
    assert gone.verdict == "FAIL"


async def test_something_that_is_no_queue():
    """A web server of another kind at that address."""
    with serving(_Page) as url:
        found = await findings(api_url=url, api_key=KEY)
    assert found["queue"].verdict == "FAIL"


@pytest.mark.parametrize(
    "storage,verdict,says",
    [
        ("http://127.0.0.1:54321", "ok", "its storage is 127.0.0.1"),  # Supabase beside the app, on a laptop
        ("http://localhost:54321", "ok", "its storage is localhost"),
        ("http://10.0.0.1:54321", "FAIL", "I2V_ALLOW_PRIVATE_ADDRESSES"),
        (None, "ok", "cannot be checked without a task"),
    ],
)
async def test_a_storage_where_this_worker_may_not_go(storage, verdict, says):
    """Found before a task is taken, where the queue signs an upload for a task that it does not have."""

    class App(_Page):
        def answer(self, call):
            if call == "presign" and storage:
                return 200, success({"url": f"{storage}/videos/1.mp4?token=secret", "storage_path": "videos/1.mp4"})
            return 404, b'{"success": false, "error": "Task not found"}'

    with serving(App) as url:
        found = (await findings(api_url=url, api_key=KEY))["queue"]
    assert (found.verdict, says in found.text) == (verdict, True)
    assert "secret" not in found.text


async def test_what_vercel_puts_before_an_app():
    """Its page is not the app's, and says nothing of the key."""

    class Protected(_Page):
        def answer(self, call):  # noqa: ARG002
            return 401, b'<html><script>document.cookie = "_vercel_sso_nonce=..."</script></html>'

    with serving(Protected) as url:
        found = (await findings(api_url=url, api_key=KEY, vercel_bypass="wrong-secret"))["queue"]
    assert found.verdict == "FAIL"
    assert "VERCEL_AUTOMATION_BYPASS_SECRET" in found.text
    assert "WORKER_API_KEY" not in found.text
    assert "wrong-secret" not in found.text


def success(data):
    """What the worker API answers."""
    return json.dumps({"success": True, "data": data}).encode()


@contextmanager
def serving(page):
    """A web server on loopback: its address."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), page)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Page(http.server.BaseHTTPRequestHandler):
    def answer(self, call):  # noqa: ARG002
        """Status and body."""
        return 200, b"<html>hello</html>"

    def do_POST(self):
        status, body = self.answer(self.path.rpartition("/")[2])
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        """Nothing on stderr."""


async def test_gmanimato_and_comfyui_with_all_their_parts():
    """Nothing is claimed; what cannot be known without claiming is said."""
    with GmAnimatoServer() as app, ComfyServer() as comfy:
        comfy.models["checkpoints"] = ["wan.safetensors"]
        video_id = app.add(b"a photo")
        found = await findings(
            queue="gmanimato",
            engine="comfyui",
            gmanimato_url=app.url,
            gmanimato_secret=app.secret,
            comfy_host=comfy.url,
            bucket_url="https://s3.example.com",
            bucket_name="videos",
            bucket_key_id="key",
            bucket_secret="secret",
        )
        assert app.jobs[video_id].status == "in_queue"
    assert {name: found[name].verdict for name in ("comfyui", "queue", "delivery")} == {
        "comfyui": "ok",
        "queue": "FAIL",  # the bucket's host is not a real one, and is looked up
        "delivery": "ok",
    }
    assert "s3.example.com" in found["queue"].text


async def test_gmanimato_without_a_bucket_or_a_secret():
    """Each missing part is named with the setting that puts it there."""
    with GmAnimatoServer() as app, ComfyServer() as comfy:
        own = {"queue": "gmanimato", "engine": "comfyui", "gmanimato_url": app.url, "comfy_host": comfy.url}
        found = await findings(**own, gmanimato_secret=app.secret)
        assert (found["queue"].verdict, "WORKER_TASK_SECRET" in found["queue"].text) == ("ok", True)
        assert "BUCKET_ENDPOINT_URL" in found["delivery"].text
        assert "BODY_SIZE_LIMIT" in found["delivery"].text
        found = await findings(**own)
        assert (found["queue"].verdict, "WORKER_TASK_SECRET" in found["queue"].text) == ("FAIL", True)
        found = await findings(**own | {"gmanimato_url": f"{app.url}/elsewhere"}, gmanimato_secret=app.secret)
        assert (found["queue"].verdict, "GMANIMATO_API_URL" in found["queue"].text) == ("FAIL", True)


async def test_a_comfyui_that_lacks_what_the_graph_needs(tmp_path):
    """Each model and node type has a line; a server that is away is one, too."""
    graph = wan("photo.png") | {"77": {"class_type": "NoSuchNode", "inputs": {}}}
    graph["4"]["_meta"] = {"title": "i2v:photo"}
    graph["2"]["_meta"] = {"title": "i2v:prompt"}
    path = tmp_path / "workflow.json"
    path.write_text(json.dumps(graph))
    with ComfyServer() as comfy:
        own = Settings.isolated(engine="comfyui", comfy_host=comfy.url, comfy_workflow=path)
        told = [it.text for it in [it async for it in doctor.examine(lambda: own)] if it.name == "workflow"]
    assert len(told) == 2
    assert any("wan.safetensors" in text for text in told)
    assert any("NoSuchNode" in text for text in told)
    found = await findings(engine="comfyui", comfy_host=comfy.url)
    assert (found["comfyui"].verdict, "COMFY_HOST" in found["comfyui"].text) == ("FAIL", True)


async def test_photo_tasks_need_a_graph():
    """A queue whose tasks bring none, and an engine that has none: said before a task is taken."""
    found = await findings(engine="comfyui", api_url="https://app.invalid", api_key=KEY)
    assert (found["settings"].verdict, "I2V_COMFY_WORKFLOW" in found["settings"].text) == ("FAIL", True)


@pytest.mark.parametrize("engine,extra,package", [("wan", "wan", "diffusers"), ("comfyui", "comfyui", "httpx_ws")])
async def test_packages_come_before_what_they_are_for(monkeypatch, engine, extra, package):
    """Nobody fetches 70 GB of weights, or starts ComfyUI, and then hears that a package is missing."""
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed, for Python as well
    found = await findings(engine=engine, wan_preset="5b-fast", weights_dir="/nowhere", comfy_host="127.0.0.1:1")
    assert (found[f"extra {extra}"].verdict, f"[{extra}]" in found[f"extra {extra}"].text) == ("FAIL", True)
    assert not {"weights", "gpu", "comfyui", "workflow"} & set(found)
    with pytest.raises(EngineLost, match=rf"^extra {extra}: not installed"):
        doctor.require_machine(Settings.isolated(engine=engine, wan_preset="5b-fast"))


async def test_a_data_folder_that_is_there_or_can_be_made(tmp_path):
    """Nothing is made."""
    found = (await findings(data_dir=tmp_path / "a" / "b"))["data"]
    assert (found.verdict, str(tmp_path / "a" / "b") in found.text, "makes" in found.text) == ("ok", True, True)
    assert list(tmp_path.iterdir()) == []
    found = (await findings(data_dir=tmp_path))["data"]
    assert (found.verdict, "makes" in found.text, "GB free" in found.text) == ("ok", False, True)
    assert list(tmp_path.iterdir()) == []


async def test_a_data_folder_that_cannot_work(tmp_path, monkeypatch):
    """A file, or under one, or without room: named, with the setting. Where none was asked for, it is no failure."""
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "data"):
        found = (await findings(data_dir=folder))["data"]
        assert (found.verdict, "I2V_DATA_DIR" in found.text, "file is a file" in found.text) == ("FAIL", True, True)
    monkeypatch.setattr(doctor, "ROOM_BYTES", 10**18)
    assert (await findings(data_dir=tmp_path))["data"].verdict == "FAIL"
    monkeypatch.chdir(tmp_path)
    assert (await findings())["data"].verdict == "skip"


def test_a_data_folder_where_users_have_no_numbers(tmp_path, monkeypatch):
    """As on Windows."""
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.delattr(os, "geteuid")
    assert doctor._data(Settings.isolated(data_dir=tmp_path)).verdict == "ok"


@pytest.fixture
def nobody():
    """A folder in which a user without rights may make others, and the name of that user, for the length of a block."""

    @contextmanager
    def acting():
        os.seteuid(65534)
        try:
            yield
        finally:
            os.seteuid(0)

    if os.geteuid() != 0:
        pytest.skip("only root can be somebody else")
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o777)
        yield Path(folder), acting


def test_a_data_folder_of_somebody_else(nobody):
    """Another user's folder, or one file of another user in it, as a first start with sudo leaves it."""
    folder, acting = nobody
    theirs = folder / "theirs"
    theirs.mkdir(0o755)
    with acting():
        mine = folder / "mine"
        mine.mkdir()
    (mine / "queue.db").touch(0o600)
    with acting():
        told = [doctor._data(Settings.isolated(data_dir=each)) for each in (mine, theirs)]
    assert [it.verdict for it in told] == ["FAIL", "FAIL"]
    assert "queue.db in it belongs to root" in told[0].text
    assert f"{theirs} cannot be used: Permission denied" in told[1].text
    assert "it belongs to" in doctor._data(Settings.isolated(data_dir=mine)).text


async def test_redis_is_used_once(tmp_path):
    """With the rights that the guide names, and no others; what it says of a user without them is told, no password."""
    with redis_server(tmp_path) as redis:
        found = (await findings(redis_url=redis.url))["redis"]
        assert (found.verdict, found.text.startswith(f"Redis {redis.client.info()['redis_version']} at 127")) == (
            "ok",
            True,
        )
        assert [key for key in redis.client.scan_iter() if redis.client.pttl(key) > 1000] == []
        redis.client.execute_command("ACL", "SETUSER", "app", "on", ">s3cret", *RIGHTS.split())
        url = f"redis://app:s3cret@127.0.0.1:{redis.port}/0"
        found = (await findings(redis_url=url))["redis"]
        assert (found.verdict, found.text.startswith("Redis at 127.0.0.1")) == ("ok", True)
        redis.client.execute_command("ACL", "SETUSER", "app", "-xread")
        found = (await findings(redis_url=url))["redis"]
        assert (found.verdict, "xread" in found.text, RIGHTS in found.text) == ("FAIL", True, True)
        wrong = (await findings(redis_url=url.replace("s3cret", "wr0ng")))["redis"]
        assert wrong.verdict == "FAIL"
    gone = (await findings(redis_url=url))["redis"]
    assert (gone.verdict, "REDIS_URL" in gone.text) == ("FAIL", True)
    assert not [it for it in (found, wrong, gone) if "s3cret" in it.text or "wr0ng" in it.text]
    assert (await findings(redis_url="http://127.0.0.1"))["redis"].verdict == "FAIL"
