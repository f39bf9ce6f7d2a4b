"""One lease, from its first heartbeat to its report.

    first heartbeat → fetch inputs → wait for the engine → generate → deliver → complete
                      heartbeats continue beside all of these (`keeper.py`)
    any error → one Outcome, in `_settle`

Nothing is spent before the queue has confirmed the lease, and every attempt of every stage begins with a check that the
lease is still ours.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

import anyio
import structlog

from inference.engines.base import Engine, Job
from inference.engines.turns import EngineTurns
from inference.errors import CancelRequested, I2VError, LeaseLost
from inference.leasing import film
from inference.leasing.film import Film, FilmJob
from inference.leasing.keeper import Keeper
from inference.leasing.retry import Policy, repeat
from inference.leasing.scratch import require_room, scratch_folder
from inference.leasing.taking import STOPPING, hand_back
from inference.leasing.telling import Telling
from inference.payments.ledger import Ledger, Purchase
from inference.progress.eta import StageHistory, TaskEta
from inference.progress.hub import ProgressHub
from inference.progress.stages import Sink, StageTracker, both, plan
from inference.progress.tracing import Tracing
from inference.providers import is_known
from inference.queues.base import TaskQueue
from inference.task import GenerationRequest, Lease, Outcome, Task, Video

log = structlog.get_logger(__name__)

NOTE_S = 10.0
"""How long a write to the ledger may take after a lease has ended."""


class Runner:
    """Runs leases, several at once, on one engine, which generates for `at_once` of them (a GPU: for one)."""

    def __init__(
        self,
        queue: TaskQueue,
        engine: Engine | EngineTurns,
        *,
        policy: Policy | None = None,
        temp_dir: Path | None = None,
        sink: Callable[[Lease], Sink] | None = None,
        ledger: Ledger | None = None,
        recipe: str = "",
        at_once: int = 1,
        usd_per_s: float | None = None,
        hub: ProgressHub | None = None,
        history: StageHistory | None = None,
        tracing: Tracing | None = None,
    ) -> None:
        """`engine`: one of this runner's own, for `at_once` leases at a time, or one shared with other runners.

        `recipe`: settings of the engine on which it depends what a clip looks like.
        `usd_per_s`: what a second of the engine costs, for videos that have no price of their own.
        `hub`: where applications hear of leases; its `publish` must not wait for a network.
        `history`: how long stages took, to be shared by runners of one engine.
        """
        self._queue, self._ledger = queue, ledger
        self._policy = policy or Policy()
        limit_s = self._policy.attempt_limit_s
        self.turns = (
            engine if isinstance(engine, EngineTurns) else EngineTurns(engine, at_once=at_once, limit_s=limit_s)
        )
        self._recipe = recipe
        self._temp_dir = temp_dir
        self._sink = sink
        self._usd_per_s = usd_per_s
        self._hub, self._history, self._tracing = hub, history or StageHistory(), tracing or Tracing()

    async def check(self) -> None:
        """Looks whether a task could be made now, before one is taken.

        Raises as Engine.check; where the queue takes no task back, also DiskFull and NotWritable: each task that was
        taken then would be lost.
        """
        if not self._queue.hands_back:
            require_room(self._temp_dir)
        await self.turns.check()

    async def run(self, lease: Lease) -> Outcome:
        """Runs one lease to its end. Errors become its Outcome; when cancelled, hands it back first."""
        bound = {"item_id": lease.task.item_id, "worker_id": lease.worker_id}
        telling, span = Telling(self._hub, lease), self._tracing.span(lease, self.turns.name)
        tracker = self._tracker(lease, both(span.sink, telling.sink))

        def ended(outcome: Outcome) -> Outcome:
            timed = outcome.model_copy(update={"stage_seconds": tracker.stage_seconds()})
            telling.ended(timed)
            span.ended(timed)
            return timed

        try:
            with span.current():
                outcome = ended(await self._run(lease, tracker))
        except anyio.get_cancelled_exc_class():
            # A queue that takes nothing back was told that the task failed.
            status: Literal["released", "failed"] = "released" if self._queue.hands_back else "failed"
            reason = STOPPING if status == "failed" else None  # handing a task back is no error
            ended(Outcome(status=status, item_id=lease.task.item_id, error=reason))
            log.info("lease_ended", **bound, status=status, error=STOPPING)
            raise
        facts = outcome.model_dump(mode="json", exclude={"item_id", "video"}, exclude_none=True)
        facts["seconds"] = round(sum(outcome.stage_seconds.values()), 1)
        if outcome.video is not None and outcome.video.cost_usd is not None:
            facts["cost_usd"] = outcome.video.cost_usd
        log.log(20 if outcome.status == "completed" else 30, "lease_ended", **bound, **facts)
        return outcome

    def _tracker(self, lease: Lease, sink: Sink) -> StageTracker:
        kind = _kind_of(lease.task, self.turns.name)
        stages = film.STAGES if lease.task.segments else plan(self.turns.stages, self._history.medians(kind))
        both_sinks = both(sink, self._sink(lease)) if self._sink else sink
        return StageTracker(stages, both_sinks, TaskEta(self._history, kind))

    async def _run(self, lease: Lease, tracker: StageTracker) -> Outcome:
        bound = {"item_id": lease.task.item_id, "worker_id": lease.worker_id}
        task = lease.task
        keeper = Keeper(self._queue, lease, self._policy, tracker)
        if task.segments:
            job: Job = FilmJob(tracker, len(task.segments), check=keeper.check)
        else:
            purchase = self._ledger.purchase(task.item_id, lease.worker_id) if self._ledger else None
            job = Job(tracker, purchase, keeper.check)
        asked = {"segments": len(task.segments)} if task.segments else {"duration_s": task.duration_s}
        log.info("lease_started", **bound, prompt_chars=len(task.prompt), **asked)
        if not is_known(lease.task.provider):  # the default provider makes it, a paid one refuses it
            log.warning("unknown_provider", **bound, provider=lease.task.provider)
        try:
            try:
                with scratch_folder(self._temp_dir, keep=self._policy.keep_temp) as folder:
                    await keeper.first_beat()  # fence
                    outcome = await self._to_the_end(lease, keeper, job, tracker, folder)
            except Exception as error:  # noqa: BLE001 - the one place where errors become an outcome
                outcome = await self._settle(lease, error, keeper)
        except anyio.get_cancelled_exc_class():
            await keeper.release(STOPPING)
            raise
        # After a lost or released lease the reservation belongs to the task's next holder. Of a film's, something may
        # be left in the end: segments that were found cost nothing.
        if outcome.status in ("failed", "cancelled") or (task.segments and outcome.status == "completed"):
            await self._unreserve(outcome.item_id)
        return outcome.model_copy(update={"machine_at_fault": outcome.machine_at_fault or job.hung})

    async def _to_the_end(self, lease: Lease, keeper: Keeper, job: Job, tracker: StageTracker, folder: Path) -> Outcome:
        async def work() -> Outcome:
            job.report("download")
            inputs = await keeper.stage(lambda: self._queue.fetch_inputs(lease, folder))
            video, unsettled = await self._made(lease, inputs, folder, keeper, job)
            job.report("upload")
            storage_path = await keeper.stage(lambda: self._queue.deliver(lease, video))
            job.report("report")
            await keeper.report(lambda: self._queue.complete(lease, storage_path, video))
            tracker.finish()
            for purchase in unsettled:
                await self._close_the_books(purchase, lease)
            return Outcome(status="completed", item_id=lease.task.item_id, video=video, storage_path=storage_path)

        return await keeper.guard(work, job)

    async def _made(
        self, lease: Lease, inputs: Mapping[str, Path], folder: Path, keeper: Keeper, job: Job
    ) -> tuple[Video, list[Purchase]]:
        """The task's video, and the payments that end once it is delivered."""
        task, ledger = lease.task, self._ledger
        request = GenerationRequest.from_task(task, self._queue.video_formats)
        if not isinstance(job, FilmJob):
            job.report("wait")
            async with self.turns.taken():
                began_at = anyio.current_time()
                video = await keeper.stage(lambda: self.turns.generate(request, inputs, folder, job))
                engine_s = anyio.current_time() - began_at
            return self._priced(video, engine_s), [job.purchase] if job.purchase else []

        def purchase(key: str) -> Purchase:
            assert ledger is not None  # noqa: S101  it is only asked where there is one
            return ledger.purchase(f"{task.item_id}.{key}", lease.worker_id, part_of=task.item_id)

        making = Film(
            self.turns,
            task.segments,
            request,
            inputs,
            folder,
            job,
            attempt=keeper.stage,
            fade_s=task.fade_s,
            recipe=self._recipe,
            store=self._queue.segments(lease),
            purchase=purchase if ledger else None,
        )
        return self._priced(await making.made(), making.engine_s), making.unsettled

    def _priced(self, video: Video, engine_s: float) -> Video:
        """The video with its price: its provider's, or else that of the time that it kept the engine busy."""
        if video.cost_usd is not None or self._usd_per_s is None:
            return video
        return video.model_copy(update={"cost_usd": round(engine_s * self._usd_per_s, 6)})

    async def hand_back(self, lease: Lease) -> None:
        """Hands back a lease whose work has not begun."""
        await hand_back(self._queue, lease, self._policy)

    async def _close_the_books(self, purchase: Purchase, lease: Lease) -> None:
        """Ends the payment. Until the queue has the video, the task's next holder may still need the paid clip."""
        try:
            await purchase.end("delivered")
        except I2VError as error:  # the video is delivered all the same
            log.warning("payment_left_open", item_id=lease.task.item_id, error=str(error))

    async def _unreserve(self, item_id: str) -> None:
        """Frees the money that the dispatcher reserved for a task that will not be paid for now."""
        try:
            with anyio.fail_after(NOTE_S):
                if self._ledger:
                    await self._ledger.unreserve(item_id)
        except (I2VError, TimeoutError) as error:  # the reservation expires after an hour
            log.warning("still_reserved", item_id=item_id, error=str(error))

    async def _settle(self, lease: Lease, error: Exception, keeper: Keeper) -> Outcome:
        """The one place where an error becomes an outcome and is reported to the queue."""
        item_id = lease.task.item_id
        worker_should: Literal["stop", "wait"] | None = None
        match error:
            case LeaseLost():  # if no beat was ever answered, this machine may be unable to reach the queue
                unheard = not (error.confirmed or keeper.heard)
                return Outcome(status="lease_lost", item_id=item_id, error=str(error), machine_at_fault=unheard)
            case CancelRequested():
                await keeper.release()
                return Outcome(status="cancelled", item_id=item_id, error=str(error))
            case I2VError():
                message = str(error)
                # In an outage elsewhere no machine is at fault: any other one would fail as well.
                machine_at_fault = not (error.is_outage if error.hand_back else error.task_at_fault)
                worker_should = "stop" if error.stops_worker else "wait" if error.is_outage else None
                goes_back = error.hand_back or self._may_be_tried_again(lease, machine_at_fault=machine_at_fault)
            case _:
                log.error("unexpected_error", item_id=item_id, exc_info=error)
                message, machine_at_fault = f"internal error: {type(error).__name__}: {error}", True
                goes_back = self._may_be_tried_again(lease, machine_at_fault=True)
        if goes_back and self._queue.hands_back:
            await keeper.release(message)
            return Outcome(
                status="released",
                item_id=item_id,
                error=message,
                machine_at_fault=machine_at_fault,
                worker_should=worker_should,
            )
        try:
            await self._report_failure(lease, message, keeper)
        except CancelRequested:
            await keeper.release()
            return Outcome(status="cancelled", item_id=item_id, error=message)
        except I2VError as unreported:
            # Not released: the next holder would spend as much on it, and no failure would be counted.
            lost = isinstance(unreported, LeaseLost)
            told = f"{message} (not reported: {unreported})"
            return Outcome(
                status="lease_lost",
                item_id=item_id,
                error=told,
                machine_at_fault=not lost,
                worker_should=worker_should,
            )
        return Outcome(
            status="failed",
            item_id=item_id,
            error=message,
            machine_at_fault=machine_at_fault,
            worker_should=worker_should,
        )

    def _may_be_tried_again(self, lease: Lease, *, machine_at_fault: bool) -> bool:
        """Whether a queue that counts tries gets the task back: another machine may make it, and no try costs money."""
        return bool(lease.tries_left) and machine_at_fault and self._ledger is None

    async def _report_failure(self, lease: Lease, message: str, keeper: Keeper) -> None:
        """Reports a failure once: after a lost answer, a beat shows whether it was counted before it is repeated.

        Raises LeaseLost, CancelRequested, QueueError.
        """
        sent = False

        async def report() -> None:
            nonlocal sent
            in_doubt, sent = sent, True
            try:
                if in_doubt:
                    await keeper.beat()  # fence
                await self._queue.fail(lease, message)
            except LeaseLost:
                if not in_doubt:
                    raise

        keeper.reporting = True
        while (left_s := keeper.lease_ends_at - anyio.current_time()) > 0:
            with anyio.move_on_after(left_s):  # each beat renews the lease, which gives the report more time
                return await repeat(report, self._policy)
        raise LeaseLost("the queue could not be reached before the lease ran out")


def _kind_of(task: Task, engine: str) -> str:
    """What takes about as long as this task."""
    if task.segments:
        return f"{engine}, {len(task.segments)} segments of {sum(each.duration_s for each in task.segments):g} s"
    if task.workflow is not None:
        return f"{engine}, a graph of {len(task.workflow)} nodes"
    return f"{engine}, {task.duration_s:g} s"
