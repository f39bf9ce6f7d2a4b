"""The dispatcher of a fleet, built from settings and from what a platform lends: records, and pools of containers."""

import functools
import hashlib
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from inference.build.engines import price_usd
from inference.build.queues import open_queue
from inference.build.workers import build_ledger
from inference.errors import SettingsError
from inference.fleet.containers import Containers
from inference.fleet.dispatch import Dispatcher
from inference.fleet.readings import Readings
from inference.fleet.shape import Shape, for_a_cold_start, rules
from inference.payments.records import Records
from inference.providers import PROVIDERS, PoolName, WorkerType
from inference.queues.base import TaskQueue
from inference.settings import Settings


@functools.cache
def version(settings: Settings) -> str:
    """A name for this code with these settings: after a deployment, containers of the one before take no more."""
    digest = hashlib.sha256(json.dumps(settings.for_containers(), sort_keys=True).encode())
    folder = Path(__file__).parents[1]  # the whole package
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


@asynccontextmanager
async def open_dispatcher(
    settings: Settings,
    shape: Shape,
    records: Records,
    containers: Mapping[PoolName, Containers],
    readings: Readings | None = None,
) -> AsyncIterator[Dispatcher]:
    """What the cron runs. `readings`: where the records hold those of more than one fleet.

    Raises SettingsError, RecordsUnavailable.
    """
    own = for_a_cold_start(settings, shape)
    if settings.queue == "gmanimato":
        raise SettingsError(
            f"I2V_QUEUE={settings.queue}: this queue takes no task back, so none is taken for a container that may "
            "never start; run `i2v work` on a box"
        )
    worker_types: list[WorkerType | None] = [settings.worker_type]
    if settings.queue_knows_worker_type:  # those that have to be paid for first, before others overflow to there
        worker_types = [each.worker_type for each in sorted(PROVIDERS, key=lambda each: not each.is_paid)]
    async with AsyncExitStack() as stack:
        queues: dict[WorkerType | None, TaskQueue] = {
            each: await stack.enter_async_context(open_queue(own.model_copy(update={"worker_type": each})))
            for each in worker_types
        }
        pools = {name: (size, containers[name]) for name, size in shape.sizes.items()}
        readings = readings or Readings(records)
        await readings.deployed(version(settings))
        yield Dispatcher(
            queues,
            pools,
            readings,
            build_ledger(settings, records),
            rules(settings, shape),
            price_usd=functools.partial(price_usd, settings),
        )
