"""`i2v doctor push`: what does not fit is told before a job is lost to it."""

import anyio
import pytest

from inference.push import opening
from inference.push.doctor import examine_push, retry_window_s
from inference.push.enqueue import Tasks, open_client
from inference.settings import Settings
from tests.support import postgres
from tests.support.google import ACCOUNT, AUDIENCE, QUEUE, CloudTasks, Issuer

GOOD = {"engine": "preview", "push_token": "t", "attempt_limit_s": 900.0}


def examined(**settings):
    """What is found, by name."""

    async def main():
        return {it.name: it async for it in examine_push(lambda: Settings.isolated(**settings))}

    return anyio.run(main)


def verdicts(found):
    """In short."""
    return {name: it.verdict for name, it in found.items()}


def test_without_anything():
    """Nobody may call, and there is no database: both are told, each with what to set."""
    found = examined(engine="preview")
    assert (found["callers"].verdict, found["table"].verdict) == ("FAIL", "FAIL")
    assert "I2V_PUSH_TOKEN" in found["callers"].text
    assert "I2V_JOBS_DATABASE_URL" in found["table"].text


def test_an_engine_has_to_be_chosen():
    """As for any worker."""
    found = examined(push_token="t", jobs_database_url="postgresql://db.example.com/x")
    assert found["settings"].verdict == "FAIL"


def test_a_deployment_that_fits():
    """On a real table. What the caller does is not known, and said."""
    bucket = {"bucket_url": "https://s3.example.com", "bucket_name": "b", "bucket_key_id": "k", "bucket_secret": "s"}
    with postgres.server() as server, postgres.database(server) as database:
        settings = {**GOOD, **bucket, "jobs_database_url": database}
        assert "migrate" in examined(**settings)["table"].text
        from inference.build.queues import migrate_jobs

        migrate_jobs(Settings.isolated(jobs_database_url=database))
        found = examined(**settings)
        assert verdicts(found) == {
            "callers": "ok",
            "table": "ok",
            "deadline": "ok",
            "retries": "skip",
            "concurrency": "ok",
        }
        assert "480" in found["retries"].text
        assert examined(**settings, push_retry_window_s=90)["retries"].verdict == "FAIL"
        assert examined(**settings, push_retry_window_s=3600)["retries"].verdict == "ok"


def test_limits_that_do_not_fit():
    """A job may take longer than the caller waits; jobs that only wait are held."""
    found = examined(**GOOD | {"attempt_limit_s": 1800.0, "push_at_once": 4})
    assert (found["deadline"].verdict, found["concurrency"].verdict) == ("FAIL", "FAIL")
    assert "I2V_ATTEMPT_LIMIT" in found["deadline"].text
    assert "I2V_PUSH_AT_ONCE" in found["concurrency"].text
    found = examined(**GOOD, push_audience=AUDIENCE, push_callers=ACCOUNT, push_url="https://other.example.com")
    assert "I2V_PUSH_AUDIENCE" in found["callers"].text


@pytest.mark.parametrize(
    "attempts,retry_s,verdict", [(3, 0.0, "FAIL"), (3, 3600.0, "ok"), (100, 0.0, "ok"), (-1, 0.0, "ok")]
)
def test_the_queue_is_asked_itself(monkeypatch, attempts, retry_s, verdict):
    """Where there is a way to it; with the real client, and the queue's own settings."""
    google = CloudTasks(Issuer(), max_attempts=attempts, max_retry_s=retry_s, min_backoff_s=1, max_backoff_s=60)
    given = GOOD | {"push_tasks_queue": QUEUE, "push_url": AUDIENCE}
    with google.serving() as target:
        found = examined(**given, push_emulator=target)
        assert (found["tasks"].verdict, found["retries"].verdict) == ("ok", verdict)
        assert "1000" in found["concurrency"].text
        elsewhere = given | {"push_tasks_queue": QUEUE.replace("videos", "others")}
        assert examined(**elsewhere, push_emulator=target)["tasks"].verdict == "skip"

    def away(_settings):
        return Tasks(open_client("127.0.0.1:9"), QUEUE, AUDIENCE, deadline_s=60, secret="t", call_s=0.2)

    monkeypatch.setattr(opening, "build_tasks", away)
    found = examined(**given, push_retry_window_s=3600)
    assert (found["tasks"].verdict, found["retries"].verdict) == ("skip", "ok")
    assert "I2V_PUSH_RETRY_WINDOW" in found["retries"].text


def test_how_long_is_tried():
    """Both limits have to be exceeded; pauses double, then grow evenly, up to the largest."""
    assert retry_window_s(-1, 60, 1, 10, 3) is None
    assert retry_window_s(1, 0, 1, 10, 3) == 0
    assert retry_window_s(4, 0, 1, 100, 16) == 1 + 2 + 4
    assert retry_window_s(4, 90, 1, 100, 16) == 90
    assert retry_window_s(6, 0, 1, 5, 16) == 1 + 2 + 4 + 5 + 5
    # The example in Google's reference of RetryConfig.maxDoublings: 10, 20, 40, 80, 160, 240, 300, 300 s.
    assert retry_window_s(9, 0, 10, 300, 3) == 10 + 20 + 40 + 80 + 160 + 240 + 300 + 300
