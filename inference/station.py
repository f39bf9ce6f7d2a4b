"""A container's host behind calls that carry JSON, as platforms make them."""

import asyncio
import secrets
from contextlib import AsyncExitStack
from typing import Any

import anyio.to_thread
from pydantic import ValidationError

from inference import logs
from inference.board import PoolName
from inference.build import open_storage
from inference.engines.base import Job
from inference.errors import I2VError
from inference.fleet import EngineName, ledger, open_host
from inference.host import Host
from inference.media import photo as photos
from inference.progress import ProgressTracker, plan
from inference.records import Records
from inference.scratch import scratch_folder
from inference.settings import Settings
from inference.task import GenerationRequest, Lease, Video, explain


class Station:
    """Opened when a container starts, closed on its way out."""

    def __init__(self, settings: Settings, records: Records) -> None:
        self._settings, self._records = settings, records
        self._stack = AsyncExitStack()

    async def open(self, pool: PoolName, engine: EngineName, *, drain: bool = False) -> None:
        """Loads the engine, and serves from then on. Raises SettingsError."""
        logs.configure(self._settings.log_level)
        opening = open_host(self._settings, pool, engine, self._records, drain=drain)
        self._host = await self._stack.enter_async_context(opening)
        # In a task of its own, which no call's end cancels; platforms run functions on asyncio.
        self._serving = asyncio.create_task(self._host.serve())

    @property
    def broken(self) -> bool:
        """Whether the next call should get a new container, on another machine perhaps."""
        return self._host.broken

    async def run(self, lease: dict[str, Any] | None, *, drain: bool = False) -> list[dict[str, Any]]:
        """Runs what a call brought, and says how it ended."""
        outcomes = await self._host.run(Lease.model_validate(lease) if lease else None, drain=drain)
        return [outcome.model_dump(mode="json") for outcome in outcomes]

    async def render(self, request: dict[str, Any], photo: bytes | str) -> dict[str, Any]:
        """One video without a queue, {"video": …, "mp4": bytes}, or {"error": one line}."""
        try:
            asked = GenerationRequest.model_validate(request)
            video, mp4 = await render(self._settings, self._records, self._host, asked, photo)
        except ValidationError as error:
            return {"error": explain(error)}
        except I2VError as error:
            return {"error": str(error)}
        return {"video": video.model_dump(mode="json"), "mp4": mp4}

    async def close(self) -> None:
        """Hands back what is held."""
        await self._host.close()
        await self._serving
        await self._stack.aclose()


async def render(
    settings: Settings, records: Records, host: Host, request: GenerationRequest, photo: bytes | str
) -> tuple[Video, bytes]:
    """One video without a queue, of a photo's bytes or of what is at a URL; and the bytes of its mp4.

    Raises StorageError, InvalidPhoto, MachineFault, EngineError.
    """
    name = f"by-hand-{secrets.token_hex(6)}"
    purchase = ledger(settings, records).purchase(name, name)
    tracker = ProgressTracker(plan(host.stages), logs.stages(name))
    with scratch_folder(settings.temp_dir) as folder:
        path = folder / "photo"
        tracker.update("download")
        if isinstance(photo, bytes):
            path.write_bytes(photo)
        else:
            async with open_storage(settings) as storage:
                await storage.download(photo, path)
        await anyio.to_thread.run_sync(photos.verify, path)
        video = await host.render(request, path, folder, Job(tracker, purchase))
        mp4 = video.path.read_bytes()
    await purchase.end("delivered")
    return video, mp4
