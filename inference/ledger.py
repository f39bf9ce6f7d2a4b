"""What was paid for: one payment for each task, whatever is lost on the way.

A provider that takes no idempotency key would take our money twice for a request that is sent twice. So every paid
call leaves two marks in records that outlive the process: the intent before it is sent, and the provider's id as soon
as it is known. Whoever gets the task next finds them and goes on with what was paid for.

    reserved ──▶ intended ──▶ created ──▶ delivered      the queue accepted the video
                    │            ├──────▶ failed         the provider made none
                    │            ├──────▶ cancelled      we told the provider to stop
                    │            └──────▶ superseded     the task was put back with another request
                    └──▶ (nothing was sent: forgotten)
                    └──▶ in doubt: `intended`, and whoever wrote it is gone

Keys: `open/ITEM` is the payment to go on with, at most one an item; `ended/ITEM/TIME` what was paid before, for the
books; `reserved/ITEM` money set aside by a dispatcher for a task on its way to where it will be spent.
"""

import hashlib
import json
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

import anyio
import structlog
from pydantic import Field, ValidationError

from inference.errors import BudgetSpent, PaymentInDoubt, RecordsUnavailable
from inference.records import Records
from inference.task import Value

log = structlog.get_logger(__name__)

CREATION_S = 90.0
"""Longer than a provider is waited for: an intent without an id that is older was left by somebody who is gone."""

RESERVED_S = 3600.0
"""How long money stays set aside for a task that was sent off and never heard of again."""

KEPT_S = 7 * 86_400.0
"""How long ended payments stay in the books; `modal.Dict` forgets by itself after as long."""

PAUSE_S = 2.0
"""Between looks at the intent of somebody else, who may be paying at this moment."""

Ending = Literal["delivered", "failed", "cancelled", "superseded", "in_doubt"]


class Payment(Value):
    """One paid generation of one item."""

    item_id: str
    request: str  # digest of what was asked for: another prompt is another generation
    model: str
    holder: str  # worker_id of the lease that follows it
    at: float  # seconds since 1970 when it was intended: the day on whose budget it counts
    cost_usd: Annotated[float, Field(ge=0)]  # estimated by us, then by the provider
    status: Literal["intended", "created"] | Ending = "intended"
    external_id: str | None = None  # the provider's name for it, once it answered
    failures: tuple[str, ...] = ()  # codes of generations before this one that the provider failed
    replays: int = 0  # how often an intent of this item was left in doubt before


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

    def purchase(self, item_id: str, holder: str) -> "Purchase":
        """The books as the holder of one lease sees them."""
        return Purchase(self, item_id, holder)

    async def payments(self) -> list[Payment]:
        """Every payment in the books, oldest first, open ones included. Raises RecordsUnavailable."""
        kept = await self._records.all()
        found = {}
        for key, text in kept.items():
            if key.startswith(("open/", "ended/")):
                payment = _read(key, text)
                # Closing one writes it anew before it forgets the old: seen between, it is there twice.
                found[payment.item_id, payment.at] = payment
        return sorted(found.values(), key=lambda payment: payment.at)

    async def spent_usd(self) -> float:
        """Dollars of today's payments, and of money set aside. Raises RecordsUnavailable."""
        now = self._clock()
        today = datetime.fromtimestamp(now, UTC).date()
        kept = await self._records.all()
        paid = {key.removeprefix("open/") for key in kept if key.startswith("open/")}
        reserved = 0.0
        for key, text in kept.items():
            if key.startswith("reserved/") and key.removeprefix("reserved/") not in paid:
                set_aside = json.loads(text)
                reserved += set_aside["cost_usd"] if now - set_aside["at"] < RESERVED_S else 0.0
        payments = await self.payments()
        return reserved + sum(
            payment.cost_usd for payment in payments if datetime.fromtimestamp(payment.at, UTC).date() == today
        )

    async def reserve(self, item_id: str, cost_usd: float) -> None:
        """Sets money aside for a task that is sent to where it will be paid for. Raises RecordsUnavailable."""
        await self._records.put(f"reserved/{item_id}", json.dumps({"cost_usd": cost_usd, "at": self._clock()}))

    async def unreserve(self, item_id: str) -> None:
        """The task was paid for, or never will be. Raises RecordsUnavailable."""
        await self._records.remove(f"reserved/{item_id}")

    async def forget(self, item_id: str) -> Payment | None:
        """A person's decision on a payment in doubt; returns what was open, or None.

        What may have been paid stays in the books, and the item may be paid for again. Raises RecordsUnavailable.
        """
        payment = await self.open(item_id)
        if payment is not None:
            await self.close(payment, "in_doubt")
        return payment

    async def prune(self) -> None:
        """Drops ended payments of more than a week ago. Raises RecordsUnavailable."""
        for key, text in (await self._records.all()).items():
            if key.startswith("ended/") and self._clock() - _read(key, text).at > KEPT_S:
                await self._records.remove(key)

    async def open(self, item_id: str) -> Payment | None:
        """The payment to go on with, if there is one. Raises RecordsUnavailable."""
        key = f"open/{item_id}"
        text = await self._records.get(key)
        return None if text is None else _read(key, text)

    async def begin(self, payment: Payment) -> Payment | None:
        """Writes an intent and returns it, dated; None where the item has an open payment already.

        Raises BudgetSpent, RecordsUnavailable; nothing was written then that allows a payment.
        """
        async with self._lock:
            await self.unreserve(payment.item_id)
            payment = payment.model_copy(update={"at": self._clock()})
            spent = await self.spent_usd()
            if spent + payment.cost_usd > self._budget_usd:
                raise BudgetSpent(
                    f"${spent:.2f} of today's ${self._budget_usd:.2f} are spent, and this would cost "
                    f"${payment.cost_usd:.2f}: raise I2V_RUNWAY_BUDGET, or wait until midnight UTC"
                )
            added = await self._records.add(f"open/{payment.item_id}", payment.model_dump_json())
            return payment if added else None

    async def write(self, payment: Payment) -> None:
        """Writes what is known of an open payment. Raises RecordsUnavailable."""
        await self._records.put(f"open/{payment.item_id}", payment.model_dump_json())

    async def close(self, payment: Payment, ending: Ending) -> None:
        """Moves a payment to the ended ones. Raises RecordsUnavailable."""
        ended = payment.model_copy(update={"status": ending})
        await self._records.put(f"ended/{payment.item_id}/{payment.at:.6f}", ended.model_dump_json())
        await self._records.remove(f"open/{payment.item_id}")

    async def discard(self, payment: Payment) -> None:
        """Forgets an intent that certainly was not paid for. Raises RecordsUnavailable."""
        await self._records.remove(f"open/{payment.item_id}")


