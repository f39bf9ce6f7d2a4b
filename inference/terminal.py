"""Terminal output for people: progress bars, summaries, tables, error lines."""

import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

from rich.cells import cell_len
from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table
from rich.text import Text

from inference.errors import legible
from inference.logs import json_escaped
from inference.progress.eta import StageHistory, TaskEta
from inference.progress.events import percent
from inference.progress.files import FileProgress
from inference.progress.stages import Progress as Snapshot
from inference.progress.stages import Sink
from inference.task import Video


class Screen(Console):
    """A console whose reader may end before it does."""

    def on_broken_pipe(self) -> None:
        """Lets the error be told as any other; rich would raise SystemExit in the middle of a task group.

        Raises BrokenPipeError.
        """
        raise BrokenPipeError


out = Screen(highlight=False, soft_wrap=True)
err = Screen(stderr=True, highlight=False, soft_wrap=True)

PIPED_WIDTH = 240
"""Width where there is no terminal: programs that read the output expect one line a task."""

NARROW_BAR = 72
"""Cells of a terminal on which a progress bar is short, and how long it took is left out."""

MIN_LABEL = 8
"""Cells that what a bar is about has at least."""

TaskView = Mapping[str, Any]
"""A task as the embedded queue's API describes it; those of other versions may lack fields."""

STATUS_STYLES = {"completed": "green", "failed": "red", "processing": "cyan", "cancelled": "dim"}


def shown(text: object, style: str = "") -> Text:
    """Untrusted text and paths, without escape sequences and markup."""
    return Text(legible(str(text)), style)


def say(text: str) -> None:
    """A line for people, on stderr; stdout is for results."""
    err.print(shown(text))


def headline(text: str) -> None:
    """What somebody who starts a command has to see first, between log lines."""
    err.print()
    err.print(shown(text, "bold"))
    err.print()


def completed(text: str) -> None:
    """The final line of a command that has succeeded."""
    err.print(Text("  ").append_text(shown("completed", "green")).append_text(shown(f"  {text}")))


def result(value: object) -> None:
    """A result on stdout: unchanged for programs, and made legible on a terminal."""
    if out.is_terminal:
        # The same one as of stderr if that is one, and a bar there goes around what is printed by its own console.
        (err if err.is_terminal else out).print(shown(value))
    else:
        sys.stdout.flush()
        sys.stdout.buffer.write(os.fsencode(f"{value}\n"))  # also a file name that is not Unicode
        sys.stdout.buffer.flush()  # somebody may read along


def json_line(text: str) -> None:
    """JSON on stdout, for programs and people."""
    out.print(Text(json_escaped(text)))


def exception() -> None:
    """The traceback of the exception that is being handled."""
    for line in traceback.format_exc().splitlines():
        say(line)


def tell(text: str) -> None:
    """A line on stderr if it is a terminal; otherwise stderr is for log lines only."""
    if err.is_terminal:
        say(text)


def error(message: str) -> None:
    """One line per problem."""
    for line in message.splitlines():
        err.print(shown("i2v:", "red").append_text(shown(f" {line}")))


