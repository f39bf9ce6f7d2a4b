"""`i2v runpod …` as people and schedulers meet it: against a RunPod on loopback, a real queue, real workers.

Most jobs here are answered by hand, which spares the start of a worker; where it matters the real handler runs, on the
real SDK.
"""

import base64
import json
import re
import shlex
import signal
import sys
import tempfile
import threading
from collections import defaultdict, deque
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO

import anyio
import httpx
import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from inference import terminal
from inference.build.queues import open_queue
from inference.build.workers import build_runner
from inference.commands import main as cli
from inference.commands import runpod as cli_runpod
from inference.engines.preview import PreviewEngine
from inference.errors import I2VError
from inference.media.video import VideoWriter, probe
from inference.on_runpod import answer as runpod_answer
from inference.on_runpod import api as runpod_api
from inference.on_runpod import job as runpod_job
from inference.on_runpod import tick as runpod_tick
from inference.on_runpod.api import RunPodApi
from inference.on_runpod.wire import answer, answer_of, failure
from inference.queues.lifeisshort import LifeIsShortQueue
from inference.settings import Settings
from inference.task import Lease, Outcome
from tests.support.processes import KEY, Process, Site, environment, jpeg, until
from tests.support.runpod_cloud import RunPodCloud
from tests.support.virtual import virtual_time

LIMIT_S = 60

# What becomes of one call: the status of its answer, None to close the connection instead, and whether it is carried
# out before.
LOST = (None, True)
DOWN = (503, False)
HANG = (0, False)  # nothing, for as long as the cloud is there


class FaultyCloud(RunPodCloud):
    """A RunPod that misbehaves to order: `faults["status"] += [DOWN]`."""

    def __init__(self, **options):
        super().__init__(**options)
        self.faults = defaultdict(deque)
        self.workers = {}  # in place of those that it counts
        self.asked = []

    def handle(self, method, path, headers, raw):
        """See RunPodCloud."""
        call = path.split("/")[3]
        self.asked.append(call)
        if not self.faults[call]:
            status, told = super().handle(method, path, headers, raw)
            return status, told | {"workers": self.workers} if call == "health" and self.workers else told
        status, is_carried_out = self.faults[call].popleft()
        if is_carried_out:
            super().handle(method, path, headers, raw)
        if (status, is_carried_out) == HANG:
            self._closing.wait(LIMIT_S)
            return None, None
        return status, {"error": "to order"}


@pytest.fixture
def cloud():
    """An endpoint without workers."""
    with FaultyCloud() as cloud:
        cloud.poll_s = 0.2
        yield cloud


@pytest.fixture(scope="module")
def mp4(tmp_path_factory):
    """A small video of a worker."""
    path = tmp_path_factory.mktemp("mp4") / "made.mp4"
    with VideoWriter(path, width=64, height=48, fps=24) as writer:
        for value in range(12):
            writer.write(np.full((48, 64, 3), value * 10, np.uint8))
    return writer.video(seed=7)


@contextmanager
def answering(cloud, *answers):
    """A worker in a thread that gives these answers; a callable is given the job's input first."""

    def post(job, body):
        path = f"{cloud.url}/{cloud.endpoint_id}/job-done/hand/{job['id']}"
        httpx.post(path, headers=headers, content=json.dumps(body), timeout=20)

    def work():
        left = deque(answers)
        while left and not over.is_set():
            taken = httpx.get(f"{cloud.url}/{cloud.endpoint_id}/job-take/hand", headers=headers, timeout=20)
            if taken.status_code != 200:
                continue
            job, made = taken.json(), left.popleft()
            for stage, fraction in (("load", 0.2), ("render [/x]", 0.6)):
                post(
                    job,
                    {"status": "IN_PROGRESS", "output": {"stage": stage, "done": 1, "total": 9, "fraction": fraction}},
                )
                looks = cloud.asked.count("status")
                until(lambda seen=looks: cloud.asked.count("status") > seen or over.is_set(), 20, "somebody looked")
            output = dict(made(job["input"]) if callable(made) else made)
            error = output.pop("error", None)
            post(job, {"output": output} | ({"error": error} if error else {}))

    headers = {"Authorization": f"Bearer {cloud.api_key}"}
    over = threading.Event()
    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


class Ran:
    """What a command said and how it ended."""

    def __init__(self, exit_code, out, err):
        self.exit_code, self.out, self.err = exit_code, out, err

    @property
    def errors(self):
        """The lines that say what went wrong."""
        return [line for line in self.err.splitlines() if line.startswith("i2v: ")]

    @property
    def advice(self):
        """The command that is to have the video later, without `i2v runpod`."""
        [line] = re.findall(r"RunPod keeps its answer for 30 minutes: i2v runpod (.+)$", self.err, re.MULTILINE)
        return shlex.split(line)


class Home:
    """A folder with a photo, and what a command needs to reach the cloud."""

    def __init__(self, folder, cloud):
        self.folder, self.cloud = folder, cloud
        (folder / "photo.jpg").write_bytes(jpeg())
        self.settings = {
            "RUNPOD_API_KEY": cloud.api_key,
            "RUNPOD_ENDPOINT_ID": cloud.endpoint_id,
            "RUNPOD_ENDPOINT_BASE_URL": cloud.url,
            "I2V_LEDGER": folder / "state" / "ledger.db",
        }

    def start(self, name, *arguments, **settings):
        """A command in a process of its own."""
        env = environment(**({"TMPDIR": self.folder} | self.settings | settings))
        return Process(self.folder, name, "runpod", *arguments, env=env)

    def is_tidy(self):
        """Whether nothing temporary is left beside the output."""
        return not list(self.folder.glob(".*"))


@pytest.fixture
def home(tmp_path, cloud):
    """A clean place."""
    return Home(tmp_path, cloud)


