"""`i2v demo`: one photo through a real queue."""

import secrets
from importlib import resources
from pathlib import Path
from typing import Annotated

import anyio
import typer
from pydantic import SecretStr

from inference import logs, process, terminal
from inference.build.engines import engine_note, load_engine
from inference.build.queues import open_queue
from inference.build.workers import build_worker
from inference.commands.browser import open_browser
from inference.commands.outputs import check_mp4, temporary_folder
from inference.commands.serving import at_home, serving, tell_page
from inference.commands.start import Seconds, Verbose
from inference.commands.tasks import open_client
from inference.errors import EngineFailed
from inference.server.client import QueueClient
from inference.settings import Settings
from inference.task import Outcome


def demo(
    photo: Annotated[
        Path | None, typer.Argument(help="Your photo; a bundled one unless given.", exists=True, dir_okay=False)
    ] = None,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="What should happen.")] = "slow dolly-in",
    seconds: Seconds = 5,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the mp4 goes.")] = Path("i2v-demo.mp4"),
    *,
    opens: Annotated[
        bool, typer.Option("--open", help="Watch it in a browser, on the queue's page, which stays until Ctrl-C.")
    ] = False,
    verbose: Verbose = False,
) -> None:
    """One photo through a real queue over HTTP: no GPU, no account, nothing left behind but the mp4."""
    check_mp4(output)
    logs.configure("debug" if verbose else "error")
    with (
        temporary_folder("i2v-demo-") as folder,
        resources.as_file(resources.files("inference.assets") / "sample.jpg") as sample,
    ):
        # Not from the environment, so that a demo does the same everywhere. Without a key, which its page would ask
        # for, a queue is open to this machine only.
        key = None if opens else SecretStr(secrets.token_urlsafe())
        settings = Settings.isolated(port=0, data_dir=folder, temp_dir=folder, api_key=key, worker_id="demo")
        shown = _on_a_page if opens else _in_the_terminal
        process.run(
            lambda: shown(settings, photo or sample, prompt, seconds, output.absolute()),
            stopped_exit_code=0 if opens else None,
        )


async def _in_the_terminal(settings: Settings, photo: Path, prompt: str, seconds: float, output: Path) -> None:
    outcomes: list[Outcome] = []
    async with serving(settings) as here, open_client(here) as client, open_queue(here) as queue:
        terminal.say(f"A queue is open at {here.api_url}. The engine is {engine_note(here)}.")
        await _submit(client, photo, prompt, seconds)
        with terminal.bar("working") as sink:
            engine = await load_engine(here)
            await build_worker(here, queue, engine, sink=lambda _: sink, on_outcome=outcomes.append).run(at_most=1)
        await _save(client, outcomes[0], output)
    terminal.say("Next: `i2v demo --open` shows this on a page in your browser, and `i2v up` keeps that page.")


async def _on_a_page(settings: Settings, photo: Path, prompt: str, seconds: float, output: Path) -> None:
    """Serves the page until cancelled, with a worker for the demo's task and for what else is asked for on the page."""
    outcomes: list[Outcome] = []  # of the demo's own task, which may end after one that the page asked for
    has_ended = anyio.Event()

    async with serving(settings) as here, open_client(here) as client, open_queue(here) as queue:
        tell_page(here)
        open_browser(here.api_url or "")
        engine = await load_engine(here)
        item_id = await _submit(client, photo, prompt, seconds)

        def on_outcome(outcome: Outcome) -> None:
            if outcome.item_id == item_id:
                outcomes.append(outcome)
                has_ended.set()

        worker = build_worker(at_home(here), queue, engine, on_outcome=on_outcome)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(worker.run)
            await has_ended.wait()
            if outcomes[0].video is None:  # the page says it, too, and may have been where the task was cancelled
                terminal.say(f"  no video was made: {outcomes[0].error}")
            else:
                await _save(client, outcomes[0], output)
            terminal.say("Ctrl-C closes the page; `i2v up` keeps one, and all that was made.")


async def _submit(client: QueueClient, photo: Path, prompt: str, seconds: float) -> str:
    [task] = await client.submit(photo, prompt, seconds=seconds)
    terminal.say(f"  submitted  {photo.name}, “{prompt}”, {seconds:g} s → task {task['id']}")
    return str(task["id"])


async def _save(client: QueueClient, outcome: Outcome, output: Path) -> None:
    if outcome.video is None:
        raise EngineFailed(f"no video was made: {outcome.error}")
    await client.save_video(outcome.item_id, output)
    terminal.completed(terminal.describe(outcome.video))
    terminal.say(f"  time       {terminal.times(outcome.stage_seconds)}")
    terminal.result(output)
