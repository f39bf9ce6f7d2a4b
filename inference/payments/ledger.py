"""What was paid for: one payment for each task, whatever is lost on the way.

A provider that takes no idempotency key would take our money twice for a request that is sent twice. So every paid
call leaves two marks in records that outlive the process: the intent before it is sent, and the provider's id as soon
as it is known. Whoever gets the task next finds them and goes on with what was paid for.

    reserved ──▶ intended ──▶ created ──▶ delivered      the queue accepted the video
                    │            ├──────▶ failed         the provider made none
                    │            ├──────▶ cancelled      we told the provider to stop
                    │            └──────▶ superseded     the task was put back with another request
                    ├──▶ (nothing was sent: forgotten)
                    └──▶ in doubt: still `intended`, and whoever wrote it is gone

Keys: `payment/ITEM/N` is the N-th payment of an item, `reserved/ITEM` money set aside by a dispatcher for a task on its
way to where it will be spent. Nobody may pay while an item's last payment is intended or created; after that its next
number goes to whoever adds it first, and nobody else ever writes over it by mistake: a process that was paused in the
middle of a payment and wakes up late finds its own record, not its successor's.
"""

import hashlib
import json
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

import anyio
import structlog
from pydantic import Field, ValidationError

from inference.errors import BudgetSpent, ItemMissing, LeaseLost, PaymentInDoubt, RecordsUnavailable, WrongState
from inference.payments.records import Records
from inference.task import Value

log = structlog.get_logger(__name__)

CREATION_S = 90.0
"""Longer than a provider is waited for: an intent without an id that is older was left by somebody who is gone."""

FOLLOWED_S = 3600.0
"""How long somebody may be waiting for a clip that is being made: as long as RUNWAY_TIMEOUT can be."""

RESERVED_S = 3600.0
"""How long money stays set aside for a task that was sent off and never heard of again."""

KEPT_S = 7 * 86_400.0
"""How long ended payments stay in the books; `modal.Dict` forgets by itself after as long."""

PAUSE_S = 2.0
"""Between looks at the intent of somebody else, who may be paying at this moment."""

UNDO_LIMIT_S = 10.0
"""For taking back an intent while the caller is being stopped."""

HALF_A_CENT = 0.005
"""Sums of prices are compared with this slack."""

Ending = Literal["delivered", "failed", "cancelled", "superseded", "in_doubt"]
Standing = Literal["being paid", "in doubt", "created", "delivered", "failed", "cancelled", "superseded", "forgotten"]


class Payment(Value):
    """One paid generation of one item."""

    item_id: str
    number: int = 0  # counts the payments of the item
    request: str  # digest of what was asked for: another prompt is another generation
    model: str
    holder: str  # worker_id of the lease that follows it
    at: float  # seconds since 1970 when it was intended: the day on whose budget it counts
    followed_at: float | None = None  # when its holder began to wait for the clip
    cost_usd: Annotated[float, Field(ge=0)]  # estimated by us, then by the provider, then what it charged
    status: Literal["intended", "created"] | Ending = "intended"
    ended_at: float | None = None  # on the clock of whoever ended it
    is_doubtful: bool = False  # an intent whose answer is known to be lost: nobody need wait for it
    external_id: str | None = None  # the provider's name for it, once it answered
    failures: tuple[str, ...] = ()  # codes with which the provider failed this request of the item, until now
    replays: int = 0  # how often this request was allowed to be paid for again, because an answer was lost

    @property
    def is_open(self) -> bool:
        """Whether something may still come of it: nobody may pay for the item again."""
        return self.status in ("intended", "created")

    @property
    def in_flight_until(self) -> float | None:
        """Until when somebody may be waiting for the answer or the clip, in seconds since 1970; None: nobody is."""
        if self.status == "created":
            return (self.at if self.followed_at is None else self.followed_at) + FOLLOWED_S
        return self.at + CREATION_S if self.status == "intended" and not self.is_doubtful else None

    def standing(self, now: float) -> Standing:
        """What is to be told of it, at `now` in seconds since 1970.

        An intent is being paid for as long as its answer may come, and in doubt from then on, or once its answer is
        known to be lost. In doubt is what a person has to look into.
        """
        if self.status == "intended":
            return "being paid" if now <= (self.in_flight_until or 0) else "in doubt"
        return "forgotten" if self.status == "in_doubt" else self.status  # by a person, or by I2V_RUNWAY_REPLAY

    @property
    def key(self) -> str:
        """Where the records keep it."""
        return f"payment/{self.item_id}/{self.number}"


