"""`i2v runpod …`: a RunPod endpoint from outside. One photo by hand, the tasks of a queue, how its workers are."""

import base64
import binascii
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

import anyio
import anyio.to_thread
import typer
from pydantic import BaseModel, ValidationError
from rich.markup import escape

from inference import fleet, process, terminal
from inference.board import PoolName
from inference.cli_start import Prompt, Seconds, Url, Verbose, check_mp4, start, temporary_folder
from inference.dispatch import Containers
from inference.engines.wan.presets import PRESETS
from inference.errors import (
    EngineError,
    EngineFailed,
    I2VError,
    InvalidPhoto,
    InvalidRequest,
    PoolUnavailable,
    RecordsUnavailable,
    SettingsError,
)
from inference.keeper import Policy, repeat
from inference.media import photo as photos
from inference.media.video import probe
from inference.platform import NoContainers, RunPodContainers
from inference.progress import Progress, Sink
from inference.records import SqliteRecords
from inference.runpod_api import Health, Job, RunPodApi
from inference.runpod_wire import INLINE_BYTES, DirectInput
from inference.scratch import put
from inference.settings import Settings
from inference.storage import Storage
from inference.task import GenerationRequest, Video, explain

if sys.platform != "win32":
    import fcntl

MAX_SIDE_PX = 1536
"""Longer side that a photo is made smaller to where it does not fit into a request: even noise fits then, and no clip
is larger than 1280x720."""

MAX_VIDEO_BYTES = 1_000_000_000
"""A minute of 720p at x264's crf 18 is some 20 MB; a bucket holds what it holds."""

PREVIEW = "preview"
"""What an endpoint with that engine calls its preset."""

GRACE_S = 5.0
"""How long the answer to a job that was just sent is waited for by somebody who was interrupted."""

PATIENT = Policy()
"""How often a video is fetched that is not at hand: it was paid for, and once is not enough."""

CANCEL_S = 10.0
"""How long cancelling a job may take."""

