"""`i2v runpod …`: calls a RunPod endpoint, with one photo or with the tasks of a queue, and shows its health."""

import shlex
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import TypeAdapter, ValidationError

from inference import process, terminal
from inference.commands.layout import MARKUP
from inference.commands.outputs import check_mp4, temporary_folder
from inference.commands.start import OPTIONS, Prompt, Seconds, Url, Verbose, start
from inference.engines.wan.presets import PRESETS
from inference.errors import SettingsError
from inference.on_runpod import answer as runpod_answer
from inference.on_runpod import job as runpod_job
from inference.on_runpod import tick as runpod_tick
from inference.on_runpod.api import Health, JobId, RunPodApi, RunPodJob
from inference.progress.stages import Progress, Sink
from inference.settings import Settings
from inference.task import GenerationRequest, asked_as

PREVIEW = "preview"
"""The preset's name at an endpoint with the preview engine."""

SOME_JOB = "60902e6c-08a1-426e-9cb9-9eaec90f5e2b-u1"
"""An example of RunPod's ids, for help and errors."""

job_ids: TypeAdapter[str] = TypeAdapter(JobId)

app = typer.Typer(
    name="runpod",
    help="A RunPod endpoint with a queue: one photo, the tasks of a queue, how its workers are.\n\n"
    "Needs RUNPOD_API_KEY and RUNPOD_ENDPOINT_ID.",
    no_args_is_help=True,
    rich_markup_mode=MARKUP,
)

