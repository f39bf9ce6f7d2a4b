"""`i2v submit`, `i2v tasks` and `i2v fetch`: what somebody does with an embedded queue that runs elsewhere, or here."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import anyio
import typer

from inference import process, terminal
from inference.commands.start import Photo, Prompt, Seconds, Url, Verbose, check_mp4, start
from inference.errors import EngineFailed, QueueUnavailable, SettingsError
from inference.server.client import QueueClient
from inference.settings import Settings

WATCH_S = 1.0
"""Between two looks of `i2v tasks --watch`."""


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
        async with open_client(settings) as client:
            tasks = await client.submit(photo, prompt, seconds=seconds, count=count, group=group)
            for task in tasks:
                terminal.result(task["id"])
            if not (wait or output):
                return
            for task in tasks:
                with terminal.bar(task["id"][-terminal.SHORT_ID_CHARS :]) as sink:
                    ended = await client.until_ended(task["id"], sink)
                if ended["status"] != "completed":
                    reason = f": {ended['error_message']}" if ended["error_message"] else ""
                    raise EngineFailed(f"task {task['id']} ended {ended['status']}{reason}")
                if output:
                    terminal.result((await client.save_video(task["id"], output)).absolute())
                else:
                    terminal.say(f"completed; save it with: i2v fetch {task['id']} -o out.mp4")

    process.run(main)


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
        async with open_client(settings) as client:
            terminal.result(await client.save_video(item_id, output.absolute()))

    process.run(main)


def tasks(
    status: Annotated[
        Literal["pending", "processing", "completed", "failed", "cancelled"] | None, typer.Option(help="Only these.")
    ] = None,
    group: Annotated[str | None, typer.Option(help="Only those of the group with this id.")] = None,
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
    watch: Annotated[
        bool, typer.Option("--watch", "-w", help="Show them again every second, those in work first, until Ctrl-C.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON lines.")] = False,
    verbose: Verbose = False,
) -> None:
    """The tasks of an embedded queue, newest first."""
    actions = {"--cancel": cancel, "--retry": retry, "--delete": delete}
    if sum(item_id is not None for item_id in actions.values()) > 1:
        raise SettingsError("--cancel, --retry and --delete exclude each other: give one of them")
    settings = _client_settings(url, verbose=verbose)
    if watch:
        if any(item_id is not None for item_id in actions.values()):
            raise SettingsError("--watch only looks: give --cancel, --retry or --delete in another terminal")
        process.run(lambda: _watch(settings, status, group, limit, as_json=as_json), stopped_exit_code=0)
        return

    async def main() -> None:
        async with open_client(settings) as client:
            if delete is not None:
                await client.delete(delete)
                terminal.say("Deleted.")
                return
            if cancel is not None or retry is not None:
                changed = await (client.cancel(cancel) if cancel is not None else client.retry(retry or ""))
                shown = [changed]
            else:
                shown = await client.tasks(status=status, group=group, limit=limit)
        if as_json:
            for task in shown:
                terminal.json_line(json.dumps(task, ensure_ascii=False))
        elif shown:
            terminal.show_tasks(shown)
        else:
            terminal.say("No tasks.")

    process.run(main)


async def _watch(settings: Settings, status: str | None, group: str | None, limit: int, *, as_json: bool) -> None:
    """Shows the tasks every second. Goes on where the queue does not answer for a while, once it has answered."""
    async with open_client(settings) as client:
        tasks, summary = await _look(client, status, group, limit)  # raises where there is no queue, or no entry
        with _changed_as_json() if as_json else terminal.watched_tasks() as show:
            while True:
                show(tasks, summary)
                await anyio.sleep(WATCH_S)
                try:
                    tasks, summary = await _look(client, status, group, limit)
                except QueueUnavailable:
                    summary = "The queue does not answer; this is how things were."


async def _look(
    client: QueueClient, status: str | None, group: str | None, limit: int
) -> tuple[list[dict[str, Any]], str]:
    """The tasks in work, then the newest others, `limit` together; and a line about the whole queue."""
    found = await client.tasks(status=status, group=group, limit=limit)
    if status is None:
        working = await client.tasks(status="processing", group=group, limit=limit)
        ids = {task["id"] for task in working}
        found = [*working, *(task for task in found if task["id"] not in ids)][:limit]
    return found, _summary(await client.overview())


def _summary(overview: dict[str, Any] | None) -> str:
    """`2 waiting (for up to 12 s), 1 in work, all done in 3 min, 14 made within an hour, $0.21 today; 1 worker`."""
    if overview is None:
        return ""
    counts, wait_s, left_s = overview["counts"], overview["oldest_wait_s"], overview["left_s"]
    said = [f"{counts.get('pending', 0)} waiting" + ("" if wait_s is None else f" (for up to {terminal.span(wait_s)})")]
    said.append(f"{counts.get('processing', 0)} in work")
    if left_s:
        said.append(f"all done in {terminal.span(left_s)}")
    said.append(f"{overview['completed_last_hour']} made within an hour")
    if overview["spent_today_usd"]:
        said.append(f"{terminal.usd(overview['spent_today_usd'])} today")
    workers = len(overview["workers"])
    return f"{', '.join(said)}; {workers or 'no'} worker{'' if workers == 1 else 's'}"


@contextmanager
def _changed_as_json() -> Iterator[Callable[[Sequence[dict[str, Any]], str], None]]:
    """A line for each task that is not as it was before."""
    told: dict[str, dict[str, Any]] = {}

    def show(tasks: Sequence[dict[str, Any]], _summary: str) -> None:
        nonlocal told
        before, told = told, {task["id"]: task for task in tasks}
        for task in reversed(tasks):  # what began first is told first
            if before.get(task["id"]) != task:
                terminal.json_line(json.dumps(task, ensure_ascii=False))

    yield show


def _client_settings(url: str | None, *, verbose: bool) -> Settings:
    """Settings for commands that use a queue; by default the server of `i2v up` on this machine."""
    settings = start("warning", verbose=verbose, api_url=url)
    return settings.model_copy(update={"api_url": settings.api_url or f"http://127.0.0.1:{settings.port}"})


def open_client(settings: Settings) -> QueueClient:
    return QueueClient(settings.api_url or "", settings.api_key.get_secret_value() if settings.api_key else None)
