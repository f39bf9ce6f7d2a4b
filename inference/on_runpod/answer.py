"""The result of a job at a RunPod endpoint: reads and judges its answer, and saves the video in it.

`again` makes the command line that fetches the video of a job later. `say` prints a line for the person who waits.
"""

import base64
import binascii
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
from pydantic import BaseModel, ValidationError

from inference.errors import (
    AddressRefused,
    EngineError,
    EngineFailed,
    MachineFault,
    MediaError,
    StorageError,
    StorageUnavailable,
    one_line,
    write_error,
)
from inference.leasing.retry import Policy, repeat
from inference.leasing.scratch import put
from inference.on_runpod.api import RunPodJob
from inference.on_runpod.wire import MAX_ERROR_CHARS
from inference.settings import Settings
from inference.task import Video
from inference.transfer.storage import Storage

Again = Callable[[str], str]
Say = Callable[[str], None]

KEPT_S = 1800.0
"""How long RunPod keeps the answer of a job that came by `/run` (docs.runpod.io/serverless/endpoints/send-requests)."""

KEPT = f"{KEPT_S / 60:g} minutes"

MAX_VIDEO_BYTES = 1_000_000_000
"""A minute of 720p at x264's crf 18 is some 20 MB; a bucket may hold larger files."""

PATIENT = Policy()
"""Retries for downloading a video: it is paid for, so one attempt is not enough."""


class _Made(BaseModel):
    """Where the video of an answer is. Its properties are read from the file and not from the answer."""

    base64: str | None = None
    url: str | None = None


class _MadeFile(BaseModel):
    """One file of a workflow (`comfy.run_workflow`)."""

    type: str
    data: str


class WorkerAnswer(BaseModel):
    """The fields of a worker's answer (`wire.answer`) that are needed here."""

    video: _Made
    seed: int | None = None
    timings: dict[str, float] = {}
    images: list[_MadeFile] = []  # of a workflow: what it made, the video first

    @property
    def made(self) -> _Made:
        """Where the video is, whichever kind of job it was."""
        inside = [file.data for file in self.images[:1] if file.type == "base64"]
        return _Made(base64=inside[0]) if inside else self.video


def kept(job_id: str, again: Again) -> str:
    """Tells how to get the video of a job that was not saved."""
    return f"RunPod keeps its answer for {KEPT}: {again(job_id)}"


def completed(job: RunPodJob) -> WorkerAnswer:
    """The answer of a job that made a video. Raises EngineError, which says whether a retry can help."""
    match job.status:
        case "COMPLETED":
            with suppress(ValidationError):
                answer = WorkerAnswer.model_validate(job.output)
                if answer.made.base64 or answer.made.url:
                    return answer
            raise EngineError(one_line(f"job {job.id} brought no video{_why_none(job.output)}", MAX_ERROR_CHARS))
        case "CANCELLED":
            raise EngineError(f"job {job.id} was cancelled at RunPod")
        case "TIMED_OUT":
            worked_s = (job.execution_ms or 0) / 1000
            raise EngineFailed(
                f"RunPod gave job {job.id} up after {worked_s:.0f} s on a worker: its time was over, or the worker is "
                "gone; trying again can help, and so can a longer I2V_ATTEMPT_LIMIT"
            )
    advice = ""
    if isinstance(job.output, dict) and isinstance(may_pass := job.output.get("retryable"), bool):
        advice = f"; trying again {'can' if may_pass else 'will not'} help"
    raise EngineFailed(f"job {job.id} failed: {job.why}{advice}")


def _why_none(output: Any) -> str:
    """Jobs of a queue's tasks end well without a video in their answers (`wire.answer_of`)."""
    match output:
        case {"item_id": str(item_id), "video": {"storage_path": str(path)}}:
            return f": it made task {item_id} of a queue, whose storage has it at {path}"
        case {"completed": int(count), "tasks": [*tasks]}:
            said = f"{count} of {len(tasks)} completed"
            return f": it took tasks from a queue ({said}), whose storage has what was made of them"
    return ": is the endpoint one with a worker of serverless-i2v?"


async def saved(
    settings: Settings, job_id: str, made: _Made, *, folder: Path, output: Path, again: Again, say: Say
) -> Video:
    """Saves the video of an answer at `output`, which appears whole or not at all; `folder` is for temporary files.

    Raises EngineError, StorageError, MediaError, MachineFault.
    """
    path = folder / "video.mp4"
    try:
        await _fetch(settings, made, path)
        video = await anyio.to_thread.run_sync(_measured, path)
        try:
            path.replace(output)
        except OSError as error:
            raise write_error(error, f"{output} cannot be written: {error.strerror}") from None
    except (StorageUnavailable, AddressRefused, MachineFault, anyio.get_cancelled_exc_class()):
        # The video is paid for, and a changed setting or a later attempt can help.
        say(f"Job {job_id} was made. {kept(job_id, again)}")
        raise
    except (StorageError, MediaError):
        say(f"Job {job_id} was made, but fetching its answer again would bring the same.")
        raise
    return video


async def _fetch(settings: Settings, made: _Made, path: Path) -> None:
    """The mp4 of an answer. Raises EngineError, StorageError, MachineFault."""
    if made.base64 is None:
        storage = Storage(
            trusted_origins=[settings.bucket_url] if settings.bucket_url else [],  # the operator's own bucket
            allow_private=settings.allow_private_addresses,
            max_download_bytes=MAX_VIDEO_BYTES,
        )
        async with storage:
            await repeat(lambda: storage.download(str(made.url), path), PATIENT)
        return
    try:
        content = base64.b64decode(made.base64, validate=True)
    except (binascii.Error, ValueError):
        raise EngineError("what the worker sent as a video is not base64") from None
    await anyio.to_thread.run_sync(put, path, content)


def _measured(path: Path) -> Video:
    """The video with its properties. Raises MediaError where the file is no video."""
    from inference.media.video import probe  # noqa: PLC0415 - a tick fetches no video

    info = probe(path)
    return Video(
        path=path,
        width=info.width,
        height=info.height,
        fps=info.fps,
        frames=info.frames,
        size_bytes=path.stat().st_size,
    )
