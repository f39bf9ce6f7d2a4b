"""The doctor finds what is wrong, says what to do about it, and looks on."""

import http.server
import json
import threading
from contextlib import contextmanager

import pytest

from inference import doctor
from inference.settings import Settings
from tests.server.harness import KEY, config, running_server

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
        "ffmpeg": "ok",
        "disk": "ok",
        "queue": "skip",
        "extra server": "ok",
        "extra heic": "ok",
        "extra wan": "ok",
    }
    assert "h264" in found["ffmpeg"].text


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