@pytest.fixture
def i2v(home, monkeypatch, capsys):
    """Runs `i2v runpod …` within this process, which spares the start of one."""
    monkeypatch.chdir(home.folder)
    monkeypatch.setattr(tempfile, "tempdir", str(home.folder))
    monkeypatch.setattr(runpod_api, "POLL_S", 0.05)
    monkeypatch.setattr(runpod_api, "MAX_PAUSE_S", 0.01)
    monkeypatch.setattr(runpod_job, "SECOND_LOOK_S", 0.05)
    monkeypatch.setattr(runpod_answer, "PATIENT", runpod_answer.PATIENT.__class__(retry_wait_s=0))

    def run(*arguments, **settings):
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["i2v", "runpod", *map(str, arguments)])
            for name, value in (home.settings | settings).items():
                patch.setenv(name, str(value))
            with pytest.raises(SystemExit) as ended:
                cli.main()
        said = capsys.readouterr()
        key = (home.settings | settings)["RUNPOD_API_KEY"]
        assert not key or key not in said.out + said.err
        return Ran(ended.value.code or 0, said.out, said.err)

    return run


def test_help_has_an_example_of_each_command():
    """And says something of every option."""
    for command in cli_runpod.app.registered_commands:
        name = command.callback.__name__
        shown = CliRunner().invoke(cli.app, ["runpod", name, "--help"], env={"COLUMNS": "200"})
        assert shown.exit_code == 0
        assert re.search(rf"Example.*: .*\bi2v runpod {name}\b", shown.output)
        for option in re.findall(r"^│ --.*$", shown.output, re.MULTILINE):
            assert re.search(r"  +[A-Z]\S+ \S+ ", option), option


# ---------------------------------------------------------------- invoke


def test_a_video_comes_back_in_the_answer(i2v, home, mp4):
    """It is written whole, described, and what is known of time and money is told."""
    made = answer(mp4, {"load": 1.5, "render": 2.25}, base64=base64.b64encode(mp4.path.read_bytes()).decode())
    with answering(home.cloud, made):
        options = ("-s", "2", "--seed", "7", "--negative", "blur", "--preset", "a14b-fast")
        ran = i2v("invoke", "photo.jpg", "pan left", "-o", "new.mp4", *options)
    assert ran.exit_code == 0, ran.err
    assert ran.out.strip() == str(home.folder / "new.mp4")
    assert (home.folder / "new.mp4").read_bytes() == mp4.path.read_bytes()
    assert "0.50 s · 64×48 · 24 fps · 12 frames" in ran.err  # noqa: RUF001
    assert "seed 7" in ran.err
    assert "load 1.5 s · render 2.2 s" in ran.err
    assert re.search(r"cost  \d+\.\d s on a GPU", ran.err)
    stages = re.findall(r"^  at ep1: (.+)$", ran.err, re.MULTILINE)
    assert stages[0] == "send"
    assert stages[-3:] == ["load", "render [/x]", "fetch"]
    [job] = home.cloud.jobs.values()
    photo = job.input.pop("photo_base64")
    assert base64.b64decode(photo) == (home.folder / "photo.jpg").read_bytes()
    wanted = {"prompt": "pan left", "negative_prompt": "blur", "seconds": 2.0, "seed": 7, "preset": "a14b-fast"}
    assert job.input == wanted
    assert job.execution_limit_s == 2 * 1800 + 600
    assert job.queue_limit_s == 1800 + job.execution_limit_s + 1800  # waiting, working, and while its answer is kept
    assert f"\n  job   {job.id}\n" in ran.err
    assert home.is_tidy()


@contextmanager
def serving(handler):
    """The origin of a server."""
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@contextmanager
def served(content):
    """A URL of these bytes, once they are asked for; the second time, for the first answer is cut short."""

    class Handler(BaseHTTPRequestHandler):
        answers = 0

        def do_GET(self):
            Handler.answers += 1
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: -1 if Handler.answers == 1 else None])

        def log_message(self, *_):
            """Nothing on stderr."""

    with serving(Handler) as origin:
        yield origin


def test_a_video_is_fetched_from_where_it_was_put(i2v, home, mp4):
    """From the operator's own bucket wherever that is; from other private addresses not. A cut transfer is repeated.

    What could not be fetched is paid for: the very command that was advised brings it.
    """
    with served(mp4.path.read_bytes()) as origin:
        made = answer(mp4, {}, url=f"{origin}/videos/j.mp4?X-Amz-Signature=secret")
        with answering(home.cloud, made):
            where = ("-o", "my [new] clip.mp4", "--endpoint", "ep1")
            refused = i2v("invoke", "photo.jpg", *where, RUNPOD_ENDPOINT_ID="other")
        assert (refused.exit_code, len(refused.errors)) == (1, 1)
        assert "not a public address" in refused.err
        assert not (home.folder / "my [new] clip.mp4").exists()
        ran = i2v(*refused.advice, RUNPOD_ENDPOINT_ID="other", BUCKET_ENDPOINT_URL=origin)
    assert ran.exit_code == 0, ran.err
    assert (home.folder / "my [new] clip.mp4").read_bytes() == mp4.path.read_bytes()
    assert "secret" not in refused.err + ran.err
    assert home.is_tidy()


def test_a_video_that_cannot_be_put_where_it_belongs_is_not_lost(i2v, home, mp4):
    """One line, and the command that has it."""

    def make(_):
        (home.folder / "out.mp4").mkdir()
        return answer(mp4, {}, base64=base64.b64encode(mp4.path.read_bytes()).decode())

    with answering(home.cloud, make):
        ran = i2v("invoke", "photo.jpg")
    assert (ran.exit_code, len(ran.errors), "out.mp4 cannot be written" in ran.errors[0]) == (1, 1, True), ran.err
    (home.folder / "out.mp4").rmdir()
    assert i2v(*ran.advice).exit_code == 0
    assert (home.folder / "out.mp4").read_bytes() == mp4.path.read_bytes()


