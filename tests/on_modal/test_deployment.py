"""Modal, with the real command line and real containers, and no account: what `tests/cloud` stands in for.

`modal deploy app.py` runs as a user runs it, from a copy of the files that a clone has. The cron is fired, containers
are processes of an interpreter that does not have this project, the queue is an `i2v serve`, Runway is a server of
ours on loopback. Weights are those of the `tiny` preset, on the CPU.
"""

import base64
import difflib
import json
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import anyio
import httpx
import psycopg
import pytest

from inference.build.queues import migrate_jobs
from inference.media.video import probe
from inference.on_modal import bake
from inference.payments.ledger import Ledger, Payment
from inference.payments.records import MemoryRecords
from inference.settings import Settings
from tests.cloud import golden
from tests.cloud.cloud import Cloud
from tests.cloud.containers import Container
from tests.support import postgres
from tests.support.processes import KEY, Site, jpeg, until
from tests.support.runway_server import REPLY_LOST, RunwayServer
from tests.support.s3_server import S3Server

ROOT = Path(__file__).parents[2]
APP = "serverless-i2v"
GOLDEN = ROOT / "tests" / "golden" / "modal.txt"
FILES = ("app.py", "pyproject.toml", "README.md", "inference", "images")
PATIENCE_S = 90  # for a container that imports torch on a busy machine

IDLE_S = 5.0

pytestmark = pytest.mark.timeout(240)


@dataclass
class Fleet:
    """A deployed app, the queue it serves, and the Runway it may pay."""

    cloud: Cloud
    site: Site
    runway: RunwayServer
    source: Path

    def tick(self) -> str:
        """One cron tick; what it decided."""
        call = self.cloud.fire("dispatch")
        until(lambda: call.has_ended, 30, "the tick has ended")
        return call.value

    def until_done(self) -> None:
        """Until no call waits or runs."""
        self.cloud.until_idle(PATIENCE_S)

    def statuses(self, ids: list[str]) -> list[str]:
        """Of tasks, in the order given."""
        return [self.site.task(item_id)["status"] for item_id in ids]

    def payments(self) -> list[Payment]:
        """What the ledger on Modal says, oldest first."""
        records = MemoryRecords(self.cloud.entries(f"{APP}-records"))
        return anyio.run(Ledger(records).payments)

    def until_stage(self, stage: str, container: Container | None = None) -> Container:
        """Until a container is at a stage of some task; that container."""

        def there() -> Container | None:
            candidates = [container] if container else self.cloud.containers()
            return next((it for it in candidates if f'"stage": "{stage}"' in it.logs()), None)

        return until(there, PATIENCE_S, f"a container is at {stage}")

    def status(self, forget: str = "") -> str:
        """What `modal run app.py::status` shows, without the command; or why it shows nothing."""
        call = self.cloud.spawn("look", forget)
        until(lambda: call.has_ended, 30, "the fleet was looked at")
        return call.value["error"] if isinstance(call.value, dict) else "\n".join(call.value)

    def run(self, *arguments: str):
        """`modal run …` beside the app."""
        return self.cloud.run_cli("run", *arguments, cwd=self.source)


def copy_of_the_clone(folder: Path) -> Path:
    """What a user has, and nothing of this checkout that is not tracked."""
    folder.mkdir()
    for name in FILES:
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(path, folder / name)
    return folder


@contextmanager
def fleet(folder: Path, **settings: object) -> Iterator[Fleet]:
    """A fleet that is deployed and has nothing to do yet."""
    weights = {"I2V_WEIGHTS_DIR": str(folder / "weights"), "OMP_NUM_THREADS": "1"}
    with (
        Site(folder / "site") as site,
        RunwayServer() as runway,
        Cloud(folder / "cloud", idle_s=IDLE_S, container_env=weights) as cloud,
    ):
        source = copy_of_the_clone(folder / "clone")
        given = {
            "I2V_WAN_PRESET": "tiny",
            "I2V_MODAL_MAX_CONTAINERS": 1,
            "I2V_MODAL_LINGER": 0,
            "I2V_MODAL_STARTUP_TIMEOUT": 300,
            "I2V_RUNWAY_URL": runway.url,
            "RUNWAY_POLL_INTERVAL": 0.05,
            "HEARTBEAT_INTERVAL": 1,
        } | settings
        (source / ".env").write_text("".join(f"{name}={value}\n" for name, value in given.items()))
        keys = {"VERCEL_API_URL": site.url, "WORKER_API_KEY": KEY, "RUNWAYML_API_SECRET": runway.key}
        keys |= {"I2V_PUSH_TOKEN": str(settings["I2V_PUSH_TOKEN"])} if "I2V_PUSH_TOKEN" in settings else {}
        cloud.create_secret(APP, keys)
        deployed = cloud.deploy(source / "app.py")
        assert deployed.returncode == 0, deployed.stdout + deployed.stderr
        yield Fleet(cloud, site, runway, source)


