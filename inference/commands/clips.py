"""Clips that somebody waits for: followed with one bar, and saved as soon as each is ready."""

import filecmp
import itertools
import math
import re
import shlex
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread

from inference import terminal
from inference.commands.outputs import Output, temporary_folder
from inference.errors import EngineFailed, QueueUnavailable, Refusal, StorageError, write_error
from inference.progress.stages import Progress
from inference.server.client import ENDED, QueueClient
from inference.server.page.names import shown_name

LEFT_S = 3.0
"""Between two questions for how long a whole group will take, for which the server looks at all that waits."""

NOBODY_S = 5.0
"""Where nothing that is waited for is worked on, so often the queue is asked whether it has workers."""

GONE_S = 120.0
"""A worker that was not heard of for so long is taken for gone. One that is there asks for tasks at least every minute,
unless its interval is set higher: `leasing.polling.MAX_BACKOFF_S`, and the schedule of Modal."""

NUMBERED = re.compile(r"(.+) \((\d{1,6})\)", re.DOTALL)
"""The name of a file that is not the first of that name."""

Tasks = Sequence[Mapping[str, Any]]


def later(tasks: Tasks, output: Output | None, *, group: str | None, url: str | None, wait: bool) -> str:
    """The command that fetches these clips. `group`: its id, if it is of these tasks alone; `url`: as it was given."""
    words = ["i2v", "fetch"]
    words += ["--group", group] if group and len(tasks) > 1 else [task["id"] for task in tasks]
    words += ["--wait"] if wait else []
    words += ["-o", output.given if output else "out.mp4" if len(tasks) == 1 else "clips/"]
    words += ["--url", url] if url else []
    return shlex.join(words)


async def collect(client: QueueClient, tasks: Tasks, output: Output | None, *, wait: bool = True) -> None:
    """Follows tasks to their ends and saves their clips. Without `wait`, saves those that are ready.

    Where one fails that is said at once, and the others go on. Raises EngineFailed at the end if a clip is missing;
    what QueueClient.follow raises; DiskFull, NotWritable.
    """
    paths, names = output.paths(tasks) if output else {}, _names(tasks)
    missing: dict[str, str] = {}
    left = {task["id"] for task in tasks}
    label = names[tasks[0]["id"]] if len(tasks) == 1 else f"{len(tasks)} clips"
    with terminal.bar(label, lines=len(tasks) == 1) as sink:  # of several, each is told when it has ended
        ready_at, ask_again_at = None, 0.0
        async for now in _followed(client, tasks) if wait else _once(tasks):
            now_s = anyio.current_time()
            if wait and len(now) > 1 and now_s >= ask_again_at:
                left_s, ask_again_at = await _left_s(client, now), now_s + LEFT_S
                ready_at = None if left_s is None else now_s + left_s
            sink(_progress(now, ready_at - now_s if ready_at is not None and ready_at > now_s else None))
            for task in now:
                item_id = task["id"]
                if item_id not in left or (wait and task["status"] not in ENDED):
                    continue
                left.remove(item_id)
                reason = await _end(client, task, paths.get(item_id), beside=output is not None and output.is_folder)
                if reason is not None:
                    missing[names[item_id]] = reason
                if len(tasks) > 1:
                    _tell(names[item_id], reason, is_saved=output is not None)
    if len(tasks) == 1 and missing:
        raise EngineFailed(*missing.values())
    if missing:
        raise EngineFailed(f"{len(missing)} of {len(tasks)} clips are missing: {', '.join(missing)}")


async def _once(tasks: Tasks) -> AsyncIterator[Tasks]:
    yield tasks


async def _followed(client: QueueClient, tasks: Tasks) -> AsyncIterator[Tasks]:
    """As QueueClient.follow. Says once where nobody is heard of who could make them."""
    look_at_s = anyio.current_time() + NOBODY_S
    async for now in client.follow(tasks):
        if anyio.current_time() >= look_at_s:
            waits = all(task["status"] == "pending" for task in now if task["status"] not in ENDED)
            told = waits and await _told_of_no_worker(client)
            look_at_s = math.inf if told else anyio.current_time() + NOBODY_S
        yield now


async def _told_of_no_worker(client: QueueClient) -> bool:
    """Says so where no worker was heard of lately."""
    try:
        overview = await client.overview()
    except QueueUnavailable:
        return False
    if overview is None or any(worker["heard_s_ago"] < GONE_S for worker in overview["workers"]):
        return False
    start_one = shlex.join(["i2v", "work", "--url", client.api_url])
    terminal.say(f"No worker was heard of at this queue in the last {terminal.span(GONE_S)}. Start one: {start_one}")
    return True


