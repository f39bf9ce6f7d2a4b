"""`POST /wake` for a polling worker, in real processes: the poll is cut short."""

import signal

import httpx
import pytest

from tests.support.processes import Process, Site, environment, until

TOKEN = "token-of-callers"

pytestmark = pytest.mark.timeout(120)


def test_a_worker_is_woken(tmp_path):
    """It asks once an hour, and begins when it is called; strangers are refused, and SIGTERM ends it as ever."""
    with Site(tmp_path) as site:
        worker = site.worker("w", POLL_INTERVAL=3600, I2V_WAKE_PORT=0, I2V_PUSH_TOKEN=TOKEN)
        port = until(lambda: next((it["port"] for it in worker.events("wake_open")), None), 20, "it listens")
        url = f"http://127.0.0.1:{port}"
        [item_id] = site.submit()
        assert httpx.post(f"{url}/wake").status_code == 401
        assert site.task(item_id)["status"] == "pending"
        assert httpx.post(f"{url}/jobs/run", headers={"x-worker-token": TOKEN}).status_code == 404
        assert httpx.post(f"{url}/wake", headers={"x-worker-token": TOKEN}).status_code == 202
        until(site.has_ended, 20, "it is done")
        assert site.task(item_id)["status"] == "completed"
        worker.send(signal.SIGTERM)
        assert worker.wait() == 0
        assert TOKEN not in worker.stderr.read_text()


def test_a_wake_port_that_would_be_open_to_all_is_refused(tmp_path):
    """Before anything is loaded or leased."""
    env = environment(VERCEL_API_URL="http://127.0.0.1:9", WORKER_API_KEY="k", I2V_WAKE_PORT=0)
    process = Process(tmp_path, "w", "work", env=env)
    assert process.wait(30) == 1
    assert "I2V_PUSH_TOKEN" in process.stderr.read_text()
