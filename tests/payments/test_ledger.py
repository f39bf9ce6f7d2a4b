"""The books: one open payment an item, nothing forgotten, and a limit for the day. In virtual time."""

import anyio
import pytest

from inference.errors import BudgetSpent, ItemMissing, LeaseLost, PaymentInDoubt, RecordsUnavailable, WrongState
from inference.payments.ledger import CREATION_S, FOLLOWED_S, KEPT_S, RESERVED_S, Ledger, digest
from inference.payments.records import MemoryRecords
from tests.support.virtual import virtual_time

NOON = 1_790_000_000 // 86_400 * 86_400 + 43_200.0
"""Of some day, in seconds since 1970."""


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = NOON

    def __call__(self) -> float:
        """Seconds since 1970."""
        return self.now


def books(**options) -> tuple[Ledger, MemoryRecords, Clock]:
    """A ledger with what is beneath it."""
    records, clock = MemoryRecords(), Clock()
    return Ledger(records, clock=clock, **options), records, clock


async def paid(ledger: Ledger, item: str, cost_usd: float = 0.25, request: str = "r", holder: str = "w.1"):
    """An item with a created payment."""
    purchase = ledger.purchase(item, holder)
    assert await purchase.resume(request) is None
    assert await purchase.intend(request, model="m", cost_usd=cost_usd)
    await purchase.created(f"task-of-{item}")
    return purchase


@virtual_time
async def test_a_payment_goes_its_way():
    """Intended, created, delivered, each written down at once."""
    ledger, _, _ = books()
    purchase = ledger.purchase("item", "w.1")
    assert await purchase.resume("r") is None
    assert await purchase.intend("r", model="m", cost_usd=0.25)
    [payment] = await ledger.payments()
    assert (payment.status, payment.at, payment.holder, payment.cost_usd) == ("intended", NOON, "w.1", 0.25)
    await purchase.created("task-1", 0.2)
    [payment] = await ledger.payments()
    assert (payment.status, payment.external_id, payment.cost_usd) == ("created", "task-1", 0.2)
    assert await purchase.is_ours()
    await purchase.end("delivered")
    [payment] = await ledger.payments()
    assert (payment.status, payment.is_open) == ("delivered", False)
    assert not await purchase.is_ours()


@virtual_time
async def test_a_successor_takes_over_what_was_created():
    """And the one before has nothing to say any more."""
    ledger, _, _ = books()
    first = await paid(ledger, "item")
    second = ledger.purchase("item", "w.2")
    assert (await second.resume("r")).external_id == "task-of-item"
    assert (await second.is_ours(), await first.is_ours()) == (True, False)
    await first.end("cancelled")
    assert [it.status for it in await ledger.payments()] == ["created"]
    await second.end("delivered")
    assert [it.status for it in await ledger.payments()] == ["delivered"]


@virtual_time
async def test_one_of_two_at_once_pays():
    """The other is told to look again, and finds what was paid for."""
    ledger, _, _ = books()
    one, other = ledger.purchase("item", "w.1"), ledger.purchase("item", "w.2")
    assert (await one.resume("r"), await other.resume("r")) == (None, None)
    assert await one.intend("r", model="m", cost_usd=1)
    assert not await other.intend("r", model="m", cost_usd=1)
    await one.created("task-1")
    assert (await other.resume("r")).external_id == "task-1"


@virtual_time
async def test_whoever_may_be_paying_is_waited_for():
    """Until its answer could not come any more."""
    ledger, _, _ = books()
    one, other = ledger.purchase("item", "w.1"), ledger.purchase("item", "w.2")
    await one.resume("r")
    await one.intend("r", model="m", cost_usd=1)

    async def answer():
        await anyio.sleep(40)
        await one.created("task-1")

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(answer)
        assert (await other.resume("r")).external_id == "task-1"


@pytest.mark.parametrize("holder", ["w.1", "w.2"])
@virtual_time
async def test_an_intent_of_somebody_who_is_gone_is_in_doubt(holder):
    """Also under the same lease: the process before may have been stopped a moment ago, with an answer to come."""
    ledger, _, _ = books()
    gone = ledger.purchase("item", "w.1")
    await gone.resume("r")
    await gone.intend("r", model="m", cost_usd=1)
    started = anyio.current_time()
    with pytest.raises(PaymentInDoubt, match="i2v payments --forget item"):
        await ledger.purchase("item", holder).resume("r")
    assert CREATION_S <= anyio.current_time() - started < CREATION_S + 5
    assert [it.status for it in await ledger.payments()] == ["intended"]