class Purchase:
    """One item's paid generation, as the holder of its lease sees it: resume, or intend → created → ended.

    Every method raises RecordsUnavailable, and then what it was about may have been written or not.
    """

    def __init__(self, ledger: Ledger, item_id: str, holder: str) -> None:
        self._ledger, self._item_id, self._holder = ledger, item_id, holder
        self._failures: tuple[str, ...] = ()
        self._replays = 0
        self._payment: Payment | None = None

    @property
    def failures(self) -> tuple[str, ...]:
        """Codes with which the provider failed this item while this lease, or one it took over from, held it."""
        return self._failures

    async def resume(self, request: str, *, replays: int = 0) -> Payment | None:
        """The created payment to go on with, now followed by us; None where a new one may be made.

        An intent without an id is waited for while somebody else may be paying at this moment; after that it is in
        doubt, and allowed to be paid for again only `replays` times. Raises PaymentInDoubt.
        """
        waited_until = anyio.current_time() + CREATION_S
        while True:
            payment = await self._ledger.open(self._item_id)
            if payment is None:
                return None
            if payment.request != request:
                log.warning("payment_superseded", item_id=self._item_id, external_id=payment.external_id)
                await self._ledger.close(payment, "superseded")
                return None
            self._failures = payment.failures
            if payment.status == "created":
                adopted = payment.model_copy(update={"holder": self._holder})
                await self._ledger.write(adopted)
                self._payment = adopted
                return adopted
            # Our own intent, found again, was left by this lease's process before it was preempted.
            if payment.holder == self._holder or anyio.current_time() >= waited_until:
                break
            await anyio.sleep(PAUSE_S)
        if payment.replays >= replays:
            raise PaymentInDoubt(
                f"a paid generation of {payment.model} (${payment.cost_usd:.2f}) was asked for and the answer was "
                f"lost: look for it at the provider, then clear it with `i2v payments --forget {self._item_id}`, or "
                "set I2V_RUNWAY_REPLAY to pay once more by itself"
            )
        log.warning("payment_replayed", item_id=self._item_id, cost_usd=payment.cost_usd)
        self._replays = payment.replays + 1
        await self._ledger.close(payment, "in_doubt")
        return None

    async def intend(self, request: str, *, model: str, cost_usd: float) -> bool:
        """Before the paid call is sent. False where somebody else came first: `resume` again. Raises BudgetSpent."""
        payment = Payment(
            item_id=self._item_id,
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
        """The provider answered. `cost_usd` is its own estimate, where it gave one."""
        update: dict[str, Any] = {"status": "created", "external_id": external_id}
        if cost_usd is not None:
            update["cost_usd"] = cost_usd
        self._payment = self._mine().model_copy(update=update)
        await self._ledger.write(self._payment)

    async def withdraw(self) -> None:
        """The paid call was certainly not carried out."""
        payment, self._payment = self._mine(), None
        await self._ledger.discard(payment)

    async def end(self, ending: Ending, failure: str | None = None) -> None:
        """Nothing more will come of it. Harmless where nothing is open, or somebody else follows it now."""
        payment, self._payment = self._payment, None
        if failure is not None:
            self._failures = (*self._failures, failure)
        if payment is not None and await self._follows(payment):
            await self._ledger.close(payment, ending)

    async def is_ours(self) -> bool:
        """Whether nobody else has taken over what we paid for."""
        return self._payment is not None and await self._follows(self._payment)

    async def _follows(self, payment: Payment) -> bool:
        current = await self._ledger.open(self._item_id)
        return current is not None and (current.at, current.holder) == (payment.at, self._holder)

    def _mine(self) -> Payment:
        if self._payment is None:
            raise RuntimeError("nothing was intended")
        return self._payment


def _read(key: str, text: str) -> Payment:
    try:
        return Payment.model_validate_json(text)
    except ValidationError:
        raise RecordsUnavailable(f"the ledger holds something that is no payment: {key}") from None
