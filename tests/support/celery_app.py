"""An application of Celery's whose tasks report their progress. Its workers import this."""

import os
import threading

from celery import Celery

from inference.progress.celery import connect
from inference.progress.tracker import ProgressTracker

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
def fail_inside(self, project_id: str) -> None:
    """Calls another task as a plain function, which fails without a word."""
    ProgressTracker(self, project_id, "outside").update(0.1)
    fail(project_id, "inside", says_so=False)


@app.task(bind=True)
def fail_once(self, project_id: str, name: str) -> str:
    """Is tried again after its first failure."""
    tracker = ProgressTracker(self, project_id, name)
    tracker.update(0.5)
    if self.request.retries == 0:
        raise self.retry(countdown=0, exc=ValueError("for now"))
    tracker.complete()
    return "at last"
