"""`i2v …`: every way to run this on a machine of one's own. What each command does is in its help text."""

import json
import secrets
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib import resources
from pathlib import Path
from typing import Annotated, Literal

import anyio
import structlog
import typer
from anyio.abc import TaskStatus

from inference import doctor as doctor_module
from inference import logs, process, terminal
from inference.build import (
    build_ledger,
    build_server_config,
    build_worker,
    choose_engine,
    engine_note,
    load_engine,
    open_queue,
)
from inference.commands.comfy import app as comfy_app
from inference.commands.film import film
from inference.commands.payments import payments
from inference.commands.push import app as push_app
from inference.commands.push import prepare_wake
from inference.commands.render import render
from inference.commands.runpod import app as runpod_app
from inference.commands.start import (
    Photo,
    Prompt,
    QueueUrl,
    Seconds,
    Url,
    Verbose,
    WakePort,
    check_mp4,
    queue_url_field,
    start,
    temporary_folder,
)
from inference.commands.weights import app as weights_app
from inference.errors import (
    EngineFailed,
    QueueFailed,
    QueueUnavailable,
    SettingsError,
)
from inference.on_modal.doctor import examine_modal
from inference.progress.stages import Sink
from inference.providers import EngineName, QueueName, is_paid
from inference.push.doctor import examine_push
from inference.server.client import QueueClient
from inference.settings import QUEUE_URL_FIELDS, Settings
from inference.settings_base import names_of
from inference.task import Lease, Outcome

log = structlog.get_logger(__name__)

app = typer.Typer(
    name="i2v",
    help="Photos become short videos: a queue, workers that lease from it, and a preview engine to try it all with.\n\n"
    "Start with `i2v demo`. Settings come from the environment or `.env`; `.env.example` lists them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)

BEAT_AT_HOME_S = 2.0


@app.command(epilog='Example: `i2v demo holiday.jpg --prompt "pan left"`')
def demo(
    photo: Annotated[
        Path | None, typer.Argument(help="Your photo; a bundled one unless given.", exists=True, dir_okay=False)
    ] = None,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="What should happen.")] = "slow dolly-in",
    seconds: Seconds = 5,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the mp4 goes.")] = Path("i2v-demo.mp4"),
    *,
    verbose: Verbose = False,
) -> None:
    """One photo through a real queue over HTTP: no GPU, no account, nothing left behind but the mp4."""
    check_mp4(output)
    logs.configure("debug" if verbose else "error")
    with (
        temporary_folder("i2v-demo-") as folder,
        resources.as_file(resources.files("inference.assets") / "sample.jpg") as sample,
    ):
        # Not from the environment, so that a demo does the same everywhere.
        settings = Settings.isolated(
            port=0, data_dir=folder, temp_dir=folder, api_key=secrets.token_urlsafe(), worker_id="demo"
        )
        process.run(lambda: _demo(settings, photo or sample, prompt, seconds, output.absolute()))


async def _demo(settings: Settings, photo: Path, prompt: str, seconds: float, output: Path) -> None:
    outcomes: list[Outcome] = []
    async with _serving(settings) as here, _client(here) as client, open_queue(here) as queue:
        terminal.say(f"A queue is open at {here.api_url}. The engine is {engine_note(here)}.")
        [task] = await client.submit(photo, prompt, seconds=seconds)
        terminal.say(f"  submitted  {photo.name}, “{prompt}”, {seconds:g} s → task {task['id']}")
        with terminal.bar("working") as sink:
            engine = await load_engine(here)
            await build_worker(here, queue, engine, sink=lambda _: sink, on_outcome=outcomes.append).run(at_most=1)
        [outcome] = outcomes
        if outcome.video is None:
            raise EngineFailed(f"no video was made: {outcome.error}")
        await client.save_video(task["id"], output)
        terminal.completed(terminal.describe(outcome.video))
        terminal.say(f"  time       {terminal.times(outcome.stage_seconds)}")
        terminal.result(output)


