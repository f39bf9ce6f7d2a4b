"""The command line as people meet it: what it says, how it ends, and what it leaves behind.

Each command runs as a real process somewhere in here; what more there is to ask of it is asked within this process.
"""

import json
import os
import pty
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import webbrowser
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from inference.commands import main as cli
from inference.commands.browser import open_browser
from inference.media.video import probe
from tests.support.disk import small_disk
from tests.support.processes import I2V, KEY, Process, Site, environment, i2v_here, jpeg, until
from tests.support.proxy import Proxy, Record

LIMIT_S = 60


class Ran:
    """What a command said and how it ended."""

    def __init__(self, exit_code: int, out: str, err: str) -> None:
        self.exit_code, self.out, self.err = exit_code, out, err
        for secret in (KEY, "token="):
            assert secret not in self.out + self.err

    @property
    def errors(self) -> list[str]:
        """The lines that say what went wrong."""
        return [line for line in self.err.splitlines() if line.startswith("i2v: ")]


class Home:
    """A folder to work in, with a photo, a folder for temporary files, and the command."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.temp = folder / "temp"
        self.temp.mkdir()
        self.photo = folder / "photo.jpg"
        self.photo.write_bytes(jpeg())

    def env(self, **settings: object) -> dict[str, str]:
        """The environment of a command."""
        return environment(**({"TMPDIR": self.temp} | settings))

    def i2v(self, *arguments: object, **settings: object) -> Ran:
        """Runs a command to its end."""
        command = [I2V, *map(str, arguments)]
        ran = subprocess.run(
            command, cwd=self.folder, env=self.env(**settings), capture_output=True, check=False, timeout=LIMIT_S
        )
        return Ran(ran.returncode, ran.stdout.decode(), ran.stderr.decode())

    def is_tidy(self) -> bool:
        """Whether nothing temporary is left: folders, hidden files beside outputs, processes."""
        hidden = [path for path in self.folder.rglob(".*") if path.name != ".env"]
        return not list(self.temp.iterdir()) and not hidden


@pytest.fixture
def home(tmp_path):
    """A clean place."""
    (tmp_path / "home").mkdir()
    return Home(tmp_path / "home")


@pytest.fixture
def here(home, capsys):
    """Runs a command within this process, which spares the start of one."""

    def run(*arguments, **settings):
        ran = i2v_here(capsys, home.folder, *arguments, **({"TMPDIR": home.temp} | settings))
        return Ran(ran.returncode, ran.stdout, ran.stderr)

    return run


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A queue server, and nobody who works. Tests leave its queue empty."""
    with Site(tmp_path_factory.mktemp("site")) as site:
        yield site


# ---------------------------------------------------------------- help


def test_help_shows_every_command_and_an_example_of_each(home):
    """`i2v` alone is help, too; an error of usage exits 2."""
    ran = home.i2v("--help", COLUMNS=200)
    assert ran.exit_code == 0
    names = [each.name for each in cli.COMMANDS if each.epilog]  # groups have examples of their own
    for name in names:
        assert f" {name} " in ran.out
        shown = CliRunner().invoke(cli.app, [name, "--help"], env={"COLUMNS": "200"})
        assert shown.exit_code == 0
        assert re.search(rf"Example: .*\bi2v {name}\b", shown.output)
    assert CliRunner().invoke(cli.app, ["frobnicate"]).exit_code == 2
    assert CliRunner().invoke(cli.app, ["render", "nowhere.jpg"]).exit_code == 2


NAMES_WHOLE = """
import sys
from typer.main import get_command
from typer.testing import CliRunner
from inference.commands import main as cli

def commands(command, path):
    yield command, path
    for name, inner in getattr(command, "commands", {}).items():
        yield from commands(inner if path else cli.command(name), [*path, name])

for command, path in commands(get_command(cli.app), []):
    shown = CliRunner().invoke(cli.app, [*path, "--help"], env={"COLUMNS": sys.argv[1]}).output
    for option in command.params:
        for name in option.opts if option.param_type_name == "option" else ():
            assert name in shown, (path, name, shown)
            print(*path, name)
"""


@pytest.mark.parametrize("columns", [40, 80])
def test_names_of_options_are_whole_in_help(columns):
    """Of every command, on narrow terminals, too."""
    env = environment(COLUMNS=columns)
    ran = subprocess.run([sys.executable, "-c", NAMES_WHOLE, str(columns)], env=env, capture_output=True, check=False)
    assert ran.returncode == 0, ran.stderr.decode()[-3000:]
    assert {"--version", "up --wake-port", "push submit --input"} <= set(ran.stdout.decode().splitlines())


