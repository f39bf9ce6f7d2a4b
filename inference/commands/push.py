"""`i2v push`: jobs that are asked for by a call."""

import json
import secrets
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Protocol

import anyio
import structlog
import typer
from anyio.abc import TaskStatus

from inference import logs, process, terminal
from inference.build.engines import choose_engine, load_engine
from inference.build.extras import needing_extra
from inference.build.queues import migrate_jobs
from inference.build.workers import build_ledger, build_runner, open_events
from inference.commands.layout import MARKUP
from inference.commands.start import Verbose, start
from inference.errors import SettingsError
from inference.leasing.polling import Worker
from inference.providers import EngineName, is_paid
from inference.push.here import Here
from inference.push.sweeping import Sweeper
from inference.settings import Settings

log = structlog.get_logger(__name__)


class Listen(Protocol):
    """Runs until cancelled; started once calls are taken."""

    async def __call__(self, worker: Worker, *, task_status: TaskStatus[None]) -> None: ...


app = typer.Typer(
    name="push",
    help="Serves `POST /jobs/run`: a job of the table `video_jobs` starts when somebody asks for it.\n\n"
    "Without a sub-command it serves. On SIGTERM it takes no more, gives a running job I2V_SHUTDOWN_GRACE seconds, "
    "hands it back, answers 503 and exits 0.",
    invoke_without_command=True,
    rich_markup_mode=MARKUP,
)


@app.callback(epilog="Example, for Cloud Run: `i2v push --host 0.0.0.0 --port 8080`")
def push(
    context: typer.Context,
    host: Annotated[str | None, typer.Option(help="Address to bind to.")] = None,
    port: Annotated[int | None, typer.Option(help="Port; 0 picks a free one.", min=0, max=65535)] = None,
    engine: Annotated[EngineName | None, typer.Option(help="Instead of I2V_ENGINE.")] = None,
    *,
    verbose: Verbose = False,
) -> None:
    """Serves calls, unless a sub-command is given."""
    if context.invoked_subcommand is not None:
        return
    settings = choose_engine(
        start(None, verbose=verbose, is_worker=True, queue="video_jobs", host=host, port=port, engine=engine)
    )
    process.run(lambda: _serve(settings), cancel_on_signal=False)


async def _serve(settings: Settings) -> None:
    with needing_extra("push", "`i2v push`"):
        from inference.progress.web.follow import Bounds  # noqa: PLC0415 - an extra
        from inference.push import opening  # noqa: PLC0415
        from inference.push.app import create_app  # noqa: PLC0415
        from inference.server.connections import Patience, for_listeners  # noqa: PLC0415
        from inference.server.listening import listen  # noqa: PLC0415
    auth, tasks = opening.build_auth(settings), opening.build_tasks(settings)
    ledger = build_ledger(settings) if is_paid(settings.engine) else None
    async with open_events(settings) as hub, opening.open_jobs(settings) as jobs:
        await jobs.check()  # no database, no service: an answer of 404 to every job would end them all
        engine = await load_engine(settings)
        sink = lambda lease: logs.stages(lease.task.item_id)  # noqa: E731
        runner = build_runner(settings, jobs, engine, ledger=ledger, sink=sink, hub=hub)
        here = Here(jobs, runner, at_once=settings.push_at_once)
        ask = opening.ask_of(tasks)
        sweeper = Sweeper(jobs, ask=ask, here=None if ask else here)
        streams = opening.build_streams(settings, auth, hub, Bounds(for_listeners(Patience())))
        app = create_app(auth, runs=here, wake=sweeper.wake, deadline_s=settings.push_deadline_s, beside=streams)
        serve = partial(opening.serve_calls, closing=hub.close if hub else None)
        async with anyio.create_task_group() as around:
            bound = await around.start(serve, app, listen(settings.host, settings.port))
            process.settle()
            log.info("push_open", host=bound[0], port=bound[1], engine=engine.name)
            terminal.tell(f"Jobs are taken at http://{bound[0]}:{bound[1]}/jobs/run, engine {engine.name}.")
            async with anyio.create_task_group() as beside:
                beside.start_soon(sweeper.serve, settings.push_sweep_s)
                beside.start_soon(process.drain_calls_on_signal, here.drain, settings.shutdown_grace_s)
                await here.serve()
                beside.cancel_scope.cancel()
            around.cancel_scope.cancel()
    log.info("push_closed")