@app.command(epilog='Example: `i2v up`, then in another terminal `i2v submit photo.jpg "slow dolly-in" --wait`')
def up(
    port: Annotated[int | None, typer.Option(help="Port; 0 picks a free one.", min=0, max=65535)] = None,
    wake_port: WakePort = None,
    *,
    verbose: Verbose = False,
) -> None:
    """The queue server and a worker together, until Ctrl-C. Data stays in I2V_DATA_DIR."""
    settings = start(None, verbose=verbose, port=port, wake_port=wake_port)

    async def main() -> None:
        async with _serving(settings) as here:
            terminal.tell(f"Queue at {here.api_url} (API at {here.api_url}/docs), one worker, engine {here.engine}.")
            terminal.tell(f"Submit with: i2v submit PHOTO PROMPT --url {here.api_url}")
            # Heartbeats carry progress to the queue and cancellation to the worker. On one machine they cost nothing.
            beat_s = min(here.heartbeat_interval_s, BEAT_AT_HOME_S)
            await _work(here.model_copy(update={"heartbeat_interval_s": beat_s}))

    process.run(main, cancel_on_signal=False)


@app.command(epilog="Example: `WORKER_API_KEY=… i2v serve --host 0.0.0.0`")
def serve(
    host: Annotated[str | None, typer.Option(help="Address to bind to; others than loopback need a key.")] = None,
    port: Annotated[int | None, typer.Option(help="Port; 0 picks a free one.", min=0, max=65535)] = None,
    *,
    verbose: Verbose = False,
) -> None:
    """The embedded queue server: the documented worker API, and an API for apps, over SQLite or PostgreSQL."""
    settings = start(None, verbose=verbose, host=host, port=port)

    async def main() -> None:
        async with _serving(settings) as here:
            folder = here.data_dir.absolute()
            terminal.tell(f"Queue at {here.api_url} (API at {here.api_url}/docs), data in {folder}.")
            await anyio.sleep_forever()

    process.run(main, stopped_exit_code=0)


@app.command(epilog="Example: `VERCEL_API_URL=https://app.example.com WORKER_API_KEY=… i2v work`")
def work(
    url: QueueUrl = None,
    queue: Annotated[QueueName | None, typer.Option(help="Instead of I2V_QUEUE.")] = None,
    concurrency: Annotated[int | None, typer.Option(help="Tasks held at once.", min=1, max=64)] = None,
    engine: Annotated[EngineName | None, typer.Option(help="Instead of I2V_ENGINE.")] = None,
    poll_interval: Annotated[
        float | None, typer.Option(help="Seconds between questions to an empty queue.", min=0.1, max=3600)
    ] = None,
    max_retries: Annotated[int | None, typer.Option(help="Instead of WORKER_MAX_RETRIES.", min=1, max=20)] = None,
    wake_port: WakePort = None,
    *,
    once: Annotated[bool, typer.Option("--once", help="Take one task if there is one, then exit.")] = False,
    supervised: Annotated[
        bool, typer.Option("--supervised", help="Exit 78 for wrong settings, so that systemd does not start it again.")
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", "--debug", help="Show every step, and tracebacks of errors.")
    ] = False,
) -> None:
    """A plain polling worker for any box: lease, run, repeat.

    Unless the queue is on this machine, it has to know what makes the videos: I2V_ENGINE, --engine, or a Runway key.
    On SIGTERM or Ctrl-C it takes no more tasks, gives running ones I2V_SHUTDOWN_GRACE seconds, hands back what is
    left and exits 0; a second signal hands back at once.
    """
    with process.told_errors(verbose=verbose, wrong_settings=process.WRONG_SETTINGS if supervised else 1):
        url_field = queue_url_field(queue)
        settings = choose_engine(
            start(
                None,
                url_field,
                verbose=verbose,
                queue=queue,
                concurrency=concurrency,
                engine=engine,
                poll_interval_s=poll_interval,
                max_tries=max_retries,
                wake_port=wake_port,
                **{url_field: url},
            )
        )
        process.run(lambda: _work(settings, once=once), cancel_on_signal=False)


