"""One job at a RunPod endpoint, for a person who waits for its video: sent or resumed, followed, given up.

Messages for that person go to `say` at once, because each may be the last thing that the command does. Progress goes to
the caller's sink.
"""

import base64
import math
from contextlib import suppress
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
from pydantic import ValidationError

from inference.errors import EngineError, EngineFailed, I2VError, InvalidPhoto, InvalidRequest, JobInDoubt
from inference.fleet import shape
from inference.on_runpod.answer import KEPT, KEPT_S, Again, Say, kept
from inference.on_runpod.api import RunPodApi, RunPodJob
from inference.on_runpod.wire import INLINE_BYTES, DirectInput
from inference.progress.stages import Progress, Sink
from inference.settings import Settings
from inference.task import GenerationRequest, explain

MAX_SIDE_PX = 1536
"""The longer side of a photo that was scaled down to fit into a request. At this size even noise fits, and no clip is
larger than 1280x720."""

GRACE_S = 5.0
"""How long an interrupted command waits for the answer to a job that it has just sent."""

CANCEL_S = 10.0
"""How long cancelling a job may take, and how long the status request before it."""

SECOND_LOOK_S = 1.0
"""Pause before a job that RunPod does not know is asked for again."""


# Sent


def is_url(photo: str) -> bool:
    """Whether a photo is given as a URL, which the worker fetches."""
    return photo.lower().startswith(("https://", "http://"))


async def asked(photo: str, request: GenerationRequest, preset: str | None, say: Say) -> dict[str, Any]:
    """A job's input, with the photo inside or as a URL. Raises InvalidPhoto, InvalidRequest, MachineFault."""
    source = {"photo_url": photo} if is_url(photo) else {"photo_base64": await _encoded(Path(photo), say)}
    try:
        found = DirectInput(
            **source,
            prompt=request.prompt,
            negative_prompt=request.negative_prompt,
            seconds=request.duration_s,
            seed=request.seed,
            preset=preset,
        )
    except ValidationError as error:
        raise InvalidRequest(explain(error)) from None
    return found.model_dump(exclude_none=True)


async def _encoded(photo: Path, say: Say) -> str:
    """A photo as base64, small enough for a request. Raises InvalidPhoto, MachineFault."""

    def encoded() -> str:
        from inference.media import photo as photos  # noqa: PLC0415 - a tick sends no photo

        info = photos.verify(photo)  # before a GPU is started for the job
        try:
            content = photo.read_bytes()
        except OSError as error:
            raise InvalidPhoto(f"the photo cannot be read: {error.strerror}") from None
        if len(content) > INLINE_BYTES:
            smaller = photos.jpeg(photo, max_side_px=MAX_SIDE_PX, widest=photos.MAX_ASPECT_RATIO)
            say(
                f"The photo ({info.width}x{info.height}, {len(content) / 1e6:.1f} MB) is larger than a request may be: "
                f"sent as a JPEG of {len(smaller) / 1e6:.1f} MB."
            )
            content = smaller
        return base64.b64encode(content).decode("ascii")

    return await anyio.to_thread.run_sync(encoded)


async def invoked(
    api: RunPodApi, settings: Settings, payload: dict[str, Any], sink: Sink, again: Again, *, say: Say, wait_s: float
) -> RunPodJob:
    """Sends a job and follows it to its end. Raises as RunPodApi.run and RunPodApi.until_ended.

    When given up, a job is cancelled if the caller was interrupted, or if it still waits for a worker. Otherwise
    (RunPod does not answer, or refuses the key meanwhile) it may be almost done and is paid for, so it is left running.
    """
    sink(Progress(stage="send", done=0, total=1, fraction=0))
    limit_s = shape.execution_limit_s(settings)
    ttl_s = wait_s + limit_s + KEPT_S  # or the answer of a slow job would be forgotten sooner than we promise
    job_id, sending, answered = None, anyio.CancelScope(shield=True), anyio.Event()
    try:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(_hurry, sending, answered, say)
            try:
                with sending:  # shielded: without the id nobody could cancel the job
                    job_id = await api.run(payload, execution_timeout_s=limit_s, ttl_s=ttl_s)
            except JobInDoubt as error:
                raise JobInDoubt(
                    f"{error}: look at the endpoint's requests at console.runpod.io before it is sent again, or a GPU "
                    "may be paid for twice"
                ) from None
            finally:
                answered.set()
        await anyio.lowlevel.checkpoint()  # raises if the caller was interrupted meanwhile
        say(f"  job   {job_id}")  # at once: a process that is killed could not say it later
        return await api.until_ended(str(job_id), sink, wait_s=wait_s)
    except BaseException as error:
        if job_id is None:
            if not isinstance(error, Exception):  # an Exception says so itself; a second Ctrl-C gets through the shield
                say("Whether RunPod took the job is not known: see the endpoint's requests at console.runpod.io.")
        elif isinstance(error, I2VError) and not await _is_waiting(api, job_id):
            say(f"Job {job_id} was not cancelled and may go on. {kept(job_id, again)}")
        else:
            await _cancel(api, job_id, again, say)
        raise


