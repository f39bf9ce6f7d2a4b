"""The ledger of paid generations: one payment for each task, even if processes die or answers are lost.

A provider without idempotency keys charges twice for a request that is sent twice. So every paid call is recorded twice
in a store that outlives the process: as an intent before it is sent, and with the provider's id as soon as that is
known. The task's next holder finds these records and continues with what was already paid for.

    reserved ──▶ intended ──▶ created ──▶ delivered      the queue accepted the video
                    │            ├──────▶ failed         the provider made no video
                    │            ├──────▶ cancelled      we told the provider to stop
                    │            └──────▶ superseded     the task was put back with another request
                    ├──▶ (nothing was sent: forgotten)
                    └──▶ in doubt: still `intended`, and the process that wrote it is gone

Keys: `payment/ITEM/N` is the N-th payment of an item; `reserved/ITEM` is money that a dispatcher set aside for a task
that it sent to a paid engine. While an item's last payment is intended or created, nobody may pay for the item. After
that, the first process to add the next number may pay. A process that was paused in the middle of a payment therefore
finds its own record when it wakes up, and never overwrites its successor's.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterable
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
"""Longer than any call to a provider: an older intent without an id was left by a process that is gone."""

FOLLOWED_S = 3600.0
"""How long a holder may wait for a clip that is being made: the maximum of RUNWAY_TIMEOUT."""

RESERVED_S = 3600.0
"""How long money stays reserved for a task that was sent to a worker and was not heard of since."""

KEPT_S = 7 * 86_400.0
"""How long ended payments are kept; `modal.Dict` drops its entries after the same time."""

PAUSE_S = 2.0
"""Between looks at the intent of another process, which may be paying at this moment."""

UNDO_LIMIT_S = 10.0
"""Time limit for removing an intent while the caller is being stopped."""

HALF_A_CENT = 0.005
"""Sums of prices are compared with this slack."""

Ending = Literal["delivered", "failed", "cancelled", "superseded", "in_doubt"]
Standing = Literal["being paid", "in doubt", "created", "delivered", "failed", "cancelled", "superseded", "forgotten"]


class Payment(Value):
    """One paid generation of one item."""

    item_id: str
    part_of: str | None = None  # the task of which the item is one segment; money is reserved for the task as a whole
    number: int = 0  # counts the payments of the item
    request: str  # digest of the request: another prompt is another generation
    model: str
    holder: str  # worker_id of the lease that waits for it
    at: float  # seconds since 1970 when it was intended; decides on which day's budget it counts
    followed_at: float | None = None  # when its holder began to wait for the clip
    cost_usd: Annotated[float, Field(ge=0)]  # estimated by us, then by the provider, then what it charged
    status: Literal["intended", "created"] | Ending = "intended"
    ended_at: float | None = None  # on the clock of the process that ended it
    is_doubtful: bool = False  # the answer to this intent is known to be lost, so no process waits for it
    external_id: str | None = None  # the provider's id, once it answered
    failures: tuple[str, ...] = ()  # failure codes of the provider for this request so far
    replays: int = 0  # how often this request was allowed to be paid for again, because an answer was lost

    @property
    def is_open(self) -> bool:
        """Whether a video may still come of it, so that nobody may pay for the item again."""
        return self.status in ("intended", "created")

    @property
    def in_flight_until(self) -> float | None:
        """Until when a process may be waiting for the answer or the clip, in seconds since 1970; None: none is."""
        if self.status == "created":
            return (self.at if self.followed_at is None else self.followed_at) + FOLLOWED_S
        return self.at + CREATION_S if self.status == "intended" and not self.is_doubtful else None

    def standing(self, now: float) -> Standing:
        """How the payment stands at `now`, in seconds since 1970, for people.

        An intent is "being paid" while its answer may still come. After that, or once its answer is known to be lost,
        it is "in doubt", which a person has to settle.
        """
        if self.status == "intended":
            return "being paid" if now <= (self.in_flight_until or 0) else "in doubt"
        # A person, or I2V_RUNWAY_REPLAY, ended the doubt.
        return "forgotten" if self.status == "in_doubt" else self.status

    @property
    def key(self) -> str:
        """Its key in the records."""
        return f"payment/{self.item_id}/{self.number}"


def digest(**request: Any) -> str:
    """A short digest of a request to a provider: equal arguments have equal digests."""
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()[:16]


def paid_in_parts(payments: Iterable[Payment]) -> dict[str, float]:
    """Films of which segments were paid for, and what those cost in dollars, be their clips finished or not."""
    paid: dict[str, float] = {}
    for payment in payments:
        if payment.part_of is not None and payment.status in ("created", "delivered"):
            paid[payment.part_of] = paid.get(payment.part_of, 0.0) + payment.cost_usd
    return paid


class Ledger:
    """All payments, and the budget for one day (UTC)."""

    def __init__(
        self, records: Records, *, budget_usd: float = float("inf"), clock: Callable[[], float] = time.time
    ) -> None:
        self._records, self._budget_usd, self._clock = records, budget_usd, clock
        self._lock = anyio.Lock()  # makes checking the budget and spending from it one step within this process

    def now(self) -> float:
        """Seconds since 1970."""
        return self._clock()

    def purchase(self, item_id: str, holder: str, *, part_of: str | None = None) -> "Purchase":
        """The ledger as the holder of one lease uses it.

        `part_of`: the task that this is one of several purchases for, each under an `item_id` of its own.
        """
        return Purchase(self, item_id, holder, part_of)

    async def payments(self) -> list[Payment]:
        """Every payment, oldest first, open ones included. Raises RecordsUnavailable."""
        return _payments(await self._records.all())

    async def spent_usd(self) -> float:
        """Dollars of today's payments and reservations. Raises RecordsUnavailable."""
        return self._spent_usd(await self._records.all())

    async def reserve(self, item_id: str, cost_usd: float) -> None:
        """Sets money aside for a task that is sent to a paid engine. Raises RecordsUnavailable."""
        await self._records.put(f"reserved/{item_id}", json.dumps({"cost_usd": cost_usd, "at": self._clock()}))

    async def unreserve(self, item_id: str) -> None:
        """Frees what was reserved: the task was paid for, or never will be. Raises RecordsUnavailable."""
        await self._records.remove(f"reserved/{item_id}")

    async def forgettable(self, item_id: str) -> Payment:
        """The open payment of an item that a person may write off, so that the item is paid for again.

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
        """Writes off a payment in doubt, as a person decided; returns it as it was. Raises as `forgettable`.

        Its cost stays in the ledger, and the item may be paid for again.
        """
        payment = await self.forgettable(item_id)
        await self.write(payment, status="in_doubt")
        return payment

    async def prune(self) -> None:
        """Removes ended payments that are older than KEPT_S, for stores that do not. Raises RecordsUnavailable."""
        for payment in await self.payments():
            if not payment.is_open and self._clock() - payment.at > KEPT_S:
                await self._records.remove(payment.key)

    async def latest(self, item_id: str) -> Payment | None:
        """The last payment of an item, which is the only one that can be open. Raises RecordsUnavailable."""
        own = [payment for payment in await self.payments() if payment.item_id == item_id]
        return max(own, key=lambda payment: payment.number, default=None)

    async def is_paid_for(self, item_id: str) -> bool:
        """Whether a paid clip is being made or waits to be fetched. Raises RecordsUnavailable.

        Also whether any segment of a film was paid for: its finished clips are kept for whoever makes the film.
        """
        latest = await self.latest(item_id)
        if latest is not None and latest.status == "created":
            return True
        return item_id in paid_in_parts(await self.payments())

    async def read(self, key: str) -> Payment | None:
        """One payment as it is recorded now. Raises RecordsUnavailable."""
        text = await self._records.get(key)
        return None if text is None else _read(key, text)

    async def begin(self, payment: Payment) -> Payment | None:
        """Writes an intent and returns it, dated; None where another process has taken that number.

        Raises BudgetSpent, RecordsUnavailable; the caller must not pay then.
        """
        async with self._lock:
            payment = payment.model_copy(update={"at": self._clock()})
            self._check_budget(await self._records.all(), payment)
            try:
                is_first = await self._records.add(payment.key, payment.model_dump_json())
                # `add` may have succeeded although its answer was lost, and was then repeated by the client of the
                # store, which was told that the key exists. If the record is our own, we were first.
                if not is_first and await self.read(payment.key) != payment:
                    return None
                # Two processes may pass the check above at once. The later one sees both intents here, and gives up.
                self._check_budget(await self._records.all(), payment)
                await self.unreserve(payment.item_id)
                if payment.part_of is not None:
                    await self._reserve_less(payment.part_of, payment.cost_usd)
            except BaseException:
                await self._undo(payment)
                raise
            return payment

    async def write(self, payment: Payment, **update: Any) -> Payment:
        """Writes a payment with changes, and returns it. Raises RecordsUnavailable."""
        payment = payment.model_copy(update=update)
        await self._records.put(payment.key, payment.model_dump_json())
        return payment

    async def discard(self, payment: Payment) -> None:
        """Removes an intent that certainly was not paid for. Raises RecordsUnavailable."""
        await self._records.remove(payment.key)

    async def _reserve_less(self, item_id: str, cost_usd: float) -> None:
        """Takes what was just paid for one segment off what is reserved for its film."""
        key = f"reserved/{item_id}"
        text = await self._records.get(key)
        if text is None:
            return
        reserved_usd, at = _read_reserved(key, text)
        await self._records.put(key, json.dumps({"cost_usd": max(0.0, reserved_usd - cost_usd), "at": at}))

    async def _undo(self, payment: Payment) -> None:
        """Removes an intent whose call will not be sent, or it would stay in doubt for ever."""
        with anyio.CancelScope(shield=True), anyio.move_on_after(UNDO_LIMIT_S), suppress(RecordsUnavailable):
            if await self.read(payment.key) == payment:
                await self.discard(payment)

    def _check_budget(self, kept: dict[str, str], payment: Payment) -> None:
        # The reservations are for this very payment, or for a film that it is a part of.
        own = {payment.key, f"reserved/{payment.item_id}", f"reserved/{payment.part_of}"}
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
    """The paid generation of one item, for the holder of its lease: `resume`, or `intend` → `created` → `end`.

    Every method raises RecordsUnavailable; the change may have been recorded all the same.
    """

    def __init__(self, ledger: Ledger, item_id: str, holder: str, part_of: str | None = None) -> None:
        self._ledger, self._item_id, self._holder, self._part_of = ledger, item_id, holder, part_of
        self._since = ledger.now()
        self._number = 0
        self._failures: tuple[str, ...] = ()
        self._replays = 0
        self._payment: Payment | None = None

    @property
    def failures(self) -> tuple[str, ...]:
        """The provider's failure codes for this request so far, under any lease; known after `resume`."""
        return self._failures

    async def resume(self, request: str, *, replays: int = 0) -> Payment | None:
        """The created payment to continue with, which is ours from now on; None where a new payment may be made.

        While another process may be paying at this moment, its intent is waited for. After that the intent is in doubt,
        and the request may be paid for again only `replays` times. Raises PaymentInDoubt, and LeaseLost where the item
        was delivered or cancelled under another lease since this one began.
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
            ):  # the queue leased the task twice, and the other holder was faster
                raise LeaseLost(f"{last.holder} has {last.status} it meanwhile", confirmed=False)
            self._failures = () if last.status == "delivered" else last.failures
            self._replays = last.replays
            if last.status == "created":
                self._payment = await self._ledger.write(last, holder=self._holder, followed_at=self._ledger.now())
                await self._ledger.unreserve(self._item_id)
                return self._payment
            if last.status != "intended":
                return None
            # Our own intent is in doubt at once, since its call has returned without an answer. That of another process
            # under the same lease is not: the process may be stopping, and still be waiting for its answer.
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
        # Recorded before the order is sent again, so that the replay counts even if this process dies now.
        await self._ledger.write(last, status="in_doubt", replays=self._replays)
        return None

    async def intend(self, request: str, *, model: str, cost_usd: float) -> bool:
        """Records the intent, after `resume` and before the paid call. False if another was first: `resume` again.

        Raises BudgetSpent.
        """
        payment = Payment(
            item_id=self._item_id,
            part_of=self._part_of,
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
        """Records the provider's id. `cost_usd` is the provider's own price, if it named one.

        After RecordsUnavailable this object still has both, so a later call writes them again.
        """
        mine = self._mine()
        cost_usd = mine.cost_usd if cost_usd is None else cost_usd
        known = {"status": "created", "external_id": external_id, "cost_usd": cost_usd}
        self._payment = mine.model_copy(update=known | {"followed_at": self._ledger.now()})
        found = await self._ledger.read(mine.key)
        if found is None or (found.is_open and found.holder == self._holder):
            await self._ledger.write(self._payment)
        else:  # another process has written the payment off or taken it over; id and price are recorded all the same
            await self._ledger.write(found, external_id=external_id, cost_usd=cost_usd)

    async def withdraw(self) -> None:
        """Removes the intent: the paid call was certainly not carried out."""
        payment, self._payment = self._mine(), None
        if payment.status != "intended":
            raise RuntimeError("what was created cannot be withdrawn")
        await self._ledger.discard(payment)

    async def end(self, ending: Ending, failure: str | None = None, *, cost_usd: float | None = None) -> None:
        """Records how the payment ended. Does nothing if none is open, or if another lease has taken it over."""
        payment, self._payment = self._payment, None
        if failure is not None:
            self._failures = (*self._failures, failure)
        if payment is not None and await self._follows(payment):
            cost_usd = payment.cost_usd if cost_usd is None else cost_usd
            await self._ledger.write(
                payment, status=ending, ended_at=self._ledger.now(), failures=self._failures, cost_usd=cost_usd
            )

    async def settle(self) -> None:
        """Ends a created payment as delivered, whichever lease it was made under: its clip is there already."""
        last = await self._ledger.latest(self._item_id)
        if last is not None and last.status == "created":
            await self._ledger.write(last, status="delivered", ended_at=self._ledger.now())

    async def is_ours(self) -> bool:
        """Whether no other lease has taken over what we paid for."""
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
