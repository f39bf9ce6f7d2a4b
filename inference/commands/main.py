"""`i2v …`: every way to run this on a machine of one's own. What each command does is in its help text."""

import sys
from pathlib import Path
from typing import Annotated, Literal

import anyio
import structlog
import typer

from inference import doctor as doctor_module
from inference import logs, process, terminal
from inference.build.engines import choose_engine, load_engine
from inference.build.queues import open_queue
from inference.build.workers import build_ledger, build_worker, open_events
from inference.commands.comfy import app as comfy_app
from inference.commands.demo import demo
from inference.commands.film import film
from inference.commands.health import health
from inference.commands.payments import payments
from inference.commands.push import app as push_app
from inference.commands.push import prepare_wake
from inference.commands.render import render
from inference.commands.runpod import app as runpod_app
from inference.commands.serving import at_home, serving, tell_page
from inference.commands.start import (
    Config,
    QueueUrl,
    Verbose,
    WakePort,
    queue_url_field,
    start,
)
from inference.commands.tasks import fetch, submit, tasks
from inference.commands.weights import app as weights_app
from inference.errors import (
    QueueFailed,
    QueueUnavailable,
)
from inference.leasing.polling import Worker
from inference.on_modal.doctor import examine_modal
from inference.progress.stages import Sink
from inference.providers import EngineName, QueueName, is_paid
from inference.push.doctor import examine_push
from inference.settings import QUEUE_URL_FIELDS, Settings
from inference.settings_base import names_of
from inference.task import Lease

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

app.command(epilog='Example: `i2v demo holiday.jpg --prompt "pan left"`')(demo)


@app.command(epilog='Example: `i2v up`, then in another terminal `i2v submit photo.jpg "slow dolly-in" --wait`')
def up(
    port: Annotated[int | None, typer.Option(help="Port; 0 picks a free one.", min=0, max=65535)] = None,
    wake_port: WakePort = None,
    config: Config = None,
    *,
    verbose: Verbose = False,
) -> None:
    """The queue server with its page and a worker, until Ctrl-C. Data stays in I2V_DATA_DIR."""
    settings = start(None, verbose=verbose, is_worker=True, config=config, port=port, wake_port=wake_port)

    async def main() -> None:
        async with serving(settings) as here:
            if terminal.err.is_terminal:
                tell_page(here)
            terminal.tell(f"Or submit with: i2v submit PHOTO PROMPT --url {here.api_url}")
            terminal.tell(f"One worker is here, engine {here.engine}. The API is at {here.api_url}/docs.")
            await _work(at_home(here))

    process.run(main, cancel_on_signal=False)


@app.command(epilog="Example: `WORKER_API_KEY=… i2v serve --host 0.0.0.0`")
def serve(
    host: Annotated[str | None, typer.Option(help="Address to bind to; others than loopback need a key.")] = None,
    port: Annotated[int | None, typer.Option(help="Port; 0 picks a free one.", min=0, max=65535)] = None,
    config: Config = None,
    *,
    verbose: Verbose = False,
) -> None:
    """The embedded queue server: the documented worker API, and an API for apps, over SQLite or PostgreSQL."""
    settings = start(None, verbose=verbose, config=config, host=host, port=port)

    async def main() -> None:
        async with serving(settings) as here:
            if terminal.err.is_terminal:
                tell_page(here)
            folder = here.data_dir.absolute()
            terminal.tell(f"Workers and apps use {here.api_url} (API at {here.api_url}/docs), data is in {folder}.")
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
    config: Config = None,
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
        url_field = queue_url_field(queue, config)
        settings = choose_engine(
            start(
                None,
                url_field,
                verbose=verbose,
                is_worker=True,
                config=config,
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

    worker: Worker | None = None  # none while weights are loaded

    def is_stuck() -> bool:
        return worker is not None and worker.is_stuck

    async with open_events(settings) as hub, open_queue(settings) as queue, anyio.create_task_group() as tasks:
        tasks.start_soon(process.show_life, settings.worker_id, is_stuck, settings.notify_socket)
        listen = prepare_wake(settings) if settings.wake_port is not None else None  # wrong settings are told at once
        engine = await load_engine(settings)  # before a task is leased, so that no task waits while weights are loaded
        if is_paid(settings.engine):
            await build_ledger(settings).prune()
        worker = build_worker(settings, queue, engine, sink=sink, hub=hub)
        await tasks.start(process.drain_on_signal, worker, settings.shutdown_grace_s)  # before others hear of it
        log.info("worker_started", queue=settings.queue_url, worker_id=settings.worker_id, engine=engine.name)
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


app.command(epilog='Example: `i2v submit photo.jpg "pan left" --count 2 --wait -o out.mp4`')(submit)
app.command(epilog="Example: `i2v fetch ID -o out.mp4`, with an ID from `i2v tasks`")(fetch)
app.command(epilog="Example: `i2v tasks --watch`, or `i2v tasks --status failed`, then `i2v tasks --retry ID`")(tasks)
app.command(epilog='Example: `i2v render photo.jpg "천천히 줌인" -o out.mp4`')(render)
app.command(epilog='Example: `i2v film a.jpg b.jpg c.jpg -p "slow dolly-in" --fade 0.5 -o film.mp4`')(film)


app.command(epilog="Example: `i2v health runway-worker-001`; exits 1 and says which worker hangs")(health)
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
    config: Config = None,
    *,
    verbose: Verbose = False,
) -> None:
    """Checks settings, ffmpeg, disk and the queue, or a deployment: one line each; exits 1 if something is wrong."""
    logs.configure("debug" if verbose else "error")

    def load() -> Settings:
        return Settings.load(config=config, queue=queue, engine=engine, **{queue_url_field(queue, config): url})

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


def main() -> None:
    """The `i2v` command. Errors are one line that says what to do; `-v` shows where they came from."""
    with process.told_errors(verbose=bool({"-v", "--verbose"}.intersection(sys.argv))):
        app()


if __name__ == "__main__":
    main()
