"""A fleet as a person sees it; what its parts do together is in `tests/simulation/` and `tests/on_modal/`."""

import pytest

from inference.errors import I2VError
from inference.fleet import report, shape
from inference.on_modal import one_off
from inference.payments.ledger import CREATION_S, Ledger
from inference.payments.records import MemoryRecords
from inference.settings import Settings

pytestmark = pytest.mark.anyio

NOWHERE = shape.Shape(sizes={}, startup_timeout_s=1)
"""No pools: only the books are looked at."""


async def intended(records: MemoryRecords, item_id: str, ago_s: float) -> None:
    """A payment whose answer has not come."""
    clock = Ledger(records).now() - ago_s
    purchase = Ledger(records, clock=lambda: clock).purchase(item_id, "w.1")
    await purchase.resume("r")
    await purchase.intend("r", model="gen4_turbo", cost_usd=0.25)


async def test_a_payment_in_flight_is_no_payment_in_doubt():
    """As `i2v payments` has it: in doubt is what a person has to look into, and no answer can come any more."""
    records = MemoryRecords()
    await intended(records, "late", CREATION_S + 5)
    await intended(records, "now", 0)
    told = await report.report(Settings.isolated(), NOWHERE, records, {})
    assert [line for line in told if line.startswith("payment")] == [
        "payment  late gen4_turbo $0.25 in doubt",
        "payment  now gen4_turbo $0.25 being paid",
    ]


def test_what_a_fleet_refuses_is_an_error():
    """`--forget` of an item that nobody knows would otherwise look as if it had been done."""
    assert one_off.lines(["gpu"]) == ["gpu"]
    with pytest.raises(I2VError, match="no payment of it"):
        one_off.lines({"error": "no payment of it is in the books"})
