"""What `status` tells of a fleet."""

from collections.abc import Mapping
from datetime import UTC, datetime

from inference.build.queues import open_queue
from inference.build.workers import build_ledger
from inference.errors import I2VError, PoolUnavailable
from inference.fleet.containers import Containers
from inference.fleet.readings import Readings
from inference.fleet.shape import Shape
from inference.payments.records import Records
from inference.providers import PAID, PoolName
from inference.settings import Settings


async def report(
    settings: Settings, shape: Shape, records: Records, containers: Mapping[PoolName, Containers]
) -> list[str]:
    """What a person wants to know of a fleet: pools, queue, money, the last ticks. Raises RecordsUnavailable."""
    readings, books = Readings(records), build_ledger(settings, records)
    lines = []
    for name, size in shape.sizes.items():
        known = await readings.pool(name)
        try:
            live = await containers[name].live()
            held = f"{live.running + live.waiting}"
        except PoolUnavailable as error:
            held = f"? ({error})"
        pace = f"{known.clip_s:.1f} s a clip, {known.clips} made" if known.clip_s else "no clip made yet"
        failing = f", FAILING since {_time(known.failing_at)}: {known.failing}" if known.failing else ""
        lines.append(f"{name:8} {held} of {size.slots} slots held, {pace}{failing}")
    try:
        async with open_queue(settings) as queue:
            waiting = await queue.backlog()
        lines.append(f"queue    {'the queue cannot tell how many' if waiting is None else waiting} wait")
    except I2VError as error:
        lines.append(f"queue    FAILING: {error}")
    if PAID.pool in shape.sizes:
        lines.append(
            f"money    ${await books.spent_usd():.2f} of ${settings.runway_budget_usd:.2f} spent today at Runway"
        )
    for payment in await books.payments():
        if payment.is_open:
            standing = f"{payment.standing(books.now())} {payment.external_id or ''}".rstrip()
            lines.append(f"payment  {payment.item_id} {payment.model} ${payment.cost_usd:.2f} {standing}")
    lines += [f"tick     {_time(at)} {decision}" for at, decision in (await readings.decisions())[-10:]]
    return lines


def _time(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%m-%d %H:%M:%SZ")