Endpoint = Annotated[str | None, typer.Option("--endpoint", metavar="ID", help="Instead of RUNPOD_ENDPOINT_ID.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="Where the mp4 goes.")]


def _photo(value: str) -> str:
    if not runpod_job.is_url(value) and not Path(value).is_file():
        raise typer.BadParameter(f"'{value}' is a folder." if Path(value).is_dir() else f"there is no file '{value}'.")
    return value


@app.command(epilog='Example: `i2v runpod invoke photo.jpg "slow dolly-in" -o out.mp4`')
def invoke(  # noqa: PLR0917 - as many arguments as it has options
    photo: Annotated[
        str, typer.Argument(help="A JPEG, PNG, WebP or HEIC file, or the URL of one.", callback=_photo, metavar="PHOTO")
    ],
    prompt: Prompt = "",
    output: Output = Path("out.mp4"),
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
    that is longer than --wait. The limit of the work itself goes by I2V_ATTEMPT_LIMIT. The job's id is told at once:
    `i2v runpod fetch` has its video where this command came to another end.
    """
    check_mp4(output)
    settings = _start(endpoint, verbose=verbose)
    with asked_as(OPTIONS):
        request = GenerationRequest(prompt=prompt, negative_prompt=negative, duration_s=seconds, seed=seed)
    if preset is not None and preset not in (PREVIEW, *PRESETS):
        raise SettingsError(f"--preset: there is no preset {preset!r}; choose one of {', '.join((PREVIEW, *PRESETS))}")
    if preset is not None and preset != PREVIEW:
        with asked_as(OPTIONS):
            PRESETS[preset].refuse(request)
    again = partial(_again, output.absolute(), endpoint)

    async def main() -> None:
        asked = await runpod_job.asked(photo, request, preset, terminal.say)
        await _bring(
            settings,
            output.absolute(),
            again,
            lambda api, sink: runpod_job.invoked(api, settings, asked, sink, again, say=terminal.say, wait_s=wait * 60),
        )

    process.run(main)


def _job_id(value: str) -> str:
    try:
        job_ids.validate_python(value.strip("."))  # dots alone would lead to another path
    except ValidationError:
        raise typer.BadParameter(f"has to be the id of a job, such as {SOME_JOB}.") from None
    return value


@app.command(epilog=f"Example: `i2v runpod fetch {SOME_JOB} -o out.mp4`")
def fetch(
    job_id: Annotated[str, typer.Argument(help="As `invoke` and /run told it.", callback=_job_id, metavar="JOB_ID")],
    output: Output = Path("out.mp4"),
    endpoint: Endpoint = None,
    *,
    verbose: Verbose = False,
) -> None:
    """The video of a job that was sent before, into a file; waits for it while the job is at work.

    RunPod keeps an answer for 30 minutes. Ctrl-C leaves the job as it is.
    """
    check_mp4(output)
    settings = _start(endpoint, verbose=verbose)
    process.run(
        lambda: _bring(
            settings,
            output.absolute(),
            partial(_again, output.absolute(), endpoint),
            lambda api, sink: runpod_job.taken_up(api, settings, job_id, sink, terminal.say),
        )
    )


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
            terminal.json_line(found.model_dump_json())
        else:
            _show(found)

    process.run(main)


@app.command(
    epilog="Example, in a crontab, with settings in `.env`: `* * * * * cd /srv/i2v && .venv/bin/i2v runpod dispatch`"
)
def dispatch(url: Url = None, endpoint: Endpoint = None, *, verbose: Verbose = False) -> None:
    """Leases the tasks that can start now and sends each to the endpoint: one tick, for any scheduler.

    No more than two tasks are sent for each of I2V_RUNPOD_MAX_WORKERS. What cannot be sent is handed back. A second
    run beside this one does nothing on the same machine; on another it takes other tasks. Exits 1 where the queue,
    RunPod or the workers there did not do what they were asked; after three jobs in a row that failed there it sends
    none for ten minutes, then one to see. Run it every minute or so: RunPod forgets after half an hour how jobs ended.

    The workers report to the queue by themselves: the endpoint's environment needs the same VERCEL_API_URL and
    WORKER_API_KEY as this command.

    Tasks that ask for a Runway model are made by the endpoint, too, unless there is a RUNWAYML_API_SECRET: then they
    are left to others, such as `i2v work --engine runway`.
    """
    settings = _start(endpoint, "api_url", verbose=verbose, api_url=url)

    async def main() -> None:
        async with _open_api(settings) as api:
            terminal.result(await runpod_tick.tick(settings, api))

    with runpod_tick.alone(settings) as is_alone:
        if is_alone:
            process.run(main)
        else:
            terminal.say("Another dispatch to this endpoint is at work here: nothing to do.")


def _start(endpoint: str | None, *required: str, verbose: bool, **overrides: Any) -> Settings:
    # Log lines below errors are hidden: progress and the final message say what a person has to know.
    overrides |= {"runpod_endpoint_id": endpoint}
    return start("error", *required, "runpod_key", "runpod_endpoint_id", verbose=verbose, **overrides)


@asynccontextmanager
async def _open_api(settings: Settings) -> AsyncIterator[RunPodApi]:
    assert settings.runpod_key  # noqa: S101 - `_start` demands both
    assert settings.runpod_endpoint_id  # noqa: S101
    async with RunPodApi(
        settings.runpod_key.get_secret_value(), settings.runpod_url, settings.runpod_endpoint_id
    ) as api:
        yield api


# One video


def _again(output: Path, endpoint: str | None, job_id: str) -> str:
    """The command that fetches the video of a job, ready to be copied."""
    words = ["i2v", "runpod", "fetch", job_id, "-o", str(output)] + (["--endpoint", endpoint] if endpoint else [])
    return shlex.join(words)


async def _bring(
    settings: Settings,
    output: Path,
    again: Callable[[str], str],
    end: Callable[[RunPodApi, Sink], Awaitable[RunPodJob]],
) -> None:
    """Waits for the end of a job, saves its video and prints the result."""
    # Beside the output, on the same filesystem: the finished file appears whole or not at all.
    with temporary_folder(".i2v-", output.parent) as folder, terminal.bar(f"at {settings.runpod_endpoint_id}") as sink:
        async with _open_api(settings) as api:
            job = await end(api, sink)
        answer = runpod_answer.completed(job)
        sink(Progress(stage="fetch", done=0, total=1, fraction=0.99))
        video = await runpod_answer.saved(
            settings, job.id, answer.made, folder=Path(folder), output=output, again=again, say=terminal.say
        )
    seed = "" if answer.seed is None else f" · seed {answer.seed}"
    execution_s = (job.execution_ms or 0) / 1000
    terminal.say(f"  {terminal.describe(video)}{seed}")
    terminal.say(f"  time  {terminal.times({'queue': (job.delay_ms or 0) / 1000} | answer.timings)}")
    terminal.say(f"  cost  {execution_s:.1f} s on a GPU, its start aside; RunPod does not say what they are billed at")
    terminal.result(output)


# An endpoint


def _show(found: Health) -> None:
    for name, counts in (("workers", found.workers), ("jobs", found.jobs)):
        shown = (f"{count} {state.replace('_', ' ')}" for state, count in counts.model_dump(by_alias=False).items())
        terminal.result(f"{name:<8} {' · '.join(shown)}")
    if found.workers.throttled:
        terminal.say("Throttled workers wait for a free machine: allow more kinds of GPU, regions or CUDA versions.")
    if found.workers.unhealthy:
        terminal.say(
            "Unhealthy workers did not start, or not within RUNPOD_INIT_TIMEOUT: see their logs at console.runpod.io."
        )
