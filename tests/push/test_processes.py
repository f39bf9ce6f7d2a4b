"""`i2v push` as a process, on a real PostgreSQL and a real S3: what is left of a job when signals come."""

import json
import signal
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import httpx
import psycopg
import pytest

from inference.media.video import probe
from inference.queues.video_jobs.store import create
from tests.support import postgres
from tests.support.processes import Process, environment, i2v_here, jpeg, until
from tests.support.s3_server import S3Server

TOKEN = "token-of-callers"
LONG_S, SHORT_S = 60, 0.5
"""Seconds of video: the longest takes longer to make than any signal takes to arrive."""

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """A PostgreSQL for this file."""
    with postgres.server() as url:
        yield url


class Deployment:
    """A table, a bucket, and the processes that serve calls."""

    def __init__(self, folder: Path, database: str, s3: S3Server) -> None:
        self.folder, self.database, self.s3 = folder, database, s3
        self.processes: list[Process] = []
        self.env = environment(
            I2V_PUSH_TOKEN=TOKEN,
            I2V_JOBS_DATABASE_URL=database,
            I2V_ENGINE="preview",
            I2V_HOST="127.0.0.1",
            I2V_SHUTDOWN_GRACE=0.2,
            BUCKET_ENDPOINT_URL=s3.url,
            BUCKET_NAME=s3.bucket,
            BUCKET_ACCESS_KEY_ID=s3.key_id,
            BUCKET_SECRET_ACCESS_KEY=s3.secret,
            TEMP_DIR=folder / "temp",
        )
        (s3._objects / "photos").mkdir()
        (s3._objects / "photos" / "1.jpg").write_bytes(jpeg())
        create(database)

    def run(self, *arguments: str, **settings: object) -> Process:
        """One command, started."""
        name = f"push-{len(self.processes)}"
        env = self.env | {name: str(value) for name, value in settings.items()}
        self.processes.append(Process(self.folder, name, "push", *arguments, env=env))
        return self.processes[-1]

    def serve(self, **settings: object) -> tuple[Process, int]:
        """A process that takes calls, and its port; it has looked for jobs once, and would find a new one later."""
        process = self.run("--port", "0", **settings)

        def port() -> int | None:
            assert process.exit_code is None, process.stderr.read_text()
            if not process.events("sweeping"):
                return None
            return next((it["port"] for it in process.events("push_open")), None)

        return process, until(port, 30, "calls are taken")

    def submit(self, job_id: str, seconds: float = SHORT_S) -> None:
        """A job, as a person adds one."""
        process = self.run("submit", "photos/1.jpg", "zoom in", "--id", job_id, "--seconds", str(seconds))
        assert process.wait(30) == 0, process.stderr.read_text()
        assert process.stdout.read_text().split() == [job_id]

    def add(self, job_id: str, seconds: float = SHORT_S) -> None:
        """The same, without a process for it."""
        given = {"photo": "photos/1.jpg", "prompt": "zoom in", "seconds": seconds}
        self.sql(f"INSERT INTO video_jobs (id, input) VALUES ('{job_id}', '{json.dumps(given)}')")

    def ask(self, port: int, job_id: str) -> httpx.Response:
        """One delivery."""
        return httpx.post(
            f"http://127.0.0.1:{port}/jobs/run",
            json={"job_id": job_id},
            headers={"authorization": f"Bearer {TOKEN}"},
            timeout=60,
        )

    def sql(self, statement: str) -> list[tuple]:
        """Asks the database itself."""
        with psycopg.connect(self.database, autocommit=True) as connection:
            cursor = connection.execute(statement)
            return cursor.fetchall() if cursor.description else []

    def status(self, job_id: str) -> str:
        """Of a job."""
        return self.sql(f"SELECT status FROM video_jobs WHERE id = '{job_id}'")[0][0]


@pytest.fixture
def deployment(server, tmp_path) -> Iterator[Deployment]:
    """A new one."""
    with postgres.database(server) as database, S3Server() as s3:
        made = Deployment(tmp_path, database, s3)
        try:
            yield made
        finally:
            for process in made.processes:
                process.kill()


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    """For calls that wait for their answer."""
    with ThreadPoolExecutor(20) as threads:
        yield threads


def at_work(process: Process, job_id: str) -> None:
    """Until a process renders a job."""
    until(lambda: process.events("stage", item_id=job_id, stage="render"), 30, f"{process.name} renders {job_id}")


def test_from_a_row_to_a_film(deployment, pool):
    """Added, asked for sixteen times at once, made once, kept under its attempt's key; then skipped."""
    assert deployment.run("migrate").wait(30) == 0  # nothing is missing
    process, port = deployment.serve()
    deployment.submit("j-1")
    deployment.submit("j-1")  # the same job
    told = [each.result() for each in [pool.submit(deployment.ask, port, "j-1") for _ in range(16)]]
    assert min(it.status_code for it in told) == 200
    [done] = [it.json() for it in told if it.json()["outcome"] == "completed"]
    key = f"video-jobs/j-1/attempts/{done['attempt_id']}/final.mp4"
    assert {it.status_code for it in told if it.json()["outcome"] not in ("completed", "skipped")} <= {503}
    assert deployment.sql("SELECT status, artifact_key, attempts FROM video_jobs") == [("completed", key, 1)]
    assert deployment.s3.object_bytes(key)[4:8] == b"ftyp"
    assert deployment.ask(port, "j-1").json()["outcome"] == "skipped"
    assert deployment.ask(port, "j-2").status_code == 404
    assert httpx.get(f"http://127.0.0.1:{port}/jobs/health").json() == {"status": "ok"}
    process.send(signal.SIGTERM)
    assert process.wait() == 0
    assert TOKEN not in process.stderr.read_text()