async def _work(settings: Settings, *, once: bool = False) -> None:
    taken: list[str] = []

    def sink(lease: Lease) -> Sink:
        taken.append(lease.task.item_id)
        return logs.stages(lease.task.item_id)

    async with open_queue(settings) as queue, anyio.create_task_group() as tasks:
        listen = prepare_wake(settings) if settings.wake_port is not None else None  # wrong settings are told at once
        engine = await load_engine(settings)  # before a task is leased, so that no task waits while weights are loaded
        if is_paid(settings.engine):
            await build_ledger(settings).prune()
        worker = build_worker(settings, queue, engine, sink=sink)
        log.info("worker_started", queue=settings.queue_url, worker_id=settings.worker_id, engine=engine.name)
        tasks.start_soon(process.drain_on_signal, worker, settings.shutdown_grace_s)
        if listen is not None:
            await tasks.start(listen, worker)
        try:
            await worker.run(at_most=1 if once else None)
        except QueueFailed:  # it is there
            raise
        except QueueUnavailable as error:
            name = names_of(Settings.model_fields[QUEUE_URL_FIELDS[settings.queue]])[0]
            raise QueueUnavailable(f"no queue at {settings.queue_url}, see {name} or --url: {error}") from None
        tasks.cancel_scope.cancel()
    if once and not taken:
        log.info("no_task")
        terminal.tell("The queue has no task to take.")
    log.info("worker_stopped")


@app.command(epilog='Example: `i2v submit photo.jpg "pan left" --count 2 --wait -o out.mp4`')
def submit(
    photo: Photo,
    prompt: Prompt = "",
    seconds: Seconds = 5,
    count: Annotated[int, typer.Option("--count", "-n", help="Videos of this photo.", min=1, max=20)] = 1,
    group: Annotated[str | None, typer.Option(help="Id or name of a group; a new one unless given.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Wait, and save the mp4 here.")] = None,
    url: Url = None,
    *,
    wait: Annotated[
        bool, typer.Option("--wait", "-w", help="Wait until the videos are done. Ctrl-C ends the wait, not the tasks.")
    ] = False,
    verbose: Verbose = False,
) -> None:
    """Asks an embedded queue (`i2v up`, `i2v serve`) for videos of a photo, and prints the ids of the tasks."""
    if output:
        check_mp4(output)
    settings = _client_settings(url, verbose=verbose)
    if output and count > 1:
        raise SettingsError("--output takes one video; leave out --count, or save them one by one with `i2v fetch`")

    async def main() -> None:
        async with _client(settings) as client:
            tasks = await client.submit(photo, prompt, seconds=seconds, count=count, group=group)
            for task in tasks:
                terminal.result(task["id"])
            if not (wait or output):
                return
            for task in tasks:
                with terminal.bar(task["id"][:8]) as sink:
                    ended = await client.until_ended(task["id"], sink)
                if ended["status"] != "completed":
                    reason = f": {ended['error_message']}" if ended["error_message"] else ""
                    raise EngineFailed(f"task {task['id']} ended {ended['status']}{reason}")
                if output:
                    terminal.result((await client.save_video(task["id"], output)).absolute())
                else:
                    terminal.say(f"completed; save it with: i2v fetch {task['id']} -o out.mp4")

    process.run(main)


@app.command(epilog="Example: `i2v fetch ID -o out.mp4`, with an ID from `i2v tasks`")
def fetch(
    item_id: Annotated[str, typer.Argument(metavar="ID", help="A completed task.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the mp4 goes.")] = Path("out.mp4"),
    url: Url = None,
    *,
    verbose: Verbose = False,
) -> None:
    """Downloads the video of a completed task from an embedded queue."""
    check_mp4(output)
    settings = _client_settings(url, verbose=verbose)

    async def main() -> None:
        async with _client(settings) as client:
            terminal.result(await client.save_video(item_id, output.absolute()))

    process.run(main)


app.command(epilog='Example: `i2v render photo.jpg "천천히 줌인" -o out.mp4`')(render)
app.command(epilog='Example: `i2v film a.jpg b.jpg c.jpg -p "slow dolly-in" --fade 0.5 -o film.mp4`')(film)


