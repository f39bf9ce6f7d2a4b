"""One tick of the dispatcher for a RunPod endpoint, run by any scheduler.

It first judges the jobs of earlier ticks, then dispatches. A lock keeps a second tick on this machine from doing both.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import anyio
import structlog

from inference import private
from inference.errors import EngineError, I2VError, PoolUnavailable, RecordsUnavailable
from inference.fleet import opening
from inference.fleet.containers import Containers
from inference.fleet.readings import Readings
from inference.fleet.shape import execution_limit_s
from inference.on_runpod.api import RunPodApi, RunPodJob
from inference.on_runpod.containers import NoContainers, RunPodContainers, on_runpod
from inference.payments.records import Records, SqliteRecords
from inference.progress.stages import DELIVERY_STAGES
from inference.providers import DEFAULT, PAID, PoolName
from inference.settings import Settings

log = structlog.get_logger(__name__)

LOOK_S = 6.0
"""How long a tick asks about jobs of earlier ticks. With the rest (`dispatch.py`) a tick ends within a minute."""

LOOKS = 8
"""Status requests at the same time."""

JOBS_KEPT = 200
"""How many jobs are remembered; an endpoint holds two per worker. A job that is dropped is not judged, and no more."""

if sys.platform != "win32":
    import fcntl


async def tick(settings: Settings, api: RunPodApi) -> str:
    """Leases and sends what can start now; returns what was done, in one line.

    Raises SettingsError, as Dispatcher.tick, and PoolUnavailable with that line where the queue, RunPod or the workers
    there did not do what they were asked.
    """
    shape = on_runpod(settings)
    records = SqliteRecords(settings.ledger_path)
    readings = Readings(records, fleet=settings.runpod_endpoint_id)  # readings are kept apart by endpoint
    jobs = SentJobs(api, records, settings.runpod_endpoint_id or "")
    faults = await jobs.judge(readings)
    workers = RunPodContainers(
        api,
        execution_timeout_s=execution_limit_s(settings),
        lease_s=shape.lease_s(settings),
        webhook=settings.runpod_webhook,
        on_sent=jobs.add,
    )
    pools: dict[PoolName, Containers] = {DEFAULT.pool: workers, PAID.pool: NoContainers()}
    failed = f"; {len(faults)} failed there since the last tick, at last {faults[-1]}" if faults else ""
    try:
        async with opening.open_dispatcher(settings, shape, records, pools, readings) as dispatcher:
            decision = await dispatcher.tick() + failed
    except I2VError as error:
        # The failures of earlier jobs are reported only once, so they are added to this error.
        error.args = (f"{error}{failed}",)
        raise
    if faults or dispatcher.troubles:
        raise PoolUnavailable(decision)
    return decision


class SentJobs:
    """Jobs that ticks sent, until RunPod says how they ended.

    If an endpoint's workers cannot work (no queue in their settings, the wrong key, weights that do not load), its jobs
    fail one after the other and the queue is told nothing. Containers on Modal write their own readings; here readings
    are derived from how jobs ended. So a failing pool is noticed, left alone for a while, and tried again.
    """

    def __init__(self, api: RunPodApi, records: Records, endpoint_id: str) -> None:
        self._api, self._records, self._key = api, records, f"runpod/{endpoint_id}"

    async def add(self, job_id: str) -> None:
        """Remembers a job that was sent. One that cannot be recorded is not judged later, which is harmless."""
        try:
            await self._keep([*await self._known(), job_id])
        except RecordsUnavailable as error:
            log.warning("job_not_followed", job_id=job_id, error=str(error))

    async def judge(self, readings: Readings) -> list[str]:
        """Records a reading for every job that has ended, in the order they were sent; returns why some failed.

        Only failures that the endpoint is to blame for count as such. Raises RecordsUnavailable.
        """
        faults: list[str] = []
        ids = await self._known()
        found: dict[str, RunPodJob | None] = {}
        limiter = anyio.CapacityLimiter(LOOKS)

        async def look(job_id: str) -> None:
            async with limiter:
                with suppress(EngineError):  # the tick that follows meets the same error, and reports it
                    found[job_id] = await self._api.status(job_id)

        with anyio.move_on_after(LOOK_S):
            async with anyio.create_task_group() as tasks:
                for job_id in ids:
                    tasks.start_soon(look, job_id)
        # Jobs that RunPod has forgotten are dropped. The list is saved before the readings are recorded: a crash in
        # between then loses a reading, where the other order would count a fault twice.
        left = [each for each in ids if each not in found or ((job := found[each]) is not None and not job.has_ended)]
        if left != ids:
            await self._keep(left)
        for job in (found.get(job_id) for job_id in ids):
            if job is None or not job.has_ended:
                continue
            if (why := fault(job)) is not None:
                faults.append(f"job {job.id}: {why}")
                await readings.faulted(DEFAULT.pool, faults[-1])
            elif job.status == "COMPLETED":
                await readings.worked(DEFAULT.pool, _clip_s(job))
        return faults

    async def _known(self) -> list[str]:
        try:
            return [str(each) for each in json.loads(await self._records.get(self._key) or "[]")]
        except (ValueError, TypeError):  # written by another version
            return []

    async def _keep(self, ids: list[str]) -> None:
        await self._records.put(self._key, json.dumps(ids[-JOBS_KEPT:]))


def fault(job: RunPodJob) -> str | None:
    """Why no more jobs should be sent to the endpoint for now, judging by one job; None if nothing speaks against it.

    A worker that ran the task says in its answer whether its machine or an outage elsewhere is to blame
    (`wire.answer_of`). A job that failed before a worker could answer speaks against the endpoint.
    """
    output = job.output if isinstance(job.output, dict) else {}
    match job.status:
        case "FAILED":
            return job.why if _blames(output, unless_said="item_id" not in output) else None
        case "TIMED_OUT" if job.execution_ms:  # a job that no worker took is visible in the endpoint's queue length
            return f"its time was over after {job.execution_ms / 1000:.0f} s on a worker, or the worker is gone"
        case "COMPLETED" if not output.get("completed"):
            tasks = output.get("tasks")
            drained = [each for each in tasks if isinstance(each, dict)] if isinstance(tasks, list) else []
            return next((str(each.get("error")) for each in drained if _blames(each)), None)
    return None


def _blames(said: dict[str, Any], *, unless_said: bool = False) -> bool:
    """Whether a worker's answer about a task speaks against sending more jobs for now."""
    return said.get("machine_at_fault", unless_said) is True or said.get("worker_should") == "wait"


def _clip_s(job: RunPodJob) -> float | None:
    """Seconds that the engine worked on the clip of a job with one clip."""
    timings: Any = job.output.get("timings") if isinstance(job.output, dict) else None
    if not isinstance(timings, dict):
        return None
    own = [each for stage, each in timings.items() if stage not in DELIVERY_STAGES and isinstance(each, int | float)]
    return sum(own) or None


@contextmanager
def alone(settings: Settings) -> Iterator[bool]:
    """Whether no other process on this machine dispatches to the endpoint. Raises RecordsUnavailable.

    Two dispatchers at the same moment would each fill the same free slots, though no task is sent twice even then.
    """
    path = settings.ledger_path.with_name(f"dispatch-{settings.runpod_endpoint_id}.lock")
    try:
        private.make_folder(path.parent)
        private.make_file(path)
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
            except OSError:  # without file locks, the process goes on as one on another machine would
                pass
        yield is_alone