def test_a_film_of_two_photos(deployment):
    """Given as a file; its parts and the whole are in the bucket."""
    given = {"segments": [{"photo": "photos/1.jpg", "seconds": 0.5}, {"photo": "photos/1.jpg", "seconds": 1}]}
    _, port = deployment.serve()
    (deployment.folder / "film.json").write_text(json.dumps(given))
    process = deployment.run("submit", "--id", "film", "--input", "film.json")
    assert process.wait(30) == 0, process.stderr.read_text()
    told = deployment.ask(port, "film")
    assert (told.status_code, told.json()["outcome"]) == (200, "completed"), told.text
    [(key,)] = deployment.sql("SELECT artifact_key FROM video_jobs")
    (deployment.folder / "film.mp4").write_bytes(deployment.s3.object_bytes(key))
    assert probe(deployment.folder / "film.mp4").duration_s == pytest.approx(1.5, abs=0.1)


def test_sigterm_in_mid_job(deployment, pool):
    """503 to the caller, the job is free at once, and another process completes it."""
    process, port = deployment.serve(I2V_PUSH_SWEEP=3600)
    deployment.add("j-1", LONG_S)
    asked: Future = pool.submit(deployment.ask, port, "j-1")
    at_work(process, "j-1")
    process.send(signal.SIGTERM)
    told = asked.result()
    assert (told.status_code, told.json()["outcome"]) == (503, "released")
    assert process.wait() == 0
    assert deployment.status("j-1") == "queued"
    deployment.sql("""UPDATE video_jobs SET input = jsonb_set(input::jsonb, '{seconds}', '0.5')::json""")
    _, port = deployment.serve()
    assert deployment.ask(port, "j-1").json()["outcome"] in ("completed", "held", "busy", "skipped")
    until(lambda: deployment.status("j-1") == "completed", 30, "the other process completed it")


def test_sigkill_in_mid_job(deployment, pool):
    """The dead holder's job is refused while it may be alive; once it is stale, the sweep of another takes it."""
    process, port = deployment.serve(I2V_PUSH_SWEEP=3600)
    deployment.add("j-1", LONG_S)
    asked = pool.submit(deployment.ask, port, "j-1")
    at_work(process, "j-1")
    process.kill()
    with pytest.raises(httpx.TransportError):
        asked.result()
    _, port = deployment.serve(I2V_PUSH_SWEEP=1)
    told = deployment.ask(port, "j-1")
    assert (told.status_code, told.json()["outcome"]) == (503, "held")
    deployment.sql(
        "UPDATE video_jobs SET lease_beat_at = lease_beat_at - interval '1 hour', "
        """input = jsonb_set(input::jsonb, '{seconds}', '0.5')::json"""
    )
    until(lambda: deployment.status("j-1") == "completed", 30, "the sweep took it")
    assert deployment.ask(port, "j-1").json()["outcome"] == "skipped"
    assert deployment.sql("SELECT attempts FROM video_jobs") == [(2,)]


def test_sigkill_between_the_end_and_the_answer(deployment, pool):
    """The end is in the table, and nobody was told: delivered again, the job is skipped, and it was made once."""
    process, port = deployment.serve(I2V_PUSH_SWEEP=3600)
    deployment.add("j-1")
    deployment.sql(
        "CREATE FUNCTION linger() RETURNS trigger AS 'BEGIN PERFORM pg_sleep(1); RETURN NEW; END' LANGUAGE plpgsql"
    )
    deployment.sql(
        "CREATE TRIGGER linger BEFORE UPDATE ON video_jobs FOR EACH ROW "
        "WHEN (NEW.status = 'completed') EXECUTE FUNCTION linger()"
    )
    asked = pool.submit(deployment.ask, port, "j-1")
    ending = "SELECT 1 FROM pg_stat_activity WHERE wait_event = 'PgSleep'"
    until(lambda: deployment.sql(ending), 30, "the end is being written")
    process.kill()
    with pytest.raises(httpx.TransportError):
        asked.result()
    until(lambda: deployment.status("j-1") == "completed", 10, "it is written")
    _, port = deployment.serve()
    assert deployment.ask(port, "j-1").json()["outcome"] == "skipped"
    assert deployment.sql("SELECT attempts FROM video_jobs") == [(1,)]
    assert " ".join(deployment.s3.keys()).count("video-jobs/") == 1


def test_without_a_database_or_a_token_nothing_is_served(deployment, capsys):
    """One line that says what to set, and a failure; as for a job that is given twice."""
    for settings, said in (
        ({"I2V_PUSH_TOKEN": ""}, "I2V_PUSH_TOKEN"),
        ({"I2V_JOBS_DATABASE_URL": ""}, "I2V_JOBS_DATABASE_URL"),
        ({"I2V_JOBS_DATABASE_URL": "postgresql://127.0.0.1:9/none"}, "database"),
        ({"I2V_JOBS_TABLE": "absent"}, "absent"),
    ):
        ran = i2v_here(capsys, deployment.folder, "push", "--port", 0, **(deployment.env | settings))
        assert (ran.returncode, said in ran.stderr) == (1, True), ran.stderr
    (deployment.folder / "film.json").write_text("{}")
    ran = i2v_here(
        capsys, deployment.folder, "push", "submit", "photos/1.jpg", "--input", "film.json", **deployment.env
    )
    assert (ran.returncode, "give one of them" in ran.stderr) == (1, True), ran.stderr
