"""What a platform lends, as a fleet sees it: a dictionary, functions in containers, an endpoint with a queue.

The first two are anything with the methods of `modal.Dict` and of a Modal function; nothing of Modal is imported. Its
errors are given, and end here. The endpoint is one of RunPod.
"""

from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import anyio
import anyio.lowlevel

from inference.dispatch import Live
from inference.errors import EngineError, PaymentInDoubt, PoolUnavailable, RecordsUnavailable, one_line
from inference.runpod_api import RunPodApi
from inference.task import Lease

T = TypeVar("T")
Errors = tuple[type[BaseException], ...]

MAX_REASON_CHARS = 300

NOTE_S = 2.0
"""How long writing down that a job was sent may take."""


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


class RunPodContainers:
    """dispatch.Containers: the workers of a RunPod endpoint. Direct invocations take up its slots, too."""

    def __init__(
        self,
        api: RunPodApi,
        *,
        execution_timeout_s: float,
        lease_s: float,
        webhook: str | None = None,
        on_sent: Callable[[str], Awaitable[None]] | None = None,
    ) -> None:
        """`lease_s`: for how long a lease waits for its first heartbeat. `on_sent` is told the id of each job."""
        self._api, self._webhook, self._on_sent = api, webhook, on_sent
        self._execution_timeout_s = execution_timeout_s
        # RunPod counts waiting and working together. A job that starts so late that its lease has ended does no harm:
        # its worker's first heartbeat is refused. One that is forgotten while it works would be made again, and again.
        self._ttl_s = lease_s + execution_timeout_s

    async def live(self) -> Live:
        """See Containers."""
        jobs = (await self._ask(self._api.health())).jobs
        return Live(running=jobs.in_progress, waiting=jobs.in_queue)

    async def send(self, lease: Lease | None) -> None:
        """See Containers.

        A job whose answer was lost counts as not sent, and its lease is handed back. If the job did arrive, its
        worker's first heartbeat finds the lease given up or taken over, and nothing is generated for it
        (`runner.py` beats before it spends anything; tests/test_cli_runpod.py has that very case).
        """
        payload = {"drain": 1} if lease is None else lease.model_dump(mode="json")
        job_id = await self._ask(
            self._api.run(
                payload, execution_timeout_s=self._execution_timeout_s, ttl_s=self._ttl_s, webhook=self._webhook
            )
        )
        if self._on_sent:
            with anyio.CancelScope(shield=True), anyio.move_on_after(NOTE_S):  # it is sent, whatever comes of the note
                await self._on_sent(job_id)

    async def _ask(self, call: Awaitable[T]) -> T:
        try:
            return await call
        except PaymentInDoubt as error:
            raise PoolUnavailable(f"{error}; its lease was handed back, and a worker that has it finds out") from None
        except EngineError as error:
            raise PoolUnavailable(str(error)) from None


class NoContainers:
    """dispatch.Containers: a pool whose tasks others take from the queue. Nothing is sent there from here."""

    async def live(self) -> Live:
        """See Containers."""
        await anyio.lowlevel.checkpoint()
        return Live(running=0, waiting=0)

    async def send(self, lease: Lease | None) -> None:  # noqa: ARG002 - the protocol's
        """See Containers."""
        await anyio.lowlevel.checkpoint()
        raise PoolUnavailable("nothing is sent there from here")


def _reason(error: BaseException) -> str:
    return one_line(str(error) or type(error).__name__, MAX_REASON_CHARS)
