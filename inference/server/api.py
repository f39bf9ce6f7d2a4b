"""The embedded queue as one FastAPI application."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Any

import anyio
import anyio.to_thread
from fastapi import APIRouter, FastAPI, Security
from fastapi.security import HTTPBearer
from pydantic import BaseModel

from inference.errors import I2VError
from inference.media import child_process
from inference.progress.hub import MemoryHub, ProgressHub
from inference.progress.web.follow import Bounds
from inference.server import answers
from inference.server.answers import Answer, Failure, failure
from inference.server.client_api import client_routes
from inference.server.config import ServerConfig
from inference.server.docs import BrowserRules, add_docs
from inference.server.events_api import event_routes, stream_routes
from inference.server.guard import Guard
from inference.server.live import Live
from inference.server.objects import ObjectStore, Signer
from inference.server.overview_api import overview_routes
from inference.server.page.routes import page_routes
from inference.server.proxied import Proxied
from inference.server.rows.store import Store
from inference.server.storage_api import Presigner, StorageFailure, storage_routes
from inference.server.submit_api import submit_routes
from inference.server.tidy import keep_tidy
from inference.server.worker_api import presign_routes, worker_routes
from inference.server.workers import Workers

DESCRIPTION = """
Photos wait here to become short videos. Programs add them under `/api/tasks`; workers lease them under
`/api/worker`, in the dialect of Life-is-Short, and move photos and videos through presigned URLs under `/storage`.

Answers are `{"success": true, "data": …}` or `{"success": false, "error": "text"}`. Where the server has a key
(`WORKER_API_KEY`), calls send it as `Authorization: Bearer KEY`; it belongs on servers, never into a page.
"""

TAGS = [
    {"name": "tasks", "description": "A photo becomes tasks, and each task a video: what an application calls."},
    {"name": "groups", "description": "All tasks that were submitted under one name."},
    {
        "name": "progress",
        "description": "Live: `new EventSource('/events/PROJECT?token=…')`, or a WebSocket at `/ws/PROJECT?token=…`, "
        "where PROJECT is a group's id, or `queue`.",
    },
    {"name": "worker", "description": "What workers call. The dialect of Life-is-Short, and extensions of ours."},
    {"name": "storage", "description": "Presigned URLs, as Supabase has them: the token in the query is the only key."},
    {"name": "health", "description": "For monitors."},
]
"""The groups of the API page, in its order."""

KEY = HTTPBearer(
    scheme_name="key",
    auto_error=False,  # Guard checks the key, before the body is read
    description="`Authorization: Bearer KEY`, or `Authorization: Worker KEY` as the contract spells it.",
)


class Health(BaseModel):
    """The parts of the server that work."""

    database: str
    storage: str


def create_app(
    config: ServerConfig,
    hub: ProgressHub | None = None,
    bounds: Bounds = Bounds(),  # noqa: B008 - frozen
) -> FastAPI:
    """The application over its database and folder, which are opened here and closed when it shuts down.

    `hub`: where its events go, and where listeners get them; whoever gives one closes it. In memory unless given.
    `bounds`: of listeners.
    Raises SettingsError, QueueUnavailable, StorageUnavailable, DiskFull.
    """
    store = Store(config.database_url)
    is_ours = hub is None
    hub = MemoryHub() if hub is None else hub
    live, workers = Live(store, hub), Workers()
    live.seed()
    store.tell(live.changed, live.deleted)
    objects = ObjectStore(config.storage_dir)
    signer = Signer(config.signing_secret)
    presigner = Presigner(config, signer)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(keep_tidy, store, objects, config)
            yield
            tasks.cancel_scope.cancel()
        if is_ours:
            hub.close()
        child_process.stop()  # a thread that waits for a decoder would keep the process from ending
        await anyio.to_thread.run_sync(store.close)

    app = FastAPI(
        title="i2v queue",
        version=version("serverless-i2v"),
        description=DESCRIPTION,
        openapi_tags=TAGS,
        lifespan=lifespan,
        docs_url=None,  # FastAPI's own pages load scripts from other hosts
        redoc_url=None,
        strict_content_type=False,  # not all workers send a media type with their JSON
    )
    answers.install(app)
    key = [Security(KEY)] if config.api_key else []
    app.include_router(worker_routes(config, store, objects, workers), dependencies=key)
    app.include_router(presign_routes(config, store, objects, presigner), dependencies=key)
    app.include_router(submit_routes(config, store, objects, live), dependencies=key)
    app.include_router(client_routes(config, store, objects, presigner, live), dependencies=key)
    app.include_router(overview_routes(store, live, workers), dependencies=key)
    app.include_router(event_routes(config), dependencies=key)
    app.router.routes.extend(stream_routes(hub, live.snapshot, bounds))
    app.include_router(storage_routes(config, objects, signer))
    app.include_router(_health_routes(store, objects))
    app.include_router(page_routes(config, store, objects, live, workers))
    add_docs(app)
    app.add_middleware(Guard, config=config)
    app.add_middleware(BrowserRules)
    app.add_middleware(Proxied)
    _describe(app)
    return app


def _health_routes(store: Store, objects: ObjectStore) -> APIRouter:
    routes = APIRouter(tags=["health"])

    @routes.head("/healthz", include_in_schema=False)  # monitors send HEAD
    @routes.get(
        "/healthz", summary="Check database and storage", responses=answers.errors(503), response_model=Answer[Health]
    )
    def healthz() -> object:
        """Whether rows and objects can be written. Needs no key and reveals no secret."""
        try:
            store.check()
            objects.check()
        except I2VError as error:
            return failure(503, str(error))
        return Answer(data=Health(database="ok", storage="ok"))

    return routes


def _describe(app: FastAPI) -> None:
    """Completes the OpenAPI description: with the failures, and without 422, since malformed requests get 400 here."""
    describe = app.openapi

    def described() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = describe()
            for path in schema["paths"].values():
                for operation in path.values():
                    operation["responses"].pop("422", None)
            for name in ("HTTPValidationError", "ValidationError"):
                schema["components"]["schemas"].pop(name, None)
            for model in (Failure, StorageFailure):
                schema["components"]["schemas"][model.__name__] = model.model_json_schema(mode="serialization")
        return describe()

    app.openapi = described  # type: ignore[method-assign]  # FastAPI's documented way
