"""What a platform lends, as a fleet sees it: a dictionary, functions in containers, calls that come in.

For anything with the methods of `modal.Dict` and of a Modal function; nothing of Modal is imported. Its errors are
given, and end here.
"""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any, TypeVar

from inference import by_hand, fleet, logs
from inference.board import PoolName
from inference.errors import PoolUnavailable, RecordsUnavailable, one_line
from inference.fleet import EngineName
from inference.records import Records
from inference.settings import Settings
from inference.task import GenerationRequest, Lease

T = TypeVar("T")
Errors = tuple[type[BaseException], ...]

MAX_REASON_CHARS = 300


class DictRecords:
    """Records in a platform's dictionary. `modal.Dict` forgets an entry that nobody touched for a week."""

    def __init__(self, dictionary: Any, errors: Errors) -> None:
        self._dict, self._errors = dictionary, errors

    async def add(self, key: str, value: str) -> bool:
        """See Records."""
        return bool(await self._ask(self._dict.put.aio(key, value, skip_if_exists=True)))

    async def get(self, key: str) -> str | None:
        """See Records."""
        found = await self._ask(self._dict.get.aio(key))
        return None if found is None else str(found)

    async def put(self, key: str, value: str) -> None:
        """See Records."""
        await self._ask(self._dict.put.aio(key, value))

    async def remove(self, key: str) -> None:
        """See Records."""
        await self._ask(self._dict.pop.aio(key, None))

    async def all(self) -> dict[str, str]:
        """See Records."""
        return await self._ask(self._items())

    async def _items(self) -> dict[str, str]:
        return {key: value async for key, value in self._dict.items.aio()}

    async def _ask(self, call: Awaitable[T]) -> T:
        try:
            return await call
        except self._errors as error:
            raise RecordsUnavailable(f"the platform's records: {_reason(error)}") from None


class RemoteContainers:
    """dispatch.Containers: a deployed function that takes a lease."""

    def __init__(self, function: Any, errors: Errors) -> None:
        self._function, self._errors = function, errors

    async def held(self) -> int:
        """See Containers."""
        stats = await self._ask(self._function.get_current_stats.aio())
        return int(stats.backlog + stats.num_running_inputs)

    async def send(self, lease: Lease | None) -> None:
        """See Containers."""
        await self._ask(self._function.spawn.aio(lease.model_dump(mode="json") if lease else None))

    async def _ask(self, call: Awaitable[T]) -> T:
        try:
            return await call
        except self._errors as error:
            raise PoolUnavailable(_reason(error)) from None


class Station:
    """A container's host behind calls that carry JSON: opened when it starts, closed on the way out."""

    def __init__(self, settings: Settings, records: Records) -> None:
        self._settings, self._records = settings, records
        self._stack = AsyncExitStack()

    async def open(self, pool: PoolName, engine: EngineName, *, drain: bool = False) -> None:
        """Loads the engine, and serves from then on. Raises SettingsError."""
        logs.configure(self._settings.log_level)
        opening = fleet.open_host(self._settings, pool, engine, self._records, drain=drain)
        self._host = await self._stack.enter_async_context(opening)
        # In a task of its own, which no call's end cancels; platforms run functions on asyncio.
        self._serving = asyncio.create_task(self._host.serve())

    async def run(
        self, lease: dict[str, Any] | None, *, drain: bool, retire: Callable[[], Awaitable[None]]
    ) -> list[dict[str, Any]]:
        """Runs what a call brought, and says how it ended; `retire` asks the platform for no more calls."""
        outcomes = await self._host.run(Lease.model_validate(lease) if lease else None, drain=drain)
        if self._host.broken:  # the next call gets a new container, on another machine perhaps
            await retire()
        return [outcome.model_dump(mode="json") for outcome in outcomes]

    async def render(self, request: dict[str, Any], photo: bytes | str) -> dict[str, Any]:
        """One video without a queue: {"video": …, "mp4": bytes}."""
        asked = GenerationRequest.model_validate(request)
        video, mp4 = await by_hand.render(self._settings, self._records, self._host, asked, photo)
        return {"video": video.model_dump(mode="json"), "mp4": mp4}

    async def close(self) -> None:
        """Hands back what is held."""
        await self._host.close()
        await self._serving
        await self._stack.aclose()


def _reason(error: BaseException) -> str:
    return one_line(str(error) or type(error).__name__, MAX_REASON_CHARS)