def digest(**request: Any) -> str:
    """A short name for what a provider is asked for: the same arguments, the same name."""
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()[:16]


class Ledger:
    """The books of all payments, and the limit for one day (UTC)."""

    def __init__(
        self, records: Records, *, budget_usd: float = float("inf"), clock: Callable[[], float] = time.time
    ) -> None:
        self._records, self._budget_usd, self._clock = records, budget_usd, clock
        self._lock = anyio.Lock()  # within one process looking at the budget and spending from it are one step

    def now(self) -> float:
        """Seconds since 1970."""
        return self._clock()

    def purchase(self, item_id: str, holder: str) -> "Purchase":
        """The books as the holder of one lease sees them."""
        return Purchase(self, item_id, holder)

    async def payments(self) -> list[Payment]:
        """Every payment in the books, oldest first, open ones included. Raises RecordsUnavailable."""
        return _payments(await self._records.all())

    async def spent_usd(self) -> float:
        """Dollars of today's payments, and of money set aside. Raises RecordsUnavailable."""
        return self._spent_usd(await self._records.all())

    async def reserve(self, item_id: str, cost_usd: float) -> None:
        """Sets money aside for a task that is sent to where it will be paid for. Raises RecordsUnavailable."""
        await self._records.put(f"reserved/{item_id}", json.dumps({"cost_usd": cost_usd, "at": self._clock()}))

    async def unreserve(self, item_id: str) -> None:
        """The task was paid for, or never will be. Raises RecordsUnavailable."""
        await self._records.remove(f"reserved/{item_id}")

    async def forgettable(self, item_id: str) -> Payment:
        """The open payment of an item that a person may let be made again.

        Raises ItemMissing for an item without payments, WrongState where nothing is open or something may be in flight,
        RecordsUnavailable.
        """
        payment = await self.latest(item_id)
        if payment is None:
            raise ItemMissing(f"no payment of {item_id} is in the books")
        if not payment.is_open:
            standing = payment.standing(self._clock())
            raise WrongState(f"no payment of {item_id} is open: the last one is {standing}")
        if (until := payment.in_flight_until or 0) >= self._clock():
            raise WrongState(
                f"a payment of {item_id} may be in flight, and would be made twice: it may be forgotten after "
                f"{datetime.fromtimestamp(until, UTC):%Y-%m-%d %H:%M:%S} UTC"
            )
        return payment

    async def forget(self, item_id: str) -> Payment:
        """A person's decision on a payment in doubt; returns it as it was. Raises as `forgettable`.

        What may have been paid stays in the books, and the item may be paid for again.
        """
        payment = await self.forgettable(item_id)
        await self.write(payment, status="in_doubt")
        return payment

    async def prune(self) -> None:
        """Drops ended payments of more than a week ago, as `modal.Dict` does by itself. Raises RecordsUnavailable."""
        for payment in await self.payments():
            if not payment.is_open and self._clock() - payment.at > KEPT_S:
                await self._records.remove(payment.key)

    async def latest(self, item_id: str) -> Payment | None:
        """The last payment of an item, which is the only one that can be open. Raises RecordsUnavailable."""
        own = [payment for payment in await self.payments() if payment.item_id == item_id]
        return max(own, key=lambda payment: payment.number, default=None)

    async def is_paid_for(self, item_id: str) -> bool:
        """Whether a clip is being made, or waits to be fetched. Raises RecordsUnavailable."""
        latest = await self.latest(item_id)
        return latest is not None and latest.status == "created"

    async def read(self, key: str) -> Payment | None:
        """One payment as the books have it now. Raises RecordsUnavailable."""
        text = await self._records.get(key)
        return None if text is None else _read(key, text)

    async def begin(self, payment: Payment) -> Payment | None:
        """Writes an intent and returns it, dated; None where somebody else has written one of that number before.

        Raises BudgetSpent, RecordsUnavailable; nothing was written then that allows a payment.
        """
        async with self._lock:
            payment = payment.model_copy(update={"at": self._clock()})
            self._check_budget(await self._records.all(), payment)
            try:
                is_first = await self._records.add(payment.key, payment.model_dump_json())
                # A client of the records that asks again when an answer is lost is told No by its own first try.
                if not is_first and await self.read(payment.key) != payment:
                    return None
                # Others may have spent the same dollars at the same moment; of those, the later one sees both.
                self._check_budget(await self._records.all(), payment)
                await self.unreserve(payment.item_id)
            except BaseException:
                await self._undo(payment)
                raise
            return payment

    async def write(self, payment: Payment, **update: Any) -> Payment:
        """Writes what has become known of a payment, and returns it. Raises RecordsUnavailable."""
        payment = payment.model_copy(update=update)
        await self._records.put(payment.key, payment.model_dump_json())
        return payment

    async def discard(self, payment: Payment) -> None:
        """Forgets an intent that certainly was not paid for. Raises RecordsUnavailable."""
        await self._records.remove(payment.key)

    async def _undo(self, payment: Payment) -> None:
        """Forgets an intent that nothing will come of, if it was written; else it would be in doubt for ever."""
        with anyio.CancelScope(shield=True), anyio.move_on_after(UNDO_LIMIT_S), suppress(RecordsUnavailable):
            if await self.read(payment.key) == payment:
                await self.discard(payment)

    def _check_budget(self, kept: dict[str, str], payment: Payment) -> None:
        own = {payment.key, f"reserved/{payment.item_id}"}  # what was set aside was set aside for this
        spent = self._spent_usd({key: text for key, text in kept.items() if key not in own})
        if spent + payment.cost_usd > self._budget_usd + HALF_A_CENT:
            raise BudgetSpent(
                f"${spent:.2f} of today's ${self._budget_usd:.2f} are spent, and this would cost "
                f"${payment.cost_usd:.2f}: raise I2V_RUNWAY_BUDGET, or wait until midnight UTC"
            )

    def _spent_usd(self, kept: dict[str, str]) -> float:
        now = self._clock()
        today = datetime.fromtimestamp(now, UTC).date()
        payments = _payments(kept)
        paid_for = {payment.item_id for payment in payments if payment.is_open}
        spent = sum(payment.cost_usd for payment in payments if datetime.fromtimestamp(payment.at, UTC).date() == today)
        for key, text in kept.items():
            if key.startswith("reserved/") and key.removeprefix("reserved/") not in paid_for:
                cost_usd, at = _read_reserved(key, text)
                spent += cost_usd if now - at < RESERVED_S else 0.0
        return spent