@contextmanager
def bar(label: str, *, lines: bool = True) -> Iterator[Sink]:
    """A progress bar while the block runs; without a terminal, a line for each stage unless `lines` is false."""
    if not err.is_terminal:
        yield _stage_lines(label) if lines else lambda _: None
        return
    is_narrow = err.width < NARROW_BAR
    columns = [
        TextColumn("  {task.description}"),
        BarColumn(bar_width=8 if is_narrow else 30),
        TextColumn("{task.percentage:>3.0f} %"),
        TextColumn("[dim]{task.fields[stage]}"),
        *([] if is_narrow else [TimeElapsedColumn()]),
        TextColumn("[dim]{task.fields[left]}"),
    ]
    name = shown(label)
    name.truncate(max(MIN_LABEL, err.width // 4), overflow="ellipsis")
    # For those who do not say how much time is left: told by the speed of the present stage, since what a task waited
    # before says nothing of it.
    eta = TaskEta(StageHistory(), label)
    with Progress(*columns, console=err, transient=True) as progress:
        task = progress.add_task(escape(name.plain), total=1.0, stage="", left="")

        def sink(snapshot: Snapshot) -> None:
            now_s = time.monotonic()
            eta.observe(snapshot.stage, snapshot.fraction, now_s)
            left_s = eta.left_s(now_s) if snapshot.eta_s is None else snapshot.eta_s
            count = f" {snapshot.done:g}/{snapshot.total:g}" if snapshot.total > 1 else ""
            progress.update(
                task,
                completed=snapshot.fraction,
                stage=f"{escape(legible(snapshot.stage))}{count}",
                left="" if left_s is None or snapshot.fraction >= 1 else f"left {span(left_s)}",
            )

        yield sink


@contextmanager
def files() -> Iterator[Callable[[FileProgress], None]]:
    """A progress bar for the current file while the block runs; without a terminal, a line for each file and step."""
    last: tuple[str, str] | None = None
    columns = (
        TextColumn("  {task.description}"),
        BarColumn(bar_width=30),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as progress:
        task = progress.add_task("")

        def sink(file: FileProgress) -> None:
            nonlocal last
            described = f"{file.number}/{file.count} {file.step} {file.path}"
            if last != (file.path, file.step):
                last = file.path, file.step
                if not err.is_terminal:
                    say(f"  {described} ({file.size_bytes / 1e6:.1f} MB)")
                progress.reset(task, description=escape(legible(described)), total=file.size_bytes or None)
            progress.update(task, completed=file.done_bytes)

        yield sink


def _stage_lines(label: str) -> Sink:
    last = ""

    def sink(snapshot: Snapshot) -> None:
        nonlocal last
        if snapshot.stage != last:
            last = snapshot.stage
            say(f"  {label}: {snapshot.stage}")

    return sink


def describe(video: Video) -> str:
    """`5.04 s · 1280x704 · 24 fps · 121 frames · 3.4 MB`."""
    return (
        f"{video.duration_s:.2f} s · {video.width}×{video.height} · {video.fps:g} fps · {video.frames} frames"  # noqa: RUF001
        f" · {video.size_bytes / 1e6:.1f} MB"
    )


def times(stage_seconds: Mapping[str, float]) -> str:
    """`download 0.1 s · render 4.2 s · …`: the time of each stage."""
    return " · ".join(f"{stage} {seconds:.1f} s" for stage, seconds in stage_seconds.items())


def finding(name: str, verdict: str, text: str) -> None:
    """One line of `i2v doctor`."""
    style = {"ok": "green", "FAIL": "bold red"}.get(verdict, "dim")
    out.print(shown(f"{verdict:<4}", style).append_text(shown(f"  {name:<13}  {text}")))


def show(table: Table) -> None:
    """A table on stdout; without a terminal, a line for each row."""
    (out if out.is_terminal else Screen(highlight=False, soft_wrap=True, width=PIPED_WIDTH)).print(table)


def show_tasks(tasks: Sequence[TaskView]) -> None:
    """Tasks of the embedded queue, one a row, followed by the errors of failed ones."""
    show(_task_table(tasks, out.width if out.is_terminal else PIPED_WIDTH))
    for task in tasks:
        if task["error_message"]:
            out.print(shown(f"{task['id']}  ").append_text(shown(task["error_message"], "red")))


@contextmanager
def watched_tasks() -> Iterator[Callable[[Sequence[TaskView], str], None]]:
    """Takes tasks again and again, with a line about all of them, and shows them as a table that changes in place.

    The table stays after the block. Without a terminal, a line on stdout for each change of a task's status or stage.
    """
    if not out.is_terminal:
        yield _change_lines()
        return
    with Live(console=out, auto_refresh=False) as live:

        def show_now(tasks: Sequence[TaskView], summary: str) -> None:
            below_lines = len(shown(f"{summary}  (and {len(tasks)} more)").wrap(out, out.width))
            fitting = tasks[: max(1, out.height - max(2, below_lines) - 2)]  # the head, and the line of the cursor
            table: Table | Text = Text("No tasks.")
            if fitting:
                table = _task_table(fitting, out.width, for_watching=True)
            left_out = f"  (and {len(tasks) - len(fitting)} more)" if len(tasks) > len(fitting) else ""
            below = shown(f"{summary}{left_out}", "dim").wrap(out, out.width)  # the console itself would cut it off
            live.update(Group(table, *below), refresh=True)

        yield show_now


def _change_lines() -> Callable[[Sequence[TaskView], str], None]:
    told: dict[str, tuple[str, str]] = {}

    def show_changes(tasks: Sequence[TaskView], _summary: str) -> None:
        nonlocal told
        before, told = told, {task["id"]: (task["status"], _progress_of(task).get("stage", "")) for task in tasks}
        for task in reversed(tasks):  # what began first is told first
            status, stage = told[task["id"]]
            if before.get(task["id"]) != (status, stage):
                cells = [task["id"], _status_of(task), stage, _price_of(task), task["error_message"] or ""]
                result("  ".join(legible(cell) for cell in cells if cell))
        sys.stdout.flush()

    return show_changes


NARROW = 110
"""Cells of a terminal on which a table that is watched has only the ends of ids, to have room for what changes."""

SHORT_ID_CHARS = 8
"""The end of an id: the beginning is a time, which tasks that were submitted together share."""

LEAST = {"photo": 10, "prompt": 10}
"""Cells of the columns that are cut where a terminal is narrow. Others are whole, since people copy ids from here."""

LEAST_WATCHED = {"photo": 6, "prompt": 10}
"""Where ids are cut, too: so that 40 cells have room for the photo."""

MOST = {"photo": 24, "prompt": 40}

GO_FIRST = ("seconds", "age", "stage", "prompt", "price", "left", "photo")
"""Columns that are left out where a terminal is too narrow, in this order."""


def _task_table(tasks: Sequence[TaskView], width: int, *, for_watching: bool = False) -> Table:
    """`for_watching`: shortens ids on a narrow terminal, and shows a failed task's error instead of its prompt."""
    is_short = for_watching and width < NARROW
    cells = _cells(tasks, is_short=is_short, for_watching=for_watching)
    go_first: Sequence[str] = GO_FIRST
    if for_watching and any(task["error_message"] for task in tasks):
        go_first = ("photo", *(title for title in GO_FIRST if title not in {"photo", "prompt"}))
    widths = _widths(cells, width, go_first, LEAST_WATCHED if is_short else LEAST)
    if not is_short and _whole(widths) > width:
        return _stacked(tasks, width)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title, cells_wide in widths.items():
        if title in LEAST:
            table.add_column(title, overflow="ellipsis", no_wrap=True, max_width=cells_wide)
        else:
            table.add_column(title, no_wrap=True, min_width=cells_wide)
    for number in range(len(tasks)):
        table.add_row(*(cells[title][number] for title in widths))
    return table


def _cells(tasks: Sequence[TaskView], *, is_short: bool, for_watching: bool) -> dict[str, list[Text]]:
    """What there is to show, by columns; none of which nothing is known."""
    columns: dict[str, list[Text]] = {
        "task": [shown(task["id"][-SHORT_ID_CHARS:] if is_short else task["id"]) for task in tasks],
        "status": [shown(_status_of(task), STATUS_STYLES.get(task["status"], "")) for task in tasks],
        "stage": [shown(_progress_of(task).get("stage", "")) for task in tasks],
        "left": [shown("" if task.get("eta_s") is None else span(task["eta_s"])) for task in tasks],
        "price": [shown(_price_of(task)) for task in tasks],
        "age": [shown(_age(task["created_at"])) for task in tasks],
        "seconds": [shown(f"{task['seconds']:g}") for task in tasks],
        "photo": [shown(task.get("photo_filename") or "") for task in tasks],
        "prompt": [
            shown(task["error_message"], "red") if for_watching and task["error_message"] else shown(task["prompt"])
            for task in tasks
        ],
    }
    always = ("task", "status", "age", "seconds", "prompt")
    return {title: cells for title, cells in columns.items() if title in always or any(cell.plain for cell in cells)}


def _widths(
    cells: Mapping[str, Sequence[Text]], width: int, go_first: Sequence[str], least: Mapping[str, int]
) -> dict[str, int]:
    """The cells of each column that there is room for."""
    natural = {title: max(cell_len(text) for text in (title, *map(str, column))) for title, column in cells.items()}
    widths = {title: min(cells, least.get(title, cells)) for title, cells in natural.items()}
    for title in go_first:
        if _whole(widths) > width:
            widths.pop(title, None)
    for title in least:
        if title in widths:
            room = max(1, width - _whole(widths) + widths[title])
            widths[title] = min(natural[title], MOST[title], room)
    return widths


def _whole(widths: Mapping[str, int]) -> int:
    """Cells of a table's row."""
    return sum(widths.values()) + 2 * (len(widths) - 1)


def _stacked(tasks: Sequence[TaskView], width: int) -> Table:
    """Where an id takes the whole line: what is known of its task is below."""
    table = Table.grid()
    table.add_column(overflow="ellipsis", no_wrap=True, max_width=width)
    for task in tasks:
        left = "" if task.get("eta_s") is None else f"{span(task['eta_s'])} left"
        facts = [left, _price_of(task), task.get("photo_filename") or task["prompt"]]
        table.add_row(shown(task["id"], "bold"))
        line = Text("  ").append_text(shown(_status_of(task), STATUS_STYLES.get(task["status"], "")))
        table.add_row(line.append_text(shown("".join(f"  {fact}" for fact in facts if fact))))
    return table


def _progress_of(task: TaskView) -> Mapping[str, Any]:
    """How far a task is, while somebody works on it."""
    return (task.get("progress") or {}) if task["status"] == "processing" else {}


def _status_of(task: TaskView) -> str:
    """`processing 34%`. A task that is to be cancelled says so until its worker has heard."""
    if task["status"] == "processing" and task.get("cancel_requested"):
        return "cancelling"
    progress = _progress_of(task)
    return f"{task['status']} {percent(progress['fraction'])}%" if progress else str(task["status"])


def _price_of(task: TaskView) -> str:
    """Of what a worker knew the price of; other servers than ours say nothing of it."""
    return "" if task.get("cost_usd") is None else usd(task["cost_usd"])


def usd(amount_usd: float) -> str:
    """`$0.05`; less than a cent is told to a hundredth of one."""
    return f"${amount_usd:.4f}" if 0 < amount_usd < 0.01 else f"${amount_usd:.2f}"


def span(seconds: float) -> str:
    """`45 s`, `3 min`, `2 h`, `1 d`."""
    for unit, length in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"


def _age(created_at: str) -> str:
    return span((datetime.now(UTC) - datetime.fromisoformat(created_at)).total_seconds())