@virtual_time
async def test_ones_own_intent_is_in_doubt_at_once():
    """Its call has returned without an answer: there is nobody to wait for."""
    ledger, _, _ = books()
    purchase = ledger.purchase("item", "w.1")
    await purchase.resume("r")
    await purchase.intend("r", model="m", cost_usd=1)
    started = anyio.current_time()
    with pytest.raises(PaymentInDoubt):
        await purchase.resume("r")
    assert anyio.current_time() == started


@virtual_time
async def test_replays_are_counted_over_all_leases():
    """One more is one more for the request, not for each that tries."""
    ledger, _, _ = books()
    for number in range(2):
        purchase = ledger.purchase("item", f"w.{number}")
        assert await purchase.resume("r", replays=1) is None
        assert await purchase.intend("r", model="m", cost_usd=1)
    with pytest.raises(PaymentInDoubt):
        await ledger.purchase("item", "w.3").resume("r", replays=1)
    assert [it.status for it in await ledger.payments()] == ["in_doubt", "intended"]
    assert await ledger.spent_usd() == 2


@virtual_time
async def test_what_is_known_to_be_in_doubt_is_not_waited_for():
    """Whoever lost the answer said so in the books: the next holder hears of it at once."""
    ledger, _, _ = books()
    purchase = ledger.purchase("item", "w.1")
    assert await purchase.resume("r") is None
    assert await purchase.intend("r", model="m", cost_usd=0.25)
    for holder in (purchase, ledger.purchase("item", "w.2")):
        started = anyio.current_time()
        with pytest.raises(PaymentInDoubt, match="--forget item"):
            await holder.resume("r")
        assert anyio.current_time() == started


@virtual_time
async def test_an_intent_whose_answer_was_lost_on_the_way_to_the_records_is_still_ours():
    """The records' client asked again by itself and was told that the key is taken: by its own first try."""

    class Repeating(MemoryRecords):
        async def add(self, key: str, value: str) -> bool:
            await super().add(key, value)
            return await super().add(key, value)

    ledger = Ledger(Repeating(), clock=Clock())
    purchase = ledger.purchase("item", "w.1")
    assert await purchase.resume("r") is None
    assert await purchase.intend("r", model="m", cost_usd=0.25)


@virtual_time
async def test_a_person_may_forget_what_is_in_doubt():
    """It stays in the books, and the item may be paid for again."""
    ledger, _, clock = books()
    purchase = ledger.purchase("item", "w.1")
    await purchase.resume("r")
    await purchase.intend("r", model="m", cost_usd=1)
    clock.now += CREATION_S + 1
    assert (await ledger.forget("item")).status == "intended"
    with pytest.raises(WrongState, match="no payment of item is open: the last one is forgotten"):
        await ledger.forget("item")
    with pytest.raises(ItemMissing, match="no payment of unknown"):
        await ledger.forget("unknown")
    assert await ledger.purchase("item", "w.2").resume("r") is None
    assert await ledger.spent_usd() == 1


@virtual_time
async def test_what_may_be_in_flight_is_not_forgotten():
    """Its answer may still come: the next lease would pay for a second one."""
    ledger, _, clock = books()
    purchase = ledger.purchase("item", "w.1")
    await purchase.resume("r")
    await purchase.intend("r", model="m", cost_usd=1)
    clock.now += CREATION_S
    with pytest.raises(WrongState, match=r"may be in flight, .* may be forgotten after \d{4}-\d\d-\d\d 12:01:30 UTC"):
        await ledger.forget("item")
    [payment] = await ledger.payments()
    assert (payment.status, payment.standing(clock.now)) == ("intended", "being paid")
    clock.now += 1
    assert payment.standing(clock.now) == "in doubt"
    await ledger.forget("item")


@virtual_time
async def test_a_clip_that_somebody_waits_for_is_not_forgotten():
    """Counted from whoever took it over last; what nobody has fetched for an hour may be given up."""
    ledger, _, clock = books()
    await paid(ledger, "item")
    clock.now += FOLLOWED_S + 1
    await ledger.purchase("item", "w.2").resume("r")
    clock.now += FOLLOWED_S
    with pytest.raises(WrongState, match="may be in flight"):
        await ledger.forget("item")
    clock.now += 1
    assert (await ledger.forget("item")).external_id == "task-of-item"


@virtual_time
async def test_what_is_known_to_be_lost_is_in_doubt_at_once():
    """Its call has returned without an answer: nothing is in flight, whatever the time."""
    ledger, _, clock = books()
    purchase = ledger.purchase("item", "w.1")
    await purchase.resume("r")
    await purchase.intend("r", model="m", cost_usd=1)
    with pytest.raises(PaymentInDoubt):
        await purchase.resume("r")
    [payment] = await ledger.payments()
    assert payment.standing(clock.now) == "in doubt"
    assert (await ledger.forget("item")).number == 0


