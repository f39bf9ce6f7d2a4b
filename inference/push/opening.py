"""The parts of the push application, made from settings."""

import socket
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import anyio
import structlog
from anyio.abc import TaskStatus
from starlette.routing import BaseRoute
from starlette.types import ASGIApp

from inference.build.extras import needing_extra
from inference.build.queues import open_queue
from inference.errors import SettingsError
from inference.progress.hub import ProgressHub
from inference.progress.web.follow import Bounds
from inference.push.app import stopping
from inference.push.auth import Auth
from inference.push.jobs import JobQueue
from inference.push.progress import progress_routes
from inference.push.sweeping import Ask
from inference.server.listening import serve_app
from inference.settings import Settings

log = structlog.get_logger(__name__)

if TYPE_CHECKING:
    from inference.push.enqueue import Tasks


def callers_of(settings: Settings) -> list[str]:
    """The service accounts that may call."""
    return [each.strip() for each in settings.push_callers.split(",") if each.strip()]


def build_auth(settings: Settings) -> Auth:
    """Who may call. Raises SettingsError where that would be anybody."""
    tokens = None
    if settings.push_audience:
        with needing_extra("push", "checking OIDC tokens"):
            from inference.push.oidc import GoogleTokens  # noqa: PLC0415 - an extra
        tokens = GoogleTokens(settings.push_audience, callers_of(settings))
    secret = settings.push_token.get_secret_value() if settings.push_token else None
    return Auth(secret, settings.push_token_header, tokens)


def build_streams(
    settings: Settings,
    auth: Auth,
    hub: ProgressHub | None,
    bounds: Bounds = Bounds(),  # noqa: B008 - frozen
) -> Sequence[BaseRoute]:
    """Routes of live progress; none without a hub that other processes publish to."""
    secret = settings.push_token.get_secret_value() if settings.push_token else None
    return progress_routes(hub, auth, secret, bounds) if hub is not None else ()


def build_tasks(settings: Settings) -> "Tasks | None":
    """The queue of Cloud Tasks; None where none is set. Raises SettingsError."""
    if not settings.push_tasks_queue:
        return None
    if not settings.push_url:
        raise SettingsError("I2V_PUSH_URL is not set: tasks need the address of /jobs/run")
    with needing_extra("push", "Cloud Tasks"):
        from inference.push.enqueue import Tasks, open_client  # noqa: PLC0415 - an extra
    return Tasks(
        open_client(settings.push_emulator),
        settings.push_tasks_queue,
        settings.push_url,
        deadline_s=settings.push_deadline_s,
        secret=settings.push_token.get_secret_value() if settings.push_token else None,
        service_account=settings.push_service_account,
        audience=settings.push_audience,
    )


def ask_of(tasks: "Tasks | None") -> Ask | None:
    """How a sweep makes somebody deliver a job again; None where only this process could."""
    return tasks.ask_again if tasks else None


@asynccontextmanager
async def open_jobs(settings: Settings) -> AsyncIterator[JobQueue]:
    """The store of jobs. Raises SettingsError where the queue is one whose tasks cannot be asked for by id."""
    async with open_queue(settings) as queue:
        if not isinstance(queue, JobQueue):
            raise SettingsError(
                f"I2V_QUEUE={settings.queue}: its tasks cannot be asked for one by one; set I2V_QUEUE=video_jobs"
            )
        yield queue


async def serve_calls(
    app: ASGIApp,
    listener: socket.socket,
    *,
    closing: Callable[[], None] | None = None,
    task_status: TaskStatus[tuple[str, int]] = anyio.TASK_STATUS_IGNORED,
) -> None:
    """Serves the application until cancelled, and closes the listener; as `serve_app`."""
    with listener:
        await serve_app(app, listener, stopping=stopping(), closing=closing, task_status=task_status)
