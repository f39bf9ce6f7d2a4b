"""An application of Celery's whose tasks report their progress, and its workers as real processes."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from celery import Celery

from inference.progress.celery import connect
from inference.progress.tracker import ProgressTracker
from tests.support.processes import environment, until

ROOT = Path(__file__).parent.parent.parent
URL = os.environ.get("TEST_REDIS_URL", "memory://")

app = Celery("tests", broker=URL, backend=URL if URL.startswith("redis") else None, set_as_current=False)
app.conf.update(
    broker_connection_retry_on_startup=True,
    broker_transport_options={"socket_timeout": 5},
    redis_socket_timeout=5,
    result_backend_always_retry=True,
    worker_hijack_root_logger=False,
    worker_prefetch_multiplier=1,
)
connect(app)


@app.task(bind=True)
def work(self, project_id: str, name: str, steps: int, pace_s: float) -> dict[str, int]:
    """Reports so many steps. Says in which process it ran."""
    tracker = ProgressTracker(self, project_id, name)
    pause = threading.Event()
    for step in range(steps):
        tracker.update(step / steps, message=f"step {step}", metadata={"pid": os.getpid()})
        pause.wait(pace_s)
    tracker.complete({"pid": os.getpid()})
    return {"pid": os.getpid()}


@app.task(bind=True)
def fail(self, project_id: str, name: str, *, says_so: bool) -> None:
    """Fails half-way, and may tell its tracker."""
    tracker = ProgressTracker(self, project_id, name)
    tracker.update(0.5)
    if says_so:
        tracker.error("no credits", {"error_code": "402"})
    raise ValueError("no photo\nat all")


@app.task(bind=True)
def fail_once(self, project_id: str, name: str) -> str:
    """Is tried again after its first failure."""
    tracker = ProgressTracker(self, project_id, name)
    tracker.update(0.5)
    if self.request.retries == 0:
        raise self.retry(countdown=0, exc=ValueError("for now"))
    tracker.complete()
    return "at last"


class Worker:
    """`celery worker` in a process of its own, its output in a file."""

    def __init__(self, folder: Path, name: str, *options: str, url: str, module: str = __name__, at: Path = ROOT):
        self.name = name
        self.output = folder / f"{name}.log"
        command = [sys.executable, "-m", "celery", "-A", module, "worker", "-n", f"{name}@here", "--loglevel", "info"]
        quiet = ["--without-gossip", "--without-mingle", "--without-heartbeat"]
        env = environment(TEST_REDIS_URL=url, REDIS_URL=url, PYTHONPATH=ROOT, NO_COLOR=1)
        with self.output.open("wb") as output:
            self._popen = subprocess.Popen([*command, *quiet, *options], cwd=at, env=env, stdout=output, stderr=output)

    def wait_until_ready(self) -> None:
        """It takes tasks."""
        until(lambda: f"{self.name}@here ready" in self.said(), 30, f"{self.name} is ready: {self.said()}")

    def said(self) -> str:
        """All of its output."""
        return self.output.read_text(errors="replace")

    def ask_to_stop(self) -> None:
        """A warm shutdown begins."""
        if self._popen.poll() is None:
            self._popen.send_signal(signal.SIGTERM)

    def stop(self) -> int:
        """Waits for its end; its exit code."""
        self.ask_to_stop()
        try:
            return self._popen.wait(20)
        except subprocess.TimeoutExpired:
            self._popen.kill()
            return self._popen.wait(10)


@contextmanager
def workers(*started: Worker) -> Iterator[None]:
    """They take tasks; stopped at the end."""
    try:
        for worker in started:
            worker.wait_until_ready()
        yield
    finally:
        for worker in started:
            worker.ask_to_stop()
        for worker in started:
            worker.stop()