def _names(tasks: Tasks) -> dict[str, str]:
    """What people call each task, by its id: as its photo, unless that has several."""
    named = {task["id"]: shown_name(task.get("photo_filename"), task["id"]) for task in tasks}
    times = Counter(named.values())
    return {
        item_id: name if times[name] == 1 else f"{name} {item_id[-terminal.SHORT_ID_CHARS :]}"
        for item_id, name in named.items()
    }


async def _left_s(client: QueueClient, tasks: Tasks) -> float | None:
    """Until all are made, where they are of one group, and the queue can tell."""
    groups = {task["group_id"] for task in tasks}
    with suppress(QueueUnavailable):  # the next look at the tasks says whether it is away
        return await client.group_left_s(groups.pop()) if len(groups) == 1 else None
    return None


def _progress(tasks: Tasks, left_s: float | None) -> Progress:
    """Of all together."""
    fractions = [_fraction(task) for task in tasks]
    if len(tasks) == 1:
        [task], [fraction] = tasks, fractions
        # What a waiting task has was told by a worker that handed it back: the next one begins anew.
        told = None if task["status"] == "pending" else task["progress"]
        stage = told["stage"] if told else task["status"]
        return Progress(stage=stage, done=0, total=1, fraction=fraction, eta_s=task.get("eta_s"))
    ready = sum(task["status"] in ENDED for task in tasks)
    return Progress(stage="ready", done=ready, total=len(tasks), fraction=sum(fractions) / len(tasks), eta_s=left_s)


def _fraction(task: Mapping[str, Any]) -> float:
    if task["status"] in ENDED:
        return 1.0
    return task["progress"]["fraction"] if task["status"] == "processing" and task["progress"] else 0.0


async def _end(client: QueueClient, task: Mapping[str, Any], path: Path | None, *, beside: bool) -> str | None:
    """Saves the clip of a task if there is somewhere to. Returns why there is none. `beside`: replaces no other."""
    if task["status"] not in ENDED:
        return f"task {task['id']} is {task['status']}: --wait waits for it"
    if task["status"] != "completed":
        reason = f": {task['error_message']}" if task["error_message"] else ""
        return f"task {task['id']} ended {task['status']}{reason}"
    if path is None:
        return None
    try:
        save = partial(_save_beside, client) if beside else client.save_video
        terminal.result(await save(task["id"], path))
    except Refusal as error:  # it has no video any more, or was deleted a moment ago
        return str(error)
    except StorageError as error:  # of this clip alone, while the queue answers and the disk has room
        return f"task {task['id']} is completed, and its video cannot be fetched: {error}"
    return None


def _tell(name: str, reason: str | None, *, is_saved: bool) -> None:
    """One of several has ended."""
    if reason is not None:
        terminal.error(f"{name}: {reason}")
    elif not is_saved:  # otherwise its path says so
        terminal.say(f"  {name}  completed")


async def _save_beside(client: QueueClient, item_id: str, path: Path) -> Path:
    """Saves a clip, and replaces none. Returns where it is. Raises as QueueClient.save_video."""
    with suppress(OSError):  # whoever writes into it says what is wrong
        path.parent.mkdir(exist_ok=True)
    with temporary_folder(".i2v-", path.parent) as folder:
        fresh = await client.save_video(item_id, Path(folder) / path.name, told_as=path)
        try:
            return await anyio.to_thread.run_sync(_placed, fresh, path)
        except OSError as error:
            raise write_error(error, f"{path} cannot be written: {error.strerror}") from None


def _placed(fresh: Path, wanted: Path) -> Path:
    """Moves a clip to its place. Another of that name stays, and the clip gets a number; the same one is enough."""
    numbered = NUMBERED.fullmatch(wanted.stem)
    stem, first = (numbered[1], int(numbered[2])) if numbered else (wanted.stem, 1)
    for number in itertools.count(first):
        path = wanted if number == first else wanted.with_stem(f"{stem} ({number})")
        try:
            path.touch(exist_ok=False)
        except FileExistsError:
            if path.is_file() and filecmp.cmp(fresh, path, shallow=False):
                return path
        else:
            return fresh.replace(path)
    raise AssertionError  # there is always one more number