def test_a_photo_at_a_url_is_left_to_the_worker(i2v, home, mp4):
    """Nothing is fetched here."""
    made = answer(mp4, {}, base64=base64.b64encode(mp4.path.read_bytes()).decode())
    with answering(home.cloud, made):
        assert i2v("invoke", "https://photos.example/1.jpg").exit_code == 0
    [job] = home.cloud.jobs.values()
    assert job.input == {"photo_url": "https://photos.example/1.jpg", "prompt": "", "seconds": 5.0}


def test_a_photo_too_large_for_a_request_is_made_smaller(i2v, home):
    """It says so; the worker gets a photo of the same shape."""
    noise = np.random.default_rng(1).integers(0, 255, (1500, 1700, 3), np.uint8)
    Image.fromarray(noise).save(home.folder / "large.png", compress_level=0)
    seen = []

    def look(asked):
        seen.append(Image.open(BytesIO(base64.b64decode(asked["photo_base64"]))).size)
        return failure("seen", retryable=False)

    with answering(home.cloud, look):
        ran = i2v("invoke", "large.png")
    assert re.search(r"The photo \(1700x1500, 7\.7 MB\) is larger than a request may be: sent as a JPEG of", ran.err)
    [(width, height)] = seen
    assert width / height == pytest.approx(1700 / 1500, rel=0.01)


@pytest.mark.parametrize(
    "arguments, exit_code, said",
    [
        (("garbage.jpg",), 1, "not a JPEG, PNG, WebP or HEIC"),
        (("nowhere.jpg",), 2, "there is no file 'nowhere.jpg'"),
        ((".",), 2, "'.' is a folder"),
        (("photo.jpg", "-o", "out.avi"), 1, "has to end in .mp4"),
        (("photo.jpg", "x" * 5000), 1, "prompt: "),
        (("photo.jpg", "--preset", "a14b-slow"), 1, "there is no preset 'a14b-slow'; choose one of preview, "),
        (("photo.jpg", "--preset", "tiny", "-s", "60"), 1, "--seconds is 60"),
        (("https://",), 1, "photo_url: "),
    ],
)
def test_what_cannot_be_asked_for_starts_no_gpu(i2v, home, arguments, exit_code, said):
    """One line, and no job."""
    (home.folder / "garbage.jpg").write_bytes(b"<html>")
    ran = i2v("invoke", *arguments)
    assert (ran.exit_code, said in ran.err) == (exit_code, True), ran.err
    assert len(ran.errors) == (1 if exit_code == 1 else 0)
    assert home.cloud.asked == []


@pytest.mark.parametrize(
    "made, said",
    [
        (failure("the photo is 3x3 pixels", retryable=False), "failed: the photo is 3x3 pixels; trying again will not"),
        (failure("the GPU is gone", retryable=True), "failed: the GPU is gone; trying again can help"),
        ({"error": json.dumps({"error_type": "E", "error_message": "boom"})}, "failed: boom"),
        ({"text": "I am a language model"}, "brought no video"),
        ({"video": {"base64": "%%%"}}, "is not base64"),
        ({"video": {"base64": base64.b64encode(b"<html>").decode()}}, "not a video"),
    ],
)
def test_a_job_that_brings_no_video_is_an_error(i2v, home, made, said):
    """One line, that says whether trying again can help; nothing is left behind."""
    with answering(home.cloud, made):
        ran = i2v("invoke", "photo.jpg")
    assert (ran.exit_code, len(ran.errors), said in ran.err) == (1, 1, True), ran.err
    assert "RunPod keeps its answer" not in ran.err, "it would bring the same again"
    assert not (home.folder / "out.mp4").exists()
    assert home.is_tidy()


