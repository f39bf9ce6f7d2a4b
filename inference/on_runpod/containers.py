"""RunPod's endpoint as containers of a fleet."""

from collections.abc import Awaitable, Callable
from typing import TypeVar

import anyio
import anyio.lowlevel

from inference.errors import EngineError, JobInDoubt, PoolUnavailable
from inference.fleet.containers import Live, Sized
from inference.fleet.shape import INPUTS, Shape
from inference.on_runpod.api import RunPodApi
from inference.providers import DEFAULT, PAID, PoolName
from inference.settings import Settings
from inference.task import Lease

T = TypeVar("T")

NOTE_S = 2.0
"""How long writing down that a job was sent may take."""


class RunPodContainers:
    """Containers: the workers of a RunPod endpoint. Direct requests take up its slots, too."""

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
        (`runner.py` beats before it spends anything; tests/commands/test_runpod.py has that very case).
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
        except JobInDoubt as error:
            raise PoolUnavailable(f"{error}; its lease was handed back, and a worker that has it finds out") from None
        except EngineError as error:
            raise PoolUnavailable(str(error)) from None


class NoContainers:
    """Containers: a pool whose tasks others take from the queue. Nothing is sent there from here."""

    async def live(self) -> Live:
        """See Containers."""
        await anyio.lowlevel.checkpoint()
        return Live(running=0, waiting=0)

    async def send(self, lease: Lease | None) -> None:  # noqa: ARG002 - the protocol's
        """See Containers."""
        await anyio.lowlevel.checkpoint()
        raise PoolUnavailable("nothing is sent there from here")


def on_runpod(settings: Settings) -> Shape:
    """The workers of an endpoint.

    With a Runway key, other workers take Runway tasks, so that pool is declared with 0 slots and is sent none.
    """
    gpus = settings.runpod_max_workers
    sizes: dict[PoolName, Sized] = {DEFAULT.pool: Sized(slots=gpus * INPUTS, engines=gpus)}
    if settings.runway_key:
        sizes[PAID.pool] = Sized(slots=0, engines=1)
    return Shape(sizes=sizes, startup_timeout_s=settings.runpod_init_timeout_s)
