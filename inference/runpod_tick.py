"""One tick for a RunPod endpoint, whatever schedules it: the dispatcher, and a lock so that it is alone here."""

import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

from inference import fleet
from inference.board import PoolName
from inference.dispatch import Containers, Dispatcher
from inference.errors import RecordsUnavailable
from inference.platform import NoContainers, RunPodContainers
from inference.records import SqliteRecords
from inference.runpod_api import RunPodApi
from inference.settings import Settings

if sys.platform != "win32":
    import fcntl


@asynccontextmanager
async def open_dispatcher(settings: Settings, api: RunPodApi) -> AsyncIterator[Dispatcher]:
    """What ticks. Raises SettingsError, RecordsUnavailable."""
    shape = fleet.on_runpod(settings)
    workers = RunPodContainers(
        api,
        execution_timeout_s=fleet.execution_limit_s(settings),
        lease_s=shape.lease_s(settings),
        webhook=settings.runpod_webhook,
    )
    pools: dict[PoolName, Containers] = {"gpu": workers, "runway": NoContainers()}
    async with fleet.open_dispatcher(settings, shape, SqliteRecords(settings.ledger_path), pools) as dispatcher:
        yield dispatcher


@contextmanager
def alone(settings: Settings) -> Iterator[bool]:
    """Whether nobody else on this machine dispatches to the endpoint. Raises RecordsUnavailable.

    Two that look at it at the same moment would each fill its free slots; no task is sent twice even then.
    """
    path = settings.ledger_path.with_name(f"dispatch-{settings.runpod_endpoint_id}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w")
    except OSError as error:
        raise RecordsUnavailable(f"I2V_LEDGER: {path} cannot be written: {error.strerror}") from None
    with file:
        is_alone = True
        if sys.platform != "win32":
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                is_alone = False
            except OSError:  # a file system without locks is as good as another machine
                pass
        yield is_alone
