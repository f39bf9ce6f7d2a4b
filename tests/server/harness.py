"""The embedded server for tests: on loopback where they want sockets, in process where they do not."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
from anyio.from_thread import BlockingPortal, start_blocking_portal
from fastapi import FastAPI
from PIL import Image

from inference.server.api import create_app
from inference.server.config import ServerConfig
from inference.server.serve import serve

KEY = "test-key"


@contextmanager
def running_server(config: ServerConfig, host: str = "127.0.0.1", **options: Any) -> Iterator[str]:
    """The base URL of a server that runs in a thread for as long as the context."""
    with start_blocking_portal() as portal:
        stopped, (bound, port) = portal.start_task(partial(serve, **options), config, host, 0)
        try:
            yield f"http://{bound}:{port}"
        finally:
            stopped.cancel()


def config(folder: Path, database_url: str | None = None, **fields: Any) -> ServerConfig:
    """A server's configuration, with everything under `folder`."""
    return ServerConfig(
        database_url=database_url or f"sqlite:///{folder / 'queue.db'}",
        storage_dir=folder / "objects",
        **{"api_key": KEY, "signing_secret": "secret"} | fields,
    )


def jpeg(width: int = 64, height: int = 48, color: str = "teal") -> bytes:
    """A small photo."""
    file = BytesIO()
    Image.new("RGB", (width, height), color).save(file, "JPEG")
    return file.getvalue()


def complete(url: str, item_id: str, video: bytes) -> None:
    """Does what a worker does for a task that waits, with these bytes as its video."""
    headers, fence = {"Authorization": f"Worker {KEY}"}, {"worker_id": "w"}
    with httpx.Client(base_url=url, headers=headers) as worker:

        def ask(route: str, **body: Any) -> Any:
            return worker.post(f"/api/worker/{route}", json=body).raise_for_status().json()["data"]

        ask("next-task", **fence, item_id=item_id)
        slot = ask("presign", operation="upload", video_item_id=item_id)
        worker.put(slot["url"], content=video, headers={"Content-Type": "video/mp4"}).raise_for_status()
        path = slot["storage_path"]
        ask("report", **fence, item_id=item_id, status="completed", video_storage_path=path)


class _AppTransport(httpx.BaseTransport):
    """Calls an application without sockets; httpx has this for async clients only."""

    def __init__(self, app: FastAPI, portal: BlockingPortal) -> None:
        self._portal = portal
        self._transport = httpx.ASGITransport(app, raise_app_exceptions=False)

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """As any transport."""
        return self._portal.call(self._call, request.method, request.url, request.headers, request.read())

    async def _call(self, method, url, headers, body) -> httpx.Response:
        answer = await self._transport.handle_async_request(httpx.Request(method, url, headers=headers, content=body))
        return httpx.Response(answer.status_code, headers=answer.headers, content=await answer.aread())


@contextmanager
def app_client(config: ServerConfig, base_url: str = "http://127.0.0.1:8000", **headers: str) -> Iterator[httpx.Client]:
    """A client of an application that runs as long as the context, in this process and without a socket."""
    app = create_app(config)
    with (
        start_blocking_portal() as portal,
        portal.wrap_async_context_manager(app.router.lifespan_context(app)),
        httpx.Client(transport=_AppTransport(app, portal), base_url=base_url, headers=headers) as client,
    ):
        yield client