class Purchase:
    """One item's paid generation, as the holder of its lease sees it: resume, or intend → created → ended.

    Every method raises RecordsUnavailable, and then what it was about may have been written or not.
    """

    def __init__(self, ledger: Ledger, item_id: str, holder: str) -> None:
        self._ledger, self._item_id, self._holder = ledger, item_id, holder
        self._since = ledger.now()
        self._number = 0
        self._failures: tuple[str, ...] = ()
        self._replays = 0
        self._payment: Payment | None = None

    @property
    def failures(self) -> tuple[str, ...]:
        """Codes with which the provider failed this request until now, under whatever lease; known after `resume`."""
        return self._failures

    async def resume(self, request: str, *, replays: int = 0) -> Payment | None:
        """The created payment to go on with, now followed by us; None where a new one may be made.

        An intent without an id is waited for while somebody else may be paying at this moment; after that it is in
        doubt, and allowed to be paid for again only `replays` times. Raises PaymentInDoubt, and LeaseLost where it was
        delivered or cancelled under another lease since this one began.
        """
        waited_until = anyio.current_time() + CREATION_S
        while True:
            last = await self._ledger.latest(self._item_id)
            self._number = 0 if last is None else last.number + 1
            if last is None or last.request != request:
                self._failures, self._replays = (), 0
                if last is not None and last.is_open:
                    log.warning("payment_superseded", item_id=self._item_id, external_id=last.external_id)
                    await self._ledger.write(last, status="superseded")
                return None
            if (
                last.status in ("delivered", "cancelled")
                and last.holder != self._holder
                and (last.ended_at or 0) > self._since
            ):  # a queue that is not atomic handed the task to two at once, and we were the slow one
                raise LeaseLost(f"{last.holder} has {last.status} it meanwhile", confirmed=False)
            self._failures = () if last.status == "delivered" else last.failures
            self._replays = last.replays
            if last.status == "created":
                self._payment = await self._ledger.write(last, holder=self._holder, followed_at=self._ledger.now())
                await self._ledger.unreserve(self._item_id)
                return self._payment
            if last.status != "intended":
                return None
            # Our own, whose call has returned without an answer. Not that of another process under the same lease:
            # it may have been told to stop a moment ago, and be waiting for its answer.
            mine = self._payment is not None and self._payment.key == last.key
            if mine or last.is_doubtful or anyio.current_time() >= waited_until:
                break
            await anyio.sleep(PAUSE_S)
        if last.replays >= replays:
            await self._ledger.write(last, is_doubtful=True)
            raise PaymentInDoubt(
                f"a paid generation of {last.model} (${last.cost_usd:.2f}) was asked for and the answer was "
                f"lost: look for it at the provider, then clear it with `i2v payments --forget {self._item_id}` (on "
                f"Modal `modal run app.py::status --forget {self._item_id}`), or set I2V_RUNWAY_REPLAY"
            )
        log.warning("payment_replayed", item_id=self._item_id, cost_usd=last.cost_usd)
        self._replays = last.replays + 1
        await self._ledger.write(last, status="in_doubt", replays=self._replays)  # counted, even if we end here
        return None

    async def intend(self, request: str, *, model: str, cost_usd: float) -> bool:
        """Before the paid call is sent, after `resume`. False where somebody else came first: `resume` again.

        Raises BudgetSpent.
        """
        payment = Payment(
            item_id=self._item_id,
            number=self._number,
            request=request,
            model=model,
            holder=self._holder,
            at=0,
            cost_usd=cost_usd,
            failures=self._failures,
            replays=self._replays,
        )
        self._payment = await self._ledger.begin(payment)
        return self._payment is not None

    async def created(self, external_id: str, cost_usd: float | None = None) -> None:
        """The provider answered. `cost_usd` is its own price, where it told one.

        Keeps both even where RecordsUnavailable is raised: called again, it writes them again.
        """
        mine = self._mine()
        cost_usd = mine.cost_usd if cost_usd is None else cost_usd
        known = {"status": "created", "external_id": external_id, "cost_usd": cost_usd}
        self._payment = mine.model_copy(update=known | {"followed_at": self._ledger.now()})
        found = await self._ledger.read(mine.key)
        if found is None or (found.is_open and found.holder == self._holder):
            await self._ledger.write(self._payment)
        else:  # we were given up on meanwhile, or taken over; the id and the price belong into the books all the same
            await self._ledger.write(found, external_id=external_id, cost_usd=cost_usd)

    async def withdraw(self) -> None:
        """The paid call was certainly not carried out."""
        payment, self._payment = self._mine(), None
        if payment.status != "intended":
            raise RuntimeError("what was created cannot be withdrawn")
        await self._ledger.discard(payment)

    async def end(self, ending: Ending, failure: str | None = None, *, cost_usd: float | None = None) -> None:
        """Nothing more will come of it. Harmless where nothing is open, or somebody else follows it now."""
        payment, self._payment = self._payment, None
        if failure is not None:
            self._failures = (*self._failures, failure)
        if payment is not None and await self._follows(payment):
            cost_usd = payment.cost_usd if cost_usd is None else cost_usd
            await self._ledger.write(
                payment, status=ending, ended_at=self._ledger.now(), failures=self._failures, cost_usd=cost_usd
            )

    async def is_ours(self) -> bool:
        """Whether nobody else has taken over what we paid for."""
        return self._payment is not None and await self._follows(self._payment)

    async def _follows(self, payment: Payment) -> bool:
        found = await self._ledger.read(payment.key)
        return found is not None and found.is_open and found.holder == self._holder

    def _mine(self) -> Payment:
        if self._payment is None:
            raise RuntimeError("nothing was intended")
        return self._payment


def _payments(kept: dict[str, str]) -> list[Payment]:
    found = [_read(key, text) for key, text in kept.items() if key.startswith("payment/")]
    return sorted(found, key=lambda payment: (payment.at, payment.item_id, payment.number))


def _read(key: str, text: str) -> Payment:
    try:
        return Payment.model_validate_json(text)
    except ValidationError:
        raise RecordsUnavailable(f"the ledger holds something that is no payment: {key}") from None


def _read_reserved(key: str, text: str) -> tuple[float, float]:
    try:
        kept = json.loads(text)
        return float(kept["cost_usd"]), float(kept["at"])
    except (ValueError, KeyError, TypeError):
        raise RecordsUnavailable(f"the ledger holds something that is no reserved sum: {key}") from None