def test_the_version_is_said(here):
    """With Python's, for who asks for help elsewhere."""
    ran = here("--version")
    assert (ran.exit_code, ran.err) == (0, "")
    assert re.fullmatch(r"i2v \d+\.\d+\.\d+, Python 3\.\d+\.\d+\S*\n", ran.out)


# ---------------------------------------------------------------- demo


def test_demo_makes_a_video_wherever_it_runs(home, here):
    """Whatever is set for real work; twice; stdout is the path alone; nothing else is left."""
    hostile = {
        "I2V_WORKER_TYPE": "runway",
        "LEASE_DURATION": "abc",
        "I2V_ENGINE": "none",
        "WORKER_API_KEY": KEY,
        "VERCEL_API_URL": "https://app.example.com",
        "TEMP_DIR": "/proc/nowhere",
        "LOG_DIR": "/proc/nowhere",
    }
    (home.folder / ".env").write_text("I2V_PORT=-1\nHEARTBEAT_INTERVAL=soon\n")
    for run, arguments in ((home.i2v, []), (here, ["photo.jpg", "--prompt", "[/red] 천천히 줌인 [bold]"])):
        ran = run("demo", *arguments, "--seconds", "0.5", **hostile)
        assert (ran.exit_code, ran.errors) == (0, []), ran.err
        assert ran.out == f"{home.folder / 'i2v-demo.mp4'}\n"
        info = probe(home.folder / "i2v-demo.mp4")
        assert (info.codec, info.frames, info.fps) == ("h264", 13, 24)
    assert "[/red] 천천히 줌인 [bold]" in ran.err
    assert "completed" in ran.err
    assert "`i2v demo --open`" in ran.err.splitlines()[-1]
    assert home.is_tidy()
    assert {path.name for path in home.folder.iterdir()} == {"temp", "photo.jpg", ".env", "i2v-demo.mp4"}


def test_demo_can_be_interrupted(home):
    """Ctrl-C in the middle: exit 130 within moments, no video, nothing left, not a word of alarm."""
    demo = Process(home.folder, "demo", "demo", "photo.jpg", "--seconds", "20", env=home.env())
    until(lambda: "render" in demo.stderr.read_text(), 20, "it renders")
    demo.send(signal.SIGINT)
    assert demo.wait(4) == 130
    assert home.is_tidy()
    assert not (home.folder / "i2v-demo.mp4").exists()
    assert demo.stdout.read_text() == ""
    assert "Traceback" not in demo.stderr.read_text()
    assert demo.logs() == []


