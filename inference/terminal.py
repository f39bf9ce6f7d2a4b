"""Terminal output for people: progress bars, summaries, tables, error lines."""

import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

from rich.cells import cell_len
from rich.console import Console
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
from inference.progress.files import FileProgress
from inference.progress.stages import Progress as Snapshot
from inference.progress.stages import Sink
from inference.task import Video

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)

PIPED_WIDTH = 240
"""Width where there is no terminal: programs that read the output expect one line a task."""

STATUS_STYLES = {"completed": "green", "failed": "red", "processing": "cyan", "cancelled": "dim"}


def shown(text: object, style: str = "") -> Text:
    """Untrusted text and paths, without escape sequences and markup."""
    return Text(legible(str(text)), style)


def say(text: str) -> None:
    """A line for people, on stderr; stdout is for results."""
    err.print(shown(text))


def completed(text: str) -> None:
    """The final line of a command that has succeeded."""
    err.print(Text("  ").append_text(shown("completed", "green")).append_text(shown(f"  {text}")))


def result(value: object) -> None:
    """A result on stdout: unchanged for programs, and made legible on a terminal."""
    if out.is_terminal:
        out.print(shown(value))
    else:
        sys.stdout.flush()
        sys.stdout.buffer.write(os.fsencode(f"{value}\n"))  # also a file name that is not Unicode


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
def bar(label: str) -> Iterator[Sink]:
    """A progress bar while the block runs; without a terminal, a line for each stage."""
    if not err.is_terminal:
        yield _stage_lines(label)
        return
    columns = (
        TextColumn("  {task.description}"),
        BarColumn(bar_width=30),
        TextColumn("{task.percentage:>3.0f} %"),
        TextColumn("[dim]{task.fields[stage]}"),
        TimeElapsedColumn(),
        TextColumn("[dim]left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err, transient=True) as progress:
        task = progress.add_task(escape(legible(label)), total=1.0, stage="")

        def sink(snapshot: Snapshot) -> None:
            count = f" {snapshot.done:g}/{snapshot.total:g}" if snapshot.total > 1 else ""
            progress.update(task, completed=snapshot.fraction, stage=f"{escape(legible(snapshot.stage))}{count}")

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
    (out if out.is_terminal else Console(highlight=False, soft_wrap=True, width=PIPED_WIDTH)).print(table)


def show_tasks(tasks: list[dict[str, Any]]) -> None:
    """Tasks of the embedded queue, one a row, followed by the errors of failed ones."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    rows = [_task_cells(task) for task in tasks]
    for number, title in enumerate(("task", "status", "age", "seconds")):
        # Never shortened, since people copy ids from here. A narrow terminal shows less of the prompt instead.
        table.add_column(
            title, no_wrap=True, min_width=max(cell_len(cell) for cell in (title, *(row[number].plain for row in rows)))
        )
    table.add_column("prompt", overflow="ellipsis", no_wrap=True, max_width=40)
    for row in rows:
        table.add_row(*row)
    show(table)
    for task in tasks:
        if task["error_message"]:
            out.print(shown(f"{task['id']}  ").append_text(shown(task["error_message"], "red")))


def _task_cells(task: dict[str, Any]) -> tuple[Text, ...]:
    status = str(task["status"])
    progress = task.get("progress") or {}
    percent = f" {progress['fraction']:.0%}" if status == "processing" and progress else ""
    return (
        shown(task["id"]),
        shown(f"{status}{percent}", STATUS_STYLES.get(status, "")),
        shown(_age(task["created_at"])),
        shown(f"{task['seconds']:g}"),
        shown(task["prompt"]),
    )


def _age(created_at: str) -> str:
    seconds = (datetime.now(UTC) - datetime.fromisoformat(created_at)).total_seconds()
    for unit, length in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"