app = typer.Typer(
    name="runpod",
    help="A RunPod endpoint with a queue: one photo, the tasks of a queue, how its workers are.\n\n"
    "Needs RUNPOD_API_KEY and RUNPOD_ENDPOINT_ID.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)

Endpoint = Annotated[str | None, typer.Option("--endpoint", metavar="ID", help="Instead of RUNPOD_ENDPOINT_ID.")]


class _Made(BaseModel):
    """Where a video is, in a worker's answer; what else it says of it is read from the video itself."""

    base64: str | None = None
    url: str | None = None


class _Answer(BaseModel):
    """What a worker of ours answers (`runpod_wire.answer`), as far as it is needed."""

    video: _Made
    seed: int | None = None
    timings: dict[str, float] = {}


def _photo(value: str) -> str:
    if not _is_url(value) and not Path(value).is_file():
        raise typer.BadParameter(f"file '{value}' does not exist, or is none.")
    return value


@app.command(epilog='Example: `i2v runpod invoke photo.jpg "slow dolly-in" -o out.mp4`')
def invoke(  # noqa: PLR0917 - as many arguments as it has options
    photo: Annotated[
        str, typer.Argument(help="A JPEG, PNG, WebP or HEIC file, or the URL of one.", callback=_photo, metavar="PHOTO")
    ],
    prompt: Prompt = "",
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the mp4 goes.")] = Path("out.mp4"),
    seconds: Seconds = 5,
    seed: Annotated[int | None, typer.Option(help="Same seed, same video.", min=0)] = None,
    negative: Annotated[str | None, typer.Option(help="What should not be seen, where the preset can do that.")] = None,
    preset: Annotated[str | None, typer.Option(help="Fail unless the endpoint runs this preset.")] = None,
    wait: Annotated[
        float,
        typer.Option("--wait", metavar="MINUTES", help="Minutes without a worker until it is cancelled.", min=0.01),
    ] = 30,
    endpoint: Endpoint = None,
    *,
    verbose: Verbose = False,
) -> None:
    """One photo through a worker of the endpoint into a file, without a queue of tasks.

    A photo too large for a request is made smaller first. Ctrl-C cancels the job at RunPod, and so does a wait there
    that is longer than --wait. The limit of the work itself goes by I2V_ATTEMPT_LIMIT.
    """
    check_mp4(output)
    settings = _start(endpoint, verbose=verbose)
    try:
        request = GenerationRequest(prompt=prompt, negative_prompt=negative, duration_s=seconds, seed=seed)
    except ValidationError as error:
        raise InvalidRequest(explain(error)) from None
    if preset is not None and preset not in (PREVIEW, *PRESETS):
        raise SettingsError(f"--preset: there is no preset {preset!r}; choose one of {', '.join(PRESETS)}")
    if preset is not None and preset != PREVIEW:
        PRESETS[preset].refuse(request)
    process.run(lambda: _invoke(settings, photo, request, preset, output.absolute(), wait_s=wait * 60))


@app.command(epilog="Example: `i2v runpod health`")
def health(
    endpoint: Endpoint = None,
    *,
    as_json: Annotated[bool, typer.Option("--json", help="As one line of JSON.")] = False,
    verbose: Verbose = False,
) -> None:
    """How many workers and jobs the endpoint has in which state; exits 1 where it does not answer."""
    settings = _start(endpoint, verbose=verbose)

    async def main() -> None:
        async with _open_api(settings) as api:
            found = await api.health()
        if as_json:
            typer.echo(found.model_dump_json())
        else:
            _show(found)

    process.run(main)


@app.command(
    epilog="Example, in a crontab, with settings in `.env`: `* * * * * cd /srv/i2v && .venv/bin/i2v runpod dispatch`"
)
def dispatch(url: Url = None, endpoint: Endpoint = None, *, verbose: Verbose = False) -> None:
    """Leases the tasks that can start now and sends each to the endpoint: one tick, for any scheduler.

    No more than two tasks are sent for each of I2V_RUNPOD_MAX_WORKERS. What cannot be sent is handed back. A second
    run beside this one does nothing on the same machine; on another it takes other tasks. Exits 1 where the queue or
    RunPod did not do what they were asked.

    Tasks that ask for a Runway model are made by the endpoint, too, unless there is a RUNWAYML_API_SECRET: then they
    are left to others, such as `i2v work --engine runway`.
    """
    settings = _start(endpoint, "api_url", verbose=verbose, api_url=url)
    with _alone(settings) as is_alone:
        if is_alone:
            process.run(lambda: _dispatch(settings))
        else:
            terminal.say("Another dispatch to this endpoint is at work here: nothing to do.")


def _start(
    endpoint: str | None, *required: str, verbose: bool, level: str | None = "warning", **overrides: Any
) -> Settings:
    overrides |= {"runpod_endpoint_id": endpoint}
    return start(level, *required, "runpod_key", "runpod_endpoint_id", verbose=verbose, **overrides)


@asynccontextmanager
async def _open_api(settings: Settings) -> AsyncIterator[RunPodApi]:
    assert settings.runpod_key  # noqa: S101 - `_start` demands both
    assert settings.runpod_endpoint_id  # noqa: S101
    async with RunPodApi(
        settings.runpod_key.get_secret_value(), settings.runpod_url, settings.runpod_endpoint_id
    ) as api:
        yield api


# One photo


async def _invoke(
    settings: Settings, photo: str, request: GenerationRequest, preset: str | None, output: Path, *, wait_s: float
) -> None:
    source = {"photo_url": photo} if _is_url(photo) else {"photo_base64": await _encoded(Path(photo))}
    try:
        asked = DirectInput(
            **source,
            prompt=request.prompt,
            negative_prompt=request.negative_prompt,
            seconds=request.duration_s,
            seed=request.seed,
            preset=preset,
        )
    except ValidationError as error:
        raise InvalidRequest(explain(error)) from None
    # Beside the output, on the same filesystem: the finished file appears whole or not at all.
    with temporary_folder(".i2v-", output.parent) as folder:
        with terminal.bar(f"at {settings.runpod_endpoint_id}") as sink:
            async with _open_api(settings) as api:
                job = await _finished(api, settings, asked.model_dump(exclude_none=True), sink, wait_s)
            answer = _completed(job)
            sink(Progress(stage="fetch", done=0, total=1, fraction=0.99))
            try:
                path = await _fetched(settings, answer.video, Path(folder))
            except I2VError:  # it is paid for
                terminal.say(f"RunPod keeps the answer of job {job.id} for 30 minutes: GET /status/{job.id} has it.")
                raise
        video = await anyio.to_thread.run_sync(_measured, path)
        path.replace(output)
    seed = "" if answer.seed is None else f" · seed {answer.seed}"
    execution_s = (job.execution_ms or 0) / 1000
    terminal.say(f"  {terminal.describe(video)}{seed}")
    terminal.say(f"  time  {terminal.times({'queue': (job.delay_ms or 0) / 1000} | answer.timings)}")
    terminal.say(f"  cost  {execution_s:.1f} s on a GPU, its start aside; RunPod does not say what they are billed at")
    terminal.out.print(output)


async def _encoded(photo: Path) -> str:
    """A photo as base64, small enough for a request. Raises InvalidPhoto, MachineFault."""

    def encoded() -> str:
        info = photos.verify(photo)  # before a GPU is started for it
        try:
            content = photo.read_bytes()
        except OSError as error:
            raise InvalidPhoto(f"the photo cannot be read: {error.strerror}") from None
        if len(content) > INLINE_BYTES:
            smaller = photos.jpeg(photo, max_side_px=MAX_SIDE_PX, widest=photos.MAX_ASPECT_RATIO)
            terminal.say(
                f"The photo ({info.width}x{info.height}, {len(content) / 1e6:.1f} MB) is larger than a request may be: "
                f"sent as a JPEG of {len(smaller) / 1e6:.1f} MB."
            )
            content = smaller
        return base64.b64encode(content).decode("ascii")

    return await anyio.to_thread.run_sync(encoded)


async def _finished(api: RunPodApi, settings: Settings, payload: dict[str, Any], sink: Sink, wait_s: float) -> Job:
    """Sends a job and follows it to its end; one that is given up, for whatever reason, is cancelled."""
    sink(Progress(stage="send", done=0, total=1, fraction=0))
    limit_s = fleet.execution_limit_s(settings)
    job_id, sending = None, anyio.CancelScope(shield=True)
    try:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(_hurry, sending)
            with sending:  # what is sent is heard of, or nobody could cancel it
                job_id = await api.run(payload, execution_timeout_s=limit_s, ttl_s=wait_s + limit_s)
            tasks.cancel_scope.cancel()
        return await api.until_ended(str(job_id), sink, wait_s=wait_s)
    except BaseException:
        if job_id is not None:
            await _cancel(api, job_id)
        elif sending.cancelled_caught:
            terminal.say("Whether RunPod took the job is not known: see the endpoint's requests at console.runpod.io.")
        raise


async def _hurry(scope: anyio.CancelScope) -> None:
    """Leaves what is shielded GRACE_S once everything around it is cancelled."""
    try:
        await anyio.sleep_forever()
    finally:
        scope.deadline = anyio.current_time() + GRACE_S


async def _cancel(api: RunPodApi, job_id: str) -> None:
    why = f"no answer within {CANCEL_S:g} s"
    terminal.say(f"Cancelling job {job_id} at RunPod …")  # before anything that a second Ctrl-C could end
    with anyio.CancelScope(shield=True), anyio.move_on_after(CANCEL_S):
        try:
            await api.cancel(job_id)
        except I2VError as error:
            why = str(error)
        else:
            terminal.say(f"Job {job_id} was cancelled at RunPod.")
            return
    terminal.say(f"Job {job_id} could not be cancelled and may go on ({escape(why)}): stop it at console.runpod.io.")


def _completed(job: Job) -> _Answer:
    """What came of a job. Raises EngineError, one line that says whether trying again can help."""
    match job.status:
        case "COMPLETED":
            with suppress(ValidationError):
                answer = _Answer.model_validate(job.output)
                if answer.video.base64 or answer.video.url:
                    return answer
            raise EngineError(f"job {job.id} brought no video: is the endpoint one with a worker of serverless-i2v?")
        case "CANCELLED":
            raise EngineError(f"job {job.id} was cancelled at RunPod by somebody else")
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


async def _fetched(settings: Settings, made: _Made, folder: Path) -> Path:
    """The mp4 of an answer. Raises EngineError, StorageError, DiskFull."""
    path = folder / "video.mp4"
    if made.base64 is None:
        storage = Storage(
            trusted_origins=[settings.bucket_url] if settings.bucket_url else [],  # the operator's own
            allow_private=settings.allow_private_addresses,
            max_download_bytes=MAX_VIDEO_BYTES,
        )
        async with storage:
            await repeat(lambda: storage.download(str(made.url), path), PATIENT)
        return path
    try:
        content = base64.b64decode(made.base64, validate=True)
    except (binascii.Error, ValueError):
        raise EngineError("what the worker sent as a video is not base64") from None
    await anyio.to_thread.run_sync(put, path, content)
    return path


def _measured(path: Path) -> Video:
    """Raises MediaError for what is no video."""
    info = probe(path)
    return Video(
        path=path,
        width=info.width,
        height=info.height,
        fps=info.fps,
        frames=info.frames,
        size_bytes=path.stat().st_size,
    )


def _is_url(text: str) -> bool:
    return text.lower().startswith(("https://", "http://"))


# An endpoint


def _show(found: Health) -> None:
    for name, counts in (("workers", found.workers), ("jobs", found.jobs)):
        shown = (f"{count} {state.replace('_', ' ')}" for state, count in counts.model_dump(by_alias=False).items())
        terminal.out.print(f"{name:<8} {' · '.join(shown)}")
    if found.workers.throttled:
        terminal.say("Throttled workers wait for a free machine: allow more kinds of GPU, regions or CUDA versions.")
    if found.workers.unhealthy:
        terminal.say(
            "Unhealthy workers did not start, or not within RUNPOD_INIT_TIMEOUT: see their logs at console.runpod.io."
        )


# The tasks of a queue


async def _dispatch(settings: Settings) -> None:
    shape = fleet.on_runpod(settings)
    async with _open_api(settings) as api:
        workers = RunPodContainers(
            api,
            execution_timeout_s=fleet.execution_limit_s(settings),
            lease_s=shape.lease_s(settings),
            webhook=settings.runpod_webhook,
        )
        pools: dict[PoolName, Containers] = {"gpu": workers, "runway": NoContainers()}
        records = SqliteRecords(settings.ledger_path)
        async with fleet.open_dispatcher(settings, shape, records, pools) as dispatcher:
            terminal.out.print(await dispatcher.tick(), markup=False)
    if dispatcher.troubles:
        raise PoolUnavailable("; ".join(dispatcher.troubles))


@contextmanager
def _alone(settings: Settings) -> Iterator[bool]:
    """Whether nobody else on this machine dispatches to the endpoint. Raises RecordsUnavailable.

    Two that look at it at the same moment would each fill its free slots; no task is sent twice even then.
    """
    path = settings.ledger_path.with_name(f"dispatch-{settings.runpod_endpoint_id}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
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
            except OSError:  # a file system without locks is as good as another machine
                pass
        yield is_alone