STOPPED_AT_ITS_START = """
import os, sys
from pathlib import Path
import anyio
from inference import process
from inference.commands.serving import serving
from inference.settings import Settings

number, handles_signals, folder = int(sys.argv[1]), sys.argv[2] == "True", Path(sys.argv[3])

async def main():
    os.kill(os.getpid(), number)
    async with serving(Settings.isolated(port=0, data_dir=folder, temp_dir=folder)):
        await anyio.sleep_forever()

process.run(main, cancel_on_signal=not handles_signals)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("handles_signals", [False, True])
def test_a_command_is_stopped_before_its_queue_is_open(number, handles_signals, tmp_path):
    """Ctrl-C in the first second: it ends, where it used to stay for ever, or serve on without a worker."""
    ran = subprocess.run(
        [sys.executable, "-c", STOPPED_AT_ITS_START, str(int(number)), str(handles_signals), tmp_path],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=20,
    )
    assert ran.returncode == (-number if handles_signals else 128 + number)
    assert "Traceback" not in ran.stderr


def test_demo_on_its_page(home):
    """A browser is told where; the page takes more tasks, without a key; Ctrl-C leaves the mp4 and nothing else."""
    opened = home.folder / "opened"
    browser = home.folder / "browser"
    browser.write_text(f'#!/bin/sh\necho "$1" > {opened}\n')
    browser.chmod(0o700)
    demo = Process(home.folder, "demo", "demo", "--open", "--seconds", "0.5", env=home.env(BROWSER=f"{browser} %s"))
    try:
        url = until(lambda: opened.exists() and opened.read_text().strip(), 20, "a browser was started")
        assert demo.stderr.read_text().lstrip().startswith(f"Open {url} in a browser.\n")
        page = httpx.get(url, headers={"Accept": "text/html"})
        assert (page.status_code, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
        until(lambda: "Ctrl-C" in demo.stderr.read_text(), 20, "the demo is made")
        assert probe(home.folder / "i2v-demo.mp4").frames == 13
        form, files = {"seconds": "0.5"}, {"photo": ("mine.jpg", jpeg())}
        [task] = httpx.post(f"{url}/api/tasks", data=form, files=files).json()["data"]["items"]

        def status():
            return httpx.get(f"{url}/api/tasks/{task['id']}").json()["data"]["status"]

        until(lambda: status() == "completed", 20, "what was asked for on the page is made")
        demo.send(signal.SIGINT)
        assert demo.wait(15) == 0
    finally:
        demo.kill()
    assert demo.stdout.read_text() == f"{home.folder / 'i2v-demo.mp4'}\n"
    assert "Traceback" not in demo.stderr.read_text()
    assert demo.logs() == []
    assert home.is_tidy()


def test_what_the_page_asked_for_may_end_before_the_demo(home):
    """The demo waits for its own task, and saves the clip of that."""
    opened = home.folder / "opened"
    browser = home.folder / "browser"
    browser.write_text(f'#!/bin/sh\necho "$1" > {opened}\n')
    browser.chmod(0o700)
    demo = Process(home.folder, "demo", "demo", "--open", "--seconds", "4", env=home.env(BROWSER=f"{browser} %s"))
    try:
        url = until(lambda: opened.exists() and opened.read_text().strip(), 20, "a browser was started")
        until(lambda: "submitted" in demo.stderr.read_text(), 20, "the demo has asked")
        files = {"photo": ("mine.jpg", jpeg())}
        [task] = httpx.post(f"{url}/api/tasks", data={"seconds": "0.5"}, files=files).json()["data"]["items"]
        address = f"{url}/api/tasks/{task['id']}"
        until(lambda: httpx.get(address).json()["data"]["status"] == "processing", 20, "its worker has both")
        httpx.post(f"{address}/cancel")
        until(lambda: httpx.get(address).json()["data"]["status"] == "cancelled", 20, "the other has ended")
        until(lambda: "Ctrl-C" in demo.stderr.read_text(), 80, "the demo is made")
        assert probe(home.folder / "i2v-demo.mp4").frames == 97
        demo.send(signal.SIGINT)
        assert demo.wait(15) == 0
    finally:
        demo.kill()
        print(demo.stderr.read_text())  # where it stood, if it was not made
    assert "no video was made" not in demo.stderr.read_text()


@pytest.mark.parametrize("name, starts", [("/usr/bin/w3m", False), ("firefox", True), (None, False)])
def test_a_browser_that_would_take_the_terminal_is_left_alone(monkeypatch, name, starts):
    """Nor is anything said where there is none: the address of the page is on the screen already."""
    opened = []
    monkeypatch.setattr(webbrowser, "_tryorder", [] if name is None else ["it"])
    monkeypatch.setattr(webbrowser, "_browsers", {"it": [None, Recorder(str(name), opened)]})
    open_browser("http://127.0.0.1:1")
    for thread in threading.enumerate():
        if thread.name == "browser":
            thread.join(10)
    assert opened == (["http://127.0.0.1:1"] if starts else [])


class Recorder(webbrowser.GenericBrowser):
    """A browser that only remembers what it was asked for."""

    def __init__(self, name, opened):
        super().__init__(name)
        self.opened = opened

    def open(self, url, new=0, autoraise=True):  # noqa: ARG002
        """See webbrowser."""
        self.opened.append(url)
        return True


def test_a_full_disk_is_one_clear_line(home, here, tmp_path):
    """For the temporary files of a demo, and for the output of a rendering; the old output stays."""
    with small_disk(tmp_path / "disk", "280k") as disk:
        ran = home.i2v("demo", "--seconds", "5", TMPDIR=disk)
        assert ran.exit_code == 1
        assert len(ran.errors) == 1
        assert "room" in ran.errors[0] or "full" in ran.errors[0]
        assert "Traceback" not in ran.err
        assert list(disk.iterdir()) == []

        (disk / "out.mp4").write_bytes(b"old" * 1000)
        with pytest.raises(OSError, match="No space"):
            (disk / "more").write_bytes(bytes(300_000))
        ran = here("render", home.photo, "--seconds", "1", "-o", disk / "out.mp4")
        assert (ran.exit_code, len(ran.errors)) == (1, 1)
        assert "no room left" in ran.errors[0]
        assert {path.name for path in disk.iterdir()} == {"out.mp4", "more"}
        assert (disk / "out.mp4").read_bytes() == b"old" * 1000
    assert not (home.folder / "i2v-demo.mp4").exists()


# ---------------------------------------------------------------- render


def test_render_replaces_its_output_whole_or_not_at_all(home, here):
    """A Korean prompt; a second rendering that fails leaves the first one's file as it was."""
    output = home.folder / "영상 [1].mp4"
    output.write_bytes(b"old")
    ran = home.i2v("render", "photo.jpg", "오른쪽으로 팬", "--seconds", "0.5", "-o", output)
    assert (ran.exit_code, ran.out) == (0, f"{output}\n"), ran.err
    assert probe(output).frames == 13
    first = output.read_bytes()
    (home.folder / "broken.jpg").write_bytes(jpeg()[:200])
    ran = here("render", "broken.jpg", "--seconds", "0.5", "-o", output)
    assert (ran.exit_code, ran.out, len(ran.errors)) == (1, "", 1)
    assert "the photo is damaged" in ran.errors[0]
    assert output.read_bytes() == first
    assert home.is_tidy()


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "command, settings, says",
    [
        ("render broken.jpg -s 0.5", {}, "the photo is damaged"),
        ("render photo.jpg -o /proc/out.mp4", {}, "/proc/out.mp4 cannot be written: "),
        ("render photo.jpg -o out.mov", {}, "has to end in .mp4"),
        ("render photo.jpg -o folder.mp4", {}, "is a folder"),
        ("render photo.jpg -o nowhere/out.mp4", {}, "there is no folder"),
        ("render photo.jpg", {"LOG_DIR": "/proc/logs"}, "LOG_DIR"),
        ("work --once", {"WORKER_API_KEY": KEY}, "VERCEL_API_URL or NEXT_API_URL is not set"),
        ("work --once --url http://127.0.0.1:1", {"WORKER_API_KEY": KEY}, "no queue at http://127.0.0.1:1"),
        ("work --once --url http://127.0.0.1:99999", {"WORKER_API_KEY": KEY}, "there is no port 99999"),
        ("submit photo.jpg --url http://127.0.0.1:65536", {"WORKER_API_KEY": KEY}, "there is no port 65536"),
        ("submit photo.jpg --url 127.0.0.1:8000", {"WORKER_API_KEY": KEY}, "--url: has to be a URL such as"),
        ("submit photo.jpg", {"VERCEL_API_URL": "127.0.0.1:8000"}, "VERCEL_API_URL: has to be a URL such as"),
        ("work --once --url https://app.invalid", {"WORKER_API_KEY": KEY}, "I2V_ENGINE is not set"),
        ("work --once --url http://127.0.0.1:1", {"TEMP_DIR": "/proc/temp"}, "TEMP_DIR"),
        ("submit photo.jpg -v --url http://127.0.0.1:1", {"WORKER_API_KEY": KEY}, "no queue answers at"),
        ("submit photo.jpg -n 2 -o out.mp4", {}, "--output takes one video"),
        ("submit photo.jpg broken.jpg pan -o /proc/clips/", {}, "/proc/clips cannot be written"),
        ("submit photo.jpg gone.jpg", {}, "there is no file gone.jpg"),
        ("film photo.jpg gone.jpg pan", {}, "there is no file gone.jpg"),
        (f"submit gone.jpg {'줌' * 100}", {}, "there is no file gone.jpg"),  # no file can be called so
        ("submit photo.jpg folder.mp4 pan", {}, "folder.mp4 is a folder: give the photos in it"),
        ("submit photo.jpg notes", {}, "notes is a file, and the last word is the prompt: give that with --prompt"),
        ("film photo.jpg folder.mp4", {}, "folder.mp4 is a folder, and the last word is the prompt: give that with"),
        ("fetch A B", {}, "give a folder for the videos"),
        ("fetch", {}, "which videos?"),
        ("tasks", {"I2V_QUEUE": "gmanimato"}, "its tasks are seen in its application"),
        ("up --host 0.0.0.0 --port 0", {}, "WORKER_API_KEY is not set, so this server may not listen on 0.0.0.0"),
        ("demo -o /proc/out.mp4", {}, "/proc/out.mp4 cannot be written: "),
        (f"render photo.jpg -o {'x' * 300}.mp4", {}, "cannot be written: file name too long"),
        (f"submit photo.jpg pan -o {'x' * 300}/", {}, "cannot be written: file name too long"),
        ("film photo.jpg -o /proc/out.mp4", {}, "/proc/out.mp4 cannot be written: "),
        ("tasks --delete A --cancel B", {}, "--cancel, --retry and --delete exclude each other"),
        ("tasks --delete=", {}, "the id of the task is empty"),
        ("tasks --watch --cancel B", {}, "--watch only looks"),
        ("tasks --watch --url http://127.0.0.1:1", {}, "no queue answers at"),
        ("work --once --url http://127.0.0.1:1", {"REDIS_URL": "redis.example.com"}, "REDIS_URL"),
        ("serve --host 0.0.0.0", {}, "WORKER_API_KEY is not set"),
        ("serve", {"I2V_DATA_DIR": "/proc/data"}, "I2V_DATA_DIR"),
        ("serve", {"HEARTBEAT_INTERVAL": "600"}, "HEARTBEAT_INTERVAL (600 s) has to be at most half"),
    ],
)
def test_an_error_is_one_line_that_names_the_cause(home, here, command, settings, says):
    """Exit 1, `i2v: …`, and a traceback only for who asks for one with -v."""
    (home.folder / "broken.jpg").write_bytes(jpeg()[:200])
    (home.folder / "folder.mp4").mkdir()
    (home.folder / "notes").touch()
    ran = here(*command.split(), **settings)
    assert (ran.exit_code, ran.out) == (1, ""), ran.err
    assert len(ran.errors) == 1
    assert says in ran.errors[0]
    assert ("Traceback" in ran.err) == ("-v" in command)
    assert home.is_tidy()