def submit(site: Site, count: int = 1, *, provider: str | None = None, prompt: str = "zoom in", seconds: float = 0.5):
    """New tasks with a hint at a provider."""
    form = {"prompt": prompt, "seconds": str(seconds), "count": str(count)}
    if provider:
        form["inference_provider"] = provider
    data = site.ask("POST", "tasks", data=form, files={"photo": ("photo.jpg", jpeg())})
    return [item["id"] for item in data["items"]]


def download(site: Site, item_id: str, path: Path) -> Path:
    """The video of a completed task."""
    path.write_bytes(httpx.get(site.task(item_id)["video_url"], timeout=20).content)
    return path


def test_what_is_deployed_is_what_was_reviewed(tmp_path):
    """Schedule, GPU, limits, secrets, image commands and files of a deployment with default settings.

    `UPDATE_GOLDEN=1 pytest tests/on_modal -k reviewed` writes the file anew; the difference is for a person.
    """
    with Cloud(tmp_path / "cloud") as cloud:
        cloud.create_secret(APP, {"VERCEL_API_URL": "https://app.example.com", "WORKER_API_KEY": "k"})
        source = copy_of_the_clone(tmp_path / "clone")
        deployed = cloud.deploy(source / "app.py")
        assert deployed.returncode == 0, deployed.stderr
        found = golden.render(cloud)
        layers = [layer.id for layer in cloud.layers("Wan")]
        # A change of code, and one of a setting: no layer that holds weights is built again.
        with (source / "inference" / "runner.py").open("a") as file:
            file.write("\n# changed\n")
        (source / ".env").write_text("I2V_MODAL_LINGER=5\n")
        assert cloud.deploy(source / "app.py").returncode == 0
        again = [layer.id for layer in cloud.layers("Wan")]
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.parent.mkdir(exist_ok=True)
        GOLDEN.write_text(found)
    known = GOLDEN.read_text()
    assert found == known, "\n".join(difflib.unified_diff(known.splitlines(), found.splitlines(), lineterm=""))
    baked = [number for number, layer in enumerate(layers) if layer in again]
    assert "fetch_weights" in known
    assert baked == list(range(len(layers)))
    assert len(again) == len(layers) + 1  # the setting, above all the rest


def test_settings_reach_the_deployment(tmp_path):
    """GPU, region, limits, snapshots and kernels are what whoever deploys has set; keys stay out of the image."""
    with Cloud(tmp_path / "cloud") as cloud:
        cloud.create_secret("family-clips", {"VERCEL_API_URL": "https://x.example", "WORKER_API_KEY": "k"})
        source = copy_of_the_clone(tmp_path / "clone")
        given = {
            "I2V_MODAL_APP": "family-clips",
            "I2V_MODAL_GPU": "H200",
            "I2V_MODAL_REGION": "eu",
            "I2V_MODAL_MAX_CONTAINERS": 7,
            "I2V_MODAL_DRAIN": "false",
            "I2V_MODAL_LINGER": 33,
            "I2V_MODAL_SNAPSHOT": "true",
            "I2V_MODAL_CRON": "*/2 * * * *",
            "I2V_WAN_PRESET": "5b-fast",
            "I2V_WAN_COMPILE": "true",
            "HF_TOKEN": "hf_secret",
            "WORKER_API_KEY": "local-secret",
        }
        (source / ".env").write_text("".join(f"{name}={value}\n" for name, value in given.items()))
        deployed = cloud.deploy(source / "app.py")
        assert deployed.returncode == 0, deployed.stderr
        found = golden.render(cloud)
    for line in ("app family-clips", "H200", "eu", "at most 7", "33 s", "snapshot", "*/2 * * * *", "compile_kernels"):
        assert line in found, line
    assert "ENV I2V_WAN_PRESET=5b-fast" in found
    assert "hf_secret" not in found
    assert "local-secret" not in found


