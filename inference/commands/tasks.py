"""`i2v submit`, `i2v tasks` and `i2v fetch`: what somebody does with an embedded queue that runs elsewhere, or here."""

import json
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import anyio
import typer

from inference import process, terminal
from inference.commands.clips import collect, later
from inference.commands.outputs import Output
from inference.commands.photos import photos_and_prompt
from inference.commands.start import Seconds, Url, Verbose, start
from inference.errors import (
    EngineFailed,
    I2VError,
    InvalidPhoto,
    ItemMissing,
    QueueUnavailable,
    SettingsError,
)
from inference.server.client import QueueClient
from inference.settings import Settings

WATCH_S = 1.0
"""Between two looks of `i2v tasks --watch`."""


def submit(
    words: Annotated[
        list[str], typer.Argument(metavar="PHOTO", help="JPEG, PNG, WebP or HEIC files, then what happens: “pan left”.")
    ],
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="What happens, instead of a last word.")] = None,
    seconds: Seconds = 5,
    count: Annotated[int, typer.Option("--count", "-n", help="Videos of each photo.", min=1, max=20)] = 1,
    group: Annotated[str | None, typer.Option(help="Id or name of a group; a new one unless given.")] = None,
    output: Annotated[
        str | None, typer.Option("--output", "-o", help="Wait, and save the mp4 here, or several into this folder.")
    ] = None,
    url: Url = None,
    *,
    wait: Annotated[
        bool, typer.Option("--wait", "-w", help="Wait until the videos are done. Ctrl-C ends the wait, not the tasks.")
    ] = False,
    verbose: Verbose = False,
) -> None:
    """Asks an embedded queue (`i2v up`, `i2v serve`) for videos of photos, all in one group; prints the tasks' ids.

    A photo that cannot be used is said, and keeps none of the others back; the command then exits 1.
    """
    photos, given = photos_and_prompt("submit", words, prompted=prompt is not None)
    prompt = prompt or given
    where = None if output is None else Output.of(output, len(photos) * count)
    settings = _client_settings(url, verbose=verbose)

    async def main() -> None:
        async with open_client(settings) as client:
            tasks, refused = await _submitted(
                client, photos, prompt, seconds=seconds, count=count, group=group, url=url
            )
            problems = []
            if refused:
                names = ", ".join(map(str, refused))
                problems.append(f"{len(refused)} of {len(photos)} photos cannot be used: {names}")
            if tasks and (wait or where):
                # A group that was there before has other tasks, too.
                whole = tasks[0]["group_id"] if group is None else None
                try:
                    await collect(client, tasks, where)
                except EngineFailed as error:
                    problems.append(str(error))
                except (anyio.get_cancelled_exc_class(), I2VError):  # it may be this machine's disk that is full
                    command = later(tasks, where, group=whole, url=url, wait=True)
                    goes_on = "The task goes on" if len(tasks) == 1 else "The tasks go on"
                    terminal.say(f"{goes_on}. Later: {command}")
                    raise
                if not (where or problems):
                    them = "it" if len(tasks) == 1 else "them"
                    command = later(tasks, where, group=whole, url=url, wait=False)
                    terminal.say(f"completed; save {them} with: {command}")
            if problems:
                raise EngineFailed("\n".join(problems))

    process.run(main)


async def _submitted(
    client: QueueClient,
    photos: Sequence[Path],
    prompt: str,
    *,
    seconds: float,
    count: int,
    group: str | None,
    url: str | None,
) -> tuple[list[dict[str, Any]], list[Path]]:
    """Tasks of these photos, all in one group, with their ids told; and the photos of which there are none.

    `url`: as it was given. Raises InvalidPhoto where it is the only photo, and what QueueClient.submit raises.
    """
    tasks: list[dict[str, Any]] = []
    refused: list[Path] = []
    for number, photo in enumerate(photos):
        try:
            made = await client.submit(photo, prompt, seconds=seconds, count=count, group=group)
        except InvalidPhoto as error:
            if len(photos) == 1:
                raise
            terminal.error(str(error))
            refused.append(photo)
            continue
        except (anyio.get_cancelled_exc_class(), I2VError):
            if tasks:
                look = ["i2v", "tasks", "--group", tasks[0]["group_id"], *(["--url", url] if url else [])]
                terminal.say(f"{number - len(refused)} of {len(photos)} photos submitted: {shlex.join(look)}")
            raise
        for task in made:
            terminal.result(task["id"])
        tasks += made
        group = made[0]["group_id"]
    if len(photos) > 1 and tasks:
        made_of = _counted(len(photos) - len(refused), "photo")
        asked = f"“{prompt}”" if prompt else "no prompt"
        terminal.say(f"{made_of}, {_counted(len(tasks), 'task')}, group {group}, {asked}")
    return tasks, refused


def _counted(count: int, noun: str) -> str:
    """`1 photo`, `2 photos`."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def fetch(
    item_ids: Annotated[list[str] | None, typer.Argument(metavar="ID", help="Completed tasks.")] = None,
    group: Annotated[str | None, typer.Option(help="Every clip of the group with this id.")] = None,
    output: Annotated[
        str | None, typer.Option("--output", "-o", help="Where the mp4 goes, or the folder for several.")
    ] = None,
    url: Url = None,
    *,
    wait: Annotated[bool, typer.Option("--wait", "-w", help="Wait for those that are not completed yet.")] = False,
    verbose: Verbose = False,
) -> None:
    """Downloads videos of completed tasks from an embedded queue."""
    if bool(item_ids) == (group is not None):
        raise SettingsError("which videos? Give ids of tasks, or --group")
    item_ids = list(dict.fromkeys(item_ids or []))  # one that is named twice has one clip
    count = len(item_ids) or None
    if output is None and count != 1:
        raise SettingsError("--output: give a folder for the videos, such as -o clips/")
    where = Output.of(output or "out.mp4", count)
    settings = _client_settings(url, verbose=verbose)

    async def main() -> None:
        async with open_client(settings) as client:
            if group is not None:
                tasks = (await client.of_group(group))[::-1]  # as they were submitted
            else:
                tasks = [await client.task(item_id) for item_id in item_ids]
            if not tasks:
                raise ItemMissing(f"no task is in a group with the id {group}")
            await collect(client, tasks, where, wait=wait)

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
            terminal.say("No tasks." if group is None else f"No such task is in a group with the id {group}.")

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
    return f"{', '.join(said)}; {_counted(workers, 'worker') if workers else 'no workers'}"


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
    if settings.queue != "lifeisshort" and not settings.api_url:
        raise SettingsError(
            f"I2V_QUEUE is {settings.queue}, and its tasks are seen in its application. `i2v submit`, `fetch` and "
            "`tasks` are for a queue of `i2v up` or `i2v serve`: say where it is with --url, such as http://127.0.0.1:8000"
        )
    return settings.model_copy(update={"api_url": settings.api_url or f"http://127.0.0.1:{settings.port}"})


def open_client(settings: Settings) -> QueueClient:
    return QueueClient(settings.api_url or "", settings.api_key.get_secret_value() if settings.api_key else None)