@pytest.mark.parametrize(
    "refused, is_kept",
    [
        ((404, ""), False),
        ((403, "<Code>AccessDenied</Code><Message>Request has expired</Message>"), False),
        ((403, "<Code>SignatureDoesNotMatch</Code>"), False),
        ((503, ""), True),
    ],
)
def test_an_answer_that_stays_the_same_is_not_advised(i2v, home, mp4, refused, is_kept):
    """A URL that leads nowhere does so for ever; a bucket that is away comes back."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(refused[0])
            self.end_headers()
            self.wfile.write(refused[1].encode())

        def log_message(self, *_):
            """Nothing on stderr."""

    with serving(Handler) as origin, answering(home.cloud, answer(mp4, {}, url=f"{origin}/j.mp4")):
        ran = i2v("invoke", "photo.jpg", BUCKET_ENDPOINT_URL=origin)
    assert (ran.exit_code, len(ran.errors), str(refused[0]) in ran.errors[0]) == (1, 1, True), ran.err
    assert ("RunPod keeps its answer" in ran.err) == is_kept
    assert ("fetching its answer again would bring the same" in ran.err) != is_kept
    assert "{" not in ran.err, "log lines are for -v"


def test_a_network_that_is_away_is_told_in_words(i2v, home, mp4):
    """And in log lines to whoever asks for them."""
    made = answer(mp4, {}, base64=base64.b64encode(mp4.path.read_bytes()).decode())
    for options in ((), ("-v",)):
        home.cloud.faults["status"] += [DOWN] * runpod_api.TRIES
        with answering(home.cloud, made):
            ran = i2v("invoke", "photo.jpg", *options)
        assert ran.exit_code == 0, ran.err
        assert "  at ep1: RunPod does not answer\n" in ran.err
        assert ("look_lost" in ran.err) == bool(options)


def test_a_job_that_others_end_is_an_error(i2v, home):
    """Cancelled in the console, or given up by RunPod."""
    home.cloud.faults["status"] += [(200, False)] * 2  # answers that say nothing: looks that were lost

    def cancel(status):
        until(lambda: home.cloud.jobs, 20, "the job is there")
        with home.cloud._changed:
            home.cloud._end(home.cloud._find(list(home.cloud.jobs)[-1]), status)

    for status, said in (("CANCELLED", "cancelled at RunPod"), ("TIMED_OUT", "trying again can help")):
        thread = threading.Thread(target=cancel, args=(status,))
        home.cloud._jobs.clear()
        thread.start()
        ran = i2v("invoke", "photo.jpg")
        thread.join()
        assert (ran.exit_code, said in ran.err) == (1, True), ran.err


def test_a_job_that_no_worker_takes_is_cancelled(i2v, home):
    """After --wait, and saying what it waited for."""
    home.cloud.workers = {"throttled": 2}
    ran = i2v("invoke", "photo.jpg", "--wait", "0.01")
    assert (ran.exit_code, len(ran.errors)) == (1, 1)
    assert "within the 0.01 minutes of --wait" in ran.errors[0]
    [job] = home.cloud.jobs.values()
    assert job.status == "CANCELLED"
    assert f"Job {job.id} was cancelled" in ran.err


def test_a_lost_answer_to_a_new_job_is_told(i2v, home):
    """It is not sent again: two GPUs would be paid for."""
    home.cloud.faults["run"].append(LOST)
    ran = i2v("invoke", "photo.jpg")
    assert (ran.exit_code, len(ran.errors), len(home.cloud.jobs)) == (1, 1, 1)
    assert "whether the job was taken is not known" in ran.errors[0]


@pytest.mark.parametrize("call", ["run", "health"])
@pytest.mark.parametrize(
    "settings, said",
    [
        ({"RUNPOD_API_KEY": "rpa_wrong"}, "does not accept the key; set RUNPOD_API_KEY"),
        ({"RUNPOD_ENDPOINT_ID": "ep2"}, "no endpoint ep2; set RUNPOD_ENDPOINT_ID"),
        ({"RUNPOD_API_KEY": ""}, "RUNPOD_API_KEY is not set"),
        ({"RUNPOD_ENDPOINT_BASE_URL": "http://api.runpod.ai/v2"}, "must be https"),
    ],
)
def test_what_is_missing_is_said_in_one_line(i2v, call, settings, said):
    """By the name of the setting."""
    ran = i2v(*(("invoke", "photo.jpg") if call == "run" else ("health",)), **settings)
    assert (ran.exit_code, len(ran.errors), said in ran.err) == (1, 1, True), ran.err


def test_an_interrupted_invocation_cancels_its_job(home):
    """Ctrl-C, and what it did is told."""
    process = home.start("interrupted", "invoke", "photo.jpg")
    until(lambda: home.cloud.asked.count("status"), 30, "the job is watched")
    process.send(signal.SIGINT)
    assert process.wait() == 130
    [job] = home.cloud.jobs.values()
    assert job.status == "CANCELLED"
    assert f"Job {job.id} was cancelled at RunPod." in process.stderr.read_text()
    assert home.is_tidy()


def test_who_interrupts_twice_hears_that_a_gpu_may_be_at_work(home):
    """The answer to the new job does not come. While it is waited for, that is said, so that one Ctrl-C is enough."""
    home.cloud.faults["run"].append(HANG)
    process = home.start("interrupted", "invoke", "photo.jpg")
    until(lambda: home.cloud.asked.count("run"), 30, "the job is sent")
    process.send(signal.SIGINT)
    until(lambda: "Waiting up to 5 s for RunPod's answer" in process.stderr.read_text(), 4, "it says that it waits")
    process.send(signal.SIGINT)
    assert process.wait(4) == 130
    assert "Whether RunPod took the job is not known" in process.stderr.read_text()
    assert home.is_tidy()


def test_who_interrupts_a_cancellation_hears_that_it_is_in_doubt(home):
    """The job may go on for as long as nobody looks."""
    home.cloud.faults["cancel"].append(HANG)
    process = home.start("interrupted", "invoke", "photo.jpg")
    until(lambda: home.cloud.asked.count("status"), 30, "the job is watched")
    process.send(signal.SIGINT)
    until(lambda: home.cloud.asked.count("cancel"), 10, "it is being cancelled")
    process.send(signal.SIGINT)
    assert process.wait(8) == 130
    [job] = home.cloud.jobs.values()
    assert job.status == "IN_QUEUE"
    told = process.stderr.read_text()
    assert f"Whether job {job.id} was cancelled is not known: look at console.runpod.io." in told
    assert "could not be cancelled" not in told
    assert "Waiting up to" not in told, "the job was sent long before"


class SlowRunPod:
    """A transport that takes its time with a new job, and has an answer of its own to whoever cancels it."""

    def __init__(self, takes_s, cancel=(200, "CANCELLED"), cancel_takes_s=0):
        self.takes_s, self.cancel, self.cancel_takes_s = takes_s, cancel, cancel_takes_s
        self.asked = []

    async def __call__(self, request):
        self.asked.append(request.url.path.split("/")[3])
        if self.asked[-1] == "run":
            await anyio.sleep(self.takes_s)
        if self.asked[-1] == "cancel":
            await anyio.sleep(self.cancel_takes_s)
        status, said = self.cancel if self.asked[-1] == "cancel" else (200, "IN_QUEUE")
        return httpx.Response(status, json={"id": "j1", "status": said})


@pytest.mark.parametrize("refusal, said", [(401, "does not accept the key"), (500, "whether the job was taken is not")])
def test_an_error_has_the_only_word_where_nobody_interrupts(refusal, said, capsys):
    """It knows whether the job was taken."""

    @virtual_time
    async def scene():
        with pytest.raises(ExceptionGroup) as caught:
            await invoked(lambda _: httpx.Response(refusal))
        assert said in str(caught.value.exceptions[0])

    scene()
    assert capsys.readouterr().err == ""


async def invoked(server):
    """One invocation through a transport."""
    api = RunPodApi("k", "https://api.example/v2", "ep1", transport=httpx.MockTransport(server))
    again = "i2v runpod fetch {} -o out.mp4".format
    return await runpod_job.invoked(api, Settings.isolated(), {}, lambda _: None, again, say=terminal.say, wait_s=60)


@pytest.mark.parametrize(
    "server, said",
    [
        (SlowRunPod(3), "Job j1 was cancelled at RunPod."),
        (SlowRunPod(3, cancel=(401, "")), "Job j1 could not be cancelled and may go on"),
        (SlowRunPod(3, cancel=(404, "")), "Job j1 could not be cancelled and may go on (RunPod does not know it)"),
        (SlowRunPod(3, cancel_takes_s=100), "Job j1 could not be cancelled and may go on (no answer within 10 s)"),
        (SlowRunPod(3, cancel=(200, "COMPLETED")), "for 30 minutes: i2v runpod fetch j1 -o out.mp4"),
        (SlowRunPod(100), "Whether RunPod took the job is not known"),
    ],
)
def test_who_is_interrupted_while_a_job_is_sent_hears_what_became_of_it(server, said, capsys):
    """The answer is waited for a little, since nobody else could cancel the job."""

    @virtual_time
    async def scene():
        with anyio.move_on_after(1):
            await invoked(server)
        limit_s = runpod_job.CANCEL_S if server.cancel_takes_s else 0
        assert anyio.current_time() <= 1 + runpod_job.GRACE_S + limit_s

    scene()
    told = capsys.readouterr().err
    assert said in told
    assert told.startswith("Waiting up to 5 s for RunPod's answer, to cancel the job …\n")
    assert ("not known" in told) == (server.takes_s > runpod_job.GRACE_S)
    assert ("cancel" in server.asked) == ("j1" in said)


class Turning:
    """A transport on which a job's status is one thing for ten seconds, and then another: a status, or an error."""

    def __init__(self, first, then):
        self.first, self.then = first, then
        self.asked = []

    async def __call__(self, request):
        self.asked.append(request.url.path.split("/")[3])
        said = (self.then if anyio.current_time() > 10 else self.first) if self.asked[-1] == "status" else "IN_QUEUE"
        if isinstance(said, Exception):
            raise said
        status = said if isinstance(said, int) else 200
        return httpx.Response(status, json={"id": "j1", "status": said} if status == 200 else {})