@virtual_time
async def test_what_was_withdrawn_was_never_there():
    """And what was created cannot be withdrawn."""
    ledger, records, _ = books()
    purchase = ledger.purchase("item", "w.1")
    await purchase.resume("r")
    await purchase.intend("r", model="m", cost_usd=1)
    await purchase.withdraw()
    assert await records.all() == {}
    purchase = await paid(ledger, "item")
    with pytest.raises(RuntimeError):
        await purchase.withdraw()
    assert [it.status for it in await ledger.payments()] == ["created"]


@virtual_time
async def test_who_wakes_up_late_harms_no_successor():
    """A process that was paused between intent and answer, given up by a person, and overtaken."""
    ledger, _, clock = books()
    late = ledger.purchase("item", "w.1")
    await late.resume("r")
    await late.intend("r", model="m", cost_usd=1)
    clock.now += CREATION_S + 1
    await ledger.forget("item")
    successor = await paid(ledger, "item", holder="w.2")
    await late.created("task-late", 0.9)
    assert not await late.is_ours()
    await late.end("cancelled")
    assert [(it.status, it.external_id) for it in await ledger.payments()] == [
        ("in_doubt", "task-late"),  # what it paid for is in the books all the same
        ("created", "task-of-item"),
    ]
    assert await successor.is_ours()


@virtual_time
async def test_who_withdraws_late_harms_no_successor():
    """The successor's payment is another record."""
    ledger, _, clock = books()
    late = ledger.purchase("item", "w.1")
    await late.resume("r")
    await late.intend("r", model="m", cost_usd=1)
    clock.now += CREATION_S + 1
    await ledger.forget("item")
    await paid(ledger, "item", holder="w.2")
    await late.withdraw()
    assert [it.status for it in await ledger.payments()] == ["created"]
    assert (await ledger.purchase("item", "w.3").resume("r")).external_id == "task-of-item"


@pytest.mark.parametrize("ending", ["delivered", "cancelled"])
@virtual_time
async def test_what_ended_under_another_lease_meanwhile_is_not_paid_for_again(ending):
    """The queue had handed the task to two. A lease that began afterwards is somebody's wish."""
    ledger, _, clock = books()
    slow = ledger.purchase("item", "w.slow")
    clock.now += 1
    await (await paid(ledger, "item")).end(ending)
    with pytest.raises(LeaseLost, match=f"w.1 has {ending} it meanwhile"):
        await slow.resume("r")
    clock.now += 1
    assert await ledger.purchase("item", "w.3").resume("r") is None


@virtual_time
async def test_failures_are_remembered_by_request():
    """Over leases, until the item asks for something else, or something came of it."""
    ledger, _, _ = books()
    purchase = await paid(ledger, "item")
    await purchase.end("failed", "INTERNAL", cost_usd=0)
    assert purchase.failures == ("INTERNAL",)
    successor = ledger.purchase("item", "w.2")
    assert (await successor.resume("r"), successor.failures) == (None, ("INTERNAL",))
    await successor.intend("r", model="m", cost_usd=1)
    await successor.created("task-2")
    await successor.end("failed", "SAFETY")
    assert [it.failures for it in await ledger.payments()] == [("INTERNAL",), ("INTERNAL", "SAFETY")]
    third = ledger.purchase("item", "w.3")
    assert (await third.resume("r"), third.failures) == (None, ("INTERNAL", "SAFETY"))
    assert (await third.resume("other"), third.failures) == (None, ())
    assert await ledger.spent_usd() == 1


@virtual_time
async def test_the_budget_is_of_a_day_in_utc():
    """All that was intended today counts, whatever became of it, at its last known price."""
    ledger, _, clock = books(budget_usd=1.0)
    await paid(ledger, "a", 0.5)
    failed = await paid(ledger, "b", 0.4)
    with pytest.raises(BudgetSpent, match=r"\$0.90 of today's \$1.00 are spent, and this would cost \$0.25"):
        await paid(ledger, "c")
    assert len(await ledger.payments()) == 2
    await failed.end("failed", "INTERNAL", cost_usd=0)
    await paid(ledger, "c", 0.5)  # to the cent
    clock.now += 43_199
    with pytest.raises(BudgetSpent):
        await paid(ledger, "d")
    clock.now += 2
    await paid(ledger, "d")
    assert await ledger.spent_usd() == 0.25


@virtual_time
async def test_many_at_once_stay_within_the_budget():
    """In one process and in several, which share nothing but the records."""
    records = YieldingRecords()
    ledgers = [Ledger(records, budget_usd=1.0, clock=Clock()) for _ in range(3)]
    spent = []

    async def pay(number):
        try:
            await paid(ledgers[number % 3], f"item-{number}")
        except BudgetSpent:
            return
        spent.append(number)

    async with anyio.create_task_group() as tasks:
        for number in range(12):
            tasks.start_soon(pay, number)
    assert len(spent) <= 4
    assert await ledgers[0].spent_usd() == 0.25 * len(spent)