def test_the_steps_of_the_image_have_what_they_import(tmp_path):
    """As Modal runs them: a step gets the files of its function's package, and nothing else of ours.

    The first checks its pins before it fetches anything. The second never fails: here nothing can be compiled, since
    there are no weights, and the image gets a note that says so.
    """
    with Cloud(tmp_path / "cloud") as cloud:
        cloud.create_secret(APP, {"VERCEL_API_URL": "https://app.example.com", "WORKER_API_KEY": "k"})
        source = copy_of_the_clone(tmp_path / "clone")
        (source / ".env").write_text("I2V_WAN_PRESET=5b-fast\nI2V_WAN_AREA=399360\n")
        assert cloud.deploy(source / "app.py").returncode == 0
        fetch, compile_ = (it for it in cloud.layers("Wan") if it.function is not None)
        fetched = cloud.run_step(fetch, "5b-fast", {}, I2V_WEIGHTS_DIR=tmp_path)
        compiled = cloud.run_step(compile_, I2V_WEIGHTS_DIR=tmp_path)
        (source / ".env").write_text("I2V_WAN_PRESET=5b-fast\nI2V_WAN_COMPILE=off\n")
        assert cloud.deploy(source / "app.py").returncode == 0
        assert [it.id for it in cloud.layers("Wan") if it.function is not None] == [fetch.id]
    assert "SettingsError: 5b-fast: the image asks for {}" in fetched.stderr
    assert compiled.returncode == 0, compiled.stderr
    assert "there are no weights of 5b-fast" in (tmp_path / "compiled" / "5b-fast.failed").read_text()


@pytest.mark.parametrize(
    "script, said",
    [
        ("echo 'error: no such instruction' >&2; exit 1", "error: no such instruction"),
        ("kill -9 $$", "signal 9"),
        ("exec sleep 60", "timed out after 0.5 seconds"),
        ("exit 0", None),
    ],
)
def test_compiling_never_fails_a_deployment(tmp_path, monkeypatch, script, said):
    """Whatever becomes of the process that does it."""
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(python))
    monkeypatch.setenv("I2V_WEIGHTS_DIR", str(tmp_path))
    bake.compile_kernels("tiny", {}, "code", limit_s=0.5 if "sleep" in script else 60)
    note = tmp_path / "compiled" / "tiny.failed"
    assert note.exists() == (said is not None)
    assert said is None or said in note.read_text()


def test_a_deployment_that_cannot_work_is_refused(tmp_path):
    """A missing secret, a missing key in it and settings that contradict each other are told by name, before."""
    with Cloud(tmp_path / "cloud") as cloud:
        source = copy_of_the_clone(tmp_path / "clone")
        without = cloud.deploy(source / "app.py")
        assert without.returncode != 0
        assert APP in without.stdout + without.stderr
        cloud.create_secret(APP, {"VERCEL_API_URL": "https://app.example.com"})
        incomplete = cloud.deploy(source / "app.py")
        assert incomplete.returncode != 0
        assert "WORKER_API_KEY" in incomplete.stdout + incomplete.stderr
        (source / ".env").write_text("I2V_MODAL_CRON=every minute\nI2V_WAN_PRESET=5b-turbo\n")
        contradictory = cloud.deploy(source / "app.py")
        assert contradictory.returncode != 0
        assert "I2V_MODAL_CRON" in contradictory.stderr
        assert "non-commercial" in contradictory.stderr
        assert "Traceback" not in contradictory.stderr


def test_from_the_cron_to_the_last_report(tmp_path):
    """Two ticks at once, five tasks, two pools: everything is leased once, made, uploaded and reported."""
    with fleet(tmp_path) as it:
        for_runway = submit(it.site, 2, provider="gen4_turbo", prompt="to runway", seconds=5)
        ids = [*for_runway, *submit(it.site, 2), *submit(it.site, 1, provider="wan_local")]
        first, second = it.cloud.fire("dispatch"), it.cloud.fire("dispatch")
        it.until_done()
        assert it.statuses(ids) == ["completed"] * 5
        assert "sent 2 to gpu, 2 to runway" in first.value
        assert "sent" in second.value  # it waited for the first, and found what that had left
        assert len(it.cloud.containers("dispatch")) == 1
        assert len(it.cloud.containers("Wan")) == 1
        assert len(it.cloud.calls("Wan.run")) == 2  # the third clip was taken by the warm container itself
        assert len(it.cloud.containers("Overflow")) == 1
        assert it.runway.paid["to runway"] == 2
        assert [payment.status for payment in it.payments()] == ["delivered"] * 2
        for item_id in ids:
            assert probe(download(it.site, item_id, tmp_path / "video.mp4")).codec == "h264"
        # What a person sees of it.
        shown = it.run("app.py::status").stdout
        assert "0 of 2 slots held" in shown
        assert "3 made" in shown
        assert "$0.50 of $10.00 spent today" in shown
        it.site.close_books(tasks=5)