class LastMoment(Turning):
    """A job that a worker takes when its wait is over, between the last look at it and what comes of that."""

    def __init__(self):
        super().__init__("IN_QUEUE", "IN_QUEUE")
        self.looked_at = -1.0

    async def __call__(self, request):
        now = anyio.current_time()
        if request.url.path.split("/")[3] == "status":
            self.first = self.then = "IN_PROGRESS" if now == self.looked_at else "IN_QUEUE"
            self.looked_at = now
        return await super().__call__(request)


@pytest.mark.parametrize(
    "server",
    [Turning(status, then) for status in ("IN_QUEUE", "IN_PROGRESS") for then in (httpx.ConnectError("no"), 503, 401)]
    + [Turning("IN_PROGRESS", 404), LastMoment()],
)
def test_a_job_that_may_be_made_is_left_to_be_made(server, capsys):
    """Whatever keeps RunPod from telling how it is: it is paid for, and can be fetched."""

    @virtual_time
    async def scene():
        with pytest.raises(I2VError) as caught:
            await invoked(server)
        assert "any more" not in str(caught.value), "the lines beside it say that it may be known again"

    scene()
    told = capsys.readouterr().err
    assert "Job j1 was not cancelled and may go on." in told
    assert "Waiting up to" not in told
    assert "30 minutes: i2v runpod fetch j1 -o out.mp4\n" in told
    assert "cancel" not in server.asked


def test_a_job_that_still_waits_is_cancelled_when_it_is_given_up(capsys):
    """Nothing is lost with it, even where RunPod was away and could say so only now."""
    server = Turning("IN_QUEUE", "IN_QUEUE")

    @virtual_time
    async def scene():
        with pytest.raises(I2VError, match="no worker took job j1"):
            await invoked(server)

    scene()
    assert "Job j1 was cancelled at RunPod." in capsys.readouterr().err


# ---------------------------------------------------------------- fetch


def test_the_video_of_an_invocation_that_was_killed_is_fetched(i2v, home, mp4):
    """By the id that it told at once, while the job is still at work. It ends as the invocation would have."""
    killed = threading.Event()

    def make(_):
        assert killed.wait(20)
        looks = home.cloud.asked.count("status")
        until(lambda: home.cloud.asked.count("status") > looks, 20, "somebody looked")
        return answer(mp4, {"load": 1.5}, base64=base64.b64encode(mp4.path.read_bytes()).decode())

    with answering(home.cloud, make):
        process = home.start("killed", "invoke", "photo.jpg")
        told = until(lambda: re.search(r"^  job   (\S+)$", process.stderr.read_text(), re.MULTILINE), 30, "its id")
        process.kill()
        killed.set()
        ran = i2v("fetch", told[1], "-o", "late.mp4")
    assert ran.exit_code == 0, ran.err
    assert ran.out.strip() == str(home.folder / "late.mp4")
    assert (home.folder / "late.mp4").read_bytes() == mp4.path.read_bytes()
    assert "12 frames" in ran.err
    assert "seed 7" in ran.err
    assert "load 1.5 s" in ran.err
    assert re.search(r"cost  \d+\.\d s on a GPU", ran.err)
    assert "cancel" not in home.cloud.asked
    looks = home.cloud.asked.count("status")
    assert i2v("fetch", told[1]).exit_code == 0
    assert home.cloud.asked.count("status") == looks + 1, "what has ended is asked for once: it is some megabytes"


