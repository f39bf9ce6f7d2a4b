"""`i2v up`, `i2v serve` and `i2v work`: what runs until it is stopped."""

from typing import Annotated

import anyio
import structlog
import typer

from inference import process, terminal
from inference.build.engines import choose_engine, load_engine
from inference.build.queues import open_queue
from inference.build.workers import build_ledger, build_worker, open_events
from inference.commands.push import prepare_wake
from inference.commands.serving import at_home, serving, tell_page
from inference.commands.start import Config, Host, Port, QueueUrl, Verbose, WakePort, queue_url_field, start
from inference.commands.work_log import WorkLog
from inference.errors import QueueFailed, QueueUnavailable
from inference.leasing.polling import Worker
from inference.providers import EngineName, QueueName, is_paid
from inference.settings import QUEUE_URL_FIELDS, Settings
from inference.settings_base import names_of

log = structlog.get_logger(__name__)


def up(
    host: Host = None,
    port: Port = None,
    wake_port: WakePort = None,
    config: Config = None,
    *,
    verbose: Verbose = False,
) -> None:
    """The queue server with its page and a worker, until Ctrl-C. Data stays in I2V_DATA_DIR."""
    settings = start(None, verbose=verbose, is_worker=True, config=config, host=host, port=port, wake_port=wake_port)

    async def main() -> None:
        async with serving(settings) as here:
            if terminal.err.is_terminal:
                tell_page(here)
            terminal.tell(f"Or submit with: i2v submit PHOTO PROMPT --url {here.api_url}")
            terminal.tell(f"One worker is here, engine {here.engine}. The API is at {here.api_url}/docs.")
            await _work(at_home(here))

    process.run(main, cancel_on_signal=False)


def serve(
    host: Host = None,
    port: Port = None,
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
    worker: Worker | None = None  # none while weights are loaded

    def is_stuck() -> bool:
        return worker is not None and worker.is_stuck

    async with open_events(settings) as hub, open_queue(settings) as queue, anyio.create_task_group() as tasks:
        tasks.start_soon(process.show_life, settings.worker_id, is_stuck, settings.notify_socket)
        listen = prepare_wake(settings) if settings.wake_port is not None else None  # wrong settings are told at once
        engine = await load_engine(settings)  # before a task is leased, so that no task waits while weights are loaded
        if is_paid(settings.engine):
            await build_ledger(settings).prune()
        work_log = WorkLog()
        worker = build_worker(settings, queue, engine, sink=work_log.sink, on_outcome=work_log.ended, hub=hub)
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
        else:
            if once and work_log.is_empty:
                log.info("no_task")
                terminal.tell("The queue has no task to take.")
        finally:
            work_log.close()
        tasks.cancel_scope.cancel()