@pytest.mark.slow
def test_a_container_is_killed_and_the_next_one_preempted(tmp_path):
    """Modal runs the same calls again, and each task ends once.

    After a kill their leases still hold. After a preemption they were handed back, and the container that finds them
    lost takes the tasks anew.
    """
    with fleet(tmp_path) as it:
        ids = submit(it.site, 2, seconds=6)
        it.tick()
        first = it.until_stage("decode")
        it.cloud.kill(first)
        until(lambda: len(it.cloud.containers("Wan")) == 2, 10, "another container")
        second = it.until_stage("decode", it.cloud.containers("Wan")[1])
        assert second.logs().count("lease_lost") == 0
        it.cloud.preempt(second)
        assert it.cloud.until_gone(second) == 0
        assert second.logs().count('"status": "released"') == 2
        it.until_done()
        assert it.statuses(ids) == ["completed"] * 2
        assert len(it.cloud.containers("Wan")) == 3
        assert len(it.cloud.calls("Wan.run")) == 2  # the same calls all along
        it.site.close_books(tasks=2)


@pytest.mark.slow
def test_weights_that_are_missing_fail_no_task(tmp_path):
    """Tasks are handed back, the tick and `status` say what is wrong, no container is started again for nothing.

    The next tick finds the pool failing, and sends to Runway what may go there.
    """
    with fleet(tmp_path, I2V_WAN_PRESET="a14b-fast") as it:
        ids = submit(it.site, 2, seconds=5)
        it.tick()
        it.until_done()
        assert it.statuses(ids) == ["pending", "pending"]
        stays = submit(it.site, 1, provider="wan_local")
        decision = it.tick()
        assert "failing: the engine could not be loaded: there are no weights of a14b-fast" in decision
        assert "sent 0 to gpu, 2 to runway" in decision
        it.until_done()
        assert it.statuses(ids) == ["completed", "completed"]
        assert it.statuses(stays) == ["pending"]  # wan_local never leaves the GPU pool unless allowed
        assert len(it.cloud.containers("Wan")) == 1
        assert it.runway.paid.total() == 2
        assert "FAILING" in it.status()


@pytest.mark.slow
def test_trouble_on_the_way_to_runway(tmp_path):
    """A queue that is down, a spawn that is refused, a container preempted after it has paid: it is paid once."""
    with fleet(tmp_path) as it:
        [item_id] = submit(it.site, provider="gen4_turbo", seconds=5)
        it.site.server.kill()
        assert "sent 0 to gpu, 0 to runway" in it.tick()
        it.site.start_server()
        it.cloud.refuse_spawns("Overflow", 1)
        assert "sent 0 to gpu, 0 to runway" in it.tick()
        until(lambda: it.statuses([item_id]) == ["pending"], 10, "the task is free")
        it.runway.hold()
        assert "1 to runway" in it.tick()
        it.runway.wait_for(lambda runway: runway.asked("poll") > 1, PATIENCE_S)
        [container] = it.cloud.containers("Overflow")
        it.cloud.preempt(container)
        assert it.cloud.until_gone(container) == 0
        it.until_done()
        assert it.statuses([item_id]) == ["pending"]  # handed back; the call that came again found that out
        it.runway.release()
        it.tick()
        it.until_done()
        assert it.statuses([item_id]) == ["completed"]
        assert it.runway.paid.total() == 1
        assert [(payment.status, payment.cost_usd) for payment in it.payments()] == [("delivered", 0.25)]