def test_an_interrupted_fetch_leaves_the_job_as_it_is(home):
    """Somebody waits for it, or will."""
    job_id = home.cloud.run({"prompt": ""})
    process = home.start("interrupted", "fetch", job_id)
    until(lambda: home.cloud.asked.count("status") > 1, 30, "the job is watched")
    process.send(signal.SIGINT)
    assert process.wait() == 130
    assert f"Job {job_id} goes on at RunPod: the same command may be run again." in process.stderr.read_text()
    assert home.cloud.job(job_id).status == "IN_QUEUE"
    assert "cancel" not in home.cloud.asked
    assert home.is_tidy()


def test_a_fetch_that_was_interrupted_before_it_knew_says_no_more(home):
    """There may be no such job, and it may have ended."""
    home.cloud.faults["status"].append(HANG)
    process = home.start("interrupted", "fetch", "abc")
    until(lambda: home.cloud.asked.count("status"), 30, "it is asked for")
    process.send(signal.SIGINT)
    assert process.wait() == 130
    told = process.stderr.read_text()
    assert "Job abc was left as it is: the same command may be run again." in told
    assert "goes on" not in told


def test_who_is_interrupted_while_a_video_comes_hears_where_it_is(home, mp4):
    """It is made and paid for."""
    asked, over = threading.Event(), threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.set()
            over.wait(30)

        def log_message(self, *_):
            """Nothing on stderr."""

    with serving(Handler) as origin:
        with answering(home.cloud, answer(mp4, {}, url=f"{origin}/j.mp4")):
            process = home.start("interrupted", "invoke", "photo.jpg", BUCKET_ENDPOINT_URL=origin)
            assert asked.wait(30)
            process.send(signal.SIGINT)
            assert process.wait() == 130
        over.set()
    [job_id] = home.cloud.jobs
    assert Ran(130, "", process.stderr.read_text()).advice == ["fetch", job_id, "-o", str(home.folder / "out.mp4")]
    assert home.is_tidy()


@pytest.mark.parametrize("job_id", ["", " ", "a b", "../health", "status/j1", "..", "j1?x", "j1\n", "jé"])
def test_what_is_no_id_is_not_asked_for(i2v, home, job_id):
    """It would be part of a URL's path."""
    ran = i2v("fetch", job_id)
    assert (ran.exit_code, "has to be the id of a job" in ran.err) == (2, True), ran.err
    assert home.cloud.asked == []


def test_an_unknown_job_is_not_waited_for(i2v, home, mp4):
    """Two looks; the second is for a job that was sent a moment ago."""
    ran = i2v("fetch", "j1")
    assert (ran.exit_code, len(ran.errors)) == (1, 1), ran.err
    assert "does not know job j1 at endpoint ep1: it keeps answers for 30 minutes" in ran.errors[0]
    assert "again" not in ran.err
    assert home.cloud.asked == ["status"] * 2
    job_id = home.cloud.run({"prompt": ""})
    home.cloud.faults["status"].append((404, False))
    with answering(home.cloud, answer(mp4, {}, base64=base64.b64encode(mp4.path.read_bytes()).decode())):
        assert i2v("fetch", job_id).exit_code == 0


@pytest.mark.parametrize("server", [Turning(503, 503), Turning("IN_QUEUE", 503), Turning("IN_PROGRESS", 404)])
def test_a_fetch_that_gives_up_says_that_the_job_need_not(server, capsys):
    """RunPod is away, from the beginning or later; or its API does not find the job any more, which may pass."""

    @virtual_time
    async def scene():
        api = RunPodApi("k", "https://api.example/v2", "ep1", transport=httpx.MockTransport(server))
        with pytest.raises(I2VError):
            await runpod_job.taken_up(
                api, Settings.isolated(runpod_endpoint_id="ep1"), "j1", lambda _: None, terminal.say
            )

    scene()
    told = "Job j1 was not cancelled: while RunPod has it, the same command may be run again.\n"
    assert told in capsys.readouterr().err
    assert set(server.asked) <= {"status", "health"}


@virtual_time
async def test_a_fetch_waits_for_as_long_as_the_job_does(monkeypatch):
    """Whoever sent it has said for how long that may be."""
    monkeypatch.setattr(runpod_api, "POLL_S", 600)
    server = Turning("IN_QUEUE", "IN_QUEUE")
    api = RunPodApi("k", "https://api.example/v2", "ep1", transport=httpx.MockTransport(server))
    settings = Settings.isolated(runpod_endpoint_id="ep1")
    with anyio.move_on_after(86_400) as scope:
        await runpod_job.taken_up(api, settings, "j1", lambda _: None, terminal.say)
    assert scope.cancelled_caught
    assert set(server.asked) == {"status", "health"}


@pytest.mark.parametrize(
    "status, said", [("CANCELLED", "was cancelled at RunPod\n"), ("TIMED_OUT", "trying again can help")]
)
def test_a_job_that_ended_badly_is_told_as_by_invoke(i2v, home, status, said):
    """It is no news to RunPod, and nothing is waited for."""
    job_id = home.cloud.run({"prompt": ""})
    with home.cloud._changed:
        home.cloud._end(home.cloud._find(job_id), status)
    ran = i2v("fetch", job_id)
    assert (ran.exit_code, len(ran.errors), said in ran.err) == (1, 1, True), ran.err


