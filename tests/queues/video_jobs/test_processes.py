"""Real workers on a real PostgreSQL and a real S3: `i2v work` with I2V_QUEUE=video_jobs, stopped and killed."""

import random
import signal

import httpx
import pytest

from inference.transfer.bucket import Bucket
from tests.queues.video_jobs.subjects import OURS, SqlSubject
from tests.support.processes import Process, environment, jpeg, until
from tests.support.s3_server import S3Server

DEADLINE_S = 60.0

LEDGER = """
CREATE TABLE ledger (job_id text, was text, becomes text, attempt_id text);
CREATE FUNCTION note() RETURNS trigger AS $$ BEGIN
    INSERT INTO ledger VALUES (NEW.id, OLD.status, NEW.status, NEW.attempt_id); RETURN NEW;
END $$ LANGUAGE plpgsql;
CREATE TRIGGER note AFTER UPDATE ON video_jobs FOR EACH ROW WHEN (OLD.status IS DISTINCT FROM NEW.status)
    EXECUTE FUNCTION note();
"""
"""Every change of a status, whoever makes it."""


class Site:
    """A table, a bucket with a photo, and the workers there are."""

    def __init__(self, folder, url, s3):
        self.folder, self.url, self.s3 = folder, url, s3
        SqlSubject.prepare(url, OURS)
        self.table = SqlSubject(url)
        self.table.admin.execute(LEDGER)
        self.workers = []
        bucket = Bucket(s3.url, s3.bucket, s3.key_id, s3.secret)
        photo = bucket.upload_url("photos/a.jpg", content_type="image/jpeg")
        httpx.put(photo, content=jpeg(), headers={"Content-Type": "image/jpeg"}).raise_for_status()

    def work(self):
        """One more worker."""
        name = f"worker-{len(self.workers)}"
        env = environment(
            I2V_QUEUE="video_jobs",
            I2V_ENGINE="preview",
            I2V_JOBS_DATABASE_URL=self.url,
            BUCKET_ENDPOINT_URL=self.s3.url,
            BUCKET_NAME=self.s3.bucket,
            BUCKET_ACCESS_KEY_ID=self.s3.key_id,
            BUCKET_SECRET_ACCESS_KEY=self.s3.secret,
            POLL_INTERVAL=0.1,
            I2V_CONCURRENCY=1,
            WORKER_ID=name,
            TEMP_DIR=self.folder / "temp",
        )
        self.workers.append(Process(self.folder, name, "work", env=env))
        return self.workers[-1]

    def until_status(self, job_id, *statuses):
        """Waits for a job; returns it."""
        until(lambda: self.table.store.get(job_id).status in statuses, DEADLINE_S, f"{job_id} is {statuses}")
        return self.table.store.get(job_id)

    def segments_of(self, job_id):
        """What lies in the bucket of a film that is being made."""
        stored = self.s3.keys()
        return [key for key in stored if key.startswith(f"video-segments/{job_id}/")]

    def ends(self, job_id):
        """Every end that a job had."""
        return self.table.admin.execute(
            "SELECT becomes FROM ledger WHERE job_id = %s AND becomes IN ('completed', 'failed', 'canceled')", [job_id]
        ).fetchall()

    def close(self):
        """Kills what is left."""
        for worker in self.workers:
            if worker.exit_code is None:
                worker.kill()
        self.table.close()


@pytest.fixture(scope="module")
def s3():
    """One bucket for this module."""
    with S3Server() as running:
        yield running


@pytest.fixture
def site(tmp_path, database_url, s3):
    """Without workers at first."""
    made = Site(tmp_path, database_url, s3)
    yield made
    made.close()