@pytest.mark.slow
def test_a_lost_reply_of_a_paid_request_is_paid_once(tmp_path):
    """Runway made the task and its answer was lost: it is not asked again until a person has looked."""
    with fleet(tmp_path) as it:
        it.runway.faults["create"].append(REPLY_LOST)
        [item_id] = submit(it.site, provider="gen4_turbo", seconds=5)
        it.tick()
        it.until_done()
        assert it.statuses([item_id]) == ["failed"]
        assert it.site.task(item_id)["error_message"].startswith("Runway: ")
        it.site.ask("POST", f"tasks/{item_id}/retry")
        it.tick()
        it.until_done()
        assert it.statuses([item_id]) == ["failed"]
        assert it.runway.paid.total() == 1
        assert "in doubt" in it.status()
        assert "no payment of nobody" in it.status("nobody")
        assert "in doubt" not in it.status(item_id)
        it.site.ask("POST", f"tasks/{item_id}/retry")
        it.tick()
        it.until_done()
        assert it.statuses([item_id]) == ["completed"]
        assert it.runway.paid.total() == 2  # a person said so


def test_by_hand(tmp_path):
    """`modal run app.py::process`: a given task, one that is taken, a photo of one's own, something that is none."""
    with fleet(tmp_path) as it:
        first, second = submit(it.site, 2)
        given = it.run("app.py::process", "--item-id", second, "--engine", "preview")
        assert given.returncode == 0, given.stderr
        assert second in given.stderr
        assert it.statuses([first, second]) == ["pending", "completed"]
        again = it.run("app.py::process", "--item-id", second, "--engine", "preview")
        assert again.returncode == 1
        assert "cannot be taken now" in again.stderr
        (it.source / "notes.txt").write_text("not a photo")
        wrong = it.run("-w", "out.mp4", "app.py::process", "--photo", "notes.txt")
        assert wrong.returncode == 1
        assert "is not a JPEG" in wrong.stderr
        assert not it.cloud.containers("Wan")  # found out before a GPU is started for it


@pytest.mark.slow
def test_by_hand_at_runway_is_paid_once(tmp_path):
    """Ctrl-C gives a task back and keeps what was paid; a call that is preempted and comes again goes on with it."""
    with fleet(tmp_path) as it:
        it.runway.hold()
        [item_id] = submit(it.site, provider="gen4_turbo", seconds=5)
        command = it.cloud.start_cli("run", "app.py::process", "--engine", "runway", cwd=it.source)
        it.runway.wait_for(lambda runway: runway.asked("poll") > 1, PATIENCE_S)
        command.send_signal(signal.SIGINT)
        command.communicate(timeout=30)
        until(lambda: it.statuses([item_id]) == ["pending"], 20, "the task is free")
        it.runway.release()
        it.tick()
        until(lambda: it.statuses([item_id]) == ["completed"], PATIENCE_S, "the next container made it")
        assert it.runway.paid.total() == 1

        it.runway.hold()
        (it.source / "photo.jpg").write_bytes(jpeg())
        arguments = ("-w", "out.mp4", "app.py::process", "--photo", "photo.jpg", "--engine", "runway")
        before, command = it.runway.asked("poll"), it.cloud.start_cli("run", *arguments, cwd=it.source)
        it.runway.wait_for(lambda runway: runway.asked("poll") > before + 1, PATIENCE_S)
        it.cloud.preempt(it.cloud.containers("Overflow")[-1])
        it.runway.release()
        _, said = command.communicate(timeout=PATIENCE_S)
        assert command.returncode == 0, said
        assert probe(it.source / "out.mp4").frames == 120
        assert it.runway.paid.total() == 2


def test_a_wake_is_a_tick_now(tmp_path):
    """A call starts the work at once; a burst of fifty makes one tick and one more; who has no token is refused."""
    with fleet(tmp_path, I2V_PUSH_TOKEN="token-of-callers") as it:
        cloud = it.cloud
        assert cloud.answer(cloud.post("calls", "/wake", b"{}"))[0] == 401
        assert cloud.answer(cloud.post("calls", "/wake", b"{}", authorization="Bearer wrong"))[0] == 401
        assert cloud.answer(cloud.post("calls", "/jobs/run", b"{}"))[0] == 404  # this queue's tasks have no calls
        assert cloud.answer(cloud.post("calls", "/jobs/health", method="GET"))[0] == 200
        assert cloud.calls("dispatch") == []
        ids = submit(it.site, provider="gen4_turbo", seconds=5)  # which costs the test less than loading a model
        bearer = "Bearer token-of-callers"
        burst = [cloud.post("calls", "/wake", b'{"type": "INSERT"}', authorization=bearer) for _ in range(50)]
        assert {cloud.answer(each)[0] for each in burst} == {202}
        it.until_done()
        assert it.statuses(ids) == ["completed"]
        assert 1 <= len(cloud.calls("dispatch")) <= 2
        assert "calls/tick-asked" not in cloud.entries(f"{APP}-records")
        assert probe(download(it.site, ids[0], tmp_path / "clip.mp4")).codec == "h264"
        # A tick that cannot be started is no secret, and the next call is not lost to it.
        cloud.refuse_spawns("dispatch", 1)
        assert cloud.answer(cloud.post("calls", "/wake", authorization=bearer))[0] == 503
        assert cloud.answer(cloud.post("calls", "/wake", x_worker_token="token-of-callers"))[0] == 202
        it.until_done()


