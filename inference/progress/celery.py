"""Progress of Celery tasks, for listeners: `connect(app)`, and then the trackers of `tracker.py` in its tasks.

    app = Celery("films", broker=URL, backend=URL)
    connect(app)

    @app.task(bind=True)
    def director(self, project_id):
        tracker = ProgressTracker(self, project_id, "director")

A tracker tells two stories. The task's own state (`update_state`: PROGRESS, then Celery's SUCCESS or FAILURE) stays in
the result backend for whoever has the task's id. Events go to a stream of the project, for pages. Both are written in
the task's own thread, with no event loop, so that a child process that ends loses nothing.
"""

import threading
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

import structlog
from celery import Celery, current_app, signals
from celery._state import get_current_worker_task

from inference.errors import SettingsError, one_line
from inference.progress.events import ErrorEvent, Event, ProgressEvent, is_terminal
from inference.progress.hub import Subscription, install, installed
from inference.progress.redis import RedisHub

log = structlog.get_logger(__name__)

MAX_ERROR_CHARS = 500
"""Of an exception's message in an event."""


def connect(app: Celery, url: str | None = None) -> None:
    """Lets trackers in the workers of an app publish their events to a Redis.

    Without a URL that is the app's result backend or its broker, whichever is a Redis; where neither is, tasks have
    their states alone. Works with every pool. Nothing happens in processes that are not workers of the app.
    Raises SettingsError for a URL that is none.
    """
    if url is not None:
        RedisHub(url)  # which connects to nothing before it is used
    _Worker(app, url).listen()


def redis_url(app: Celery) -> str | None:
    """The Redis that an app uses, as redis-py writes URLs: for results, else as its broker."""
    broker = app.conf.broker_url or ""
    brokers = broker.split(";") if isinstance(broker, str) else list(broker)
    for url in (app.conf.result_backend, *brokers):
        if isinstance(url, str) and (found := _as_redis_py_has_it(url)):
            return found
    return None


class _Worker:
    """The hub of a worker process: opened when the process begins, closed when it ends."""

    def __init__(self, app: Celery, url: str | None) -> None:
        self._app = app
        self._url = url
        self._hub: _TaskHub | None = None

    def listen(self) -> None:
        """Has Celery call the methods below, and so keep this object.

        Prefork and solo pools announce their processes. Every worker announces itself; pools of threads do only that.
        """
        signals.worker_init.connect(self._begin_worker, weak=False)
        signals.worker_process_init.connect(self._begin_process, weak=False)
        signals.worker_process_shutdown.connect(self._end, weak=False)
        signals.worker_shutdown.connect(self._end, weak=False)
        signals.task_failure.connect(self._fail, weak=False)
        signals.task_postrun.connect(self._forget, weak=False)

    def _begin_worker(self, sender: Any = None, **_: Any) -> None:
        if sender is None or sender.app is self._app:
            self._begin()

    def _begin_process(self, **_: Any) -> None:
        if current_app == self._app:  # a program may have several apps, and the signal does not say whose worker it is
            self._begin()

    def _begin(self) -> None:
        if self._hub is not None:  # from before the fork: it has begun anew
            return
        url = self._url or redis_url(self._app)
        if url is None:
            return
        try:
            self._hub = _TaskHub(RedisHub(url))
        except SettingsError as error:
            log.error("no progress events: give connect() the URL of a Redis", reason=str(error))  # noqa: TRY400
            return
        install(self._hub)

    def _end(self, **_: Any) -> None:
        if self._hub is not None:
            if installed() is self._hub:
                install(None)
            self._hub.close()
            self._hub = None

    def _fail(self, task_id: str, exception: BaseException, **_: Any) -> None:
        if self._hub is not None:
            self._hub.fail(task_id, exception)

    def _forget(self, task_id: str, **_: Any) -> None:
        if self._hub is not None:
            self._hub.forget(task_id)


class _TaskHub:
    """Passes everything on to a hub, and knows which trackers of a running task have not told its end.

    So a task that fails without a word to its tracker ends for listeners as well.
    """

    def __init__(self, hub: RedisHub) -> None:
        self._hub = hub
        self._lock = threading.Lock()
        self._open: dict[str, dict[tuple[str, str], Mapping[str, Any]]] = {}  # task id → trackers, and their lease

    def publish(self, event: Event) -> None:
        """Adds an event to the stream of its project. Raises nothing."""
        self._hub.publish(event)
        # A task that is called by another as a plain function is a part of that one.
        task = get_current_worker_task()
        if task is None:
            return
        with self._lock:
            trackers = self._open.setdefault(task.request.id, {})
            if is_terminal(event):
                trackers.pop((event.project_id, event.task_name), None)
            elif isinstance(event, ProgressEvent):
                lease = {name: value for name, value in event.metadata.items() if name == "lease"}
                trackers[event.project_id, event.task_name] = lease

    def fail(self, task_id: str, exception: BaseException) -> None:
        """The task raised this."""
        with self._lock:
            trackers = self._open.pop(task_id, {})
        kind = type(exception).__name__
        message = one_line(str(exception), MAX_ERROR_CHARS) or kind
        for (project_id, task_name), lease in trackers.items():
            details = {"error_code": kind, **lease}
            self._hub.publish(ErrorEvent(project_id=project_id, task_name=task_name, error=message, details=details))

    def forget(self, task_id: str) -> None:
        """The task has ended, or will be tried again."""
        with self._lock:
            self._open.pop(task_id, None)

    def subscribe(self, project_id: str, after: str | None = None) -> AbstractAsyncContextManager[Subscription]:
        """As the hub's."""
        return self._hub.subscribe(project_id, after)

    def close(self) -> None:
        """As the hub's."""
        self._hub.close()


def _as_redis_py_has_it(url: str) -> str | None:
    """Celery's way to write the address of a Redis, as redis-py writes it. None for anything else.

    Sockets and certificates differ: celery/backends/redis.py, `_params_from_url`.
    """
    parts = urlsplit(url)
    query = dict(parse_qsl(parts.query))
    match parts.scheme:
        case "redis":
            return url
        case "rediss":
            if checked := query.get("ssl_cert_reqs"):
                query["ssl_cert_reqs"] = checked.removeprefix("CERT_").lower()
            return urlunsplit(parts._replace(query=urlencode(query)))
        case "redis+socket" | "socket":
            if database := query.pop("virtual_host", None):
                query["db"] = database.strip("/")
            return f"unix://{parts.netloc}{parts.path}" + (f"?{urlencode(query)}" if query else "")
        case _:
            return None
