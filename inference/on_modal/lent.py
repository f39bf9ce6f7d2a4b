"""Adapters for Modal's services: `modal.Dict` as Records, and a deployed function as Containers.

Modal is not imported: callers pass its objects, and its exception types, which are mapped here.
"""

from collections.abc import Awaitable
from typing import Any, TypeVar

from inference.errors import PoolUnavailable, RecordsUnavailable, one_line
from inference.fleet.containers import Live
from inference.task import Lease

T = TypeVar("T")
Errors = tuple[type[BaseException], ...]

MAX_REASON_CHARS = 300


class DictRecords:
    """Records in a `modal.Dict`, which drops entries that were not touched for a week."""

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
    """Containers behind a deployed function that takes a lease."""

    def __init__(self, function: Any, errors: Errors) -> None:
        self._function, self._errors = function, errors

    async def live(self) -> Live:
        """See Containers."""
        stats = await self._ask(self._function.get_current_stats.aio())
        return Live(running=stats.num_running_inputs, waiting=stats.backlog)

    async def send(self, lease: Lease | None) -> None:
        """See Containers."""
        await self._ask(self._function.spawn.aio(lease.model_dump(mode="json") if lease else None))

    async def _ask(self, call: Awaitable[T]) -> T:
        try:
            return await call
        except self._errors as error:
            raise PoolUnavailable(_reason(error)) from None


class RemoteFunction:
    """A deployed function that takes nothing."""

    def __init__(self, function: Any, errors: Errors) -> None:
        self._function, self._errors = function, errors

    async def spawn(self) -> None:
        """Calls it, and does not wait for its end. Raises PoolUnavailable."""
        try:
            await self._function.spawn.aio()
        except self._errors as error:
            raise PoolUnavailable(_reason(error)) from None


def _reason(error: BaseException) -> str:
    return one_line(str(error) or type(error).__name__, MAX_REASON_CHARS)