def prepare_wake(settings: Settings) -> Listen:
    """What listens for `POST /wake` and cuts a worker's poll short. Raises SettingsError where it would be open to all.

    The port is taken here, before anything that takes long.
    """
    with needing_extra("push", "I2V_WAKE_PORT"):
        from inference.push import opening  # noqa: PLC0415 - an extra
        from inference.push.app import create_app  # noqa: PLC0415
        from inference.server.listening import listen as bind  # noqa: PLC0415
    auth = opening.build_auth(settings)
    listener = bind(settings.host, settings.wake_port or 0)

    async def listen(worker: Worker, *, task_status: TaskStatus[None]) -> None:
        async def wake() -> None:
            worker.wake()

        app = create_app(auth, wake=wake, deadline_s=settings.push_deadline_s)
        async with anyio.create_task_group() as tasks:
            host, port = await tasks.start(opening.serve_calls, app, listener)
            log.info("wake_open", host=host, port=port)
            task_status.started()

    return listen


@app.command(epilog="Example: `i2v push submit photo.jpg 'slow dolly-in'`")
def submit(
    photo: Annotated[str | None, typer.Argument(help="A URL, or the key of an object in the bucket of jobs.")] = None,
    prompt: Annotated[str, typer.Argument(help="What should happen.")] = "",
    seconds: Annotated[float, typer.Option("--seconds", "-s", help="Length of the video.", min=0.5, max=60)] = 5,
    job_id: Annotated[str | None, typer.Option("--id", help="Of the job: the same id twice is one job.")] = None,
    input_file: Annotated[
        Path | None,
        typer.Option("--input", help="JSON file with all of the job's input instead.", exists=True, dir_okay=False),
    ] = None,
    *,
    verbose: Verbose = False,
) -> None:
    """Adds a job and, where I2V_PUSH_TASKS_QUEUE is set, the task of Cloud Tasks that asks for it; prints its id."""
    settings = start("error", verbose=verbose, queue="video_jobs")
    if (photo is None) == (input_file is None):
        raise SettingsError("a job needs a photo, or --input with all of it; give one of them")
    given: dict[str, Any] = {"photo": photo, "prompt": prompt, "seconds": seconds}
    if input_file is not None:
        try:
            given = json.loads(input_file.read_text())
        except ValueError as error:
            raise SettingsError(f"--input: {input_file} is not JSON: {error}") from None
        if not isinstance(given, dict):
            raise SettingsError(f"--input: {input_file} has to hold a JSON object")

    async def main() -> None:
        with needing_extra("push", "`i2v push`"):
            from inference.push import opening  # noqa: PLC0415 - an extra
            from inference.push.enqueue import enqueue  # noqa: PLC0415
        wanted = job_id or secrets.token_hex(16)
        tasks = opening.build_tasks(settings)
        async with opening.open_jobs(settings) as jobs:
            terminal.result(await enqueue(lambda: jobs.insert(given, wanted), tasks))

    process.run(main)


@app.command()
def sweep(*, verbose: Verbose = False) -> None:
    """One sweep: jobs of dead holders wait again, and are asked for again where I2V_PUSH_TASKS_QUEUE is set."""
    settings = start("error", verbose=verbose, queue="video_jobs")

    async def main() -> None:
        with needing_extra("push", "`i2v push`"):
            from inference.push import opening  # noqa: PLC0415 - an extra
        ask = opening.ask_of(opening.build_tasks(settings))
        async with opening.open_jobs(settings) as jobs:
            swept = await Sweeper(jobs, ask=ask).once()
        for name, ids in swept:
            terminal.say(f"{name}: {', '.join(ids) if ids else 'none'}")

    process.run(main)


@app.command()
def migrate(*, verbose: Verbose = False) -> None:
    """Makes the table and the columns that are missing; leaves all others as they are."""
    settings = start("error", verbose=verbose, queue="video_jobs")

    for line in migrate_jobs(settings) or ["Nothing is missing."]:
        terminal.say(line)