def test_a_setting_that_nothing_reads_is_said(here):
    """By whatever command, and by doctor, once."""
    ran = here("work", "--once", "--url", "http://127.0.0.1:1", I2V_ENGIN="wan", WORKER_API_KEY=KEY)
    assert ran.err.count("nothing reads I2V_ENGIN: did you mean I2V_ENGINE?") == 1
    ran = here("doctor", I2V_ENGIN="wan")
    assert "skip  settings       nothing reads I2V_ENGIN: did you mean I2V_ENGINE?" in ran.out


def test_a_port_in_use_is_said(here):
    """With the port, for it may come from the environment."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ran = here("serve", "--port", port)
    [line] = ran.errors
    assert line.startswith(f"i2v: cannot listen on 127.0.0.1, port {port}: Address already in use")


def test_all_problems_of_the_settings_are_said_at_once(here):
    """A line each, under the names that they are set by."""
    ran = here("work", LEASE_DURATION="abc", POLL_INTERVAL="0", WORKER_API_KEY=KEY)
    assert ran.exit_code == 1
    assert sorted(line.split()[1] for line in ran.errors) == ["LEASE_DURATION:", "POLL_INTERVAL:", "VERCEL_API_URL"]


# ---------------------------------------------------------------- the queue


def test_up_serves_submit_and_tasks(home, here):
    """The whole way of somebody who tries it: up, submit and wait, look, cancel, retry, Ctrl-C."""
    env = home.env(I2V_PORT=0, WORKER_API_KEY=KEY, POLL_INTERVAL=0.1, I2V_SHUTDOWN_GRACE=0.2, I2V_CONCURRENCY=1)
    env["HEARTBEAT_INTERVAL"] = "0.2"
    up = Process(home.folder, "up", "up", env=env)
    try:
        port = until(lambda: [line["port"] for line in up.events("the queue is open")], 20, "it is open")[0]
        queue = {"VERCEL_API_URL": f"http://127.0.0.1:{port}", "WORKER_API_KEY": KEY}
        arguments = ("photo.jpg", "[/b] pan left", "--seconds", "0.5", "--wait", "--output", "out.mp4")
        ran = here("submit", *arguments, **queue)
        assert ran.exit_code == 0, ran.err
        item_id, output = ran.out.splitlines()
        assert output == str(home.folder / "out.mp4")
        assert probe(Path(output)).frames == 13
        ran = here("tasks", **queue)
        assert [word in ran.out for word in (item_id, "completed", "[/b] pan left", "photo.jpg")] == [True] * 4

        assert "[red]" not in ran.out

        long, _, last = here("submit", "photo.jpg", "-s", "60", "-n", "3", **queue).out.split()
        until(lambda: up.events("stage", item_id=long, stage="render"), 20, "it renders")
        for action, status in (("--cancel", "cancelled"), ("--retry", "pending")):
            assert json.loads(here("tasks", action, last, "--json", **queue).out)["status"] == status
        here("tasks", "--cancel", long, **queue)
        until(lambda: up.events("lease_ended", item_id=long, status="cancelled"), 10, "the worker heard")
        lines = here("tasks", "--json", "--status", "cancelled", **queue).out.splitlines()
        assert [json.loads(line)["id"] for line in lines] == [long]
        ran = here("tasks", "--retry", item_id, **queue)
        assert ran.exit_code == 1
        assert ran.errors == ["i2v: the task is completed: only a failed or cancelled one can be retried"]
        ran = here("tasks", "--delete", item_id, **queue)
        assert (ran.exit_code, ran.out, ran.err) == (0, "", "Deleted.\n")
        assert here("tasks", "--delete", item_id, **queue).errors == [f"i2v: no task {item_id}"]
        up.send(signal.SIGINT)
        assert up.wait(10) == 0
    finally:
        up.kill()
    said = up.stderr.read_text()
    assert KEY not in said
    assert "token=" not in said
    assert all(json.loads(line) for line in said.splitlines())
    assert list(home.temp.iterdir()) == []


def test_many_photos_become_a_folder_of_clips(site, home):
    """One group, and one bar, which moves; two photos of one name have two clips; one that is none holds nobody up."""
    (home.folder / "여름 휴가").mkdir()
    photos = ["photo.jpg", "여름 휴가/photo.jpg"]
    (home.folder / photos[1]).write_bytes(jpeg())
    (home.folder / "bad.jpg").write_text("no photo")
    queue = {"VERCEL_API_URL": site.url, "WORKER_API_KEY": KEY}
    env = home.env(**queue, TERM="xterm", COLUMNS=80)
    main, end = pty.openpty()
    command = [I2V, "submit", photos[0], "bad.jpg", photos[1], "pan left", "-s", "6", "-o", "내 클립/"]
    worker = Process(home.folder, "work", "work", env=home.env(**queue, POLL_INTERVAL=0.1, I2V_GPU_PRICE=3600))
    try:
        with subprocess.Popen(command, cwd=home.folder, env=env, stdout=end, stderr=end) as submit:
            os.close(end)
            shown = Shown(main)
            assert submit.wait(60) == 1
    finally:
        worker.send(signal.SIGTERM)
        assert worker.wait() == 0
    until(lambda: b"cannot be used" in shown.text, 5, "all is read")
    said = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.text.decode())
    assert "i2v: bad.jpg: the file is not a JPEG" in said
    assert "i2v: 1 of 3 photos cannot be used: bad.jpg" in said
    assert "2 photos, 2 tasks, group " in said
    assert "ready 1/2" in said
    assert len(set(re.findall(r"(\d+) % ready", said)) - {"0", "50", "100"}) >= 3, said
    assert all(f"{home.folder}/내 클립/{name}\r\n" in said for name in ("photo.mp4", "photo (2).mp4"))
    assert [probe(path).frames for path in (home.folder / "내 클립").iterdir()] == [145, 145]
    [stopped] = worker.events("worker_stopped")
    assert (stopped["done"], stopped["failed"], stopped["handed_back"]) == (2, 0, 0)
    assert stopped["cost_usd"] > 0
    ended = worker.events("lease_ended", status="completed")
    assert [line["seconds"] > 0 and line["cost_usd"] > 0 for line in ended] == [True, True]
    assert {line["percent"] for line in worker.events("stage", stage="upload")} != {0}
    assert home.is_tidy()
    site.ask("DELETE", f"groups/{re.search(r'group ([0-9a-f-]+)', said)[1]}")


def test_a_wait_that_is_ended_says_how_to_go_on(site, home, here):
    """With a command that can be typed as it is, to the same queue."""
    arguments = ["submit", "photo.jpg", "photo.jpg", "--prompt", "pan left", "-o", "내 클립/", "--url", site.url]
    waiting = Process(home.folder, "submit", *arguments, env=home.env(WORKER_API_KEY=KEY))
    until(lambda: "2 photos, 2 tasks" in waiting.stderr.read_text(), 20, "it waits")
    waiting.send(signal.SIGINT)
    assert waiting.wait() == 130
    item_ids = waiting.stdout.read_text().split()
    assert len({site.task(item_id)["group_id"] for item_id in item_ids}) == 1
    said, _, command = waiting.stderr.read_text().splitlines()[-1].partition(" Later: i2v ")
    assert said == "The tasks go on."
    assert shlex.split(command)[-2:] == ["--url", site.url]
    for item_id in item_ids:
        here("tasks", "--cancel", item_id, "--url", site.url, WORKER_API_KEY=KEY)
    ran = here(*shlex.split(command), WORKER_API_KEY=KEY)
    assert (ran.exit_code, len(ran.errors)) == (1, 3)
    assert ran.errors[-1].startswith("i2v: 2 of 2 clips are missing: photo.jpg ")
    assert home.is_tidy()


def test_what_was_submitted_before_the_end_is_said(site, home):
    """With the command that shows it, at the same queue."""
    photos, is_third, goes_on = [], threading.Event(), threading.Event()

    def hold_third(exchange):
        photos.append(exchange)
        if len(photos) < 3:
            return None
        is_third.set()
        goes_on.wait(20)
        return "drop request"

    with Proxy(httpx.URL(site.url).port, "submit", Record(), hold_third) as proxy:
        arguments = ["submit", "photo.jpg", "photo.jpg", "photo.jpg", "-p", "pan", "--url", proxy.url]
        ran = Process(home.folder, "submit", *arguments, env=home.env(WORKER_API_KEY=KEY))
        assert is_third.wait(20)
        ran.send(signal.SIGINT)
        assert ran.wait() == 130
        goes_on.set()
    group = site.task(ran.stdout.read_text().split()[1])["group_id"]
    said = f"2 of 3 photos submitted: i2v tasks --group {group} --url {proxy.url}"
    assert ran.stderr.read_text().splitlines() == [said]
    site.ask("DELETE", f"groups/{group}")


def test_tasks_are_watched_until_ctrl_c(site, home, here):
    """A line for each change where nobody looks, as JSON too; a table in a terminal. A queue that goes away is missed
    for a moment, and not the end.
    """
    queue = {"VERCEL_API_URL": site.url, "WORKER_API_KEY": KEY}
    [item_id] = site.submit()
    group = site.task(item_id)["group_id"]
    lines = Process(home.folder, "lines", "tasks", "--watch", "--group", group, env=home.env(**queue))
    as_json = Process(home.folder, "json", "tasks", "--watch", "--json", env=home.env(**queue))
    env = home.env(**queue, TERM="xterm", COLUMNS=150)
    main, end = pty.openpty()
    with subprocess.Popen([I2V, "tasks", "--watch"], cwd=home.folder, env=env, stdout=end, stderr=end) as table:
        os.close(end)
        shown = Shown(main)
        try:
            until(lines.stdout.read_text, 20, "the task is there")
            until(lambda: b"1 waiting" in shown.text, 20, "it is in the table")
            site.server.kill()
            until(lambda: b"does not answer" in shown.text, 20, "the outage is said")
            site.start_server()
            site.submit()  # of another group
            for _ in range(2):
                assert here("work", "--once", I2V_GPU_PRICE=3600, **queue).exit_code == 0
            until(lambda: "completed" in lines.stdout.read_text(), 20, "it is done")
            until(lambda: as_json.stdout.read_text().count('"completed"') == 2, 20, "both are done")
            until(lambda: shown.text.count(b"completed") >= 2 and b"$" in shown.text, 20, "the table says so")
        finally:
            for send in (lines.send, as_json.send, table.send_signal):
                send(signal.SIGINT)
        assert (lines.wait(), as_json.wait(), table.wait(15)) == (0, 0, 0)
    told = lines.stdout.read_text().splitlines()
    assert told[0] == f"{item_id}  pending"
    assert re.fullmatch(rf"{item_id}  completed  \$\d+\.\d\d", told[-1])
    changes = [json.loads(line) for line in as_json.stdout.read_text().splitlines()]
    assert next(task["status"] for task in changes if task["id"] == item_id) == "pending"
    assert "Traceback" not in lines.stderr.read_text() + as_json.stderr.read_text()
    assert b"Traceback" not in shown.text


class Shown:
    """What is shown on a terminal, read by a thread."""

    def __init__(self, terminal: int) -> None:
        self.text = b""
        self._terminal = terminal
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        while chunk := _read(self._terminal):
            self.text += chunk
        os.close(self._terminal)


def test_work_once(site, home, here):
    """An empty queue, a wrong key, one task: what it says, where its log goes, and that no secret is in it."""
    settings = {"VERCEL_API_URL": site.url, "WORKER_API_KEY": KEY, "LOG_DIR": home.folder / "logs"}
    ran = here("work", "--once", **settings)
    assert (ran.exit_code, ran.out) == (0, "")
    events = [json.loads(line)["event"] for line in ran.err.splitlines()]
    assert events == ["worker_started", "no_task", "worker_stopped"]

    ran = here("work", "--once", **settings | {"WORKER_API_KEY": "wrong-key-here"})
    assert (ran.exit_code, len(ran.errors)) == (1, 1)
    assert "key" in ran.errors[0]
    assert "wrong-key-here" not in ran.err
    assert "no_task" not in ran.err  # it did not say

    [item_id] = site.submit()
    ran = home.i2v("work", "--once", "-v", **settings)
    assert ran.exit_code == 0
    assert site.task(item_id)["status"] == "completed"
    lines = [json.loads(line) for line in ran.err.splitlines()]
    assert [line["status"] for line in lines if line["event"] == "lease_ended"] == ["completed"]
    file = "".join(path.read_text() for path in (home.folder / "logs").glob(f"i2v-{socket.gethostname()}*.log"))
    assert lines[-1] in [json.loads(line) for line in file.splitlines()]
    for secret in (KEY, "wrong-key-here", "token="):
        assert secret not in file
    assert home.is_tidy()


def test_a_terminal_gets_lines_for_people(site, home):
    """On a terminal log lines are not JSON, and what one can do is said."""
    main, end = pty.openpty()
    env = home.env(VERCEL_API_URL=site.url, WORKER_API_KEY=KEY, TERM="xterm", COLUMNS=200)
    with subprocess.Popen([I2V, "work", "--once"], cwd=home.folder, env=env, stdout=end, stderr=end) as running:
        os.close(end)
        said = b""
        while chunk := _read(main):
            said += chunk
        assert running.wait(20) == 0
    os.close(main)
    assert b"worker_started" in said
    assert b"The queue has no task to take." in said
    assert b'{"' not in said


def test_up_says_where_its_page_is(home):
    """In a terminal before all else that is for people, and that it asks for the key."""
    main, end = pty.openpty()
    env = home.env(I2V_PORT=0, WORKER_API_KEY=KEY, TERM="xterm", COLUMNS=200)
    with subprocess.Popen([I2V, "up"], cwd=home.folder, env=env, stdout=end, stderr=end) as up:
        os.close(end)
        shown = Shown(main)
        try:
            until(lambda: b"worker_started" in shown.text, 20, "it is open")
        finally:
            up.send_signal(signal.SIGINT)
        assert up.wait(15) == 0
    lines = [line for line in re.sub(r"\x1b\[[0-9;]*m", "", shown.text.decode()).split("\r\n") if line.strip()]
    first = next(line for line in lines if not re.match(r"\d{4}-", line))
    url, hint = re.fullmatch(r"Open (http://127\.0\.0\.1:\d+) in a browser, and sign in with (.+)\.", first).groups()
    assert "WORKER_API_KEY" in hint
    assert any(f"i2v submit PHOTO PROMPT --url {url}" in line for line in lines)
    assert KEY not in shown.text.decode()


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 4096)
    except OSError:  # Linux says so when the other end is closed
        return b""


# ---------------------------------------------------------------- doctor


def test_doctor_says_what_is_wrong_and_exits_1(site, home, here):
    """Sound, and with a key that the queue does not take."""
    ran = home.i2v("doctor", "--url", site.url, WORKER_API_KEY=KEY)
    assert (ran.exit_code, ran.err) == (0, "")
    verdicts = {line[6:19].strip(): line[:4].strip() for line in ran.out.splitlines()}
    assert verdicts == dict.fromkeys(
        ["settings", "photos", "ffmpeg", "disk", "data", "queue", "extra server", "extra wan", "extra comfyui"], "ok"
    )
    ran = here("doctor", "--url", site.url, WORKER_API_KEY="another-key")
    assert ran.exit_code == 1
    assert "FAIL  queue" in ran.out
    assert "another-key" not in ran.out + ran.err
    assert home.is_tidy()


@pytest.mark.parametrize("name", [each.name for each in cli.COMMANDS])
def test_the_list_of_commands_says_what_each_says_of_itself(name):
    """The list is drawn without the commands, so it has a text of its own for each."""
    [listed] = (each for each in cli.COMMANDS if each.name == name)
    assert cli.command(name).help.partition("\n\n")[0].replace("\n", " ") == listed.about