@app.command(epilog="Example: `i2v tasks --status failed`, then `i2v tasks --retry ID`")
def tasks(
    status: Annotated[
        Literal["pending", "processing", "completed", "failed", "cancelled"] | None, typer.Option(help="Only these.")
    ] = None,
    limit: Annotated[int, typer.Option(help="At most so many.", min=1, max=200)] = 20,
    cancel: Annotated[str | None, typer.Option(metavar="ID", help="Cancel this task.")] = None,
    retry: Annotated[str | None, typer.Option(metavar="ID", help="Put this failed or cancelled task back.")] = None,
    delete: Annotated[
        str | None,
        typer.Option(
            metavar="ID", help="Delete this task and its video; its photo, too, once no other task was made of it."
        ),
    ] = None,
    url: Url = None,
    *,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON lines.")] = False,
    verbose: Verbose = False,
) -> None:
    """The tasks of an embedded queue, newest first."""
    if sum(item_id is not None for item_id in (cancel, retry, delete)) > 1:
        raise SettingsError("--cancel, --retry and --delete exclude each other: give one of them")
    settings = _client_settings(url, verbose=verbose)

    async def main() -> None:
        async with _client(settings) as client:
            if delete is not None:
                await client.delete(delete)
                terminal.say("Deleted.")
                return
            if cancel is not None or retry is not None:
                changed = await (client.cancel(cancel) if cancel is not None else client.retry(retry or ""))
                shown = [changed]
            else:
                shown = await client.tasks(status=status, limit=limit)
        if as_json:
            for task in shown:
                terminal.json_line(json.dumps(task, ensure_ascii=False))
        elif shown:
            terminal.show_tasks(shown)
        else:
            terminal.say("No tasks.")

    process.run(main)


app.command(epilog="Example: `i2v payments --forget ITEM`, after a look at dev.runwayml.com")(payments)
app.add_typer(weights_app)
app.add_typer(comfy_app)
app.add_typer(runpod_app)
app.add_typer(push_app)


@app.command(epilog="Example: `i2v doctor --url https://app.example.com`, or `i2v doctor modal` before deploying")
def doctor(
    deployment: Annotated[
        Literal["modal", "push"] | None, typer.Argument(help="What to deploy to, instead of what runs here.")
    ] = None,
    url: QueueUrl = None,
    queue: Annotated[QueueName | None, typer.Option(help="Instead of I2V_QUEUE.")] = None,
    engine: Annotated[EngineName | None, typer.Option(help="Instead of I2V_ENGINE.")] = None,
    *,
    verbose: Verbose = False,
) -> None:
    """Checks settings, ffmpeg, disk and the queue, or a deployment: one line each; exits 1 if something is wrong."""
    logs.configure("debug" if verbose else "error")

    def load() -> Settings:
        return Settings.load(queue=queue, engine=engine, **{queue_url_field(queue): url})

    async def main() -> bool:
        sound = True
        match deployment:
            case "modal":
                findings = examine_modal(load, Path.cwd())
            case "push":
                findings = examine_push(load)
            case _:
                findings = doctor_module.examine(load)
        async for finding in findings:
            terminal.finding(finding.name, finding.verdict, finding.text)
            sound = sound and finding.verdict != "FAIL"
        return sound

    if not anyio.run(main):
        raise typer.Exit(1)


def _client_settings(url: str | None, *, verbose: bool) -> Settings:
    """Settings for commands that use a queue; by default the server of `i2v up` on this machine."""
    settings = start("warning", verbose=verbose, api_url=url)
    return settings.model_copy(update={"api_url": settings.api_url or f"http://127.0.0.1:{settings.port}"})


def _client(settings: Settings) -> QueueClient:
    return QueueClient(settings.api_url or "", settings.api_key.get_secret_value() if settings.api_key else None)


@asynccontextmanager
async def _serving(settings: Settings) -> AsyncIterator[Settings]:
    """The embedded queue for the length of a block; yields settings with which a worker on this machine reaches it.

    If the block is cancelled, the queue stays open until it has ended, so that its worker can hand leases back.
    """
    config = build_server_config(settings)
    from inference.server.serve import serve as serve_queue  # noqa: PLC0415 - an extra

    lifetime = anyio.CancelScope(shield=True)

    async def run(*, task_status: TaskStatus[tuple[str, int]]) -> None:
        with lifetime:
            await serve_queue(config, settings.host, settings.port, task_status=task_status)

    async with anyio.create_task_group() as tasks:
        try:
            host, port = await tasks.start(run)
            reachable = {"0.0.0.0": "127.0.0.1", "::": "[::1]", "::1": "[::1]"}.get(host, host)  # noqa: S104 - compared
            yield settings.model_copy(update={"api_url": f"http://{reachable}:{port}"})
        finally:
            lifetime.cancel()


def main() -> None:
    """The `i2v` command. Errors are one line that says what to do; `-v` shows where they came from."""
    with process.told_errors(verbose=bool({"-v", "--verbose"}.intersection(sys.argv))):
        app()


if __name__ == "__main__":
    main()
