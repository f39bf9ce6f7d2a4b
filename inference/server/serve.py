"""Runs the embedded queue server, in the caller's task group."""

import anyio
import anyio.to_thread
import structlog
from anyio.abc import TaskStatus

from inference.errors import SettingsError
from inference.progress.hub import MemoryHub, ProgressHub
from inference.progress.web.access import is_loopback
from inference.progress.web.follow import Bounds
from inference.server.answers import failure
from inference.server.api import create_app
from inference.server.config import ServerConfig
from inference.server.connections import Patience, for_listeners
from inference.server.listening import listen, serve_app

log = structlog.get_logger(__name__)


async def serve(
    config: ServerConfig,
    host: str,
    port: int,
    *,
    hub: ProgressHub | None = None,
    patience: Patience = Patience(),  # noqa: B008 - frozen
    task_status: TaskStatus[tuple[str, int]] = anyio.TASK_STATUS_IGNORED,
) -> None:
    """Serves until cancelled, then gives running requests some seconds to finish. On asyncio only, as uvicorn is.

    `hub`: as `create_app` has it; closed when the server stops.
    Port 0 takes a free one. Starts with the (host, port) it listens on, once it does: `await tasks.start(serve, …)`.
    Raises SettingsError where it cannot listen, or would be open to strangers; and as `create_app`.
    """
    if config.api_key is None:
        if not is_loopback(host):
            raise SettingsError(
                f"WORKER_API_KEY is not set, so this server may not listen on {host}: set it, or listen on 127.0.0.1"
            )
        log.warning("no key is set: this server answers programs on this machine only", setting="WORKER_API_KEY")
    listener = listen(host, port)
    try:
        hub = hub or MemoryHub()
        app = await anyio.to_thread.run_sync(create_app, config, hub, Bounds(for_listeners(patience)))
        stopping = failure(503, "the server is stopping: try again", {"connection": "close"})
        async with anyio.create_task_group() as tasks:
            bound = await tasks.start(
                lambda *, task_status: serve_app(
                    app, listener, stopping=stopping, closing=hub.close, patience=patience, task_status=task_status
                )
            )
            log.info("the queue is open", host=bound[0], port=bound[1])
            task_status.started(bound)
    finally:
        listener.close()