@virtual_time
async def test_money_is_set_aside_until_it_is_spent():
    """By a dispatcher, for a task on its way; not for ever."""
    ledger, _, clock = books(budget_usd=1.0)
    await ledger.reserve("a", 0.5)
    await ledger.reserve("b", 0.5)
    assert await ledger.spent_usd() == 1.0
    await paid(ledger, "a", 0.5)  # its own money does not stand in its way
    assert await ledger.spent_usd() == 1.0
    with pytest.raises(BudgetSpent):
        await paid(ledger, "c")
    await ledger.unreserve("b")
    assert await ledger.spent_usd() == 0.5
    await ledger.reserve("b", 0.5)
    clock.now += RESERVED_S
    assert await ledger.spent_usd() == 0.5
    await ledger.reserve("a", 0.5)  # sent once more: what is open is not counted twice
    assert await ledger.spent_usd() == 0.5
    await ledger.purchase("a", "w.2").resume("r")
    assert "reserved/a" not in await ledger._records.all()


@virtual_time
async def test_old_payments_are_dropped_and_open_ones_kept():
    """Whatever their age."""
    ledger, _, clock = books()
    await (await paid(ledger, "a")).end("delivered")
    await paid(ledger, "b")
    clock.now += KEPT_S + 1
    await (await paid(ledger, "c")).end("delivered")
    await ledger.prune()
    assert [it.item_id for it in await ledger.payments()] == ["b", "c"]


@virtual_time
async def test_other_records_beside_the_books_are_left_alone():
    """A fleet keeps its readings in the same place."""
    ledger, records, _ = books()
    await records.put("board/gpu", "anything")
    await paid(ledger, "a")
    await ledger.prune()
    assert "board/gpu" in await records.all()


@pytest.mark.parametrize("key", ["payment/a/0", "reserved/a"])
@virtual_time
async def test_books_that_cannot_be_read_pay_for_nothing(key):
    """The key is named, for whoever has to look."""
    ledger, records, _ = books()
    await records.put(key, "{}")
    with pytest.raises(RecordsUnavailable, match=key):
        await paid(ledger, "b")


@pytest.mark.parametrize("method", ["add", "all", "remove"])
@virtual_time
async def test_an_intent_that_was_half_written_is_taken_back(method):
    """Nothing was sent, so nothing is in doubt: another machine may pay."""
    ledger, records, _ = books()
    purchase = ledger.purchase("item", "w.1")
    await purchase.resume("r")
    real, calls = getattr(records, method), []

    async def written_and_not_heard_of(*arguments):
        result = await real(*arguments)
        calls.append(method)
        if len(calls) == (2 if method == "all" else 1):
            raise RecordsUnavailable("no answer")
        return result

    setattr(records, method, written_and_not_heard_of)
    with pytest.raises(RecordsUnavailable):
        await purchase.intend("r", model="m", cost_usd=1)
    assert await ledger.payments() == []


@virtual_time
async def test_an_intent_that_was_interrupted_is_taken_back():
    """A worker that is stopped at this moment has sent nothing, and will not."""
    records = YieldingRecords()
    ledger = Ledger(records, clock=Clock())
    purchase = ledger.purchase("item", "w.1")
    await purchase.resume("r")
    with anyio.move_on_after(0.35) as scope:  # within the second look at the budget
        await purchase.intend("r", model="m", cost_usd=1)
    assert scope.cancelled_caught
    assert await ledger.payments() == []


@virtual_time
async def test_an_id_is_kept_where_the_books_break():
    """Written again when they work again."""
    ledger, records, _ = books()
    purchase = ledger.purchase("item", "w.1")
    await purchase.resume("r")
    await purchase.intend("r", model="m", cost_usd=1)
    put, records.put = records.put, broken
    with pytest.raises(RecordsUnavailable):
        await purchase.created("task-1")
    records.put = put
    await purchase.created("task-1", 0.5)
    assert [(it.external_id, it.cost_usd) for it in await ledger.payments()] == [("task-1", 0.5)]


def test_a_digest_is_of_all_that_was_asked():
    """In any order, and of nothing else."""
    assert digest(a=1, b="x") == digest(b="x", a=1) != digest(a=1, b="y")


async def broken(*_: object) -> None:
    """A method of records that are gone."""
    raise RecordsUnavailable("the disk is gone")


class YieldingRecords(MemoryRecords):
    """Records to which the way takes a while."""

    async def add(self, key: str, value: str) -> bool:
        """See Records."""
        await anyio.sleep(0.1)
        return await super().add(key, value)

    async def all(self) -> dict[str, str]:
        """See Records."""
        await anyio.sleep(0.1)
        kept = await super().all()
        await anyio.sleep(0.1)
        return kept
