"""A container's host behind calls that carry JSON, as platforms make them."""

import asyncio
import hashlib
import secrets
from contextlib import AsyncExitStack
from typing import Any

import anyio.to_thread
from pydantic import ValidationError

from inference import logs
from inference.board import PoolName
from inference.engines.base import Job
from inference.errors import I2VError
from inference.fleet import EngineName, ledger, open_host
from inference.host import Host
from inference.ledger import digest
from inference.media import photo as photos
from inference.progress import ProgressTracker, plan
from inference.records import Records
from inference.scratch import put, scratch_folder
from inference.settings import Settings
from inference.task import GenerationRequest, Lease, Video, explain


class Station:
    """Opened when a container starts, closed on its way out."""

    def __init__(self, settings: Settings, records: Records) -> None:
        self._settings, self._records = settings, records
        self._stack = AsyncExitStack()

    async def open(self, pool: PoolName, engine: EngineName, *, drain: bool = False, by_hand: bool = False) -> None:
        """Loads the engine, and serves from then on. Raises SettingsError."""
        logs.configure(self._settings.log_level)
        self._settings.warn_of_unread()
        opening = open_host(self._settings, pool, engine, self._records, drain=drain, by_hand=by_hand)
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

    async def render(self, request: dict[str, Any], photo: bytes) -> dict[str, Any]:
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
    settings: Settings, records: Records, host: Host, request: GenerationRequest, photo: bytes
) -> tuple[Video, bytes]:
    """One video of a photo without a queue; and the bytes of its mp4.

    The same request of the same photo goes on with what an interrupted one paid for. Raises InvalidPhoto,
    MachineFault, EngineError.
    """
    asked = digest(photo=hashlib.sha256(photo).hexdigest(), **request.model_dump(mode="json"))
    purchase = ledger(settings, records).purchase(f"by-hand-{asked}", f"by-hand.{secrets.token_hex(6)}")
    tracker = ProgressTracker(plan(host.stages), logs.stages(f"by-hand-{asked}"))
    with scratch_folder(settings.temp_dir) as folder:
        path = folder / "photo"
        await anyio.to_thread.run_sync(put, path, photo)
        await anyio.to_thread.run_sync(photos.verify, path)
        video = await host.render(request, path, folder, Job(tracker, purchase))
        mp4 = video.path.read_bytes()
    await purchase.end("delivered")
    return video, mp4