def test_a_film_goes_on_where_its_dead_holder_was(site):
    """Killed between two segments: the next worker takes the first from the bucket, and the job ends once."""
    photo = {"photo": "photos/a.jpg", "seconds": 2}
    site.table.store.add("film", {"segments": [photo | {"prompt": f"view {n}"} for n in range(4)]})
    killed = site.work()
    kept = until(lambda: site.segments_of("film"), DEADLINE_S, "a segment is kept")
    killed.kill()
    assert site.table.store.get("film").status == "processing"
    first = site.table.store.get("film").attempt_id
    site.table.expire("film")
    heir = site.work()
    job = site.until_status("film", "completed", "failed")
    assert (job.status, job.crashes, job.attempts) == ("completed", 1, 2), job.error
    assert job.attempt_id != first
    assert job.artifact_key == f"video-jobs/film/attempts/{job.attempt_id}/final.mp4"
    assert site.s3.object_bytes(job.artifact_key)[4:8] == b"ftyp"
    assert site.ends("film") == [("completed",)]
    assert set(kept) < set(site.segments_of("film"))
    assert len(site.segments_of("film")) == 4
    told = job.progress or {"segments_done": 4, "segments_total": 4}  # done before a second beat: none told any
    assert (told["segments_done"], told["segments_total"]) == (4, 4)
    heir.send(signal.SIGTERM)
    assert heir.wait() == 0


def test_a_worker_that_is_told_to_stop_hands_back(site):
    """At once, uncounted; the next one makes it."""
    photo = {"photo": "photos/a.jpg", "seconds": 60}
    site.table.store.add("long", {"segments": [photo] * 20})
    worker = site.work()
    site.until_status("long", "processing")
    until(lambda: site.table.store.get("long").beaten, DEADLINE_S, "its holder was heard of")
    worker.send(signal.SIGTERM)
    until(lambda: worker.events("stopping"), DEADLINE_S, "it has begun to stop")  # two signals at once may become one
    worker.send(signal.SIGTERM)
    assert worker.wait(30) == 0
    job = site.table.store.get("long")
    assert (job.status, job.attempt_id, job.crashes, job.losses) == ("queued", None, 0, 0)
    site.table.store.cancel("long")
    assert site.ends("long") == [("canceled",)]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_job_ends_once_whoever_is_killed(site):
    """Three workers, thirty jobs, a kill every other moment, cancels in between: the ledger has one end for each."""
    pick = random.Random(7)
    ids = [f"job-{number}" for number in range(30)]
    for number, job_id in enumerate(ids):
        photo = {"photo": "photos/a.jpg" if number % 10 else "photos/none.jpg", "seconds": pick.choice([1, 3])}
        site.table.store.add(job_id, photo if number % 3 else {"segments": [photo, photo | {"prompt": "back"}]})
    for _ in range(3):
        site.work()
    kills = 0
    give_up = 400
    while any(site.table.store.get(job_id).status in ("queued", "processing") for job_id in ids):
        give_up -= 1
        assert give_up, "not all jobs have ended"
        held = [job_id for job_id in ids if site.table.store.get(job_id).status == "processing"]
        alive = [worker for worker in site.workers if worker.exit_code is None]
        if held and kills < 12 and pick.random() < 0.5:
            pick.choice(alive).kill()
            kills += 1
            names = {worker.name for worker in site.workers if worker.exit_code is None}
            for job_id in held:
                job = site.table.store.get(job_id)
                if job.status == "processing" and job.worker not in names:
                    site.table.expire(job_id)  # eight minutes pass
            site.work()
        if held and pick.random() < 0.1:
            site.table.admin.execute("UPDATE video_jobs SET cancel_requested = true WHERE id = %s", [held[0]])
        site.table.admin.execute("SELECT pg_sleep(0.3)")
        site.table.store.sweep()
    for job_id in ids:
        job = site.table.store.get(job_id)
        assert site.ends(job_id) == [(job.status,)]
        if job.status == "completed":
            assert job.attempt_id in job.artifact_key
            assert site.s3.object_bytes(job.artifact_key)[4:8] == b"ftyp"
    assert {"completed", "failed"} <= {site.table.store.get(job_id).status for job_id in ids}
    assert kills
