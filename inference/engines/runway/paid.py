"""One task at Runway that is paid for once: ordered or resumed, followed to its end, or stopped.

    read the ledger ── a task was paid for already ───┐
      └─ intent → POST → id, recorded at once ────────┴→ poll until the task has ended

An order is sent only after its intent was recorded, and repeated only if it certainly was not carried out. An order
that may have been carried out stays in the ledger as an intent, which `Purchase.resume` deals with.
"""

import random
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NoReturn

import anyio
import structlog
from pydantic import ValidationError

from inference.engines.base import Job
from inference.engines.runway.models import USD_PER_CREDIT, Model
from inference.engines.runway.wire import (
    GONE,
    Cost,
    Created,
    RunwayAnswer,
    RunwayApi,
    RunwayTask,
    failed,
    refused_before,
)
from inference.errors import EngineError, EngineFailed, LeaseLost, ProviderUnavailable, RecordsUnavailable
from inference.payments.ledger import Ending, Ledger, Purchase, digest
from inference.payments.records import MemoryRecords
from inference.transfer.json_api import Unanswered

log = structlog.get_logger(__name__)

CREATION_LIMIT_S = 60.0
"""For one order, photo included. Shorter than `ledger.CREATION_S`, after which other processes take it for lost."""

RECORD_LIMIT_S = 15.0
"""For recording what was paid for, also while the caller is being cancelled."""

CANCEL_LIMIT_S = 10.0
"""For cancelling a task at Runway: a process that is being stopped has not much longer."""

CREATION_RETRIES = 3
"""How often an order is repeated that did not reach Runway or was refused for now (429, 502, 503, 504), each after the
pause of a poll. The number is from Runway's documentation; more would not outlast a daily cap or an outage either."""

LOOKS_FOR_THE_MISSING = 3
"""A task that is not found this often in a row is gone. A single 404 may come from a replica that lags behind."""


@dataclass(frozen=True)
class Order:
    """What is ordered from Runway."""

    model: Model
    seconds: int
    ratio: str
    prompt: str  # empty: none is sent
    seed: int | None
    photo: bytes  # a JPEG: upright, sRGB, without metadata
    photo_digest: str  # of the original file
    audio: bool = False  # where the model makes sound
    negative_prompt: str = ""  # empty: none is sent

    @property
    def digest(self) -> str:
        """Identifies the request in the ledger."""
        # Options that are off are left out, so that such orders have the digest that earlier versions gave them, and
        # what those versions paid for is found again.
        chosen = {"audio": self.audio, "negative_prompt": self.negative_prompt}
        return digest(
            model=self.model.name,
            seconds=self.seconds,
            ratio=self.ratio,
            prompt=self.prompt,
            seed=self.seed,
            photo=self.photo_digest,
            **{name: value for name, value in chosen.items() if value},
        )

    @property
    def cost_usd(self) -> float:
        """The most that it can cost."""
        return self.seconds * self.model.usd_per_s(audio=self.audio)

    def body(self, photo_uri: str) -> dict[str, object]:
        """The body of the order. Runway refuses unknown keys and an empty prompt."""
        body: dict[str, object] = {
            "model": self.model.name,
            "promptImage": photo_uri,
            "duration": self.seconds,
            "ratio": self.ratio,
        }
        if self.prompt:
            body["promptText"] = self.prompt
        if self.seed is not None:
            body["seed"] = self.seed
        if self.model.sound_credits_per_s is not None:
            body["audio"] = self.audio  # always sent, because the default is to add sound and bill it
        if self.negative_prompt:
            body["negativePrompt"] = self.negative_prompt
        return body


