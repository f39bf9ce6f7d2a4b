"""The interface of every engine, and what an engine may ask of the code that calls it."""

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

import anyio
import anyio.to_thread

from inference.errors import CancelRequested, I2VError, InvalidRequest
from inference.payments.ledger import Purchase
from inference.progress.stages import StageTracker
from inference.task import PHOTO, GenerationRequest, Video

T = TypeVar("T")

STOP_GRACE_S = 10.0
"""How long a cancelled engine's thread has to reach its next step before it counts as hung."""


class Job:
    """How an engine reports progress and learns of cancellation, from any thread."""

    def __init__(
        self,
        tracker: StageTracker | None = None,
        purchase: Purchase | None = None,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self._tracker = tracker
        self._check = check
        self._cancelled: I2VError | None = None
        self.purchase = purchase  # the lease's entry in the ledger, for engines whose generations are paid one by one
        self.hung = False  # a thread of the engine did not stop; this process should not generate again

    def report(self, stage: str, done: float = 0, total: float = 1, detail: Mapping[str, Any] | None = None) -> None:
        """Reports progress of one stage of the engine: `done` of `total`; `detail` is for queues that pass it on."""
        if self._tracker:
            self._tracker.update(stage, done, total, detail)

    def cancel(self, reason: I2VError) -> None:
        """Makes every later `raise_if_cancelled` raise `reason`; later reasons are ignored."""
        self._cancelled = self._cancelled or reason

    @property
    def cancelled_by(self) -> I2VError | None:
        """Why the video is not wanted any more: the lease is lost, or a person cancelled. None while it is wanted.

        None also while a worker is stopping: that cancels the call, but the task continues on another worker.
        """
        return self._cancelled

    def raise_if_cancelled(self) -> None:
        """For engines to call at every step and stage boundary. Raises the reason for which the job was cancelled."""
        if (reason := self.cancelled_by) is not None:
            raise reason

    def raise_if_lease_ended(self) -> None:
        """For engines to call on the event loop before they spend money. Raises as `raise_if_cancelled`, LeaseLost.

        It also compares clocks: a process that was paused gets here before its heartbeat notices the lost lease.
        """
        self.raise_if_cancelled()
        self._check()


class Engine(Protocol):
    """Turns one photo, or a workflow with the files it names, into one video."""

    name: str
    stages: Mapping[str, float]  # the stages it reports, in order, with their relative durations

    async def check(self) -> None:
        """Proves that a task could be made now. Cheap: a worker asks before it takes each task.

        Raises ProviderUnavailable where another service has to come back first.
        """
        ...

    async def generate(self, request: GenerationRequest, inputs: Mapping[str, Path], folder: Path, job: Job) -> Video:
        """Makes the video in `folder`, which belongs to this lease and is removed afterwards.

        `inputs` are the task's files by name, each verified by its kind. An engine that generates from a photo asks
        `photo_of` for it, takes `last_photo` where it can, and leaves all others alone.
        One call at a time, unless the engine says otherwise. A failed or cancelled call leaves the engine usable.
        Raises InvalidRequest, InvalidPhoto, EncodeFailed, MachineFault, EngineFailed, EngineLost.
        """
        ...


def photo_of(request: GenerationRequest, inputs: Mapping[str, Path], engine: str) -> Path:
    """The photo, for engines that generate from one. Raises InvalidRequest for a workflow, or where there is none."""
    if request.workflow is not None:
        raise InvalidRequest(f"workflow: the {engine} engine makes videos of photos; I2V_ENGINE=comfyui runs workflows")
    if PHOTO not in inputs:
        raise InvalidRequest(f"{PHOTO}: the {engine} engine makes videos of photos, and this task has none")
    return inputs[PHOTO]


async def run_in_thread(job: Job, work: Callable[[], T], *, stop_grace_s: float = STOP_GRACE_S) -> T:
    """Runs an engine's blocking work in a thread, which is stopped through its job.

    A thread cannot be killed: when this call is cancelled, the job is cancelled, and the thread has `stop_grace_s`
    to reach its next `raise_if_cancelled`. If it does not, `job.hung` is set and the thread is left behind.
    """
    started, finished = threading.Event(), threading.Event()

    def guarded() -> T:
        started.set()
        try:
            job.raise_if_cancelled()
            return work()
        finally:
            finished.set()

    try:
        return await anyio.to_thread.run_sync(guarded, abandon_on_cancel=True)
    except anyio.get_cancelled_exc_class():
        job.cancel(CancelRequested("the job was cancelled"))
        if started.is_set():
            with anyio.CancelScope(shield=True):
                job.hung = not await anyio.to_thread.run_sync(finished.wait, stop_grace_s)
        raise