def test_a_drain_has_its_videos_elsewhere(i2v, home, mp4):
    """So has a task; one that failed is told as by invoke."""
    completed = Outcome(status="completed", item_id="i1", video=mp4, storage_path="g/[i1].mp4")
    failed = Outcome(status="failed", item_id="i2", error="the photo is 3x3 pixels")
    drained = {"tasks": [answer_of(completed), answer_of(failed)], "completed": 1}
    for made, said in (
        (drained, "brought no video: it took tasks from a queue (1 of 2 completed)"),
        (answer_of(completed), "brought no video: it made task i1 of a queue, whose storage has it at g/[i1].mp4"),
        (answer_of(failed), "failed: the photo is 3x3 pixels; trying again will not help"),
    ):
        job_id = home.cloud.run({"drain": 2})
        with answering(home.cloud, made):
            ran = i2v("fetch", job_id)
        assert (ran.exit_code, len(ran.errors), said in ran.err) == (1, 1, True), ran.err
        assert not (home.folder / "out.mp4").exists()


# ---------------------------------------------------------------- health


def test_health_shows_workers_and_jobs(i2v, home):
    """In two lines, or as RunPod says it; with advice where somebody can do something."""
    home.cloud.run({"prompt": ""})
    ran = i2v("health")
    assert ran.exit_code == 0, ran.err
    workers, jobs = ran.out.splitlines()
    assert workers == "workers  0 running · 0 idle · 0 ready · 0 initializing · 0 throttled · 0 unhealthy"
    assert jobs == "jobs     0 in progress · 1 in queue · 0 completed · 0 failed · 0 retried"
    assert ran.err == ""
    home.cloud.workers = {"throttled": 2, "unhealthy": 1}
    ran = i2v("health", "--endpoint", "ep1", RUNPOD_ENDPOINT_ID="other")
    assert "RUNPOD_INIT_TIMEOUT" in ran.err
    assert "more kinds of GPU" in ran.err
    told = json.loads(i2v("health", "--json").out)
    assert (told["jobs"]["inQueue"], told["workers"]["throttled"]) == (1, 2)