@pytest.mark.slow
def test_a_job_of_a_table_is_run_when_it_is_asked_for(tmp_path):
    """`/jobs/run` takes it, a container makes it, and it is in the bucket; a wake finds what nobody asked for."""
    bearer = "Bearer token-of-callers"
    with (
        postgres.server() as server,
        postgres.database(server) as database,
        S3Server() as s3,
        Cloud(
            tmp_path / "cloud",
            idle_s=IDLE_S,
            container_env={"I2V_WEIGHTS_DIR": str(tmp_path / "weights"), "OMP_NUM_THREADS": "1"},
        ) as cloud,
    ):
        jobs = {"I2V_QUEUE": "video_jobs", "I2V_JOBS_STALE": 400, "BUCKET_ENDPOINT_URL": s3.url}
        jobs |= {"BUCKET_NAME": s3.bucket, "I2V_WAN_PRESET": "tiny", "I2V_MODAL_STARTUP_TIMEOUT": 300}
        secret = {"I2V_JOBS_DATABASE_URL": database, "I2V_PUSH_TOKEN": "token-of-callers"}
        secret |= {"BUCKET_ACCESS_KEY_ID": s3.key_id, "BUCKET_SECRET_ACCESS_KEY": s3.secret}
        migrate_jobs(Settings.isolated(jobs_database_url=database))
        photo = f"data:image/jpeg;base64,{base64.b64encode(jpeg()).decode()}"
        given = json.dumps({"photo": photo, "seconds": 0.5})
        with psycopg.connect(database, autocommit=True) as connection:
            for job_id in ("asked", "forgotten"):
                connection.execute("INSERT INTO video_jobs (id, input) VALUES (%s, %s)", (job_id, given))
            source = copy_of_the_clone(tmp_path / "clone")
            told = {**jobs, "I2V_PUSH_TOKEN": "a-secret-that-stays-here"}
            (source / ".env").write_text("".join(f"{name}={value}\n" for name, value in told.items()))
            cloud.create_secret(APP, secret)
            deployed = cloud.deploy(source / "app.py")
            assert deployed.returncode == 0, deployed.stdout + deployed.stderr

            def ask(job_id: str) -> tuple[int, str, str]:
                body = json.dumps({"job_id": job_id}).encode()
                status, answer = cloud.answer(cloud.post("calls", "/jobs/run", body, authorization=bearer))
                return status, json.loads(answer)["outcome"], json.loads(answer)["attempt_id"]

            assert cloud.answer(cloud.post("calls", "/jobs/health", method="GET"))[0] == 200
            status, outcome, attempt_id = ask("asked")
            assert (status, outcome) == (202, "accepted")
            assert ask("asked")[:2] == (503, "held")
            assert ask("nobody")[:2] == (404, "unknown_job")
            assert cloud.answer(cloud.post("calls", "/wake", authorization=bearer))[0] == 202
            cloud.until_idle(PATIENCE_S)
            rows = dict(connection.execute("SELECT id, status || ' ' || attempts FROM video_jobs").fetchall())
            assert rows == {"asked": "completed 1", "forgotten": "completed 1"}
            key = f"video-jobs/asked/attempts/{attempt_id}/final.mp4"
            (tmp_path / "clip.mp4").write_bytes(s3.object_bytes(key))
            assert probe(tmp_path / "clip.mp4").codec == "h264"
            assert ask("asked") == (200, "skipped", attempt_id)
            assert len(cloud.containers("Wan")) == 1