async def _hurry(scope: anyio.CancelScope, answered: anyio.Event, say: Say) -> None:
    """Once the caller is cancelled, gives the shielded request GRACE_S to end."""
    try:
        await answered.wait()
    finally:
        if not answered.is_set():
            scope.deadline = anyio.current_time() + GRACE_S
            # People press Ctrl-C again when nothing seems to happen.
            say(f"Waiting up to {GRACE_S:g} s for RunPod's answer, to cancel the job …")


# Given up


async def _is_waiting(api: RunPodApi, job_id: str) -> bool:
    """Whether RunPod says that no worker has the job, so that cancelling it loses no work."""
    with anyio.CancelScope(shield=True), anyio.move_on_after(CANCEL_S), suppress(I2VError):
        job = await api.status(job_id)
        return job is not None and job.is_waiting
    return False


async def _cancel(api: RunPodApi, job_id: str, again: Again, say: Say) -> None:
    why = f"no answer within {CANCEL_S:g} s"
    say(f"Cancelling job {job_id} at RunPod …")  # before anything that a second Ctrl-C could interrupt
    job = None
    try:
        with anyio.CancelScope(shield=True), anyio.move_on_after(CANCEL_S):
            try:
                job = await api.cancel(job_id)
                why = "RunPod does not know it"  # yet: the job may not have reached all of its servers
            except I2VError as error:
                why = str(error)
    except BaseException:  # a second Ctrl-C gets through the shield; the time limit above does not raise
        say(f"Whether job {job_id} was cancelled is not known: look at console.runpod.io.")
        raise
    if job is not None and job.status == "COMPLETED":  # meanwhile
        say(f"Job {job_id} was made already. {kept(job_id, again)}")
        return
    if job is not None:
        say(f"Job {job_id} was cancelled at RunPod.")
        return
    say(f"Job {job_id} could not be cancelled and may go on ({why}): stop it at console.runpod.io.")


# Resumed


async def taken_up(api: RunPodApi, settings: Settings, job_id: str, sink: Sink, say: Say) -> RunPodJob:
    """Follows a job that was sent earlier to its end. It is never cancelled here.

    Raises EngineError where RunPod does not know it, and as RunPodApi.until_ended.
    """
    sink(Progress(stage="look", done=0, total=1, fraction=0))
    job = None
    try:
        job = await _known(api, settings, job_id)
        # Its sender decided how long it may wait.
        return job if job.has_ended else await api.until_ended(job_id, sink, wait_s=math.inf)
    except EngineFailed:
        say(f"Job {job_id} was not cancelled: while RunPod has it, the same command may be run again.")
        raise
    except anyio.get_cancelled_exc_class():
        how = "was left as it is" if job is None else "goes on at RunPod"  # the job may have ended, or not exist
        say(f"Job {job_id} {how}: the same command may be run again.")
        raise


async def _known(api: RunPodApi, settings: Settings, job_id: str) -> RunPodJob:
    """The job, asked for twice: a script may have sent it a moment ago, so that not every server knows it yet.

    `until_ended` would ask more often, but an id that a person types is known everywhere by now, or nowhere.
    """
    job = await api.status(job_id)
    if job is None:
        await anyio.sleep(SECOND_LOOK_S)
        job = await api.status(job_id)
    if job is None:
        raise EngineError(
            f"RunPod does not know job {job_id} at endpoint {settings.runpod_endpoint_id}: it keeps answers for "
            f"{KEPT}, each at the endpoint that was asked (RUNPOD_ENDPOINT_ID, or --endpoint)"
        )
    return job