class PaidTask:
    """The task that one lease paid for or took over. `put_photo` makes the photo available and returns its URI."""

    def __init__(
        self,
        api: RunwayApi,
        job: Job,
        order: Order,
        put_photo: Callable[[Order], Awaitable[str]],
        *,
        poll_interval_s: float,
        replays: int,
    ) -> None:
        self._api, self._job, self._order, self._put_photo = api, job, order, put_photo
        self._poll_interval_s, self._replays = poll_interval_s, replays
        # Without a ledger no later run could continue with what was paid for.
        self._is_kept = job.purchase is not None
        self._purchase: Purchase = job.purchase or Ledger(MemoryRecords()).purchase("one-off", "nobody")
        self._is_new = True
        self._has_succeeded = False
        self.is_unheard = False  # when its state was last asked for, no usable answer came
        self.id = ""  # empty: nothing was ordered yet
        self.cost_usd = order.cost_usd  # replaced by Runway's estimate, then by what it charged

    async def pay(self) -> None:
        """Resumes the task that was paid for, or orders one.

        An order that was refused for now is repeated under a new intent. So no intent is ever older than one order can
        take, from which other processes conclude that nobody waits for its answer any more.
        Raises PaymentInDoubt, BudgetSpent, EngineError.
        """
        photo_uri = ""
        retries_left = CREATION_RETRIES
        while True:
            paid = await self._purchase.resume(self._order.digest, replays=self._replays)
            if paid is not None and paid.external_id is not None:
                self.id, self.cost_usd, self._is_new = paid.external_id, paid.cost_usd, False
                log.info("runway_resumed", runway_task_id=self.id)
                return
            if (error := refused_before(self._purchase.failures)) is not None:
                raise error
            try:
                photo_uri = photo_uri or await self._photo_uri()
                self._job.raise_if_lease_ended()
                model, cost_usd = self._order.model.name, self._order.cost_usd
                if await self._purchase.intend(self._order.digest, model=model, cost_usd=cost_usd):
                    await self._create(self._order.body(photo_uri))
                    return
            except _AnswerLost as lost:
                log.error("runway_answer_lost", why=str(lost))  # noqa: TRY400
                continue  # `resume` decides what that means
            except _MayPass as refused:
                if not retries_left:
                    raise refused.error from None
                retries_left -= 1
                log.warning("runway_refused", error=str(refused.error), retries_left=retries_left)
            await self.pause()  # refused for now, or another process's intent was first

    async def _photo_uri(self) -> str:
        try:
            return await self._put_photo(self._order)
        except ProviderUnavailable as error:
            raise _MayPass(error) from None

    async def succeeded(self) -> RunwayTask:
        """Polls until the task has succeeded. Raises EngineError."""
        missed = 0
        self._job.report("queue")
        while True:
            if self._is_new:
                await self.pause()
            self._is_new = True
            self._job.raise_if_cancelled()
            found = await self.look()
            missed = missed + 1 if isinstance(found, RunwayAnswer) and found.status == 404 else 0
            if isinstance(found, RunwayAnswer):
                if found.status in (401, 403):
                    raise found.error()
                if missed >= LOOKS_FOR_THE_MISSING:
                    # Deleted, or of another account: this task will yield no clip, so another one may be paid for.
                    await self.ended("failed", GONE)
                    raise EngineFailed(f"task {self.id} was paid for and is gone ({found.status} {found.said})")
            elif found is not None:
                if found.status == "SUCCEEDED" and found.output:
                    return await self._success(found)
                if found.status in ("FAILED", "CANCELLED"):
                    await self._raise_ended(found)
                if found.status == "RUNNING" and found.progress is not None:
                    self._job.report("generate", min(max(found.progress, 0.0), 1.0))

    async def look(self) -> RunwayTask | RunwayAnswer | None:
        """The state of the task; None where no answer came. The caller polls on until its time limit."""
        try:
            found = await self._api.task(self.id)
        except Unanswered as error:
            self.is_unheard = True
            log.warning("runway_unanswered", runway_task_id=self.id, error=str(error))
            return None
        self.is_unheard = isinstance(found, RunwayAnswer)
        if isinstance(found, RunwayAnswer):
            log.warning("runway_unanswered", runway_task_id=self.id, error=f"{found.status} {found.said}")
        return found

    async def ended(self, ending: Ending, failure: str | None = None, *, cost: Cost | None = None) -> None:
        """Records how the task ended."""
        cost_usd = None if cost is None else cost.credits * USD_PER_CREDIT
        with _told("payment_left_open", self.id), anyio.fail_after(RECORD_LIMIT_S):
            await self._purchase.end(ending, failure, cost_usd=cost_usd)

    async def let_go(self) -> None:
        """Called when this worker gives the video up. Stops the task unless its next holder may still want it."""
        reason = self._job.cancelled_by
        is_left_to_others = reason is None or (isinstance(reason, LeaseLost) and not reason.confirmed)
        if is_left_to_others and self._is_kept:
            log.info("runway_left_running", runway_task_id=self.id)
        else:
            await self.stop()

    async def stop(self) -> None:
        """Cancels the task if it is ours. One that has succeeded is paid for, and is left for the next holder."""
        if not self.id or self._has_succeeded:
            return
        with anyio.CancelScope(shield=True), anyio.move_on_after(CANCEL_LIMIT_S):
            try:
                if not await self._purchase.is_ours():
                    return
                answer = await self._api.ask("DELETE", f"tasks/{self.id}", limit_s=CANCEL_LIMIT_S)
            except (Unanswered, RecordsUnavailable) as error:
                log.warning("runway_not_stopped", runway_task_id=self.id, error=str(error))
                return
            if answer.status < 300 or answer.status == 404:
                await self.ended("cancelled")
                log.info("runway_stopped", runway_task_id=self.id)
            else:  # the payment stays open, and the task's next holder continues with it
                log.warning("runway_not_stopped", runway_task_id=self.id, error=f"{answer.status} {answer.said}")

    async def _create(self, body: dict[str, object]) -> None:
        """Sends the order whose intent was recorded, once.

        Raises _AnswerLost where it may have been carried out. Raises EngineError, or _MayPass, where it certainly was
        not; its intent was removed then.
        """
        # Shielded: an order that is abandoned half way may be paid for all the same, and its id would be lost.
        with anyio.CancelScope(shield=True):
            try:
                answer = await self._api.ask("POST", "image_to_video", body, limit_s=CREATION_LIMIT_S)
            except Unanswered as error:
                if error.sent:
                    raise _AnswerLost(str(error)) from None
                await self._refused(ProviderUnavailable(f"it cannot be reached: {error}"), may_pass=True)
            if answer.is_refusal:
                await self._refused(answer.error(), may_pass=answer.may_pass)
            try:
                created = Created.model_validate(answer.payload)
            except ValidationError:
                raise _AnswerLost(f"{answer.status} {answer.said}") from None
            self.id = created.id
            if created.estimatedCost is not None:
                self.cost_usd = created.estimatedCost.credits * USD_PER_CREDIT
            log.info("runway_created", runway_task_id=self.id, cost_usd=self.cost_usd)
            await self._record()

    async def _refused(self, error: EngineError, *, may_pass: bool) -> NoReturn:
        """Removes the intent, and raises what the refusal means."""
        is_withdrawn = False
        with _told("payment_left_in_doubt", "none"), anyio.fail_after(RECORD_LIMIT_S):
            await self._purchase.withdraw()
            is_withdrawn = True
        if may_pass and is_withdrawn:  # an intent that could not be removed would block the next one
            raise _MayPass(error)
        raise error

    async def _success(self, task: RunwayTask) -> RunwayTask:
        self._has_succeeded = True
        if task.cost is not None:
            self.cost_usd = task.cost.credits * USD_PER_CREDIT
        await self._record()
        self._job.report("generate", 1)
        return task

    async def _raise_ended(self, task: RunwayTask) -> NoReturn:
        before = self._purchase.failures
        if task.status == "CANCELLED":
            await self.ended("cancelled", cost=task.cost)
            raise EngineFailed(f"task {task.id} was cancelled there")
        await self.ended("failed", task.failureCode or "UNKNOWN", cost=task.cost)
        raise failed(task.failureCode or "", task.failure or "", before)

    async def _record(self) -> None:
        with _told("runway_task_unrecorded", self.id), anyio.fail_after(RECORD_LIMIT_S):
            await self._purchase.created(self.id, self.cost_usd)

    async def pause(self) -> None:
        """The pause that Runway asks for between two requests, with jitter."""
        await anyio.sleep(self._poll_interval_s * random.uniform(1, 1.3))


class _AnswerLost(Exception):
    """An order was sent, and whether it was carried out is unknown."""


class _MayPass(Exception):
    """Runway refused for now. Nothing was billed, and the intent was removed."""

    def __init__(self, error: EngineError) -> None:
        super().__init__(str(error))
        self.error = error


@contextmanager
def _told(event: str, task_id: str) -> Iterator[None]:
    """Logs that the ledger cannot be reached and lets the work go on, since the money is spent already."""
    try:
        yield
    except (RecordsUnavailable, TimeoutError) as error:
        log.error(event, runway_task_id=task_id, error=str(error))  # noqa: TRY400