# ---------------------------------------------------------------- dispatch


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A queue. Tests leave nothing in it that waits."""
    with Site(tmp_path_factory.mktemp("site")) as site:
        yield site


@pytest.fixture
def queue(site, home):
    """The same, for commands here."""
    home.settings |= {"VERCEL_API_URL": site.url, "WORKER_API_KEY": KEY, "I2V_RUNPOD_MAX_WORKERS": 1}
    yield site
    for task in site.ask("GET", "tasks", params={"limit": 200})["items"]:
        if task["status"] in ("pending", "processing"):
            site.ask("POST", f"tasks/{task['id']}/cancel")


def run_here(queue, lease):
    """What a worker does with a lease; the outcome, and how many clips were begun for it."""
    begun = []

    class Engine(PreviewEngine):
        async def generate(self, request, inputs, folder, job):
            begun.append(request)
            return await super().generate(request, inputs, folder, job)

    settings = Settings.isolated(api_url=queue.url, api_key=KEY, worker_id="endpoint")

    async def main():
        async with open_queue(settings) as connection:
            return await build_runner(settings, connection, Engine()).run(lease)

    return anyio.run(main), len(begun)


def statuses(queue, ids):
    """Of tasks, in the order given."""
    return [queue.task(item_id)["status"] for item_id in ids]


def test_tasks_go_to_the_endpoint_and_are_made_there(home, queue, tmp_path):
    """By the real handler, on the real SDK, which finds in its jobs what it needs; an invocation is answered, too."""
    worker_env = {
        "I2V_ENGINE": "preview",
        "VERCEL_API_URL": queue.url,
        "WORKER_API_KEY": KEY,
        "TEMP_DIR": str(tmp_path / "temp"),
    }
    ids = queue.submit(2)
    with home.cloud.worker(tmp_path / "worker", env=worker_env):
        settings = {"I2V_RUNPOD_MAX_WORKERS": 2, "I2V_RUNPOD_WEBHOOK": "http://127.0.0.1:9/hook"}
        invoked = home.start("invoked", "invoke", "photo.jpg", "zoom in", "-s", "0.5")
        dispatched = home.start("dispatched", "dispatch", **settings)
        assert dispatched.wait() == 0, dispatched.stderr.read_text()
        assert re.match(r"sent 2 to gpu, 0 to runway \(waiting 2, gpu [01]/4", dispatched.stdout.read_text())
        until(lambda: statuses(queue, ids) == ["completed"] * 2, LIMIT_S, "all are done")
        assert invoked.wait() == 0, invoked.stderr.read_text()
        jobs = [job for job in home.cloud.jobs.values() if "task" in job.input]
        for job in jobs:
            home.cloud.wait(job.id)
        fetched = home.start("fetched", "fetch", jobs[0].id)
        assert fetched.wait() == 1
        assert f"it made task {ids[0]} of a queue" in fetched.stderr.read_text()
    assert probe(home.folder / "out.mp4").duration_s == pytest.approx(0.5, abs=0.1)
    assert [job.input["task"]["item_id"] for job in jobs] == ids
    assert jobs[0].top["webhook"] == "http://127.0.0.1:9/hook"
    assert jobs[0].execution_limit_s == 2 * 1800 + 600


def test_an_endpoint_that_cannot_work_is_found_out(i2v, home, queue, tmp_path):
    """Its workers have no queue: the next tick says so, and no more is sent until one job shows that it is mended."""
    ids = queue.submit(4)
    with home.cloud.worker(tmp_path / "worker", env={"I2V_ENGINE": "preview", "TEMP_DIR": str(tmp_path / "temp")}):
        assert i2v("dispatch", I2V_RUNPOD_MAX_WORKERS=2).out.startswith("sent 4 to gpu")
        for job_id in home.cloud.jobs:
            home.cloud.wait(job_id)
    queue.submit(1)
    ran = i2v("dispatch", I2V_RUNPOD_MAX_WORKERS=2)
    assert (ran.exit_code, len(ran.errors), len(home.cloud.jobs)) == (1, 1, 4), ran.err
    assert "4 failed there since the last tick" in ran.errors[0]
    assert "VERCEL_API_URL is not set on this endpoint" in ran.errors[0]
    ran = i2v("dispatch", I2V_RUNPOD_MAX_WORKERS=2)
    assert (ran.exit_code, "gpu is failing" in ran.errors[0], len(home.cloud.jobs)) == (1, True, 4), ran.err
    assert [queue.task(item_id)["crash_count"] for item_id in ids] == [0] * 4


def test_a_full_endpoint_is_sent_nothing(i2v, home, queue):
    """Nothing is leased, and nothing is wrong."""
    ids = queue.submit(1)
    for _ in range(2):
        home.cloud.run({"prompt": ""})
    ran = i2v("dispatch")
    assert (ran.exit_code, ran.errors) == (0, [])
    assert ran.out.startswith("sent 0 to gpu")
    assert "gpu 2/2" in ran.out
    assert statuses(queue, ids) == ["pending"]


def test_leases_that_cannot_be_sent_go_back(i2v, home, queue):
    """RunPod refuses, is down, or does not know us: the tasks wait for the next tick, which sends them."""
    ids = queue.submit(2)
    home.cloud.faults["run"] += [DOWN]
    ran = i2v("dispatch")
    assert (ran.exit_code, len(ran.errors), "503" in ran.errors[0]) == (1, 1, True), ran.err
    assert "handed back 1" in ran.errors[0]
    assert (ran.out, len(ran.err.splitlines())) == ("", 1), "once: cron mails whatever is said"
    home.cloud.faults["health"] += [DOWN] * 4
    assert (i2v("dispatch").exit_code, statuses(queue, ids)) == (1, ["pending"] * 2)
    ran = i2v("dispatch", RUNPOD_API_KEY="rpa_wrong")
    assert (ran.exit_code, "RUNPOD_API_KEY" in ran.errors[0]) == (1, True)
    assert (statuses(queue, ids), home.cloud.jobs) == (["pending"] * 2, {})
    ran = i2v("dispatch")
    assert (ran.exit_code, ran.out.startswith("sent 2 to gpu")) == (0, True), ran.err
    assert statuses(queue, ids) == ["processing"] * 2


def test_a_job_whose_answer_was_lost_makes_no_second_clip(i2v, home, queue, monkeypatch):
    """The lease was handed back; the worker that got the job all the same finds that out before it generates."""
    monkeypatch.setattr(LifeIsShortQueue, "CONFIRM_AFTER_S", 0)
    [item_id] = queue.submit(1)
    home.cloud.faults["run"].append(LOST)
    assert i2v("dispatch").exit_code == 1
    assert statuses(queue, [item_id]) == ["pending"]
    assert i2v("dispatch").exit_code == 0
    lost, sent = [Lease.model_validate(job.input) for job in home.cloud.jobs.values()]
    assert (lost.task.item_id, lost.worker_id == sent.worker_id) == (item_id, False)
    outcome, begun = run_here(queue, lost)
    assert (outcome.status, begun) == ("lease_lost", 0)
    outcome, begun = run_here(queue, sent)
    assert (outcome.status, begun) == ("completed", 1)


def test_two_that_dispatch_at_once_send_nothing_twice(i2v, home, queue):
    """On two machines each task goes to one of them; on one, the second does nothing."""
    ids = queue.submit(4)
    settings = {"I2V_RUNPOD_MAX_WORKERS": 2}
    both = [home.start(name, "dispatch", I2V_LEDGER=home.folder / name / "ledger.db", **settings) for name in "ab"]
    assert [process.wait() for process in both] == [0, 0]
    assert sorted(job.input["task"]["item_id"] for job in home.cloud.jobs.values()) == sorted(ids)
    given = Settings.isolated(ledger_path=home.settings["I2V_LEDGER"], runpod_endpoint_id="ep1")
    with runpod_tick.alone(given) as is_alone:
        assert is_alone
        ran = i2v("dispatch")
    assert (ran.exit_code, ran.out, "nothing to do" in ran.err) == (0, "", True)


def test_tasks_for_runway_are_left_to_others_where_there_is_a_key(i2v, queue):
    """`i2v work --engine runway` takes them. Without a key they are made by the endpoint, as on Modal."""
    form = {"prompt": "zoom in", "seconds": "5", "inference_provider": "gen4_turbo"}
    data = queue.ask("POST", "tasks", data=form, files={"photo": ("photo.jpg", jpeg())})
    [for_runway] = [item["id"] for item in data["items"]]
    [for_gpu] = queue.submit(1)
    for lanes in ("true", "false"):
        assert i2v("dispatch", RUNWAYML_API_SECRET="key_x", I2V_QUEUE_LANES=lanes).exit_code == 0
        assert statuses(queue, [for_runway, for_gpu]) == ["pending", "processing"]
    assert i2v("dispatch").out.startswith("sent 1 to gpu")
    assert statuses(queue, [for_runway]) == ["processing"]


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"VERCEL_API_URL": ""}, "VERCEL_API_URL or NEXT_API_URL is not set"),
        ({"WORKER_API_KEY": "wrong"}, "401"),
        ({"VERCEL_API_URL": "http://127.0.0.1:9"}, "127.0.0.1"),
        ({"I2V_LEDGER": "/proc/ledger.db"}, "/proc"),
    ],
)
@pytest.mark.usefixtures("queue")
def test_a_tick_that_cannot_be_says_why(i2v, settings, said):
    """One line, exit code 1."""
    ran = i2v("dispatch", **settings)
    assert (ran.exit_code, len(ran.errors), said in ran.errors[0]) == (1, 1, True), ran.err
